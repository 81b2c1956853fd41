"""What the doctor notices: each defect is made, and must be named; nothing is said about what is well."""

from __future__ import annotations

import errno
import fcntl
import gzip
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from email.message import Message
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from tad.annotations import Truth, read_truth, training_subset
from tad.cli import main
from tad.detect import preflight, runs
from tad.detect.detectors import build_detector
from tad.detect.runs import Run
from tad.doctor import Check, doctor
from tad.doctor.environment import check_environment
from tad.doctor.features import check_coverage
from tad.doctor.packages import check_packages
from tad.doctor.truth import check_truth
from tad.errors import RecipeError
from tad.extract.video import VideoInfo
from tad.store import Level, open_store
from tad.timeline import TimeAxis
from tests.detect.toydetector import AXIS, toy_recipe


def by_name(checks: list[Check], group: str) -> dict[str, Check]:
    return {check.name: check for check in checks if check.group == group}


def write_truth(path: Path, database: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"database": database}))
    return path


def entry(*segments: tuple[float, float, str], subset: str = "training", duration: float = 60.0, **more: Any) -> dict:
    return {
        "subset": subset,
        "duration": duration,
        "annotations": [{"segment": [start, end], "label": label} for start, end, label in segments],
        **more,
    }


def many(label: str = "run") -> list[tuple[float, float, str]]:
    return [(5.0 * i, 5.0 * i + 3, label) for i in range(6)]


def write_store(path: Path, durations: dict[str, float], *, stride: int = 8, stream: str = "s") -> Path:
    """One row every ``stride`` frames at 25 fps until the duration's end."""
    with open_store(path, "a") as store:
        store.create_stream(stream, {"imported": True, "backbone": "x"})
        axis = TimeAxis.from_frames(fps=25, window_frames=16, stride_frames=stride)
        for video, duration_s in durations.items():
            rows = max(1, int(duration_s * 25 / stride))
            level = Level(np.ones((rows, 4), np.float32), axis, stride, 16, 25.0, None)
            source = {"name": f"{video}.mp4", "size": 1, "mtime_ns": 1}
            store.write(stream, video, {"features": level}, duration_s=duration_s, source=source)
    return path


def test_this_machine_can_run_tad(tmp_path: Path) -> None:
    checks = by_name(check_environment(tmp_path / "not" / "yet.zarr"), "environment")
    assert not [check for check in checks.values() if check.status == "fail"]
    assert "torch" in checks["packages"].message
    assert str(tmp_path) in checks["locks"].message
    assert not list(tmp_path.iterdir())  # the probe leaves nothing


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the system's answers are put in its mouth."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    assert by_name(check_environment(tmp_path), "environment")["locks"].status == "fail"
    monkeypatch.undo()

    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    check = by_name(check_environment(tmp_path), "environment")["locks"]
    assert check.status == "warn"
    assert "HDF5_USE_FILE_LOCKING" in check.advice
    assert not list(tmp_path.iterdir())


