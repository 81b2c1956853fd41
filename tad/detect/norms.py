"""Normalisation that does not see padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MaskedGroupNorm(nn.Module):
    """Group normalisation whose statistics are those of real rows; on sequences without padding ``nn.GroupNorm``."""

    def __init__(self, groups: int, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, C, T) → (B, C, T); what comes out in padding is for the caller to mask."""
        if mask is None:
            return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        y = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (self.groups, -1))  # (B, G, C / G, T)
        real = mask[:, None].to(y.dtype)  # (B, 1, 1, T)
        count = real.sum((2, 3), keepdim=True).clamp(min=1) * y.shape[2]
        centred = y - (y * real).sum((2, 3), keepdim=True) / count
        variance = (centred * real).square().sum((2, 3), keepdim=True) / count
        y = (centred * (variance + self.eps).rsqrt()).flatten(1, 2)
        return (y * self.weight[:, None] + self.bias[:, None]).to(x.dtype)
