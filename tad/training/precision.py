"""Mixed precision: the types by name, and a fault of a library that no training may run into."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tad.errors import RecipeError

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass in ``precision``, a key of :data:`AUTOCAST`; with ``fp32`` it does nothing."""
    dtype = AUTOCAST[precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def guard_gradients(module: nn.Module, *, device: torch.device, precision: str) -> None:
    """Let 3-D convolutions that learn in bfloat16 on the CPU refuse two frames.

    The gradient of a kernel of several frames over an input of exactly two is then arbitrary memory, not always NaN:
    so with oneDNN of torch 2.13; fp16 and fp32, other lengths, and CUDA are right. The forward pass raises
    :class:`RecipeError` instead.
    """
    if device.type != "cpu" or precision != "bf16":
        return
    for inner in module.modules():
        if isinstance(inner, nn.Conv3d) and inner.kernel_size[0] > 1:
            inner.register_forward_pre_hook(_refuse_two_frames)


def _refuse_two_frames(convolution: nn.Module, inputs: tuple[Any, ...]) -> None:
    if torch.is_grad_enabled() and next(convolution.parameters()).requires_grad and inputs[0].shape[2] == 2:
        raise RecipeError(
            "precision bf16 on the CPU: a convolution over time sees two frames here, and torch then computes a wrong "
            "gradient for it. Take precision fp32, a CUDA device, or clips of another length"
        )
