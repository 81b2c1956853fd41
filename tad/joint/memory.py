"""How much memory a step of joint training takes, counted before the first one, and which mode a budget admits.

What a backbone keeps for its backward pass is counted, not modelled: it runs once on tensors without data, as every
tensor that autograd saves and every tensor alive is noted with its size. So the count holds for any backbone, frozen
parts, precision and device, costs no memory and takes a second or two. Not counted: what the libraries keep for
themselves (CUDA context, workspaces of convolutions, fragmentation), a bank of features and the workers that read
frames, which live in the host's memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tad.detect.samplers import sample_count
from tad.errors import RecipeError, did_you_mean
from tad.extract.backbones.base import Backbone
from tad.joint.encoder import Encoder, without_graph

MODES = ("full", "egs", "bank", "pre-extracted")
AUTOCAST: dict[str, torch.dtype | None] = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
OPTIMIZER_STATE = {"adam": 2, "adamw": 2, "sgd": 1}  # tensors of a parameter's size beside it
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
# clips of the two passes whose difference is what a clip costs: so many that gradients of weights do not make the peak
COUNTED = (32, 64)


def parse_bytes(text: str) -> int:
    """``8GiB``, ``500 MB``, ``1.5e9B`` → bytes, rounded down; a unit of ``UNITS``, as it is written there.

    Raises
    ------
    RecipeError : anything else, or less than a byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)(e\+?\d{1,2})?\s*([A-Za-z]+)\s*", str(text), re.ASCII)
    size = 0 if match is None else int(Decimal(match[1] + (match[2] or "")) * UNITS.get(match[3], 0))
    if size < 1:
        raise RecipeError(f"{text!r} is no size: write a number and one of {', '.join(UNITS)}, such as 8GiB")
    return size


def format_bytes(size: int) -> str:
    """Bytes in the largest binary unit of which there is one: ``11.2 GiB``."""
    for unit in ("GiB", "MiB", "KiB"):
        if size >= UNITS[unit]:
            return f"{size / UNITS[unit]:.1f} {unit}"
    return f"{size} B"


# ---- counting --------------------------------------------------------------------------------------------------------


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
    fewer_saved, fewer_alive = _pass(backbone, fewer, clip, keys, AUTOCAST[precision], graph=True)
    more_saved, more_alive = _pass(backbone, more, clip, keys, AUTOCAST[precision], graph=True)
    _, forward = _pass(backbone, more, clip, keys, AUTOCAST[precision], graph=False)
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
    dtype: torch.dtype | None,
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
                torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None),
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


# ---- estimate and choice ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one step at its peak, all parts as if they were there at the same time.

    Attributes
    ----------
    weights : of backbones and detector, twice with averaged weights. gradients, optimizer : of what learns.
    activations : of the chosen clips, kept until the backbone's backward pass.
    transient : the most that one chunk takes beside them; with checkpointing the activations of a chunk as well, which
        are computed again.
    frames : uint8 frames of the batch. detector : what its backward pass needs.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    transient: int
    frames: int
    detector: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


def estimate(
    streams: Sequence[StreamCost],
    *,
    samples: int,
    mode: str,
    ratio: float,
    checkpoint: bool,
    chunk: int,
    detector: DetectorCost,
    optimizer: str = "adam",
    ema: bool = False,
) -> MemoryEstimate:
    """Memory of a step over ``samples`` samples.

    Parameters
    ----------
    mode : ``full``, ``egs``, ``bank`` or ``pre-extracted``. ratio : of a sample's clips that carry gradients, 0..1, in
        ``egs`` and ``bank``. checkpoint : activations are computed again, chunk by chunk, in the backward pass.
    chunk : clips of a forward pass. optimizer : adam, adamw or sgd. ema : a second copy of all weights is kept.

    Raises
    ------
    RecipeError : unknown mode or optimizer, or a value out of range.
    """
    _check(streams, samples=samples, mode=mode, ratio=ratio, chunk=chunk, optimizer=optimizer)
    activations = transient = trained = 0
    for stream in streams:
        cost = stream.backbone
        chosen = _chosen(mode, ratio, stream.clips)
        graph = chosen if cost.trained else 0  # clips of a sample that carry gradients
        others = chosen - graph if mode == "bank" else stream.clips - graph
        if mode != "pre-extracted" and others:
            transient = max(transient, min(chunk, others) * cost.forward)
        if graph:
            trained += cost.trained
            kept = min(chunk, graph) if checkpoint else samples * graph
            beside = kept * cost.saved + cost.saved_once
            activations += 0 if checkpoint else beside
            transient = max(transient, min(chunk, graph) * cost.backward + (beside if checkpoint else 0))
    weights = detector.weights + sum(stream.backbone.weights for stream in streams)
    learning = detector.trained + trained
    return MemoryEstimate(
        weights=(2 if ema else 1) * weights,
        gradients=learning,
        optimizer=OPTIMIZER_STATE[optimizer] * learning,
        activations=activations,
        transient=transient,
        frames=0 if mode == "pre-extracted" else samples * sum(stream.frame_bytes for stream in streams),
        detector=detector.saved,
    )


