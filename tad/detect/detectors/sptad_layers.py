"""The parts of SP-TAD: a temporal feature pyramid, SoI align on its levels, and one action detection head.

Levels of a pyramid halve in resolution: row j of level k fills ``[j, j + 1) * 2**k`` in row edges of level 0, in which
all segments are given. Rows behind the end of a sample are zeros on every level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tad.detect.segments import decode_center_length, expand_segments

Further = Literal["max", "conv"]
OFFSET_WEIGHTS = (2.0, 1.0)  # of centre and length offsets, as in Sparse R-CNN
PRIOR = 0.01  # probability of every class before training, as in the focal loss paper
SHORTEST = 1e-6  # of a clip: what a segment's length counts as at least, so that its logarithm exists


class TemporalPyramid(nn.Module):
    """Temporal feature pyramid network (§3.1.2): 1D convolutions, top-down addition, further levels by pooling.

    Parameters
    ----------
    channels : width of every stored level, fine to coarse; each has half the resolution of the one before.
    width : channels of every level of the pyramid.
    levels : how many the pyramid has; those beyond the stored ones follow the coarsest.
    kernel : of the lateral convolutions, odd.
    further : ``max``: each further level is the maximum of two rows (the paper's); ``conv``: a convolution of stride 2
        over four rows, then ReLU.
    """

    def __init__(self, *, channels: Sequence[int], width: int, levels: int, kernel: int, further: Further) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv1d(c, width, kernel, padding=kernel // 2) for c in channels)
        more = levels - len(channels)
        self.more = more
        self.down = nn.ModuleList(nn.Conv1d(width, width, 4, stride=2) for _ in range(more if further == "conv" else 0))
        for conv in [*self.lateral, *self.down]:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Stored levels (B, C_k, T_k), zero where their masks (B, T_k) are → levels (B, W, T_k) and their masks."""
        masks = list(masks)
        found = [conv(x) * mask[:, None] for conv, x, mask in zip(self.lateral, maps, masks, strict=True)]
        for k in range(len(found) - 2, -1, -1):  # coarse to fine
            found[k] = found[k] + doubled(found[k + 1], found[k].shape[2]) * masks[k][:, None]
        for k in range(self.more):
            x, mask = found[-1], masks[-1]
            masks.append(halved_mask(mask))
            if self.down:
                x = F.relu(self.down[k](F.pad(x, (1, 1 + x.shape[2] % 2))))  # (B, W, ceil(T / 2)), centred on two rows
                found.append(x * masks[-1][:, None])
            else:
                found.append(halved_max(x, mask))
        return found, masks


def doubled(x: Tensor, rows: int) -> Tensor:
    """Every row of ``x`` (B, C, T) twice, cut or padded with zeros to ``rows``: (B, C, rows)."""
    twice = x.repeat_interleave(2, 2)[..., :rows]
    return F.pad(twice, (0, rows - twice.shape[2]))


def halved_mask(mask: Tensor) -> Tensor:
    """(B, T) bool → (B, ceil(T / 2)): a row of the level above is real where one of its two rows is."""
    return F.pad(mask, (0, mask.shape[1] % 2)).unflatten(1, (-1, 2)).any(2)


def halved_max(x: Tensor, mask: Tensor) -> Tensor:
    """Max-pooling with stride 2 over real rows only: (B, C, T) and (B, T) → (B, C, ceil(T / 2)), zero where none is."""
    pooled = F.max_pool1d(x.masked_fill(~mask[:, None], -torch.inf), 2, ceil_mode=True)
    return pooled.masked_fill(~halved_mask(mask)[:, None], 0.0)


def level_of(lengths: Tensor, *, clip: float, levels: int) -> Tensor:
    """Eq. 1, ``floor(l_0 + log2(t / T))`` with l_0 the highest level, limited to the levels that there are.

    ``lengths`` (...,) in rows of level 0, ``clip`` likewise; (...,) int64 from 0 (finest) to ``levels - 1``.
    """
    share = (lengths / clip).clamp(min=SHORTEST)
    return (levels - 1 + share.log2()).floor().long().clamp(0, levels - 1)  # in this order: NaN has no index


class PyramidTable:
    """All rows of a pyramid in one table, from which the segments of all levels are read at once.

    ``maps`` (B, C, T_k) and ``masks`` (B, T_k), whose real rows come first.
    """

    def __init__(self, maps: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
        batch, self.channels, device = maps[0].shape[0], maps[0].shape[1], maps[0].device
        self.table = torch.cat([x.transpose(1, 2) for x in maps], 1).flatten(0, 1)  # (B * sum T_k, C)
        lengths = torch.tensor([0] + [x.shape[2] for x in maps], device=device).cumsum(0)
        sample = torch.arange(batch, device=device)[:, None] * lengths[-1]
        self.base = sample + lengths[:-1]  # (B, L) the first row of a sample's level in the table
        self.rows = torch.stack([mask.sum(1) for mask in masks], 1)  # (B, L)

    def align(self, segments: Tensor, level: Tensor, *, points: int) -> Tensor:
        """SoI align (§3.1.3): every segment read on its level at ``points`` evenly spread places, with linear weights.

        Parameters
        ----------
        segments : (B, N, 2) in row edges of level 0, may reach outside the sample, where rows are zeros.
        level : (B, N) int64.

        Returns
        -------
        (B, N, points, C): point p is read at ``(p + 1/2) / points`` of the segment. No gradient reaches ``segments``.
        """
        edges = segments.detach() / 2.0 ** level[..., None]  # (B, N, 2) of its level
        share = (torch.arange(points, device=edges.device, dtype=edges.dtype) + 0.5) / points
        at = edges[..., :1] + (edges[..., 1:] - edges[..., :1]) * share - 0.5  # (B, N, P), a row's centre is whole
        rows = self.rows.gather(1, level)[..., None]  # (B, N, 1)
        at = at.clamp(min=-1.0).minimum(rows.to(at))  # farther outside there are zeros just so
        low = at.floor()
        weight = at - low  # of the upper neighbour
        row = torch.stack((low.long(), low.long() + 1), -1)  # (B, N, P, 2)
        inside = (row >= 0) & (row < rows[..., None])
        weights = torch.where(inside, torch.stack((1 - weight, weight), -1), 0.0)
        index = self.base.gather(1, level)[..., None, None] + row.minimum(rows[..., None] - 1).clamp(min=0)
        values = self.table.index_select(0, index.flatten()).view(*index.shape, self.channels)  # (B, N, P, 2, C)
        return (values * weights.to(values.dtype)[..., None]).sum(3)


class SparseInteraction(nn.Module):
    """The sparse interaction module (§3.1.3, Fig. 3): every proposal convolves its own SoI rows with its own weights.

    A proposal's feature is projected to two matrices, ``width`` x ``hidden`` and back, that its SoI rows pass one after
    the other, each followed by a norm and ReLU; the rows are then flattened and projected to one feature.
    """

    def __init__(self, *, width: int, hidden: int, points: int) -> None:
        super().__init__()
        self.width, self.hidden = width, hidden
        self.first, self.second = nn.Linear(width, width * hidden), nn.Linear(width, hidden * width)
        self.norms = nn.ModuleList((nn.LayerNorm(hidden), nn.LayerNorm(width)))
        self.out = nn.Linear(points * width, width)
        self.out_norm = nn.LayerNorm(width)

    def forward(self, features: Tensor, soi: Tensor) -> Tensor:
        """Proposal features (B, N, W) and their SoI rows (B, N, P, W) → (B, N, W)."""
        x = soi @ self.first(features).unflatten(-1, (self.width, self.hidden))  # (B, N, P, H)
        x = F.relu(self.norms[0](x))
        x = x @ self.second(features).unflatten(-1, (self.hidden, self.width))  # (B, N, P, W)
        x = F.relu(self.norms[1](x))
        return F.relu(self.out_norm(self.out(x.flatten(2))))


class DetectionHead(nn.Module):
    """One action detection head (§3.1.3): self-attention → SoI align → sparse interaction → FFN → classes, boundaries.

    The SoI is the segment expanded by ``1 / eta`` of its length on both sides; its level follows from the segment's own
    length (Eq. 1). A head that has learnt nothing leaves the segments where they are.
    """

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        points: int,
        eta: float,
        classes: int,
        attention_heads: int,
        feedforward: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.points, self.margin = points, 1.0 / eta
        self.attention = nn.MultiheadAttention(width, attention_heads, dropout=dropout, batch_first=True)
        self.interaction = SparseInteraction(width=width, hidden=hidden, points=points)
        self.ffn = nn.Sequential(
            nn.Linear(width, feedforward), nn.ReLU(), nn.Dropout(dropout), nn.Linear(feedforward, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.logits = nn.Linear(width, classes)
        self.offsets = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        )
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        last = self.offsets[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        nn.init.constant_(self.logits.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(
        self, features: Tensor, segments: Tensor, table: PyramidTable, *, clip: float, levels: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Proposal features (B, N, W) and segments (B, N, 2) → both refined, and logits (B, N, K)."""
        attended, _ = self.attention(features, features, features, need_weights=False)
        x = self.norms[0](features + self.dropout(attended))
        level = level_of((segments[..., 1] - segments[..., 0]).detach(), clip=clip, levels=levels)  # (B, N)
        soi = table.align(expand_segments(segments, self.margin), level, points=self.points)  # (B, N, P, W)
        x = self.norms[1](x + self.dropout(self.interaction(x, soi)))
        x = self.norms[2](x + self.dropout(self.ffn(x)))
        refined = decode_center_length(self.offsets(x), segments, weights=OFFSET_WEIGHTS)
        return x, refined, self.logits(x)
