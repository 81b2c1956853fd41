"""Kinds of predictions: what is right, and in which way the others are wrong; what removing a kind would gain."""

from __future__ import annotations

from typing import Any

import numpy as np

from tad.evaluate.matching import normalized_average_precision, pairs, tiou
from tad.evaluate.ranked import Ranked

Array = np.ndarray
# By code. The order is DETAD's; everything but the first is a false positive.
KINDS = ("true_positive", "double_detection", "wrong_label", "localization", "confusion", "background")
MIN_TIOU = 0.1


def best_overlap(ranked: Ranked, *, own_label_first: bool = False) -> tuple[Array, Array, Array]:
    """The true segment of its video, of any class, that each prediction overlaps best.

    Returns
    -------
    overlap : (N,) its tIoU, 0 in a video without true segments.
    own : (N,) whether it has the prediction's label. When several are best the first of the table counts, as in DETAD;
        with ``own_label_first`` one of the prediction's own label if there is one.
    row : (N,) its row in the truth, -1 where the overlap is 0.
    """
    number = len(ranked.label)
    overlap, own, row = np.zeros(number), np.zeros(number, dtype=bool), np.full(number, -1, dtype=np.int64)
    segments = ranked.predictions[["start_s", "end_s"]].to_numpy()
    truths = ranked.truth[["start_s", "end_s"]].to_numpy()
    for a, b in pairs(ranked.video, ranked.true_video):
        value = tiou(segments[a, 0], segments[a, 1], truths[b, 0], truths[b, 1], both_empty=0.0)
        keep = value > 0
        a, b, value = a[keep], b[keep], value[keep]
        same = ranked.label[a] == ranked.true_label[b]
        other = ~same if own_label_first else np.zeros(len(a), dtype=bool)
        order = np.lexsort((b, other, -value, a))
        found, first = np.unique(a[order], return_index=True)
        pick = order[first]
        overlap[found], own[found], row[found] = value[pick], same[pick], b[pick]
    return overlap, own, row


def kinds(ranked: Ranked, level: int = 0, *, min_tiou: float = MIN_TIOU, own_label_first: bool = False) -> Array:
    """The kind of every prediction, as an index into :data:`KINDS`.

    With ``t`` the threshold and ``o`` the highest tIoU with a true segment of the video, whatever its class:

    - true positive: takes a true segment of its class (:func:`tad.evaluate.matching.match`); of the others
    - double detection: ``o >= t`` and the label is that segment's: a better scored prediction took it
    - wrong label: ``o >= t`` and the label is another
    - localization: ``min_tiou <= o < t`` and the label is that segment's
    - confusion: ``min_tiou <= o < t`` and the label is another
    - background: ``o < min_tiou``, or the video has no true segment

    Alwassel et al. 2018, section 4.1. A prediction on a segment that is annotated with two labels (Diving and
    CliffDiving in THUMOS14) counts by the first of them unless ``own_label_first`` is set.

    Returns
    -------
    (N,) integers
    """
    threshold = ranked.levels[level]
    overlap, own, _ = best_overlap(ranked, own_label_first=own_label_first)
    code = np.select(
        [(overlap >= threshold) & own, overlap >= threshold, (overlap >= min_tiou) & own, overlap >= min_tiou],
        [1, 2, 3, 4],
        5,
    )
    return np.where(ranked.taken[level] >= 0, 0, code)


def by_limit(ranked: Ranked, kind: Array, limit: int) -> list[dict[str, Any]]:
    """Shares of the kinds among the predictions between (g - 1)G and gG, for g = 1 ... ``limit``.

    G is the number of true segments of a class; band g holds of each class the predictions ranked (g - 1)G to gG.

    Returns
    -------
    One row a band: ``g``, ``count`` (its predictions), and a share for each of :data:`KINDS`; the shares sum to 1, or
    are 0 in a band without predictions.
    """
    band = ranked.rank // ranked.positives[ranked.label]
    rows: list[dict[str, Any]] = []
    for g in range(limit):
        number = np.bincount(kind[band == g], minlength=len(KINDS))
        share = number / max(1, number.sum())
        rows.append({"g": g + 1, "count": int(number.sum()), **dict(zip(KINDS, share.tolist(), strict=True))})
    return rows


def gain(ranked: Ranked, kind: Array, limit: int, level: int = 0) -> tuple[float, dict[str, float]]:
    """Normalised mAP of the first ``limit`` G predictions, and what it gains when one kind of error is removed.

    Removing false positives moves the others up and loses nothing, so a gain is never negative.

    Returns
    -------
    normalised mAP, and gain by kind; both 0 ... 1.
    """
    average = float(ranked.positives.mean())
    kept = ranked.rank < limit * ranked.positives[ranked.label]
    hits = ranked.taken[level] >= 0

    def mean(mask: Array) -> float:
        edges = np.searchsorted(ranked.label[mask], np.arange(len(ranked.classes) + 1))
        of_class = hits[mask]
        return float(
            np.mean(
                [
                    normalized_average_precision(of_class[edges[c] : edges[c + 1]], positives, average)
                    for c, positives in enumerate(ranked.positives.tolist())
                ]
            )
        )

    whole = mean(kept)
    return whole, {name: mean(kept & (kind != code)) - whole for code, name in enumerate(KINDS) if code}
