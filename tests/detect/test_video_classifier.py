"""The classifier of whole videos: its arithmetic, its training as a run, and the scores that it gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tad.annotations import Truth, read_scores_about, read_truth, read_video_scores, write_video_scores
from tad.detect import classifier_train
from tad.detect.classifier_run import ClassifierRun, accuracy, classifier_scores, classify_store
from tad.detect.classifier_train import classifier_recipe, train_classifier
from tad.detect.interface import Batch, Targets
from tad.detect.preflight import Failure, plan_training
from tad.detect.video_classifier import RowConv, VideoClassifier, VideoOutputs, row_classes
from tad.errors import AnnotationError, RecipeError, StoreError, WeightsError
from tad.recipe import ClassifierRecipe, DataRecipe, load_mapping
from tad.store import Level, open_store
from tad.timeline import TimeAxis
from tests.detect.toydetector import make_world, toy_recipe

AXIS = TimeAxis.from_frames(fps=25, window_frames=16, stride_frames=8)
QUICK = ClassifierRecipe(epochs=2, width=8, dilations=(1, 2))


def network(**options: Any) -> VideoClassifier:
    torch.manual_seed(0)
    return VideoClassifier(**{"channels": {"rgb": 3, "flow": 2}, "classes": 4, "width": 8, **options})


def batch_of(rows: list[int], *, seed: int = 0, padding: float = 0.0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(rows)) < torch.tensor(rows)[:, None]
    features = {}
    for stream, channels in (("rgb", 3), ("flow", 2)):
        x = torch.full((len(rows), channels, max(rows)), padding)
        for i, count in enumerate(rows):
            x[i, :, :count] = torch.randn(channels, count, generator=generator)
        features[stream] = x
    return Batch([f"v{i}" for i in range(len(rows))], features, mask, [AXIS] * len(rows), [9.0] * len(rows))


def targets_of(segments: list[tuple[float, float]], labels: list[int]) -> Targets:
    return Targets(torch.tensor(segments, dtype=torch.float32).reshape(-1, 2), torch.tensor(labels, dtype=torch.int64))


TARGETS = [
    targets_of([(1.2, 4.0), (3.4, 7.0), (8.6, 8.9)], [2, 0, 2]),
    targets_of([], []),
    targets_of([(0.0, 5.0)], [3]),
]


# ---- arithmetic ------------------------------------------------------------------------------------------------------
def test_padding_changes_nothing() -> None:
    """A video alone gives what it gives beside longer ones, whatever stands in the padding."""
    model = network().eval()
    whole = batch_of([9, 1, 40], padding=1e3)
    together = model(whole)
    for i, count in enumerate((9, 1, 40)):
        features = {key: value[i : i + 1, :, :count] for key, value in whole.features.items()}
        alone = model(Batch(["v"], features, torch.ones(1, count, dtype=torch.bool), [AXIS], [9.0]))
        torch.testing.assert_close(alone.video[0], together.video[i])
        torch.testing.assert_close(alone.rows[0], together.rows[i, :, :count])
    chances = model.probabilities(whole)
    torch.testing.assert_close(chances.sum(1), torch.ones(3))


@pytest.mark.parametrize(("rows", "dilation"), [(9, 1), (9, 4), (2, 3), (1, 1)])
def test_the_convolution_of_rows(rows: int, dilation: int) -> None:
    conv = RowConv(5, dilation)
    kernel = conv.weights.weight.unflatten(1, (3, 5)).transpose(1, 2)  # (W, W, 3)
    x = torch.randn(2, rows, 5)
    wanted = F.conv1d(x.transpose(1, 2), kernel, conv.weights.bias, dilation=dilation, padding=dilation)
    torch.testing.assert_close(conv(x), wanted.transpose(1, 2))


def test_row_classes_by_a_loop() -> None:
    generator = np.random.default_rng(0)
    for _ in range(30):
        count, rows = int(generator.integers(0, 5)), 12
        edges = np.sort(generator.random((count, 2)) * rows, axis=1).astype(np.float32)
        labels = generator.integers(0, 3, count)
        wanted = np.zeros((4, rows))
        for row in range(rows):
            present = set()
            for (start, end), label in zip(edges, labels, strict=True):
                if start < row + 0.5 < end or row <= np.float32(0.5) * (start + end) < row + 1:
                    present.add(int(label))
            for label in present:
                wanted[label, row] = 1 / len(present)
            wanted[3, row] = not present
        got = row_classes(Targets(torch.from_numpy(edges), torch.from_numpy(labels)), rows, 3)
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
    # what only the windows of the first and last real rows see belongs to these
    ends = row_classes(targets_of([(-3.5, -0.5), (4.2, 6.0)], [0, 1]), 6, 2, last=3)
    assert ends.argmax(0).tolist() == [0, 2, 2, 1, 1, 1]
    short = row_classes(targets_of([(2.6, 2.9)], [1]), 4, 2)
    assert short.argmax(0).tolist() == [2, 2, 1, 2]


def test_the_loss_by_hand() -> None:
    generator = torch.Generator().manual_seed(1)
    outputs = VideoOutputs(
        torch.randn(3, 4, generator=generator),
        torch.randn(3, 5, 10, generator=generator),
        torch.arange(10) < torch.tensor([[10], [7], [5]]),
    )
    terms = network(rows_weight=0.5).loss(outputs, TARGETS)
    logs = outputs.video.log_softmax(1)
    video = (-0.5 * (logs[0, 0] + logs[0, 2]) + 0.0 - logs[2, 3]) / 3  # labels share; the second video has none
    torch.testing.assert_close(terms["video"], video)
    rows = 0.0
    for i, count in enumerate((10, 7, 5)):
        truth = row_classes(TARGETS[i], 10, 4)
        losses = [-(truth[:, t] * outputs.rows[i, :, t].log_softmax(0)).sum() for t in range(count)]
        rows = rows + sum(losses) / count / 3
    torch.testing.assert_close(terms["rows"], 0.5 * rows)
    assert set(network(rows_weight=0.0).loss(outputs, TARGETS)) == {"video"}


def test_the_loss_is_a_mean_over_videos() -> None:
    model = network(dropout=0.0)
    batch = batch_of([10, 7, 5])
    together = model.loss(model(batch), TARGETS)
    for name, value in together.items():
        alone = []
        for i, count in enumerate((10, 7, 5)):
            features = {key: x[i : i + 1, :, :count] for key, x in batch.features.items()}
            single = model(Batch(["v"], features, torch.ones(1, count, dtype=torch.bool), [AXIS], [9.0]))
            alone.append(model.loss(single, TARGETS[i : i + 1])[name])
        torch.testing.assert_close(value, torch.stack(alone).mean())


def test_attention_is_where_rows_are_actions() -> None:
    """With a row classifier that calls all rows background but one, the attention's mean is that row."""
    model = network(dilations=()).eval()
    x = batch_of([6])
    with torch.no_grad():
        rows = F.relu(model.norm(model.project(torch.cat([x.features["rgb"], x.features["flow"]], 1).transpose(1, 2))))
        model.rows.weight.zero_()
        model.rows.weight[4] = -40 * rows[0, 3] / rows[0, 3].norm()
        model.rows.bias.zero_()
        model.rows.bias[4] = 40 * rows[0, 3].norm() * 0.97  # between row 3 and all others
        model.video.weight.zero_()
        model.video.weight[0, 2] = 1.0  # reads channel 2 of the attention's mean
        model.video.bias.zero_()
        found = model(x).video[0, 0]
    torch.testing.assert_close(found, rows[0, 3, 2], rtol=0.02, atol=0.02)


