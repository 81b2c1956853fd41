"""Boundary matching: one vector for every proposal of a dense grid, without the dense matrix that samples them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tad.errors import RecipeError

NO_WEIGHT = 1e-12  # what rounding leaves of a weight of zero
CPU_COLUMNS = 64  # 64 columns of 32 points in 200 rows are 1.6 MB


def proposal_grid(rows: int, durations: int | None = None) -> Tensor:
    """All proposals of 1 to ``durations`` rows (default: ``rows``) in ``rows`` rows: (N, 2) row edges, float32.

    The shortest come first, those of one duration by their start. This order is what *cells* (…, N, …) mean.
    """
    start, length = _starts_and_lengths(rows, min(durations or rows, rows))
    return torch.stack((start, start + length), 1).float()


def cells_to_map(cells: Tensor, *, rows: int, durations: int | None = None) -> Tensor:
    """Cells (B, N, C) → a map (B, C, D, T), in channels-last memory; 0 where a proposal would end behind row T."""
    longest = min(durations or rows, rows)
    place = _places(rows, longest, cells.device)
    flat = cells.new_zeros(cells.shape[0], longest * rows, cells.shape[2]).index_copy(1, place, cells)  # (B, D·T, C)
    return flat.unflatten(1, (longest, rows)).permute(0, 3, 1, 2)


def map_to_cells(map_: Tensor) -> Tensor:
    """The proposals that fit, of a map (..., D, T): (..., N)."""
    longest, rows = map_.shape[-2:]
    return map_.flatten(-2).index_select(-1, _places(rows, longest, map_.device))


class BoundaryMatching(nn.Module):
    """A vector for each proposal of the grid: points sampled along it, all joined by one layer.

    Lin et al., "BMN: Boundary-Matching Network", 2019, its "Boundary-Matching layer" and the convolution behind it.

    Each proposal [s, e], in row edges, is extended by ``margin`` of its length on either side; ``samples`` x
    ``samples_per_bin`` points lie evenly on that, one on either end; ``samples_per_bin`` neighbours are averaged. A
    point at p reads the row centres on either side of it, linearly. Rows outside the sequence are zeros, so that what
    lies farther than half a row outside is 0 and padding with zeros changes nothing.

    The paper samples ``channels`` x ``samples`` numbers a proposal by a dense matrix (T, samples·D·T) and convolves
    them. Both steps are linear, and are exchanged here: one product makes ``samples`` vectors a row, and a proposal is
    a weighted sum of some of them, by a sparse matrix. The result is the same.

    Parameters
    ----------
    channels, hidden : width of the rows and of the vectors.
    durations : D, the longest proposal in rows; by default as long as the sequence.
    samples, samples_per_bin, margin : see above.

    Raises
    ------
    RecipeError : counts below 1 (``samples``: below 2), or a margin that is negative or not finite.
    """

    def __init__(
        self,
        *,
        channels: int,
        hidden: int = 512,
        durations: int | None = None,
        samples: int = 32,
        samples_per_bin: int = 3,
        margin: float = 0.5,
    ) -> None:
        super().__init__()
        if (
            min(channels, hidden, 1 if durations is None else durations, samples - 1, samples_per_bin) < 1
            or not 0 <= margin < math.inf
        ):
            raise RecipeError(
                "boundary matching needs channels, hidden, durations and samples_per_bin of at least 1, samples of at "
                f"least 2 and a margin of at least 0; got {channels}, {hidden}, {durations}, {samples_per_bin}, "
                f"{samples} and {margin}"
            )
        self.durations, self.samples, self.samples_per_bin, self.margin = durations, samples, samples_per_bin, margin
        # (S, H, C): the weight (H, C, S, 1, 1) of the paper's Conv3d with its points in front
        self.weight = nn.Parameter(torch.empty(samples, hidden, channels))
        self.bias = nn.Parameter(torch.empty(hidden))
        bound = 1 / math.sqrt(channels * samples)  # as nn.Conv3d
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Rows ``x`` (B, C, T) → cells (B, N, H), see :func:`proposal_grid` and :func:`cells_to_map`."""
        rows = x.shape[2]
        weight: Tensor = self.weight
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        longest, dtype = min(self.durations or rows, rows), torch.promote_types(x.dtype, torch.float32)
        there, back = _sampling_on(rows, longest, self.samples, self.samples_per_bin, self.margin, x.device, dtype)
        cells: Tensor = _SampledProduct.apply(x.transpose(1, 2), weight, there, back)  # (B, N, H)
        return cells.add_(self.bias.to(cells.dtype))


# ---- the sparse matrix -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SparseRows:
    """A sparse matrix (rows, columns), row by row: its entries' columns and values, and where each row begins."""

    columns: Tensor  # (nnz,) int32
    values: Tensor  # (nnz,)
    begins: Tensor  # (rows,) int32

    def to(self, device: torch.device) -> SparseRows:
        return SparseRows(self.columns.to(device), self.values.to(device), self.begins.to(device))

    def times(self, table: Tensor) -> Tensor:
        """This matrix times ``table`` (columns, H), of the same type: (rows, H)."""
        return F.embedding_bag(self.columns, table, self.begins, mode="sum", per_sample_weights=self.values)


