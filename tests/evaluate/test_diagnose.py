"""The error analysis against DETAD's values, a slow reading of its definitions, and what must hold of any analysis."""

import json
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tad.annotations import Truth, read_predictions, read_truth
from tad.errors import AnnotationError
from tad.evaluate import BUCKETS, detection_map, diagnose, pr_curves, read_characteristics, with_characteristics
from tad.evaluate.diagnose import advice, tables
from tad.evaluate.false_positives import KINDS

CLOSE = 1e-9
DETAD = {
    "True Positive": "true_positive",
    "Double Detection Err": "double_detection",
    "Wrong Label Err": "wrong_label",
    "Localization Err": "localization",
    "Confusion Err": "confusion",
    "Background Err": "background",
}


def segments(*rows):
    return pd.DataFrame(rows, columns=["video", "start_s", "end_s", "label"])


def scored(*rows):
    return pd.DataFrame(rows, columns=["video", "start_s", "end_s", "label", "score"])


# ---- golden ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["thumos_main_s1", "thumos_hard_s2"])
def test_detad(shared, name):
    folder = shared / "golden/evaluation"
    expected = json.loads((folder / "detad" / f"{name}.detad.json").read_text())
    truth = read_truth(shared / "data/thumos14/thumos14_test_extra_characteristics.json")
    videos = read_truth(folder / "gt/thumos14_gt.json").videos
    predictions = read_predictions(folder / "eval" / f"{name}.pred.json.gz")
    result = diagnose(truth, predictions, videos=videos, buckets="thumos14")

    positives = expected["false_positive"]
    assert result.limited_map == pytest.approx(positives["average_mAP_N"], abs=CLOSE)
    gains = {DETAD[kind]: value for kind, value in positives["average_mAP_N_gain_by_removing"].items()}
    assert result.false_positives["gain"] == pytest.approx(gains, abs=CLOSE)
    profile = positives["profile_percent_by_1G_to_10G"]
    assert [row["g"] for row in result.false_positives["by_limit"]] == [int(g) for g in profile]
    for row, shares in zip(result.false_positives["by_limit"], profile.values(), strict=True):
        for kind, share in shares.items():
            assert row[DETAD[kind]] == pytest.approx(share, abs=CLOSE)
    kept = sum(row["count"] for row in result.false_positives["by_limit"])
    assert kept == positives["n_pred_after_limit"]
    for kind, count in positives["error_counts"].items():
        shares = sum(row[DETAD[kind]] * row["count"] for row in result.false_positives["by_limit"])
        assert round(shares) == count

    for characteristic in ("coverage", "length", "num-instances"):
        missed = {row["bucket"]: row for row in result.false_negatives[characteristic]}
        assert set(missed) == set(expected["false_negative"][characteristic])
        for bucket, values in expected["false_negative"][characteristic].items():
            assert missed[bucket]["share"] == pytest.approx(values["unmatched_share"], abs=CLOSE)
            assert missed[bucket]["count"] / 3358 == pytest.approx(values["share_of_gt"], abs=CLOSE)
        by_bucket = {row["bucket"]: row["ap"] for row in result.sensitivity[characteristic]}
        values = expected["sensitivity"]["average_mAP_N_by_characteristic"][characteristic]
        assert by_bucket == pytest.approx(values, abs=CLOSE)
    assert result.normalized_map == pytest.approx(expected["sensitivity"]["base_average_mAP_N"], abs=CLOSE)
    assert result.map == pytest.approx(detection_map(truth, predictions, 0.5).average, abs=CLOSE)


