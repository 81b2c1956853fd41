"""I3D: Inception-v1 inflated to three dimensions, for RGB and for optical flow.

Carreira and Zisserman, "Quo Vadis, Action Recognition?", CVPR 2017, figure 3 and section 2.4. Module names are those of
the public PyTorch files (``rgb_imagenet.pt``, ``flow_imagenet.pt``), so that they load as they are. A second layout of
the same weights (hassony2, used by video_features) loads by renaming; its code pads differently and has another batch
norm epsilon, which is kept under ``port``, because features made with that tool can only be compared so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tad.errors import RecipeError, did_you_mean
from tad.extract.backbones.base import Backbone, BackboneSpec, LevelInfo
from tad.extract.weights import Layout, State, axis_size

Triple = tuple[int, int, int]
Pads = list[tuple[int, int]]  # zeros before and after, for T, H, W

RGB = BackboneSpec(
    name="i3d-rgb",
    modality="rgb",
    frames=64,
    interval=1,
    fps=25.0,
    short_side=256,
    crop=(224, 224),
    value_range=(-1.0, 1.0),
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    width=1024,
    window=16,
    stride=8,
    levels={"s2": LevelInfo(2, 480), "s4": LevelInfo(4, 832), "s8": LevelInfo(8, 1024)},
)
FLOW = replace(RGB, name="i3d-flow", modality="flow", mean=(0.0, 0.0), std=(1.0, 1.0))
SPECS = {3: RGB, 2: FLOW}  # by input channels

# Input channels, then b0, b1a, b1b, b2a, b2b, b3b: 1x1x1 | 1x1x1, 3x3x3 | 1x1x1, 3x3x3 | max-pool, 1x1x1.
MIXED: dict[str, tuple[int, int, int, int, int, int, int]] = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME: as many zeros as ``ceil(size / stride)`` windows need, the odd one at the end."""
    total = max(kernel - (size % stride or stride), 0)
    return total // 2, total - total // 2


def static_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """The same zeros for every size: right where the stride divides it."""
    total = max(kernel - stride, 0)
    return total // 2, total - total // 2


