"""All numbers of a report, under one protocol: what is scored, what is diagnosed and what is shown is the same."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pandas as pd

from tad.annotations import Truth
from tad.evaluate.bootstrap import bootstrap_map
from tad.evaluate.curves import pr_curves
from tad.evaluate.diagnose import diagnose
from tad.evaluate.protocols import evaluate, evaluate_recall, scope
from tad.evaluate.selection import Thresholds, select


def score_report(
    truth: Truth,
    predictions: pd.DataFrame,
    protocol: str | None = None,
    subset: str | None = None,
    tiou: Thresholds | None = None,
    *,
    error_tiou: float = 0.5,
    buckets: str | None = None,
    samples: int = 0,
    seed: int = 0,
    leave_out: Collection[str] = (),
) -> dict[str, Any]:
    """Score detections and return the arguments of :func:`tad.evaluate.report.build_report` that follow from it.

    Parameters
    ----------
    truth, predictions, protocol, subset, tiou, leave_out : as :func:`tad.evaluate.evaluate`.
    error_tiou : overlap at which errors are counted and precision is drawn over recall.
    buckets : limits of the characteristics, as :func:`tad.evaluate.diagnose`; default ``"thumos14"`` under protocols of
        that name, else ``"activitynet"``.
    samples, seed : of a bootstrap over videos, for an interval of the mAP; 0: none.

    Returns
    -------
    ``truth`` and ``predictions`` (those that are scored), ``tiou`` (``error_tiou``), ``metrics``, ``recall``,
    ``curves``, ``diagnosis``, ``intervals``, ``notes``. Without any true segment the tables and a note are all.

    Raises
    ------
    AnnotationError : as :func:`tad.evaluate.evaluate`, but for a truth without segments.
    """
    part = scope(truth, protocol, subset, tiou, leave_out=leave_out)
    excluded = part.truth.videos["video"].isin(list(part.options["leave_out"]))
    listed = part.truth.videos[~excluded]
    if not part.truth.segments["video"].isin(listed["video"]).any():
        note = "the truth has no segment here: nothing is scored, the predictions are shown as they are"
        kept = Truth(listed, part.truth.segments.iloc[:0], truth.path)
        shown = predictions[~predictions["video"].isin(list(part.options["leave_out"]))]
        return {"truth": kept, "predictions": shown, "tiou": error_tiou, "notes": (*part.notes, note)}
    options = {name: value for name, value in part.options.items() if name != "single_precision"}
    chosen = select(part.truth, predictions, labels=True, **options)
    result: dict[str, Any] = {
        "truth": Truth(listed[listed["video"].isin(list(chosen.videos))], chosen.truth, truth.path),
        "predictions": chosen.predictions,
        "tiou": error_tiou,
        "metrics": evaluate(truth, predictions, protocol, subset, tiou, leave_out=leave_out).to_dict(),
        "recall": evaluate_recall(truth, predictions, protocol, subset, leave_out=leave_out),
        "curves": pr_curves(part.truth, predictions, error_tiou, **part.options),
    }
    if samples:
        drawn = bootstrap_map(part.truth, predictions, part.tiou, samples=samples, seed=seed, **part.options)
        result["intervals"] = drawn.to_dict()
    if (chosen.truth["end_s"] > chosen.truth["start_s"]).any():  # error analysis leaves out truth of zero length
        named = buckets or ("thumos14" if protocol is not None and protocol.startswith("thumos14") else "activitynet")
        options.pop("drop_zero_length", None)
        analysis = diagnose(part.truth, predictions, tiou=error_tiou, buckets=named, **options)
        known = set(result["metrics"]["notes"])
        result |= {"diagnosis": analysis.to_dict(), "notes": tuple(n for n in analysis.notes if n not in known)}
    return result
