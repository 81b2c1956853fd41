"""How much memory a step of joint training takes, and which mode a budget admits; ``counting.py`` has the parts.

Not in the sum: what the libraries keep for themselves, a bank of features, and the workers that read frames, which live
in the host's memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal

from tad.detect.samplers import sample_count
from tad.errors import RecipeError, did_you_mean
from tad.joint.counting import DetectorCost, StreamCost

MODES = ("full", "egs", "bank", "pre-extracted")
OPTIMIZER_STATE = {"adam": 2, "adamw": 2, "sgd": 1}  # tensors of a parameter's size beside it
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


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

    def line(self) -> str:
        """For the log: what takes how much."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        return "memory: " + ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)


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
        lines = [f"memory: {named}: needs {format_bytes(need)}, does not fit" for named, need in self.refused]
        lines.append(
            f"memory: {_named(self.mode, self.ratio, self.checkpoint)}: needs {format_bytes(self.estimate.total)} of "
            f"{format_bytes(self.budget)}, chosen"
        )
        return [*lines, self.estimate.line()]


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
