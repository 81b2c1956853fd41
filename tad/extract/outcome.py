"""What a run of ``tad extract`` did: counts, times, and the videos that were given up."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tad.errors import TadError
from tad.store import Store
from tad.store.backend import place_of


@dataclass
class Failure:
    """A video that was given up, and why."""

    video: str
    path: str
    streams: list[str]
    error: str
    message: str

    @classmethod
    def of(cls, video: str, path: str, streams: list[str], error: BaseException) -> Failure:
        """The failure that ``error`` is."""
        message = str(error) if isinstance(error, TadError) else f"{type(error).__name__}: {error}"
        return cls(video, path, streams, type(error).__name__, message)

    def __str__(self) -> str:
        return f"{self.video} ({', '.join(self.streams)}): {self.message}"


@dataclass
class ExtractReport:
    """What a run did. Decoding and flow run beside the network, so the parts may add up to more than ``wall_s``."""

    videos: list[str] = field(default_factory=list)  # whose features are complete now
    written: int = 0  # entries
    already: int = 0  # entries that were there and match
    failures: list[Failure] = field(default_factory=list)
    video_s: float = 0.0  # seconds of video decoded
    rows: int = 0
    wall_s: float = 0.0
    decode_s: float = 0.0
    flow_s: float = 0.0
    network_s: float = 0.0
    write_s: float = 0.0
    workers: dict[str, float] = field(
        default_factory=dict
    )  # seconds of video that each worker did, where there are any

    def add(self, part: ExtractReport) -> None:
        """Take over what ``part`` did, but for its wall time, which ran beside ours."""
        self.videos += part.videos
        self.failures += part.failures
        for name in ("written", "already", "video_s", "rows", "decode_s", "flow_s", "network_s", "write_s"):
            setattr(self, name, getattr(self, name) + getattr(part, name))
        for worker, seconds in part.workers.items():
            self.workers[worker] = self.workers.get(worker, 0.0) + seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        speed = self.video_s / self.wall_s if self.wall_s > 0 else None
        return {**self.__dict__, "failures": [f.__dict__ for f in self.failures], "video_s_per_s": speed}


class FailureLog:
    """``failures.jsonl``: the videos that could not be extracted, rewritten for those that are tried again.

    Raises
    ------
    TadError : it cannot be read or written there.
    """

    def __init__(self, path: str | Path, videos: set[str], streams: set[str]) -> None:
        self.path = Path(path)
        with self._told():
            kept = [line for old in self._lines() if (line := _not_tried_again(old, videos, streams)) is not None]
            if kept:
                temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
                os.replace(temporary, self.path)
            else:
                self.path.unlink(missing_ok=True)

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TadError(f"the list of failures cannot be kept in {self.path}: {error}; name another file") from error

    def add(self, failure: Failure) -> None:
        """Append one line, at once."""
        entry = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **failure.__dict__}
        with self._told():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _not_tried_again(line: str, videos: set[str], streams: set[str]) -> str | None:
    """What stays of a line when ``streams`` of ``videos`` are tried again; nothing of one that is not ours."""
    try:
        entry = json.loads(line)
        if entry["video"] not in videos:
            return line
        left = [stream for stream in entry["streams"] if stream not in streams]
    except (ValueError, KeyError, TypeError):  # a half-written line, for example
        return None
    if len(left) == len(entry["streams"]):
        return line
    return json.dumps(entry | {"streams": left}, ensure_ascii=False) if left else None


def default_failures(store: Store) -> Path:
    """``failures.jsonl`` in the store's folder; for a remote store in the current one."""
    place = place_of(str(store.path))
    return Path("failures.jsonl") if "://" in place else Path(place) / "failures.jsonl"
