"""The pixels of a synthetic video, frame after frame."""

from __future__ import annotations

import math
from collections.abc import Iterator

import cv2
import numpy as np

from tad.synth.plan import Plan


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Coloured clouds over two octaves, (height, width, 3) uint8."""
    cells = [rng.integers(30, 226, (n, n, 3)).astype(np.uint8) for n in (5, 14)]
    coarse, fine = (cv2.resize(c, (width, height), interpolation=cv2.INTER_CUBIC) for c in cells)
    return cv2.addWeighted(coarse, 0.6, fine, 0.4, 0.0)


def _sprite(rng: np.random.Generator, side: int = 64) -> np.ndarray:
    """A textured shape, (side, side, 4) uint8, the last channel its coverage."""
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
    """Lay ``sprite``, ``across`` pixels wide and turned clockwise by ``angle``, over ``frame`` round ``center``."""
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
