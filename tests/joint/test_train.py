"""``train_joint`` from a store to a run: equal to two stages where it must be, resumable, and found again by detection.

As a script it trains: ``python -m tests.joint.test_train WORLD OUT RECIPE-JSON [STOP]``.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tad.apply import detect_videos, extract_for_run
from tad.detect import detect, holdout, train_detector
from tad.detect.infer import find
from tad.detect.interface import Segments
from tad.detect.runs import CLASSIFIER, Run, read_json, read_state, read_weights, trained_weights
from tad.errors import RecipeError, StoreError
from tad.extract import build_backbone, extract
from tad.joint import train as joint_train
from tad.joint import train_joint
from tad.joint.source import JointSource
from tad.recipe import DetectRecipe, ExtractRecipe
from tad.store import Level, open_store
from tad.synth import make_videos
from tests.joint.footage import filled, make_footage, recipe

ROOT = Path(__file__).parents[2]
TALNET = {"width": 8, "anchor_scales": [2, 4]}
ETAD = {
    "rows": 8, "width": 8, "lstm_width": 4, "branch_width": 4, "norm_groups": 2, "roi_channels": 4, "head_width": 8,
    "branch_head_width": 4, "ratio": 0.5,
}  # fmt: skip
SPTAD = {
    "levels": ["s1", "s2", "s4"], "level_channels": {"s1": 32, "s2": 64, "s4": 128}, "rows": 32, "proposals": 4,
    "heads": 2, "width": 8, "interaction_width": 4, "attention_heads": 2, "feedforward": 8, "soi_points": 4,
}  # fmt: skip
TALMTS = {
    "levels": ["s2-map", "s4-map"], "rows": 16, "pyramid_levels": 3, "frames": "cut", "stt_patch": 16,
    "fsa_patch": 16, "frame_factor": 2, "transformer_width": 8, "transformer_heads": 2, "width": 8, "norm_groups": 2,
}  # fmt: skip
MODELS = {"talnet": TALNET, "etad": ETAD, "sptad": SPTAD, "talmts": TALMTS, "tcanet": {}}


def make_world(root: Path) -> Path:
    """Five videos of two seconds, features of a starting backbone, and frames that leave room for another crop."""
    for subset, count in (("training", 3), ("validation", 2)):
        make_videos(
            root, videos=count, seed=2, subset=subset, duration_s=(2.0, 3.2), size=(36, 48), action_s=(0.6, 1.2)
        )
    file = root / "annotations.json"
    truth = json.loads(file.read_text())
    for video in truth["database"].values():  # the same in all, so that any of them can go
        video["annotations"] = [{"segment": [0.3, 1.2], "label": "a"}, {"segment": [1.3, 1.9], "label": "b/ü"}]
    file.write_text(json.dumps(truth))
    torch.save(build_backbone("tiny", weights="random:5").state_dict(), root / "tiny.pt")
    recipes = {
        "net": ExtractRecipe(
            backbone="tiny", weights=str(root / "tiny.pt"), levels=True, maps=("s2", "s4"), window=8, fps=12.5
        ),
        "frames": ExtractRecipe(backbone="frames", fps=12.5, short_side=32, crop="full"),
        "cut": ExtractRecipe(backbone="frames", fps=12.5, short_side=32, crop=(32, 32)),
    }
    report = extract(root / "videos", store=root / "features.zarr", recipes=list(recipes.values()), names=list(recipes))
    assert report.failures == []
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def recipe_of(detector: str = "talnet", **changes: Any) -> DetectRecipe:
    """A short training; mappings replace parts of it."""
    given: dict[str, Any] = {
        "detector": detector,
        "streams": ["net", "cut"] if detector == "talmts" else ["net"],
        "seed": 3,
        "model": MODELS[detector],
        "data": {"holdout_subset": "validation", "empty_windows": True},
        "train": {"epochs": 1, "batch_videos": 2, "lr": 1e-2},
        "postprocess": {"max_segments": 20},
        "joint": {"backbone_lr": 1e-3, "frozen_stages": 0, "random_crop": False},
    }
    if detector == "etad":
        given["classes"] = {"classifier": {"epochs": 1, "width": 4, "dilations": [1]}}
    for key, value in changes.items():
        given[key] = {**given[key], **value} if isinstance(value, dict) else value
    return DetectRecipe.model_validate(given)


def train(world: Path, out: Path, recipe: DetectRecipe | None = None, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"store": world / "features.zarr", "annotations": world / "annotations.json"}
    return train_joint(recipe or recipe_of(), out=out, device="cpu", **{**given, **options})


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path / "metrics.csv", encoding="utf-8", newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def assert_same_run(a: Path, b: Path, *, atol: float = 0.0) -> None:
    """The detector, the backbones and all that was noted of the epochs."""
    names = ["best.safetensors", "last.safetensors"]
    pairs = [(a / name, b / name) for name in names] + list(zip(trained_weights(a), trained_weights(b), strict=True))
    for one, other in pairs:
        if atol == 0:
            assert one.name == other.name
        first, second = read_weights(one), read_weights(other)
        assert first.keys() == second.keys()
        for key, value in first.items():
            torch.testing.assert_close(value, second[key], rtol=0, atol=atol, msg=f"{one.name}: {key}")
    if atol == 0:
        assert rows_of(a) == rows_of(b)
        metrics = [{k: v for k, v in read_json(path / "metrics.json").items() if k != "seconds"} for path in (a, b)]
        assert metrics[0] == metrics[1]
        assert (
            read_json(a / "features.json")["net"]["fingerprint"] == read_json(b / "features.json")["net"]["fingerprint"]
        )


def start_of(world: Path) -> dict[str, torch.Tensor]:
    return dict(build_backbone("tiny", weights=world / "tiny.pt").state_dict())


def stopping(epochs: int, error: type[BaseException] = KeyboardInterrupt) -> Callable[..., Any]:
    """A progress that ends the training in the first step after so many epochs."""

    class Bar:
        def __init__(self, label: str) -> None:
            self.label = label

        def advance(self, n: float = 1.0, note: str = "") -> None:
            if self.label == "train" and note.startswith(f"epoch {epochs + 1}/"):
                raise error

    @contextmanager
    def factory(total: float, label: str, unit: str) -> Iterator[Any]:
        yield Bar(label)

    return factory


# ---- equal to two stages ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("detector", ["talnet", "sptad"])
def test_pre_extracted_is_train_detector(world: Path, tmp_path: Path, detector: str) -> None:
    changes: dict[str, Any] = {"train": {"epochs": 2, "ema": 0.9, "feature_dropout": 0.2}}
    own = train(world, tmp_path / "joint", recipe_of(detector, joint={"mode": "pre-extracted"}, **changes))
    other = train_detector(
        recipe_of(detector, **changes).model_copy(update={"joint": None}), store=world / "features.zarr",
        annotations=world / "annotations.json", out=tmp_path / "two", device="cpu",
    )  # fmt: skip
    assert {k: v for k, v in own.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    assert_same_run(tmp_path / "joint", tmp_path / "two")
    for name in ("best.safetensors", "last.safetensors", "classes.json", "features.json"):
        assert (tmp_path / "joint" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    files = {p.name for p in (tmp_path / "joint").iterdir()}
    assert files == {p.name for p in (tmp_path / "two").iterdir()} | {"starting.json"}


def test_pre_extracted_needs_no_frames(world: Path, tmp_path: Path) -> None:
    with open_store(world / "features.zarr") as full, open_store(tmp_path / "features.zarr", "a") as store:
        attrs = full.stream_attrs("net")
        store.create_stream("net", attrs["spec"], info={"weights_source": attrs["weights_source"]})
        for video in full.videos("net"):
            feature = full["net", video]
            level = Level(feature.numpy(), feature.axis)
            store.write("net", video, {"features": level}, duration_s=feature.duration_s, source={})
    given = {"store": tmp_path / "features.zarr"}
    train(world, tmp_path / "run", recipe_of(joint={"mode": "pre-extracted"}), **given)
    with pytest.raises(StoreError, match="no stream 'frames' with the frames behind 'net'"):
        train(world, tmp_path / "other", **given)


# ---- what moves ------------------------------------------------------------------------------------------------------
def test_frozen_parts_stay_and_the_others_move(world: Path, tmp_path: Path) -> None:
    start = start_of(world)
    train(world, tmp_path / "run", recipe_of(joint={"frozen_stages": 2, "flip": True, "jitter": True}))
    (file,) = trained_weights(tmp_path / "run")
    moved = {key for key, value in read_weights(file).items() if not torch.equal(value, start[key])}
    assert moved == {"s4.0.0.weight", "s4.1.0.weight"}  # neither stages nor norms nor their statistics
    about = read_json(tmp_path / "run" / "features.json")["net"]
    assert about["weights_source"] == str(file.resolve())
    train(world, tmp_path / "norms", recipe_of(joint={"frozen_norms": False, "mode": "full"}))
    (file,) = trained_weights(tmp_path / "norms")
    still = {key for key, value in read_weights(file).items() if torch.equal(value, start[key])}
    assert still == {"motion.floor"}


@pytest.mark.parametrize(
    "joint",
    [
        {"backbone_lr": 0.0},
        pytest.param({"ratio": 0.0}, marks=pytest.mark.slow),
        pytest.param({"frozen_stages": 4}, marks=pytest.mark.slow),
    ],
)
def test_a_backbone_that_does_not_learn_stays(world: Path, tmp_path: Path, joint: dict[str, Any]) -> None:
    recipe = recipe_of(joint=joint, train={"optimizer": "adamw", "weight_decay": 0.1, "ema": 0.5})
    train(world, tmp_path / "run", recipe)
    (file,) = trained_weights(tmp_path / "run")
    start = start_of(world)
    assert all(torch.equal(value, start[key]) for key, value in read_weights(file).items())


# ---- resume ----------------------------------------------------------------------------------------------------------
RESUMED: dict[str, dict[str, Any]] = {
    "egs": {"train": {"epochs": 3, "ema": 0.9}, "joint": {"random_crop": True, "flip": True, "jitter": True}},
    "bank": {"train": {"epochs": 3}, "joint": {"mode": "bank", "random_crop": True}},
}


@pytest.mark.parametrize("mode", list(RESUMED))
def test_a_stop_changes_nothing(world: Path, tmp_path: Path, mode: str) -> None:
    recipe = recipe_of(**RESUMED[mode])
    train(world, tmp_path / "whole", recipe)
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "run", recipe, progress=stopping(1))
    state = read_state(tmp_path / "run" / "resume.pt")
    assert state["epoch"] == 1
    train(world, tmp_path / "run", recipe, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    ends = [read_state(tmp_path / name / "resume.pt")["source"]["banks"] for name in ("whole", "run")]
    assert bool(ends[0]) == (mode == "bank")
    for video, rows in ends[0].get("net", {"rows": {}})["rows"].items():
        assert torch.equal(rows, ends[1]["net"]["rows"][video])
        assert not torch.equal(rows, state["source"]["banks"]["net"]["rows"][video])  # it went on
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()}
    train(world, tmp_path / "run", recipe, resume=True)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()} == before


def script(world: Path, out: Path, changes: dict[str, Any], stop: Path | None = None) -> list[str]:
    return [sys.executable, "-m", "tests.joint.test_train", str(world), str(out), json.dumps(changes),
            *([] if stop is None else [str(stop)])]  # fmt: skip


@pytest.mark.slow
def test_a_killed_process_is_resumed(world: Path, tmp_path: Path) -> None:
    """SIGKILL in the second epoch."""
    marker, changes = tmp_path / "second", RESUMED["egs"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(script(world, tmp_path / "run", changes, marker), cwd=ROOT, env=environment) as process:
        deadline = time.monotonic() + 300
        while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert marker.exists()
    train(world, tmp_path / "run", recipe_of(**changes), resume=True)
    train(world, tmp_path / "whole", recipe_of(**changes))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_workers_change_nothing(world: Path, tmp_path: Path) -> None:
    changes = RESUMED["egs"]
    train(world, tmp_path / "none", recipe_of(**changes))
    train(world, tmp_path / "one", recipe_of(data={"workers": 1}, **changes))
    assert_same_run(tmp_path / "none", tmp_path / "one")


# ---- several processes -----------------------------------------------------------------------------------------------
def in_two(world: Path, out: Path, changes: dict[str, Any]) -> None:
    command = script(world, out, changes)
    command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_equal_one(world: Path, tmp_path: Path) -> None:
    """Three videos in batches of two: the second process has none of the last batch."""
    changes = {
        "train": {"optimizer": "sgd", "epochs": 2}, "joint": {"mode": "full", "random_crop": True, "flip": True},
        "model": {"anchors_per_video": 100000, "proposals_per_video": 100000},
    }  # fmt: skip
    in_two(world, tmp_path / "two", changes)
    train(world, tmp_path / "one", recipe_of(**changes))
    assert_same_run(tmp_path / "one", tmp_path / "two", atol=2e-5)


@pytest.mark.slow
def test_processes_share_a_bank_and_one_trains_the_classifier(world: Path, tmp_path: Path) -> None:
    changes = {"detector": "etad", "train": {"epochs": 2}, "joint": {"mode": "bank", "ratio": 0.5}}
    in_two(world, tmp_path / "two", changes)
    rows = read_state(tmp_path / "two" / "resume.pt")["source"]["banks"]["net"]["rows"]
    with open_store(world / "features.zarr") as store:
        for video, held in rows.items():  # of both processes
            assert (np.abs(held.numpy() - store["net", video].numpy()) > 1e-7).any(), video
    assert len(rows) == 3
    fingerprints = [read_json(p / "features.json")["net"]["fingerprint"]
                    for p in (tmp_path / "two", tmp_path / "two" / CLASSIFIER)]  # fmt: skip
    assert fingerprints[0] == fingerprints[1]
    train(world, tmp_path / "two", recipe_of(**changes), resume=True)  # one process finds nothing to do


# ---- a class-agnostic detector ---------------------------------------------------------------------------------------
def fingerprint(path: Path) -> str:
    return str(read_json(path / "features.json")["net"]["fingerprint"])


def test_classes_come_from_a_classifier_of_the_trained_features(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop between the training and that classifier is made up for; a video without frames does not stop it."""
    shutil.copytree(world, tmp_path / "own")
    own, run = tmp_path / "own", tmp_path / "run"
    with open_store(own / "features.zarr", "a") as store:
        store.delete("frames", "training-001")
    given = recipe_of("etad")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(joint_train, "train_classifier", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(own, run, given)
    assert (run / "metrics.json").is_file()
    assert fingerprint(run / CLASSIFIER) != fingerprint(run)
    row = rows_of(run)[0]
    assert {"proposal_map", "average_map"} <= row.keys()  # judged as what it is
    failures = [json.loads(line) for line in (run / "failures.jsonl").read_text().splitlines()]
    assert [failure["video"] for failure in failures] == ["training-001"]
    (run / ".rows-left").mkdir()  # by a process that was killed
    train(own, run, given, resume=True)
    assert fingerprint(run / CLASSIFIER) == fingerprint(run)
    assert not list(run.glob(".rows-*"))
    found = detect_videos(own / "videos/validation-000.mp4", run=run, device="cpu")
    assert found.failures == []
    assert len(found.predictions) > 0
    assert set(found.predictions["label"]) <= set(Run.load(run).classes)
    before = (run / CLASSIFIER / "best.safetensors").stat().st_mtime_ns
    train(own, run, given, resume=True)
    assert (run / CLASSIFIER / "best.safetensors").stat().st_mtime_ns == before


# ---- evaluation is detection -----------------------------------------------------------------------------------------
def decoded_in_training(monkeypatch: pytest.MonkeyPatch) -> dict[str, Segments]:
    """What the last evaluation found, by video."""
    kept: dict[str, Segments] = {}
    plain = holdout.decoded_videos

    def noted(*given: Any, **options: Any) -> list[Segments]:
        found = plain(*given, **options)
        kept.update({segments.video: segments for segments in found})
        return found

    monkeypatch.setattr(holdout, "decoded_videos", noted)
    return kept


@pytest.mark.parametrize(
    ("detector", "changes"),
    [
        pytest.param("talnet", {"train": {"ema": 0.5}}, id="full"),
        pytest.param("talnet", {"joint": {"videos": "videos"}}, id="decoded", marks=pytest.mark.slow),
        pytest.param("etad", {}, id="rescaled", marks=pytest.mark.slow),
        pytest.param("etad", {"model": {"layout": "windowed"}}, id="windowed", marks=pytest.mark.slow),
        pytest.param("sptad", {"joint": {"mode": "full", "random_crop": True}}, id="levels"),
        pytest.param("talmts", {"joint": {"mode": "full", "flip": True}}, id="maps", marks=pytest.mark.slow),
    ],
)
def test_evaluation_in_training_is_detection_afterwards(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, detector: str, changes: dict[str, Any]
) -> None:
    if "videos" in changes.get("joint", {}):
        changes = {"joint": {"videos": str(world / "videos")}}
    kept = decoded_in_training(monkeypatch)
    recipe = recipe_of(detector, **changes)
    train(world, tmp_path / "run", recipe)
    run = Run.load(tmp_path / "run")
    assert run.features["net"]["fingerprint"] != read_json(tmp_path / "run/starting.json")["net"]["fingerprint"]
    files = [world / f"videos/{video}.mp4" for video in kept]
    assert len(files) == 2
    extract_for_run(files, run=run, store=tmp_path / "new.zarr", device="cpu")
    with open_store(tmp_path / "new.zarr") as store, open_store(world / "features.zarr") as old:
        found = find(run, store, list(kept), device=torch.device("cpu"), lost=pytest.fail)
        assert not np.allclose(store["net", "validation-000"].numpy(), old["net", "validation-000"].numpy(), atol=1e-4)
    assert len(found) == 2
    for segments in found:
        other = kept[segments.video]
        assert len(segments) == len(other) > 0
        torch.testing.assert_close(segments.scores, other.scores, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(segments.segments_s, other.segments_s, rtol=1e-3, atol=1e-3)


# ---- flow ------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_two_streams_learn_together(world: Path, tmp_path: Path) -> None:
    recipes = {
        "flow": ExtractRecipe(
            backbone="tiny-flow", weights="random:1", window=8, fps=12.5, short_side=32, crop=(32, 32)
        ),
        "flow-frames": ExtractRecipe(backbone="flow-frames", fps=12.5, short_side=32, crop="full"),
    }
    shutil.copytree(world, tmp_path / "own")
    store = tmp_path / "own/features.zarr"
    report = extract(world / "videos", store=store, recipes=list(recipes.values()), names=list(recipes))
    assert report.failures == []
    flow = build_backbone("tiny-flow", weights="random:1").state_dict()
    for streams in (["flow"], ["net", "flow"]):
        out = tmp_path / "-".join(streams)
        train(tmp_path / "own", out, recipe_of(streams=streams, joint={"mode": "full", "flip": True}))
        files = trained_weights(out)
        assert len(files) == len(streams)
        (file,) = [file for file in files if file.name.startswith("flow-")]
        assert any(not torch.equal(value, flow[key]) for key, value in read_weights(file).items())
        found = detect_videos(world / "videos/validation-000.mp4", run=out, device="cpu")
        assert found.failures == []


# ---- odd inputs ------------------------------------------------------------------------------------------------------
def test_videos_without_frames_are_left_out_and_told(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "own")
    with open_store(tmp_path / "own/features.zarr", "a") as store:
        store.delete("frames", "training-000")
        store.delete("frames", "validation-001")
    metrics = train(tmp_path / "own", tmp_path / "run", recipe_of(joint={"mode": "bank"}))
    assert (metrics["counts"]["train_videos"], metrics["counts"]["holdout_videos"]) == (2, 1)
    lines = [json.loads(line) for line in (tmp_path / "run/failures.jsonl").read_text().splitlines()]
    assert {line["video"] for line in lines} == {"training-000", "validation-001"}
    assert all("tad extract" in line["message"] for line in lines)
    with open_store(tmp_path / "own/features.zarr", "a") as store:
        store.delete("frames", "validation-000")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    with pytest.raises(StoreError, match="no held-out video is left"):
        train(tmp_path / "own", tmp_path / "run", recipe_of(joint={"mode": "bank"}), overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()} == before


def test_what_is_left_must_have_segments(world: Path, tmp_path: Path) -> None:
    """Only videos without an action keep their frames, first of those held out, then of those to learn from."""
    shutil.copytree(world, tmp_path / "own")
    file = tmp_path / "own/annotations.json"
    truth = json.loads(file.read_text())
    for video in ("validation-000", "training-000"):
        truth["database"][video]["annotations"] = []
    file.write_text(json.dumps(truth))
    for gone, said in ((["validation-001"], "no held-out video with segments"),
                       (["training-001", "training-002"], "no training video with segments")):  # fmt: skip
        with open_store(tmp_path / "own/features.zarr", "a") as store:
            for video in gone:
                store.delete("frames", video)
        select = {"train": {"select": "map" if "held-out" in said else "last"}}
        with pytest.raises(StoreError, match=said):
            train(tmp_path / "own", tmp_path / "run", recipe_of(**select))
        assert not (tmp_path / "run").exists()


def test_one_row_videos_odd_ids_and_batches_without_truth(world: Path, tmp_path: Path) -> None:
    recipes = {"net": recipe(levels=True), "frames": recipe("frames")}
    with filled(make_footage(tmp_path), tmp_path / "store.zarr", recipes) as store:
        videos = {video: store["net", video].duration_s for video in store.videos("net")}
    database = {
        video: {"subset": "training", "duration": duration_s, "annotations": []} for video, duration_s in videos.items()
    }
    database["a/b ünï"]["annotations"] = [{"segment": [1.0, 3.0], "label": "jump/ü"}]
    (tmp_path / "annotations.json").write_text(json.dumps({"database": database}))
    for name, detector, joint in (
        ("snippets", "talnet", {"mode": "bank", "random_crop": True}), ("pass", "sptad", {"mode": "full"}),
    ):  # fmt: skip
        given = recipe_of(
            detector, joint=joint, data={"holdout_subset": None, "holdout": 0.0},
            train={"select": "last", "batch_videos": 1, "accumulate": 2},
        )  # fmt: skip
        metrics = train(tmp_path, tmp_path / name, given, store=tmp_path / "store.zarr")
        assert metrics["counts"]["train_videos"] == 3
        assert np.isfinite(metrics["last_loss"])
        assert Run.load(tmp_path / name).build() is not None


def test_what_cannot_be_trained_jointly_is_said(world: Path, tmp_path: Path) -> None:
    given = {"store": world / "features.zarr", "annotations": world / "annotations.json", "out": tmp_path / "run"}
    with pytest.raises(RecipeError, match=r"'tcanet' refines the proposals of another run.*extract with --run"):
        train(world, tmp_path / "run", recipe_of("tcanet"))
    with pytest.raises(RecipeError, match=r"section 'joint'.*tad train-joint"):
        train_detector(recipe_of(), **given)
    with pytest.raises(RecipeError, match="samples snippets"):
        train(world, tmp_path / "run", recipe_of("sptad"))
    with pytest.raises(RecipeError, match="row_spacing"):
        train(world, tmp_path / "run", recipe_of(data={"row_spacing": 2}))
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_eat_what_it_begins_with(world: Path, tmp_path: Path) -> None:
    """Features of a trained backbone that lies in the run, or a store there: overwriting would remove them."""
    run = tmp_path / "run"
    train(world, run, recipe_of(data={"holdout_subset": None, "holdout": 0.0}, train={"select": "last"}))
    store = tmp_path / "features.zarr"
    extract_for_run(world / "videos", run=run, store=store, device="cpu")
    (file,) = trained_weights(run)
    plain = recipe_of().model_copy(update={"joint": None})
    for given in (recipe_of(joint={"videos": str(world / "videos")}), plain):
        function = train_joint if given.joint is not None else train_detector
        options = {"annotations": world / "annotations.json", "out": run, "overwrite": True, "device": "cpu"}
        with pytest.raises(RecipeError, match=r"the backbone of stream 'net' .* is part of the run"):
            function(given, store=store, **options)  # type: ignore[arg-type]
        shutil.copytree(world / "features.zarr", run / "features.zarr")
        with pytest.raises(RecipeError, match=r"store .* is part of the run"):
            function(given, store=run / "features.zarr", **options)  # type: ignore[arg-type]
        shutil.rmtree(run / "features.zarr")
    assert file.is_file()
    assert Run.load(run).finished


def test_the_best_epoch_keeps_its_own_backbone(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three epochs is the best: its backbone stays beside its detector."""
    scores = iter((0.1, 0.5, 0.2))

    def judged(*_: Any) -> dict[str, float]:
        return {"average_map": next(scores)}

    monkeypatch.setattr("tad.detect.train.evaluate_held_out", judged)
    kept: list[bytes] = []
    write = JointSource.write_best

    def noted(self: JointSource, path: Path, *given: Any) -> None:
        write(self, path, *given)
        kept.append(trained_weights(path)[0].read_bytes())

    monkeypatch.setattr(JointSource, "write_best", noted)
    metrics = train(world, tmp_path / "run", recipe_of(train={"epochs": 3}))
    assert (metrics["best_epoch"], len(kept)) == (2, 2)
    assert kept[0] != kept[1]
    (file,) = trained_weights(tmp_path / "run")
    assert file.read_bytes() == kept[1]
    found = detect(run=tmp_path / "run", store=_extracted(world, tmp_path), device="cpu")
    assert isinstance(found, pd.DataFrame)


def _extracted(world: Path, tmp_path: Path) -> Path:
    store = tmp_path / "new.zarr"
    extract_for_run(world / "videos/validation-000.mp4", run=tmp_path / "run", store=store, device="cpu")
    return store


if __name__ == "__main__":
    torch.set_num_threads(1)
    progress: Any = None
    if len(sys.argv) > 4:

        class Waiting(BaseException):
            """Never raised: the process is killed while it waits."""

            def __init__(self) -> None:
                Path(sys.argv[4]).touch()
                time.sleep(600)

        progress = stopping(1, Waiting)
    changes_given = json.loads(sys.argv[3])
    train(Path(sys.argv[1]), Path(sys.argv[2]), recipe_of(**changes_given), progress=progress)
