"""What a check says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "warn", "fail"]
SHOWN = 3  # examples in a message


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes
    ----------
    group : environment, annotations, store, run, videos.
    name : what was looked at, the same in every run, for scripts.
    status : ``ok``; ``note``, worth knowing; ``warn``, results may suffer; ``fail``, it will not work.
    message : what was found, with numbers and examples. advice : what to do, "" where nothing is to be done.
    """

    group: str
    name: str
    status: Status
    message: str
    advice: str = ""


def some(items: Sequence[object]) -> str:
    """The first few of a list, and how many there are."""
    text = ", ".join(str(item) for item in items[:SHOWN])
    return text + (f", ... ({len(items)} in all)" if len(items) > SHOWN else "")


def cannot_look(group: str, error: ImportError | OSError) -> Check:
    """The failed check of something that cannot be opened, or for which a library is missing or broken."""
    if isinstance(error, ImportError):
        text = f"cannot be looked at: {error}"
        return Check(group, "readable", "fail", text, "install it first; the checks of the environment name all")
    return Check(group, "readable", "fail", f"cannot be read: {error}")
