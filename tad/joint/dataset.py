"""Training samples of joint mode: those of the two-stage trainer, with the frames behind their rows.

Which stored rows a sample has after rescaling, windows and random cuts is found out by sending the rows' numbers the
same way: arrays of positions lie beside the features in the whole video, are cut with them, and are taken out again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tad.detect.align import SAME_AXIS, Sample, StoredRows, open_sample
from tad.detect.data import VideoDataset
from tad.detect.data import collate as collate_rows
from tad.detect.interface import LevelSpec
from tad.detect.preflight import Failure
from tad.detect.windows import rescaled
from tad.errors import RecipeError, StoreError, VideoError
from tad.joint.augment import Augmentation, Draw
from tad.joint.clips import Clips, JointBatch
from tad.joint.frames import Footage, FrameSource
from tad.progress import ProgressFactory
from tad.recipe import DataRecipe
from tad.store import Store

PIECE_BYTES = 2**26  # of frames that are read at a time, before they are cut
POSITIONS = "\0positions of "  # before a key, in the features of a sample that is about to be cut; no stream has it


@dataclass(frozen=True)
class JointSample(Sample):
    """A sample with the frames behind its rows: ``clips`` by stream; ``raw``: key of a need of frames → (T, C, H, W)
    uint8.
    """

    clips: Mapping[str, Clips] = field(default_factory=dict)
    raw: Mapping[str, np.ndarray] = field(default_factory=dict)


# ---- what a stream is read for --------------------------------------------------------------------------------------
def of_stream(needs: Sequence[LevelSpec], stream: str) -> list[LevelSpec]:
    """The needs that one stream fulfils."""
    return [need for need in needs if need.stream == stream]


def reads_levels(needs: Sequence[LevelSpec]) -> bool:
    """Whether the needs of one stream come from a fully convolutional pass over all frames, not snippet by snippet."""
    return all(need.level != "features" for need in needs)


def check_joint(needs: Sequence[LevelSpec], data: DataRecipe, sources: Mapping[str, FrameSource]) -> None:
    """Raise :class:`RecipeError` for a detector whose rows cannot be made from frames during training."""
    if data.row_spacing != 1:
        raise RecipeError(f"data.row_spacing={data.row_spacing}: joint training takes rows as they are (row_spacing 1)")
    if needs[0].layout == "rescaled" and data.rescale != "linear":
        raise RecipeError(f"data.rescale={data.rescale}: joint training interpolates rows (rescale: linear)")
    for stream, source in sources.items():
        own, grid = of_stream(needs, stream), source.grid
        if grid.raw or all(need.level == "features" for need in own):
            continue
        named = ", ".join(need.level for need in own)
        if not reads_levels(own):
            raise RecipeError(
                f"stream '{stream}' is read snippet by snippet and as stage outputs at once ({named}): name one of both"
            )
        if own[0].layout == "rescaled":
            raise RecipeError(
                f"stream '{stream}': stage outputs ({named}) of rescaled videos are interpolated, no pass over frames "
                "gives them; choose a detector or recipe that reads windows"
            )
        if unknown := [need.level for need in own if need.level not in grid.levels]:
            raise RecipeError(f"stream '{stream}' was not extracted with the level {unknown[0]}")
        lengths = {need.level: (need.rows or 1) * grid.levels[need.level] for need in own}
        if own[0].layout == "windowed" and len(set(lengths.values())) > 1:
            told = ", ".join(f"{level}: {frames}" for level, frames in lengths.items())
            raise RecipeError(f"stream '{stream}': windows of its levels differ in frames ({told})")


def row_positions(store: Store, needs: Sequence[LevelSpec], video: str) -> Sample:
    """A whole video whose "features" are the positions of its rows among the stored ones, (T, 1) float32 each.

    Raises
    ------
    StoreError : as :func:`~tad.detect.align.read_sample` does of what is known without reading rows.
    RecipeError : streams of features on different axes, which would have to be interpolated.
    """
    opened = open_sample(store, needs, video)
    features = {}
    for need in needs:
        rows = cast(StoredRows, opened.features[need.key])
        if rows.axis is not None and rows.feature.dtype != np.uint8:
            raise RecipeError(
                f"video '{video}': the rows of '{need.key}' lie elsewhere in time than those of '{needs[0].key}', and "
                "joint training does not interpolate: extract both with the same fps, window and stride"
            )
        at = np.arange(rows.count, dtype=np.float64)
        if rows.axis is not None:  # frames beside rows
            at = np.clip(rows.feature.axis.row_at(rows.axis.center_s(at)), 0, len(rows.feature) - 1)
        features[need.key] = at[:, None].astype(np.float32)  # (T, 1)
    whole = replace(opened, features=features, interpolated=())
    if needs[0].layout != "rescaled":
        return whole
    assert needs[0].rows is not None
    return rescaled(whole, needs[0].rows)


# ---- frames of rows -------------------------------------------------------------------------------------------------
def read_frames(
    source: FrameSource, video: str, numbers: np.ndarray, *, footage: Footage, draw: Draw
) -> tuple[np.ndarray, np.ndarray]:
    """Frames ``numbers`` (any shape) of a video, cut and augmented: each once, (F, C, H, W) uint8, in order of time,
    and where each of ``numbers`` is among them.

    What lies between is not read where it is much.
    """
    wanted, index = np.unique(numbers, return_inverse=True)  # (F,)
    box, flow = draw.box(footage), source.grid.flow is not None
    frames = np.empty((len(wanted), 2 if flow else 3, box.height, box.width), np.uint8)
    most = max(1, PIECE_BYTES // (footage.height * footage.width * frames.shape[1]))
    begin = 0
    while begin < len(wanted):
        first = int(wanted[begin])
        end = int(np.searchsorted(wanted, first + most))
        held = source.read(video, first, int(wanted[end - 1]) + 1)  # (F', H, W, C)
        if len(held) < wanted[end - 1] + 1 - first:
            raise StoreError(f"video '{video}': the frames behind '{source.grid.stream}' end early; extract them again")
        cut = draw.applied(held, box, flow=flow)  # (F', h, w, C)
        if len(held) > end - begin:
            cut = cut[wanted[begin:end] - first]
        frames[begin:end] = np.moveaxis(cut, -1, 1)
        begin = end
    return frames, index.reshape(numbers.shape)


def snippet_clips(source: FrameSource, video: str, positions: np.ndarray, *, draw: Draw | None = None) -> Clips:
    """The clips behind rows at ``positions`` (T,) among those of the stored stream, fractions between two of them."""
    draw, footage, plan = draw or Draw(), source.about(video), source.grid.plan
    at = np.asarray(positions, np.float64)
    nearest = np.rint(at)
    at = np.where(np.abs(at - nearest) < SAME_AXIS, nearest, at)
    rows = np.unique(np.concatenate([np.floor(at), np.ceil(at)])).astype(np.int64)  # (U,)
    place = np.searchsorted(rows, np.floor(at)) + (at - np.floor(at))  # (T,)
    numbers = rows[:, None] * plan.stride + np.arange(plan.window) * plan.interval  # (U, W)
    numbers = _shifted(numbers, footage, draw, interval=plan.interval)
    frames, index = read_frames(source, video, numbers, footage=footage, draw=draw)
    return Clips(
        torch.from_numpy(frames),
        torch.from_numpy(index),
        torch.from_numpy(rows),
        torch.from_numpy(place.astype(np.float32)),
    )


def window_clip(
    source: FrameSource, video: str, first_row: int, rows: int, *, level: str, draw: Draw | None = None
) -> Clips:
    """The one clip whose stage output ``level`` is rows ``[first_row, first_row + rows)`` of it.

    At the ends of windows these differ from the stored rows, since a network pads there; see ``LevelTiler``.
    """
    draw, footage, plan = draw or Draw(), source.about(video), source.grid.plan
    positions = source.grid.levels[level]  # of the clip, in one row
    numbers = (first_row * positions + np.arange(rows * positions))[None] * plan.interval  # (1, W)
    numbers = _shifted(numbers, footage, draw, interval=plan.interval)
    frames, index = read_frames(source, video, numbers, footage=footage, draw=draw)
    return Clips(torch.from_numpy(frames), torch.from_numpy(index), torch.tensor([first_row]), torch.zeros(0))


def _shifted(numbers: np.ndarray, footage: Footage, draw: Draw, *, interval: int) -> np.ndarray:
    """Frame numbers with jitter; those beyond the video are its last, as ``FrameBuffer`` repeats it."""
    inside = np.minimum(numbers, footage.frames - 1)
    shape = (numbers.shape[0], numbers.shape[1])
    return np.clip(inside + draw.shifts(shape, interval=interval), 0, footage.frames - 1)


# ---- samples and batches --------------------------------------------------------------------------------------------
class JointDataset(VideoDataset):
    """Samples by ``(epoch, index)`` with the frames behind their rows; the same pair gives the same in any process.

    Parameters
    ----------
    sources : stream → its frames, for every stream of ``needs`` (see :func:`tad.joint.frames.open_sources`).
    augmentation : of the frames; none by default.
    others : those of :class:`~tad.detect.data.VideoDataset`.

    Raises
    ------
    RecipeError : rows that cannot be made from frames, see :func:`check_joint`.
    """

    def __init__(
        self, *, sources: Mapping[str, FrameSource], augmentation: Augmentation | None = None, **samples: Any
    ) -> None:
        super().__init__(**samples)
        self.sources, self.augmentation = dict(sources), augmentation or Augmentation()
        check_joint(self.needs, self.data, self.sources)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"cache": {}}  # a worker reads rows again rather than being sent those of all videos

    @property
    def in_memory(self) -> bool:
        """Never: frames are read for each sample."""
        return False

    def whole(self, index: int) -> Sample:
        """See :class:`VideoDataset`; with the positions of its rows beside them."""
        sample = super().whole(index)
        positions = row_positions(self.store, self.needs, sample.video)
        named = {POSITIONS + key: rows for key, rows in positions.features.items()}
        factors = {POSITIONS + key: positions.factor(key) for key in positions.features} if sample.factors else {}
        return replace(sample, features=sample.features | named, factors={**sample.factors, **factors})

    def __getitem__(self, key: tuple[int, int]) -> JointSample:
        epoch, index = key
        cut = super().__getitem__(key)
        positions = {need.key: cut.features[POSITIONS + need.key][:, 0] for need in self.needs}
        draw = self.augmentation.draw(self.seed, epoch, index)
        clips, raw = dict[str, Clips](), dict[str, np.ndarray]()
        for stream, source in self.sources.items():
            own = of_stream(self.needs, stream)
            first = own[0]
            if source.grid.raw:
                raw[first.key] = self._raw(source, cut.video, positions[first.key], draw)
            elif reads_levels(own):
                at = positions[first.key]
                rows = len(at) if first.rows is None else first.rows
                clips[stream] = window_clip(source, cut.video, round(float(at[0])), rows, level=first.level, draw=draw)
            else:
                clips[stream] = snippet_clips(source, cut.video, positions[first.key], draw=draw)
        plain: dict[str, Any] = {f.name: getattr(cut, f.name) for f in fields(Sample)}
        plain["features"] = {need.key: cut.features[need.key] for need in self.needs}
        plain["factors"] = {key: n for key, n in cut.factors.items() if key in plain["features"]}
        return JointSample(**plain, clips=clips, raw=raw)

    def _raw(self, source: FrameSource, video: str, positions: np.ndarray, draw: Draw) -> np.ndarray:
        """Frames at ``positions`` (T,), (T, C, H, W); never shifted, jitter is of clips."""
        footage = source.about(video)
        nearest = np.floor(np.asarray(positions, np.float64) + 0.5 + SAME_AXIS)  # as `resampled` takes them
        numbers = np.clip(nearest, 0, footage.frames - 1).astype(np.int64)  # (T,)
        frames, index = read_frames(source, video, numbers, footage=footage, draw=draw)
        return frames[index]  # (T, C, H, W)


def collate(samples: Sequence[JointSample]) -> JointBatch | None:
    """As :func:`tad.detect.data.collate`, with the clips; nothing for an empty share of a batch."""
    rows = collate_rows(samples)
    if rows is None:
        return None
    clips = {stream: [sample.clips[stream] for sample in samples] for stream in samples[0].clips}
    raw = dict[str, Tensor]()
    for key, first in samples[0].raw.items():
        longest = rows.features[key].shape[2]
        raw[key] = torch.zeros(len(samples), first.shape[1], longest, *first.shape[2:], dtype=torch.uint8)
        for index, sample in enumerate(samples):
            frames = torch.from_numpy(np.ascontiguousarray(sample.raw[key]))
            raw[key][index, :, : len(frames)] = frames.transpose(0, 1)  # (C, T, H, W)
    return JointBatch(**{f.name: getattr(rows, f.name) for f in fields(rows)}, clips=clips, raw=raw)


# ---- before the training --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class FrameCheck:
    """Videos whose frames cannot be used, and what a user should know of the others."""

    failures: list[Failure]
    messages: list[str]


def check_frames(
    store: Store,
    needs: Sequence[LevelSpec],
    sources: Mapping[str, FrameSource],
    videos: Sequence[str],
    *,
    augmentation: Augmentation,
) -> FrameCheck:
    """Look for every video's frames, without reading any.

    Raises
    ------
    RecipeError : streams on different axes.
    """
    failures, messages = list[Failure](), list[str]()
    room = dict.fromkeys(sources, 0)
    for video in videos:
        try:
            found = {stream: source.about(video) for stream, source in sources.items()}
            row_positions(store, needs, video)
        except (StoreError, VideoError) as error:
            failures.append(Failure(video, type(error).__name__, str(error)))
            continue
        for stream, footage in found.items():
            room[stream] = max(room[stream], footage.room)
    if augmentation.random_crop:
        messages += [
            f"joint.random_crop: the frames of '{stream}' are no larger than its crop, nothing is cut at random; "
            "extract them with --crop full, or features with a smaller --crop"
            for stream, pixels in room.items()
            if pixels == 0
        ]
    return FrameCheck(failures, messages)


def damaged(sources: Mapping[str, FrameSource], videos: Sequence[str], progress: ProgressFactory) -> list[Failure]:
    """The videos of which not every frame can be read, all of which is tried."""
    failures = []
    with progress(len(videos), "read frames", "videos") as bar:
        for video in videos:
            try:
                for source in sources.values():
                    footage = source.about(video)
                    values = footage.height * footage.width * (3 if source.grid.flow is None else 2)
                    step = max(1, PIECE_BYTES // values)
                    for first in range(0, footage.frames, step):
                        source.read(video, first, min(first + step, footage.frames))
            except (StoreError, VideoError) as error:
                failures.append(Failure(video, type(error).__name__, str(error)))
            bar.advance(1)
    return failures
