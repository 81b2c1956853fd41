"""What is written: attributes, fingerprints, chunk shapes and dimension names, the same for Zarr and HDF5."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from tad._version import __version__
from tad.errors import StoreError
from tad.timeline import TimeAxis

ENCODING_VERSION = "1.0"
STORE, STREAM, ENTRY = "tad-store", "tad-stream", "tad-features"
CHUNK_BYTES = 1 << 20
SINGLE = "features"  # the level of a stream that has one temporal resolution only
STREAM_KEYS = frozenset({"encoding-type", "encoding-version", "spec", "fingerprint"})
ENTRY_KEYS = frozenset(
    {"encoding-type", "encoding-version", "video", "stream_fingerprint", "levels", "duration_s", "source", "sha256"}
    | {"written_at", "tad_version", "attrs_sha256"}
)
SOURCE_IDENTITY = ("name", "size", "mtime_ns")

# What the decoders of Zarr, HDF5 and JSON raise on damaged bytes. Long, because a flipped bit can end anywhere in them.
DAMAGE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    EOFError,
    MemoryError,
)


@dataclass(frozen=True)
class Level:
    """One temporal resolution of one video, as it is written.

    ``array`` is (T, C) or (T, C, ...) with the rows first; ``axis`` says where the rows lie in time. The rest records where
    they came from: lengths in frames of the grid at ``fps``, ``None`` where that does not apply.
    """

    array: np.ndarray
    axis: TimeAxis
    stride_frames: float | None = None
    window_frames: float | None = None
    fps: float | None = None
    num_frames_used: int | None = None


# ---- plain values and fingerprints --------------------------------------------------------------------------------------
def plain(value: Any, *, where: str) -> Any:
    """``value`` as JSON has it: dicts with string keys, lists, strings, finite numbers, booleans, None; NumPy scalars become
    Python's. Raises :class:`StoreError` naming the place of anything else."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, np.generic) and not isinstance(value, np.floating) and value.dtype.kind in "biu":
        return value.item()
    if isinstance(value, float | np.floating):
        if not math.isfinite(value):
            raise StoreError(f"{where} is {value}; only finite numbers can be stored")
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise StoreError(f"{where} has the key {key!r}; keys must be strings")
        return {key: plain(item, where=f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where=f"{where}[{i}]") for i, item in enumerate(value)]
    raise StoreError(f"{where} is a {type(value).__name__}; only plain values (text, numbers, lists, dicts) can be stored")


def canonical_json(value: Any) -> bytes:
    """The one UTF-8 JSON text of a plain value: keys sorted, no spaces, nothing escaped that need not be."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "surrogatepass")


def fingerprint_of(spec: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON of an extraction recipe; equal for equal recipes, whatever the order of keys.

    Raises
    ------
    StoreError : the recipe holds NaN, infinity or something that JSON cannot say.
    """
    return hashlib.sha256(canonical_json(plain(spec, where="spec"))).hexdigest()


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    else:
        yield path, value


def spec_differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Every field in which two recipes differ, as ``field: stored X, now Y``; ``30`` and ``30.0`` do not differ."""
    old, new = dict(_leaves(dict(stored), "")), dict(_leaves(dict(wanted), ""))
    lines = []
    for field in sorted(old.keys() | new.keys()):
        values = [json.dumps(side[field], ensure_ascii=False) if field in side else "nothing" for side in (old, new)]
        equal = field in old and field in new and old[field] == new[field]
        if values[0] != values[1] and not (equal and isinstance(old[field], bool) == isinstance(new[field], bool)):
            lines.append(f"{field}: stored {values[0]}, now {values[1]}")
    return lines


# ---- attributes ---------------------------------------------------------------------------------------------------------
def store_attrs() -> dict[str, Any]:
    return {"encoding-type": STORE, "encoding-version": ENCODING_VERSION, "created_by": f"tad {__version__}"}


def stream_attrs(spec: Mapping[str, Any], info: Mapping[str, Any] | None, *, where: str) -> dict[str, Any]:
    """The attributes of a stream: its recipe, the recipe's fingerprint, and the keys of ``info`` beside them."""
    extra = _extra(info, STREAM_KEYS, where=f"{where}: info")
    head = {"encoding-type": STREAM, "encoding-version": ENCODING_VERSION}
    return head | {"spec": plain(spec, where=f"{where}: spec"), "fingerprint": fingerprint_of(spec)} | extra


def entry_attrs(
    video: str,
    levels: Mapping[str, Level],
    *,
    fingerprint: str,
    duration_s: float,
    source: Mapping[str, Any],
    extra: Mapping[str, Any] | None,
    where: str,
) -> dict[str, Any]:
    """The attributes of one entry; the arrays of ``levels`` must have passed :func:`checked_array`.

    ``attrs_sha256`` covers all the others, so that a damaged number is found as a damaged row is.
    """
    attrs: dict[str, Any] = {
        "encoding-type": ENTRY,
        "encoding-version": ENCODING_VERSION,
        "video": video,
        "stream_fingerprint": fingerprint,
        "levels": [_level_attrs(path, level, where=where) for path, level in levels.items()],
        "duration_s": float(plain(float(duration_s), where=f"{where}: duration_s")),
        "source": plain(source, where=f"{where}: source"),
        "sha256": {path: sha256_of([level.array]) for path, level in levels.items()},
        "written_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "tad_version": __version__,
    }
    if attrs["duration_s"] <= 0:
        raise StoreError(f"{where}: duration_s must be positive, got {duration_s}")
    attrs |= _extra(extra, ENTRY_KEYS, where=f"{where}: attrs")
    return attrs | {"attrs_sha256": attrs_sha256(attrs)}


