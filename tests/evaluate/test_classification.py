"""Scores of videos: by hand, against a slow reading of ActivityNet's evaluator, and on its own sample."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tad.annotations import read_truth
from tad.errors import AnnotationError
from tad.evaluate import classification_scores
from tad.evaluate.classification import classification_table


def labels(*rows):
    return pd.DataFrame(rows, columns=["video", "label"])


def test_by_hand():
    truth = labels(("a", "x"), ("a", "x"), ("b", "y"), ("c", "x"), ("c", "z"))
    scores = pd.DataFrame(
        [[0.9, 0.1, 0.0], [0.6, 0.5, 0.4], [0.1, 0.5, 0.4]], index=["a", "b", "c"], columns=["x", "y", "z"]
    )
    result = classification_scores(truth, scores, top=(1, 2))
    assert result.top == {1: pytest.approx(1 / 3), 2: 1.0}
    assert result.top_average == {1: pytest.approx(1 / 3), 2: pytest.approx((1 + 1 + 0.5) / 3)}
    # x: a first, b second (wrong), c third. y: b and c have 0.5, b stands first. z: b and c have 0.4, b stands first.
    assert result.ap.to_dict() == pytest.approx({"x": (1 + 2 / 3) / 2, "y": 1.0, "z": 0.5})
    assert result.map == pytest.approx(((1 + 2 / 3) / 2 + 1 + 0.5) / 3)
    assert result.mean_class_accuracy == pytest.approx((0.5 + 0 + 0) / 3)
    assert result.counts["labels"] == 4
    assert result.counts["videos_multilabel"] == 1
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()


def slow(truth, scores, k):
    """Average precision by label and both hit rates, one video after another."""
    pairs = truth.drop_duplicates()
    ap = {}
    for label in pairs["label"].unique():
        ranked = []
        if label in scores:
            ranked = [(-s, row, video) for row, (video, s) in enumerate(scores[label].items()) if not np.isnan(s)]
        positives = set(pairs["video"][pairs["label"] == label])
        hits = [video in positives for _, _, video in sorted(ranked)]
        precision = [sum(hits[: i + 1]) / (i + 1) for i in range(len(hits))]
        ap[label] = sum(max(precision[i:]) for i in range(len(hits)) if hits[i]) / len(positives)
    shares = []
    for _, own in pairs.groupby("video")["label"]:
        video = _
        best = []
        if video in scores.index:
            row = scores.loc[video]
            best = sorted((-s, column, label) for column, (label, s) in enumerate(row.items()) if not np.isnan(s))[:k]
        shares.append(np.mean([label in {label for _, _, label in best} for label in own]))
    return ap, np.mean(np.array(shares) > 0), np.mean(shares)


values = st.one_of(st.integers(0, 4).map(lambda n: n / 4), st.just(float("nan")))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xyzw")), min_size=1, max_size=9),
    st.lists(st.lists(values, min_size=4, max_size=4), min_size=0, max_size=4),
    st.integers(1, 3),
)
def test_equals_the_loop(pairs, rows, k):
    truth = labels(*pairs)
    scores = pd.DataFrame(rows, index=list("bcde")[: len(rows)], columns=list("xyqz"), dtype=float)
    ap, hit, mean = slow(truth, scores, k)
    result = classification_scores(truth, scores, top=(k,))
    assert result.ap.to_dict() == pytest.approx(ap, abs=1e-12)
    assert (result.top[k], result.top_average[k]) == pytest.approx((hit, mean), abs=1e-12)
    assert result.map == pytest.approx(np.mean(list(ap.values())), abs=1e-12)


def test_the_official_sample(shared):
    """ActivityNet's own sample submission holds the truth: all its scores are 1 there."""
    truth = read_truth(shared / "golden/evaluation/gt/anet13_val_full_reconstructed.json")
    content = json.loads((shared / "data/activitynet13/sample_classification_prediction.json").read_text())
    rows = [(video, one["label"], one["score"]) for video, found in content["results"].items() for one in found]
    table = pd.DataFrame(rows, columns=["video", "label", "score"]).pivot(
        index="video", columns="label", values="score"
    )
    result = classification_scores(truth, table, top=(1, 3))
    assert result.counts["videos"] == 4926
    assert result.map == 1
    assert result.top == {1: 1, 3: 1}
    assert result.top_average[3] == 1
    assert result.top_average[1] < 1  # a few videos have two labels


def test_clips_are_videos_and_numbers_are_labels():
    truth = labels((7, 0), (8, 1))
    result = classification_scores(truth, pd.DataFrame([[1.0, 0.0], [1.0, 0.0]], index=[7, 8], columns=[0, 1]))
    assert result.top1 == 0.5
    assert result.top5 == 1


def test_what_does_not_fit_is_counted_and_said():
    truth = labels(("a", "x"), ("b", "y"))
    scores = pd.DataFrame([[0.5, 0.7], [0.9, 0.1]], index=["a", "z"], columns=["x", "other"])
    result = classification_scores(truth, scores)
    assert result.top == {1: 0.0, 5: 0.5}
    assert result.ap.to_dict() == {"x": 0.5, "y": 0.0}  # z stands before a
    assert result.counts["videos_without_scores"] == result.counts["scores_outside"] == 1
    assert result.counts["classes_without_scores"] == result.counts["unknown_classes"] == 1
    assert len(result.notes) == 4
    strangers = classification_scores(truth, scores.rename(index={"a": "v_a"}))
    assert "look like 'v_a', of the truth like 'a'" in strangers.notes[1]


@pytest.mark.parametrize(
    ("truth", "scores", "message"),
    [
        (labels(), pd.DataFrame([[1.0]], ["a"], ["x"]), "no label to score"),
        (labels(("a", None)), pd.DataFrame([[1.0]], ["a"], ["x"]), "row 0: video or label is missing"),
        (labels(("a", "x")).drop(columns="label"), pd.DataFrame([[1.0]], ["a"], ["x"]), "columns video and label"),
        (labels(("a", "x")), pd.DataFrame([[1.0], [2.0]], ["a", "a"], ["x"]), "video 'a' occurs twice"),
        (labels(("a", "x")), pd.DataFrame([[1.0, 2.0]], ["a"], ["x", "x"]), "class 'x' occurs twice"),
        (labels(("a", "x")), pd.DataFrame([[np.inf]], ["a"], ["x"]), "'a', 'x' is infinite"),
        (labels(("a", "x")), pd.DataFrame([["much"]], ["a"], ["x"]), "must be numbers"),
        (labels(("a", "x")), {"a": [1]}, "must be a table"),
    ],
)
def test_what_is_refused(truth, scores, message):
    with pytest.raises(AnnotationError, match=message):
        classification_scores(truth, scores)
    with pytest.raises(AnnotationError, match="top must be"):
        classification_scores(labels(("a", "x")), pd.DataFrame([[1.0]], ["a"], ["x"]), top=(0,))


def test_the_table():
    result = classification_scores(labels(("a", "x"), ("a", "y")), pd.DataFrame([[1.0, 0]], ["a"], ["x", "y"]))
    assert classification_table(result).row_count == 6
