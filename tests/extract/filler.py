"""Deterministic weights and clips for parity checks: every tensor is drawn from a generator seeded by its own name.

The rule is that of ``golden/backbones/README.md``; the recorded outputs of the public implementations were made with
it, so a network that is filled by the *public* key names and loaded through tad must reproduce them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def filled_array(key: str, shape: Sequence[int], gain: float = 1.0) -> np.ndarray:
    """The array of one state entry: float32, or int64 zeros for ``num_batches_tracked``."""
    last = key.rpartition(".")[2]
    if last == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    rng = np.random.Generator(np.random.PCG64(seed))
    if last in ("running_mean", "bias"):
        return rng.standard_normal(shape, np.float32) * np.float32(0.1)
    if last == "running_var" or (last == "weight" and len(shape) == 1):
        return rng.random(shape, np.float32) + np.float32(0.5)
    if last == "weight":
        return rng.standard_normal(shape, np.float32) * np.float32(gain * math.sqrt(2 / math.prod(shape[1:])))
    return rng.standard_normal(shape, np.float32) * np.float32(0.02)


def filled_state(shapes: Mapping[str, Sequence[int]], gain: float = 1.0) -> dict[str, Tensor]:
    """A state dict with the keys and shapes given."""
    return {key: torch.from_numpy(filled_array(key, tuple(shape), gain)) for key, shape in shapes.items()}


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the keys in sorted order, each followed by its array's bytes."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(state[key].numpy()).tobytes())
    return digest.hexdigest()


def filled_clip(shape: Sequence[int], seed: int = 0) -> Tensor:
    """Standard normal clip, as the recorded outputs were made from."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(shape), np.float32))


def golden(shared: Path, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One golden model: its description and its recorded arrays."""
    folder = shared / "golden" / "backbones"
    record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    with np.load(folder / f"{name}.npz") as arrays:
        return record, {key: arrays[key] for key in arrays.files}


def relative_error(value: Tensor | np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, in standard deviations of what is expected."""
    difference = np.abs(np.asarray(value, np.float64) - np.asarray(expected, np.float64))
    return float(difference.max() / np.asarray(expected, np.float64).std())
