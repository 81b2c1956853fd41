"""The benchmark of the networks runs, counts right, and goes on after a failure; how fast they are is not tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import backbones as benchmark


def test_it_runs_on_the_smallest_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b.json"
    arguments = [
        "--only",
        "tiny",
        "--crop",
        "32x48",
        "--batch",
        "2",
        "--repeats",
        "2",
        "--warmup",
        "1",
        "--device",
        "cpu",
    ]
    assert benchmark.main([*arguments, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [(row["precision"], row["mode"]) for row in found["rows"]] == [
        ("fp32", "eager"), ("bf16", "eager"), ("fp32", "channels-last"), ("bf16", "channels-last"),
    ]  # fmt: skip
    assert found["failures"] == {}
    base = found["rows"][0]
    assert (base["crop"], base["frames"], base["ratio"]) == ("32x48", 16, 1.0)
    for row in found["rows"]:
        assert row["windows_per_s"] > 0
        assert row["ratio"] == pytest.approx(row["windows_per_s"] / base["windows_per_s"])
    printed = capsys.readouterr().out
    assert "tiny: best is " in printed
    assert len(printed.splitlines()) == 7


def test_a_failure_is_listed_and_the_next_network_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = benchmark.measure

    def measure(name: str, **options: object) -> object:
        if name == "tiny":
            raise torch.OutOfMemoryError("out of memory\nmore")
        return real(name, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(benchmark, "measure", measure)
    out = tmp_path / "b.json"
    arguments = [
        "--only",
        "tiny",
        "tiny-flow",
        "--precision",
        "bf16",
        "--batch",
        "1",
        "--repeats",
        "1",
        "--warmup",
        "1",
    ]
    assert benchmark.main([*arguments, "--device", "cpu", "--out", str(out)]) == 1
    found = json.loads(out.read_text())
    assert found["failures"] == {"tiny": "out of memory"}
    assert [row["precision"] for row in found["rows"]] == ["fp32", "bf16", "fp32", "bf16"]
    with pytest.raises(SystemExit):
        benchmark.main(["--precision", "fp16", "--device", "cpu"])
    assert "cpu has no fp16" in capsys.readouterr().err


def test_the_median_leaves_the_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0, 9, 10, 12, 20, 21, 30, 33])  # passes of 9 (warm-up), 2, 1 and 3 seconds
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(ticks))
    assert benchmark.seconds_of(lambda: None, torch.device("cpu"), warmup=1, repeats=3) == (9, 2)


def test_channels_last_is_the_same_numbers_in_another_order() -> None:
    for shape in ((2, 3, 4, 5), (2, 3, 4, 5, 6)):
        tensor = torch.rand(shape)
        laid = benchmark.channels_last(tensor)
        assert torch.equal(laid, tensor)
        assert laid.stride(1) == 1
    assert benchmark.channels_last(torch.rand(3, 4)).is_contiguous()
