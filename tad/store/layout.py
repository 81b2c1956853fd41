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
from tad.store.fingerprint import canonical_json, fingerprint_of, plain
from tad.timeline import TimeAxis

ENCODING_VERSION = "1.0"
STORE, STREAM, ENTRY = "tad-store", "tad-stream", "tad-features"
CHUNK_BYTES = 1 << 20
SINGLE = "features"  # the level of a stream that has one temporal resolution only
STREAM_KEYS = frozenset({"encoding-type", "encoding-version", "spec", "fingerprint"})
ENTRY_KEYS = frozenset(
    {"encoding-type", "encoding-version", "video", "stream_fingerprint", "levels", "duration_s", "source", "sha256"}
    | {"written_at", "tad_version", "attrs_sha256", "metadata_sha256"}
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


class Damaged(ValueError):
    """Something stored is missing or not what its entry says; the caller adds where and what to do."""


def describe(error: BaseException) -> str:
    """What a decoder complained of, in one line."""
    text = " ".join(str(error).split()) or "no details"
    return text if isinstance(error, Damaged) else f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class Level:
    """One temporal resolution of one video, as it is written.

    ``array`` is (T, C) or (T, C, ...) with the rows first; ``axis`` says where the rows lie in time. The rest records
    where they came from: lengths in frames of the grid at ``fps``, ``None`` where that does not apply.
    """

    array: np.ndarray
    axis: TimeAxis
    stride_frames: float | None = None
    window_frames: float | None = None
    fps: float | None = None
    num_frames_used: int | None = None


# ---- attributes ----------------------------------------------------------------------------------
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
    """The attributes of one entry; the arrays of ``levels`` must have passed :func:`checked_array`."""
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
    return attrs


def sealed(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """``attrs`` with their own SHA-256, so that a damaged number is found as a damaged row is."""
    return {**attrs, "attrs_sha256": attrs_sha256(attrs)}


def _extra(values: Mapping[str, Any] | None, taken: frozenset[str], *, where: str) -> dict[str, Any]:
    values = dict(values or {})
    if clash := sorted(taken & values.keys()):
        raise StoreError(f"{where} may not hold {', '.join(clash)}: the store writes these itself")
    if bad := [key for key in values if not isinstance(key, str) or not key or "\0" in key or key == "json-attrs"]:
        raise StoreError(f"{where} has the key {bad[0]!r}, which cannot be the name of an attribute")
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
        raise StoreError(
            f"{where}: expected the attribute encoding-type={kind!r}, found {found!r}; this was not written by tad"
        )
    version = str(attrs.get("encoding-version"))
    major = version.split(".")[0]
    if not major.isdigit():
        raise StoreError(f"{where}: encoding-version {version!r} cannot be understood")
    if int(major) > int(ENCODING_VERSION.split(".")[0]):
        raise StoreError(
            f"{where}: written with encoding-version {version}, this tad ({__version__}) reads up to "
            f"{ENCODING_VERSION}; upgrade tad"
        )
    return attrs


def parse_attrs(data: bytes, kind: str, *, where: str) -> dict[str, Any]:
    """The attributes of a JSON file, checked; :class:`StoreError` when it is damaged."""
    try:
        attrs = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where}: metadata is not JSON ({error})") from error
    return check_encoding(attrs, kind, where=where)


_REQUIRED = ENTRY_KEYS - {
    "video",
    "attrs_sha256",
    "metadata_sha256",
}  # what the published layout promises; the rest is ours


def checked_entry(attrs: dict[str, Any], *, where: str) -> dict[str, Any]:
    """``attrs`` when they are those of an entry, as far as reading needs it; else :class:`StoreError`."""
    try:
        if lacking := sorted(_REQUIRED - attrs.keys()):
            raise Damaged(f"lacks {', '.join(lacking)}")
        if (
            not attrs["levels"]
            or not isinstance(attrs["source"], dict)
            or not isinstance(attrs["duration_s"], float | int)
        ):
            raise Damaged("levels, source or duration_s are not what they should be")
        for level in attrs["levels"]:
            level_axis(level)
            np.dtype(level["dtype"])
            if not isinstance(attrs["sha256"][level["path"]], str) or not all(
                type(n) is int and n > 0 for n in level["shape"]
            ):
                raise Damaged(f"level {level['path']} has the shape {level['shape']}")
            if (
                len(level["shape"]) < 2
                or not {"stride_frames", "window_frames", "fps", "num_frames_used"} <= level.keys()
            ):
                raise Damaged(f"level {level['path']} lacks attributes")
    except DAMAGE as error:
        raise StoreError(f"{where}: damaged attributes: {describe(error)}") from error
    return attrs


# ---- arrays --------------------------------------------------------------------------------------
_LEVEL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


def checked_levels(levels: Mapping[str, Level], *, where: str) -> dict[str, Level]:
    """``levels`` from fine to coarse, their arrays ready to be written. Raises :class:`StoreError`."""
    if not levels:
        raise StoreError(f"{where}: an entry needs at least one level")
    result = {}
    for path, level in sorted(levels.items(), key=lambda item: (item[1].axis.scale_s, item[0])):
        if not _LEVEL_NAME.fullmatch(path):
            raise StoreError(
                f"{where}: level {path!r} must be a name of letters, digits, '_' and '-', such as 'features' or 's2'"
            )
        array = checked_array(level.array, where=f"{where}, level {path}")
        result[path] = Level(
            array, level.axis, level.stride_frames, level.window_frames, level.fps, level.num_frames_used
        )
    return result


def checked_array(array: Any, *, where: str) -> np.ndarray:
    """``array`` contiguous and little-endian, copied only if it is not: (T, C, ...), none of them 0, finite.

    NaN and infinity are refused: they poison every network, and NaN is the fill value by which a lost chunk is told.
    """
    array = np.asarray(array)
    if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise StoreError(
            f"{where}: features of type {array.dtype} cannot be stored; use float16/32/64 or an integer type"
        )
    if array.ndim < 2 or 0 in array.shape:
        raise StoreError(
            f"{where}: expected rows first, (T, C) or (T, C, ...), none of them 0; got the shape {array.shape}"
        )
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    if array.dtype.kind == "f":
        for start, block in _row_blocks(array):
            if not np.isfinite(block).all():
                bad = np.flatnonzero(~np.isfinite(block).all(axis=tuple(range(1, block.ndim))))
                raise StoreError(
                    f"{where}: row {start + int(bad[0])} of {len(array)} holds NaN or infinity; features must be finite"
                )
    return array


def _row_blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    step = chunk_rows(array.shape, array.dtype.itemsize)
    for start in range(0, len(array), step):
        yield start, array[start : start + step]


def sha256_of(blocks: Any) -> str:
    """SHA-256 (hex) of the raw little-endian bytes of arrays that follow one another."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(np.ascontiguousarray(block).data)
    return digest.hexdigest()


def chunk_rows(shape: tuple[int, ...], itemsize: int) -> int:
    """Rows of a chunk: all chunks alike and about 1 MiB, so that the last one is hardly padded."""
    count = max(1, math.ceil(math.prod(shape) * itemsize / CHUNK_BYTES))
    return math.ceil(shape[0] / count)


def dimension_names(level: str, ndim: int) -> tuple[str, ...]:
    """``time, channel`` and, for maps, ``height, width``; behind it the level's name unless that is ``features``.

    So levels of different length lie in one xarray Dataset.
    """
    rest = ("height", "width") if ndim == 4 else tuple(f"axis{i}" for i in range(2, ndim))
    names = ("time", "channel", *rest)
    return names if level == SINGLE else tuple(f"{name}_{level}" for name in names)
