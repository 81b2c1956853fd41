"""Which axis of imported arrays is time, told by the shapes of some files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import islice

import numpy as np

from tad.errors import StoreError
from tad.store.api import Store
from tad.store.export_index import Layout
from tad.store.feature_files import UNREADABLE, FeatureFile, read_features
from tad.store.import_grid import ROWS_OFF, Grid

Form = tuple[int, int]  # how many axes an array has, and how many channels
_LOOKED_AT = 32  # files whose shapes decide which axis is time


def rows_first(array: np.ndarray, file: FeatureFile, layout: Layout | None) -> np.ndarray:
    """The array with time in front: (T, C) or (T, C, H, W)."""
    return array.swapaxes(0, 1) if (file.layout or layout) == "CT" else array  # (T, C, ...)


def stored_form(store: Store, stream: str) -> Form | None:
    """The form of what the stream has already; None without any video."""
    for video in islice(store.videos(stream), 1):
        feature = store[stream, video]
        return feature.ndim, feature.shape[1]
    return None


def some_shapes(files: Mapping[str, FeatureFile], *, allow_pickle: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of the first files that can be read, by video."""
    shapes: dict[str, tuple[int, ...]] = {}
    for video, file in files.items():
        if len(shapes) == _LOOKED_AT:
            break
        try:
            shapes[video] = read_features(file, allow_pickle=allow_pickle).shape
        except UNREADABLE:
            continue  # told when its turn comes
    return shapes


def usual_form(
    files: Mapping[str, FeatureFile], shapes: Mapping[str, tuple[int, ...]], layout: Layout | None
) -> Form | None:
    """The number of axes and channels that most files have; None where no file can be read."""
    forms = Counter(
        (len(shape), shape[0 if (files[video].layout or layout) == "CT" else 1]) for video, shape in shapes.items()
    )
    return forms.most_common(1)[0][0] if forms else None


def find_layout(
    files: Mapping[str, FeatureFile], shapes: Mapping[str, tuple[int, ...]], grid: Grid, channels: int | None
) -> Layout | None:
    """Which axis is time, by the shapes of some files; None where no file leaves it open."""
    shapes = {video: shape for video, shape in shapes.items() if files[video].layout is None}
    if not shapes:
        return None
    for evidence in (_by_channels(shapes, channels), _by_durations(shapes, grid), _by_constancy(shapes)):
        if evidence is not None:
            return evidence
    some = ", ".join(f"{files[video].label} {shape}" for video, shape in islice(shapes.items(), 3))
    raise StoreError(
        f"which axis is time cannot be told from the shapes ({some}); say layout='TC' (rows first) or layout='CT'"
    )


def _decide(rows_first: bool, channels_first: bool) -> Layout | None:
    if rows_first == channels_first:
        return None
    return "TC" if rows_first else "CT"


def _by_channels(shapes: Mapping[str, tuple[int, ...]], channels: int | None) -> Layout | None:
    """The stream has videos already: their number of channels must be found again."""
    fits = [sum(shape[axis] == channels for shape in shapes.values()) > len(shapes) / 2 for axis in (0, 1)]
    return _decide(rows_first=fits[1], channels_first=fits[0])


def _by_durations(shapes: Mapping[str, tuple[int, ...]], grid: Grid) -> Layout | None:
    """Durations are given: one axis has the length that they promise."""
    known = [(shape, rows) for video, shape in shapes.items() if (rows := grid.expected_rows(video)) is not None]
    fits = [sum(abs(shape[axis] - rows) <= ROWS_OFF for shape, rows in known) > len(known) / 2 for axis in (0, 1)]
    return _decide(rows_first=fits[0], channels_first=fits[1])


def _by_constancy(shapes: Mapping[str, tuple[int, ...]]) -> Layout | None:
    """Channels are as many in every video, rows are not; a few odd files among many may break the rule."""
    most = [Counter(shape[axis] for shape in shapes.values()).most_common(1)[0][1] for axis in (0, 1)]
    same = [count == len(shapes) for count in most]
    if (decided := _decide(rows_first=same[1], channels_first=same[0])) is not None:
        return decided
    mostly = [count >= 0.75 * len(shapes) for count in most]
    return None if all(same) else _decide(rows_first=mostly[1], channels_first=mostly[0])
