"""A trained run on stored features: samples → network → decoded segments → suppression → classes → a table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from tad.annotations import Truth, read_truth
from tad.detect.align import Sample, check_needs
from tad.detect.classes import check_scores, fused
from tad.detect.data import collate, with_proposals
from tad.detect.interface import DenseDetector, Detector, LevelSpec, Segments
from tad.detect.postprocess import suppress_all
from tad.detect.preflight import Failure, no_video_message, with_features
from tad.detect.raw import MapView, Raw, RawMaps, joined, load_raw, npz_path, save_maps, save_raw
from tad.detect.runs import Run
from tad.detect.trained_on import check_features
from tad.detect.video_scores import class_scores
from tad.detect.windows import detection_starts, of_whole_videos, read_for_views, view_at
from tad.errors import RecipeError, StoreError, WeightsError
from tad.progress import ProgressFactory, silent
from tad.recipe import ClassesRecipe, DataRecipe, PostprocessRecipe
from tad.store import Store, open_store
from tad.training.distributed import pick_device

logger = logging.getLogger("tad.detect")
TOGETHER = 256  # videos whose proposals are suppressed side by side
COLUMNS = ["video", "start_s", "end_s", "label", "score"]
Found = dict[str, tuple[np.ndarray, np.ndarray]]  # video -> seconds (P, 2) and scores (P,) of proposals, best first


def detect(
    *,
    run: Run | str | Path,
    store: Store | str | Path,
    videos: Sequence[str] | None = None,
    subset: str | None = None,
    annotations: Truth | str | Path | None = None,
    device: str | None = None,
    batch_videos: int = 1,
    postprocess: PostprocessRecipe | None = None,
    classes: ClassesRecipe | None = None,
    scores: pd.DataFrame | str | Path | None = None,
    proposals: bool = False,
    raw_out: str | Path | None = None,
    maps_out: str | Path | None = None,
    failures: list[Failure] | None = None,
    progress: ProgressFactory | None = None,
) -> pd.DataFrame:
    """Find segments in stored features.

    Parameters
    ----------
    run : a training's folder, or what ``Run.load`` made of it.
    store : the features; their streams must be those that the run was trained on, by fingerprint.
    videos : ids; by default all that the store has in any of the run's streams.
    subset : only the videos of this subset of ``annotations``.
    device : ``cpu``, ``cuda``, ``cuda:1``; by default CUDA when there is one.
    batch_videos : videos a forward pass; the result does not depend on it.
    postprocess : suppression; by default the run's.
    classes : how a class-agnostic run's proposals get their classes; by default the run's.
    scores : class scores by video for it (index video, columns classes), or their file; by default those of the run.
    proposals : give the proposals of a class-agnostic run as they are, without labels.
    raw_out : also write what the network found before suppression to this ``.npz``, for :func:`resuppress`.
    maps_out : also write the maps it was decoded from to this ``.npz``, for :func:`tad.detect.fuse`.
    failures : a list that receives a :class:`Failure` for every video that could not be used; they are logged as well.

    Returns
    -------
    A table video, start_s, end_s, label, score, sorted by video, then falling score.

    Raises
    ------
    StoreError : a stream is missing or was made with another recipe, or the store has none of the videos.
    RecipeError, WeightsError : the run cannot be loaded; arguments that do not fit together.
    AnnotationError : an unknown subset; class scores that cannot be read.
    """
    run = run if isinstance(run, Run) else Run.load(run)
    if isinstance(store, (str, Path)):
        with open_store(store) as opened:
            return detect(
                run=run, store=opened, videos=videos, subset=subset, annotations=annotations, device=device,
                batch_videos=batch_videos, postprocess=postprocess, classes=classes, scores=scores, proposals=proposals,
                raw_out=raw_out, maps_out=maps_out, failures=failures, progress=progress,
            )  # fmt: skip
    if batch_videos < 1:
        raise RecipeError(f"batch_videos must be at least 1, got {batch_videos}")
    raw_path = None if raw_out is None else npz_path(raw_out, name="raw_out")
    maps_path = None if maps_out is None else npz_path(maps_out, name="maps_out")
    chosen = pick_device(device)
    agnostic = run.class_agnostic
    if not agnostic and (scores is not None or proposals or classes is not None):
        raise RecipeError(f"run {run.path}: '{run.recipe.detector}' finds classes itself; it takes no class scores")
    if proposals and scores is not None:
        raise RecipeError("proposals are given without classes: leave the scores out, or ask for detections")
    if classes is not None and scores is None and classes.softmax != run.recipe.classes.softmax:
        raise RecipeError("classes.softmax makes probabilities of a file of logits: give the file as scores")
    for needed in run.parts:
        check_same_features(needed, store)
    present, failed = _wanted(run, store, videos, subset, annotations)

    def lost(failure: Failure) -> None:
        logger.warning("%s", failure)
        failed.append(failure)

    for failure in failed:
        logger.warning("%s", failure)
    views: list[MapView] | None = None if maps_path is None else []
    show = progress or silent
    table = None
    if agnostic and not proposals:  # before the network has worked for hours
        table = class_scores(run, store=store, videos=present, device=chosen, scores=scores, classes=classes)
        check_scores(table, run.classes)
    raw = Raw(
        find(run, store, present, device=chosen, batch_videos=batch_videos, lost=lost, progress=show, views=views),
        run.classes, class_agnostic=agnostic, class_scores=table, recipe=run.recipe,
    )  # fmt: skip
    if raw_path is not None:
        save_raw(raw_path, raw)
    if maps_path is not None:
        save_maps(maps_path, RawMaps(views or [], run.classes, run.recipe, run.channels, raw.class_scores))
    found, unscored = detections(raw, postprocess, classes)
    for video in unscored:
        lost(Failure(video, "AnnotationError", "no class scores for this video: its proposals have no class"))
    if failures is not None:
        failures.extend(failed)
    return found


def resuppress(
    raw: str | Path,
    postprocess: PostprocessRecipe | None = None,
    *,
    classes: ClassesRecipe | None = None,
    scores: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """The table that :func:`detect` would return with this suppression and these classes, from its ``raw_out`` file
    alone; without them, with those of the run."""
    return detections(with_scores(load_raw(raw), scores), postprocess, classes)[0]


def find(
    run: Run,
    store: Store,
    videos: Sequence[str],
    *,
    device: torch.device,
    batch_videos: int = 1,
    lost: Callable[[Failure], None],
    progress: ProgressFactory = silent,
    views: list[MapView] | None = None,
) -> list[Segments]:
    """What a run's network finds in videos before suppression; ``views`` receives the maps it was decoded from.

    Of a run that refines proposals, those are found first. Raises :class:`RecipeError` where maps are asked of a
    detector that has none.
    """
    return list(
        _found(run, store, videos, device=device, batch_videos=batch_videos, lost=lost, progress=progress, views=views)
    )


def _found(
    run: Run,
    store: Store,
    videos: Sequence[str],
    *,
    device: torch.device,
    batch_videos: int = 1,
    lost: Callable[[Failure], None],
    progress: ProgressFactory,
    views: list[MapView] | None = None,
) -> Iterator[Segments]:
    """:func:`find`, video by video."""
    detector = run.build(device=device)
    check_needs(detector.needs, detector=run.recipe.detector)
    if views is not None and not isinstance(detector, DenseDetector):
        raise RecipeError(f"'{run.recipe.detector}' has no maps to write (maps_out); raw_out keeps its segments")
    proposed: Found | None = None
    if run.proposals is not None:
        proposed = by_video(find_proposals(run, store, videos, device=device, lost=lost, progress=progress))
        videos = [video for video in videos if video in proposed]
    with progress(len(videos), "detect", "videos") as bar:
        samples = readable(store, detector.needs, videos, run.recipe.data, proposals=proposed, lost=lost)
        while group := list(islice(samples, batch_videos)):
            yield from decoded_or_lost(detector, group, run.recipe.data, device=device, lost=lost, views=views)
            bar.advance(len(group))


def find_proposals(
    run: Run,
    store: Store,
    videos: Sequence[str],
    *,
    device: torch.device,
    lost: Callable[[Failure], None],
    progress: ProgressFactory = silent,
) -> list[Segments]:
    """Proposals for the refining detector of ``run`` by the run inside it: the best of a video after suppression."""
    source, recipe = run.proposals, run.recipe.proposals
    if source is None:
        raise RecipeError(f"run {run.path} has no proposals run inside it")
    raw = _found(source, store, videos, device=device, lost=lost, progress=progress)
    suppression = (recipe.postprocess or source.recipe.postprocess).model_copy(update={"max_segments": recipe.top})
    # suppressed as they come: before it, a large set's proposals would not fit into memory
    parts = iter(lambda: list(islice(raw, TOGETHER)), [])
    return [kept for part in parts for kept in suppress_all(part, suppression)]


def by_video(proposals: Iterable[Segments]) -> Found:
    """Proposals as a data set hands them to samples."""
    return {s.video: (s.segments_s.double().numpy(), s.scores.numpy()) for s in proposals}


def detections(
    raw: Raw, postprocess: PostprocessRecipe | None = None, classes: ClassesRecipe | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """Suppression and, for class-agnostic segments with class scores, their classes: a table, and unscored videos.

    Class-agnostic segments without any class scores stay proposals: the table has no labels then.
    """
    if raw.recipe is not None:
        postprocess, classes = postprocess or raw.recipe.postprocess, classes or raw.recipe.classes
    if postprocess is None or (raw.class_agnostic and classes is None):
        raise RecipeError("these raw detections do not say how to suppress them: give postprocess (and classes)")
    kept = suppress_all(raw.segments, postprocess)
    if not raw.class_agnostic:
        return table_of(kept, raw.classes), []
    if raw.class_scores is None or classes is None:
        return table_of(kept, None), []
    labelled, unscored = fused(
        kept,
        raw.class_scores,
        classes=raw.classes,
        top=classes.top,
        combine=classes.combine,
        max_segments=classes.max_segments,
    )
    return table_of(labelled, raw.classes), unscored


def with_scores(raw: Raw, scores: pd.DataFrame | None) -> Raw:
    """``raw`` with other class scores where some are given. Raises :class:`RecipeError` where it has classes itself."""
    if scores is None:
        return raw
    if not raw.class_agnostic:
        raise RecipeError("these raw detections have classes already; they take no class scores")
    return replace(raw, class_scores=scores)


def check_same_features(run: Run, store: Store) -> None:
    """Raise :class:`StoreError` unless the store's streams were made exactly as those that the run was trained on."""
    check_features(run.path, run.features, store)


