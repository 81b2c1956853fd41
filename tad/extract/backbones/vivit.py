"""ViViT: a transformer over tubelets of a video, with attention over space and time at once or one after the other.

Arnab et al., "ViViT: A Video Vision Transformer", ICCV 2021. :class:`ViViT` is Model 1 (section 3.3.1, joint attention
over all tubelets), the only one of which PyTorch files are public (transformers). :class:`FactorisedViViT` is Model 2
(section 3.3.2, the factorised encoder): a spatial transformer over the tubelets of each point in time with a class
token of its own, then a temporal transformer over those class tokens. Layer norms have epsilon 1e-6, GELUs are the tanh
approximation, as in the authors' code.

Inputs lie in [-1, 1]: so were the networks trained. The preprocessing settings published with the transformers files
normalise a second time, to [-3, 1].
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tad.errors import WeightsError
from tad.extract.backbones import attention as att
from tad.extract.backbones.attention import Block, Patches, TokenBackbone, Triple
from tad.extract.backbones.base import BackboneSpec
from tad.extract.weights import Layout, State, axis_size

TUBELET: Triple = (2, 16, 16)

JOINT = BackboneSpec(
    name="vivit-b",
    modality="rgb",
    frames=32,
    interval=2,
    fps=25.0,  # ten seconds of Kinetics are 250 frames to the authors' code
    short_side=256,
    crop=(224, 224),
    value_range=(-1.0, 1.0),
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    width=768,
    window=32,
    stride=16,
    any_size=False,
    any_length=False,
    min_frames=2,
    grid_fps=25.0,
)
FACTORISED = replace(JOINT, name="vivit-b-fe")


class Encoder(nn.Module):
    """Class token in front, learned positions, ``depth`` blocks, a final layer norm: (N, L, width) → (N, width), what
    became of the class token.

    ``grid`` is what the L tokens lie on, (time, height, width); positions are (1, 1 + L, width), the class token's
    first.
    """

    def __init__(self, *, grid: Triple, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.native = grid
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 1 + grid[0] * grid[1] * grid[2], width) * 0.02)
        self.blocks = nn.ModuleList([Block(width=width, heads=heads, eps=1e-6, gelu="tanh") for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor, grid: Triple) -> Tensor:
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)  # (N, 1 + L, width)
        x = x + self.positions_for(grid)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def positions_for(self, grid: Triple) -> Tensor:
        """The positions, interpolated (bicubic in space, linear in time) where the grid is another than learned."""
        if grid == self.native:
            return self.positions
        return torch.cat([self.positions[:, :1], att.resized(self.positions[:, 1:], self.native, grid)], 1)


class ViViT(TokenBackbone):
    """Model 1: clips (B, 3, T, H, W) → features (B, width), the class token after joint attention over all tubelets.

    Parameters
    ----------
    classes : of the classifier; ``None`` for none.
    frames, image_size : clips that there are positions for; a multiple of the tubelet each.
    tubelet : frames, height and width of one token.
    width, depth, heads : of the transformer.
    dropout : before the classifier, in training; the authors have none.
    """

    def __init__(
        self,
        *,
        classes: int | None = 400,
        frames: int = 32,
        image_size: int = 224,
        tubelet: Triple = TUBELET,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.spec = att.sized(JOINT, frames=frames, image_size=image_size, block=tubelet, width=width)
        self.patch_embed = Patches(block=tubelet, width=width)
        self.encoder = Encoder(grid=self.native_grid(), width=width, depth=depth, heads=heads)
        self.head = None if classes is None else nn.Linear(width, classes)
        self.dropout = dropout

    def forward(self, clips: Tensor, *, levels: bool = False) -> dict[str, Tensor]:
        """See :meth:`Backbone.forward`; there are no levels."""
        grid = self.grid(clips)
        tokens = self.patch_embed(clips).flatten(1, 3)  # (B, t * h * w, width)
        return {"features": self.encoder(tokens, grid)}


class FactorisedViViT(TokenBackbone):
    """Model 2: clips (B, 3, T, H, W) → features (B, width), the class token of the temporal transformer.

    Both transformers have positions, a class token and a final layer norm of their own. Parameters as for
    :class:`ViViT`; ``temporal_depth`` is that of the second transformer.
    """

    def __init__(
        self,
        *,
        classes: int | None = 400,
        frames: int = 32,
        image_size: int = 224,
        tubelet: Triple = TUBELET,
        width: int = 768,
        depth: int = 12,
        temporal_depth: int = 4,
        heads: int = 12,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.spec = att.sized(FACTORISED, frames=frames, image_size=image_size, block=tubelet, width=width)
        self.patch_embed = Patches(block=tubelet, width=width)
        t, h, w = self.native_grid()
        self.spatial = Encoder(grid=(1, h, w), width=width, depth=depth, heads=heads)
        self.temporal = Encoder(grid=(t, 1, 1), width=width, depth=temporal_depth, heads=heads)
        self.head = None if classes is None else nn.Linear(width, classes)
        self.dropout = dropout

    def forward(self, clips: Tensor, *, levels: bool = False) -> dict[str, Tensor]:
        """See :meth:`Backbone.forward`; there are no levels."""
        t, h, w = self.grid(clips)
        tokens = self.patch_embed(clips).flatten(0, 1).flatten(1, 2)  # (B * t, h * w, width)
        frames = self.spatial(tokens, (1, h, w)).unflatten(0, (len(clips), t))  # (B, t, width)
        return {"features": self.temporal(frames, (t, 1, 1))}


# ---- how public files name the tensors -------------------------------------------------------------------------------

# Names of transformers 4 (which the published files have) and of transformers 5 (which it writes); both in one table,
# as none is part of another.
TRANSFORMERS = {
    r"^(vivit\.)?pooler\.": "pooler.",
    r"^vivit\.embeddings\.cls_token$": "encoder.cls",
    r"^vivit\.embeddings\.position_embeddings$": "encoder.positions",
    r"^vivit\.embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^vivit\.(encoder\.layer|layers)\.(\d+)\.": r"encoder.blocks.\2.",
    r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.": r".attn.\1.",
    r"\.attention\.(q|k|v)_proj\.": r".attn.\1.",
    r"\.attention\.(output\.dense|o_proj)\.": ".attn.proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"^vivit\.layernorm\.": "encoder.norm.",
    r"^classifier\.": "head.",
}


def transformers_name(key: str) -> str | None:
    """A tensor's name in files of transformers → ours; ``None`` for the pooler, which follows the feature."""
    name = _rename_transformers(key)
    return None if name.startswith("pooler.") else name


