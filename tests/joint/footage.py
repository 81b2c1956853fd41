"""Small videos, a store with features and frames of them, and rows computed anew from clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tad.detect.data import RowTruth
from tad.detect.interface import LevelSpec
from tad.detect.windows import read_whole, training_starts
from tad.extract import extract
from tad.extract.backbones import build_backbone
from tad.extract.backbones.base import Backbone
from tad.joint.clips import Clips
from tad.joint.dataset import JointDataset
from tad.joint.frames import open_sources
from tad.recipe import DataRecipe, ExtractRecipe
from tad.store import Store, open_store
from tad.synth import make_video

SECONDS = {"a/b ünï": 6.1, "short": 0.4, "third": 3.3}  # of 10 frames
SIZE = (40, 56)
WEIGHTS = "random:3"


def make_footage(root: Path) -> Path:
    """Videos and a list of them, with ids that are no file names."""
    lines = []
    for number, (video, seconds) in enumerate(SECONDS.items()):
        make_video(root / f"v{number}.mp4", duration_s=seconds, seed=number, size=SIZE, fps=10.0)
        lines.append(f"{video}\tv{number}.mp4")
    (root / "videos.txt").write_text("\n".join(lines), encoding="utf-8")
    return root / "videos.txt"


def recipe(backbone: str = "tiny", **changes: Any) -> ExtractRecipe:
    raw = backbone in ("frames", "flow-frames")
    values: dict[str, Any] = {"backbone": backbone, "short_side": 32, "crop": "full" if raw else (24, 32)}
    values |= {} if raw else {"weights": WEIGHTS, "window": 8, "stride": 4}
    return ExtractRecipe(**{**values, **changes})


def filled(listed: Path, store: Path, recipes: Mapping[str, ExtractRecipe]) -> Store:
    """A store with these streams of the videos, open for reading."""
    report = extract(listed, store=store, recipes=list(recipes.values()), names=list(recipes))
    assert report.failures == []
    return open_store(store)


@lru_cache
def network(backbone: str) -> Backbone:
    return build_backbone(backbone, weights=WEIGHTS).eval().fuse()


def outputs(backbone: str, clips: Clips, *, levels: bool = False) -> dict[str, np.ndarray]:
    """What the network makes of clips: ``features`` (U, D), levels (U, C, T', H', W')."""
    module = network(backbone)
    found = []
    with torch.inference_mode():
        for index in clips.index:
            clip = clips.frames[index].transpose(0, 1)[None]  # (1, C, W, h, w)
            found.append(module(module.normalise(clip), levels=levels))
    return {key: torch.cat([part[key] for part in found]).numpy() for key in found[0]}


def placed(rows: np.ndarray, clips: Clips) -> np.ndarray:
    """Rows (U, D) of the clips at the places of the sample's, (T, D)."""
    return np.stack([np.interp(clips.place.numpy(), np.arange(len(rows)), column) for column in rows.T], 1)


def dataset(
    store: Store, needs: Sequence[LevelSpec], *, opened: Mapping[str, Any] | None = None, **options: Any
) -> JointDataset:
    """All videos of the first need, every window of them."""
    data = options.pop("data", DataRecipe(train_stride=3, empty_windows=True))
    videos = options.pop("videos", store.videos(needs[0].stream))
    truth = {video: RowTruth(np.array([[0, 1]], np.float32), np.array([0])) for video in videos}
    options = {"seed": 5, "cache": {}, "sources": open_sources(store, needs, **(opened or {})), **options}
    starts = {video: training_starts(read_whole(store, needs, video, data), needs, data) for video in videos}
    return JointDataset(store=store, needs=needs, truth=truth, data=data, starts=starts, **options)
