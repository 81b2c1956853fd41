"""HDF5: a file per entry, a dataset per level, and ``store.h5`` that links them all; local file systems only.

::

    <store>/__store__.json                encoding-type, encoding-version, created_by
    <store>/<stream>/__stream__.json      spec, fingerprint
    <store>/<stream>/<video>.h5           root attributes = the entry's; one dataset per level, chunked, Fletcher-32;
                                          in front a user block of 512 bytes with the SHA-256 of the rest
    <store>/store.h5                      derived: a group per stream, an external link per entry; rewritten whole

Attributes that are not text, a number or a truth value are JSON text; the attribute ``json-attrs`` lists their names.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np

from tad.errors import StoreError
from tad.store.files import TEMPORARY, LocalFiles, is_older, sync_path
from tad.store.layout import (
    DAMAGE,
    ENTRY,
    STORE,
    STREAM,
    Damaged,
    check_encoding,
    chunk_rows,
    describe,
    dimension_names,
    parse_attrs,
    sealed,
)

LOOKS = 100  # the last to replace store.h5 must have seen all entries, however many processes write at once
_ROOT, _STREAM, _MASTER, _SUFFIX = "__store__.json", "__stream__.json", "store.h5", ".h5"
_JSON_ATTRS = "json-attrs"
_BLOCK = 512  # HDF5's user block, in front of the file proper: the SHA-256 of everything behind it
_SMALL = (
    1 << 17
)  # bytes; smaller files are mostly HDF5's own structures, and damage there can abort or hang the library
_ATTRIBUTE_BYTES = 64_000  # what HDF5 takes in an object header, less some room


class Hdf5Rows:
    """The rows of one stored level; :meth:`read` gives them as they were written or raises one of ``DAMAGE``."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self.dataset[start:stop])


class Hdf5Backend:
    """Names here are encoded ones; ids are the business of :class:`tad.store.api.Store`."""

    format: Literal["zarr", "hdf5"] = "hdf5"
    cached_entries = 128  # each is an open file
    stamps_are_cheap = True

    def __init__(self, files: LocalFiles) -> None:
        self.files = files
        self._open: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = Lock()

    def where(self, stream: str = "", video: str = "") -> str:
        return self.files.where(f"{stream}/{video}{_SUFFIX}" if video else stream)

    # ---- root and streams ------------------------------------------------------------------------
    def root_attrs(self) -> dict[str, Any] | None:
        data = self.files.read(_ROOT)
        return None if data is None else parse_attrs(data, STORE, where=self.files.where(_ROOT))

    def create_root(self, attrs: Mapping[str, Any]) -> None:
        self.files.write_new(_ROOT, _json(attrs))
        self.link()

    def streams(self) -> list[str]:
        return self.files.names("", _STREAM)

    def unreachable_streams(self) -> list[str]:
        """Folders with entries, but without the stream's own metadata."""
        return [name for name in set(self.files.folders()) - set(self.streams()) if self.videos(name)]

    def stream_attrs(self, stream: str) -> dict[str, Any] | None:
        data = self.files.read(f"{stream}/{_STREAM}")
        return None if data is None else parse_attrs(data, STREAM, where=self.files.where(stream))

    def put_stream(self, stream: str, attrs: Mapping[str, Any]) -> bool:
        native_attrs(attrs, where=self.files.where(stream))  # store.h5 will have to hold them
        return self.files.write_new(f"{stream}/{_STREAM}", _json(attrs))

    # ---- entries ---------------------------------------------------------------------------------
    def videos(self, stream: str) -> list[str]:
        with os.scandir(self.files.where(stream)) as found:
            return [item.name.removesuffix(_SUFFIX) for item in found if item.name.endswith(_SUFFIX)]

    def stamp(self, stream: str, video: str) -> tuple[int, ...] | None:
        return self.files.stamp(f"{stream}/{video}{_SUFFIX}")

    def entry_attrs(self, stream: str, video: str) -> dict[str, Any] | None:
        where = self.where(stream, video)
        try:
            return check_encoding(_read_attrs(self._file(stream, video).attrs), ENTRY, where=where)
        except FileNotFoundError:
            return None
        except DAMAGE as error:
            raise StoreError(f"{where} cannot be read ({describe(error)})") from error

    def put_entry(self, stream: str, video: str, arrays: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> None:
        import h5py

        target = self.where(stream, video)
        temporary = f"{target}.{uuid.uuid4().hex}.tmp"
        try:
            with h5py.File(temporary, "w", locking=False, userblock_size=_BLOCK) as file:
                write_attrs(file.attrs, sealed(attrs), where=target)
                for level, array in arrays.items():
                    rows = chunk_rows(array.shape, array.dtype.itemsize)
                    chunks = (rows, *array.shape[1:])
                    dataset = file.create_dataset(level, data=array, chunks=chunks, fletcher32=True)
                    for dimension, name in zip(dataset.dims, dimension_names(level, array.ndim), strict=True):
                        dimension.label = name
            seal(temporary)
            sync_path(temporary)
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)
        if self.files.fsync:
            sync_path(os.path.dirname(target))

    def check_file(self, stream: str, video: str) -> None:
        """Raise ``Damaged`` unless every byte of the entry's file is as it was written."""
        check_seal(self.where(stream, video))

    def delete_entry(self, stream: str, video: str) -> None:
        self.files.delete(f"{stream}/{video}{_SUFFIX}")

    def open_rows(self, stream: str, video: str, level: Mapping[str, Any], attrs: Mapping[str, Any]) -> Hdf5Rows:
        """The stored dataset of ``level``. Raises one of ``DAMAGE`` if it is another one."""
        dataset = self._file(stream, video)[level["path"]]
        if list(dataset.shape) != level["shape"] or dataset.dtype.name != level["dtype"]:
            where = f"{self.where(stream, video)}/{level['path']}"
            raise Damaged(f"{where} is {dataset.dtype} {dataset.shape}, its entry says {level}")
        return Hdf5Rows(dataset)

    def stored_levels(self, stream: str, video: str) -> set[str]:
        return set(self._file(stream, video))

    def _file(self, stream: str, video: str) -> Any:
        """An open file; never one that was opened before a fork (the store starts afresh then)."""
        import h5py

        key = (stream, video)
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
                return self._open[key]
        path = self.where(stream, video)
        if os.path.getsize(path) <= _SMALL:
            check_seal(path)
        file = h5py.File(path, "r", locking=False)  # it never changes, and flock fails on some network disks
        with self._lock:
            self._open[key] = file
            while len(self._open) > self.cached_entries:
                self._open.popitem(last=False)  # dropped, not closed: another thread may be reading it
        return file

    def forget(self, stream: str = "", video: str = "") -> None:
        """Drop the handles of one entry, or all."""
        with self._lock:
            if video:
                self._open.pop((stream, video), None)
            else:
                self._open.clear()

    # ---- store.h5 --------------------------------------------------------------------------------
    def link(self) -> None:
        """Rewrite ``store.h5`` from the folders, and look again: an entry may have come while it was written."""
        for _ in range(LOOKS):
            found = self._scan()
            self._write_master(found)
            if self._scan() == found:
                return

    def link_if_needed(self) -> None:
        """Rewrite ``store.h5`` unless it links just what is there, whoever wrote it."""
        if self._linked() != self._scan():
            self.link()

    def _linked(self) -> dict[str, list[str]] | None:
        """What ``store.h5`` links; None when there is none that can be read."""
        import h5py

        try:
            with h5py.File(self.files.where(_MASTER), "r", locking=False) as file:
                return {stream: sorted(group) for stream, group in file.items()}
        except DAMAGE:
            return None

    def _scan(self) -> dict[str, list[str]]:
        return {stream: sorted(self.videos(stream)) for stream in sorted(self.streams())}

    def _write_master(self, found: Mapping[str, list[str]]) -> None:
        import h5py

        target = self.files.where(_MASTER)
        temporary = f"{target}.{uuid.uuid4().hex}.tmp"
        try:
            with h5py.File(temporary, "w", locking=False) as file:
                write_attrs(file.attrs, self.root_attrs() or {}, where=target)
                for stream, videos in found.items():
                    group = file.create_group(stream)
                    write_attrs(group.attrs, self.stream_attrs(stream) or {}, where=f"{target}/{stream}")
                    for video in videos:
                        group[video] = h5py.ExternalLink(f"{stream}/{video}{_SUFFIX}", "/")
            if self.files.fsync:
                sync_path(temporary)
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)

    # ---- what crashes leave behind ---------------------------------------------------------------
    def litter(self, min_age_s: float) -> list[str]:
        """Keys of temporary files that were left alone for ``min_age_s`` seconds."""
        found = self.files.loose() + [item for stream in self.streams() for item in self.files.tree(stream)]
        return sorted(
            item.key
            for item in found
            if not item.is_folder and TEMPORARY.search(item.key) and is_older(item.written, min_age_s)
        )

    def remove_litter(self, key: str) -> None:
        self.files.delete(key)


