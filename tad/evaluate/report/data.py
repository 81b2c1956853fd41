"""What the page is given: plain JSON values, segments as flat arrays of whole milliseconds and class numbers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from tad.annotations import Truth, check_segments
from tad.evaluate.proposals import ProposalResult

VERSION = 1
CURVE_POINTS = 200  # of a precision-recall curve; more are not seen
Curves = Mapping[str, tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]]


def report_data(
    *,
    truth: Truth | pd.DataFrame | None,
    predictions: pd.DataFrame,
    title: str,
    files: Mapping[str, str | Path] | None = None,
    beside: str | Path = ".",
    tiou: float = 0.5,
    metrics: Mapping[str, Any] | None = None,
    recall: ProposalResult | None = None,
    curves: Curves | None = None,
    diagnosis: Mapping[str, Any] | None = None,
    intervals: Mapping[str, Any] | None = None,
    training: Sequence[Mapping[str, Any]] = (),
    about: Mapping[str, str] | None = None,
    recipe: str = "",
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that the page shows; arguments as :func:`tad.evaluate.report.build_report`.

    ``videos`` holds lists of one length, an item a video: ``id``, ``duration`` (ms), ``known`` (whether the annotation
    has it), ``file`` and ``exists``; ``truth`` flat ``[start, length, class, ...]`` in ms by start; ``predicted`` the
    same by falling score (equal scores: the table's order); ``score`` with four digits.
    """
    table = truth.segments if isinstance(truth, Truth) else truth
    if table is None:
        table = pd.DataFrame({"video": [], "start_s": [], "end_s": [], "label": []})
    true = check_segments(table, what="the truth", label=True, ordered=True)
    found = check_segments(predictions, what="the predictions", label=True, score=True)
    true_classes = sorted({str(label) for label in true["label"]})
    only_predicted = sorted({str(label) for label in found["label"]} - set(true_classes))
    classes = [*true_classes, *only_predicted]
    return _finite(
        {
            "version": VERSION,
            "title": title,
            "about": [[str(name), str(value)] for name, value in (about or {}).items()],
            "recipe": recipe,
            "notes": [*(metrics or {}).get("notes", ()), *notes],
            "tiou": tiou,
            "classes": classes,
            "true_classes": len(true_classes),
            "scores": _scores(metrics),
            "recall": _recall(recall),
            "curves": [_curve(label, *points) for label, points in (curves or {}).items()],
            "diagnosis": dict(diagnosis) if diagnosis is not None else None,
            "intervals": _intervals(intervals),
            "training": _training(training),
            "videos": _videos(truth, true, found, classes, files or {}, Path(beside)),
        }
    )


def _videos(
    truth: Truth | pd.DataFrame | None,
    true: pd.DataFrame,
    found: pd.DataFrame,
    classes: list[str],
    files: Mapping[str, str | Path],
    beside: Path,
) -> dict[str, list[Any]]:
    listed = truth.videos["video"].tolist() if isinstance(truth, Truth) else []
    known = list(dict.fromkeys(str(video) for video in [*listed, *true["video"]]))
    listed_ids = set(known)
    # Without an annotation the files say which videos there are; with one, those of other subsets have no part in it.
    ids = list(dict.fromkeys([*known, *map(str, found["video"]), *(() if known else files)]))
    index = pd.Index(ids, dtype="object")
    duration = np.zeros(len(ids))
    for segments in (true, found):
        if len(segments):
            np.maximum.at(duration, _codes(index, segments["video"]), segments["end_s"].to_numpy())
    if isinstance(truth, Truth) and len(truth.videos):
        given = truth.videos["duration_s"].to_numpy(dtype=np.float64)
        at = _codes(index, truth.videos["video"])
        duration[at] = np.where(np.isfinite(given), given, duration[at])
    links = [_link(files.get(video), beside) for video in ids]
    return {
        "id": ids,
        "duration": np.rint(1000 * np.maximum(duration, 0)).astype(np.int64).tolist(),
        "known": [int(video in listed_ids) for video in ids],
        "file": [link for link, _ in links],
        "exists": [int(exists) for _, exists in links],
        "truth": _flat(true, index, classes, true["start_s"].to_numpy()),
        "predicted": _flat(found, index, classes, -found["score"].to_numpy()),
        "score": _scores_of(found, index),
    }


