"""The loss terms of ETAD (appendix A.3), each a mean over the rows or proposals of a whole mini-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tad.detect.segments import encode_boundaries, encode_center_length, paired_tiou

NOWHERE = -1e6  # rows: where the truths stand that only fill up the shorter lists; they are near nothing
BOUNDARY_RADIUS = 1.5  # rows: the region round a boundary is three rows long, as in BMN
HIGH_TIOU = 0.9  # a proposal above it is positive for the classification of the tIoU


def padded_truths(truths: Sequence[Tensor]) -> Tensor:
    """Segments (G_i, 2) of each sample → (B, G, 2), G at least 1; what is added has no length and lies nowhere."""
    most = max([1, *(len(segments) for segments in truths)])
    return torch.stack([F.pad(s, (0, 0, 0, most - len(s)), value=NOWHERE) for s in truths])


def near(places: Tensor, boundaries: Tensor) -> Tensor:
    """Which ``places`` (..., N) lie in the region of one of the ``boundaries`` (..., G): (..., N) bool.

    For the centre of a row this is BMN's rule: more than half of the row's cell lies in the region.
    """
    return ((places[..., :, None] - boundaries[..., None, :]).abs() < BOUNDARY_RADIUS).any(-1)


def balanced_bce(logits: Tensor, positive: Tensor) -> Tensor:
    """Eq. 2, as a mean: half the mean entropy of the positives and half that of the negatives (N,)."""
    entropy = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none")
    return 0.5 * (masked_mean(entropy, positive) + masked_mean(entropy, ~positive))


def boundary_loss(logits: Tensor, mask: Tensor, truths: Tensor) -> Tensor:
    """L_bd_s: rows as starts and as ends. ``logits`` (B, 2, T), ``mask`` (B, T), ``truths`` (B, G, 2)."""
    centers = (torch.arange(mask.shape[1], device=mask.device) + 0.5).expand(mask.shape)  # (B, T)
    terms = [balanced_bce(logits[:, k][mask], near(centers, truths[..., k])[mask]) for k in (0, 1)]
    return terms[0] + terms[1]


def proposal_boundary_loss(logits: Tensor, proposals: Tensor, truths: Tensor) -> Tensor:
    """L_bd_p: proposals (P, 2) whose start is a start, and whose end an end. ``truths`` (P, G, 2) of their samples."""
    terms = [balanced_bce(logits[:, k], near(proposals[:, k, None], truths[..., k]).squeeze(1)) for k in (0, 1)]
    return terms[0] + terms[1]


def iou_class_loss(logits: Tensor, tiou: Tensor) -> Tensor:
    """First part of Eq. 3: is the tIoU (P,) above 0.9? All that are, and as many of the others at random.

    Where none is, one of the others is still learnt from.
    """
    positive = tiou > HIGH_TIOU
    lots = torch.rand(tiou.shape, device=tiou.device).masked_fill(positive, 2.0)
    rank = lots.argsort().argsort()  # the others first, shuffled
    chosen = positive | (rank < positive.sum().clamp(min=1))
    entropy = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none")
    return masked_mean(entropy, chosen)


def iou_l2_loss(logits: Tensor, tiou: Tensor) -> Tensor:
    """Second part of Eq. 3: the squared error of the tIoU (P,)."""
    return masked_mean((logits.sigmoid() - tiou.to(logits.dtype)).square(), torch.ones_like(tiou, dtype=torch.bool))


def regression_loss(
    boundary_offsets: Tensor, center_offsets: Tensor, proposals: Tensor, truth: Tensor, positive: Tensor
) -> Tensor:
    """Eq. 4: smooth L1 of start, end, centre and length, summed, of the ``positive`` (P,) among P proposals.

    ``truth`` (P, 2) is what each is regressed to; offsets are measured in its own length.
    """
    own, goal = proposals[positive], truth[positive]
    wanted = torch.cat((encode_boundaries(goal, own), encode_center_length(goal, own)), 1)  # (N, 4)
    given = torch.cat((boundary_offsets[positive], center_offsets[positive]), 1)
    distance = F.smooth_l1_loss(given, wanted.to(given.dtype), reduction="none").sum(1)
    return distance.sum() / max(1, len(own))


def masked_mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the ``chosen`` (bool) of ``values``; 0 where there are none."""
    return values.masked_fill(~chosen, 0.0).sum() / chosen.sum().clamp(min=1)


def assigned_truth(proposals: Tensor, truths: Tensor) -> Tensor:
    """The truth of largest tIoU, (P, 2), of proposals (P, 2) among those of their samples (P, G, 2)."""
    best = paired_tiou(proposals[:, None], truths).argmax(1)
    return truths[torch.arange(len(truths), device=truths.device), best]