def test_coverage_that_the_annotation_gives_is_that_of_the_durations(shared):
    path = shared / "data/thumos14/thumos14_test_extra_characteristics.json"
    truth = read_truth(path)
    predictions = read_predictions(shared / "golden/evaluation/eval/thumos_hard_s2.pred.json.gz")
    given_there = with_characteristics(truth.segments, read_characteristics(path))
    assert "coverage" in given_there
    assert "context-size" not in given_there  # the file has the key, but no value
    videos = read_truth(shared / "golden/evaluation/gt/thumos14_gt.json").videos
    one = diagnose(given_there, predictions, buckets="thumos14")
    other = diagnose(truth, predictions, videos=videos, buckets="thumos14")
    assert one.false_negatives == other.false_negatives
    assert one.sensitivity == other.sensitivity


# ---- by hand -----------------------------------------------------------------------------------------------------
HAND_TRUTH = segments(("a", 0, 10, "run"), ("a", 20, 30, "jump"), ("b", 0, 4, "run"), ("b", 90, 100, "run"))
HAND = scored(
    ("a", 0, 10, "run", 0.9),  # right
    ("a", 1, 10, "run", 0.8),  # the same again
    ("a", 20, 30, "run", 0.7),  # there is a jump
    ("b", 2, 6, "run", 0.6),  # a third of a tIoU
    ("a", 22, 34, "run", 0.5),  # 8/14 of the jump
    ("a", 28, 36, "run", 0.4),  # 2/16 of the jump
    ("b", 50, 60, "run", 0.3),  # nothing there
    ("z", 0, 10, "run", 0.2),  # no truth there
    ("b", 3.9, 60, "run", 0.1),  # hardly anything
)
HAND_KINDS = [
    "true_positive",
    "double_detection",
    "wrong_label",
    "localization",
    "wrong_label",
    "confusion",
    "background",
    "background",
    "background",
]


def test_every_kind_by_hand():
    result = diagnose(HAND_TRUTH, HAND, limit=3)
    assert result.kind.tolist() == HAND_KINDS
    assert result.missed.tolist() == [False, True, True, True]
    first, second, third = result.false_positives["by_limit"]
    assert (first["count"], second["count"], third["count"]) == (3, 3, 3)
    assert first == {
        "g": 1,
        "count": 3,
        "true_positive": pytest.approx(1 / 3),
        "double_detection": pytest.approx(1 / 3),
        "wrong_label": pytest.approx(1 / 3),
        "localization": 0.0,
        "confusion": 0.0,
        "background": 0.0,
    }
    assert third["background"] == 1
    assert result.counts["predictions_outside"] == 1
    assert result.false_positives["gain"] == dict.fromkeys(KINDS[1:], 0.0)  # the only hit is first already
    assert result.confusion == {
        "classes": ["jump", "run", "background"],
        # The jump is best overlapped by a run; of three runs one is found; five predictions reach nothing.
        "matrix": [[0, 1, 0], [0, 1, 2], [0, 5, 0]],
    }


def test_gain_by_hand():
    truth = segments(("a", 0, 10, "run"), ("b", 0, 10, "run"))
    wrong = ("a", 50, 60, "run", 0.9)
    right = [("a", 0, 10, "run", 0.8), ("b", 0, 10, "run", 0.7)]
    result = diagnose(truth, scored(wrong, *right))
    assert result.limited_map == pytest.approx(2 / 3)  # one class: normalised precision is precision
    assert result.false_positives["gain"]["background"] == pytest.approx(1 / 3)
    assert result.false_positives["gain"]["confusion"] == 0
    lines = advice(result)
    assert lines[0].startswith("removing background predictions would gain 33.3 mAP: ")
    assert not any("missed" in line or "found by no" in line for line in lines)


def test_normalised_precision_is_that_of_a_class_of_average_size():
    # Classes of 1 and 3 segments, average 2. Found behind one false positive: precision r N / (r N + 1).
    rows = [("a", 0, 10, "run"), ("a", 20, 30, "jump"), ("b", 0, 4, "jump"), ("b", 90, 100, "jump")]
    wrong, right = ("c", 0, 1, "run", 0.9), ("a", 0, 10, "run", 0.8)
    jump = [("c", 0, 1, "jump", 0.9), ("a", 20, 30, "jump", 0.8)]
    result = diagnose(segments(*rows), scored(wrong, right, *jump))
    assert result.normalized_map == pytest.approx((2 / 3 + (2 / 3) / (2 / 3 + 1) / 3) / 2)
    assert result.map == pytest.approx((1 / 2 + 1 / 2 / 3) / 2)


