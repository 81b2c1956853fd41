"""R(2+1)D on ResNet-50, as pytorchvideo has it: bottlenecks whose middle convolution is factored, time before space.

The factoring is that of Tran et al., CVPR 2018 (see ``r2plus1d.py``); the network is pytorchvideo's own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tad.extract.backbones.base import BackboneSpec, LevelInfo
from tad.extract.backbones.layers import ConvNorm
from tad.extract.backbones.residual import (
    R50,
    Depths,
    Pointwise,
    ResidualBackbone,
    arranged,
    classes_of,
    depths_of,
    without_wrapper,
)
from tad.extract.backbones.residual import rename_pytorchvideo as rename_bottlenecks
from tad.extract.weights import Layout, State

R2PLUS1D_50 = BackboneSpec(
    name="r2plus1d-50",
    modality="rgb",
    frames=16,
    interval=4,
    fps=30.0,
    grid_fps=30.0,
    short_side=256,
    crop=(224, 224),
    value_range=(0.0, 1.0),
    mean=(0.45, 0.45, 0.45),
    std=(0.225, 0.225, 0.225),
    width=2048,
    window=16,
    stride=16,
    levels={"s1": LevelInfo(1, 512), "s2": LevelInfo(2, 1024), "s4": LevelInfo(4, 2048)},
)


class FactoredBottleneck(nn.Module):
    """1x1x1, temporal, then spatial convolution with the strides, 1x1x1, and the shortcut: (B, C, T, H, W) →
    (B, 4 ``mid``, ...).
    """

    def __init__(self, in_channels: int, mid: int, *, stride: tuple[int, int], eps: float) -> None:
        super().__init__()
        time, space = stride
        channels = 4 * mid
        self.conv1 = Pointwise(in_channels, mid, eps=eps)
        self.temporal = ConvNorm(mid, mid, kernel=(3, 1, 1), stride=(time, 1, 1), eps=eps)
        self.spatial = ConvNorm(mid, mid, kernel=(1, 3, 3), stride=(1, space, space), eps=eps)
        self.conv3 = Pointwise(mid, channels, eps=eps, relu=False)
        self.shortcut: Pointwise | None = None
        if stride != (1, 1) or in_channels != channels:
            self.shortcut = Pointwise(in_channels, channels, stride=(time, space, space), eps=eps, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(self.spatial(self.temporal(self.conv1(x))))
        return y.add_(x if self.shortcut is None else self.shortcut(x)).relu_()


class BottleneckR2Plus1D(ResidualBackbone):
    """pytorchvideo's R(2+1)D on ResNet-50: bottlenecks, time before space, as many channels between them as after.

    Clips (B, 3, T, H, W) → features (B, 2048), the global mean of ``res5``; levels ``s1`` (``res3``: B, 512, T, H/8,
    W/8), ``s2`` (``res4``: B, 1024, T/2, H/16, W/16) and ``s4`` (``res5``: B, 2048, T/4, H/32, W/32), sizes rounded up.

    Parameters
    ----------
    depths : bottlenecks of the four stages.
    classes : outputs of :meth:`classify`; ``None`` for no classifier.
    dropout : before the classifier in training.
    """

    def __init__(self, *, depths: Depths = R50, classes: int | None = 400, dropout: float = 0.5) -> None:
        super().__init__()
        self.spec = R2PLUS1D_50
        self.dropout = dropout
        eps = 1e-5
        self.stem = ConvNorm(3, 64, kernel=(1, 7, 7), stride=(1, 2, 2), eps=eps)
        channels = 64
        stages: list[list[nn.Module]] = []
        for number, (depth, first) in enumerate(zip(depths, ((1, 2), (1, 2), (2, 2), (2, 2)), strict=True)):
            stages.append([])
            for index in range(depth):
                stride = first if index == 0 else (1, 1)
                stages[-1].append(FactoredBottleneck(channels, 64 << number, stride=stride, eps=eps))
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
        x = self.stem(arranged(clips))  # (B, 64, T, H/2, W/2)
        return self.outputs(self.run_stages(x), levels=levels)


# ---- how public files name the tensors -------------------------------------------------------------------------------


def rename_pytorchvideo(key: str) -> str:
    """``blocks.1.res_blocks.0.branch2.conv_b.conv_xy.weight`` → ``res2.0.spatial.conv.weight``, and so on."""
    inner = {"conv_t": "temporal.conv", "norm": "temporal.bn", "conv_xy": "spatial.conv"}
    for theirs, ours in inner.items():
        key = key.replace(f".branch2.conv_b.{theirs}.", f".{ours}.")
    return rename_bottlenecks(key.replace(".branch2.norm_b.", ".spatial.bn."))


def read_pytorchvideo(state: State) -> dict[str, Any]:
    state = without_wrapper(state)
    depths = depths_of(state, r"blocks\.(\d)\.res_blocks\.(\d+)\.")
    return {"depths": depths, "classes": classes_of(state, "blocks.5.proj.weight")}


LAYOUTS = (Layout("pytorchvideo R(2+1)D", read_pytorchvideo, rename_pytorchvideo),)
