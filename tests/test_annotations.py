"""Readers and writers of truth and predictions: the field's layouts, what is refused and how, exact round trips."""

import gzip
import json
import math
import os

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tad.annotations import (
    read_annotations,
    read_predictions,
    read_truth,
    read_videos,
)
from tad.errors import AnnotationError

INFO = "video,fps,sample_fps,count,sample_count\nvideo_test_0000004,30.0,10.0,1012.0,337\n"


def put(folder, content, name="truth.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def anet(**videos):
    return {"version": "VERSION 1.3", "taxonomy": [], "database": videos}


def video(*segments, subset="training", **more):
    return {"subset": subset, **more, "annotations": [{"segment": [s, e], "label": x} for s, e, x in segments]}


def rows(table):
    return [tuple(row) for row in table.itertuples(index=False)]


def refused(path, **options):
    """The message with which a file is refused, on one line, without the folder."""
    with pytest.raises(AnnotationError) as caught:
        read_truth(path, **options)
    return str(caught.value).replace(str(path.parent) + os.sep, "")


# ---- layouts -----------------------------------------------------------------------------------------------------
def test_activitynet_layout(tmp_path):
    database = anet(
        b=video((1, 2.5, "jump"), ("3.25", "4", "run"), subset="Val", duration="12.5", fps=25),
        a=video(subset="testing", duration=None),
    )
    truth = read_truth(put(tmp_path, database))
    assert rows(truth.segments) == [("b", 1.0, 2.5, "jump", "Val"), ("b", 3.25, 4.0, "run", "Val")]
    assert truth.videos["video"].tolist() == ["b", "a"]  # the file's order, and videos without segments
    assert truth.videos["duration_s"].tolist()[0] == 12.5
    assert truth.videos["fps"].tolist()[0] == 25
    assert truth.videos[["duration_s", "fps"]].iloc[1].isna().all()
    assert truth.classes == ["jump", "run"]
    assert truth.subsets == ["Val", "testing"]
    assert truth.path == tmp_path / "truth.json"
    assert truth.notes == ()
    assert list(truth.segments.dtypes.astype(str)[["start_s", "end_s"]]) == ["float64", "float64"]


def test_flat_layouts_of_bmn_and_mmaction2(tmp_path):
    bmn = {
        "v_x": {
            "duration_second": 82.73,
            "duration_frame": 2067,
            "annotations": [{"segment": [6, 7], "label": "Ballet"}],
        }
    }
    truth = read_truth(put(tmp_path, bmn))
    assert rows(truth.videos[["video", "subset", "duration_s"]]) == [("v_x", "", 82.73)]
    assert truth.subsets == []
    info = put(
        tmp_path, "video,numFrame,seconds,fps,rfps,subset,featureFrame\nv_x,2067,80.0,25,24.9,training,2064\n", "i.csv"
    )
    truth = read_truth(tmp_path / "truth.json", videos=info)
    assert rows(truth.videos) == [("v_x", "training", 82.73, 25.0)]  # the annotation's own duration wins
    assert rows(truth.subset("train").segments) == [("v_x", 6.0, 7.0, "Ballet", "training")]
    mmaction = {
        "v_x": {"duration": 224.49, "subset": "validation", "annotations": [{"segment": [1, 2], "label": "Ballet"}]}
    }
    truth = read_truth(put(tmp_path, mmaction), strip_prefix="v_")
    assert rows(truth.segments) == [("x", 1.0, 2.0, "Ballet", "validation")]


def test_thumos14_csv(tmp_path):
    text = (
        "video,type,type_idx,start,end,startFrame,endFrame\n"
        "video_test_0000004,CricketBowling,23,0.2,1.1,6,33\n"
        "video_test_0000004,Ambiguous,0,2.2,3.1,6,33\n"
        "video_test_0001292,Ambiguous,0,2.2,3.1,6,33\n"
        "video_validation_0000051,Diving,26,3.5,4,1,2\n"
        "video_validation_0000051,CliffDiving,22,3.5,4,1,2\n"
    )
    path, info = put(tmp_path, text, "a.csv"), put(tmp_path, INFO, "info.csv")
    truth = read_truth(path, videos=info)
    assert rows(truth.segments) == [
        ("video_test_0000004", 0.2, 1.1, "CricketBowling", "test"),
        ("video_validation_0000051", 3.5, 4.0, "Diving", "validation"),
        ("video_validation_0000051", 3.5, 4.0, "CliffDiving", "validation"),
    ]
    assert truth.videos["video"].tolist() == ["video_test_0000004", "video_test_0001292", "video_validation_0000051"]
    assert truth.videos["duration_s"].tolist()[0] == 1012 / 30
    assert math.isnan(truth.videos["duration_s"].tolist()[1])
    assert truth.notes == ("2 segments labelled 'Ambiguous' left out: the label is no class",)
    kept = read_truth(path, keep_ambiguous=True)
    assert len(kept.segments) == 5
    assert kept.notes == ()


def test_class_indices_of_gtad(tmp_path):
    header = "video-name,t-init,t-end,f-init,f-end,video-duration,frame-rate,video-frames,label-idx\n"
    text = (
        header
        + "video_test_0000278,0.0,1.4,0,42,215.166667,30.0,6455,-1\n"
        + "video_test_0000278,95,97,1,2,215.166667,30.0,6455,19\n"
    )
    truth = read_truth(put(tmp_path, text, "g.csv"))
    assert rows(truth.segments) == [("video_test_0000278", 95.0, 97.0, "VolleyballSpiking", "test")]
    assert rows(truth.videos) == [("video_test_0000278", "test", 215.166667, 30.0)]
    other = header + "mine,0,1,0,1,10,30,300,1\n"
    assert "pass their names as classes=" in refused(put(tmp_path, other, "o.csv"))
    assert read_truth(tmp_path / "o.csv", classes=["a", "b"]).classes == ["b"]
    for bad in ("2", "0.5", "x", "nan", "-2"):
        path = put(tmp_path, header + f"mine,0,1,0,1,10,30,300,{bad}\n", "bad.csv")
        assert f"label index '{bad}' is not one of -1 ... 1" in refused(path, classes=["a", "b"])


@pytest.mark.parametrize(
    "header",
    [
        "video,start,end,label",
        "Video_ID,t-start,t-end,class",
        "name,start_s,end_s,type",
        "video-id,t-init,t-end,Label",
    ],
)
def test_plain_csv_under_several_names(tmp_path, header):
    text = f"{header}\r\né/1, 0.5 ,1e1,long jump\r\n\r\né/1,2,2,run\r\n"
    path = put(tmp_path, "\ufeff" + text, "plain.csv")
    assert rows(read_annotations(path)) == [("é/1", 0.5, 10.0, "long jump", ""), ("é/1", 2.0, 2.0, "run", "")]


def test_plain_csv_with_everything(tmp_path):
    text = 'fps,label,end,start,subset,video,duration\n25,"a, b",2,1,train,x,60\n,c,3,2,,x,60.0\n,c,3,2,val,y,\n'
    message = refused(put(tmp_path, text, "plain.csv"))
    assert "line 3, video 'x': duration is '60.0' here and '60' in an earlier row" in message
    truth = read_truth(put(tmp_path, text.replace("60.0", "60"), "plain.csv"))
    assert rows(truth.segments)[0] == ("x", 1.0, 2.0, "a, b", "train")
    assert rows(truth.videos)[0] == ("x", "train", 60.0, 25.0)
    assert truth.subset("training").videos["video"].tolist() == ["x"]


def test_layout_is_told_by_content_not_by_name(tmp_path):
    assert len(read_truth(put(tmp_path, anet(x=video((0, 1, "a"))), "odd.txt")).segments) == 1
    assert len(read_truth(put(tmp_path, "video,start,end,label\nx,0,1,a\n", "odd.annotations")).segments) == 1
    packed = tmp_path / "truth.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(anet(x=video((0, 1, "a")))).encode()))
    assert len(read_truth(packed).segments) == 1


# ---- subsets -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("stored", "asked"),
    [("training", "train"), ("train", "Training"), ("Validation", "val"), ("val", "VALIDATION"), ("Test", "testing")],
)
def test_spellings_of_a_subset_are_one(tmp_path, stored, asked):
    path = put(tmp_path, anet(x=video((0, 1, "a"), subset=stored), y=video((0, 1, "a"), subset="fold")))
    assert "unknown subset 'fold'. Known:" in refused(path)
    assert read_truth(path, subsets=["fold"]).subset(asked).videos["video"].tolist() == ["x"]
    assert read_annotations(path, asked, subsets=["fold"])["subset"].tolist() == [stored]
    assert read_videos(path, "fold", subsets=["fold"])["video"].tolist() == ["y"]


