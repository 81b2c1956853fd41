"""Truth and predictions in the files of other tools, both ways.

>>> from tad.exchange import FORMATS, Collection, read_collection, write_collection
"""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from tad.annotations import Truth
from tad.errors import AnnotationError, did_you_mean
from tad.exchange import elan, fiftyone, labelstudio, plain, subtitles, via
from tad.exchange.collection import Collection, Format, Options, Segment
from tad.exchange.files import Plan, files_in, suffix_of

__all__ = [
    "FORMATS",
    "Collection",
    "Format",
    "Options",
    "Plan",
    "Segment",
    "format_of",
    "plan_collection",
    "read_collection",
    "write_collection",
]

FORMATS: dict[str, Format] = {
    "activitynet": plain.ACTIVITYNET,
    "csv": plain.CSV,
    "fiftyone": fiftyone.FIFTYONE,
    "via": via.VIA,
    "elan": elan.ELAN,
    "labelstudio": labelstudio.LABELSTUDIO,
    "srt": subtitles.SRT,
    "webvtt": subtitles.WEBVTT,
}


def read_collection(
    path: str | Path,
    *,
    format: str | None = None,
    fps: float | None = None,
    videos: pd.DataFrame | Truth | None = None,
) -> Collection:
    """Read segments, with or without scores, from a file (or a folder of files, one a video) of another tool.

    Parameters
    ----------
    format : a key of ``FORMATS``; by default told by the file's suffix and content.
    fps : frame rate for files that count frames and do not say at which rate.
    videos : a table ``video`` and any of ``subset, duration_s, fps`` that fills in what the file does not say; the
        file's own values win, and the table adds and removes no video. Its frame rates go before ``fps``.

    Raises
    ------
    AnnotationError : an unknown format, an unreadable file, or values that cannot be meant, with file and field.
    """
    path = Path(path)
    known = videos.videos if isinstance(videos, Truth) else videos
    rates: dict[str, float] = {}
    if known is not None:
        known = Collection.of(pd.DataFrame(columns=["video", "start_s", "end_s", "label"]), known).videos
        pairs = zip(known["video"].tolist(), known["fps"].tolist(), strict=True)
        rates = {video: rate for video, rate in pairs if not math.isnan(rate)}
    options = Options(fps=fps, rates=rates)
    try:
        collection = _format(format or format_of(path)).read(path, options)
    except OSError as error:
        raise AnnotationError(f"{path} cannot be read: {error.strerror or error}") from error
    return collection if known is None else collection.filled(known)


def plan_collection(
    collection: Collection,
    path: str | Path,
    *,
    format: str,
    fps: float | None = None,
    subset: str | None = None,
    media: str = "{video}.mp4",
    overwrite: bool = False,
) -> Plan:
    """What :func:`write_collection` would write and remove; nothing is touched. Parameters and errors are its own."""
    path, kind = Path(path), _format(format)
    if "\0" in str(path):
        raise AnnotationError(f"{str(path)!r} is no path: it holds a null character")
    options = Options(fps=fps, subset=subset, media=media)
    try:
        texts = kind.render(collection, path, options)
        return Plan.of(texts, path, kind.suffix if kind.folder else None, overwrite=overwrite)
    except OSError as error:
        raise AnnotationError(f"{path} cannot be written: {error.strerror or error}") from error


def write_collection(
    collection: Collection,
    path: str | Path,
    *,
    format: str,
    fps: float | None = None,
    subset: str | None = None,
    media: str = "{video}.mp4",
    overwrite: bool = False,
) -> list[Path]:
    """Write segments for another tool; returns the files. Formats that hold one video a file get a folder.

    Parameters
    ----------
    fps : frame rate of videos whose own is not known, for formats that count frames.
    subset : of videos whose own is not known, for formats that need one.
    media : how a video's file is called there, from its id.
    overwrite : replace a file, and in a folder all files of the format's suffix: those of other videos are removed.

    Raises
    ------
    AnnotationError : an unknown format, something that the format cannot hold or that would be refused when read
        again, a path that is there already, or one that cannot be written. Nothing is written unless all can be.
    """
    plan = plan_collection(collection, path, format=format, fps=fps, subset=subset, media=media, overwrite=overwrite)
    return plan.write()


def format_of(path: Path) -> str:
    """The format of a file or folder, by suffix and content.

    Raises :class:`AnnotationError` where it cannot be told.
    """
    if path.is_dir():
        found = [name for name, format in FORMATS.items() if format.folder and files_in(path, format.suffix)]
        found += ["fiftyone"] if (path / "labels.json").is_file() else []
        if len(found) > 1:
            raise AnnotationError(f"folder {path} holds files of {' and '.join(found)}; say which format to read")
        if found:
            return found[0]
        kinds = ", ".join(format.suffix for format in FORMATS.values() if format.folder)
        raise AnnotationError(f"folder {path} holds no {kinds} files and no labels.json")
    by_suffix = {".eaf": "elan", ".srt": "srt", ".vtt": "webvtt", ".csv": "csv"}
    return by_suffix.get(suffix_of(path)) or plain.json_format_of(path)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise AnnotationError(f"unknown format '{name}'.{did_you_mean(name, FORMATS)}")
    return FORMATS[name]
