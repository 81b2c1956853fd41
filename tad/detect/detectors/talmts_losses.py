"""What TAL-MTS and AFSD learn from: which place learns which action, and the terms of Eq. 7 to 12."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tad.detect.segments import paired_generalised_tiou, paired_tiou

RefineLoss = Literal["smooth_l1", "l1"]
QualityOver = Literal["refined", "coarse"]
DISTANCE = {"smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss}
BACKGROUND = 0  # its class index in the logits; class k of the targets is k + 1
CERTAIN = 1e-4  # probabilities of boundaries stay this far from 0 and 1, so that their loss has a finite slope


def assign(
    centers: Tensor,
    segments: Tensor,
    labels: Tensor,
    *,
    bounds: Tensor | None = None,
    draw: bool = False,
) -> tuple[Tensor, Tensor]:
    """For every place the shortest action that its centre lies in (both ends count).

    Parameters
    ----------
    centers : (N,). segments : (G, 2), in the same unit. labels : (G,).
    bounds : (N, 2); an action is no place's whose farther end is not more than the first and at most the second away.
    draw : of several actions that are equally short one is drawn for each place; otherwise the first is taken.

    Returns
    -------
    The classes (N,), 0 where there is none and label + 1 elsewhere, and the actions' segments (N, 2).
    """
    if len(labels) == 0:
        return torch.zeros_like(centers, dtype=torch.int64), centers.new_zeros(len(centers), 2)
    before, after = centers[:, None] - segments[:, 0], segments[:, 1] - centers[:, None]  # (N, G)
    fits = (before >= 0) & (after >= 0)
    if bounds is not None:
        farther = torch.maximum(before, after)
        fits = fits & (farther > bounds[:, :1]) & (farther <= bounds[:, 1:])
    lengths = (segments[:, 1] - segments[:, 0]).expand_as(before).masked_fill(~fits, torch.inf)
    shortest = lengths.amin(1, keepdim=True)
    order = torch.rand_like(lengths) if draw else torch.arange(len(labels), 0, -1, device=centers.device).to(lengths)
    truth = order.masked_fill(lengths > shortest, -1.0).argmax(1)
    return torch.where(shortest[:, 0] < torch.inf, labels[truth] + 1, BACKGROUND), segments[truth]


def softmax_focal(logits: Tensor, classes: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Focal loss of a softmax with a background class (Eq. 8, 9): (..., K + 1) and (...,) → (...,).

    ``-a (1 - p)**gamma log p`` of the right class, with a = ``1 - alpha`` for background and ``alpha`` for actions.
    """
    log_p = logits.log_softmax(-1).gather(-1, classes[..., None])[..., 0]
    weight = torch.where(classes == BACKGROUND, 1.0 - alpha, alpha).to(log_p)
    miss = (-torch.expm1(log_p)).clamp(min=1e-12)  # 1 - p; the slope of a root at 0 is infinite
    return -weight * miss**gamma * log_p


def detection_losses(
    *,
    segments: Tensor,
    logits: Tensor,
    offsets: Tensor,
    refined_logits: Tensor,
    quality: Tensor,
    valid: Tensor,
    classes: Tensor,
    truths: Tensor,
    alpha: float,
    gamma: float,
    refine_tiou: float,
    refine_loss: RefineLoss,
    quality_over: QualityOver,
) -> dict[str, Tensor]:
    """The terms of Eq. 7, unweighted. Sums over all places of the batch, divided by how many are positive, at least 1.

    A place is positive in the coarse stage where it has an action, and in the refined one where the tIoU of its coarse
    segment with that action is above ``refine_tiou``. Quality is learnt over the refined positives (Eq. 12), or over
    the coarse ones.

    Parameters
    ----------
    segments : (B, N, 2) coarse. logits, refined_logits : (B, N, K + 1). offsets : (B, N, 2) of the refined stage, in
        halves of the coarse length (Eq. 13). quality : (B, N) logits.
    valid : (B, N) bool, where a row is. classes, truths : (B, N) and (B, N, 2), see :func:`assign`.
    """
    coarse = (classes > BACKGROUND) & valid
    start = segments.detach()
    length = (start[..., 1:] - start[..., :1]).clamp(min=1e-6)
    tiou = paired_tiou(start, truths)  # (B, N)
    refined = coarse & (tiou > refine_tiou)
    refined_classes = torch.where(refined, classes, BACKGROUND)
    coarse_count, refined_count = coarse.sum().clamp(min=1), refined.sum().clamp(min=1)

    focal = softmax_focal(logits, classes, alpha=alpha, gamma=gamma)
    refined_focal = softmax_focal(refined_logits, refined_classes, alpha=alpha, gamma=gamma)
    giou = 1.0 - paired_generalised_tiou(segments[coarse], truths[coarse])
    goal = (truths - start) / (0.5 * length)
    distance = DISTANCE[refine_loss](offsets[refined], goal[refined], reduction="sum")
    judged = refined if quality_over == "refined" else coarse
    with torch.no_grad():
        reached = paired_tiou(refined_segments(start, offsets), truths)[judged]
    entropy = F.binary_cross_entropy_with_logits(quality[judged], reached, reduction="sum")
    return {
        "classification": (focal * valid).sum() / coarse_count,
        "refined_classification": (refined_focal * valid).sum() / refined_count,
        "localisation": giou.sum() / coarse_count,
        "refined_localisation": distance / refined_count,
        "quality": entropy / (refined_count if quality_over == "refined" else coarse_count),
    }


def refined_segments(segments: Tensor, offsets: Tensor) -> Tensor:
    """Eq. 13: every end of the coarse ``segments`` (..., 2) moved by its offset in halves of their length."""
    return segments + 0.5 * (segments[..., 1:] - segments[..., :1]) * offsets


def boundary_loss(features: Tensor, mask: Tensor, truths: Sequence[Tensor], *, scale: float, least: float) -> Tensor:
    """AFSD's supervision of the pooled features: the first half of the channels shall show starts, the second ends.

    The probability of a row is the mean of ``tanh`` over its half of the channels; it is 1 for rows whose centre lies
    in a region round a boundary, max(length / 10, ``least``) rows wide. Binary cross-entropy, a mean over real rows.

    Parameters
    ----------
    features : (B, C, T), not negative. mask : (B, T). truths : of each sample (G, 2) in row edges times ``scale``.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    shown = features.unflatten(1, (2, -1)).tanh().mean(2).clamp(CERTAIN, 1 - CERTAIN)  # (B, 2, T)
    centers = torch.arange(features.shape[2], device=features.device) + 0.5
    goal = torch.zeros_like(shown)
    for row, segments in zip(goal, truths, strict=True):
        if len(segments):
            ends = segments * scale  # (G, 2)
            half = 0.5 * (0.1 * (ends[:, 1] - ends[:, 0])).clamp(min=least)  # (G,)
            row.copy_(((centers - ends.T[..., None]).abs() <= half[:, None]).any(1))  # (2, G, T) → (2, T)
    entropy = -(goal * shown.log() + (1 - goal) * (1 - shown).log()).sum(1)  # (B, T)
    return (entropy * mask).sum() / mask.sum().clamp(min=1)
