"""SlowFast against recorded outputs of the public implementations, and against a plain second writing of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tad.errors import RecipeError, WeightsError
from tad.extract.backbones import SPECS, build_backbone, load_backbone
from tad.extract.backbones.slowfast import NETWORKS, SlowFast
from tad.extract.snippets import SnippetPlan
from tests.extract.filler import filled_clip, filled_state, golden, relative_error, state_sha256

# Golden file → our name, what the public file wraps the state dict in, endpoints of our levels (slow, fast) and whether
# the slow one is recorded with the next lateral joined to it.
GOLDEN: dict[str, tuple[str, str, list[tuple[str, str, bool]]]] = {
    "ptv_slowfast_8x8_r50": (
        "slowfast-r50", "model_state", [(f"block{i}_p0", f"block{i}_p1", i < 4) for i in (2, 3, 4)],
    ),
    "ptv_slowfast_8x8_r101": (
        "slowfast-r101", "model_state", [(f"block{i}_p0", f"block{i}_p1", i < 4) for i in (2, 3, 4)],
    ),
    "pysf_slowfast_8x8_r50": (
        "slowfast-r50", "model_state", [(f"s{i}_p0", f"s{i}_p1", False) for i in (3, 4, 5)],
    ),
    "pysf_slowfast_8x8_r101": (
        "slowfast-r101", "model_state", [(f"s{i}_p0", f"s{i}_p1", False) for i in (3, 4, 5)],
    ),
    "mma_slowfast_r50_8x8": (
        "slowfast-r50-mm", "state_dict", [(f"slow_layer{i}", f"fast_layer{i}", False) for i in (2, 3, 4)],
    ),
    "mma_slowfast_r101_8x8": (
        "slowfast-r101-mm", "state_dict", [(f"slow_layer{i}", f"fast_layer{i}", False) for i in (2, 3, 4)],
    ),
}  # fmt: skip
SLOW_ONES = ("pysf_slowfast_8x8_r101",)  # the same network and arithmetic as ptv_slowfast_8x8_r101
TAGS = {"A": "", "A_rect": "_rect", "A_nat": "_nat"}
LEVELS = ("res3", "res4", "res5")
DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def public_shapes(
    family: str, slow: int, fast: int, fusion_kernel: int, temporal: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    """A public key table (``pytorchvideo`` or ``mmaction2``), written down from the published architecture."""
    ptv = family == "pytorchvideo"
    shapes: dict[str, tuple[int, ...]] = {}

    def unit(conv: str, norm: str | None, *shape: int) -> None:
        shapes[f"{conv}.weight"] = shape
        for part in ("weight", "bias", "running_mean", "running_var"):
            if norm:
                shapes[f"{norm}.{part}"] = shape[:1]
        if norm:
            shapes[f"{norm}.num_batches_tracked"] = ()

    def block(path: int, stage: int, i: int, part: str) -> tuple[str, str]:
        if ptv:
            base = f"blocks.{stage}.multipathway_blocks.{path}.res_blocks.{i}"
            if part == "shortcut":
                return f"{base}.branch1_conv", f"{base}.branch1_norm"
            return f"{base}.branch2.conv_{part}", f"{base}.branch2.norm_{part}"
        name = "downsample" if part == "shortcut" else f"conv{'abc'.index(part) + 1}"
        base = f"backbone.{('slow', 'fast')[path]}_path.layer{stage}.{i}.{name}"
        return f"{base}.conv", f"{base}.bn"

    for path, (width, stem, depth) in enumerate(((64, 1, slow), (8, 5, fast))):
        fused = 16 if path == 0 else 0
        base = f"blocks.0.multipathway_blocks.{path}" if ptv else f"backbone.{('slow', 'fast')[path]}_path.conv1"
        unit(f"{base}.conv", f"{base}.{'norm' if ptv else 'bn'}", width, 3, stem, 7, 7)
        channels = width + fused
        for stage, blocks in enumerate(DEPTHS[depth], 1):
            inner = width * 2 ** (stage - 1)
            for i in range(blocks):
                kernel = 3 if path == 1 or stage > 2 else 1
                kernel = 1 if stage == 3 and i >= temporal[path] else kernel
                if i == 0:
                    unit(*block(path, stage, i, "shortcut"), 4 * inner, channels, 1, 1, 1)
                unit(*block(path, stage, i, "a"), inner, channels, kernel, 1, 1)
                unit(*block(path, stage, i, "b"), inner, inner, 1, 3, 3)
                unit(*block(path, stage, i, "c"), 4 * inner, inner, 1, 1, 1)
                channels = 4 * inner
            channels += fused * 2 ** (stage + 1)
    for i, channels in enumerate((8, 32, 64, 128)):
        if ptv:
            base = f"blocks.{i}.multipathway_fusion"
            unit(f"{base}.conv_fast_to_slow", f"{base}.norm", 2 * channels, channels, fusion_kernel, 1, 1)
        else:
            base = f"backbone.slow_path.{f'layer{i}' if i else 'conv1'}_lateral"
            unit(f"{base}.conv", None, 2 * channels, channels, fusion_kernel, 1, 1)
    head = "blocks.6.proj" if ptv else "cls_head.fc_cls"
    return shapes | {f"{head}.weight": (400, 2304), f"{head}.bias": (400,)}


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=pytest.mark.slow if n in SLOW_ONES else ()) for n in GOLDEN]
)
def loaded(
    request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SlowFast, str, dict[str, Any], dict[str, np.ndarray]]:
    """The golden weights under the public key names, through a file and the real loading path."""
    record, arrays = golden(shared, request.param)
    state = filled_state(record["keys"], record["gain"])
    path = tmp_path_factory.mktemp("weights") / f"{request.param}.pyth"
    torch.save({GOLDEN[request.param][1]: state, "epoch": 196}, path)
    backbone = load_backbone(path)
    path.unlink()
    assert isinstance(backbone, SlowFast)
    return backbone, request.param, record, arrays


@pytest.fixture(scope="module")
def r50_state() -> dict[str, Tensor]:
    """slowfast-r50's filled weights under pytorchvideo's names, without the shared folder."""
    return filled_state(public_shapes("pytorchvideo", 50, 50, 7, (6, 6)), 0.85)


@pytest.fixture(scope="module")
def r50(r50_state: dict[str, Tensor]) -> SlowFast:
    backbone = load_backbone({"model_state": {f"model.{key}": value for key, value in r50_state.items()}})  # type: ignore[dict-item]
    assert isinstance(backbone, SlowFast)
    return backbone


def check_golden(loaded: tuple[SlowFast, str, dict[str, Any], dict[str, np.ndarray]], tag: str) -> dict[str, Tensor]:
    backbone, name, record, arrays = loaded
    assert backbone.spec.name == GOLDEN[name][0]
    suffix = TAGS[tag]
    clip = filled_clip(record["inputs"][tag]["shape"], record["inputs"][tag]["seed"])
    outputs = backbone(clip, levels=True)
    assert relative_error(outputs["features"][0], arrays[f"feature{suffix}"]) < 1e-4
    assert list(outputs) == ["features", *LEVELS]
    for level, (slow, fast, fused) in zip(LEVELS, GOLDEN[name][2], strict=True):
        map_, width = outputs[level][0], outputs[level].shape[1] * 8 // 9
        assert map_.shape[0] == backbone.spec.levels[level].channels
        _, _, *size = arrays[f"{slow}{suffix}__shape"].tolist()
        assert list(map_.shape[1:]) == size
        assert clip.shape[2] == map_.shape[1] * backbone.spec.levels[level].stride
        gaps, std = map_.mean((1, 2, 3)), float(arrays[f"{slow}{suffix}__stats"][1])
        assert relative_error(gaps[:width], arrays[f"{slow}{suffix}__gap"][:width]) < 1e-4
        assert relative_error(gaps[width:], arrays[f"{fast}{suffix}__gap"]) < 1e-4
        for part, ours in (("slice0", map_[:16, 0, :3, :3]), ("slice", map_[:16, -1, -3:, -3:])):
            assert float(np.abs(ours.numpy() - arrays[f"{slow}{suffix}__{part}"]).max() / std) < 1e-4
        if not fused:
            stats = torch.stack([map_[:width].mean(), map_[:width].std(correction=0), map_[:width].abs().max()])
            assert float(np.abs(stats.numpy() - arrays[f"{slow}{suffix}__stats"]).max() / std) < 1e-4
    return outputs


@torch.inference_mode()
@pytest.mark.parametrize("tag", ["A", "A_rect"])
def test_features_and_levels_are_those_of_the_public_code(
    loaded: tuple[SlowFast, str, dict[str, Any], dict[str, np.ndarray]], tag: str
) -> None:
    check_golden(loaded, tag)


@pytest.mark.slow
@torch.inference_mode()
def test_logits_are_those_of_the_public_code(
    loaded: tuple[SlowFast, str, dict[str, Any], dict[str, np.ndarray]],
) -> None:
    outputs = check_golden(loaded, "A_nat")
    backbone, name, _, arrays = loaded
    assert relative_error(backbone.classify(outputs["features"])[0], arrays["logits_nat"].reshape(-1)) < 1e-4
    if name.startswith("mma_"):  # the classifier's own order, (fast, slow)
        features = torch.cat([outputs["features"][0, 2048:], outputs["features"][0, :2048]])
        assert relative_error(features, arrays["head_input_nat"]) < 1e-4


@torch.inference_mode()
def test_golden_features_without_the_shared_folder(r50_state: dict[str, Tensor], r50: SlowFast) -> None:
    assert state_sha256(r50_state) == "148f2eca1a62c531b00619489fdf28e702751dedfb4c47309202d54b23bc9a47"
    features = r50(filled_clip((1, 3, 16, 112, 112)))["features"][0]
    first = [10.327757, 18.107025, 57.560898, 32.886959, 97.795884, 16.437378]
    last = [41.891869, 73.009285, 11.583663, 20.066221]
    assert np.allclose(features[:6], first, rtol=0, atol=1e-4 * 35.24)
    assert np.allclose(features[-4:], last, rtol=0, atol=1e-4 * 35.24)
    assert abs(float(features.std(correction=0)) - 35.243156) < 0.01


# ---- a second, slow writing of the network, straight from the public names -------------------------------------------


def reference(state: dict[str, Tensor], clip: Tensor, alpha: int, slow: int, fast: int) -> dict[str, Tensor]:
    """Features and levels."""
    ptv = "blocks.6.proj.weight" in state

    def unit(x: Tensor, conv: str, norm: str, stride: tuple[int, int, int] = (1, 1, 1)) -> Tensor:
        weight = state[f"{conv}.weight"]
        x = F.conv3d(x, weight, stride=stride, padding=tuple(k // 2 for k in weight.shape[2:]))
        scale = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + 1e-5)
        shift = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
        return x * scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)

    def part(x: Tensor, path: int, stage: int, i: int, name: str, s: int = 1) -> Tensor:
        if ptv:
            base = f"blocks.{stage}.multipathway_blocks.{path}.res_blocks.{i}."
            base += "branch1_{}" if name == "shortcut" else f"branch2.{{}}_{name}"
            return unit(x, base.format("conv"), base.format("norm"), (1, s, s))
        name = "downsample" if name == "shortcut" else f"conv{'abc'.index(name) + 1}"
        base = f"backbone.{('slow', 'fast')[path]}_path.layer{stage}.{i}.{name}"
        return unit(x, f"{base}.conv", f"{base}.bn", (1, s, s))

    frames = clip.shape[2]
    if ptv:
        chosen = [int(t) for t in np.linspace(0, frames - 1, frames // alpha)]
    else:
        chosen = list(range(0, frames, alpha))
    paths = []
    for path, x in enumerate((clip[:, :, chosen], clip)):
        base = f"blocks.0.multipathway_blocks.{path}" if ptv else f"backbone.{('slow', 'fast')[path]}_path.conv1"
        x = F.relu(unit(x, f"{base}.conv", f"{base}.{'norm' if ptv else 'bn'}", (1, 2, 2)))
        paths.append(F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1)))
    outputs = {}
    for stage in (1, 2, 3, 4):
        if ptv:
            base = f"blocks.{stage - 1}.multipathway_fusion"
            lateral = F.relu(unit(paths[1], f"{base}.conv_fast_to_slow", f"{base}.norm", (alpha, 1, 1)))
        else:
            name = f"layer{stage - 1}_lateral" if stage > 1 else "conv1_lateral"
            weight = state[f"backbone.slow_path.{name}.conv.weight"]
            lateral = F.conv3d(paths[1], weight, stride=(alpha, 1, 1), padding=(weight.shape[2] // 2, 0, 0))
        paths[0] = torch.cat([paths[0], lateral], 1)
        for path, depth in enumerate((slow, fast)):
            x = paths[path]
            for i in range(DEPTHS[depth][stage - 1]):
                s = 2 if stage > 1 and i == 0 else 1
                y = F.relu(part(F.relu(part(x, path, stage, i, "a")), path, stage, i, "b", s))
                y = part(y, path, stage, i, "c")
                x = F.relu(y + (part(x, path, stage, i, "shortcut", s) if i == 0 else x))
            paths[path] = x
        groups = torch.stack([paths[1][:, :, t : t + alpha].mean(2) for t in range(0, frames, alpha)], 2)
        outputs[f"res{stage + 1}"] = torch.cat([paths[0], groups], 1)
    return outputs | {"features": torch.cat([path.mean((2, 3, 4)) for path in paths], 1)}


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "family", "slow", "fast", "fusion_kernel", "temporal", "alpha"),
    [
        ("slowfast-r50-4x16", "pytorchvideo", 50, 50, 5, (6, 6), 8),
        ("slowfast-r50-4x16-mm", "mmaction2", 50, 50, 5, (6, 6), 8),
        pytest.param("slowfast-r101-16x8", "pytorchvideo", 101, 101, 5, (6, 6), 4, marks=pytest.mark.slow),
        ("slowfast-r101-r50-mm", "mmaction2", 101, 50, 5, (23, 6), 8),
    ],
)
def test_variants_are_as_in_the_plain_writing(
    name: str, family: str, slow: int, fast: int, fusion_kernel: int, temporal: tuple[int, int], alpha: int
) -> None:
    state = filled_state(public_shapes(family, slow, fast, fusion_kernel, temporal), 0.85 if slow == 50 else 0.7)
    backbone = load_backbone(state)
    assert backbone.spec == SPECS[name]
    clip = filled_clip((1, 3, 16, 33, 47), seed=1)
    outputs, expected = backbone(clip, levels=True), reference(state, clip, alpha, slow, fast)
    for key, value in outputs.items():
        assert value.shape == expected[key].shape
        assert relative_error(value, expected[key].numpy()) < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("size", [(8, 31, 65), (4, 1, 3), (12, 40, 32)])
def test_any_size_is_as_in_the_plain_writing(
    r50_state: dict[str, Tensor], r50: SlowFast, size: tuple[int, int, int]
) -> None:
    clip = filled_clip((2, 3, *size), seed=2)
    outputs, expected = r50(clip, levels=True), reference(r50_state, clip, 4, 50, 50)
    for key, value in outputs.items():
        assert value.shape == expected[key].shape
        assert relative_error(value, expected[key].numpy()) < 1e-4


# ---- slow frames -----------------------------------------------------------------------------------------------------


def test_slow_frames() -> None:
    """As published: PySlowFast's and pytorchvideo's are spread over the whole clip, mmaction2's start each group."""
    clip = torch.arange(64.0).view(1, 1, 64, 1, 1).expand(1, 3, 64, 1, 1)
    with torch.device("meta"):
        networks = {name: SlowFast(**NETWORKS[name], classes=None) for name in NETWORKS}

    def chosen(name: str, frames: int) -> list[int]:
        return [int(t) for t in networks[name].slow_frames(clip[:, :, :frames])[0, 0, :, 0, 0]]

    assert chosen("slowfast-r50", 32) == [0, 4, 8, 13, 17, 22, 26, 31]
    assert chosen("slowfast-r50-4x16", 32) == [0, 10, 20, 31]
    assert chosen("slowfast-r50-mm", 32) == [0, 4, 8, 12, 16, 20, 24, 28]
    assert chosen("slowfast-r50-4x16-mm", 32) == [0, 8, 16, 24]
    assert chosen("slowfast-r101-16x8", 64) == [0, 4, 8, 12, 16, 21, 25, 29, 33, 37, 42, 46, 50, 54, 58, 63]
    assert chosen("slowfast-r50", 4) == [0]


