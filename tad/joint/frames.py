"""Where frames come from in joint mode: a raw stream of the store, or the video files, on the grid of a feature stream.

A source hands over more than extraction looked at: frames that are scaled but not cut, where there are such, and the
box that extraction cut out of them, so that another one of that size can be drawn (see :mod:`tad.joint.augment`).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tad.detect.interface import LevelSpec
from tad.detect.preflight import check_streams
from tad.errors import RecipeError, StoreError, VideoError, did_you_mean
from tad.extract.flow import FlowStream, build_flow
from tad.extract.inputs import find_videos
from tad.extract.maps import map_name
from tad.extract.raw import RAW
from tad.extract.snippets import SnippetPlan
from tad.extract.streams import recipe_of
from tad.extract.video import FrameReader, Geometry, source_of
from tad.store import Store


# ---- what a feature stream was made of ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Grid:
    """The frames behind the rows of a stream, as its recorded recipe says.

    ``fps`` None: each file's own. ``flow``: method and its parameters, None for colour. ``levels``: name in the store
    → positions of the network's clip in one row (see ``SnippetPlan.check_level``).
    """

    stream: str
    plan: SnippetPlan
    geometry: Geometry
    fps: float | None
    flow: Mapping[str, Any] | None
    levels: Mapping[str, int]
    raw: bool

    @classmethod
    def of(cls, store: Store, stream: str) -> Grid:
        """The grid of a stored stream.

        Raises :class:`StoreError` where there is none, :class:`RecipeError` where tad did not extract it.
        """
        check_streams(store, [stream])
        spec = store.stream_attrs(stream)["spec"]
        try:
            recipe_of(spec, weights=None)
        except RecipeError as error:
            raise RecipeError(f"stream '{stream}' of store {store.path} has no frames to train from: {error}") from None
        cut = None if spec["crop"] == "full" else tuple(spec["crop"])
        resize = tuple(spec["resize"]) if "resize" in spec else None
        levels = spec.get("levels", {}) | {map_name(level): n for level, n in spec.get("maps", {}).items()}
        plan = SnippetPlan(spec["window"], spec["interval"], spec["stride"])
        geometry = Geometry(spec["short_side"], cut, resize)
        return cls(stream, plan, geometry, spec["fps"], spec["flow"], levels, spec["backbone"] in RAW)


@dataclass(frozen=True)
class Box:
    """A rectangle of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Footage:
    """One video of a source: ``frames`` of ``height`` x ``width`` pixels, ``fps`` of them a second; ``box`` is what
    extraction cuts out of them.
    """

    frames: int
    fps: float
    height: int
    width: int
    box: Box

    @property
    def room(self) -> int:
        """Pixels by which the box can be moved, the larger of both directions."""
        return max(self.height - self.box.height, self.width - self.box.width)


class FrameSource(Protocol):
    """Frames of videos, numbered as those behind the rows of ``grid.stream``."""

    grid: Grid

    def about(self, video: str) -> Footage:
        """What there is of a video, without reading it. Raises :class:`StoreError` or :class:`VideoError`."""
        ...

    def read(self, video: str, first: int, stop: int) -> np.ndarray:
        """Frames ``[first, stop)``, (F, H, W, C) uint8; C is red, green, blue, or flow x and y."""
        ...


def open_sources(
    store: Store,
    needs: Sequence[LevelSpec],
    *,
    frames: str = "frames",
    flow_frames: str = "flow-frames",
    videos: str | Path | None = None,
) -> dict[str, FrameSource]:
    """A source of frames for every stream that a detector reads.

    Parameters
    ----------
    frames, flow_frames : the raw streams that streams of colour and of flow are made from.
    videos : a file, folder or list to decode instead.

    Raises
    ------
    StoreError : a raw stream is missing; the message has the command that extracts it.
    RecipeError : a stream was not extracted by tad, or the raw stream has not the frames behind its rows.
    VideoError : no file behind ``videos``.
    """
    files = None if videos is None else {file.video: file.path for file in find_videos([videos])}
    sources: dict[str, FrameSource] = {}
    for stream in dict.fromkeys(need.stream for need in needs):
        grid = Grid.of(store, stream)
        if files is not None:
            sources[stream] = DecodedFrames(store, files, features=stream)
        else:
            sources[stream] = StoredFrames(store, flow_frames if grid.flow else frames, features=stream)
    return sources


