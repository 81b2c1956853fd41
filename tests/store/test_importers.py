"""Feature files of other projects, as they are found in the wild."""

import json
import os
import pickle
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from tad.errors import StoreError
from tad.store import ImportReport, Store, import_features, open_store
from tad.timeline import TimeAxis
from tests.store.makers import rows

GRID: dict[str, Any] = {"fps": 30, "window": 32, "stride": 8}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "store.zarr", "a") as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "features"
    made.mkdir()
    return made


def why(report: ImportReport, file: str) -> str:
    """The reason for which ``file`` was skipped."""
    (reason,) = [reason for name, reason in report.skipped if name == file]
    return reason


def test_a_folder_of_npy(store: Store, folder: Path) -> None:
    for number in range(5):
        np.save(folder / f"video_{number}.npy", rows(10 + number, 6, seed=number))
    report = import_features(folder, store, "rgb", **GRID)
    assert report.written == [f"video_{number}" for number in range(5)]
    assert (report.already, report.skipped, report.warnings) == ([], [], [])
    assert store.stream_attrs("rgb")["spec"] == {
        "imported": True,
        "fps": 30.0,
        "window": 32.0,
        "stride": 8.0,
        "offset": 0.0,
        "rescaled": False,
    }
    for number in range(5):
        feature = store["rgb", f"video_{number}"]
        np.testing.assert_array_equal(feature.numpy(), rows(10 + number, 6, seed=number))
        assert feature.axis == TimeAxis(8 / 30, 16 / 30, 32 / 30)
        assert feature.duration_s == ((9 + number) * 8 + 32) / 30
        (level,) = feature.attrs["levels"]
        assert (level["stride_frames"], level["window_frames"], level["fps"]) == (8, 32, 30)
        assert feature.attrs["source"]["name"] == f"video_{number}.npy"
    assert store.verify(deep=True).ok
    assert report.to_dict()["written"] == report.written
    json.dumps(report.to_dict())


def test_the_planted_benchmark(store: Store, folder: Path, shared: Path) -> None:
    planted = runpy.run_path(str(shared / "bench" / "planted.py"))
    planted["make"](folder, train=6, test=3, rows=(40, 90), channels=16)
    truth = json.loads((folder / "annotations.json").read_text())["database"]
    for stream in ("rgb", "flow"):
        report = import_features(folder / stream, store, stream, **GRID)
        assert (len(report.written), report.skipped) == (9, [])
    for video, about in truth.items():
        feature = store["rgb", video]
        np.testing.assert_array_equal(feature.numpy(), np.load(folder / "rgb" / f"{video}.npy"))
        assert feature.duration_s == pytest.approx(about["duration"], abs=5e-4)
        assert feature.axis.center_s(3) == pytest.approx((3 * 8 + 16) / 30)  # as its docstring says
    # with the annotations' durations, nothing is off
    durations = {video: about["duration"] for video, about in truth.items()}
    report = import_features(folder / "rgb", store, "again", durations=durations, **GRID)
    assert report.warnings == []


def test_importing_again(store: Store, folder: Path) -> None:
    for number in range(3):
        np.save(folder / f"v{number}.npy", rows(10 + number, 6, seed=number))
    import_features(folder, store, "rgb", **GRID)
    before = store.attrs("rgb", "v1")
    report = import_features(folder, store, "rgb", **GRID)
    assert (report.written, report.already, report.skipped) == ([], ["v0", "v1", "v2"], [])
    os.utime(folder / "v1.npy", (1, 1))  # copied, say: the same features
    assert import_features(folder, store, "rgb", **GRID).already == ["v0", "v1", "v2"]
    assert store.attrs("rgb", "v1") == before
    np.save(folder / "v1.npy", rows(17, 6, seed=9))
    np.save(folder / "v9.npy", rows(5, 6, seed=9))
    report = import_features(folder, store, "rgb", **GRID)
    assert (report.written, report.already) == (["v9"], ["v0", "v2"])
    assert "the store has other features of this video; overwrite replaces them" in why(report, "v1.npy")
    assert store["rgb", "v1"].shape == (11, 6)
    report = import_features(folder, store, "rgb", overwrite=True, **GRID)
    assert report.written == ["v1"]
    assert store["rgb", "v1"].shape == (17, 6)


