"""Mean average precision of detections, as ActivityNet's evaluator computes it, for all thresholds at once."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tad.annotations import Truth
from tad.evaluate.matching import average_precision
from tad.evaluate.ranked import rank
from tad.evaluate.selection import ByTiou, Thresholds

if TYPE_CHECKING:
    from rich.table import Table

THUMOS_TIOU = (0.3, 0.4, 0.5, 0.6, 0.7)
# Not written as decimals: ActivityNet's 0.9 is linspace's 0.8999999999999999, and tIoU is compared exactly.
ANET_TIOU = tuple(np.linspace(0.5, 0.95, 10).tolist())


@dataclass(frozen=True, eq=False)
class DetectionResult:
    """Scores of detections and what they are scores of.

    Attributes
    ----------
    map : mAP by tIoU, each in 0 ... 1.
    average : mean of ``map`` over the thresholds.
    ap : average precision, one row a tIoU, one column a class of the truth.
    counts : ``videos, classes, segments, segments_left_out, predictions, predictions_left_out, predictions_outside,
        unknown_labels``: how many were scored, how many not and why.
    protocol : name of the protocol, None when none was named.
    notes : sentences that a reader of the score should know, such as videos missing from the annotation.
    """

    map: dict[float, float]
    average: float
    ap: pd.DataFrame
    counts: dict[str, Any]
    protocol: str | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: ``map, average_map, ap`` (by label, then tIoU), ``counts, protocol, notes``."""
        return {
            "map": {f"{key:g}": value for key, value in self.map.items()},
            "average_map": self.average,
            "ap": {
                str(label): {f"{key:g}": float(value) for key, value in self.ap[label].items()} for label in self.ap
            },
            "counts": self.counts,
            "protocol": self.protocol,
            "notes": list(self.notes),
        }


def detection_map(
    truth: Truth | pd.DataFrame,
    predictions: pd.DataFrame,
    tiou: Thresholds = THUMOS_TIOU,
    *,
    videos: Iterable[str] | None = None,
    leave_out: Collection[str] = (),
    own_videos: bool = False,
    drop_zero_length: bool = False,
    dedupe_s: float | None = None,
    single_precision: bool = False,
) -> DetectionResult:
    """Mean average precision over the classes that occur in the truth.

    A prediction is right when it takes a true segment of its video and class (:func:`tad.evaluate.matching.match`);
    precision is interpolated at all points. Values equal those of ActivityNet's ``eval_detection.py``, except that

    - equal scores keep the order of the table (there it depends on the machine),
    - predictions of a label that the truth does not have are left out and counted (there a KeyError),
    - an inverted prediction matches nothing (there one whose length is exactly minus that of a true segment does).

    Parameters
    ----------
    truth : segments ``video, start_s, end_s, label``, or a :class:`~tad.annotations.Truth`. Duplicates and
        zero-length segments count, as there: a prediction of zero length is right on one of its video and class.
    predictions : ``video, start_s, end_s, label, score``; a higher score is surer. Predictions on videos that are not
        in the truth are false positives.
    tiou : thresholds in (0, 1]; a match needs at least as much.
    videos : score these videos only; truth and predictions of all others are left out.
    leave_out : videos to leave out on both sides.
    own_videos : leave out predictions on videos without a true segment, as AFSD does; else they are false positives.
    drop_zero_length : leave out true segments of zero length, as OpenTAD does.
    dedupe_s : leave out true segments that repeat one of the same video and label, both ends within so many seconds
        (ActionFormer and OpenTAD: 1e-3).
    single_precision : round tIoU to float32 before it meets the thresholds, as mmaction2 does: exact hits at 0.65, 0.7,
        0.9 and 0.95 are then missed.

    Raises
    ------
    AnnotationError : a table that lacks columns or has missing values, NaN or infinite numbers, a true segment whose
        end lies before its start, no true segment at all, or thresholds outside (0, 1].
    """
    ranked = rank(
        truth,
        predictions,
        tiou,
        videos=videos,
        leave_out=leave_out,
        own_videos=own_videos,
        drop_zero_length=drop_zero_length,
        dedupe_s=dedupe_s,
        single_precision=single_precision,
    )
    hits, edges = ranked.taken >= 0, ranked.edges
    ap = np.empty((len(ranked.levels), len(ranked.classes)))
    for column, positives in enumerate(ranked.positives.tolist()):
        ap[:, column] = average_precision(hits[:, edges[column] : edges[column + 1]], positives)

    keys = [round(level, 6) for level in ranked.levels]
    means = ap.mean(axis=1)
    return DetectionResult(
        map=ByTiou(zip(keys, means.tolist(), strict=True)),
        average=float(means.mean()),
        ap=pd.DataFrame(ap, index=pd.Index(keys, name="tiou"), columns=ranked.classes),
        counts=ranked.counts,
        notes=ranked.notes,
    )


def table(result: DetectionResult) -> Table:
    """A result as a rich table in percent: mAP and the classes, one column a tIoU."""
    from rich.markup import escape
    from rich.table import Table

    title = f"{result.protocol or 'mAP'}: {result.counts['videos']} videos, {result.counts['segments']} segments"
    grid = Table("class", *(f"{key:g}" for key in result.map), "average", title=title)
    grid.add_row("[b]mAP[/b]", *(f"{100 * value:.2f}" for value in result.map.values()), f"{100 * result.average:.2f}")
    for label in result.ap:
        values = result.ap[label].to_numpy()
        grid.add_row(escape(str(label)), *(f"{100 * value:.2f}" for value in values), f"{100 * values.mean():.2f}")
    return grid
