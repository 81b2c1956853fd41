"""The commands and code of docs/exchange.md and docs/doctor.md run, in order, in one folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tad.annotations import read_predictions, read_truth, write_predictions
from tad.exchange import FORMATS
from tad.store import Level, open_store
from tad.synth import make_videos
from tad.timeline import TimeAxis

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A truth, predictions, videos and features of them."""
    made = make_videos(tmp_path, videos=2, subset="validation", duration_s=(5.0, 6.0), action_s=(1.0, 2.0))
    (tmp_path / "annotations.json").rename(tmp_path / "truth.json")
    rows = [(clip.path.stem, start, end, label) for clip in made for start, end, label in clip.segments_s]
    table = pd.DataFrame(rows, columns=["video", "start_s", "end_s", "label"])
    write_predictions(tmp_path / "found.json", table.assign(score=np.linspace(0.9, 0.2, len(table)).round(3)))
    with open_store(tmp_path / "features.zarr", "a") as store:
        store.create_stream("rgb", {"imported": True})
        axis = TimeAxis.from_frames(fps=12.5, window_frames=16, stride_frames=4)
        for clip in made:
            level = Level(np.ones((20, 4), np.float32), axis, 4, 16, 12.5, None)
            source = {"name": clip.path.name, "size": 1, "mtime_ns": 1}
            store.write("rgb", clip.path.stem, {"features": level}, duration_s=clip.duration_s, source=source)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["exchange.md", "doctor.md"])
def test_everything_shown_runs(name: str, folder: Path) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    shown = re.findall(r"^```(bash|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert shown
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for kind, block in shown:
        command = ["bash", "-euc", block] if kind == "bash" else [sys.executable, "-c", block]
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    if name == "exchange.md":
        assert len(read_predictions(folder / "corrected.json")) == len(read_predictions(folder / "found.json"))
        assert len(read_truth(folder / "truth.csv").segments) == len(read_truth(folder / "truth.json").segments)
        assert read_truth(folder / "truth.csv").subsets == ["validation"]
    else:
        assert json.loads((folder / "doctor.json").read_text())["ok"]


def test_the_table_of_formats_is_that_of_the_code() -> None:
    text = (DOCS / "exchange.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| `", line)]
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])] == list(FORMATS)
