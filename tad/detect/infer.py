"""A trained run on stored features: samples → network → decoded segments → suppression → a table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tad.annotations import Truth, read_truth
from tad.detect.align import Sample, check_needs
from tad.detect.data import collate
from tad.detect.interface import Detector, LevelSpec, Segments
from tad.detect.postprocess import suppress_all
from tad.detect.preflight import Failure, check_streams, no_video_message, with_features
from tad.detect.runs import Run, describe_differences, differing_keys, write_atomic
from tad.detect.windows import detection_views, joined, read_whole
from tad.errors import RecipeError, StoreError, WeightsError
from tad.progress import ProgressFactory, silent
from tad.recipe import DataRecipe, PostprocessRecipe
from tad.store import Store, open_store
from tad.training.distributed import pick_device

logger = logging.getLogger("tad.detect")
COLUMNS = ["video", "start_s", "end_s", "label", "score"]


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
    raw_out: str | Path | None = None,
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
    raw_out : also write what the network found before suppression to this ``.npz``, for :func:`resuppress`.
    failures : a list that receives a :class:`Failure` for every video that could not be used; they are logged as well.

    Returns
    -------
    A table video, start_s, end_s, label, score, sorted by video, then falling score.

    Raises
    ------
    StoreError : a stream is missing or was made with another recipe, or the store has none of the videos.
    RecipeError, WeightsError : the run cannot be loaded; arguments that do not fit together.
    AnnotationError : an unknown subset.
    """
    run = run if isinstance(run, Run) else Run.load(run)
    if isinstance(store, (str, Path)):
        with open_store(store) as opened:
            return detect(
                run=run, store=opened, videos=videos, subset=subset, annotations=annotations, device=device,
                batch_videos=batch_videos, postprocess=postprocess, raw_out=raw_out, failures=failures,
                progress=progress,
            )  # fmt: skip
    if batch_videos < 1:
        raise RecipeError(f"batch_videos must be at least 1, got {batch_videos}")
    raw_path = None if raw_out is None else _raw_path(raw_out)
    check_same_features(run, store)
    chosen = pick_device(device)
    detector = run.build(device=chosen)
    check_needs(detector.needs, detector=run.recipe.detector)
    present, failed = _wanted(run, store, videos, subset, annotations)

    def lost(failure: Failure) -> None:
        logger.warning("%s", failure)
        failed.append(failure)

    for failure in failed:
        logger.warning("%s", failure)
    raw: list[Segments] = []
    with (progress or silent)(len(present), "detect", "videos") as bar:
        samples = readable(store, detector.needs, present, run.recipe.data, lost=lost)
        while group := list(islice(samples, batch_videos)):
            raw += decoded_or_lost(detector, group, run.recipe.data, device=chosen, lost=lost)
            bar.advance(len(group))
    if raw_path is not None:
        save_raw(raw_path, raw, classes=run.classes)
    if failures is not None:
        failures.extend(failed)
    return suppressed_table(raw, postprocess or run.recipe.postprocess, run.classes)


def resuppress(raw: str | Path, postprocess: PostprocessRecipe) -> pd.DataFrame:
    """The table that :func:`detect` would return with this suppression, from its ``raw_out`` file alone."""
    segments, classes = load_raw(raw)
    return suppressed_table(segments, postprocess, classes)


def check_same_features(run: Run, store: Store) -> None:
    """Raise :class:`StoreError` unless the store's streams were made exactly as those that the run was trained on."""
    check_streams(store, list(run.features))
    for stream, known in run.features.items():
        attrs = store.stream_attrs(stream)
        if attrs["fingerprint"] != known["fingerprint"]:
            differences = (
                describe_differences(differing_keys(known["spec"], attrs["spec"])) or "only their fingerprints differ"
            )
            raise StoreError(
                f"run {run.path} was trained on other features than stream '{stream}' of store {store.path} holds: "
                f"{differences}. Extract the stream again as it was, or train again on this store"
            )


def readable(
    store: Store,
    needs: Sequence[LevelSpec],
    videos: Iterable[str],
    data: DataRecipe,
    *,
    lost: Callable[[Failure], None],
) -> Iterator[Sample]:
    """Samples of the videos that can be read; ``lost`` is called with a :class:`Failure` for each of the others."""
    for video in videos:
        try:
            yield read_whole(store, needs, video, data)
        except StoreError as error:
            lost(Failure(video, type(error).__name__, str(error)))


@torch.inference_mode()
def decoded(detector: Detector, samples: Sequence[Sample], *, device: torch.device) -> list[Segments]:
    """What the network finds in its views, before suppression: one :class:`Segments` a sample, float32 on the CPU.

    Raises :class:`WeightsError` where the outputs are not finite.
    """
    batch = collate(samples)
    if batch is None:
        return []
    batch = batch.to(device)
    result = []
    for found, duration_s in zip(detector.decode(detector(batch), batch), batch.durations_s, strict=True):
        if not (torch.isfinite(found.segments_s).all() and torch.isfinite(found.scores).all()):
            raise WeightsError(f"video {found.video}: the detector's output is not finite; have its weights diverged?")
        extra = {name: value.float().cpu() for name, value in found.extra.items()}
        segments_s, labels, scores = found.segments_s.float(), found.labels.long(), found.scores.float()
        result.append(Segments(found.video, segments_s.cpu(), labels.cpu(), scores.cpu(), extra, duration_s))
    return result


