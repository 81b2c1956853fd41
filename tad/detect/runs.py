"""The folder of a detector's run: what is in it, how it is written, how it is read back. Nothing in it is pickled code.

::

    RUN/
      recipe.yaml            the recipe with everything filled in; a run can be repeated from it
      classes.json           names of the classes, in the order of the network's outputs
      features.json          streams, their extraction recipes and fingerprints, channels, time axis, row spacing
      env.json               versions, device, command, seed, store and annotations (with SHA-256), the recipe as given
      best.safetensors       weights of the chosen epoch (averaged ones with EMA)
      last.safetensors       weights of the last finished epoch (likewise)
      resume.pt              everything that training needs to go on: plain types and tensors, ``weights_only=True``
      metrics.csv            one row an epoch
      metrics.json           the outcome; its presence says that the run is finished
      failures.jsonl         videos that could not be used, and why (only if there were any)
      log.txt
      raw/*.npz              what the network found before suppression, where ``detect`` was told to write it here

A run whose backbones were trained along also holds, and its ``features.json`` is of what they give now,

      starting.json          the features it was begun with, as ``features.json`` has it
      weights/STREAM-*.safetensors   the backbones that belong to ``best.safetensors``

A run of a class-agnostic detector also holds where its classes come from, one of

      classifier/            a classifier of whole videos, trained along (a run of its own)
      scores.json            scores by video, as they were given

and a run that refines proposals the run that finds them:

      proposals/             copied: recipe, classes, features, weights
      proposals.npz          what it found in the training and held-out videos
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tad.detect.detectors import DETECTORS, build_detector
from tad.detect.interface import Detector
from tad.detect.trained_on import STARTING, read_features
from tad.errors import RecipeError, WeightsError
from tad.recipe import DetectRecipe, dump_yaml, load_mapping, validated
from tad.training.files import (
    FolderState,
    describe_differences,
    differing_keys,
    environment,
    folder_state,
    now_text,
    read_json,
    read_state,
    read_weights,
    remove_files,
    sha256_of,
    write_atomic,
    write_csv,
    write_json,
    write_state,
    write_text,
    write_weights,
)

__all__ = [
    "FILES", "Run", "describe_differences", "differing_keys", "dump_recipe", "environment", "load_into", "now_text",
    "read_json", "read_state", "read_weights", "remove_run", "remove_training", "require_free", "run_state",
    "sha256_of", "write_atomic", "write_csv", "write_json", "write_state", "write_text", "write_weights",
]  # fmt: skip

FILES = (
    "recipe.yaml",
    "classes.json",
    "features.json",
    "env.json",
    "best.safetensors",
    "last.safetensors",
    "resume.pt",
    "metrics.csv",
    "metrics.json",
    "failures.jsonl",
    "log.txt",
    "scores.json",
    "proposals.npz",
    STARTING,
)
OF_EPOCHS = (
    "best.safetensors",
    "last.safetensors",
    "resume.pt",
    "metrics.csv",
    "metrics.json",
    "failures.jsonl",
    "log.txt",
)
CLASSIFIER, PROPOSALS = "classifier", "proposals"  # folders of runs inside a run
WEIGHTS = "weights"  # folder of backbones; what training wrote there ends in the first digits of its SHA-256
OF_TRAINING = re.compile(r".+-[0-9a-f]{12}\.safetensors")
COPIED = (
    "classes.json",
    "features.json",
    "env.json",
    "best.safetensors",
    "metrics.json",
    "recipe.yaml",
)  # of a proposals run


# ---- the run itself --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    """A trained detector with all that its inference needs."""

    path: Path
    recipe: DetectRecipe
    classes: list[str]
    features: dict[
        str, dict[str, Any]
    ]  # stream, in the order of the recipe -> how it was when the detector was trained on it

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read a run's folder; the weights wait for :meth:`build`.

        Raises
        ------
        RecipeError : there is no such folder, or its recipe, classes or features are missing or malformed.
        """
        path = Path(path)
        if not path.is_dir():
            raise RecipeError(f"run {path} does not exist; 'tad train-detector ... -o {path}' makes one")
        if not (path / "recipe.yaml").is_file():
            raise RecipeError(f"run {path} has no recipe.yaml: is it the folder of a detector's run?")
        try:
            given = load_mapping(path / "recipe.yaml")
        except UnicodeDecodeError as error:
            raise RecipeError(f"run {path}: recipe.yaml is not UTF-8 text: {error}") from error
        recipe = validated(DetectRecipe, given, where=str(path / "recipe.yaml"))
        classes = read_json(path / "classes.json", of="detector's run")
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise RecipeError(f"run {path}: classes.json must hold a list of names")
        features = read_features(path, recipe.streams, of="detector's run")
        return cls(path, recipe, classes, features)

    @property
    def channels(self) -> dict[str, int]:
        return {stream: int(known["channels"]) for stream, known in self.features.items()}

    @property
    def finished(self) -> bool:
        return (self.path / "metrics.json").is_file()

    @property
    def class_agnostic(self) -> bool:
        """Whether it finds proposals, whose classes come from scores of whole videos."""
        detector = DETECTORS.get(self.recipe.detector)
        return detector is not None and detector.class_agnostic

    @property
    def classifier_path(self) -> Path:
        return self.path / CLASSIFIER

    @property
    def scores_path(self) -> Path:
        return self.path / "scores.json"

    @property
    def proposals(self) -> Run | None:
        """The run inside this one whose proposals it refines; None where it finds its own."""
        detector = DETECTORS.get(self.recipe.detector)
        return Run.load(self.path / PROPOSALS) if detector is not None and detector.reads_proposals else None

    @property
    def parts(self) -> list[Run]:
        """This run and those inside it that detection needs, itself first."""
        return [self, *(self.proposals.parts if self.proposals is not None else [])]

    def build(self, weights: Literal["best", "last"] = "best", *, device: str | torch.device = "cpu") -> Detector:
        """The detector in evaluation mode with its weights.

        Raises
        ------
        WeightsError : no checkpoint was written yet, it is damaged, it does not fit the recipe's network, or its
        backbones are not those that ``features.json`` names.
        """
        file = self.path / f"{weights}.safetensors"
        if not file.is_file():
            raise WeightsError(
                f"run {self.path} has no {file.name}: "
                + ("the file was removed" if self.finished else "no epoch was finished yet, resume the training")
            )
        model = self.recipe.model
        detector = build_detector(self.recipe.detector, channels=self.channels, classes=len(self.classes), **model)
        load_into(detector, read_weights(file), where=str(file))
        self._check_backbones(file)
        return detector.to(device).eval()

    def _check_backbones(self, file: Path) -> None:
        """Refuse weights that were trained along with other backbones than ``features.json`` names."""
        about = read_about(file)
        if about.get("features") is None:
            best = read_about(self.path / "best.safetensors") if (self.path / "best.safetensors").is_file() else {}
            if best.get("features") is not None and best.get("epoch") != about.get("epoch"):
                raise WeightsError(
                    f"{file} is of epoch {about.get('epoch')}, but the run keeps the backbones of epoch "
                    f"{best.get('epoch')} alone, which belong to best.safetensors: take that"
                )
            return
        now = {stream: known["fingerprint"] for stream, known in self.features.items()}
        if other := sorted(stream for stream in now if about["features"].get(stream) != now[stream]):
            raise WeightsError(
                f"{file} was trained along with another backbone of stream '{other[0]}' than features.json names: the "
                "training was stopped while saving; resume it"
            )


