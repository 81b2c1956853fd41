"""What SP-TAD learns from: a one-to-one matching of proposals and truths, and the set prediction loss over it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from tad.detect.segments import generalised_tiou, paired_generalised_tiou

WORST = 1e9  # what a cost that is not a number counts as: the loss itself then says so, with the videos' names


def focal_loss(logits: Tensor, goal: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss of every logit (...,) against ``goal`` (...,) of 0 and 1 (Lin et al., 2017, Eq. 5)."""
    entropy = F.binary_cross_entropy_with_logits(logits, goal, reduction="none")
    probability = logits.sigmoid()
    miss = goal * (1 - probability) + (1 - goal) * probability  # 1 - p_t
    miss = miss.clamp(min=1e-12)  # the slope of a root at 0 is infinite
    return (goal * alpha + (1 - goal) * (1 - alpha)) * miss**gamma * entropy


def matching_cost(
    logits: Tensor,
    segments: Tensor,
    truths: Tensor,
    labels: Tensor,
    *,
    weights: tuple[float, float, float],
    alpha: float,
    gamma: float,
) -> Tensor:
    """What it costs to give each proposal each truth (§3.2.1): (..., N, G).

    ``logits`` (..., N, K), ``segments`` (..., N, 2) and ``truths`` (G, 2) in shares of the clip, ``labels`` (G,).
    ``weights`` of three terms: the focal loss that naming the truth's class would save, the L1 distance of both
    boundaries, and minus the generalised tIoU.
    """
    one = focal_loss(logits, torch.ones_like(logits), alpha=alpha, gamma=gamma)
    none = focal_loss(logits, torch.zeros_like(logits), alpha=alpha, gamma=gamma)
    naming = (one - none)[..., labels]  # (..., N, G)
    distance = (segments[..., :, None, :] - truths).abs().sum(-1)
    return weights[0] * naming + weights[1] * distance - weights[2] * generalised_tiou(segments, truths)


def hungarian(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest one-to-one matching of ``cost`` (..., N, G): ``proposal`` and ``truth`` (..., min(N, G)) int64.

    Costs that are not finite count as :data:`WORST`.
    """
    matrices = torch.nan_to_num(cost.detach().double(), nan=WORST, posinf=WORST, neginf=-WORST).cpu().numpy()
    lead = matrices.shape[:-2]
    pairs = np.zeros((2, *lead, min(matrices.shape[-2:])), np.int64)
    for place in np.ndindex(lead):
        pairs[(0, *place)], pairs[(1, *place)] = linear_sum_assignment(matrices[place])
    proposal, truth = torch.from_numpy(pairs).to(cost.device)
    return proposal, truth


def set_loss(
    logits: Tensor,
    segments: Tensor,
    truths: Sequence[tuple[Tensor, Tensor]],
    *,
    cost_weights: tuple[float, float, float],
    alpha: float,
    gamma: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The terms of the set prediction loss (Eq. 2 and 3), unweighted, one of each for every head: three of (H,).

    Every head is matched with the truth for itself. Focal loss over all proposals and classes, L1 distance of the
    boundaries and ``1 - generalised tIoU`` of the matched ones, each divided by the number of matched truths of the
    batch (at least 1). Of more truths than proposals the dearest to match are left out.

    Parameters
    ----------
    logits : (H, B, N, K). segments : (H, B, N, 2), in shares of the clip.
    truths : for every sample its segments (G, 2), in shares of the clip, and labels (G,).
    """
    heads = torch.arange(len(logits), device=logits.device)[:, None]
    found, meant, sample = [], [], []  # (H, M_i) proposals, the truths (H, M_i) that they have, and whose they are
    for i, (wanted, labels) in enumerate(truths):
        with torch.no_grad():
            cost = matching_cost(
                logits[:, i], segments[:, i], wanted, labels, weights=cost_weights, alpha=alpha, gamma=gamma
            )
        proposal, truth = hungarian(cost)
        found.append(proposal)
        meant.append(truth + sum(len(others) for _, others in truths[:i]))
        sample.append(torch.full_like(truth, i))
    chosen = heads, torch.cat(sample, 1), torch.cat(found, 1)  # (H, M) each
    truth = torch.cat(meant, 1)
    goal = torch.zeros_like(logits)
    goal[(*chosen, torch.cat([labels for _, labels in truths])[truth])] = 1.0
    a, b = segments[chosen], torch.cat([wanted for wanted, _ in truths])[truth]  # (H, M, 2)
    count = max(truth.shape[1], 1)
    named = focal_loss(logits, goal, alpha=alpha, gamma=gamma).sum((1, 2, 3))
    return named / count, (a - b).abs().sum((1, 2)) / count, (1 - paired_generalised_tiou(a, b)).sum(1) / count
