"""What some detectors need before they can learn: another run's proposals, and class scores of whole videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tad.annotations import Truth, read_video_scores
from tad.detect.classes import check_scores
from tad.detect.classifier_run import FILES as CLASSIFIER_FILES
from tad.detect.classifier_run import classifier_scores
from tad.detect.classifier_train import train_classifier
from tad.detect.detectors import DETECTORS
from tad.detect.infer import Found, by_video, check_same_features, find_proposals
from tad.detect.preflight import Failure, shown
from tad.detect.raw import Raw, load_raw, save_raw
from tad.detect.runs import CLASSIFIER, PROPOSALS, Run, copy_run, sha256_of, trained_weights
from tad.detect.video_scores import keep_scores, read_scores
from tad.errors import AnnotationError, RecipeError, WeightsError
from tad.progress import ProgressFactory
from tad.recipe import ClassesRecipe, DetectRecipe, ProposalsRecipe
from tad.store import Store
from tad.training.distributed import World
from tad.training.files import is_temporary


@dataclass(frozen=True)
class Prepared:
    """``class_scores`` of held-out videos (index video, columns classes), ``proposals`` of all; None: not needed."""

    class_scores: pd.DataFrame | None = None
    proposals: Found | None = None
    failures: tuple[Failure, ...] = ()


def check_recipe(recipe: DetectRecipe, store: Store) -> None:
    """Raise where ``recipe.proposals`` and ``recipe.classes`` do not fit the detector, or name what cannot be read.

    Raises
    ------
    RecipeError, StoreError, WeightsError, AnnotationError.
    """
    detector = DETECTORS.get(recipe.detector)
    if detector is None:
        return  # building it will say so
    if not detector.class_agnostic and recipe.classes != ClassesRecipe():
        raise RecipeError(f"'{recipe.detector}' finds classes itself: leave 'classes' out of its recipe")
    if detector.class_agnostic and recipe.classes.scores is not None:
        read_scores(recipe.classes.scores, recipe.classes)
    if not detector.reads_proposals and recipe.proposals != ProposalsRecipe():
        raise RecipeError(f"'{recipe.detector}' finds its proposals itself: leave 'proposals' out of its recipe")
    if detector.reads_proposals:
        if recipe.proposals.run is None:
            raise RecipeError(
                f"'{recipe.detector}' refines the proposals of another run: name it, "
                "such as --set proposals.run=runs/bmn ('tad train-detector bmn ... -o runs/bmn' makes one)"
            )
        source = Run.load(recipe.proposals.run)
        if not source.finished:
            raise RecipeError(f"proposals.run {source.path} is not finished: resume it first")
        for part in source.parts:
            check_same_features(part, store)
            if not (part.path / "best.safetensors").is_file():
                raise WeightsError(f"proposals.run {part.path} has no best.safetensors: the file was removed")


def check_place(
    recipe: DetectRecipe, path: Path, *, features: Mapping[str, Mapping[str, Any]], store: Store, begun: bool
) -> None:
    """Raise :class:`RecipeError` where the training needs something inside the run at ``path``, which is about to be
    written anew, or where other files stand in the way; ``begun``: what is prepared there already stays.

    ``features`` says how those in ``store`` were made: of backbones in ``path``, which are removed, no row could be
    made again.
    """
    inner = path / CLASSIFIER
    if not begun and DETECTORS[recipe.detector].class_agnostic and recipe.classes.scores is None and inner.is_dir():
        names = sorted(file.name for file in inner.iterdir())
        if other := [n for n in names if n not in CLASSIFIER_FILES and not is_temporary(n, files=CLASSIFIER_FILES)]:
            raise RecipeError(f"{inner}, where a classifier will be trained, holds {shown(other)}: move it elsewhere")
    named = [("proposals.run", recipe.proposals.run), ("classes.scores", recipe.classes.scores)]
    named += [("store", str(store.path))] if Path(store.path).exists() else []  # not one at a URL
    named += [(f"the backbone of stream '{s}'", _weights_inside(known, path)) for s, known in features.items()]
    for key, given in named:
        if given is not None and Path(given).resolve().is_relative_to(path.resolve()):
            raise RecipeError(
                f"{key} {given} is part of the run {path} that is to be written: move or copy it elsewhere"
            )


def _weights_inside(features: Mapping[str, Any], path: Path) -> str | None:
    """The file in the run at ``path`` that holds the backbone of these features, None where it lies elsewhere too."""
    source, weights = features.get("weights_source"), features["spec"].get("weights")
    recorded = Path(source.rpartition("=")[2]) if isinstance(source, str) else None  # NAME=FILE is FILE
    if recorded is not None and recorded.is_file():
        return str(recorded)
    digest = str(weights).removeprefix("sha256:")
    return next((str(file) for file in trained_weights(path) if sha256_of(file) == digest), None)


def check_class_scores(recipe: DetectRecipe, *, classes: Sequence[str], holdout: Sequence[str]) -> list[str]:
    """Whether the file of class scores is about what a training is about; what is worth saying of it.

    Raises
    ------
    AnnotationError : scores that cannot be read or fused, or of other classes; scores of none of the ``holdout``
        videos, whose mAP is to choose the checkpoint.
    """
    if not DETECTORS[recipe.detector].class_agnostic or recipe.classes.scores is None:
        return []
    table = read_scores(recipe.classes.scores, recipe.classes)
    check_scores(table, classes)
    lacking = sorted(set(holdout) - set(table.index))
    if not lacking:
        return []
    if recipe.train.select == "map" and len(lacking) == len(set(holdout)):
        raise AnnotationError(
            f"{recipe.classes.scores} has scores of none of the {len(lacking)} held-out videos ({shown(lacking)}), but "
            f"of {shown(table.index.tolist()) or 'no video'}: hold out videos with scores (data.holdout_subset), or "
            "set train.select=last"
        )
    return [f"{len(lacking)} held-out videos have no class scores and count as missed: {shown(lacking)}"]


def prepare(
    recipe: DetectRecipe,
    *,
    path: Path,
    videos: Sequence[str],
    holdout: Sequence[str],
    store: Store,
    truth: Truth,
    processes: World,
    progress: ProgressFactory,
) -> Prepared:
    """Make what the detector of the run at ``path`` needs, or read what an interrupted training made there already.

    The first of several processes does the work, all have the result.
    """
    detector = DETECTORS[recipe.detector]

    def work() -> Prepared:
        scores = _class_scores(recipe, path, holdout, store, truth, processes, progress)
        if not detector.reads_proposals:
            return Prepared(scores)
        proposals, failures = _proposals(recipe, path, [*videos, *holdout], store, processes, progress)
        return Prepared(scores, proposals, tuple(failures))

    if not (detector.class_agnostic or detector.reads_proposals):
        return Prepared()
    return processes.on_first(work)


def _class_scores(
    recipe: DetectRecipe,
    path: Path,
    holdout: Sequence[str],
    store: Store,
    truth: Truth,
    processes: World,
    progress: ProgressFactory,
) -> pd.DataFrame | None:
    if not DETECTORS[recipe.detector].class_agnostic:
        return None
    if recipe.classes.scores is not None:
        kept = path / "scores.json"
        if kept.is_file():  # of the training that is resumed
            return read_video_scores(kept)
        table = read_scores(recipe.classes.scores, recipe.classes)
        keep_scores(kept, table, source=recipe.classes.scores)
        return table
    train_classifier(
        recipe.classes.classifier,
        streams=recipe.streams,
        store=store,
        annotations=truth,
        data=recipe.data,
        seed=recipe.seed,
        out=path / CLASSIFIER,
        resume=True,
        device=str(processes.device),
        progress=progress,
    )
    return classifier_scores(path / CLASSIFIER, store=store, videos=holdout, device=processes.device)


def _proposals(
    recipe: DetectRecipe,
    path: Path,
    videos: Sequence[str],
    store: Store,
    processes: World,
    progress: ProgressFactory,
) -> tuple[Found, list[Failure]]:
    file = path / "proposals.npz"
    failures: list[Failure] = []
    found = load_raw(file).segments if file.is_file() else []
    known = {segments.video for segments in found}
    missing = [video for video in videos if video not in known]
    if not file.is_file():
        assert recipe.proposals.run is not None  # see check_recipe
        copy_run(Run.load(recipe.proposals.run), path / PROPOSALS)
    if missing or not file.is_file():
        run = Run.load(path)
        found += find_proposals(run, store, missing, device=processes.device, lost=failures.append, progress=progress)
        save_raw(file, Raw(found, run.classes, class_agnostic=True))
    return by_video(found), failures
