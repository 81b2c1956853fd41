"""Truth: which videos there are, and which segments of them hold which action."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, Unpack, get_args

import pandas as pd

from tad.annotations import _thumos14
from tad.annotations._files import (
    LIMIT_S,
    Problems,
    as_number,
    bad_text,
    is_json,
    parse_csv,
    parse_json,
    read_text,
    shown,
)
from tad.annotations._layouts import Raw, RawSegment, raw_from_csv, raw_from_json
from tad.annotations._videos import KnownVideo, VideoSource, read_companions
from tad.errors import AnnotationError, did_you_mean

BeyondEnd = Literal["error", "keep", "clip", "drop"]

# One subset, several spellings: ActivityNet says training/validation/testing, gtad train/test, ActionFormer Test.
_SPELLINGS = {"train": "training", "val": "validation", "test": "testing"}
_KNOWN_SUBSETS = (*_SPELLINGS, *_SPELLINGS.values())


TRAIN_NAMES = ("training", "train", "validation", "val")  # in this order; THUMOS14 trains on its validation videos


@dataclass(frozen=True, eq=False)
class Truth:
    """The content of an annotation file.

    Attributes
    ----------
    videos : one row a video, in the file's order: ``video``, ``subset`` ("" where the file names none), ``duration_s``
        and ``fps`` (NaN where unknown). Videos without a segment are in it.
    segments : one row a segment, in the file's order: ``video, start_s, end_s, label, subset``; times in seconds.
    path : the file.
    notes : what was left out, mended or kept against the rules while reading, one sentence each.
    """

    videos: pd.DataFrame
    segments: pd.DataFrame
    path: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> list[str]:
        """The labels that occur, sorted."""
        return sorted(self.segments["label"].unique().tolist())

    @property
    def subsets(self) -> list[str]:
        """The names of the subsets as the file spells them, sorted; empty when it names none."""
        return sorted(name for name in self.videos["subset"].unique().tolist() if name)

    def subset(self, name: str) -> Truth:
        """The part of one subset. Upper and lower case, and train/training, val/validation, test/testing are the same.

        Raises
        ------
        AnnotationError : no video is of that subset; the message lists those present.
        """
        if not isinstance(name, str) or canonical_subset(name) not in {
            canonical_subset(known) for known in self.subsets
        }:
            present = ", ".join(self.subsets) or "none (give the file a subset, or a companion with one as videos=)"
            raise AnnotationError(f"{self._source} has no subset {name!r}; subsets present: {present}")
        wanted = [known for known in self.subsets if canonical_subset(known) == canonical_subset(name)]
        return Truth(
            videos=self.videos[self.videos["subset"].isin(wanted)].reset_index(drop=True),
            segments=self.segments[self.segments["subset"].isin(wanted)].reset_index(drop=True),
            path=self.path,
            notes=self.notes,
        )

    @property
    def _source(self) -> str:
        return str(self.path) if self.path is not None else "the annotation"


def read_truth(
    path: str | Path,
    *,
    videos: VideoSource = None,
    beyond_end: BeyondEnd = "error",
    keep_ambiguous: bool = False,
    classes: Sequence[str] | None = None,
    subsets: Sequence[str] = (),
    strip_prefix: str = "",
) -> Truth:
    """Read an annotation file; its layout is recognised by its content.

    Read are ActivityNet's JSON (also HACS, and THUMOS14 as gtad, ActionFormer and DETAD convert it), the flat JSON of
    BMN and mmaction2, THUMOS14's annotation CSV files, gtad's ground-truth CSV, and plain CSV with a header that names
    ``video, start, end, label`` and perhaps ``subset, duration, fps``. Files may be gzipped.

    Duplicate and zero-length segments are kept: whether they count is the protocol's business (:mod:`tad.evaluate`).

    Parameters
    ----------
    path : the annotation file.
    videos : a table of videos (file, several files, or DataFrame) that fills in subsets, durations and fps which the
        annotation lacks; the annotation's own values win. It adds no videos.
    beyond_end : what to do with segments that end behind their video's end by more than 0.1 s and 1 % of its length.
        ``"error"`` refuses them, except those known of THUMOS14, which are kept and noted; ``"keep"`` keeps all,
        ``"drop"`` drops them. ``"clip"`` cuts every segment at the end, whatever lies behind by however little.
    keep_ambiguous : keep segments labelled ``Ambiguous``, THUMOS14's mark for what is no class.
    classes : class names by index, for files that number them; THUMOS14's are known.
    subsets : further subset names that the file may use besides train, val and test in their spellings.
    strip_prefix : a prefix to take off video ids that have it, such as ``"v_"``; those of ``videos`` too.

    Raises
    ------
    AnnotationError : unreadable or unknown file, or values that cannot be meant: the message lists the first problems
        with video, segment, field and value, and counts the rest.
    """
    if beyond_end not in get_args(BeyondEnd):
        raise AnnotationError(f"beyond_end is {beyond_end!r}.{did_you_mean(str(beyond_end), get_args(BeyondEnd))}")
    path = Path(path)
    problems = Problems(path)
    text = read_text(path)
    if is_json(text):
        raw = raw_from_json(parse_json(text, path), problems)
    elif path.suffix.lower() == ".json":
        raise AnnotationError(f"{path} is not JSON: it starts with {shown(text.lstrip()[:20])}")
    else:
        header, rows = parse_csv(text, path)
        raw = raw_from_csv(header, rows, problems, classes=classes)
    if strip_prefix:
        raw = _without_prefix(raw, strip_prefix, problems)

    notes: list[str] = []
    table = _video_table(raw, read_companions(videos, path, set(raw.videos), strip_prefix), subsets, problems)
    segments = _segment_table(raw, table, beyond_end, keep_ambiguous, problems, notes)
    problems.raise_if_any()
    return Truth(table, segments, path, tuple(notes))


class ReadOptions(TypedDict, total=False):
    """The keyword arguments of :func:`read_truth`."""

    videos: VideoSource
    beyond_end: BeyondEnd
    keep_ambiguous: bool
    classes: Sequence[str] | None
    subsets: Sequence[str]
    strip_prefix: str


def read_annotations(path: str | Path, subset: str | None = None, **options: Unpack[ReadOptions]) -> pd.DataFrame:
    """The segments of an annotation file: ``video, start_s, end_s, label, subset``; options as :func:`read_truth`."""
    truth = read_truth(path, **options)
    return truth.segments if subset is None else truth.subset(subset).segments


def read_videos(path: str | Path, subset: str | None = None, **options: Unpack[ReadOptions]) -> pd.DataFrame:
    """The videos of an annotation file: ``video, subset, duration_s, fps``; options as :func:`read_truth`."""
    truth = read_truth(path, **options)
    return truth.videos if subset is None else truth.subset(subset).videos


def training_subset(truth: Truth) -> str | None:
    """The subset that trainings take unless told otherwise, the first of ``TRAIN_NAMES`` that the file has; None where
    it has none of them.
    """
    by_name = {name.lower(): name for name in truth.subsets}
    return next((by_name[name] for name in TRAIN_NAMES if name in by_name), None)


def canonical_subset(subset: str) -> str:
    """One spelling for each subset: ``Val`` and ``validation`` are both ``validation``."""
    name = subset.strip().lower()
    return _SPELLINGS.get(name, name)


def _without_prefix(raw: Raw, prefix: str, problems: Problems) -> Raw:
    stripped = Raw()
    for video, entry in raw.videos.items():
        short = video.removeprefix(prefix)
        if not short:
            problems.add(entry.where, f"nothing is left of the id without its prefix {prefix!r}")
        elif short in stripped.videos:
            problems.add(entry.where, f"the id {short!r} occurs with and without the prefix {prefix!r}")
        stripped.videos[short] = entry
    stripped.segments = [segment._replace(video=segment.video.removeprefix(prefix)) for segment in raw.segments]
    return stripped


def _video_table(
    raw: Raw, companions: Mapping[str, KnownVideo], subsets: Sequence[str], problems: Problems
) -> pd.DataFrame:
    """Subsets, durations and frame rates, checked, with a companion's where the annotation has none."""
    allowed = {canonical_subset(name) for name in (*_KNOWN_SUBSETS, *subsets)}
    rows = []
    for video, entry in raw.videos.items():
        other = companions.get(video, KnownVideo())
        subset = entry.subset or other.subset or _thumos14.subset_of(video)
        if isinstance(subset, str) and subset and canonical_subset(subset) not in allowed:
            hint = did_you_mean(canonical_subset(subset), sorted(allowed))
            problems.add(entry.where, f"unknown subset {subset!r}.{hint} Or allow it: subsets=[{subset!r}]")
        values = {"duration": math.nan, "fps": math.nan}
        for name, value, spare in (
            ("duration", entry.duration, other.duration_s),
            ("fps", entry.fps, other.fps),
        ):
            if value is None:
                values[name] = spare
                continue
            number = as_number(value)
            if number is None or not math.isfinite(number) or number <= 0:
                problems.add(entry.where, f"{name} must be a positive number, or null if unknown; got {shown(value)}")
            else:
                values[name] = number
        rows.append((video, subset if isinstance(subset, str) else "", values["duration"], values["fps"]))
    table = pd.DataFrame(rows, columns=["video", "subset", "duration_s", "fps"])
    return table.astype({"video": "str", "subset": "str", "duration_s": "float64", "fps": "float64"})