def readable(
    store: Store,
    needs: Sequence[LevelSpec],
    videos: Iterable[str],
    data: DataRecipe,
    *,
    proposals: Found | None = None,
    lost: Callable[[Failure], None],
) -> Iterator[Sample]:
    """Samples of the videos that can be read, with their ``proposals``; ``lost`` is called with a :class:`Failure` for
    each of the others."""
    for video in videos:
        try:
            sample = read_for_views(store, needs, video, data)
        except StoreError as error:
            lost(Failure(video, type(error).__name__, str(error)))
            continue
        yield sample if proposals is None else with_proposals(sample, proposals[video])


@torch.inference_mode()
def decoded(
    detector: Detector, samples: Sequence[Sample], *, device: torch.device, views: list[MapView] | None = None
) -> list[Segments]:
    """What the network finds in its views, before suppression: one :class:`Segments` a sample, float32 on the CPU.

    ``views`` receives the maps as well. Raises :class:`WeightsError` where the outputs are not finite.
    """
    batch = collate(samples)
    if batch is None:
        return []
    batch = batch.to(device)
    result = []
    outputs = detector(batch)
    if views is not None and isinstance(detector, DenseDetector):
        for index, maps in enumerate(detector.dense(outputs, batch)):
            cpu = {name: value.float().cpu() for name, value in maps.items()}
            views.append(MapView(batch.videos[index], batch.axes[index], batch.durations_s[index], cpu))
    for found, duration_s in zip(detector.decode(outputs, batch), batch.durations_s, strict=True):
        if not (torch.isfinite(found.segments_s).all() and torch.isfinite(found.scores).all()):
            raise WeightsError(f"video {found.video}: the detector's output is not finite; have its weights diverged?")
        extra = {name: value.float().cpu() for name, value in found.extra.items()}
        segments_s, labels, scores = found.segments_s.float(), found.labels.long(), found.scores.float()
        result.append(Segments(found.video, segments_s.cpu(), labels.cpu(), scores.cpu(), extra, duration_s))
    return result


