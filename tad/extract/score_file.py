"""The file that ``tad classify`` fills, video by video, and how good the scores in it are."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tad.annotations import Truth, read_scores_about, read_video_scores, write_video_scores
from tad.errors import RecipeError
from tad.extract.inputs import VideoFile
from tad.extract.video import check_unchanged, source_of

SAVE_S = 60.0  # the file is written that often, and at the end


class ScoreFile:
    """A file of scores that grows; ``about`` says how they are made, all of them alike."""

    def __init__(self, path: Path, classes: list[str], about: dict[str, Any], *, overwrite: bool) -> None:
        self.path, self.classes, self.about = path, classes, about
        self.rows: dict[str, list[float]] = {}
        self.sources: dict[str, Any] = {}
        self.saved_at, self.changed = time.monotonic(), False
        if not path.exists():
            return
        old = read_scores_about(path)
        sources = old.pop("sources", {})
        table = read_video_scores(path)
        if old == about and table.columns.tolist() == classes and isinstance(sources, dict):
            self.rows = dict(zip(table.index.tolist(), table.to_numpy().tolist(), strict=True))
            self.sources = sources
        elif not overwrite:
            changed = [key for key in {**old, **about} if old.get(key) != about.get(key)] or ["classes"]
            raise RecipeError(
                f"{path} holds scores that were made otherwise ({', '.join(changed)}): take another file, or overwrite"
            )

    def holds(self, file: VideoFile) -> bool:
        """Whether the scores of this very file are there."""
        return file.video in self.rows and file.path.is_file() and self.sources.get(file.video) == source_of(file.path)

    def add(self, file: VideoFile, scores: np.ndarray, *, source: Mapping[str, str | int]) -> None:
        """Take the scores of a file that was ``source`` before it was opened.

        Raises
        ------
        VideoError : it has changed since.
        """
        check_unchanged(file.path, source)
        self.rows[file.video] = [float(f"{score:.7g}") for score in scores]
        self.sources[file.video] = dict(source)
        self.changed = True
        if time.monotonic() - self.saved_at > SAVE_S:
            self.save()

    def save(self) -> None:
        if self.changed or not self.path.exists():
            about = {**self.about, "sources": self.sources}
            write_video_scores(self.path, self.frame(list(self.rows)), about=about)
            self.saved_at, self.changed = time.monotonic(), False

    def frame(self, videos: Sequence[str]) -> pd.DataFrame:
        """The scores of these videos, of those that are there."""
        there = [video for video in videos if video in self.rows]
        values = np.array([self.rows[video] for video in there], float).reshape(len(there), len(self.classes))
        return pd.DataFrame(values, index=pd.Index(there, name="video", dtype="str"), columns=self.classes)


def video_accuracy(scores: pd.DataFrame, truth: Truth) -> dict[str, Any] | None:
    """How good the scores are, over the ``videos`` with an action that is among the scored classes; ``None`` where
    there is none.

    ``top1`` and ``top5`` are the part of them in which one of the best 1, 5 classes occurs; ``map`` is the mean over
    classes of the interpolated average precision of ranking all videos.
    """
    segments = truth.segments[truth.segments["label"].isin(scores.columns)]
    present = {str(video): set(labels) for video, labels in segments.groupby("video")["label"]}
    names = np.array(scores.columns.tolist(), dtype=object)
    hits = {1: 0, 5: 0}
    counted = 0
    for video, row in zip(scores.index.tolist(), scores.to_numpy(), strict=True):
        if video in present:
            best = names[np.argsort(-row, kind="stable")]
            counted += 1
            for k in hits:
                hits[k] += bool(present[video] & set(best[:k]))
    if not counted:
        return None
    precisions = []
    for number, name in enumerate(names):
        relevant = np.array([name in present.get(video, ()) for video in scores.index])
        if relevant.any():
            ranked = relevant[np.argsort(-scores.to_numpy()[:, number], kind="stable")]
            places = np.flatnonzero(ranked) + 1
            precision = np.arange(1, len(places) + 1) / places
            precisions.append(float(np.maximum.accumulate(precision[::-1]).mean()))
    return {
        "videos": counted,
        "top1": hits[1] / counted,
        "top5": hits[5] / counted,
        "map": float(np.mean(precisions)),
    }
