"""What a backbone is: an ``nn.Module`` over normalised clips, and a declaration of what it was trained with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad.errors import RecipeError
from tad.extract.backbones.layers import ConvNorm


@dataclass(frozen=True)
class LevelInfo:
    """One stage output: ``stride`` frames a position in time, ``channels`` wide."""

    stride: int
    channels: int


@dataclass(frozen=True)
class BackboneSpec:
    """What a network was trained with; extraction takes its defaults from here.

    Attributes
    ----------
    frames, interval : frames of a training clip, and how many frames apart they lie.
    fps : frame rate of training; ``None`` where it was each file's own.
    grid_fps : frame rate that extraction takes unless told otherwise; ``None``: each file's own.
    modality : ``rgb`` (3 channels) or ``flow`` (2 channels, x then y).
    short_side, crop : frames are scaled so that the short side has this many pixels, then cut (height, width) at the
    centre.
    resize : (height, width) that frames are scaled to instead, whatever their aspect; then cut likewise.
    channel_order : of the colours, as the network takes them; tad's frames are RGB.
    value_range : where uint8 0…255 is mapped to before ``mean`` and ``std`` (per channel) apply.
    width : channels of ``features``.
    levels : stage outputs by name (``s2`` = one position every 2 frames).
    window, stride : the snippet that extraction takes unless told otherwise, in frames.
    any_size : whether other heights and widths than ``crop`` are admitted (fully convolutional); where not, position
    embeddings can be interpolated on request.
    any_length : whether other numbers of frames than ``frames`` are admitted; where not, the same.
    min_frames : shortest clip that the network admits.
    """

    name: str
    modality: Literal["rgb", "flow"]
    frames: int
    interval: int
    fps: float | None
    short_side: int
    crop: tuple[int, int]
    value_range: tuple[float, float]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    width: int
    window: int
    stride: int
    levels: dict[str, LevelInfo] = field(default_factory=dict)
    any_size: bool = True
    min_frames: int = 1
    grid_fps: float | None = None
    resize: tuple[int, int] | None = None
    channel_order: Literal["rgb", "bgr"] = "rgb"
    any_length: bool = True


class Backbone(nn.Module):
    """Base class: subclasses set ``spec`` and define ``forward``.

    ``weights_id`` says which weights it has: ``sha256:<hex>`` of a file or state dict, ``random:<seed>``, ``None``
    for weights that the caller looks after. ``variant`` names the arithmetic where a network has several (see the
    network's file). ``arguments`` are those of its class, where it was made by name; a file of ours repeats them.
    ``interpolate_positions`` is set by whoever wants a transformer to take clips of another size or
    length than it was trained with; without it such clips are refused.
    """

    spec: BackboneSpec
    weights_id: str | None = None
    variant: str | None = None
    interpolate_positions: bool = False
    dropout: float = 0.0  # before the classifier, in training
    arguments: dict[str, Any] | None = None

    def forward(self, clips: Tensor, *, levels: bool = False) -> dict[str, Tensor]:
        """Normalised clips (B, C, T, H, W) → ``{"features": (B, D)}``, with ``levels`` also the stage maps (B, C,
        T', H', W').
        """
        raise TypeError(f"{type(self).__name__} does not define forward()")

    def classify(self, features: Tensor) -> Tensor:
        """Features (B, D) → logits (B, classes) of the classifier that came with the weights; dropout in training.

        Raises
        ------
        RecipeError : there is none.
        """
        return self.classified(None, features)

    def classified(self, layer: nn.Module | None, features: Tensor) -> Tensor:
        """What :meth:`classify` does, with the network's own ``layer``."""
        if layer is None:
            raise RecipeError(f"{self.spec.name} has no classifier: its weights held none, or classes=None was given")
        logits: Tensor = layer(F.dropout(features, self.dropout, self.training))
        return logits

    def fuse(self) -> Backbone:
        """Fold what can be folded for inference (batch norms into convolutions), in place; the outputs stay the same
        to rounding. To be called after the weights are loaded: the state dict is another one afterwards.

        Raises
        ------
        RecipeError : in training mode.
        """
        if self.training:
            raise RecipeError("fuse() is for inference: call eval() first")
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fuse()
        return self

    def check(self, clips: Tensor, *, min_size: int = 1) -> None:
        """Raise :class:`RecipeError` for clips that are no normalised (B, C, T, H, W), too short or too small, or of
        another size or length than a network with fixed positions takes.
        """
        spec, channels = self.spec, len(self.spec.mean)
        if clips.ndim != 5 or clips.shape[1] != channels:
            raise RecipeError(f"{spec.name} takes clips (B, {channels}, T, H, W), got {tuple(clips.shape)}")
        if not clips.is_floating_point():
            raise RecipeError(f"{spec.name} takes normalised clips, got {clips.dtype}: call normalise(clips) first")
        frames, height, width = clips.shape[2:]
        if frames < spec.min_frames or min(height, width) < min_size:
            raise RecipeError(
                f"{spec.name} needs at least {spec.min_frames} frames of {min_size}x{min_size}, got clips "
                f"{tuple(clips.shape)}"
            )
        wrong_size = not spec.any_size and (height, width) != spec.crop
        wrong_length = not spec.any_length and frames != spec.frames
        if (wrong_size or wrong_length) and not self.interpolate_positions:
            raise RecipeError(
                f"{spec.name} has positions for {spec.frames} frames of {spec.crop[0]}x{spec.crop[1]}, got clips of "
                f"{frames} frames of {height}x{width}; set interpolate_positions to have them interpolated"
            )

    def normalise(self, clips: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 clips (B, C, T, H, W) → what ``forward`` takes: value range first, then mean and std per channel."""
        low, high = self.spec.value_range
        scale = torch.tensor([(high - low) / 255.0 / s for s in self.spec.std], device=clips.device, dtype=dtype)
        shift = torch.tensor(
            [(low - m) / s for m, s in zip(self.spec.mean, self.spec.std, strict=True)],
            device=clips.device,
            dtype=dtype,
        )
        if self.spec.channel_order == "bgr":
            clips = clips.flip(1)
        shape = (1, -1, 1, 1, 1)
        return clips.to(dtype) * scale.view(shape) + shift.view(shape)
