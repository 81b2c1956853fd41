"""The frames behind a sample's rows: through the network they must give the rows that extraction stored."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tad.detect.align import read_sample
from tad.detect.data import EpochLoader, epoch_steps
from tad.detect.interface import LevelSpec
from tad.detect.windows import read_whole
from tad.errors import RecipeError
from tad.joint import dataset as module
from tad.joint.augment import Augmentation, Draw
from tad.joint.clips import Clips, JointBatch
from tad.joint.dataset import JointDataset, JointSample, collate, row_positions, snippet_clips
from tad.joint.frames import open_sources
from tad.recipe import DataRecipe
from tad.store import Store
from tests.joint.footage import SECONDS, dataset, filled, make_footage, outputs, placed, recipe

STREAMS = {
    "rgb": recipe(),
    "flow": recipe("tiny-flow"),
    "sparse": recipe(window=5, interval=3, stride=7),
    "gaps": recipe(window=3, stride=11),
    "levels": recipe(stride=4, levels=True, maps=("s4",)),
    "wide": recipe(window=8, interval=2, stride=8, levels=True),
    "slow": recipe(fps=5.0, window=6, stride=3),
    "frames": recipe("frames"),
    "flow-frames": recipe("flow-frames"),
    "frames-slow": recipe("frames", fps=5.0),
    "small": recipe("frames", crop=(24, 24)),
}
BACKBONE = {"flow": "tiny-flow"}
LONG = "a/b ünï"


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_footage(tmp_path_factory.mktemp("footage"))


@pytest.fixture(scope="module")
def store(listed: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return filled(listed, tmp_path_factory.mktemp("store") / "s.zarr", STREAMS)


def raw_of(stream: str) -> dict[str, str]:
    return {"frames": "frames-slow"} if stream == "slow" else {}


def assert_rows(store: Store, found: np.ndarray, stored: np.ndarray, stream: str, level: str | None = None) -> None:
    """Equal within two thousandths of how much the rows of the longest video differ: another row would be seen."""
    key = (stream, LONG) if level is None else (stream, LONG, level)
    rows = store[key].numpy().astype(np.float32)  # type: ignore[index]
    spread = np.abs(np.diff(rows, axis=0)).mean()
    assert found.shape == stored.shape
    np.testing.assert_allclose(found, stored.astype(np.float32), rtol=0, atol=2e-3 * spread * np.sqrt(rows[0].size))
    assert np.abs(found - stored).mean() < 2e-3 * spread


def made_again(sample: JointSample, stream: str) -> np.ndarray:
    clips = sample.clips[stream]
    return placed(outputs(BACKBONE.get(stream, "tiny"), clips)["features"], clips)


# ---- snippets -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["full", "windowed", "rescaled"])
@pytest.mark.parametrize("stream", ["rgb", "flow", "sparse", "gaps", "slow"])
def test_clips_give_the_stored_rows(store: Store, stream: str, layout: str) -> None:
    rows = {"full": None, "windowed": 4, "rescaled": 6}[layout]
    need = LevelSpec(stream, layout=layout, rows=rows)  # type: ignore[arg-type]
    found = dataset(store, [need], opened=raw_of(stream))
    assert {video for video, _ in found.items} == set(SECONDS)
    assert len(found) > 3 or layout != "windowed"  # first, middle and last windows
    for index in range(len(found)):
        sample = found[0, index]
        assert list(sample.features) == [stream]
        assert_rows(store, made_again(sample, stream), sample.features[stream], stream)
        clips = sample.clips[stream]
        assert torch.equal(clips.rows, torch.unique(clips.rows))
        assert set(clips.index.unique().tolist()) == set(range(len(clips.frames)))  # no frame that nothing looks at


def test_random_cuts_of_long_videos(store: Store) -> None:
    found = dataset(store, [LevelSpec("rgb")], data=DataRecipe(max_rows=5), videos=[LONG])
    firsts = set()
    for epoch in range(12):
        sample = found[epoch, 0]
        assert sample.rows == 5
        assert_rows(store, made_again(sample, "rgb"), sample.features["rgb"], "rgb")
        firsts.add(int(sample.clips["rgb"].rows[0]))
    assert len(firsts) > 3


def test_rows_are_the_stored_ones_and_places_their_fractions(store: Store) -> None:
    video = LONG
    feature = store["rgb", video]
    need = LevelSpec("rgb", layout="rescaled", rows=23)
    sample = dataset(store, [need], videos=[video])[0, 0]
    clips = sample.clips["rgb"]
    centres = (np.arange(23) + 0.5) * sample.duration_s / 23
    expected = np.clip(feature.axis.row_at(centres), 0, len(feature) - 1)
    at = np.interp(clips.place, np.arange(len(clips.rows)), clips.rows)
    np.testing.assert_allclose(at, expected, atol=2e-3)
    whole = outputs("tiny", snippet_clips(dataset(store, [need]).sources["rgb"], video, np.arange(len(feature))))
    assert_rows(store, whole["features"], feature.numpy(), "rgb")


def test_stored_rows_stay_what_they_are(store: Store) -> None:
    """Clips beside them change neither rows, truth nor time; from memory or read."""
    needs = (LevelSpec("rgb", layout="windowed", rows=4), LevelSpec("flow", layout="windowed", rows=4))
    data = DataRecipe(train_stride=3, empty_windows=True)
    joint = dataset(store, needs, data=data)
    cached = {video: read_whole(store, needs, video, data) for video in SECONDS}
    kept = dataset(store, needs, data=data, cache=cached)
    assert kept.__getstate__()["cache"] == {}
    for index in range(len(joint)):
        plain = super(JointDataset, joint).whole(index)
        cut = joint._cut(plain, 0, index)
        for sample in (joint[0, index], kept[0, index]):
            assert (sample.video, sample.axis, sample.duration_s) == (cut.video, cut.axis, cut.duration_s)
            assert sample.factors == cut.factors == {}
            np.testing.assert_array_equal(sample.segments, cut.segments)
            assert list(sample.features) == ["rgb", "flow"]
            for key, rows in cut.features.items():
                np.testing.assert_array_equal(sample.features[key], rows)
        same_clips(joint[0, index], kept[0, index])


def test_only_frames_between_the_first_and_the_last_are_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    found = dataset(store, [LevelSpec("gaps", layout="windowed", rows=3)], videos=[LONG])
    source, reads = found.sources["gaps"], list[tuple[int, int]]()
    read = source.read

    def counting(video: str, first: int, stop: int) -> np.ndarray:
        reads.append((first, stop))
        return read(video, first, stop)

    monkeypatch.setattr(source, "read", counting)
    whole = found[0, 1]
    assert found.items[1] == (LONG, 3)
    assert reads == [(33, 58)]  # rows 3 to 5: frames 33 to 35, 44 to 46 and 55 to 57
    assert whole.clips["gaps"].frames.shape[0] == 9
    assert whole.clips["gaps"].index.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    reads.clear()
    monkeypatch.setattr(module, "PIECE_BYTES", 5 * 32 * 45 * 3)  # five frames at a time
    piecewise = found[0, 1]
    assert reads == [(33, 36), (44, 47), (55, 58)]
    same_clips(whole, piecewise)


# ---- streams side by side, stage outputs, frames as such ------------------------------------------------------------
def test_streams_are_cut_and_mirrored_alike(store: Store) -> None:
    needs = (LevelSpec("rgb", layout="windowed", rows=4), LevelSpec("flow", layout="windowed", rows=4))
    found = dataset(store, needs, augmentation=Augmentation(random_crop=True, flip=True))
    plain = dataset(store, needs)
    mirrored = set()
    for epoch, index in [(epoch, index) for epoch in range(3) for index in range(3)]:
        sample, bare = found[epoch, index], plain[epoch, index]
        draw = found.augmentation.draw(5, epoch, index)
        mirrored.add(draw.mirrored)
        for stream, raw in (("rgb", "frames"), ("flow", "flow-frames")):
            clips = sample.clips[stream]
            box = draw.box(found.sources[stream].about(sample.video))
            part = np.s_[..., box.top : box.top + 24, box.left : box.left + 32]
            first = int(clips.rows[0]) * 4
            stored = store[raw, sample.video][first : first + len(clips.frames)][part].astype(int)  # (F, C, h, w)
            if draw.mirrored:
                stored = stored[..., ::-1].copy()
                if stream == "flow":
                    stored[:, 0] = 255 - stored[:, 0]
            np.testing.assert_array_equal(clips.frames, stored)
            assert torch.equal(clips.index, bare.clips[stream].index)
            np.testing.assert_array_equal(sample.features[stream], bare.features[stream])
    assert mirrored == {True, False}


@pytest.mark.parametrize("stream", ["levels", "wide"])
def test_one_pass_over_a_window_gives_its_stage_outputs(store: Store, stream: str) -> None:
    """Away from a window's ends, where extraction looked at frames that the window does not hold."""
    needs = (
        LevelSpec(stream, "s2", "windowed", 8),
        LevelSpec(stream, "s4", "windowed", 4),
    )
    data = DataRecipe(train_stride=2, empty_windows=True)
    found = dataset(store, needs, data=data)
    step = {"levels": 1, "wide": 2}[stream]
    for index, (video, start) in enumerate(found.items):
        sample = found[0, index]
        clips = sample.clips[stream]
        assert clips.index.shape == (1, 16)
        assert clips.place.numel() == 0
        assert clips.rows.tolist() == [start]
        count = store["frames", video].shape[0]
        numbers = np.minimum((start * 2 + np.arange(16)) * step, count - 1)
        frames = store["frames", video].numpy()[:, :, 4:28, 6:38]
        np.testing.assert_array_equal(clips.frames[clips.index[0]], frames[numbers])
    # of a video's first window the first rows see the same padding as extraction's first window
    first = next(index for index, item in enumerate(found.items) if item == (LONG, 0))
    sample = found[0, first]
    maps = outputs("tiny", sample.clips[stream], levels=True)
    assert maps["s4"].shape[2] == sample.features[f"{stream}/s4"].shape[0]
    pooled = maps["s2"][0].mean((-2, -1)).T  # (T', C)
    assert_rows(store, pooled[:1], sample.features[f"{stream}/s2"][:1], stream, "s2")