def test_values_out_of_range() -> None:
    for options in ({"width": 0}, {"dropout": 1.0}, {"dilations": (0,)}, {"rows_weight": -1.0}, {"classes": 0}):
        with pytest.raises(RecipeError, match=next(iter(options)).removesuffix("s")):
            network(**options)


# ---- training --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_world(tmp_path_factory.mktemp("world"), training=24, testing=8)


def train(world: tuple[Path, Path], out: Path, recipe: ClassifierRecipe = QUICK, **options: Any) -> dict[str, Any]:
    options = {"streams": ["rgb", "flow"], "seed": 3, "data": DataRecipe(holdout=0.25), "device": "cpu", **options}
    return train_classifier(recipe, **{"store": world[0], "annotations": world[1], "out": out, **options})


@pytest.fixture(scope="module")
def trained(world: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "classifier"
    train(world, out)
    return out


def ordered_world(folder: Path) -> tuple[Path, Path]:
    """Every video has one action among distractors; two classes look alike and differ in their order alone."""
    rng = np.random.default_rng(0)
    first, second, scene = rng.standard_normal((3, 6))
    database = {}
    with open_store(folder / "store", "a") as store:
        store.create_stream("x", {"made": "by hand"})
        for i in range(60):
            rows, label = int(rng.integers(30, 60)), int(rng.integers(2))
            x = 0.4 * rng.standard_normal((rows, 6)) + rng.standard_normal() * scene
            at = int(rng.integers(3, rows - 23))
            parts = (first, second) if label else (second, first)
            x[at : at + 4] += 2 * parts[0]
            x[at + 4 : at + 8] += 2 * parts[1]
            other = at + 12
            x[other : other + 4] += 2 * parts[rng.integers(2)]  # half an action is none
            start, end = AXIS.to_seconds(np.array([at, at + 8]))
            duration_s = AXIS.span_s(rows - 1)[1]
            store.write("x", f"v{i}", {"features": Level(x.astype(np.float32), AXIS)}, duration_s=duration_s,
                        source={"name": f"v{i}", "size": i, "mtime_ns": 0})  # fmt: skip
            action = {"segment": [float(start), float(end)], "label": f"order {label}"}
            subset = "training" if i < 40 else "validation"
            database[f"v{i}"] = {"subset": subset, "duration": duration_s, "annotations": [action]}
    (folder / "a.json").write_text(json.dumps({"version": "x", "database": database}))
    return folder / "store", folder / "a.json"


def test_it_learns_what_only_the_order_of_rows_tells(tmp_path: Path) -> None:
    made = ordered_world(tmp_path)
    recipe = ClassifierRecipe(epochs=30, width=32, dilations=(1, 2, 4), lr=5e-3)
    metrics = train(made, tmp_path / "run", recipe, streams=["x"], data=DataRecipe(holdout=0))
    assert metrics["best_epoch"] == metrics["epochs"] == 30
    truth = read_truth(made[1]).subset("validation")
    scores = classifier_scores(tmp_path / "run", store=made[0], videos=truth.videos["video"].tolist(), device="cpu")
    assert accuracy(truth.segments, scores)["top1"] >= 0.85
    np.testing.assert_allclose(scores.sum(axis=1), 1.0, rtol=1e-9)


def test_no_held_out_video_of_the_detector_is_trained_on(world: tuple[Path, Path], trained: Path) -> None:
    """The split is that of a detector with the same data and seed, which a detector's run relies on."""
    detector = toy_recipe(data={"holdout": 0.25}, seed=3)
    with open_store(world[0]) as store:
        plan = plan_training(detector, store, read_truth(world[1]))
    state = torch.load(trained / "resume.pt", weights_only=True)
    assert (state["train"], state["holdout"]) == (plan.train, plan.holdout)
    assert ClassifierRun.load(trained).classes == plan.classes
    metrics = json.loads((trained / "metrics.json").read_text())
    assert (metrics["counts"]["train_videos"], metrics["counts"]["holdout_videos"]) == (18, 6)


def test_equal_seeds_equal_files(world: tuple[Path, Path], trained: Path, tmp_path: Path) -> None:
    train(world, tmp_path / "same")
    assert (tmp_path / "same/best.safetensors").read_bytes() == (trained / "best.safetensors").read_bytes()
    train(world, tmp_path / "other", data=DataRecipe(holdout=0.25, workers=0), seed=4)
    assert (tmp_path / "other/best.safetensors").read_bytes() != (trained / "best.safetensors").read_bytes()


def test_a_stopped_training_goes_on_to_the_same_weights(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ClassifierRecipe(epochs=4, width=8, dilations=(1,), select="map")
    whole = train(world, tmp_path / "whole", recipe)
    epochs = classifier_train._Training._epoch

    def stopping(self: Any, epoch: int, *rest: Any) -> None:
        if epoch == 2:
            raise KeyboardInterrupt
        epochs(self, epoch, *rest)

    monkeypatch.setattr(classifier_train._Training, "_epoch", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "cut", recipe)
    monkeypatch.undo()
    assert not ClassifierRun.load(tmp_path / "cut").finished
    with pytest.raises(RecipeError, match="holds an unfinished run; resume it, overwrite it"):
        train(world, tmp_path / "cut", recipe)
    with pytest.raises(RecipeError, match="not finished: resume"):
        classify_store(tmp_path / "cut", store=world[0], out=tmp_path / "s.json")
    resumed = train(world, tmp_path / "cut", recipe, resume=True)
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    for name in ("best.safetensors", "classes.json", "features.json", "recipe.yaml"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    best = max(json.loads(json.dumps(torch.load(tmp_path / "cut/resume.pt", weights_only=True)["history"])),
               key=lambda row: (row["map"], row["epoch"]))  # fmt: skip
    assert resumed["best_epoch"] == best["epoch"]


def test_a_finished_run_is_left_alone_and_another_refused(
    world: tuple[Path, Path], trained: Path, tmp_path: Path
) -> None:
    before = (trained / "best.safetensors").stat().st_mtime_ns
    assert train(world, trained, resume=True) == json.loads((trained / "metrics.json").read_text())
    assert (trained / "best.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RecipeError, match="holds a finished run; overwrite it"):
        train(world, trained)
    with pytest.raises(RecipeError, match=r"another recipe: classifier\.width was 8, is 9"):
        train(world, trained, QUICK.model_copy(update={"width": 9}), resume=True)
    with pytest.raises(RecipeError, match="exclude each other"):
        train(world, trained, resume=True, overwrite=True)
    other = tmp_path / "other.json"
    other.write_text(world[1].read_text() + "\n")
    with pytest.raises(RecipeError, match=r"annotations .* are not those"):
        train((world[0], other), trained, resume=True)
    read = read_truth(world[1])
    moved = Truth(read.videos, read.segments.assign(end_s=read.segments["end_s"] + 1.0), path=world[1])
    with pytest.raises(RecipeError, match=r"annotations .* are not those"):
        train((world[0], moved), trained, resume=True)  # type: ignore[arg-type]


def test_other_folders_are_not_touched(world: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    detector = tmp_path / "detector"
    detector.mkdir()
    (detector / "recipe.yaml").write_text("detector: toy\nstreams: [rgb]\n")
    for folder in (tmp_path, detector):
        for options in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(RecipeError, match="not the folder of a classifier's run"):
                train(world, folder, **options)
    assert sorted(path.name for path in detector.iterdir()) == ["recipe.yaml"]
    with pytest.raises(RecipeError, match="no classifier"):
        ClassifierRun.load(detector)
    with pytest.raises(RecipeError, match="tad train-classifier"):
        ClassifierRun.load(tmp_path / "gone")


def test_overwriting(world: tuple[Path, Path], tmp_path: Path) -> None:
    train(world, tmp_path / "run")
    (tmp_path / "run/notes.txt").write_text("mine")
    train(world, tmp_path / "run", QUICK.model_copy(update={"width": 4}), overwrite=True)
    assert ClassifierRun.load(tmp_path / "run").recipe.classifier.width == 4
    assert (tmp_path / "run/notes.txt").read_text() == "mine"


def test_the_recipe_is_whole(trained: Path) -> None:
    run = ClassifierRun.load(trained)
    assert run.recipe.classifier == QUICK
    assert run.recipe.data == DataRecipe(holdout=0.25)
    assert set(load_mapping(trained / "recipe.yaml")) == {"classifier", "streams", "seed", "data"}
    recipe, data = classifier_recipe(["epochs=3", "dilations=[1, 3]", "data.row_spacing=2"])
    assert (recipe.epochs, recipe.dilations, data.row_spacing) == (3, (1, 3), 2)
    for sets, message in ((["epoch=3"], "unknown key 'epoch'.*epochs"), (["data.hold=0"], "unknown key 'hold'"),
                          (["data=3"], "keys of its own"), (["dropout=1"], "dropout")):  # fmt: skip
        with pytest.raises(RecipeError, match=message):
            classifier_recipe(sets)


def test_videos_without_actions_long_videos_and_nothing_held_out(world: tuple[Path, Path], tmp_path: Path) -> None:
    content = json.loads(world[1].read_text())
    for number in range(10):
        content["database"][f"video_{number:03d}"]["annotations"] = []
    for entry in content["database"].values():
        for action in entry["annotations"]:
            action["label"] = "only"
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    metrics = train((world[0], path), tmp_path / "run", data=DataRecipe(holdout=0, max_rows=20, row_spacing=2))
    assert metrics["holdout"] is None
    assert metrics["counts"]["cut_videos"] > 10
    assert np.isfinite(metrics["last_loss"])
    scores = classifier_scores(tmp_path / "run", store=world[0], device="cpu")
    assert scores.shape == (32, 1)
    assert scores["only"].tolist() == [1.0] * 32
    with pytest.raises(RecipeError, match="select=map ranks held-out videos"):
        train((world[0], path), tmp_path / "b", QUICK.model_copy(update={"select": "map"}), data=DataRecipe(holdout=0))


# ---- scores ----------------------------------------------------------------------------------------------------------
def broken_store(world: tuple[Path, Path], folder: Path) -> Path:
    """The world's store, with damage in one video and another video of one row and an odd id."""
    shutil.copytree(world[0], folder / "broken")
    files = (folder / "broken/flow/video_001/features").rglob("*")
    chunk = next(file for file in files if file.is_file() and file.suffix != ".json")
    chunk.write_bytes(chunk.read_bytes()[:-5])
    with open_store(folder / "broken", "a") as store:
        for stream in store.streams():
            level = Level(np.ones((1, 8), np.float16), AXIS)
            store.write(stream, "ü/1 ☃", {"features": level}, duration_s=1.0,
                        source={"name": "u", "size": 1, "mtime_ns": 0})  # fmt: skip
    return folder / "broken"


def test_bad_videos_are_left_out(world: tuple[Path, Path], trained: Path, tmp_path: Path) -> None:
    store = broken_store(world, tmp_path)
    metrics = train((store, world[1]), tmp_path / "run")
    assert metrics["counts"]["broken_videos"] == 1
    assert "video_001" in (tmp_path / "run/failures.jsonl").read_text()
    failures: list[Failure] = []
    videos = ["ü/1 ☃", "video_001", "gone", "video_002", "ü/1 ☃"]
    scores = classifier_scores(trained, store=store, videos=videos, device="cpu", failures=failures)
    assert scores.index.tolist() == ["ü/1 ☃", "video_002"]
    assert [failure.video for failure in failures] == ["video_001", "gone"]
    alone = classifier_scores(trained, store=store, videos=["video_002"], device="cpu")
    assert alone.loc["video_002"].tolist() == scores.loc["video_002"].tolist()


def test_other_features_are_refused(world: tuple[Path, Path], trained: Path, tmp_path: Path) -> None:
    with open_store(tmp_path / "other", "a") as store:
        store.create_stream("rgb", {"made": "otherwise"})
    for wrong in (lambda: classifier_scores(trained, store=tmp_path / "other", device="cpu"),
                  lambda: classify_store(trained, store=tmp_path / "other", out=tmp_path / "s.json")):  # fmt: skip
        with pytest.raises(StoreError, match="has no stream 'flow'"):
            wrong()
    with open_store(tmp_path / "other", "a") as store:
        store.create_stream("flow", {"made": "by hand", "stream": "flow"})
    with pytest.raises(StoreError, match=r"trained on other features.*made was 'by hand', is 'otherwise'"):
        classifier_scores(trained, store=tmp_path / "other", device="cpu")


def test_the_file_of_scores(world: tuple[Path, Path], trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    report = classify_store(trained, store=world[0], out=out, annotations=world[1], subset="validation", device="cpu")
    assert len(report.scores) == 8
    assert report.accuracy is not None
    assert report.accuracy["videos"] == 8
    truth = read_truth(world[1])
    assert report.accuracy["map"] == accuracy(truth.subset("validation").segments, report.scores)["map"]
    assert read_video_scores(out).to_numpy().tolist() == report.scores.to_numpy().tolist()
    assert set(read_scores_about(out)) == {"classifier", "streams"}
    more = classify_store(trained, store=world[0], out=out, annotations=truth, subset="training", device="cpu")
    assert (len(more.scores), more.already) == (24, 8)
    assert len(read_video_scores(out)) == 32
    with pytest.raises(AnnotationError, match="testing"):
        classify_store(trained, store=world[0], out=out, annotations=truth, subset="testing")
    with pytest.raises(RecipeError, match="needs the annotations"):
        classify_store(trained, store=world[0], out=out, subset="validation")

    write_video_scores(out, report.scores)
    with pytest.raises(RecipeError, match="made otherwise"):
        classify_store(trained, store=world[0], out=out)
    again = classify_store(trained, store=world[0], out=out, overwrite=True, device="cpu")
    assert (len(again.scores), again.already, again.accuracy) == (32, 0, None)


def test_runs_that_are_damaged(trained: Path, world: tuple[Path, Path], tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in trained.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    for name, file, text, message in (
        ("a", "classes.json", "[]", "list of names"),
        ("b", "classes.json", "{", "cannot be read"),
        ("c", "features.json", '{"rgb": {}}', "lacks spec"),
        ("d", "recipe.yaml", "classifier: {width: x}\nstreams: [rgb]\n", "classifier.width"),
    ):
        run = copy(name)
        (run / file).write_text(text)
        with pytest.raises(RecipeError, match=message):
            ClassifierRun.load(run)
    run = copy("e")
    (run / "best.safetensors").write_bytes(b"x")
    with pytest.raises(WeightsError, match="damaged"):
        classifier_scores(run, store=world[0])
    (run / "best.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no best\.safetensors"):
        classifier_scores(run, store=world[0])
    run = copy("f")
    (run / "classes.json").write_text('["a", "b"]')
    with pytest.raises(WeightsError, match="does not fit"):
        ClassifierRun.load(run).build()
