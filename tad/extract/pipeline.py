"""``tad extract``: videos → feature store. Read this file, then ``frames.py`` (decoding) and ``snippets.py`` (windows).

::

    files ──frames.py──▶ uint8 frames ──FrameBuffer──▶ windows ──Stream.run──▶ rows ──Store.write──▶ entry
            (a thread)                   (on the device)         (the network)        (atomic, last)
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tad.errors import RecipeError, TadError
from tad.extract.frames import Begin, End, Failed, Frames, read_videos
from tad.extract.inputs import VideoFile, find_videos
from tad.extract.snippets import FrameBuffer, LevelTiler
from tad.extract.streams import Stream, resolve
from tad.extract.video import VideoInfo, probe, source_of
from tad.progress import Progress, ProgressFactory, silent
from tad.recipe import ExtractRecipe
from tad.store import Level, Store, open_store
from tad.timeline import TimeAxis


@dataclass
class Failure:
    """A video that was given up, and why."""

    video: str
    path: str
    streams: list[str]
    error: str
    message: str

    def __str__(self) -> str:
        return f"{self.video} ({', '.join(self.streams)}): {self.message}"


@dataclass
class ExtractReport:
    """What a run did. Decoding and flow run beside the network, so the parts may add up to more than ``wall_s``."""

    videos: list[str] = field(default_factory=list)  # whose features are complete now
    written: int = 0  # entries
    already: int = 0  # entries that were there and match
    failures: list[Failure] = field(default_factory=list)
    video_s: float = 0.0  # seconds of video decoded
    rows: int = 0
    wall_s: float = 0.0
    decode_s: float = 0.0
    flow_s: float = 0.0
    network_s: float = 0.0
    write_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        speed = self.video_s / self.wall_s if self.wall_s > 0 else None
        return {**self.__dict__, "failures": [f.__dict__ for f in self.failures], "video_s_per_s": speed}


def extract(
    videos: str | Path | Iterable[str | Path],
    *,
    store: str | Path | Store,
    recipes: ExtractRecipe | Sequence[ExtractRecipe],
    names: Sequence[str] | None = None,
    format: Literal["zarr", "hdf5"] | None = None,
    batch: int = 8,
    device: str | None = None,
    overwrite: bool = False,
    failures: str | Path | None = None,
    progress: ProgressFactory = silent,
) -> ExtractReport:
    """Extract every stream of ``recipes`` from every video, skipping what the store already holds.

    Parameters
    ----------
    videos : files, folders or lists, see :func:`tad.extract.inputs.find_videos`.
    store : an open store in mode ``a``, or where to open one (``format`` as in ``open_store``).
    recipes : one recipe a stream; streams that read the same frames share one decoding pass.
    names : the streams' names; by default the backbones'.
    batch : windows a forward pass.
    device : ``cpu``, ``cuda``, ``cuda:1``; by default CUDA when there is one.
    overwrite : extract again what is there.
    failures : where failing videos are listed, one JSON object a line; by default ``failures.jsonl`` in a local store.
    progress : shows how far it is, in seconds of video (see :mod:`tad.progress`).

    Raises
    ------
    RecipeError, WeightsError, StoreError : before anything is decoded. A video that fails is listed in the report
    instead.
    """
    started = time.perf_counter()
    streams = resolve_all(recipes, names=names, device=device or default_device())
    files = find_videos([videos] if isinstance(videos, (str, Path)) else videos)
    with ExitStack() as stack:
        if not isinstance(store, Store):
            store = stack.enter_context(open_store(store, "a", format=format))
        for stream in streams:
            store.create_stream(stream.name, stream.spec, info=stream.info)
        log = FailureLog(failures or default_failures(store), {file.video for file in files}, {s.name for s in streams})
        report = ExtractReport()
        todo = plan_work(files, streams, store, report, overwrite=overwrite, log=log)
        total_s = sum(info.header_duration_s or 0.0 for group in todo.values() for _, _, info in group)
        try:
            with progress(total_s, "extract", "s of video") as bar:
                for group in todo.values():
                    _extract_group(group, store, report, batch=batch, log=log, bar=bar)
        finally:
            if report.written:
                store.write_catalog()
            report.wall_s = time.perf_counter() - started
    return report


def default_device() -> str:
    """CUDA when there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_all(
    recipes: ExtractRecipe | Sequence[ExtractRecipe], *, names: Sequence[str] | None, device: str
) -> list[Stream]:
    """Recipes with their defaults filled in and their networks loaded; names must differ."""
    recipes = [recipes] if isinstance(recipes, ExtractRecipe) else list(recipes)
    wanted: Sequence[str | None] = names if names is not None else [None] * len(recipes)
    if len(wanted) != len(recipes) or not recipes:
        raise RecipeError(f"{len(recipes)} recipes and {len(wanted)} stream names: give one name a recipe")
    streams = [resolve(recipe, name=name, device=device) for recipe, name in zip(recipes, wanted, strict=True)]
    repeated = {s.name for s in streams if [t.name for t in streams].count(s.name) > 1}
    if repeated:
        raise RecipeError(f"two recipes would write the stream '{repeated.pop()}': name them apart with --stream")
    return streams


