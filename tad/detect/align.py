"""One video's rows out of the store: every stream that a detector reads, on one time axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import cast

import numpy as np

from tad.detect.interface import LevelSpec
from tad.errors import RecipeError, StoreError
from tad.store import Feature, Store
from tad.timeline import TimeAxis

LAYOUTS = ("full", "windowed", "rescaled")  # of LevelSpec
SAME_AXIS = 1e-3  # rows: axes that drift apart by less than this over a whole video are one axis


@dataclass(frozen=True)
class Sample:
    """One video, or a crop of it, as a detector sees it.

    ``features``: ``LevelSpec.key`` -> (T, C) float, or maps (T, C, H, W), float or uint8. ``segments`` (N, 2) float32
    in row edges and ``labels`` (N,) int64 are its truth, empty where there is none or none was asked for. ``proposals``
    (P, 2) float32 in row edges and ``proposal_scores`` (P,) float32, best first, are what another detector found, for
    one that refines them.
    ``interpolated`` names the streams that did not lie on the first one's axis. Where levels differ in resolution,
    ``factors`` has for every key how many rows of the first need, in which ``axis`` and truth are, one of its rows is:
    its row j is rows ``[j, j + 1) * factor``. Of frames, denser than the first need, it is a fraction.
    """

    video: str
    features: dict[str, np.ndarray]
    axis: TimeAxis
    duration_s: float
    segments: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    interpolated: tuple[str, ...] = ()
    proposals: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    proposal_scores: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    factors: Mapping[str, int | Fraction] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return next(iter(self.features.values())).shape[0]

    def factor(self, key: str) -> int | Fraction:
        return self.factors.get(key, 1)


@dataclass(frozen=True)
class StoredRows:
    """The rows of one need as a sample has them, read from the store where they are sliced: ``rows[a:b]``, (b - a, C)
    or (b - a, C, H, W).

    ``count`` rows lie on the sample's axis before every ``spacing`` of them are averaged. ``axis`` says where they lie
    when the stored ones are elsewhere and have to be interpolated; None takes them as they are.
    """

    feature: Feature
    count: int
    spacing: int = 1
    axis: TimeAxis | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return -(-self.count // self.spacing), *self.feature.shape[1:]

    def __getitem__(self, part: slice) -> np.ndarray:
        begin, end, _ = part.indices(self.shape[0])
        first, stop = begin * self.spacing, min(end * self.spacing, self.count)
        if first >= stop:
            return np.empty((0, *self.shape[1:]), np.float32 if len(self.shape) == 2 else self.feature.dtype)
        return pool_rows(self._between(first, stop), self.spacing)

    def _between(self, first: int, stop: int) -> np.ndarray:
        if self.axis is None:
            return _checked(self.feature, first, stop)
        at_s = self.axis.center_s(np.arange(first, stop))  # (T,)
        low, high = np.clip(np.floor(self.feature.axis.row_at(at_s[[0, -1]])), 0, len(self.feature) - 1).astype(int)
        low, high = max(int(low) - 1, 0), min(int(high) + 3, len(self.feature))  # a neighbour more, against rounding
        return resampled(_checked(self.feature, low, high), self.feature.axis.shifted(low), at_s)


def check_needs(needs: Sequence[LevelSpec], *, detector: str) -> None:
    """Raise :class:`RecipeError` when a detector reads nothing, or in layouts that do not exist or fit together."""
    if not needs:
        raise RecipeError(f"detector '{detector}' declares no streams to read (Detector.needs is empty)")
    for need in needs:
        if need.layout not in LAYOUTS:
            raise RecipeError(
                f"detector '{detector}' reads stream '{need.stream}' in layout '{need.layout}'; "
                f"videos can be handed over in: {', '.join(LAYOUTS)}"
            )
        if (need.layout == "full") != (need.rows is None) or (need.rows is not None and need.rows < 1):
            raise RecipeError(
                f"detector '{detector}' reads stream '{need.stream}' in layout '{need.layout}' with rows={need.rows}: "
                "windowed and rescaled need a number of rows, full has none"
            )
        finest, rows = needs[0].rows, need.rows
        unlike = finest is not None and rows is not None and finest % rows != 0
        if unlike and need.shape is not None and finest is not None and rows is not None:
            unlike = rows % finest != 0  # maps and frames may be denser
        if need.layout != needs[0].layout or unlike:
            raise RecipeError(
                f"detector '{detector}' reads '{need.key}' in layout '{need.layout}' with rows={rows} and "
                f"'{needs[0].key}' in '{needs[0].layout}' with rows={finest}; they must agree, or the first have "
                "a whole multiple of the other's rows (or, where the other are frames, these of the first's)"
            )


def level_factors(needs: Sequence[LevelSpec]) -> list[int | Fraction]:
    """How many rows of the first need one row of each need is; a fraction of one where the need is denser."""
    first = needs[0].rows
    shares = [Fraction(1) if first is None or need.rows is None else Fraction(first, need.rows) for need in needs]
    return [share.numerator if share.denominator == 1 else share for share in shares]


def level_axis(axis: TimeAxis, factor: int | Fraction) -> TimeAxis:
    """The axis of rows that are ``factor`` rows of ``axis`` each and begin where these begin."""
    if isinstance(factor, int):
        return axis.pooled(factor)
    scale_s = axis.scale_s * float(factor)
    return TimeAxis(scale_s, axis.to_seconds(0.5 * float(factor)), scale_s)


def feature_of(store: Store, need: LevelSpec, video: str) -> Feature:
    """The stored feature behind one need; ``features`` also stands for the finest level of a stream without it."""
    return store[need.stream, video] if need.level == "features" else store[need.stream, video, need.level]


def read_sample(store: Store, needs: Sequence[LevelSpec], video: str, *, row_spacing: int = 1) -> Sample:
    """Read every need of one video and lay them side by side in time.

    The rows of the first need decide. A stream on the same axis is taken as it is, and where the counts differ by one
    row the longer is cut; a stream on another axis is interpolated linearly onto the first one's row centres. Then
    every ``row_spacing`` neighbouring rows are averaged into one, the last group over what is there. A need with fewer
    rows than the first one (see :func:`level_factors`) is laid on the axis of groups of the first one's rows instead,
    one with more rows (frames) on that of their parts. Maps keep the type that they are stored in; where uint8 ones
    lie on another axis, the nearest is taken.

    Raises
    ------
    StoreError : an entry is missing, unreadable, empty, not (rows, channels) or maps of the shape that the need says,
        holds NaN or infinity, or the streams do not cover the same time, or a level has not the resolution that the
        needs say.
    RecipeError : maps or frames with a ``row_spacing``.
    """
    sample = open_sample(store, needs, video, row_spacing=row_spacing)
    return replace(sample, features={key: rows[:] for key, rows in sample.features.items()})


def open_sample(store: Store, needs: Sequence[LevelSpec], video: str, *, row_spacing: int = 1) -> Sample:
    """:func:`read_sample` without reading: its ``features`` are :class:`StoredRows`, of which slices are read."""
    features, factors = [feature_of(store, need, video) for need in needs], level_factors(needs)
    if not features:
        raise RecipeError("a detector must read at least one stream")
    for feature, need in zip(features, needs, strict=True):
        _check_shape(feature, need)
        if row_spacing > 1 and need.shape is not None:
            raise RecipeError(
                f"data.row_spacing={row_spacing} averages rows, maps and frames ('{need.key}') stay as they are"
            )
    first, axes = features[0], list[TimeAxis | None]()
    counts: dict[int | Fraction, int] = {1: len(first)}  # factor -> rows of such levels
    for feature, factor in zip(features, factors, strict=True):
        axis, expected = level_axis(first.axis, factor), counts.get(factor, -(-counts[1] // factor))
        if factor != 1:
            _check_resolution(feature, first, factor)
        same = same_axis(axis, feature.axis, rows=expected)
        if not same:
            _check_covers(feature, first, axis, expected, factor)
        axes.append(None if same else axis)
        if factor < 1:
            # In rows of the first need: the last of these may be seen by some of its frames alone.
            have = len(feature) if same else _rows_covered(feature, axis)
            if same and abs(math.ceil(have * factor) - counts[1]) > 1:
                raise _cut_short(feature, first)
            counts[1] = min(counts[1], math.ceil(have * factor))
            counts[factor] = min(expected, have)
        elif same:
            if abs(len(feature) - expected) > 1:
                raise _cut_short(feature, first)
            counts[factor] = min(len(feature), expected)
        else:
            counts[factor] = expected
    counts = {factor: min(count, -(-counts[1] // factor)) for factor, count in counts.items()}
    rows = {
        need.key: StoredRows(feature, counts[factor], row_spacing, axis)
        for need, feature, factor, axis in zip(needs, features, factors, axes, strict=True)
    }
    return Sample(
        video,
        cast(dict[str, np.ndarray], rows),  # what a crop needs of an array: shape and slices
        first.axis.pooled(row_spacing),
        float(feature_duration(first, counts[1])),
        interpolated=tuple(need.key for need, axis in zip(needs, axes, strict=True) if axis is not None),
        factors=dict(zip(rows, factors, strict=True)) if set(factors) != {1} else {},
    )


def feature_duration(feature: Feature, rows: int) -> float:
    """The video's length in seconds as stored, or the end of the last row where the store does not know it."""
    known = feature.duration_s
    if np.isfinite(known) and known > 0:
        return known
    return float(feature.axis.center_s(rows - 1) + 0.5 * max(feature.axis.window_s, feature.axis.scale_s))