def test_a_whole_short_video_in_one_pass_equals_its_stored_levels(store: Store) -> None:
    """Its four frames are one window of extraction, padded with the last frame like the clip."""
    needs = (LevelSpec("levels", "s2", "windowed", 4), LevelSpec("levels", "s4-map", "windowed", 2, (128, 2, 2)))
    found = dataset(store, needs, videos=["short"])
    sample = found[0, 0]
    maps = outputs("tiny", sample.clips["levels"], levels=True)
    rows, stored = sample.features["levels/s2"], sample.features["levels/s4-map"]
    assert_rows(store, maps["s2"][0].mean((-2, -1)).T[: len(rows)], rows, "levels", "s2")
    assert_rows(store, maps["s4"][0].swapaxes(0, 1)[: len(stored)], stored, "levels", "s4-map")


@pytest.mark.parametrize("raw", ["frames", "small"])
def test_frames_that_are_read_as_such_are_augmented_like_the_clips(store: Store, raw: str) -> None:
    size = {"frames": (3, 32, 45), "small": (3, 24, 24)}[raw]
    needs = (LevelSpec("levels", "s4", "windowed", 4), LevelSpec(raw, "features", "windowed", 16, size))
    bare = dataset(store, needs)
    for index in range(len(bare)):
        sample = bare[0, index]
        assert list(sample.raw) == [raw]
        np.testing.assert_array_equal(sample.raw[raw], sample.features[raw])  # without augmentation the stored ones
    found = dataset(store, needs, augmentation=Augmentation(random_crop=True, flip=True))
    for epoch in range(4):
        sample = found[epoch, 0]
        draw = found.augmentation.draw(5, epoch, 0)
        box = draw.box(found.sources[raw].about(sample.video))
        start = int(sample.clips["levels"].rows[0]) * 4
        expected = store["frames", sample.video][start : start + 16]
        expected = expected[..., box.top : box.top + size[1], box.left : box.left + size[2]]
        np.testing.assert_array_equal(sample.raw[raw], expected[..., ::-1] if draw.mirrored else expected)
    batch = collate([bare[0, i] for i in range(len(bare))])
    assert batch is not None
    assert torch.equal(batch.raw[raw], batch.features[raw])
    assert batch.raw[raw].dtype == torch.uint8


