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
from tad.detect.pooling import SlidingMax, SoIAlign, SoIPool
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

    def forward(self, x: SlidingMax, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Rows ``x`` (B, W, T), zero where ``mask`` (B, 1, T) is → objectness (B, A, T) and offsets (B, A, 2, T)."""
        y = x(self.pool) * mask  # (B, W, T)
        y = F.relu(self.convs[0](y)) * mask
        y = F.relu(self.convs[1](y))
        return self.objectness(y), self.offsets(y).unflatten(1, (self.anchors, 2))


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
        x = SlidingMax(F.relu(self.reduce(features)) * mask, longest=max(tower.pool for tower in self.towers))
        objectness, offsets = zip(*(tower(x, mask) for tower in self.towers), strict=True)
        return torch.cat(objectness, 1).transpose(1, 2), torch.cat(offsets, 1).permute(0, 3, 1, 2)


class SegmentClassifier(nn.Module):
    """Class scores and offsets of proposals (§4.2, Fig. 5): SoI pooling, 1x1 convolution, two fully-connected layers.

    ``margin``: share of its own length by which a proposal is extended on both sides before pooling.
    """

    def __init__(
        self,
        *,
        channels: int,
        width: int,
        classes: int,
        regressions: int,
        soi: nn.Module,
        bins: int,
        margin: float,
        dropout: float,
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


class TALNet(Detector):
    """TAL-Net on stored features: anchors → proposals → classes and boundaries, from one or more streams.

    Parameters
    ----------
    channels : stream → width of its rows, in the recipe's order. classes : K.
    fusion : ``late``: each stream has its own network, their logits are averaged at both stages (§4.3, Fig. 6); ``early``:
        rows concatenated; ``rgb``, ``flow``: the first or the second of two streams alone (one stream: that one).
    receptive_field, proposal_context, classification_context : see :class:`SegmentProposalNetwork`, :class:`SegmentClassifier`;
        ``proposal_context`` says nothing unless ``multi-dilated``.
    anchor_scales : in rows. :meth:`resolve` replaces ``auto`` by scales that fit the training actions.
    width : filters of every convolution and fully-connected layer.
    soi, soi_bins : ``max`` (the paper's) or ``align`` (linear interpolation at the bins' centres), and how many bins.
    proposals, training_proposals, proposal_nms_tiou : so many are kept a video after NMS, at detection and in training.
    anchor_positive_tiou, anchor_negative_tiou, proposal_positive_tiou : above, below and above which an anchor is positive, an
        anchor is negative and a proposal has a class.
    anchors_per_video, anchor_positive_share, proposals_per_video, proposal_positive_share : the sample that a step learns from.
    append_truth : the truth joins the proposals in training.
    regression_weight : λ of Eq. 1, at both stages.
    class_specific_regression : K pairs of boundary offsets a proposal instead of one.
    dropout : before the last layer of the classifier.
    max_detections : of a video, best first, that :meth:`decode` gives.

    Raises
    ------
    RecipeError : values that do not fit together.
    """

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
        soi: Literal["max", "align"] = "max",
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
        streams = _streams_read(channels, fusion)
        scales = tuple(anchor_scales)
        _check(
            receptive_field in get_args(ReceptiveField), "receptive_field", receptive_field, get_args(ReceptiveField)
        )
        _check(soi in ("max", "align"), "soi", soi, ("max", "align"))
        numbers = [s for s in scales if isinstance(s, (int, float)) and math.isfinite(s) and s > 0]
        _check(0 < len(scales) == len(numbers), "anchor_scales", scales, ("positive numbers of rows",))
        for name, value in (("classes", classes), ("width", width), ("soi_bins", soi_bins), ("proposals", proposals)):
            _check(isinstance(value, int) and value >= 1, name, value, ("a whole number >= 1",))
        self.needs = tuple(LevelSpec(stream) for stream in streams)
        self.fusion, self.classes = fusion, classes
        self.proposals, self.training_proposals = proposals, training_proposals
        self.proposal_nms_tiou, self.max_detections = proposal_nms_tiou, max_detections
        self.anchor_tiou = {"above": anchor_positive_tiou, "below": anchor_negative_tiou}
        self.anchor_sample = {"count": anchors_per_video, "positive_share": anchor_positive_share}
        self.proposal_positive_tiou = proposal_positive_tiou
        self.proposal_sample = {"count": proposals_per_video, "positive_share": proposal_positive_share}
        self.append_truth, self.regression_weight = append_truth, regression_weight
        self.class_specific_regression = class_specific_regression
        self.register_buffer("scales", torch.tensor(scales, dtype=torch.get_default_dtype()), persistent=False)
        self.scales: Tensor
        widths = [channels[stream] for stream in streams]
        self.branches = nn.ModuleList(
            Branch(
                proposal=SegmentProposalNetwork(
                    channels=c, width=width, scales=scales, receptive_field=receptive_field, context=proposal_context
                ),
                classifier=SegmentClassifier(
                    channels=c,
                    width=width,
                    classes=classes,
                    regressions=classes if class_specific_regression else 1,
                    soi=(SoIPool if soi == "max" else SoIAlign)(bins=soi_bins),
                    bins=soi_bins,
                    margin=0.5 if classification_context else 0.0,
                    dropout=dropout,
                ),
            )
            for c in ([sum(widths)] if fusion == "early" else widths)
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
        branches = list(zip(self.branches, maps, strict=True))

        objectness, offsets = _mean(branch.proposal(x, mask.to(x.dtype)) for branch, x in branches)
        objectness, offsets = objectness.flatten(1), offsets.flatten(1, 2)  # (B, N), (B, N, 2)
        anchors = make_anchors(batch.mask.shape[1], self.scales.to(objectness.dtype)).flatten(0, 1)  # (N, 2)
        valid = batch.mask.repeat_interleave(len(self.scales), 1)  # (B, N)
        extent = _extents(batch, rows).to(anchors)  # (B, 2)

        limit = self.training_proposals if self.training else self.proposals
        found = self._propose(anchors, valid, objectness.detach(), offsets.detach(), rows, limit)
        if self.training:
            if batch.targets is None:
                raise ValueError("TALNet in training mode needs batch.targets; call .eval() to detect")
            found = [self._chosen(p, *_truths(t, e)) for p, t, e in zip(found, batch.targets, extent, strict=True)]
        proposals = torch.cat(found)  # (P, 2)
        counts = torch.tensor([len(p) for p in found], device=proposals.device)
        sample = torch.repeat_interleave(torch.arange(len(found), device=proposals.device), counts)  # (P,)
        logits, regressions = _mean(branch.classifier(x, rows, proposals, sample) for branch, x in branches)
        return TALNetOutputs(anchors, valid, extent, objectness, offsets, proposals, sample, logits, regressions)

    def _propose(
        self, anchors: Tensor, valid: Tensor, objectness: Tensor, offsets: Tensor, rows: Tensor, limit: int
    ) -> list[Tensor]:
        """For each sample its proposals (P_i, 2), by falling objectness, inside ``[0, rows]``, after NMS."""
        segments = decode_center_length(offsets, anchors, weights=WEIGHTS)  # (B, N, 2)
        segments = clip_segments(segments, 0.0, rows[:, None, None])
        usable = valid & (segments[..., 1] - segments[..., 0] > 1e-3) & objectness.isfinite()  # NaN is nobody's length
        found = []
        for these, scores, use in zip(segments, objectness, usable, strict=True):
            these = these[use]
            found.append(these[nms(these, scores[use], tiou=self.proposal_nms_tiou, max_segments=limit)])
        return found

    def _chosen(self, proposals: Tensor, truths: Tensor, labels: Tensor) -> Tensor:
        """The proposals (P, 2) of one video that a training step classifies."""
        if self.append_truth:
            proposals = torch.cat((proposals, truths))
        positive = best_truth(segment_tiou(proposals, truths)).tiou > self.proposal_positive_tiou
        chosen = balanced_sample(positive[None], ~positive[None], **self.proposal_sample)
        return proposals[(chosen[0] | chosen[1])[0]]

    # ---- loss ----------------------------------------------------------------------------------------------------
    def loss(self, outputs: TALNetOutputs, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """The four terms of Eq. 1 for both stages: means over the sampled anchors or proposals, then over the videos.

        Truths are cut to what the sample's rows look at, so that an action longer than a sample is found as far as it is seen.
        """
        truths = [_truths(target, extent) for target, extent in zip(targets, outputs.extent, strict=True)]
        return {**self._anchor_loss(outputs, truths), **self._proposal_loss(outputs, truths)}

    def _anchor_loss(self, outputs: TALNetOutputs, truths: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        anchors = outputs.anchors
        matches, wanted = [], []
        for (segments, _), valid in zip(truths, outputs.valid, strict=True):
            tiou = segment_tiou(anchors, segments) * valid[:, None]  # (N, G)
            positive, negative, truth = match_anchors(anchors, segments, tiou, **self.anchor_tiou)
            matches.append((positive & valid, negative & valid))
            wanted.append(segments[truth] if len(segments) else anchors)
        chosen = balanced_sample(*(torch.stack(part) for part in zip(*matches, strict=True)), **self.anchor_sample)
        positive, either = chosen[0], chosen[0] | chosen[1]  # (B, N)
        weight = _weights(either)
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
            tiou, truth = best_truth(segment_tiou(proposals[own], segments))
            positive = tiou > self.proposal_positive_tiou
            chosen = balanced_sample(positive[None], ~positive[None], **self.proposal_sample)  # in training: all, again
            weight[own] = _weights(chosen[0] | chosen[1])[0].to(weight) / len(truths)
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
        """Every proposal with every class: boundaries regressed from the proposal, score the softmax without background.

        Raises :class:`WeightsError` where the outputs are not finite.
        """
        scores = outputs.logits.softmax(1)[:, 1:]  # (P, K)
        segments = decode_center_length(outputs.regressions, outputs.proposals[:, None], weights=WEIGHTS)  # (P, R, 2)
        segments = segments.expand(-1, self.classes, -1)  # (P, K, 2)
        found = []
        for i, (video, axis, duration_s) in enumerate(zip(batch.videos, batch.axes, batch.durations_s, strict=True)):
            own = outputs.sample == i
            finite = (
                outputs.objectness[i].isfinite().all() & scores[own].isfinite().all() & segments[own].isfinite().all()
            )
            if not bool(finite):
                raise WeightsError(
                    f"video {video}: the detector's output is not finite. Either its features hold NaN (see `tad store verify "
                    "--deep`), or the weights have diverged: take an earlier checkpoint, or train with a lower learning rate"
                )
            inside = clip_segments(segments[own], *outputs.extent[i]).flatten(0, 1)
            seconds = clip_segments(axis.to_seconds(inside), 0.0, duration_s)  # (P·K, 2)
            labels = torch.arange(self.classes, device=seconds.device).repeat(int(own.sum()))
            lasting = torch.nonzero(seconds[:, 1] > seconds[:, 0]).squeeze(1)
            best = torch.sort(scores[own].flatten()[lasting], descending=True, stable=True)
            keep = lasting[best.indices[: self.max_detections]]
            found.append(Segments(video, seconds[keep], labels[keep], best.values[: self.max_detections]))
        return found


def _streams_read(channels: dict[str, int], fusion: str) -> list[str]:
    """The streams that ``fusion`` reads, in order."""
    streams = list(channels)
    _check(fusion in get_args(Fusion), "fusion", fusion, get_args(Fusion))
    if not streams:
        raise RecipeError("talnet needs at least one stream")
    if fusion in ("late", "early") or len(streams) == 1:
        return streams
    if len(streams) != 2:
        raise RecipeError(f"talnet: fusion '{fusion}' picks one of two streams (rgb first), got {', '.join(streams)}")
    return streams[:1] if fusion == "rgb" else streams[1:]


def _check(fits: bool, name: str, value: object, allowed: Iterable[object]) -> None:
    if not fits:
        raise RecipeError(f"talnet: {name} must be {' | '.join(map(str, allowed))}, got {value!r}")


def _mean(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    """Element-wise means of the branches' logits and offsets, at least float32."""
    parts = zip(*pairs, strict=True)
    return tuple(
        torch.stack([p.to(torch.promote_types(p.dtype, torch.float32)) for p in part]).mean(0) for part in parts
    )


def _weights(chosen: Tensor) -> Tensor:
    """For ``chosen`` (B, N): 1 / (how many of the row are chosen · B) where chosen, else 0."""
    count = chosen.sum(1, keepdim=True).clamp(min=1)
    return chosen / (count * len(chosen))


def _truths(target: Targets, extent: Tensor) -> tuple[Tensor, Tensor]:
    """Segments (G, 2) and labels (G,) of one video, cut to ``extent`` (2,); what has no length then is left out."""
    segments = clip_segments(target.segments.to(extent), extent[0], extent[1])
    keep = segments[:, 1] > segments[:, 0]
    return segments[keep], target.labels[keep]


def _extents(batch: Batch, rows: Tensor) -> Tensor:
    """(B, 2) in row edges: what the rows of each sample look at with their windows, inside the video."""
    ends = []
    for axis, duration_s, count in zip(batch.axes, batch.durations_s, rows.tolist(), strict=True):
        half = 0.5 * max(axis.window_s / axis.scale_s, 1.0)  # rows
        low = max(0.5 - half, axis.to_rows(0.0))
        ends.append((low, max(low, min(count - 0.5 + half, axis.to_rows(duration_s)))))
    return torch.tensor(ends, dtype=torch.float64)
