"""Readers and writers of predictions: both layouts, what is refused and how, exact round trips, atomic writes."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tad.annotations import read_annotations, read_predictions, read_truth, write_predictions
from tad.errors import AnnotationError


def put(folder, content, name="predictions.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def rows(table):
    return [tuple(row) for row in table.itertuples(index=False)]


def scored(*entries, columns=("video", "start_s", "end_s", "label", "score")):
    return pd.DataFrame(entries, columns=list(columns))


def test_predictions_json(tmp_path):
    results = {
        "b": [
            {"segment": ["1.5", 2], "label": "run", "score": "0.25", "more": 1},
            {"label": "run", "score": -3, "segment": [9, 7]},
        ],
        "a": [],
        "é": [{"segment": [3, 3], "label": "x", "score": 1e-300}],
    }
    table = read_predictions(put(tmp_path, {"version": "VERSION 1.3", "results": results, "external_data": {}}))
    assert rows(table) == [("b", 1.5, 2.0, "run", 0.25), ("b", 9.0, 7.0, "run", -3.0), ("é", 3.0, 3.0, "x", 1e-300)]
    assert list(table.columns) == ["video", "start_s", "end_s", "label", "score"]


def test_proposals_have_no_label_column(tmp_path):
    path = put(tmp_path, {"results": {"b": [{"segment": [1, 2], "score": 0.5}]}})
    assert list(read_predictions(path).columns) == ["video", "start_s", "end_s", "score"]
    for text in ("video,start_s,end_s,score\nb,1,2,0.5\n", "video,start_s,end_s,label,score\nb,1,2,,0.5\n"):
        assert list(read_predictions(put(tmp_path, text, "p.csv")).columns) == ["video", "start_s", "end_s", "score"]
    for name in ("q.json", "q.csv"):
        write_predictions(tmp_path / name, read_predictions(path))
        pd.testing.assert_frame_equal(read_predictions(tmp_path / name), read_predictions(path))


def test_a_label_column_of_nothing_says_that_they_are_proposals(tmp_path):
    for nothing in (None, math.nan, pd.NA):
        write_predictions(tmp_path / "p.csv", scored(("a", 0, 1, nothing, 1.0), ("a", 0, 2, nothing, 1.0)))
        assert "label" not in read_predictions(tmp_path / "p.csv").columns
    with pytest.raises(AnnotationError, match="row 1: has no label; all rows need one, or none"):
        write_predictions(tmp_path / "p.csv", scored(("a", 0, 1, "x", 1.0), ("a", 0, 2, None, 1.0)).astype("object"))


def test_no_predictions_are_an_empty_table(tmp_path):
    for content in ({"results": {}}, {"results": {"a": []}}):
        table = read_predictions(put(tmp_path, content))
        assert table.empty
        assert list(table.columns) == ["video", "start_s", "end_s", "label", "score"]
    for name in ("e.json", "e.csv"):
        write_predictions(tmp_path / name, table)
        assert read_predictions(tmp_path / name).empty


def entry(**changes):
    """A prediction file with one entry, changed; None takes a key away."""
    fields = {"segment": [0, 1], "label": "a", "score": 1, **changes}
    return {"results": {"x": [{key: value for key, value in fields.items() if value is not None}]}}


GOOD = {"segment": [0, 1], "label": "a", "score": 1}
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (entry(score=NAN), "video 'x', prediction 0: score must be a finite number, got nan"),
        (entry(score=INF), "score must be a finite number, got inf"),
        (entry(score="high"), "score must be a finite number, got 'high'"),
        (entry(score=True), "score must be a finite number, got True"),
        (entry(score=[1]), "score must be a finite number, got [1]"),
        (entry(segment=[NAN, 1]), "start must be a finite number, got nan"),
        (entry(segment=[0, None]), "end must be a finite number, got None"),
        (entry(segment=[0]), "prediction 0: 'segment' must be [start, end]"),
        (entry(segment="0 1"), "'segment' must be [start, end] in seconds, got '0 1'"),
        (entry(score=None), "prediction 0: needs 'segment' and 'score'"),
        (entry(segment=None), "prediction 0: needs 'segment' and 'score'"),
        (entry(label=3), "label must be text, got 3"),
        (entry(label=""), "label is empty"),
        (
            {"results": {"x": [GOOD, {"segment": [0, 1], "score": 1}]}},
            "prediction 1: has no label; all rows need one, or none",
        ),
        ({"results": {"x": [[0, 1, 1]]}}, "prediction 0: needs 'segment' and 'score', got [0, 1, 1]"),
        ({"results": {"x": GOOD}}, "video 'x': must hold a list of predictions"),
        ({"results": {"": [GOOD]}}, "the video id is empty"),
        ({"results": []}, "'results' must be an object of lists by video id, got []"),
        ({"database": {}}, "It holds truth ('database'); read it with read_truth."),
        ([], "has no 'results'"),
        ({"x": []}, "has no 'results'"),
        ('{"results": {"x": [], "x": []}}', "key 'x': occurs twice"),
    ],
)
def test_bad_predictions_in_json(tmp_path, content, message):
    with pytest.raises(AnnotationError) as caught:
        read_predictions(put(tmp_path, content))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video,start,end,label\nx,0,1,a\n", r"has no column for score"),
        ("video,start,end,score\nx,0,1,nan\n", r"line 2: score must be a finite number, got 'nan'"),
        ("video,start,end,label,score\nx,0,1,a,1\nx,0,1,,1\n", r"line 3: label is empty"),
        ("video,start,end,score\nx,0,1\n", r"line 2: has 3 fields"),
    ],
)
def test_bad_predictions_in_csv(tmp_path, text, message):
    with pytest.raises(AnnotationError, match=message):
        read_predictions(put(tmp_path, text, "p.csv"))


def test_blanks_around_the_fields_of_csv_are_no_part_of_them(tmp_path):
    text = 'video , start,end, label , score\n a b, 0 ,10,\trun fast , 0.9\r\n"a b" ,1, 2, "run ""a"", b" ,0.5\n \n'
    expected = [("a b", 0.0, 10.0, "run fast", 0.9), ("a b", 1.0, 2.0, 'run "a", b', 0.5)]
    assert rows(read_predictions(put(tmp_path, text, "p.csv"))) == expected
    truth = read_annotations(
        put(tmp_path, text.replace(" score", "fps").replace(" 0.9", "9").replace("0.5", "9"), "t.csv")
    )
    assert rows(truth[["video", "start_s", "end_s", "label"]]) == [row[:4] for row in expected]
    proposals = read_predictions(put(tmp_path, "video,start,end,label,score\na, 0, 1, , 1\n", "q.csv"))
    assert "label" not in proposals.columns


def test_blanks_between_quotes_are_kept_in_truth_and_predictions(tmp_path):
    text = 'video,start,end,label,score\n" a",0,1," run\n, x ",0.9\nb, 0,1,c,0.9\n'
    expected = [(" a", " run\n, x "), ("b", "c")]
    assert rows(read_predictions(put(tmp_path, text, "p.csv"))[["video", "label"]]) == expected
    cut = text.replace(",score", "").replace(",0.9", "")
    assert rows(read_annotations(put(tmp_path, cut, "t.csv"))[["video", "label"]]) == expected
    info = put(tmp_path, 'video,subset\n" a"," val "\nb , val\n', "i.csv")
    assert read_truth(tmp_path / "t.csv", videos=info).videos["subset"].tolist() == ["val", "val"]
    with pytest.raises(
        AnnotationError, match=r"line 5: score must be a finite number, got 'high'"
    ):  # lines still count
        read_predictions(put(tmp_path, text + "b, 0, 1, c, high\n", "p.csv"))


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).filter(str.strip)
finite = st.floats(-1e300, 1e300)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(names, finite, finite, names, finite), max_size=8))
def test_round_trips_lose_nothing(tmp_path, entries):
    table = scored(*entries).astype({"video": "str", "label": "str", "start_s": float, "end_s": float, "score": float})
    write_predictions(tmp_path / "p.csv", table)
    pd.testing.assert_frame_equal(read_predictions(tmp_path / "p.csv"), table, check_exact=True)
    write_predictions(tmp_path / "p.json", table)
    back = read_predictions(tmp_path / "p.json")
    order = {video: rank for rank, video in enumerate(dict.fromkeys(table["video"]))}
    by_video = table.assign(rank=table["video"].map(order)).sort_values("rank", kind="stable", ignore_index=True)
    pd.testing.assert_frame_equal(back, by_video.drop(columns="rank"), check_exact=True)
    signs = np.signbit(back[["start_s", "end_s", "score"]].to_numpy())
    assert (signs == np.signbit(by_video[["start_s", "end_s", "score"]].to_numpy())).all()  # -0.0 stays -0.0


def test_results_layout_is_the_official_one(tmp_path):
    table = scored(("b", 1.5, 2, "run", np.float32(0.5)), ("a", 0, 1, "é", 0.1)).assign(extra=1)
    write_predictions(tmp_path / "deep" / "p.json", table, videos=["c", "b"], external_data={"used": True})
    content = json.loads((tmp_path / "deep" / "p.json").read_text())
    assert content == {
        "version": "VERSION 1.3",
        "external_data": {"used": True},
        "results": {
            "b": [{"segment": [1.5, 2.0], "score": 0.5, "label": "run"}],
            "a": [{"segment": [0.0, 1.0], "score": 0.1, "label": "é"}],
            "c": [],
        },
    }
    assert list(content["results"]) == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("table", "name", "message"),
    [
        (scored(("a", 0, 1, "x", 1)), "p.txt", "written as .json or .csv, not .txt"),
        (scored(("a", 0, 1, "x", 1)), "p", "not without suffix"),
        (scored(("a", 0, 1, "x", math.nan)), "p.json", "row 0: score must be a finite number, got nan"),
        (scored(("a", 0, 1, 3, 1)), "p.json", "row 0: label must be text, got 3"),
        (scored((7, 0, 1, "x", 1)), "p.csv", "row 0: the video id must be text, got 7"),
        (scored(("a", 0, 1, "\udcff", 1)), "p.csv", "not valid Unicode"),
        (scored(("a", 0, 1, "x", 1)).drop(columns="score"), "p.csv", "no column 'score'"),
    ],
)
def test_what_cannot_be_written(tmp_path, table, name, message):
    with pytest.raises(AnnotationError) as caught:
        write_predictions(tmp_path / name, table)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "p.json"
    write_predictions(path, scored(("a", 0, 1, "x", 1)))
    before = path.read_bytes()
    with pytest.raises(AnnotationError, match="plain JSON values"):
        write_predictions(path, scored(("b", 0, 1, "x", 1)), external_data={"used": object()})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(AnnotationError, match=r"p\.json cannot be written: No space left"):
        write_predictions(path, scored(("b", 0, 1, "x", 1)))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(AnnotationError, match="cannot be written"):
        write_predictions(file / "p.json", scored(("a", 0, 1, "x", 1)))


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "p.csv"
    write_predictions(path, scored(("a", 0, 1, "x", 1)))
    code = (
        "import os, sys, pandas as pd, tad.annotations._files as files\n"
        "os.fsync = lambda _: os._exit(9)\n"
        "from tad.annotations import write_predictions\n"
        "table = pd.DataFrame({'video': ['b'] * 999, 'start_s': 0.0, 'end_s': 1.0, 'label': 'x', 'score': 1.0})\n"
        "write_predictions(sys.argv[1], table)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    assert read_predictions(path)["video"].tolist() == ["a"]


def test_written_files_have_ordinary_permissions(tmp_path):
    mask = os.umask(0o022)
    try:
        write_predictions(tmp_path / "p.csv", scored(("a", 0, 1, "x", 1)))
    finally:
        os.umask(mask)
    assert (tmp_path / "p.csv").stat().st_mode & 0o777 == 0o644


def test_public_predictions_are_read(shared):
    folder = shared / "golden/evaluation/eval"
    for name, count, labelled in (("thumos_main_s1", 22729, True), ("anet_prop_s1", 51071, False)):
        table = read_predictions(folder / f"{name}.pred.json.gz")
        assert len(table) == count
        assert ("label" in table.columns) == labelled
    with pytest.raises(AnnotationError, match="4933 problems"):
        read_predictions(shared / "data/activitynet13/sample_classification_prediction.json")
