"""Files of other tools: what is written is read back, and what others write is understood."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tad.annotations import read_predictions, read_truth
from tad.cli import main
from tad.errors import AnnotationError
from tad.exchange import FORMATS, Collection, format_of, read_collection, write_collection

# Seconds that a format may move a time by, at 25 frames a second.
TOLERANCE_S = dict.fromkeys(FORMATS, 0.0) | {"labelstudio": 1 / 25} | dict.fromkeys(("elan", "srt", "webvtt"), 0.5e-3)

word = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=12)
label = word.filter(lambda text: not re.search(r"-->|<.*>|\{.*\}", text))  # markup is for subtitles to refuse
video = word.filter(lambda text: not text.startswith("\ufeff"))
times = st.tuples(st.floats(0, 5000), st.floats(0, 300)).map(lambda pair: (pair[0], pair[0] + pair[1]))
truth_rows = st.lists(st.tuples(video, times, label), min_size=1, max_size=12)
scores = st.floats(0.0001, 1)


def table_of(rows: list, scored: list[float] | None = None) -> pd.DataFrame:
    data = [(v, s, e, name) for v, (s, e), name in rows]
    table = pd.DataFrame(data, columns=["video", "start_s", "end_s", "label"])
    return table if scored is None else table.assign(score=scored)


def target(folder: Path, name: str) -> Path:
    return folder / name if FORMATS[name].folder else folder / f"{name}{FORMATS[name].suffix}"


def assert_same(back: pd.DataFrame, given_: pd.DataFrame, tolerance_s: float, score: float) -> None:
    assert len(back) == len(given_)
    assert ("score" in back) == ("score" in given_)
    for (v, name), expected in given_.groupby(["video", "label"]):
        found = back[(back["video"] == v) & (back["label"] == name)]
        for column in ("start_s", "end_s"):
            assert np.allclose(sorted(found[column]), sorted(expected[column]), rtol=0, atol=tolerance_s + 1e-9)
        if "score" in given_:
            assert np.allclose(sorted(found["score"]), sorted(expected["score"]), rtol=0, atol=score)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=truth_rows, draw=st.data())
def test_what_is_written_is_read_back(
    name: str, rows: list, draw: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    scored = draw.draw(st.none() | st.lists(scores, min_size=len(rows), max_size=len(rows)))
    table = table_of(rows, scored)
    folder = tmp_path_factory.mktemp("x")
    path = target(folder, name)
    files = write_collection(Collection.of(table), path, format=name, fps=25.0, subset="test")
    assert files
    assert all(file.is_file() for file in files)
    back = read_collection(path, format=name, fps=25.0)
    assert_same(back.segments, table, TOLERANCE_S[name], 5e-5 if name in ("srt", "webvtt") else 0)
    assert set(back.videos["video"]) == set(table["video"])
    assert format_of(path) == name


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "csv"])
def test_videos_without_a_segment_are_kept(name: str, tmp_path: Path) -> None:
    videos = pd.DataFrame({"video": ["a", "b"], "fps": [25.0, 25.0]})
    table = pd.DataFrame({"video": ["a"], "start_s": [1.0], "end_s": [2.0], "label": ["run"]})
    write_collection(Collection.of(table, videos), target(tmp_path, name), format=name, subset="test")
    back = read_collection(target(tmp_path, name), format=name, fps=25)
    assert sorted(back.videos["video"]) == ["a", "b"]
    assert back.segments["video"].tolist() == ["a"]


@pytest.mark.parametrize("name", FORMATS)
def test_hard_ids_and_labels(name: str, tmp_path: Path) -> None:
    """Slashes, dots and markup in ids and labels; overlapping and zero-length segments."""
    table = pd.DataFrame(
        [
            ("a/b.c", 0.0, 4.0, "x & <y>"),
            ("a/b.c", 1.0, 3.0, "x & <y>"),
            ("..", 2.5, 2.5, 'q"uote'),
            ("é%2F", 0, 1, "1"),
        ],
        columns=["video", "start_s", "end_s", "label"],
    )
    path = target(tmp_path / "inner", name)
    files = write_collection(Collection.of(table), path, format=name, fps=25, subset="test")
    assert all(tmp_path / "inner" in file.parents for file in files)
    assert_same(read_collection(path, format=name, fps=25).segments, table, TOLERANCE_S[name], 0)


def test_subset_duration_and_fps_survive_in_json_and_csv(tmp_path: Path) -> None:
    videos = pd.DataFrame({"video": ["a"], "subset": ["validation"], "duration_s": [12.5], "fps": [29.97]})
    table = pd.DataFrame({"video": ["a"], "start_s": [0.1], "end_s": [0.3], "label": ["run"]})
    for name in ("activitynet", "csv"):
        path = target(tmp_path, name)
        write_collection(Collection.of(table, videos), path, format=name)
        truth = read_truth(path)
        assert truth.videos.iloc[0].tolist() == ["a", "validation", 12.5, 29.97]
        assert truth.segments.iloc[0].tolist()[:4] == ["a", 0.1, 0.3, "run"]


def test_via_projects_of_others(tmp_path: Path) -> None:
    """A menu whose options have keys, a second attribute, a region, a single time."""
    project = {
        "project": {"data_format_version": "3.1.1"},
        "attribute": {
            "1": {"aname": "Object", "anchor_id": "FILE1_Z1_XY1", "type": 4, "options": {"1": "egg"}},
            "5": {"aname": "Activity", "anchor_id": "FILE1_Z2_XY0", "type": 4, "options": {"7": "pour", "8": "cut"}},
        },
        "file": {"1": {"fid": 1, "fname": "videos/kitchen.01.mp4", "type": 4, "loc": 1, "src": ""}},
        "view": {"1": {"fid_list": [1]}},
        "metadata": {
            "1_a": {"vid": "1", "flg": 0, "z": [251.98692, 255.21135], "xy": [], "av": {"5": "8"}},
            "1_b": {"vid": "1", "flg": 0, "z": [3.0], "xy": [2, 1, 1, 5, 5], "av": {"1": "1"}},
        },
    }
    path = tmp_path / "via.json"
    path.write_text(json.dumps(project))
    back = read_collection(path)
    assert back.segments.iloc[0].tolist() == ["kitchen.01", 251.98692, 255.21135, "cut"]
    assert len(back.segments) == 1
    assert "1 regions" in back.notes[0]
    project["metadata"]["1_a"]["av"] = {}
    path.write_text(json.dumps(project))
    with pytest.raises(AnnotationError, match="1_a"):
        read_collection(path)


def test_elan_files_of_others(tmp_path: Path) -> None:
    """Values are labels, empty ones the tier's; referring annotations and open times are left out."""
    (tmp_path / "p01.eaf").write_text(
        """<?xml version="1.0" encoding="UTF-8"?>
<ANNOTATION_DOCUMENT AUTHOR="" DATE="2024-01-01T00:00:00+01:00" FORMAT="3.0" VERSION="3.0">
<HEADER MEDIA_FILE="" TIME_UNITS="milliseconds"/>
<TIME_ORDER><TIME_SLOT TIME_SLOT_ID="ts1" TIME_VALUE="1500"/><TIME_SLOT TIME_SLOT_ID="ts2" TIME_VALUE="2750"/>
<TIME_SLOT TIME_SLOT_ID="ts3"/></TIME_ORDER>
<TIER TIER_ID="action" LINGUISTIC_TYPE_REF="default-lt">
<ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a1" TIME_SLOT_REF1="ts1" TIME_SLOT_REF2="ts2">
<ANNOTATION_VALUE>wave</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION>
<ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a2" TIME_SLOT_REF1="ts1" TIME_SLOT_REF2="ts2">
<ANNOTATION_VALUE></ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION>
<ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a3" TIME_SLOT_REF1="ts2" TIME_SLOT_REF2="ts3">
<ANNOTATION_VALUE>open</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION>
<ANNOTATION><REF_ANNOTATION ANNOTATION_ID="a4" ANNOTATION_REF="a1">
<ANNOTATION_VALUE>x</ANNOTATION_VALUE></REF_ANNOTATION></ANNOTATION>
</TIER></ANNOTATION_DOCUMENT>"""
    )
    back = read_collection(tmp_path)
    assert back.segments[["start_s", "end_s", "label"]].values.tolist() == [[1.5, 2.75, "wave"], [1.5, 2.75, "action"]]
    assert back.segments["video"].tolist() == ["p01", "p01"]
    assert "2 annotations" in back.notes[0]


