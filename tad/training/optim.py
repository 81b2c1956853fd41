"""Optimizer, learning rate over time, averaged weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from tad.errors import RecipeError
from tad.recipe import TrainRecipe

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Part:
    """A part of a module that learns at ``lr_factor`` times the recipe's rate."""

    module: nn.Module
    lr_factor: float = 1.0


MOMENTUM = 0.9  # of SGD


def build_optimizer(module: nn.Module, recipe: TrainRecipe, *, parts: Sequence[Part] | None = None) -> Optimizer:
    """Adam, AdamW or SGD (momentum 0.9) over the parameters that require a gradient.

    ``parts`` of ``module`` learn at rates of their own; by default it is one.

    ``weight_decay`` is the L2 term of Adam and SGD, on all parameters, as the papers of their time have it. AdamW
    decays matrices and kernels only, not biases, norms and other parameters of fewer than two dimensions.
    """
    groups: list[dict[str, Any]] = []
    for part in parts if parts is not None else [Part(module)]:
        parameters = [p for p in part.module.parameters() if p.requires_grad]
        same = {"lr": part.lr_factor * recipe.lr, "lr_factor": part.lr_factor}
        if recipe.optimizer != "adamw":
            groups.append({"params": parameters, "weight_decay": recipe.weight_decay, **same})
            continue
        decayed, others = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
        groups.append({"params": decayed, "weight_decay": recipe.weight_decay, **same})
        groups.append({"params": others, "weight_decay": 0.0, **same})
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise RecipeError("the detector has no parameter to train")
    if recipe.optimizer == "adam":
        return Adam(groups, lr=recipe.lr)
    if recipe.optimizer == "sgd":
        return SGD(groups, lr=recipe.lr, momentum=MOMENTUM)
    return AdamW(groups, lr=recipe.lr)


def lr_factor(recipe: TrainRecipe, *, step: int, steps_per_epoch: int) -> float:
    """What the learning rate is multiplied by in optimizer step ``step`` (from 0 over all epochs).

    It grows linearly over ``warmup_epochs``, and then: ``constant``, ``cosine`` down to zero at the end of the last
    epoch, or ``step``, multiplied by ``step_gamma`` after each of ``step_epochs`` finished epochs.
    """
    total = recipe.epochs * steps_per_epoch
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    if recipe.schedule == "step":
        return recipe.step_gamma ** sum(step >= epoch * steps_per_epoch for epoch in recipe.step_epochs)
    return 1.0


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """``lr`` for every group of :func:`build_optimizer`, times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def check_training(recipe: TrainRecipe, *, device: torch.device) -> None:
    """Raise :class:`RecipeError` for values that do not fit together."""
    if recipe.schedule == "step" and not recipe.step_epochs:
        raise RecipeError("train.schedule=step needs train.step_epochs, such as [15, 18]")
    if recipe.schedule != "step" and recipe.step_epochs:
        raise RecipeError(f"train.step_epochs belongs to train.schedule=step, this is {recipe.schedule}")
    if recipe.warmup_epochs >= recipe.epochs:
        raise RecipeError(f"train.warmup_epochs={recipe.warmup_epochs} leaves nothing of train.epochs={recipe.epochs}")
    if recipe.precision == "fp16" and device.type != "cuda":
        raise RecipeError("train.precision=fp16 needs a CUDA device; take bf16 or fp32 on the CPU")


class AveragedWeights(Generic[ModuleT]):
    """Exponential moving average of a module's weights; other buffers are copied.

    After n updates the decay is ``min(decay, (1 + n) / (10 + n))``, so that short trainings are not held back by the
    random weights they began with (as in TensorFlow's ``ExponentialMovingAverage``).
    """

    def __init__(self, module: ModuleT, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.module = copy.deepcopy(module)
        self.module.requires_grad_(False)
        self.module.eval()

    @torch.no_grad()
    def update(self, module: ModuleT) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = dict(module.named_parameters())
        for name, average in self.module.named_parameters():
            average.lerp_(parameters[name].to(average.dtype), 1 - decay)
        buffers = dict(module.named_buffers())
        for name, buffer in self.module.named_buffers():
            buffer.copy_(buffers[name])

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "weights": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        self.module.load_state_dict(state["weights"])
