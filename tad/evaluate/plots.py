"""The report's figures with matplotlib, for papers and slides; matplotlib is imported only when one is drawn.

Every function returns a :class:`matplotlib.figure.Figure` and touches no global state; text is drawn without LaTeX.
"""

from __future__ import annotations

import importlib.util
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tad.annotations import Truth, check_segments
from tad.errors import AnnotationError, TadError, did_you_mean
from tad.evaluate.matching import match
from tad.evaluate.proposals import ProposalResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart with every common kind of colour vision.
BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
KIND_COLOURS = {
    "true_positive": BLUE,
    "double_detection": "#56b4e9",
    "wrong_label": "#cc79a7",
    "localization": ORANGE,
    "confusion": VERMILION,
    "background": "#8a9299",
}
SERIES = (BLUE, ORANGE, GREEN, "#cc79a7", VERMILION, "#56b4e9", "#8f8a00", "#8a9299")
SUFFIXES = (".png", ".svg", ".pdf")


def require_matplotlib() -> None:
    """Raise :class:`TadError` with what to install where matplotlib is absent."""
    if importlib.util.find_spec("matplotlib") is None:
        raise TadError("figures need matplotlib: pip install 'tad-pipeline[report]' (tad report needs nothing more)")


def save(figure: Figure, path: str | Path, *, dpi: int = 160) -> Path:
    """Write a figure; the suffix, ``.png``, ``.svg`` or ``.pdf``, says as what. Equal figures give equal files.

    Raises
    ------
    TadError : another suffix, or the file cannot be written.
    """
    import matplotlib

    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in SUFFIXES:
        raise TadError(f"{str(path)!r}: figures are written as {', '.join(SUFFIXES)}")
    partial = target.with_name(f".{uuid.uuid4().hex}{suffix}")
    dated: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(suffix, {})
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with matplotlib.rc_context({"svg.hashsalt": "tad", "svg.fonttype": "none"}):
                figure.savefig(partial, dpi=dpi, metadata=dated)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise TadError(f"the figure {target} cannot be written: {error.strerror or error}") from error
    return target


def plot_map(score: Mapping[float, float], intervals: Mapping[float, tuple[float, float]] | None = None) -> Figure:
    """mAP over tIoU, both in 0 ... 1; ``intervals`` by tIoU are drawn as bars."""
    figure, axes = _figure("tIoU", "mAP in %")
    levels = sorted(score)
    axes.plot(levels, [100 * score[level] for level in levels], "o-", color=BLUE)
    for level, (low, high) in (intervals or {}).items():
        axes.plot([level, level], [100 * low, 100 * high], color=BLUE, alpha=0.5)
    axes.set_ylim(0, 100)
    axes.set_xticks(levels)
    return figure


def plot_pr(curves: Mapping[Any, tuple[Any, Any]], *, tiou: float = 0.5) -> Figure:
    """Precision over recall by class; up to eight classes are named, of more the mean curve stands out."""
    figure, axes = _figure("recall in %", "precision in %", title=f"tIoU {tiou:g}")
    few = len(curves) <= len(SERIES)
    for index, (label, (recall, precision)) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": SERIES[index], "label": _plain(label)} if few else {"color": "0.6", "lw": 0.6}
        axes.plot(100 * np.asarray(recall), 100 * np.asarray(precision), drawstyle="steps-pre", **style)
    grid = np.linspace(0, 1, 101)
    if curves:
        envelopes = [
            _envelope(np.asarray(recall), np.asarray(precision), grid) for recall, precision in curves.values()
        ]
        axes.plot(
            100 * grid,
            100 * np.mean(envelopes, axis=0),
            color="black",
            lw=2,
            drawstyle="steps-pre",
            label="mean over classes",
        )
        axes.legend(frameon=False, fontsize="small")
    axes.set(xlim=(0, 100), ylim=(0, 102))
    return figure


def plot_recall(result: ProposalResult) -> Figure:
    """AR over AN, with AUC in the title."""
    figure, axes = _figure("AN, proposals a video", "AR in %", title=f"AUC {100 * result.auc:.2f} %")
    axes.plot(result.average_number, 100 * result.average_recall, color=GREEN)
    axes.fill_between(result.average_number, 100 * result.average_recall, color=GREEN, alpha=0.12)
    axes.set(xlim=(0, float(result.average_number[-1])), ylim=(0, 100))
    return figure


def plot_errors(diagnosis: Mapping[str, Any]) -> Figure:
    """Kinds of predictions by their rank, and the mAP that each kind costs, from ``Diagnosis.to_dict()``."""
    figure, (left, right) = _figures(1, 2, width=10.0, height=3.8)
    rows = diagnosis["false_positives"]["by_limit"]
    bottom = np.zeros(len(rows))
    for kind, colour in KIND_COLOURS.items():
        values = np.array([100 * _number(row[kind]) for row in rows])
        left.bar([f"{row['g']}G" for row in rows], values, bottom=bottom, color=colour, label=kind.replace("_", " "))
        bottom += values
    left.set_ylabel("predictions in %")
    left.set_xlabel("predictions of each class by rank, G: its true segments")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize="small"
    )
    gain = sorted(diagnosis["false_positives"]["gain"].items(), key=lambda item: _number(item[1]))
    points = [100 * _number(value) for _, value in gain]
    colours = [KIND_COLOURS.get(kind, "0.5") for kind, _ in gain]
    drawn = right.barh([kind.replace("_", " ") for kind, _ in gain], points, color=colours)
    right.bar_label(drawn, [f"{value:+.1f}" for value in points], padding=3)
    right.set_xlabel("normalised mAP gained without them, in points")
    right.margins(x=0.15)
    return figure


