"""R(2+1)D, R3D and MC3 against recorded outputs of the public implementations, and against a plain second writing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tad.errors import RecipeError, WeightsError
from tad.extract.backbones import BACKBONES, SPECS, build_backbone, load_backbone
from tad.extract.backbones.r2plus1d import (
    LAYOUTS,
    R18,
    R34,
    BasicBlock,
    VideoResNet,
    midplanes,
)
from tad.extract.backbones.r2plus1d_r50 import BottleneckR2Plus1D, FactoredBottleneck
from tad.extract.snippets import SnippetPlan
from tests.extract.filler import filled_clip, filled_state, golden, state_sha256
from tests.extract.parity import (
    Loaded,
    check_batches,
    check_keys_land,
    check_outputs,
    check_parameters,
    check_training,
    conv,
    error,
    golden_clip,
    loaded_golden,
    norm,
)

GOLDEN = {
    "tv_r2plus1d_18": "r2plus1d-18",
    "tsp_r2plus1d_34": "r2plus1d-34",
    "mma_r2plus1d_r34": "r2plus1d-34-mm",
    "ptv_r2plus1d_16x4_r50": "r2plus1d-50",
    "tsp_r3d_18": "r3d-18",
    "tv_mc3_18": "mc3-18",
    "ig65m_r2plus1d_34": "r2plus1d-34",
    "tsp_r2plus1d_18": "r2plus1d-18",
    "tv_r3d_18": "r3d-18",
}
SLOW = (
    "ig65m_r2plus1d_34",
    "tsp_r2plus1d_18",
    "tv_r3d_18",
    "tsp_r3d_18",
)
NAMES = tuple(dict.fromkeys(GOLDEN.values()))
TAGS = ("A", "A_rect", pytest.param("A_nat", marks=pytest.mark.slow))

# Of golden/backbones, tv_r2plus1d_18 and tv_mc3_18: SHA-256 of the filled weights, the first features of A and A_rect.
FILLED = {
    "2+1d": "61d163d1e55e95b4448bd91502f29e2fd6e24585f396cb622ee5f490f0a1283a",
    "mixed": "8b9f880d8cd958031415414e7cd98743b1a0ff9826978d5f6a9d91037f3d32ca",
}
FIRST = {
    ("2+1d", "A"): [23.812548, 2.009558, 26.797665, 14.616835, 1.213554, 8.413982, 0.450152, 0.076590],
    ("2+1d", "A_rect"): [24.676216, 1.827265, 24.990334, 12.286844, 1.162987, 7.615535, 0.433051, 0.000000],
    ("mixed", "A"): [1.521278, 10.558574, 0.774775, 25.512419, 4.834391, 29.339939, 12.782104, 15.348633],
    ("mixed", "A_rect"): [1.170822, 13.555668, 0.594970, 24.394558, 4.303768, 32.123402, 13.206262, 15.392104],
}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in GOLDEN]
)
def loaded(request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return loaded_golden(shared, request.param, tmp_path_factory.mktemp("weights"))


def torchvision_shapes(convs: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the networks of 18 blocks as torchvision writes them."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm_of(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    def unit(name: str, inputs: int, channels: int, mid: int, temporal: int) -> None:
        if convs == "2+1d":
            shapes[f"{name}.0.0.weight"] = (mid, inputs, 1, 3, 3)
            norm_of(f"{name}.0.1", mid)
            shapes[f"{name}.0.3.weight"] = (channels, mid, 3, 1, 1)
        else:
            shapes[f"{name}.0.weight"] = (channels, inputs, temporal, 3, 3)
        norm_of(f"{name}.1", channels)

    if convs == "2+1d":
        shapes["stem.0.weight"], shapes["stem.3.weight"] = (45, 3, 1, 7, 7), (64, 45, 3, 1, 1)
        norm_of("stem.1", 45)
        norm_of("stem.4", 64)
    else:
        shapes["stem.0.weight"] = (64, 3, 3, 7, 7)
        norm_of("stem.1", 64)
    width = 64
    for stage, channels in enumerate((64, 128, 256, 512), start=1):
        temporal = 1 if convs == "mixed" and stage > 1 else 3
        for block in range(2):
            mid = 27 * width * channels // (9 * width + 3 * channels)
            unit(f"layer{stage}.{block}.conv1", width, channels, mid, temporal)
            unit(f"layer{stage}.{block}.conv2", channels, channels, mid, temporal)
            if width != channels:
                shapes[f"layer{stage}.{block}.downsample.0.weight"] = (channels, width, 1, 1, 1)
                norm_of(f"layer{stage}.{block}.downsample.1", channels)
            width = channels
    return {**shapes, "fc.weight": (400, 512), "fc.bias": (400,)}


@pytest.fixture(scope="module", params=["2+1d", "3d", "mixed"])
def written(request: pytest.FixtureRequest) -> tuple[str, dict[str, Tensor], VideoResNet]:
    """Filled weights of 18 blocks under torchvision's names and the network of them, without the shared folder."""
    state = filled_state(torchvision_shapes(request.param))
    backbone = load_backbone(state)
    assert isinstance(backbone, VideoResNet)
    return request.param, state, backbone


