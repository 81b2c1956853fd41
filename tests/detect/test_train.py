"""The trainer: goes on bit for bit after any stop, counts every video alike however they are spread, names errors."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tad.annotations import Truth, read_truth
from tad.detect import Run, detect, train_detector
from tad.detect.data import epoch_steps
from tad.detect.runs import read_state, read_weights
from tad.detect.train import outcome
from tad.errors import RecipeError, StoreError, TadError
from tad.evaluate import detection_map
from tad.recipe import DetectRecipe, TrainRecipe, load_mapping, validated
from tad.store import Level, open_store
from tad.training.optim import AveragedWeights, build_optimizer, lr_factor
from tests.detect.toydetector import AXIS, Toy, make_world, toy_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.set_num_threads(1)
    return make_world(tmp_path_factory.mktemp("world"))


def train(world: tuple[Path, Path], out: Path, recipe: DetectRecipe | None = None, **options: Any) -> dict[str, Any]:
    return train_detector(
        recipe or toy_recipe(), store=world[0], annotations=world[1], out=out, device="cpu", **options
    )


def rows_of(run: Path) -> list[dict[str, str]]:
    """metrics.csv without the times."""
    with open(run / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def assert_same_run(a: Path, b: Path, *, atol: float = 0.0) -> None:
    for name in ("best.safetensors", "last.safetensors"):
        one, other = read_weights(a / name), read_weights(b / name)
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]) if atol == 0 else torch.allclose(value, other[key], rtol=0, atol=atol)
    if atol == 0:
        assert rows_of(a) == rows_of(b)


class Stop(Exception):
    """Stands for anything that ends a process in the middle of an epoch."""


def stopping(after: int, error: type[BaseException] = Stop) -> Any:
    """A progress that ends the training after so many optimizer steps."""

    @contextmanager
    def factory(total: float, label: str, unit: str) -> Iterator[Any]:
        yield Bar(label)

    class Bar:
        def __init__(self, label: str) -> None:
            self.label, self.steps = label, 0

        def advance(self, n: float = 1.0, note: str = "") -> None:
            self.steps += self.label == "train"
            if self.steps >= after:
                raise error

    return factory


# ---- stop and go on --------------------------------------------------------------------------------------------
# 3 steps an epoch: stopped in the first, at its end, in the second, in the third
@pytest.mark.parametrize(("after", "cached"), [(1, True), (3, False), (5, False), (8, True)])
def test_a_resumed_training_ends_with_the_very_same_weights(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, cached: bool
) -> None:
    if not cached:
        monkeypatch.setattr("tad.detect.preflight.CACHE_BYTES", 0)
    recipe = toy_recipe(
        train={"epochs": 4, "schedule": "cosine", "warmup_epochs": 0.5, "optimizer": "adamw", "weight_decay": 0.1},
        data={"max_rows": 30},
    )
    train(world, tmp_path / "whole", recipe)
    with pytest.raises(Stop):
        train(world, tmp_path / "parts", recipe, progress=stopping(after))
    torch.manual_seed(99)  # whatever happened in between
    np.random.default_rng().random()
    metrics = train(world, tmp_path / "parts", recipe, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert metrics["best_epoch"] == json.loads((tmp_path / "whole" / "metrics.json").read_text())["best_epoch"]


def test_without_the_saved_state_the_weights_would_differ(world: tuple[Path, Path], tmp_path: Path) -> None:
    """That the test above can fail: dropout draws from the generator whose state is saved."""
    train(world, tmp_path / "whole")
    with pytest.raises(Stop):
        train(world, tmp_path / "parts", progress=stopping(4))
    state = read_state(tmp_path / "parts" / "resume.pt")
    torch.manual_seed(1234)
    state["random"][0]["torch"] = torch.get_rng_state()
    torch.save(state, tmp_path / "parts" / "resume.pt")
    train(world, tmp_path / "parts", resume=True)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_training_killed_in_an_epoch_goes_on(world: tuple[Path, Path], tmp_path: Path) -> None:
    """A real process, killed with SIGKILL while it trains the third epoch; another one, this, resumes."""
    marker = tmp_path / "in the third epoch"
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "tests.detect.toydetector", *map(str, world), str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOY_STOP": f"8:{marker}"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert marker.exists(), process.stderr.read().decode() if process.stderr else ""
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (run / "metrics.json").exists()
    assert [row["epoch"] for row in rows_of(run)] == ["1", "2"]
    assert Run.load(run).build("last") is not None  # what is there is usable
    train(world, run, resume=True)
    train(world, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", run)


def test_an_interrupt_is_raised_through_and_logged(world: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "run", progress=stopping(4, KeyboardInterrupt))
    assert "interrupted in epoch 2; resume goes on from its beginning" in (tmp_path / "run" / "log.txt").read_text()
    train(world, tmp_path / "run", resume=True)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "resumed after epoch 1" in log
    assert "finished" in log


def test_resume_where_nothing_is_begins(world: tuple[Path, Path], tmp_path: Path) -> None:
    train(world, tmp_path / "run", resume=True)
    train(world, tmp_path / "other")
    assert_same_run(tmp_path / "run", tmp_path / "other")


def test_a_finished_run_is_left_alone(
    world: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = train(world, tmp_path / "run")
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "run").iterdir()}
    caplog.set_level("INFO", logger="tad.detect")
    assert train(world, tmp_path / "run", resume=True) == metrics
    assert "is finished, there is nothing to resume" in caplog.text
    with pytest.raises(RecipeError, match="holds a finished run; overwrite it"):
        train(world, tmp_path / "run")
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "run").iterdir()} == before


def test_resume_refuses_another_recipe_by_name(world: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(world, tmp_path / "run", progress=stopping(4))
    with pytest.raises(RecipeError, match=r"another recipe: seed was 3, is 4; train\.epochs was 4, is 9\. Give"):
        train(world, tmp_path / "run", toy_recipe(seed=4, train={"epochs": 9}), resume=True)
    stored = validated(DetectRecipe, load_mapping(tmp_path / "run" / "recipe.yaml"), where="recipe")
    workers = stored.model_copy(update={"data": stored.data.model_copy(update={"workers": 1})})
    train(world, tmp_path / "run", workers, resume=True)  # touches nothing but speed


def test_resume_refuses_other_data(world: tuple[Path, Path], tmp_path: Path) -> None:
    own = make_world(tmp_path)
    with pytest.raises(Stop):
        train(own, tmp_path / "run", progress=stopping(4))
    state = read_state(tmp_path / "run" / "resume.pt")
    with open_store(own[0], "a") as store:
        feature = store["rgb", state["train"][0]]
        kept = Level(feature.numpy(), feature.axis), feature.duration_s, feature.attrs["source"]
        store.delete("rgb", state["train"][0])
    with pytest.raises(StoreError, match=f"train: new none; gone '{state['train'][0]}'|holdout: new"):
        train(own, tmp_path / "run", resume=True)
    with open_store(own[0], "a") as store:
        store.write("rgb", state["train"][0], {"features": kept[0]}, duration_s=kept[1], source=kept[2])
    text = own[1].read_text()
    own[1].write_text(text.replace("planted", "edited"))
    with pytest.raises(RecipeError, match=r"annotations .*annotations\.json are not those"):
        train(own, tmp_path / "run", resume=True)
    own[1].write_text(text)
    with open_store(tmp_path / "other.zarr", "a") as store:
        for stream in ("rgb", "flow"):
            store.create_stream(stream, {"made": "otherwise", "stream": stream})
    with pytest.raises(StoreError, match="made was 'by hand', is 'otherwise'"):
        train((tmp_path / "other.zarr", own[1]), tmp_path / "run", resume=True)
    train(own, tmp_path / "run", resume=True)


def test_resume_refuses_another_truth_made_in_memory(world: tuple[Path, Path], tmp_path: Path) -> None:
    read, run = read_truth(world[1]), tmp_path / "run"
    made = Truth(read.videos, read.segments)
    recipe = toy_recipe(train={"epochs": 1})
    metrics = train((world[0], made), run, recipe)  # type: ignore[arg-type]
    moved = Truth(read.videos, read.segments.assign(end_s=read.segments["end_s"] + 1e-9))
    smaller = Truth(read.videos.assign(subset=read.videos["subset"].iloc[::-1].to_numpy()), read.segments)
    for other in (moved, smaller):
        with pytest.raises(RecipeError, match=r"annotations \(made in memory\) are not those"):
            train((world[0], other), run, recipe, resume=True)  # type: ignore[arg-type]
    again = Truth(read.videos.copy(), read.segments[read.segments.columns[::-1]])  # the order of columns says nothing
    assert train((world[0], again), run, recipe, resume=True) == metrics  # type: ignore[arg-type]
    env = json.loads((run / "env.json").read_text())
    del env["annotations"]["tables_sha256"]  # as an earlier version began it
    (run / "env.json").write_text(json.dumps(env))
    assert train((world[0], moved), run, recipe, resume=True) == metrics  # type: ignore[arg-type]
    changed = Truth(moved.videos, moved.segments, path=world[1])
    train((world[0], read), tmp_path / "file", recipe)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="are not those"):
        train((world[0], changed), tmp_path / "file", recipe, resume=True)  # type: ignore[arg-type]


def test_overwrite_replaces_a_run_once_the_new_one_can_begin(world: tuple[Path, Path], tmp_path: Path) -> None:
    train(world, tmp_path / "run")
    with pytest.raises(StoreError, match="no stream 'depth'"):
        train(world, tmp_path / "run", toy_recipe(streams=["depth"]), overwrite=True)
    assert Run.load(tmp_path / "run").finished  # a slip of the pen costs nothing
    train(world, tmp_path / "run", toy_recipe(seed=7), overwrite=True)
    train(world, tmp_path / "fresh", toy_recipe(seed=7))
    assert_same_run(tmp_path / "run", tmp_path / "fresh")
    assert len((tmp_path / "run" / "log.txt").read_text().splitlines()) == len(
        (tmp_path / "fresh" / "log.txt").read_text().splitlines()
    )


# ---- every video counts the same -------------------------------------------------------------------------------
def plain(**changes: Any) -> DetectRecipe:
    return toy_recipe(model={"norm": True}, **changes)


def test_accumulated_batches_equal_large_ones(world: tuple[Path, Path], tmp_path: Path) -> None:
    train(world, tmp_path / "large", plain(train={"batch_videos": 4, "optimizer": "sgd"}))
    train(world, tmp_path / "small", plain(train={"batch_videos": 2, "accumulate": 2, "optimizer": "sgd"}))
    assert_same_run(tmp_path / "large", tmp_path / "small", atol=1e-6)


def test_two_processes_equal_one(world: tuple[Path, Path], tmp_path: Path) -> None:
    """torchrun with gloo; 9 videos in batches of 4 leave the second process without a video in the last batch."""
    changes = {"train": {"batch_videos": 4, "optimizer": "sgd", "clip_norm": 0.5, "epochs": 3}, "model": {"norm": True}}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command = [*torchrun, "tests.detect.toydetector", *map(str, world), str(tmp_path / "two"), json.dumps(changes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    train(world, tmp_path / "one", toy_recipe(**changes))
    assert_same_run(tmp_path / "one", tmp_path / "two", atol=1e-5)
    for one, two in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        assert {k: float(v) for k, v in two.items()} == pytest.approx({k: float(v) for k, v in one.items()}, abs=1e-5)
    assert json.loads((tmp_path / "two" / "env.json").read_text())["processes"] == 2
    assert len(read_state(tmp_path / "two" / "resume.pt")["random"]) == 2
    assert (tmp_path / "two" / "log.txt").read_text().count("epoch 1/3") == 1  # one of them writes


def test_one_step_equals_plain_torch(world: tuple[Path, Path], tmp_path: Path) -> None:
    """An independent reference: the whole training set in one batch, plain SGD, written out."""
    recipe = plain(train={"epochs": 2, "batch_videos": 9, "optimizer": "sgd", "lr": 0.1, "ema": None, "select": "last"})
    train(world, tmp_path / "run", recipe)
    run = Run.load(tmp_path / "run")
    state = read_state(tmp_path / "run" / "resume.pt")
    from tad.training.rng import seed_all

    seed_all(recipe.seed)
    model = Toy(channels=run.channels, classes=3, norm=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    truth = read_truth(world[1])
    for _ in range(2):
        total: Tensor = torch.zeros(())
        with open_store(world[0]) as store:
            for video in state["train"]:
                x = torch.cat([torch.from_numpy(store[s, video].numpy()).float().T for s in ("rgb", "flow")])[None]
                logits = model.logits(model.norm(torch.relu(model.hidden(x))))[0]  # (K, T)
                target = torch.zeros_like(logits)
                for row in truth.segments[truth.segments["video"] == video].itertuples():
                    edges = AXIS.to_rows(np.array([row.start_s, row.end_s]))
                    centers = torch.arange(logits.shape[1]) + 0.5
                    target[run.classes.index(row.label), (centers > edges[0]) & (centers < edges[1])] = 1
                total = total + nn.functional.binary_cross_entropy_with_logits(logits, target) / len(state["train"])
        optimizer.zero_grad()
        (total + 1e-3 * model.logits.weight.square().sum()).backward()
        optimizer.step()
    for name, value in read_weights(tmp_path / "run" / "last.safetensors").items():
        assert torch.allclose(value, model.state_dict()[name], atol=1e-5)


def test_the_seed_decides(world: tuple[Path, Path], tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(world, tmp_path / name, toy_recipe(seed=seed, train={"epochs": 1}))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "a", tmp_path / "c")


@pytest.mark.slow
def test_workers_change_nothing(world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tad.detect.preflight.CACHE_BYTES", 0)
    train(world, tmp_path / "none", toy_recipe(train={"epochs": 2}))
    train(world, tmp_path / "one", toy_recipe(train={"epochs": 2}, data={"workers": 1}))
    assert_same_run(tmp_path / "none", tmp_path / "one")


# ---- what is chosen and written --------------------------------------------------------------------------------
def test_the_best_of_the_held_out_map_is_kept_and_of_equals_the_later(world: tuple[Path, Path], tmp_path: Path) -> None:
    metrics = train(world, tmp_path / "run", toy_recipe(train={"epochs": 12, "eval_every": 2, "lr": 0.03, "ema": None}))
    rows = rows_of(tmp_path / "run")
    scores = {int(row["epoch"]): float(row["average_map"]) for row in rows if row["average_map"]}
    assert list(scores) == [2, 4, 6, 8, 10, 12]
    best = max(scores, key=lambda epoch: (scores[epoch], epoch))
    assert metrics["best_epoch"] == best
    assert metrics["average_map"] == scores[best]
    # the best weights, evaluated by the public functions, give that very number
    run = Run.load(tmp_path / "run")
    holdout = read_state(tmp_path / "run" / "resume.pt")["holdout"]
    found = detect(run=run, store=world[0], videos=holdout)
    truth = read_truth(world[1]).segments
    result = detection_map(truth[truth["video"].isin(holdout)], found)
    assert result.average == pytest.approx(metrics["average_map"], abs=1e-9)
    assert metrics["map"] == pytest.approx({f"{t:g}": v for t, v in result.map.items()})
    score = f"average mAP {100 * result.average:.1f} % on {len(holdout)} held-out videos"
    assert outcome(metrics) == f"epoch {best} of 12 chosen, {score}"


def test_select_last_needs_nothing_held_out(world: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = toy_recipe(data={"holdout": 0.0}, train={"select": "last", "epochs": 2})
    metrics = train(world, tmp_path / "run", recipe)
    assert metrics["best_epoch"] == 2
    assert metrics["average_map"] is None
    assert outcome(metrics) == f"epoch {metrics['epochs']} of {metrics['epochs']} chosen"
    assert metrics["counts"]["train_videos"] == 12
    best, last = (read_weights(tmp_path / "run" / f"{name}.safetensors") for name in ("best", "last"))
    assert all(torch.equal(best[name], last[name]) for name in best)


def test_the_run_folder_is_complete_and_a_run_can_be_repeated_from_its_recipe(
    world: tuple[Path, Path], tmp_path: Path
) -> None:
    metrics = train(world, tmp_path / "run")
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {
        "recipe.yaml", "classes.json", "features.json", "env.json", "best.safetensors", "last.safetensors", "resume.pt",
        "metrics.csv", "metrics.json", "log.txt",
    }  # fmt: skip
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    assert env["store"] == {"path": str(world[0]), "format": "zarr"}
    assert len(env["annotations"]["sha256"]) == 64
    features = json.loads((tmp_path / "run" / "features.json").read_text())
    assert features["flow"] == {
        "spec": {"made": "by hand", "stream": "flow"},
        "fingerprint": features["flow"]["fingerprint"],
        "weights_source": "nowhere",
        "channels": 8,
        "dtype": "float16",
        "axis": AXIS.to_dict(),
    }
    recipe = validated(DetectRecipe, load_mapping(tmp_path / "run" / "recipe.yaml"), where="recipe")
    train(world, tmp_path / "again", recipe)
    assert_same_run(tmp_path / "run", tmp_path / "again")


def test_what_was_left_out_is_listed(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    with open_store(world[0], "a") as store:
        store.delete("flow", "video_001")
    metrics = train(world, tmp_path / "run", toy_recipe(train={"epochs": 1}))
    lines = [json.loads(line) for line in (tmp_path / "run" / "failures.jsonl").read_text().splitlines()]
    assert lines == [{"video": "video_001", "error": "StoreError", "message": "no features in flow"}]
    assert metrics["counts"]["missing_videos"] == 1
    assert "left out: video_001: no features in flow" in (tmp_path / "run" / "log.txt").read_text()


def test_bf16_trains_and_fp16_needs_cuda(world: tuple[Path, Path], tmp_path: Path) -> None:
    metrics = train(world, tmp_path / "bf16", toy_recipe(train={"epochs": 12, "precision": "bf16", "ema": None}))
    assert float(rows_of(tmp_path / "bf16")[0]["loss"]) > 2 * metrics["last_loss"]
    with pytest.raises(RecipeError, match="fp16 needs a CUDA device; take bf16"):
        train(world, tmp_path / "fp16", toy_recipe(train={"precision": "fp16"}))
    assert not (tmp_path / "fp16").exists()


# ---- the whole path --------------------------------------------------------------------------------------------
def talnet_recipe(**train_values: Any) -> DetectRecipe:
    values = {"epochs": 20, "lr": 2e-3, "batch_videos": 4, "ema": 0.9, "eval_every": 5, **train_values}
    return DetectRecipe.model_validate(
        {
            "detector": "talnet",
            "streams": ["rgb", "flow"],
            "model": {"anchor_scales": "auto", "width": 32, "dropout": 0.2},
            "data": {"holdout": 0.17},
            "train": values,
            "postprocess": {"tiou": 0.4},
        }
    )


def test_talnet_finds_planted_actions_in_videos_it_has_not_seen(tmp_path: Path) -> None:
    world = make_world(tmp_path, rows=(80, 160), channels=16)
    truth = read_truth(world[1]).subset("validation")
    scores = {}
    for name, recipe in (("untrained", talnet_recipe(epochs=1, lr=1e-12)), ("trained", talnet_recipe())):
        train(world, tmp_path / name, recipe)
        found = detect(run=tmp_path / name, store=world[0], subset="validation", annotations=truth)
        scores[name] = detection_map(truth, found).map[0.5]
    assert scores["untrained"] < 0.3  # measured 0.04 to 0.15
    assert scores["trained"] > 0.75  # measured 0.93 to 0.97 over data and training seeds
    scales = Run.load(tmp_path / "trained").recipe.model["anchor_scales"]
    assert scales == sorted(scales)  # chosen from the training actions, 3 to 12 rows long, and written down
    assert 2 <= scales[0] <= 4
    assert 9 <= scales[-1] <= 13


def test_talnet_is_resumed_bit_for_bit(world: tuple[Path, Path], tmp_path: Path) -> None:
    """With its random sampling of anchors and proposals, and scales that the data chose."""
    recipe = talnet_recipe(epochs=3)
    train(world, tmp_path / "whole", recipe)
    with pytest.raises(Stop):
        train(world, tmp_path / "parts", recipe, progress=stopping(5))
    train(world, tmp_path / "parts", recipe, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.gpu
def test_fp16_trains_and_resumes_on_cuda(world: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = toy_recipe(train={"epochs": 8, "precision": "fp16", "clip_norm": 1.0})
    with pytest.raises(Stop):
        train_detector(
            recipe, store=world[0], annotations=world[1], out=tmp_path / "run", device="cuda", progress=stopping(10)
        )
    metrics = train_detector(
        recipe, store=world[0], annotations=world[1], out=tmp_path / "run", device="cuda", resume=True
    )
    rows = rows_of(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [str(n) for n in range(1, 9)]
    assert metrics["last_loss"] < 0.7 * float(rows[0]["loss"])
    on_cpu = detect(run=tmp_path / "run", store=world[0], device="cpu")
    on_cuda = detect(run=tmp_path / "run", store=world[0], device="cuda")
    assert len(on_cpu) == pytest.approx(len(on_cuda), rel=0.05)


# ---- what is wrong ---------------------------------------------------------------------------------------------
def test_a_loss_that_is_not_finite_names_epoch_and_videos(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = Toy.loss, []

    def spoilt(self: Toy, outputs: Any, targets: Any) -> dict[str, Tensor]:
        terms = loss(self, outputs, targets)
        calls.append(1)
        return {**terms, "rows": terms["rows"] * math.inf} if len(calls) == 5 else terms

    monkeypatch.setattr(Toy, "loss", spoilt)
    with pytest.raises(TadError) as error:
        train(world, tmp_path / "run")
    state = read_state(tmp_path / "run" / "resume.pt")
    step = epoch_steps(9, batch=3, accumulate=1, seed=3, epoch=1)[1]
    videos = [sorted(state["train"])[i] for i in step.batches[0]]
    assert f"epoch 2: the loss is not finite (rows=inf, decay=" in str(error.value)  # noqa: F541
    assert f", on videos {', '.join(videos)}. " in str(error.value)
    assert "train.lr" in str(error.value)
    assert "the loss is not finite" in (tmp_path / "run" / "log.txt").read_text()


def test_a_gradient_that_is_not_finite_stops_before_it_spoils_the_weights(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(self: Toy, outputs: Any, targets: Any) -> dict[str, Tensor]:
        return {"root": self.hidden.weight.sub(self.hidden.weight.detach()).abs().sum().sqrt()}  # 0, slope infinite

    monkeypatch.setattr(Toy, "loss", spoilt)
    with pytest.raises(
        TadError, match=r"epoch 1: the gradient is not finite though the loss is, on videos video_\d+, video"
    ):
        train(world, tmp_path / "run")


@pytest.mark.parametrize(
    ("train_values", "message"),
    [
        ({"schedule": "step"}, r"needs train\.step_epochs"),
        ({"step_epochs": [3]}, "belongs to train.schedule=step"),
        ({"warmup_epochs": 4}, r"warmup_epochs=4\.0 leaves nothing"),
    ],
)
def test_values_that_do_not_fit_together(
    world: tuple[Path, Path], tmp_path: Path, train_values: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        train(world, tmp_path / "run", toy_recipe(train=train_values))
    assert not (tmp_path / "run").exists()


def test_unknown_detectors_options_and_devices(world: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown detector 'talnett'\. Did you mean 'talnet'"):
        train(world, tmp_path / "run", toy_recipe(detector="talnett"))
    with pytest.raises(RecipeError, match=r"no model option 'widht'\. Did you mean 'width'"):
        train(world, tmp_path / "run", toy_recipe(model={"widht": 3}))
    with pytest.raises(RecipeError, match="unknown device 'gpu'"):
        train_detector(toy_recipe(), store=world[0], annotations=world[1], out=tmp_path / "run", device="gpu")
    assert not (tmp_path / "run").exists()


# ---- optimizer -------------------------------------------------------------------------------------------------
def test_learning_rates() -> None:
    def factors(epochs: int = 4, per_epoch: int = 5, **values: Any) -> list[float]:
        recipe = TrainRecipe.model_validate({"epochs": epochs, **values})
        return [lr_factor(recipe, step=s, steps_per_epoch=per_epoch) for s in range(epochs * per_epoch)]

    assert factors() == [1.0] * 20
    assert factors(warmup_epochs=0.8) == [0.25, 0.5, 0.75, 1.0] + [1.0] * 16
    assert factors(schedule="step", step_epochs=[1, 3], step_gamma=0.5) == [1.0] * 5 + [0.5] * 10 + [0.25] * 5
    cosine = factors(schedule="cosine", warmup_epochs=1)
    assert cosine[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert cosine[5:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * i / 15) for i in range(15)])


def test_adamw_decays_matrices_alone() -> None:
    model = Toy(channels={"a": 2}, classes=2, norm=True)
    recipe = TrainRecipe.model_validate({"optimizer": "adamw", "weight_decay": 0.1, "lr": 0.5})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, recipe)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1 - 0.5 * 0.1 if name in ("hidden.weight", "logits.weight") else 1.0
        assert torch.allclose(p, before[name] * factor, atol=1e-7)


def test_averaged_weights() -> None:
    model = nn.BatchNorm1d(1)
    average = AveragedWeights(model, 0.5)
    expected = 1.0
    for n, value in enumerate([2.0, 5.0, -3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0], start=1):
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_mean.fill_(value)  # type: ignore[union-attr]
        average.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-6)
        assert average.module.running_mean.item() == value  # type: ignore[union-attr]
    assert not average.module.training
    again = AveragedWeights(model, 0.5)
    again.load_state_dict(average.state_dict())
    assert again.updates == 12
    assert torch.equal(again.module.weight, average.module.weight)


def test_feature_dropout_thins_features_in_training_alone(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    forward = Toy.forward

    def spy(self: Toy, batch: Any) -> Any:
        seen[self.training].append(batch.features["rgb"].transpose(1, 2)[batch.mask])  # (rows, C)
        return forward(self, batch)

    monkeypatch.setattr(Toy, "forward", spy)
    store, annotations = world
    recipe = toy_recipe(train={"epochs": 1, "feature_dropout": 0.4})
    train_detector(recipe, store=store, annotations=annotations, out=tmp_path / "thin")
    thin, whole = torch.cat(seen[True]), torch.cat(seen[False])
    assert (whole == 0).float().mean() < 0.01
    assert 0.35 < (thin == 0).float().mean() < 0.45
    seen[True].clear()
    train_detector(toy_recipe(train={"epochs": 1}), store=store, annotations=annotations, out=tmp_path / "whole")
    full = torch.cat(seen[True])  # the same rows in the same order
    torch.testing.assert_close(thin, torch.where(thin == 0, 0.0, full / 0.6))
