"""Views of a video: every row in a window, nothing moved in time, rescaling against slow references, and end to end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tad.annotations import read_truth
from tad.detect import Segments, detect, train_detector
from tad.detect.align import Sample
from tad.detect.infer import decoded_videos
from tad.detect.interface import LevelSpec
from tad.detect.windows import (
    crop,
    detection_views,
    never_inside,
    of_whole_videos,
    rescaled,
    training_starts,
    window_starts,
)
from tad.errors import RecipeError
from tad.evaluate import detection_map
from tad.recipe import DataRecipe
from tad.timeline import TimeAxis
from tests.detect.toydetector import AXIS, Toy, make_world, toy_recipe


def sample_of(rows: int, segments: Sequence[tuple[float, float]] = (), axis: TimeAxis = AXIS) -> Sample:
    features = {"rgb": np.stack([np.arange(rows), np.arange(rows) ** 2], 1).astype(np.float32)}
    edges = np.array(segments, np.float32).reshape(-1, 2)
    return Sample("v", features, axis, float(axis.to_seconds(rows)), edges, np.arange(len(edges)))


def windowed(rows: int) -> list[LevelSpec]:
    return [LevelSpec("rgb", layout="windowed", rows=rows)]


@given(st.integers(1, 200), st.integers(1, 60), st.integers(1, 80))
def test_windows_cover_every_row(rows: int, window: int, stride: int) -> None:
    if stride > window:
        with pytest.raises(RecipeError, match="leave rows unseen"):
            window_starts(rows, window=window, stride=stride)
        return
    starts = window_starts(rows, window=window, stride=stride)
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert all(start + window <= rows for start in starts) or starts == [0]
    assert {row for start in starts for row in range(start, min(start + window, rows))} == set(range(rows))
    assert starts[-1] + window >= rows  # the end is always seen
    assert all(after - before <= stride for before, after in itertools.pairwise(starts))


@settings(deadline=None)
@given(st.integers(1, 90), st.integers(1, 30), st.none() | st.integers(1, 30))
def test_every_second_of_a_video_is_seen_where_it_is(rows: int, window: int, stride: int | None) -> None:
    whole = sample_of(rows)
    stride = None if stride is None else min(stride, window)
    views = detection_views(whole, windowed(window), DataRecipe(detect_stride=stride))
    seen: dict[int, float] = {}
    for view in views:
        assert view.rows == min(window, rows)
        assert view.duration_s == whole.duration_s
        for place, value in enumerate(view.features["rgb"][:, 0]):
            seen[int(value)] = view.axis.center_s(place)
    assert seen == pytest.approx({row: AXIS.center_s(row) for row in range(rows)})


def test_truths_belong_to_windows_by_their_part_inside() -> None:
    whole = sample_of(100, [(10, 14), (38, 46), (0, 100)])
    assert crop(whole, 0, 40).labels.tolist() == [0]  # a quarter of the second, 40 % of the third
    assert crop(whole, 0, 42).labels.tolist() == [0, 1]
    assert crop(whole, 0, 42).segments.tolist() == [[10, 14], [38, 42]]
    assert crop(whole, 0, 40, min_inside=0.25).labels.tolist() == [0, 1, 2]
    assert training_starts(whole, windowed(20), DataRecipe(train_stride=20)) == [0, 40]
    assert training_starts(whole, windowed(20), DataRecipe(train_stride=20, empty_windows=True)) == [0, 20, 40, 60, 80]
    assert training_starts(whole, [LevelSpec("rgb")], DataRecipe()) == [None]


def test_truths_that_no_window_holds_are_counted() -> None:
    whole = sample_of(400, [(20, 380), (25, 35), (99, 101)])
    data = DataRecipe(train_stride=25, empty_windows=True)
    starts = training_starts(whole, windowed(50), data)
    assert never_inside(whole, starts, windowed(50), data) == 1  # only the long one; the last lies in a window from 75
    assert never_inside(whole, [0], windowed(50), data) == 2


class Echo(Toy):
    """Finds every row, as a segment of its own, with its content as the score."""

    def forward(self, batch):
        return batch.features["rgb"][:, 0], batch.mask

    def decode(self, outputs, batch):
        found = []
        for index, video in enumerate(batch.videos):
            scores = outputs[0][index, batch.mask[index]]
            rows = torch.arange(len(scores), dtype=torch.float64)
            seconds = batch.axes[index].to_seconds(torch.stack([rows, rows + 1], 1))
            found.append(Segments(video, seconds, torch.zeros(len(scores), dtype=torch.int64), scores, {"row": rows}))
        return found


@pytest.mark.parametrize("stride", [3, 7, None])
def test_windows_are_put_together_in_seconds(stride: int | None) -> None:
    echo = Echo(channels={"rgb": 2}, classes=1, layout="windowed", rows=7)
    samples = [sample_of(rows) for rows in (5, 7, 40)]
    samples = [Sample(f"v{i}", s.features, s.axis, s.duration_s) for i, s in enumerate(samples)]
    found = decoded_videos(echo, samples, DataRecipe(detect_stride=stride), device=torch.device("cpu"))
    assert [segments.video for segments in found] == ["v0", "v1", "v2"]
    for segments, sample in zip(found, samples, strict=True):
        assert segments.duration_s == sample.duration_s
        assert sorted(set(segments.scores.tolist())) == list(range(sample.rows))
        for (start_s, end_s), row in zip(segments.segments_s.tolist(), segments.scores.tolist(), strict=True):
            assert (start_s, end_s) == pytest.approx((AXIS.to_seconds(row), AXIS.to_seconds(row + 1)), abs=1e-4)
        assert len(segments.extra["row"]) == len(segments)


def test_joining_keeps_videos_in_order() -> None:
    def part(video: str, score: float) -> Segments:
        return Segments(video, torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), torch.tensor([score]), {}, 9.0)

    both = of_whole_videos([part("b", 1), part("a", 2), part("b", 3)])
    assert [(s.video, s.scores.tolist()) for s in both] == [("b", [1, 3]), ("a", [2])]
    assert of_whole_videos([]) == []


# ---- rescaling -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("old", "new"), [(37, 100), (100, 37), (8, 8), (1, 5), (50, 1)])
def test_rescaling_is_linear_interpolation(old: int, new: int) -> None:
    """On rows that fill the video from end to end it is torch's own, corners not aligned."""
    rng = np.random.default_rng(old)
    x = rng.standard_normal((old, 3)).astype(np.float32)
    sample = Sample("v", {"rgb": x}, TimeAxis.rescaled(rows=old, duration_s=20.0), 20.0)
    out = rescaled(sample, new)
    expected = F.interpolate(torch.from_numpy(x.T)[None], size=new, mode="linear", align_corners=False)[0].T
    np.testing.assert_allclose(out.features["rgb"], expected, atol=5e-5)  # torch counts in float32
    assert out.axis == TimeAxis.rescaled(rows=new, duration_s=20.0)


