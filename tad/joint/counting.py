"""Counting what a backbone and a detector keep in memory for a backward pass, before the first one.

It is counted, not modelled: the network runs once on tensors without data, as every tensor that autograd saves and
every tensor alive is noted with its size. So the count holds for any backbone, frozen parts, precision and device,
costs no memory and takes a second or two. Not counted: what the libraries keep for themselves (CUDA context, workspaces
of convolutions, fragmentation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tad.errors import RecipeError, did_you_mean
from tad.extract.backbones.base import Backbone
from tad.joint.encoder import Encoder, without_graph
from tad.training.precision import AUTOCAST, autocast

# clips of the two passes whose difference is what a clip costs: so many that gradients of weights do not make the peak
COUNTED = (32, 64)


@dataclass(frozen=True)
class BackboneCost:
    """Bytes that a backbone takes on clips of one shape, see :func:`measure_backbone`.

    Attributes
    ----------
    weights : its parameters and buffers. trained : of these, the parameters that require a gradient.
    saved : what autograd keeps of each clip for the backward pass.
    saved_once : what it keeps once, however many clips there are (weights cast by autocast).
    forward : the most that is alive at once in a pass without graph, a clip; its frames not counted.
    backward : the most that is alive beside ``saved`` while the graph is made and gone back through, a clip.
    """

    weights: int
    trained: int
    saved: int
    saved_once: int
    forward: int
    backward: int


@dataclass(frozen=True)
class DetectorCost:
    """Bytes that a detector takes: its weights, those of them that learn, and what autograd keeps of one batch."""

    weights: int
    trained: int
    saved: int


@dataclass(frozen=True)
class StreamCost:
    """One stream of a sample: ``clips`` through its backbone, and ``frame_bytes`` of uint8 frames behind them."""

    backbone: BackboneCost
    clips: int
    frame_bytes: int


def saved_bytes(run: Callable[[], object], *, known: Sequence[Tensor] = ()) -> int:
    """Bytes of the distinct storages that autograd saves in ``run()``, but those of ``known`` (parameters, buffers).

    Nothing of it is kept, so a real forward pass takes no more memory than one without graph; there can be no
    backward pass.
    """
    saved = _Saved(known, keep=False)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        result = run()
    del result
    return saved.bytes


def measure_backbone(
    backbone: Backbone,
    *,
    clip: tuple[int, int, int, int],
    keys: Sequence[str] = ("features",),
    precision: str = "fp32",
) -> BackboneCost:
    """Count what ``backbone``, frozen and in the mode it is in, takes of clips (C, W, H, W) of uint8 on its device.

    Its weights, running statistics and the random state stay as they are; nothing is computed.

    Parameters
    ----------
    clip : channels, frames, height and width of a clip.
    keys : levels that the pass makes, as in :class:`~tad.joint.encoder.Encoder`.
    precision : fp32, or autocast to fp16 or bf16.

    Raises
    ------
    RecipeError : an unknown precision or level, or clips that the backbone does not take.
    """
    if precision not in AUTOCAST:
        raise RecipeError(f"unknown precision {precision!r}.{did_you_mean(str(precision), AUTOCAST)}")
    if len(clip) != 4 or min(clip) < 1:
        raise RecipeError(f"a clip is (channels, frames, height, width) of at least 1 each, got {tuple(clip)}")
    fewer, more = COUNTED
    fewer_saved, fewer_alive = _pass(backbone, fewer, clip, keys, precision, graph=True)
    more_saved, more_alive = _pass(backbone, more, clip, keys, precision, graph=True)
    _, forward = _pass(backbone, more, clip, keys, precision, graph=False)
    saved = (more_saved - fewer_saved) // (more - fewer)
    return BackboneCost(
        weights=_bytes([*backbone.parameters(), *backbone.buffers()]),
        trained=_bytes([p for p in backbone.parameters() if p.requires_grad]),
        saved=saved,
        saved_once=max(0, more_saved - more * saved),
        forward=-(-forward // more),
        backward=max(0, (more_alive - fewer_alive) // (more - fewer) - saved),
    )


def measure_detector(detector: nn.Module, step: Callable[[], object]) -> DetectorCost:
    """Count what ``detector`` takes in ``step()``, which runs it on a batch up to the loss, for real.

    The rows that ``step`` hands it should require a gradient, as those of a backbone do. Its running statistics and
    torch's random state are put back afterwards.
    """
    buffers = list(detector.buffers())
    before = [buffer.detach().clone() for buffer in buffers]
    devices = {p.device for p in detector.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            saved = saved_bytes(step, known=[*detector.parameters(), *buffers])
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
    trained = [p for p in detector.parameters() if p.requires_grad]
    return DetectorCost(weights=_bytes([*detector.parameters(), *buffers]), trained=_bytes(trained), saved=saved)


def _pass(
    backbone: Backbone,
    clips: int,
    shape: tuple[int, int, int, int],
    keys: Sequence[str],
    precision: str,
    *,
    graph: bool,
) -> tuple[int, int]:
    """(bytes saved, bytes alive at most) of a pass over ``clips`` clips of tensors without data, frames not counted."""
    encoder = Encoder(backbone=backbone, keys=keys, chunk=clips)
    tensors = dict([*encoder.named_parameters(), *encoder.named_buffers()])
    device = next(iter(tensors.values())).device
    channels, window, height, width = shape
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        state: dict[str, Tensor] = {name: fake.from_tensor(tensor) for name, tensor in tensors.items()}
        trained = [state[name] for name, parameter in encoder.named_parameters() if parameter.requires_grad]
        frames = torch.empty((clips * window, channels, height, width), dtype=torch.uint8, device=device)
        index = torch.empty((clips, window), dtype=torch.int64, device=device)
        saved = _Saved([*state.values(), frames], keep=True)
        with _Alive() as alive, nullcontext() if graph else without_graph(encoder):
            with (
                torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack),
                autocast(device, precision),
            ):
                rows = functional_call(encoder, state, (frames, index))
                summed = torch.stack([row.mean() for row in rows.values()]).sum()
            del rows
            if summed.requires_grad:
                torch.autograd.grad(summed, trained, allow_unused=True)
    return saved.bytes, alive.peak


class _Saved:
    """Hooks that add up the storages which autograd saves; with ``keep`` they are given back to it."""

    def __init__(self, known: Sequence[Tensor], *, keep: bool) -> None:
        self.keep = keep
        # a weak reference keeps the storage's number from being given to another one, without keeping its memory
        self.known = [StorageWeakRef(tensor.untyped_storage()) for tensor in known]
        self.seen = {reference.cdata: reference for reference in self.known}
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor | None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata not in self.seen:
            self.seen[reference.cdata] = reference
            self.bytes += storage.nbytes()
        return tensor if self.keep else None

    def unpack(self, tensor: Tensor | None) -> Tensor:
        if tensor is None:
            raise RuntimeError("saved_bytes() keeps nothing that a backward pass could use")
        return tensor


class _Alive(TorchDispatchMode):
    """Notes the most bytes that are alive at once of all storages made while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.old: dict[int, StorageWeakRef] = {}  # of arguments that were there before
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            reference = StorageWeakRef(tensor.untyped_storage())
            if reference.cdata not in self.made:
                self.old.setdefault(reference.cdata, reference)
        result = func(*args, **(kwargs or {}))
        grown = False
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference.cdata not in self.made and reference.cdata not in self.old:
                self.made[reference.cdata] = (reference, storage.nbytes())
                grown = True
        if grown:
            self.made = {number: (kept, size) for number, (kept, size) in self.made.items() if not kept.expired()}
            self.peak = max(self.peak, sum(size for _, size in self.made.values()))
        return result


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Of the distinct storages."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
