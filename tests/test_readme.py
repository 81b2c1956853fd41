"""The commands and the code that README and docs/extract.md show are run, in order, in one folder."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tad.extract import build_backbone
from tad.synth import make_video

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, mark: str) -> list[str]:
    """The fenced blocks that follow ``<!-- mark -->``."""
    return re.findall(rf"<!-- {mark} -->\n```\w+\n(.*?)\n```", text, flags=re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tour assumes: videos, labels, and checkpoints in the public layout (of untrained networks)."""
    root = tmp_path_factory.mktemp("tour")
    (root / "videos").mkdir()
    rows = []
    for number in range(1, 7):
        name = f"match_{number:02d}"
        made = make_video(root / "videos" / f"{name}.mp4", duration_s=4.0, seed=number, size=(48, 64), fps=8.0)
        subset = "validation" if number == 2 else "training"
        rows += [[name, start, end, label, subset] for start, end, label in made.segments_s]
        rows.append([name, 0.5, 2.0, "serve", subset])
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["video", "start", "end", "label", "subset"], *rows])
    for modality in ("rgb", "flow"):
        torch.save(build_backbone(f"i3d-{modality}", weights="random").state_dict(), root / f"{modality}_imagenet.pt")
    return root


def run(command: str, folder: Path) -> str:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "2",
    }
    done = subprocess.run(
        ["bash", "-euc", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_tour(folder: Path) -> None:
    # smaller windows than I3D's own, and few epochs: every command is the README's but for these
    shorter = {
        "--backbone i3d ": "--backbone i3d --short-side 64 --crop 64x64 ",
        "-o runs/first\ntad": "--set train.epochs=2 -o runs/first\ntad",
    }
    commands = "\n".join(blocks(README, "tour"))
    for old, new in shorter.items():
        assert old in commands
        commands = commands.replace(old, new)
    printed = [run(line, folder) for line in commands.splitlines()]
    assert "12 entries written" in printed[0]
    assert "s of video a second" in printed[0]
    assert "i3d-flow" in printed[1]
    assert "0 problems" in printed[2]
    assert (folder / "found.json").is_file()
    assert (folder / "metrics.json").is_file()
    for code in blocks(README, "python"):
        run(f"python - <<'PYTHON'\n{code}\nPYTHON", folder)


def test_the_code_of_the_extraction_page(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "videos").symlink_to(folder / "videos")
    (tmp_path / "rgb_imagenet.pt").symlink_to(folder / "rgb_imagenet.pt")
    page = (ROOT / "docs/extract.md").read_text(encoding="utf-8")
    for language, code in re.findall(r"```(bash|python)\n(.*?)\n```", page, flags=re.S):
        if language == "bash":
            run(code.replace("--store features.zarr", "--store other.zarr --dry-run"), tmp_path)
        else:
            assert "6 " in run(f"python - <<'PYTHON'\n{code}\nPYTHON", tmp_path)


def test_the_two_commands_are_what_ci_runs() -> None:
    (demo,), (test,) = blocks(README, "demo-command"), blocks(README, "test-command")
    assert demo.endswith("&& tad demo")
    assert "&& pytest" in test
    assert "test-command" in (ROOT / ".ci/run").read_text()
    assert ".ci/run" in (ROOT / ".github/workflows/ci.yml").read_text()