def test_a_subset_that_is_absent_is_an_error(tmp_path):
    path = put(tmp_path, anet(x=video((0, 1, "a")), y=video((0, 1, "a"), subset="val")))
    with pytest.raises(AnnotationError, match=r"truth\.json has no subset 'test'; subsets present: training, val"):
        read_annotations(path, "test")
    assert "unknown subset 'validaton'. Did you mean 'validation'?" in refused(
        put(tmp_path, anet(x=video(subset="validaton")))
    )


def test_both_spellings_of_one_subset_are_taken_together(tmp_path):
    path = put(tmp_path, anet(x=video((0, 1, "a")), y=video((0, 1, "b"), subset="train"), z=video(subset="val")))
    part = read_truth(path).subset("train")
    assert part.videos["video"].tolist() == ["x", "y"]
    assert part.classes == ["a", "b"]
    assert part.segments.index.tolist() == [0, 1]


# ---- beyond the end ----------------------------------------------------------------------------------------------
def test_ends_within_the_tolerance_stay_as_they_are(tmp_path):
    path = put(tmp_path, anet(x=video((0, 101.0, "a"), duration=100.0), y=video((0, 1.1, "a"), duration=1.0)))
    truth = read_truth(path)
    assert truth.segments["end_s"].tolist() == [101.0, 1.1]
    assert truth.notes == ()
    assert read_truth(path, beyond_end="drop").segments["end_s"].tolist() == [101.0, 1.1]
    clipped = read_truth(path, beyond_end="clip")
    assert clipped.segments["end_s"].tolist() == [100.0, 1.0]
    assert clipped.notes == (
        "2 segments that end behind their video's end: cut at the end, or left out if they start there (x, y)",
    )


