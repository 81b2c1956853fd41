"""Intervals against re-evaluating duplicated videos under new ids, and what must hold of any of them."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tad.annotations import read_predictions, read_truth
from tad.errors import AnnotationError
from tad.evaluate import ANET_TIOU, bootstrap_map, detection_map
from tad.evaluate.bootstrap import interval, interval_table, sampled_ap
from tad.evaluate.ranked import rank

TIOU = (0.3, 0.5, 0.9)
CLOSE = 1e-10


def made(videos=6, segments=14, predictions=80, seed=0, scores=12):
    """Few scores, so that many are equal; a video that only predictions name, and one without predictions."""
    draw = np.random.default_rng(seed)
    ids = np.array([f"v/{i} é" for i in range(videos)])
    start = draw.integers(0, 20, segments)
    truth = pd.DataFrame(
        {
            "video": draw.choice(ids[1:], segments),
            "start_s": start.astype(float),
            "end_s": (start + draw.integers(0, 8, segments)).astype(float),
            "label": draw.choice(list("abc"), segments),
        }
    )
    begin = draw.integers(0, 20, predictions)
    found = pd.DataFrame(
        {
            "video": draw.choice(ids[:-1], predictions),
            "start_s": begin.astype(float),
            "end_s": (begin + draw.integers(-1, 9, predictions)).astype(float),
            "label": draw.choice(list("abc"), predictions),
            "score": draw.integers(0, scores, predictions) / scores,
        }
    )
    return truth, found


def repeated(table, counts):
    """The table of a sample: every video as often as it was drawn, each time under an id of its own."""
    parts = [
        table[table["video"].map(counts) > copy].assign(
            video=lambda part, copy=copy: part["video"] + f" copy {copy}", row=lambda part: part.index
        )
        for copy in range(max(counts.values(), default=0))
    ]
    whole = pd.concat(parts) if parts else table[:0].assign(row=0)
    return whole.sort_values("row", kind="stable").drop(columns="row").reset_index(drop=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_a_sample_is_the_evaluation_of_videos_repeated_under_new_ids(seed, times):
    truth, predictions = made(seed=seed)
    ranked = rank(truth, predictions, TIOU)
    counts = dict(zip(ranked.videos, times, strict=False))
    ap = sampled_ap(ranked, np.array([list(counts.values())]))[0]  # (T, C)
    drawn = repeated(truth, counts)
    if drawn.empty:
        assert np.isnan(ap).all()
        return
    expected = detection_map(drawn, repeated(predictions, counts), TIOU)
    for column, label in enumerate(ranked.classes):
        if label in expected.ap:
            np.testing.assert_allclose(ap[:, column], expected.ap[label], rtol=0, atol=CLOSE)
        else:
            assert np.isnan(ap[:, column]).all()
    assert np.nanmean(ap) == pytest.approx(expected.average, abs=CLOSE)


def test_samples_and_percentiles_equal_the_slow_bootstrap():
    truth, predictions = made(seed=3)
    result = bootstrap_map(truth, predictions, TIOU, samples=30, seed=7, level=0.8, centred=False)
    videos = rank(truth, predictions, TIOU).videos
    generator = np.random.default_rng(7)
    drawn = generator.multinomial(len(videos), np.full(len(videos), 1 / len(videos)), size=30)
    slow = []
    for counts in drawn:
        by_video = dict(zip(videos, counts, strict=True))
        if len(sample := repeated(truth, by_video)):
            slow.append(list(detection_map(sample, repeated(predictions, by_video), TIOU).map.values()))
    np.testing.assert_allclose(result.distribution, slow, rtol=0, atol=CLOSE)
    average = np.mean(slow, axis=1)
    assert result.average == pytest.approx(tuple(np.quantile(average, [0.1, 0.9])), abs=CLOSE)
    assert result.map[0.5] == pytest.approx(tuple(np.quantile(np.array(slow)[:, 1], [0.1, 0.9])), abs=CLOSE)
    assert result.sd == pytest.approx(np.std(average, ddof=1), abs=CLOSE)
    assert result.bias == pytest.approx(average.mean() - detection_map(truth, predictions, TIOU).average, abs=CLOSE)


def test_centred_intervals_are_the_percentiles_around_the_score():
    truth, predictions = made(seed=5)
    plain = bootstrap_map(truth, predictions, TIOU, samples=200, centred=False)
    moved = bootstrap_map(truth, predictions, TIOU, samples=200)
    assert moved.score == pytest.approx(detection_map(truth, predictions, TIOU).average, abs=CLOSE)
    for raw, centred in zip(plain.average, moved.average, strict=True):
        assert centred == pytest.approx(min(1, max(0, raw - plain.bias)), abs=CLOSE)
    assert moved.average[0] <= moved.score <= moved.average[1]


def test_n_copies_of_one_video_have_no_spread():
    """Whatever is drawn of equal videos, the same segments are found in the same order."""
    truth, predictions = made(videos=3, segments=9, predictions=40, seed=1)
    truth, predictions = (
        pd.concat([table.assign(video=f"{copy}") for copy in range(7)]).sort_index(kind="stable").reset_index(drop=True)
        for table in (truth, predictions)
    )
    result = bootstrap_map(truth, predictions, TIOU, samples=50)
    assert result.sd == pytest.approx(0, abs=1e-12)
    assert result.average == pytest.approx((result.score, result.score), abs=1e-12)
    assert result.bias == pytest.approx(0, abs=1e-12)


def test_the_seed_decides_and_the_order_of_videos_in_memory_does_not(monkeypatch):
    truth, predictions = made(seed=2)
    one = bootstrap_map(truth, predictions, samples=40, seed=1).to_dict()
    assert bootstrap_map(truth, predictions, samples=40, seed=1).to_dict() == one
    assert bootstrap_map(truth, predictions, samples=40, seed=2).to_dict() != one
    monkeypatch.setattr("tad.evaluate.bootstrap.CELLS", 100)  # one sample at a time
    again = bootstrap_map(truth, predictions, samples=40, seed=1)
    assert again.average == pytest.approx(one["average_map"], abs=1e-12)
    assert json.loads(json.dumps(one, allow_nan=False)) == one


def test_samples_without_truth_are_left_out_and_counted():
    truth = pd.DataFrame({"video": ["a"], "start_s": [0.0], "end_s": [1.0], "label": ["x"]})
    predictions = truth.assign(score=1.0)
    outside = predictions.assign(video="b", score=0.5)
    result = bootstrap_map(truth, pd.concat([predictions, outside]), 0.5, samples=50)
    assert "samples hold no true segment" in result.notes[-1]
    assert len(result.distribution) < 50
    assert result.average == (1.0, 1.0)


def test_perfect_detections_have_no_spread_and_none_are_zero():
    truth, predictions = made()
    perfect = bootstrap_map(truth.drop_duplicates(), truth.drop_duplicates().assign(score=1.0), 0.5, samples=20)
    assert perfect.average == pytest.approx((1, 1), abs=1e-12)
    assert bootstrap_map(truth, predictions[:0], 0.5, samples=20).average == (0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be"),
        ({"samples": 2.5}, "samples must be"),
        ({"level": 1}, "level must lie"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(AnnotationError, match=message):
        bootstrap_map(*made(), **options)


def test_interval_of_nothing_is_nan():
    assert np.isnan(interval(np.array([np.nan]), 0.95)).all()


def test_the_table_ends_with_the_average():
    assert interval_table(bootstrap_map(*made(), TIOU, samples=5)).row_count == 4


def test_samples_of_activitynet_lie_above_the_score(shared):
    """Why intervals are centred: the plain percentiles do not hold the score that they are about."""
    folder = shared / "golden/evaluation"
    truth = read_truth(folder / "gt/anet13_trainval_gt.json").subset("validation")
    predictions = read_predictions(folder / "eval/anet_main_s1.pred.json.gz")
    result = bootstrap_map(truth, predictions, ANET_TIOU, samples=100)
    assert result.score == pytest.approx(0.48517605099055716, abs=1e-9)
    assert result.bias > 3 * result.sd
    assert result.average[0] < result.score < result.average[1]
