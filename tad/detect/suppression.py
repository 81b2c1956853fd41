"""NMS, soft-NMS and its variants, and voting, in plain torch and over many videos and classes at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from tad.detect.segments import paired_tiou, segment_tiou

Decay = Literal["gaussian", "linear", "hard"]
BLOCK = 128  # candidates that one step of nms() settles together
SMALL = 512  # up to this many candidates of a label nms() compares all with all, many labels at once
TABLE = 2**20  # up to this many pairs are compared ahead, many labels at once; soft_nms() beyond that as it goes on,
SIDE_BY_SIDE = 2**16  # with this many candidates, padding included, in one pass


def nms(
    segments: Tensor,
    scores: Tensor,
    labels: Tensor | None = None,
    *,
    tiou: float = 0.7,
    max_segments: int | None = None,
) -> Tensor:
    """Greedy non-maximum suppression: the best-scored segment stays and removes every other one with tIoU ≥ ``tiou``.

    What does not overlap it at all stays, with ``tiou=0`` too.

    Parameters
    ----------
    segments : (N, 2) start and end, any unit.
    scores : (N,); equal scores rank by their place in the input.
    labels : (N,) integers; a segment then removes only segments of its own label. None: all of them.
    max_segments : keep at most this many, over all labels.

    Returns
    -------
    (K,) int64 indices of what stays, by falling score: exactly the greedy result.

    Raises
    ------
    ValueError : shapes that do not fit, NaN scores, segments that are not finite.
    """
    segments, scores = _checked(segments, scores, labels)
    order = torch.argsort(scores, descending=True, stable=True)  # (N,)
    if labels is None:
        return order[_greedy(segments[order], tiou, max_segments)][:max_segments]
    kept = [order[:0]]
    for group in _groups(order, labels):  # (G, n) indices, -1 = padding
        if group.shape[1] > SMALL:
            for row in group:
                row = row[row >= 0]
                kept.append(row[_greedy(segments[row], tiou, max_segments)])
        else:
            kept.append(group[_greedy_side_by_side(segments[group.clamp(min=0)], group >= 0, tiou)])
    return _by_score(torch.cat(kept), scores)[:max_segments]


def _by_score(indices: Tensor, scores: Tensor) -> Tensor:
    indices = indices.sort().values
    return indices[torch.argsort(scores[indices], descending=True, stable=True)]


def _greedy_side_by_side(segments: Tensor, stays: Tensor, tiou: float) -> Tensor:
    """(G, n) bool: who stays of ``segments`` (G, n, 2), each row sorted by falling score; ``stays``: no padding."""
    removes = _rivals(_pairwise_tiou(segments), tiou)  # (G, n, n)
    stays = stays.clone()
    for place in range(stays.shape[1] - 1):
        stays[:, place + 1 :] &= ~(removes[:, place, place + 1 :] & stays[:, place, None])
    return stays


def _pairwise_tiou(segments: Tensor) -> Tensor:
    """:func:`segment_tiou` of ``segments`` (G, n, 2) with themselves, (G, n, n), without its temporaries."""
    start, end = segments[..., 0].contiguous(), segments[..., 1].contiguous()
    length = (end - start).clamp(min=0)
    inter = torch.minimum(end[:, :, None], end[:, None])
    inter.sub_(torch.maximum(start[:, :, None], start[:, None])).clamp_(min=0)
    union = (length[:, :, None] + length[:, None]).sub_(inter)
    return inter.div_(union.clamp_(min=torch.finfo(union.dtype).tiny))


def _rivals(overlap: Tensor, threshold: float | Tensor) -> Tensor:
    """Bool like ``overlap``, tIoUs (..., n): which are at least ``threshold``, and not 0 where that is."""
    least = torch.finfo(overlap.dtype).tiny
    return overlap >= (threshold.clamp(min=least) if isinstance(threshold, Tensor) else max(threshold, least))


def _greedy(segments: Tensor, tiou: float, limit: int | None) -> Tensor:
    """Positions that greedy NMS keeps of ``segments`` (N, 2), which are sorted by falling score.

    ``limit`` may be overshot.
    """
    ends = segments.t().contiguous()  # (2, N): arithmetic on every second number is slow
    everyone = torch.arange(len(segments), device=segments.device)
    if limit is None:
        return _greedy_window(ends, everyone, tiou, None)
    kept = everyone[:0]
    for window in everyone.split(max(4 * limit, BLOCK)):  # the limit is mostly reached long before the last candidate
        window = window[~_removed(ends, kept, window, tiou)]
        kept = torch.cat((kept, _greedy_window(ends, window, tiou, limit - len(kept))))
        if len(kept) >= limit:
            break
    return kept


def _greedy_window(ends: Tensor, alive: Tensor, tiou: float, limit: int | None) -> Tensor:
    kept = [alive[:0]]
    count = 0
    while len(alive) and (limit is None or count < limit):
        head, tail = alive[:BLOCK], alive[BLOCK:]
        rivals = _rivals(segment_tiou(ends[:, head].t(), ends[:, head].t()), tiou)
        keep = head[_settled(rivals.triu(1))]
        kept.append(keep)
        count += len(keep)
        alive = tail[~_removed(ends, keep, tail, tiou)]
    return torch.cat(kept)


def _removed(ends: Tensor, keep: Tensor, others: Tensor, tiou: float) -> Tensor:
    """(M,) bool: one of ``keep`` overlaps this one of ``others`` (M,) too much; both index ``ends`` (2, N)."""
    return _rivals(segment_tiou(ends[:, keep].t(), ends[:, others].t()), tiou).any(0)


def _settled(removes: Tensor) -> Tensor:
    """(..., n) bool: who stays. Row i of ``removes`` (..., n, n) says whom i removes if it stays: only later ones.

    Iterates ``stays = nobody who stays removes me`` from all-stay. After k rounds the first k are final, so the fixed
    point is the greedy result; it is mostly reached after a handful of rounds.
    """
    stays = torch.ones(removes.shape[:-1], dtype=torch.bool, device=removes.device)
    while True:
        settled = ~(removes & stays[..., None]).any(-2)
        if torch.equal(settled, stays):
            return stays
        stays = settled


def soft_nms(
    segments: Tensor,
    scores: Tensor,
    labels: Tensor | None = None,
    *,
    method: Decay = "gaussian",
    sigma: float = 0.5,
    tiou: float = 0.0,
    tiou_high: float | None = None,
    duration: float = 1.0,
    power: float = 2.0,
    min_score: float = 0.0,
    max_segments: int | None = None,
    max_per_label: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Soft-NMS (Bodla et al., 2017): put out the best segment that is left, lower the scores of its rivals, repeat.

    A rival is a segment of the same label (of any, without ``labels``) that overlaps, with tIoU ≥ the threshold. Its
    score is multiplied by ``exp(-tIoU ** power / sigma)`` (``gaussian``) or ``1 - tIoU`` (``linear``); ``hard``
    removes it.

    Parameters
    ----------
    segments : (N, 2) start and end, any unit.
    scores : (N,), not negative; equal scores rank by their place in the input.
    labels : (N,) integers, or None.
    tiou, tiou_high : the threshold is ``tiou``; with ``tiou_high`` it grows with the width of the segment put out:
        ``tiou + (tiou_high - tiou) * width / duration`` (BMN: 0.5 and 0.9 on normalised segments; code that asks for a
        slope means ``tiou_high - tiou``).
    duration : the width that counts as 1 for ``tiou_high``.
    power : of the tIoU in ``gaussian``; 2 everywhere but in TCANet, which has 2.5.
    min_score : what falls below is dropped.
    max_segments : put out at most this many, over all labels. max_per_label : of each label.

    Returns
    -------
    (K,) int64 indices by falling new score, and (K,) the new scores.

    Raises
    ------
    ValueError : shapes that do not fit, NaN or negative scores, segments that are not finite, an unknown ``method``.
    """
    if method not in ("gaussian", "linear", "hard"):
        raise ValueError(f"soft_nms: method must be 'gaussian', 'linear' or 'hard', got {method!r}")
    segments, scores = _checked(segments, scores, labels)
    if len(scores) and bool((scores < 0).any()):
        raise ValueError(
            "soft_nms: scores must not be negative, since decay is a factor; pass probabilities, not logits"
        )

    def decay(overlap: Tensor, top: Tensor) -> Tensor:  # tIoU (..., n) with segments (..., 2) put out -> factors
        threshold: float | Tensor = tiou
        if tiou_high is not None:
            threshold = (tiou + (tiou_high - tiou) * (top[..., 1] - top[..., 0]) / duration)[..., None]
        if method == "gaussian":
            factor = (overlap.square() if power == 2 else overlap.pow(power)).div_(-sigma).exp_()
        elif method == "linear":
            factor = 1 - overlap
        else:
            factor = torch.zeros_like(overlap)
        if method != "hard" and tiou_high is None and tiou <= 0:
            return factor  # where nothing overlaps, it is 1 anyway
        return torch.where(_rivals(overlap, threshold), factor, 1.0)

    min_score = max(min_score, 0.0)
    candidates = torch.nonzero(scores >= min_score).squeeze(1)
    candidates = candidates[torch.argsort(scores[candidates], descending=True, stable=True)]
    found = []
    for group in _groups(candidates, labels):  # (G, n) indices, -1 = padding
        real = group >= 0
        padded = group.clamp(min=0)
        current = torch.where(real, scores[padded], -1.0)
        limits = [most for most in (max_segments, max_per_label) if most is not None]
        limit = min([group.shape[1], *limits])
        places, values = _decayed(
            segments[padded], current, decay, limit=limit, min_score=min_score, removes=method == "hard"
        )
        out = values >= min_score
        found.append((padded.gather(1, places)[out], values[out]))
    if not found:
        return candidates, scores[candidates]
    indices, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = torch.argsort(indices)  # so that equal new scores rank by their place in the input
    order = order[torch.argsort(values[order], descending=True, stable=True)][:max_segments]
    return indices[order], values[order]