def test_it_runs_with_packages_missing() -> None:
    """Every library that can be missing is hidden; the doctor says so instead of falling over."""
    code = """
import sys, importlib.metadata as metadata
hidden = {"torch", "numpy", "cv2", "pandas", "zarr", "h5py", "dask", "scipy", "pydantic", "yaml", "safetensors", "rich"}
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
real = metadata.version
def version(name):
    if name in ("torch", "opencv-python-headless"):
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
from tad.cli import main
main(["doctor", "--json"])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 1, out.stderr
    failed = {check["name"]: check for check in json.loads(out.stdout)["checks"] if check["status"] == "fail"}
    assert set(failed) == {"packages missing", "torch", "decoder"}
    assert "opencv-python-headless" in failed["packages missing"]["advice"]


def test_clean_annotations_are_clean(tmp_path: Path) -> None:
    path = write_truth(tmp_path / "t.json", {"a": entry(*many()), "b": entry((1, 9, "run"), subset="validation")})
    checks = [check for check in doctor(annotations=path) if check.group == "annotations"]
    assert {check.status for check in checks} == {"ok"}
    assert "2 videos" in checks[0].message


@pytest.mark.parametrize(
    ("name", "segments", "words"),
    [
        ("beyond the end", [(50.0, 75.0, "run")], "a 50.0–75.0"),
        ("duplicates", [(40.0, 45.0, "run"), (40.0, 45.0, "run")], "1 segments occur twice"),
        ("zero length", [(40.0, 40.0, "run")], "a 40.0–40.0"),
        ("same class overlaps", [(2.0, 4.0, "run")], "1 segments overlap"),
        ("double labels", [(0.0, 3.0, "walk")], "run + walk (1)"),
        ("whole video", [(0.0, 60.0, "live")], "cover their whole video"),
        ("spelling", [(40.0, 45.0, "Run ")], "Run "),
        ("rare classes", [(40.0, 45.0, "hop")], "hop (1)"),
    ],
)
def test_lint_of_segments(name: str, segments: list, words: str, tmp_path: Path) -> None:
    path = write_truth(tmp_path / "t.json", {"a": entry(*many(), *segments)})
    checks = by_name(doctor(annotations=path), "annotations")
    assert checks[name].status in ("warn", "note")
    assert words in checks[name].message
    assert "segments" not in checks or name in ("double labels", "whole video", "spelling", "rare classes")


def test_touching_segments_do_not_overlap(tmp_path: Path) -> None:
    path = write_truth(
        tmp_path / "t.json", {"a": entry((0, 3, "x"), (3, 5, "x"), (5, 9, "x"), (9, 10, "x"), (11, 12, "x"))}
    )
    assert "same class overlaps" not in by_name(doctor(annotations=path), "annotations")


def test_classes_that_cannot_be_learnt(tmp_path: Path) -> None:
    path = write_truth(tmp_path / "t.json", {"a": entry(*many()), "b": entry((1, 2, "fly"), subset="test")})
    assert "fly" in by_name(doctor(annotations=path), "annotations")["classes"].message


def test_unreadable_things_are_failed_checks(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{")
    checks = doctor(annotations=tmp_path / "t.json", store=tmp_path / "none.zarr", run=tmp_path, videos=tmp_path)
    failed = {check.group for check in checks if check.status == "fail"}
    assert {"annotations", "store", "videos"} <= failed
    assert [check.status for check in doctor(run=tmp_path) if check.group == "run"] == ["fail"]


def test_a_store_that_fits(tmp_path: Path) -> None:
    truth = write_truth(tmp_path / "t.json", {"a": entry(*many()), "b": entry((50, 60, "run"), subset="validation")})
    store = write_store(tmp_path / "s.zarr", {"a": 60.0, "b": 60.0})
    checks = [check for check in doctor(annotations=truth, store=store) if check.group == "store"]
    assert {check.status for check in checks} == {"ok"}, checks
    assert {check.name for check in checks} == {"content", "damage", "ids", "coverage"}


def test_ids_durations_coverage_and_tiny_segments(tmp_path: Path) -> None:
    database = {
        "a": entry(*many(), (58.0, 59.0, "run")),
        "b": entry((0.0, 0.1, "run"), duration=30.0),
        "c": entry(*many()),
    }
    truth = write_truth(tmp_path / "t.json", database)
    store = write_store(tmp_path / "s.zarr", {"a": 40.0, "b": 30.0, "x": 5.0})
    checks = by_name(doctor(annotations=truth, store=store), "store")
    assert "1 of 3 annotated videos are not in s (training 1): c" in checks["ids"].message
    assert "x" in checks["ids extra"].message
    assert "a 40.0 s against 60.0 s" in checks["durations"].message
    assert "1 segments begin behind the last row" in checks["coverage"].message
    assert "1 segments" in checks["tiny segments"].message


def test_prefixes_and_damage_fail(tmp_path: Path) -> None:
    truth = write_truth(tmp_path / "t.json", {"v_a": entry(*many())})
    store = write_store(tmp_path / "s.zarr", {"a": 60.0})
    assert by_name(doctor(annotations=truth, store=store), "store")["ids"].status == "fail"
    entry_file = next(file for file in store.rglob("zarr.json") if file.parent.name == "a")
    entry_file.write_text("{")
    assert by_name(doctor(store=store), "store")["damage"].status == "fail"


def test_streams_with_other_videos(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s.zarr", {"a": 60.0, "b": 60.0}, stream="rgb")
    write_store(store, {"a": 60.0}, stream="flow")
    assert "1 videos of rgb" in by_name(doctor(store=store), "store")["streams"].message


def test_videos_against_annotations(tmp_path: Path) -> None:
    from tad.synth import make_videos

    made = make_videos(tmp_path / "v", videos=1, duration_s=(5.0, 5.0), action_s=(1.0, 2.0))
    truth = json.loads((tmp_path / "v/annotations.json").read_text())["database"]
    (video,) = truth
    truth[video]["duration"] = 60.0
    truth["elsewhere"] = truth[video]
    (tmp_path / "v/videos/junk.mp4").write_bytes(b"no video")
    checks = by_name(
        doctor(annotations=write_truth(tmp_path / "t.json", truth), videos=tmp_path / "v/videos"), "videos"
    )
    assert "1 of 2 cannot be opened" in checks["readable"].message
    assert "elsewhere" in checks["files"].message
    assert "junk" in checks["files extra"].message
    assert video in checks["durations"].message
    assert made


def test_exit_status_and_text(tmp_path: Path) -> None:
    good = write_truth(tmp_path / "t.json", {"a": entry(*many())})
    run = CliRunner()
    assert run.invoke(main, ["doctor", "--annotations", str(good)]).exit_code == 0
    bad = run.invoke(main, ["doctor", "--annotations", str(tmp_path / "none.json")])
    assert bad.exit_code == 1
    assert "FAIL" in bad.stdout
    assert "none.json" in bad.stdout


# ---- places where nothing may be written -----------------------------------------------------------------------------
def refuse_to_write(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Root may write anywhere, so the system's answers are put in its mouth; returns where was written."""
    asked: list[str] = []

    def mkdtemp(suffix: str | None = None, prefix: str | None = None, dir: Any = None) -> str:
        asked.append(str(dir))
        raise OSError(number, os.strerror(number))  # the subclass that belongs to the number, PermissionError of EACCES

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    return asked


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("name", ["s.zarr", "s-h5"])
def test_a_store_that_can_only_be_read_is_no_failure(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_store(tmp_path / name, {"a": 60.0})
    asked = refuse_to_write(monkeypatch, number)
    environment = by_name(checks := doctor(store=store), "environment")
    assert not [check for check in checks if check.status in ("warn", "fail")]
    assert environment["locks"].status == environment["store writable"].status == "note"
    assert asked == [str(tmp_path)]


def test_nothing_is_written_into_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_store(tmp_path / "s.zarr", {"a": 60.0})
    real, asked = tempfile.mkdtemp, []
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *a, **k: (asked.append(a), real(*a, **k))[1])
    environment = by_name(doctor(store=store), "environment")
    assert [str(a[2]) for a in asked] == [str(tmp_path)]
    assert environment["locks"].status == "ok"
    assert "store writable" not in environment
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_store_that_cannot_be_made(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_write(monkeypatch, number)
    assert by_name(doctor(store=tmp_path / "new.zarr"), "environment")["locks"].status == "fail"
    monkeypatch.chdir(tmp_path)
    truth = write_truth(tmp_path / "t.json", {"a": entry(*many())})
    assert by_name(doctor(annotations=truth), "environment")["locks"].status == "warn"  # nothing need be written here
    assert by_name(check_environment(None), "environment")["locks"].status == "warn"


def test_folders_that_may_not_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, real = str(tmp_path / "closed"), os.stat
    os.mkdir(closed)

    def stat(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(closed + os.sep):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)

    refuse_to_write(monkeypatch, errno.EACCES)
    monkeypatch.setattr(os, "stat", stat)
    inside = f"{closed}/x/y"
    checks = doctor(store=inside, annotations=inside, run=inside, videos=inside)
    monkeypatch.undo()
    assert closed in by_name(checks, "environment")["locks"].message
    failed = {check.group for check in checks if check.status == "fail"}
    assert failed == {"environment", "store", "annotations", "run", "videos"}


# ---- libraries that are missing --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("hidden", "failed"),
    [("pandas", {"annotations", "store", "run", "videos"}), ("torch", {"environment", "run", "videos"})],
)
def test_a_missing_library_fails_what_needs_it(hidden: str, failed: set[str], tmp_path: Path) -> None:
    write_truth(tmp_path / "t.json", {"a": entry(*many())})
    write_store(tmp_path / "s.zarr", {"a": 60.0})
    code = f"""
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
from tad.cli import main
main("doctor --json --annotations t.json --store s.zarr --run r --videos v".split())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert out.returncode == 1, out.stderr
    assert "Traceback" not in out.stderr
    checks = json.loads(out.stdout)["checks"]
    assert [check["name"] for check in checks[:2]] == ["python", "packages"]
    assert {check["group"] for check in checks if check["status"] == "fail"} == failed
    for group in failed - {"environment"}:
        (message,) = [check["message"] for check in checks if check["group"] == group and check["status"] == "fail"]
        assert hidden in message


# ---- packages --------------------------------------------------------------------------------------------------------
@pytest.fixture(params=["with packaging", "without"])
def declare(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts requirements and installed versions into the mouth of importlib.metadata, and looks."""
    if request.param == "without":
        for name in ("requirements", "specifiers", "version"):
            monkeypatch.setitem(sys.modules, f"packaging.{name}", None)

    def look(declared: list[str], versions: dict[str, str]) -> dict[str, Check]:
        def version(name: str) -> str:
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        about = Message()
        about["Provides-Extra"], about["Provides-Extra"] = "hf", "test"
        monkeypatch.setattr(importlib.metadata, "requires", lambda _: declared)
        monkeypatch.setattr(importlib.metadata, "metadata", lambda _: about)
        monkeypatch.setattr(importlib.metadata, "version", version)
        return by_name(check_packages(), "environment")

    return look


