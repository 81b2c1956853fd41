"""CSN against recorded outputs of the public implementations, and against a plain second writing of the network."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tad.errors import RecipeError, WeightsError
from tad.extract.backbones import BACKBONES, SPECS, build_backbone, load_backbone
from tad.extract.backbones.csn import CSN, Bottleneck
from tad.extract.backbones.layers import ConvNorm
from tad.extract.backbones.residual import R50, R101, R152, Pointwise
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
    tensors_of,
)  # fmt: skip

GOLDEN = {
    "mma_ircsn_r50": "ircsn-50",
    "mma_ipcsn_r152": "ipcsn-152",
    "vmz_ir_csn_152": "ircsn-152",
    "ptv_ircsn_r101_32x2": "ircsn-101",
    "mma_ircsn_r152": "ircsn-152",
    "vmz_ip_csn_152": "ipcsn-152",
}
SLOW = ("mma_ircsn_r152", "vmz_ip_csn_152")  # the same networks under other names: their keys are checked by default
EPS = {"mma": 1e-3, "vmz": 1e-3, "ptv": 1e-5}
TAGS = ("A", "A_rect", pytest.param("A_nat", marks=pytest.mark.slow))

# Of golden/backbones, mma_ircsn_r50: SHA-256 of the filled weights, and the first features of A and A_rect.
FILLED = "e4eebbde3290c88f2c203f7e2d00bd98b6041f372e0adcf38061ec63f5c3c8e3"


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in GOLDEN]
)
def loaded(request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return loaded_golden(shared, request.param, tmp_path_factory.mktemp("weights"))


def mmaction2_shapes(depths: tuple[int, ...], classes: int = 400) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of an ir-CSN as mmaction2 writes them, from the tables of the paper."""
    shapes: dict[str, tuple[int, ...]] = {}

    def unit(name: str, *shape: int) -> None:
        shapes[f"{name}.conv.weight"] = shape
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = shape[:1]
        shapes[f"{name}.bn.num_batches_tracked"] = ()

    unit("backbone.conv1", 64, 3, 3, 7, 7)
    width = 64
    for stage, depth in enumerate(depths, start=1):
        mid = 32 * 2**stage
        for block in range(depth):
            name = f"backbone.layer{stage}.{block}"
            unit(f"{name}.conv1", mid, width, 1, 1, 1)
            unit(f"{name}.conv2.0", mid, 1, 3, 3, 3)
            unit(f"{name}.conv3", 4 * mid, mid, 1, 1, 1)
            if block == 0:
                unit(f"{name}.downsample", 4 * mid, width, 1, 1, 1)
            width = 4 * mid
    return {**shapes, "cls_head.fc_cls.weight": (classes, width), "cls_head.fc_cls.bias": (classes,)}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """The filled weights of ircsn-50 under mmaction2's names, without the shared folder."""
    return filled_state(mmaction2_shapes(R50), 0.85)


@pytest.fixture(scope="module")
def filled(state: dict[str, Tensor]) -> CSN:
    backbone = load_backbone(state)
    assert isinstance(backbone, CSN)
    return backbone


# ---- against recorded outputs ----------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("tag", TAGS)
def test_features_levels_and_logits_are_those_of_the_public_code(loaded: Loaded, tag: str) -> None:
    backbone, record, arrays = loaded
    assert backbone.spec.name == GOLDEN[record["model"]]
    stage = "block{}" if record["model"].startswith("ptv") else "layer{}"
    outputs = check_outputs(loaded, tag, {f"s{2**n}": stage.format(n + 1) for n in (1, 2, 3)})
    if tag == "A_nat":
        assert error(backbone.classify(outputs["features"])[0], arrays["logits_nat"].reshape(-1)) < 1e-4


@torch.inference_mode()
def test_fused_is_the_same_to_rounding(loaded: Loaded) -> None:
    backbone, record, arrays = loaded
    fused = copy.deepcopy(backbone)
    assert fused.fuse() is fused
    assert not any(isinstance(module, torch.nn.BatchNorm3d) for module in fused.modules())
    assert error(fused(golden_clip(record))["features"][0], arrays["feature"]) < 1e-4