def test_lengths_that_alpha_does_not_divide_are_refused(r50: SlowFast) -> None:
    with pytest.raises(RecipeError, match="slowfast-r50 takes clips of a multiple of 4 frames, got 30"):
        r50(torch.zeros(1, 3, 30, 32, 32))
    with pytest.raises(RecipeError, match="needs at least 4 frames of 1x1"):
        r50(torch.zeros(1, 3, 3, 32, 32))
    with pytest.raises(RecipeError, match=r"takes clips \(B, 3, T, H, W\)"):
        r50(torch.zeros(1, 2, 32, 32, 32))


# ---- files -----------------------------------------------------------------------------------------------------------


def test_files_that_do_not_fit_say_why(r50_state: dict[str, Tensor]) -> None:
    def without(part: str) -> dict[str, Tensor]:
        return {key: value for key, value in r50_state.items() if part not in key}

    fusion = "blocks.2.multipathway_fusion"
    with pytest.raises(WeightsError, match=r"4 tensors missing: laterals\.2\.bn\.weight"):
        load_backbone(without(f"{fusion}.norm"))
    with pytest.raises(WeightsError, match=r"1 tensors missing: fast\.res4\.2\.c\.bn\.running_var"):
        load_backbone(without("blocks.3.multipathway_blocks.1.res_blocks.2.branch2.norm_c.running_var"))
    with pytest.raises(WeightsError, match=r"slow\.res5\.1\.a\.conv\.weight is missing"):
        load_backbone(without("blocks.4.multipathway_blocks.0.res_blocks.1.branch2.conv_a"))
    with pytest.raises(WeightsError, match=r"laterals\.0\.conv\.weight is missing"):
        load_backbone(without("blocks.0.multipathway_fusion"))
    with pytest.raises(WeightsError, match=r"1 tensors unexpected: blocks\.5\.extra\.weight"):
        load_backbone(r50_state | {"blocks.5.extra.weight": torch.zeros(3)})
    with pytest.raises(WeightsError, match=r"slow_depths is \(3, 4, 5, 3\) in the file and \(3, 4, 6, 3\) in slowfast"):
        load_backbone(without("blocks.3.multipathway_blocks.0.res_blocks.5."))
    other = torch.zeros(128, 64, 5, 1, 1)
    with pytest.raises(
        WeightsError, match=r"laterals\.2\.conv\.weight is \[128, 64, 5, 1, 1\], the network has \[128, "
    ):
        load_backbone(r50_state | {f"{fusion}.conv_fast_to_slow.weight": other})
    with pytest.raises(WeightsError, match=r"holds slowfast-r50, not slowfast-r50-4x16 \(fusion_kernel is 7 .* and 5"):
        build_backbone("slowfast-r50-4x16", r50_state)
    with pytest.raises(
        WeightsError, match=r"looks like a file of pytorchvideo SlowFast and holds slowfast-r50, not i3d"
    ):
        build_backbone("i3d-rgb", r50_state)
    with pytest.raises(WeightsError, match=r"holds slowfast-r50, not slowfast-r50-mm"):
        build_backbone("slowfast-r50-mm", r50_state)
    bare = load_backbone(without("blocks.6.proj"))
    assert bare.spec == SPECS["slowfast-r50"]
    with pytest.raises(RecipeError, match="slowfast-r50 has no classifier"):
        bare.classify(torch.zeros(1, 2304))


