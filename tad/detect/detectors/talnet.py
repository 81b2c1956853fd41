"""TAL-Net: Faster R-CNN in time.

Chao et al., "Rethinking the Faster R-CNN Architecture for Temporal Action Localization", 2018. ``docs/talnet.md`` says
which switch gives which row of its tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tad.detect.anchors import anchor_scales_for, best_truth, checked_scales, make_anchors, match_anchors
from tad.detect.detectors.common import (
    check_choice,
    check_finite,
    check_numbers,
    extents,
    segments_in_seconds,
    truths_within,
)
from tad.detect.detectors.talnet_layers import ReceptiveField, SegmentClassifier, SegmentProposalNetwork
from tad.detect.interface import Batch, Detector, LevelSpec, Segments, Targets
from tad.detect.pooling import soi_align, soi_max_pool, soi_mean_pool
from tad.detect.sampling import balanced_sample
from tad.detect.segments import clip_segments, decode_center_length, encode_center_length, segment_tiou
from tad.detect.suppression import nms
from tad.errors import RecipeError

Fusion = Literal["late", "early", "rgb", "flow"]
SOI: dict[str, Callable[..., Tensor]] = {"max": soi_max_pool, "mean": soi_mean_pool, "align": soi_align}
WEIGHTS = (10.0, 5.0)  # of the centre and length offsets, Eq. 2


@dataclass
class TALNetOutputs:
    """What :meth:`TALNet.forward` gives: N = T·K anchors a sample, P proposals of all; segments in row edges."""

    anchors: Tensor  # (N, 2)
    valid: Tensor  # (B, N) bool: the anchor is centred on a real row
    extent: Tensor  # (B, 2) what the sample's rows look at, inside the video
    objectness: Tensor  # (B, N) logits
    offsets: Tensor  # (B, N, 2)
    proposals: Tensor  # (P, 2)
    sample: Tensor  # (P,) which sample a proposal belongs to
    confidence: Tensor  # (P,) the objectness logit of its anchor; +inf for a truth that joined them in training
    logits: Tensor  # (P, classes + 1), background first
    regressions: Tensor  # (P, 1 or classes, 2)


class TALNet(Detector):
    """TAL-Net on stored features: anchors → proposals → classes and boundaries, from one or more streams.

    Parameters
    ----------
    channels : stream → width of its rows, in the recipe's order. classes : K.
    fusion : ``late``: each stream has its own networks, their outputs are averaged at both stages (§4.3, Fig. 6);
        ``early``: rows concatenated; ``rgb``, ``flow``: the first or the second of two streams alone (or the only one).
    receptive_field, proposal_context : see :class:`SegmentProposalNetwork`; the latter matters for ``multi-dilated``.
    classification_context : pool each proposal with half its length on both sides (§4.2, Fig. 5).
    anchor_scales : in rows. :meth:`resolve` replaces ``auto`` by scales that fit the training actions.
    width : filters of every convolution and fully-connected layer.
    soi, soi_bins : how a proposal's rows become bins, and how many: ``max`` (the paper's), ``mean``, or ``align``
        (linear interpolation at the bins' centres).
    proposals, training_proposals, proposal_nms_tiou : so many are kept a video after NMS, at detection and in training.
    anchor_positive_tiou, anchor_negative_tiou : an anchor is positive above the one, negative below the other.
    proposal_positive_tiou : a proposal has the class of its best truth above this, else it is background.
    anchors_per_video, anchor_positive_share : the sample of anchors that a step learns from.
    proposals_per_video, proposal_positive_share : the sample of proposals that a step learns from.
    append_truth : the truth joins the proposals in training.
    regression_weight : λ of Eq. 1, at both stages.
    class_specific_regression : K pairs of boundary offsets a proposal instead of one.
    dropout : before the last layer of the classifier.
    max_detections : of a video, best first, that :meth:`decode` gives.

    Raises
    ------
    RecipeError : values that do not fit together.
    """

    scales: Tensor

    def __init__(
        self,
        *,
        channels: dict[str, int],
        classes: int,
        fusion: Fusion = "late",
        receptive_field: ReceptiveField = "multi-dilated",
        proposal_context: bool = True,
        classification_context: bool = True,
        anchor_scales: Iterable[float] = (1, 2, 3, 4, 5, 6, 8, 11, 16),
        width: int = 256,
        soi: Literal["max", "mean", "align"] = "max",
        soi_bins: int = 7,
        proposals: int = 300,
        training_proposals: int = 300,
        proposal_nms_tiou: float = 0.7,
        anchor_positive_tiou: float = 0.7,
        anchor_negative_tiou: float = 0.3,
        proposal_positive_tiou: float = 0.5,
        anchors_per_video: int = 256,
        anchor_positive_share: float = 0.5,
        proposals_per_video: int = 64,
        proposal_positive_share: float = 0.25,
        append_truth: bool = True,
        regression_weight: float = 1.0,
        class_specific_regression: bool = False,
        dropout: float = 0.0,
        max_detections: int = 2000,
    ) -> None:
        super().__init__()
        check_choice("receptive_field", receptive_field, get_args(ReceptiveField))
        check_choice("soi", soi, tuple(SOI))
        check_numbers(
            1,
            math.inf,
            classes=classes,
            width=width,
            soi_bins=soi_bins,
            proposals=proposals,
            training_proposals=training_proposals,
            anchors_per_video=anchors_per_video,
            proposals_per_video=proposals_per_video,
            max_detections=max_detections,
        )
        check_numbers(
            0.0,
            1.0,
            proposal_nms_tiou=proposal_nms_tiou,
            anchor_positive_tiou=anchor_positive_tiou,
            anchor_negative_tiou=anchor_negative_tiou,
            proposal_positive_tiou=proposal_positive_tiou,
            anchor_positive_share=anchor_positive_share,
            proposal_positive_share=proposal_positive_share,
            dropout=dropout,
        )
        check_numbers(0.0, math.inf, regression_weight=regression_weight)
        scales = checked_scales(anchor_scales)
        streams = _streams_read(channels, fusion)
        self.needs = tuple(LevelSpec(stream) for stream in streams)
        self.fusion, self.classes = fusion, classes
        self.proposals, self.training_proposals = proposals, training_proposals
        self.proposal_nms_tiou, self.max_detections = proposal_nms_tiou, max_detections
        self.anchor_positive_tiou, self.anchor_negative_tiou = anchor_positive_tiou, anchor_negative_tiou
        self.proposal_positive_tiou = proposal_positive_tiou
        self.anchors_per_video, self.anchor_positive_share = anchors_per_video, anchor_positive_share
        self.proposals_per_video, self.proposal_positive_share = proposals_per_video, proposal_positive_share
        self.append_truth, self.regression_weight = append_truth, regression_weight
        self.class_specific_regression = class_specific_regression
        self.register_buffer("scales", torch.tensor(scales, dtype=torch.get_default_dtype()), persistent=False)
        widths = [channels[stream] for stream in streams]
        widths = [sum(widths)] if fusion == "early" else widths
        self.proposal_networks = nn.ModuleList(
            SegmentProposalNetwork(
                channels=c, width=width, scales=scales, receptive_field=receptive_field, context=proposal_context
            )
            for c in widths
        )
        self.classifiers = nn.ModuleList(
            SegmentClassifier(
                channels=c,
                width=width,
                classes=classes,
                regressions=classes if class_specific_regression else 1,
                soi=SOI[soi],
                bins=soi_bins,
                margin=0.5 if classification_context else 0.0,
                dropout=dropout,
            )
            for c in widths
        )

    @classmethod
    def resolve(cls, model: dict[str, Any], lengths_rows: np.ndarray) -> dict[str, Any]:
        """``model`` (this class's keywords as in a recipe) with ``anchor_scales: auto`` replaced by numbers.

        ``lengths_rows`` (N,) are the lengths of the training actions in rows of the features as the detector sees them.
        """
        if model.get("anchor_scales") != "auto":
            return dict(model)
        return {**model, "anchor_scales": list(anchor_scales_for(lengths_rows))}

    # ---- forward -------------------------------------------------------------------------------------------------
    def forward(self, batch: Batch) -> TALNetOutputs:
        """Both stages. In training mode the second one sees a sample of the proposals, chosen by ``batch.targets``."""
        mask = batch.mask[:, None]  # (B, 1, T)
        maps = [batch.features[need.key].masked_fill(~mask, 0.0) for need in self.needs]  # each (B, C, T)
        if self.fusion == "early":
            maps = [torch.cat(maps, 1)]
        rows = batch.mask.sum(1)  # (B,)

        objectness, offsets = _mean(
            network(x, mask.to(x.dtype)) for network, x in zip(self.proposal_networks, maps, strict=True)
        )
        objectness, offsets = objectness.flatten(1), offsets.flatten(1, 2)  # (B, N), (B, N, 2)
        anchors = make_anchors(batch.mask.shape[1], self.scales.to(objectness.dtype)).flatten(0, 1)  # (N, 2)
        valid = batch.mask.repeat_interleave(len(self.scales), 1)  # (B, N)
        extent = extents(batch).to(anchors)  # (B, 2)

        limit = self.training_proposals if self.training else self.proposals
        found = self._propose(anchors, valid, objectness.detach(), offsets.detach(), rows, limit)
        if self.training:
            if batch.targets is None:
                raise ValueError("TALNet in training mode needs batch.targets; call .eval() to detect")
            found = [
                self._chosen(*f, truths_within(t, e)[0]) for f, t, e in zip(found, batch.targets, extent, strict=True)
            ]
        proposals, confidence = (torch.cat(part) for part in zip(*found, strict=True))  # (P, 2), (P,)
        counts = torch.tensor([len(part[0]) for part in found], device=proposals.device)
        sample = torch.repeat_interleave(torch.arange(len(found), device=proposals.device), counts)  # (P,)
        logits, regressions = _mean(
            network(x, rows, proposals, sample) for network, x in zip(self.classifiers, maps, strict=True)
        )
        return TALNetOutputs(
            anchors, valid, extent, objectness, offsets, proposals, sample, confidence, logits, regressions
        )

    def _propose(
        self, anchors: Tensor, valid: Tensor, objectness: Tensor, offsets: Tensor, rows: Tensor, limit: int
    ) -> list[tuple[Tensor, Tensor]]:
        """For each sample its proposals (P_i, 2) inside ``[0, rows]`` and their falling objectness, after NMS."""
        segments = decode_center_length(offsets, anchors, weights=WEIGHTS)  # (B, N, 2)
        segments = clip_segments(segments, 0.0, rows[:, None, None])
        usable = valid & (segments[..., 1] - segments[..., 0] > 1e-3) & objectness.isfinite()  # NaN is nobody's length
        found = []
        for these, scores, use in zip(segments, objectness, usable, strict=True):
            these, scores = these[use], scores[use]
            kept = nms(these, scores, tiou=self.proposal_nms_tiou, max_segments=limit)
            found.append((these[kept], scores[kept]))
        return found

    def _chosen(self, proposals: Tensor, confidence: Tensor, truths: Tensor) -> tuple[Tensor, Tensor]:
        """The proposals (P, 2) of one video that a training step classifies, and their confidence (P,)."""
        if self.append_truth:
            proposals = torch.cat((proposals, truths))
            confidence = torch.cat((confidence, confidence.new_full((len(truths),), math.inf)))
        tiou, _ = best_truth(segment_tiou(proposals, truths))
        chosen = self._sampled(tiou > self.proposal_positive_tiou)
        return proposals[chosen], confidence[chosen]

    def _sampled(self, positive: Tensor) -> Tensor:
        """(P,) bool: the proposals of one video in its sample; a sample drawn before is all drawn again."""
        count, share = self.proposals_per_video, self.proposal_positive_share
        chosen = balanced_sample(positive[None], ~positive[None], count=count, positive_share=share)
        return (chosen[0] | chosen[1])[0]

    # ---- loss ----------------------------------------------------------------------------------------------------
    def loss(self, outputs: TALNetOutputs, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """The terms of Eq. 1 for both stages: means over the sampled anchors or proposals, then over the videos.

        Truths are cut to what the sample's rows look at: an action longer than a sample is learnt as far as it is seen.
        """
        truths = [truths_within(target, extent) for target, extent in zip(targets, outputs.extent, strict=True)]
        return {**self._anchor_loss(outputs, truths), **self._proposal_loss(outputs, truths)}

    def _anchor_loss(self, outputs: TALNetOutputs, truths: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        anchors = outputs.anchors
        matches, wanted = [], []
        for (segments, _), valid in zip(truths, outputs.valid, strict=True):
            tiou = segment_tiou(anchors, segments) * valid[:, None]  # (N, G)
            positive, negative, truth = match_anchors(
                anchors, segments, tiou, above=self.anchor_positive_tiou, below=self.anchor_negative_tiou
            )
            matches.append((positive & valid, negative & valid))
            wanted.append(segments[truth] if len(segments) else anchors)
        positive, negative = (torch.stack(part) for part in zip(*matches, strict=True))  # (B, N)
        positive, negative = balanced_sample(
            positive, negative, count=self.anchors_per_video, positive_share=self.anchor_positive_share
        )
        either = positive | negative
        weight = _weights(either, outputs.objectness.dtype)
        entropy = F.binary_cross_entropy_with_logits(
            outputs.objectness[either],
            positive[either].to(outputs.objectness.dtype),
            weight=weight[either],
            reduction="sum",
        )
        goal = encode_center_length(
            torch.stack(wanted)[positive], anchors.expand(*positive.shape, 2)[positive], weights=WEIGHTS
        )
        distance = F.smooth_l1_loss(outputs.offsets[positive], goal, reduction="none").sum(1)
        return {
            "objectness": entropy,
            "proposal_regression": self.regression_weight * (distance * weight[positive]).sum(),
        }

    def _proposal_loss(self, outputs: TALNetOutputs, truths: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        proposals, device = outputs.proposals, outputs.proposals.device
        goal, label = torch.zeros_like(proposals), torch.zeros(len(proposals), dtype=torch.int64, device=device)
        weight = proposals.new_zeros(len(proposals))
        for i, (segments, labels) in enumerate(truths):
            own = torch.nonzero(outputs.sample == i).squeeze(1)
            tiou, truth = best_truth(segment_tiou(proposals[own], segments), draw=True)
            positive = tiou > self.proposal_positive_tiou
            weight[own] = _weights(self._sampled(positive)[None], weight.dtype)[0] / len(truths)
            if len(segments):
                label[own] = torch.where(positive, labels[truth] + 1, 0)
                goal[own] = segments[truth]
        entropy = F.cross_entropy(outputs.logits, label, reduction="none")
        action = torch.nonzero(label > 0).squeeze(1)
        which = label[action] - 1 if self.class_specific_regression else torch.zeros_like(action)
        wanted = encode_center_length(goal[action], proposals[action], weights=WEIGHTS)
        distance = F.smooth_l1_loss(outputs.regressions[action, which], wanted, reduction="none").sum(1)
        return {
            "classification": (entropy * weight).sum(),
            "regression": self.regression_weight * (distance * weight[action]).sum(),
        }

    # ---- decode --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def decode(self, outputs: TALNetOutputs, batch: Batch) -> list[Segments]:
        """Every proposal with every class: boundaries regressed from it, score the softmax (background left out).

        Raises :class:`WeightsError` where the outputs are not finite.
        """
        scores = outputs.logits.softmax(1)[:, 1:]  # (P, K)
        segments = decode_center_length(outputs.regressions, outputs.proposals[:, None], weights=WEIGHTS)  # (P, R, 2)
        segments = segments.expand(-1, self.classes, -1)  # (P, K, 2)
        labels = torch.arange(self.classes, device=scores.device).expand_as(scores)
        found = []
        for i, video in enumerate(batch.videos):
            own = outputs.sample == i
            check_finite(video, outputs.objectness[i], scores[own], segments[own])
            flat = segments[own].flatten(0, 1), labels[own].flatten(), scores[own].flatten()  # P·K each
            found.append(segments_in_seconds(batch, i, outputs.extent[i], *flat, limit=self.max_detections))
        return found

    @torch.no_grad()
    def decode_proposals(self, outputs: TALNetOutputs, batch: Batch) -> list[Segments]:
        """The first stage alone (Tables 1 and 2): the proposals with their objectness as score, all with label 0."""
        found = []
        for i in range(len(batch)):
            own = outputs.sample == i
            labels = torch.zeros_like(outputs.sample[own])
            flat = outputs.proposals[own], labels, outputs.confidence[own].sigmoid()
            found.append(segments_in_seconds(batch, i, outputs.extent[i], *flat, limit=self.max_detections))
        return found


def _streams_read(channels: dict[str, int], fusion: str) -> list[str]:
    """The streams that ``fusion`` reads, in order."""
    streams = list(channels)
    check_choice("fusion", fusion, get_args(Fusion))
    if not streams:
        raise RecipeError("talnet needs at least one stream")
    if fusion in ("late", "early") or len(streams) == 1:
        return streams
    if len(streams) != 2:
        raise RecipeError(f"talnet: fusion '{fusion}' picks one of two streams (rgb first), got {', '.join(streams)}")
    return streams[:1] if fusion == "rgb" else streams[1:]


def _mean(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    """Element-wise means of the branches' logits and offsets, at least float32."""
    parts = zip(*pairs, strict=True)
    return tuple(
        torch.stack([p.to(torch.promote_types(p.dtype, torch.float32)) for p in part]).mean(0) for part in parts
    )


def _weights(chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """For ``chosen`` (B, N): 1 / (how many of the row are chosen · B) where chosen, else 0."""
    count = chosen.sum(1, keepdim=True).clamp(min=1)
    return chosen.to(dtype) / (count * len(chosen))
