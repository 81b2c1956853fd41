"""Named bytes behind a URL, by fsspec: object stores, other machines, memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from tad.errors import StoreError
from tad.store.files import Found

# What the libraries behind fsspec raise beside OSError when a server is not reached, refuses, or breaks off.
LIBRARY_ERRORS = {
    "aiohttp": ("ClientError",),
    "azure.core.exceptions": ("AzureError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
}


def _errors() -> tuple[type[BaseException], ...]:
    """OSError, and those of :data:`LIBRARY_ERRORS` whose libraries are loaded: no others can have been raised."""
    loaded = ((sys.modules.get(module), names) for module, names in LIBRARY_ERRORS.items())
    return (OSError, *(getattr(module, name) for module, names in loaded for name in names if hasattr(module, name)))


@contextmanager
def reaching(where: str) -> Iterator[None]:
    """Make whatever a server or the way to it does wrong a :class:`StoreError`; absent keys stay ``FileNotFoundError``.

    So the loss of a connection is never taken for a damaged entry, nor for one that is not there.
    """
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise
    except _errors() as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise StoreError(
            f"{where} cannot be reached: {text}. Check the connection, the endpoint and the credentials, and run the "
            "same again"
        ) from error


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
            raise StoreError(
                f"{self.url}: reading {scheme}:// needs a package that is not installed; {extra}"
            ) from error
        except ValueError as error:
            raise StoreError(f"{self.url}: not a URL that can hold a store: {error}") from error
        return fs, root.rstrip("/")

    def where(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}" if key else self.root

    def read(self, key: str) -> bytes | None:
        try:
            with reaching(self.where(key)):
                return bytes(self.fs.cat_file(self._path(key)))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def write(self, key: str, data: Any) -> None:
        with reaching(self.where(key)):
            self.fs.pipe_file(self._path(key), bytes(data))

    def write_new(self, key: str, data: bytes) -> bool:
        if self._exists(key):
            return False
        self.write(key, data)
        return True

    def delete(self, key: str) -> None:
        try:
            with reaching(self.where(key)):
                self.fs.rm_file(self._path(key))
        except FileNotFoundError:
            return

    def _exists(self, key: str) -> bool:
        with reaching(self.where(key)):
            return bool(self.fs.exists(self._path(key)))

    def stamp(self, key: str) -> tuple[int, ...] | None:
        self.fs.invalidate_cache()
        return () if self._exists(key) else None

    def names(self, prefix: str, marker: str) -> list[str]:
        if not prefix:  # few folders with very much below them
            return [name for name in self.folders() if self._exists(f"{name}/{marker}")]
        depth = len(prefix.split("/")) + 2
        keys = (found.key.split("/") for found in self.tree(prefix))
        return [parts[-2] for parts in keys if len(parts) == depth and parts[-1] == marker]

    def folders(self) -> list[str]:
        self.fs.invalidate_cache()
        try:
            with reaching(self.url):
                found = self.fs.ls(self.root, detail=True)
        except FileNotFoundError:
            return []
        return [item["name"].rstrip("/").rsplit("/", 1)[-1] for item in found if item["type"] == "directory"]

    def tree(self, prefix: str) -> Iterator[Found]:
        self.fs.invalidate_cache()
        try:
            with reaching(self.where(prefix)):
                details = self.fs.find(self._path(prefix), detail=True)
        except FileNotFoundError:
            return
        for path, detail in details.items():
            yield Found(path[path.index(self.root) + len(self.root) + 1 :], _written(detail))

    def loose(self) -> list[Found]:
        """Nothing to look for: a put leaves no temporary file."""
        return []

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
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None
