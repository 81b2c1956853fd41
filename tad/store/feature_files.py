"""Feature files of other projects: .npy, .npz, .csv, .pt, .pkl and one HDF5 file with a key per video → arrays."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tad.errors import StoreError
from tad.store.export_index import INDEX, Layout, Listed, listed, read_index

KEYS = ("feats", "features", "feat", "feature")  # what the one array of a file with several is called
HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")
# What the readers raise on files that are not what their suffix says.
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    EOFError,
    AttributeError,
    ImportError,
    MemoryError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


class Unreadable(ValueError):
    """Why a file is skipped, in words for its reader."""


@dataclass(frozen=True)
class FeatureFile:
    """One video's features, not yet read; ``label`` names the file (and key), ``name`` still has prefix and suffix.

    ``listed`` is what ``index.json`` promises of a file that an export wrote.
    """

    label: str
    name: str
    path: Path
    key: str | None = None
    rows_first: bool = False  # the format says so
    listed: Listed | None = None

    @property
    def layout(self) -> Layout | None:
        """Which axis is time, where the format or ``index.json`` says it."""
        if self.rows_first:
            return "TC"
        return None if self.listed is None else self.listed.layout

    def source(self) -> dict[str, Any]:
        """What ``Store.is_done`` compares."""
        status = self.path.stat()
        return {"name": self.label, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def find_files(source: Path) -> list[FeatureFile]:
    """The candidates in a folder (not below it) or in one HDF5 file, sorted; :class:`StoreError` without any.

    In a folder that an export wrote, ``index.json`` is none, and the files that it lists have their video's id as name.
    """
    if source.is_dir():
        found = _in_folder(source)
    elif source.suffix.lower() in HDF5_SUFFIXES and source.is_file():
        found = [FeatureFile(f"{source.name}:{key}", key, source, key) for key in _hdf5_keys(source)]
    elif source.is_file():
        found = [FeatureFile(source.name, source.stem, source, rows_first=source.suffix.lower() == ".csv")]
    else:
        raise StoreError(f"{source}: no such file or folder to import from")
    if not found:
        raise StoreError(
            f"{source} holds nothing to import; expected .npy, .npz, .csv, .pt, .pkl files or an HDF5 file"
        )
    return found


def _in_folder(folder: Path) -> list[FeatureFile]:
    try:
        index = read_index(folder)
    except StoreError:  # of something else: a file among others, which will be said to be of no known kind
        index = {}
    found = []
    for path in sorted(folder.iterdir()):
        if index and path.name == INDEX:
            continue
        row = index.get(path.name)
        name, promised = (path.stem, None) if row is None else (row["video"], listed(row))
        found.append(FeatureFile(path.name, name, path, rows_first=path.suffix.lower() == ".csv", listed=promised))
    return found


def read_features(file: FeatureFile, *, allow_pickle: bool) -> np.ndarray:
    """The array of one file with singleton axes removed, as it lies there: (T, C) or (C, T), of maps and frames
    (T, C, H, W) or (C, T, H, W). An array of the shape that ``index.json`` promises stays as it is.

    Raises
    ------
    One of ``UNREADABLE`` : the file cannot be read, or does not hold one such array.
    """
    if file.key is not None:
        return _of_two_or_four_axes(_read_hdf5_key(file.path, file.key))
    array = READERS[file.path.suffix.lower()](file.path, allow_pickle)
    if file.listed is not None and array.shape == file.listed.shape and array.dtype.kind in "fiu":
        return array
    return _of_two_or_four_axes(array)


def why_not(file: FeatureFile, *, allow_pickle: bool) -> str | None:
    """Why a file is not even tried; None for one that is."""
    kind = file.path.suffix.lower()
    if file.key is not None:
        return None
    if file.path.is_dir():
        return "is a folder; import it by itself"
    if kind not in READERS:
        return f"is of a kind that is not read; known are {', '.join(READERS)}"
    if READERS[kind] is _pkl and not allow_pickle:
        return "is a pickle, which can run any code; pass allow_pickle if you trust whoever made it"
    return None


def _of_two_or_four_axes(array: np.ndarray) -> np.ndarray:
    shape = array.shape
    while array.ndim > 2 and array.shape[-1] == 1:  # T x C x 1 x 1
        array = array[..., 0]
    while array.ndim > 2 and array.shape[0] == 1 and (array.ndim != 4 or array.shape[1] == 1):
        array = array[0]  # 1 x T x C, 1 x 1 x T x C, 1 x T x C x H x W; but 1 x C x H x W is a map of one row
    if array.ndim not in (2, 4):
        raise Unreadable(f"has the shape {shape}; expected rows and channels, and of maps height and width")
    if 0 in array.shape:
        raise Unreadable(f"is empty: its shape is {shape}")
    if array.dtype.kind not in "fiu":
        raise Unreadable(f"holds values of type {array.dtype}, not numbers")
    return array


def _npy(path: Path, allow_pickle: bool) -> np.ndarray:
    return _numbers(np.load(path, allow_pickle=allow_pickle))


def _npz(path: Path, allow_pickle: bool) -> np.ndarray:
    with np.load(path, allow_pickle=allow_pickle) as archive:
        if not isinstance(archive, Mapping):
            raise Unreadable("is not an .npz archive")
        return _numbers(_only(archive))


def _csv(path: Path, allow_pickle: bool) -> np.ndarray:
    with path.open(encoding="utf-8-sig") as file:
        first = [cell.strip().strip('"') for cell in file.readline().split(",")]
        columns = slice(None)
        try:
            numbers = [float(cell) for cell in first]
        except ValueError:
            header = True
            columns = slice(1 if first[0] == "" else 0, None)  # pandas writes its index below an empty name
        else:
            header = len(first) > 1 and numbers in ([*range(len(first))], [*range(1, len(first) + 1)])
        if not header:
            file.seek(0)
        body = [line for line in file if line.strip()]
    if not body:
        raise Unreadable("has no rows below its header")
    return np.loadtxt(body, delimiter=",", dtype=np.float32, ndmin=2)[:, columns]


def _pt(path: Path, allow_pickle: bool) -> np.ndarray:
    import torch

    return _numbers(torch.load(path, map_location="cpu", weights_only=True))


def _pkl(path: Path, allow_pickle: bool) -> np.ndarray:
    with path.open("rb") as file:
        return _numbers(pickle.load(file))


READERS: dict[str, Callable[[Path, bool], np.ndarray]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".csv": _csv,
    ".pt": _pt,
    ".pth": _pt,
    ".pkl": _pkl,
    ".pickle": _pkl,
}


def _only(values: Mapping[str, Any]) -> Any:
    """The one array of a mapping: under a known key, or alone."""
    for key in KEYS:
        if key in values:
            return values[key]
    if len(values) == 1:
        return next(iter(values.values()))
    raise Unreadable(
        f"holds {len(values)} arrays ({', '.join(map(str, list(values)[:5]))}), none of them called 'feats'"
    )


def _numbers(value: Any) -> np.ndarray:
    if isinstance(value, Mapping):
        value = _only(value)
    if hasattr(value, "detach"):  # a tensor; NumPy knows no bfloat16
        value = value.detach()
        value = value.float().numpy() if str(value.dtype) == "torch.bfloat16" else value.numpy()
    array = np.asarray(value)
    if array.dtype == object and array.ndim == 0:
        return _numbers(array.item())
    return array


def _hdf5_keys(path: Path) -> Iterator[str]:
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            yield from sorted(file)
    except OSError as error:
        raise StoreError(f"{path} cannot be opened as HDF5: {error}") from error


def _read_hdf5_key(path: Path, key: str) -> np.ndarray:
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        item = file[key]
        if isinstance(item, h5py.Group):
            item = _only({name: child for name, child in item.items() if isinstance(child, h5py.Dataset)})
        return np.asarray(item[()])
