"""TSN and TSM against recorded outputs of the public implementations, and against a plain second writing."""

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
from tad.extract.backbones.tsn import TSN, shift
from tad.extract.snippets import SnippetPlan
from tests.extract.filler import filled_clip, filled_state, golden, state_sha256
from tests.extract.parity import (
    SUFFIXES,
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
)

GOLDEN = {
    "mma_tsm_r50_1x1x8": "tsm-r50",
    "mit_tsm_r50_8": "tsm-r50",
    "mma_tsn_r50": "tsn-r50",
    "mit_tsn_r50_8": "tsn-r50",
}
TAGS = ("A", "A_rect", pytest.param("A_nat", marks=pytest.mark.slow))
DEPTHS = (3, 4, 6, 3)

# Of golden/backbones, mma_tsn_r50: SHA-256 of the filled weights, the first features of A and A_rect. The same weights
# under TSM's names are drawn anew, so that TSM has its own numbers, of mit_tsm_r50_8.
FILLED = {
    "tsn-r50": "1827e47b54b24472c56da6d15e2112247d74b24bf69148af79f4a64b77faec40",
    "tsm-r50": "247958745f051eee979dc44329cfedc12ee010eead0d5aa49f093e0e0cf50a4d",
}
FIRST = {
    ("tsn-r50", "A"): [41.699814, 0.000000, 53.555462, 213.636429, 114.900383, 0.000000, 193.688126, 0.000000],
    ("tsn-r50", "A_rect"): [41.939003, 0.000000, 74.340836, 239.877884, 141.658096, 0.000000, 197.326141, 0.459672],
    ("tsm-r50", "A"): [168.766998, 5.883203, 253.571075, 54.043793, 42.433823, 0.000000, 112.722023, 4.311134],
}


