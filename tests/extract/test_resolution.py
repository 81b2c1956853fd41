"""Any size that a network admits, and no other; the stored recipe says which it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tad.cli import main
from tad.errors import RecipeError
from tad.extract.backbones import SPECS
from tad.extract.streams import geometry_of, recipe_of, resolve
from tad.extract.video import Geometry
from tad.recipe import ExtractRecipe
from tad.store import open_store
from tad.synth import make_video

CONVOLUTIONAL = [name for name, spec in SPECS.items() if spec.any_size]
TRANSFORMERS = [name for name, spec in SPECS.items() if not spec.any_size]


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutional_networks_take_any_size(name: str) -> None:
    spec = SPECS[name]
    assert geometry_of(spec, None, None) == Geometry(spec.short_side, spec.crop, spec.resize)
    assert geometry_of(spec, 256, (256, 320)) == Geometry(256, (256, 320))
    assert geometry_of(spec, None, "full") == Geometry(spec.short_side, None)
    assert geometry_of(spec, None, (224, 224)) == Geometry(spec.short_side, (224, 224))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_take_another_size_only_on_request(name: str) -> None:
    spec = SPECS[name]
    for crop in ((256, 320), "full"):
        with pytest.raises(RecipeError, match="--interpolate-positions"):
            geometry_of(spec, None, crop)
        assert geometry_of(spec, None, crop, interpolate=True).crop == (None if crop == "full" else crop)


def test_an_exact_resize_gives_way_to_what_is_asked_for() -> None:
    spec = SPECS["r2plus1d-34"]
    assert geometry_of(spec, None, None).resize == (128, 171)
    plan = geometry_of(spec, None, None).plan(720, 1280)
    assert (plan.resized, plan.height, plan.width, plan.top, plan.left) == ((128, 171), 112, 112, 8, 29)
    assert geometry_of(spec, 128, None).plan(720, 1280).resized == (128, 228)
    with pytest.raises(RecipeError, match="does not fit"):
        Geometry(128, (200, 112), (128, 171))


def test_the_stored_recipe_says_the_size_and_makes_it_again(tmp_path: Path) -> None:
    given = {
        "resize": ExtractRecipe(backbone="r3d-18", weights="random"),
        "positions": ExtractRecipe(
            backbone="videomae-b", weights="random", crop=(64, 96), short_side=64, window=8, interpolate_positions=True
        ),
        "plain": ExtractRecipe(backbone="tiny", weights="random", crop=(48, 64)),
    }
    streams = {name: resolve(recipe) for name, recipe in given.items()}
    assert streams["resize"].spec["resize"] == [128, 171]
    assert streams["positions"].spec["positions"] == "interpolated"
    assert streams["plain"].spec["crop"] == [48, 64]
    assert not {"resize", "positions"} & streams["plain"].spec.keys()
    for stream in streams.values():
        again = resolve(recipe_of(json.loads(json.dumps(stream.spec)), weights="random"))
        assert again.spec == stream.spec
        assert again.geometry == stream.geometry
        assert again.fps == stream.fps


def test_networks_bring_their_own_rate_and_native_overrules_it(tmp_path: Path) -> None:
    assert resolve(ExtractRecipe(backbone="tiny", weights="random")).fps is None
    assert resolve(ExtractRecipe(backbone="r3d-18", weights="random")).fps == 15
    assert resolve(ExtractRecipe(backbone="r3d-18", weights="random", fps="native")).fps is None
    assert resolve(ExtractRecipe(backbone="r3d-18", weights="random", fps=12.5)).fps == 12.5


def test_on_the_command_line(tmp_path: Path) -> None:
    make_video(tmp_path / "v.mp4", duration_s=2.0, seed=1, size=(48, 64), fps=10.0)
    store = str(tmp_path / "s.zarr")
    arguments = ["extract", str(tmp_path / "v.mp4"), "--store", store, "--weights", "random", "--window", "4"]
    transformer = [*arguments, "--backbone", "timesformer-b", "--crop", "32x48", "--short-side", "32"]
    refused = CliRunner().invoke(main, transformer)
    assert refused.exit_code == 1
    assert "--interpolate-positions" in refused.stderr
    done = CliRunner().invoke(main, [*transformer, "--interpolate-positions", "--interval", "1", "--stride", "8"])
    assert done.exit_code == 0, done.output
    full = [*arguments, "--backbone", "tiny", "--crop", "full", "--fps", "native"]
    assert CliRunner().invoke(main, full).exit_code == 0
    with open_store(store) as opened:
        assert opened.stream_attrs("timesformer-b")["spec"]["positions"] == "interpolated"
        assert opened.stream_attrs("timesformer-b")["spec"]["crop"] == [32, 48]
        assert opened["timesformer-b", "v"].shape[1] == 768
        assert opened.stream_attrs("tiny")["spec"]["crop"] == "full"
    assert CliRunner().invoke(main, [*full[:-1], "fast"]).exit_code == 2
