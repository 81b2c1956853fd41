"""ETAD: a detector that evaluates a sample of all possible proposals, three times over.

Liu et al., "ETAD: A Sampling-Based Approach for Efficient Temporal Action Detection". Only the detector is here; its
other half, gradients for a sample of the snippets, belongs to joint training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from tad.detect.detectors import etad_losses as losses
from tad.detect.detectors.common import (
    check_choice,
    check_finite,
    check_numbers,
    extents,
    is_list,
    segments_in_seconds,
    truths_within,
)
from tad.detect.detectors.etad_layers import (
    ATTENTION_HEADS,
    BoundaryEvaluation,
    Enhancement,
    FeatureEnhancement,
    ProposalEvaluation,
    Stage,
)
from tad.detect.interface import Batch, Detector, LevelSpec, Segments, Targets
from tad.detect.pooling import soi_mean_pool
from tad.detect.samplers import SAMPLERS, sample, sample_count
from tad.detect.segments import paired_tiou, segment_tiou
from tad.errors import RecipeError

Score = Literal["paper", "code"]
ROI_POINTS = {"paper": 32, "code": 24}
LABEL_GUIDED = "iou-balanced"


@dataclass
class ETADOutputs:
    """What :meth:`ETAD.forward` gives: P proposals of all samples, those of one sample together; row edges."""

    mask: Tensor  # (B, T)
    extent: Tensor  # (B, 2) what the sample's rows look at, inside the video
    boundary: Tensor  # (B, 2, T) logits of start and end
    candidates: Tensor  # (P, 2) int64, the proposals before their refinement
    sample: Tensor  # (P,) which sample a proposal belongs to
    stages: list[Stage]


class ETAD(Detector):
    """ETAD on stored features: rows with context → starts and ends → a sample of all proposals → a cascade.

    Its proposals have no class (``class_agnostic``). A proposal is any pair of row edges, 8256 on 128 rows.

    Parameters
    ----------
    channels : stream → width of its rows; streams are concatenated. classes : not used, the proposals have none.
    layout, rows : how videos are handed over: ``rescaled`` to so many rows, or ``windowed``.
    width, lstm_width, branch_width, norm_groups : of the feature enhancement (Fig. 5).
    enhancement : ``lstm``, or what Table 7 compares it with: ``conv``, ``transformer``.
    roi : points of a proposal's features: ``paper`` 32 of the extended region, 8 of start and end; ``code`` 24 and 6.
    roi_channels, head_width, branch_head_width : of the proposal evaluation, 128, 512 and 128 in Table 6.
    stages : of the cascade. tiou_thresholds : one a stage; proposals with a larger tIoU learn to regress.
    sampler, ratio : how a training step samples proposals (DPS), one of ``SAMPLERS``, and how many.
    detect_sampler, detect_ratio : the same at detection, where the sample is fixed (Table 9).
    boundary_loss_weight, boundary_class_weight, iou_weight, regression_weight : the lambdas of Eq. 1 in its order; the
        public code has 0.5 for the second.
    iou_l2_weight : of the regression of the tIoU beside its classification; the public code has 5.
    score : ``paper``: start · end · tIoU; ``code``: tIoU alone. The tIoU is the product of its two estimates (by
        classification and by regression), each the mean of the stages.
    boundary_peaks : detect only with starts and ends that are peaks, or above half the highest (BMN's rule). Others
        are not evaluated at all.
    dropout : of the enhanced rows, and of the hidden layers of the proposal evaluation. The paper has none.
    shortest, longest : of the proposals, in rows. max_detections : of a video, best first.

    Raises
    ------
    RecipeError : values that do not fit together.
    """

    class_agnostic: ClassVar[bool] = True

    def __init__(
        self,
        *,
        channels: dict[str, int],
        classes: int,
        layout: Literal["rescaled", "windowed"] = "rescaled",
        rows: int = 128,
        width: int = 256,
        lstm_width: int = 256,
        branch_width: int = 128,
        norm_groups: int = 16,
        enhancement: Enhancement = "lstm",
        roi: Literal["paper", "code"] = "paper",
        roi_channels: int = 128,
        head_width: int = 512,
        branch_head_width: int = 128,
        stages: int = 3,
        tiou_thresholds: Sequence[float] = (0.7, 0.8, 0.9),
        sampler: str = "random",
        ratio: float = 0.06,
        detect_sampler: str = "grid",
        detect_ratio: float = 1.0,
        boundary_loss_weight: float = 1.0,
        boundary_class_weight: float = 1.0,
        iou_weight: float = 1.0,
        regression_weight: float = 10.0,
        iou_l2_weight: float = 1.0,
        score: Score = "paper",
        boundary_peaks: bool = True,
        dropout: float = 0.0,
        shortest: int = 1,
        longest: int | None = None,
        max_detections: int = 2000,
    ) -> None:
        super().__init__()
        if not channels:
            raise RecipeError("etad needs at least one stream")
        check_choice("layout", layout, ("rescaled", "windowed"))
        check_choice("enhancement", enhancement, get_args(Enhancement))
        check_choice("roi", roi, tuple(ROI_POINTS))
        check_choice("score", score, get_args(Score))
        check_choice("sampler", sampler, tuple(SAMPLERS))
        check_choice("detect_sampler", detect_sampler, tuple(SAMPLERS))
        check_numbers(
            1,
            math.inf,
            classes=classes,
            rows=rows,
            width=width,
            lstm_width=lstm_width,
            branch_width=branch_width,
            norm_groups=norm_groups,
            roi_channels=roi_channels,
            head_width=head_width,
            branch_head_width=branch_head_width,
            stages=stages,
            shortest=shortest,
            longest=rows if longest is None else longest,
            max_detections=max_detections,
        )
        check_numbers(
            0.0,
            math.inf,
            boundary_loss_weight=boundary_loss_weight,
            boundary_class_weight=boundary_class_weight,
            iou_weight=iou_weight,
            regression_weight=regression_weight,
            iou_l2_weight=iou_l2_weight,
        )
        check_numbers(0.0, 1.0, ratio=ratio, detect_ratio=detect_ratio, dropout=dropout)
        if not is_list(tiou_thresholds):
            raise RecipeError(f"etad: tiou_thresholds must be a list, one a stage, got {tiou_thresholds!r}")
        check_numbers(0.0, 1.0, **{f"tiou_thresholds[{i}]": t for i, t in enumerate(tiou_thresholds)})
        if len(tiou_thresholds) != stages:
            raise RecipeError(f"etad: {stages} stages need as many tiou_thresholds, got {list(tiou_thresholds)}")
        if detect_sampler == LABEL_GUIDED:
            raise RecipeError(f"etad: detect_sampler '{LABEL_GUIDED}' needs the truth, which only training knows")
        for share in (ratio, detect_ratio):
            sample_count(share, 1)  # refuses 0
        if longest is not None and longest < shortest:
            raise RecipeError(f"etad: no proposal has at least {shortest} and at most {longest} rows")
        normed = {"width": width, "branch_width": branch_width}
        if enhancement == "conv":
            normed["lstm_width"] = lstm_width
        elif enhancement == "transformer" and width % ATTENTION_HEADS:
            raise RecipeError(f"etad: width={width} is not divisible by the {ATTENTION_HEADS} heads of attention")
        for name, value in normed.items():
            if value % norm_groups:
                raise RecipeError(f"etad: {name}={value} is not divisible by norm_groups={norm_groups}")
        self.needs = tuple(LevelSpec(stream, layout=layout, rows=rows) for stream in channels)
        self.tiou_thresholds = tuple(tiou_thresholds)
        self.sampler, self.ratio = sampler, ratio
        self.detect_sampler, self.detect_ratio = detect_sampler, detect_ratio
        self.boundary_loss_weight, self.boundary_class_weight = boundary_loss_weight, boundary_class_weight
        self.iou_weight, self.regression_weight, self.iou_l2_weight = iou_weight, regression_weight, iou_l2_weight
        self.score, self.boundary_peaks = score, boundary_peaks
        self.shortest, self.longest, self.max_detections = shortest, longest, max_detections
        self.enhancement = FeatureEnhancement(
            channels=sum(channels.values()),
            width=width,
            lstm_width=lstm_width,
            branch_width=branch_width,
            groups=norm_groups,
            enhancement=enhancement,
        )
        self.dropout = nn.Dropout(dropout)
        self.boundary = BoundaryEvaluation(width=width, groups=norm_groups)
        self.stages = nn.ModuleList(
            ProposalEvaluation(
                width=width,
                roi_channels=roi_channels,
                points=ROI_POINTS[roi],
                widths=(head_width, branch_head_width),
                dropout=dropout,
            )
            for _ in range(stages)
        )

    # ---- forward -------------------------------------------------------------------------------------------------
    def forward(self, batch: Batch) -> ETADOutputs:
        """Starts and ends, and the proposals of this step's sample through all stages; no others cost anything."""
        mask = None if bool(batch.mask.all()) else batch.mask[:, None]  # (B, 1, T)
        x = torch.cat([batch.features[need.key] for need in self.needs], 1)  # (B, C, T)
        x = x if mask is None else x.masked_fill(~mask, 0.0)
        x = self.dropout(self.enhancement(x, mask))  # (B, width, T)
        boundary = self.boundary(x, mask).to(torch.promote_types(x.dtype, torch.float32))
        extent = extents(batch).to(boundary)  # (B, 2)
        rows = batch.mask.sum(1)  # (B,)
        chosen = self._chosen(x.detach(), boundary.detach(), rows, extent, batch)
        counts = [len(part) for part in chosen]
        candidates = torch.cat(chosen)  # (P, 2)
        sample = torch.repeat_interleave(
            torch.arange(len(counts), device=x.device), torch.tensor(counts, device=x.device)
        )
        steps, proposals = [], candidates.to(boundary)
        by_row = x.transpose(1, 2).contiguous()  # (B, T, width)
        for stage in self.stages:
            steps.append(stage(by_row, rows, proposals, counts, extent[sample]))
            proposals = steps[-1].refined
        return ETADOutputs(batch.mask, extent, boundary, candidates, sample, steps)

    @torch.no_grad()
    def _chosen(self, x: Tensor, boundary: Tensor, rows: Tensor, extent: Tensor, batch: Batch) -> list[Tensor]:
        """The proposals (P_i, 2) int64 of each sample that are evaluated."""
        name, ratio = (self.sampler, self.ratio) if self.training else (self.detect_sampler, self.detect_ratio)
        if self.training and name == LABEL_GUIDED and batch.targets is None:
            raise ValueError(f"ETAD with sampler '{name}' needs batch.targets in training mode")
        peaks = None
        if self.boundary_peaks and not self.training:
            peaks = boundary_peaks(boundary.sigmoid(), batch.mask)  # (B, 2, T)
        chosen = []
        for i, count in enumerate(rows.tolist()):
            edges = all_candidates(count, self.shortest, self.longest, device=x.device)  # (N, 2)
            if ratio < 1 and len(edges) > 1:
                segments = edges.to(boundary)
                tiou = None
                if name == LABEL_GUIDED and batch.targets is not None:
                    truths = truths_within(batch.targets[i], extent[i])[0]
                    tiou = torch.cat((segment_tiou(segments, truths), segments.new_zeros(len(edges), 1)), 1).amax(1)
                kept = sample(
                    name,
                    count=sample_count(ratio, len(edges)),
                    map_index=edges - edges.new_tensor([0, 1]),  # first and last row
                    features=partial(mean_features, x[i : i + 1], rows[i : i + 1], segments),
                    tiou=tiou,
                    scale=(edges[:, 1] - edges[:, 0]).to(boundary.dtype) / count,
                    fixed=not self.training,
                )
                edges = edges[kept]
            if peaks is not None:
                edges = edges[peaks[i, 0, edges[:, 0]] & peaks[i, 1, edges[:, 1] - 1]]
            chosen.append(edges)
        return chosen

    # ---- loss ----------------------------------------------------------------------------------------------------
    def loss(self, outputs: ETADOutputs, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """The terms of Eq. 1, weighted; those of the proposals are sums over the stages.

        Every proposal is regressed to the truth that it had before its first refinement, as long as its tIoU with it
        is above the stage's threshold. Truths are cut to what the sample's rows look at.
        """
        truths = losses.padded_truths(
            [
                truths_within(target, extent)[0].to(extent)
                for target, extent in zip(targets, outputs.extent, strict=True)
            ]
        )  # (B, G, 2)
        own = truths[outputs.sample]  # (P, G, 2)
        truth = losses.assigned_truth(outputs.stages[0].proposals, own)  # (P, 2)
        proposal_boundary, iou_class, iou_l2, regression = [], [], [], []
        for stage, threshold in zip(outputs.stages, self.tiou_thresholds, strict=True):
            tiou = paired_tiou(stage.proposals[:, None], own).amax(1)  # (P,)
            positive = paired_tiou(stage.proposals, truth) > threshold
            proposal_boundary.append(losses.proposal_boundary_loss(stage.boundary_logits, stage.proposals, own))
            iou_class.append(losses.iou_class_loss(stage.iou_logits[:, 0], tiou))
            iou_l2.append(losses.iou_l2_loss(stage.iou_logits[:, 1], tiou))
            regression.append(
                losses.regression_loss(stage.boundary_offsets, stage.center_offsets, stage.proposals, truth, positive)
            )
        return {
            "boundary": self.boundary_loss_weight * losses.boundary_loss(outputs.boundary, outputs.mask, truths),
            "proposal_boundary": self.boundary_class_weight * torch.stack(proposal_boundary).sum(),
            "iou_class": self.iou_weight * torch.stack(iou_class).sum(),
            "iou_l2": self.iou_weight * self.iou_l2_weight * torch.stack(iou_l2).sum(),
            "regression": self.regression_weight * torch.stack(regression).sum(),
        }

    # ---- decode --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def decode(self, outputs: ETADOutputs, batch: Batch) -> list[Segments]:
        """Proposals with the mean boundaries of all stages and the recipe's score, all with label 0.

        Raises :class:`WeightsError` where the outputs are not finite.
        """
        segments = torch.stack([stage.refined for stage in outputs.stages]).mean(0)  # (P, 2)
        scores = torch.stack([stage.iou_logits.sigmoid() for stage in outputs.stages]).mean(0).prod(1)  # (P,)
        boundary = outputs.boundary.sigmoid()
        if self.score == "paper":
            first, last = outputs.candidates[:, 0], outputs.candidates[:, 1] - 1  # the rows inside either edge
            scores = scores * boundary[outputs.sample, 0, first] * boundary[outputs.sample, 1, last]
        labels = torch.zeros_like(outputs.sample)
        found = []
        for i, video in enumerate(batch.videos):
            own = outputs.sample == i
            check_finite(video, boundary[i][:, outputs.mask[i]], scores[own], segments[own])
            flat = segments[own], labels[own], scores[own]
            found.append(segments_in_seconds(batch, i, outputs.extent[i], *flat, limit=self.max_detections))
        return found


def all_candidates(rows: int, shortest: int, longest: int | None, *, device: torch.device) -> Tensor:
    """All pairs of row edges (N, 2) int64 between which lie ``shortest`` to ``longest`` rows, by start, then end.

    Videos with fewer rows than ``shortest`` have one, of all their rows.
    """
    first, last = torch.triu_indices(rows, rows, offset=min(shortest, rows) - 1, device=device)  # rows of either end
    edges = torch.stack((first, last + 1), 1)
    return edges if longest is None else edges[edges[:, 1] - edges[:, 0] <= longest]


def mean_features(x: Tensor, rows: Tensor, segments: Tensor) -> Tensor:
    """What feature-guided samplers compare proposals by: the means (N, C) of a sample's rows (1, C, T) inside them."""
    sample = torch.zeros(len(segments), dtype=torch.int64, device=x.device)
    return soi_mean_pool(x, rows, segments, sample, bins=1).squeeze(2)


def boundary_peaks(probability: Tensor, mask: Tensor) -> Tensor:
    """BMN's choice of boundaries: (B, 2, T) bool for start and end probabilities (B, 2, T) and real rows (B, T).

    Rows above both neighbours, those above half the highest, and always the first row as a start, the last as an end.
    """
    real = mask[:, None]
    p = torch.nn.functional.pad(probability.masked_fill(~real, -1.0), (1, 1), value=-1.0)
    inner = p[..., 1:-1]
    peaks = (inner > p[..., :-2]) & (inner > p[..., 2:]) | (inner > 0.5 * inner.amax(2, keepdim=True))
    peaks[:, 0, 0] = True
    last = (mask.sum(1) - 1).clamp(min=0)
    peaks[torch.arange(len(mask), device=mask.device), 1, last] = True
    return peaks & real
