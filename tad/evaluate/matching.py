"""Which prediction finds which true segment: the matching behind mAP, for all videos and classes at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

Array = np.ndarray
PAIRS = 1 << 21  # pairs of segments looked at in one go; bounds memory at about 100 MB


def tiou(start_a: Array, end_a: Array, start_b: Array, end_b: Array, *, both_empty: float = np.inf) -> Array:
    """Temporal intersection over union of segments, pair by pair, in float64 and in ActivityNet's order of operations.

    Zero-length on zero-length gives 0/0: that is ``both_empty``. A segment whose end lies before its start
    overlaps nothing: 0.
    """
    overlap = np.minimum(end_a, end_b) - np.maximum(start_a, start_b)
    np.maximum(overlap, 0.0, out=overlap)
    union = (end_b - start_b) + (end_a - start_a) - overlap
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = overlap / union
    ratio[np.isnan(ratio)] = both_empty
    ratio[(end_a < start_a) | (end_b < start_b)] = 0.0
    return ratio


def pairs(group_a: Array, group_b: Array, *, limit: int = PAIRS) -> Iterator[tuple[Array, Array]]:
    """All pairs (index in a, index in b) of one group, about ``limit`` of them at a time, ordered by the index in a.

    Groups are integers; a negative one pairs with nothing. Within one index of a, the indices of b rise.
    """
    order = np.argsort(group_b, kind="stable")
    first = np.searchsorted(group_b[order], group_a, side="left")
    count = np.searchsorted(group_b[order], group_a, side="right") - first
    count[group_a < 0] = 0
    behind = np.cumsum(count)  # pairs up to and including this row
    row = 0
    while row < len(group_a):
        before = behind[row - 1] if row else 0
        stop = max(row + 1, int(np.searchsorted(behind, before + limit, side="right")))
        number = count[row:stop]
        a = np.repeat(np.arange(row, stop), number)
        within = np.arange(len(a)) - np.repeat(np.cumsum(number) - number, number)
        yield a, order[np.repeat(first[row:stop], number) + within]
        row = stop


def match(
    truth_group: Array,
    truth_segments: Array,
    group: Array,
    segments: Array,
    score: Array,
    thresholds: Sequence[float],
    *,
    single_precision: bool = False,
) -> Array:
    """Match predictions to true segments as ActivityNet's evaluator does.

    In the order of falling score (equal scores: input order) every prediction takes, among the true segments of its
    group that no earlier one took, that of the highest tIoU, if it is at least the threshold (equal tIoU: the last).

    That sequential rule is a stable matching in which all true segments prefer the same order of predictions, so it
    is computed by deferred acceptance (Gale and Shapley 1962): every prediction asks for its best segment, a segment
    keeps the best that asked, the others ask for their next. A round treats all videos and classes together.

    Parameters
    ----------
    truth_group, group : (M,) and (N,) integers; only equal ones match. Usually one per (video, class). A negative
        group matches nothing.
    truth_segments, segments : (M, 2) and (N, 2) start and end in seconds.
    score : (N,) finite.
    thresholds : T values of tIoU.
    single_precision : round tIoU to float32 first.

    Returns
    -------
    (T, N) integers : the index of the true segment that each prediction takes, -1 for none.
    """
    result = np.full((len(thresholds), len(group)), -1, dtype=np.int64)
    rank = np.argsort(-score, kind="stable")  # rank -> prediction
    asks, asked, value = _candidates(
        truth_group, truth_segments, group[rank], segments[rank], min(thresholds), single_precision
    )
    asking, first = np.unique(asks, return_index=True)  # predictions with a candidate, best score first
    for row, threshold in enumerate(thresholds):
        # Candidates are sorted by falling tIoU, so those above the threshold come first.
        number = np.add.reduceat(value >= threshold, first) if len(first) else first
        taker = _deferred_acceptance(first, first + number, asked, len(truth_group))
        taken = np.flatnonzero(taker >= 0)
        result[row, rank[asking[taker[taken]]]] = taken
    return result


def _candidates(
    truth_group: Array,
    truth_segments: Array,
    group: Array,
    segments: Array,
    threshold: float,
    single_precision: bool,
) -> tuple[Array, Array, Array]:
    """Pairs (prediction, truth, tIoU) at or above a threshold, by prediction, then falling tIoU, then falling truth."""
    found: list[tuple[Array, Array, Array]] = []
    for a, b in pairs(group, truth_group):
        value = tiou(segments[a, 0], segments[a, 1], truth_segments[b, 0], truth_segments[b, 1])
        if single_precision:
            value = value.astype(np.float32).astype(np.float64)
        keep = value >= threshold
        found.append((a[keep], b[keep], value[keep]))
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    a, b, value = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((-b, -value, a))
    return a[order], b[order], value[order]


def _deferred_acceptance(first: Array, stop: Array, asked: Array, truths: int) -> Array:
    """For every true segment the row of the candidate lists that gets it, or -1; a smaller row has the better score.

    Row ``r`` asks for ``asked[first[r]:stop[r]]`` in this order.
    """
    nobody = len(first)
    taker = np.full(truths, nobody, dtype=np.int64)
    position = first.astype(np.int64)
    asking = np.flatnonzero(position < stop)
    while len(asking):
        wanted = asked[position[asking]]
        before = taker[wanted]
        np.minimum.at(taker, wanted, asking)
        won = taker[wanted] == asking
        displaced = before[won & (before < nobody)]
        refused = np.concatenate((asking[~won], displaced))
        position[refused] += 1
        asking = refused[position[refused] < stop[refused]]
    taker[taker == nobody] = -1
    return taker


def normalized_precision(hits: Array, positives: int, average: float) -> Array:
    """Precision that a class of ``average`` true segments would have at the same recall and false positives.

    Hoiem et al. 2012, equation 1, as DETAD uses it: ``r * average / (r * average + false positives)`` with the recall
    ``r``. With ``average == positives`` it is ordinary precision.

    Parameters
    ----------
    hits : (..., N) booleans in the order of falling score. positives : true segments of the class.

    Returns
    -------
    (..., N)
    """
    found = np.cumsum(hits, axis=-1) * (average / positives)
    wrong = np.cumsum(~hits, axis=-1)
    return found / (found + wrong)


def normalized_average_precision(hits: Array, positives: int, average: float) -> float:
    """Average precision of :func:`normalized_precision`, interpolated at all points; 0 without predictions.

    Parameters
    ----------
    hits : (N,) booleans in the order of falling score.
    """
    if not len(hits):
        return 0.0
    envelope = np.maximum.accumulate(normalized_precision(hits, positives, average)[::-1])[::-1]
    return float(np.where(hits, envelope, 0.0).sum() / positives)


def average_precision(hits: Array, positives: int) -> Array:
    """Average precision, interpolated at all points (PASCAL VOC from 2010 on, and ActivityNet).

    Parameters
    ----------
    hits : (T, N) booleans, whether each prediction of one class is right, in the order of falling score.
    positives : the number of true segments of the class.

    Returns
    -------
    (T,) area under the precision envelope: the mean over the true segments of the best precision at their recall or a
        higher one, zero for those never found.
    """
    if not hits.shape[1]:
        return np.zeros(hits.shape[0])
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)  # (T, N)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    return np.where(hits, envelope, 0.0).sum(axis=1) / positives
