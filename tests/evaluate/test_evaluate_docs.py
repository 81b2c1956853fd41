"""Every Python block and command of these documents runs, in order, in an empty folder."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from tad.cli import main
from tad.evaluate import BUCKETS, PROTOCOLS
from tad.evaluate.false_positives import KINDS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["annotations.md", "evaluation.md", "diagnosis.md"])
def test_blocks_run(name, tmp_path, monkeypatch):
    text = (DOCS / name).read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```(python|bash)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == text.count("```python") + text.count("```bash") > 2
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for block in blocks:
        if block.group(1) == "python":
            line = text[: block.start(2)].count("\n")
            exec(compile("\n" * line + block.group(2), str(DOCS / name), "exec"), namespace)
            continue
        for command in block.group(2).splitlines():
            program, *arguments = shlex.split(command)
            assert program == "tad"
            done = CliRunner().invoke(main, arguments)
            assert done.exit_code == 0, f"{command}\n{done.output}"


def test_the_table_of_protocols_is_that_of_the_code():
    text = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| `(thumos14-|anet|hacs)", line)]
    assert [row.split("`")[1] for row in rows] == list(PROTOCOLS)
    for row, protocol in zip(rows, PROTOCOLS.values(), strict=True):
        if protocol.sizes:
            videos, segments = protocol.sizes[0]
            assert re.search(rf"\| {videos:,}\b", row)
            assert re.search(rf"\| {segments:,}\b", row)
        for video in protocol.left_out:
            assert "six videos" in row or video.removeprefix("video_test_") in row


def test_every_protocol_is_worked_through():
    text = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert [name for name in PROTOCOLS if f'"{name}"' not in code] == []


def test_the_tables_of_kinds_and_limits_are_those_of_the_code():
    text = (DOCS / "diagnosis.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip().replace(" ", "_") for line in text.splitlines() if line.startswith("| ")]
    assert rows[1 : 1 + len(KINDS)] == list(KINDS)
    for name in ("length", "coverage", "num-instances"):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        for kind in ("activitynet", "thumos14"):
            inner = BUCKETS[kind][name][0][1:-1]
            assert ", ".join(f"{limit:g}" for limit in inner) in row
