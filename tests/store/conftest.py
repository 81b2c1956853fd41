"""Stores of each kind."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.store.makers import place_for


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
