"""What is exchanged: segments of videos, and what is known of the videos."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote

import pandas as pd

from tad.annotations import Truth, check_segments
from tad.errors import AnnotationError

VIDEO_COLUMNS = {"video": "str", "subset": "str", "duration_s": "float64", "fps": "float64"}
SAFE = " !#$&'()+,;=@[]^_`{}~-."  # characters of an id that stay in the name of its file


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

        Raises :class:`AnnotationError` for missing columns, or values that are no text or not finite.
        """
        scored = "score" in segments.columns
        table = check_segments(segments, what=what, label=True, score=scored, text=True)
        known = videos.videos if isinstance(videos, Truth) else videos
        if known is None:
            known = pd.DataFrame({"video": pd.Series(dtype="str")})
        known = known.reindex(columns=list(VIDEO_COLUMNS)).drop_duplicates("video")
        extra = [video for video in table["video"].unique() if video not in set(known["video"])]
        if extra:
            known = pd.concat([known, pd.DataFrame({"video": extra}).reindex(columns=list(VIDEO_COLUMNS))])
        known["subset"] = known["subset"].where(known["subset"].notna(), "")
        return cls(table, known.astype(VIDEO_COLUMNS).reset_index(drop=True), tuple(notes))

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
            segments = segments[segments["score"] >= min_score]
        if max_segments is not None:
            best = segments.sort_values("score", ascending=False, kind="stable").groupby("video").head(max_segments)
            segments = segments.loc[segments.index.isin(best.index)]
        return Collection(segments.reset_index(drop=True), videos.reset_index(drop=True), self.notes)

    def by_video(self) -> dict[str, pd.DataFrame]:
        """The segments of every video, by start, then as they came; videos without any have an empty table."""
        ordered = self.segments.sort_values("start_s", kind="stable")
        groups = {str(video): group for video, group in ordered.groupby("video", sort=False)}
        return {video: groups.get(video, ordered.iloc[:0]) for video in self.videos["video"]}

    def fps_of(self, video: str, options: Options) -> float:
        """The frame rate of a video. Raises :class:`AnnotationError` where neither it nor the options know one."""
        own = float(self.videos.loc[self.videos["video"] == video, "fps"].iloc[0])
        fps = options.fps if math.isnan(own) else own
        if fps is None:
            raise AnnotationError(
                f"video {video!r}: this format counts frames and the video's frame rate is not known; give fps"
            )
        return fps


@dataclass(frozen=True)
class Options:
    """What a format may need beside the segments: a frame rate, a subset for videos that have none, and how the
    videos' files are called.
    """

    fps: float | None = None
    subset: str | None = None
    media: str = "{video}.mp4"

    def media_of(self, video: str) -> str:
        """The name of a video's file."""
        if "{video}" not in self.media:
            raise AnnotationError(f"media {self.media!r} must hold {{video}}, the place of the video's id")
        return self.media.replace("{video}", video)


@dataclass(frozen=True)
class Format:
    """How one tool keeps segments.

    Attributes
    ----------
    title : the tool.
    suffix : of its files.
    read, write : from and to a path.
    folder : one file a video, in a folder.
    tolerance : how exactly times survive writing and reading.
    """

    title: str
    suffix: str
    read: Callable[[Path, Options], Collection]
    write: Callable[[Collection, Path, Options], list[Path]]
    folder: bool
    tolerance: str


def file_name(video: str, suffix: str) -> str:
    """A video's id as the name of a file, percent-encoded so that it can be read back."""
    name = quote(video, safe=SAFE)
    name = f"%2E{name[1:]}" if name.startswith(".") else name
    if len(name) > 200:
        raise AnnotationError(f"video id {video[:60]!r}... is too long for the name of a file")
    return name + suffix


def video_of(path: Path) -> str:
    """The id behind :func:`file_name`; for other names the name without its suffix."""
    return unquote(path.name[: -len(path.suffix)] if path.suffix else path.name)


def files_in(path: Path, suffix: str) -> list[Path]:
    """The file itself, or a folder's files of this suffix, sorted. Raises :class:`AnnotationError` without any."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == suffix and not file.name.startswith("."))
    if not files:
        raise AnnotationError(f"folder {path} holds no {suffix} file")
    return files


def frames_of(start_s: float, end_s: float, fps: float) -> tuple[int, int]:
    """First and last frame, counted from 1 and both included, that a segment touches."""
    first = math.floor(start_s * fps + 1e-6) + 1
    return first, max(first, math.ceil(end_s * fps - 1e-6))


def seconds_of(first: float, last: float, fps: float) -> tuple[float, float]:
    """From the beginning of the first frame to the end of the last, frames counted from 1."""
    return (first - 1) / fps, last / fps