def test_versions_are_compared_by_number(declare: Any) -> None:
    declared = ["a>=2.10", "b[x,y]>=2", "c>=4.10", "d", 'e>=1.5; extra == "hf"', 'f>=9; extra == "test"']
    checks = declare(declared, {"a": "2.9.1", "b": "2.0.0+cpu", "c": "4.10.0.84", "d": "0", "e": "1.4", "f": "8"})
    assert checks["packages versions"].status == "fail"
    assert checks["packages versions"].message == "a 2.9.1, needed is a>=2.10"
    assert checks["packages versions"].advice == "pip install 'a>=2.10'"
    assert checks["packages optional versions"].status == "warn"
    assert "e 1.4" in checks["packages optional versions"].message
    assert set(checks) == {"packages", "packages versions", "packages optional versions"}


def test_markers_of_other_systems_are_no_failure(declare: Any) -> None:
    elsewhere = "win32" if sys.platform != "win32" else "linux"
    declared = [f'a>=1; sys_platform == "{elsewhere}"', f'b>=1; extra == "hf" and sys_platform == "{elsewhere}"', "c"]
    checks = declare([*declared, "gone>=3", 'extra>=1; extra == "hf"', "not a requirement!"], {"c": "1"})
    assert checks["packages missing"].message == "missing: gone>=3"
    assert "a" not in checks["packages"].message.split()
    assert "extra (extra hf)" in checks["packages optional"].message


