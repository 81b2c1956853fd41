"""A video file as a row of frames with times: OpenCV's FFmpeg by default, PyAV for what OpenCV cannot decode (AV1).

Both are read strictly in order: ``grab()``, then ``time_s()`` and, where the picture is wanted, ``retrieve()``. Seeking
by frame number is wrong on files of variable rate and is not offered.
"""

from __future__ import annotations

import errno
import importlib
import math
import os
import stat
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from tad.errors import VideoError

READ_TIMEOUT_MS = (
    600_000  # OpenCV gives up after 30 s by default and then reports the end of the file: too short for network disks
)
MAX_HEADER_FRAMES = (
    10**9
)  # FFmpeg turns an unknown duration into counts near -2**63; nothing real comes near 10**9 either
INSTALL_PYAV = "pip install 'tad-pipeline[video]'"

STILL_PICTURES = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"BM": "a BMP picture",
    b"II*\0": "a TIFF picture",
}
SOUND_FILES = {b"ID3": "MP3", b"fLaC": "FLAC", b"\xff\xfb": "MP3", b"\xff\xf1": "AAC"}
CONTAINERS = {
    b"\x1aE\xdf\xa3": "Matroska/WebM",
    b"OggS": "Ogg",
    b"FLV": "FLV",
    b"\x00\x00\x01\xba": "MPEG-PS",
    b"RIFF": "AVI",
    b"0&\xb2u": "ASF/WMV",
}
# What these state as the duration is the end on their own clock; others leave out what comes before the first frame.
ENDS_ON_CLOCK = (b"\x1aE\xdf\xa3", b"0&\xb2u")


@dataclass(frozen=True)
class Header:
    """What the file says of itself; every number may be wrong. ``fps`` is NaN where it says nothing."""

    codec: str
    fps: float
    frames: int | None
    duration_s: float | None
    start_s: float  # of the first frame on the container's clock
    rotation_degrees: int  # clockwise, applied by retrieve()
    ends_on_clock: bool = False  # duration_s counts from that clock's zero, not from the first frame


class Decoder(Protocol):
    """One pass over the frames of a file."""

    name: str

    def grab(self) -> bool:
        """Go to the next frame; False at the end, or where the rest cannot be read."""

    def time_s(self) -> float:
        """Presentation time of the frame that was grabbed; NaN where the file has none."""

    def retrieve(self) -> np.ndarray | None:
        """The frame that was grabbed, upright, uint8 BGR (H, W, 3)."""

    def header(self) -> Header:
        """What the header says; call after the first grab()."""

    def close(self) -> None:
        """Let go of the file."""


class OpenCVDecoder:
    """``cv2.VideoCapture`` over its own FFmpeg."""

    name = f"opencv {cv2.__version__}"

    def __init__(self, path: str, *, threads: int) -> None:
        _quieten_opencv()
        self._path = path
        options = [cv2.CAP_PROP_N_THREADS, threads, cv2.CAP_PROP_READ_TIMEOUT_MSEC, READ_TIMEOUT_MS]
        self._capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, options)
        self.opened: bool = self._capture.isOpened()
        if self.opened:
            self._capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)  # the default has changed between releases

    def grab(self) -> bool:
        return bool(self._capture.grab())

    def time_s(self) -> float:
        return float(self._capture.get(cv2.CAP_PROP_POS_MSEC)) / 1000.0

    def retrieve(self) -> np.ndarray | None:
        done, frame = self._capture.retrieve()
        return frame if done else None

    def header(self) -> Header:
        get = self._capture.get
        fps = float(get(cv2.CAP_PROP_FPS))
        fps = fps if math.isfinite(fps) and fps > 0 else math.nan
        count = float(get(cv2.CAP_PROP_FRAME_COUNT))
        frames = int(count) if 0 < count < MAX_HEADER_FRAMES else None
        start = float(get(cv2.CAP_PROP_PTS)) / fps if hasattr(cv2, "CAP_PROP_PTS") and fps > 0 else 0.0
        fourcc = int(get(cv2.CAP_PROP_FOURCC)) & 0xFFFFFFFF
        return Header(
            codec=fourcc.to_bytes(4, "little").decode("ascii", "replace").strip("\0 ") or "unknown",
            fps=fps,
            frames=frames,
            duration_s=frames / fps if frames is not None and fps > 0 else None,
            start_s=start,
            rotation_degrees=int(get(cv2.CAP_PROP_ORIENTATION_META)) % 360,
            ends_on_clock=_ends_on_clock(self._path),
        )

    def close(self) -> None:
        self._capture.release()


