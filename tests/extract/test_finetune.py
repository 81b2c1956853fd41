"""Fine-tuning a backbone: that it learns, repeatably, is resumed bit for bit, and what its folder is good for."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from tad.annotations import Truth, read_truth
from tad.errors import AnnotationError, RecipeError, TadError, VideoError, WeightsError
from tad.extract import BACKBONES, build_backbone, extract, load_backbone
from tad.extract.backbones import own
from tad.extract.backbones.base import Backbone
from tad.extract.clip_reading import MemoryReader
from tad.extract.clip_sampling import ClipSampler
from tad.extract.clip_trainer import ClipTrainer, accuracy, judged
from tad.extract.clips import BACKGROUND, ClipFormat, LabelledVideo, labelled, read_frames
from tad.extract.finetune import FinetuneRecipe, finetune, finetune_recipe, resolved, split_videos
from tad.extract.finetune_run import FinetunedRun
from tad.extract.inputs import VideoFile, find_videos
from tad.extract.snippets import SnippetPlan
from tad.extract.video import Geometry
from tad.recipe import ExtractRecipe
from tad.store import open_store
from tad.synth import make_videos
from tad.training.distributed import World
from tad.training.files import read_state, read_weights, write_weights

ROOT = Path(__file__).parents[2]
FORM = ClipFormat(SnippetPlan(16, 1, 4), None, Geometry(32, (32, 32)), None)
ALONE = World(0, 1, torch.device("cpu"))


# ---- accuracy -------------------------------------------------------------------------------------------------------
class Oracle(Backbone):
    """Its features are the pixels of the first frame's first row."""

    spec = build_backbone("tiny").spec

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, clips: Tensor, *, levels: bool = False) -> dict[str, Tensor]:
        return {"features": clips[:, 0, 0, 0]}  # (B, W)

    def normalise(self, clips: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return clips.to(dtype)


def test_accuracy_is_counted_on_the_windows_of_extraction() -> None:
    guess = np.zeros((41, 1, 3, 3), np.uint8)  # one-hot over the three classes, by frame
    truth = np.repeat([0, 1, 0, 2], [10, 10, 6, 8])  # by start, of 41 - 7 starts
    seen = np.repeat([0, 1, 2, 2], [10, 8, 8, 15])  # by frame: 18 and 19 are taken for 2, so are 20 to 25
    guess[np.arange(41), 0, seen] = 255
    video = LabelledVideo("v", Path("v"), 41, 10.0, truth, np.zeros(34, np.int64))
    head = torch.nn.Linear(3, 3)
    torch.nn.init.eye_(head.weight)
    trainer = ClipTrainer(Oracle(), head, FinetuneRecipe(backbone="tiny"), ALONE)
    reader = MemoryReader({0: guess}, Geometry(1, (1, 3)), whole=False)
    scores = judged(trainer, [video], reader, ["a", "b"], offsets=np.arange(8))
    # starts 0, 4, 8 | 12, 16 | 20, 24 | 28, 32: right but for 20 and 24, which are background
    assert scores["clips"] == 9
    assert scores["top1"] == pytest.approx(7 / 9)
    assert scores["background_recall"] == pytest.approx(3 / 5)
    assert scores["recall"] == {"a": 1.0, "b": 1.0}
    assert scores["class_recall"] == 1.0
    assert scores["mean_recall"] == pytest.approx((3 / 5 + 2) / 3)


def test_what_there_is_none_of_is_not_counted() -> None:
    scores = accuracy(np.array([[0, 0, 0], [1, 3, 0], [0, 0, 0]]), ["a", "b"])
    assert (scores["background_recall"], scores["recall"]) == (None, {"a": 0.75, "b": None})
    assert scores["class_recall"] == scores["mean_recall"] == scores["top1"] == 0.75
    assert accuracy(np.zeros((2, 2)), ["a"])["top1"] is None


# ---- training -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight short training videos and three to judge by, of two classes that differ in direction."""
    root = tmp_path_factory.mktemp("videos")
    options = {"duration_s": (8.0, 12.0), "size": (32, 32), "classes": ("bounce", "swing"), "action_s": (1.5, 5.0)}
    make_videos(root, videos=8, subset="training", **options)  # type: ignore[arg-type]
    make_videos(root, videos=3, subset="validation", **options)  # type: ignore[arg-type]
    make_videos(root, videos=1, subset="testing", **options)  # type: ignore[arg-type]
    return root


RECIPE = FinetuneRecipe(
    backbone="tiny", train_subset="training", holdout_subset="validation", epochs=1, steps=60, mirror={}
)
# everything that is drawn at random, on few and small steps
SHORT = RECIPE.model_copy(
    update={"steps": 4, "epochs": 3, "batch": 6, "dropout": 0.4, "jitter": 0.3, "short_side": 40, "random_crop": True}
)


def changed(recipe: FinetuneRecipe, **values: object) -> FinetuneRecipe:
    return recipe.model_copy(update=values)


def trained(made: Path, out: Path, recipe: FinetuneRecipe = RECIPE, **options: object) -> dict[str, Any]:
    given = {"videos": made / "videos", "annotations": made / "annotations.json", "device": "cpu"}
    return finetune(recipe, out=out, **{**given, **options})  # type: ignore[arg-type]


def assert_same_run(one: Path, two: Path, *, atol: float = 0.0) -> None:
    for name in ("backbone", "head"):
        a, b = (read_weights(folder / f"{name}.safetensors") for folder in (one, two))
        assert a.keys() == b.keys()
        for key, value in a.items():
            torch.testing.assert_close(value, b[key], atol=atol, rtol=0)
    rows, others = (list(csv.DictReader((folder / "metrics.csv").read_text().splitlines())) for folder in (one, two))
    assert [float(row["loss"]) for row in rows] == pytest.approx([float(row["loss"]) for row in others], abs=atol)
    assert len(rows) == len(others)
    a, b = (json.loads((folder / "metrics.json").read_text()) for folder in (one, two))
    assert (a["best_epoch"], a["holdout"]) == (b["best_epoch"], b["holdout"])
    assert [row["step"] for row in a["losses"]] == [row["step"] for row in b["losses"]]
    assert [row["loss"] for row in a["losses"]] == pytest.approx([row["loss"] for row in b["losses"]], abs=atol)


@pytest.fixture(scope="module")
def folder(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "tiny"
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    trained(made, out)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's random numbers are left alone
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # type: ignore[arg-type]  # noqa: NPY002
    return out


@pytest.fixture(scope="module")
def short(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("short") / "run"
    trained(made, out, SHORT)
    return out


def test_it_learns_motion(folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    losses = [row["loss"] for row in metrics["losses"]]
    assert metrics["losses"][-1]["step"] == 60
    assert losses[-1] < 0.75 * losses[0]
    assert metrics["classes"] == ["bounce", "swing"]
    assert metrics["counts"] == {"train_videos": 8, "holdout_videos": 3}
    assert metrics["holdout"]["class_recall"] > 0.6  # unseen videos; guessing gives a third
    assert metrics["read"] == "memory"
    assert sorted(path.name for path in folder.iterdir()) == [
        "backbone.safetensors", "classes.json", "env.json", "head.safetensors", "log.txt", "metrics.csv",
        "metrics.json", "recipe.yaml", "resume.pt", "videos.json",
    ]  # fmt: skip
    log = (folder / "log.txt").read_text()
    assert "clips are cut from frames in memory" in log
    assert "epoch 1/1: " in log
    assert "background_recall" in log


def test_the_same_call_gives_the_same_weights(made: Path, short: Path, tmp_path: Path) -> None:
    torch.rand(7)
    trained(made, tmp_path / "again", SHORT)
    weights = (short / "backbone.safetensors").read_bytes()
    assert (tmp_path / "again/backbone.safetensors").read_bytes() == weights
    repeated = finetune_recipe(file=short / "recipe.yaml")
    trained(made, tmp_path / "recipe", repeated)
    assert_same_run(short, tmp_path / "recipe")
    trained(made, tmp_path / "other", changed(SHORT, seed=1))
    assert (tmp_path / "other/backbone.safetensors").read_bytes() != weights


def test_streaming_gives_the_same_weights(made: Path, short: Path, tmp_path: Path) -> None:
    assert trained(made, tmp_path / "stream", changed(SHORT, read="stream", workers=3))["read"] == "stream"
    assert_same_run(short, tmp_path / "stream")  # the pool holds an epoch
    small = changed(SHORT, pool_clips=7)
    trained(made, tmp_path / "a", small)
    trained(made, tmp_path / "b", changed(small, read="stream"))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "a", short)  # another order is another training


def test_streaming_is_chosen_where_memory_would_not_do(made: Path, short: Path, tmp_path: Path) -> None:
    # frames of 11 videos of 40x40 need 6 MB, half of their number 3; a clip needs 49 kB
    metrics = trained(made, tmp_path / "auto", changed(SHORT, max_memory_gb=0.002))
    assert metrics["read"] == "stream"
    assert "clips are streamed from the videos" in (tmp_path / "auto" / "log.txt").read_text()
    assert json.loads((tmp_path / "auto" / "videos.json").read_text())["pool_clips"] == 40
    assert_same_run(short, tmp_path / "auto")
    with pytest.raises(RecipeError, match=r"max_memory_gb=0\.002 .*read=stream"):
        trained(made, tmp_path / "no", changed(SHORT, max_memory_gb=0.002, read="memory"))
    with pytest.raises(RecipeError, match="holds 1 clips, pool_clips is 1 and batch 6"):
        trained(made, tmp_path / "no", changed(SHORT, max_memory_gb=0.00006, read="auto"))
    with pytest.raises(RecipeError, match="holds 40 clips, pool_clips is 41"):
        trained(made, tmp_path / "no", changed(SHORT, max_memory_gb=0.002, pool_clips=41))
    assert not (tmp_path / "no").exists()


def test_headers_that_promise_too_little_do_not_fill_the_memory(
    made: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tad.extract.clip_library._expected_bytes", lambda *_, **__: 0.0)
    assert trained(made, tmp_path / "run", changed(SHORT, max_memory_gb=0.002))["read"] == "stream"
    assert "(reached at " in (tmp_path / "run" / "log.txt").read_text()
    assert_same_run(short, tmp_path / "run")


def test_one_step_equals_plain_torch(made: Path, tmp_path: Path) -> None:
    """An independent reference: plain SGD, written out, on clips that are cut by hand; micro-batches change nothing."""
    recipe = changed(
        RECIPE, steps=2, epochs=1, batch=6, optimizer="sgd", lr=0.1, weight_decay=0.01, warmup_epochs=0.0, clip_norm=0.5
    )
    trained(made, tmp_path / "run", recipe)
    torch.manual_seed(recipe.seed)
    backbone = build_backbone("tiny", weights="random:0")
    torch.manual_seed(recipe.seed)
    head = torch.nn.Linear(128, 3)
    videos, frames = [], []
    truth = read_truth(made / "annotations.json").segments
    for file in find_videos([made / "videos"])[1:9]:
        array, fps = read_frames(file.path, FORM, max_bytes=1e9)
        assert array is not None
        frames.append(array)
        own_segments = truth[truth["video"] == file.video]
        classes = ["bounce", "swing"]
        videos.append(labelled(file.video, file.path, own_segments, classes, frames=len(array), fps=fps, span=16))
    mirror = np.arange(3)
    sampler = ClipSampler(videos, classes=2, offsets=np.arange(16), batch=6, background=0.35, mirror=mirror)
    parameters = [*backbone.parameters(), *head.parameters()]
    momentum = [torch.zeros_like(p) for p in parameters]
    backbone.train()
    for step in range(2):
        clips = sampler.step(step)
        cut = [frames[c.video][c.frames][:, :, :: -1 if c.flipped else 1].copy() for c in clips]
        x = torch.from_numpy(np.stack(cut)).permute(0, 4, 1, 2, 3)
        loss = F.cross_entropy(
            head(backbone(backbone.normalise(x))["features"]), torch.tensor([c.label for c in clips])
        )
        grads = torch.autograd.grad(loss, parameters)
        norm = torch.sqrt(sum((g**2).sum() for g in grads))  # type: ignore[arg-type]
        lr = 0.1 * 0.5 * (1 + np.cos(np.pi * step / 2))
        with torch.no_grad():
            for p, g, m in zip(parameters, grads, momentum, strict=True):
                m.mul_(0.9).add_(g * min(1.0, 0.5 / float(norm)) + 0.01 * p)
                p.sub_(lr * m)
    for name, value in read_weights(tmp_path / "run" / "backbone.safetensors").items():
        torch.testing.assert_close(value, backbone.state_dict()[name], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(read_weights(tmp_path / "run" / "head.safetensors")["weight"], head.weight.detach())


def test_micro_batches_sum_to_the_batch() -> None:
    """Without batch norm the gradient of a batch is that of its parts, whatever their size, unread clips aside."""
    clips = [np.arange(9, dtype=np.uint8).reshape(1, 1, 3, 3) * (7 * k % 5) for k in range(5)]

    def after(micro: int | None, some: Sequence[np.ndarray | None], batch: int) -> Tensor:
        torch.manual_seed(0)
        head = torch.nn.Linear(3, 3)
        recipe = FinetuneRecipe(backbone="tiny", batch=batch, micro_batch=micro, optimizer="sgd", lr=1e-3)
        trainer = ClipTrainer(Oracle(), head, recipe, ALONE)
        trainer.step(some, [0, 1, 2, 1, 0][: len(some)])
        return head.weight.detach()

    whole = after(None, clips, 5)
    for micro in (1, 2, 3, 7):
        torch.testing.assert_close(after(micro, clips, 5), whole)
    assert not torch.allclose(after(None, [*clips[:4], None], 5), whole)
    torch.testing.assert_close(after(2, [*clips[:4], None], 4), after(None, clips[:4], 4))


@pytest.mark.parametrize("reads", [["stream"], pytest.param(["memory", "stream"], marks=pytest.mark.slow)])
def test_two_processes_equal_one(made: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun with gloo. Batch norms see a process's own clips only, so the network has group norms here.

    Each process holds its own videos alone; a step may leave it without a clip.
    """
    code = f"""
import sys, torch
from tests.extract import test_finetune as t
from pathlib import Path
torch.set_num_threads(1)
t.trained(Path({str(made)!r}), Path(sys.argv[1]), t.changed(t.UNNORMED, read=sys.argv[2]))
"""
    script = tmp_path / "train.py"
    script.write_text(PLAIN + code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for read in reads:
        out = tmp_path / read
        done = subprocess.run(
            [*torchrun, str(out), read], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert json.loads((out / "env.json").read_text())["processes"] == 2
        assert (out / "log.txt").read_text().count("epoch 1/2") == 1  # one of them writes
        assert len(read_state(out / "resume.pt")["by_process"]) == 2
    monkeypatch.setattr(torch.nn, "BatchNorm3d", lambda channels: torch.nn.GroupNorm(1, channels))
    trained(made, tmp_path / "one", UNNORMED)
    for read in reads:
        assert_same_run(tmp_path / "one", tmp_path / read, atol=1e-4)


UNNORMED = changed(SHORT, epochs=2, steps=3, batch=4, dropout=0.0, optimizer="sgd", lr=1e-3)
PLAIN = """
import torch
torch.nn.BatchNorm3d = lambda channels: torch.nn.GroupNorm(1, channels)
"""


# ---- resume ---------------------------------------------------------------------------------------------------------
@contextmanager
def stopping(total: float, label: str, unit: str, *, after: int = 1) -> Iterator[Any]:
    class Bar:
        left = after if label.startswith("train") else 10**9

        def advance(self, n: float = 1.0, note: str = "") -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    yield Bar()


def stop_after(steps: int) -> Any:
    return lambda total, label, unit: stopping(total, label, unit, after=steps)


# in the first epoch, at its end, in the second, at the very end
@pytest.mark.parametrize(
    ("steps", "read"), [(2, "memory"), (4, "memory"), (7, "stream"), (7, "memory"), (12, "stream")]
)
def test_a_stopped_training_goes_on_bit_for_bit(made: Path, short: Path, tmp_path: Path, steps: int, read: str) -> None:
    recipe = changed(SHORT, read=read, save_steps=1 if steps == 7 else 500)
    with pytest.raises(KeyboardInterrupt):
        trained(made, tmp_path, recipe, progress=stop_after(steps))
    assert not (tmp_path / "metrics.json").exists()
    trained(made, tmp_path, recipe, resume=True)
    assert_same_run(short, tmp_path)
    if steps == 7:
        assert "resumed in epoch 2, after 3 of its steps" in (tmp_path / "log.txt").read_text()


def test_a_killed_training_goes_on_bit_for_bit(made: Path, short: Path, tmp_path: Path) -> None:
    """A process that is killed in the middle of a step, as by the machine; how it reads may change meanwhile."""
    code = f"""
import sys, time, torch
from pathlib import Path
from tests.extract import test_finetune as t
from tad.extract.clip_trainer import ClipTrainer
torch.set_num_threads(1)
step, calls = ClipTrainer.step, []
def waiting(self, *args):
    calls.append(1)
    if len(calls) == 7:
        Path({str(tmp_path / "here")!r}).touch()
        time.sleep(600)
    step(self, *args)
ClipTrainer.step = waiting
recipe = t.changed(t.SHORT, read="stream", save_steps=2, pool_clips=24)
t.trained(Path({str(made)!r}), Path({str(tmp_path / "run")!r}), recipe)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    )
    try:
        for _ in range(600):
            if (tmp_path / "here").exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert process.poll() is None, process.stderr.read().decode()  # type: ignore[union-attr]
    finally:
        process.kill()
        process.communicate()
    assert read_state(tmp_path / "run" / "resume.pt")["step_in_epoch"] == 2  # of the second epoch
    trained(made, tmp_path / "run", changed(SHORT, pool_clips=24, workers=1), resume=True)
    assert_same_run(short, tmp_path / "run")


def test_resume_goes_on_with_the_pool_that_it_began_with(made: Path, tmp_path: Path) -> None:
    """With memory that holds 7 clips an order of its own was begun; more memory must not change it."""
    little = changed(SHORT, read="stream", max_memory_gb=7.5 * 16 * 32 * 32 * 3 / 1e9)
    trained(made, tmp_path / "whole", little)
    with pytest.raises(KeyboardInterrupt):
        trained(made, tmp_path / "parts", little, progress=stop_after(6))
    trained(made, tmp_path / "parts", changed(SHORT, read="memory"), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_training_is_left_alone_or_replaced_only_when_told(made: Path, short: Path, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in short.iterdir()}
    metrics = trained(made, short, SHORT, resume=True)
    assert metrics == json.loads((short / "metrics.json").read_text())
    with pytest.raises(RecipeError, match="holds a finished run: resume it, overwrite it"):
        trained(made, short, SHORT)
    with pytest.raises(RecipeError, match=r"another recipe: lr was 0\.002, is 0\.001\. Give"):
        trained(made, short, changed(SHORT, lr=1e-3), resume=True)
    with pytest.raises(RecipeError, match="other annotations or videos"):
        trained(made, short, SHORT, resume=True, videos=sorted((made / "videos").glob("*"))[2:])
    with pytest.raises(RecipeError, match="is not the folder of a run"):
        trained(made, made, SHORT, overwrite=True)
    assert {path.name: path.stat().st_mtime_ns for path in short.iterdir()} == before


def test_overwrite_replaces_once_the_new_one_can_begin(made: Path, tmp_path: Path) -> None:
    little = changed(SHORT, epochs=1, steps=2)
    trained(made, tmp_path, little)
    once = (tmp_path / "backbone.safetensors").read_bytes()
    with pytest.raises(RecipeError, match="Did you mean 'swing'"):
        trained(made, tmp_path, changed(little, mirror={"swign": None}), overwrite=True)
    assert (tmp_path / "backbone.safetensors").read_bytes() == once  # a slip of the pen costs nothing
    other = changed(little, lr=1e-2)
    trained(made, tmp_path, other, resume=True, overwrite=True)
    assert (tmp_path / "backbone.safetensors").read_bytes() != once
    stamp = (tmp_path / "metrics.json").stat().st_mtime_ns
    trained(made, tmp_path, other, resume=True, overwrite=True)
    assert (tmp_path / "metrics.json").stat().st_mtime_ns == stamp
    (tmp_path / "env.json").write_text("{}")
    with pytest.raises(RecipeError, match="does not hold the run of a backbone"):
        trained(made, tmp_path, other, resume=True)


# ---- what is chosen -------------------------------------------------------------------------------------------------
def test_the_best_epoch_is_kept_and_of_equals_the_later(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter([0.5, 0.9, 0.9, 0.7] * 2)
    monkeypatch.setattr(
        "tad.extract.finetune_loop.judged",
        lambda *_, **__: {"top1": 0.1, "mean_recall": next(told), "recall": {}, "clips": 1},
    )
    recipe = changed(SHORT, epochs=4, steps=1)
    assert trained(made, tmp_path / "run", recipe)["best_epoch"] == 3
    kept = (tmp_path / "run" / "backbone.safetensors").read_bytes()
    with safe_open(str(tmp_path / "run" / "backbone.safetensors"), "pt") as file:
        assert json.loads(file.metadata()["tad"])["epoch"] == 3
    assert trained(made, tmp_path / "last", changed(recipe, select="last"))["best_epoch"] == 4
    assert (tmp_path / "last" / "backbone.safetensors").read_bytes() != kept
    assert trained(made, tmp_path / "none", changed(recipe, holdout_subset=None, holdout=0.0))["best_epoch"] == 4


def test_extraction_reads_the_weights_and_sees_what_was_trained_on(made: Path, folder: Path, tmp_path: Path) -> None:
    checkpoint = str(folder / "backbone.safetensors")
    with safe_open(checkpoint, "pt") as file:
        about = json.loads(file.metadata()["tad"])
    assert about["classes"] == ["bounce", "swing"]
    assert (about["backbone"], about["recipe"]["window"], about["recipe"]["steps"]) == ("tiny", 16, 60)
    backbone = load_backbone(checkpoint)
    assert not backbone.training
    files = find_videos([made / "videos"])[:2]
    extract(
        [f.path for f in files], store=tmp_path / "s.zarr", recipes=ExtractRecipe(backbone="tiny", weights=checkpoint)
    )
    with open_store(tmp_path / "s.zarr") as store, torch.inference_mode():
        for file in files:
            frames, _ = read_frames(file.path, FORM, max_bytes=1e9)
            assert frames is not None
            rows = store["tiny", file.video].numpy()
            whole = [frames[start : start + 16] for start in range(0, len(frames) - 15, 4)]
            windows = torch.from_numpy(np.stack(whole)).permute(0, 4, 1, 2, 3)
            expected = backbone(backbone.normalise(windows))["features"].numpy()
            np.testing.assert_allclose(rows[: len(whole)], expected, atol=1e-4)
            assert len(rows) - len(whole) <= 1  # extraction repeats the end for one more


def test_the_head_gives_the_accuracy_that_was_reported(made: Path, folder: Path) -> None:
    run = FinetunedRun.load(folder)
    assert run.form == FORM
    assert run.classes == ["bounce", "swing"]
    truth = read_truth(made / "annotations.json").segments
    right = total = 0
    for file in (f for f in find_videos([made / "videos"]) if f.video.startswith("validation")):
        frames, fps = read_frames(file.path, FORM, max_bytes=1e9)
        assert frames is not None
        mine = truth[truth["video"] == file.video]
        labels = labelled(file.video, file.path, mine, run.classes, frames=len(frames), fps=fps, span=16).labels
        with torch.inference_mode():
            for start in range(0, len(labels), 4):
                clip = torch.from_numpy(frames[start : start + 16]).permute(3, 0, 1, 2)[None]
                guess = run.head(run.backbone(run.backbone.normalise(clip))["features"]).argmax()
                right, total = right + int(guess == labels[start]), total + 1
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["holdout"]["clips"] == total
    assert metrics["holdout"]["top1"] == pytest.approx(right / total)
    assert run.head.weight.shape[0] == 3
    assert BACKGROUND == 0


def test_a_folder_that_is_no_run_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"has no recipe\.yaml: is it the folder of 'tad train-backbone'"):
        FinetunedRun.load(tmp_path)
    for name in ("recipe.yaml", "classes.json", "backbone.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(WeightsError, match="no epoch was finished yet"):
        FinetunedRun.load(tmp_path)
    (tmp_path / "head.safetensors").write_bytes((folder / "head.safetensors").read_bytes())
    assert FinetunedRun.load(tmp_path).classes == ["bounce", "swing"]
    (tmp_path / "classes.json").write_text('["bounce"]')
    with pytest.raises(WeightsError, match="does not fit 1 classes"):
        FinetunedRun.load(tmp_path)
    write_weights(
        tmp_path / "backbone.safetensors",
        build_backbone("tiny", "random").state_dict(),
        network=own.described(build_backbone("tiny", "random")),
    )
    with pytest.raises(WeightsError, match=r"another backbone\.safetensors"):
        FinetunedRun.load(tmp_path)


@pytest.mark.parametrize("name", ["r2plus1d-18", "tiny-flow", "i3d-flow"])
def test_a_file_of_ours_says_what_network_it_is(name: str, tmp_path: Path) -> None:
    """Not all of our names of tensors are those of a public file, and normalisation may be the first checkpoint's."""
    backbone = build_backbone(name, weights="random:1", port="hassony" if name == "i3d-flow" else None)
    backbone.spec = replace(backbone.spec, mean=tuple(0.25 for _ in backbone.spec.mean))
    path = tmp_path / "w.safetensors"
    write_weights(path, backbone.state_dict(), network=own.described(backbone))
    for again in (load_backbone(path), build_backbone(name, weights=path)):
        assert again.spec == backbone.spec
        assert again.variant == backbone.variant
        assert type(again) is type(backbone)
        for key, value in backbone.state_dict().items():
            assert torch.equal(again.state_dict()[key], value)
    with pytest.raises(WeightsError, match=f"holds {name}, not tiny$"):
        build_backbone("tiny", weights=path)


def test_files_of_ours_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    backbone = build_backbone("tiny", "random")
    good = own.described(backbone)
    path = tmp_path / "w.safetensors"
    for network, message in (
        ({"arguments": {}}, "malformed"),
        ({**good, "spec": {**good["spec"], "name": "huge"}}, "holds huge, which this tad does not know"),
        ({**good, "arguments": {"depth": 3}}, "tiny cannot be built as the file says"),
        ({**good, "arguments": {"channels": [1, 2, 3, 4]}}, "does not fit Tiny3D"),
    ):
        write_weights(path, backbone.state_dict(), network=network)
        with pytest.raises(WeightsError, match=message):
            load_backbone(path)
    with pytest.raises(WeightsError, match="was not made by build_backbone"):
        own.described(Oracle())


def test_every_backbone_is_called_as_its_spec() -> None:
    assert all(entry.spec.name == name for name, entry in BACKBONES.items())


# ---- failures -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("read", ["memory", "stream"])
def test_one_broken_video_is_listed_and_the_rest_is_used(made: Path, tmp_path: Path, read: str) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for path in (made / "videos").iterdir():
        broken = path.stem in ("training-003", "validation-001")
        (videos / path.name).write_bytes(b"no video" * 50 if broken else path.read_bytes())
    little = changed(RECIPE, steps=2, read=read)
    metrics = trained(made, tmp_path / "out", little, videos=videos)
    assert metrics["counts"] == {"train_videos": 7, "holdout_videos": 2}
    assert [failure["video"] for failure in metrics["failures"]] == ["training-003", "validation-001"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert lines == metrics["failures"]
    assert "left out: training-003: " in (tmp_path / "out" / "log.txt").read_text()
    for path in videos.iterdir():
        path.write_bytes(b"no video" * 50)
    with pytest.raises(VideoError, match="not one of the 8 training videos"):
        trained(made, tmp_path / "none", little, videos=videos)


def test_a_loss_that_is_not_finite_stops_it(made: Path, tmp_path: Path) -> None:
    with pytest.raises(TadError, match=r"epoch 1, step \d+: the loss is nan.*lower lr than 1e\+30"):
        trained(made, tmp_path, changed(RECIPE, lr=1e30, warmup_epochs=0.0))
    assert "stopped: " in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "metrics.json").exists()


def test_half_precision(made: Path, tmp_path: Path) -> None:
    metrics = trained(made, tmp_path / "bf16", changed(RECIPE, steps=10, batch=8, precision="bf16"))
    assert metrics["losses"][-1]["loss"] < metrics["losses"][0]["loss"]
    with pytest.raises(RecipeError, match="fp16 needs a CUDA device; take bf16"):
        trained(made, tmp_path / "fp16", changed(RECIPE, precision="fp16"))


@pytest.mark.gpu
def test_fp16_trains_and_resumes_on_cuda(made: Path, tmp_path: Path) -> None:
    recipe = changed(RECIPE, precision="fp16", epochs=2, steps=30, read="stream", clip_norm=5.0)
    with pytest.raises(KeyboardInterrupt):
        trained(made, tmp_path, recipe, device="cuda", progress=stop_after(40))
    metrics = trained(made, tmp_path, recipe, device="cuda", resume=True)
    assert metrics["losses"][-1]["loss"] < 0.85 * metrics["losses"][0]["loss"]


# ---- recipes and splits ---------------------------------------------------------------------------------------------
def fake(*names: str) -> dict[str, VideoFile]:
    return {name: VideoFile(name, Path(f"{name}.mp4")) for name in names}


def truth_of(made: Path) -> Truth:
    return read_truth(made / "annotations.json")


def test_held_out_videos_are_disjoint_and_stay_when_others_join(made: Path) -> None:
    truth = truth_of(made)
    ids = [f"training-{k:03d}" for k in range(8)]
    recipe = FinetuneRecipe(backbone="tiny", train_subset="train", holdout=0.25)
    train, held = split_videos(recipe, truth, fake(*ids, "stranger"))
    assert sorted(train + held) == ids
    assert len(held) == 2
    fewer = split_videos(recipe, truth, fake(*(video for video in ids if video != train[0])))[1]
    assert set(fewer) <= {*held, *train}
    assert len(set(fewer) & set(held)) >= 1
    assert split_videos(recipe, truth, fake(*reversed(ids))) == (train, held)
    assert split_videos(recipe.model_copy(update={"holdout": 0.0}), truth, fake(*ids)) == (ids, [])


def test_subsets_choose_the_videos(made: Path) -> None:
    truth, files = truth_of(made), fake("training-000", "training-001", "validation-002", "testing-000")
    assert split_videos(RECIPE, truth, files) == (["training-000", "training-001"], ["validation-002"])
    whole = FinetuneRecipe(backbone="tiny", holdout_subset="testing")
    assert split_videos(whole, truth, files)[0] == ["training-000", "training-001", "validation-002"]
    with pytest.raises(RecipeError, match="shares videos"):
        split_videos(RECIPE.model_copy(update={"holdout_subset": "train"}), truth, files)
    with pytest.raises(AnnotationError, match=r"such as training-000"):
        split_videos(RECIPE, truth, fake("clip"))


def test_recipes_come_from_names_files_and_settings(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("backbone: tiny\nsteps: 5\nfps: native\n")
    assert finetune_recipe(file=path, sets=["lr=1e-2"], seed=4) == FinetuneRecipe(
        backbone="tiny", steps=5, lr=0.01, seed=4, fps="native"
    )
    mirrored = finetune_recipe("tiny", sets=["mirror={a: b, b: a, c: null}"])
    assert mirrored.mirror == {"a": "b", "b": "a", "c": None}
    for options, message in (
        ({"name": "tiny", "sets": ["step=5"]}, "Did you mean 'steps'"),
        ({"name": "tiny-flow", "file": path}, "leave one of them out"),
        ({}, "backbone"),
    ):
        with pytest.raises(RecipeError, match=message):
            finetune_recipe(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flow": "dis"}, "reads RGB"),
        ({"backbone": "tyny"}, "Did you mean 'tiny'"),
        ({"mirror": {"swing": "swign"}}, "Did you mean 'swing'"),
    ],
)
def test_what_the_backbone_does_not_admit_is_refused(
    made: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        trained(made, tmp_path, RECIPE.model_copy(update=change))


def test_what_the_spec_declares_is_honoured() -> None:
    backbone = Oracle()
    recipe = FinetuneRecipe(backbone="tiny", weights="random")
    filled, form = resolved(recipe, backbone)
    assert (filled.window, filled.interval, filled.fps, filled.crop) == (16, 1, "native", (32, 32))
    assert filled.warmup_epochs == 2.0
    assert form == FORM
    backbone.spec = replace(backbone.spec, any_size=False, any_length=False, min_frames=9, grid_fps=15.0)
    filled, form = resolved(recipe, backbone)
    assert (filled.fps, form.fps) == (15.0, 15.0)
    assert resolved(changed(recipe, fps="native"), backbone)[1].fps is None
    for change, message in (
        ({"window": 8}, "at least 9 frames"),
        ({"window": 20}, "windows of 16 frames only, got window=20"),
        ({"crop": (32, 40)}, "32x32 only"),
        ({"warmup_epochs": 20.0}, "leaves nothing of epochs=20"),
    ):
        with pytest.raises(RecipeError, match=message):
            resolved(changed(recipe, **change), backbone)
    assert not backbone.interpolate_positions
    other = changed(recipe, window=20, crop=(32, 40), interpolate_positions=True)
    assert resolved(other, backbone)[1].geometry.crop == (32, 40)
    assert backbone.interpolate_positions
    backbone.spec = replace(backbone.spec, any_size=True, resize=(36, 44))
    filled, form = resolved(recipe, backbone)
    assert form.geometry == Geometry(32, (32, 32), (36, 44))
    assert resolved(filled, backbone)[1] == form  # the filled recipe means the same
    assert resolved(changed(recipe, crop=(32, 32)), backbone)[1].geometry.resize is None


TABLE_1 = {  # optimizer, learning rate, weight decay, warm-up epochs, epochs, dropout, frames, interval
    "slowfast-r101": ("sgd", 0.02, 1e-7, 5, 50, 0.5, 32, 2),
    "csn-152": ("adamw", 1e-4, 1e-4, 8, 30, 0.0, 32, 2),
    "vivit-b": ("adamw", 1e-5, 0.1, 2.5, 30, 0.5, 32, 2),
    "timesformer-b": ("sgd", 0.004, 1e-4, 1, 15, 0.5, 8, 32),
}


def test_the_recipes_are_those_of_the_paper() -> None:
    assert {path.stem for path in (ROOT / "recipes" / "backbones").glob("*.yaml")} == set(TABLE_1)
    for name, row in TABLE_1.items():
        recipe = finetune_recipe(file=ROOT / "recipes" / "backbones" / f"{name}.yaml")
        given = (
            recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.warmup_epochs, recipe.epochs, recipe.dropout,
            recipe.window, recipe.interval,
        )  # fmt: skip
        assert given == row
        assert (recipe.batch, recipe.schedule, recipe.crop, recipe.mirror) == (256, "cosine", (224, 224), {})
        backbone = Oracle()
        backbone.spec = BACKBONES[recipe.backbone].spec
        assert resolved(recipe, backbone)[1].fps == 30


def test_a_video_that_breaks_while_it_is_streamed_does_not_stop_the_training(made: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for path in (made / "videos").iterdir():
        (videos / path.name).write_bytes(path.read_bytes())

    class Breaking:
        """Once training begins, one file is no video any more."""

        def advance(self, n: float = 1.0, note: str = "") -> None:
            if note.startswith("epoch 1/"):
                for name in ("training-002", "validation-000"):
                    (videos / f"{name}.mp4").write_bytes(b"no video" * 50)

    @contextmanager
    def show(total: float, label: str, unit: str) -> Iterator[Breaking]:
        yield Breaking()

    recipe = changed(SHORT, read="stream", pool_clips=6, epochs=4)
    metrics = trained(made, tmp_path / "run", recipe, videos=videos, progress=show)
    assert metrics["epochs"] == 4
    assert {failure["video"] for failure in metrics["failures"]} == {"training-002", "validation-000"}
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    assert all(0 < float(row["loss"]) < 10 for row in rows)
    assert 0 < int(rows[-1]["clips"]) < 71  # judged on what can still be read