# ---- runs ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run of the toy detector on a stream ``rgb``."""
    path = tmp_path / "run"
    runs.dump_recipe(path, toy_recipe(streams=["rgb"], model={"width": 4}))
    runs.write_json(path / "classes.json", ["run"])
    stream = {"spec": {"fps": 25}, "fingerprint": "f", "dtype": "float16", "axis": AXIS.to_dict(), "channels": 5}
    runs.write_json(path / "features.json", {"rgb": stream})
    detector = build_detector("toy", channels={"rgb": 5}, classes=1, width=4)
    runs.write_weights(path / "best.safetensors", detector.state_dict(), epoch=3)
    runs.write_json(path / "metrics.json", {})
    return path


def run_checks(path: Path) -> dict[str, Check]:
    return by_name(doctor(run=path), "run")


def test_a_whole_run(run_folder: Path) -> None:
    assert {name: check.status for name, check in run_checks(run_folder).items()} == {"state": "ok", "weights": "ok"}


def test_a_run_without_its_weights(run_folder: Path) -> None:
    (run_folder / "best.safetensors").rename(run_folder / "elsewhere")
    assert run_checks(run_folder)["weights"].status == "fail"
    (run_folder / "metrics.json").unlink()
    assert {name: check.status for name, check in run_checks(run_folder).items()} == {
        "state": "warn",
        "weights": "warn",
    }
    (run_folder / "best.safetensors").write_bytes(b"cut off")
    assert "damaged" in run_checks(run_folder)["weights"].message
    assert run_checks(run_folder)["weights"].status == "fail"


