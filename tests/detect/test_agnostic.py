"""Proposals without classes, through the whole pipeline: their classes, their refinement by another run, ensembles."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tad.annotations import read_truth, write_video_scores
from tad.detect import Run, detect, resuppress, train_detector
from tad.detect.fuse import Ensemble, fuse, search_weights
from tad.detect.interface import Segments
from tad.detect.raw import Raw, load_raw, save_raw
from tad.errors import RecipeError
from tad.evaluate import detection_map
from tad.recipe import ClassesRecipe, DetectRecipe, PostprocessRecipe
from tad.store import open_store
from tests.detect.toydetector import CLASSES, make_world, toy_recipe


def recipe(detector: str = "toy-proposals", **changes: Any) -> DetectRecipe:
    model = {"dropout": 0.3} if detector == "toy-proposals" else {}
    classes = {"classifier": {"epochs": 4}, "top": 3}
    return toy_recipe(detector=detector, **{"model": model, "classes": classes, "train": {"epochs": 8}} | changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Store, annotations, the run of a class-agnostic detector."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("agnostic")
    store, annotations = make_world(folder)
    train_detector(recipe(), store=store, annotations=annotations, out=folder / "run")
    return store, annotations, folder / "run"


def majority(annotations: Path) -> pd.DataFrame:
    """Class scores from the truth: the share of a video's segments, 1e-3 for classes that it does not have."""
    segments = read_truth(annotations).segments
    counts = pd.crosstab(segments["video"], segments["label"]).reindex(columns=list(CLASSES), fill_value=0)
    return (counts.div(counts.sum(axis=1), axis=0)).clip(lower=1e-3)


def test_a_class_agnostic_run_has_labels_at_once(world: tuple[Path, Path, Path]) -> None:
    store, _, run = world
    found = detect(run=run, store=store)
    assert set(found["label"]) <= set(CLASSES)
    proposals = detect(run=run, store=store, proposals=True)
    assert "label" not in proposals.columns
    # three classes each, and the best of them has the proposal's boundaries
    assert len(found) == 3 * len(proposals)
    pairs = set(zip(found["video"], found["start_s"], found["end_s"], strict=True))
    assert pairs == set(zip(proposals["video"], proposals["start_s"], proposals["end_s"], strict=True))
    assert {"average_map", "proposal_map"} <= set(pd.read_csv(run / "metrics.csv").columns)