@dataclass(frozen=True)
class Choice:
    """The first way of training that fits a budget; ``refused`` are those before it, with the bytes they need."""

    mode: str
    ratio: float
    checkpoint: bool
    estimate: MemoryEstimate
    budget: int
    refused: tuple[tuple[str, int], ...] = ()

    def lines(self) -> list[str]:
        """For the log: what was chosen and needs how much of which, and what did not fit."""
        parts = [
            f"{part.name} {format_bytes(getattr(self.estimate, part.name))}"
            for part in fields(self.estimate)
            if getattr(self.estimate, part.name)
        ]
        lines = [f"memory: {named}: needs {format_bytes(need)}, does not fit" for named, need in self.refused]
        lines.append(
            f"memory: {_named(self.mode, self.ratio, self.checkpoint)}: needs {format_bytes(self.estimate.total)} of "
            f"{format_bytes(self.budget)}, chosen"
        )
        return [*lines, f"memory: {', '.join(parts)}"]


def choose(
    budget: int,
    streams: Sequence[StreamCost],
    *,
    samples: int,
    ratio: float,
    chunk: int,
    detector: DetectorCost,
    snippets: bool = True,
    optimizer: str = "adam",
    ema: bool = False,
) -> Choice:
    """The first that fits into ``budget`` bytes of: full, egs, full and egs with checkpointing, egs at lower ratios, a
    bank at the lowest, pre-extracted. Without ``snippets`` (one fully convolutional pass) there is nothing to sample.

    Raises
    ------
    RecipeError : not even pre-extracted features fit, or a value out of range.
    """
    refused: list[tuple[str, int]] = []
    for mode, part, checkpoint in _ways(ratio, snippets):
        needed = estimate(
            streams, samples=samples, mode=mode, ratio=part, checkpoint=checkpoint, chunk=chunk, detector=detector,
            optimizer=optimizer, ema=ema,
        )  # fmt: skip
        if needed.total <= budget:
            return Choice(mode, part, checkpoint, needed, budget, tuple(refused))
        refused.append((_named(mode, part, checkpoint), needed.total))
    named, least = min(refused, key=lambda way: way[1])
    raise RecipeError(
        f"no mode of joint training fits into {format_bytes(budget)}: the least, {named}, needs {format_bytes(least)} "
        f"({least} B); lower train.batch_videos, or give more --memory"
    )


def _ways(ratio: float, snippets: bool) -> Iterator[tuple[str, float, bool]]:
    """(mode, ratio, checkpoint), best first."""
    sampled = snippets and ratio < 1  # egs of all clips is full
    yield "full", 1.0, False
    if sampled:
        yield "egs", ratio, False
    yield "full", 1.0, True
    if sampled:
        yield "egs", ratio, True
    if snippets:
        for part in [tenths / 10 for tenths in range(9, 0, -1) if tenths / 10 < ratio]:
            yield "egs", part, False
            yield "egs", part, True
        least = min(ratio, 0.1)
        if least > 0:
            yield "bank", least, False
            yield "bank", least, True
    yield "pre-extracted", 0.0, False


def _named(mode: str, ratio: float, checkpoint: bool) -> str:
    sampled = f" of {100 * ratio:g} % of the clips" if mode in ("egs", "bank") else ""
    return f"{mode}{sampled}{' with checkpointing' if checkpoint else ''}"


def _chosen(mode: str, ratio: float, clips: int) -> int:
    """Clips of a sample whose activations are kept."""
    if mode == "full":
        return clips
    return 0 if mode == "pre-extracted" or ratio == 0 else sample_count(ratio, clips)


def _check(streams: Sequence[StreamCost], *, samples: int, mode: str, ratio: float, chunk: int, optimizer: str) -> None:
    if mode not in MODES:
        raise RecipeError(f"unknown mode {mode!r} of joint training.{did_you_mean(str(mode), MODES)}")
    if optimizer not in OPTIMIZER_STATE:
        raise RecipeError(f"unknown optimizer {optimizer!r}.{did_you_mean(str(optimizer), OPTIMIZER_STATE)}")
    if not 0 <= ratio <= 1:
        raise RecipeError(f"joint.ratio lies from 0 to 1, got {ratio!r}")
    counts = {"samples": samples, "chunk": chunk, **{f"clips[{i}]": s.clips for i, s in enumerate(streams)}}
    for name, value in counts.items():
        if value < 1:
            raise RecipeError(f"memory of a joint step: {name} must be at least 1, got {value}")
