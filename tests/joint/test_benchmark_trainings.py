"""The benchmark of joint trainings trains what it says, on what it says, and once; what comes out is not tested."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks import joint_trainings as benchmark
from tad.annotations import read_predictions, read_truth
from tad.detect import Run
from tad.evaluate import detection_map
from tad.extract import load_backbone
from tad.joint.runs import starting_features
from tad.recipe import DetectRecipe
from tad.store import open_store

DATA = ["--videos", "3", "2", "--duration-s", "5", "6", "--action-s", "1", "2", "--steps", "2"]
SMALL = ["--epochs", "2", "--set", "train.lr=1e-3"]
Command = list[str]


def changes(name: str, base: str) -> dict[str, Any]:
    """What a training's recipe has otherwise than that of another, by dotted key."""

    def flat(recipe: DetectRecipe) -> dict[str, Any]:
        data = recipe.model_dump()
        inner = {f"{section}.{key}": v for section in ("joint", "data", "train") for key, v in data[section].items()}
        return inner | {key: v for key, v in data.items() if key not in ("joint", "data", "train")}

    own, other = flat(benchmark.recipe_of(name)), flat(benchmark.recipe_of(base))
    return {key: value for key, value in own.items() if other[key] != value}


def test_every_training_differs_from_the_base_in_what_it_says() -> None:
    said = {
        "pre-extracted": {"joint.mode": "pre-extracted"},
        "pre-extracted-100": {"joint.mode": "pre-extracted", "train.epochs": 100}, "bank-30": {"joint.mode": "bank"},
        "full": {"joint.mode": "full"}, "full-checkpoint": {"joint.mode": "full", "joint.checkpoint": True},
        "egs-0": {"joint.ratio": 0.0}, "egs-10": {"joint.ratio": 0.1}, "egs-30": {}, "egs-100": {"joint.ratio": 1.0},
        "lr-0": {"joint.backbone_lr": 0.0}, "lr-1e-6": {"joint.backbone_lr": 1e-6},
        "lr-1e-5": {"joint.backbone_lr": 1e-5}, "lr-1e-4": {"joint.backbone_lr": 1e-4},
        "lr-1e-3": {"joint.backbone_lr": 1e-3},
        "not-augmented": {"joint.random_crop": False}, "jitter": {"joint.random_crop": False, "joint.jitter": True},
        "crop-jitter": {"joint.jitter": True}, "flip": {"joint.random_crop": False, "joint.flip": True},
    }  # fmt: skip
    said |= {f"egs-30-{sampler}": {"joint.sampler": sampler} for sampler in ("grid", "block", "fps", "dpp")}
    said |= {f"frozen-{stages}": {"joint.frozen_stages": stages} for stages in (1, 2, 3, 4)}
    assert {name: changes(name, "egs-30") for name in said} == said
    etad = {"etad-pre-extracted": "pre-extracted", "etad-bank-30": "bank", "etad-full": "full"}
    assert {name: changes(name, "etad-egs-30") for name in etad} == {n: {"joint.mode": m} for n, m in etad.items()}
    clip = {"sptad-pre-extracted": {"joint.mode": "pre-extracted"}, "sptad-lr-0": {"joint.mode": "egs"},
            "sptad-lr-1e-4": {}, "sptad-lr-3e-4": {}}  # fmt: skip
    for name, own in clip.items():
        found = changes(name, "sptad-lr-1e-4")
        assert own.items() <= found.items()
        assert found.keys() - own.keys() <= {"joint.backbone_lr", "joint.ratio"}
    assert benchmark.recipe_of("sptad-lr-1e-4").joint.backbone_lr == 1e-4  # type: ignore[union-attr]
    assert benchmark.recipe_of("sptad-lr-0").joint.ratio == 0  # type: ignore[union-attr]
    assert benchmark.TRAININGS.keys() == said.keys() | etad.keys() | clip.keys() | {"etad-egs-30"}


