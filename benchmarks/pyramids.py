"""One-stage detectors on a pyramid, switch by switch, on maps and frames of small synthetic videos.

    python -m benchmarks.pyramids table6 --out FOLDER                                      (I3D, untrained)
    python -m benchmarks.pyramids table5 --out FOLDER --backbone tiny --weights DEMO/weights/backbone.safetensors

``table5``: SP-TAD with a single level, with a pyramid on the last level, with one on three levels of the backbone
(Table 5 of its paper). ``table6``: TAL-MTS without and with RFP, STT and FSA (Table VI of its paper; ``fsa`` alone is
not in it) on the last two levels as maps, and frames. ``prepare`` makes the videos and the store, and no more.

In FOLDER: synthetic videos of 64x64 (``videos/``, ``annotations.json``), ``features.zarr`` with the backbone's levels,
maps and the frames themselves, and ``runs/``. Both backbones can share it. Extraction and every training have a process
and one thread of their own; what is there already is not done again. Recipes: ``recipes/sptad/synth.yaml``,
``recipes/talmts/synth.yaml``. The default, I3D with random weights, has learnt nothing: its columns compare what
detectors make of the same weak features. ``tad demo --out DEMO`` trains the small backbone, on videos of other seeds.

Prints a table: average mAP over tIoU 0.3 to 0.7 in the paper and here, mAP at each, seconds of the processor for
training and for an epoch, peak memory of the process, processor milliseconds a video of detection.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.trainings import RECIPES
from tad.detect.recipes import detect_recipe
from tad.errors import TadError
from tad.extract import extract
from tad.recipe import ExtractRecipe
from tad.store import open_store
from tad.synth import FPS, make_videos

SIZE = (64, 64)  # of the videos
ACTION_S = (1.0, 12.0)  # every action fits into a clip
CLIP_FRAMES = 256  # as in both papers; here 20.5 s
TRAIN_FRAMES, DETECT_FRAMES = 64, 128  # from one clip to the next
PATCHES = 4  # a frame's side in patches of STT and FSA, as in TAL-MTS: 96 / 24


@dataclass(frozen=True)
class Network:
    """A backbone whose last three stage outputs are stored, and the windows that they are joined from."""

    stream: str
    levels: dict[str, int]  # fine to coarse -> frames a row
    size: int  # height and width of what it sees
    window: int
    stride: int

    @property
    def maps(self) -> list[str]:
        """The levels that are stored with height and width: the last two."""
        return list(self.levels)[-2:]


NETWORKS = {
    "i3d": Network("i3d-rgb", {"s2": 2, "s4": 4, "s8": 8}, size=96, window=64, stride=48),
    "tiny": Network("tiny", {"s1": 1, "s2": 2, "s4": 4}, size=32, window=32, stride=16),
}


def modules(*on: str) -> list[str]:
    """``--set`` of a row of Table VI."""
    return [f"model.{name}={str(name in on).lower()}" for name in ("rfp", "stt", "fsa")]


# table -> row -> average mAP in the paper, on THUMOS14 with a backbone that learns along; --set
TABLES: dict[str, dict[str, tuple[float | None, list[str]]]] = {
    "table5": {
        "single": (50.2, ["model.pyramid=single"]),
        "high": (49.0, ["model.pyramid=high"]),
        "inter": (53.5, ["model.pyramid=inter"]),
    },
    "table6": {
        "baseline": (52.0, ["detector=afsd", *modules()]),
        "rfp": (52.6, modules("rfp")),
        "stt": (52.8, modules("stt")),
        "fsa": (None, modules("fsa")),
        "rfp-stt": (53.1, modules("rfp", "stt")),
        "rfp-stt-fsa": (54.2, modules("rfp", "stt", "fsa")),
    },
}
TITLES = {"table5": "SP-TAD, Table 5", "table6": "TAL-MTS, Table VI"}
FILES = {"table5": "sptad/synth.yaml", "table6": "talmts/synth.yaml"}
COLUMNS = (
    *("paper", "map", "map_0.3", "map_0.4", "map_0.5", "map_0.6", "map_0.7"),
    *("train_cpu_s", "epoch_cpu_s", "peak_mb", "detect_ms"),
)


def row_sets(network: Network, table: str, row: str, *, widths: dict[str, int], frame_size: int) -> list[str]:
    """``--set`` that make the synth recipe of ``table`` its ``row`` on the levels of ``network``.

    ``widths`` are the channels of its levels in the store. Clips and the steps between them are as many frames for
    every network and every row: strides count rows of the first level that is read.
    """
    sets = TABLES[table][row][1]
    if table == "table5":
        levels = list(network.levels)
        first = levels[0] if row == "inter" else levels[-1]
        strides = network.levels[first]
        changes: dict[str, Any] = {
            "streams": [network.stream],
            "model.levels": levels,
            "model.level_channels": {level: widths[level] for level in levels},
            "model.rows": CLIP_FRAMES // network.levels[levels[0]],
        }
    else:
        strides = network.levels[network.maps[0]]
        looks = any(f"model.{name}=true" in sets for name in ("stt", "fsa"))
        changes = {
            "streams": [network.stream, "frames"] if looks else [network.stream],
            "model.levels": [f"{level}-map" for level in network.maps],
            "model.frames": "frames" if looks else None,
            "model.frame_factor": strides,
            "model.rows": CLIP_FRAMES // strides,
            "model.stt_patch": frame_size // PATCHES,
            "model.fsa_patch": frame_size // PATCHES,
        }
    changes |= {"data.train_stride": TRAIN_FRAMES // strides, "data.detect_stride": DETECT_FRAMES // strides}
    return [*sets, *(f"{key}={json.dumps(value)}" for key, value in changes.items())]


# ---- videos and features ---------------------------------------------------------------------------------------------
def prepare(options: argparse.Namespace) -> None:
    """Make what FOLDER lacks: videos, truth, the network's levels and maps, frames.

    Raises
    ------
    TadError : FOLDER holds other videos, or streams made otherwise; a video cannot be read.
    """
    network, out = NETWORKS[options.backbone], Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    wanted = {
        "training": options.training,
        "testing": options.testing,
        "seconds": list(options.seconds),
        "seed": options.video_seed,
    }
    marker = out / "videos.json"
    if marker.is_file() and (known := json.loads(marker.read_text(encoding="utf-8"))) != wanted:
        raise TadError(f"{out} is of other videos ({known}, wanted {wanted}): take another --out")
    write_json(marker, wanted)
    made = [
        video.path
        for subset in ("training", "testing")
        for video in make_videos(
            out,
            videos=wanted[subset],
            seed=options.video_seed,
            subset=subset,
            duration_s=tuple(options.seconds),
            size=SIZE,
            action_s=ACTION_S,
        )
    ]
    frames = (options.frame_size, options.frame_size)
    recipes = [
        ExtractRecipe(
            backbone=network.stream,
            weights=options.weights,
            window=network.window,
            stride=network.stride,
            fps=FPS,
            short_side=network.size,
            crop=(network.size, network.size),
            levels=True,
            maps=tuple(network.maps),
        ),
        ExtractRecipe(backbone="frames", fps=FPS, short_side=options.frame_size, crop=frames),
    ]
    before = time.process_time()
    report = extract(made, store=out / "features.zarr", recipes=recipes, batch=2, device="cpu")
    if report.failures:
        raise TadError(f"{len(report.failures)} videos cannot be read, the first: {report.failures[0]}")
    print(
        f"{report.written} entries written, {report.already} were there; {time.process_time() - before:.0f} CPU s",
        file=sys.stderr,
    )


def stored_widths(store: Path, stream: str) -> tuple[dict[str, int], str]:
    """Channels of the levels of ``stream``, and the id of its weights."""
    with open_store(store) as opened:
        catalog = opened.catalog()
        own = catalog[catalog["stream"] == stream].drop_duplicates("level")
        widths = {str(level): int(width) for level, width in zip(own["level"], own["channels"], strict=True)}
        return widths, str(opened.stream_attrs(stream)["spec"]["weights"])


def write_json(path: Path, data: Any) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


# ---- trainings -------------------------------------------------------------------------------------------------------
def in_a_process(module: str, arguments: list[str]) -> str | None:
    """``python -m module``, with one thread; the last line that it said when it failed, else None."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True, check=False
    )
    said = done.stderr.strip().splitlines()
    if done.returncode == 0:
        print(*said, sep="\n", file=sys.stderr, end="\n" if said else "")
        return None
    return said[-1] if said else f"ended with status {done.returncode}, out of memory perhaps"


