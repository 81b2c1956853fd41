"""One HTML file out of the page's parts and the data."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import pandas as pd

from tad.annotations import Truth
from tad.annotations._files import write_atomically
from tad.evaluate.proposals import ProposalResult
from tad.evaluate.report.data import Curves, report_data

SCRIPTS = ("model.js", "charts.js", "overview.js", "timeline.js", "videos.js", "page.js")  # in this order


def build_report(
    *,
    truth: Truth | pd.DataFrame | None,
    predictions: pd.DataFrame,
    out: str | Path,
    title: str = "Temporal action detection",
    videos: Mapping[str, str | Path] | None = None,
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
) -> Path:
    """Write ``report.html``: one file that asks the network for nothing and opens from disk.

    What is not given is not shown: predictions alone make a report too. :func:`tad.evaluate.report.score_report` makes
    ``metrics``, ``recall``, ``curves`` and ``diagnosis``.

    Parameters
    ----------
    truth : segments ``video, start_s, end_s, label``, or a :class:`~tad.annotations.Truth`, whose videos without a
        segment are then listed too and whose durations are used.
    predictions : ``video, start_s, end_s, label, score``.
    out : the file; it is replaced at once when it is complete.
    title : heading.
    videos : file of each video id. They are linked relative to ``out``, never embedded; they need not be there.
    tiou : overlap at which the page first calls a prediction right; the one of ``curves`` and ``diagnosis``.
    metrics : what ``metrics.json`` holds (:meth:`tad.evaluate.DetectionResult.to_dict`).
    recall : of proposals.
    curves : recall and precision by class, both of equal length.
    diagnosis : what kinds of errors there are (``Diagnosis.to_dict()``).
    intervals : of the mAP (``Intervals.to_dict()``).
    training : rows of a run's ``metrics.csv``; the column ``epoch`` is the axis.
    about : facts for the heading, such as the run and the files.
    recipe : text of the run's recipe.
    notes : sentences that a reader of the scores should know, after those of ``metrics``.

    Raises
    ------
    AnnotationError : a table lacks columns or holds missing or infinite values.
    AnnotationError : ``out`` cannot be written.
    """
    path = Path(out)
    data = report_data(
        truth=truth,
        predictions=predictions,
        title=title,
        files=videos,
        beside=path.parent,
        tiou=tiou,
        metrics=metrics,
        recall=recall,
        curves=curves,
        diagnosis=diagnosis,
        intervals=intervals,
        training=training,
        about=about,
        recipe=recipe,
        notes=notes,
    )
    write_atomically(path, iter([page(data)]))
    return path


def page(data: Mapping[str, Any]) -> str:
    """The page for what :func:`tad.evaluate.report.report_data` returns."""
    folder = resources("tad.evaluate.report")
    parts = {
        "title": html.escape(str(data["title"]).encode("utf-8", "replace").decode("utf-8")),
        "style": (folder / "page.css").read_text(encoding="utf-8"),
        "script": "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "data": script_json(data),
    }
    template = (folder / "page.html").read_text(encoding="utf-8")
    # In one pass, so that a title which looks like a placeholder stays a title.
    return re.sub(r"\{\{(title|style|script|data)\}\}", lambda match: parts[match.group(1)], template)


def script_json(data: Any) -> str:
    """JSON that may stand inside ``<script>``: ASCII only, and without a character that could end or open a tag."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
