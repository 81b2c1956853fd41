"""Samples, alignment, crops, batches, the order of an epoch, and what is settled before a training."""

import json
import random
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from tad.annotations import Truth, read_truth
from tad.detect import preflight
from tad.detect.align import Sample, check_needs, interpolate_rows, pool_rows, read_sample, same_axis
from tad.detect.data import EpochLoader, RowTruth, VideoDataset, collate, crop, epoch_steps, row_truth, with_proposals
from tad.detect.interface import LevelSpec
from tad.detect.preflight import plan_training, read_training, split_holdout, training_subset
from tad.detect.windows import never_inside, training_starts
from tad.errors import AnnotationError, RecipeError, StoreError
from tad.progress import silent
from tad.recipe import DataRecipe
from tad.store import Level, Store, open_store
from tad.timeline import TimeAxis
from tests.detect.toydetector import AXIS, CLASSES, make_world, toy_recipe

NEEDS = (LevelSpec("rgb"), LevelSpec("flow"))


@pytest.fixture
def world(tmp_path: Path) -> tuple[Path, Path]:
    return make_world(tmp_path)


def write(store: Store, stream: str, video: str, rows: np.ndarray, axis: TimeAxis, duration_s: float = 60.0) -> None:
    store.create_stream(stream, {"stream": stream})
    source = {"name": video, "size": 1, "mtime_ns": 1}
    store.write(stream, video, {"features": Level(rows, axis)}, duration_s=duration_s, source=source)


# ---- truth in rows -----------------------------------------------------------------------------------------
def test_truth_is_cut_to_the_rows_and_what_is_left_out_is_counted() -> None:
    axis = TimeAxis(scale_s=2.0, translation_s=1.0, window_s=2.0)  # row i fills [2i, 2i + 2) seconds
    seconds = np.array([[4, 8], [-3, 3], [18, 50], [20, 30], [-9, 0], [5, 5], [7, 6], [4, 4.1]])
    truth = row_truth(seconds, np.arange(8), axis, rows=10)
    np.testing.assert_allclose(truth.segments, [[2, 4], [0, 1.5], [9, 10], [2, 2.05]], atol=1e-6)
    assert truth.labels.tolist() == [0, 1, 2, 7]
    assert (truth.outside, truth.empty) == (2, 2)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-2000, 12000), st.integers(-2000, 12000)), max_size=6),
    st.integers(1, 40),
    st.integers(10, 500),
    st.integers(0, 500),
)
def test_row_truth_equals_a_slow_reference(
    pairs: list[tuple[int, int]], rows: int, scale: int, translation: int
) -> None:
    """In hundredths of a second, so that the reference is exact."""
    axis = TimeAxis(scale / 100, translation / 100, scale / 100)
    truth = row_truth(np.array(pairs) / 100, np.arange(len(pairs)), axis, rows)
    left2, right2 = 2 * translation - scale, 2 * translation - scale + 2 * rows * scale
    expected, outside, empty = [], 0, 0
    for label, (start, end) in enumerate(pairs):
        inside2 = max(2 * start, left2), min(2 * end, right2)
        if end <= start:
            empty += 1
        elif inside2[1] <= inside2[0]:
            outside += 1
        else:
            expected.append(((inside2[0] - left2) / scale / 2, (inside2[1] - left2) / scale / 2, label))
    assert (truth.outside, truth.empty) == (outside, empty)
    assert truth.labels.tolist() == [label for *_, label in expected]
    np.testing.assert_allclose(truth.segments, np.array([e[:2] for e in expected]).reshape(-1, 2), atol=1e-4)


WIDE = TimeAxis.from_frames(fps=30, window_frames=64, stride_frames=8)  # row 0 sees from 3.5 rows before its edge on


