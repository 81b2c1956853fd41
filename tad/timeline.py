"""TimeAxis: the only place where rows, frames and seconds meet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

from tad.errors import StoreError


@dataclass(frozen=True, slots=True)
class TimeAxis:
    """Where the rows of a feature sequence lie in time.

    Row ``i`` is centred at ``translation_s + i * scale_s`` seconds and looks at ``window_s`` seconds around that
    centre.
    ``center_s``, ``row_at``, ``to_rows`` and ``to_seconds`` take floats, NumPy arrays or tensors alike.

    Parameters
    ----------
    scale_s : seconds from one row to the next, > 0.
    translation_s : centre of row 0 in seconds.
    window_s : seconds that one row looks at, >= 0.

    Raises
    ------
    ValueError : a value is not finite, ``scale_s <= 0`` or ``window_s < 0``.
    """

    scale_s: float
    translation_s: float
    window_s: float

    def __post_init__(self) -> None:
        for name in ("scale_s", "translation_s", "window_s"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ValueError(f"TimeAxis.{name} must be finite, got {value}")
        if self.scale_s <= 0 or self.window_s < 0:
            raise ValueError(f"TimeAxis needs scale_s > 0 and window_s >= 0, got {self.scale_s} and {self.window_s}")

    # ---- where an axis comes from --------------------------------------------------------------------------------
    @classmethod
    def from_frames(cls, *, fps: float, window_frames: float, stride_frames: float, offset_frames: float = 0.0) -> Self:
        """Rows made of ``window_frames`` frames every ``stride_frames``, the first window starting at
        ``offset_frames``.

        ``scale_s = stride / fps`` and ``translation_s = (offset + window / 2) / fps``: frame ``k`` fills
        ``[k, k + 1) / fps``, so a window's centre is the middle of the frames that it holds.
        """
        if fps <= 0:
            raise ValueError(f"fps must be positive, got {fps}")
        return cls(stride_frames / fps, (offset_frames + 0.5 * window_frames) / fps, window_frames / fps)

    @classmethod
    def rescaled(cls, *, rows: int, duration_s: float) -> Self:
        """A whole video of ``duration_s`` seconds squeezed into ``rows`` rows of equal length."""
        if rows < 1:
            raise ValueError(f"a rescaled sequence needs at least one row, got {rows}")
        return cls(duration_s / rows, 0.5 * duration_s / rows, duration_s / rows)

    # ---- rows and seconds ----------------------------------------------------------------------------------------
    def center_s(self, row: Any) -> Any:
        """Seconds at the centre of ``row`` (fractional rows allowed)."""
        return self.translation_s + row * self.scale_s

    def row_at(self, time_s: Any) -> Any:
        """The (fractional) row whose centre lies at ``time_s``."""
        return (time_s - self.translation_s) / self.scale_s

    def to_rows(self, segments_s: Any) -> Any:
        """Seconds → row *edges*: row ``i`` fills ``[i, i + 1)``, so that a segment's length in rows is its share of
        rows.

        A segment from the left edge of row 0 to the right edge of row 4 is ``(0, 5)``.
        """
        return self.row_at(segments_s) + 0.5

    def to_seconds(self, segments_rows: Any) -> Any:
        """Row edges → seconds; the inverse of :meth:`to_rows`."""
        return self.center_s(segments_rows - 0.5)

    def span_s(self, row: float) -> tuple[float, float]:
        """Start and end in seconds of what ``row`` looks at."""
        center = self.center_s(row)
        return center - 0.5 * self.window_s, center + 0.5 * self.window_s

    def rows_between(self, start_s: float, end_s: float, *, rows: int) -> slice:
        """The rows whose centres lie in ``[start_s, end_s]``, as a slice of a sequence of ``rows`` rows (may be
        empty). Either end may be infinite; NaN raises :class:`StoreError`.
        """
        if math.isnan(start_s) or math.isnan(end_s):
            raise StoreError(f"rows between {start_s} and {end_s} seconds: NaN is no time; give seconds, or infinity")
        first_at, last_at = (min(max(self.row_at(t), -1.0), float(rows)) for t in (start_s, end_s))
        first = max(0, math.ceil(first_at - 1e-9))
        last = min(rows - 1, math.floor(last_at + 1e-9))
        return slice(first, max(first, last + 1))

    # ---- axes made of axes ---------------------------------------------------------------------------------------
    def shifted(self, rows: float) -> Self:
        """The axis of the same sequence without its first ``rows`` rows (a window cut out of it)."""
        return type(self)(self.scale_s, self.center_s(rows), self.window_s)

    def pooled(self, factor: int) -> Self:
        """The axis after every ``factor`` neighbouring rows became one (mean or max)."""
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
        grown = self.window_s + (factor - 1) * self.scale_s
        return type(self)(self.scale_s * factor, self.center_s(0.5 * (factor - 1)), grown)

    def to_dict(self) -> dict[str, float]:
        """The three numbers, for attributes and JSON."""
        return {"scale_s": self.scale_s, "translation_s": self.translation_s, "window_s": self.window_s}