@pytest.fixture(scope="module", params=GOLDEN)
def loaded(request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return loaded_golden(shared, request.param, tmp_path_factory.mktemp("weights"))


def mmaction2_shapes() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of TSN as mmaction2 writes them: torchvision's ResNet-50, a convolution and its norm a module."""
    shapes: dict[str, tuple[int, ...]] = {}

    def unit(name: str, *shape: int) -> None:
        shapes[f"{name}.conv.weight"] = shape
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = shape[:1]
        shapes[f"{name}.bn.num_batches_tracked"] = ()

    unit("backbone.conv1", 64, 3, 7, 7)
    width = 64
    for stage, depth in enumerate(DEPTHS, start=1):
        mid = 32 * 2**stage
        for block in range(depth):
            name = f"backbone.layer{stage}.{block}"
            unit(f"{name}.conv1", mid, width, 1, 1)
            unit(f"{name}.conv2", mid, mid, 3, 3)
            unit(f"{name}.conv3", 4 * mid, mid, 1, 1)
            if block == 0:
                unit(f"{name}.downsample", 4 * mid, width, 1, 1)
            width = 4 * mid
    return {**shapes, "cls_head.fc_cls.weight": (400, width), "cls_head.fc_cls.bias": (400,)}


def mit_name(key: str, shifted: bool) -> str:
    """mmaction2's name → mit-han-lab's, as it is in the file."""
    name = key.replace("backbone.", "module.base_model.").replace("cls_head.fc_cls.", "module.new_fc.")
    name = name.replace("downsample.conv.", "downsample.0.").replace("downsample.bn.", "downsample.1.")
    for number in "123":
        name = name.replace(f"conv{number}.bn.", f"bn{number}.").replace(f"conv{number}.conv.", f"conv{number}.")
    return name.replace(".conv1.", ".conv1.net.") if shifted and "layer" in name else name


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """The filled weights of TSN under mmaction2's names, without the shared folder."""
    return filled_state(mmaction2_shapes(), 0.85)


@pytest.fixture(scope="module")
def networks(state: dict[str, Tensor]) -> dict[str, TSN]:
    """TSN and TSM of the same weights."""
    as_tsm = {
        key.replace(".conv1.conv.", ".conv1.conv.net.") if ".layer" in key else key: value
        for key, value in state.items()
    }
    result = {}
    for name, tensors in (("tsn-r50", state), ("tsm-r50", as_tsm)):
        backbone = load_backbone(tensors)
        assert isinstance(backbone, TSN)
        assert backbone.spec == SPECS[name]
        result[name] = backbone
    return result


# ---- against recorded outputs ----------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("tag", TAGS)
def test_features_levels_and_logits_are_those_of_the_public_code(loaded: Loaded, tag: str) -> None:
    backbone, record, arrays = loaded
    assert backbone.spec.name == GOLDEN[record["model"]]
    outputs = check_outputs(loaded, tag, {f"res{n + 1}": f"layer{n}" for n in (2, 3, 4)})
    frames = outputs["res5"][0].mean((2, 3)).T[:, :256]  # (T, 256)
    assert error(frames, arrays[f"frame_features{SUFFIXES[tag]}"]) < 1e-4
    if tag == "A_nat":
        assert error(backbone.classify(outputs["features"])[0], arrays["logits_nat"].reshape(-1)) < 1e-4


@torch.inference_mode()
def test_fused_is_the_same_to_rounding(loaded: Loaded) -> None:
    backbone, record, arrays = loaded
    fused = copy.deepcopy(backbone)
    assert fused.fuse() is fused
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
    first = fused(golden_clip(record))["features"][0]
    assert error(first, arrays["feature"]) < 1e-4
    assert torch.equal(fused.fuse()(golden_clip(record))["features"][0], first)  # a second time changes nothing


def test_statistics_are_those_of_the_code_that_wrote_the_file(loaded: Loaded) -> None:
    backbone, record, _ = loaded
    spec = backbone.spec
    assert sum(value.numel() for value in backbone.parameters()) == record["n_params"]
    high = 255.0 if record["model"].startswith("mma") else 1.0
    assert spec.value_range == (0.0, high)
    assert [m / high for m in spec.mean] == pytest.approx([0.485, 0.456, 0.406])
    assert [s / high for s in spec.std] == pytest.approx([0.229, 0.224, 0.225])


@pytest.mark.parametrize("name", GOLDEN)
def test_every_public_key_lands(shared: Path, name: str) -> None:
    check_keys_land(golden(shared, name)[0]["keys"], GOLDEN[name], ("", "module.") if name.startswith("mma") else ("",))


@torch.inference_mode()
@pytest.mark.parametrize(("tag", "shape"), [("A", (8, 3, 112, 112)), ("A_rect", (8, 3, 128, 160))])
def test_golden_features_without_the_shared_folder(
    state: dict[str, Tensor], networks: dict[str, TSN], tag: str, shape: tuple[int, ...]
) -> None:
    assert state_sha256(state) == FILLED["tsn-r50"]
    features = networks["tsn-r50"](filled_clip(shape).transpose(0, 1)[None])["features"][0]
    assert np.allclose(features[:8], FIRST["tsn-r50", tag], rtol=0, atol=1e-4 * float(features.std()))


@torch.inference_mode()
def test_golden_features_of_tsm_without_the_shared_folder() -> None:
    shapes = {mit_name(key, shifted=True): shape for key, shape in mmaction2_shapes().items()}
    state = filled_state(shapes, 0.85)
    assert state_sha256(state) == FILLED["tsm-r50"]
    features = load_backbone(state)(filled_clip((8, 3, 112, 112)).transpose(0, 1)[None])["features"][0]
    assert np.allclose(features[:8], FIRST["tsm-r50", "A"], rtol=0, atol=1e-4 * float(features.std()))


@pytest.mark.parametrize("name", ["tsn-r50", "tsm-r50"])
def test_parameter_counts(name: str) -> None:
    check_parameters(name, 23_508_032)


# ---- against a plain writing -----------------------------------------------------------------------------------------


def reference(state: Mapping[str, Tensor], frames: Tensor, shifts: bool) -> list[Tensor]:
    """One clip (T, 3, H, W) → the outputs (T, C, H', W') of the last three stages."""

    def unit(x: Tensor, name: str, stride: int = 1) -> Tensor:
        return norm(state, conv(state, x, f"{name}.conv", stride), f"{name}.bn", 1e-5)

    def shifted(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        fold = x.shape[1] // 8
        for t in range(x.shape[0]):
            for channel in range(x.shape[1]):
                source = t + 1 if channel < fold else t - 1 if channel < 2 * fold else t
                if 0 <= source < x.shape[0]:
                    y[t, channel] = x[source, channel]
        return y

    x = F.max_pool2d(torch.relu(unit(frames, "backbone.conv1", 2)), 3, 2, 1)
    maps = []
    for stage, depth in enumerate(DEPTHS, start=1):
        for block in range(depth):
            name, stride = f"backbone.layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = torch.relu(unit(shifted(x) if shifts else x, f"{name}.conv1"))
            y = unit(torch.relu(unit(y, f"{name}.conv2", stride)), f"{name}.conv3")
            x = torch.relu(y + (unit(x, f"{name}.downsample", stride) if block == 0 else x))
        maps.append(x)
    return maps[1:]


@torch.inference_mode()
@pytest.mark.parametrize("name", ["tsn-r50", "tsm-r50"])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 33, 47), (5, 16, 40)], ids=str)
def test_any_size_is_as_in_the_plain_writing(
    networks: dict[str, TSN], state: dict[str, Tensor], name: str, size: tuple[int, int, int]
) -> None:
    clips = filled_clip((2, 3, *size), seed=1)
    outputs = networks[name](clips, levels=True)
    for row in range(2):
        maps = reference(state, clips[row].transpose(0, 1), name == "tsm-r50")
        for level, expected in zip(("res3", "res4", "res5"), maps, strict=True):
            assert outputs[level][row].shape == expected.transpose(0, 1).shape
            assert error(outputs[level][row], expected.transpose(0, 1)) < 1e-4
        assert error(outputs["features"][row], maps[-1].mean((0, 2, 3))) < 1e-4