def test_truth_and_proposals_are_cut_to_what_windows_see() -> None:
    """Twenty rows see from 0 s to (19 * 8 + 64) / 30 = 7.2 s; the middle 8 frames of a window are a row's own."""
    seconds = np.array([[0.0, 0.9], [0.0, 6.0], [6.5, 7.1], [7.15, 9.0], [7.2, 8.0]])
    expected = [(-3.5, -0.125), (-3.5, 19.0), (20.875, 23.125), (23.3125, 23.5)]
    truth = row_truth(seconds, np.arange(5), WIDE, rows=20, duration_s=10.0)
    np.testing.assert_allclose(truth.segments, expected, atol=1e-5)
    assert (truth.labels.tolist(), truth.outside) == ([0, 1, 2, 3], 1)
    sample = Sample("v", {"rgb": np.zeros((20, 1))}, WIDE, 10.0)
    filled = with_proposals(sample, (seconds, np.linspace(1, 0, 5)))
    np.testing.assert_allclose(filled.proposals, expected, atol=1e-5)
    assert filled.proposal_scores.tolist() == [1.0, 0.75, 0.5, 0.25]
    short = row_truth(seconds, np.arange(5), WIDE, rows=20, duration_s=7.0)  # its last windows are padded
    np.testing.assert_allclose(short.segments[2], (20.875, (7.0 - 32 / 30) * 30 / 8 + 0.5), atol=1e-5)
    assert short.outside == 2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-5, 80), st.floats(0.01, 50)), max_size=6),
    st.integers(1, 40),
    st.sampled_from([(8, 8, 1), (5, 5, 1), (8, 8, 3), (4, 8, 1), (7, 7, 7)]),
    st.sampled_from([10, 24, 25, 29.97, 30]),
    st.floats(0.1, 90),
)
def test_rows_that_tile_a_video_cut_truth_at_their_edges(
    pairs: list[tuple[float, float]], rows: int, shape: tuple[int, int, int], fps: float, duration_s: float
) -> None:
    window, stride, pooled = shape
    axis = TimeAxis.from_frames(fps=fps, window_frames=window, stride_frames=stride).pooled(pooled)
    seconds = np.array([(a, a + b) for a, b in pairs]).reshape(-1, 2)
    edges = np.clip(axis.to_rows(seconds), 0.0, float(rows)).astype(np.float32)
    known = set(map(tuple, edges.tolist()))
    truth = row_truth(seconds, np.arange(len(pairs)), axis, rows, duration_s=duration_s)
    assert set(map(tuple, truth.segments.tolist())) <= known  # bit for bit
    assert len(truth.labels) == int((edges[:, 1] - edges[:, 0] > 1e-3).sum())


def test_a_crop_at_an_end_keeps_what_windows_see_there() -> None:
    segments = np.array([(-3.5, 2.0), (-3.5, -1.0), (18.0, 23.5), (8.0, 11.0), (-3.5, 23.5)], np.float32)
    sample = Sample("v", {"rgb": np.zeros((20, 1))}, WIDE, 7.2, segments, np.arange(5), proposals=segments,
                    proposal_scores=np.arange(5))  # fmt: skip
    first, middle, last = crop(sample, 0, 10), crop(sample, 1, 18), crop(sample, 10, 10)
    assert first.labels.tolist() == [0, 1, 3, 4]
    np.testing.assert_allclose(first.segments, [(-3.5, 2), (-3.5, -1), (8, 10), (-3.5, 10)], atol=1e-5)
    assert middle.labels.tolist() == [3, 4]  # it begins and ends inside the video: at its rows' edges
    assert middle.segments.tolist() == [[7, 10], [0, 18]]
    assert last.labels.tolist() == [2, 4]
    np.testing.assert_allclose(last.segments, [(8, 13.5), (0, 13.5)], atol=1e-5)
    np.testing.assert_array_equal(last.proposals, last.segments)
    assert last.proposal_scores.tolist() == [2, 4]
    longer = crop(sample, 0, 64)
    np.testing.assert_allclose(longer.segments, segments, atol=1e-5)
    needs = [LevelSpec("rgb", layout="windowed", rows=8)]
    starts = training_starts(sample, needs, DataRecipe(train_stride=4))
    assert never_inside(replace(sample, segments=segments[:4], labels=np.arange(4)), starts, needs, DataRecipe()) == 0


