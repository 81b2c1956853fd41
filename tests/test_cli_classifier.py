"""``tad train-classifier`` and ``tad classify --store`` as scripts see them; everything in docs/classes.md runs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tad.annotations import read_video_scores
from tad.cli import main
from tests.detect.toydetector import make_world

PAGE = (Path(__file__).parents[1] / "docs/classes.md").read_text(encoding="utf-8")
QUICK = ["--set", "epochs=1", "--set", "width=8"]


def tad(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    store, _ = make_world(root)
    store.rename(root / "features.zarr")
    return root


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    done = tad("train-classifier", *training(world), "-o", world / "run")
    assert done.exit_code == 0, done.output
    line = r"run: epoch 1, top-1 [\d.]+ %, top-2 [\d.]+ %, top-5 100\.0 %, mAP [\d.]+ % on 1 held-out videos\n$"
    assert re.search(line, done.stdout)
    return world / "run"


def training(world: Path) -> list[object]:
    return ["--store", world / "features.zarr", "--streams", "rgb, flow", "--annotations", world / "annotations.json",
            "--device", "cpu", *QUICK]  # fmt: skip


def test_training_again(world: Path, run: Path) -> None:
    refused = tad("train-classifier", *training(world), "-o", run)
    assert refused.exit_code == 1
    assert "holds a finished run" in refused.stderr
    again = tad("train-classifier", *training(world), "-o", run, "--resume", "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout) == json.loads((run / "metrics.json").read_text())
    wrong = tad("train-classifier", *training(world), "-o", run, "--set", "epoch=1")
    assert wrong.exit_code == 1
    assert "Did you mean 'epochs'" in wrong.stderr
    alone = tad("train-classifier", *training(world), "-o", world / "alone", "--set", "data.holdout=0")
    assert alone.exit_code == 0, alone.output
    assert alone.stdout.endswith("alone: epoch 1, no video was held out to judge by\n")


def test_classify_a_store(world: Path, run: Path, tmp_path: Path) -> None:
    given = ["classify", "--store", world / "features.zarr", "--run", run, "-o", tmp_path / "s.json"]
    truth = ["--annotations", world / "annotations.json"]
    done = tad(*given, *truth, "--subset", "validation")
    assert done.exit_code == 0, done.output
    first, second = done.stdout.splitlines()
    assert first.endswith("s.json: 6 videos scored, 0 others were there")
    assert re.fullmatch(r"top-1 [\d.]+ %, top-2 [\d.]+ %, top-5 100\.0 %, mAP [\d.]+ % on 6 videos", second)
    scores = read_video_scores(tmp_path / "s.json")
    assert scores.shape == (6, 3)
    assert scores.sum(axis=1).to_numpy() == pytest.approx(1.0)
    told = json.loads(tad(*given, *truth, "--subset", "training", "--json").stdout)
    assert (told["written"], told["already"], told["failures"], told["accuracy"]["videos"]) == (12, 6, [], 12)
    content = json.loads((world / "annotations.json").read_text())
    content["database"]["gone"] = {"subset": "validation", "duration": 9, "annotations": []}
    (tmp_path / "more.json").write_text(json.dumps(content))
    partly = tad(*given, "--annotations", tmp_path / "more.json", "--subset", "validation")
    assert partly.exit_code == 3
    assert "failed: gone: no features in rgb, flow" in partly.stderr


def test_wrong_usage(world: Path, run: Path, tmp_path: Path) -> None:
    store, out = ["--store", world / "features.zarr"], ["-o", tmp_path / "s.json"]
    for given, message in (
        ([*store, *out], "--store and --run belong together"),
        (["--run", run, *out], "--store and --run belong together"),
        ([*store, "--run", run, "talk.mp4", *out], "VIDEOS and --weights are for classifiers of videos"),
        ([*store, "--run", run, "--clips", 4, *out], "--clips: for classifiers of videos"),
        ([*store, "--run", run, "--subset", "x", *out], "--subset needs --annotations"),
        (["talk.mp4", *out], "name VIDEOS and --weights, or a feature --store and --run"),
        (["--weights", run, *out], "name VIDEOS and --weights"),
    ):
        wrong = tad("classify", *given)
        assert (wrong.exit_code, message in wrong.stderr) == (2, True), wrong.output
    assert not (tmp_path / "s.json").exists()


def test_everything_shown_runs(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("features.zarr", "annotations.json"):
        (tmp_path / name).symlink_to(world / name)
    monkeypatch.chdir(tmp_path)
    shown = re.findall(r"```(bash|python)\n(.*?)\n```", PAGE, flags=re.S)
    names: dict[str, object] = {}
    for language, code in shown:
        if language == "python":
            exec(compile(code.replace("epochs=15", "epochs=1"), "page", "exec"), names)
            continue
        for line in code.splitlines():
            words = shlex.split(line)
            done = tad(*words[1:], *(QUICK if words[1] == "train-classifier" else []))
            assert (words[0], done.exit_code) == ("tad", 0), f"{line}\n{done.output}"
    assert {language for language, _ in shown} == {"bash", "python"}
    scores = read_video_scores(tmp_path / "probabilities.json")
    detections = names["detections"][0]  # type: ignore[index]
    assert detections.labels.tolist() == [1, 1, 0, 0]
    assert detections.scores.tolist() == pytest.approx(
        [0.8 * scores.loc["a", "run"], 0.5 * scores.loc["a", "run"], 0.8 * scores.loc["a", "jump"],
         0.5 * scores.loc["a", "jump"]]
    )  # fmt: skip