def plot_sensitivity(diagnosis: Mapping[str, Any]) -> Figure:
    """Normalised mAP by characteristic of the true segments; dashed: of all."""
    values = {name: rows for name, rows in diagnosis["sensitivity"].items() if name != "overall"}
    return _panels(values, "ap", "normalised mAP in %", diagnosis["sensitivity"]["overall"], BLUE)


def plot_missed(diagnosis: Mapping[str, Any]) -> Figure:
    """Share of the true segments that are missed, by characteristic; dashed: of all."""
    return _panels(diagnosis["false_negatives"], "share", "missed in %", diagnosis.get("missed"), VERMILION)


def plot_confusion(diagnosis: Mapping[str, Any]) -> Figure:
    """Confusion of classes: rows truth, columns predictions, shaded by the share of a row."""
    names, matrix = diagnosis["confusion"]["classes"], np.asarray(diagnosis["confusion"]["matrix"], dtype=np.float64)
    size = min(14.0, max(3.5, 1.8 + 0.34 * len(names)))
    figure, (axes,) = _figures(1, 1, width=size, height=size)
    sums = matrix.sum(axis=1, keepdims=True)
    share = np.divide(matrix, sums, out=np.zeros_like(matrix), where=sums > 0)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if len(names) <= 60:
        axes.set_xticks(range(len(names)), [_plain(name) for name in names], rotation=90)
        axes.set_yticks(range(len(names)), [_plain(name) for name in names])
    if len(names) <= 25:
        for i, j in np.argwhere(matrix > 0):
            axes.text(
                j, i, f"{matrix[i, j]:g}", ha="center", va="center", color="white" if share[i, j] > 0.55 else "black",
                fontsize="x-small",
            )  # fmt: skip
    return figure


