"""What a report holds: the data are those given, hostile names stay text, and what is absent breaks nothing."""

import json
import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from tad.annotations import Truth, read_truth, write_predictions
from tad.cli import main
from tad.errors import AnnotationError, TadError
from tad.evaluate import average_recall, detection_map, diagnose, evaluate, plots, pr_curves
from tad.evaluate.report import build_report, files_of, make_proxies, page, report_data, score_report
from tad.evaluate.report.data import CURVE_POINTS
from tad.synth import make_video, make_videos

TRUTH = pd.DataFrame(
    [("a", 0.0, 10.0, "run"), ("a", 20.0, 30.0, "jump"), ("b", 5.0, 6.0, "run")],
    columns=["video", "start_s", "end_s", "label"],
)
FOUND = pd.DataFrame(
    [
        ("b", 5.0, 6.5, "run", 0.8),
        ("a", 0.0, 10.0, "run", 0.9),
        ("a", 0.0, 1.0, "jump", 0.7),
        ("c", 1.0, 2.0, "swim", 0.123456),
        ("a", 19.0, 30.25, "jump", 0.9),
    ],
    columns=["video", "start_s", "end_s", "label", "score"],
)
NONE = FOUND.iloc[:0]


class Reader(HTMLParser):
    """The page as a browser's parser splits it: scripts, the title, addresses."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.title, self.heading, self.links, self._in = [], "", "", [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self._in = tag
        if tag == "script":
            self.scripts.append([dict(attributes), ""])
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "srcset", "data")]

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        if self._in == "script":
            self.scripts[-1][1] += data
        elif self._in == "title":
            self.title += data
        elif self._in == "h1":
            self.heading += data


def read(path):
    text = path.read_text(encoding="utf-8")
    reader = Reader(text)
    (data,) = [body for attributes, body in reader.scripts if attributes.get("id") == "data"]
    return json.loads(data), reader, text


def built(tmp_path, truth=TRUTH, predictions=FOUND, **options):
    return read(build_report(truth=truth, predictions=predictions, out=tmp_path / "report.html", **options))


def decoded(data):
    """The tables again."""
    videos, classes = data["videos"], data["classes"]
    tables = []
    for flats in (videos["truth"], videos["predicted"]):
        rows = []
        for video, flat in zip(videos["id"], flats, strict=True):
            rows += [
                (video, flat[i] / 1000, (flat[i] + flat[i + 1]) / 1000, classes[flat[i + 2]])
                for i in range(0, len(flat), 3)
            ]
        tables.append(rows)
    return *tables, [score for scores in videos["score"] for score in scores]


# ---- the data ------------------------------------------------------------------------------------------------------
def test_segments_by_hand(tmp_path):
    data, _, _ = built(tmp_path)
    assert data["classes"] == ["jump", "run", "swim"]
    assert data["true_classes"] == 2
    assert data["videos"] == {
        "id": ["a", "b", "c"],
        "duration": [30250, 6500, 2000],
        "known": [1, 1, 0],
        "file": [None, None, None],
        "exists": [0, 0, 0],
        "truth": [[0, 10000, 1, 20000, 10000, 0], [5000, 1000, 1], []],
        "predicted": [[0, 10000, 1, 19000, 11250, 0, 0, 1000, 0], [5000, 1500, 1], [1000, 1000, 2]],
        "score": [[0.9, 0.9, 0.7], [0.8], [0.1235]],
    }


def test_many_segments_come_back_as_they_were(tmp_path):
    random = np.random.default_rng(0)
    n, labels = 3000, ["x", "y y", "ü", "</b>"]
    start, length = random.uniform(-3, 4000, n), random.exponential(8, n)
    table = pd.DataFrame(
        {
            "video": random.choice([f"v/{i}" for i in range(37)], n),
            "start_s": start,
            "end_s": start + length,
            "label": random.choice(labels, n),
            "score": random.normal(0, 1e-4, n),
        }
    )
    truth = table[table["start_s"] > 0].drop(columns="score").iloc[:400]
    data, _, text = built(tmp_path, truth, table)
    true, found, scores = decoded(data)
    position = {video: k for k, video in enumerate(data["videos"]["id"])}
    given = truth.assign(at=truth["video"].map(position)).sort_values(["at", "start_s"], kind="stable")
    for row, (video, start_s, end_s, label) in zip(given.itertuples(), true, strict=True):
        assert (row.video, row.label) == (video, label)
        assert abs(row.start_s - start_s) <= 0.00051
        assert abs(row.end_s - end_s) <= 0.00051
    given = table.assign(at=table["video"].map(position), key=-table["score"])
    given = given.sort_values(["at", "key"], kind="stable")
    for row, (video, start_s, end_s, label), score in zip(given.itertuples(), found, scores, strict=True):
        assert (row.video, row.label) == (video, label)
        assert abs(row.start_s - start_s) + abs(row.end_s - end_s) <= 0.0011
        assert score == pytest.approx(row.score, rel=1e-3)
    assert len(text) < 60_000 + 30 * (n + 400) + len(page(report_data(truth=None, predictions=NONE, title="")))


def test_scores_and_errors_are_those_of_the_functions(tmp_path):
    result, recall = detection_map(TRUTH, FOUND, (0.5, 0.7)), average_recall(TRUTH, FOUND)
    analysis = diagnose(TRUTH, FOUND, tiou=0.5).to_dict()
    curves = pr_curves(TRUTH, FOUND, 0.5)
    data, _, _ = built(
        tmp_path,
        metrics=result.to_dict(),
        recall=recall,
        curves=curves,
        diagnosis=analysis,
        notes=["mind this"],
        recipe="detector: x\n",
        about={"run": "r"},
        intervals={"average_map": [0.1, 0.2], "map": {"0.5": [0.1, 0.3]}, "level": 0.95, "samples": 7, "seed": 0},
    )
    scores = data["scores"]
    assert scores["tiou"] == [0.5, 0.7]
    assert scores["map"] == list(result.map.values())
    assert scores["average_map"] == result.average
    assert dict(scores["ap"]) == {c: result.ap[c].tolist() for c in result.ap}
    assert scores["counts"] == result.counts
    assert data["notes"] == [*result.notes, "mind this"]
    assert data["recall"]["auc"] == recall.auc
    assert data["recall"]["recall"] == pytest.approx(recall.average_recall.tolist(), abs=1e-5)
    assert data["diagnosis"] == json.loads(json.dumps(analysis))
    assert data["intervals"] == {"average_map": [0.1, 0.2], "map": {"0.5": [0.1, 0.3]}, "level": 0.95, "samples": 7}
    assert (data["recipe"], data["about"], data["tiou"]) == ("detector: x\n", [["run", "r"]], 0.5)
    drawn = {label: (x, y) for label, x, y in data["curves"]}
    for label, (x, y) in curves.items():
        assert drawn[label][0] == pytest.approx(x.tolist(), abs=1e-4)
        assert drawn[label][1] == pytest.approx(y.tolist(), abs=1e-4)


def test_long_curves_are_thinned_and_keep_their_ends():
    recall = np.repeat(np.arange(1, 5001) / 5000, 3)
    precision = np.linspace(1, 0.25, len(recall))
    (curve,) = report_data(truth=None, predictions=NONE, title="", curves={"x": (recall, precision)})["curves"]
    assert 100 <= len(curve[1]) == len(curve[2]) <= CURVE_POINTS
    assert (curve[1][0], curve[1][-1]) == (round(recall[0], 4), 1.0)
    assert (curve[2][0], curve[2][-1]) == (1.0, 0.25)
    assert curve[1] == sorted(curve[1])


def test_training_rows_as_text_with_gaps(tmp_path):
    rows = [{"epoch": "1", "loss": "2.5", "average_map": ""}, {"epoch": "2", "loss": "nan", "average_map": "0.25"}]
    data, _, _ = built(tmp_path, training=rows)
    assert data["training"] == {"epoch": [1.0, 2.0], "loss": [2.5, None], "average_map": [None, 0.25]}


def test_what_is_no_number_becomes_null(tmp_path):
    analysis = {"sensitivity": {"overall": math.nan, "length": [{"bucket": "S", "ap": np.float64("inf"), "count": 0}]}}
    data, _, _ = built(tmp_path, diagnosis=analysis)
    assert data["diagnosis"]["sensitivity"] == {"overall": None, "length": [{"bucket": "S", "ap": None, "count": 0}]}


# ---- hostile names -------------------------------------------------------------------------------------------------
EVIL = [
    "</script><script>alert(1)</script>",
    "<!-- <script>",
    "--> ]]>",
    "\"'`${1}\\",
    "&lt;b&gt;",
    "line\u2028and\u2029paragraph",
    "{{script}}{{data}}",
    "日本語 🏃 \u202eright",
    "__proto__",
    "constructor",
    "\x00\x1f",
]


@pytest.mark.parametrize("evil", EVIL)
def test_hostile_text_stays_text(tmp_path, evil):
    truth = TRUTH.assign(video=evil + TRUTH["video"], label=evil + TRUTH["label"])
    found = FOUND.assign(video=evil + FOUND["video"], label=evil)
    options = {"about": {evil: evil}, "notes": [evil], "recipe": evil, "training": [{"epoch": 1, evil: 2}]}
    curves, metrics = pr_curves(truth, found, 0.5), detection_map(truth, found).to_dict()
    data, reader, text = built(tmp_path, truth, found, title=evil, curves=curves, metrics=metrics, **options)
    assert data["title"] == evil
    assert data["videos"]["id"] == [evil + "a", evil + "b", evil + "c"]
    assert set(data["classes"]) == {evil + "run", evil + "jump", evil}
    assert (data["about"], data["notes"][-1], data["recipe"]) == ([[evil, evil]], evil, evil)
    assert evil in data["training"]
    assert len(reader.scripts) == text.count("<script") == text.count("</script") == 3  # theme, data, page
    assert reader.title == reader.heading == evil


def test_paths_that_are_no_unicode_do_not_stop_the_report(tmp_path):
    data, _, _ = built(tmp_path, title="\udc80", about={"run": "r\udc80"}, videos={"a": tmp_path / "\udc80.mp4"})
    assert data["videos"]["file"][0] == "./%80.mp4"
    assert data["about"] == [["run", "r\udc80"]]


def test_the_page_names_no_other_host(tmp_path):
    data, reader, text = built(tmp_path, videos={"a": tmp_path / "http:" / "evil.example" / "a.mp4"})
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}[^\s\"']*", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, nothing is fetched
    assert all(link.startswith(("data:", "#")) for link in reader.links)
    assert data["videos"]["file"][0].startswith("./http%3A/")
    assert "default-src 'none'" in text
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)


# ---- what may be absent --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("truth", [TRUTH, TRUTH.iloc[:0], None, TRUTH[TRUTH["label"] == "run"]])
@pytest.mark.parametrize("predictions", [FOUND, NONE, FOUND[FOUND["label"] == "run"]])
def test_any_part_may_be_empty(tmp_path, truth, predictions):
    data, _, _ = built(tmp_path, truth, predictions)
    true, found, scores = decoded(data)
    assert len(true) == (0 if truth is None else len(truth))
    assert len(found) == len(scores) == len(predictions)
    assert data["scores"] is data["recall"] is data["diagnosis"] is data["training"] is None


def test_videos_without_segments_are_listed_and_durations_are_the_annotations():
    videos = pd.DataFrame(
        {"video": ["e", "a", "b"], "subset": "", "duration_s": [99.5, 40.0, math.nan], "fps": math.nan}
    )
    data = report_data(truth=Truth(videos, TRUTH.assign(subset="")), predictions=FOUND, title="")
    assert data["videos"]["id"] == ["e", "a", "b", "c"]
    assert data["videos"]["duration"] == [99500, 40000, 6500, 2000]
    assert data["videos"]["known"] == [1, 1, 1, 0]


def test_video_files_are_linked_from_where_the_report_lies(tmp_path):
    folder = tmp_path / "my videos #1"
    folder.mkdir()
    (folder / "100%.mp4").touch()
    files = {"a": folder / "100%.mp4", "b": folder / "gone ü.mp4", "z": folder / "100%.mp4"}
    out = tmp_path / "deep" / "report.html"
    data, _, _ = read(build_report(truth=TRUTH, predictions=FOUND, out=out, videos=files))
    assert data["videos"]["id"] == ["a", "b", "c"]  # z is no video of the annotation
    assert data["videos"]["file"] == [
        "./../my%20videos%20%231/100%25.mp4",
        "./../my%20videos%20%231/gone%20%C3%BC.mp4",
        None,
    ]
    assert data["videos"]["exists"] == [1, 0, 0]
    alone, _, _ = built(tmp_path, None, NONE, videos=files)
    assert alone["videos"]["id"] == ["a", "b", "z"]


def test_bad_tables_are_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(AnnotationError, match="score"):
        built(tmp_path, TRUTH, FOUND.drop(columns="score"))
    with pytest.raises(AnnotationError):
        built(tmp_path, TRUTH, FOUND.assign(end_s=math.nan))
    (tmp_path / "file").touch()
    with pytest.raises(TadError, match="cannot be written"):
        build_report(truth=TRUTH, predictions=FOUND, out=tmp_path / "file" / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_equal_inputs_give_equal_files(tmp_path):
    first = build_report(truth=TRUTH, predictions=FOUND, out=tmp_path / "a.html").read_bytes()
    again = build_report(truth=TRUTH, predictions=FOUND, out=tmp_path / "a.html").read_bytes()
    assert first == again


# ---- under a protocol ----------------------------------------------------------------------------------------------
def thumos(tmp_path):
    path = tmp_path / "thumos14.csv"
    path.write_text(
        "video,type,type_idx,start,end,startFrame,endFrame\n"
        "video_test_0000004,HammerThrow,36,1.0,3.0,30,90\n"
        "video_test_0000004,HammerThrow,36,1.0,3.0,30,90\n"
        "video_test_0000270,HammerThrow,36,631.7,637.5,18951,19125\n"
        "video_validation_0000001,HammerThrow,36,1.0,3.0,30,90\n"
    )
    rows = [
        ("video_test_0000270", 0.0, 1.0, "HammerThrow", 0.9),
        ("video_test_0000004", 1.0, 3.0, "HammerThrow", 0.7),
        ("video_test_0000004", 1.0, 3.0, "Diving", 0.6),
    ]
    return path, pd.DataFrame(rows, columns=FOUND.columns)


def test_what_is_shown_is_what_is_scored(tmp_path):
    path, found = thumos(tmp_path)
    given = score_report(read_truth(path), found, "thumos14-211", samples=5)
    assert given["metrics"] == evaluate(read_truth(path), found, "thumos14-211").to_dict()
    assert given["metrics"]["counts"]["segments"] == len(given["truth"].segments) == 1  # a duplicate is left out
    assert set(given["truth"].videos["video"]) == set(given["predictions"]["video"]) == {"video_test_0000004"}
    assert len(given["predictions"]) == 2  # a label that the truth does not have is shown, though not scored
    assert given["diagnosis"]["counts"]["segments"] == 1
    assert given["intervals"]["samples"] == 5
    data, _, _ = built(tmp_path, **given)
    assert data["videos"]["id"] == ["video_test_0000004"]
    assert data["scores"]["protocol"] == "thumos14-211"
    assert len(data["notes"]) == len(set(data["notes"]))


def test_without_a_true_segment_the_predictions_are_shown(tmp_path):
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"database": {"a": {"subset": "test", "duration": 9.0, "annotations": []}}}))
    given = score_report(read_truth(path), FOUND, subset="test")
    data, _, _ = built(tmp_path, **given)
    assert data["scores"] is None
    assert data["videos"]["id"] == ["a", "b", "c"]
    assert "nothing is scored" in data["notes"][-1]


def test_truth_of_zero_length_alone_is_scored_but_not_analysed(tmp_path):
    path = tmp_path / "truth.json"
    segment = {"segment": [1, 1], "label": "run"}
    path.write_text(json.dumps({"database": {"a": {"subset": "test", "duration": 9.0, "annotations": [segment]}}}))
    given = score_report(read_truth(path), FOUND)
    assert "diagnosis" not in given
    assert "metrics" in given
    built(tmp_path, **given)


# ---- files ---------------------------------------------------------------------------------------------------------
def test_files_are_found_by_their_names(tmp_path):
    for name in ("a.mp4", "a.webm", "v_b.avi", "deep/c.d.MKV", "x/same.mp4", "y/same.mp4", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = files_of(["a", "b", "c.d", "x/same", "y/same.mp4", "notes", "gone"], tmp_path)
    assert {video: str(path.relative_to(tmp_path)) for video, path in found.items()} == {
        "a": "a.webm",  # every browser plays it
        "b": "v_b.avi",
        "c.d": "deep/c.d.MKV",
        "x/same": "x/same.mp4",
        "y/same.mp4": "y/same.mp4",
    }
    with pytest.raises(TadError, match="not a folder"):
        files_of(["a"], tmp_path / "gone")


def test_copies_keep_the_times_and_a_broken_video_stops_nothing(tmp_path):
    made = make_video(tmp_path / "a.mp4", duration_s=3.0, seed=1, size=(48, 64), fps=10.0)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    copies, failures = make_proxies(
        {"a": made.path, "b": tmp_path / "b.mp4"}, tmp_path / "copies", short_side=24, progress=None
    )
    assert list(copies) == ["a"]
    assert len(failures) == 1
    assert failures[0].startswith("b: ")
    assert [path.name for path in (tmp_path / "copies").iterdir()] == ["a.webm"]
    times, frames = [], []
    for path in (made.path, copies["a"]):
        capture = cv2.VideoCapture(str(path))
        while capture.grab():
            times.append(capture.get(cv2.CAP_PROP_POS_MSEC))
            frames.append(cv2.resize(capture.retrieve()[1], (32, 24), interpolation=cv2.INTER_AREA).astype(float))
        capture.release()
    half = len(times) // 2
    assert len(times) == 2 * made.frames
    assert times[half:] == pytest.approx(times[:half], abs=2)
    for k in (0, 10, half - 1):  # the frame of this time, not a neighbour
        distance = [np.abs(frames[half + k] - frames[j]).mean() for j in range(half)]
        assert distance[k] <= 1.05 * min(distance)
    before = copies["a"].stat().st_mtime_ns
    make_proxies({"a": made.path}, tmp_path / "copies")
    assert copies["a"].stat().st_mtime_ns == before


# ---- commands ------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path, monkeypatch):
    _, found = thumos(tmp_path)
    write_predictions(tmp_path / "found.json", found)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("detector: talnet\nstreams: [rgb, flow]\nseed: 3\n")
    (tmp_path / "run" / "metrics.csv").write_text("epoch,lr,loss,average_map\n1,0.1,2.0,\n2,0.1,1.0,0.5\n")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "video_test_0000004.mp4").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tad(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_writes_all_that_it_is_given(folder):
    arguments = ["--annotations", "thumos14.csv", "--predictions", "found.json", "--protocol", "thumos14-211"]
    done = tad("report", *arguments, "--run", "run", "--videos", "videos", "-o", "out/report.html")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("out/report.html: ")
    data, _, _ = read(folder / "out" / "report.html")
    assert data["videos"]["file"] == ["./../videos/video_test_0000004.mp4"]
    assert data["training"]["loss"] == [2.0, 1.0]
    about = dict(data["about"])
    assert (about["detector"], about["streams"], about["seed"]) == ("talnet", "rgb, flow", "3")
    assert about["protocol"] == "thumos14-211"
    assert data["recipe"].startswith("detector: talnet")
    assert data["scores"]["average_map"] == 1.0


def test_the_command_shows_predictions_without_truth(folder):
    done = tad("report", "--predictions", "found.json")
    assert done.exit_code == 0, done.output
    data, _, _ = read(folder / "report.html")
    assert data["scores"] is None
    assert len(data["videos"]["id"]) == 2


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "--predictions"),
        (["--predictions", "found.json", "--proxy"], 2, "--videos"),
        (["--predictions", "found.json", "--subset", "test"], 2, "--annotations"),
        (["--predictions", "found.json", "--error-tiou", "0"], 2, "above 0"),
        (["--predictions", "found.json", "--annotations", "thumos14.csv"], 1, "name one, or a protocol"),
        (["--predictions", "found.json", "--annotations", "thumos14.csv", "--protocol", "thumos"], 1, "Did you mean"),
    ],
)
def test_wrong_use_is_told(folder, arguments, status, words):
    done = tad("report", *arguments)
    assert done.exit_code == status
    assert words in done.stderr
    assert not (folder / "report.html").exists()


def test_a_video_that_cannot_be_copied_is_named(folder):
    done = tad("report", "--predictions", "found.json", "--videos", "videos", "--proxy")
    assert done.exit_code == 3
    assert "failed: video_test_0000004" in done.stderr
    assert (folder / "report.html").is_file()


# ---- the page of the documentation ---------------------------------------------------------------------------------
def test_the_commands_and_the_code_of_the_documentation_run(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- report -->\n```(\w+)\n(.*?)\n```", text, re.DOTALL)
    assert len(blocks) == text.count("```") // 2 == 4
    monkeypatch.chdir(tmp_path)
    made = make_videos(tmp_path, videos=2, subset="validation", duration_s=(8.0, 9.0), size=(48, 64))
    rows = [(video.id, *segment, 0.9) for video in made for segment in video.segments_s]
    assert rows
    write_predictions("found.json", pd.DataFrame(rows, columns=FOUND.columns))
    (tmp_path / "runs" / "talnet").mkdir(parents=True)
    (tmp_path / "runs" / "talnet" / "metrics.csv").write_text("epoch,loss,average_map\n1,2.0,0.1\n")
    for language, code in blocks:
        if language == "python":
            exec(compile(code, "report.md", "exec"), {})
            continue
        for line in code.splitlines():
            words = shlex.split(line)
            assert words[0] == "tad"
            done = tad(*words[1:])
            assert done.exit_code == 0, done.output
    assert {"pr.svg", "timeline.png", "training.png", "report.html"} <= {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "report-videos" / "validation-000.webm").is_file()
    data, _, _ = read(tmp_path / "report.html")
    assert data["title"] == "My detector"
    assert data["videos"]["exists"] == [1, 1]


def test_the_documentation_names_every_kind_of_figure():
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    kinds = re.search(r"Kinds: (.*?)\.", text, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", kinds.group(1))) == {*plots.PLOTS, "timeline", "training"}