class PyAVDecoder:
    """PyAV (extra ``video``); the display matrix is applied here.

    Opening may raise ``av.error.FFmpegError``; all else that damage makes PyAV raise becomes :class:`VideoError`.
    """

    def __init__(self, path: str, *, threads: int) -> None:
        self._av = importlib.import_module("av")
        self._path, self.name = path, f"pyav {self._av.__version__}"
        # a title in another encoding than UTF-8 is no reason to refuse the pictures
        self._container = self._av.open(path, metadata_errors="replace")
        streams = self._container.streams.video
        self._stream: Any = streams[0] if streams else None
        self._frame: Any = None
        if self._stream is not None:
            with self._may_fail():
                if self._stream.codec_context is None:
                    raise VideoError(
                        f"{path}: codec unknown: FFmpeg cannot decode its video stream. It is damaged or of a rare "
                        "kind: copy or encode it again."
                    )
                self._stream.codec_context.thread_count = threads
                self._stream.thread_type = "AUTO" if threads > 1 else "NONE"
        self._frames = self._decoded()

    @contextmanager
    def _may_fail(self) -> Iterator[None]:
        """What PyAV raises over a damaged file as :class:`VideoError`: errors of FFmpeg, of text that is not UTF-8, and
        of parts that the file lacks.
        """
        try:
            yield
        except (self._av.error.FFmpegError, ValueError, AttributeError) as error:
            raise VideoError(
                f"{self._path}: {self.name} cannot decode it ({type(error).__name__}: {error}): it is damaged or of a "
                "rare kind. Copy or encode it again."
            ) from error

    @property
    def streams(self) -> list[str]:
        """Kinds of the streams inside: ``video``, ``audio``, ``subtitle``, ``data``."""
        return [stream.type for stream in self._container.streams]

    def _decoded(self) -> Generator[Any, None, None]:
        # Packet by packet, so that one damaged packet costs its own frames only, as with OpenCV.
        if self._stream is None:
            return
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
                frames = packet.decode()
            except StopIteration:
                return
            except self._av.error.EOFError:
                return
            except self._av.error.InvalidDataError:
                continue
            yield from frames

    def grab(self) -> bool:
        with self._may_fail():
            self._frame = next(self._frames, None)
        return self._frame is not None

    def time_s(self) -> float:
        pts, base = self._frame.pts, self._frame.time_base
        return math.nan if pts is None or base is None else float(pts * base)

    def retrieve(self) -> np.ndarray | None:
        with self._may_fail():
            frame = self._frame.to_ndarray(format="bgr24")
            turns = round(self._frame.rotation / 90) % 4  # counter-clockwise, as np.rot90
        return np.ascontiguousarray(np.rot90(frame, turns))

    def header(self) -> Header:
        with self._may_fail():
            return self._header()

    def _header(self) -> Header:
        stream = self._stream
        base = stream.time_base
        duration = stream.duration * base if stream.duration else None
        if duration is None and self._container.duration:
            duration = self._container.duration / self._av.time_base
        return Header(
            codec=str(stream.codec_context.codec_tag).strip("\0 ") or str(stream.codec_context.name),
            fps=float(stream.average_rate) if stream.average_rate else math.nan,
            frames=int(stream.frames) or None,
            duration_s=None if duration is None else float(duration),
            start_s=float((stream.start_time or 0) * base),
            rotation_degrees=-round(self._frame.rotation / 90) * 90 % 360,
            ends_on_clock=_ends_on_clock(self._path),
        )

    def close(self) -> None:
        self._frames.close()
        self._container.close()


