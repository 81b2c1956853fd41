"""The temporal boundary regressor of TCANet: rows sampled in and around proposals, and the two heads on them.

Qing et al., "Temporal Context Aggregation Network for Temporal Action Proposal Refinement", 2021, §3.3 and Fig. 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tad.detect.segments import center_length, clip_segments, from_center_length

MIN_LENGTH = 1e-3  # rows: a shorter proposal counts as one of this length around its centre


class Samples(NamedTuple):
    """Where P proposals are read: N points each, every one between two rows of its sample."""

    row: Tensor  # (P, N, 2) int64, lower and upper row in the flattened (B * T, C) rows
    weight: Tensor  # (P, N, 2), of the two rows

    def part(self, points: slice) -> Samples:
        return Samples(self.row[:, points], self.weight[:, points])


def proper_segments(segments: Tensor, extent: Tensor) -> Tensor:
    """``segments`` (P, 2) inside ``extent`` (P, 2), and at least :data:`MIN_LENGTH` long (also where reversed)."""
    center, length = center_length(clip_segments(segments, extent[:, :1], extent[:, 1:]))
    return from_center_length(center, length.clamp(min=MIN_LENGTH))


def region_points(segments: Tensor, rows: Tensor, *, context: float, outer: int, inner: int) -> Tensor:
    """Points (P, 2 outer + inner) in row edges: start context, action, end context of ``segments`` (P, 2).

    The contexts are ``context`` times the action's length long. Every region is cut to ``[0, rows]`` (rows: (P,)) and
    read at the centres of so many equal parts: one wholly outside is read at the sequence's nearest end only.
    """
    start, end = segments.unbind(1)
    margin = context * (end - start)
    points = []
    for low, high, count in ((start - margin, start, outer), (start, end, inner), (end, end + margin, outer)):
        region = clip_segments(torch.stack((low, high), 1), 0.0, rows[:, None])  # (P, 2)
        share = (torch.arange(count, device=segments.device) + 0.5) / count
        points.append(region[:, :1] + (region[:, 1:] - region[:, :1]) * share)
    return torch.cat(points, 1)


def interpolation(points: Tensor, rows: Tensor, sample: Tensor, *, total: int) -> Samples:
    """Linear interpolation between row centres at ``points`` (P, N) in row edges; the end rows reach to the edges.

    ``rows`` (P,) real rows and ``sample`` (P,) of each proposal; ``total`` rows T a sample, with padding. The weights
    are differentiable in the points.
    """
    at = points - 0.5
    low = at.detach().floor()
    share = at - low  # of the upper row
    last = (rows - 1).clamp(min=0)[:, None]
    pair = torch.stack((low.long(), low.long() + 1), 2)  # (P, N, 2)
    pair = torch.minimum(pair.clamp(min=0), last[..., None]) + (sample * total)[:, None, None]
    return Samples(pair, torch.stack((1 - share, share), 2))


class SampledConv(nn.Module):
    """A convolution with kernel 3 and stride 2 over sampled points, computed on the rows before they are sampled.

    Both are linear: the three taps are applied to every row once, and each output is a weighted sum of six entries of
    that table. This is exact; it spares the channels of all points of all proposals, which are many more than rows.
    """

    def __init__(self, *, channels: int, width: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, width, 3, stride=2, padding=1, groups=groups)

    def table(self, x: Tensor) -> Tensor:
        """Rows ``x`` (B, C, T) → entries (B * T * 3, W): what row t adds to an output through each of the taps."""
        groups, weight = self.conv.groups, self.conv.weight  # (W, C / groups, 3)
        taps = weight.unflatten(0, (groups, -1)).permute(0, 3, 1, 2).flatten(0, 2)  # (groups * 3 * W / groups, C / g)
        y = F.conv1d(x, taps[..., None], groups=groups)
        y = y.unflatten(1, (groups, 3, -1)).permute(0, 4, 2, 1, 3)  # (B, T, 3, groups, W / groups)
        return y.reshape(-1, weight.shape[0])

    def forward(self, table: Tensor, samples: Samples) -> Tensor:
        """(P, W, N / 2) from the :meth:`table` of the rows and N points a proposal (even)."""
        count, points = samples.weight.shape[:2]
        tap = torch.arange(3, device=table.device)
        first = 2 * torch.arange(points // 2, device=table.device)[:, None] - 1
        point = first + tap  # (N / 2, 3), -1: before the first point
        index = 3 * samples.row[:, point.clamp(min=0)] + tap[:, None]  # (P, N / 2, 3, 2)
        weight = samples.weight[:, point.clamp(min=0)] * (point >= 0)[..., None]
        index, weight = (part.flatten(2).flatten(0, 1) for part in (index, weight))  # (P * N / 2, 6)
        y = F.embedding_bag(index, table.to(weight.dtype), per_sample_weights=weight, mode="sum")  # (P * N / 2, W)
        assert self.conv.bias is not None
        return (y + self.conv.bias).view(count, points // 2, self.conv.out_channels).transpose(1, 2)


class SamplesHead(nn.Module):
    """N sampled points → ``outputs`` numbers: two convolutions (kernel 3, stride 2), then one over all that is left.

    ``hidden``: that last one keeps the width (in groups) and is followed by a layer to the outputs.
    """

    def __init__(self, *, channels: int, width: int, points: int, groups: int, outputs: int, hidden: bool) -> None:
        super().__init__()
        self.groups = groups if hidden else 1
        self.first = SampledConv(channels=channels, width=width, groups=groups)
        self.second = nn.Conv1d(width, width, 3, stride=2, padding=1, groups=groups)
        last = width if hidden else outputs
        self.whole = nn.Conv1d(width, last, points // 4, groups=self.groups)  # its length becomes 1
        self.outputs = nn.Linear(width, outputs) if hidden else None

    def forward(self, table: Tensor, samples: Samples) -> Tensor:
        """(P, outputs)."""
        x = F.relu(self.first(table, samples))  # (P, W, N / 2)
        x = F.relu(self.second(x))  # (P, W, N / 4)
        # One output place: a product of matrices is several times faster than the convolution on a CPU.
        weight = self.whole.weight.unflatten(0, (self.groups, -1)).flatten(
            2
        )  # (groups, last / groups, W / groups * N / 4)
        x = torch.bmm(x.flatten(1).unflatten(1, (self.groups, -1)).transpose(0, 1), weight.transpose(1, 2))
        assert self.whole.bias is not None
        x = x.transpose(0, 1).flatten(1) + self.whole.bias  # (P, last)
        return x if self.outputs is None else self.outputs(F.relu(x))


class TBR(nn.Module):
    """Temporal boundary regressor: offsets of proposals from two views of their surroundings, and their tIoU.

    The frame-level head sees a boundary's context alone, each side with its own weights. The segment-level head sees
    start context, action and end context as one sequence.

    Parameters
    ----------
    channels : of the rows. groups : of the convolutions.
    context : length of the contexts, in lengths of the proposal.
    outer, inner : points read in each context and in the action; ``outer`` and ``2 outer + inner`` multiples of 4.
    segment_width, boundary_width : of the segment-level and the frame-level head.
    """

    def __init__(
        self,
        *,
        channels: int,
        groups: int,
        context: float,
        outer: int,
        inner: int,
        segment_width: int,
        boundary_width: int,
    ) -> None:
        super().__init__()
        self.context, self.outer, self.inner = context, outer, inner
        side = {"channels": channels, "width": boundary_width, "points": outer, "groups": groups, "outputs": 1}
        self.start = SamplesHead(**side, hidden=False)
        self.end = SamplesHead(**side, hidden=False)
        points = 2 * outer + inner
        self.segment = SamplesHead(
            channels=channels, width=segment_width, points=points, groups=groups, outputs=3, hidden=True
        )

    def tables(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the heads look up, of rows ``x`` (B, C, T), zero where padded; the same for any proposals."""
        return self.start.first.table(x), self.end.first.table(x), self.segment.first.table(x)

    def forward(
        self, tables: tuple[Tensor, Tensor, Tensor], rows: Tensor, segments: Tensor, sample: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets of start and end (P, 2), of centre and length (P, 2), and tIoU (P,) in (0, 1), at least float32.

        ``rows`` (B,) real rows, ``segments`` (P, 2) in row edges, ``sample`` (P,) the sample of each.
        """
        own = rows[sample]
        points = region_points(segments, own, context=self.context, outer=self.outer, inner=self.inner)
        total = tables[0].shape[0] // (3 * len(rows))
        samples = interpolation(points, own, sample, total=total)
        start = self.start(tables[0], samples.part(slice(self.outer)))  # (P, 1)
        end = self.end(tables[1], samples.part(slice(-self.outer, None)))  # (P, 1)
        whole = self.segment(tables[2], samples)  # (P, 3)
        dtype = torch.promote_types(whole.dtype, torch.float32)
        return torch.cat((start, end), 1).to(dtype), whole[:, :2].to(dtype), whole[:, 2].to(dtype).sigmoid()
