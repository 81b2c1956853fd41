"""What the video transformers share: patches, attention, pre-norm blocks, positions and how they are interpolated.

Tensor names inside these modules are those that most public code shares (``attn.qkv``, ``attn.proj``, ``mlp.fc1``,
``norm1``), so that the networks built from them load official files as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad.errors import RecipeError, WeightsError
from tad.extract.backbones.base import Backbone, BackboneSpec
from tad.extract.weights import State, axis_size

Triple = tuple[int, int, int]
Gelu = Literal["none", "tanh"]  # exact, or its tanh approximation


class Patches(nn.Module):
    """Cuts clips into blocks of (frames, height, width) pixels, without overlap, and projects each to a token.

    The same as a convolution whose stride is its kernel, as a matrix product: nearly twice as fast on the CPU.
    ``flat`` keeps the kernel two-dimensional, as networks that embed single frames store it.
    """

    def __init__(self, *, block: Triple, width: int, flat: bool = False) -> None:
        super().__init__()
        self.block = block
        self.proj: nn.Conv2d | nn.Conv3d
        self.proj = nn.Conv2d(3, width, block[1:], block[1:]) if flat else nn.Conv3d(3, width, block, block)

    def forward(self, clips: Tensor) -> Tensor:
        """(B, 3, T, H, W) → (B, t, h, w, width), one token a block."""
        sizes = [size for n, k in zip(clips.shape[2:], self.block, strict=True) for size in (n // k, k)]
        x = clips.reshape(*clips.shape[:2], *sizes)  # (B, 3, t, frames, h, height, w, width)
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # (B, t, h, w, pixels of a block)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention over (N, L, width), every token to every token (Vaswani et al., NeurIPS 2017, 3.2).

    ``bias``: ``qkv`` for a bias on queries, keys and values, ``qv`` where the keys have none (a bias of the keys adds
    the same number to every score of a query and changes nothing).
    """

    def __init__(self, *, width: int, heads: int, bias: Literal["qkv", "qv"] = "qkv") -> None:
        super().__init__()
        if width % heads:
            raise RecipeError(f"{heads} attention heads do not share {width} channels evenly")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias == "qkv")
        self.q_bias = nn.Parameter(torch.zeros(width)) if bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if bias == "qv" else None
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        bias: Tensor | None = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        each = x.shape[2] // self.heads
        x = F.linear(x, self.qkv.weight, bias).unflatten(2, (3, self.heads, each))  # (N, L, 3, heads, width / heads)
        q, k, v = x.permute(2, 0, 3, 1, 4)  # (N, heads, L, width / heads) each
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, four times as wide inside."""

    def __init__(self, *, width: int, gelu: Gelu = "none") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each behind a layer norm and beside a shortcut."""

    def __init__(
        self, *, width: int, heads: int, eps: float, gelu: Gelu = "none", bias: Literal["qkv", "qv"] = "qkv"
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width=width, heads=heads, bias=bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width=width, gelu=gelu)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokenBackbone(Backbone):
    """A backbone over patches: checks clips against its positions, and has a linear classifier.

    Subclasses set ``spec``, ``patch_embed``, ``head`` (``None``: the weights held no classifier) and ``dropout``.
    """

    patch_embed: Patches
    head: nn.Linear | None

    def grid(self, clips: Tensor) -> Triple:
        """Tokens in time, height and width that these clips are cut into.

        Raises
        ------
        RecipeError : see :meth:`Backbone.check`; also where blocks do not tile the clips.
        """
        frames, height, width = self.patch_embed.block
        self.check(clips, min_size=min(height, width))
        t, h, w = clips.shape[2:]
        if t % frames or h % height or w % width:
            raise RecipeError(
                f"{self.spec.name} cuts clips into blocks of {frames} frames of {height}x{width} pixels, which do not "
                f"tile {t} frames of {h}x{w}: take multiples of them"
            )
        return t // frames, h // height, w // width

    def native_grid(self) -> Triple:
        """Tokens in time, height and width that there are positions for."""
        frames, height, width = self.patch_embed.block
        return self.spec.frames // frames, self.spec.crop[0] // height, self.spec.crop[1] // width

    def classify(self, features: Tensor) -> Tensor:
        """See :meth:`Backbone.classify`."""
        return self.classified(self.head, features)


