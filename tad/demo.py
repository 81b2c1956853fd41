"""The whole path on synthetic videos, in minutes on a CPU: make, train a backbone, extract, train, detect, score.

Every step calls the function behind a command, and prints what to type for the same. The three subsets come from seeds
of their own. The backbone and TAL-Net learn from ``training``, whose actions also set the anchor scales; ``validation``
chooses TAL-Net's checkpoint; from ``testing`` features are extracted, but nothing is learnt or chosen.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tad.annotations import Truth, read_truth, write_predictions
from tad.detect import detect, train_detector
from tad.detect.recipes import detect_recipe
from tad.errors import RecipeError, VideoError
from tad.evaluate import evaluate, table
from tad.evaluate.report import build_report, files_of, score_report
from tad.extract import extract
from tad.extract.finetune import finetune, finetune_recipe
from tad.progress import progress, silent
from tad.recipe import ExtractRecipe
from tad.synth import FPS, MIRRORED, make_videos

SIZE = (64, 64)
MADE = (
    "videos",
    "weights",
    "features.zarr",
    "run",
    "annotations.json",
    "predictions.json",
    "metrics.json",
    "report.html",
)


@dataclass(frozen=True)
class Settings:
    """What the result depends on; kept in ``demo.json``, so that two demos are never mixed in one folder."""

    videos_train: int
    videos_validation: int
    videos_test: int
    seed: int
    steps: int
    epochs: int
    duration_s: tuple[float, float]


def run_demo(
    out: str | Path,
    *,
    videos_train: int = 36,
    videos_validation: int = 8,
    videos_test: int = 20,
    seed: int = 0,
    steps: int = 600,
    epochs: int = 20,
    duration_s: tuple[float, float] = (30.0, 60.0),
    fresh: bool = False,
    quiet: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Make videos, train a backbone, extract, train TAL-Net, detect and evaluate; everything lies in ``out``.

    What an earlier call with the same settings completed is used again; an interrupted training of TAL-Net goes on.

    Parameters
    ----------
    videos_train, videos_validation, videos_test : how many videos of each subset.
    seed : of the videos, the backbone and TAL-Net.
    steps, epochs : how long the backbone and TAL-Net are trained.
    duration_s : the shortest and the longest video.
    fresh : throw away what an earlier demo left in ``out``.
    quiet : print nothing. Else steps and progress go to stderr, the tables to stdout.
    device : ``cpu``, ``cuda``, ``cuda:1``; by default CUDA when there is one.

    Returns
    -------
    What ``metrics.json`` holds: the score on the testing videos as :func:`tad.evaluate.evaluate` gives it (``map``,
    ``average_map``, ``ap``, ``counts``, ...), ``backbone`` (accuracy on clips of the validation videos), ``stages``
    (seconds of each step in this call) and ``settings``.

    Raises
    ------
    RecipeError : ``out`` holds something else, or a demo with other settings and ``fresh`` is not set.
    """
    settings = Settings(videos_train, videos_validation, videos_test, seed, steps, epochs, duration_s)
    root = Path(out)
    _prepare(root, settings, fresh=fresh)
    steps_taken = Steps(quiet=quiet)
    show = silent if quiet else progress
    videos, annotations, weights = root / "videos", root / "annotations.json", root / "weights"
    store, run, predictions = root / "features.zarr", root / "run", root / "predictions.json"

    counts = {"training": videos_train, "validation": videos_validation, "testing": videos_test}
    with steps_taken(
        "make videos",
        "classes differ in how things move, not in what a single frame shows",
        _python_videos(root, settings),
    ) as outcome:
        made = [
            video
            for subset, count in counts.items()
            for video in make_videos(
                root, videos=count, seed=seed, subset=subset, duration_s=duration_s, size=SIZE, progress=show
            )
        ]
        outcome(f"{len(made)} videos, {sum(video.duration_s for video in made) / 60:.0f} minutes")
    truth = read_truth(annotations)

    recipe = finetune_recipe("tiny", sets=_backbone_sets(truth, steps), seed=seed)
    with steps_taken(
        "train the backbone",
        "to say which action is at the centre of a clip, if any",
        _python_backbone(root, truth, settings),
    ) as outcome:
        trained = finetune(
            recipe,
            videos=videos,
            annotations=truth,
            out=weights,
            resume=True,
            overwrite=True,
            device=device,
            progress=show,
        )
        outcome(_accuracy(trained["holdout"]))

    checkpoint = weights / "backbone.safetensors"
    command = ["extract", videos, "--store", store, "--backbone", "tiny", "--weights", checkpoint, "--fps", f"{FPS:g}"]
    with steps_taken(
        "extract features", "a row of 128 numbers every 0.32 s, once for all detectors to come", _tad(command)
    ) as outcome:
        report = extract(
            videos,
            store=store,
            recipes=ExtractRecipe(backbone="tiny", weights=str(checkpoint), fps=FPS),
            device=device,
            progress=show,
        )
        if report.failures:
            raise VideoError(f"videos of the demo cannot be read: {report.failures[0]}")
        outcome(f"{report.written} entries written, {report.already} were there")

    sets = _detector_sets(epochs)
    command = ["train-detector", "talnet", "--store", store, "--streams", "tiny", "--annotations", annotations]
    command += [word for item in sets for word in ("--set", item)] + ["--seed", str(seed), "-o", run]
    with steps_taken(
        "train TAL-Net", "on the stored features: where something happens, then what it is", _tad(command)
    ) as outcome:
        chosen = train_detector(
            detect_recipe("talnet", streams=["tiny"], sets=sets, seed=seed),
            store=store,
            annotations=annotations,
            out=run,
            resume=True,
            device=device,
            progress=show,
        )
        outcome(f"epoch {chosen['best_epoch']}, average mAP {_percent(chosen['average_map'])} on validation")

    command = ["detect", "--store", store, "--annotations", annotations, "--subset", "testing", "--run", run]
    with steps_taken(
        "detect", "in videos from which nothing was learnt or chosen", _tad([*command, "-o", predictions])
    ) as outcome:
        found = detect(run=run, store=store, annotations=truth, subset="testing", device=device, progress=show)
        write_predictions(predictions, found)
        outcome(f"{len(found)} segments in {found['video'].nunique()} videos")

    command = ["evaluate", "--annotations", annotations, "--subset", "testing", "--predictions", predictions]
    with steps_taken(
        "evaluate", "how many segments are right, at five overlaps with the truth", _tad(command)
    ) as outcome:
        result = evaluate(truth, found, subset="testing")
        outcome(f"mAP@0.5 {_percent(result.map[0.5])}, average {_percent(result.average)}")

    command = ["report", "--annotations", annotations, "--subset", "testing", "--predictions", predictions]
    command += ["--run", run, "--videos", root / "videos", "-o", root / "report.html"]
    with steps_taken("report", "scores, errors and every video's timeline in one page", _tad(command)) as outcome:
        _report(root, truth, found)
        outcome(f"open {root / 'report.html'} in a browser")

    metrics = result.to_dict() | {
        "backbone": trained["holdout"],
        "stages": {name: round(seconds, 2) for name, seconds, _ in steps_taken.rows},
        "settings": asdict(settings),
    }
    _write_json(root / "metrics.json", metrics)
    if not quiet:
        steps_taken.print_tables(table(result))
        _say(f"\nThe trained run works on any video: {_tad(['detect', made[-1].path, '--run', run])}")
        _say(f"Browsers play the videos in the report after: {_tad([*command, '--proxy'])}")
    return metrics