def test_better_class_scores_make_better_detections(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    store, annotations, run = world
    truth = read_truth(annotations).subset("validation")
    scores = majority(annotations)
    write_video_scores(tmp_path / "scores.json", scores)
    by_table = detect(run=run, store=store, subset="validation", annotations=annotations, scores=scores)
    by_file = detect(
        run=run, store=store, subset="validation", annotations=annotations, scores=tmp_path / "scores.json"
    )
    pd.testing.assert_frame_equal(by_table, by_file)
    wrong = scores[[CLASSES[1], CLASSES[2], CLASSES[0]]].set_axis(list(CLASSES), axis=1)
    worse = detect(run=run, store=store, subset="validation", annotations=annotations, scores=wrong)
    assert detection_map(truth, by_table).average > detection_map(truth, worse).average + 0.05


def test_a_video_without_scores_is_lost_alone(world: tuple[Path, Path, Path]) -> None:
    store, annotations, run = world
    scores = majority(annotations).drop(index="video_003")
    failures: list[Any] = []
    found = detect(run=run, store=store, scores=scores, failures=failures)
    assert "video_003" not in set(found["video"])
    assert [f.video for f in failures] == ["video_003"]
    assert "no class scores" in failures[0].message


def test_raw_detections_know_classes_and_suppression(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    store, annotations, run = world
    first = detect(run=run, store=store, raw_out=tmp_path / "raw.npz")
    pd.testing.assert_frame_equal(resuppress(tmp_path / "raw.npz"), first)
    top = ClassesRecipe(top=1, combine="sqrt")
    again = detect(run=run, store=store, classes=top)
    pd.testing.assert_frame_equal(resuppress(tmp_path / "raw.npz", classes=top), again)
    raw = load_raw(tmp_path / "raw.npz")
    assert raw.class_agnostic
    assert raw.recipe == Run.load(run).recipe
    scores = majority(annotations)
    pd.testing.assert_frame_equal(
        resuppress(tmp_path / "raw.npz", PostprocessRecipe(tiou=0.3), scores=scores),
        detect(run=run, store=store, postprocess=PostprocessRecipe(tiou=0.3), scores=scores),
    )


def test_scores_of_a_file_instead_of_a_classifier(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    store, annotations, _ = world
    file = tmp_path / "scores.json"
    write_video_scores(file, majority(annotations))
    out = tmp_path / "run"
    train_detector(
        recipe(classes={"scores": str(file)}, train={"epochs": 1}), store=store, annotations=annotations, out=out
    )
    assert not (out / "classifier").exists()
    file.unlink()  # the run keeps its own copy
    assert set(detect(run=out, store=store)["label"]) <= set(CLASSES)


def test_resumed_to_the_same_weights_without_a_second_classifier(
    world: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    store, annotations, run = world
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    (stopped / "metrics.json").unlink()
    (stopped / "resume.pt").unlink()  # stopped before the first epoch: begins again, and gets there again
    train_detector(recipe(), store=store, annotations=annotations, out=stopped, resume=True)
    for name in ("best.safetensors", "classifier/best.safetensors"):
        assert (stopped / name).read_bytes() == (run / name).read_bytes()
    train_detector(recipe(), store=store, annotations=annotations, out=stopped, overwrite=True)
    assert (stopped / "best.safetensors").read_bytes() == (run / "best.safetensors").read_bytes()


def test_proposals_of_another_run_are_refined(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    store, annotations, run = world
    out = tmp_path / "refined"
    settings = {"proposals": {"run": str(run), "top": 5}, "train": {"epochs": 15, "lr": 0.1, "select": "last"}}
    refine = recipe("toy-refiner", **settings)
    metrics = train_detector(refine, store=store, annotations=annotations, out=out)
    assert metrics["best_epoch"] == 15
    shift = Run.load(out).build().shift.detach()  # type: ignore[union-attr]
    assert shift.abs().max() < 0.7  # it began at one row outwards
    assert (out / "proposals" / "best.safetensors").read_bytes() == (run / "best.safetensors").read_bytes()
    moved = run.rename(run.with_name("elsewhere"))  # the refining run needs it no longer
    try:
        found = detect(run=out, store=store, proposals=True)
        of_run = detect(run=out / "proposals", store=store, proposals=True)
    finally:
        moved.rename(run)
    assert found.groupby("video").size().max() == 5
    best = of_run.groupby("video").head(5)
    delta_s = shift.numpy() * 8 / 25  # rows of 8 frames at 25 fps
    expected = np.clip(best["start_s"].to_numpy() + delta_s[0], 0, None)
    np.testing.assert_allclose(np.sort(found["start_s"]), np.sort(expected), atol=1e-4)


def test_a_refining_run_says_what_it_lacks(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    store, annotations, run = world
    with pytest.raises(RecipeError, match=r"refines the proposals of another run: name it.*proposals\.run"):
        train_detector(recipe("toy-refiner"), store=store, annotations=annotations, out=tmp_path / "a")
    missing = recipe("toy-refiner", proposals={"run": str(tmp_path / "none")})
    with pytest.raises(RecipeError, match="does not exist"):
        train_detector(missing, store=store, annotations=annotations, out=tmp_path / "a")
    with pytest.raises(RecipeError, match="'toy-proposals' finds its proposals itself"):
        train_detector(recipe(proposals={"run": str(run)}), store=store, annotations=annotations, out=tmp_path / "a")
    with pytest.raises(RecipeError, match="'toy' finds classes itself"):
        train_detector(toy_recipe(classes={"top": 1}), store=store, annotations=annotations, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


# ---- ensembles -------------------------------------------------------------------------------------------------------
def member(folder: Path, name: str, videos: dict[str, list[tuple[float, float, float]]], scores: Any = None) -> Path:
    found = [
        Segments(
            video,
            torch.tensor([row[:2] for row in rows], dtype=torch.float32).reshape(-1, 2),
            torch.zeros(len(rows), dtype=torch.int64),
            torch.tensor([row[2] for row in rows]),
            {},
            100.0,
        )
        for video, rows in videos.items()
    ]
    table = None if scores is None else pd.DataFrame(scores, index=["x", "y"])
    given = DetectRecipe(detector="toy-proposals", streams=("rgb",), classes=ClassesRecipe(top=1))
    save_raw(
        folder / f"{name}.npz", Raw(found, ["x", "y"], True, table and table.T if scores is None else table.T, given)
    )
    return folder / f"{name}.npz"


def test_pooled_segments_and_mean_class_scores_by_hand(tmp_path: Path) -> None:
    one = member(tmp_path, "one", {"v": [(0, 10, 0.8)], "only": [(1, 2, 0.4)]}, {"v": [0.9, 0.1], "only": [0.5, 0.5]})
    two = member(tmp_path, "two", {"v": [(50, 60, 0.6), (0, 10, 0.2)]}, {"v": [0.2, 0.8]})
    found = fuse([one, two], weights=[1.0, 0.5])
    mean = (np.array([0.9, 0.1]) + 0.5 * np.array([0.2, 0.8])) / 1.5
    expected = {  # the second (0, 10) is suppressed by the first
        ("v", 0.0, 10.0): ("x", 0.8 * mean[0]),
        ("v", 50.0, 60.0): ("x", 0.6 * 0.5 * mean[0]),
        ("only", 1.0, 2.0): ("x", 0.4 * 0.5),
    }
    assert len(found) == 3
    for row in found.itertuples():
        label, score = expected[row.video, row.start_s, row.end_s]
        assert row.label == label
        assert row.score == pytest.approx(score, rel=1e-6)
    assert set(fuse([one, two], weights=[0, 1])["video"]) == {"v"}


def test_the_search_finds_the_member_that_is_right(tmp_path: Path) -> None:
    truth = pd.DataFrame({"video": ["v"] * 2, "start_s": [0.0, 50.0], "end_s": [10.0, 60.0], "label": ["x", "x"]})
    bad = member(tmp_path, "bad", {"v": [(20, 30, 0.9), (31, 44, 0.8), (0, 10, 0.1)]}, {"v": [0.9, 0.1]})
    good = member(tmp_path, "good", {"v": [(0, 10, 0.5), (50, 60, 0.4)]}, {"v": [0.8, 0.2]})
    trials = search_weights(Ensemble.load([bad, good]), truth)
    assert trials[0].average_map == pytest.approx(1.0)
    assert trials[0].weights[0] / trials[0].weights[1] < 0.5
    equal = next(t for t in trials if len(set(t.weights)) == 1)
    assert equal.average_map < 0.9
    assert sorted(t.average_map for t in trials)[::-1] == [t.average_map for t in trials]


def test_members_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    one = member(tmp_path, "one", {"v": [(0, 10, 0.8)]}, {"v": [0.9, 0.1]})
    save_raw(tmp_path / "aware.npz", Raw([], ["x"]))
    with pytest.raises(RecipeError, match="cannot be fused with such that do not"):
        fuse([one, tmp_path / "aware.npz"])
    with pytest.raises(RecipeError, match="2 weights for 1 members"):
        fuse([one], weights=[1, 2])
    with pytest.raises(RecipeError, match="at least 0, one of them above"):
        fuse([one], weights=[0])
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(RecipeError, match="does not hold raw detections"):
        fuse([tmp_path / "other.npz"])
    with pytest.raises(RecipeError, match="at least one file"):
        fuse([])


def test_fuse_from_the_command_line(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from click.testing import CliRunner

    from tad.cli import main

    store, annotations, run = world
    for name in ("a", "b"):
        detect(run=run, store=store, raw_out=tmp_path / f"{name}.npz")
    files = [str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]
    out = tmp_path / "found.json"
    search = ["--search", "--annotations", str(annotations), "--subset", "validation"]
    result = CliRunner().invoke(main, ["fuse", *files, *search, "-o", str(out), "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["segments"] > 0
    assert data["trials"][0]["weights"] == data["weights"]
    wrong = CliRunner().invoke(main, ["fuse", *files, "--search", "-o", str(out)])
    assert wrong.exit_code == 2


def test_the_commands_of_the_ensemble_page(
    world: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from tad.cli import main

    store, annotations, run = world
    (tmp_path / "runs").mkdir()
    for name in ("a", "b"):
        shutil.copytree(run, tmp_path / "runs" / name)
    shutil.copytree(store, tmp_path / "features.zarr")
    shutil.copy(annotations, tmp_path / "annotations.json")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "detect.md").read_text(encoding="utf-8")
    commands = page.split("## Ensembles")[1].split("```bash\n")[1].split("\n```")[0].splitlines()
    assert len(commands) == 4
    for command in commands:
        result = CliRunner().invoke(main, command.split()[1:])
        assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["results"]) == 6


def test_the_commands_of_the_page_on_proposals(
    world: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from tad.cli import main
    from tad.detect import recipes

    small: dict[str, dict[str, Any]] = {
        "bmn": {"rows": 24, "width": 16, "tem_width": 16, "matching_channels": 16, "hidden": 16, "pem_width": 8},
        "tcanet": {"width": 16, "head_width": 16, "boundary_width": 8},
        "etad": {"rows": 24, "width": 16, "lstm_width": 16, "branch_width": 16, "roi_channels": 8, "head_width": 16},
    }
    train = {"epochs": 1, "batch_videos": 4}
    one_epoch = {"classifier": {"epochs": 1}}
    monkeypatch.setattr(
        recipes,
        "DEFAULTS",
        {name: {"model": model, "train": train, "classes": one_epoch} for name, model in small.items()},
    )
    store, annotations, _ = world
    shutil.copytree(store, tmp_path / "features.zarr")
    shutil.copy(annotations, tmp_path / "annotations.json")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "proposals.md").read_text(encoding="utf-8")
    commands = page.split("```bash\n")[1].split("\n```")[0].splitlines()
    assert len(commands) == 4
    for command in commands:
        result = CliRunner().invoke(main, command.split()[1:])
        assert result.exit_code == 0, result.output
    assert (tmp_path / "found.json").is_file()


def test_a_store_without_a_stream_of_the_inner_run(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    store, annotations, run = world
    out = tmp_path / "refined"
    settings = {"streams": ["rgb"], "proposals": {"run": str(run)}, "train": {"epochs": 1}}
    train_detector(recipe("toy-refiner", **settings), store=store, annotations=annotations, out=out)
    with open_store(store) as opened, open_store(tmp_path / "part.zarr", "a") as part:
        part.create_stream("rgb", opened.stream_attrs("rgb")["spec"])
        feature = opened["rgb", "video_000"]
        from tad.store import Level

        part.write("rgb", "video_000", {"features": Level(feature.numpy(), feature.axis)}, duration_s=1.0, source={})
    with pytest.raises(Exception, match="stream 'flow'"):
        detect(run=out, store=tmp_path / "part.zarr")


def test_short_actions_can_be_left_out_of_the_training(world: tuple[Path, Path, Path]) -> None:
    from tad.detect.preflight import plan_training

    store, annotations, _ = world
    with open_store(store) as opened:
        truth = read_truth(annotations)
        plans = [plan_training(recipe(data={"longer_than_s": value}), opened, truth) for value in (0.0, 2.0)]
    lengths = [np.concatenate([np.diff(s, axis=1)[:, 0] for s, _ in plan.segments.values()]) for plan in plans]
    assert lengths[0].min() <= 2.0 < lengths[1].min()
    assert len(lengths[1]) == (lengths[0] > 2.0).sum()
    assert f"{(lengths[0] <= 2.0).sum()} training segments do not last" in " ".join(plans[1].messages)
    assert len(plans[0].holdout_truth) == len(plans[1].holdout_truth)