def extent_rows(axis: TimeAxis, rows: int, duration_s: float) -> tuple[float, float]:
    """What ``rows`` rows look at with their windows, inside the video, in row edges."""
    half = 0.5 * max(axis.window_s / axis.scale_s, 1.0)  # rows
    low = max(0.5 - half, axis.to_rows(0.0))
    return low, max(low, min(rows - 0.5 + half, axis.to_rows(duration_s)))


def seen_rows(axis: TimeAxis, rows: int, duration_s: float) -> tuple[float, float]:
    """To where truth and proposals of a whole video are cut: its rows ``[0, rows]``, and what their windows see of the
    video beyond (see :func:`extent_rows`); less than ``SAME_AXIS`` is nothing.
    """
    low, high = extent_rows(axis, rows, duration_s)
    return low if low < -SAME_AXIS else 0.0, high if high > rows + SAME_AXIS else float(rows)


def same_axis(a: TimeAxis, b: TimeAxis, *, rows: int) -> bool:
    """Whether the centres of ``rows`` rows agree within a thousandth of a row."""
    last = max(rows - 1, 0)
    drift_s = max(abs(a.center_s(0) - b.center_s(0)), abs(a.center_s(last) - b.center_s(last)))
    return drift_s <= SAME_AXIS * a.scale_s


