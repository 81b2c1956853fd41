"""A trained run on videos: extract what it reads into a store; or detect at once, and say which videos failed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from tad.detect import detect
from tad.detect.runs import Run
from tad.errors import RecipeError, WeightsError
from tad.extract.outcome import ExtractReport
from tad.extract.pipeline import Failure, extract
from tad.extract.streams import recipe_of
from tad.progress import ProgressFactory, silent
from tad.recipe import ClassesRecipe, ExtractRecipe, PostprocessRecipe
from tad.store import Store


@dataclass
class VideoDetections:
    """A table video, start_s, end_s, label, score; the videos that were searched, with or without a find; failures."""

    predictions: pd.DataFrame
    videos: list[str]
    failures: list[Failure]


def detect_videos(
    videos: str | Path | Iterable[str | Path],
    *,
    run: str | Path,
    store: str | Path | None = None,
    weights: Mapping[str, str] | None = None,
    device: str | None = None,
    batch: int = 8,
    postprocess: PostprocessRecipe | None = None,
    classes: ClassesRecipe | None = None,
    scores: pd.DataFrame | str | Path | None = None,
    proposals: bool = False,
    progress: ProgressFactory = silent,
) -> VideoDetections:
    """Detections in ``videos`` with nothing but a run folder: its features are extracted exactly as those it was
    trained on.

    Parameters
    ----------
    videos : files, folders or lists, as for :func:`tad.extract.extract`.
    run : the folder that ``train_detector`` wrote.
    store : keep the features here and use those already there; by default they are thrown away.
    weights : stream → checkpoint, where the checkpoint is no longer where it was at extraction.
    postprocess, classes, scores, proposals : see :func:`tad.detect.detect`.

    Raises
    ------
    RecipeError : the run's features were imported, not extracted by tad.
    WeightsError : a checkpoint is missing, or is not the one whose hash the run recorded.
    """
    loaded = Run.load(run)
    with ExitStack() as stack:
        if store is None:
            store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tad-"))) / "features.zarr"
        report = extract_for_run(
            videos, run=loaded, store=store, weights=weights, batch=batch, device=device, progress=progress
        )
        failed = {failure.video for failure in report.failures}
        complete = [video for video in dict.fromkeys(report.videos) if video not in failed]
        lost: list[Any] = []
        predictions = detect(
            run=loaded, store=store, videos=complete, device=device, postprocess=postprocess, classes=classes,
            scores=scores, proposals=proposals, failures=lost,
        )  # fmt: skip
    streams = list(dict.fromkeys(stream for part in loaded.parts for stream in part.features))
    failures = [*report.failures, *(Failure(f.video, "", streams, f.error, f.message) for f in lost)]
    return VideoDetections(predictions, complete, failures)


def extract_for_run(
    videos: str | Path | Iterable[str | Path],
    *,
    run: Run | str | Path,
    store: str | Path | Store,
    weights: Mapping[str, str] | None = None,
    format: Literal["zarr", "hdf5"] | None = None,
    batch: int = 8,
    device: str | None = None,
    overwrite: bool = False,
    failures: str | Path | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: ProgressFactory = silent,
) -> ExtractReport:
    """Extract all streams that ``run`` reads, exactly as it was trained on them, and with the backbones that were
    trained along with it: ``detect`` in ``store`` gives what :func:`detect_videos` gives.

    Parameters
    ----------
    weights : stream → checkpoint, where the checkpoint is no longer where it was at extraction.
    others : see :func:`tad.extract.extract`.

    Raises
    ------
    RecipeError : the run's features were imported, not extracted by tad.
    WeightsError : a checkpoint is missing, or is not the one whose hash the run recorded.
    StoreError : the store has streams of these names that were made otherwise, as those that a backbone's training was
        begun with.
    """
    recipes = feature_recipes(run if isinstance(run, Run) else Run.load(run), weights=weights or {})
    return extract(
        videos, store=store, recipes=list(recipes.values()), names=list(recipes), format=format, batch=batch,
        device=device, overwrite=overwrite, failures=failures, workers=workers, scheduler=scheduler, progress=progress,
    )  # fmt: skip


def feature_recipes(run: Run, *, weights: Mapping[str, str]) -> dict[str, ExtractRecipe]:
    """Extraction recipes of all streams that ``run`` and the runs inside it read, checkpoints found and verified.

    A checkpoint is looked for where ``weights`` says, then where it lay at extraction, then in the run's ``weights``
    folder.
    """
    recipes = {}
    known = {stream: (part, features) for part in reversed(run.parts) for stream, features in part.features.items()}
    for stream, (part, features) in known.items():
        if any(other.features.get(stream, features)["fingerprint"] != features["fingerprint"] for other in run.parts):
            raise RecipeError(f"run {run.path} and the run inside it read two different streams called '{stream}'")
        spec: dict[str, Any] = features["spec"]
        if not spec.get("imported") and spec.get("extractor") is None:
            raise RecipeError(f"stream '{stream}' was not extracted by tad: its rows cannot be made from a video")
        weights_file: str | None = ""  # of imported features, which recipe_of refuses
        if "weights" in spec and spec["weights"] is None:
            weights_file = None  # frames and flow need none
        elif not spec.get("imported"):
            weights_file = _find_weights(stream, spec["weights"], features.get("weights_source"), part, weights)
        recipes[stream] = recipe_of(spec, weights=weights_file)
    return recipes


def _find_weights(stream: str, weights_id: str, source: str | None, run: Run, given: Mapping[str, str]) -> str:
    from tad.extract.fetch import fetch, fetched
    from tad.extract.published import split_name
    from tad.extract.weights import sha256_of

    if weights_id.startswith("random"):
        return weights_id
    sha256 = weights_id.removeprefix("sha256:")
    candidates = []
    places = [(place, *split_name(place)) for place in (given.get(stream), source)]
    for place, name, file in places:
        candidates.append(place if name is None else str(file or fetched(name) or ""))
    candidates += sorted(str(p) for p in (Path(run.path) / "weights").glob("*"))
    # published weights given by name at extraction have a preprocessing that the file alone does not tell
    prefix = "" if places[1][1] is None else f"{places[1][1]}="
    for candidate in candidates:
        if candidate and Path(candidate).is_file() and sha256_of(candidate) == sha256:
            return prefix + candidate
    for _, name, file in places:
        if name is not None and file is None and fetched(name) is None and sha256_of(path := fetch(name)) == sha256:
            return f"{prefix}{path}"
    looked = "; ".join(str(c) for c in candidates if c) or "nowhere recorded"
    raise WeightsError(
        f"the weights of stream '{stream}' (sha256 {sha256}) are in none of: {looked}. "
        f"Copy the file into {Path(run.path) / 'weights'}, or tell 'tad detect VIDEO' with --weights {stream}=FILE"
    )
