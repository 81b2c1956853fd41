"""docs/backbones.md: its tables are those of the code, its blocks run.

``python -m tests.extract.test_backbones_docs`` writes the tables anew.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import backbones as benchmark
from tad.cli import main
from tad.extract.backbones import BACKBONES, SPECS, build_backbone
from tad.extract.published import PUBLISHED
from tad.synth import make_video

PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def networks() -> str:
    """The table of all networks, a row a name."""
    lines = ["| name | clip | fps | size | features | levels | files |", "|---|---|---|---|---|---|---|"]
    for name, entry in BACKBONES.items():
        spec = SPECS[name]
        size = "x".join(map(str, spec.crop))
        scaled = "x".join(map(str, spec.resize)) if spec.resize else f"{spec.short_side}"
        levels = ", ".join(f"`{level}` ({info.stride}) {info.channels}" for level, info in spec.levels.items())
        families = dict.fromkeys(layout.family for layout in entry.layouts if not layout.family.startswith("tad "))
        cells = [
            f"`{name}`",
            f"{spec.window}x{spec.interval}{' flow' if spec.modality == 'flow' else ''}",
            "own" if spec.grid_fps is None else f"{spec.grid_fps:g}",
            f"{size} of {scaled}{'' if spec.any_size else ', fixed'}",
            str(spec.width),
            levels or "none",
            "; ".join(families) or "ours",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def published() -> str:
    """The table of all published weights."""
    lines = ["| name | network | trained on | top-1 | licence |", "|---|---|---|---|---|"]
    for name, entry in PUBLISHED.items():
        licence = f"**{entry.licence}**" if entry.noncommercial else entry.licence
        top1 = "" if entry.top1 is None else f"{entry.top1:.1f}"
        marks = "" if entry.urls else " (by hand)"
        lines.append(f"| `{name}`{marks} | `{entry.backbone}` | {entry.data} | {top1} | {licence} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The page with its tables as the code has them."""
    for name, table in (("networks", networks()), ("published", published())):
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda found: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL)  # noqa: B023
        assert count == 1, f"the page has no place for the table {name}"
    return text


def test_the_tables_are_those_of_the_code() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_tables(text) == text, "write them anew: python -m tests.extract.test_backbones_docs"


def test_every_network_and_name_on_the_page_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in re.findall(r"[a-z0-9]+(?:_[a-z0-9]+)+_(?:kinetics400|charades|ssv2)\b", text):
        assert name in PUBLISHED
    for name in re.findall(r"--backbone ([\w-]+)", text):
        assert name in BACKBONES


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the blocks assume: a folder of videos, and an address that answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAD_WEIGHTS", str(tmp_path / "weights"))
    Path("videos").mkdir()
    make_video(Path("videos/v.mp4"), duration_s=1.0, seed=0, size=(48, 64), fps=8.0)
    name = "i3d_rgb_kinetics400"
    server = tmp_path / "server" / PUBLISHED[name].file
    server.parent.mkdir()
    torch.save(build_backbone("i3d-rgb", "random").state_dict(), server)
    monkeypatch.setitem(PUBLISHED, name, replace(PUBLISHED[name], urls=(server.as_uri(),)))
    return tmp_path


def test_the_blocks_run_in_order(folder: Path) -> None:
    namespace: dict[str, object] = {"__name__": "__docs__"}
    printed: dict[str, str] = {}
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert [language for language, _ in blocks].count("python") == 3
    for language, code in blocks:
        if language == "python":
            exec(compile(code, str(PAGE), "exec"), namespace)
            continue
        for line in code.splitlines():
            program, *arguments = shlex.split(line)
            if program == "python":
                assert arguments[:2] == ["-m", "benchmarks.backbones"]
                assert benchmark.main(arguments[2:]) == 0
                continue
            assert program == "tad"
            if arguments[0] == "extract":  # smaller frames than I3D's own, to be quick
                arguments += ["--short-side", "64", "--crop", "64x64"]
            done = CliRunner().invoke(main, arguments)
            assert done.exit_code == 0, f"{line}\n{done.output}"
            printed[arguments[1]] = done.stdout
    assert "i3d_rgb_kinetics400" in printed["ls"]
    assert "licence" in printed["show"]
    assert str(folder / "weights" / "i3d_rgb_kinetics400" / "rgb_imagenet.pt") in printed["fetch"]
    assert "fine" in printed["check"]
    assert "1 entries written" in printed["videos/"]


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
