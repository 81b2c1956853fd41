"""What detectors share: checks of their arguments, the extent of a sample, and the way back to seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from tad.detect.align import extent_rows
from tad.detect.interface import Batch, Segments, Targets
from tad.detect.segments import clip_segments
from tad.errors import RecipeError, WeightsError, did_you_mean


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise :class:`RecipeError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise RecipeError(f"unknown {name} {value!r}.{did_you_mean(str(value), choices)}")


def check_numbers(low: float, high: float, **values: float) -> None:
    """Raise :class:`RecipeError` unless each value is in ``[low, high]``, and whole where ``low`` is an ``int``."""
    whole = isinstance(low, int)
    for name, value in values.items():
        right_type = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not right_type or not low <= value <= high:
            raise RecipeError(f"{name} must be a {'whole ' if whole else ''}number from {low} to {high}, got {value!r}")


def is_list(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    """Whether ``value`` is what a list of a recipe is: a list, or a tuple in Python."""
    return isinstance(value, (list, tuple))


def check_names(name: str, values: object, *, such_as: str) -> None:
    """Raise :class:`RecipeError` unless ``values`` is a list of one or more different names."""
    if not is_list(values) or not values or not all(isinstance(value, str) for value in values):
        raise RecipeError(f"{name} must be a list of names, such as {such_as}, got {values!r}")
    if len(set(values)) != len(values):
        raise RecipeError(f"{name} repeat: {', '.join(values)}")


def check_finite(video: str, *outputs: Tensor) -> None:
    """Raise :class:`WeightsError` where an output of the network for ``video`` holds NaN or infinity."""
    if not all(bool(output.isfinite().all()) for output in outputs):
        raise WeightsError(
            f"video {video}: the detector's output is not finite. Either its features hold NaN (run tad store "
            "verify --deep), or the weights have diverged (take an earlier checkpoint or train more slowly)"
        )


def truths_within(target: Targets, extent: Tensor) -> tuple[Tensor, Tensor]:
    """Segments (G, 2) and labels (G,) of one video, cut to ``extent`` (2,); what has no length then is left out."""
    segments = clip_segments(target.segments.to(extent), extent[0], extent[1])
    keep = segments[:, 1] > segments[:, 0]
    return segments[keep], target.labels[keep]


def extents(batch: Batch) -> Tensor:
    """(B, 2) in row edges: what the rows of each sample look at with their windows, inside the video."""
    ends = []
    for axis, duration_s, count in zip(batch.axes, batch.durations_s, batch.mask.sum(1).tolist(), strict=True):
        ends.append(extent_rows(axis, count, duration_s))
    return torch.tensor(ends, dtype=torch.float64)


def segments_in_seconds(
    batch: Batch, i: int, extent: Tensor, segments: Tensor, labels: Tensor, scores: Tensor, *, limit: int
) -> Segments:
    """Segments (N, 2) in row edges of sample ``i``, inside the video, without those that last nothing, best first."""
    inside = clip_segments(segments, extent[0], extent[1]).double()
    seconds = clip_segments(batch.axes[i].to_seconds(inside), 0.0, batch.durations_s[i])
    lasting = torch.nonzero(seconds[:, 1] > seconds[:, 0]).squeeze(1)
    best = lasting[torch.argsort(scores[lasting], descending=True, stable=True)][:limit]
    return Segments(batch.videos[i], seconds[best], labels[best], scores[best])
