"""Samples for a detector: truth in rows, crops, batches, in an order that depends on the seed and epoch alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tad.detect.align import Sample, seen_rows
from tad.detect.interface import Batch, LevelSpec, Proposals, Targets
from tad.detect.windows import crop, open_whole, read_whole
from tad.errors import TadError
from tad.recipe import DataRecipe
from tad.store import Store
from tad.timeline import TimeAxis
from tad.training.rng import seeded

CACHE_BYTES = 2 * 1024**3  # training sets up to this size are kept in memory, larger ones are read again every epoch
SLIVER_ROWS = 1e-3  # a truth, and what is left of it after cutting, must be longer than this


@dataclass(frozen=True)
class RowTruth:
    """The truth of one video in row edges, and what had to be left out of it."""

    segments: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.float32))  # (N, 2)
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (N,)
    outside: int = 0  # segments that no row sees
    empty: int = 0  # segments that do not last


def row_truth(
    segments_s: np.ndarray, labels: np.ndarray, axis: TimeAxis, rows: int, *, duration_s: float = math.inf
) -> RowTruth:
    """Truth in seconds (N, 2) -> row edges, cut to what the rows see (:func:`~tad.detect.align.seen_rows`).

    Segments that do not last (a thousandth of a row or less) and those that no row sees are left out and counted.
    ``duration_s`` is of the video.
    """
    segments_s = np.asarray(segments_s, np.float64).reshape(-1, 2)
    lasting = segments_s[:, 1] - segments_s[:, 0] > SLIVER_ROWS * axis.scale_s  # (N,)
    edges = np.clip(axis.to_rows(segments_s), *seen_rows(axis, rows, duration_s))  # (N, 2)
    inside = edges[:, 1] - edges[:, 0] > SLIVER_ROWS
    keep = lasting & inside
    return RowTruth(
        edges[keep].astype(np.float32),
        np.asarray(labels, np.int64).reshape(-1)[keep],
        outside=int((lasting & ~inside).sum()),
        empty=int((~lasting).sum()),
    )


def collate(samples: Sequence[Sample]) -> Batch | None:
    """Samples side by side, padded with zeros to the longest; nothing for an empty share of a batch.

    All is float32 but frames, which stay bytes: the detector makes numbers of them, a quarter of the memory goes to
    its device. Levels of another resolution are padded to what the longest sample has of them, and have masks of
    their own.
    """
    if not samples:
        return None
    longest = max(sample.rows for sample in samples)
    mask = torch.zeros(len(samples), longest, dtype=torch.bool)  # (B, T)
    features, masks = dict[str, Tensor](), dict[str, Tensor]()
    for key, array in samples[0].features.items():
        length = -(-longest // samples[0].factor(key))
        kept = torch.uint8 if all(_is_frames(sample.features[key]) for sample in samples) else torch.float32
        features[key] = torch.zeros(len(samples), array.shape[1], length, *array.shape[2:], dtype=kept)  # (B, C, T, ..)
        if samples[0].factors:
            masks[key] = torch.zeros(len(samples), length, dtype=torch.bool)
    for index, sample in enumerate(samples):
        mask[index, : sample.rows] = True
        for key, array in sample.features.items():
            values = array if _is_frames(array) else array.astype(np.float32, copy=False)
            features[key][index, :, : len(array)] = torch.from_numpy(values).transpose(0, 1)  # (C, T, ..)
            if masks:
                masks[key][index, : len(array)] = True
    targets = [Targets(torch.from_numpy(s.segments.copy()), torch.from_numpy(s.labels.copy())) for s in samples]
    proposals = [
        Proposals(torch.from_numpy(s.proposals.copy()), torch.from_numpy(s.proposal_scores.copy())) for s in samples
    ]
    videos, axes = [sample.video for sample in samples], [sample.axis for sample in samples]
    durations_s = [sample.duration_s for sample in samples]
    return Batch(videos, features, mask, axes, durations_s, targets, proposals, masks)


def _is_frames(array: np.ndarray) -> bool:
    return array.ndim > 2 and array.dtype == np.uint8


def with_proposals(sample: Sample, found: tuple[np.ndarray, np.ndarray]) -> Sample:
    """``sample``, a whole video, with proposals: seconds (P, 2) and scores (P,), best first. They are cut
    as truth is; those that no row sees go.
    """
    segments_s, scores = found
    low, high = seen_rows(sample.axis, sample.rows, sample.duration_s)
    edges = np.clip(sample.axis.to_rows(np.asarray(segments_s, np.float64).reshape(-1, 2)), low, high)  # (P, 2)
    keep = edges[:, 1] - edges[:, 0] > SLIVER_ROWS
    kept_scores = np.asarray(scores, np.float32).reshape(-1)[keep]
    return replace(sample, proposals=edges[keep].astype(np.float32), proposal_scores=kept_scores)


class VideoDataset(Dataset[Sample]):
    """Training samples by ``(epoch, index)``: the same pair gives the same sample in any process and order.

    Parameters
    ----------
    store : where the rows are.
    needs : what the detector reads.
    truth : video -> its truth in rows; its keys are the videos, in order.
    data : how videos become samples; whole videos of more than ``max_rows`` are cut at a uniformly random place.
    seed : of the random cuts.
    cache : videos read already; empty to read them each time.
    starts : video -> where its windows begin, for detectors that see windows; by default every video is seen whole.
    proposals : video -> seconds (P, 2) and scores (P,), for detectors that refine those of another one.
    """

    def __init__(
        self,
        *,
        store: Store,
        needs: Sequence[LevelSpec],
        truth: Mapping[str, RowTruth],
        data: DataRecipe,
        seed: int,
        cache: Mapping[str, Sample],
        starts: Mapping[str, Sequence[int | None]] | None = None,
        proposals: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> None:
        self.store, self.needs, self.truth = store, tuple(needs), dict(truth)
        self.data, self.seed, self.cache = data, seed, dict(cache)
        self.proposals = dict(proposals or {})
        self.items = [(video, start) for video in truth for start in (starts[video] if starts else [None])]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def in_memory(self) -> bool:
        """Whether samples are made of what is in memory already."""
        return bool(self.cache)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        return self._cut(self.whole(index), epoch, index)

    def whole(self, index: int) -> Sample:
        """The video of sample ``index`` with its truth, before a window or a random part is cut out of it."""
        video, start = self.items[index]
        sample = self.cache.get(video)
        if sample is None:
            # Of a video that is seen in windows, only the window is read.
            read = read_whole if start is None else open_whole
            sample = read(self.store, self.needs, video, self.data)
        truth = self.truth[video]
        sample = replace(sample, segments=truth.segments, labels=truth.labels)
        if video in self.proposals:
            sample = with_proposals(sample, self.proposals[video])
        return sample

    def _cut(self, sample: Sample, epoch: int, index: int) -> Sample:
        start = self.items[index][1]
        if start is not None:
            assert self.needs[0].rows is not None
            return crop(sample, start, self.needs[0].rows, min_inside=self.data.min_inside)
        if sample.rows <= self.data.max_rows or self.needs[0].layout != "full":
            return sample
        start = int(seeded(self.seed, epoch, index).integers(0, sample.rows - self.data.max_rows + 1))
        return crop(sample, start, self.data.max_rows, min_inside=self.data.min_inside)


@dataclass(frozen=True)
class Step:
    """One optimizer step: the videos (dataset indices) of each of its batches."""

    batches: tuple[tuple[int, ...], ...]

    @property
    def videos(self) -> int:
        return sum(len(batch) for batch in self.batches)


def epoch_steps(videos: int, *, batch: int, accumulate: int, seed: int, epoch: int) -> list[Step]:
    """All videos in the random order of (seed, epoch), ``batch`` to a batch and ``accumulate`` batches to a step."""
    order = seeded(seed, epoch).permutation(videos).tolist()
    batches = [tuple(order[i : i + batch]) for i in range(0, videos, batch)]
    return [Step(tuple(batches[i : i + accumulate])) for i in range(0, len(batches), accumulate)]


class _Shares(Sampler[list[tuple[int, int]]]):
    """What one of ``world`` processes loads: its part of every batch of an epoch, empty where a batch is too small."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.epoch = rank, world, 0
        self.steps: list[Step] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            for batch in step.batches:
                yield [(self.epoch, index) for index in batch[self.rank :: self.world]]

    def __len__(self) -> int:
        return sum(len(step.batches) for step in self.steps)


