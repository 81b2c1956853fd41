"""Runs of joint trainings: a detector is never read with another backbone than its own, wherever saving was stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import tad.joint.runs as joint_runs
from tad.apply import detect_videos, extract_for_run, feature_recipes
from tad.detect import detect, runs
from tad.detect.runs import Run, copy_run, read_about, read_weights, remove_run, run_state, write_weights
from tad.errors import RecipeError, StoreError, WeightsError
from tad.extract import build_backbone, extract, load_backbone
from tad.extract.streams import resolve
from tad.joint.runs import finish_saving, save_backbones, starting_features
from tad.store import open_store
from tad.store.fingerprint import fingerprint_of
from tad.training.files import sha256_of
from tests.joint import trained
from tests.joint.trained import STREAMS, TAGGED, begun, make_world, moved, save


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("joint"))


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Path:
    return begun(world, tmp_path / "run")


def epoch_of(path: Path) -> int:
    """The epoch of the detector, where the backbones that ``features.json`` names are of the same."""
    run = Run.load(path)
    epoch = int(run.build().state_dict()[TAGGED].view(-1)[0])
    for number, stream in enumerate(STREAMS):
        (file,) = [f for f in (path / "weights").iterdir() if f"sha256:{sha256_of(f)}" == weights_of(run, stream)]
        saved = list(load_backbone(file).parameters())[-1]
        first = build_backbone("tiny", weights=("random:5", "random:2")[number])
        step = (saved - list(first.parameters())[-1]).mean().item()
        assert step == pytest.approx(0.25 * epoch + 0.01 * number, abs=1e-5), f"{stream} is of another epoch"
    return epoch


def weights_of(run: Run, stream: str) -> str:
    return str(run.features[stream]["spec"]["weights"])


def test_backbones_are_read_back_as_what_they_are(world: Path, run: Path) -> None:
    written = save(world, run, 1)
    loaded = Run.load(run)
    assert loaded.features == written
    assert epoch_of(run) == 1
    files = sorted(file.name for file in (run / "weights").iterdir())
    assert len(files) == 2
    for stream, backbone in moved(world, 1).items():
        recipe = feature_recipes(loaded, weights={})[stream]
        assert Path(str(recipe.weights)).parent == (run / "weights").resolve()
        again = build_backbone("tiny", weights=recipe.weights)
        assert again.spec == backbone.spec
        assert all(torch.equal(again.state_dict()[key], value) for key, value in backbone.state_dict().items())
        digits = weights_of(loaded, stream).removeprefix("sha256:")[:12]
        assert f"{stream}-{digits}.safetensors" in files
        # the store's own rule, and what extraction makes of the recipe
        spec = resolve(recipe).spec
        assert loaded.features[stream]["spec"] == json.loads(json.dumps(spec))
        assert loaded.features[stream]["fingerprint"] == fingerprint_of(spec)
        start = starting_features(run)[stream]
        assert {key for key in spec if spec[key] != start["spec"][key]} == {"weights"}
        assert {key: start[key] for key in ("channels", "axis", "dtype")} == {
            key: loaded.features[stream][key] for key in ("channels", "axis", "dtype")
        }


def test_equal_weights_give_equal_files_and_others_replace_them(world: Path, run: Path) -> None:
    first = save(world, run, 1)
    (run / "weights/mine.pth").write_bytes(b"put there by somebody")
    (run / "weights/.look.tmp").write_bytes(b"left by a kill")
    save(world, run, 2)
    assert epoch_of(run) == 2
    names = {file.name for file in (run / "weights").iterdir()}
    assert len(names) == 3
    assert "mine.pth" in names
    assert save(world, run, 1) == first
    assert epoch_of(run) == 1
    # frozen backbones: nothing new but the detector
    before = {file: file.read_bytes() for file in (run / "weights").iterdir()}
    features = save_backbones(run, starting_features(run), moved(world, 1), lambda file, **about: None)
    assert features == first
    assert {file: file.read_bytes() for file in (run / "weights").iterdir()} == before


def test_without_backbones_the_features_stay(world: Path, run: Path) -> None:
    def write(file: Path, **about: Any) -> None:
        write_weights(file, read_weights(world / "two-stage/best.safetensors"), **about)

    assert save_backbones(run, starting_features(run), {}, write) == starting_features(run)
    assert Run.load(run).build() is not None
    assert Run.load(run).features == Run.load(world / "two-stage").features
    assert "features" not in read_about(run / "best.safetensors")  # so that any epoch's detector can be read with them
    one = save_backbones(run, starting_features(run), {"look": moved(world, 1)["look"]}, write)
    assert one["look-2"] == starting_features(run)["look-2"]
    assert one["look"]["fingerprint"] != starting_features(run)["look"]["fingerprint"]
    with pytest.raises(RecipeError, match="does not read: other"):
        save_backbones(run, starting_features(run), {"other": moved(world, 1)["look"]}, write)


class Stop(Exception):
    pass


STEPS: list[tuple[str, int]] = [
    ("write_weights", 0), ("write_weights", 1), ("os.replace", 0), ("os.replace", 1), ("write_json", 0),
    ("remove_weights", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "after"), [*STEPS, ("write_detector", 0), ("write_detector", 1)])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_stop_never_pairs_a_detector_with_another_backbone(
    world: Path, run: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: int, earlier: bool
) -> None:
    if earlier:
        save(world, run, 1)
    calls = iter(range(10))

    def stopping(function: Callable[..., Any], *, late: bool = False) -> Callable[..., Any]:
        def stop(*args: Any, **kwargs: Any) -> Any:
            if late:
                function(*args, **kwargs)
            if next(calls) == (0 if late else after):
                raise Stop
            return None if late else function(*args, **kwargs)

        return stop

    with monkeypatch.context() as patch:
        if name == "write_detector":
            original = trained.detector_writer
            patch.setattr(trained, "detector_writer", lambda *a: stopping(original(*a), late=bool(after)))
        elif name == "os.replace":
            patch.setattr(joint_runs.os, "replace", _only_weights(stopping(joint_runs.os.replace)))
        else:
            patch.setattr(joint_runs, name, stopping(getattr(joint_runs, name)))
        with pytest.raises(Stop):
            save(world, run, 2)
    written = (run / "best.safetensors").is_file() and read_about(run / "best.safetensors")["epoch"] == 2
    if name == "remove_weights":
        assert epoch_of(run) == 2
    elif written:
        with pytest.raises(WeightsError, match=r"stopped while saving; resume it"):
            Run.load(run).build()
    elif earlier:
        assert epoch_of(run) == 1
    else:
        with pytest.raises(WeightsError, match=r"no best\.safetensors: no epoch was finished"):
            Run.load(run).build()
    # resuming puts right what can be, and the next epoch all of it
    assert finish_saving(run) == (bool(written) and name != "remove_weights")
    if written or earlier:
        assert epoch_of(run) == (2 if written else 1)
    assert not finish_saving(run)
    save(world, run, 3)
    assert epoch_of(run) == 3
    assert len(list((run / "weights").iterdir())) == 2


def _only_weights(replace: Callable[..., Any]) -> Callable[..., Any]:
    """``os.replace`` of ``write_atomic`` is the same function: stop only at those that name a backbone's file."""
    original = joint_runs.os.replace

    def chosen(source: Any, target: Any) -> None:
        (replace if str(target).endswith(".safetensors") and "weights" in str(target) else original)(source, target)

    return chosen


