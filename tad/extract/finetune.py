"""Train a backbone on clips of annotated videos: a clip's class is that of the action at its centre, or background.

Clips are cut as extraction cuts its windows, so that a row of features is what the network was trained to tell. The
frames of all videos are decoded once, at the size of the network's input, and kept in memory as uint8: meant for what
fits there (``max_memory_gb``), some hours of small frames.

::

    OUT/
      backbone.safetensors   the network without its head: build_backbone(name, weights=...) reads it
      recipe.yaml            the recipe with everything filled in
      metrics.json           classes, losses, accuracy on held-out clips; there when the training is finished
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tad._version import __version__
from tad.annotations import Truth, read_truth
from tad.errors import AnnotationError, RecipeError, TadError
from tad.extract.backbones import build_backbone
from tad.extract.backbones.base import Backbone
from tad.extract.clips import ClipFormat, ClipSampler, VideoClips, mirror_index, read_clips
from tad.extract.inputs import VideoFile, find_videos
from tad.extract.snippets import SnippetPlan
from tad.extract.streams import geometry_of
from tad.extract.video import source_of
from tad.progress import ProgressFactory, silent
from tad.recipe import Model, apply_sets, dump_yaml, load_mapping, validated


class FinetuneRecipe(Model):
    """How a backbone is trained on clips. ``None`` means what the backbone declares, or what is said beside it."""

    backbone: str
    weights: str | None = None  # where to begin, as in ExtractRecipe; None: at random, from the seed
    seed: int = Field(0, ge=0)
    window: int | None = Field(None, ge=1)
    interval: int | None = Field(None, ge=1)
    fps: float | None = Field(None, gt=0)  # None: the backbone's; if it has none, each file's own
    short_side: int | None = Field(None, ge=16)
    crop: tuple[int, int] | None = None
    flow: str | None = None  # None: dis
    train_subset: str | None = None  # None: all videos that are not held out
    holdout: float = Field(0.1, ge=0, lt=1)  # part of the videos on which the accuracy is measured
    holdout_subset: str | None = None  # a subset of its own for that
    background: float = Field(0.35, gt=0, lt=1)  # share of the clips; the others go to all classes alike
    mirror: dict[str, str | None] | None = None  # None: no flips; else see tad.extract.clips.mirror_index
    steps: int = Field(800, ge=1)
    batch: int = Field(16, ge=2)
    lr: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.02, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)  # share of the steps
    max_memory_gb: float = Field(4.0, gt=0)


def finetune(
    recipe: FinetuneRecipe,
    *,
    videos: str | Path | Iterable[str | Path],
    annotations: Truth | str | Path,
    out: str | Path,
    reuse: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    progress: ProgressFactory | None = None,
) -> dict[str, Any]:
    """Train ``recipe.backbone`` and write the folder ``out``; on one machine the result depends on the arguments only.

    Parameters
    ----------
    videos : files, folders or lists, as for :func:`tad.extract.extract`; only those that the annotations name are read.
    annotations : the truth, read or where it is.
    reuse : leave a finished training of the same recipe, annotations and files in ``out`` as it is.
    overwrite : replace the training in ``out`` (with ``reuse``: if it is of others).
    device : ``cpu``, ``cuda``, ``cuda:1``; by default CUDA when there is one.
    progress : shows how far it is (see :mod:`tad.progress`).

    Returns
    -------
    What ``metrics.json`` holds: ``holdout`` has ``top1`` (over all clips), ``background_recall`` and ``class_recall``
    (the mean over classes), from one clip every ``spec.stride`` frames of the held-out videos.

    Raises
    ------
    RecipeError : a recipe that does not fit together; ``out`` holds another training; more frames than may be kept.
    AnnotationError : a subset or class that is not there; no action to learn.
    VideoError : not one training video can be read. A single one that cannot is listed under ``failures``.
    TadError : the loss is no longer finite.
    """
    begun = time.perf_counter()
    truth = annotations if isinstance(annotations, Truth) else read_truth(annotations)
    files = {file.video: file for file in find_videos([videos] if isinstance(videos, (str, Path)) else videos)}
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        backbone = build_backbone(recipe.backbone, weights=recipe.weights or f"random:{recipe.seed}")
        recipe, form = resolved(recipe, backbone)
        train, held = split_videos(recipe, truth, files)
        classes = sorted(set(map(str, truth.segments.loc[truth.segments["video"].isin(train), "label"])))
        if not classes:
            raise AnnotationError(f"{truth.path}: no action in the {len(train)} training videos, nothing to learn")
        mirror = mirror_index(classes, recipe.mirror)
        folder, identity = Path(out), _identity(recipe, truth, [files[video] for video in train + held])
        if (known := _finished(folder, identity, reuse=reuse, overwrite=overwrite)) is not None:
            return known
        failures: list[dict[str, str]] = []
        clips = read_clips(
            [files[video] for video in train + held],
            truth.segments,
            classes,
            form,
            max_memory_gb=recipe.max_memory_gb,
            failures=failures,
            progress=progress,
        )
        sampler = ClipSampler(
            [clips[video] for video in train if video in clips],
            classes=len(classes),
            offsets=form.offsets(),
            batch=recipe.batch,
            background=recipe.background,
            mirror=mirror,
            seed=recipe.seed,
        )
        head = nn.Linear(backbone.spec.width, len(classes) + 1)
        backbone, head = backbone.to(chosen), head.to(chosen)
        losses = _train(backbone, head, sampler, recipe, progress)
        judges = [clips[video] for video in held if video in clips]
        scores = _score(backbone, head, judges, classes, form.offsets()) if judges else None
    metrics = {
        "backbone": recipe.backbone,
        "classes": classes,
        "clips": recipe.steps * recipe.batch,
        "losses": losses,
        "holdout": scores,
        "counts": {"train_videos": len(sampler.videos), "holdout_videos": len(judges)},
        "failures": failures,
        "seconds": round(time.perf_counter() - begun, 3),
        "inputs_sha256": identity,
    }
    _write(folder, backbone.cpu(), recipe, metrics)
    return metrics


def finetune_recipe(
    name: str | None = None, *, file: str | Path | None = None, sets: Iterable[str] = (), seed: int | None = None
) -> FinetuneRecipe:
    """A recipe from a backbone's name or a file, with ``sets`` (``steps=500``) and then ``seed`` on top.

    Raises :class:`RecipeError` : neither a name nor a file, both and they disagree, unknown keys or values.
    """
    data = {} if file is None else load_mapping(file)
    where = "recipe of a backbone" if file is None else str(file)
    if name is not None and data.setdefault("backbone", name) != name:
        raise RecipeError(f"{file} is a recipe of '{data['backbone']}', not of '{name}': leave one of them out")
    data = apply_sets(data, sets)
    if seed is not None:
        data["seed"] = seed
    return validated(FinetuneRecipe, data, where=where)


def resolved(recipe: FinetuneRecipe, backbone: Backbone) -> tuple[FinetuneRecipe, ClipFormat]:
    """The recipe with what the backbone declares filled in, and what its clips are.

    Raises :class:`RecipeError` for what the backbone does not admit.
    """
    spec = backbone.spec
    snippets = SnippetPlan(recipe.window or spec.window, recipe.interval or spec.interval, spec.stride)
    geometry = geometry_of(spec, recipe.short_side, recipe.crop)
    if recipe.flow is not None and spec.modality == "rgb":
        raise RecipeError(f"flow {recipe.flow}: {spec.name} reads RGB frames, not optical flow")
    if snippets.window < spec.min_frames:
        raise RecipeError(f"{spec.name} needs windows of at least {spec.min_frames} frames, got {snippets.window}")
    flow = (recipe.flow or "dis") if spec.modality == "flow" else None
    form = ClipFormat(snippets, recipe.fps or spec.fps, geometry, flow)
    filled = {
        "window": snippets.window,
        "interval": snippets.interval,
        "fps": form.fps,
        "short_side": geometry.short_side,
        "crop": geometry.crop,
        "flow": flow,
    }
    return recipe.model_copy(update=filled), form


def split_videos(recipe: FinetuneRecipe, truth: Truth, files: Mapping[str, VideoFile]) -> tuple[list[str], list[str]]:
    """Sorted ids of the training and the held-out videos, of those that have both truth and a file.

    Held out are the videos of ``holdout_subset``, else the ``holdout`` part of the training videos that comes first by
    SHA-256 of seed and id. Raises :class:`AnnotationError` and :class:`RecipeError` where a side would be empty.
    """
    named = truth if recipe.train_subset is None else truth.subset(recipe.train_subset)
    train = {str(video) for video in named.videos["video"]} & files.keys()
    held: set[str] = set()
    if recipe.holdout_subset is not None:
        held = {str(video) for video in truth.subset(recipe.holdout_subset).videos["video"]} & files.keys()
        if recipe.train_subset is None:
            train -= held
        elif train & held:
            raise RecipeError(f"holdout_subset '{recipe.holdout_subset}' shares videos with '{recipe.train_subset}'")
    elif recipe.holdout > 0 and len(train) > 1:
        order = sorted(train, key=lambda video: hashlib.sha256(f"{recipe.seed} {video}".encode()).digest())
        held = set(order[: min(len(order) - 1, max(1, round(recipe.holdout * len(order))))])
        train -= held
    if not train:
        raise AnnotationError(
            f"none of the {len(files)} video files is a training video of {truth.path}: a file's name without its "
            f"suffix must be the video's id, such as {', '.join(map(str, named.videos['video'][:3]))}"
        )
    return sorted(train), sorted(held)


# ---- training -------------------------------------------------------------------------------------------------------
def _train(
    backbone: Backbone, head: nn.Linear, sampler: ClipSampler, recipe: FinetuneRecipe, progress: ProgressFactory | None
) -> list[dict[str, float]]:
    """AdamW, warm-up then cosine to zero, cross-entropy; returns the mean loss of every twentieth of the steps."""
    weights = [p for p in [*backbone.parameters(), *head.parameters()] if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},  # norms and biases
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
    warmup = round(recipe.warmup * recipe.steps)
    losses: list[dict[str, float]] = []
    recent: list[float] = []
    backbone.train()
    with (progress or silent)(recipe.steps, f"train {recipe.backbone}", "steps") as bar:
        for step in range(recipe.steps):
            done = (step - warmup) / max(1, recipe.steps - warmup)
            factor = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * factor
            clips, labels = sampler.draw(step)
            loss = F.cross_entropy(_logits(backbone, head, clips), labels.to(head.weight.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recent.append(loss.item())
            if not math.isfinite(recent[-1]):
                raise TadError(
                    f"the loss of {recipe.backbone} is {recent[-1]} in step {step + 1}: lower lr={recipe.lr:g}"
                )
            if len(recent) >= recipe.steps / 20 or step + 1 == recipe.steps:
                losses.append({"step": step + 1, "loss": round(sum(recent) / len(recent), 5)})
                recent = []
            bar.advance(1, f"loss {losses[-1]['loss']:.3f}" if losses else "")
    backbone.eval()
    return losses


def _logits(backbone: Backbone, head: nn.Linear, clips: Tensor) -> Tensor:
    """uint8 clips (B, T, H, W, C) → (B, K + 1)."""
    moved = clips.to(head.weight.device).permute(0, 4, 1, 2, 3)  # (B, C, T, H, W)
    logits: Tensor = head(backbone(backbone.normalise(moved))["features"])
    return logits


def _score(
    backbone: Backbone, head: nn.Linear, videos: Sequence[VideoClips], classes: Sequence[str], offsets: np.ndarray
) -> dict[str, Any]:
    """Accuracy on the windows that extraction would cut; ``None`` where there is nothing to be recalled."""
    confusion = np.zeros((len(classes) + 1, len(classes) + 1), np.int64)  # [truth, guess]
    with torch.inference_mode():
        for video in videos:
            starts = np.arange(0, len(video.labels), backbone.spec.stride)
            for some in np.array_split(starts, math.ceil(len(starts) / 32)):
                clips = torch.from_numpy(np.stack([video.cut(int(start), offsets) for start in some]))
                guesses = _logits(backbone, head, clips).argmax(1).cpu().numpy()
                np.add.at(confusion, (video.labels[some], guesses), 1)
    total = confusion.sum(1)
    recall = [float(confusion[k, k] / total[k]) if total[k] else None for k in range(len(total))]
    present = [value for value in recall[1:] if value is not None]
    return {
        "clips": int(total.sum()),
        "top1": float(np.trace(confusion) / total.sum()),
        "background_recall": recall[0],
        "class_recall": float(np.mean(present)) if present else None,
        "recall": dict(zip(classes, recall[1:], strict=True)),
    }


# ---- files ----------------------------------------------------------------------------------------------------------
def _identity(recipe: FinetuneRecipe, truth: Truth, files: Sequence[VideoFile]) -> str:
    """A hash of all that the result depends on."""
    tables = [truth.videos.to_csv(index=False), truth.segments.to_csv(index=False)]
    sources = [[file.video, source_of(file.path)] for file in files]
    text = json.dumps([recipe.model_dump(mode="json"), tables, sources], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _finished(folder: Path, identity: str, *, reuse: bool, overwrite: bool) -> dict[str, Any] | None:
    """The metrics of a training to reuse; ``None`` when one is to be made."""
    path = folder / "metrics.json"
    if not path.exists() or (overwrite and not reuse):
        return None
    try:
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = metrics["inputs_sha256"] == identity and (folder / "backbone.safetensors").exists()
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path} is not that of a trained backbone: take another folder") from error
    if reuse and same:
        return metrics
    if overwrite:
        return None
    other = "" if same else " of another recipe, other annotations or other videos"
    raise RecipeError(f"{folder} holds a finished training{other}: take another folder, or overwrite it")


def _write(folder: Path, backbone: nn.Module, recipe: FinetuneRecipe, metrics: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").unlink(missing_ok=True)
    about = {"backbone": recipe.backbone, "classes": metrics["classes"], "recipe": recipe.model_dump(mode="json")}
    # one key, since safetensors writes several in an order that differs from call to call, and with it the file's hash
    metadata = {"tad": json.dumps(about | {"tad_version": __version__}, ensure_ascii=False, sort_keys=True)}
    state = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    _replace(folder / "backbone.safetensors", lambda path: save_file(state, path, metadata=metadata))
    _replace(folder / "recipe.yaml", lambda path: path.write_text(dump_yaml(recipe), encoding="utf-8"))
    text = json.dumps(metrics, indent=2, ensure_ascii=False) + "\n"
    _replace(folder / "metrics.json", lambda path: path.write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """``write`` a file beside ``path``, then give it this name at once."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