@pytest.mark.parametrize(("stream", "raw", "stride"), [("rgb", "frames", 4), ("slow", "frames-slow", 3)])
def test_frames_beside_snippets_lie_where_the_store_reads_them(
    store: Store, stream: str, raw: str, stride: int
) -> None:
    """Windows are twice as long as their stride: the first row's part begins with the second frame, or with 1.5."""
    needs = (
        LevelSpec(stream, layout="windowed", rows=3),
        LevelSpec(raw, "features", "windowed", 3 * stride, (3, 32, 45)),
    )
    found = dataset(store, needs, opened=raw_of(stream))
    for index in range(len(found)):
        sample = found[0, index]
        np.testing.assert_array_equal(sample.raw[raw], sample.features[raw])
        assert_rows(store, made_again(sample, stream), sample.features[stream], stream)


def test_jitter_moves_frames_and_stays_inside_the_video(store: Store) -> None:
    for stream, most in (("rgb", 1), ("sparse", 1)):
        found = dataset(store, [LevelSpec(stream)], augmentation=Augmentation(jitter=True))
        bare = dataset(store, [LevelSpec(stream)])
        for index, (video, _) in enumerate(found.items):
            count = store["frames", video].shape[0]
            source = bare.sources[stream]
            frames = store["frames", video].numpy()[:, :, 4:28, 6:38]
            plan = source.grid.plan
            rows = bare[0, index].clips[stream].rows.numpy()
            plain = np.minimum(rows[:, None] * plan.stride + np.arange(plan.window) * plan.interval, count - 1)
            draw = found.augmentation.draw(5, 2, index)
            moved = np.clip(plain + draw.shifts(plain.shape, interval=plan.interval), 0, count - 1)
            clips = found[2, index].clips[stream]
            np.testing.assert_array_equal(clips.frames[clips.index], frames[moved])
            assert np.abs(moved - plain).max() == most


