"""open_store and Store: one interface over Zarr and HDF5."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from tad.errors import StoreError, did_you_mean
from tad.store import layout
from tad.store.backend import Backend, Format, choose_format, make_backend, place_of
from tad.store.feature import Feature, level_of
from tad.store.files import Mode
from tad.store.fingerprint import plain, spec_differences
from tad.store.layout import DAMAGE, Level, describe
from tad.store.names import decode_name, encode_name

if TYPE_CHECKING:
    import pandas as pd

    from tad.store.verify import VerifyReport

GC_AGE_S = 900.0  # what a writer that is still alive may have left unfinished is younger


class _Entry(NamedTuple):
    """One committed entry as it was last seen: which version, its attributes, and the arrays opened so far."""

    stamp: tuple[int, ...] | None
    attrs: dict[str, Any]
    rows: dict[str, Any]


def open_store(
    path: str | Path,
    mode: Mode = "r",
    *,
    format: Format | None = None,
    fsync: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Store:
    """Open a feature store, a folder or a URL.

    Parameters
    ----------
    path : a folder, or a URL that fsspec understands (``s3://bucket/features.zarr``, Zarr only).
    mode : ``"r"`` reads what exists; ``"a"`` also writes, and makes the store if it is absent.
    format : for a new store; None chooses by name (``*.h5``, ``*.hdf5``, ``*-h5`` are HDF5) and takes Zarr otherwise.
    fsync : wait until every write has reached the disk.
    storage_options : handed to fsspec for URLs (credentials, endpoint).

    Raises
    ------
    StoreError : nothing is there (mode ``"r"``), it is no feature store, of another format, or of a newer version.
    """
    return Store(path, mode, format=format, fsync=fsync, storage_options=storage_options)


class Store:
    """A feature store; made by :func:`open_store`, closed by ``with`` or :meth:`close`.

    Entries are pairs (stream, video), written whole and never changed. Any number of processes may write different
    entries of one store at once. A Store may be pickled and survives a fork: handles are opened again there.
    """

    def __init__(
        self,
        path: str | Path,
        mode: Mode = "r",
        *,
        format: Format | None = None,
        fsync: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if mode not in ("r", "a"):
            raise StoreError(f"{path}: mode must be 'r' or 'a', got {mode!r}")
        self.path, self.mode, self.fsync = os.fspath(path), mode, fsync
        self.storage_options = dict(storage_options or {})
        self._place = place_of(self.path)
        self.format: Format = choose_format(self._place, mode, format, self.storage_options)
        self._closed = False
        self._start()
        if self._backend.root_attrs() is None:
            with self._writing("the store"):
                self._backend.create_root(layout.store_attrs())

    def _start(self) -> None:
        """A backend of this process, with no handle open."""
        self._pid = os.getpid()
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._streams: dict[str, dict[str, Any]] = {}
        self._lock = Lock()
        self._made: Backend = make_backend(self.format, self._place, fsync=self.fsync, options=self.storage_options)

    @property
    def _backend(self) -> Backend:
        if self._closed:
            raise StoreError(f"{self.path}: this store was closed; open it again")
        if self._pid != os.getpid():  # after a fork: neither HDF5 handles nor connections may be shared with the parent
            self._start()
        return self._made

    def __getstate__(self) -> dict[str, Any]:
        kept = ("path", "mode", "fsync", "storage_options", "format", "_place", "_closed")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({self.path!r}, mode={self.mode!r}, format={self.format!r})"

    def close(self) -> None:
        """Drop all handles; after writes to an HDF5 store, bring ``store.h5`` up to date."""
        if self._closed:
            return
        if self.mode == "a":
            with self._writing("store.h5"):
                self._backend.link_if_needed()
        self._backend.forget()
        self._entries.clear()
        self._closed = True

    # ---- streams ---------------------------------------------------------------------------------
    def create_stream(self, stream: str, spec: Mapping[str, Any], *, info: Mapping[str, Any] | None = None) -> str:
        """Bind ``stream`` to the recipe ``spec``; the recipe's fingerprint (hex SHA-256) is returned.

        The same recipe again changes nothing. ``info`` is recorded beside it and not compared (where weights lay, say).

        Raises
        ------
        StoreError : the stream was made with another recipe (every differing field is named), or this one is not
            plain data.
        """
        backend, name = self._writable(), encode_name(stream, "stream")
        attrs = layout.stream_attrs(spec, info, where=f"{self.path}: stream {stream!r}")
        if backend.stream_attrs(name) is None:
            with self._writing(stream):
                backend.put_stream(name, attrs)  # unless another process does so first, perhaps with another recipe
        self.check_stream(stream, attrs["spec"])
        return str(self._stream(stream)["fingerprint"])

    def check_stream(self, stream: str, spec: Mapping[str, Any]) -> None:
        """Raise :class:`StoreError`, naming every differing field, when ``stream`` is bound to another recipe."""
        if self._backend.stream_attrs(encode_name(stream, "stream")) is None:
            return
        wanted = plain(spec, where=f"{self.path}: stream {stream!r}: spec")
        if differing := spec_differences(self._stream(stream)["spec"], wanted):
            raise StoreError(
                f"{self.path}: stream {stream!r} was made with another recipe ({'; '.join(differing)}). "
                "Use the stored recipe, or give the new one another stream name"
            )

    def streams(self) -> list[str]:
        """The names of all streams, sorted."""
        return _decoded(self._backend.streams())

    def stream_attrs(self, stream: str) -> dict[str, Any]:
        """``spec``, ``fingerprint`` and the keys that were given as ``info``."""
        return dict(self._stream(stream))

    def _stream(self, stream: str) -> dict[str, Any]:
        backend = self._backend
        if stream not in self._streams:
            attrs = backend.stream_attrs(encode_name(stream, "stream"))
            if attrs is None:
                raise StoreError(f"{self.path} has no stream {stream!r}.{did_you_mean(stream, self.streams())}")
            self._streams[stream] = attrs  # bound for ever
        return self._streams[stream]

    # ---- entries ---------------------------------------------------------------------------------
    def videos(self, stream: str) -> list[str]:
        """The ids of all committed videos of a stream, sorted."""
        self._stream(stream)
        return _decoded(self._backend.videos(encode_name(stream, "stream")))

    def has(self, stream: str, video: str) -> bool:
        """Whether (stream, video) is committed."""
        return self._backend.stamp(encode_name(stream, "stream"), encode_name(video, "video id")) is not None

    def __contains__(self, key: tuple[str, str]) -> bool:
        return self.has(*key)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return ((stream, video) for stream in self.streams() for video in self.videos(stream))

    def is_done(self, stream: str, video: str, source: Mapping[str, Any]) -> bool:
        """Whether (stream, video) is committed, of the stream's recipe, and made from this ``source``.

        Of the source ``name``, ``size`` and ``mtime_ns`` are compared. False for an entry whose metadata cannot be
        read: it has to be made again.
        """
        if not self.has(stream, video):
            return False
        try:
            attrs = self._entry(stream, video).attrs
        except StoreError:
            return False
        same = all(attrs["source"].get(key) == source.get(key) for key in layout.SOURCE_IDENTITY)
        return same and attrs["stream_fingerprint"] == self._stream(stream)["fingerprint"]

    def write(
        self,
        stream: str,
        video: str,
        levels: Mapping[str, Level],
        *,
        duration_s: float,
        source: Mapping[str, Any],
        attrs: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write one entry whole: its arrays, then what makes it visible.

        ``source`` says what it was made from (``name``, ``size``, ``mtime_ns``, ...); ``attrs`` are further attributes.

        Raises
        ------
        StoreError : the stream does not exist, the entry does and ``overwrite`` was not said, or the features are
            not finite (T, C, ...) arrays.
        """
        backend, where = self._writable(), f"{self.path}: {stream}/{video}"
        stream_name, video_name = encode_name(stream, "stream"), encode_name(video, "video id")
        fingerprint = self._stream(stream)["fingerprint"]
        if not overwrite and backend.stamp(stream_name, video_name) is not None:
            raise StoreError(f"{where} exists already; say overwrite to replace it, or delete it first")
        levels = layout.checked_levels(levels, where=where)
        entry = layout.entry_attrs(
            video, levels, fingerprint=fingerprint, duration_s=duration_s, source=source, extra=attrs, where=where
        )
        with self._writing(f"{stream}/{video}"):
            backend.put_entry(stream_name, video_name, {path: level.array for path, level in levels.items()}, entry)
        self._forget(stream, video)

    def delete(self, stream: str, video: str) -> None:
        """Remove one entry. Raises :class:`StoreError` when it is not there."""
        backend = self._writable()
        if not self.has(stream, video):
            raise StoreError(f"{self.path}: {stream}/{video} is not there, nothing was deleted")
        with self._writing(f"{stream}/{video}"):
            backend.files.delete("catalog.csv")  # it would list what is gone
            backend.delete_entry(encode_name(stream, "stream"), encode_name(video, "video id"))
        self._forget(stream, video)

    def __getitem__(self, key: tuple[str, str] | tuple[str, str, str]) -> Feature:
        if not isinstance(key, tuple) or len(key) not in (2, 3):
            raise StoreError(
                f"{self.path}: look features up as store[stream, video] or store[stream, video, level], not {key!r}"
            )
        stream, video, *level = key
        attrs = self._entry(stream, video).attrs
        chosen = level_of(attrs, level[0] if level else None, where=f"{self.path}: {stream}/{video}")
        return Feature(self, stream, video, chosen, attrs)

    def levels(self, stream: str, video: str) -> list[str]:
        """The levels of an entry, from fine to coarse."""
        return [level["path"] for level in self._entry(stream, video).attrs["levels"]]

    def attrs(self, stream: str, video: str) -> dict[str, Any]:
        """The attributes of an entry."""
        return dict(self._entry(stream, video).attrs)

    # ---- the whole store -------------------------------------------------------------------------
    def catalog(self, refresh: bool = True) -> pd.DataFrame:
        """One row per entry and level. ``refresh=False`` takes ``catalog.csv`` when it is complete and not outdated."""
        from tad.store.catalog import catalog

        return catalog(self, refresh=refresh)

    def write_catalog(self) -> None:
        """Write ``catalog.csv``, which lists all entries; it can always be made again."""
        from tad.store.catalog import write_catalog

        self._writable()
        with self._writing("catalog.csv"):
            write_catalog(self)

    def dask(self, stream: str, level: str | None = None) -> dict[str, Any]:
        """A lazy dask array (T, C, ...) for every video of a stream, chunked as it is stored."""
        import dask.array as da

        arrays = {}
        for video in self.videos(stream):
            feature = self[stream, video] if level is None else self[stream, video, level]
            rows = layout.chunk_rows(feature.shape, feature.dtype.itemsize)
            name = f"tad-{feature.attrs['sha256'][feature.level][:32]}-{stream}-{video}-{feature.level}"
            empty = np.empty((0,) * feature.ndim, feature.dtype)
            arrays[video] = da.from_array(feature, chunks=(rows, *feature.shape[1:]), name=name, meta=empty)
        return arrays

    def verify(self, deep: bool = False) -> VerifyReport:
        """Check every entry: metadata, levels, shapes; ``deep`` also reads every row and compares its SHA-256."""
        from tad.store.verify import verify

        return verify(self, deep=deep)

    def gc(self, dry_run: bool = False, *, min_age_s: float = GC_AGE_S) -> list[str]:
        """Remove what killed writers left: temporary files and uncommitted entries.

        What was touched in the last ``min_age_s`` seconds stays: its writer may be alive. Returns what was removed
        (``dry_run``: would be). Committed entries and files that are not ours are never touched.
        """
        backend = self._backend if dry_run else self._writable()
        found = backend.litter(min_age_s)
        for key in [] if dry_run else found:
            backend.remove_litter(key)
        return found

    def link(self) -> None:
        """HDF5: rewrite ``store.h5``, which links all entries. Zarr: nothing to do."""
        backend = self._writable()
        with self._writing("store.h5"):
            backend.link()

    # ---- inside ----------------------------------------------------------------------------------
    def _writable(self) -> Backend:
        if self.mode != "a":
            raise StoreError(f"{self.path} was opened for reading; open_store(path, 'a') writes")
        return self._backend

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"{self.path}: {what} cannot be written: {error}") from error

    def _entry(self, stream: str, video: str) -> _Entry:
        backend, key = self._backend, (stream, video)
        names = encode_name(stream, "stream"), encode_name(video, "video id")
        with self._lock:
            known = self._entries.get(key)
            if known is not None:
                self._entries.move_to_end(key)
        stamp = backend.stamp(*names) if known is None or backend.stamps_are_cheap else known.stamp
        if known is not None and known.stamp == stamp:
            return known
        self._forget(stream, video)
        attrs = None if stamp is None else backend.entry_attrs(*names)
        if attrs is None:
            raise StoreError(self._not_there(stream, video))
        entry = _Entry(stamp, layout.checked_entry(attrs, where=backend.where(*names)), {})
        with self._lock:
            self._entries[key] = entry
            while len(self._entries) > backend.cached_entries:
                self._entries.popitem(last=False)
        return entry

    def _not_there(self, stream: str, video: str) -> str:
        videos = self.videos(stream)
        hint = did_you_mean(video, videos) if len(videos) <= 50 else ""
        return f"{self.path}: stream {stream!r} has no video {video!r} among its {len(videos)}.{hint}"

    def _forget(self, stream: str, video: str) -> None:
        with self._lock:
            self._entries.pop((stream, video), None)
        self._made.forget(encode_name(stream, "stream"), encode_name(video, "video id"))

    def _rows(self, feature: Feature) -> Any:
        """The opened array behind a feature."""
        backend, entry = self._backend, self._entry(feature.stream, feature.video)
        if entry.attrs != feature.attrs:
            raise StoreError(self._replaced(feature))
        if feature.level not in entry.rows:
            names = encode_name(feature.stream, "stream"), encode_name(feature.video, "video id")
            listed = level_of(entry.attrs, feature.level, where=backend.where(*names))
            entry.rows[feature.level] = backend.open_rows(*names, listed, entry.attrs)
        return entry.rows[feature.level]

    def _read_rows(self, feature: Feature, start: int, stop: int) -> np.ndarray:
        try:
            rows = np.asarray(self._rows(feature).read(start, stop))
        except DAMAGE as error:
            raise StoreError(
                f"{self.path}: {feature.stream}/{feature.video}/{feature.level}, rows {start} to {stop}, cannot be "
                f"read: {describe(error)}. Verify the store (deep), and extract or import the damaged videos again"
            ) from error
        if self._made.stamps_are_cheap and self._entry(feature.stream, feature.video).attrs != feature.attrs:
            raise StoreError(self._replaced(feature))  # meanwhile: the rows may be a mixture of both
        return rows

    def _replaced(self, feature: Feature) -> str:
        return f"{self.path}: {feature.stream}/{feature.video} was replaced since it was looked up; look it up again"


def _decoded(names: list[str]) -> list[str]:
    """Ids behind stored names, sorted; names that are not ours are left out."""
    return sorted(name for name in map(decode_name, names) if name is not None)
