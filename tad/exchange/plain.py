"""ActivityNet's JSON and CSV, the project's own forms: read by :mod:`tad.annotations`, written here for truth."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from tad.annotations import predictions_json, read_predictions, read_truth
from tad.annotations._files import parse_csv, parse_json, read_text
from tad.annotations._layouts import columns_of
from tad.errors import AnnotationError
from tad.exchange.collection import Collection, Format, Options, check_subset
from tad.exchange.files import json_for


def json_format_of(path: Path) -> str:
    """Which format's JSON a file holds. Raises :class:`AnnotationError` for none of them."""
    content = parse_json(read_text(path), path)
    if isinstance(content, list):
        return "labelstudio"
    keys = set(content) if isinstance(content, dict) else set()
    if {"metadata", "file", "view"} <= keys:
        return "via"
    if "labels" in keys and "database" not in keys:
        return "fiftyone"
    return "activitynet"


def read_activitynet(path: Path, options: Options) -> Collection:
    """``{"database": ...}`` is truth, ``{"results": ...}`` predictions (which need labels)."""
    content = parse_json(read_text(path), path)
    if isinstance(content, dict) and "results" in content and "database" not in content:
        table = read_predictions(path)
        ids = pd.DataFrame({"video": [str(video) for video in content["results"]]})
        return Collection.of(table, ids, what=str(path))
    return _truth(path)


def read_csv(path: Path, options: Options) -> Collection:
    """With a column for the score predictions, else truth."""
    header, _ = parse_csv(read_text(path), path)
    if "score" in columns_of(header, path):
        return Collection.of(read_predictions(path), what=str(path))
    return _truth(path)


def _truth(path: Path) -> Collection:
    truth = read_truth(path, beyond_end="keep", keep_ambiguous=True)
    return Collection.of(truth.segments, truth, notes=truth.notes, what=str(path))


def render_activitynet(collection: Collection, path: Path, options: Options) -> dict[Path, str]:
    """Truth under ``database``, predictions under ``results``."""
    file = json_for(path, "ActivityNet's layout")
    if collection.scored:
        return {file: predictions_json(collection.segments, videos=collection.videos["video"].tolist())}
    if collection.videos.empty:
        raise AnnotationError(f"{path}: there is no video to write")
    _check_subsets(collection)
    database: dict[str, Any] = {}
    groups = collection.by_video()
    for video, subset, duration_s, fps in collection.videos.itertuples(index=False):
        if not (subset or options.subset):
            raise AnnotationError(
                f"video {video!r}: ActivityNet's layout needs a subset and none is known; name one (subset), such as "
                "'training' or 'validation'"
            )
        entry: dict[str, Any] = {"subset": subset or options.subset}
        entry["duration"] = None if math.isnan(duration_s) else duration_s
        entry |= {} if math.isnan(fps) else {"fps": fps}
        entry["annotations"] = [{"segment": [row.start_s, row.end_s], "label": row.label} for row in groups[video]]
        database[video] = entry
    return {file: json.dumps({"database": database}, ensure_ascii=False, indent=1) + "\n"}


def render_csv(collection: Collection, path: Path, options: Options) -> dict[Path, str]:
    """Predictions as ``write_predictions`` does; truth with a video's subset, duration and fps where they are known.

    A CSV file has no place for a video without a segment, so truth without any segment is an error.
    """
    if path.suffix.lower() != ".csv":
        raise AnnotationError(f"{path}: CSV is written as .csv")
    table = collection.segments
    header = ["video", "start", "end", "label"]
    columns = [table[name].tolist() for name in ("video", "start_s", "end_s", "label")]
    if collection.scored:
        return {path: _csv(["video", "start_s", "end_s", "label", "score"], [*columns, table["score"].tolist()])}
    if table.empty:
        raise AnnotationError(f"{path}: there is no segment, and a CSV file of truth holds nothing else")
    _check_subsets(collection)
    for name in ("video", "label"):
        for text in table[name].unique():
            if text != text.strip():
                raise AnnotationError(f"{name} {text!r}: CSV keeps no spaces or line breaks at the ends; rename it")
    videos = collection.videos.set_index("video")
    for name, column, known in (
        ("duration", "duration_s", videos["duration_s"].notna()),
        ("fps", "fps", videos["fps"].notna()),
        ("subset", "subset", videos["subset"].ne("")),
    ):
        values = videos.loc[known, column].to_dict()
        found = [values.get(video) for video in columns[0]]
        if any(value is not None for value in found):
            header.append(name)
            columns.append(found)
    return {path: _csv(header, columns)}


def _csv(header: list[str], columns: list[list[Any]]) -> str:
    """All text quoted, so that line breaks of any kind survive; numbers in their shortest exact form."""
    text = io.StringIO(newline="")
    text.write(",".join(header) + "\n")
    csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").writerows(zip(*columns, strict=True))
    return text.getvalue()


def _check_subsets(collection: Collection) -> None:
    firsts = collection.videos.drop_duplicates("subset")
    for video, subset in zip(firsts["video"].tolist(), firsts["subset"].tolist(), strict=True):
        if subset:
            check_subset(subset, f"video {video!r}: ")


ACTIVITYNET = Format("ActivityNet JSON", ".json", read_activitynet, render_activitynet, False, "exact")
CSV = Format("CSV", ".csv", read_csv, render_csv, False, "exact")