def _groups(candidates: Tensor, labels: Tensor | None) -> list[Tensor]:
    """``candidates`` (N,), by falling score, as index tables (G, n): a row for each label, padded with -1.

    A table has up to ``TABLE`` pairs of places of the same row; one with longer rows up to ``SIDE_BY_SIDE`` places.
    """
    if len(candidates) == 0:
        return []
    if labels is None:
        return [candidates[None]]
    by_label = candidates[torch.argsort(labels[candidates], stable=True)]
    sizes = torch.unique_consecutive(labels[by_label], return_counts=True)[1].tolist()
    parts = sorted(by_label.split(sizes), key=len, reverse=True)
    tables = []
    while parts:
        width = len(parts[0])
        take = max(1, TABLE // width**2 or SIDE_BY_SIDE // width)
        tables.append(nn.utils.rnn.pad_sequence(parts[:take], batch_first=True, padding_value=-1))
        parts = parts[take:]
    return tables


def _decayed(
    segments: Tensor,
    scores: Tensor,
    decay: Callable[[Tensor, Tensor], Tensor],
    *,
    limit: int,
    min_score: float,
    removes: bool,
) -> tuple[Tensor, Tensor]:
    """Soft-NMS of G independent groups side by side: places (G, steps) in the order put out, and their scores then.

    ``segments`` (G, n, 2); ``scores`` (G, n), negative where there is none; a step without candidate has a score below
    ``min_score``.
    """
    groups, size = scores.shape
    segments = segments.permute(2, 0, 1).contiguous().permute(1, 2, 0)  # starts and ends contiguous each: twice as fast
    rows = torch.arange(groups, device=scores.device)
    columns = torch.arange(size, device=scores.device).expand(groups, size)
    ahead = groups * size * size <= TABLE
    table = decay(_pairwise_tiou(segments), segments) if ahead else None  # (G, n, n)
    gone = scores < 0
    places, values = [], []
    for step in range(limit):
        best, at = scores.max(1)  # (G,)
        if not bool((best >= min_score).any()):
            break
        places.append(columns[rows, at])
        values.append(best)
        gone[rows, at] = True
        if table is not None:
            factor = table[rows, at]  # (G, n)
        else:
            top = segments[rows, at]  # (G, 2)
            factor = decay(paired_tiou(top[:, None], segments), top)
        if removes:
            gone |= factor == 0
        scores = (scores * factor).masked_fill_(gone, -1.0)
        if table is None and step % 32 == 31:  # leave out what is gone or too low for good
            stays = scores >= min_score
            width = int(stays.sum(1).max())
            if width < 0.8 * scores.shape[1]:
                left = torch.argsort(~stays, dim=1, stable=True)[:, :width]
                columns, gone, scores = columns.gather(1, left), gone.gather(1, left), scores.gather(1, left)
                segments = segments.gather(1, left[..., None].expand(-1, -1, 2))
                if width == 0:
                    break
    if not places:
        return columns[:, :0], scores[:, :0]
    return torch.stack(places, 1), torch.stack(values, 1)


def _checked(segments: Tensor, scores: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both in one floating dtype of at least 32 bits, or :class:`ValueError`."""
    count = len(scores)
    if scores.ndim != 1 or segments.shape != (count, 2) or (labels is not None and labels.shape != (count,)):
        shapes = f"segments {tuple(segments.shape)}, scores {tuple(scores.shape)}"
        shapes += "" if labels is None else f", labels {tuple(labels.shape)}"
        raise ValueError(f"suppression needs segments (N, 2), scores (N,) and labels (N,), got {shapes}")
    if not bool(torch.isfinite(segments).all()) or bool(torch.isnan(scores).any()):
        raise ValueError("suppression got NaN or infinite values: the detector diverged, or its features hold NaN")
    dtype = torch.promote_types(torch.promote_types(segments.dtype, scores.dtype), torch.float32)
    return segments.to(dtype), scores.to(dtype)


def vote(kept: Tensor, segments: Tensor, weights: Tensor, *, tiou: float, by_tiou: bool = True) -> Tensor:
    """Segment voting: every kept segment becomes the weighted mean of all segments that overlap it enough.

    A segment's weight is its score, times its tIoU with the kept one if ``by_tiou`` (ActionFormer; OpenTAD leaves the
    tIoU out). Where no weight is left, the kept segment stays.

    Parameters
    ----------
    kept : (..., K, 2) after suppression. segments : (..., N, 2) before it, same unit; ``...`` are independent groups.
    weights : (..., N) their scores, not negative; 0 for padding.
    tiou : a segment votes where its tIoU with the kept one is at least this.

    Returns
    -------
    (..., K, 2) in the dtype of ``kept``.
    """
    if kept.shape[-2] == 0 or segments.shape[-2] == 0:
        return kept
    wide = torch.promote_types(kept.dtype, torch.float32)
    overlap = segment_tiou(kept.to(wide), segments.to(wide))  # (..., K, N)
    voices = weights.to(wide)[..., None, :]  # (..., 1, N)
    voices = torch.where(overlap >= tiou, voices * overlap if by_tiou else voices, 0.0)  # (..., K, N)
    total = voices.sum(-1, keepdim=True)  # (..., K, 1)
    # Sums of differences to the kept segment: times late in a long video lose no digits.
    apart = (segments.to(wide)[..., None, :, side] - kept.to(wide)[..., :, None, side] for side in (0, 1))
    moved = torch.stack([(voices * offset).sum(-1) for offset in apart], -1)  # (..., K, 2)
    shift = torch.where(total > 0, moved / total.clamp(min=torch.finfo(wide).tiny), 0.0)
    return (kept.to(wide) + shift).to(kept.dtype)
