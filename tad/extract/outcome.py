"""What a run of ``tad extract`` did: counts, times, and the videos that were given up."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tad.errors import TadError
from tad.store import Store


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
    """``failures.jsonl``: the videos that could not be extracted, rewritten for those that are tried again."""

    def __init__(self, path: str | Path, videos: set[str], streams: set[str]) -> None:
        self.path = Path(path)
        kept = [line for line in self._lines() if not self._tried_again(line, videos, streams)]
        if kept:
            temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(temporary, self.path)
        else:
            self.path.unlink(missing_ok=True)

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []

    @staticmethod
    def _tried_again(line: str, videos: set[str], streams: set[str]) -> bool:
        try:
            entry = json.loads(line)
            return entry["video"] in videos and bool(streams.intersection(entry["streams"]))
        except (ValueError, KeyError, TypeError):
            return True  # not a line of ours, or a half-written one

    def add(self, failure: Failure) -> None:
        """Append one line, at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **failure.__dict__}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def default_failures(store: Store) -> Path:
    """``failures.jsonl`` in the store's folder; for a remote store in the current one."""
    return Path("failures.jsonl") if "://" in str(store.path) else Path(store.path) / "failures.jsonl"
