"""VideoMAE: a plain vision transformer over tubelets, with fixed positions and the mean of its tokens as the feature.

Tong et al., "VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video Pre-Training",
NeurIPS 2022; the network of its fine-tuned files. Tensor names are those of the authors (MCG-NJU); those of
transformers load by renaming. The two differ in the epsilon of the layer norms: 1e-6 everywhere in the authors' code,
1e-12 in the blocks and 1e-5 in the last one in transformers.

Positions are sines and cosines of a token's number, counted through width, height and time, and in no file. Neither is
therefore the size that a file was trained for: 16 frames of 224x224 are taken. Clips of another size or length get the
positions that a network built for them would have. Stochastic depth, which the authors train with, is left out.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tad.extract.backbones import attention as att
from tad.extract.backbones.attention import Block, Patches, TokenBackbone, Triple
from tad.extract.backbones.base import BackboneSpec
from tad.extract.weights import Layout, State, axis_size

TUBELET: Triple = (2, 16, 16)
AUTHORS_EPS = (1e-6, 1e-6)  # of the blocks' layer norms, and of the last one
TRANSFORMERS_EPS = (1e-12, 1e-5)

SPEC = BackboneSpec(
    name="videomae-b",
    modality="rgb",
    frames=16,
    interval=4,
    fps=None,
    short_side=224,
    crop=(224, 224),
    value_range=(0.0, 1.0),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    width=768,
    window=16,
    stride=16,
    any_size=False,
    any_length=False,
    min_frames=2,
)


@lru_cache(maxsize=4)
def _table(tokens: int, width: int) -> np.ndarray:
    channel = np.arange(width)
    angles = np.arange(tokens)[:, None] / np.power(10000.0, 2 * (channel // 2) / width)  # (tokens, width)
    return np.where(channel % 2 == 0, np.sin(angles), np.cos(angles)).astype(np.float32)


def sincos_positions(tokens: int, width: int) -> Tensor:
    """Sines in even and cosines in odd channels, (1, tokens, width), of wavelengths from 2π to 20000π tokens (Vaswani
    et al., NeurIPS 2017, section 3.5)."""
    return torch.from_numpy(_table(tokens, width).copy())[None]


class VideoMAE(TokenBackbone):
    """Clips (B, 3, T, H, W) → features (B, width): the mean over all tokens, then a layer norm.

    Parameters
    ----------
    classes : of the classifier; ``None`` for none.
    frames, image_size : clips that are taken without :attr:`interpolate_positions`; multiples of the tubelet.
    tubelet : frames, height and width of one token.
    width, depth, heads : of the transformer.
    eps : of the blocks' layer norms, and of the last one.
    dropout : before the classifier, in training; the authors have none for this network.
    """

    norm_eps: Tensor
    positions: Tensor

    def __init__(
        self,
        *,
        classes: int | None = 400,
        frames: int = 16,
        image_size: int = 224,
        tubelet: Triple = TUBELET,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        eps: tuple[float, float] = AUTHORS_EPS,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.spec = att.sized(SPEC, frames=frames, image_size=image_size, block=tubelet, width=width)
        self.patch_embed = Patches(block=tubelet, width=width)
        t, h, w = self.native_grid()
        self.register_buffer("positions", sincos_positions(t * h * w, width), persistent=False)
        # Kept with the weights where it is not what the tensors' names say: they are the authors' whoever trained them.
        self.register_buffer("norm_eps", torch.tensor(eps), persistent=eps != AUTHORS_EPS)
        self.blocks = nn.ModuleList([Block(width=width, heads=heads, eps=eps[0], bias="qv") for _ in range(depth)])
        self.fc_norm = nn.LayerNorm(width, eps=eps[1])
        self.head = None if classes is None else nn.Linear(width, classes)
        self.dropout = dropout

    def forward(self, clips: Tensor, *, levels: bool = False) -> dict[str, Tensor]:
        """See :meth:`Backbone.forward`; there are no levels."""
        grid = self.grid(clips)
        x = self.patch_embed(clips).flatten(1, 3)  # (B, t * h * w, width)
        x = x + self.positions_for(grid)
        for block in self.blocks:
            x = block(x)
        return {"features": self.fc_norm(x.mean(1))}

    def positions_for(self, grid: Triple) -> Tensor:
        """Positions (1, t * h * w, width) of the tokens of this grid."""
        if grid == self.native_grid():
            return self.positions
        return sincos_positions(grid[0] * grid[1] * grid[2], self.spec.width).to(self.positions)


# ---- how public files name the tensors -------------------------------------------------------------------------------

# Names of transformers 4 (q_bias) and 5 (query.bias).
TRANSFORMERS = {
    r"^videomae\.embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^videomae\.encoder\.layer\.": "blocks.",
    r"\.attention\.attention\.(q|v)_bias$": r".attn.\1_bias",
    r"\.attention\.attention\.(q|v)(?:uery|alue)\.bias$": r".attn.\1_bias",
    r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.": r".attn.\1.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"^classifier\.": "head.",
}
_rename_transformers = att.rename_parts(TRANSFORMERS)


def transformers_name(key: str) -> str | None:
    """A tensor's name in files of transformers → ours; ``None`` for a bias of the keys, which some releases wrote: it
    adds the same number to every score of a query, and changes nothing."""
    name = _rename_transformers(key)
    return None if name.endswith(".attn.k.bias") else name


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**att.join_qkv(state), "norm_eps": torch.tensor(TRANSFORMERS_EPS)}


def _arguments(state: State, *, blocks: str, embedding: str, classifier: str) -> dict[str, Any]:
    return {
        "width": axis_size(state, embedding, 0),
        "depth": att.depth_of(state, blocks),
        "tubelet": att.block_of(state, embedding),
        **att.head_arguments(state, classifier),
    }


def authors_arguments(state: State) -> dict[str, Any]:
    state = att.without("model.", state)
    read = _arguments(state, blocks=r"^blocks\.(\d+)\.", embedding="patch_embed.proj.weight", classifier="head.weight")
    kept = state.get("norm_eps")
    return {**read, "eps": AUTHORS_EPS if kept is None or kept.shape != (2,) else tuple(kept.tolist())}


def transformers_arguments(state: State) -> dict[str, Any]:
    read = _arguments(
        att.without("model.", state),
        blocks=r"^videomae\.encoder\.layer\.(\d+)\.",
        embedding="videomae.embeddings.patch_embeddings.projection.weight",
        classifier="classifier.weight",
    )
    return {**read, "eps": TRANSFORMERS_EPS}


LAYOUTS = (
    Layout("VideoMAE, MCG-NJU", authors_arguments, att.rename_parts({})),
    Layout("VideoMAE, transformers", transformers_arguments, transformers_name, convert=from_transformers),
)
