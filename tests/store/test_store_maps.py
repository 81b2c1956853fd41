"""Maps and frames, arrays of four axes and of bytes, through everything that a store does with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tad.errors import StoreError
from tad.store import Level, Store, import_features, open_store
from tad.store.exporters import export_features
from tad.store.layout import chunk_rows
from tad.store.torch import SnippetDataset, pad_snippets
from tad.timeline import TimeAxis
from tests.store.makers import SOURCE, place_for

FPS = 10.0
MAPS_AXIS = TimeAxis.from_frames(fps=FPS, window_frames=4, stride_frames=4)
COARSE_AXIS = TimeAxis.from_frames(fps=FPS, window_frames=8, stride_frames=8)
FRAMES_AXIS = TimeAxis.from_frames(fps=FPS, window_frames=1, stride_frames=1)
RNG = np.random.default_rng(5)
FRAMES = RNG.integers(0, 256, (403, 3, 48, 40), np.uint8)  # 2.2 MiB
MAPS = RNG.standard_normal((101, 832, 6, 6)).astype(np.float16)  # 5.8 MiB
COARSE = RNG.standard_normal((51, 64, 3, 3)).astype(np.float16)


def put(store: Store, video: str, frames: np.ndarray = FRAMES, maps: np.ndarray = MAPS) -> None:
    same = {"duration_s": 40.3, "source": SOURCE}
    for stream in ("frames", "i3d-rgb"):
        store.create_stream(stream, {"made": "by hand"})
    store.write("frames", video, {"features": Level(frames, FRAMES_AXIS, 1, 1, FPS, 403)}, **same)
    levels = {"s4-map": Level(maps, MAPS_AXIS, 4, 4, FPS, 403), "s8-map": Level(COARSE, COARSE_AXIS, 8, 8, FPS, 403)}
    store.write("i3d-rgb", video, levels, **same)


@pytest.fixture
def filled(place: str) -> str:
    with open_store(place, "a") as store:
        put(store, "v")
    return place


def bytes_read() -> int:
    """What this process has read through system calls so far."""
    try:
        text = Path("/proc/self/io").read_text()
    except OSError:
        pytest.skip("this system does not count what a process reads")
    return int(text.split("rchar:")[1].split()[0])


def spoil(path: Path, array: np.ndarray, keep: range) -> None:
    """Flip a bit in every stored chunk of ``array`` without a row in ``keep``; rows lie there uncompressed."""
    data, rows = bytearray(path.read_bytes()), chunk_rows(array.shape, array.dtype.itemsize)
    spoiled = 0
    for start in range(0, len(array), rows):
        chunk = array[start : start + rows]
        at = data.find(chunk.tobytes())
        assert at >= 0
        if not set(range(start, start + len(chunk))) & set(keep):
            data[at + chunk.nbytes // 2] ^= 4
            spoiled += 1
    assert spoiled
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("level", "array", "window"), [("s4-map", MAPS, range(20, 36)), ("features", FRAMES, range(90))]
)
def test_a_window_needs_only_its_chunks(
    filled: str, disk_file: Callable[..., Path], level: str, array: np.ndarray, window: range
) -> None:
    stream = "frames" if level == "features" else "i3d-rgb"
    path = disk_file("v", "rows", stream, level)
    spoil(path.with_name("c.0.0.0.0") if path.name == "c.0.0" else path, array, window)  # an index for each axis
    with open_store(filled) as store:
        feature = store[stream, "v", level]
        expected = array[window.start : window.stop]
        np.testing.assert_array_equal(feature[window.start : window.stop], expected)
        start_s, end_s = (feature.axis.center_s(row) for row in (window[0], window[-1]))
        np.testing.assert_array_equal(feature.between(start_s, end_s), expected)
        np.testing.assert_array_equal(feature[window.start : window.stop, :2, 1:], expected[:, :2, 1:])
        np.testing.assert_array_equal(feature[list(window)[::7]], expected[::7])
        with pytest.raises(StoreError, match="cannot be read"):
            feature.numpy()
        assert not store.verify(deep=True).ok


def test_bytes_that_a_window_reads(filled: str) -> None:
    with open_store(filled) as store:
        for stream, level, array in (("i3d-rgb", "s4-map", MAPS), ("frames", "features", FRAMES)):
            feature = store[stream, "v", level]
            feature[:1]  # open
            chunk = chunk_rows(array.shape, array.dtype.itemsize)
            before = bytes_read()
            read = feature[5:69]
            touched = (-(-69 // chunk) - 5 // chunk) * chunk * array[0].nbytes
            assert read.nbytes == 64 * array[0].nbytes
            assert bytes_read() - before <= touched + 65536, "more was read than the chunks of the window"


def test_everything_gives_back_what_was_written(filled: str, tmp_path: Path, kind: str) -> None:
    with open_store(filled) as store:
        assert store.verify(deep=True).ok
        assert store.levels("i3d-rgb", "v") == ["s4-map", "s8-map"]
        table = store.catalog()
        assert list(table["shape"]) == ["403x3x48x40", "101x832x6x6", "51x64x3x3"]
        assert list(table["dtype"]) == ["uint8", "float16", "float16"]
        assert list(table["channels"]) == [3, 832, 64]
        frames, maps = store["frames", "v"], store["i3d-rgb", "v", "s4-map"]
        np.testing.assert_array_equal(frames.numpy(), FRAMES)
        np.testing.assert_array_equal(maps.numpy(), MAPS)
        lazy = store.dask("frames")["v"]
        assert (lazy.dtype, lazy.shape) == (FRAMES.dtype, FRAMES.shape)
        np.testing.assert_array_equal(lazy[10:20].compute(), FRAMES[10:20])
        for stream, level, array in (("frames", None, FRAMES), ("i3d-rgb", "s8-map", COARSE)):
            out = tmp_path / stream
            assert export_features(store, stream, out, level=level).written == ["v"]
            np.testing.assert_array_equal(np.load(out / "v.npy"), array)
            assert f'"shape": [\n   {len(array)},' in (out / "index.json").read_text()
    (tmp_path / "other").mkdir()
    with open_store(place_for(kind, tmp_path / "other"), "a") as other:
        for stream in ("frames", "i3d-rgb"):
            report = import_features(tmp_path / stream, other, stream, fps=FPS, window=1, stride=1, layout="TC")
            assert report.written == ["v"]
        assert other["frames", "v"].dtype == np.uint8
        assert other["frames", "v"].axis == FRAMES_AXIS
        np.testing.assert_array_equal(other["frames", "v"].numpy(), FRAMES)
        np.testing.assert_array_equal(other["i3d-rgb", "v"].numpy(), COARSE)
        other.write_catalog()
        assert list(other.catalog(refresh=False)["shape"]) == ["403x3x48x40", "51x64x3x3"]
        assert other.verify(deep=True).ok


def test_import_of_maps_told_by_their_shapes(tmp_path: Path, place: str) -> None:
    for count in (3, 5):
        np.save(tmp_path / f"{count}.npy", np.moveaxis(COARSE[:count], 0, 1))  # channels first, (C, T, H, W)
    np.save(tmp_path / "one.npy", np.moveaxis(COARSE[:1], 0, 1))  # a single row
    np.save(tmp_path / "rows.npy", COARSE[:, :, 0, 0])
    np.save(tmp_path / "three.npy", COARSE[:, :, 0])
    grid = {"fps": FPS, "window": 8, "stride": 8}
    with open_store(place, "a") as store:
        report = import_features(tmp_path, store, "maps", **grid)
        assert report.written == ["3", "5", "one"]
        assert dict(report.skipped)["rows.npy"] == "has the shape (64, 51), the stream has maps"
        assert "expected rows and channels" in dict(report.skipped)["three.npy"]
        for video, count in (("3", 3), ("5", 5), ("one", 1)):
            np.testing.assert_array_equal(store["maps", video].numpy(), COARSE[:count])


def test_black_frames_are_frames_and_a_lost_object_is_none(tmp_path: Path) -> None:
    black = np.zeros((20, 3, 16, 16), np.uint8)
    place = place_for("memory", tmp_path)
    with open_store(place, "a") as store:
        put(store, "v", frames=black)
        feature = store["frames", "v"]
        assert not feature[3:9].any()
        store._backend.files.delete("frames/v/features/c.0.0.0.0")  # Zarr gives zeros for it
        with pytest.raises(StoreError, match="missing"):
            feature[3:9]


def test_an_older_catalogue_is_no_damage(filled: str) -> None:
    path = Path(filled, "catalog.csv")
    with open_store(filled, "a") as store:
        store.write_catalog()
        names = path.read_text().splitlines()[0].split(",")
        at = names.index('"shape"')
        lines = [line.split(",") for line in path.read_text().splitlines()]
        path.write_text("".join(",".join(line[:at] + line[at + 1 :]) + "\n" for line in lines))
        assert store.verify().ok
        assert "403x3x48x40" in set(store.catalog(refresh=False)["shape"])


def test_windows_of_maps_and_frames_cover_the_same_seconds(filled: str) -> None:
    streams = [("i3d-rgb", "s4-map"), ("i3d-rgb", "s8-map"), "frames"]
    dataset = SnippetDataset(filled, streams, rows=64, step=16)
    assert len(dataset) == 4
    for item in dataset:
        row = item["row"]
        assert set(item["features"]) == {"i3d-rgb/s4-map", "i3d-rgb/s8-map", "frames"} == set(item["axes"])
        np.testing.assert_array_equal(item["features"]["i3d-rgb/s4-map"], MAPS[row : row + 64])
        # of rows that reach beyond the window, those whose centre lies in it: row 50 of s8 does not, at the end
        np.testing.assert_array_equal(item["features"]["i3d-rgb/s8-map"], COARSE[:50][row // 2 : row // 2 + 32])
        np.testing.assert_array_equal(item["features"]["frames"], FRAMES[4 * row : 4 * row + 256])
        edges = [axis.to_seconds(0.0) for axis in item["axes"].values()]
        np.testing.assert_allclose(edges, edges[0])
    batch = pad_snippets([dataset[0], dataset[3]])
    assert batch["features"]["frames"].shape == (2, 256, 3, 48, 40)
    assert batch["mask"]["frames"].sum(dim=1).tolist() == [256, 403 - 192]
