"""R(2+1)D and its kin: ResNets of basic blocks whose 3x3x3 convolutions are factored into space and time, whole, or
only spatial above the first stage.

Tran, Wang, Torresani, Ray, LeCun and Paluri, "A Closer Look at Spatiotemporal Convolutions for Action Recognition",
CVPR 2018, sections 3.3 to 3.5: R3D, MC3 and R(2+1)D. A spatial convolution into M channels and a temporal one have as
many weights as the 3x3x3 convolution that they replace. Public code differs in what M is taken from, in the stem, in
the shortcut and in the batch norms' epsilon; all but the last can be read off a file. TSP (Alwassel, Giancola and
Ghanem, ICCVW 2021) trains the same networks with a second classifier, action or background, see ``classify_region``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad.errors import RecipeError
from tad.extract.backbones.base import BackboneSpec, LevelInfo
from tad.extract.backbones.i3d import max_pool
from tad.extract.backbones.layers import ConvNorm
from tad.extract.backbones.residual import (
    R50,
    Depths,
    Pointwise,
    ResidualBackbone,
    arranged,
    classes_of,
    depths_of,
    stage_name,
    without_wrapper,
)
from tad.extract.weights import Layout, State, axis_size

Convs = Literal["2+1d", "3d", "mixed"]
Mids = Literal["conv", "block"]

R18: Depths = (2, 2, 2, 2)  # basic blocks of res2, res3, res4, res5
R34: Depths = R50

R2PLUS1D_34 = BackboneSpec(
    name="r2plus1d-34",
    modality="rgb",
    frames=16,
    interval=1,
    fps=15.0,
    grid_fps=15.0,
    short_side=128,
    resize=(128, 171),
    crop=(112, 112),
    value_range=(0.0, 1.0),
    mean=(0.43216, 0.394666, 0.37645),
    std=(0.22803, 0.22145, 0.216989),
    width=512,
    window=16,
    stride=8,
    levels={"s2": LevelInfo(2, 128), "s4": LevelInfo(4, 256), "s8": LevelInfo(8, 512)},
)
R2PLUS1D_18 = replace(R2PLUS1D_34, name="r2plus1d-18")
R3D_18 = replace(R2PLUS1D_34, name="r3d-18")
MC3_18 = replace(
    R2PLUS1D_34,
    name="mc3-18",
    levels={"res3": LevelInfo(1, 128), "res4": LevelInfo(1, 256), "res5": LevelInfo(1, 512)},
)
R2PLUS1D_34_MM = replace(
    R2PLUS1D_34,
    name="r2plus1d-34-mm",
    frames=32,
    interval=2,
    fps=None,
    grid_fps=None,
    short_side=256,
    resize=None,
    crop=(224, 224),
    value_range=(0.0, 255.0),
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
    window=32,
    stride=16,
)
# The files of ig65m count raw frames; there is one for clips of 8 and one for clips of 32, alike but for the weights.
IG65M = {"frames": 32, "fps": None, "grid_fps": None, "window": 32}

# What makes a VideoResNet the one of this name.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "r2plus1d-34": {"convs": "2+1d", "depths": R34, "mids": "conv", "stem_mid": 45, "eps": 1e-3},
    "r2plus1d-18": {"convs": "2+1d", "depths": R18, "mids": "block", "stem_mid": 45, "eps": 1e-5},
    "r2plus1d-34-mm": {
        "convs": "2+1d", "depths": R34, "mids": "conv", "stem_mid": 83, "pool": True, "factored_shortcut": True,
        "eps": 1e-3, "inner_eps": 1e-5, "dropout": 0.5,
    },
    "r3d-18": {"convs": "3d", "depths": R18, "eps": 1e-5},
    "mc3-18": {"convs": "mixed", "depths": R18, "eps": 1e-5},
}  # fmt: skip
SPECS: dict[tuple[str, Depths, bool], BackboneSpec] = {  # by convs, depths, pool
    ("2+1d", R34, False): R2PLUS1D_34,
    ("2+1d", R18, False): R2PLUS1D_18,
    ("2+1d", R34, True): R2PLUS1D_34_MM,
    ("3d", R18, False): R3D_18,
    ("mixed", R18, False): MC3_18,
}


def midplanes(in_channels: int, channels: int, size: int = 3) -> int:
    """Channels between a spatial ``size`` x ``size`` and a temporal convolution of 3, such that the two have about as
    many weights as one of 3 x ``size`` x ``size`` (section 3.5 of the paper).
    """
    return 3 * size * size * in_channels * channels // (size * size * in_channels + 3 * channels)


class Factored(nn.Module):
    """Spatial convolution into ``mid`` channels, batch norm, ReLU, temporal convolution, batch norm and, if asked for,
    ReLU: (B, C, T, H, W) → (B, ``channels``, T', H', W').
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        mid: int,
        size: int = 3,
        length: int = 3,
        stride: tuple[int, int] = (1, 1),
        eps: float,
        inner_eps: float,
        relu: bool,
    ) -> None:
        super().__init__()
        time, space = stride
        self.spatial = ConvNorm(in_channels, mid, kernel=(1, size, size), stride=(1, space, space), eps=inner_eps)
        self.temporal = ConvNorm(mid, channels, kernel=(length, 1, 1), stride=(time, 1, 1), eps=eps, relu=relu)

    def forward(self, x: Tensor) -> Tensor:
        return self.temporal(self.spatial(x))


