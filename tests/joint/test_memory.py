"""The memory of a joint step as it is estimated, against what real steps keep and need."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import joint as benchmark
from tad.errors import RecipeError
from tad.extract.backbones import BACKBONES, SPECS, Backbone, build_backbone
from tad.joint.clips import Clips
from tad.joint.counting import BackboneCost, DetectorCost, StreamCost, measure_backbone, measure_detector, saved_bytes
from tad.joint.encoder import Encoder, without_graph
from tad.joint.freezing import freeze
from tad.joint.gradient_sampling import encode_sampled
from tad.joint.memory import choose, estimate, format_bytes, parse_bytes

SMALL = {"tiny": (3, 16, 32, 32), "tsm-r50": (3, 8, 64, 64), "i3d-rgb": (3, 16, 64, 64)}
HEAD = DetectorCost(weights=400, trained=300, saved=200)
COST = BackboneCost(weights=1000, trained=900, saved=10_000, saved_once=50, forward=4000, backward=2000)


def partly_frozen(name: str, stages: int = 2) -> Backbone:
    torch.manual_seed(0)
    backbone = build_backbone(name, "random").train()
    freeze(backbone, stages=stages, norms=True)
    return backbone


def clips_of(shape: tuple[int, int, int, int], count: int) -> Clips:
    """``count`` clips, each of frames of its own."""
    channels, window, height, width = shape
    frames = torch.randint(0, 256, (count * window, channels, height, width), dtype=torch.uint8)
    index = torch.arange(count * window).view(count, window)
    return Clips(frames, index, torch.arange(count), torch.arange(count).float())


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def peak_of(run: Callable[[], object]) -> int:
    """The most that torch's allocator of the CPU gave out at once during ``run()``: the profiler's account of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            run()
    assert profiled.profiler is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30), (" 500 MB ", 500_000_000), ("1.5kB", 1500), ("0.1GB", 100_000_000), (".5KiB", 512),
        ("7B", 7), ("3MiB", 3 * 2**20), ("1e3MB", 10**9), ("9007199254740993B", 9007199254740993), ("1.9B", 1),
    ],
)  # fmt: skip
def test_sizes_are_parsed(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "8", "8G", "GiB", "-1GiB", "0GiB", "0.4B", "nanGB", "infGB", "1,5GB", "8 Gi B", "8gib", "8Gb", "٨GiB"]
)
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="such as 8GiB"):
        parse_bytes(text)


def test_sizes_are_written() -> None:
    sizes = [0, 1023, 1024, 1536 * 2**10, 34 * 2**30, 2**41]
    assert [format_bytes(size) for size in sizes] == ["0 B", "1023 B", "1.0 KiB", "1.5 MiB", "34.0 GiB", "2048.0 GiB"]


# ---- counting --------------------------------------------------------------------------------------------------------


def test_storages_are_counted_once_and_without_parameters() -> None:
    weight = torch.ones(10, 20, requires_grad=True)  # 800 bytes
    x = torch.ones(4, 10)

    def run() -> Tensor:
        made = (x @ weight).exp()  # x of 160 bytes for the weight's gradient; the result of 320 bytes
        return made.view(-1).square() + made.t().reshape(-1).square()  # a view of the result; a copy of 320 bytes

    assert saved_bytes(run, known=[weight]) == 160 + 320 + 320
    assert saved_bytes(run) == 160 + 320 + 320  # a left factor without gradient does not need the weight
    assert saved_bytes(run, known=[weight, x]) == 320 + 320
    with torch.no_grad():
        assert saved_bytes(run) == 0


def test_what_is_counted_has_no_backward_pass() -> None:
    weight = torch.ones(3, requires_grad=True)
    kept = []
    saved_bytes(lambda: kept.append(weight.exp().sum()))
    with pytest.raises(RuntimeError, match="keeps nothing"):
        kept[0].backward()


