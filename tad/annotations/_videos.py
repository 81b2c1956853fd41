"""Tables of videos that come beside an annotation: subsets, durations and frame rates from another file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from tad.annotations._files import Problems, as_number, bad_text, is_json, parse_csv, parse_json, read_text, shown
from tad.annotations._layouts import columns_of
from tad.errors import AnnotationError

VideoSource = str | Path | pd.DataFrame | Sequence[str | Path] | None


class KnownVideo(NamedTuple):
    """What a companion says of one video: "" or NaN where it says nothing."""

    subset: str = ""
    duration_s: float = math.nan
    fps: float = math.nan


# The names under which JSON files keep the same things; gurkirt's videoInfo.json says "frame-rate".
_JSON_KEYS = {
    "subset": ("subset",),
    "duration": ("duration", "duration_second", "duration_s"),
    "fps": ("fps", "frame-rate"),
    "frames": (),
}


def read_companions(
    source: VideoSource, annotation: Path, wanted: set[str], strip_prefix: str = ""
) -> dict[str, KnownVideo]:
    """What a table of videos (or several) says of the videos of an annotation.

    CSV needs a column for the video and any of subset, duration, fps and frame count (THUMOS14's ``*_video_info.csv``
    has fps and count, BMN's ``video_info_new.csv`` has seconds, fps and subset); JSON an object by video id, or an
    ActivityNet annotation. A duration that is not given is frame count / fps.

    Raises
    ------
    AnnotationError : a value that cannot be meant, a video twice with different values, or no video in common with
        the annotation.
    """
    if source is None:
        return {}
    if isinstance(source, pd.DataFrame):
        names: list[object] = ["the videos table"]
        found = _from_rows(_rows_of_frame(source), Problems("the videos table"), {}, strip_prefix)
    else:
        paths = [source] if isinstance(source, str | Path) else list(source)
        names, found = list(paths), {}
        for path in paths:
            found = _from_rows(_rows_of_file(Path(path)), Problems(path), found, strip_prefix)
    if not wanted & set(found):
        theirs, ours = next(iter(found), "none"), next(iter(sorted(wanted)), "none")
        raise AnnotationError(
            f"{', '.join(map(str, names))}: none of the {len(wanted)} videos of {annotation} is in it "
            f"(ids there look like {theirs!r}, in the annotation like {ours!r}; see strip_prefix)"
        )
    return {video: known for video, known in found.items() if video in wanted}


def _rows_of_frame(frame: pd.DataFrame) -> list[tuple[str, dict[str, Any]]]:
    if "video" not in frame.columns:
        raise AnnotationError(f"the videos table needs a column 'video'; it has {', '.join(map(str, frame.columns))}")
    names = {"subset": "subset", "duration_s": "duration", "fps": "fps"}
    rows = []
    for index, record in enumerate(frame.to_dict("records")):
        values = {ours: record[column] for column, ours in names.items() if column in record}
        values = {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in values.items()}
        rows.append((f"row {index}", {"video": record["video"], **values}))
    return rows


def _rows_of_file(path: Path) -> list[tuple[str, dict[str, Any]]]:
    text = read_text(path)
    if is_json(text):
        content = parse_json(text, path)
        if isinstance(content, dict) and isinstance(content.get("database"), dict):
            content = content["database"]
        if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
            raise AnnotationError(f"{path}: a JSON table of videos must be an object of objects by video id")
        rows = []
        for video, entry in content.items():
            values = {
                name: next((entry[key] for key in keys if key in entry), None) for name, keys in _JSON_KEYS.items()
            }
            rows.append((f"video {video!r}", {"video": video, **values}))
        return rows
    header, lines = parse_csv(text, path)
    places = columns_of(header, path)
    if "video" not in places or not {"subset", "duration", "fps", "frames"} & set(places):
        raise AnnotationError(
            f"{path}: a table of videos needs a column 'video' and at least one of subset, duration, fps and count; "
            f"found {', '.join(map(repr, header))}"
        )
    names = [name for name in _JSON_KEYS if name in places]
    return [
        (f"line {line}", {"video": row[places["video"]], **{name: row[places[name]].strip() or None for name in names}})
        for line, row in lines
    ]


def _from_rows(
    rows: list[tuple[str, dict[str, Any]]],
    problems: Problems,
    found: dict[str, KnownVideo],
    strip_prefix: str,
) -> dict[str, KnownVideo]:
    """Check the rows and add them to what earlier files gave."""
    for where, values in rows:
        video = values["video"]
        if (complaint := bad_text(video, "the video id")) is not None:
            problems.add(where, complaint)
            continue
        subset = values.get("subset")
        if subset not in (None, "") and (complaint := bad_text(subset, "subset")) is not None:
            problems.add(f"{where}, video {video!r}", complaint)
        numbers = {}
        for name in ("duration", "fps", "frames"):
            given = values.get(name)
            number = math.nan if given is None else as_number(given)
            if number is None or math.isinf(number) or number <= 0 or (given is not None and math.isnan(number)):
                problems.add(f"{where}, video {video!r}", f"{name} must be a positive number, got {shown(given)}")
                number = math.nan
            numbers[name] = number
        duration = numbers["duration"]
        if math.isnan(duration):
            duration = numbers["frames"] / numbers["fps"]
        row = KnownVideo(subset or "", duration, numbers["fps"])
        before = found.setdefault(video.removeprefix(strip_prefix), row)
        if repr(before) != repr(row):  # repr, for NaN is not equal to itself
            problems.add(f"{where}, video {video!r}", "occurs before with other values; keep one")
    problems.raise_if_any()
    return found
