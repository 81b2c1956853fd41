"""What residual networks of several papers share: stages, classifier, and how files name blocks and stages."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad.extract.backbones import own
from tad.extract.backbones.base import Backbone
from tad.extract.backbones.layers import ConvNorm
from tad.extract.weights import State, axis_size

Depths = tuple[int, ...]

R50: Depths = (3, 4, 6, 3)  # bottlenecks of res2, res3, res4, res5
R101: Depths = (3, 4, 23, 3)
R152: Depths = (3, 8, 36, 3)


class Pointwise(ConvNorm):
    """A 1x1x1 convolution with its batch norm. On the CPU, where channels lie next to each other in memory, it is the
    matrix product that it stands for: the same to rounding, and with it the whole network is a fifth faster.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) → (B, channels, T', H', W')"""
        if x.device.type != "cpu" or not x.is_contiguous(memory_format=torch.channels_last_3d):
            return super().forward(x)
        time, height, width = self.conv.stride
        x = x[:, :, ::time, ::height, ::width].permute(0, 2, 3, 4, 1)  # (B, T', H', W', C)
        x = F.linear(x, self.conv.weight.flatten(1), self.conv.bias).permute(0, 4, 1, 2, 3)
        if self.bn is not None:
            x = self.bn(x)
        return x.relu_() if self.relu else x


class ResidualBackbone(Backbone):
    """What the residual networks share: the stages ``res2`` … ``res5``, of which the last three are the levels in the
    order of ``spec.levels``, and a linear classifier. Subclasses set ``spec``, ``dropout`` and ``classifier``, and add
    the stages.
    """

    classifier: nn.Linear | None

    def get_extra_state(self) -> Tensor:
        """What the network is, as a tensor of the state dict: networks of these papers differ in what shapes do not
        tell (shifts, epsilon, normalisation), and a state dict under our own names must load again.
        """
        text = b"" if self.arguments is None else json.dumps(own.described(self)).encode()
        return torch.tensor(list(text), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Nothing to take over: the description is of how the network was made."""

    def add_stages(self, stages: list[list[nn.Module]]) -> None:
        """The blocks of ``res2`` … ``res5``."""
        for number, blocks in enumerate(stages, start=2):
            self.add_module(f"res{number}", nn.Sequential(*blocks))

    def run_stages(self, x: Tensor) -> list[Tensor]:
        """The stem's output → the outputs of ``res3``, ``res4`` and ``res5``."""
        maps = []
        for name in ("res2", "res3", "res4", "res5"):
            x = self.get_submodule(name)(x)
            maps.append(x)
        return maps[1:]

    def outputs(self, maps: list[Tensor], *, levels: bool) -> dict[str, Tensor]:
        """Maps (B, C, T', H', W') of ``res3``, ``res4``, ``res5`` → what :meth:`Backbone.forward` gives."""
        features = {"features": maps[-1].mean(dim=(2, 3, 4))}  # (B, D)
        return {**features, **dict(zip(self.spec.levels, maps, strict=True))} if levels else features

    def classify(self, features: Tensor) -> Tensor:
        """See :meth:`Backbone.classify`."""
        return self.classified(self.classifier, features)


def arranged(clips: Tensor) -> Tensor:
    """On the CPU channels last, with which the convolutions are faster, channel-wise ones most; the values stay."""
    return clips.contiguous(memory_format=torch.channels_last_3d) if clips.device.type == "cpu" else clips


# ---- how public files name the tensors -------------------------------------------------------------------------------


def without_wrapper(state: State) -> dict[str, Tensor]:
    """The tensors without the ``model.`` that some trainers put before every name."""
    return {key.removeprefix("model."): tensor for key, tensor in state.items()}


def depths_of(state: State, pattern: str) -> Depths:
    """Residual blocks a stage, the stages in order. ``pattern`` has two groups: the stage's number and the block's."""
    blocks: dict[int, set[int]] = {}
    for key in state:
        if match := re.match(pattern, key):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    return tuple(len(blocks[stage]) for stage in sorted(blocks))


def classes_of(state: State, key: str) -> int | None:
    """Outputs of the classifier whose weight is ``key``, or ``None`` where there is none."""
    return axis_size(state, key, 0) if key in state else None


def stage_name(match: re.Match[str]) -> str:
    """``layer1.`` → ``res2.``"""
    return f"res{int(match[1]) + 1}."


def rename_pytorchvideo(key: str) -> str:
    """``blocks.1.res_blocks.0.branch2.conv_b.weight`` → ``res2.0.conv2.conv.weight``, and so on."""
    key = key.removeprefix("model.")
    key = re.sub(r"^blocks\.([1-4])\.res_blocks\.", stage_name, key)
    key = re.sub(r"^blocks\.0\.", "stem.", key)
    key = re.sub(r"^blocks\.5\.proj\.", "classifier.", key)
    key = re.sub(r"\.branch1_(conv|norm)\.", r".shortcut.\1.", key)
    for letter, number in {"a": "1", "b": "2", "c": "3"}.items():
        key = re.sub(rf"\.branch2\.(conv|norm)_{letter}\.", rf".conv{number}.\1.", key)
    return key.replace(".norm.", ".bn.")
