"""index.json of an exported folder: what every file holds, and where its rows lie in time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tad.errors import StoreError
from tad.store.feature import Feature
from tad.store.files import replaced
from tad.store.layout import level_axis
from tad.timeline import TimeAxis

INDEX = "index.json"
Layout = Literal["TC", "CT"]
COLUMNS = (
    "video", "file", "stream", "level", "layout", "rows", "channels", "shape", "dtype", "scale_s", "translation_s",
    "window_s", "duration_s", "fps", "stride_frames", "window_frames", "sha256",
)  # fmt: skip
_IDENTITY = ("video", "stream", "level", "layout", "sha256")  # equal: the file holds what would be written


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of ``index.json`` by file name; empty without such a file.

    Earlier versions wrote neither stream nor layout nor SHA-256: such rows have None there, and equal no other.

    Raises
    ------
    StoreError : there is an ``index.json`` that no export wrote, or a damaged one.
    """
    path = folder / INDEX
    try:
        rows = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, OSError) as error:
        raise StoreError(f"{path} cannot be read as the index of an export ({error})") from error
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise StoreError(f"{path} is not the index of an export: that lists a video and a file in every row")
    return {row["file"]: dict.fromkeys(COLUMNS) | row for row in rows}


def _is_row(row: Any) -> bool:
    texts = isinstance(row, dict) and all(isinstance(row.get(name), str) and row[name] for name in ("video", "file"))
    return texts and "scale_s" in row and Path(row["file"]).name == row["file"]  # a file beside it, nowhere else


def write_index(folder: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Write ``index.json`` whole, sorted by file."""
    text = json.dumps([rows[file] for file in sorted(rows)], indent=1, ensure_ascii=False) + "\n"
    replaced(folder / INDEX, lambda path: path.write_bytes(text.encode("utf-8", "backslashreplace")))


def described(feature: Feature, file: str, layout: Layout) -> dict[str, Any]:
    """The row of one file; ``shape`` is that of the level, rows first, whatever the layout of the file."""
    about = next(entry for entry in feature.attrs["levels"] if entry["path"] == feature.level)
    values: dict[str, Any] = {}
    values |= {"video": feature.video, "file": file, "stream": feature.stream, "level": feature.level, "layout": layout}
    values |= {"rows": feature.shape[0], "channels": feature.shape[1], "shape": list(feature.shape)}
    values |= {"dtype": feature.dtype.name, "duration_s": feature.duration_s, **feature.axis.to_dict()}
    values |= {name: about.get(name) for name in ("fps", "stride_frames", "window_frames")}
    values["sha256"] = feature.attrs["sha256"][feature.level]
    return {name: values[name] for name in COLUMNS}


def is_same(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> bool:
    """Whether a file that the row ``old`` describes holds what ``new`` does."""
    return old is not None and all(old[name] == new[name] for name in _IDENTITY)


@dataclass(frozen=True)
class Listed:
    """What ``index.json`` promises of one file; ``shape`` as the array lies in the file."""

    stream: str
    level: str
    layout: Layout
    shape: tuple[int, ...]
    axis: TimeAxis
    duration_s: float
    frames: tuple[float | None, float | None, float | None]  # stride, window, fps
    sha256: str


def listed(row: Mapping[str, Any]) -> Listed | None:
    """A row as :class:`Listed`; None when an earlier version wrote it, or a value cannot be meant."""
    try:
        texts = [row[name] for name in ("stream", "level", "sha256")]
        shape, axis, duration_s = tuple(row["shape"]), level_axis(row), float(row["duration_s"])
        frames = [row[name] for name in ("stride_frames", "window_frames", "fps")]
        numbers = all(value is None or 0 < float(value) < math.inf for value in frames)
        sizes = len(shape) >= 2 and all(type(n) is int and n > 0 for n in shape)
    except (TypeError, ValueError, LookupError):
        return None
    if not all(isinstance(text, str) and text for text in texts) or row["layout"] not in ("TC", "CT"):
        return None
    if not numbers or not sizes or not 0 < duration_s < math.inf:
        return None
    stream, level, digest = texts
    shape = shape[::-1] if row["layout"] == "CT" else shape
    return Listed(stream, level, row["layout"], shape, axis, duration_s, (frames[0], frames[1], frames[2]), digest)