# ---- frames in the store --------------------------------------------------------------------------------------------
class StoredFrames:
    """The raw stream ``stream`` (see :mod:`tad.extract.raw`) for the rows of ``features``; flow is as quantised there.

    Raises
    ------
    StoreError, RecipeError : see :func:`open_sources`.
    """

    def __init__(self, store: Store, stream: str, *, features: str) -> None:
        self.store, self.stream, self.grid = store, stream, Grid.of(store, features)
        if stream not in store.streams():
            raise StoreError(
                f"store {store.path} has no stream '{stream}' with the frames behind '{features}': extract them with\n"
                f"  {raw_command(store, self.grid, stream)}\nor set joint.videos to decode the files"
            )
        self.have = Grid.of(store, stream)
        self._check_alike()
        self._known: dict[str, Footage] = {}

    def _check_alike(self) -> None:
        grid, have = self.grid, self.have
        if not have.raw:
            raise RecipeError(f"stream '{self.stream}' of store {self.store.path} holds features, not frames")
        differing = [
            f"{name} {wanted} and {found}"
            for name, wanted, found in (
                ("fps", grid.fps or "native", have.fps or "native"),
                ("stride", 1, have.plan.stride),
                ("flow", _flow_name(grid), _flow_name(have)),
                ("flow's parameters", grid.flow, have.flow),
                ("short side", grid.geometry.short_side, have.geometry.short_side),
            )
            if wanted != found and not (name == "short side" and grid.geometry.resize is not None)
        ]
        if grid.geometry.resize != have.geometry.resize:
            tall, wide = grid.geometry.resize or (0, 0)
            raise RecipeError(
                f"the frames behind '{grid.stream}' were scaled to exactly {tall}x{wide}, which stored frames never "
                "are: set joint.videos to decode the files, or extract the features again with --short-side and --crop"
            )
        if differing:
            raise RecipeError(
                f"stream '{self.stream}' of store {self.store.path} has not the frames behind '{grid.stream}' "
                f"({'; '.join(differing[:3])}): extract them under another name and set joint."
                f"{'flow_frames' if grid.flow else 'frames'} to it:\n"
                f"  {raw_command(self.store, grid, f'{self.stream}-of-{grid.stream}')}"
            )

    def about(self, video: str) -> Footage:
        """See :class:`FrameSource`. Raises :class:`StoreError` where the video has no frames, or other ones."""
        known = self._known.get(video)
        if known is None:
            known = self._known[video] = self._looked_up(video)
        return known

    def _looked_up(self, video: str) -> Footage:
        where = f"video '{video}': stream '{self.stream}'"
        if not self.store.has(self.stream, video):
            command = raw_command(self.store, self.grid, self.stream)
            raise StoreError(f"{where} has no frames of it; extract them with\n  {command}")
        count, fps, size = _recorded(self.store, self.grid.stream, video)
        feature = self.store[self.stream, video]
        found = len(feature), _recorded(self.store, self.stream, video)[1]
        if found != (count, fps):
            raise StoreError(
                f"{where} has {found[0]} frames at {found[1]:g} fps, but '{self.grid.stream}' was made of {count} at "
                f"{fps:g} fps: extract both again from the same file"
            )
        scaled, held = self.grid.geometry.plan(*size), self.have.geometry.plan(*size)
        box = Box(scaled.top - held.top, scaled.left - held.left, scaled.height, scaled.width)
        fits = min(box.top, box.left) >= 0
        fits &= box.top + box.height <= held.height and box.left + box.width <= held.width
        if scaled.resized != held.resized or not fits:
            raise StoreError(
                f"{where} has frames of {held.height}x{held.width} (scaled to {held.resized[0]}x{held.resized[1]}), "
                f"'{self.grid.stream}' was made of {scaled.height}x{scaled.width} (scaled to {scaled.resized[0]}x"
                f"{scaled.resized[1]}): extract larger frames (--crop full) or set joint.videos to decode the files"
            )
        if tuple(feature.shape[2:]) != (held.height, held.width):
            raise StoreError(f"{where} has frames of another size than its recipe says; extract it again")
        return Footage(count, fps, held.height, held.width, box)

    def read(self, video: str, first: int, stop: int) -> np.ndarray:
        """See :class:`FrameSource`; a view of what the store gives, of which only the chunks in question are read."""
        return np.moveaxis(self.store[self.stream, video][first:stop], 1, -1)  # (F, H, W, C)


def _flow_name(grid: Grid) -> str:
    return "none" if grid.flow is None else str(grid.flow["name"])


def _recorded(store: Store, stream: str, video: str) -> tuple[int, float, tuple[int, int]]:
    """Frames, rate, and (height, width) of the file, as extraction wrote them down."""
    attrs = store.attrs(stream, video)
    try:
        (height, width), frames, fps = attrs["size"], attrs["frames"], attrs["fps"]
    except (KeyError, TypeError, ValueError):
        raise StoreError(f"video '{video}': stream '{stream}' does not say its frames; extract it again") from None
    return int(frames), float(fps), (int(height), int(width))


