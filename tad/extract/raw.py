"""Frames and flow themselves as streams: ``frames`` and ``flow-frames``, uint8, a row a frame of the grid, no weights.

Detectors that look at frames beside features (TAL-MTS) train from them without a video being decoded again. They stand
where a network stands in ``pipeline.py``, so that they share its pass over the video and its flow.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from tad.errors import RecipeError
from tad.extract.backbones.base import Backbone, BackboneSpec
from tad.recipe import ExtractRecipe

FRAMES = BackboneSpec(
    name="frames",
    modality="rgb",
    frames=1,
    interval=1,
    fps=None,
    short_side=112,
    crop=(96, 96),  # as TAL-MTS has them
    value_range=(0.0, 255.0),
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    width=3,
    window=1,
    stride=1,
)
FLOW_FRAMES = replace(FRAMES, name="flow-frames", modality="flow", mean=(0.0, 0.0), std=(1.0, 1.0), width=2)
RAW: dict[str, BackboneSpec] = {spec.name: spec for spec in (FRAMES, FLOW_FRAMES)}
# What a recipe may say of them; the rest is for networks.
FIELDS = frozenset({"backbone", "fps", "short_side", "crop", "flow"})


class RawFrames(Backbone):
    """The network that is none: uint8 windows of one frame in, the frames out, (B, C, H, W) uint8."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec

    def normalise(self, clips: Tensor, dtype: object = None) -> Tensor:
        """uint8 (B, C, 1, H, W), unchanged."""
        return clips

    def forward(self, clips: Tensor, *, levels: bool = False) -> dict[str, Tensor]:
        """(B, C, 1, H, W) → ``{"features": (B, C, H, W)}``."""
        return {"features": clips[:, :, 0].contiguous()}


def check_raw(recipe: ExtractRecipe) -> None:
    """Raise :class:`RecipeError` when a recipe of raw frames says something that is for networks."""
    said = recipe.model_dump(exclude_defaults=True)
    alone = {"window": 1, "interval": 1, "stride": 1}  # a row a frame, which may be said
    if wrong := sorted(key for key, value in said.items() if key not in FIELDS and alone.get(key) != value):
        raise RecipeError(
            f"{recipe.backbone} stores every frame as it is and has no {', '.join(wrong)}; --fps, --short-side and "
            "--crop say which frames, the rest is for networks"
        )
