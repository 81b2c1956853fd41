"""The parts of TAL-MTS that it shares with AFSD: the pyramid, and the coarse and the refined heads on all its levels.

Levels halve in resolution: row j of level k fills ``[j, j + 1) * 2**k`` in row edges of level 0, in which all segments
are given. The heads are shared by all levels, so that these lie one behind the other in one sequence, see
:class:`Levels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tad.detect.boundary_pooling import boundary_max_pool
from tad.detect.norms import MaskedGroupNorm
from tad.errors import RecipeError

Interpolation = Literal["nearest", "linear"]


class Levels:
    """The levels of a pyramid as one sequence of N places: each level's rows, then one empty place.

    The empty place is zero as padding is, so that a convolution over three places sees of each level what it would see
    of it alone.

    Parameters
    ----------
    masks : (B, T_k) bool of every level, fine to coarse; real rows come first.

    Attributes
    ----------
    mask : (B, N) bool. centers, strides : (N,) centre and length of a place's row, in rows of level 0. begin : (N,)
    the first place of its level. rows : (B, N) how many rows of that level are real.
    """

    def __init__(self, masks: Sequence[Tensor]) -> None:
        device = masks[0].device
        self.lengths = [mask.shape[1] for mask in masks]
        self.masks = [padding_of(mask) for mask in masks]
        self.mask = self.joined([mask[:, None] for mask in masks])[:, 0]  # (B, N)
        sizes = torch.tensor(self.lengths, device=device) + 1
        level = torch.repeat_interleave(torch.arange(len(masks), device=device), sizes)  # (N,)
        self.begin = (sizes.cumsum(0) - sizes)[level]
        self.strides = 2 ** level.to(torch.get_default_dtype())
        self.centers = (torch.arange(len(level), device=device) - self.begin + 0.5) * self.strides
        self.rows = torch.stack([mask.sum(1) for mask in masks], 1)[:, level]  # (B, N)

    def joined(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels (B, C, T_k) → (B, C, N)."""
        empty = levels[0].new_zeros(*levels[0].shape[:2], 1)
        return torch.cat([part for x in levels for part in (x, empty)], 2)

    def split(self, x: Tensor) -> list[Tensor]:
        """(B, C, N) → the levels (B, C, T_k)."""
        return list(x.split([size for length in self.lengths for size in (length, 1)], 2)[::2])


def padding_of(mask: Tensor) -> Tensor | None:
    """A mask (B, T) as the norms take it: (B, 1, T), or None where no row is padding."""
    return None if bool(mask.all()) else mask[:, None]


