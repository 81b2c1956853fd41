"""Class scores of videos in the field's other files: NumPy arrays with names beside them, UntrimmedNets', TCANet's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tad.annotations import read_video_scores
from tad.errors import AnnotationError


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_an_npz_with_names(tmp_path: Path) -> None:
    values = np.array([[0.25, 0.5], [1.0, 0.0]], np.float32)
    for videos in (np.array(["ü/1", "b"]), np.array(["ü/1".encode(), b"b"])):
        path = saved(tmp_path / "s.npz", scores=values, videos=videos, classes=np.array(["run", "jump"]))
        scores = read_video_scores(path)
        assert scores.index.tolist() == ["ü/1", "b"]
        assert scores.index.name == "video"
        assert scores.columns.tolist() == ["run", "jump"]
        assert scores.to_numpy().tolist() == values.tolist()
        assert scores.to_numpy().dtype == np.float64


def test_the_first_bytes_tell_the_layout_not_the_name(tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", np.array([[1, 2]]))
    moved = (tmp_path / "s.npy").rename(tmp_path / "scores.json")
    assert read_video_scores(moved, videos=["v"], classes=["a", "b"]).loc["v"].tolist() == [1.0, 2.0]


def test_names_beside_an_array(tmp_path: Path) -> None:
    values = np.arange(6.0).reshape(3, 2)
    np.save(tmp_path / "s.npy", values)
    (tmp_path / "videos.txt").write_text("v1\nv 2\nv3\n\n")
    (tmp_path / "classes.txt").write_text("\ufeffrun\r\njump\r\n")
    scores = read_video_scores(tmp_path / "s.npy", videos=tmp_path / "videos.txt", classes=tmp_path / "classes.txt")
    assert scores.loc["v 2"].to_dict() == {"run": 2.0, "jump": 3.0}
    path = saved(tmp_path / "logits.npz", anything=values[:, None])  # (videos, 1, classes)
    pd.testing.assert_frame_equal(read_video_scores(path, videos=["v1", "v 2", "v3"], classes=["run", "jump"]), scores)
    part = saved(tmp_path / "part.npz", scores=values, classes=np.array(["run", "jump"]))
    pd.testing.assert_frame_equal(read_video_scores(part, videos=["v1", "v 2", "v3"]), scores)


@pytest.mark.parametrize(("subset", "count"), [("test", 1574), ("validation", 1010)])
def test_untrimmednets_scores_of_thumos14(tmp_path: Path, subset: str, count: int) -> None:
    """Row of a video: its number less one. Column of a class: its number in UCF101 less one."""
    values = np.random.default_rng(0).random((count, 101)).astype(np.float32)
    np.save(tmp_path / "uNet.npy", values)
    scores = read_video_scores(tmp_path / "uNet.npy")
    assert scores.shape == (count, 20)
    for number, name, column in ((4, "BaseballPitch", 7), (1, "Diving", 26), (count, "VolleyballSpiking", 97)):
        assert scores.loc[f"video_{subset}_{number:07d}", name] == float(values[number - 1, column - 1])
    assert scores.columns[[8, 19]].tolist() == ["FrisbeeCatch", "VolleyballSpiking"]
    chosen = read_video_scores(tmp_path / "uNet.npy", videos=[f"x{i}" for i in range(count)])
    assert chosen.index[0] == "x0"
    assert chosen.to_numpy().tolist() == scores.to_numpy().tolist()


def test_tcanets_logits(tmp_path: Path) -> None:
    path = tmp_path / "hacs.json"
    path.write_text(json.dumps({"results": {"v": [[-1.5, 22.25]], "w": [[0, 3]]}, "class": ["a", "b"]}))
    assert read_video_scores(path).to_numpy().tolist() == [[-1.5, 22.25], [0.0, 3.0]]
    path.write_text(json.dumps({"results": {"v": [[1, 2], [3, 4]]}, "class": ["a", "b"]}))
    with pytest.raises(AnnotationError, match="video 'v': scores must be finite numbers"):
        read_video_scores(path)


def test_classes_beside_json(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"results": {"v": [1, 2]}}))
    assert read_video_scores(path, classes=["a", "b"]).columns.tolist() == ["a", "b"]
    with pytest.raises(AnnotationError, match=r"names no classes.*or give the classes"):
        read_video_scores(path)
    path.write_text(json.dumps({"results": {"v": [1, 2]}, "class": ["a", "b"]}))
    for options, message in (({"classes": ["a", "b"]}, "leave classes out"), ({"videos": ["v"]}, "leave videos out")):
        with pytest.raises(AnnotationError, match=message):
            read_video_scores(path, **options)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", np.array({"v": [1.0]}, dtype=object), allow_pickle=True)
    path = saved(tmp_path / "s.npz", scores=np.array([[1.0]]), videos=np.array(["v"], object), classes=np.array(["a"]))
    for file in (tmp_path / "s.npy", path):
        with pytest.raises(AnnotationError, match="pickled Python objects, which could run any code"):
            read_video_scores(file)


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"scores": np.ones((2, 3))}, {}, "2 rows and 3 columns of scores without names: give the videos"),
        ({"scores": np.ones((2, 3))}, {"videos": ["a", "b"]}, "give the classes"),
        ({"scores": np.ones((2, 3))}, {"videos": ["a"], "classes": list("abc")}, "of 2 videos, but 1 are named"),
        ({"scores": np.ones((1, 3))}, {"videos": ["a"], "classes": list("ab")}, "of 3 classes, but 2 are named"),
        ({"scores": np.ones((2, 101))}, {}, r"UntrimmedNets.*2 rows, not 1010 of validation, 1574 of test"),
        ({"scores": np.ones((2, 2, 2))}, {}, r"got shape \(2, 2, 2\)"),
        ({"scores": np.ones(3)}, {}, r"got shape \(3,\)"),
        ({"scores": np.array([["x"]])}, {}, "must be numbers"),
        ({"a": np.ones((1, 1)), "b": np.ones((1, 1))}, {}, "holds the arrays a, b"),
        ({}, {}, "holds the arrays none"),
        ({"scores": np.ones((1, 1)), "videos": np.array([["v"]]), "classes": np.array(["a"])}, {}, "a list of text"),
        ({"scores": np.ones((1, 1)), "videos": np.array([b"\xff"]), "classes": np.array(["a"])}, {}, "not UTF-8"),
        ({"scores": np.ones((1, 1)), "videos": np.array(["v"])}, {"videos": ["v"]}, "leave videos out"),
        ({"scores": np.ones((2, 1))}, {"videos": ["v", "v"], "classes": ["a"]}, "videos: 'v' more than once"),
        ({"scores": np.ones((1, 2))}, {"videos": ["v"], "classes": ["a", "a"]}, "classes: 'a' more than once"),
        ({"scores": np.ones((1, 0))}, {"videos": ["v"], "classes": []}, "there is none"),
        ({"scores": np.ones((1, 1))}, {"videos": [" "], "classes": ["a"]}, "a video is empty"),
        ({"scores": np.array([[np.nan]])}, {"videos": ["v"], "classes": ["a"]}, "video 'v': scores must be finite"),
    ],
)
def test_malformed_arrays(tmp_path: Path, arrays: Any, options: Any, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        read_video_scores(saved(tmp_path / "s.npz", **arrays), **options)


def test_files_that_are_damaged(tmp_path: Path) -> None:
    whole = saved(tmp_path / "s.npz", scores=np.ones((4, 4))).read_bytes()
    np.save(tmp_path / "s.npy", np.ones((4, 4)))
    for name, data in (("a", whole[:60]), ("b", (tmp_path / "s.npy").read_bytes()[:-8]), ("c", b"\x93NUMPY")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(AnnotationError, match="damaged"):
            read_video_scores(tmp_path / name)
    (tmp_path / "names.txt").write_text("a\n\nb\n")
    with pytest.raises(AnnotationError, match="line 2 is empty; it must name a video"):
        read_video_scores(tmp_path / "s.npy", videos=tmp_path / "names.txt")
    with pytest.raises(AnnotationError, match="no such file"):
        read_video_scores(tmp_path / "gone.npy")


def test_no_video_at_all(tmp_path: Path) -> None:
    path = saved(tmp_path / "s.npz", scores=np.ones((0, 2)), videos=np.array([], str), classes=np.array(["a", "b"]))
    assert read_video_scores(path).shape == (0, 2)