def test_a_name_is_one_training_and_none_holds_videos_out() -> None:
    recipes = {}
    for trainings in benchmark.SETS.values():
        for name, training in trainings.items():
            assert benchmark.TRAININGS[name] == training
            recipes[name] = benchmark.recipe_of(name).model_dump_json()
    assert len(set(recipes.values())) == len(recipes)
    for name in recipes:
        recipe = benchmark.recipe_of(name, seed=3)
        assert recipe.seed == 3
        assert (recipe.data.train_subset, recipe.data.holdout, recipe.data.holdout_subset) == ("training", 0.0, None)
        assert recipe.train.select == "last"
    given = benchmark.recipe_of("full", sets=["joint.mode=bank", "train.epochs=5"], epochs=2)
    assert (given.joint.mode, given.train.epochs) == ("bank", 2)  # type: ignore[union-attr]


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[Command]:
    """What would run in processes of its own runs in this one; the commands, in order."""
    begun: list[Command] = []

    def run(command: Command, **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "benchmarks.joint_trainings"]
        assert options["env"]["OMP_NUM_THREADS"] == "1"
        begun.append(command)
        return subprocess.CompletedProcess(command, benchmark.main(command[3:]), "", "")

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    return begun


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of two seeds."""
    out = tmp_path_factory.mktemp("out")
    for seed in ("0", "1"):
        assert benchmark.main(["modes", "--out", str(out), *DATA, "--step", "", "--seeds", seed]) == 0
    return out


def test_what_is_prepared(prepared: Path) -> None:
    """Features and frames of the training videos alone; the crop lies inside the frames; seeds are other worlds."""
    root = prepared / "data-s0"
    truth = read_truth(root / "annotations.json")
    training = set(truth.subset("training").videos["video"])
    assert len(training) == 3
    assert len(truth.subset("testing").videos) == 2
    with open_store(root / "features.zarr") as store:
        assert {stream: set(store.videos(stream)) for stream in store.streams()} == {
            "tiny": training, "tiny-levels": training, "frames": training,
        }  # fmt: skip
        specs = {stream: store.stream_attrs(stream)["spec"] for stream in store.streams()}
        weights = {specs[stream]["weights"] for stream in ("tiny", "tiny-levels")}
        assert len(weights) == 1
        for stream in ("tiny", "tiny-levels"):
            assert (specs[stream]["short_side"], tuple(specs[stream]["crop"])) == (36, (32, 32))
        assert (specs["frames"]["short_side"], specs["frames"]["crop"]) == (36, "full")
        assert (specs["tiny"]["window"], specs["tiny"]["stride"]) == (16, 8)
    with open_store(prepared / "data-s1" / "features.zarr") as store:
        assert store.stream_attrs("tiny")["spec"]["weights"] not in weights
    other = read_truth(prepared / "data-s1" / "annotations.json").segments
    assert not other.equals(truth.segments)


def test_trainings_are_scored_on_testing_videos_and_done_once(
    prepared: Path, tmp_path: Path, processes: list[Command], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(prepared / "data-s0", out / "data-s0")
    arguments = ["modes", "--only", "pre-extracted", "egs-30", "--out", str(out), *DATA, *SMALL]
    assert benchmark.main(arguments) == 0
    assert len(processes) == 2  # the data are there
    written = json.loads((out / "modes.json").read_text())["seeds"]
    testing = read_truth(out / "data-s0/annotations.json").subset("testing")
    for name in ("pre-extracted", "egs-30"):
        row, run = written[f"{name} seed 0"], out / f"{name}-s0"
        assert row.keys() >= set(benchmark.COLUMNS)
        found = read_predictions(run / "predictions.json")
        assert set(found["video"]) == set(testing.videos["video"])
        again = detection_map(testing, found, tiou=benchmark.TIOU)
        assert row["map"] == pytest.approx(100 * again.average)
        assert row["map_0.5"] == pytest.approx(100 * again.map[0.5])
        assert row["train_cpu_s"] == pytest.approx(2 * row["epoch_cpu_s"])
        assert row["epoch_cpu_s"] > 0
        assert len(pd.read_csv(run / "metrics.csv")) == 2
        moved = starting_features(run)["tiny"]["fingerprint"] != Run.load(run).features["tiny"]["fingerprint"]
        assert moved == (name == "egs-30")
        assert [path.name for path in run.glob(".testing-*")] == []
    alone, joint = (written[f"{name} seed 0"] for name in ("pre-extracted", "egs-30"))
    assert (alone["backbone_lr"], alone["ratio"], joint["backbone_lr"], joint["ratio"]) == (0, 0, 3e-4, 0.3)
    first = capsys.readouterr().out
    assert benchmark.main(arguments) == 0
    assert len(processes) == 2
    assert capsys.readouterr().out == first
    for other in (["--epochs", "3"], ["--steps", "7"], ["--set", "model.width=32"]):
        with pytest.raises(SystemExit, match="is of other options"):
            benchmark.main([*arguments, *other])
    assert len(processes) == 2


def test_failures_are_listed_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        benchmark, "prepare", lambda root, settings: benchmark.write_json(root / "settings.json", settings)
    )
    monkeypatch.setattr(benchmark, "train", lambda root, out, recipe: dict.fromkeys(benchmark.COLUMNS, recipe.seed + 1))

    def run(command: Command, **options: Any) -> subprocess.CompletedProcess[str]:
        step, seed = command[command.index("--step") + 1], command[-1]
        if (step, seed) in (("", "2"), ("bank-30", "0"), ("full", "0"), ("full", "1")):
            return subprocess.CompletedProcess(
                command, 1, "", f"Traceback\ntad.errors.TadError: {step or 'data'} {seed}\n"
            )
        return subprocess.CompletedProcess(command, benchmark.main(command[3:]), "", "")

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    only = ["--only", "bank-30", "egs-30", "full"]
    arguments = ["modes", "samplers", *only, "--out", str(tmp_path), "--seeds", "0", "1", "2", "--jobs", "2"]
    assert benchmark.main(arguments) == 1
    written = json.loads((tmp_path / "modes.json").read_text())
    seeds = written["seeds"]
    assert {key: row["failed"] for key, row in seeds.items() if "failed" in row} == {
        "bank-30 seed 0": "tad.errors.TadError: bank-30 0",
        "full seed 0": "tad.errors.TadError: full 0",
        "full seed 1": "tad.errors.TadError: full 1",
        **{f"{name} seed 2": "tad.errors.TadError: data 2" for name in ("bank-30", "egs-30", "full")},
    }
    assert written["means"]["egs-30"] == {"seeds": 2} | dict.fromkeys(benchmark.COLUMNS, 1.5)
    assert written["means"]["bank-30"] == {"seeds": 1} | dict.fromkeys(benchmark.COLUMNS, 2)
    assert written["means"]["full"] == {"failed": "tad.errors.TadError: full 0"}
    assert list(json.loads((tmp_path / "samplers.json").read_text())["means"]) == ["egs-30"]
    printed = capsys.readouterr().out
    assert "bank-30 seed 0 failed: tad.errors.TadError: bank-30 0" in printed
    assert "samplers, means over seeds" in printed


def test_scores_of_a_perfect_and_of_a_confused_detector(prepared: Path) -> None:
    truth = read_truth(prepared / "data-s0/annotations.json").subset("testing")
    perfect = truth.segments[["video", "start_s", "end_s", "label"]].assign(score=1.0)
    assert benchmark.scores(truth, perfect, perfect) == pytest.approx(
        {"map": 100, "map_one_class": 100, **{f"map_{tiou}": 100 for tiou in (0.3, 0.4, 0.5, 0.6, 0.7)}}
    )
    labels = sorted(set(truth.segments["label"])) + ["another"]
    following = dict(zip(labels, [*labels[1:], labels[0]], strict=True))
    confused = perfect.assign(label=perfect["label"].map(following))
    found = benchmark.scores(truth, confused, confused.drop(columns="label"))
    assert found["map_one_class"] == pytest.approx(100)
    assert found["map"] < 50


def test_the_clock_counts_epochs_of_the_detector_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([10.0, 13.0, 20.0, 21.5])
    monkeypatch.setattr(benchmark, "cpu_s", lambda: next(ticks))
    clock = benchmark.EpochClock()
    for label in ("read features", "train", "train classifier", "train"):
        with clock(4, label, "steps") as bar:
            for step in range(4):
                bar.advance(1, f"epoch {step // 2 + 1}/2" if label == "train" else "epoch of something else")
    assert (clock.cpu_s, len(clock.epochs)) == (4.5, 2)
    assert next(ticks, None) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("nothing", "nothing"),
        ("modes --only nobody", "nobody"),
        ("samplers --only full", "--only full: not in samplers"),
        ("modes --jobs 0", "at least"),
        ("modes --epochs 0", "at least"),
        ("modes --seeds -1", "at least"),
        ("modes --set joint.rati=0.2", "unknown key 'joint.rati'"),
    ],
)
def test_wrong_options_are_refused(
    wrong: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main([*wrong.split(), "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", benchmark.TRAININGS)
def test_every_training_runs(prepared: Path, tmp_path: Path, name: str) -> None:
    quick = ["classes.classifier.epochs=1"] if name.startswith("etad") else []
    recipe = benchmark.recipe_of(name, epochs=1, sets=quick)
    result = benchmark.train(prepared / "data-s0", tmp_path / "run", recipe)
    assert 0 <= result["map"] <= 100
    assert recipe.joint is not None
    still = result["backbone_lr"] == 0 or result["ratio"] == 0 or recipe.joint.frozen_stages == 4
    known = Run.load(tmp_path / "run").features[recipe.streams[0]]
    before = load_backbone(prepared / "data-s0/backbone/backbone.safetensors").state_dict()
    after = load_backbone(known["weights_source"]).state_dict()
    moved = max(float((after[key] - value).abs().max()) for key, value in before.items())
    assert moved == 0 if still else moved > 0


@pytest.mark.slow
def test_in_real_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--only", "pre-extracted", "egs-10", "--set", "model.width=7.5"]  # a width that TAL-Net refuses
    assert benchmark.main(["ratios", "modes", *only, "--out", str(tmp_path), *DATA, "--epochs", "1"]) == 1
    assert capsys.readouterr().out.count("failed: ") == 2
    assert (tmp_path / "data-s0/settings.json").is_file()
    shutil.rmtree(tmp_path / "egs-10-s0", ignore_errors=True)
    assert benchmark.main(["ratios", "--only", "egs-10", "--out", str(tmp_path), *DATA, "--epochs", "1"]) == 0
    assert json.loads((tmp_path / "egs-10-s0/result.json").read_text())["peak_mb"] > 0
