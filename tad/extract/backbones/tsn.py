"""TSN and TSM: a ResNet-50 of single frames, its features averaged over the clip.

TSN: Wang et al., "Temporal Segment Networks: Towards Good Practices for Deep Action Recognition", ECCV 2016, section
3.1. TSM: Lin, Gan and Han, "TSM: Temporal Shift Module for Efficient Video Understanding", ICCV 2019, section 3:
before the first convolution of every residual branch an eighth of the channels comes from the next frame and an
eighth from the previous one, zeros at the ends of the clip. The two have the same weights in shape; a file of TSM tells
itself by the names of the shifted convolutions.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tad.errors import RecipeError
from tad.extract.backbones.base import BackboneSpec, LevelInfo
from tad.extract.backbones.residual import (
    R50,
    Depths,
    ResidualBackbone,
    classes_of,
    depths_of,
    stage_name,
    without_wrapper,
)
from tad.extract.weights import Layout, State

FOLDS = 8  # an eighth of the channels is shifted each way

# Trained on 8 frames spread over the whole video, or (the "dense" files) 8 frames apart: the latter is what a snippet
# of a long video looks like.
TSM_R50 = BackboneSpec(
    name="tsm-r50",
    modality="rgb",
    frames=8,
    interval=8,
    fps=None,
    short_side=256,
    crop=(224, 224),
    value_range=(0.0, 255.0),
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
    width=2048,
    window=8,
    stride=16,
    levels={"res3": LevelInfo(1, 512), "res4": LevelInfo(1, 1024), "res5": LevelInfo(1, 2048)},
)
TSN_R50 = replace(TSM_R50, name="tsn-r50")
MIT = {"value_range": (0.0, 1.0), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class FrameConvNorm(nn.Module):
    """Convolution of single frames without bias, batch norm, and ReLU if asked for: (N, C, H, W) → (N, ``channels``,
    H', W').
    """

    def __init__(self, in_channels: int, channels: int, *, size: int = 1, stride: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, size, stride, size // 2, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.bn: nn.BatchNorm2d | None = nn.BatchNorm2d(channels)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x if self.bn is None else self.bn(x)
        return x.relu_() if self.relu else x

    def fuse(self) -> None:
        """Fold the batch norm's running statistics into the convolution, in place."""
        if self.bn is not None:
            self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), None


def shift(clips: Tensor) -> Tensor:
    """TSM's shift of (B, T, C, H, W): the first eighth of the channels is the next frame's, the second eighth the
    previous frame's, zero where there is none.
    """
    fold = clips.shape[2] // FOLDS
    shifted = clips.clone()
    shifted[:, :-1, :fold] = clips[:, 1:, :fold]
    shifted[:, -1:, :fold] = 0
    shifted[:, 1:, fold : 2 * fold] = clips[:, :-1, fold : 2 * fold]
    shifted[:, :1, fold : 2 * fold] = 0
    return shifted


class FrameBottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 and the shortcut, frame by frame: (B, T, C, H, W) → (B, T, 4 ``mid``, H', W').
    With ``shifts`` the residual branch begins with a :func:`shift`.
    """

    def __init__(self, in_channels: int, mid: int, *, stride: int, shifts: bool) -> None:
        super().__init__()
        self.shifts = shifts
        self.conv1 = FrameConvNorm(in_channels, mid)
        self.conv2 = FrameConvNorm(mid, mid, size=3, stride=stride)
        self.conv3 = FrameConvNorm(mid, 4 * mid, relu=False)
        self.shortcut: FrameConvNorm | None = None
        if stride != 1 or in_channels != 4 * mid:
            self.shortcut = FrameConvNorm(in_channels, 4 * mid, stride=stride, relu=False)

    def forward(self, clips: Tensor) -> Tensor:
        x = clips.flatten(0, 1)  # (B * T, C, H, W)
        y = shift(clips).flatten(0, 1) if self.shifts else x
        y = self.conv3(self.conv2(self.conv1(y)))
        y = y.add_(x if self.shortcut is None else self.shortcut(x)).relu_()
        return y.unflatten(0, clips.shape[:2])  # (B, T, 4 mid, H', W')


class TSN(ResidualBackbone):
    """Clips (B, 3, T, H, W) → features (B, 2048), the mean over the frames of each frame's global mean of ``res5``;
    levels ``res3`` (B, 512, T, H/8, W/8), ``res4`` (B, 1024, T, H/16, W/16) and ``res5`` (B, 2048, T, H/32, W/32),
    sizes rounded up. Clips of any length are admitted, also where TSM was trained with 8 frames.

    Parameters
    ----------
    depths : bottlenecks of the four stages.
    shifts : whether channels are shifted between frames (TSM).
    classes : outputs of :meth:`classify`, the mean over the frames of each frame's logits; ``None`` for no classifier.
    dropout : before the classifier in training.

    Raises
    ------
    RecipeError : other depths than those of ResNet-50.
    """

    def __init__(
        self, *, depths: Depths = R50, shifts: bool = False, classes: int | None = 400, dropout: float = 0.5
    ) -> None:
        super().__init__()
        if depths != R50:
            raise RecipeError(f"TSN and TSM are there on ResNet-50 only, depths {R50}, got {depths}")
        self.spec = TSM_R50 if shifts else TSN_R50
        self.dropout = dropout
        self.stem = FrameConvNorm(3, 64, size=7, stride=2)
        channels = 64
        stages: list[list[nn.Module]] = []
        for number, (depth, stride) in enumerate(zip(depths, (1, 2, 2, 2), strict=True)):
            stages.append([])
            for index in range(depth):
                first = stride if index == 0 else 1
                stages[-1].append(FrameBottleneck(channels, 64 << number, stride=first, shifts=shifts))
                channels = 256 << number
        self.add_stages(stages)
        self.classifier = None if classes is None else nn.Linear(channels, classes)

    def forward(self, clips: Tensor, *, levels: bool = False) -> dict[str, Tensor]:
        """See :meth:`Backbone.forward`; any length and any size are admitted.

        Raises
        ------
        RecipeError : clips that are no normalised (B, 3, T, H, W).
        """
        self.check(clips)
        frames = clips.transpose(1, 2)  # (B, T, 3, H, W)
        x = frames.flatten(0, 1)  # (B * T, 3, H, W)
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(self.stem(x), 3, 2, 1)  # (B * T, 64, H/4, W/4)
        maps = self.run_stages(x.unflatten(0, frames.shape[:2]))  # (B, T, C, H', W') each
        return self.outputs([map_.transpose(1, 2) for map_ in maps], levels=levels)

    def fuse(self) -> TSN:
        """See :meth:`Backbone.fuse`.

        Raises
        ------
        RecipeError : in training mode.
        """
        super().fuse()
        for module in self.modules():
            if isinstance(module, FrameConvNorm):
                module.fuse()
        return self


# ---- how public files name the tensors -------------------------------------------------------------------------------


def rename_mmaction2(key: str) -> str:
    """``backbone.layer1.0.conv1.conv.net.weight`` → ``res2.0.conv1.conv.weight``, and so on."""
    key = re.sub(r"^backbone\.layer(\d)\.", stage_name, key.removeprefix("model."))
    key = re.sub(r"^backbone\.conv1\.", "stem.", key)
    key = re.sub(r"^cls_head\.fc_cls\.", "classifier.", key)
    return key.replace(".conv1.conv.net.", ".conv1.conv.").replace(".downsample.", ".shortcut.")


def rename_mit(key: str) -> str:
    """``base_model.layer1.0.conv1.net.weight`` → ``res2.0.conv1.conv.weight``, and so on. The classifier is called
    ``new_fc``, or ``base_model.classifier`` in older files.
    """
    key = re.sub(r"^base_model\.layer(\d)\.", stage_name, key.removeprefix("model."))
    key = re.sub(r"^base_model\.(conv|bn)1\.", r"stem.\1.", key)
    key = re.sub(r"^(new_fc|base_model\.classifier)\.", "classifier.", key)
    key = re.sub(r"(\.conv[123])\.(net\.)?(?=weight$)", r"\1.conv.", key)
    key = re.sub(r"\.bn([123])\.", r".conv\1.bn.", key)
    return key.replace(".downsample.0.", ".shortcut.conv.").replace(".downsample.1.", ".shortcut.bn.")


def read_mmaction2(state: State) -> dict[str, Any]:
    """The family of TSN in mmaction2 also holds 3-D networks, told by their kernels."""
    state = without_wrapper(state)
    shifts = any(key.endswith(".conv1.conv.net.weight") for key in state)
    read = {
        "depths": depths_of(state, r"backbone\.layer(\d)\.(\d+)\."),
        "shifts": shifts,
        "classes": classes_of(state, "cls_head.fc_cls.weight"),
        "dropout": 0.5 if shifts else 0.4,
    }
    stem = state.get("backbone.conv1.conv.weight")
    return read if stem is None or stem.ndim == 4 else {**read, "depths": "of 3-D convolutions"}


def read_mit(state: State) -> dict[str, Any]:
    state = without_wrapper(state)
    head = "new_fc.weight" if "new_fc.weight" in state else "base_model.classifier.weight"
    return {
        "depths": depths_of(state, r"base_model\.layer(\d)\.(\d+)\."),
        "shifts": any(key.endswith(".conv1.net.weight") for key in state),
        "classes": classes_of(state, head),
    }


TSM_LAYOUTS = (
    Layout("mmaction2 TSM", read_mmaction2, rename_mmaction2),
    Layout("TSM, mit-han-lab", read_mit, rename_mit, MIT),
)
TSN_LAYOUTS = (
    Layout("mmaction2 ResNet (TSN, SlowOnly, I3D-R50)", read_mmaction2, rename_mmaction2),
    Layout("TSN, mit-han-lab", read_mit, rename_mit, MIT),
)