@pytest.mark.parametrize("grid", [{"rescaled": True}, GRID])
def test_a_corrected_duration_is_not_there_already(store: Store, folder: Path, grid: dict[str, Any]) -> None:
    for number in range(2):
        np.save(folder / f"v{number}.npy", rows(100, 6, seed=number))
    grid = {"layout": "TC"} | grid
    import_features(folder, store, "s", durations={"v0": 10.0, "v1": 26.0}, **grid)
    right = {"v0": 27.0, "v1": 26.0}
    report = import_features(folder, store, "s", durations=right, **grid)
    assert (report.written, report.already) == ([], ["v1"])
    assert "another duration" in why(report, "v0.npy")
    assert "overwrite" in why(report, "v0.npy")
    assert store["s", "v0"].duration_s == 10.0
    assert import_features(folder, store, "s", durations=right, overwrite=True, **grid).written == ["v0"]
    assert store["s", "v0"].duration_s == 27.0
    assert store["s", "v0"].axis.scale_s == pytest.approx(0.27 if "rescaled" in grid else 8 / 30)
    assert import_features(folder, store, "s", **grid).already == ["v0", "v1"]  # none is given


def test_a_video_that_would_end_before_it_starts_stops_nothing(store: Store, folder: Path) -> None:
    for number in range(3):
        np.save(folder / f"v{number}.npy", rows(1 if number == 1 else 10, 6))
    report = import_features(folder, store, "s", layout="TC", fps=30, window=16, stride=16, offset=-16)
    assert report.written == ["v0", "v2"]
    assert "1 rows, which end at 0.0 seconds" in why(report, "v1.npy")


def test_a_damaged_entry_is_imported_again_when_told_so(store: Store, folder: Path, tmp_path: Path) -> None:
    for number in range(2):
        np.save(folder / f"v{number}.npy", rows(10 + number, 6))
    import_features(folder, store, "s", **GRID)
    (tmp_path / "store.zarr" / "s" / "v1" / "zarr.json").write_text("{")
    assert [name for name, _ in import_features(folder, store, "s", **GRID).skipped] == ["v1.npy"]
    assert import_features(folder, store, "s", overwrite=True, **GRID).written == ["v1"]
    assert store.verify(deep=True).ok


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"stride": 4}, "stride: stored 8.0, now 4.0"),
        ({"fps": 25}, "fps: stored 30.0, now 25.0"),
        ({"window": 16}, "window: stored 32.0, now 16.0"),
        ({"offset": 8}, "offset: stored 0.0, now 8.0"),
        ({"rescaled": True}, "rescaled: stored false, now true"),
    ],
)
def test_other_numbers_are_refused(store: Store, folder: Path, change: dict[str, Any], told: str) -> None:
    for number in range(2):
        np.save(folder / f"v{number}.npy", rows(10 + number, 6))
    import_features(folder, store, "rgb", **GRID)
    with pytest.raises(StoreError, match=told):
        import_features(folder, store, "rgb", **(GRID | change))
    import_features(folder, store, "other", **(GRID | {"stride": 4}))


def test_an_import_that_wrote_nothing_binds_nothing(store: Store, folder: Path) -> None:
    (folder / "bad.npy").write_bytes(b"x")
    np.save(folder / "nan.npy", np.full((3, 2), np.nan))
    report = import_features(folder, store, "rgb", layout="TC", fps=30, window=32, stride=4)
    assert report.written == []
    assert store.streams() == []
    np.save(folder / "good.npy", rows(3, 2))
    assert import_features(folder, store, "rgb", layout="TC", **GRID).written == ["good"]


def test_every_kind_of_file(store: Store, folder: Path) -> None:
    array = rows(7, 5, dtype="float64")
    np.save(folder / "npy.npy", array)
    np.savez(folder / "feats.npz", feats=array, other=np.zeros(3))
    np.savez_compressed(folder / "single.npz", array)
    torch.save(torch.from_numpy(array), folder / "tensor.pt")
    torch.save({"feats": torch.from_numpy(array).bfloat16(), "x": 1}, folder / "bf16.pt")
    torch.save(torch.from_numpy(array).requires_grad_(), folder / "grad.pth")
    np.savetxt(folder / "names.csv", array, delimiter=",", header=",".join(f"f{i}" for i in range(5)), comments="")
    np.savetxt(folder / "numbers.csv", array, delimiter=",", header="0,1,2,3,4", comments="")
    np.savetxt(folder / "bare.csv", array, delimiter=",")
    with (folder / "index.csv").open("w") as file:
        file.write(
            ",0,1,2,3,4\n" + "".join(f"{i}," + ",".join(map(repr, map(float, r))) + "\n" for i, r in enumerate(array))
        )
    with (folder / "trusted.pkl").open("wb") as file:
        pickle.dump({"feats": array}, file)
    np.save(folder / "squeezed.npy", array[:, :, None, None])
    np.save(folder / "batched.npy", array[None])
    np.save(folder / "fortran.npy", np.asfortranarray(array))
    np.save(folder / "big_endian.npy", array.astype(">f8"))
    report = import_features(folder, store, "s", layout="TC", allow_pickle=True, **GRID)
    assert report.skipped == []
    assert len(report.written) == 15
    for video in store.videos("s"):
        kind = store.attrs("s", video)["source"]["name"]
        rough = 1e-2 if kind == "bf16.pt" else 1e-6 if kind.endswith(".csv") else 0
        np.testing.assert_allclose(store["s", video].numpy(), array, rtol=rough, atol=0)
    assert store["s", "npy"].dtype == np.float64
    assert store["s", "names"].dtype == np.float32