# ---- against recorded outputs ----------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("tag", TAGS)
def test_features_levels_and_logits_are_those_of_the_public_code(loaded: Loaded, tag: str) -> None:
    backbone, record, arrays = loaded
    assert backbone.spec.name == GOLDEN[record["model"]]
    stages = [f"block{n}" if record["model"].startswith("ptv") else f"layer{n}" for n in (2, 3, 4)]
    outputs = check_outputs(loaded, tag, dict(zip(backbone.spec.levels, stages, strict=True)))
    if tag != "A_nat":
        return
    logits = backbone.classify(outputs["features"])[0]
    if record["model"].startswith("tsp"):
        assert isinstance(backbone, VideoResNet)
        assert error(outputs["features"][0], arrays["features_ref_nat"].reshape(-1)) < 1e-4
        assert error(logits, arrays["logits1_nat"].reshape(-1)) < 1e-4
        regions = backbone.classify_region(outputs["features"], outputs["features"])[0]
        assert error(regions, arrays["logits2_nat"].reshape(-1)) < 1e-4
    else:  # pytorchvideo's head gives probabilities
        scores = logits.softmax(0) if record["model"].startswith("ptv") else logits
        assert error(scores, arrays["logits_nat"].reshape(-1)) < 1e-4


@torch.inference_mode()
def test_fused_is_the_same_to_rounding(loaded: Loaded) -> None:
    backbone, record, arrays = loaded
    fused = copy.deepcopy(backbone)
    assert fused.fuse() is fused
    assert not any(isinstance(module, torch.nn.BatchNorm3d) for module in fused.modules())
    assert error(fused(golden_clip(record))["features"][0], arrays["feature"]) < 1e-4


def test_batch_norms_have_the_epsilon_of_their_code(loaded: Loaded) -> None:
    backbone, record, _ = loaded
    counts: dict[str, int] = {}
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            counts[f"{module.eps:g}"] = counts.get(f"{module.eps:g}", 0) + 1
    assert counts == record["norm_eps"]["BatchNorm"]
    assert sum(value.numel() for value in backbone.parameters()) == record["n_params"]


@pytest.mark.parametrize("name", GOLDEN)
def test_every_public_key_lands(shared: Path, name: str) -> None:
    check_keys_land(golden(shared, name)[0]["keys"], GOLDEN[name])


@pytest.mark.parametrize("written", ["2+1d", "mixed"], indirect=True)
@torch.inference_mode()
@pytest.mark.parametrize(("tag", "shape"), [("A", (1, 3, 8, 112, 112)), ("A_rect", (1, 3, 7, 128, 160))])
def test_golden_features_without_the_shared_folder(
    written: tuple[str, dict[str, Tensor], VideoResNet], tag: str, shape: tuple[int, ...]
) -> None:
    convs, state, backbone = written
    assert state_sha256(state) == FILLED[convs]
    features, first = backbone(filled_clip(shape))["features"][0], FIRST[convs, tag]
    assert np.allclose(features[: len(first)], first, rtol=0, atol=1e-4 * float(features.std()))


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("r2plus1d-34", 63_491_975),
        ("r2plus1d-18", 31_300_125),
        ("r2plus1d-34-mm", 63_554_081),
        ("r2plus1d-50", 27_288_000),
        ("r3d-18", 33_371_472 - 205_200),
        ("mc3-18", 11_695_440 - 205_200),
    ],
)
def test_parameter_counts(name: str, plain: int) -> None:
    check_parameters(name, plain)


# ---- against a plain writing -----------------------------------------------------------------------------------------


