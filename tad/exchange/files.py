"""Files of other tools: from a video's id to a file's name and back, and what is written where."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote

from tad.annotations._files import Problems, write_atomically
from tad.errors import AnnotationError

SAFE = " !#$&'()+,;=@[]^_`{}~-."  # characters below 128 of an id that stay in the name of its file
SUFFIXES = (".json", ".csv", ".eaf", ".srt", ".vtt")
NAME_BYTES = 200  # file systems allow 255; the scratch file's name is longer than the file's


def file_name(video: str, suffix: str) -> str:
    """A video's id as the name of a file, percent-encoded where it must be, so that it can be read back.

    Letters of any script stay as they are: players look for ``Übung.srt`` beside ``Übung.mp4``.
    """
    name = "".join(c if ord(c) > 127 and c.isprintable() else quote(c, safe=SAFE) for c in video)
    name = f"%2E{name[1:]}" if name.startswith(".") else name
    if len(name.encode()) > NAME_BYTES:
        raise AnnotationError(f"video id {video[:60]!r}... is too long for the name of a file")
    return name + suffix


def video_of(path: Path) -> str:
    """The id behind :func:`file_name`; for other names the name without its suffix, and without .gz."""
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    return unquote(name[: -len(Path(name).suffix)] if Path(name).suffix else name)


def suffix_of(path: Path) -> str:
    """The suffix in lower case, that before .gz where there is one."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def files_in(folder: Path, suffix: str) -> list[Path]:
    """A folder's files of this suffix, gzipped or not, sorted; hidden ones and sub-folders are none."""
    try:
        found = [file for file in folder.iterdir() if suffix_of(file) == suffix and not file.name.startswith(".")]
        return sorted(file for file in found if file.is_file())
    except OSError as error:
        raise AnnotationError(f"{folder} cannot be read: {error.strerror or error}") from error


def videos_in(path: Path, suffix: str) -> dict[str, Path]:
    """The file itself, or a folder's files of this suffix, by video id.

    Raises :class:`AnnotationError` for a folder without any, and for two files of one id.
    """
    files = files_in(path, suffix) if path.is_dir() else [path]
    if not files:
        raise AnnotationError(f"folder {path} holds no {suffix} file")
    problems = Problems(path)
    sources = Sources(problems)
    for file in files:
        sources.add(video_of(file), file.name)
    problems.raise_if_any()
    return {video_of(file): file for file in files}


def video_in(name: str, *, url: bool) -> str:
    """A video's id from the path or address under which a tool knows it: the last part without suffix, "" for none.

    Of an address the query is cut and percent-encoding undone; Label Studio's ``/data/local-files/?d=PATH`` is PATH.
    """
    if url:
        name, _, query = name.partition("#")[0].partition("?")
        name = next(iter(parse_qs(query).get("d", [])), None) or unquote(name)
    last = name.replace("\\", "/").rpartition("/")[2]
    return last.rpartition(".")[0] or last


class Sources:
    """Which file or address a tool means by an id: two different ones for one id would be merged into one video."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self._source_of: dict[str, str] = {}

    def add(self, video: str, source: str) -> None:
        """Note a video's source; another one before is added to the problems, with both names."""
        before = self._source_of.setdefault(video, source)
        if before != source:
            self._problems.add(f"video {video!r}", f"{before!r} and {source!r} would both be this video; rename one")


def folder_for(path: Path, tool: str) -> Path:
    """``path`` if it can be a folder. Raises :class:`AnnotationError` for a file, or what is named like one."""
    if path.is_file() or (not path.is_dir() and suffix_of(path) in SUFFIXES):
        raise AnnotationError(f"{path} is the name of a file; for {tool} name a folder")
    return path


def json_for(path: Path, what: str) -> Path:
    """``path`` if it is named .json. Raises :class:`AnnotationError` otherwise."""
    if path.suffix.lower() != ".json":
        raise AnnotationError(f"{path}: {what} is written as .json")
    return path


@dataclass(frozen=True)
class Plan:
    """What is to be written, all of it known before the first file is.

    Attributes
    ----------
    path : the file or folder that was named.
    texts : by file.
    stale : files of the same kind in the same folder that belong to no video any more; they are removed.
    """

    path: Path
    texts: dict[Path, str]
    stale: tuple[Path, ...] = ()

    @classmethod
    def of(cls, texts: dict[Path, str], path: Path, suffix: str | None, *, overwrite: bool) -> Plan:
        """A plan for a file or, with a suffix, for a folder ``path`` that has files of this suffix only.

        Raises :class:`AnnotationError` where there is no file to write, and where a file, or anything in the folder,
        is there and must not be overwritten.
        """
        if not texts:
            raise AnnotationError(f"{path}: there is no video to write")
        folders = [file for file in texts if file.is_dir()]
        if folders:
            raise AnnotationError(f"{folders[0]} is a folder; name a file, or remove it")
        there = [file for file in texts if os.path.lexists(file)]
        old = files_in(path, suffix) if suffix and path.is_dir() else []
        if suffix and path.is_dir() and not overwrite:
            there += [file for file in path.iterdir() if not file.name.startswith(".")]
        if there and not overwrite:
            what = f"folder {path} is not empty" if suffix else f"{there[0]} exists"
            raise AnnotationError(f"{what}; overwrite it (overwrite=True, --overwrite) or name another")
        return cls(path, texts, tuple(file for file in old if file not in texts))

    def keep(self, *inputs: Path) -> None:
        """Raises :class:`AnnotationError` where the plan would write over, or remove, what is read."""
        for given in map(os.path.realpath, inputs):
            for file in (self.path, *self.texts, *self.stale):
                real = os.path.realpath(file)
                if real == given or (os.path.isfile(real) and os.path.dirname(real) == given):
                    raise AnnotationError(f"{file} is read from and would be written over or removed; name another")

    def write(self) -> list[Path]:
        """Write each file whole, then remove what is stale. Raises :class:`AnnotationError` where that fails."""
        written = set()
        for file, text in self.texts.items():
            write_atomically(file, _chunks(text))
            written.add(_identity(file))
        for file in self.stale:
            try:
                if _identity(file) not in written:  # the same file where upper and lower case are one
                    file.unlink()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise AnnotationError(f"{file} cannot be removed: {error.strerror or error}") from error
        return list(self.texts)


def _identity(file: Path) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_dev, status.st_ino


def _chunks(text: str) -> Iterator[str]:
    yield text
