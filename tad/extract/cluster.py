"""``tad extract`` on several processes or machines: one task a video on dask.distributed, the longest ones first.

::

    what_lacks ──look (workers)──▶ jobs, longest first ──do (workers)──▶ reports ──▶ one report, one catalogue
                                        the store is written by the workers themselves, an entry at once

This process plans and counts; it decodes nothing. Only as many tasks are given out as can run at once: when a worker
dies, dask suspects every task that it held, and a queue of innocent videos must not be among them.
"""

from __future__ import annotations

import logging
import queue
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from distributed import Client, Future, KilledWorker, LocalCluster, Worker, get_worker

from tad._version import __version__
from tad.errors import RecipeError, TadError
from tad.extract import jobs
from tad.extract.inputs import VideoFile
from tad.extract.jobs import Job, Setup
from tad.extract.outcome import ExtractReport, Failure, FailureLog
from tad.extract.pipeline import default_device, frames_of
from tad.extract.streams import Stream
from tad.extract.video import source_of
from tad.progress import ProgressFactory
from tad.store import Store
from tad.store.backend import place_of

GPU = {"GPU": 1.0}  # what dask workers announce with --resources "GPU=1"
WAIT_S = 120.0  # for the first worker to join, or another one after the last was lost
POLL_S = 1.0
NEWS_S = 1.0  # a task says how far it is at most this often
# Ctrl-C in a terminal reaches all processes of the group; the planning one tells the workers what to do
IGNORE_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"


def extract_on_workers(
    lacking: Sequence[tuple[VideoFile, list[Stream]]],
    streams: Sequence[Stream],
    store: Store,
    report: ExtractReport,
    *,
    batch: int,
    device: str | None,
    overwrite: bool,
    log: FailureLog,
    workers: int | None,
    scheduler: str | None,
    progress: ProgressFactory,
) -> None:
    """Extract videos with the streams that they lack on ``workers`` processes, or those of ``scheduler``.

    ``report`` grows with every video that is finished. A video whose file a worker does not see, that cannot be
    decoded, or that kills worker after worker (dask's ``distributed.scheduler.allowed-failures``) is a failure of its
    own.

    Raises
    ------
    TadError : no worker, none with a GPU, another version of tad, or one that reaches no store or no weights.
    """
    if not lacking:
        return
    planned = [_job_of(file, members) for file, members in lacking]
    given = {job.video: str(file.path) for job, (file, _) in zip(planned, lacking, strict=True)}

    def merge(part: ExtractReport) -> None:
        for failure in part.failures:
            failure.path = given[failure.video]  # as it was given, not as the workers were told
            log.add(failure)
        report.add(part)

    with connected(workers, scheduler, device=device) as client:
        run = _Run(
            client,
            jobs.setup_of(
                streams, store, place=place_of(store.path), run=uuid.uuid4().hex, device=device, batch=batch,
                overwrite=overwrite, threads=None if workers is None else max(1, torch.get_num_threads() // workers),
            ),
            needs=gpu_needed(client, device),
        )  # fmt: skip
        with progress(len(planned), "look", "videos") as bar:
            seconds = dict[str, float]()  # of decoding, by the files' headers
            for job, found in run.over(planned, _look_task):
                if isinstance(found, Failure):
                    merge(ExtractReport(failures=[found]))
                else:
                    seconds[job.video] = found * _passes(job, streams)
                bar.advance(1, job.video)
        ready = [job for job in planned if job.video in seconds]
        with progress(sum(seconds.values()), "extract", "s of video") as bar:
            shown = dict.fromkeys(seconds, 0.0)

            def show(video: str, done_s: float) -> None:
                bar.advance(max(0.0, done_s - shown[video]), video)  # a video that is begun again is not counted twice
                shown[video] = max(shown[video], done_s)

            order = jobs.longest_first([seconds[job.video] for job in ready])
            for job, found in run.over([ready[index] for index in order], _do_task, news=show):
                part = ExtractReport(failures=[found]) if isinstance(found, Failure) else found
                merge(part)
                show(job.video, part.video_s)


def check_choice(workers: int | None, scheduler: str | None) -> None:
    """Raise :class:`RecipeError` unless exactly one way is chosen."""
    if workers is not None and scheduler is not None:
        raise RecipeError("--workers starts processes here, --scheduler uses those of a cluster: choose one")
    if scheduler is None and (workers is None or workers < 1):
        raise RecipeError(f"--workers {workers}: at least one is needed")


def _job_of(file: VideoFile, streams: Sequence[Stream]) -> Job:
    path = str(file.path.expanduser().absolute())
    return Job(file.video, path, source_of(path), tuple(stream.name for stream in streams))


def _passes(job: Job, streams: Sequence[Stream]) -> int:
    """How often a video is decoded: once for all streams that read the same frames."""
    return len({frames_of(stream) for stream in streams if stream.name in job.streams})


# ---- the cluster ---------------------------------------------------------------------------------
@contextmanager
def connected(workers: int | None, scheduler: str | None, *, device: str | None) -> Iterator[Client]:
    """A client of a new local cluster of ``workers`` processes, or of the cluster at ``scheduler``.

    Raises :class:`TadError` when nothing answers there, no worker joins, or one has another version of tad.
    """
    if scheduler is not None:
        try:
            client = Client(scheduler, set_as_default=False)
        except (OSError, ValueError) as error:
            raise TadError(
                f"no dask scheduler answers at {scheduler} ({error}); start one with 'dask scheduler', and give the "
                "address that it prints, such as tcp://host:8786"
            ) from error
        with client:
            _check_workers(client)
            yield client
        return
    cluster = LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=True,
        memory_limit=0,  # what tad needs does not grow with a video; dask would pause, not help
        resources=GPU if (device or default_device()).startswith("cuda") else {},
        dashboard_address="127.0.0.1:0",  # any free port: dask's own may be taken by another run
        silence_logs=logging.CRITICAL,  # a worker that dies is told of by the report
        preload=[IGNORE_CTRL_C],
    )
    with cluster, Client(cluster, set_as_default=False) as client:
        _check_workers(client)
        yield client


