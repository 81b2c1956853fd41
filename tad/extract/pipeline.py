"""``tad extract``: videos → feature store. Read this file, then ``frames.py`` (decoding) and ``rows.py`` (windows).

::

    files ──frames.py──▶ uint8 frames ──FrameBuffer──▶ windows ──Stream.run──▶ rows ──Store.write──▶ entry
            (a thread)                   (on the device)         (the network)        (atomic, last)

With ``workers`` or ``scheduler`` the same path runs in other processes, a video at a time: ``jobs.py``, ``cluster.py``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

import torch

from tad.errors import RecipeError, StoreError, TadError, VideoError
from tad.extract.frames import UNREADABLE, Begin, End, Failed, Frames, read_videos
from tad.extract.inputs import VideoFile, find_videos
from tad.extract.outcome import ExtractReport, Failure, FailureLog, default_failures
from tad.extract.rows import StreamRows
from tad.extract.streams import Stream, resolve
from tad.extract.video import VideoInfo, check_unchanged, probe, source_of
from tad.progress import Progress, ProgressFactory, silent
from tad.recipe import ExtractRecipe
from tad.store import Store, open_store
from tad.training.distributed import pick_device


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
    workers: int | None = None,
    scheduler: str | None = None,
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
    workers : processes of this machine among which the videos are divided; a script that asks for them needs the usual
        ``if __name__ == "__main__":``, since they import it.
    scheduler : address of a dask scheduler (``tcp://host:8786``) whose workers do the work instead; they must reach the
        videos, the weights and the store under the same paths.
    progress : shows how far it is, in seconds of video (see :mod:`tad.progress`).

    Raises
    ------
    RecipeError, WeightsError, StoreError : before anything is decoded. A video that fails is listed in the report
    instead, as is one whose id another file has in the store, unless ``overwrite``.
    TadError : workers cannot be used: none is there, or one has another version of tad.
    """
    started = time.perf_counter()
    if batch < 1:
        raise RecipeError(f"batch must be at least 1 window, got {batch}")
    here = workers is None and scheduler is None
    if not here:
        from tad.extract.cluster import check_choice, extract_on_workers

        check_choice(workers, scheduler)
    streams = resolve_all(recipes, names=names, device=pick_device(device) if here else "cpu")
    files = find_videos([videos] if isinstance(videos, (str, Path)) else videos)
    with ExitStack() as stack:
        if not isinstance(store, Store):
            store = stack.enter_context(open_store(store, "a", format=format))
        for stream in streams:
            store.create_stream(stream.name, stream.spec, info=stream.info)
        log = FailureLog(failures or default_failures(store), {file.video for file in files}, {s.name for s in streams})
        report = ExtractReport()
        try:
            if here:
                todo = plan_work(files, streams, store, report, overwrite=overwrite, log=log)
                total_s = sum(info.expected_s for group in todo.values() for _, _, info in group)
                with progress(total_s, "extract", "s of video") as bar:
                    for group in todo.values():
                        extract_group(group, store, report, batch=batch, overwrite=overwrite, log=log, bar=bar)
            else:
                lacking = what_lacks(files, streams, store, report, overwrite=overwrite, log=log)
                extract_on_workers(
                    list(lacking), streams, store, report, batch=batch, device=device, overwrite=overwrite, log=log,
                    workers=workers, scheduler=scheduler, progress=progress,
                )  # fmt: skip
        finally:
            complete = set(report.videos) - {failure.video for failure in report.failures}
            report.videos = [file.video for file in files if file.video in complete]
            if report.written:
                store.write_catalog()
            report.wall_s = time.perf_counter() - started
    return report


