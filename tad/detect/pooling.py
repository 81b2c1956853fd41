"""Pooling of feature rows over segments (SoI pooling), for all segments of a batch at once.

Segments are in row edges: row ``i`` fills ``[i, i + 1)``. Rows outside a sequence count as zero rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

EDGE = 1e-3  # rows: a bin that reaches less than this into a row does not touch it, so that rounding decides nothing


class RangeMaxima:
    """Maxima of ``rows`` (B, T, C) over any ranges of rows: O(T log T) once, two look-ups a range. Differentiable.

    A sparse table: its level k holds the maxima of all runs of 2**k rows, and any range is the union of two such runs.
    ``longest`` is the largest range that will be asked for.
    """

    def __init__(self, rows: Tensor, *, longest: int) -> None:
        batch, length, channels = rows.shape
        levels, offsets, run = [rows], [0], 1
        while 2 * run <= min(longest, length):
            below = levels[-1]
            offsets.append(offsets[-1] + below.shape[1])
            levels.append(torch.maximum(below[:, :-run], below[:, run:]))  # (B, T - 2 run + 1, C)
            run *= 2
        self.height = offsets[-1] + levels[-1].shape[1]  # entries a sample
        self.table = torch.cat(levels, 1).reshape(batch * self.height, channels)
        self.offsets = torch.tensor(offsets, device=rows.device)
        self.runs = 2 ** torch.arange(len(levels), device=rows.device)

    def __call__(self, sample: Tensor, first: Tensor, stop: Tensor) -> Tensor:
        """Maxima (N, C) over rows ``first`` to ``stop - 1`` (N,) of ``sample`` (N,); no range may be empty."""
        level = torch.bucketize(stop - first, self.runs, right=True) - 1
        base = sample * self.height + self.offsets[level]
        left = self.table.index_select(0, base + first)
        return torch.maximum(left, self.table.index_select(0, base + stop - self.runs[level]))


class SlidingMax:
    """Max-pooling of ``x`` (B, C, T), not negative, with stride 1, same length, and any kernel up to ``longest``.

    Windows of 2**k rows are computed once and shared; any other is the larger of two of them, where a pooling layer
    compares every row of every window. Outside the sequence there are zeros, neutral for values that are not negative.
    """

    def __init__(self, x: Tensor, *, longest: int) -> None:
        self.length, self.left = x.shape[-1], (longest - 1) // 2
        self.levels = [nn.functional.pad(x, (self.left, longest // 2))]
        while 2 ** len(self.levels) <= longest:
            below, run = self.levels[-1], 2 ** (len(self.levels) - 1)
            self.levels.append(torch.maximum(below[..., :-run], below[..., run:]))

    def __call__(self, kernel: int) -> Tensor:
        """(B, C, T): row i is the maximum over rows ``i - (kernel - 1) // 2`` to ``i + kernel // 2``."""
        level = kernel.bit_length() - 1
        runs, first = self.levels[level], self.left - (kernel - 1) // 2
        second = first + kernel - 2**level
        low = runs[..., first : first + self.length]
        return low if first == second else torch.maximum(low, runs[..., second : second + self.length])


def soi_max_pool(features: Tensor, rows: Tensor, segments: Tensor, sample: Tensor, *, bins: int = 7) -> Tensor:
    """SoI pooling: the maximum over each of ``bins`` equal parts of every segment, as RoI pooling in one dimension.

    Parameters
    ----------
    features : (B, C, T).
    rows : (B,) int64, how many rows of each sample are real; what lies behind them is not read.
    segments : (N, 2) in row edges, may reach outside the sequence.
    sample : (N,) int64, the sample of each segment.

    Returns
    -------
    (N, C, bins). A bin takes every row that it touches (its edges rounded outwards) and at least one; rows outside
    ``[0, rows)`` are zeros.
    """
    lower, upper = _bin_edges(segments, bins)
    first = (lower + EDGE).floor().long()  # (N, bins)
    stop = torch.maximum((upper - EDGE).ceil().long(), first + 1)
    length = rows[sample, None]
    inner_first = torch.minimum(first.clamp(min=0), length - 1).clamp(min=0)
    inner_stop = torch.maximum(torch.minimum(stop, length), inner_first + 1)
    longest = int((inner_stop - inner_first).max()) if len(segments) else 1
    maxima = RangeMaxima(features.transpose(1, 2), longest=longest)
    sample = sample[:, None].expand_as(first)
    pooled = maxima(sample.flatten(), inner_first.flatten(), inner_stop.flatten())  # (N * bins, C)
    outside = ((first < 0) | (stop > length)).flatten()[:, None]  # the bin touches a zero row
    empty = ((stop <= 0) | (first >= length) | (length <= 0)).flatten()[:, None]  # and no other
    pooled = torch.where(empty, 0.0, torch.where(outside, pooled.clamp(min=0), pooled))
    return pooled.view(len(segments), bins, features.shape[1]).transpose(1, 2)


