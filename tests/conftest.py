"""Fixtures for all tests: the shared folder."""

import os
from pathlib import Path

import pytest

# How sums round depends on the number of threads, so all processes have one; set before any test imports torch.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden values and real data (``TAD_SHARED``); tests that need it skip where it is absent."""
    root = Path(os.environ.get("TAD_SHARED", Path(__file__).parents[2] / "shared"))
    if not root.is_dir():
        pytest.skip(f"the shared folder is absent: {root} (set TAD_SHARED to where it lies)")
    return root.resolve()
