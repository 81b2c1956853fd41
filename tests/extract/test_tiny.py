"""Tiny3D: its fixed motion layer against known shifts, its declaration, its files."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from tad.errors import WeightsError
from tad.extract import build_backbone, load_backbone
from tad.extract.backbones.tiny import LocalMotion


def moving(shift: tuple[float, float], frames: int = 4, side: int = 32) -> Tensor:
    """A smooth coloured texture that moves by ``shift`` (x, y) pixels a frame, normalised clip (1, 3, T, H, W)."""
    rng = np.random.default_rng(0)
    texture = cv2.resize(rng.random((12, 12, 3)).astype(np.float32), (96, 96), interpolation=cv2.INTER_CUBIC)
    clip = []
    for k in range(frames):
        matrix = np.array([[1, 0, 32 - k * shift[0]], [0, 1, 32 - k * shift[1]]])  # picture → texture
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        clip.append(cv2.warpAffine(texture, matrix, (side, side), flags=flags))
    return torch.from_numpy(np.stack(clip)).permute(3, 0, 1, 2)[None] * 5  # (1, 3, T, H, W)


@pytest.mark.parametrize("shift", [(0.5, 0.0), (0.0, -0.5), (-0.4, 0.3), (0.8, 0.6)])
def test_motion_is_the_shift(shift: tuple[float, float]) -> None:
    motion = LocalMotion()(moving(shift))
    assert motion.shape == (1, 2, 4, 16, 16)
    measured = motion[0, :, :-1, 2:-2, 2:-2].flatten(1).median(1).values
    torch.testing.assert_close(measured, torch.tensor(shift), atol=0.08, rtol=0.1)
    assert not motion[:, :, -1].any()  # the last frame has no successor


def test_motion_knows_nothing_of_brightness_contrast_and_stillness() -> None:
    clip, layer = moving((0.5, -0.2)), LocalMotion()
    torch.testing.assert_close(layer(clip + 3.0), layer(clip), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(layer(-clip), layer(clip))
    assert not layer(clip[:, :, :1].expand(-1, -1, 4, -1, -1)).any()
    noise = torch.randn(1, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.02
    assert layer(noise).abs().mean() < 0.03  # a flat, noisy wall stands still


def test_a_mirrored_clip_has_mirrored_motion() -> None:
    clip, layer = moving((0.5, -0.2)), LocalMotion()
    expected = layer(clip).flip(-1) * torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1, 1)
    torch.testing.assert_close(layer(clip.flip(-1)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["tiny", "tiny-flow"])
def test_it_gives_what_it_declares(name: str) -> None:
    backbone = build_backbone(name, weights="random:1")
    spec = backbone.spec
    channels = 3 if spec.modality == "rgb" else 2
    scale = spec.short_side // 32
    clips = torch.randint(0, 256, (3, channels, spec.frames, *spec.crop), dtype=torch.uint8)
    clips = backbone.normalise(clips)
    with torch.inference_mode():
        outputs = backbone(clips, levels=True)
        alone = torch.cat([backbone(clip[None])["features"] for clip in clips])
        other = backbone(clips[:, :, :7, :29, :31], levels=True)  # neither length nor size is tied
    assert outputs.keys() == {"features", *spec.levels}
    assert outputs["features"].shape == (3, spec.width)
    for number, (level, info) in enumerate(spec.levels.items()):
        side = 8 >> number
        assert outputs[level].shape == (3, info.channels, spec.frames // info.stride, side, side)
        assert other[level].shape[2] == -(-7 // info.stride)
        assert other[level].shape[3] == -(-29 // (4 * scale << number))
    torch.testing.assert_close(outputs["features"], outputs["s4"].mean((2, 3, 4)))
    torch.testing.assert_close(alone, outputs["features"], atol=1e-5, rtol=1e-4)
    assert 0.2e6 < sum(p.numel() for p in backbone.parameters()) < 0.5e6


def test_no_motion_in_flow_is_nearly_zero() -> None:
    backbone = build_backbone("tiny-flow", weights="random:0")
    still = backbone.normalise(torch.full((1, 2, 4, 64, 64), 128, dtype=torch.uint8))
    assert still.abs().max() < 0.1  # pixels a frame; one step of the quantisation is 0.16


def test_files_tell_the_two_apart() -> None:
    rgb, flow = (build_backbone(name, weights="random:3") for name in ("tiny", "tiny-flow"))
    assert load_backbone(rgb.state_dict()).spec.name == "tiny"
    assert load_backbone(flow.state_dict()).spec.name == "tiny-flow"
    with pytest.raises(WeightsError, match="modality"):
        build_backbone("tiny-flow", weights=rgb.state_dict())
