"""Snippets: which frames stand behind which row, and how windows are cut out of a stream of frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tad.errors import RecipeError
from tad.timeline import TimeAxis


@dataclass(frozen=True)
class SnippetPlan:
    """Windows of ``window`` frames, ``interval`` frames apart, one window every ``stride`` frames.

    A window spans ``(window - 1) * interval + 1`` frames. The last windows repeat the last frame, so that every
    frame lies in
    a window: ``rows(frames) = max(1, ceil((frames - span) / stride) + 1)``.
    """

    window: int
    interval: int
    stride: int

    def __post_init__(self) -> None:
        if min(self.window, self.interval, self.stride) < 1:
            raise RecipeError(
                f"window, interval and stride must be at least 1, got {self.window}, {self.interval}, {self.stride}"
            )

    @property
    def span(self) -> int:
        """Frames from a window's first to its last, both included."""
        return (self.window - 1) * self.interval + 1

    def rows(self, frames: int) -> int:
        """Feature rows of a video of ``frames`` frames (on the grid of the recipe's fps)."""
        return max(1, -(-(frames - self.span) // self.stride) + 1)

    def axis(self, fps: float) -> TimeAxis:
        """The time axis of the rows."""
        return TimeAxis.from_frames(fps=fps, window_frames=self.span, stride_frames=self.stride)

    def offsets(self) -> Tensor:
        """Frame offsets of one window's frames from its first, (window,)."""
        return torch.arange(self.window) * self.interval

    def check_level(self, name: str, stride: int) -> None:
        """Refuse a recipe whose windows do not tile a level of ``stride`` frames a position.

        Raises
        ------
        RecipeError : window or stride is no multiple of the level's stride, or windows leave gaps.
        """
        step = stride * self.interval
        if self.window % stride or self.stride % step or self.stride > self.window * self.interval:
            raise RecipeError(
                f"level {name} has one position every {step} frames, which windows of {self.window} frames every "
                f"{self.stride} frames do not tile: take a --window that is a multiple of {stride} and a --stride that "
                f"is a multiple of {step} and at most {self.window * self.interval}"
            )


class FrameBuffer:
    """The frames that coming windows still need, as uint8 on the device; frames go in, batches of windows come out.

    Holds at most the frames of one batch of windows and one pushed chunk, whatever the video's length.
    """

    def __init__(self, plan: SnippetPlan, *, batch: int, device: torch.device | str = "cpu") -> None:
        self.plan, self.batch, self.device = plan, batch, torch.device(device)
        self.frames = 0  # frames pushed so far
        self._start = 0  # frame number of the first row of _held
        self._next = 0  # the next window
        self._held: Tensor | None = None  # (n, H, W, C) uint8

    def push(self, frames: Tensor) -> Iterator[Tensor]:
        """Take (n, H, W, C) frames, give every full batch of windows (B, T, H, W, C) that they complete."""
        frames = frames.to(self.device, non_blocking=True)
        self._held = frames if self._held is None else torch.cat([self._held, frames])
        self.frames += frames.shape[0]
        while self.frames >= (self._next + self.batch - 1) * self.plan.stride + self.plan.span:
            yield self._take(self.batch)

    def finish(self) -> Iterator[Tensor]:
        """The windows that are left, the last ones completed by repeating the last frame."""
        if self._held is None or self.frames == 0:
            return
        left = self.plan.rows(self.frames) - self._next
        if left > 0:
            needed = (self._next + left - 1) * self.plan.stride + self.plan.span
            if needed > self.frames:
                edge = self._held[-1:].expand(needed - self.frames, *self._held.shape[1:])
                self._held = torch.cat([self._held, edge])
            while left > 0:
                count = min(left, self.batch)
                yield self._take(count)
                left -= count
        self._held = None

    def _take(self, count: int) -> Tensor:
        assert self._held is not None
        first = self._next * self.plan.stride - self._start
        starts = first + torch.arange(count) * self.plan.stride  # (B,)
        index = starts[:, None] + self.plan.offsets()[None, :]  # (B, T)
        windows = self._held[index.to(self.device)]  # (B, T, H, W, C)
        self._next += count
        drop = self._next * self.plan.stride - self._start
        drop = max(0, min(drop, self._held.shape[0] - 1))  # the last frame stays: the end repeats it
        self._held = self._held[drop:].clone()
        self._start += drop
        return windows


class LevelTiler:
    """Joins the stage outputs of overlapping windows into one sequence per level.

    Position ``j`` of a level with ``stride`` frames a position is taken from the window in whose middle it lies, so
    that the
    padding at a window's ends reaches the sequence only at the video's own ends.
    """

    def __init__(self, plan: SnippetPlan, stride: int) -> None:
        self.plan, self.step_frames = plan, stride * plan.interval
        self.per_window = plan.window // stride  # positions of one window
        self.per_step = plan.stride // self.step_frames  # positions from one window to the next
        self.lead = (self.per_window - self.per_step) // 2  # positions of a window that its predecessor gives
        self._parts: list[Tensor] = []
        self._tail: Tensor | None = None

    def push(self, maps: Tensor) -> None:
        """Take the level's positions of the next windows, (B, C, T', ...), in order; maps end in H', W'."""
        stop = self.lead + self.per_step
        for window in maps.movedim(2, 1):  # (T', C, ...)
            start = 0 if not self._parts else self.lead
            self._parts.append(_alone(window[start:stop]))  # (n, C, ...)
        self._tail = _alone(maps[-1].movedim(1, 0)[stop:])

    def finish(self, frames: int) -> Tensor:
        """The whole level, (positions, C, ...): all positions that begin before the video's last frame ends."""
        assert self._tail is not None
        rows = joined([*self._handed_over(), self._tail])
        return rows[: -(-frames // self.step_frames)]

    def _handed_over(self) -> list[Tensor]:
        parts, self._parts = self._parts, []
        return parts


def _alone(rows: Tensor) -> Tensor:
    """A copy, which does not keep the whole batch that it was cut out of in memory."""
    return rows.clone(memory_format=torch.contiguous_format)


def joined(parts: list[Tensor]) -> Tensor:
    """``torch.cat(parts)``; ``parts`` is emptied meanwhile, so that frames and maps are not in memory twice."""
    rows = parts[0].new_empty((sum(len(part) for part in parts), *parts[0].shape[1:]))
    end = len(rows)
    while parts:
        part = parts.pop()
        rows[end - len(part) : end] = part
        end -= len(part)
    return rows
