"""Zarr v3: a group per entry, an array per level, everything of an array in one object; local or behind a URL.

::

    <store>/zarr.json                                 encoding-type, encoding-version, created_by
    <store>/<stream>/zarr.json                        spec, fingerprint
    <store>/<stream>/<video>/zarr.json                the entry's attributes; the entry exists if and only if this does
    <store>/<stream>/<video>/<level>/zarr.json        shape, dtype, chunks
    <store>/<stream>/<video>/<level>/c.0.0            one chunk, or one shard of chunks, each with a CRC-32C
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np

from tad.errors import StoreError
from tad.store.files import TEMPORARY, WORK_FOLDER, Files, Found, LocalFiles, is_older
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
    sealed,
)
from tad.store.names import decode_name
from tad.store.remote import RemoteFiles, reaching

_NODE = "zarr.json"


class ZarrRows:
    """The rows of one stored level; :meth:`read` gives them as they were written or raises one of ``DAMAGE``."""

    def __init__(self, files: Files, array: Any, key: str, *, look_each_time: bool) -> None:
        self.files, self.array, self.key, self.look_each_time = files, array, key, look_each_time
        self._look()

    def _look(self) -> None:
        # Zarr hands out the fill value where an object is missing, in silence before zarr-python 3.2.
        if self.files.stamp(self.key) is None:
            raise Damaged(f"{self.files.where(self.key)} is missing")

    def read(self, start: int, stop: int) -> np.ndarray:
        if self.look_each_time:
            self._look()
        with _reaching(self.files, self.key):
            rows = np.asarray(self.array[start:stop])
        if rows.dtype.kind == "f" and np.isnan(rows.reshape(len(rows), -1)[:, 0]).any():
            raise Damaged(f"{self.files.where(self.key)} lacks a chunk of the rows {start} to {stop}")
        if rows.dtype.kind != "f" and not rows.any():
            self._look()  # of integers zero is the fill value, and black frames are zeros as well
        return rows


class ZarrBackend:
    """Names here are encoded ones; ids are the business of :class:`tad.store.api.Store`."""

    format: Literal["zarr", "hdf5"] = "zarr"
    cached_entries = 512

    def __init__(self, files: LocalFiles | RemoteFiles) -> None:
        self.files = files
        self.stamps_are_cheap = files.stamps_are_cheap
        self._opened: Any = None

    def where(self, stream: str = "", video: str = "") -> str:
        return self.files.where("/".join(part for part in (stream, video) if part))

    # ---- root and streams ------------------------------------------------------------------------
    def root_attrs(self) -> dict[str, Any] | None:
        return self._attrs("", STORE)

    def create_root(self, attrs: Mapping[str, Any]) -> None:
        self.files.write_new(_NODE, _group(attrs))

    def streams(self) -> list[str]:
        return self.files.names("", _NODE)

    def unreachable_streams(self) -> list[str]:
        """Folders with entries, but without the stream's own metadata."""
        return [name for name in set(self.files.folders()) - set(self.streams()) if self.files.names(name, _NODE)]

    def stream_attrs(self, stream: str) -> dict[str, Any] | None:
        return self._attrs(stream, STREAM)

    def put_stream(self, stream: str, attrs: Mapping[str, Any]) -> bool:
        return self.files.write_new(f"{stream}/{_NODE}", _group(attrs))

    def _attrs(self, prefix: str, kind: str) -> dict[str, Any] | None:
        data = self.files.read(f"{prefix}/{_NODE}" if prefix else _NODE)
        return None if data is None else _group_attrs(data, kind, where=self.files.where(prefix))

    # ---- entries ---------------------------------------------------------------------------------
    def videos(self, stream: str) -> list[str]:
        return self.files.names(stream, _NODE)

    def stamp(self, stream: str, video: str) -> tuple[int, ...] | None:
        return self.files.stamp(f"{stream}/{video}/{_NODE}")

    def entry_attrs(self, stream: str, video: str) -> dict[str, Any] | None:
        return self._attrs(f"{stream}/{video}", ENTRY)

    def put_entry(self, stream: str, video: str, arrays: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> None:
        objects = [_array_objects(level, array) for level, array in arrays.items()]
        items = {key: data for part in objects for key, data in part.items()}
        attrs = sealed({**attrs, "metadata_sha256": {level: _sha256(items[f"{level}/{_NODE}"]) for level in arrays}})
        metadata_last = sorted(items, key=lambda key: key.endswith(_NODE))
        self.files.commit(f"{stream}/{video}", {key: items[key] for key in metadata_last} | {_NODE: _group(attrs)})

    def check_file(self, stream: str, video: str) -> None:
        """Every object has its own checksum; there is nothing to check as a whole."""

    def delete_entry(self, stream: str, video: str) -> None:
        self.files.remove(f"{stream}/{video}", _NODE)

    def open_rows(self, stream: str, video: str, level: Mapping[str, Any], attrs: Mapping[str, Any]) -> ZarrRows:
        """The stored array of ``level`` in the entry with ``attrs``. Raises one of ``DAMAGE`` if it is another one."""
        import zarr

        key, shape = f"{stream}/{video}/{level['path']}", tuple(level["shape"])
        recorded = attrs.get("metadata_sha256", {}).get(level["path"])
        if recorded is not None and _sha256(self.files.read(f"{key}/{_NODE}") or b"") != recorded:
            raise Damaged(f"{self.files.where(key)}/{_NODE} is missing or not what was written")
        with _reaching(self.files, key):
            array = zarr.open_array(self._zarr_store(), path=key, mode="r")
        if tuple(array.shape) != shape or array.dtype.name != level["dtype"]:
            raise Damaged(f"{self.files.where(key)} is {array.dtype} {array.shape}, its entry says {level}")
        return ZarrRows(self.files, array, f"{key}/{_chunk_key(len(shape))}", look_each_time=self.stamps_are_cheap)

    def stored_levels(self, stream: str, video: str) -> set[str]:
        prefix = f"{stream}/{video}/"
        parts = [found.key.removeprefix(prefix).split("/") for found in self.files.tree(prefix.rstrip("/"))]
        return {level for level, *rest in parts if rest == [_NODE]}

    def _zarr_store(self) -> Any:
        from zarr.storage import FsspecStore, LocalStore

        if self._opened is None:
            files = self.files
            if isinstance(files, LocalFiles):
                self._opened = LocalStore(files.root, read_only=True)
            else:
                self._opened = FsspecStore.from_url(files.url, storage_options=files.storage_options, read_only=True)
        return self._opened

    def forget(self, stream: str = "", video: str = "") -> None:
        """No handle is held open between reads."""

    def link(self) -> None:
        """Nothing is derived from the entries but the catalogue."""

    link_if_needed = link

    # ---- what crashes leave behind ---------------------------------------------------------------
    def litter(self, min_age_s: float) -> list[str]:
        """Keys of temporary files, work folders and uncommitted entries not touched for ``min_age_s`` seconds."""
        found = [
            item.key for item in self.files.loose() if TEMPORARY.search(item.key) and is_older(item.written, min_age_s)
        ]
        for stream in self.streams():
            committed = set(self.videos(stream))
            parts: dict[str, list[Found]] = {}
            for item in self.files.tree(stream):
                parts.setdefault(item.key.split("/")[1], []).append(item)
            for name, items in parts.items():
                if name in committed:
                    found += [i.key for i in items if TEMPORARY.search(i.key) and is_older(i.written, min_age_s)]
                elif _is_litter(name, items) and all(is_older(item.written, min_age_s) for item in items):
                    found.append(f"{stream}/{name}")
        return sorted(found)

    def remove_litter(self, key: str) -> None:
        if TEMPORARY.search(key) and not WORK_FOLDER.search(key):
            self.files.delete(key)
        else:
            self.files.remove(key, _NODE, unless_committed=True)


def _reaching(files: Files, key: str) -> AbstractContextManager[None]:
    """Around what zarr-python reads by itself: a server that does not answer is no damage."""
    return reaching(files.where(key)) if isinstance(files, RemoteFiles) else nullcontext()


def _is_litter(name: str, items: list[Found]) -> bool:
    """Whether an uncommitted thing in a stream is ours: a temporary file, a work folder, or parts of an entry."""
    if TEMPORARY.search(name) or WORK_FOLDER.fullmatch(name):
        return True
    if decode_name(name) is None:
        return False
    files = [item.key.split("/")[2:] for item in items if not item.is_folder]
    ours = all(
        (len(rest) == 2 and (rest[1] == _NODE or rest[1].startswith("c."))) or (rest and TEMPORARY.search(rest[-1]))
        for rest in files
    )
    return ours and all(item.is_folder for item in items if item.key.count("/") == 1)


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _group(attrs: Mapping[str, Any]) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": dict(attrs)}, indent=1).encode()


def _group_attrs(data: bytes, kind: str, *, where: str) -> dict[str, Any]:
    try:
        node = json.loads(data)
        attrs = node["attributes"] if node["node_type"] == "group" and node["zarr_format"] == 3 else None
    except DAMAGE as error:
        raise StoreError(f"{where}/{_NODE} is not the metadata of a Zarr group ({describe(error)})") from error
    return check_encoding(attrs, kind, where=where)


def _chunk_key(ndim: int) -> str:
    return "c" + ".0" * ndim


def _array_objects(level: str, array: np.ndarray) -> dict[str, memoryview]:
    """The objects of one array, made in memory: the chunk or shard, and its zarr.json."""
    import zarr
    from zarr.codecs import Crc32cCodec
    from zarr.storage import MemoryStore

    rows = chunk_rows(array.shape, array.dtype.itemsize)
    chunks = math.ceil(len(array) / rows)
    made: dict[str, Any] = {}
    target = zarr.create_array(
        MemoryStore(made),
        name=level,
        shape=array.shape,
        dtype=array.dtype,
        chunks=(rows, *array.shape[1:]),
        shards=(chunks * rows, *array.shape[1:]) if chunks > 1 else None,  # one chunk alone needs no index
        filters=None,
        compressors=[Crc32cCodec()],
        fill_value=math.nan if array.dtype.kind == "f" else 0,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=dimension_names(level, array.ndim),
        config={"write_empty_chunks": True},  # a chunk of zeros must be there, or it could not be told from a lost one
    )
    target[...] = array
    return {key: memoryview(data.as_numpy_array()) for key, data in made.items() if key.startswith(f"{level}/")}