def default_device() -> str:
    """CUDA when there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_all(
    recipes: ExtractRecipe | Sequence[ExtractRecipe], *, names: Sequence[str] | None, device: torch.device | str
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
    for file, missing in what_lacks(files, streams, store, report, overwrite=overwrite, log=log):
        try:
            info = probe(file.path)
        except UNREADABLE as error:
            fail(report, log, file, streams, error)
            continue
        by_frames: dict[tuple[Any, ...], list[Stream]] = {}
        for stream in missing:
            by_frames.setdefault((*frames_of(stream), tuple(s.name for s in missing)), []).append(stream)
        for key, members in by_frames.items():
            groups.setdefault(key, []).append((file, members, info))
    return groups


def what_lacks(
    files: Sequence[VideoFile],
    streams: Sequence[Stream],
    store: Store | None,
    report: ExtractReport,
    *,
    overwrite: bool,
    log: FailureLog | None = None,
) -> Iterator[tuple[VideoFile, list[Stream]]]:
    """Videos with the streams that the store lacks of them; no file is opened for this."""
    for file in files:
        try:
            source = source_of(file.path)
            missing = [s for s in streams if overwrite or store is None or not _done(store, s, file.video, source)]
            if store is not None and not overwrite:
                for stream in missing:
                    check_id(store, stream, file, source)
        except TadError as error:
            fail(report, log, file, streams, error)
            continue
        report.already += len(streams) - len(missing)
        if missing:
            yield file, missing
        else:
            report.videos.append(file.video)


def frames_of(stream: Stream) -> tuple[Any, ...]:
    """What decides which frames a stream reads: streams that agree in it share one pass over a video."""
    return stream.fps, stream.geometry


def _done(store: Store, stream: Stream, video: str, source: dict[str, Any]) -> bool:
    return stream.name in store.streams() and store.is_done(stream.name, video, source)


def check_id(store: Store, stream: Stream, file: VideoFile, source: Mapping[str, Any]) -> None:
    """Raise :class:`VideoError` when the store has another file's features under this id.

    A file of the same name that has changed is the same video. An entry that cannot be read, or whose metadata do not
    name a file, holds nothing against anyone: it is made again.
    """
    if stream.name not in store.streams() or not store.has(stream.name, file.video):
        return
    try:
        name = (store.attrs(stream.name, file.video).get("source") or {}).get("name")
    except StoreError:
        return
    if name and name != source["name"]:
        raise VideoError(
            f"{file.path}: id '{file.video}' is taken by {name} in stream {stream.name}: give another id in a list "
            "(id<tab>path), or --overwrite"
        )


def extract_group(
    group: Sequence[Work],
    store: Store,
    report: ExtractReport,
    *,
    batch: int,
    overwrite: bool,
    log: FailureLog | None,
    bar: Progress,
    cores: int | None = None,
) -> None:
    """Videos that lack the same streams, all reading the same frames: one pass over each video's frames.

    ``cores`` of this machine are ours, by default all.
    """
    streams = group[0][1]
    on_cpu = any(s.device.type == "cpu" and not s.raw for s in streams)
    flows = {s.flow.name: s.flow for s in streams if s.flow is not None}
    items = read_videos(
        [file for file, _, _ in group],
        fps=streams[0].fps,
        geometry=streams[0].geometry,
        rgb=any(s.flow is None for s in streams),
        flows=list(flows.values()),
        # on the CPU the network has the cores; beside a GPU, or without a network, they are idle
        flow_threads=1 if on_cpu else max(1, (cores or os.cpu_count() or 2) // 2),
    )
    begin: Begin | None = None
    running: list[VideoRun] = []
    with closing(items):
        for item in items:
            try:
                match item:
                    case Begin():
                        begin = item
                        running = [VideoRun(stream, item, batch=batch) for stream in streams]
                    case Frames():
                        for run in running:
                            report.network_s += run.push(item)
                        if running and begin is not None:
                            bar.advance(item.count / begin.fps, begin.file.video)
                    case End() if running:
                        for run in running:
                            report.network_s += run.finish()
                            begun = time.perf_counter()
                            report.rows += run.write(store, item, overwrite=overwrite)
                            report.write_s += time.perf_counter() - begun
                            report.written += 1
                        if begin is not None:
                            report.videos.append(begin.file.video)
                        report.decode_s += item.decode_s
                        report.flow_s += item.flow_s
                        report.video_s += item.duration_s
                    case Failed():
                        running = []
                        if begin is None or begin.file != item.file or not begin.given_up.is_set():
                            fail(report, log, item.file, streams, item.error)
            except (TadError, RuntimeError, OSError, MemoryError) as error:
                assert begin is not None
                begin.given_up.set()
                running = []  # what is in the queue of this video passes by unused
                fail(report, log, begin.file, streams, error)


class VideoRun:
    """One stream of the video that is being decoded: frames in, an entry out."""

    def __init__(self, stream: Stream, begin: Begin, *, batch: int) -> None:
        self.stream, self.begin, self.rows = stream, begin, StreamRows(stream, batch=batch)

    def push(self, item: Frames) -> float:
        """Give the frames to the network, window by window; returns the seconds that it took."""
        frames = item.rgb if self.stream.flow is None else item.flow.get(self.stream.flow.name)
        if frames is None or len(frames) == 0:
            return 0.0
        begun = time.perf_counter()
        self.rows.push(frames)
        return time.perf_counter() - begun

    def finish(self) -> float:
        """The windows at the video's end; returns the seconds that they took."""
        begun = time.perf_counter()
        self.rows.finish()
        return time.perf_counter() - begun

    def write(self, store: Store, end: End, *, overwrite: bool) -> int:
        """Write the entry and return its number of rows.

        Raises
        ------
        VideoError : the file is not what it was before it was opened; another process has given its id away meanwhile.
        """
        stream, file, frames = self.stream, self.begin.file, self.rows.frames
        check_unchanged(file.path, self.begin.source)
        if not overwrite:
            check_id(store, stream, file, self.begin.source)
        levels = self.rows.levels(self.begin.fps)
        store.write(
            stream.name,
            file.video,
            levels,
            duration_s=end.duration_s,
            source=self.begin.source,
            attrs={**end.attrs, "fps": self.begin.fps, "frames": frames},
            overwrite=True,
        )
        return int(levels["features"].array.shape[0])


def fail(
    report: ExtractReport, log: FailureLog | None, file: VideoFile, streams: Sequence[Stream], error: Exception
) -> None:
    """Give a video up: into the report and the list of failures."""
    failure = Failure.of(file.video, str(file.path), [s.name for s in streams], error)
    report.failures.append(failure)
    if log is not None:
        log.add(failure)