class ConvBlock(nn.Module):
    """Convolution of stride 1, group normalisation of each level by itself, ReLU; zeros stay where no row is."""

    def __init__(self, channels: int, out: int, kernel: int, *, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, out, kernel, padding=kernel // 2)
        self.norm = MaskedGroupNorm(groups, out)

    def forward(self, x: Tensor, levels: Levels) -> Tensor:
        """(B, C, N) → (B, out, N)."""
        if self.conv.kernel_size == (1,):  # a plain product is several times as fast on a CPU
            assert self.conv.bias is not None
            y = torch.matmul(self.conv.weight[..., 0], x) + self.conv.bias[:, None]
        else:
            y = self.conv(x)
        parts = [
            self.norm(part, mask) if mask is None else self.norm(part, mask) * mask
            for part, mask in zip(levels.split(y), levels.masks, strict=True)
        ]
        return F.relu(levels.joined(parts))


class Downsample(nn.Module):
    """Convolution of kernel 3 and stride 2 (row j sees rows 2j to 2j + 2), group normalisation, ReLU."""

    def __init__(self, channels: int, out: int, *, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, out, 3, stride=2)
        self.norm = MaskedGroupNorm(groups, out)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, T), zero where ``mask`` (B, T) is, → (B, out, ceil(T / 2)) and its mask."""
        half = mask[:, ::2]  # real rows come first
        x = self.conv(F.pad(x, (0, 1 + x.shape[2] % 2)))
        return F.relu(self.norm(x, padding_of(half))) * half[:, None], half


class Lateral(nn.Module):
    """A stored level as a level of the pyramid: a convolution over its whole map, group normalisation, ReLU.

    ``shape`` is that of a stored row: (C,), or (C, H, W) of a map, then the kernel is [``kernel``, H, W] (§III-B).
    """

    def __init__(self, shape: Sequence[int], out: int, *, kernel: int, groups: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        height, across = self.shape[1:] or (1, 1)
        self.conv = nn.Conv3d(self.shape[0], out, (kernel, height, across), padding=(kernel // 2, 0, 0))
        self.norm = MaskedGroupNorm(groups, out)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, C, T) or (B, C, T, H, W), of which ``mask`` (B, T) is real → (B, out, T)."""
        shape = x.shape[1], *x.shape[3:]
        if shape != self.shape:
            raise RecipeError(
                f"a stored level has rows of shape {tuple(shape)} and the model was made for {self.shape}: say what "
                "the store holds in level_channels, such as {s4-map: [832, 6, 6]}"
            )
        x = x.masked_fill(~mask.view(len(mask), 1, -1, *[1] * (x.ndim - 3)), 0.0)
        y = self._collapsed(x)
        return F.relu(self.norm(y, padding_of(mask))) * mask[:, None]

    def _collapsed(self, x: Tensor) -> Tensor:
        """The convolution, (B, C, T, ..) → (B, out, T). Its kernel is as high and wide as the map, so that it is one in
        time over C·H·W channels, or a product: ``Conv3d`` itself is several times as slow on CPUs.
        """
        flat = x.flatten(3).movedim(3, 2).flatten(1, 2) if x.ndim == 5 else x  # (B, C·H·W, T)
        weight = self.conv.weight.movedim(2, -1).flatten(1, -2)  # (out, C·H·W, kernel)
        if weight.shape[2] == 1:
            return F.linear(flat.transpose(1, 2), weight[..., 0], self.conv.bias).transpose(1, 2)
        return F.conv1d(flat, weight, self.conv.bias, padding=weight.shape[2] // 2)


def upsampled(x: Tensor, mask: Tensor, *, factor: int, rows: int, mode: Interpolation) -> Tensor:
    """``x`` (B, C, T) read at ``rows`` rows that are ``factor`` times as dense: (B, C, rows).

    New row i lies at ``(i + 1/2) / factor`` in row edges. ``nearest`` takes the row there, ``linear`` interpolates
    between row centres. Beyond the last row of ``mask`` (B, T) stands that row.
    """
    last = (mask.sum(1) - 1).clamp(min=0)
    edge = x.gather(2, last[:, None, None].expand(-1, x.shape[1], 1))  # (B, C, 1)
    x = torch.where(mask[:, None], x, edge)
    x = F.pad(x, (0, max(0, -(-rows // factor) - x.shape[2])), mode="replicate")
    if mode == "nearest":
        return x.repeat_interleave(factor, 2)[..., :rows] if factor > 1 else x[..., :rows]
    return F.interpolate(x, scale_factor=float(factor), mode="linear", align_corners=False)[..., :rows]


class FeaturePyramid(nn.Module):
    """The pyramid of §III-B: stored levels, then convolutions of stride 2; with ``refined`` the RFP.

    RFP: from the top down every level adds the one above, interpolated; no parameters. Without it a stored level alone
    adds the stored level above it, as AFSD does.

    Parameters
    ----------
    shapes : of the rows of every stored level, see :class:`Lateral`. width : of the pyramid. levels : how many it has.
    groups : of the norms. kernel : of the first convolutions in time. mode : of RFP's interpolation.
    """

    def __init__(
        self,
        *,
        shapes: Sequence[Sequence[int]],
        width: int,
        levels: int,
        groups: int,
        kernel: int,
        refined: bool,
        mode: Interpolation,
    ) -> None:
        super().__init__()
        self.refined, self.mode = refined, mode
        self.lateral = nn.ModuleList(Lateral(shape, width, kernel=kernel, groups=groups) for shape in shapes)
        self.down = nn.ModuleList(Downsample(width, width, groups=groups) for _ in range(levels - len(shapes)))

    def forward(self, stored: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Stored levels, fine to coarse, and their masks (B, T_k) → all levels (B, width, T_k) and their masks."""
        masks = list(masks)
        found = [lateral(x, mask) for lateral, x, mask in zip(self.lateral, stored, masks, strict=True)]
        for down in self.down:
            x, mask = down(found[-1], masks[-1])
            found.append(x)
            masks.append(mask)
        if self.refined:
            for k in range(len(found) - 2, -1, -1):
                found[k] = found[k] + self._above(found, masks, k, self.mode)
        else:
            raw = list(found)
            for k in range(len(self.lateral) - 1):
                found[k] = found[k] + self._above(raw, masks, k, "nearest")
        return found, masks

    @staticmethod
    def _above(found: list[Tensor], masks: list[Tensor], k: int, mode: Interpolation) -> Tensor:
        rows = found[k].shape[2]
        return upsampled(found[k + 1], masks[k + 1], factor=2, rows=rows, mode=mode) * masks[k][:, None]


class FrameBranch(nn.Module):
    """The frame-level feature (§III-B): level 0 interpolated to the frames, then three convolutions, as in AFSD."""

    def __init__(self, *, width: int, groups: int, factor: int, mode: Interpolation) -> None:
        super().__init__()
        self.factor, self.mode = factor, mode
        self.blocks = nn.ModuleList(ConvBlock(width, width, kernel, groups=groups) for kernel in (3, 3, 1))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, C, T) and its mask → (B, C, factor · T)."""
        frames = Levels([mask.repeat_interleave(self.factor, 1)])
        rows = frames.lengths[0]
        x = upsampled(x, mask, factor=self.factor, rows=rows, mode=self.mode) * frames.mask[:, None, :-1]
        x = frames.joined([x])
        for block in self.blocks:
            x = block(x, frames)
        return frames.split(x)[0]


class ProposalBranch(nn.Module):
    """The feature of every coarse segment (Eq. 6): its own row, boundary pooling on its level and on the frames."""

    def __init__(self, *, width: int, frame_width: int, groups: int) -> None:
        super().__init__()
        self.short = ConvBlock(width, width, 1, groups=groups)
        self.level = ConvBlock(width, 2 * width, 1, groups=groups)
        self.frame = ConvBlock(frame_width, width, 1, groups=groups)
        self.out = ConvBlock(4 * width, width, 1, groups=groups)

    def forward(self, x: Tensor, framed: Tensor, segments: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        """Rows (B, C, N), what was pooled from the frames (B, F, N), segments (B, N, 2) in rows of level 0.

        Returns the segments' features (B, C, N) and those that were pooled on the levels (B, 2 C, N).
        """
        sides = self.level(x, levels)
        pooled = boundary_max_pool(sides, segments / levels.strides[:, None], levels.rows, begin=levels.begin)
        parts = (self.frame(framed, levels), pooled, self.short(x, levels))
        return self.out(torch.cat(parts, 1), levels), sides