def test_batch_norms_have_the_epsilon_of_their_code(loaded: Loaded) -> None:
    backbone, record, _ = loaded
    found = {module.eps for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm3d)}
    assert found == {EPS[record["model"][:3]]}
    assert sum(value.numel() for value in backbone.parameters()) == record["n_params"]


@pytest.mark.parametrize("name", GOLDEN)
def test_every_public_key_lands(shared: Path, name: str) -> None:
    check_keys_land(golden(shared, name)[0]["keys"], GOLDEN[name], ("", "model.", "module."))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("shape", "first"),
    [
        ((1, 3, 16, 112, 112), [41.868053, 0.641423, 78.302719, 20.845612, 58.446327, 35.804527, 30.765129, 6.441648]),
        ((1, 3, 11, 128, 160), [44.060295, 0.000000, 48.607536, 20.232273, 54.671680, 33.194897, 37.275345, 9.746591]),
    ],
)
def test_golden_features_without_the_shared_folder(
    filled: CSN, state: dict[str, Tensor], shape: tuple[int, ...], first: list[float]
) -> None:
    assert state_sha256(state) == FILLED
    features = filled(filled_clip(shape))["features"][0]
    assert np.allclose(features[: len(first)], first, rtol=0, atol=1e-4 * float(features.std()))


@pytest.mark.parametrize(
    ("name", "plain"),
    [("ircsn-152", 28_883_968), ("ipcsn-152", 32_196_992), ("ircsn-50", 12_311_552), ("ircsn-101", 21_394_176)],
)
def test_parameter_counts(name: str, plain: int) -> None:
    check_parameters(name, plain)


# ---- against a plain writing -----------------------------------------------------------------------------------------


def reference_block(state: Mapping[str, Tensor], x: Tensor, name: str, stride: int, eps: float) -> Tensor:
    y = torch.relu(norm(state, conv(state, x, f"{name}.conv1.conv"), f"{name}.conv1.bn", eps))
    middle = f"{name}.conv2.0"
    if f"{name}.conv2.1.conv.weight" in state:  # ip: no ReLU before the channel-wise convolution
        y, middle = norm(state, conv(state, y, f"{middle}.conv"), f"{middle}.bn", eps), f"{name}.conv2.1"
    y = torch.relu(norm(state, conv(state, y, f"{middle}.conv", stride), f"{middle}.bn", eps))
    y = norm(state, conv(state, y, f"{name}.conv3.conv"), f"{name}.conv3.bn", eps)
    if f"{name}.downsample.conv.weight" in state:
        x = norm(state, conv(state, x, f"{name}.downsample.conv", stride), f"{name}.downsample.bn", eps)
    return torch.relu(y + x)


def reference(state: Mapping[str, Tensor], clip: Tensor, eps: float = 1e-3) -> list[Tensor]:
    """Outputs of the last three stages."""
    x = torch.relu(norm(state, conv(state, clip, "backbone.conv1.conv", (1, 2, 2)), "backbone.conv1.bn", eps))
    x = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    maps = []
    for stage, depth in enumerate(R50, start=1):
        for block in range(depth):
            stride = 2 if stage > 1 and block == 0 else 1
            x = reference_block(state, x, f"backbone.layer{stage}.{block}", stride, eps)
        maps.append(x)
    return maps[1:]


