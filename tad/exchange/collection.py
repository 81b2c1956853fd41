"""What is exchanged: segments of videos, and what is known of the videos."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from tad.annotations import Truth, canonical_subset, check_segments
from tad.annotations._files import Problems, as_number, bad_text, shown
from tad.errors import AnnotationError

VIDEO_COLUMNS = {"video": "str", "subset": "str", "duration_s": "float64", "fps": "float64"}
SUBSETS = ("training", "validation", "testing")  # what read_truth takes, in any of their spellings
LAST_FRAME = 2**53  # from here on a float cannot tell neighbouring frames apart


class Segment(NamedTuple):
    """One row of a video; ``score`` is None in truth."""

    start_s: float
    end_s: float
    label: str
    score: float | None


@dataclass(frozen=True, eq=False)
class Collection:
    """Segments and their videos.

    Attributes
    ----------
    segments : ``video, start_s, end_s, label`` and, for predictions, ``score``; times in seconds, any order.
    videos : ``video, subset, duration_s, fps``; "" and NaN where unknown. Videos without a segment are in it.
    notes : what a file held that is no segment, one sentence each.
    """

    segments: pd.DataFrame
    videos: pd.DataFrame
    notes: tuple[str, ...] = field(default=())

    @property
    def scored(self) -> bool:
        """Whether these are predictions."""
        return "score" in self.segments.columns

    @classmethod
    def of(
        cls,
        segments: pd.DataFrame,
        videos: pd.DataFrame | Truth | None = None,
        *,
        notes: Iterable[str] = (),
        what: str = "the segments",
    ) -> Collection:
        """A collection from tables; videos that only the segments name are added.

        Raises :class:`AnnotationError` for missing columns, ids or labels that are no text, numbers that are not
        finite, durations and frame rates that are not positive, and truth that starts before 0 or ends before its
        start (predictions may: they are false positives).
        """
        scored = "score" in segments.columns
        table = check_segments(segments, what=what, label=True, score=scored, text=True)
        problems = Problems(what)
        if not scored:
            _check_truth(table, problems)
        known = videos.videos if isinstance(videos, Truth) else videos
        if known is None:
            known = pd.DataFrame({"video": pd.Series(dtype="str")})
        known = _checked_videos(known.reindex(columns=list(VIDEO_COLUMNS)), problems)
        listed = set(known["video"].tolist())
        extra = [video for video in dict.fromkeys(table["video"].tolist()) if video not in listed]
        if extra:
            new = pd.DataFrame({"video": extra, "subset": "", "duration_s": math.nan, "fps": math.nan})
            known = pd.concat([known, new.astype(VIDEO_COLUMNS)])
        return cls(table, known.reset_index(drop=True), tuple(notes))

    def select(
        self, *, min_score: float | None = None, max_segments: int | None = None, subset: str | None = None
    ) -> Collection:
        """The part that people can look at: a subset's videos, scores from ``min_score`` on, the ``max_segments`` best
        of each video.
        """
        videos, segments = self.videos, self.segments
        if subset is not None:
            videos = Truth(videos, pd.DataFrame(columns=["subset"])).subset(subset).videos
            segments = segments[segments["video"].isin(videos["video"])]
        if (min_score is not None or max_segments is not None) and not self.scored:
            raise AnnotationError("only predictions have scores to select by; these segments are truth")
        if min_score is not None:
            if math.isnan(min_score):
                raise AnnotationError("min_score is NaN, which no score reaches; give a number")
            segments = segments[segments["score"] >= min_score]
        if max_segments is not None:
            if max_segments < 1:
                raise AnnotationError(f"max_segments must be at least 1, got {max_segments}")
            best = segments.sort_values("score", ascending=False, kind="stable").groupby("video").head(max_segments)
            segments = segments.loc[segments.index.isin(best.index)]
        return Collection(segments.reset_index(drop=True), videos.reset_index(drop=True), self.notes)

    def filled(self, known: pd.DataFrame) -> Collection:
        """With subsets, durations and frame rates of a table of videos where this collection has none of its own."""
        others = known.drop_duplicates("video").set_index("video")
        videos = self.videos.copy()
        for name in ("subset", "duration_s", "fps"):
            if name in others.columns:
                theirs = videos["video"].map(others[name])
                missing = videos[name].eq("") if name == "subset" else videos[name].isna()
                videos[name] = videos[name].where(~missing | theirs.isna(), theirs)
        return Collection(self.segments, videos.astype(VIDEO_COLUMNS), self.notes)

    def by_video(self) -> dict[str, list[Segment]]:
        """The segments of every video, by start, then as they came; videos without any have an empty list."""
        ordered = self.segments.sort_values("start_s", kind="stable")
        rows: dict[str, list[Segment]] = {video: [] for video in self.videos["video"].tolist()}
        scores = ordered["score"].tolist() if self.scored else [None] * len(ordered)
        columns = [ordered[name].tolist() for name in ("video", "start_s", "end_s", "label")]
        for video, start_s, end_s, label, score in zip(*columns, scores, strict=True):
            rows.setdefault(video, []).append(Segment(start_s, end_s, label, score))
        return rows

    @functools.cached_property
    def _fps(self) -> dict[str, float]:
        return dict(zip(self.videos["video"].tolist(), self.videos["fps"].tolist(), strict=True))

    def fps_of(self, video: str, options: Options) -> float:
        """The frame rate of a video. Raises :class:`AnnotationError` where neither it nor the options know one."""
        own = self._fps.get(video, math.nan)
        fps = options.fps_of(video) if math.isnan(own) else own
        if fps is None:
            raise AnnotationError(
                f"video {video!r}: this format counts frames and the video's frame rate is not known; give fps"
            )
        return fps


@dataclass(frozen=True)
class Options:
    """What a format may need beside the segments: frame rates, a subset for videos that have none, and how the
    videos' files are called. ``rates`` are those of single videos; ``fps`` is that of all others.
    """

    fps: float | None = None
    subset: str | None = None
    media: str = "{video}.mp4"
    rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        real = isinstance(self.fps, numbers.Real) and not isinstance(self.fps, bool)
        if self.fps is not None and not (real and 0 < self.fps < math.inf):
            raise AnnotationError(f"fps must be a positive number of frames a second, got {shown(self.fps)}")
        if self.subset is not None:
            check_subset(self.subset)
        if not isinstance(self.media, str) or "{video}" not in self.media:
            raise AnnotationError(f"media {self.media!r} must hold {{video}}, the place of the video's id")

    def media_of(self, video: str) -> str:
        """The name of a video's file."""
        return self.media.replace("{video}", video)

    def fps_of(self, video: str) -> float | None:
        """The frame rate to take for a video whose file does not say it."""
        fps = self.rates.get(video, self.fps)
        return None if fps is None else float(fps)  # numpy's numbers are no JSON


