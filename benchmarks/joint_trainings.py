"""What joint training is worth: trainings side by side on synthetic videos, each in a process of its own.

    python -m benchmarks.joint_trainings all --out FOLDER [--seeds 0 1] [--jobs 2]
    python -m benchmarks.joint_trainings modes ratios --out FOLDER [--only full egs-30] [--epochs 5] [--set key=value]

For every seed FOLDER first gets videos (``tad.synth``), a small backbone (``tiny``) that was fine-tuned for few steps
only, so that there is something left to learn, and its features and frames of the training videos. Then a detector
learns on these, alone (``pre-extracted``) or jointly, and its run detects in the testing videos, of which nothing was
seen before. Frames are 36 pixels high and wide, crops 32.

Sets: ``modes`` (ETAD Table 1), ``ratios`` and ``samplers`` of the snippets that gradients go through (Tables 4 and 5),
``backbone-lr`` (SP-TAD Table 4), ``frozen`` stages (ETAD Table 13), ``augmentation`` (Table 12; ``flip`` makes
clockwise counter-clockwise, so it should hurt here), all with TAL-Net, since a video holds several classes;
``etad``: modes with ETAD, where the column without classes is the one that says something; ``clip``: SP-TAD on stage
outputs of one pass. ``egs-30`` is what the other trainings with TAL-Net differ from in one thing.

Prints a table: average mAP at tIoU 0.3 to 0.7, mAP at 0.5, and average mAP as if there were one class, in percent;
processor seconds of an epoch and of all, without detection; by how much the process grew at most while it trained (of
this, what ``pre-extracted`` takes is the detector and libraries); the learning rate of the backbone; and the share of
snippets that gradients go through. Each set is written to FOLDER as JSON, seed by seed and as means over the seeds.
What is in FOLDER already is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd
import torch

from tad.annotations import Truth, read_truth, write_predictions
from tad.apply import extract_for_run
from tad.detect import Run, detect
from tad.detect.recipes import detect_recipe
from tad.errors import RecipeError
from tad.evaluate import detection_map
from tad.extract import extract
from tad.extract.finetune import finetune, finetune_recipe
from tad.joint import train_joint
from tad.recipe import DetectRecipe, ExtractRecipe
from tad.synth import FPS, make_videos
from tad.training.files import write_json

TIOU = (0.3, 0.4, 0.5, 0.6, 0.7)
TRAINING, TESTING = "training", "testing"
SHORT_SIDE, CROP = 36, 32  # pixels: room for random crops
WINDOW, STRIDE = 16, 8  # frames of a snippet, and from one to the next
RECIPES = Path(__file__).resolve().parents[1] / "recipes"


# ---- what is trained ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Kind:
    """A detector as all its trainings have it: by name, or from a file of ``recipes/``, with ``sets`` on top."""

    stream: str
    sets: tuple[str, ...]
    name: str | None = None
    file: str | None = None


ALL = (
    f"data.train_subset={TRAINING}",
    "data.holdout=0",
    "data.holdout_subset=null",
    "train.select=last",
    "joint.mode=egs",
    "joint.ratio=0.3",
    "joint.sampler=random",
    "joint.chunk=8",
    "joint.backbone_lr=3e-4",
    "joint.frozen_stages=0",
    "joint.random_crop=true",
)
KINDS = {
    "talnet": Kind(
        "tiny", ("model.width=64", "train.epochs=30", "train.batch_videos=2", "train.lr=2e-3"), name="talnet"
    ),
    "etad": Kind("tiny", ("train.epochs=8", "train.batch_videos=2"), file="etad/synth-joint.yaml"),
    "sptad": Kind(
        "tiny-levels",
        (
            "model={levels: [s1, s2, s4], level_channels: {s1: 32, s2: 64, s4: 128}, rows: 256, lateral_kernel: 3, "
            "width: 64, interaction_width: 16, feedforward: 128, heads: 3, proposals: 30}",
            "data.train_stride=128",
            "data.detect_stride=128",
            "train.epochs=20",
            "train.batch_videos=2",
            "train.lr=1e-3",
            "joint.mode=full",
            "joint.chunk=1",
        ),
        name="sptad",
    ),
}
Training = tuple[str, list[str]]  # of which kind, and what is otherwise than ALL and its kind say
EGS: Training = ("talnet", [])


def talnet(*sets: str) -> Training:
    return "talnet", [f"joint.{item}" for item in sets]


# name of a set -> name of a training in it -> the training; the same name is the same training everywhere
SETS: dict[str, dict[str, Training]] = {
    "modes": {
        "pre-extracted": talnet("mode=pre-extracted"),
        "pre-extracted-100": ("talnet", ["joint.mode=pre-extracted", "train.epochs=100"]),
        "bank-30": talnet("mode=bank"),
        "egs-30": EGS,
        "full": talnet("mode=full"),
        "full-checkpoint": talnet("mode=full", "checkpoint=true"),
    },
    "ratios": {
        "egs-0": talnet("ratio=0"),
        "egs-10": talnet("ratio=0.1"),
        "egs-30": EGS,
        "egs-100": talnet("ratio=1"),
    },
    "samplers": {
        "egs-30": EGS,
        **{f"egs-30-{name}": talnet(f"sampler={name}") for name in ("grid", "block", "fps", "dpp")},
    },
    "backbone-lr": {
        "lr-0": talnet("backbone_lr=0"),
        **{f"lr-{lr}": talnet(f"backbone_lr={lr}") for lr in ("1e-6", "1e-5", "1e-4")},
        "egs-30": EGS,
        "lr-1e-3": talnet("backbone_lr=1e-3"),
    },
    "frozen": {
        "egs-30": EGS,
        **{f"frozen-{stages}": talnet(f"frozen_stages={stages}") for stages in (1, 2, 3, 4)},
    },
    "augmentation": {
        "not-augmented": talnet("random_crop=false"),
        "egs-30": EGS,
        "jitter": talnet("random_crop=false", "jitter=true"),
        "crop-jitter": talnet("jitter=true"),
        "flip": talnet("random_crop=false", "flip=true"),
    },
    "etad": {
        "etad-pre-extracted": ("etad", ["joint.mode=pre-extracted"]),
        "etad-bank-30": ("etad", ["joint.mode=bank"]),
        "etad-egs-30": ("etad", []),
        "etad-full": ("etad", ["joint.mode=full"]),
    },
    "clip": {
        "sptad-pre-extracted": ("sptad", ["joint.mode=pre-extracted"]),
        "sptad-lr-0": ("sptad", ["joint.mode=egs", "joint.ratio=0"]),
        **{f"sptad-lr-{lr}": ("sptad", [f"joint.backbone_lr={lr}"]) for lr in ("1e-4", "3e-4")},
    },
}
TRAININGS = {name: training for chosen in SETS.values() for name, training in chosen.items()}
COLUMNS = ("map", "map_0.5", "map_one_class", "epoch_cpu_s", "train_cpu_s", "peak_mb", "backbone_lr", "ratio")


def recipe_of(name: str, *, sets: Sequence[str] = (), epochs: int | None = None, seed: int = 0) -> DetectRecipe:
    """The recipe of one of the ``TRAININGS``, with ``sets`` and then ``epochs`` on top."""
    of, own = TRAININGS[name]
    kind = KINDS[of]
    sets = [*ALL, *kind.sets, *own, *sets, *([] if epochs is None else [f"train.epochs={epochs}"])]
    file = None if kind.file is None else RECIPES / kind.file
    return detect_recipe(kind.name, file=file, streams=[kind.stream], sets=sets, seed=seed)


# ---- videos, backbone, features -------------------------------------------------------------------------------------
def prepare(root: Path, settings: dict[str, Any]) -> None:
    """Videos of both subsets, the backbone, and the training videos' features and frames, all from one seed.

    What is there already is used again; ``settings.json`` is written last, and says that all is.
    """
    train, test = settings["videos"]
    length, action = settings["duration_s"], settings["action_s"]
    for subset, count in ((TRAINING, train), (TESTING, test)):
        make_videos(
            root, videos=count, seed=settings["seed"], subset=subset, duration_s=length, action_s=action, size=(64, 64)
        )
    videos = files_of(root, TRAINING)
    sets = [
        f"train_subset={TRAINING}", "holdout=0", "select=last", "epochs=1", f"steps={settings['steps']}",
        f"fps={FPS}", f"short_side={SHORT_SIDE}", f"crop=[{CROP}, {CROP}]",
    ]  # fmt: skip
    tuned = finetune_recipe("tiny", sets=sets, seed=settings["seed"])
    finetune(
        tuned, videos=videos, annotations=root / "annotations.json", out=root / "backbone", device="cpu",
        resume=True, overwrite=True,
    )  # fmt: skip
    made: dict[str, Any] = {
        "backbone": "tiny", "weights": str(root / "backbone" / "backbone.safetensors"), "fps": FPS,
        "short_side": SHORT_SIDE, "crop": (CROP, CROP),
    }  # fmt: skip
    recipes = {
        "tiny": ExtractRecipe(**made, window=WINDOW, stride=STRIDE),
        "tiny-levels": ExtractRecipe(**made, window=64, stride=32, levels=True),
        "frames": ExtractRecipe(backbone="frames", fps=FPS, short_side=SHORT_SIDE, crop="full"),
    }
    store = root / "features.zarr"
    report = extract(videos, store=store, recipes=list(recipes.values()), names=list(recipes), device="cpu")
    if report.failures:
        sys.exit(f"the synthetic videos cannot be read: {report.failures[0]}")
    write_json(root / "settings.json", settings)


def files_of(root: Path, subset: str) -> list[Path]:
    """The video files of a subset."""
    return [
        root / "videos" / f"{video}.mp4"
        for video in read_truth(root / "annotations.json").subset(subset).videos["video"]
    ]


# ---- one training ---------------------------------------------------------------------------------------------------
class EpochClock:
    """A progress that measures processor seconds between the first and the last step of the detector's training."""

    def __init__(self) -> None:
        self.cpu_s, self.epochs = 0.0, set[str]()

    @contextmanager
    def __call__(self, total: float, label: str, unit: str) -> Iterator[EpochClock]:
        if label != "train":
            yield EpochClock()
            return
        begun = cpu_s()
        yield self
        self.cpu_s += cpu_s() - begun

    def advance(self, n: float = 1.0, note: str = "") -> None:
        self.epochs.add(note)  # "epoch 3/10"


