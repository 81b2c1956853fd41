"""Labelled clips of annotated videos, for training a backbone: decoded once, kept in memory, cut like snippets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tad.errors import RecipeError, VideoError, did_you_mean
from tad.extract.flow import FlowStream, build_flow
from tad.extract.inputs import VideoFile
from tad.extract.snippets import SnippetPlan
from tad.extract.video import FrameReader, Geometry, crop
from tad.progress import ProgressFactory, silent

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


@dataclass(frozen=True)
class VideoClips:
    """A decoded video and the label of each clip in it: clip ``i`` begins with frame ``i``.

    ``frames`` (n, H, W, C) uint8; ``labels`` (max(1, n - span + 1),) class indices; ``actions`` likewise, the number of
    the video's segment behind the label, -1 for background. Frames behind the end repeat the last one.
    """

    video: str
    frames: np.ndarray
    labels: np.ndarray
    actions: np.ndarray

    def cut(self, start: int, offsets: np.ndarray) -> np.ndarray:
        """The clip that begins with frame ``start``, (window, H, W, C)."""
        return self.frames[np.minimum(start + offsets, len(self.frames) - 1)]


def clip_labels(
    segments: pd.DataFrame, classes: Sequence[str], *, starts: int, span: int, fps: float
) -> tuple[np.ndarray, np.ndarray]:
    """``labels`` and ``actions`` of :class:`VideoClips`: the action at the clip's centre, ``(i + span / 2) / fps``
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


def read_clips(
    files: Sequence[VideoFile],
    segments: pd.DataFrame,
    classes: Sequence[str],
    form: ClipFormat,
    *,
    max_memory_gb: float,
    failures: list[dict[str, str]],
    progress: ProgressFactory | None = None,
) -> dict[str, VideoClips]:
    """Decode ``files`` and label their clips by ``segments``; a file that cannot be read goes to ``failures``.

    Raises
    ------
    RecipeError : the frames need more than ``max_memory_gb``.
    VideoError : not one file can be read.
    """
    of_video = {str(video): rows for video, rows in segments.groupby("video")}
    span = form.snippets.span
    clips: dict[str, VideoClips] = {}
    left = int(max_memory_gb * 1e9)
    with (progress or silent)(len(files), "decode", "videos") as bar:
        for file in files:
            try:
                frames, fps = read_frames(file.path, form, max_bytes=left)
            except VideoError as error:
                failures.append({"video": file.video, "path": str(file.path), "message": str(error)})
                continue
            finally:
                bar.advance(1, file.video)
            if frames is None:
                raise RecipeError(
                    f"the frames of {len(files)} videos need more than max_memory_gb={max_memory_gb:g} (reached at "
                    f"{file.path}): take fewer videos, a lower fps, a smaller short_side and crop, or raise it"
                )
            left -= frames.nbytes
            found = of_video.get(file.video, segments.iloc[:0])
            starts = max(1, len(frames) - span + 1)
            clips[file.video] = VideoClips(
                file.video, frames, *clip_labels(found, classes, starts=starts, span=span, fps=fps)
            )
    if not clips:
        raise VideoError(f"not one of the {len(files)} videos can be read; the first: {failures[0]['message']}")
    return clips


def read_frames(path: Path, form: ClipFormat, *, max_bytes: int) -> tuple[np.ndarray | None, float]:
    """All frames of a video in this format, uint8 (n, H, W, C), and their rate; no frames if they exceed ``max_bytes``.

    Raises :class:`VideoError` for a file that cannot be decoded.
    """
    stream = None if form.flow is None else FlowStream(build_flow(form.flow))
    chunks: list[np.ndarray] = []
    with FrameReader(path, fps=form.fps, geometry=form.geometry) as reader:
        for chunk in reader:
            whole = chunk if stream is None else stream.push(chunk)
            chunks.append(np.ascontiguousarray(crop(whole, reader.plan)))
            max_bytes -= chunks[-1].nbytes
            if max_bytes < 0:
                return None, reader.fps
        if reader.frames == 0:
            raise VideoError(f"{path}: no frame could be decoded; check the file with ffprobe or a player")
        if stream is not None:
            chunks.append(np.ascontiguousarray(crop(stream.finish(), reader.plan)))
        return np.concatenate(chunks), reader.fps


class ClipSampler:
    """Draws training clips: background in its share, the rest from all classes alike and from all actions of a class
    alike, however long they are. Step ``k`` draws the same clips whenever it is asked for.

    Parameters
    ----------
    classes : K. offsets : frame offsets of a clip's frames.
    background : share of the clips whose centre lies in no action.
    mirror : class index → class index of the flipped picture or ``FIXED``, (K + 1,); with it half of the clips flip.

    Raises
    ------
    RecipeError : no clip's centre lies in an action, or none outside of all actions.
    """

    def __init__(
        self,
        videos: Sequence[VideoClips],
        *,
        classes: int,
        offsets: np.ndarray,
        batch: int,
        background: float,
        mirror: np.ndarray | None = None,
        seed: int = 0,
    ) -> None:
        self.videos, self.offsets, self.batch, self.seed = videos, offsets, batch, seed
        self.background, self.mirror = background, mirror
        pools: list[list[tuple[int, np.ndarray]]] = [
            [] for _ in range(classes + 1)
        ]  # class → (video, starts) an action
        for number, video in enumerate(videos):
            for action in np.unique(video.actions):
                starts = np.flatnonzero(video.actions == action)
                pools[video.labels[starts[0]]].append((number, starts))
        self.calm, self.actions = pools[BACKGROUND], [pool for pool in pools[BACKGROUND + 1 :] if pool]
        if not self.calm or not self.actions:
            where = "outside of all actions" if self.actions else "inside an action"
            raise RecipeError(
                f"no clip of {len(offsets)} frames has its centre {where}: there is nothing to tell apart"
            )
        lengths = np.array([len(starts) for _, starts in self.calm])
        self.calm_share = lengths / lengths.sum()

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Clips (B, T, H, W, C) uint8 and class indices (B,) of one step."""
        rng = np.random.default_rng((self.seed, step))
        clips, labels = zip(*(self._one(rng) for _ in range(self.batch)), strict=True)
        return torch.from_numpy(np.stack(clips)), torch.tensor(labels)

    def _one(self, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        if rng.random() < self.background:
            number, starts = self.calm[rng.choice(len(self.calm), p=self.calm_share)]
        else:
            pool = self.actions[rng.integers(len(self.actions))]
            number, starts = pool[rng.integers(len(pool))]
        video, start = self.videos[number], int(starts[rng.integers(len(starts))])
        clip, label = video.cut(start, self.offsets), int(video.labels[start])
        if self.mirror is not None and self.mirror[label] != FIXED and rng.random() < 0.5:
            clip, label = flip(clip), int(self.mirror[label])
        return clip, label


def flip(clip: np.ndarray) -> np.ndarray:
    """A clip (..., W, C) left to right; in flow (2 channels) x changes its sign, and 128 stays no motion."""
    clip = clip[..., ::-1, :].copy()
    if clip.shape[-1] == 2:
        clip[..., 0] = np.minimum(256 - clip[..., 0].astype(np.int16), 255)
    return clip


def mirror_index(classes: Sequence[str], mirror: Mapping[str, str | None] | None) -> np.ndarray | None:
    """``mirror`` of :class:`ClipSampler` from labels: what a flipped action is, ``None`` where it must not be flipped;
    labels that it leaves out stay what they are. ``None`` altogether: no flips.

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
