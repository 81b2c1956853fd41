"""Convolution of stride 1 over short sequences with many channels, as products of matrices.

On a CPU ``conv1d`` brings sequences of 128 to 512 channels and some hundred rows into another layout and back, most of
all in its gradient, where a product of matrices reads them as they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

NARROW = 128  # channels; with fewer, conv1d is as fast


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution with stride 1 and as many rows as before: (B, C, T), (O, C, k) with k odd, (O,) → (B, O, T).

    What ``F.conv1d(x, weight, bias, padding=k // 2)`` gives.
    """
    single = weight.shape[2] == 1
    if x.device.type != "cpu" or (len(weight) < NARROW and not single):
        if single:
            return torch.matmul(weight[..., 0], x) + bias[:, None]
        return F.conv1d(x, weight, bias, padding=weight.shape[2] // 2)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    found: Tensor = _Convolution.apply(x, weight, bias)
    return found


class _Convolution(torch.autograd.Function):
    """Row t: ``bias`` and the sum over taps j of ``weight[..., j] @ x[..., t + j - k // 2]``, where there is a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        taps = weight.permute(2, 0, 1).contiguous()  # (k, O, C)
        ctx.save_for_backward(x, taps)
        y = x.new_empty(len(x), weight.shape[0], x.shape[2])  # (B, O, T)
        for one_x, one_y in zip(x, y, strict=True):
            torch.addmm(bias[:, None], taps[len(taps) // 2], one_x, out=one_y)
            for j, to, source in _outer_taps(taps, x.shape[2]):
                one_y[:, to].addmm_(taps[j], one_x[:, source])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, taps = ctx.saved_tensors
        middle, outer = len(taps) // 2, list(_outer_taps(taps, x.shape[2]))
        to_taps = torch.zeros_like(taps)
        to_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None  # (B, C, T)
        for b, (one_x, one_slope) in enumerate(zip(x, slope, strict=True)):
            to_taps[middle].addmm_(one_slope, one_x.T)
            for j, to, source in outer:
                to_taps[j].addmm_(one_slope[:, to], one_x[:, source].T)
            if to_x is not None:
                torch.mm(taps[middle].T, one_slope, out=to_x[b])
                for j, to, source in outer:
                    to_x[b, :, source].addmm_(taps[j].T, one_slope[:, to])
        return to_x, to_taps.permute(1, 2, 0), slope.sum((0, 2))


def _outer_taps(taps: Tensor, rows: int) -> Iterator[tuple[int, slice, slice]]:
    """Every tap but the middle one: its index, the rows that it adds to and those that it reads, if it reads any."""
    for j in range(len(taps)):
        shift = j - len(taps) // 2
        behind, before = max(shift, 0), max(-shift, 0)
        if shift and abs(shift) < rows:
            yield j, slice(before, rows - behind), slice(behind, rows - before)