def raw_command(store: Store, grid: Grid, stream: str) -> str:
    """The command that extracts the frames behind ``grid.stream``, whole, as ``stream``."""
    name = "frames" if grid.flow is None else "flow-frames"
    flow = [] if grid.flow is None else ["--flow", _flow_name(grid)]
    named = [] if stream == name else ["--stream", stream]
    fps = "native" if grid.fps is None else str(grid.fps)
    options = ["--fps", fps, "--short-side", str(grid.geometry.short_side), "--crop", "full", *flow, *named]
    return shlex.join(["tad", "extract", "VIDEOS", "--store", str(store.path), "--backbone", name, *options])


# ---- frames of files ------------------------------------------------------------------------------------------------
class DecodedFrames:
    """The video files themselves, decoded as extraction decoded them for ``features``, flow estimated anew.

    Seeking to a frame is not exact: each read decodes from the start of the file to the last frame asked for. Of the
    video that was read last, decoding goes on where it stopped, so windows in their order cost one pass. Frames are
    scaled but not cut.

    Parameters
    ----------
    files : video → path.

    Raises
    ------
    StoreError, RecipeError : see :func:`open_sources`.
    """

    def __init__(self, store: Store, files: Mapping[str, Path], *, features: str, chunk_frames: int = 32) -> None:
        self.store, self.files, self.grid = store, dict(files), Grid.of(store, features)
        self.chunk_frames = chunk_frames
        self._known: dict[str, Footage] = {}
        self._pass: _Pass | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pass": None}  # a decoder stays in its process

    def about(self, video: str) -> Footage:
        """See :class:`FrameSource`.

        Raises :class:`StoreError` where no file is given for the video, or one that changed since its features were
        extracted.
        """
        known = self._known.get(video)
        if known is None:
            count, fps, size = _recorded(self.store, self.grid.stream, video)
            if video not in self.files:
                hint = did_you_mean(video, self.files) if len(self.files) <= 50 else ""
                raise StoreError(f"video '{video}' is not among the {len(self.files)} files of joint.videos.{hint}")
            path = self.files[video]
            size_was = self.store.attrs(self.grid.stream, video).get("source", {}).get("size")
            if source_of(path)["size"] != size_was:  # a copy elsewhere has another time, and may have another name
                raise StoreError(
                    f"video '{video}': {path} is not the file that '{self.grid.stream}' was extracted from, which had "
                    f"{size_was} bytes; extract the features again"
                )
            plan = self.grid.geometry.plan(*size)
            box = Box(plan.top, plan.left, plan.height, plan.width)
            known = self._known[video] = Footage(count, fps, *plan.resized, box)
        return known

    def read(self, video: str, first: int, stop: int) -> np.ndarray:
        """See :class:`FrameSource`. Raises :class:`VideoError` where the file cannot be decoded that far."""
        footage = self.about(video)
        if self._pass is None or self._pass.video != video or first < self._pass.start:
            self.close()
            self._pass = _Pass(video, self.files[video], self.grid, footage, self.chunk_frames)
        try:
            return self._pass.read(first, stop)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the open file; the next read opens it again."""
        if self._pass is not None:
            self._pass.close()
            self._pass = None


class _Pass:
    """One pass over a file that stops behind each window; keeps the frames from the last window's first one on."""

    def __init__(self, video: str, path: Path, grid: Grid, footage: Footage, chunk_frames: int) -> None:
        self.video, self.path, self.footage = video, path, footage
        self.start = self.end = 0  # frames [start, end) are held
        self._parts: list[np.ndarray] = []  # (n, H, W, C) each
        self._reader = FrameReader(path, fps=grid.fps, geometry=grid.geometry, chunk_frames=chunk_frames)
        self._chunks = self._reader_chunks(None if grid.flow is None else str(grid.flow["name"]))
        if (self._reader.fps, self._reader.plan.resized) != (footage.fps, (footage.height, footage.width)):
            self.close()
            raise VideoError(f"{path}: its rate or size is not what the features were made of; extract them again")

    def close(self) -> None:
        self._reader.close()

    def _reader_chunks(self, flow: str | None) -> Iterator[np.ndarray]:
        if flow is None:
            yield from self._reader
            return
        stream = FlowStream(build_flow(flow))
        for frames in self._reader:
            yield stream.push(frames)  # (n, H, W, 2), one frame late
        yield stream.finish()

    def read(self, first: int, stop: int) -> np.ndarray:
        while self.end < stop:
            chunk = next(self._chunks, None)
            if chunk is None:
                raise VideoError(
                    f"{self.path}: has {self.end} frames, the features were made of {self.footage.frames}; extract "
                    "them again"
                )
            self._parts.append(chunk)
            self.end += len(chunk)
            self._forget_before(first)
        self._forget_before(first)
        held = self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)
        return held[first - self.start : stop - self.start].copy()

    def _forget_before(self, first: int) -> None:
        while self._parts and self.start + len(self._parts[0]) <= first:
            self.start += len(self._parts.pop(0))
