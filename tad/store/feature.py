"""Feature: the rows of one level of one video, read when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tad.errors import StoreError
from tad.store.layout import level_axis
from tad.timeline import TimeAxis

if TYPE_CHECKING:
    from tad.store.api import Store


class Feature:
    """A lazy (T, C, ...) array with its time axis; what ``store[stream, video]`` gives.

    ``feature[a:b]``, ``feature[i]``, ``feature[::2]`` and ``feature[[3, 7]]`` read as NumPy would index, and touch only
    the rows between the first and the last that are asked for. Every read raises :class:`StoreError` if what is stored
    is damaged, was replaced since this object was made, or its store was closed. Pickles by reference to the store.
    """

    __slots__ = ("_store", "attrs", "axis", "dtype", "level", "shape", "stream", "video")

    def __init__(self, store: Store, stream: str, video: str, level: dict[str, Any], attrs: dict[str, Any]) -> None:
        self._store = store
        self.stream: str = stream
        self.video: str = video
        self.level: str = level["path"]
        self.shape: tuple[int, ...] = tuple(level["shape"])
        self.dtype: np.dtype = np.dtype(level["dtype"])
        self.axis: TimeAxis = level_axis(level)
        self.attrs: dict[str, Any] = attrs

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def duration_s(self) -> float:
        """Length of the video in seconds."""
        return float(self.attrs["duration_s"])

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"Feature({self.stream!r}, {self.video!r}, {self.level!r}, shape={self.shape}, dtype={self.dtype})"

    def __getitem__(self, key: Any) -> np.ndarray:
        rows, *rest = key if isinstance(key, tuple) and key else (key,)
        simple = all(isinstance(part, int | slice | type(...)) and not isinstance(part, bool) for part in rest)
        if rows is None or rows is Ellipsis or isinstance(rows, tuple) or not simple:
            return np.asarray(self.numpy()[key])
        start, stop, wanted = _row_range(rows, len(self))
        return np.asarray(self._read(start, stop)[(wanted, *rest)])

    def between(self, start_s: float, end_s: float) -> np.ndarray:
        """The rows whose centres lie in ``[start_s, end_s]`` seconds; (n, C, ...), n may be 0."""
        rows = self.axis.rows_between(start_s, end_s, rows=len(self))
        return self._read(rows.start, rows.stop)

    def numpy(self) -> np.ndarray:
        """All rows, (T, C, ...)."""
        return self._read(0, len(self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a Feature is read from a file; it has no array that could be shared")
        return self.numpy() if dtype is None else self.numpy().astype(dtype, copy=False)

    def _read(self, start: int, stop: int) -> np.ndarray:
        if start >= stop:
            return np.empty((0, *self.shape[1:]), self.dtype)
        return self._store._read_rows(self, start, stop)


def _row_range(rows: Any, count: int) -> tuple[int, int, Any]:
    """The rows to read, as ``start, stop``, and the index that picks the wanted ones out of them."""
    if isinstance(rows, int | np.integer) and not isinstance(rows, bool):
        at = int(rows) + count if rows < 0 else int(rows)
        if not 0 <= at < count:
            raise IndexError(f"row {rows} of {count}")
        return at, at + 1, 0
    if isinstance(rows, slice):
        wanted = range(*rows.indices(count))
        if not wanted:
            return 0, 0, slice(None)
        start, stop = min(wanted[0], wanted[-1]), max(wanted[0], wanted[-1]) + 1
        return start, stop, slice(None, None, wanted.step)
    index = np.asarray(rows)
    if index.dtype == bool:
        if index.shape != (count,):
            raise IndexError(f"a mask of shape {index.shape} for {count} rows")
        index = np.flatnonzero(index)
    if index.size == 0:
        return 0, 0, np.zeros(index.shape, int)
    if index.dtype.kind not in "iu":
        raise IndexError(f"rows are picked by integers, slices or masks, not by {rows!r}")
    index = np.where(index < 0, index.astype(np.int64) + count, index.astype(np.int64))
    if index.min() < 0 or index.max() >= count:
        raise IndexError(f"rows {index.min()} to {index.max()} of {count}")
    return int(index.min()), int(index.max()) + 1, index - index.min()


def level_of(attrs: dict[str, Any], level: str | None, *, where: str) -> dict[str, Any]:
    """The attributes of ``level``; without a name ``features``, else the finest. Raises :class:`StoreError`."""
    known = {item["path"]: item for item in attrs["levels"]}
    if level is None:
        return known.get("features") or min(known.values(), key=lambda item: item["scale_s"])
    if level not in known:
        raise StoreError(f"{where} has no level {level!r}, only {', '.join(known)}")
    return known[level]
