"""Which true segments are missed, and how the score depends on what they are like."""

from __future__ import annotations

from typing import Any

import numpy as np

from tad.evaluate.characteristics import Characteristic
from tad.evaluate.matching import normalized_average_precision, normalized_precision
from tad.evaluate.ranked import Ranked

Array = np.ndarray
MIN_PRECISION = 0.05


def missed(ranked: Ranked, level: int = 0, *, min_precision: float = MIN_PRECISION) -> Array:
    """Which true segments no prediction finds at a normalised precision above ``min_precision``.

    A prediction so far down that hardly anything beside it is right finds nothing that anybody would see (Alwassel et
    al. 2018, section 4.3).

    Returns
    -------
    (M,) booleans
    """
    found = np.zeros(len(ranked.true_label), dtype=bool)
    average = float(ranked.positives.mean())
    for c, positives in enumerate(ranked.positives.tolist()):
        rows = slice(ranked.edges[c], ranked.edges[c + 1])
        taken = ranked.taken[level, rows]
        if not len(taken):
            continue
        clear = normalized_precision(taken >= 0, positives, average) > min_precision
        found[taken[clear & (taken >= 0)]] = True
    return ~found


def miss_rates(unseen: Array, features: list[Characteristic]) -> dict[str, list[dict[str, Any]]]:
    """By characteristic and bucket: ``bucket``, ``share`` of its true segments that are missed, their ``count``.

    Buckets without a true segment are left out.
    """
    result: dict[str, list[dict[str, Any]]] = {}
    for feature in features:
        rows = result.setdefault(feature.name, [])
        for index, name in enumerate(feature.buckets):
            inside = feature.bucket == index
            if inside.any():
                rows.append({"bucket": name, "share": float(unseen[inside].mean()), "count": int(inside.sum())})
    return result


def sensitivity(ranked: Ranked, features: list[Characteristic], level: int = 0) -> dict[str, Any]:
    """Normalised mAP over all true segments, and over those of one bucket only.

    For a bucket the predictions that take a segment of another one are put aside, so its false positives are all false
    positives; the mean is over the classes that have segments in it (Alwassel et al. 2018, section 4.2).

    Returns
    -------
    ``overall`` and, by characteristic, rows ``bucket``, ``ap``, ``count``; buckets without a segment are left out.
    """
    average = float(ranked.positives.mean())
    taken = ranked.taken[level]

    def mean(inside: Array) -> float:
        positives = np.bincount(ranked.true_label[inside], minlength=len(ranked.classes))
        kept = (taken < 0) | inside[taken]
        edges = np.searchsorted(ranked.label[kept], np.arange(len(ranked.classes) + 1))
        hits = taken[kept] >= 0
        return float(
            np.mean(
                [
                    normalized_average_precision(hits[edges[c] : edges[c + 1]], int(positives[c]), average)
                    for c in np.flatnonzero(positives)
                ]
            )
        )

    result: dict[str, Any] = {"overall": mean(np.ones(len(ranked.true_label), dtype=bool))}
    for feature in features:
        rows = result.setdefault(feature.name, [])
        for index, name in enumerate(feature.buckets):
            inside = feature.bucket == index
            if inside.any():
                rows.append({"bucket": name, "ap": mean(inside), "count": int(inside.sum())})
    return result