def read_about(file: Path) -> dict[str, Any]:
    """What :func:`write_weights` wrote about a file of weights; empty where it wrote nothing.

    Raises :class:`WeightsError` when the file is missing or damaged.
    """
    try:
        with safe_open(str(file), "pt") as opened:
            about = json.loads((opened.metadata() or {}).get("tad", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsError(
            f"weights {file} cannot be read ({error}); resume the training to write them again"
        ) from error
    if not isinstance(about, dict):
        raise WeightsError(f"weights {file} say nothing understandable about themselves; resume the training")
    return about


def load_into(detector: Detector, state: Mapping[str, Tensor], *, where: str) -> None:
    """Load weights of which every tensor must land. Raises :class:`WeightsError` naming those that do not."""
    own = detector.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{name} is {tuple(state[name].shape)}, the network has {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    if missing or unknown or shapes:
        parts = [
            ("missing: " + ", ".join(missing)) if missing else "",
            ("unknown: " + ", ".join(unknown)) if unknown else "",
        ]
        problems = "; ".join(part for part in [*parts, *shapes] if part)
        raise WeightsError(f"{where} does not fit the network that recipe.yaml describes: {problems}")
    detector.load_state_dict(dict(state))


def run_state(path: Path) -> FolderState:
    """What stands at ``path`` now; ``foreign`` is anything that is not a run."""
    return folder_state(path, files=FILES)


def trained_weights(path: Path) -> list[Path]:
    """The files of backbones that a training wrote into the run at ``path``; files that somebody else put into the
    folder are none of these.
    """
    return sorted(file for file in (path / WEIGHTS).glob("*") if OF_TRAINING.fullmatch(file.name))


def remove_weights(path: Path, *, keep: Collection[str] = ()) -> None:
    """Remove :func:`trained_weights`, but for the names to ``keep``, and what a stop left of them."""
    for file in [*trained_weights(path), *(path / WEIGHTS).glob(".*.tmp")]:
        if file.name not in keep:
            file.unlink(missing_ok=True)
    if (path / WEIGHTS).is_dir() and not any((path / WEIGHTS).iterdir()):
        (path / WEIGHTS).rmdir()


def remove_run(path: Path) -> None:
    """Remove the files of a run and nothing else."""
    for file in path.glob("raw/*.npz"):
        file.unlink(missing_ok=True)
    remove_weights(path)
    for inner in (path / CLASSIFIER, path / PROPOSALS):
        if (inner / "recipe.yaml").is_file():
            remove_run(inner)
            if not any(inner.iterdir()):
                inner.rmdir()
    remove_files(path, files=FILES)


def remove_training(path: Path) -> None:
    """Remove what a training wrote from its first epoch on; what says how it was begun and what was prepared stays."""
    remove_files(path, files=OF_EPOCHS)
    remove_weights(path)


def dump_recipe(path: Path, recipe: DetectRecipe) -> None:
    write_text(path / "recipe.yaml", dump_yaml(recipe))


def require_free(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise :class:`RecipeError` unless a run may be written to ``path``."""
    state = run_state(path)
    if resume and overwrite:
        raise RecipeError("resume and overwrite exclude each other: choose one")
    if state == "foreign":
        raise RecipeError(f"{path} exists and is not the folder of a run; choose another output folder")
    if state in ("unfinished", "finished") and not (resume or overwrite):
        raise RecipeError(
            f"{path} holds {'a finished' if state == 'finished' else 'an unfinished'} run; "
            + ("" if state == "finished" else "resume it, ")
            + "overwrite it, or choose another output folder"
        )


def copy_run(source: Run, path: Path) -> None:
    """Copy what detection with ``source`` needs to ``path``; ``recipe.yaml`` comes last and makes it a run."""
    path.mkdir(parents=True, exist_ok=True)
    if source.proposals is not None:
        copy_run(source.proposals, path / PROPOSALS)
    for trained in trained_weights(source.path):
        with open(trained, "rb") as file:
            write_atomic(path / WEIGHTS / trained.name, partial(shutil.copyfileobj, file))
    for name in COPIED:
        if name == "metrics.json" and not source.finished:
            continue  # a copy that was made without
        with open(source.path / name, "rb") as file:
            write_atomic(path / name, partial(shutil.copyfileobj, file))
