"""Before a training's first epoch: may it begin, or go on, in this folder; and what it writes there first."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tad.annotations import Truth
from tad.detect.preflight import Plan, TrainingSet, shown
from tad.detect.runs import (
    Run,
    describe_differences,
    differing_keys,
    dump_recipe,
    environment,
    read_json,
    remove_run,
    remove_training,
    require_free,
    write_json,
    write_text,
)
from tad.detect.source import StoreSource
from tad.detect.trained_on import check_annotations, described_annotations
from tad.errors import RecipeError, StoreError
from tad.recipe import DetectRecipe, validated
from tad.store import Store
from tad.training.distributed import World

logger = logging.getLogger("tad.detect")
MAY_CHANGE = ("data.workers",)  # keys that a resumed training may have otherwise: they do not touch its result


def may_begin(
    path: Path,
    recipe: DetectRecipe,
    truth: Truth,
    store: Store,
    source: StoreSource,
    *,
    resume: bool,
    overwrite: bool,
) -> DetectRecipe | dict[str, Any] | None:
    """The recipe of the run to go on with, the metrics of one that is finished, or None to begin.

    Raises
    ------
    RecipeError : the folder is taken; the run there has another recipe, or other annotations.
    """
    require_free(path, resume=resume, overwrite=overwrite)
    if not resume or not (path / "features.json").is_file():
        return None
    run = Run.load(path)
    env = read_json(path / "env.json")
    given = recipe.model_dump(mode="json")
    as_given = validated(DetectRecipe, env["recipe_as_given"], where=str(path / "env.json"))  # with keys newer than it
    same = (as_given, source.settled(as_given), run.recipe)  # each is this training
    stored = [one.model_dump(mode="json") for one in same]
    changed = min(([d for d in differing_keys(old, given) if d[0] not in MAY_CHANGE] for old in stored), key=len)
    if changed:
        raise RecipeError(
            f"run {path} cannot be resumed with another recipe: {describe_differences(changed)}. "
            "Give the old values, or train into another folder"
        )
    check_annotations(path, env["annotations"], truth)
    source.check_features(run, store)
    if run.finished:
        logger.info("run %s is finished, there is nothing to resume", path)
        metrics: dict[str, Any] = read_json(path / "metrics.json")
        return metrics
    return run.recipe.model_copy(update={"data": run.recipe.data.model_copy(update={"workers": recipe.data.workers})})


def write_head(
    path: Path,
    recipe: DetectRecipe,
    given: DetectRecipe,
    plan: Plan,
    data: TrainingSet,
    store: Store,
    truth: Truth,
    processes: World,
    *,
    begun: bool,
) -> None:
    """What a run folder says before the first epoch, but for its features; what an earlier run left there goes."""
    if path.is_dir():
        (remove_training if begun else remove_run)(path)
    dump_recipe(path, recipe)
    write_json(path / "classes.json", plan.classes)
    env = environment(device=processes.device, seed=recipe.seed, world=processes.size)
    env |= {
        "store": {"path": str(store.path), "format": store.format},
        "annotations": described_annotations(truth),
        "recipe_as_given": given.model_dump(mode="json"),
    }
    write_json(path / "env.json", env)
    failures = plan.failures + data.failures
    if failures:
        lines = (json.dumps(failure.__dict__, ensure_ascii=False) for failure in failures)
        write_text(path / "failures.jsonl", "\n".join(lines) + "\n")


def check_same_videos(state: Mapping[str, Any], data: TrainingSet, path: Path) -> None:
    """Raise :class:`StoreError` where a run to resume was begun with other videos than those of ``data``."""
    for part, now in (("train", list(data.train)), ("holdout", data.holdout)):
        more, less = sorted(set(now) - set(state[part])), sorted(set(state[part]) - set(now))
        if more or less:
            raise StoreError(
                f"run {path} cannot be resumed: the store's usable videos are not those that it was begun with "
                f"({part}: new {shown(more) or 'none'}; gone {shown(less) or 'none'}). Restore them, or overwrite"
            )
