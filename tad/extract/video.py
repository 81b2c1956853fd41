"""From a video file to uint8 RGB frames on a uniform time grid, in one pass and in bounded memory.

Grid frame ``k`` is the decoded frame whose timestamp lies nearest to ``k / fps`` (of two equally near the first), so
that files of constant and of variable rate are treated alike and nothing is encoded again. Only what the decoder gives
counts: the header's frame count serves to notice files that are cut off, never as a size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import count, pairwise
from pathlib import Path
from time import perf_counter
from typing import Literal, Self

import cv2
import numpy as np

from tad.errors import RecipeError, VideoError
from tad.extract.decoders import Decoder, checked_path, open_decoder
from tad.extract.grid import Clock, GridPicker

MAX_HEADER_FPS = 240.0  # above it a header usually states a clock (600, 1000, 90000), not a rate: it is measured then
MEASURED_FRAMES = 64


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of itself, and what reads it.

    Attributes
    ----------
    width, height : pixels of the first frame, after rotation.
    fps : average frame rate of the header, measured over the first frames where the header's cannot be meant.
    header_frames, header_duration_s : what the header claims, ``None`` where it is silent. Not to be relied on.
    rotation_degrees : clockwise turn that was applied to make frames upright.
    codec : four-letter code. ``decoder`` : library and version, since pixels differ slightly between libraries.
    start_s : where the first frame lies on the container's own clock; times in tad count from the first frame.
    ends_on_clock : ``header_duration_s`` is the end on that clock, what comes before the first frame included.
    """

    path: str
    width: int
    height: int
    fps: float
    header_frames: int | None
    header_duration_s: float | None
    rotation_degrees: int
    codec: str
    decoder: str
    start_s: float = 0.0
    ends_on_clock: bool = False

    @property
    def expected_s(self) -> float:
        """Seconds from the first frame to the end as the header has it; 0.0 where it is silent."""
        claimed = max(0.0, self.header_duration_s or 0.0)
        # no clock ends before its first frame: such a number is a length
        return claimed - self.start_s if self.ends_on_clock and claimed > self.start_s else claimed


def probe(path: str | Path) -> VideoInfo:
    """Open ``path`` and decode its first frame. Raises :class:`VideoError`, saying why, when that cannot be done."""
    decoder = open_decoder(path)
    try:
        return _info(path, decoder, None)
    finally:
        decoder.close()


