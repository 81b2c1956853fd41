"""Every class's predictions, best first, with the true segment that each takes: what all scores are computed from."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tad.annotations import Truth
from tad.evaluate.matching import match
from tad.evaluate.selection import Thresholds, select, thresholds

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Ranked:
    """Checked and matched tables; M true segments, N predictions of known labels, T thresholds, C classes, V videos.

    Attributes
    ----------
    levels : T thresholds of tIoU, untouched.
    classes : C labels of the truth, sorted.
    videos : V ids: those scored, then those that only predictions name.
    truth : M segments, in the order given; ``true_label``, ``true_video`` : (M,) indices into classes and videos.
    predictions : N segments, by class, then falling score (equal scores: the order given); ``label``, ``video`` : (N,).
    taken : (T, N) row of ``truth`` that a prediction takes, -1 for none.
    edges : (C + 1,) the predictions of class c are those from ``edges[c]`` up to ``edges[c + 1]``.
    positives : (C,) number of true segments.
    counts, notes : as in :class:`~tad.evaluate.detection.DetectionResult`.
    """

    levels: tuple[float, ...]
    classes: pd.Index
    videos: pd.Index
    truth: pd.DataFrame
    true_label: Array
    true_video: Array
    predictions: pd.DataFrame
    label: Array
    video: Array
    taken: Array
    edges: Array
    positives: Array
    counts: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def rank(self) -> Array:
        """(N,) position of each prediction in its class, from 0."""
        return np.arange(len(self.label)) - self.edges[self.label]


def rank(
    truth: Truth | pd.DataFrame,
    predictions: pd.DataFrame,
    tiou: Thresholds,
    *,
    videos: Iterable[str] | None = None,
    leave_out: Collection[str] = (),
    own_videos: bool = False,
    drop_zero_length: bool = False,
    dedupe_s: float | None = None,
    single_precision: bool = False,
) -> Ranked:
    """Check, select, match and sort; options and errors as :func:`tad.evaluate.detection_map`."""
    levels = thresholds(tiou)
    chosen = select(
        truth,
        predictions,
        labels=True,
        videos=videos,
        leave_out=leave_out,
        own_videos=own_videos,
        drop_zero_length=drop_zero_length,
        dedupe_s=dedupe_s,
    )
    counts, notes = dict(chosen.counts), list(chosen.notes)
    true, predicted = chosen.truth, chosen.predictions
    names = sorted(true["label"].unique().tolist(), key=lambda name: (str(type(name)), name))
    classes = pd.Index(names, dtype="object")
    label = classes.get_indexer(predicted["label"].astype("object"))
    if (unknown := label < 0).any():
        tally = predicted["label"][unknown].value_counts()
        found = dict(sorted(tally.items(), key=lambda item: (-item[1], str(item[0]))))
        counts["unknown_labels"] = {str(name): int(number) for name, number in found.items()}
        counts["predictions_left_out"] = {**counts["predictions_left_out"], "unknown_label": int(unknown.sum())}
        shown = ", ".join(repr(name) for name in list(found)[:5]) + (", ..." if len(found) > 5 else "")
        notes.append(f"{int(unknown.sum())} predictions have labels that the truth does not have, left out: {shown}")
        predicted, label = predicted[~unknown], label[~unknown]
        counts["predictions"] = len(predicted)
    counts = {"videos": counts.pop("videos"), "classes": len(classes), **counts}

    score = predicted["score"].to_numpy()
    order = np.argsort(-score, kind="stable")
    order = order[np.argsort(label[order], kind="stable")]  # by class, then falling score
    predicted, label = predicted.iloc[order].reset_index(drop=True), label[order]

    known = chosen.videos
    elsewhere = predicted["video"][~predicted["video"].isin(known.tolist())].unique().tolist()
    ids = pd.Index([*known, *elsewhere], dtype="object")
    true_label = classes.get_indexer(true["label"].astype("object"))
    true_video = ids.get_indexer(true["video"].astype("object"))
    video = ids.get_indexer(predicted["video"].astype("object"))
    taken = match(
        true_video * len(classes) + true_label,
        true[["start_s", "end_s"]].to_numpy(),
        video * len(classes) + label,
        predicted[["start_s", "end_s"]].to_numpy(),
        score[order],
        levels,
        single_precision=single_precision,
    )  # (T, N)
    return Ranked(
        levels=levels,
        classes=classes.rename("label"),
        videos=ids,
        truth=true,
        true_label=true_label,
        true_video=true_video,
        predictions=predicted,
        label=label,
        video=video,
        taken=taken,
        edges=np.searchsorted(label, np.arange(len(classes) + 1)),
        positives=np.bincount(true_label, minlength=len(classes)),
        counts=counts,
        notes=tuple(notes),
    )