def test_ends_beyond_the_tolerance(tmp_path):
    database = anet(x=video((0, 101.01, "a"), (100, 102, "b"), (5, 6, "c"), duration=100.0), y=video((0, 9e9, "a")))
    path = put(tmp_path, database)
    message = refused(path)
    assert "2 problems" in message
    assert "video 'x', segment 0: ends at 101.01 s, the video at 100 s; correct the end or the duration" in message
    assert "video 'x', segment 1" in message
    assert read_truth(path, beyond_end="keep").segments["end_s"].tolist() == [101.01, 102, 6, 9e9]
    assert read_truth(path, beyond_end="clip").segments["end_s"].tolist() == [100, 6, 9e9]
    dropped = read_truth(path, beyond_end="drop")
    assert dropped.segments["label"].tolist() == ["c", "a"]
    assert dropped.notes == ("2 segments that end behind their video's end: left out (x)",)
    assert "beyond_end is 'kep'. Did you mean 'keep'?" in refused(path, beyond_end="kep")


def test_known_defects_of_thumos14_are_kept_and_noted_but_no_new_ones(tmp_path):
    name = "video_test_0001081"
    truth = read_truth(put(tmp_path, anet(**{name: video((127.5, 130.1, "a"), subset="test", duration=117.13)})))
    assert len(truth.segments) == 1
    assert truth.notes == (f"1 segments that end behind their video's end: known defects of THUMOS14, kept ({name})",)
    assert read_truth(tmp_path / "truth.json", beyond_end="drop").segments.empty
    assert "ends at 500 s" in refused(
        put(tmp_path, anet(**{name: video((127.5, 500, "a"), subset="test", duration=117.13)}))
    )


