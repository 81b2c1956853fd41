"""Packed and exported stores hold what the store holds, readable without tad, whole or not there."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from zarr.storage import ZipStore

from tad.cli import main
from tad.errors import StoreError
from tad.store import import_features, open_store
from tad.store.exporters import export_features
from tad.store.pack import pack_h5, pack_zip
from tad.timeline import TimeAxis
from tests.store.makers import AXIS, level, put, rows

VIDEOS = ("plain", "a/b ünï", ".hidden")


def make(folder: Path, kind: str) -> Path:
    """Two streams; one with a map beside its rows."""
    place = folder / ("s.zarr" if kind == "zarr" else "s-h5")
    with open_store(place, "a") as store:
        for number, video in enumerate(VIDEOS):
            put(store, video, rows(20 + number, seed=number))
        store.create_stream("maps", {"made": "by hand"})
        grid = np.random.default_rng(9).standard_normal((6, 3, 2, 2)).astype(np.float16)
        source = {"name": "v.mp4", "size": 1, "mtime_ns": 2}
        levels = {"s2": level(rows(12)), "s4": level(grid, AXIS.pooled(2))}
        store.write("maps", "plain", levels, duration_s=9.0, source=source)
    return place


def test_a_zip_holds_a_stream(tmp_path: Path) -> None:
    with open_store(make(tmp_path, "zarr")) as store:
        paths = pack_zip(store, tmp_path / "out")
        assert [path.name for path in paths] == ["maps.zarr.zip", "s.zarr.zip"]
        group = zarr.open_group(ZipStore(tmp_path / "out/s.zarr.zip", mode="r"), mode="r")
        assert group.attrs["fingerprint"] == store.stream_attrs("s")["fingerprint"]
        assert len(list(group.group_keys())) == 3
        for number, name in enumerate(("plain", "a%2Fb ünï", "%2Ehidden")):
            entry = group[name]
            np.testing.assert_array_equal(entry["features"][:], rows(20 + number, seed=number))
            assert entry.attrs["video"] == VIDEOS[number]
            assert entry.attrs["levels"][0]["scale_s"] == AXIS.scale_s
        maps = zarr.open_group(ZipStore(tmp_path / "out/maps.zarr.zip", mode="r"), mode="r")["plain"]
        np.testing.assert_array_equal(maps["s4"][:], store["maps", "plain", "s4"].numpy())
        with zipfile.ZipFile(paths[0]) as archive:
            assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        first = paths[1].read_bytes()
        assert pack_zip(store, tmp_path / "out", streams=["s"], overwrite=True)[0].read_bytes() == first


def test_what_is_half_written_is_not_packed(tmp_path: Path) -> None:
    place = make(tmp_path, "zarr")
    (place / "s" / "killed").mkdir()
    (place / "s" / "killed" / "c.0").write_bytes(b"half")
    with open_store(place) as store:
        (path,) = pack_zip(store, tmp_path, streams=["s"])
    with zipfile.ZipFile(path) as archive:
        assert not [name for name in archive.namelist() if "killed" in name]


def test_one_hdf5_file_holds_all_streams(tmp_path: Path) -> None:
    place = make(tmp_path, "hdf5")
    with open_store(place) as store:
        path = pack_h5(store, tmp_path / "one.h5")
        with h5py.File(path, "r") as file, h5py.File(place / "store.h5", "r", locking=False) as linked:
            assert dict(file.attrs) == dict(linked.attrs)
            assert sorted(file) == ["maps", "s"]
            assert dict(file["s"].attrs) == dict(linked["s"].attrs)
            for number, name in enumerate(("plain", "a%2Fb ünï", "%2Ehidden")):
                np.testing.assert_array_equal(file["s"][name]["features"], rows(20 + number, seed=number))
                assert dict(file["s"][name].attrs) == dict(linked["s"][name].attrs)
            np.testing.assert_array_equal(file["maps/plain/s4"], store["maps", "plain", "s4"].numpy())
            assert not isinstance(file["s"].get("plain", getlink=True), h5py.ExternalLink)


def test_what_cannot_be_packed_says_why(tmp_path: Path) -> None:
    with open_store(make(tmp_path, "zarr")) as store:
        with pytest.raises(StoreError, match="--zip"):
            pack_h5(store, tmp_path / "x.h5")
        with pytest.raises(StoreError, match="Did you mean 'maps'"):
            pack_zip(store, tmp_path / "out", streams=["map"])
        pack_zip(store, tmp_path / "out")
        with pytest.raises(StoreError, match="is there already"):
            pack_zip(store, tmp_path / "out")
    with open_store(make(tmp_path, "hdf5")) as store:
        with pytest.raises(StoreError, match="--h5"):
            pack_zip(store, tmp_path / "out")
        entry = next((tmp_path / "s-h5" / "s").glob("plain.h5"))
        entry.write_bytes(entry.read_bytes()[:-100])
        with pytest.raises(StoreError):
            pack_h5(store, tmp_path / "one.h5")
    assert not (tmp_path / "one.h5").exists()
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("kind", ["zarr", "hdf5"])
@pytest.mark.parametrize("format", ["npy", "npz"])
def test_exported_files_are_the_rows(kind: str, format: str, tmp_path: Path) -> None:
    with open_store(make(tmp_path, kind)) as store:
        report = export_features(store, "s", tmp_path / "out", format=format)
        assert sorted(report.written) == sorted(VIDEOS)
        index = {entry["video"]: entry for entry in json.loads((tmp_path / "out/index.json").read_text())}
        for number, video in enumerate(VIDEOS):
            entry = index[video]
            held = np.load(tmp_path / "out" / entry["file"])
            np.testing.assert_array_equal(held["feats"] if format == "npz" else held, rows(20 + number, seed=number))
            assert TimeAxis(entry["scale_s"], entry["translation_s"], entry["window_s"]) == store["s", video].axis
            assert (entry["rows"], entry["channels"], entry["fps"], entry["stride_frames"]) == (20 + number, 4, 30.0, 8)
        again = export_features(store, "s", tmp_path / "out", format=format)
        assert (again.written, sorted(again.already)) == ([], sorted(VIDEOS))
        few = export_features(store, "s", tmp_path / "few", format=format, videos=["plain"], layout="CT")
        assert few.written == ["plain"]
        held = np.load(tmp_path / "few" / f"plain.{format}")
        np.testing.assert_array_equal((held["feats"] if format == "npz" else held).T, rows(20))


def test_an_exported_stream_can_be_imported_again(tmp_path: Path) -> None:
    with open_store(make(tmp_path, "zarr")) as store:
        export_features(store, "s", tmp_path / "out", videos=["plain"])
        with open_store(tmp_path / "other.zarr", "a") as other:
            report = import_features(tmp_path / "out", other, "again", fps=30, window=32, stride=8, layout="TC")
            assert report.written == ["plain"]
            np.testing.assert_array_equal(other["again", "plain"].numpy(), store["s", "plain"].numpy())
            assert other["again", "plain"].axis == store["s", "plain"].axis


def test_maps_damage_and_unknown_names(tmp_path: Path) -> None:
    place = make(tmp_path, "zarr")
    with open_store(place) as store:
        export_features(store, "maps", tmp_path / "maps", level="s4")
        np.testing.assert_array_equal(np.load(tmp_path / "maps/plain.npy"), store["maps", "plain", "s4"].numpy())
        with pytest.raises(StoreError, match="channels x rows"):
            export_features(store, "maps", tmp_path / "ct", level="s4", layout="CT")
        with pytest.raises(StoreError, match="no video 'absent'"):
            export_features(store, "s", tmp_path / "x", videos=["absent"])
        for unknown in ("nothing", "map"):
            with pytest.raises(StoreError, match=unknown):
                export_features(store, unknown, tmp_path / "x")
    chunk = next((place / "s" / "plain" / "features").glob("c*"))
    chunk.write_bytes(chunk.read_bytes()[:-4])
    with open_store(place) as store:
        report = export_features(store, "s", tmp_path / "out")
        assert [video for video, _ in report.failures] == ["plain"]
        assert len(report.written) == 2
    assert not (tmp_path / "out/plain.npy").exists()


def test_on_the_command_line(tmp_path: Path) -> None:
    run = CliRunner()
    store = str(make(tmp_path, "zarr"))
    out = run.invoke(main, ["store", "export", store, str(tmp_path / "out"), "--stream", "s", "--json"])
    assert out.exit_code == 0, out.output
    assert len(json.loads(out.stdout)["written"]) == 3
    packed = run.invoke(main, ["store", "pack", store, "--zip", str(tmp_path / "zips"), "--stream", "s"])
    assert packed.exit_code == 0, packed.output
    assert "s.zarr.zip" in packed.stdout
    assert run.invoke(main, ["store", "pack", store]).exit_code == 2
    assert run.invoke(main, ["store", "pack", store, "--zip", str(tmp_path / "zips"), "--stream", "s"]).exit_code == 1
    one = run.invoke(main, ["store", "pack", str(make(tmp_path, "hdf5")), "--h5", str(tmp_path / "one.h5")])
    assert one.exit_code == 0, one.output
    assert (tmp_path / "one.h5").is_file()
    (tmp_path / "s.zarr" / "s" / "plain" / "features" / "zarr.json").write_text("{")
    damaged = run.invoke(main, ["store", "export", store, str(tmp_path / "two"), "--stream", "s"])
    assert damaged.exit_code == 3
