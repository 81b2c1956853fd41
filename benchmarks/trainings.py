"""Trainings side by side: detectors and their switches on one store, each in a process of its own.

    python -m benchmarks.trainings systems --store S --annotations A --out FOLDER [--seeds 0 1] [--jobs 1]

Sets: ``systems`` (BMN with 0, 1, 2 LGTEs for half as long, BMN, ETAD), ``refined`` (TCANet with both decodings, on the
BMN of ``systems``), ``ratios`` (proposal sampling of ETAD at 3 to 100 %),
``samplers``, ``stages``, ``enhancement``, ``detect-ratios`` (of the ETAD of ``ratios``); for videos of many classes
``sparse`` (SP-TAD with 1 to 6 heads, and without the action head) and ``scales`` (AFSD, TAL-MTS with RFP).

Prints a table: average mAP with the run's own classes, with each video's true majority class, and as one class; with
the ranking, and with the boundaries of the truth; AR@1/5/10/100 and AUC; seconds of training by the clock and of the
processor, the latter an epoch too; peak memory of the process; processor milliseconds a video of detection. What is in
FOLDER already is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tad.annotations import Truth, read_truth
from tad.detect import Run, detect, train_detector
from tad.detect.infer import detections
from tad.detect.interface import Segments
from tad.detect.raw import load_raw
from tad.detect.recipes import detect_recipe
from tad.detect.segments import segment_tiou
from tad.evaluate import average_recall, detection_map
from tad.recipe import ClassesRecipe

TIOU = (0.3, 0.4, 0.5, 0.6, 0.7)
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
BMN, TCANET, ETAD, SPTAD, AFSD, TALMTS = (
    f"{name}/planted.yaml" for name in ("bmn", "tcanet", "etad", "sptad", "afsd", "talmts")
)
# name of a set -> name of a training in it -> recipe, --set; "{bmn}" is the folder of the best BMN of the same seed
SETS: dict[str, dict[str, tuple[str, list[str]]]] = {
    "systems": {
        **{
            name: (BMN, [f"model.lgte={count}", "train.epochs=5"])
            for count, name in enumerate(("bmn", "bmn-lgte1", "bmn-lgte2"))
        },
        "bmn-long": (BMN, []),
        "etad": (ETAD, []),
    },
    "refined": {  # after "systems"
        "tcanet": (TCANET, ["proposals.run={bmn}"]),
        "tcanet-legacy": (TCANET, ["proposals.run={bmn}", "model.legacy_decode=true"]),
    },
    "ratios": {
        "etad-3": (ETAD, ["model.ratio=0.03"]),
        "etad": (ETAD, []),
        "etad-12": (ETAD, ["model.ratio=0.12"]),
        "etad-25": (ETAD, ["model.ratio=0.25"]),
        "etad-100": (ETAD, ["model.ratio=1.0"]),
    },
    "samplers": {
        "etad": (ETAD, []),
        **{
            f"etad-{name}": (ETAD, [f"model.sampler={name}"])
            for name in ("grid", "block", "fps", "dpp", "iou-balanced", "scale-balanced")
        },
    },
    "stages": {
        "etad-1-stage": (ETAD, ["model.tiou_thresholds=[0.7]", "model.stages=1"]),
        "etad-2-stages": (ETAD, ["model.tiou_thresholds=[0.7, 0.8]", "model.stages=2"]),
        "etad": (ETAD, []),
    },
    "enhancement": {
        "etad-conv": (ETAD, ["model.enhancement=conv"]),
        "etad-transformer": (ETAD, ["model.enhancement=transformer"]),
        "etad": (ETAD, []),
    },
    "sparse": {
        **{f"sptad-{heads}": (SPTAD, [f"model.heads={heads}"]) for heads in (1, 2, 4, 6)},
        "sptad-no-action": (SPTAD, ["model.action_head=false"]),
    },
    "scales": {"afsd": (AFSD, []), "talmts": (TALMTS, ["model.rfp=false"]), "talmts-rfp": (TALMTS, [])},
    "detect-ratios": {f"etad@{ratio}": (ETAD, [f"model.detect_ratio={ratio / 100}"]) for ratio in (100, 20, 15, 10, 6)},
}
BEST_BMN = "bmn-long"
COLUMNS = (
    *("map", "map_truth", "map_one_class", "map_oracle_ranking", "map_oracle_boundaries"),
    *("ar@1", "ar@5", "ar@10", "ar@100", "auc", "train_s", "train_cpu_s", "epoch_cpu_s", "peak_mb", "detect_ms"),
)


def one(options: argparse.Namespace) -> None:
    """Train, detect and score one recipe; the result goes to ``result.json`` of its folder."""
    torch.set_num_threads(1)
    out = Path(options.out)
    recipe = detect_recipe(None, file=options.recipe, sets=options.sets, seed=options.seed)
    truth = read_truth(options.annotations)
    result: dict[str, Any] = {}
    if options.rescore:
        result = json.loads((out / "result.json").read_text())
        result |= scores(truth.subset(options.subset), out / "raw" / "test.npz")
        (out / "result.json").write_text(json.dumps(result, indent=2))
        return
    if options.trained is not None:
        run = Run.load(options.trained)
        run = Run(run.path, recipe.model_copy(update={"seed": run.recipe.seed}), run.classes, run.features)
    else:
        before = cpu_s()
        metrics = train_detector(recipe, store=options.store, annotations=truth, out=out, resume=True, device="cpu")
        run = Run.load(out)
        epochs = len(pd.read_csv(out / "metrics.csv"))
        result |= {"train_s": metrics["seconds"], "train_cpu_s": cpu_s() - before}
        result["epoch_cpu_s"] = result["train_cpu_s"] / epochs
        result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    part = truth.subset(options.subset)
    before = cpu_s()
    raw_file = out / "raw" / "test.npz"
    detect(run=run, store=options.store, subset=options.subset, annotations=truth, device="cpu", raw_out=raw_file)
    videos = len(part.videos)
    result["detect_ms"] = 1000 * (cpu_s() - before) / videos
    result |= scores(part, raw_file)
    (out / "result.json").write_text(json.dumps(result, indent=2))


def cpu_s() -> float:
    """Seconds of processor time of this process so far: with one thread, what a quiet machine would have taken."""
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def scores(part: Truth, raw_file: Path) -> dict[str, float]:
    """What raw detections are worth, in percent, and what they would be worth if one of their parts were perfect."""
    raw = load_raw(raw_file)
    found = detections(raw)[0]
    result = {"map": average_map(part.segments, found)}
    result |= {f"map_{t:g}": 100 * float(v) for t, v in detection_map(part, found, tiou=TIOU).map.items()}
    if not raw.class_agnostic:
        return result
    counts = pd.crosstab(part.segments["video"], part.segments["label"]).reindex(part.videos["video"], fill_value=0)
    majority = (counts.eq(counts.max(axis=1), axis=0) & counts.gt(0)).astype(float)

    def by_truth(**changes: Any) -> float:
        changed = replace(raw, class_scores=majority, **changes)
        return average_map(part.segments, detections(changed, classes=ClassesRecipe(top=1))[0])

    result["map_truth"] = by_truth()
    result["map_oracle_ranking"] = by_truth(segments=[ranked_by_truth(s, part) for s in raw.segments])
    result["map_oracle_boundaries"] = by_truth(segments=[moved_to_truth(s, part) for s in raw.segments])
    proposals = detections(replace(raw, class_scores=None))[0]
    one_class = part.segments.assign(label="action")
    result["map_one_class"] = average_map(one_class, proposals.assign(label="action"))
    recall = average_recall(part, proposals)
    result |= {f"ar@{n}": 100 * recall.ar[n] for n in (1, 5, 10, 100) if n in recall.ar}
    return result | {"auc": 100 * recall.auc}


def average_map(truth: pd.DataFrame, found: pd.DataFrame) -> float:
    return 100 * float(detection_map(truth, found, tiou=TIOU).average)


def overlap(segments: Segments, part: Truth) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest tIoU (N,) of each segment with a truth of its video, and that truth (N, 2) in seconds."""
    own = part.segments[part.segments["video"] == segments.video]
    truths = torch.tensor(own[["start_s", "end_s"]].to_numpy(), dtype=segments.segments_s.dtype)
    if len(truths) == 0:
        return torch.zeros(len(segments)), segments.segments_s
    tiou, best = segment_tiou(segments.segments_s, truths).max(1)
    return tiou, truths[best]


