"""Average recall of proposals at an average number of them per video (AR@AN), and the area under that curve."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tad.annotations import Truth
from tad.errors import AnnotationError
from tad.evaluate.detection import ANET_TIOU
from tad.evaluate.matching import pairs
from tad.evaluate.matching import tiou as segment_tiou
from tad.evaluate.selection import Thresholds, select, thresholds

if TYPE_CHECKING:
    from rich.table import Table

POINTS = 100  # at which the official evaluator samples the curve, whatever the largest AN is


@dataclass(frozen=True, eq=False)
class ProposalResult:
    """Recall of proposals.

    Attributes
    ----------
    average_number : (P,) average number of proposals per video (AN) at the points of the curve.
    average_recall : (P,) AR at these points: recall averaged over the thresholds.
    recall : one row a tIoU, one column a point.
    auc : area under the curve of AR over AN, divided by the last AN: 0 ... 1 (ActivityNet prints 100 times that).
    counts, protocol, notes : as in :class:`~tad.evaluate.detection.DetectionResult`.
    """

    average_number: np.ndarray
    average_recall: np.ndarray
    recall: pd.DataFrame
    auc: float
    counts: dict[str, Any]
    protocol: str | None = None
    notes: tuple[str, ...] = ()

    def at(self, number: float) -> float:
        """AR@``number``; between two points of the curve it is interpolated.

        Raises
        ------
        AnnotationError : outside the curve.
        """
        first, last = float(self.average_number[0]), float(self.average_number[-1])
        if not first - 1e-9 <= number <= last + 1e-9:
            raise AnnotationError(f"AR@{number:g} is outside the curve, which goes from {first:g} to {last:g}")
        return float(np.interp(number, self.average_number, self.average_recall))

    @property
    def ar(self) -> dict[int, float]:
        """AR by the whole numbers 1, 2, ... of proposals per video that lie on the curve."""
        first = max(1, int(np.ceil(self.average_number[0] - 1e-9)))
        return {number: self.at(number) for number in range(first, int(self.average_number[-1] + 1e-9) + 1)}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: ``ar`` (at 1, 5, 10, 50, 100 and the last), ``auc``, ``recall`` (by tIoU, at the last),
        ``curve`` (lists ``average_number``, ``average_recall``), ``counts, protocol, notes``.
        """
        known = self.ar
        shown = sorted({number for number in (1, 5, 10, 50, 100) if number in known} | set(list(known)[-1:]))
        return {
            "ar": {str(number): known[number] for number in shown},
            "auc": self.auc,
            "recall": {f"{key:g}": float(value) for key, value in self.recall.iloc[:, -1].items()},
            "curve": {
                "average_number": self.average_number.tolist(),
                "average_recall": self.average_recall.tolist(),
            },
            "counts": self.counts,
            "protocol": self.protocol,
            "notes": list(self.notes),
        }


