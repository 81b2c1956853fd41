"""Ids as names of files and groups: a reversible percent-encoding that file systems, Zarr and HDF5 all accept."""

from __future__ import annotations

import re
from functools import lru_cache

from tad.errors import StoreError

MAX_NAME_BYTES = 200  # 255 is what file systems take; the rest is room for ".h5" and the suffix of a temporary file
_UNSAFE = re.compile(r'[\x00-\x1f\x7f%/\\:*?"<>|]')
_ESCAPED = re.compile(r"%([0-9A-F]{2})")
_OURS = frozenset({"zarr.json", "catalog.csv", "store.h5"})  # names that the layout itself uses


def _escape(character: str) -> str:
    return f"%{ord(character):02X}"


@lru_cache(maxsize=65536)
def encode_name(name: str, what: str = "id") -> str:
    """The name under which the stream or video ``name`` is stored.

    Encoded are control characters, ``% / \\ : * ? " < > |``, a leading ``.`` or ``__`` (reserved for the store itself),
    a trailing dot or space, and the file names that the layout uses. Everything else, other scripts included, stays.

    Raises
    ------
    StoreError : the name is empty, not valid Unicode, or longer than 200 bytes once encoded; ``what`` names its kind.
    """
    if not isinstance(name, str) or not name:
        raise StoreError(f"a {what} must be a non-empty string, got {name!r}")
    safe = _UNSAFE.sub(lambda match: _escape(match[0]), name)
    if safe.startswith((".", "__")) or safe.lower() in _OURS:
        safe = _escape(safe[0]) + safe[1:]
    if safe.endswith((".", " ")):
        safe = safe[:-1] + _escape(safe[-1])
    try:
        length = len(safe.encode("utf-8"))
    except UnicodeEncodeError:
        raise StoreError(f"{what} {name!r} is not valid Unicode; rename the file that it comes from") from None
    if length > MAX_NAME_BYTES:
        raise StoreError(
            f"{what} {name[:60]!r}... takes {length} bytes as a file name, at most {MAX_NAME_BYTES} are possible; "
            "use a shorter one"
        )
    return safe


def decode_name(stored: str) -> str | None:
    """The id behind a stored name, or None for a name that :func:`encode_name` does not give (not ours)."""
    name = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), stored)
    try:
        return name if encode_name(name) == stored else None
    except StoreError:
        return None
