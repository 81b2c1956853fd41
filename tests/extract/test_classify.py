"""Scores of whole videos: what they are the mean of, the file that holds them, resuming, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from tad.annotations import Truth, read_scores_about, read_truth, read_video_scores, write_video_scores
from tad.errors import AnnotationError, RecipeError, WeightsError
from tad.evaluate.classification import classification_scores
from tad.extract import build_backbone
from tad.extract import classify as module
from tad.extract.backbones import own
from tad.extract.backbones.tiny import Tiny3D
from tad.extract.classify import classify, spread
from tad.extract.clips import ClipFormat, read_frames
from tad.extract.finetune import FinetuneRecipe, finetune
from tad.extract.finetune_run import FinetunedRun
from tad.extract.inputs import find_videos
from tad.extract.score_file import video_accuracy
from tad.extract.snippets import SnippetPlan
from tad.extract.video import Geometry
from tad.synth import make_video, make_videos
from tad.training.files import write_weights


# ---- the file -------------------------------------------------------------------------------------------------------
def table(rows: dict[str, list[float]], classes: list[str]) -> pd.DataFrame:
    return pd.DataFrame.from_dict(rows, orient="index", columns=classes).rename_axis("video")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(min_size=1, max_size=8).filter(lambda t: t.strip() and t.isprintable()), unique=True, min_size=1),
    st.lists(st.text(min_size=1, max_size=8).filter(lambda t: t.strip() and t.isprintable()), unique=True, max_size=6),
    st.data(),
)
def test_scores_come_back_number_by_number(
    tmp_path_factory: pytest.TempPathFactory, classes: list[str], videos: list[str], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("scores") / "s.json"
    numbers = st.floats(allow_nan=False, allow_infinity=False)
    rows = {video: data.draw(st.lists(numbers, min_size=len(classes), max_size=len(classes))) for video in videos}
    scores = pd.DataFrame(list(rows.values()), index=pd.Index(videos, name="video", dtype="str"), columns=classes)
    scores = scores.astype(float)
    write_video_scores(path, scores, about={"backbone": "x", "sources": {"ü/1": [1]}})
    pd.testing.assert_frame_equal(read_video_scores(path), scores, check_exact=True, check_column_type=False)
    assert read_scores_about(path) == {"backbone": "x", "sources": {"ü/1": [1]}}
    assert json.loads(path.read_text(encoding="utf-8"))["version"] == "tad-video-scores-1"


def test_the_cuhk_layout_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cuhk.json"
    content = {"results": {"_1vYKA7mNLI": [0.5, 1e-7], "b": [0, "0.25"]}, "class": ["Surfing", "Archery"]}
    path.write_text(json.dumps(content))
    scores = read_video_scores(path)
    assert scores.index.tolist() == ["_1vYKA7mNLI", "b"]
    assert scores.columns.tolist() == ["Surfing", "Archery"]
    assert scores.to_numpy().tolist() == [[0.5, 1e-7], [0.0, 0.25]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"results": {}}, "names no classes"),
        ({"classes": ["a"]}, "no scores of videos"),
        ([1], "no scores of videos"),
        ({"classes": ["a"], "results": [], "version": "tad-video-scores-1"}, "no scores of videos"),
        ({"classes": ["a"], "results": {}, "version": "tad-video-scores-2"}, "update tad"),
        ({"classes": [], "results": {}}, "there is none"),
        ({"classes": ["a", "a"], "results": {}}, "'a' more than once"),
        ({"classes": ["a", 3], "results": {"v": [1, 2]}}, "class 1: a class must be text"),
        ({"classes": ["a", "b"], "results": {"v": [1]}}, r"video 'v': needs a list of 2 scores, got 1 scores"),
        ({"classes": ["a"], "results": {"v": 1}}, "needs a list of 1 scores, got 1"),
        ({"classes": ["a"], "results": {"v": [None]}}, "finite numbers"),
        ({"classes": ["a"], "results": {"v": [float("nan")]}}, "finite numbers"),
        ({"classes": ["a"], "results": {" ": [1]}}, "a video id is empty"),
    ],
)
def test_malformed_scores_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match=message):
        read_video_scores(path)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    good = table({"v": [0.5, 0.5]}, ["a", "b"])
    for scores, options, message in (
        (table({"v": [0.5, float("inf")]}, ["a", "b"]), {}, "video 'v': scores must be finite"),
        (table({"v": [0.5, 0.5]}, ["a", "a"]), {}, "a class occurs more than once"),
        (pd.concat([good, good]), {}, "a video occurs more than once"),
        (table({"": [0.5, 0.5]}, ["a", "b"]), {}, "a video is empty"),
        (good[[]], {}, "there is no class"),
        (good, {"about": {"results": 1}}, "is the file's own"),
    ):
        with pytest.raises(AnnotationError, match=message):
            write_video_scores(tmp_path / "s.json", scores, **options)  # type: ignore[arg-type]
    with pytest.raises(AnnotationError, match=r"written as \.json"):
        write_video_scores(tmp_path / "s.csv", good)
    assert not list(tmp_path.iterdir())


# ---- accuracy -------------------------------------------------------------------------------------------------------
def truth_of(**labels: list[str]) -> Truth:
    videos = pd.DataFrame([(v, "", 10.0, 25.0) for v in labels], columns=["video", "subset", "duration_s", "fps"])
    rows = [(v, 1.0, 2.0, label, "") for v, some in labels.items() for label in some]
    return Truth(videos, pd.DataFrame(rows, columns=["video", "start_s", "end_s", "label", "subset"]))


def test_accuracy_by_hand() -> None:
    classes = list("abcdefg")
    scores = table(
        {
            "one": [0.9, 0.1, 0, 0, 0, 0, 0],
            "two": [0.6, 0.5, 0, 0, 0, 0, 0.1],
            "three": [0.3, 0.25, 0.2, 0.1, 0.08, 0.07, 0.0],
            "none": [0.7, 0, 0, 0, 0, 0, 0],
        },
        classes,
    )
    truth = truth_of(one=["a"], two=["b", "b", "zz"], three=["g"], none=[])
    found = video_accuracy(scores, truth)
    assert found is not None
    assert (found["videos"], found["top1"], found["top5"]) == (3, 1 / 3, 2 / 3)
    assert found["map"] == pytest.approx((1 + 1 + 1 / 3) / 3)  # a: one is first; b: two; g: behind two and one
    assert video_accuracy(scores, truth_of(one=["q"])) is None
    assert video_accuracy(scores.iloc[:0], truth) is None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_accuracy_is_that_of_evaluate(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes = [f"c{k}" for k in range(6)]
    labels = {f"v{k}": list(rng.choice(classes, rng.integers(1, 3), replace=False)) for k in range(12)}
    scores = table({v: rng.permutation(6).astype(float).tolist() for v in labels}, classes)
    scores += rng.random(scores.shape) * 0.1
    found, reference = video_accuracy(scores, truth_of(**labels)), classification_scores(truth_of(**labels), scores)
    assert found is not None
    assert (found["top1"], found["top5"]) == pytest.approx((reference.top1, reference.top5))
    assert found["map"] == pytest.approx(reference.map, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 50))
def test_clips_are_spread_evenly(frames: int, span: int, clips: int) -> None:
    firsts = spread(frames, span, clips)
    starts = max(1, frames - span + 1)
    assert len(firsts) == min(clips, starts)
    assert 0 <= firsts[0] <= firsts[-1] < starts
    if clips <= starts:
        assert np.ptp(np.diff(firsts)) <= 1 if len(firsts) > 1 else abs(firsts[0] - starts / 2) <= 1
        assert abs(firsts[0] - (starts - 1 - firsts[-1])) <= 1 + starts / clips  # as far from both ends


# ---- classifying ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    options = {"duration_s": (4.0, 6.0), "size": (32, 32), "classes": ("bounce", "swing"), "action_s": (1.5, 3.0)}
    make_videos(root, videos=3, subset="training", **options)  # type: ignore[arg-type]
    make_videos(root, videos=2, subset="validation", **options)  # type: ignore[arg-type]
    return root


@pytest.fixture(scope="module")
def run(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "tiny"
    recipe = FinetuneRecipe(backbone="tiny", epochs=1, steps=3, window=12, interval=2)
    finetune(recipe, videos=made / "videos", annotations=made / "annotations.json", out=out, device="cpu")
    return out


FORM = ClipFormat(SnippetPlan(12, 2, 4), None, Geometry(32, (32, 32)), None)


def windows(path: Path, clips: int) -> torch.Tensor:
    """Clips of a video cut by hand, (B, C, T, H, W) uint8."""
    frames, _ = read_frames(path, FORM, max_bytes=1e9)
    assert frames is not None
    starts = len(frames) - 23 + 1
    firsts = [int((k + 0.5) * starts / clips) for k in range(clips)]
    return torch.from_numpy(np.stack([frames[first : first + 23 : 2] for first in firsts])).permute(0, 4, 1, 2, 3)


def test_scores_are_the_mean_over_clips_without_the_background(made: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    report = classify(made / "videos", weights=run, out=out, clips=5, batch=2, device="cpu")
    assert (report.written, report.already, report.failures, report.accuracy) == (5, 0, [], None)
    scores = read_video_scores(out)
    pd.testing.assert_frame_equal(scores, report.scores)
    loaded = FinetunedRun.load(run)
    for file in find_videos([made / "videos"]):
        with torch.inference_mode():
            features = loaded.backbone(loaded.backbone.normalise(windows(file.path, 5)))["features"]
            mean = torch.softmax(loaded.head(features), 1).double().mean(0)[1:]
        expected = (mean / mean.sum()).tolist()
        assert scores.loc[file.video].tolist() == pytest.approx(expected, abs=2e-6)
        assert scores.loc[file.video].sum() == pytest.approx(1, abs=1e-6)
    about = read_scores_about(out)
    assert (about["backbone"], about["clips"], about["window"], about["interval"]) == ("tiny", 5, 12, 2)
    assert about["weights"] == loaded.backbone.weights_id
    assert set(about["sources"]) == set(scores.index)


def test_subset_and_accuracy(made: Path, run: Path, tmp_path: Path) -> None:
    truth = read_truth(made / "annotations.json")
    options = {"weights": run, "out": tmp_path / "s.json", "clips": 3, "annotations": truth, "device": "cpu"}
    report = classify(made / "videos", subset="validation", **options)  # type: ignore[arg-type]
    assert report.scores.index.tolist() == ["validation-000", "validation-001"]
    assert report.accuracy == video_accuracy(report.scores, truth)
    assert report.accuracy is not None
    with pytest.raises(AnnotationError, match="none of the video files is of subset 'training'"):
        classify(sorted((made / "videos").glob("val*")), subset="training", **options)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="subset needs the annotations"):
        classify(made / "videos", weights=run, out=tmp_path / "t.json", subset="training")


def test_what_is_there_is_not_done_again(
    made: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for path in sorted((made / "videos").iterdir())[:3]:
        (videos / path.name).write_bytes(path.read_bytes())
    options = {"weights": run, "out": tmp_path / "s.json", "clips": 2, "device": "cpu"}
    first = classify(sorted(videos.iterdir())[:2], **options)  # type: ignore[arg-type]
    before = read_video_scores(tmp_path / "s.json")
    (videos / "training-001.mp4").write_bytes((made / "videos" / "validation-000.mp4").read_bytes())
    second = classify(videos, **options)  # type: ignore[arg-type]
    assert (first.written, second.written, second.already) == (2, 2, 1)  # a new one, and one that has changed
    after = read_video_scores(tmp_path / "s.json")
    assert after.index.tolist() == ["training-000", "training-001", "training-002"]
    assert (after.loc["training-000"] == before.loc["training-000"]).all()
    assert (after.loc["training-001"] != before.loc["training-001"]).any()
    stamp = (tmp_path / "s.json").stat().st_mtime_ns
    monkeypatch.setattr(module, "count_frames", None)  # nothing is even opened
    assert classify(videos, **options).already == 3  # type: ignore[arg-type]
    assert (tmp_path / "s.json").stat().st_mtime_ns == stamp
    with pytest.raises(RecipeError, match=r"made otherwise \(clips\)"):
        classify(videos, **{**options, "clips": 3})  # type: ignore[arg-type]
    monkeypatch.undo()
    assert classify(videos, overwrite=True, **{**options, "clips": 3}).written == 3  # type: ignore[arg-type]


def test_an_interrupted_call_keeps_what_it_has(made: Path, run: Path, tmp_path: Path) -> None:
    import contextlib

    class Bar:
        seen = 0

        def advance(self, n: float = 1.0, note: str = "") -> None:
            self.seen += 1
            if self.seen == 2:
                raise KeyboardInterrupt

    options = {"weights": run, "out": tmp_path / "s.json", "clips": 2, "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        classify(made / "videos", progress=lambda *_: contextlib.nullcontext(Bar()), **options)  # type: ignore[arg-type]
    assert len(read_video_scores(tmp_path / "s.json")) == 2
    report = classify(made / "videos", **options)  # type: ignore[arg-type]
    assert (report.written, report.already) == (3, 2)


def test_bad_videos_are_listed_and_the_rest_is_scored(made: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video" * 50)
    make_video(tmp_path / "short.mp4", duration_s=0.4, seed=1, size=(32, 32))
    good = sorted((made / "videos").iterdir())
    inputs = [tmp_path / "gone.mp4", good[0], tmp_path / "bad.mp4", good[1], tmp_path / "short.mp4", tmp_path / "z.mp4"]
    report = classify(inputs, weights=run, out=tmp_path / "s.json", clips=4, device="cpu")
    assert [failure["video"] for failure in report.failures] == ["gone", "bad", "z"]
    assert report.scores.index.tolist() == ["training-000", "training-001", "short"]
    alone = classify(good[1], weights=run, out=tmp_path / "alone.json", clips=4, device="cpu")
    assert alone.scores.loc["training-001"].tolist() == report.scores.loc["training-001"].tolist()
    nothing = classify(tmp_path / "bad.mp4", weights=run, out=tmp_path / "none.json", device="cpu")
    assert len(nothing.failures) == 1
    assert read_video_scores(tmp_path / "none.json").shape == (0, 2)


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    made: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = sorted((made / "videos").iterdir())
    grows = tmp_path / "grows.mp4"
    grows.write_bytes(good[0].read_bytes())
    probabilities = module._probabilities

    def meanwhile(*given: Any) -> np.ndarray:
        grows.write_bytes(good[2].read_bytes())
        return probabilities(*given)

    monkeypatch.setattr(module, "_probabilities", meanwhile)
    same = {"weights": run, "out": tmp_path / "s.json", "clips": 2, "device": "cpu"}
    report = classify([grows, good[1]], **same)  # type: ignore[arg-type]
    assert [failure["video"] for failure in report.failures] == ["grows"]
    assert "changed while it was read" in report.failures[0]["message"]
    assert report.scores.index.tolist() == ["training-001"]
    monkeypatch.undo()
    assert classify(grows, **same).written == 1  # type: ignore[arg-type]


class Classifying(Tiny3D):
    """A stand-in for a public network: its own classifier tells which of three features is largest."""

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, :3] * 5


def test_a_public_checkpoint_is_asked_itself(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Classifying()
    network.arguments = {}
    network.eval()
    write_weights(tmp_path / "public.safetensors", network.state_dict())
    monkeypatch.setattr("tad.extract.classify.load_backbone", lambda path: network)
    files = find_videos([made / "videos"])[:2]
    options = {"weights": tmp_path / "public.safetensors", "clips": 3, "device": "cpu"}
    report = classify([f.path for f in files], out=tmp_path / "a.json", **options)  # type: ignore[arg-type]
    assert report.scores.columns.tolist() == ["class_0", "class_1", "class_2"]
    for file in files:
        frames, _ = read_frames(file.path, FORM, max_bytes=1e9)
        assert frames is not None
        starts = len(frames) - 16 + 1
        some = [frames[int((k + 0.5) * starts / 3) :][:16] for k in range(3)]
        with torch.inference_mode():
            x = torch.from_numpy(np.stack(some)).permute(0, 4, 1, 2, 3)
            expected = torch.softmax(network(network.normalise(x))["features"][:, :3] * 5, 1).mean(0).tolist()
        assert report.scores.loc[file.video].tolist() == pytest.approx(expected, abs=1e-5)
    (tmp_path / "names.txt").write_text("eins\nzwei\ndrü\n\n", encoding="utf-8")
    named = classify(files[0].path, out=tmp_path / "b.json", classes=tmp_path / "names.txt", **options)  # type: ignore[arg-type]
    assert named.scores.columns.tolist() == ["eins", "zwei", "drü"]
    for names, message in ((["a"], "1 class names for the 3 classes"), (["a", "a", "b"], "none twice")):
        with pytest.raises(RecipeError, match=message):
            classify(files[0].path, out=tmp_path / "c.json", classes=names, **options)  # type: ignore[arg-type]


def test_what_cannot_classify_is_refused(made: Path, run: Path, tmp_path: Path) -> None:
    given = {"out": tmp_path / "s.json", "device": "cpu"}
    with pytest.raises(RecipeError, match=r"its classifier is used with the folder"):
        classify(made / "videos", weights=run / "backbone.safetensors", **given)  # type: ignore[arg-type]
    backbone = build_backbone("tiny", "random")
    write_weights(tmp_path / "tiny.safetensors", backbone.state_dict(), network=own.described(backbone))
    with pytest.raises(RecipeError, match="tiny has no classifier"):
        classify(made / "videos", weights=tmp_path / "tiny.safetensors", **given)  # type: ignore[arg-type]
    for options, message in (
        ({"weights": run, "backbone": "i3d-rgb"}, "is of tiny, not of i3d-rgb"),
        ({"weights": run, "classes": ["a"]}, "leave classes out"),
        ({"weights": run, "clips": 0}, "at least 1"),
        ({"weights": run, "precision": "fp16"}, "needs a CUDA device"),
        ({"weights": run, "out": "s.csv"}, r"written as \.json"),
    ):
        with pytest.raises(RecipeError, match=message):
            classify(made / "videos", **{**given, **options})  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="cannot be read"):
        classify(made / "videos", weights=tmp_path / "nothing.pth", **given)  # type: ignore[arg-type]
    assert not (tmp_path / "s.json").exists()
    assert load_file(str(run / "head.safetensors"))["weight"].shape == (3, 128)
    assert isinstance(FinetunedRun.load(run).head, nn.Linear)
