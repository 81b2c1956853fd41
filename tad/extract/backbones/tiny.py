"""Tiny3D: a network of a third of a million parameters for small pictures, trained in a minute on a CPU by the demo.

A design of our own: no published network, no public weights. Its first layer is fixed and turns neighbouring frames
into local motion, so that what is left to learn is how motion goes on in space and time; appearance gets no further.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tad.extract.backbones.base import Backbone, BackboneSpec, LevelInfo
from tad.extract.weights import Layout, State, axis_size

CHANNELS = (16, 32, 64, 128)  # of the stem and of the stages s1, s2, s4


def spec_for(modality: Literal["rgb", "flow"], channels: tuple[int, int, int, int] = CHANNELS) -> BackboneSpec:
    """What a Tiny3D of these widths declares."""
    rgb = modality == "rgb"
    side = 32 if rgb else 64  # flow is estimated at twice the size and averaged: it is poor on 32 pixels
    _, s1, s2, s4 = channels
    return BackboneSpec(
        name="tiny" if rgb else "tiny-flow",
        modality=modality,
        frames=16,
        interval=1,
        fps=12.5,
        short_side=side,
        crop=(side, side),
        value_range=(0.0, 1.0) if rgb else (-20.0, 20.0),
        mean=(0.5, 0.5, 0.5) if rgb else (0.0, 0.0),
        std=(0.2, 0.2, 0.2) if rgb else (1.0, 1.0),
        width=s4,
        window=16,
        stride=4,
        levels={"s1": LevelInfo(1, s1), "s2": LevelInfo(2, s2), "s4": LevelInfo(4, s4)},
    )


RGB, FLOW = spec_for("rgb"), spec_for("flow")


class LocalMotion(nn.Module):
    """Clips (B, C, T, H, W) → motion (B, 2, T, H/2, W/2) in pixels a frame, x then y; nothing to learn.

    The least-squares solution of Lucas & Kanade ("An iterative image registration technique", IJCAI 1981) over windows
    of 4x4 pixels and all channels, once, without a pyramid: right for slow motion, too small for fast motion but of the
    right direction. ``floor`` is added to the diagonal of the normal equations, so that flat, noisy windows do not
    move; it is kept with the weights that were trained with it. The last frame has no successor and no motion.
    """

    floor: Tensor

    def __init__(self, *, floor: float = 0.02, limit: float = 4.0) -> None:
        super().__init__()
        self.register_buffer("floor", torch.tensor(floor))
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()  # extraction hands over channels-last frames: neighbours in memory make this twice as fast
        following = torch.cat([x[:, :, 1:], x[:, :, -1:]], dim=2)
        dt = following - x
        middle = F.pad(0.5 * (following + x), (1, 1, 1, 1, 0, 0), mode="replicate")
        dx = 0.5 * (middle[..., 1:-1, 2:] - middle[..., 1:-1, :-2])
        dy = 0.5 * (middle[..., 2:, 1:-1] - middle[..., :-2, 1:-1])
        pairs = ((dx, dx), (dx, dy), (dy, dy), (dx, dt), (dy, dt))
        products = torch.stack([(a * b).sum(1) for a, b in pairs], 1)  # (B, 5, T, H, W)
        sums = F.avg_pool2d(products.flatten(1, 2), 4, 2, 1, ceil_mode=True, count_include_pad=False)
        xx, xy, yy, xt, yt = sums.unflatten(1, products.shape[1:3]).unbind(1)  # (B, T, H/2, W/2) each
        xx, yy = xx + self.floor, yy + self.floor
        scale = -1.0 / (xx * yy - xy * xy)
        motion = torch.stack([scale * (yy * xt - xy * yt), scale * (xx * yt - xy * xt)], 1)
        return motion.clamp(-self.limit, self.limit)


class Tiny3D(Backbone):
    """Clips (B, C, T, H, W) → features (B, 128); levels ``s1`` (B, 32, T, H/4, W/4), ``s2`` (B, 64, T/2, H/8, W/8) and
    ``s4`` (B, 128, T/4, H/16, W/16), lengths rounded up; for flow H and W count pairs of pixels.

    Parameters
    ----------
    modality : ``rgb`` (3 channels, called ``tiny``) or ``flow`` (2 channels, called ``tiny-flow``).
    channels : of the stem and of the stages ``s1``, ``s2`` and ``s4``; the last is the width of the features.
    """

    def __init__(
        self, *, modality: Literal["rgb", "flow"] = "rgb", channels: tuple[int, int, int, int] = CHANNELS
    ) -> None:
        super().__init__()
        self.spec = spec_for(modality, channels)
        stem, s1, s2, s4 = channels
        self.motion = LocalMotion() if modality == "rgb" else nn.AvgPool3d((1, 4, 4), ceil_mode=True)
        self.stem = _unit(2, stem)
        self.s1 = _unit(stem, s1, stride=(1, 2, 2))
        self.s2 = _unit(s1, s2, stride=(2, 2, 2))
        self.s4 = nn.Sequential(_unit(s2, s4, stride=(2, 2, 2)), _unit(s4, s4, kernel=(3, 1, 1)))

    def forward(self, clips: Tensor, *, levels: bool = False) -> dict[str, Tensor]:
        """See :meth:`Backbone.forward`; any length and any size are admitted."""
        maps = {"s1": self.s1(self.stem(self.motion(clips)))}  # (B, 32, T, H/4, W/4)
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
    return {"modality": "rgb" if "motion.floor" in state else "flow", "channels": widths}


LAYOUTS = (Layout("tad Tiny3D", _arguments),)