def reference(state: Mapping[str, Tensor], clip: Tensor, eps: float = 1e-5) -> list[Tensor]:
    """Outputs of the last three stages of a network of torchvision's."""

    def unit(x: Tensor, name: str, stride: int, temporal: int) -> Tensor:
        if f"{name}.0.weight" in state:
            return norm(state, conv(state, x, f"{name}.0", (temporal, stride, stride)), f"{name}.1", eps)
        y = torch.relu(norm(state, conv(state, x, f"{name}.0.0", (1, stride, stride)), f"{name}.0.1", eps))
        return norm(state, conv(state, y, f"{name}.0.3", (temporal, 1, 1)), f"{name}.1", eps)

    x = torch.relu(norm(state, conv(state, clip, "stem.0", (1, 2, 2)), "stem.1", eps))
    if "stem.3.weight" in state:
        x = torch.relu(norm(state, conv(state, x, "stem.3"), "stem.4", eps))
    maps = []
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            mixed = f"{name}.conv1.0.weight" in state and state[f"{name}.conv1.0.weight"].shape[2] == 1
            temporal = 1 if mixed else stride
            y = unit(torch.relu(unit(x, f"{name}.conv1", stride, temporal)), f"{name}.conv2", 1, 1)
            if f"{name}.downsample.0.weight" in state:
                x = conv(state, x, f"{name}.downsample.0", (temporal, stride, stride))
                x = norm(state, x, f"{name}.downsample.1", eps)
            x = torch.relu(y + x)
        maps.append(x)
    return maps[1:]