def source_of(path: str | Path) -> dict[str, str | int]:
    """``{"name", "size", "mtime_ns"}`` of the file: what a store entry keeps to notice that its video has changed."""
    status = os.stat(checked_path(path))
    return {"name": os.path.basename(os.path.abspath(path)), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def check_unchanged(path: str | Path, source: Mapping[str, str | int]) -> None:
    """Raise :class:`VideoError` unless the file still is what :func:`source_of` said before it was opened."""
    if source_of(path) != source:
        raise VideoError(f"{path}: the file changed while it was read; once it is complete, run the same again")


# ---- size -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """Sizes for one video: frames are scaled to ``resized`` (height, width), the crop is the box inside it."""

    resized: tuple[int, int]
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Geometry:
    """Scale the short side to ``short_side`` pixels, then cut ``crop`` (height, width) at the centre; ``None``: no cut.

    A crop that does not fit (a portrait video and 256x320) scales the frame up further until it is covered, so that no
    border is ever made up. Both sides are scaled by one factor and rounded to the nearest pixel, halves up: 640x360
    with a short side of 256 becomes 455x256. Pixels are taken as square. With ``resize`` (height, width) frames are
    scaled to exactly that instead, whatever their aspect. Raises :class:`RecipeError` for sizes below 1, and for a crop
    larger than ``resize``.
    """

    short_side: int
    crop: tuple[int, int] | None
    resize: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.resize is not None:
            cut = self.crop or self.resize
            if not all(1 <= part <= whole for part, whole in zip(cut, self.resize, strict=True)):
                raise RecipeError(f"a crop of {cut} pixels does not fit into frames of {self.resize}")
        if self.short_side < 1 or (self.crop is not None and min(self.crop) < 1):
            raise RecipeError(f"short side {self.short_side} and crop {self.crop} must be at least 1 pixel")

    def plan(self, height: int, width: int) -> Plan:
        """The plan for frames of ``height`` x ``width`` pixels."""
        if self.resize is not None:
            tall, wide = self.resize
            cut_tall, cut_wide = self.crop or self.resize
            return Plan((tall, wide), (tall - cut_tall) // 2, (wide - cut_wide) // 2, cut_tall, cut_wide)
        scale = Fraction(self.short_side, min(height, width))
        if self.crop is not None:
            scale = max(scale, Fraction(self.crop[0], height), Fraction(self.crop[1], width))
        tall, wide = (max(1, math.floor(side * scale + Fraction(1, 2))) for side in (height, width))
        cut_tall, cut_wide = self.crop or (tall, wide)
        return Plan((tall, wide), (tall - cut_tall) // 2, (wide - cut_wide) // 2, cut_tall, cut_wide)


def crop(frames: np.ndarray, plan: Plan) -> np.ndarray:
    """The plan's box of resized frames (..., H, W, C), as a view."""
    return frames[..., plan.top : plan.top + plan.height, plan.left : plan.left + plan.width, :]


# ---- reading --------------------------------------------------------------------------------------------------------
class FrameReader:
    """One pass over a video: iterate for uint8 RGB chunks (n, H, W, 3) of resized, uncropped frames at ``k / fps``.

    Every chunk has ``chunk_frames`` frames, the last one up to that many, and owns its memory. ``with`` closes the file
    early.

    Parameters
    ----------
    fps : rate of the grid; ``None``: the file's average rate, at which a file of constant rate comes back as it is.
    decode_threads : threads of the decoder. ``None`` is one: with more, FFmpeg conceals damage differently in each run.

    Attributes
    ----------
    info, fps, plan : the file, the grid's rate, the sizes.
    frames, decoded : after the pass: grid frames given, frames in the file.
    duration_s : after the pass: from the first frame to the end of the last one.
    truncated : after the pass: the file ends clearly before its header says. Its frames were given all the same.
    timestamps, repaired : after the pass: ``"pts"``, or ``"index"`` where most timestamps could not be used and frames
        were counted at the file's rate instead; how many could not be used.
    notes : after the pass: a sentence about each of these that a user should know.
    decode_s : seconds spent decoding, scaling and converting so far.

    Raises
    ------
    VideoError : the file cannot be decoded, or is iterated a second time.
    RecipeError : ``fps`` or ``chunk_frames`` that cannot be meant.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        geometry: Geometry,
        fps: float | None = None,
        chunk_frames: int = 32,
        decode_threads: int | None = None,
    ) -> None:
        if fps is not None and not (math.isfinite(fps) and fps > 0):
            raise RecipeError(f"fps must be a positive number, got {fps}")
        if chunk_frames < 1:
            raise RecipeError(f"chunk_frames must be at least 1, got {chunk_frames}")
        self.path = path
        self.chunk_frames = chunk_frames
        self._threads = decode_threads or 1
        begun = perf_counter()
        self._decoder = open_decoder(path, threads=self._threads)
        self.info = _info(path, self._decoder, fps)
        self.fps = float(self.info.fps if fps is None else fps)
        self.plan = geometry.plan(self.info.height, self.info.width)
        self.frames = self.decoded = self.repaired = 0
        self.duration_s = 0.0
        self.truncated = False
        self.timestamps: Literal["pts", "index"] = "pts"
        self.notes: tuple[str, ...] = ()
        self.decode_s = perf_counter() - begun
        self._begun = self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; nothing can be read after this."""
        self._begun = self._closed = True
        self._decoder.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._begun:
            raise VideoError(f"{self.path}: a FrameReader reads its video once; open another one to read it again")
        self._begun = True
        return self._pass()

    def _pass(self) -> Iterator[np.ndarray]:
        header_end_s = self.info.expected_s
        clock = Clock(step_s=1.0 / self.info.fps, end_s=header_end_s)
        picker = GridPicker(self.fps)
        chunks = _Chunks((self.chunk_frames, *self.plan.resized, 3))
        held: np.ndarray | None = None  # the frame before, converted; None where nobody seemed to want it
        convert_all = False
        try:
            for index in count():
                if index > 0 and not self._grab():
                    break
                before, here = picker.advance(clock.tick(self._decoder.time_s()))
                if before:
                    if held is None:  # an unforeseen gap: go back for that frame, and take no more chances
                        held, convert_all = self._again(index - 1), True
                        self._grab()
                    yield from chunks.add(held, before)
                held = self._convert() if here or convert_all or picker.may_want_last() else None
                if held is not None:
                    yield from chunks.add(held, here)
            self.frames, extra = picker.finish(clock.duration_s)
            if extra > 0:
                yield from chunks.add(held if held is not None else self._again(clock.frames - 1), extra)
            elif extra < 0:
                chunks.drop_last()
            self._conclude(clock, header_end_s)
            yield from chunks.rest()
        finally:
            self._decoder.close()

    def _grab(self) -> bool:
        if self._closed:
            raise VideoError(f"{self.path}: the FrameReader was closed before its pass was over")
        begun = perf_counter()
        grabbed = self._decoder.grab()
        self.decode_s += perf_counter() - begun
        return grabbed

    def _convert(self) -> np.ndarray:
        """The frame that was grabbed, scaled: uint8 RGB (H, W, 3)."""
        begun = perf_counter()
        frame = self._decoder.retrieve()
        if frame is None:
            raise VideoError(f"{self.path}: a decoded frame cannot be converted; copy or encode the file again")
        tall, wide = self.plan.resized
        if frame.shape[:2] != (tall, wide):
            frame = cv2.resize(frame, (wide, tall), interpolation=cv2.INTER_LINEAR)
        frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        self.decode_s += perf_counter() - begun
        return frame

    def _again(self, index: int) -> np.ndarray:
        """Frame ``index``, reached from the start of the file once more; the decoder stays on it."""
        self._decoder.close()
        self._decoder = open_decoder(self.path, threads=self._threads)
        if not all(self._grab() for _ in range(index)):
            raise VideoError(f"{self.path}: the file changed while it was read; extract it again")
        return self._convert()

    def _conclude(self, clock: Clock, header_end_s: float) -> None:
        info = self.info
        self.decoded, self.duration_s, self.repaired = clock.frames, clock.duration_s, clock.repaired
        notes = []
        if 2 * clock.repaired > clock.frames:
            self.timestamps = "index"
            notes.append(
                f"{clock.repaired} of {clock.frames} timestamps are missing or do not increase: "
                f"frames were counted at {info.fps:g} fps instead"
            )
        # A header's count may be of something else (ticks in some AVI, frames at a nominal rate in MKV) and its
        # duration may include an offset: a file is called cut off only where frames and seconds are both missing.
        missing_s = header_end_s - clock.duration_s
        missing_frames = math.inf if info.header_frames is None else info.header_frames - clock.frames
        if min(missing_s * info.fps, missing_frames) > max(2.0, 0.02 * header_end_s * info.fps):
            self.truncated = True
            notes.append(
                f"the file ends after {clock.duration_s:.2f} s ({clock.frames} frames), its header tells of "
                f"{header_end_s:.2f} s: it is cut off or damaged; what is there was used"
            )
        self.notes = tuple(notes)


class _Chunks:
    """Gathers frames into chunks; a full chunk waits for one more frame, so that the last one can still be dropped."""

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self._shape = shape  # (n, H, W, 3)
        self._chunk: np.ndarray | None = None
        self._filled = 0

    def add(self, frame: np.ndarray, copies: int) -> Iterator[np.ndarray]:
        for _ in range(copies):
            if self._chunk is not None and self._filled == len(self._chunk):
                yield self._chunk
                self._chunk = None
            if self._chunk is None:
                self._chunk, self._filled = np.empty(self._shape, np.uint8), 0
            self._chunk[self._filled] = frame
            self._filled += 1

    def drop_last(self) -> None:
        self._filled -= 1

    def rest(self) -> Iterator[np.ndarray]:
        if self._chunk is not None and self._filled:
            yield self._chunk if self._filled == len(self._chunk) else self._chunk[: self._filled].copy()


def _info(path: str | Path, decoder: Decoder, fps: float | None) -> VideoInfo:
    """The info of a file whose decoder stands on its first frame; ``fps`` stands in where the file tells no rate."""
    frame = decoder.retrieve()
    if frame is None:
        raise VideoError(f"{path}: its first frame cannot be converted; copy or encode the file again")
    header = decoder.header()
    rate = header.fps if 0 < header.fps <= MAX_HEADER_FPS else _measured_rate(path) or fps
    if rate is None:
        raise VideoError(
            f"{path}: neither its header (rate {header.fps:g}) nor its timestamps tell the frame rate. "
            "Give one, such as --fps 25"
        )
    return VideoInfo(
        path=os.fspath(path),
        width=frame.shape[1],
        height=frame.shape[0],
        fps=rate,
        header_frames=header.frames,
        header_duration_s=header.duration_s,
        rotation_degrees=header.rotation_degrees,
        codec=header.codec,
        decoder=decoder.name,
        start_s=header.start_s,
        ends_on_clock=header.ends_on_clock,
    )


def _measured_rate(path: str | Path) -> float | None:
    """Frames a second over the first frames, ``None`` where there is one frame or most timestamps do not increase."""
    decoder = open_decoder(path)
    try:
        times = [decoder.time_s()]
        while len(times) < MEASURED_FRAMES and decoder.grab():
            times.append(decoder.time_s())
    finally:
        decoder.close()
    steps = [after - before for before, after in pairwise(times) if after > before]
    return len(steps) / sum(steps) if 2 * len(steps) >= len(times) - 1 > 0 and steps else None
