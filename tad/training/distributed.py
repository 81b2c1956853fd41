"""The processes of one training, as ``torchrun`` starts them; a lone process is a world of one.

Gradients are summed here instead of by ``DistributedDataParallel``: detectors compute their loss outside ``forward``, a
process may have no video of a small batch, and a parameter may have no gradient in some steps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tad.errors import RecipeError, TadError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` of ``size``, on ``device``."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def on_first(self, function: Callable[[], T]) -> T:
        """The result of ``function`` in the first process, in all; its :class:`TadError` is raised in all as well."""
        if self.size == 1:
            return function()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = function()
            except TadError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        result: T = box[0]
        return result

    def gathered(self, value: T) -> list[T]:
        """The value of every process, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace gradients by their sum over processes; where no process has one, there is none afterwards either."""
        if self.size == 1:
            return
        present = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([present, *[part.reshape(-1).float() for part in parts]])
        dist.all_reduce(flat)
        sums = flat[len(parts) :].split([p.numel() for p in parameters])
        for parameter, count, total in zip(parameters, flat[: len(parts)].tolist(), sums, strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.dtype) if count else None

    def copy_from_first(self, tensors: Iterator[Tensor]) -> None:
        """Overwrite tensors with those of the first process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)

    def sync_buffers(self, module: nn.Module) -> None:
        """Running statistics differ from process to process; the first one's count."""
        self.copy_from_first(iter([buffer for buffer in module.buffers() if buffer.numel()]))


def planned_size() -> int:
    """How many processes ``torchrun`` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def world(device: str | torch.device | None) -> Iterator[World]:
    """Join the processes that ``torchrun`` started (NCCL on CUDA, gloo on the CPU), or be alone.

    ``device`` None is CUDA where there is one, the local rank's own. A process group that exists already is used and
    left.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = pick_device(device, local=local)
    if planned_size() == 1 and not dist.is_initialized():
        yield World(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    joined = not dist.is_initialized()
    if joined:
        # The others wait while the first prepares what all need, such as a classifier of whole videos.
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(days=1))
    try:
        yield World(dist.get_rank(), dist.get_world_size(), chosen)
        if joined:
            dist.barrier()  # nobody hangs up while another process is still talking
    finally:
        if joined:
            dist.destroy_process_group()


def pick_device(device: str | torch.device | None, *, local: int = 0) -> torch.device:
    """A device by name; None is CUDA where there is one. Raises :class:`RecipeError` for one that is not there."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise RecipeError(f"unknown device '{device}': take cpu, cuda or cuda:N") from None
    if chosen.type != "cuda":
        return chosen
    if not torch.cuda.is_available():
        raise RecipeError(f"device '{device}': torch {torch.__version__} finds no CUDA here; take cpu")
    index = local if chosen.index is None else chosen.index
    if index >= torch.cuda.device_count():
        raise RecipeError(f"CUDA device {index} is asked for, but there are {torch.cuda.device_count()}")
    return torch.device("cuda", index)
