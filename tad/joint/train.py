"""``tad train-joint``: the two-stage trainer with rows that a backbone in training makes of frames.

Read :mod:`tad.detect.train` for the training itself, then ``source.py`` (what is otherwise here), ``model.py`` (the
network) and ``gradient_sampling.py`` (Algorithm 1 of ETAD).
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tad.annotations import Truth, read_truth
from tad.apply import feature_recipes
from tad.detect.classifier_train import train_classifier
from tad.detect.detectors import DETECTORS
from tad.detect.interface import LevelSpec
from tad.detect.preflight import Failure, plan_training
from tad.detect.runs import CLASSIFIER, Run
from tad.detect.train import train_detector
from tad.detect.trained_on import read_features
from tad.errors import RecipeError, StoreError, VideoError
from tad.extract.rows import StreamRows
from tad.extract.streams import resolve
from tad.joint.fitting import fitted
from tad.joint.frames import open_sources
from tad.joint.source import JointSource, levels_of
from tad.progress import ProgressFactory, silent
from tad.recipe import DetectRecipe, JointRecipe
from tad.store import Store, open_store
from tad.training.distributed import pick_device, world

logger = logging.getLogger("tad.joint")
ROWS = ".rows-"  # how a folder of rows begins that a classifier learns from, and that is removed after it


def train_joint(
    recipe: DetectRecipe,
    *,
    store: Store | str | Path,
    annotations: Truth | str | Path,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    progress: ProgressFactory | None = None,
    memory_bytes: int | None = None,
) -> dict[str, Any]:
    """Train a detector together with the backbones of the streams that it reads, and write its run folder.

    The store holds the features that these backbones give before the training; it says how rows follow from frames.
    The run is one of a detector whose features are those of the trained backbones: ``tad detect`` and ``tad extract
    --run`` make them. Under ``torchrun`` all its processes train together, as in
    :func:`tad.detect.train.train_detector`.

    Parameters
    ----------
    recipe : a detector's, with a section ``joint``.
    store : the starting features and, unless ``joint.videos`` names files to decode, the frames.
    annotations, out, resume, overwrite, device, progress : as for ``train_detector``.
    memory_bytes : take the mode nearest to a full backward pass whose step fits into this; see
        :mod:`tad.joint.memory`.

    Returns
    -------
    What ``metrics.json`` holds.

    Raises
    ------
    RecipeError : what cannot be trained jointly: a detector that refines another run's proposals, one that samples
        snippets of stage outputs, features that tad did not extract, no mode within the memory.
    StoreError, AnnotationError, WeightsError, TadError : as ``train_detector``, and where frames are missing.
    """
    if isinstance(store, (str, Path)):
        with open_store(store) as opened:
            return train_joint(
                recipe, store=opened, annotations=annotations, out=out, resume=resume, overwrite=overwrite,
                device=device, progress=progress, memory_bytes=memory_bytes,
            )  # fmt: skip
    truth = annotations if isinstance(annotations, Truth) else read_truth(annotations)
    recipe = recipe.model_copy(update={"joint": recipe.joint or JointRecipe()})
    kind = DETECTORS.get(recipe.detector)
    if kind is not None and kind.reads_proposals:
        raise RecipeError(
            f"'{recipe.detector}' refines the proposals of another run, whose features would be others than its own: "
            "train that run jointly, extract with --run, and train this one on the features"
        )
    path = Path(out)
    if resume and (path / "features.json").is_file():  # as it was begun, whatever fitted then
        begun = Run.load(path).recipe.joint
        source = JointSource(recipe.model_copy(update={"joint": begun or recipe.joint}), store)
    else:
        chosen, remarks = fitted(recipe, store, truth, memory_bytes=memory_bytes)
        source = JointSource(chosen, store, remarks=remarks)
    with world(device) as processes:  # joined once: processes that parted do not find each other again
        metrics = train_detector(
            recipe, store=store, annotations=truth, out=path, resume=resume, overwrite=overwrite, device=device,
            progress=progress, source=source,
        )  # fmt: skip
        if source.anew and kind is not None and kind.class_agnostic and recipe.classes.scores is None:
            processes.on_first(lambda: _classify_trained(path, recipe, store, truth, device, progress or silent))
    return metrics


def _classify_trained(
    path: Path, recipe: DetectRecipe, store: Store, truth: Truth, device: str | None, progress: ProgressFactory
) -> None:
    """Train the classifier of whole videos again, on rows of the trained backbones, which detection will read.

    The one that chose the checkpoint had learnt on the starting features. Nothing is done where that was done already.
    """
    run, inner = Run.load(path), path / CLASSIFIER
    for left in path.glob(f"{ROWS}*"):  # of a training that was killed
        shutil.rmtree(left)
    known = read_features(inner, recipe.streams, of="classifier's run") if (inner / "features.json").is_file() else {}
    same = known and all(known[s]["fingerprint"] == run.features[s]["fingerprint"] for s in recipe.streams)
    if same and (inner / "metrics.json").is_file():
        return
    logger.info("class scores: the classifier learns again, on the features of the trained backbones")
    plan = plan_training(recipe, store, truth)
    with tempfile.TemporaryDirectory(prefix=ROWS, dir=path) as folder:
        rows = Path(folder) / "rows.zarr"
        for failure in write_rows(run, store, rows, videos=[*plan.train, *plan.holdout], device=device):
            logger.warning("left out: %s", failure)
        train_classifier(
            recipe.classes.classifier, streams=recipe.streams, store=rows, annotations=truth, data=recipe.data,
            seed=recipe.seed, out=inner, resume=bool(same), overwrite=not same, device=device, progress=progress,
        )  # fmt: skip


def write_rows(
    run: Run, store: Store, into: str | Path, *, videos: Sequence[str], device: str | None = None
) -> list[Failure]:
    """Extract the features of a joint ``run`` from the frames that it was trained on into the store ``into``.

    Returns the videos whose frames are missing or cannot be read, of which it then lacks streams.

    Raises
    ------
    RecipeError : a run that was not trained jointly. WeightsError : a backbone is gone.
    StoreError : there are no frames at all.
    """
    joint = run.recipe.joint
    if joint is None:
        raise RecipeError(f"run {run.path} was not trained jointly; use 'tad extract --run'")
    needs = [LevelSpec(stream) for stream in run.features]
    sources = open_sources(store, needs, frames=joint.frames, flow_frames=joint.flow_frames, videos=joint.videos)
    lost: dict[str, Failure] = {}
    with open_store(into, "a") as made:
        for name, recipe in feature_recipes(run, weights={}).items():
            stream = resolve(recipe, name=name, device=pick_device(device))
            made.create_stream(name, stream.spec, info=stream.info)
            for video in videos:
                try:
                    about, duration_s = store.attrs(name, video), store[name, video].duration_s
                    levels = levels_of(StreamRows(stream, batch=joint.chunk), sources[name], video)
                except (StoreError, VideoError) as error:
                    lost.setdefault(video, Failure(video, type(error).__name__, str(error)))
                    continue
                made.write(name, video, levels, duration_s=duration_s, source=about.get("source", {}))
    return list(lost.values())
