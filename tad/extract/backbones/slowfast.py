"""SlowFast: a slow pathway over few frames and a thin fast one over all of them, joined after every stage.

Feichtenhofer et al., "SlowFast Networks for Video Recognition", ICCV 2019, table 1 and section 3.4. Public weights:
pytorchvideo, PySlowFast (its own and Caffe2 files), and mmaction2, whose network is another one: it takes every
alpha-th frame for the slow pathway, has neither batch norm nor ReLU on the laterals, and its classifier reads (fast,
slow).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tad.errors import RecipeError, did_you_mean
from tad.extract.backbones.base import Backbone, BackboneSpec, LevelInfo
from tad.extract.backbones.layers import ConvNorm
from tad.extract.backbones.resnet3d import (
    MMACTION2_BLOCK,
    PREPARATION,
    PYSLOWFAST_BLOCK,
    PYTORCHVIDEO_BLOCK,
    SOURCES,
    STAGES,
    Kernels,
    Pathway,
    Source,
    block_name,
    classes_of,
    kernels_of,
    ours,
    settings_of,
    without_settings,
)
from tad.extract.caffe2 import pyslowfast_name
from tad.extract.weights import Layout, State, axis_size

Depths = tuple[int, int, int, int]  # blocks of res2 to res5

R50: Depths = (3, 4, 6, 3)
R101: Depths = (3, 4, 23, 3)
SLOW_WIDTH, FAST_WIDTH = 2048, 256

# What makes a network the one of its name. NxM: the slow pathway sees N frames, M apart, so 8x8 are 32 frames, 2 apart.
NETWORKS: dict[str, dict[str, Any]] = {
    "slowfast-r50": {
        "source": "pytorchvideo", "slow_depths": R50, "fast_depths": R50, "temporal_blocks": (6, 6),
        "fusion_kernel": 7, "alpha": 4, "frames": 32,
    },
    "slowfast-r50-4x16": {
        "source": "pytorchvideo", "slow_depths": R50, "fast_depths": R50, "temporal_blocks": (6, 6),
        "fusion_kernel": 5, "alpha": 8, "frames": 32,
    },
    "slowfast-r101": {
        "source": "pytorchvideo", "slow_depths": R101, "fast_depths": R101, "temporal_blocks": (23, 23),
        "fusion_kernel": 5, "alpha": 4, "frames": 32,
    },
    "slowfast-r101-16x8": {
        "source": "pytorchvideo", "slow_depths": R101, "fast_depths": R101, "temporal_blocks": (6, 6),
        "fusion_kernel": 5, "alpha": 4, "frames": 64,
    },
    "slowfast-r50-mm": {
        "source": "mmaction2", "slow_depths": R50, "fast_depths": R50, "temporal_blocks": (6, 6),
        "fusion_kernel": 7, "alpha": 4, "frames": 32,
    },
    "slowfast-r50-4x16-mm": {
        "source": "mmaction2", "slow_depths": R50, "fast_depths": R50, "temporal_blocks": (6, 6),
        "fusion_kernel": 5, "alpha": 8, "frames": 32,
    },
    "slowfast-r101-mm": {
        "source": "mmaction2", "slow_depths": R101, "fast_depths": R101, "temporal_blocks": (23, 23),
        "fusion_kernel": 7, "alpha": 4, "frames": 32,
    },
    "slowfast-r101-r50-mm": {
        "source": "mmaction2", "slow_depths": R101, "fast_depths": R50, "temporal_blocks": (23, 6),
        "fusion_kernel": 5, "alpha": 8, "frames": 32,
    },
}  # fmt: skip


class SlowFast(Backbone):
    """Clips (B, 3, T, H, W), T a multiple of ``alpha`` → features (B, 2304): the global means of the slow pathway's
    ``res5`` (2048), then of the fast one's (256). Levels ``res3`` (B, 576, T/alpha, H/8, W/8), ``res4`` (B, 1152,
    T/alpha, H/16, W/16) and ``res5`` (B, 2304, T/alpha, H/32, W/32): the slow map, then the fast one averaged over
    each ``alpha`` frames.

    Parameters
    ----------
    source : whose network it is, ``pytorchvideo`` (PySlowFast's is the same) or ``mmaction2``, see above.
    slow_depths, fast_depths : blocks of each stage.
    temporal_blocks : how many of ``res4``'s blocks, from its first, have a kernel in time: (slow, fast). All of
    ``res5`` have one, and all of the fast pathway's ``res2`` and ``res3``.
    fusion_kernel : of the laterals in time.
    alpha : frames of the fast pathway for each of the slow one.
    frames : of the clips that it was trained with; any multiple of ``alpha`` is admitted.
    classes : outputs of :meth:`classify`; ``None`` for no classifier.
    dropout : before the classifier in training.

    Its state dict holds, as ``settings``, the arguments that shapes do not tell: the place of ``source`` in
    ``SOURCES``, ``alpha`` and ``frames``.

    Raises
    ------
    RecipeError : unknown source.
    """

    settings: Tensor

    def __init__(
        self,
        *,
        source: Source = "pytorchvideo",
        slow_depths: Depths = R50,
        fast_depths: Depths = R50,
        temporal_blocks: tuple[int, int] = (6, 6),
        fusion_kernel: int = 7,
        alpha: int = 4,
        frames: int = 32,
        classes: int | None = 400,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if source not in PREPARATION:
            raise RecipeError(f"there is no recipe of '{source}'.{did_you_mean(source, PREPARATION)}")
        self.spec = spec_for(
            source=source,
            slow_depths=slow_depths,
            fast_depths=fast_depths,
            temporal_blocks=temporal_blocks,
            fusion_kernel=fusion_kernel,
            alpha=alpha,
            frames=frames,
        )
        self.register_buffer("settings", torch.tensor([SOURCES.index(source), alpha, frames]))
        self.source, self.alpha, self.dropout = source, alpha, dropout
        slow, fast = temporal_blocks
        self.slow = Pathway(kernels=_kernels(1, slow_depths, slow), stem_kernel=1, fused=16)
        self.fast = Pathway(kernels=_kernels(3, fast_depths, fast), stem_kernel=5, width=8)
        normed = source == "pytorchvideo"
        self.laterals = nn.ModuleList(
            ConvNorm(
                channels, 2 * channels, kernel=(fusion_kernel, 1, 1), stride=(alpha, 1, 1), norm=normed, relu=normed
            )
            for channels in (8, 32, 64, 128)
        )
        self.projection = None if classes is None else nn.Linear(SLOW_WIDTH + FAST_WIDTH, classes)

    def forward(self, clips: Tensor, *, levels: bool = False) -> dict[str, Tensor]:
        """See :meth:`Backbone.forward`; any height and width are admitted.

        Raises
        ------
        RecipeError : clips of a number of frames that ``alpha`` does not divide, or that :meth:`check` refuses.
        """
        self.check(clips)
        if clips.shape[2] % self.alpha:
            raise RecipeError(
                f"{self.spec.name} takes clips of a multiple of {self.alpha} frames, got {clips.shape[2]}: "
                "choose such a --window"
            )
        fast = self.fast.start(clips)  # (B, 8, T, H/4, W/4)
        slow = self.slow.start(self.slow_frames(clips))  # (B, 64, T/alpha, H/4, W/4)
        maps = {}
        for name, lateral in zip(STAGES, self.laterals, strict=True):
            slow = self.slow.stage(name, torch.cat([slow, lateral(fast)], dim=1))
            fast = self.fast.stage(name, fast)
            if levels and name != "res2":
                thinned = fast.unflatten(2, (-1, self.alpha)).mean(dim=3)  # (B, C/8, T/alpha, H', W')
                maps[name] = torch.cat([slow, thinned], dim=1)  # (B, C + C/8, T/alpha, H', W')
        features = torch.cat([slow.mean(dim=(2, 3, 4)), fast.mean(dim=(2, 3, 4))], dim=1)  # (B, 2304)
        return {"features": features, **maps}

    def slow_frames(self, clips: Tensor) -> Tensor:
        """What the slow pathway sees of clips (B, 3, T, H, W): T/alpha frames from the first to the last, or every
        alpha-th (mmaction2).
        """
        if self.source == "mmaction2":
            return clips[:, :, :: self.alpha]
        frames = clips.shape[2]
        # In float32 and on the CPU, as in training: cutting off decimals shows any other rounding as another frame.
        index = torch.linspace(0, frames - 1, frames // self.alpha, dtype=torch.float32, device="cpu").long()
        return clips.index_select(2, index.to(clips.device))

    def classify(self, features: Tensor) -> Tensor:
        """See :meth:`Backbone.classify`; features (B, 2304) as ``forward`` gives them."""
        if self.source == "mmaction2":
            features = features.roll(FAST_WIDTH, dims=1)  # (slow, fast) -> (fast, slow)
        return self.classified(self.projection, features)


def _kernels(first: int, depths: Depths, temporal_blocks: int) -> Kernels:
    """``first``: in time, of the blocks of res2 and res3."""
    res2, res3, res4, res5 = depths
    return (first,) * res2, (first,) * res3, (3,) * temporal_blocks + (1,) * (res4 - temporal_blocks), (3,) * res5


def spec_for(*, source: str, alpha: int, frames: int, **structure: Any) -> BackboneSpec:
    """What a SlowFast of these arguments was trained with; combinations that are not public are called slowfast."""
    own = {"source": source, "alpha": alpha, "frames": frames, **structure}
    return BackboneSpec(
        name=next((name for name, fixed in NETWORKS.items() if fixed == own), "slowfast"),
        modality="rgb",
        frames=frames,
        interval=2,
        short_side=256,
        crop=(256, 256),
        width=SLOW_WIDTH + FAST_WIDTH,
        window=frames,
        stride=16,
        levels={name: LevelInfo(alpha, 288 * 2**index) for index, name in enumerate(STAGES) if index},
        min_frames=alpha,
        **PREPARATION[source],
    )


SPECS: dict[str, BackboneSpec] = {name: spec_for(**fixed) for name, fixed in NETWORKS.items()}


# ---- how public files name the tensors -------------------------------------------------------------------------------

PATHS = ("slow", "fast")


def rename_pytorchvideo(key: str) -> str:
    short = key.removeprefix("model.")
    if match := re.fullmatch(r"blocks\.0\.multipathway_blocks\.([01])\.(conv|norm)\.(\w+)", short):
        return f"{PATHS[int(match[1])]}.stem.{'bn' if match[2] == 'norm' else 'conv'}.{match[3]}"
    if match := re.fullmatch(r"blocks\.([0-3])\.multipathway_fusion\.(conv_fast_to_slow|norm)\.(\w+)", short):
        return f"laterals.{match[1]}.{'bn' if match[2] == 'norm' else 'conv'}.{match[3]}"
    if match := re.fullmatch(r"blocks\.([1-4])\.multipathway_blocks\.([01])\.res_blocks\.(\d+)\.(.+)", short):
        inside = block_name(match[4], PYTORCHVIDEO_BLOCK)
        return f"{PATHS[int(match[2])]}.res{int(match[1]) + 1}.{match[3]}.{inside}" if inside else short
    return re.sub(r"^blocks\.6\.proj\.", "projection.", short)


def rename_pyslowfast(key: str) -> str:
    short = key.removeprefix("model.")
    if match := re.fullmatch(r"s1\.pathway([01])_stem\.(.+)", short):
        return f"{PATHS[int(match[1])]}.stem.{match[2]}"
    if match := re.fullmatch(r"s([1-4])_fuse\.(conv_f2s|bn)\.(\w+)", short):
        return f"laterals.{int(match[1]) - 1}.{'bn' if match[2] == 'bn' else 'conv'}.{match[3]}"
    if match := re.fullmatch(r"s([2-5])\.pathway([01])_res(\d+)\.(.+)", short):
        inside = block_name(match[4], PYSLOWFAST_BLOCK)
        return f"{PATHS[int(match[2])]}.res{match[1]}.{match[3]}.{inside}" if inside else short
    return re.sub(r"^head\.projection\.", "projection.", short)


def rename_caffe2(key: str) -> str | None:
    name = pyslowfast_name(key)
    return None if name is None else rename_pyslowfast(name)


def rename_mmaction2(key: str) -> str:
    if match := re.fullmatch(r"backbone\.slow_path\.(?:conv1|layer([1-3]))_lateral\.(.+)", key):
        return f"laterals.{match[1] or 0}.{match[2]}"
    if match := re.fullmatch(r"backbone\.(slow|fast)_path\.conv1\.(.+)", key):
        return f"{match[1]}.stem.{match[2]}"
    if match := re.fullmatch(r"backbone\.(slow|fast)_path\.layer([1-4])\.(\d+)\.(.+)", key):
        inside = block_name(match[4], MMACTION2_BLOCK)
        return f"{match[1]}.res{int(match[2]) + 1}.{match[3]}.{inside}" if inside else key
    return re.sub(r"^cls_head\.fc_cls\.", "projection.", key)


def _structure(state: State) -> dict[str, Any]:
    """What shapes tell, of tensors under our names."""
    slow, fast = kernels_of(state, "slow"), kernels_of(state, "fast")
    return {
        "slow_depths": tuple(len(stage) for stage in slow),
        "fast_depths": tuple(len(stage) for stage in fast),
        "temporal_blocks": (slow[2].count(3), fast[2].count(3)),
        "fusion_kernel": axis_size(state, "laterals.0.conv.weight", 2),
    }


def _own_arguments(state: State) -> dict[str, Any]:
    """Of a file of ours."""
    source, alpha, frames = settings_of(state, (len(SOURCES), 1024, 2**20))
    sampling = {"alpha": max(alpha, 1), "frames": max(frames, 1)}
    return {"source": SOURCES[source], **_structure(state), **sampling, "classes": classes_of(state)}


def _layout(family: str, source: Source, rename: Callable[[str], str | None]) -> Layout:
    def arguments(state: State) -> dict[str, Any]:
        """``alpha`` and ``frames`` leave no trace in the weights: they are those of the network of this structure."""
        named = ours(state, rename)
        structure = {"source": source, **_structure(named)}
        known = [fixed for fixed in NETWORKS.values() if structure.items() <= fixed.items()]
        sampling = {key: known[0][key] for key in ("alpha", "frames")} if known else {"alpha": 4, "frames": 32}
        return {**structure, **sampling, "classes": classes_of(named)}

    return Layout(family, arguments, rename)


OWN = Layout("tad SlowFast", _own_arguments, without_settings)
LAYOUTS = (
    _layout("pytorchvideo SlowFast", "pytorchvideo", rename_pytorchvideo),
    _layout("PySlowFast SlowFast", "pytorchvideo", rename_pyslowfast),
    _layout("PySlowFast Caffe2 SlowFast", "pytorchvideo", rename_caffe2),
    OWN,
)
LAYOUTS_MMACTION2 = (_layout("mmaction2 SlowFast", "mmaction2", rename_mmaction2), OWN)
