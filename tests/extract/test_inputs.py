"""Files, folders and lists become ids and paths."""

from pathlib import Path

import pytest

from tad.errors import VideoError
from tad.extract.inputs import find_videos


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def ids(*inputs: Path) -> list[str]:
    return [file.video for file in find_videos(inputs)]


def test_a_folder_stands_for_its_videos_sorted(tmp_path: Path) -> None:
    touch(tmp_path, "b.mp4", "a.MKV", "deep/c.webm", "notes.txt", ".hidden/d.mp4", "e.json")
    assert ids(tmp_path) == ["a", "b", "c"]


def test_colliding_stems_are_told_apart(tmp_path: Path) -> None:
    touch(tmp_path, "x/clip.mp4", "y/clip.mp4", "test.avi", "test.mp4", "one.mp4")
    found = ids(tmp_path)
    assert len(set(found)) == 5
    assert {"test.avi", "test.mp4", "one"} <= set(found)
    assert sum(name.endswith(("x/clip.mp4", "y/clip.mp4")) for name in found) == 2


def test_the_same_file_counts_once_and_missing_ones_are_kept(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    assert ids(tmp_path / "a.mp4", tmp_path, tmp_path / "absent.mp4") == ["a", "absent"]


def test_lists_hold_paths_comments_and_ids(tmp_path: Path) -> None:
    touch(tmp_path, "v/a.mp4", "v/b c.mp4")
    (tmp_path / "list.txt").write_text(
        "# all\nv/a.mp4\n\nfirst day\tv/b c.mp4  # the second\n/abs/z.mp4\n", encoding="utf-8"
    )
    found = {file.video: file.path for file in find_videos([tmp_path / "list.txt"])}
    assert found == {"a": tmp_path / "v/a.mp4", "first day": tmp_path / "v/b c.mp4", "z": Path("/abs/z.mp4")}


def test_lists_of_other_editors_and_names_with_a_hash(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(
        "cfr.mp4\nmatch #1.mp4\n#2.mp4\nday # 3.mp4\nC#.mp4 # sharp\n", encoding="utf-8-sig"
    )
    assert ids(tmp_path / "list.txt") == ["cfr", "match #1", "day", "C#"]


def test_a_link_that_leads_nowhere_is_not_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "ok.mp4")
    (tmp_path / "annexed.mp4").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.mp4").mkdir()
    assert ids(tmp_path) == ["annexed", "ok"]


def test_a_given_id_is_not_taken_by_a_stem(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "list.txt").write_text("a\tb.mp4\na.mp4\n", encoding="utf-8")
    assert sorted(ids(tmp_path / "list.txt")) == ["a", "a.mp4"]


@pytest.mark.parametrize(("content", "words"), [("", "names no video"), ("x\ta.mp4\nx\tb.mp4\n", "several files")])
def test_lists_that_cannot_be_meant(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "list.txt").write_text(content, encoding="utf-8")
    with pytest.raises(VideoError, match=words):
        find_videos([tmp_path / "list.txt"])


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no video file"):
        find_videos([tmp_path])
