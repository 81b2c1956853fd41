"""mAP and AR against slow loops written from the description of the official evaluators, on random and odd tables."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tad.evaluate import average_recall, detection_map
from tad.evaluate.matching import average_precision, match, pairs, tiou
from tad.evaluate.selection import duplicates

LEVELS = (0.1, 0.3, 0.5, 0.7, 1.0)


def slow_tiou(a, b):
    """One pair; None for 0/0."""
    if a[1] < a[0]:
        return 0.0
    overlap = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    union = (b[1] - b[0]) + (a[1] - a[0]) - overlap
    return None if union == 0 else overlap / union


def slow_match(truth, predictions, level):
    """Row of the true segment that each prediction takes, -1 for none: one prediction after another."""
    taken = {}
    result = [-1] * len(predictions)
    for row in sorted(range(len(predictions)), key=lambda row: (-predictions["score"][row], row)):
        prediction = predictions.loc[row]
        candidates = []
        for other in range(len(truth)):
            true = truth.loc[other]
            if (true["video"], true["label"]) != (prediction["video"], prediction["label"]):
                continue
            value = slow_tiou((prediction["start_s"], prediction["end_s"]), (true["start_s"], true["end_s"]))
            candidates.append((np.inf if value is None else value, other))
        for value, other in sorted(candidates, reverse=True):
            if value >= level and other not in taken:
                taken[other] = row
                result[row] = other
                break
    return result


def slow_ap(hits, positives):
    """Area under the envelope by its definition: at every recall the best precision at that recall or beyond."""
    found, points = 0, []
    for rank, hit in enumerate(hits, start=1):
        found += hit
        points.append((found / positives, found / rank))
    area, before = 0.0, 0.0
    for recall in sorted({recall for recall, _ in points}):
        area += (recall - before) * max(precision for other, precision in points if other >= recall)
        before = recall
    return area


def slow_map(truth, predictions, level):
    taken = slow_match(truth, predictions, level)
    order = sorted(range(len(predictions)), key=lambda row: (-predictions["score"][row], row))
    result = {}
    for label in truth["label"].unique():
        hits = [taken[row] >= 0 for row in order if predictions["label"][row] == label]
        result[label] = slow_ap(hits, int((truth["label"] == label).sum()))
    return result


def slow_recall(truth, predictions, levels, max_avg, points):
    """Recall at every level and point of the curve, and the numbers of proposals."""
    videos = list(dict.fromkeys(truth["video"]))
    fraction = max_avg * float(len(videos)) / len(predictions)
    kept = {}
    for video in videos:
        own = predictions[predictions["video"] == video]
        own = own.loc[sorted(own.index, key=lambda row: (-own["score"][row], row))]
        kept[video] = own[["start_s", "end_s"]].to_numpy()[: min(int(len(own) * fraction), len(own))]
    total = sum(map(len, kept.values()))
    if not total:
        return np.zeros((len(levels), points)), None
    share = np.arange(1, points + 1) / float(points) * (max_avg * float(len(videos)) / total)
    recall = np.zeros((len(levels), points))
    for point in range(points):
        for _, true in truth.iterrows():
            own = kept[true["video"]]
            own = own[: min(int(len(own) * share[point]), len(own))]
            values = [slow_tiou(segment, (true["start_s"], true["end_s"])) for segment in own]
            for row, level in enumerate(levels):
                recall[row, point] += any(value is not None and value >= level for value in values)
    return recall / len(truth), share * total / len(videos)


half_seconds = st.integers(0, 12).map(lambda n: n / 2)
videos = st.sampled_from(["v1", "v2", "é/3"])
labels = st.sampled_from(["run", "jump"])
true_rows = st.tuples(videos, half_seconds, st.integers(0, 8).map(lambda n: n / 2), labels)
predicted_rows = st.tuples(
    st.sampled_from(["v1", "v2", "é/3", "elsewhere"]), half_seconds, half_seconds, labels, st.integers(-2, 2)
)


def tables(true, predicted):
    truth = pd.DataFrame(true, columns=["video", "start_s", "length", "label"])
    truth["end_s"] = truth["start_s"] + truth.pop("length")
    columns = ["video", "start_s", "end_s", "label", "score"]
    return truth, pd.DataFrame(predicted, columns=columns).astype({"start_s": float, "end_s": float, "score": float})


@settings(max_examples=150, deadline=None)
@given(st.lists(true_rows, min_size=1, max_size=12), st.lists(predicted_rows, max_size=25))
def test_map_equals_the_loop(true, predicted):
    truth, predictions = tables(true, predicted)
    present = predictions["label"].isin(truth["label"])
    result = detection_map(truth, predictions, LEVELS)
    known = predictions[present].reset_index(drop=True)
    for level in LEVELS:
        expected = slow_map(truth, known, level)
        assert dict(result.ap.loc[level]) == pytest.approx(expected, abs=1e-12)
        assert result.map[level] == pytest.approx(np.mean(list(expected.values())), abs=1e-12)
    assert result.average == pytest.approx(np.mean(list(result.map.values())), abs=1e-12)
    assert result.counts["predictions"] == present.sum()
    assert result.counts["predictions_outside"] == (~predictions["video"].isin(truth["video"])).sum()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(true_rows, min_size=1, max_size=10),
    st.lists(predicted_rows, min_size=1, max_size=25),
    st.sampled_from([1, 3, 7.5, 100]),
    st.sampled_from([5, 100]),
)
def test_recall_equals_the_loop(true, predicted, max_avg, points):
    truth, predictions = tables(true, predicted)
    expected, numbers = slow_recall(truth, predictions, LEVELS, max_avg, points)
    result = average_recall(truth, predictions, LEVELS, max_avg, points=points)
    np.testing.assert_allclose(result.recall.to_numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(result.average_recall, expected.mean(axis=0), atol=1e-12)
    if numbers is not None:
        np.testing.assert_allclose(result.average_number, numbers, rtol=1e-12)


def test_match_is_the_greedy_one_where_many_segments_compete():
    """Long chains of displaced predictions: every prediction overlaps every true segment of its group."""
    draw = np.random.default_rng(7)
    truth_segments = np.sort(draw.integers(0, 40, (60, 2)), axis=1).astype(float)
    segments = np.sort(draw.integers(0, 40, (150, 2)), axis=1).astype(float)
    truth_group, group = draw.integers(0, 2, 60), draw.integers(-1, 2, 150)
    score = draw.integers(0, 30, 150) / 10
    result = match(truth_group, truth_segments, group, segments, score, LEVELS)
    truth = pd.DataFrame(truth_segments, columns=["start_s", "end_s"]).assign(video=truth_group, label="x")
    predictions = pd.DataFrame(segments, columns=["start_s", "end_s"]).assign(video=group, label="x", score=score)
    for row, level in enumerate(LEVELS):
        assert result[row].tolist() == slow_match(truth, predictions, level)


@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_pairs_are_all_pairs_of_a_group_however_they_are_cut(limit):
    draw = np.random.default_rng(3)
    a, b = draw.integers(-1, 4, 20), draw.integers(-1, 4, 15)
    found = [pair for rows, others in pairs(a, b, limit=limit) for pair in zip(rows, others, strict=True)]
    assert found == [(i, j) for i in range(20) for j in range(15) if a[i] == b[j] >= 0]


def test_tiou_of_odd_segments():
    def one(a, b):
        return tiou(*(np.array([value], dtype=float) for value in (*a, *b)))[0]

    assert one((0, 4), (2, 6)) == pytest.approx(1 / 3)
    assert one((0, 1), (1, 2)) == 0
    assert one((3, 3), (0, 9)) == 0
    assert one((3, 3), (3, 3)) == np.inf  # 0/0: the caller says what it means
    assert one((3, 3), (8, 8)) == np.inf
    assert one((5, 2), (2, 5)) == 0  # minus the length of the other: 0/0 in the official evaluator, overlap of none
    assert one((5, 2), (0, 9)) == 0


def test_average_precision_by_hand():
    hits = np.array([[True, False, True, False, True], [False] * 5])
    # Precision 1, 1/2, 2/3, 2/4, 3/5 at recalls 1/4, 2/4, 3/4 of four true segments: envelope 1, 2/3, 3/5.
    assert average_precision(hits, 4) == pytest.approx([(1 + 2 / 3 + 3 / 5) / 4, 0])
    assert average_precision(np.zeros((2, 0), dtype=bool), 3).tolist() == [0, 0]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(videos, st.integers(0, 9), st.integers(0, 5), labels), max_size=25), st.integers(0, 2))
def test_duplicates_are_those_of_the_sequential_rule(rows, tolerance):
    table = pd.DataFrame(rows, columns=["video", "start_s", "end_s", "label"])
    kept, expected = [], []
    for video, start, end, label in rows:
        close = (
            abs(start - s) <= tolerance and abs(end - e) <= tolerance for v, s, e, x in kept if (v, x) == (video, label)
        )
        expected.append(any(close))
        if not expected[-1]:
            kept.append((video, start, end, label))
    assert duplicates(table, tolerance).tolist() == expected
