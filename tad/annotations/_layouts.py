"""The layouts in which the field stores truth, each turned into the same raw rows.

Here only the shape of a file is checked; what its values mean is checked once, in ``_truth``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tad.annotations import _thumos14
from tad.annotations._files import Problems, as_number, bad_text, shown
from tad.errors import AnnotationError

# Column names that mean the same thing, compared in lower case. Times are seconds under every one of these names.
ALIASES: dict[str, tuple[str, ...]] = {
    "video": ("video", "video_id", "video-id", "video_name", "video-name", "name"),
    "start": ("start_s", "start", "t-start", "t_start", "t-init"),
    "end": ("end_s", "end", "t-end", "t_end"),
    "label": ("label", "class", "type"),
    "label index": ("label-idx", "label_idx"),
    "score": ("score",),
    "subset": ("subset", "split"),
    "duration": ("duration_s", "duration", "video-duration", "duration_second", "seconds"),
    "fps": ("fps", "frame-rate", "frame_rate"),
    "frames": ("count", "numframe", "num_frames", "video-frames"),
}

LAYOUTS = (
    'known layouts: ActivityNet JSON {"database": {id: {"subset", "duration", "annotations": [{"segment": [start, '
    'end], "label"}]}}}; the same without "database" (BMN, mmaction2); CSV with a header naming at least video, '
    "start, end and label"
)


class RawSegment(NamedTuple):
    """One segment as the file has it."""

    video: str
    start: object
    end: object
    label: object
    where: str


@dataclass(slots=True)
class RawVideo:
    """One video as the file has it; None where the file says nothing."""

    where: str
    subset: object = None
    duration: object = None
    fps: object = None


@dataclass(slots=True)
class Raw:
    """A file's content before its values are checked."""

    videos: dict[str, RawVideo] = field(default_factory=dict)
    segments: list[RawSegment] = field(default_factory=list)


def columns_of(header: Sequence[str], path: object) -> dict[str, int]:
    """Where each known field stands in a CSV header.

    Raises
    ------
    AnnotationError : two columns could both be the same field.
    """
    places: dict[str, int] = {}
    for field_name, names in ALIASES.items():
        hits = [index for index, column in enumerate(header) if column.lower() in names]
        if len(hits) > 1:
            both = ", ".join(repr(header[index]) for index in hits)
            raise AnnotationError(f"{path}: columns {both} could all be the {field_name}; keep one of them")
        if hits:
            places[field_name] = hits[0]
    return places


def raw_from_json(content: Any, problems: Problems) -> Raw:
    """ActivityNet's layout, or the flat one of BMN and mmaction2, told apart by their keys.

    Raises
    ------
    AnnotationError : the content has neither layout.
    """
    path = problems.path
    if not isinstance(content, dict):
        raise AnnotationError(f"{path} holds a JSON {_kind(content)} at its top, not an object; {LAYOUTS}")
    if "database" in content:
        database = content["database"]
        if not isinstance(database, dict):
            raise AnnotationError(f"{path}: 'database' must be an object of videos, it is a {_kind(database)}")
        if not database:
            raise AnnotationError(f"{path}: 'database' is empty, there is no video in it")
        return _videos_from_json(database, problems, subset_required=True)
    if "results" in content:
        raise AnnotationError(f"{path} holds predictions ('results'), not truth; read it with read_predictions")
    if not content:
        raise AnnotationError(f"{path} holds an empty JSON object, there is no video in it")
    if not any(isinstance(entry, dict) and "annotations" in entry for entry in content.values()):
        keys = ", ".join(repr(key) for key in list(content)[:3])
        raise AnnotationError(f"{path}: no entry has 'annotations' (its first keys are {keys}); {LAYOUTS}")
    return _videos_from_json(content, problems, subset_required=False)


