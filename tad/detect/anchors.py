"""Anchor segments, and which truth an anchor or a proposal belongs to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tad.errors import RecipeError

TIE = 1e-5  # tIoUs closer than this are equal


def make_anchors(rows: int, scales: Tensor) -> Tensor:
    """Anchors (rows, K, 2) in row edges: one of every scale (K,) centred on each row. They may cross the ends."""
    centers = torch.arange(rows, dtype=scales.dtype, device=scales.device)[:, None] + 0.5
    return torch.stack((centers - 0.5 * scales, centers + 0.5 * scales), dim=-1)


class Match(NamedTuple):
    """For each of N segments its best truth: ``tiou`` (N,), ``truth`` (N,) index (0 where there is no truth at all)."""

    tiou: Tensor
    truth: Tensor


def best_truth(tiou: Tensor, *, draw: bool = False) -> Match:
    """The truth of largest tIoU for each row of ``tiou`` (N, G): of equal ones the first, with ``draw`` a random one.

    Equal ones are a segment with two labels, as all CliffDiving of THUMOS14 is also Diving: drawn anew in every step,
    each label is learnt in its share.
    """
    if tiou.shape[1] == 0:
        return Match(tiou.new_zeros(len(tiou)), torch.zeros(len(tiou), dtype=torch.int64, device=tiou.device))
    best, truth = tiou.max(1)
    if draw:
        lots = torch.rand(tiou.shape, device=tiou.device).masked_fill(tiou < best[:, None] - TIE, -1.0)
        truth = lots.argmax(1)
    return Match(best, truth)


def match_anchors(anchors: Tensor, truths: Tensor, tiou: Tensor, *, above: float, below: float) -> tuple[Tensor, ...]:
    """Which anchors are positive, which negative, and the truth that each is regressed to.

    Parameters
    ----------
    anchors, truths : (N, 2), (G, 2) in the same unit. tiou : (N, G) of each with each.
    above, below : an anchor is positive with tIoU > ``above`` to some truth, negative with tIoU < ``below`` to all.

    Returns
    -------
    ``positive`` (N,) bool, ``negative`` (N,) bool, ``truth`` (N,) int64. Every truth that any anchor overlaps has a
    positive anchor: that of largest tIoU; among equal ones the nearest by centre (a truth longer than all anchors would
    otherwise make every anchor inside it positive), and all of these when they are equally near.
    """
    best, truth = best_truth(tiou)
    if tiou.numel() == 0:
        return best > above, best < below, truth
    peak = tiou.amax(0)  # (G,)
    top = (tiou >= peak - TIE) & (peak > 0)
    distance = (anchors.mean(1)[:, None] - truths.mean(1)).abs().masked_fill(~top, math.inf)  # (N, G)
    forced = top & (distance <= distance.amin(0) + TIE)
    is_forced = forced.any(1)
    truth = torch.where(is_forced, tiou.masked_fill(~forced, -1.0).argmax(1), truth)
    return (best > above) | is_forced, (best < below) & ~is_forced, truth


def checked_scales(scales: Iterable[float]) -> tuple[float, ...]:
    """``scales`` as given, or :class:`RecipeError` unless they are positive, finite numbers of rows, at least one."""
    values = tuple(scales) if isinstance(scales, Iterable) and not isinstance(scales, str) else ()
    numbers = [s for s in values if isinstance(s, (int, float)) and math.isfinite(s) and s > 0]
    if not values or len(numbers) != len(values):
        hint = (
            " ('auto' is for recipes: the detector's resolve() turns it into numbers)"
            if isinstance(scales, str)
            else ""
        )
        raise RecipeError(f"anchor_scales must be positive numbers of rows, got {scales!r}{hint}")
    return values


def anchor_scales_for(
    lengths_rows: np.ndarray, count: int | None = None, *, overlap: float = 0.7, share: float = 0.98
) -> tuple[float, ...]:
    """Anchor scales in rows for actions of these lengths: a geometric series over all but their rarest lengths.

    Parameters
    ----------
    lengths_rows : (N,) lengths of the training actions in rows.
    count : this many scales (fewer where rounding makes two equal). None: as few as it takes for ``share`` of the
        actions to have a scale with tIoU ≥ ``overlap`` when both have the same centre.

    Returns
    -------
    Rising scales, at least 1 row, rounded to tenths of rows below 10 and to whole rows above.

    Raises
    ------
    RecipeError : no length that is positive and finite; nonsensical ``count``, ``overlap`` or ``share``.
    """
    if (count is not None and count < 1) or not 0 < overlap < 1 or not 0 < share <= 1:
        raise RecipeError(
            f"anchor scales need count >= 1, 0 < overlap < 1, 0 < share <= 1: {count}, {overlap}, {share}"
        )
    lengths = np.asarray(lengths_rows, dtype=np.float64).ravel()
    lengths = lengths[np.isfinite(lengths) & (lengths > 0)]
    if len(lengths) == 0:
        raise RecipeError("anchor scales cannot be chosen: the training videos hold no action; set model.anchor_scales")
    lengths = np.maximum(lengths, 1.0)  # below one row all actions share the smallest anchor
    low, high = np.quantile(lengths, [0.5 * (1 - share), 0.5 * (1 + share)])
    if count is not None:
        return _series(low, high, count)
    for n in range(1, 65):
        scales = _series(low, high, n)
        ratio = lengths[:, None] / np.asarray(scales)
        if (np.minimum(ratio, 1 / ratio).max(1) >= overlap).mean() >= share:
            break
    return scales


def _series(low: float, high: float, count: int) -> tuple[float, ...]:
    values = np.geomspace(low, high, count) if count > 1 else np.array([math.sqrt(low * high)])
    rounded = np.where(values < 10, np.round(values, 1), np.round(values))
    return tuple(float(value) for value in np.unique(np.maximum(rounded, 1.0)))
