"""A backbone and its new classifier while they learn: one step of the optimizer, accuracy, and the state to resume."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tad.errors import TadError
from tad.extract.backbones.base import Backbone
from tad.extract.clip_reading import ClipReader
from tad.extract.clip_sampling import in_sequence
from tad.extract.clips import BACKGROUND, Clip, LabelledVideo, frames_at
from tad.extract.finetune_recipe import FinetuneRecipe
from tad.training.distributed import World
from tad.training.optim import build_optimizer
from tad.training.precision import autocast, guard_gradients
from tad.training.rng import random_state, seed_all, set_random_state

JUDGED_CLIPS = 32  # a forward pass, when held-out videos are judged


class ClipTrainer:
    """``backbone`` and ``head`` (features → K + 1 logits), their optimizer, and how far they are.

    Parameters
    ----------
    processes : all that train together; the weights of the first are copied to the others.
    """

    def __init__(self, backbone: Backbone, head: nn.Linear, recipe: FinetuneRecipe, processes: World) -> None:
        self.backbone, self.head, self.recipe, self.processes = backbone, head, recipe, processes
        self.module = nn.ModuleDict({"backbone": backbone, "head": head})
        guard_gradients(self.module, device=processes.device, precision=recipe.precision)
        processes.copy_from_first(iter([*self.module.parameters(), *self.module.buffers()]))
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.module, recipe.training)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=recipe.precision == "fp16")
        self.epoch = self.step_in_epoch = 0  # finished epochs, and steps of the one begun
        self.loss_sum = 0.0  # of this process's clips in the epoch begun
        self.recent: list[float] = []  # the same by step, since the last row of `losses`
        self.losses: list[dict[str, float]] = []
        self.history: list[dict[str, Any]] = []  # one row of metrics.csv each
        self.best: dict[str, Any] | None = None

    def logits(self, clips: Sequence[np.ndarray], *, dropout: float = 0.0) -> Tensor:
        """uint8 clips (T, H, W, C), B of them → (B, K + 1), float32."""
        return clip_logits(
            self.backbone, self.head, clips, device=self.processes.device, precision=self.recipe.precision,
            dropout=dropout,
        )  # fmt: skip

    def step(self, clips: Sequence[np.ndarray | None], labels: Sequence[int]) -> None:
        """One optimizer step over this process's clips of a batch; those that could not be read are ``None``.

        Each clip weighs 1 / ``batch``, so that neither micro-batches nor the number of processes change what it counts.
        """
        usable = [(clip, label) for clip, label in zip(clips, labels, strict=True) if clip is not None]
        size = self.recipe.micro_batch or max(1, len(usable))
        total = 0.0
        for some in (usable[k : k + size] for k in range(0, len(usable), size)):
            target = torch.tensor([label for _, label in some], device=self.processes.device)
            logits = self.logits([clip for clip, _ in some], dropout=self.recipe.dropout)
            loss = F.cross_entropy(logits, target)
            value = loss.item()
            if not math.isfinite(value):
                raise self._diverged(f"the loss is {value}")
            self.scaler.scale(loss * (len(some) / self.recipe.batch)).backward()
            total += value * len(some)
        self.processes.sum_gradients(self.parameters)
        if any(p.grad is not None for p in self.parameters):
            if self.recipe.clip_norm is not None:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_in_epoch += 1
        self.loss_sum += total
        self.recent.append(total)

    def _diverged(self, what: str) -> TadError:
        where = f"epoch {self.epoch + 1}, step {self.step_in_epoch + 1}"
        return TadError(
            f"{self.recipe.backbone}, {where}: {what}. Take a lower lr than {self.recipe.lr:g}, a longer warm-up "
            "(warmup_epochs), or limit the gradient (clip_norm=1)"
        )

    def note_losses(self) -> None:
        """Close a row of ``losses``: the mean over the clips of all processes since the last one."""
        total = sum(self.processes.gathered(sum(self.recent)))
        if self.recent:
            step = sum(row["steps"] for row in self.history) + self.step_in_epoch
            mean = total / (len(self.recent) * self.recipe.batch)
            self.losses.append({"step": step, "loss": round(mean, 5)})
        self.recent = []

    # ---- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """All that training needs to go on after a step: tensors and plain types."""
        return {
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "weights": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "by_process": self.processes.gathered(
                {"random": random_state(), "loss_sum": self.loss_sum, "recent": self.recent}
            ),
            "losses": self.losses,
            "history": self.history,
            "best": self.best,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        self.losses, self.history, self.best = state["losses"], state["history"], state["best"]
        self.module.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        kept = state["by_process"]
        if len(kept) == self.processes.size:
            own = kept[self.processes.rank]
            self.loss_sum, self.recent = own["loss_sum"], list(own["recent"])
            set_random_state(own["random"])
            return
        # another number of processes: sums go on in the first; other numbers are drawn, not the same ones everywhere
        self.loss_sum = sum(own["loss_sum"] for own in kept) if self.processes.first else 0.0
        sums = [sum(values) for values in zip(*(own["recent"] for own in kept), strict=True)]
        self.recent = sums if self.processes.first else [0.0] * len(sums)
        seed_all(int(kept[0]["random"]["torch"].sum()), self.processes.rank)


def clip_logits(
    backbone: Backbone,
    head: nn.Module,
    clips: Sequence[np.ndarray],
    *,
    device: torch.device,
    precision: str,
    dropout: float = 0.0,
) -> Tensor:
    """uint8 clips (T, H, W, C), B of them → logits of ``head`` on the backbone's features, (B, K), float32."""
    moved = torch.from_numpy(np.stack(clips)).to(device, non_blocking=True).permute(0, 4, 1, 2, 3)  # (B, C, T, H, W)
    with autocast(device, precision):
        features = backbone(backbone.normalise(moved))["features"]  # (B, D)
        logits: Tensor = head(F.dropout(features, dropout))
    return logits.float()