def ranked_by_truth(segments: Segments, part: Truth) -> Segments:
    """Scored by their tIoU with the truth instead of the network's confidence."""
    return replace(segments, scores=overlap(segments, part)[0])


def moved_to_truth(segments: Segments, part: Truth) -> Segments:
    """With the boundaries of the truth where they overlap one by at least 0.3."""
    tiou, truths = overlap(segments, part)
    return replace(segments, segments_s=torch.where(tiou[:, None] >= 0.3, truths, segments.segments_s))


def folder_of(options: argparse.Namespace, name: str, seed: int) -> Path:
    return Path(options.out) / f"{name}-s{seed}"


def start(options: argparse.Namespace, name: str, recipe: str, sets: list[str], seed: int) -> dict[str, Any]:
    """One training in a process of its own, unless its result is there."""
    out = folder_of(options, name, seed)
    if not (out / "result.json").is_file():
        sets = [item.format(bmn=folder_of(options, BEST_BMN, seed), seed=seed) for item in [*sets, *options.sets]]
        command = [
            sys.executable,
            "-m",
            "benchmarks.trainings",
            "one",
            "--out",
            str(out),
            "--recipe",
            str(RECIPES / recipe),
        ]
        command += ["--store", options.store.format(seed=seed), "--annotations", options.annotations.format(seed=seed)]
        command += ["--subset", options.subset, "--seed", str(seed), *(f"--set={item}" for item in sets)]
        if "@" in name:
            command += ["--trained", str(folder_of(options, name.split("@")[0], seed))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"failed": done.stderr.strip().splitlines()[-1:]}
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=[*SETS, "one"])
    parser.add_argument("--store", required=True, help="{seed} in it stands for the seed")
    parser.add_argument("--annotations", required=True, help="likewise")
    parser.add_argument("--subset", default="validation", help="what is detected in and scored")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="names of the set's trainings")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, of one thread each")
    parser.add_argument(
        "--set", dest="sets", action="append", default=[], help="for every training; {seed} as in --store"
    )
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--trained", help=argparse.SUPPRESS)
    parser.add_argument("--rescore", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.set == "one":
        one(options)
        return
    chosen = {name: how for name, how in SETS[options.set].items() if options.only is None or name in options.only}
    work = [(name, *how, seed) for seed in options.seeds for name, how in chosen.items()]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda item: start(options, *item), work))
    table = {f"{name} seed {seed}": result for (name, _, _, seed), result in zip(work, results, strict=True)}
    width = max(map(len, table))
    print(" " * width, *(f"{column:>21}" for column in COLUMNS))
    for name, result in table.items():
        if "failed" in result:
            print(f"{name:{width}} failed: {result['failed']}")
            continue
        print(f"{name:{width}}", *(f"{result[c]:21.2f}" if c in result else " " * 21 for c in COLUMNS))
    (Path(options.out) / f"{options.set}.json").write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