def _report(root: Path, truth: Truth, found: pd.DataFrame) -> None:
    """``report.html``, as ``tad report`` makes it."""
    with (root / "run" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        training = list(csv.DictReader(file))
    scored = score_report(truth, found, None, "testing")
    files = files_of(truth.subset("testing").videos["video"], root / "videos")
    build_report(**scored, out=root / "report.html", title="Detections of the demo", videos=files, training=training)


# ---- what the steps are told ----------------------------------------------------------------------------------------
def _backbone_sets(truth: Truth, steps: int) -> list[str]:
    """Changes to the recipe of the backbone; pictures may be flipped if clockwise then becomes counter-clockwise."""
    classes = set(truth.subset("training").segments["label"])
    mirror = {label: other if other in classes else None for label, other in MIRRORED.items() if label in classes}
    pairs = ", ".join(f"{label}: {other or 'null'}" for label, other in mirror.items())
    return [
        "train_subset=training",
        "holdout_subset=validation",
        "epochs=1",
        f"steps={steps}",
        f"mirror={{{pairs}}}",
    ]


def _detector_sets(epochs: int) -> list[str]:
    """Changes to TAL-Net's default recipe: a smaller network than for real videos, and shorter training."""
    return [
        "data.train_subset=training",
        "data.holdout_subset=validation",
        f"train.epochs={epochs}",
        "model.width=128",
    ]


def _python_videos(root: Path, settings: Settings) -> str:
    counts = {
        "training": settings.videos_train,
        "validation": settings.videos_validation,
        "testing": settings.videos_test,
    }
    calls = (
        f"make_videos({str(root)!r}, subset={subset!r}, videos={count}, seed={settings.seed}, "
        f"duration_s={settings.duration_s}, size={SIZE})"
        for subset, count in counts.items()
    )
    return _python(f"from tad.synth import make_videos; {'; '.join(calls)}")


def _python_backbone(root: Path, truth: Truth, settings: Settings) -> str:
    recipe = f"finetune_recipe('tiny', seed={settings.seed}, sets={_backbone_sets(truth, settings.steps)})"
    places = {"videos": "videos", "annotations": "annotations.json", "out": "weights"}
    given = ", ".join(f"{name}={str(root / path)!r}" for name, path in places.items())
    return _python(f"from tad.extract.finetune import finetune, finetune_recipe; finetune({recipe}, {given})")


def _python(code: str) -> str:
    plain = not set(code) & set('"$`\\!')
    return f'python -c "{code}"' if plain else shlex.join(["python", "-c", code])


def _tad(words: list[Any]) -> str:
    return shlex.join(["tad", *map(str, words)])


# ---- telling --------------------------------------------------------------------------------------------------------
class Steps:
    """Says what a step is and what to type for it, and remembers how long it took and what came out of it."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.rows: list[tuple[str, float, str]] = []  # name, seconds, outcome

    @contextmanager
    def __call__(self, name: str, why: str, command: str) -> Iterator[Any]:
        if not self.quiet:
            _say(f"\n{len(self.rows) + 1}. {name}: {why}\n   $ {command}")
        outcomes: list[str] = []
        begun = time.perf_counter()
        yield outcomes.append
        self.rows.append((name, time.perf_counter() - begun, "; ".join(outcomes)))

    def print_tables(self, score: Any) -> None:
        """The steps and the score, on stdout."""
        from rich.console import Console
        from rich.table import Table

        grid = Table("step", "seconds", "outcome", title="What was done")
        for name, seconds, outcome in self.rows:
            grid.add_row(name, f"{seconds:.1f}", outcome)
        grid.add_row("all", f"{sum(seconds for _, seconds, _ in self.rows):.1f}", "")
        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(grid)
        console.print(score)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.1f} %"


def _accuracy(scores: Mapping[str, Any] | None) -> str:
    if scores is None:
        return "no clip to judge by"
    return f"{_percent(scores['top1'])} of {scores['clips']} validation clips right"


# ---- the folder -----------------------------------------------------------------------------------------------------
def _prepare(root: Path, settings: Settings, *, fresh: bool) -> None:
    """Make ``root`` the folder of this demo, or find that it is."""
    marker = root / "demo.json"
    wanted = json.loads(json.dumps(asdict(settings)))
    if root.exists() and not root.is_dir():
        raise RecipeError(f"{root} is a file: the demo needs a folder")
    if marker.exists() and not fresh:
        try:
            known = json.loads(marker.read_text(encoding="utf-8"))
        except ValueError:
            known = None
        if known != wanted:
            raise RecipeError(
                f"{root} holds a demo with other settings ({_differences(known, wanted)}): "
                "take another folder, or start over in this one with --fresh"
            )
        return
    if not marker.exists() and root.is_dir() and any(root.iterdir()):
        raise RecipeError(f"{root} is not empty, and no demo made what it holds: take another folder")
    for name in MADE:
        path = root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    root.mkdir(parents=True, exist_ok=True)
    _write_json(marker, wanted)


def _differences(known: Any, wanted: Mapping[str, Any]) -> str:
    if not isinstance(known, dict):
        return "its demo.json cannot be read"
    return ", ".join(
        f"{key} {known.get(key)} there, {wanted[key]} now" for key in wanted if known.get(key) != wanted[key]
    )


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