def test_a_segment_with_two_labels_counts_by_the_first_unless_asked():
    truth = segments(("a", 0, 10, "CliffDiving"), ("a", 0, 10, "Diving"))
    predictions = scored(("a", 0, 10, "Diving", 0.9), ("a", 0, 10, "Diving", 0.8))
    assert diagnose(truth, predictions).kind.tolist() == ["true_positive", "wrong_label"]
    assert diagnose(truth, predictions, own_label_first=True).kind.tolist() == ["true_positive", "double_detection"]


def test_curves_by_hand():
    truth = segments(*[("a", 10 * i, 10 * i + 5, "run") for i in range(4)], ("a", 0, 5, "jump"))
    rows = [("a", 0, 5, "run", 0.9), ("b", 0, 5, "run", 0.8), ("a", 10, 15, "run", 0.7), ("a", 20, 25, "run", 0.6)]
    curves = pr_curves(truth, scored(*rows), 0.5)
    recall, precision = curves["run"]
    assert recall.tolist() == [0, 0.25, 0.5, 0.75]
    assert precision.tolist() == [1, 1, 0.75, 0.75]
    assert [part.tolist() for part in curves["jump"]] == [[0], [0]]


def test_curves_are_thinned_to_their_ends():
    number = 1000
    truth = segments(*[("a", 10 * i, 10 * i + 5, "run") for i in range(number)])
    predictions = truth.assign(score=np.linspace(1, 0, number))
    recall, precision = pr_curves(truth, predictions)["run"]
    assert len(recall) == 200
    assert (recall[0], recall[-1]) == (0, 1)
    assert (np.diff(recall) > 0).all()
    assert (precision == 1).all()


# ---- what must hold ----------------------------------------------------------------------------------------------
def slow_kinds(truth, predictions, threshold):
    """By the definitions, one prediction after another, in the order of the table."""
    order = sorted(range(len(predictions)), key=lambda row: (-predictions["score"][row], row))
    taken, kinds = set(), {}
    for row in order:
        p = predictions.loc[row]
        overlaps = []
        for other, t in truth.iterrows():
            shared = min(p["end_s"], t["end_s"]) - max(p["start_s"], t["start_s"])
            if t["video"] == p["video"] and p["end_s"] >= p["start_s"] and shared > 0:
                union = p["end_s"] - p["start_s"] + t["end_s"] - t["start_s"] - shared
                overlaps.append((shared / union, other, t["label"]))
        free = [(o, i) for o, i, label in overlaps if label == p["label"] and o >= threshold and i not in taken]
        if free:
            taken.add(max(free)[1])
            kinds[row] = "true_positive"
            continue
        best, _, label = max(overlaps, key=lambda item: (item[0], -item[1]), default=(0, 0, None))
        same = label == p["label"]
        if best >= threshold:
            kinds[row] = "double_detection" if same else "wrong_label"
        elif best >= 0.1:
            kinds[row] = "localization" if same else "confusion"
        else:
            kinds[row] = "background"
    return kinds


half = st.integers(0, 12).map(lambda n: n / 2)
true_rows = st.tuples(
    st.sampled_from(["v1", "v/2"]), half, st.integers(1, 8).map(lambda n: n / 2), st.sampled_from("xyz")
)
predicted_rows = st.tuples(st.sampled_from(["v1", "v/2", "ü"]), half, half, st.sampled_from("xyz"))


