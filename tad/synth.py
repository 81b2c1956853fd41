"""Synthetic untrimmed videos with their truth, for the demo, the tests and the benchmarks.

In every video a few textured objects are in view from the first frame to the last. Most of the time they rest, jitter or
drift; now and then one of them performs an *action*: it circles or spins (clockwise or counter-clockwise), swings,
bounces, opens (grows slowly and snaps back) or closes (the same, backwards). An action starts from the pose in which the
object is and leaves it in the pose which it has reached, and all poses are drawn from the same ranges. So no single frame
tells whether an action is going on, nor which: only motion does, and in three pairs of classes only its order.

The background is textured and moves with a camera that pans, zooms and shakes; the light changes; the sensor is noisy.
Everything follows from one seed a video: the same call gives the same frames, and videos do not depend on each other.
"""

from __future__ import annotations

import json
import math
import os
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np

from tad.errors import AnnotationError, VideoError, did_you_mean

FPS = 12.5
SIZE = (96, 96)
VERSION = 1  # goes up when the same seed gives other videos

LOW, HIGH = math.log(0.6), math.log(1.4)  # log scale of every object, acting or not
EDGE = 0.2  # objects drift about in [EDGE, 1 - EDGE] of the frame
MIRRORED = {  # what an action becomes when the picture is flipped left to right; the others stay what they are
    "circle-clockwise": "circle-counterclockwise",
    "circle-counterclockwise": "circle-clockwise",
    "spin-clockwise": "spin-counterclockwise",
    "spin-counterclockwise": "spin-clockwise",
}


# ---- motion: a pose is (x, y, log scale, angle), x and y in shares of the frame, y downwards, the angle clockwise ----------
def _circle(pose: np.ndarray, t: np.ndarray, rng: np.random.Generator, *, turn: float) -> np.ndarray:
    radius, omega = rng.uniform(0.12, 0.17), turn * 2 * math.pi / rng.uniform(1.1, 1.8)
    inward = math.atan2(0.5 - pose[1], 0.5 - pose[0]) + rng.uniform(
        -1.0, 1.0
    )  # the centre lies towards the middle of the frame
    around = inward + math.pi + omega * t
    poses = np.repeat(pose[None], len(t), axis=0)
    poses[:, 0] += radius * (math.cos(inward) + np.cos(around))
    poses[:, 1] += radius * (math.sin(inward) + np.sin(around))
    return poses


def _spin(pose: np.ndarray, t: np.ndarray, rng: np.random.Generator, *, turn: float) -> np.ndarray:
    poses = np.repeat(pose[None], len(t), axis=0)
    poses[:, 3] += turn * 2 * math.pi / rng.uniform(1.4, 2.4) * t
    return poses


def _swing(pose: np.ndarray, t: np.ndarray, rng: np.random.Generator, *, axis: int) -> np.ndarray:
    reach, phase = rng.uniform(0.2, 0.3), t / rng.uniform(0.8, 1.4)
    poses = np.repeat(pose[None], len(t), axis=0)
    away = 1.0 if pose[axis] < 0.5 else -1.0
    poses[:, axis] += away * reach * (1 - np.abs(1 - 2 * (phase % 1.0)))  # a triangle wave: constant speed, to and fro
    return poses


def _unfold(pose: np.ndarray, t: np.ndarray, rng: np.random.Generator, *, sign: float) -> np.ndarray:
    share = (pose[2] - LOW) / (HIGH - LOW)
    poses = np.repeat(pose[None], len(t), axis=0)
    poses[:, 2] = LOW + (HIGH - LOW) * ((share + sign * t / rng.uniform(0.7, 1.3)) % 1.0)  # a saw-tooth
    return poses


Motion = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
ACTIONS: dict[str, Motion] = {
    "bounce": lambda pose, t, rng: _swing(pose, t, rng, axis=1),
    "circle-clockwise": lambda pose, t, rng: _circle(pose, t, rng, turn=1.0),
    "circle-counterclockwise": lambda pose, t, rng: _circle(pose, t, rng, turn=-1.0),
    "close": lambda pose, t, rng: _unfold(pose, t, rng, sign=-1.0),
    "open": lambda pose, t, rng: _unfold(pose, t, rng, sign=1.0),
    "spin-clockwise": lambda pose, t, rng: _spin(pose, t, rng, turn=1.0),
    "spin-counterclockwise": lambda pose, t, rng: _spin(pose, t, rng, turn=-1.0),
    "swing": lambda pose, t, rng: _swing(pose, t, rng, axis=0),
}
CLASSES = tuple(ACTIONS)