def decoded_videos(
    detector: Detector,
    samples: Sequence[Sample],
    data: DataRecipe,
    *,
    device: torch.device,
    views: list[MapView] | None = None,
) -> list[Segments]:
    """:func:`decoded` of whole videos, one :class:`Segments` each: seen in windows where the detector asks for it, as
    many at a time as there are videos, at least 8.

    Raises :class:`WeightsError` as :func:`decoded` does, and :class:`StoreError` where windows that are read here turn
    out to be damaged.
    """
    needs = detector.needs
    seen = [(sample, start) for sample in samples for start in detection_starts(sample, needs, data)]
    size = max(len(samples), 8) if len(seen) > len(samples) else len(samples)
    groups = ([view_at(*place, needs, data) for place in seen[i : i + size]] for i in range(0, len(seen), size))
    maps: list[MapView] | None = None if views is None else []
    found = of_whole_videos(f for group in groups for f in decoded(detector, group, device=device, views=maps))
    if views is not None and maps is not None:
        views.extend(maps)  # only now: a group that raises is taken again, video by video
    return found


def decoded_or_lost(
    detector: Detector,
    samples: Sequence[Sample],
    data: DataRecipe,
    *,
    device: torch.device,
    lost: Callable[[Failure], None],
    views: list[MapView] | None = None,
) -> list[Segments]:
    """:func:`decoded_videos`, but a video on which the network's output is not finite, or that cannot be read to its
    end, is lost alone.
    """
    try:
        return decoded_videos(detector, samples, data, device=device, views=views)
    except (StoreError, WeightsError) as error:
        if len(samples) == 1:
            lost(Failure(samples[0].video, type(error).__name__, str(error)))
            return []
    return [
        found
        for sample in samples
        for found in decoded_or_lost(detector, [sample], data, device=device, lost=lost, views=views)
    ]


