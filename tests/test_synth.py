"""Synthetic videos: the files hold what the plan says, single frames tell nothing, motion does."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from tad.annotations import read_truth
from tad.errors import AnnotationError, TadError, VideoError
from tad.synth import ACTIONS, CLASSES, DISTRACTORS, MIRRORED, Plan, make_video, make_videos, plan_video, render
from tad.synth import files as synth_files
from tad.synth.plan import HIGH, LOW
from tad.synth.render import _paint


def decoded(path: Path) -> np.ndarray:
    """All frames as OpenCV reads them, (n, H, W, 3) BGR."""
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(read[1])
    capture.release()
    return np.stack(frames)


# ---- motion -------------------------------------------------------------------------------------------------------
START = np.array([0.35, 0.6, 0.0, 1.0])
T = np.arange(1, 151) / 12.5


def motion(label: str, seed: int = 0, start: np.ndarray = START) -> np.ndarray:
    """Poses (151, 4), the first being the pose that the object has before."""
    return np.vstack([start, ACTIONS[label](start, T, np.random.default_rng(seed))])


def signed_area(poses: np.ndarray) -> float:
    """Of the path of (x, y), positive when it runs clockwise on the screen, where y points down."""
    x, y = poses[:, 0] - poses[:, 0].mean(), poses[:, 1] - poses[:, 1].mean()
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())


@pytest.mark.parametrize("seed", range(5))
def test_actions_move_as_they_are_called(seed: int) -> None:
    assert signed_area(motion("circle-clockwise", seed)) > 0 > signed_area(motion("circle-counterclockwise", seed))
    assert (np.diff(motion("spin-clockwise", seed)[:, 3]) > 0).all()
    assert (np.diff(motion("spin-counterclockwise", seed)[:, 3]) < 0).all()
    for label, column in (("swing", 0), ("bounce", 1)):
        steps = np.diff(motion(label, seed), axis=0)
        assert np.count_nonzero(np.delete(steps, column, axis=1)) == 0
        assert (steps[:, column] > 0).mean() == pytest.approx(0.5, abs=0.1)
    growth, shrinkage = np.diff(motion("open", seed)[:, 2]), np.diff(motion("close", seed)[:, 2])
    assert (growth > 0).mean() > 0.85
    assert (shrinkage < 0).mean() > 0.85
    assert growth.min() < -0.7 * (HIGH - LOW)  # it snaps back


@pytest.mark.parametrize("label", CLASSES)
@pytest.mark.parametrize("seed", range(4))
def test_an_action_goes_on_from_where_the_object_is_and_stays_in_range(label: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    start = np.array([*rng.uniform(0.2, 0.8, 2), rng.uniform(LOW, HIGH), rng.uniform(0, 6)])
    poses = motion(label, seed, start)
    steps = np.abs(np.diff(poses, axis=0))
    others = [0, 1, 3] if label in ("open", "close") else [0, 1, 2, 3]  # these snap, perhaps at once
    assert (steps[0, others] <= steps[:, others].max(0) + 1e-9).all()
    assert steps[:, :2].max() < 0.08
    assert steps[:, 3].max() < 0.4
    assert (poses[:, :2] > 0.02).all()
    assert (poses[:, :2] < 0.98).all()
    assert (poses[:, 2] >= LOW - 1e-9).all()
    assert (poses[:, 2] <= HIGH + 1e-9).all()


def test_flipped_pictures_show_the_mirrored_action() -> None:
    for label in CLASSES:
        poses = motion(label)
        poses[:, 0], poses[:, 3] = 1 - poses[:, 0], -poses[:, 3]
        other = motion(MIRRORED.get(label, label))
        area, turn = signed_area(poses), np.diff(poses[:, 3]).sum()
        assert np.sign(np.round(area, 6)) == np.sign(np.round(signed_area(other), 6))
        assert np.sign(np.round(turn, 6)) == np.sign(np.round(np.diff(other[:, 3]).sum(), 6))
    assert all(MIRRORED[MIRRORED[label]] == label for label in MIRRORED)


def test_an_object_is_painted_where_and_as_it_should() -> None:
    sprite = np.zeros((20, 20, 4), np.uint8)
    sprite[..., 3] = 255
    sprite[:, 10:, 0] = 200  # the right half is blue
    for degrees, (rows, columns) in {0: (slice(20, 40), slice(32, 38)), 90: (slice(32, 38), slice(20, 40))}.items():
        frame = np.full((60, 60, 3), 90, np.uint8)
        _paint(frame, sprite, (30.0, 30.0), 20.0, np.deg2rad(degrees))  # clockwise: the right half comes to lie below
        inner = frame[rows, columns, 0]
        assert (inner[2:-2, 1:-1] if degrees == 0 else inner[1:-1, 2:-2]).min() >= 198
        assert frame[5, 5].tolist() == [90, 90, 90]
        assert (frame[22:28, 22:28] == 0).all()
    frame = np.full((60, 60, 3), 90, np.uint8)
    _paint(frame, sprite, (45.0, 15.0), 10.0, 0.0)  # x to the right, y downwards, half as large
    painted = np.argwhere((frame != 90).any(-1))
    assert painted.min(0) == pytest.approx([10, 40], abs=1)
    assert painted.max(0) == pytest.approx([19, 49], abs=1)
    _paint(frame, sprite, (-200.0, 15.0), 10.0, 0.0)  # out of sight


# ---- plans --------------------------------------------------------------------------------------------------------
def plans(count: int, **options: object) -> list[Plan]:
    return [plan_video(seed=(7, number), duration_s=60.0, **options) for number in range(count)]  # type: ignore[arg-type]


def test_actions_are_varied_and_do_not_touch() -> None:
    some = plans(200)
    lengths = [end - start for plan in some for start, end, _ in plan.segments_s()]
    assert min(lengths) < 1.2
    assert max(lengths) > 15
    assert np.mean(np.array(lengths) < np.sqrt(20.0)) == pytest.approx(0.5, abs=0.1)  # log-uniform from 1 to 20 s
    assert {label for plan in some for _, _, label in plan.segments} == set(CLASSES)
    assert 0.02 < np.mean([not plan.segments for plan in some]) < 0.2
    assert max(len(plan.segments) for plan in some) >= 8
    for plan in some:
        edges = [0, *(edge for first, after, _ in plan.segments for edge in (first, after)), plan.frames]
        assert edges == sorted(edges)
        gaps = [b - a for (_, a, _), (b, _, _) in pairwise(plan.segments)]
        assert all(gap >= 0.8 * plan.fps - 1 for gap in gaps)


def test_one_object_acts_and_only_in_actions() -> None:
    """Where the plan says open, one object grows at a constant rate; elsewhere none does."""

    def growing(sizes: np.ndarray) -> int:
        """How many objects grow by the same amount in most frames, of log scales (objects, frames)."""
        steps = np.diff(sizes, axis=1)
        middle = np.median(steps, axis=1, keepdims=True)
        return int(((np.abs(steps - middle) < 1e-9).mean(1) > 0.6)[middle[:, 0] > 0.01].sum())

    for plan in plans(40, classes=("open",)):
        at = 0
        for first, after, _ in plan.segments:
            assert growing(plan.poses[:, at:first, 2]) == 0
            assert growing(plan.poses[:, first:after, 2]) == 1
            at = after


def test_a_video_depends_on_its_own_seed_alone() -> None:
    one, same, other = (plan_video(seed=seed, duration_s=20.0) for seed in (3, 3, 4))
    assert one.segments == same.segments
    assert np.array_equal(one.poses, same.poses)
    assert all(np.array_equal(a, b) for a, b in zip(render(one), render(same), strict=True))
    assert one.segments != other.segments
    assert not np.array_equal(next(render(one)), next(render(other)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ("swimg",)}, "Did you mean 'swing'"),
        ({"classes": ()}, "classes is empty"),
        ({"seed": -1}, "not negative"),
        ({"fps": 0.0}, "fps"),
        ({"size": (63, 64)}, "size"),
        ({"size": (16, 64)}, "size"),
        ({"duration_s": 0.0}, "duration_s"),
        ({"duration_s": float("nan")}, "duration_s"),
        ({"action_s": (5.0, 2.0)}, "action_s"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        plan_video(**{"seed": 0, "duration_s": 5.0, **options})  # type: ignore[arg-type]


# ---- single frames tell nothing, motion does ------------------------------------------------------------------------
def frame_features(frame: np.ndarray) -> np.ndarray:
    """Means, deviations and histograms of the colours, overall and of the middle."""
    parts = []
    for area in (frame, frame[16:48, 16:48]):
        pixels = area.reshape(-1, 3) / 255.0
        histogram = [np.histogram(pixels[:, c], 8, (0, 1))[0] / len(pixels) for c in range(3)]
        parts += [pixels.mean(0), pixels.std(0), *histogram]
    edges = np.abs(cv2.Laplacian(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), cv2.CV_32F))
    return np.concatenate([*parts, [edges.mean() / 255, edges.std() / 255]])


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """How often a positive one scores higher than a negative one."""
    order = np.argsort(np.argsort(scores))
    count = positive.sum()
    return float((order[positive].sum() - count * (count - 1) / 2) / (count * (~positive).sum()))


def linear_auc(features: np.ndarray, positive: np.ndarray, group: np.ndarray) -> float:
    """Of a ridge classifier, fitted on the odd groups and asked about the even ones."""
    fit, ask = group % 2 == 1, group % 2 == 0
    mean, scale = features[fit].mean(0), features[fit].std(0) + 1e-6
    x = np.hstack([(features - mean) / scale, np.ones((len(features), 1))])
    weights = np.linalg.solve(x[fit].T @ x[fit] + 30 * np.eye(x.shape[1]), x[fit].T @ (2.0 * positive[fit] - 1))
    return auc(x[ask] @ weights, positive[ask])


def test_a_frame_of_an_action_looks_like_any_other_and_movement_does_not() -> None:
    """Actions move on from frame to frame: pictures differ more over three frames than over one, unlike in jitter."""
    features, progress, acting, group = [], [], [], []
    for number in range(80):
        plan = plan_video(seed=(11, number), duration_s=16.0, size=(64, 64), empty=0.0)
        inside = np.zeros(plan.frames, bool)
        for first, after, _ in plan.segments:
            inside[first:after] = True
        frames = list(render(plan))
        gray = np.stack([cv2.GaussianBlur(cv2.cvtColor(f, cv2.COLOR_BGR2GRAY), (5, 5), 0) for f in frames]).astype(
            float
        )
        gray -= gray.mean((1, 2), keepdims=True)
        one, three = (np.abs(gray[lag:] - gray[:-lag]).mean((1, 2)) for lag in (1, 3))
        for k in range(8, plan.frames - 10, 16):
            features.append(frame_features(frames[k]))
            progress.append(np.median(three[k - 8 : k + 9] - one[k - 8 : k + 9]))
            acting.append(inside[k])
            group.append(number)
    positive, groups = np.array(acting), np.array(group)
    assert 0.3 < positive.mean() < 0.8
    assert linear_auc(np.array(features), positive, groups) == pytest.approx(0.5, abs=0.1)
    assert auc(np.array(progress), positive) > 0.75


def test_a_frame_does_not_tell_the_direction_and_optical_flow_does() -> None:
    features, turning, clockwise, group = [], [], [], []
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    for number in range(40):
        label = ("circle-counterclockwise", "circle-clockwise")[number // 2 % 2]
        plan = plan_video(seed=(5, number), duration_s=8.0, size=(96, 96), classes=(label,), action_s=(4, 6), empty=0)
        if not plan.segments:
            continue
        first, after, _ = plan.segments[0]
        frames = [frame for k, frame in enumerate(render(plan)) if first <= k < after]
        grays = [cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in frames]
        mean = []  # of the parts that move most
        for a, b in pairwise(grays):
            field = flow.calc(a, b, None)
            fast = np.hypot(*np.moveaxis(field, -1, 0))
            mean.append(field[fast >= np.quantile(fast, 0.97)].mean(0))
        x, y = np.array(mean).T
        turning.append((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())
        for frame in frames[::8]:
            features.append(frame_features(frame))
            clockwise.append(label == "circle-clockwise")
            group.append(number)
        turning[-1] *= 1 if label == "circle-clockwise" else -1
    assert np.mean(np.array(turning) > 0) > 0.9
    assert linear_auc(np.array(features), np.array(clockwise), np.array(group)) == pytest.approx(0.5, abs=0.15)


# ---- files ----------------------------------------------------------------------------------------------------------
def test_the_file_holds_the_rendered_frames(tmp_path: Path) -> None:
    made = make_video(tmp_path / "deep" / "öne.mp4", duration_s=6.0, seed=9, size=(64, 96), fps=10.0)
    capture = cv2.VideoCapture(str(made.path))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10.0)
    frames, plan = decoded(made.path), plan_video(seed=9, duration_s=6.0, size=(64, 96), fps=10.0)
    assert frames.shape == (60, 64, 96, 3)
    assert (made.id, made.frames, made.duration_s) == ("öne", 60, 6.0)
    assert list(made.segments_s) == plan.segments_s()
    error = np.stack(list(render(plan))).astype(float) - frames
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 25  # decibels: the codec loses little
    assert sorted(path.name for path in made.path.parent.iterdir()) == ["öne.mp4"]
    with pytest.raises(VideoError, match=r"\.mp4"):
        make_video(tmp_path / "one.avi", duration_s=1.0)


def test_annotations_are_activitynets_and_subsets_add_up(tmp_path: Path) -> None:
    few = {"duration_s": (4.0, 6.0), "size": (48, 64), "fps": 8.0, "action_s": (1.0, 3.0)}
    training = make_videos(tmp_path, videos=3, subset="training", seed=1, **few)  # type: ignore[arg-type]
    testing = make_videos(tmp_path, videos=2, subset="testing", seed=1, **few)  # type: ignore[arg-type]
    truth = read_truth(tmp_path / "annotations.json")
    assert sorted(truth.videos["video"]) == sorted(v.id for v in training + testing)
    assert set(truth.subset("testing").videos["video"]) == {"testing-000", "testing-001"}
    for video in training + testing:
        rows = truth.segments[truth.segments["video"] == video.id]
        assert [tuple(row) for row in rows[["start_s", "end_s", "label"]].to_numpy()] == list(video.segments_s)
        assert truth.videos.set_index("video").loc[video.id, "duration_s"] == video.frames / 8.0
        assert len(decoded(video.path)) == video.frames
    assert training[0].segments_s != testing[0].segments_s  # the same seed, another subset


def test_more_videos_leave_the_first_and_another_seed_replaces_them(tmp_path: Path) -> None:
    few = {"duration_s": (3.0, 4.0), "size": (48, 48), "fps": 8.0}
    make_videos(tmp_path, videos=1, subset="validation", **few)  # type: ignore[arg-type]
    first = make_videos(tmp_path, videos=2, **few)  # type: ignore[arg-type]
    stamps = [video.path.stat().st_mtime_ns for video in first]
    more = make_videos(tmp_path, videos=3, **few)  # type: ignore[arg-type]
    assert more[:2] == first
    assert [video.path.stat().st_mtime_ns for video in more[:2]] == stamps
    pixels = decoded(more[0].path)
    other = make_videos(tmp_path, videos=1, seed=5, **few)  # type: ignore[arg-type]
    assert other[0].path == more[0].path
    assert not np.array_equal(pixels[:5], decoded(other[0].path)[:5])
    assert sorted(p.name for p in (tmp_path / "videos").iterdir()) == ["training-000.mp4", "validation-000.mp4"]
    assert sorted(json.loads((tmp_path / "annotations.json").read_text())["database"]) == [
        "training-000",
        "validation-000",
    ]
    again = make_videos(tmp_path, videos=1, **few)  # type: ignore[arg-type]
    assert np.array_equal(pixels, decoded(again[0].path))  # the same call gives the same frames


def test_an_interrupted_video_leaves_nothing_and_is_made_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(plan: Plan) -> object:
        yield from list(render(plan))[:5]
        raise KeyboardInterrupt

    few = {"videos": 2, "duration_s": (3.0, 4.0), "size": (48, 48), "fps": 8.0}
    with monkeypatch.context() as patch:
        patch.setattr(synth_files, "render", broken)
        with pytest.raises(KeyboardInterrupt):
            make_videos(tmp_path, **few)  # type: ignore[arg-type]
    assert list((tmp_path / "videos").iterdir()) == []
    assert all(len(decoded(v.path)) == v.frames for v in make_videos(tmp_path, **few))  # type: ignore[arg-type]


def test_other_peoples_annotations_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "annotations.json").write_text("[1, 2]")
    with pytest.raises(AnnotationError, match="move the file away"):
        make_videos(tmp_path, videos=1)
    assert (tmp_path / "annotations.json").read_text() == "[1, 2]"
    with pytest.raises(AnnotationError, match="subset"):
        make_videos(tmp_path / "b", videos=1, subset="a/b")
    with pytest.raises(TadError, match="videos"):
        make_videos(tmp_path / "b", videos=0)


def test_entries_of_others_stay(tmp_path: Path) -> None:
    entry = {"subset": "training", "duration": 3.0, "annotations": []}
    other = {"taxonomy": [1], "version": "mine", "database": {"hand": entry, "training-007": entry}}
    (tmp_path / "annotations.json").write_text(json.dumps(other))
    make_videos(tmp_path, videos=1, seed=np.int64(3), duration_s=(2.0, 2.0))  # type: ignore[arg-type]
    held = json.loads((tmp_path / "annotations.json").read_text())
    assert (held["taxonomy"], held["version"]) == ([1], "mine")
    assert held["database"]["hand"] == held["database"]["training-007"] == entry
    assert held["database"].keys() == {"hand", "training-007", "training-000"}
    before = (tmp_path / "annotations.json").read_bytes()
    with pytest.raises(AnnotationError, match="'training-007' is no synthetic video"):
        make_videos(tmp_path, videos=8, duration_s=(2.0, 2.0))
    assert (tmp_path / "annotations.json").read_bytes() == before


@pytest.mark.parametrize("seed", range(6))
def test_short_actions_at_a_low_rate_do_not_overlap(seed: int) -> None:
    plan = plan_video(seed=np.int64(seed), fps=0.5, action_s=(0.2, 0.6), duration_s=120)  # type: ignore[arg-type]
    assert plan.seed == (seed,)
    ends = [0, *(after for _, after, _ in plan.segments)]
    assert all(end <= first < after for end, (first, after, _) in zip(ends, plan.segments, strict=False))


def test_rendering_is_fast() -> None:
    plan = plan_video(seed=0, duration_s=60.0)  # 96x96
    begun = time.process_time()
    count = sum(1 for _ in render(plan))
    assert count / (time.process_time() - begun) > 300  # frames a second of one core


def test_distractors_stay_in_range_for_hours() -> None:
    plan = plan_video(seed=1, duration_s=3600.0, action_s=(1.0, 2.0), gap_s=(30.0, 60.0))
    assert set(DISTRACTORS) == {"rest", "jitter", "drift"}
    assert plan.poses[..., :2].min() > 0
    assert plan.poses[..., :2].max() < 1
    assert np.abs(plan.poses[..., 2]).max() < 1
