"""Scores of whole videos or clips: top-1, top-5, mAP."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tad.annotations import Truth
from tad.errors import AnnotationError
from tad.evaluate.matching import average_precision

if TYPE_CHECKING:
    from rich.table import Table

Array = np.ndarray
TOP = (1, 5)


@dataclass(frozen=True, eq=False)
class ClassificationResult:
    """Scores of a classifier.

    Attributes
    ----------
    top : by k, the share of the videos with any of their labels among the k best scored classes.
    top_average : by k, the mean over the videos of the share of their labels among these; equal to ``top`` where every
        video has one label.
    mean_class_accuracy : mean over the classes of the share of their videos that have the class first.
    map : mean over the classes of ``ap``, the average precision by label.
    counts : ``videos, classes, labels`` (pairs of video and label), ``videos_multilabel, videos_without_scores``,
        ``scores_outside`` (videos that the truth does not know), ``scores_left_out``, ``classes_without_scores``,
        ``unknown_classes``.
    notes : sentences that a reader of the score should know.
    """

    top: dict[int, float]
    top_average: dict[int, float]
    mean_class_accuracy: float
    map: float
    ap: pd.Series
    counts: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def top1(self) -> float:
        return self.top[1]

    @property
    def top5(self) -> float:
        return self.top[5]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: ``top, top_average`` (by k), ``mean_class_accuracy, map, ap, counts, notes``."""
        return {
            "top": {str(k): value for k, value in self.top.items()},
            "top_average": {str(k): value for k, value in self.top_average.items()},
            "mean_class_accuracy": self.mean_class_accuracy,
            "map": self.map,
            "ap": {str(label): float(value) for label, value in self.ap.items()},
            "counts": self.counts,
            "notes": list(self.notes),
        }


def classification_scores(
    truth: Truth | pd.DataFrame,
    scores: pd.DataFrame,
    *,
    top: Sequence[int] = TOP,
    leave_out: Collection[str] = (),
) -> ClassificationResult:
    """Accuracy and mAP of scores by video (or clip) and class.

    As ActivityNet's ``eval_classification.py``: a video has each label of its segments once; all videos that have a
    score for a class are ranked by it, and precision is interpolated at all points; a video without scores is a miss.
    Otherwise than there, equal scores keep the order of the table (columns for top-k, rows for AP), and a class that
    the truth does not have is an ordinary wrong answer in top-k instead of a KeyError.

    Parameters
    ----------
    truth : columns ``video, label``, one row a label or segment; or a :class:`~tad.annotations.Truth`. Videos without a
        label are not scored. For clips, ``video`` is the id of the clip.
    scores : index video, columns classes, a higher value is surer; NaN where a class was not scored. Rows of videos
        that the truth does not know count in AP only, as wrong.
    top : the values of k. leave_out : videos to leave out on both sides, such as those of other subsets.

    Raises
    ------
    AnnotationError : missing columns, no label at all, a video or class twice, values that are no numbers, or infinite.
    """
    sizes = tuple(dict.fromkeys(int(k) for k in top))
    if not sizes or min(sizes) < 1:
        raise AnnotationError(f"top must be whole numbers of at least 1, got {tuple(top)}")
    excluded = [leave_out] if isinstance(leave_out, str) else list(leave_out)
    pairs = _labels(truth)
    values = _checked(scores)
    given = ~scores.index.isin(excluded)
    pairs, scores, values = pairs[~pairs["video"].isin(excluded)], scores[given], values[given]
    if pairs.empty:
        raise AnnotationError("the truth has no label to score; is it the right file and subset?")
    videos = pd.Index(pairs["video"].unique(), dtype="object")
    classes = pd.Index(sorted(pairs["label"].unique(), key=lambda label: (str(type(label)), label)), dtype="object")
    columns = pd.Index(scores.columns, dtype="object")
    rows = pd.Index(scores.index, dtype="object")

    row = rows.get_indexer(videos)  # (V,) -1: without scores
    column = columns.get_indexer(classes)  # (C,) -1: never scored
    has = np.zeros((len(videos), len(classes)), dtype=bool)
    has[videos.get_indexer(pairs["video"]), classes.get_indexer(pairs["label"])] = True

    place = np.full((len(videos), len(classes)), np.inf)  # rank of every class in every video, from 0
    place[np.ix_(row >= 0, column >= 0)] = _ranks(values)[np.ix_(row[row >= 0], column[column >= 0])]
    shares = {k: ((place < k) & has).sum(axis=1) / has.sum(axis=1) for k in sizes}
    first = ((place < 1) & has).sum(axis=0) / has.sum(axis=0)

    truth_row = videos.get_indexer(rows)  # of every scored video, -1 outside
    ap = np.zeros(len(classes))
    for c in np.flatnonzero(column >= 0):
        scored = np.flatnonzero(~np.isnan(values[:, column[c]]))
        order = scored[np.argsort(-values[scored, column[c]], kind="stable")]
        hits = (truth_row[order] >= 0) & has[truth_row[order], c]
        ap[c] = average_precision(hits[None], int(has[:, c].sum()))[0]

    unknown = [label for label in columns if label not in classes]
    absent = [label for label, index in zip(classes, column, strict=True) if index < 0]
    missing, outside = int((row < 0).sum()), int((truth_row < 0).sum())
    notes = []
    if missing:
        notes.append(f"{missing} of {len(videos)} videos have no scores: they count as misses")
    if outside:
        note = f"{outside} of {len(rows)} scored videos are not in the truth: false positives in AP"
        if outside == len(rows):
            note += f"; ids of the scores look like {rows[0]!r}, of the truth like {videos[0]!r}"
        notes.append(note)
    if absent:
        notes.append(f"{len(absent)} classes of the truth are never scored, AP 0: {_some(absent)}")
    if unknown:
        notes.append(f"{len(unknown)} scored classes are not in the truth, without AP: {_some(unknown)}")
    return ClassificationResult(
        top={k: float((share > 0).mean()) for k, share in shares.items()},
        top_average={k: float(share.mean()) for k, share in shares.items()},
        mean_class_accuracy=float(first.mean()),
        map=float(ap.mean()),
        ap=pd.Series(ap, index=classes.rename("label"), name="ap"),
        counts={
            "videos": len(videos),
            "classes": len(classes),
            "labels": int(has.sum()),
            "videos_multilabel": int((has.sum(axis=1) > 1).sum()),
            "videos_without_scores": missing,
            "scores_outside": outside,
            "scores_left_out": int((~given).sum()),
            "classes_without_scores": len(absent),
            "unknown_classes": len(unknown),
        },
        notes=tuple(notes),
    )


