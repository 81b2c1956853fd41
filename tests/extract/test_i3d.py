"""I3D against recorded outputs of the public implementations, and against a plain second writing of the network."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tad.errors import RecipeError
from tad.extract.backbones import BACKBONES, SPECS, build_backbone, load_backbone
from tad.extract.backbones.i3d import I3D, MIXED, PORTS, max_pool
from tests.extract.filler import filled_clip, filled_state, golden, relative_error, state_sha256

GOLDEN = ("i3d_rgb", "i3d_flow", "i3d_hassony_rgb", "i3d_hassony_flow")
TAGS = {"A": "", "A_rect": "_rect", "A_nat": "_nat"}
ENDPOINTS = {"s2": "Mixed_3c", "s4": "Mixed_4f", "s8": "Mixed_5c"}

# Of golden/backbones: SHA-256 of the filled weights.
FILLED = {
    "i3d-rgb": "96a249f509f6b04e41f2ae4a540c253464785502571cc6eb0c9a56a9a297cb76",
    "i3d-flow": "1985dadf19e771d6e2d72a9f9c61f8626e81ebcc61c8d10c32ec1e9490222683",
}


@pytest.fixture(scope="module", params=GOLDEN)
def loaded(
    request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[I3D, dict[str, Any], dict[str, np.ndarray]]:
    """The golden weights under the public key names, through a file and the real loading path."""
    record, arrays = golden(shared, request.param)
    state = filled_state(record["keys"], record["gain"])
    assert state_sha256(state) == record["filled_state_sha256"]
    path = tmp_path_factory.mktemp("weights") / f"{request.param}.pt"
    torch.save(state, path)
    backbone = load_backbone(path)
    assert isinstance(backbone, I3D)
    return backbone, record, arrays


@pytest.fixture(scope="module")
def filled() -> I3D:
    """i3d-rgb with filled weights, without the shared folder: our state dict has the public keys and shapes."""
    backbone = build_backbone("i3d-rgb")
    assert isinstance(backbone, I3D)
    backbone.load_state_dict(filled_state({key: value.shape for key, value in backbone.state_dict().items()}))
    return backbone


def error(value: Tensor, expected: np.ndarray, std: float | None = None) -> float:
    if std is None:
        return relative_error(value, expected)
    return float(np.abs(value.numpy() - expected).max() / std)


@torch.inference_mode()
@pytest.mark.parametrize("tag", TAGS)
def test_features_levels_and_logits_are_those_of_the_public_code(
    loaded: tuple[I3D, dict[str, Any], dict[str, np.ndarray]], tag: str
) -> None:
    backbone, record, arrays = loaded
    suffix = TAGS[tag]
    clip = filled_clip(record["inputs"][tag]["shape"], record["inputs"][tag]["seed"])
    outputs = backbone(clip, levels=True)
    assert error(outputs["features"][0], arrays[f"feature{suffix}"]) < 1e-4
    for level, endpoint in ENDPOINTS.items():
        name = endpoint.lower() if "hassony" in record["model"] else endpoint
        map_, std = outputs[level][0], float(arrays[f"{name}{suffix}__stats"][1])
        assert [1, *map_.shape] == arrays[f"{name}{suffix}__shape"].tolist()
        assert map_.shape[0] == backbone.spec.levels[level].channels
        assert error(map_.mean((1, 2, 3)), arrays[f"{name}{suffix}__gap"]) < 1e-4
        assert error(map_[:16, 0, :3, :3], arrays[f"{name}{suffix}__slice0"], std) < 1e-4
        assert error(map_[:16, -1, -3:, -3:], arrays[f"{name}{suffix}__slice"], std) < 1e-4
        stats = torch.stack([map_.mean(), map_.std(correction=0), map_.abs().max()])
        assert error(stats, arrays[f"{name}{suffix}__stats"], std) < 1e-4
    if tag == "A_nat":  # at 16x224x224 the public code's average pool is the global mean
        assert error(outputs["features"][0], arrays["extract_features_nat"].reshape(-1)) < 1e-4
        assert error(backbone.classify(outputs["features"])[0], arrays["logits_nat"].reshape(-1)) < 1e-4


@torch.inference_mode()
def test_fused_is_the_same_to_rounding(loaded: tuple[I3D, dict[str, Any], dict[str, np.ndarray]]) -> None:
    backbone, record, arrays = loaded
    fused = copy.deepcopy(backbone)
    assert fused.fuse() is fused
    assert not any(isinstance(module, torch.nn.BatchNorm3d) for module in fused.modules())
    clip = filled_clip(record["inputs"]["A"]["shape"])
    first = fused(clip)["features"][0]
    assert error(first, arrays["feature"]) < 1e-4
    assert torch.equal(fused.fuse()(clip)["features"][0], first)  # a second time changes nothing


@torch.inference_mode()
def test_double_precision_is_the_recorded_one(shared: Path, filled: I3D) -> None:
    record, arrays = golden(shared, "i3d_rgb")
    clip = filled_clip(record["inputs"]["A"]["shape"])
    assert error(filled(clip)["features"][0], arrays["feature_f64"]) < 1e-5
    assert error(copy.deepcopy(filled).double()(clip.double())["features"][0], arrays["feature_f64"]) < 1e-9


def test_golden_weights_without_the_shared_folder(filled: I3D) -> None:
    flow = build_backbone("i3d-flow").state_dict()
    assert state_sha256(filled.state_dict()) == FILLED["i3d-rgb"]
    assert state_sha256(filled_state({key: value.shape for key, value in flow.items()})) == FILLED["i3d-flow"]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("shape", "first"),
    [
        ((1, 3, 16, 112, 112), [5.972258, 0.000000, 3.527353, 19.130775, 7.995120, 32.721607, 16.793036, 15.610309]),
        ((1, 3, 15, 120, 152), [7.381199, 0.000000, 4.809014, 19.664955, 6.176695, 36.261337, 14.500400, 19.334917]),
    ],
)
def test_golden_features_without_the_shared_folder(filled: I3D, shape: tuple[int, ...], first: list[float]) -> None:
    features = filled(filled_clip(shape))["features"][0]
    assert np.allclose(features[: len(first)], first, rtol=0, atol=1e-4 * float(features.std()))


# ---- a second, slow writing of the network: every padding explicit, straight from the state dict ----


def reference(state: dict[str, Tensor], clip: Tensor, port: str) -> Tensor:
    """``Mixed_5c`` (B, 1024, T/8, H/32, W/32)."""
    hassony = port == "hassony"

    def zeros(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        pads = []
        for n, k, s in zip(x.shape[2:], kernel, stride, strict=True):
            total = max(k - s, 0) if hassony or n % s == 0 else max(k - n % s, 0)
            pads = [total // 2, total - total // 2, *pads]
        return F.pad(x, pads)

    def unit(x: Tensor, name: str, k: int, s: int = 1) -> Tensor:
        x = F.conv3d(zeros(x, (k,) * 3, (s,) * 3), state[f"{name}.conv3d.weight"], stride=s)
        mean, var = state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"]
        weight, bias = state[f"{name}.bn.weight"], state[f"{name}.bn.bias"]
        shape = (1, -1, 1, 1, 1)
        x = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + (1e-5 if hassony else 1e-3))
        return torch.relu(x * weight.view(shape) + bias.view(shape))

    def pool(x: Tensor, k: tuple[int, int, int], s: tuple[int, int, int]) -> Tensor:
        return F.max_pool3d(zeros(x, k, s), k, s, ceil_mode=hassony)

    x = pool(unit(clip, "Conv3d_1a_7x7", 7, 2), (1, 3, 3), (1, 2, 2))
    x = pool(unit(unit(x, "Conv3d_2b_1x1", 1), "Conv3d_2c_3x3", 3), (1, 3, 3), (1, 2, 2))
    for name in MIXED:
        if name == "Mixed_4b":
            x = pool(x, (3, 3, 3), (2, 2, 2))
        if name == "Mixed_5b":
            x = pool(x, (2, 2, 2), (2, 2, 2))
        x = torch.cat(
            [
                unit(x, f"{name}.b0", 1),
                unit(unit(x, f"{name}.b1a", 1), f"{name}.b1b", 3),
                unit(unit(x, f"{name}.b2a", 1), f"{name}.b2b", 3),
                unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{name}.b3b", 1),
            ],
            dim=1,
        )
    return x


SIZES = [
    (9, 33, 47),
    (10, 64, 40),
    (16, 31, 65),
    (2, 16, 16),
    (3, 2, 5),
    (8, 49, 2),
    (25, 34, 35),
    (1, 1, 1),
    (1, 40, 33),
]


@torch.inference_mode()
@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size_is_as_in_the_plain_writing(filled: I3D, size: tuple[int, int, int], port: str) -> None:
    state = filled.state_dict()
    backbone = load_backbone(state, port=port)
    clip = filled_clip((2, 3, *size), seed=1)
    if min(size) < backbone.spec.min_frames:
        with pytest.raises(RecipeError, match="at least 2 frames of 2x2"):
            backbone(clip)
        return
    outputs = backbone(clip, levels=True)
    expected = reference(state, clip, port)
    assert outputs["s8"].shape == expected.shape
    assert error(outputs["s8"], expected.numpy()) < 1e-4
    assert error(outputs["features"], expected.mean((2, 3, 4)).numpy()) < 1e-4
    if port == "piergiaj":
        for level, factors in {"s2": (2, 8, 8), "s4": (4, 16, 16), "s8": (8, 32, 32)}.items():
            assert tuple(outputs[level].shape[2:]) == tuple(-(-n // f) for n, f in zip(size, factors, strict=True))


def test_gradients_are_those_of_the_plain_writing(filled: I3D) -> None:
    state = filled.state_dict()
    clip = filled_clip((1, 3, 5, 33, 18), seed=2)
    ours, plain = clip.clone().requires_grad_(), clip.clone().requires_grad_()
    filled(ours)["features"].square().sum().backward()
    reference(state, plain, "piergiaj").mean((2, 3, 4)).square().sum().backward()
    assert ours.grad is not None
    assert plain.grad is not None
    assert error(ours.grad, plain.grad.numpy()) < 1e-3
    filled.zero_grad()


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("port", PORTS)
def test_max_pool_is_the_padded_one_for_every_size(kernel: int, stride: int, port: str) -> None:
    for size in range(1, 12):
        x = torch.relu(filled_clip((2, 3, size, 4, size + 1), seed=size))
        k, s = (kernel, 1, kernel), (stride, 1, stride)
        pads = [PORTS[port].pool_padding(n, a, b) for n, a, b in zip(x.shape[2:], k, s, strict=True)]
        total = [
            max(a - b, 0) if port == "hassony" or n % b == 0 else max(a - n % b, 0)
            for n, a, b in zip(x.shape[2:], k, s, strict=True)
        ]
        padded = F.pad(x, [z for t in reversed(total) for z in (t // 2, t - t // 2)])
        expected = F.max_pool3d(padded, k, s, ceil_mode=port == "hassony")
        assert torch.equal(max_pool(x, k, s, pads), expected)
        assert torch.equal(max_pool(x.contiguous(memory_format=torch.channels_last_3d), k, s, pads), expected)
        assert torch.equal(max_pool(x.clone().requires_grad_(), k, s, pads), expected)


# ---- behaviour -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_a_batch_is_its_clips_one_by_one(filled: I3D) -> None:
    clips = filled_clip((4, 3, 16, 64, 80), seed=3)
    together = filled(clips)["features"]
    for row in range(4):
        alone = filled(clips[row : row + 1])["features"][0]  # other kernels serve a single clip: float32 rounding
        assert error(together[row], alone.numpy()) < 3e-5
    exact, clips = copy.deepcopy(filled).double(), filled_clip((3, 3, 5, 33, 32), seed=3).double()
    together = exact(clips, levels=True)
    for row in range(3):
        alone = exact(clips[row : row + 1], levels=True)
        assert all(error(together[name][row], value[0].numpy()) < 1e-11 for name, value in alone.items())
    assert filled(filled_clip((0, 3, 16, 64, 80)))["features"].shape == (0, 1024)


@torch.inference_mode()
def test_a_clip_that_is_a_view_gives_the_same_and_stays_as_it_was(filled: I3D) -> None:
    frames = filled_clip((1, 16, 48, 40, 3), seed=4)
    view = frames.permute(0, 4, 1, 2, 3)  # (B, C, T, H, W) without a copy, as extraction hands it over
    before = frames.clone()
    assert error(filled(view)["features"], filled(view.contiguous())["features"].numpy()) < 1e-6
    assert torch.equal(frames, before)


@torch.inference_mode()
def test_the_other_port_is_another_arithmetic(filled: I3D) -> None:
    clip = filled_clip((1, 3, 16, 112, 112))
    first = load_backbone(filled.state_dict(), port="hassony")
    assert (first.variant, filled.variant) == ("hassony", "piergiaj")
    # the two differ by their batch norm's epsilon alone on sizes that the strides divide: recorded as 0.11
    assert 0.05 < error(first(clip)["features"], filled(clip)["features"].numpy()) < 0.2


@torch.inference_mode()
def test_renamed_weights_with_the_reference_arithmetic(shared: Path) -> None:
    record, _ = golden(shared, "i3d_hassony_rgb")
    branches = {
        "branch_0": "b0",
        "branch_1.0": "b1a",
        "branch_1.1": "b1b",
        "branch_2.0": "b2a",
        "branch_2.1": "b2b",
        "branch_3.1": "b3b",
    }
    state, plain = filled_state(record["keys"], record["gain"]), {}
    for key, value in state.items():
        name = key.replace("batch3d", "bn").replace("conv3d_0c_1x1", "logits").replace("mixed_", "Mixed_")
        for theirs, ours in branches.items():
            name = name.replace(theirs, ours)
        plain["Conv" + name.removeprefix("conv") if name.startswith("conv3d_") else name] = value
    backbone = load_backbone(state, port="piergiaj")
    assert backbone.variant == "piergiaj"
    clip = filled_clip((1, 3, 11, 50, 37), seed=5)
    assert error(backbone(clip)["features"], reference(plain, clip, "piergiaj").mean((2, 3, 4)).numpy()) < 1e-4
    assert sorted(backbone.state_dict()) == sorted(plain)


def test_parameter_counts() -> None:
    for name, plain in (("i3d-rgb", 12_287_264), ("i3d-flow", 12_265_312)):
        backbone = build_backbone(name)
        parameters = {key: value.numel() for key, value in backbone.named_parameters()}
        assert sum(parameters.values()) == plain + 410_000
        assert sum(n for key, n in parameters.items() if not key.startswith("logits.")) == plain
    assert sum(p.numel() for p in I3D(in_channels=3, classes=None).parameters()) == 12_287_264


def test_spec_without_building_is_that_of_the_network() -> None:
    for name in ("i3d-rgb", "i3d-flow"):
        backbone = build_backbone(name)
        assert backbone.spec == SPECS[name] == BACKBONES[name].spec
        assert backbone.spec.name == name
        assert not backbone.training
    assert build_backbone("i3d-rgb", port="hassony").spec.min_frames == 2


def test_pixels_are_mapped_to_minus_one_to_one() -> None:
    clips = torch.tensor([0, 51, 128, 255], dtype=torch.uint8).view(1, 1, 4, 1, 1).expand(1, 2, 4, 1, 1)
    values = build_backbone("i3d-flow").normalise(clips)
    assert torch.allclose(values[0, 1, :, 0, 0], torch.tensor([-1.0, -0.6, 128 * 2 / 255 - 1, 1.0]), atol=1e-6)


@torch.inference_mode()
def test_random_weights_keep_the_signal_alive() -> None:
    backbone = build_backbone("i3d-rgb", weights="random:1")
    features = backbone(filled_clip((2, 3, 16, 64, 64)))["features"]
    assert 0.05 < float(features.std()) < 50
    assert float((features[0] - features[1]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        (torch.zeros(1, 2, 16, 32, 32), r"takes clips \(B, 3, T, H, W\), got \(1, 2, 16, 32, 32\)"),
        (torch.zeros(3, 16, 32, 32), "takes clips"),
        (torch.zeros(1, 3, 16, 32, 32, dtype=torch.uint8), r"normalise\(clips\) first"),
        (torch.zeros(1, 3, 0, 32, 32), "at least 1 frames"),
        (torch.zeros(1, 3, 16, 0, 32), "at least 1 frames"),
    ],
)
def test_clips_that_cannot_be_meant(filled: I3D, clips: Tensor, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        filled(clips)


def test_wrong_uses_say_so(filled: I3D) -> None:
    with pytest.raises(RecipeError, match=r"no port 'piergaj'.*Did you mean 'piergiaj'"):
        I3D(port="piergaj")
    with pytest.raises(RecipeError, match=r"3 channels .* or 2 .*, not 4"):
        I3D(in_channels=4)
    with pytest.raises(RecipeError, match="i3d-rgb has no classifier"):
        I3D(classes=None).classify(torch.zeros(1, 1024))
    with pytest.raises(RecipeError, match=r"call eval\(\) first"):
        I3D(classes=None).train().fuse()


def test_classifier_drops_out_in_training_only(filled: I3D) -> None:
    backbone = build_backbone("i3d-rgb", weights="random")
    features = torch.ones(1, 1024)
    assert torch.equal(backbone.classify(features), backbone.classify(features))
    backbone.train()
    assert not torch.equal(backbone.classify(features), backbone.classify(features))