def table_of(found: Sequence[Segments], classes: Sequence[str] | None) -> pd.DataFrame:
    """Segments of many videos as a table of predictions, sorted; without labels where ``classes`` is None."""
    segments_s = joined([s.segments_s for s in found], torch.zeros(0, 2)).numpy().astype(np.float64)  # (N, 2)
    labels = joined([s.labels for s in found], torch.zeros(0, dtype=torch.int64)).numpy()
    table = pd.DataFrame(
        {
            "video": [s.video for s in found for _ in range(len(s))],
            "start_s": segments_s[:, 0],
            "end_s": segments_s[:, 1],
            "label": labels if classes is None else np.array(classes, dtype=object)[labels],
            "score": joined([s.scores for s in found], torch.zeros(0)).numpy().astype(np.float64),
        },
        columns=COLUMNS,
    )
    table = table.sort_values(["video", "score"], ascending=[True, False], kind="stable", ignore_index=True)
    return table.drop(columns="label") if classes is None else table


def _wanted(
    run: Run,
    store: Store,
    videos: Sequence[str] | None,
    subset: str | None,
    annotations: Truth | str | Path | None,
) -> tuple[list[str], list[Failure]]:
    have = {stream: set(store.videos(stream)) for part in run.parts for stream in part.features}
    if subset is not None:
        if annotations is None:
            raise RecipeError(f"subset '{subset}' is a name of the annotations: give annotations as well")
        truth = annotations if isinstance(annotations, Truth) else read_truth(annotations)
        listed = set(map(str, truth.subset(subset).videos["video"]))
        wanted = sorted(listed if videos is None else listed & set(videos))
        source = f"subset '{subset}'"
    elif videos is not None:
        wanted, source = list(dict.fromkeys(videos)), "the call"
    else:
        wanted, source = sorted(set().union(*have.values())), "the store"
    present, failed = with_features(wanted, have)
    if wanted and not present:
        raise StoreError(no_video_message(wanted, have, store, source))
    return present, failed
