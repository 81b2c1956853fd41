"""Boundary max pooling: the largest values round a segment's start, and round its end.

Lin et al., "Learning Salient Boundary Feature for Anchor-free Temporal Action Localization", 2021, §3.3 (AFSD).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tad.detect.pooling import RangeMaxima
from tad.errors import RecipeError

INNER, OUTER = 0.25, 0.1  # of a segment's length, how far its windows reach into it and out of it


def boundary_windows(
    segments: Tensor, rows: Tensor, *, inner: float = INNER, outer: float = OUTER
) -> tuple[Tensor, Tensor]:
    """First and last row (inclusive) of the windows round both ends of every segment.

    A segment [s, e] of length L has the windows [s - o, s + i] and [e - i, e + o] with i = max(inner · L, 1) and
    o = max(outer · L, 1) rows; a window holds the rows that its two ends lie in and all between. Windows are moved
    into the real rows, so that one outside of them is the first or the last row.

    Parameters
    ----------
    segments : (..., 2) in row edges.
    rows : how many rows are real, broadcast to (...).

    Returns
    -------
    Two int64 tensors (..., 2), of the start's window and of the end's.
    """
    start, end = segments.unbind(-1)
    inside, outside = (inner * (end - start)).clamp(min=1.0), (outer * (end - start)).clamp(min=1.0)
    last = (rows - 1)[..., None].clamp(min=0)  # (..., 1)

    def row_of(edges: Tensor) -> Tensor:
        nearest = torch.minimum(edges.floor().clamp(min=0.0), last.to(edges))  # before the cast: it may be infinite
        return nearest.long().clamp(min=0)  # after it: NaN is a row, too

    return (
        row_of(torch.stack((start - outside, end - inside), -1)),
        row_of(torch.stack((start + inside, end + outside), -1)),
    )


def boundary_max_pool(
    features: Tensor,
    segments: Tensor,
    rows: Tensor,
    *,
    begin: Tensor | None = None,
    inner: float = INNER,
    outer: float = OUTER,
) -> Tensor:
    """Maxima of the first half of the channels round the starts, and of the second half round the ends.

    All segments are pooled at once, O(1) each after O(T log T), see :class:`tad.detect.pooling.RangeMaxima`. The
    gradient reaches ``features``, not ``segments``.

    Parameters
    ----------
    features : (B, C, T), C even.
    segments : (B, N, 2) in row edges, may reach outside the sequence.
    rows : (B, N), or (B, 1) for all segments of a sample: how many rows are real, at least 1.
    begin : (N,) int64, the row of ``features`` from which on a segment and its ``rows`` count, where several sequences
        lie one behind the other; by default 0.
    inner, outer : see :func:`boundary_windows`.

    Returns
    -------
    (B, C, N).
    """
    batch, channels = features.shape[:2]
    if channels % 2:
        raise RecipeError(f"boundary pooling halves the channels; {channels} is odd")
    segments = segments.detach()
    first, last = boundary_windows(segments, rows.expand(segments.shape[:2]), inner=inner, outer=outer)  # (B, N, 2)
    if begin is not None:
        first, last = first + begin[:, None], last + begin[:, None]
    halves = features.unflatten(1, (2, -1)).flatten(0, 1).transpose(1, 2)  # (2 B, T, C / 2)
    longest = int((last - first).max()) + 1 if first.numel() else 1
    which = torch.arange(2 * batch, device=features.device).view(batch, 1, 2).expand_as(first)  # (B, N, 2)
    ranges = which.flatten(), first.flatten(), last.flatten() + 1
    if features.dtype == torch.float64:
        pooled = RangeMaxima(halves, longest=longest)(*ranges)  # (B N 2, C / 2)
    else:
        row = rows_of_maxima(halves, longest=longest, ranges=ranges)  # (B N 2, C / 2)
        row = row.view(batch, -1, 2, channels // 2).transpose(1, 2).flatten(0, 1)  # (2 B, N, C / 2)
        pooled = halves.gather(1, row).unflatten(0, (batch, 2)).transpose(1, 2)
    return pooled.reshape(batch, -1, channels).transpose(1, 2)  # (B, C, N)


@torch.no_grad()
def rows_of_maxima(rows: Tensor, *, longest: int, ranges: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """In which row the maxima of :class:`RangeMaxima` lie, the first of several: (B, T, C) → (N, C) int64.

    A key holds the value in its upper half, as an integer of the same order, and the row in its lower half: the table
    is one of keys, and the gradient of a maximum goes back to one row instead of through every level of the table.
    """
    bits = rows.float().contiguous().view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # negative floats grow as their bits shrink
    last = rows.shape[1] - 1
    keys = (ordered << 32) | (last - torch.arange(last + 1, device=rows.device))[:, None]
    return last - (RangeMaxima(keys, longest=longest)(*ranges) & 0xFFFFFFFF)


class BoundaryMaxPooling(nn.Module):
    """:func:`boundary_max_pool` as a layer."""

    def __init__(self, *, inner: float = INNER, outer: float = OUTER) -> None:
        super().__init__()
        self.inner, self.outer = inner, outer

    def forward(self, features: Tensor, segments: Tensor, rows: Tensor, begin: Tensor | None = None) -> Tensor:
        return boundary_max_pool(features, segments, rows, begin=begin, inner=self.inner, outer=self.outer)
