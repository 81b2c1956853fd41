"""How a backbone is fine-tuned, as data, and what follows from it: the form of the clips, which videos are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tad.annotations import Truth
from tad.errors import AnnotationError, RecipeError
from tad.extract.backbones.base import Backbone
from tad.extract.clips import ClipFormat
from tad.extract.inputs import VideoFile
from tad.extract.snippets import SnippetPlan
from tad.extract.streams import geometry_of
from tad.recipe import Model, TrainRecipe, apply_sets, load_mapping, validated

MAY_CHANGE = (
    "read",
    "workers",
    "max_memory_gb",
    "save_steps",
)  # they do not touch the result: a resumed run may differ


class FinetuneRecipe(Model):
    """How a backbone is trained on clips. ``None`` means what the backbone declares, or what is said beside it."""

    backbone: str
    weights: str | None = None  # where to begin, as in ExtractRecipe; None: at random, from the seed
    port: str | None = None  # as in ExtractRecipe
    seed: int = Field(default=0, ge=0)
    # what a clip is
    window: int | None = Field(default=None, ge=1)
    interval: int | None = Field(default=None, ge=1)
    fps: Annotated[float, Field(gt=0)] | Literal["native"] | None = None
    short_side: int | None = Field(default=None, ge=16)
    crop: tuple[int, int] | None = None
    flow: str | None = None  # None: dis
    interpolate_positions: bool = False  # as in ExtractRecipe
    # which videos
    train_subset: str | None = None  # None: all videos that are not held out
    holdout: float = Field(default=0.1, ge=0, lt=1)  # part of the videos on which the accuracy is measured
    holdout_subset: str | None = None  # a subset of its own for that
    # which clips, and how they are changed
    background: float = Field(default=0.35, gt=0, lt=1)  # share of the clips; the others go to all classes alike
    random_crop: bool = False  # in training; else, and for the held-out videos, the centre
    mirror: dict[str, str | None] | None = None  # None: no flips; else see tad.extract.clips.mirror_index
    jitter: float = Field(default=0.0, ge=0, lt=1)  # a clip's speed is drawn from 1 - jitter to 1 + jitter
    # how it is trained
    epochs: int = Field(default=20, ge=1)
    steps: int | None = Field(default=None, ge=1)  # of the optimizer, an epoch; None: about one clip for every action
    batch: int = Field(default=16, ge=2)  # clips a step of the optimizer, in all processes together
    micro_batch: int | None = Field(default=None, ge=1)  # clips a forward pass; None: the whole share of a process
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.02, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float | None = Field(default=None, ge=0)  # None: a tenth of the epochs
    dropout: float = Field(default=0.0, ge=0, lt=1)  # before the classifier
    clip_norm: float | None = Field(default=None, gt=0)
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    select: Literal["recall", "top1", "last"] = "recall"  # by what on held-out videos the checkpoint is chosen
    # how videos are read
    read: Literal["auto", "memory", "stream"] = "auto"
    max_memory_gb: float = Field(default=4.0, gt=0)  # of frames, in each process
    pool_clips: int | None = Field(default=None, ge=1)  # shuffled among so many; None: as many as memory holds
    workers: int = Field(default=2, ge=1)  # threads that decode, when videos are streamed
    save_steps: int = Field(default=500, ge=1)  # the state to resume from is written that often, and after every epoch

    @property
    def training(self) -> TrainRecipe:
        """The part that optimizer and schedule read."""
        warmup = self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs
        return TrainRecipe(
            epochs=self.epochs,
            optimizer=self.optimizer,
            lr=self.lr,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            warmup_epochs=warmup,
        )


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

    Sets ``backbone.interpolate_positions``. Raises :class:`RecipeError` for what the backbone does not admit, and for
    values that do not fit together.
    """
    spec = backbone.spec
    snippets = SnippetPlan(recipe.window or spec.window, recipe.interval or spec.interval, spec.stride)
    geometry = geometry_of(spec, recipe.short_side, recipe.crop, interpolate=recipe.interpolate_positions)
    if recipe.flow is not None and spec.modality == "rgb":
        raise RecipeError(f"flow {recipe.flow}: {spec.name} reads RGB frames, not optical flow")
    if snippets.window < spec.min_frames:
        raise RecipeError(f"{spec.name} needs windows of at least {spec.min_frames} frames, got {snippets.window}")
    if not (spec.any_length or recipe.interpolate_positions) and snippets.window != spec.frames:
        raise RecipeError(
            f"{spec.name} takes windows of {spec.frames} frames only, got window={snippets.window}; with "
            "interpolate_positions=true its position embeddings are interpolated"
        )
    if (warmup := recipe.training.warmup_epochs) >= recipe.epochs:
        raise RecipeError(f"warmup_epochs={warmup:g} leaves nothing of epochs={recipe.epochs}")
    backbone.interpolate_positions = recipe.interpolate_positions
    flow = (recipe.flow or "dis") if spec.modality == "flow" else None
    fps = spec.grid_fps if recipe.fps is None else None if recipe.fps == "native" else recipe.fps
    filled = {
        "window": snippets.window,
        "interval": snippets.interval,
        "fps": fps or "native",
        # an exact size is what the backbone declares where nothing else is asked for, and stays so
        "short_side": geometry.short_side if geometry.resize is None else None,
        "crop": geometry.crop if geometry.resize is None else None,
        "flow": flow,
        "warmup_epochs": warmup,
    }
    return recipe.model_copy(update=filled), ClipFormat(snippets, fps, geometry, flow)


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