def soi_align(
    features: Tensor, rows: Tensor, segments: Tensor, sample: Tensor, *, bins: int = 7, samples: int = 1
) -> Tensor:
    """SoI align: linear interpolation at ``samples`` evenly spread points of each bin, averaged: (N, C, bins).

    The arguments are those of :func:`soi_max_pool`. With one sample a bin is read at its centre. Differentiable in
    ``segments`` too.
    """
    points = bins * samples
    step = (segments[:, 1:] - segments[:, :1]) / points  # (N, 1)
    at = segments[:, :1] + step * (torch.arange(points, device=segments.device) + 0.5) - 0.5  # row centres, (N, P)
    low = at.detach().floor()
    weight = at - low  # of the upper neighbour
    length = rows[sample, None]
    channels, total = features.shape[1:]
    flat = features.transpose(1, 2).reshape(-1, channels)  # (B * T, C)
    base = sample[:, None] * total
    result = features.new_zeros(())
    for row, share in ((low.long(), 1 - weight), (low.long() + 1, weight)):
        inside = (row >= 0) & (row < length)
        index = base + torch.minimum(row.clamp(min=0), (length - 1).clamp(min=0))
        value = flat.index_select(0, index.flatten()).view(*row.shape, channels)
        result = result + torch.where(inside, share, 0.0).to(features.dtype)[..., None] * value  # (N, P, C)
    return result.view(len(segments), bins, samples, channels).mean(2).transpose(1, 2)


def soi_mean_pool(features: Tensor, rows: Tensor, segments: Tensor, sample: Tensor, *, bins: int = 7) -> Tensor:
    """The mean over each of ``bins`` equal parts of every segment, rows weighed by how much is covered: (N, C, bins).

    The arguments are those of :func:`soi_max_pool`. A bin is a difference of two running sums, interpolated between
    rows (precise RoI pooling of Jiang et al., 2018, in one dimension), hence differentiable in ``segments`` too.
    """
    lower, upper = _bin_edges(segments, bins)
    inside = torch.arange(features.shape[2], device=features.device) < rows[:, None]  # (B, T)
    kept = features.masked_fill(~inside[:, None], 0.0).transpose(1, 2)  # (B, T, C)
    sums = nn.functional.pad(kept.double().cumsum(1), (0, 0, 1, 0))  # (B, T + 1, C), double since differences cancel
    flat, total = sums.flatten(0, 1), features.shape[2]
    base = (sample * (total + 1))[:, None]

    def running(at: Tensor) -> Tensor:  # (N, bins) -> (N, bins, C), the integral of the rows up to `at`
        at = at.double().clamp(0, total)
        low = at.detach().floor().clamp(max=max(total - 1, 0)).long()
        index = (base + low).flatten()
        first, second = flat.index_select(0, index), flat.index_select(0, index + 1)
        return torch.lerp(first, second, (at - low).flatten()[:, None]).unflatten(0, at.shape)

    width = (upper - lower).double().clamp(min=EDGE)
    middle = 0.5 * (lower + upper).double()
    mean = (running(middle + 0.5 * width) - running(middle - 0.5 * width)) / width[..., None]
    return mean.to(features.dtype).transpose(1, 2)


def _bin_edges(segments: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    steps = torch.arange(bins + 1, device=segments.device)
    edges = segments[:, :1] + (segments[:, 1:] - segments[:, :1]) * steps / bins  # (N, bins + 1)
    return edges[:, :-1], edges[:, 1:]


class SoIAlign(nn.Module):
    """:func:`soi_align` as a layer."""

    def __init__(self, *, bins: int = 7, samples: int = 1) -> None:
        super().__init__()
        self.bins, self.samples = bins, samples

    def forward(self, features: Tensor, rows: Tensor, segments: Tensor, sample: Tensor) -> Tensor:
        return soi_align(features, rows, segments, sample, bins=self.bins, samples=self.samples)