def train(root: Path, out: Path, recipe: DetectRecipe) -> dict[str, Any]:
    """Train ``recipe`` into ``out`` on what was prepared in ``root``, detect in the testing videos, and score.

    With one thread, processor seconds are what a quiet machine would have taken.
    """
    joint = recipe.joint
    assert joint is not None
    truth = read_truth(root / "annotations.json")
    clock, before = EpochClock(), peak_mb()
    train_joint(
        recipe, store=root / "features.zarr", annotations=truth, out=out, resume=True, device="cpu", progress=clock
    )
    result: dict[str, Any] = {
        "mode": joint.mode,
        "backbone_lr": 0.0 if joint.mode == "pre-extracted" else joint.backbone_lr,
        "ratio": {"pre-extracted": 0.0, "full": 1.0}.get(joint.mode, joint.ratio),
    }
    if clock.epochs:  # none where the training was finished, and the process stopped after it
        result["epoch_cpu_s"] = clock.cpu_s / len(clock.epochs)
        result["train_cpu_s"] = result["epoch_cpu_s"] * recipe.train.epochs
        result["peak_mb"] = peak_mb() - before
    run = Run.load(out)
    with tempfile.TemporaryDirectory(dir=out, prefix=".testing-") as folder:
        features = Path(folder) / "features.zarr"
        report = extract_for_run(files_of(root, TESTING), run=run, store=features, device="cpu")
        if report.failures:
            sys.exit(f"a testing video cannot be read: {report.failures[0]}")
        found = detect(run=run, store=features, device="cpu")
        proposals = detect(run=run, store=features, device="cpu", proposals=True) if run.class_agnostic else found
    write_predictions(out / "predictions.json", found)
    return result | scores(truth.subset(TESTING), found, proposals)


