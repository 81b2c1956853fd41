"""Labelled clips of annotated videos, for training a backbone: which frames a clip has, what it shows, how it is cut.

Clips are cut as extraction cuts its windows, so that a row of features is what the network was trained to tell.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from tad.errors import RecipeError, VideoError, did_you_mean
from tad.extract.flow import FlowStream, build_flow
from tad.extract.snippets import SnippetPlan
from tad.extract.video import FrameReader, Geometry, Plan, crop

BACKGROUND = 0  # its class index; the labels follow from 1
FIXED = -1  # in place of a mirrored class: do not flip


@dataclass(frozen=True)
class ClipFormat:
    """What a clip is: frames of the snippet, rate of the grid (``None``: each file's own), size, flow method or RGB."""

    snippets: SnippetPlan
    fps: float | None
    geometry: Geometry
    flow: str | None

    def offsets(self) -> np.ndarray:
        """Frame offsets of a clip's frames from its first, (window,)."""
        return self.snippets.offsets().numpy()

    @property
    def clip_bytes(self) -> int:
        """Bytes of one clip, uint8."""
        height, width = self.geometry.crop or self.geometry.resize or (self.geometry.short_side,) * 2
        return self.snippets.window * height * width * self.channels

    @property
    def channels(self) -> int:
        return 3 if self.flow is None else 2


@dataclass(frozen=True)
class LabelledVideo:
    """A video and the label of each clip in it: clip ``i`` begins with frame ``i`` of the grid.

    ``frames`` on the grid at ``fps``; ``labels`` (max(1, frames - span + 1),) class indices; ``actions`` likewise, the
    number of the video's segment behind the label, -1 for background.
    """

    video: str
    path: Path
    frames: int
    fps: float
    labels: np.ndarray
    actions: np.ndarray


@dataclass(frozen=True)
class Clip:
    """A clip to cut: of the ``video``-th video, these frame numbers, (window,), never decreasing.

    ``place`` is where the crop lies, top and left as parts (0 to 1) of the room that it has; ``None``: at the centre.
    """

    video: int
    frames: np.ndarray
    label: int
    flipped: bool = False
    place: tuple[float, float] | None = None


def labelled(
    video: str, path: Path, segments: pd.DataFrame, classes: Sequence[str], *, frames: int, fps: float, span: int
) -> LabelledVideo:
    """A video of ``frames`` frames with the labels that its ``segments`` give to clips of ``span`` frames."""
    starts = max(1, frames - span + 1)
    return LabelledVideo(video, path, frames, fps, *clip_labels(segments, classes, starts=starts, span=span, fps=fps))


def clip_labels(
    segments: pd.DataFrame, classes: Sequence[str], *, starts: int, span: int, fps: float
) -> tuple[np.ndarray, np.ndarray]:
    """``labels`` and ``actions`` of :class:`LabelledVideo`: the action at the clip's centre, ``(i + span / 2) / fps``
    seconds; of several the shortest. Segments of none of the ``classes`` count as background.
    """
    index = {label: number for number, label in enumerate(classes, BACKGROUND + 1)}
    centres_s = (np.arange(starts) + 0.5 * span) / fps
    labels, actions = np.full(starts, BACKGROUND), np.full(starts, -1)
    begin, end = segments["start_s"].to_numpy(float), segments["end_s"].to_numpy(float)
    names = [str(label) for label in segments["label"]]
    for number in np.argsort(begin - end, kind="stable"):  # longest first: a shorter one inside takes its place
        if names[number] in index:
            inside = (centres_s >= begin[number]) & (centres_s < end[number])
            labels[inside], actions[inside] = index[names[number]], number
    return labels, actions


def frames_at(start: int, offsets: np.ndarray, *, frames: int, speed: float = 1.0) -> np.ndarray:
    """Frame numbers of the clip that begins at ``start``, (window,); beyond the video's ends its edge frame repeats.

    ``speed`` stretches the offsets about the clip's centre, rounded to whole frames, so that its label stays.
    """
    if speed != 1.0:
        centre = 0.5 * (offsets[0] + offsets[-1])
        offsets = np.floor(centre + (offsets - centre) * speed + 0.5).astype(np.int64)
    return np.clip(start + offsets, 0, frames - 1)


# ---- frames ---------------------------------------------------------------------------------------------------------
def read_chunks(path: Path, form: ClipFormat) -> Generator[tuple[np.ndarray, Plan, float], None, None]:
    """Consecutive frames of a video, uint8 (n, H, W, C), resized but not cropped; where its crop would lie, and the
    rate of the grid.

    Raises :class:`VideoError` for a file that cannot be decoded.
    """
    stream = None if form.flow is None else FlowStream(build_flow(form.flow))
    with FrameReader(path, fps=form.fps, geometry=form.geometry) as reader:
        for chunk in reader:
            yield (chunk if stream is None else stream.push(chunk)), reader.plan, reader.fps
        if reader.frames == 0:
            raise VideoError(f"{path}: no frame could be decoded; check the file with ffprobe or a player")
        if stream is not None:
            yield stream.finish(), reader.plan, reader.fps


def read_frames(
    path: Path, form: ClipFormat, *, max_bytes: float, whole: bool = False
) -> tuple[np.ndarray | None, float]:
    """All frames of a video, uint8 (n, H, W, C), cropped unless ``whole``, and their rate; no frames if they exceed
    ``max_bytes``.

    Raises :class:`VideoError` for a file that cannot be decoded.
    """
    parts: list[np.ndarray] = []
    fps = 0.0
    for chunk, plan, fps in read_chunks(path, form):
        parts.append(np.ascontiguousarray(chunk if whole else crop(chunk, plan)))
        max_bytes -= parts[-1].nbytes
        if max_bytes < 0:
            return None, fps
    return np.concatenate(parts), fps


class FrameCounter(FrameReader):
    """A pass over a video that converts no frame: ``frames`` of the grid are counted exactly, for half the price."""

    def _convert(self) -> np.ndarray:
        return np.zeros((*self.plan.resized, 3), np.uint8)


def count_frames(path: Path, *, fps: float | None) -> tuple[int, float]:
    """How many frames a video has on the grid at ``fps``, and the grid's rate.

    Raises :class:`VideoError` for a file that cannot be decoded.
    """
    with FrameCounter(path, fps=fps, geometry=Geometry(1, (1, 1))) as counter:
        for _ in counter:
            pass
        if counter.frames == 0:
            raise VideoError(f"{path}: no frame could be decoded; check the file with ffprobe or a player")
        return counter.frames, counter.fps


def cut(frames: np.ndarray, clip: Clip, plan: Plan | None) -> np.ndarray:
    """A clip (window, h, w, C) from its own frames (window, H, W, C): cropped and, where it says so, flipped.

    ``plan`` is where the centre's crop lies; ``None``: the frames are cropped already.
    """
    if plan is not None and clip.place is not None:
        top, left = (
            min(int(part * (whole - size + 1)), whole - size)
            for part, whole, size in zip(clip.place, plan.resized, (plan.height, plan.width), strict=True)
        )
        frames = frames[..., top : top + plan.height, left : left + plan.width, :]
    elif plan is not None:
        frames = crop(frames, plan)
    return flip(frames) if clip.flipped else np.ascontiguousarray(frames)


def flip(clip: np.ndarray) -> np.ndarray:
    """A clip (..., W, C) left to right; in flow (2 channels) x changes its sign, and 128 stays no motion."""
    clip = clip[..., ::-1, :].copy()
    if clip.shape[-1] == 2:
        clip[..., 0] = np.minimum(256 - clip[..., 0].astype(np.int16), 255)
    return clip


def mirror_index(classes: Sequence[str], mirror: Mapping[str, str | None] | None) -> np.ndarray | None:
    """``mirror`` of :class:`tad.extract.clip_sampling.ClipSampler` from labels: what a flipped action is, ``None``
    where it must not be flipped; labels that it leaves out stay what they are. ``None`` altogether: no flips.

    Raises
    ------
    RecipeError : a label that no training video has, or flipping twice does not lead back.
    """
    if mirror is None:
        return None
    index = {label: number for number, label in enumerate(classes, BACKGROUND + 1)}
    swap = np.arange(len(classes) + 1)
    for label, other in mirror.items():
        for name in (label, other):
            if name is not None and name not in index:
                raise RecipeError(f"mirror: no training video has the class '{name}'.{did_you_mean(name, index)}")
        if other is not None and mirror.get(other) != label:
            raise RecipeError(f"mirror: '{label}' becomes '{other}', but '{other}' does not become '{label}'")
        swap[index[label]] = FIXED if other is None else index[other]
    return swap