def test_weights_of_another_network(run_folder: Path) -> None:
    runs.write_json(run_folder / "classes.json", ["run", "walk"])
    assert "does not fit" in run_checks(run_folder)["weights"].message


@pytest.mark.parametrize("change", [{"detector": "tolnet"}, {"model": {"wide": 4}}, {"model": {"width": "x"}}])
def test_a_detector_that_cannot_be_built(change: dict[str, Any], run_folder: Path) -> None:
    runs.dump_recipe(run_folder, toy_recipe(**{"streams": ["rgb"], "model": {"width": 4}} | change))
    assert run_checks(run_folder)["detector"].status == "fail"


@pytest.mark.parametrize("text", ["{", "[1]", "5"])
def test_malformed_metrics(text: str, run_folder: Path) -> None:
    (run_folder / "metrics.json").write_text(text)
    assert run_checks(run_folder)["metrics"].status == "fail"


@pytest.mark.parametrize(
    "features",
    [5, [], {"rgb": 5}, {"rgb": None}, {"rgb": "spec fingerprint channels dtype axis"}]
    + [{"rgb": {key: value}} for key, value in (("spec", 5), ("fingerprint", None), ("channels", "5"), ("axis", []))]
    + [{"rgb": {"channels": True}}, {"rgb": {"dtype": {}}}],
)
def test_malformed_features_of_a_run(features: Any, run_folder: Path) -> None:
    whole = json.loads((run_folder / "features.json").read_text())["rgb"]
    if isinstance(features, dict) and isinstance(features["rgb"], dict):
        features = {"rgb": whole | features["rgb"]}
    runs.write_json(run_folder / "features.json", features)
    with pytest.raises(RecipeError, match=r"features\.json"):
        Run.load(run_folder)
    assert run_checks(run_folder)["readable"].status == "fail"


def test_a_recipe_that_is_no_text(run_folder: Path) -> None:
    (run_folder / "recipe.yaml").write_bytes(b"detector: \xff\xfe")
    with pytest.raises(RecipeError, match="UTF-8"):
        Run.load(run_folder)


def test_a_run_beside_a_store_that_cannot_be_opened(run_folder: Path, tmp_path: Path) -> None:
    checks = doctor(run=run_folder, store=tmp_path / "none.zarr")
    assert by_name(checks, "store")["readable"].status == "fail"
    assert by_name(checks, "run")["weights"].status == "ok"


