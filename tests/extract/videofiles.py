"""Video files made for tests: frames that carry their own index, written with times, rotations and damage of choice."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

CLOCK = Fraction(1, 90000)  # time base of the files: ticks a second as in MPEG
LOSSLESS = {"codec": "ffv1", "pix_fmt": "bgr0"}  # in .mkv; bit-exact RGB


def coded(index: int, height: int = 48, width: int = 64) -> np.ndarray:
    """An RGB frame whose 4 x 4 blocks are the bits of ``index``, black or white: survives compression and scaling."""
    bits = np.array([index >> bit & 1 for bit in range(16)], np.uint8).reshape(4, 4) * 255
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    return np.repeat(bits[rows][:, columns, None], 3, axis=2)  # (H, W, 3)


def index_of(frame: np.ndarray) -> int:
    """The index that :func:`coded` put into a frame of any size."""
    height, width = frame.shape[:2]
    rows, columns = ((np.arange(4) * 2 + 1) * side // 8 for side in (height, width))
    bits = frame[rows][:, columns].mean(axis=-1) > 127
    return int(sum(int(bit) << place for place, bit in enumerate(bits.reshape(-1))))


def indices_of(chunks: Iterable[np.ndarray]) -> list[int]:
    """The indices of all frames of all chunks."""
    return [index_of(frame) for chunk in chunks for frame in chunk]


def write_video(
    path: Path,
    frames: Iterable[np.ndarray],
    *,
    ticks: Sequence[int] | None = None,
    rate: Fraction | int = 30,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    options: dict[str, str] | None = None,
    container: str | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """RGB frames → a file. ``ticks``: times in units of :data:`CLOCK`; without, a constant ``rate``.

    ``rotation`` (degrees, counter-clockwise) goes into the display matrix; the frames are stored as given.
    """
    base = CLOCK if ticks is not None else 1 / Fraction(rate)
    with av.open(str(path), "w", format=container, options=container_options or {}) as file:
        stream: Any = file.add_stream(codec, rate=Fraction(rate), options=options or {})
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = base
        stream.time_base = base
        if codec == "libx264":
            stream.codec_context.gop_size = 12
        if rotation:
            stream.set_display_rotation(rotation)
        for index, frame in enumerate(frames):
            if index == 0:
                stream.height, stream.width = frame.shape[:2]
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pix_fmt)
            picture.pts, picture.time_base = index if ticks is None else int(ticks[index]), base
            file.mux(stream.encode(picture))
        file.mux(stream.encode(None))
    return path


def write_coded(path: Path, count: int, **options: Any) -> Path:
    """``count`` coded frames; the options of :func:`write_video`."""
    return write_video(path, (coded(index) for index in range(count)), **options)


def write_cut(path: Path, count: int, share: float) -> Path:
    """An MP4 whose header comes first and tells of ``count`` frames, with only ``share`` of its bytes."""
    write_coded(path, count, container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def write_lying_avi(path: Path, count: int, claimed: int) -> Path:
    """A Motion-JPEG AVI of ``count`` frames whose headers claim ``claimed``."""
    write_coded(path, count, codec="mjpeg", pix_fmt="yuvj420p")
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"avih") + 8 + 16, claimed)  # dwTotalFrames
    struct.pack_into("<I", data, data.index(b"strh") + 8 + 32, claimed)  # dwLength
    path.write_bytes(bytes(data))
    return path


def write_sound(path: Path, seconds: float = 0.5) -> Path:
    """Silence without pictures: AAC, or PCM for ``.wav``."""
    codec, dtype, layout = ("pcm_s16le", np.int16, "s16") if path.suffix == ".wav" else ("aac", np.float32, "fltp")
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=44100)
        for index in range(int(seconds * 44100) // 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype), format=layout, layout="mono")
            frame.sample_rate, frame.pts = 44100, index * 1024
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def write_without_frames(path: Path) -> Path:
    """A container with a video stream and not one frame in it."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        file.start_encoding()
    return path


def times_of(path: Path) -> list[Fraction]:
    """Exact seconds of all frames since the first one, by PyAV: what the file itself says."""
    with av.open(str(path)) as file:
        times = [frame.pts * frame.time_base for frame in file.decode(video=0)]
    return [time - times[0] for time in times]
