"""A detector's run: whether it is whole, and fits the truth and the features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tad.annotations import Truth
from tad.doctor.checks import Check, some
from tad.doctor.features import check_streams_of_run
from tad.errors import RecipeError, WeightsError, did_you_mean

if TYPE_CHECKING:
    from tad.detect.runs import Run
    from tad.store import Store

GROUP = "run"


def check_run(path: str | Path, truth: Truth | None, store: Store | None) -> list[Check]:
    """Raises :class:`RecipeError` for a folder that is no run, or whose recipe, classes or features are malformed."""
    from tad.detect.runs import Run

    run = Run.load(path)
    state = "finished" if run.finished else "not finished"
    advice = "" if run.finished else "go on with tad train-detector ... --resume"
    about = f"{run.recipe.detector} on {', '.join(run.recipe.streams)}, {len(run.classes)} classes, {state}"
    checks = [Check(GROUP, "state", "ok" if run.finished else "warn", about, advice)]
    checks += _metrics(run)
    checks += _network(run)
    if truth is not None:
        checks += _classes(run, truth)
    return checks + ([] if store is None else check_streams_of_run(run, store))


def _metrics(run: Run) -> list[Check]:
    from tad.detect.runs import read_json

    if not run.finished:
        return []
    try:
        metrics = read_json(run.path / "metrics.json", of="detector's run")
    except RecipeError as error:
        what = str(error)
    else:
        if isinstance(metrics, dict):
            return []
        what = f"run {run.path}: metrics.json must hold an object, it holds {type(metrics).__name__}"
    return [Check(GROUP, "metrics", "fail", what, "remove it, and go on with tad train-detector ... --resume")]


def _network(run: Run) -> list[Check]:
    """Whether the detector can be built and its weights land in it, as detection will do."""
    from tad.detect.detectors import DETECTORS

    name = run.recipe.detector
    if name not in DETECTORS:
        text = f"unknown detector '{name}'.{did_you_mean(name, DETECTORS)}"
        return [Check(GROUP, "detector", "fail", text, "made with another version of tad?")]
    if not run.finished and not (run.path / "best.safetensors").exists():
        text = f"run {run.path} has no checkpoint yet: nothing can be detected with it"
        return [Check(GROUP, "weights", "warn", text)]
    try:
        run.build("best")
    except WeightsError as error:
        return [Check(GROUP, "weights", "fail", str(error), "copy the file again, or train again")]
    except (RecipeError, TypeError, ValueError) as error:  # values that a network's own arithmetic refuses
        return [Check(GROUP, "detector", "fail", f"run {run.path}: {name} cannot be built: {error}")]
    return [Check(GROUP, "weights", "ok", "best.safetensors fits the network of recipe.yaml")]


def _classes(run: Run, truth: Truth) -> list[Check]:
    unknown = sorted(set(truth.classes) - set(run.classes))
    never = sorted(set(run.classes) - set(truth.classes))
    if unknown:
        text = f"{len(unknown)} classes of the annotations were not trained: {some(unknown)}"
        return [Check(GROUP, "classes", "warn", text, "their segments can only be missed; train again")]
    if never:
        return [Check(GROUP, "classes", "note", f"{len(never)} trained classes do not occur: {some(never)}")]
    return [Check(GROUP, "classes", "ok", f"the same {len(run.classes)} classes as the annotations")]
