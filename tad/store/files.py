"""Named bytes with atomic writes, and the folder that holds them; ``remote.py`` has the same behind a URL.

Keys are relative paths with ``/``. Whole trees (an entry of a Zarr store) are committed so that no reader ever sees a
part: here by renaming a finished folder, remotely by putting the key that makes the tree visible last.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from tad.errors import StoreError

Mode = Literal["r", "a"]
TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.(tmp|partial)$")  # ours, and zarr-python's own
WORK_FOLDER = re.compile(
    r"__[0-9a-f]{32}\.tmp$"
)  # where local trees are made and thrown away; ids never begin with "__"
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


class Found(NamedTuple):
    """One thing below a prefix: its key, when it was last written (seconds since 1970, None if unknown)."""

    key: str
    written: float | None
    is_folder: bool = False


class Files(Protocol):
    """What the Zarr backend needs of a place."""

    def where(self, key: str) -> str: ...
    def read(self, key: str) -> bytes | None: ...
    def write(self, key: str, data: bytes) -> None: ...
    def write_new(self, key: str, data: bytes) -> bool: ...
    def delete(self, key: str) -> None: ...
    def stamp(self, key: str) -> tuple[int, ...] | None: ...
    def names(self, prefix: str, marker: str) -> list[str]: ...
    def folders(self) -> list[str]: ...
    def tree(self, prefix: str) -> Iterator[Found]: ...
    def loose(self) -> list[Found]: ...
    def commit(self, prefix: str, items: Mapping[str, Any]) -> None: ...
    def remove(self, prefix: str, marker: str, *, unless_committed: bool = False) -> None: ...


class LocalFiles:
    """A folder. ``fsync`` makes every write reach the disk before it becomes visible."""

    stamps_are_cheap = True

    def __init__(self, root: str | Path, *, fsync: bool = False) -> None:
        self.root = os.path.abspath(root)
        self.fsync = fsync

    def where(self, key: str) -> str:
        return os.path.join(self.root, key) if key else self.root

    def read(self, key: str) -> bytes | None:
        try:
            with open(self.where(key), "rb") as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"{self.where(key)} cannot be read: {error.strerror or error}") from error

    def write(self, key: str, data: bytes) -> None:
        """Atomic: readers see the old bytes or the new ones."""
        target = self.where(key)
        temporary = self._temporary(target, data)
        os.replace(temporary, target)
        self._sync_folder(os.path.dirname(target))

    def write_new(self, key: str, data: bytes) -> bool:
        """Atomic, and False without touching it when ``key`` exists, even if another process makes it right now."""
        target = self.where(key)
        temporary = self._temporary(target, data)
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links: the check and the move are two steps then
            if os.path.exists(target):
                return False
            os.replace(temporary, target)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
        self._sync_folder(os.path.dirname(target))
        return True

    def delete(self, key: str) -> None:
        Path(self.where(key)).unlink(missing_ok=True)

    def stamp(self, key: str) -> tuple[int, ...] | None:
        """What tells one version of ``key`` from the next; None when it is absent."""
        try:
            status = os.stat(self.where(key))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size

    def names(self, prefix: str, marker: str) -> list[str]:
        """Folders directly below ``prefix`` that hold a file ``marker``, unsorted, as they are called on disk."""
        base = self.where(prefix)
        if not os.path.isdir(base):
            return []
        with os.scandir(base) as found:
            return [item.name for item in found if os.path.exists(os.path.join(item.path, marker))]

    def folders(self) -> list[str]:
        if not os.path.isdir(self.root):
            return []
        with os.scandir(self.root) as found:
            return [item.name for item in found if item.is_dir()]

    def tree(self, prefix: str) -> Iterator[Found]:
        """Everything below ``prefix``, folders included; what vanishes meanwhile is left out."""
        for folder, folders, files in os.walk(self.where(prefix)):
            for name in folders + files:
                path = os.path.join(folder, name)
                try:
                    written = os.lstat(path).st_mtime
                except FileNotFoundError:
                    continue
                yield Found(os.path.relpath(path, self.root).replace(os.sep, "/"), written, name in folders)

    def loose(self) -> list[Found]:
        """The files that lie in the root itself."""
        with os.scandir(self.root) as found:
            return [Found(item.name, item.stat().st_mtime) for item in found if item.is_file()]

    def commit(self, prefix: str, items: Mapping[str, Any]) -> None:
        """Make ``prefix`` hold exactly ``items`` (relative key → buffer), at once, in place of whatever is there.

        The tree is written beside its target and renamed. Of several processes that do this, the last one stands.
        """
        target = self.where(prefix)
        work = self._work_folder(os.path.dirname(target))
        made = os.path.join(work, "made")
        try:
            os.mkdir(made)
            for key, data in items.items():
                path = os.path.join(made, key)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                self._put(path, data)
            for folder, _, _ in os.walk(made):
                self._sync_folder(folder)
            self._swap_in(made, target, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        self._sync_folder(os.path.dirname(target))

    def _swap_in(self, made: str, target: str, work: str) -> None:
        while True:
            try:
                os.rename(made, target)
                return
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
            try:
                os.rename(target, os.path.join(work, uuid.uuid4().hex))
            except FileNotFoundError:
                continue  # another process moved it away in the same moment

    def remove(self, prefix: str, marker: str, *, unless_committed: bool = False) -> None:
        """Make ``prefix`` vanish at once. ``unless_committed`` puts it back if it turns out to hold ``marker``."""
        target = self.where(prefix)
        work = self._work_folder(os.path.dirname(target))
        moved = os.path.join(work, "moved")
        try:
            try:
                os.rename(target, moved)
            except FileNotFoundError:
                return
            if unless_committed and os.path.exists(os.path.join(moved, marker)):
                try:
                    os.rename(moved, target)
                except OSError as error:
                    if error.errno not in _TAKEN:
                        raise
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _work_folder(self, parent: str) -> str:
        work = os.path.join(parent, f"__{uuid.uuid4().hex}.tmp")
        os.mkdir(work)
        return work

    def _temporary(self, target: str, data: bytes) -> str:
        temporary = f"{target}.{uuid.uuid4().hex}.tmp"
        os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            self._put(temporary, data)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
        return temporary

    def _put(self, path: str, data: Any) -> None:
        with open(path, "wb") as file:
            file.write(data)
            if self.fsync:
                file.flush()
                os.fsync(file.fileno())

    def _sync_folder(self, path: str) -> None:
        if self.fsync:
            sync_path(path)


def sync_path(path: str) -> None:
    """fsync of a file or folder by its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_older(written: float | None, age_s: float) -> bool:
    """Whether something was written more than ``age_s`` seconds ago; an unknown time only if ``age_s <= 0``."""
    return age_s <= 0 or (written is not None and time.time() - written > age_s)


def replaced(path: Path, write: Callable[[Path], Any]) -> None:
    """Have ``write`` make a file beside ``path``, then give it this name at once."""
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
