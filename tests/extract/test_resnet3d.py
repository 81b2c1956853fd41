"""Slow, I3D-R50 and C2D-R50 against recorded outputs of the public implementations and a plain second writing."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tad.errors import RecipeError, WeightsError
from tad.extract.backbones import BACKBONES, SPECS, build_backbone, load_backbone
from tad.extract.backbones.resnet3d import C2D, I3D, NETWORKS, SLOW, ResNet3D
from tad.extract.snippets import SnippetPlan
from tad.extract.weights import family_of
from tests.extract.filler import filled_clip, filled_state, golden, relative_error, state_sha256

# Golden file → our name, what the public file wraps the state dict in, endpoints of our levels.
GOLDEN: dict[str, tuple[str, str, tuple[str, str, str]]] = {
    "ptv_slow_8x8_r50": ("slow-r50", "model_state", ("block2", "block3", "block4")),
    "pysf_slow_8x8_r50": ("slow-r50", "model_state", ("s3_p0", "s4_p0", "s5_p0")),
    "ptv_i3d_8x8_r50": ("i3d-r50", "model_state", ("block3", "block4", "")),
    "pysf_i3d_8x8_r50": ("i3d-r50", "model_state", ("s3_p0", "s4_p0", "s5_p0")),
    "ptv_c2d_8x8_r50": ("c2d-r50", "model_state", ("block3", "block4", "")),
    "mma_slowonly_r50_8x8": ("slowonly-r50", "state_dict", ("layer2", "layer3", "layer4")),
    "mma_i3d_r50_32x2": ("i3d-r50-mm", "state_dict", ("layer2", "layer3", "layer4")),
}
TAGS = {"A": "", "A_rect": "_rect", "A_nat": "_nat"}
LEVELS = ("res3", "res4", "res5")


def pytorchvideo_shapes(kernels: Any, stem: int, stages: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The public key table, written down from the published architecture."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(key: str, norm: str, *shape: int) -> None:
        shapes[f"{key}.weight"] = shape
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{part}"] = shape[:1]
        shapes[f"{norm}.num_batches_tracked"] = ()

    conv("blocks.0.conv", "blocks.0.norm", 64, 3, stem, 7, 7)
    width = 64
    for number, stage, inner in zip(stages, kernels, (64, 128, 256, 512), strict=True):
        for i, kernel in enumerate(stage):
            block = f"blocks.{number}.res_blocks.{i}"
            if i == 0:
                conv(f"{block}.branch1_conv", f"{block}.branch1_norm", 4 * inner, width, 1, 1, 1)
            conv(f"{block}.branch2.conv_a", f"{block}.branch2.norm_a", inner, width, kernel, 1, 1)
            conv(f"{block}.branch2.conv_b", f"{block}.branch2.norm_b", inner, inner, 1, 3, 3)
            conv(f"{block}.branch2.conv_c", f"{block}.branch2.norm_c", 4 * inner, inner, 1, 1, 1)
            width = 4 * inner
    shapes[f"blocks.{stages[-1] + 1}.proj.weight"] = (400, 2048)
    shapes[f"blocks.{stages[-1] + 1}.proj.bias"] = (400,)
    return shapes


PLAIN, POOLED = (1, 2, 3, 4), (1, 3, 4, 5)


@pytest.fixture(scope="module", params=GOLDEN)
def loaded(
    request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ResNet3D, str, dict[str, Any], dict[str, np.ndarray]]:
    """The golden weights under the public key names, through a file and the real loading path."""
    record, arrays = golden(shared, request.param)
    state = filled_state(record["keys"], record["gain"])
    assert state_sha256(state) == record["filled_state_sha256"]
    path = tmp_path_factory.mktemp("weights") / f"{request.param}.pth"
    torch.save({GOLDEN[request.param][1]: state, "epoch": 196}, path)
    backbone = load_backbone(path)
    path.unlink()
    assert isinstance(backbone, ResNet3D)
    return backbone, request.param, record, arrays


@pytest.fixture(scope="module")
def slow_state() -> dict[str, Tensor]:
    """slow-r50's filled weights under pytorchvideo's names, without the shared folder."""
    return filled_state(pytorchvideo_shapes(SLOW, 1, PLAIN), 0.85)


@pytest.fixture(scope="module")
def slow(slow_state: dict[str, Tensor]) -> ResNet3D:
    backbone = load_backbone(slow_state)
    assert isinstance(backbone, ResNet3D)
    return backbone


@pytest.fixture(scope="module")
def c2d_state() -> dict[str, Tensor]:
    return filled_state(pytorchvideo_shapes(C2D, 1, POOLED), 0.85)


def check_golden(loaded: tuple[ResNet3D, str, dict[str, Any], dict[str, np.ndarray]], tag: str) -> dict[str, Tensor]:
    backbone, name, record, arrays = loaded
    assert backbone.spec.name == GOLDEN[name][0]
    suffix = TAGS[tag]
    clip = filled_clip(record["inputs"][tag]["shape"], record["inputs"][tag]["seed"])
    outputs = backbone(clip, levels=True)
    assert relative_error(outputs["features"][0], arrays[f"feature{suffix}"]) < 1e-4
    assert list(outputs) == ["features", *LEVELS]
    assert list(backbone.spec.levels) == list(LEVELS)
    for level, endpoint in zip(LEVELS, GOLDEN[name][2], strict=True):
        map_ = outputs[level][0]
        assert map_.shape[0] == backbone.spec.levels[level].channels
        assert map_.shape[1] == clip.shape[2] // backbone.spec.levels[level].stride
        if not endpoint:  # the last map's mean is the feature
            assert torch.equal(outputs["features"][0], map_.mean((1, 2, 3)))
            continue
        std = float(arrays[f"{endpoint}{suffix}__stats"][1])
        assert [1, *map_.shape] == arrays[f"{endpoint}{suffix}__shape"].tolist()
        assert relative_error(map_.mean((1, 2, 3)), arrays[f"{endpoint}{suffix}__gap"]) < 1e-4
        for part, ours in (("slice0", map_[:16, 0, :3, :3]), ("slice", map_[:16, -1, -3:, -3:])):
            assert float(np.abs(ours.numpy() - arrays[f"{endpoint}{suffix}__{part}"]).max() / std) < 1e-4
        stats = torch.stack([map_.mean(), map_.std(correction=0), map_.abs().max()])
        assert float(np.abs(stats.numpy() - arrays[f"{endpoint}{suffix}__stats"]).max() / std) < 1e-4
    return outputs


@torch.inference_mode()
@pytest.mark.parametrize("tag", ["A", "A_rect"])
def test_features_and_levels_are_those_of_the_public_code(
    loaded: tuple[ResNet3D, str, dict[str, Any], dict[str, np.ndarray]], tag: str
) -> None:
    check_golden(loaded, tag)


@pytest.mark.slow
@torch.inference_mode()
def test_logits_are_those_of_the_public_code(
    loaded: tuple[ResNet3D, str, dict[str, Any], dict[str, np.ndarray]],
) -> None:
    outputs = check_golden(loaded, "A_nat")
    backbone, _, _, arrays = loaded
    assert relative_error(backbone.classify(outputs["features"])[0], arrays["logits_nat"].reshape(-1)) < 1e-4


@torch.inference_mode()
def test_golden_features_without_the_shared_folder(slow_state: dict[str, Tensor], slow: ResNet3D) -> None:
    assert state_sha256(slow_state) == "1757446e552c8bf8533a27a3f5f7c176dd7d2526aef254567629fdace7740e14"
    features = slow(filled_clip((1, 3, 8, 112, 112)))["features"][0]
    first = [4.006194, 2.287284, 43.605579, 0.221571, 1.307666, 2.479974]
    last = [133.918030, 4.925234, 98.942505, 11.374143]
    assert np.allclose(features[:6], first, rtol=0, atol=1e-4 * 45.15)
    assert np.allclose(features[-4:], last, rtol=0, atol=1e-4 * 45.15)
    assert abs(float(features.std(correction=0)) - 45.15385) < 0.01


# ---- a second, slow writing of the networks, straight from our state dict --------------------------------------------


def reference(state: dict[str, Tensor], clip: Tensor, *, strided: bool, pool: bool) -> dict[str, Tensor]:
    """``res3``, ``res4``, ``res5``"""

    def unit(x: Tensor, name: str, stride: tuple[int, int, int] = (1, 1, 1)) -> Tensor:
        weight = state[f"{name}.conv.weight"]
        padding = tuple(k // 2 for k in weight.shape[2:])
        x = F.conv3d(x, weight, stride=stride, padding=padding)
        scale = state[f"{name}.bn.weight"] / torch.sqrt(state[f"{name}.bn.running_var"] + 1e-5)
        shift = state[f"{name}.bn.bias"] - state[f"{name}.bn.running_mean"] * scale
        return x * scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)

    step = 2 if strided else 1
    x = F.relu(unit(clip, "path.stem", (step, 2, 2)))
    x = F.max_pool3d(x, (1, 3, 3), (step, 2, 2), (0, 1, 1))
    maps = {}
    for stage, depth in (("res2", 3), ("res3", 4), ("res4", 6), ("res5", 3)):
        for i in range(depth):
            name, s = f"path.{stage}.{i}", 2 if stage != "res2" and i == 0 else 1
            y = F.relu(unit(x, f"{name}.a"))
            y = unit(F.relu(unit(y, f"{name}.b", (1, s, s))), f"{name}.c")
            x = F.relu(y + (unit(x, f"{name}.shortcut", (1, s, s)) if i == 0 else x))
        if stage == "res2" and pool:
            x = F.max_pool3d(x, (2, 1, 1), (2, 1, 1))
        maps[stage] = x
    return maps


@torch.inference_mode()
@pytest.mark.parametrize("name", ["slow-r50", "i3d-r50-mm", "c2d-r50"])
def test_any_size_is_as_in_the_plain_writing(name: str) -> None:
    backbone = build_backbone(name, "random:3")
    state = backbone.state_dict()
    for key in state:  # batch norms that do something
        if key.endswith(("bn.running_mean", "bn.bias", "bn.running_var", "bn.weight")):
            state[key] = filled_state({key: state[key].shape})[key]
    backbone.load_state_dict(state)
    strided, pool = name == "i3d-r50-mm", name not in ("slow-r50", "slowonly-r50")
    for size in [(9, 33, 47), (1, 16, 1)]:
        clip = filled_clip((2, 3, *size), seed=1)
        if size[0] < backbone.spec.min_frames:
            with pytest.raises(RecipeError, match=f"needs at least {backbone.spec.min_frames} frames of 1x1"):
                backbone(clip)
            continue
        outputs, expected = backbone(clip, levels=True), reference(state, clip, strided=strided, pool=pool)
        assert relative_error(outputs["features"], expected["res5"].mean((2, 3, 4)).numpy()) < 1e-4
        for level in LEVELS:
            assert outputs[level].shape == expected[level].shape
            assert relative_error(outputs[level], expected[level].numpy()) < 1e-4


@torch.inference_mode()
def test_min_frames_are_the_least_that_run() -> None:
    for name, least in (("i3d-r50", 2), ("i3d-r50-mm", 5)):
        backbone = build_backbone(name, "random")
        assert backbone.spec.min_frames == least
        assert torch.isfinite(backbone(filled_clip((1, 3, least, 32, 32)))["features"]).all()
        assert backbone(filled_clip((0, 3, 8, 32, 32)))["features"].shape == (0, 2048)


# ---- C2D's two kinds -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_c2d_with_and_without_pooling(c2d_state: dict[str, Tensor]) -> None:
    clip = filled_clip((1, 3, 8, 48, 48), seed=2)
    pool = load_backbone(c2d_state)
    assert (pool.spec.name, pool.variant, pool.spec.levels["res5"].stride) == ("c2d-r50", "pool", 2)
    nopool = load_backbone(c2d_state, port="nopool")
    assert (nopool.spec.name, nopool.variant, nopool.spec.levels["res5"].stride) == ("c2d-r50", "nopool", 1)
    assert relative_error(nopool(clip)["features"], pool(clip)["features"].numpy()) > 1e-2
    # without pooling and kernels in time, a clip's feature is the mean of its frames'
    frames = torch.cat([nopool(clip[:, :, t : t + 1])["features"] for t in range(8)])
    assert relative_error(nopool(clip)["features"][0], frames.mean(0).numpy()) < 1e-5
    # pytorchvideo numbers the pooling among its blocks: a file without it does not pool
    moved = {
        re.sub(r"^blocks\.([3-6])", lambda m: f"blocks.{int(m[1]) - 1}", key): value for key, value in c2d_state.items()
    }
    assert load_backbone(moved).variant == "nopool"
    # our own file says which it was, a port that is asked for wins
    own = load_backbone(nopool.state_dict())
    assert (own.variant, own.spec) == ("nopool", nopool.spec)
    assert torch.equal(own(clip)["features"], nopool(clip)["features"])
    other = load_backbone(nopool.state_dict(), port="pool")
    assert (other.variant, other.state_dict()["settings"].tolist()) == ("pool", [0, 0])
    with pytest.raises(RecipeError, match="slow-r50 has no port 'pool'"):
        build_backbone("slow-r50", port="pool")


# ---- files -----------------------------------------------------------------------------------------------------------


def test_prefixes_of_wrappers_do_not_count(slow_state: dict[str, Tensor], slow: ResNet3D) -> None:
    wrapped = {f"module.model.{key}": value for key, value in slow_state.items()}
    backbone = load_backbone({"model_state": wrapped})  # type: ignore[dict-item]
    assert backbone.spec.name == "slow-r50"
    assert all(torch.equal(value, backbone.state_dict()[key]) for key, value in slow.state_dict().items())


def test_files_that_do_not_fit_say_why(slow_state: dict[str, Tensor], c2d_state: dict[str, Tensor]) -> None:
    def without(part: str) -> dict[str, Tensor]:
        return {key: value for key, value in slow_state.items() if part not in key}

    with pytest.raises(WeightsError, match=r"1 tensors missing: path\.res4\.2\.b\.bn\.running_var"):
        load_backbone(without("blocks.3.res_blocks.2.branch2.norm_b.running_var"))
    with pytest.raises(WeightsError, match=r"path\.res5\.0\.a\.conv\.weight is missing"):
        load_backbone(without("blocks.4.res_blocks.0.branch2.conv_a.weight"))
    with pytest.raises(WeightsError, match="of no network that tad knows"):
        load_backbone(without("blocks.0.conv.weight"))
    with pytest.raises(WeightsError, match=r"1 tensors missing: projection\.bias"):
        load_backbone(without("blocks.5.proj.bias"))
    with pytest.raises(WeightsError, match=r"1 tensors unexpected: blocks\.3\.res_blocks\.2\.branch2\.se\.weight"):
        load_backbone(slow_state | {"blocks.3.res_blocks.2.branch2.se.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"kernels is \(\(1, 1, 1\), \(1, 1, 1, 1\), \(3, 3, 3, 3, 3\), .* in slow-"):
        load_backbone(without("blocks.3.res_blocks.5."))
    with pytest.raises(WeightsError, match=r"pytorchvideo ResNet .* holds c2d-r50, not i3d-r50 .*stem_kernel is 1"):
        build_backbone("i3d-r50", c2d_state)
    with pytest.raises(WeightsError, match=r"holds slow-r50, not slowonly-r50"):
        build_backbone("slowonly-r50", slow_state)
    with pytest.raises(WeightsError, match=r"path\.res2\.0\.a\.conv\.weight is \[64, 64, 1, 1, 2\], the network has"):
        load_backbone(slow_state | {"blocks.1.res_blocks.0.branch2.conv_a.weight": torch.zeros(64, 64, 1, 1, 2)})
    assert load_backbone(without("proj")).spec == SPECS["slow-r50"]
    with pytest.raises(RecipeError, match="slow-r50 has no classifier"):
        load_backbone(without("proj")).classify(torch.zeros(1, 2048))


@pytest.mark.parametrize("name", ["mma_tsn_r50", "ptv_ircsn_r101_32x2"])
def test_networks_of_pictures_and_csn_are_not_ours(shared: Path, name: str) -> None:
    """They share families with ours: reading their shapes must neither fit nor raise."""
    record, _ = golden(shared, name)
    state = {key: torch.zeros(()).expand(shape) for key, shape in record["keys"].items()}
    entries = [BACKBONES[ours] for ours in NETWORKS]
    read = [
        (entry.arguments, layout.arguments(state))
        for entry in entries
        for layout in entry.layouts
        if layout.family == family_of(state.keys())
    ]
    assert len(read) >= 2
    for fixed, arguments in read:
        assert any(arguments.get(key) != value for key, value in fixed.items())


@pytest.fixture(scope="module")
def own_state() -> dict[str, Tensor]:
    return build_backbone("slow-r50").state_dict()


@pytest.mark.parametrize("settings", [[2, 0], [0, 2], [-1, 0], [0], [0.5, 0]])
def test_our_own_file_with_other_settings(own_state: dict[str, Tensor], settings: list[float]) -> None:
    with pytest.raises(WeightsError, match="settings is"):
        load_backbone(own_state | {"settings": torch.tensor(settings)})
    with pytest.raises(WeightsError, match="settings is missing"):
        load_backbone({key: value for key, value in own_state.items() if key != "settings"})


# ---- behaviour -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "backbone", "classified"),
    [
        ("slow-r50", 31_634_496, 32_454_096),
        ("i3d-r50", 27_223_872, 28_043_472),
        ("c2d-r50", 23_508_032, 24_327_632),
        ("slowonly-r50", 31_634_496, 32_454_096),
        ("i3d-r50-mm", 27_223_872, 28_043_472),
    ],
)
def test_parameter_counts(name: str, backbone: int, classified: int) -> None:
    with torch.device("meta"):
        for classes, expected in ((None, backbone), (400, classified)):
            network = ResNet3D(**NETWORKS[name], classes=classes)
            assert sum(p.numel() for p in network.parameters()) == expected
            assert network.spec == SPECS[name]


def test_kernels_of_the_tables() -> None:
    assert (SLOW[0], SLOW[2], [len(stage) for stage in C2D]) == ((1, 1, 1), (3,) * 6, [3, 4, 6, 3])
    assert I3D == ((3, 3, 3), (3, 1, 3, 1), (3, 1, 3, 1, 3, 1), (1, 3, 1))


@pytest.mark.parametrize("name", NETWORKS)
def test_spec(name: str) -> None:
    spec = SPECS[name]
    assert spec.name == name
    assert (spec.frames, spec.interval) == ((32, 2) if name == "i3d-r50-mm" else (8, 8))
    plan = SnippetPlan(spec.window, spec.interval, spec.stride)
    for level, info in spec.levels.items():
        plan.check_level(level, info.stride)
    mm = name in ("slowonly-r50", "i3d-r50-mm")
    assert (spec.fps, spec.grid_fps) == ((None, None) if mm else (30.0, 30.0))


def test_pixels_are_normalised_as_the_code_bases_do() -> None:
    clips = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 1, 3, 1, 1).expand(1, 3, 3, 1, 1)
    with torch.device("cpu"):
        ptv, mm = build_backbone("slow-r50").normalise(clips), build_backbone("slowonly-r50").normalise(clips)
    assert torch.allclose(ptv[0, 1, :, 0, 0], torch.tensor([-2.0, (128 / 255 - 0.45) / 0.225, 0.55 / 0.225]), atol=1e-6)
    assert torch.allclose(mm[0, :, 0, 0, 0], -torch.tensor([123.675 / 58.395, 116.28 / 57.12, 103.53 / 57.375]))
    assert torch.allclose(mm[0, 2, 2, 0, 0], torch.tensor((255 - 103.53) / 57.375))


@torch.inference_mode()
def test_fused_is_the_same_to_rounding(slow: ResNet3D) -> None:
    clip = filled_clip((1, 3, 8, 64, 80), seed=4)
    fused = copy.deepcopy(slow).fuse()
    assert not any(isinstance(module, torch.nn.BatchNorm3d) for module in fused.modules())
    expected = slow(clip, levels=True)
    assert all(relative_error(value, expected[key].numpy()) < 1e-4 for key, value in fused(clip, levels=True).items())


@torch.inference_mode()
def test_a_batch_is_its_clips_one_by_one(slow: ResNet3D) -> None:
    clips = filled_clip((3, 3, 6, 40, 32), seed=5)
    view = clips.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)  # as extraction hands it over
    before = view.clone()
    together = slow(view)["features"]
    assert torch.equal(view, before)
    for row in range(3):
        assert relative_error(together[row], slow(clips[row : row + 1])["features"][0].numpy()) < 3e-5


def test_gradients_reach_every_parameter_in_training() -> None:
    backbone = build_backbone("i3d-r50", "random").train()
    outputs = backbone(filled_clip((2, 3, 4, 32, 32)), levels=True)
    (backbone.classify(outputs["features"]).square().mean() + outputs["res3"].mean()).backward()
    gradients = [p.grad for p in backbone.parameters()]
    assert all(g is not None and torch.isfinite(g).all() and float(g.abs().max()) > 0 for g in gradients)


def test_classifier_drops_out_in_training_only() -> None:
    backbone = build_backbone("c2d-r50", "random")
    features = torch.ones(1, 2048)
    assert torch.equal(backbone.classify(features), backbone.classify(features))
    backbone.train()
    assert not torch.equal(backbone.classify(features), backbone.classify(features))


def test_wrong_uses_say_so(slow: ResNet3D) -> None:
    with pytest.raises(RecipeError, match=r"no recipe of 'mmaction'.*Did you mean 'mmaction2'"):
        ResNet3D(source="mmaction")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"no port 'nopol'.*Did you mean 'nopool'"):
        ResNet3D(port="nopol")
    with pytest.raises(RecipeError, match=r"slow-r50 takes clips \(B, 3, T, H, W\)"):
        slow(torch.zeros(1, 2, 8, 32, 32))
    with torch.device("meta"):
        assert ResNet3D(kernels=((3,),) * 4, classes=None).spec.name == "resnet3d"
