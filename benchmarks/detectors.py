"""Frames a second of every detector's network: from feature rows, maps or frames to segments in seconds.

::

    python -m benchmarks.detectors [--detectors sptad etad] [--parts main lengths proposals] [--batch 1 8]
                                   [--device cuda] [--threads N] [--quick] [--json out.json]

Each detector is built from the recipe of its main row at the paper's width, with random weights, and sees random
clips. A pass is ``forward``, ``decode``, and apart from them suppression as ``tad detect`` does it: on the CPU, each
clip as a video of its own, without the classes of whole videos. The network that makes the features is not in it, nor
is reading them.

A frame is one frame of the video that the rows of a clip stand for: rows times the frames from one row to the next,
both as in the recipe (SP-TAD: 128 rows, one every 2 frames, so 256). Frames are at the recipe's own rate, 10 or 30 a
second, and detectors that read whole videos get one of 2048 frames. Where the recipe squeezes videos into so many rows,
the clip is one that needs no squeezing.

``main`` has the median over passes of the time a clip, the frames a second, and their ratio to TAL-Net in the same run.
``lengths`` repeats it for clips of 64 to 1024 rows, ``proposals`` for several numbers of proposals; a detector stops
when a pass takes too long. Times are of the processor with one thread on a CPU, so that what else the machine does is
left out, and of the clock with several, which wait for one another busily, and on a GPU; the JSON has both.

With random weights every row is as good a boundary as any other: BMN with ``score: product`` and ETAD, which look at
peaks alone, have all proposals to do here and a part of them once trained. Scores would be all alike or next to
nothing, so that suppression gets others: drawn log-uniformly from ``SCORES``, the best first. ``found`` and ``kept``
are segments a clip before and after it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tad.detect import Batch, Detector, LevelSpec, Segments, build_detector, suppress_all
from tad.detect.align import Sample, level_factors
from tad.detect.data import collate
from tad.detect.recipes import detect_recipe
from tad.errors import TadError
from tad.recipe import DetectRecipe
from tad.timeline import TimeAxis
from tad.training.distributed import pick_device

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
CLASSES = 20  # THUMOS14's
PHASES = ("forward", "decode", "suppress")
SCORES = (1e-4, 1.0)  # of the segments that are suppressed


@dataclass(frozen=True)
class Case:
    """A detector as a recipe has it. ``channels``: stream → width; ``stride_frames``: from one row of the finest level
    to the next; ``rows``: of a video, where the recipe leaves it open."""

    recipe: str
    channels: Mapping[str, int]
    stride_frames: int
    fps: float
    sets: tuple[str, ...] = ()
    rows: int | None = None


I3D, TSN = {"i3d-rgb": 1024, "i3d-flow": 1024}, {"tsn-rgb": 1024, "tsn-flow": 1024}
BASE = "talnet"  # that all others are compared with
CASES: dict[str, Case] = {
    BASE: Case("talnet/thumos14.yaml", I3D, 16, 10, rows=128),
    "bmn": Case("bmn/thumos14-etad-table3-tsn.yaml", TSN, 4, 30),
    "bmn-lgte": Case("bmn/thumos14-etad-table3-tsn.yaml", TSN, 4, 30, ("model.lgte=2",)),
    "bmn-lgte-hacs": Case("bmn/hacs-table3-4-slowfast-lgte.yaml", {"slowfast-r101": 2304}, 8, 30),
    "tcanet": Case("tcanet/thumos14-etad-table3-tsn.yaml", TSN, 4, 30, rows=512),
    "etad": Case("etad/thumos14-table3-i3d.yaml", I3D, 4, 30),
    "etad-06": Case("etad/thumos14-table3-i3d.yaml", I3D, 4, 30, ("model.detect_ratio=0.06",)),
    "sptad": Case("sptad/thumos14.yaml", I3D, 2, 10),
    "sptad-rows": Case("sptad/thumos14.yaml", I3D, 8, 10, ("model.levels=[features]", "model.level_channels=null")),
    "afsd": Case("afsd/thumos14.yaml", I3D, 4, 10),
    "talmts": Case("talmts/thumos14.yaml", {**I3D, "frames": 3, "flow-frames": 2}, 4, 10),
}
LENGTHS = (64, 128, 256, 512, 1024)  # rows of the finest level
# a title -> case, key of its recipe, values
PROPOSALS: dict[str, tuple[str, str, tuple[float, ...]]] = {
    "talnet, proposals": ("talnet", "model.proposals", (30, 100, 300, 1000)),
    "sptad, proposals": ("sptad", "model.proposals", (30, 100, 300)),
    "etad, share of all pairs": ("etad", "model.detect_ratio", (0.06, 0.1, 0.2, 0.5, 1.0)),
    "bmn, longest in rows": ("bmn", "model.durations", (16, 32, 64, 128)),
    "bmn, best that are decoded": ("bmn", "model.max_detections", (100, 500, 2000, 8000)),
    "tcanet, best of BMN's": ("tcanet", "proposals.top", (50, 100, 200, 400)),
}
# What papers say, to be set beside these figures with care: device, what was timed, frames a second (or ms a video).
PAPERS = (
    ("sptad", "V100, whole network with I3D, RGB", "5574 frames/s"),
    ("talmts", "V100, whole network with I3D", "1824 frames/s"),
    ("afsd", "V100, whole network with I3D (as TAL-MTS and SP-TAD give it)", "4057 frames/s"),
    ("talnet", "CPUs (how many it does not say), detector alone", "9 ms a 3000 frames, 333333 frames/s"),
    ("etad", "GPU, ActivityNet, detector alone with suppression", "21.3 ms a video; 9.9 ms with 6 %"),
)


# ---- what is timed ---------------------------------------------------------------------------------------------------
def recipe_of(case: Case, *, rows: int | None = None, sets: Iterable[str] = ()) -> DetectRecipe:
    """The case's recipe, with clips of ``rows`` rows where that is given, and ``sets`` on top."""
    resized = [f"model.rows={rows}"] if rows is not None and case.rows is None else []
    return detect_recipe(None, file=RECIPES / case.recipe, sets=[*case.sets, *resized, *sets])


