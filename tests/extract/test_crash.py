"""A process that extracts is killed for real, again and again: no damage is ever visible, a rerun does the rest."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tad.recipe import ExtractRecipe
from tad.store import open_store
from tad.synth import make_video

ROUNDS = 20
RECIPES = [
    *(
        ExtractRecipe(backbone=name, weights="random:1", window=8, stride=8, levels=True, maps=("s2",))
        for name in ("tiny", "tiny-flow")
    ),
    ExtractRecipe(backbone="frames"),
]


def run_extract(folder: str, store: str, format: str, overwrite: bool, started: Any = None) -> None:
    import torch

    from tad.extract import extract

    torch.set_num_threads(1)
    if started is not None:
        started.set()
    extract(folder, store=store, recipes=RECIPES, format=format, overwrite=overwrite, batch=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for number in range(6):
        make_video(root / f"video {number}.mp4", duration_s=2.0 + 0.5 * number, seed=number, fps=10.0, size=(72, 96))
    return root


@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_killed_extraction_never_shows_damage(tmp_path: Path, folder: Path, format: str) -> None:
    # a fork server imports torch once, so that every round is a fresh process that starts at once
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tad.extract"])
    rng = np.random.default_rng(7)
    store = str(tmp_path / "store")
    whole_s = 0.0
    for overwrite in (False, True):  # the second time nothing has to be imported any more
        began = time.monotonic()
        run_extract(str(folder), str(tmp_path / "warm"), format, overwrite)
        whole_s = time.monotonic() - began
    visible, killed = [], 0
    for round_ in range(ROUNDS):
        started = context.Event()
        process = context.Process(target=run_extract, args=(str(folder), store, format, round_ % 4 != 0, started))
        process.start()
        assert started.wait(timeout=120)
        process.join(timeout=float(rng.uniform(0.05, 1.0) * whole_s))
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += process.exitcode == -signal.SIGKILL
        if not Path(store).exists():
            continue
        try:
            opened = open_store(store)
        except Exception:  # noqa: BLE001 - killed before the root was there: nothing may be visible then
            assert not list(Path(store).rglob("*.h5"))
            continue
        with opened:
            report = opened.verify(deep=True)
            assert report.ok, report.problems
            visible.append(report.checked)
    assert killed >= ROUNDS // 2, "too few rounds were killed while they ran"
    assert max(visible) > 0

    run_extract(str(folder), store, format, False)
    with open_store(store) as rerun, open_store(str(tmp_path / "warm")) as clean:
        assert rerun.verify(deep=True).ok
        assert list(rerun) == list(clean)
        assert len(list(rerun)) == 18
        for stream, video in rerun:
            for level in rerun.levels(stream, video):
                coarse = {"rtol": 1e-3, "atol": 1e-4} if level.endswith("-map") else {"rtol": 1e-5, "atol": 1e-6}
                np.testing.assert_allclose(
                    rerun[stream, video, level].numpy(), clean[stream, video, level].numpy(), **coarse
                )