Work = tuple[VideoFile, list[Stream], VideoInfo]


def plan_work(
    files: Sequence[VideoFile],
    streams: Sequence[Stream],
    store: Store | None,
    report: ExtractReport,
    *,
    overwrite: bool,
    log: FailureLog | None = None,
) -> dict[tuple[Any, ...], list[Work]]:
    """What is left to do: videos with the streams that they lack, grouped by the frames that these streams read.

    ``store`` is ``None`` where there is none yet.
    """
    groups: dict[tuple[Any, ...], list[Work]] = {}
    for file in files:
        try:
            source = source_of(file.path)
            missing = [s for s in streams if overwrite or store is None or not _done(store, s, file.video, source)]
            report.already += len(streams) - len(missing)
            if not missing:
                report.videos.append(file.video)
                continue
            info = probe(file.path)
        except TadError as error:
            _fail(report, log, file, streams, error)
            continue
        by_frames: dict[tuple[Any, ...], list[Stream]] = {}
        for stream in missing:
            by_frames.setdefault((stream.fps, stream.geometry, tuple(s.name for s in missing)), []).append(stream)
        for key, members in by_frames.items():
            groups.setdefault(key, []).append((file, members, info))
    return groups


def _done(store: Store, stream: Stream, video: str, source: dict[str, Any]) -> bool:
    return stream.name in store.streams() and store.is_done(stream.name, video, source)