def _check_workers(client: Client) -> None:
    try:
        client.wait_for_workers(1, timeout=WAIT_S)
    except TimeoutError as error:
        address = client.scheduler_info()["address"]
        raise TadError(
            f"the scheduler at {address} has no workers, and none joined in {WAIT_S:.0f} s; start some with "
            f"'dask worker {address} --nthreads 1'"
        ) from error

    def version() -> str | None:  # travels as code: it works where there is no tad
        try:
            from tad._version import __version__
        except ImportError:
            return None
        return __version__

    differing = {worker: found for worker, found in client.run(version).items() if found != __version__}
    if differing:
        some = ", ".join(f"{worker} has {found or 'none'}" for worker, found in list(differing.items())[:5])
        raise TadError(
            f"{len(differing)} workers have another version of tad than this process, {__version__} ({some}): install "
            "the same everywhere"
        )


def gpu_needed(client: Client, device: str | None) -> dict[str, float]:
    """The resources that a task asks for: a GPU where workers announce some, unless the CPU was asked for.

    Raises :class:`TadError` when CUDA was asked for and no worker announces a GPU: the tasks would wait for ever.
    """
    cuda = device is not None and device.startswith("cuda")
    if any(worker["resources"].get("GPU", 0) >= 1 for worker in _workers(client).values()):
        return {} if device is not None and not cuda else dict(GPU)
    if cuda:
        raise TadError(f'--device {device}: no worker announces a GPU; start them with --resources "GPU=1"')
    return {}


def slots_at(scheduler: str, *, device: str | None) -> int:
    """How many videos the cluster at ``scheduler`` works on at once. Raises :class:`TadError` as a run would."""
    with connected(None, scheduler, device=device) as client:
        return slots_of(client, gpu_needed(client, device))


def slots_of(client: Client, needs: dict[str, float]) -> int:
    """How many tasks can run at once now."""
    slots = 0
    for worker in _workers(client).values():
        slots += min(worker["nthreads"], int(worker["resources"].get("GPU", 0)) if needs else worker["nthreads"])
    return slots


def _workers(client: Client) -> dict[str, Any]:
    return dict(client.scheduler_info(n_workers=-1)["workers"])


# ---- the tasks -----------------------------------------------------------------------------------
def _look_task(setup: Setup, job: Job) -> float | Failure:
    return jobs.look(setup, job, worker=str(get_worker().name))