# ---- what is refused ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ([5, 4], "end 4.0 s lies before start 5.0 s; swap or correct them"),
        ([-0.5, 4], "start -0.5 s is negative"),
        ([math.nan, 4], "start must be a finite number of seconds, got nan"),
        ([0, math.inf], "end must be a finite number of seconds, got inf"),
        ([0, 10**400], "end must be a finite number of seconds"),
        ([0, "nan"], "end must be a finite number of seconds, got 'nan'"),
        ([0, "soon"], "end must be a finite number of seconds, got 'soon'"),
        ([0, "1_0"], "end must be a finite number of seconds, got '1_0'"),
        ([True, 4], "start must be a finite number of seconds, got True"),
        ([None, 4], "start must be a finite number of seconds, got None"),
        ([[0], 4], "start must be a finite number of seconds, got [0]"),
        ([1, 2, 3], "'segment' must be [start, end] in seconds, got [1, 2, 3]"),
        ([], "'segment' must be [start, end]"),
        ({"start": 1}, "'segment' must be [start, end] in seconds, got {'start': 1}"),
        ("0-4", "'segment' must be [start, end] in seconds, got '0-4'"),
    ],
)
def test_bad_times_name_video_segment_and_value(tmp_path, segment, message):
    entry = {"subset": "val", "annotations": [{"segment": [0, 1], "label": "a"}, {"segment": segment, "label": "run"}]}
    found = refused(put(tmp_path, anet(x=entry)))
    assert found.startswith("truth.json: video 'x', segment 1")
    assert message in found


@pytest.mark.parametrize("end", ["nan", "inf", "-inf", "1e999", "", "3,5".replace(",", ";"), "0x10", "-1"])
def test_bad_times_in_csv_name_the_line(tmp_path, end):
    found = refused(put(tmp_path, f"video,start,end,label\nx,0,1,a\nx,0,{end},a\n", "t.csv"))
    assert found.startswith("t.csv: line 3, video 'x' ('a'): end")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (anet(x={"subset": "val"}), "video 'x': 'annotations' is missing"),
        (anet(x={"subset": "val", "annotations": None}), "'annotations' must be a list, it is None"),
        (anet(x={"subset": "val", "annotations": {}}), "'annotations' must be a list, it is {}"),
        (anet(x={"annotations": []}), "video 'x': has no 'subset'"),
        (anet(x={"subset": None, "annotations": []}), "subset must be text, got None"),
        (anet(x={"subset": 3, "annotations": []}), "subset must be text, got 3"),
        (anet(x={"subset": " ", "annotations": []}), "subset is empty"),
        (anet(x=[]), "video 'x': must be an object with 'annotations', it is a list"),
        (
            anet(x={"subset": "val", "annotations": [3]}),
            "segment 0: must be an object with 'segment' and 'label', it is a number",
        ),
        (anet(x={"subset": "val", "annotations": [{"label": "a"}]}), "segment 0: has no 'segment'"),
        (anet(x={"subset": "val", "annotations": [{}]}), "segment 0: has no 'segment' and no 'label'"),
        (anet(x=video((0, 1, 7))), "segment 0: label must be text, got 7"),
        (anet(x=video((0, 1, ""))), "segment 0: label is empty"),
        (anet(x=video((0, 1, None))), "segment 0: label must be text, got None"),
        (anet(x=video(duration=-3)), "video 'x': duration must be a positive number, or null if unknown; got -3"),
        (anet(x=video(duration=0)), "duration must be a positive number"),
        (anet(x=video(duration="long")), "got 'long'"),
        (anet(x=video(duration=math.nan)), "duration must be a positive number"),
        (anet(x=video(fps=[25])), "fps must be a positive number, or null if unknown; got [25]"),
        (anet(**{"": video()}), "the video id is empty"),
        (anet(**{"\ud800": video()}), "not valid Unicode"),
        ({"database": []}, "'database' must be an object of videos, it is a list"),
        ({"database": {}}, "'database' is empty"),
        ({"database": None}, "it is a null"),
        ({}, "holds an empty JSON object"),
        ([], "holds a JSON list at its top"),
        (["a"], "known layouts"),
        ({"results": {}}, "holds predictions ('results'), not truth; read it with read_predictions"),
        ({"x": {"duration": 3}}, "no entry has 'annotations'"),
        ({"x": {"annotations": []}, "y": {}}, "video 'y': 'annotations' is missing"),
    ],
)
def test_wrong_shapes_of_json(tmp_path, content, message):
    assert message in refused(put(tmp_path, content))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ('{"database": {"x": {"subset": "val", "annotations": [', "is not valid JSON: "),
        ('{"database": {"x": {"subset": "val", "annotations": [', "cut off while copying?"),
        ('{"database": }', "line 1, column 14"),
        ('{"database": {}} trailing', "Extra data"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "not valid JSON"),
        ("video,start,end,label\nx,0,1,a\n", "is not JSON: it starts with 'video,start,end,labe'"),
        (
            '{"database": {"x": {"subset": "val", "annotations": []}, "x": {"subset": "val", "annotations": []}}}',
            "key 'x': occurs twice",
        ),
        ('{"database": {"x": {"subset": "val", "subset": "train", "annotations": []}}}', "key 'subset': occurs twice"),
        ('{"database": {}, "database": {}}', "key 'database': occurs twice"),
    ],
)
def test_wrong_text(tmp_path, text, message):
    assert message in refused(put(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video,start,end\nx,0,1\n", "has no column for label; found 'video', 'start', 'end'"),
        ("x,0,1,a\nx,0,1,a\n", "Its first line looks like data: add a header line."),
        ("video;start;end;label\nx;0;1;a\n", "Separate the columns by commas."),
        (INFO, "It looks like a table of videos: pass it as videos=."),
        ("video,start,end,label\n", "has a header but no row"),
        ("video,start,end,label,score\nx,0,1,a,1\n", "has a score column, so it holds predictions"),
        (
            "video,start,end,label,class\nx,0,1,a,a\n",
            "columns 'label', 'class' could all be the label; keep one of them",
        ),
        ("video,video,start,end,label\nx,x,0,1,a\n", "column 'video' occurs more than once"),
        ("video,start,end,label\nx,0,1\n", "line 2: has 3 fields, the header has 4"),
        ("video,start,end,label\nx,0,1,a,b\n", "line 2: has 5 fields"),
        ('video,start,end,label\n"x,0,1,a\n', "not valid CSV"),
        ("video,start,end,label\n,0,1,a\n", "line 2, video '': the video id is empty"),
        ("video,start,end,label\nx,0,1,\n", "label is empty"),
        (
            "video,start,end,label,subset\nx,0,1,a,train\nx,0,1,a,val\n",
            "subset is 'val' here and 'train' in an earlier row",
        ),
    ],
)
def test_wrong_csv(tmp_path, text, message):
    assert message in refused(put(tmp_path, text, "t.csv"))


