"""Predictions: ActivityNet's results JSON and CSV, both ways, without losing a digit."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

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
    write_atomically,
)
from tad.annotations._layouts import columns_of
from tad.errors import AnnotationError

_TIMES = {"start_s": "start", "end_s": "end"}
_LAYOUTS = (
    'known layouts: ActivityNet results JSON {"results": {id: [{"segment": [start, end], "label", "score"}]}}, or CSV '
    "with a header naming video, start, end, score and, unless they are proposals, label"
)


def read_predictions(path: str | Path, *, strip_prefix: str = "") -> pd.DataFrame:
    """Read scored segments: ``video, start_s, end_s, label, score``, in the file's order.

    ActivityNet's results JSON or CSV, told apart by content; gzipped or not. Numbers may be stored as text. Proposals
    have no labels: then the table has no column ``label``. Zero-length and inverted segments, and segments outside
    their video, are kept: they are ordinary false positives.

    Parameters
    ----------
    path : the file.
    strip_prefix : a prefix to take off video ids that have it, such as ``"v_"``.

    Raises
    ------
    AnnotationError : unreadable or unknown file, missing fields, labels on some rows only, or numbers that are not
        finite.
    """
    path = Path(path)
    problems = Problems(path)
    text = read_text(path)
    if is_json(text):
        table = _from_json(parse_json(text, path), problems)
    elif path.suffix.lower() == ".json":
        raise AnnotationError(f"{path} is not JSON: it starts with {shown(text.lstrip()[:20])}")
    else:
        table = _from_csv(text, problems)
    if strip_prefix:
        ids = {video: video.removeprefix(strip_prefix) for video in table["video"].unique()}
        if len(set(ids.values())) < len(ids) or "" in ids.values():
            raise AnnotationError(f"{path}: without the prefix {strip_prefix!r} video ids are empty or fall together")
        table["video"] = table["video"].map(ids).astype("str")
    return table


def write_predictions(
    path: str | Path,
    predictions: pd.DataFrame,
    *,
    videos: Iterable[str] = (),
    version: str = "VERSION 1.3",
    external_data: Mapping[str, Any] | None = None,
) -> None:
    """Write scored segments as ``.json`` (ActivityNet's results layout) or ``.csv``; the file is whole or absent.

    Reading it again gives the same numbers bit by bit. CSV keeps the order of the rows; JSON groups them by video, in
    the order in which the videos first occur, and keeps the order within a video.

    Parameters
    ----------
    path : the file; its folder is made if need be.
    predictions : columns ``video, start_s, end_s, score`` and, unless they are proposals, ``label``.
    videos : ids that are listed with an empty list when they have no prediction (JSON only).
    version, external_data : the header that the official evaluators ask for (JSON only).

    Raises
    ------
    AnnotationError : another suffix, missing columns, values that are no text or not finite, or a folder that cannot
        be written.
    """
    path = Path(path)
    table = check_segments(predictions, what="the predictions", score=True, text=True)
    suffix = path.suffix.lower()
    if suffix == ".json":
        header = {"version": version, "external_data": dict(external_data or {})}
        write_atomically(path, _json_chunks(table, header, list(videos)))
    elif suffix == ".csv":
        write_atomically(path, _csv_chunks(table))
    else:
        raise AnnotationError(
            f"{str(path)!r}: predictions are written as .json or .csv, not {suffix or 'without suffix'}"
        )


def predictions_json(predictions: pd.DataFrame, *, videos: Iterable[str] = ()) -> str:
    """What :func:`write_predictions` writes into a ``.json`` file, as text."""
    table = check_segments(predictions, what="the predictions", score=True, text=True)
    header = {"version": "VERSION 1.3", "external_data": {}}
    return "".join(_json_chunks(table, header, list(videos)))


def check_segments(
    table: pd.DataFrame,
    *,
    what: str = "the table",
    score: bool = False,
    label: bool = False,
    ordered: bool = False,
    text: bool = False,
) -> pd.DataFrame:
    """A copy of a table of segments with the columns ``video, start_s, end_s[, label][, score]`` only, checked.

    Parameters
    ----------
    table : the segments; further columns are ignored, the index too.
    what : its name in error messages.
    score : whether it must have scores. label : whether it must have labels; else they are optional, for all rows.
    ordered : whether an end before its start is an error. text : whether ids and labels must be text.

    Raises
    ------
    AnnotationError : a column is missing, an id or label is missing, or a time or score is not a finite number.
    """
    if not isinstance(table, pd.DataFrame):
        raise AnnotationError(f"{what} must be a pandas DataFrame of segments, got {type(table).__name__}")
    needed = ["video", "start_s", "end_s", *(["label"] if label else []), *(["score"] if score else [])]
    missing = [name for name in needed if name not in table.columns]
    if missing:
        hint = " (proposals have no labels: see average_recall)" if missing == ["label"] else ""
        present = ", ".join(map(str, table.columns)) or "none"
        raise AnnotationError(f"{what}: no column {', '.join(map(repr, missing))}{hint}; found {present}")
    names = ["video", "start_s", "end_s", "label", *(["score"] if score else [])]
    if "label" not in table.columns or (not label and len(table) and table["label"].isna().all()):
        names.remove("label")  # proposals
    columns = {name: table[name].tolist() for name in names}
    problems = Problems(what)
    checked = _table(columns, lambda row: f"row {row}", problems, text=text)
    if ordered:
        for row in np.flatnonzero((checked["end_s"] < checked["start_s"]).to_numpy()):
            problems.add(f"row {row}, video {columns['video'][row]!r}", "the end lies before the start")
    problems.raise_if_any()
    return checked


def _from_json(content: Any, problems: Problems) -> pd.DataFrame:
    path = problems.path
    if not isinstance(content, dict) or "results" not in content:
        hint = " It holds truth ('database'); read it with read_truth." if "database" in content else ""
        raise AnnotationError(f"{path} has no 'results'.{hint} {_LAYOUTS}")
    results = content["results"]
    if not isinstance(results, dict):
        raise AnnotationError(f"{path}: 'results' must be an object of lists by video id, got {shown(results)}")
    videos: list[str] = []
    starts: list[object] = []
    ends: list[object] = []
    labels: list[object] = []
    scores: list[object] = []
    places: list[int] = []
    for video, entries in results.items():
        if not isinstance(entries, list):
            problems.add(f"video {video!r}", f"must hold a list of predictions, got {shown(entries)}")
            continue
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict) or "segment" not in entry or "score" not in entry:
                problems.add(f"video {video!r}, prediction {index}", f"needs 'segment' and 'score', got {shown(entry)}")
                continue
            segment = entry["segment"]
            if not isinstance(segment, list) or len(segment) != 2:
                problem = f"'segment' must be [start, end] in seconds, got {shown(segment)}"
                problems.add(f"video {video!r}, prediction {index}", problem)
                continue
            videos.append(video)
            starts.append(segment[0])
            ends.append(segment[1])
            labels.append(entry.get("label"))
            scores.append(entry["score"])
            places.append(index)
    columns: dict[str, Sequence[object]] = {"video": videos, "start_s": starts, "end_s": ends, "label": labels}
    if labels and all(label is None for label in labels):
        del columns["label"]  # proposals
    columns["score"] = scores
    table = _table(columns, lambda row: f"video {videos[row]!r}, prediction {places[row]}", problems)
    problems.raise_if_any()
    return table


def _from_csv(text: str, problems: Problems) -> pd.DataFrame:
    path = problems.path
    header, rows = parse_csv(text, path)
    places = columns_of(header, path)
    missing = [name for name in ("video", "start", "end", "score") if name not in places]
    if missing:
        columns = ", ".join(map(repr, header))
        raise AnnotationError(f"{path} has no column for {', '.join(missing)}; found {columns}. {_LAYOUTS}")
    names = {"video": "video", "start": "start_s", "end": "end_s", "label": "label", "score": "score"}
    found: dict[str, Sequence[object]] = {
        column: [row[places[name]] for _, row in rows] for name, column in names.items() if name in places
    }
    if rows and "label" in found and not any(found["label"]):
        del found["label"]  # proposals
    table = _table(found, lambda row: f"line {rows[row][0]}", problems)
    problems.raise_if_any()
    return table


def _table(
    columns: Mapping[str, Sequence[object]],
    where: Callable[[int], str],
    problems: Problems,
    *,
    text: bool = True,
) -> pd.DataFrame:
    """Checked columns as a table; ``where`` names a row for the list of problems."""
    found: dict[str, Any] = {}
    for name, values in columns.items():
        if name not in ("video", "label"):
            found[name] = _floats(values, _TIMES.get(name, name), where, problems)
            continue
        word = "the video id" if name == "video" else name
        bad = {value: bad_text(value, word) for value in set(values)} if set(map(type, values)) <= {str} else None
        for row, value in enumerate(values) if bad is None or any(bad.values()) else ():
            missing = value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
            if missing:
                complaint: str | None = (
                    "has no label; all rows need one, or none" if name == "label" else f"{word} is missing"
                )
            elif isinstance(value, str) or text:
                complaint = bad_text(value, word)
            else:
                complaint = None if isinstance(value, Hashable) else f"{word} is {shown(value)}, which names nothing"
            if complaint is not None:
                problems.add(where(row), complaint)
        found[name] = pd.Series(list(values), dtype="str" if bad is not None else "object")
    return pd.DataFrame(found)


def _floats(values: Sequence[object], name: str, where: Callable[[int], str], problems: Problems) -> np.ndarray:
    """A column of finite floats; NaN in the place of what is none, which is added to the problems."""
    if set(map(type, values)) <= {float}:
        numbers = np.array(values, dtype=np.float64)
    else:
        parsed = [as_number(value.item() if isinstance(value, np.generic) else value) for value in values]
        numbers = np.array([np.nan if number is None else number for number in parsed], dtype=np.float64)
    for row in np.flatnonzero(~np.isfinite(numbers)):
        problems.add(where(int(row)), f"{name} must be a finite number, got {shown(values[int(row)])}")
    if name in _TIMES.values():
        for row in np.flatnonzero(np.isfinite(numbers) & (np.abs(numbers) > LIMIT_S)):
            problems.add(where(int(row)), f"{name} is no time in a video: {shown(values[int(row)])} s")
    return numbers


def _json_chunks(table: pd.DataFrame, header: Mapping[str, Any], videos: Sequence[str]) -> Iterator[str]:
    """The results layout piece by piece, one video a line."""
    by_video: dict[str, list[dict[str, object]]] = {}
    labels = table["label"].tolist() if "label" in table.columns else None
    columns = [table[name].tolist() for name in ("video", "start_s", "end_s", "score")]
    for row, (video, start, end, score) in enumerate(zip(*columns, strict=True)):
        entry: dict[str, object] = {"segment": [start, end], "score": score}
        if labels is not None:
            entry["label"] = labels[row]
        by_video.setdefault(video, []).append(entry)
    for video in videos:
        by_video.setdefault(video, [])
    try:
        yield json.dumps(dict(header))[:-1] + ', "results": {'
    except (TypeError, ValueError) as error:
        raise AnnotationError(f"version and external_data must be plain JSON values: {error}") from None
    separator = "\n"
    for video, entries in by_video.items():
        yield f"{separator}{json.dumps(video)}: {json.dumps(entries, allow_nan=False)}"
        separator = ",\n"
    yield "\n}}\n"


def _csv_chunks(table: pd.DataFrame) -> Iterator[str]:
    """All text quoted, all numbers in their shortest form that reads back as the same float."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    buffer.write(",".join(table.columns) + "\n")
    for row in zip(*(table[name].tolist() for name in table.columns), strict=True):
        writer.writerow(row)
        if buffer.tell() > 1 << 20:
            yield buffer.getvalue()
            buffer.seek(0)
            buffer.truncate()
    yield buffer.getvalue()
