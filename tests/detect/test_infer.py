"""A run on stored features: one table whatever the batch, suppression without the network, no silent mismatch."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tad.annotations import read_predictions, read_truth, write_predictions
from tad.detect import Failure, Run, detect, resuppress, train_detector
from tad.detect.infer import COLUMNS
from tad.detect.interface import Segments
from tad.detect.raw import Raw, load_raw, save_raw
from tad.detect.runs import FILES
from tad.errors import AnnotationError, RecipeError, StoreError
from tad.recipe import PostprocessRecipe
from tad.store import Level, open_store
from tests.detect.toydetector import AXIS, CLASSES, Toy, make_world, toy_recipe

LOW = PostprocessRecipe(tiou=0.3, min_score=0.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Store, annotations, run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("infer")
    store, annotations = make_world(folder)
    train_detector(toy_recipe(train={"epochs": 12}), store=store, annotations=annotations, out=folder / "run")
    return store, annotations, folder / "run"


@pytest.fixture
def copied(trained: tuple[Path, Path, Path], tmp_path: Path) -> tuple[Path, Path, Path]:
    """The same, free to be damaged."""
    shutil.copytree(trained[0], tmp_path / trained[0].name)
    shutil.copytree(trained[2], tmp_path / "run")
    return tmp_path / trained[0].name, trained[1], tmp_path / "run"


def test_a_table_sorted_by_video_and_falling_score(trained: tuple[Path, Path, Path]) -> None:
    store, annotations, run = trained
    found = detect(run=run, store=store)
    assert list(found.columns) == COLUMNS
    assert found["video"].nunique() == 18  # every video of the store
    assert found["video"].is_monotonic_increasing
    assert all(group["score"].is_monotonic_decreasing for _, group in found.groupby("video"))
    assert set(found["label"]) <= set(CLASSES)
    durations = read_truth(annotations).videos.set_index("video")["duration_s"]
    assert (found["start_s"] >= 0).all()
    assert (found["start_s"] < found["end_s"]).all()
    assert (found["end_s"] <= found["video"].map(durations) + 1e-3).all()


@pytest.mark.parametrize("batch_videos", [2, 5, 100])
def test_batches_change_nothing(trained: tuple[Path, Path, Path], batch_videos: int) -> None:
    store, _, run = trained
    alone, together = detect(run=run, store=store), detect(run=run, store=store, batch_videos=batch_videos)
    pd.testing.assert_frame_equal(alone, together, rtol=0, atol=1e-5)


def test_which_videos(trained: tuple[Path, Path, Path]) -> None:
    store, annotations, run = trained
    everything = detect(run=run, store=store)
    subset = detect(run=Run.load(run), store=store, subset="val", annotations=annotations)
    listed = sorted(read_truth(annotations).subset("validation").videos["video"])
    expected = everything[everything["video"].isin(listed)].reset_index(drop=True)
    pd.testing.assert_frame_equal(subset, expected)
    with open_store(store) as opened:
        two = detect(run=run, store=opened, videos=["video_013", "video_002", "video_013"])
    pd.testing.assert_frame_equal(
        two, everything[everything["video"].isin(["video_002", "video_013"])].reset_index(drop=True)
    )
    both = detect(
        run=run, store=store, videos=["video_013", "video_002"], subset="val", annotations=read_truth(annotations)
    )
    assert set(both["video"]) == {"video_013"}
    assert detect(run=run, store=store, videos=[]).empty
    with pytest.raises(RecipeError, match="give annotations"):
        detect(run=run, store=store, subset="val")
    with pytest.raises(AnnotationError, match="no subset 'x'"):
        detect(run=run, store=store, subset="x", annotations=annotations)
    with pytest.raises(RecipeError, match="batch_videos must be at least 1"):
        detect(run=run, store=store, batch_videos=0)


def test_videos_without_features_are_listed_and_the_rest_goes_on(
    copied: tuple[Path, Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    store, _, run = copied
    with open_store(store, "a") as opened:
        opened.delete("flow", "video_004")
    failures: list[Failure] = []
    found = detect(run=run, store=store, videos=["video_003", "video_004", "absent"], failures=failures)
    assert set(found["video"]) == {"video_003"}
    assert [(f.video, f.message) for f in failures] == [
        ("video_004", "no features in flow"),
        ("absent", "no features in rgb, flow"),
    ]
    assert "absent: no features in rgb, flow" in caplog.text
    with pytest.raises(StoreError, match=r"none of the 2 videos of the call.*Wanted: 'v1', 'v2'\. Stored: 'video_000'"):
        detect(run=run, store=store, videos=["v1", "v2"])


def test_damaged_features_cost_one_video(copied: tuple[Path, Path, Path]) -> None:
    store, _, run = copied
    before = detect(run=run, store=store)
    chunk = next(
        p for p in (store / "rgb" / "video_005" / "features").rglob("*") if p.is_file() and p.suffix != ".json"
    )
    chunk.write_bytes(chunk.read_bytes()[:-5])
    failures: list[Failure] = []
    after = detect(run=run, store=store, batch_videos=4, failures=failures)
    assert [f.video for f in failures] == ["video_005"]
    expected = before[before["video"] != "video_005"].reset_index(drop=True)
    pd.testing.assert_frame_equal(after, expected, rtol=0, atol=1e-5)


def test_an_output_that_is_not_finite_costs_one_video(
    trained: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, run = trained
    decode = Toy.decode

    def spoilt(self: Toy, outputs: Any, batch: Any) -> list[Segments]:
        return [
            replace(s, scores=s.scores * float("nan")) if s.video == "video_007" else s
            for s in decode(self, outputs, batch)
        ]

    before = detect(run=run, store=store)
    monkeypatch.setattr(Toy, "decode", spoilt)
    failures: list[Failure] = []
    found = detect(run=run, store=store, batch_videos=4, failures=failures)
    assert [(f.video, f.error) for f in failures] == [("video_007", "WeightsError")]
    expected = before[before["video"] != "video_007"].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, expected, rtol=0, atol=1e-5)


def test_other_features_are_refused_field_by_field(trained: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with open_store(tmp_path / "other.zarr", "a") as store:
        store.create_stream("rgb", {"made": "otherwise", "stream": "rgb", "fps": 25})
        with pytest.raises(StoreError, match="has no stream 'flow'"):
            detect(run=trained[2], store=store)
        store.create_stream("flow", {"made": "by hand", "stream": "flow"})
        with pytest.raises(
            StoreError, match=r"stream 'rgb'.*: made was 'by hand', is 'otherwise'; fps was None, is 25\."
        ):
            detect(run=trained[2], store=store)


def test_suppression_again_without_the_network(
    trained: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, run = trained
    raw = tmp_path / "raw" / "all.npz"
    first = detect(run=run, store=store, raw_out=raw)
    low = detect(run=run, store=store, postprocess=LOW)
    monkeypatch.setattr(Toy, "forward", None)
    pd.testing.assert_frame_equal(resuppress(raw, Run.load(run).recipe.postprocess), first, check_exact=True)
    pd.testing.assert_frame_equal(resuppress(raw, LOW), low, check_exact=True)
    with np.load(raw) as file:
        assert file["segments"].dtype == file["scores"].dtype == np.float32
        assert len(file["videos"]) == 18
        assert file["extra/rows"].shape == file["scores"].shape


def test_raw_detections_round_trip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def segments(video: str, n: int) -> Segments:
        return Segments(
            video,
            torch.tensor(rng.random((n, 2)), dtype=torch.float32),
            torch.tensor(rng.integers(0, 3, n)),
            torch.tensor(rng.random(n), dtype=torch.float32),
            {"quality": torch.tensor(rng.random(n), dtype=torch.float32)},
        )

    raw = [segments("b/ü", 3), segments("a", 0), segments("c", 2)]
    save_raw(tmp_path / "r.npz", Raw(raw, ["x", "y", "ž"]))
    back = load_raw(tmp_path / "r.npz")
    assert back.classes == ["x", "y", "ž"]
    assert not back.class_agnostic
    assert back.class_scores is None
    assert [s.video for s in back.segments] == ["b/ü", "a", "c"]
    for one, other in zip(raw, back.segments, strict=True):
        for a, b in [
            (one.segments_s, other.segments_s),
            (one.labels, other.labels),
            (one.scores, other.scores),
            (one.extra["quality"], other.extra["quality"]),
        ]:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    save_raw(tmp_path / "none.npz", Raw([], ["x"]))
    assert resuppress(tmp_path / "none.npz", LOW).empty
    assert list(resuppress(tmp_path / "none.npz", LOW).columns) == COLUMNS


def test_what_is_no_raw_file_is_refused(trained: tuple[Path, Path, Path], tmp_path: Path) -> None:
    (tmp_path / "r.npz").write_bytes(b"no zip")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:-9])
    for name in ("r.npz", "other.npz", "absent.npz", "array.npy", "cut.npz"):
        with pytest.raises(RecipeError, match=f"{name} does not hold raw detections"):
            resuppress(tmp_path / name, LOW)
    with pytest.raises(RecipeError, match=r"must end in \.npz"):
        detect(run=trained[2], store=trained[0], raw_out=tmp_path / "raw")


def test_a_video_in_which_nothing_is_found(trained: tuple[Path, Path, Path], tmp_path: Path) -> None:
    found = detect(run=trained[2], store=trained[0], postprocess=PostprocessRecipe(min_score=2.0))
    assert found.empty
    assert list(found.columns) == COLUMNS
    write_predictions(tmp_path / "p.json", found)
    assert read_predictions(tmp_path / "p.json").empty


def test_the_table_is_what_the_writer_and_reader_of_predictions_take(
    trained: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    found = detect(run=trained[2], store=trained[0])
    for name in ("p.json", "p.csv"):
        write_predictions(tmp_path / name, found)
        assert len(read_predictions(tmp_path / name)) == len(found)


def test_hdf5_gives_the_same(trained: tuple[Path, Path, Path], tmp_path: Path) -> None:
    store, _, run = trained
    with open_store(store) as source, open_store(tmp_path / "f-h5", "a", format="hdf5") as target:
        for stream in ("rgb", "flow"):
            target.create_stream(stream, source.stream_attrs(stream)["spec"])
            for video in source.videos(stream):
                feature = source[stream, video]
                level = Level(feature.numpy(), feature.axis)
                attrs = feature.attrs["source"]
                target.write(stream, video, {"features": level}, duration_s=feature.duration_s, source=attrs)
    expected = detect(run=run, store=store)
    pd.testing.assert_frame_equal(detect(run=run, store=tmp_path / "f-h5"), expected, check_exact=True)


def test_long_videos_are_seen_whole(copied: tuple[Path, Path, Path]) -> None:
    """``max_rows`` cuts in training only."""
    store, _, run = copied
    text = (run / "recipe.yaml").read_text().replace("max_rows: 4096", "max_rows: 5")
    before = detect(run=run, store=store)
    (run / "recipe.yaml").write_text(text)
    assert Run.load(run).recipe.data.max_rows == 5
    pd.testing.assert_frame_equal(detect(run=run, store=store), before, check_exact=True)


def test_row_spacing_belongs_to_the_run(copied: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    store, _, run = copied
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("row_spacing: 1", "row_spacing: 2"))
    axes = []
    decode = Toy.decode

    def spy(self: Toy, outputs: Any, batch: Any) -> list[Segments]:
        axes.extend(batch.axes)
        return decode(self, outputs, batch)

    monkeypatch.setattr(Toy, "decode", spy)
    detect(run=run, store=store, videos=["video_000"])
    assert axes == [AXIS.pooled(2)]


def test_the_code_of_the_detection_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, annotations = make_world(tmp_path, training=5, testing=2, streams=("i3d-rgb", "i3d-flow"))
    store.rename(tmp_path / "features.zarr")
    assert annotations == tmp_path / "annotations.json"
    text = (Path(__file__).parents[2] / "docs" / "detect.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(blocks[0], namespace)
    assert not namespace["found"].empty
    assert not namespace["detector"].training
    table = re.findall(r"^\| ((?:`[\w.*/]+`(?:, )?)+) \|", text, re.MULTILINE)
    named = {name for cell in table for name in re.findall(r"`([\w.*/]+)`", cell)}
    assert {*FILES, "raw/*.npz"} <= named  # the page names every file of a run folder