@torch.inference_mode()
def test_rectangular_frames_of_full_size(networks: dict[str, TSN], state: dict[str, Tensor]) -> None:
    clip = filled_clip((1, 3, 1, 256, 320), seed=2)
    expected = reference(state, clip[0].transpose(0, 1), shifts=True)[-1].mean((0, 2, 3))
    assert error(networks["tsm-r50"](clip)["features"][0], expected) < 1e-4


def test_gradients_are_those_of_the_plain_writing(networks: dict[str, TSN], state: dict[str, Tensor]) -> None:
    clip = filled_clip((1, 3, 3, 17, 33), seed=2)
    ours, plain = clip.clone().requires_grad_(), clip.clone().requires_grad_()
    networks["tsm-r50"](ours)["features"].square().sum().backward()
    reference(state, plain[0].transpose(0, 1), shifts=True)[-1].mean((0, 2, 3)).square().sum().backward()
    assert ours.grad is not None
    assert plain.grad is not None
    assert error(ours.grad, plain.grad) < 1e-3
    networks["tsm-r50"].zero_grad(set_to_none=True)


def test_shift_by_hand() -> None:
    clips = torch.arange(3.0).view(1, 3, 1, 1, 1) + torch.arange(1, 10).view(1, 1, 9, 1, 1) * 10  # 10 c + t
    shifted = shift(clips)[0, :, :, 0, 0]
    assert shifted[:, 0].tolist() == [11, 12, 0]  # of the next frame
    assert shifted[:, 1].tolist() == [0, 20, 21]  # of the previous frame
    assert torch.equal(shifted[:, 2:], clips[0, :, 2:, 0, 0])
    assert torch.equal(shift(clips[:, :1])[0, 0, :, 0, 0], torch.tensor([0.0, 0, 30, 40, 50, 60, 70, 80, 90]))


@torch.inference_mode()
def test_a_frame_alone_tells_tsn_but_not_tsm(networks: dict[str, TSN]) -> None:
    clip = filled_clip((1, 3, 4, 32, 32), seed=4)
    alone = [networks["tsn-r50"](clip[:, :, t : t + 1])["features"] for t in range(4)]
    assert error(networks["tsn-r50"](clip)["features"], torch.cat(alone).mean(0, keepdim=True)) < 1e-5
    swapped = clip[:, :, [1, 0, 2, 3]]
    assert error(networks["tsn-r50"](swapped)["features"], networks["tsn-r50"](clip)["features"]) < 1e-5
    assert error(networks["tsm-r50"](swapped)["features"], networks["tsm-r50"](clip)["features"]) > 1e-2


@torch.inference_mode()
@pytest.mark.parametrize("name", ["tsn-r50", "tsm-r50"])
def test_a_batch_is_its_clips_one_by_one(networks: dict[str, TSN], name: str) -> None:
    check_batches(networks[name], filled_clip((3, 3, 5, 40, 32), seed=3))


def test_a_training_step_reaches_every_parameter(networks: dict[str, TSN]) -> None:
    check_training(networks["tsm-r50"], filled_clip((2, 3, 3, 40, 32), seed=5))


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shifted", [False, True])
def test_both_code_bases_name_the_same_tensors(
    networks: dict[str, TSN], state: dict[str, Tensor], shifted: bool
) -> None:
    backbone = load_backbone({mit_name(key, shifted): value for key, value in state.items()})
    ours = networks["tsm-r50" if shifted else "tsn-r50"]
    assert (backbone.spec.name, backbone.spec.value_range) == (ours.spec.name, (0.0, 1.0))
    expected = tensors_of(ours)
    assert tensors_of(backbone).keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in tensors_of(backbone).items())


