"""Recall of detections at k times as many predictions as there are true segments, as ActionFormer reports it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from tad.annotations import Truth
from tad.errors import AnnotationError
from tad.evaluate.detection import THUMOS_TIOU
from tad.evaluate.matching import pairs
from tad.evaluate.matching import tiou as segment_tiou
from tad.evaluate.ranked import rank
from tad.evaluate.selection import Thresholds


def recall_at_kx(
    truth: Truth | pd.DataFrame,
    predictions: pd.DataFrame,
    tiou: Thresholds = THUMOS_TIOU,
    *,
    k: Sequence[int] = (1, 5),
    **options: Any,
) -> pd.DataFrame:
    """Share of the true segments that the k best predictions per true segment reach, mean over the classes.

    In each video and class with G true segments the k G best scored predictions are looked at; a segment is found when
    any of them reaches the threshold, also one that reaches another segment better. Equal scores keep the table's
    order.

    Parameters
    ----------
    truth, predictions, tiou, options : as :func:`tad.evaluate.detection_map`.

    Returns
    -------
    One row a tIoU, one column a k; 0 ... 1.

    Raises
    ------
    AnnotationError : as :func:`tad.evaluate.detection_map`, or a k below 1.
    """
    if not len(k) or min(k) < 1:
        raise AnnotationError(f"k must be whole numbers of at least 1, got {tuple(k)}")
    ranked = rank(truth, predictions, tiou, **options)
    true_group = ranked.true_video * len(ranked.classes) + ranked.true_label
    group = ranked.video * len(ranked.classes) + ranked.label
    order = np.argsort(group, kind="stable")  # by group, in it by falling score
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    size = np.bincount(true_group)[true_group]  # true segments of the same video and class

    segments = ranked.predictions[["start_s", "end_s"]].to_numpy()
    truths = ranked.truth[["start_s", "end_s"]].to_numpy()
    nobody = np.iinfo(np.int64).max
    first = np.full((len(truths), len(ranked.levels)), nobody)  # place of the best scored one that finds it
    for a, b in pairs(true_group, group):
        value = segment_tiou(truths[a, 0], truths[a, 1], segments[b, 0], segments[b, 1], both_empty=0.0)
        for column, level in enumerate(ranked.levels):
            hit = value >= level
            np.minimum.at(first[:, column], a[hit], place[b[hit]])
    found = np.stack([first < times * size[:, None] for times in k], axis=2)  # (M, T, K)
    total = np.zeros((len(ranked.classes), *found.shape[1:]))
    np.add.at(total, ranked.true_label, found.astype(np.float64))
    mean = (total / ranked.positives[:, None, None]).mean(axis=0)
    keys = pd.Index([round(level, 6) for level in ranked.levels], name="tiou")
    return pd.DataFrame(mean, index=keys, columns=pd.Index(list(k), name="k"))
