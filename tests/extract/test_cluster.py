"""Extraction on workers: real processes, killed for real; the commands of docs/cluster.md."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tad._version import __version__
from tad.cli import main
from tad.errors import RecipeError, StoreError, TadError, WeightsError
from tad.extract import build_backbone, extract, jobs
from tad.extract.jobs import Job, longest_first, spread
from tad.extract.outcome import ExtractReport, Failure
from tad.extract.report import dry_run, dry_run_lines, report_lines
from tad.extract.video import source_of
from tad.recipe import ExtractRecipe
from tad.store import open_store
from tad.synth import make_video

DOCS = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")
SAME = {"backbone": "tiny", "weights": "random:3", "window": 16}
RECIPES = [ExtractRecipe(**SAME, stride=8, levels=True), ExtractRecipe(**SAME, stride=4)]  # type: ignore[arg-type]
NAMES = ["tiny", "tiny-4"]
LENGTHS = {"a": 1.0, "long 1": 24.0, "b/ü": 2.3, "long 2": 25.0, "c": 0.3}
# a client that closes while its scheduler, another process, still talks
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def block(mark: str) -> str:
    """The fenced block of docs/cluster.md after ``<!-- mark -->``."""
    (found,) = re.findall(rf"<!-- {mark} -->\n```bash\n(.*?)\n```", DOCS, flags=re.S)
    return str(found)


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **more}


def small(command: str) -> str:
    """A command of the page with the small network in I3D's place."""
    assert "--backbone i3d-rgb --weights rgb_imagenet.pt" in command
    return command.replace("--backbone i3d-rgb --weights rgb_imagenet.pt", "--backbone tiny --weights random:3")


def tad(line: str) -> str:
    """Run ``tad ...`` in this process, which has imported what it takes, and return what it prints."""
    program, *arguments = shlex.split(line)
    assert program == "tad"
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, f"{line}\n{done.output}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``list.txt`` with ids of its own, over files of which one is no video."""
    root = tmp_path_factory.mktemp("cluster")
    (root / "videos").mkdir()
    lines = []
    for number, (video, seconds) in enumerate(LENGTHS.items()):
        make_video(root / f"videos/v{number}.mp4", duration_s=seconds, seed=number, size=(48, 64), fps=10.0)
        lines.append(f"{video}\tvideos/v{number}.mp4")
    (root / "broken.mp4").write_bytes(b"this is not a video at all")
    (root / "list.txt").write_text("\n".join([*lines, "broken\tbroken.mp4"]))
    return root


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[ExtractReport, Path]:
    """What one process makes of it."""
    place = folder / "plain.zarr"
    return extract(folder / "list.txt", store=place, recipes=RECIPES, names=NAMES, batch=4), place