def test_files_that_do_not_fit_name_the_tensor(state: dict[str, Tensor]) -> None:
    short = {key: value for key, value in state.items() if key != "backbone.layer2.1.conv2.bn.bias"}
    with pytest.raises(WeightsError, match=r"1 tensors missing: res3\.1\.conv2\.bn\.bias"):
        load_backbone(short)
    with pytest.raises(WeightsError, match=r"1 tensors unexpected: res3\.1\.conv9\.weight"):
        load_backbone({**state, "backbone.layer2.1.conv9.weight": torch.zeros(3)})
    with pytest.raises(WeightsError, match=r"stem\.conv\.weight is \[64, 10, 7, 7\]"):  # stacked optical flow
        load_backbone({**state, "backbone.conv1.conv.weight": torch.zeros(64, 10, 7, 7)})
    with pytest.raises(WeightsError, match="holds tsn-r50, not tsm-r50"):
        build_backbone("tsm-r50", state)
    shallow = {key: value for key, value in state.items() if ".layer3.5." not in key}
    with pytest.raises(WeightsError, match=r"depths is \(3, 4, 5, 3\) in the file"):
        load_backbone(shallow)
    solid = {key: value[:, :, None] if value.ndim == 4 else value for key, value in state.items()}
    with pytest.raises(WeightsError, match=r"depths is of 3-D convolutions in the file and \(3, 4, 6, 3\) in tsn-r50"):
        build_backbone("tsn-r50", solid)


def test_older_files_of_mit_call_the_classifier_otherwise(networks: dict[str, TSN], state: dict[str, Tensor]) -> None:
    older = {mit_name(key, False).replace("new_fc.", "base_model.classifier."): value for key, value in state.items()}
    features = filled_clip((2, 2048))
    assert torch.equal(load_backbone(older).classify(features), networks["tsn-r50"].classify(features))


def test_a_file_without_classifier_has_none(state: dict[str, Tensor]) -> None:
    backbone = load_backbone({key: value for key, value in state.items() if not key.startswith("cls_head.")})
    with pytest.raises(RecipeError, match="tsn-r50 has no classifier"):
        backbone.classify(torch.zeros(1, 2048))


# ---- behaviour -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tsn-r50", "tsm-r50"])
def test_spec_without_building_is_that_of_the_network(name: str) -> None:
    with torch.device("meta"):
        entry = BACKBONES[name]
        assert entry.build(**entry.arguments).spec == SPECS[name] == entry.spec
    spec = SPECS[name]
    assert (spec.name, spec.frames) == (name, 8)
    for level, info in spec.levels.items():
        SnippetPlan(spec.window, spec.interval, spec.stride).check_level(level, info.stride)


@torch.inference_mode()
def test_random_weights_keep_the_signal_alive() -> None:
    backbone = build_backbone("tsm-r50", weights="random:1")
    features = backbone(filled_clip((2, 3, 4, 48, 48)))["features"]
    assert 0.01 < float(features.std()) < 100
    assert float((features[0] - features[1]).abs().max()) > 1e-3


def test_classifier_drops_out_in_training_only() -> None:
    backbone, features = TSN(classes=5).eval(), torch.ones(1, 2048)
    assert torch.equal(backbone.classify(features), backbone.classify(features))
    backbone.train()
    assert not torch.equal(backbone.classify(features), backbone.classify(features))
    with pytest.raises(RecipeError, match=r"call eval\(\) first"):
        backbone.fuse()


def test_wrong_uses_say_so(networks: dict[str, TSN]) -> None:
    with pytest.raises(RecipeError, match=r"on ResNet-50 only, .* got \(3, 4, 23, 3\)"):
        TSN(depths=(3, 4, 23, 3))
    with pytest.raises(RecipeError, match=r"takes clips \(B, 3, T, H, W\), got \(8, 3, 32, 32\)"):
        networks["tsn-r50"](torch.zeros(8, 3, 32, 32))
    with pytest.raises(RecipeError, match=r"normalise\(clips\) first"):
        networks["tsn-r50"](torch.zeros(1, 3, 4, 8, 8, dtype=torch.uint8))