def built(case: Case, recipe: DetectRecipe) -> Detector:
    """The network with random weights."""
    torch.manual_seed(0)
    return build_detector(recipe.detector, channels=dict(case.channels), classes=CLASSES, **recipe.model).eval()


def random_clip(case: Case, recipe: DetectRecipe, needs: Sequence[LevelSpec], rows: int, number: int) -> Sample:
    """A clip of ``rows`` rows of the first need: normal features, frames of noise, the recipe's number of proposals."""
    rng = np.random.default_rng(number)
    factors = level_factors(needs)
    shapes = recipe.model.get("level_channels") or {}
    features = {}
    for need, factor in zip(needs, factors, strict=True):
        count = int(rows / factor)
        if need.shape is not None:
            shape: tuple[int, ...] = (count, *need.shape)
        else:
            shape = (count, shapes.get(need.level, case.channels[need.stream]))
        frames = need.shape is not None and need.level == "features"
        features[need.key] = (
            rng.integers(0, 256, shape, dtype=np.uint8) if frames else rng.standard_normal(shape, dtype=np.float32)
        )
    axis = TimeAxis.from_frames(fps=case.fps, window_frames=case.stride_frames, stride_frames=case.stride_frames)
    edges = np.sort(rng.uniform(0, rows, (recipe.proposals.top, 2)), 1).astype(np.float32)
    return Sample(
        f"clip {number}",
        features,
        axis,
        rows * axis.scale_s,
        proposals=edges,
        proposal_scores=np.linspace(1, 0, len(edges), dtype=np.float32),
        factors=dict(zip(features, factors, strict=True)) if set(factors) != {1} else {},
    )


def random_batch(
    case: Case, recipe: DetectRecipe, needs: Sequence[LevelSpec], *, clips: int, rows: int | None = None
) -> Batch:
    """``clips`` of one length side by side, as data loading gives them; ``rows`` None: as the recipe has it."""
    wanted = needs[0].rows or rows or case.rows
    assert wanted is not None  # of every case, by its table
    batch = collate([random_clip(case, recipe, needs, wanted, number) for number in range(clips)])
    assert batch is not None
    return batch


def one_pass(detector: Detector, batch: Batch, recipe: DetectRecipe) -> tuple[list[tuple[float, float]], int, int]:
    """(clock, processor) seconds of each phase, and how many segments all clips have before and after suppression."""
    ticks = [_now(batch)]
    outputs = detector(batch)
    ticks.append(_now(batch))
    found = detector.decode(outputs, batch)
    ticks.append(_now(batch))
    rescored = with_scores(found)
    begun = _now(batch)
    on_cpu = [
        Segments(s.video, s.segments_s.float().cpu(), s.labels.cpu(), s.scores.float().cpu(), duration_s=duration_s)
        for s, duration_s in zip(rescored, batch.durations_s, strict=True)
    ]
    kept = suppress_all(on_cpu, recipe.postprocess)
    intervals = [*pairwise(ticks), (begun, _now(batch))]
    times = [(after[0] - before[0], after[1] - before[1]) for before, after in intervals]
    return times, sum(map(len, found)), sum(map(len, kept))


