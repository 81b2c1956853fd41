"""Training a backbone on clips: what a clip's label is, which clips are drawn, and that it learns, repeatably."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from tad.annotations import Truth, read_truth
from tad.errors import AnnotationError, RecipeError, TadError, VideoError
from tad.extract import build_backbone, extract
from tad.extract import finetune as module
from tad.extract.backbones.base import Backbone
from tad.extract.clips import (
    FIXED,
    ClipFormat,
    ClipSampler,
    VideoClips,
    clip_labels,
    flip,
    mirror_index,
    read_clips,
    read_frames,
)
from tad.extract.finetune import FinetuneRecipe, finetune, finetune_recipe, split_videos
from tad.extract.inputs import VideoFile, find_videos
from tad.extract.snippets import SnippetPlan
from tad.extract.video import Geometry
from tad.recipe import ExtractRecipe
from tad.store import open_store
from tad.synth import make_videos

FORM = ClipFormat(SnippetPlan(16, 1, 4), 12.5, Geometry(32, (32, 32)), None)


def segments(*rows: tuple[float, float, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["start_s", "end_s", "label"])


# ---- labels ---------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 8), st.floats(0.05, 5), st.sampled_from("abz")), max_size=6),
    st.integers(1, 40),
    st.integers(1, 30),
    st.sampled_from([8.0, 12.5, 25.0]),
)
def test_labels_are_those_of_the_centre(
    actions: list[tuple[float, float, str]], starts: int, span: int, fps: float
) -> None:
    table = segments(*[(start, start + length, label) for start, length, label in actions])
    labels, numbers = clip_labels(table, ["a", "b"], starts=starts, span=span, fps=fps)
    for i in range(starts):
        centre = (i + span / 2) / fps
        covering = [
            (end - start, {"a": 1, "b": 2}[label])
            for start, end, label in table.itertuples(index=False)
            if start <= centre < end and label != "z"
        ]
        assert (numbers[i] == -1) == (not covering)
        assert labels[i] in ({label for length, label in covering if length <= min(covering)[0] + 1e-9} or {0})


def test_of_nested_actions_the_shorter_one_counts() -> None:
    table = segments((1.0, 2.0, "dive"), (0.0, 4.0, "swim"), (3.0, 3.5, "unknown"))
    labels, actions = clip_labels(table, ["dive", "swim"], starts=40, span=10, fps=10.0)
    assert labels.tolist() == [2] * 5 + [1] * 10 + [2] * 20 + [0] * 5
    assert actions[-1] == -1
    assert len(set(actions.tolist())) == 3


def test_a_video_shorter_than_a_clip_has_one_that_repeats_its_end() -> None:
    frames = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    video = VideoClips("v", frames, np.zeros(1, np.int64), np.full(1, -1))
    assert video.cut(0, np.arange(0, 16, 2)).ravel().tolist() == [0, 2, 4, 4, 4, 4, 4, 4]


# ---- sampling -------------------------------------------------------------------------------------------------------
def numbered(count: int, spans: list[tuple[int, int, int]]) -> VideoClips:
    """A video whose frame k shows k, with labels by (first start, after, class)."""
    frames = np.zeros((count, 2, 3, 3), np.uint8)
    frames[:, 0] = np.arange(count)[:, None, None]
    frames[:, 1, 0] = 255  # the left edge, so that a flip shows
    labels, actions = np.zeros(count - 7, np.int64), np.full(count - 7, -1)
    for number, (first, after, label) in enumerate(spans):
        labels[first:after], actions[first:after] = label, number
    return VideoClips("v", frames, labels, actions)


def drawn(sampler: ClipSampler, steps: int) -> list[tuple[int, int, bool]]:
    """First frame, label and flipped or not of every clip."""
    found = []
    for step in range(steps):
        clips, labels = sampler.draw(step)
        assert clips.dtype == torch.uint8
        for clip, label in zip(clips, labels.tolist(), strict=True):
            first = int(clip[0, 0, 0, 0])
            assert clip[:, 0, 0, 0].tolist() == [first + offset for offset in range(8)]
            found.append((first, label, bool(clip[0, 1, -1, 0] == 255)))
    return found


def test_clips_are_drawn_in_their_shares() -> None:
    video = numbered(200, [(10, 100, 1), (110, 112, 1), (120, 150, 2)])
    sampler = ClipSampler([video], classes=3, offsets=np.arange(8), batch=50, background=0.4, seed=1)
    clips = drawn(sampler, 60)  # 3000
    assert all(video.labels[first] == label for first, label, _ in clips)
    assert not any(flipped for *_, flipped in clips)
    share = {k: sum(label == k for _, label, _ in clips) / 3000 for k in (0, 1, 2)}
    assert share == pytest.approx({0: 0.4, 1: 0.3, 2: 0.3}, abs=0.04)
    short = sum(110 <= first < 112 for first, *_ in clips) / 3000
    assert short == pytest.approx(0.15, abs=0.03)  # half of its class, though it is 45 times as short
    calm = [first for first, label, _ in clips if label == 0]
    assert {first for first in calm if first >= 150} == set(range(150, 193))
    assert np.mean(np.array(calm) >= 150) == pytest.approx(43 / 71, abs=0.06)  # background is uniform over time


def test_a_step_draws_the_same_whenever_it_is_asked_and_steps_differ() -> None:
    def made() -> ClipSampler:
        return ClipSampler(
            [numbered(90, [(10, 60, 1)])], classes=1, offsets=np.arange(8), batch=8, background=0.5, seed=3
        )

    one, two = made(), made()
    later = one.draw(7)
    [two.draw(k) for k in range(7)]
    assert all(torch.equal(a, b) for a, b in zip(later, two.draw(7), strict=True))
    assert not torch.equal(one.draw(0)[0], one.draw(1)[0])


def test_flipped_clips_have_the_mirrored_label() -> None:
    mirror = mirror_index(["left", "right", "text", "up"], {"left": "right", "right": "left", "text": None})
    assert mirror is not None
    assert mirror.tolist() == [0, 2, 1, FIXED, 4]
    video = numbered(200, [(10, 40, 1), (50, 80, 2), (90, 120, 3), (130, 160, 4)])
    sampler = ClipSampler([video], classes=4, offsets=np.arange(8), batch=50, background=0.3, mirror=mirror)
    clips = drawn(sampler, 20)
    for first, label, flipped in clips:
        assert label == (mirror if flipped else np.arange(5))[video.labels[first]]
    assert np.mean([flipped for first, _, flipped in clips if video.labels[first] != 3]) == pytest.approx(0.5, abs=0.06)


def test_flow_is_flipped_with_its_sign() -> None:
    clip = np.array([[[[128, 10], [0, 20], [255, 30], [200, 40]]]], np.uint8)  # (1, 1, 4, 2)
    assert flip(clip).tolist() == [[[[56, 40], [1, 30], [255, 20], [128, 10]]]]
    assert flip(clip[..., :1]).tolist() == [[[[200], [255], [0], [128]]]]


@pytest.mark.parametrize(
    ("mirror", "message"),
    [
        ({"left": "right"}, "does not become 'left'"),
        ({"left": "rigth", "rigth": "left"}, "Did you mean 'right'"),
        ({"lefd": None}, "Did you mean 'left'"),
        ({"left": "right", "right": None}, "does not become 'left'"),
    ],
)
def test_a_mirror_that_cannot_be_meant_is_refused(mirror: dict[str, str | None], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        mirror_index(["left", "right"], mirror)


def test_nothing_to_tell_apart() -> None:
    for spans, message in (([], "inside an action"), ([(0, 93, 1)], "outside of all actions")):
        with pytest.raises(RecipeError, match=message):
            ClipSampler([numbered(100, spans)], classes=1, offsets=np.arange(8), batch=2, background=0.5)


# ---- accuracy -------------------------------------------------------------------------------------------------------
class Oracle(Backbone):
    """Its features are the pixels of the first frame's first row."""

    spec = build_backbone("tiny").spec

    def forward(self, clips: Tensor, *, levels: bool = False) -> dict[str, Tensor]:
        return {"features": clips[:, 0, 0, 0]}  # (B, W)

    def normalise(self, clips: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return clips.to(dtype)


def test_accuracy_is_counted_on_the_windows_of_extraction() -> None:
    guess = np.zeros((41, 1, 3, 3), np.uint8)  # one-hot over the three classes, by frame
    truth = np.repeat([0, 1, 0, 2], [10, 10, 6, 8])  # by start, of 41 - 7 starts
    seen = np.repeat([0, 1, 2, 2], [10, 8, 8, 15])  # by frame: 18 and 19 are taken for 2, so are 20 to 25
    guess[np.arange(41), 0, seen] = 255
    video = VideoClips("v", guess, truth, np.zeros(34, np.int64))
    head = torch.nn.Linear(3, 3)
    torch.nn.init.eye_(head.weight)
    scores = module._score(Oracle(), head, [video], ["a", "b"], np.arange(8))
    # starts 0, 4, 8 | 12, 16 | 20, 24 | 28, 32: right but for 20 and 24, which are background
    assert scores["clips"] == 9
    assert scores["top1"] == pytest.approx(7 / 9)
    assert scores["background_recall"] == pytest.approx(3 / 5)
    assert scores["recall"] == {"a": 1.0, "b": 1.0}
    assert scores["class_recall"] == 1.0


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


RECIPE = FinetuneRecipe(backbone="tiny", train_subset="training", holdout_subset="validation", steps=60, mirror={})


def trained(made: Path, out: Path, recipe: FinetuneRecipe = RECIPE, **options: object) -> dict[str, object]:
    given = {"videos": made / "videos", "annotations": made / "annotations.json", "device": "cpu"}
    return finetune(recipe, out=out, **{**given, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "tiny"
    state = torch.random.get_rng_state()
    trained(made, out)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's random numbers are left alone
    return out


def test_it_learns_motion(folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    losses = [row["loss"] for row in metrics["losses"]]
    assert metrics["losses"][-1]["step"] == 60
    assert losses[-1] < 0.75 * losses[0]
    assert metrics["classes"] == ["bounce", "swing"]
    assert metrics["counts"] == {"train_videos": 8, "holdout_videos": 3}
    assert metrics["holdout"]["class_recall"] > 0.6  # unseen videos; guessing gives a third
    assert sorted(path.name for path in folder.iterdir()) == ["backbone.safetensors", "metrics.json", "recipe.yaml"]


def test_the_same_call_gives_the_same_weights(made: Path, folder: Path, tmp_path: Path) -> None:
    torch.rand(7)
    trained(made, tmp_path / "again")
    weights = (folder / "backbone.safetensors").read_bytes()
    assert (tmp_path / "again/backbone.safetensors").read_bytes() == weights
    trained(made, tmp_path / "other", RECIPE.model_copy(update={"seed": 1, "steps": 2}))
    assert (tmp_path / "other/backbone.safetensors").read_bytes() != weights


def test_extraction_reads_the_weights_and_sees_what_was_trained_on(made: Path, folder: Path, tmp_path: Path) -> None:
    checkpoint = str(folder / "backbone.safetensors")
    with safe_open(checkpoint, "pt") as file:
        about = json.loads(file.metadata()["tad"])
    assert about["classes"] == ["bounce", "swing"]
    assert (about["backbone"], about["recipe"]["window"], about["recipe"]["steps"]) == ("tiny", 16, 60)
    backbone = build_backbone("tiny", weights=checkpoint)
    assert not backbone.training
    files = find_videos([made / "videos"])[:2]
    extract(
        [f.path for f in files], store=tmp_path / "s.zarr", recipes=ExtractRecipe(backbone="tiny", weights=checkpoint)
    )
    clips = read_clips(files, segments().assign(video=""), ["swing"], FORM, max_memory_gb=1, failures=[])
    with open_store(tmp_path / "s.zarr") as store, torch.inference_mode():
        for file in files:
            video, rows = clips[file.video], store["tiny", file.video]
            whole = [video.cut(start, FORM.offsets()) for start in range(0, len(video.labels), 4)]
            windows = torch.from_numpy(np.stack(whole)).permute(0, 4, 1, 2, 3)
            expected = backbone(backbone.normalise(windows))["features"].numpy()
            np.testing.assert_allclose(rows.numpy()[: len(whole)], expected, atol=1e-4)
            assert len(rows.numpy()) - len(whole) <= 1  # extraction repeats the end for one more


def test_flow_frames_are_those_of_the_flow_stream(made: Path) -> None:
    file = find_videos([made / "videos"])[0]
    form = ClipFormat(SnippetPlan(16, 1, 4), None, Geometry(64, (64, 48)), "farneback")
    frames, fps = read_frames(file.path, form, max_bytes=10**9)
    rgb, _ = read_frames(file.path, ClipFormat(form.snippets, None, form.geometry, None), max_bytes=10**9)
    assert fps == 12.5
    assert frames is not None
    assert rgb is not None
    assert frames.shape == (*rgb.shape[:3], 2)
    assert np.array_equal(frames[-1], frames[-2])  # the last flow is repeated


def test_a_finished_training_is_reused_or_replaced_only_when_told(made: Path, folder: Path) -> None:
    before = (folder / "backbone.safetensors").stat().st_mtime_ns
    metrics = trained(made, folder, reuse=True)
    assert metrics == json.loads((folder / "metrics.json").read_text())
    with pytest.raises(RecipeError, match="overwrite"):
        trained(made, folder)
    other = RECIPE.model_copy(update={"lr": 1e-3})
    with pytest.raises(RecipeError, match="another recipe"):
        trained(made, folder, other, reuse=True)
    assert (folder / "backbone.safetensors").stat().st_mtime_ns == before


def test_overwrite_replaces(made: Path, tmp_path: Path) -> None:
    short = RECIPE.model_copy(update={"steps": 2})
    trained(made, tmp_path, short)
    once = (tmp_path / "backbone.safetensors").read_bytes()
    trained(made, tmp_path, short.model_copy(update={"lr": 1e-2}), reuse=True, overwrite=True)
    assert (tmp_path / "backbone.safetensors").read_bytes() != once
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(RecipeError, match="not that of a trained backbone"):
        trained(made, tmp_path, short, reuse=True)


def test_one_broken_video_is_listed_and_the_rest_is_used(made: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for path in (made / "videos").iterdir():
        broken = path.stem == "training-003"
        (videos / path.name).write_bytes(b"no video" * 50 if broken else path.read_bytes())
    metrics = trained(made, tmp_path / "out", RECIPE.model_copy(update={"steps": 2}), videos=videos)
    assert metrics["counts"] == {"train_videos": 7, "holdout_videos": 3}
    (failure,) = metrics["failures"]  # type: ignore[misc]
    assert failure["video"] == "training-003"
    for path in videos.iterdir():
        path.write_bytes(b"no video" * 50)
    with pytest.raises(VideoError, match="not one of the 11 videos"):
        trained(made, tmp_path / "none", videos=videos)


def test_memory_is_bounded_before_it_is_full(made: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"max_memory_gb=0\.001"):
        trained(made, tmp_path, RECIPE.model_copy(update={"max_memory_gb": 0.001}))
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_it(made: Path, tmp_path: Path) -> None:
    with pytest.raises(TadError, match="lower lr"):
        trained(made, tmp_path, RECIPE.model_copy(update={"lr": 1e30, "warmup": 0.0}))
    assert not list(tmp_path.iterdir())


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
    path.write_text("backbone: tiny\nsteps: 5\n")
    assert finetune_recipe(file=path, sets=["lr=1e-2"], seed=4) == FinetuneRecipe(
        backbone="tiny", steps=5, lr=0.01, seed=4
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


def test_a_fixed_size_and_a_shortest_window_are_kept() -> None:
    backbone = Oracle()
    backbone.spec = replace(backbone.spec, any_size=False, min_frames=9)
    recipe = FinetuneRecipe(backbone="tiny", weights="random")
    filled, form = module.resolved(recipe, backbone)
    assert (filled.window, filled.interval, filled.fps, filled.crop) == (16, 1, 12.5, (32, 32))
    assert form == FORM
    for change, message in (({"window": 8}, "at least 9 frames"), ({"crop": (32, 40)}, "32x32 only")):
        with pytest.raises(RecipeError, match=message):
            module.resolved(recipe.model_copy(update=change), backbone)