def interpolate_rows(rows: np.ndarray, axis: TimeAxis, at_s: np.ndarray) -> np.ndarray:
    """Rows (T, C, ...) on ``axis``, read at ``at_s`` (M,) seconds -> (M, C, ...) float32; beyond an end: the row at
    that end.
    """
    position = np.clip(axis.row_at(at_s), 0, rows.shape[0] - 1)  # (M,)
    left = np.floor(position).astype(np.int64)
    right = np.minimum(left + 1, rows.shape[0] - 1)
    weight = (position - left).astype(np.float32).reshape(-1, *[1] * (rows.ndim - 1))  # (M, 1, ...)
    return rows[left].astype(np.float32) * (1 - weight) + rows[right].astype(np.float32) * weight  # (M, C, ...)


def resampled(rows: np.ndarray, axis: TimeAxis, at_s: np.ndarray) -> np.ndarray:
    """:func:`interpolate_rows`, but maps (T, C, H, W) keep their type, and of uint8 ones the nearest is taken."""
    if rows.ndim == 2:
        return interpolate_rows(rows, axis, at_s)
    if rows.dtype != np.uint8:
        return interpolate_rows(rows, axis, at_s).astype(rows.dtype, copy=False)
    # Halfway the later one, whatever the rounding, so that a window and the whole video have the same.
    nearest = np.floor(axis.row_at(at_s) + 0.5 + SAME_AXIS)
    return np.asarray(rows[np.clip(nearest, 0, len(rows) - 1).astype(np.int64)])


