"""The networks of ETAD (appendix A): feature enhancement, boundary evaluation, proposal evaluation.

Sequences are (B, C, T) with a mask (B, 1, T) bool of real rows, or None where all are; padding is zero on the way in
and on the way out of every layer, and influences no real row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tad.detect.norms import MaskedGroupNorm
from tad.detect.roi_linear import CHUNK, Places, RoILinear, roi_places
from tad.detect.segments import decode_boundaries, decode_center_length, expand_segments

Enhancement = Literal["lstm", "conv", "transformer"]
MARGIN = 0.5  # of a proposal's length on both sides: its extended region is twice as long as itself
QUARTERS = 4  # the first of them is the start region, the last the end region
KERNEL = 3
ATTENTION_HEADS = 8
ATTENTION_DROPOUT = 0.1


class ConvBlock(nn.Module):
    """Convolution, group normalisation, ReLU."""

    def __init__(self, channels: int, out: int, kernel: int, *, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, out, kernel, padding=kernel // 2)
        self.norm = MaskedGroupNorm(groups, out)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, C, T) → (B, out, T)."""
        y = F.relu(self.norm(self.conv(x), mask))
        return y if mask is None else y * mask


class DirectedLSTM(nn.Module):
    """An LSTM over the rows, or with ``backward`` from the last *real* row to the first."""

    def __init__(self, channels: int, width: int, *, backward: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, width, batch_first=True)
        self.backward_in_time = backward

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, C, T) → (B, width, T)."""
        x = self._turned(x, mask) if self.backward_in_time else x
        y = self.lstm(x.transpose(1, 2))[0].transpose(1, 2)
        y = self._turned(y, mask) if self.backward_in_time else y
        return y if mask is None else y * mask

    def _turned(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The real rows in reverse order; padding stays behind them, where an LSTM reads it last."""
        if mask is None:
            return x.flip(2)
        row = torch.arange(x.shape[2], device=x.device)
        rows = mask.sum(2)  # (B, 1)
        order = torch.where(row < rows, rows - 1 - row, row)  # (B, T)
        return x.gather(2, order[:, None].expand_as(x))


class SelfAttention(nn.Module):
    """A vanilla Transformer encoder layer (Table 7): sinusoidal positions, 8 heads, post-norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.feed = nn.Sequential(nn.Linear(channels, 4 * channels), nn.ReLU(), nn.Linear(4 * channels, channels))
        self.dropout = nn.Dropout(ATTENTION_DROPOUT)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, C, T) → (B, C, T)."""
        y = x.transpose(1, 2)  # (B, T, C)
        y = y + _positions(y.shape[1], y.shape[2]).to(y)
        query, key, value = self.inputs(y).unflatten(2, (3, ATTENTION_HEADS, -1)).permute(2, 0, 3, 1, 4)
        # keys only: what a padding row sees is masked below. A sample without any real row sees itself.
        allowed = None if mask is None else (mask | ~mask.any(2, keepdim=True))[:, None]  # (B, 1, 1, T)
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)  # (B, H, T, C / H)
        y = self.norm1(y + self.dropout(self.output(seen.transpose(1, 2).flatten(2))))
        y = self.norm2(y + self.dropout(self.feed(y))).transpose(1, 2)
        return y if mask is None else y * mask


def _positions(rows: int, channels: int) -> Tensor:
    """(rows, channels): sines, then cosines, of wavelengths from 2 pi to 10000 * 2 pi rows."""
    half = (channels + 1) // 2
    rates = torch.exp(-math.log(10000.0) * torch.arange(half) / half)
    angles = torch.arange(rows)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), 1)[:, :channels]


class Branch(nn.Module):
    """One way through time and a convolution with kernel 3 (Fig. 5); for Table 7 the LSTM gives place to another."""

    def __init__(
        self, channels: int, hidden: int, out: int, *, groups: int, enhancement: Enhancement, backward: bool
    ) -> None:
        super().__init__()
        self.context: nn.Module
        if enhancement == "lstm":
            self.context = DirectedLSTM(channels, hidden, backward=backward)
        elif enhancement == "conv":
            self.context = ConvBlock(channels, hidden, KERNEL, groups=groups)
        else:
            self.context, hidden = SelfAttention(channels), channels
        self.conv = ConvBlock(hidden, out, KERNEL, groups=groups)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y: Tensor = self.conv(self.context(x, mask), mask)
        return y