def _rest(pose: np.ndarray, t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.repeat(pose[None], len(t), axis=0)


def _jitter(pose: np.ndarray, t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    poses = pose + rng.standard_normal((len(t), 4)) * np.array([0.02, 0.02, 0.05, 0.12]) * rng.uniform(0.4, 1.0)
    poses[-1] = pose  # jitter does not add up over a long video
    return poses


def _drift(pose: np.ndarray, t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    way = rng.uniform(EDGE, 1 - EDGE, 2) - pose[:2]
    speed = rng.uniform(0.1, 0.6)
    poses = np.repeat(pose[None], len(t), axis=0)
    poses[:, :2] += way * np.minimum(1.0, t[:, None] * speed / max(1e-6, float(np.hypot(*way))))
    return poses


DISTRACTORS: dict[str, Motion] = {"rest": _rest, "jitter": _jitter, "drift": _drift}


# ---- the plan of a video: everything but the pixels --------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """What happens in a video. ``segments`` are (first frame, frame after the last, label); ``poses`` (objects, frames, 4)
    holds x, y, log scale, angle; ``camera`` (frames, 4) holds x, y, log zoom and the gain of the light."""

    seed: tuple[int, ...]
    frames: int
    fps: float
    size: tuple[int, int]
    segments: tuple[tuple[int, int, str], ...]
    poses: np.ndarray
    camera: np.ndarray

    @property
    def duration_s(self) -> float:
        return self.frames / self.fps

    def segments_s(self) -> list[tuple[float, float, str]]:
        """The actions as (start_s, end_s, label)."""
        return [(first / self.fps, after / self.fps, label) for first, after, label in self.segments]


def plan_video(
    *,
    seed: int | Sequence[int],
    duration_s: float,
    size: tuple[int, int] = SIZE,
    fps: float = FPS,
    classes: Sequence[str] = CLASSES,
    action_s: tuple[float, float] = (1.0, 20.0),
    gap_s: tuple[float, float] = (0.8, 8.0),
    empty: float = 0.08,
) -> Plan:
    """Lay out one video of ``duration_s`` seconds: who acts when, and every pose of every object.

    Durations of actions and of the gaps between them are log-uniform in ``action_s`` and ``gap_s``; a share ``empty`` of the
    videos holds no action. Raises :class:`AnnotationError` for unknown classes or lengths that make no sense.
    """
    _check(duration_s=(duration_s, duration_s), size=size, fps=fps, classes=classes, action_s=action_s, gap_s=gap_s)
    entropy = (seed,) if isinstance(seed, int) else tuple(seed)
    rng = np.random.default_rng(entropy)
    frames = max(1, round(duration_s * fps))
    objects = int(rng.integers(1, 4))
    segments: list[tuple[int, int, str]] = []
    actors: list[int] = []
    at = _log_uniform(rng, gap_s)
    barren = rng.random() < empty
    while not barren:
        length = _log_uniform(rng, action_s)
        first, after = round(at * fps), round((at + length) * fps)
        if after > frames - 1:
            if frames - 1 - first < max(1, round(action_s[0] * fps)):
                break
            after = frames - 1  # the last action ends with the video rather than leaving its end empty
        segments.append((first, max(after, first + 1), str(rng.choice(list(classes)))))
        actors.append(int(rng.integers(objects)))
        at = after / fps + _log_uniform(rng, gap_s)
    poses = np.stack(
        [_poses(rng, frames, fps, [s for s, a in zip(segments, actors, strict=True) if a == k]) for k in range(objects)]
    )
    return Plan(entropy, frames, fps, size, tuple(segments), poses, _camera(rng, frames, fps))


def _poses(rng: np.random.Generator, frames: int, fps: float, acts: list[tuple[int, int, str]]) -> np.ndarray:
    """One object's poses (frames, 4): its own actions, and distractors in between."""
    poses = np.empty((frames, 4))
    pose = np.array([*rng.uniform(EDGE, 1 - EDGE, 2), rng.uniform(LOW, HIGH), rng.uniform(0, 2 * math.pi)])
    at, following = 0, list(acts)
    while at < frames:
        if following and following[0][0] == at:
            _, after, label = following.pop(0)
            motion = ACTIONS[label]
        else:
            limit = following[0][0] if following else frames
            after = min(limit, at + max(1, round(_log_uniform(rng, (0.8, 8.0)) * fps)))
            motion = DISTRACTORS[str(rng.choice(list(DISTRACTORS)))]
        t = np.arange(1, after - at + 1) / fps  # (frames of this stretch,)
        poses[at:after] = motion(pose, t, rng)
        pose, at = poses[after - 1].copy(), after
    return poses


def _camera(rng: np.random.Generator, frames: int, fps: float) -> np.ndarray:
    t = np.arange(frames) / fps
    camera = np.zeros((frames, 4))
    for column, amplitude in ((0, 0.05), (1, 0.05), (2, 0.05), (3, 0.12)):
        for _ in range(2):
            period = rng.uniform(5.0, 25.0)
            camera[:, column] += (
                rng.uniform(0.2, 1.0) * amplitude / 2 * np.sin(2 * math.pi * (t / period + rng.random()))
            )
    camera[:, :2] += rng.standard_normal((frames, 2)) * rng.uniform(0.0, 0.004)  # a shaking hand
    level = np.zeros(frames)
    for _ in range(rng.poisson(frames / fps / 30.0)):  # someone touches the light switch
        level[int(rng.integers(frames)) :] = rng.uniform(-0.15, 0.15)
    camera[:, 3] = 1.0 + camera[:, 3] + level
    return camera


def _log_uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(math.log(bounds[0]), math.log(bounds[1]))))


# ---- pixels ------------------------------------------------------------------------------------------------------------------
def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Coloured clouds over two octaves, (height, width, 3) uint8."""
    cells = [rng.integers(30, 226, (n, n, 3)).astype(np.uint8) for n in (5, 14)]
    coarse, fine = (cv2.resize(c, (width, height), interpolation=cv2.INTER_CUBIC) for c in cells)
    return cv2.addWeighted(coarse, 0.6, fine, 0.4, 0.0)


def _sprite(rng: np.random.Generator, side: int = 64) -> np.ndarray:
    """A textured shape, (side, side, 4) uint8, the last channel its coverage. Two halves differ, so that turning shows."""
    yy, xx = (np.mgrid[0:side, 0:side] + 0.5) / side * 2 - 1
    radius, angle = np.hypot(xx, yy), np.arctan2(yy, xx)
    edge = {
        "disc": np.full_like(radius, 0.85),
        "square": 0.7 / np.maximum(np.abs(np.cos(angle)), np.abs(np.sin(angle))),
        "triangle": 0.5 / np.cos((angle + math.pi / 2) % (2 * math.pi / 3) - math.pi / 3),
        "star": 0.68 + 0.22 * np.cos(5 * angle),
    }[str(rng.choice(["disc", "square", "triangle", "star"]))]
    cover = np.clip((edge - radius) * side / 4 + 0.5, 0, 1)
    one, two = rng.integers(0, 256, (2, 3))
    while np.abs(one - two).sum() < 300:
        one, two = rng.integers(0, 256, (2, 3))
    sectors = np.sin(int(rng.integers(1, 4)) * angle + rng.uniform(0, 6)) > 0  # turning shows
    rings = np.sin(radius * rng.uniform(5, 9) + rng.uniform(0, 6)) > 0  # growing shows
    colour = one + (0.6 * sectors + 0.4 * rings)[..., None] * (two - one)
    return np.dstack([colour, cover * 255]).astype(np.uint8)


def render(plan: Plan) -> Iterator[np.ndarray]:
    """The frames of a plan, one after another, (height, width, 3) uint8 BGR; memory does not grow with the duration."""
    rng = np.random.default_rng((*plan.seed, 1))
    height, width = plan.size
    unit = min(height, width)
    back = _texture(rng, 2 * height, 2 * width)
    sizes = rng.uniform(0.34, 0.42, len(plan.poses)) * unit  # pixels across at scale 1
    sprites = [cv2.resize(_sprite(rng), (math.ceil(1.2 * s),) * 2, interpolation=cv2.INTER_AREA) for s in sizes]
    noise = np.clip(128 + rng.normal(0, rng.uniform(2.0, 6.0), (height + 64, width + 64, 3)), 0, 255).astype(np.uint8)
    shifts = rng.integers(0, 64, (plan.frames, 2))
    for k in range(plan.frames):
        dx, dy, log_zoom, gain = plan.camera[k]
        zoom = math.exp(log_zoom)
        matrix = np.array(
            [
                [1 / zoom, 0, width - width / 2 / zoom + dx * width],
                [0, 1 / zoom, height - height / 2 / zoom + dy * height],
            ]
        )  # frame → background pixels, the middle onto the middle
        frame = cv2.warpAffine(
            back,
            matrix,
            (width, height),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        for sprite, across, track in zip(sprites, sizes, plan.poses, strict=True):
            x, y, log_scale, angle = track[k]
            center = ((x - 0.5 - dx) * zoom + 0.5) * width, ((y - 0.5 - dy) * zoom + 0.5) * height
            _paint(frame, sprite, center, across * math.exp(log_scale) * zoom, angle)
        top, left = shifts[k]
        yield cv2.addWeighted(frame, gain, noise[top : top + height, left : left + width], 1.0, -128.0)


def _paint(frame: np.ndarray, sprite: np.ndarray, center: tuple[float, float], across: float, angle: float) -> None:
    """Lay ``sprite``, ``across`` pixels wide and turned clockwise by ``angle``, over ``frame`` with its middle at ``center``."""
    height, width = frame.shape[:2]
    reach = 0.75 * across + 1
    left, right = max(0, math.floor(center[0] - reach)), min(width, math.ceil(center[0] + reach))
    top, bottom = max(0, math.floor(center[1] - reach)), min(height, math.ceil(center[1] + reach))
    if left >= right or top >= bottom:
        return
    side = sprite.shape[0]
    cos, sin, step = math.cos(angle), math.sin(angle), side / across
    fx, fy = left + 0.5 - center[0], top + 0.5 - center[1]
    matrix = np.array(
        [
            [step * cos, step * sin, step * (cos * fx + sin * fy) + side / 2 - 0.5],
            [-step * sin, step * cos, step * (-sin * fx + cos * fy) + side / 2 - 0.5],
        ]
    )  # patch → sprite pixels
    patch = cv2.warpAffine(sprite, matrix, (right - left, bottom - top), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    under = frame[top:bottom, left:right]
    cover = patch[..., 3:].astype(np.uint16)
    under[:] = (patch[..., :3] * cover + under * (255 - cover)) // 255


# ---- files -------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SynthVideo:
    """A video that was written: its file, its length and its actions (start_s, end_s, label)."""

    id: str
    path: Path
    frames: int
    fps: float
    size: tuple[int, int]
    segments_s: tuple[tuple[float, float, str], ...]

    @property
    def duration_s(self) -> float:
        return self.frames / self.fps


def make_video(
    path: str | Path,
    *,
    duration_s: float,
    seed: int | Sequence[int] = 0,
    size: tuple[int, int] = SIZE,
    fps: float = FPS,
    classes: Sequence[str] = CLASSES,
    action_s: tuple[float, float] = (1.0, 20.0),
) -> SynthVideo:
    """Write one synthetic video (``.mp4``, codec mp4v) and say what is in it; frames go straight to the file.

    Raises :class:`AnnotationError` for values that make no sense and :class:`VideoError` when OpenCV cannot write the file.
    """
    path = Path(path)
    plan = plan_video(seed=seed, duration_s=duration_s, size=size, fps=fps, classes=classes, action_s=action_s)
    _write(plan, path)
    return SynthVideo(path.stem, path, plan.frames, fps, size, tuple(plan.segments_s()))


def make_videos(
    out: str | Path,
    *,
    videos: int,
    seed: int = 0,
    subset: str = "training",
    classes: Sequence[str] = CLASSES,
    duration_s: tuple[float, float] = (30.0, 60.0),
    size: tuple[int, int] = SIZE,
    fps: float = FPS,
    action_s: tuple[float, float] = (1.0, 20.0),
    workers: int = 1,
) -> list[SynthVideo]:
    """Write ``out/videos/<subset>-<number>.mp4`` and add them to ``out/annotations.json`` (ActivityNet layout).

    Every video has its own seed, made of ``seed``, the subset's name and its number; so subsets differ though their seed is
    the same, and asking for more videos leaves the first ones as they are. Durations are uniform in ``duration_s``. Other
    subsets in the annotations stay; this one is replaced. A video that is already there from the same call is kept.

    Raises :class:`AnnotationError` for values that make no sense or annotations that cannot be added to, and
    :class:`VideoError` when OpenCV cannot write a file.
    """
    if videos < 1:
        raise AnnotationError(f"videos must be at least 1, got {videos}")
    if workers < 1:
        raise AnnotationError(f"workers must be at least 1, got {workers}")
    _check(duration_s=duration_s, size=size, fps=fps, classes=classes, action_s=action_s, gap_s=(1.0, 1.0))
    out = Path(out)
    folder = out / "videos"
    folder.mkdir(parents=True, exist_ok=True)
    annotations = out / "annotations.json"
    database = _database(annotations)
    made: list[SynthVideo] = []
    todo: list[tuple[Plan, Path]] = []
    entries: dict[str, dict[str, Any]] = {}
    for number in range(videos):
        key = (seed, zlib.crc32(subset.encode()), number)
        length_s = float(np.random.default_rng((*key, 2)).uniform(*duration_s))
        plan = plan_video(seed=key, duration_s=length_s, size=size, fps=fps, classes=classes, action_s=action_s)
        video = f"{subset}-{number:03d}"
        path = folder / f"{quote(video, safe=' ')}.mp4"
        made.append(SynthVideo(video, path, plan.frames, fps, size, tuple(plan.segments_s())))
        entries[video] = _entry(plan, subset)
        if database.get(video) != entries[video]:
            path.unlink(missing_ok=True)  # of another call: it must not be taken for this one's, whatever happens next
        if not path.exists():
            todo.append((plan, path))
    others = {name: entry for name, entry in database.items() if entry.get("subset") != subset and name not in entries}
    _write_json(annotations, {"version": "tad.synth", "database": others | entries})
    with ThreadPoolExecutor(workers) as pool:  # OpenCV and NumPy let go of the interpreter while they compute
        for _ in pool.map(lambda job: _write(*job), todo):
            pass
    return made


def _entry(plan: Plan, subset: str) -> dict[str, Any]:
    height, width = plan.size
    return {
        "subset": subset,
        "duration": plan.duration_s,
        "fps": plan.fps,
        "resolution": f"{width}x{height}",
        "annotations": [{"segment": [start, end], "label": label} for start, end, label in plan.segments_s()],
        "synth": {"version": VERSION, "seed": list(plan.seed), "frames": plan.frames},
    }


def _database(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        database = json.loads(path.read_text(encoding="utf-8"))["database"]
    except (ValueError, KeyError, TypeError) as error:
        raise AnnotationError(
            f"{path}: no ActivityNet annotations to add to ({error!r}); move the file away"
        ) from error
    if not isinstance(database, dict) or not all(isinstance(entry, dict) for entry in database.values()):
        raise AnnotationError(f"{path}: no ActivityNet annotations to add to; move the file away")
    return database


def _write_json(path: Path, data: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    partial.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _write(plan: Plan, path: Path) -> None:
    """Encode a plan; the file takes its name only when it is whole."""
    partial = path.with_name(f".{uuid.uuid4().hex}.mp4")
    height, width = plan.size
    writer = cv2.VideoWriter(str(partial), cv2.VideoWriter.fourcc(*"mp4v"), plan.fps, (width, height))
    try:
        if not writer.isOpened():
            raise VideoError(f"{path}: OpenCV cannot write mp4v video of {width}x{height} at {plan.fps:g} fps here")
        for frame in render(plan):
            writer.write(frame)
        writer.release()
        os.replace(partial, path)
    finally:
        writer.release()
        partial.unlink(missing_ok=True)


def _check(
    *,
    duration_s: tuple[float, float],
    size: tuple[int, int],
    fps: float,
    classes: Sequence[str],
    action_s: tuple[float, float],
    gap_s: tuple[float, float],
) -> None:
    if not classes:
        raise AnnotationError("classes is empty: name at least one of " + ", ".join(CLASSES))
    for label in classes:
        if label not in ACTIONS:
            raise AnnotationError(f"unknown synthetic class '{label}'.{did_you_mean(label, CLASSES)}")
    if not (math.isfinite(fps) and fps > 0):
        raise AnnotationError(f"fps must be positive, got {fps}")
    if min(size) < 32 or size[0] % 2 or size[1] % 2:
        raise AnnotationError(f"size is (height, width), even and at least 32, got {size}")
    for name, (low, high) in (("duration_s", duration_s), ("action_s", action_s), ("gap_s", gap_s)):
        if not (0 < low <= high < math.inf):
            raise AnnotationError(f"{name} must be 0 < shortest <= longest, got ({low}, {high})")