def open_decoder(path: str | Path, *, threads: int = 1) -> Decoder:
    """A decoder of ``path`` that stands on the first frame (already grabbed).

    Raises :class:`VideoError`: missing, a directory, not readable, empty, not a video, only sound, no frame that
    decodes, or a codec that OpenCV lacks while PyAV is not installed.
    """
    name = checked_path(path)
    first = OpenCVDecoder(name, threads=threads)
    codec = None
    if first.opened:
        if first.grab() and first.retrieve() is not None:
            codec = first.header().codec
            if codec != "ansi":  # FFmpeg plays text files as terminal art
                return first
        codec = first.header().codec
    first.close()
    if codec == "ansi":
        raise VideoError(f"{path}: not a video, but text. Take it out of the list of videos.")

    if _pyav_is_installed():
        av = importlib.import_module("av")
        try:
            second = PyAVDecoder(name, threads=threads)
        except (av.error.FFmpegError, ValueError):  # of text in the file that is not UTF-8
            raise VideoError(_unreadable(path, name)) from None
        try:
            if second.grab():
                return second
        except VideoError:
            second.close()
            raise
        streams = second.streams
        second.close()
        raise VideoError(_frameless(path, name, streams, codec))
    if codec is None:
        raise VideoError(f"{_unreadable(path, name)} With PyAV the reason can be told more closely: {INSTALL_PYAV}.")
    if codec.lower() in ("av01", "av1"):
        raise VideoError(f"{path}: {first.name} cannot decode AV1 ({codec}). Install PyAV, which can: {INSTALL_PYAV}.")
    raise VideoError(
        f"{path}: {first.name} decodes no frame of its video stream (codec {codec}): there is none, it is damaged, or "
        f"OpenCV lacks the codec. Try PyAV: {INSTALL_PYAV}; otherwise copy or encode the file again."
    )


def checked_path(path: str | Path) -> str:
    """The absolute path of a regular, readable file that is not empty. Raises :class:`VideoError`."""
    # Absolute, since FFmpeg takes "a:b.mp4" for a protocol; UTF-8, since OpenCV crashes the process on other names.
    name = os.path.abspath(path)
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise VideoError(f"{name!a}: the file's name is not valid UTF-8, OpenCV cannot open it. Rename it.") from None
    try:
        status = os.stat(name)
        if stat.S_ISDIR(status.st_mode):
            raise VideoError(f"{path}: a directory, not a video. Name a file inside it.")
        if not stat.S_ISREG(status.st_mode):
            raise VideoError(f"{path}: not a regular file (a pipe or device). Save it to disk first.")
        with open(name, "rb") as file:
            head = file.read(8)
    except OSError as error:
        raise VideoError(_system_error(path, error)) from error
    if not head:
        raise VideoError(f"{path}: the file is empty (0 bytes). Copy or download it again.")
    for signature, kind in STILL_PICTURES.items():
        if head.startswith(signature):
            raise VideoError(f"{path}: not a video, but {kind}. Take it out of the list of videos.")
    return name


def _system_error(path: str | Path, error: OSError) -> str:
    if isinstance(error, PermissionError):
        return f"{path}: no permission to read the file. Change its permissions or run as its owner."
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"{path}: no such file. Check the path."
    return f"{path}: cannot be read: {error.strerror or error}. Check the disk or the network share."


def _ends_on_clock(name: str) -> bool:
    with open(name, "rb") as file:
        return file.read(4) in ENDS_ON_CLOCK


def _unreadable(path: str | Path, name: str) -> str:
    """Why FFmpeg finds no stream at all, as far as the first bytes tell."""
    with open(name, "rb") as file:
        head = file.read(16)
    kind = next((kind for signature, kind in CONTAINERS.items() if head.startswith(signature)), None)
    sound = next((kind for signature, kind in SOUND_FILES.items() if head.startswith(signature)), None)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        kind = "MP4/MOV"
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        sound = "WAV"
    if sound is not None:
        return f"{path}: holds only sound ({sound}), no video stream. Take it out of the list of videos."
    if kind is not None:
        return (
            f"{path}: begins like {kind}, but has no readable video stream: it is cut off or damaged (an MP4 whose "
            "index was never written), without a frame, or holds only sound. Copy or download it again."
        )
    return f"{path}: not a video: FFmpeg recognises no format in it. Check that this is the file you mean."


def _frameless(path: str | Path, name: str, streams: list[str], codec: str | None) -> str:
    """Why there is no frame in a file whose streams are known (kinds as PyAV calls them)."""
    if "video" in streams:
        named = f" (codec {codec})" if codec else ""
        return (
            f"{path}: its video stream{named} has no frame that can be decoded: it is empty or damaged. "
            "Copy or encode the file again."
        )
    if "audio" in streams:
        return f"{path}: holds only sound, no video stream. Take it out of the list of videos."
    if "subtitle" in streams:
        return f"{path}: not a video, but subtitles. Take it out of the list of videos."
    return _unreadable(path, name)


def _pyav_is_installed() -> bool:
    try:
        importlib.import_module("av")
    except ImportError:
        return False
    return True


def _quieten_opencv() -> None:
    """Keep FFmpeg's and OpenCV's chatter about broken files off the terminal, unless the user set their own levels.

    Both are settings of the process: FFmpeg's is read from the environment at the first opening, OpenCV's acts at once.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    if "OPENCV_LOG_LEVEL" not in os.environ:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
