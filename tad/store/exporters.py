"""A stream as files that detector repositories read: one ``.npy`` or ``.npz`` a video, and an index of time axes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tad.errors import StoreError
from tad.store.api import Store
from tad.store.files import replaced
from tad.store.names import encode_name

INDEX = "index.json"
COLUMNS = (
    "video", "file", "level", "rows", "channels", "shape", "dtype", "scale_s", "translation_s", "window_s",
    "duration_s", "fps", "stride_frames", "window_frames",
)  # fmt: skip


@dataclass
class ExportReport:
    """Videos ``written`` and ``already`` there; ``failures``: videos that could not be read, and why."""

    written: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        failures = [{"video": video, "why": why} for video, why in self.failures]
        return {"written": self.written, "already": self.already, "failures": failures}


def export_features(
    store: Store,
    stream: str,
    folder: str | Path,
    *,
    level: str | None = None,
    layout: Literal["TC", "CT"] = "TC",
    format: Literal["npy", "npz"] = "npy",
    videos: Iterable[str] | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a level of a stream as a file a video (its id percent-encoded), and ``index.json`` with where rows lie.

    ``index.json`` holds for each file what the numbers alone do not say: ``scale_s`` and ``translation_s`` (row i is
    centred at ``translation_s + i * scale_s`` seconds), ``window_s``, the duration, and lengths in frames.

    Parameters
    ----------
    level : by default ``features``, else the finest.
    layout : rows x channels, or channels x rows as some repositories want it (levels of two axes only).
    format : ``npz`` holds the array under ``feats``.
    videos : only these.
    overwrite : write files again that are there.

    Raises
    ------
    StoreError : no such stream, video or level; maps with ``layout="CT"``; a folder that cannot be written. A damaged
        entry is listed in the report instead.
    """
    folder = Path(folder)
    known = store.videos(stream)  # an unknown stream is an error here
    wanted = known if videos is None else list(videos)
    if missing := sorted(set(wanted) - set(known)):
        raise StoreError(f"{store.path}: stream '{stream}' has no video {', '.join(map(repr, missing[:5]))}")
    report, rows = ExportReport(), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for video in wanted:
            file = f"{encode_name(video, 'video id')}.{format}"
            try:
                feature = store[stream, video] if level is None else store[stream, video, level]
                if layout == "CT" and feature.ndim != 2:
                    raise StoreError(
                        f"{store.path}: level '{feature.level}' of {stream}/{video} has {feature.ndim} axes; "
                        "channels x rows is for two"
                    )
                if (folder / file).exists() and not overwrite:
                    report.already.append(video)
                else:
                    array = feature.numpy()
                    _write(folder / file, np.ascontiguousarray(array.T) if layout == "CT" else array)
                    report.written.append(video)
            except StoreError as error:
                if layout == "CT" and "channels x rows" in str(error):
                    raise
                report.failures.append((video, str(error)))
                continue
            rows.append(_described(video, file, feature))
        text = json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in rows], indent=1, ensure_ascii=False) + "\n"
        replaced(folder / INDEX, lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror or error}") from error
    return report


def _described(video: str, file: str, feature: Any) -> tuple[Any, ...]:
    about = next(entry for entry in feature.attrs["levels"] if entry["path"] == feature.level)
    frames = (about.get(name) for name in ("fps", "stride_frames", "window_frames"))
    fps, stride, window = frames
    axis = feature.axis
    size = (feature.shape[0], feature.shape[1], list(feature.shape), feature.dtype.name)
    times = (axis.scale_s, axis.translation_s, axis.window_s, feature.duration_s)
    return (video, file, feature.level, *size, *times, fps, stride, window)


def _write(path: Path, array: np.ndarray) -> None:
    if path.suffix == ".npz":
        replaced(path, lambda place: _saved(place, lambda file: np.savez(file, feats=array)))
    else:
        replaced(path, lambda place: _saved(place, lambda file: np.save(file, array, allow_pickle=False)))


def _saved(place: Path, save: Callable[[Any], Any]) -> None:
    with place.open("wb") as file:  # a file, not a name: NumPy would add its suffix
        save(file)