# ---- the same in any process ----------------------------------------------------------------------------------------
def same_clips(a: JointSample, b: JointSample) -> None:
    assert a.clips.keys() == b.clips.keys()
    for stream, clips in a.clips.items():
        for name in ("frames", "index", "rows", "place"):
            assert torch.equal(getattr(clips, name), getattr(b.clips[stream], name))


def test_stored_and_decoded_frames_give_the_same_samples(store: Store, listed: Path) -> None:
    needs = (LevelSpec("rgb", layout="windowed", rows=4), LevelSpec("flow", layout="windowed", rows=4))
    augmentation = Augmentation(random_crop=True, flip=True, jitter=True)
    stored = dataset(store, needs, augmentation=augmentation)
    decoded = dataset(store, needs, augmentation=augmentation, opened={"videos": listed})
    for key in [(0, 0), (0, 2), (1, 1), (0, len(stored) - 1)]:
        same_clips(stored[key], decoded[key])
    for source in decoded.sources.values():
        source.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("videos", [False, True])
def test_workers_give_what_the_process_itself_gives(store: Store, listed: Path, videos: bool) -> None:
    needs = (LevelSpec("rgb", layout="windowed", rows=4),)
    found = dataset(
        store,
        needs,
        augmentation=Augmentation(random_crop=True, flip=True, jitter=True),
        opened={"videos": listed} if videos else None,
        cache={video: read_whole(store, needs, video, DataRecipe()) for video in SECONDS},
    )
    steps = epoch_steps(len(found), batch=3, accumulate=1, seed=1, epoch=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more workers than cores
        batches = [b for b in EpochLoader(found, workers=1, collate=collate).epoch(4, steps) if b is not None]
    assert [len(batch) for batch in batches] == [len(step.batches[0]) for step in steps]
    for step, batch in zip(steps, batches, strict=True):
        assert isinstance(batch, JointBatch)
        for place, index in enumerate(step.batches[0]):
            same_clips(found[4, index], replace(found[4, index], clips={"rgb": batch.clips["rgb"][place]}))
            length = found[4, index].rows
            np.testing.assert_array_equal(batch.features["rgb"][place, :, :length].T, found[4, index].features["rgb"])
    for source in found.sources.values():
        if videos:
            source.close()  # type: ignore[attr-defined]


def test_a_batch_holds_what_a_detector_reads(store: Store) -> None:
    found = dataset(store, [LevelSpec("rgb")])
    samples = [found[0, index] for index in range(3)]
    batch = collate(samples)
    assert batch is not None
    assert [len(clips.rows) for clips in batch.clips["rgb"]] == batch.mask.sum(1).tolist()
    assert batch.videos == [sample.video for sample in samples]
    moved = batch.to("cpu")
    assert isinstance(moved, JointBatch)
    assert moved.clips.keys() == batch.clips.keys()
    assert collate([]) is None


# ---- what cannot be trained jointly ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("needs", "data", "match"),
    [
        ([LevelSpec("rgb")], {"row_spacing": 2}, r"data\.row_spacing=2"),
        ([LevelSpec("rgb", layout="rescaled", rows=4)], {"rescale": "average"}, r"data\.rescale=average"),
        ([LevelSpec("levels", "s4", "rescaled", 4)], {}, "no pass over frames gives them"),
        ([LevelSpec("levels"), LevelSpec("levels", "s4")], {}, r"'levels' .*at once \(features, s4\)"),
        ([LevelSpec("rgb", "s4", "windowed", 4)], {}, "'rgb' was not extracted with the level s4"),
        (
            [LevelSpec("levels", "s4", "windowed", 4), LevelSpec("levels", "s2", "windowed", 4)],
            {},
            r"differ in frames \(s4: 16, s2: 8\)",
        ),
    ],
)
def test_rows_that_frames_cannot_give_are_refused(
    store: Store, needs: Sequence[LevelSpec], data: dict[str, Any], match: str
) -> None:
    with pytest.raises(RecipeError, match=match):
        JointDataset(
            store=store, needs=needs, truth={}, data=DataRecipe(**data), seed=0, cache={},
            sources=open_sources(store, needs),
        )  # fmt: skip


def test_streams_elsewhere_in_time_are_refused(store: Store) -> None:
    needs = [LevelSpec("rgb"), LevelSpec("sparse")]
    assert read_sample(store, needs, "third").interpolated == ("sparse",)
    with pytest.raises(RecipeError, match=r"video 'third': the rows of 'sparse' lie elsewhere in time"):
        row_positions(store, needs, "third")


def test_clips_of_any_rows(store: Store) -> None:
    source = open_sources(store, [LevelSpec("rgb")])["rgb"]
    clips = snippet_clips(source, LONG, np.array([3, 1, 1.25, 3]), draw=Draw())
    assert isinstance(clips, Clips)
    assert clips.rows.tolist() == [1, 2, 3]
    assert clips.place.tolist() == [2, 0, 0.25, 2]
