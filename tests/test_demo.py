"""The demo: a small one whose files are checked one against the other, and (slow) the real one with its promise."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tad.annotations import read_predictions, read_truth
from tad.demo import run_demo
from tad.errors import RecipeError
from tad.evaluate import evaluate
from tad.store import open_store

SMALL = {
    "videos_train": 6,
    "videos_validation": 2,
    "videos_test": 2,
    "steps": 12,
    "epochs": 2,
    "duration_s": (10.0, 14.0),
}


def test_a_small_demo_leaves_files_that_agree_and_is_not_made_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    metrics = run_demo(out, **SMALL)  # type: ignore[arg-type]
    shown = capsys.readouterr()
    assert "mAP" in shown.out
    assert all(
        f"$ {command}" in shown.err for command in ("tad extract", "tad train-detector", "tad detect", "tad evaluate")
    )

    truth = read_truth(out / "annotations.json")
    subsets = truth.videos.groupby("subset")["video"].apply(set).to_dict()
    assert {name: len(videos) for name, videos in subsets.items()} == {"training": 6, "validation": 2, "testing": 2}
    assert not subsets["testing"] & (subsets["training"] | subsets["validation"])
    assert set(read_predictions(out / "predictions.json")["video"]) <= subsets["testing"]
    with open_store(out / "features.zarr") as store:
        assert set(store.videos("tiny")) == set().union(*subsets.values())
        assert store.verify(deep=True).ok
    again = evaluate(truth, read_predictions(out / "predictions.json"), subset="testing")
    written = json.loads((out / "metrics.json").read_text())
    assert written["average_map"] == metrics["average_map"] == pytest.approx(again.average, abs=1e-12)
    trained = json.loads((out / "run/features.json").read_text())["tiny"]["spec"]["weights"]
    assert trained.startswith("sha256:")  # the features are of the trained backbone

    before = {path: path.stat().st_mtime_ns for path in (out / "videos").iterdir()}
    second = run_demo(out, **SMALL, quiet=True)  # type: ignore[arg-type]
    assert second["map"] == metrics["map"]
    assert before == {path: path.stat().st_mtime_ns for path in (out / "videos").iterdir()}
    with pytest.raises(RecipeError):
        run_demo(out, **{**SMALL, "epochs": 3}, quiet=True)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 11])
def test_the_demo_keeps_its_promise(tmp_path: Path, seed: int) -> None:
    began = time.monotonic()
    metrics = run_demo(tmp_path / "demo", seed=seed, quiet=True)
    print(f"seed {seed}: mAP@0.5 {metrics['map']['0.5']:.3f} in {time.monotonic() - began:.0f} s")
    assert metrics["map"]["0.5"] >= 0.5
