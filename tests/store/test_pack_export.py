"""Packed and exported stores hold what the store holds, readable without tad, whole or not there."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from zarr.storage import ZipStore

from tad.cli import main
from tad.errors import StoreError
from tad.store import Level, Store, exporters, import_features, open_store
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


def two_streams(folder: Path) -> Path:
    """``a`` and ``b`` on grids of their own, ``a`` with another frame rate in each video; ``maps`` has single rows."""
    with open_store(folder / "two.zarr", "a") as store:
        source = {"name": "v.mp4", "size": 1, "mtime_ns": 2}
        for stream, channels, stride in (("a", 4, 8), ("b", 3, 4)):
            store.create_stream(stream, {"stride": stride})
            for number, video in enumerate(VIDEOS):
                fps = 29.97 - number
                axis = TimeAxis.from_frames(fps=fps, window_frames=16, stride_frames=stride)
                held = Level(rows(10 + number, channels, seed=stride + number), axis, stride, 16, fps)
                store.write(stream, video, {"features": held}, duration_s=5.0 + number, source=source)
        store.create_stream("maps", {})
        for video, shape in (("one", (1, 1, 3, 5)), ("point", (6, 1, 1, 1))):
            array = np.random.default_rng(3).integers(0, 255, shape).astype("uint8")
            store.write("maps", video, {"s4": Level(array, AXIS)}, duration_s=4.0, source=source)
    return folder / "two.zarr"


def index_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["file"]: row for row in json.loads((folder / "index.json").read_text(encoding="utf-8"))}


def assert_true(folder: Path, store: Store) -> None:
    """Every file is listed, and holds what its row in the index says."""
    index = index_of(folder)
    assert set(index) == {path.name for path in folder.glob("*.np?")}
    for file, row in index.items():
        held = np.load(folder / file)
        held = held["feats"] if file.endswith(".npz") else held
        feature = store[row["stream"], row["video"], row["level"]]
        np.testing.assert_array_equal(held.T if row["layout"] == "CT" else held, feature.numpy())
        assert row["sha256"] == feature.attrs["sha256"][feature.level]
        assert (row["shape"], row["duration_s"]) == (list(feature.shape), feature.duration_s)
        assert TimeAxis(row["scale_s"], row["translation_s"], row["window_s"]) == feature.axis


def test_a_folder_that_holds_something_else_is_written_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_store(two_streams(tmp_path), "a") as store:
        for stream, layout in (("a", "TC"), ("b", "TC"), ("a", "TC"), ("a", "CT"), ("b", "CT"), ("b", "TC")):
            report = export_features(store, stream, out, layout=layout)
            assert (sorted(report.written), report.already, report.failures) == (sorted(VIDEOS), [], [])
            assert_true(out, store)
        assert sorted(export_features(store, "b", out).already) == sorted(VIDEOS)
        again = Level(rows(12, 3, seed=99), AXIS)  # a new version of one entry
        store.write("b", "plain", {"features": again}, duration_s=6.0, source={"name": "w.mp4"}, overwrite=True)
        report = export_features(store, "b", out)
        assert (report.written, len(report.already)) == (["plain"], 2)
        assert_true(out, store)
        again = Level(again.array, AXIS.shifted(1))  # the same rows, at another time
        store.write("b", "plain", {"features": again}, duration_s=7.0, source={"name": "w.mp4"}, overwrite=True)
        assert "plain" in export_features(store, "b", out).already
        assert_true(out, store)


def test_the_index_grows_with_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_store(two_streams(tmp_path)) as store:
        export_features(store, "a", out, videos=["plain"])
        export_features(store, "b", out, videos=[VIDEOS[1], VIDEOS[1]])
        assert export_features(store, "a", out, videos=["plain"], format="npz").written == ["plain"]
        assert set(index_of(out)) == {"plain.npy", "plain.npz", "a%2Fb ünï.npy"}
        assert_true(out, store)
        (out / "plain.npz").unlink()
        export_features(store, "a", out, videos=[])
        assert_true(out, store)


def test_an_index_of_an_earlier_version_is_not_trusted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_store(two_streams(tmp_path)) as store:
        export_features(store, "a", out)
        new = ("stream", "layout", "sha256")
        old = [{k: v for k, v in row.items() if k not in new} for row in index_of(out).values()]
        (out / "index.json").write_text(json.dumps(old))
        report = export_features(store, "a", out, videos=["plain"])
        assert (report.written, report.already) == (["plain"], [])
        index = index_of(out)
        assert len(index) == 3  # the others are there still
        assert index["plain.npy"]["stream"] == "a"
        assert index["%2Ehidden.npy"]["sha256"] is None
        assert len(export_features(store, "a", out).written) == 2
        assert_true(out, store)


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "plain.npy").write_bytes(b"mine")
    with open_store(two_streams(tmp_path)) as store:
        report = export_features(store, "a", out)
        assert len(report.written) == 2
        ((video, why),) = report.failures
        assert (video, "index.json does not list it" in why) == ("plain", True)
        assert (out / "plain.npy").read_bytes() == b"mine"
        assert "plain.npy" not in index_of(out)
        assert len(export_features(store, "a", out, overwrite=True).written) == 3
        assert_true(out, store)
        for foreign in ('{"x": 1}', '[{"video": "v", "file": "../v.npy", "scale_s": 1}]', "[1", "[null]"):
            (out / "index.json").write_text(foreign)
            with pytest.raises(StoreError, match=r"index of an export.*overwrite"):
                export_features(store, "a", out)
            assert (out / "index.json").read_text() == foreign
        export_features(store, "a", out, overwrite=True)
        assert_true(out, store)


def test_an_export_that_is_stopped_is_finished_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, calls, real = tmp_path / "out", [], exporters._write
    digests: list[list[str | None]] = []

    def stopped(path: Path, array: np.ndarray) -> None:
        digests.append([row["sha256"] for row in index_of(out).values()])
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(path)
        real(path, array)

    with open_store(two_streams(tmp_path)) as store:
        export_features(store, "a", out)
        with monkeypatch.context() as patch:
            patch.setattr(exporters, "_write", stopped)
            with pytest.raises(KeyboardInterrupt):
                export_features(store, "b", out)
        assert digests[0] == [None] * 3  # what kill -9 would leave: nothing that could be taken for done
        report = export_features(store, "b", out)
        assert (len(report.written), len(report.already)) == (2, 1)
        assert_true(out, store)


@pytest.mark.parametrize(("layout", "format"), [("TC", "npy"), ("CT", "npz")])
def test_what_was_exported_comes_back_with_ids_and_time_axes(tmp_path: Path, layout: Any, format: Any) -> None:
    out = tmp_path / "out"
    with open_store(two_streams(tmp_path)) as store, open_store(tmp_path / "back-h5", "a") as back:
        export_features(store, "a", out, layout=layout, format=format)
        report = import_features(out, back, "a")
        assert (sorted(report.written), report.skipped, report.warnings) == (sorted(VIDEOS), [], [])
        for video in VIDEOS:
            ours, theirs = store["a", video], back["a", video]
            np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
            assert (ours.axis, ours.duration_s) == (theirs.axis, theirs.duration_s)
            old, new = ours.attrs["levels"][0], theirs.attrs["levels"][0]
            assert [old[k] for k in ("fps", "stride_frames", "window_frames")] == [
                new[k] for k in ("fps", "stride_frames", "window_frames")
            ]
        assert sorted(import_features(out, back, "a").already) == sorted(VIDEOS)
        numbers = {"fps": 25, "window": 16, "stride": 8, "layout": layout}
        assert sorted(import_features(out, back, "by numbers", **numbers).written) == sorted(VIDEOS)
        assert back["by numbers", VIDEOS[1]].axis == TimeAxis(8 / 25, 8 / 25, 16 / 25)
        assert back["by numbers", VIDEOS[1]].duration_s == 6.0  # index.json knows it
        import_features(out, back, "c", durations={VIDEOS[1]: 6.5})
        assert [back["c", video].duration_s for video in VIDEOS] == [5.0, 6.5, 7.0]


def test_maps_come_back_in_their_shape(tmp_path: Path) -> None:
    with open_store(two_streams(tmp_path)) as store, open_store(tmp_path / "back.zarr", "a") as back:
        export_features(store, "maps", tmp_path / "out")
        assert import_features(tmp_path / "out", back, "maps").written == ["one", "point"]
        for video in ("one", "point"):
            assert back["maps", video].shape == store["maps", video].shape
            np.testing.assert_array_equal(back["maps", video].numpy(), store["maps", video].numpy())


def test_an_index_that_does_not_fit_is_not_believed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_store(two_streams(tmp_path)) as store, open_store(tmp_path / "back.zarr", "a") as back:
        export_features(store, "a", out)
        np.save(out / "plain.npy", rows(10, 4, seed=77))
        np.save(out / "stranger.npy", rows(9, 4))
        index = index_of(out)
        index["%2Ehidden.npy"]["scale_s"] = -1
        (out / "index.json").write_text(json.dumps(list(index.values())))
        report = import_features(out, back, "a")
        assert report.written == [VIDEOS[1]]
        whys = dict(report.skipped)
        assert "SHA-256 differs" in whys["plain.npy"]
        assert all("does not tell its time axis" in whys[name] for name in ("stranger.npy", "%2Ehidden.npy"))
        assert len(import_features(out, back, "n", fps=30, window=16, stride=8).written) == 4
        index[f"{VIDEOS[1]}.npy".replace("/", "%2F")]["translation_s"] += 1  # a corrected axis is no "already"
        (out / "index.json").write_text(json.dumps(list(index.values())))
        assert "time axis" in dict(import_features(out, back, "a").skipped)["a%2Fb ünï.npy"]
        for row in index.values():
            del row["sha256"]  # as earlier versions wrote it: ids are known, axes are not
        (out / "index.json").write_text(json.dumps(list(index.values())))
        with pytest.raises(StoreError, match="fps is needed"):
            import_features(out, back, "old")
        assert VIDEOS[1] in import_features(out, back, "old", fps=30, window=16, stride=8).written
        export_features(store, "a", tmp_path / "both", videos=["plain"])
        export_features(store, "b", tmp_path / "both", videos=[VIDEOS[1]])
        with pytest.raises(StoreError, match=r"several streams \(a/features, b/features\)"):
            import_features(tmp_path / "both", back, "both")
        (out / "index.json").write_text("{}")  # of something else: a file among files
        assert "index.json" in dict(import_features(out, back, "foreign", fps=30, window=16, stride=8).skipped)


def test_an_unknown_level_is_an_error_and_makes_no_folder(tmp_path: Path) -> None:
    place = make(tmp_path, "zarr")
    with open_store(place, "a") as store:
        source = {"name": "w.mp4", "size": 1, "mtime_ns": 2}
        store.write("maps", "absent s4", {"s2": level(rows(12))}, duration_s=9.0, source=source)
        for stream, wanted in (("maps", "s5"), ("s", "s4")):
            with pytest.raises(StoreError, match=f"has no level '{wanted}', only "):
                export_features(store, stream, tmp_path / "x", level=wanted)
        with pytest.raises(StoreError, match="channels x rows"):
            export_features(store, "maps", tmp_path / "x", videos=["plain"], level="s4", layout="CT")
        assert not (tmp_path / "x").exists()
        (place / "maps" / "absent s4" / "zarr.json").write_text("{")  # the first entry that can be read decides
        with pytest.raises(StoreError, match="has no level 's5', only s2, s4"):
            export_features(store, "maps", tmp_path / "x", level="s5")
        report = export_features(store, "maps", tmp_path / "x", level="s4")
        assert (report.written, [video for video, _ in report.failures]) == (["plain"], ["absent s4"])


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


def test_the_command_line_imports_what_it_exported(tmp_path: Path) -> None:
    run, out, back = CliRunner(), tmp_path / "out", tmp_path / "back"
    store = str(two_streams(tmp_path))
    assert run.invoke(main, ["store", "export", store, str(out), "--stream", "a"]).exit_code == 0
    done = run.invoke(main, ["store", "import", str(out), "--store", str(back), "--stream", "a", "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert sorted(shown.pop("written")) == sorted(VIDEOS)
    assert shown == {"already": [], "skipped": [], "warnings": []}
    partly = ["store", "import", str(out), "--store", str(back), "--stream", "a", "--fps", "30"]
    assert run.invoke(main, partly).exit_code == 2
    unknown = run.invoke(main, ["store", "export", store, str(tmp_path / "no"), "--stream", "a", "--level", "s9"])
    assert (unknown.exit_code, unknown.stdout) == (1, "")
    assert "no level 's9', only features" in unknown.stderr
    assert not (tmp_path / "no").exists()