def scores(truth: Truth, found: pd.DataFrame, proposals: pd.DataFrame) -> dict[str, float]:
    """mAP in percent of detections, and of ``proposals`` where every action is of one class."""
    result = detection_map(truth, found, tiou=TIOU)
    alike = detection_map(truth.segments.assign(label="action"), proposals.assign(label="action"), tiou=TIOU)
    values = {"map": result.average, **{f"map_{t:g}": v for t, v in result.map.items()}, "map_one_class": alike.average}
    return {key: 100 * float(value) for key, value in values.items()}


def cpu_s() -> float:
    """Seconds of processor time of this process so far."""
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def peak_mb() -> float:
    """The most memory that this process has held so far."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / (2**20 if sys.platform == "darwin" else 1024)


# ---- all of them ----------------------------------------------------------------------------------------------------
def settings_of(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What the videos, the backbone and the features of one seed depend on."""
    return {
        "seed": seed, "videos": list(options.videos), "duration_s": list(options.duration_s),
        "action_s": list(options.action_s), "steps": options.steps,
    }  # fmt: skip


def result_file(options: argparse.Namespace, name: str | None, seed: int) -> Path:
    """What says that a training, or None: the data of a seed, is done."""
    folder = Path(options.out).resolve()
    return folder / f"data-s{seed}" / "settings.json" if name is None else folder / f"{name}-s{seed}" / "result.json"


