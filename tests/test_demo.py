"""The demo, small: what it leaves behind, that it goes on where it was, and that nothing of the test videos leaks."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from tad.annotations import read_predictions, read_truth
from tad.cli import main
from tad.demo import run_demo
from tad.detect import train_detector
from tad.detect.recipes import detect_recipe
from tad.detect.runs import read_weights
from tad.errors import RecipeError
from tad.evaluate import evaluate
from tad.extract.finetune import finetune, finetune_recipe
from tad.recipe import load_mapping
from tad.store import open_store

SMALL: dict[str, Any] = {
    "videos_train": 8,
    "videos_validation": 2,
    "videos_test": 3,
    "steps": 12,
    "epochs": 2,
    "duration_s": (8.0, 12.0),
    "device": "cpu",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str, str]:
    """A small demo: its folder, what it returned, its stdout and stderr."""
    import contextlib
    import io

    root = tmp_path_factory.mktemp("demo") / "out"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        metrics = run_demo(root, **SMALL)
    return root, metrics, out.getvalue(), err.getvalue()


def stamps(root: Path) -> dict[str, int]:
    """When what is costly was written."""
    files = [*root.glob("videos/*"), *root.glob("weights/*"), *root.glob("run/*"), *root.glob("features.zarr/tiny/*/*")]
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in files if path.is_file()}


def test_everything_is_where_it_is_said_to_be(told: tuple[Path, dict[str, Any], str, str]) -> None:
    root, metrics, _, _ = told
    truth = read_truth(root / "annotations.json")
    sizes = {subset: len(truth.subset(subset).videos) for subset in truth.subsets}
    assert sizes == {"training": 8, "validation": 2, "testing": 3}
    with open_store(root / "features.zarr") as store:
        assert store.videos("tiny") == sorted(truth.videos["video"])
        assert store["tiny", "testing-000"].shape[1] == 128
        assert store["tiny", "testing-000"].axis.scale_s == pytest.approx(0.32)
    predictions = read_predictions(root / "predictions.json")
    assert set(predictions["video"]) <= set(truth.subset("testing").videos["video"])
    assert json.loads((root / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert evaluate(truth, predictions, subset="testing").to_dict()["map"] == pytest.approx(metrics["map"], abs=1e-9)
    assert {"map", "average_map", "ap", "counts", "protocol", "backbone", "stages", "settings"} <= metrics.keys()
    assert list(metrics["map"]) == ["0.3", "0.4", "0.5", "0.6", "0.7"]
    assert len(metrics["stages"]) == 7
    assert "<title>Detections of the demo</title>" in (root / "report.html").read_text(encoding="utf-8")


def test_tables_go_to_stdout_and_commands_that_the_tool_knows_to_stderr(
    told: tuple[Path, dict[str, Any], str, str],
) -> None:
    root, _, out, err = told
    assert "What was done" in out
    assert "mAP" in out
    assert "$" not in out
    lines = re.findall(r"^ +\$ (.*)$", err, flags=re.M)
    assert len(lines) == 7
    words = [shlex.split(line) for line in lines]
    for line in words:
        if line[0] == "tad":
            command = main.commands[line[1]]
            command.make_context(line[1], line[2:]).close()  # every option is known, every file is there
        else:
            assert line[:2] == ["python", "-c"]
            compile(line[2], "printed", "exec")
            assert str(root) in line[2]
    assert [line[1] for line in words if line[0] == "tad"] == [
        "extract", "train-detector", "detect", "evaluate", "report",
    ]  # fmt: skip


def test_a_second_call_reuses_all_and_says_nothing_when_quiet(
    told: tuple[Path, dict[str, Any], str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    root, metrics, _, _ = told
    before = stamps(root)
    again = run_demo(root, **SMALL, quiet=True)
    assert capfd.readouterr() == ("", "")
    assert again["map"] == metrics["map"]
    assert again["backbone"] == metrics["backbone"]
    assert stamps(root) == before
    assert any(name.startswith("features.zarr") for name in before)


def test_other_settings_and_other_peoples_folders_are_refused(
    told: tuple[Path, dict[str, Any], str, str], tmp_path: Path
) -> None:
    root, _, _, _ = told
    before = stamps(root)
    with pytest.raises(RecipeError, match=r"seed 0 there, 1 now.*--fresh"):
        run_demo(root, **SMALL, seed=1, quiet=True)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "holiday.mp4").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(RecipeError, match="no demo made"):
            run_demo(tmp_path, **SMALL, fresh=fresh, quiet=True)
    with pytest.raises(RecipeError, match="is a file"):
        run_demo(tmp_path / "videos" / "holiday.mp4", quiet=True)
    assert (tmp_path / "videos" / "holiday.mp4").read_text() == "mine"
    assert stamps(root) == before


def test_test_videos_have_no_part_in_what_is_learnt(
    told: tuple[Path, dict[str, Any], str, str], tmp_path: Path
) -> None:
    """Without the test videos, their truth and their features, both trainings end in the same weights."""
    root, _, _, _ = told
    shutil.copytree(root / "videos", tmp_path / "videos", ignore=shutil.ignore_patterns("testing-*"))
    shutil.copytree(root / "features.zarr", tmp_path / "s.zarr", ignore=shutil.ignore_patterns("testing-*"))
    data = json.loads((root / "annotations.json").read_text())
    data["database"] = {k: v for k, v in data["database"].items() if v["subset"] != "testing"}
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(data))

    recipe = finetune_recipe(file=root / "weights" / "recipe.yaml")
    finetune(recipe, videos=tmp_path / "videos", annotations=annotations, out=tmp_path / "weights", device="cpu")
    name = "weights/backbone.safetensors"
    assert (tmp_path / name).read_bytes() == (root / name).read_bytes()

    path = root / "run" / "recipe.yaml"
    sets = ["data.train_subset=training", "data.holdout_subset=validation", "train.epochs=2", "model.width=128"]
    given = detect_recipe("talnet", streams=["tiny"], sets=sets, seed=0)
    train_detector(given, store=tmp_path / "s.zarr", annotations=annotations, out=tmp_path / "run", device="cpu")
    assert load_mapping(tmp_path / "run" / "recipe.yaml") == load_mapping(path)  # the anchor scales too
    ours, theirs = (read_weights(folder / "run" / "best.safetensors") for folder in (tmp_path, root))
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[key] == theirs[key]).all()) for key in ours)


def test_fresh_starts_over(tmp_path: Path) -> None:
    few = {**SMALL, "steps": 2, "epochs": 1, "quiet": True}
    run_demo(tmp_path / "out", **few)
    before = stamps(tmp_path / "out")
    metrics = run_demo(tmp_path / "out", **few, seed=1, fresh=True)
    after = stamps(tmp_path / "out")
    assert metrics["settings"]["seed"] == 1
    assert all(before[name] != after[name] for name in before.keys() & after.keys())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_whole_demo_finds_actions_in_unseen_videos(tmp_path: Path, seed: int) -> None:
    metrics = run_demo(tmp_path / "out", seed=seed, quiet=True)
    assert metrics["map"]["0.5"] >= 0.5
