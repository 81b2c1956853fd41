"""Before the first step: how much memory it will take, and which mode fits a budget. The counting is ``memory.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tad.annotations import Truth
from tad.apply import feature_recipes
from tad.detect.align import check_needs, feature_of
from tad.detect.detectors import build_detector
from tad.detect.interface import Batch, Detector, LevelSpec, Targets
from tad.detect.preflight import Plan, plan_training
from tad.detect.runs import Run
from tad.detect.train import resolved
from tad.detect.trained_on import described_features
from tad.errors import StoreError, VideoError
from tad.extract.backbones import build_backbone
from tad.joint.counting import BackboneCost, StreamCost, measure_backbone, measure_detector
from tad.joint.frames import FrameSource, open_sources
from tad.joint.freezing import freeze
from tad.joint.memory import choose, estimate, format_bytes
from tad.recipe import DetectRecipe, JointRecipe
from tad.store import Store
from tad.training.distributed import planned_size
from tad.training.rng import random_state, seed_all, set_random_state


def fitted(
    recipe: DetectRecipe, store: Store, truth: Truth, *, memory_bytes: int | None
) -> tuple[DetectRecipe, list[str]]:
    """The recipe, with mode, ratio and checkpointing so that a step fits into ``memory_bytes``, and what to say of it.

    Without a budget the recipe stays as it is. It is the memory of one process, for the longest training sample.

    Raises
    ------
    RecipeError : no mode fits. StoreError, AnnotationError, WeightsError : as training would raise.
    """
    joint = recipe.joint or JointRecipe()
    if memory_bytes is None and joint.mode == "pre-extracted":
        return recipe, []  # as for two stages, whose store need not have frames
    plan = plan_training(recipe, store, truth)
    full = resolved(recipe, plan, store)
    kept = random_state()
    seed_all(recipe.seed)
    detector = build_detector(full.detector, channels=plan.channels, classes=len(plan.classes), **full.model)
    check_needs(detector.needs, detector=full.detector)
    rows = longest_rows(full, plan, store, detector.needs[0])
    found = costs(full, joint, plan, store, detector, rows)
    of_detector = measure_detector(detector, lambda: _loss(detector, full, plan, store, rows))
    set_random_state(kept)
    samples, train = _share(full), full.train
    snippets = all(need.level == "features" for need in detector.needs)
    if memory_bytes is None:
        needed = estimate(
            found, samples=samples, mode=joint.mode, ratio=joint.ratio, checkpoint=joint.checkpoint, chunk=joint.chunk,
            detector=of_detector, optimizer=train.optimizer, ema=train.ema is not None,
        )  # fmt: skip
        said = f"memory: a step of mode {joint.mode} needs about {format_bytes(needed.total)}"
        return recipe, [said, needed.line()]
    chosen = choose(
        memory_bytes, found, samples=samples, ratio=joint.ratio, chunk=joint.chunk, detector=of_detector,
        snippets=snippets, optimizer=train.optimizer, ema=train.ema is not None,
    )  # fmt: skip
    taken = {"mode": chosen.mode, "ratio": chosen.ratio, "checkpoint": chosen.checkpoint}
    return recipe.model_copy(update={"joint": joint.model_copy(update=taken)}), chosen.lines()


def _share(recipe: DetectRecipe) -> int:
    """Videos of a batch that one process holds."""
    return -(-recipe.train.batch_videos // planned_size())


def longest_rows(recipe: DetectRecipe, plan: Plan, store: Store, need: LevelSpec) -> int:
    """Rows of the longest training sample."""
    if need.rows is not None:
        return need.rows
    return min(longest_stored(plan, store, need), recipe.data.max_rows)


def longest_stored(plan: Plan, store: Store, need: LevelSpec) -> int:
    """Rows of the longest training video."""
    longest = 1
    for video in plan.train:
        try:
            longest = max(longest, len(feature_of(store, need, video)))
        except StoreError:
            continue  # training says so
    return longest


def readable(plan: Plan, store: Store, needs: Sequence[LevelSpec]) -> str:
    """The first training video whose features can be opened. Raises :class:`StoreError` where there is none."""
    last: StoreError | None = None
    for video in plan.train:
        try:
            for need in needs:
                feature_of(store, need, video)
        except StoreError as error:
            last = error
        else:
            return video
    raise StoreError(f"no training video can be read; the last says: {last}")


def costs(
    recipe: DetectRecipe, joint: JointRecipe, plan: Plan, store: Store, detector: Detector, rows: int
) -> list[StreamCost]:
    """What each stream's clips of one sample take; of mode ``pre-extracted`` none has any."""
    sources = open_sources(
        store, detector.needs, frames=joint.frames, flow_frames=joint.flow_frames, videos=joint.videos
    )
    streams = [stream for stream, source in sources.items() if not source.grid.raw]
    video = readable(plan, store, detector.needs)
    features = described_features(store, plan.channels, video=video, row_spacing=recipe.data.row_spacing)
    recipes = feature_recipes(Run(Path(), recipe, [], features), weights={})
    found = []
    for stream in streams:
        source, made = sources[stream], recipes[stream]
        needs = [need for need in detector.needs if need.stream == stream]
        grid, box = source.grid, _box(source, plan.train)
        channels = 2 if grid.flow else 3
        backbone = build_backbone(made.backbone, weights=made.weights, port=made.port)
        backbone.interpolate_positions = made.interpolate_positions
        freeze(backbone, stages=joint.frozen_stages, norms=joint.frozen_norms)
        backbone.train()
        if needs[0].level == "features":
            window = grid.plan.window
            clips = 2 * rows if needs[0].layout == "rescaled" else rows  # rescaled rows lie between two
            clips = min(clips, longest_stored(plan, store, needs[0]))  # each stored row is computed once
            frames = (clips - 1) * grid.plan.stride + grid.plan.span
        else:
            clips, window = 1, (needs[0].rows or rows) * grid.levels[needs[0].level]
            frames = window
        cost: BackboneCost = measure_backbone(
            backbone,
            clip=(channels, window, *box),
            keys=list(dict.fromkeys(need.level for need in needs)),
            precision=recipe.train.precision,
        )
        found.append(StreamCost(cost, clips, frames * channels * box[0] * box[1]))
    return found