class EpochLoader:
    """Batches of this process, epoch by epoch; ``None`` stands for an empty share.

    The order is drawn here, from the seed and epoch, so that it is the same for any number of workers, and neither it
    nor the workers' seeds touch torch's own generator. ``collate`` makes batches of samples otherwise than
    :func:`collate` does.
    """

    _usual = staticmethod(collate)

    def __init__(
        self,
        dataset: VideoDataset,
        *,
        workers: int,
        rank: int = 0,
        world: int = 1,
        collate: Callable[[Sequence[Any]], Batch | None] | None = None,
    ) -> None:
        workers = 0 if dataset.in_memory else workers  # these are handed over faster than a worker could send them
        self.shares = _Shares(rank, world)
        self.dataset, self.generator = dataset, torch.Generator()
        samples: Dataset[Any] = _Guarded(dataset) if workers else dataset
        self.loader: DataLoader[Any] = DataLoader(
            samples,
            batch_sampler=self.shares,
            num_workers=workers,
            collate_fn=_Unless(collate or self._usual) if workers else collate or self._usual,
            worker_init_fn=_seed_worker,
            generator=self.generator,
            # Neither torch's threads nor remote stores survive a fork.
            multiprocessing_context="forkserver" if workers else None,
            persistent_workers=workers > 0,
        )

    def epoch(self, epoch: int, steps: Sequence[Step]) -> Iterator[Batch | None]:
        self.shares.epoch, self.shares.steps = epoch, list(steps)
        self.generator.manual_seed(int(seeded(self.dataset.seed, epoch, -1 & 0xFFFFFFFF).integers(2**62)))
        for batch in self.loader:
            if isinstance(batch, TadError):
                raise batch
            yield batch


class _Guarded(Dataset[Any]):
    """Samples in a worker: errors that are meant for the user are handed over, where torch would make their message a
    traceback.
    """

    def __init__(self, dataset: VideoDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Sample | TadError:
        try:
            return self.dataset[key]
        except TadError as error:
            return error


class _Unless:
    """A ``collate`` that gives the first error among the samples instead of a batch."""

    def __init__(self, collate: Callable[[Sequence[Any]], Batch | None]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Any]) -> Batch | TadError | None:
        return next((sample for sample in samples if isinstance(sample, TadError)), None) or self.collate(samples)


def _seed_worker(worker: int) -> None:
    state = torch.initial_seed() % 2**32
    np.random.seed(state)  # noqa: NPY002 - libraries that draw from the global generator
    random.seed(state)
