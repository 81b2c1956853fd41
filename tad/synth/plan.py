"""What happens in a synthetic video: who acts when, and every pose of every object and of the camera."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tad.errors import AnnotationError, did_you_mean

FPS = 12.5
SIZE = (96, 96)

LOW, HIGH = math.log(0.6), math.log(1.4)  # log scale of every object, acting or not
EDGE = 0.2  # objects drift about in [EDGE, 1 - EDGE] of the frame
MIRRORED = {  # what an action becomes when the picture is flipped left to right; the others stay what they are
    "circle-clockwise": "circle-counterclockwise",
    "circle-counterclockwise": "circle-clockwise",
    "spin-clockwise": "spin-counterclockwise",
    "spin-counterclockwise": "spin-clockwise",
}


# ---- motion. A pose is (x, y, log scale, angle): x and y in shares of the frame, y downwards, the angle clockwise. A
# motion is asked for the poses (n, 4) at ``t`` (n,) seconds after the object was last at ``pose`` (4,).
def _circle(pose: np.ndarray, t: np.ndarray, rng: np.random.Generator, *, turn: float) -> np.ndarray:
    radius, omega = rng.uniform(0.12, 0.17), turn * 2 * math.pi / rng.uniform(1.1, 1.8)
    inward = math.atan2(0.5 - pose[1], 0.5 - pose[0]) + rng.uniform(
        -1.0, 1.0
    )  # the circle's centre is nearer the middle
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


# ---- plan -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """What happens in a video.

    Attributes
    ----------
    segments : the actions: first frame, frame after the last, label.
    poses : (objects, frames, 4) x, y, log scale, angle.
    camera : (frames, 4) x, y, log zoom, and the gain of the light.
    """

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

    Durations of actions and of the gaps between them are log-uniform in ``action_s`` and ``gap_s``; a share ``empty``
    of the videos holds no action. Raises :class:`AnnotationError` for unknown classes or values that make no sense.
    """
    lengths = {"duration_s": (duration_s, duration_s), "action_s": action_s, "gap_s": gap_s}
    check_plan(seed=seed, size=size, fps=fps, classes=classes, **lengths)
    entropy = seed_numbers(seed)
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
        after = max(after, first + 1)
        segments.append((first, after, str(rng.choice(list(classes)))))
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


def seed_numbers(seed: int | Sequence[int]) -> tuple[int, ...]:
    """One number or several, of NumPy or not."""
    return tuple(map(int, seed)) if isinstance(seed, Iterable) else (int(seed),)


def check_plan(
    *,
    seed: int | Sequence[int],
    size: tuple[int, int],
    fps: float,
    classes: Sequence[str],
    **lengths: tuple[float, float],
) -> None:
    """Raise :class:`AnnotationError` for what cannot be meant; ``lengths`` are (shortest, longest) in seconds."""
    if min(seed_numbers(seed), default=0) < 0:
        raise AnnotationError(f"seeds are not negative, got {seed}")
    if not classes:
        raise AnnotationError("classes is empty: name at least one of " + ", ".join(CLASSES))
    for label in classes:
        if label not in ACTIONS:
            raise AnnotationError(f"unknown synthetic class '{label}'.{did_you_mean(label, CLASSES)}")
    if not (math.isfinite(fps) and fps > 0):
        raise AnnotationError(f"fps must be positive, got {fps}")
    if min(size) < 32 or size[0] % 2 or size[1] % 2:
        raise AnnotationError(f"size is (height, width), even and at least 32, got {size}")
    for name, (low, high) in lengths.items():
        if not (0 < low <= high < math.inf):
            raise AnnotationError(f"{name} must be 0 < shortest <= longest, got ({low}, {high})")
