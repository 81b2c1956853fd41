"""SnippetDataset: a store as a map-style dataset for any PyTorch project."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from tad.errors import StoreError
from tad.store.api import Store, open_store
from tad.timeline import TimeAxis


class SnippetDataset(Dataset[dict[str, Any]]):
    """Windows of rows of one or more streams, each with its time axis.

    The rows of the first stream are cut into windows; of the others, each on its own grid, an item holds the rows whose
    centres lie in the same stretch of time. Nothing is interpolated. Safe with workers that fork or spawn.

    Parameters
    ----------
    store : an open store, or where it lies.
    streams : names of streams, or (stream, level) where a stream has several; the first one is cut.
    rows : length of a window in rows of the first stream; None takes whole videos.
    step : rows from one window to the next; None puts them side by side. The last window of a video may be shorter;
        a step above ``rows`` leaves rows out between windows, and never makes an empty one.
    level : the level of every stream that is given by name alone; None takes ``features``, else the finest.
    videos : ids; None takes those that every stream has.

    An item is a dict: ``video``, ``features`` (stream, or ``"stream/level"`` where a level was given with it → (T, C,
    ...) tensor), ``axes`` (the same → TimeAxis, row 0 being the item's first row), ``row`` (where the window starts in
    the first stream) and ``duration_s`` (of the video).

    Raises
    ------
    StoreError : a stream or video is not there, or a read finds damage.
    """

    def __init__(
        self,
        store: Store | str | Path,
        streams: Sequence[str | tuple[str, str]],
        *,
        rows: int | None = 256,
        step: int | None = None,
        level: str | None = None,
        videos: Sequence[str] | None = None,
    ) -> None:
        if isinstance(streams, str) or not streams:
            raise StoreError(f"streams must be a list of at least one name, got {streams!r}")
        if (rows is not None and rows < 1) or (step is not None and step < 1):
            raise StoreError(f"rows and step must be at least 1, got {rows} and {step}")
        self.store = store if isinstance(store, Store) else open_store(store)
        wanted = [(stream, level) if isinstance(stream, str) else stream for stream in streams]
        names = [stream if isinstance(stream, str) else "/".join(stream) for stream in streams]
        self._keys = dict(zip(names, wanted, strict=True))  # name in an item -> stream, level
        self.streams, self.rows, self.step, self.level = tuple(self._keys), rows, step or rows, level
        self.videos = tuple(self._common_videos() if videos is None else videos)
        counts = [self._windows(video) for video in self.videos]
        self._ends = list(accumulate(counts))

    def _common_videos(self) -> list[str]:
        shared = set.intersection(*(set(self.store.videos(stream)) for stream, _ in self._keys.values()))
        return sorted(shared)

    def _key(self, name: str, video: str) -> tuple[str, str] | tuple[str, str, str]:
        stream, level = self._keys[name]
        return (stream, video) if level is None else (stream, video, level)

    def _windows(self, video: str) -> int:
        lengths = [len(self.store[self._key(stream, video)]) for stream in self.streams]  # all must be there
        if self.rows is None or self.step is None:
            return 1
        beyond_the_first = math.ceil((lengths[0] - self.rows) / self.step)
        return 1 + max(0, min(beyond_the_first, (lengths[0] - 1) // self.step))  # every window starts at a row

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        index %= len(self)
        at = bisect_right(self._ends, index)
        video = self.videos[at]
        first = self.store[self._key(self.streams[0], video)]
        start = (index - (self._ends[at - 1] if at else 0)) * (self.step or 0)
        stop = len(first) if self.rows is None else min(start + self.rows, len(first))
        edges_s = first.axis.center_s(start - 0.5), first.axis.center_s(stop - 0.5)
        features: dict[str, torch.Tensor] = {}
        axes: dict[str, TimeAxis] = {}
        for stream in self.streams:
            feature = first if stream == self.streams[0] else self.store[self._key(stream, video)]
            whole = self.rows is None
            a, b = (0, len(feature)) if whole else _rows_within(feature.axis, *edges_s, rows=len(feature))
            features[stream] = torch.from_numpy(feature[a:b])  # (T, C, ...)
            axes[stream] = feature.axis.shifted(a)
        return {"video": video, "features": features, "axes": axes, "row": start, "duration_s": first.duration_s}


def _rows_within(axis: TimeAxis, start_s: float, end_s: float, *, rows: int) -> tuple[int, int]:
    """The rows whose centres lie in ``[start_s, end_s)``: half open, so that windows side by side share none."""
    first, last = (math.ceil(axis.row_at(edge_s) - 1e-6) for edge_s in (start_s, end_s))
    first = min(max(0, first), rows)
    return first, max(first, min(last, rows))


def pad_snippets(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items of a :class:`SnippetDataset` as one batch (a ``collate_fn``).

    ``features``: stream → (B, T, C, ...), padded with zeros at the end; ``mask``: stream → (B, T), True where a row is
    real; everything else becomes a list.
    """
    batch: dict[str, Any] = {key: [item[key] for item in items] for key in ("video", "axes", "row", "duration_s")}
    streams = list(items[0]["features"])
    parts = {stream: [item["features"][stream] for item in items] for stream in streams}
    lengths = {stream: torch.tensor([len(part) for part in parts[stream]]) for stream in streams}
    pad = torch.nn.utils.rnn.pad_sequence
    batch["features"] = {stream: pad(parts[stream], batch_first=True) for stream in streams}
    batch["mask"] = {s: torch.arange(int(n.max()))[None, :] < n[:, None] for s, n in lengths.items()}  # (B, T)
    return batch
