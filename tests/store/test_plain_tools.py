"""What is written can be read without tad, exactly as the documentation says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from tad.store import Level, open_store
from tests.store.makers import AXIS, SOURCE, SPEC, put, rows

FLAT = rows(300, 1024)
PYRAMID = {"s2": rows(40, 6), "s4": rows(20, 6, seed=1), "s8": rows(10, 12, seed=2)}


@pytest.fixture
def filled(place: str) -> str:
    """Two streams: one of a single level, one with ``features`` and three ragged levels in the same entry."""
    with open_store(place, "a") as store:
        put(store, "video_1", FLAT, stream="i3d-rgb")
        put(store, "a/b [ü]", FLAT[:7], stream="i3d-rgb")
        store.create_stream("maps", SPEC)
        levels = {name: Level(array, AXIS.pooled(2**i)) for i, (name, array) in enumerate(PYRAMID.items())}
        levels["features"] = Level(FLAT[:5], AXIS.pooled(8))
        store.write("maps", "video_1", levels, duration_s=9.0, source=SOURCE)
    return place


@pytest.mark.parametrize("kind", ["zarr"], indirect=True)
class TestZarr:
    def test_files(self, filled: str) -> None:
        entry = Path(filled, "i3d-rgb", "video_1")
        found = sorted(str(path.relative_to(entry)) for path in entry.rglob("*"))
        assert found == ["features", "features/c.0.0", "features/zarr.json", "zarr.json"]
        array = json.loads((entry / "features/zarr.json").read_text())
        assert array["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "."}}
        assert array["dimension_names"] == ["time", "channel"]
        assert array["fill_value"] == "NaN"
        assert array["chunk_grid"]["configuration"]["chunk_shape"] == [300, 1024]  # one shard of two chunks
        (shard,) = array["codecs"]
        assert shard["name"] == "sharding_indexed"
        assert shard["configuration"]["chunk_shape"] == [150, 1024]
        assert [codec["name"] for codec in shard["configuration"]["codecs"]] == ["bytes", "crc32c"]
        small = json.loads(Path(filled, "maps/video_1/s4/zarr.json").read_text())
        assert [codec["name"] for codec in small["codecs"]] == ["bytes", "crc32c"]  # one chunk: no shard
        assert small["chunk_grid"]["configuration"]["chunk_shape"] == [20, 6]
        root = json.loads(Path(filled, "zarr.json").read_text())["attributes"]
        assert root["encoding-type"] == "tad-store"
        assert root["encoding-version"] == "1.0"
        assert root["created_by"].startswith("tad ")

    def test_zarr(self, filled: str) -> None:
        z = zarr.open_group(filled, mode="r")["i3d-rgb/video_1"]
        np.testing.assert_array_equal(z["features"][100:356], FLAT[100:356])
        assert z.attrs["levels"][0]["scale_s"] == AXIS.scale_s
        group = zarr.open_group(filled, mode="r")["i3d-rgb"]
        assert group.attrs["spec"] == SPEC
        assert sorted(group.group_keys()) == ["a%2Fb [ü]", "video_1"]

    def test_xarray(self, filled: str) -> None:
        import xarray as xr

        with xr.open_zarr(filled, group="i3d-rgb/video_1", consolidated=False) as data:
            assert data["features"].dims == ("time", "channel")
            np.testing.assert_array_equal(data["features"][100:356], FLAT[100:356])
            assert data.attrs["duration_s"] == 10.0
        with xr.open_zarr(filled, group="maps/video_1", consolidated=False) as data:
            for name, array in PYRAMID.items():
                assert data[name].dims == (f"time_{name}", f"channel_{name}")
                np.testing.assert_array_equal(data[name], array)
            np.testing.assert_array_equal(data["features"], FLAT[:5])

    def test_dask(self, filled: str) -> None:
        import dask.array as da

        array = da.from_zarr(filled, component="i3d-rgb/video_1/features")
        np.testing.assert_array_equal(array[100:356].compute(scheduler="synchronous"), FLAT[100:356])


@pytest.mark.parametrize("kind", ["hdf5"], indirect=True)
class TestHdf5:
    def test_files(self, filled: str) -> None:
        found = sorted(str(path.relative_to(filled)) for path in Path(filled).rglob("*") if path.is_file())
        entries = ["i3d-rgb/__stream__.json", "i3d-rgb/a%2Fb [ü].h5", "i3d-rgb/video_1.h5"]
        assert found == ["__store__.json", *entries, "maps/__stream__.json", "maps/video_1.h5", "store.h5"]

    def test_store_h5(self, filled: str, tmp_path: Path) -> None:
        import h5py

        moved = Path(filled).rename(tmp_path / "elsewhere")  # the links are relative
        with h5py.File(moved / "store.h5") as file:
            assert file.attrs["encoding-type"] == "tad-store"
            np.testing.assert_array_equal(file["i3d-rgb/video_1/features"][100:356], FLAT[100:356])
            np.testing.assert_array_equal(file["i3d-rgb"]["a%2Fb [ü]"]["features"][:], FLAT[:7])
            assert json.loads(file["i3d-rgb"].attrs["spec"]) == SPEC
            for name, array in PYRAMID.items():
                np.testing.assert_array_equal(file[f"maps/video_1/{name}"][:], array)
            (link,) = {type(file.get("maps/video_1", getlink=True))}
            assert link is h5py.ExternalLink

    def test_one_file(self, filled: str) -> None:
        import h5py

        with h5py.File(Path(filled, "i3d-rgb", "video_1.h5")) as file:
            dataset = file["features"]
            assert dataset.chunks == (150, 1024)
            assert dataset.fletcher32
            assert [dimension.label for dimension in dataset.dims] == ["time", "channel"]
            assert dataset.dtype == np.dtype("<f4")
            assert file.attrs["duration_s"] == 10.0
            assert json.loads(file.attrs["levels"])[0]["translation_s"] == AXIS.translation_s
        with h5py.File(Path(filled, "maps", "video_1.h5")) as file:
            assert [dimension.label for dimension in file["s8"].dims] == ["time_s8", "channel_s8"]

    def test_xarray(self, filled: str) -> None:
        import xarray as xr

        place = Path(filled, "i3d-rgb", "video_1.h5")
        with xr.open_dataset(place, engine="h5netcdf", phony_dims="sort") as data:
            np.testing.assert_array_equal(data["features"][100:356], FLAT[100:356])

    def test_store_h5_can_be_lost(self, filled: str) -> None:
        before = _linked(filled)
        Path(filled, "store.h5").unlink()
        with open_store(filled) as store:
            assert store.stream_attrs("maps")["spec"] == SPEC
            np.testing.assert_array_equal(store["i3d-rgb", "video_1"].numpy(), FLAT)
            assert store.verify(deep=True).ok
        with open_store(filled, "a") as store:
            store.link()
        assert _linked(filled) == before

    def test_store_h5_follows_what_is_written_and_deleted(self, filled: str) -> None:
        with open_store(filled, "a") as store:
            put(store, "new", FLAT[:3], stream="i3d-rgb")
            store.delete("i3d-rgb", "video_1")
            store.create_stream("empty", SPEC)
        assert _linked(filled) == {"empty": [], "i3d-rgb": ["a%2Fb [ü]", "new"], "maps": ["video_1"]}

    def test_store_h5_is_mended_by_the_next_writer(self, filled: str) -> None:
        """After a run whose coordinator was killed, and one that found nothing left to do."""
        before = _linked(filled)
        master = Path(filled, "store.h5")
        old = master.read_bytes()
        with open_store(filled, "a") as store:
            put(store, "new", FLAT[:3], stream="i3d-rgb")
        for stale in (old, b"garbage"):
            master.write_bytes(stale)
            with open_store(filled, "a"):
                pass
            assert _linked(filled) == before | {"i3d-rgb": sorted([*before["i3d-rgb"], "new"])}

    def test_reading_leaves_store_h5_alone(self, filled: str) -> None:
        before = Path(filled, "store.h5").stat().st_mtime_ns
        with open_store(filled, "a") as store:
            store["i3d-rgb", "video_1"].numpy()
        assert Path(filled, "store.h5").stat().st_mtime_ns == before


def _linked(place: str) -> dict[str, list[str]]:
    import h5py

    with h5py.File(Path(place, "store.h5")) as file:
        return {stream: sorted(file[stream]) for stream in file}


def test_attributes_are_the_same_in_both_formats(tmp_path: Path) -> None:
    found: list[Any] = []
    extra = {"text": "ü", "nul": "a\0b", "bad": "x\udcff", "big": 2**70, "n": -3, "x": 0.1, "yes": True, "none": None}
    for name in ("x.zarr", "x-h5"):
        with open_store(tmp_path / name, "a") as store:
            put(store, "v\0", FLAT[:3], attrs=extra | {"list": [1, "2"], "empty": "", "dict": {}})
            attrs = store.attrs("s", "v\0")
            assert store.verify(deep=True).ok
            for own in ("written_at", "attrs_sha256", "metadata_sha256"):
                attrs.pop(own, None)
            found.append((attrs, store.stream_attrs("s")))
    assert found[0] == found[1]
    assert extra.items() <= found[0][0].items()


def test_dask_arrays_of_a_store(any_place: str) -> None:
    import dask

    with open_store(any_place, "a") as store:
        put(store, "v", FLAT)
        put(store, "w", FLAT[:7])
        arrays = store.dask("s")
        assert list(arrays) == ["v", "w"]
        assert arrays["v"].chunks == ((150, 150), (1024,))
        assert arrays["v"].dtype == np.float32
        with dask.config.set(scheduler="synchronous"):
            np.testing.assert_array_equal(arrays["v"].compute(), FLAT)
            np.testing.assert_array_equal(arrays["v"][40:200:3, 5].compute(), FLAT[40:200:3, 5])
            np.testing.assert_allclose(arrays["w"].mean(axis=0).compute(), FLAT[:7].mean(axis=0), rtol=1e-4, atol=1e-6)
        with dask.config.set(scheduler="threads", num_workers=2):
            np.testing.assert_array_equal((arrays["v"] + 1).compute(), FLAT + 1)
        with pytest.raises(Exception, match="has no level 's2'"):
            store.dask("s", "s2")