def given_of(options: argparse.Namespace, name: str | None, seed: int) -> dict[str, Any]:
    """What a result depends on; kept in its file, so that it is never taken for that of other options."""
    if name is None:
        return settings_of(options, seed)
    recipe = recipe_of(name, sets=options.sets, epochs=options.epochs, seed=seed)
    return {"data": settings_of(options, seed), "recipe": recipe.model_dump(mode="json")}


def done(options: argparse.Namespace, name: str | None, seed: int) -> dict[str, Any] | None:
    """The result that is there; ends the program where it is of other options."""
    file = result_file(options, name, seed)
    if not file.is_file():
        return None
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    given = json.loads(json.dumps(given_of(options, name, seed)))
    if (result if name is None else result["given"]) != given:
        sys.exit(f"{file} is of other options or another version: take another --out, or remove {file.parent}")
    return result


def one(options: argparse.Namespace, name: str | None, seed: int) -> None:
    """One step of the work, in this process."""
    torch.set_num_threads(1)
    file, given = result_file(options, name, seed), given_of(options, name, seed)
    root = result_file(options, None, seed).parent
    if name is None:
        prepare(root, given)
        return
    recipe = recipe_of(name, sets=options.sets, epochs=options.epochs, seed=seed)
    write_json(file, train(root, file.parent, recipe) | {"given": given})


