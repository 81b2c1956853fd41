"""The videos of a training, opened: labelled, and either decoded into memory or left to be streamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from tad.errors import RecipeError, TadError, VideoError
from tad.extract.clip_reading import ClipReader, MemoryReader, StreamReader
from tad.extract.clips import ClipFormat, LabelledVideo, count_frames, labelled, read_frames
from tad.extract.finetune_recipe import FinetuneRecipe
from tad.extract.frames import UNREADABLE
from tad.extract.inputs import VideoFile
from tad.extract.video import probe
from tad.progress import ProgressFactory, silent
from tad.training.distributed import World

Index = dict[str, dict[str, Any]]  # video -> {"frames", "fps"}


@dataclass
class Library:
    """What the videos of a training gave; ``train`` and ``held`` are the same in every process.

    ``train_reader`` reads the training videos of this process, those whose number is ``rank`` modulo ``size``;
    ``held_reader`` likewise. ``pool`` is how many clips are shuffled among (``None``: the epoch). ``index`` is what
    another process needs, so that it need not count the frames again.
    """

    train: list[LabelledVideo]
    held: list[LabelledVideo]
    train_reader: ClipReader
    held_reader: ClipReader
    pool: int | None
    read: Literal["memory", "stream"]
    index: Index
    failures: list[dict[str, str]]
    messages: list[str] = field(default_factory=list)


@dataclass
class _Opened:
    """What one process found in its share of the files."""

    index: Index = field(default_factory=dict)
    frames: dict[str, np.ndarray] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    full: str | None = None  # the file at which the memory was used up


def open_library(
    recipe: FinetuneRecipe,
    form: ClipFormat,
    train: Sequence[VideoFile],
    held: Sequence[VideoFile],
    segments: pd.DataFrame,
    classes: Sequence[str],
    *,
    processes: World,
    known: Mapping[str, Any] | None = None,
    progress: ProgressFactory = silent,
) -> Library:
    """Decode the videos into memory if ``recipe.read`` and ``max_memory_gb`` admit it, else count their frames.

    Each process opens its share. Files that cannot be read are listed in ``failures``; ``known`` is what an earlier
    call returned as ``index`` and ``pool`` (``{"videos": ..., "pool_clips": ...}``), whose training is gone on with.

    Raises
    ------
    RecipeError : ``read`` is ``memory`` and the frames need more; or the pool needs more, or is smaller than a batch.
    VideoError : not one training video can be read.
    """
    whole = {file.video for file in train} if recipe.random_crop else set()
    mine = [*train[processes.rank :: processes.size], *held[processes.rank :: processes.size]]
    limit, messages = recipe.max_memory_gb * 1e9, []
    stream = recipe.read == "stream"
    if recipe.read == "auto":
        expected = sum(processes.gathered(_expected_bytes(mine, form, whole, limit=limit)))
        stream = expected > limit * processes.size
        if stream:
            messages.append(_why(recipe, "going by the files' headers"))
    opened = _Opened()
    if not stream:
        opened = _decode(mine, form, whole, limit=limit, progress=progress)
        full = next((path for path in processes.gathered(opened.full) if path is not None), None)
        if full is not None and recipe.read == "memory":
            raise RecipeError(
                f"the frames of {len(train) + len(held)} videos need more than max_memory_gb={recipe.max_memory_gb:g} "
                f"(reached at {full}): raise it, or take read=stream, fewer videos, a lower fps or smaller frames"
            )
        if full is not None:
            stream = True
            messages.append(_why(recipe, f"reached at {full}"))
            opened = _Opened(index=opened.index, failures=opened.failures)
    if stream:
        _count(mine, form, opened, known=(known or {}).get("videos", {}), progress=progress)
    index: Index = {}
    failures: list[dict[str, str]] = []
    for part, unread in processes.gathered((opened.index, opened.failures)):
        index |= part
        failures += unread
    if not any(file.video in index for file in train):
        raise VideoError(
            f"not one of the {len(train)} training videos can be read; the first: {failures[0]['message']}"
        )
    of_video = {str(video): rows for video, rows in segments.groupby("video")}
    videos = [
        [
            labelled(
                file.video, file.path, of_video.get(file.video, segments.iloc[:0]), classes,
                span=form.snippets.span, **index[file.video],
            )
            for file in files
            if file.video in index
        ]
        for files in (train, held)
    ]  # fmt: skip
    told = {failure["video"] for failure in failures}

    def failed(video: str, message: str) -> None:
        if video not in told:
            told.add(video)
            failures.append({"video": video, "path": "", "message": message})

    readers: list[ClipReader] = []
    for side, random_crop in zip(videos, (recipe.random_crop, False), strict=True):
        if stream:
            readers.append(StreamReader(side, form, workers=recipe.workers, failed=failed))
        else:
            frames = {k: opened.frames[v.video] for k, v in enumerate(side) if v.video in opened.frames}
            readers.append(MemoryReader(frames, form.geometry, whole=random_crop))
    pool = known["pool_clips"] if known else _pool(recipe, form, stream=stream)
    messages.append(f"clips are {'cut while videos are decoded' if stream else 'cut from frames in memory'}")
    return Library(
        train=videos[0],
        held=videos[1],
        train_reader=readers[0],
        held_reader=readers[1],
        pool=pool,
        read="stream" if stream else "memory",
        index=index,
        failures=failures,
        messages=messages,
    )


def _why(recipe: FinetuneRecipe, how: str) -> str:
    return (
        f"the frames need more than max_memory_gb={recipe.max_memory_gb:g} ({how}): clips are streamed from the videos"
    )


def _expected_bytes(files: Sequence[VideoFile], form: ClipFormat, whole: set[str], *, limit: float) -> float:
    """What frames will need, as far as headers tell; counted no further than ``limit``, past which it does not
    matter."""
    total = 0.0
    for file in files:
        try:
            info = probe(file.path)
        except UNREADABLE:
            continue
        plan = form.geometry.plan(info.height, info.width)
        height, width = plan.resized if file.video in whole else (plan.height, plan.width)
        total += info.expected_s * (form.fps or info.fps) * height * width * form.channels
        if total > limit:
            return float("inf")
    return total


def _decode(
    files: Sequence[VideoFile], form: ClipFormat, whole: set[str], *, limit: float, progress: ProgressFactory
) -> _Opened:
    opened = _Opened()
    with progress(len(files), "decode", "videos") as bar:
        for file in files:
            try:
                frames, fps = read_frames(file.path, form, max_bytes=limit, whole=file.video in whole)
            except UNREADABLE as error:
                opened.failures.append(_failure(file, error))
                continue
            finally:
                bar.advance(1, file.video)
            if frames is None:
                opened.full = str(file.path)
                break
            limit -= frames.nbytes
            opened.frames[file.video] = frames
            opened.index[file.video] = {"frames": len(frames), "fps": fps}
    return opened


def _count(
    files: Sequence[VideoFile],
    form: ClipFormat,
    opened: _Opened,
    *,
    known: Mapping[str, Any],
    progress: ProgressFactory,
) -> None:
    """Add to ``opened.index`` what is not ``known`` and was not read before."""
    done = {*opened.index, *(failure["video"] for failure in opened.failures)}
    with progress(len(files), "count frames", "videos") as bar:
        for file in files:
            try:
                if file.video in known and file.video not in done:
                    opened.index[file.video] = dict(known[file.video])
                elif file.video not in done:
                    frames, fps = count_frames(file.path, fps=form.fps)
                    opened.index[file.video] = {"frames": frames, "fps": fps}
            except UNREADABLE as error:
                opened.failures.append(_failure(file, error))
            bar.advance(1, file.video)


def _pool(recipe: FinetuneRecipe, form: ClipFormat, *, stream: bool) -> int | None:
    """How many clips are shuffled among: as many as the memory holds, when videos are streamed."""
    if not stream:
        return recipe.pool_clips
    room = int(recipe.max_memory_gb * 1e9 / form.clip_bytes)
    pool = recipe.pool_clips or room
    if pool > room or pool < recipe.batch:
        raise RecipeError(
            f"max_memory_gb={recipe.max_memory_gb:g} holds {room} clips, pool_clips is {pool} and batch "
            f"{recipe.batch}: raise max_memory_gb, or take pool_clips between batch and what memory holds"
        )
    return pool


def _failure(file: VideoFile, error: Exception) -> dict[str, str]:
    message = str(error) if isinstance(error, TadError) else f"{type(error).__name__}: {error}"
    return {"video": file.video, "path": str(file.path), "message": message}
