"""What true segments are like (length, coverage, number in the video, context), put into named buckets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tad.annotations._files import as_number, is_json, parse_json, read_text
from tad.errors import AnnotationError, did_you_mean

INF = float("inf")
# Characteristic -> (limits, names): bucket i holds limits[i] < value <= limits[i + 1], the first its lower limit too.
# DETAD's (Alwassel et al. 2018, section 3), which looks at lengths in seconds and at coverage as a share of the video.
_CONTEXT: dict[str, tuple[tuple[float, ...], tuple[str, ...]]] = {
    "context-size": ((-1, 0, 1, 2, 3, 4, 5, 6), ("0", "1", "2", "3", "4", "5", "6")),
    "context-distance": ((-1, 0, 1, 2, 3), ("Inf", "N", "M", "F")),
    "agreement": ((0, 0.2, 0.4, 0.6, 0.8, 1), ("XW", "W", "M", "H", "XH")),
}
BUCKETS: dict[str, dict[str, tuple[tuple[float, ...], tuple[str, ...]]]] = {
    "activitynet": {
        "length": ((0, 30, 60, 120, 180, INF), ("XS", "S", "M", "L", "XL")),
        "coverage": ((0, 0.2, 0.4, 0.6, 0.8, 1), ("XS", "S", "M", "L", "XL")),
        "num-instances": ((-1, 1, 4, 8, INF), ("XS", "S", "M", "L")),
        **_CONTEXT,
    },
    "thumos14": {
        "length": ((0, 3, 6, 12, 18, INF), ("XS", "S", "M", "L", "XL")),
        "coverage": ((0, 0.02, 0.04, 0.06, 0.08, 1), ("XS", "S", "M", "L", "XL")),
        "num-instances": ((-1, 1, 40, 80, INF), ("XS", "S", "M", "L")),
        **_CONTEXT,
    },
}
Buckets = str | Mapping[str, tuple[Sequence[float], Sequence[str]]]


@dataclass(frozen=True, eq=False)
class Characteristic:
    """One property of M true segments.

    Attributes
    ----------
    name : such as ``length``. buckets : its names, from small to large.
    bucket : (M,) index into ``buckets``, -1 where the value is unknown or in none.
    """

    name: str
    buckets: tuple[str, ...]
    bucket: np.ndarray


def buckets_of(buckets: Buckets) -> Mapping[str, tuple[Sequence[float], Sequence[str]]]:
    """Limits and names by characteristic: a name in :data:`BUCKETS`, or limits of one's own, checked.

    Raises
    ------
    AnnotationError : an unknown name, limits that do not rise, or not one name for each bucket.
    """
    if isinstance(buckets, str):
        if buckets not in BUCKETS:
            raise AnnotationError(f"unknown buckets {buckets!r}.{did_you_mean(buckets, BUCKETS)}")
        return BUCKETS[buckets]
    for name, (limits, names) in buckets.items():
        if len(limits) != len(names) + 1 or not all(a < b for a, b in pairwise(limits)):
            raise AnnotationError(f"buckets of {name!r}: n names need n + 1 rising limits, got {limits} and {names}")
    return buckets


def characteristics(
    truth: pd.DataFrame, durations: Mapping[Any, float] | None, buckets: Buckets
) -> tuple[list[Characteristic], list[str]]:
    """Put M true segments into buckets.

    Length, coverage (length by the video's duration) and the number of segments in the video (of any class) are
    computed; a column of the truth of one of these names, or of ``context-size``, ``context-distance``, ``agreement``
    or a name in ``buckets``, is taken as it stands. Coverage above 1 counts as 1.

    Parameters
    ----------
    truth : ``video, start_s, end_s`` and perhaps columns named after characteristics; NaN is unknown.
    durations : seconds by video; a video that it lacks has no coverage.
    buckets : see :func:`buckets_of`.

    Returns
    -------
    Characteristics for which at least one value is known, and notes on those that are not.
    """
    length = (truth["end_s"] - truth["start_s"]).to_numpy(dtype=np.float64)
    known: dict[str, np.ndarray] = {
        "length": length,
        "num-instances": truth.groupby("video", sort=False)["video"].transform("size").to_numpy(dtype=np.float64),
    }
    notes: list[str] = []
    if durations is not None:
        duration = truth["video"].map(lambda video: durations.get(video, np.nan)).to_numpy(dtype=np.float64)
        known["coverage"] = length / np.where(duration > 0, duration, np.nan)
    found: list[Characteristic] = []
    for name, (limits, names) in buckets_of(buckets).items():
        if name in truth.columns:
            values = pd.to_numeric(truth[name], errors="coerce").to_numpy(dtype=np.float64)
        elif name in known:
            values = known[name]
        else:
            values = np.full(len(truth), np.nan)
        if name == "coverage":
            values = np.minimum(values, 1.0)
        if np.isnan(values).all():
            if name == "coverage":
                notes.append(
                    "no duration of a video is known: coverage is left out (videos= or an annotation has them)"
                )
            continue
        index = np.searchsorted(limits, values, side="left") - 1
        index[values == limits[0]] = 0
        index[~((values >= limits[0]) & (values <= limits[-1]))] = -1
        if missing := int((index < 0).sum()):
            notes.append(f"{name} of {missing} true segments is unknown or outside all buckets: they are in none")
        found.append(Characteristic(name, tuple(names), index))
    return found, notes


def read_characteristics(path: str | Path) -> pd.DataFrame:
    """Characteristics that an ActivityNet-style annotation gives with its segments, as DETAD's files do.

    Returns
    -------
    ``video, start_s, end_s, label`` and a column for each of ``coverage, context-size, context-distance, agreement``
    that at least one segment has; no row where the file is no such JSON. Segments with bad times are passed over:
    :func:`tad.annotations.read_truth` reports them.

    Raises
    ------
    AnnotationError : an unreadable file.
    """
    extra = ("coverage", *_CONTEXT)
    rows: list[tuple[object, ...]] = []
    text = read_text(path)
    content = parse_json(text, path) if is_json(text) else None
    database = content.get("database") if isinstance(content, dict) else None
    for video, entry in database.items() if isinstance(database, dict) else ():
        annotations = entry.get("annotations") if isinstance(entry, dict) else None
        for one in annotations if isinstance(annotations, list) else ():
            segment = one.get("segment") if isinstance(one, dict) else None
            if isinstance(segment, list) and len(segment) == 2:
                values = [as_number(one.get(name)) for name in extra]
                rows.append((video, as_number(segment[0]), as_number(segment[1]), one.get("label"), *values))
    table = pd.DataFrame(rows, columns=["video", "start_s", "end_s", "label", *extra])
    table = table.dropna(subset=["start_s", "end_s"]).reset_index(drop=True)
    return table.drop(columns=[name for name in extra if table[name].isna().all()])


def with_characteristics(truth: pd.DataFrame, extra: pd.DataFrame) -> pd.DataFrame:
    """The truth with the columns of :func:`read_characteristics`, joined by video, times and label."""
    keys = ["video", "start_s", "end_s", "label"]
    names = [name for name in extra.columns if name not in keys]
    if not names or not set(keys) <= set(extra.columns):
        return truth
    types = {"video": "object", "label": "object", "start_s": "float64", "end_s": "float64"}
    unique = extra.astype(types).drop_duplicates(keys)
    joined = truth.astype(types).merge(unique, on=keys, how="left")
    return truth.assign(**{name: joined[name].to_numpy() for name in names})
