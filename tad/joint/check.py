"""A recipe with a section ``joint`` before it is trained: what :func:`~tad.joint.train.train_joint` would refuse."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import nn

from tad.annotations import Truth, read_truth
from tad.detect.detectors import DETECTORS, build_detector
from tad.detect.interface import Detector
from tad.detect.preflight import Plan, plan_training
from tad.detect.recipe_check import RecipeCheck
from tad.detect.train import resolved
from tad.detect.trained_on import described_features
from tad.errors import StoreError, TadError
from tad.joint.dataset import check_frames, check_joint
from tad.joint.encoder import Encoder
from tad.joint.fitting import readable
from tad.joint.frames import FrameSource, open_sources
from tad.joint.model import JointModel
from tad.joint.source import JointSource
from tad.recipe import DetectRecipe
from tad.store import Store, open_store
from tad.training.distributed import World


def check_joint_recipe(
    check: RecipeCheck,
    recipe: DetectRecipe,
    *,
    store: Store | str | Path,
    annotations: Truth | str | Path,
    read: bool = True,
) -> None:
    """Add to ``check`` what :func:`~tad.detect.recipe_check.check_recipe` of the same recipe does not say of it.

    No frame is read. ``read`` also loads the backbones, as the training will; without it only what the store says of
    them counts. What is wrong with the recipe as that of a detector is said there, and is in the way here.
    """
    if recipe.joint is None:
        return
    check.notes.append("this recipe trains the backbone along (its section 'joint'): 'tad train-joint' trains it")
    kind = DETECTORS.get(recipe.detector)
    if kind is not None and kind.reads_proposals:
        check.problems.append(
            f"'{recipe.detector}' refines the proposals of another run and cannot be trained jointly: train that run "
            "jointly, extract with --run, and train this one without 'joint'"
        )
        return
    if recipe.joint.mode == "pre-extracted":
        return  # trained on the store's rows alone
    try:
        if isinstance(store, Store):
            _check(check, recipe, store, annotations, read)
            return
        with open_store(store) as opened:
            _check(check, recipe, opened, annotations, read)
    except TadError as error:
        if str(error) not in check.problems:
            check.problems.append(str(error))


def _check(check: RecipeCheck, recipe: DetectRecipe, store: Store, annotations: Truth | str | Path, read: bool) -> None:
    """Raises the errors that leave nothing more to look at."""
    truth = annotations if isinstance(annotations, Truth) else read_truth(annotations)
    plan = plan_training(recipe, store, truth)
    full, joint = resolved(recipe, plan, store), recipe.joint
    assert joint is not None
    detector = build_detector(full.detector, channels=plan.channels, classes=len(plan.classes), **full.model)
    sources = open_sources(
        store, detector.needs, frames=joint.frames, flow_frames=joint.flow_frames, videos=joint.videos
    )
    source = JointSource(full, store)
    source.sources = sources
    check.attempt(lambda: check_joint(detector.needs, full.data, sources))
    check.attempt(lambda: _check_footage(check, source, store, detector, plan))
    check.attempt(lambda: _check_mode(full, sources, detector))
    if not read or check.problems:
        return
    video = readable(plan, store, detector.needs)
    features = described_features(store, plan.channels, video=video, row_spacing=full.data.row_spacing)
    here = World(0, 1, torch.device("cpu"))
    check.attempt(lambda: source.module(detector, features=features, path=Path(), processes=here))


def _check_footage(check: RecipeCheck, source: JointSource, store: Store, detector: Detector, plan: Plan) -> None:
    """Videos without frames, which leave something to learn from and to judge by, or :class:`StoreError`.

    Raises :class:`RecipeError` as :func:`~tad.joint.dataset.check_frames` does.
    """
    videos = [*plan.train, *plan.holdout]
    found = check_frames(store, detector.needs, source.sources, videos, augmentation=source.augmentation)
    check.notes += found.messages
    lost = {failure.video for failure in found.failures}
    learnt = {video for video in plan.train if len(plan.segments[video][0])}
    judged = set(plan.holdout_truth["video"] if source.recipe.train.select == "map" else plan.holdout)
    for part, name in ((learnt, "training"), (judged, "held-out")):
        if part and part <= lost:
            first = next(failure for failure in found.failures if failure.video in part)
            raise StoreError(f"no {name} video that counts has frames to train from; the first: {first}")
    check.left_out("lack usable frames", found.failures)


def _check_mode(recipe: DetectRecipe, sources: dict[str, FrameSource], detector: Detector) -> None:
    """Raise :class:`RecipeError` for a mode that the detector has no use for."""
    assert recipe.joint is not None
    read = dict.fromkeys(need.stream for need in detector.needs if not sources[need.stream].grid.raw)
    stand_ins = {stream: cast(Encoder, nn.Identity()) for stream in read}  # the model asks which streams there are
    JointModel(detector=detector, encoders=stand_ins, joint=recipe.joint)