def test_saving_is_not_finished_with_files_that_are_gone(world: Path, run: Path) -> None:
    save(world, run, 1)
    shutil.copy(run / "features.json", run / "old.json")
    save(world, run, 2)
    shutil.move(run / "old.json", run / "features.json")
    next((run / "weights").glob("look-2-*")).unlink()
    assert not finish_saving(run)
    with pytest.raises(WeightsError, match=r"another backbone of stream 'look'.*resume it"):
        Run.load(run).build()


def test_the_last_epoch_is_read_only_with_its_own_backbones(world: Path, run: Path) -> None:
    save(world, run, 1)
    state = read_weights(run / "best.safetensors")
    write_weights(run / "last.safetensors", state, epoch=1)
    assert Run.load(run).build("last") is not None
    write_weights(run / "last.safetensors", state, epoch=2)
    with pytest.raises(WeightsError, match=r"of epoch 2, but the run keeps the backbones of epoch 1"):
        Run.load(run).build("last")
    (run / "best.safetensors").write_bytes(b'\x08\0\0\0\0\0\0\0{"a":1}')
    with pytest.raises(WeightsError, match=r"best\.safetensors are damaged"):
        Run.load(run).build()


def test_starting_features_of_what_is_no_joint_run(world: Path, run: Path) -> None:
    with pytest.raises(RecipeError, match=r"no starting\.json: is it the folder of a joint training's run"):
        starting_features(world / "two-stage")
    (run / "starting.json").write_text("[1, 2]")
    with pytest.raises(RecipeError, match=r"starting\.json must hold an object of streams"):
        starting_features(run)
    (run / "starting.json").write_text('{"look": {"spec": {}}}')
    with pytest.raises(RecipeError, match=r"starting\.json lacks fingerprint.*of stream 'look'"):
        starting_features(run)


