"""The benchmark of the pyramids trains what its tables say, on what it extracts; how good it becomes is not tested."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import pyramids as benchmark
from benchmarks import trainings
from tad.annotations import read_truth
from tad.detect.align import check_needs, level_factors
from tad.detect.detectors import DETECTORS, build_detector
from tad.detect.recipes import detect_recipe
from tad.detect.windows import detection_stride_fits
from tad.extract.backbones import i3d, tiny
from tad.store import open_store

WIDTHS = {"i3d": {"s2": 480, "s4": 832, "s8": 1024}, "tiny": {"s1": 32, "s2": 64, "s4": 128}}
SPECS = {"i3d": i3d.SPECS[3], "tiny": tiny.RGB}
CELLS = [(name, table, row) for name in WIDTHS for table, rows in benchmark.TABLES.items() for row in rows]
SMALL = ["--training", "2", "--testing", "1", "--seconds", "6", "7", "--backbone", "tiny"]
NETWORK = [
    "train.epochs=1", "model.width=8", "model.heads=1", "model.proposals=4", "model.feedforward=8",
    "model.interaction_width=2",
]  # fmt: skip


@pytest.mark.parametrize("name", WIDTHS)
def test_levels_are_those_of_the_backbones(name: str) -> None:
    network = benchmark.NETWORKS[name]
    spec = SPECS[name]
    assert spec.name == network.stream
    assert {level: info.stride for level, info in spec.levels.items()} == network.levels
    assert {level: info.channels for level, info in spec.levels.items()} == WIDTHS[name]
    assert network.maps == list(network.levels)[1:]
    for stride in network.levels.values():
        assert network.window % stride == network.stride % stride == 0


def recipe_of(name: str, table: str, row: str, frame_size: int = 48):
    network = benchmark.NETWORKS[name]
    sets = benchmark.row_sets(network, table, row, widths=WIDTHS[name], frame_size=frame_size)
    return detect_recipe(file=benchmark.RECIPES / benchmark.FILES[table], sets=sets)


@pytest.mark.parametrize(("name", "table", "row"), CELLS)
def test_every_row_sees_clips_of_the_same_frames(name: str, table: str, row: str) -> None:
    network, recipe = benchmark.NETWORKS[name], recipe_of(name, table, row)
    maps = {level: (WIDTHS[name][level], 3, 2) for level in network.maps}
    stored: dict[str, dict[str, tuple[int, ...]]] = {
        network.stream: {"features": (9,), **{f"{level}-map": shape for level, shape in maps.items()}},
        "frames": {"features": (3, 48, 48)},
    }
    detector_class, model = DETECTORS[recipe.detector], dict(recipe.model)
    if table == "table6":
        model = detector_class.resolve_shapes(model, {stream: stored[stream] for stream in recipe.streams})
    with torch.device("meta"):
        channels = {stream: 3 if stream == "frames" else 9 for stream in recipe.streams}
        detector = build_detector(recipe.detector, channels=channels, classes=8, **model)
    check_needs(detector.needs, detector=recipe.detector)
    detection_stride_fits(detector.needs, recipe.data)
    frames = {"frames": 1} | {
        f"{network.stream}/{level}{kind}": stride for level, stride in network.levels.items() for kind in ("", "-map")
    }
    read = {need.key: need.rows * frames[need.key] for need in detector.needs}
    assert set(read.values()) == {256}
    first = frames[detector.needs[0].key]
    assert (recipe.data.train_stride * first, recipe.data.detect_stride * first) == (64, 128)
    assert [factor * first for factor in level_factors(detector.needs)] == [frames[n.key] for n in detector.needs]
    shapes = {need.key: need.shape for need in detector.needs if need.shape is not None}
    if table == "table5":
        levels = list(network.levels) if row == "inter" else list(network.levels)[-1:]
        assert list(read) == [f"{network.stream}/{level}" for level in levels]
        assert detector.widths == [WIDTHS[name][level] for level in levels]
        assert detector.pyramid_levels == (1 if row == "single" else 4)
        assert not shapes
        return
    on = set(row.split("-")) - {"baseline"}
    expected = {f"{network.stream}/{level}-map": shape for level, shape in maps.items()}
    assert shapes == expected | ({"frames": (3, 48, 48)} if on & {"stt", "fsa"} else {})
    (one,) = detector.networks
    assert (one.stt is not None, one.fsa is not None, one.pyramid.refined) == ("stt" in on, "fsa" in on, "rfp" in on)
    assert recipe.detector == ("talmts" if on else "afsd")  # Table VI's baseline
    for part in (one.stt, one.fsa):
        assert part is None or part.embed.places == 16  # as in the paper: 96 x 96 in patches of 24 x 24


def test_recipes_are_the_main_rows() -> None:
    for table, row in (("table5", "inter"), ("table6", "rfp-stt-fsa")):
        given = detect_recipe(file=benchmark.RECIPES / benchmark.FILES[table])
        assert given.streams == recipe_of("i3d", table, row, 96).streams
        built = recipe_of("i3d", table, row, 96)
        assert built.model.items() >= given.model.items()
        assert built.model_copy(update={"model": {}}) == given.model_copy(update={"model": {}})


def test_the_papers_numbers_stand_in_their_recipes() -> None:
    for table, folder in (("table5", "sptad"), ("table6", "talmts")):
        text = "".join(path.read_text(encoding="utf-8") for path in (benchmark.RECIPES / folder).glob("thumos14*"))
        text += (benchmark.RECIPES / "afsd" / "thumos14.yaml").read_text(encoding="utf-8")
        for row, (paper, _) in benchmark.TABLES[table].items():
            assert row in ("fsa", "inter") or f"average mAP {paper}" in text


# ---- the whole, in this process --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pyramids") / "out"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Processes that would have been started; they run here instead."""
    begun: list[str] = []

    def here(module: str, arguments: list[str]) -> str | None:
        begun.append(" ".join([module, *arguments]))
        if module == "benchmarks.pyramids":
            return None if benchmark.main(arguments) == 0 else "not prepared"
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        trainings.main()
        return None

    monkeypatch.setattr(benchmark, "in_a_process", here)
    return begun