_rename_transformers = att.rename_parts(TRANSFORMERS)


def clip_of(tokens: int, tubelet: Triple, key: str) -> dict[str, int]:
    """``frames`` and ``image_size`` behind so many tokens of joint attention; the file says only how many there are.

    Pictures of 224 pixels where they fit; else, of the square pictures (and of those over a power of two of points in
    time, if there are any), those whose proportion to the length is nearest to the published one, 16 points in time of
    14x14 patches. For other clips build :class:`ViViT` yourself.
    """
    sides = [side for side in range(1, math.isqrt(max(tokens, 0)) + 1) if tokens % (side * side) == 0]
    if not sides:
        raise WeightsError(f"{key} has no positions beside that of the class token")
    likely = [side for side in sides if (tokens // side**2).bit_count() == 1] or sides
    usual = 224 // tubelet[1]
    side = usual if usual in sides else min(likely, key=lambda n: abs(math.log(tokens / n**3 * 14 / 16)))
    return {"frames": tokens // (side * side) * tubelet[0], "image_size": side * tubelet[1]}


def _common(state: State, blocks: str, embedding: str, classifier: str) -> dict[str, Any]:
    return {
        "width": axis_size(state, embedding, 0),
        "depth": att.depth_of(state, blocks),
        "tubelet": att.block_of(state, embedding),
        **att.head_arguments(state, classifier),
    }


def transformers_arguments(state: State) -> dict[str, Any]:
    state = att.without("model.", state)
    embedding, key = "vivit.embeddings.patch_embeddings.projection.weight", "vivit.embeddings.position_embeddings"
    read = _common(state, r"^vivit\.(?:encoder\.layer|layers)\.(\d+)\.", embedding, "classifier.weight")
    return {**read, **clip_of(axis_size(state, key, 1) - 1, read["tubelet"], key)}


def joint_arguments(state: State) -> dict[str, Any]:
    key = "encoder.positions"
    read = _common(state, r"^encoder\.blocks\.(\d+)\.", "patch_embed.proj.weight", "head.weight")
    return {**read, **clip_of(axis_size(state, key, 1) - 1, read["tubelet"], key)}


def factorised_arguments(state: State) -> dict[str, Any]:
    read = _common(state, r"^spatial\.blocks\.(\d+)\.", "patch_embed.proj.weight", "head.weight")
    side = att.side_of(axis_size(state, "spatial.positions", 1) - 1, "spatial.positions")
    return {
        **read,
        "temporal_depth": att.depth_of(state, r"^temporal\.blocks\.(\d+)\."),
        "frames": (axis_size(state, "temporal.positions", 1) - 1) * read["tubelet"][0],
        "image_size": side * read["tubelet"][1],
    }


JOINT_LAYOUTS = (
    Layout("ViViT, transformers", transformers_arguments, transformers_name, convert=att.join_qkv),
    Layout("tad ViViT", joint_arguments),
)
FACTORISED_LAYOUTS = (Layout("tad ViViT factorised encoder", factorised_arguments),)
