"""Real processes: killed, at once, forked, spawned."""

import multiprocessing as mp
import os
import pickle
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tad.errors import StoreError
from tad.store import Store, open_store
from tests.store.makers import SOURCE, SPEC, level, place_for, put, rows

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
COUNT = 40


def expected(number: int) -> np.ndarray:
    """What belongs into entry ``number``; now and then there are several chunks."""
    return rows(2 + number, 40, seed=number) if number % 7 != 3 else rows(300, 900, seed=number)


def write_all(place: str, overwrite: bool) -> None:
    with open_store(place, "a") as store:
        for number in range(COUNT):
            video = f"video {number}/x"
            if overwrite or not store.is_done("s", video, SOURCE):
                put(store, video, expected(number), overwrite=overwrite)


def killed_while_writing(place: str, overwrite: bool, after_s: float) -> None:
    child = os.fork()
    if child == 0:
        try:
            write_all(place, overwrite)
        finally:
            os._exit(0)  # whatever happens, this process is no second pytest
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def sound(place: str) -> int:
    """How many entries there are; each of them must be whole, and what was meant."""
    with open_store(place) as store:
        report = store.verify(deep=True)
        assert report.problems == []
        for video in store.videos("s"):
            number = int(video.removeprefix("video ").removesuffix("/x"))
            np.testing.assert_array_equal(store["s", video].numpy(), expected(number))
        return report.checked


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_killed_writer_leaves_only_whole_entries(place: str, overwrite: bool) -> None:
    with open_store(place, "a") as store:
        store.create_stream("s", SPEC)
    moments = random.Random(7)
    unfinished = 0
    for _ in range(12):  # with both ways of writing: 24 rounds for each format
        killed_while_writing(place, overwrite, moments.uniform(0.0, 0.08))
        unfinished += sound(place) < COUNT
    assert unfinished >= 1  # else nothing was interrupted
    write_all(place, overwrite=False)
    assert sound(place) == COUNT
    with open_store(place, "a") as store:
        store.gc(min_age_s=0)
        left = [path for path in Path(place).rglob("*") if path.name.endswith((".tmp", ".partial"))]
        assert left == []
    assert sound(place) == COUNT


def killed_at_step(place: str, step: int, array: np.ndarray, overwrite: bool) -> bool:
    """Kill a writer right before its ``step``-th change of the file system; False when it is done before that."""
    child = os.fork()
    if child == 0:
        try:
            with open_store(place, "a") as store:
                store.stream_attrs("s")
                left = step

                def hook(event: str, arguments: tuple[object, ...]) -> None:
                    nonlocal left
                    if event in CHANGES and str(arguments[0]).startswith(place):
                        left -= 1
                        if left == 0:
                            os.kill(os.getpid(), signal.SIGKILL)

                sys.addaudithook(hook)
                store.write("s", "v", {"features": level(array)}, duration_s=1.0, source=SOURCE, overwrite=overwrite)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_writer_may_be_killed_before_any_of_its_steps(place: str, overwrite: bool) -> None:
    old, new = rows(5, 6, seed=1), rows(300, 900, seed=2)
    seen = []
    for step in range(1, 100):
        with open_store(place, "a") as store:
            store.create_stream("s", SPEC)
            if store.has("s", "v"):
                store.delete("s", "v")
            if overwrite:
                put(store, "v", old)
        killed = killed_at_step(place, step, new, overwrite)
        with open_store(place, "a") as store:
            assert store.verify(deep=True).problems == []
            found = store["s", "v"].numpy() if store.has("s", "v") else None
            seen.append("none" if found is None else "new" if np.array_equal(found, new) else "old")
            if seen[-1] == "old":
                np.testing.assert_array_equal(found, old)
            put(store, "v", new, overwrite=True)
            np.testing.assert_array_equal(store["s", "v"].numpy(), new)
            store.gc(min_age_s=0)
        if not killed:
            break
    assert not killed
    assert len(seen) > 4
    assert seen[0] == ("old" if overwrite else "none")
    assert seen[-1] == "new"
    order = ["old", "none", "new"] if overwrite else ["none", "new"]
    assert seen == sorted(seen, key=order.index)  # it never goes back


