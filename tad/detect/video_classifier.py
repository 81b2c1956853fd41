"""A classifier of whole videos that reads stored features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tad.detect.detectors.common import check_numbers
from tad.detect.interface import Batch, Detector, LevelSpec, Targets

NO_ACTION = 1e-3  # rows: added to what the attention's weights are divided by, so that videos without action are safe


@dataclass
class VideoOutputs:
    """``video`` (B, K) logits of whole videos, ``rows`` (B, K + 1, T) of their rows, the last for background, and
    ``mask`` (B, T)."""

    video: Tensor
    rows: Tensor
    mask: Tensor


class RowConv(nn.Module):
    """A dilated convolution of 3 rows with the channels last, (B, T, W) → the same; beyond the ends there are zeros.

    One product of all rows with their neighbours beside them, which on CPUs is faster than ``Conv1d`` between the
    transpositions that norms by row would need.
    """

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.weights = nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[1]
        padded = F.pad(x, (0, 0, self.dilation, self.dilation))  # (B, T + 2 d, W)
        taps = [padded[:, k * self.dilation : k * self.dilation + rows] for k in range(3)]
        y: Tensor = self.weights(torch.cat(taps, dim=2))  # (B, T, 3 W) -> (B, T, W)
        return y


class VideoClassifier(Detector):
    """Rows → a residual network of dilated convolutions → two means over time → classes of the video.

    One mean is over all rows; in the other a row weighs as much as its own classifier says that it is no background.
    That row classifier learns from the segments (``rows`` loss), which on few videos is what makes the difference: the
    labels of a video alone do not say where to look. It is trained as detectors are, but gives scores, no segments.

    Parameters
    ----------
    channels : stream → channels, in the order in which they are concatenated.
    classes : K.
    width : channels inside.
    dilations : one residual convolution of 3 rows each; the sum of them, plus 1, is how far a row sees to either side.
    dropout : of what the two classifiers read.
    rows_weight : of the loss of the row classifier; 0 learns from the videos' labels alone.

    Raises
    ------
    RecipeError : values out of range.
    """

    def __init__(
        self,
        *,
        channels: dict[str, int],
        classes: int,
        width: int = 64,
        dilations: Sequence[int] = (1, 2, 4, 8),
        dropout: float = 0.3,
        rows_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_numbers(1, 65536, classes=classes, width=width)
        check_numbers(0.0, 0.999, dropout=dropout)
        check_numbers(0.0, 1e6, rows_weight=rows_weight)
        for dilation in dilations:
            check_numbers(1, 65536, dilation=dilation)
        self.needs = tuple(LevelSpec(stream) for stream in channels)
        self.rows_weight = rows_weight
        self.project = nn.Linear(sum(channels.values()), width)
        self.norm = nn.LayerNorm(width)  # of every row by itself, so that padding changes nothing
        self.convs = nn.ModuleList(RowConv(width, dilation) for dilation in dilations)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in dilations)
        self.dropout = nn.Dropout(dropout)
        self.rows = nn.Linear(width, classes + 1)
        self.video = nn.Linear(2 * width, classes)

    def forward(self, batch: Batch) -> VideoOutputs:
        mask = batch.mask.float()  # (B, T)
        x = torch.cat([batch.features[need.key] for need in self.needs], dim=1).transpose(1, 2)  # (B, T, C)
        x = F.relu(self.norm(self.project(x))) * mask[:, :, None]  # (B, T, W)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + F.relu(norm(conv(x))) * mask[:, :, None]
        rows = self.rows(self.dropout(x)).transpose(1, 2)  # (B, K + 1, T)
        action = (rows[:, :-1].logsumexp(dim=1) - rows[:, -1]).sigmoid() * mask  # (B, T)
        weights = torch.stack((action / (action.sum(1, keepdim=True) + NO_ACTION), mask / mask.sum(1, True)), dim=1)
        pooled = (weights @ x).flatten(1)  # (B, 2, T) @ (B, T, W) -> (B, 2 * W)
        return VideoOutputs(self.video(self.dropout(pooled)), rows, batch.mask)

    def loss(self, outputs: VideoOutputs, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """``video``: cross entropy with the video's labels, which share the probability evenly; a video without labels
        has none. ``rows``: the same of every row, with background where no segment is. Both are means over videos.
        """
        classes = outputs.video.shape[1]
        present = torch.stack([_present(target.labels, classes) for target in targets]).to(outputs.video)  # (B, K)
        wanted = present / present.sum(1, keepdim=True).clamp(min=1)
        terms = {"video": -(wanted * outputs.video.log_softmax(dim=1)).sum(1).mean()}
        if self.rows_weight > 0:
            real = outputs.mask.sum(1).tolist()
            truth = torch.stack(
                [row_classes(t, outputs.rows.shape[2], classes, last=n - 1) for t, n in zip(targets, real, strict=True)]
            )  # (B, K + 1, T)
            losses = F.cross_entropy(outputs.rows, truth.to(outputs.rows), reduction="none") * outputs.mask  # (B, T)
            terms["rows"] = self.rows_weight * (losses.sum(1) / outputs.mask.sum(1)).mean()
        return terms

    @torch.inference_mode()
    def probabilities(self, batch: Batch) -> Tensor:
        """Probabilities of the classes (B, K), summing to 1."""
        outputs = self(batch)
        result: Tensor = outputs.video.float().softmax(dim=1)
        return result


def row_classes(targets: Targets, rows: int, classes: int, *, last: int | None = None) -> Tensor:
    """The truth of every row as probabilities (K + 1, T), the last of background.

    A row belongs to the segments that its centre is in, and a segment without a row's centre has the row it is in, or
    the nearest up to ``last`` where only its window sees it; classes that meet in a row share it evenly.
    """
    row = torch.arange(rows, device=targets.segments.device)
    start, end = targets.segments[:, :1], targets.segments[:, 1:]  # (N, 1)
    middle = (0.5 * (start + end)).floor().clamp(0, rows - 1 if last is None else last)
    inside = ((row + 0.5 > start) & (row + 0.5 < end)) | (row == middle)  # (N, T)
    kinds = F.one_hot(targets.labels, classes).T.float()  # (K, N)
    found = ((kinds @ inside.float()) > 0).float()  # (K, T)
    count = found.sum(0, keepdim=True)
    return torch.cat((found / count.clamp(min=1), (count == 0).float()))


def _present(labels: Tensor, classes: int) -> Tensor:
    """Which classes occur (K,)."""
    return (torch.bincount(labels, minlength=classes) > 0).float()
