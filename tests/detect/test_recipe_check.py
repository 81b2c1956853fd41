"""What is said of a recipe before it is trained: all problems at once, and none where the training begins."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tad.detect import train_detector
from tad.detect.detectors import DETECTORS, build_detector
from tad.detect.recipe_check import check_recipe, full_recipe
from tad.detect.windows import unused_keys
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


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        (
            {},
            {"train_stride": 3, "rescale": "average", "empty_windows": True, "max_rows": 50, "min_inside": 0.3},
            "videos whole: data.train_stride=3, data.empty_windows=True, data.rescale=average",
        ),
        (
            {"layout": "windowed", "rows": 32},
            {"rescale": "average", "max_rows": 99, "train_stride": 8, "detect_stride": 8, "empty_windows": True},
            "videos in windows: data.max_rows=99, data.rescale=average",
        ),
        (
            {"layout": "rescaled", "rows": 32},
            {"rescale": "average", "detect_stride": 4, "min_inside": 0.2, "max_rows": 7, "row_spacing": 2},
            "videos rescaled: data.detect_stride=4, data.max_rows=7, data.min_inside=0.2",
        ),
    ],
)
def test_keys_without_effect_are_told_by_check_and_training(
    model: dict[str, Any], data: dict[str, Any], said: str, world: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = toy_recipe(model=model, data=data, train={"epochs": 1})
    message = f"without effect, since 'toy' sees {said}"
    for read in (True, False):
        check = check_recipe(recipe, store=world[0], annotations=world[1], read=read)
        assert check.problems == []
        assert check.notes.count(message) == 1
    train_detector(recipe, store=world[0], annotations=world[1], out=tmp_path / "run", device="cpu")
    assert (tmp_path / "run" / "log.txt").read_text().count(f"{message}\n") == 1
    used = toy_recipe(model=model)
    assert not any("without effect" in n for n in check_recipe(used, store=world[0], annotations=world[1]).notes)


def test_cuts_have_an_effect_on_the_classifier_that_is_trained_along() -> None:
    recipe = toy_recipe(data={"max_rows": 50, "detect_stride": 4})
    detector = build_detector("bmn", channels={"rgb": 4}, classes=1, **SMALL["bmn"], layout="rescaled")
    told = unused_keys(recipe, detector)
    assert len(told) == 1
    assert told[0].endswith(": data.detect_stride=4")
    given = recipe.model_copy(update={"classes": recipe.classes.model_copy(update={"scores": "scores.json"})})
    assert unused_keys(given, detector)[0].endswith(": data.detect_stride=4, data.max_rows=50")


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


SMALL: dict[str, dict[str, Any]] = {
    "talnet": {"width": 4},
    "sptad": {"rows": 16, "width": 8, "interaction_width": 4, "attention_heads": 2, "feedforward": 8, "heads": 1},
    "talmts": {"rows": 32, "width": 4, "norm_groups": 2, "stt": False, "fsa": False, "frame_factor": 1},
    "afsd": {"rows": 32, "width": 4, "norm_groups": 2, "frame_factor": 1},
    "bmn": {"rows": 8, "width": 4, "tem_width": 4, "matching_channels": 4, "hidden": 4, "pem_width": 4, "samples": 2},
    "etad": {
        "layout": "windowed", "rows": 8, "width": 8, "lstm_width": 8, "branch_width": 8, "roi_channels": 4,
        "head_width": 8, "branch_head_width": 8, "norm_groups": 2,
    },
    "tcanet": {
        "width": 8, "head_width": 8, "boundary_width": 4, "context_samples": 4, "action_samples": 4, "feedforward": 8,
    },
}  # fmt: skip
ODD: tuple[Any, ...] = (None, True, "x", -1, 0.7, [1], ["a"], {"a": 1}, float("nan"), [[1, 2]], {"rgb": [1]})


@pytest.mark.parametrize("name", sorted(SMALL))
def test_values_of_a_wrong_type_are_refused_by_name(name: str) -> None:
    kind = DETECTORS[name]
    build_detector(name, channels={"rgb": 4}, classes=2, **SMALL[name])  # what is refused below is the odd value
    options = set(inspect.signature(kind).parameters) - {"channels", "classes"}
    refused = set()
    for key in options:
        for value in ODD:
            model = SMALL[name] | {key: value}
            try:
                if hasattr(kind, "resolve"):
                    model = kind.resolve(model, np.array([3.0, 9.0]))
                if hasattr(kind, "resolve_shapes"):
                    model = kind.resolve_shapes(model, {"rgb": {"features": (4,)}})
                build_detector(name, channels={"rgb": 4}, classes=2, **model)
            except RecipeError:  # and nothing else
                refused.add(key)
    assert refused == options


@pytest.mark.parametrize(
    ("detector", "model", "words"),
    [
        ("talnet", {"proposal_context": "no"}, "proposal_context must be true or false, got 'no'"),
        ("etad", SMALL["etad"] | {"tiou_thresholds": 0.7}, "tiou_thresholds must be a list, one a stage, got 0.7"),
        ("sptad", SMALL["sptad"] | {"levels": 3}, "levels must be a list of names"),
        ("afsd", SMALL["afsd"] | {"bounds": 3}, "bounds must be [low, high] in rows"),
        ("talmts", SMALL["talmts"] | {"frames": ["rgb"]}, "frames must name a stream"),
        ("talmts", SMALL["talmts"] | {"frame_size": None}, "frame_size must be [height, width]"),
        ("talmts", SMALL["talmts"] | {"level_channels": 7}, "level_channels must name the levels features, got 7"),
    ],
)
def test_a_wrong_type_is_one_problem(
    detector: str, model: dict[str, Any], words: str, world: tuple[Path, Path]
) -> None:
    recipe = toy_recipe(detector=detector, model=model, streams=["rgb"])
    told = check_recipe(recipe, store=world[0], annotations=world[1], read=False).problems
    assert len(told) == 1
    assert words in told[0]
    with pytest.raises(RecipeError, match="must"):
        full_recipe(recipe)
