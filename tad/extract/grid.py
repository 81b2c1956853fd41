"""Timestamps as files have them → increasing seconds → which decoded frame fills which time of a uniform grid."""

from __future__ import annotations

import math

TIE_S = 1e-7  # distances to a grid time that differ by less are equal: timestamps are sums of rounded fractions
MAX_GAP_S = 600.0  # a longer silence between two frames, past the header's end, is a damaged timestamp


class Clock:
    """Raw timestamps → seconds since the first frame, strictly increasing.

    A timestamp that is missing (NaN, or zero at the end of some AVIs), does not increase, or lies past ``end_s`` and
    more than ten minutes ahead is replaced by the previous one plus ``step_s`` and counted in ``repaired``. Without any
    usable timestamp this counts frames: time = index * step.
    """

    def __init__(self, *, step_s: float, end_s: float = 0.0) -> None:
        self.step_s, self.end_s = step_s, end_s
        self.frames = self.repaired = 0
        self.last_s = 0.0
        self._first = 0.0

    def tick(self, raw_s: float) -> float:
        """Time of the next frame."""
        if self.frames == 0:
            self._first = raw_s if math.isfinite(raw_s) else 0.0
            time_s = 0.0
        else:
            time_s = raw_s - self._first
            if not self.last_s < time_s <= max(self.end_s, self.last_s + MAX_GAP_S):
                time_s = self.last_s + self.step_s
                self.repaired += 1
        self.frames += 1
        self.last_s = time_s
        return time_s

    @property
    def duration_s(self) -> float:
        """The last time plus one frame: the average spacing, or ``step_s`` for a single frame."""
        return self.last_s + (self.last_s / (self.frames - 1) if self.frames > 1 else self.step_s)


class GridPicker:
    """Which decoded frame fills which grid time, decided while frames come: the nearest, of two equally near the first.

    A frame's claim is settled by the frame after it, so a reader holds one frame back. ``finish`` fits the grid to the
    duration: frame ``k`` stands for ``[k, k + 1) / fps`` and is kept when the video covers half of that.
    """

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self.filled = 0  # grid frames that have found their decoded frame
        self._last_s: float | None = None
        self._spacing_s = 0.0

    def advance(self, time_s: float) -> tuple[int, int]:
        """A frame at ``time_s`` (the first at 0) → how many grid frames the one before fills, it fills."""
        before = here = 0
        while (grid_s := self.filled / self.fps) <= time_s:
            if self._last_s is not None and grid_s - self._last_s <= time_s - grid_s + TIE_S:
                before += 1
            else:
                here += 1
            self.filled += 1
        self._spacing_s = 0.0 if self._last_s is None else time_s - self._last_s
        self._last_s = time_s
        return before, here

    def may_want_last(self) -> bool:
        """Whether the last frame will fill the next grid time if the next frame is as far away as the one before was.

        A reader that takes every third frame then need not convert all; where the guess was wrong it has to go back.
        """
        reach_s = max(0.5 * self._spacing_s, self._spacing_s - 0.5 / self.fps) + 0.1 * self._spacing_s
        return self.filled / self.fps - (self._last_s or 0.0) <= reach_s

    def finish(self, duration_s: float) -> tuple[int, int]:
        """The grid's length ``max(1, round(duration * fps))``, and how many more times the last frame is wanted.

        -1 : the last grid frame lies in the final half step and is to be dropped.
        """
        frames = max(1, round(duration_s * self.fps))
        return frames, frames - self.filled