@pytest.mark.parametrize(
    ("name", "precision"),
    [("tiny", "fp32"), ("tiny", "bf16"), ("tsm-r50", "fp32"), ("tsm-r50", "bf16"), ("i3d-rgb", "fp32")],
)
def test_activations_are_those_of_a_real_step(name: str, precision: str) -> None:
    shape = SMALL[name]
    backbone = partly_frozen(name, stages=2 if precision == "fp32" else 1)
    cost = StreamCost(measure_backbone(backbone, clip=shape, precision=precision), clips=4, frame_bytes=1)
    samples = [clips_of(shape, 4) for _ in range(2)]
    encoder = Encoder(backbone=backbone, chunk=1)

    def step() -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return encode_sampled(encoder, samples, ratio=0.5)

    measured = saved_bytes(step, known=[*tensors_of(encoder), *(clips.frames for clips in samples)])
    found = estimate([cost], samples=2, mode="egs", ratio=0.5, checkpoint=False, chunk=1, detector=HEAD).activations
    assert found == pytest.approx(measured, rel=0.01)


def test_levels_cost_what_a_real_pass_keeps() -> None:
    shape, keys = SMALL["tiny"], ("s2", "s4-map")
    backbone = partly_frozen("tiny", stages=0)
    cost = measure_backbone(backbone, clip=shape, keys=keys)
    encoder, clips = Encoder(backbone=backbone, keys=keys), clips_of(shape, 1)
    measured = saved_bytes(lambda: encoder(clips.frames, clips.index), known=[*tensors_of(encoder), clips.frames])
    assert cost.saved + cost.saved_once == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("name", ["tiny", "i3d-rgb"])
def test_passes_need_at_most_what_is_estimated(name: str) -> None:
    """Against the profiler's account. TSM's convolutions take scratch space of their own, a fifth of such a pass."""
    shape, backbone = SMALL[name], partly_frozen(name)
    cost = measure_backbone(backbone, clip=shape)
    encoder, clips = Encoder(backbone=backbone, chunk=3), clips_of(shape, 3)
    trained = [p for p in backbone.parameters() if p.requires_grad]

    def forward() -> None:
        with without_graph(encoder):
            encoder(clips.frames, clips.index)

    def both() -> None:
        torch.autograd.grad(encoder(clips.frames, clips.index)["features"].sum(), trained)

    forward()  # what is made once is there
    assert 3 * cost.forward == pytest.approx(peak_of(forward), rel=0.02)
    with_graph, beside = peak_of(both), 3 * (cost.saved + cost.backward) + cost.saved_once
    assert beside <= 1.02 * with_graph
    assert with_graph <= 1.02 * (beside + cost.trained)  # gradients lie between none and all of them then


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_whole_step_stays_within_its_estimate(checkpoint: bool) -> None:
    shape, backbone = (3, 16, 48, 48), partly_frozen("tiny", stages=1)
    stream = StreamCost(measure_backbone(backbone, clip=shape), clips=8, frame_bytes=0)
    samples = [clips_of(shape, 8) for _ in range(2)]
    encoder = Encoder(backbone=backbone, chunk=2, checkpoint=checkpoint)
    trained = [p for p in backbone.parameters() if p.requires_grad]

    def step() -> None:
        rows = encode_sampled(encoder, samples, ratio=0.75)
        torch.autograd.grad(torch.cat(rows).sum(), trained)

    step()
    found = estimate(
        [stream], samples=2, mode="egs", ratio=0.75, checkpoint=checkpoint, chunk=2, detector=DetectorCost(0, 0, 0)
    )
    needed, measured = found.gradients + found.activations + found.transient, peak_of(step)
    assert needed / 1.3 <= measured <= 1.05 * needed


def test_measuring_leaves_the_backbone_and_random_numbers_alone() -> None:
    torch.manual_seed(3)
    backbone = build_backbone("tiny", "random").train()
    freeze(backbone, stages=0, norms=False)  # batch norms in training mode
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    modes = [module.training for module in backbone.modules()]
    state = torch.get_rng_state()
    measure_backbone(backbone, clip=SMALL["tiny"])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert [module.training for module in backbone.modules()] == modes
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert all(type(parameter) is nn.Parameter for parameter in backbone.parameters())


