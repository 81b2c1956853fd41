"""What a detector is: a module with ``forward``, ``loss`` and ``decode``, and a declaration of what it reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tad.timeline import TimeAxis


@dataclass(frozen=True)
class LevelSpec:
    """One input of a detector: a level of a stream, and how a video's rows are handed over.

    ``layout``: ``full`` is the whole video at its own spacing, ``windowed`` overlapping windows of ``rows`` rows,
    ``rescaled`` the whole video squeezed into ``rows`` rows. All inputs of a detector have the same. ``shape``: what a
    row must be, where it is a map or frame (C, H, W); None: a row of channels. Inputs of the same name are the same
    input, so that it is not compared.
    """

    stream: str
    level: str = "features"
    layout: Literal["full", "windowed", "rescaled"] = "full"
    rows: int | None = None
    shape: tuple[int, ...] | None = field(default=None, compare=False)

    @property
    def key(self) -> str:
        """The name under which the rows stand in :attr:`Batch.features`."""
        return self.stream if self.level == "features" else f"{self.stream}/{self.level}"


@dataclass
class Targets:
    """The truth of one sample: ``segments`` (N, 2) in row edges (see ``TimeAxis.to_rows``) and ``labels`` (N,)."""

    segments: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Targets:
        return Targets(self.segments.to(device), self.labels.to(device))


@dataclass
class Proposals:
    """Another detector's proposals for one sample, best first: ``segments`` (P, 2) in row edges, ``scores`` (P,)."""

    segments: Tensor
    scores: Tensor

    def to(self, device: torch.device | str) -> Proposals:
        return Proposals(self.segments.to(device), self.scores.to(device))

    def __len__(self) -> int:
        return int(self.scores.shape[0])


@dataclass
class Batch:
    """Samples side by side, padded to the longest; everything that a detector may look at."""

    videos: list[str]
    features: dict[str, Tensor]  # LevelSpec.key -> (B, C, T), of maps (B, C, T, H, W), frames as uint8
    mask: Tensor  # (B, T) bool, True where a row is real
    axes: list[TimeAxis]  # of each sample, row 0 being the sample's first row
    durations_s: list[float]
    targets: list[Targets] | None = None
    proposals: list[Proposals] | None = None  # for detectors that refine those of another one
    masks: dict[str, Tensor] = field(default_factory=dict)  # LevelSpec.key -> (B, T of its rows), where levels differ

    def __len__(self) -> int:
        return len(self.videos)

    def mask_of(self, key: str) -> Tensor:
        """(B, T) bool of one need's rows: ``mask`` unless its level has rows of another spacing."""
        return self.masks.get(key, self.mask)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        return replace(
            self,
            features={key: value.to(device, non_blocking=True) for key, value in self.features.items()},
            mask=self.mask.to(device, non_blocking=True),
            targets=None if self.targets is None else [t.to(device) for t in self.targets],
            proposals=None if self.proposals is None else [p.to(device) for p in self.proposals],
            masks={key: mask.to(device, non_blocking=True) for key, mask in self.masks.items()},
        )


@dataclass
class Segments:
    """Detections of one sample before suppression: seconds, class indices, scores. All tensors share their length N."""

    video: str
    segments_s: Tensor  # (N, 2) start and end in seconds
    labels: Tensor  # (N,) int64
    scores: Tensor  # (N,)
    extra: dict[str, Tensor] = field(default_factory=dict)
    duration_s: float = math.nan  # of the video, where it is known

    def __len__(self) -> int:
        return int(self.scores.shape[0])


class Detector(nn.Module):
    """The base of every detector; see ``tad/detect/detectors/`` for the real ones.

    Attributes
    ----------
    needs : the streams and levels that ``forward`` reads from ``batch.features``.
    class_agnostic : it finds actions of any class, all with label 0; classes come from scores of whole videos.
    reads_proposals : it refines proposals of another detector, ``batch.proposals``.
    thins : it applies ``train.feature_dropout`` itself, to rows that it makes.
    """

    needs: tuple[LevelSpec, ...] = ()
    class_agnostic: ClassVar[bool] = False
    reads_proposals: ClassVar[bool] = False
    thins: ClassVar[bool] = False

    def forward(self, batch: Batch) -> Any:
        """The network's outputs for a batch, in row units; whatever ``loss`` and ``decode`` understand."""
        raise TypeError(f"{type(self).__name__} does not define forward()")

    def loss(self, outputs: Any, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Named scalar terms; the trainer minimises their sum."""
        raise TypeError(f"{type(self).__name__} does not define loss()")

    def decode(self, outputs: Any, batch: Batch) -> list[Segments]:
        """One :class:`Segments` a sample, in seconds, inside ``[0, duration]``, before suppression."""
        raise TypeError(f"{type(self).__name__} does not define decode()")


@runtime_checkable
class DenseDetector(Protocol):
    """A detector whose output is maps over one grid of proposals, which an ensemble averages before decoding them."""

    def dense(self, outputs: Any, batch: Batch) -> list[dict[str, Tensor]]:
        """The maps of every sample, cut to its real rows."""
        ...

    def decode_dense(self, maps: dict[str, Tensor], *, video: str, axis: TimeAxis, duration_s: float) -> Segments:
        """The segments of one sample's maps, in seconds; ``decode`` is this of each of :meth:`dense`."""
        ...


class DetectorBuilder(Protocol):
    """What stands in ``DETECTORS``: keyword arguments in, detector out."""

    def __call__(self, *, channels: dict[str, int], classes: int, **model: Any) -> Detector: ...