@pytest.mark.parametrize(("old", "new"), [(37, 10), (100, 37), (8, 16)])
def test_averaging_is_an_aligned_roi_pooling(old: int, new: int) -> None:
    """Bin i of [0, old] cut into ``new`` bins, ceil(old / new) samples each, linear, edges clamped: written slowly."""
    rng = np.random.default_rng(old)
    x = rng.standard_normal((old, 2)).astype(np.float32)
    sample = Sample("v", {"rgb": x}, TimeAxis.rescaled(rows=old, duration_s=20.0), 20.0)
    out = rescaled(sample, new, average=True).features["rgb"]
    places = math.ceil(old / new)
    for i in range(new):
        total = np.zeros(2)
        for j in range(places):
            at = (i + (j + 0.5) / places) * old / new - 0.5
            at = min(max(at, 0), old - 1)
            low = int(at)
            high = min(low + 1, old - 1)
            total += x[low] * (1 - (at - low)) + x[high] * (at - low)
        np.testing.assert_allclose(out[i], total / places, atol=1e-5)


def test_rescaled_rows_lie_where_they_say() -> None:
    """A feature that is the time itself is the time afterwards, whatever the windows of the extraction were."""
    axis = TimeAxis.from_frames(fps=25, window_frames=64, stride_frames=8)
    at_s = axis.center_s(np.arange(90))
    sample = Sample("v", {"rgb": at_s[:, None]}, axis, 32.0)
    out = rescaled(sample, 40)
    times = out.axis.center_s(np.arange(40))
    inside = (times >= at_s[0]) & (times <= at_s[-1])
    np.testing.assert_allclose(out.features["rgb"][inside, 0], times[inside], atol=1e-3)


# ---- end to end ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.set_num_threads(1)
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ({"layout": "windowed", "rows": 24}, {"train_stride": 6, "detect_stride": 12}),
        ({"layout": "rescaled", "rows": 80}, {}),
        ({"layout": "rescaled", "rows": 80}, {"rescale": "average"}),
    ],
)
def test_trained_and_detected_in_views(model: dict, data: dict, world: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = toy_recipe(model=model, data=data, train={"epochs": 8})
    metrics = train_detector(recipe, store=world[0], annotations=world[1], out=tmp_path / "run", device="cpu")
    assert metrics["counts"].get("windows", 100) > 20
    found = detect(run=tmp_path / "run", store=world[0], annotations=world[1], subset="validation", device="cpu")
    truth = read_truth(world[1]).subset("validation").segments
    # a window ends in the middle of actions, and their halves count as false: hence the modest bar
    assert detection_map(truth, found, tiou=(0.5,)).average > (0.3 if model["layout"] == "windowed" else 0.6)


def test_windows_that_leave_gaps_are_refused_before_training(world: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = toy_recipe(model={"layout": "windowed", "rows": 8}, data={"detect_stride": 9})
    with pytest.raises(RecipeError, match="windows of 8 rows every 9"):
        train_detector(recipe, store=world[0], annotations=world[1], out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_windows_that_hold_no_truth_at_all_are_an_error(world: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = toy_recipe(model={"layout": "windowed", "rows": 1}, data={"min_inside": 1.0})
    with pytest.raises(RecipeError, match="no window of 1 rows"):
        train_detector(recipe, store=world[0], annotations=world[1], out=tmp_path / "run", device="cpu")
