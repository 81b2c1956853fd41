"""Recipes: what is refused, with which words, and that files read back as they were written."""

from pathlib import Path

import pytest

from tad.errors import RecipeError
from tad.recipe import DetectRecipe, ExtractRecipe, apply_sets, dump_yaml, load_mapping, validated

BASE = {"detector": "talnet", "streams": ["rgb", "flow"]}


def test_yaml_round_trip(tmp_path: Path) -> None:
    recipe = validated(
        DetectRecipe,
        apply_sets(BASE, ["train.lr=1e-3", "model.anchor_scales=[1, 2.5]", "postprocess.method=soft_nms"]),
        where="x",
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_yaml(recipe), encoding="utf-8")
    assert validated(DetectRecipe, load_mapping(file), where=str(file)) == recipe


def test_yaml_reads_exponents_as_numbers(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("detector: talnet\nstreams: [a]\nmodel: {x: 1e-4, y: 1E3, z: '1e-4', w: 12e03}\n")
    assert load_mapping(file)["model"] == {"x": 1e-4, "y": 1e3, "z": "1e-4", "w": 12e3}


def test_sets_do_not_touch_what_they_were_given() -> None:
    data = {"train": {"epochs": 1}}
    assert apply_sets(data, ["train.epochs=2", "train.lr=1"]) == {"train": {"epochs": 2, "lr": 1}}
    assert data == {"train": {"epochs": 1}}


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["train.epoch=3"], ["train.epoch", "Did you mean 'epochs'?"]),
        (["trian.epochs=3"], ["trian", "Did you mean 'train'?"]),
        (["joint.rati=1"], ["joint.rati", "Did you mean 'ratio'?"]),
        (["train.lr=fast"], ["train.lr", "number"]),
        (["train.lr=-1"], ["train.lr", "greater than 0"]),
        (["train"], ["key=value"]),
        (["detector.x=1"], ["'detector' is a value"]),
        (["streams=[a, a]"], ["streams repeat"]),
        (["streams=[]"], ["streams"]),
        (["model={"], ["YAML"]),
    ],
)
def test_refusals_say_where_and_what(sets: list[str], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        validated(DetectRecipe, apply_sets(BASE, sets), where="run.yaml")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_missing_and_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.yaml"):
        load_mapping(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(RecipeError, match="mapping"):
        load_mapping(tmp_path / "list.yaml")


def test_recipes_are_frozen_values() -> None:
    recipe = ExtractRecipe(backbone="i3d-rgb", crop=(224, 224))
    assert recipe == ExtractRecipe(backbone="i3d-rgb", crop=(224, 224))
    with pytest.raises(ValueError, match="frozen"):
        recipe.backbone = "other"  # type: ignore[misc]


def test_a_recipe_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"detector: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"r\.yaml is not UTF-8"):
        load_mapping(tmp_path / "r.yaml")