def _do_task(setup: Setup, job: Job) -> ExtractReport:
    worker = get_worker()
    name = str(worker.name)
    place = worker.name if setup.threads is not None and isinstance(worker.name, int) else None
    try:
        device = jobs.device_of(setup, place)
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
        return jobs.do(setup, job, worker=name, device=device, bar=_News(worker, setup, job))
    except TadError as error:
        raise type(error)(f"worker {name}: {error}") from error


class _News:
    """The progress bar of a task: tells the planning process how far it is, and gives up when that is gone."""

    def __init__(self, worker: Worker, setup: Setup, job: Job) -> None:
        self.worker, self.setup, self.job = worker, setup, job
        self.key = worker.get_current_task()
        self.done_s, self.next = 0.0, 0.0

    def advance(self, n: float = 1.0, note: str = "") -> None:
        self.done_s += n
        task = self.worker.state.tasks.get(self.key)
        if task is None or task.state == "cancelled":
            raise _Cancelled
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + NEWS_S
            self.worker.log_event(_topic(self.setup), (self.job.video, self.done_s))


class _Cancelled(BaseException):
    """Nobody waits for this task any more. Not an ``Exception``: no video has failed."""


def _topic(setup: Setup) -> str:
    return f"tad-extract-{setup.run}"


class _Run:
    """Gives out jobs as long as workers are free and yields what comes back."""

    def __init__(self, client: Client, setup: Setup, *, needs: dict[str, float]) -> None:
        self.client, self.setup, self.needs = client, setup, needs
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()  # keys of finished tasks; (video, seconds done)

    def over(
        self,
        planned: Sequence[Job],
        task: Callable[[Setup, Job], Any],
        *,
        news: Callable[[str, float], None] = lambda video, done_s: None,
    ) -> Iterator[tuple[Job, Any]]:
        """Each job with what ``task`` made of it, or the failure that it is, in the order in which they finish.

        ``news`` hears how many seconds of a running one are done.
        """
        waiting, running = deque(planned), dict[str, tuple[Job, Future]]()
        slots, asked, alive = 0, -POLL_S, time.monotonic()
        self.client.subscribe_topic(_topic(self.setup), lambda event: self.events.put(event[1]))
        try:
            while waiting or running:
                if time.monotonic() - asked >= POLL_S:  # workers come and go
                    slots, asked = slots_of(self.client, self.needs), time.monotonic()
                    alive = asked if slots else alive
                if time.monotonic() - alive > WAIT_S:
                    raise TadError(
                        f"all workers are lost, and none joined in {WAIT_S:.0f} s; what is complete is kept, run the "
                        "same again when there are some"
                    )
                while waiting and len(running) < slots:
                    job = waiting.popleft()
                    future = self._give_out(task, job)
                    running[future.key] = (job, future)
                for event in self._happened():
                    if isinstance(event, tuple):
                        news(*event)
                    elif event in running:
                        job, future = running.pop(event)
                        yield job, _outcome(job, future)
        finally:
            if running:
                self.client.cancel([future for _, future in running.values()])
            self.client.unsubscribe_topic(_topic(self.setup))

    def _give_out(self, task: Callable[[Setup, Job], Any], job: Job) -> Future:
        key = f"tad-{uuid.uuid4().hex}"
        future = self.client.submit(task, self.setup, job, key=key, resources=self.needs or None, pure=False)
        future.add_done_callback(lambda done: self.events.put(done.key))
        return future

    def _happened(self) -> list[Any]:
        """The events since the last call; waits a moment where there is none."""
        events: list[Any] = []
        try:
            events.append(self.events.get(timeout=POLL_S))
            while True:
                events.append(self.events.get_nowait())
        except queue.Empty:
            return events


def _outcome(job: Job, future: Future) -> Any:
    """What a finished task returned, or the failure of its video; raises what is the fault of the set-up."""
    if future.status == "finished":
        return future.result()
    if future.status != "error":
        raise TadError("the scheduler was lost, or has dropped the tasks; what is complete is kept, run the same again")
    error = future.exception()
    if isinstance(error, KilledWorker):
        message = (
            f"{job.path}: {error.allowed_failures + 1} workers died while they worked on this video (a crash of the "
            "decoder, or no memory left); try it alone, or leave it out"
        )
        return Failure(job.video, job.path, list(job.streams), "KilledWorker", message)
    if isinstance(error, ImportError):
        raise TadError(f"a worker cannot import what it needs: {error}; install tad and its dependencies there")
    assert error is not None
    raise error
