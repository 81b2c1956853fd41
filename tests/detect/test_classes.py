"""Fusion of proposals with class scores of videos: against a loop, TCANet's rule by hand, and odd inputs."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tad.detect.classes import fused, softmax_scores
from tad.detect.interface import Segments
from tad.errors import AnnotationError, RecipeError


def proposals(video: str, scores: list[float], *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Segments:
    generator = torch.Generator().manual_seed(seed)
    segments = torch.rand(len(scores), 2, generator=generator, dtype=torch.float64).cumsum(1)
    extra = {"iou": torch.rand(len(scores), generator=generator)}
    return Segments(video, segments, torch.zeros(len(scores), dtype=torch.int64), torch.tensor(scores, dtype=dtype),
                    extra, 12.5)  # fmt: skip


def table(rows: dict[str, list[float]], classes: list[str]) -> pd.DataFrame:
    return pd.DataFrame.from_dict(rows, orient="index", columns=classes).astype(float)


def slow(
    found: list[Segments], scores: pd.DataFrame, classes: list[str], top: int, combine: str, limit: int | None
) -> list[list[tuple[float, int, float, float]]]:
    """The same by loops: (score, label, start, extra) of every detection."""
    result = []
    for segments in found:
        rows: list[tuple[float, int, float, float]] = []
        if segments.video in scores.index:
            known = [(name, value) for name, value in scores.loc[segments.video].items() if name in classes]
            known = [(name, value) for name, value in known if not math.isnan(value)]
            best = sorted(known, key=lambda item: -item[1])[:top]
            for i in range(len(segments)):
                for name, value in best:
                    score = float(segments.scores[i]) * value
                    score = math.sqrt(score) if combine == "sqrt" else score
                    rows.append(
                        (score, classes.index(name), float(segments.segments_s[i, 0]), float(segments.extra["iou"][i]))
                    )
            rows.sort(key=lambda row: -row[0])
        result.append(rows[:limit])
    return result


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_it_is_the_loop(data: st.DataObject) -> None:
    value = st.sampled_from([0.0, 0.25, 0.5, 1.0, 0.3, 0.7])  # with many ties
    names = data.draw(st.lists(st.sampled_from("abcdef"), unique=True, min_size=1))
    classes = data.draw(st.lists(st.sampled_from("abcxy"), unique=True, min_size=1))
    videos = data.draw(st.lists(st.sampled_from(["v", "w/ü", "x", "y"]), unique=True))
    rows = {v: data.draw(st.lists(value | st.just(math.nan), min_size=len(names), max_size=len(names))) for v in videos}
    scores = table(rows, names)
    found = [
        proposals(video, data.draw(st.lists(value, max_size=5)), seed=seed)
        for seed, video in enumerate(data.draw(st.lists(st.sampled_from(["v", "w/ü", "x", "z"]), max_size=4)))
    ]
    top, combine = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(["product", "sqrt"]))
    limit = data.draw(st.none() | st.integers(1, 6))
    if not set(names) & set(classes):
        with pytest.raises(AnnotationError, match="spelled alike"):
            fused(found, scores, classes=classes, top=top)
        return
    got, missing = fused(found, scores, classes=classes, top=top, combine=combine, max_segments=limit)
    assert missing == list(dict.fromkeys(f.video for f in found if f.video not in rows))
    for one, given_, wanted in zip(got, found, slow(found, scores, classes, top, combine, limit), strict=True):
        assert (one.video, one.duration_s) == (given_.video, 12.5)
        assert one.labels.dtype == torch.int64
        rows_ = zip(one.scores.tolist(), one.labels.tolist(), one.segments_s[:, 0].tolist(), one.extra["iou"].tolist(),
                    strict=True)  # fmt: skip
        assert list(rows_) == wanted


def test_tcanets_rule_on_hacs() -> None:
    """softmax of twice the logits, three classes a video, 200 detections: worked out here by hand."""
    logits = table({"v": [1.0, 0.0, 3.0, 2.0]}, ["a", "b", "c", "d"])
    exp = [math.exp(2 * x) for x in (1.0, 0.0, 3.0, 2.0)]
    c = [x / sum(exp) for x in exp]
    scores = softmax_scores(logits, 2.0)
    np.testing.assert_allclose(scores.loc["v"], c, rtol=1e-12)
    (found,), missing = fused(
        [proposals("v", [0.9, 0.5])], scores, classes=["a", "b", "c", "d"], top=3, max_segments=200
    )
    assert missing == []
    wanted = [(0.9 * c[2], 2), (0.5 * c[2], 2), (0.9 * c[3], 3), (0.5 * c[3], 3), (0.9 * c[0], 0), (0.5 * c[0], 0)]
    assert found.labels.tolist() == [label for _, label in wanted]
    np.testing.assert_allclose(found.scores, [score for score, _ in wanted], rtol=1e-12)


def test_the_factor_is_inside_the_softmax() -> None:
    logits = table({"v": [1.0, 0.0], "w": [500.0, -500.0]}, ["a", "b"])
    assert softmax_scores(logits, 2.0).loc["v", "a"] == pytest.approx(1 / (1 + math.exp(-2)))
    assert softmax_scores(logits, 2.0).loc["w"].tolist() == [1.0, 0.0]  # and nothing overflows
    assert softmax_scores(logits.iloc[:0]).shape == (0, 2)


def test_a_class_without_a_column_and_a_column_without_a_class() -> None:
    scores = table({"v": [0.9, 0.2, 0.1]}, ["other", "b", "a"])
    (found,), _ = fused([proposals("v", [1.0])], scores, classes=["a", "new", "b"])
    assert found.labels.tolist() == [2, 0]  # `other` took none of the two places
    assert found.scores.tolist() == [0.2, 0.1]


def test_equal_classes_come_in_the_columns_order() -> None:
    scores = table({"v": [0.5, 0.5, 0.5]}, ["c", "a", "b"])
    (found,), _ = fused([proposals("v", [0.5, 0.5])], scores, classes=["a", "b", "c"])
    assert found.labels.tolist() == [2, 0, 2, 0]


def test_videos_do_not_touch_each_other() -> None:
    rng = np.random.default_rng(0)
    videos = [f"v{i}" for i in range(20)]
    scores = table({v: rng.random(6).tolist() for v in videos[:15]}, list("abcdef"))
    found = [proposals(v, rng.random(rng.integers(0, 30)).tolist(), seed=i) for i, v in enumerate(videos)]
    together, missing = fused(found, scores, classes=list("fedcba"), max_segments=17)
    assert missing == videos[15:]
    assert all(len(f) == 0 for f in together[15:])
    for one, alone in zip(found, together, strict=True):
        (single,), _ = fused([one], scores, classes=list("fedcba"), max_segments=17)
        assert torch.equal(single.scores, alone.scores)
        assert torch.equal(single.segments_s, alone.segments_s)
        assert torch.equal(single.labels, alone.labels)


def test_types_stay() -> None:
    scores = table({"v": [0.25, 0.5]}, ["a", "b"])
    (found,), _ = fused([proposals("v", [0.1, 0.2], dtype=torch.float32)], scores, classes=["a", "b"])
    assert found.scores.dtype == torch.float32
    assert found.segments_s.dtype == torch.float64
    assert fused([], scores, classes=["a"]) == ([], [])
    (found,), missing = fused([proposals("v", [0.1])], scores.iloc[:0], classes=["a"])
    assert (len(found), missing) == (0, ["v"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top": 0}, RecipeError, "at least 1 class"),
        ({"combine": "sum"}, RecipeError, "product, sqrt"),
        ({"max_segments": 0}, RecipeError, "max_segments"),
        ({"classes": ["a", "a"]}, RecipeError, "repeat"),
        ({"classes": ["A"]}, AnnotationError, "none of the 2 scored classes .'a', 'b'. is one of the 1"),
        ({"scores": table({"v": [-1.0, 0.5]}, ["a", "b"])}, AnnotationError, "below 0.*'v'.*softmax"),
        ({"scores": table({"v": [math.inf, 0.5]}, ["a", "b"])}, AnnotationError, "infinite"),
        ({"scores": table({"v": [0.1, 0.5]}, ["a", "a"])}, AnnotationError, "a class twice: 'a'"),
        ({"scores": pd.concat([table({"v": [0.1, 0.5]}, ["a", "b"])] * 2)}, AnnotationError, "a video twice: 'v'"),
        ({"scores": table({"v": [0.1, 0.5]}, ["a", "b"]).astype(str).assign(a="x")}, AnnotationError, "be numbers"),
        ({"found": [proposals("v", [-0.1])]}, RecipeError, "scores below 0"),
    ],
)
def test_what_cannot_be_fused(options: dict[str, object], error: type[Exception], message: str) -> None:
    given_ = {"found": [proposals("v", [0.5])], "scores": table({"v": [0.1, 0.5]}, ["a", "b"]), "classes": ["a", "b"]}
    given_ |= options
    with pytest.raises(error, match=message):
        fused(given_.pop("found"), given_.pop("scores"), **given_)  # type: ignore[arg-type]


def test_detections_are_no_proposals() -> None:
    found = proposals("v", [0.5])
    found.labels[0] = 1
    with pytest.raises(RecipeError, match="have classes already"):
        fused([found], table({"v": [0.5]}, ["a"]), classes=["a"])


@pytest.mark.parametrize(
    ("logits", "factor", "error", "message"),
    [
        (table({"v": [0.0, 1.0]}, ["a", "b"]), 0.0, RecipeError, "above 0"),
        (table({"v": [0.0, 1.0]}, ["a", "b"]), math.nan, RecipeError, "above 0"),
        (table({"v": [0.0, math.inf]}, ["a", "b"]), 1.0, AnnotationError, "not finite, such as those of 'v'"),
        (table({"v": []}, []), 1.0, AnnotationError, "no class"),
    ],
)
def test_what_has_no_softmax(logits: pd.DataFrame, factor: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        softmax_scores(logits, factor)