@pytest.fixture(scope="module")
def scheduler(folder: Path) -> Iterator[str]:
    """The cluster of the page, on this machine: a scheduler, and a dask worker with two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scheduler = block("scheduler").replace("--port 8786", f"--host 127.0.0.1 --port {port} --no-dashboard")
    worker = block("worker").replace("tcp://head:8786", f"tcp://127.0.0.1:{port} --nworkers 2 --no-dashboard")
    allowed = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}  # so that a video need not kill many workers
    address, processes = f"tcp://127.0.0.1:{port}", []
    with (folder / "dask.log").open("w") as log:
        for command in (scheduler, worker):
            arguments = ["bash", "-euc", f"exec env {command}"]
            processes.append(
                subprocess.Popen(arguments, cwd=folder, env=environment(**allowed), start_new_session=True, stderr=log)
            )
            wait_until(lambda: listening(port), 60)  # a worker gives up after half a minute without a scheduler
    with client_of(address) as client:
        client.wait_for_workers(2, timeout=60)
    yield address
    for process in reversed(processes):
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def client_of(scheduler: str) -> Iterator[Any]:
    from distributed import Client

    with Client(scheduler, set_as_default=False) as client:
        yield client


def busy(client: Any) -> list[int]:
    """The processes that do something now."""
    at_work = [worker for worker, tasks in client.processing().items() if tasks]
    return list(client.run(os.getpid, workers=at_work).values()) if at_work else []


def wait_until(done: Callable[[], object], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until
        time.sleep(0.05)


def members(group: int) -> list[str]:
    """What still runs of a group of processes."""
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [args for pgid, state, args in rows if int(pgid) == group and not state.startswith("Z")]


class Watching:
    """A progress that calls ``then`` when a video is under way for the first time, and notes what it is told."""

    def __init__(self, then: Callable[[str], None] = lambda video: None) -> None:
        self.then, self.totals, self.done, self.seen = then, dict[str, float](), dict[str, float](), list[str]()

    @contextmanager
    def __call__(self, total: float, label: str, unit: str) -> Iterator[Any]:
        self.totals[label], self.done[label], self.label = total, 0.0, label
        yield self

    def advance(self, n: float = 1.0, note: str = "") -> None:
        assert n >= 0
        self.done[self.label] += n
        if self.label == "extract" and note not in self.seen:
            self.seen.append(note)
            self.then(note)


def assert_equal_stores(place: Path, reference: Path) -> None:
    with open_store(place) as store, open_store(reference) as expected:
        assert store.verify(deep=True).problems == []
        assert list(store) == list(expected)
        for stream, video in expected:
            assert store.levels(stream, video) == expected.levels(stream, video)
            for level in expected.levels(stream, video):
                ours, theirs = store[stream, video, level], expected[stream, video, level]
                np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-6)
                assert (ours.axis, ours.duration_s) == (theirs.axis, theirs.duration_s)
            assert store.attrs(stream, video)["source"] == expected.attrs(stream, video)["source"]
        columns = ["stream", "video", "level", "rows", "duration_s"]
        assert store.catalog(refresh=False)[columns].equals(expected.catalog()[columns])
        assert not [path for path in place.rglob("*.tmp") if path.name.startswith("catalog")]


@pytest.mark.slow  # the kill must come before the other video is through: not where processes wait for a core
@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_a_worker_killed_in_the_middle_changes_nothing(
    format: str, tmp_path: Path, folder: Path, plain: tuple[ExtractReport, Path], scheduler: str
) -> None:
    expected, reference = plain
    place = tmp_path / "store"
    killed: list[int] = []

    with client_of(scheduler) as client:

        def kill(video: str) -> None:
            if video.startswith("long") and not killed:  # both long ones are begun first, so any busy process has one
                with open_store(place) as store:
                    assert not list(store)
                    assert store.verify(deep=True).ok
                killed.append(busy(client)[0])
                os.kill(killed[0], signal.SIGKILL)

        watching = Watching(kill)
        report = extract(
            folder / "list.txt", store=place, recipes=RECIPES, names=NAMES, batch=4, format=format,
            scheduler=scheduler, progress=watching,
        )  # fmt: skip
        assert len(killed) == 1
        assert killed[0] not in client.run(os.getpid).values()
    assert set(watching.seen[:2]) == {"long 1", "long 2"}
    assert watching.totals["look"] == watching.done["look"] == 6
    assert watching.done["extract"] == pytest.approx(expected.video_s)  # the second attempt is not counted twice
    assert watching.totals["extract"] == pytest.approx(expected.video_s, rel=0.05)
    # the report is that of one process
    assert (
        (report.written, report.already, report.rows) == (expected.written, 0, expected.rows) == (10, 0, expected.rows)
    )
    assert report.videos == expected.videos == list(LENGTHS)
    assert report.video_s == pytest.approx(expected.video_s) == sum(report.workers.values())
    assert [failure.video for failure in report.failures] == ["broken"]
    assert report.failures[0].path == expected.failures[0].path
    (line,) = (place / "failures.jsonl").read_text().splitlines()
    assert json.loads(line)["video"] == "broken"
    assert_equal_stores(place, reference)
    if format == "hdf5":
        import h5py

        with h5py.File(place / "store.h5") as file:  # all are linked, though no worker did
            assert [len(file[name]) for name in NAMES] == [5, 5]
    # what is there is skipped, without asking any worker but for the broken one
    again = extract(folder / "list.txt", store=place, recipes=RECIPES, names=NAMES, scheduler=scheduler)
    assert (again.written, again.already, len(again.failures)) == (0, 10, 1)


@pytest.mark.slow  # a race with real workers, which a busy machine decides otherwise
def test_a_video_that_kills_workers_fails_alone(tmp_path: Path, folder: Path, scheduler: str) -> None:
    from distributed import WorkerPlugin

    class Poison(WorkerPlugin):  # a class in a function travels as code
        name = "poison"

        def setup(self, worker: Any) -> None:
            import os

            from tad.extract import frames

            inner = frames.FrameReader

            def reader(path: Any, **options: Any) -> Any:
                if "poison" in str(path):
                    os._exit(11)
                return inner(path, **options)

            frames.FrameReader = reader  # type: ignore[assignment, misc]

    for name in ("poison.mp4", "good.mp4"):
        (tmp_path / name).write_bytes((folder / "videos/v0.mp4").read_bytes())
    with client_of(scheduler) as client:
        client.register_plugin(Poison())
        try:
            report = extract(tmp_path, store=tmp_path / "s", recipes=RECIPES[0], scheduler=scheduler)
        finally:
            client.unregister_worker_plugin("poison")
    assert report.videos == ["good"]
    (failure,) = report.failures
    assert (failure.video, failure.path, failure.error) == ("poison", str(tmp_path / "poison.mp4"), "KilledWorker")
    assert "2 workers died" in failure.message
    with open_store(tmp_path / "s") as store:
        assert list(store) == [("tiny", "good")]
        assert store.verify(deep=True).ok


@pytest.mark.slow  # a race with real workers, which a busy machine decides otherwise
def test_an_interrupted_run_frees_its_workers_and_goes_on(tmp_path: Path, folder: Path, scheduler: str) -> None:
    def interrupt(video: str) -> None:
        raise KeyboardInterrupt

    slow = ExtractRecipe(**SAME, stride=1)  # type: ignore[arg-type]
    same: dict[str, Any] = {"store": tmp_path / "s", "recipes": slow, "scheduler": scheduler}
    with client_of(scheduler) as client:
        with pytest.raises(KeyboardInterrupt):
            extract(folder / "list.txt", **same, progress=Watching(interrupt))
        wait_until(lambda: not any(client.run(lambda dask_worker: len(dask_worker.active_threads)).values()))
    with open_store(tmp_path / "s") as store:
        before = list(store)
        assert not [video for _, video in before if video.startswith("long")]  # they were given up, not finished
        assert store.verify(deep=True).ok
    report = extract(folder / "list.txt", **same)
    assert (report.already, report.written) == (len(before), 5 - len(before))
    with open_store(tmp_path / "s") as store:
        assert store.videos("tiny") == sorted(LENGTHS)
        assert store.verify(deep=True).ok


def test_what_is_the_fault_of_no_video_ends_the_run(
    tmp_path: Path, folder: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = folder / "videos/v0.mp4"
    with pytest.raises(StoreError, match=r"worker tcp.*memory://.*is no feature store"):  # only this process has it
        extract(video, store=f"memory://{tmp_path.name}/s.zarr", recipes=RECIPES[0], scheduler=scheduler)
    with monkeypatch.context() as patched:
        patched.setattr("tad.extract.cluster.__version__", "9.9.9")
        with pytest.raises(TadError, match=rf"2 workers have another version.*9\.9\.9.*has {re.escape(__version__)}"):
            extract(video, store=tmp_path / "s", recipes=RECIPES[0], scheduler=scheduler)
    with monkeypatch.context() as patched:  # a worker that joins late
        patched.setattr("tad.extract.jobs.__version__", "9.9.9")
        with pytest.raises(TadError, match=r"planned by tad 9\.9\.9"):
            extract(video, store=tmp_path / "s", recipes=RECIPES[0], scheduler=scheduler)
    with open_store(tmp_path / "s") as store:
        assert list(store) == []
    weights = tmp_path / "w.pt"
    torch.save(build_backbone("tiny", weights="random").state_dict(), weights)

    class Losing(Watching):
        def __call__(self, total: float, label: str, unit: str) -> Any:
            weights.unlink(missing_ok=True)  # planned with it, gone where the work is done
            return super().__call__(total, label, unit)

    with pytest.raises(WeightsError, match=r"worker tcp.*w\.pt"):
        extract(
            video, store=tmp_path / "w", recipes=ExtractRecipe(backbone="tiny", weights=str(weights)),
            scheduler=scheduler, progress=Losing(),
        )  # fmt: skip


def test_the_commands_of_the_page(
    folder: Path, tmp_path: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("videos").mkdir()
    for number in range(3):
        os.link(folder / f"videos/v{2 * number}.mp4", f"videos/v{number}.mp4")
    planned, done = map(tad, small(block("cluster")).replace("tcp://head:8786", scheduler).splitlines())
    assert "would write 3 arrays" in planned
    assert "2 workers: 2.3 s of video for the one with most" in planned
    assert "3 entries written" in done
    # several jobs on one store, at once
    subprocess.run(["bash", "-euc", block("split")], check=True)
    script = small(block("slurm")).replace("features.zarr", "jobs.zarr")
    running = [
        subprocess.Popen(["bash", "-euc", script], env=environment(SLURM_ARRAY_TASK_ID=str(task))) for task in range(2)
    ]
    assert [process.wait(120) for process in running] == [0, 0]
    assert_equal_stores(tmp_path / "jobs.zarr", tmp_path / "features.zarr")
    assert not list(tmp_path.glob("*.failures.jsonl"))


@pytest.mark.slow  # the interrupt must come before the last video is through, likewise
def test_local_workers_and_ctrl_c(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's commands, interrupted as a terminal does it: all processes of the group are told."""
    monkeypatch.chdir(tmp_path)
    Path("videos").mkdir()
    for number, source in enumerate(("v1", "v3", "v0")):
        os.link(folder / f"videos/{source}.mp4", tmp_path / f"videos/v{number}.mp4")
    os.link(folder / "videos/v1.mp4", tmp_path / "videos/v3.mp4")
    dry, line = block("local").splitlines()
    assert "2 workers: " in tad(small(dry))
    line = small(line) + " --stride 1"
    process = subprocess.Popen(
        ["bash", "-euc", f"exec {line}"], env=environment(), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: list(Path("features.zarr").glob("tiny/v?/zarr.json")) or process.poll() is not None, 100)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "run the same again" in said.lower()
    assert "Traceback" not in said
    wait_until(lambda: not members(process.pid))
    with open_store(tmp_path / "features.zarr") as store:
        done = store.videos("tiny")
        assert store.verify(deep=True).ok
    assert 1 <= len(done) < 4
    out = json.loads(tad(f"{line} --json"))
    assert (out["already"], out["written"]) == (len(done), 4 - len(done))
    assert 1 <= len(out["workers"]) <= 2
    with open_store(tmp_path / "features.zarr") as store:
        assert store.videos("tiny") == ["v0", "v1", "v2", "v3"]
        assert store.verify(deep=True).ok