def sampling_matrix(
    rows: int, durations: int, samples: int, samples_per_bin: int, margin: float, *, dtype: torch.dtype = torch.float32
) -> tuple[SparseRows, SparseRows]:
    """The matrix (N, T·S) of the weights with which cell c reads point n of row t, in column t·S + n.

    Its transpose is the second result. Proposals of one duration differ in their place alone: weights are made for one.
    """
    length = torch.arange(1, durations + 1, dtype=torch.float64)[:, None]  # (D, 1)
    share = torch.linspace(-margin, 1 + margin, samples * samples_per_bin, dtype=torch.float64)
    position = (length * share - 0.5).unflatten(1, (samples, samples_per_bin))  # (D, S, P) in row centres, start 0
    left = position.floor()
    first = left[:, :, :1]  # (D, S, 1)
    nearest = (left - first).long()
    right_weight = (position - left) / samples_per_bin
    weights = position.new_zeros(durations, samples, int(nearest.max()) + 2)  # (D, S, W) of row first + w
    weights.scatter_add_(2, nearest, 1 / samples_per_bin - right_weight)
    weights.scatter_add_(2, nearest + 1, right_weight)

    columns, values, counts = [], [], []
    for index in range(durations):  # one at a time: all entries in int64 would be several times the result
        point, step = torch.nonzero(weights[index] > NO_WEIGHT, as_tuple=True)  # (E,) entries of each cell
        value = weights[index, point, step].to(dtype)
        offset = first[index, point, 0].long() + step
        row = torch.arange(rows - index)[:, None] + offset  # (T - d, E)
        inside = (row >= 0) & (row < rows)
        columns.append((row * samples + point)[inside].int())
        values.append(value.expand_as(row)[inside])
        counts.append(inside.sum(1))
    column, value, count = torch.cat(columns), torch.cat(values), torch.cat(counts)
    order = column.argsort(stable=True)
    cell = torch.repeat_interleave(count).int()  # (nnz,)
    return (
        SparseRows(column, value, _begins(count)),
        SparseRows(cell[order], value[order], _begins(torch.bincount(column, minlength=rows * samples))),
    )


def _begins(sizes: Tensor) -> Tensor:
    """Where each of several groups begins when they stand one behind the other."""
    return (sizes.cumsum(0) - sizes).int()


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a tensor of inference mode could not be used in training afterwards
def _sampling_on(
    rows: int,
    durations: int,
    samples: int,
    samples_per_bin: int,
    margin: float,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[SparseRows, SparseRows]:
    there, back = sampling_matrix(rows, durations, samples, samples_per_bin, margin, dtype=dtype)
    return there.to(device), back.to(device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _places(rows: int, durations: int, device: torch.device) -> Tensor:
    """Where each cell lies in a flat map (D·T,)."""
    start, length = _starts_and_lengths(rows, durations)
    return ((length - 1) * rows + start).to(device)


def _starts_and_lengths(rows: int, durations: int) -> tuple[Tensor, Tensor]:
    """Of each cell (N,), int64."""
    per_duration = rows - torch.arange(durations)  # (D,)
    length = torch.repeat_interleave(per_duration) + 1
    return torch.arange(len(length)) - (per_duration.cumsum(0) - per_duration)[length - 1], length


class _SampledProduct(torch.autograd.Function):
    """cells[b] = Σ_n matrix_n @ x[b] @ weight_nᵀ over the points n; keeps ``x`` and ``weight`` alone.

    The S vectors of all rows exist for one video and some columns at a time: less memory, and on a CPU they stay in its
    cache. The gradient is the transposed matrix, prepared beforehand: the same kind of sum, without atomic additions.
    Sums are in float32 at least.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, there: SparseRows, back: SparseRows) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.back = back
        cells = x.new_empty(x.shape[0], len(there.begins), weight.shape[1])  # (B, N, H)
        with torch.autocast(x.device.type, enabled=False):
            for columns in _column_blocks(weight):
                part = weight[:, columns].flatten(0, 1)  # (S·h, C)
                for b, video in enumerate(x):
                    vectors = F.linear(video, part).view(len(back.begins), -1)  # (T·S, h)
                    cells[b, :, columns] = there.times(_at_least_float(vectors))
        return cells

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        grad_x = _at_least_float(torch.zeros_like(x))
        grad_weight = _at_least_float(torch.zeros_like(weight))
        for columns in _column_blocks(weight):
            part = weight[:, columns].flatten(0, 1)  # (S·h, C)
            for b, video in enumerate(x):
                vectors = ctx.back.times(_at_least_float(grad[b, :, columns]))  # (T·S, h)
                vectors = vectors.view(x.shape[1], -1).to(x.dtype)  # (T, S·h)
                grad_x[b] += vectors @ part
                grad_weight[:, columns] += (vectors.T @ video).unflatten(0, (weight.shape[0], -1))
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None


def _column_blocks(weight: Tensor) -> list[slice]:
    """The columns that are summed together: few where a table of them must fit into a cache, else all."""
    size = CPU_COLUMNS if weight.device.type == "cpu" else weight.shape[1]
    return [slice(k, k + size) for k in range(0, weight.shape[1], size)]


def _at_least_float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
