"""The two networks of TAL-Net: one that proposes segments, one that classifies them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tad.detect.pooling import SlidingMax
from tad.detect.segments import expand_segments

ReceptiveField = Literal["multi-dilated", "multi-tconv", "single-tconv", "single"]


class Tower(nn.Module):
    """The temporal network of one anchor scale, or of all when shared (Fig. 3): two convolutions, then the heads.

    ``scale`` given: a max-pool and dilations that make the receptive field as long as the anchor, or ``reach`` times
    that. ``kernel`` 1 sees the centre row alone. ``anchors`` is the number of scales that the heads serve.
    """

    pool: int

    def __init__(self, *, width: int, kernel: int, anchors: int, scale: float | None = None, reach: int = 1) -> None:
        super().__init__()
        self.anchors = anchors
        dilations = (1, 1)
        self.pool = 1
        if scale is not None:
            dilations = (max(1, round(reach * scale / 6)), max(1, round(2 * reach * scale / 6)))
            self.pool = max(1, round(reach * scale / 6))
        self.convs = nn.ModuleList(
            nn.Conv1d(width, width, kernel, dilation=d, padding=d * (kernel // 2)) for d in dilations
        )
        self.objectness = nn.Linear(width, anchors)  # convolutions with kernel 1
        self.offsets = nn.Linear(width, 2 * anchors)

    def forward(self, x: SlidingMax, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Rows ``x`` (B, W, T), zero where ``mask`` (B, 1, T) is → objectness (B, T, A) and offsets (B, T, A, 2)."""
        y = x(self.pool) * mask  # (B, W, T)
        y = F.relu(self.convs[0](y)) * mask
        y = F.relu(self.convs[1](y)).transpose(1, 2)  # (B, T, W)
        return self.objectness(y), self.offsets(y).unflatten(2, (self.anchors, 2))


class SegmentProposalNetwork(nn.Module):
    """Scores and offsets for an anchor of each scale at each row (§4.1, §4.2).

    ``multi-dilated``: one tower a scale, its receptive field aligned with the anchor, twice as long with ``context``.
    ``multi-tconv``: one tower a scale, no dilation. ``single-tconv``: one tower for all. ``single``: the same without
    neighbours.
    """

    def __init__(
        self, *, channels: int, width: int, scales: Sequence[float], receptive_field: ReceptiveField, context: bool
    ) -> None:
        super().__init__()
        self.reduce = nn.Conv1d(channels, width, 1)
        count = len(scales)
        if receptive_field == "multi-dilated":
            towers = [Tower(width=width, kernel=3, anchors=1, scale=s, reach=1 + context) for s in scales]
        elif receptive_field == "multi-tconv":
            towers = [Tower(width=width, kernel=3, anchors=1) for _ in scales]
        else:
            towers = [Tower(width=width, kernel=1 if receptive_field == "single" else 3, anchors=count)]
        self.towers = nn.ModuleList(towers)
        self.longest = max(tower.pool for tower in towers)

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``features`` (B, C, T), ``mask`` (B, 1, T) → objectness (B, T, K) and offsets (B, T, K, 2)."""
        x = SlidingMax(F.relu(self.reduce(features)) * mask, longest=self.longest)  # of (B, W, T)
        objectness, offsets = zip(*(tower(x, mask) for tower in self.towers), strict=True)
        return torch.cat(objectness, 2), torch.cat(offsets, 2)


class SegmentClassifier(nn.Module):
    """Class scores and offsets of proposals (§4.2, Fig. 5): SoI pooling, 1x1 convolution, two fully-connected layers.

    ``soi`` is one of the functions of :mod:`tad.detect.pooling`, ``bins`` how many it makes. ``margin``: share of its
    own length by which a proposal is extended on both sides before pooling.
    """

    def __init__(
        self,
        *,
        channels: int,
        width: int,
        classes: int,
        regressions: int,
        soi: Callable[..., Tensor],
        bins: int,
        margin: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.soi, self.bins, self.margin, self.regressions = soi, bins, margin, regressions
        self.reduce = nn.Linear(channels, width)  # a convolution with kernel 1
        self.hidden = nn.Linear(bins * width, width)
        self.dropout = nn.Dropout(dropout)
        self.logits = nn.Linear(width, classes + 1)
        self.offsets = nn.Linear(width, 2 * regressions)

    def forward(self, features: Tensor, rows: Tensor, segments: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """``features`` (B, C, T), ``rows`` (B,), ``segments`` (P, 2) of ``sample`` (P,) → (P, K + 1) and (P, R, 2)."""
        wide = expand_segments(segments, self.margin)
        pooled = self.soi(features, rows, wide, sample, bins=self.bins)  # (P, C, bins)
        x = F.relu(self.reduce(pooled.transpose(1, 2))).flatten(1)  # (P, bins * W)
        x = self.dropout(F.relu(self.hidden(x)))  # (P, W)
        return self.logits(x), self.offsets(x).unflatten(1, (self.regressions, 2))