class FeatureEnhancement(nn.Module):
    """Fig. 5: convolution; a forward and a backward branch beside a residual convolution; all three side by side, then
    a convolution with kernel 1.

    The paper's text has the residual convolution "with kernel size 256"; 256 are its channels, as the sum of 512 shows,
    and its kernel is 1 here.
    """

    def __init__(
        self, *, channels: int, width: int, lstm_width: int, branch_width: int, groups: int, enhancement: Enhancement
    ) -> None:
        super().__init__()
        self.input = ConvBlock(channels, width, KERNEL, groups=groups)
        self.forwards, self.backwards = (
            Branch(width, lstm_width, branch_width, groups=groups, enhancement=enhancement, backward=backward)
            for backward in (False, True)
        )
        self.residual = ConvBlock(width, width, 1, groups=groups)
        self.output = ConvBlock(2 * branch_width + width, width, 1, groups=groups)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, C, T) → (B, width, T)."""
        x = self.input(x, mask)
        parts = self.forwards(x, mask), self.backwards(x, mask), self.residual(x, mask)
        y: Tensor = self.output(torch.cat(parts, 1), mask)
        return y


class BoundaryEvaluation(nn.Module):
    """Two convolutions: how much each row is an action's start, and its end."""

    def __init__(self, *, width: int, groups: int) -> None:
        super().__init__()
        self.hidden = ConvBlock(width, width, KERNEL, groups=groups)
        self.output = nn.Conv1d(width, 2, 1)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, width, T) → logits (B, 2, T)."""
        y: Tensor = self.output(self.hidden(x, mask))
        return y


class GroupedLinear(nn.Module):
    """Fully-connected layers side by side, one a group, each initialised as ``nn.Linear``."""

    def __init__(self, groups: int, channels: int, out: int) -> None:
        super().__init__()
        self.groups, self.out = groups, out
        bound = 1 / math.sqrt(channels)
        self.weight = nn.Parameter(torch.empty(groups, channels, out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(groups * out).uniform_(-bound, bound))  # one dimension: never decayed

    def forward(self, x: Tensor) -> Tensor:
        """(G, P, channels) → (G, P, out)."""
        return torch.baddbmm(self.bias.view(self.groups, 1, self.out), x, self.weight)


class Heads(nn.Module):
    """Columns of Table 6: a fully-connected layer on the RoI, three of ``widths[1]``, and the last one."""

    def __init__(
        self, *, groups: int, channels: int, points: int, widths: tuple[int, int], out: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.roi = RoILinear(channels=channels, points=points, out=widths[0], groups=groups, relu=True)
        sizes = [widths[0], widths[1], widths[1], widths[1], out]
        self.layers = nn.ModuleList(GroupedLinear(groups, *pair) for pair in pairwise(sizes))

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """Rows (B, T, C) read at the ``places`` of P proposals → (G, P, out)."""
        y = self.roi(x, places)  # (G, P, widths[0])
        if torch.is_grad_enabled() or y.shape[1] <= CHUNK:
            return self._rest(y)
        return torch.cat([self._rest(part) for part in y.split(CHUNK, 1)], 1)

    def _rest(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.dropout(F.relu(layer(x), inplace=True), self.dropout, self.training)
        y: Tensor = self.layers[-1](x)
        return y


@dataclass
class Stage:
    """What one proposal evaluation module says of P proposals; segments in row edges."""

    proposals: Tensor  # (P, 2) as they came in
    boundary_offsets: Tensor  # (P, 2) of start and end, in lengths of the proposal
    center_offsets: Tensor  # (P, 2) of centre (in lengths) and of length (its log ratio)
    boundary_logits: Tensor  # (P, 2) is its start a start, its end an end
    iou_logits: Tensor  # (P, 2) is its tIoU high, and how high
    refined: Tensor  # (P, 2) no gradient


class ProposalEvaluation(nn.Module):
    """Table 6: RoI features of proposals → offsets, start and end, tIoU.

    The paper's regions ``(t_s - 2/d, t_s)`` are read as ``(t_s - d/2, t_s)``: half the proposal's length, as the usual
    extension has it. So the start region is the first quarter of the extended one, the end region its last, and with
    ``points`` of the extended region a quarter of them are points of either: 32 and 8 in the paper, 24 and 6 in the
    public code. Each point is looked up once.
    """

    def __init__(
        self, *, width: int, roi_channels: int, points: int, widths: tuple[int, int], dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.points, self.quarter = points, points // QUARTERS
        self.reduce = nn.Linear(width, roi_channels)  # a convolution with kernel 1
        heads = partial(Heads, channels=roi_channels, widths=widths, dropout=dropout)
        self.start = heads(groups=1, points=self.quarter, out=1)
        self.end = heads(groups=1, points=self.quarter, out=1)
        self.extended = heads(groups=3, points=points, out=2)  # centre and length, start and end, tIoU

    def forward(self, x: Tensor, rows: Tensor, proposals: Tensor, counts: Sequence[int], extent: Tensor) -> Stage:
        """Rows (B, T, width), ``rows`` (B,) of them real; P proposals (P, 2), ``counts`` of each sample.

        ``extent`` (P, 2): where refined proposals stay.
        """
        y = F.relu(self.reduce(x))  # (B, T, roi_channels)
        places = roi_places(expand_segments(proposals, MARGIN), rows, counts, points=self.points)
        first, last = places.part(0, self.quarter), places.part(self.points - self.quarter, self.points)
        start, end = self.start(y, first)[0], self.end(y, last)[0]  # each (P, 1)
        center, boundary, iou = self.extended(y, places).to(proposals.dtype)  # each (P, 2)
        offsets = torch.cat((start, end), 1).to(proposals.dtype)  # (P, 2)
        with torch.no_grad():
            both = decode_boundaries(offsets, proposals) + decode_center_length(center, proposals)
            refined = settled(0.5 * both, extent)
        return Stage(proposals, offsets, center, boundary, iou, refined)


def settled(segments: Tensor, extent: Tensor, *, shortest: float = 0.1) -> Tensor:
    """``segments`` (P, 2) inside ``extent`` (P, 2), at least ``shortest`` rows long round their middle, so that the
    next stage has a length to measure by.
    """
    inside = torch.minimum(torch.maximum(segments, extent[:, :1]), extent[:, 1:])
    middle = inside.mean(1, keepdim=True)
    half = inside.new_tensor([-0.5, 0.5]) * shortest
    short = (inside[:, 1:] - inside[:, :1]) < shortest
    return torch.where(short, middle + half, inside)
