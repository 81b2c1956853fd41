"""ActivityNet's JSON and CSV, the project's own forms: read by :mod:`tad.annotations`, written here for truth."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from tad.annotations import read_predictions, read_truth, write_predictions
from tad.annotations._files import parse_csv, parse_json, read_text, write_atomically
from tad.annotations._layouts import columns_of
from tad.errors import AnnotationError
from tad.exchange.collection import Collection, Format, Options


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


def write_activitynet(collection: Collection, path: Path, options: Options) -> list[Path]:
    """Truth under ``database``, predictions under ``results``."""
    if path.suffix.lower() != ".json":
        raise AnnotationError(f"{path}: ActivityNet's layout is written as .json")
    if collection.scored:
        write_predictions(path, collection.segments, videos=collection.videos["video"].tolist())
        return [path]
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
        rows = groups[video][["start_s", "end_s", "label"]].itertuples(index=False)
        entry["annotations"] = [{"segment": [start_s, end_s], "label": label} for start_s, end_s, label in rows]
        database[video] = entry
    write_atomically(path, iter([json.dumps({"database": database}, ensure_ascii=False, indent=1) + "\n"]))
    return [path]


def write_csv(collection: Collection, path: Path, options: Options) -> list[Path]:
    """Predictions as ``write_predictions`` does; truth with a video's subset, duration and fps where they are known.

    A CSV file has no place for a video without a segment.
    """
    if path.suffix.lower() != ".csv":
        raise AnnotationError(f"{path}: CSV is written as .csv")
    if collection.scored:
        write_predictions(path, collection.segments)
        return [path]
    table = collection.segments.merge(collection.videos, on="video", how="left")
    table = table.rename(columns={"start_s": "start", "end_s": "end", "duration_s": "duration"})
    known = [name for name in ("duration", "fps") if table[name].notna().any()]
    known += ["subset"] if table["subset"].ne("").any() else []
    text = io.StringIO(newline="")
    table[["video", "start", "end", "label", *known]].to_csv(text, index=False, lineterminator="\n")
    write_atomically(path, iter([text.getvalue()]))
    return [path]


ACTIVITYNET = Format("ActivityNet JSON", ".json", read_activitynet, write_activitynet, False, "exact")
CSV = Format("CSV", ".csv", read_csv, write_csv, False, "exact")
