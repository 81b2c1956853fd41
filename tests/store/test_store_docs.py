"""Every Python block of docs/store.md runs, in order, in an empty folder, and what its comments promise is so."""

import re
from pathlib import Path

import pytest

from tad.store import open_store
from tests.store.makers import put, rows

DOCS = Path(__file__).parents[2] / "docs" / "store.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stores that the document names, in the current folder."""
    monkeypatch.chdir(tmp_path)
    array = rows(900, 1024)
    for place in ("features.zarr", "features-h5"):
        with open_store(place, "a") as store:
            for video in ("video_1", "video_2"):
                put(store, video, array, stream="i3d-rgb", duration_s=241.0)


def test_blocks_run() -> None:
    text = DOCS.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python") == 8
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block.group(1), str(DOCS), "exec"), namespace)


def test_promises_of_the_reading_block() -> None:
    with open_store("features.zarr") as store:
        assert store.streams() == ["i3d-rgb"]
        assert store.videos("i3d-rgb") == ["video_1", "video_2"]
        feature = store["i3d-rgb", "video_1"]
        assert (feature.shape, str(feature.dtype), feature.duration_s) == ((900, 1024), "float32", 241.0)
        assert feature[100:356].shape == (256, 1024)
        assert feature.axis.center_s(100) == pytest.approx(27.2)


def test_the_layout_block_is_what_lies_on_disk(tmp_path: Path) -> None:
    text = DOCS.read_text(encoding="utf-8")
    shown = set(re.findall(r"[\w.-]+\.(?:json|h5)|c\.0\.0", text[text.index("features.zarr/    ") :]))
    for path in tmp_path.rglob("*"):
        if path.is_file() and "video_2" not in str(path):
            assert path.name in shown