def test_removing_and_copying_a_run(world: Path, run: Path, tmp_path: Path) -> None:
    save(world, run, 1)
    copy_run(Run.load(run), tmp_path / "copy")
    shutil.move(run / "weights", tmp_path / "gone")  # what the copy needs is in the copy
    recipes = feature_recipes(Run.load(tmp_path / "copy"), weights={})
    assert [Path(str(r.weights)).parent for r in recipes.values()] == [tmp_path / "copy/weights"] * 2
    shutil.move(tmp_path / "gone", run / "weights")
    runs.remove_training(run)
    assert not (run / "weights").exists()
    save(world, run, 1)
    (run / "weights/mine.pth").write_bytes(b"put there by somebody")
    remove_run(run)
    assert run_state(run) == "foreign"
    assert [file.name for file in run.rglob("*") if file.is_file()] == ["mine.pth"]
    (run / "weights/mine.pth").unlink()
    (run / "weights").rmdir()
    assert run_state(run) == "empty"


def same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    assert len(a) > 0
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_detection_from_videos_and_from_their_features_is_the_same(world: Path, run: Path, tmp_path: Path) -> None:
    save(world, run, 1)
    report = extract_for_run(world / "videos", run=run, store=tmp_path / "trained.zarr")
    assert not report.failures
    found = detect_videos(world / "videos", run=run)
    assert not found.failures
    same(found.predictions, detect(run=run, store=tmp_path / "trained.zarr"))
    # and they are the features of the trained backbones, not of others
    for stream, backbone in moved(world, 1).items():
        torch.save(backbone.state_dict(), tmp_path / "moved.pt")
        recipe = feature_recipes(Run.load(run), weights={})[stream]
        recipe = recipe.model_copy(update={"weights": str(tmp_path / "moved.pt")})
        extract(world / "videos", store=tmp_path / f"{stream}.zarr", recipes=recipe, names=[stream])
        with (
            open_store(tmp_path / "trained.zarr") as a,
            open_store(tmp_path / f"{stream}.zarr") as b,
            open_store(world / "features.zarr") as start,
        ):
            for video in report.videos:
                rows = a[stream, video][:]
                np.testing.assert_array_equal(rows, b[stream, video][:])
                assert np.abs(rows - start[stream, video][:]).max() > 0.1
    assert extract_for_run(world / "videos", run=run, store=tmp_path / "trained.zarr").written == 0


def test_features_that_the_training_was_begun_with_are_refused(world: Path, run: Path) -> None:
    save(world, run, 1)
    with pytest.raises(StoreError, match=r"begun with.*tad extract VIDEOS --run .*run --store STORE'"):
        detect(run=run, store=world / "features.zarr")
    with pytest.raises(StoreError, match="weights: stored"):  # nor are they mixed
        extract_for_run(world / "videos", run=run, store=world / "features.zarr")
    save(world, run, 2)
    shutil.copytree(run, run.with_name("other"))
    save(world, run.with_name("other"), 3)
    store = run.with_name("third.zarr")
    extract_for_run(world / "videos", run=run.with_name("other"), store=store)
    with pytest.raises(StoreError, match="trained on other features"):  # of another training: the general message
        detect(run=run, store=store)


def test_any_run_of_extracted_features_can_be_extracted_for(world: Path, tmp_path: Path) -> None:
    extract_for_run(world / "videos", run=world / "two-stage", store=tmp_path / "again.zarr")
    with open_store(tmp_path / "again.zarr") as again, open_store(world / "features.zarr") as first:
        for stream in STREAMS:
            assert again.stream_attrs(stream)["fingerprint"] == first.stream_attrs(stream)["fingerprint"]
    same(
        detect(run=world / "two-stage", store=tmp_path / "again.zarr"),
        detect(run=world / "two-stage", store=world / "features.zarr"),
    )


def test_streams_of_any_name(world: Path, tmp_path: Path) -> None:
    known = Run.load(world / "two-stage").features["look"]
    names = ["a/b", "Ünï 流 ", ".hidden", "100%", "a-0123456789ab", "a"]
    backbone = moved(world, 1)["look"]
    for _ in range(2):  # the second time over the first one's files
        features = save_backbones(
            tmp_path, dict.fromkeys(names, known), dict.fromkeys(names, backbone), lambda file, **about: None
        )
    assert known == Run.load(world / "two-stage").features["look"]
    files = {f"sha256:{sha256_of(file)}" for file in (tmp_path / "weights").iterdir()}
    assert len(list((tmp_path / "weights").iterdir())) == len(names)
    assert files == {features[name]["spec"]["weights"] for name in names}
    assert {Path(features[name]["weights_source"]).parent for name in names} == {(tmp_path / "weights").resolve()}
    remove_run(tmp_path)
    assert not (tmp_path / "weights").exists()