def _extra(values: Mapping[str, Any] | None, taken: frozenset[str], *, where: str) -> dict[str, Any]:
    values = dict(values or {})
    if clash := sorted(taken & values.keys()):
        raise StoreError(f"{where} may not hold {', '.join(clash)}: the store writes these itself")
    return dict(plain(values, where=where))


def attrs_sha256(attrs: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json({k: v for k, v in attrs.items() if k != "attrs_sha256"})).hexdigest()


def _level_attrs(path: str, level: Level, *, where: str) -> dict[str, Any]:
    numbers = {
        "stride_frames": level.stride_frames,
        "window_frames": level.window_frames,
        "fps": level.fps,
        "num_frames_used": level.num_frames_used,
    }
    head = {"path": path, "shape": list(level.array.shape), "dtype": level.array.dtype.name}
    return head | plain(numbers | level.axis.to_dict(), where=f"{where}: level {path}")


def level_axis(level: Mapping[str, Any]) -> TimeAxis:
    """The time axis of a stored level."""
    return TimeAxis(level["scale_s"], level["translation_s"], level["window_s"])


def check_encoding(attrs: Any, kind: str, *, where: str) -> dict[str, Any]:
    """``attrs`` when they are those of a ``kind`` that this version reads, else :class:`StoreError`."""
    found = attrs.get("encoding-type") if isinstance(attrs, dict) else None
    if found != kind:
        raise StoreError(f"{where}: expected the attribute encoding-type={kind!r}, found {found!r}; this was not written by tad")
    version = str(attrs.get("encoding-version"))
    major = version.split(".")[0]
    if not major.isdigit():
        raise StoreError(f"{where}: encoding-version {version!r} cannot be understood")
    if int(major) > int(ENCODING_VERSION.split(".")[0]):
        raise StoreError(
            f"{where}: written with encoding-version {version}, this tad ({__version__}) reads up to {ENCODING_VERSION}; upgrade tad"
        )
    return attrs


def parse_attrs(data: bytes, kind: str, *, where: str) -> dict[str, Any]:
    """The attributes of a JSON file, checked; :class:`StoreError` when it is damaged."""
    try:
        attrs = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where}: metadata is not JSON ({error})") from error
    return check_encoding(attrs, kind, where=where)


# ---- arrays -------------------------------------------------------------------------------------------------------------
_LEVEL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


def checked_levels(levels: Mapping[str, Level], *, where: str) -> dict[str, Level]:
    """``levels`` from fine to coarse, their arrays ready to be written. Raises :class:`StoreError`."""
    if not levels:
        raise StoreError(f"{where}: an entry needs at least one level")
    result = {}
    for path, level in sorted(levels.items(), key=lambda item: (item[1].axis.scale_s, item[0])):
        if not _LEVEL_NAME.fullmatch(path):
            raise StoreError(f"{where}: level {path!r} must be a name of letters, digits, '_' and '-', such as 'features' or 's2'")
        array = checked_array(level.array, where=f"{where}, level {path}")
        result[path] = Level(
            array, level.axis, level.stride_frames, level.window_frames, level.fps, level.num_frames_used
        )
    return result


def checked_array(array: Any, *, where: str) -> np.ndarray:
    """``array`` contiguous and little-endian, copied only if it is not; (T, C, ...), T and C at least 1, finite numbers.

    NaN and infinity are refused: they poison every network, and NaN is the fill value by which a lost chunk is told.
    """
    array = np.asarray(array)
    if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise StoreError(f"{where}: features of type {array.dtype} cannot be stored; use float16/32/64 or an integer type")
    if array.ndim < 2 or 0 in array.shape:
        raise StoreError(f"{where}: expected rows first, (T, C) or (T, C, ...), none of them 0; got the shape {array.shape}")
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    if array.dtype.kind == "f":
        for start, block in _row_blocks(array):
            if not np.isfinite(block).all():
                bad = np.flatnonzero(~np.isfinite(block).all(axis=tuple(range(1, block.ndim))))
                raise StoreError(f"{where}: row {start + int(bad[0])} of {len(array)} holds NaN or infinity; features must be finite")
    return array


def _row_blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    step = chunk_rows(array.shape, array.dtype.itemsize)
    for start in range(0, len(array), step):
        yield start, array[start : start + step]


def sha256_of(blocks: Any) -> str:
    """SHA-256 (hex) of the raw little-endian bytes of arrays that follow one another."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(memoryview(np.ascontiguousarray(block)).cast("B"))
    return digest.hexdigest()


def chunk_rows(shape: tuple[int, ...], itemsize: int) -> int:
    """Rows of a chunk: all chunks alike and about 1 MiB, so that the last one is hardly padded."""
    count = max(1, math.ceil(math.prod(shape) * itemsize / CHUNK_BYTES))
    return math.ceil(shape[0] / count)


def dimension_names(level: str, ndim: int) -> tuple[str, ...]:
    """``time, channel`` and, for maps, ``height, width``; other levels than ``features`` carry their name behind, so that
    levels of different length can lie in one xarray Dataset."""
    rest = ("height", "width") if ndim == 4 else tuple(f"axis{i}" for i in range(2, ndim))
    names = ("time", "channel", *rest)
    return names if level == SINGLE else tuple(f"{name}_{level}" for name in names)