def test_files_that_cannot_be_read(tmp_path):
    assert "there is no such file" in refused(tmp_path / "absent.json")
    assert "is a folder" in refused(tmp_path)
    for name, data, message in (
        (
            "utf16.csv",
            "video,start,end,label\n".encode("utf-16"),
            "is not UTF-8 text (byte 0 is 0xff); save it again as UTF-8",
        ),
        ("latin.json", '{"database": {"é": 1}}'.encode("latin-1"), "is not UTF-8 text"),
        ("cut.json.gz", gzip.compress(bytes(range(256)))[:40], "is a damaged gzip file"),
    ):
        (tmp_path / name).write_bytes(data)
        assert message in refused(tmp_path / name)


def test_the_first_five_problems_are_spelt_out_and_the_others_counted(tmp_path):
    bad = [(5, 4, "a")] * 3
    found = refused(put(tmp_path, anet(x=video(*bad), y=video((0, 1, "ok"), *bad), z=video(subset="nope"))))
    assert found.startswith("truth.json: 7 problems\n")
    assert found.count("\n") == 6
    assert "  5. video 'x', segment 2 ('a')" in found or "segment 1" in found
    assert found.endswith("... and 2 more")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["database", "annotations", "segment", "label", "subset", "duration", "results", "score", "x"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=15,
    )
)
def test_any_json_is_read_or_refused_as_an_annotation_error(tmp_path, content):
    path = put(tmp_path, content)
    for read in (read_truth, read_predictions):
        message = ""
        try:
            read(path)
        except AnnotationError as error:
            message = str(error)
        assert not message or str(path) in message


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80) | st.text(alphabet='video,start,end,label,score\n"01.5xé ', max_size=80).map(str.encode))
def test_any_bytes_are_read_or_refused_as_an_annotation_error(tmp_path, data):
    path = tmp_path / "any.csv"
    path.write_bytes(data)
    for read in (read_truth, read_predictions):
        message = ""
        try:
            read(path)
        except AnnotationError as error:
            message = str(error)
        assert not message or str(path) in message