def average_recall(
    truth: Truth | pd.DataFrame,
    predictions: pd.DataFrame,
    tiou: Thresholds = ANET_TIOU,
    max_avg: float | None = 100,
    *,
    points: int = POINTS,
    videos: Iterable[str] | None = None,
    leave_out: Collection[str] = (),
    own_videos: bool = False,
    drop_zero_length: bool = False,
    dedupe_s: float | None = None,
) -> ProposalResult:
    """AR@AN and its area, as ActivityNet's ``eval_proposal.py`` computes them.

    A true segment is found when any proposal of its video reaches the threshold; labels play no part. The proposals
    of a video are not cut at AN: with ``max_avg`` as goal each video gives the same fraction of its own, the best
    scored first (equal scores: input order), so that AN holds on average over the videos with segments. Where the
    official evaluator divides by zero because nothing is predicted, recall is 0 and a note says so.

    Parameters
    ----------
    truth : segments ``video, start_s, end_s``, or a :class:`~tad.annotations.Truth`.
    predictions : ``video, start_s, end_s, score``; a label is ignored.
    tiou : thresholds in (0, 1].
    max_avg : the last AN of the curve; None: as many as there are on average.
    points : of the curve; 100 as there, also when ``max_avg`` is less (OpenTAD takes ``max_avg`` points).
    videos, leave_out, own_videos, drop_zero_length, dedupe_s : as in :func:`~tad.evaluate.detection.detection_map`.

    Raises
    ------
    AnnotationError : as :func:`~tad.evaluate.detection.detection_map`, or ``max_avg`` or ``points`` not positive.
    """
    levels = thresholds(tiou)
    if (max_avg is not None and not 0 < max_avg < np.inf) or points < 1:
        raise AnnotationError(f"max_avg and points must be positive, got {max_avg} and {points}")
    chosen = select(
        truth,
        predictions,
        labels=False,
        videos=videos,
        leave_out=leave_out,
        own_videos=own_videos,
        drop_zero_length=drop_zero_length,
        dedupe_s=dedupe_s,
    )
    true, predicted, notes = chosen.truth, chosen.predictions, list(chosen.notes)
    ids = pd.Index(true["video"].unique().tolist(), dtype="object")
    true_video = ids.get_indexer(true["video"].astype("object"))
    video = ids.get_indexer(predicted["video"].astype("object"))

    goal = max_avg if max_avg is not None else len(predicted) / len(ids)
    fraction = goal * float(len(ids)) / len(predicted) if len(predicted) else 0.0
    available = np.bincount(video[video >= 0], minlength=len(ids))
    chosen_number = np.minimum((available * fraction).astype(np.int64), available)  # per video
    total = int(chosen_number.sum())
    if total:
        # The order of these operations is ActivityNet's: a rounding apart, another number of proposals.
        share = np.arange(1, points + 1) / float(points) * (goal * float(len(ids)) / total)
        average_number = share * (float(total) / len(ids))
        first = _first_hits(true, true_video, predicted, video, chosen_number, levels)  # (M, T)
        reach = np.minimum((chosen_number[:, None] * share).astype(np.int64), chosen_number[:, None])  # (V, P)
        recall = np.stack([(first < reach[true_video, point, None]).mean(axis=0) for point in range(points)], axis=1)
    else:
        average_number = np.arange(1, points + 1) / float(points) * (goal or 1.0)
        recall = np.zeros((len(levels), points))
        notes.append("no video with a true segment has a proposal: recall is 0")

    mean = recall.mean(axis=0)
    keys = pd.Index([round(level, 6) for level in levels], name="tiou")
    return ProposalResult(
        average_number=average_number,
        average_recall=mean,
        recall=pd.DataFrame(recall, index=keys, columns=pd.Index(average_number, name="average_number")),
        auc=float(np.trapezoid(mean, average_number) / average_number[-1]),
        counts=chosen.counts,
        notes=tuple(notes),
    )


def recall_table(result: ProposalResult) -> Table:
    """A result as a rich table in percent: recall at 1, 5, 10, 50, 100 proposals a video by tIoU, then AR and AUC."""
    from rich.table import Table

    known = result.ar
    shown = sorted({number for number in (1, 5, 10, 50, 100) if number in known} | set(list(known)[-1:]))
    title = f"{result.protocol or 'AR@AN'}: {result.counts['videos']} videos, {result.counts['segments']} segments"
    grid = Table("tIoU", *(f"@{number}" for number in shown), title=title)
    for key, recall in zip(result.recall.index, result.recall.to_numpy(), strict=True):
        grid.add_row(f"{key:g}", *(f"{100 * np.interp(n, result.average_number, recall):.2f}" for n in shown))
    grid.add_row("[b]AR[/b]", *(f"{100 * known[number]:.2f}" for number in shown))
    grid.add_row("[b]AUC[/b]", *[""] * max(0, len(shown) - 1), f"{100 * result.auc:.2f}")
    return grid


def _first_hits(
    true: pd.DataFrame,
    true_video: np.ndarray,
    predicted: pd.DataFrame,
    video: np.ndarray,
    chosen_number: np.ndarray,
    levels: tuple[float, ...],
) -> np.ndarray:
    """For every true segment and threshold the rank (from 0) of the first proposal that finds it; huge for none."""
    order = np.argsort(-predicted["score"].to_numpy(), kind="stable")
    order = order[np.argsort(video[order], kind="stable")]  # by video, then falling score
    begin = np.searchsorted(video[order], np.arange(len(chosen_number)))
    rank = np.arange(len(order)) - begin[video[order]]
    rank[video[order] < 0] = 0
    kept = (video[order] >= 0) & (rank < chosen_number[video[order]])
    order, rank = order[kept], rank[kept]
    segments, truths = predicted[["start_s", "end_s"]].to_numpy()[order], true[["start_s", "end_s"]].to_numpy()
    nobody = np.iinfo(np.int64).max
    first = np.full((len(true), len(levels)), nobody)
    for a, b in pairs(true_video, video[order]):
        if not len(a):
            continue
        # 0/0 is no match here: in this evaluator NaN is compared the other way round than in that of detections.
        value = segment_tiou(truths[a, 0], truths[a, 1], segments[b, 0], segments[b, 1], both_empty=0.0)
        rows, starts = np.unique(a, return_index=True)
        for column, level in enumerate(levels):
            first[rows, column] = np.minimum.reduceat(np.where(value >= level, rank[b], nobody), starts)
    return first