def test_frozen_stages_are_cheaper() -> None:
    costs = [measure_backbone(partly_frozen("tiny", stages), clip=SMALL["tiny"]) for stages in range(5)]
    saved, trained = [cost.saved for cost in costs], [cost.trained for cost in costs]
    assert saved == sorted(saved, reverse=True)
    assert len(set(saved)) == 5
    assert trained == sorted(trained, reverse=True)
    assert saved[4] == trained[4] == 0
    assert len({cost.weights for cost in costs}) == 1
    assert len({cost.forward for cost in costs}) == 1
    # all frozen: a pass through it makes no graph, keeps no gradient, whatever the mode says
    stream = StreamCost(costs[4], clips=4, frame_bytes=0)
    full = estimate([stream], samples=1, mode="full", ratio=1, checkpoint=False, chunk=2, detector=HEAD)
    assert (full.activations, full.gradients, full.transient) == (0, HEAD.trained, 2 * costs[4].forward)


def test_weights_gradients_and_state_are_those_of_real_optimizers() -> None:
    backbone = partly_frozen("tiny")
    cost = measure_backbone(backbone, clip=SMALL["tiny"])
    assert cost.weights == sum(t.numel() * t.element_size() for t in tensors_of(backbone))
    optimizers = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    trained = [p for p in backbone.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    assert cost.trained == sum(p.grad.nbytes for p in trained if p.grad is not None)
    for name, build in optimizers.items():
        optimizer = build(trained, lr=0.1, **({"momentum": 0.9} if name == "sgd" else {}))
        optimizer.step()
        kept = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t is not None and t.ndim)
        found = estimate(
            [StreamCost(cost, clips=2, frame_bytes=5)], samples=3, mode="full", ratio=1, checkpoint=False, chunk=1,
            detector=DetectorCost(0, 0, 0), optimizer=name,
        )  # fmt: skip
        assert found.optimizer == kept
        assert found.frames == 15


def test_a_detector_is_counted_on_a_real_batch_and_left_alone() -> None:
    torch.manual_seed(0)
    detector = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
    detector[3].requires_grad_(False)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    x = torch.randn(16, 8, requires_grad=True)
    state = torch.get_rng_state()
    cost = measure_detector(detector, lambda: detector(x).square().sum())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    assert cost.weights == 4 * (8 * 4 + 4 + 4 + 4 + 4 + 4 + 4 + 1) + 8  # and the batch norm's int64 counter
    assert cost.trained == 4 * (8 * 4 + 4 + 4 + 4)
    # x; the first result; its mean and deviation; the dropout's mask, on the CPU of float32; the last result
    assert cost.saved == 4 * 16 * 8 + 4 * 16 * 4 + 4 * 4 * 2 + 4 * 16 * 4 + 4 * 16
    with pytest.raises(ZeroDivisionError):
        measure_detector(detector, lambda: (detector(x), 1 / 0))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())


