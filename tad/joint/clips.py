"""The frames behind a batch's rows: what joint mode's data path hands to the model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tad.detect.interface import Batch


@dataclass
class Clips:
    """The frames behind one sample's rows of one stream.

    Of snippets, each of U stored rows is a clip of its own. Of a fully convolutional pass there is one clip, U = 1,
    whose stage outputs are the rows.

    Attributes
    ----------
    frames : (F, C, H, W) uint8, cropped and augmented; three channels of colour, or flow x and y.
    index : (U, W) int64, the W frames of each clip in ``frames``; frames beyond the video repeat its last.
    rows : (U,) int64, which rows of the stored stream the clips are; of one pass, the first row of the first need.
    place : (T,) float32, where each row of the sample lies among the U; between two it is interpolated linearly, as in
        rescaled videos. Of one pass it is empty.
    """

    frames: Tensor
    index: Tensor
    rows: Tensor
    place: Tensor

    def to(self, device: torch.device | str) -> Clips:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Clips(moved(self.frames), moved(self.index), self.rows, moved(self.place))


@dataclass
class JointBatch(Batch):
    """A batch with the frames behind its rows; ``features`` holds the rows of the store.

    Attributes
    ----------
    clips : stream -> the clips of each sample.
    raw : ``LevelSpec.key`` of needs that are frames themselves -> (B, C, T, H, W) uint8, cut and augmented like the
        clips, to be read instead of those in ``features``.
    """

    clips: dict[str, list[Clips]] = field(default_factory=dict)
    raw: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> JointBatch:
        """The same batch with its tensors on ``device``."""
        moved = super().to(device)
        assert isinstance(moved, JointBatch)
        return replace(
            moved,
            clips={stream: [clip.to(device) for clip in clips] for stream, clips in self.clips.items()},
            raw={key: frames.to(device, non_blocking=True) for key, frames in self.raw.items()},
        )
