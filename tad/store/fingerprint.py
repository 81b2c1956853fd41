"""Plain values, their one JSON text, and the fingerprint of an extraction recipe."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tad.errors import StoreError


def plain(value: Any, *, where: str) -> Any:
    """``value`` as JSON has it: dicts with string keys, lists, strings, finite numbers, booleans, None.

    NumPy scalars become Python's. Raises :class:`StoreError` naming the place of anything else.
    """
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
    raise StoreError(
        f"{where} is a {type(value).__name__}; only plain values (text, numbers, lists, dicts) can be stored"
    )


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
