"""What the scoring functions accept, refuse, count and report."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tad.annotations import Truth, read_truth, write_predictions
from tad.errors import AnnotationError
from tad.evaluate import (
    ANET_TIOU,
    PROTOCOLS,
    average_recall,
    detection_map,
    evaluate,
    evaluate_recall,
    get_protocol,
    table,
)


def segments(*rows):
    return pd.DataFrame(rows, columns=["video", "start_s", "end_s", "label"])


def scored(*rows):
    return pd.DataFrame(rows, columns=["video", "start_s", "end_s", "label", "score"])


TRUTH = segments(("a", 0, 10, "run"), ("a", 20, 30, "jump"), ("b", 5, 6, "run"))


def truth_of(tmp_path, database):
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"database": database}))
    return read_truth(path)


def video(subset, *annotations):
    return {"subset": subset, "annotations": [{"segment": [s, e], "label": x} for s, e, x in annotations]}


# ---- results -----------------------------------------------------------------------------------------------------
def test_a_result_by_hand():
    predictions = scored(("a", 0, 10, "run", 0.9), ("b", 5, 6.5, "run", 0.8), ("a", 0, 1, "jump", 0.7))
    result = detection_map(TRUTH, predictions, (0.5, 0.7))
    assert result.map == {0.5: 0.5, 0.7: 0.25}  # jump is never found; of run's two, 2/3 of a second is below 0.7
    assert result.average == 0.375
    assert result.ap.to_dict() == {"jump": {0.5: 0.0, 0.7: 0.0}, "run": {0.5: 1.0, 0.7: 0.5}}
    assert result.to_dict() == {
        "map": {"0.5": 0.5, "0.7": 0.25},
        "average_map": 0.375,
        "ap": {"jump": {"0.5": 0.0, "0.7": 0.0}, "run": {"0.5": 1.0, "0.7": 0.5}},
        "counts": {
            "videos": 2,
            "classes": 2,
            "segments": 3,
            "segments_left_out": {},
            "predictions": 3,
            "predictions_left_out": {},
            "predictions_outside": 0,
        },
        "protocol": None,
        "notes": [],
    }
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_thresholds_are_found_under_their_decimal_name_and_their_exact_value():
    result = detection_map(TRUTH, scored(("a", 0, 9, "run", 1.0)), ANET_TIOU)
    assert ANET_TIOU[8] != 0.9
    assert result.map[0.9] == result.map[ANET_TIOU[8]] == 0.25
    assert list(result.to_dict()["map"]) == ["0.5", "0.55", "0.6", "0.65", "0.7", "0.75", "0.8", "0.85", "0.9", "0.95"]
    assert result.ap.loc[0.9, "run"] == 0.5
    with pytest.raises(KeyError, match=r"0\.3"):
        result.map[0.3]


def test_equal_scores_keep_the_order_of_the_table():
    rows = [("a", 0, 10, "run", 0.5), ("a", 50, 60, "run", 0.5), ("b", 5, 6, "run", 0.5)]
    assert detection_map(TRUTH, scored(*rows), 0.5).ap.loc[0.5, "run"] == pytest.approx((1 + 2 / 3) / 2)
    assert detection_map(TRUTH, scored(*rows[::-1]), 0.5).ap.loc[0.5, "run"] == pytest.approx((1 + 2 / 3) / 2)
    assert detection_map(TRUTH, scored(rows[1], rows[0], rows[2]), 0.5).ap.loc[0.5, "run"] == pytest.approx(2 / 3)


def test_result_depends_on_neither_index_nor_extra_columns_nor_scale_of_scores():
    draw = np.random.default_rng(0)
    rows = [
        (draw.choice(["a", "b"]), *np.sort(draw.uniform(0, 30, 2)), draw.choice(["run", "jump"])) for _ in range(80)
    ]
    predictions = scored(*((*row, score) for row, score in zip(rows, draw.permutation(80) / 80, strict=True)))
    expected = detection_map(TRUTH, predictions).to_dict()
    shuffled = predictions.sample(frac=1, random_state=1).assign(extra="x", subset="test")
    assert detection_map(TRUTH.set_index(pd.Index([7, 7, 7])), shuffled).to_dict() == expected
    assert detection_map(TRUTH, predictions.assign(score=np.exp(9 * predictions["score"]) - 5)).to_dict() == expected
    categorical = predictions.astype({"label": "category", "video": "category"})
    assert detection_map(TRUTH, categorical).to_dict() == expected


def test_unknown_labels_are_left_out_and_reported():
    predictions = scored(
        ("a", 0, 10, "run", 0.5), ("a", 0, 10, "fly", 0.9), ("b", 0, 1, "Run", 0.8), ("b", 0, 1, "fly", 0.8)
    )
    result = detection_map(TRUTH, predictions, 0.5)
    assert result.ap.loc[0.5].to_dict() == {"jump": 0.0, "run": 0.5}
    assert result.counts["unknown_labels"] == {"fly": 2, "Run": 1}
    assert result.counts["predictions"] == 1
    assert result.counts["predictions_left_out"] == {"unknown_label": 3}
    assert "'fly', 'Run'" in result.notes[0]


def test_labels_may_be_numbers():
    truth = segments(("a", 0, 10, 3), ("b", 0, 10, 11))
    result = detection_map(truth, scored(("a", 0, 10, 3, 0.5), ("b", 0, 10, 11, 0.4)), 0.5)
    assert list(result.ap.columns) == [3, 11]
    assert result.average == 1
    assert list(result.to_dict()["ap"]) == ["3", "11"]


def test_predictions_elsewhere_are_false_positives_unless_the_videos_are_named():
    predictions = scored(("x", 0, 10, "run", 0.9), ("a", 0, 10, "run", 0.5), ("b", 5, 6, "run", 0.4))
    plain = detection_map(TRUTH, predictions, 0.5)
    assert plain.ap.loc[0.5, "run"] == pytest.approx(2 / 3)
    assert plain.counts["predictions_outside"] == 1
    assert "on videos that the truth does not know" in plain.notes[0]
    named = detection_map(TRUTH, predictions, 0.5, videos=["a", "b"])
    assert named.ap.loc[0.5, "run"] == 1
    assert named.counts["predictions_left_out"] == {"other_videos": 1}
    only_a = detection_map(TRUTH, predictions, 0.5, videos=["a"])
    assert only_a.counts["videos"] == 1
    assert only_a.counts["segments_left_out"] == {"other_videos": 1}
    without_b = detection_map(TRUTH, predictions, 0.5, leave_out=["b"])
    assert without_b.counts["segments_left_out"] == {"left_out_videos": 1}
    assert without_b.counts["predictions_left_out"] == {"left_out_videos": 1}
    assert without_b.ap.loc[0.5, "run"] == 0.5


def test_ids_that_never_meet_are_explained():
    result = detection_map(TRUTH, scored(("v_a", 0, 10, "run", 0.9)))
    assert result.average == 0
    assert "look like 'v_a', of the truth like 'a' (see strip_prefix)" in result.notes[0]


def test_dropping_duplicates_and_zero_lengths_is_counted():
    truth = segments(("a", 0, 1, "x"), ("a", 0.0005, 1, "x"), ("a", 0, 1, "y"), ("a", 5, 5, "x"), ("b", 0, 1, "x"))
    predictions = scored(("a", 0, 1, "x", 0.9), ("b", 0, 1, "x", 0.8), ("a", 0, 1, "y", 0.9))
    assert detection_map(truth, predictions, 0.5).average == pytest.approx((2 / 4 + 1) / 2)
    result = detection_map(truth, predictions, 0.5, drop_zero_length=True, dedupe_s=1e-3)
    assert result.average == 1
    assert result.counts["segments_left_out"] == {"zero_length": 1, "duplicate": 1}


def test_no_predictions_is_zero_with_a_note():
    for empty in (scored(), pd.DataFrame(columns=["video", "start_s", "end_s", "label", "score"])):
        result = detection_map(TRUTH, empty)
        assert result.average == 0
        assert result.notes == ("there is no prediction to score",)
        assert average_recall(TRUTH, empty).auc == 0


# ---- refusals ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("truth", "predictions", "message"),
    [
        (
            TRUTH,
            scored(("a", 0, 1, "run", math.nan)),
            r"the predictions: row 0: score must be a finite number, got nan",
        ),
        (TRUTH, scored(("a", 0, math.inf, "run", 1)), r"row 0: end must be a finite number, got inf"),
        (TRUTH, scored(("a", None, 1, "run", 1)), r"row 0: start must be a finite number"),
        (TRUTH, scored(("a", 0, 1, None, 1)), r"row 0: .*label"),
        (TRUTH, scored((None, 0, 1, "run", 1)), r"row 0: the video id is missing"),
        (TRUTH, scored(("a", 0, 1, ["run"], 1)), r"row 0: label is \['run'\]"),
        (TRUTH, scored(("a", "soon", 1, "run", 1)), r"row 0: start must be a finite number, got 'soon'"),
        (TRUTH, TRUTH, r"the predictions: no column 'score'; found video, start_s, end_s, label"),
        (TRUTH, scored(("a", 0, 1, "x", 1)).drop(columns="label"), r"no column 'label' \(proposals have no labels"),
        (TRUTH, [], r"the predictions must be a pandas DataFrame of segments, got list"),
        (segments(("a", 3, 2, "run")), scored(), r"the truth: row 0, video 'a': the end lies before the start"),
        (segments(), scored(), r"the truth has no segment to score"),
    ],
)
def test_tables_that_cannot_be_meant_are_refused(truth, predictions, message):
    with pytest.raises(AnnotationError, match=message):
        detection_map(truth, predictions)


def test_all_problems_of_a_table_are_counted():
    rows = [("a", 0, 1, "run", math.nan)] * 8
    with pytest.raises(AnnotationError, match=r"8 problems(?s:.*)row 4(?s:.*)and 3 more"):
        detection_map(TRUTH, scored(*rows))


@pytest.mark.parametrize("tiou", [(), 0, 1.01, (0.5, 0.5), (0.5, float("nan")), (0.5, 0.5 + 1e-9)])
def test_thresholds_are_checked(tiou):
    with pytest.raises(AnnotationError, match="tIoU thresholds must"):
        detection_map(TRUTH, scored(), tiou)


# ---- recall ------------------------------------------------------------------------------------------------------
def test_recall_ignores_labels_and_takes_a_fraction_of_each_video():
    truth = segments(("a", 0, 10, "x"), ("b", 0, 10, "x"))
    rows = [("a", 0, 10, 0.1), ("a", 50, 60, 0.9), ("a", 50, 61, 0.8), ("b", 0, 10, 0.2)]
    proposals = pd.DataFrame(rows, columns=["video", "start_s", "end_s", "score"])
    result = average_recall(truth, proposals, 0.5, max_avg=None)
    assert result.average_number[-1] == 2  # four proposals, two videos
    assert result.at(2) == 1
    assert result.at(1) == 0  # half of one proposal is none, half of three is one, which is wrong
    assert result.ar == {1: 0.0, 2: 1.0}
    for label in ("anything", None, ["x", None, "x", 3]):
        assert average_recall(truth, proposals.assign(label=label), 0.5, None).auc == result.auc
    assert result.to_dict()["ar"] == {"1": 0.0, "2": 1.0}
    assert result.to_dict()["recall"] == {"0.5": 1.0}
    with pytest.raises(AnnotationError, match=r"AR@3 is outside the curve"):
        result.at(3)


@pytest.mark.parametrize(("max_avg", "points"), [(0, 100), (-1, 100), (math.nan, 100), (math.inf, 100), (100, 0)])
def test_recall_refuses_curves_of_nothing(max_avg, points):
    with pytest.raises(AnnotationError, match="must be positive"):
        average_recall(TRUTH, scored(), max_avg=max_avg, points=points)


# ---- protocols ---------------------------------------------------------------------------------------------------
def test_protocols_are_named_after_themselves_and_say_who_uses_them():
    thumos = ["thumos14-213", "thumos14-212", "thumos14-211", "thumos14-210"]
    anet = ["anet-1.3", "anet-1.3-opentad", "anet-1.3-afsd", "anet-1.3-mmaction2"]
    assert list(PROTOCOLS) == [*thumos, *anet, "hacs"]
    for name, protocol in PROTOCOLS.items():
        assert name == protocol.name
        assert protocol.note
        assert len(set(protocol.left_out)) == len(protocol.left_out)
    assert len(PROTOCOLS["hacs"].left_out) == 6
    assert [len(PROTOCOLS[f"thumos14-{n}"].left_out) for n in (213, 212, 211, 210)] == [0, 1, 2, 3]


def test_a_misspelt_protocol_finds_its_name(tmp_path):
    with pytest.raises(AnnotationError, match=r"unknown protocol 'thumos-213'\. Did you mean 'thumos14-213'\?"):
        get_protocol("thumos-213")
    truth = truth_of(tmp_path, {"a": video("test", (0, 1, "x"))})
    with pytest.raises(AnnotationError, match=r"Known: anet-1\.3, anet-1\.3-afsd"):
        evaluate(truth, scored(), "qqq")


def test_left_out_videos_take_no_part_on_either_side(tmp_path):
    broken, good, other = "video_test_0000270", "video_test_0000004", "video_validation_0000051"
    truth = truth_of(
        tmp_path,
        {
            broken: video("test", (600, 610, "HammerThrow")),
            good: video("test", (1, 2, "HammerThrow")),
            other: video("validation", (1, 2, "HammerThrow")),
            "video_test_0001292": video("test"),
        },
    )
    predictions = scored(
        (broken, 0, 1, "HammerThrow", 0.9),
        (good, 1, 2, "HammerThrow", 0.5),
        ("video_test_0001292", 0, 1, "HammerThrow", 0.8),
    )
    score = {name: evaluate(truth, predictions, f"thumos14-{name}") for name in (213, 212, 211, 210)}
    assert score[213].average == pytest.approx(1 / 2 * 1 / 3)
    assert score[212].average == pytest.approx(1 / 2 * 1 / 2)
    assert score[211].average == score[210].average == 1
    assert score[211].counts["predictions_left_out"] == {"left_out_videos": 2}
    assert score[211].counts["videos"] == 1
    assert "thumos14-211 is 211 videos and 3329 segments or" in score[211].notes[0]
    training = evaluate(truth, predictions, "thumos14-211", subset="val")
    assert training.counts["videos"] == 1
    assert not any("this annotation gives" in note for note in training.notes)
    assert evaluate_recall(truth, predictions, "thumos14-211").at(1) == 1
    assert evaluate_recall(truth, predictions, "thumos14-211").protocol == "thumos14-211"
    more = evaluate(truth, predictions, "thumos14-212", leave_out=[broken])
    assert more.average == 1


def test_without_a_protocol_the_subset_must_be_clear(tmp_path):
    truth = truth_of(
        tmp_path, {"a": video("training", (0, 1, "x")), "b": video("Validation", (0, 1, "x"), (3, 3, "x"))}
    )
    predictions = scored(("b", 0, 1, "x", 1.0))
    with pytest.raises(AnnotationError, match="has the subsets Validation, training: name one, or a protocol"):
        evaluate(truth, predictions)
    result = evaluate(truth, predictions, subset="VAL")
    assert result.counts["segments"] == 2
    assert result.average == 0.5
    assert result.protocol is None
    assert evaluate(truth.subset("val"), predictions).average == 0.5
    assert evaluate(truth, predictions, "anet-1.3").map[0.95] == 0.5
    assert list(evaluate(truth, predictions, "anet-1.3", tiou=0.3).map) == [0.3]
    with pytest.raises(AnnotationError, match="no subset 'test'"):
        evaluate(truth, predictions, "thumos14-213")
    with pytest.raises(AnnotationError, match="tables go to detection_map"):
        evaluate(TRUTH, predictions)


def test_an_annotation_without_subsets_is_scored_whole_and_says_so():
    videos = pd.DataFrame({"video": ["a", "b"], "subset": ["", ""], "duration_s": 60.0, "fps": 30.0})
    truth = Truth(videos, TRUTH.assign(subset=""))
    result = evaluate(truth, scored(("a", 0, 10, "run", 1.0)), "anet-1.3")
    assert result.counts["videos"] == 2
    assert "names no subset" in result.notes[0]
    mixed = Truth(videos.assign(subset=["test", ""]), TRUTH.assign(subset=["test", "test", ""]))
    assert any("1 videos of the annotation have no subset" in note for note in evaluate(mixed, scored()).notes)


def test_the_table_shows_percent():
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    with console.file:
        console.print(table(detection_map(TRUTH, scored(("a", 0, 10, "run", 1.0)), (0.5, 0.7))))
        text = console.export_text()
    assert "2 videos, 3 segments" in text
    assert text.split("mAP", 2)[2].split("│")[1:4] == [f" {v} " for v in ("25.00", "25.00", "25.00  ")]


# ---- the benchmark -----------------------------------------------------------------------------------------------
def test_the_benchmark_runs_and_agrees_with_its_loop(tmp_path):
    out = tmp_path / "figures.json"
    arguments = ["--videos", "40", "--per-video", "10", "--classes", "5", "--share", "0.5", "--repeats", "1"]
    arguments += ["--samples", "10"]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.evaluate", *arguments, "--out", str(out)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "times as long" in run.stdout
    figures = json.loads(out.read_text())
    assert figures["settings"]["videos"] == 40
    assert figures["map_s"] > 0


def test_the_benchmark_times_files(tmp_path):
    truth_of(tmp_path, {"a": video("test", (0, 10, "run"))})
    write_predictions(tmp_path / "found.json", scored(("a", 0.0, 9.0, "run", 1.0)))
    files = ["--annotations", str(tmp_path / "truth.json"), "--predictions", str(tmp_path / "found.json")]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.evaluate", *files, "--repeats", "1", "--samples", "5"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "average mAP 1.000000" in run.stdout
    assert "bootstrap, 5 samples" in run.stdout