def in_a_process(options: argparse.Namespace, name: str | None, seed: int) -> dict[str, Any]:
    """The result of one step, done in a process of its own unless it is there; of a failure its last line.

    This process does no work itself: a new one starts with the peak memory of the one that started it.
    """
    if (there := done(options, name, seed)) is not None:
        return there
    command = [sys.executable, "-m", "benchmarks.joint_trainings", *options.arguments]
    command += ["--step", name or "", "--seeds", str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        said = ended.stderr.strip().splitlines()
        return {"failed": said[-1] if said else f"ended with status {ended.returncode}"}
    result = done(options, name, seed)
    assert result is not None
    return result


def means(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of every column over the seeds that did not fail; of one training."""
    good = [result for result in results if "failed" not in result]
    if not good:
        return {"failed": results[0]["failed"]}
    known = {c: [result[c] for result in good if c in result] for c in COLUMNS}
    return {"seeds": len(good)} | {column: mean(values) for column, values in known.items() if values}


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Lines: a head, and one a row."""
    width = max(map(len, rows))
    lines = [" ".join([" " * width, *(f"{column:>13}" for column in COLUMNS)])]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"{name:{width}} failed: {row['failed']}")
            continue
        digits = {column: 6 if column == "backbone_lr" else 2 for column in COLUMNS}
        shown = (f"{row[c]:13.{digits[c]}f}" if c in row else " " * 13 for c in COLUMNS)
        lines.append(" ".join([f"{name:{width}}", *shown]).rstrip())
    return lines


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("names", nargs="+", choices=[*SETS, "all"], metavar="set", help=", ".join([*SETS, "all"]))
    made.add_argument("--out", required=True)
    made.add_argument("--only", nargs="+", choices=[*TRAININGS], metavar="name", help="these trainings of the sets")
    made.add_argument("--seeds", type=int, nargs="+", default=[0], help="of videos, backbone and training")
    made.add_argument("--jobs", type=int, default=1, help="processes at a time, of one thread each")
    made.add_argument("--epochs", type=int, help="of every training; by default 30, with ETAD 8 and SP-TAD 20")
    made.add_argument("--set", dest="sets", action="append", default=[], metavar="key=value", help="for every training")
    made.add_argument("--videos", type=int, nargs=2, default=(36, 24), metavar=("TRAIN", "TEST"))
    made.add_argument("--duration-s", type=float, nargs=2, default=(20.0, 40.0), metavar=("FROM", "TO"))
    made.add_argument("--action-s", type=float, nargs=2, default=(1.5, 10.0), metavar=("FROM", "TO"))
    made.add_argument("--steps", type=int, default=30, help="of fine-tuning the backbone, 16 clips each")
    made.add_argument("--step", help=argparse.SUPPRESS)  # a process of one training; empty: of the data
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is lacking, print and write the tables. Returns 1 where something failed, else 0."""
    made = parser()
    options = made.parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    if options.jobs < 1 or min(options.seeds) < 0 or (options.epochs is not None and options.epochs < 1):
        made.error("--jobs and --epochs are at least 1, --seeds at least 0")
    if options.step is not None:
        one(options, options.step or None, options.seeds[0])
        return 0
    sets = {name: SETS[name] for name in (SETS if "all" in options.names else options.names)}
    chosen = {
        name: [training for training in trainings if options.only is None or training in options.only]
        for name, trainings in sets.items()
    }
    work = list(dict.fromkeys(training for trainings in chosen.values() for training in trainings))
    if not work:
        made.error(f"--only {' '.join(options.only)}: not in {', '.join(sets)}")
    seeds = list(dict.fromkeys(options.seeds))
    try:
        for step, seed in product((None, *work), seeds):
            given_of(options, step, seed)
            done(options, step, seed)
    except RecipeError as error:  # of a --set
        made.error(str(error))
    with ThreadPoolExecutor(options.jobs) as pool:
        data = dict(zip(seeds, pool.map(lambda seed: in_a_process(options, None, seed), seeds), strict=True))
        todo = [(name, seed) for seed in seeds for name in work]

        def do(item: tuple[str, int]) -> dict[str, Any]:
            name, seed = item
            return data[seed] if "failed" in data[seed] else in_a_process(options, name, seed)

        results = dict(zip(todo, pool.map(do, todo), strict=True))
    for name, trainings in chosen.items():
        if not trainings:
            continue
        seeds_apart = {f"{training} seed {seed}": results[training, seed] for training in trainings for seed in seeds}
        together = {training: means([results[training, seed] for seed in seeds]) for training in trainings}
        print(f"\n{name}", *table(seeds_apart), sep="\n")
        if len(seeds) > 1:
            print(f"\n{name}, means over seeds", *table(together), sep="\n")
        write_json(Path(options.out) / f"{name}.json", {"seeds": seeds_apart, "means": together})
    return int(any("failed" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