def run_plain(folder: str, store: str, format: str, start: Any) -> None:
    torch.set_num_threads(1)
    start.wait()
    extract(f"{folder}/list.txt", store=store, recipes=RECIPES, names=NAMES, format=format, batch=4)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_two_plain_processes_on_one_folder_end_with_a_whole_store(
    format: str, tmp_path: Path, folder: Path, plain: tuple[ExtractReport, Path]
) -> None:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tad.extract"])
    start = context.Barrier(2)
    arguments = (str(folder), str(tmp_path / "s"), format, start)
    processes = [context.Process(target=run_plain, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert_equal_stores(tmp_path / "s", plain[1])
    if format == "hdf5":
        import h5py

        with h5py.File(tmp_path / "s/store.h5") as file:
            assert [len(file[name]) for name in NAMES] == [5, 5]


# ---- without any process -------------------------------------------------------------------------
def job_of(path: Path, **source: Any) -> Job:
    return Job("v", str(path), {**source_of(path), **source}, ("tiny",))


def test_a_worker_says_which_file_it_does_not_see(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes((folder / "videos/v0.mp4").read_bytes())
    with open_store(tmp_path / "s", "a") as store:
        streams = _streams(store)
        setup = _setup(streams, store)
        job = job_of(path)
        assert jobs.look(setup, job, worker="w") == pytest.approx(1.0)
        for other, words in (
            (job_of(path, size=1), r"worker w sees another file.*size differ"),
            (job_of(path, mtime_ns=1), r"worker w sees another file.*mtime_ns differ"),
        ):
            found = jobs.look(setup, other, worker="w")
            assert isinstance(found, Failure)
            assert re.search(words, found.message)
        path.unlink()
        found = jobs.look(setup, job, worker="w")
        assert isinstance(found, Failure)
        assert (found.error, found.streams) == ("VideoError", ["tiny"])
        assert "worker w does not see this file" in found.message
        report = jobs.do(setup, job, worker="w", device="cpu", bar=Bar())
        assert [failure.message for failure in report.failures] == [found.message]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("decoder"), OSError("disk")])
def test_a_video_that_a_worker_cannot_look_at_fails_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(path: object) -> None:
        raise error

    monkeypatch.setattr(jobs, "probe", fails)
    with open_store(tmp_path / "s", "a") as store:
        setup = _setup(_streams(store), store)
    found = jobs.look(setup, job_of(folder / "videos/v0.mp4"), worker="w")
    assert isinstance(found, Failure)
    assert found.error == type(error).__name__


def test_a_worker_respects_an_id_that_is_taken(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes((folder / "videos/v0.mp4").read_bytes())
    (tmp_path / "other.mp4").write_bytes((folder / "videos/v2.mp4").read_bytes())
    with open_store(tmp_path / "s", "a") as store:
        setup = _setup(_streams(store), store)
        assert jobs.do(setup, job_of(tmp_path / "v.mp4"), worker="w", device="cpu", bar=Bar()).written == 1
        other = job_of(tmp_path / "other.mp4")
        report = jobs.do(setup, other, worker="w", device="cpu", bar=Bar())
        assert (report.written, ["taken by v.mp4" in failure.message for failure in report.failures]) == (0, [True])
        forced = type(setup)(**{**setup.__dict__, "overwrite": True})
        assert jobs.do(forced, other, worker="w", device="cpu", bar=Bar()).written == 1
        assert store.attrs("tiny", "v")["source"]["name"] == "other.mp4"


def test_a_network_is_loaded_once_and_lent_to_one_job_at_a_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    resolve = jobs.resolve
    monkeypatch.setattr(jobs, "resolve", lambda *a, **k: (loads.append(k["name"]), resolve(*a, **k))[1])
    monkeypatch.setattr(jobs, "_idle", {})
    bar = Bar()
    with open_store(tmp_path / "s", "a") as store:
        setup = _setup(_streams(store), store)
        for number in (0, 2):
            job = job_of(folder / f"videos/v{number}.mp4")
            report = jobs.do(
                setup, Job(f"v{number}", *list(job.__dict__.values())[1:]), worker="w", device="cpu", bar=bar
            )
            assert report.failures == []
            assert report.workers == {"w": report.video_s}
        assert loads == ["tiny"]
        assert store.videos("tiny") == ["v0", "v2"]
        # a second attempt at what a lost worker had finished
        assert (
            jobs.do(setup, Job("v2", *list(job.__dict__.values())[1:]), worker="w", device="cpu", bar=bar).already == 1
        )
        with jobs.networks(setup, ["tiny"], "cpu") as one, jobs.networks(setup, ["tiny"], "cpu") as two:
            assert one[0].backbone is not two[0].backbone
        assert loads == ["tiny", "tiny"]
    assert bar.done_s == pytest.approx(LENGTHS["a"] + LENGTHS["b/ü"], abs=0.1)


class Bar:
    done_s = 0.0

    def advance(self, n: float = 1.0, note: str = "") -> None:
        self.done_s += n


def _streams(store: Any) -> list[Any]:
    from tad.extract.pipeline import resolve_all

    streams = resolve_all(RECIPES[0], names=None, device="cpu")
    for stream in streams:
        store.create_stream(stream.name, stream.spec, info=stream.info)
    return streams


def _setup(streams: list[Any], store: Any) -> Any:
    return jobs.setup_of(
        streams, store, place=str(store.path), run="r", device=None, batch=4, overwrite=False, threads=None
    )


@given(st.lists(st.floats(0, 1e5), max_size=60), st.integers(1, 9))
def test_spread_gives_every_video_to_one_and_is_close_to_even(seconds: list[float], slots: int) -> None:
    parts = spread(seconds, slots)
    assert len(parts) == slots
    assert sorted(index for part in parts for index in part) == list(range(len(seconds)))
    loads = [sum(seconds[index] for index in part) for part in parts]
    best = max(sum(seconds) / slots, max(seconds, default=0.0))  # no division of the work is shorter
    assert max(loads) <= best * (2 - 1 / slots) * (1 + 1e-9)
    for part in parts:
        assert [seconds[index] for index in part] == sorted((seconds[index] for index in part), reverse=True)


def test_longest_first_keeps_the_order_of_equals() -> None:
    assert longest_first([1.0, 3.0, 0.0, 3.0]) == [1, 3, 0, 2]


def test_local_workers_take_turns_at_the_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tad.extract.cluster import gpu_needed, slots_of

    with open_store(tmp_path / "s", "a") as store:
        setup = _setup(_streams(store), store)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [jobs.device_of(setup, place) for place in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert jobs.device_of(setup, None) == "cuda"  # of a cluster: CUDA_VISIBLE_DEVICES says which
    chosen = type(setup)(**{**setup.__dict__, "device": "cuda:1"})
    assert jobs.device_of(chosen, 0) == "cuda:1"

    class Cluster:
        def __init__(self, *gpus: float) -> None:
            self.workers = {str(i): {"nthreads": 4, "resources": {"GPU": n} if n else {}} for i, n in enumerate(gpus)}

        def scheduler_info(self, n_workers: int) -> dict[str, Any]:
            return {"workers": self.workers}

    mixed, bare = Cluster(1, 0, 2), Cluster(0, 0)
    assert gpu_needed(mixed, None) == gpu_needed(mixed, "cuda") == {"GPU": 1.0}  # type: ignore[arg-type]
    assert gpu_needed(mixed, "cpu") == gpu_needed(bare, None) == gpu_needed(bare, "cpu") == {}  # type: ignore[arg-type]
    assert (slots_of(mixed, {"GPU": 1.0}), slots_of(mixed, {})) == (3, 12)  # type: ignore[arg-type]
    with pytest.raises(TadError, match="no worker announces a GPU"):
        gpu_needed(bare, "cuda")  # type: ignore[arg-type]


def test_choices_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    import dask

    same: dict[str, Any] = {"store": tmp_path / "s", "recipes": RECIPES[0]}
    with pytest.raises(RecipeError, match="choose one"):
        extract(folder / "videos", **same, workers=2, scheduler="tcp://here:1")
    for workers in (0, -1):
        with pytest.raises(RecipeError, match="at least one"):
            extract(folder / "videos", **same, workers=workers)
        with pytest.raises(RecipeError, match="at least one"):
            dry_run([folder / "videos"], store=str(tmp_path / "s"), recipes=RECIPES[:1], workers=workers)
    assert not (tmp_path / "s").exists()
    with dask.config.set({"distributed.comm.timeouts.connect": "0.3s"}):
        for address in ("tcp://127.0.0.1:9", "nonsense://x"):
            with pytest.raises(TadError, match=f"no dask scheduler answers at {address}"):
                extract(folder / "videos", **same, scheduler=address)


def test_dry_run_says_how_the_work_would_be_spread(folder: Path, tmp_path: Path) -> None:
    plan = dry_run([folder / "videos"], store=str(tmp_path / "s"), recipes=RECIPES[:1], workers=3)
    parts = plan["spread"]
    assert [part["videos"] for part in parts] == [["v3"], ["v1"], ["v2", "v0", "v4"]]
    assert (
        sum(part["video_s"] for part in parts) == pytest.approx(plan["video_s"]) == pytest.approx(sum(LENGTHS.values()))
    )
    lines = dry_run_lines(plan)
    assert lines[-4:] == [
        "3 workers: 25.0 s of video for the one with most, 2.1 times as fast as one at best",
        "worker 0: 1 videos, 25.0 s",
        "worker 1: 1 videos, 24.0 s",
        "worker 2: 3 videos, 3.6 s",
    ]
    many = dry_run_lines(dry_run([folder / "videos"], store=str(tmp_path / "s"), recipes=RECIPES[:1], workers=8))
    assert "; 3 would have nothing to do" in "\n".join(many)
    assert many[-1] == "… and 3 more workers"
    assert "spread" not in dry_run([folder / "videos"], store=str(tmp_path / "s"), recipes=RECIPES[:1])
    assert not (tmp_path / "s").exists()


def test_the_report_tells_the_workers_shares() -> None:
    report = ExtractReport(wall_s=2.0)
    for worker, seconds in (("0", 4.0), ("1", 3.0), ("0", 2.0)):
        report.add(
            ExtractReport(videos=["v"], written=1, rows=5, video_s=seconds, workers={worker: seconds}, wall_s=9.0)
        )
    assert (report.written, report.rows, report.video_s, report.wall_s) == (3, 15, 9.0, 2.0)
    assert report.workers == {"0": 6.0, "1": 3.0}
    assert report_lines(report)[-1] == "2 workers did 3.0 to 6.0 s of video each"
    assert report.to_dict()["workers"] == report.workers


def test_dask_is_not_imported_unless_it_is_used() -> None:
    code = "import sys, tad.extract, tad.extract.report; print('distributed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.workers import main as benchmark

    small_ones = "--workers 1 --videos 2 --seconds 1 --size 48 64 --fps 10 --backbone tiny --device cpu"
    benchmark([*small_ones.split(), "--out", str(tmp_path / "workers.json")])
    rows = json.loads((tmp_path / "workers.json").read_text())["rows"]
    assert [row["workers"] for row in rows] == [0, 1]
    assert rows[0]["rows"] == rows[1]["rows"] > 0
    assert rows[1]["ratio"] == pytest.approx(rows[0]["wall_s"] / rows[1]["wall_s"])
    assert "ratio_started" in capsys.readouterr().out
