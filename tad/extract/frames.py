"""The producer: one thread that decodes videos one after the other and hands over uint8 frames through a bounded
queue.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import cv2
import numpy as np

from tad.errors import TadError, VideoError
from tad.extract.flow import FlowEstimator, FlowStream
from tad.extract.inputs import VideoFile
from tad.extract.video import FrameReader, Geometry, Plan, VideoInfo, crop, source_of


@dataclass
class Begin:
    """A video was opened. ``source`` is the file as it was before. Set ``given_up`` to have the rest of it left out: no
    more than what is in the queue follows, and perhaps no :class:`End`.
    """

    file: VideoFile
    info: VideoInfo
    fps: float
    source: dict[str, str | int]
    given_up: threading.Event = field(default_factory=threading.Event)


@dataclass
class Frames:
    """The next ``count`` frames of the current video, (n, H, W, C) uint8 after the crop; flow by estimator's name,
    one frame late.
    """

    count: int
    rgb: np.ndarray | None
    flow: dict[str, np.ndarray]


@dataclass
class End:
    """The current video is complete."""

    frames: int
    duration_s: float
    decode_s: float
    flow_s: float
    attrs: dict[str, object]


@dataclass
class Failed:
    """The current video is given up."""

    file: VideoFile
    error: Exception


Item = Begin | Frames | End | Failed
# What a bad file, a failing disk or a lack of memory raises; anything else is a mistake in tad and stops the run.
UNREADABLE = (TadError, OSError, RuntimeError, MemoryError, cv2.error)


def read_videos(
    files: Sequence[VideoFile],
    *,
    fps: float | None,
    geometry: Geometry,
    rgb: bool,
    flows: Sequence[FlowEstimator],
    flow_threads: int = 1,
    chunk_frames: int = 32,
) -> Generator[Item, None, None]:
    """Decode ``files`` in a thread of its own, at most a few chunks ahead; flow is estimated there as well, once a
    pair.

    A video that cannot be read becomes a :class:`Failed` item; the next one follows.
    """
    items: queue.Queue[Item | None] = queue.Queue(maxsize=4)
    stop = threading.Event()
    mistakes: list[BaseException] = []

    def put(item: Item | None) -> None:
        while not stop.is_set():
            try:
                return items.put(item, timeout=0.2)
            except queue.Full:
                continue
        raise _Stopped

    def produce() -> None:
        try:
            for file in files:
                try:
                    with closing(_read(file, fps, geometry, rgb, flows, flow_threads, chunk_frames)) as own:
                        for item in own:
                            put(item)
                except UNREADABLE as error:
                    put(Failed(file, error))
            put(None)
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - a mistake of ours; it is raised where the items are read
            mistakes.append(error)
            items.put(None)

    thread = threading.Thread(target=produce, name="tad-decode", daemon=True)
    thread.start()
    try:
        while (item := items.get()) is not None:
            yield item
        if mistakes:
            raise mistakes[0]
    finally:
        stop.set()
        thread.join(timeout=30)


class _Stopped(Exception):
    """The consumer has gone."""


def _read(
    file: VideoFile,
    fps: float | None,
    geometry: Geometry,
    rgb: bool,
    flows: Sequence[FlowEstimator],
    flow_threads: int,
    chunk_frames: int,
) -> Generator[Item, None, None]:
    source = source_of(file.path)  # before opening: a file that grows meanwhile must not count as done
    streams = {flow.name: FlowStream(flow, threads=flow_threads) for flow in flows}
    with FrameReader(file.path, fps=fps, geometry=geometry, chunk_frames=chunk_frames) as reader:
        begin = Begin(file, reader.info, reader.fps, source)
        yield begin
        for frames in reader:  # (n, H, W, 3)
            if begin.given_up.is_set():
                return
            flow = {name: _cut(stream.push(frames), reader.plan) for name, stream in streams.items()}
            yield Frames(len(frames), _cut(frames, reader.plan) if rgb else None, flow)
        if reader.frames == 0:
            raise VideoError(f"{file.path}: no frame could be decoded; check the file with ffprobe or a player")
        if streams:
            yield Frames(0, None, {name: _cut(stream.finish(), reader.plan) for name, stream in streams.items()})
        attrs: dict[str, object] = {
            "decoder": reader.info.decoder,
            "codec": reader.info.codec,
            "size": [reader.info.height, reader.info.width],
            "rotation_degrees": reader.info.rotation_degrees,
            "frames_decoded": reader.decoded,
            "timestamps": reader.timestamps,
            "timestamps_repaired": reader.repaired,
            "notes": list(reader.notes),
            "truncated": reader.truncated,
        }
        flow_s = sum(stream.flow_s for stream in streams.values())
        yield End(reader.frames, reader.duration_s, reader.decode_s, flow_s, attrs)


def _cut(frames: np.ndarray, plan: Plan) -> np.ndarray:
    return np.ascontiguousarray(crop(frames, plan))
