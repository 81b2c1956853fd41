"""The networks of BMN (Lin et al. 2019) behind its base, and the balanced losses that it learns by."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tad.detect.boundary_matching import BoundaryMatching, cells_to_map, map_to_cells
from tad.detect.segments import segment_tiou

BAND_DURATIONS = 24  # of a map that is convolved at a time, at least


class BoundaryEvaluation(nn.Module):
    """TEM: for each row, how likely an action starts there, and how likely one ends; two branches of two layers."""

    def __init__(self, *, channels: int, width: int, groups: int) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Conv1d(channels, width, 3, padding=1, groups=groups) for _ in range(2))
        self.logit = nn.ModuleList(nn.Conv1d(width, 1, 1) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows ``x`` (B, C, T), zero where padded → logits of start and end, (B, T) each."""
        start, end = (
            logit(F.relu(hidden(x))).squeeze(1) for hidden, logit in zip(self.hidden, self.logit, strict=True)
        )
        return start, end


class ProposalEvaluation(nn.Module):
    """PEM: for each proposal of the grid, two estimates of its tIoU, by classification and by regression."""

    def __init__(
        self, *, channels: int, matching_channels: int, matching: BoundaryMatching, width: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.reduce = nn.Conv1d(channels, matching_channels, 3, padding=1)
        self.matching = matching
        self.mix = nn.Linear(matching.bias.shape[0], width)  # a convolution with kernel 1, on proposals that exist
        self.convs = nn.ModuleList(MapConv(width, width, 3, padding=1) for _ in range(2))
        self.logits = nn.Linear(width, 2)

    def forward(self, x: Tensor, mask: Tensor, valid: Tensor) -> Tensor:
        """Rows ``x`` (B, C, T), zero where ``mask`` (B, 1, T) is; ``valid`` (B, D, T) proposals → logits (B, 2, D, T).

        Behind every layer what is not valid is zero, as it would be without padding.
        """
        x = F.relu(self.reduce(x)).masked_fill(~mask, 0.0)  # (B, M, T)
        cells = F.relu(self.matching(x), inplace=True)  # (B, N, H)
        kept = valid.to(cells.dtype)  # (B, D, T)
        cells = F.relu(self.mix(cells), inplace=True).mul(map_to_cells(kept).unsqueeze(2))  # (B, N, W)
        if self.training and self.dropout.p > 0:  # a value of one cell alone could be read off its neighbours
            cells = cells * self.dropout(cells.new_ones(cells.shape[0], 1, cells.shape[2]))
        y = cells_to_map(cells, rows=valid.shape[2], durations=valid.shape[1])  # (B, W, D, T)
        for conv in self.convs:
            y = conv(y, kept)
        logits: Tensor = self.logits(y.permute(0, 2, 3, 1))  # (B, D, T, 2)
        return logits.permute(0, 3, 1, 2)


class MapConv(nn.Conv2d):
    """A 3x3 convolution of a map of proposals, then ReLU; what is not a proposal is zero, and hardly computed.

    The longer proposals are, the fewer there are: the map is convolved in bands of durations, each as wide as it needs
    to be. That is little more than half of the work. Of the results one map is kept, in one layout.
    """

    def forward(self, y: Tensor, kept: Tensor) -> Tensor:  # type: ignore[override]
        """``y`` (B, W, D, T), zero where ``kept`` (B, D, T) is 0 → the same shape, zero there."""
        assert self.bias is not None
        weight, bias = self.weight.to(y.dtype), self.bias.to(y.dtype)  # another type under autocast
        result: Tensor = _BandedConv.apply(y, weight, bias, kept.unsqueeze(1))
        return result


class _BandedConv(torch.autograd.Function):
    """relu(conv2d(y, padding=1)) * kept, band by band."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor, kept: Tensor) -> Tensor:
        result = torch.zeros_like(y)
        with torch.autocast(y.device.type, enabled=False):
            for band in _bands(y):
                result[band.cells] = F.conv2d(F.pad(y[band.seen], band.padding), weight, bias)
        result.relu_().mul_(kept)
        ctx.save_for_backward(y, weight, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        y, weight, result = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, result, 0)  # 0 as well where nothing was kept
        sums = torch.promote_types(weight.dtype, torch.float32)
        grad_y, grad_weight = torch.zeros_like(y), torch.zeros_like(weight, dtype=sums)
        one, none = [1, 1], [0, 0]
        for band in _bands(y):
            seen = F.pad(y[band.seen], band.padding)
            of_seen, of_weight, _ = torch.ops.aten.convolution_backward(
                grad[band.cells], seen, weight, None, one, none, one, False, none, 1, [True, True, False]
            )
            grad_y[band.seen] += F.pad(of_seen, [-side for side in band.padding])
            grad_weight += of_weight
        return grad_y, grad_weight.to(weight.dtype), grad.sum((0, 2, 3)), None


class _Band(NamedTuple):
    """A part of a map (B, W, D, T), what a 3x3 convolution of it sees of the map, and what is to be put round that."""

    cells: tuple[slice, ...]
    seen: tuple[slice, ...]
    padding: tuple[int, int, int, int]  # as F.pad takes it


def _bands(y: Tensor) -> list[_Band]:
    """Bands of durations of a map (B, W, D, T), each with the starts that its shortest proposals have."""
    durations, rows = y.shape[-2:]
    count = max(1, durations // BAND_DURATIONS)
    edges = [durations * k // count for k in range(count + 1)]
    everything, found = slice(None), []
    for top, bottom in pairwise(edges):
        width, first, last = rows - top, max(top - 1, 0), min(bottom + 1, durations)
        padding = (1, int(top == 0), first - (top - 1), bottom + 1 - last)
        cells, seen = (slice(top, bottom), slice(width)), (slice(first, last), slice(min(width + 1, rows)))
        found.append(_Band((everything, everything, *cells), (everything, everything, *seen), padding))
    return found


# ---- targets ---------------------------------------------------------------------------------------------------------
def boundary_targets(boundaries: Tensor, rows: int, *, region_rows: float) -> Tensor:
    """The largest share of each row that a region of ``region_rows`` rows round a boundary fills: (G,) → (T,).

    Row i is the cell [i, i + 1]; boundaries are row edges. Public codes put the cell elsewhere.
    """
    left = torch.arange(rows, dtype=boundaries.dtype, device=boundaries.device)  # (T,)
    low, high = boundaries[:, None] - 0.5 * region_rows, boundaries[:, None] + 0.5 * region_rows  # (G, 1)
    share = (torch.minimum(left + 1, high) - torch.maximum(left, low)).clamp(min=0)  # (G, T)
    return torch.cat([share, share.new_zeros(1, rows)]).amax(0)


def tiou_targets(proposals: Tensor, segments: Tensor) -> Tensor:
    """The tIoU of each proposal (N, 2) with its best truth (G, 2): (N,), 0 without truth."""
    tiou = segment_tiou(proposals, segments)  # (N, G)
    return tiou.amax(1) if len(segments) else tiou.new_zeros(len(proposals))


# ---- losses ----------------------------------------------------------------------------------------------------------
def balanced_cross_entropy(logits: Tensor, positive: Tensor) -> Tensor:
    """Half the mean over positives plus half the mean over negatives (α+ = ½ l/l+, α- = ½ l/l-).

    ``logits`` and ``positive`` (bool) are (N,); a kind that is absent counts 0.
    """
    positive = positive.to(logits.dtype)
    # softplus is the entropy itself: log(1 + exp(-z)) of a positive, log(1 + exp(z)) of a negative
    of_positives = (F.softplus(-logits) * positive).sum() / positive.sum().clamp(min=1)
    of_negatives = (F.softplus(logits) * (1 - positive)).sum() / (1 - positive).sum().clamp(min=1)
    return 0.5 * (of_positives + of_negatives)


def balanced_l2(estimate: Tensor, tiou: Tensor, *, high: float, low: float, low_includes_zero: bool) -> Tensor:
    """Half the mean squared error of ``estimate`` (N,) of ``tiou`` (N,), over as many bad and middling as good ones.

    Good is above ``high``, bad at most ``low`` (above 0 unless ``low_includes_zero``), middling between. Middling and
    bad ones are drawn at random, without repetition; one each at most where none is good. 0 where nothing is left.
    """
    middling, bad = (tiou > low) & (tiou <= high), tiou <= low
    if not low_includes_zero:
        bad = bad & (tiou > 0)
    good = torch.nonzero(tiou > high).squeeze(1)
    chosen = [good]
    for kind in (middling, bad):
        members = torch.nonzero(kind).squeeze(1)
        order = torch.randperm(len(members), device=members.device)
        chosen.append(members[order[: max(len(good), 1)]])
    which = torch.cat(chosen)
    square = (estimate[which] - tiou[which]).square().sum() / max(len(which), 1)
    return 0.5 * square
