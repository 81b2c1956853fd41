"""TimeSformer: a vision transformer over frames whose blocks attend over time, then over space.

Bertasius, Wang and Torresani, "Is Space-Time Attention All You Need for Video Understanding?", ICML 2021, section 3,
divided space-time attention. Tensor names are those of the official files (without their ``model.``); those of
transformers and of mmaction2 load by renaming. All three compute the same; mmaction2's files take other pixel values.

Positions of other sizes and lengths are the nearest of those learned, in space and in time, as in the official code.
Stochastic depth, which the authors train with, is left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tad.extract.backbones import attention as att
from tad.extract.backbones.attention import Attention, Mlp, Patches, TokenBackbone
from tad.extract.backbones.base import BackboneSpec
from tad.extract.weights import Layout, State, axis_size

# Frames between the frames of a clip, by their number: the published networks (8x32, high resolution 16x16, long 96x4)
# differ in it, and no file says it. Other lengths count as the first.
INTERVALS = {8: 32, 16: 16, 96: 4}

SPEC = BackboneSpec(
    name="timesformer-b",
    modality="rgb",
    frames=8,
    interval=INTERVALS[8],
    fps=30.0,
    short_side=224,
    crop=(224, 224),
    value_range=(0.0, 1.0),
    mean=(0.45, 0.45, 0.45),
    std=(0.225, 0.225, 0.225),
    width=768,
    window=8,
    stride=32,
    any_size=False,
    any_length=False,
    grid_fps=30.0,
)
MMACTION = {
    "value_range": (0.0, 255.0),
    "mean": (127.5, 127.5, 127.5),
    "std": (127.5, 127.5, 127.5),
    "fps": None,
    "grid_fps": None,  # frames are counted as each file has them
}


class DividedBlock(nn.Module):
    """Attention over time, attention over space, MLP; each behind a layer norm and beside a shortcut."""

    def __init__(self, *, width: int, heads: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.temporal_norm1 = nn.LayerNorm(width, eps=eps)
        self.temporal_attn = Attention(width=width, heads=heads)
        self.temporal_fc = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width=width, heads=heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width=width)

    def forward(self, cls: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class token (B, 1, width) and tokens (B, T, N, width) → the same.

        The class token takes no part in the attention over time; it attends to every frame on its own, and the mean
        over the frames is added to it.
        """
        batch, frames, patches, _ = x.shape
        y = x.transpose(1, 2).flatten(0, 1)  # (B * N, T, width): each place on its own
        y = self.temporal_fc(self.temporal_attn(self.temporal_norm1(y)))
        x = x + y.unflatten(0, (batch, patches)).transpose(1, 2)

        y = torch.cat([cls[:, None].expand(-1, frames, -1, -1), x], 2).flatten(0, 1)  # (B * T, 1 + N, width)
        y = self.attn(self.norm1(y)).unflatten(0, (batch, frames))  # (B, T, 1 + N, width)
        cls, x = cls + y[:, :, 0].mean(1, keepdim=True), x + y[:, :, 1:]

        y = torch.cat([cls, x.flatten(1, 2)], 1)  # (B, 1 + T * N, width)
        y = y + self.mlp(self.norm2(y))
        return y[:, :1], y[:, 1:].unflatten(1, (frames, patches))


