"""The random state of a process: seeded, kept, put back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def seeded(seed: int, *parts: int) -> np.random.Generator:
    """A generator that depends on these numbers alone (negative seeds allowed)."""
    return np.random.default_rng([seed & 0xFFFFFFFFFFFFFFFF, *parts])


def seed_all(seed: int, *parts: int) -> None:
    """Seed python's, NumPy's and torch's global generators; ``parts`` other than 0 give each process its own stream."""
    drawn = seeded(seed, *[part for part in parts if part])
    random.seed(int(drawn.integers(2**63)))
    np.random.seed(int(drawn.integers(2**32)))  # noqa: NPY002 - a detector may draw from the global generator
    torch.manual_seed(int(drawn.integers(2**63)))


def random_state() -> dict[str, Any]:
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - see seed_all
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    numpy = state["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})  # noqa: NPY002 - see seed_all
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
