"""A detector while it learns: one optimizer step, and the state from which it goes on bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tad.detect.data import Step
from tad.detect.interface import Batch, Detector
from tad.errors import TadError
from tad.recipe import TrainRecipe
from tad.training.distributed import World
from tad.training.optim import AveragedWeights, Part, build_optimizer
from tad.training.precision import autocast, guard_gradients
from tad.training.rng import random_state, seed_all, set_random_state


class Trainer:
    """A detector while it learns: its optimizer, averaged weights, and how far it is."""

    def __init__(
        self, detector: Detector, recipe: TrainRecipe, processes: World, *, parts: Sequence[Part] | None = None
    ) -> None:
        self.detector, self.recipe, self.processes = detector, recipe, processes
        guard_gradients(detector, device=processes.device, precision=recipe.precision)
        processes.copy_from_first(iter([*detector.parameters(), *detector.buffers()]))
        self.parameters = [p for p in detector.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(detector, recipe, parts=parts)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=recipe.precision == "fp16")
        self.average = None if recipe.ema is None else AveragedWeights(detector, recipe.ema)
        self.epoch = 0  # finished epochs
        self.history: list[dict[str, Any]] = []  # one row of metrics.csv each
        self.best: dict[str, Any] | None = None

    @property
    def judged(self) -> Detector:
        """The module whose weights are evaluated and kept: the averaged one with EMA."""
        return self.detector if self.average is None else self.average.module

    def step(self, step: Step, batches: Iterator[Batch | None]) -> dict[str, float]:
        """One optimizer step over the batches of ``step``; returns the loss terms summed over this process's videos.

        A batch of n videos weighs n / (videos of the step, in all processes), so that neither accumulation nor the
        number of processes nor a short last batch changes what a video counts.
        """
        sums: dict[str, float] = {}
        videos: list[str] = []
        for _ in step.batches:
            batch = next(batches)
            if batch is None:
                continue
            videos += batch.videos
            batch = batch.to(self.processes.device)
            if not self.detector.thins:
                batch = thinned(batch, self.recipe.feature_dropout)
            with autocast(self.processes.device, self.recipe.precision):
                terms = self.detector.loss(self.detector(batch), batch.targets or [])
            loss = torch.stack([term.float() for term in terms.values()]).sum()
            values = torch.stack([term.detach().float() for term in terms.values()]).tolist()
            if not np.isfinite(values).all():
                described = ", ".join(f"{name}={value:g}" for name, value in zip(terms, values, strict=True))
                raise self._diverged(f"the loss is not finite ({described})", batch.videos)
            if loss.requires_grad:
                self.scaler.scale(loss * (len(batch) / step.videos)).backward()
            for name, value in zip(terms, values, strict=True):
                sums[name] = sums.get(name, 0.0) + value * len(batch)
        self.processes.sum_gradients(self.parameters)
        if any(p.grad is not None for p in self.parameters):
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm or math.inf)
            if not self.scaler.is_enabled() and not bool(torch.isfinite(norm)):
                raise self._diverged("the gradient is not finite though the loss is", videos)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.detector)
        return sums

    def _diverged(self, what: str, videos: list[str]) -> TadError:
        return TadError(
            f"epoch {self.epoch + 1}: {what}, on videos {', '.join(videos)}. Lower train.lr, set train.clip_norm or "
            "train.warmup_epochs, or look at the features and segments of these videos"
        )

    def state_dict(self) -> dict[str, Any]:
        """All that training needs to go on after an epoch: tensors and plain types."""
        return {
            "epoch": self.epoch,
            "detector": self.detector.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": self.processes.gathered(random_state()),
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
            set_random_state(state["random"][self.processes.rank])
        else:  # other numbers are drawn from here on, but not the same ones in every process
            seed_all(int(state["random"][0]["torch"].sum()), self.processes.rank)


def thinned(batch: Batch, part: float) -> Batch:
    """The batch with a random part of its feature values zero and the rest larger (``train.feature_dropout``).

    Frames, which are bytes, are none and stay as they are.
    """
    if part == 0:
        return batch
    features = {
        key: F.dropout(value, part) if value.is_floating_point() else value for key, value in batch.features.items()
    }
    return replace(batch, features=features)
