"""``tad train-backbone`` and ``tad classify`` as scripts see them, and every command of docs/finetune.md."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tad.annotations import read_video_scores
from tad.cli import main
from tad.extract.finetune import finetune_recipe
from tad.synth import make_videos

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/finetune.md").read_text(encoding="utf-8")
QUICK = ["--set", "steps=2", "--set", "epochs=2", "--set", "batch=4"]


def tad(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for subset, count in (("training", 4), ("validation", 2)):
        make_videos(
            root, videos=count, subset=subset, duration_s=(4.0, 6.0), size=(32, 32), classes=("bounce", "swing"),
            action_s=(1.5, 3.0),
        )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def run(made: Path) -> Path:
    given = ["--backbone", "tiny", "--annotations", made / "annotations.json", *QUICK]
    done = tad("train-backbone", made / "videos", *given, "--set", "train_subset=training", "-o", made / "run")
    assert done.exit_code == 0, done.output
    assert re.search(r"run: epoch \d of 2 chosen, clip top-1 .* on \d+ clips of held-out videos\n$", done.stdout)
    return made / "run"


def test_training_is_resumed_and_reports(made: Path, run: Path) -> None:
    given = [made / "videos", "--backbone", "tiny", "--annotations", made / "annotations.json", *QUICK]
    given += ["--set", "train_subset=training", "-o", run]
    refused = tad("train-backbone", *given)
    assert refused.exit_code == 1
    assert "holds a finished run" in refused.stderr
    again = tad("train-backbone", *given, "--resume", "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout) == json.loads((run / "metrics.json").read_text())
    for options, message in ((["--resume", "--overwrite"], "exclude each other"), (["--set", "stops=1"], "'steps'")):
        wrong = tad("train-backbone", *given, *options)
        assert wrong.exit_code == (2 if "exclude" in message else 1)
        assert message in wrong.stderr
    none = tad("train-backbone", made / "videos", "--annotations", made / "annotations.json", "-o", run)
    assert none.exit_code == 2
    assert "name a --backbone, or a --recipe" in none.stderr


def test_a_bad_training_video_exits_with_three(made: Path, tmp_path: Path) -> None:
    (tmp_path / "training-000.mp4").write_bytes(b"no video" * 50)
    videos = [path for path in sorted((made / "videos").iterdir()) if path.stem != "training-000"]
    recipe = tmp_path / "r.yaml"
    recipe.write_text("backbone: tiny\nsteps: 1\nepochs: 1\nholdout: 0\n")
    given = ["--recipe", recipe, "--annotations", made / "annotations.json", "--weights", "random:3"]
    done = tad("train-backbone", tmp_path / "training-000.mp4", *videos, *given, "-o", tmp_path / "run")
    assert done.exit_code == 3, done.output
    assert "left out: training-000: " in done.stderr
    assert done.stdout.endswith("no video was held out to judge by\n")
    assert finetune_recipe(file=tmp_path / "run" / "recipe.yaml").weights == "random:3"


def test_classify(made: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    given = ["--weights", run, "--clips", 3, "-o", out]
    done = tad("classify", made / "videos", *given, "--annotations", made / "annotations.json")
    assert done.exit_code == 0, done.output
    first, second = done.stdout.splitlines()
    assert first == f"{out}: 6 videos scored, 0 were there"
    assert re.fullmatch(r"top-1 [\d.]+ %, top-5 100\.0 %, mAP [\d.]+ % on \d videos", second)
    assert len(read_video_scores(out)) == 6
    partly = tad("classify", made / "videos", tmp_path / "gone.mp4", *given, "--json")
    assert partly.exit_code == 3
    told = json.loads(partly.stdout)
    assert (told["written"], told["already"], told["failures"][0]["video"]) == (0, 6, "gone")
    assert "failed: gone: " in partly.stderr
    other = tad("classify", made / "videos", "--weights", run, "--clips", 4, "-o", out)
    assert other.exit_code == 1
    assert "overwrite" in other.stderr
    assert tad("classify", made / "videos", *given, "--subset", "training").exit_code == 2


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", PAGE, flags=re.S)


def test_every_command_of_the_page_runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few and small steps, and without torchrun, which a test of the training itself starts."""
    (tmp_path / "videos").symlink_to(made / "videos")
    (tmp_path / "labels.json").symlink_to(made / "annotations.json")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    ran = 0
    for line in "\n".join(blocks("bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["torchrun"]:
            words = ["tad", *words[words.index("tad.cli") + 1 :]]
        if not words:
            continue
        assert words[0] == "tad"
        quick = ["--set", "steps=2", "--set", "epochs=1", "--set", "warmup_epochs=0.2"]
        done = tad(*words[1:], *(quick if words[1] == "train-backbone" and "--recipe" not in words else []))
        if "--recipe" in words:  # of a large network: refused for its missing weights, not for how it is written
            assert done.exit_code == 1
            assert "SLOWFAST_8x8_R101.pyth cannot be read" in done.stderr
        else:
            assert done.exit_code == 0, f"{line}\n{done.output}"
        ran += 1
    assert ran >= 5
    for code in blocks("python"):
        exec(compile(code.replace("steps=2000", "steps=2"), "page", "exec"), {})
    for code in blocks("yaml"):
        (tmp_path / "r.yaml").write_text(code)
        finetune_recipe(file=tmp_path / "r.yaml")
