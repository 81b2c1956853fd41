"""RoI sampling followed by a fully-connected layer, in the order that costs less.

A RoI feature is N points of a segment, each interpolated between two rows; the layer multiplies point n by its own
matrix W_n and adds up. Both steps are linear, so they can change places: multiply *every row* by every W_n once, then
add up two products for each point. The first order multiplies once a segment, the second once a row. With thousands
of segments on a hundred rows that is most of the arithmetic of a proposal-based detector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What adding up the two products of a point costs, in multiplications of the same width inside a matrix product
# (measured on a CPU: sums wait for memory). It decides which order is taken, never what comes out.
SUM_COST = 28
CHUNK = 512  # segments whose sums are finished while they are in the processor's cache
GRADIENT_SHARE = 0.4  # with a backward pass, products first is cheaper from this share of as many segments on


class Places(NamedTuple):
    """Where N points of each of P segments lie between the rows of their samples.

    The segments of one sample stand together, the samples in order: ``counts`` says how many each has.
    """

    between: Tensor  # (P, N, 2) int64: the rows before and after a point, moved inside the sample
    share: Tensor  # (P, N, 2): how much each counts; 0 for rows outside the sample
    counts: tuple[int, ...]

    def part(self, first: int, stop: int) -> Places:
        """Only the points ``first`` to ``stop - 1`` of every segment."""
        return Places(self.between[:, first:stop], self.share[:, first:stop], self.counts)


def roi_places(segments: Tensor, rows: Tensor, counts: Sequence[int], *, points: int) -> Places:
    """``points`` evenly spread points of each segment, as :func:`tad.detect.pooling.soi_align` reads them.

    Parameters
    ----------
    segments : (P, 2) in row edges, those of one sample together; they may reach outside, where rows count as zero.
    rows : (B,) int64, how many rows of each sample are real.
    counts : how many segments each sample has.
    """
    step = (segments[:, 1:] - segments[:, :1]) / points  # (P, 1)
    at = segments[:, :1] + step * (torch.arange(points, device=segments.device) + 0.5) - 0.5  # row centres, (P, N)
    low = at.floor()
    upper = at - low
    last = torch.repeat_interleave(rows - 1, torch.tensor(counts, device=rows.device))[:, None, None]  # (P, 1, 1)
    index = torch.stack((low, low + 1), 2).long()  # (P, N, 2)
    share = torch.stack((1 - upper, upper), 2).masked_fill((index < 0) | (index > last), 0.0)
    return Places(torch.minimum(index.clamp(min=0), last.clamp(min=0)), share, tuple(counts))


class RoILinear(nn.Module):
    """``groups`` fully-connected layers of the same RoI features, each (N points x C channels) → ``out``.

    Equal to interpolating the points and giving them, point after point, to an ``nn.Linear`` of N · C inputs, whose
    initialisation it has; ``relu`` adds a ReLU. Segments get no gradient: in a cascade they are constants.
    """

    def __init__(self, *, channels: int, points: int, out: int, groups: int = 1, relu: bool = False) -> None:
        super().__init__()
        self.channels, self.points, self.out, self.groups, self.relu = channels, points, out, groups, relu
        bound = 1 / math.sqrt(points * channels)
        self.weight = nn.Parameter(torch.empty(groups, points, channels, out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(groups * out).uniform_(-bound, bound))  # one dimension: never decayed

    def forward(self, features: Tensor, places: Places) -> Tensor:
        """Rows (B, T, C) read at the ``places`` of P segments → (G, P, out)."""
        if places.between.shape[1] != self.points or len(places.counts) != len(features):
            raise ValueError(
                f"places of {places.between.shape[1]} points in {len(places.counts)} samples do not fit a layer of "
                f"{self.points} points and {len(features)} samples"
            )
        order = points_first if self.few(len(places.between), features.shape[0] * features.shape[1]) else products_first
        with torch.autocast(features.device.type, enabled=False):  # sums of products: not in half precision
            rows = features.to(self.weight.dtype)
            return order(rows, self.weight, self.bias.view(self.groups, 1, self.out), places, relu=self.relu)

    def few(self, segments: int, rows: int) -> bool:
        """Whether so few segments on so many rows are cheaper point by point."""
        learning = torch.is_grad_enabled() and self.weight.requires_grad
        share = GRADIENT_SHARE if learning else 1.0
        return segments * (self.channels - SUM_COST) <= share * rows * self.channels


def points_first(rows: Tensor, weight: Tensor, bias: Tensor, places: Places, *, relu: bool = False) -> Tensor:
    """Interpolate, then multiply: rows (B, T, C), ``weight`` (G, N, C, out), ``bias`` (G, 1, out) → (G, P, out)."""
    flat, share = rows.flatten(0, 1), places.share.to(rows.dtype)  # (B * T, C), (P, N, 2)
    base = torch.arange(len(rows), device=rows.device) * rows.shape[1]
    at = places.between + torch.repeat_interleave(base, torch.tensor(places.counts, device=rows.device))[:, None, None]
    read = [flat.index_select(0, at[..., k].flatten()) * share[..., k].reshape(-1, 1) for k in (0, 1)]
    roi = (read[0] + read[1]).view(len(at), weight.shape[1] * weight.shape[2])  # (P, N * C)
    x = roi @ weight.flatten(1, 2) + bias  # (G, P, out)
    return F.relu(x) if relu else x


def products_first(rows: Tensor, weight: Tensor, bias: Tensor, places: Places, *, relu: bool = False) -> Tensor:
    """Multiply, then interpolate; arguments and result are those of :func:`points_first`."""
    result: Tensor = _ProductsFirst.apply(
        rows, weight, bias, places.between, places.share.to(rows.dtype), places.counts, relu
    )
    return result


class _ProductsFirst(torch.autograd.Function):
    """One sample and one group at a time, so that the products (N · T, out) stay in the processor's cache; they are
    not kept for the backward pass, which needs only what comes in and goes out.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor,
        index: Tensor,
        share: Tensor,
        counts: tuple[int, ...],
        relu: bool,
    ) -> Tensor:
        groups, points, _, out = weight.shape
        length = rows.shape[1]
        cells, shares = _cells(index, length), share.flatten(1)  # (P, 2 * N)
        result = rows.new_empty(groups, len(index), out)
        products = rows.new_empty(points, length, out)
        first = 0
        for x, count in zip(rows, counts, strict=True):  # (T, C)
            own = range(first, first + count)
            first += count
            if count == 0:
                continue
            for g in range(groups):
                torch.matmul(x, weight[g], out=products)  # (N, T, out)
                table = products.view(-1, out)
                for start in own[::CHUNK]:
                    some = slice(start, min(start + CHUNK, own.stop))
                    summed = F.embedding_bag(cells[some], table, mode="sum", per_sample_weights=shares[some])
                    summed += bias[g]
                    result[g, some] = summed.relu_() if relu else summed
        ctx.save_for_backward(rows, weight, index, share, *((result,) if relu else ()))
        ctx.counts = counts
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, index, share, *result = ctx.saved_tensors
        points, channels, out = weight.shape[1:]
        length = rows.shape[1]
        cells, shares = _cells(index, length), share.flatten(1)
        grad = torch.ops.aten.threshold_backward(grad, result[0], 0) if result else grad.contiguous()  # of the ReLU
        grad_rows = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        turned = weight.transpose(2, 3).contiguous() if grad_rows is not None else None  # (G, N, out, C)
        first = 0
        for b, count in enumerate(ctx.counts):
            own = slice(first, first + count)
            first += count
            if count == 0:
                continue
            # The transposed sum: each cell (point, row) adds up the gradients of the segments that read it.
            flat = cells[own].flatten()
            order = flat.argsort()
            readers = torch.div(order, 2 * points, rounding_mode="floor")
            sizes = torch.bincount(flat, minlength=points * length)
            offsets, weights = sizes.cumsum(0) - sizes, shares[own].flatten()[order]
            for g in range(len(weight)):
                summed = F.embedding_bag(readers, grad[g, own], offsets, mode="sum", per_sample_weights=weights)
                summed = summed.view(points, length, out)  # (N, T, out)
                if grad_weight is not None:
                    grad_weight[g].baddbmm_(rows[b].T.expand(points, channels, length), summed)
                if grad_rows is not None and turned is not None:
                    grad_rows[b].addbmm_(summed, turned[g])  # (T, C)
        return grad_rows, grad_weight, grad.sum(1, keepdim=True), None, None, None, None


def _cells(index: Tensor, length: int) -> Tensor:
    """(P, N, 2) rows → (P, 2 * N) positions in a table of all points' rows, point after point."""
    return (index + (torch.arange(index.shape[1], device=index.device) * length)[:, None]).flatten(1)
