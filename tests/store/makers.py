"""What the tests write into stores."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from tad.store import Level, Store
from tad.timeline import TimeAxis

SPEC = {"backbone": "i3d-rgb", "fps": 30.0, "window": 32, "stride": 8, "weights": {"sha256": "00ff"}}
SOURCE = {"name": "video.mp4", "size": 12345, "mtime_ns": 1_700_000_000_123_456_789}
AXIS = TimeAxis.from_frames(fps=30, window_frames=32, stride_frames=8)


def rows(count: int, channels: int = 4, *, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """Features that differ in every place."""
    return np.random.default_rng(seed).standard_normal((count, channels)).astype(dtype)


def level(array: np.ndarray, axis: TimeAxis = AXIS) -> Level:
    return Level(array, axis, stride_frames=8, window_frames=32, fps=30.0, num_frames_used=8 * len(array) + 24)


def put(store: Store, video: str, array: np.ndarray, *, stream: str = "s", **options: Any) -> None:
    """Write one entry of a single level, making the stream if need be."""
    store.create_stream(stream, SPEC)
    options = {"duration_s": 10.0, "source": SOURCE} | options
    store.write(stream, video, {"features": level(array)}, **options)


def place_for(kind: str, folder: Path) -> str:
    if kind == "memory":
        return f"memory://{uuid4().hex}/store.zarr"
    return str(folder / ("store.zarr" if kind == "zarr" else "store-h5"))
