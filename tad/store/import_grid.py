"""Where the rows of imported files lie in time: one frame grid for all, shares of durations, or what an export said."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tad.errors import StoreError
from tad.store.export_index import INDEX
from tad.store.feature_files import FeatureFile, Unreadable
from tad.timeline import TimeAxis

ROWS_OFF = 2  # rows by which a sequence may differ from what its duration promises


@dataclass(frozen=True)
class Grid:
    """Where the rows of all imported files lie; ``indexed``: each where its row of ``index.json`` says."""

    fps: float | None
    window: float | None
    stride: float | None
    offset: float
    rescaled: bool
    durations: Mapping[str, float]
    indexed: bool = False

    def spec(self) -> dict[str, Any]:
        numbers = {"fps": self.fps, "window": self.window, "stride": self.stride, "offset": self.offset}
        return {
            "imported": True,
            **{k: None if v is None else float(v) for k, v in numbers.items()},
            "rescaled": self.rescaled,
            **({"indexed": True} if self.indexed else {}),
        }

    def __post_init__(self) -> None:
        numbers = {"fps": self.fps, "window": self.window, "stride": self.stride}
        for name, value in numbers.items():
            if value is None and not self.rescaled and not self.indexed:
                raise StoreError(
                    f"{name} is needed: fps, window and stride say where the rows lie in time "
                    "(or say rescaled, and give durations)"
                )
            if value is not None and not 0 < value < math.inf:
                raise StoreError(f"{name} must be a positive number, got {value}")
        if not math.isfinite(self.offset):
            raise StoreError(f"offset must be a finite number of frames, got {self.offset}")

    def frames(self) -> tuple[float, float, float]:
        assert self.fps is not None
        assert self.window is not None
        assert self.stride is not None
        return self.fps, self.window, self.stride

    def axis(self, file: FeatureFile, video: str, rows: int) -> tuple[TimeAxis, float]:
        """The axis of a video with ``rows`` rows, and its duration in seconds; ``Unreadable`` where they make none."""
        known = self.durations.get(video)
        if known is not None and not 0 < known < math.inf:
            raise Unreadable(f"its duration is given as {known} seconds")
        if self.indexed:
            if file.listed is None:
                raise Unreadable(
                    f"{INDEX} does not tell its time axis; give fps, window and stride, or export it again"
                )
            return file.listed.axis, file.listed.duration_s if known is None else float(known)
        if self.rescaled:
            if known is None:
                raise Unreadable("rescaled features need the duration of their video, and none is given for this one")
            return TimeAxis.rescaled(rows=rows, duration_s=float(known)), float(known)
        fps, window, stride = self.frames()
        axis = TimeAxis.from_frames(fps=fps, window_frames=window, stride_frames=stride, offset_frames=self.offset)
        duration_s = float(known) if known is not None else (self.offset + (rows - 1) * stride + window) / fps
        if not 0 < duration_s < math.inf:
            raise Unreadable(
                f"has {rows} rows, which end at {duration_s} seconds: check offset, fps, window and stride"
            )
        return axis, duration_s

    def frame_numbers(self, file: FeatureFile) -> tuple[float | None, float | None, float | None]:
        """Stride, window and frame rate that are recorded with a level; None where they do not apply."""
        if self.indexed:
            return (None, None, None) if file.listed is None else file.listed.frames
        return (None, None, None) if self.rescaled else (self.stride, self.window, self.fps)

    def expected_rows(self, video: str) -> float | None:
        """Rows that the given duration promises, at least 1; None where nothing promises anything."""
        known = self.durations.get(video)
        if self.rescaled or self.indexed or known is None:
            return None
        fps, window, stride = self.frames()
        return max(1.0, (known * fps - self.offset - window) / stride + 1)
