"""Tiny3D: a 3D convolutional network of a third of a million parameters, trained in a minute on a CPU by the demo.

A design of our own for small pictures, no published network and no public weights: four stages of 3x3x3 convolutions
with batch norm and ReLU, time halved only in the last two so that fast motion is seen at full rate first.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from tad.extract.backbones.base import Backbone, BackboneSpec, LevelInfo
from tad.extract.weights import Layout, State, axis_size

CHANNELS = (16, 32, 64, 128)  # of the stem and of the stages s1, s2, s4


def spec_for(modality: Literal["rgb", "flow"], channels: tuple[int, int, int, int] = CHANNELS) -> BackboneSpec:
    """What a Tiny3D of these widths declares."""
    rgb = modality == "rgb"
    _, s1, s2, s4 = channels
    return BackboneSpec(
        name="tiny" if rgb else "tiny-flow",
        modality=modality,
        frames=16,
        interval=1,
        fps=12.5,
        short_side=64,
        crop=(64, 64),
        value_range=(0.0, 1.0) if rgb else (-1.0, 1.0),
        mean=(0.5, 0.5, 0.5) if rgb else (0.0, 0.0),
        std=(0.2, 0.2, 0.2) if rgb else (0.1, 0.1),
        width=s4,
        window=16,
        stride=4,
        levels={"s1": LevelInfo(1, s1), "s2": LevelInfo(2, s2), "s4": LevelInfo(4, s4)},
    )


RGB, FLOW = spec_for("rgb"), spec_for("flow")


class Tiny3D(Backbone):
    """Clips (B, C, T, H, W) → features (B, 128); levels ``s1`` (B, 32, T, H/4, W/4), ``s2`` (B, 64, T/2, H/8, W/8) and
    ``s4`` (B, 128, T/4, H/16, W/16), lengths rounded up.

    Parameters
    ----------
    modality : ``rgb`` (3 channels, named ``tiny``) or ``flow`` (2 channels, named ``tiny-flow``).
    channels : channels of the stem and of the stages ``s1``, ``s2``, ``s4``; the last is the width of the features.
    """

    def __init__(
        self, *, modality: Literal["rgb", "flow"] = "rgb", channels: tuple[int, int, int, int] = CHANNELS
    ) -> None:
        super().__init__()
        self.spec = spec_for(modality, channels)
        stem, s1, s2, s4 = channels
        self.stem = _unit(len(self.spec.mean), stem, stride=(1, 2, 2), kernel=(3, 5, 5))
        self.s1 = _unit(stem, s1, stride=(1, 2, 2))
        self.s2 = _unit(s1, s2, stride=(2, 2, 2))
        self.s4 = nn.Sequential(_unit(s2, s4, stride=(2, 2, 2)), _unit(s4, s4, kernel=(3, 1, 1)))

    def forward(self, clips: Tensor, *, levels: bool = False) -> dict[str, Tensor]:
        """See :meth:`Backbone.forward`; any length and any size are admitted."""
        maps = {"s1": self.s1(self.stem(clips))}  # (B, 32, T, H/4, W/4)
        maps["s2"] = self.s2(maps["s1"])  # (B, 64, T/2, H/8, W/8)
        maps["s4"] = self.s4(maps["s2"])  # (B, 128, T/4, H/16, W/16)
        features = maps["s4"].mean(dim=(2, 3, 4))  # (B, 128)
        return {"features": features, **maps} if levels else {"features": features}


def _unit(
    channels_in: int,
    channels_out: int,
    *,
    stride: tuple[int, int, int] = (1, 1, 1),
    kernel: tuple[int, int, int] = (3, 3, 3),
) -> nn.Sequential:
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    conv = nn.Conv3d(channels_in, channels_out, kernel, stride, padding, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm3d(channels_out), nn.ReLU(inplace=True))


def _arguments(state: State) -> dict[str, Any]:
    widths = tuple(axis_size(state, key, 0) for key in ("stem.0.weight", "s1.0.weight", "s2.0.weight", "s4.1.0.weight"))
    return {"modality": "flow" if axis_size(state, "stem.0.weight", 1) == 2 else "rgb", "channels": widths}


LAYOUTS = (Layout("tad Tiny3D", _arguments),)
