"""Trainings side by side: detectors and their switches on one store, each in a process of its own.

    python -m benchmarks.trainings systems --store S --annotations A --out FOLDER [--seeds 0 1] [--jobs 1]

Sets: ``systems`` (BMN with 0, 1, 2 LGTEs, ETAD), ``refined`` (TCANet with both decodings, on the BMN of ``systems``),
``ratios`` (proposal sampling of ETAD at 3 to 100 %), ``samplers``, ``stages``, ``enhancement``, ``detect-ratios`` (of the
trained ETAD). Prints a table: average mAP with the run's own classes, with the truth's majority class of each video, and
as one class; AR@1/5/10/100 and AUC; seconds of training and of an epoch; peak memory of the process; milliseconds a video
of detection. What is in FOLDER already is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
BMN, TCANET, ETAD = (f"{name}/planted.yaml" for name in ("bmn", "tcanet", "etad"))
# name of a set -> name of a training in it -> recipe, --set; "{bmn}" is the folder of the best BMN of the same seed
SETS: dict[str, dict[str, tuple[str, list[str]]]] = {
    "systems": {
        "bmn": (BMN, ["model.lgte=0"]),
        "bmn-lgte1": (BMN, ["model.lgte=1"]),
        "bmn-lgte2": (BMN, ["model.lgte=2"]),
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
    "detect-ratios": {f"etad@{ratio}": (ETAD, [f"model.detect_ratio={ratio / 100}"]) for ratio in (100, 20, 15, 10, 6)},
}
BEST_BMN = "bmn-lgte2"
COLUMNS = ("map", "map_truth", "map_one_class", "ar@1", "ar@5", "ar@10", "ar@100", "auc", "train_s", "epoch_s",
           "peak_mb", "detect_ms")  # fmt: skip


def one(options: argparse.Namespace) -> None:
    """Train, detect and score one recipe; the result goes to ``result.json`` of its folder."""
    import resource

    import pandas as pd
    import torch

    from tad.annotations import read_truth
    from tad.detect import Run, detect, train_detector
    from tad.detect.infer import detections
    from tad.detect.raw import load_raw
    from tad.detect.recipes import detect_recipe
    from tad.evaluate import average_recall, detection_map
    from tad.recipe import ClassesRecipe

    torch.set_num_threads(1)
    out = Path(options.out)
    recipe = detect_recipe(None, file=options.recipe, sets=options.sets, seed=options.seed)
    truth = read_truth(options.annotations)
    result: dict[str, Any] = {}
    detect_only = options.trained is not None
    if detect_only:
        run = Run.load(options.trained)
        run = Run(run.path, recipe.model_copy(update={"seed": run.recipe.seed}), run.classes, run.features)
    else:
        metrics = train_detector(recipe, store=options.store, annotations=truth, out=out, resume=True, device="cpu")
        run = Run.load(out)
        history = pd.read_csv(out / "metrics.csv")
        result |= {"train_s": metrics["seconds"], "epoch_s": float(history["seconds"].median())}
        result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    part = truth.subset(options.subset)
    begin = time.perf_counter()
    raw_file = out / "raw" / "test.npz"
    found = detect(
        run=run, store=options.store, subset=options.subset, annotations=truth, device="cpu", raw_out=raw_file
    )
    videos = len(part.videos)
    result["detect_ms"] = 1000 * (time.perf_counter() - begin) / videos
    tiou = (0.3, 0.4, 0.5, 0.6, 0.7)
    scored = detection_map(part, found, tiou=tiou)
    result |= {"map": 100 * float(scored.average), **{f"map_{t:g}": 100 * float(v) for t, v in scored.map.items()}}
    raw = load_raw(raw_file)
    if raw.class_agnostic:
        counts = pd.crosstab(part.segments["video"], part.segments["label"]).reindex(part.videos["video"], fill_value=0)
        raw.class_scores = counts.eq(counts.max(axis=1), axis=0) & counts.gt(0)
        raw.class_scores = raw.class_scores.astype(float)
        by_truth = detections(raw, classes=ClassesRecipe(top=1))[0]
        result["map_truth"] = 100 * float(detection_map(part, by_truth, tiou=tiou).average)
        raw.class_scores = None
        proposals = detections(raw)[0]
        same = part.segments.assign(label="action")
        result["map_one_class"] = 100 * float(detection_map(same, proposals.assign(label="action"), tiou=tiou).average)
        recall = average_recall(part, proposals)
        result |= {f"ar@{n}": 100 * recall.ar[n] for n in (1, 5, 10, 100) if n in recall.ar}
        result["auc"] = 100 * recall.auc
    (out / "result.json").write_text(json.dumps(result, indent=2))


def folder_of(options: argparse.Namespace, name: str, seed: int) -> Path:
    return Path(options.out) / f"{name}-s{seed}"


def start(options: argparse.Namespace, name: str, recipe: str, sets: list[str], seed: int) -> dict[str, Any]:
    """One training in a process of its own, unless its result is there."""
    out = folder_of(options, name, seed)
    if not (out / "result.json").is_file():
        sets = [item.format(bmn=folder_of(options, BEST_BMN, seed)) for item in sets] + options.sets
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
    parser.add_argument("--set", dest="sets", action="append", default=[], help="for every training")
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--trained", help=argparse.SUPPRESS)
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
    print(" " * width, *(f"{column:>13}" for column in COLUMNS))
    for name, result in table.items():
        if "failed" in result:
            print(f"{name:{width}} failed: {result['failed']}")
            continue
        print(f"{name:{width}}", *(f"{result[c]:13.2f}" if c in result else " " * 13 for c in COLUMNS))
    (Path(options.out) / f"{options.set}.json").write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
