"""Combinations of what joint mode can do that are met together only now and then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tad.annotations import read_truth
from tad.apply import detect_videos, extract_for_run
from tad.detect import detect
from tad.detect.runs import Run, read_json, read_state, read_weights, trained_weights
from tad.detect.train import left_out
from tad.errors import RecipeError
from tad.evaluate import detection_map
from tad.extract import build_backbone, extract
from tad.joint.bank import FeatureBank
from tad.recipe import ExtractRecipe
from tests.joint.test_train import assert_same_run, in_two, make_world, recipe_of, rows_of, stopping, train

SLOW = {"optimizer": "sgd", "lr": 1e-3}
UNSAMPLED = {"anchors_per_video": 100000, "proposals_per_video": 100000}  # TAL-Net draws none of them at random
FRAMES = ExtractRecipe(backbone="frames", fps=12.5, short_side=32, crop="full")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def net(root: Path, **changes: object) -> ExtractRecipe:
    """The recipe of the world's stream ``net``."""
    given = {"backbone": "tiny", "weights": str(root / "tiny.pt"), "levels": True, "maps": ("s2", "s4"), "window": 8,
             "fps": 12.5}  # fmt: skip
    return ExtractRecipe.model_validate(given | changes)


def test_hdf5_trains_as_zarr(world: Path, tmp_path: Path) -> None:
    recipes = {"net": net(world), "frames": FRAMES}
    store = tmp_path / "features.h5"
    report = extract(world / "videos", store=store, recipes=list(recipes.values()), names=list(recipes))
    assert report.failures == []
    recipe = recipe_of(joint={"mode": "bank", "random_crop": True, "ratio": 0.5})
    train(world, tmp_path / "hdf5", recipe, store=store)
    train(world, tmp_path / "zarr", recipe)
    assert_same_run(tmp_path / "hdf5", tmp_path / "zarr")


