"""What ``tad recipe check`` says of recipes that train the backbone along, beside what the training says of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tad.cli import main
from tad.detect.recipe_check import RecipeCheck, check_recipe
from tad.errors import TadError
from tad.joint import train_joint
from tad.joint.check import check_joint_recipe
from tad.recipe import DetectRecipe, dump_yaml
from tad.store import open_store
from tests.joint.test_train import make_world, recipe_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def checked(world: Path, recipe: DetectRecipe, *, read: bool = True) -> RecipeCheck:
    given: dict[str, Any] = {"store": world / "features.zarr", "annotations": world / "annotations.json", "read": read}
    check = check_recipe(recipe, device="cpu", **given)
    check_joint_recipe(check, recipe, **given)
    return check


@pytest.mark.parametrize("detector", ["talnet", "etad", "sptad"])
def test_what_can_be_trained_has_no_problem(world: Path, detector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("tad.joint.frames.StoredFrames.read", forbidden)
    for mode in ("full", "pre-extracted") if detector == "sptad" else ("egs", "bank"):
        check = checked(world, recipe_of(detector, joint={"mode": mode}))
        assert check.problems == []
        assert sum("tad train-joint" in note for note in check.notes) == 1


@pytest.mark.parametrize(
    ("detector", "changes", "words", "read"),
    [
        ("talnet", {"joint": {"frames": "nope"}}, "no stream 'nope' with the frames", False),
        ("talnet", {"joint": {"frames": "net"}}, "holds features, not frames", False),
        ("talnet", {"joint": {"videos": "/nowhere"}}, "is not among the 1 files", False),
        ("talnet", {"data": {"row_spacing": 2}}, "row_spacing", False),
        ("sptad", {"joint": {"mode": "bank"}}, "samples snippets", False),
        ("sptad", {"joint": {"mode": "egs"}}, "samples snippets", True),
        ("tcanet", {}, "extract with --run", False),
    ],
)
def test_what_train_joint_refuses_is_a_problem(
    world: Path, tmp_path: Path, detector: str, changes: dict[str, Any], words: str, read: bool
) -> None:
    recipe = recipe_of(detector, **changes)
    with pytest.raises(TadError, match=words):
        train_joint(
            recipe, store=world / "features.zarr", annotations=world / "annotations.json", out=tmp_path / "run",
            device="cpu",
        )  # fmt: skip
    told = [problem for problem in checked(world, recipe, read=read).problems if words in problem]
    assert len(told) == 1


def test_several_problems_at_once_and_backbones_that_are_gone(world: Path, tmp_path: Path) -> None:
    both = checked(world, recipe_of("sptad", joint={"mode": "bank"}, data={"row_spacing": 2}), read=False)
    assert len(both.problems) == 2
    shutil.copytree(world, tmp_path / "own")
    with open_store(tmp_path / "own/features.zarr", "a") as store:
        store.delete("frames", "training-000")
    left = checked(tmp_path / "own", recipe_of())
    assert left.problems == []
    assert any("1 videos lack usable frames" in note and "'training-000'" in note for note in left.notes)
    with open_store(tmp_path / "own/features.zarr", "a") as store:
        for video in ("validation-000", "validation-001"):
            store.delete("frames", video)
    told = checked(tmp_path / "own", recipe_of()).problems
    assert len(told) == 1
    assert "no held-out video that counts has frames" in told[0]
    shutil.move(world / "tiny.pt", world / "moved.pt")
    try:
        assert checked(world, recipe_of(), read=False).problems == []  # a quick look does not look for weights
        told = checked(world, recipe_of()).problems
    finally:
        shutil.move(world / "moved.pt", world / "tiny.pt")
    assert len(told) == 1
    assert "tiny.pt" in told[0]


def test_the_command_says_it(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(dump_yaml(recipe_of()))
    words = ["recipe", "check", str(file), "--store", str(world / "features.zarr"), "--annotations",
             str(world / "annotations.json"), "--device", "cpu", "--json"]  # fmt: skip
    good = CliRunner().invoke(main, words)
    assert (good.exit_code, json.loads(good.stdout)["ok"]) == (0, True)
    bad = CliRunner().invoke(main, [*words, "--quick", "--set", "joint.frames=nope"])
    assert (bad.exit_code, len(json.loads(bad.stdout)["problems"])) == (1, 1)