# ---- companions --------------------------------------------------------------------------------------------------
def test_companions_fill_gaps_from_csv_json_and_tables(tmp_path):
    path = put(tmp_path, {"v_x": {"annotations": [{"segment": [0, 1], "label": "a"}]}, "v_y": {"annotations": []}})
    gurkirt = put(tmp_path, {"v_x": {"duration": 82.68, "frame-rate": 25.0, "read-num-frames": 3}, "v_z": {}}, "g.json")
    assert rows(read_videos(path, videos=gurkirt)[:1]) == [("v_x", "", 82.68, 25.0)]
    other = put(tmp_path, anet(v_y=video(subset="val", duration=7)), "anet.json")
    both = read_videos(path, videos=[gurkirt, other])
    assert both["duration_s"].tolist() == [82.68, 7.0]
    assert both["subset"].tolist() == ["", "val"]
    table = pd.DataFrame({"video": ["v_y"], "duration_s": [9.0], "fps": [np.nan], "subset": ["test"]})
    assert rows(read_videos(path, videos=table)[["video", "subset", "duration_s"]][1:]) == [("v_y", "test", 9.0)]
    assert len(read_videos(path, videos=gurkirt)) == 2  # a companion adds no videos


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video,fps\nother,25\n", r"none of the 1 videos of .*truth.json is in it \(ids there look like 'other'"),
        ("video,fps\nx,0\n", r"line 2, video 'x': fps must be a positive number, got '0'"),
        ("video,fps\nx,nan\n", r"fps must be a positive number, got 'nan'"),
        ("video,fps\nx,25\nx,30\n", r"line 3, video 'x': occurs before with other values"),
        ("video,height\nx,25\n", r"at least one of subset, duration, fps and count; found 'video', 'height'"),
        ("fps\n25\n", r"needs a column 'video'"),
        ("[1]", r"must be an object of objects by video id"),
        ('{"x": 3}', r"must be an object of objects by video id"),
        ('{"x": {"duration": "?"}}', r"video 'x', video 'x': duration must be|video 'x'.*: duration must be"),
    ],
)
def test_bad_companions(tmp_path, text, message):
    path = put(tmp_path, anet(x=video((0, 1, "a"))))
    with pytest.raises(AnnotationError, match=message):
        read_truth(path, videos=put(tmp_path, text, "companion"))


def test_a_companion_s_duration_is_checked_against_the_segments(tmp_path):
    path = put(tmp_path, "video,start,end,label\nx,0,50,a\n", "t.csv")
    info = put(tmp_path, "video,fps,count\nx,25,250\n", "info.csv")
    assert "line 2, video 'x': ends at 50 s, the video at 10 s" in refused(path, videos=info)
    with pytest.raises(AnnotationError, match="needs a column 'video'"):
        read_truth(path, videos=pd.DataFrame({"name": ["x"]}))


def test_stripping_a_prefix_may_not_merge_videos(tmp_path):
    path = put(tmp_path, anet(v_x=video((0, 1, "a")), x=video((0, 1, "a"))))
    assert "the id 'x' occurs with and without the prefix 'v_'" in refused(path, strip_prefix="v_")
    results = put(
        tmp_path,
        {"results": {"v_x": [], "x": [{"segment": [0, 1], "score": 1}], "v_y": [{"segment": [0, 1], "score": 1}]}},
        "p.json",
    )
    assert read_predictions(results, strip_prefix="v_")["video"].tolist() == ["x", "y"]
    results = put(tmp_path, {"results": {k: [{"segment": [0, 1], "score": 1}] for k in ("v_x", "x")}}, "p.json")
    with pytest.raises(AnnotationError, match="fall together"):
        read_predictions(results, strip_prefix="v_")