class BasicBlock(nn.Module):
    """Two convolutions of 3, the first with the stride, and the shortcut: (B, C, T, H, W) → (B, ``channels``, ...)."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        stride: tuple[int, int],
        convs: Literal["2+1d", "3d", "2d"],
        mids: Mids,
        factored_shortcut: bool,
        eps: float,
        inner_eps: float,
    ) -> None:
        super().__init__()
        time, space = stride
        of_block = midplanes(in_channels, channels)
        of_second = of_block if mids == "block" else midplanes(channels, channels)
        self.conv1: nn.Module
        self.conv2: nn.Module
        self.shortcut: nn.Module | None = None
        if convs == "2+1d":
            self.conv1 = Factored(
                in_channels, channels, mid=of_block, stride=stride, eps=eps, inner_eps=inner_eps, relu=True
            )
            self.conv2 = Factored(channels, channels, mid=of_second, eps=eps, inner_eps=inner_eps, relu=False)
        else:
            kernel = (3 if convs == "3d" else 1, 3, 3)
            self.conv1 = ConvNorm(in_channels, channels, kernel=kernel, stride=(time, space, space), eps=eps)
            self.conv2 = ConvNorm(channels, channels, kernel=kernel, eps=eps, relu=False)
        if stride == (1, 1) and in_channels == channels:
            return
        if factored_shortcut:
            mid = midplanes(in_channels, channels, 1)
            self.shortcut = Factored(
                in_channels,
                channels,
                mid=mid,
                size=1,
                length=1,
                stride=stride,
                eps=eps,
                inner_eps=inner_eps,
                relu=False,
            )
        else:
            self.shortcut = Pointwise(in_channels, channels, stride=(time, space, space), eps=eps, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.conv1(x))
        return y.add_(x if self.shortcut is None else self.shortcut(x)).relu_()


class VideoResNet(ResidualBackbone):
    """Clips (B, 3, T, H, W) → features (B, 512), the global mean of ``res5``; levels ``s2`` (``res3``: B, 128, T/2,
    H/4, W/4), ``s4`` (``res4``: B, 256, T/4, H/8, W/8) and ``s8`` (``res5``: B, 512, T/8, H/16, W/16), sizes rounded
    up. With ``convs="mixed"`` time is never strided: ``res3``, ``res4``, ``res5`` (B, ..., T, ...); with ``pool`` H and
    W are halved once more.

    Parameters
    ----------
    depths : basic blocks of the four stages.
    convs : ``2+1d`` (factored), ``3d`` (3x3x3), or ``mixed`` (3x3x3 in the stem and ``res2``, then 1x3x3).
    mids : what the second factored convolution of a block takes its M from: the ``conv`` itself, or the first one's
        channels, one M for the whole ``block``.
    stem_mid : M of the factored stem.
    pool : whether a max-pooling of (1, 3, 3) follows the stem.
    factored_shortcut : whether the strided shortcuts are factored as well.
    eps, inner_eps : of the batch norms, and of those between a spatial and a temporal convolution (default: ``eps``).
    classes : outputs of :meth:`classify`; ``None`` for no classifier.
    regions, region_inputs : outputs and inputs of :meth:`classify_region`; ``None`` for no such classifier.
    dropout : before the classifiers in training.

    Raises
    ------
    RecipeError : no network of these convolutions and depths is published.
    """

    def __init__(
        self,
        *,
        depths: Depths = R34,
        convs: Convs = "2+1d",
        mids: Mids = "conv",
        stem_mid: int = 45,
        pool: bool = False,
        factored_shortcut: bool = False,
        eps: float = 1e-3,
        inner_eps: float | None = None,
        classes: int | None = 400,
        regions: int | None = None,
        region_inputs: int = 1024,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if (convs, depths, pool) not in SPECS:
            known = ", ".join(f"{spec.name} {key}" for key, spec in SPECS.items())
            raise RecipeError(f"no video ResNet has (convs, depths, pool) = {(convs, depths, pool)}. Known: {known}")
        self.spec = SPECS[convs, depths, pool]
        self.pool, self.dropout = pool, dropout
        inner_eps = eps if inner_eps is None else inner_eps
        self.stem: nn.Module
        if convs == "2+1d":
            self.stem = Factored(3, 64, mid=stem_mid, size=7, stride=(1, 2), eps=eps, inner_eps=inner_eps, relu=True)
        else:
            self.stem = ConvNorm(3, 64, kernel=(3, 7, 7), stride=(1, 2, 2), eps=eps)
        channels = 64
        stages: list[list[nn.Module]] = []
        for number, depth in enumerate(depths):
            kind: Literal["2+1d", "3d", "2d"] = ("3d" if number == 0 else "2d") if convs == "mixed" else convs
            first = (1, 1) if number == 0 else (1, 2) if kind == "2d" else (2, 2)
            stages.append([])
            for index in range(depth):
                block = BasicBlock(
                    channels, 64 << number, stride=first if index == 0 else (1, 1), convs=kind, mids=mids,
                    factored_shortcut=factored_shortcut, eps=eps, inner_eps=inner_eps,
                )  # fmt: skip
                stages[-1].append(block)
                channels = 64 << number
        self.add_stages(stages)
        self.classifier = None if classes is None else nn.Linear(channels, classes)
        self.region_classifier = None if regions is None else nn.Linear(region_inputs, regions)

    def forward(self, clips: Tensor, *, levels: bool = False) -> dict[str, Tensor]:
        """See :meth:`Backbone.forward`; any length and any size are admitted.

        Raises
        ------
        RecipeError : clips that are no normalised (B, 3, T, H, W).
        """
        self.check(clips)
        x = self.stem(arranged(clips))  # (B, 64, T, H/2, W/2)
        if self.pool:
            x = max_pool(x, (1, 3, 3), (1, 2, 2), [(0, 0), (1, 1), (1, 1)])  # (B, 64, T, H/4, W/4)
        return self.outputs(self.run_stages(x), levels=levels)

    def classify_region(self, features: Tensor, video_features: Tensor | None = None) -> Tensor:
        """TSP's temporal region classifier: features (B, 512) → logits (B, regions), of action and background
        in the order in which the file was trained.

        ``video_features`` (B, 512) is the global feature of each clip's video, the maximum over its clips' features as
        made before this training; needed where the classifier reads both (1024 inputs).

        Raises
        ------
        RecipeError : there is no such classifier, or it reads ``video_features`` and there are none, or not.
        """
        if self.region_classifier is None:
            raise RecipeError(f"{self.spec.name} has no region classifier: its weights held no fc2")
        inputs = features if video_features is None else torch.cat([features, video_features], dim=1)
        if inputs.shape[1] != self.region_classifier.in_features:
            raise RecipeError(
                f"the region classifier of {self.spec.name} reads {self.region_classifier.in_features} values a clip, "
                f"got {inputs.shape[1]}: with 1024 inputs it needs video_features beside the clip's, with 512 not"
            )
        return self.region_classifier(F.dropout(inputs, self.dropout, self.training))


# ---- how public files name the tensors -------------------------------------------------------------------------------


def rename_whole(key: str) -> str:
    """torchvision and TSP, 3d and mixed: ``features.layer1.0.conv1.1.weight`` → ``res2.0.conv1.bn.weight``; TSP's
    ``fc1`` classifies actions, its ``fc2`` regions.
    """
    key = key.removeprefix("model.").removeprefix("features.")
    key = re.sub(r"^layer(\d)\.", stage_name, key).replace(".downsample.", ".shortcut.")
    key = re.sub(r"^fc1?\.", "classifier.", key)
    key = re.sub(r"^fc2\.", "region_classifier.", key)
    key = re.sub(r"^(stem|res\d\.\d+\.\w+)\.0\.(?=\w+$)", r"\1.conv.", key)
    return re.sub(r"^(stem|res\d\.\d+\.\w+)\.1\.(?=\w+$)", r"\1.bn.", key)


def rename_factored(key: str) -> str:
    """torchvision, ig65m and TSP, 2+1d: ``layer1.0.conv1.0.3.weight`` → ``res2.0.conv1.temporal.conv.weight``."""
    key = re.sub(r"(\.conv[12])\.1\.", r"\1.0.4.", key)  # the outer batch norm, as if it were the fifth of the inner
    key = re.sub(r"(\.conv[12])\.0\.(?=\d\.)", r"\1.", key)
    for index, name in {"0": "spatial.conv", "1": "spatial.bn", "3": "temporal.conv", "4": "temporal.bn"}.items():
        key = re.sub(rf"(stem|\.conv[12])\.{index}\.", rf"\1.{name}.", key)
    return rename_whole(key)


def rename_mmaction2(key: str) -> str:
    """``backbone.layer1.0.conv1.conv.bn_s.weight`` → ``res2.0.conv1.spatial.bn.weight``, and so on."""
    key = re.sub(r"^backbone\.layer(\d)\.", stage_name, key.removeprefix("model."))
    key = re.sub(r"^backbone\.conv1\.", "stem.", key)
    key = re.sub(r"^cls_head\.fc_cls\.", "classifier.", key)
    key = re.sub(r"(stem|\.conv[12]|\.downsample)\.bn\.", r"\1.temporal.bn.", key)
    for theirs, ours in {"conv_s": "spatial.conv", "bn_s": "spatial.bn", "conv_t": "temporal.conv"}.items():
        key = key.replace(f".conv.{theirs}.", f".{ours}.")
    return key.replace(".downsample.", ".shortcut.")


def read_torchvision(state: State) -> dict[str, Any]:
    """Of torchvision, ig65m and TSP. The epsilon goes with the depth: 34 blocks are Caffe2's, 18 torchvision's."""
    state = {key.removeprefix("features."): tensor for key, tensor in without_wrapper(state).items()}
    depths = depths_of(state, r"layer(\d)\.(\d+)\.")
    read = {
        "depths": depths,
        "eps": 1e-3 if depths == R34 else 1e-5,
        "classes": classes_of(state, "fc1.weight" if "fc1.weight" in state else "fc.weight"),
        "regions": classes_of(state, "fc2.weight"),
    }
    if read["regions"] is not None:
        read["region_inputs"] = axis_size(state, "fc2.weight", 1)
    if axis_size(state, "stem.0.weight", 2) == 1:
        first, second = (axis_size(state, f"layer2.0.conv{conv}.0.0.weight", 0) for conv in (1, 2))
        mids = "block" if first == second else "conv"
        return {**read, "convs": "2+1d", "mids": mids, "stem_mid": axis_size(state, "stem.0.weight", 0)}
    return {**read, "convs": "3d" if axis_size(state, "layer2.0.conv1.0.weight", 2) == 3 else "mixed"}


def read_mmaction2(state: State) -> dict[str, Any]:
    state = without_wrapper(state)
    first, second = (axis_size(state, f"backbone.layer2.0.conv{conv}.conv.conv_s.weight", 0) for conv in (1, 2))
    return {
        **ARGUMENTS["r2plus1d-34-mm"],
        "depths": depths_of(state, r"backbone\.layer(\d)\.(\d+)\."),
        "mids": "block" if first == second else "conv",
        "stem_mid": axis_size(state, "backbone.conv1.conv.conv_s.weight", 0),
        "factored_shortcut": "backbone.layer2.0.downsample.conv.conv_s.weight" in state,
        "classes": classes_of(state, "cls_head.fc_cls.weight"),
    }


TSP, TORCHVISION = "TSP R(2+1)D or R3D", "torchvision/ig65m R(2+1)D, R3D or MC3"
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "r2plus1d-34": (
        Layout(TSP, read_torchvision, rename_factored),
        Layout(TORCHVISION, read_torchvision, rename_factored, IG65M),
    ),
    "r2plus1d-18": tuple(Layout(family, read_torchvision, rename_factored) for family in (TSP, TORCHVISION)),
    "r2plus1d-34-mm": (Layout("mmaction2 R(2+1)D", read_mmaction2, rename_mmaction2),),
    "r3d-18": tuple(Layout(family, read_torchvision, rename_whole) for family in (TSP, TORCHVISION)),
    "mc3-18": tuple(Layout(family, read_torchvision, rename_whole) for family in (TSP, TORCHVISION)),
}
