"""verify: is everything that is committed still what was written?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tad.errors import StoreError
from tad.store import layout
from tad.store.catalog import read_rows
from tad.store.feature import Feature
from tad.store.fingerprint import fingerprint_of
from tad.store.layout import DAMAGE, Damaged, describe
from tad.store.names import decode_name, encode_name

if TYPE_CHECKING:
    from tad.store.api import Store


class Problem(NamedTuple):
    """One thing that is wrong; ``video`` and ``level`` are None where it concerns all of them."""

    stream: str
    video: str | None
    level: str | None
    what: str

    def __str__(self) -> str:
        return f"{'/'.join(part for part in self[:3] if part) or 'store'}: {self.what}"


@dataclass
class VerifyReport:
    """``checked`` entries and the problems found in them."""

    problems: list[Problem] = field(default_factory=list)
    checked: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return {"ok": self.ok, "checked": self.checked, "problems": [problem._asdict() for problem in self.problems]}


def verify(store: Store, *, deep: bool = False) -> VerifyReport:
    """Check every committed entry of ``store``.

    Always: metadata can be read and is unchanged since it was written, the entry belongs to its stream's recipe, the
    arrays that it lists exist and have the listed shape and dtype, and what ``catalog.csv`` lists is there.
    ``deep``: every byte is read, every row decoded, and the SHA-256 of every array compared.
    """
    report = VerifyReport()
    for name in store._backend.unreachable_streams():
        report.problems.append(
            Problem(decode_name(name) or name, None, None, "its own metadata is missing, its entries cannot be reached")
        )
    committed: dict[str, list[str]] = {}
    for stream in store.streams():
        try:
            fingerprint = _stream_fingerprint(store, stream)
        except StoreError as error:
            report.problems.append(Problem(stream, None, None, str(error)))
            continue
        committed[stream] = store.videos(stream)
        for video in committed[stream]:
            report.checked += 1
            found = _entry_problems(store, stream, video, fingerprint, deep=deep)
            report.problems += [Problem(stream, video, level, what) for level, what in found]
    report.problems += _listed_but_gone(store, committed)
    return report


def _stream_fingerprint(store: Store, stream: str) -> str:
    store._streams.pop(stream, None)  # as it is on disk now
    attrs = store.stream_attrs(stream)
    spec, fingerprint = attrs.get("spec"), attrs.get("fingerprint")
    if not isinstance(spec, dict) or fingerprint_of(spec) != fingerprint:
        raise StoreError("its recipe does not have the fingerprint that is recorded with it")
    return str(fingerprint)


def _entry_problems(
    store: Store, stream: str, video: str, fingerprint: str, *, deep: bool
) -> Iterator[tuple[str | None, str]]:
    store._forget(stream, video)
    names = encode_name(stream, "stream"), encode_name(video, "video id")
    try:
        if deep:
            store._backend.check_file(*names)  # before any library parses what may be damaged
        attrs = store.attrs(stream, video)
        stored = store._backend.stored_levels(*names)
        levels = {level["path"]: level for level in attrs["levels"]}
    except (StoreError, *DAMAGE) as error:
        yield None, f"metadata cannot be read: {error if isinstance(error, StoreError) else describe(error)}"
        return
    if attrs.get("attrs_sha256") != layout.attrs_sha256(attrs):
        yield None, "attributes are not those that were written"
    if attrs.get("video") != video:
        yield None, f"holds the video {attrs.get('video')!r}"
    if attrs["stream_fingerprint"] != fingerprint:
        yield None, "was made with another recipe than its stream's"
    if stray := sorted(stored - levels.keys()):
        yield None, f"has arrays that its metadata does not list: {', '.join(stray)}"
    for path, level in levels.items():
        try:
            feature = Feature(store, stream, video, level, attrs)
            rows = store._rows(feature)
            if deep and layout.sha256_of(_blocks(rows, feature)) != attrs["sha256"][path]:
                yield path, "rows are not those that were written (SHA-256 differs)"
        except DAMAGE as error:
            yield path, f"cannot be read: {describe(error)}"
    store._forget(stream, video)


def _blocks(rows: Any, feature: Feature) -> Iterator[np.ndarray]:
    step = layout.chunk_rows(feature.shape, feature.dtype.itemsize)
    for start in range(0, len(feature), step):
        yield rows.read(start, min(start + step, len(feature)))


def _listed_but_gone(store: Store, committed: Mapping[str, list[str]]) -> Iterator[Problem]:
    try:
        listed = read_rows(store)
    except Damaged as error:
        yield Problem("", None, None, str(error))
        return
    there = {(stream, video) for stream, videos in committed.items() for video in videos}
    damaged = set(store.streams()) - committed.keys()
    for stream, video in sorted({(row["stream"], row["video"]) for row in listed or ()} - there):
        if stream not in damaged:
            yield Problem(stream, video, None, "is listed in catalog.csv, but not there")
