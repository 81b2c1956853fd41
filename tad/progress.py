"""Progress on stderr: a bar with the remaining time on a terminal, a plain line now and then elsewhere.

Long functions take a ``progress`` argument of type :class:`ProgressFactory`; ``None`` means silence, and
:func:`progress` is the one that the command line passes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO


class Progress(Protocol):
    """What a long loop calls: ``advance(1)`` an item, or ``advance(seconds)`` of video; the note is the latest news."""

    def advance(self, n: float = 1.0, note: str = "") -> None: ...


class ProgressFactory(Protocol):
    """Makes the progress of one loop: ``with factory(120, "epoch 3", "videos") as bar: bar.advance()``."""

    def __call__(self, total: float, label: str, unit: str) -> AbstractContextManager[Progress]: ...


@contextmanager
def progress(
    total: float,
    label: str,
    unit: str,
    *,
    quiet: bool = False,
    interval_s: float = 30.0,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """Show how far a loop of ``total`` units is and how long the rest will take.

    Parameters
    ----------
    total : the amount of work, in ``unit`` (may be a float, such as seconds of video; 0 is allowed).
    label, unit : what is done and what is counted, such as ``"detect"`` and ``"videos"``.
    quiet : print nothing.
    interval_s : without a terminal, print at most one line in this many seconds, and always a last one.
    stream : where to, default stderr.
    clock : seconds that only grow; for tests.
    """
    out = sys.stderr if stream is None else stream
    if quiet:
        yield _Silent()
    elif out.isatty() and os.environ.get("TERM") != "dumb":
        with _bar(total, label, unit, out) as bar:
            yield bar
    else:
        lines = _Lines(total, label, unit, interval_s, out, clock)
        try:
            yield lines
        except BaseException:
            lines.close("stopped at ")
            raise
        lines.close("")


def silent(total: float, label: str, unit: str) -> AbstractContextManager[Progress]:
    """The :class:`ProgressFactory` that shows nothing: what ``progress=None`` stands for."""
    return progress(total, label, unit, quiet=True)


def duration_text(seconds: float) -> str:
    """``59s``, ``2m05s``, ``3h07m``: short enough for one line."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(whole / 60)
    return f"{minutes // 60}h{minutes % 60:02d}m"


class _Silent:
    def advance(self, n: float = 1.0, note: str = "") -> None:
        pass


class _Lines:
    """One line now and then: done/total, rate, remaining time, note."""

    def __init__(
        self, total: float, label: str, unit: str, interval_s: float, out: TextIO, clock: Callable[[], float]
    ) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.interval_s, self.out, self.clock = interval_s, out, clock
        self.done, self.note = 0.0, ""
        self.begin = self.shown = clock()

    def advance(self, n: float = 1.0, note: str = "") -> None:
        self.done += n
        self.note = note or self.note
        now = self.clock()
        if now - self.shown >= self.interval_s:
            self.shown = now
            left = self.total - self.done
            rest = (
                f", {duration_text((now - self.begin) / self.done * left)} left" if self.done > 0 and left > 0 else ""
            )
            self._print("", rest, now)

    def close(self, prefix: str) -> None:
        now = self.clock()
        self._print(prefix, f", took {duration_text(now - self.begin)}", now)

    def _print(self, prefix: str, suffix: str, now: float) -> None:
        seconds = now - self.begin
        rate = f", {self.done / seconds:.3g} {self.unit}/s" if seconds > 0 and self.done > 0 else ""
        note = f", {self.note}" if self.note else ""
        counted = _counted(self.done, self.total, self.unit)
        print(f"{self.label}: {prefix}{counted}{rate}{suffix}{note}", file=self.out, flush=True)


@contextmanager
def _bar(total: float, label: str, unit: str, out: TextIO) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import (
        Progress as RichProgress,
    )

    class _Bar:
        done = 0.0

        def __init__(self, rich: RichProgress, task: TaskID) -> None:
            self.rich, self.task = rich, task

        def advance(self, n: float = 1.0, note: str = "") -> None:
            self.done += n
            self.rich.update(self.task, advance=n, counted=_counted(self.done, total, unit))
            if note:
                self.rich.update(self.task, note=note)

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[counted]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with RichProgress(*columns, console=Console(file=out)) as rich:
        task = rich.add_task(label, total=total, counted=_counted(0, total, unit), note="")
        yield _Bar(rich, task)


def _counted(done: float, total: float, unit: str) -> str:
    return f"{_number(done)}/{_number(total)} {unit}"


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:.1f}"
