"""Lint of annotations."""

from __future__ import annotations

import pandas as pd

from tad.annotations import TRAIN_NAMES, Truth, canonical_subset, training_subset
from tad.doctor.checks import Check, some

GROUP = "annotations"
FEW = 5  # training segments that a class should have at least


def check_truth(truth: Truth) -> list[Check]:
    """What a file that can be read may still have wrong; everything is counted and the first cases are named."""
    videos, segments = truth.videos, truth.segments
    subsets = ", ".join(f"{name or 'no subset'} {count}" for name, count in videos["subset"].value_counts().items())
    about = f"{len(videos)} videos ({subsets}), {len(segments)} segments, {len(truth.classes)} classes"
    checks = [Check(GROUP, "content", "ok" if len(segments) else "fail", about)]
    if truth.notes:
        checks.append(Check(GROUP, "notes", "note", "; ".join(truth.notes)))
    if len(segments):
        checks += _segments(truth)
        checks += _classes(truth)
    unknown = videos.loc[videos["duration_s"].isna(), "video"].tolist()
    if unknown:
        text = f"{len(unknown)} videos without a duration: {some(unknown)}"
        checks.append(Check(GROUP, "durations", "note", text, "ends behind the video's end cannot be noticed there"))
    empty = videos.loc[~videos["video"].isin(segments["video"]), "video"].tolist()
    if empty:
        text = f"{len(empty)} videos have no segment: {some(empty)}"
        checks.append(Check(GROUP, "empty videos", "note", text, "they count as background, if that is what they are"))
    return checks


def _segments(truth: Truth) -> list[Check]:
    segments = truth.segments.merge(truth.videos[["video", "duration_s"]], on="video", how="left")
    where = (
        segments["video"]
        + " "
        + segments["start_s"].round(2).astype(str)
        + "–"
        + segments["end_s"].round(2).astype(str)
    )
    behind = segments["end_s"] > segments["duration_s"] + 0.1
    duplicated = segments.duplicated(["video", "start_s", "end_s", "label"])
    same_times = segments.drop_duplicates(["video", "start_s", "end_s", "label"])
    twofold = same_times[same_times.duplicated(["video", "start_s", "end_s"], keep=False)]
    pairs = twofold.groupby(["video", "start_s", "end_s"])["label"].agg(lambda names: " + ".join(sorted(names)))
    point = segments["end_s"] <= segments["start_s"]
    whole = (segments["end_s"] - segments["start_s"]) >= 0.98 * segments["duration_s"]
    overlapping = _overlaps(segments)
    checks = []
    for name, hits, what, advice in (
        ("beyond the end", behind, "end behind their video's end", "another cut of the video, or a wrong duration?"),
        ("duplicates", duplicated, "occur twice", "protocols differ in whether they count; remove them"),
        ("zero length", point, "have no length", "they can never be found; remove them"),
        (
            "same class overlaps",
            overlapping,
            "overlap a segment of the same class",
            "one of the two is likely to be missed",
        ),
    ):
        if hits.any():
            text = f"{int(hits.sum())} segments {what}: {some(where[hits].tolist())}"
            checks.append(Check(GROUP, name, "warn", text, advice))
    if len(pairs):
        kinds = pairs.value_counts()
        text = f"{len(pairs)} segments have two labels or more: {some([f'{k} ({n})' for k, n in kinds.items()])}"
        checks.append(Check(GROUP, "double labels", "note", text, "an ordinary case; class-wise NMS keeps both"))
    if whole.any():
        text = f"{int(whole.sum())} segments cover their whole video: {some(segments.loc[whole, 'video'].tolist())}"
        checks.append(Check(GROUP, "whole video", "note", text))
    if not checks:
        checks.append(
            Check(GROUP, "segments", "ok", "no duplicate, no overlap within a class, none beyond its video's end")
        )
    return checks


def _overlaps(segments: pd.DataFrame) -> pd.Series:
    """Segments that begin before an earlier, different one of the same video and class has ended."""
    ordered = segments.sort_values(["video", "label", "start_s"], kind="stable")
    groups = ordered.groupby(["video", "label"], sort=False)
    before = groups["end_s"].cummax().groupby([ordered["video"], ordered["label"]], sort=False).shift()
    copy = ordered.duplicated(["video", "start_s", "end_s", "label"])
    return ((ordered["start_s"] < before - 1e-6) & ~copy).reindex(segments.index)


def _classes(truth: Truth) -> list[Check]:
    """Classes are learnt from the training subset alone, from all videos where no subsets are named."""
    segments, checks = truth.segments, []
    subset = training_subset(truth)
    if subset is None and truth.subsets:
        text = f"none of the subsets ({some(truth.subsets)}) is called {', '.join(TRAIN_NAMES)}"
        checks.append(Check(GROUP, "training subset", "note", text, "to train on one: data.train_subset"))
    else:
        trains = (
            pd.Series(True, index=segments.index)
            if subset is None
            else segments["subset"].map(canonical_subset) == canonical_subset(subset)
        )
        counts = segments.loc[trains, "label"].value_counts()
        new = sorted(set(segments["label"]) - set(counts.index))
        if new:
            text = f"{len(new)} classes occur outside the training videos (subset {subset!r}) only: {some(new)}"
            checks.append(Check(GROUP, "classes", "warn", text, "they cannot be learnt"))
        rare = [f"{name} ({count})" for name, count in counts[counts < FEW].items()]
        if rare:
            text = f"{len(rare)} classes have fewer than {FEW} training segments: {some(rare)}"
            checks.append(Check(GROUP, "rare classes", "note", text))
    spellings: dict[str, set[str]] = {}
    for name in truth.classes:
        spellings.setdefault("".join(name.lower().split()).replace("_", "").replace("-", ""), set()).add(name)
    twins = [" / ".join(sorted(names)) for names in spellings.values() if len(names) > 1]
    if twins:
        text = f"classes that differ in spelling only: {some(twins)}"
        checks.append(Check(GROUP, "spelling", "warn", text, "one class under two names is learnt half"))
    return checks
