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
    batch, channels, length = features.shape
    if channels % 2:
        raise RecipeError(f"boundary pooling halves the channels; {channels} is odd")
    segments = segments.detach()
    first, last = boundary_windows(segments, rows.expand(segments.shape[:2]), inner=inner, outer=outer)  # (B, N, 2)
    if begin is not None:
        first, last = first + begin[:, None], last + begin[:, None]
    longest = int((last - first).max()) + 1 if first.numel() else 1
    flat = features.transpose(1, 2).flatten(0, 1)  # (B T, C), all samples one behind the other
    sample = torch.arange(batch, device=features.device)[:, None, None] * length
    first, last = (first + sample).flatten(0, 1), (last + sample).flatten(0, 1)  # (B N, 2)
    if features.dtype == torch.float64:
        both = torch.zeros_like(first).flatten(), first.flatten(), last.flatten() + 1
        pooled = RangeMaxima(flat[None], longest=longest)(*both).view(
            -1, 2, 2, channels // 2
        )  # every half for both ends
        pooled = pooled.diagonal(dim1=1, dim2=2).transpose(1, 2)  # (B N, 2, C / 2)
    else:
        pooled = flat.flatten().index_select(0, places_of_maxima(flat, first, last, longest=longest).flatten())
    return pooled.reshape(batch, -1, channels).transpose(1, 2)  # (B, C, N)


@torch.no_grad()
def places_of_maxima(rows: Tensor, first: Tensor, last: Tensor, *, longest: int) -> Tensor:
    """Where in ``rows`` (R, C), flattened, the maxima over ranges of rows lie, of several the first: (M, C) int64.

    The channels are H equal parts, each with a range of its own: ``first`` and ``last`` (M, H) are rows, inclusive, and
    ``longest`` is the largest of these ranges. As :class:`tad.detect.pooling.RangeMaxima`, but over keys, which hold
    the value in the upper half, as an integer of the same order, and the place in the lower half: so the gradient of a
    maximum goes back to one place instead of through every level of the table.
    """
    count, channels = rows.shape
    parts, end, device = first.shape[1], rows.numel() - 1, rows.device
    bits = rows.float().contiguous().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats grow as their bits shrink
    runs = 2 ** torch.arange(longest.bit_length(), device=device)
    table = torch.empty(len(runs), count, channels, dtype=torch.int64, device=device)  # level k: maxima of 2**k rows
    torch.add(torch.arange(end, -1, -1, device=device).view_as(rows), ordered, alpha=1 << 32, out=table[0])
    for k in range(1, len(runs)):
        run = 2 ** (k - 1)
        starts = count - 2 * run + 1
        torch.maximum(table[k - 1, :starts], table[k - 1, run : run + starts], out=table[k, :starts])
    level = torch.bucketize(last - first + 1, runs, right=True) - 1  # (M, H)
    part, entries = torch.arange(parts, device=device), table.view(-1, channels // parts)
    left, right = (
        entries.index_select(0, ((level * count + row) * parts + part).flatten())
        for row in (first, last + 1 - runs[level])
    )
    return end - (torch.maximum(left, right).view(-1, channels) & 0xFFFFFFFF)


class BoundaryMaxPooling(nn.Module):
    """:func:`boundary_max_pool` as a layer."""

    def __init__(self, *, inner: float = INNER, outer: float = OUTER) -> None:
        super().__init__()
        self.inner, self.outer = inner, outer

    def forward(self, features: Tensor, segments: Tensor, rows: Tensor, begin: Tensor | None = None) -> Tensor:
        return boundary_max_pool(features, segments, rows, begin=begin, inner=self.inner, outer=self.outer)
