"""Truth and predictions in the files of other tools, both ways.

>>> from tad.exchange import FORMATS, Collection, read_collection, write_collection
"""

from __future__ import annotations

from pathlib import Path

from tad.errors import AnnotationError, did_you_mean
from tad.exchange import elan, fiftyone, labelstudio, plain, subtitles, via
from tad.exchange.collection import Collection, Format, Options

__all__ = ["FORMATS", "Collection", "Format", "Options", "format_of", "read_collection", "write_collection"]

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


def read_collection(path: str | Path, *, format: str | None = None, fps: float | None = None) -> Collection:
    """Read segments, with or without scores, from a file (or a folder of files, one a video) of another tool.

    Parameters
    ----------
    format : a key of ``FORMATS``; by default told by the file's suffix and content.
    fps : frame rate for files that count frames and do not say at which rate.

    Raises
    ------
    AnnotationError : an unknown format, an unreadable file, or values that cannot be meant, with file and field.
    """
    path = Path(path)
    name = format or format_of(path)
    return _format(name).read(path, Options(fps=fps))


def write_collection(
    collection: Collection,
    path: str | Path,
    *,
    format: str,
    fps: float | None = None,
    subset: str | None = None,
    media: str = "{video}.mp4",
) -> list[Path]:
    """Write segments for another tool; returns the files. Formats that hold one video a file get a folder.

    Parameters
    ----------
    fps : frame rate of videos whose own is not known, for formats that count frames.
    subset : of videos whose own is not known, for formats that need one.
    media : how a video's file is called there, from its id.

    Raises
    ------
    AnnotationError : an unknown format, something that the format cannot hold, or a path that cannot be written.
    """
    return _format(format).write(collection, Path(path), Options(fps=fps, subset=subset, media=media))


def format_of(path: Path) -> str:
    """The format of a file or folder, by suffix and content.

    Raises :class:`AnnotationError` where it cannot be told.
    """
    if path.is_dir():
        for name, format in FORMATS.items():
            if format.folder and any(path.glob(f"*{format.suffix}")):
                return name
        if (path / "labels.json").is_file():
            return "fiftyone"
        kinds = ", ".join(format.suffix for format in FORMATS.values() if format.folder)
        raise AnnotationError(f"folder {path} holds no {kinds} files and no labels.json")
    suffix = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    by_suffix = {"eaf": "elan", "srt": "srt", "vtt": "webvtt", "csv": "csv"}
    return by_suffix.get(suffix) or plain.json_format_of(path)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise AnnotationError(f"unknown format '{name}'.{did_you_mean(name, FORMATS)}")
    return FORMATS[name]
