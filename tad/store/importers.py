"""import_features: the feature files of other projects as a stream of a store, with their time axis."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tad.errors import StoreError
from tad.store.api import Store
from tad.store.feature_files import UNREADABLE, FeatureFile, Unreadable, find_files, read_features, why_not
from tad.store.layout import Level, checked_array, describe, sha256_of
from tad.store.names import encode_name
from tad.timeline import TimeAxis

Layout = Literal["TC", "CT"]
_LOOKED_AT = 32  # files whose shapes decide which axis is time
_Form = tuple[int, int]  # how many axes an array has, and how many channels
_ROWS_OFF = 2  # rows by which a sequence may differ from what its duration promises


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


@dataclass(frozen=True)
class _Grid:
    """Where the rows of all imported files lie."""

    fps: float | None
    window: float | None
    stride: float | None
    offset: float
    rescaled: bool
    durations: Mapping[str, float]

    def spec(self) -> dict[str, Any]:
        numbers = {"fps": self.fps, "window": self.window, "stride": self.stride, "offset": self.offset}
        return {
            "imported": True,
            **{k: None if v is None else float(v) for k, v in numbers.items()},
            "rescaled": self.rescaled,
        }

    def __post_init__(self) -> None:
        numbers = {"fps": self.fps, "window": self.window, "stride": self.stride}
        for name, value in numbers.items():
            if value is None and not self.rescaled:
                raise StoreError(
                    f"{name} is needed: fps, window and stride say where the rows lie in time "
                    "(or say rescaled, and give durations)"
                )
            if value is not None and not 0 < value < math.inf:
                raise StoreError(f"{name} must be a positive number, got {value}")
        if not math.isfinite(self.offset):
            raise StoreError(f"offset must be a finite number of frames, got {self.offset}")

    def frames(self) -> tuple[float, float, float]:
        assert self.fps is not None
        assert self.window is not None
        assert self.stride is not None
        return self.fps, self.window, self.stride

    def axis(self, video: str, rows: int) -> tuple[TimeAxis, float]:
        """The axis of a video with ``rows`` rows, and its duration in seconds."""
        known = self.durations.get(video)
        if known is not None and not 0 < known < math.inf:
            raise Unreadable(f"its duration is given as {known} seconds")
        if self.rescaled:
            if known is None:
                raise Unreadable("rescaled features need the duration of their video, and none is given for this one")
            return TimeAxis.rescaled(rows=rows, duration_s=float(known)), float(known)
        fps, window, stride = self.frames()
        axis = TimeAxis.from_frames(fps=fps, window_frames=window, stride_frames=stride, offset_frames=self.offset)
        return axis, float(known) if known is not None else (self.offset + (rows - 1) * stride + window) / fps

    def expected_rows(self, video: str) -> float | None:
        """Rows that the given duration promises, at least 1; None where nothing promises anything."""
        known = self.durations.get(video)
        if self.rescaled or known is None:
            return None
        fps, window, stride = self.frames()
        return max(1.0, (known * fps - self.offset - window) / stride + 1)


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

    Parameters
    ----------
    source : a folder with a file per video (.npy, .npz, .csv, .pt, .pkl), or one HDF5 file with a key per video.
    fps, window, stride, offset : of the extraction, lengths in frames; ``offset`` is where the first window starts.
    layout : ``"TC"`` or ``"CT"``; None finds it out from the shapes (channels do not vary) and refuses if it cannot.
        CSV files are always rows by channels. Maps and frames are (T, C, H, W), with ``"CT"`` (C, T, H, W).
    durations : seconds by video; needed for ``rescaled``. A sequence that is off by more than two rows is warned about.
    allow_pickle : read .pkl files and pickled arrays, which can run any code.
    prefix, suffix : parts of the file's name (without extension) that do not belong to the video's id.
    overwrite : replace videos whose features differ from the stored ones; otherwise they are skipped.

    Raises
    ------
    StoreError : nothing to import, the stream was imported with other numbers, or the layout cannot be told.
        A single bad file is listed in ``skipped`` and never stops the rest.
    """
    grid = _Grid(fps, window, stride, offset, rescaled, durations or {})
    if layout not in (None, "TC", "CT"):
        raise StoreError(f"layout must be 'TC' or 'CT', got {layout!r}")
    exists = stream in store.streams()
    if exists:
        store.create_stream(stream, grid.spec())  # refuses other numbers before anything is read
    report = ImportReport()
    files = _with_ids(find_files(Path(source)), prefix, suffix, report, allow_pickle=allow_pickle)
    form = _stored_form(store, stream) if exists else None
    if layout is None or form is None:
        shapes = _some_shapes(files, allow_pickle=allow_pickle)
        layout = layout or _find_layout(files, shapes, grid, None if form is None else form[1])
        form = form or _usual_form(files, shapes, layout)
    for video, file in files.items():
        try:
            source_of_it = file.source()
            if exists and not overwrite and store.is_done(stream, video, source_of_it):
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
        elif known == "other" and not overwrite:
            report.skipped.append((file.label, "the store has other features of this video; overwrite replaces them"))
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
    file: FeatureFile, video: str, grid: _Grid, layout: Layout | None, form: _Form | None, *, allow_pickle: bool
) -> tuple[Level, float]:
    """One file as a level, and the duration of its video in seconds."""
    array = _rows_first(read_features(file, allow_pickle=allow_pickle), file, layout)  # (T, C) or (T, C, H, W)
    if form is not None and array.ndim != form[0]:
        raise Unreadable(f"has the shape {array.shape}, the stream has {'maps' if form[0] == 4 else 'no maps'}")
    if form is None or array.shape[1] != form[1]:
        raise Unreadable(f"has {array.shape[1]} channels, the stream has {None if form is None else form[1]}")
    axis, duration_s = grid.axis(video, len(array))
    frames = (None, None, None) if grid.rescaled else (grid.stride, grid.window, grid.fps)
    return Level(checked_array(array, where=file.label), axis, *frames), duration_s