def classification_table(result: ClassificationResult) -> Table:
    """A result as a rich table in percent."""
    from rich.table import Table

    counts = result.counts
    title = f"{counts['videos']} videos, {counts['classes']} classes"
    if counts["videos_multilabel"]:
        title += f", {counts['videos_multilabel']} videos with several labels"
    grid = Table("score", "%", title=title)
    for k, value in result.top.items():
        grid.add_row(f"top-{k}", f"{100 * value:.2f}")
        if counts["videos_multilabel"]:
            grid.add_row(f"top-{k}, mean over a video's labels", f"{100 * result.top_average[k]:.2f}")
    grid.add_row("mean class accuracy", f"{100 * result.mean_class_accuracy:.2f}")
    grid.add_row("mAP", f"{100 * result.map:.2f}")
    return grid


def _labels(truth: Truth | pd.DataFrame) -> pd.DataFrame:
    """Each pair of video and label once, checked."""
    table = truth.segments if isinstance(truth, Truth) else truth
    if not isinstance(table, pd.DataFrame) or not {"video", "label"} <= set(table.columns):
        raise AnnotationError("the truth must be a table with the columns video and label")
    pairs = table[["video", "label"]].astype("object")
    if (bad := pairs.isna().any(axis=1)).any():
        raise AnnotationError(f"the truth: row {int(np.flatnonzero(bad)[0])}: video or label is missing")
    if not all(isinstance(value, Hashable) for name in pairs for value in pairs[name]):
        raise AnnotationError("the truth: videos and labels must be text or numbers")
    return pairs.drop_duplicates()


def _checked(scores: pd.DataFrame) -> Array:
    """(videos, classes) floats, NaN where nothing was scored."""
    if not isinstance(scores, pd.DataFrame):
        raise AnnotationError(f"scores must be a table of videos by classes, got {type(scores).__name__}")
    for what, index in (("video", scores.index), ("class", scores.columns)):
        if index.has_duplicates:
            raise AnnotationError(f"the scores: {what} {index[index.duplicated()][0]!r} occurs twice")
    try:
        values = scores.to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise AnnotationError(f"the scores must be numbers: {error}") from None
    if np.isinf(values).any():
        video, label = np.argwhere(np.isinf(values))[0]
        raise AnnotationError(f"the scores: {scores.index[video]!r}, {scores.columns[label]!r} is infinite")
    return values


def _ranks(values: Array) -> Array:
    """(V, C) rank of each class in its video, from 0 for the best; equal scores by column; inf where not scored."""
    order = np.argsort(np.where(np.isnan(values), np.inf, -values), axis=1, kind="stable")
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(values.shape[1], dtype=np.float64), values.shape), axis=1)
    ranks[np.isnan(values)] = np.inf
    return ranks


def _some(labels: list[Any]) -> str:
    return ", ".join(repr(label) for label in labels[:5]) + (", ..." if len(labels) > 5 else "")
