"""CSN: ResNets whose 3x3x3 convolutions are channel-wise, so that channels meet only in 1x1x1 convolutions.

Tran, Wang, Torresani and Feiszli, "Video Classification with Channel-Separated Convolutional Networks", ICCV 2019,
section 3. In the interaction-reduced network (ir) a bottleneck's 3x3x3 convolution becomes a channel-wise one; in the
interaction-preserved network (ip) a 1x1x1 convolution before it keeps what that loses. Public files differ in the
batch norms' epsilon: 1e-3 in those that come from Caffe2 (mmaction2, VMZ), 1e-5 in pytorchvideo's.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from tad.errors import RecipeError
from tad.extract.backbones.base import BackboneSpec, LevelInfo
from tad.extract.backbones.i3d import max_pool
from tad.extract.backbones.layers import ConvNorm
from tad.extract.backbones.residual import (
    R50,
    R101,
    R152,
    Depths,
    Pointwise,
    ResidualBackbone,
    arranged,
    classes_of,
    depths_of,
    rename_pytorchvideo,
    stage_name,
    without_wrapper,
)
from tad.extract.weights import Layout, State, axis_size

Interaction = Literal["reduced", "preserved"]

# What differs between the code bases for one and the same network. The files of mmaction2 and VMZ that were not
# pretrained on IG65M have other statistics than these: nothing in a file says so.
MMACTION2 = {
    "fps": None, "grid_fps": None, "value_range": (0.0, 255.0), "mean": (123.675, 116.28, 103.53),
    "std": (58.395, 57.12, 57.375),
}  # fmt: skip
VMZ = {
    "fps": None, "grid_fps": None, "value_range": (0.0, 1.0), "mean": (0.43216, 0.394666, 0.37645),
    "std": (0.22803, 0.22145, 0.216989),
}  # fmt: skip
PYTORCHVIDEO = {
    "fps": 30.0, "grid_fps": 30.0, "value_range": (0.0, 1.0), "mean": (0.45, 0.45, 0.45), "std": (0.225, 0.225, 0.225),
}  # fmt: skip

IRCSN_152 = BackboneSpec(
    name="ircsn-152",
    modality="rgb",
    frames=32,
    interval=2,
    fps=None,
    short_side=256,
    crop=(224, 224),
    value_range=(0.0, 255.0),
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
    width=2048,
    window=32,
    stride=16,
    levels={"s2": LevelInfo(2, 512), "s4": LevelInfo(4, 1024), "s8": LevelInfo(8, 2048)},
)
IPCSN_152 = replace(IRCSN_152, name="ipcsn-152")
IRCSN_50 = replace(IRCSN_152, name="ircsn-50")
IRCSN_101 = replace(
    IRCSN_152, name="ircsn-101", fps=30.0, grid_fps=30.0, value_range=(0.0, 1.0), mean=(0.45,) * 3, std=(0.225,) * 3
)
SPECS: dict[tuple[Depths, str], BackboneSpec] = {
    (R152, "reduced"): IRCSN_152,
    (R152, "preserved"): IPCSN_152,
    (R50, "reduced"): IRCSN_50,
    (R101, "reduced"): IRCSN_101,
}
EPS: dict[Depths, float] = {R50: 1e-3, R101: 1e-5, R152: 1e-3}  # of the published weights of these depths


class Bottleneck(nn.Module):
    """1x1x1, channel-wise 3x3x3 with the stride, 1x1x1 and the shortcut: (B, C, T, H, W) → (B, 4 ``mid``, ...).

    With ``interaction="preserved"`` another 1x1x1 convolution, with a batch norm but no ReLU, stands before the
    channel-wise one.
    """

    def __init__(self, in_channels: int, mid: int, *, stride: int, interaction: Interaction, eps: float) -> None:
        super().__init__()
        channels, strides = 4 * mid, (stride, stride, stride)
        self.conv1 = Pointwise(in_channels, mid, eps=eps)
        self.mix = Pointwise(mid, mid, eps=eps, relu=False) if interaction == "preserved" else None
        self.conv2 = ConvNorm(mid, mid, kernel=(3, 3, 3), stride=strides, groups=mid, eps=eps)
        self.conv3 = Pointwise(mid, channels, eps=eps, relu=False)
        self.shortcut: Pointwise | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = Pointwise(in_channels, channels, stride=strides, eps=eps, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        y = y if self.mix is None else self.mix(y)
        y = self.conv3(self.conv2(y))
        return y.add_(x if self.shortcut is None else self.shortcut(x)).relu_()


class CSN(ResidualBackbone):
    """Clips (B, 3, T, H, W) → features (B, 2048), the global mean of ``res5``; levels ``s2`` (``res3``: B, 512, T/2,
    H/8, W/8), ``s4`` (``res4``: B, 1024, T/4, H/16, W/16) and ``s8`` (``res5``: B, 2048, T/8, H/32, W/32), sizes
    rounded up.

    Parameters
    ----------
    depths : bottlenecks of the four stages.
    interaction : ``reduced`` (ir) or ``preserved`` (ip).
    eps : of the batch norms; default: that of the published weights of this depth.
    classes : outputs of :meth:`classify`; ``None`` for no classifier.
    dropout : before the classifier in training.

    Raises
    ------
    RecipeError : no network of these depths and interaction is published.
    """

    def __init__(
        self,
        *,
        depths: Depths = R152,
        interaction: Interaction = "reduced",
        eps: float | None = None,
        classes: int | None = 400,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if (depths, interaction) not in SPECS:
            known = ", ".join(f"{spec.name} {key[0]} {key[1]}" for key, spec in SPECS.items())
            raise RecipeError(f"no CSN has the depths {depths} with interaction '{interaction}'. Known: {known}")
        self.spec = SPECS[depths, interaction]
        self.dropout = dropout
        eps = EPS[depths] if eps is None else eps
        self.stem = ConvNorm(3, 64, kernel=(3, 7, 7), stride=(1, 2, 2), eps=eps)
        channels = 64
        stages: list[list[nn.Module]] = []
        for number, (depth, stride) in enumerate(zip(depths, (1, 2, 2, 2), strict=True)):
            stages.append([])
            for index in range(depth):
                first = stride if index == 0 else 1
                stages[-1].append(Bottleneck(channels, 64 << number, stride=first, interaction=interaction, eps=eps))
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
        x = max_pool(x, (1, 3, 3), (1, 2, 2), [(0, 0), (1, 1), (1, 1)])  # (B, 64, T, H/4, W/4)
        return self.outputs(self.run_stages(x), levels=levels)


# ---- how public files name the tensors -------------------------------------------------------------------------------


def rename_mmaction2(key: str) -> str:
    """``backbone.layer1.0.conv2.0.conv.weight`` → ``res2.0.conv2.conv.weight``, and so on (ir)."""
    key = re.sub(r"^backbone\.layer(\d)\.", stage_name, key.removeprefix("model."))
    key = re.sub(r"^backbone\.conv1\.", "stem.", key)
    key = re.sub(r"^cls_head\.fc_cls\.", "classifier.", key)
    return key.replace(".conv2.0.", ".conv2.").replace(".downsample.", ".shortcut.")


def rename_mmaction2_ip(key: str) -> str:
    """Like :func:`rename_mmaction2`; ``conv2.0`` is the 1x1x1 convolution and ``conv2.1`` the channel-wise one (ip)."""
    return rename_mmaction2(key.replace(".conv2.0.", ".mix.").replace(".conv2.1.", ".conv2."))


def rename_vmz(key: str) -> str:
    """``layer1.0.conv2.1.weight`` → ``res2.0.conv2.bn.weight``, and so on (ir)."""
    key = re.sub(r"^layer(\d)\.", stage_name, key.removeprefix("model."))
    key = re.sub(r"^fc\.", "classifier.", key)
    key = key.replace(".downsample.", ".shortcut.")
    key = re.sub(r"^(stem|res\d\.\d+\.\w+)\.0\.(?=\w+$)", r"\1.conv.", key)
    return re.sub(r"^(stem|res\d\.\d+\.\w+)\.1\.(?=\w+$)", r"\1.bn.", key)


def rename_vmz_ip(key: str) -> str:
    """Like :func:`rename_vmz`; ``conv2.0.{0,1}`` is the 1x1x1 convolution, ``conv2.0.2`` the channel-wise one (ip)."""
    key = re.sub(r"\.conv2\.0\.2\.", ".conv2.0.", key)
    return rename_vmz(re.sub(r"\.conv2\.0\.([01])\.", r".mix.\1.", key))


def read_mmaction2(state: State) -> dict[str, Any]:
    state = without_wrapper(state)
    preserved = "backbone.layer1.0.conv2.1.conv.weight" in state
    return {
        "depths": depths_of(state, r"backbone\.layer(\d)\.(\d+)\."),
        "interaction": "preserved" if preserved else "reduced",
        "eps": 1e-3,
        "classes": classes_of(state, "cls_head.fc_cls.weight"),
    }


def read_vmz(state: State) -> dict[str, Any]:
    state = without_wrapper(state)
    preserved = "layer1.0.conv2.0.0.weight" in state
    return {
        "depths": depths_of(state, r"layer(\d)\.(\d+)\."),
        "interaction": "preserved" if preserved else "reduced",
        "eps": 1e-3,
        "classes": classes_of(state, "fc.weight"),
        "dropout": 0.0,
    }


def read_pytorchvideo(state: State) -> dict[str, Any]:
    """Of the networks of this family only CSN has channel-wise convolutions."""
    state = without_wrapper(state)
    separated = axis_size(state, "blocks.1.res_blocks.0.branch2.conv_b.weight", 1) == 1
    return {
        "depths": depths_of(state, r"blocks\.(\d)\.res_blocks\.(\d+)\."),
        "interaction": "reduced" if separated else "full (convolutions that are not channel-wise)",
        "eps": 1e-5,
        "classes": classes_of(state, "blocks.5.proj.weight"),
        "dropout": 0.0,
    }


LAYOUTS = (
    Layout("mmaction2 CSN", read_mmaction2, rename_mmaction2, MMACTION2),
    Layout("VMZ CSN", read_vmz, rename_vmz, VMZ),
    Layout("pytorchvideo ResNet (Slow, I3D-R50, C2D, CSN)", read_pytorchvideo, rename_pytorchvideo, PYTORCHVIDEO),
)
IP_LAYOUTS = (
    Layout("mmaction2 CSN", read_mmaction2, rename_mmaction2_ip, MMACTION2),
    Layout("VMZ CSN", read_vmz, rename_vmz_ip, VMZ),
)
