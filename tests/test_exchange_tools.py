"""What each tool's own files hold, edited by hand or exported: read as it was meant, or refused by name."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tad.errors import AnnotationError
from tad.exchange import FORMATS, Collection, read_collection, write_collection

COLUMNS = ["video", "start_s", "end_s", "label"]


def rows_of(path: Path, **options: Any) -> list[list[Any]]:
    return read_collection(path, **options).segments.values.tolist()


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


# ELAN


def test_elan_a_corrected_class_counts_in_files_of_ours(tmp_path: Path) -> None:
    table = pd.DataFrame([["v", 1.0, 2.0, "jump"], ["v", 3.0, 4.0, " a\r\nb "]], columns=COLUMNS)
    (file,) = write_collection(Collection.of(table), tmp_path / "e", format="elan")
    assert rows_of(tmp_path / "e") == [["v", 3.0, 4.0, " a\r\nb "], ["v", 1.0, 2.0, "jump"]]
    file.write_text(file.read_text().replace(">jump<", "> run <"))
    assert rows_of(tmp_path / "e")[1] == ["v", 1.0, 2.0, "run"]
    file.write_text(file.read_text().replace("> run <", "><"))
    assert rows_of(tmp_path / "e")[1] == ["v", 1.0, 2.0, "jump"]


def test_elan_tiers_have_names_of_their_own(tmp_path: Path) -> None:
    spans = [
        ("x", 0, 4),
        ("x", 1, 3),
        ("x", 2, 5),
        ("x (2)", 0, 1),
        ("x (3)", 0, 4),
        ("x (3)", 1, 2),
        ("x (3) (2)", 0, 1),
    ]
    table = pd.DataFrame([("v", start, end, label) for label, start, end in spans], columns=COLUMNS)
    (file,) = write_collection(Collection.of(table), tmp_path / "e", format="elan")
    names = [tier.get("TIER_ID") for tier in ET.parse(file).getroot().iterfind("TIER")]
    assert len(names) == len(set(names)) == 7
    assert {"x", "x (2)", "x (3)", "x (3) (2)"} <= set(names)
    assert sorted(label for *_, label in rows_of(file)) == sorted(label for label, _, _ in spans)


def test_elan_other_units_are_refused(tmp_path: Path) -> None:
    table = pd.DataFrame([["v", 1.0, 2.0, "jump"]], columns=COLUMNS)
    (file,) = write_collection(Collection.of(table), tmp_path / "e", format="elan")
    file.write_text(file.read_text().replace('TIME_UNITS="milliseconds"', 'TIME_UNITS="PAL-frames"'))
    with pytest.raises(AnnotationError, match=r"v\.eaf.*'PAL-frames'"):
        read_collection(file)


# Subtitles


def test_subtitles_cues_without_an_empty_line_between(tmp_path: Path) -> None:
    srt = tmp_path / "a.srt"
    srt.write_text(
        "1\n00:00:01,000 --> 00:00:02,000\nrun\n2\n00:00:03,000 --> 00:00:04,000\n7\n"
        "00:00:05,000 --> 00:00:06,000\nx\n9\n"
    )
    assert rows_of(srt) == [["a", 1.0, 2.0, "run"], ["a", 3.0, 4.0, "7"], ["a", 5.0, 6.0, "x 9"]]
    vtt = tmp_path / "a.vtt"
    vtt.write_text("WEBVTT\n00:01.000 --> 00:02.000\nrun\n00:03.000 --> 00:04.000\njump\n")
    assert rows_of(vtt) == [["a", 1.0, 2.0, "run"], ["a", 3.0, 4.0, "jump"]]
    srt.write_text("1\n00:00:01,000 --> 00:00:02,000\nrun\n00:03 --> later\njump\n")
    with pytest.raises(AnnotationError, match=r"a\.srt: line 4"):
        read_collection(srt)


def test_webvtt_blocks_that_are_no_cues(tmp_path: Path) -> None:
    path = tmp_path / "a.vtt"
    path.write_text(
        "WEBVTT\n\nSTYLE\n::cue { content: '-->' }\n\nREGION\nid:x --> y\n\nNOTE 00:01.000 --> 00:02.000\nold\n\n"
        "NOTE\n00:01.000 --> 00:02.000\nolder\n\nNOTES\n00:03.000 --> 00:04.000\nNOTE well\n"
    )
    assert rows_of(path) == [["a", 3.0, 4.0, "NOTE well"]]


def test_subtitles_markup_is_no_part_of_a_label(tmp_path: Path) -> None:
    (tmp_path / "a.srt").write_text(
        '1\n00:00:01,000 --> 00:00:02,000\n{\\an8}<font color="#fff"><I>long</I>  <b>jump</b></font> <3 {x}\n'
    )
    assert rows_of(tmp_path / "a.srt") == [["a", 1.0, 2.0, "long jump <3 {x}"]]
    (tmp_path / "a.vtt").write_text(
        "WEBVTT\n\n00:01.000 --> 00:02.000\n<v Ann>clean&nbsp;&amp;\n jerk</v> &lt;b&gt; &eacute;\n"
    )
    assert rows_of(tmp_path / "a.vtt") == [["a", 1.0, 2.0, "clean & jerk <b> é"]]


@pytest.mark.parametrize("label", ["<i>x</i>", "a  b", " a", "{\\an8}x", "a\xa0b", "a --> b", "a\x85b"])
def test_srt_labels_that_would_be_damaged_are_refused(label: str, tmp_path: Path) -> None:
    table = Collection.of(pd.DataFrame([["v", 1.0, 2.0, label]], columns=COLUMNS))
    with pytest.raises(AnnotationError, match="rename it"):
        write_collection(table, tmp_path / "s", format="srt")
    assert not (tmp_path / "s").exists()
    if "  " not in label and label.isascii() and label == label.strip():
        write_collection(table, tmp_path / "w", format="webvtt")
        assert rows_of(tmp_path / "w") == [["v", 1.0, 2.0, label]]


def test_subtitles_hold_negative_zero(tmp_path: Path) -> None:
    table = pd.DataFrame([["v", -0.0, 2.0, "x", -0.0]], columns=[*COLUMNS, "score"])
    write_collection(Collection.of(table), tmp_path / "s", format="srt")
    assert rows_of(tmp_path / "s") == [["v", 0.0, 2.0, "x", 0.0]]


def test_subtitles_of_which_some_have_scores(tmp_path: Path) -> None:
    (tmp_path / "a.vtt").write_text("WEBVTT\n\n00:01.000 --> 00:02.000\nx · 0.5\n\n00:03.000 --> 00:04.000\ny\n")
    assert "1 of 2 cues" in read_collection(tmp_path).notes[0]
    (tmp_path / "b.vtt").write_text("WEBVTT\n\nNOTE tad: predictions\n")
    with pytest.raises(AnnotationError, match="1 cues have no score"):
        read_collection(tmp_path)


# All: predictions of which none is left


def test_srt_cannot_say_that_it_is_empty_of_predictions(tmp_path: Path) -> None:
    table = pd.DataFrame([["v", 1.0, 2.0, "x", 0.1]], columns=[*COLUMNS, "score"])
    write_collection(Collection.of(table).select(min_score=0.5), tmp_path / "s", format="srt")
    back = read_collection(tmp_path / "s")
    assert (back.scored, back.videos["video"].tolist()) == (False, ["v"])


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "srt"])
def test_predictions_stay_predictions_without_a_segment(name: str, tmp_path: Path) -> None:
    table = pd.DataFrame([["v", 1.0, 2.0, "x", 0.1]], columns=[*COLUMNS, "score"])
    empty = Collection.of(table).select(min_score=0.5)
    path = tmp_path / (name if FORMATS[name].folder else f"{name}{FORMATS[name].suffix}")
    write_collection(empty, path, format=name, fps=25)
    back = read_collection(path, format=name)
    assert back.scored
    assert back.segments.empty
    if name != "csv":
        assert back.videos["video"].tolist() == ["v"]
        truth = Collection.of(table.drop(columns="score").iloc[:0], pd.DataFrame({"video": ["v"]}))
        write_collection(truth, path, format=name, fps=25, subset="test", overwrite=True)
        assert not read_collection(path, format=name).scored


# VIA


def via(options: dict, kind: int, value: object, files: dict | None = None) -> dict:
    files = files or {"1": {"fid": 1, "fname": "a.mp4", "type": 4, "loc": 1, "src": ""}}
    return {
        "attribute": {"1": {"aname": "what", "anchor_id": "FILE1_Z2_XY0", "type": kind, "options": options}},
        "file": files,
        "view": {fid: {"fid_list": [fid]} for fid in files},
        "metadata": {"m": {"vid": "1", "flg": 0, "z": [1.0, 2.0], "xy": [], "av": {"1": value}}},
    }


def test_via_check_boxes_and_options_that_are_gone(tmp_path: Path) -> None:
    path = tmp_path / "via.json"
    options = {"0": "run", "1": "jump", "2": "x"}
    write_json(path, via(options, 2, "0,1"))
    assert rows_of(path) == [["a", 1.0, 2.0, "run"], ["a", 1.0, 2.0, "jump"]]
    for kind, value in ((4, "9"), (3, "9"), (2, "0,9"), (4, ""), (2, ""), (2, ","), (4, None), (1, " ")):
        write_json(path, via(options, kind, value))
        with pytest.raises(AnnotationError, match=r"via\.json.*'m'.*no (value|option)"):
            read_collection(path)
    write_json(path, via({}, 1, "0,1"))
    assert rows_of(path) == [["a", 1.0, 2.0, "0,1"]]


def test_via_addresses_and_files_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "via.json"
    url = {"fid": 1, "fname": "https://h/p/my%20clip.1.mp4?sig=a/b.mp4#t=1", "type": 4, "loc": 2, "src": ""}
    write_json(path, via({"0": "x"}, 4, "0", {"1": url}))
    assert rows_of(path) == [["my clip.1", 1.0, 2.0, "x"]]
    write_json(path, via({"0": "x"}, 4, "0", {"1": {**url, "fname": "p/100%25?.mp4", "loc": 1}}))
    assert rows_of(path)[0][0] == "100%25?"
    both = {fid: {"fid": fid, "fname": f"p{fid}/a.mp4", "type": 4, "loc": 1, "src": ""} for fid in ("1", "2")}
    write_json(path, via({"0": "x"}, 4, "0", both))
    with pytest.raises(AnnotationError, match=r"p1/a\.mp4.*p2/a\.mp4"):
        read_collection(path)


# Label Studio


def task(video: object = "a.mp4", **more: Any) -> dict[str, Any]:
    data = {"video": video} | ({"fps": more.pop("fps")} if "fps" in more else {})
    return {"data": data, **more}


def group(label: str = "x", **more: Any) -> dict[str, Any]:
    value = {"ranges": [{"start": 26, "end": 50}], "timelinelabels": [label]}
    return {"result": [{"type": "timelinelabels", "value": value, "score": 0.5}], **more}


@pytest.mark.parametrize(
    ("address", "video"),
    [
        ("/data/local-files/?d=videos/clip%201.mp4", "clip 1"),
        ("/data/upload/3/9f-b.c.mp4", "9f-b.c"),
        ("https://h/v/%C3%9Cbung.mp4?token=x.y", "Übung"),
        ("s3://b/x/50%25.mp4", "50%25"),
        ("C:\\v\\a.mp4", "a"),
    ],
)
def test_labelstudio_addresses(address: str, video: str, tmp_path: Path) -> None:
    path = write_json(tmp_path / "x.json", [task(address, annotations=[group()])])
    assert rows_of(path, fps=25) == [[video, 1.0, 2.0, "x"]]


def test_labelstudio_videos_of_one_name(tmp_path: Path) -> None:
    tasks = [task("s3://b/x/1.mp4", annotations=[group()]), task("s3://b/y/1.mp4", annotations=[group()])]
    with pytest.raises(AnnotationError, match=r"s3://b/x/1\.mp4.*s3://b/y/1\.mp4"):
        read_collection(write_json(tmp_path / "x.json", tasks), fps=25)
    back = read_collection(write_json(tmp_path / "x.json", tasks[:1] * 2), fps=25)
    assert len(back.segments) == 2
    assert "1 tasks are of a video that another task has" in back.notes[0]


@pytest.mark.parametrize(
    "wrong",
    [
        task("  "),
        task("/data/"),
        task(None),
        task(annotations=True),
        task(annotations=5),
        task(predictions="x"),
        task(annotations=[7]),
        task(annotations=[{"result": None}]),
        task(annotations=[{"result": ["x"]}]),
        task(fps=-25),
        task(fps=0),
        task(fps="abc"),
        task(fps=float("inf")),
        task(fps=True),
        task(annotations=[{"result": [{"type": "timelinelabels", "value": {"ranges": [], "timelinelabels": ["x"]}}]}]),
        task(
            annotations=[
                {
                    "result": [
                        {"type": "timelinelabels", "value": {"ranges": [{"start": 1, "end": 2}], "timelinelabels": []}}
                    ]
                }
            ]
        ),
        task(
            annotations=[
                {
                    "result": [
                        {
                            "type": "timelinelabels",
                            "value": {"ranges": [{"start": 0, "end": 2}], "timelinelabels": ["x"]},
                        }
                    ]
                }
            ]
        ),
    ],
)
def test_labelstudio_tasks_that_cannot_be_meant(wrong: dict, tmp_path: Path) -> None:
    path = write_json(tmp_path / "x.json", [wrong])
    with pytest.raises(AnnotationError, match=r"x\.json: task 0"):
        read_collection(path, format="labelstudio", fps=25)


def test_labelstudio_truth_and_predictions(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, [task(annotations=[{"result": []}], predictions=[group()])])
    back = read_collection(path, fps=25)
    assert not back.scored
    assert back.segments.empty
    assert "predictions of 1 tasks" in back.notes[0]
    write_json(path, [task(annotations=[{"result": [], "was_cancelled": True}], predictions=[group()])])
    assert rows_of(path, fps=25) == [["a", 1.0, 2.0, "x", 0.5]]
    write_json(path, [task(annotations=[], predictions=[3, 4])])
    assert not read_collection(path, fps=25).scored
    write_json(path, [task(annotations=[group()]), task("b.mp4")])
    back = read_collection(path, fps=25)
    assert back.videos["video"].tolist() == ["a", "b"]
    assert "1 tasks are not annotated" in back.notes[0]


def test_labelstudio_one_annotation_a_task_counts(tmp_path: Path) -> None:
    path = write_json(tmp_path / "x.json", [task(annotations=[group("a"), group("b")])])
    back = read_collection(path, fps=25)
    assert back.segments["label"].tolist() == ["a"]
    assert "1 further annotations" in back.notes[0]
    write_json(path, [task(annotations=[group("a"), group("b", ground_truth=True)])])
    assert read_collection(path, fps=25).segments["label"].tolist() == ["b"]


# FiftyOne


def test_fiftyone_predictions_need_a_confidence(tmp_path: Path) -> None:
    content = {"tad": "predictions", "classes": ["x"], "labels": {"v": [{"label": 0, "timestamps": [1, 2]}]}}
    with pytest.raises(AnnotationError, match=r"'v', detection 0.*confidence"):
        read_collection(write_json(tmp_path / "labels.json", content))
