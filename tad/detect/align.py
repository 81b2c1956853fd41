"""One video's rows out of the store: every stream that a detector reads, on one time axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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

    ``features``: ``LevelSpec.key`` -> (T, C) float; ``segments`` (N, 2) float32 in row edges and ``labels`` (N,) int64
    are its truth, empty where there is none or none was asked for. ``proposals`` (P, 2) float32 in row edges and
    ``proposal_scores`` (P,) float32, best first, are what another detector found, for one that refines them.
    ``interpolated`` names the streams that did not lie on the first one's axis.
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

    @property
    def rows(self) -> int:
        return next(iter(self.features.values())).shape[0]


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
        if (need.layout, need.rows) != (needs[0].layout, needs[0].rows):
            raise RecipeError(
                f"detector '{detector}' reads stream '{need.stream}' in layout '{need.layout}' with rows={need.rows} "
                f"and '{needs[0].stream}' in '{needs[0].layout}' with rows={needs[0].rows}; they must agree"
            )


def feature_of(store: Store, need: LevelSpec, video: str) -> Feature:
    """The stored feature behind one need; ``features`` also stands for the finest level of a stream without it."""
    return store[need.stream, video] if need.level == "features" else store[need.stream, video, need.level]


def read_sample(store: Store, needs: Sequence[LevelSpec], video: str, *, row_spacing: int = 1) -> Sample:
    """Read every need of one video and lay them side by side in time.

    The rows of the first need decide. A stream on the same axis is taken as it is, and where the counts differ by one
    row the longer is cut; a stream on another axis is interpolated linearly onto the first one's row centres. Then
    every ``row_spacing`` neighbouring rows are averaged into one, the last group over what is there.

    Raises
    ------
    StoreError : an entry is missing, unreadable, empty, not (rows, channels), holds NaN or infinity, or the streams do
        not cover the same time.
    """
    features: dict[str, np.ndarray] = {}
    interpolated: list[str] = []
    first: Feature | None = None
    for need in needs:
        feature = feature_of(store, need, video)
        rows = _checked(feature)  # (T, C)
        if first is None:
            first, axis, count = feature, feature.axis, rows.shape[0]
        elif same_axis(axis, feature.axis, rows=count):
            if abs(rows.shape[0] - count) > 1:
                raise StoreError(
                    f"video '{video}': stream '{first.stream}' has {count} rows and '{feature.stream}' {rows.shape[0]} "
                    "on the same time axis; one of them was cut short: extract it again"
                )
            count = min(count, rows.shape[0])
        else:
            rows = _interpolated(rows, feature, first, count)
            interpolated.append(need.key)
        features[need.key] = rows
    if first is None:
        raise RecipeError("a detector must read at least one stream")
    features = {key: pool_rows(rows[:count], row_spacing) for key, rows in features.items()}
    duration_s = float(feature_duration(first, count))
    return Sample(video, features, axis.pooled(row_spacing), duration_s, interpolated=tuple(interpolated))


def feature_duration(feature: Feature, rows: int) -> float:
    """The video's length in seconds as stored, or the end of the last row where the store does not know it."""
    known = feature.duration_s
    if np.isfinite(known) and known > 0:
        return known
    return float(feature.axis.center_s(rows - 1) + 0.5 * max(feature.axis.window_s, feature.axis.scale_s))


def same_axis(a: TimeAxis, b: TimeAxis, *, rows: int) -> bool:
    """Whether the centres of ``rows`` rows agree within a thousandth of a row."""
    last = max(rows - 1, 0)
    drift_s = max(abs(a.center_s(0) - b.center_s(0)), abs(a.center_s(last) - b.center_s(last)))
    return drift_s <= SAME_AXIS * a.scale_s


def interpolate_rows(rows: np.ndarray, axis: TimeAxis, at_s: np.ndarray) -> np.ndarray:
    """Rows (T, C) on ``axis``, read at ``at_s`` (M,) seconds -> (M, C) float32; beyond an end: the row at that end."""
    position = np.clip(axis.row_at(at_s), 0, rows.shape[0] - 1)  # (M,)
    left = np.floor(position).astype(np.int64)
    right = np.minimum(left + 1, rows.shape[0] - 1)
    weight = (position - left).astype(np.float32)[:, None]  # (M, 1)
    return rows[left].astype(np.float32) * (1 - weight) + rows[right].astype(np.float32) * weight  # (M, C)


def pool_rows(rows: np.ndarray, spacing: int) -> np.ndarray:
    """Means of every ``spacing`` neighbouring rows: (T, C) -> (ceil(T / spacing), C); the last group may be smaller."""
    if spacing == 1:
        return rows
    starts = np.arange(0, rows.shape[0], spacing)
    counts = np.minimum(starts + spacing, rows.shape[0]) - starts
    sums = np.add.reduceat(rows.astype(np.float32), starts, axis=0)  # (ceil(T / spacing), C)
    return sums / counts[:, None].astype(np.float32)


def _checked(feature: Feature) -> np.ndarray:
    where = f"video '{feature.video}', stream '{feature.stream}', level '{feature.level}'"
    rows = feature.numpy()
    if rows.ndim != 2:
        raise StoreError(f"{where}: a detector reads (rows, channels), this has shape {tuple(rows.shape)}")
    if rows.shape[0] == 0:
        raise StoreError(f"{where}: has no rows; extract it again")
    if not np.issubdtype(rows.dtype, np.floating):
        rows = rows.astype(np.float32)
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(axis=1)).sum())
        raise StoreError(f"{where}: {bad} of {rows.shape[0]} rows hold NaN or infinity; extract it again")
    return rows


def _interpolated(rows: np.ndarray, feature: Feature, first: Feature, count: int) -> np.ndarray:
    at_s = first.axis.center_s(np.arange(count))  # (T,)
    # The ends of two extractions differ by their windows and strides; more than that means different videos or a cut
    # one.
    allowed_s = 0.5 * feature.axis.window_s + feature.axis.scale_s
    begin_s, end_s = feature.axis.center_s(0), feature.axis.center_s(rows.shape[0] - 1)
    if begin_s - at_s[0] > allowed_s or at_s[-1] - end_s > allowed_s:
        raise StoreError(
            f"video '{feature.video}': stream '{feature.stream}' covers {begin_s:.2f}-{end_s:.2f} s, but "
            f"'{first.stream}' {at_s[0]:.2f}-{at_s[-1]:.2f} s; were both made from the same video?"
        )
    return interpolate_rows(rows, feature.axis, at_s)