# ---- the public files --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("golden/evaluation/gt/thumos14_gt.json", {"test": (212, 3358), "validation": (200, 3007)}),
        ("golden/evaluation/gt/anet13_trainval_gt.json", {"training": (9649, 14859), "validation": (4728, 7293)}),
        ("golden/evaluation/gt/anet13_val_full_reconstructed.json", {"validation": (4926, 7654)}),
        ("golden/evaluation/eval/anet_prop_s1.gt.json", {"validation": (400, 677)}),
        ("data/thumos14/thumos14_actionformer_format.json", {"Test": (212, 3358), "Validation": (200, 3007)}),
        ("data/thumos14/thumos_gt.json", {"test": (210, 3311), "train": (200, 3007)}),
        ("data/thumos14/thumos14_test_extra_characteristics.json", {"testing": (212, 3358)}),
        ("data/thumos14/thumos14_val_extra_characteristics.json", {"validation": (200, 3003)}),
        ("data/thumos14/test_Annotation.csv", {"test": (213, 3358)}),
        ("data/thumos14/test_Annotation_ours.csv", {"test": (212, 3358)}),
        ("data/thumos14/val_Annotation.csv", {"validation": (200, 3007)}),
        ("data/thumos14/val_Annotation_ours.csv", {"validation": (200, 3007)}),
        ("data/thumos14/thumos14_test_groundtruth.csv", {"test": (213, 3358)}),
        ("data/mmaction2_localization/eval_localization/gt.json", {"validation": (2, 4)}),
        ("data/mmaction2_localization/annotations/action_test_anno.json", {}),
        ("data/activitynet13/anet_anno_action.json", {}),
    ],
)
def test_public_annotations_are_read_with_the_defaults(shared, file, counts):
    truth = read_truth(shared / file)
    found = {name: (len(truth.subset(name).videos), len(truth.subset(name).segments)) for name in truth.subsets}
    assert found == counts
    if "thumos14" in file:
        assert len(truth.classes) == 20
        both = truth.segments[truth.segments["label"].isin(["Diving", "CliffDiving"])]
        cliff = (both["label"] == "CliffDiving").sum()
        double = both.duplicated(["video", "start_s", "end_s"]).sum()
        assert double == cliff  # every CliffDiving segment is a Diving segment as well
    if "anet_anno_action" in file:
        assert (len(truth.videos), len(truth.segments), len(truth.classes)) == (19228, 22152, 200)


def test_thumos14_with_the_durations_of_its_videos(shared):
    folder = shared / "data/thumos14"
    plain = read_truth(folder / "test_Annotation.csv")
    truth = read_truth(folder / "test_Annotation.csv", videos=folder / "test_video_info.csv")
    pd.testing.assert_frame_equal(plain.segments, truth.segments)
    assert truth.videos["video"][truth.videos["duration_s"].isna()].tolist() == ["video_test_0001292"]
    assert truth.notes[0].startswith("99 segments labelled 'Ambiguous' left out")
    assert truth.notes[1].startswith("26 segments that end behind their video's end: known defects of THUMOS14, kept")
    behind = read_truth(folder / "test_Annotation.csv", videos=folder / "test_video_info.csv", beyond_end="drop")
    assert len(behind.segments) == 3358 - 26
    assert len(read_annotations(folder / "test_Annotation.csv", keep_ambiguous=True)) == 3358 + 99
    json_segments = read_annotations(folder / "thumos14_actionformer_format.json", "test")
    keys = ["video", "start_s", "end_s", "label"]
    order = [table[keys].sort_values(keys, ignore_index=True) for table in (plain.segments, json_segments)]
    pd.testing.assert_frame_equal(*order)


def test_activitynet_with_bmn_s_subsets(shared):
    folder = shared / "data/activitynet13"
    truth = read_truth(folder / "anet_anno_action.json", videos=folder / "video_info_new.csv", strip_prefix="v_")
    counts = {name: (len(truth.subset(name).videos), len(truth.subset(name).segments)) for name in truth.subsets}
    assert counts == {"training": (9649, 14859), "validation": (4728, 7293), "testing": (4851, 0)}
    assert not truth.videos["video"].str.startswith("v_").all()
