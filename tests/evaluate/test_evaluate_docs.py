"""Every Python block of the documents about annotations and evaluation runs, in order, in an empty folder."""

import re
from pathlib import Path

import pytest

from tad.evaluate import PROTOCOLS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["annotations.md", "evaluation.md"])
def test_blocks_run(name, tmp_path, monkeypatch):
    text = (DOCS / name).read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == text.count("```python") > 2
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block.group(1), str(DOCS / name), "exec"), namespace)


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