def _segment_table(
    raw: Raw,
    videos: pd.DataFrame,
    beyond_end: BeyondEnd,
    keep_ambiguous: bool,
    problems: Problems,
    notes: list[str],
) -> pd.DataFrame:
    durations = dict(zip(videos["video"], videos["duration_s"], strict=True))
    subsets = dict(zip(videos["video"], videos["subset"], strict=True))
    rows = []
    ambiguous = 0
    behind: dict[str, Counter[str]] = {"known": Counter(), "keep": Counter(), "clip": Counter(), "drop": Counter()}
    for segment in raw.segments:
        if segment.label == _thumos14.AMBIGUOUS and not keep_ambiguous:
            ambiguous += 1
            continue
        times = _times(segment, problems)
        if times is None:
            continue
        start, end = times
        duration = durations[segment.video]
        limit = duration if beyond_end == "clip" else duration + max(0.1, 0.01 * duration)
        if end > limit:  # never so where the duration is unknown (NaN)
            known = end <= _thumos14.BEYOND_THE_END.get(segment.video, -math.inf)
            fate = "known" if known and beyond_end == "error" else beyond_end
            if fate == "error":
                problems.add(
                    segment.where,
                    f"ends at {end:g} s, the video at {duration:g} s; correct the end or the duration, "
                    "or read with beyond_end='keep', 'clip' or 'drop'",
                )
                continue
            behind[fate][segment.video] += 1
            if fate == "drop" or (fate == "clip" and start >= duration):
                continue
            if fate == "clip":
                end = duration
        rows.append((segment.video, start, end, segment.label, subsets[segment.video]))
    if ambiguous:
        notes.append(f"{ambiguous} segments labelled {_thumos14.AMBIGUOUS!r} left out: the label is no class")
    wording = {
        "known": "known defects of THUMOS14, kept",
        "keep": "kept",
        "clip": "cut at the end, or left out if they start there",
        "drop": "left out",
    }
    for key, counter in behind.items():
        if counter:
            names = ", ".join(list(counter)[:5]) + (", ..." if len(counter) > 5 else "")
            notes.append(f"{counter.total()} segments that end behind their video's end: {wording[key]} ({names})")
    table = pd.DataFrame(rows, columns=["video", "start_s", "end_s", "label", "subset"])
    return table.astype({"video": "str", "start_s": "float64", "end_s": "float64", "label": "str", "subset": "str"})


def _times(segment: RawSegment, problems: Problems) -> tuple[float, float] | None:
    """Start and end in seconds, or None after saying what is wrong with the segment."""
    if (complaint := bad_text(segment.label, "label")) is not None:
        problems.add(segment.where, complaint)
        return None
    place = f"{segment.where} ({shown(segment.label)})"
    start, end = as_number(segment.start), as_number(segment.end)
    if start is None or not math.isfinite(start):
        problems.add(place, f"start must be a finite number of seconds, got {shown(segment.start)}")
    elif end is None or not math.isfinite(end):
        problems.add(place, f"end must be a finite number of seconds, got {shown(segment.end)}")
    elif start < 0:
        problems.add(place, f"start {start!r} s is negative; times count from the beginning of the video")
    elif end > LIMIT_S:
        problems.add(place, f"end {end!r} s is no time in a video")
    elif end < start:
        problems.add(place, f"end {end!r} s lies before start {start!r} s; swap or correct them")
    else:
        return start, end
    return None
