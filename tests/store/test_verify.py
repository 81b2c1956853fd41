"""Damage is found, by verify and by reading; what killed writers leave is removed, and nothing else."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest

from tad.errors import StoreError
from tad.store import Level, Store, open_store
from tad.store.hdf5_backend import seal
from tad.timeline import TimeAxis
from tests.store.makers import AXIS, SOURCE, SPEC, put, rows

ARRAY = rows(600, 512)  # 1.2 MB: two chunks


@pytest.fixture
def filled(place: str) -> str:
    with open_store(place, "a") as store:
        for video in ("a", "b", "c"):
            put(store, video, ARRAY)
    return place


def problems(place: str, *, deep: bool) -> list[tuple[str, str | None, str | None]]:
    with open_store(place) as store:
        report = store.verify(deep=deep)
        assert report.ok == (not report.problems)
        assert report.to_dict()["problems"] == [problem._asdict() for problem in report.problems]
        json.dumps(report.to_dict())
        assert all(problem.what for problem in report.problems)
        return [(problem.stream, problem.video, problem.level) for problem in report.problems]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x01
    path.write_bytes(data)


def test_a_sound_store_has_no_problems(any_place: str) -> None:
    with open_store(any_place, "a") as store:
        for video in ("a", "b/c", "ü"):
            put(store, video, ARRAY[:9])
        store.write_catalog()
        for deep in (False, True):
            report = store.verify(deep=deep)
            assert report.ok
            assert report.checked == 3
            assert report.to_dict() == {"ok": True, "checked": 3, "problems": []}


@pytest.mark.parametrize("where", [0.02, 0.3, 0.5, 0.77, 0.999])
def test_a_flipped_bit_in_the_rows(filled: str, disk_file: Callable[..., Path], kind: str, where: float) -> None:
    path = disk_file("b", "rows")
    if kind == "hdf5":  # the rows lie somewhere in the file
        start = path.read_bytes().index(ARRAY.tobytes()[:64])
        flip(path, start + int(where * 300 * 512 * 4))
    else:
        flip(path, int(where * path.stat().st_size))
    assert problems(filled, deep=False) == []
    assert problems(filled, deep=True) == [("s", "b", None if kind == "hdf5" else "features")]
    with open_store(filled) as store:
        with pytest.raises(StoreError, match=r"s/b/features, rows 0 to 600, cannot be read: .*Verify the store"):
            store["s", "b"].numpy()
        np.testing.assert_array_equal(store["s", "a"].numpy(), ARRAY)


@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.99])
def test_a_truncated_file(filled: str, disk_file: Callable[..., Path], keep: float) -> None:
    path = disk_file("b", "rows")
    os.truncate(path, int(keep * path.stat().st_size) if keep < 1 else path.stat().st_size - 1)
    assert ("s", "b") in {found[:2] for found in problems(filled, deep=True)}
    with open_store(filled) as store, pytest.raises(StoreError, match="s/b"):
        store["s", "b"].numpy()


def test_a_missing_object(filled: str, disk_file: Callable[..., Path], kind: str) -> None:
    with open_store(filled) as store:
        feature = store["s", "b"]
        feature[:2]  # the array is open
        disk_file("b", "rows").unlink()
        with pytest.raises(StoreError, match=r"c\.0\.0 is missing|no video 'b'"):
            feature[2:4]
    # without its file, an HDF5 entry is not there at all; a Zarr entry is, and damaged
    assert problems(filled, deep=False) == ([] if kind == "hdf5" else [("s", "b", "features")])
    with open_store(filled) as store, pytest.raises(StoreError, match=r"c\.0\.0 is missing|no video 'b'"):
        store["s", "b"].numpy()


def test_a_missing_object_behind_a_url() -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    for dtype in ("float32", "uint8"):
        with open_store(f"memory://lost-{dtype}/x.zarr", "a") as store:
            put(store, "v", (np.abs(ARRAY) * 30).astype(dtype))
            fs.rm_file(f"/lost-{dtype}/x.zarr/s/v/features/c.0.0")
            with pytest.raises(StoreError, match=r"c\.0\.0 is missing"):
                store["s", "v"].numpy()
            assert [problem.level for problem in store.verify().problems] == ["features"]


def test_a_chunk_that_is_not_in_its_shard(tmp_path: Path) -> None:
    import zarr

    with open_store(tmp_path / "x.zarr", "a") as store:
        put(store, "v", ARRAY)
    group = zarr.open_group(str(tmp_path / "x.zarr" / "s" / "v"), mode="r+")
    group["features"][300:] = np.nan  # Zarr leaves out chunks of nothing but fill values
    with open_store(tmp_path / "x.zarr") as store:
        np.testing.assert_array_equal(store["s", "v"][:300], ARRAY[:300])
        with pytest.raises(StoreError, match="lacks a chunk of the rows 250 to 350"):
            store["s", "v"][250:350]
        assert [problem.level for problem in store.verify(deep=True).problems] == ["features"]


@pytest.mark.parametrize(
    "text", [b"", b"garbage", b"{", b"[]", b"{}", b"null", b"\xff\xfe", b'{"attributes": 3}', b"[" * 9999]
)
@pytest.mark.parametrize("part", ["attrs", "array"])
def test_garbage_instead_of_metadata(
    filled: str, disk_file: Callable[..., Path], kind: str, text: bytes, part: str
) -> None:
    unlisted = part == "attrs" or kind == "hdf5"
    disk_file("b", part).write_bytes(text)
    assert {found[:2] for found in problems(filled, deep=False)} == {("s", "b")}
    with open_store(filled, "a") as store:
        with pytest.raises(StoreError, match="b"):
            store["s", "b"].numpy()
        assert store.is_done("s", "b", SOURCE) != unlisted
        with (
            pytest.warns(UserWarning, match=r"1 damaged entries are not listed \(s/b\)") if unlisted else nullcontext()
        ):
            assert set(store.catalog()["video"]) >= {"a", "c"}
        put(store, "b", ARRAY, overwrite=True)  # the way out
        assert store.verify(deep=True).ok


@pytest.mark.parametrize("kind", ["zarr"], indirect=True)
@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("zarr.json", ("attributes", "levels", 0, "scale_s"), 0.5),
        ("zarr.json", ("attributes", "levels", 0, "shape"), [601, 512]),
        ("zarr.json", ("attributes", "levels", 0, "shape"), [10**15, 512]),
        ("zarr.json", ("attributes", "levels", 0, "dtype"), "float16"),
        ("zarr.json", ("attributes", "levels", 0, "dtype"), "nonsense"),
        ("zarr.json", ("attributes", "levels", 0, "scale_s"), "fast"),
        ("zarr.json", ("attributes", "levels", 0, "path"), "other"),
        ("zarr.json", ("attributes", "levels"), []),
        ("zarr.json", ("attributes", "levels"), {}),
        ("zarr.json", ("attributes", "levels"), None),
        ("zarr.json", ("attributes", "duration_s"), 11.0),
        ("zarr.json", ("attributes", "duration_s"), "long"),
        ("zarr.json", ("attributes", "source", "size"), 1),
        ("zarr.json", ("attributes", "source"), None),
        ("zarr.json", ("attributes", "sha256", "features"), "0" * 64),
        ("zarr.json", ("attributes", "sha256"), {}),
        ("zarr.json", ("attributes", "video"), "a"),
        ("zarr.json", ("attributes", "stream_fingerprint"), "0"),
        ("zarr.json", ("attributes", "encoding-type"), "other"),
        ("zarr.json", ("node_type",), "array"),
        ("features/zarr.json", ("shape",), [599, 512]),
        ("features/zarr.json", ("data_type",), "float64"),
        ("features/zarr.json", ("dimension_names",), ["channel", "time"]),
        ("features/zarr.json", ("node_type",), "group"),
        ("features/zarr.json", ("codecs",), [{"name": "nonsense"}]),
        ("features/zarr.json", ("chunk_grid",), {}),
    ],
)
def test_metadata_that_says_something_else(filled: str, file: str, path: tuple, value: object) -> None:
    place = Path(filled, "s", "b", file)
    node = json.loads(place.read_text())
    inner = node
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    place.write_text(json.dumps(node))
    assert {found[:2] for found in problems(filled, deep=False)} == {("s", "b")}


@pytest.mark.parametrize("kind", ["zarr", "hdf5"], indirect=True)
def test_every_flipped_byte_is_found(kind: str, place: str) -> None:
    """Of the files of a small entry, byte by byte; reading gives the right rows or an error, never wrong rows."""
    array = rows(6, 4)
    with open_store(place, "a") as store:
        put(store, "v", array)
    if kind == "hdf5":
        paths = [(Path(place, "s", "v.h5"), 11)]
    else:
        paths = [(Path(place, "s", "v", name), 3) for name in ("features/c.0.0", "zarr.json", "features/zarr.json")]
    for path, step in paths:
        whole = path.read_bytes()
        for at in range(0, len(whole), step):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x02]) + whole[at + 1 :])
            with open_store(place) as store:
                try:
                    same_meaning = json.loads(path.read_bytes()) == json.loads(whole)  # as in 1e3 and 1E3
                except ValueError:
                    same_meaning = False
                assert store.verify(deep=True).ok == same_meaning, f"{path.name}, byte {at}"
                with suppress(StoreError):
                    np.testing.assert_array_equal(store["s", "v"].numpy(), array)
        path.write_bytes(whole)


def test_a_stray_array_and_a_missing_one(filled: str, kind: str) -> None:
    with open_store(filled, "a") as store:
        levels = {"s2": Level(rows(4), AXIS), "s4": Level(rows(2), AXIS.pooled(2))}
        store.create_stream("p", SPEC)
        store.write("p", "v", levels, duration_s=1.0, source=SOURCE)
    if kind == "hdf5":
        import h5py

        with h5py.File(Path(filled, "p", "v.h5"), "a") as file:
            file.move("s4", "s16")
        seal(str(Path(filled, "p", "v.h5")))
    else:
        Path(filled, "p", "v", "s4").rename(Path(filled, "p", "v", "s16"))
    assert problems(filled, deep=False) == [("p", "v", None), ("p", "v", "s4")]


def test_a_renamed_entry(filled: str, kind: str) -> None:
    suffix = ".h5" if kind == "hdf5" else ""
    Path(filled, "s", f"b{suffix}").rename(Path(filled, "s", f"other{suffix}"))
    with open_store(filled) as store:
        assert [(p.video, p.what) for p in store.verify().problems] == [("other", "holds the video 'b'")]


def test_damaged_and_lost_stream_metadata(filled: str, kind: str) -> None:
    stream = Path(filled, "s", "zarr.json" if kind == "zarr" else "__stream__.json")
    whole = stream.read_text()
    stream.write_text(whole.replace('"stride": 8', '"stride": 9'))
    assert problems(filled, deep=False) == [("s", None, None)]
    stream.write_text("{")
    assert problems(filled, deep=False) == [("s", None, None)]
    stream.unlink()
    assert problems(filled, deep=False) == [("s", None, None)]
    stream.write_text(whole)
    assert problems(filled, deep=False) == []


def test_a_damaged_root(filled: str, kind: str) -> None:
    Path(filled, "zarr.json" if kind == "zarr" else "__store__.json").write_text("{")
    with pytest.raises(StoreError, match="is not"):
        open_store(filled)


def test_what_the_catalogue_lists_must_be_there(filled: str, kind: str) -> None:
    with open_store(filled, "a") as store:
        store.write_catalog()
    (Path(filled, "s", "b.h5") if kind == "hdf5" else Path(filled, "s", "b", "zarr.json")).unlink()
    assert problems(filled, deep=False) == [("s", "b", None)]
    Path(filled, "catalog.csv").write_text("nonsense\n1\n")
    assert problems(filled, deep=False) == [("", None, None)]


# ---- gc --------------------------------------------------------------------------------------------------------------
def age(path: Path, seconds: float = 10_000) -> None:
    then = time.time() - seconds
    for item in [path, *path.rglob("*")] if path.is_dir() else [path]:
        os.utime(item, (then, then))


def litter(root: Path, kind: str) -> Iterator[tuple[Path, str]]:
    """Everything that a killed writer can leave, and the name by which it is reported."""
    hexa = "0123456789abcdef" * 2
    for name in (f"catalog.csv.{hexa}.tmp", f"s/new.{hexa}.tmp"):
        (root / name).write_text("x")
        yield root / name, name
    if kind == "hdf5":
        (root / f"s/x.h5.{hexa}.tmp").write_bytes(b"half")
        yield root / f"s/x.h5.{hexa}.tmp", f"s/x.h5.{hexa}.tmp"
        return
    for name in (f"s/zarr.{hexa}.partial", f"s/a/features/c.0.{hexa}.partial"):
        (root / name).write_text("x")
        yield root / name, name
    for name in ("s/uncommitted/features", "s/ü/s2", f"s/__{hexa}.tmp/made/features", f"s/__{hexa[::-1]}.tmp"):
        (root / name).mkdir(parents=True)
    (root / "s/uncommitted/features/c.0.0").write_text("x")
    (root / "s/uncommitted/features/zarr.json").write_text("{}")
    (root / f"s/__{hexa}.tmp/made/zarr.json").write_text("{}")
    for name in ("s/uncommitted", "s/ü", f"s/__{hexa}.tmp", f"s/__{hexa[::-1]}.tmp"):
        yield root / name, name


def foreign(root: Path) -> Iterator[Path]:
    """What is none of our business."""
    for name in (
        "README.md",
        "mine.tmp",
        "x.partial",
        "s/notes.txt",
        "s/mine.tmp",
        "other/x/c.0.0",
        "s/plain/notes.txt",
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        yield path


def test_gc_removes_old_litter_and_nothing_else(filled: str, kind: str) -> None:
    root = Path(filled)
    left = list(litter(root, kind))
    kept = list(foreign(root))
    names = sorted(name for _, name in left)
    with open_store(filled, "a") as store:
        assert store.videos("s") == ["a", "b", "c"]  # litter is invisible
        assert store.gc() == []  # its writer may still be alive
        for path, _ in left:
            age(path)
        for path in kept:
            age(path)
        assert store.gc(dry_run=True) == names
        assert all(path.exists() for path, _ in left)
        assert store.gc() == names
        assert not any(path.exists() for path, _ in left)
        assert all(path.exists() for path in kept)
        assert store.gc(min_age_s=0) == []
        assert store.verify(deep=True).ok
        assert store.verify().checked == 3


def test_gc_of_fresh_litter_when_told_so(filled: str, kind: str) -> None:
    left = list(litter(Path(filled), kind))
    with open_store(filled, "a") as store:
        assert store.gc(min_age_s=0) == sorted(name for _, name in left)
        assert store.verify(deep=True).checked == 3


def test_gc_does_not_take_an_entry_that_is_committed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path / "x.zarr", "a") as store:
        put(store, "v", rows(3))
        monkeypatch.setattr(store._backend, "litter", lambda age: ["s/v"])  # looked, and then it was committed
        store.gc(min_age_s=0)
        np.testing.assert_array_equal(store["s", "v"].numpy(), rows(3))
        assert os.listdir(tmp_path / "x.zarr" / "s" / "v")
        assert store.verify(deep=True).ok


def test_gc_behind_a_url() -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    with open_store("memory://gc/x.zarr", "a") as store:
        put(store, "v", rows(3))
        fs.pipe_file("/gc/x.zarr/s/half [x]/features/c.0.0", b"x")
        fs.pipe_file("/gc/x.zarr/s/half [x]/features/zarr.json", b"{}")
        fs.pipe_file("/gc/x.zarr/s/mine/notes.txt", b"x")
        assert store.gc() == []
        assert store.gc(min_age_s=0) == ["s/half [x]"]
        assert not fs.exists("/gc/x.zarr/s/half [x]/features/c.0.0")
        assert fs.exists("/gc/x.zarr/s/mine/notes.txt")
        assert store.verify(deep=True).checked == 1


def test_an_orphan_in_the_way_is_replaced(tmp_path: Path) -> None:
    with open_store(tmp_path / "x.zarr", "a") as store:
        put(store, "v", rows(3))
        orphan = tmp_path / "x.zarr" / "s" / "w" / "features"
        orphan.mkdir(parents=True)
        (orphan / "c.0.0").write_bytes(b"old")
        (orphan / "c.1.0").write_bytes(b"old")
        assert ("s", "w") not in store
        put(store, "w", rows(4))
        assert sorted(os.listdir(orphan)) == ["c.0.0", "zarr.json"]
        np.testing.assert_array_equal(store["s", "w"].numpy(), rows(4))


def test_order_of_a_remote_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, then arrays, then the entry: whatever is cut off leaves no entry, and overwriting takes it away first."""
    with open_store("memory://order/x.zarr", "a") as store:
        put(store, "v", rows(3))
        files = store._backend.files
        done: list[str] = []
        for name in ("write", "delete"):
            real = getattr(files, name)
            monkeypatch.setattr(
                files, name, lambda key, *data, real=real, name=name: (done.append(f"{name} {key}"), real(key, *data))
            )
        levels = {"s2": Level(rows(8), AXIS), "s4": Level(rows(4), TimeAxis(1, 0, 1))}
        store.write("s", "v", levels, duration_s=1.0, source=SOURCE, overwrite=True)
    assert done[0] == "delete s/v/zarr.json"
    assert {"delete s/v/features/c.0.0", "delete s/v/features/zarr.json"} == set(done[1:3])
    assert done[3:] == [
        f"write s/v/{key}" for key in ("s2/c.0.0", "s4/c.0.0", "s2/zarr.json", "s4/zarr.json", "zarr.json")
    ]
    assert isinstance(store, Store)
