"""How a video is handed to a detector: whole, in overlapping windows, or squeezed into a fixed number of rows.

A detector says which in ``Detector.needs``; where windows lie is in ``DataRecipe``. A *view* is what the network sees
of a video at a time: the whole video, or one window of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import torch

from tad.detect.align import Sample, level_axis, level_factors, open_sample, read_sample, resampled, seen_rows
from tad.detect.interface import Detector, LevelSpec, Segments
from tad.errors import RecipeError
from tad.recipe import DataRecipe, DetectRecipe
from tad.store import Store
from tad.timeline import TimeAxis

PIECE_VALUES = 2**24  # read at a time where a video is only checked
CUTS = ("max_rows", "min_inside")  # keys of random cuts out of whole videos
WINDOWS = ("train_stride", "detect_stride", "empty_windows")
UNUSED = {"full": (*WINDOWS, "rescale"), "windowed": ("max_rows", "rescale"), "rescaled": (*WINDOWS, *CUTS)}
SEEN = {"full": "whole", "windowed": "in windows", "rescaled": "rescaled"}


def read_whole(store: Store, needs: Sequence[LevelSpec], video: str, data: DataRecipe) -> Sample:
    """A video's rows as its views are cut from: ``data.row_spacing`` applied, and rescaled where the detector asks it.

    Raises :class:`StoreError` as :func:`read_sample` does.
    """
    sample = read_sample(store, needs, video, row_spacing=data.row_spacing)
    if needs[0].layout != "rescaled":
        return sample
    assert needs[0].rows is not None
    return rescaled(sample, needs[0].rows, average=data.rescale == "average")


def open_whole(store: Store, needs: Sequence[LevelSpec], video: str, data: DataRecipe) -> Sample:
    """As :func:`read_whole`, but what is cut from it is read when it is cut; not for rescaled videos."""
    return open_sample(store, needs, video, row_spacing=data.row_spacing)


def read_for_views(store: Store, needs: Sequence[LevelSpec], video: str, data: DataRecipe) -> Sample:
    """A video to cut views from one after the other: :func:`read_whole`, but windows of maps or frames, which may not
    fit into memory, are read when they are cut.
    """
    return (open_whole if cuts_maps(needs) else read_whole)(store, needs, video, data)


def cuts_maps(needs: Sequence[LevelSpec]) -> bool:
    """Whether windows of maps or frames are read."""
    return needs[0].layout == "windowed" and any(need.shape is not None for need in needs)


def read_through(sample: Sample) -> None:
    """Read every row of an opened sample once and keep none. Raises :class:`StoreError` as :func:`read_sample` does."""
    for rows in sample.features.values():
        step = max(1, PIECE_VALUES // max(1, math.prod(rows.shape[1:])))
        for start in range(0, rows.shape[0], step):
            rows[start : start + step]


def rescaled(sample: Sample, rows: int, *, average: bool = False) -> Sample:
    """The whole video in ``rows`` rows of equal length, without truth: row i covers ``[i, i + 1) * duration / rows``.

    A new row is the linear interpolation of the old ones at its centre (as ``F.interpolate(mode="linear")``), or, with
    ``average``, the mean of that at ``ceil(old / new rows)`` evenly spaced places (as an aligned RoI pooling, ETAD).
    A level of which one row is ``factor`` of the first need's gets ``rows / factor``. Of uint8 frames, the one nearest
    to the centre is taken.
    """

    def level(array: np.ndarray, factor: int | Fraction) -> np.ndarray:
        count = rows // factor
        axis = TimeAxis.rescaled(rows=count, duration_s=sample.duration_s)
        places = max(1, -(-array.shape[0] // count)) if average and array.dtype != np.uint8 else 1
        offsets = (np.arange(places) + 0.5) / places - 0.5  # (p,) in new rows, round the centre
        at_s = axis.center_s(np.arange(count)[:, None] + offsets)  # (rows, p)
        found = resampled(array, level_axis(sample.axis, factor), at_s.reshape(-1))
        if array.ndim > 2 and places == 1:
            return found
        return found.reshape(count, places, *array.shape[1:]).mean(axis=1)

    features = {key: level(array, sample.factor(key)) for key, array in sample.features.items()}
    axis = TimeAxis.rescaled(rows=rows, duration_s=sample.duration_s)
    nothing = np.zeros((0, 2), np.float32), np.zeros(0, np.int64)
    return replace(sample, features=features, axis=axis, segments=nothing[0], labels=nothing[1])


def window_starts(rows: int, *, window: int, stride: int, step: int = 1) -> list[int]:
    """First rows of windows that cover every row: one every ``stride``, the last one ending where the video ends.

    A video that is not longer than a window has one, from its first row. Windows of several levels begin at whole rows
    of each of them: at multiples of ``step``, which divides ``window``; others are moved to the one before, and the
    last window to the one after, so that it may end with up to ``step - 1`` rows that are not there.

    Raises :class:`RecipeError` for windows farther apart than they are long, between which rows would never be seen.
    """
    if stride > window:
        raise RecipeError(
            f"windows of {window} rows every {stride} rows leave rows unseen: take data.train_stride and "
            f"data.detect_stride of at most {window}"
        )
    if rows <= window:
        return [0]
    last = -(-(rows - window) // step) * step
    return sorted({min(start - start % step, last) for start in range(0, rows - window + stride, stride)} | {last})


def crop(sample: Sample, start: int, rows: int, *, min_inside: float = 0.5) -> Sample:
    """Rows ``[start, start + rows)`` of a sample. A truth or proposal of which at least ``min_inside`` lies inside (its
    tIoA) stays, cut to the crop; at an end of the sample to what its rows see beyond.
    """
    low, high = seen_rows(sample.axis, sample.rows, sample.duration_s)
    ends = low if start == 0 else 0.0, (high if start + rows >= sample.rows else start + rows) - start
    segments, kept = _inside(sample.segments - np.float32(start), ends, min_inside)
    proposals, left = _inside(sample.proposals - np.float32(start), ends, min_inside)
    return replace(
        sample,
        features={key: _level_rows(sample, key, start, start + rows) for key in sample.features},
        axis=sample.axis.shifted(start),
        segments=segments,
        labels=sample.labels[kept],
        proposals=proposals,
        proposal_scores=sample.proposal_scores[left],
    )


def _level_rows(sample: Sample, key: str, start: int, stop: int) -> np.ndarray:
    """The rows of one need that are rows ``[start, stop)`` of the first one."""
    factor = sample.factor(key)
    if start % factor:
        raise ValueError(f"a crop from row {start} does not begin at a row of '{key}', which is {factor} of them")
    return sample.features[key][start // factor : -(-stop // factor)]


def _inside(moved: np.ndarray, ends: tuple[float, float], min_inside: float) -> tuple[np.ndarray, np.ndarray]:
    """Those of segments ``moved`` (N, 2) that lie far enough between ``ends``, cut to it, and which they are (N,)."""
    cut = np.clip(moved, np.float32(ends[0]), np.float32(ends[1]))
    keep = cut[:, 1] - cut[:, 0] >= np.maximum(min_inside * (moved[:, 1] - moved[:, 0]), 1e-6)  # (N,)
    return cut[keep], keep


def unused_keys(recipe: DetectRecipe, detector: Detector) -> list[str]:
    """A message where the recipe sets keys of ``data`` that say nothing to a detector of this layout."""
    layout = detector.needs[0].layout
    given, usual = recipe.data.model_dump(), DataRecipe().model_dump()
    classifier = detector.class_agnostic and recipe.classes.scores is None  # sees the same videos, whole
    keys = [key for key in UNUSED[layout] if not (classifier and key in CUTS) and given[key] != usual[key]]
    if not keys:
        return []
    told = ", ".join(f"data.{key}={given[key]}" for key in keys)
    return [f"without effect, since '{recipe.detector}' sees videos {SEEN[layout]}: {told}"]


def detection_stride_fits(needs: Sequence[LevelSpec], data: DataRecipe) -> None:
    """Raise :class:`RecipeError` where windows would leave rows unseen, before anything is read."""
    window = needs[0].rows
    if needs[0].layout == "windowed" and window is not None:
        for stride in (data.train_stride, data.detect_stride):
            window_starts(1, window=window, stride=stride or 1)


def detection_starts(sample: Sample, needs: Sequence[LevelSpec], data: DataRecipe) -> list[int | None]:
    """Where the windows begin that the network sees in detection, every row in one; ``[None]``: it is seen whole."""
    if needs[0].layout != "windowed":
        return [None]
    window = needs[0].rows
    assert window is not None
    stride = data.detect_stride or max(1, window // 2)
    return list(window_starts(sample.rows, window=window, stride=stride, step=_step(needs)))


def view_at(sample: Sample, start: int | None, needs: Sequence[LevelSpec], data: DataRecipe) -> Sample:
    """The view of a video that begins at a row of :func:`detection_starts`."""
    window = needs[0].rows
    if start is None or window is None:
        return sample
    return crop(sample, start, window, min_inside=data.min_inside)


def detection_views(sample: Sample, needs: Sequence[LevelSpec], data: DataRecipe) -> list[Sample]:
    """What the network sees of a video in detection: every row is in a view."""
    return [view_at(sample, start, needs, data) for start in detection_starts(sample, needs, data)]


def _step(needs: Sequence[LevelSpec]) -> int:
    """The rows of the first need that are whole rows of every other."""
    return math.lcm(*(factor.numerator for factor in level_factors(needs)))


def never_inside(sample: Sample, starts: Sequence[int | None], needs: Sequence[LevelSpec], data: DataRecipe) -> int:
    """How many truths of a video lie in none of its training windows far enough to be learnt from."""
    window, known = needs[0].rows, len(sample.labels)
    numbered = replace(sample, labels=np.arange(known))
    seen = {
        int(label)
        for start in starts
        if start is not None and window is not None
        for label in crop(numbered, start, window, min_inside=data.min_inside).labels
    }
    return known - len(seen)


def training_starts(sample: Sample, needs: Sequence[LevelSpec], data: DataRecipe) -> list[int | None]:
    """Where the windows begin that a video is trained on; ``[None]`` for a video that is seen whole.

    Windows without truth are left out unless ``data.empty_windows``; a video of which all are has none.
    """
    if needs[0].layout != "windowed":
        return [None]
    window = needs[0].rows
    assert window is not None
    stride = data.train_stride or max(1, window // 2)
    starts = window_starts(sample.rows, window=window, stride=stride, step=_step(needs))
    if data.empty_windows:
        return list(starts)
    return [start for start in starts if len(crop(sample, start, window, min_inside=data.min_inside).labels)]


def of_whole_videos(found: Iterable[Segments]) -> list[Segments]:
    """Segments of a video's views, which are in seconds already, as those of the video; in the order of first views."""
    by_video: dict[str, list[Segments]] = {}
    for segments in found:
        by_video.setdefault(segments.video, []).append(segments)
    return [parts[0] if len(parts) == 1 else _together(parts) for parts in by_video.values()]


def _together(parts: Sequence[Segments]) -> Segments:
    extras = set.intersection(*[set(part.extra) for part in parts])
    return Segments(
        parts[0].video,
        torch.cat([part.segments_s for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.scores for part in parts]),
        {name: torch.cat([part.extra[name] for part in parts]) for name in sorted(extras)},
        parts[0].duration_s,
    )