def _extract_group(
    group: Sequence[Work],
    store: Store,
    report: ExtractReport,
    *,
    batch: int,
    log: FailureLog | None,
    bar: Progress,
) -> None:
    """Videos that lack the same streams, all reading the same frames: one pass over each video's frames."""
    streams = group[0][1]
    device = next(streams[0].backbone.parameters()).device.type
    flows = {s.flow.name: s.flow for s in streams if s.flow is not None}
    items = read_videos(
        [file for file, _, _ in group],
        fps=streams[0].fps,
        geometry=streams[0].geometry,
        rgb=any(s.flow is None for s in streams),
        flows=list(flows.values()),
        # on the CPU the network has the cores; beside a GPU they are idle
        flow_threads=1 if device == "cpu" else max(1, (os.cpu_count() or 2) // 2),
    )
    begin: Begin | None = None
    running: list[VideoRun] = []
    with closing(items):
        for item in items:
            try:
                match item:
                    case Begin():
                        begin, running = item, [VideoRun(stream, item, batch=batch) for stream in streams]
                    case Frames():
                        for run in running:
                            report.network_s += run.push(item)
                        if begin is not None:
                            bar.advance(item.count / begin.fps, begin.file.video)
                    case End():
                        for run in running:
                            report.network_s += run.finish()
                            begun = time.perf_counter()
                            report.rows += run.write(store, item)
                            report.write_s += time.perf_counter() - begun
                            report.written += 1
                        if running and begin is not None:
                            report.videos.append(begin.file.video)
                        report.decode_s += item.decode_s
                        report.flow_s += item.flow_s
                        report.video_s += item.duration_s
                    case Failed():
                        running = []
                        _fail(report, log, item.file, streams, item.error)
            except (TadError, RuntimeError, OSError, MemoryError) as error:
                running = []  # the rest of this video's frames pass by unused
                assert begin is not None
                _fail(report, log, begin.file, streams, error)


class VideoRun:
    """One stream of the video that is being decoded: frames in, an entry out."""

    def __init__(self, stream: Stream, begin: Begin, *, batch: int) -> None:
        self.stream, self.begin = stream, begin
        device = next(stream.backbone.parameters()).device
        self.buffer = FrameBuffer(stream.plan, batch=batch, device=device)
        self.rows: list[np.ndarray] = []
        self.tilers = {level: LevelTiler(stream.plan, stride) for level, stride in stream.levels.items()}

    def push(self, item: Frames) -> float:
        """Give the frames to the network, window by window; returns the seconds that it took."""
        frames = item.rgb if self.stream.flow is None else item.flow.get(self.stream.flow.name)
        if frames is None or len(frames) == 0:
            return 0.0
        begun = time.perf_counter()
        for windows in self.buffer.push(torch.from_numpy(frames)):
            self._run(windows)
        return time.perf_counter() - begun

    def finish(self) -> float:
        """The windows at the video's end; returns the seconds that they took."""
        begun = time.perf_counter()
        for windows in self.buffer.finish():
            self._run(windows)
        return time.perf_counter() - begun

    def _run(self, windows: torch.Tensor) -> None:
        with torch.inference_mode():
            outputs = self.stream.run(windows)
        self.rows.append(outputs["features"].numpy())  # (B, D)
        for level, tiler in self.tilers.items():
            tiler.push(outputs[level])

    def write(self, store: Store, end: End) -> int:
        """Write the entry and return its number of rows."""
        stream, fps, frames = self.stream, self.begin.fps, self.buffer.frames
        plan = stream.plan
        features = np.concatenate(self.rows)  # (rows, D)
        levels = {"features": level_of(features, plan.axis(fps), fps, plan.stride, plan.span, frames)}
        for name, tiler in self.tilers.items():
            step = tiler.step_frames
            axis = TimeAxis.from_frames(fps=fps, window_frames=step, stride_frames=step)
            levels[name] = level_of(tiler.finish(frames).numpy(), axis, fps, step, step, frames)
        file = self.begin.file
        attrs = {**end.attrs, "fps": fps, "frames": frames}
        store.write(
            stream.name,
            file.video,
            levels,
            duration_s=end.duration_s,
            source=source_of(file.path),
            attrs=attrs,
            overwrite=True,
        )
        return int(features.shape[0])


def level_of(array: np.ndarray, axis: TimeAxis, fps: float, stride: int, window: int, frames: int) -> Level:
    """An array with everything that the store records of its time axis."""
    return Level(array=array, axis=axis, stride_frames=stride, window_frames=window, fps=fps, num_frames_used=frames)


class FailureLog:
    """``failures.jsonl``: the videos that could not be extracted, rewritten for those that are tried again."""

    def __init__(self, path: str | Path, videos: set[str], streams: set[str]) -> None:
        self.path = Path(path)
        kept = [line for line in self._lines() if not self._tried_again(line, videos, streams)]
        if kept:
            temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(temporary, self.path)
        else:
            self.path.unlink(missing_ok=True)

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []

    @staticmethod
    def _tried_again(line: str, videos: set[str], streams: set[str]) -> bool:
        try:
            entry = json.loads(line)
            return entry["video"] in videos and bool(streams.intersection(entry["streams"]))
        except (ValueError, KeyError, TypeError):
            return True  # not a line of ours, or a half-written one

    def add(self, failure: Failure) -> None:
        """Append one line, at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **failure.__dict__}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def default_failures(store: Store) -> Path:
    """``failures.jsonl`` in the store's folder; for a remote store in the current one."""
    return Path("failures.jsonl") if "://" in str(store.path) else Path(store.path) / "failures.jsonl"


def _fail(
    report: ExtractReport, log: FailureLog | None, file: VideoFile, streams: Sequence[Stream], error: Exception
) -> None:
    message = str(error) if isinstance(error, TadError) else f"{type(error).__name__}: {error}"
    failure = Failure(file.video, str(file.path), [s.name for s in streams], type(error).__name__, message)
    report.failures.append(failure)
    if log is not None:
        log.add(failure)