# ---- videos ----------------------------------------------------------------------------------------------------------
def test_no_video_opens(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    assert by_name(doctor(videos=tmp_path), "videos")["readable"].status == "fail"
    check = by_name(doctor(videos=tmp_path / "none.mp4"), "videos")["readable"]
    assert (check.status, "1 of 1 cannot be opened" in check.message) == ("fail", True)


def test_none_of_the_annotated_videos_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_decoding(monkeypatch)
    truth = write_truth(tmp_path / "t.json", {"v_a": entry(*many()), "v_b": entry(*many())})
    (tmp_path / "a.mp4").touch()
    checks = by_name(doctor(annotations=truth, videos=tmp_path), "videos")
    assert checks["readable"].status == "ok"
    assert checks["files"].status == "fail"
    assert "none of the 2 annotated videos has a file (v_a, v_b against a)" in checks["files"].message
    (tmp_path / "v_a.mp4").touch()
    assert by_name(doctor(annotations=truth, videos=tmp_path), "videos")["files"].status == "warn"


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    from tad.extract import video

    monkeypatch.setattr(video, "probe", lambda path: VideoInfo(str(path), 8, 8, 25.0, 1500, 60.0, 0, "x", "y"))


def test_progress_of_many_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_decoding(monkeypatch)
    for index in range(50):
        (tmp_path / f"{index:03d}.mp4").touch()
    few = CliRunner().invoke(main, ["doctor", "--json", "--videos", str(tmp_path)])
    assert few.stderr == ""
    (tmp_path / "one more.mp4").touch()
    out = CliRunner().invoke(main, ["doctor", "--json", "--videos", str(tmp_path)])
    assert out.stderr.startswith("open: 51/51 videos")
    message = next(check["message"] for check in json.loads(out.stdout)["checks"] if check["group"] == "videos")
    assert message.startswith("51 videos were probed")
    assert [check for check in doctor(videos=tmp_path) if check.group == "videos"]  # silent unless told otherwise


# ---- the subset that trains ------------------------------------------------------------------------------------------
def test_classes_are_learnt_from_the_subset_that_trains(tmp_path: Path) -> None:
    """As in THUMOS14: validation videos train, and test videos have a class that they lack."""
    test = [(40.0 + i, 40.5 + i, "hop") for i in range(9)]
    database = {
        "a": entry(*many(), (40.0, 41.0, "hop"), subset="Validation"),
        "b": entry(*test, (1.0, 2.0, "fly"), subset="test"),
    }
    checks = by_name(doctor(annotations=write_truth(tmp_path / "t.json", database)), "annotations")
    assert checks["classes"].status == "warn"
    assert "subset 'Validation'" in checks["classes"].message
    assert checks["classes"].message.endswith("fly")
    assert "hop (1)" in checks["rare classes"].message  # 9 more of them are in the test videos


def test_annotations_of_test_videos_alone(tmp_path: Path) -> None:
    truth = write_truth(tmp_path / "t.json", {"b": entry((1.0, 2.0, "fly"), subset="test")})
    checks = by_name(doctor(annotations=truth), "annotations")
    assert checks["training subset"].status == "note"
    assert not {"classes", "rare classes"} & set(checks)


@pytest.mark.parametrize(
    "subsets",
    [
        ["train", "val"],
        ["Training", "testing"],
        ["validation", "test"],
        ["VAL", "test"],
        ["val", "validation"],
        ["test"],
    ],
)
def test_the_rule_is_that_of_training(subsets: list[str], tmp_path: Path) -> None:
    truth = read_truth(
        write_truth(tmp_path / "t.json", {name: entry(*many(), subset=name) for name in subsets}), subsets=subsets
    )
    if subsets == ["test"]:
        assert training_subset(truth) is None
    else:
        assert training_subset(truth) == preflight.training_subset(truth, None)


def test_ambiguous_is_no_class(tmp_path: Path) -> None:
    database = {"a": entry(*many()), "b": entry((1, 2, "Ambiguous"), (3, 4, "run"), subset="test")}
    checks = by_name(doctor(annotations=write_truth(tmp_path / "t.json", database)), "annotations")
    assert "7 segments, 1 classes" in checks["content"].message
    assert checks["notes"].status == "note"
    assert "1 segments labelled 'Ambiguous' left out" in checks["notes"].message
    assert "classes" not in checks


def test_a_truth_without_segments(tmp_path: Path) -> None:
    truth = write_truth(tmp_path / "t.json", {"a": entry(), "b": entry((1, 2, "Ambiguous"))})
    checks = doctor(annotations=truth, store=write_store(tmp_path / "s.zarr", {"a": 60.0, "b": 60.0}))
    annotations = by_name(checks, "annotations")
    assert annotations["content"].status == "fail"
    assert not [check for check in annotations.values() if check.status == "ok"]
    assert by_name(checks, "store")["coverage"].status == "note"


def test_segments_of_other_videos_are_not_covered(tmp_path: Path) -> None:
    truth = write_truth(tmp_path / "t.json", {"a": entry(), "b": entry(*many())})
    checks = by_name(doctor(annotations=truth, store=write_store(tmp_path / "s.zarr", {"a": 60.0})), "store")
    assert checks["coverage"].status == "note"


# ---- size ------------------------------------------------------------------------------------------------------------
def test_gzipped_annotations(tmp_path: Path) -> None:
    path = tmp_path / "t.gz"
    path.write_bytes(gzip.compress(json.dumps({"database": {"a": entry(*many())}}).encode()))
    assert "1 videos (training 1), 6 segments" in by_name(doctor(annotations=path), "annotations")["content"].message


def test_5000_videos_take_no_more_steps_than_500(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step over a whole table once for every video would be quadratic."""
    truths = {count: defective_truth(tmp_path, count) for count in (500, 5000)}
    stores = {count: FakeStore(count) for count in truths}
    steps: dict[str, int] = {}
    for cls in (pd.DataFrame, pd.Series):
        for name in (
            "__getitem__",
            "isin",
            "__eq__",
            "__gt__",
            "__lt__",
            "reindex",
            "merge",
            "set_index",
            "loc",
            "iloc",
        ):
            if hasattr(cls, name):
                count_calls(cls, name, steps, monkeypatch)
    taken = {}
    for count, truth in truths.items():
        steps.clear()
        checks = check_truth(truth) + check_coverage(stores[count], truth)
        taken[count] = dict(steps)
        assert {"beyond the end", "duplicates", "double labels", "durations", "ids", "coverage"} <= {
            check.name for check in checks
        }
    assert taken[500] == taken[5000]
    assert sum(taken[500].values()) > 20


def defective_truth(tmp_path: Path, count: int) -> Truth:
    """Every video has a segment beyond its end, a duplicate, two labels at once, and a class of its own."""
    database = {
        f"v{i:05d}": entry((0, 5, "a"), (0, 5, "a"), (0, 5, "b"), (50, 99, "a"), (20, 30, f"c{i}"), duration=60.0)
        for i in range(count)
    }
    return read_truth(write_truth(tmp_path / f"{count}.json", database), beyond_end="keep")


class FakeStore:
    """As much of a store as coverage needs: every other video, all of them too short."""

    path = "s.zarr"

    def __init__(self, count: int) -> None:
        names = [f"v{i:05d}" for i in range(0, count, 2)]
        same = {"stream": "s", "level": "features", "rows": 10, "scale_s": 0.32, "translation_s": 0.32}
        self.table = pd.DataFrame({"video": names}).assign(**same, window_s=0.64, duration_s=30.0, fps=25.0)

    def streams(self) -> list[str]:
        return ["s"]

    def catalog(self) -> pd.DataFrame:
        return self.table


def count_calls(cls: type, name: str, steps: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(cls, name)
    key = f"{cls.__name__}.{name}"
    if isinstance(real, property):
        step = property(lambda self: (steps.__setitem__(key, steps.get(key, 0) + 1), real.fget(self))[1])
    else:

        def step(self: Any, *args: Any, **options: Any) -> Any:
            steps[key] = steps.get(key, 0) + 1
            return real(self, *args, **options)

    monkeypatch.setattr(cls, name, step)


def test_damage_is_said_once(tmp_path: Path) -> None:
    truth = write_truth(tmp_path / "t.json", {"a": entry(*many()), "b": entry(*many())})
    store = write_store(tmp_path / "s.zarr", {"a": 60.0, "b": 60.0})
    next(file for file in store.rglob("zarr.json") if file.parent.name == "a").write_text("{")
    checks = by_name(doctor(annotations=truth, store=store), "store")  # a warning would be an error here
    assert checks["damage"].status == "fail"
    assert "1 of 2 annotated videos are not in s" in checks["ids"].message
