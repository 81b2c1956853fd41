"""A backbone before its detector: frames in, the detector's outputs out, gradients through as much as the mode says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tad.detect.interface import Batch, Detector, Segments, Targets
from tad.detect.trainer import thinned
from tad.errors import RecipeError
from tad.joint.bank import FeatureBank, encode_banked
from tad.joint.clips import Clips, JointBatch
from tad.joint.encoder import Encoder, without_graph
from tad.joint.gradient_sampling import encode_sampled
from tad.recipe import JointRecipe


class JointModel(Detector):
    """Encoders, one a stream, and the detector that reads their rows (ETAD Section 3.1; SP-TAD Section 3; TAL-MTS).

    Each row of a snippet-level detector is a clip of its own. A detector that reads stage outputs has them from one
    fully convolutional pass over the frames of its window.

    Parameters
    ----------
    detector : what learns on the rows; its needs, loss and decoding are those of the whole.
    encoders : stream -> the backbone that makes its rows.
    joint : mode, ratio, sampler, frozen stages and norms.
    feature_dropout : this part of the rows' values is zero in each training step.
    banks : stream -> earlier rows, of mode ``bank``.

    Raises
    ------
    RecipeError : sampling of snippets, or a bank, for a detector that has none: it reads stage outputs.
    """

    thins = True

    def __init__(
        self,
        *,
        detector: Detector,
        encoders: Mapping[str, Encoder],
        joint: JointRecipe,
        feature_dropout: float = 0.0,
        banks: Mapping[str, FeatureBank] | None = None,
    ) -> None:
        super().__init__()
        self.detector = detector
        self.streams = tuple(encoders)
        self.encoders = nn.ModuleList(encoders.values())  # a stream's name need not be a module's
        self.joint, self.feature_dropout, self.banks = joint, feature_dropout, dict(banks or {})
        self.needs = detector.needs
        read = [need for need in detector.needs if need.stream in encoders and need.level != "features"]
        self.in_one_pass = frozenset(need.stream for need in read)  # the other streams are snippets
        if read and (joint.mode == "bank" or (joint.mode == "egs" and 0 < joint.ratio < 1)):
            levels = ", ".join(need.key for need in read)
            raise RecipeError(
                f"joint.mode={joint.mode} samples snippets, but this detector reads stage outputs ({levels}) of one "
                "pass over its window: take joint.mode=full (with joint.checkpoint=true where memory is short), or "
                "joint.mode=egs with joint.ratio=0"
            )

    def forward(self, batch: Batch) -> Any:
        """The detector's outputs for rows made from ``batch.clips``; in mode ``pre-extracted`` for the stored ones."""
        if self.joint.mode != "pre-extracted":
            assert isinstance(batch, JointBatch)
            batch = replace(batch, features={**batch.features, **batch.raw, **self.rows(batch)})
        if self.training:
            batch = thinned(batch, self.feature_dropout)
        return self.detector(batch)

    def rows(self, batch: JointBatch) -> dict[str, Tensor]:
        """``LevelSpec.key`` -> the rows of all samples, (B, C, T) or maps (B, C, T, H, W), zero behind their ends."""
        rows: dict[str, Tensor] = {}
        for stream, encoder in zip(self.streams, self.encoders, strict=True):
            assert isinstance(encoder, Encoder)
            clips = batch.clips[stream]
            if stream in self.in_one_pass:
                rows |= self._of_passes(encoder, stream, clips, batch)
            else:
                rows[stream] = side_by_side(self._of_snippets(encoder, stream, clips, batch), clips, batch.mask)
        return rows

    def _of_snippets(self, encoder: Encoder, stream: str, clips: Sequence[Clips], batch: Batch) -> list[Tensor]:
        """The rows (U, D) of each sample's snippets."""
        joint = self.joint
        if joint.mode == "bank":
            return encode_banked(
                encoder, clips, bank=self.banks[stream], videos=batch.videos, ratio=joint.ratio, sampler=joint.sampler
            )
        ratio = 1.0 if joint.mode == "full" else joint.ratio
        return encode_sampled(encoder, clips, ratio=ratio, sampler=joint.sampler)

    def _of_passes(self, encoder: Encoder, stream: str, clips: Sequence[Clips], batch: Batch) -> dict[str, Tensor]:
        """The levels of one stream, cut to the batch's rows."""
        learns = self.joint.mode == "full" or self.joint.ratio > 0
        with nullcontext() if learns else without_graph(encoder):
            passes = [encoder(clip.frames, clip.index) for clip in clips]
        found = {}
        for need in self.needs:
            if need.stream != stream:
                continue
            mask = batch.mask_of(need.key)  # (B, T)
            level = torch.cat([one[need.level][:, :, : mask.shape[1]] for one in passes])  # (B, C, T, ..)
            found[need.key] = level * mask.view(len(mask), 1, -1, *[1] * (level.ndim - 3))
        return found

    def loss(self, outputs: Any, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """The detector's."""
        return self.detector.loss(outputs, targets)

    def decode(self, outputs: Any, batch: Batch) -> list[Segments]:
        """The detector's."""
        return self.detector.decode(outputs, batch)


def side_by_side(rows: Sequence[Tensor], clips: Sequence[Clips], mask: Tensor) -> Tensor:
    """Rows (U, D) of each sample -> (B, D, T): put where ``Clips.place`` says, zero where ``mask`` (B, T) is False."""
    batch = rows[0].new_zeros(mask.shape[0], rows[0].shape[1], mask.shape[1])  # (B, D, T)
    placed = []
    for found, clip in zip(rows, clips, strict=True):
        low = clip.place.floor().long()  # (T,)
        part = (clip.place - low).to(found.dtype)[:, None]
        high = (low + 1).clamp(max=len(found) - 1)
        placed.append(torch.where(part > 0, found[low] * (1 - part) + found[high] * part, found[low]).T)  # (D, T)
    for index, values in enumerate(placed):
        batch[index, :, : values.shape[1]] = values
    return batch
