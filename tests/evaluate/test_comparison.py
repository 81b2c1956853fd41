"""Comparisons against a slow exchange of videos, and what must hold of any of them."""

import io
import json
from itertools import product

import numpy as np
import pandas as pd
import pytest

from tad.errors import AnnotationError
from tad.evaluate import compare, detection_map, seed_spread
from tad.evaluate.comparison import _exchange_test, _on_all_videos, comparison_table, seed_table
from tad.evaluate.ranked import rank

TIOU = (0.3, 0.6)
LABELS = list("ab")


def made(videos=30, seed=0, jitter=2.0, noise=3):
    """Truth, and predictions that are it, moved, among others; scores without ties."""
    draw = np.random.default_rng(seed)
    number = 3 * videos
    start = np.random.default_rng(99).uniform(0, 90, number)
    truth = pd.DataFrame(
        {
            "video": [f"v{i}" for i in np.arange(number) % videos],
            "start_s": start,
            "end_s": start + 6,
            "label": np.random.default_rng(98).choice(LABELS, number),
        }
    )
    near = truth.assign(start_s=start + draw.normal(0, jitter, number), score=draw.uniform(0.3, 1, number))
    near["end_s"] = near["start_s"] + 6
    begin = draw.uniform(0, 90, noise * videos)
    far = pd.DataFrame(
        {
            "video": [f"v{i}" for i in np.arange(noise * videos) % (videos + 1)],
            "start_s": begin,
            "end_s": begin + 6,
            "label": draw.choice(LABELS, noise * videos),
            "score": draw.uniform(0, 0.8, noise * videos),
        }
    )
    return truth, pd.concat([near, far]).sample(frac=1, random_state=seed).reset_index(drop=True)


def test_a_better_detector_is_found_better_class_by_class():
    truth, good = made(seed=1, jitter=0.5)
    _, bad = made(seed=2, jitter=2.5)
    result = compare(truth, {"bad": bad, "good": good}, TIOU, samples=200)
    (one,) = result.others
    first, second = (detection_map(truth, table, TIOU) for table in (bad, good))
    assert result.average == pytest.approx(first.average, abs=1e-12)
    assert one.difference == pytest.approx(second.average - first.average, abs=1e-12)
    assert one.difference > 0.1
    assert 0 < one.interval[0] < one.difference < one.interval[1]
    assert one.p == pytest.approx(1 / 201)
    for label in LABELS:
        row = one.by_class.loc[label]
        assert row["difference"] == pytest.approx(second.ap[label].mean() - first.ap[label].mean(), abs=1e-12)
        assert row["low"] < row["difference"] < row["high"]
    assert one.by_tiou[0.6] == pytest.approx(second.map[0.6] - first.map[0.6], abs=1e-12)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()


def test_alike_detectors_are_not_told_apart():
    truth, one = made(seed=1)
    _, other = made(seed=2)
    result = compare(truth, {"one": one, "other": other, "same": one}, TIOU, samples=300)
    alike, same = result.others
    assert alike.interval[0] < 0 < alike.interval[1]
    assert alike.p > 0.05
    assert (same.difference, same.p, same.interval) == (0, 1, (0, 0))


def test_p_values_of_alike_detectors_are_spread_over_their_range():
    """Half of them lie below 0.5, and few below 0.1: the test does not cry wolf."""
    values = [
        compare(made()[0], {"a": made(10, 2 * s)[1], "b": made(10, 2 * s + 1)[1]}, 0.5, samples=60).others[0].p
        for s in range(40)
    ]
    assert 8 <= sum(value < 0.5 for value in values) <= 32
    assert sum(value < 0.1 for value in values) <= 11


def test_the_test_is_an_exchange_of_videos():
    """All exchanges of four videos, each evaluated as tables whose scores are ranks in class."""
    truth, one = made(4, seed=1)
    _, other = made(4, seed=2)
    ranked = _on_all_videos({"one": rank(truth, one, TIOU), "other": rank(truth, other, TIOU)})
    videos = ranked["one"].videos.tolist()
    swaps = np.array(list(product((0, 1), repeat=len(videos))))
    by_rank = {
        name: part.predictions.assign(score=-part.rank.astype(float), source=number)
        for number, (name, part) in enumerate(ranked.items())
    }
    both = pd.concat(by_rank.values())
    differences = []
    for swap in swaps:
        exchanged = both["video"].map(dict(zip(videos, swap, strict=True))).to_numpy() ^ both["source"].to_numpy()
        scores = [detection_map(truth, both[exchanged == wanted], TIOU).average for wanted in (0, 1)]
        differences.append(abs(scores[1] - scores[0]))
    expected = (1 + sum(value >= differences[0] - 1e-12 for value in differences)) / (1 + len(swaps))
    assert _exchange_test(ranked["one"], ranked["other"], swaps) == pytest.approx(expected)


def test_scale_of_scores_and_order_of_rows_do_not_matter():
    truth, one = made(seed=1)
    _, other = made(seed=2)
    expected = compare(truth, {"a": one, "b": other}, TIOU, samples=50).to_dict()["others"]
    scaled = other.assign(score=1000 * other["score"] - 7).sample(frac=1, random_state=3)
    assert compare(truth, {"a": one, "b": scaled}, TIOU, samples=50).to_dict()["others"] == expected


def test_exchanging_the_two_changes_the_sign_only():
    truth, one = made(seed=1)
    _, other = made(seed=2, jitter=2.2)
    forth = compare(truth, {"a": one, "b": other}, TIOU, samples=50).others[0]
    back = compare(truth, {"b": other, "a": one}, TIOU, samples=50).others[0]
    assert back.difference == pytest.approx(-forth.difference, abs=1e-12)
    assert back.interval == pytest.approx((-forth.interval[1], -forth.interval[0]), abs=1e-9)


def test_seeds():
    truth, one = made(seed=1)
    _, other = made(seed=2)
    result = seed_spread(truth, {"s0": one, "s1": other}, TIOU)
    averages = [detection_map(truth, table, TIOU).average for table in (one, other)]
    assert result.mean["average"] == pytest.approx(np.mean(averages))
    assert result.sd["average"] == pytest.approx(np.std(averages, ddof=1))
    data = result.to_dict()
    assert list(data["runs"]["s0"]) == ["0.3", "0.6", "average"]
    assert seed_spread(truth, {"s0": one}, TIOU).to_dict()["sd"]["average"] is None
    assert seed_table(result).row_count == 3


def test_tables_and_refusals():
    truth, one = made(5)
    grids = comparison_table(compare(truth, {"a": one, "b": one[:0]}, samples=5), classes=1)
    assert [grid.row_count for grid in grids] == [2, 1]
    with pytest.raises(AnnotationError, match="at least two sets"):
        compare(truth, {"a": one})
    with pytest.raises(AnnotationError, match="no run"):
        seed_spread(truth, {})


def test_names_in_brackets_are_shown_as_they_are():
    from rich.console import Console

    truth, one = made(5)
    odd = {"[red]a": one.assign(label="[b]x"), "b": one[:3].assign(label="[b]x")}
    renamed = truth.assign(label="[b]x")
    console = Console(width=150, file=io.StringIO())
    for grid in [*comparison_table(compare(renamed, odd, samples=3)), seed_table(seed_spread(renamed, odd))]:
        console.print(grid)
    text = console.file.getvalue()
    assert text.count("[red]a") == 3
    assert text.count("[b]x") == 1
