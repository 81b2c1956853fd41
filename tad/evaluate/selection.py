"""What is scored: which videos, true segments and predictions take part, and a count of all that does not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from tad.annotations import Truth, check_segments
from tad.errors import AnnotationError

Thresholds = float | Sequence[float] | np.ndarray


Value = TypeVar("Value")


class ByTiou(dict[float, Value]):
    """Values by tIoU. Keys are rounded to 6 decimals, and so are look-ups: 0.9 and 0.8999999999999999 are one key."""

    def __missing__(self, key: float) -> Value:
        rounded = round(float(key), 6)
        if rounded in self:
            return self[rounded]
        raise KeyError(f"tIoU {key}; there are {', '.join(f'{known:g}' for known in self)}")


def thresholds(tiou: Thresholds) -> tuple[float, ...]:
    """tIoU thresholds as floats, untouched (a threshold rounded is another threshold: 0.9 is not 0.8999999999999999).

    Raises
    ------
    AnnotationError : none, one twice, or one outside (0, 1].
    """
    values = tuple(float(value) for value in np.atleast_1d(np.asarray(tiou, dtype=np.float64)))
    if not values or not all(0 < value <= 1 for value in values):
        raise AnnotationError(f"tIoU thresholds must lie in (0, 1], got {values}")
    if len({round(value, 6) for value in values}) < len(values):
        raise AnnotationError(f"tIoU thresholds must differ, got {values}")
    return values


@dataclass(frozen=True, eq=False)
class Selection:
    """Checked tables to score, and the counts that every result carries.

    Attributes
    ----------
    truth, predictions : tables of segments, rows renumbered.
    videos : ids of the videos that are scored, with or without segments.
    counts : ``videos``, ``segments``, ``segments_left_out``, ``predictions``, ``predictions_left_out``,
        ``predictions_outside`` (on videos that the truth does not know).
    notes : sentences on what a reader of the score should know.
    """

    truth: pd.DataFrame
    predictions: pd.DataFrame
    videos: pd.Index
    counts: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def select(
    truth: Truth | pd.DataFrame,
    predictions: pd.DataFrame,
    *,
    labels: bool,
    videos: Iterable[str] | None = None,
    leave_out: Collection[str] = (),
    own_videos: bool = False,
    drop_zero_length: bool = False,
    dedupe_s: float | None = None,
) -> Selection:
    """Check both tables and take out what is not to be scored; see :func:`tad.evaluate.detection_map`."""
    segments = truth.segments if isinstance(truth, Truth) else truth
    segments = check_segments(segments, what="the truth", label=labels or dedupe_s is not None, ordered=True)
    if not labels and isinstance(predictions, pd.DataFrame):
        predictions = predictions.drop(columns="label", errors="ignore")
    predictions = check_segments(predictions, what="the predictions", label=labels, score=True)
    known = truth.videos["video"].tolist() if isinstance(truth, Truth) else segments["video"].unique().tolist()
    excluded = {leave_out} if isinstance(leave_out, str) else set(leave_out)
    wanted = set(known)
    if videos is not None:
        named = {videos} if isinstance(videos, str) else set(videos)
        wanted = wanted & named if isinstance(truth, Truth) else named
        segments, other_segments = _keep(segments, segments["video"].isin(list(named)))
        predictions, other_predictions = _keep(predictions, predictions["video"].isin(list(named)))
    else:
        other_segments = other_predictions = 0
    wanted -= excluded
    if own_videos:
        mine = predictions["video"].isin(segments["video"].unique().tolist())
        predictions, dropped = _keep(predictions, mine | predictions["video"].isin(list(excluded)))
        other_predictions += dropped
    segments, excluded_segments = _keep(segments, ~segments["video"].isin(list(excluded)))
    predictions, excluded_predictions = _keep(predictions, ~predictions["video"].isin(list(excluded)))

    left_out = {"other_videos": other_segments, "left_out_videos": excluded_segments}
    if drop_zero_length:
        segments, left_out["zero_length"] = _keep(segments, segments["end_s"] > segments["start_s"])
    if dedupe_s is not None:
        segments, left_out["duplicate"] = _keep(segments, ~duplicates(segments, dedupe_s))
    if segments.empty:
        raise AnnotationError(
            "the truth has no segment to score"
            + (f" (left out: {left_out})" if any(left_out.values()) else "; is it the right file and subset?")
        )
    index = pd.Index([video for video in dict.fromkeys([*known, *sorted(wanted)]) if video in wanted], dtype="object")
    outside = int((~predictions["video"].isin(index.tolist())).sum())
    counts: dict[str, Any] = {
        "videos": len(index),
        "segments": len(segments),
        "segments_left_out": {reason: number for reason, number in left_out.items() if number},
        "predictions": len(predictions),
        "predictions_left_out": {
            reason: number
            for reason, number in (("other_videos", other_predictions), ("left_out_videos", excluded_predictions))
            if number
        },
        "predictions_outside": outside,
    }
    notes: list[str] = []
    if outside:
        note = (
            f"{outside} of {len(predictions)} predictions are on videos that the truth does not know: false positives"
        )
        if outside == len(predictions):
            theirs, ours = predictions["video"].iloc[0], index[0]
            note += f"; ids of the predictions look like {theirs!r}, of the truth like {ours!r} (see strip_prefix)"
        notes.append(note)
    if predictions.empty:
        notes.append("there is no prediction to score")
    return Selection(segments, predictions, index, counts, notes)


def duplicates(segments: pd.DataFrame, tolerance_s: float) -> pd.Series:
    """Which segments repeat an earlier one of the same video and label, both ends within a tolerance (inclusive).

    As ActionFormer and OpenTAD do it: in the table's order, against those kept so far.
    """
    video, _ = pd.factorize(segments["video"])
    label, labels = pd.factorize(segments["label"])
    group = video * (len(labels) + 1) + label
    start, end = segments["start_s"].to_numpy(), segments["end_s"].to_numpy()
    order = np.lexsort((start, group))
    close = (np.diff(group[order]) == 0) & (np.diff(start[order]) <= tolerance_s)
    repeated = np.zeros(len(segments), dtype=bool)
    for suspect in np.unique(group[order[1:][close]]):  # few: only groups with two starts close together
        kept: list[int] = []
        for row in np.flatnonzero(group == suspect):
            if any(max(abs(start[row] - start[other]), abs(end[row] - end[other])) <= tolerance_s for other in kept):
                repeated[row] = True
            else:
                kept.append(int(row))
    return pd.Series(repeated, index=segments.index)


def _keep(table: pd.DataFrame, mask: pd.Series) -> tuple[pd.DataFrame, int]:
    """The rows of a mask, renumbered, and how many went."""
    if mask.all():
        return table, 0
    return table[mask].reset_index(drop=True), int((~mask).sum())