def test_one_hdf5_file_with_a_key_per_video(store: Store, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file["v_one"] = rows(9, 4)
        file["v_two"] = rows(7, 4)
        file["v_group/features"] = rows(5, 4)
        file["v_many/a"], file["v_many/b"] = rows(5, 4), rows(5, 4)
        file["v_text"] = "hello"
        file["other"] = rows(3, 4)
    report = import_features(tmp_path / "all.h5", store, "tsn", prefix="v_", **GRID)
    assert report.written == ["group", "one", "two"]
    np.testing.assert_array_equal(store["tsn", "two"].numpy(), rows(7, 4))
    assert store.attrs("tsn", "one")["source"]["name"] == "all.h5:v_one"
    assert {name for name, _ in report.skipped} == {"all.h5:v_many", "all.h5:v_text", "all.h5:other"}
    assert import_features(tmp_path / "all.h5", store, "tsn", prefix="v_", **GRID).already == report.written


def test_prefix_and_suffix(store: Store, folder: Path) -> None:
    for number in range(2):
        torch.save(torch.from_numpy(rows(9 + number, 4)), folder / f"v_abc{number}_pool.pt")
    torch.save(torch.from_numpy(rows(9, 4)), folder / "v_abc.pt")
    np.save(folder / "v__pool.npy", rows(9, 4))
    report = import_features(folder, store, "s", prefix="v_", suffix="_pool", **GRID)
    assert report.written == ["abc0", "abc1"]
    assert why(report, "v_abc.pt") == "its name is not v_ID_pool"
    assert why(report, "v__pool.npy") == "its name is not v_ID_pool"


def test_bad_files_are_listed_and_stop_nothing(store: Store, folder: Path) -> None:
    good = rows(9, 4)
    np.save(folder / "good.npy", good)
    np.save(folder / "good2.npy", good[:5])
    np.save(folder / "good3.npy", good[:4])
    np.save(folder / "good4.npy", good[:3])
    np.save(folder / "nan.npy", np.where(np.arange(36).reshape(9, 4) == 21, np.nan, good))
    np.save(folder / "wide.npy", rows(9, 5))
    np.save(folder / "flat.npy", np.zeros(9))
    np.save(folder / "maps.npy", np.zeros((9, 4, 7, 7)))
    np.save(folder / "none.npy", np.zeros((0, 4)))
    np.save(folder / "words.npy", np.array([["a", "b"]]))
    np.save(folder / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(folder / "two.npz", a=good, b=good)
    np.savez(folder / "good.npz", good)
    np.save(folder / ("long" * 60 + ".npy"), good)
    (folder / "cut.npy").write_bytes((folder / "good.npy").read_bytes()[:100])
    (folder / "empty.npy").write_bytes(b"")
    (folder / "noise.npz").write_bytes(b"noise")
    (folder / "noise.pt").write_bytes(b"noise")
    (folder / "noise.csv").write_text("a,b\n1,x\n")
    (folder / "header.csv").write_text("a,b\n")
    (folder / "uneven.csv").write_text("a,b,c,d\n1,2,3,4\n1,2\n")
    (folder / "missing_files.txt").write_text("v_1\n")
    (folder / "evil.pkl").write_bytes(pickle.dumps(good))
    torch.save({"code": _Evil()}, folder / "evil.pt")
    (folder / "sub").mkdir()
    (folder / "good.mp4").write_bytes(b"the video itself")  # in front of good.npy, and not in its way
    report = import_features(folder, store, "s", **GRID)
    assert sorted(report.written) == ["good", "good2", "good3", "good4"]
    assert len(report.skipped) == 22
    assert why(report, "good.npz") == "is the same video as good.npy"
    assert "row 5 of 9 holds NaN or infinity" in why(report, "nan.npy")
    assert why(report, "wide.npy") == "has 5 channels, the stream has 4"
    assert why(report, "flat.npy").startswith("has the shape (9,); expected rows and channels")
    assert why(report, "maps.npy") == "has the shape (9, 4, 7, 7), the stream has no maps"
    assert "is empty" in why(report, "none.npy")
    assert "not numbers" in why(report, "words.npy")
    assert "allow_pickle" in why(report, "objects.npy")
    assert "none of them called 'feats'" in why(report, "two.npz")
    assert "takes 240 bytes" in why(report, "long" * 60 + ".npy")
    assert why(report, "header.csv") == "has no rows below its header"
    assert "is of a kind that is not read; known are .npy" in why(report, "missing_files.txt")
    assert "can run any code" in why(report, "evil.pkl")
    assert "weights_only" in why(report, "evil.pt")
    assert "a folder" in why(report, "sub")
    assert not _Evil.ran
    for _, reason in report.skipped:
        assert "\n" not in reason
    assert store.verify(deep=True).ok


class _Evil:
    """What a hostile pickle does when it is loaded."""

    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (_Evil, "ran", True)


# ---- which axis is time ----------------------------------------------------------------------------------------------
def test_channels_first_is_seen_in_the_shapes(store: Store, folder: Path) -> None:
    for number in range(4):
        np.save(folder / f"v{number}.npy", rows(10 + number, 6, seed=number).T)
    import_features(folder, store, "s", **GRID)
    for number in range(4):
        np.testing.assert_array_equal(store["s", f"v{number}"].numpy(), rows(10 + number, 6, seed=number))


@pytest.mark.parametrize("turned", [False, True])
def test_one_odd_file_does_not_turn_the_rest(store: Store, folder: Path, turned: bool) -> None:
    for number in range(8):
        array = rows(10 + number, 6) if number != 3 else rows(6, 13)
        np.save(folder / f"v{number}.npy", array.T if turned else array)
    report = import_features(folder, store, "s", **GRID)
    assert len(report.written) == 7
    assert report.skipped == [("v3.npy", "has 13 channels, the stream has 6")]


def test_an_odd_file_in_front_does_not_set_the_channels(store: Store, folder: Path) -> None:
    for number in range(8):
        np.save(folder / f"v{number}.npy", rows(6, 13) if number == 0 else rows(10 + number, 6))
    report = import_features(folder, store, "s", layout="TC", **GRID)
    assert len(report.written) == 7
    assert report.skipped == [("v0.npy", "has 13 channels, the stream has 6")]


@pytest.mark.parametrize("count", [1, 3])
def test_an_open_question_is_refused(store: Store, folder: Path, count: int) -> None:
    for number in range(count):
        np.save(folder / f"v{number}.npy", rows(100, 400))
    with pytest.raises(StoreError, match=r"cannot be told from the shapes \(v0.npy \(100, 400\).*layout='TC'"):
        import_features(folder, store, "s", **GRID)
    assert store.streams() == []
    assert import_features(folder, store, "tc", layout="TC", **GRID).skipped == []
    assert store["tc", "v0"].shape == (100, 400)
    assert import_features(folder, store, "ct", layout="CT", **GRID).skipped == []
    np.testing.assert_array_equal(store["ct", "v0"].numpy(), rows(100, 400).T)


def test_durations_answer_it(store: Store, folder: Path) -> None:
    np.save(folder / "v.npy", rows(40, 100).T)
    import_features(folder, store, "s", durations={"v": (39 * 8 + 32) / 30 + 0.2}, **GRID)
    np.testing.assert_array_equal(store["s", "v"].numpy(), rows(40, 100))
    assert store["s", "v"].duration_s == (39 * 8 + 32) / 30 + 0.2


def test_the_channels_of_the_stream_answer_it(store: Store, folder: Path) -> None:
    for number in range(3):
        np.save(folder / f"v{number}.npy", rows(10 + number, 6))
    import_features(folder, store, "s", **GRID)
    for path in folder.iterdir():
        path.unlink()
    np.save(folder / "new.npy", rows(50, 6).T)
    assert import_features(folder, store, "s", **GRID).written == ["new"]
    assert store["s", "new"].shape == (50, 6)


def test_csv_is_always_rows_by_channels(store: Store, folder: Path) -> None:
    np.savetxt(folder / "v.csv", rows(3, 9), delimiter=",", header=",".join("abcdefghi"), comments="")
    assert import_features(folder, store, "s", **GRID).written == ["v"]
    assert store["s", "v"].shape == (3, 9)
    assert import_features(folder, store, "t", layout="CT", **GRID).written == ["v"]
    assert store["t", "v"].shape == (3, 9)


# ---- time ------------------------------------------------------------------------------------------------------------
def test_offset(store: Store, folder: Path) -> None:
    np.save(folder / "v.npy", rows(5, 3))
    import_features(folder, store, "s", layout="TC", fps=25, window=16, stride=4, offset=10)
    assert store["s", "v"].axis == TimeAxis(4 / 25, (10 + 8) / 25, 16 / 25)
    assert store["s", "v"].duration_s == (10 + 4 * 4 + 16) / 25


def test_rescaled(store: Store, folder: Path) -> None:
    for video in ("a", "b", "c"):
        np.savetxt(folder / f"v_{video}.csv", rows(100, 4), delimiter=",", header="0,1,2,3", comments="")
    durations = {"a": 50.0, "b": 0.0}
    report = import_features(folder, store, "bmn", rescaled=True, durations=durations, prefix="v_")
    assert report.written == ["a"]
    assert store["bmn", "a"].axis == TimeAxis(0.5, 0.25, 0.5)
    assert store["bmn", "a"].duration_s == 50.0
    assert store.attrs("bmn", "a")["levels"][0]["stride_frames"] is None
    assert "duration is given as 0.0" in why(report, "v_b.csv")
    assert "none is given for this one" in why(report, "v_c.csv")
    assert store.stream_attrs("bmn")["spec"]["rescaled"] is True


def test_lengths_that_do_not_fit_are_warned_about(store: Store, folder: Path) -> None:
    for video, count in (("fits", 100), ("two", 102), ("half", 50)):
        np.save(folder / f"{video}.npy", rows(count, 7))
    durations = dict.fromkeys(("fits", "two", "half"), (99 * 8 + 32) / 30)
    report = import_features(folder, store, "s", durations=durations, **GRID)
    assert sorted(report.written) == ["fits", "half", "two"]
    assert [(name, why.startswith("has 50 rows, its duration of 27.4")) for name, why in report.warnings] == [
        ("half.npy", True)
    ]


@pytest.mark.parametrize(
    "grid",
    [{}, {"fps": 30}, GRID | {"fps": 0}, GRID | {"stride": -1}, GRID | {"layout": "XY"}, GRID | {"fps": float("nan")}],
)
def test_numbers_that_mean_nothing(store: Store, folder: Path, grid: dict[str, Any]) -> None:
    np.save(folder / "v.npy", rows(5, 3))
    with pytest.raises(StoreError):
        import_features(folder, store, "s", **({"layout": "TC"} | grid))
    assert store.streams() == []


def test_nothing_to_import(store: Store, folder: Path) -> None:
    with pytest.raises(StoreError, match="holds nothing to import"):
        import_features(folder, store, "s", **GRID)
    with pytest.raises(StoreError, match="no such file or folder"):
        import_features(folder / "nope", store, "s", **GRID)
    (folder / "x.h5").write_bytes(b"noise")
    with pytest.raises(StoreError, match="cannot be opened as HDF5"):
        import_features(folder / "x.h5", store, "s", **GRID)


def test_one_file(store: Store, folder: Path) -> None:
    np.save(folder / "v.npy", rows(5, 3))
    assert import_features(folder / "v.npy", store, "s", layout="TC", **GRID).written == ["v"]


def test_real_files(store: Store, shared: Path) -> None:
    source = shared / "data" / "mmaction2_localization" / "activitynet_features"
    report = import_features(source, store, "tsn", rescaled=True, durations={"v_test1": 1.0, "v_test2": 2.0})
    assert report.written == ["v_test1", "v_test2"]
    expected = np.loadtxt(source / "v_test1.csv", delimiter=",", skiprows=1, dtype=np.float32)
    np.testing.assert_array_equal(store["tsn", "v_test1"].numpy(), expected)
    assert store["tsn", "v_test1"].shape == (5, 400)
    assert store["tsn", "v_test2"].axis == TimeAxis(0.4, 0.2, 0.4)
