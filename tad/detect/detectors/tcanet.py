"""TCANet: proposals of another detector, refined three times by what surrounds them.

Qing et al., "Temporal Context Aggregation Network for Temporal Action Proposal Refinement", 2021; here as in Qing et
al., "Exploring Stronger Feature for Temporal Action Localization", 2021, §2.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tad.detect.anchors import best_truth
from tad.detect.detectors.common import check_finite, check_numbers, extents, segments_in_seconds, truths_within
from tad.detect.detectors.tcanet_layers import TBR, proper_segments
from tad.detect.interface import Batch, Detector, LevelSpec, Proposals, Segments, Targets
from tad.detect.lgte import LGTE
from tad.detect.segments import (
    decode_boundaries,
    decode_center_length,
    encode_boundaries,
    encode_center_length,
    segment_tiou,
)
from tad.errors import RecipeError

LOW_TIOU = 0.3  # the IoU loss tells proposals below, between this and the stage's threshold, and above it apart


@dataclass
class StageOutputs:
    """One regressor: the P segments that it saw, in row edges, and what it said of them."""

    segments: Tensor  # (P, 2)
    sample: Tensor  # (P,) which sample a segment belongs to
    boundaries: Tensor  # (P, 2) offsets of start and end
    center_length: Tensor  # (P, 2) offsets of centre and log length
    tiou: Tensor  # (P,) estimated tIoU of `segments` with the truth


@dataclass
class TCANetOutputs:
    """What :meth:`TCANet.forward` gives. The last three are of the last stage's segments, all in row edges."""

    stages: list[StageOutputs]
    extent: Tensor  # (B, 2) what the sample's rows look at, inside the video
    refined: Tensor  # (P, 2) final boundaries
    sample: Tensor  # (P,)
    scores: Tensor  # (P,) proposal score times the estimated tIoU of the scoring stage