# ---- accuracy -------------------------------------------------------------------------------------------------------
def judged(
    trainer: ClipTrainer,
    videos: Sequence[LabelledVideo],
    reader: ClipReader,
    classes: Sequence[str],
    *,
    offsets: np.ndarray,
) -> dict[str, Any]:
    """Accuracy on the windows that extraction would cut, one every ``spec.stride`` frames of the held-out ``videos``.

    Returns
    -------
    dict with ``clips``, ``top1`` (over all of them), ``background_recall``, ``class_recall`` (mean over the classes),
    ``mean_recall`` (mean over background and classes) and ``recall`` by class; ``None`` where there is nothing to be
    recalled.
    """
    processes, stride = trainer.processes, trainer.backbone.spec.stride
    groups: list[list[Clip]] = []  # clips of one forward pass
    for number in range(processes.rank, len(videos), processes.size):
        video = videos[number]
        starts = np.arange(0, len(video.labels), stride)
        for some in np.array_split(starts, math.ceil(len(starts) / JUDGED_CLIPS)):
            groups.append([
                Clip(number, frames_at(int(start), offsets, frames=video.frames), int(video.labels[start]))
                for start in some
            ])  # fmt: skip
    clips = reader.read([in_sequence([clip for group in groups for clip in group])])
    confusion = np.zeros((len(classes) + 1, len(classes) + 1), np.int64)  # [truth, guess]
    trainer.module.eval()
    with closing(clips), torch.inference_mode():
        for group in groups:
            read = [(clip.label, array) for clip in group if (array := next(clips)) is not None]
            if read:
                guesses = trainer.logits([array for _, array in read]).argmax(1).tolist()
                for (label, _), guess in zip(read, guesses, strict=True):
                    confusion[label, guess] += 1
    return accuracy(sum(processes.gathered(confusion)), classes)


def accuracy(confusion: Any, classes: Sequence[str]) -> dict[str, Any]:
    """What :func:`judged` returns, from counts [truth, guess], (K + 1, K + 1)."""
    total = confusion.sum(1)
    recall = [float(confusion[k, k] / total[k]) if total[k] else None for k in range(len(total))]
    seen = [value for value in recall[BACKGROUND + 1 :] if value is not None]
    every = [value for value in recall if value is not None]
    return {
        "clips": int(total.sum()),
        "top1": float(np.trace(confusion) / total.sum()) if total.sum() else None,
        "background_recall": recall[BACKGROUND],
        "class_recall": float(np.mean(seen)) if seen else None,
        "mean_recall": float(np.mean(every)) if every else None,
        "recall": dict(zip(classes, recall[BACKGROUND + 1 :], strict=True)),
    }