def test_no_entities_are_expanded(tmp_path: Path) -> None:
    path = tmp_path / "x.eaf"
    path.write_text('<!DOCTYPE a [<!ENTITY b "boom">]><ANNOTATION_DOCUMENT>&b;</ANNOTATION_DOCUMENT>')
    with pytest.raises(AnnotationError, match=r"x\.eaf declares entities"):
        read_collection(path)


def test_fiftyone_support_counts_frames(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(
        json.dumps({"classes": ["a", "b"], "labels": {"v": [{"label": 1, "support": [26, 50]}], "w": None}})
    )
    back = read_collection(path, fps=25)
    assert back.segments.values.tolist() == [["v", 1.0, 2.0, "b"]]
    assert back.videos["video"].tolist() == ["v", "w"]
    with pytest.raises(AnnotationError, match="fps"):
        read_collection(path)
    path.write_text(json.dumps({"classes": ["a"], "labels": {"v": [{"label": 3, "timestamps": [0, 1]}]}}))
    with pytest.raises(AnnotationError, match="'v', detection 0"):
        read_collection(path)


def test_labelstudio_exports_of_others(tmp_path: Path) -> None:
    region = {"type": "timelinelabels", "value": {"ranges": [{"start": 26, "end": 50}], "timelinelabels": ["a", "b"]}}
    tasks = [
        {
            "id": 7,
            "data": {"video": "/data/upload/1/3d3a-clip.1.mp4"},
            "annotations": [
                {"result": [region, {"type": "choices", "value": {}}]},
                {"result": [region], "was_cancelled": True},
            ],
        }
    ]
    path = tmp_path / "export.json"
    path.write_text(json.dumps(tasks))
    back = read_collection(path, fps=25)
    assert back.segments.values.tolist() == [["3d3a-clip.1", 1.0, 2.0, "a"], ["3d3a-clip.1", 1.0, 2.0, "b"]]
    with pytest.raises(AnnotationError, match="frame rate"):
        read_collection(path)
    with pytest.raises(AnnotationError, match="frame rate"):
        write_collection(Collection.of(back.segments), tmp_path / "y.json", format="labelstudio")


def test_subtitles_of_others(tmp_path: Path) -> None:
    (tmp_path / "talk.vtt").write_text(
        "WEBVTT - a title\r\n\r\nNOTE nothing\r\n\r\nintro\r\n"
        "00:01.500 --> 00:02.000 align:start\r\n<v Ann>jump</v>\r\n"
    )
    assert read_collection(tmp_path).segments.values.tolist() == [["talk", 1.5, 2.0, "jump"]]
    (tmp_path / "talk.srt").write_text("1\n01:00:01,5 --> 01:00:02,000\ntwo\nlines\n")
    assert read_collection(tmp_path / "talk.srt").segments.values.tolist() == [["talk", 3601.5, 3602.0, "two lines"]]
    (tmp_path / "bad.srt").write_text("1\n01:00 --> later\nx\n")
    with pytest.raises(AnnotationError, match=r"bad\.srt: line 2"):
        read_collection(tmp_path / "bad.srt")


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("srt", {"label": ["two\nlines"]}, "line breaks"),
        ("webvtt", {"label": ["x · 0.5"]}, "rename"),
        ("elan", {"label": ["a\x00b"]}, "cannot hold"),
        ("srt", {"start_s": [-1.0]}, "negative"),
    ],
)
def test_what_a_format_cannot_hold_is_an_error(name: str, table: dict, message: str, tmp_path: Path) -> None:
    rows = pd.DataFrame({"video": ["a"], "start_s": [0.0], "end_s": [1.0], "label": ["x"]} | table)
    with pytest.raises(AnnotationError, match=message):
        write_collection(Collection.of(rows), tmp_path / "out", format=name)


