"""One video's rows of one stream: frames in, windows through the network, levels out."""

from __future__ import annotations

import numpy as np
import torch

from tad.extract.snippets import FrameBuffer, LevelTiler, joined
from tad.extract.streams import Stream
from tad.store import Level
from tad.timeline import TimeAxis


class StreamRows:
    """Frames (n, H, W, C) uint8 in, in order; ``batch`` windows go through the network of ``stream`` at a time."""

    def __init__(self, stream: Stream, *, batch: int) -> None:
        self.stream = stream
        self.buffer = FrameBuffer(stream.plan, batch=batch, device=stream.device)
        self.rows: list[torch.Tensor] = []
        self.tilers = {level: LevelTiler(stream.plan, stride) for level, stride in stream.sequences.items()}

    @property
    def frames(self) -> int:
        """Frames pushed so far."""
        return self.buffer.frames

    def push(self, frames: np.ndarray) -> None:
        """The windows that these frames complete."""
        for windows in self.buffer.push(torch.from_numpy(frames)):
            self._run(windows)

    def finish(self) -> None:
        """The windows at the video's end."""
        for windows in self.buffer.finish():
            self._run(windows)

    def _run(self, windows: torch.Tensor) -> None:
        with torch.inference_mode():
            outputs = self.stream.run(windows)
        self.rows.append(outputs["features"])  # (B, D), or (B, C, H, W) of raw frames
        for level, tiler in self.tilers.items():
            tiler.push(outputs[level])

    def levels(self, fps: float) -> dict[str, Level]:
        """Everything that the store takes of the video, after :meth:`finish`; to be called once."""
        plan, frames = self.stream.plan, self.frames
        features = joined(self.rows).numpy()  # (rows, D)
        levels = {"features": level_of(features, plan.axis(fps), fps, plan.stride, plan.span, frames)}
        for name, tiler in self.tilers.items():
            step = tiler.step_frames
            axis = TimeAxis.from_frames(fps=fps, window_frames=step, stride_frames=step)
            levels[name] = level_of(tiler.finish(frames).numpy(), axis, fps, step, step, frames)
        return levels


def level_of(array: np.ndarray, axis: TimeAxis, fps: float, stride: int, window: int, frames: int) -> Level:
    """An array with everything that the store records of its time axis."""
    return Level(array=array, axis=axis, stride_frames=stride, window_frames=window, fps=fps, num_frames_used=frames)
