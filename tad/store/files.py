"""Named bytes with atomic writes: a folder (:class:`LocalFiles`) or anything that fsspec reaches (:class:`RemoteFiles`).

Keys are relative paths with ``/``. Whole trees (an entry of a Zarr store) are committed so that no reader ever sees a part:
locally by renaming a finished folder, remotely by putting the key that makes the tree visible last.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from tad.errors import StoreError

Mode = Literal["r", "a"]
TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.(tmp|partial)$")  # ours, and zarr-python's own
WORK_FOLDER = re.compile(r"__[0-9a-f]{32}\.tmp$")  # where local trees are made and thrown away; ids never begin with "__"
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


class Found(NamedTuple):
    """One thing below a prefix: its key, when it was last written (seconds since 1970, None if unknown), whether a folder."""

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
    def stamp(self, key: str) -> Hashable | None: ...
    def names(self, prefix: str, marker: str) -> list[str]: ...
    def folders(self) -> list[str]: ...
    def tree(self, prefix: str) -> Iterator[Found]: ...
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

    def stamp(self, key: str) -> Hashable | None:
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

    def commit(self, prefix: str, items: Mapping[str, Any]) -> None:
        """Make ``prefix`` hold exactly ``items`` (relative key → buffer), at once, in place of whatever is there.

        The tree is written beside its target and renamed. Of several processes that do this, the last one stands, whole.
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


class RemoteFiles:
    """A URL that fsspec understands. Each put is atomic, as object stores have it; there is nothing across keys."""

    stamps_are_cheap = False

    def __init__(self, url: str, *, storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = url.rstrip("/")
        self.storage_options = dict(storage_options or {})
        self.fs, self.root = self._connect()

    def _connect(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        scheme = self.url.split("://")[0]
        try:
            fs, root = url_to_fs(self.url, **self.storage_options)
        except ImportError as error:
            extra = "pip install 'tad-pipeline[s3]'" if scheme in ("s3", "s3a") else f"install it: {error}"
            raise StoreError(f"{self.url}: reading {scheme}:// needs a package that is not installed; {extra}") from error
        except ValueError as error:
            raise StoreError(f"{self.url}: not a URL that can hold a store: {error}") from error
        return fs, root.rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "storage_options": self.storage_options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.url, self.storage_options = state["url"], state["storage_options"]
        self.fs, self.root = self._connect()

    def where(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}" if key else self.root

    def read(self, key: str) -> bytes | None:
        try:
            return bytes(self.fs.cat_file(self._path(key)))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def write(self, key: str, data: Any) -> None:
        self.fs.pipe_file(self._path(key), bytes(data))

    def write_new(self, key: str, data: bytes) -> bool:
        if self.fs.exists(self._path(key)):
            return False
        self.write(key, data)
        return True

    def delete(self, key: str) -> None:
        try:
            self.fs.rm_file(self._path(key))
        except FileNotFoundError:
            return

    def stamp(self, key: str) -> Hashable | None:
        self.fs.invalidate_cache()
        return True if self.fs.exists(self._path(key)) else None

    def names(self, prefix: str, marker: str) -> list[str]:
        if not prefix:  # few folders with very much below them
            return [name for name in self.folders() if self.fs.exists(self._path(f"{name}/{marker}"))]
        depth = len(prefix.split("/")) + 2
        keys = (found.key.split("/") for found in self.tree(prefix))
        return [parts[-2] for parts in keys if len(parts) == depth and parts[-1] == marker]

    def folders(self) -> list[str]:
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.root, detail=True)
        except FileNotFoundError:
            return []
        return [item["name"].rstrip("/").rsplit("/", 1)[-1] for item in found if item["type"] == "directory"]

    def tree(self, prefix: str) -> Iterator[Found]:
        self.fs.invalidate_cache()
        try:
            details = self.fs.find(self._path(prefix), detail=True)
        except FileNotFoundError:
            return
        for path, detail in details.items():
            yield Found(path[path.index(self.root) + len(self.root) + 1 :], _written(detail))

    def commit(self, prefix: str, items: Mapping[str, Any]) -> None:
        """Make ``prefix`` hold exactly ``items``, in their order: the last key is the one that makes it visible.

        Writers of the same entry that put different bytes may leave a mixture, which ``verify`` finds by its SHA-256.
        """
        visible = list(items)[-1]
        self.delete(f"{prefix}/{visible}")
        for stale in {found.key for found in self.tree(prefix)} - {f"{prefix}/{key}" for key in items}:
            self.delete(stale)
        for key, data in items.items():
            self.write(f"{prefix}/{key}", data)

    def remove(self, prefix: str, marker: str, *, unless_committed: bool = False) -> None:
        if unless_committed and self.stamp(f"{prefix}/{marker}") is not None:
            return
        self.delete(f"{prefix}/{marker}")
        for found in list(self.tree(prefix)):
            self.delete(found.key)


def _written(detail: Mapping[str, Any]) -> float | None:
    for key in ("LastModified", "mtime", "modified", "updated", "created", "last_modified"):
        value = detail.get(key)
        if hasattr(value, "timestamp"):
            return float(value.timestamp())
        if isinstance(value, int | float):
            return float(value)
    return None


def is_older(written: float | None, age_s: float) -> bool:
    """Whether something was last written more than ``age_s`` seconds ago; an unknown time counts only for ``age_s <= 0``."""
    return age_s <= 0 or (written is not None and time.time() - written > age_s)
