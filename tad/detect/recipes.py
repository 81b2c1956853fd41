"""Recipes as a command gives them: a detector's defaults or a file, then ``--set``, then flags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tad.detect.detectors import DETECTORS
from tad.detect.runs import Run
from tad.errors import RecipeError, did_you_mean
from tad.recipe import ClassesRecipe, DetectRecipe, PostprocessRecipe, apply_sets, load_mapping, validated

TRAIN: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.01,
    "schedule": "cosine",
    "warmup_epochs": 0.5,
    "clip_norm": 1.0,
    "ema": 0.99,
}
# What a detector is trained with when it is named without a recipe file: for data of which nothing is known.
DEFAULTS: dict[str, Mapping[str, Any]] = {
    "talnet": {
        "model": {"anchor_scales": "auto"},
        "train": {
            "epochs": 30,
            "batch_videos": 4,
            **TRAIN,
        },
        "postprocess": {"method": "soft_nms", "sigma": 0.5},
    },
    "sptad": {
        "model": {
            "rows": "auto",
            "lateral_kernel": 3,
            "width": 128,
            "interaction_width": 32,
            "feedforward": 512,
        },
        "train": {
            "epochs": 40,
            "batch_videos": 8,
            **TRAIN,
        },
        "postprocess": {"method": "soft_nms", "sigma": 0.5, "min_score": 1e-4},
    },
    "talmts": {
        "model": {"rows": "auto", "stt": False, "fsa": False, "frame_factor": 1, "width": 128},
        "train": {
            "epochs": 30,
            "batch_videos": 8,
            **TRAIN,
        },
        "postprocess": {"method": "soft_nms", "sigma": 0.5, "min_score": 1e-4},
    },
    "afsd": {
        "model": {"rows": "auto", "frame_factor": 1, "width": 128},
        "train": {
            "epochs": 30,
            "batch_videos": 8,
            **TRAIN,
        },
        "postprocess": {"method": "soft_nms", "sigma": 0.5, "min_score": 1e-4},
    },
    "bmn": {
        "model": {"layout": "rescaled", "rows": 100},
        "train": {
            "epochs": 15,
            "batch_videos": 8,
            **TRAIN,
        },
        "postprocess": {
            "method": "soft_nms",
            "sigma": 0.4,
            "soft_tiou": 0.25,
            "soft_tiou_high": 0.9,
            "min_score": 1e-4,
        },
    },
    "tcanet": {
        "train": {
            "epochs": 10,
            "batch_videos": 8,
            "optimizer": "adamw",
            "lr": 5e-4,
            "weight_decay": 0.01,
            "schedule": "cosine",
            "warmup_epochs": 0.5,
            "clip_norm": 1.0,
            "ema": 0.99,
        },
        "postprocess": {
            "method": "soft_nms",
            "sigma": 0.4,
            "soft_tiou": 0.25,
            "soft_tiou_high": 0.9,
            "min_score": 1e-4,
        },
    },
    "etad": {
        "model": {"layout": "windowed", "rows": 128},
        "train": {
            "epochs": 15,
            "batch_videos": 8,
            **TRAIN,
        },
        "postprocess": {"method": "soft_nms", "sigma": 0.35, "min_score": 1e-4},
    },
}


def detect_recipe(
    name: str | None = None,
    *,
    file: str | Path | None = None,
    streams: Sequence[str] | None = None,
    sets: Iterable[str] = (),
    seed: int | None = None,
) -> DetectRecipe:
    """The recipe that ``tad train-detector`` runs: defaults < file < ``sets`` < ``streams`` and ``seed``.

    Raises
    ------
    RecipeError : neither a detector nor a file, both and they disagree, an unknown detector, no streams, unknown keys.
    """
    if file is not None:
        data, where = load_mapping(file), str(file)
        if name is not None and data.get("detector", name) != name:
            raise RecipeError(f"{file} is a recipe of '{data['detector']}', not of '{name}': leave one of them out")
        data.setdefault("detector", name)
    elif name is not None:
        if name not in DETECTORS:
            raise RecipeError(f"unknown detector '{name}'.{did_you_mean(name, DETECTORS)}")
        data, where = {"detector": name, **DEFAULTS.get(name, {})}, f"recipe of {name}"
    else:
        raise RecipeError("name a detector (such as talnet) or give a recipe file")
    data = apply_sets(data, sets)
    if streams:
        data["streams"] = [stream.strip() for stream in streams]
    if seed is not None:
        data["seed"] = seed
    if not data.get("streams"):
        raise RecipeError(f"{where}: no streams; name those of the store with --streams, RGB first")
    return validated(DetectRecipe, data, where=where)


def result_recipes(run: str | Path, sets: Iterable[str]) -> tuple[PostprocessRecipe, ClassesRecipe | None]:
    """A run's suppression with ``sets`` (``tiou=0.5``, ``method=nms``) on top, and where its classes come from with
    those that begin with ``classes.``; None for a run that finds classes itself and for which none is set."""
    loaded = Run.load(run)
    suppression, classes = changed_results(loaded.recipe, sets)
    asked = any(item.startswith("classes.") for item in sets)
    return suppression, classes if loaded.class_agnostic or asked else None


def changed_results(recipe: DetectRecipe | None, sets: Iterable[str]) -> tuple[PostprocessRecipe, ClassesRecipe]:
    """A recipe's suppression and classes with ``sets`` on top; defaults where there is no recipe."""
    sets = list(sets)
    for item in sets:
        if item.startswith(("classes.scores", "classes.classifier")):
            raise RecipeError(f"--set {item} is of the training; other class scores are given with --scores FILE")
    of_classes = [item.removeprefix("classes.") for item in sets if item.startswith("classes.")]
    others = [item for item in sets if not item.startswith("classes.")]
    suppression = (PostprocessRecipe() if recipe is None else recipe.postprocess).model_dump()
    classes = (ClassesRecipe() if recipe is None else recipe.classes).model_dump()
    return (
        validated(PostprocessRecipe, apply_sets(suppression, others), where="--set"),
        validated(ClassesRecipe, apply_sets(classes, of_classes), where="--set"),
    )
