"""A store, or some of its streams, as few large files: for handing on, and for file systems that dislike small ones.

Only committed entries go in. A packed file is written beside its place and moved there once it is whole. It is read
with zarr or h5py alone; tad itself works on stores.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from tad.errors import StoreError, did_you_mean
from tad.store.api import Store
from tad.store.files import replaced
from tad.store.hdf5_backend import write_attrs
from tad.store.names import encode_name

LIBVER = ("v110", "v110")  # what h5py of the last years reads everywhere
EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest time of a zip: equal stores give equal files


def pack_zip(
    store: Store, folder: str | Path, *, streams: Iterable[str] | None = None, overwrite: bool = False
) -> list[Path]:
    """One uncompressed ``STREAM.zarr.zip`` a stream of a Zarr store, for ``zarr.storage.ZipStore(path, mode="r")``.

    The group at the root is the stream; an entry is a group below it, an array a level: ``group["video_1/features"]``.

    Raises
    ------
    StoreError : the store is HDF5, has no such stream, or a file is there and ``overwrite`` is not said.
    """
    backend = store._backend
    if store.format != "zarr":
        raise StoreError(f"{store.path} is an HDF5 store: pack it into one file with --h5 FILE (pack_h5)")
    written = []
    for stream in _chosen(store, streams):
        name = encode_name(stream, "stream")
        path = Path(folder) / f"{name}.zarr.zip"
        videos = {encode_name(video, "video id") for video in store.videos(stream)}
        keys = sorted(item.key for item in backend.files.tree(name) if not item.is_folder)

        def write(partial: Path, name: str = name, videos: set[str] = videos, keys: list[str] = keys) -> None:
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for key in keys:
                    inner = key.removeprefix(f"{name}/")
                    if inner != "zarr.json" and inner.split("/")[0] not in videos:
                        continue  # half-written, or not ours
                    data = backend.files.read(key)
                    if data is not None:
                        archive.writestr(zipfile.ZipInfo(inner, EPOCH), data)

        written.append(_replace(path, write, overwrite=overwrite))
    return written


def pack_h5(store: Store, path: str | Path, *, streams: Iterable[str] | None = None, overwrite: bool = False) -> Path:
    """All entries of an HDF5 store in one file: a group a stream, below it one an entry, a dataset a level.

    Attributes are those of the store's own files (see ``docs/store.md``).

    Raises
    ------
    StoreError : the store is Zarr, has no such stream, or the file is there and ``overwrite`` is not said.
    """
    import h5py

    backend = store._backend
    if store.format != "hdf5":
        raise StoreError(f"{store.path} is a Zarr store: pack its streams with --zip FOLDER (pack_zip)")
    chosen = _chosen(store, streams)

    def write(partial: Path) -> None:
        with h5py.File(partial, "w", libver=LIBVER, locking=False) as file:
            write_attrs(file.attrs, backend.root_attrs() or {}, where=str(path))
            for stream in chosen:
                name = encode_name(stream, "stream")
                group = file.create_group(name)
                write_attrs(group.attrs, backend.stream_attrs(name) or {}, where=f"{path}/{name}")
                for video in store.videos(stream):
                    store.attrs(stream, video)  # a damaged entry is an error here, not a surprise for its reader
                    entry = encode_name(video, "video id")
                    with h5py.File(backend.where(name, entry), "r", locking=False) as source:
                        source.copy(source["/"], group, name=entry)

    return _replace(Path(path), write, overwrite=overwrite)


def _chosen(store: Store, streams: Iterable[str] | None) -> list[str]:
    known = store.streams()
    chosen = known if streams is None else list(streams)
    for stream in chosen:
        if stream not in known:
            raise StoreError(f"store {store.path} has no stream '{stream}'.{did_you_mean(stream, known)}")
    if not chosen:
        raise StoreError(f"store {store.path} holds no stream to pack")
    return chosen


def _replace(path: Path, write: Callable[[Path], None], *, overwrite: bool) -> Path:
    if path.exists() and not overwrite:
        raise StoreError(f"{path} is there already: name another place, or overwrite it")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        replaced(path, write)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror or error}") from error
    return path
