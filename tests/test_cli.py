"""The command line as scripts see it: exit statuses, what goes to stdout, what to stderr."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tad.cli import COMMANDS, main
from tad.synth import make_video

TINY = ["--backbone", "tiny", "--weights", "random"]


def tad(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for number in range(3):
        make_video(root / f"v{number}.mp4", duration_s=3.0, seed=number, size=(72, 96), fps=10.0)
    return root


def test_every_command_has_help_with_an_example() -> None:
    assert tad("--help").exit_code == 0
    for command in COMMANDS:
        shown = tad(command.name, "--help")
        assert shown.exit_code == 0
        assert (
            command.name in ("store", "demo")
            or f"tad {command.name} " in shown.output.split("Options:")[0].split("\n", 2)[2]
        )


def test_extract_says_what_it_did_and_the_second_time_that_there_is_nothing_to_do(tmp_path: Path, videos: Path) -> None:
    done = tad("extract", videos, "--store", tmp_path / "s", *TINY)
    assert done.exit_code == 0, done.output
    assert "3 entries written" in done.stdout
    assert all(word in done.stdout for word in ("s of video a second", "decode", "flow", "network", "write"))
    again = tad("extract", videos, "--store", tmp_path / "s", *TINY)
    assert again.exit_code == 0
    assert again.stdout == "nothing to do: all 3 entries are there already\n"
    report = json.loads(tad("extract", videos, "--store", tmp_path / "s", *TINY, "--json").stdout)
    assert (report["written"], report["already"]) == (0, 3)


def test_dry_run_writes_nothing_and_counts_the_rows(tmp_path: Path, videos: Path) -> None:
    shown = tad("extract", videos, "--store", tmp_path / "s", *TINY, "--dry-run", "--json", "--stride", 8)
    assert shown.exit_code == 0, shown.output
    assert not (tmp_path / "s").exists()
    plan = json.loads(shown.stdout)
    tad("extract", videos, "--store", tmp_path / "s", *TINY, "--stride", 8)
    listed = json.loads(tad("store", "ls", tmp_path / "s", "--json").stdout)
    assert {(e["video"], e["rows"], e["channels"]) for e in plan["entries"]} == {
        (e["video"], e["rows"], e["channels"]) for e in listed
    }
    assert (
        "3 entries are there already"
        in tad("extract", videos, "--store", tmp_path / "s", *TINY, "--dry-run", "--stride", 8).stdout
    )
    refused = tad("extract", videos, "--store", tmp_path / "s", *TINY, "--dry-run", "--stride", 4)
    assert refused.exit_code == 1
    assert "stride" in refused.stderr


def test_failures_exit_with_three_and_are_listed(tmp_path: Path, videos: Path) -> None:
    (tmp_path / "bad.mp4").write_text("no video")
    done = tad("extract", videos, tmp_path / "bad.mp4", tmp_path / "gone.mp4", "--store", tmp_path / "s", *TINY)
    assert done.exit_code == 3
    assert "bad.mp4" in done.stderr
    assert len((tmp_path / "s/failures.jsonl").read_text().splitlines()) == 2
    assert "3 entries written" in done.stdout


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["extract", "v.mp4"], 2, "--store"),
        (["extract", "v.mp4", "--store", "s", "--backbone", "tiny", "--crop", "12y3"], 2, "HEIGHTxWIDTH"),
        (["extract", "v.mp4", "--store", "s", "--backbone", "tiny", "--stride", "0"], 2, "stride"),
        (["extract", "v.mp4", "--store", "s", "--backbone", "tiny"], 1, "--weights random"),
        (["extract", "v.mp4", "--store", "s", "--backbone", "i3d_rgb", "--weights", "random"], 1, "i3d-rgb"),
        (["extract", "v.mp4", "--store", "s", "--backbone", "i3d", "--weights", "a.pt"], 1, "i3d-rgb, i3d-flow"),
        (["store", "ls", "absent.zarr"], 1, "no feature store"),
        (["train-detector", "--store", "s", "--annotations", __file__, "-o", "r"], 1, "name a detector"),
        (["train-detector", "talnett", "--store", "s", "--annotations", __file__, "-o", "r"], 1, "talnet"),
        (["evaluate", "--annotations", __file__], 2, "--predictions"),
        (["detect", "--run", "absent"], 2, "absent"),
        (["detect", "v.mp4", "--run", ".", "--subset", "x"], 2, "--subset"),
        (["detect", "v.mp4", "--run", ".", "--weights", "x.pt"], 2, "STREAM=FILE"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_refusals_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], status: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = tad(*args)
    assert (done.exit_code, done.stdout) == (status, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("[rs]"))


def test_verify_finds_a_flipped_byte(tmp_path: Path, videos: Path) -> None:
    for format in ("zarr", "hdf5"):
        store = tmp_path / format
        assert tad("extract", videos, "--store", store, "--format", format, *TINY).exit_code == 0
        assert tad("store", "verify", store, "--deep").exit_code == 0
        chunk = max((p for p in store.rglob("*") if p.is_file() and "v1" in str(p)), key=lambda p: p.stat().st_size)
        data = bytearray(chunk.read_bytes())
        data[len(data) // 2] ^= 0x10
        chunk.write_bytes(bytes(data))
        damaged = tad("store", "verify", store, "--deep")
        assert damaged.exit_code == 3
        assert "v1" in damaged.stdout


def test_import_then_ls_info_index_gc(tmp_path: Path) -> None:
    (tmp_path / "npy").mkdir()
    rng = np.random.default_rng(0)
    for name, rows in (("a", 50), ("b", 60)):
        np.save(tmp_path / "npy" / f"{name}.npy", rng.standard_normal((rows, 8)).astype(np.float32))
    (tmp_path / "npy" / "c.npy").write_bytes(b"no array")
    axis = ["--stream", "rgb", "--fps", 30, "--window", 32, "--stride", 8]
    done = tad("store", "import", tmp_path / "npy", "--store", tmp_path / "s", *axis)
    assert done.exit_code == 3
    assert "2 entries written" in done.stdout
    assert "c.npy" in done.stderr
    assert "50" in tad("store", "ls", tmp_path / "s").stdout
    attrs = json.loads(tad("store", "info", tmp_path / "s", "--stream", "rgb", "--video", "a").stdout)
    assert attrs["levels"][0]["scale_s"] == pytest.approx(8 / 30)
    assert attrs["levels"][0]["translation_s"] == pytest.approx(16 / 30)
    assert json.loads(tad("store", "info", tmp_path / "s").stdout)["streams"]["rgb"]["videos"] == 2
    assert tad("store", "index", tmp_path / "s").exit_code == 0
    assert tad("store", "gc", tmp_path / "s").exit_code == 0


def test_store_commands_tell_json_whole_and_refuse_names_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "npy").mkdir()
    for name, rows in (("a", 50), ("b", 60)):
        np.save(tmp_path / "npy" / f"{name}.npy", np.ones((rows, 8), np.float32))
    (tmp_path / "npy" / "c.npy").write_bytes(b"no array")
    durations = {name: {"duration": 123.0, "subset": "testing", "annotations": []} for name in "ab"}
    (tmp_path / "truth.json").write_text(json.dumps({"database": durations}))
    axis = ["--store", tmp_path / "s", "--stream", "rgb", "--fps", 29.97, "--window", 32, "--stride", 7]
    gone = tad("store", "import", tmp_path / "nonexist", *axis)
    assert (gone.exit_code, gone.stdout) == (1, "")
    assert "no such file or folder" in gone.stderr
    assert not (tmp_path / "s").exists()
    done = tad("store", "import", tmp_path / "npy", *axis, "--annotations", tmp_path / "truth.json", "--json")
    report = json.loads(done.stdout)
    assert (done.exit_code, report["written"], report["already"]) == (3, ["a", "b"], [])
    assert [sorted(item) for item in report["skipped"] + report["warnings"]] == [["file", "why"]] * 3
    assert [item["file"] for item in report["warnings"]] == ["a.npy", "b.npy"]
    listed = json.loads(tad("store", "ls", tmp_path / "s", "--stream", "rgb", "--json").stdout)
    assert [entry["scale_s"] for entry in listed] == [7 / 29.97] * 2  # every digit
    assert [entry["num_frames_used"] for entry in listed] == [None] * 2
    unknown = tad("store", "ls", tmp_path / "s", "--stream", "rbg")
    assert (unknown.exit_code, unknown.stdout) == (1, "")
    assert "no stream 'rbg'. Did you mean 'rgb'?" in unknown.stderr


def test_interrupting_leaves_what_is_complete_and_exits_with_130(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    make_video(folder / "v00.mp4", duration_s=1.0, seed=0, size=(72, 96), fps=10.0)
    make_video(folder / "v01.mp4", duration_s=20.0, seed=1, size=(72, 96), fps=10.0)
    for number in range(2, 30):
        (folder / f"v{number:02d}.mp4").write_bytes((folder / "v01.mp4").read_bytes())
    command = [
        sys.executable,
        "-m",
        "tad.cli",
        "extract",
        str(folder),
        "--store",
        str(tmp_path / "s"),
        *TINY,
        "--stride",
        "1",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores it
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "s/tiny/v00/zarr.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
    listed = json.loads(tad("store", "ls", tmp_path / "s", "--json").stdout)
    assert "v00" in {entry["video"] for entry in listed}
    assert tad("store", "verify", tmp_path / "s", "--deep").exit_code == 0
