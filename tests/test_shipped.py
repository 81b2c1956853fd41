"""The recipes that come with tad: each is valid and makes its detector; names find them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tad.shipped
from tad.detect.recipe_check import full_recipe
from tad.detect.recipes import DEFAULTS, detect_recipe
from tad.errors import RecipeError
from tad.extract.backbones import BACKBONES
from tad.recipe import DetectRecipe, dump_yaml, load_mapping, validated
from tad.shipped import find_recipe, recipes_folder, shipped_recipes

RECIPES = shipped_recipes()
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _no_memory() -> object:
    """Networks of full width are made on no device: what matters is whether they can be made."""
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("shipped", RECIPES, ids=lambda shipped: shipped.name)
def test_every_recipe_is_valid_and_makes_its_detector(shipped: tad.shipped.Shipped, tmp_path: Path) -> None:
    recipe = detect_recipe(file=shipped.path)
    assert recipe.detector == shipped.detector == shipped.path.parent.name
    assert recipe.streams == shipped.streams
    full = full_recipe(recipe)  # builds it
    assert full.model.items() >= recipe.model.items()
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_yaml(full), encoding="utf-8")
    again = detect_recipe(file=file)
    assert again.model_dump(mode="json") == full.model_dump(mode="json")
    assert full_recipe(again).model_dump(mode="json") == full.model_dump(mode="json")


@pytest.mark.parametrize("shipped", RECIPES, ids=lambda shipped: shipped.name)
def test_every_recipe_says_what_it_is(shipped: tad.shipped.Shipped) -> None:
    text = shipped.path.read_text(encoding="utf-8")
    assert shipped.about
    assert len(text.splitlines()) < 60
    comments = [line for line in text.splitlines() if line.startswith("#")]
    for line in comments:
        for backbone in re.findall(r"tad extract .*--backbone (\S+)", line):
            assert backbone == "i3d" or backbone in BACKBONES
        for stream in re.findall(r"--stream (\S+)", line):
            assert stream in shipped.streams
        for mentioned in re.findall(r"recipes/\S+\.yaml", line):
            assert (ROOT / mentioned).is_file(), mentioned


@pytest.mark.parametrize("detector", sorted(DEFAULTS))
def test_defaults_of_detectors_make_them(detector: str) -> None:
    recipe = detect_recipe(detector, streams=["a", "b"])
    assert full_recipe(recipe).detector == detector


@pytest.mark.parametrize(
    ("folder", "rows"),
    [
        # every row of our systems in the tables: its mean average precision stands in the first two lines
        (
            "bmn",
            "38.88 40.88 38.83 39.77 36.63 37.30 32.23 37.28 38.39 39.91 33.46 33.91 39.57 41.62 33.85 38.8/ 35.76",
        ),
        ("tcanet", "42.74 42.42 35.52 44.6/ 38.71"),
        (
            "etad",
            "36.06 37.78 55.65 57.81 36.13 36.04 32.97 33.59 36.16 34.84 35.10 34.80 34.82 35.25 35.81 35.97 35.94 "
            "35.86 35.66 38.77 38.76 34.49",
        ),
    ],
)
def test_no_row_of_the_tables_is_missing(folder: str, rows: str) -> None:
    heads = "\n".join("".join(r.path.read_text().splitlines()[:2]) for r in RECIPES if r.detector == folder)
    assert [row for row in rows.split() if row not in heads] == []


def test_no_two_recipes_are_the_same() -> None:
    seen: dict[str, str] = {}
    for shipped in RECIPES:
        text = dump_yaml(validated(DetectRecipe, load_mapping(shipped.path), where=shipped.name))
        assert text not in seen, f"{shipped.name} is {seen.get(text)}"
        seen[text] = shipped.name


def test_recipes_are_found_by_name_and_as_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipes_folder() / "bmn" / "hacs-table3-5-csn.yaml"
    monkeypatch.chdir(tmp_path)
    for name in (
        "bmn/hacs-table3-5-csn",
        "bmn/hacs-table3-5-csn.yaml",
        "recipes/bmn/hacs-table3-5-csn.yaml",
        "hacs-table3-5-csn",
        path,
    ):
        assert find_recipe(name) == path
    mine = tmp_path / "bmn" / "hacs-table3-5-csn"
    mine.parent.mkdir()
    mine.write_text("detector: bmn\n")
    assert find_recipe("bmn/hacs-table3-5-csn") == Path("bmn/hacs-table3-5-csn")  # a file goes before
    with pytest.raises(RecipeError, match=r"several recipes.*bmn/activity.*tcanet/activity"):
        find_recipe("activitynet-etad-table2-tsn")
    with pytest.raises(RecipeError, match="Did you mean 'bmn/hacs-table3-5-csn'"):
        find_recipe("bmn/hacs-table3-5-csm")
    with pytest.raises(RecipeError, match="tad recipe ls"):
        find_recipe("qqqq")
    with pytest.raises(RecipeError, match=r"no recipe of a detector 'bnm'.*Did you mean 'bmn'"):
        shipped_recipes("bnm")


def test_an_installed_package_finds_its_own(tmp_path: Path) -> None:
    """As a wheel lays them: below the package, without the checkout round it."""
    shutil.copytree(Path(tad.shipped.__file__).parent, tmp_path / "tad", ignore=lambda *_: ["recipes", "__pycache__"])
    code = "from tad.shipped import find_recipe; print(find_recipe('talnet/thumos14'))"

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )

    assert "came without its recipes" in run().stderr
    shutil.copytree(recipes_folder(), tmp_path / "tad" / "recipes")
    assert run().stdout.strip() == str(tmp_path / "tad/recipes/talnet/thumos14.yaml")
