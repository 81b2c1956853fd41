"""ResNets over space and time whose convolutions in time are 1x1 or 3x1 ones: Slow (SlowOnly), I3D-R50 and C2D-R50.

Slow is the slow pathway of Feichtenhofer et al., "SlowFast Networks for Video Recognition", ICCV 2019, table 1, by
itself; I3D and C2D with a ResNet are those of Wang et al., "Non-local Neural Networks", CVPR 2018, section 4. Public
weights: pytorchvideo, PySlowFast (its own and Caffe2 files), mmaction2. Stem, block and pathway here, and the naming of
their tensors, are also those of ``slowfast.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tad.errors import RecipeError, WeightsError, did_you_mean
from tad.extract.backbones.base import Backbone, BackboneSpec, LevelInfo
from tad.extract.backbones.i3d import max_pool
from tad.extract.backbones.layers import ConvNorm
from tad.extract.caffe2 import pyslowfast_name
from tad.extract.weights import Layout, State, axis_size

Kernels = tuple[tuple[int, ...], ...]  # in time, of the first convolution of every block, by stage
Source = Literal["pytorchvideo", "mmaction2"]  # whose recipe; PySlowFast's is pytorchvideo's

STAGES = ("res2", "res3", "res4", "res5")
# Per source: what training did to the pixels, and the rate at which its frame intervals are defined.
PREPARATION: dict[str, dict[str, Any]] = {
    "pytorchvideo": {
        "fps": 30.0,
        "grid_fps": 30.0,
        "value_range": (0.0, 1.0),
        "mean": (0.45, 0.45, 0.45),
        "std": (0.225, 0.225, 0.225),
    },
    "mmaction2": {
        "fps": None,
        "value_range": (0.0, 255.0),
        "mean": (123.675, 116.28, 103.53),
        "std": (58.395, 57.12, 57.375),
    },
}
SLOW: Kernels = ((1,) * 3, (1,) * 4, (3,) * 6, (3,) * 3)
I3D: Kernels = ((3,) * 3, (3, 1) * 2, (3, 1) * 3, (1, 3, 1))
C2D: Kernels = ((1,) * 3, (1,) * 4, (1,) * 6, (1,) * 3)
# What makes a network the one of its name; C2D's port is read off its file, see ``ResNet3D``.
NETWORKS: dict[str, dict[str, Any]] = {
    "slow-r50": {"source": "pytorchvideo", "stem_kernel": 1, "kernels": SLOW, "port": "nopool"},
    "i3d-r50": {"source": "pytorchvideo", "stem_kernel": 5, "kernels": I3D, "port": "pool"},
    "c2d-r50": {"source": "pytorchvideo", "stem_kernel": 1, "kernels": C2D},
    "slowonly-r50": {"source": "mmaction2", "stem_kernel": 1, "kernels": SLOW, "port": "nopool"},
    "i3d-r50-mm": {"source": "mmaction2", "stem_kernel": 5, "kernels": I3D, "port": "pool"},
}
PORTS = ("pool", "nopool")
SOURCES = tuple(PREPARATION)


class Bottleneck(nn.Module):
    """Residual block (B, ``in_channels``, T, H, W) → (B, 4 ``inner``, T, H/s, W/s): a kernel in time, one in space with
    the stride ``s``, one that widens; on the shortcut a convolution where width or size change.
    """

    def __init__(self, *, in_channels: int, inner: int, kernel: int, stride: int) -> None:
        super().__init__()
        channels = 4 * inner
        self.a = ConvNorm(in_channels, inner, kernel=(kernel, 1, 1))
        self.b = ConvNorm(inner, inner, kernel=(1, 3, 3), stride=(1, stride, stride))
        self.c = ConvNorm(inner, channels, relu=False)
        assert self.c.bn is not None
        # Untrained blocks add little to their shortcut, else 33 of them would raise the signal a thousandfold.
        nn.init.constant_(self.c.bn.weight, 0.2)
        self.shortcut = (
            ConvNorm(in_channels, channels, stride=(1, stride, stride), relu=False)
            if stride != 1 or in_channels != channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return (self.c(self.b(self.a(x))) + shortcut).relu_()


class Pathway(nn.Module):
    """Stem and four residual stages; whoever owns it calls them one by one.

    Parameters
    ----------
    kernels : of the blocks, see ``Kernels``; their number makes the depth.
    stem_kernel, stem_stride, pool_stride : in time, of the stem's convolution and of the pooling after it.
    width : channels of the stem; the stages have 4, 8, 16 and 32 times as many.
    fused : channels that another pathway joins to the stem's output; to those of res2, res3 and res4 it joins 4, 8 and
    16 times as many.
    """

    def __init__(
        self,
        *,
        kernels: Kernels,
        stem_kernel: int,
        stem_stride: int = 1,
        pool_stride: int = 1,
        width: int = 64,
        fused: int = 0,
    ) -> None:
        super().__init__()
        self.pool_stride = pool_stride
        self.stem = ConvNorm(3, width, kernel=(stem_kernel, 7, 7), stride=(stem_stride, 2, 2))
        in_channels = width + fused
        for index, (name, stage) in enumerate(zip(STAGES, kernels, strict=True)):
            inner = width * 2**index
            blocks = []
            for number, kernel in enumerate(stage):
                stride = 2 if index and not number else 1
                blocks.append(Bottleneck(in_channels=in_channels, inner=inner, kernel=kernel, stride=stride))
                in_channels = 4 * inner
            in_channels += fused * 4 * 2**index
            self.add_module(name, nn.Sequential(*blocks))

    def start(self, x: Tensor) -> Tensor:
        """Stem and max-pooling: (B, 3, T, H, W) → (B, width, T', H/4, W/4)"""
        return max_pool(self.stem(x), (1, 3, 3), (self.pool_stride, 2, 2), [(0, 0), (1, 1), (1, 1)])

    def stage(self, name: str, x: Tensor) -> Tensor:
        """One of ``STAGES``; all but the first halve height and width."""
        result: Tensor = self.get_submodule(name)(x)
        return result


class ResNet3D(Backbone):
    """Clips (B, 3, T, H, W) → features (B, 2048), the global mean of ``res5``; levels ``res3`` (B, 512, T', H/8, W/8),
    ``res4`` (B, 1024, T', H/16, W/16) and ``res5`` (B, 2048, T', H/32, W/32). T' is T for Slow, T/2 with the port
    ``pool``, T/8 for mmaction2's I3D, whose stem strides in time.

    Parameters
    ----------
    source : whose recipe it was trained with, a key of ``PREPARATION``; with mmaction2, stem and first pooling of a
    network with a stem of more than one frame take every second frame.
    stem_kernel : of the stem in time.
    kernels : of the blocks in time, see ``Kernels``.
    port : ``pool`` for a maximum over pairs of frames after ``res2``, ``nopool`` without. It has no weights: C2D's
    files of either kind look alike, those of pytorchvideo pool, that of PySlowFast's Caffe2 zoo does not.
    classes : outputs of :meth:`classify`; ``None`` for no classifier.
    dropout : before the classifier in training.

    Its state dict holds, as ``settings``, the arguments that shapes do not tell: the places of ``source`` and ``port``
    in ``SOURCES`` and ``PORTS``.

    Raises
    ------
    RecipeError : unknown source or port.
    """

    settings: Tensor

    def __init__(
        self,
        *,
        source: Source = "pytorchvideo",
        stem_kernel: int = 1,
        kernels: Kernels = C2D,
        port: str = "pool",
        classes: int | None = 400,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if source not in PREPARATION:
            raise RecipeError(f"there is no recipe of '{source}'.{did_you_mean(source, PREPARATION)}")
        if port not in PORTS:
            raise RecipeError(f"ResNet3D has no port '{port}'.{did_you_mean(port, PORTS)}")
        self.spec = spec_for(source=source, stem_kernel=stem_kernel, kernels=kernels, port=port)
        self.variant = port if "port" not in NETWORKS.get(self.spec.name, {}) else None
        self.register_buffer("settings", torch.tensor([SOURCES.index(source), PORTS.index(port)]))
        self.pool = port == "pool"
        self.dropout = dropout
        stride = _stem_stride(source, stem_kernel)
        self.path = Pathway(kernels=kernels, stem_kernel=stem_kernel, stem_stride=stride, pool_stride=stride)
        self.projection = None if classes is None else nn.Linear(2048, classes)

    def forward(self, clips: Tensor, *, levels: bool = False) -> dict[str, Tensor]:
        """See :meth:`Backbone.forward`; any height and width are admitted."""
        self.check(clips)
        x = self.path.stage("res2", self.path.start(clips))  # (B, 256, T'', H/4, W/4)
        if self.pool:
            x = max_pool(x, (2, 1, 1), (2, 1, 1), [(0, 0)] * 3)  # (B, 256, T', H/4, W/4)
        maps = {}
        for name in STAGES[1:]:
            maps[name] = x = self.path.stage(name, x)
        features = x.mean(dim=(2, 3, 4))  # (B, 2048)
        return {"features": features, **maps} if levels else {"features": features}

    def classify(self, features: Tensor) -> Tensor:
        """See :meth:`Backbone.classify`; features (B, 2048)."""
        return self.classified(self.projection, features)


def _stem_stride(source: str, stem_kernel: int) -> int:
    return 2 if source == "mmaction2" and stem_kernel > 1 else 1


def spec_for(*, source: str, stem_kernel: int, kernels: Kernels, port: str = "pool") -> BackboneSpec:
    """What a ResNet3D of these arguments was trained with; combinations that are not public are called resnet3d."""
    own = {"source": source, "stem_kernel": stem_kernel, "kernels": kernels, "port": port}
    named = (name for name, fixed in NETWORKS.items() if all(own[key] == value for key, value in fixed.items()))
    strided = _stem_stride(source, stem_kernel)
    step = strided**2 * (2 if port == "pool" else 1)  # frames a position
    frames, interval = (32, 2) if strided == 2 else (8, 8)
    return BackboneSpec(
        name=next(named, "resnet3d"),
        modality="rgb",
        frames=frames,
        interval=interval,
        short_side=256,
        crop=(256, 256),
        width=2048,
        window=frames,
        stride=16,
        levels={name: LevelInfo(step, 256 * 2**index) for index, name in enumerate(STAGES) if index},
        # the pooling over pairs drops a last odd one out, so one pair must reach it
        min_frames=1 if port == "nopool" else strided**2 + 1,
        **PREPARATION[source],
    )


SPECS: dict[str, BackboneSpec] = {name: spec_for(**fixed) for name, fixed in NETWORKS.items()}


# ---- how public files name the tensors -------------------------------------------------------------------------------

# Of one block, per source: its tensors' names without .weight, .bias, ... → ours.
PYTORCHVIDEO_BLOCK = {
    "branch1_conv": "shortcut.conv",
    "branch1_norm": "shortcut.bn",
    **{f"branch2.conv_{part}": f"{part}.conv" for part in "abc"},
    **{f"branch2.norm_{part}": f"{part}.bn" for part in "abc"},
}
PYSLOWFAST_BLOCK = {
    "branch1": "shortcut.conv",
    "branch1_bn": "shortcut.bn",
    **{f"branch2.{part}": f"{part}.conv" for part in "abc"},
    **{f"branch2.{part}_bn": f"{part}.bn" for part in "abc"},
}
MMACTION2_BLOCK = {
    **{f"downsample.{kind}": f"shortcut.{kind}" for kind in ("conv", "bn")},
    **{f"conv{i}.{kind}": f"{part}.{kind}" for i, part in enumerate("abc", 1) for kind in ("conv", "bn")},
}


def block_name(rest: str, names: Mapping[str, str]) -> str | None:
    """``branch2.conv_a.weight`` → ``a.conv.weight``; ``None`` where ``names`` has no such tensor."""
    name, _, last = rest.rpartition(".")
    return f"{names[name]}.{last}" if name in names else None


def rename_pytorchvideo(key: str, stages: tuple[int, int, int, int]) -> str:
    """``stages``: the numbers of the four stages among the file's ``blocks``."""
    short = key.removeprefix("model.")
    if match := re.fullmatch(r"blocks\.0\.(conv|norm)\.(\w+)", short):
        return f"path.stem.{'bn' if match[1] == 'norm' else 'conv'}.{match[2]}"
    if match := re.fullmatch(r"blocks\.(\d+)\.res_blocks\.(\d+)\.(.+)", short):
        inside = block_name(match[3], PYTORCHVIDEO_BLOCK)
        if inside and int(match[1]) in stages:
            return f"path.{STAGES[stages.index(int(match[1]))]}.{match[2]}.{inside}"
    return re.sub(rf"^blocks\.{stages[-1] + 1}\.proj\.", "projection.", short)


def rename_pooled(key: str) -> str:
    """pytorchvideo's names where ``blocks.2`` is the pooling after ``res2``."""
    return rename_pytorchvideo(key, (1, 3, 4, 5))


def rename_plain(key: str) -> str:
    """pytorchvideo's names where nothing stands between the stages."""
    return rename_pytorchvideo(key, (1, 2, 3, 4))


def rename_pyslowfast(key: str) -> str:
    short = key.removeprefix("model.")
    if match := re.fullmatch(r"s1\.pathway0_stem\.(.+)", short):
        return f"path.stem.{match[1]}"
    if match := re.fullmatch(r"s([2-5])\.pathway0_res(\d+)\.(.+)", short):
        inside = block_name(match[3], PYSLOWFAST_BLOCK)
        return f"path.res{match[1]}.{match[2]}.{inside}" if inside else short
    return re.sub(r"^head\.projection\.", "projection.", short)


def rename_caffe2(key: str) -> str | None:
    name = pyslowfast_name(key)
    return None if name is None else rename_pyslowfast(name)


def rename_mmaction2(key: str) -> str:
    if match := re.fullmatch(r"backbone\.conv1\.(.+)", key):
        return f"path.stem.{match[1]}"
    if match := re.fullmatch(r"backbone\.layer([1-4])\.(\d+)\.(.+)", key):
        inside = block_name(match[3], MMACTION2_BLOCK)
        return f"path.res{int(match[1]) + 1}.{match[2]}.{inside}" if inside else key
    return re.sub(r"^cls_head\.fc_cls\.", "projection.", key)


def kernels_of(state: State, path: str) -> Kernels:
    """Kernels in time of a pathway's blocks, off its tensors under our names; () for a stage that is not there."""
    depths = [0, 0, 0, 0]
    for key in state:
        if match := re.match(rf"{path}\.res([2-5])\.(\d+)\.", key):
            index = int(match[1]) - 2
            depths[index] = max(depths[index], int(match[2]) + 1)
    return tuple(
        tuple(axis_size(state, f"{path}.{name}.{number}.a.conv.weight", 2) for number in range(depth))
        for name, depth in zip(STAGES, depths, strict=True)
    )


def ours(state: State, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """The tensors under our names, for reading their shapes."""
    return {name: tensor for key, tensor in state.items() if (name := rename(key)) is not None}


def classes_of(state: State) -> int | None:
    """Outputs of the classifier, of tensors under our names."""
    return axis_size(state, "projection.weight", 0) if "projection.weight" in state else None


def _layout(family: str, source: Source, rename: Callable[[str], str | None], port: str | None = None) -> Layout:
    def arguments(state: State) -> dict[str, Any]:
        """``port`` is what the file's names tell, or what the network of these kernels has."""
        named = ours(state, rename)
        kernels = kernels_of(named, "path")
        stem = axis_size(named, "path.stem.conv.weight", 2)
        flat = named["path.stem.conv.weight"].ndim != 5  # a network of pictures, not ours
        pools = port or ("nopool" if kernels == SLOW else "pool")
        return {
            "source": source,
            "stem_kernel": 0 if flat else stem,
            "kernels": kernels,
            "port": pools,
            "classes": classes_of(named),
        }

    return Layout(family, arguments, rename)


def _own_arguments(state: State) -> dict[str, Any]:
    """Of a file of ours."""
    source, port = settings_of(state, (len(SOURCES), len(PORTS)))
    return {
        "source": SOURCES[source],
        "stem_kernel": axis_size(state, "path.stem.conv.weight", 2),
        "kernels": kernels_of(state, "path"),
        "port": PORTS[port],
        "classes": classes_of(state),
    }


def settings_of(state: State, limits: tuple[int, ...]) -> list[int]:
    """The numbers of ``settings``, each from 0 to below its limit. Raises :class:`WeightsError` where it has others."""
    numbers = state["settings"].tolist() if "settings" in state else None
    if not isinstance(numbers, list) or len(numbers) != len(limits):
        raise WeightsError(f"settings {'is missing' if numbers is None else f'is {numbers}'}, the network needs it")
    if any(not (isinstance(n, int) and 0 <= n < limit) for n, limit in zip(numbers, limits, strict=True)):
        raise WeightsError(f"settings is {numbers}, expected whole numbers from 0 to below {limits}")
    return numbers


def without_settings(key: str) -> str | None:
    """Our own names; what ``settings`` says is an argument of the network already."""
    return None if key == "settings" else key


_PYTORCHVIDEO = "pytorchvideo ResNet (Slow, I3D-R50, C2D, CSN)"
PLAIN = _layout(_PYTORCHVIDEO, "pytorchvideo", rename_plain, "nopool")
POOLED = _layout(_PYTORCHVIDEO, "pytorchvideo", rename_pooled, "pool")
PYSLOWFAST = _layout("PySlowFast ResNet (Slow, I3D-R50, C2D)", "pytorchvideo", rename_pyslowfast)
CAFFE2 = _layout("PySlowFast Caffe2 ResNet", "pytorchvideo", rename_caffe2)
CAFFE2_C2D = _layout("PySlowFast Caffe2 ResNet", "pytorchvideo", rename_caffe2, "nopool")
OWN = Layout("tad ResNet3D", _own_arguments, without_settings)
MMACTION2 = _layout("mmaction2 ResNet (TSN, SlowOnly, I3D-R50)", "mmaction2", rename_mmaction2)

LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "slow-r50": (PLAIN, PYSLOWFAST, CAFFE2, OWN),
    "i3d-r50": (POOLED, PYSLOWFAST, CAFFE2, OWN),
    "c2d-r50": (POOLED, PLAIN, PYSLOWFAST, CAFFE2_C2D, OWN),
    "slowonly-r50": (MMACTION2, OWN),
    "i3d-r50-mm": (MMACTION2, OWN),
}
