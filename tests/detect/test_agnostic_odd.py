"""Odd ends of proposal-based detection: stops, files inside the run, scores that do not fit, maps that differ."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from tad.annotations import read_truth, write_predictions, write_video_scores
from tad.cli import main
from tad.detect import detect, infer, prepare, resuppress, train_detector
from tad.detect.fuse import Ensemble, fuse
from tad.detect.holdout import one_class
from tad.detect.interface import Segments
from tad.detect.raw import MapView, Raw, RawMaps, load_maps, load_raw, save_maps, save_raw
from tad.detect.video_classifier import VideoClassifier
from tad.errors import AnnotationError, RecipeError
from tad.recipe import ClassesRecipe, DetectRecipe, PostprocessRecipe
from tad.timeline import TimeAxis
from tests.detect.toydetector import CLASSES, ToyProposals, make_world, toy_recipe


def recipe(detector: str = "toy-proposals", **changes: Any) -> DetectRecipe:
    model = {"dropout": 0.5} if detector == "toy-proposals" else {}
    classes = {"classifier": {"epochs": 2, "width": 8, "dilations": [1]}}
    return toy_recipe(detector=detector, **{"model": model, "classes": classes, "train": {"epochs": 2}} | changes)


def scores_of(videos: list[str], classes: tuple[str, ...] = CLASSES) -> pd.DataFrame:
    values = np.random.default_rng(0).dirichlet(np.ones(len(classes)), len(videos))
    return pd.DataFrame(values, index=videos, columns=list(classes))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Store, annotations, the run of a class-agnostic detector with its own classifier."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("odd")
    store, annotations = make_world(folder, training=8, testing=2)
    train_detector(recipe(), store=store, annotations=annotations, out=folder / "run")
    return store, annotations, folder / "run"


def interrupt(monkeypatch: pytest.MonkeyPatch, call: int, network: type[Any] = ToyProposals) -> None:
    """Ctrl-C in this call of the network's loss."""
    loss, calls = network.loss, []

    def stopped(self: Any, outputs: Any, targets: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return loss(self, outputs, targets)

    monkeypatch.setattr(network, "loss", stopped)


# ---- stop and go on --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call", [2, 3])  # in the first epoch, in the second one; an epoch has two steps
def test_resumed_with_a_classifier_to_the_same_weights(
    world: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    store, annotations, run = world
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, call)
        with pytest.raises(KeyboardInterrupt):
            train_detector(recipe(), store=store, annotations=annotations, out=out)
    assert (out / "resume.pt").is_file() == (call == 3)
    written = (out / "classifier" / "best.safetensors").stat().st_mtime_ns
    train_detector(recipe(), store=store, annotations=annotations, out=out, resume=True)
    assert (out / "last.safetensors").read_bytes() == (run / "last.safetensors").read_bytes()
    assert (out / "classifier" / "best.safetensors").stat().st_mtime_ns == written  # not trained a second time


def test_a_half_trained_classifier_is_trained_on(
    world: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, annotations, run = world
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, 3, VideoClassifier)
        with pytest.raises(KeyboardInterrupt):
            train_detector(recipe(), store=store, annotations=annotations, out=out)
    assert not (out / "classifier" / "metrics.json").exists()
    train_detector(recipe(), store=store, annotations=annotations, out=out, resume=True)
    log = (out / "classifier" / "log.txt").read_text(encoding="utf-8")
    assert [log.count(f"epoch {epoch}, loss") for epoch in (1, 2)] == [1, 1]
    for name in ("classifier/best.safetensors", "last.safetensors"):
        assert (out / name).read_bytes() == (run / name).read_bytes()


def test_other_files_where_the_classifier_will_be(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    store, annotations, run = world
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / "classifier" / "notes.txt").write_text("mine", encoding="utf-8")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RecipeError, match=r"holds 'notes\.txt'"):
        train_detector(recipe(), store=store, annotations=annotations, out=out, overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_all_segments_too_short_says_so(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    store, annotations, _ = world
    given = recipe(data={"longer_than_s": 1000.0})
    with pytest.raises(RecipeError, match=r"none of the \d+ training segments lasts longer than data\.longer_than_s"):
        train_detector(given, store=store, annotations=annotations, out=tmp_path / "run")


def test_resumed_with_the_scores_that_it_was_begun_with(
    world: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, annotations, _ = world
    file, out = tmp_path / "scores.json", tmp_path / "run"
    write_video_scores(file, scores_of(sorted(read_truth(annotations).videos["video"])))
    given = recipe(classes={"scores": str(file)})
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train_detector(given, store=store, annotations=annotations, out=out)
    kept = (out / "scores.json").read_bytes()
    file.unlink()
    train_detector(given, store=store, annotations=annotations, out=out, resume=True)
    assert (out / "scores.json").read_bytes() == kept


def test_a_run_from_before_classes_and_proposals_is_resumed(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    store, annotations, run = world
    old = tmp_path / "run"
    shutil.copytree(run, old)
    env = json.loads((old / "env.json").read_text(encoding="utf-8"))
    env["recipe_as_given"].pop("proposals")
    env["recipe_as_given"]["data"].pop("longer_than_s")
    (old / "env.json").write_text(json.dumps(env), encoding="utf-8")
    # what a detector fills in (Detector.resolve) makes this one differ from the recipe as it was given
    text = (old / "recipe.yaml").read_text(encoding="utf-8").replace("dropout: 0.5", "dropout: 0.25", 1)
    (old / "recipe.yaml").write_text(text, encoding="utf-8")
    metrics = train_detector(recipe(), store=store, annotations=annotations, out=old, resume=True)
    assert metrics == json.loads((run / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("inner", ["proposals", "scores"])
def test_sources_inside_the_run_that_is_overwritten(world: tuple[Path, Path, Path], tmp_path: Path, inner: str) -> None:
    store, annotations, run = world
    out = tmp_path / "run"
    shutil.copytree(run, out)
    if inner == "proposals":
        given = recipe("toy-refiner", proposals={"run": str(out)})
    else:
        write_video_scores(out / "scores.json", scores_of(sorted(read_truth(annotations).videos["video"])))
        given = recipe(classes={"scores": str(out / "scores.json")})
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RecipeError, match="is part of the run"):
        train_detector(given, store=store, annotations=annotations, out=out, overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_proposals_run_without_weights_is_refused_at_once(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    store, annotations, run = world
    source, out = tmp_path / "source", tmp_path / "run"
    shutil.copytree(run, source)
    (source / "best.safetensors").unlink()
    refine = recipe("toy-refiner", proposals={"run": str(source)})
    with pytest.raises(Exception, match=r"source has no best\.safetensors"):
        train_detector(refine, store=store, annotations=annotations, out=out)
    assert not out.exists()


def test_proposals_are_found_for_videos_that_the_file_lacks(
    world: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, annotations, run = world
    out = tmp_path / "run"
    monkeypatch.setattr(infer, "TOGETHER", 3)  # several groups
    refine = recipe("toy-refiner", proposals={"run": str(run), "top": 4}, train={"epochs": 1})
    train_detector(refine, store=store, annotations=annotations, out=out)
    whole = {s.video: s.segments_s for s in load_raw(out / "proposals.npz").segments}
    assert len(whole) == 8
    copy = recipe("toy-refiner", proposals={"run": str(out / "proposals"), "top": 4}, train={"epochs": 1})
    train_detector(copy, store=store, annotations=annotations, out=tmp_path / "again")
    assert (tmp_path / "again" / "last.safetensors").read_bytes() == (out / "last.safetensors").read_bytes()
    raw = load_raw(out / "proposals.npz")
    save_raw(out / "proposals.npz", Raw(raw.segments[2:], raw.classes, class_agnostic=True))
    (out / "metrics.json").unlink()
    (out / "resume.pt").unlink()
    train_detector(refine, store=store, annotations=annotations, out=out, resume=True)
    again = {s.video: s.segments_s for s in load_raw(out / "proposals.npz").segments}
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[video], whole[video]) for video in whole)


# ---- class scores that do not fit ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("table", "message"),
    [
        (scores_of([f"video_{i:03d}" for i in range(8)], ("a", "b")), "is one of the 3 that are looked for"),
        (scores_of([f"video_{i:03d}" for i in range(8)]) - 0.5, r"below 0.*classes\.softmax"),
        (scores_of([f"v_video_{i:03d}" for i in range(8)]), "none of the 2 held-out videos"),
    ],
    ids=["classes", "logits", "videos"],
)
def test_scores_that_do_not_fit_stop_a_training_before_it_begins(
    world: tuple[Path, Path, Path], tmp_path: Path, table: pd.DataFrame, message: str
) -> None:
    from tad.detect.recipe_check import check_recipe

    store, annotations, _ = world
    write_video_scores(tmp_path / "scores.json", table)
    given = recipe(classes={"scores": str(tmp_path / "scores.json")})
    with pytest.raises(AnnotationError, match=message):
        train_detector(given, store=store, annotations=annotations, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    problems = check_recipe(given, store=store, annotations=annotations, read=False).problems
    assert len(problems) == 1
    with pytest.raises(AnnotationError, match=message):
        raise AnnotationError(problems[0])


def test_scores_of_other_classes_stop_detection_before_it_begins(
    world: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, run = world
    monkeypatch.setattr(infer, "find", lambda *_, **__: pytest.fail("the network was asked"))
    with pytest.raises(AnnotationError, match="is one of the 3 that are looked for"):
        detect(run=run, store=store, scores=scores_of(["video_000"], ("a", "b")))


def test_held_out_videos_without_scores_are_said(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, annotations, _ = world
    videos = sorted(read_truth(annotations).videos["video"])
    write_video_scores(tmp_path / "scores.json", scores_of(videos[:1]))
    given = recipe(classes={"scores": str(tmp_path / "scores.json")})
    notes = prepare.check_class_scores(given, classes=list(CLASSES), holdout=videos[:2])
    assert notes == ["1 held-out videos have no class scores and count as missed: 'video_001'"]


def test_logits_given_in_detection_become_probabilities(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    store, _, run = world
    videos = [f"video_{i:03d}" for i in range(10)]
    probabilities = scores_of(videos)
    write_video_scores(tmp_path / "p.json", probabilities)
    write_video_scores(tmp_path / "logits.json", np.log(probabilities) / 2)
    expected = tmp_path / "expected.csv"
    found = tmp_path / "found.csv"
    same = ["detect", "--run", str(run), "--store", str(store)]
    logits = ["--scores", str(tmp_path / "logits.json"), "--set", "classes.softmax=2"]
    for arguments in (["--scores", str(tmp_path / "p.json"), "-o", str(expected)], [*logits, "-o", str(found)]):
        result = CliRunner().invoke(main, [*same, *arguments])
        assert result.exit_code == 0, result.output
    first, second = pd.read_csv(expected), pd.read_csv(found)
    assert len(first) > 0
    pd.testing.assert_frame_equal(first, second, rtol=1e-5)

    raw = tmp_path / "raw.npz"
    detect(run=run, store=store, raw_out=raw)
    result = CliRunner().invoke(main, ["fuse", str(raw), *logits, "-o", str(found)])
    assert result.exit_code == 0, result.output
    pd.testing.assert_frame_equal(first, pd.read_csv(found), rtol=1e-5)


def test_what_would_change_nothing_is_refused(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    store, annotations, run = world
    scores = scores_of(["video_000"])
    write_video_scores(tmp_path / "s.json", scores)
    file = str(tmp_path / "s.json")
    with pytest.raises(RecipeError, match="leave the scores out"):
        detect(run=run, store=store, proposals=True, scores=scores)
    with pytest.raises(RecipeError, match="give the file as scores"):
        detect(run=run, store=store, classes=ClassesRecipe(softmax=2))
    save_raw(tmp_path / "aware.npz", Raw([], ["x"]))
    with pytest.raises(RecipeError, match="take no class scores"):
        resuppress(tmp_path / "aware.npz", PostprocessRecipe(), scores=scores)
    with pytest.raises(RecipeError, match="take no class scores"):
        fuse([tmp_path / "aware.npz"], postprocess=PostprocessRecipe(), classes=ClassesRecipe(), scores=scores)
    of_store = ["detect", "--run", str(run), "--store", str(store)]
    of_file = ["fuse", str(tmp_path / "aware.npz"), "-o", str(tmp_path / "o.json")]
    for arguments, status, message in (
        ([*of_store, "--set", f"classes.scores={file}"], 1, "--scores FILE"),
        ([*of_store, "--set", "classes.classifier.epochs=3"], 1, "of the training"),
        ([*of_store, "--weights", "rgb=x.pt"], 2, "from VIDEOS"),
        ([*of_store, "--proposals", "--set", "classes.top=1"], 2, "gives no classes"),
        ([*of_store, "--annotations", str(annotations)], 2, "name the subset"),
        ([*of_file, "--subset", "validation"], 2, "--search"),
        ([*of_store, "-o", str(tmp_path / "o.txt")], 2, ".json or .csv"),
        ([*of_file[:2], "-o", str(tmp_path / "o.txt")], 2, ".json or .csv"),
        ([*of_file, "--raw", str(tmp_path / "o.txt")], 1, "must end in .npz"),
        ([*of_file, "--set", "classes.softmax=2"], 2, "--scores"),
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == status, result.output
        assert message in result.output


def test_two_classes_of_one_segment_are_one_proposal() -> None:
    rows = [("v", 1.0, 2.0, "a"), ("v", 1.0, 2.0, "b"), ("v", 1.0, 3.0, "a"), ("w", 1.0, 2.0, "a")]
    found = one_class(pd.DataFrame(rows, columns=["video", "start_s", "end_s", "label"]))
    assert found["label"].unique().tolist() == ["action"]
    assert found[["video", "end_s"]].to_numpy().tolist() == [["v", 2.0], ["v", 3.0], ["w", 2.0]]


# ---- ensembles -------------------------------------------------------------------------------------------------------
def maps_file(path: Path, views: dict[str, list[tuple[int, float]]]) -> Path:
    """A file of maps; of every video its views as (rows, first second)."""
    found = [
        MapView(
            video,
            TimeAxis.from_frames(fps=25, window_frames=16, stride_frames=25).shifted(int(begin)),
            100.0,
            {"start": torch.rand(rows), "end": torch.rand(rows), "iou_class": torch.rand(rows, rows),
             "iou_regression": torch.rand(rows, rows)},
        )
        for video, parts in views.items()
        for rows, begin in parts
    ]  # fmt: skip
    given = DetectRecipe(detector="bmn", streams=("rgb",), model={"layout": "windowed", "rows": 8, "durations": 8})
    save_maps(path, RawMaps(found, ["x"], given, {"rgb": 4}, None))
    return path


@pytest.mark.parametrize(
    ("second", "third"),
    [
        ({"a": [(8, 0)]}, {"a": [(8, 0), (8, 4)]}),  # more windows of a video
        ({"a": [(8, 0), (8, 4)]}, {"a": [(8, 0)]}),
        ({"b": [(8, 0)]}, {"b": [(6, 0)]}),  # a video that the first member lacks
        ({"b": [(8, 0)]}, {"b": [(8, 1)]}),
    ],
)
def test_maps_over_other_grids_are_refused(tmp_path: Path, second: Any, third: Any) -> None:
    first = maps_file(tmp_path / "1.npz", {"other": [(8, 0)]})
    files = [first, maps_file(tmp_path / "2.npz", second), maps_file(tmp_path / "3.npz", third)]
    with pytest.raises(RecipeError, match=r"video [ab]: the maps of .*2\.npz and .*3\.npz"):
        Ensemble.load(files)
    Ensemble.load(files[:2])


def test_peaks_survive_the_file(tmp_path: Path) -> None:
    close = torch.tensor([0.9, 0.40001, 0.40002, 0.40001, 0.2])  # one number in half precision
    assert close[1:4].half().unique().numel() == 1
    axis = TimeAxis.from_frames(fps=25, window_frames=16, stride_frames=25)
    given = DetectRecipe(detector="bmn", streams=("rgb",))
    save_maps(tmp_path / "m.npz", RawMaps([MapView("v", axis, 9.0, {"start": close})], ["x"], given))
    assert torch.equal(load_maps(tmp_path / "m.npz").views[0].maps["start"], close)


@pytest.mark.parametrize("damage", ["empty", "cut", "garbled"])
def test_damaged_files_are_an_error_of_the_file(tmp_path: Path, damage: str) -> None:
    file = maps_file(tmp_path / "m.npz", {"v/ü": [(8, 0)]})
    data = file.read_bytes()
    middle = len(data) // 3
    changed = {"empty": b"", "cut": data[:middle], "garbled": data[:middle] + b"\xff" * 40 + data[middle + 40 :]}
    file.write_bytes(changed[damage])
    with pytest.raises(RecipeError, match=r"m\.npz"):
        fuse([file])


def test_pooled_raw_detections_keep_the_scores_that_were_given(tmp_path: Path) -> None:
    segments = Segments("v/ü", torch.tensor([[0.0, 5.0]]), torch.zeros(1, dtype=torch.int64), torch.ones(1))
    given = DetectRecipe(detector="toy-proposals", streams=("rgb",))
    save_raw(tmp_path / "a.npz", Raw([segments], ["x", "y"], True, scores_of(["v/ü"], ("x", "y")), given))
    other = pd.DataFrame([[0.1, 0.7]], index=["v/ü"], columns=["x", "y"])
    found = fuse([tmp_path / "a.npz"], scores=other, raw_out=tmp_path / "b.npz")
    assert found["score"].tolist() == pytest.approx([0.7, 0.1])
    pd.testing.assert_frame_equal(resuppress(tmp_path / "b.npz"), found)


def test_a_file_of_no_proposals_is_scored_as_proposals(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    store, annotations, run = world
    found = detect(run=run, store=store, proposals=True, postprocess=PostprocessRecipe(min_score=2.0))
    write_predictions(tmp_path / "none.csv", found)
    same = ["evaluate", "--annotations", str(annotations), "--subset", "validation", "--json"]
    result = CliRunner().invoke(main, [*same, "--predictions", str(tmp_path / "none.csv")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["auc"] == 0.0