def test_our_own_file_says_what_shapes_do_not(r50: SlowFast) -> None:
    """Such as a network of another alpha than the public one of its shapes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SlowFast(fusion_kernel=5, alpha=2, frames=16, classes=None)
    assert network.spec.name == "slowfast"
    with pytest.raises(WeightsError, match="alpha is 2 in the file and 8 in slowfast-r50-4x16"):
        load_backbone(network.state_dict())
    own = r50.state_dict()
    with pytest.raises(WeightsError, match="settings is"):
        load_backbone(own | {"settings": torch.tensor([3, 4, 32])})
    again = load_backbone(own)
    assert again.spec == r50.spec
    assert all(torch.equal(value, own[key]) for key, value in again.state_dict().items())


# ---- behaviour -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "backbone", "classified"),
    [
        ("slowfast-r50", 33_644_488, 34_566_488),
        ("slowfast-r50-4x16", 33_558_216, 34_480_216),
        ("slowfast-r101", 61_904_968, 62_826_968),
        ("slowfast-r101-16x8", 52_852_808, 53_774_808),
        ("slowfast-r50-mm", 33_643_560, 34_565_560),
        ("slowfast-r101-mm", 61_990_312, 62_912_312),
        ("slowfast-r101-r50-mm", 61_462_312, 62_384_312),
    ],
)
def test_parameter_counts(name: str, backbone: int, classified: int) -> None:
    with torch.device("meta"):
        for classes, expected in ((None, backbone), (400, classified)):
            network = SlowFast(**NETWORKS[name], classes=classes)
            assert sum(p.numel() for p in network.parameters()) == expected
            assert network.spec == SPECS[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_spec(name: str) -> None:
    spec = SPECS[name]
    assert spec.name == name
    assert (spec.frames, spec.interval) == (64 if "16x8" in name else 32, 2)
    alpha = 8 if "4x16" in name or name == "slowfast-r101-r50-mm" else 4
    plan = SnippetPlan(spec.window, spec.interval, spec.stride)
    for level, info in spec.levels.items():
        assert info.stride == alpha
        plan.check_level(level, info.stride)
    assert (spec.fps, spec.grid_fps) == ((None, None) if name.endswith("-mm") else (30.0, 30.0))
    assert spec.mean[0] == (123.675 if name.endswith("-mm") else 0.45)


@torch.inference_mode()
def test_classifier_of_mmaction2_reads_fast_then_slow() -> None:
    features = torch.cat([torch.full((1, 2048), 2.0), torch.full((1, 256), 5.0)], 1)
    network = SlowFast(source="mmaction2", classes=1, dropout=1.0).eval()
    assert network.projection is not None
    network.projection.weight.copy_(torch.cat([torch.ones(1, 256), torch.zeros(1, 2048)], 1))
    network.projection.bias.zero_()
    assert float(network.classify(features)) == 256 * 5.0
    network.train()
    assert float(network.classify(features)) == 0.0  # everything is dropped


@torch.inference_mode()
def test_fused_is_the_same_to_rounding(r50: SlowFast) -> None:
    clip = filled_clip((1, 3, 8, 64, 80), seed=4)
    fused = copy.deepcopy(r50).fuse()
    assert not any(isinstance(module, torch.nn.BatchNorm3d) for module in fused.modules())
    expected = r50(clip, levels=True)
    assert all(relative_error(value, expected[key].numpy()) < 1e-4 for key, value in fused(clip, levels=True).items())


@torch.inference_mode()
def test_a_batch_is_its_clips_one_by_one(r50: SlowFast) -> None:
    clips = filled_clip((3, 3, 8, 40, 32), seed=5)
    view = clips.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)  # as extraction hands it over
    before = view.clone()
    together = r50(view)["features"]
    assert torch.equal(view, before)
    for row in range(3):
        assert relative_error(together[row], r50(clips[row : row + 1])["features"][0].numpy()) < 3e-5
    assert r50(clips[:0], levels=True)["res5"].shape == (0, 2304, 2, 2, 1)


def test_gradients_reach_every_parameter_in_training() -> None:
    backbone = build_backbone("slowfast-r50-mm", "random").train()
    outputs = backbone(filled_clip((2, 3, 8, 64, 64)), levels=True)
    (backbone.classify(outputs["features"]).square().mean() + outputs["res3"].mean()).backward()
    gradients = [p.grad for p in backbone.parameters()]
    assert all(g is not None and torch.isfinite(g).all() and float(g.abs().max()) > 0 for g in gradients)


@torch.inference_mode()
def test_random_weights_keep_the_signal_alive() -> None:
    features = build_backbone("slowfast-r101", "random:1")(filled_clip((2, 3, 8, 64, 64)))["features"]
    assert 0.02 < float(features.std()) < 50
    assert float((features[0] - features[1]).abs().max()) > 1e-2