def start(options: argparse.Namespace, row: str, seed: int, sets: list[str], weights: str) -> dict[str, Any]:
    """One training, unless its result is there. ``failed`` with the last line of one that failed, or why it was not
    begun: a result of other settings lies there."""
    recipe = detect_recipe(file=RECIPES / FILES[options.table], sets=sets, seed=seed)
    asked = {"weights": weights, "recipe": recipe.model_dump(mode="json")}
    runs = Path(options.out) / "runs"
    run = runs / f"{options.table}-{options.backbone}-{row}-s{seed}"
    kept = runs / f"{run.name}.json"
    if kept.is_file():
        known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if known.pop("asked") != asked:
            return {"failed": f"{kept} is of other settings: take another --out, or delete it and {run.name}"}
        return known
    arguments = ["one", "--out", str(run), "--recipe", str(RECIPES / FILES[options.table])]
    arguments += ["--store", str(Path(options.out) / "features.zarr"), "--subset", "testing", "--seed", str(seed)]
    arguments += ["--annotations", str(Path(options.out) / "annotations.json")]
    failed = in_a_process("benchmarks.trainings", [*arguments, *(f"--set={item}" for item in sets)])
    if failed is not None:
        return {"failed": failed}
    result: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    write_json(kept, {"asked": asked, **result})
    return result


