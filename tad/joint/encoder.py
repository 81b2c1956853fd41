"""The backbone in joint mode: frames of clips → the rows that extraction makes of them, with a graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from tad.errors import RecipeError, did_you_mean
from tad.extract.backbones.base import Backbone
from tad.extract.maps import map_name
from tad.joint.freezing import BatchNorm, batch_norms, set_modes


class Encoder(nn.Module):
    """Frames (F, C, H, W) uint8 and ``index`` (N, W) into them → rows of N clips of W frames, by level:
    ``features`` (N, D), levels (N, C, T'), maps (N, C, T', H', W'); float32, of a float64 backbone float64.

    The same numbers as ``tad.extract.streams.Stream.run`` gives for these clips in one batch, but that maps are not
    rounded to float16. Mixed precision is that of the autocast around the call. A batch norm that trains takes its
    statistics from one chunk.

    Parameters
    ----------
    backbone : not fused; frozen as wanted (see ``tad.joint.freezing``). ``train()`` keeps what is frozen so.
    keys : levels to compute, as a store names them: ``features``, ``s4`` (the mean over height and width),
        ``s4-map``.
    chunk : clips in a forward pass.
    checkpoint : activations of a chunk are not kept but computed again in the backward pass; gradients, running
        statistics and random numbers are those without.

    Raises
    ------
    RecipeError : a level that the backbone does not have, none or one twice; a chunk below 1.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        keys: Sequence[str] = ("features",),
        chunk: int = 8,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        levels = backbone.spec.levels
        known = ["features", *levels, *map(map_name, levels)]
        for key in keys:
            if key not in known:
                raise RecipeError(f"{backbone.spec.name} has no level '{key}'.{did_you_mean(key, known)}")
        if not keys or len(set(keys)) < len(keys):
            raise RecipeError(f"{backbone.spec.name}: levels to compute must be named once each, got {list(keys)}")
        if chunk < 1:
            raise RecipeError(f"a forward pass takes at least one clip, got joint.chunk={chunk}")
        self.backbone, self.keys, self.chunk, self.checkpoint = backbone, tuple(keys), chunk, checkpoint
        self.levels = [level for level in levels if level in keys]
        self.maps = [level for level in levels if map_name(level) in keys]

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        own = next((p.dtype for p in self.backbone.parameters()), torch.float32)
        return torch.promote_types(own, torch.float32)

    def train(self, mode: bool = True) -> Encoder:
        """As ever, but frozen batch norms stay in evaluation mode."""
        super().train(mode)
        set_modes(self.backbone)
        return self

    def forward(self, frames: Tensor, index: Tensor) -> dict[str, Tensor]:
        """See the class.

        Raises
        ------
        ValueError : other shapes or types than those, or no clip.
        RecipeError : clips that the backbone does not take.
        """
        if frames.ndim != 4 or frames.dtype != torch.uint8:
            raise ValueError(f"frames must be (F, C, H, W) uint8, got {tuple(frames.shape)} {frames.dtype}")
        if index.ndim != 2 or index.dtype != torch.int64 or not index.numel():
            raise ValueError(f"index must be (N, W) int64 with N and W at least 1, got {tuple(index.shape)}")
        spec = self.backbone.spec
        if frames.shape[1] != len(spec.mean):
            raise RecipeError(
                f"{spec.name} reads frames of {len(spec.mean)} channels, got {frames.shape[1]}: RGB networks read the "
                "stream of joint.frames, flow networks that of joint.flow_frames"
            )
        rows = [self._chunk(frames, part) for part in index.split(self.chunk)]
        return {key: torch.cat([part[key] for part in rows]) for key in self.keys}

    def _chunk(self, frames: Tensor, index: Tensor) -> dict[str, Tensor]:
        if not (self.checkpoint and torch.is_grad_enabled()):
            return self._rows(frames, index)
        # gathered and normalised inside, so that of a chunk only its index is kept
        contexts = (nullcontext(), KeptStatistics(self.backbone))
        rows: dict[str, Tensor] = recomputed(
            self._rows, frames, index, use_reentrant=False, context_fn=lambda: contexts
        )
        return rows

    def _rows(self, frames: Tensor, index: Tensor) -> dict[str, Tensor]:
        # (n, W, H, W', C) in memory, as extraction has them: by that order kernels are chosen, and round
        clips = frames[index].permute(0, 1, 3, 4, 2).contiguous().permute(0, 4, 1, 2, 3)  # (n, C, W, H, W')
        outputs = self.backbone(self.backbone.normalise(clips, self.dtype), levels=bool(self.levels or self.maps))
        rows = {key: value.to(self.dtype) for key, value in outputs.items()}
        rows |= {map_name(level): rows[level] for level in self.maps}  # (n, C, T', H', W')
        rows |= {level: rows[level].mean(dim=(-2, -1)) for level in self.levels}  # (n, C, T')
        return {key: rows[key] for key in self.keys}


class KeptStatistics:
    """A context, to be entered as often as wanted, in which training batch norms update copies of their statistics."""

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        self.kept: list[tuple[BatchNorm, dict[str, Tensor]]] = []

    def __enter__(self) -> None:
        training = [norm for norm in batch_norms(self.backbone) if norm.training]
        self.kept = [(norm, dict(norm.named_buffers(recurse=False))) for norm in training]
        for norm, buffers in self.kept:
            for name, buffer in buffers.items():
                setattr(norm, name, buffer.clone())  # another tensor, not another value: a graph may hold this one

    def __exit__(self, *_: object) -> None:
        for norm, buffers in self.kept:
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)
        self.kept = []


@contextmanager
def without_graph(encoder: Encoder) -> Iterator[None]:
    """Forward passes without a graph, in a training: all batch norms use their running statistics and leave them be.

    Rows then do not depend on the clips beside them in a chunk, and equal those of an extraction with these weights.
    Weights that autocast rounds meanwhile are not kept: torch below 2.10 keeps them without a graph, and a pass with a
    graph in the same autocast would then give the backbone no gradient.
    """
    cached = torch.is_autocast_cache_enabled()
    norms = [norm for norm in batch_norms(encoder.backbone) if norm.training]
    try:
        for norm in norms:
            norm.training = False
        torch.set_autocast_cache_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        for norm in norms:
            norm.training = True
