"""Which mode a budget of memory gives, and that the run says so."""

import re
from pathlib import Path

import pytest
import torch

from tad.annotations import read_truth
from tad.detect.detectors import build_detector
from tad.detect.preflight import plan_training
from tad.errors import RecipeError
from tad.extract import build_backbone
from tad.joint import train_joint
from tad.joint.counting import saved_bytes
from tad.joint.encoder import Encoder
from tad.joint.fitting import costs, fitted, longest_rows
from tad.joint.freezing import freeze
from tad.joint.memory import parse_bytes
from tad.recipe import DetectRecipe, JointRecipe, load_mapping
from tad.store import open_store
from tests.joint.trained import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def recipe_of(world: Path, **joint: object) -> DetectRecipe:
    return DetectRecipe(
        detector="talnet",
        streams=("look",),
        model={"width": 8, "anchor_scales": [2, 4]},
        train={"epochs": 1, "batch_videos": 3, "select": "last"},  # type: ignore[arg-type]
        data={"holdout": 0.0},  # type: ignore[arg-type]
        joint=JointRecipe(videos=str(world / "videos"), random_crop=False, **joint),  # type: ignore[arg-type]
    )


def test_less_memory_gives_a_lesser_mode_and_too_little_is_refused(world: Path) -> None:
    truth = read_truth(world / "annotations.json")
    recipe = recipe_of(world, chunk=2)
    modes = []
    with open_store(world / "features.zarr") as store:
        state = torch.get_rng_state()
        same, lines = fitted(recipe, store, truth, memory_bytes=None)
        assert same == recipe
        assert len(lines) == 2
        assert "egs" in lines[0]
        assert "activations" in lines[1]
        for budget in (2**30, *(int(2**25 * 0.7**step) for step in range(4))):
            try:
                chosen, lines = fitted(recipe, store, truth, memory_bytes=budget)
            except RecipeError:
                break
            assert chosen.joint is not None
            assert any("chosen" in line for line in lines)
            modes.append(chosen.joint.mode)
        with pytest.raises(RecipeError, match="no mode"):
            fitted(recipe, store, truth, memory_bytes=1000)
        assert torch.equal(torch.get_rng_state(), state)
    assert modes[0] == "full"
    assert modes == sorted(modes, key=("full", "egs", "bank", "pre-extracted").index)
    assert len(set(modes)) > 1


def test_the_estimated_activations_are_those_of_the_real_backbone(world: Path) -> None:

    recipe = recipe_of(world)
    truth = read_truth(world / "annotations.json")
    with open_store(world / "features.zarr") as store:
        plan = plan_training(recipe, store, truth)
        detector = build_detector("talnet", channels=plan.channels, classes=len(plan.classes), **recipe.model)
        rows = longest_rows(recipe, plan, store, detector.needs[0])
        assert rows == max(len(store["look", video]) for video in plan.train)
        assert recipe.joint is not None
        (cost,) = costs(recipe, recipe.joint, plan, store, detector, rows)
    assert cost.clips == rows
    backbone = build_backbone("tiny", weights=world / "tiny.pt")
    freeze(backbone, stages=2, norms=True)
    encoder = Encoder(backbone=backbone, chunk=rows).train()
    frames = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    index = torch.arange(16).expand(rows, -1)
    known = [*encoder.parameters(), *encoder.buffers(), frames]
    real = saved_bytes(lambda: encoder(frames, index), known=known)
    assert real == pytest.approx(rows * cost.backbone.saved, rel=0.05)


def test_the_run_records_the_chosen_mode_and_its_log_says_why(world: Path, tmp_path: Path) -> None:
    recipe = recipe_of(world)
    with open_store(world / "features.zarr") as store:
        _, lines = fitted(recipe, store, read_truth(world / "annotations.json"), memory_bytes=2**40)
    assert "full" in lines[-2]
    train_joint(
        recipe,
        store=world / "features.zarr",
        annotations=world / "annotations.json",
        out=tmp_path / "run",
        memory_bytes=2**40,
        device="cpu",
    )
    written = load_mapping(tmp_path / "run" / "recipe.yaml")
    assert written["joint"]["mode"] == "full"
    assert written["joint"]["checkpoint"] is False
    assert lines[-2] in (tmp_path / "run" / "log.txt").read_text()
    assert recipe.joint is not None
    as_chosen = recipe.model_copy(update={"joint": recipe.joint.model_copy(update={"mode": "full", "ratio": 1.0})})
    for given, budget in ((recipe, 2**30), (recipe, None), (as_chosen, None)):
        again = train_joint(
            given,
            store=world / "features.zarr",
            annotations=world / "annotations.json",
            out=tmp_path / "run",
            memory_bytes=budget,
            resume=True,
            device="cpu",
        )
        assert again["epochs"] == 1  # finished, as it was begun
    other = recipe.model_copy(update={"joint": recipe.joint.model_copy(update={"mode": "bank"})})
    with pytest.raises(RecipeError, match=r"another recipe: joint\.mode"):
        train_joint(
            other,
            store=world / "features.zarr",
            annotations=world / "annotations.json",
            out=tmp_path / "run",
            resume=True,
            device="cpu",
        )


@pytest.mark.parametrize("layout", ["rescaled", "windowed"])
def test_clips_are_no_more_than_a_video_has_rows(world: Path, layout: str) -> None:
    model = {"layout": layout, "rows": 64, "width": 8, "lstm_width": 4, "branch_width": 4, "norm_groups": 2,
             "roi_channels": 4, "head_width": 8, "branch_head_width": 4}  # fmt: skip
    recipe = recipe_of(world).model_copy(update={"detector": "etad", "model": model})
    with open_store(world / "features.zarr") as store:
        plan = plan_training(recipe, store, read_truth(world / "annotations.json"))
        detector = build_detector("etad", channels=plan.channels, classes=len(plan.classes), **model)
        assert recipe.joint is not None
        (cost,) = costs(recipe, recipe.joint, plan, store, detector, 64)
        longest = max(len(store["look", video]) for video in plan.train)
    assert cost.clips == longest < 64


def test_the_memory_is_that_of_one_of_several_processes(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, needed = recipe_of(world, mode="full"), []
    for processes in ("1", "2", "3"):
        monkeypatch.setenv("WORLD_SIZE", processes)
        with open_store(world / "features.zarr") as store:
            _, (said, parts) = fitted(recipe, store, read_truth(world / "annotations.json"), memory_bytes=None)
        assert "a step of mode full" in said
        activations = re.search(r"activations ([\d.]+ \w+)", parts)
        assert activations is not None
        needed.append(parse_bytes(activations[1]))
    assert needed[1] == pytest.approx(2 / 3 * needed[0], rel=0.02)  # of three videos two, then one
    assert needed[2] == pytest.approx(1 / 3 * needed[0], rel=0.02)