def _write_one(place: str, seed: int, start: object, failures: object) -> None:
    try:
        with open_store(place, "a") as store:
            array = rows(100 + 50 * seed, 700, seed=seed)
            start.wait()  # type: ignore[attr-defined]
            for _ in range(8):
                put(store, "same", array, overwrite=True, attrs={"seed": seed})
    except BaseException as error:
        failures.put(f"{type(error).__name__}: {error}")  # type: ignore[attr-defined]
        raise


def test_writers_of_the_same_entry_leave_one_of_their_entries_whole(place: str) -> None:
    context = mp.get_context("fork")
    with open_store(place, "a") as store:
        store.create_stream("s", SPEC)
    start, failures = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_write_one, args=(place, seed, start, failures)) for seed in (1, 2, 3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0], failures.get() if not failures.empty() else ""
    with open_store(place, "a") as store:
        assert store.verify(deep=True).problems == []
        seed = store.attrs("s", "same")["seed"]
        np.testing.assert_array_equal(store["s", "same"].numpy(), rows(100 + 50 * seed, 700, seed=seed))
        assert store.gc(min_age_s=0) == []


def _write_some(place: str, first: int, start: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    with open_store(place, "a") as store:
        for number in range(first, 24, 3):
            put(store, f"v{number}", rows(10 + number, seed=number))


def test_processes_write_different_entries_without_locks(place: str) -> None:
    context = mp.get_context("fork")
    start = context.Barrier(3)  # they even make the store and the stream at once
    processes = [context.Process(target=_write_some, args=(place, first, start)) for first in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    with open_store(place) as store:
        assert len(store.videos("s")) == 24
        assert store.verify(deep=True).ok
    if store.format == "hdf5":
        import h5py

        with h5py.File(Path(place, "store.h5")) as file:
            assert len(file["s"]) == 24  # whoever closed last, all are linked


def test_two_recipes_race_for_one_stream(place: str) -> None:
    """Exactly one wins, and every loser is told."""
    with open_store(place, "a"):
        pass
    results: list[str] = []

    def create(stride: int) -> None:
        with open_store(place, "a") as store:
            try:
                store.create_stream("s", SPEC | {"stride": stride})
                results.append("made")
            except Exception as error:  # noqa: BLE001 - whatever it is, it is compared below
                results.append(type(error).__name__)

    threads = [threading.Thread(target=create, args=(stride,)) for stride in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["StoreError"] * 5 + ["made"]


# ---- handles ---------------------------------------------------------------------------------------------------------
def _sum_in_child(feature: object, queue: object) -> None:
    queue.put((os.getpid(), float(feature[5:50].sum())))  # type: ignore[attr-defined,index]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_open_features_work_in_child_processes(place: str, method: str) -> None:
    array = rows(60, 7)
    with open_store(place, "a") as store:
        put(store, "v", array)
    with open_store(place) as store:
        feature = store["s", "v"]
        feature[:3]  # the handle is open before the fork
        context = mp.get_context(method)
        queue = context.Queue()
        children = [context.Process(target=_sum_in_child, args=(feature, queue)) for _ in range(2)]
        for child in children:
            child.start()
        found = [queue.get(timeout=60) for _ in children]
        for child in children:
            child.join(60)
            assert child.exitcode == 0
        assert {total for _, total in found} == {float(array[5:50].sum())}
        assert os.getpid() not in {pid for pid, _ in found}
        np.testing.assert_array_equal(feature.numpy(), array)  # the parent's handle still works


def test_no_handle_crosses_a_fork(place: str) -> None:
    with open_store(place, "a") as store:
        put(store, "v", rows(4))
        store["s", "v"].numpy()
        before = store._backend
        pid = os.fork()
        if pid == 0:
            os._exit(0 if store._backend is not before and not store._entries else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert store._backend is before


@pytest.mark.parametrize("kind", ["zarr", "hdf5", "memory"])
def test_pickles(kind: str, tmp_path: Path) -> None:
    place = place_for(kind, tmp_path)
    with open_store(place, "a") as store:
        put(store, "v", rows(4))
        feature = store["s", "v"]
        feature[:1]
        again, same = pickle.loads(pickle.dumps((feature, store)))
        np.testing.assert_array_equal(again.numpy(), rows(4))
        assert (again.axis, again.shape, again.attrs) == (feature.axis, feature.shape, feature.attrs)
        put(same, "w", rows(5))  # writes as the first one did
        assert store.videos("s") == ["v", "w"]
        same.close()


def test_threads_share_a_store(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {f"v{i}": rows(50 + i, 6, seed=i) for i in range(12)}
    with open_store(place, "a") as store:
        for video, array in arrays.items():
            put(store, video, array)
    with open_store(place) as store:
        monkeypatch.setattr(type(store._made), "cached_entries", 3)  # handles come and go
        wrong: list[str] = []

        def read(seed: int) -> None:
            chosen = random.Random(seed)
            for _ in range(60):
                video = chosen.choice(sorted(arrays))
                if not np.array_equal(store["s", video][5:45], arrays[video][5:45]):
                    wrong.append(video)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_readers_never_see_a_part_while_an_entry_is_replaced(place: str) -> None:
    """Versions of the same and of another shape: a read gives one of them whole, or says that it is not there now."""
    versions = [rows(400, 900, seed=1), rows(400, 900, seed=2), rows(30, 900, seed=3)]
    with open_store(place, "a") as store:
        put(store, "v", versions[0])
    done = threading.Event()

    def replace() -> None:
        with open_store(place, "a") as mine:
            for number in range(40):
                put(mine, "v", versions[number % 3], overwrite=True)
        done.set()

    thread = threading.Thread(target=replace)
    thread.start()
    seen = 0
    with open_store(place) as store:
        while not done.is_set():
            seen += _read_some_version(store, versions)
    thread.join()
    assert seen > 0


def test_a_read_that_is_overtaken_says_so(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same shape, replaced between two parts of one read: the rows could be of both."""
    with open_store(place, "a") as store, open_store(place, "a") as other:
        put(store, "v", rows(50, seed=1))
        feature = store["s", "v"]
        opened = store._rows(feature)
        read = opened.read
        monkeypatch.setattr(
            opened, "read", lambda *ends: (put(other, "v", rows(50, seed=2), overwrite=True), read(*ends))[1]
        )
        with pytest.raises(StoreError, match="s/v was replaced since it was looked up"):
            feature.numpy()
        np.testing.assert_array_equal(store["s", "v"].numpy(), rows(50, seed=2))


@pytest.mark.parametrize("kind", ["hdf5"], indirect=True)
def test_an_entry_that_comes_while_store_h5_is_written_is_linked(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import h5py

    with open_store(place, "a") as store, open_store(place, "a") as other:
        put(store, "v", rows(3))
        backend = store._backend
        write_master = backend._write_master  # type: ignore[attr-defined]

        def overtaken(found: object) -> None:
            if not other.has("s", "w"):
                put(other, "w", rows(4))
            write_master(found)

        monkeypatch.setattr(backend, "_write_master", overtaken)
        store.link()
        with h5py.File(Path(place, "store.h5")) as file:
            assert sorted(file["s"]) == ["v", "w"]


def _read_some_version(store: Store, versions: list[np.ndarray]) -> int:
    try:
        array = store["s", "v"].numpy()
    except StoreError:
        return 0
    assert any(np.array_equal(array, version) for version in versions)
    return 1
