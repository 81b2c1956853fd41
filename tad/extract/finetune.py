"""Train a backbone on clips of annotated videos: a clip's class is that of the action at its centre, or background.

Read ``finetune_recipe.py`` for what can be chosen, ``clip_sampling.py`` for which clips are drawn, ``clip_reading.py``
for how they are cut, ``clip_trainer.py`` for a step, ``finetune_loop.py`` for the epochs,
``finetune_run.py`` for the folder that is written.

(K + 1)-way fine-tuning is that of "Exploring Stronger Feature for Temporal Action Localization" (section 2.1, table 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tad.annotations import Truth, read_truth
from tad.errors import AnnotationError, RecipeError
from tad.extract.backbones import build_backbone
from tad.extract.clip_library import Library, open_library
from tad.extract.clip_sampling import ClipSampler
from tad.extract.clip_trainer import ClipTrainer
from tad.extract.clips import mirror_index
from tad.extract.finetune_loop import Finetuning
from tad.extract.finetune_recipe import FinetuneRecipe, finetune_recipe, resolved, split_videos
from tad.extract.finetune_run import (
    FILES,
    RunLog,
    identity,
    may_begin,
    write_failures,
)
from tad.extract.inputs import find_videos
from tad.progress import ProgressFactory, silent
from tad.recipe import dump_yaml
from tad.training.distributed import World, world
from tad.training.files import (
    environment,
    read_json,
    read_state,
    remove_files,
    write_json,
    write_text,
)
from tad.training.rng import random_state, seed_all, set_random_state

__all__ = ["FinetuneRecipe", "finetune", "finetune_recipe", "resolved", "split_videos"]


def finetune(
    recipe: FinetuneRecipe,
    *,
    videos: str | Path | Iterable[str | Path],
    annotations: Truth | str | Path,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    progress: ProgressFactory | None = None,
) -> dict[str, Any]:
    """Train ``recipe.backbone`` and write the folder ``out`` (see :mod:`tad.extract.finetune_run`).

    On one machine the result depends on the arguments only, whether frames are kept in memory or streamed with a pool
    of the same size. Started by ``torchrun`` all its processes train together: each decodes its share of the videos.

    Parameters
    ----------
    videos : files, folders or lists, as for :func:`tad.extract.extract`; only those that the annotations name are read.
    annotations : the truth, read or where it is.
    out : the folder to write; it may exist if it is empty.
    resume : go on where the run in ``out`` stopped, to the same weights that it would have had without the stop. A
        finished run is left as it is; where there is none yet, training begins.
    overwrite : replace the run in ``out`` (with ``resume``: if it is of another recipe, annotations or videos).
    device : ``cpu``, ``cuda``, ``cuda:1``; by default CUDA when there is one.
    progress : shows how far it is (see :mod:`tad.progress`).

    Returns
    -------
    What ``metrics.json`` holds: ``holdout`` is the accuracy of the chosen epoch on one clip every ``spec.stride``
    frames of the held-out videos (:func:`tad.extract.clip_trainer.judged`). Chosen is the epoch with the best
    ``mean_recall`` (``select: recall``) or ``top1``, of equals the later; the last one where nothing is held out.

    Raises
    ------
    RecipeError : a recipe that does not fit together; ``out`` holds something else; more frames than may be kept.
    AnnotationError : a subset or class that is not there; no action to learn.
    VideoError : not one training video can be read. A single one that cannot is listed under ``failures``.
    WeightsError : weights that do not fit, or could not be read back once they are fine-tuned.
    TadError : the loss is no longer finite.
    """
    truth = annotations if isinstance(annotations, Truth) else read_truth(annotations)
    files = {file.video: file for file in find_videos([videos] if isinstance(videos, (str, Path)) else videos)}
    path = Path(out)
    with _random_state_kept(), world(device) as processes:
        if recipe.precision == "fp16" and processes.device.type != "cuda":
            raise RecipeError("precision=fp16 needs a CUDA device; take bf16 or fp32 on the CPU")
        torch.manual_seed(recipe.seed)
        weights = recipe.weights or f"random:{recipe.seed}"
        backbone = build_backbone(recipe.backbone, weights=weights, port=recipe.port)
        given, (recipe, form) = recipe, resolved(recipe, backbone)
        train, held = split_videos(recipe, truth, files)
        classes = sorted(set(map(str, truth.segments.loc[truth.segments["video"].isin(train), "label"])))
        if not classes:
            raise AnnotationError(f"{truth.path}: no action in the {len(train)} training videos, nothing to learn")
        mirror = mirror_index(classes, recipe.mirror)
        sha256 = identity(recipe, backbone.weights_id, truth, [files[video] for video in train + held])
        begun = processes.on_first(lambda: may_begin(path, recipe, sha256, resume=resume, overwrite=overwrite))
        if isinstance(begun, dict):
            return begun
        resuming = bool(begun) and processes.on_first((path / "resume.pt").is_file)
        known = processes.on_first(lambda: read_json(path / "videos.json")) if resuming else None
        show = progress if progress is not None and processes.first else silent
        library = open_library(
            recipe,
            form,
            [files[video] for video in train],
            [files[video] for video in held],
            truth.segments,
            classes,
            processes=processes,
            known=known,
            progress=show,
        )
        sampler = ClipSampler(
            library.train,
            classes=len(classes),
            offsets=form.offsets(),
            batch=recipe.batch,
            background=recipe.background,
            mirror=mirror,
            jitter=recipe.jitter,
            random_crop=recipe.random_crop,
            seed=recipe.seed,
        )
        torch.manual_seed(recipe.seed)
        head = nn.Linear(backbone.spec.width, len(classes) + 1)
        trainer = ClipTrainer(backbone.to(processes.device), head.to(processes.device), recipe, processes)
        log = RunLog(path / "log.txt" if processes.first else None)
        if resuming:
            trainer.load_state_dict(read_state(path / "resume.pt"))
            log(f"resumed in epoch {trainer.epoch + 1}, after {trainer.step_in_epoch} of its steps")
        else:
            seed_all(recipe.seed, processes.rank)
            env = {"annotations": str(truth.path), "recipe_as_given": given.model_dump(mode="json")}
            processes.on_first(lambda: _write_head(path, recipe, classes, library, sha256, processes, env))
        return Finetuning(recipe, path, classes, library, sampler, trainer, log, show, sha256).run()


def _write_head(
    path: Path,
    recipe: FinetuneRecipe,
    classes: list[str],
    library: Library,
    inputs_sha256: str,
    processes: World,
    about: Mapping[str, Any],
) -> None:
    """Everything of a run folder that is known before the first step; what an earlier run left there goes."""
    if path.is_dir():
        remove_files(path, files=FILES)
    write_text(path / "recipe.yaml", dump_yaml(recipe))
    write_json(path / "classes.json", classes)
    write_json(path / "videos.json", {"pool_clips": library.pool, "videos": library.index})
    write_failures(path / "failures.jsonl", library.failures)
    env = environment(device=processes.device, seed=recipe.seed, world=processes.size)
    write_json(path / "env.json", env | {"inputs_sha256": inputs_sha256, **about})  # last: now it can be resumed


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Leave the caller's random numbers as they were."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