class TCANet(Detector):
    """TCANet on stored features at their full rate and on proposals of another detector; class-agnostic.

    Two convolutions and LGTEs prepare the rows. Each stage, a :class:`TBR`, moves its segments by two predictions and
    hands the mean of both on. Final boundaries are those of the last stage; the score is the proposal's score times
    the tIoU that the ``score_stage``-th regressor estimates for the segment that it was given.

    Parameters
    ----------
    channels : stream → width of its rows; streams are concatenated. classes : not used, all labels are 0.
    width, groups : of both base convolutions; ``groups`` also of the regressors' convolutions.
    lgte, heads, local_heads, window, feedforward, dropout, mask_padding : how many :class:`LGTE`, and their options.
    stages, tiou_thresholds : how many regressors, and above which tIoU each learns boundaries.
    context : length of the context on either side, in lengths of the proposal.
    context_samples, action_samples : points read in either context and inside.
    head_width, boundary_width : of the segment-level and of the frame-level heads.
    center_factor, width_factor, boundary_factor : a prediction of 1 moves the centre by so many lengths, multiplies the
        length by exp of it, moves a boundary by so many lengths. Targets are divided by them.
    legacy_decode : what the authors' published code does: factors as above but 1.0 for boundaries in training mode, and
        targets that are not divided by any of them.
    proposals_per_video, training_proposals : a training step learns from so many random ones of the best so many.
    augment : what the first stage makes of its segments joins them before the second: each proposal is seen there as it
        was and refined, in training as at detection, and comes out twice.
    detach : no gradient flows from a stage to an earlier one through the places at which rows are read. The published
        code lets it.
    score_stage : from 1 to ``stages``.
    proposals_at_once : so many are refined at a time at detection; a matter of memory alone.
    max_detections : of a video, best first, that :meth:`decode` gives.

    Raises
    ------
    RecipeError : values that do not fit together.
    """

    class_agnostic: ClassVar[bool] = True
    reads_proposals: ClassVar[bool] = True

    def __init__(
        self,
        *,
        channels: dict[str, int],
        classes: int,
        width: int = 512,
        groups: int = 4,
        lgte: int = 2,
        heads: int = 8,
        local_heads: int = 4,
        window: int = 9,
        feedforward: int = 256,
        dropout: float = 0.1,
        mask_padding: bool = True,
        stages: int = 3,
        tiou_thresholds: Sequence[float] = (0.5, 0.6, 0.7),
        context: float = 0.5,
        context_samples: int = 32,
        action_samples: int = 64,
        head_width: int = 512,
        boundary_width: int = 128,
        center_factor: float = 0.1,
        width_factor: float = 0.2,
        boundary_factor: float = 0.2,
        legacy_decode: bool = False,
        proposals_per_video: int = 64,
        training_proposals: int = 100,
        augment: bool = True,
        detach: bool = False,
        score_stage: int = 2,
        proposals_at_once: int = 256,
        max_detections: int = 2000,
    ) -> None:
        super().__init__()
        counts = {
            "classes": classes,
            "width": width,
            "groups": groups,
            "heads": heads,
            "window": window,
            "feedforward": feedforward,
            "stages": stages,
            "context_samples": context_samples,
            "action_samples": action_samples,
            "head_width": head_width,
            "boundary_width": boundary_width,
            "proposals_per_video": proposals_per_video,
            "training_proposals": training_proposals,
            "proposals_at_once": proposals_at_once,
            "max_detections": max_detections,
        }
        check_numbers(1, math.inf, **counts)
        check_numbers(0, math.inf, lgte=lgte, local_heads=local_heads)
        check_numbers(0.0, 1.0, dropout=dropout)
        check_numbers(0.0, math.inf, context=context)
        check_numbers(
            1e-3, 1e3, center_factor=center_factor, width_factor=width_factor, boundary_factor=boundary_factor
        )
        check_numbers(1, stages, score_stage=score_stage)
        self.tiou_thresholds = _checked_thresholds(tiou_thresholds, stages)
        if not channels:
            raise RecipeError("tcanet needs at least one stream")
        total = sum(channels.values())
        widths = {
            "streams' channels": total,
            "width": width,
            "head_width": head_width,
            "boundary_width": boundary_width,
        }
        for name, value in widths.items():
            if value % groups:
                raise RecipeError(
                    f"tcanet: the {name}, {value}, cannot be split into {groups} groups; set model.groups"
                )
        for name, value in (("context_samples", context_samples), ("action_samples", action_samples)):
            if value % 4:
                raise RecipeError(f"tcanet: {name} must be a multiple of 4, got {value}: two convolutions halve it")
        self.needs = tuple(LevelSpec(stream) for stream in channels)
        self.mask_padding, self.legacy_decode = mask_padding, legacy_decode
        self.center_factor, self.width_factor, self.boundary_factor = center_factor, width_factor, boundary_factor
        self.proposals_per_video, self.training_proposals = proposals_per_video, training_proposals
        self.augment, self.detach, self.score_stage = augment, detach, score_stage
        self.proposals_at_once, self.max_detections = proposals_at_once, max_detections
        self.base = nn.ModuleList(nn.Conv1d(c, width, 3, padding=1, groups=groups) for c in (total, width))
        self.encoders = nn.ModuleList(
            LGTE(
                channels=width,
                heads=heads,
                local_heads=local_heads,
                window=window,
                feedforward=feedforward,
                dropout=dropout,
                mask_padding=mask_padding,
            )
            for _ in range(lgte)
        )
        self.regressors = nn.ModuleList(
            TBR(
                channels=width,
                groups=groups,
                context=context,
                outer=context_samples,
                inner=action_samples,
                segment_width=head_width,
                boundary_width=boundary_width,
            )
            for _ in range(stages)
        )

    # ---- forward -------------------------------------------------------------------------------------------------
    def forward(self, batch: Batch) -> TCANetOutputs:
        """All stages, on every proposal of ``batch.proposals``; in training mode on a random sample of the best."""
        if batch.proposals is None:
            raise ValueError("TCANet needs batch.proposals")
        x = self._rows(batch)  # (B, W, T)
        dtype = torch.promote_types(batch.features[self.needs[0].key].dtype, torch.float32)
        rows, extent = batch.mask.sum(1), extents(batch).to(x.device, dtype)
        found = [self._chosen(proposals) for proposals in batch.proposals]
        counts = torch.tensor([len(proposals) for proposals in found], device=x.device)
        sample = torch.repeat_interleave(torch.arange(len(found), device=x.device), counts)  # (P,)
        scores = torch.cat([proposals.scores for proposals in found]).to(x.device, dtype)  # (P,)
        segments = torch.cat([proposals.segments for proposals in found]).to(x.device, dtype)  # (P, 2)
        segments = proper_segments(segments, extent[sample])
        stages: list[StageOutputs] = []
        for number, regressor in enumerate(self.regressors, 1):
            boundaries, center_length, tiou = self._regress(regressor, x, rows, segments, sample)
            stages.append(StageOutputs(segments, sample, boundaries, center_length, tiou))
            if number == self.score_stage:
                scores = scores * tiou
            refined = proper_segments(self._decoded(stages[-1]), extent[sample])
            refined = refined.detach() if self.detach else refined
            if number == 1 and self.augment and len(self.regressors) > 1:
                refined = torch.cat((segments, refined))  # (2 P, 2)
                sample, scores = torch.cat((sample, sample)), torch.cat((scores, scores))
            segments = refined
        return TCANetOutputs(stages, extent, segments, sample, scores)

    def _rows(self, batch: Batch) -> Tensor:
        """(B, W, T): base convolutions and LGTEs over the streams' rows."""
        padded = ~batch.mask[:, None]  # (B, 1, T)
        x = torch.cat([batch.features[need.key] for need in self.needs], 1).masked_fill(padded, 0.0)  # (B, C, T)
        for conv in self.base:
            x = F.relu(conv(x))
            if self.mask_padding:
                x = x.masked_fill(padded, 0.0)
        for encoder in self.encoders:
            x = encoder(x, batch.mask)
        return x

    def _chosen(self, proposals: Proposals) -> Proposals:
        """All proposals of one video, or the ones that a training step learns from."""
        if not self.training:
            return proposals
        best = min(len(proposals), self.training_proposals)
        drawn = torch.randperm(best)[: self.proposals_per_video].to(proposals.scores.device)
        return Proposals(proposals.segments[drawn], proposals.scores[drawn])

    def _regress(
        self, regressor: nn.Module, x: Tensor, rows: Tensor, segments: Tensor, sample: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A stage on all segments (P, 2); at detection a part of them at a time, since each stands for itself."""
        assert isinstance(regressor, TBR)
        tables = regressor.tables(x)
        size = max(1, len(segments)) if self.training else self.proposals_at_once
        if len(segments) <= size:
            boundaries, center_length, tiou = regressor(tables, rows, segments, sample)
            return boundaries, center_length, tiou
        chunks = zip(segments.split(size), sample.split(size), strict=True)
        parts = zip(*(regressor(tables, rows, *chunk) for chunk in chunks), strict=True)
        boundaries, center_length, tiou = (torch.cat(part) for part in parts)
        return boundaries, center_length, tiou

    def _decoded(self, stage: StageOutputs) -> Tensor:
        """(P, 2): the mean of what both heads make of the stage's segments."""
        boundary = 1.0 if self.legacy_decode and self.training else self.boundary_factor
        weights = (1 / self.center_factor, 1 / self.width_factor)
        by_boundaries = decode_boundaries(stage.boundaries, stage.segments, weights=(1 / boundary, 1 / boundary))
        return 0.5 * (by_boundaries + decode_center_length(stage.center_length, stage.segments, weights=weights))

    # ---- loss ----------------------------------------------------------------------------------------------------
    def loss(self, outputs: TCANetOutputs, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Two terms a stage, all of weight one: ``regression_i`` and ``tiou_i``; means over the batch's segments.

        A segment belongs to the truth of largest tIoU. Above the stage's threshold its four offsets are learnt, by a
        smooth L1 that is summed over them and divided by the number of such segments. Targets are constants: no
        gradient flows into the segments that they are measured from.
        """
        truths = [truths_within(target, extent)[0] for target, extent in zip(targets, outputs.extent, strict=True)]
        terms = {}
        for number, (stage, threshold) in enumerate(zip(outputs.stages, self.tiou_thresholds, strict=True), 1):
            segments = stage.segments.detach()
            tiou, goal = segments.new_zeros(len(segments)), segments.clone()
            for i, these in enumerate(truths):
                own = torch.nonzero(stage.sample == i).squeeze(1)
                if len(these) and len(own):
                    tiou[own], best = best_truth(segment_tiou(segments[own], these))
                    goal[own] = these[best]
            positive = tiou > threshold
            terms[f"regression_{number}"] = self._regression_loss(stage, segments, goal, positive)
            terms[f"tiou_{number}"] = _tiou_loss(stage.tiou, tiou, positive)
        return terms

    def _regression_loss(self, stage: StageOutputs, segments: Tensor, goal: Tensor, positive: Tensor) -> Tensor:
        boundary, center, width = self.boundary_factor, self.center_factor, self.width_factor
        if self.legacy_decode:
            boundary = center = width = 1.0
        weights, sides = (1 / center, 1 / width), (1 / boundary, 1 / boundary)
        wanted = encode_center_length(goal[positive], segments[positive], weights=weights)  # (P+, 2)
        wanted_sides = encode_boundaries(goal[positive], segments[positive], weights=sides)  # (P+, 2)
        total = F.smooth_l1_loss(stage.center_length[positive], wanted, reduction="sum")
        total = total + F.smooth_l1_loss(stage.boundaries[positive], wanted_sides, reduction="sum")
        return total / positive.sum().clamp(min=1)

    # ---- decode --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def decode(self, outputs: TCANetOutputs, batch: Batch) -> list[Segments]:
        """Every refined proposal with label 0.

        Raises :class:`WeightsError` where the outputs are not finite.
        """
        found = []
        for i, video in enumerate(batch.videos):
            own = outputs.sample == i
            segments, scores = outputs.refined[own], outputs.scores[own]
            check_finite(video, segments, scores)
            labels = torch.zeros_like(outputs.sample[own])
            found.append(
                segments_in_seconds(batch, i, outputs.extent[i], segments, labels, scores, limit=self.max_detections)
            )
        return found


def _tiou_loss(predicted: Tensor, tiou: Tensor, positive: Tensor) -> Tensor:
    """Mean smooth L1 over all positives, as many of middle tIoU, and as many of low tIoU, drawn at random.

    Without positives one of each kind is drawn, so that a batch without truth is learnt from too.
    """
    most = positive.sum().clamp(min=1)
    low = ~positive & (tiou <= LOW_TIOU)
    chosen = positive | _drawn(low, most) | _drawn(~positive & ~low, most)
    distance = F.smooth_l1_loss(predicted, tiou, reduction="none")
    return (distance * chosen).sum() / chosen.sum().clamp(min=1)


def _drawn(members: Tensor, most: Tensor) -> Tensor:
    """(P,) bool: at most ``most`` of ``members`` (P,), at random."""
    order = torch.rand(members.shape, device=members.device).masked_fill(~members, 2.0).argsort()
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return members & (rank < most)


def _checked_thresholds(values: Sequence[float], stages: int) -> tuple[float, ...]:
    thresholds = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else ()
    if len(thresholds) != stages:
        raise RecipeError(f"tcanet has {stages} stages and needs as many tiou_thresholds, got {values!r}")
    check_numbers(0.0, 1.0, **{f"tiou_thresholds[{i}]": value for i, value in enumerate(thresholds)})
    return thresholds