def test_odd_requests_are_refused() -> None:
    backbone = partly_frozen("tiny")
    with pytest.raises(RecipeError, match=r"unknown precision 'bf61'.*bf16"):
        measure_backbone(backbone, clip=SMALL["tiny"], precision="bf61")
    with pytest.raises(
        RecipeError, match=r"\(channels, frames, height, width\) of at least 1 each, got \(3, 16, 0, 32\)"
    ):
        measure_backbone(backbone, clip=(3, 16, 0, 32))
    with pytest.raises(RecipeError, match="no level 's3'"):
        measure_backbone(backbone, clip=SMALL["tiny"], keys=("s3",))
    with pytest.raises(RecipeError, match="channels"):
        measure_backbone(partly_frozen("tsm-r50"), clip=(2, 8, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_can_be_counted(name: str) -> None:
    spec = SPECS[name]
    height, width = (64, 64) if spec.any_size else spec.crop
    clip = (len(spec.mean), max(spec.min_frames, 8) if spec.any_length else spec.frames, height, width)
    backbone = partly_frozen(name)
    cost = measure_backbone(backbone, clip=clip)
    encoder, clips = Encoder(backbone=backbone), clips_of(clip, 1)
    measured = saved_bytes(lambda: encoder(clips.frames, clips.index), known=[*tensors_of(encoder), clips.frames])
    assert cost.saved + cost.saved_once == pytest.approx(measured, rel=0.1)


# ---- estimate --------------------------------------------------------------------------------------------------------


def test_an_estimate_by_hand() -> None:
    streams = [StreamCost(COST, clips=10, frame_bytes=70), StreamCost(replace(COST, forward=9000), 10, 30)]
    given: dict[str, Any] = {"samples": 2, "chunk": 4, "detector": HEAD}
    full = estimate(streams, mode="full", ratio=0.1, checkpoint=False, **given)
    assert full.weights == 2400
    assert full.gradients == 2100
    assert full.optimizer == 4200
    assert full.activations == 2 * (2 * 10 * 10_000 + 50)
    assert full.transient == 4 * 2000
    assert (full.frames, full.detector) == (200, 200)
    assert full.total == 2400 + 2100 + 4200 + 400_100 + 8000 + 200 + 200
    egs = estimate(streams, mode="egs", ratio=0.35, checkpoint=False, optimizer="sgd", ema=True, **given)
    assert egs.weights == 4800
    assert egs.optimizer == 2100
    assert egs.activations == 2 * (2 * 3 * 10_000 + 50)
    assert egs.transient == 4 * 9000  # the second stream's clips without graph
    again = estimate(streams, mode="egs", ratio=0.35, checkpoint=True, **given)
    assert again.activations == 0
    assert again.transient == max(4 * 9000, 3 * 12_000 + 50)
    bank = estimate(streams, mode="bank", ratio=0.35, checkpoint=False, **given)
    assert bank.transient == 3 * 2000
    stored = estimate(streams, mode="pre-extracted", ratio=0.35, checkpoint=False, **given)
    assert stored == replace(full, gradients=300, optimizer=600, activations=0, transient=0, frames=0)
    forwards = estimate(streams, mode="egs", ratio=0.0, checkpoint=False, **given)
    assert forwards == replace(stored, transient=4 * 9000, frames=200)


@given(
    ratios=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    clips=st.integers(1, 300),
    samples=st.integers(1, 20),
    chunk=st.integers(1, 40),
    mode=st.sampled_from(["egs", "bank"]),
)
def test_more_gradients_need_more(ratios: tuple[float, float], clips: int, samples: int, chunk: int, mode: str) -> None:
    stream = StreamCost(COST, clips=clips, frame_bytes=100)

    def total(mode: str, ratio: float, checkpoint: bool = False, chunk: int = chunk) -> int:
        return estimate(
            [stream], samples=samples, mode=mode, ratio=ratio, checkpoint=checkpoint, chunk=chunk, detector=HEAD
        ).total

    few, many = sorted(ratios)
    alone = chunk * COST.forward  # a pass without graph, which vanishes when all clips have one
    assert total(mode, few) <= total(mode, many) + (alone if mode == "egs" else 0)
    assert total("pre-extracted", few) <= total("bank", few) <= total("egs", few)
    assert total("egs", 1.0) == total("full", few)
    assert total(mode, many, True) <= total(mode, many)
    assert total(mode, many, True, 1) <= total(mode, many, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "eggs"}, "unknown mode 'eggs'.*egs"),
        ({"optimizer": "adamm"}, "unknown optimizer 'adamm'.*adam"),
        ({"ratio": 1.2}, "0 to 1, got 1.2"),
        ({"ratio": float("nan")}, "0 to 1, got nan"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "samples": 1, "mode": "egs", "ratio": 0.3, "checkpoint": False, "chunk": 8, "detector": HEAD, **change,
    }  # fmt: skip
    with pytest.raises(RecipeError, match=message):
        estimate([StreamCost(COST, clips=8, frame_bytes=0)], **given)


def test_a_stream_without_clips_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"clips\[0\] must be at least 1, got 0"):
        estimate([StreamCost(COST, 0, 0)], samples=1, mode="full", ratio=1, checkpoint=False, chunk=1, detector=HEAD)


