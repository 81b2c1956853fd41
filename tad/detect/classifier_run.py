"""The run of a classifier of whole videos: its folder, how it is read back, and the scores that it gives.

::

    RUN/
      recipe.yaml       classifier, streams, seed, data: a run can be repeated from it
      classes.json      names of the classes, in the order of the network's outputs
      features.json     streams, their recipes and fingerprints, channels, time axis
      env.json          versions, device, command, store and annotations (with SHA-256)
      best.safetensors  weights of the chosen epoch
      resume.pt         everything that training needs to go on, plain types and tensors
      metrics.csv       one row an epoch
      metrics.json      the outcome; its presence says that the run is finished
      failures.jsonl    videos that could not be used, and why (only if there were any)
      log.txt
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from tad.annotations import Truth, read_scores_about, read_truth, read_video_scores, write_video_scores
from tad.detect.align import Sample
from tad.detect.data import collate
from tad.detect.preflight import Failure, no_video_message, with_features
from tad.detect.runs import load_into
from tad.detect.trained_on import check_features, read_features
from tad.detect.video_classifier import VideoClassifier
from tad.detect.windows import read_whole
from tad.errors import AnnotationError, RecipeError, StoreError, WeightsError
from tad.evaluate import classification_scores
from tad.progress import ProgressFactory, silent
from tad.recipe import ClassifierRecipe, DataRecipe, Model, load_mapping, validated
from tad.store import Store, open_store
from tad.training.distributed import pick_device
from tad.training.files import folder_state, read_json, read_weights, sha256_of

logger = logging.getLogger("tad.detect")
FILES = (
    "recipe.yaml",
    "classes.json",
    "features.json",
    "env.json",
    "best.safetensors",
    "resume.pt",
    "metrics.csv",
    "metrics.json",
    "failures.jsonl",
    "log.txt",
)
TOP = (1, 2, 5)  # accuracies that are reported; fusion takes two classes a video by default


class ClassifierRunRecipe(Model):
    """``recipe.yaml`` of a classifier's run."""

    classifier: ClassifierRecipe
    streams: tuple[str, ...] = Field(min_length=1)
    seed: int = 0
    data: DataRecipe = DataRecipe()


# ---- a trained classifier --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ClassifierRun:
    """A trained classifier of whole videos with all that it needs to score others."""

    path: Path
    recipe: ClassifierRunRecipe
    classes: list[str]
    features: dict[str, dict[str, Any]]  # stream -> how it was when the classifier was trained on it

    @classmethod
    def load(cls, path: str | Path) -> ClassifierRun:
        """Read a run's folder; the weights wait for :meth:`build`.

        Raises
        ------
        RecipeError : there is no such folder, it is no classifier's, or its files are missing or malformed.
        """
        path = Path(path)
        if not path.is_dir():
            raise RecipeError(f"run {path} does not exist; 'tad train-classifier ... -o {path}' makes one")
        if not is_classifier(path):
            raise RecipeError(f"{path} is not the folder of a classifier's run (recipe.yaml has no classifier)")
        where = str(path / "recipe.yaml")
        recipe = validated(ClassifierRunRecipe, load_mapping(path / "recipe.yaml"), where=where)
        classes = read_json(path / "classes.json", of="classifier's run")
        if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
            raise RecipeError(f"run {path}: classes.json must hold a list of names")
        return cls(path, recipe, classes, read_features(path, recipe.streams, of="classifier's run"))

    @property
    def finished(self) -> bool:
        return (self.path / "metrics.json").is_file()

    def build(self, *, device: str | torch.device = "cpu") -> VideoClassifier:
        """The classifier in evaluation mode with its weights.

        Raises
        ------
        WeightsError : no checkpoint was written yet, it is damaged, or it does not fit the recipe.
        """
        file = self.path / "best.safetensors"
        if not file.is_file():
            raise WeightsError(f"run {self.path} has no {file.name}: resume its training")
        channels = {stream: int(known["channels"]) for stream, known in self.features.items()}
        network = built(self.recipe.classifier, channels, len(self.classes))
        load_into(network, read_weights(file), where=str(file))
        return network.to(device).eval()


