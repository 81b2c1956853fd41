"""The folder of a fine-tuned backbone: what is in it, how it is written, how it is read back.

::

    RUN/
      recipe.yaml            the recipe with everything filled in; a run can be repeated from it
      classes.json           names of the classes, without the background
      videos.json            frames and rate of every video, size of the pool: what is not found out again on resuming
      env.json               versions, device, command, seed, annotations, the recipe as given, a hash of all inputs
      backbone.safetensors   weights of the chosen epoch: load_backbone(...) and tad extract --weights read it
      head.safetensors       the classifier on its features, weight (K + 1, D) and bias; row 0 is the background
      resume.pt              everything that training needs to go on: plain types and tensors, ``weights_only=True``
      metrics.csv            one row an epoch
      metrics.json           the outcome; its presence says that the run is finished
      failures.jsonl         videos that could not be used, and why (only if there were any)
      log.txt
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from tad._version import __version__
from tad.annotations import Truth
from tad.errors import RecipeError, WeightsError
from tad.extract.backbones import build_backbone, own
from tad.extract.backbones.base import Backbone
from tad.extract.clips import ClipFormat
from tad.extract.finetune_recipe import MAY_CHANGE, FinetuneRecipe, resolved
from tad.extract.inputs import VideoFile
from tad.extract.video import source_of
from tad.extract.weights import sha256_of
from tad.recipe import load_mapping, validated
from tad.training.files import (
    describe_differences,
    differing_keys,
    folder_state,
    now_text,
    read_json,
    read_weights,
    write_text,
    write_weights,
)

logger = logging.getLogger("tad.extract.finetune")
FILES = (
    "recipe.yaml",
    "classes.json",
    "videos.json",
    "env.json",
    "backbone.safetensors",
    "head.safetensors",
    "resume.pt",
    "metrics.csv",
    "metrics.json",
    "failures.jsonl",
    "log.txt",
)


def identity(recipe: FinetuneRecipe, weights_id: str | None, truth: Truth, files: Sequence[VideoFile]) -> str:
    """A hash of all that the result depends on: recipe, weights, truth, and name, size and time of the video files."""
    tables = [truth.videos.to_csv(index=False), truth.segments.to_csv(index=False)]
    sources = [[file.video, _source(file.path)] for file in files]
    kept = recipe.model_dump(mode="json", exclude=set(MAY_CHANGE))
    return hashlib.sha256(json.dumps([kept, weights_id, tables, sources], sort_keys=True).encode()).hexdigest()


def _source(path: Path) -> dict[str, str | int] | None:
    return source_of(path) if path.is_file() else None  # what is gone is reported where videos are opened


def may_begin(
    path: Path, recipe: FinetuneRecipe, inputs_sha256: str, *, resume: bool, overwrite: bool
) -> dict[str, Any] | bool:
    """The metrics of a finished run to leave as it is, or whether an unfinished one is gone on with.

    Raises :class:`RecipeError` where ``path`` holds something else, or a run that is neither resumed nor overwritten.
    """
    state = folder_state(path, files=FILES)
    if state in ("absent", "empty"):
        return False
    if state == "foreign":
        raise RecipeError(f"{path} exists and is not the folder of a run; choose another output folder")
    if not resume:
        if overwrite:
            return False
        raise RecipeError(
            f"{path} holds {'a finished' if state == 'finished' else 'an unfinished'} run: resume it, overwrite it, or "
            "choose another output folder"
        )
    if not (path / "env.json").is_file() and state == "unfinished":
        return False  # stopped before its folder was complete
    try:
        same = read_json(path / "env.json", of="backbone's run")["inputs_sha256"] == inputs_sha256
    except (KeyError, TypeError, RecipeError) as error:
        if overwrite:
            return False
        raise RecipeError(f"{path} does not hold the run of a backbone: take another folder") from error
    if not same:
        if overwrite:
            return False
        old, new = load_mapping(path / "recipe.yaml"), recipe.model_dump(mode="json")
        changed = [item for item in differing_keys(old, new) if item[0] not in MAY_CHANGE]
        raise RecipeError(
            f"run {path} cannot be resumed with "
            + (f"another recipe: {describe_differences(changed)}" if changed else "other annotations or videos")
            + ". Give the old ones, overwrite it, or train into another folder"
        )
    if state == "finished":
        metrics: dict[str, Any] = read_json(path / "metrics.json")
        return metrics
    return True


def write_networks(
    path: Path, backbone: Backbone, head: nn.Linear, recipe: FinetuneRecipe, classes: Sequence[str], *, epoch: int
) -> None:
    """``backbone.safetensors`` and the head that belongs to it."""
    about: dict[str, Any] = {"backbone": recipe.backbone, "classes": list(classes), "epoch": epoch}
    about |= {"recipe": recipe.model_dump(mode="json", exclude=set(MAY_CHANGE)), "tad_version": __version__}
    about[own.KEY] = own.described(backbone)
    write_weights(path / "backbone.safetensors", backbone.state_dict(), **about)
    sha256 = sha256_of(path / "backbone.safetensors")
    write_weights(path / "head.safetensors", head.state_dict(), **about, backbone_sha256=sha256)


@dataclass(frozen=True)
class FinetunedRun:
    """A fine-tuned backbone with its classifier over background (0) and ``classes`` (1 …), in evaluation mode."""

    path: Path
    recipe: FinetuneRecipe
    classes: list[str]
    backbone: Backbone
    head: nn.Linear
    form: ClipFormat

    @classmethod
    def load(cls, path: str | Path) -> FinetunedRun:
        """Read the folder that :func:`tad.extract.finetune.finetune` wrote.

        Raises
        ------
        RecipeError : it is not such a folder. WeightsError : no epoch was finished yet, or its weights are damaged.
        """
        path = Path(path)
        for name in ("recipe.yaml", "classes.json"):
            if not (path / name).is_file():
                raise RecipeError(f"{path} has no {name}: is it the folder of 'tad train-backbone'?")
        recipe = validated(FinetuneRecipe, load_mapping(path / "recipe.yaml"), where=str(path / "recipe.yaml"))
        classes = [str(name) for name in read_json(path / "classes.json")]
        if not (path / "head.safetensors").is_file():
            raise WeightsError(f"run {path} has no head.safetensors: no epoch was finished yet, resume the training")
        weights = read_weights(path / "head.safetensors")
        with safe_open(str(path / "head.safetensors"), "pt") as file:
            about = json.loads(file.metadata()["tad"])
        backbone = build_backbone(recipe.backbone, weights=path / "backbone.safetensors", port=recipe.port)
        if backbone.weights_id != f"sha256:{about['backbone_sha256']}":
            raise WeightsError(
                f"run {path}: head.safetensors was trained with another backbone.safetensors; resume the training to "
                "write both again"
            )
        head = nn.Linear(backbone.spec.width, len(classes) + 1)
        shapes = {name: tuple(value.shape) for name, value in weights.items()}
        if shapes != {name: tuple(value.shape) for name, value in head.state_dict().items()}:
            raise WeightsError(f"{path / 'head.safetensors'} does not fit {len(classes)} classes: {shapes}")
        head.load_state_dict(weights)
        _, form = resolved(recipe, backbone)
        return cls(path, recipe, classes, backbone, head.eval(), form)


class RunLog:
    """Lines with their time into ``log.txt`` and to logging; silent in all processes but the first (``None``)."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __call__(self, message: str) -> None:
        if self.path is not None:
            logger.info("%s", message)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"{now_text()} {message}\n")


def write_failures(path: Path, failures: Sequence[Mapping[str, str]]) -> None:
    """``failures.jsonl``; none where there is no failure."""
    if failures:
        write_text(path, "".join(json.dumps(failure, ensure_ascii=False) + "\n" for failure in failures))
