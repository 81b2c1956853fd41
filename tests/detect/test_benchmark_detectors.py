"""The benchmark of the detectors times what it says, on the clips that it says; how fast they are is not tested."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import detectors as benchmark
from tad.detect import Segments
from tad.detect.align import check_needs
from tad.detect.infer import decoded
from tad.recipe import DetectRecipe, load_mapping

PAGE = Path(__file__).parents[2] / "docs" / "speed.md"
CPU = torch.device("cpu")
# rows and frames of a clip as the papers have them (whole videos: 2048 frames)
CLIPS = {
    "talnet": (128, 2048),
    "bmn": (128, 512),
    "bmn-lgte": (128, 512),
    "bmn-lgte-hacs": (200, 1600),
    "tcanet": (512, 2048),
    "etad": (128, 512),
    "etad-06": (128, 512),
    "sptad": (128, 256),
    "sptad-rows": (128, 1024),
    "afsd": (64, 256),
    "talmts": (64, 256),
}
SMALL = [
    f"model.{key}={value}"
    for key, value in {"rows": 16, "durations": 16, "width": 16, "tem_width": 16, "hidden": 16, "pem_width": 16}.items()
]


def test_every_case_has_the_clip_of_its_paper() -> None:
    assert set(CLIPS) == set(benchmark.CASES)
    for name, case in benchmark.CASES.items():
        recipe = benchmark.recipe_of(case)
        with torch.device("meta"):  # shapes without weights
            detector = benchmark.built(case, recipe)
        check_needs(detector.needs, detector=name)
        batch = benchmark.random_batch(case, recipe, detector.needs, clips=2)
        rows, frames = CLIPS[name]
        assert tuple(batch.mask.shape) == (2, rows)
        assert rows * case.stride_frames == frames
        assert batch.durations_s == pytest.approx([frames / case.fps] * 2)
        assert batch.axes[0].scale_s == case.stride_frames / case.fps
        for need in detector.needs:
            x = batch.features[need.key]
            assert batch.mask_of(need.key).all() or need.shape is not None
            # a level's rows are as many as its resolution says: sK has one every K frames, frames are frames
            level = re.fullmatch(r"s(\d+)(-map)?", need.level)
            stride = int(level[1]) if level else 1 if "frames" in need.stream else case.stride_frames
            assert x.shape[2] == frames // stride
            assert x.dtype is (torch.uint8 if "frames" in need.stream else torch.float32)
        assert [len(p) for p in batch.proposals or []] == [recipe.proposals.top] * 2
        assert not torch.equal(*batch.features[detector.needs[0].key])


def test_a_case_is_its_recipe_but_for_what_it_says() -> None:
    for case in benchmark.CASES.values():
        given = DetectRecipe(**load_mapping(benchmark.RECIPES / case.recipe))
        built = benchmark.recipe_of(case)
        said = {key.partition("=")[0].removeprefix("model.") for key in case.sets}
        assert {k for k in {*given.model, *built.model} if given.model.get(k) != built.model.get(k)} == said
        assert built.model_copy(update={"model": {}}) == given.model_copy(update={"model": {}})
        assert benchmark.recipe_of(case, rows=64).model.get("rows") == (None if case.rows else 64)


def test_a_pass_finds_what_detection_finds() -> None:
    case = benchmark.CASES["bmn"]
    recipe = benchmark.recipe_of(case, sets=SMALL)
    detector = benchmark.built(case, recipe)
    clips = [benchmark.random_clip(case, recipe, detector.needs, 16, number) for number in range(2)]
    batch = benchmark.random_batch(case, recipe, detector.needs, clips=2)
    wanted = decoded(detector, clips, device=CPU)
    with torch.inference_mode():
        times, found, kept = benchmark.one_pass(detector, batch, recipe)
        again = detector.decode(detector(batch), batch)
    assert found == sum(map(len, wanted)) > 100
    assert 0 < kept <= found
    assert len(times) == len(benchmark.PHASES)
    for mine, theirs in zip(again, wanted, strict=True):
        torch.testing.assert_close(mine.segments_s.float(), theirs.segments_s)


def test_scores_for_suppression_fall_and_leave_the_segments() -> None:
    place = torch.rand(500, 2).sort(1).values
    found = Segments("v", place, torch.zeros(500, dtype=torch.int64), torch.zeros(500))
    one, two = benchmark.with_scores([found, found])
    assert torch.equal(one.segments_s, place)
    assert torch.equal(one.scores, two.scores)
    assert (one.scores.diff() <= 0).all()
    assert benchmark.SCORES[0] * 0.999 <= one.scores.min() < 3e-4
    assert 0.3 < one.scores.max() <= benchmark.SCORES[1]
    assert one.scores.log10().mean() == pytest.approx(-2, abs=0.2)  # even in the logarithm


def test_medians_phases_and_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = [(9, 9, 9), (1, 2, 10), (3, 2, 30), (2, 6, 20)]  # seconds of forward, decode, suppress; the first: warm-up
    ticks: list[tuple[float, float]] = []
    for forward, decode, suppress in passes:
        now = [0, forward, forward + decode, 500, 500 + suppress]  # 500: drawing scores in between takes long
        ticks += [(float(t), t / 2) for t in now]
    clock = iter(ticks)
    monkeypatch.setattr(benchmark, "_now", lambda batch: next(clock))
    row = benchmark.measure("bmn", clips=2, device=CPU, repeats=3, sets=SMALL)
    assert next(clock, None) is None
    assert (row["rows"], row["frames"], row["clips"]) == (16, 64, 2)
    ms = {"forward": 1000.0, "decode": 1000.0, "suppress": 10000.0, "network": 2500.0, "all": 14000.0}  # a clip
    assert row["clock"]["ms"] == pytest.approx(ms)
    assert row["clock"]["frames_per_s"] == pytest.approx({"network": 64 / 2.5, "all": 64 / 14})
    assert row["processor"]["ms"] == pytest.approx({key: value / 2 for key, value in ms.items()})


def test_a_ladder_stops_at_its_limit_and_failures_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def measure(name: str, *, rows: int | None = None, **options: Any) -> dict[str, Any]:
        if name == "etad":
            raise torch.OutOfMemoryError("out of memory\nmore")
        seconds = (rows or 100) / 100
        speed = {"network": 10 / seconds, "all": (5 if name == "sptad" else 20) / seconds}
        timed = {"ms": dict.fromkeys((*benchmark.PHASES, "network", "all"), 1000 * seconds), "frames_per_s": speed}
        about = {"detector": name, "rows": rows or 3, "frames": 10, "clips": 1, "found": 1, "kept": 1}
        return {**about, "clock": timed, "processor": timed}

    monkeypatch.setattr(benchmark, "measure", measure)
    out = tmp_path / "out.json"
    arguments = ["--detectors", "etad", "sptad", "--parts", "main", "lengths", "--batch", "1", "--device", "cpu"]
    assert benchmark.main([*arguments, "--longest", "2", "--json", str(out)]) == 1
    found = json.loads(out.read_text())
    assert [row["detector"] for row in found["main"]] == ["talnet", "sptad"]
    assert found["main"][1]["to_talnet"] == {"network": 1.0, "all": 0.25}
    assert [(row["detector"], row["rows"]) for row in found["lengths"]] == [("sptad", n) for n in (64, 128, 256)]
    assert list(found["failures"]) == ["etad, batch 1", "etad, batch 1, rows 64"]
    assert set(found["failures"].values()) == {"out of memory"}
    printed = capsys.readouterr().out
    assert re.search(r"^sptad +640\.0 +1280\.0 +2560\.0 +- +-$", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--batch 1 0", "at least 1"),
        ("--repeats 0", "at least 1"),
        ("--threads 0", "at least 1"),
        ("--device tpu", "tpu"),
        ("--detectors bnm", "bnm"),
    ],
)
def test_wrong_options_are_refused(wrong: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(wrong.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_processor_time_is_for_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, timer in ((1, "processor"), (2, "clock")):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        assert benchmark.Measurer(device=CPU, repeats=1, longest_s=1).timer == timer
    assert benchmark.Measurer(device=torch.device("cuda"), repeats=1, longest_s=1).timer == "clock"


def test_the_commands_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert commands
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert command[:3] == ["python", "-m", "benchmarks.detectors"]
        assert benchmark.main(command[3:]) == 0
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [row["detector"] for row in found["main"]] == ["talnet", "sptad"]
    for row in found["main"]:
        timed = row[found["timer"]]
        assert timed["frames_per_s"]["network"] == pytest.approx(1000 * row["frames"] / timed["ms"]["network"])
        assert 0 < row["kept"] <= row["found"]
    assert [row["rows"] for row in found["lengths"]] == [64, 128]
    assert [row["sets"] for row in found["proposals"]] == [["model.proposals=30"], ["model.proposals=300"]]
    assert [row["found"] for row in found["proposals"]] == [30 * 20, 1000]  # every class, at most max_detections
    assert "5574 frames/s" in capsys.readouterr().out
