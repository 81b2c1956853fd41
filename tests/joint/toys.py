"""Clips of seeded noise for the tests of joint mode, and what a plain loop over them gives."""

from __future__ import annotations

import torch
from torch import Tensor

from tad.extract.backbones import Backbone
from tad.extract.backbones.tiny import Tiny3D
from tad.joint.clips import Clips


def noise(*, clips: int, window: int = 4, side: int = 16, channels: int = 3, seed: int = 0) -> Clips:
    """Overlapping clips of every second frame; the last ones repeat the last frame."""
    drawn = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (2 * clips + 1, channels, side, side), generator=drawn, dtype=torch.uint8)
    index = (torch.arange(clips)[:, None] * 2 + torch.arange(window)).clamp(max=len(frames) - 1)  # (U, W)
    return Clips(frames, index, torch.arange(clips) + 3, torch.arange(clips).float())


def tiny(*, seed: int = 1, double: bool = True, widths: tuple[int, int, int, int] = (2, 3, 4, 5)) -> Backbone:
    """A Tiny3D of few channels whose norms have seen something."""
    dtype = torch.float64 if double else torch.float32
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        backbone = Tiny3D(channels=widths).to(dtype).train()
        for _ in range(3):
            backbone(torch.randn(4, 3, 4, 16, 16, dtype=dtype))
    return backbone.eval()


def one_by_one(backbone: Backbone, clip: Clips, level: str = "features") -> list[Tensor]:
    """The output of each clip, in a pass of its own, written without the encoder."""
    dtype = next(backbone.parameters()).dtype
    rows = []
    for places in clip.index.tolist():
        frames = torch.stack([clip.frames[place] for place in places], 1)[None]  # (1, C, W, H, W')
        rows.append(backbone(backbone.normalise(frames, dtype), levels=True)[level])
    return rows
