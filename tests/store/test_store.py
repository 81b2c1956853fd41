"""One behaviour for Zarr on disk, HDF5 on disk, and Zarr behind a URL."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tad import __version__
from tad.errors import StoreError
from tad.store import Level, Store, fingerprint_of, open_store
from tad.timeline import TimeAxis
from tests.store.makers import AXIS, SOURCE, SPEC, level, place_for, put, rows


def test_round_trip(any_place: str) -> None:
    array = rows(700, 1024)  # three chunks
    with open_store(any_place, "a") as store:
        put(store, "v", array, attrs={"note": {"a": [1, None]}})
    with open_store(any_place) as store:
        feature = store["s", "v"]
        assert (feature.stream, feature.video, feature.level) == ("s", "v", "features")
        assert (feature.shape, feature.dtype, feature.ndim, len(feature)) == (array.shape, array.dtype, 2, 700)
        assert feature.axis == AXIS
        assert feature.duration_s == 10.0
        np.testing.assert_array_equal(feature.numpy(), array)
        np.testing.assert_array_equal(np.asarray(feature), array)
        assert feature.numpy().flags.writeable
        assert feature.attrs["note"] == {"a": [1, None]}
        assert ("s", "v") in store
        assert ("s", "w") not in store
        assert store.has("s", "v")
        assert store.streams() == ["s"]
        assert store.videos("s") == ["v"]
        assert list(store) == [("s", "v")]


def test_attributes_are_those_of_the_layout(any_place: str) -> None:
    array = rows(5)
    with open_store(any_place, "a") as store:
        put(store, "v", array)
        attrs = store.attrs("s", "v")
        (one,) = attrs["levels"]
        assert one == {
            "path": "features",
            "shape": [5, 4],
            "dtype": "float32",
            "stride_frames": 8,
            "window_frames": 32,
            "fps": 30.0,
            "num_frames_used": 64,
            "scale_s": 8 / 30,
            "translation_s": 16 / 30,
            "window_s": 32 / 30,
        }
        assert attrs["encoding-type"] == "tad-features"
        assert attrs["encoding-version"] == "1.0"
        assert attrs["stream_fingerprint"] == fingerprint_of(SPEC)
        assert attrs["source"] == SOURCE
        assert attrs["tad_version"] == __version__
        assert attrs["duration_s"] == 10.0
        import hashlib

        assert attrs["sha256"] == {"features": hashlib.sha256(array.astype("<f4").tobytes()).hexdigest()}
        stream = store.stream_attrs("s")
        assert stream["spec"] == SPEC
        assert stream["fingerprint"] == fingerprint_of(SPEC)


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "uint8", "int8", "int16", "int64", "uint32", ">f4", ">i2"]
)
def test_types(any_place: str, dtype: str) -> None:
    array = (rows(6, 3) * 20).astype(dtype)
    with open_store(any_place, "a") as store:
        put(store, "v", np.abs(array))
        back = store["s", "v"].numpy()
    assert back.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(back, np.abs(array))


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4096), (3, 400_000)])
def test_zeros_are_stored_and_not_taken_for_missing(any_place: str, dtype: str, shape: tuple[int, int]) -> None:
    with open_store(any_place, "a") as store:
        put(store, "v", np.zeros(shape, dtype))
        assert not store["s", "v"].numpy().any()
        assert store.verify(deep=True).ok


def test_pyramid_levels_and_maps(any_place: str) -> None:
    fine, mid, coarse = rows(40, 6), rows(20, 5, seed=1), rows(10 * 3, 8, seed=2).reshape(10, 3, 2, 4)
    axes = [AXIS, AXIS.pooled(2), AXIS.pooled(4)]
    with open_store(any_place, "a") as store:
        store.create_stream("p", SPEC)
        levels = {"s8": Level(coarse, axes[2]), "s2": Level(fine, axes[0]), "s4": Level(mid, axes[1])}
        store.write("p", "v", levels, duration_s=12.0, source=SOURCE)
        assert store.levels("p", "v") == ["s2", "s4", "s8"]  # fine to coarse
        assert store["p", "v"].level == "s2"
        for name, array, axis in zip(("s2", "s4", "s8"), (fine, mid, coarse), axes, strict=True):
            assert store["p", "v", name].axis == axis
            np.testing.assert_array_equal(store["p", "v", name].numpy(), array)
        np.testing.assert_array_equal(store["p", "v", "s8"][2:5, 1, :, 3], coarse[2:5, 1, :, 3])
        with pytest.raises(StoreError, match=r"p/v has no level 's16', only s2, s4, s8"):
            store["p", "v", "s16"]


def test_features_is_the_default_level_even_if_another_is_finer(any_place: str) -> None:
    with open_store(any_place, "a") as store:
        store.create_stream("p", SPEC)
        levels = {"features": Level(rows(2), AXIS.pooled(8)), "s2": Level(rows(16), AXIS)}
        store.write("p", "v", levels, duration_s=12.0, source=SOURCE)
        assert store["p", "v"].level == "features"


# ---- properties ------------------------------------------------------------------------------------------------------
dtypes = st.sampled_from(["float16", "float32", "float64", "uint8", "int16", ">f4"])
shapes = hnp.array_shapes(min_dims=2, max_dims=4, max_side=6)
numbers = {"allow_nan": False, "allow_infinity": False}
arrays = dtypes.flatmap(
    lambda d: hnp.arrays(
        d, shapes, elements=None if d in ("uint8", "int16") else hnp.from_dtype(np.dtype(d), **numbers)
    )
)
ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
bounds = st.none() | st.integers(-8, 8)
slices = st.builds(slice, bounds, bounds, st.sampled_from([None, 1, 2, 3, -1, -2]))


@pytest.fixture(scope="module", params=["zarr", "hdf5", "memory"])
def open_for_good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with open_store(place_for(request.param, tmp_path_factory.mktemp("store")), "a") as store:
        yield store


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(video=ids, stream=ids, array=arrays, picked=slices, masked=st.randoms(use_true_random=False))
def test_ids_shapes_types_and_slices(
    open_for_good: Store, video: str, stream: str, array: np.ndarray, picked: slice, masked: Any
) -> None:
    store = open_for_good
    put(store, video, array, stream=stream, overwrite=True)
    assert video in store.videos(stream)
    assert stream in store.streams()
    feature = store[stream, video]
    back = feature.numpy()
    assert back.dtype == array.dtype.newbyteorder("<")
    np.testing.assert_array_equal(back, array)
    np.testing.assert_array_equal(feature[picked], array[picked])
    np.testing.assert_array_equal(feature[picked, 0], array[picked, 0])
    np.testing.assert_array_equal(feature[picked, ..., 0], array[picked, ..., 0])
    np.testing.assert_array_equal(feature[..., 0], array[..., 0])
    np.testing.assert_array_equal(feature[-1], array[-1])
    some = [masked.randrange(-len(array), len(array)) for _ in range(3)]
    np.testing.assert_array_equal(feature[some], array[some])
    mask = np.array([masked.random() < 0.5 for _ in range(len(array))])
    np.testing.assert_array_equal(feature[mask], array[mask])
    with pytest.raises(IndexError):
        feature[len(array)]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 40),
    axis=st.builds(TimeAxis, st.floats(0.01, 3), st.floats(-2, 5), st.floats(0, 4)),
    ends=st.tuples(st.floats(-5, 60), st.floats(-5, 60)),
)
def test_between_takes_the_rows_whose_centres_lie_there(
    open_for_good: Store, count: int, axis: TimeAxis, ends: tuple[float, float]
) -> None:
    array = np.arange(count, dtype="f4")[:, None]
    open_for_good.create_stream("b", SPEC)
    open_for_good.write("b", "v", {"features": level(array, axis)}, duration_s=1.0, source=SOURCE, overwrite=True)
    feature = open_for_good["b", "v"]
    assert feature.axis == axis
    start_s, end_s = min(ends), max(ends)
    centres = axis.translation_s + np.arange(count) * axis.scale_s
    slack = 1e-8 * axis.scale_s  # the axis itself forgives 1e-9 rows
    surely = set(np.flatnonzero((centres >= start_s + slack) & (centres <= end_s - slack)))
    perhaps = set(np.flatnonzero((centres >= start_s - slack) & (centres <= end_s + slack)))
    taken = {int(value) for value in feature.between(start_s, end_s)[:, 0]}
    assert surely <= taken <= perhaps
    assert feature.between(start_s, end_s).shape[1:] == (1,)


# ---- streams ---------------------------------------------------------------------------------------------------------
def test_a_stream_is_bound_to_its_recipe(any_place: str) -> None:
    with open_store(any_place, "a") as store:
        first = store.create_stream("s", SPEC, info={"weights_path": "rgb.pt"})
        assert first == fingerprint_of(SPEC)
        assert store.create_stream("s", dict(reversed(SPEC.items())), info={"weights_path": "elsewhere.pt"}) == first
        assert store.stream_attrs("s")["weights_path"] == "rgb.pt"
        other = SPEC | {"stride": 4, "weights": {"sha256": "11aa"}, "crop": 224}
        with pytest.raises(StoreError) as refused:
            store.create_stream("s", other)
        for part in (
            "stride: stored 8, now 4",
            'weights.sha256: stored "00ff", now "11aa"',
            "crop: stored nothing, now 224",
        ):
            assert part in str(refused.value)
        assert "another stream name" in str(refused.value)
        assert store.stream_attrs("s")["spec"] == SPEC
    with open_store(any_place) as again:
        assert again.stream_attrs("s")["spec"] == SPEC
        with pytest.raises(StoreError, match="has no stream 't'"):
            again.stream_attrs("t")


def test_stream_info_may_not_hide_the_recipe(any_place: str) -> None:
    with open_store(any_place, "a") as store, pytest.raises(StoreError, match="may not hold spec"):
        store.create_stream("s", SPEC, info={"spec": {}})


def test_writing_needs_the_stream(any_place: str) -> None:
    with open_store(any_place, "a") as store:
        store.create_stream("i3d-rgb", SPEC)
        with pytest.raises(StoreError, match=r"has no stream 'i3d-rbg'. Did you mean 'i3d-rgb'\?"):
            store.write("i3d-rbg", "v", {"features": level(rows(2))}, duration_s=1, source=SOURCE)


# ---- entries ---------------------------------------------------------------------------------------------------------
def test_an_entry_is_written_once_unless_said_otherwise(any_place: str) -> None:
    old, new = rows(9), rows(300, 7, seed=1)
    with open_store(any_place, "a") as store:
        put(store, "v", old)
        before = store["s", "v"]
        with pytest.raises(StoreError, match=r"s/v exists already; say overwrite"):
            put(store, "v", new)
        np.testing.assert_array_equal(store["s", "v"].numpy(), old)
        put(store, "v", new, overwrite=True)
        np.testing.assert_array_equal(store["s", "v"].numpy(), new)
        assert store.verify(deep=True).ok
        with pytest.raises(StoreError, match="s/v was replaced since it was looked up"):
            before.numpy()


def test_overwriting_leaves_nothing_of_the_old_entry(any_place: str) -> None:
    with open_store(any_place, "a") as store:
        store.create_stream("s", SPEC)
        levels = {"s2": Level(rows(8), AXIS), "s4": Level(rows(4), AXIS.pooled(2))}
        store.write("s", "v", levels, duration_s=1.0, source=SOURCE)
        put(store, "v", rows(3), overwrite=True)
        assert store.levels("s", "v") == ["features"]
        assert store.verify(deep=True).ok  # stray arrays would be named


def test_a_store_sees_what_another_one_writes(any_place: str) -> None:
    with open_store(any_place, "a") as writer, open_store(any_place) as reader:
        put(writer, "v", rows(4))
        assert reader["s", "v"].shape == (4, 4)
        put(writer, "w", rows(5))
        assert reader.videos("s") == ["v", "w"]
        if not any_place.startswith("memory"):  # behind a URL, looking again would cost a request for every read
            reader["s", "v"].numpy()
            put(writer, "v", rows(6, seed=3), overwrite=True)
            np.testing.assert_array_equal(reader["s", "v"].numpy(), rows(6, seed=3))
            writer.delete("s", "v")
            with pytest.raises(StoreError, match="stream 's' has no video 'v' among its 1"):
                reader["s", "v"]


def test_delete(any_place: str) -> None:
    with open_store(any_place, "a") as store:
        put(store, "v", rows(4))
        put(store, "w", rows(4))
        store.write_catalog()
        store.delete("s", "v")
        assert store.videos("s") == ["w"]
        assert store.verify().ok  # the catalogue does not list it any more
        with pytest.raises(StoreError, match="s/v is not there"):
            store.delete("s", "v")
        put(store, "v", rows(5))
        assert store["s", "v"].shape == (5, 4)


def test_is_done_compares_recipe_and_source(any_place: str) -> None:
    with open_store(any_place, "a") as store:
        assert not store.is_done("s", "v", SOURCE)
        put(store, "v", rows(4), source=SOURCE | {"sha256": "ab"})
        assert store.is_done("s", "v", SOURCE)
        assert store.is_done("s", "v", SOURCE | {"sha256": "not compared"})
        for key, other in (("name", "other.mp4"), ("size", 1), ("mtime_ns", 2)):
            assert not store.is_done("s", "v", SOURCE | {key: other})
        assert not store.is_done("s", "w", SOURCE)


def test_an_entry_of_another_recipe_is_not_done(kind: str, tmp_path: Path) -> None:
    one, two = place_for(kind, tmp_path / "1"), place_for(kind, tmp_path / "2")
    with open_store(one, "a") as store:
        put(store, "v", rows(4))
    with open_store(two, "a") as store:
        store.create_stream("s", SPEC | {"stride": 4})
        name = "v.h5" if kind == "hdf5" else "v"
        Path(one, "s", name).rename(Path(two, "s", name))
        assert store.has("s", "v")
        assert not store.is_done("s", "v", SOURCE)
        assert [p.what for p in store.verify().problems] == ["was made with another recipe than its stream's"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": {}}, "at least one level"),
        ({"levels": {"a/b": level(rows(2))}}, "level 'a/b' must be a name"),
        ({"levels": {"__x": level(rows(2))}}, "level '__x' must be a name"),
        ({"levels": {"features": level(np.full((2, 2), np.nan))}}, "s/v, level features: row 0 of 2 holds NaN"),
        ({"duration_s": math.nan}, "duration_s is nan"),
        ({"duration_s": 0}, "duration_s must be positive"),
        ({"source": {"path": Path("x")}}, "source.path is a PosixPath"),
        ({"attrs": {"levels": 1}}, "may not hold levels"),
        ({"attrs": {"": 1}}, "cannot be the name of an attribute"),
        ({"video": ""}, "non-empty"),
        ({"video": "x" * 201}, "takes 201 bytes"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    any_place: str, change: dict[str, Any], message: str
) -> None:
    given_: dict[str, Any] = {
        "levels": {"features": level(rows(2))},
        "duration_s": 1.0,
        "source": SOURCE,
        "attrs": None,
    }
    given_ |= change
    with open_store(any_place, "a") as store:
        store.create_stream("s", SPEC)
        with pytest.raises(StoreError, match=message):
            store.write("s", given_.pop("video", "v"), given_.pop("levels"), **given_)
        assert store.videos("s") == []
        assert store.gc(min_age_s=0) == []


def test_hdf5_refuses_attributes_that_do_not_fit(tmp_path: Path) -> None:
    with open_store(tmp_path / "x-h5", "a") as store:
        with pytest.raises(StoreError, match="the attribute 'note' is 70000 characters long"):
            put(store, "v", rows(2), attrs={"note": "x" * 70_000})
        assert store.videos("s") == []
        assert store.gc(min_age_s=0) == []


def test_lookups_that_miss_say_what_is_there(any_place: str) -> None:
    with open_store(any_place, "a") as store:
        put(store, "video_001", rows(2))
        with pytest.raises(StoreError, match=r"no video 'video_01' among its 1. Did you mean 'video_001'\?"):
            store["s", "video_01"]
        with pytest.raises(StoreError, match="no stream 'x'"):
            store["x", "video_001"]
        with pytest.raises(StoreError, match=r"store\[stream, video\]"):
            store["s"]  # type: ignore[index]
        with pytest.raises(StoreError, match=r"store\[stream, video\]"):
            store["s", "a", "b", "c"]  # type: ignore[index]


# ---- opening ---------------------------------------------------------------------------------------------------------
def test_opening_what_is_not_there(any_place: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no feature store"):
        open_store(any_place)
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="a folder without zarr"):
        open_store(tmp_path / "folder")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is a file"):
        open_store(tmp_path / "file", "a")
    with pytest.raises(StoreError, match="mode must be"):
        open_store(any_place, "w")  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="format must be"):
        open_store(any_place, "a", format="npy")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "asked", "got"),
    [("x.zarr", None, "zarr"), ("x", None, "zarr"), ("x.h5", None, "hdf5"), ("x-h5", None, "hdf5")]
    + [("x.hdf5", None, "hdf5"), ("x.h5", "zarr", "zarr"), ("x.zarr", "hdf5", "hdf5")],
)
def test_format_by_name_and_by_what_is_there(tmp_path: Path, name: str, asked: Any, got: str) -> None:
    place = tmp_path / name
    with open_store(place, "a", format=asked) as store:
        assert store.format == got
        assert store.path == str(place)
    with open_store(place) as store:
        assert store.format == got
    with pytest.raises(StoreError, match=f"is a {got} store"):
        open_store(place, "a", format="hdf5" if got == "zarr" else "zarr")


def test_reading_only(any_place: str) -> None:
    with open_store(any_place, "a") as store:
        put(store, "v", rows(2))
    with open_store(any_place) as store:
        for action in (
            lambda: store.create_stream("t", SPEC),
            lambda: put(store, "w", rows(2)),
            lambda: store.delete("s", "v"),
            lambda: store.gc(),
            lambda: store.write_catalog(),
            lambda: store.link(),
        ):
            with pytest.raises(StoreError, match="opened for reading"):
                action()
        assert store.gc(dry_run=True) == []


def test_a_closed_store_says_so(any_place: str) -> None:
    with open_store(any_place, "a") as store:
        put(store, "v", rows(2))
        feature = store["s", "v"]
    store.close()
    with pytest.raises(StoreError, match="was closed"):
        feature.numpy()
    with pytest.raises(StoreError, match="was closed"):
        store.videos("s")


def change_json(path: Path, change: dict[str, Any]) -> None:
    node = json.loads(path.read_text())
    (node.get("attributes", node)).update(change)
    path.write_text(json.dumps(node))


def test_newer_stores_are_refused(kind: str, place: str) -> None:
    with open_store(place, "a") as store:
        put(store, "v", rows(2))
    root, stream = ("zarr.json", "s/zarr.json") if kind == "zarr" else ("__store__.json", "s/__stream__.json")
    for name in (root, stream):
        change_json(Path(place, name), {"encoding-version": "1.9"})  # a newer minor version adds, it does not change
        with open_store(place) as store:
            assert store["s", "v"].shape == (2, 4)
            assert store.stream_attrs("s")["spec"] == SPEC
        change_json(Path(place, name), {"encoding-version": "2.0"})
        with pytest.raises(StoreError, match=r"encoding-version 2.0, this tad .* reads up to 1.0; upgrade tad"):
            open_store(place).stream_attrs("s")
        change_json(Path(place, name), {"encoding-version": "1.0"})
    if kind == "zarr":
        change_json(Path(place, "s/v/zarr.json"), {"encoding-version": "2.0"})
    else:
        import h5py

        from tad.store.hdf5_backend import seal

        with h5py.File(Path(place, "s/v.h5"), "a") as file:
            file.attrs["encoding-version"] = "2.0"
        seal(str(Path(place, "s/v.h5")))
    with open_store(place) as store, pytest.raises(StoreError, match=r"encoding-version 2.0"):
        store["s", "v"]


def test_what_others_wrote_is_not_taken_for_a_store(tmp_path: Path) -> None:
    import zarr

    zarr.create_group(str(tmp_path / "g.zarr"))
    with pytest.raises(StoreError, match="expected the attribute encoding-type='tad-store'"):
        open_store(tmp_path / "g.zarr", "a")
    zarr.create_array(str(tmp_path / "a.zarr"), shape=(2,), dtype="f4")
    with pytest.raises(StoreError, match="not written by tad"):
        open_store(tmp_path / "a.zarr")
    with open_store(tmp_path / "x.zarr", "a") as store:
        store.create_stream("s", SPEC)
        zarr.create_group(str(tmp_path / "x.zarr"), path="s/foreign")
        with pytest.raises(StoreError, match="not written by tad"):
            store["s", "foreign"]


def test_a_disk_that_does_not_take_it(kind: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match=r"/proc/x: the store cannot be written: .*"):
        open_store("/proc/x", "a", format="zarr" if kind == "zarr" else "hdf5")
    with open_store(place, "a") as store:
        store.create_stream("s", SPEC)
        full = OSError(28, "No space left on device")
        for name in ("replace", "rename"):
            monkeypatch.setattr(f"os.{name}", lambda *names: (_ for _ in ()).throw(full))
        with pytest.raises(StoreError, match=r"s/v cannot be written: .*No space left on device"):
            put(store, "v", rows(3))
        monkeypatch.undo()
        assert store.videos("s") == []
        assert store.gc(min_age_s=0) == []  # it cleaned up behind itself


def test_urls() -> None:
    with pytest.raises(StoreError, match=r"s3://bucket/x.zarr: .* pip install 'tad-pipeline\[s3\]'"):
        _without_s3fs(lambda: open_store("s3://bucket/x.zarr"))
    with pytest.raises(StoreError, match="not a URL that can hold a store"):
        open_store("nosuch://bucket/x.zarr")
    with pytest.raises(StoreError, match="HDF5 stores lie on local disks only"):
        open_store(f"memory://{uuid4().hex}", "a", format="hdf5")


def _without_s3fs(action: Any) -> None:
    from fsspec.registry import _registry

    saved, known = sys.modules.get("s3fs"), _registry.pop("s3", None)  # other tests may have used it
    sys.modules["s3fs"] = None  # type: ignore[assignment] # as if it were not installed
    try:
        action()
    finally:
        del sys.modules["s3fs"]
        if known is not None:
            _registry["s3"] = known
        if saved is not None:
            sys.modules["s3fs"] = saved


def test_file_url_is_a_folder(tmp_path: Path) -> None:
    with open_store(f"file://{tmp_path}/x-h5", "a") as store:
        put(store, "v", rows(2))
        assert store.format == "hdf5"
    assert (tmp_path / "x-h5" / "s" / "v.h5").exists()


def test_relative_paths_survive_a_change_of_folder(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_store(f"x{'-h5' if kind == 'hdf5' else ''}", "a") as store:
        put(store, "v", rows(2))
        (tmp_path / "below").mkdir()
        monkeypatch.chdir(tmp_path / "below")
        assert store["s", "v"][:1].shape == (1, 4)


def test_fsync_syncs_files_before_and_folders_after(kind: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1])
    with open_store(place, "a", fsync=True) as store:
        store.create_stream("s", SPEC)
        synced.clear()
        put(store, "v", rows(2))
    names = [Path(name).name for name in synced]
    if kind == "hdf5":
        assert any(name.startswith("v.h5.") for name in names)
    else:
        assert {"c.0.0", "zarr.json", "features"} <= set(names)
        assert names.index("c.0.0") < names.index("zarr.json")
    assert synced.index(str(Path(place, "s"))) > 0  # the folder, once the entry is in it


def test_importing_the_store_loads_nothing_heavy() -> None:
    code = (
        "import sys, tad.store; print([m for m in ('torch','pandas','zarr','h5py','dask','cv2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_between_takes_open_ends(place: str) -> None:
    with open_store(place, "a") as store:
        put(store, "v", rows(6))
        feature = store["s", "v"]
        np.testing.assert_array_equal(feature.between(0, float("inf")), rows(6))
        np.testing.assert_array_equal(feature.between(float("-inf"), feature.axis.center_s(2)), rows(6)[:3])
        with pytest.raises(StoreError, match="NaN"):
            feature.between(float("nan"), 1)


@pytest.mark.parametrize("about", [{"spec": {"x": "y" * 70_000}}, {"spec": {}, "info": {"note": "n" * 70_000}}])
def test_a_recipe_that_hdf5_cannot_hold_is_refused_before_anything_is_written(
    tmp_path: Path, about: dict[str, Any]
) -> None:
    place = place_for("hdf5", tmp_path)
    with open_store(place, "a") as store, pytest.raises(StoreError, match="HDF5 takes 64 KB"):
        store.create_stream("big", **about)
    with open_store(place, "a") as store:  # closing brings store.h5 up to date
        assert store.streams() == []
        put(store, "v", rows(5))
    assert open_store(place).verify(deep=True).ok