def _box(source: FrameSource, videos: list[str]) -> tuple[int, int]:
    """Height and width of the frames that the network sees."""
    last: Exception | None = None
    for video in videos:
        try:
            box = source.about(video).box
            return box.height, box.width
        except (StoreError, VideoError) as error:
            last = error
    raise StoreError(f"no training video has frames: {last}")


def _loss(detector: Detector, recipe: DetectRecipe, plan: Plan, store: Store, rows: int) -> Any:
    """The detector's loss on a batch of random rows with one action each."""
    count = _share(recipe)
    features: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for need in detector.needs:
        width, *area = plan.shapes.get(need.stream, {}).get(need.level) or (plan.channels[need.stream],)
        shape = (count, width, need.rows or rows, *area)
        if need.shape is not None and len(need.shape) == 3 and need.level == "features":
            features[need.key] = torch.randint(0, 256, shape, dtype=torch.uint8)
        else:
            features[need.key] = torch.randn(shape).requires_grad_()
        masks[need.key] = torch.ones(count, need.rows or rows, dtype=torch.bool)
    axis = feature_of(store, detector.needs[0], readable(plan, store, detector.needs)).axis
    mask = torch.ones(count, rows, dtype=torch.bool)
    action = torch.tensor([[0.25 * rows, 0.75 * rows]])
    targets = [Targets(action, torch.zeros(1, dtype=torch.int64)) for _ in range(count)]
    seconds = float(axis.to_seconds(rows))
    batch = Batch(["sample"] * count, features, mask, [axis] * count, [seconds] * count, targets, masks=masks)
    detector.train()
    return sum(detector.loss(detector(batch), targets).values())
