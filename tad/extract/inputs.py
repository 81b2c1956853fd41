"""Which video files a command means: files, folders and lists become (id, path) pairs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tad.errors import VideoError

_SUFFIXES = ".3gp .asf .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv .y4m"
SUFFIXES = frozenset(_SUFFIXES.split())
LIST_SUFFIXES = frozenset((".txt", ".lst", ".list"))


@dataclass(frozen=True)
class VideoFile:
    """A video and the id under which its features are stored."""

    video: str
    path: Path


def find_videos(inputs: Iterable[str | Path]) -> list[VideoFile]:
    """All videos behind ``inputs``, in order, each file once.

    A folder stands for every video file below it (by suffix, sorted; links that lead nowhere among them), a ``.txt`` or
    ``.lst`` file for the paths on its lines (relative to the list's folder; ``id<tab>path`` sets the id; a ``#`` at the
    beginning of a line, or between spaces, starts a comment), anything else for itself, whether it exists or not:
    extraction reports what cannot be opened. The id is the file's stem; where stems collide it is the file name, and
    where those collide as well, the path.

    Raises
    ------
    VideoError : a folder or list without any video, an unreadable list, or one id for two files in a list.
    """
    found: dict[Path, str | None] = {}
    for item in map(Path, inputs):
        if item.is_dir():
            files = sorted(
                p for p in item.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir() and not _hidden(p, item)
            )
            if not files:
                raise VideoError(f"no video file below {item}; known suffixes: {' '.join(sorted(SUFFIXES))}")
            for file in files:
                found.setdefault(file, None)
        elif item.suffix.lower() in LIST_SUFFIXES:
            for path, video in _read_list(item):
                found[path] = video or found.get(path)
        else:
            found.setdefault(item, None)
    return _with_ids(found)


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _read_list(path: Path) -> list[tuple[Path, str | None]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VideoError(f"the list {path} cannot be read: {error}") from error
    entries: list[tuple[Path, str | None]] = []
    for line in lines:
        text = re.split(r"^#|(?<=\s)#\s", line.strip(), maxsplit=1)[0].strip()
        if text:
            video, tab, name = text.rpartition("\t")
            file = Path(name.strip()).expanduser()
            entries.append((file if file.is_absolute() else path.parent / file, video.strip() if tab else None))
    if not entries:
        raise VideoError(f"the list {path} names no video; put one path on each line")
    return entries


def _with_ids(found: dict[Path, str | None]) -> list[VideoFile]:
    given = [video for video in found.values() if video is not None]
    repeated = sorted(video for video, count in Counter(given).items() if count > 1)
    if repeated:
        raise VideoError(f"the list gives one id to several files: {', '.join(repeated[:5])}")
    ids = dict(found)
    for name_of in (lambda p: p.stem, lambda p: p.name, lambda p: p.as_posix().lstrip("./")):
        open_paths = [path for path, video in ids.items() if video is None]
        counts = Counter(
            [name_of(path) for path in open_paths] + [video for video in ids.values() if video is not None]
        )
        for path in open_paths:
            if counts[name_of(path)] == 1:
                ids[path] = name_of(path)
    return [VideoFile(video if video is not None else path.as_posix(), path) for path, video in ids.items()]
