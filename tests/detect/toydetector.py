"""A detector small enough to check by hand, and a small world of planted actions to train it on.

Run as a script it trains: ``python -m tests.detect.toydetector STORE ANNOTATIONS OUT [RECIPE-JSON]``.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tad.detect.detectors import DETECTORS
from tad.detect.interface import Batch, Detector, LevelSpec, Segments, Targets
from tad.recipe import DetectRecipe
from tad.store import Level, open_store
from tad.timeline import TimeAxis

CLASSES = ("jump", "run", "throw")
AXIS = TimeAxis.from_frames(fps=25, window_frames=16, stride_frames=8)


class RowNorm(nn.LayerNorm):
    """Each row by itself, so that padding changes nothing."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T)
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Toy(Detector):
    """Row-wise classifier; neighbouring rows of one class make a segment. Its loss is a mean over videos."""

    def __init__(
        self,
        *,
        channels: dict[str, int],
        classes: int,
        width: int = 16,
        dropout: float = 0.0,
        norm: bool = False,
        layout: Any = "full",
        rows: int | None = None,
    ) -> None:
        super().__init__()
        self.needs = tuple(LevelSpec(stream, layout=layout, rows=rows) for stream in channels)
        self.hidden = nn.Conv1d(sum(channels.values()), width, 3, padding=1)
        self.norm = RowNorm(width) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.logits = nn.Conv1d(width, classes, 1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        mask = batch.mask[:, None]  # (B, 1, T)
        x = torch.cat([batch.features[need.key] for need in self.needs], 1) * mask  # (B, C, T)
        return self.logits(self.dropout(self.norm(F.relu(self.hidden(x))))), batch.mask  # (B, K, T)

    def loss(self, outputs: tuple[Tensor, Tensor], targets: list[Targets]) -> dict[str, Tensor]:
        logits, mask = outputs
        truth = torch.zeros_like(logits)
        centers = torch.arange(logits.shape[2]) + 0.5
        for row, target in zip(truth, targets, strict=True):
            for (start, end), label in zip(target.segments, target.labels, strict=True):
                row[label, (centers > start) & (centers < end)] = 1.0
        terms = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)  # (B, T)
        return {"rows": ((terms * mask).sum(1) / mask.sum(1)).mean(), "decay": 1e-3 * self.logits.weight.square().sum()}

    def decode(self, outputs: tuple[Tensor, Tensor], batch: Batch) -> list[Segments]:
        probabilities = outputs[0].sigmoid()
        found = []
        for index, video in enumerate(batch.videos):
            segments, labels, scores = [], [], []
            for label, row in enumerate(probabilities[index, :, batch.mask[index]].cpu()):
                active = torch.cat([torch.zeros(1), (row > 0.5).float(), torch.zeros(1)]).diff()
                for start, end in zip((active > 0).nonzero()[:, 0], (active < 0).nonzero()[:, 0], strict=True):
                    segments.append([int(start), int(end)])
                    labels.append(label)
                    scores.append(float(row[start:end].mean()))
            rows = torch.tensor(segments, dtype=torch.float32).reshape(-1, 2)
            seconds = batch.axes[index].to_seconds(rows).clamp(0, batch.durations_s[index])
            found.append(
                Segments(
                    video,
                    seconds,
                    torch.tensor(labels, dtype=torch.int64),
                    torch.tensor(scores),
                    {"rows": rows[:, 1] - rows[:, 0]},
                )
            )
        return found


class ToyProposals(Toy):
    """The toy without classes: rows of any action make a proposal."""

    class_agnostic = True

    def __init__(self, *, channels: dict[str, int], classes: int, dropout: float = 0.0) -> None:
        super().__init__(channels=channels, classes=1, dropout=dropout)

    def loss(self, outputs: tuple[Tensor, Tensor], targets: list[Targets]) -> dict[str, Tensor]:
        return super().loss(outputs, [Targets(t.segments, torch.zeros_like(t.labels)) for t in targets])