def with_scores(found: Iterable[Segments]) -> list[Segments]:
    """The same segments with scores drawn from ``SCORES``, falling."""
    low, high = np.log(SCORES)
    drawn = []
    for s in found:
        exponents = np.random.default_rng(len(s)).uniform(low, high, len(s))
        scores = torch.from_numpy(np.exp(-np.sort(-exponents)).astype(np.float32))
        drawn.append(Segments(s.video, s.segments_s, s.labels, scores.to(s.scores.device)))
    return drawn


def _now(batch: Batch) -> tuple[float, float]:
    """Clock and processor seconds, when the device has done all that it was asked for."""
    if batch.mask.device.type == "cuda":
        torch.cuda.synchronize(batch.mask.device)
    return time.perf_counter(), time.process_time()


@torch.inference_mode()
def measure(
    name: str,
    *,
    clips: int,
    device: torch.device,
    repeats: int,
    rows: int | None = None,
    sets: Iterable[str] = (),
) -> dict[str, Any]:
    """Median times of ``repeats`` passes of one case, after one that does not count.

    Returns
    -------
    ``rows`` and ``frames`` of a clip, ``clips``, ``found`` and ``kept`` a clip; for both ``clock`` and ``processor``
    the milliseconds a clip of ``forward``, ``decode``, ``suppress``, ``network`` (the first two) and ``all``, and
    frames a second of ``network`` and ``all``.
    """
    case = CASES[name]
    recipe = recipe_of(case, rows=rows, sets=sets)
    detector = built(case, recipe).to(device)
    batch = random_batch(case, recipe, detector.needs, clips=clips, rows=rows).to(device)
    passes = [one_pass(detector, batch, recipe) for _ in range(1 + repeats)][1:]
    count = batch.mask.shape[1]
    result: dict[str, Any] = {
        "detector": name, "rows": count, "frames": count * case.stride_frames, "clips": clips,
        "found": passes[-1][1] / clips, "kept": passes[-1][2] / clips,
    }  # fmt: skip
    for which, timer in enumerate(("clock", "processor")):
        times = np.array([[phase[which] for phase in times] for times, _, _ in passes])  # (passes, phases)
        columns = {**dict(zip(PHASES, times.T, strict=True)), "network": times[:, :2].sum(1), "all": times.sum(1)}
        seconds = {phase: statistics.median(column.tolist()) / clips for phase, column in columns.items()}
        result[timer] = {
            "ms": {phase: 1000 * value for phase, value in seconds.items()},
            "frames_per_s": {phase: result["frames"] / max(seconds[phase], 1e-9) for phase in ("network", "all")},
        }
    return result