def decoded_videos(
    detector: Detector, samples: Sequence[Sample], data: DataRecipe, *, device: torch.device
) -> list[Segments]:
    """:func:`decoded` of whole videos, one :class:`Segments` each: seen in windows where the detector asks for it, as
    many at a time as there are videos, at least 8.
    """
    views = [view for sample in samples for view in detection_views(sample, detector.needs, data)]
    size = max(len(samples), 8) if len(views) > len(samples) else len(samples)
    groups = (views[i : i + size] for i in range(0, len(views), size))
    return joined(found for group in groups for found in decoded(detector, group, device=device))


def decoded_or_lost(
    detector: Detector,
    samples: Sequence[Sample],
    data: DataRecipe,
    *,
    device: torch.device,
    lost: Callable[[Failure], None],
) -> list[Segments]:
    """:func:`decoded_videos`, but a video on which the network's output is not finite is lost alone."""
    try:
        return decoded_videos(detector, samples, data, device=device)
    except WeightsError as error:
        if len(samples) == 1:
            lost(Failure(samples[0].video, type(error).__name__, str(error)))
            return []
    return [
        found for sample in samples for found in decoded_or_lost(detector, [sample], data, device=device, lost=lost)
    ]


def suppressed_table(raw: Iterable[Segments], postprocess: PostprocessRecipe, classes: Sequence[str]) -> pd.DataFrame:
    """Segments of many videos after suppression, as a table of predictions."""
    kept = suppress_all(raw, postprocess)
    names = np.array(classes, dtype=object)
    segments_s = _joined([s.segments_s for s in kept], torch.zeros(0, 2)).numpy().astype(np.float64)  # (N, 2)
    table = pd.DataFrame(
        {
            "video": [s.video for s in kept for _ in range(len(s))],
            "start_s": segments_s[:, 0],
            "end_s": segments_s[:, 1],
            "label": names[_joined([s.labels for s in kept], torch.zeros(0, dtype=torch.int64)).numpy()],
            "score": _joined([s.scores for s in kept], torch.zeros(0)).numpy().astype(np.float64),
        },
        columns=COLUMNS,
    )
    return table.sort_values(["video", "score"], ascending=[True, False], kind="stable", ignore_index=True)


# ---- what the network found, on disk ---------------------------------------------------------------------------------
def save_raw(path: Path, raw: Sequence[Segments], *, classes: Sequence[str]) -> None:
    """Write decoded segments as one ``.npz``.

    ``videos`` and ``classes`` are names, ``durations`` the videos' lengths in seconds; ``video`` (N,) and ``labels``
    (N,) index them; ``segments`` (N, 2) seconds, ``scores`` (N,), and ``extra/<name>`` of what all videos have.
    """
    extras = set.intersection(*[set(s.extra) for s in raw]) if raw else set()
    arrays: dict[str, Any] = {
        "videos": np.array([s.video for s in raw], dtype=str),
        "durations": np.array([s.duration_s for s in raw], dtype=np.float64),
        "classes": np.array(classes, dtype=str),
        "video": np.repeat(np.arange(len(raw), dtype=np.int32), [len(s) for s in raw]),
        "segments": _joined([s.segments_s for s in raw], torch.zeros(0, 2)).numpy(),
        "labels": _joined([s.labels for s in raw], torch.zeros(0, dtype=torch.int64)).numpy().astype(np.int32),
        "scores": _joined([s.scores for s in raw], torch.zeros(0)).numpy(),
        **{f"extra/{name}": torch.cat([s.extra[name] for s in raw]).numpy() for name in sorted(extras)},
    }
    write_atomic(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def load_raw(path: str | Path) -> tuple[list[Segments], list[str]]:
    """Decoded segments by video, and the classes. Raises :class:`RecipeError` when the file is not one of ours."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            data = {name: file[name] for name in file.files}
        videos, classes = data["videos"].tolist(), data["classes"].tolist()
        bounds = np.searchsorted(data["video"], np.arange(len(videos) + 1))
        durations = data.pop("durations", np.full(len(videos), np.nan)).tolist()  # absent in files of tad 0.1
        tensors = {name: torch.from_numpy(data[name]) for name in data if name not in ("videos", "classes", "video")}
        result = []
        for index, video in enumerate(videos):
            part = {name: value[bounds[index] : bounds[index + 1]] for name, value in tensors.items()}
            segments, labels, scores = part.pop("segments"), part.pop("labels").long(), part.pop("scores")
            extra = {name.removeprefix("extra/"): value for name, value in part.items()}
            result.append(Segments(video, segments, labels, scores, extra, durations[index]))
    except (OSError, ValueError, TypeError, LookupError, BadZipFile) as error:
        raise RecipeError(
            f"{path} does not hold raw detections ({error}); write it with detect(..., raw_out=...)"
        ) from error
    return result, classes


def _raw_path(raw_out: str | Path) -> Path:
    path = Path(raw_out)
    if path.suffix != ".npz":
        raise RecipeError(f"raw_out {path} must end in .npz")
    return path


def _wanted(
    run: Run,
    store: Store,
    videos: Sequence[str] | None,
    subset: str | None,
    annotations: Truth | str | Path | None,
) -> tuple[list[str], list[Failure]]:
    have = {stream: set(store.videos(stream)) for stream in run.features}
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


def _joined(parts: list[Tensor], empty: Tensor) -> Tensor:
    return torch.cat([empty, *parts])
