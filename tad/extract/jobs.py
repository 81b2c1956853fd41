"""A video as a job for another process: what is sent there, and what is done with it there.

Only plain data travels (recipes, paths, numbers): the process that does a job loads the networks itself, once, and
keeps them for the next one. What happens inside a job is the path of ``pipeline.py``.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import cv2
import torch

from tad._version import __version__
from tad.errors import TadError, VideoError
from tad.extract.frames import UNREADABLE
from tad.extract.inputs import VideoFile
from tad.extract.outcome import ExtractReport, Failure
from tad.extract.pipeline import default_device, extract_group, plan_work
from tad.extract.streams import Stream, resolve
from tad.extract.video import probe, source_of
from tad.progress import Progress
from tad.recipe import ExtractRecipe
from tad.store import Store, open_store


@dataclass(frozen=True)
class Setup:
    """What all jobs of one run share.

    Attributes
    ----------
    run : tells runs apart. ``version`` : of the tad that planned it.
    place, format, fsync, storage_options : the store, see ``open_store``.
    recipes : stream → the fields of its :class:`ExtractRecipe`, weights as an absolute path.
    fingerprints : stream → what the store has bound it to.
    device : ``None`` is CUDA where there is one. ``threads`` : of a local worker, its share of the cores.
    """

    run: str
    version: str
    place: str
    format: Literal["zarr", "hdf5"]
    fsync: bool
    storage_options: Mapping[str, Any]
    recipes: Mapping[str, Mapping[str, Any]]
    fingerprints: Mapping[str, str]
    device: str | None
    batch: int
    overwrite: bool
    threads: int | None = None


@dataclass(frozen=True)
class Job:
    """One video and the streams that it lacks; ``source`` is the file as the planning process saw it."""

    video: str
    path: str
    source: Mapping[str, str | int]
    streams: tuple[str, ...]


def setup_of(
    streams: Sequence[Stream],
    store: Store,
    *,
    place: str,
    run: str,
    device: str | None,
    batch: int,
    overwrite: bool,
    threads: int | None,
) -> Setup:
    """Streams and store as data; the store must have the streams already."""
    recipes = {s.name: s.recipe.model_copy(update={"weights": s.info["weights_source"]}) for s in streams}
    return Setup(
        run=run,
        version=__version__,
        place=place,
        format=store.format,
        fsync=store.fsync,
        storage_options=store.storage_options,
        recipes={name: recipe.model_dump() for name, recipe in recipes.items()},
        fingerprints={s.name: str(store.stream_attrs(s.name)["fingerprint"]) for s in streams},
        device=device,
        batch=batch,
        overwrite=overwrite,
        threads=threads,
    )


def spread(seconds: Sequence[float], slots: int) -> list[list[int]]:
    """Which video goes where when each of ``slots`` processes takes the longest one that is left (indices, in order).

    This is what a run does if seconds of video cost the same everywhere; the longest list is at most 4/3 of the
    shortest possible (Graham, 1969, "Bounds on multiprocessing timing anomalies").
    """
    lists: list[list[int]] = [[] for _ in range(slots)]
    loads = [(0.0, slot) for slot in range(slots)]  # a heap
    for index in longest_first(seconds):
        load, slot = heapq.heappop(loads)
        lists[slot].append(index)
        heapq.heappush(loads, (load + seconds[index], slot))
    return lists


def longest_first(seconds: Sequence[float]) -> list[int]:
    """Indices in the order in which jobs are given out, so that no long one is left over for the end."""
    return sorted(range(len(seconds)), key=lambda index: -seconds[index])


# ---- in the other process ------------------------------------------------------------------------
def look(setup: Setup, job: Job, *, worker: str) -> float | Failure:
    """Seconds of video that the header promises (0 where it is silent), or why the file cannot be opened."""
    check_version(setup, worker)
    try:
        check_source(job, worker)
        return probe(job.path).expected_s
    except UNREADABLE as error:
        return _failure(job, error)


def do(setup: Setup, job: Job, *, worker: str, device: str, bar: Progress) -> ExtractReport:
    """Extract one video into the store; ``bar`` hears of every chunk of frames how many seconds it was.

    Raises
    ------
    TadError : this process is not fit for any job: another version of tad, no such store or weights here.
    """
    check_version(setup, worker)
    if setup.threads is not None:
        torch.set_num_threads(setup.threads)
        cv2.setNumThreads(setup.threads)
    store = store_of(setup)
    report = ExtractReport()
    try:
        check_source(job, worker)
    except UNREADABLE as error:
        report.failures.append(_failure(job, error))
        return report
    with networks(setup, job.streams, device) as streams:
        for stream in streams:
            store.check_stream(stream.name, stream.spec)
        todo = plan_work(
            [VideoFile(job.video, Path(job.path))], streams, store, report, overwrite=setup.overwrite
        )  # an entry that a lost worker has finished before is not made again
        for group in todo.values():
            extract_group(
                group, store, report, batch=setup.batch, overwrite=setup.overwrite, log=None, bar=bar,
                cores=setup.threads,
            )  # fmt: skip
    report.workers[worker] = report.video_s
    return report


def check_version(setup: Setup, worker: str) -> None:
    """Raise :class:`TadError` when this is another tad than the one that planned the run."""
    if setup.version != __version__:
        raise TadError(
            f"worker {worker} has tad {__version__}, this run was planned by tad {setup.version}: install the same "
            "version everywhere"
        )


def check_source(job: Job, worker: str) -> None:
    """Raise :class:`VideoError` unless this process sees the same file."""
    if not Path(job.path).exists():
        raise VideoError(
            f"{job.path}: worker {worker} does not see this file; put the videos where every worker reaches them under "
            "the same path"
        )
    found = source_of(job.path)
    if differing := [key for key in job.source if job.source[key] != found[key]]:
        raise VideoError(
            f"{job.path}: worker {worker} sees another file than the planning process, {' and '.join(differing)} "
            "differ; it was changed meanwhile, or is a copy (cp -p and rsync -t keep the time)"
        )


def _failure(job: Job, error: Exception) -> Failure:
    return Failure.of(job.video, job.path, list(job.streams), error)


def store_of(setup: Setup) -> Store:
    """The store, which the planning process has made: it is not made here, where it would be on another disk.

    It is never closed: closing an HDF5 store brings ``store.h5`` up to date, which the planning process does once.
    """
    same: dict[str, Any] = {"format": setup.format, "storage_options": setup.storage_options}
    with open_store(setup.place, "r", **same) as seen:
        for stream in setup.recipes:
            seen.stream_attrs(stream)
    return open_store(setup.place, "a", fsync=setup.fsync, **same)


_Key = tuple[str, str, str]
_idle: dict[_Key, list[Stream]] = {}
_lock = Lock()


@contextmanager
def networks(setup: Setup, names: Sequence[str], device: str) -> Iterator[list[Stream]]:
    """The streams of these names with their networks loaded, lent to one job at a time.

    They stay in memory for the next job. A process that does several jobs at once has a network for each of them.
    """
    with _lock:
        wanted = set(setup.fingerprints.values())
        for key in [key for key in _idle if key[1] not in wanted]:
            del _idle[key]  # of another run
    taken: list[tuple[_Key, Stream]] = []
    try:
        for name in names:
            key = (name, setup.fingerprints[name], device)
            with _lock:  # loading too: random weights come from torch's one generator
                kept = _idle.get(key)
                stream = kept.pop() if kept else resolve(ExtractRecipe(**setup.recipes[name]), name=name, device=device)
            taken.append((key, stream))
        yield [stream for _, stream in taken]
    finally:
        with _lock:
            for key, stream in taken:
                _idle.setdefault(key, []).append(stream)


def device_of(setup: Setup, place: int | None) -> str:
    """Where a job runs; ``place`` is the number of a local worker, which takes its turn among this machine's GPUs."""
    device = setup.device or default_device()
    gpus = torch.cuda.device_count() if device == "cuda" and place is not None else 0
    return f"cuda:{(place or 0) % gpus}" if gpus > 1 else device
