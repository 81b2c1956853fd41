"""A stream to extract: the recipe with every default filled in, the backbone behind it, and what the store records
of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tad._version import __version__
from tad.errors import RecipeError, WeightsError, did_you_mean
from tad.extract.backbones import BACKBONES, GROUPS, build_backbone
from tad.extract.backbones.base import Backbone, BackboneSpec
from tad.extract.flow import BOUND, FlowEstimator, build_flow
from tad.extract.maps import as_half, map_name, maps_of
from tad.extract.published import of_backbone, split_name
from tad.extract.raw import RAW, RawFrames, check_raw
from tad.extract.snippets import SnippetPlan
from tad.extract.video import Geometry
from tad.recipe import ExtractRecipe
from tad.training.distributed import pick_device
from tad.training.precision import autocast

# Raised whenever the same recipe would give other numbers than before; it is part of the fingerprint, the version of
# tad is not,
# so that an upgrade which changes nothing does not orphan a store.
EXTRACTOR = 1


@dataclass(frozen=True)
class Stream:
    """What one run extracts under one name."""

    name: str
    recipe: ExtractRecipe
    backbone: Backbone
    plan: SnippetPlan
    geometry: Geometry
    fps: float | None
    flow: FlowEstimator | None
    levels: dict[str, int]  # stage output, averaged over space -> frames a position
    maps: dict[str, int]  # stage output, kept with height and width -> frames a position
    spec: dict[str, Any]
    info: dict[str, Any]
    device: torch.device

    @property
    def raw(self) -> bool:
        """Whether its rows are the frames themselves."""
        return isinstance(self.backbone, RawFrames)

    @property
    def sequences(self) -> dict[str, int]:
        """Levels beside ``features`` under the names that the store has for them -> frames a position."""
        return self.levels | {map_name(level): stride for level, stride in self.maps.items()}

    def run(self, windows: Tensor) -> dict[str, Tensor]:
        """uint8 windows (B, T, H, W, C) → on the CPU ``features`` (B, D) and, if asked for, levels (B, C, T'), float32,
        and maps (B, C, T', H', W'), float16; of raw frames ``features`` (B, C, H, W), uint8.

        Raises
        ------
        TadError : a map has values that float16 cannot hold.
        """
        clips = self.backbone.normalise(windows.permute(0, 4, 1, 2, 3))  # (B, C, T, H, W)
        with autocast(clips.device, self.recipe.precision):
            outputs = self.backbone(clips, levels=bool(self.levels or self.maps))
        features = outputs["features"]
        rows = {"features": features if self.raw else features.float()}
        rows |= {level: outputs[level].float().mean(dim=(-2, -1)) for level in self.levels}  # (B, C, T')
        rows |= {map_name(level): as_half(outputs[level], where=f"{self.name}: {level}") for level in self.maps}
        return {name: value.cpu() for name, value in rows.items()}


def expand(backbones: Sequence[str]) -> list[str]:
    """Backbone names with groups (``i3d`` = ``i3d-rgb`` and ``i3d-flow``) spelt out; raw frames are named like them."""
    names: list[str] = []
    for name in backbones:
        members = GROUPS.get(name, (name,))
        for member in members:
            if member not in BACKBONES and member not in RAW:
                raise RecipeError(f"unknown backbone '{member}'.{did_you_mean(member, [*BACKBONES, *GROUPS, *RAW])}")
        names.extend(member for member in members if member not in names)
    return names


def resolve(recipe: ExtractRecipe, *, name: str | None = None, device: torch.device | str = "cpu") -> Stream:
    """Fill a recipe's gaps from what the backbone declares, load the backbone onto ``device``, write down the spec.

    Raises
    ------
    RecipeError : a device that is not there, windows that do not fit the network or the levels, another size than the
    network admits, flow for an RGB network.
    WeightsError : no weights given, or a checkpoint that does not fit.
    """
    device = pick_device(device)
    if recipe.backbone in RAW:
        return _resolve_raw(recipe, name=name)
    if recipe.backbone not in BACKBONES:
        raise RecipeError(f"unknown backbone '{recipe.backbone}'.{did_you_mean(recipe.backbone, [*BACKBONES, *RAW])}")
    if recipe.weights is None:
        raise WeightsError(
            f"{recipe.backbone} has no weights: give a checkpoint with --weights FILE, published ones with "
            f"--weights {' or '.join(of_backbone(recipe.backbone)) or 'NAME (there are none of this network)'}, or say "
            "--weights random for features of an untrained network"
        )
    backbone = build_backbone(recipe.backbone, weights=recipe.weights, port=recipe.port).eval().fuse().to(device)
    spec = backbone.spec
    plan = SnippetPlan(recipe.window or spec.window, recipe.interval or spec.interval, recipe.stride or spec.stride)
    if plan.window < spec.min_frames:
        raise RecipeError(f"{spec.name} needs windows of at least {spec.min_frames} frames, got --window {plan.window}")
    backbone.interpolate_positions = recipe.interpolate_positions
    if not (spec.any_length or recipe.interpolate_positions) and plan.window != spec.frames:
        raise RecipeError(
            f"{spec.name} takes windows of {spec.frames} frames only, got --window {plan.window}; with "
            "--interpolate-positions its position embeddings are interpolated"
        )
    geometry = geometry_of(spec, recipe.short_side, recipe.crop, interpolate=recipe.interpolate_positions)
    fps = spec.grid_fps if recipe.fps is None else None if recipe.fps == "native" else recipe.fps
    if recipe.flow is not None and spec.modality == "rgb":
        raise RecipeError(f"--flow {recipe.flow}: {spec.name} reads RGB frames, not optical flow")
    levels = {level: info.stride for level, info in spec.levels.items()} if recipe.levels else {}
    if recipe.levels and not levels:
        raise RecipeError(f"{spec.name} has no stage outputs to store as levels")
    maps = maps_of(spec, recipe.maps)
    for level, stride in (levels | maps).items():
        plan.check_level(level, stride)
    flow = build_flow(recipe.flow or "dis") if spec.modality == "flow" else None
    crop = "full" if geometry.crop is None else list(geometry.crop)
    # what a stream does not have is left out, so that its fingerprint stays what it was before there was such a thing
    special: dict[str, Any] = {}
    if geometry.resize is not None:
        special["resize"] = list(geometry.resize)
    if recipe.interpolate_positions:
        special["positions"] = "interpolated"
    if spec.channel_order != "rgb":
        special["channel_order"] = spec.channel_order
    if maps:
        special["maps"] = maps
    described: dict[str, Any] = {
        "backbone": spec.name,
        "variant": backbone.variant,
        "weights": backbone.weights_id,
        "fps": fps,
        "window": plan.window,
        "interval": plan.interval,
        "stride": plan.stride,
        "short_side": geometry.short_side,
        "crop": crop,
        "flow": None if flow is None else {"name": flow.name, **flow.params},
        "levels": levels,
        "precision": recipe.precision,
        "preprocessing": {"value_range": list(spec.value_range), "mean": list(spec.mean), "std": list(spec.std)},
        "extractor": EXTRACTOR,
        **special,
    }
    info = {"weights_source": source_of(recipe.weights), "tad_version": __version__}
    return Stream(
        name or spec.name, recipe, backbone, plan, geometry, fps, flow, levels, maps, described, info, device,
    )  # fmt: skip


def _resolve_raw(recipe: ExtractRecipe, *, name: str | None) -> Stream:
    """The stream of the frames themselves; they stay on the CPU."""
    check_raw(recipe)
    spec = RAW[recipe.backbone]
    if recipe.flow is not None and spec.modality == "rgb":
        raise RecipeError(f"--flow {recipe.flow}: {spec.name} are RGB frames; flow-frames are optical flow")
    plan = SnippetPlan(spec.window, spec.interval, spec.stride)
    geometry = geometry_of(spec, recipe.short_side, recipe.crop)
    fps = None if recipe.fps == "native" else recipe.fps
    flow = build_flow(recipe.flow or "dis") if spec.modality == "flow" else None
    described: dict[str, Any] = {
        "backbone": spec.name,
        "weights": None,
        "fps": fps,
        "window": plan.window,
        "interval": plan.interval,
        "stride": plan.stride,
        "short_side": geometry.short_side,
        "crop": "full" if geometry.crop is None else list(geometry.crop),
        "flow": None if flow is None else {"name": flow.name, **flow.params},
        "channels": ["red", "green", "blue"] if flow is None else ["x", "y"],
        "value_range": [0.0, 255.0] if flow is None else [-BOUND, BOUND],  # what 0 and 255 stand for
        "extractor": EXTRACTOR,
    }
    info = {"weights_source": None, "tad_version": __version__}
    return Stream(
        name or spec.name, recipe, RawFrames(spec), plan, geometry, fps, flow, {}, {}, described, info,
        torch.device("cpu"),
    )  # fmt: skip


def source_of(weights: str) -> str:
    """How weights are found again from any folder: a seed, a published name, ``NAME=FILE`` or a file's full path."""
    published, file = split_name(weights)
    if (published is not None and file is None) or weights.partition(":")[0] == "random":
        return weights
    path = str((file or Path(weights)).expanduser().resolve())
    return path if published is None else f"{published}={path}"


def geometry_of(
    spec: BackboneSpec,
    short_side: int | None,
    crop: tuple[int, int] | Literal["full"] | None,
    *,
    interpolate: bool = False,
) -> Geometry:
    """Sizes for the frames of a backbone: what is asked for, else what it declares.

    A backbone that scales frames to an exact size (``spec.resize``) does so only where nothing else is asked for.
    Raises :class:`RecipeError` for another size than a network with fixed positions admits, unless ``interpolate``.
    """
    cut = None if crop == "full" else (crop or spec.crop)
    if not (spec.any_size or interpolate) and cut != spec.crop:
        raise RecipeError(
            f"{spec.name} takes frames of {spec.crop[0]}x{spec.crop[1]} only, got --crop "
            f"{'full' if cut is None else f'{cut[0]}x{cut[1]}'}; with --interpolate-positions its position embeddings "
            "are interpolated"
        )
    resize = spec.resize if short_side is None and crop is None else None
    return Geometry(short_side or spec.short_side, cut, resize)


def recipe_of(spec: dict[str, Any], *, weights: str | None) -> ExtractRecipe:
    """The recipe that makes a stream of this stored ``spec`` again; ``weights`` is where its checkpoint lies, which raw
    frames do not have.

    Raises
    ------
    RecipeError : the stream was imported, or made by a tad whose extraction gives other numbers.
    """
    if spec.get("imported"):
        raise RecipeError("the stream was imported from files, tad cannot extract it from a video")
    if spec.get("extractor") != EXTRACTOR:
        raise RecipeError(
            f"the stream was made by extractor {spec.get('extractor')}, this tad has {EXTRACTOR}: extract it again"
        )
    flow = spec["flow"]
    if spec["backbone"] in RAW:
        return ExtractRecipe(
            backbone=spec["backbone"],
            fps=spec["fps"] or "native",
            short_side=spec["short_side"],
            crop="full" if spec["crop"] == "full" else tuple(spec["crop"]),
            flow=None if flow is None else flow["name"],
        )
    return ExtractRecipe(
        backbone=spec["backbone"],
        weights=weights,
        window=spec["window"],
        interval=spec["interval"],
        stride=spec["stride"],
        fps=spec["fps"] or "native",
        short_side=None if "resize" in spec else spec["short_side"],
        crop=None if "resize" in spec else "full" if spec["crop"] == "full" else tuple(spec["crop"]),
        interpolate_positions=spec.get("positions") == "interpolated",
        flow=None if flow is None else flow["name"],
        levels=bool(spec["levels"]),
        maps=tuple(spec.get("maps", ())),
        precision=spec["precision"],
        port=spec["variant"],
    )
