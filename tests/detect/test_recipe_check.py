"""What is said of a recipe before it is trained: all problems at once, and none where the training begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tad.detect import train_detector
from tad.detect.recipe_check import check_recipe, full_recipe
from tad.errors import RecipeError, TadError
from tad.recipe import DetectRecipe, dump_yaml, parse_yaml
from tad.store import open_store
from tests.detect.toydetector import CLASSES, make_world, toy_recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_recipe_that_can_be_trained(world: tuple[Path, Path], tmp_path: Path) -> None:
    store, annotations = world
    recipe = toy_recipe(train={"epochs": 1})
    check = check_recipe(recipe, store=store, annotations=annotations)
    assert check.problems == []
    metrics = train_detector(recipe, store=store, annotations=annotations, out=tmp_path / "run", device="cpu")
    for key in ("train_videos", "holdout_videos", "classes", "segments"):
        assert check.counts[key] == metrics["counts"][key]
    assert (check.counts["train_videos"], check.counts["classes"]) == (9, len(CLASSES))
    log = (tmp_path / "run" / "log.txt").read_text()
    assert all(note in log for note in check.notes)


def test_a_quick_look_reads_no_features(world: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("tad.detect.recipe_check.read_training", forbidden)
    check = check_recipe(toy_recipe(), store=world[0], annotations=world[1], read=False)
    assert check.problems == []
    assert check.counts["holdout_videos"] == 3
    assert "segments" not in check.counts


def test_all_problems_at_once(world: tuple[Path, Path]) -> None:
    recipe = toy_recipe(
        streams=["rgb", "depth", "sound"],
        model={"widht": 8},
        data={"train_subset": "trianing"},
        train={"schedule": "step"},
        classes={"top": 3},
    )
    check = check_recipe(recipe, store=world[0], annotations=world[1])
    told = "\n".join(check.problems)
    for word in ("'depth'", "'sound'", "Did you mean 'width'", "trianing", "step_epochs", "leave 'classes' out"):
        assert told.count(word) == 1, word
    assert len(check.problems) == 6


def test_unreadable_store_and_annotations_and_an_unknown_detector(world: tuple[Path, Path], tmp_path: Path) -> None:
    check = check_recipe(
        toy_recipe(detector="toi"), store=tmp_path / "none.zarr", annotations=tmp_path / "none.json", device="tpu"
    )
    told = "\n".join(check.problems)
    for word in ("none.zarr", "none.json", "Did you mean 'toy'", "'tpu'"):
        assert word in told, word
    assert len(check.problems) == 4


def test_the_subset_is_looked_at_without_any_stream(world: tuple[Path, Path]) -> None:
    recipe = toy_recipe(streams=["depth"], data={"train_subset": "trianing"})
    told = check_recipe(recipe, store=world[0], annotations=world[1]).problems
    assert len(told) == 2
    assert "trianing" in told[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"holdout": 0.0}}, "train.select=map"),
        ({"data": {"holdout_subset": "training"}}, "shares videos"),
        ({"detector": "toy-refiner", "model": {}}, "proposals.run=runs/bmn"),
        ({"detector": "toy-proposals", "classes": {"scores": "nowhere.json"}}, "nowhere.json"),
        ({"model": {"layout": "rescaled"}}, "need a number of rows"),
        ({"train": {"precision": "fp16"}}, "CUDA"),
    ],
)
def test_single_problems_as_the_training_says_them(
    changes: dict[str, Any], words: str, world: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = toy_recipe(**changes)
    check = check_recipe(recipe, store=world[0], annotations=world[1], device="cpu")
    assert len(check.problems) == 1
    assert words in check.problems[0]
    with pytest.raises(TadError) as raised:
        train_detector(recipe, store=world[0], annotations=world[1], out=tmp_path / "run", device="cpu")
    assert str(raised.value) == check.problems[0]
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_windows_are_counted(world: tuple[Path, Path]) -> None:
    recipe = toy_recipe(model={"layout": "windowed", "rows": 32})
    check = check_recipe(recipe, store=world[0], annotations=world[1])
    assert check.counts["windows"] > check.counts["train_videos"]
    assert any("windows of 32 rows" in note for note in check.notes)


def test_videos_without_features_are_no_problem(tmp_path: Path) -> None:
    path, annotations = make_world(tmp_path, training=6)
    with open_store(path, "a") as store:
        store.delete("flow", "video_002")
    check = check_recipe(toy_recipe(), store=path, annotations=annotations)
    assert check.problems == []
    assert check.counts["missing_videos"] == 1
    assert any("'video_002'" in note and "flow" in note for note in check.notes)


def test_what_is_left_to_the_data_is_filled_in(world: tuple[Path, Path]) -> None:
    recipe = toy_recipe(detector="talnet", model={"anchor_scales": "auto", "width": 8})
    assert check_recipe(recipe, store=world[0], annotations=world[1]).problems == []
    assert full_recipe(recipe).model["anchor_scales"] == "auto"
    wrong = toy_recipe(detector="talnet", streams=["rgb", "gone"], model={"anchor_scales": "auto", "wdth": 8})
    problems = check_recipe(wrong, store=world[0], annotations=world[1]).problems
    assert len(problems) == 2
    assert "Did you mean 'width'" in problems[1]


def test_the_full_recipe_trains_the_same(world: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = toy_recipe(train={"epochs": 1})
    text = dump_yaml(full_recipe(recipe))
    again = DetectRecipe.model_validate(parse_yaml(text, where="text"))
    assert again.model == {"width": 16, "dropout": 0.3, "norm": False, "layout": "full", "rows": None}
    losses = []
    for name, one in (("given", recipe), ("full", again)):
        train_detector(one, store=world[0], annotations=world[1], out=tmp_path / name, device="cpu")
        losses.append((tmp_path / name / "best.safetensors").read_bytes())
    assert losses[0] == losses[1]
    assert json.loads((tmp_path / "full" / "metrics.json").read_text())["best_epoch"] == 1


def test_full_recipes_of_what_does_not_exist() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'talnet'"):
        full_recipe(toy_recipe(detector="talnte"))
    with pytest.raises(RecipeError, match="Did you mean 'width'"):
        full_recipe(toy_recipe(model={"widt": 3}))
