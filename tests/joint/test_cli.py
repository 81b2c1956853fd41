"""``tad train-joint`` and ``tad extract --run`` as scripts see them; everything that docs/joint.md shows is run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import tad.joint
from tad.cli import main
from tad.detect import train_detector
from tad.detect.runs import Run, read_json, read_weights, write_weights
from tad.extract import build_backbone, extract, load_backbone
from tad.joint.runs import save_backbones, starting_features, write_starting
from tad.recipe import DetectRecipe, ExtractRecipe, JointRecipe
from tad.store import open_store
from tad.synth import make_videos

PAGE = (Path(__file__).parents[2] / "docs/joint.md").read_text(encoding="utf-8")
QUICK = ["--set", "train.epochs=1", "--set", "model.width=8", "--set", "train.batch_videos=4"]


def tad_cli(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo leaves in its folder, smaller."""
    root = tmp_path_factory.mktemp("demo")
    for subset, count in (("training", 3), ("validation", 1), ("testing", 1)):
        make_videos(
            root, videos=count, seed=1, subset=subset, duration_s=(4.0, 5.0), size=(40, 40), action_s=(1.0, 2.0)
        )
    (root / "weights").mkdir()
    torch.save(build_backbone("tiny", weights="random:5").state_dict(), root / "weights/backbone.pt")
    recipe = ExtractRecipe(backbone="tiny", weights=str(root / "weights/backbone.pt"), fps=12.5)
    extract(root / "videos", store=root / "features.zarr", recipes=recipe)
    return root


