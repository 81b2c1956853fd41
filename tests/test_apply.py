"""Detection straight from videos with nothing but a run: the same as from the store that the run was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from tad.apply import detect_videos
from tad.cli import main
from tad.detect import detect, train_detector
from tad.errors import RecipeError, WeightsError
from tad.extract import build_backbone, extract
from tad.recipe import DetectRecipe, ExtractRecipe
from tad.store import open_store
from tad.synth import make_videos


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos, a checkpoint, features with levels of a second stream, and a run trained on both."""
    root = tmp_path_factory.mktemp("apply")
    make_videos(root / "videos", videos=4, seed=1, subset="training", duration_s=(6.0, 9.0), size=(64, 64))
    torch.save(build_backbone("tiny", weights="random:5").state_dict(), root / "tiny.pt")
    recipes = [
        ExtractRecipe(backbone="tiny", weights=str(root / "tiny.pt"), stride=4, fps=10.0),
        ExtractRecipe(backbone="tiny-flow", weights="random:2", stride=4, fps=10.0, flow="farneback"),
    ]
    extract(root / "videos", store=root / "features.zarr", recipes=recipes, names=["look", "move"])
    recipe = DetectRecipe(
        detector="talnet",
        streams=("look", "move"),
        model={"width": 16, "anchor_scales": [4, 8, 16]},
        train={"epochs": 2, "batch_videos": 2, "lr": 1e-3, "select": "last"},  # type: ignore[arg-type]
        data={"holdout": 0.0},  # type: ignore[arg-type]
        postprocess={"method": "nms", "tiou": 0.5, "max_segments": 20},  # type: ignore[arg-type]
    )
    annotations = next((root / "videos").glob("*.json"), None) or next(root.glob("*.json"))
    train_detector(recipe, store=root / "features.zarr", annotations=annotations, out=root / "run")
    return root


def same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    assert len(a) > 0
    pd.testing.assert_frame_equal(a, b, rtol=1e-3, atol=1e-3)


def test_a_video_gives_what_the_store_gives(made: Path) -> None:
    stored = detect(run=made / "run", store=made / "features.zarr")
    found = detect_videos(made / "videos", run=made / "run")
    assert not found.failures
    same(found.predictions, stored)
    assert found.predictions["start_s"].ge(0).all()


def test_features_are_kept_where_it_is_asked_and_used_again(made: Path, tmp_path: Path) -> None:
    first = detect_videos(made / "videos", run=made / "run", store=tmp_path / "kept")
    with open_store(tmp_path / "kept") as kept, open_store(made / "features.zarr") as original:
        for stream in ("look", "move"):
            assert kept.stream_attrs(stream)["fingerprint"] == original.stream_attrs(stream)["fingerprint"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("c.*")}
    same(detect_videos(made / "videos", run=made / "run", store=tmp_path / "kept").predictions, first.predictions)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("c.*")}


def test_weights_are_found_by_their_hash_wherever_they_are(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    (made / "tiny.pt").rename(tmp_path / "moved.pt")
    try:
        with pytest.raises(WeightsError, match=r"stream 'look'.*--weights look="):
            detect_videos(made / "videos", run=tmp_path / "run")
        found = detect_videos(made / "videos", run=tmp_path / "run", weights={"look": str(tmp_path / "moved.pt")})
        (tmp_path / "run/weights").mkdir()
        shutil.copy(tmp_path / "moved.pt", tmp_path / "run/weights/any name.pt")
        same(detect_videos(made / "videos", run=tmp_path / "run").predictions, found.predictions)
        torch.save(
            build_backbone("tiny", weights="random:6").state_dict(), made / "tiny.pt"
        )  # another file at the old place
        same(detect_videos(made / "videos", run=tmp_path / "run").predictions, found.predictions)
        (tmp_path / "run/weights/any name.pt").unlink()
        with pytest.raises(WeightsError, match="look"):
            detect_videos(made / "videos", run=tmp_path / "run")
    finally:
        (tmp_path / "moved.pt").rename(made / "tiny.pt")


def test_a_broken_video_is_reported_and_the_rest_is_searched(made: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    some = min((made / "videos").rglob("*.mp4"))
    done = CliRunner().invoke(
        main,
        ["detect", str(some), str(tmp_path / "broken.mp4"), "--run", str(made / "run"), "-o", str(tmp_path / "p.json")],
    )
    assert done.exit_code == 3, done.output
    assert "broken.mp4" in done.stderr
    assert list(json.loads((tmp_path / "p.json").read_text())["results"]) == [some.stem]
    shown = CliRunner().invoke(main, ["detect", str(some), "--run", str(made / "run"), "--set", "max_segments=3"])
    assert shown.exit_code == 0
    assert 1 <= len(json.loads(shown.stdout)["results"][some.stem]) <= 3


def test_imported_features_cannot_be_made_from_a_video(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    features = json.loads((tmp_path / "run/features.json").read_text())
    features["look"]["spec"] = {"imported": True, "fps": 30.0, "window": 16, "stride": 4}
    (tmp_path / "run/features.json").write_text(json.dumps(features))
    with pytest.raises(RecipeError, match="imported"):
        detect_videos(made / "videos", run=tmp_path / "run")
    for spec in ({"made": "by hand"}, {"weights": {"sha256": "0"}}):
        features["look"]["spec"] = spec
        (tmp_path / "run/features.json").write_text(json.dumps(features))
        with pytest.raises(RecipeError, match="'look' was not extracted by tad"):
            detect_videos(made / "videos", run=tmp_path / "run")
