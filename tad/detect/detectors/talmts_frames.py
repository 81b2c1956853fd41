"""The parts of TAL-MTS that look at frames: the spatial-temporal transformer (STT) and the frame-level self attention.

Both cut every frame into patches. Each of their encoders is the block of Eq. 1 and 5, attention with LayerNorm before
it; the papers leave widths, heads and the width of STT's patches open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tad.detect.detectors.talmts_layers import Downsample
from tad.errors import RecipeError

EMBEDDING_STD = 0.02  # of position embeddings before training, as in ViT


def patches_of(frames: Tensor, patch: int) -> Tensor:
    """Frames (B, C, T, H, W) → their patches (B, T, Z, C · patch · patch), row by row from the top left."""
    batch, channels, count, height, width = frames.shape
    grid = frames.reshape(batch, channels, count, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, count, -1, channels * patch * patch)


def scaled_frames(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels of 0 to 255 in [-1, 1]."""
    return frames.to(dtype) / 127.5 - 1.0


class PatchEmbedding(nn.Module):
    """Patches of frames as vectors, each with the embedding of its place in the frame: (B, C, T, H, W) → (B, T, Z, W).

    Raises
    ------
    RecipeError : frames that the patches do not fill, when made; frames of another size, when called.
    """

    def __init__(self, *, channels: int, size: Sequence[int], patch: int, width: int) -> None:
        super().__init__()
        if any(side % patch for side in size):
            raise RecipeError(f"patches of {patch} pixels do not fill frames of {size[0]}x{size[1]}; choose a divisor")
        self.shape, self.patch = (channels, *size), patch
        self.places = (size[0] // patch) * (size[1] // patch)  # Z
        self.project = nn.Linear(channels * patch * patch, width)
        self.position = nn.Parameter(torch.randn(self.places, width) * EMBEDDING_STD)

    def forward(self, frames: Tensor) -> Tensor:
        shape = frames.shape[1], *frames.shape[3:]
        if shape != self.shape:
            raise RecipeError(
                f"the frames have (channels, height, width) {tuple(shape)}, the model was made for {self.shape}: set "
                "frame_size to what the store holds, or extract frames of this size"
            )
        x = patches_of(scaled_frames(frames, self.project.weight.dtype), self.patch)
        embedded: Tensor = self.project(x)
        return embedded + self.position


class SelfAttention(nn.Module):
    """``MSA(LN(x))`` of Eq. 1 for x (B, N, W), plus x itself with ``residual``; keys outside ``mask`` are not read."""

    def __init__(self, *, width: int, heads: int, residual: bool) -> None:
        super().__init__()
        self.heads, self.residual = heads, residual
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        queries, keys, values = self.project(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = None if mask is None else mask[:, None, None]  # (B, 1, 1, N)
        y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)  # (B, heads, N, W / heads)
        y = self.out(y.transpose(1, 2).flatten(2))
        return x + y if self.residual else y


class SpatialTemporalTransformer(nn.Module):
    """STT (§III-B, Eq. 1): what the frames of a whole clip have to do with one another, on every level of the pyramid.

    Spatial encoder over the patches of each frame → their mean, one token a frame → temporal embedding → temporal
    encoder over the frames → a linear layer → convolutions of stride 2 down to every level.

    Parameters
    ----------
    channels, size : of the frames: C, (H, W). patch : side of the patches in pixels.
    frames : the most that a clip has. factor : frames a row of the finest level, a power of two.
    hidden, heads : of both encoders. width : of the result. levels : of the pyramid. groups : of the norms.
    residual : add each encoder's input to its output, which Eq. 1 does not.
    """

    def __init__(
        self,
        *,
        channels: int,
        size: Sequence[int],
        patch: int,
        frames: int,
        factor: int,
        hidden: int,
        heads: int,
        width: int,
        levels: int,
        groups: int,
        residual: bool,
    ) -> None:
        super().__init__()
        self.steps = int(math.log2(factor))
        if 2**self.steps != factor:
            raise RecipeError(
                f"STT halves the frames down to the rows: frame_factor must be a power of 2, got {factor}"
            )
        self.embed = PatchEmbedding(channels=channels, size=size, patch=patch, width=hidden)
        self.spatial = SelfAttention(width=hidden, heads=heads, residual=residual)
        self.temporal_position = nn.Parameter(torch.randn(frames, hidden) * EMBEDDING_STD)
        self.temporal = SelfAttention(width=hidden, heads=heads, residual=residual)
        self.linear = nn.Linear(hidden, width)
        self.down = nn.ModuleList(Downsample(width, width, groups=groups) for _ in range(self.steps + levels - 1))

    def forward(self, frames: Tensor, mask: Tensor) -> list[Tensor]:
        """Frames (B, C, T, H, W), 0 to 255, of which ``mask`` (B, T) are real → (B, width, T_k) of every level."""
        x = self.embed(frames)  # (B, T, Z, W)
        batch, count = x.shape[:2]
        if count > len(self.temporal_position):
            raise RecipeError(f"a clip has {count} frames; the model was made for {len(self.temporal_position)}")
        x = self.spatial(x.flatten(0, 1)).mean(1).unflatten(0, (batch, count))  # (B, T, W)
        x = self.temporal(x + self.temporal_position[:count], mask)
        x = self.linear(x).transpose(1, 2) * mask[:, None]  # (B, width, T)
        found = [x]
        for down in self.down:
            x, mask = down(x, mask)
            found.append(x)
        return found[self.steps :]


class FrameSelfAttention(nn.Module):
    """FSA (§III-C, Eq. 5, Fig. 3): what is foreground in each frame, from how its patches relate to one another.

    Patches + position embedding → one encoder over the patches of each frame → a linear layer over all of them.
    """

    def __init__(
        self, *, channels: int, size: Sequence[int], patch: int, hidden: int, heads: int, width: int, residual: bool
    ) -> None:
        super().__init__()
        self.embed = PatchEmbedding(channels=channels, size=size, patch=patch, width=hidden)
        self.encoder = SelfAttention(width=hidden, heads=heads, residual=residual)
        self.linear = nn.Linear(self.embed.places * hidden, width)

    def forward(self, frames: Tensor) -> Tensor:
        """Frames (B, C, T, H, W), 0 to 255 → (B, width, T); every frame by itself."""
        x = self.embed(frames)  # (B, T, Z, W)
        encoded = self.encoder(x.flatten(0, 1)).flatten(1)  # (B T, Z W)
        features: Tensor = self.linear(encoded)
        return features.unflatten(0, x.shape[:2]).transpose(1, 2)
