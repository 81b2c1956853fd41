"""TAL-MTS' network for one stream: pyramid, STT, FSA, coarse and refined heads. Detector and losses are elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tad.detect.boundary_pooling import boundary_max_pool
from tad.detect.detectors.talmts_frames import FrameSelfAttention, SpatialTemporalTransformer
from tad.detect.detectors.talmts_layers import (
    ConvBlock,
    FeaturePyramid,
    FrameBranch,
    Interpolation,
    Levels,
    ProposalBranch,
)

PRIOR = 0.01  # probability of an action at a place before training
HEAD_STD = 0.01  # of the heads' weights before training
MAX_LOG_DISTANCE = 8.0  # no boundary is farther than exp(8) rows of its level


@dataclass
class Coarse:
    """The coarse stage of one stream: what it predicts, and what the refined stage goes on from."""

    levels: Levels
    location: Tensor  # (B, C, N) f_loc
    naming: Tensor  # (B, C, N) f_cls
    frames: Tensor  # (B, C, T·factor) f_ca, of the pyramid alone
    framed: Tensor  # (B, F, T·factor) f_a, with FSA's channels
    distances: Tensor  # (B, N, 2) logarithms, in rows of each level
    logits: Tensor  # (B, N, K + 1)


@dataclass
class Refined:
    """The refined stage of one stream."""

    offsets: Tensor  # (B, N, 2)
    logits: Tensor  # (B, N, K + 1)
    quality: Tensor  # (B, N) logits
    sides: tuple[Tensor, Tensor]  # (B, 2 C, N) twice, pooled on the levels


def coarse_segments(distances: Tensor, levels: Levels) -> Tensor:
    """Eq. 4: the segments (..., N, 2), in rows of level 0, whose ends lie at logarithmic ``distances`` (..., N, 2)."""
    far = distances.clamp(max=MAX_LOG_DISTANCE).exp() * levels.strides.to(distances)[:, None]
    return levels.centers.to(distances)[:, None] + far * far.new_tensor((-1.0, 1.0))


class StreamNetwork(nn.Module):
    """What TAL-MTS has once for every stream (§III-B and C, Fig. 2).

    Parameters
    ----------
    shapes : of the rows of every stored level, fine to coarse: (C,) or (C, H, W). classes : K.
    width : of everything. levels : of the pyramid. groups : of the norms. row_kernel : of the first convolutions.
    tower_convs : convolutions between the pyramid and the coarse heads (Eq. 3). rfp : refined feature pyramid.
    rfp_mode, frame_mode : how RFP and the frame-level feature interpolate. frame_factor : frames a row of level 0.
    stt, fsa : these modules, or None.
    """

    def __init__(
        self,
        *,
        shapes: Sequence[Sequence[int]],
        classes: int,
        width: int,
        levels: int,
        groups: int,
        row_kernel: int,
        tower_convs: int,
        rfp: bool,
        rfp_mode: Interpolation,
        frame_factor: int,
        frame_mode: Interpolation,
        stt: SpatialTemporalTransformer | None,
        fsa: FrameSelfAttention | None,
    ) -> None:
        super().__init__()
        self.stt, self.fsa, self.frame_factor = stt, fsa, frame_factor
        self.pyramid = FeaturePyramid(
            shapes=shapes, width=width, levels=levels, groups=groups, kernel=row_kernel, refined=rfp, mode=rfp_mode
        )
        self.frame_branch = FrameBranch(width=width, groups=groups, factor=frame_factor, mode=frame_mode)
        self.location_tower = _tower(width, width, tower_convs, groups)
        self.naming_tower = _tower(2 * width if stt else width, width, tower_convs, groups)
        self.distances = nn.Conv1d(width, 2, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(levels))  # of the distances' logarithms, one a level
        self.logits = nn.Conv1d(width, classes + 1, 3, padding=1)
        branch = {"width": width, "frame_width": 2 * width if fsa else width, "groups": groups}
        self.location_branch, self.naming_branch = ProposalBranch(**branch), ProposalBranch(**branch)
        self.offsets = nn.Linear(width, 2)
        self.refined_logits = nn.Linear(width, classes + 1)
        self.quality = nn.Conv1d(width, 1, 3, padding=1)
        heads: list[nn.Conv1d | nn.Linear] = [self.distances, self.offsets, self.quality, self.logits]
        for head in [*heads, self.refined_logits]:
            nn.init.normal_(head.weight, std=HEAD_STD)
            assert head.bias is not None
            nn.init.zeros_(head.bias)
            if head in (self.logits, self.refined_logits):
                nn.init.constant_(head.bias[:1], math.log(classes * (1 - PRIOR) / PRIOR))  # of background

    def coarse(
        self, stored: Sequence[Tensor], masks: Sequence[Tensor], frames: Tensor | None, frame_mask: Tensor | None
    ) -> Coarse:
        """The coarse stage, from stored levels and their masks (B, T_k), frames (B, C, T, H, W) if it reads them."""
        features, masks = self.pyramid(stored, masks)
        levels = Levels(masks)
        f = levels.joined(features)  # (B, C, N)
        named = f
        if self.stt is not None and frames is not None and frame_mask is not None:
            long_range = [
                fitted(x, part.shape[2]) for x, part in zip(self.stt(frames, frame_mask), features, strict=True)
            ]
            named = torch.cat((f, levels.joined(long_range) * levels.mask[:, None]), 1)  # (B, 2 C, N), Eq. 2
        location, naming = f, named
        for block in self.location_tower:
            location = block(location, levels)
        for block in self.naming_tower:
            naming = block(naming, levels)
        framed = own = self.frame_branch(features[0], masks[0])
        if self.fsa is not None and frames is not None and frame_mask is not None:
            seen = fitted(self.fsa(frames) * frame_mask[:, None], own.shape[2])
            halves = [x.unflatten(1, (2, -1)) for x in (own, seen)]  # starts and ends are pooled from both of either
            framed = torch.cat(halves, 2).flatten(1, 2)
        level = levels.strides.log2().long()
        distances = self.distances(location).transpose(1, 2) * self.scales[level][:, None]
        logits = self.logits(naming).transpose(1, 2)
        return Coarse(levels, location, naming, own, framed, _float(distances), _float(logits))

    def refine(self, coarse: Coarse, segments: Tensor) -> Refined:
        """The refined stage round ``segments`` (B, N, 2), in rows of level 0."""
        levels, factor = coarse.levels, self.frame_factor
        rows = levels.rows[:, :1] * factor
        framed = boundary_max_pool(coarse.framed, segments * factor, rows)  # (B, F, N), once for both branches
        location, location_sides = self.location_branch(coarse.location, framed, segments, levels)
        naming, naming_sides = self.naming_branch(coarse.naming, framed, segments, levels)
        return Refined(
            _float(self.offsets(location.transpose(1, 2))),
            _float(self.refined_logits(naming.transpose(1, 2))),
            _float(self.quality(location)[:, 0]),
            (location_sides, naming_sides),
        )


def fitted(x: Tensor, rows: int) -> Tensor:
    """``x`` (B, C, T) cut to ``rows`` rows, or with zeros behind."""
    return nn.functional.pad(x[..., :rows], (0, max(0, rows - x.shape[2])))


def _tower(channels: int, width: int, convs: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(ConvBlock(channels if k == 0 else width, width, 3, groups=groups) for k in range(convs))


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