class TimeSformer(TokenBackbone):
    """Clips (B, 3, T, H, W) → features (B, width), the class token after the final layer norm.

    Parameters
    ----------
    classes : of the classifier; ``None`` for none.
    frames, image_size : clips that there are positions for; the size is a multiple of the patch.
    patch_size, width, depth, heads : of the transformer.
    dropout : before the classifier, in training; the authors have none.
    """

    def __init__(
        self,
        *,
        classes: int | None = 400,
        frames: int = 8,
        image_size: int = 224,
        patch_size: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        block = (1, patch_size, patch_size)
        interval = INTERVALS.get(frames, SPEC.interval)
        spec = att.sized(SPEC, frames=frames, image_size=image_size, block=block, width=width)
        self.spec = replace(spec, interval=interval, stride=max(1, frames * interval // 8))
        self.patch_embed = Patches(block=block, width=width, flat=True)
        _, h, w = self.native_grid()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + h * w, width) * 0.02)
        self.time_embed = nn.Parameter(torch.randn(1, frames, width) * 0.02)
        self.blocks = nn.ModuleList([DividedBlock(width=width, heads=heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = None if classes is None else nn.Linear(width, classes)
        self.dropout = dropout

    def forward(self, clips: Tensor, *, levels: bool = False) -> dict[str, Tensor]:
        """See :meth:`Backbone.forward`; there are no levels."""
        grid = self.grid(clips)
        space, time = self.positions_for(grid)
        x = self.patch_embed(clips).flatten(2, 3)  # (B, T, h * w, width)
        x = x + space[:, None, 1:] + time[:, :, None]
        cls = (self.cls_token + space[:, :1]).expand(len(clips), -1, -1)  # (B, 1, width)
        for block in self.blocks:
            cls, x = block(cls, x)
        return {"features": self.norm(cls)[:, 0]}

    def positions_for(self, grid: att.Triple) -> tuple[Tensor, Tensor]:
        """Positions in space (1, 1 + h * w, width) and time (1, T, width): those learned, or the nearest of them."""
        (frames, h, w), native = grid, self.native_grid()
        space: Tensor = self.pos_embed
        time: Tensor = self.time_embed
        if (h, w) != native[1:]:
            patches = att.resized(space[:, 1:], (1, *native[1:]), (1, h, w), space="nearest")
            space = torch.cat([space[:, :1], patches], 1)
        if frames != native[0]:
            time = att.resized(time, (native[0], 1, 1), (frames, 1, 1), time="nearest")
        return space, time


# ---- how public files name the tensors -------------------------------------------------------------------------------

TRANSFORMERS = {
    r"^timesformer\.embeddings\.cls_token$": "cls_token",
    r"^timesformer\.embeddings\.position_embeddings$": "pos_embed",
    r"^timesformer\.embeddings\.time_embeddings$": "time_embed",
    r"^timesformer\.embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^timesformer\.encoder\.layer\.": "blocks.",
    r"\.temporal_attention\.attention\.qkv\.": ".temporal_attn.qkv.",
    r"\.temporal_attention\.output\.dense\.": ".temporal_attn.proj.",
    r"\.temporal_layernorm\.": ".temporal_norm1.",
    r"\.temporal_dense\.": ".temporal_fc.",
    r"\.attention\.attention\.qkv\.": ".attn.qkv.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"^timesformer\.layernorm\.": "norm.",
    r"^classifier\.": "head.",
}
MMACTION_NAMES = {
    r"^cls_head\.fc_cls\.": "head.",
    r"^patch_embed\.projection\.": "patch_embed.proj.",
    r"^transformer_layers\.layers\.(\d+)\.": r"blocks.\1.",
    r"\.attentions\.0\.norm\.": ".temporal_norm1.",
    r"\.attentions\.0\.temporal_fc\.": ".temporal_fc.",
    r"\.attentions\.0\.attn\.": ".temporal_attn.",
    r"\.attentions\.1\.norm\.": ".norm1.",
    r"\.attentions\.1\.attn\.": ".attn.",
    r"\.in_proj_(weight|bias)$": r".qkv.\1",
    r"\.out_proj\.": ".proj.",
    r"\.ffns\.0\.norm\.": ".norm2.",
    r"\.ffns\.0\.layers\.0\.0\.": ".mlp.fc1.",
    r"\.ffns\.0\.layers\.1\.": ".mlp.fc2.",
}


def _arguments(state: State, *, blocks: str, embedding: str, space: str, time: str, classifier: str) -> dict[str, Any]:
    _, height, _ = att.block_of(state, embedding)
    return {
        "width": axis_size(state, embedding, 0),
        "depth": att.depth_of(state, blocks),
        "patch_size": height,
        "frames": axis_size(state, time, 1),
        "image_size": att.side_of(axis_size(state, space, 1) - 1, space) * height,
        **att.head_arguments(state, classifier),
    }


def official_arguments(state: State) -> dict[str, Any]:
    return _arguments(
        att.without("model.", state),
        blocks=r"^blocks\.(\d+)\.",
        embedding="patch_embed.proj.weight",
        space="pos_embed",
        time="time_embed",
        classifier="head.weight",
    )


def transformers_arguments(state: State) -> dict[str, Any]:
    inside = "timesformer.embeddings"
    return _arguments(
        att.without("model.", state),
        blocks=r"^timesformer\.encoder\.layer\.(\d+)\.",
        embedding=f"{inside}.patch_embeddings.projection.weight",
        space=f"{inside}.position_embeddings",
        time=f"{inside}.time_embeddings",
        classifier="classifier.weight",
    )


def mmaction_arguments(state: State) -> dict[str, Any]:
    return _arguments(
        att.without("model.", state),
        blocks=r"^backbone\.transformer_layers\.layers\.(\d+)\.",
        embedding="backbone.patch_embed.projection.weight",
        space="backbone.pos_embed",
        time="backbone.time_embed",
        classifier="cls_head.fc_cls.weight",
    )


LAYOUTS = (
    Layout("TimeSformer, official", official_arguments, att.rename_parts({})),
    Layout("TimeSformer, transformers", transformers_arguments, att.rename_parts(TRANSFORMERS)),
    Layout(
        "mmaction2 TimeSformer",
        mmaction_arguments,
        att.rename_parts(MMACTION_NAMES, prefixes=("model.", "backbone.")),
        MMACTION,
    ),
)