@torch.inference_mode()
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 33, 47), (9, 40, 17), (2, 2, 70), (17, 31, 32)], ids=str)
def test_any_size_is_as_in_the_plain_writing(filled: CSN, state: dict[str, Tensor], size: tuple[int, int, int]) -> None:
    clip = filled_clip((2, 3, *size), seed=1)
    outputs = filled(clip, levels=True)
    maps = reference(state, clip)
    for level, expected in zip(("s2", "s4", "s8"), maps, strict=True):
        assert outputs[level].shape == expected.shape
        assert error(outputs[level], expected) < 1e-4
        factors = {"s2": (2, 8, 8), "s4": (4, 16, 16), "s8": (8, 32, 32)}[level]
        assert tuple(expected.shape[2:]) == tuple(-(-n // f) for n, f in zip(size, factors, strict=True))
    assert error(outputs["features"], maps[-1].mean((2, 3, 4))) < 1e-4


@torch.inference_mode()
def test_rectangular_frames_of_full_size(filled: CSN, state: dict[str, Tensor]) -> None:
    clip = filled_clip((1, 3, 2, 256, 320), seed=2)
    assert error(filled(clip)["features"], reference(state, clip)[-1].mean((2, 3, 4))) < 1e-4


def test_gradients_are_those_of_the_plain_writing(filled: CSN, state: dict[str, Tensor]) -> None:
    clip = filled_clip((1, 3, 5, 33, 18), seed=2)
    ours, plain = clip.clone().requires_grad_(), clip.clone().requires_grad_()
    filled(ours)["features"].square().sum().backward()
    reference(state, plain)[-1].mean((2, 3, 4)).square().sum().backward()
    assert ours.grad is not None
    assert plain.grad is not None
    assert error(ours.grad, plain.grad) < 1e-3
    filled.zero_grad()


@torch.inference_mode()
@pytest.mark.parametrize("stride", [1, 2])
def test_interaction_preserved_mixes_channels_without_a_relu(stride: int) -> None:
    block = Bottleneck(32, 16, stride=stride, interaction="preserved", eps=1e-3).eval()
    own = filled_state({key: value.shape for key, value in block.state_dict().items()})
    block.load_state_dict(own)
    names = {"mix.": "conv2.0.", "conv2.": "conv2.1.", "shortcut.": "downsample."}
    public = {}
    for key, value in own.items():
        ours = next((name for name in names if key.startswith(name)), "")
        public[f"b.{names.get(ours, '')}{key.removeprefix(ours)}"] = value
    x = filled_clip((2, 32, 5, 6, 7))
    for given in (x, x.contiguous(memory_format=torch.channels_last_3d)):
        assert error(block(given), reference_block(public, x, "b", stride, 1e-3)) < 1e-5


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 2)])
def test_pointwise_is_the_convolution_in_every_memory_format(stride: tuple[int, int, int]) -> None:
    pointwise, plain = Pointwise(6, 9, stride=stride, relu=False), ConvNorm(6, 9, stride=stride, relu=False)
    own = filled_state({key: value.shape for key, value in plain.state_dict().items()})
    plain.load_state_dict(own)
    pointwise.load_state_dict(own)
    for module in (plain.eval(), pointwise.eval()):
        module.to(torch.float64)
    clip = filled_clip((2, 6, 5, 7, 4)).double()
    for fused in (False, True):
        if fused:
            plain.fuse()
            pointwise.fuse()
        for memory_format in (torch.contiguous_format, torch.channels_last_3d):
            gradients = []
            for module in (plain, pointwise):
                given = clip.clone(memory_format=memory_format).requires_grad_()
                output = module(given)
                output.square().sum().backward()
                gradients.append((output.detach(), given.grad, module.conv.weight.grad))
                module.zero_grad()
            assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(*gradients, strict=True))


@torch.inference_mode()
def test_a_batch_is_its_clips_one_by_one(filled: CSN) -> None:
    check_batches(copy.deepcopy(filled), filled_clip((3, 3, 9, 48, 40), seed=3))


def test_a_training_step_reaches_every_parameter(filled: CSN) -> None:
    check_training(filled, filled_clip((2, 3, 9, 40, 32), seed=5))


# ---- files -----------------------------------------------------------------------------------------------------------


def test_files_that_do_not_fit_name_the_tensor(state: dict[str, Tensor]) -> None:
    short = {key: value for key, value in state.items() if key != "backbone.layer2.1.conv2.0.bn.bias"}
    with pytest.raises(WeightsError, match=r"1 tensors missing: res3\.1\.conv2\.bn\.bias"):
        load_backbone(short)
    with pytest.raises(WeightsError, match=r"1 tensors unexpected: res3\.1\.conv9\.weight"):
        load_backbone({**state, "backbone.layer2.1.conv9.weight": torch.zeros(3)})
    wide = {**state, "backbone.conv1.conv.weight": torch.zeros(64, 2, 3, 7, 7)}
    with pytest.raises(WeightsError, match=r"stem\.conv\.weight is \[64, 2, 3, 7, 7\]"):
        load_backbone(wide)
    with pytest.raises(WeightsError, match=r"holds ircsn-50, not ircsn-152 \(depths is \(3, 4, 6, 3\) in the file"):
        build_backbone("ircsn-152", state)
    with pytest.raises(WeightsError, match=r"holds ircsn-50, not ipcsn-152 .*interaction is reduced in the file"):
        build_backbone("ipcsn-152", state)
    shallow = {key: value for key, value in state.items() if ".layer3.5." not in key}
    with pytest.raises(WeightsError, match=r"depths is \(3, 4, 5, 3\) in the file"):
        load_backbone(shallow)
    mixed = {**state, **{f"backbone.layer1.0.conv2.1.{part}": torch.zeros(3) for part in ("conv.weight", "bn.weight")}}
    with pytest.raises(WeightsError, match="interaction is preserved in the file and reduced in ircsn-50"):
        load_backbone(mixed)