# ---- the tables ------------------------------------------------------------------------------------------------------
class Measurer:
    """Cases one after the other; those that fail are listed and left out."""

    def __init__(self, *, device: torch.device, repeats: int, longest_s: float) -> None:
        self.device, self.repeats, self.longest_s = device, repeats, longest_s
        self.timer = "processor" if device.type == "cpu" and torch.get_num_threads() == 1 else "clock"
        self.failures: dict[str, str] = {}

    def __call__(self, name: str, *, clips: int = 1, **changes: Any) -> dict[str, Any] | None:
        try:
            return measure(name, clips=clips, device=self.device, repeats=self.repeats, **changes)
        except (TadError, RuntimeError) as error:
            what = ", ".join([name, f"batch {clips}", *(f"{key} {value}" for key, value in changes.items())])
            self.failures[what] = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"{what}: failed, {self.failures[what]}", flush=True)
            return None

    def ladder(self, name: str, steps: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """One case with more and more to do, until a pass takes longer than ``longest_s``."""
        found: list[dict[str, Any]] = []
        for step in steps:
            row = self(name, **step)
            if row is None:
                break
            found.append({**row, **step})
            if row[self.timer]["ms"]["all"] * row["clips"] > 1000 * self.longest_s:
                break
        return found


def main_table(names: Sequence[str], batches: Sequence[int], measurer: Measurer) -> list[dict[str, Any]]:
    """Every detector at every batch size; TAL-Net first, whether it was asked for or not."""
    rows: list[dict[str, Any]] = []
    print(
        f"\n{'':14}{'':>6}{'clip':>15}{'segments':>14}{'ms a clip':>25}{'frames/s, network':>19}{'':>9}"
        f"{'with suppression':>20}"
    )
    print(
        f"{'detector':14}{'batch':>6}{'rows':>6}{'frames':>9}{'found':>8}{'kept':>6}"
        f"{'forward':>9}{'decode':>8}{'suppr.':>8}{measurer.timer:>11}{'clock':>8}{'to talnet':>10}"
        f"{measurer.timer:>10}{'to talnet':>10}"
    )
    for clips in batches:
        base: dict[str, Any] | None = None
        for name in dict.fromkeys([BASE, *names]):
            row = measurer(name, clips=clips)
            if row is None:
                continue
            base = row if name == BASE else base
            timed = row[measurer.timer]
            speed, plain = timed["frames_per_s"], None if base is None else base[measurer.timer]["frames_per_s"]
            row["to_talnet"] = None if plain is None else {key: speed[key] / plain[key] for key in speed}
            rows.append(row)
            ratios = ["-", "-"] if plain is None else [f"{value:.3f}" for value in row["to_talnet"].values()]
            print(
                f"{name:14}{clips:>6}{row['rows']:>6}{row['frames']:>9}{row['found']:>8.0f}{row['kept']:>6.0f}"
                f"{timed['ms']['forward']:>9.1f}{timed['ms']['decode']:>8.1f}{timed['ms']['suppress']:>8.1f}"
                f"{speed['network']:>11.0f}{row['clock']['frames_per_s']['network']:>8.0f}{ratios[0]:>10}"
                f"{speed['all']:>10.0f}{ratios[1]:>10}",
                flush=True,
            )
    print("\nIn the papers (other devices; the first three with the backbone, which is most of the work):")
    for name, what, speed in PAPERS:
        print(f"  {name:8} paper, {what}: {speed}")
    return rows


def length_table(names: Sequence[str], lengths: Sequence[int], measurer: Measurer) -> list[dict[str, Any]]:
    """Forward and decode of one clip of more and more rows."""
    rows: list[dict[str, Any]] = []
    print(f"\nms a clip, network, {measurer.timer}, by rows of the clip\n{'':14}" + "".join(f"{n:>9}" for n in lengths))
    for name in names:
        steps = measurer.ladder(name, ({"rows": n} for n in lengths))
        rows += steps
        print(f"{name:14}" + _cells(steps, len(lengths), measurer.timer), flush=True)
    return rows


def proposal_table(names: Sequence[str], measurer: Measurer, *, quick: bool) -> list[dict[str, Any]]:
    """Forward and decode of one clip with more and more proposals, by what the recipe calls them."""
    rows: list[dict[str, Any]] = []
    print(f"\nms a clip, network, {measurer.timer}, by proposals")
    for title, (name, key, values) in PROPOSALS.items():
        if name not in names:
            continue
        values = (values[0], values[-1]) if quick else values
        steps = measurer.ladder(name, ({"sets": [f"{key}={value}"]} for value in values))
        rows += steps
        print(f"{title:28}" + "".join(f"{value:>9g}" for value in values))
        print(f"{'':28}" + _cells(steps, len(values), measurer.timer), flush=True)
    return rows


def _cells(steps: Sequence[dict[str, Any]], count: int, timer: str) -> str:
    cells = [f"{step[timer]['ms']['network']:>9.1f}" for step in steps]
    return "".join(cells + [f"{'-':>9}"] * (count - len(cells)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    parts = ("main", "lengths", "proposals")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--batch", nargs="+", type=int, help="clips a pass [default: 1 8]")
    parser.add_argument("--repeats", type=int, help="passes that count [default: 3]")
    parser.add_argument(
        "--longest", type=float, default=1.5, help="a detector's table stops at a pass of so many seconds"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 [default: CUDA where there is one]")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--quick", action="store_true", help="one pass, batch 1, 64 and 128 rows, fewest and most")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    batches = options.batch or ([1] if options.quick else [1, 8])
    repeats = options.repeats if options.repeats is not None else (1 if options.quick else 3)
    if min(*batches, repeats, 1 if options.threads is None else options.threads) < 1:
        parser.error("--batch, --repeats and --threads are at least 1")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        device = pick_device(options.device)
    except TadError as error:
        parser.error(str(error))
    measurer = Measurer(device=device, repeats=repeats, longest_s=options.longest)
    cuda = device.type == "cuda"
    about = {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "repeats": repeats, "classes": CLASSES,
        "timer": measurer.timer,
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    tables: dict[str, list[dict[str, Any]]] = {}
    if "main" in options.parts:
        tables["main"] = main_table(options.detectors, batches, measurer)
    if "lengths" in options.parts:
        tables["lengths"] = length_table(options.detectors, LENGTHS[:2] if options.quick else LENGTHS, measurer)
    if "proposals" in options.parts:
        tables["proposals"] = proposal_table(options.detectors, measurer, quick=options.quick)
    if options.json:
        papers = [dict(zip(("detector", "what", "speed"), paper, strict=True)) for paper in PAPERS]
        text = json.dumps({**about, **tables, "papers": papers, "failures": measurer.failures}, indent=2)
        options.json.write_text(text, encoding="utf-8")
    return 1 if measurer.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
