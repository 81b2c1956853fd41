"""The video files of a report: which file is whose, and copies that every browser plays."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from tad.errors import TadError, VideoError
from tad.progress import ProgressFactory, silent

# What browsers play comes first: of several files of one video the first kind is taken.
SUFFIXES = (".webm", ".mp4", ".m4v", ".mov", ".mkv", ".ogv", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts")
PROXY_FPS = 25.0


def files_of(videos: Iterable[str], folder: str | Path) -> dict[str, Path]:
    """The files below ``folder`` of the videos that have one.

    A file is a video's when its path below the folder, its name or its stem is the id, with or without suffix; or the
    id with ActivityNet's prefix ``v_``.

    Raises
    ------
    TadError : ``folder`` is no folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise TadError(f"{folder} is not a folder of videos")
    known: dict[str, Path] = {}
    found = [path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    for path in sorted(found, key=lambda path: (SUFFIXES.index(path.suffix.lower()), path)):
        relative = path.relative_to(root)
        for name in (relative.as_posix(), relative.with_suffix("").as_posix(), path.name, path.stem):
            known.setdefault(name, path)
    named = ((video, known.get(video) or known.get(f"v_{video}")) for video in videos)
    return {video: path for video, path in named if path is not None}


def make_proxies(
    files: Mapping[str, Path], folder: str | Path, *, short_side: int = 240, progress: ProgressFactory | None = None
) -> tuple[dict[str, Path], list[str]]:
    """Write small VP8 copies (``.webm``), which every browser plays, without sound; those already there are kept.

    Frames are laid on a uniform grid by their timestamps, so that times stay those of the original.

    Parameters
    ----------
    files : by video id. folder : where the copies go. short_side : pixels; smaller videos keep their size.

    Returns
    -------
    The copies by id, and a sentence for each video that could not be copied; the others go on.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    made: dict[str, Path] = {}
    failures: list[str] = []
    taken: dict[str, int] = {}
    with (progress or silent)(len(files), "copy for the browser", "videos") as bar:
        for video, source in files.items():
            number = taken.setdefault(source.stem, 0)
            taken[source.stem] += 1
            path = target / (f"{source.stem}.webm" if not number else f"{source.stem}.{number}.webm")
            try:
                if not path.is_file() or path.stat().st_mtime_ns < source.stat().st_mtime_ns:
                    _copy(source, path, short_side)
                made[video] = path
            except (VideoError, OSError) as error:
                failures.append(f"{video}: {error}")
            bar.advance(1)
    return made, failures


def _copy(source: Path, path: Path, short_side: int) -> None:
    import cv2  # not needed for a report without copies

    capture = cv2.VideoCapture(str(source))
    partial = path.with_name(f".{uuid.uuid4().hex}.webm")
    writer: cv2.VideoWriter | None = None
    try:
        ok, frame = capture.read()
        if not ok:
            raise VideoError(f"{source} cannot be decoded")
        rate = capture.get(cv2.CAP_PROP_FPS)
        fps = min(rate, PROXY_FPS) if 0 < rate < 1000 else PROXY_FPS
        height, width = frame.shape[:2]
        scale = min(1.0, short_side / min(height, width))
        size = max(2, round(width * scale) // 2 * 2), max(2, round(height * scale) // 2 * 2)
        writer = cv2.VideoWriter(str(partial), cv2.VideoWriter.fourcc(*"VP80"), fps, size)
        if not writer.isOpened():
            raise VideoError("OpenCV cannot write VP8 here; convert the videos to H.264 or VP8 by other means")
        written = 0
        while ok:
            held = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
            ok, frame = capture.read()
            until_s = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 if ok else (written + 0.5) / fps
            while written == 0 or written / fps < until_s - 1e-6:  # a frame is seen until the next one's time
                writer.write(held)
                written += 1
        writer.release()
        os.replace(partial, path)
    finally:
        capture.release()
        if writer is not None:
            writer.release()
        partial.unlink(missing_ok=True)
