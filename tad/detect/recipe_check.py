"""A detector's recipe before it is trained: with all defaults in it, and held against a store and annotations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from tad.annotations import Truth, read_truth
from tad.detect.align import check_needs
from tad.detect.detectors import DETECTORS, build_detector
from tad.detect.interface import Detector
from tad.detect.preflight import (
    Failure,
    Plan,
    check_streams,
    plan_training,
    read_training,
    shown,
    training_subset,
)
from tad.detect.prepare import check_class_scores
from tad.detect.prepare import check_recipe as check_sources
from tad.detect.train import resolved
from tad.detect.windows import unused_keys
from tad.errors import TadError, did_you_mean
from tad.progress import ProgressFactory, silent
from tad.recipe import ClassesRecipe, DetectRecipe
from tad.store import Store, open_store
from tad.training.distributed import pick_device
from tad.training.optim import check_training

T = TypeVar("T")
# of a stream that is not there and of segments that are not known, to see whether the model's options are right
SOME_CHANNELS = 8
SOME_LENGTHS_ROWS = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])


@dataclass
class RecipeCheck:
    """What would happen: ``problems`` that stop the training, ``notes`` of what it would say, numbers of it."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def attempt(self, work: Callable[[], T]) -> T | None:
        """What ``work`` returns, or None and one more problem."""
        try:
            return work()
        except TadError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return None

    def left_out(self, what: str, failures: Sequence[Failure]) -> None:
        """A note of the videos of which ``what`` is true, if there are any."""
        if failures:
            videos = shown([failure.video for failure in failures])
            told = f"{len(failures)} videos {what} and would be left out: {videos}; the first: {failures[0]}"
            self.notes.append(told)


def full_recipe(recipe: DetectRecipe) -> DetectRecipe:
    """``recipe`` with every option of its detector in ``model``, defaults where it has none; other keys have theirs.

    Raises :class:`RecipeError` for an unknown detector or unknown options.
    """
    channels = dict.fromkeys(recipe.streams, SOME_CHANNELS)
    build_detector(recipe.detector, channels=channels, classes=1, **_tried(recipe).model)
    parameters = inspect.signature(DETECTORS[recipe.detector]).parameters
    defaults = {key: value.default for key, value in parameters.items() if key not in ("channels", "classes")}
    return recipe.model_copy(update={"model": {**defaults, **recipe.model}})


def check_recipe(
    recipe: DetectRecipe,
    *,
    store: Store | str | Path,
    annotations: Truth | str | Path,
    read: bool = True,
    device: str | None = None,
    progress: ProgressFactory | None = None,
) -> RecipeCheck:
    """Everything that a training settles before its first step, all problems at once instead of the first.

    ``read`` also reads the features of all training and held-out videos, as the training will: what is broken, and how
    many windows there are, is known only then.
    """
    check = RecipeCheck()
    if isinstance(store, Store):
        _check(check, recipe, store, annotations, read, device, progress)
        return check
    opened = check.attempt(lambda: open_store(store))
    if opened is None:
        _check(check, recipe, None, annotations, read, device, progress)
        return check
    with opened:
        _check(check, recipe, opened, annotations, read, device, progress)
    return check


def _check(
    check: RecipeCheck,
    recipe: DetectRecipe,
    store: Store | None,
    annotations: Truth | str | Path,
    read: bool,
    device: str | None,
    progress: ProgressFactory | None,
) -> None:
    truth = annotations if isinstance(annotations, Truth) else check.attempt(lambda: read_truth(annotations))
    check.attempt(lambda: check_training(recipe.train, device=pick_device(device)))
    if recipe.detector not in DETECTORS:
        check.problems.append(f"unknown detector '{recipe.detector}'.{did_you_mean(recipe.detector, DETECTORS)}")
    plan = None
    if store is not None:
        _check_sources(check, recipe, store)
        plan = _plan(check, recipe, store, truth)
    detector = _build(check, recipe, plan, store) if recipe.detector in DETECTORS else None
    if detector is not None:
        check.notes += unused_keys(recipe, detector)
    if plan is None or detector is None or store is None or check.problems or not read:
        return
    plan_, store_, needs = plan, store, detector.needs
    data = check.attempt(lambda: read_training(plan_, recipe, store_, needs, progress or silent))
    if data is not None:
        check.counts |= data.counts
        check.notes += data.messages
        check.left_out("cannot be read", data.failures)


def _check_sources(check: RecipeCheck, recipe: DetectRecipe, store: Store) -> None:
    """Class scores, and the proposals' run: the second only comes up where the first is right."""
    check.attempt(lambda: check_sources(recipe, store))
    check.attempt(lambda: check_sources(recipe.model_copy(update={"classes": ClassesRecipe()}), store))


def _plan(check: RecipeCheck, recipe: DetectRecipe, store: Store, truth: Truth | None) -> Plan | None:
    """The plan, where every stream is there; with the streams that are there its problems come up all the same."""
    there = []
    for stream in recipe.streams:
        before = len(check.problems)
        check.attempt(lambda stream=stream: check_streams(store, [stream]))  # type: ignore[misc]
        if len(check.problems) == before:
            there.append(stream)
    if truth is None:
        return None
    if not there:
        name = check.attempt(lambda: training_subset(truth, recipe.data.train_subset))
        if name is not None:
            check.attempt(lambda: truth.subset(name))
        return None
    plan = check.attempt(lambda: plan_training(recipe.model_copy(update={"streams": tuple(there)}), store, truth))
    if plan is None:
        return None
    check.counts |= {"train_videos": len(plan.train), "holdout_videos": len(plan.holdout)}
    check.counts |= {"missing_videos": len(plan.failures), "classes": len(plan.classes)}
    check.notes += plan.messages
    check.left_out("lack features", plan.failures)
    if recipe.detector in DETECTORS:
        scored = check.attempt(lambda: check_class_scores(recipe, classes=plan.classes, holdout=plan.holdout))
        check.notes += scored or []
    return plan if len(there) == len(recipe.streams) else None


def _build(check: RecipeCheck, recipe: DetectRecipe, plan: Plan | None, store: Store | None) -> Detector | None:
    """The detector; where there is no plan, one of made-up widths, to see what is wrong with its options."""

    def build() -> Detector:
        channels, classes = dict.fromkeys(recipe.streams, SOME_CHANNELS), 1
        if plan is not None and store is not None:
            filled, channels, classes = resolved(recipe, plan, store), plan.channels, len(plan.classes)
        else:
            filled = _tried(recipe)
        detector = build_detector(recipe.detector, channels=channels, classes=classes, **filled.model)
        check_needs(detector.needs, detector=recipe.detector)
        return detector

    detector = check.attempt(build)
    if detector is not None and plan is not None:
        check.counts["parameters"] = sum(parameter.numel() for parameter in detector.parameters())
    return detector


def _tried(recipe: DetectRecipe) -> DetectRecipe:
    """The recipe with what its detector leaves to the data filled in for made-up segments."""
    fill = getattr(DETECTORS.get(recipe.detector), "resolve", None)
    return recipe if fill is None else recipe.model_copy(update={"model": fill(recipe.model, SOME_LENGTHS_ROWS)})
