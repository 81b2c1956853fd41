"""Which backend holds a store: found on disk, asked for, or told by its name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np

from tad.errors import StoreError
from tad.store.files import LocalFiles, Mode
from tad.store.remote import RemoteFiles

Format = Literal["zarr", "hdf5"]
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)")


class Backend(Protocol):
    """How entries lie on disk. Streams and videos are encoded names here."""

    format: Format
    files: Any
    cached_entries: int
    stamps_are_cheap: bool

    def where(self, stream: str = "", video: str = "") -> str: ...
    def root_attrs(self) -> dict[str, Any] | None: ...
    def create_root(self, attrs: Mapping[str, Any]) -> None: ...
    def streams(self) -> list[str]: ...
    def unreachable_streams(self) -> list[str]: ...
    def stream_attrs(self, stream: str) -> dict[str, Any] | None: ...
    def put_stream(self, stream: str, attrs: Mapping[str, Any]) -> bool: ...
    def videos(self, stream: str) -> list[str]: ...
    def stamp(self, stream: str, video: str) -> tuple[int, ...] | None: ...
    def entry_attrs(self, stream: str, video: str) -> dict[str, Any] | None: ...
    def put_entry(
        self, stream: str, video: str, arrays: Mapping[str, np.ndarray], attrs: Mapping[str, Any]
    ) -> None: ...
    def delete_entry(self, stream: str, video: str) -> None: ...
    def check_file(self, stream: str, video: str) -> None: ...
    def open_rows(self, stream: str, video: str, level: Mapping[str, Any], attrs: Mapping[str, Any]) -> Any: ...
    def stored_levels(self, stream: str, video: str) -> set[str]: ...
    def forget(self, stream: str = "", video: str = "") -> None: ...
    def link(self) -> None: ...
    def link_if_needed(self) -> None: ...
    def litter(self, min_age_s: float) -> list[str]: ...
    def remove_litter(self, key: str) -> None: ...


def _is_url(path: str) -> bool:
    return _URL.match(path) is not None


def place_of(path: str) -> str:
    """A URL as it is, a folder as an absolute path, so that workers with another current folder find it."""
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    if not path:
        raise StoreError("a store needs a path, got an empty one")
    return path if _is_url(path) else os.path.abspath(path)


def _found_format(place: str, options: Mapping[str, Any]) -> Format | None:
    if _is_url(place):
        return "zarr" if RemoteFiles(place, storage_options=options).stamp("zarr.json") is not None else None
    if os.path.isfile(place):
        raise StoreError(f"{place} is a file; a feature store is a folder (open the folder that holds store.h5)")
    if os.path.exists(os.path.join(place, "zarr.json")):
        return "zarr"
    return "hdf5" if os.path.exists(os.path.join(place, "__store__.json")) else None


def make_backend(format: Format, place: str, *, fsync: bool, options: Mapping[str, Any]) -> Backend:
    if format == "hdf5":
        from tad.store.hdf5_backend import Hdf5Backend

        return Hdf5Backend(LocalFiles(place, fsync=fsync))
    from tad.store.zarr_backend import ZarrBackend

    remote = _is_url(place)
    return ZarrBackend(RemoteFiles(place, storage_options=options) if remote else LocalFiles(place, fsync=fsync))


def choose_format(place: str, mode: Mode, wanted: Format | None, options: Mapping[str, Any]) -> Format:
    """The format of the store at ``place``, or of the one to be made there. Raises :class:`StoreError`."""
    if wanted not in (None, "zarr", "hdf5"):
        raise StoreError(f"{place}: format must be 'zarr' or 'hdf5', got {wanted!r}")
    found = _found_format(place, options)
    if found is None and mode == "r":
        there = "there is a folder without zarr.json or __store__.json" if os.path.exists(place) else "nothing is there"
        raise StoreError(f"{place} is no feature store: {there}; open_store(path, 'a') makes one")
    if found and wanted and found != wanted:
        raise StoreError(f"{place} is a {found} store, not {wanted}; leave the format out or choose another path")
    by_name: Format = "hdf5" if place.endswith((".h5", ".hdf5", "-h5")) and not _is_url(place) else "zarr"
    chosen = found or wanted or by_name
    if chosen == "hdf5" and _is_url(place):
        raise StoreError(f"{place}: HDF5 stores lie on local disks only; use format='zarr' for a URL")
    return chosen
