"""BMN, the boundary-matching network, with or without LGTE: class-agnostic proposals of a dense grid.

Lin et al., "BMN: Boundary-Matching Network for Temporal Action Proposal Generation", 2019; with encoders and scores
as in Qing et al., "Exploring Stronger Feature for Temporal Action Localization", 2021 (below: Stronger Feature).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tad.detect.boundary_matching import BoundaryMatching, map_to_cells, proposal_grid
from tad.detect.detectors.bmn_layers import (
    BoundaryEvaluation,
    ProposalEvaluation,
    balanced_cross_entropy,
    balanced_l2,
    boundary_targets,
    tiou_targets,
)
from tad.detect.detectors.common import check_choice, check_finite, check_numbers, truths_within
from tad.detect.interface import Batch, Detector, LevelSpec, Segments, Targets
from tad.detect.lgte import LGTE
from tad.detect.segments import clip_segments
from tad.errors import RecipeError
from tad.timeline import TimeAxis

Layout = Literal["rescaled", "windowed"]
Score = Literal["pem", "product"]


@dataclass
class BMNOutputs:
    """What :meth:`BMN.forward` gives, all logits; cell (d, i) of a map is the proposal [i, i + d + 1] in row edges."""

    start: Tensor  # (B, T)
    end: Tensor  # (B, T)
    iou_class: Tensor  # (B, D, T)
    iou_regression: Tensor  # (B, D, T)
    rows: Tensor  # (B,) how many rows of a sample are real


class BMN(Detector):
    """The boundary-matching network on stored features, by default as the HACS system of Stronger Feature has it.

    Lin et al. 2019, "Boundary-Matching Network": a base of two grouped convolutions, with ``lgte`` LGTEs among them
    (Stronger Feature §2.3); the temporal evaluation, start and end probability of each row; the proposal evaluation,
    which is :class:`BoundaryMatching` and two maps of the tIoU of every proposal. "Training of BMN": the losses.

    Where paper and public codes differ: boundaries are those of row edges, so that row i is the cell [i, i + 1]; a
    proposal's start is judged by its first row and its end by its last one, the same in mirrored time, and may lie at
    the end of the sequence, which the public codes leave out; ``matching_channels`` is 128 (paper) or 256 (first code);
    ``low_includes_zero`` and ``score`` are below. The first code's ½ in the regression loss is in it.

    Parameters
    ----------
    channels : stream → width of its rows; streams are concatenated. classes : not looked at, proposals have none.
    layout, rows : whole videos ``rescaled`` to ``rows`` rows, or ``windowed`` in windows of so many.
    durations : D, the longest proposal in rows; by default ``rows``.
    width, groups : of the base's two convolutions and the temporal evaluation's first; ``groups`` divides the widths.
    lgte, lgte_dropout : 0; 1, behind the second convolution; or 2, one behind each.
    tem_width, matching_channels, hidden, pem_width : widths of the temporal evaluation, of what the boundary matching
        reads, of what it makes, and of the convolutions behind it.
    samples, samples_per_bin, margin : of :class:`BoundaryMatching`.
    boundary_rows : length of the region round a boundary in which a row is positive when more than half inside.
    temporal_weight, regression_weight, classification_weight : of the loss terms.
    high_tiou, low_tiou : in the regression loss a proposal's tIoU is good above the one, bad at the other or below.
    low_includes_zero : proposals that touch no action are bad ones as well (one public code); else they are left out.
    positive_tiou : a proposal is positive above this in the classification loss.
    score : ``pem``: iou_class^``pem_power`` · iou_regression of every proposal (Stronger Feature §2.3);
        ``product``: start · end · iou_class · iou_regression of proposals whose start and end are peaks (Lin et al.,
        "Inference of BMN").
    dropout : of the base's rows, and of whole channels of the map that boundary matching gives. The papers have none.
    max_detections : of a sample, best first, that :meth:`decode` gives.

    Raises
    ------
    RecipeError : values that do not fit together.
    """

    class_agnostic = True

    def __init__(
        self,
        *,
        channels: dict[str, int],
        classes: int,
        layout: Layout = "rescaled",
        rows: int = 100,
        durations: int | None = None,
        width: int = 256,
        groups: int = 4,
        lgte: int = 0,
        lgte_dropout: float = 0.1,
        tem_width: int = 256,
        matching_channels: int = 128,
        hidden: int = 512,
        pem_width: int = 128,
        samples: int = 32,
        samples_per_bin: int = 3,
        margin: float = 0.5,
        boundary_rows: float = 3.0,
        temporal_weight: float = 1.0,
        regression_weight: float = 10.0,
        classification_weight: float = 1.0,
        high_tiou: float = 0.7,
        low_tiou: float = 0.3,
        low_includes_zero: bool = False,
        positive_tiou: float = 0.9,
        score: Score = "pem",
        pem_power: float = 1.2,
        dropout: float = 0.0,
        max_detections: int = 2000,
    ) -> None:
        super().__init__()
        check_choice("layout", layout, get_args(Layout))
        check_choice("score", score, get_args(Score))
        durations = rows if durations is None else durations
        check_numbers(
            1,
            math.inf,
            classes=classes,
            rows=rows,
            durations=durations,
            width=width,
            groups=groups,
            tem_width=tem_width,
            matching_channels=matching_channels,
            hidden=hidden,
            pem_width=pem_width,
            samples_per_bin=samples_per_bin,
            max_detections=max_detections,
        )
        check_numbers(2, math.inf, samples=samples)
        check_numbers(0, 2, lgte=lgte)
        check_numbers(
            0.0,
            1.0,
            dropout=dropout,
            lgte_dropout=lgte_dropout,
            high_tiou=high_tiou,
            low_tiou=low_tiou,
            positive_tiou=positive_tiou,
        )
        check_numbers(
            0.0,
            math.inf,
            boundary_rows=boundary_rows,
            temporal_weight=temporal_weight,
            regression_weight=regression_weight,
            classification_weight=classification_weight,
            pem_power=pem_power,
        )
        check_numbers(0.0, 100.0, margin=margin)
        if not channels:
            raise RecipeError("bmn needs at least one stream")
        if low_tiou > high_tiou:
            raise RecipeError(f"bmn: low_tiou ({low_tiou}) must not be above high_tiou ({high_tiou})")
        total = sum(channels.values())
        for name, value in (("the streams together", total), ("width", width), ("tem_width", tem_width)):
            if value % groups:
                raise RecipeError(
                    f"bmn: groups={groups} does not divide the {value} channels of {name}; set model.groups to a "
                    f"divisor such as {math.gcd(groups, total, width, tem_width)}"
                )
        self.needs = tuple(LevelSpec(stream, layout=layout, rows=rows) for stream in channels)
        self.durations = durations
        self.boundary_rows, self.positive_tiou = boundary_rows, positive_tiou
        self.high_tiou, self.low_tiou = high_tiou, low_tiou
        self.low_includes_zero = low_includes_zero
        self.temporal_weight, self.regression_weight = temporal_weight, regression_weight
        self.classification_weight = classification_weight
        self.score, self.pem_power, self.max_detections = score, pem_power, max_detections
        self.base = nn.ModuleList(nn.Conv1d(c, width, 3, padding=1, groups=groups) for c in (total, width))
        # behind the convolutions: (none, one) with one LGTE, (one, one) with two
        self.encoders = nn.ModuleList(
            LGTE(channels=width, dropout=lgte_dropout) if place + lgte >= 2 else nn.Identity() for place in (0, 1)
        )
        self.dropout = nn.Dropout(dropout)
        self.temporal = BoundaryEvaluation(channels=width, width=tem_width, groups=groups)
        self.proposal = ProposalEvaluation(
            channels=width,
            matching_channels=matching_channels,
            matching=BoundaryMatching(
                channels=matching_channels,
                hidden=hidden,
                durations=durations,
                samples=samples,
                samples_per_bin=samples_per_bin,
                margin=margin,
            ),
            width=pem_width,
            dropout=dropout,
        )

    # ---- forward -------------------------------------------------------------------------------------------------
    def forward(self, batch: Batch) -> BMNOutputs:
        """Both evaluations of each sample; rows behind its end count as zeros everywhere."""
        mask = batch.mask[:, None]  # (B, 1, T)
        x = torch.cat([batch.features[need.key] for need in self.needs], 1).masked_fill(~mask, 0.0)  # (B, C, T)
        for conv, encoder in zip(self.base, self.encoders, strict=True):
            x = F.relu(conv(x)).masked_fill(~mask, 0.0)  # (B, W, T)
            if isinstance(encoder, LGTE):
                x = encoder(x, batch.mask)
            x = self.dropout(x)
        start, end = self.temporal(x)  # (B, T)
        rows, total = batch.mask.sum(1), batch.mask.shape[1]
        logits = self.proposal(x, mask, self._valid(rows, total))  # (B, 2, D, T)
        return BMNOutputs(start, end, logits[:, 0], logits[:, 1], rows)

    def _valid(self, rows: Tensor, total: int) -> Tensor:
        """(B, D, T) bool: the proposals that end within the ``rows`` (B,) of their sample."""
        end = torch.arange(total, device=rows.device) + torch.arange(
            1, min(self.durations, total) + 1, device=rows.device
        ).unsqueeze(1)  # (D, T)
        return end <= rows[:, None, None]

    # ---- loss ----------------------------------------------------------------------------------------------------
    def loss(self, outputs: BMNOutputs, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """The weighted terms ``start``, ``end``, ``iou_regression``, ``iou_class``, balanced over the whole batch."""
        total, device = outputs.start.shape[1], outputs.start.device
        real = torch.arange(total, device=device) < outputs.rows[:, None]  # (B, T)
        grid = proposal_grid(total, self.durations).to(device)  # (N, 2)
        valid = grid[:, 1] <= outputs.rows[:, None]  # (B, N)
        starts, ends, tiou = [], [], []
        for target, rows in zip(targets, outputs.rows, strict=True):
            segments, _ = truths_within(target, torch.stack((torch.zeros_like(rows), rows)).to(grid))  # (G, 2)
            starts.append(boundary_targets(segments[:, 0], total, region_rows=self.boundary_rows))
            ends.append(boundary_targets(segments[:, 1], total, region_rows=self.boundary_rows))
            tiou.append(tiou_targets(grid, segments))
        wanted = torch.stack(tiou)[valid]  # (M,) of all proposals in the batch that are real
        by_class = _float(map_to_cells(outputs.iou_class)[valid])
        by_regression = _float(map_to_cells(outputs.iou_regression)[valid]).sigmoid()
        square = balanced_l2(
            by_regression,
            wanted.to(by_regression),
            high=self.high_tiou,
            low=self.low_tiou,
            low_includes_zero=self.low_includes_zero,
        )
        entropy = balanced_cross_entropy(by_class, wanted > self.positive_tiou)
        return {
            "start": self.temporal_weight
            * balanced_cross_entropy(_float(outputs.start[real]), torch.stack(starts)[real] > 0.5),
            "end": self.temporal_weight
            * balanced_cross_entropy(_float(outputs.end[real]), torch.stack(ends)[real] > 0.5),
            "iou_regression": self.regression_weight * square,
            "iou_class": self.classification_weight * entropy,
        }

    # ---- decode --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def dense(self, outputs: BMNOutputs, batch: Batch) -> list[dict[str, Tensor]]:
        """Probabilities of each sample, float32, cut to its T rows and min(D, T) durations.

        ``iou_class`` and ``iou_regression`` (D, T), 0 where a proposal would end behind row T; ``start``, ``end`` (T,).
        """
        found = []
        valid = self._valid(outputs.rows, outputs.start.shape[1])  # (B, D, T)
        for i, rows in enumerate(outputs.rows.tolist()):
            maps = {
                name: getattr(outputs, name)[i, : min(rows, self.durations), :rows].float().sigmoid()
                * valid[i, : min(rows, self.durations), :rows]
                for name in ("iou_class", "iou_regression")
            }
            vectors = {name: getattr(outputs, name)[i, :rows].float().sigmoid() for name in ("start", "end")}
            found.append({**maps, **vectors})
        return found

    @torch.no_grad()
    def decode_dense(self, maps: dict[str, Tensor], *, video: str, axis: TimeAxis, duration_s: float) -> Segments:
        """The proposals of one sample's :meth:`dense` maps, in seconds inside ``[0, duration_s]``, best first.

        ``extra`` has the four estimates of each. Raises :class:`WeightsError` where one of the maps is not finite.
        """
        check_finite(video, *maps.values())
        rows = maps["start"].shape[0]
        grid = proposal_grid(rows, maps["iou_class"].shape[0]).to(maps["start"].device).double()  # (N, 2)
        first, last = grid[:, 0].long(), grid[:, 1].long() - 1  # rows of each proposal
        estimates = {
            "start": maps["start"][first],
            "end": maps["end"][last],
            "iou_class": map_to_cells(maps["iou_class"]),
            "iou_regression": map_to_cells(maps["iou_regression"]),
        }  # (N,) each
        seconds = clip_segments(axis.to_seconds(grid), 0.0, duration_s)
        candidate = seconds[:, 1] > seconds[:, 0]
        if self.score == "product":
            scores = estimates["start"] * estimates["end"] * estimates["iou_class"] * estimates["iou_regression"]
            starts, ends = _peaks(maps["start"]), _peaks(maps["end"])
            starts[0], ends[-1] = True, True
            candidate &= starts[first] & ends[last]
        else:
            scores = estimates["iou_class"] ** self.pem_power * estimates["iou_regression"]
        which = torch.nonzero(candidate).squeeze(1)
        best = which[scores[which].argsort(descending=True, stable=True)][: self.max_detections]
        extra = {name: value[best] for name, value in estimates.items()}
        return Segments(video, seconds[best], torch.zeros_like(best), scores[best], extra, duration_s)

    def decode(self, outputs: BMNOutputs, batch: Batch) -> list[Segments]:
        """Of each sample, :meth:`decode_dense` of its :meth:`dense` maps."""
        found = zip(self.dense(outputs, batch), batch.videos, batch.axes, batch.durations_s, strict=True)
        return [self.decode_dense(m, video=v, axis=a, duration_s=d) for m, v, a, d in found]


def _peaks(probability: Tensor) -> Tensor:
    """(T,) bool: above both neighbours, or above half of the highest (Lin et al., inference)."""
    peak = probability > 0.5 * probability.max()
    inner = probability[1:-1]
    peak[1:-1] |= (inner > probability[:-2]) & (inner > probability[2:])
    return peak


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
