"""A store: damage, coverage of the annotated videos and seconds, fit with a run."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from tad.annotations import Truth
from tad.doctor.checks import Check, some
from tad.errors import StoreError

if TYPE_CHECKING:
    from tad.detect.runs import Run
    from tad.store import Store

GROUP = "store"


def check_store(store: Store) -> list[Check]:
    """Entries that are damaged or left unfinished, streams that do not hold the same videos."""
    streams = store.streams()
    if not streams:
        return [Check(GROUP, "content", "fail", f"{store.path} holds no stream", "extract some: tad extract --help")]
    report = store.verify()
    counts = {stream: len(store.videos(stream)) for stream in streams}
    text = ", ".join(f"{stream} {count} videos" for stream, count in counts.items())
    checks = [Check(GROUP, "content", "ok" if all(counts.values()) else "warn", text)]
    if report.problems:
        where = [f"{stream}/{video}: {what}" for stream, video, _, what in report.problems]
        text = f"{len(where)} entries are damaged: {some(where)}"
        checks.append(Check(GROUP, "damage", "fail", text, "tad extract makes them again"))
    else:
        text = f"{report.checked} entries whole"
        checks.append(Check(GROUP, "damage", "ok", text, "tad store verify --deep reads every value too"))
    everywhere = set.intersection(*(set(store.videos(stream)) for stream in streams))
    for stream in streams:
        extra = sorted(set(store.videos(stream)) - everywhere)
        if extra and len(streams) > 1:
            text = f"{len(extra)} videos of {stream} are not in every stream: {some(extra)}"
            checks.append(Check(GROUP, "streams", "note", text, "a detector on several streams leaves them out"))
    return checks


def check_coverage(store: Store, truth: Truth) -> list[Check]:
    """Ids on one side only, durations that differ, segments behind the last row, segments shorter than a row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged entries, which check_store reports
        catalog = store.catalog()
    checks: list[Check] = []
    for stream in store.streams():
        part = catalog[catalog["stream"] == stream].drop_duplicates("video").set_index("video")
        checks += _ids(stream, part, truth)
        part = part[part.index.isin(truth.videos["video"])]
        if len(part):
            checks += _times(stream, part, truth)
    return checks


def _ids(stream: str, part: pd.DataFrame, truth: Truth) -> list[Check]:
    annotated, held = truth.videos["video"].tolist(), set(part.index)
    lacking = [video for video in annotated if video not in held]
    extra = sorted(held - set(annotated))
    if not held & set(annotated):
        text = f"none of the {len(annotated)} annotated videos is in {stream} ({some(annotated)} against {some(extra)})"
        return [Check(GROUP, "ids", "fail", text, "do the ids differ by a prefix such as v_?")]
    checks = []
    if lacking:
        by_subset = truth.videos[truth.videos["video"].isin(lacking)]["subset"].value_counts()
        counts = ", ".join(f"{name or 'no subset'} {count}" for name, count in by_subset.items())
        text = f"{len(lacking)} of {len(annotated)} annotated videos are not in {stream} ({counts}): {some(lacking)}"
        checks.append(Check(GROUP, "ids", "warn", text, "a missing test video counts as one with no detection"))
    else:
        checks.append(Check(GROUP, "ids", "ok", f"{stream} has features of all {len(annotated)} annotated videos"))
    if extra:
        text = f"{len(extra)} videos of {stream} are not annotated: {some(extra)}"
        checks.append(Check(GROUP, "ids extra", "note", text))
    return checks


def _times(stream: str, part: pd.DataFrame, truth: Truth) -> list[Check]:
    checks = []
    stored = part["duration_s"]
    known = truth.videos.set_index("video")["duration_s"].reindex(part.index)
    off = (stored - known).abs() > np.maximum(1.0, 0.02 * known)
    if off.any():
        pairs = zip(part.index[off], stored[off], known[off], strict=True)
        cases = [f"{video} {here:.1f} s against {there:.1f} s" for video, here, there in pairs]
        text = f"{len(cases)} videos of {stream} last longer or shorter than the annotations say: {some(cases)}"
        checks.append(
            Check(GROUP, "durations", "warn", text, "another cut, or a wrong --fps at import? segments would drift")
        )
    rates = truth.videos.set_index("video")["fps"].reindex(part.index)
    if "fps" in part and part["fps"].notna().any():
        ratio = (part["fps"] / rates).dropna()
        if len(ratio) and (ratio.round(3) != 1).any() and off.any():
            text = f"{stream} was made at {part['fps'].median():g} fps, the annotations speak of {rates.median():g}"
            checks.append(Check(GROUP, "fps", "note", text))
    segments = truth.segments[truth.segments["video"].isin(part.index)]
    if segments.empty:
        checks.append(Check(GROUP, "coverage", "note", f"no video of {stream} has a segment: nothing to cover"))
        return checks
    rows = part.loc[segments["video"]]
    end_s = (
        rows["translation_s"] + (rows["rows"] - 1) * rows["scale_s"] + 0.5 * rows[["window_s", "scale_s"]].max(axis=1)
    )
    outside = segments["start_s"].to_numpy() >= end_s.to_numpy()
    if outside.any():
        beyond = segments[outside]
        text = f"{len(beyond)} segments begin behind the last row of {stream}: {some(sorted(set(beyond['video'])))}"
        checks.append(Check(GROUP, "coverage", "warn", text, "nothing can be found there; are the features cut short?"))
    else:
        checks.append(Check(GROUP, "coverage", "ok", f"rows of {stream} reach all {len(segments)} segments"))
    length = segments["end_s"].to_numpy() - segments["start_s"].to_numpy()
    tiny = length < rows["scale_s"].to_numpy()
    if tiny.any():
        share = float(tiny.mean())
        row_s = rows["scale_s"].median()
        text = f"{int(tiny.sum())} segments ({share:.1%}) are shorter than a row of {stream} ({row_s:.2f} s)"
        advice = "a smaller --stride finds them; at high tIoU they are lost" if share > 0.02 else ""
        checks.append(Check(GROUP, "tiny segments", "warn" if share > 0.02 else "note", text, advice))
    return checks


def check_streams_of_run(run: Run, store: Store) -> list[Check]:
    """Whether the store holds the features that a run was trained on."""
    from tad.detect.infer import check_same_features

    try:
        check_same_features(run, store)
    except StoreError as error:
        return [Check("run", "features", "fail", str(error))]
    return [Check("run", "features", "ok", f"{store.path} holds the streams that the run was trained on")]
