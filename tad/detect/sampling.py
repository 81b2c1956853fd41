"""Which anchors and proposals a training step learns from."""

from __future__ import annotations

import torch
from torch import Tensor


def balanced_sample(
    positive: Tensor, negative: Tensor, *, count: int, positive_share: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """At most ``count`` examples a row at random, at most ``positive_share`` of them positive, the rest negative.

    ``positive`` and ``negative`` (B, N) bool say which examples are what (neither: ignored). Missing positives are
    replaced by negatives, missing negatives by nothing, as in Faster R-CNN. Returns the chosen positives and negatives,
    (B, N) bool.
    """
    most = int(count * positive_share)
    chosen_positive = _random_subset(positive, torch.full_like(positive.sum(1), most), generator)
    chosen_negative = _random_subset(negative, count - chosen_positive.sum(1), generator)
    return chosen_positive, chosen_negative


def _random_subset(members: Tensor, sizes: Tensor, generator: torch.Generator | None) -> Tensor:
    """A random subset of each row's ``members`` (B, N) bool, of at most ``sizes`` (B,)."""
    if members.shape[1] == 0:
        return members
    keys = torch.rand(members.shape, generator=generator, device=members.device).masked_fill(~members, 2.0)
    order = keys.argsort(1)  # members first, shuffled
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(members.shape[1], device=members.device).expand_as(order)
    )
    return members & (rank < sizes[:, None])
