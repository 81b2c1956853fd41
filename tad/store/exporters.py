"""A stream as files that detector repositories read: one ``.npy`` or ``.npz`` a video, and an index of time axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tad.errors import StoreError
from tad.store.api import Store
from tad.store.export_index import INDEX, Layout, described, is_same, read_index, write_index
from tad.store.feature import Feature
from tad.store.files import replaced
from tad.store.names import encode_name


@dataclass
class ExportReport:
    """Videos ``written`` and ``already`` there; ``failures``: videos that could not be read or written, and why."""

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
    layout: Layout = "TC",
    format: Literal["npy", "npz"] = "npy",
    videos: Iterable[str] | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a level of a stream as a file a video (its id percent-encoded), and ``index.json`` with where rows lie.

    ``index.json`` holds for each file what the numbers alone do not say: ``scale_s`` and ``translation_s`` (row i is
    centred at ``translation_s + i * scale_s`` seconds), ``window_s``, the duration, lengths in frames; and of which
    stream, level, layout and SHA-256 it is. A file that it lists with the same ones stays; one with others is replaced.
    Rows of files that are there and not part of this export are kept. While files are being written their rows have no
    SHA-256, so that what a killed export left is written again.

    Parameters
    ----------
    level : by default ``features``, else the finest.
    layout : rows x channels, or channels x rows as some repositories want it (levels of two axes only).
    format : ``npz`` holds the array under ``feats``.
    videos : only these.
    overwrite : write every file again, also over files that ``index.json`` does not list (else they are failures), and
        over an ``index.json`` that is not of an export.

    Raises
    ------
    StoreError : no such stream, video or level; maps with ``layout="CT"``; a folder that cannot be written, or has an
        ``index.json`` of something else. A damaged entry is listed in the report instead.
    """
    if layout not in ("TC", "CT") or format not in ("npy", "npz"):
        raise StoreError(f"layout must be 'TC' or 'CT' and format 'npy' or 'npz', got {layout!r} and {format!r}")
    folder = Path(folder)
    known = store.videos(stream)  # an unknown stream is an error here
    wanted = known if videos is None else list(dict.fromkeys(videos))
    if missing := sorted(set(wanted) - set(known)):
        raise StoreError(f"{store.path}: stream '{stream}' has no video {', '.join(map(repr, missing[:5]))}")
    report = ExportReport()
    features = _looked_up(store, stream, wanted, level, layout, report)  # before anything is made
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = _index_before(folder, overwrite=overwrite)
        rows: dict[str, dict[str, Any]] = {}
        todo: dict[str, Feature] = {}
        for video, feature in features.items():
            file = f"{encode_name(video, 'video id')}.{format}"
            there = (folder / file).exists()
            if there and file not in before and not overwrite:
                why = f"{folder / file} is there and {INDEX} does not list it; overwrite replaces it"
                report.failures.append((video, why))
                continue
            rows[file] = described(feature, file, layout)
            if there and not overwrite and is_same(before.get(file), rows[file]):
                report.already.append(video)
            else:
                todo[file] = feature
        if todo:  # until they are written, nobody may trust what the index says of these
            write_index(folder, before | rows | {file: rows[file] | {"sha256": None} for file in todo})
        settled: dict[str, dict[str, Any] | None] = {file: row for file, row in rows.items() if file not in todo}
        try:
            for file, feature in todo.items():
                try:
                    array = feature.numpy()
                except StoreError as error:
                    report.failures.append((feature.video, str(error)))
                    settled[file] = before.get(file)  # of a file that is there still
                    continue
                _write(folder / file, np.ascontiguousarray(array.T) if layout == "CT" else array)
                settled[file] = rows[file]
                report.written.append(feature.video)
        finally:  # also when interrupted; and another export may have added to the index meanwhile
            now = _index_before(folder, overwrite=overwrite) | settled
            write_index(folder, {file: row for file, row in now.items() if row and (folder / file).exists()})
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror or error}") from error
    return report


def _looked_up(
    store: Store, stream: str, videos: list[str], level: str | None, layout: Layout, report: ExportReport
) -> dict[str, Feature]:
    """What is to be exported, nothing of it read; entries that are damaged or lack the level go to the failures."""
    found: dict[str, Feature] = {}
    levels: list[str] = []  # of the first entry that can be read
    for video in videos:
        try:
            levels = levels or store.levels(stream, video)
            feature = store[stream, video] if level is None else store[stream, video, level]
        except StoreError as error:
            report.failures.append((video, str(error)))
            if level is not None and levels and level not in levels and not found:
                raise StoreError(
                    f"{store.path}: stream '{stream}' has no level {level!r}, only {', '.join(levels)}"
                ) from error
            continue
        if layout == "CT" and feature.ndim != 2:
            raise StoreError(
                f"{store.path}: level '{feature.level}' of {stream}/{video} has {feature.ndim} axes; "
                "channels x rows is for two"
            )
        found[video] = feature
    return found


def _index_before(folder: Path, *, overwrite: bool) -> dict[str, dict[str, Any]]:
    try:
        return read_index(folder)
    except StoreError as error:
        if overwrite:
            return {}
        raise StoreError(f"{error}; export into another folder, or say overwrite") from error


def _write(path: Path, array: np.ndarray) -> None:
    if path.suffix == ".npz":
        replaced(path, lambda place: _saved(place, lambda file: np.savez(file, feats=array)))
    else:
        replaced(path, lambda place: _saved(place, lambda file: np.save(file, array, allow_pickle=False)))


def _saved(place: Path, save: Callable[[Any], Any]) -> None:
    with place.open("wb") as file:  # a file, not a name: NumPy would add its suffix
        save(file)