def _head(file: io.BufferedIOBase) -> bytes:
    """What the user block of an open file has to be: JSON text, padded with zeros."""
    file.seek(_BLOCK)
    head = {"encoding-type": ENTRY, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return json.dumps(head).encode().ljust(_BLOCK, b"\0")


def seal(path: str) -> None:
    """Write the digest of a finished file into its user block."""
    with open(path, "r+b") as file:
        head = _head(file)
        file.seek(0)
        file.write(head)


def check_seal(path: str) -> None:
    """Compare a file with the digest in its user block; files of other makers, without a user block, pass."""
    with open(path, "rb") as file:
        found = file.read(_BLOCK)
        if not found.startswith(b"\x89HDF") and found != _head(file):
            raise Damaged(f"{path} is not what was written (SHA-256 differs)")


def _json(attrs: Mapping[str, Any]) -> bytes:
    return json.dumps(attrs, indent=1).encode()


def write_attrs(target: Any, attrs: Mapping[str, Any], *, where: str) -> None:
    for name, value in native_attrs(attrs, where=where).items():
        target[name] = value


def native_attrs(attrs: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """``attrs`` as HDF5 takes them, ``json-attrs`` with them. Raises :class:`StoreError` for one that is too long."""
    as_json = [name for name, value in attrs.items() if not _is_native(value)]
    native = {name: json.dumps(value) if name in as_json else value for name, value in attrs.items()}
    native[_JSON_ATTRS] = json.dumps(as_json)
    for name, value in native.items():
        text = value if isinstance(value, str) else ""
        if len(name.encode("utf-8", "replace")) + len(text.encode()) > _ATTRIBUTE_BYTES:
            raise StoreError(
                f"{where}: the attribute {name[:60]!r} is {len(text)} characters long; HDF5 takes 64 KB an attribute"
            )
    return native


def _is_native(value: Any) -> bool:
    if isinstance(value, str):
        try:
            return b"\0" not in value.encode("utf-8")
        except UnicodeEncodeError:
            return False
    return isinstance(value, bool | float) or (isinstance(value, int) and -(2**63) <= value < 2**63)


def _read_attrs(stored: Any) -> dict[str, Any]:
    as_json = set(json.loads(stored[_JSON_ATTRS]))
    values = {name: value.item() if isinstance(value, np.generic) else value for name, value in stored.items()}
    return {name: json.loads(v) if name in as_json else v for name, v in values.items() if name != _JSON_ATTRS}