def built(recipe: ClassifierRecipe, channels: dict[str, int], classes: int) -> VideoClassifier:
    """The network that a recipe describes, with random weights."""
    return VideoClassifier(
        channels=channels,
        classes=classes,
        width=recipe.width,
        dilations=recipe.dilations,
        dropout=recipe.dropout,
        rows_weight=recipe.rows_weight,
    )


def is_classifier(path: str | Path) -> bool:
    """Whether a folder is the run of a classifier on stored features, by its ``recipe.yaml``."""
    file = Path(path) / "recipe.yaml"
    return file.is_file() and "classifier" in load_mapping(file)


def classifier_scores(
    run: ClassifierRun | str | Path,
    *,
    store: Store | str | Path,
    videos: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    failures: list[Failure] | None = None,
    progress: ProgressFactory = silent,
) -> pd.DataFrame:
    """Probabilities of the classes for whole videos, from stored features.

    Parameters
    ----------
    run : a training's folder, or what ``ClassifierRun.load`` made of it.
    store : the features; their streams must be those that the run was trained on, by fingerprint.
    videos : ids; by default all that the store has in any of the run's streams.
    device : ``cpu``, ``cuda``, ``cuda:1``; by default CUDA when there is one.
    failures : a list that receives a :class:`Failure` for every video that could not be scored; they are logged too.

    Returns
    -------
    Index ``video``, a column a class, each row summing to 1; without the videos that could not be scored.

    Raises
    ------
    StoreError : a stream is missing or was made with another recipe.
    RecipeError, WeightsError : the run cannot be loaded.
    """
    run = run if isinstance(run, ClassifierRun) else ClassifierRun.load(run)
    if isinstance(store, (str, Path)):
        with open_store(store) as opened:
            return classifier_scores(
                run, store=opened, videos=videos, device=device, failures=failures, progress=progress
            )
    check_features(run.path, run.features, store)
    if videos is None:
        videos = sorted(set().union(*(store.videos(stream) for stream in run.features)))
    chosen = pick_device(device)
    network = run.build(device=chosen)

    def lost(failure: Failure) -> None:
        logger.warning("%s", failure)
        if failures is not None:
            failures.append(failure)

    with progress(len(videos), "classify", "videos") as bar:
        rows: dict[str, np.ndarray] = {}
        for video in dict.fromkeys(videos):
            try:
                sample = read_whole(store, network.needs, video, run.recipe.data)
                rows[video] = probabilities(network, sample, device=chosen)
            except (StoreError, WeightsError) as error:
                lost(Failure(video, type(error).__name__, str(error)))
            bar.advance(1)
    return score_table(rows, run.classes)


def probabilities(network: VideoClassifier, sample: Sample, *, device: torch.device) -> np.ndarray:
    """Of one video (K,): alone, so that they do not depend on which others are asked for.

    Raises :class:`WeightsError` where they are not finite.
    """
    batch = collate([sample])
    assert batch is not None
    found: Tensor = network.probabilities(batch.to(device))[0].double().cpu()
    if not bool(torch.isfinite(found).all()):
        raise WeightsError(
            f"video '{sample.video}': the classifier's scores are not finite; have its weights diverged?"
        )
    return (found / found.sum()).numpy()


def score_table(rows: dict[str, np.ndarray], classes: Sequence[str]) -> pd.DataFrame:
    """Scores by video as a table: index ``video``, a column a class."""
    values = np.array(list(rows.values()), float).reshape(len(rows), len(classes))
    return pd.DataFrame(values, index=pd.Index(list(rows), name="video", dtype="str"), columns=list(classes))


def accuracy(truth: pd.DataFrame, scores: pd.DataFrame) -> dict[str, float]:
    """``top1, top2, top5, map`` of scores (index video) on the videos of ``truth`` (columns video, label)."""
    result = classification_scores(truth, scores, top=TOP)
    return {**{f"top{k}": result.top[k] for k in TOP}, "map": result.map}


@dataclass
class StoredScores:
    """What :func:`classify_store` did: ``scores`` are those of this call, ``already`` counts others in the file."""

    scores: pd.DataFrame
    already: int = 0
    failures: list[Failure] = field(default_factory=list)
    accuracy: dict[str, float] | None = None  # videos, top1, top2, top5, map


