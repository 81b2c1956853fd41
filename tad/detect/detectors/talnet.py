"""TAL-Net: Faster R-CNN in time (Chao et al., "Rethinking the Faster R-CNN Architecture for Temporal Action Localization", 2018)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tad.detect.anchors import anchor_scales_for, best_truth, make_anchors, match_anchors
from tad.detect.interface import Batch, Detector, LevelSpec, Segments, Targets
from tad.detect.pooling import SoIAlign, SoIPool, sliding_max
from tad.detect.postprocess import nms
from tad.detect.sampling import balanced_sample
from tad.detect.segments import clip_segments, decode_center_length, encode_center_length, expand_segments, segment_tiou
from tad.errors import RecipeError, WeightsError

Fusion = Literal["late", "early", "rgb", "flow"]
ReceptiveField = Literal["multi-dilated", "multi-tconv", "single-tconv", "single"]
WEIGHTS = (10.0, 5.0)  # of the centre and length offsets, Eq. 2


class Tower(nn.Module):
    """The temporal network of one anchor scale, or of all when shared (Fig. 3): two convolutions, then the heads.

    ``scale`` given: a max-pool and dilations that make the receptive field as long as the anchor, or ``reach`` times that.
    ``kernel`` 1 sees the centre row alone. ``anchors`` is the number of scales that the heads serve.
    """

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
        self.objectness = nn.Conv1d(width, anchors, 1)
        self.offsets = nn.Conv1d(width, 2 * anchors, 1)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` (B, W, T) ≥ 0, zero where ``mask`` (B, 1, T) is → objectness (B, A, T) and offsets (B, A, 2, T)."""
        if self.pool > 1:
            x = sliding_max(x, self.pool) * mask  # (B, W, T)
        x = F.relu(self.convs[0](x)) * mask
        x = F.relu(self.convs[1](x))
        return self.objectness(x), self.offsets(x).unflatten(1, (self.anchors, 2))


class SegmentProposalNetwork(nn.Module):
    """Scores and offsets for an anchor of each scale at each row (§4.1, §4.2).

    ``multi-dilated``: one tower a scale, its receptive field aligned with the anchor, twice as long with ``context``.
    ``multi-tconv``: one tower a scale, no dilation. ``single-tconv``: one tower for all. ``single``: that without neighbours.
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

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``features`` (B, C, T), ``mask`` (B, 1, T) → objectness (B, T, K) and offsets (B, T, K, 2)."""
        x = F.relu(self.reduce(features)) * mask  # (B, W, T)
        objectness, offsets = zip(*(tower(x, mask) for tower in self.towers), strict=True)
        return torch.cat(objectness, 1).transpose(1, 2), torch.cat(offsets, 1).permute(0, 3, 1, 2)


class SegmentClassifier(nn.Module):
    """Class scores and offsets of proposals (§4.2, Fig. 5): SoI pooling, 1x1 convolution, two fully-connected layers.

    ``margin``: share of its own length by which a proposal is extended on both sides before pooling.
    """

    def __init__(
        self, *, channels: int, width: int, classes: int, regressions: int, soi: nn.Module, bins: int, margin: float, dropout: float
    ) -> None:
        super().__init__()
        self.margin, self.regressions = margin, regressions
        self.soi = soi
        self.reduce = nn.Conv1d(channels, width, 1)
        self.hidden = nn.Linear(width * bins, width)
        self.dropout = nn.Dropout(dropout)
        self.logits = nn.Linear(width, classes + 1)
        self.offsets = nn.Linear(width, 2 * regressions)

    def forward(self, features: Tensor, rows: Tensor, segments: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """``features`` (B, C, T), ``rows`` (B,), ``segments`` (P, 2) of ``sample`` (P,) → logits (P, K + 1), offsets (P, R, 2)."""
        pooled = self.soi(features, rows, expand_segments(segments, self.margin), sample)  # (P, C, bins)
        x = F.relu(self.reduce(pooled)).flatten(1)  # (P, W * bins)
        x = self.dropout(F.relu(self.hidden(x)))  # (P, W)
        return self.logits(x), self.offsets(x).unflatten(1, (self.regressions, 2))


class Branch(nn.Module):
    """Both stages for one feature map."""

    def __init__(self, *, proposal: SegmentProposalNetwork, classifier: SegmentClassifier) -> None:
        super().__init__()
        self.proposal, self.classifier = proposal, classifier


@dataclass
class TALNetOutputs:
    """What :meth:`TALNet.forward` gives, segments in row edges: N = T·K anchors a sample, P proposals of all samples together."""

    anchors: Tensor  # (N, 2)
    valid: Tensor  # (B, N) bool: the anchor is centred on a real row
    extent: Tensor  # (B, 2) what the sample's rows look at, inside the video
    objectness: Tensor  # (B, N) logits
    offsets: Tensor  # (B, N, 2)
    proposals: Tensor  # (P, 2)
    sample: Tensor  # (P,) which sample a proposal belongs to
    logits: Tensor  # (P, classes + 1), background first
    regressions: Tensor  # (P, 1 or classes, 2)