def test_unknown_formats_and_folders(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="elan"):
        read_collection(tmp_path, format="elam")
    with pytest.raises(AnnotationError, match=r"\.eaf"):
        read_collection(tmp_path)
    with pytest.raises(AnnotationError, match="name a folder"):
        write_collection(Collection.of(table_of([("a", (0, 1), "x")])), tmp_path / "x.srt", format="srt")


def test_select_keeps_the_best() -> None:
    rows = [("a", (0, 1), "x"), ("a", (1, 2), "x"), ("b", (0, 1), "x"), ("b", (5, 6), "y")]
    collection = Collection.of(table_of(rows, [0.2, 0.9, 0.4, 0.3]))
    assert collection.select(max_segments=1).segments["score"].tolist() == [0.9, 0.4]
    assert collection.select(min_score=0.3).segments["score"].tolist() == [0.9, 0.4, 0.3]
    with pytest.raises(AnnotationError, match="only predictions"):
        Collection.of(table_of(rows)).select(min_score=0.3)


def test_convert_on_the_command_line(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    write_collection(
        Collection.of(table_of([("a", (0.25, 1), "x"), ("b", (1, 2), "y")], [0.9, 0.1])), found, format="activitynet"
    )
    run = CliRunner()
    out = run.invoke(main, ["convert", str(found), "--to", "webvtt", "-o", str(tmp_path / "v"), "--min-score", "0.3"])
    assert out.exit_code == 0, out.output
    assert (tmp_path / "v/a.vtt").read_text() == "WEBVTT\n\n1\n00:00:00.250 --> 00:00:01.000\nx · 0.9000\n\n"
    back = tmp_path / "back.json"
    out = run.invoke(main, ["convert", str(tmp_path / "v"), "--to", "activitynet", "-o", str(back), "--json"])
    assert json.loads(out.stdout)["segments"] == 1
    assert read_predictions(back).values.tolist() == [["a", 0.25, 1.0, "x", 0.9]]
    truth = tmp_path / "truth.json"
    entry = {"subset": "test", "duration": 10, "fps": 10, "annotations": [{"segment": [1, 2], "label": "x"}]}
    truth.write_text(json.dumps({"database": {"a": entry, "c": {**entry, "subset": "val"}}}))
    arguments = ["convert", str(truth), "--to", "labelstudio", "-o", str(tmp_path / "ls.json"), "--subset", "test"]
    assert run.invoke(main, arguments).exit_code == 0
    tasks = json.loads((tmp_path / "ls.json").read_text())
    assert [task["data"]["tad_video"] for task in tasks] == ["a"]
    assert tasks[0]["annotations"][0]["result"][0]["value"]["ranges"] == [{"start": 11, "end": 20}]


def test_formats_on_the_command_line_are_all_formats() -> None:
    from tad.cli import exchange

    assert tuple(FORMATS) == exchange.FORMATS


def test_nan_times_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="row 0"):
        Collection.of(table_of([("a", (math.nan, 1), "x")]))