def pool_rows(rows: np.ndarray, spacing: int) -> np.ndarray:
    """Means of every ``spacing`` neighbouring rows: (T, C) -> (ceil(T / spacing), C); the last group may be smaller."""
    if spacing == 1:
        return rows
    starts = np.arange(0, rows.shape[0], spacing)
    counts = np.minimum(starts + spacing, rows.shape[0]) - starts
    sums = np.add.reduceat(rows.astype(np.float32), starts, axis=0)  # (ceil(T / spacing), C)
    return sums / counts[:, None].astype(np.float32)


def _check_shape(feature: Feature, need: LevelSpec) -> None:
    where = f"video '{feature.video}', stream '{feature.stream}', level '{feature.level}'"
    if need.shape is not None:
        if tuple(feature.shape[1:]) != need.shape:
            raise StoreError(
                f"{where}: the detector was made for maps or frames of (channels, height, width) {need.shape}, these "
                f"have {tuple(feature.shape[1:])}; say so in the recipe's model, or extract it again"
            )
    elif len(feature.shape) != 2:
        raise StoreError(f"{where}: a detector reads (rows, channels), this has shape {tuple(feature.shape)}")
    if feature.shape[0] == 0:
        raise StoreError(f"{where}: has no rows; extract it again")


def _checked(feature: Feature, start: int, stop: int) -> np.ndarray:
    rows = feature[start:stop]
    if rows.ndim > 2 and rows.dtype == np.uint8:
        return rows  # frames: a quarter of the memory, no NaN
    if not np.issubdtype(rows.dtype, np.floating):
        rows = rows.astype(np.float32)
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))).sum())
        raise StoreError(
            f"video '{feature.video}', stream '{feature.stream}', level '{feature.level}': {bad} of {rows.shape[0]} "
            "rows hold NaN or infinity; extract it again"
        )
    return rows


def _cut_short(feature: Feature, first: Feature) -> StoreError:
    return StoreError(
        f"video '{feature.video}': stream '{first.stream}' has {len(first)} rows and '{feature.stream}' "
        f"{len(feature)} on the same time axis; one of them was cut short: extract it again"
    )


def _rows_covered(feature: Feature, axis: TimeAxis) -> int:
    """How many rows of ``axis`` begin before the feature's last row ends."""
    return max(1, math.floor(axis.to_rows(feature.axis.to_seconds(float(len(feature)))) - SAME_AXIS) + 1)


def _check_resolution(feature: Feature, first: Feature, factor: int | Fraction) -> None:
    found = feature.axis.scale_s / first.axis.scale_s
    if abs(found / float(factor) - 1) > 0.1 and factor < 1:
        raise StoreError(
            f"video '{feature.video}': stream '{feature.stream}' has {1 / found:.3g} rows in each row of "
            f"'{first.stream}', level '{first.level}', but the detector reads {1 / factor} (such as its frame_factor): "
            "change that, or extract one of them again"
        )
    if abs(found / float(factor) - 1) > 0.1:
        raise StoreError(
            f"video '{feature.video}': stream '{feature.stream}', level '{feature.level}' has a row every {found:.3g} "
            f"rows of '{first.stream}', level '{first.level}', but the detector reads it as every {factor}: name the "
            "levels from fine to coarse, or extract them again"
        )


def _check_covers(feature: Feature, first: Feature, axis: TimeAxis, count: int, factor: int | Fraction) -> None:
    at_s = axis.center_s(0), axis.center_s(count - 1)
    # The ends of two extractions differ by their windows and strides; more than that means different videos or a cut
    # one.
    allowed_s = 0.5 * feature.axis.window_s + (feature.axis.scale_s if factor >= 1 else first.axis.scale_s)
    begin_s, end_s = feature.axis.center_s(0), feature.axis.center_s(len(feature) - 1)
    if begin_s - at_s[0] > allowed_s or at_s[-1] - end_s > allowed_s:
        raise StoreError(
            f"video '{feature.video}': stream '{feature.stream}' covers {begin_s:.2f}-{end_s:.2f} s, but "
            f"'{first.stream}' {at_s[0]:.2f}-{at_s[-1]:.2f} s; were both made from the same video?"
        )