def classify_store(
    run: ClassifierRun | str | Path,
    *,
    store: Store | str | Path,
    out: str | Path,
    annotations: Truth | str | Path | None = None,
    subset: str | None = None,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    progress: ProgressFactory = silent,
) -> StoredScores:
    """Score the videos of a store by class and write :func:`tad.annotations.write_video_scores`'s file ``out``.

    Scores of other videos by the same classifier that are in ``out`` stay there.

    Parameters
    ----------
    annotations : the truth, for ``subset`` and for accuracy, which is over its videos with an action that the
        classifier knows. subset : only its videos; otherwise all that the store has.
    overwrite : replace a file of scores that were made otherwise.

    Raises
    ------
    RecipeError : ``out`` holds scores that were made otherwise; a subset without annotations; a run that cannot be
        loaded. StoreError : other features than the run's, none of the videos. AnnotationError : an unknown subset.
    """
    run = run if isinstance(run, ClassifierRun) else ClassifierRun.load(run)
    if isinstance(store, (str, Path)):
        with open_store(store) as opened:
            return classify_store(
                run, store=opened, out=out, annotations=annotations, subset=subset, device=device,
                overwrite=overwrite, progress=progress,
            )  # fmt: skip
    if subset is not None and annotations is None:
        raise RecipeError("subset needs the annotations that say which videos it holds")
    truth = annotations if isinstance(annotations, Truth) or annotations is None else read_truth(annotations)
    check_features(run.path, run.features, store)
    if not run.finished:
        raise RecipeError(f"run {run.path} is not finished: resume its training")
    about = {
        "classifier": f"sha256:{sha256_of(run.path / 'best.safetensors')}",
        "streams": {stream: known["fingerprint"] for stream, known in run.features.items()},
    }
    old = _scores_by_the_same(Path(out), about, run.classes, overwrite=overwrite)
    have = {stream: set(store.videos(stream)) for stream in run.features}
    if truth is not None and subset is not None:
        wanted, source = sorted(map(str, truth.subset(subset).videos["video"])), f"subset '{subset}'"
    else:
        wanted, source = sorted(set().union(*have.values())), "the store"
    present, failures = with_features(wanted, have)
    if not present:
        raise StoreError(no_video_message(wanted, have, store, source))
    scores = classifier_scores(run, store=store, videos=present, device=device, failures=failures, progress=progress)
    kept = old[~old.index.isin(scores.index)]
    write_video_scores(out, pd.concat([kept, scores]) if len(kept) else scores, about=about)
    report = StoredScores(scores, len(kept), failures)
    if truth is not None:
        segments = truth.segments
        known = segments[segments["label"].isin(run.classes) & segments["video"].isin(scores.index)]
        if len(known):
            counted = scores[scores.index.isin(truth.videos["video"])]
            report.accuracy = {"videos": int(known["video"].nunique()), **accuracy(known, counted)}
    return report


def _scores_by_the_same(path: Path, about: dict[str, Any], classes: list[str], *, overwrite: bool) -> pd.DataFrame:
    """What ``path`` holds already, nothing where it is not there or is to be replaced."""
    nothing = score_table({}, classes)
    if not path.exists():
        return nothing
    try:
        same = read_scores_about(path) == about
        table = read_video_scores(path)
        if same and table.columns.tolist() == classes:
            return table
    except AnnotationError:
        if not overwrite:
            raise
    if not overwrite:
        raise RecipeError(f"{path} holds scores that were made otherwise: take another file, or overwrite")
    return nothing


# ---- the folder ------------------------------------------------------------------------------------------------------
def require_free(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise :class:`RecipeError` unless a classifier's run may be written to ``path``."""
    if resume and overwrite:
        raise RecipeError("resume and overwrite exclude each other: choose one")
    state = folder_state(path, files=FILES)
    if state == "foreign" or (state in ("unfinished", "finished") and not is_classifier(path)):
        raise RecipeError(f"{path} exists and is not the folder of a classifier's run; choose another output folder")
    if state in ("unfinished", "finished") and not (resume or overwrite):
        what, more = ("a finished", "") if state == "finished" else ("an unfinished", "resume it, ")
        raise RecipeError(f"{path} holds {what} run; {more}overwrite it, or choose another output folder")
