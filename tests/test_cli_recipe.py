"""``tad recipe``, and the commands and code of docs/recipes.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tad.cli import main
from tad.recipe import DetectRecipe, parse_yaml, validated
from tad.shipped import shipped_recipes
from tests.detect.toydetector import make_world

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")


def tad(*words: object) -> Result:
    return CliRunner().invoke(main, ["recipe", *map(str, words)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    store, annotations = make_world(root)
    store.rename(root / "features.zarr")
    annotations.rename(root / "truth.json")
    return root


def test_ls() -> None:
    listed = json.loads(tad("ls", "--detector", "talnet", "--json").stdout)
    assert [one["name"] for one in listed] == [one.name for one in shipped_recipes("talnet")]
    assert all(Path(one["path"]).is_file() and one["about"] and one["streams"] for one in listed)
    shown = tad("ls").stdout
    assert all(one.name in shown for one in shipped_recipes())
    wrong = tad("ls", "--detector", "etda")
    assert wrong.exit_code == 1
    assert "Did you mean 'etad'" in wrong.stderr


def test_show_and_its_output_as_a_file(tmp_path: Path) -> None:
    done = tad("show", "bmn/hacs-table3-5-csn", "--set", "train.epochs=3", "--streams", "a,b", "--seed", "7")
    recipe = validated(DetectRecipe, parse_yaml(done.stdout, where="stdout"), where="stdout")
    assert (recipe.train.epochs, recipe.streams, recipe.seed, recipe.model["rows"]) == (3, ("a", "b"), 7, 200)
    assert recipe.model["samples"] == 32
    file = tmp_path / "mine.yaml"
    file.write_text(done.stdout)
    assert tad("show", file).stdout == done.stdout
    wrong = tad("show", "bmn/hacs-table3-5-csn", "--set", "model.lgt=2")
    assert wrong.exit_code == 1
    assert "Did you mean 'lgte'" in wrong.stderr


def test_check(folder: Path) -> None:
    where = ("--store", folder / "features.zarr", "--annotations", folder / "truth.json")
    good = tad("check", "talnet/planted", *where, "--json")
    assert good.exit_code == 0, good.output
    told = json.loads(good.stdout)
    assert told["ok"]
    assert told["counts"]["train_videos"] == 12
    bad = tad("check", "talnet/thumos14", *where, "--set", "model.fusoin=late", "--quick")
    assert bad.exit_code == 1
    assert re.findall("^problem: ", bad.stderr, re.MULTILINE) == ["problem: "] * 3  # two streams, an option
    assert "Did you mean 'fusion'" in bad.stderr


def test_the_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shown = re.findall(r"^```(bash|python)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in shown] == ["bash", "python"]
    for kind, block in shown:
        command = ["bash", "-euc", block] if kind == "bash" else [sys.executable, "-c", block]
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        assert ("nothing stops this training" if kind == "bash" else "3 stages\n[] whole videos") in done.stdout
    assert (
        validated(DetectRecipe, parse_yaml((folder / "mine.yaml").read_text(), where="x"), where="x").train.epochs == 8
    )
