"""Arithmetic of segments: ``(start, end)`` on the last dimension of a tensor, in any unit; all of it differentiable."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LENGTH_RATIO = 62.5  # no segment is decoded to more times its anchor's length, so that exp() cannot overflow


def center_length(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Centres (...,) and lengths (...,) of ``segments`` (..., 2)."""
    start, end = segments.unbind(-1)
    return 0.5 * (start + end), end - start


def from_center_length(center: Tensor, length: Tensor) -> Tensor:
    """Segments (..., 2) from centres (...,) and lengths (...,)."""
    return torch.stack((center - 0.5 * length, center + 0.5 * length), dim=-1)


def clip_segments(segments: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """``segments`` (..., 2) moved into ``[low, high]``, which are numbers or tensors that broadcast to (..., 2)."""
    low = torch.as_tensor(low, dtype=segments.dtype, device=segments.device)
    high = torch.as_tensor(high, dtype=segments.dtype, device=segments.device)
    return torch.minimum(torch.maximum(segments, low), high)


def expand_segments(segments: Tensor, share: float) -> Tensor:
    """``segments`` (..., 2) grown by ``share`` of their own length on either side."""
    start, end = segments.unbind(-1)
    margin = share * (end - start)
    return torch.stack((start - margin, end + margin), dim=-1)


def paired_tiou(a: Tensor, b: Tensor) -> Tensor:
    """Temporal intersection over union of ``a`` (..., 2) with ``b`` (..., 2), broadcast against each other: (...,).

    A segment of zero (or negative) length overlaps nothing: its tIoU is 0, with another such segment too (0/0 → 0).
    Values and gradients stay finite for any finite input.
    """
    inter = (torch.minimum(a[..., 1], b[..., 1]) - torch.maximum(a[..., 0], b[..., 0])).clamp(min=0)
    union = (a[..., 1] - a[..., 0]).clamp(min=0) + (b[..., 1] - b[..., 0]).clamp(min=0) - inter
    return inter / torch.where(union > 0, union, torch.ones_like(union))


def segment_tiou(a: Tensor, b: Tensor) -> Tensor:
    """tIoU of every pair, as :func:`paired_tiou`: ``a`` (..., N, 2) and ``b`` (..., M, 2) → (..., N, M)."""
    return paired_tiou(a[..., :, None, :], b[..., None, :, :])


def paired_generalised_tiou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised tIoU of ``a`` (..., 2) with ``b`` (..., 2), broadcast against each other: (...,) in [-1, 1].

    ``tIoU - (hull - union) / hull`` (Rezatofighi et al., 2019) is, in one dimension, the signed intersection over the
    hull: the tIoU where two segments overlap, minus the gap's share of the hull where they do not. Two equal points
    (0/0) give 0.
    """
    inter = torch.minimum(a[..., 1], b[..., 1]) - torch.maximum(a[..., 0], b[..., 0])
    hull = torch.maximum(a[..., 1], b[..., 1]) - torch.minimum(a[..., 0], b[..., 0])
    return torch.where(hull > 0, inter, torch.zeros_like(inter)) / torch.where(hull > 0, hull, torch.ones_like(hull))


def generalised_tiou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised tIoU of every pair: ``a`` (..., N, 2) and ``b`` (..., M, 2) → (..., N, M)."""
    return paired_generalised_tiou(a[..., :, None, :], b[..., None, :, :])


def encode_center_length(segments: Tensor, anchors: Tensor, *, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Offsets (..., 2) that move ``anchors`` (..., 2) onto ``segments`` (..., 2): centre shift and log length ratio.

    ``t_c = w_c (c - c_a) / l_a`` and ``t_l = w_l log(l / l_a)``; TAL-Net (Eq. 2) has ``weights=(10, 5)``. Anchors must
    have a positive length; the length ratio is limited as in :func:`decode_center_length`, so that a segment of zero
    length has finite offsets.
    """
    center, length = center_length(segments)
    anchor_center, anchor_length = center_length(anchors)
    ratio = (length / anchor_length).clamp(1.0 / MAX_LENGTH_RATIO, MAX_LENGTH_RATIO)
    return torch.stack((weights[0] * (center - anchor_center) / anchor_length, weights[1] * ratio.log()), dim=-1)


def decode_center_length(offsets: Tensor, anchors: Tensor, *, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Segments (..., 2) from ``offsets`` (..., 2) and ``anchors`` (..., 2); inverts :func:`encode_center_length`.

    The length ratio is limited to [1 / 62.5, 62.5] (:data:`MAX_LENGTH_RATIO`); half precision is decoded in float32.
    """
    offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
    anchor_center, anchor_length = center_length(anchors.to(offsets.dtype))
    shift, growth = offsets.unbind(-1)
    limit = math.log(MAX_LENGTH_RATIO)
    length = anchor_length * (growth / weights[1]).clamp(-limit, limit).exp()
    return from_center_length(anchor_center + anchor_length * shift / weights[0], length)


def encode_boundaries(segments: Tensor, anchors: Tensor, *, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Offsets (..., 2) of both boundaries from the anchors', in anchor lengths.

    ``d_s = w_s (s - s_a) / l_a`` and ``d_e = w_e (e - e_a) / l_a``. Anchors must have a positive length.
    """
    return (segments - anchors) / (anchors[..., 1:] - anchors[..., :1]) * segments.new_tensor(weights)


def decode_boundaries(offsets: Tensor, anchors: Tensor, *, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Segments (..., 2) from boundary ``offsets`` (..., 2); inverts :func:`encode_boundaries`."""
    offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
    anchors = anchors.to(offsets.dtype)
    return anchors + offsets / offsets.new_tensor(weights) * (anchors[..., 1:] - anchors[..., :1])