@dataclass(frozen=True)
class Format:
    """How one tool keeps segments.

    Attributes
    ----------
    title : the tool.
    suffix : of its files.
    read : from a path. render : the texts of the files to write at a path.
    folder : one file a video, in a folder.
    tolerance : how exactly times survive writing and reading.
    """

    title: str
    suffix: str
    read: Callable[[Path, Options], Collection]
    render: Callable[[Collection, Path, Options], dict[Path, str]]
    folder: bool
    tolerance: str


def check_subset(subset: str, where: str = "") -> None:
    """Raises :class:`AnnotationError` for a subset that reading the written file would refuse."""
    if not isinstance(subset, str) or canonical_subset(subset) not in SUBSETS:
        raise AnnotationError(f"{where}subset {subset!r} is not one that tad reads; use {', '.join(SUBSETS)}")


def check_times(collection: Collection, tool: str) -> None:
    """Raises :class:`AnnotationError` for predictions before the video or with the end before the start."""
    table = collection.segments
    bad = np.flatnonzero(((table["start_s"] < 0) | (table["end_s"] < table["start_s"])).to_numpy())
    if len(bad):
        video, start_s, end_s = table.iloc[bad[0]][["video", "start_s", "end_s"]]
        raise AnnotationError(
            f"video {video!r}: {start_s:g} s to {end_s:g} s is negative or ends before it starts, which {tool} cannot "
            "hold; correct or leave out such predictions"
        )


def frames_of(start_s: float, end_s: float, fps: float) -> tuple[int, int]:
    """First and last frame, counted from 1 and both included, that a segment touches.

    Raises :class:`AnnotationError` for times at which frames can no longer be counted.
    """
    if not max(abs(start_s), abs(end_s)) * fps < LAST_FRAME:
        raise AnnotationError(f"{start_s:g} s to {end_s:g} s at {fps:g} frames a second is more than can be counted")
    first = math.floor(start_s * fps + 1e-6) + 1
    return first, max(first, math.ceil(end_s * fps - 1e-6))


def seconds_of(first: float, last: float, fps: float) -> tuple[float, float]:
    """From the beginning of the first frame to the end of the last, frames counted from 1."""
    return (first - 1) / fps, last / fps


def _check_truth(table: pd.DataFrame, problems: Problems) -> None:
    starts, ends = table["start_s"].to_numpy(), table["end_s"].to_numpy()
    for row in np.flatnonzero((starts < 0) | (ends < starts)).tolist():
        where = f"row {row}, video {table['video'].iloc[row]!r}"
        if starts[row] < 0:
            problems.add(where, f"the start {starts[row]:g} s is negative; times count from the video's beginning")
        else:
            problems.add(
                where, f"the end {ends[row]:g} s lies before the start {starts[row]:g} s; swap or correct them"
            )


def _checked_videos(known: pd.DataFrame, problems: Problems) -> pd.DataFrame:
    """A table with a row a video, the first of each; raises with all problems, those that were found before too."""
    ids = known["video"].tolist()
    for row, video in enumerate(ids):
        if (complaint := bad_text(video, "the video id")) is not None:
            problems.add(f"video {row}", complaint)
    columns: dict[str, list[object]] = {"video": ids, "subset": []}
    for video, subset in zip(ids, known["subset"].tolist(), strict=True):
        if not _missing(subset) and not isinstance(subset, str):
            problems.add(f"video {shown(video)}", f"subset must be text, got {shown(subset)}")
        columns["subset"].append("" if _missing(subset) else subset)
    for name in ("duration_s", "fps"):
        columns[name] = []
        for video, value in zip(ids, known[name].tolist(), strict=True):
            number = math.nan if _missing(value) else as_number(value)
            if number is None or number <= 0 or number == math.inf:
                problems.add(
                    f"video {shown(video)}", f"{name} must be a positive number, or NaN if unknown; got {shown(value)}"
                )
            columns[name].append(number)
    problems.raise_if_any()
    return pd.DataFrame(columns).astype(VIDEO_COLUMNS).drop_duplicates("video")


def _missing(value: object) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
