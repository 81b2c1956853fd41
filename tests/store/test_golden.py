"""Stores as earlier versions wrote them, kept for ever: what is said about version 1.0 must stay true of it.

Each holds ``EXPECTED``, written by the version it is named after; ``sharded`` with chunks of 256 bytes.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tad.store import fingerprint_of, open_store
from tad.timeline import TimeAxis
from tests.store.makers import AXIS, SOURCE, SPEC

GOLDEN = Path(__file__).parent / "golden"


def ramp(*shape: int, dtype: str) -> np.ndarray:
    return (np.arange(np.prod(shape)).reshape(shape) % 251).astype(dtype)


EXPECTED: dict[tuple[str, str], dict[str, tuple[np.ndarray, TimeAxis]]] = {
    ("i3d-rgb", "video_1"): {"features": (ramp(11, 5, dtype="float32"), AXIS)},
    ("i3d-rgb", "a/b [x].mp4"): {"features": (ramp(3, 5, dtype="float32"), AXIS)},
    ("bytes", "sharded"): {"features": (ramp(60, 20, dtype="uint8"), AXIS)},
    ("maps", "video_1"): {
        "s2": (ramp(8, 6, 2, 3, dtype="float16"), AXIS),
        "s4": (ramp(4, 7, dtype="float16"), AXIS.pooled(2)),
    },
}


@pytest.mark.parametrize("name", ["store.zarr", "store-h5"])
@pytest.mark.parametrize("version", ["1.0"])
def test_old_stores_read_as_ever(version: str, name: str, tmp_path: Path) -> None:
    place = shutil.copytree(GOLDEN / version / name, tmp_path / name)
    with open_store(place) as store:
        report = store.verify(deep=True)
        assert report.problems == []
        assert set(store) == EXPECTED.keys()
        for (stream, video), levels in EXPECTED.items():
            assert store.levels(stream, video) == list(levels)
            assert store.is_done(stream, video, SOURCE)
            for level, (array, axis) in levels.items():
                feature = store[stream, video, level]
                assert feature.axis == axis
                assert feature.dtype == array.dtype
                np.testing.assert_array_equal(feature.numpy(), array)
            assert store.attrs(stream, video)["note"] == {"a": [1, None]}
            assert store.attrs(stream, video)["duration_s"] == 12.5
            assert store.stream_attrs(stream)["fingerprint"] == fingerprint_of(SPEC)
            assert store.stream_attrs(stream)["weights_path"] == "rgb.pt"
        assert len(store.catalog(refresh=False)) == 5
    with open_store(place, "a") as store:
        store.create_stream("i3d-rgb", SPEC)  # the recipe is still the same one
