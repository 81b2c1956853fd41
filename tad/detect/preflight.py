"""What a training will see, settled before it begins: subsets, held-out videos, classes, and every video read once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from tad.annotations import TRAIN_NAMES, Truth
from tad.annotations import training_subset as usual_subset
from tad.detect.align import Sample, feature_of
from tad.detect.data import CACHE_BYTES, RowTruth, row_truth
from tad.detect.interface import LevelSpec
from tad.detect.windows import (
    cuts_maps,
    detection_stride_fits,
    never_inside,
    open_whole,
    read_through,
    read_whole,
    training_starts,
)
from tad.errors import RecipeError, StoreError, did_you_mean
from tad.progress import ProgressFactory
from tad.recipe import DataRecipe, DetectRecipe
from tad.store import Feature, Store

SHOWN = 5  # names of a list that a message spells out


@dataclass(frozen=True)
class Failure:
    """A video that could not be used, and why."""

    video: str
    error: str
    message: str

    def __str__(self) -> str:
        return f"{self.video}: {self.message}"


@dataclass(frozen=True)
class Plan:
    """Which videos train, which choose the checkpoint, what there is to find; from annotations and metadata alone."""

    classes: list[str]
    train: list[str]
    holdout: list[str]
    segments: dict[str, tuple[np.ndarray, np.ndarray]]  # video -> seconds (N, 2), class indices (N,)
    holdout_truth: pd.DataFrame  # as tad.evaluate reads it
    durations_s: dict[str, float]  # of the annotations
    channels: dict[str, int]  # stream -> C
    failures: list[Failure]
    messages: list[str]
    shapes: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)  # stream -> level -> of a row

    def lengths_rows(self, store: Store, streams: Sequence[str], row_spacing: int) -> np.ndarray:
        """Lengths of all training segments in rows of the first stream, without reading any feature."""
        lengths = [np.zeros(0)]
        for video in self.train:
            seconds = self.segments[video][0]
            for feature in _stored(store, [LevelSpec(streams[0])], video):
                lengths.append((seconds[:, 1] - seconds[:, 0]) / feature.axis.pooled(row_spacing).scale_s)
        joined = np.concatenate(lengths)
        return joined[joined > 0]


@dataclass(frozen=True)
class TrainingSet:
    """Every training and held-out video after it was read once: truth in rows, and the rows where they fit."""

    train: dict[str, RowTruth]  # in the order of Plan.train
    holdout: list[str]
    cache: dict[str, Sample]  # video -> rows, of all videos or of none
    failures: list[Failure]
    messages: list[str]
    counts: dict[str, int] = field(default_factory=dict)
    starts: dict[str, list[int | None]] = field(default_factory=dict)  # video -> where its training windows begin

    def without(self, failures: Sequence[Failure]) -> TrainingSet:
        """What is left when these videos cannot be used either."""
        if not failures:
            return self
        lost = {failure.video for failure in failures}
        train = {video: truth for video, truth in self.train.items() if video not in lost}
        holdout = [video for video in self.holdout if video not in lost]
        counts = self.counts | {"train_videos": len(train), "holdout_videos": len(holdout)}
        counts["segments"] = sum(len(truth.labels) for truth in train.values())
        counts["broken_videos"] = counts.get("broken_videos", 0) + len(lost)
        if "windows" in counts:
            counts["windows"] = sum(len(self.starts[video]) for video in train)
        if not train or (self.holdout and not holdout):
            raise StoreError(f"no {'held-out' if train else 'training'} video is left; the first says: {failures[0]}")
        if counts["segments"] == 0 or counts.get("windows") == 0:
            raise StoreError(f"no training video with segments is left; the first says: {failures[0]}")
        return replace(self, train=train, holdout=holdout, failures=[*self.failures, *failures], counts=counts)

    def holdout_truth(self, plan: Plan) -> pd.DataFrame:
        """The segments of the held-out videos that can be read, as :mod:`tad.evaluate` takes them."""
        return plan.holdout_truth[plan.holdout_truth["video"].isin(self.holdout)]


def check_streams(store: Store, streams: Sequence[str]) -> None:
    """Raise :class:`StoreError` naming the streams that the store does not have."""
    have = store.streams()
    for stream in streams:
        if stream not in have:
            hint = did_you_mean(stream, have) or " It has no streams at all."
            raise StoreError(f"store {store.path} has no stream '{stream}'.{hint}")


def plan_training(recipe: DetectRecipe, store: Store, truth: Truth) -> Plan:
    """Decide on videos and classes.

    The training subset is ``data.train_subset``, else the first of training, train, validation, val that the
    annotations have. The held-out videos are those of ``data.holdout_subset``, else the ``data.holdout`` part of the
    training videos that comes first by SHA-256 of seed and id: adding a video moves few others.

    Raises
    ------
    StoreError : a stream is missing, or none of the videos has features.
    RecipeError : no subset to train on, no segments in it, nothing held out though the checkpoint is chosen by mAP.
    AnnotationError : a subset that the annotations do not have.
    """
    check_streams(store, recipe.streams)
    name = training_subset(truth, recipe.data.train_subset)
    subset = truth if name is None else truth.subset(name)
    named = "the annotations" if name is None else f"subset '{name}'"
    videos = sorted(map(str, subset.videos["video"]))
    have = {stream: set(store.videos(stream)) for stream in recipe.streams}
    present, failures = with_features(videos, have)
    if not present:
        raise StoreError(no_video_message(videos, have, store, named))
    messages = [*truth.notes, f"{named}: {len(videos)} videos, {len(present)} with features"]
    holdout_name = recipe.data.holdout_subset
    if holdout_name is not None:
        held = truth.subset(holdout_name)
        listed = sorted(map(str, held.videos["video"]))
        holdout, failed = with_features(listed, have)
        if set(holdout) & set(present):
            raise RecipeError(
                f"data.holdout_subset '{holdout_name}' shares videos with {named}, "
                f"such as {shown(sorted(set(holdout) & set(present)))}; choose another, or set data.holdout instead"
            )
        train, failures = present, failures + failed
        messages.append(f"held out: subset '{holdout_name}', {len(listed)} videos, {len(holdout)} with features")
    else:
        held = subset
        train, holdout = split_holdout(present, part=recipe.data.holdout, seed=recipe.seed)
        messages.append(f"held out: {len(holdout)} of these (data.holdout={recipe.data.holdout}, seed {recipe.seed})")
    classes = sorted(set(map(str, subset.segments.loc[subset.segments["video"].isin(present), "label"])))
    if not classes:
        raise RecipeError(f"no segments in the {len(present)} videos with features of {named}: nothing to learn")
    holdout_truth = held.segments[held.segments["video"].isin(holdout)].reset_index(drop=True)
    if recipe.train.select == "map" and holdout_truth.empty:
        reason = "holds no segments" if holdout else "is empty"
        raise RecipeError(
            f"train.select=map chooses the checkpoint by mAP on held-out videos, but what is held out {reason}: "
            "raise data.holdout, name a data.holdout_subset, or set train.select=last"
        )
    unseen = sorted(set(map(str, holdout_truth["label"])) - set(classes))
    if unseen:
        messages.append(f"classes of held-out videos that no training video has, they count as missed: {shown(unseen)}")
    trained = set(subset.segments.loc[subset.segments["video"].isin(train), "label"].astype(str))
    if set(classes) - trained:
        messages.append(f"classes that only held-out videos have: {shown(sorted(set(classes) - trained))}")
    learnt = subset.segments[subset.segments["video"].isin(train)]
    long_enough = learnt["end_s"] - learnt["start_s"] > recipe.data.longer_than_s
    if not long_enough.all() and recipe.data.longer_than_s:
        if not long_enough.any():
            raise RecipeError(f"none of the {len(learnt)} training segments lasts longer than data.longer_than_s")
        short = int((~long_enough).sum())
        messages.append(f"{short} training segments do not last data.longer_than_s and are left out")
        learnt = learnt[long_enough]
    stored = _first_stored(store, recipe.streams, present)
    return Plan(
        classes=classes,
        train=train,
        holdout=holdout,
        segments=_by_video(learnt, train, classes),
        holdout_truth=holdout_truth,
        durations_s=dict(zip(truth.videos["video"].astype(str), truth.videos["duration_s"].astype(float), strict=True)),
        channels={feature.stream: int(feature.shape[1]) for feature in stored},
        failures=failures,
        messages=messages,
        shapes={f.stream: {level["path"]: tuple(level["shape"][1:]) for level in f.attrs["levels"]} for f in stored},
    )


def training_subset(truth: Truth, wanted: str | None) -> str | None:
    """The subset to train on, see :func:`plan_training`; None is all videos, where the annotations name no subsets."""
    if wanted is not None or not truth.subsets:
        return wanted
    found = usual_subset(truth)
    if found is not None:
        return found
    raise RecipeError(
        f"annotations {truth.path} have no subset called {', '.join(TRAIN_NAMES)}, but: {', '.join(truth.subsets)}; "
        "name the one to train on: data.train_subset"
    )


def split_holdout(videos: Sequence[str], *, part: float, seed: int) -> tuple[list[str], list[str]]:
    """Sorted (training, held-out) videos; at least one on each side when ``part`` > 0."""
    if part == 0:
        return sorted(videos), []
    if len(videos) < 2:
        raise RecipeError(
            f"data.holdout={part} needs two videos, there is {len(videos)}: set data.holdout=0 and train.select=last"
        )
    ranked = sorted(videos, key=lambda video: hashlib.sha256(f"{seed}:{video}".encode()).digest())
    count = min(max(1, round(part * len(videos))), len(videos) - 1)
    return sorted(ranked[count:]), sorted(ranked[:count])


def with_features(videos: Sequence[str], have: Mapping[str, set[str]]) -> tuple[list[str], list[Failure]]:
    """Videos that every stream has, and a :class:`Failure` for each of the others."""
    present, failures = [], []
    for video in videos:
        lacking = [stream for stream, known in have.items() if video not in known]
        if lacking:
            failures.append(Failure(video, "StoreError", f"no features in {', '.join(lacking)}"))
        else:
            present.append(video)
    return present, failures


def no_video_message(videos: Sequence[str], have: Mapping[str, set[str]], store: Store, wanted: str) -> str:
    """Why no video can be used, with ids of both sides to compare."""
    if not videos:
        return f"{wanted} has no videos"
    sizes = ", ".join(f"{stream}: {len(known)} videos" for stream, known in have.items())
    stored = sorted(set().union(*have.values()))
    return (
        f"store {store.path} has none of the {len(videos)} videos of {wanted} in all streams ({sizes}). "
        f"Wanted: {shown(videos)}. Stored: {shown(stored) or 'nothing'}. "
        "Do the ids differ by a prefix such as 'v_'? Import the features again with the prefix taken off"
    )


def read_training(
    plan: Plan, recipe: DetectRecipe, store: Store, needs: Sequence[LevelSpec], progress: ProgressFactory
) -> TrainingSet:
    """Read every training and held-out video once: what is broken is left out and listed, what fits is kept in memory.

    Raises
    ------
    StoreError : every training or every held-out video is broken.
    RecipeError : no segment of the training videos lies on any row.
    """
    detection_stride_fits(needs, recipe.data)
    cached = _bytes(plan, store, needs, recipe.data) <= CACHE_BYTES
    piecewise = not cached and cuts_maps(needs)  # a video of these may not fit into memory
    train: dict[str, RowTruth] = {}
    starts: dict[str, list[int | None]] = {}
    holdout: list[str] = []
    cache: dict[str, Sample] = {}
    failures: list[Failure] = []
    interpolated: dict[str, None] = {}
    other_length = cut = in_no_window = 0
    widths: dict[str, int] = {}
    trained = set(plan.train)
    with progress(len(plan.train) + len(plan.holdout), "read features", "videos") as bar:
        for video in [*plan.train, *plan.holdout]:
            bar.advance(1)
            try:
                sample = (open_whole if piecewise else read_whole)(store, needs, video, recipe.data)
                _check_widths(sample, widths)
                if piecewise:
                    read_through(sample)
            except StoreError as error:
                failures.append(Failure(video, type(error).__name__, str(error)))
                continue
            if cached:
                cache[video] = sample
            interpolated.update(dict.fromkeys(sample.interpolated))
            other_length += _lengths_differ(sample.duration_s, plan.durations_s.get(video, float("nan")))
            if video in trained:
                truth = train[video] = row_truth(
                    *plan.segments[video], sample.axis, sample.rows, duration_s=sample.duration_s
                )
                # windows are looked at for their truth alone: cutting them must read nothing
                lengths = {key: np.empty((rows.shape[0], 0), np.float32) for key, rows in sample.features.items()}
                filled = replace(sample, features=lengths, segments=truth.segments, labels=truth.labels)
                starts[video] = training_starts(filled, needs, recipe.data)
                if needs[0].layout == "windowed":
                    in_no_window += never_inside(filled, starts[video], needs, recipe.data)
                cut += needs[0].layout == "full" and sample.rows > recipe.data.max_rows
            else:
                holdout.append(video)
    if not train or (plan.holdout and not holdout):
        raise StoreError(f"no {'held-out' if train else 'training'} video can be read; the first says: {failures[0]}")
    if recipe.train.select == "map" and not set(plan.holdout_truth["video"]) & set(holdout):
        raise StoreError(f"no held-out video with segments can be read; the first says: {failures[0]}")
    counts: dict[str, Any] = {
        "train_videos": len(train),
        "holdout_videos": len(holdout),
        "missing_videos": len(plan.failures),
        "broken_videos": len(failures),
        "classes": len(plan.classes),
        "segments": sum(len(truth.labels) for truth in train.values()),
        "segments_outside": sum(truth.outside for truth in train.values()),
        "segments_empty": sum(truth.empty for truth in train.values()),
        "cut_videos": cut,
    }
    if counts["segments"] == 0:
        raise RecipeError(
            f"none of the {counts['segments_outside'] + counts['segments_empty']} training segments lies on the rows "
            "of its video: are the annotations in seconds, were the features imported with the right fps and stride?"
        )
    messages = []
    if needs[0].layout == "windowed":
        counts["windows"] = sum(map(len, starts.values()))
        messages.append(
            f"{counts['windows']} windows of {needs[0].rows} rows to train on"
            + ("" if recipe.data.empty_windows else ", those without truth left out (data.empty_windows)")
        )
        counts["segments_in_no_window"] = in_no_window
        if in_no_window:
            messages.append(
                f"{in_no_window} of {counts['segments']} segments have less than data.min_inside="
                f"{recipe.data.min_inside:g} of themselves in every window and are not trained on: take longer "
                "windows, or a larger data.row_spacing"
            )
        if counts["windows"] == 0:
            raise RecipeError(
                f"no window of {needs[0].rows} rows holds data.min_inside={recipe.data.min_inside:g} of a segment: "
                "take longer windows, a larger data.row_spacing, or a smaller data.min_inside"
            )
    if interpolated:
        messages.append(
            f"streams on another time axis, interpolated onto the rows of {needs[0].key}: {', '.join(interpolated)}"
        )
    if other_length:
        messages.append(
            f"{other_length} videos last more than 5 % longer or shorter in the annotations than in the store"
        )
    if cut:
        messages.append(
            f"{cut} training videos have more than {recipe.data.max_rows} rows (data.max_rows) and are cut at random"
        )
    messages.append("features are " + ("kept in memory" if cached else "read again every epoch: they exceed 2 GiB"))
    return TrainingSet(train, holdout, cache, failures, messages, counts, starts)


def shown(names: Sequence[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more


def _by_video(
    segments: pd.DataFrame, videos: Sequence[str], classes: Sequence[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    index = {label: i for i, label in enumerate(classes)}
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {v: (np.zeros((0, 2)), np.zeros(0, np.int64)) for v in videos}
    for video, rows in segments[segments["video"].isin(found)].groupby("video", sort=False):
        seconds = rows[["start_s", "end_s"]].to_numpy(np.float64)
        found[str(video)] = (seconds, np.array([index[str(label)] for label in rows["label"]], np.int64))
    return found


def _bytes(plan: Plan, store: Store, needs: Sequence[LevelSpec], data: DataRecipe) -> int:
    """What all videos take in memory once they are read: stored rows as they are, computed ones as float32."""
    total = 0
    for video in [*plan.train, *plan.holdout]:
        for need, feature in zip(needs, _stored(store, needs, video), strict=False):  # none of a broken one
            rows = need.rows if need.layout == "rescaled" else None
            values = int(np.prod(feature.shape[1:])) * (rows or -(-feature.shape[0] // data.row_spacing))
            as_stored = need.shape is not None or (rows is None and data.row_spacing == 1)
            total += values * (feature.dtype.itemsize if as_stored else 4)
    return total


def _stored(store: Store, needs: Sequence[LevelSpec], video: str) -> list[Feature]:
    """The features of one video, none where its metadata is broken: reading it will say so, and it is listed then."""
    try:
        return [feature_of(store, need, video) for need in needs]
    except StoreError:
        return []


def _first_stored(store: Store, streams: Sequence[str], videos: Sequence[str]) -> list[Feature]:
    """What the first video whose metadata can be read has of each stream."""
    for video in videos:
        found = _stored(store, [LevelSpec(stream) for stream in streams], video)
        if found:
            return found
    raise StoreError(
        f"store {store.path}: the metadata of all {len(videos)} training videos is broken; run 'tad store verify'"
    )


def _check_widths(sample: Sample, widths: dict[str, int]) -> None:
    """Every video must have as many channels as the first one."""
    for key, rows in sample.features.items():
        known = widths.setdefault(key, rows.shape[1])
        if rows.shape[1] != known:
            raise StoreError(
                f"stream '{key}' has {rows.shape[1]} channels here and {known} in other videos; extract it again"
            )


def _lengths_differ(stored_s: float, annotated_s: float) -> bool:
    return bool(np.isfinite(annotated_s) and abs(stored_s - annotated_s) > max(1.0, 0.05 * annotated_s))