@torch.inference_mode()
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 33, 47), (9, 16, 31), (2, 2, 50)], ids=str)
def test_any_size_is_as_in_the_plain_writing(
    written: tuple[str, dict[str, Tensor], VideoResNet], size: tuple[int, int, int]
) -> None:
    _, state, backbone = written
    clip = filled_clip((2, 3, *size), seed=1)
    outputs, maps = backbone(clip, levels=True), reference(state, clip)
    for (level, info), expected in zip(backbone.spec.levels.items(), maps, strict=True):
        assert outputs[level].shape == expected.shape
        assert error(outputs[level], expected) < 1e-4
        assert expected.shape[1:3] == (info.channels, -(-size[0] // info.stride))
    assert error(outputs["features"], maps[-1].mean((2, 3, 4))) < 1e-4


@pytest.mark.parametrize("written", ["mixed"], indirect=True)
@torch.inference_mode()
def test_rectangular_frames_of_full_size(written: tuple[str, dict[str, Tensor], VideoResNet]) -> None:
    _, state, backbone = written
    clip = filled_clip((1, 3, 1, 256, 320), seed=2)
    assert error(backbone(clip)["features"], reference(state, clip)[-1].mean((2, 3, 4))) < 1e-4


def test_gradients_are_those_of_the_plain_writing(written: tuple[str, dict[str, Tensor], VideoResNet]) -> None:
    _, state, backbone = written
    clip = filled_clip((1, 3, 3, 17, 18), seed=2)
    ours, plain = clip.clone().requires_grad_(), clip.clone().requires_grad_()
    backbone(ours)["features"].square().sum().backward()
    reference(state, plain)[-1].mean((2, 3, 4)).square().sum().backward()
    assert ours.grad is not None
    assert plain.grad is not None
    assert error(ours.grad, plain.grad) < 1e-3
    backbone.zero_grad(set_to_none=True)


@torch.inference_mode()
def test_mmaction2_factors_its_shortcuts_and_has_two_epsilons() -> None:
    block = BasicBlock(
        16, 24, stride=(2, 2), convs="2+1d", mids="conv", factored_shortcut=True, eps=1e-3, inner_eps=1e-5
    ).eval()
    state = filled_state({key: value.shape for key, value in block.state_dict().items()})
    state = {key: value * 0.01 if key.endswith("running_var") else value for key, value in state.items()}
    block.load_state_dict(state)

    def unit(x: Tensor, name: str, stride: int) -> Tensor:
        y = conv(state, x, f"{name}.spatial.conv", (1, stride, stride))
        y = conv(state, torch.relu(norm(state, y, f"{name}.spatial.bn", 1e-5)), f"{name}.temporal.conv", (stride, 1, 1))
        return norm(state, y, f"{name}.temporal.bn", 1e-3)

    x = filled_clip((2, 16, 5, 6, 7))
    expected = torch.relu(unit(torch.relu(unit(x, "conv1", 2)), "conv2", 1) + unit(x, "shortcut", 2))
    assert error(block(x), expected) < 1e-5
    assert state["shortcut.temporal.conv.weight"].shape == (24, midplanes(16, 24, 1), 1, 1, 1)
    assert state["conv2.spatial.conv.weight"].shape[0] == midplanes(24, 24)


@torch.inference_mode()
def test_pytorchvideo_convolves_time_before_space() -> None:
    block = FactoredBottleneck(16, 8, stride=(2, 2), eps=1e-5).eval()
    state = filled_state({key: value.shape for key, value in block.state_dict().items()})
    block.load_state_dict(state)

    def unit(x: Tensor, name: str, stride: int | tuple[int, ...] = 1) -> Tensor:
        return norm(state, conv(state, x, f"{name}.conv", stride), f"{name}.bn", 1e-5)

    x = filled_clip((2, 16, 5, 6, 7))
    y = torch.relu(unit(torch.relu(unit(x, "conv1")), "temporal", (2, 1, 1)))
    y = unit(torch.relu(unit(y, "spatial", (1, 2, 2))), "conv3")
    assert error(block(x), torch.relu(y + unit(x, "shortcut", 2))) < 1e-5


def test_midplanes_are_those_of_the_public_files() -> None:
    assert [midplanes(64, 64), midplanes(64, 128), midplanes(128, 128)] == [144, 230, 288]
    assert [midplanes(256, 512), midplanes(512, 512), midplanes(3, 64, 7), midplanes(64, 128, 1)] == [921, 1152, 83, 54]


@pytest.mark.parametrize("written", ["2+1d", "mixed"], indirect=True)
@torch.inference_mode()
def test_a_batch_is_its_clips_one_by_one(written: tuple[str, dict[str, Tensor], VideoResNet]) -> None:
    check_batches(written[2], filled_clip((2, 3, 5, 32, 40), seed=3))


@pytest.mark.parametrize("written", ["2+1d", "mixed"], indirect=True)
def test_a_training_step_reaches_every_parameter(written: tuple[str, dict[str, Tensor], VideoResNet]) -> None:
    check_training(written[2], filled_clip((2, 3, 9, 32, 24), seed=5))


# ---- files -----------------------------------------------------------------------------------------------------------


def test_files_that_do_not_fit_name_the_tensor(written: tuple[str, dict[str, Tensor], VideoResNet]) -> None:
    convs, state, backbone = written
    short = {key: value for key, value in state.items() if key != "layer2.0.conv2.1.bias"}
    lost = "temporal.bn" if convs == "2+1d" else "bn"
    with pytest.raises(WeightsError, match=rf"1 tensors missing: res3\.0\.conv2\.{lost}\.bias"):
        load_backbone(short)
    with pytest.raises(WeightsError, match=r"1 tensors unexpected: res3\.0\.conv9\.weight"):
        load_backbone({**state, "layer2.0.conv9.weight": torch.zeros(3)})
    with pytest.raises(WeightsError, match=rf"holds {backbone.spec.name}, not r2plus1d-34 "):
        build_backbone("r2plus1d-34", state)
    shallow = {key: value for key, value in state.items() if not key.startswith("layer3.1.")}
    with pytest.raises(WeightsError, match=r"depths is \(2, 2, 1, 2\) in the file"):
        load_backbone(shallow)


@pytest.mark.parametrize("written", ["2+1d"], indirect=True)
def test_channels_between_the_convolutions_tell_the_code(
    written: tuple[str, dict[str, Tensor], VideoResNet],
) -> None:
    _, state, _ = written
    wide = {**state, "layer2.0.conv2.0.0.weight": torch.zeros(288, 128, 1, 3, 3)}
    with pytest.raises(WeightsError, match="mids is conv in the file and block in r2plus1d-18"):
        load_backbone(wide)


@pytest.mark.parametrize("written", ["mixed"], indirect=True)
def test_tsp_files_have_two_classifiers(written: tuple[str, dict[str, Tensor], VideoResNet]) -> None:
    _, state, ours = written
    tsp = {f"features.{key}": value for key, value in state.items() if not key.startswith("fc.")}
    heads = filled_state({"fc1.weight": (20, 512), "fc1.bias": (20,), "fc2.weight": (2, 1024), "fc2.bias": (2,)})
    backbone = load_backbone({**tsp, **heads})
    assert isinstance(backbone, VideoResNet)
    assert backbone.spec == SPECS[ours.spec.name]
    features, videos = filled_clip((2, 512)), filled_clip((2, 512), seed=1)
    assert torch.allclose(backbone.classify(features), F.linear(features, heads["fc1.weight"], heads["fc1.bias"]))
    both = torch.cat([features, videos], 1)
    regions = F.linear(both, heads["fc2.weight"], heads["fc2.bias"])
    assert torch.allclose(backbone.classify_region(features, videos), regions)
    with pytest.raises(RecipeError, match="reads 1024 values a clip, got 512"):
        backbone.classify_region(features)
    with pytest.raises(RecipeError, match="has no region classifier"):
        ours.classify_region(features)
    alone = load_backbone({**tsp, "fc.weight": heads["fc1.weight"], "fc.bias": heads["fc1.bias"]})
    assert torch.equal(alone.classify(features), backbone.classify(features))
    narrow = {**heads, "fc2.weight": heads["fc2.weight"][:, :512].clone()}
    without = load_backbone({**tsp, **narrow})
    assert isinstance(without, VideoResNet)
    assert torch.allclose(
        without.classify_region(features), F.linear(features, narrow["fc2.weight"], heads["fc2.bias"])
    )


@pytest.mark.parametrize("written", ["mixed"], indirect=True)
def test_a_file_without_classifier_has_none(written: tuple[str, dict[str, Tensor], VideoResNet]) -> None:
    _, state, ours = written
    backbone = load_backbone({key: value for key, value in state.items() if not key.startswith("fc.")})
    with pytest.raises(RecipeError, match=f"{ours.spec.name} has no classifier"):
        backbone.classify(torch.zeros(1, 512))


# ---- behaviour -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_spec_without_building_is_that_of_the_network(name: str) -> None:
    with torch.device("meta"):
        entry = BACKBONES[name]
        assert entry.build(**entry.arguments).spec == SPECS[name] == entry.spec
    spec = SPECS[name]
    assert spec.name == name
    for level, info in spec.levels.items():
        SnippetPlan(spec.window, spec.interval, spec.stride).check_level(level, info.stride)


def test_frames_are_counted_as_each_code_base_counts_them() -> None:
    specs = {layout.family: replace(SPECS["r2plus1d-34"], **layout.spec) for layout in LAYOUTS["r2plus1d-34"]}
    tsp, ig65m = specs["TSP R(2+1)D or R3D"], specs["torchvision/ig65m R(2+1)D, R3D or MC3"]
    assert (tsp.frames, tsp.fps, tsp.grid_fps, tsp.resize, tsp.crop) == (16, 15.0, 15.0, (128, 171), (112, 112))
    assert (ig65m.frames, ig65m.fps, ig65m.grid_fps, ig65m.resize, ig65m.window) == (32, None, None, (128, 171), 32)
    assert tsp.mean == ig65m.mean == (0.43216, 0.394666, 0.37645)
    slow = SPECS["r2plus1d-50"]
    assert (slow.frames, slow.interval, slow.fps, slow.grid_fps, slow.mean[0]) == (16, 4, 30.0, 30.0, 0.45)
    assert (SPECS["r2plus1d-34-mm"].value_range, SPECS["r2plus1d-34-mm"].grid_fps) == ((0.0, 255.0), None)


@torch.inference_mode()
def test_random_weights_keep_the_signal_alive() -> None:
    for name in ("mc3-18", "r2plus1d-50"):
        backbone = build_backbone(name, weights="random:1")
        features = backbone(filled_clip((2, 3, 4, 48, 48)))["features"]
        assert 0.01 < float(features.std()) < 100
        assert float((features[0] - features[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("written", ["mixed"], indirect=True)
def test_wrong_uses_say_so(written: tuple[str, dict[str, Tensor], VideoResNet]) -> None:
    with pytest.raises(
        RecipeError, match=r"no video ResNet has .*\('3d', \(3, 4, 6, 3\), False\)\. Known: r2plus1d-34"
    ):
        VideoResNet(convs="3d", depths=R34)
    with pytest.raises(RecipeError, match=r"takes clips \(B, 3, T, H, W\), got \(3, 4, 8, 8\)"):
        written[2](torch.zeros(3, 4, 8, 8))
    with pytest.raises(RecipeError, match=r"normalise\(clips\) first"):
        written[2](torch.zeros(1, 3, 4, 8, 8, dtype=torch.uint8))
    with pytest.raises(RecipeError, match="r2plus1d-50 has no classifier"):
        BottleneckR2Plus1D(depths=(1, 1, 1, 1), classes=None).classify(torch.zeros(1, 2048))
    assert R18 == (2, 2, 2, 2)
