"""Truth, features, run and videos, each alone and against each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tad.annotations import Truth, read_truth
from tad.doctor.checks import Check, some
from tad.doctor.features import check_coverage, check_store, check_streams_of_run
from tad.doctor.truth import check_truth
from tad.errors import TadError

if TYPE_CHECKING:
    from tad.store import Store


def check_project(
    *,
    store: str | Path | None,
    annotations: str | Path | None,
    run: str | Path | None,
    videos: str | Path | None,
) -> list[Check]:
    """See :func:`tad.doctor.doctor`."""
    checks: list[Check] = []
    truth: Truth | None = None
    if annotations is not None:
        with _failing("annotations", "readable", checks):
            truth = read_truth(annotations, beyond_end="keep", keep_ambiguous=True)
            checks += check_truth(truth)
    if videos is not None:
        with _failing("videos", "readable", checks):
            checks += _check_videos(videos, truth)
    if store is None:
        if run is not None:
            with _failing("run", "readable", checks):
                checks += _check_run(run, truth, None)
        return checks
    from tad.store import open_store

    with _failing("store", "readable", checks), open_store(store) as opened:
        checks += check_store(opened)
        if truth is not None:
            checks += check_coverage(opened, truth)
        if run is not None:
            with _failing("run", "readable", checks):
                checks += _check_run(run, truth, opened)
    return checks


@contextmanager
def _failing(group: str, name: str, checks: list[Check]) -> Iterator[None]:
    """Turns an error of tad into a failed check."""
    try:
        yield
    except TadError as error:
        checks.append(Check(group, name, "fail", str(error)))


def _check_run(path: str | Path, truth: Truth | None, store: Store | None) -> list[Check]:
    from tad.detect.runs import Run

    run = Run.load(path)
    state = "finished" if run.finished else "not finished"
    advice = "" if run.finished else "go on with tad train-detector ... --resume"
    about = f"{run.recipe.detector} on {', '.join(run.recipe.streams)}, {len(run.classes)} classes, {state}"
    checks = [Check("run", "state", "ok" if run.finished else "warn", about, advice)]
    if truth is not None:
        unknown = sorted(set(truth.classes) - set(run.classes))
        never = sorted(set(run.classes) - set(truth.classes))
        if unknown:
            text = f"{len(unknown)} classes of the annotations were not trained: {some(unknown)}"
            checks.append(Check("run", "classes", "warn", text, "their segments can only be missed; train again"))
        elif never:
            checks.append(Check("run", "classes", "note", f"{len(never)} trained classes do not occur: {some(never)}"))
        else:
            checks.append(Check("run", "classes", "ok", f"the same {len(run.classes)} classes as the annotations"))
    return checks + ([] if store is None else check_streams_of_run(run, store))


def _check_videos(videos: str | Path, truth: Truth | None) -> list[Check]:
    """Whether every file opens, and whether files and annotations name the same videos and durations."""
    from tad.extract.inputs import find_videos
    from tad.extract.video import probe

    files = find_videos([videos])
    broken, drift = [], []
    known = {} if truth is None else truth.videos.set_index("video")["duration_s"].to_dict()
    for file in files:
        try:
            info = probe(file.path)
        except TadError as error:
            broken.append(str(error))
            continue
        annotated, header = known.get(file.video), info.header_duration_s
        if annotated == annotated and annotated and header and abs(header - annotated) > max(1.0, 0.02 * annotated):
            drift.append(f"{file.video} {header:.1f} s against {annotated:.1f} s")
    checks = [Check("videos", "readable", "ok", f"{len(files) - len(broken)} of {len(files)} videos can be opened")]
    if broken:
        checks[0] = Check(
            "videos", "readable", "warn", f"{len(broken)} of {len(files)} cannot be opened: {some(broken)}"
        )
    if drift:
        text = f"{len(drift)} files last longer or shorter than the annotations say: {some(drift)}"
        checks.append(Check("videos", "durations", "warn", text, "another cut of the video? segments would be shifted"))
    if truth is not None:
        ids = {file.video for file in files}
        lacking = [video for video in truth.videos["video"] if video not in ids]
        extra = sorted(ids - set(truth.videos["video"]))
        if lacking:
            text = f"{len(lacking)} annotated videos have no file: {some(lacking)}"
            checks.append(Check("videos", "files", "warn", text, "a file's name without suffix must be the video's id"))
        if extra:
            checks.append(
                Check("videos", "files extra", "note", f"{len(extra)} files are not annotated: {some(extra)}")
            )
    return checks