def test_a_file_without_classifier_has_none(state: dict[str, Tensor]) -> None:
    backbone = load_backbone({key: value for key, value in state.items() if not key.startswith("cls_head.")})
    with pytest.raises(RecipeError, match="ircsn-50 has no classifier"):
        backbone.classify(torch.zeros(1, 2048))


def test_statistics_are_those_of_the_code_that_wrote_the_file(state: dict[str, Tensor]) -> None:
    assert load_backbone(state).spec == SPECS["ircsn-50"]
    assert SPECS["ircsn-50"].value_range == (0.0, 255.0)
    vmz = {}
    for key, value in state.items():
        name = key.removeprefix("backbone.").replace("conv1.", "stem.", 1) if ".conv1." in key[:15] else key
        name = name.removeprefix("backbone.").replace("cls_head.fc_cls", "fc").replace(".conv2.0.", ".conv2.")
        vmz[name.replace(".conv.", ".0.").replace(".bn.", ".1.")] = value
    backbone = load_backbone(vmz)
    assert (backbone.spec.name, backbone.spec.value_range) == ("ircsn-50", (0.0, 1.0))
    assert backbone.spec.mean == pytest.approx((0.43216, 0.394666, 0.37645))
    ours = tensors_of(load_backbone(state))
    assert all(torch.equal(value, ours[key]) for key, value in tensors_of(backbone).items())
    theirs = SPECS["ircsn-101"]
    assert (theirs.mean[0], theirs.std[0], theirs.fps, theirs.grid_fps) == (0.45, 0.225, 30.0, 30.0)


# ---- behaviour -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ircsn-152", "ipcsn-152", "ircsn-101", "ircsn-50"])
def test_spec_without_building_is_that_of_the_network(name: str) -> None:
    with torch.device("meta"):
        entry = BACKBONES[name]
        assert entry.build(**entry.arguments).spec == SPECS[name] == entry.spec
    spec = SPECS[name]
    assert spec.name == name
    for level, info in spec.levels.items():
        SnippetPlan(spec.window, spec.interval, spec.stride).check_level(level, info.stride)


@torch.inference_mode()
def test_random_weights_keep_the_signal_alive() -> None:
    backbone = build_backbone("ircsn-50", weights="random:1")
    features = backbone(filled_clip((2, 3, 8, 64, 64)))["features"]
    assert 0.01 < float(features.std()) < 100
    assert float((features[0] - features[1]).abs().max()) > 1e-3


def test_classifier_drops_out_in_training_where_published(state: dict[str, Tensor]) -> None:
    backbone, features = CSN(depths=R50, classes=5), torch.ones(1, 2048)
    backbone.eval()
    assert torch.equal(backbone.classify(features), backbone.classify(features))
    backbone.train()
    assert not torch.equal(backbone.classify(features), backbone.classify(features))
    with pytest.raises(RecipeError, match=r"call eval\(\) first"):
        backbone.fuse()


def test_wrong_uses_say_so(filled: CSN) -> None:
    with pytest.raises(RecipeError, match=r"no CSN has the depths \(2, 2, 2, 2\).*Known: ircsn-152"):
        CSN(depths=(2, 2, 2, 2))
    with pytest.raises(RecipeError, match="preserved"):
        CSN(depths=R101, interaction="preserved")
    with pytest.raises(RecipeError, match=r"takes clips \(B, 3, T, H, W\), got \(1, 2, 4, 8, 8\)"):
        filled(torch.zeros(1, 2, 4, 8, 8))
    with pytest.raises(RecipeError, match=r"normalise\(clips\) first"):
        filled(torch.zeros(1, 3, 4, 8, 8, dtype=torch.uint8))
    assert R152 == (3, 8, 36, 3)