def test_from_videos_to_the_table(out: Path, calls: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    small = [word for item in NETWORK for word in ("--set", item)]
    arguments = ["table5", "--out", str(out), *SMALL, "--only", "high", *small]
    assert benchmark.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "tiny (random:0, untrained) of 2 + 1 synthetic videos" in printed
    line = re.search(r"^high seed 0 +49\.0 +([\d.]+) ", printed, re.MULTILINE)
    table = json.loads((out / "table5-tiny.json").read_text())
    (result,) = table["results"]["high"]
    assert line is not None
    assert float(line[1]) == pytest.approx(result["map"], abs=0.06)
    assert 0 <= result["map"] <= 100
    assert result["map"] == pytest.approx(np.mean([result[f"map_{t}"] for t in (0.3, 0.4, 0.5, 0.6, 0.7)]))
    truth = read_truth(out / "annotations.json")
    assert [len(truth.subset(name).videos) for name in ("training", "testing")] == [2, 1]
    with open_store(out / "features.zarr") as store:
        levels = {level: store["tiny", "testing-000", level] for level in store.levels("tiny", "testing-000")}
        frames = store["frames", "testing-000"]
        assert store.stream_attrs("tiny")["spec"]["weights"] == "random:0"
        assert set(levels) == {"features", "s1", "s2", "s4", "s2-map", "s4-map"}
        assert frames.shape[1:] == (3, 48, 48)
        for level, stride in (("s1", 1), ("s2", 2), ("s4", 4), ("s2-map", 2), ("s4-map", 4)):
            assert levels[level].shape[0] == -(-frames.shape[0] // stride)
            assert levels[level].axis.scale_s == pytest.approx(stride * frames.axis.scale_s)
        for level in ("s2", "s4"):
            whole = levels[f"{level}-map"].numpy().astype(np.float32).mean((2, 3))
            np.testing.assert_allclose(whole, levels[level].numpy(), atol=2e-3)

    calls.clear()  # nothing is trained again; other settings are not taken for these
    before = (out / "features.zarr" / "zarr.json").stat().st_mtime_ns
    assert benchmark.main(arguments) == 0
    assert [call.split()[0] for call in calls] == ["benchmarks.pyramids"]
    assert (out / "features.zarr" / "zarr.json").stat().st_mtime_ns == before
    assert json.loads((out / "table5-tiny.json").read_text()) == table
    assert benchmark.main([*arguments, "--set", "train.lr=0.1"]) == 1
    assert "of other settings" in capsys.readouterr().out
    assert benchmark.main([*arguments, "--set", "train.lrr=0.1"]) == 1
    assert "lrr" in capsys.readouterr().err


def test_other_videos_and_other_frames_are_refused(
    out: Path, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(["prepare", "--out", str(out), *SMALL]) == 0
    for more, match in (
        (["--training", "3"], "other videos"),
        (["--frame-size", "96"], "frames.*short_side|short_side.*frames"),
        (["--weights", "random:1"], "tiny.*weights|weights.*tiny"),
    ):
        assert benchmark.main(["prepare", "--out", str(out), *SMALL, *more]) == 1
        assert re.search(match, capsys.readouterr().err, re.DOTALL)
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--only hihg", "hihg"),
        ("--seeds 1 1", "differ"),
        ("--seconds 5 4", "--seconds"),
        ("--testing 0", "--testing"),
        ("--frame-size 50", "50"),
    ],
)
def test_wrong_options_are_refused(
    tmp_path: Path, wrong: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["table5", "--out", str(tmp_path / "new"), *wrong.split()])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_seeds_have_a_mean_and_failures_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(options: Any, row: str, seed: int, sets: list[str], weights: str) -> dict[str, Any]:
        return {"failed": "out of memory"} if (row, seed) == ("stt", 2) else {"map": 10.0 * seed}

    monkeypatch.setattr(benchmark, "in_a_process", lambda module, arguments: None)
    monkeypatch.setattr(benchmark, "stored_widths", lambda store, stream: (WIDTHS["i3d"], "x"))
    monkeypatch.setattr(benchmark, "start", start)
    (tmp_path / "new").mkdir()
    arguments = ["table6", "--out", str(tmp_path / "new"), "--only", "rfp", "stt", "fsa", "--seeds", "1", "2"]
    assert benchmark.main(arguments) == 1
    printed = capsys.readouterr().out
    found = re.findall(r"^(\S+ (?:seed \d|mean)) +(\S.*?) *$", printed, re.MULTILINE)
    values = {name: line.split()[:2] for name, line in found}
    assert values["rfp seed 1"] == ["52.6", "10.0"]
    assert values["rfp seed 2"] == ["52.6", "20.0"]
    assert values["rfp mean"] == ["52.6", "15.0"]
    assert values["fsa mean"] == ["-", "15.0"]
    assert dict(found)["stt seed 2"] == "failed: out of memory"
    assert values["stt mean"] == ["52.8", "-"]


@pytest.mark.slow
def test_real_processes_on_maps_of_i3d(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["train.epochs=1", "model.width=16", "model.transformer_width=8"]
    arguments = ["table6", "--out", str(tmp_path), "--training", "2", "--testing", "1", "--seconds", "5", "6"]
    arguments += ["--only", "baseline", "rfp-stt-fsa", *(word for item in small for word in ("--set", item))]
    assert benchmark.main(arguments) == 0
    assert len(re.findall(r"^(?:baseline|rfp-stt-fsa) seed 0 +5[24]\.\d +\d", capsys.readouterr().out, re.MULTILINE))
    for row, detector in (("baseline", "afsd"), ("rfp-stt-fsa", "talmts")):
        text = (tmp_path / "runs" / f"table6-i3d-{row}-s0" / "recipe.yaml").read_text()
        assert f"detector: {detector}" in text