def drawn(true, predicted):
    truth = pd.DataFrame(true, columns=["video", "start_s", "length", "label"])
    truth["end_s"] = truth["start_s"] + truth.pop("length")
    predictions = pd.DataFrame(predicted, columns=["video", "start_s", "end_s", "label"])
    predictions = predictions.astype({"start_s": float, "end_s": float})
    score = np.random.default_rng(len(predicted)).permutation(len(predicted)) / max(1, len(predicted))
    return truth, predictions.assign(score=score)


@settings(max_examples=60, deadline=None)
@given(st.lists(true_rows, min_size=1, max_size=8), st.lists(predicted_rows, max_size=25))
def test_kinds_equal_the_loop_and_shares_sum_to_one(true, predicted):
    truth, predictions = drawn(true, predicted)
    known = predictions[predictions["label"].isin(truth["label"])].reset_index(drop=True)
    result = diagnose(truth, predictions, limit=4)
    expected = slow_kinds(truth, known, 0.5)
    keyed = result.predictions.assign(kind=result.kind).sort_values("score")["kind"].tolist()
    assert keyed == [expected[row] for row in known.sort_values("score").index]
    for row in result.false_positives["by_limit"]:
        assert sum(row[kind] for kind in KINDS) == pytest.approx(1 if row["count"] else 0)
    assert all(value >= -1e-12 for value in result.false_positives["gain"].values())
    assert sum(row["count"] for row in result.false_negatives["length"]) == len(truth)
    matrix = np.array(result.confusion["matrix"])
    assert matrix[:-1].sum(axis=1).tolist() == truth["label"].value_counts().sort_index().tolist()
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()


@settings(max_examples=25, deadline=None)
@given(st.lists(true_rows, min_size=1, max_size=8), st.lists(predicted_rows, min_size=1, max_size=25))
def test_removing_false_positives_never_lowers_the_score_and_order_does_not_matter(true, predicted):
    truth, predictions = drawn(true, predicted)
    result = diagnose(truth, predictions, limit=1000)
    for kind in KINDS[1:]:
        kept = result.predictions[(result.kind != kind).to_numpy()]
        fewer = diagnose(truth, kept, limit=1000)
        gained = result.false_positives["gain"][kind]
        assert fewer.normalized_map == pytest.approx(result.normalized_map + gained, abs=1e-12)
        assert fewer.normalized_map >= result.normalized_map - 1e-12
    shuffled = diagnose(truth, predictions.sample(frac=1, random_state=0), limit=1000)
    # A note may name an id as an example, which is that of the first row.
    assert {**shuffled.to_dict(), "notes": []} == {**result.to_dict(), "notes": []}


def test_fifty_thousand_predictions_take_seconds():
    draw = np.random.default_rng(0)
    videos = np.array([f"v{i}" for i in range(500)])
    start = draw.uniform(0, 200, 5000)
    truth = segments(
        *zip(
            draw.choice(videos, 5000),
            start,
            start + draw.lognormal(2, 1, 5000),
            draw.choice(list("abcdefghij"), 5000),
            strict=True,
        )
    )
    begin = draw.uniform(0, 200, 50_000)
    predictions = scored(
        *zip(
            draw.choice(videos, 50_000),
            begin,
            begin + draw.lognormal(2, 1, 50_000),
            draw.choice(list("abcdefghij"), 50_000),
            draw.random(50_000),
            strict=True,
        )
    )
    began = time.perf_counter()
    diagnose(truth, predictions, videos=pd.DataFrame({"video": videos, "duration_s": 300.0}))
    assert time.perf_counter() - began < 20  # under two seconds on a free core; a loop takes minutes


