"""Windows over levels of different resolution: one time on all of them, every second seen, windows alone read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tad.annotations import read_truth
from tad.detect import detect, train_detector
from tad.detect.align import Sample, check_needs, level_factors, open_sample, read_sample
from tad.detect.data import EpochLoader, RowTruth, VideoDataset, collate, epoch_steps, row_truth
from tad.detect.interface import LevelSpec
from tad.detect.recipes import detect_recipe
from tad.detect.runs import Run
from tad.detect.windows import crop, detection_views, read_whole, training_starts, window_starts
from tad.errors import RecipeError, StoreError
from tad.evaluate import detection_map
from tad.recipe import DataRecipe, DetectRecipe
from tad.store import Feature, Level, Store, open_store
from tad.timeline import TimeAxis
from tests.detect.toydetector import make_world

STEP_S = 0.1  # one frame
LEVELS = {"s2": 2, "s4": 4, "s8": 8}


def axis_of(frames: float, *, shift_s: float = 0.0) -> TimeAxis:
    return TimeAxis(frames * STEP_S, 0.5 * frames * STEP_S + shift_s, frames * STEP_S)


def needs_of(rows: int | None = None, layout="windowed", *, streams: Sequence[str] = ("i3d",)) -> list[LevelSpec]:
    return [
        LevelSpec(stream, level, layout, None if rows is None else rows * 2 // n)
        for level, n in LEVELS.items()
        for stream in streams
    ]


def write_times(store: Store, stream: str, video: str, frames: int, *, changes=None, lacking=None) -> None:
    """Levels whose rows say when they are (and twice that), extracted as ``tad extract --levels`` does."""
    if stream not in store.streams():
        store.create_stream(stream, {})
    levels = {}
    for level, n in LEVELS.items():
        axis = (changes or {}).get(level, axis_of(n))
        rows = -(-frames // n) - (lacking or {}).get(level, 0)
        at_s = axis.center_s(np.arange(rows))
        levels[level] = Level(np.stack([at_s, 2 * at_s], 1).astype(np.float32), axis)
    source = {"name": video, "size": 1, "mtime_ns": 1}
    store.write(stream, video, levels, duration_s=frames * STEP_S, source=source)


def times_sample(frames: int) -> Sample:
    features, factors = {}, {}
    for level, n in LEVELS.items():
        features[f"i3d/{level}"] = axis_of(n).center_s(np.arange(-(-frames // n)))[:, None].astype(np.float32)
        factors[f"i3d/{level}"] = n // 2
    return Sample("v", features, axis_of(2), frames * STEP_S, factors=factors)


# ---- where windows begin ---------------------------------------------------------------------------------------------
@given(st.integers(1, 300), st.integers(1, 12), st.integers(1, 60), st.sampled_from([1, 2, 3, 4, 8]))
def test_windows_of_levels_cover_every_row(rows: int, coarse: int, stride: int, step: int) -> None:
    window = coarse * step
    stride = min(stride, window)
    starts = window_starts(rows, window=window, stride=stride, step=step)
    assert starts == sorted(set(starts))
    assert all(start % step == 0 for start in starts)
    assert starts[0] == 0
    assert all(start < rows and (start == 0 or start + window < rows + step) for start in starts)
    assert {row for start in starts for row in range(start, min(start + window, rows))} == set(range(rows))
    assert len(starts) <= max(1, -(-(rows - window) // stride) + 2)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 400), st.integers(1, 12), st.none() | st.integers(1, 48))
def test_every_second_is_seen_at_its_time_on_every_level(frames: int, coarse: int, stride: int | None) -> None:
    window = 4 * coarse
    data = DataRecipe(detect_stride=None if stride is None else min(stride, window))
    whole = times_sample(frames)
    seen: dict[str, set[int]] = {key: set() for key in whole.features}
    for view in detection_views(whole, needs_of(window), data):
        assert view.rows <= window
        for key, rows in view.features.items():
            factor = whole.factors[key]
            assert len(rows) == -(-view.rows // factor)
            expected = view.axis.pooled(factor).center_s(np.arange(len(rows)))  # in time, not by counting
            np.testing.assert_allclose(rows[:, 0], expected, atol=1e-4)
            seen[key] |= set(np.rint(axis_of(2 * factor).row_at(expected)).astype(int).tolist())
    for key, found in seen.items():
        assert found == set(range(len(whole.features[key])))


def test_truth_is_in_rows_of_the_first_need() -> None:
    whole = times_sample(200)
    truth = row_truth(np.array([[2.0, 4.0], [11.0, 15.0]]), np.array([0, 1]), whole.axis, whole.rows)
    np.testing.assert_allclose(truth.segments, [[10, 20], [55, 75]], atol=1e-5)
    filled = Sample("v", whole.features, whole.axis, 20.0, truth.segments, truth.labels, factors=whole.factors)
    starts = training_starts(filled, needs_of(32), DataRecipe(train_stride=15))
    assert starts == [0, 12, 44, 60]  # of 0, 15 → 12, 30 → 28, 45 → 44, 60 and the last one, 68, those with truth
    view = crop(filled, 44, 32)
    assert view.labels.tolist() == [1]
    np.testing.assert_allclose(view.segments, [[11, 31]], atol=1e-5)
    np.testing.assert_allclose(view.axis.to_seconds(view.segments), [[11.0, 15.0]], atol=1e-5)
    with pytest.raises(ValueError, match="row of 'i3d/s4', which is 2 of them"):
        crop(filled, 15, 32)


def test_windows_begin_at_whole_rows_of_every_level() -> None:
    needs = [LevelSpec(name, layout="windowed", rows=rows) for name, rows in (("a", 12), ("b", 6), ("c", 4))]
    features = {name: np.arange(-(-50 // n))[:, None] for name, n in (("a", 1), ("b", 2), ("c", 3))}
    whole = Sample("v", features, axis_of(2), 10.0, factors={"a": 1, "b": 2, "c": 3})
    views = detection_views(whole, needs, DataRecipe(detect_stride=5))
    assert [int(view.features["a"][0, 0]) for view in views] == [0, 6, 12, 18, 24, 30, 36, 42]
    assert all(view.features["c"][0, 0] * 3 == view.features["a"][0, 0] for view in views)


# ---- levels out of the store -----------------------------------------------------------------------------------------
@pytest.fixture
def store(tmp_path: Path):
    with open_store(tmp_path / "features", "a") as opened:
        yield opened


def test_levels_are_read_as_they_are(store: Store) -> None:
    write_times(store, "i3d", "v", 101)
    sample = read_sample(store, needs_of(128), "v")
    assert {key: len(rows) for key, rows in sample.features.items()} == {"i3d/s2": 51, "i3d/s4": 26, "i3d/s8": 13}
    assert dict(sample.factors) == {"i3d/s2": 1, "i3d/s4": 2, "i3d/s8": 4}
    assert sample.interpolated == ()
    assert sample.axis == axis_of(2)
    for level, n in LEVELS.items():
        expected = axis_of(n).center_s(np.arange(len(sample.features[f"i3d/{level}"])))
        np.testing.assert_allclose(sample.features[f"i3d/{level}"][:, 0], expected, atol=1e-5)


@pytest.mark.parametrize("spacing", [1, 3])
@pytest.mark.parametrize("shift_s", [0.0, 0.4, 0.13, -0.31])
def test_levels_that_begin_elsewhere_are_moved_into_place(store: Store, shift_s: float, spacing: int) -> None:
    """Equal starts would be wrong by the shift; what the rows say must be the time at which they lie."""
    write_times(store, "i3d", "v", 160, changes={"s4": axis_of(4, shift_s=shift_s)})
    sample = read_sample(store, needs_of(24), "v", row_spacing=spacing)
    assert sample.interpolated == (() if shift_s == 0 else ("i3d/s4",))
    for view in detection_views(sample, needs_of(24), DataRecipe(detect_stride=5)):
        for key, rows in view.features.items():
            expected = view.axis.pooled(sample.factors[key]).center_s(np.arange(len(rows)))
            inside = (expected > 1.5) & (expected < 14.5)  # beyond an end: the row at that end
            np.testing.assert_allclose(rows[inside, 0], expected[inside], atol=1e-4)


def test_a_coarse_level_may_lack_its_last_row(store: Store) -> None:
    write_times(store, "i3d", "v", 101, lacking={"s8": 1})
    write_times(store, "flow", "v", 101, lacking={"s4": 1})
    sample = read_sample(store, needs_of(32, streams=("i3d", "flow")), "v")
    counts = {key: len(rows) for key, rows in sample.features.items()}
    assert counts == {"i3d/s2": 51, "flow/s2": 51, "i3d/s4": 25, "flow/s4": 25, "i3d/s8": 12, "flow/s8": 12}
    batch = collate(detection_views(sample, needs_of(32, streams=("i3d", "flow")), DataRecipe()))
    assert batch is not None
    assert batch.mask.sum(1).tolist() == [32, 32, 31]
    assert batch.masks["i3d/s4"].sum(1).tolist() == batch.masks["flow/s4"].sum(1).tolist() == [16, 16, 15]
    assert batch.masks["flow/s8"].sum(1).tolist() == [8, 8, 7]
    assert batch.features["flow/s8"].shape == (3, 2, 8)


def test_a_stream_cut_short_cuts_the_levels_read_before_it(store: Store) -> None:
    write_times(store, "i3d", "v", 101)
    write_times(store, "flow", "v", 101, lacking={"s2": 1})
    needs = [*needs_of(32), LevelSpec("flow", "s2", "windowed", 32)]
    counts = {key: len(rows) for key, rows in read_sample(store, needs, "v").features.items()}
    assert counts == {"i3d/s2": 50, "i3d/s4": 25, "i3d/s8": 13, "flow/s2": 50}


def test_a_level_without_a_row_in_a_window_is_padding(store: Store) -> None:
    write_times(store, "i3d", "v", 98, lacking={"s8": 1})  # 49, 25 and 12 rows: the last window has one of s2 alone
    views = detection_views(read_sample(store, needs_of(4), "v"), needs_of(4), DataRecipe(detect_stride=4))
    assert [len(rows) for rows in views[-1].features.values()] == [1, 1, 0]
    batch = collate(views[-1:])
    assert batch is not None
    assert batch.features["i3d/s8"].shape == (1, 2, 1)
    assert not batch.masks["i3d/s8"].any()


def test_levels_that_do_not_fit_are_refused(store: Store) -> None:
    write_times(store, "i3d", "short", 101, lacking={"s8": 3})
    with pytest.raises(StoreError, match=r"'short'.*cut short"):
        read_sample(store, needs_of(32), "short")
    write_times(store, "i3d", "sparse", 101, changes={"s4": axis_of(6)})
    with pytest.raises(StoreError, match=r"level 's4' has a row every 3 rows of 'i3d', level 's2', but.* every 2"):
        read_sample(store, needs_of(32), "sparse")
    write_times(store, "i3d", "other", 400)
    write_times(store, "flow", "other", 100, changes={"s4": axis_of(4, shift_s=0.05)})
    with pytest.raises(StoreError, match=r"cut short|both made from the same video"):
        read_sample(store, needs_of(32, streams=("i3d", "flow")), "other")
    for wrong in ([32, 12, 8], [16, 32, 8]):
        specs = [LevelSpec("i3d", level, "windowed", n) for level, n in zip(LEVELS, wrong, strict=True)]
        with pytest.raises(RecipeError, match="whole multiple"):
            check_needs(specs, detector="x")
    check_needs(needs_of(32), detector="x")
    assert level_factors(needs_of(32)) == [1, 2, 4]
    assert level_factors(needs_of(None, "full")) == [1, 1, 1]


@pytest.mark.parametrize("average", [False, True])
def test_rescaled_levels_lie_where_they_say(store: Store, average: bool) -> None:
    write_times(store, "i3d", "v", 333)
    data = DataRecipe(rescale="average" if average else "linear")
    sample = read_whole(store, needs_of(64, "rescaled"), "v", data)
    assert [len(rows) for rows in sample.features.values()] == [64, 32, 16]
    for key, rows in sample.features.items():
        expected = TimeAxis.rescaled(rows=len(rows), duration_s=33.3).center_s(np.arange(len(rows)))
        np.testing.assert_allclose(rows[2:-2, 0], expected[2:-2], atol=1e-3)
        assert sample.axis.pooled(sample.factors[key]).center_s(0) == pytest.approx(expected[0])
    batch = collate([sample, sample])
    assert batch is not None
    assert all(mask.all() for mask in batch.masks.values())


# ---- reading the window alone ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("spacing", [1, 2, 3])
def test_slices_of_a_video_are_those_of_the_whole(store: Store, spacing: int) -> None:
    rng = np.random.default_rng(0)
    write_times(store, "i3d", "v", 200, changes={"s4": axis_of(4, shift_s=0.13), "s8": axis_of(8.04)})
    store.create_stream("other", {})
    axis = TimeAxis(0.37, 0.11, 0.5)
    level = Level(rng.standard_normal((54, 3)).astype(np.float16), axis)
    store.write("other", "v", {"features": level}, duration_s=20.0, source={"name": "v", "size": 1, "mtime_ns": 1})
    needs = [*needs_of(16), LevelSpec("other", "features", "windowed", 16)]
    whole, opened = (f(store, needs, "v", row_spacing=spacing) for f in (read_sample, open_sample))
    assert opened.rows == whole.rows
    assert set(opened.interpolated) == {"i3d/s4", "i3d/s8", "other"}
    for start in range(0, whole.rows, 4):
        a, b = crop(whole, start, 16), crop(opened, start, 16)
        assert a.axis == b.axis
        for key, rows in a.features.items():
            assert isinstance(b.features[key], np.ndarray)
            np.testing.assert_allclose(b.features[key], rows, atol=2e-6)
            assert b.features[key].dtype == rows.dtype


def test_training_without_a_cache_reads_windows_and_sees_the_same(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs, data = needs_of(16), DataRecipe(train_stride=10)
    truth: dict[str, RowTruth] = {}
    starts = {}
    for index in range(3):
        write_times(store, "i3d", f"v{index}", 1000 + 7 * index)
        truth[f"v{index}"] = row_truth(np.array([[3.0, 5.0], [60.0, 90.0]]), np.array([0, 1]), axis_of(2), 500)
        starts[f"v{index}"] = [0, 12, 280, 480, 488]
    cache = {video: read_whole(store, needs, video, data) for video in truth}
    options = {"store": store, "needs": needs, "truth": truth, "data": data, "seed": 1, "starts": starts}
    kept, read_again = VideoDataset(cache=cache, **options), VideoDataset(cache={}, **options)
    counted: list[int] = []
    plain = Feature._read

    def counting(self: Feature, start: int, stop: int) -> np.ndarray:
        counted.append(stop - start)
        return plain(self, start, stop)

    monkeypatch.setattr(Feature, "_read", counting)
    steps = epoch_steps(len(kept), batch=4, accumulate=1, seed=1, epoch=0)
    for a, b in zip(
        EpochLoader(kept, workers=0).epoch(0, steps), EpochLoader(read_again, workers=0).epoch(0, steps), strict=True
    ):
        assert a is not None
        assert b is not None
        assert torch.equal(a.mask, b.mask)
        assert a.axes == b.axes
        for key, value in a.features.items():
            assert torch.equal(value, b.features[key])
            assert torch.equal(a.masks[key], b.masks[key])
        for one, other in zip(a.targets or [], b.targets or [], strict=True):
            assert torch.equal(one.segments, other.segments)
            assert torch.equal(one.labels, other.labels)
    assert max(counted) <= 16
    assert sum(counted) <= 15 * (16 + 8 + 4)


# ---- end to end ------------------------------------------------------------------------------------------------------
WIDTHS = {"s2": 4, "s4": 5, "s8": 6}


def make_levels_world(folder: Path, *, videos: int = 10) -> tuple[Path, Path]:
    """Two streams of three levels with channels of their own; class k of two adds 2 to its channel."""
    rng = np.random.default_rng(0)
    database = {}
    with open_store(folder / "features", "a") as store:
        for stream in ("rgb", "flow"):
            store.create_stream(stream, {"stream": stream})
        for index in range(videos):
            frames, video = int(rng.integers(90, 400)), f"video {index}/é"
            annotations, at = [], int(rng.integers(2, 20))
            while at + 50 < frames:
                length = int(rng.integers(12, 48))
                annotations.append({"segment": [at * STEP_S, (at + length) * STEP_S], "label": f"k{rng.integers(2)}"})
                at += length + int(rng.integers(10, 40))
            for stream in ("rgb", "flow"):
                levels = {}
                for level, n in LEVELS.items():
                    axis = axis_of(n)
                    rows = rng.normal(0, 0.2, (-(-frames // n), WIDTHS[level]))
                    for action in annotations:
                        start, end = axis.to_rows(np.array(action["segment"]))
                        inside = np.clip(np.arange(len(rows)) + 1, start, end) - np.clip(
                            np.arange(len(rows)), start, end
                        )
                        rows[:, int(action["label"][1])] += 2 * inside
                    levels[level] = Level(rows.astype(np.float32), axis)
                store.write(
                    stream, video, levels, duration_s=frames * STEP_S, source={"name": video, "size": 1, "mtime_ns": 1}
                )
            subset = "training" if index < videos - 3 else "validation"
            database[video] = {"subset": subset, "duration": frames * STEP_S, "annotations": annotations}
    (folder / "annotations.json").write_text(json.dumps({"version": "x", "database": database}), encoding="utf-8")
    return folder / "features", folder / "annotations.json"


SMALL = {
    "levels": ["s2", "s4", "s8"], "level_channels": WIDTHS, "rows": 64, "proposals": 12, "heads": 2, "width": 32,
    "interaction_width": 8, "feedforward": 32, "attention_heads": 4, "soi_points": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def levels_world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.set_num_threads(1)
    return make_levels_world(tmp_path_factory.mktemp("levels"))


@pytest.mark.parametrize(
    ("model", "epochs", "bar"),
    [
        ({}, 6, 0.5),
        ({"pyramid": "high"}, 1, 0.0),
        ({"pyramid": "single"}, 1, 0.0),
        ({"layout": "rescaled"}, 1, 0.0),
    ],
)
def test_trained_and_detected_on_levels(
    levels_world: tuple[Path, Path], tmp_path: Path, model: dict, epochs: int, bar: float
) -> None:
    windowed = model.get("layout") != "rescaled" and "pyramid" not in model
    recipe = DetectRecipe.model_validate(
        {
            "detector": "sptad",
            "streams": ["rgb", "flow"],
            "model": {**SMALL, **model},
            "data": {"holdout": 0.0, **({"train_stride": 20, "detect_stride": 32} if windowed else {})},
            "train": {
                "epochs": epochs, "batch_videos": 4, "optimizer": "adamw", "lr": 4e-3, "schedule": "cosine",
                "clip_norm": 1.0, "select": "last",
            },
            "postprocess": {"method": "soft_nms"},
        }
    )  # fmt: skip
    store, annotations = levels_world
    train_detector(recipe, store=store, annotations=annotations, out=tmp_path / "run", device="cpu")
    tables = [
        detect(
            run=tmp_path / "run", store=store, annotations=annotations, subset="validation", device="cpu",
            batch_videos=size,
        )
        for size in (1, 3)
    ]  # fmt: skip
    assert len(tables[0]) == len(tables[1]) > 0
    np.testing.assert_allclose(tables[0]["score"], tables[1]["score"], atol=1e-4)
    truth = read_truth(annotations).subset("validation").segments
    assert detection_map(truth, tables[0], tiou=(0.5,)).average >= bar


def test_a_store_of_one_level_and_the_defaults(tmp_path: Path) -> None:
    store, annotations = make_world(tmp_path)  # its longest actions have 12 rows
    sets = [
        "train.epochs=2", "model.width=16", "model.interaction_width=4", "model.feedforward=16", "model.proposals=8",
        "model.heads=2", "data.holdout=0.25",
    ]  # fmt: skip
    recipe = detect_recipe("sptad", streams=["rgb", "flow"], sets=sets)
    metrics = train_detector(recipe, store=store, annotations=annotations, out=tmp_path / "run", device="cpu")
    assert metrics["counts"]["windows"] > 12
    run = Run.load(tmp_path / "run")
    assert run.recipe.model["rows"] == 32  # filled in, and not to be guessed again
    found = detect(run=run, store=store, annotations=annotations, subset="validation", device="cpu")
    assert set(found["label"]) <= set(run.classes)
    durations = read_truth(annotations).videos.set_index("video")["duration_s"]
    assert (found["end_s"] <= found["video"].map(durations) + 1e-3).all()
    assert found.groupby("video")["end_s"].max().gt(0.7 * durations[found["video"].unique()]).all()  # to their ends


def test_levels_of_another_width_are_named(levels_world: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = DetectRecipe.model_validate(
        {
            "detector": "sptad",
            "streams": ["rgb", "flow"],
            "model": {**SMALL, "level_channels": {"s2": 9, "s4": 9, "s8": 9}},
            "data": {"holdout": 0.0},
            "train": {"epochs": 1, "select": "last"},
        }
    )
    with pytest.raises(RecipeError, match=r"rgb/s2 and flow/s2 have 8 channels together.*built for 18"):
        train_detector(recipe, store=levels_world[0], annotations=levels_world[1], out=tmp_path / "run", device="cpu")