@pytest.mark.parametrize(
    ("size", "stages", "published_gb"), [(224, 2, {0.3: 11, 1.0: 34.3}), (112, 2, {1.0: 9.1}), (112, 1, {1.0: 17.0})]
)
def test_etads_published_memory(size: int, stages: int, published_gb: dict[float, float]) -> None:
    """Tables 1 and 13 of ETAD, a video of 128 snippets of 8 frames through TSM; its detector takes 1.2 GB at most."""
    cost = measure_backbone(partly_frozen("tsm-r50", stages), clip=(3, 8, size, size))
    stream = StreamCost(cost, clips=128, frame_bytes=128 * 8 * 3 * size * size)
    for ratio, gb in published_gb.items():
        found = estimate(
            [stream], samples=1, mode="egs", ratio=ratio, checkpoint=False, chunk=8, detector=DetectorCost(0, 0, 0)
        )
        assert found.total / 1e9 == pytest.approx(gb, rel=0.1)


# ---- choice ----------------------------------------------------------------------------------------------------------

STREAMS = [StreamCost(COST, clips=12, frame_bytes=100)]
GIVEN: dict[str, Any] = {"samples": 2, "ratio": 0.5, "chunk": 8, "detector": HEAD}


def walk(streams: list[StreamCost], **given: Any) -> list[tuple[str, float, bool]]:
    """What is chosen as the budget shrinks from plenty, always to a byte less than the last choice needs."""
    found: list[tuple[str, float, bool]] = []
    budget, least = 10**9, 0
    while not found or found[-1][0] != "pre-extracted":
        choice = choose(budget, streams, **given)
        assert choice.estimate.total <= budget
        assert all(need > budget for _, need in choice.refused)
        exact = choose(choice.estimate.total, streams, **given)
        assert (exact.mode, exact.ratio, exact.checkpoint) == (choice.mode, choice.ratio, choice.checkpoint)
        found.append((choice.mode, choice.ratio, choice.checkpoint))
        least = choice.estimate.total
        budget = least - 1
    with pytest.raises(RecipeError, match=rf"pre-extracted, needs .* \({least} B\)"):
        choose(budget, streams, **given)
    return found


def test_every_mode_is_chosen_as_the_budget_shrinks() -> None:
    assert walk(STREAMS, **GIVEN) == [
        ("full", 1.0, False),
        ("egs", 0.5, False),
        ("full", 1.0, True),
        ("egs", 0.5, True),
        ("egs", 0.4, True),
        ("egs", 0.3, True),
        ("egs", 0.2, True),
        ("bank", 0.1, False),
        ("bank", 0.1, True),
        ("pre-extracted", 0.0, False),
    ]


def test_one_pass_has_nothing_to_sample() -> None:
    one = [StreamCost(COST, clips=1, frame_bytes=100)]
    assert walk(one, **{**GIVEN, "snippets": False}) == [
        ("full", 1.0, False),
        ("full", 1.0, True),
        ("pre-extracted", 0.0, False),
    ]


@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.1, 1.0])
def test_ratios_at_the_ends(ratio: float) -> None:
    modes = walk(STREAMS, **{**GIVEN, "ratio": ratio})
    assert modes[0] == ("full", 1.0, False)
    assert modes[-1] == ("pre-extracted", 0.0, False)
    assert all(part <= max(ratio, 0.0) for mode, part, _ in modes if mode in ("egs", "bank"))
    assert len(set(modes)) == len(modes)


