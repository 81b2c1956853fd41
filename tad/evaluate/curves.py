"""Precision over recall by class, thinned for drawing; and who is taken for whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from tad.annotations import Truth
from tad.evaluate.matching import average_precision, pairs, tiou
from tad.evaluate.ranked import Ranked, rank

Array = np.ndarray
POINTS = 200


def pr_curves(
    truth: Truth | pd.DataFrame, predictions: pd.DataFrame, tiou: float = 0.5, *, points: int = POINTS, **options: Any
) -> dict[Any, tuple[Array, Array]]:
    """Interpolated precision over recall of every class, as the area under it is the average precision.

    Parameters
    ----------
    truth, predictions, options : as :func:`tad.evaluate.detection_map`. tiou : one threshold.
    points : a curve is thinned to at most so many points, evenly over the true segments found; the first and last stay.

    Returns
    -------
    By label: recall, rising, and precision, falling, each of (P,) with 1 <= P <= ``points``. The curve starts at recall
    0 and ends where no further segment is found; a class of which nothing is found has the one point (0, 0).
    """
    ranked = rank(truth, predictions, tiou, **options)
    curves: dict[Any, tuple[Array, Array]] = {}
    for c, label in enumerate(ranked.classes):
        hits = ranked.taken[0, ranked.edges[c] : ranked.edges[c + 1]] >= 0
        place = np.flatnonzero(hits)
        if not len(place):
            curves[label] = np.zeros(1), np.zeros(1)
            continue
        found = np.arange(1, len(place) + 1)
        precision = np.maximum.accumulate((found / (place + 1))[::-1])[::-1]
        recall = np.concatenate(([0.0], found / ranked.positives[c]))
        precision = np.concatenate((precision[:1], precision))
        keep = np.unique(np.linspace(0, len(recall) - 1, min(max(2, points), len(recall))).round().astype(np.int64))
        curves[label] = recall[keep], precision[keep]
    return curves


def map_at(ranked: Ranked, level: int = 0) -> float:
    """Ordinary mAP at one threshold, 0 ... 1."""
    hits = ranked.taken[level : level + 1] >= 0
    edges = ranked.edges
    return float(
        np.mean(
            [average_precision(hits[:, edges[c] : edges[c + 1]], n)[0] for c, n in enumerate(ranked.positives.tolist())]
        )
    )


def confusion(ranked: Ranked, kept: Array, level: int = 0) -> dict[str, Any]:
    """Labels of true segments against labels of what overlaps them best.

    Row: the label of a true segment; column: that of the prediction, of any label, that overlaps it best (equal tIoU:
    the better score), or background when none reaches the threshold. Last row: predictions that reach the threshold
    with no true segment, by their label. A prediction may be the best of several segments.

    Parameters
    ----------
    kept : (N,) booleans, the predictions that are looked at.

    Returns
    -------
    ``classes`` (C labels, then ``"background"``), ``matrix`` (C + 1) x (C + 1) counts.
    """
    threshold, background = ranked.levels[level], len(ranked.classes)
    rows = np.flatnonzero(kept)
    segments = ranked.predictions[["start_s", "end_s"]].to_numpy()[rows]
    truths = ranked.truth[["start_s", "end_s"]].to_numpy()
    score = ranked.predictions["score"].to_numpy()[rows]
    column = np.full(len(truths), background)
    alone = np.ones(len(rows), dtype=bool)
    for a, b in pairs(ranked.true_video, ranked.video[rows]):  # a: true segments, b: predictions
        value = tiou(truths[a, 0], truths[a, 1], segments[b, 0], segments[b, 1], both_empty=0.0)
        near = value >= threshold
        a, b, value = a[near], b[near], value[near]
        alone[b] = False
        order = np.lexsort((b, -score[b], -value, a))
        found, first = np.unique(a[order], return_index=True)
        column[found] = ranked.label[rows][b[order[first]]]
    matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
    np.add.at(matrix, (ranked.true_label, column), 1)
    matrix[background, :background] = np.bincount(ranked.label[rows][alone], minlength=background)
    return {"classes": [*map(str, ranked.classes), "background"], "matrix": matrix.tolist()}
