"""Truth, features, run and videos, each alone and against each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tad.annotations import Truth, read_truth
from tad.doctor.checks import Check, cannot_look
from tad.doctor.features import check_coverage, check_store
from tad.doctor.run import check_run
from tad.doctor.truth import check_truth
from tad.doctor.videos import check_videos
from tad.errors import TadError
from tad.progress import ProgressFactory


def check_project(
    *,
    store: str | Path | None,
    annotations: str | Path | None,
    run: str | Path | None,
    videos: str | Path | None,
    progress: ProgressFactory | None,
) -> list[Check]:
    """See :func:`tad.doctor.doctor`."""
    checks: list[Check] = []
    truth: Truth | None = None
    if annotations is not None:
        with _failing("annotations", checks):
            truth = read_truth(annotations, beyond_end="keep")
            checks += check_truth(truth)
    if videos is not None:
        with _failing("videos", checks):
            checks += check_videos(videos, truth, progress=progress)
    run_seen = False
    if store is not None:
        with _failing("store", checks):
            from tad.store import open_store

            with open_store(store) as opened:
                checks += check_store(opened)
                if truth is not None:
                    checks += check_coverage(opened, truth)
                if run is not None:
                    run_seen = True
                    with _failing("run", checks):
                        checks += check_run(run, truth, opened)
    if run is not None and not run_seen:  # without a store, or with one that cannot be opened
        with _failing("run", checks):
            checks += check_run(run, truth, None)
    return checks


@contextmanager
def _failing(group: str, checks: list[Check]) -> Iterator[None]:
    """Turns an error of tad or of the system, and a missing library, into a failed check."""
    try:
        yield
    except TadError as error:
        checks.append(Check(group, "readable", "fail", str(error)))
    except (ImportError, OSError) as error:
        checks.append(cannot_look(group, error))