def means(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the seeds of one row; empty where one is missing."""
    if any("failed" in result for result in results):
        return {}
    return {key: statistics.mean(result[key] for result in results) for key in COLUMNS if key in results[0]}


def lines(table: str, results: dict[str, list[dict[str, Any]]], seeds: list[int]) -> list[str]:
    """The table as text: a line a training, and where there are several seeds their mean."""
    width = max(map(len, results)) + 10
    told = [" " * width + "".join(f"{column:>13}" for column in COLUMNS)]
    for row, of_seeds in results.items():
        each = [(f"{row} seed {seed}", result) for seed, result in zip(seeds, of_seeds, strict=True)]
        if len(seeds) > 1:
            each.append((f"{row} mean", means(of_seeds)))
        for name, result in each:
            if "failed" in result:
                told.append(f"{name:{width}}failed: {result['failed']}")
                continue
            values = {"paper": TABLES[table][row][0], **result}
            cells = [f"{values[c]:13.1f}" if values.get(c) is not None else f"{'-':>13}" for c in COLUMNS]
            told.append(f"{name:{width}}" + "".join(cells))
    return told


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("table", choices=[*TABLES, "prepare"])
    made.add_argument("--out", required=True)
    made.add_argument("--backbone", choices=tuple(NETWORKS), default="i3d")
    made.add_argument("--weights", default="random:0", help="a checkpoint of the backbone, or random:SEED (default)")
    made.add_argument("--frame-size", type=int, choices=(48, 96), default=48, help="of the frames that TAL-MTS reads")
    made.add_argument("--training", type=int, default=60, help="videos to learn from")
    made.add_argument("--testing", type=int, default=30, help="videos to score on")
    made.add_argument("--seconds", type=float, nargs=2, default=[20.0, 40.0], help="shortest and longest video")
    made.add_argument(
        "--video-seed", type=int, default=1, help="other than the demo's, whose backbone knows its videos"
    )
    made.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings")
    made.add_argument("--only", nargs="+", help="rows of the table")
    made.add_argument("--jobs", type=int, default=1, help="trainings at a time, of one thread each")
    made.add_argument("--set", dest="sets", action="append", default=[], help="for every training")
    made.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # prepare in this process
    return made


def main(arguments: list[str] | None = None) -> int:
    """0; 1 when something failed, which is told."""
    made = parser()
    options = made.parse_args(arguments)
    shortest, longest = options.seconds
    if min(options.training, options.testing, options.jobs) < 1 or not 2 <= shortest <= longest < 3600:
        made.error("--training, --testing and --jobs are at least 1, --seconds at least 2, the shortest first")
    if options.table == "prepare" and options.here:
        try:
            prepare(options)
        except TadError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    rows = TABLES.get(options.table, {})
    if unknown := set(options.only or ()) - set(rows):
        made.error(f"--only {' '.join(sorted(unknown))}: the rows are {', '.join(rows)}")
    if len(set(options.seeds)) < len(options.seeds):
        made.error("--seeds must differ")
    passed = ["--out", options.out, "--backbone", options.backbone, "--weights", options.weights]
    for name in ("frame_size", "training", "testing", "video_seed"):
        passed += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    passed += ["--seconds", *map(str, options.seconds)]
    failed = in_a_process("benchmarks.pyramids", ["prepare", "--here", *passed])
    if failed is not None:
        print(failed, file=sys.stderr)
        return 1
    if options.table == "prepare":
        return 0
    network, out = NETWORKS[options.backbone], Path(options.out)
    widths, weights = stored_widths(out / "features.zarr", network.stream)
    (out / "runs").mkdir(exist_ok=True)
    sets = {
        row: row_sets(network, options.table, row, widths=widths, frame_size=options.frame_size) + options.sets
        for row in rows
        if options.only is None or row in options.only
    }
    work = [(row, seed) for row in sets for seed in options.seeds]
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            done = list(pool.map(lambda item: start(options, item[0], item[1], sets[item[0]], weights), work))
    except TadError as error:  # of --set
        print(error, file=sys.stderr)
        return 1
    found = dict(zip(work, done, strict=True))
    results = {row: [found[row, seed] for seed in options.seeds] for row in sets}
    learnt = f"{options.weights}, untrained" if options.weights.startswith("random") else options.weights
    print(
        f"{TITLES[options.table]}; {network.stream} ({learnt}) of {options.training} + {options.testing} synthetic "
        f"videos of {options.seconds[0]:g} to {options.seconds[1]:g} s; paper: THUMOS14, backbone trained along"
    )
    print("\n".join(lines(options.table, results, options.seeds)))
    about = {"backbone": options.backbone, "weights": options.weights, "seeds": options.seeds, "results": results}
    write_json(out / f"{options.table}-{options.backbone}.json", about)
    return 1 if any("failed" in result for row in results.values() for result in row) else 0


if __name__ == "__main__":
    sys.exit(main())
