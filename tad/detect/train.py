"""The one trainer of all detectors: a recipe, a store and annotations in, a run folder out."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tad.annotations import Truth, read_truth
from tad.detect.align import check_needs, feature_of
from tad.detect.data import EpochLoader, Step, VideoDataset, epoch_steps, seeded
from tad.detect.detectors import build_detector
from tad.detect.distributed import World, world
from tad.detect.infer import decoded, readable, suppressed_table
from tad.detect.interface import Batch, Detector, LevelSpec
from tad.detect.optim import AveragedWeights, build_optimizer, check_training, lr_factor, set_lr
from tad.detect.preflight import Failure, Plan, TrainingSet, plan_training, read_training, shown
from tad.detect.runs import (
    Run,
    describe_differences,
    differing_keys,
    dump_recipe,
    environment,
    now_text,
    read_state,
    remove_run,
    require_free,
    run_state,
    sha256_of,
    write_csv,
    write_json,
    write_state,
    write_text,
    write_weights,
)
from tad.errors import RecipeError, StoreError, TadError
from tad.evaluate import detection_map
from tad.progress import ProgressFactory, silent
from tad.recipe import DetectRecipe
from tad.store import Store, open_store

logger = logging.getLogger("tad.detect")
TIOU = (0.3, 0.4, 0.5, 0.6, 0.7)  # whose average mAP on the held-out videos chooses the checkpoint
AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}
MAY_CHANGE = ("data.workers",)  # keys that a resumed training may have otherwise: they do not touch its result


def train_detector(
    recipe: DetectRecipe,
    *,
    store: Store | str | Path,
    annotations: Truth | str | Path,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    progress: ProgressFactory | None = None,
) -> dict[str, Any]:
    """Train a detector on stored features and write its run folder (see :mod:`tad.detect.runs`).

    Started by ``torchrun`` it trains in all its processes together: each takes its share of every batch, so that the result
    does not depend on their number but for rounding, as long as the detector's loss is a mean over videos and draws nothing
    at random.

    Parameters
    ----------
    recipe : what to train, on what, how.
    store : the features, open or where they are.
    annotations : the truth, read or where it is.
    out : the folder to write; it may exist if it is empty.
    resume : go on where the run in ``out`` stopped, to the same weights that it would have had without the stop. A finished
        run is left as it is; where there is none yet, training begins.
    overwrite : replace the run that is there.
    device : ``cpu``, ``cuda``, ``cuda:1``; by default CUDA when there is one.
    progress : shows how far it is (see :mod:`tad.progress`).

    Returns
    -------
    What ``metrics.json`` holds.

    Raises
    ------
    RecipeError : a recipe that does not fit together or differs from that of the run to resume; a folder that is taken.
    StoreError, AnnotationError : streams, videos or segments that are missing; see :mod:`tad.detect.preflight`.
    TadError : the loss is no longer finite.
    """
    if isinstance(store, (str, Path)):
        with open_store(store) as opened:
            return train_detector(
                recipe, store=opened, annotations=annotations, out=out, resume=resume, overwrite=overwrite, device=device,
                progress=progress,
            )  # fmt: skip
    truth = annotations if isinstance(annotations, Truth) else read_truth(annotations)
    path = Path(out)
    with world(device) as processes:
        check_training(recipe.train, device=processes.device)
        outcome = processes.on_first(lambda: _may_begin(path, recipe, truth, store, resume=resume, overwrite=overwrite))
        if isinstance(outcome, dict):
            return outcome
        show = progress if progress is not None and processes.first else silent
        return _train(outcome, given=recipe, store=store, truth=truth, path=path, processes=processes, progress=show)


def _may_begin(
    path: Path, recipe: DetectRecipe, truth: Truth, store: Store, *, resume: bool, overwrite: bool
) -> DetectRecipe | dict[str, Any]:
    """The recipe to train (that of the run, when it is resumed), or the metrics of a run that is finished."""
    require_free(path, resume=resume, overwrite=overwrite)
    if not resume or not (path / "features.json").is_file():
        return recipe
    run = Run.load(path)
    env = read_json(path / "env.json")
    given = recipe.model_dump(mode="json")
    stored = [env["recipe_as_given"], run.recipe.model_dump(mode="json")]  # either is the same training
    changed = min(([d for d in differing_keys(old, given) if d[0] not in MAY_CHANGE] for old in stored), key=len)
    if changed:
        raise RecipeError(
            f"run {path} cannot be resumed with another recipe: {describe_differences(changed)}. "
            "Give the old values, or train into another folder"
        )
    if env["annotations"]["sha256"] != _sha256_of(truth):
        raise RecipeError(f"run {path} cannot be resumed: annotations {truth.path} are not those that it was begun with")
    check_same_features(run, store)
    if run.finished:
        logger.info("run %s is finished, there is nothing to resume", path)
        metrics: dict[str, Any] = read_json(path / "metrics.json")
        return metrics
    return run.recipe.model_copy(update={"data": run.recipe.data.model_copy(update={"workers": recipe.data.workers})})


def _train(
    recipe: DetectRecipe,
    *,
    given: DetectRecipe,
    store: Store,
    truth: Truth,
    path: Path,
    processes: World,
    progress: ProgressFactory,
) -> dict[str, Any]:
    resuming = processes.on_first(lambda: (path / "resume.pt").is_file() and recipe is not given)
    plan = plan_training(recipe, store, truth)
    _seed_all(recipe.seed)
    detector = build_detector(recipe.detector, channels=plan.channels, classes=len(plan.classes), **recipe.model)
    check_needs(detector.needs, detector=recipe.detector)
    data = read_training(plan, recipe, store, detector.needs, progress)
    if len(set(processes.gathered((tuple(data.train), tuple(data.holdout))))) > 1:
        raise StoreError(f"store {store.path}: not every process could read the same videos; run 'tad store verify'")
    trainer = Trainer(detector.to(processes.device), recipe.train, processes)
    state = read_state(path / "resume.pt") if resuming else None
    if state is not None:
        _check_same_videos(state, data, path)
        trainer.load_state_dict(state)
    else:
        _seed_all(recipe.seed, processes.rank)
        processes.on_first(lambda: _write_head(path, recipe, given, plan, data, store, truth, processes))
    log = _Log(path / "log.txt" if processes.first else None)
    for message in [*plan.messages, *data.messages, *(f"left out: {f}" for f in plan.failures + data.failures)]:
        log(message)
    log(f"{'resumed after' if state else 'begins:'} epoch {trainer.epoch} of {recipe.train.epochs}, {data.counts}")
    try:
        _epochs(trainer, recipe, plan, data, store, path, log, progress)
    except KeyboardInterrupt:
        log(f"interrupted in epoch {trainer.epoch + 1}; resume goes on from its beginning")
        raise
    except TadError as error:
        log(f"stopped: {error}")
        raise
    metrics = _metrics(trainer, recipe, data)
    processes.on_first(lambda: write_json(path / "metrics.json", metrics))
    log(f"finished: best epoch {metrics['best_epoch']}, average mAP on held-out videos {metrics['average_map']}")
    return metrics


class Trainer:
    """A detector while it learns: its optimizer, averaged weights, and how far it is."""

    def __init__(self, detector: Detector, recipe: TrainRecipe, processes: World) -> None:
        self.detector, self.recipe, self.processes = detector, recipe, processes
        processes.copy_from_first(iter([*detector.parameters(), *detector.buffers()]))
        self.parameters = [p for p in detector.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(detector, recipe)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=recipe.precision == "fp16")
        self.average = None if recipe.ema is None else AveragedWeights(detector, recipe.ema)
        self.epoch = 0  # finished epochs
        self.history: list[dict[str, Any]] = []  # one row of metrics.csv each
        self.best: dict[str, Any] | None = None

    @property
    def judged(self) -> nn.Module:
        """The module whose weights are evaluated and kept: the averaged one with EMA."""
        return self.detector if self.average is None else self.average.module

    def step(self, step: Step, batches: Iterator[Batch | None]) -> dict[str, float]:
        """One optimizer step over the batches of ``step``; returns the loss terms summed over this process's videos.

        A batch of n videos weighs n / (videos of the step, in all processes), so that neither accumulation nor the number of
        processes nor a short last batch changes what a video counts.
        """
        sums: dict[str, float] = {}
        precision = AUTOCAST.get(self.recipe.precision)
        for _ in step.batches:
            batch = next(batches)
            if batch is None:
                continue
            batch = batch.to(self.processes.device)
            with torch.autocast(self.processes.device.type, dtype=precision, enabled=precision is not None):
                terms = self.detector.loss(self.detector(batch), batch.targets or [])
            loss = torch.stack([term.float() for term in terms.values()]).sum()
            values = torch.stack([term.detach().float() for term in terms.values()]).tolist()
            if not np.isfinite(values).all():
                described = ", ".join(f"{name}={value:g}" for name, value in zip(terms, values, strict=True))
                raise self._diverged(f"the loss is not finite ({described}) on videos {', '.join(batch.videos)}")
            if loss.requires_grad:
                self.scaler.scale(loss * (len(batch) / step.videos)).backward()
            for name, value in zip(terms, values, strict=True):
                sums[name] = sums.get(name, 0.0) + value * len(batch)
        self.processes.sum_gradients(self.parameters)
        if any(p.grad is not None for p in self.parameters):
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm or math.inf)
            if not self.scaler.is_enabled() and not bool(torch.isfinite(norm)):
                raise self._diverged("the gradient is not finite though the loss is")
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.detector)
        return sums

    def _diverged(self, what: str) -> TadError:
        return TadError(
            f"epoch {self.epoch + 1}: {what}. Lower train.lr, set train.clip_norm or train.warmup_epochs, or look at these "
            "videos' features and segments; the run can be resumed from the last finished epoch"
        )

    def state_dict(self) -> dict[str, Any]:
        """All that training needs to go on after an epoch: tensors and plain types."""
        return {
            "epoch": self.epoch,
            "detector": self.detector.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": self.processes.gathered(_random_state()),
            "history": self.history,
            "best": self.best,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.history, self.best = state["epoch"], state["history"], state["best"]
        self.detector.load_state_dict(state["detector"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if len(state["random"]) == self.processes.size:
            _set_random_state(state["random"][self.processes.rank])
