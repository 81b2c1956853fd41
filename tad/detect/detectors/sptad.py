"""SP-TAD: sparse proposals on a temporal feature pyramid.

Wu et al., "Towards High-Quality Temporal Action Detection with Sparse Proposals", 2021. ``docs/sptad.md`` says which
switch gives which row of its tables, and what the paper leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tad.detect.detectors.common import (
    check_choice,
    check_finite,
    check_names,
    check_numbers,
    extents,
    segments_in_seconds,
    truths_within,
)
from tad.detect.detectors.sptad_layers import DetectionHead, Further, PyramidTable, TemporalPyramid
from tad.detect.detectors.sptad_losses import set_loss
from tad.detect.detectors.talmts_inputs import stored_shapes
from tad.detect.interface import Batch, Detector, LevelSpec, Segments, Targets
from tad.detect.segments import from_center_length
from tad.errors import RecipeError

Pyramid = Literal["inter", "high", "single"]
Layout = Literal["windowed", "rescaled"]
SPREAD = (1 / 32, 1 / 2)  # lengths of the proposals before training, in clips
GOLDEN = 0.5 * (math.sqrt(5) - 1)
AUTO_ROWS = (32, 1024)  # what `rows: auto` may become


@dataclass
class SPTADOutputs:
    """What :meth:`SPTAD.forward` gives, for H heads of N proposals; segments in row edges of the first level."""

    logits: Tensor  # (H, B, N, K)
    segments: Tensor  # (H, B, N, 2)
    action: Tensor | None  # (B, K) logits of the classes of the whole clip
    extent: Tensor  # (B, 2) what the sample's rows look at, inside the video


class SPTAD(Detector):
    """SP-TAD on stored features (§3.1): a fixed number of learnt proposals, refined head by head on a pyramid's levels.

    Parameters
    ----------
    channels : stream → width of its rows, in the recipe's order; the streams of a level are concatenated. classes : K.
    levels : of every stream, fine to coarse, each with half the resolution of the one before (I3D: s2, s4, s8).
    level_channels : level → width of its rows in each stream, for levels that are not as wide as ``channels`` says
        (I3D: 480, 832, 1024); :meth:`resolve_shapes` fills in what the store has.
    rows : of the finest level in a clip; every detection lies inside one clip. :meth:`resolve` replaces ``auto`` by a
        number that fits the training actions.
    layout : ``windowed``: overlapping clips of a video; ``rescaled``: the whole video squeezed into one clip.
    pyramid : ``inter``: on all levels; ``high``: on the coarsest alone; ``single``: the coarsest, without a pyramid
        (§4.4.2, Tab. 5).
    pyramid_levels : of ``inter`` and ``high``; those beyond the levels read follow the coarsest.
    further : how these are made, and ``lateral_kernel``: see :class:`TemporalPyramid`.
    proposals : N, more than a clip has actions.
    heads : how many refine the proposals one after the other (§4.4.3, Tab. 6).
    width : d, of the pyramid and the proposals' features; a multiple of ``attention_heads``.
    interaction_width : d_h, of the matrices of the sparse interaction.
    feedforward : hidden width of the heads' feed-forward networks. dropout : in them and in the attention.
    soi_points : T', rows that SoI align makes of a segment. eta : it is expanded by 1/eta of its length on both sides.
    action_head : predict the classes of the whole clip and multiply the scores by them (§3.1.4, §4.4.4, Tab. 7).
    cost_class, cost_l1, cost_giou : weights of the matching; class_weight, l1_weight, giou_weight, action_weight : of
        the loss (Eq. 2). focal_alpha, focal_gamma : of the focal loss, in both.
    max_detections : of a clip, best first, that :meth:`decode` gives.

    Raises
    ------
    RecipeError : values that do not fit together.
    """

    def __init__(
        self,
        *,
        channels: dict[str, int],
        classes: int,
        levels: Sequence[str] = ("features",),
        level_channels: Mapping[str, int] | None = None,
        rows: int | Literal["auto"] = 128,
        layout: Layout = "windowed",
        pyramid: Pyramid = "inter",
        pyramid_levels: int = 4,
        further: Further = "max",
        lateral_kernel: int = 1,
        proposals: int = 50,
        heads: int = 4,
        width: int = 256,
        interaction_width: int = 64,
        attention_heads: int = 8,
        feedforward: int = 2048,
        dropout: float = 0.0,
        soi_points: int = 16,
        eta: float = 5.0,
        action_head: bool = True,
        cost_class: float = 2.0,
        cost_l1: float = 5.0,
        cost_giou: float = 2.0,
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        action_weight: float = 1.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        max_detections: int = 1000,
    ) -> None:
        super().__init__()
        check_choice("layout", layout, get_args(Layout))
        check_choice("pyramid", pyramid, get_args(Pyramid))
        check_choice("further", further, get_args(Further))
        if isinstance(rows, str):
            raise RecipeError(f"rows '{rows}' is no number; 'auto' is filled in by SPTAD.resolve(model, lengths_rows)")
        check_numbers(
            1,
            math.inf,
            classes=classes,
            rows=rows,
            pyramid_levels=pyramid_levels,
            lateral_kernel=lateral_kernel,
            proposals=proposals,
            heads=heads,
            width=width,
            interaction_width=interaction_width,
            attention_heads=attention_heads,
            feedforward=feedforward,
            soi_points=soi_points,
            max_detections=max_detections,
        )
        check_numbers(0.0, 1.0, dropout=dropout, focal_alpha=focal_alpha)
        check_numbers(
            0.0,
            math.inf,
            cost_class=cost_class,
            cost_l1=cost_l1,
            cost_giou=cost_giou,
            class_weight=class_weight,
            l1_weight=l1_weight,
            giou_weight=giou_weight,
            action_weight=action_weight,
            focal_gamma=focal_gamma,
        )
        check_numbers(1e-3, math.inf, eta=eta)
        read = _levels_read(channels, levels, rows, pyramid)
        self.needs = tuple(LevelSpec(stream, level, layout, count) for level, count in read for stream in channels)
        self.keys = [[LevelSpec(stream, level).key for stream in channels] for level, _ in read]
        if pyramid == "single":
            pyramid_levels = 1
        if pyramid_levels < len(read):
            raise RecipeError(f"pyramid_levels={pyramid_levels} is less than the {len(read)} levels that are read")
        if lateral_kernel % 2 == 0:
            raise RecipeError(f"lateral_kernel must be odd, got {lateral_kernel}")
        if width % attention_heads:
            raise RecipeError(f"width {width} is not a multiple of attention_heads {attention_heads}")
        self.clip, self.pyramid_levels, self.classes = read[0][1], pyramid_levels, classes
        self.cost_weights = (cost_class, cost_l1, cost_giou)
        self.class_weight, self.l1_weight, self.giou_weight = class_weight, l1_weight, giou_weight
        self.action_weight, self.focal_alpha, self.focal_gamma = action_weight, focal_alpha, focal_gamma
        self.max_detections = max_detections
        self.widths = _widths(channels, [level for level, _ in read], levels, level_channels)
        self.pyramid = TemporalPyramid(
            channels=self.widths, width=width, levels=pyramid_levels, kernel=lateral_kernel, further=further
        )
        # Vectors, so that no weight decay draws them together.
        place = torch.arange(proposals) + 0.5
        low, high = map(math.log, SPREAD)
        self.centers = nn.Parameter(place / proposals)  # (N,) in clips
        self.log_lengths = nn.Parameter(low + (high - low) * (place * GOLDEN).frac())  # (N,) of lengths in clips
        self.features = nn.Parameter(torch.randn(proposals, width))  # (N, W)
        self.heads = nn.ModuleList(
            DetectionHead(
                width=width,
                hidden=interaction_width,
                points=soi_points,
                eta=eta,
                classes=classes,
                attention_heads=attention_heads,
                feedforward=feedforward,
                dropout=dropout,
            )
            for _ in range(heads)
        )
        self.action = nn.Linear(sum(self.widths), classes) if action_head else None

    @classmethod
    def resolve(cls, model: dict[str, Any], lengths_rows: np.ndarray) -> dict[str, Any]:
        """``model`` (this class's keywords as in a recipe) with ``rows: auto`` replaced by a number.

        The paper's rule (§4.1): a clip is as long as 98 % of the training actions, here rounded up to a power of two.
        ``lengths_rows`` (N,) are their lengths in rows of the stream itself. Raises :class:`RecipeError` for other
        levels, whose rows are not these.
        """
        if model.get("rows") != "auto":
            return dict(model)
        if model.get("levels", ["features"]) not in (["features"], ("features",)):
            raise RecipeError("rows 'auto' is for levels [features]; give the rows of the finest level in a clip")
        longest = float(np.quantile(lengths_rows, 0.98)) if len(lengths_rows) else 0.0
        power = 2 ** math.ceil(math.log2(max(longest, 1.0)))
        return {**model, "rows": int(min(max(power, AUTO_ROWS[0]), AUTO_ROWS[1]))}

    @classmethod
    def resolve_shapes(
        cls, model: dict[str, Any], stored: Mapping[str, Mapping[str, tuple[int, ...]]]
    ) -> dict[str, Any]:
        """``model`` with ``level_channels`` as ``stored`` (stream → level → shape of a row) has them, where they are
        not given and all streams agree; maps are left for the constructor to refuse.
        """
        widths = stored_shapes({"levels": model.get("levels", ["features"])}, stored).get("level_channels")
        if model.get("level_channels") is not None or not isinstance(widths, dict):
            return model
        return model | ({"level_channels": widths} if all(isinstance(w, int) for w in widths.values()) else {})

    # ---- forward -------------------------------------------------------------------------------------------------
    def forward(self, batch: Batch) -> SPTADOutputs:
        """All heads, for every clip of the batch."""
        masks = [batch.mask_of(keys[0]) for keys in self.keys]  # each (B, T_k)
        maps = [
            torch.cat([batch.features[key] for key in keys], 1).masked_fill(~mask[:, None], 0.0)
            for keys, mask in zip(self.keys, masks, strict=True)
        ]  # each (B, C, T_k)
        self._check_widths(maps)
        table = PyramidTable(*self.pyramid(maps, masks))
        count = len(batch)
        starts = from_center_length(self.centers, self.log_lengths.exp()) * self.clip  # (N, 2)
        segments = starts.expand(count, -1, -1)  # (B, N, 2)
        features = self.features.expand(count, -1, -1)  # (B, N, W)
        found = []
        for head in self.heads:
            features, refined, logits = head(features, segments, table, clip=self.clip, levels=self.pyramid_levels)
            found.append((logits.to(torch.promote_types(logits.dtype, torch.float32)), refined))
            segments = refined.detach()
        all_logits, all_segments = (torch.stack(part) for part in zip(*found, strict=True))
        action = None
        if self.action is not None:
            means = [x.sum(2) / mask.sum(1, keepdim=True).clamp(min=1) for x, mask in zip(maps, masks, strict=True)]
            action = self.action(torch.cat(means, 1)).to(all_logits.dtype)  # (B, K)
        return SPTADOutputs(all_logits, all_segments, action, extents(batch).to(all_segments))

    def _check_widths(self, maps: Sequence[Tensor]) -> None:
        for keys, x, width in zip(self.keys, maps, self.widths, strict=True):
            if x.shape[1] != width:
                raise RecipeError(
                    f"{' and '.join(keys)} have {x.shape[1]} channels together, but sptad was built for {width}: "
                    "say in model.level_channels how wide each level is in one stream"
                )

    # ---- loss ----------------------------------------------------------------------------------------------------
    def loss(self, outputs: SPTADOutputs, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """The terms of Eq. 2, weighted: those of the last head, ``auxiliary`` the sum of all others', and ``action``.

        The set prediction loss is a mean over the truths of the batch, the action loss over clips and classes.
        """
        truths = [truths_within(target, extent) for target, extent in zip(targets, outputs.extent, strict=True)]
        named, l1, giou = set_loss(
            outputs.logits,
            outputs.segments / self.clip,
            [(segments / self.clip, labels) for segments, labels in truths],
            cost_weights=self.cost_weights,
            alpha=self.focal_alpha,
            gamma=self.focal_gamma,
        )
        terms = {
            "classification": self.class_weight * named,
            "l1": self.l1_weight * l1,
            "giou": self.giou_weight * giou,
        }  # each (H,)
        result = {name: term[-1] for name, term in terms.items()}
        if len(self.heads) > 1:
            result["auxiliary"] = torch.stack(list(terms.values()))[:, :-1].sum()
        if outputs.action is not None:
            present = torch.zeros_like(outputs.action)
            for row, (_, labels) in zip(present, truths, strict=True):
                row[labels] = 1.0
            result["action"] = self.action_weight * F.binary_cross_entropy_with_logits(outputs.action, present)
        return result

    # ---- decode --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def decode(self, outputs: SPTADOutputs, batch: Batch) -> list[Segments]:
        """Every proposal of the last head with every class (§3.2.2), its probability times that of the clip's class.

        Raises :class:`WeightsError` where the outputs are not finite.
        """
        scores, segments = outputs.logits[-1].sigmoid(), outputs.segments[-1]  # (B, N, K), (B, N, 2)
        if outputs.action is not None:
            scores = scores * outputs.action.sigmoid()[:, None]
        labels = torch.arange(self.classes, device=scores.device).expand(scores.shape[1:])  # (N, K)
        segments = segments[:, :, None].expand(*scores.shape, 2)  # (B, N, K, 2)
        found = []
        for i, video in enumerate(batch.videos):
            check_finite(video, scores[i], segments[i])
            flat = segments[i].flatten(0, 1), labels.flatten(), scores[i].flatten()
            found.append(segments_in_seconds(batch, i, outputs.extent[i], *flat, limit=self.max_detections))
        return found


def _levels_read(channels: dict[str, int], levels: Sequence[str], rows: int, pyramid: str) -> list[tuple[str, int]]:
    """The levels that ``pyramid`` reads, fine to coarse, and their rows in a clip."""
    if not channels:
        raise RecipeError("sptad needs at least one stream")
    check_names("levels", levels, such_as="[s2, s4, s8]")
    coarsest = 2 ** (len(levels) - 1)
    if rows % coarsest:
        raise RecipeError(
            f"rows={rows} must be a multiple of {coarsest}: the coarsest of {len(levels)} levels has less"
        )
    counted = [(level, rows >> k) for k, level in enumerate(levels)]
    return counted if pyramid == "inter" else counted[-1:]


def _widths(
    channels: dict[str, int], read: Sequence[str], levels: Sequence[str], level_channels: Mapping[str, int] | None
) -> list[int]:
    """Channels of every level that is read, all streams together."""
    if level_channels is None:
        return [sum(channels.values())] * len(read)
    if not isinstance(level_channels, Mapping) or set(level_channels) != set(levels):
        raise RecipeError(f"level_channels must give a width for each of {', '.join(levels)}, got {level_channels!r}")
    check_numbers(1, math.inf, **{f"level_channels.{level}": width for level, width in level_channels.items()})
    return [len(channels) * level_channels[level] for level in read]
