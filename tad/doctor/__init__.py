"""What can be wrong before anything expensive starts: with the machine, the truth, the features, a run, the videos."""

from __future__ import annotations

from pathlib import Path

from tad.doctor.checks import Check, Status
from tad.doctor.environment import check_environment

__all__ = ["Check", "Status", "doctor"]


def doctor(
    *,
    store: str | Path | None = None,
    annotations: str | Path | None = None,
    run: str | Path | None = None,
    videos: str | Path | None = None,
) -> list[Check]:
    """Look at the environment and at whatever is given, and at how these fit together.

    Never raises for what it finds: a file that cannot be read is a failed check. The environment is looked at without
    importing anything that may be missing.

    Parameters
    ----------
    store : a feature store. annotations : truth, in any form that :func:`tad.annotations.read_truth` reads.
    run : a detector's run folder. videos : a file, folder or list of videos.
    """
    checks = check_environment(Path(store) if store is not None and "://" not in str(store) else Path())
    if annotations is None and store is None and run is None and videos is None:
        return checks
    from tad.doctor.project import check_project  # needs what the environment may lack

    return checks + check_project(store=store, annotations=annotations, run=run, videos=videos)