def _codes(index: pd.Index, values: pd.Series) -> np.ndarray:
    return index.get_indexer(pd.Index(values.astype(str), dtype="object"))


def _order(table: pd.DataFrame, index: pd.Index, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows by video, then key (stable), and where each video's rows begin and end."""
    video = _codes(index, table["video"])
    order = np.lexsort((key, video))
    return order, np.searchsorted(video[order], np.arange(len(index) + 1))


def _flat(table: pd.DataFrame, index: pd.Index, classes: list[str], key: np.ndarray) -> list[list[int]]:
    order, edges = _order(table, index, key)
    start = np.rint(1000 * table["start_s"].to_numpy(dtype=np.float64)).astype(np.int64)
    end = np.rint(1000 * table["end_s"].to_numpy(dtype=np.float64)).astype(np.int64)
    label = _codes(pd.Index(classes, dtype="object"), table["label"])
    rows = np.stack((start, end - start, label), axis=1)[order]  # (N, 3)
    return [rows[a:b].ravel().tolist() for a, b in pairwise(edges)]


def _scores_of(table: pd.DataFrame, index: pd.Index) -> list[list[float]]:
    score = table["score"].to_numpy(dtype=np.float64)
    order, edges = _order(table, index, -score)
    rounded = [float(f"{value:.4g}") for value in score[order].tolist()]
    return [rounded[a:b] for a, b in pairwise(edges)]


def _link(file: str | Path | None, beside: Path) -> tuple[str | None, bool]:
    """A video's address as seen from the report's folder, and whether the file is there now."""
    if file is None:
        return None, False
    path = Path(os.path.abspath(file))
    try:
        relative = Path(os.path.relpath(path, os.path.abspath(beside)))
    except ValueError:  # another drive
        return path.as_uri(), path.is_file()
    # './' keeps a name such as 'http:x' from being read as an address
    return "./" + quote(relative.as_posix(), errors="surrogateescape"), path.is_file()


def _scores(metrics: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """``metrics.json`` with thresholds as numbers and AP as rows (class) x columns (tIoU)."""
    if metrics is None:
        return None
    keys = list(metrics["map"])
    return {
        "tiou": [float(key) for key in keys],
        "map": [metrics["map"][key] for key in keys],
        "average_map": metrics["average_map"],
        "ap": [[label, [values[key] for key in keys]] for label, values in metrics["ap"].items()],
        "counts": metrics["counts"],
        "protocol": metrics.get("protocol"),
    }


def _intervals(intervals: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if intervals is None:
        return None
    return {name: intervals[name] for name in ("average_map", "map", "level", "samples")}


def _recall(recall: ProposalResult | None) -> dict[str, Any] | None:
    if recall is None:
        return None
    return {
        "number": np.round(recall.average_number, 4).tolist(),
        "recall": np.round(recall.average_recall, 5).tolist(),
        "auc": recall.auc,
        "ar": recall.to_dict()["ar"],
    }


def _curve(label: str, recall: Any, precision: Any) -> list[Any]:
    """``[label, recall, precision]``: the last point of every recall, thinned evenly where there are many."""
    x, y = np.asarray(recall, dtype=np.float64), np.asarray(precision, dtype=np.float64)
    if len(x):
        turn = np.flatnonzero(np.append(np.diff(x) != 0, True) | np.append(True, np.diff(x) != 0))
        if len(turn) > CURVE_POINTS:
            turn = turn[np.unique(np.linspace(0, len(turn) - 1, CURVE_POINTS).round().astype(int))]
        x, y = x[turn], y[turn]
    return [str(label), np.round(x, 4).tolist(), np.round(y, 4).tolist()]


def _training(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]] | None:
    """Columns of ``metrics.csv``; what is no finite number becomes null."""
    if not rows:
        return None
    columns = list(dict.fromkeys(str(key) for row in rows for key in row))
    return {column: [_number(row.get(column)) for row in rows] for column in columns}


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _finite(value: Any) -> Any:
    """JSON has no NaN: None instead; numpy's scalars and arrays become Python's."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return _finite(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
