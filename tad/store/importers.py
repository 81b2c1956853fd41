"""import_features: the feature files of other projects as a stream of a store, with their time axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tad.errors import StoreError
from tad.store.api import Store
from tad.store.export_index import INDEX, Layout
from tad.store.feature_files import UNREADABLE, FeatureFile, Unreadable, find_files, read_features, why_not
from tad.store.import_grid import ROWS_OFF, Grid
from tad.store.import_layout import Form, find_layout, rows_first, some_shapes, stored_form, usual_form
from tad.store.layout import Level, checked_array, describe, sha256_of
from tad.store.names import encode_name

_Known = Literal["nothing", "same", "other features", "another time"]
_WHY_NOT: dict[_Known, str] = {
    "other features": "the store has other features of this video; overwrite replaces them",
    "another time": "the store has this video with another duration or time axis; overwrite replaces it",
}


@dataclass
class ImportReport:
    """Videos ``written`` and ``already`` there; files ``skipped`` and files with ``warnings``, each with the reason."""

    written: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        pairs = {"skipped": self.skipped, "warnings": self.warnings}
        as_dicts = {name: [{"file": file, "why": why} for file, why in items] for name, items in pairs.items()}
        return {"written": self.written, "already": self.already, **as_dicts}


def import_features(
    source: str | Path,
    store: Store,
    stream: str,
    *,
    fps: float | None = None,
    window: float | None = None,
    stride: float | None = None,
    offset: float = 0.0,
    layout: Layout | None = None,
    durations: Mapping[str, float] | None = None,
    rescaled: bool = False,
    allow_pickle: bool = False,
    prefix: str = "",
    suffix: str = "",
    overwrite: bool = False,
) -> ImportReport:
    """Import feature files as the stream ``stream`` of ``store``.

    Row ``i`` is taken to be centred at ``(offset + i * stride + window / 2) / fps`` seconds; with ``rescaled`` the rows
    divide the video's duration evenly instead, and fps, window and stride are only recorded.
    In a folder that :func:`export_features` wrote, ``index.json`` tells ids and durations; without ``fps``, ``window``
    and ``stride`` also every file's time axis, and a file that is not the listed one (SHA-256) is skipped.

    Parameters
    ----------
    source : a folder with a file per video (.npy, .npz, .csv, .pt, .pkl), or one HDF5 file with a key per video.
    fps, window, stride, offset : of the extraction, lengths in frames; ``offset`` is where the first window starts.
    layout : ``"TC"`` or ``"CT"``; None finds it out from the shapes (channels do not vary) and refuses if it cannot.
        CSV files are always rows by channels. Maps and frames are (T, C, H, W), with ``"CT"`` (C, T, H, W).
    durations : seconds by video, in place of those in ``index.json``; needed for ``rescaled``. A sequence that is off
        by more than two rows is warned about.
    allow_pickle : read .pkl files and pickled arrays, which can run any code.
    prefix, suffix : parts of the file's name (without extension) that do not belong to the video's id.
    overwrite : replace videos whose features, duration or time axis differ from the stored; otherwise they are skipped.

    Raises
    ------
    StoreError : nothing to import, the stream was imported with other numbers, or the layout cannot be told.
        A single bad file is listed in ``skipped`` and never stops the rest.
    """
    found = find_files(Path(source))
    indexed = not rescaled and offset == 0 and (fps, window, stride) == (None, None, None) and _one_index(found)
    grid = Grid(fps, window, stride, offset, rescaled, durations or {}, indexed)
    if layout not in (None, "TC", "CT"):
        raise StoreError(f"layout must be 'TC' or 'CT', got {layout!r}")
    exists = stream in store.streams()
    if exists:
        store.create_stream(stream, grid.spec())  # refuses other numbers before anything is read
    report = ImportReport()
    files = _with_ids(found, prefix, suffix, report, allow_pickle=allow_pickle)
    told = {video: file.listed.duration_s for video, file in files.items() if file.listed is not None}
    grid = replace(grid, durations=told | dict(grid.durations))
    if layout is not None and not indexed:  # said for files that may have been changed since they were exported
        files = {video: replace(file, listed=None) for video, file in files.items()}
    form = stored_form(store, stream) if exists else None
    if layout is None or form is None:
        shapes = some_shapes(files, allow_pickle=allow_pickle)
        layout = layout or find_layout(files, shapes, grid, None if form is None else form[1])
        form = form or usual_form(files, shapes, layout)
    for video, file in files.items():
        try:
            source_of_it = file.source()
            if exists and not overwrite and _is_done(store, stream, video, file, grid, source_of_it):
                report.already.append(video)
                continue
            level, duration_s = _read(file, video, grid, layout, form, allow_pickle=allow_pickle)
        except (StoreError, *UNREADABLE) as error:
            plain = isinstance(error, StoreError | Unreadable)
            report.skipped.append((file.label, str(error) if plain else describe(error)))
            continue
        if not exists:  # only now: a stream that nothing was written to would still be bound to its numbers
            store.create_stream(stream, grid.spec())
            exists = True
        known = _stored(store, stream, video, level, duration_s)
        if known == "same":
            report.already.append(video)
        elif known != "nothing" and not overwrite:
            report.skipped.append((file.label, _WHY_NOT[known]))
        else:
            store.write(
                stream,
                video,
                {"features": level},
                duration_s=duration_s,
                source=source_of_it,
                overwrite=overwrite,
            )
            report.written.append(video)
            _warn_of_length(video, file, len(level.array), grid, report)
    return report


def _one_index(found: list[FeatureFile]) -> bool:
    """Whether ``index.json`` tells time axes; StoreError when they are of several streams, which one cannot hold."""
    streams = sorted({f"{file.listed.stream}/{file.listed.level}" for file in found if file.listed is not None})
    if len(streams) > 1:
        some = ", ".join(streams[:3])
        raise StoreError(
            f"{found[0].path.parent / INDEX} lists files of several streams ({some}); export each into its own folder"
        )
    return bool(streams)


def _with_ids(
    found: list[FeatureFile], prefix: str, suffix: str, report: ImportReport, *, allow_pickle: bool
) -> dict[str, FeatureFile]:
    files: dict[str, FeatureFile] = {}
    for file in found:
        name = file.name
        if (reason := why_not(file, allow_pickle=allow_pickle)) is not None:
            report.skipped.append((file.label, reason))
            continue
        if len(name) <= len(prefix) + len(suffix) or not (name.startswith(prefix) and name.endswith(suffix)):
            report.skipped.append((file.label, f"its name is not {prefix}ID{suffix}"))
            continue
        video = name[len(prefix) : len(name) - len(suffix)]
        if video in files:
            report.skipped.append((file.label, f"is the same video as {files[video].label}"))
            continue
        try:
            encode_name(video, "video id")
        except StoreError as error:
            report.skipped.append((file.label, str(error)))
            continue
        files[video] = file
    return files


def _read(
    file: FeatureFile, video: str, grid: Grid, layout: Layout | None, form: Form | None, *, allow_pickle: bool
) -> tuple[Level, float]:
    """One file as a level, and the duration of its video in seconds."""
    array = rows_first(read_features(file, allow_pickle=allow_pickle), file, layout)  # (T, C) or (T, C, H, W)
    if form is not None and array.ndim != form[0]:
        raise Unreadable(f"has the shape {array.shape}, the stream has {'maps' if form[0] == 4 else 'no maps'}")
    if form is None or array.shape[1] != form[1]:
        raise Unreadable(f"has {array.shape[1]} channels, the stream has {None if form is None else form[1]}")
    axis, duration_s = grid.axis(file, video, len(array))
    array = checked_array(array, where=file.label)
    if grid.indexed and file.listed is not None and sha256_of([array]) != file.listed.sha256:
        raise Unreadable(
            f"is not what {INDEX} lists (SHA-256 differs); export it again, or give fps, window and stride"
        )
    return Level(array, axis, *grid.frame_numbers(file)), duration_s


def _is_done(store: Store, stream: str, video: str, file: FeatureFile, grid: Grid, source: Mapping[str, Any]) -> bool:
    """Whether this file was imported already, at the time that is known of it now; nothing of it is read."""
    if not store.is_done(stream, video, source):
        return False
    feature, given = store[stream, video], grid.durations.get(video)
    moved = grid.indexed and file.listed is not None and file.listed.axis != feature.axis
    return not moved and (given is None or given == feature.duration_s)


def _stored(store: Store, stream: str, video: str, level: Level, duration_s: float) -> _Known:
    """What the store has of this video: the same rows at the same time, or others."""
    if not store.has(stream, video):
        return "nothing"
    try:
        feature = store[stream, video]
    except StoreError:
        return "other features"  # damaged
    alike = feature.shape == level.array.shape and feature.dtype == level.array.dtype
    if not alike or feature.attrs["sha256"][feature.level] != sha256_of([level.array]):
        return "other features"
    return "same" if feature.duration_s == duration_s and feature.axis == level.axis else "another time"


def _warn_of_length(video: str, file: FeatureFile, rows: int, grid: Grid, report: ImportReport) -> None:
    expected = grid.expected_rows(video)
    if expected is not None and abs(rows - expected) > ROWS_OFF:
        promise = f"its duration of {grid.durations[video]} s promises {expected:.1f}"
        report.warnings.append((file.label, f"has {rows} rows, {promise}: check fps, window and stride"))
