"""Clips for training a backbone: their labels, which are drawn, in which order, and that streaming cuts the same."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tad.errors import RecipeError, VideoError
from tad.extract.clip_reading import AHEAD_CLIPS, MemoryReader, StreamReader, cut_clips
from tad.extract.clip_sampling import ClipPlan, ClipSampler, in_sequence, shuffled
from tad.extract.clips import (
    FIXED,
    Clip,
    ClipFormat,
    LabelledVideo,
    clip_labels,
    count_frames,
    cut,
    flip,
    frames_at,
    labelled,
    mirror_index,
    read_frames,
)
from tad.extract.inputs import VideoFile, find_videos
from tad.extract.snippets import SnippetPlan
from tad.extract.video import Geometry, Plan
from tad.synth import make_video

FORM = ClipFormat(SnippetPlan(16, 1, 4), 12.5, Geometry(32, (32, 32)), None)


def segments(*rows: tuple[float, float, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["start_s", "end_s", "label"])


# ---- labels ---------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 8), st.floats(0.05, 5), st.sampled_from("abz")), max_size=6),
    st.integers(1, 40),
    st.integers(1, 30),
    st.sampled_from([8.0, 12.5, 25.0]),
)
def test_labels_are_those_of_the_centre(
    actions: list[tuple[float, float, str]], starts: int, span: int, fps: float
) -> None:
    table = segments(*[(start, start + length, label) for start, length, label in actions])
    labels, numbers = clip_labels(table, ["a", "b"], starts=starts, span=span, fps=fps)
    for i in range(starts):
        centre = (i + span / 2) / fps
        covering = [
            (end - start, {"a": 1, "b": 2}[label])
            for start, end, label in table.itertuples(index=False)
            if start <= centre < end and label != "z"
        ]
        assert (numbers[i] == -1) == (not covering)
        assert labels[i] in ({label for length, label in covering if length <= min(covering)[0] + 1e-9} or {0})


def test_of_nested_actions_the_shorter_one_counts() -> None:
    table = segments((1.0, 2.0, "dive"), (0.0, 4.0, "swim"), (3.0, 3.5, "unknown"))
    labels, actions = clip_labels(table, ["dive", "swim"], starts=40, span=10, fps=10.0)
    assert labels.tolist() == [2] * 5 + [1] * 10 + [2] * 20 + [0] * 5
    assert actions[-1] == -1
    assert len(set(actions.tolist())) == 3


def test_a_video_shorter_than_a_clip_has_one_that_repeats_its_end() -> None:
    video = labelled("v", Path("v"), segments((0.0, 9.0, "a")), ["a"], frames=5, fps=1.0, span=15)
    assert video.labels.tolist() == [1]
    assert frames_at(0, np.arange(0, 16, 2), frames=5).tolist() == [0, 2, 4, 4, 4, 4, 4, 4]


@given(st.integers(0, 50), st.integers(1, 12), st.integers(1, 5), st.floats(0.3, 1.7), st.integers(1, 90))
def test_speed_stretches_a_clip_about_its_centre(
    start: int, window: int, interval: int, speed: float, count: int
) -> None:
    offsets = np.arange(window) * interval
    found = frames_at(start, offsets, frames=count, speed=speed)
    assert (np.diff(found) >= 0).all()
    assert found[0] >= 0
    assert found[-1] < count
    free = frames_at(start + 1000, offsets, frames=10_000, speed=speed)
    assert abs(free.mean() - (start + 1000 + offsets.mean())) <= 0.5  # the centre, and with it the label, stays
    assert free[-1] - free[0] == pytest.approx(speed * offsets[-1], abs=1)
    assert (frames_at(start, offsets, frames=10_000) == start + offsets).all()


# ---- sampling -------------------------------------------------------------------------------------------------------
def spanned(count: int, spans: list[tuple[int, int, int]], video: str = "v") -> LabelledVideo:
    """A video with labels by (first start, after, class), for clips of 8 frames."""
    labels, actions = np.zeros(count - 7, np.int64), np.full(count - 7, -1)
    for number, (first, after, label) in enumerate(spans):
        labels[first:after], actions[first:after] = label, number
    return LabelledVideo(video, Path(video), count, 10.0, labels, actions)


def sampler_of(videos: list[LabelledVideo], **options: object) -> ClipSampler:
    given = {"classes": 4, "offsets": np.arange(8), "batch": 50, "background": 0.4, "seed": 1}
    return ClipSampler(videos, **{**given, **options})  # type: ignore[arg-type]


def test_clips_are_drawn_in_their_shares() -> None:
    video = spanned(200, [(10, 100, 1), (110, 112, 1), (120, 150, 2)])
    clips = [clip for step in range(60) for clip in sampler_of([video]).step(step)]  # 3000
    firsts = np.array([clip.frames[0] for clip in clips])
    assert all((clip.frames == clip.frames[0] + np.arange(8)).all() for clip in clips)
    assert all(video.labels[clip.frames[0]] == clip.label for clip in clips)
    assert not any(clip.flipped or clip.place for clip in clips)
    share = {k: sum(clip.label == k for clip in clips) / 3000 for k in (0, 1, 2)}
    assert share == pytest.approx({0: 0.4, 1: 0.3, 2: 0.3}, abs=0.04)
    # the second action has half of its class, though it is 45 times as short
    assert ((firsts >= 110) & (firsts < 112)).mean() == pytest.approx(0.15, abs=0.03)
    calm = np.array([clip.frames[0] for clip in clips if clip.label == 0])
    assert set(calm[calm >= 150].tolist()) == set(range(150, 193))
    assert (calm >= 150).mean() == pytest.approx(43 / 71, abs=0.06)  # background is uniform over time


def same(one: Clip, two: Clip) -> bool:
    return bool((one.frames == two.frames).all()) and replace(one, frames=two.frames) == two


def test_a_step_draws_the_same_whenever_it_is_asked_and_steps_differ() -> None:
    one, two = (sampler_of([spanned(90, [(10, 60, 1)])], jitter=0.3, random_crop=True) for _ in range(2))
    later = one.step(7)
    [two.step(k) for k in range(7)]
    assert all(same(a, b) for a, b in zip(later, two.step(7), strict=True))
    assert not all(same(a, b) for a, b in zip(one.step(0), one.step(1), strict=True))
    assert len({clip.place for clip in later}) == 50
    assert len({int(clip.frames[-1] - clip.frames[0]) for clip in later}) > 2


def test_flipped_clips_have_the_mirrored_label() -> None:
    mirror = mirror_index(["left", "right", "text", "up"], {"left": "right", "right": "left", "text": None})
    assert mirror is not None
    assert mirror.tolist() == [0, 2, 1, FIXED, 4]
    video = spanned(200, [(10, 40, 1), (50, 80, 2), (90, 120, 3), (130, 160, 4)])
    clips = [clip for step in range(20) for clip in sampler_of([video], background=0.3, mirror=mirror).step(step)]
    shown = [int(video.labels[clip.frames[0]]) for clip in clips]
    for clip, label in zip(clips, shown, strict=True):
        assert clip.label == (mirror if clip.flipped else np.arange(5))[label]
    assert not any(clip.flipped for clip, label in zip(clips, shown, strict=True) if label == 3)
    free = [clip.flipped for clip, label in zip(clips, shown, strict=True) if label != 3]
    assert np.mean(free) == pytest.approx(0.5, abs=0.06)


def test_an_epoch_has_about_a_clip_an_action() -> None:
    videos = [spanned(200, [(10, 100, 1), (110, 112, 1), (120, 150, 2)])] * 40  # 120 actions
    assert sampler_of(videos, batch=10, background=0.4).natural_steps == 20
    assert sampler_of(videos[:1], batch=10, background=0.4).natural_steps == 1


def test_nothing_to_tell_apart() -> None:
    for spans, message in (([], "inside an action"), ([(0, 93, 1)], "outside of all actions")):
        with pytest.raises(RecipeError, match=message):
            sampler_of([spanned(100, spans)])


@pytest.mark.parametrize(
    ("mirror", "message"),
    [
        ({"left": "right"}, "does not become 'left'"),
        ({"left": "rigth", "rigth": "left"}, "Did you mean 'right'"),
        ({"lefd": None}, "Did you mean 'left'"),
        ({"left": "right", "right": None}, "does not become 'left'"),
    ],
)
def test_a_mirror_that_cannot_be_meant_is_refused(mirror: dict[str, str | None], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        mirror_index(["left", "right"], mirror)


# ---- the order of an epoch ------------------------------------------------------------------------------------------
def drawn(seed: int, count: int, videos: int) -> list[Clip]:
    rng = np.random.default_rng(seed)
    return [Clip(int(rng.integers(videos)), int(rng.integers(90)) + np.arange(8), k) for k in range(count)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(0, 60), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 70)), st.data())
def test_a_plan_visits_each_video_once_and_never_holds_more_than_its_pool(
    seed: int, count: int, videos: int, pool: int | None, data: st.DataObject
) -> None:
    clips = drawn(seed, count, videos)
    plan = shuffled(clips, pool=pool, rng=np.random.default_rng(seed))
    assert sorted(clip.label for clip in plan.clips) == list(range(count))
    if pool is None or pool >= count:
        assert [clip.label for clip in plan.clips] == list(range(count))  # the order in which they were drawn
    visited = [{plan.clips[k].video for k in visit} for visit in plan.visits]
    assert all(len(some) == 1 for some in visited)
    assert len(set().union(*visited)) == len(visited)
    for visit in plan.visits:
        lasts = [int(plan.clips[k].frames[-1]) for k in visit]
        assert lasts == sorted(lasts)
    kept = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    for some in (plan, plan.part([k for k in range(count) if kept[k]])):  # a process's part, or what a stop left over
        arrivals = [k for visit in some.visits for k in visit]
        assert sorted(arrivals) == list(range(len(some.clips)))
        for wanted in range(len(some.clips)):  # when it is wanted, what has been decoded by then fits into the pool
            assert arrivals.index(wanted) + 1 - wanted <= max(1, some.pool)
    assert [same(a, b) for a, b in zip(plan.part(list(range(count))).clips, plan.clips, strict=True)] == [True] * count


def test_a_pool_shuffles() -> None:
    clips = [Clip(k // 20, np.arange(8) + k % 20, k) for k in range(400)]
    plan = shuffled(clips, pool=100, rng=np.random.default_rng(0))
    batches = [{clip.video for clip in plan.clips[k : k + 20]} for k in range(0, 400, 20)]
    assert np.mean([len(videos) for videos in batches]) > 6  # videos in a batch of 20; without a pool it is 1


# ---- cutting --------------------------------------------------------------------------------------------------------
def test_flow_is_flipped_with_its_sign() -> None:
    clip = np.array([[[[128, 10], [0, 20], [255, 30], [200, 40]]]], np.uint8)  # (1, 1, 4, 2)
    assert flip(clip).tolist() == [[[[56, 40], [1, 30], [255, 20], [128, 10]]]]
    assert flip(clip[..., :1]).tolist() == [[[[200], [255], [0], [128]]]]


def test_a_crop_lies_where_it_was_drawn_in_all_frames() -> None:
    frames = np.arange(2 * 6 * 9, dtype=np.uint8).reshape(2, 6, 9, 1)
    plan = Plan((6, 9), 1, 2, 4, 5)
    clip = Clip(0, np.arange(2), 0)
    assert (cut(frames, clip, plan) == frames[:, 1:5, 2:7]).all()
    assert (cut(frames, clip, None) == frames).all()
    for place, (top, left) in {
        (0.0, 0.0): (0, 0),
        (0.999, 0.999): (2, 4),
        (1.0, 0.5): (2, 2),
        (0.4, 0.79): (1, 3),
    }.items():
        expected = frames[:, top : top + 4, left : left + 5]
        assert (cut(frames, replace(clip, place=place), plan) == expected).all()
        assert (cut(frames, replace(clip, place=place, flipped=True), plan) == expected[:, :, ::-1]).all()
    ends = {int(cut(frames, replace(clip, place=(p, p)), plan)[0, 0, 0, 0]) for p in np.linspace(0, 1, 200)}
    assert {0, 22} <= ends <= {9 * top + left for top in range(3) for left in range(5)}  # corner to corner


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[VideoFile]:
    root = tmp_path_factory.mktemp("videos")
    for number, seconds in enumerate((3.0, 5.2, 0.6, 4.0)):  # the third is shorter than a clip
        make_video(root / f"v{number}.mp4", duration_s=seconds, seed=number, size=(48, 64), fps=10.0)
    return find_videos([root])


FORMS = {
    "rgb": ClipFormat(SnippetPlan(8, 2, 4), None, Geometry(40, (32, 32)), None),
    "resampled": ClipFormat(SnippetPlan(8, 1, 4), 14.0, Geometry(40, (32, 40)), None),
    "exact": ClipFormat(SnippetPlan(8, 1, 4), 7.0, Geometry(40, (24, 32), (24, 40)), None),
    "flow": ClipFormat(SnippetPlan(4, 1, 4), None, Geometry(32, (24, 32)), "farneback"),
}


def opened(files: list[VideoFile], form: ClipFormat) -> tuple[list[LabelledVideo], dict[int, np.ndarray]]:
    videos, frames = [], {}
    for number, file in enumerate(files):
        array, fps = read_frames(file.path, form, max_bytes=1e9, whole=True)
        assert array is not None
        frames[number] = array
        table = segments((1.0, 2.5, "a"))
        videos.append(
            labelled(file.video, file.path, table, ["a"], frames=len(array), fps=fps, span=form.snippets.span)
        )
    return videos, frames


@pytest.mark.parametrize("name", FORMS)
def test_frames_are_counted_as_they_are_read(files: list[VideoFile], name: str) -> None:
    form = FORMS[name]
    videos, _ = opened(files, form)
    for file, video in zip(files, videos, strict=True):
        assert count_frames(file.path, fps=form.fps) == (video.frames, video.fps)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("workers", "pool"), [(1, 16), (3, 1), (2, 40), (4, None)])
def test_streamed_clips_are_those_from_memory(
    files: list[VideoFile], name: str, workers: int, pool: int | None
) -> None:
    form = FORMS[name]
    videos, frames = opened(files, form)
    mirror = mirror_index(["a"], {})
    sampler = ClipSampler(
        videos, classes=1, offsets=form.offsets(), batch=12, background=0.5, mirror=mirror, jitter=0.4,
        random_crop=True, seed=5,
    )  # fmt: skip
    epochs = [[clip for k in range(3) for clip in sampler.step(3 * e + k)] for e in range(3)]
    plans = [shuffled(clips, pool=pool, rng=np.random.default_rng(e)) for e, clips in enumerate(epochs)]
    plans[1] = plans[1].part(list(range(7, 36, 3)))
    expected = list(MemoryReader(frames, form.geometry, whole=True).read(plans))
    found = list(StreamReader(videos, form, workers=workers).read(iter(plans)))
    assert len(found) == len(expected) == 36 + 10 + 36
    assert all(a is not None and b is not None and (a == b).all() for a, b in zip(expected, found, strict=True))
    height, width = form.geometry.crop or (0, 0)
    assert {array.shape for array in found if array is not None} == {
        (form.snippets.window, height, width, form.channels)
    }
    assert form.clip_bytes == found[0].nbytes  # type: ignore[union-attr]


def test_centre_crops_are_those_of_frames_cropped_before(files: list[VideoFile]) -> None:
    form = FORMS["resampled"]
    videos, _ = opened(files, form)
    cropped = {k: read_frames(v.path, form, max_bytes=1e9)[0] for k, v in enumerate(videos)}
    clips = [
        Clip(k, frames_at(start, form.offsets(), frames=v.frames), 0)
        for k, v in enumerate(videos)
        for start in range(0, len(v.labels), 6)
    ]
    expected = MemoryReader(cropped, form.geometry, whole=False).read([in_sequence(clips)])  # type: ignore[arg-type]
    found = StreamReader(videos, form, workers=2).read([in_sequence(clips)])
    assert all((a == b).all() for a, b in zip(expected, found, strict=True))  # type: ignore[union-attr]


def test_no_more_clips_wait_than_the_pool_allows(files: list[VideoFile], monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMS["rgb"]
    videos, _ = opened(files[:2], form)
    sampler = ClipSampler(videos, classes=1, offsets=form.offsets(), batch=60, background=0.5, seed=5)
    plan = shuffled(sampler.step(0), pool=10, rng=np.random.default_rng(0))
    made: list[int] = []

    def counted(*args: object, **options: object) -> object:
        for clip in cut_clips(*args, **options):  # type: ignore[arg-type]
            made.append(1)
            yield clip

    monkeypatch.setattr("tad.extract.clip_reading.cut_clips", counted)
    clips = StreamReader(videos, form, workers=2).read([plan])
    for taken in range(1, 61):
        next(clips)
        time.sleep(0.002)
        assert len(made) <= taken + 10 + AHEAD_CLIPS + 2  # and one in the hands of each thread
    clips.close()


def test_a_reader_that_is_left_ends_its_threads(files: list[VideoFile]) -> None:
    videos, _ = opened(files, FORMS["rgb"])
    sampler = ClipSampler(videos, classes=1, offsets=FORMS["rgb"].offsets(), batch=60, background=0.5)
    clips = StreamReader(videos, FORMS["rgb"], workers=3).read(
        shuffled(sampler.step(k), pool=4, rng=np.random.default_rng(k)) for k in range(1000)
    )
    next(clips)
    assert any(thread.name.startswith("tad-clips") for thread in threading.enumerate())
    clips.close()
    assert not any(thread.name.startswith("tad-clips") for thread in threading.enumerate())


def test_a_video_that_fails_leaves_gaps_and_the_rest_comes(files: list[VideoFile], tmp_path: Path) -> None:
    form = FORMS["rgb"]
    videos, frames = opened(files, form)
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 50)
    longer = replace(videos[1], frames=videos[1].frames + 40)  # as if it had been cut off since it was counted
    changed = [videos[0], longer, videos[2], replace(videos[3], path=tmp_path / "broken.mp4")]
    clips = [Clip(k % 4, np.arange(8) + k + (40 if k == 21 else 0), k) for k in range(24) if k % 4 != 2]
    plan = shuffled(clips, pool=5, rng=np.random.default_rng(1))
    told: dict[str, str] = {}
    found = StreamReader(changed, form, workers=2, failed=told.__setitem__).read([plan])
    for clip, array in zip(plan.clips, found, strict=True):
        if clip.video == 3 or clip.label == 21:
            assert array is None
        else:
            assert array is not None
            assert (array == cut(frames[clip.video][clip.frames], clip, Plan((40, 53), 4, 10, 32, 32))).all()
    assert set(told) == {"v1", "v3"}
    assert "it changed meanwhile" in told["v1"]


def test_a_mistake_of_ours_is_not_swallowed(files: list[VideoFile]) -> None:
    videos, _ = opened(files, FORMS["rgb"])
    wrong = ClipPlan([Clip(99, np.arange(8), 0)], [[0]], 1)
    with pytest.raises(IndexError):
        list(StreamReader(videos, FORMS["rgb"], workers=2).read([wrong]))


def test_flow_frames_are_those_of_the_flow_stream(files: list[VideoFile]) -> None:
    form = FORMS["flow"]
    frames, fps = read_frames(files[0].path, form, max_bytes=10**9)
    rgb, _ = read_frames(files[0].path, replace(form, flow=None), max_bytes=10**9)
    assert fps == 10.0
    assert frames is not None
    assert rgb is not None
    assert frames.shape == (*rgb.shape[:3], 2)
    assert np.array_equal(frames[-1], frames[-2])  # the last flow is repeated
    assert read_frames(files[0].path, form, max_bytes=frames.nbytes - 1)[0] is None


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "no.mp4").write_bytes(b"no video" * 50)
    for call in (lambda p: count_frames(p, fps=None), lambda p: read_frames(p, FORM, max_bytes=1e9)):
        with pytest.raises(VideoError, match=r"no\.mp4"):
            call(tmp_path / "no.mp4")