def test_a_bank_is_shared_with_averaged_weights_and_survives_a_stop(world: Path, tmp_path: Path) -> None:
    recipe = recipe_of(train={"epochs": 3, "ema": 0.5}, joint={"mode": "bank", "ratio": 0.5})
    train(world, tmp_path / "whole", recipe)
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "run", recipe, progress=stopping(2))
    train(world, tmp_path / "run", recipe, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    train(world, tmp_path / "plain", recipe.model_copy(update={"train": recipe.train.model_copy(update={"ema": None})}))
    # averaging changes the weights that are kept, not the training, whose bank and losses are the same
    banks = [read_state(tmp_path / run / "resume.pt")["source"]["banks"]["net"]["rows"] for run in ("whole", "plain")]
    assert all(torch.equal(rows, banks[1][video]) for video, rows in banks[0].items())
    losses = [[row["loss"] for row in rows_of(tmp_path / run)] for run in ("whole", "plain")]
    assert losses[0] == losses[1]
    kept = [read_weights(trained_weights(tmp_path / run)[0]) for run in ("whole", "plain")]
    assert any(not torch.equal(value, kept[1][key]) for key, value in kept[0].items())


def test_autocast_is_the_same_training_but_for_rounding(world: Path, tmp_path: Path) -> None:
    store = tmp_path / "features.zarr"
    recipes = {"net": net(world, window=16), "frames": FRAMES}
    assert extract(world / "videos", store=store, recipes=list(recipes.values()), names=list(recipes)).failures == []
    for mode in ("egs", "full", "bank"):
        losses, weights = {}, {}
        for precision in ("fp32", "bf16"):
            joint = {"mode": mode, "ratio": 0.5, "backbone_lr": 1.0}
            recipe = recipe_of(joint=joint, train={"precision": precision, **SLOW}, model=UNSAMPLED)
            out = tmp_path / f"{mode}-{precision}"
            train(world, out, recipe, store=store)
            losses[precision] = float(rows_of(out)[-1]["loss"])
            weights[precision] = read_weights(trained_weights(out)[0])
        assert losses["fp32"] != losses["bf16"]
        assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
        start = build_backbone("tiny", weights=world / "tiny.pt").state_dict()
        steps = {p: torch.cat([(w[k] - start[k]).flatten() for k in sorted(start)]) for p, w in weights.items()}
        assert torch.cosine_similarity(steps["fp32"], steps["bf16"], dim=0) > 0.98  # the backbone went the same way


def test_two_frames_in_bfloat16_are_refused_on_the_cpu(world: Path, tmp_path: Path) -> None:
    """Snippets of 8 frames are 2 in the last stage, where torch's gradient would be wrong."""
    with pytest.raises(RecipeError, match=r"two frames here.*precision fp32"):
        train(world, tmp_path / "run", recipe_of(train={"precision": "bf16"}))
    frozen = recipe_of(train={"precision": "bf16"}, joint={"frozen_stages": 4})
    train(world, tmp_path / "frozen", frozen)  # no gradient, no fault


def test_a_bank_holds_what_autocast_computed() -> None:
    """Rows in bfloat16 are kept in the bank's own type."""
    bank = FeatureBank([("v", torch.zeros(3, 2))])
    bank.write("v", torch.tensor([1]), torch.full((1, 2), 1.5, dtype=torch.bfloat16))
    assert bank.read("v", torch.arange(3)).dtype == torch.float32
    assert bank.read("v", torch.arange(3)).tolist() == [[0, 0], [1.5, 1.5], [0, 0]]


def test_two_streams_of_one_backbone_learn_apart(world: Path, tmp_path: Path) -> None:
    """Of the same network with other weights, at the same rows: each stream has a network of its own."""
    recipes = {
        "net": net(world),
        "net-2": net(world, weights="random:9", levels=False, maps=()),
        "frames": FRAMES,
    }
    store = tmp_path / "features.zarr"
    report = extract(world / "videos", store=store, recipes=list(recipes.values()), names=list(recipes))
    assert report.failures == []
    recipe = recipe_of(streams=["net", "net-2"], joint={"mode": "egs", "ratio": 0.5})
    train(world, tmp_path / "run", recipe, store=store)
    files = {file.name.rsplit("-", 1)[0]: read_weights(file) for file in trained_weights(tmp_path / "run")}
    starts = {
        "net": build_backbone("tiny", weights=world / "tiny.pt").state_dict(),
        "net-2": build_backbone("tiny", weights="random:9").state_dict(),
    }
    assert files.keys() == starts.keys()
    for stream, start in starts.items():
        other = starts["net-2" if stream == "net" else "net"]
        moved = {key: float((value - start[key]).abs().max()) for key, value in files[stream].items()}
        apart = max(float((value - other[key]).abs().max()) for key, value in files[stream].items())
        assert 0 < max(moved.values()) < 0.1 < apart  # it moved, a little, and from its own beginning
    features = read_json(tmp_path / "run" / "features.json")
    assert features["net"]["fingerprint"] != features["net-2"]["fingerprint"]
    assert list(Run.load(tmp_path / "run").recipe.streams) == ["net", "net-2"]
    found = detect_videos(world / "videos/validation-000.mp4", run=tmp_path / "run", device="cpu")
    assert found.failures == []


def test_sptad_reads_levels_as_wide_as_they_are_stored(world: Path, tmp_path: Path) -> None:
    given = recipe_of("sptad", joint={"mode": "pre-extracted"})
    train(world, tmp_path / "given", given)
    silent = {key: value for key, value in given.model.items() if key != "level_channels"}
    train(world, tmp_path / "silent", given.model_copy(update={"model": silent}))
    assert Run.load(tmp_path / "silent").recipe.model["level_channels"] == {"s1": 32, "s2": 64, "s4": 128}
    assert_same_run(tmp_path / "given", tmp_path / "silent")


def test_damaged_frames_are_left_out_and_listed(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "own")
    store = tmp_path / "own" / "features.zarr"
    chunks = [p for p in (store / "frames/training-001/features").rglob("*") if p.is_file() and p.name.startswith("c")]
    chunks[-1].write_bytes(b"no chunk")
    metrics = train(tmp_path / "own", tmp_path / "run")
    assert (metrics["counts"]["train_videos"], metrics["counts"]["broken_videos"]) == (2, 1)
    assert left_out(metrics) == 1
    listed = [json.loads(line) for line in (tmp_path / "run" / "failures.jsonl").read_text().splitlines()]
    assert [failure["video"] for failure in listed] == ["training-001"]
    assert train(tmp_path / "own", tmp_path / "run", resume=True) == metrics


def test_damaged_files_are_left_out_and_listed(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "videos", tmp_path / "videos")
    file = tmp_path / "videos" / "training-002.mp4"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 3] + bytes(len(content) - len(content) // 3))
    metrics = train(world, tmp_path / "run", recipe_of(joint={"videos": str(tmp_path / "videos")}))
    assert (metrics["counts"]["train_videos"], metrics["counts"]["broken_videos"]) == (2, 1)


@pytest.mark.slow
def test_processes_judge_the_averaged_weights_that_are_kept(world: Path, tmp_path: Path) -> None:
    """Batch norms that train have other statistics in each process; the average takes those of the first."""
    in_two(world, tmp_path / "run", {"train": {"ema": 0.5}, "joint": {"mode": "full", "frozen_norms": False}})
    metrics = read_json(tmp_path / "run" / "metrics.json")
    held = [world / f"videos/{video}.mp4" for video in read_state(tmp_path / "run" / "resume.pt")["holdout"]]
    extract_for_run(held, run=tmp_path / "run", store=tmp_path / "new.zarr", device="cpu")
    found = detect(run=tmp_path / "run", store=tmp_path / "new.zarr", device="cpu")
    truth = read_truth(world / "annotations.json").subset("validation")
    assert detection_map(truth, found).average == pytest.approx(metrics["average_map"], abs=1e-3)
