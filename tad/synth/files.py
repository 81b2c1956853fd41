"""Synthetic videos as files, with annotations beside them."""

from __future__ import annotations

import json
import os
import re
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tad.errors import AnnotationError, VideoError
from tad.progress import ProgressFactory, silent
from tad.synth.plan import CLASSES, FPS, SIZE, Plan, check_plan, plan_video
from tad.synth.render import render

VERSION = 1  # goes up when the same seed gives other videos


@dataclass(frozen=True)
class SynthVideo:
    """A video that was written: its file, its length and its actions (start_s, end_s, label)."""

    id: str
    path: Path
    frames: int
    fps: float
    size: tuple[int, int]
    segments_s: tuple[tuple[float, float, str], ...]

    @property
    def duration_s(self) -> float:
        return self.frames / self.fps


def make_video(
    path: str | Path,
    *,
    duration_s: float,
    seed: int | Sequence[int] = 0,
    size: tuple[int, int] = SIZE,
    fps: float = FPS,
    classes: Sequence[str] = CLASSES,
    action_s: tuple[float, float] = (1.0, 20.0),
) -> SynthVideo:
    """Write one synthetic video (an ``.mp4`` file, codec mp4v) and say what is in it.

    Frames go straight to the file, so that memory does not depend on the duration. ``size`` is (height, width).
    Raises :class:`AnnotationError` for values that make no sense, :class:`VideoError` when the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise VideoError(f"{path}: synthetic videos are .mp4 files; give the name this suffix")
    path.parent.mkdir(parents=True, exist_ok=True)
    plan = plan_video(seed=seed, duration_s=duration_s, size=size, fps=fps, classes=classes, action_s=action_s)
    _write(plan, path)
    return SynthVideo(path.stem, path, plan.frames, fps, size, tuple(plan.segments_s()))


def make_videos(
    out: str | Path,
    *,
    videos: int,
    seed: int = 0,
    subset: str = "training",
    classes: Sequence[str] = CLASSES,
    duration_s: tuple[float, float] = (30.0, 60.0),
    size: tuple[int, int] = SIZE,
    fps: float = FPS,
    action_s: tuple[float, float] = (1.0, 20.0),
    progress: ProgressFactory | None = None,
) -> list[SynthVideo]:
    """Write ``out/videos/<subset>-<number>.mp4`` and add them to ``out/annotations.json`` (ActivityNet layout).

    Every video has its own seed, made of ``seed``, the subset's name and its number; so subsets differ though their
    seed is the same, and asking for more videos leaves the first ones as they are. Durations are uniform in
    ``duration_s``. Whatever else is in the annotations stays; synthetic videos of this subset are replaced. A video
    that is already there from the same call is kept.

    Raises
    ------
    AnnotationError : values that make no sense; annotations in ``out`` that cannot be added to.
    VideoError : OpenCV cannot write a file.
    """
    if videos < 1:
        raise AnnotationError(f"videos must be at least 1, got {videos}")
    if not re.fullmatch(r"\w[\w.-]*", subset):
        raise AnnotationError(f"a subset's name becomes part of file names: letters, digits, . _ and -, not {subset!r}")
    check_plan(
        seed=seed, duration_s=duration_s, size=size, fps=fps, classes=classes, action_s=action_s, gap_s=(1.0, 1.0)
    )
    folder, annotations = Path(out) / "videos", Path(out) / "annotations.json"
    folder.mkdir(parents=True, exist_ok=True)
    document = _document(annotations)
    database: dict[str, dict[str, Any]] = document["database"]
    for video in (f"{subset}-{number:03d}" for number in range(videos)):
        if video in database and "synth" not in database[video]:
            raise AnnotationError(f"{annotations}: '{video}' is no synthetic video; write into another folder")
    made: list[SynthVideo] = []
    todo: list[tuple[Plan, Path]] = []
    entries: dict[str, dict[str, Any]] = {}
    for number in range(videos):
        key = (seed, zlib.crc32(subset.encode()), number)
        length_s = float(np.random.default_rng((*key, 2)).uniform(*duration_s))
        plan = plan_video(seed=key, duration_s=length_s, size=size, fps=fps, classes=classes, action_s=action_s)
        video = f"{subset}-{number:03d}"
        path = folder / f"{video}.mp4"
        made.append(SynthVideo(video, path, plan.frames, fps, size, tuple(plan.segments_s())))
        entries[video] = _entry(plan, subset)
        if database.get(video) != entries[video]:
            path.unlink(missing_ok=True)  # of another call: must not be taken for this one's, whatever happens next
        if not path.exists():
            todo.append((plan, path))
    replaced = {video for video, entry in database.items() if entry.get("subset") == subset and "synth" in entry}
    for video in replaced - entries.keys():
        (folder / f"{video}.mp4").unlink(missing_ok=True)
    others = {video: entry for video, entry in database.items() if video not in replaced}
    _write_json(annotations, {"version": "tad.synth", **document, "database": others | entries})
    with (progress or silent)(len(todo), f"make {subset}", "videos") as bar:
        for plan, path in todo:
            _write(plan, path)
            bar.advance(1)
    return made


def _entry(plan: Plan, subset: str) -> dict[str, Any]:
    height, width = plan.size
    return {
        "subset": subset,
        "duration": plan.duration_s,
        "fps": plan.fps,
        "resolution": f"{width}x{height}",
        "annotations": [{"segment": [start, end], "label": label} for start, end, label in plan.segments_s()],
        "synth": {"version": VERSION, "seed": list(plan.seed), "frames": plan.frames},
    }


def _document(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"database": {}}
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        database = document["database"]
    except (ValueError, KeyError, TypeError) as error:
        raise AnnotationError(
            f"{path}: no ActivityNet annotations to add to ({error!r}); move the file away"
        ) from error
    if not isinstance(database, dict) or not all(isinstance(entry, dict) for entry in database.values()):
        raise AnnotationError(f"{path}: no ActivityNet annotations to add to; move the file away")
    return document


def _write_json(path: Path, data: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    partial.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _write(plan: Plan, path: Path) -> None:
    """Encode a plan; the file takes its name only when it is whole."""
    partial = path.with_name(f".{uuid.uuid4().hex}.mp4")
    height, width = plan.size
    writer = cv2.VideoWriter(str(partial), cv2.VideoWriter.fourcc(*"mp4v"), plan.fps, (width, height))
    try:
        if not writer.isOpened():
            raise VideoError(f"{path}: OpenCV cannot write mp4v video of {width}x{height} at {plan.fps:g} fps here")
        for frame in render(plan):
            writer.write(frame)
        writer.release()
        os.replace(partial, path)
    finally:
        writer.release()
        partial.unlink(missing_ok=True)
