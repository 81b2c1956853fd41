"""Training of a classifier of whole videos on stored features; it writes a run (see ``classifier_run.py``)."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tad.annotations import Truth, read_truth
from tad.detect.classifier_run import (
    FILES,
    TOP,
    ClassifierRun,
    ClassifierRunRecipe,
    accuracy,
    built,
    probabilities,
    require_free,
    score_table,
)
from tad.detect.data import EpochLoader, VideoDataset, epoch_steps
from tad.detect.preflight import Failure, Plan, TrainingSet, plan_training, read_training
from tad.detect.trained_on import check_annotations, check_features, described_annotations, described_features
from tad.detect.trainer import Trainer
from tad.detect.windows import read_whole
from tad.errors import RecipeError, StoreError
from tad.progress import ProgressFactory, silent
from tad.recipe import ClassifierRecipe, DataRecipe, DetectRecipe, TrainRecipe, apply_sets, dump_yaml, validated
from tad.store import Store, open_store
from tad.training.distributed import World, pick_device
from tad.training.files import (
    describe_differences,
    differing_keys,
    environment,
    now_text,
    read_json,
    read_state,
    remove_files,
    write_csv,
    write_json,
    write_state,
    write_text,
    write_weights,
)
from tad.training.optim import lr_factor, set_lr
from tad.training.rng import seed_all

logger = logging.getLogger("tad.detect")
WARMUP_EPOCHS = 0.5


def train_classifier(
    recipe: ClassifierRecipe,
    *,
    streams: Sequence[str],
    store: Store | str | Path,
    annotations: Truth | str | Path,
    data: DataRecipe | None = None,
    seed: int = 0,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    progress: ProgressFactory = silent,
) -> dict[str, Any]:
    """Train a classifier of whole videos on stored features and write its run folder.

    Its training and held-out videos are those of a detector with the same ``data`` and ``seed``, so that its scores of
    the held-out ones are of videos that neither has seen. Videos without segments teach the background of rows.

    Parameters
    ----------
    recipe : the network and how it learns. streams : what it reads, all of one store.
    data : subsets, held-out part, row spacing and longest training video, as detectors have them.
    out : the folder to write; it may exist if it is empty.
    resume : go on where the run in ``out`` stopped, to the same weights; a finished run is left as it is.
    overwrite : replace the run that is there.

    Returns
    -------
    What ``metrics.json`` holds; ``holdout`` (``videos, top1, top2, top5, map``) is None where nothing was held out.

    Raises
    ------
    RecipeError : values that do not fit together or differ from those of the run to resume; a folder that is taken.
    StoreError, AnnotationError : streams, videos or segments that are missing; see :mod:`tad.detect.preflight`.
    TadError : the loss is no longer finite.
    """
    if isinstance(store, (str, Path)):
        with open_store(store) as opened:
            return train_classifier(
                recipe, streams=streams, store=opened, annotations=annotations, data=data, seed=seed, out=out,
                resume=resume, overwrite=overwrite, device=device, progress=progress,
            )  # fmt: skip
    given = {
        "classifier": recipe.model_dump(),
        "streams": list(streams),
        "seed": seed,
        "data": (data or DataRecipe()).model_dump(),
    }
    whole = validated(ClassifierRunRecipe, given, where="recipe of the classifier")
    truth = annotations if isinstance(annotations, Truth) else read_truth(annotations)
    path = Path(out)
    require_free(path, resume=resume, overwrite=overwrite)
    going_on = resume and (path / "features.json").is_file()
    if going_on:
        _check_same_training(path, whole, truth, store)
        if (path / "metrics.json").is_file():
            metrics: dict[str, Any] = read_json(path / "metrics.json")
            return metrics
    return _Training(whole, store, truth, path, pick_device(device), progress).run(going_on=going_on)


class _Training:
    """One training from its plan to ``metrics.json``."""

    def __init__(
        self,
        recipe: ClassifierRunRecipe,
        store: Store,
        truth: Truth,
        path: Path,
        device: torch.device,
        progress: ProgressFactory,
    ) -> None:
        own = recipe.classifier
        self.recipe, self.store, self.truth, self.path, self.progress = recipe, store, truth, path, progress
        self.train = TrainRecipe(
            epochs=own.epochs, batch_videos=own.batch_videos, optimizer="adamw", lr=own.lr,
            weight_decay=own.weight_decay, schedule="cosine", warmup_epochs=WARMUP_EPOCHS, clip_norm=own.clip_norm,
            select="last",
        )  # fmt: skip
        as_detector = DetectRecipe(
            detector="classifier", streams=recipe.streams, seed=recipe.seed, data=recipe.data, train=self.train
        )
        self.plan: Plan = plan_training(as_detector, store, truth)
        seed_all(recipe.seed)
        network = built(own, self.plan.channels, len(self.plan.classes))
        self.data: TrainingSet = read_training(self.plan, as_detector, store, network.needs, progress)
        if own.select == "map" and self.data.holdout_truth(self.plan).empty:
            raise RecipeError(
                "select=map ranks held-out videos, but none with segments is held out (or can be read): "
                "raise data.holdout, or take select=last"
            )
        self.trainer = Trainer(network.to(device), self.train, World(0, 1, device))
        self.network = network

    def run(self, *, going_on: bool) -> dict[str, Any]:
        state = read_state(self.path / "resume.pt") if going_on and (self.path / "resume.pt").is_file() else None
        videos = {"train": list(self.data.train), "holdout": list(self.data.holdout)}
        if state is None:
            seed_all(self.recipe.seed)
            self._write_head()
        elif {part: state[part] for part in videos} != videos:
            raise StoreError(
                f"run {self.path} cannot be resumed: the store's usable videos are not those that it was begun with. "
                "Restore them, or overwrite"
            )
        else:
            self.trainer.load_state_dict(state)
        for message in [*self.plan.messages, *self.data.messages, *(f"left out: {f}" for f in self._failures())]:
            self._log(message)
        dataset = VideoDataset(
            store=self.store, needs=self.network.needs, truth=self.data.train, data=self.recipe.data,
            seed=self.recipe.seed, cache=self.data.cache,
        )  # fmt: skip
        loader = EpochLoader(dataset, workers=self.recipe.data.workers)
        per_epoch = math.ceil(len(dataset) / self.train.batch_videos)
        with self.progress((self.train.epochs - self.trainer.epoch) * per_epoch, "train classifier", "steps") as bar:
            for epoch in range(self.trainer.epoch, self.train.epochs):
                self._epoch(epoch, dataset, loader, per_epoch, lambda told: bar.advance(1, told))
                state = self.trainer.state_dict() | videos
                self._save(state)
        metrics = self._metrics()
        write_json(self.path / "metrics.json", metrics)
        self._log(f"finished: {_told(metrics['holdout'])}")
        return metrics

    def _epoch(
        self, epoch: int, dataset: VideoDataset, loader: EpochLoader, per_epoch: int, shown: Callable[[str], None]
    ) -> None:
        begin, size = time.perf_counter(), self.train.batch_videos
        steps = epoch_steps(len(dataset), batch=size, accumulate=1, seed=self.recipe.seed, epoch=epoch)
        batches = loader.epoch(epoch, steps)
        sums: dict[str, float] = {}
        self.network.train()
        for index, step in enumerate(steps):
            factor = lr_factor(self.train, step=epoch * per_epoch + index, steps_per_epoch=per_epoch)
            set_lr(self.trainer.optimizer, self.train.lr * factor)
            for name, value in self.trainer.step(step, batches).items():
                sums[name] = sums.get(name, 0.0) + value
            shown(f"epoch {epoch + 1}/{self.train.epochs}")
        next(batches, None)  # the loader's own end of the epoch
        row: dict[str, Any] = {"epoch": epoch + 1, "loss": sum(sums.values()) / len(dataset)}
        row |= {f"loss_{name}": value / len(dataset) for name, value in sums.items()}
        row |= self._evaluate() or {}
        row["seconds"] = round(time.perf_counter() - begin, 3)
        self.trainer.history.append(row)
        self.trainer.epoch = epoch + 1
        self._log(", ".join(f"{key} {value:.4g}" for key, value in row.items()))

    def _evaluate(self) -> dict[str, float] | None:
        """Scores of the held-out videos with segments, None where there is none."""
        truth = self.data.holdout_truth(self.plan)
        if truth.empty:
            return None
        self.network.eval()
        rows: dict[str, np.ndarray] = {}
        for video in self.data.holdout:
            sample = self.data.cache.get(video)
            if sample is None:
                sample = read_whole(self.store, self.network.needs, video, self.recipe.data)
            rows[video] = probabilities(self.network, sample, device=self.trainer.processes.device)
        return accuracy(truth, score_table(rows, self.plan.classes))

    def _save(self, state: dict[str, Any]) -> None:
        row, best = self.trainer.history[-1], self.trainer.best
        # Of equally good epochs the later one, as detectors choose theirs.
        chosen = self.recipe.classifier.select == "last" or best is None or row["map"] >= best["map"]
        if chosen:
            self.trainer.best = row
            write_weights(self.path / "best.safetensors", self.network.state_dict(), epoch=row["epoch"])
        write_csv(self.path / "metrics.csv", self.trainer.history)
        write_state(self.path / "resume.pt", state | {"best": self.trainer.best})

    def _metrics(self) -> dict[str, Any]:
        best = self.trainer.best or {}
        holdout: dict[str, Any] | None = None
        if "map" in best:
            names = [*(f"top{k}" for k in TOP), "map"]
            videos = int(self.data.holdout_truth(self.plan)["video"].nunique())
            holdout = {"videos": videos, **{name: best[name] for name in names}}
        return {
            "epochs": self.trainer.epoch,
            "select": self.recipe.classifier.select,
            "best_epoch": best["epoch"],
            "holdout": holdout,
            "last_loss": self.trainer.history[-1]["loss"],
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "seconds": round(sum(row["seconds"] for row in self.trainer.history), 3),
            "counts": self.data.counts,
        }

    def _write_head(self) -> None:
        """Everything of the folder that is known before the first epoch; what an earlier run left there goes."""
        if self.path.is_dir():
            remove_files(self.path, files=FILES)
        write_text(self.path / "recipe.yaml", dump_yaml(self.recipe))
        write_json(self.path / "classes.json", self.plan.classes)
        env = environment(device=self.trainer.processes.device, seed=self.recipe.seed, world=1)
        env |= {
            "store": {"path": str(self.store.path), "format": self.store.format},
            "annotations": described_annotations(self.truth),
        }
        write_json(self.path / "env.json", env)
        if failures := self._failures():
            lines = (json.dumps(failure.__dict__, ensure_ascii=False) for failure in failures)
            write_text(self.path / "failures.jsonl", "\n".join(lines) + "\n")
        features = described_features(
            self.store,
            self.plan.channels,
            video=next(iter(self.data.train)),
            row_spacing=self.recipe.data.row_spacing,
        )
        write_json(self.path / "features.json", features)  # last: with it the run can be resumed

    def _failures(self) -> list[Failure]:
        return self.plan.failures + self.data.failures

    def _log(self, message: str) -> None:
        logger.info("%s", message)
        with open(self.path / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{now_text()} {message}\n")


def _told(holdout: dict[str, Any] | None) -> str:
    if holdout is None:
        return "no video was held out to judge by"
    return f"top-1 {100 * holdout['top1']:.1f} % on {holdout['videos']} held-out videos"


def _check_same_training(path: Path, recipe: ClassifierRunRecipe, truth: Truth, store: Store) -> None:
    """Raise :class:`RecipeError` or :class:`StoreError` where going on would be another training than the one begun."""
    run = ClassifierRun.load(path)
    changed = differing_keys(run.recipe.model_dump(mode="json"), recipe.model_dump(mode="json"))
    if changed := [difference for difference in changed if difference[0] != "data.workers"]:
        raise RecipeError(
            f"run {path} cannot be resumed with another recipe: {describe_differences(changed)}. "
            "Give the old values, or train into another folder"
        )
    check_annotations(path, read_json(path / "env.json")["annotations"], truth)
    check_features(path, run.features, store)


def classifier_recipe(sets: Iterable[str] = ()) -> tuple[ClassifierRecipe, DataRecipe]:
    """What ``--set`` makes of the defaults: ``epochs=10``, and ``data.row_spacing=2`` of what the data are.

    Raises :class:`RecipeError` for unknown keys or values that cannot be.
    """
    given = apply_sets({}, sets)
    data = given.pop("data", {})
    if not isinstance(data, dict):
        raise RecipeError(f"--set data={data}: data has keys of its own, such as data.holdout=0.2")
    return validated(ClassifierRecipe, given, where="--set"), validated(DataRecipe, data, where="--set data")