def plot_training(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Losses and mAP over the epochs, out of the rows of ``metrics.csv``; empty cells are bridged.

    Raises
    ------
    TadError : no row.
    """
    if not rows:
        raise TadError("there is no finished epoch to draw")
    table = pd.DataFrame([dict(row) for row in rows]).apply(pd.to_numeric, errors="coerce")
    epochs = table["epoch"] if "epoch" in table else pd.Series(np.arange(1, len(table) + 1))
    figure, (left, right) = _figures(1, 2, width=9.0, height=3.4)
    chosen = {left: [n for n in table if n.startswith("loss")], right: [n for n in table if "map" in n.split("_")]}
    for axes, names in chosen.items():
        for index, name in enumerate(names):
            known = table[name].notna()
            values = table[name][known] * (1 if axes is left else 100)
            style: dict[str, Any] = {"color": SERIES[index % len(SERIES)], "ls": "-" if index < len(SERIES) else "--"}
            axes.plot(
                epochs[known], values, marker="o" if known.sum() <= 12 else None, ms=3, label=_plain(name), **style
            )
        axes.set_xlabel("epoch")
        if names:
            axes.legend(frameon=False, fontsize="small")
    left.set_ylabel("loss")
    right.set_ylabel("mAP in %")
    return figure


def plot_timeline(
    truth: Truth | pd.DataFrame | None,
    predictions: pd.DataFrame,
    video: str,
    *,
    min_score: float | None = None,
    tiou: float = 0.5,
) -> Figure:
    """Truth and predictions of one video, a row a class: blue is found or right at ``tiou``, open orange is not.

    Predictions below ``min_score`` take no part; of the others the surer are drawn stronger. With ``truth=None`` all
    predictions are blue.

    Raises
    ------
    AnnotationError : neither table knows the video.
    """
    from matplotlib.patches import Rectangle

    tables = truth.segments if isinstance(truth, Truth) else truth
    empty = pd.DataFrame({"video": [], "start_s": [], "end_s": [], "label": []})
    true = check_segments(empty if tables is None else tables, what="the truth", label=True, ordered=True)
    found = check_segments(predictions, what="the predictions", label=True, score=True)
    known = {*true["video"], *found["video"], *(truth.videos["video"] if isinstance(truth, Truth) else ())}
    if video not in known:
        raise AnnotationError(
            f"no truth and no prediction is of video {video!r}.{did_you_mean(video, map(str, known))}"
        )
    true = true[true["video"] == video].reset_index(drop=True)
    found = found[(found["video"] == video) & (found["score"] >= (-math.inf if min_score is None else min_score))]
    found = found.sort_values("score", ascending=False, kind="stable").reset_index(drop=True)
    classes = list(dict.fromkeys([*true.sort_values("start_s")["label"], *found["label"]]))
    index = pd.Index(classes, dtype="object")
    labels = [index.get_indexer(part["label"].astype("object")) for part in (true, found)]
    spans = [part[["start_s", "end_s"]].to_numpy() for part in (true, found)]
    taken = match(labels[0], spans[0], labels[1], spans[1], found["score"].to_numpy(), (tiou,))[0]
    hit = np.isin(np.arange(len(true)), taken[taken >= 0])
    figure, (axes,) = _figures(1, 1, width=10.0, height=1.1 + 0.55 * max(1, len(classes)))
    low, high = (found["score"].min(), found["score"].max()) if len(found) else (0.0, 1.0)
    for row, (start, end) in enumerate(spans[0]):
        at, colour = labels[0][row] - 0.4, BLUE if hit[row] else VERMILION
        axes.add_patch(Rectangle((start, at), end - start, 0.36, ec=colour, fc=colour, fill=bool(hit[row])))
    for row, (start, end) in reversed(list(enumerate(spans[1]))):  # the surest on top
        right = truth is None or bool(taken[row] >= 0)
        strength = 0.4 + 0.6 * (found["score"][row] - low) / ((high - low) or 1.0)
        at, colour = labels[1][row] + 0.02, BLUE if right else ORANGE
        axes.add_patch(Rectangle((start, at), end - start, 0.36, ec=colour, fc=colour, fill=right, alpha=strength))
    axes.set_yticks(range(len(classes)), [_plain(name) for name in classes])
    axes.set_ylim(len(classes) - 0.5 if classes else 0.5, -0.5)
    ends = [*spans[0][:, 1].tolist(), *spans[1][:, 1].tolist()]
    if isinstance(truth, Truth):
        ends += truth.videos.loc[truth.videos["video"] == video, "duration_s"].dropna().tolist()
    axes.set_xlim(0, max([*ends, 1e-3]))
    axes.set_xlabel("seconds")
    axes.set_title(f"{_plain(video)}: truth above, predictions below", fontsize="medium", loc="left")
    return figure


# What is drawn out of the result of ``score_report``, by the name that ``tad plot`` has for it.
PLOTS: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
    "map": lambda given: plot_map({float(key): value for key, value in given["metrics"]["map"].items()}),
    "pr": lambda given: plot_pr(given["curves"], tiou=given["tiou"]),
    "recall": lambda given: plot_recall(given["recall"]),
    "errors": lambda given: plot_errors(_diagnosis(given)),
    "sensitivity": lambda given: plot_sensitivity(_diagnosis(given)),
    "missed": lambda given: plot_missed(_diagnosis(given)),
    "confusion": lambda given: plot_confusion(_diagnosis(given)),
}


def _diagnosis(given: Mapping[str, Any]) -> Mapping[str, Any]:
    if "diagnosis" not in given:
        raise TadError("there is no error analysis: all true segments have zero length")
    analysis: Mapping[str, Any] = given["diagnosis"]
    return analysis


def _figures(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, tuple[Axes, ...]]:
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    every = tuple(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, every


def _figure(x: str, y: str, *, title: str = "") -> tuple[Figure, Axes]:
    figure, (axes,) = _figures(1, 1, width=4.8, height=3.6)
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.25)
    return figure, axes


def _panels(
    values: Mapping[str, Sequence[Mapping[str, Any]]], key: str, name: str, overall: float | None, colour: str
) -> Figure:
    columns = min(3, max(1, len(values)))
    rows = max(1, math.ceil(len(values) / columns))
    figure, every = _figures(rows, columns, width=3.2 * columns, height=2.4 * rows)
    for axes in every[len(values) :]:
        axes.set_visible(False)
    for axes, (characteristic, buckets) in zip(every, values.items(), strict=False):
        heights = [100 * _number(bucket[key]) for bucket in buckets]
        drawn = axes.bar([str(bucket["bucket"]) for bucket in buckets], heights, color=colour)
        axes.bar_label(
            drawn, ["–" if bucket[key] is None else f"{v:.0f}" for bucket, v in zip(buckets, heights, strict=True)]
        )
        if overall is not None:
            axes.axhline(100 * overall, color="black", ls="--", lw=0.8)
        axes.set_title(characteristic.replace("_", " "), fontsize="medium")
        axes.set_ylabel(name, fontsize="small")
        axes.margins(y=0.15)
    return figure


def _envelope(recall: np.ndarray, precision: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The best precision at each recall of the grid or a higher one; 0 behind the last."""
    if not len(recall):
        return np.zeros(len(grid))
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return best[np.searchsorted(recall, grid - 1e-9)]


def _number(value: float | None) -> float:
    return 0.0 if value is None or not math.isfinite(value) else float(value)


def _plain(text: Any) -> str:
    """A name as it is: ``$`` would start mathematics, and a leading underscore hides an entry of a legend."""
    return str(text).lstrip("_").replace("$", r"\$")
