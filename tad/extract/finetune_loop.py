"""The epochs of a fine-tuning: which clips this process reads, when accuracy is measured, what is kept of it all."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tad.errors import TadError
from tad.extract.clip_library import Library
from tad.extract.clip_sampling import ClipPlan, ClipSampler, shuffled
from tad.extract.clip_trainer import ClipTrainer, judged
from tad.extract.finetune_recipe import FinetuneRecipe
from tad.extract.finetune_run import RunLog, write_failures, write_networks
from tad.progress import ProgressFactory
from tad.training.files import write_csv, write_json, write_state
from tad.training.optim import lr_factor, set_lr
from tad.training.rng import seeded

ORDER = 1  # what is drawn for the order of the clips, told apart from what else is drawn from the seed
SELECT = {"recall": "mean_recall", "top1": "top1"}


class Finetuning:
    """A training that is under way: its epochs, and what is written of them."""

    def __init__(
        self,
        recipe: FinetuneRecipe,
        path: Path,
        classes: list[str],
        library: Library,
        sampler: ClipSampler,
        trainer: ClipTrainer,
        log: RunLog,
        progress: ProgressFactory,
        inputs_sha256: str,
    ) -> None:
        self.recipe, self.path, self.classes, self.library = recipe, path, classes, library
        self.sampler, self.trainer, self.log, self.progress = sampler, trainer, log, progress
        self.inputs_sha256, self.processes = inputs_sha256, trainer.processes
        self.steps = recipe.steps or sampler.natural_steps  # an epoch
        self.plan = lru_cache(maxsize=3)(self._plan)

    def run(self) -> dict[str, Any]:
        """Train what is left; returns the metrics."""
        recipe, trainer, library = self.recipe, self.trainer, self.library
        for message in [*library.messages, *(f"left out: {f['video']}: {f['message']}" for f in library.failures)]:
            self.log(message)
        self.log(
            f"{recipe.backbone} on {self.processes.device}, {self.processes.size} processes: {recipe.epochs} epochs of "
            f"{self.steps} steps of {recipe.batch} clips, {len(self.classes)} classes and background; "
            f"{len(library.train)} training and {len(library.held)} held-out videos"
        )
        left = (recipe.epochs - trainer.epoch) * self.steps - trainer.step_in_epoch
        clips = library.train_reader.read(self._plans())
        try:
            with closing(clips), self.progress(left, f"train {recipe.backbone}", "steps") as bar:
                for epoch in range(trainer.epoch, recipe.epochs):
                    self._epoch(epoch, clips, bar)
        except KeyboardInterrupt:
            self.log(f"interrupted in epoch {trainer.epoch + 1}; resume goes on from what was saved last")
            raise
        except TadError as error:
            self.log(f"stopped: {error}")
            raise
        metrics = self._metrics()
        self.processes.on_first(lambda: write_json(self.path / "metrics.json", metrics))
        self.log(f"finished: epoch {metrics['best_epoch']} chosen")
        return metrics

    def _plan(self, epoch: int) -> ClipPlan:
        """All clips of an epoch, in their order."""
        clips = [clip for step in range(self.steps) for clip in self.sampler.step(epoch * self.steps + step)]
        return shuffled(clips, pool=self.library.pool, rng=seeded(self.recipe.seed, ORDER, epoch))

    def _mine(self, plan: ClipPlan, first: int, after: int) -> list[int]:
        """Which of the clips ``first`` to ``after`` this process reads: those of its videos."""
        rank, size = self.processes.rank, self.processes.size
        return [k for k in range(first, after) if plan.clips[k].video % size == rank]

    def _plans(self) -> Iterator[ClipPlan]:
        """What is left for this process, epoch by epoch. Threads of the reader call this ahead of the training."""
        begun, done = self.trainer.epoch, self.trainer.step_in_epoch * self.recipe.batch
        for epoch in range(begun, self.recipe.epochs):
            plan = self.plan(epoch)
            yield plan.part(self._mine(plan, done if epoch == begun else 0, len(plan.clips)))

    def _epoch(self, epoch: int, clips: Iterator[np.ndarray | None], bar: Any) -> None:
        recipe, trainer, begin = self.recipe, self.trainer, time.perf_counter()
        plan, training, every = self.plan(epoch), recipe.training, recipe.epochs * self.steps / 20
        trainer.module.train()
        lr = recipe.lr
        for step in range(trainer.step_in_epoch, self.steps):
            lr = recipe.lr * lr_factor(training, step=epoch * self.steps + step, steps_per_epoch=self.steps)
            set_lr(trainer.optimizer, lr)
            mine = self._mine(plan, step * recipe.batch, (step + 1) * recipe.batch)
            trainer.step([next(clips) for _ in mine], [plan.clips[k].label for k in mine])
            if len(trainer.recent) >= every or (epoch + 1, step + 1) == (recipe.epochs, self.steps):
                trainer.note_losses()
            if (step + 1) % recipe.save_steps == 0 and step + 1 < self.steps:
                self._save()
            recent = f", loss {trainer.losses[-1]['loss']:.3f}" if trainer.losses else ""
            bar.advance(1, f"epoch {epoch + 1}/{recipe.epochs}{recent}")
        self.processes.sync_buffers(trainer.module)
        loss = sum(self.processes.gathered(trainer.loss_sum)) / (self.steps * recipe.batch)
        scores: dict[str, Any] = {}
        if self.library.held:
            scores = judged(
                trainer, self.library.held, self.library.held_reader, self.classes, offsets=self.sampler.offsets
            )
        shown = {key: value for key, value in scores.items() if key != "recall"}
        row = {"epoch": epoch + 1, "steps": self.steps, "lr": lr, "loss": loss, **shown}
        row["seconds"] = round(time.perf_counter() - begin, 3)
        trainer.history.append(row)
        trainer.epoch, trainer.step_in_epoch, trainer.loss_sum = epoch + 1, 0, 0.0
        chosen = self._is_best(row)
        if chosen:
            trainer.best = {"epoch": epoch + 1, "holdout": scores or None}
        self._save(networks=chosen)
        told = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in ("epoch", "steps") and v is not None)
        self.log(f"epoch {epoch + 1}/{recipe.epochs}: {told}")

    def _is_best(self, row: Mapping[str, Any]) -> bool:
        """By the rule of ``select``; of equally good epochs the later one, which has seen more."""
        key, best = SELECT.get(self.recipe.select), (self.trainer.best or {}).get("holdout")
        if key is None or row.get(key) is None or best is None:
            return True
        return bool(row[key] >= best[key])

    def _save(self, *, networks: bool = False) -> None:
        """The state to resume from, last: a stop before it repeats steps and writes the same again."""
        trainer, state = self.trainer, self.trainer.state_dict()
        failures = self._failures()

        def write() -> None:
            if networks:
                write_networks(
                    self.path, trainer.backbone, trainer.head, self.recipe, self.classes, epoch=trainer.epoch
                )
            if trainer.history:
                write_csv(self.path / "metrics.csv", trainer.history)
            write_failures(self.path / "failures.jsonl", failures)
            write_state(self.path / "resume.pt", state)

        self.processes.on_first(write)

    def _failures(self) -> list[dict[str, str]]:
        """Of all processes, each video once."""
        every = [failure for own in self.processes.gathered(self.library.failures) for failure in own]
        return list({failure["video"]: failure for failure in reversed(every)}.values())[::-1]

    def _metrics(self) -> dict[str, Any]:
        library, trainer = self.library, self.trainer
        best = trainer.best or {}
        return {
            "backbone": self.recipe.backbone,
            "classes": self.classes,
            "clips": self.recipe.epochs * self.steps * self.recipe.batch,
            "epochs": trainer.epoch,
            "select": self.recipe.select if library.held else "last",
            "best_epoch": best.get("epoch"),
            "holdout": best.get("holdout"),
            "losses": trainer.losses,
            "counts": {"train_videos": len(library.train), "holdout_videos": len(library.held)},
            "failures": self._failures(),
            "read": library.read,
            "seconds": round(sum(row["seconds"] for row in trainer.history), 3),
            "inputs_sha256": self.inputs_sha256,
        }