def _stored(
    store: Store, stream: str, video: str, level: Level, duration_s: float
) -> Literal["same", "other", "nothing"]:
    """Whether the store has this video, with the same rows and duration or with others."""
    if not store.has(stream, video):
        return "nothing"
    try:
        attrs = store.attrs(stream, video)
    except StoreError:
        return "other"  # damaged
    (name, *_), digest = store.levels(stream, video), sha256_of([level.array])
    alike = store[stream, video].shape == level.array.shape and store[stream, video].dtype == level.array.dtype
    return "same" if alike and attrs["duration_s"] == duration_s and attrs["sha256"][name] == digest else "other"


def _warn_of_length(video: str, file: FeatureFile, rows: int, grid: _Grid, report: ImportReport) -> None:
    expected = grid.expected_rows(video)
    if expected is not None and abs(rows - expected) > _ROWS_OFF:
        promise = f"its duration of {grid.durations[video]} s promises {expected:.1f}"
        report.warnings.append((file.label, f"has {rows} rows, {promise}: check fps, window and stride"))


# ---- which axis is time --------------------------------------------------------------------------
def _rows_first(array: np.ndarray, file: FeatureFile, layout: Layout | None) -> np.ndarray:
    return array.swapaxes(0, 1) if layout == "CT" and not file.rows_first else array  # (T, C, ...)


def _stored_form(store: Store, stream: str) -> _Form | None:
    for video in islice(store.videos(stream), 1):
        feature = store[stream, video]
        return feature.ndim, feature.shape[1]
    return None


def _some_shapes(files: Mapping[str, FeatureFile], *, allow_pickle: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of the first files that can be read, by video."""
    shapes: dict[str, tuple[int, ...]] = {}
    for video, file in files.items():
        if len(shapes) == _LOOKED_AT:
            break
        try:
            shapes[video] = read_features(file, allow_pickle=allow_pickle).shape
        except UNREADABLE:
            continue  # told when its turn comes
    return shapes


def _usual_form(
    files: Mapping[str, FeatureFile], shapes: Mapping[str, tuple[int, ...]], layout: Layout | None
) -> _Form | None:
    """The number of axes and channels that most files have; None where no file can be read."""
    forms = Counter(
        (len(shape), shape[0 if layout == "CT" and not files[video].rows_first else 1])
        for video, shape in shapes.items()
    )
    return forms.most_common(1)[0][0] if forms else None


def _find_layout(
    files: Mapping[str, FeatureFile], shapes: Mapping[str, tuple[int, ...]], grid: _Grid, channels: int | None
) -> Layout | None:
    """Which axis is time, by the shapes of some files; None where no file leaves it open."""
    shapes = {video: shape for video, shape in shapes.items() if not files[video].rows_first}
    if not shapes:
        return None
    for evidence in (_by_channels(shapes, channels), _by_durations(shapes, grid), _by_constancy(shapes)):
        if evidence is not None:
            return evidence
    some = ", ".join(f"{files[video].label} {shape}" for video, shape in islice(shapes.items(), 3))
    raise StoreError(
        f"which axis is time cannot be told from the shapes ({some}); say layout='TC' (rows first) or layout='CT'"
    )


def _decide(rows_first: bool, channels_first: bool) -> Layout | None:
    if rows_first == channels_first:
        return None
    return "TC" if rows_first else "CT"


def _by_channels(shapes: Mapping[str, tuple[int, ...]], channels: int | None) -> Layout | None:
    """The stream has videos already: their number of channels must be found again."""
    fits = [sum(shape[axis] == channels for shape in shapes.values()) > len(shapes) / 2 for axis in (0, 1)]
    return _decide(rows_first=fits[1], channels_first=fits[0])


def _by_durations(shapes: Mapping[str, tuple[int, ...]], grid: _Grid) -> Layout | None:
    """Durations are given: one axis has the length that they promise."""
    known = [(shape, rows) for video, shape in shapes.items() if (rows := grid.expected_rows(video)) is not None]
    fits = [sum(abs(shape[axis] - rows) <= _ROWS_OFF for shape, rows in known) > len(known) / 2 for axis in (0, 1)]
    return _decide(rows_first=fits[0], channels_first=fits[1])


def _by_constancy(shapes: Mapping[str, tuple[int, ...]]) -> Layout | None:
    """Channels are as many in every video, rows are not; a few odd files among many may break the rule."""
    most = [Counter(shape[axis] for shape in shapes.values()).most_common(1)[0][1] for axis in (0, 1)]
    same = [count == len(shapes) for count in most]
    if (decided := _decide(rows_first=same[1], channels_first=same[0])) is not None:
        return decided
    mostly = [count >= 0.75 * len(shapes) for count in most]
    return None if all(same) else _decide(rows_first=mostly[1], channels_first=mostly[0])
