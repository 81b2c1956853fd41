import json
import math
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tad.errors import StoreError
from tad.store import fingerprint_of
from tad.store.fingerprint import spec_differences
from tad.store.layout import CHUNK_BYTES, checked_array, chunk_rows, dimension_names


def test_fingerprint_is_the_sha256_of_the_canonical_json() -> None:
    spec = {
        "window": 32,
        "fps": 29.97,
        "name": "Übung",
        "size": [224, 256],
        "flow": None,
        "nested": {"b": 1, "a": True},
    }
    text = '{"flow":null,"fps":29.97,"name":"Übung","nested":{"a":true,"b":1},"size":[224,256],"window":32}'
    assert fingerprint_of(spec) == sha256(text.encode("utf-8")).hexdigest()


def test_fingerprint_does_not_depend_on_order_or_numpy() -> None:
    assert fingerprint_of({"a": 1, "b": (2, 3)}) == fingerprint_of({"b": [np.int64(2), np.int32(3)], "a": np.uint8(1)})
    assert fingerprint_of({"a": 1}) != fingerprint_of({"a": 2})


@pytest.mark.parametrize(
    ("spec", "place"),
    [
        ({"a": {"b": math.nan}}, "spec.a.b is nan"),
        ({"a": [1, math.inf]}, r"spec.a\[1\] is inf"),
        ({"a": np.zeros(2)}, "spec.a is a ndarray"),
        ({"a": {1: 2}}, "spec.a has the key 1"),
    ],
)
def test_fingerprint_refuses_what_json_cannot_say(spec: dict, place: str) -> None:
    with pytest.raises(StoreError, match=place):
        fingerprint_of(spec)


def test_differences_name_every_field() -> None:
    old = {"fps": 30, "stride": 8, "crop": {"size": [224, 224]}, "gone": "x", "flag": True}
    new = {"fps": 30.0, "stride": 4, "crop": {"size": [256, 256]}, "new": None, "flag": 1}
    assert spec_differences(old, new) == [
        "crop.size: stored [224, 224], now [256, 256]",
        "flag: stored true, now 1",
        'gone: stored "x", now nothing',
        "new: stored nothing, now null",
        "stride: stored 8, now 4",
    ]
    assert spec_differences(old, json.loads(json.dumps(old))) == []


@given(st.integers(1, 50_000), st.integers(1, 5000), st.sampled_from([1, 2, 4, 8]))
def test_chunks_are_balanced(count: int, channels: int, itemsize: int) -> None:
    rows = chunk_rows((count, channels), itemsize)
    chunks = math.ceil(count / rows)
    assert 1 <= rows <= count
    assert rows == 1 or rows * channels * itemsize <= CHUNK_BYTES + channels * itemsize
    padded = chunks * rows - count
    assert padded < chunks  # less than one row a chunk


def test_chunk_rows_of_known_sizes() -> None:
    assert chunk_rows((500, 1024), 4) == 250
    assert chunk_rows((256, 1024), 4) == 256  # exactly 1 MiB: one chunk
    assert chunk_rows((257, 1024), 4) == 129
    assert chunk_rows((3, 10**6), 4) == 1


def test_dimension_names() -> None:
    assert dimension_names("features", 2) == ("time", "channel")
    assert dimension_names("s2", 2) == ("time_s2", "channel_s2")
    assert dimension_names("s4", 4) == ("time_s4", "channel_s4", "height_s4", "width_s4")
    assert dimension_names("features", 3) == ("time", "channel", "axis2")


def test_arrays_are_copied_only_if_they_must_be() -> None:
    ready = np.ones((3, 2), "<f4")
    assert checked_array(ready, where="x") is ready or np.shares_memory(checked_array(ready, where="x"), ready)
    swapped = checked_array(np.arange(6, dtype=">i2").reshape(3, 2), where="x")
    assert swapped.dtype == np.dtype("<i2")
    np.testing.assert_array_equal(swapped, [[0, 1], [2, 3], [4, 5]])
    turned = checked_array(ready.T, where="x")
    assert turned.flags.c_contiguous
    assert turned.shape == (2, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_naming_the_row(bad: float) -> None:
    array = np.zeros((3000, 512), "f4")  # several chunks
    array[2345, 17] = bad
    with pytest.raises(StoreError, match=r"here: row 2345 of 3000 holds NaN or infinity"):
        checked_array(array, where="here")


@pytest.mark.parametrize(
    "bad",
    [np.zeros(3), np.zeros((0, 4)), np.zeros((3, 0)), np.zeros((2, 2), complex), np.zeros((2, 2), object), [["a"]], 1.0]
    + [np.zeros((2, 2), bool), np.zeros((2, 2), np.longdouble)],
)
def test_what_is_no_feature_array_is_refused(bad: object) -> None:
    with pytest.raises(StoreError, match="here: "):
        checked_array(bad, where="here")
