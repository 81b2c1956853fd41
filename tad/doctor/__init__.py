"""What can be wrong before anything expensive starts: with the machine, the truth, the features, a run, the videos."""

from __future__ import annotations

from pathlib import Path

from tad.doctor.checks import Check, Status, cannot_look
from tad.doctor.environment import check_environment
from tad.progress import ProgressFactory

__all__ = ["Check", "Status", "doctor"]


def doctor(
    *,
    store: str | Path | None = None,
    annotations: str | Path | None = None,
    run: str | Path | None = None,
    videos: str | Path | None = None,
    progress: ProgressFactory | None = None,
) -> list[Check]:
    """Look at the environment and at whatever is given, and at how these fit together.

    Never raises for what it finds: a file that cannot be read, or a library that it takes and that is missing, is a
    failed check after those of the environment, which is looked at without importing anything that may be missing.

    Parameters
    ----------
    store : a feature store. annotations : truth, in any form that :func:`tad.annotations.read_truth` reads.
    run : a detector's run folder. videos : a file, folder or list of videos.
    progress : shows how far the opening of many videos is; ``None`` is silence.
    """
    local = None if store is None else str(store).removeprefix("file://")
    checks = check_environment(None if local is None or "://" in local else Path(local))
    given = {"annotations": annotations, "videos": videos, "store": store, "run": run}
    wanted = [group for group, path in given.items() if path is not None]
    if not wanted:
        return checks
    try:
        from tad.doctor.project import check_project  # needs what the environment may lack
    except (ImportError, OSError) as error:
        return checks + [cannot_look(group, error) for group in wanted]
    return checks + check_project(store=store, annotations=annotations, run=run, videos=videos, progress=progress)
