"""``failures.jsonl`` and where it lies."""

import json
from pathlib import Path

import pytest

from tad.errors import TadError
from tad.extract.outcome import Failure, FailureLog, default_failures
from tad.store import open_store


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_keeps_the_streams_that_are_not_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    log = FailureLog(path, set(), set())
    for video, streams in (("v", ["a", "b"]), ("w", ["a"]), ("x", ["b"])):
        log.add(Failure(video, f"{video}.mp4", streams, "VideoError", "ü"))
    with path.open("ab") as file:
        file.write(b'{"video": "half\\xff')
    FailureLog(path, {"v", "w"}, {"a"})
    assert [(line["video"], line["streams"], line["message"]) for line in lines(path)] == [
        ("v", ["b"], "ü"), ("x", ["b"], "ü")
    ]  # fmt: skip
    FailureLog(path, {"v", "x"}, {"a", "b"})
    assert not path.exists()


def test_where_it_cannot_be_kept_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TadError, match=r"list of failures cannot be kept in .*name another file"):
        FailureLog(tmp_path / "file" / "f.jsonl", set(), set())
    log = FailureLog(tmp_path / "later" / "f.jsonl", set(), set())
    (tmp_path / "later").write_text("")
    with pytest.raises(TadError, match="list of failures cannot be kept in"):
        log.add(Failure("v", "v.mp4", ["a"], "VideoError", ""))
    with pytest.raises(TadError, match="list of failures cannot be kept in"):
        FailureLog(tmp_path, {"v"}, {"a"})


def test_it_lies_in_the_store_however_its_folder_is_named(tmp_path: Path) -> None:
    for place in (str(tmp_path / "s"), f"file://{tmp_path}/s"):
        with open_store(place, "a", format="zarr") as store:
            assert default_failures(store) == tmp_path / "s" / "failures.jsonl"
