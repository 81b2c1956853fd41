"""Maps and frames from the store to a detector: one time on all of them, windows alone read, bytes stay bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from tad.detect import detect, preflight, train_detector, windows
from tad.detect.align import check_needs, level_axis, level_factors, open_sample, read_sample
from tad.detect.data import EpochLoader, VideoDataset, collate, epoch_steps, row_truth
from tad.detect.detectors import build_detector
from tad.detect.infer import decoded_videos
from tad.detect.interface import LevelSpec
from tad.detect.runs import Run
from tad.detect.windows import detection_views, read_for_views, read_through, read_whole
from tad.errors import RecipeError, StoreError
from tad.recipe import DataRecipe, DetectRecipe
from tad.store import Feature, Level, Store, open_store
from tad.timeline import TimeAxis

FPS = 10.0
MAPS = {"s4-map": (4, (2, 2, 2)), "s8-map": (8, (3, 1, 2))}  # frames a row, shape of a row
MODEL = {
    "levels": list(MAPS), "rows": 16, "pyramid_levels": 3, "frames": "frames", "stt_patch": 4, "fsa_patch": 4,
    "transformer_width": 8, "transformer_heads": 2, "width": 8, "norm_groups": 2,
}  # fmt: skip
SHAPES = {"level_channels": {"s4-map": [2, 2, 2], "s8-map": [3, 1, 2]}, "frame_size": [8, 8]}
KEYS = {"net/s4-map": 4, "net/s8-map": 8, "frames": 1}  # key → frames a row


def frames_axis(frames: int = 1, *, shift_s: float = 0.0) -> TimeAxis:
    axis = TimeAxis.from_frames(fps=FPS, window_frames=frames, stride_frames=frames)
    return TimeAxis(axis.scale_s, axis.translation_s + shift_s, axis.window_s)


def needs_of(layout="windowed", **model):
    detector = build_detector(
        "talmts", channels={"net": 2, "frames": 3}, classes=2, **{**MODEL, **SHAPES, "layout": layout, **model}
    )
    return detector.needs


def write_times(
    store: Store, video: str, frames: int, *, rows=None, shift_s=None, dtype=np.float16, spoil=None
) -> None:
    """Rows that say when they are: maps in frames from the video's beginning, frames their number (at most 255)."""
    source = {"name": video, "size": 1, "mtime_ns": 1}
    shift_s, rows = shift_s or {}, rows or {}
    for stream, levels in (("net", MAPS), ("frames", {"features": (1, (3, 8, 8))})):
        if stream not in store.streams():
            store.create_stream(stream, {"stream": stream})
        made = {}
        for level, (step, shape) in levels.items():
            axis = frames_axis(step, shift_s=shift_s.get(level, 0.0))
            count = rows.get(level, -(-frames // step))
            at = axis.center_s(np.arange(count)) * FPS  # in frames
            values = np.broadcast_to(at.reshape(-1, 1, 1, 1), (count, *shape))
            values = np.rint(values - 0.5).astype(np.uint8) if step == 1 else values.astype(dtype)
            if spoil is not None:
                spoil(level, values)
            made[level] = Level(values, axis)
        store.write(stream, video, made, duration_s=frames / FPS, source=source)


def says(key: str, values: np.ndarray) -> np.ndarray:
    """When rows (T, ...) say they are, in frames."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    assert (flat == flat[:, :1]).all()
    return flat[:, 0] + (0.5 if key == "frames" else 0.0)


@pytest.fixture
def store(tmp_path: Path):
    with open_store(tmp_path / "features", "a") as opened:
        yield opened


# ---- what is read ----------------------------------------------------------------------------------------------------
def test_needs_know_their_shapes_and_how_dense_they_are() -> None:
    needs = needs_of()
    assert [(need.key, need.rows, need.shape) for need in needs] == [
        ("net/s4-map", 16, (2, 2, 2)), ("net/s8-map", 8, (3, 1, 2)), ("frames", 64, (3, 8, 8)),
    ]  # fmt: skip
    assert level_factors(needs) == [1, 2, Fraction(1, 4)]
    check_needs(needs, detector="talmts")
    dense = [LevelSpec("a", "features", "windowed", 16), LevelSpec("b", "features", "windowed", 64)]
    with pytest.raises(RecipeError, match="whole multiple"):  # rows are interpolated, not laid out finer
        check_needs(dense, detector="x")
    uneven = [*needs[:1], LevelSpec("frames", "features", "windowed", 40, (3, 8, 8))]
    with pytest.raises(RecipeError, match="whole multiple"):
        check_needs(uneven, detector="x")
    rows_only = build_detector(
        "afsd", channels={"net": 2}, classes=2, rows=16, pyramid_levels=3, width=8, norm_groups=2
    )
    assert [need.shape for need in rows_only.needs] == [None]


@pytest.mark.parametrize("stride", [None, 5, 16])
@pytest.mark.parametrize("frames", [1, 3, 4, 62, 64, 65, 101, 158, 250])
def test_every_frame_and_map_is_seen_at_its_time(store: Store, frames: int, stride: int | None) -> None:
    write_times(store, "v", frames)
    needs, data = needs_of(), DataRecipe(detect_stride=stride)
    sample = read_whole(store, needs, "v", data)
    assert sample.interpolated == ()
    seen: dict[str, set[float]] = {key: set() for key in KEYS}
    for view in detection_views(sample, needs, data):
        begin_s, end_s = view.axis.to_seconds(np.array([0, 16]))
        for key, step in KEYS.items():
            found = says(key, view.features[key])
            at = level_axis(view.axis, sample.factor(key)).center_s(np.arange(len(found))) * FPS
            np.testing.assert_allclose(found, at, atol=0.06 if step > 1 else 1e-6)  # float16
            assert len(found) <= 64 // step
            assert (found >= begin_s * FPS).all()
            assert (found <= end_s * FPS + 4).all()  # the coarse level's row may lie half outside
            seen[key] |= set(np.rint(at * 2).tolist())
    for key, step in KEYS.items():
        assert seen[key] == set(np.rint(frames_axis(step).center_s(np.arange(-(-frames // step))) * FPS * 2).tolist())


def test_bytes_stay_bytes_and_padding_is_masked(store: Store) -> None:
    write_times(store, "long", 101)
    write_times(store, "short", 5)
    needs, data = needs_of(), DataRecipe()
    samples = [detection_views(read_whole(store, needs, video, data), needs, data)[0] for video in ("long", "short")]
    assert samples[0].features["frames"].dtype == np.uint8
    assert samples[0].features["net/s4-map"].dtype == np.float16
    batch = collate(samples)
    assert batch is not None
    shapes = {key: tuple(value.shape) for key, value in batch.features.items()}
    assert shapes == {"net/s4-map": (2, 2, 16, 2, 2), "net/s8-map": (2, 3, 8, 1, 2), "frames": (2, 3, 64, 8, 8)}
    assert [value.dtype for value in batch.features.values()] == [torch.float32, torch.float32, torch.uint8]
    assert batch.mask.sum(1).tolist() == [16, 2]
    counts = {key: batch.mask_of(key).sum(1).tolist() for key in KEYS}
    assert counts == {"net/s4-map": [16, 2], "net/s8-map": [8, 1], "frames": [64, 5]}
    assert batch.features["frames"][0, 1, :, 3, 5].tolist() == list(range(64))
    assert batch.features["frames"][1, 0, :, 0, 0].tolist() == [0, 1, 2, 3, 4] + [0] * 59
    assert batch.features["net/s4-map"][1, 1, :3, 1, 0].tolist() == [2.0, 6.0, 0.0]


def test_maps_keep_height_and_width_apart(store: Store) -> None:
    """Every value at its channel, row and column, not only its time."""
    source = {"name": "v", "size": 1, "mtime_ns": 1}
    rng = np.random.default_rng(0)
    write_times(store, "other", 8)  # the streams
    maps = {level: rng.normal(size=(80 // step, *shape)).astype(np.float16) for level, (step, shape) in MAPS.items()}
    frames = rng.integers(0, 256, (80, 3, 8, 8), dtype=np.uint8)
    levels = {level: Level(values, frames_axis(MAPS[level][0])) for level, values in maps.items()}
    store.write("net", "v", levels, duration_s=8.0, source=source)
    store.write("frames", "v", {"features": Level(frames, frames_axis())}, duration_s=8.0, source=source)
    view = detection_views(read_whole(store, needs_of(), "v", DataRecipe()), needs_of(), DataRecipe())[-1]
    batch = collate([view])
    assert batch is not None
    for key, rows in (("net/s4-map", maps["s4-map"][4:]), ("net/s8-map", maps["s8-map"][2:]), ("frames", frames[16:])):
        np.testing.assert_array_equal(batch.features[key][0].transpose(0, 1).numpy(), rows)


# ---- other starts, other lengths -------------------------------------------------------------------------------------
@pytest.mark.parametrize("shift_s", [0.3, -0.25, 0.04, 0.05])
def test_frames_that_begin_elsewhere_are_laid_by_their_seconds(store: Store, shift_s: float) -> None:
    """Counting from the first would be wrong by the shift; the nearest frame is at most half a frame away."""

    def numbered(level: str, values: np.ndarray) -> None:
        if level == "features":
            values[:] = np.arange(len(values)).reshape(-1, 1, 1, 1)

    write_times(store, "v", 160, shift_s={"features": shift_s}, spoil=numbered)
    needs, data = needs_of(), DataRecipe(detect_stride=6)
    whole, opened = read_sample(store, needs, "v"), open_sample(store, needs, "v")
    assert whole.interpolated == opened.interpolated == ("frames",)
    for view, again in zip(detection_views(whole, needs, data), detection_views(opened, needs, data), strict=True):
        frames = view.features["frames"]
        assert frames.dtype == again.features["frames"].dtype == np.uint8
        np.testing.assert_array_equal(frames, again.features["frames"])
        at_s = level_axis(view.axis, Fraction(1, 4)).center_s(np.arange(len(frames)))
        is_s = frames_axis(shift_s=shift_s).center_s(frames[:, 0, 0, 0].astype(float))
        inside = (at_s > 0.5) & (at_s < 15.5)
        assert (np.abs(is_s - at_s)[inside] <= 0.5 / FPS + 1e-6).all()


def test_maps_that_begin_elsewhere_are_interpolated_in_their_type(store: Store) -> None:
    write_times(store, "v", 160, shift_s={"s8-map": 0.37})
    sample = read_sample(store, needs_of(), "v")
    assert sample.interpolated == ("net/s8-map",)
    maps = sample.features["net/s8-map"]
    assert maps.dtype == np.float16
    np.testing.assert_allclose(says("net/s8-map", maps)[1:-1], (np.arange(20) * 8 + 4)[1:-1], atol=0.1)


@pytest.mark.parametrize(
    ("rows", "counts"),
    [
        ({"features": 98}, (25, 13, 98)),  # frames of a whole row of maps are missing: it goes
        ({"features": 107}, (26, 13, 104)),  # more frames than maps
        ({"s4-map": 25, "s8-map": 12}, (25, 12, 100)),
    ],
)
def test_streams_that_differ_by_a_row_are_cut(store: Store, rows: dict, counts: tuple[int, int, int]) -> None:
    write_times(store, "v", 101, rows=rows)
    sample = read_sample(store, needs_of(), "v")
    assert tuple(len(values) for values in sample.features.values()) == counts
    assert sample.interpolated == ()


def spoil_reads(monkeypatch: pytest.MonkeyPatch, videos: tuple[str, ...], level: str, row: int) -> None:
    """A store refuses NaN, so that it only comes of what other programs wrote: this row of these videos is read so."""
    plain: Callable[[Feature, int, int], np.ndarray] = Feature._read

    def spoiling(self: Feature, start: int, stop: int) -> np.ndarray:
        rows = plain(self, start, stop)
        if self.video in videos and self.level == level and start <= row < stop:
            rows[row - start, 1, 0, 1] = np.nan
        return rows

    monkeypatch.setattr(Feature, "_read", spoiling)


def test_what_does_not_fit_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_times(store, "short", 101, rows={"features": 90})
    with pytest.raises(StoreError, match=r"'short'.*cut short"):
        read_sample(store, needs_of(), "short")
    write_times(store, "late", 200, shift_s={"features": 3.0})
    with pytest.raises(StoreError, match="both made from the same video"):
        read_sample(store, needs_of(), "late")
    write_times(store, "v", 101)
    with pytest.raises(StoreError, match=r"4 rows in each row of 'net', level 's4-map', but the detector reads 8"):
        read_sample(store, needs_of(frame_factor=8), "v")
    with pytest.raises(StoreError, match=r"stream 'frames'.*\(3, 8, 4\).*\(3, 8, 8\)"):
        read_sample(store, needs_of(frame_size=[8, 4]), "v")
    with pytest.raises(StoreError, match=r"level 's4-map'.*\(2, 4, 1\).*\(2, 2, 2\)"):
        read_sample(store, needs_of(level_channels={**SHAPES["level_channels"], "s4-map": [2, 4, 1]}), "v")
    with pytest.raises(StoreError, match=r"reads \(rows, channels\), this has shape \(26, 2, 2, 2\)"):
        read_sample(store, [LevelSpec("net", "s4-map", "windowed", 16)], "v")
    for read in (read_sample, open_sample):
        with pytest.raises(RecipeError, match=r"row_spacing=2.*'net/s4-map'"):
            read(store, needs_of(), "v", row_spacing=2)
    spoil_reads(monkeypatch, ("v",), "s8-map", 5)
    with pytest.raises(StoreError, match=r"'v'.*level 's8-map': 1 of 13 rows hold NaN"):
        read_sample(store, needs_of(), "v")
    monkeypatch.setattr(windows, "PIECE_VALUES", 3 * 2 * 4)
    with pytest.raises(StoreError, match=r"'v'.*level 's8-map': 1 of 4 rows hold NaN"):
        read_through(open_sample(store, needs_of(), "v"))


def test_whole_videos_are_squeezed_with_their_frames(store: Store) -> None:
    write_times(store, "v", 250)
    for how in ("linear", "average"):
        sample = read_whole(store, needs_of("rescaled"), "v", DataRecipe(rescale=how))
        assert [len(values) for values in sample.features.values()] == [16, 8, 64]
        assert [values.dtype for values in sample.features.values()] == [np.float16, np.float16, np.uint8]
        for key in KEYS:
            found = says(key, sample.features[key])
            expected = TimeAxis.rescaled(rows=len(found), duration_s=25.0).center_s(np.arange(len(found))) * FPS
            inside = slice(2, -2) if key == "frames" else slice(1, -1)
            np.testing.assert_allclose(found[inside], expected[inside], atol=0.51 if key == "frames" else 0.2)


# ---- reading the window alone ----------------------------------------------------------------------------------------
@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Level and rows of every read."""
    reads: list[tuple[str, int]] = []
    plain: Callable[[Feature, int, int], np.ndarray] = Feature._read

    def counting(self: Feature, start: int, stop: int) -> np.ndarray:
        reads.append((self.level, stop - start))
        return plain(self, start, stop)

    monkeypatch.setattr(Feature, "_read", counting)
    return reads


def test_training_without_a_cache_reads_windows_and_sees_the_same(store: Store, counted: list) -> None:
    needs, data = needs_of(), DataRecipe(train_stride=10)
    lengths = {"a": 250, "b": 37, "c": 203}
    for video, frames in lengths.items():
        write_times(store, video, frames)
    truth = {
        v: row_truth(np.array([[1.0, 3.0]]), np.array([1]), frames_axis(4), -(-n // 4)) for v, n in lengths.items()
    }
    starts = {"a": [0, 10, 48], "b": [0], "c": [10, 36]}
    cache = {video: read_whole(store, needs, video, data) for video in truth}
    options = {"store": store, "needs": needs, "truth": truth, "data": data, "seed": 1, "starts": starts}
    loaders = [EpochLoader(VideoDataset(cache=kept, **options), workers=0) for kept in (cache, {})]
    steps = epoch_steps(6, batch=4, accumulate=1, seed=1, epoch=0)
    counted.clear()
    for a, b in zip(*(loader.epoch(0, steps) for loader in loaders), strict=True):
        assert a.axes == b.axes
        assert torch.equal(a.mask, b.mask)
        for key, value in a.features.items():
            assert value.dtype == b.features[key].dtype
            assert torch.equal(value, b.features[key])
            assert torch.equal(a.mask_of(key), b.mask_of(key))
        assert all(torch.equal(x.segments, y.segments) for x, y in zip(a.targets, b.targets, strict=True))
    assert {level: max(n for name, n in counted if name == level) for level, _ in counted} == {
        "s4-map": 16, "s8-map": 8, "features": 64,
    }  # fmt: skip
    assert len(counted) == 18  # six windows of three needs: once each


def test_detection_reads_windows_one_group_after_the_other(store: Store, counted: list) -> None:
    write_times(store, "a", 250)
    write_times(store, "b", 30)
    torch.manual_seed(0)
    detector = build_detector("talmts", channels={"net": 2, "frames": 3}, classes=2, **MODEL, **SHAPES).eval()
    data = DataRecipe(detect_stride=4)
    found = []
    for read in (read_whole, read_for_views):
        counted.clear()
        samples = [read(store, detector.needs, video, data) for video in ("a", "b")]
        found.append(decoded_videos(detector, samples, data, device=torch.device("cpu")))
    assert max(n for _, n in counted) == 64
    for whole, again in zip(*found, strict=True):
        assert whole.video == again.video
        assert torch.equal(whole.scores, again.scores)
        assert torch.equal(whole.segments_s, again.segments_s)


# ---- end to end ------------------------------------------------------------------------------------------------------
LENGTHS = {"train 0": 150, "train 1": 201, "train/2": 90, "train é": 250, "test 0": 120, "test 1": 9, "test 2": 70}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("maps")
    database = {}
    with open_store(folder / "features", "a") as store:
        for video, frames in LENGTHS.items():
            write_times(store, video, frames)
            annotations = [{"segment": [0.2, 0.7 if frames < 10 else 4.0], "label": "a"}]
            if frames > 100:
                annotations.append({"segment": [6.0, 9.5], "label": "b"})
            subset = "training" if video.startswith("train") else "validation"
            database[video] = {"subset": subset, "duration": frames / FPS, "annotations": annotations}
    (folder / "annotations.json").write_text(json.dumps({"version": "x", "database": database}), encoding="utf-8")
    return folder / "features", folder / "annotations.json"


def recipe_of(**changes) -> DetectRecipe:
    return DetectRecipe.model_validate(
        {
            "detector": "talmts",
            "streams": ["net", "frames"],
            "model": {**MODEL, **changes.pop("model", {})},
            "data": {"holdout": 0.25, "train_stride": 8, "detect_stride": 8, **changes.pop("data", {})},
            "train": {"epochs": 1, "batch_videos": 3, "lr": 1e-3, "select": "last", **changes.pop("train", {})},
        }
    )


def test_trained_and_detected_from_a_store(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, annotations = world
    options = {"store": store, "annotations": annotations, "device": "cpu"}
    kept = train_detector(recipe_of(), out=tmp_path / "kept", **options)
    monkeypatch.setattr(preflight, "CACHE_BYTES", 0)
    read_again = train_detector(recipe_of(), out=tmp_path / "read", **options)
    assert kept["last_loss"] == read_again["last_loss"]
    assert kept["last_average_map"] == read_again["last_average_map"]
    assert kept["counts"] == read_again["counts"]
    assert "kept in memory" in (tmp_path / "kept" / "log.txt").read_text(encoding="utf-8")
    assert "read again" in (tmp_path / "read" / "log.txt").read_text(encoding="utf-8")
    run = Run.load(tmp_path / "kept")
    assert {key: run.recipe.model[key] for key in SHAPES} == SHAPES  # as the store has them
    tables = [detect(run=run, subset="validation", batch_videos=n, **options) for n in (1, 3)]
    assert set(tables[0]["video"]) == {"test 0", "test 1", "test 2"}
    assert len(tables[0]) == len(tables[1])
    np.testing.assert_allclose(tables[0]["score"], tables[1]["score"], atol=1e-5)
    assert tables[0].groupby("video")["end_s"].max()["test 1"] <= 0.9 + 1e-6
    assert tables[0].groupby("video")["end_s"].max()["test 0"] > 10.0


def test_whole_videos_squeezed_are_trained_on(world: tuple[Path, Path], tmp_path: Path) -> None:
    store, annotations = world
    recipe = recipe_of(
        model={"layout": "rescaled"}, data={"train_stride": None, "detect_stride": None}, train={"feature_dropout": 0.2}
    )
    options = {"store": store, "annotations": annotations, "device": "cpu"}
    metrics = train_detector(recipe, out=tmp_path / "run", **options)
    assert np.isfinite(metrics["last_loss"])
    assert len(detect(run=tmp_path / "run", videos=["test 1"], **options))


@pytest.mark.parametrize("limit", [0, 2**31])
def test_a_damaged_video_is_lost_alone(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    spoil_reads(monkeypatch, ("train 1", "test 0"), "s4-map", 20)
    monkeypatch.setattr(preflight, "CACHE_BYTES", limit)
    options = {"store": world[0], "annotations": world[1], "device": "cpu"}
    metrics = train_detector(recipe_of(data={"holdout": 0.0}), out=tmp_path / "run", **options)
    assert metrics["counts"]["broken_videos"] == 1
    failures: list = []
    found = detect(run=tmp_path / "run", subset="validation", batch_videos=3, failures=failures, **options)
    assert set(found["video"]) == {"test 1", "test 2"}
    assert [failure.video for failure in failures] == ["test 0"]
    assert "NaN" in failures[0].message


def test_recipes_that_do_not_fit_the_store_are_refused(world: tuple[Path, Path], tmp_path: Path) -> None:
    store, annotations = world
    for changes, match in (
        ({"data": {"row_spacing": 2}}, "row_spacing=2"),
        ({"model": {"frame_size": [4, 4]}}, r"\(3, 4, 4\)"),
        ({"model": {"frame_factor": 2}}, "4 rows in each row"),
        ({"model": {"levels": ["s4-map"], "level_channels": {"s4-map": 2}}}, r"reads \(rows, channels\)"),
    ):
        with pytest.raises((RecipeError, StoreError), match=match):
            train_detector(recipe_of(**changes), store=store, annotations=annotations, out=tmp_path / "x", device="cpu")
    assert not (tmp_path / "x").exists()
