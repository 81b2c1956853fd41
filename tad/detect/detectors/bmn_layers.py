"""The networks of BMN (Lin et al. 2019) behind its base, and the balanced losses that it learns by."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tad.detect.boundary_matching import BoundaryMatching, cells_to_map, map_to_cells
from tad.detect.segments import segment_tiou


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

    def __init__(self, *, channels: int, matching_channels: int, matching: BoundaryMatching, width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv1d(channels, matching_channels, 3, padding=1)
        self.matching = matching
        self.mix = nn.Linear(matching.bias.shape[0], width)  # a convolution with kernel 1, on proposals that exist
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.logits = nn.Linear(width, 2)

    def forward(self, x: Tensor, mask: Tensor, valid: Tensor) -> Tensor:
        """Rows ``x`` (B, C, T), zero where ``mask`` (B, 1, T) is; ``valid`` (B, D, T) proposals → logits (B, 2, D, T).

        Behind every layer what is not valid is zero, as it would be without padding.
        """
        x = F.relu(self.reduce(x)).masked_fill(~mask, 0.0)  # (B, M, T)
        cells = F.relu(self.matching(x), inplace=True)  # (B, N, H)
        kept = valid.to(cells.dtype)  # (B, D, T)
        # Maps are large (128 x 200 x 200 numbers): each is kept once, in place, and in one layout. Products keep the
        # layout in the backward pass, masked_fill does not.
        cells = F.relu(self.mix(cells), inplace=True).mul(map_to_cells(kept).unsqueeze(2))  # (B, N, W)
        y = cells_to_map(cells, rows=valid.shape[2], durations=valid.shape[1])  # (B, W, D, T)
        for conv in self.convs:
            y = F.relu(conv(y).mul_(kept[:, None]), inplace=True)
        logits: Tensor = self.logits(y.permute(0, 2, 3, 1))  # (B, D, T, 2)
        return logits.permute(0, 3, 1, 2)


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