# ---- characteristics ---------------------------------------------------------------------------------------------
def test_buckets_are_closed_above_and_the_lowest_below_too():
    truth = segments(("a", 0, 30, "x"), ("b", 0, 30.5, "x"), ("b", 40, 100, "x"), ("c", 0, 200, "x"))
    result = diagnose(
        truth, scored(("a", 0, 30, "x", 1.0)), videos=pd.DataFrame({"video": ["a", "b"], "duration_s": [30, 100]})
    )
    assert result.false_negatives["length"] == [
        {"bucket": "XS", "share": 0.0, "count": 1},
        {"bucket": "S", "share": 1.0, "count": 2},
        {"bucket": "XL", "share": 1.0, "count": 1},
    ]
    assert [(row["bucket"], row["count"]) for row in result.false_negatives["coverage"]] == [
        ("S", 1),
        ("M", 1),
        ("XL", 1),
    ]
    assert [(row["bucket"], row["count"]) for row in result.false_negatives["num-instances"]] == [("XS", 2), ("S", 2)]
    assert result.sensitivity["length"][0] == {"bucket": "XS", "ap": 1.0, "count": 1}
    assert "coverage of 1 true segments is unknown" in result.notes[0]


def test_context_is_used_where_the_annotation_has_it(tmp_path):
    annotations = [
        {"segment": [0, 10], "label": "x", "context-size": 3, "coverage": 0.5, "agreement": None},
        {"segment": [20, 30], "label": "x", "context-size": 0, "coverage": 0.5},
        {"segment": [20, 30], "label": "y"},
    ]
    (tmp_path / "a.json").write_text(json.dumps({"database": {"é/1": {"subset": "test", "annotations": annotations}}}))
    truth = read_truth(tmp_path / "a.json")
    table = with_characteristics(truth.segments, read_characteristics(tmp_path / "a.json"))
    result = diagnose(table, scored(("é/1", 0, 10, "x", 1.0)))
    assert result.false_negatives["context-size"] == [
        {"bucket": "0", "share": 1.0, "count": 1},
        {"bucket": "3", "share": 0.0, "count": 1},
    ]
    assert "agreement" not in result.false_negatives
    (tmp_path / "a.csv").write_text("video,start,end,label\na,0,1,x\n")
    assert read_characteristics(tmp_path / "a.csv").empty


def test_own_buckets_and_durations_of_a_truth():
    videos = pd.DataFrame({"video": ["a"], "subset": ["test"], "duration_s": [40.0], "fps": [25.0]})
    truth = Truth(videos, segments(("a", 0, 10, "x"), ("a", 20, 30, "x")).assign(subset="test"))
    result = diagnose(truth, scored(("a", 0, 10, "x", 1.0)), buckets={"coverage": ((0, 0.2, 0.3), ("low", "high"))})
    assert result.false_negatives == {"coverage": [{"bucket": "high", "share": 0.5, "count": 2}]}


def test_bucket_tables_are_sound():
    for limits in BUCKETS.values():
        for edges, names in limits.values():
            assert len(edges) == len(names) + 1
            assert list(edges) == sorted(edges)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": "thumos"}, "unknown buckets 'thumos'. Did you mean 'thumos14'"),
        ({"buckets": {"length": ((0, 1), ("a", "b"))}}, "n names need n \\+ 1 rising limits"),
        ({"limit": 0}, "limit must be"),
        ({"min_tiou": 0.6}, "min_tiou must lie"),
        ({"tiou": 2}, "tIoU thresholds"),
        ({"videos": pd.DataFrame({"id": ["a"]})}, "columns video and duration_s"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(AnnotationError, match=message):
        diagnose(HAND_TRUTH, HAND, **options)


def test_no_prediction_at_all():
    result = diagnose(HAND_TRUTH, HAND[:0])
    assert result.map == result.normalized_map == 0
    assert result.missed_share == 1
    assert all(row["count"] == 0 for row in result.false_positives["by_limit"])
    assert advice(result)[0] == "removing false positives of any one kind would gain nothing"
    assert "100.0 % of the true segments are found by no prediction" in advice(result)[1]


def test_the_tables_have_a_row_a_kind_and_a_bucket():
    profile, grid = tables(diagnose(HAND_TRUTH, HAND))
    assert profile.row_count == 6
    assert grid.row_count == 3  # all; length XS; num-instances S