def static_ceil_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """:func:`static_padding`, then windows until the end is covered (``ceil_mode``), with zeros beyond."""
    front = max(kernel - stride, 0) // 2
    return front, (-(-size // stride) - 1) * stride + kernel - size - front


@dataclass(frozen=True)
class Port:
    """What public implementations of the network do differently with the same weights."""

    bn_eps: float
    conv_padding: Callable[[int, int, int], tuple[int, int]]  # size, kernel, stride -> zeros before and after
    pool_padding: Callable[[int, int, int], tuple[int, int]]
    min_size: int  # least frames, height and width


PORTS: dict[str, Port] = {
    "piergiaj": Port(1e-3, same_padding, same_padding, 1),
    "hassony": Port(1e-5, static_padding, static_ceil_padding, 2),
}


class Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU: (B, C, T, H, W) → (B, ``channels``, ...), same size at stride 1."""

    def __init__(self, *, in_channels: int, channels: int, kernel: int, bn_eps: float, stride: int = 1) -> None:
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0  # at stride 1 SAME is symmetric; else whoever calls has padded
        self.conv3d = nn.Conv3d(in_channels, channels, kernel, stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm3d(channels, eps=bn_eps, momentum=0.01)
        nn.init.kaiming_normal_(self.conv3d.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(x)), inplace=True)

    def fuse(self) -> None:
        if isinstance(self.bn, nn.BatchNorm3d):
            self.conv3d, self.bn = fuse_conv_bn_eval(self.conv3d, self.bn), nn.Identity()


class Mixed(nn.Module):
    """Inception block: four branches side by side, their channels joined in this order."""

    def __init__(
        self, *, in_channels: int, b0: int, b1a: int, b1b: int, b2a: int, b2b: int, b3b: int, bn_eps: float
    ) -> None:
        super().__init__()
        self.b0 = Unit(in_channels=in_channels, channels=b0, kernel=1, bn_eps=bn_eps)
        self.b1a = Unit(in_channels=in_channels, channels=b1a, kernel=1, bn_eps=bn_eps)
        self.b1b = Unit(in_channels=b1a, channels=b1b, kernel=3, bn_eps=bn_eps)
        self.b2a = Unit(in_channels=in_channels, channels=b2a, kernel=1, bn_eps=bn_eps)
        self.b2b = Unit(in_channels=b2a, channels=b2b, kernel=3, bn_eps=bn_eps)
        self.b3b = Unit(in_channels=in_channels, channels=b3b, kernel=1, bn_eps=bn_eps)

    def forward(self, x: Tensor) -> Tensor:
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1), [(1, 1), (1, 1), (1, 1)])
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class Classifier(nn.Module):
    """Linear layer, written as a 1x1x1 convolution because public files have it so."""

    def __init__(self, *, classes: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(1024, classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, 1024) → (B, classes)"""
        return F.linear(features, self.conv3d.weight.flatten(1), self.conv3d.bias)


class I3D(Backbone):
    """Clips (B, C, T, H, W) → features (B, 1024), the global mean of ``Mixed_5c``; levels ``s2`` (``Mixed_3c``: B, 480,
    T/2, H/8, W/8), ``s4`` (``Mixed_4f``: B, 832, T/4, H/16, W/16) and ``s8`` (``Mixed_5c``: B, 1024, T/8, H/32, W/32),
    sizes rounded up.

    Parameters
    ----------
    in_channels : 3 for RGB, 2 for optical flow (x, then y).
    classes : outputs of :meth:`classify`; ``None`` for no classifier. 400 as in the public files.
    port : whose arithmetic, a key of ``PORTS``; also ``variant`` of the module.
    dropout : before the classifier in training.

    Raises
    ------
    RecipeError : unknown port or number of channels.
    """

    def __init__(
        self, *, in_channels: int = 3, classes: int | None = 400, port: str = "piergiaj", dropout: float = 0.5
    ) -> None:
        super().__init__()
        if port not in PORTS:
            raise RecipeError(f"I3D has no port '{port}'.{did_you_mean(port, PORTS)}")
        if in_channels not in SPECS:
            raise RecipeError(f"I3D reads 3 channels (RGB) or 2 (optical flow), not {in_channels}")
        self.variant = port
        self.port = PORTS[port]
        self.spec = replace(SPECS[in_channels], min_frames=self.port.min_size)
        self.dropout = dropout
        eps = self.port.bn_eps
        self.Conv3d_1a_7x7 = Unit(in_channels=in_channels, channels=64, kernel=7, stride=2, bn_eps=eps)
        self.Conv3d_2b_1x1 = Unit(in_channels=64, channels=64, kernel=1, bn_eps=eps)
        self.Conv3d_2c_3x3 = Unit(in_channels=64, channels=192, kernel=3, bn_eps=eps)
        for name, (width, b0, b1a, b1b, b2a, b2b, b3b) in MIXED.items():
            block = Mixed(in_channels=width, b0=b0, b1a=b1a, b1b=b1b, b2a=b2a, b2b=b2b, b3b=b3b, bn_eps=eps)
            self.add_module(name, block)
        self.logits = None if classes is None else Classifier(classes=classes)

    def forward(self, clips: Tensor, *, levels: bool = False) -> dict[str, Tensor]:
        """See :meth:`Backbone.forward`.

        Raises
        ------
        RecipeError : clips that are no normalised (B, C, T, H, W), or too small.
        """
        self._check(clips)
        if clips.device.type == "cpu":
            clips = clips.contiguous(memory_format=torch.channels_last_3d)  # a tenth faster, the values are the same
        x = F.pad(clips, _flat([self.port.conv_padding(n, 7, 2) for n in clips.shape[2:]]))
        x = self.Conv3d_1a_7x7(x)  # (B, 64, T/2, H/2, W/2)
        x = self._pool(x, (1, 3, 3), (1, 2, 2))  # (B, 64, T/2, H/4, W/4)
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))  # (B, 192, T/2, H/4, W/4)
        x = self._pool(x, (1, 3, 3), (1, 2, 2))  # (B, 192, T/2, H/8, W/8)
        s2 = self._blocks(x, "Mixed_3b", "Mixed_3c")  # (B, 480, T/2, H/8, W/8)
        x = self._pool(s2, (3, 3, 3), (2, 2, 2))  # (B, 480, T/4, H/16, W/16)
        s4 = self._blocks(x, "Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f")  # (B, 832, T/4, H/16, W/16)
        x = self._pool(s4, (2, 2, 2), (2, 2, 2))  # (B, 832, T/8, H/32, W/32)
        s8 = self._blocks(x, "Mixed_5b", "Mixed_5c")  # (B, 1024, T/8, H/32, W/32)
        features = s8.mean(dim=(2, 3, 4))  # (B, 1024)
        return {"features": features, "s2": s2, "s4": s4, "s8": s8} if levels else {"features": features}

    def classify(self, features: Tensor) -> Tensor:
        """See :meth:`Backbone.classify`."""
        return self.classified(self.logits, features)

    def fuse(self) -> I3D:
        """Fold every batch norm into its convolution, in place: the same outputs to rounding, a twentieth faster.

        To be called after the weights are loaded: the state dict is another one afterwards.

        Raises
        ------
        RecipeError : in training mode.
        """
        if self.training:
            raise RecipeError("fuse() is for inference: call eval() first")
        for module in self.modules():
            if isinstance(module, Unit):
                module.fuse()
        return self

    def _blocks(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = self.get_submodule(name)(x)
        return x

    def _pool(self, x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
        pads = [self.port.pool_padding(n, k, s) for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
        return max_pool(x, kernel, stride, pads)

    def _check(self, clips: Tensor) -> None:
        name, channels, least = self.spec.name, len(self.spec.mean), self.port.min_size
        if clips.ndim != 5 or clips.shape[1] != channels:
            raise RecipeError(f"{name} takes clips (B, {channels}, T, H, W), got {tuple(clips.shape)}")
        if not clips.is_floating_point():
            raise RecipeError(f"{name} takes normalised clips, got {clips.dtype}: call normalise(clips) first")
        if min(clips.shape[2:]) < least:
            raise RecipeError(
                f"{name} ({self.variant}) needs at least {least} frames of {least}x{least}, got {tuple(clips.shape)}"
            )


def max_pool(x: Tensor, kernel: Triple, stride: Triple, pads: Pads) -> Tensor:
    """Max-pooling of ``x`` (B, C, T, H, W) with zeros around it.

    ``x`` must hold no negative values (it follows a ReLU): zeros outside then change nothing, and need not be there.
    On the CPU without gradients it is a maximum of shifted slices, an axis after another: bit for bit the same, and
    about 20 times faster than ``max_pool3d``, which also finds where the maxima are.
    """
    if x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad):
        if any(front != back for front, back in pads):
            x, pads = F.pad(x, _flat(pads)), [(0, 0)] * 3
        return F.max_pool3d(x, kernel, stride, [front for front, _ in pads])
    for axis in (2, 3, 4):
        x = _max_along(x, axis, kernel[axis - 2], stride[axis - 2], pads[axis - 2])
    return x


def _max_along(x: Tensor, axis: int, kernel: int, stride: int, pads: tuple[int, int]) -> Tensor:
    size, front = x.shape[axis], pads[0]
    count = (size + sum(pads) - kernel) // stride + 1
    # The tap at offset 0 from a window's anchor i * stride lies inside for every window, others fall out at the ends.
    result = _every(x, axis, 0, stride, count)
    if kernel == 1:
        return result
    result = result.clone()
    for offset in range(-front, kernel - front):
        first = max(0, -(offset // stride))
        last = min(count - 1, (size - 1 - offset) // stride)
        if offset != 0 and first <= last:
            part = result.narrow(axis, first, last - first + 1)
            torch.maximum(part, _every(x, axis, first * stride + offset, stride, part.shape[axis]), out=part)
    return result


def _every(x: Tensor, axis: int, start: int, step: int, count: int) -> Tensor:
    return x[(slice(None),) * axis + (slice(start, start + (count - 1) * step + 1, step),)]


def _flat(pads: Sequence[tuple[int, int]]) -> list[int]:
    """Pads of T, H, W in the order of ``F.pad``: the last axis first."""
    return [zeros for pair in reversed(pads) for zeros in pair]


# ---- how public files name the tensors -------------------------------------------------------------------------------

HASSONY_BRANCHES = {"0": "b0", "1.0": "b1a", "1.1": "b1b", "2.0": "b2a", "2.1": "b2b", "3.1": "b3b"}


def rename_hassony(key: str) -> str:
    """``mixed_3b.branch_1.0.batch3d.weight`` → ``Mixed_3b.b1a.bn.weight``, and so on."""
    key = re.sub(
        r"^mixed_(\w+)\.branch_(0|[123]\.[01])\.", lambda m: f"Mixed_{m[1]}.{HASSONY_BRANCHES.get(m[2], m[2])}.", key
    )
    key = re.sub(r"^conv3d_0c_1x1\.", "logits.", key)
    key = re.sub(r"^conv3d_(1a|2b|2c)_", r"Conv3d_\1_", key)
    return key.replace(".batch3d.", ".bn.")


def _arguments(state: State, port: str, stem: str, classifier: str) -> dict[str, Any]:
    classes = axis_size(state, classifier, 0) if classifier in state else None
    return {"in_channels": axis_size(state, stem, 1), "classes": classes, "port": port}


def piergiaj_arguments(state: State) -> dict[str, Any]:
    return _arguments(state, "piergiaj", "Conv3d_1a_7x7.conv3d.weight", "logits.conv3d.weight")


def hassony_arguments(state: State) -> dict[str, Any]:
    return _arguments(state, "hassony", "conv3d_1a_7x7.conv3d.weight", "conv3d_0c_1x1.conv3d.weight")


LAYOUTS = (
    Layout("I3D, piergiaj", piergiaj_arguments),
    Layout("I3D, hassony2/video_features", hassony_arguments, rename_hassony),
)