class ToyRefiner(Detector):
    """Moves the boundaries of proposals by two learnt numbers of rows."""

    class_agnostic = True
    reads_proposals = True

    def __init__(self, *, channels: dict[str, int], classes: int) -> None:
        super().__init__()
        self.needs = tuple(LevelSpec(stream) for stream in channels)
        self.shift = nn.Parameter(torch.tensor([-1.0, 1.0]))

    def forward(self, batch: Batch) -> list[Tensor]:
        assert batch.proposals is not None
        return [proposals.segments + self.shift for proposals in batch.proposals]

    def loss(self, outputs: list[Tensor], targets: list[Targets]) -> dict[str, Tensor]:
        terms = [self.shift.sum() * 0.0]
        for moved, target in zip(outputs, targets, strict=True):
            if len(moved) and len(target.segments):
                distance = (moved[:, None] - target.segments[None]).abs().sum(-1)
                terms.append(distance.min(1).values.mean())
        return {"distance": torch.stack(terms).mean()}

    def decode(self, outputs: list[Tensor], batch: Batch) -> list[Segments]:
        assert batch.proposals is not None
        found = []
        for index, (moved, proposals) in enumerate(zip(outputs, batch.proposals, strict=True)):
            seconds = batch.axes[index].to_seconds(moved).clamp(0, batch.durations_s[index])
            labels = torch.zeros(len(moved), dtype=torch.int64)
            found.append(Segments(batch.videos[index], seconds, labels, proposals.scores))
        return found


DETECTORS["toy"] = Toy
DETECTORS["toy-proposals"] = ToyProposals
DETECTORS["toy-refiner"] = ToyRefiner


def make_world(
    folder: Path,
    *,
    training: int = 12,
    testing: int = 6,
    streams: tuple[str, ...] = ("rgb", "flow"),
    channels: int = 8,
    rows: tuple[int, int] = (40, 90),
    seed: int = 0,
    format: Any = "zarr",
    dtype: Any = np.float16,
    subsets: tuple[str, str] = ("training", "validation"),
) -> tuple[Path, Path]:
    """A store and annotations: each class adds its own direction to the noise of its rows. Returns their paths."""
    rng = np.random.default_rng(seed)
    looks = {stream: rng.standard_normal((len(CLASSES), channels)) for stream in streams}
    database = {}
    path = folder / f"features-{format}"
    with open_store(path, "a", format=format) as store:
        for stream in streams:
            store.create_stream(stream, {"made": "by hand", "stream": stream}, info={"weights_source": "nowhere"})
        for index in range(training + testing):
            count, video = int(rng.integers(*rows)), f"video_{index:03d}"
            duration_s = AXIS.span_s(count - 1)[1]
            x = {stream: 0.5 * rng.standard_normal((count, channels)) for stream in streams}
            annotations, at = [], int(rng.integers(2, 8))
            while at + 14 < count:
                label, length = int(rng.integers(len(CLASSES))), int(rng.integers(3, 13))
                for stream in streams:
                    x[stream][at : at + length] += looks[stream][label]
                start_s, end_s = AXIS.to_seconds(np.array([at, at + length]))
                annotations.append({"segment": [round(start_s, 3), round(end_s, 3)], "label": CLASSES[label]})
                at += length + int(rng.integers(3, 15))
            for stream in streams:
                source = {"name": f"{video}.mp4", "size": index, "mtime_ns": 0}
                level = Level(x[stream].astype(dtype), AXIS)
                store.write(stream, video, {"features": level}, duration_s=duration_s, source=source)
            subset = subsets[0] if index < training else subsets[1]
            database[video] = {"subset": subset, "duration": round(duration_s, 3), "annotations": annotations}
    annotation_path = folder / "annotations.json"
    annotation_path.write_text(json.dumps({"version": "planted", "database": database}), encoding="utf-8")
    return path, annotation_path


def toy_recipe(**changes: Any) -> DetectRecipe:
    """A short training of the toy with shuffling and dropout; ``train={...}`` and the like replace parts of it."""
    data: dict[str, Any] = {
        "detector": "toy",
        "streams": ["rgb", "flow"],
        "seed": 3,
        "model": {"dropout": 0.3},
        "data": {"holdout": 0.25},
        "train": {"epochs": 4, "batch_videos": 3, "lr": 1e-2, "ema": 0.9},
    }
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) and key in data and key != "model" else value
    return DetectRecipe.model_validate(data)


def stop_at(steps: int, marker: Path) -> None:
    """Make the toy write ``marker`` in this call of ``loss`` and wait there to be killed."""
    loss, calls = Toy.loss, []

    def waiting(self: Toy, outputs: Any, targets: Any) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) == steps:
            marker.touch()
            time.sleep(600)
        return loss(self, outputs, targets)

    Toy.loss = waiting  # type: ignore[method-assign]


if __name__ == "__main__":
    from tad.detect import train_detector

    torch.set_num_threads(1)
    if "TOY_STOP" in os.environ:
        count, _, path_text = os.environ["TOY_STOP"].partition(":")
        stop_at(int(count), Path(path_text))
    chosen = toy_recipe(**json.loads(sys.argv[4])) if len(sys.argv) > 4 else toy_recipe()
    train_detector(chosen, store=sys.argv[1], annotations=sys.argv[2], out=sys.argv[3], device="cpu")
