"""TAL-MTS and AFSD: anchor-free detection on a pyramid of multiple temporal scales, coarse to fine.

TAL-MTS: "Temporal Action Localization with Multi-temporal Scales" (equations and sections below are its). AFSD: Lin et
al., "Learning Salient Boundary Feature for Anchor-free Temporal Action Localization", 2021: the same without RFP, STT
and FSA. ``docs/talmts.md`` says which switch gives which row of the tables, and what the paper leaves open.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from tad.detect.detectors.common import (
    check_choice,
    check_finite,
    check_numbers,
    extents,
    segments_in_seconds,
    truths_within,
)
from tad.detect.detectors.talmts_frames import FrameSelfAttention, SpatialTemporalTransformer
from tad.detect.detectors.talmts_inputs import (
    Bounds,
    frame_shape,
    level_bounds,
    level_shapes,
    mask_of,
    stored_shapes,
    streams_read,
)
from tad.detect.detectors.talmts_layers import Interpolation, Levels
from tad.detect.detectors.talmts_losses import (
    QualityOver,
    RefineLoss,
    assign,
    boundary_loss,
    detection_losses,
    refined_segments,
)
from tad.detect.detectors.talmts_network import Coarse, Refined, StreamNetwork, coarse_segments
from tad.detect.interface import Batch, Detector, LevelSpec, Segments, Targets
from tad.errors import RecipeError

Fusion = Literal["rgb", "flow", "late"]
BoundaryFusion = Literal["mean", "sqrt"]
Layout = Literal["windowed", "rescaled"]
LEVEL_BOUNDARY_SHARE = 0.1  # weight of level 0 in AFSD's supervision of boundaries
LEAST_FRAMES, LEAST_ROWS = 2.0, 1.0  # the narrowest region round a boundary there, on frames and on level 0
AUTO_ROWS = (64, 1024)  # what `rows: auto` may become


@dataclass
class TALMTSOutputs:
    """What :meth:`TALMTS.forward` gives, for S predictions of N places; segments in rows of level 0."""

    levels: Levels  # where the places are
    extent: Tensor  # (B, 2) what the sample's rows look at, inside the video
    distances: Tensor  # (S, B, N, 2) logarithms, in rows of each place's level
    logits: Tensor  # (S, B, N, K + 1), background first
    offsets: Tensor  # (S, B, N, 2) in halves of the coarse length
    refined_logits: Tensor  # (S, B, N, K + 1)
    quality: Tensor  # (S, B, N) logits
    stages: list[tuple[Coarse, Refined]]  # of every stream


class TALMTS(Detector):
    """TAL-MTS on stored features: a place of every level predicts an action round itself, then refines it.

    Parameters
    ----------
    channels : stream → width of its rows, in the recipe's order; those named in ``frames`` are not streams of features.
    classes : K.
    levels : the stored levels, fine to coarse, each with half the resolution of the one before.
    level_channels : level → channels of its rows, or (channels, height, width) of its maps (I3D's Mixed_4f and
        Mixed_5c: ``{s4-map: [832, 6, 6], s8-map: [1024, 3, 3]}``); None: they are rows, as wide as ``channels`` says.
        :meth:`resolve_shapes` fills in what the store has, as it does for ``frame_size``.
    pyramid_levels : of the pyramid; those beyond the stored ones follow by convolutions of stride 2.
    rows : of the finest level in a clip. :meth:`resolve` replaces ``auto`` by a number that fits the training actions.
    layout : ``windowed``: overlapping clips of a video; ``rescaled``: the whole video squeezed into one clip.
    fusion : ``late``: one network a stream, averaged; ``rgb`` and ``flow``: of two streams the first or second alone.
    fused_training : False: every stream's network learns for itself, as if trained alone; True: their average does.
    boundary_fusion : ``mean``: logarithmic distances and offsets are averaged; ``sqrt``: each stream's final
        boundaries, in rows from the beginning of the clip, by their geometric mean (ActivityNet).
    rfp, stt, fsa : the three modules (Tab. VI).
    frames : the stream of frames that STT and FSA read, or of each feature stream its own: ``{i3d-flow: flow-frames}``.
    frame_size : height and width of the frames. frame_factor : frames a row of the finest level; without frames, how
        much denser than that the frame-level feature is.
    stt_patch, fsa_patch : side of their patches in pixels (Fig. 4). transformer_width, transformer_heads : of both.
    transformer_residual : add each encoder's input to its output, which Eq. 1 and 5 do not.
    width : C'. norm_groups : of the group norms; divides ``width``. row_kernel : of the first convolutions in time.
    tower_convs : convolutions of Eq. 3.
    rfp_interpolation, frame_interpolation : how RFP and the frame-level feature interpolate.
    bounds : (low, high) for every level, in rows of the finest level: which distances of the farther end it learns;
        ``activitynet`` those of AFSD; None: any.
    focal_alpha : weight of actions in the focal loss, that of background being 1 - alpha. focal_gamma : of it.
    refine_tiou : of a coarse segment from which on it is refined. refine_loss, quality_over : of Eq. 11 and 12.
    localisation_weight, quality_weight : alpha and beta of Eq. 7.
    boundary_weight : of AFSD's supervision of the pooled features, which Eq. 7 does not have.
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
        level_channels: Mapping[str, int | Sequence[int]] | None = None,
        pyramid_levels: int = 6,
        rows: int | Literal["auto"] = 64,
        layout: Layout = "windowed",
        fusion: Fusion = "late",
        fused_training: bool = False,
        boundary_fusion: BoundaryFusion = "mean",
        rfp: bool = True,
        stt: bool = True,
        fsa: bool = True,
        frames: str | Mapping[str, str] | None = None,
        frame_size: Sequence[int] = (96, 96),
        frame_factor: int = 4,
        stt_patch: int = 24,
        fsa_patch: int = 24,
        transformer_width: int = 256,
        transformer_heads: int = 8,
        transformer_residual: bool = False,
        width: int = 512,
        norm_groups: int = 32,
        row_kernel: int = 1,
        tower_convs: int = 2,
        rfp_interpolation: Interpolation = "nearest",
        frame_interpolation: Interpolation = "linear",
        bounds: Bounds | Literal["activitynet"] | None = None,
        focal_alpha: float = 0.75,
        focal_gamma: float = 2.0,
        refine_tiou: float = 0.5,
        refine_loss: RefineLoss = "smooth_l1",
        quality_over: QualityOver = "refined",
        localisation_weight: float = 10.0,
        quality_weight: float = 1.0,
        boundary_weight: float = 0.0,
        max_detections: int = 2000,
    ) -> None:
        super().__init__()
        check_choice("layout", layout, get_args(Layout))
        check_choice("fusion", fusion, get_args(Fusion))
        check_choice("boundary_fusion", boundary_fusion, get_args(BoundaryFusion))
        check_choice("rfp_interpolation", rfp_interpolation, get_args(Interpolation))
        check_choice("frame_interpolation", frame_interpolation, get_args(Interpolation))
        check_choice("refine_loss", refine_loss, get_args(RefineLoss))
        check_choice("quality_over", quality_over, get_args(QualityOver))
        if isinstance(rows, str):
            raise RecipeError(f"rows '{rows}' is no number; 'auto' is filled in by resolve(model, lengths_rows)")
        check_numbers(
            1,
            math.inf,
            classes=classes,
            rows=rows,
            frame_factor=frame_factor,
            stt_patch=stt_patch,
            fsa_patch=fsa_patch,
            transformer_width=transformer_width,
            transformer_heads=transformer_heads,
            width=width,
            norm_groups=norm_groups,
            row_kernel=row_kernel,
            tower_convs=tower_convs,
            max_detections=max_detections,
        )
        check_numbers(1, 16, pyramid_levels=pyramid_levels)
        check_numbers(0.0, 1.0, focal_alpha=focal_alpha, refine_tiou=refine_tiou)
        check_numbers(
            0.0,
            math.inf,
            focal_gamma=focal_gamma,
            localisation_weight=localisation_weight,
            quality_weight=quality_weight,
            boundary_weight=boundary_weight,
        )
        for name, value, divisor in (
            ("width", width, norm_groups),
            ("width", width, 2),
            ("transformer_width", transformer_width, transformer_heads),
            ("row_kernel", row_kernel + 1, 2),
        ):
            if value % divisor:
                wanted = "odd" if name == "row_kernel" else f"a multiple of {divisor}"
                raise RecipeError(f"{name} must be {wanted}, got {row_kernel if name == 'row_kernel' else value}")

        streams, frame_streams = streams_read(channels, fusion, frames)
        read = [name for name in frame_streams if name is not None] if stt or fsa else []
        if (stt or fsa) and len(read) < len(streams):
            raise RecipeError(
                "stt and fsa read frames: add a stream of them to streams and name it in frames, for every stream of "
                "features that is read; or set stt: false and fsa: false"
            )
        size, bound = frame_shape(frame_size), level_bounds(bounds, pyramid_levels, rows)
        shapes = level_shapes(levels, level_channels, 1)
        names, maps = list(shapes), {name: shape if len(shape) > 1 else None for name, shape in shapes.items()}
        coarsest = 2 ** (len(names) - 1)
        if pyramid_levels < len(names):
            raise RecipeError(f"pyramid_levels={pyramid_levels} is less than the {len(names)} levels that are read")
        if rows % coarsest or rows < 2 ** (pyramid_levels - 1):
            raise RecipeError(
                f"rows={rows} must be at least {2 ** (pyramid_levels - 1)}, so that each of {pyramid_levels} levels "
                f"has one, and a multiple of {coarsest} for {len(names)} stored levels"
            )
        needs = [
            LevelSpec(stream, name, layout, rows >> k, maps[name]) for k, name in enumerate(names) for stream in streams
        ]
        needs += [
            LevelSpec(name, "features", layout, rows * frame_factor, (channels[name], *size))
            for name in dict.fromkeys(read)
        ]
        self.needs = tuple(needs)
        self.keys = [[LevelSpec(stream, name).key for name in names] for stream in streams]
        self.frame_keys: list[str | None] = [*read] or [None] * len(streams)
        self.classes, self.frame_factor = classes, frame_factor
        self.fused_training, self.boundary_fusion = fused_training, boundary_fusion
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        self.refine_tiou, self.refine_loss, self.quality_over = refine_tiou, refine_loss, quality_over
        self.localisation_weight, self.quality_weight = localisation_weight, quality_weight
        self.boundary_weight, self.max_detections = boundary_weight, max_detections
        self.bounds: Tensor | None
        self.register_buffer("bounds", bound, persistent=False)
        self.networks = nn.ModuleList()
        for stream, frame_key in zip(streams, self.frame_keys, strict=True):
            down = {"frames": rows * frame_factor, "factor": frame_factor, "levels": pyramid_levels}
            encoder: dict[str, Any] = {
                "channels": channels[frame_key] if frame_key else 0,
                "size": size,
                "hidden": transformer_width,
                "heads": transformer_heads,
                "width": width,
                "residual": transformer_residual,
            }
            self.networks.append(
                StreamNetwork(
                    shapes=list(level_shapes(levels, level_channels, channels[stream]).values()),
                    classes=classes,
                    width=width,
                    levels=pyramid_levels,
                    groups=norm_groups,
                    row_kernel=row_kernel,
                    tower_convs=tower_convs,
                    rfp=rfp,
                    rfp_mode=rfp_interpolation,
                    frame_factor=frame_factor,
                    frame_mode=frame_interpolation,
                    stt=SpatialTemporalTransformer(patch=stt_patch, groups=norm_groups, **{**down, **encoder})
                    if stt
                    else None,
                    fsa=FrameSelfAttention(patch=fsa_patch, **encoder) if fsa else None,
                )
            )

    @classmethod
    def resolve(cls, model: dict[str, Any], lengths_rows: np.ndarray) -> dict[str, Any]:
        """``model`` (this class's keywords as in a recipe) with ``rows: auto`` replaced by a number.

        A clip is as long as 98 % of the training actions, rounded up to a power of two. ``lengths_rows`` (N,) are their
        lengths in rows of the stream itself. Raises :class:`RecipeError` for other levels, whose rows are not these.
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
        """``model`` with ``level_channels`` and ``frame_size`` as ``stored`` (stream → level → shape of a row) has
        them, where they are not given and all streams agree; what is wrong is left for the constructor to refuse.
        """
        return model | {key: value for key, value in stored_shapes(model, stored).items() if model.get(key) is None}

    # ---- forward -------------------------------------------------------------------------------------------------
    def forward(self, batch: Batch) -> TALMTSOutputs:
        """Both stages of every stream's network, for every clip of the batch."""
        coarse = [self._coarse(batch, *part) for part in self._parts()]
        levels = coarse[0].levels
        distances = torch.stack([c.distances for c in coarse])  # (S, B, N, 2)
        logits = torch.stack([c.logits for c in coarse])
        if self.fused_training:
            distances, logits = distances.mean(0, keepdim=True), logits.mean(0, keepdim=True)
        around = coarse_segments(distances.detach(), levels).expand(len(coarse), -1, -1, -1)
        refined = [
            network.refine(c, segments)
            for (network, *_), c, segments in zip(self._parts(), coarse, around, strict=True)
        ]
        offsets, names, quality = (
            torch.stack(part) for part in zip(*[(r.offsets, r.logits, r.quality) for r in refined], strict=True)
        )
        if self.fused_training:
            offsets, names, quality = (part.mean(0, keepdim=True) for part in (offsets, names, quality))
        extent = extents(batch).to(distances)
        stages = list(zip(coarse, refined, strict=True))
        return TALMTSOutputs(levels, extent, distances, logits, offsets, names, quality, stages)

    def _parts(self) -> list[tuple[StreamNetwork, list[str], str | None]]:
        networks = [network for network in self.networks if isinstance(network, StreamNetwork)]
        return list(zip(networks, self.keys, self.frame_keys, strict=True))

    @staticmethod
    def _coarse(batch: Batch, network: StreamNetwork, keys: list[str], frame_key: str | None) -> Coarse:
        stored = [batch.features[key] for key in keys]
        masks = [mask_of(batch, key, x.shape[2]) for key, x in zip(keys, stored, strict=True)]
        if frame_key is None:
            return network.coarse(stored, masks, None, None)
        frames = batch.features[frame_key]
        return network.coarse(stored, masks, frames, mask_of(batch, frame_key, frames.shape[2]))

    # ---- loss ----------------------------------------------------------------------------------------------------
    def loss(self, outputs: TALMTSOutputs, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """The terms of Eq. 7, weighted, each the sum over the streams' networks, so that these learn as if alone.

        Sums over the places of a batch, divided by how many are positive. Two classes on one segment take turns: each
        place draws one of them in each step.
        """
        levels = outputs.levels
        found = [truths_within(target, extent) for target, extent in zip(targets, outputs.extent, strict=True)]
        bounds = None
        if self.bounds is not None:
            bounds = self.bounds[levels.strides.log2().long()].to(outputs.distances)  # (N, 2)
        centers = levels.centers.to(outputs.distances)
        assigned = [assign(centers, *truth, bounds=bounds, draw=self.training) for truth in found]
        classes, truths = (torch.stack(part) for part in zip(*assigned, strict=True))  # (B, N), (B, N, 2)
        segments = coarse_segments(outputs.distances, levels)
        each = [
            detection_losses(
                segments=segments[s],
                logits=outputs.logits[s],
                offsets=outputs.offsets[s],
                refined_logits=outputs.refined_logits[s],
                quality=outputs.quality[s],
                valid=levels.mask,
                classes=classes,
                truths=truths,
                alpha=self.focal_alpha,
                gamma=self.focal_gamma,
                refine_tiou=self.refine_tiou,
                refine_loss=self.refine_loss,
                quality_over=self.quality_over,
            )
            for s in range(len(segments))
        ]
        weights = {
            "localisation": self.localisation_weight,
            "refined_localisation": self.localisation_weight,
            "quality": self.quality_weight,
        }
        terms = {name: weights.get(name, 1.0) * torch.stack([t[name] for t in each]).sum() for name in each[0]}
        if self.boundary_weight > 0:
            terms["boundaries"] = self.boundary_weight * self._boundaries(outputs, [truth[0] for truth in found])
        return terms

    def _boundaries(self, outputs: TALMTSOutputs, truths: Sequence[Tensor]) -> Tensor:
        """AFSD's supervision of what is pooled: the frame-level feature, and with a tenth of its weight level 0."""
        total = outputs.distances.new_zeros(())
        first = outputs.levels.mask[:, : outputs.levels.lengths[0]]  # (B, T)
        frame_mask = first.repeat_interleave(self.frame_factor, 1)
        for coarse, refined in outputs.stages:
            total = total + boundary_loss(
                coarse.frames, frame_mask, truths, scale=self.frame_factor, least=LEAST_FRAMES
            )
            for sides in refined.sides:
                rows = sides[..., : first.shape[1]]
                total = total + LEVEL_BOUNDARY_SHARE * boundary_loss(rows, first, truths, scale=1, least=LEAST_ROWS)
        return total

    # ---- decode --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def decode(self, outputs: TALMTSOutputs, batch: Batch) -> list[Segments]:
        """Eq. 13: every place with every class; the streams averaged before exponential, softmax and sigmoid.

        Raises :class:`WeightsError` where the outputs are not finite.
        """
        segments, scores = self._final(outputs)  # (B, N, 2), (B, N, K)
        labels = torch.arange(self.classes, device=scores.device).expand(scores.shape[1:])  # (N, K)
        found = []
        for i, video in enumerate(batch.videos):
            real = outputs.levels.mask[i]
            places, points = segments[i, real], scores[i, real]
            check_finite(video, places, points)
            flat = places[:, None].expand(*points.shape, 2).flatten(0, 1), labels[real].flatten(), points.flatten()
            found.append(segments_in_seconds(batch, i, outputs.extent[i], *flat, limit=self.max_detections))
        return found

    def _final(self, outputs: TALMTSOutputs) -> tuple[Tensor, Tensor]:
        """Segments (B, N, 2) and scores (B, N, K) of the streams together."""
        if self.boundary_fusion == "sqrt":
            each = refined_segments(coarse_segments(outputs.distances, outputs.levels), outputs.offsets)
            segments = each.clamp(min=0.0).prod(0) ** (1.0 / len(each))
        else:
            coarse = coarse_segments(outputs.distances.mean(0), outputs.levels)
            segments = refined_segments(coarse, outputs.offsets.mean(0))
        classes = outputs.logits.mean(0).softmax(-1) + outputs.refined_logits.mean(0).softmax(-1)
        return segments, 0.5 * classes[..., 1:] * outputs.quality.mean(0).sigmoid()[..., None]


# Where AFSD differs from TAL-MTS; all else is the same.
AFSD_DEFAULTS: dict[str, Any] = {
    "rfp": False,
    "stt": False,
    "fsa": False,
    "frame_interpolation": "nearest",
    "refine_loss": "l1",
    "quality_over": "coarse",
    "boundary_weight": 1.0,
}


def _with_defaults(signature: inspect.Signature, defaults: Mapping[str, Any]) -> inspect.Signature:
    parameters = signature.parameters.items()
    return signature.replace(parameters=[p.replace(default=defaults.get(name, p.default)) for name, p in parameters])


class AFSD(TALMTS):
    """AFSD, the baseline: TAL-MTS with the defaults of :data:`AFSD_DEFAULTS`, without its three modules.

    Its contrastive loss, which needs clips edited on purpose, is left out.
    """

    # What build_detector and recipes read: every keyword of TAL-MTS, with the defaults that hold here.
    __signature__: ClassVar[inspect.Signature] = _with_defaults(inspect.signature(TALMTS), AFSD_DEFAULTS)

    def __init__(self, *, channels: dict[str, int], classes: int, **model: Any) -> None:
        super().__init__(channels=channels, classes=classes, **{**AFSD_DEFAULTS, **model})
