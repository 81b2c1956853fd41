"""A small world for joint runs: videos, features of two streams of one backbone, a detector trained on them, and what
a joint training would make of both.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tad.detect import train_detector
from tad.detect.runs import Run, read_weights, write_weights
from tad.extract import build_backbone, extract
from tad.extract.backbones.base import Backbone
from tad.joint.runs import save_backbones, starting_features, write_starting
from tad.recipe import DetectRecipe, ExtractRecipe
from tad.synth import make_videos

STREAMS = ("look", "look-2")  # of one backbone, and one name begins with the other
TAGGED = "proposal_networks.0.reduce.bias"  # a tensor of the detector


def make_world(root: Path) -> Path:
    """``videos/``, ``annotations.json``, ``tiny.pt``, ``features.zarr`` and ``two-stage``, a run of TAL-Net."""
    make_videos(root, videos=3, seed=1, subset="training", duration_s=(4.0, 6.0), size=(40, 40))
    torch.save(build_backbone("tiny", weights="random:5").state_dict(), root / "tiny.pt")
    weights = {"look": str(root / "tiny.pt"), "look-2": "random:2"}
    recipes = [ExtractRecipe(backbone="tiny", weights=weights[name], stride=8, fps=12.5) for name in STREAMS]
    extract(root / "videos", store=root / "features.zarr", recipes=recipes, names=STREAMS)
    recipe = DetectRecipe(
        detector="talnet",
        streams=STREAMS,
        model={"width": 8, "anchor_scales": [2, 4]},
        train={"epochs": 1, "batch_videos": 3, "select": "last"},  # type: ignore[arg-type]
        data={"holdout": 0.0},  # type: ignore[arg-type]
        postprocess={"method": "nms", "tiou": 0.5, "max_segments": 10},  # type: ignore[arg-type]
    )
    train_detector(recipe, store=root / "features.zarr", annotations=root / "annotations.json", out=root / "two-stage")
    return root


def begun(root: Path, path: Path) -> Path:
    """The two-stage run as that of a joint training before its first epoch."""
    shutil.copytree(root / "two-stage", path)
    (path / "best.safetensors").unlink()
    (path / "metrics.json").unlink()
    write_starting(path, Run.load(path).features)
    return path


def moved(root: Path, epoch: int) -> dict[str, Backbone]:
    """The backbones of both streams as epoch ``epoch`` might leave them: another bias in each."""
    backbones = {
        "look": build_backbone("tiny", weights=root / "tiny.pt"),
        "look-2": build_backbone("tiny", weights="random:2"),
    }
    for number, backbone in enumerate(backbones.values()):
        with torch.no_grad():
            last = list(backbone.parameters())[-1]
            last += 0.25 * epoch + 0.01 * number
    return backbones


def save(root: Path, path: Path, epoch: int) -> dict[str, dict[str, Any]]:
    """Save what epoch ``epoch`` left: both backbones, and the detector with the epoch's number in ``TAGGED``."""
    return save_backbones(path, starting_features(path), moved(root, epoch), detector_writer(root, epoch))


def detector_writer(root: Path, epoch: int) -> Callable[..., None]:
    def write(file: Path, **about: Any) -> None:
        state = read_weights(root / "two-stage" / "best.safetensors")
        state[TAGGED] = state[TAGGED].clone()
        state[TAGGED].view(-1)[0] = epoch
        write_weights(file, state, detector="talnet", epoch=epoch, **about)

    return write
