"""What the doctor notices: each defect is made, and must be named; nothing is said about what is well."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tad.cli import main
from tad.doctor import Check, doctor
from tad.doctor.environment import check_environment
from tad.store import Level, open_store
from tad.timeline import TimeAxis


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
