"""Stores of each kind, and the makers of what is written into them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

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


@pytest.fixture(params=["zarr", "hdf5"])
def kind(request: pytest.FixtureRequest) -> str:
    """The formats that lie on disk."""
    return str(request.param)


@pytest.fixture
def place(kind: str, tmp_path: Path) -> str:
    return place_for(kind, tmp_path)


@pytest.fixture(params=["zarr", "hdf5", "memory"])
def any_place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return place_for(request.param, tmp_path)


@pytest.fixture
def disk_file(kind: str, place: str) -> Callable[..., Path]:
    """The file behind a part of an entry: its attributes, its array's metadata, or its rows."""

    def find(video: str, part: str, stream: str = "s", level: str = "features") -> Path:
        if kind == "hdf5":
            return Path(place, stream, f"{video}.h5")
        names = {"attrs": "zarr.json", "array": f"{level}/zarr.json", "rows": f"{level}/c.0.0"}
        return Path(place, stream, video, names[part])

    return find