def _videos_from_json(database: Mapping[str, Any], problems: Problems, *, subset_required: bool) -> Raw:
    raw = Raw()
    for video, entry in database.items():
        where = f"video {video!r}"
        if (complaint := bad_text(video, "the video id")) is not None:
            problems.add(where, complaint)
            continue
        if not isinstance(entry, dict):
            problems.add(where, f"must be an object with 'annotations', it is a {_kind(entry)}")
            continue
        subset = entry.get("subset")
        if subset_required and "subset" not in entry:
            problems.add(where, "has no 'subset'; add one, for example 'training' or 'validation'")
        elif "subset" in entry and (complaint := bad_text(subset, "subset")) is not None:
            problems.add(where, complaint)
        duration = entry.get("duration", entry.get("duration_second"))
        raw.videos[video] = RawVideo(where, subset, duration, entry.get("fps"))
        annotations = entry.get("annotations")
        if not isinstance(annotations, list):
            problem = f"must be a list, it is {shown(annotations)}" if "annotations" in entry else "is missing"
            problems.add(where, f"'annotations' {problem}; an empty list says that there is no segment")
            continue
        for index, annotation in enumerate(annotations):
            place = f"{where}, segment {index}"
            if not isinstance(annotation, dict):
                problems.add(place, f"must be an object with 'segment' and 'label', it is a {_kind(annotation)}")
                continue
            missing = [key for key in ("segment", "label") if key not in annotation]
            if missing:
                problems.add(place, f"has no {' and no '.join(map(repr, missing))}")
                continue
            ends = annotation["segment"]
            if not isinstance(ends, list) or len(ends) != 2:
                problems.add(place, f"'segment' must be [start, end] in seconds, got {shown(ends)}")
                continue
            raw.segments.append(RawSegment(video, ends[0], ends[1], annotation["label"], place))
    return raw


def raw_from_csv(
    header: Sequence[str],
    rows: Sequence[tuple[int, list[str]]],
    problems: Problems,
    *,
    classes: Sequence[str] | None,
) -> Raw:
    """A CSV file with one segment a row: THUMOS14's annotations, gtad's ground truth, or plain columns.

    Raises
    ------
    AnnotationError : the header lacks a field, or the file holds predictions or no row.
    """
    path = problems.path
    places = columns_of(header, path)
    missing = [name for name in ("video", "start", "end") if name not in places]
    if "label" not in places and "label index" not in places:
        missing.append("label")
    if missing:
        hint = ""
        if "video" in places and "start" not in places and ("fps" in places or "duration" in places):
            hint = " It looks like a table of videos: pass it as videos=."
        elif len(header) == 1 and any(mark in header[0] for mark in ";\t"):
            hint = " Separate the columns by commas."
        elif any(as_number(name) is not None for name in header):
            hint = " Its first line looks like data: add a header line."
        columns = ", ".join(map(repr, header))
        raise AnnotationError(f"{path} has no column for {', '.join(missing)}; found {columns}.{hint} {LAYOUTS}")
    if "score" in places:
        raise AnnotationError(f"{path} has a score column, so it holds predictions; read it with read_predictions")
    if not rows:
        raise AnnotationError(f"{path} has a header but no row")

    raw = Raw()
    for line, row in rows:
        values = {name: row[index] for name, index in places.items()}
        video = values["video"]
        where = f"line {line}, video {video!r}"
        if (complaint := bad_text(video, "the video id")) is not None:
            problems.add(where, complaint)
            continue
        label: str | None = values.get("label")
        if label is None:
            label = _label_at(values["label index"], video, classes, where, problems)
            if label is None:
                continue
        _merge(raw.videos, video, where, values, problems)
        raw.segments.append(RawSegment(video, values["start"], values["end"], label, where))
    return raw


def _merge(videos: dict[str, RawVideo], video: str, where: str, values: Mapping[str, str], problems: Problems) -> None:
    """Add what a row says of its video; rows of one video must agree."""
    known = videos.setdefault(video, RawVideo(where))
    for name in ("subset", "duration", "fps"):
        value = values.get(name, "").strip() or None  # an empty field says nothing
        before = getattr(known, name)
        if before is None:
            setattr(known, name, value)
        elif value is not None and value != before:
            problems.add(where, f"{name} is {value!r} here and {before!r} in an earlier row of the same video")


def _label_at(value: str, video: str, classes: Sequence[str] | None, where: str, problems: Problems) -> str | None:
    """The name behind a class index, -1 being THUMOS14's Ambiguous."""
    if classes is None:
        if not _thumos14.VIDEO_ID.fullmatch(video):
            problems.add(where, "the file numbers its classes and is not THUMOS14's; pass their names as classes=")
            return None
        classes = _thumos14.CLASSES
    index = as_number(value)
    if index == -1:
        return _thumos14.AMBIGUOUS
    if index is None or index != int(index if abs(index) < 1e9 else -2) or not 0 <= index < len(classes):
        problems.add(where, f"label index {value!r} is not one of -1 ... {len(classes) - 1}")
        return None
    return classes[int(index)]


def _kind(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