# ---- streams on one axis -----------------------------------------------------------------------------------
def test_streams_on_one_axis_are_taken_as_they_are_and_one_row_more_is_cut(tmp_path: Path) -> None:
    rgb, flow = np.random.default_rng(0).standard_normal((2, 12, 3)).astype(np.float16)
    with open_store(tmp_path / "s.zarr", "a") as store:
        write(store, "rgb", "a/b ünï", rgb, AXIS)
        write(store, "flow", "a/b ünï", flow[:11], AXIS)
        sample = read_sample(store, NEEDS, "a/b ünï")
    assert sample.rows == 11
    assert sample.interpolated == ()
    assert sample.axis == AXIS
    np.testing.assert_array_equal(sample.features["rgb"], rgb[:11])
    np.testing.assert_array_equal(sample.features["flow"], flow[:11])
    assert sample.features["rgb"].dtype == np.float16  # kept small until a batch is made


def test_two_rows_less_on_one_axis_is_a_cut_stream(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.zarr", "a") as store:
        write(store, "rgb", "v", np.zeros((12, 3), np.float32), AXIS)
        write(store, "flow", "v", np.zeros((10, 3), np.float32), AXIS)
        with pytest.raises(StoreError, match=r"video 'v'.*'rgb' has 12 rows and 'flow' 10 .*extract it again"):
            read_sample(store, NEEDS, "v")


def test_another_axis_is_interpolated_in_time(tmp_path: Path) -> None:
    """A feature that is a linear function of time must have that function's values at the first stream's centres."""
    slow = TimeAxis.from_frames(fps=30, window_frames=64, stride_frames=16)
    fast = TimeAxis.from_frames(fps=25, window_frames=16, stride_frames=4)
    line = lambda axis, n: np.stack([axis.center_s(np.arange(n)), 5 - axis.center_s(np.arange(n))], 1)  # noqa: E731
    with open_store(tmp_path / "s.zarr", "a") as store:
        write(store, "rgb", "v", line(slow, 20).astype(np.float32), slow)
        write(store, "flow", "v", line(fast, 74).astype(np.float32), fast)
        sample = read_sample(store, NEEDS, "v")
        dense = read_sample(store, NEEDS[::-1], "v")
    assert sample.interpolated == ("flow",)
    assert sample.axis == slow
    np.testing.assert_allclose(sample.features["flow"], line(slow, 20), atol=1e-5)
    inside = (fast.center_s(np.arange(74)) >= slow.center_s(0)) & (fast.center_s(np.arange(74)) <= slow.center_s(19))
    np.testing.assert_allclose(dense.features["rgb"][inside], line(fast, 74)[inside], atol=1e-5)
    np.testing.assert_allclose(dense.features["rgb"][~inside][0], line(slow, 20)[0], atol=1e-5)  # the edge row is held


def test_streams_of_different_videos_are_refused(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.zarr", "a") as store:
        write(store, "rgb", "v", np.zeros((100, 3), np.float32), AXIS)
        write(store, "flow", "v", np.zeros((30, 3), np.float32), TimeAxis(0.5, 0.3, 0.6))
        with pytest.raises(StoreError, match=r"'v'.*'flow' covers 0\.30-14\.80 s, but 'rgb' 0\.32-32\.00 s"):
            read_sample(store, NEEDS, "v")


def test_interpolation_equals_numpy() -> None:
    rng = np.random.default_rng(1)
    rows, axis = rng.standard_normal((17, 2)), TimeAxis(0.7, 0.3, 1.0)
    at_s = rng.uniform(-3, 15, 50)
    expected = [np.interp(at_s, axis.center_s(np.arange(17)), rows[:, c]) for c in range(2)]
    np.testing.assert_allclose(interpolate_rows(rows, axis, at_s), np.stack(expected, 1), atol=1e-5)


def test_same_axis_counts_drift_over_the_whole_video() -> None:
    assert same_axis(AXIS, replace(AXIS, window_s=9.0), rows=10_000)
    drifting = replace(AXIS, scale_s=AXIS.scale_s * (1 + 1e-5))
    assert same_axis(AXIS, drifting, rows=50)
    assert not same_axis(AXIS, drifting, rows=5000)
    assert not same_axis(AXIS, replace(AXIS, translation_s=AXIS.translation_s + 0.01), rows=1)


@pytest.mark.parametrize("spacing", [1, 2, 3, 7, 20])
def test_pooled_rows_are_means_and_lie_on_the_pooled_axis(tmp_path: Path, spacing: int) -> None:
    rows = np.random.default_rng(2).standard_normal((13, 2)).astype(np.float32)
    expected = np.stack([rows[i : i + spacing].mean(0) for i in range(0, 13, spacing)])
    np.testing.assert_allclose(pool_rows(rows, spacing), expected, atol=1e-6)
    with open_store(tmp_path / "s.zarr", "a") as store:
        write(store, "rgb", "v", rows, AXIS)
        sample = read_sample(store, NEEDS[:1], "v", row_spacing=spacing)
    np.testing.assert_allclose(sample.features["rgb"], expected, atol=1e-6)
    assert sample.axis == AXIS.pooled(spacing)


def test_layouts_that_make_no_sense_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"'x' reads stream 'rgb' in layout 'looped'.*: full, windowed, rescaled"):
        check_needs([LevelSpec("rgb", layout="looped")], detector="x")  # type: ignore[arg-type]
    for wrong in (LevelSpec("rgb", layout="windowed"), LevelSpec("rgb", rows=3), LevelSpec("rgb", "x", "rescaled", 0)):
        with pytest.raises(RecipeError, match="number of rows"):
            check_needs([wrong], detector="x")
    check_needs(
        [LevelSpec("rgb", layout="windowed", rows=8), LevelSpec("flow", layout="windowed", rows=8)], detector="x"
    )
    with pytest.raises(RecipeError, match="they must agree"):
        check_needs([LevelSpec("rgb", layout="windowed", rows=8), LevelSpec("flow")], detector="x")
    with pytest.raises(RecipeError, match="'x' declares no streams"):
        check_needs([], detector="x")


def test_levels_have_keys_of_their_own_and_maps_are_refused(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.zarr", "a") as store:
        store.create_stream("i3d", {})
        levels = {
            "s2": Level(np.ones((8, 2), np.float32), TimeAxis(0.1, 0.05, 0.1)),
            "s4": Level(np.ones((4, 3), np.float32), TimeAxis(0.2, 0.1, 0.2)),
            "map": Level(np.ones((4, 3, 7, 7), np.float32), TimeAxis(0.2, 0.1, 0.2)),
        }
        store.write("i3d", "v", levels, duration_s=0.8, source={"name": "v", "size": 1, "mtime_ns": 1})
        sample = read_sample(store, (LevelSpec("i3d", "s2"), LevelSpec("i3d", "s4")), "v")
        assert {key: rows.shape for key, rows in sample.features.items()} == {"i3d/s2": (8, 2), "i3d/s4": (8, 3)}
        assert read_sample(store, (LevelSpec("i3d"),), "v").features["i3d"].shape == (8, 2)  # the finest
        with pytest.raises(StoreError, match=r"video 'v', stream 'i3d', level 'map'.*\(4, 3, 7, 7\)"):
            read_sample(store, (LevelSpec("i3d", "map"),), "v")


# ---- crops and batches -------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.data())
def test_a_crop_keeps_what_lies_half_inside_and_moves_nothing_in_time(rows: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, rows))
    start = data.draw(st.integers(0, rows - length))
    edges = st.tuples(st.integers(0, 4 * rows - 1), st.integers(1, 4 * rows))
    pairs = [(min(a, b) / 4, (max(a, b) + (a == b)) / 4) for a, b in data.draw(st.lists(edges, max_size=5))]
    segments = np.array(pairs, np.float32).reshape(-1, 2)
    sample = Sample("v", {"rgb": np.arange(rows)[:, None] * 1.0}, AXIS, 99.0, segments, np.arange(len(pairs)))
    cut = crop(sample, start, length)
    assert cut.features["rgb"][:, 0].tolist() == list(range(start, start + length))
    assert cut.axis.center_s(0) == pytest.approx(AXIS.center_s(start))
    expected = []
    for label, (a, b) in enumerate(pairs):
        inside = min(b, start + length) - max(a, start)
        if inside >= 0.5 * (b - a):
            expected.append((label, max(a, start), min(b, start + length)))
    assert cut.labels.tolist() == [label for label, *_ in expected]
    np.testing.assert_allclose(
        cut.axis.to_seconds(cut.segments),
        [[AXIS.to_seconds(x) for x in e[1:]] for e in expected] or np.zeros((0, 2)),
        atol=1e-4,
    )
    assert ((cut.segments >= 0) & (cut.segments <= length)).all()


def test_collate_pads_with_zeros_and_says_which_rows_are_real() -> None:
    rng = np.random.default_rng(3)
    samples = [
        Sample(
            f"v{n}",
            {"a": rng.standard_normal((n, 2)).astype(np.float16), "b": np.ones((n, 3))},
            AXIS.shifted(n),
            9.0 + n,
        )
        for n in (3, 1, 5)
    ]
    samples[0] = replace(samples[0], segments=np.array([[0, 2]], np.float32), labels=np.array([1]))
    batch = collate(samples)
    assert batch is not None
    assert batch.videos == ["v3", "v1", "v5"]
    assert batch.features["a"].shape == (3, 2, 5)
    assert batch.features["a"].dtype == batch.features["b"].dtype == torch.float32
    assert batch.mask.tolist() == [[i < n for i in range(5)] for n in (3, 1, 5)]
    for index, sample in enumerate(samples):
        for key, rows in sample.features.items():
            np.testing.assert_array_equal(batch.features[key][index, :, : sample.rows].T, rows.astype(np.float32))
            assert not batch.features[key][index, :, sample.rows :].any()
    assert batch.durations_s == [12.0, 10.0, 14.0]
    assert [axis.translation_s for axis in batch.axes] == [AXIS.center_s(n) for n in (3, 1, 5)]
    assert batch.targets is not None
    assert [len(t.labels) for t in batch.targets] == [1, 0, 0]
    assert batch.targets[1].segments.shape == (0, 2)
    assert collate([]) is None


def dataset(
    store: Store, *, max_rows: int = 4096, seed: int = 0, cache: dict[str, Sample] | None = None
) -> VideoDataset:
    truth = {v: RowTruth(np.array([[1, 4]], np.float32), np.array([0])) for v in store.videos("rgb")}
    return VideoDataset(
        store=store, needs=NEEDS, truth=truth, data=DataRecipe(max_rows=max_rows), seed=seed, cache=cache or {}
    )


def test_samples_depend_on_seed_epoch_and_index_alone(world: tuple[Path, Path]) -> None:
    with open_store(world[0]) as store:
        cache = {v: read_sample(store, NEEDS, v) for v in store.videos("rgb")}
        read, kept = dataset(store, max_rows=10), dataset(store, max_rows=10, cache=cache)
        starts: dict[tuple[int, int], float] = {}
        for key in [(0, 0), (1, 0), (0, 1), (5, 3)]:
            a, b = read[key], kept[key]
            assert a.rows == 10
            assert a.axis == b.axis
            np.testing.assert_array_equal(a.features["flow"], b.features["flow"])
            np.testing.assert_array_equal(a.segments, b.segments)
            starts[key] = a.axis.translation_s
        assert len(set(starts.values())) > 2
        random.seed(1)
        torch.manual_seed(1)
        assert read[5, 3].axis.translation_s == starts[5, 3]
        assert [dataset(store, max_rows=10, seed=s)[0, 0].axis for s in range(8)] != [read[0, 0].axis] * 8
        assert dataset(store, max_rows=10**6)[0, 0].axis == AXIS  # short videos are whole


@pytest.mark.parametrize(("videos", "batch", "accumulate"), [(1, 1, 1), (7, 2, 1), (7, 3, 2), (12, 4, 3), (5, 8, 2)])
def test_an_epoch_holds_every_video_once(videos: int, batch: int, accumulate: int) -> None:
    orders = []
    for epoch in range(3):
        steps = epoch_steps(videos, batch=batch, accumulate=accumulate, seed=4, epoch=epoch)
        flat = [i for step in steps for group in step.batches for i in group]
        assert sorted(flat) == list(range(videos))
        assert sum(step.videos for step in steps) == videos
        assert len(steps) == -(-videos // (batch * accumulate))
        assert all(len(group) == batch for step in steps for group in step.batches[:-1])
        assert flat == [  # the order does not depend on how it is cut into batches
            i for s in epoch_steps(videos, batch=1, accumulate=1, seed=4, epoch=epoch) for (i,) in s.batches
        ]
        orders.append(flat)
    assert videos == 1 or orders[0] != orders[1] or orders[1] != orders[2]


def test_processes_share_every_batch_without_overlap(world: tuple[Path, Path]) -> None:
    steps = epoch_steps(12, batch=5, accumulate=2, seed=0, epoch=1)
    with open_store(world[0]) as store:
        data = dataset(store)
        whole = list(EpochLoader(data, workers=0).epoch(1, steps))
        shares = [list(EpochLoader(data, workers=0, rank=rank, world=3).epoch(1, steps)) for rank in range(3)]
    assert [len(share) for share in shares] == [len(whole)] * 3
    for batch, *parts in zip(whole, *shares, strict=True):
        videos = [v for part in parts if part is not None for v in part.videos]
        assert batch is not None
        assert sorted(videos) == sorted(batch.videos)
    assert shares[2][2] is None  # the last batch holds two videos


def test_workers_change_neither_batches_nor_the_global_generators(world: tuple[Path, Path]) -> None:
    steps = epoch_steps(12, batch=4, accumulate=1, seed=0, epoch=0)
    with open_store(world[0]) as store, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more workers than cores
        data = dataset(store, max_rows=20)
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
        alone = [list(EpochLoader(data, workers=0).epoch(e, steps)) for e in range(2)]
        loader = EpochLoader(data, workers=2)
        several = [list(loader.epoch(e, steps)) for e in range(2)]
        del loader
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
        assert random.getstate() == states[2]
    for one, other in zip(alone[0] + alone[1], several[0] + several[1], strict=True):
        assert one is not None
        assert other is not None
        assert one.videos == other.videos
        assert one.axes == other.axes
        assert torch.equal(one.features["rgb"], other.features["rgb"])


# ---- before the training -----------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(st.sets(st.text(min_size=1, max_size=8), min_size=2, max_size=60), st.floats(0.01, 0.9), st.integers(-5, 5))
def test_the_held_out_part_depends_on_ids_and_seed_alone(ids: set[str], part: float, seed: int) -> None:
    train, holdout = split_holdout(sorted(ids), part=part, seed=seed)
    assert set(train) | set(holdout) == ids
    assert not set(train) & set(holdout)
    assert len(holdout) == min(max(1, round(part * len(ids))), len(ids) - 1)
    shuffled = sorted(ids)
    random.Random(0).shuffle(shuffled)
    assert split_holdout(shuffled, part=part, seed=seed) == (train, holdout)


def test_the_held_out_part_changes_with_the_seed_and_little_with_the_videos() -> None:
    ids = [f"v{i}" for i in range(100)]
    a = set(split_holdout(ids, part=0.2, seed=0)[1])
    assert a != set(split_holdout(ids, part=0.2, seed=1)[1])
    assert len(a ^ set(split_holdout([*ids, "one more"], part=0.2, seed=0)[1])) <= 2
    assert split_holdout(ids, part=0, seed=0) == (sorted(ids), [])
    with pytest.raises(RecipeError, match=r"data\.holdout=0\.1 needs two videos.*train\.select=last"):
        split_holdout(["v"], part=0.1, seed=0)


@pytest.mark.parametrize(
    ("subsets", "chosen"),
    [
        (("training", "validation"), "training"),
        (("Train", "val"), "Train"),
        (("Validation", "Test"), "Validation"),
        (("train", "test"), "train"),
    ],
)
def test_the_training_subset_is_found(tmp_path: Path, subsets: tuple[str, str], chosen: str) -> None:
    _, annotations = make_world(tmp_path, training=1, testing=1, subsets=subsets)
    assert training_subset(read_truth(annotations), None) == chosen
    assert training_subset(read_truth(annotations), "other") == "other"


def plan(world: tuple[Path, Path], **changes: Any) -> tuple[preflight.Plan, preflight.TrainingSet]:
    recipe = toy_recipe(**changes)
    with open_store(world[0]) as store:
        planned = plan_training(recipe, store, read_truth(world[1]))
        return planned, read_training(planned, recipe, store, NEEDS, silent)


def edit(annotations: Path, change: Any) -> None:
    data = json.loads(annotations.read_text())
    change(data["database"])
    annotations.write_text(json.dumps(data))


def test_what_a_training_sees(world: tuple[Path, Path]) -> None:
    planned, data = plan(world)
    truth = read_truth(world[1])
    assert planned.classes == list(CLASSES)
    assert len(planned.train) == 9
    assert len(planned.holdout) == 3
    assert planned.channels == {"rgb": 8, "flow": 8}
    assert set(planned.holdout_truth["video"]) <= set(planned.holdout)
    assert list(data.train) == planned.train
    assert set(data.cache) == {*planned.train, *planned.holdout}
    for video in planned.train:
        own = truth.segments[truth.segments["video"] == video]
        np.testing.assert_allclose(
            AXIS.to_seconds(data.train[video].segments), own[["start_s", "end_s"]].to_numpy(), atol=2e-3
        )
        assert [CLASSES[label] for label in data.train[video].labels] == own["label"].tolist()


def test_a_subset_can_be_held_out(world: tuple[Path, Path]) -> None:
    planned, _ = plan(world, data={"holdout_subset": "validation"})
    assert len(planned.train) == 12
    assert len(planned.holdout) == 6
    with pytest.raises(RecipeError, match=r"data\.holdout_subset 'train' shares videos with subset 'training'"):
        plan(world, data={"holdout_subset": "train"})
    with pytest.raises(AnnotationError, match="no subset 'testing'"):
        plan(world, data={"holdout_subset": "testing"})
    with pytest.raises(AnnotationError, match="no subset 'x'"):
        plan(world, data={"train_subset": "x"})


def test_videos_without_features_are_listed(world: tuple[Path, Path]) -> None:
    with open_store(world[0], "a") as store:
        store.delete("flow", "video_003")
        store.delete("flow", "video_004")
        store.delete("rgb", "video_004")
    planned, data = plan(world)
    assert [(f.video, f.message) for f in planned.failures] == [
        ("video_003", "no features in flow"),
        ("video_004", "no features in rgb, flow"),
    ]
    assert data.counts["missing_videos"] == 2
    assert {"video_003", "video_004"}.isdisjoint([*planned.train, *planned.holdout])


def test_ids_that_match_nowhere_are_shown_side_by_side(world: tuple[Path, Path]) -> None:
    edit(world[1], lambda database: [database.update({f"v_{k}": database.pop(k)}) for k in list(database)])
    with pytest.raises(
        StoreError, match=r"none of the 12 videos of subset 'training'.*'v_video_000'.*'video_000'.*prefix"
    ):
        plan(world)


def test_unknown_streams_are_guessed(world: tuple[Path, Path]) -> None:
    with pytest.raises(StoreError, match=r"no stream 'flw'\. Did you mean 'flow'"):
        plan(world, streams=["rgb", "flw"])


def test_truth_that_cannot_be_learnt_is_counted(world: tuple[Path, Path]) -> None:
    def change(database: dict[str, Any]) -> None:
        database["video_000"]["annotations"] += [
            {"segment": [3.0, 3.0], "label": "jump"},
            {"segment": [0.0, 0.1], "label": "jump"},  # before the left edge of the first row, 0.16 s, in its window
            {"segment": [entry_end, entry_end + 1.0], "label": "jump"},  # behind the last window
        ]
        database["video_000"]["duration"] += 1.0

    before = plan(world, data={"holdout": 0.0}, train={"select": "last"})[1]
    entry_end = json.loads(world[1].read_text())["database"]["video_000"]["duration"]
    edit(world[1], change)
    planned, data = plan(world, data={"holdout": 0.0}, train={"select": "last"})
    assert planned.holdout == []
    assert (data.counts["segments_empty"], data.counts["segments_outside"]) == (1, 1)
    assert data.counts["segments"] == before.counts["segments"] + 1
    np.testing.assert_allclose(data.train["video_000"].segments[-1], (-0.5, 0.1 / 0.32 - 0.5), atol=1e-6)


def test_truth_in_frames_is_found_out(world: tuple[Path, Path]) -> None:
    def change(database: dict[str, Any]) -> None:
        for entry in database.values():
            entry["duration"] *= 100
            for item in entry["annotations"]:
                item["segment"] = [1000 + 25 * x for x in item["segment"]]

    edit(world[1], change)
    with pytest.raises(RecipeError, match=r"none of the .* training segments lies on the rows.*in seconds"):
        plan(world)


def test_choosing_by_map_needs_something_held_out(world: tuple[Path, Path]) -> None:
    with pytest.raises(RecipeError, match=r"train\.select=map .* is empty.*train\.select=last"):
        plan(world, data={"holdout": 0.0})

    def change(database: dict[str, Any]) -> None:
        for entry in database.values():
            if entry["subset"] == "validation":
                entry["annotations"] = []

    edit(world[1], change)
    with pytest.raises(RecipeError, match="holds no segments"):
        plan(world, data={"holdout_subset": "validation"})


def test_annotations_without_subsets_train_on_all(world: tuple[Path, Path], tmp_path: Path) -> None:
    truth = read_truth(world[1])
    bare = Truth(truth.videos.assign(subset=""), truth.segments.assign(subset=""), truth.path)
    with open_store(world[0]) as store:
        planned = plan_training(toy_recipe(), store, bare)
    assert len(planned.train) + len(planned.holdout) == 18


def test_broken_features_are_left_out_and_listed(world: tuple[Path, Path]) -> None:
    planned, _ = plan(world)
    broken = planned.train[2]
    chunk = next(p for p in (world[0] / "flow" / broken / "features").rglob("*") if p.is_file() and p.suffix != ".json")
    data = bytearray(chunk.read_bytes())
    data[40] ^= 0xFF
    chunk.write_bytes(bytes(data))
    planned, found = plan(world)
    assert [failure.video for failure in found.failures] == [broken]
    assert found.counts["broken_videos"] == 1
    assert broken not in found.train
    assert broken not in found.cache


def test_a_video_of_another_width_is_left_out(world: tuple[Path, Path]) -> None:
    planned, _ = plan(world)
    odd = planned.train[-1]
    with open_store(world[0], "a") as store:
        store.delete("rgb", odd)
        write_again = np.zeros((store["flow", odd].shape[0], 5), np.float32)
        source = {"name": odd, "size": 1, "mtime_ns": 1}
        store.write("rgb", odd, {"features": Level(write_again, AXIS)}, duration_s=9.0, source=source)
    _, data = plan(world)
    assert [f.video for f in data.failures] == [odd]
    assert "5 channels here and 8" in data.failures[0].message


def test_large_sets_are_not_kept_in_memory(world: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "CACHE_BYTES", 1000)
    _, data = plan(world)
    assert data.cache == {}
    assert any("read again every epoch" in message for message in data.messages)


def test_messages_say_what_is_odd(world: tuple[Path, Path]) -> None:
    def change(database: dict[str, Any]) -> None:
        database["video_001"]["duration"] += 30
        database["video_012"]["annotations"].append({"segment": [1.0, 2.0], "label": "never trained"})

    edit(world[1], change)
    planned, data = plan(world, data={"holdout_subset": "validation", "max_rows": 50})
    messages = "\n".join(planned.messages + data.messages)
    assert "1 videos last more than 5 %" in messages
    assert "that no training video has, they count as missed: 'never trained'" in messages
    assert f"{data.counts['cut_videos']} training videos have more than 50 rows" in messages
    assert data.counts["cut_videos"] == sum(data.cache[v].rows > 50 for v in data.train) > 0


class Broken(Dataset[Any]):
    in_memory, seed = False, 0

    def __getitem__(self, key: tuple[int, int]) -> Any:
        raise StoreError(f"sample {key[1]} is damaged: extract it again")


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_workers_are_those_of_samples(workers: int) -> None:
    loader = EpochLoader(Broken(), workers=workers)  # type: ignore[arg-type]
    with pytest.raises(StoreError) as raised:
        list(loader.epoch(0, epoch_steps(3, batch=1, accumulate=1, seed=0, epoch=0)))
    assert re.fullmatch(r"sample \d is damaged: extract it again", str(raised.value))
