"""Augmentation of frames, drawn once a sample: all its frames and streams are cut, mirrored and shifted alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tad.joint.frames import Box, Footage
from tad.training.rng import seeded

DRAWS = 1  # the last part of the seed: a sample's random cut in time has its own draws


@dataclass(frozen=True)
class Augmentation:
    """What is drawn (ETAD Appendix F, Table 12; its default is ``random_crop`` alone).

    ``random_crop``: cut at a uniformly random place instead of the centre. ``flip``: mirror left and right in half of
    the samples. ``jitter``: take a frame beside each frame of a snippet, see :meth:`Draw.shifts`.
    """

    random_crop: bool = False
    flip: bool = False
    jitter: bool = False

    def draw(self, seed: int, epoch: int, index: int) -> Draw:
        """What happens to sample ``index`` of an epoch; it depends on these numbers alone."""
        rng = seeded(seed, epoch, index, DRAWS)
        down, right, mirrored, jitter = rng.random(), rng.random(), rng.random() < 0.5, int(rng.integers(2**62))
        return Draw(
            place=(down, right) if self.random_crop else None,
            mirrored=self.flip and mirrored,
            jitter_seed=jitter if self.jitter else None,
        )


@dataclass(frozen=True)
class Draw:
    """What was drawn for one sample: where to cut, as shares of the room that there is, None at the centre."""

    place: tuple[float, float] | None = None
    mirrored: bool = False
    jitter_seed: int | None = None

    def box(self, footage: Footage) -> Box:
        """The box to cut: as extraction cuts it, or any other of that size in the frame with the same probability.

        Streams whose frames differ in size are cut at the same place relative to the room in each.
        """
        box = footage.box
        if self.place is None:
            return box
        room = footage.height - box.height, footage.width - box.width
        top, left = (int(share * (pixels + 1)) for share, pixels in zip(self.place, room, strict=True))
        return Box(top, left, box.height, box.width)

    def shifts(self, shape: tuple[int, int], *, interval: int) -> np.ndarray:
        """By how many frames each frame of each snippet is shifted: (U, W) int64, zero without jitter.

        Of frames ``interval`` apart each is one of the ``interval`` frames around it, so that they stay in their order;
        of neighbouring frames (interval 1) it is itself, the one before, or the one behind. Streams with the same
        number of snippets and frames get the same.
        """
        if self.jitter_seed is None:
            return np.zeros(shape, np.int64)
        low, high = (-1, 1) if interval == 1 else (-(interval // 2), (interval - 1) // 2)
        return seeded(self.jitter_seed).integers(low, high + 1, shape)

    def applied(self, frames: np.ndarray, box: Box, *, flow: bool) -> np.ndarray:
        """Frames (F, H, W, C) uint8 → their ``box``, mirrored if that was drawn, (F, h, w, C); a view where it can be.

        Mirrored flow points the other way in x. Of quantised flow q that is ``255 - q``: the exact negative of the
        number that q stands for, and what :func:`~tad.extract.flow.quantise` makes of the negative flow, except halfway
        between two steps. There it rounds to even, so that no motion is 128 in both directions, not 127.
        """
        frames = frames[:, box.top : box.top + box.height, box.left : box.left + box.width]
        if not self.mirrored:
            return frames
        frames = frames[:, :, ::-1]
        if not flow:
            return frames
        x = 255 - frames[..., :1]  # (F, h, w, 1)
        return np.concatenate([x, frames[..., 1:]], axis=-1)