def test_the_log_says_what_how_much_and_the_choice() -> None:
    choice = choose(200_000, STREAMS, **GIVEN)
    assert (choice.mode, choice.ratio, choice.checkpoint) == ("egs", 0.5, False)
    lines = choice.lines()
    assert len(lines) == 3
    assert lines[0].startswith("memory: full: needs 25")
    assert lines[0].endswith("KiB, does not fit")
    assert "egs of 50 % of the clips" in lines[1]
    assert f"needs {format_bytes(choice.estimate.total)} of 195.3 KiB, chosen" in lines[1]
    for part in ("weights", "gradients", "optimizer", "activations", "transient", "frames", "detector"):
        assert f"{part} {format_bytes(getattr(choice.estimate, part))}" in lines[2]


@pytest.mark.parametrize("budget", [0, -5, 1000])
def test_a_budget_too_small_names_the_least(budget: int) -> None:
    with pytest.raises(RecipeError, match=r"the least, pre-extracted, needs 2.4 KiB \(2500 B\)"):
        choose(budget, STREAMS, **GIVEN)


# ---- the benchmark ---------------------------------------------------------------------------------------------------

TINY = ["--backbone", "tiny", "--snippets", "8", "--frames", "8", "--size", "32", "--chunk", "2", "--repeats", "1"]


def test_the_benchmark_measures_steps_of_every_way() -> None:
    options = benchmark.parser().parse_args([*TINY, "--frozen-stages", "0"])
    found = {way: benchmark.measure(options, *way) for way in [(0.0, False), (0.5, False), (1.0, True)]}
    parts = {way: figures["estimate_parts"] for way, figures in found.items()}
    for figures in found.values():
        assert figures["seconds"] > 0
        assert figures["estimate_bytes"] == sum(figures["estimate_parts"].values())
    assert parts[0.0, False]["activations"] == parts[1.0, True]["activations"] == 0 < parts[0.5, False]["activations"]
    assert parts[0.0, False]["gradients"] < parts[0.5, False]["gradients"] == parts[1.0, True]["gradients"]
    assert {part["frames"] for part in parts.values()} == {8 * 8 * 3 * 32 * 32}
    assert len({part["detector"] for part in parts.values()}) == 1


def test_the_benchmarks_table() -> None:
    rows: list[dict[str, Any]] = [
        {"ratio": 0.3, "checkpoint": False, "peak_bytes": 2**28, "estimate_bytes": 2**27, "seconds": 1.0},
        {"ratio": 1.0, "checkpoint": False, "peak_bytes": 2**30, "estimate_bytes": 2**30, "seconds": 4.0},
        {"ratio": 1.0, "checkpoint": True, "failed": "out of memory"},
    ]
    lines = [line.split() for line in benchmark.table(rows, paper=True)]
    assert lines[1] == ["30%", "256", "128", "0.25", "1.00", "0.25", "11", "GB"]
    assert lines[2] == ["100%", "1024", "1024", "1.00", "4.00", "1.00", "34", "GB"]
    assert lines[3] == ["100%,", "checkpointing", "out", "of", "memory"]
    assert [line.split() for line in benchmark.table(rows[:1], paper=False)][1] == ["30%", "256", "128", "1.00"]


@pytest.mark.slow
def test_the_benchmark_runs_in_processes_and_goes_on_after_failures(tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[list[str], list[dict[str, Any]]]:
        command = [sys.executable, "-m", "benchmarks.joint", *TINY, *arguments, "--json", str(tmp_path / "joint.json")]
        root = Path(benchmark.__file__).parents[1]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.splitlines(), json.loads((tmp_path / "joint.json").read_text())["results"]

    lines, rows = run("--ratios", "0.5")
    assert [(row["ratio"], row["checkpoint"]) for row in rows] == [(0.5, False), (1.0, True)]
    assert all(row["peak_bytes"] > 0 for row in rows)
    assert len(lines) == 4
    lines, rows = run("--ratios", "0.5", "--backbone", "tinny")
    assert len(lines) == 4
    assert all("unknown backbone 'tinny'" in row["failed"] for row in rows)
