"""catalog.csv: one row per entry and level; derived from the entries, never the truth."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tad.errors import StoreError
from tad.store.layout import Damaged
from tad.store.names import decode_name, encode_name

if TYPE_CHECKING:
    import pandas as pd

    from tad.store.api import Store

FILE = "catalog.csv"
_WHOLE = ("rows", "channels")
_NUMBERS = (
    "scale_s",
    "translation_s",
    "window_s",
    "duration_s",
    "fps",
    "stride_frames",
    "window_frames",
    "num_frames_used",
)
COLUMNS = ("stream", "video", "level", *_WHOLE, "shape", "dtype", *_NUMBERS, "written_at", "path")
_BEFORE_SHAPES = tuple(name for name in COLUMNS if name != "shape")  # what files of tad 0.1 list


def catalog(store: Store, *, refresh: bool) -> pd.DataFrame:
    """The table of all entries, in the order of stream, video and level (fine to coarse).

    ``shape`` is that of the array, as text (``900x1024``, of maps ``900x832x6x6``).
    ``path`` is the place of the array inside the store (``da.from_zarr(root, component=path)``, ``store.h5[path]``).
    Entries whose metadata is damaged are left out with a warning.
    """
    rows = None if refresh else _current_rows(store)
    return _table(list(_scan(store)) if rows is None else rows)


def write_catalog(store: Store) -> None:
    """Write ``catalog.csv`` from a fresh scan."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_scan(store))
    store._backend.files.write(FILE, text.getvalue().encode("utf-8"))


def read_rows(store: Store) -> list[dict[str, Any]] | None:
    """What ``catalog.csv`` lists, None without that file. Raises ``Damaged`` when it cannot be understood."""
    data = store._backend.files.read(FILE)
    if data is None:
        return None
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8"), newline=""), strict=True)
        rows = [_parsed(row) for row in reader]
        if tuple(reader.fieldnames or ()) not in (COLUMNS, _BEFORE_SHAPES):
            raise ValueError(f"its columns are {reader.fieldnames}")
    except (ValueError, TypeError, LookupError, AttributeError, csv.Error) as error:
        raise Damaged(f"{FILE} cannot be read ({type(error).__name__}: {error}); write it again") from error
    return rows


def _parsed(row: dict[str, Any]) -> dict[str, Any]:
    # "path" tells the ids: it is plain text, whatever a spreadsheet made of the other two columns
    stream, video, _ = (decode_name(part) for part in row["path"].split("/"))
    if stream is None or video is None:
        raise ValueError(f"{row['path']!r} is not the path of an entry")
    numbers = {name: float(row[name]) if row[name] else math.nan for name in _NUMBERS}
    return row | {"stream": stream, "video": video} | numbers | {name: int(row[name]) for name in _WHOLE}


def _current_rows(store: Store) -> list[dict[str, Any]] | None:
    """The rows of the file unless entries came, went, or (where that is cheap to know) were written after it."""
    try:
        rows = read_rows(store)
    except Damaged:
        return None
    if rows is None:
        return None
    listed = {(row["stream"], row["video"]) for row in rows}
    if listed != set(store) or any("shape" not in row for row in rows):
        return None
    backend = store._backend
    if backend.stamps_are_cheap:
        made = backend.files.stamp(FILE)
        names = ((encode_name(stream, "stream"), encode_name(video, "video id")) for stream, video in listed)
        stamps = (backend.stamp(*pair) for pair in names)
        if made is None or any(stamp is None or stamp[0] >= made[0] for stamp in stamps):
            return None
    return rows


def _scan(store: Store) -> Iterator[dict[str, Any]]:
    damaged: list[str] = []
    for stream, video in store:
        try:
            attrs = store.attrs(stream, video)
        except StoreError:
            damaged.append(f"{stream}/{video}")
            continue
        path = f"{encode_name(stream, 'stream')}/{encode_name(video, 'video id')}"
        for level in attrs["levels"]:
            row = {"stream": stream, "video": video, "level": level["path"], "path": f"{path}/{level['path']}"}
            row |= {"rows": level["shape"][0], "channels": level["shape"][1], "dtype": level["dtype"]}
            row["shape"] = "x".join(map(str, level["shape"]))
            row |= {name: level[name] for name in _NUMBERS if name != "duration_s"}
            yield row | {"duration_s": attrs["duration_s"], "written_at": attrs["written_at"]}
    if damaged:
        some = ", ".join(damaged[:3]) + (", ..." if len(damaged) > 3 else "")
        message = f"{store.path}: {len(damaged)} damaged entries are not listed ({some}); verify the store"
        warnings.warn(message, stacklevel=2)


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    types: dict[str, Any] = dict.fromkeys(_WHOLE, "int64") | dict.fromkeys(_NUMBERS, "float64")
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({name: types.get(name, "str") for name in COLUMNS})