class StandIn:
    """In place of the training: notes what it is called with, trains the detector alone and moves the backbone."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, recipe: DetectRecipe, **given: Any) -> dict[str, Any]:
        self.calls.append({"recipe": recipe, **given})
        path = Path(given["out"])
        if given["resume"] and (path / "metrics.json").is_file():
            return dict(read_json(path / "metrics.json"))
        names = ("store", "annotations", "out", "overwrite", "device")
        alone = recipe.model_copy(update={"joint": None})
        metrics = train_detector(alone, **{name: given[name] for name in names})
        write_starting(path, Run.load(path).features)
        weights = {s: known["weights_source"] for s, known in starting_features(path).items() if s != "frames"}
        backbones = {stream: load_backbone(file) for stream, file in weights.items()}
        for backbone in backbones.values():
            with torch.no_grad():
                list(backbone.parameters())[-1].add_(0.25)
        state = read_weights(path / "best.safetensors")
        save_backbones(path, starting_features(path), backbones, lambda f, **about: write_weights(f, state, **about))
        return metrics


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(tad.joint, "train_joint", stand_in)
    return stand_in


def arguments(world: Path) -> list[object]:
    given = ["--store", world / "features.zarr", "--streams", "tiny", "--annotations", world / "annotations.json"]
    return [*given, "--set", "data.holdout_subset=validation"]


def test_flags_are_the_recipe(world: Path, tmp_path: Path, trained: StandIn) -> None:
    flags = ["--mode", "bank", "--ratio", "0.2", "--sampler", "dpp", "--backbone-lr", "1e-4", "--seed", 3]
    flags += ["--videos", world / "videos", "--memory", "1.5GiB", "--device", "cpu", "--set", "joint.frozen_stages=1"]
    done = tad_cli("train-joint", "talnet", *arguments(world), *QUICK, *flags, "-o", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert re.fullmatch(r".*run: epoch 1 of 1 chosen, average mAP \d+\.\d % on 1 held-out videos\n", done.stdout)
    (call,) = trained.calls
    recipe = call["recipe"]
    assert recipe.joint == JointRecipe(
        mode="bank", ratio=0.2, sampler="dpp", backbone_lr=1e-4, videos=str(world / "videos"), frozen_stages=1
    )
    assert (recipe.detector, recipe.streams, recipe.seed, recipe.train.epochs) == ("talnet", ("tiny",), 3, 1)
    assert call["memory_bytes"] == 3 * 2**29
    expected = {"store": str(world / "features.zarr"), "annotations": str(world / "annotations.json"),
                "out": str(tmp_path / "run"), "device": "cpu", "resume": False, "overwrite": False}  # fmt: skip
    assert {key: call[key] for key in expected} == expected
    assert call.keys() == expected.keys() | {"recipe", "memory_bytes", "progress"}
    again = tad_cli(
        "train-joint", "talnet", *arguments(world), *QUICK, *flags, "-o", tmp_path / "run", "--resume", "--json"
    )
    assert json.loads(again.stdout) == read_json(tmp_path / "run/metrics.json")
    assert trained.calls[1]["resume"]


def test_a_flag_goes_before_the_file_and_before_set(world: Path, tmp_path: Path, trained: StandIn) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "detector: talnet\nmodel: {width: 8, anchor_scales: [4]}\ntrain: {epochs: 1}\n"
        "joint: {mode: full, ratio: 0.1, checkpoint: true}\n"
    )
    given = ["--recipe", file, *arguments(world), "--set", "joint.ratio=0.5", "--overwrite"]
    for flags, expected in (
        ([], JointRecipe(mode="full", ratio=0.5, checkpoint=True)),
        (["--mode", "egs", "--ratio", "0.7"], JointRecipe(mode="egs", ratio=0.7, checkpoint=True)),
        (["--ratio", "0", "--backbone-lr", 0], JointRecipe(mode="full", ratio=0, checkpoint=True, backbone_lr=0)),
    ):
        done = tad_cli("train-joint", *given, *flags, "-o", tmp_path / "run")
        assert done.exit_code == 0, done.output
        assert trained.calls[-1]["recipe"].joint == expected
        assert trained.calls[-1]["overwrite"]
        assert trained.calls[-1]["memory_bytes"] is None
    shipped = tad_cli("recipe", "show", "sptad/thumos14-joint")
    assert "backbone_lr: 0.0001" in shipped.stdout


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--mode", "end-to-end"], 2, "'egs', 'full', 'bank', 'pre-extracted'"),
        (["--sampler", "iou-balanced"], 2, "'random', 'grid', 'block', 'fps', 'dpp'"),
        (["--ratio", "30"], 2, "0<=x<=1"),
        (["--ratio", "nan"], 1, "joint.ratio"),
        (["--backbone-lr", "-1e-6"], 2, "x>=0"),
        (["--backbone-lr", "nan"], 1, "joint.backbone_lr"),
        (["--memory", "8 GiBB"], 1, "such as 8GiB"),
        (["--videos", "nowhere"], 2, "'nowhere' does not exist"),
        (["--set", "joint.rati=1"], 1, "unknown key 'joint.rati'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_begins(
    world: Path, tmp_path: Path, trained: StandIn, flags: list[str], code: int, message: str
) -> None:
    done = tad_cli("train-joint", "talnet", *arguments(world), *flags, "-o", tmp_path / "run")
    assert (done.exit_code, trained.calls) == (code, [])
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_extract_with_a_run(world: Path, tmp_path: Path, trained: StandIn) -> None:
    done = tad_cli("train-joint", "talnet", *arguments(world), *QUICK, "-o", tmp_path / "run")
    assert done.exit_code == 0, done.output
    given = ["extract", world / "videos", "--store", tmp_path / "new.zarr", "--run", tmp_path / "run"]
    plan = json.loads(tad_cli(*given, "--dry-run", "--json").stdout)
    assert {entry["stream"] for entry in plan["entries"]} == {"tiny"}
    assert not (tmp_path / "new.zarr").exists()
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    done = tad_cli(*given, tmp_path / "broken.mp4", "--json")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["written"] == 5
    with open_store(tmp_path / "new.zarr") as store:
        known = Run.load(tmp_path / "run").features["tiny"]
        assert store.stream_attrs("tiny")["fingerprint"] == known["fingerprint"]
    for video in (["--store", tmp_path / "new.zarr"], [world / "videos"]):
        found = tad_cli("detect", "--run", tmp_path / "run", *video, "-o", tmp_path / f"{len(video)}.json")
        assert found.exit_code == 0, found.output
    assert (tmp_path / "1.json").read_text() == (tmp_path / "2.json").read_text()
    old = tad_cli("detect", "--run", tmp_path / "run", "--store", world / "features.zarr")
    assert old.exit_code == 1
    assert f"tad extract VIDEOS --run {tmp_path / 'run'}" in old.stderr
    for backbone in (tmp_path / "run/weights").iterdir():
        backbone.unlink()
    gone = tad_cli(*given, "--overwrite")
    assert gone.exit_code == 1
    assert f"Copy the file into {tmp_path / 'run/weights'}" in gone.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--backbone", "tiny"], "leave --backbone out"),
        (["--weights", "random"], "leave --weights out"),
        (["--stream", "a", "--short-side", "32"], "leave --stream, --short-side out"),
        (["--levels", "--precision", "fp32"], "leave --levels, --precision out"),
        (["--crop", "full", "--fps", "native", "--maps", "s1"], "leave --fps, --crop, --maps out"),
    ],
)
def test_a_run_says_all_about_its_features(world: Path, tmp_path: Path, flags: list[str], said: str) -> None:
    done = tad_cli("extract", world / "videos", "--store", tmp_path / "s", "--run", world, *flags)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())


def test_extract_wants_a_backbone_or_a_run(world: Path, tmp_path: Path) -> None:
    done = tad_cli("extract", world / "videos", "--store", tmp_path / "s")
    assert done.exit_code == 2
    assert "name a --backbone, or a --run" in done.stderr
    other = tad_cli("extract", world / "videos", "--store", tmp_path / "s", "--run", world)
    assert other.exit_code == 1
    assert "no recipe.yaml" in other.stderr


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", PAGE, flags=re.S)


def test_every_command_of_the_page_runs(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few and small steps, and without torchrun, which a test of the training itself starts."""
    (tmp_path / "demo").symlink_to(world)
    monkeypatch.chdir(tmp_path)
    quick = {"talnet": QUICK, "--recipe": ["--set", "train.epochs=1", "--set", "classes.classifier.epochs=1"]}
    commands = []
    for line in "\n".join(blocks("bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if words[0] == "torchrun":
            words = ["tad", *words[words.index("tad.cli") + 1 :]]
        assert words[0] == "tad"
        done = tad_cli(*words[1:], *(quick[words[2]] if words[1] == "train-joint" else []))
        assert done.exit_code == 0, f"{line}\n{done.output}"
        commands.append(words[1])
    assert commands.count("train-joint") == 6
    assert {"detect", "extract", "evaluate"} <= set(commands)
    for code in blocks("python"):
        exec(compile(code, "page", "exec"), {})
    for name in re.findall(r"\| `(\w+/[\w-]+)` \|", PAGE):
        assert tad_cli("recipe", "show", name).exit_code == 0, name


def test_the_page_knows_all_keys() -> None:
    table = PAGE[PAGE.index("| key of `joint:`") :].partition("\n\n")[0]
    assert sorted(key for key in JointRecipe.model_fields if f"`{key}`" not in table) == []
    for key in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", table, flags=re.M):
        assert set(re.findall(r"`(\w+)`", key)) <= JointRecipe.model_fields.keys()