def sized(spec: BackboneSpec, *, frames: int, image_size: int, block: Triple, width: int) -> BackboneSpec:
    """The spec of the same network with other clips: the short side keeps its proportion to the crop, and a row still
    comes every same part of a window.

    Raises
    ------
    RecipeError : blocks do not tile such clips.
    """
    if min(frames, image_size) < 1 or frames % block[0] or image_size % block[1] or image_size % block[2]:
        raise RecipeError(
            f"{spec.name} cuts clips into blocks of {block[0]} frames of {block[1]}x{block[2]} pixels, which do not "
            f"tile {frames} frames of {image_size}x{image_size}"
        )
    return replace(
        spec,
        frames=frames,
        window=frames,
        stride=max(1, spec.stride * frames // spec.frames),
        short_side=spec.short_side * image_size // spec.crop[0],
        crop=(image_size, image_size),
        min_frames=block[0],
        width=width,
    )


def resized(
    positions: Tensor,
    old: Triple,
    new: Triple,
    *,
    space: Literal["bicubic", "nearest"] = "bicubic",
    time: Literal["linear", "nearest"] = "linear",
) -> Tensor:
    """Learned positions (1, t*h*w, D), time outermost, of another grid: in space as a picture, then in time.

    Grids are aligned at the outer borders of their patches. Axes that stay the same stay bit for bit the same. In
    float32 whatever the precision of ``positions``.
    """
    dtype = positions.dtype
    x = positions.float().unflatten(1, old)  # (1, t, h, w, D)
    if new[1:] != old[1:]:
        x = x[0].permute(0, 3, 1, 2)  # (t, D, h, w)
        x = F.interpolate(x, size=new[1:], mode=space).permute(0, 2, 3, 1)[None]  # (1, t, h', w', D)
    if new[0] != old[0]:
        x = x[0].flatten(1).T[None]  # (1, h' * w' * D, t)
        x = F.interpolate(x, size=new[0], mode=time)[0].T.unflatten(1, (*new[1:], -1))[None]  # (1, t', h', w', D)
    return x.flatten(1, 3).to(dtype)


# ---- reading files ---------------------------------------------------------------------------------------------------


def depth_of(state: State, pattern: str) -> int:
    """How many blocks a file has: one more than the highest number that ``pattern``'s first group finds in a key."""
    found = [int(match[1]) for key in state if (match := re.search(pattern, key))]
    return max(found, default=-1) + 1


def side_of(tokens: int, key: str) -> int:
    """Patches along the side of a square picture of ``tokens`` patches. Raises :class:`WeightsError` if not square."""
    side = math.isqrt(max(tokens, 0))
    if side < 1 or side * side != tokens:
        raise WeightsError(f"{key} has positions for {tokens} patches a frame, which are no square picture")
    return side


def block_of(state: State, key: str) -> Triple:
    """(frames, height, width) of a patch, off the kernel (width, 3, [frames,] height, width) that embeds it."""
    flat = key in state and state[key].ndim == 4
    if flat:
        return 1, axis_size(state, key, 2), axis_size(state, key, 3)
    return axis_size(state, key, 2), axis_size(state, key, 3), axis_size(state, key, 4)


def rename_parts(parts: Mapping[str, str], *, prefixes: Collection[str] = ("model.",)) -> Callable[[str], str]:
    """A renaming that drops ``prefixes`` one after the other, then replaces regular expressions in their order."""

    def rename(key: str) -> str:
        for prefix in prefixes:
            key = key.removeprefix(prefix)
        for pattern, ours in parts.items():
            key = re.sub(pattern, ours, key)
        return key

    return rename


def without(prefix: str, state: State) -> dict[str, Tensor]:
    """The state with a prefix taken off the keys that have it."""
    return {key.removeprefix(prefix): value for key, value in state.items()}


def join_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Separate ``….q``, ``….k`` and ``….v`` matrices and biases → one ``….qkv``.

    What is incomplete or of differing shapes stays as it is, for the loader to name.
    """
    result = dict(state)
    for key in state:
        match = re.fullmatch(r"(.*)\.q\.(weight|bias)", key)
        if match is None:
            continue
        names = [f"{match[1]}.{letter}.{match[2]}" for letter in "qkv"]
        if all(name in state and state[name].shape == state[key].shape for name in names):
            result[f"{match[1]}.qkv.{match[2]}"] = torch.cat([result.pop(name) for name in names])
    return result


def head_arguments(state: State, key: str) -> dict[str, Any]:
    """``classes`` off the classifier's matrix; ``None`` where the file has none."""
    return {"classes": axis_size(state, key, 0) if key in state else None}
