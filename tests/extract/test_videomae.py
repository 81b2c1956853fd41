"""VideoMAE against recorded outputs of the authors' code and of transformers, which differ in an epsilon."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tad.errors import RecipeError, WeightsError
from tad.extract.backbones import BACKBONES, SPECS, load_backbone
from tad.extract.backbones.videomae import AUTHORS_EPS, TRANSFORMERS_EPS, VideoMAE, sincos_positions
from tad.extract.weights import family_of
from tests.extract.filler import filled_clip, filled_state, golden, relative_error, state_sha256

GOLDEN = ("mcg_videomae_base_small", "hf_videomae_base_small")
FULL = ("mcg_videomae_base_k400", "hf_videomae_base_k400")
BLOCK = {
    "norm1.weight": (768,),
    "norm1.bias": (768,),
    "attn.q_bias": (768,),
    "attn.v_bias": (768,),
    "attn.qkv.weight": (2304, 768),
    "attn.proj.weight": (768, 768),
    "attn.proj.bias": (768,),
    "norm2.weight": (768,),
    "norm2.bias": (768,),
    "mlp.fc1.weight": (3072, 768),
    "mlp.fc1.bias": (3072,),
    "mlp.fc2.weight": (768, 3072),
    "mlp.fc2.bias": (768,),
}
TRANSFORMERS = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def authors_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' files: the positions are in none, so they are the same for every clip."""
    outside: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (768, 3, 2, 16, 16),
        "patch_embed.proj.bias": (768,),
        "fc_norm.weight": (768,),
        "fc_norm.bias": (768,),
        "head.weight": (400, 768),
        "head.bias": (400,),
    }
    return outside | {f"blocks.{i}.{name}": shape for i in range(12) for name, shape in BLOCK.items()}


def as_transformers(state: Mapping[str, Tensor], release: float = 4) -> dict[str, Tensor]:
    """The authors' names → those of transformers 4, or 5; 5.0 stands for its first releases, which had key biases."""
    result = {}
    for key, value in state.items():
        block, _, name = key.removeprefix("blocks.").partition(".")
        inside = f"videomae.encoder.layer.{block}"
        if key == "norm_eps":
            continue
        if not key.startswith("blocks."):
            key = key.replace("patch_embed.proj.", "videomae.embeddings.patch_embeddings.projection.")
            result[key.replace("head.", "classifier.")] = value
        elif name == "attn.qkv.weight":
            for part, matrix in zip(("query", "key", "value"), value.chunk(3), strict=True):
                result[f"{inside}.attention.attention.{part}.weight"] = matrix.clone()
        elif name in ("attn.q_bias", "attn.v_bias"):
            part = {"q": "query", "v": "value"}[name[5]]
            ours = f"{name[5]}_bias" if release == 4 else f"{part}.bias"
            result[f"{inside}.attention.attention.{ours}"] = value
            if release == 5.0:
                result[f"{inside}.attention.attention.key.bias"] = torch.full_like(value, 3.0)
        else:
            part, _, last = name.rpartition(".")
            result[f"{inside}.{TRANSFORMERS[part]}.{last}"] = value
    return result


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Filled weights under the authors' names."""
    return filled_state(authors_shapes())


def through_a_file(state: Mapping[str, Tensor], path: Path) -> VideoMAE:
    torch.save({"model": dict(state)}, path)
    backbone = load_backbone(path)
    path.unlink()
    assert isinstance(backbone, VideoMAE)
    return backbone


@pytest.fixture(scope="module")
def loaded(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> VideoMAE:
    return through_a_file(state, tmp_path_factory.mktemp("weights") / "checkpoint.pth")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """``videomae-b`` stands for a tiny network, so that loading it costs nothing."""
    build = partial(VideoMAE, heads=4)
    entry = replace(BACKBONES["videomae-b"], arguments={"width": 24, "depth": 2}, build=build)
    monkeypatch.setitem(BACKBONES, "videomae-b", entry)


def small(seed: int = 0, **arguments: Any) -> VideoMAE:
    """A tiny network with weights that leave no tensor without effect."""
    arguments = {"classes": 5, "frames": 8, "image_size": 64, "width": 24, "depth": 2, "heads": 4} | arguments
    backbone = VideoMAE(**arguments).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in backbone.named_parameters():
            value.copy_(torch.randn(value.shape, generator=rng) * 0.3 + ("norm" in key and "weight" in key))
    return backbone


# ---- recorded outputs of the public code -----------------------------------------------------------------------------


def compare(backbone: VideoMAE, record: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    transformers = record["model"].startswith("hf_")
    clip = filled_clip(record["inputs"]["A"]["shape"], record["inputs"]["A"]["seed"])
    clip = clip.transpose(1, 2) if transformers else clip  # (B, C, T, H, W)
    outputs: dict[int, Tensor] = {}
    hooks = [backbone.blocks[i].register_forward_hook(lambda *a, i=i: outputs.__setitem__(i, a[2])) for i in (0, 5, 11)]
    features = backbone(clip, levels=True)["features"]
    for hook in hooks:
        hook.remove()
    assert relative_error(features[0], arrays["feature"]) < 1e-4
    assert relative_error(backbone.classify(features)[0], arrays["logits"].reshape(-1)) < 1e-4
    for i, tokens in outputs.items():
        name = f"{'layer' if transformers else 'block'}{i}"
        std = float(arrays[f"{name}__stats"][1])
        assert list(tokens.shape) == arrays[f"{name}__shape"].tolist()
        assert relative_error(tokens[0].mean(0), arrays[f"{name}__gap"]) < 1e-4
        assert (tokens[0, :4, :32] - torch.from_numpy(arrays[f"{name}__slice0"])).abs().max() < 1e-4 * std
        assert (tokens[0, -4:, :32] - torch.from_numpy(arrays[f"{name}__slice"])).abs().max() < 1e-4 * std


@torch.inference_mode()
def test_outputs_are_those_of_the_authors_code(shared: Path, state: dict[str, Tensor], loaded: VideoMAE) -> None:
    record, arrays = golden(shared, GOLDEN[0])
    assert {key: list(value.shape) for key, value in state.items()} == record["keys"]
    assert sum(p.numel() for p in loaded.parameters()) == record["n_params"]
    loaded.interpolate_positions = True  # the file says nothing of its 8 frames of 64x64
    compare(loaded, record, arrays)
    loaded.interpolate_positions = False


@torch.inference_mode()
def test_outputs_are_those_of_transformers_with_names_of_4_and_of_5(shared: Path, tmp_path: Path) -> None:
    record, arrays = golden(shared, GOLDEN[1])
    weights = filled_state(record["keys"], record["gain"])
    assert state_sha256(weights) == record["filled_state_sha256"]
    backbone = through_a_file(weights, tmp_path / "pytorch_model.bin")
    backbone.interpolate_positions = True
    compare(backbone, record, arrays)
    renamed = {
        key.replace("q_bias", "query.bias").replace("v_bias", "value.bias"): value for key, value in weights.items()
    }
    assert len(renamed.keys() - weights.keys()) == 24
    again = load_backbone(renamed)
    again.interpolate_positions = True
    clip = filled_clip((1, 3, 8, 64, 64))
    assert torch.equal(again(clip)["features"], backbone(clip)["features"])


@torch.inference_mode()
def test_outputs_without_the_shared_folder(state: dict[str, Tensor], loaded: VideoMAE) -> None:
    assert state_sha256(state) == "324e358c3b1dace7646d8c8bd4f569ab1c3669933b8a12f0b85a977edfb04bd6"
    loaded.interpolate_positions = True
    features = loaded(filled_clip((1, 3, 8, 64, 64)))["features"]
    loaded.interpolate_positions = False
    first = torch.tensor([0.936679, -0.758638, 1.044577, -0.355586, -0.239907, -0.770922])
    assert (features[0, :6] - first).abs().max() < 1e-4
    logits = torch.tensor([2.098607, 1.332265, 3.317577])
    assert (loaded.classify(features)[0, :3] - logits).abs().max() < 2e-4


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("name", FULL)
def test_full_size_outputs_are_those_of_the_public_code(shared: Path, tmp_path: Path, name: str) -> None:
    record, arrays = golden(shared, name)
    weights = filled_state(record["keys"], record["gain"])
    assert state_sha256(weights) == record["filled_state_sha256"]
    backbone = through_a_file(weights, tmp_path / "weights.pth")
    assert backbone.spec == SPECS["videomae-b"]
    compare(backbone, record, arrays)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_close(loaded: VideoMAE, dtype: torch.dtype) -> None:
    clip = filled_clip((1, 3, 8, 64, 64))
    loaded.interpolate_positions = True
    exact = loaded(clip)["features"]
    with torch.autocast("cpu", dtype=dtype):
        half = loaded(clip)["features"].float()
    loaded.interpolate_positions = False
    assert torch.cosine_similarity(exact, half).item() > 0.999
    assert not torch.equal(exact, half)


# ---- positions and invariants ----------------------------------------------------------------------------------------


def test_positions_are_sines_and_cosines() -> None:
    table = sincos_positions(1568, 768)[0]
    for token, pair in ((0, 0), (1, 0), (17, 3), (1567, 200), (1567, 383)):
        angle = token / 10000 ** (2 * pair / 768)
        assert table[token, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[token, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


@torch.inference_mode()
def test_other_clips_get_the_positions_of_a_network_built_for_them() -> None:
    backbone = small()
    clips = filled_clip((2, 3, 8, 64, 64))
    before = backbone(clips)["features"]
    other = filled_clip((2, 3, 12, 96, 96))
    with pytest.raises(RecipeError, match="has positions for 8 frames of 64x64, got clips of 12 frames of 96x96"):
        backbone(other)
    backbone.interpolate_positions = True
    assert torch.equal(backbone(clips)["features"], before)
    larger = small(frames=12, image_size=96)
    assert torch.equal(backbone(other)["features"], larger(other)["features"])
    wide = backbone.positions_for((4, 2, 8))
    assert torch.equal(wide, sincos_positions(64, 24))
    assert torch.equal(backbone.positions_for((4, 4, 4)), sincos_positions(64, 24))
    assert backbone(filled_clip((1, 3, 8, 32, 128)))["features"].shape == (1, 24)


@torch.inference_mode()
def test_half_precision_parameters_take_other_clips_too() -> None:
    backbone = small().to(torch.bfloat16)
    backbone.interpolate_positions = True
    assert backbone(filled_clip((1, 3, 12, 96, 96)).to(torch.bfloat16))["features"].dtype == torch.bfloat16


@torch.inference_mode()
def test_a_batch_is_its_clips_one_by_one_and_views_are_no_matter() -> None:
    backbone = small().double()
    frames = filled_clip((3, 8, 64, 64, 3)).double()
    clips = frames.permute(0, 4, 1, 2, 3)  # as extraction hands them over
    together = backbone(clips)["features"]
    for row in range(3):
        alone = backbone(clips[row : row + 1].contiguous())["features"]
        assert relative_error(together[row], alone[0].numpy()) < 1e-11
    assert backbone(clips[:0])["features"].shape == (0, 24)
    assert backbone.fuse() is backbone  # there is nothing to fold
    assert torch.equal(backbone(clips)["features"], together)


def test_every_tensor_is_trained() -> None:
    backbone = small(dropout=0.5).train()
    features = backbone(filled_clip((2, 3, 8, 64, 64)))["features"]
    first, second = backbone.classify(features), backbone.classify(features)
    assert not torch.equal(first, second)
    first.square().sum().backward()
    still = {name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert not still
    backbone.eval()
    assert torch.equal(backbone.classify(features), backbone.classify(features))


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        (torch.zeros(1, 3, 8, 64, 72), "blocks of 2 frames of 16x16 pixels, which do not tile 8 frames of 64x72"),
        (torch.zeros(1, 3, 9, 64, 64), "which do not tile 9 frames of 64x64"),
        (torch.zeros(1, 3, 1, 64, 64), "needs at least 2 frames of 16x16"),
        (torch.zeros(1, 3, 8, 8, 64), "needs at least 2 frames of 16x16"),
        (torch.zeros(3, 8, 64, 64), "takes clips"),
        (torch.zeros(1, 3, 8, 64, 64, dtype=torch.uint8), "call normalise"),
    ],
)
def test_clips_that_cannot_be_meant(clips: Tensor, message: str) -> None:
    backbone = small()
    backbone.interpolate_positions = True
    with pytest.raises(RecipeError, match=message):
        backbone(clips)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("prefix", ["", "model.", "module."])
@pytest.mark.parametrize("release", [None, 4, 5.0, 5.23])
@torch.inference_mode()
def test_every_spelling_of_a_file_loads(release: float | None, prefix: str, tmp_path: Path) -> None:
    eps = AUTHORS_EPS if release is None else TRANSFORMERS_EPS
    backbone = small(classes=7, frames=16, image_size=224, eps=eps)
    state = backbone.state_dict() if release is None else as_transformers(backbone.state_dict(), release)
    family = "VideoMAE, MCG-NJU" if release is None else "VideoMAE, transformers"
    assert family_of(state.keys()) == family
    save_file({prefix + key: value for key, value in state.items()}, tmp_path / "a.safetensors")
    again = load_backbone(tmp_path / "a.safetensors")
    assert isinstance(again, VideoMAE)
    ours = backbone.state_dict()
    assert again.state_dict().keys() == ours.keys()
    assert all(torch.equal(value, ours[key]) for key, value in again.state_dict().items())
    assert (again.blocks[1].norm2.eps, again.fc_norm.eps) == eps
    assert again.spec == backbone.spec
    without = {key: value for key, value in state.items() if not key.startswith(("head", "classifier"))}
    with pytest.raises(RecipeError, match="has no classifier"):
        load_backbone(without).classify(torch.zeros(1, 24))


def test_a_bias_of_the_keys_would_change_nothing() -> None:
    """What is dropped from files that have one: softmax does not see a number that is added to all its scores."""
    backbone = small().double().eval()
    attn = backbone.blocks[0].attn
    x = filled_clip((1, 9, 24)).double()
    q, k, v = (x @ attn.qkv.weight.T).chunk(3, 2)
    for key_bias in (0.0, 5.0):
        heads = [t.unflatten(2, (4, 6)).transpose(1, 2) for t in (q + attn.q_bias, k + key_bias * torch.ones(24), v)]
        y = torch.softmax(heads[0] @ heads[1].transpose(2, 3) / 6**0.5, 3) @ heads[2]
        y = attn.proj(y.transpose(1, 2).flatten(2) + attn.v_bias)  # the weights of a mean sum to one
        assert torch.allclose(attn(x), y, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("tiny")
@torch.inference_mode()
def test_what_tad_saves_keeps_the_epsilon() -> None:
    public = as_transformers(small(eps=TRANSFORMERS_EPS).state_dict())
    first = load_backbone(public)
    saved = first.state_dict()
    assert family_of(saved.keys()) == "VideoMAE, MCG-NJU"
    second = load_backbone(saved)
    assert isinstance(second, VideoMAE)
    assert second.blocks[0].norm1.eps == pytest.approx(1e-12)
    assert second.fc_norm.eps == pytest.approx(1e-5)
    other = load_backbone({key: value for key, value in saved.items() if key != "norm_eps"})
    clips = filled_clip((1, 3, 16, 224, 224))
    for backbone in (first, second, other):  # tokens that hardly vary: here the epsilon decides
        backbone.positions.zero_()
        for name, value in backbone.named_parameters():
            if name.startswith(("patch_embed", "blocks")) and "norm" not in name:
                value.data *= 1e-3
    expected = first(clips)["features"]
    assert torch.equal(second(clips)["features"], expected)
    assert relative_error(other(clips)["features"], expected.numpy()) > 1e-2


def test_files_of_the_authors_say_nothing_of_the_epsilon() -> None:
    assert "norm_eps" not in small().state_dict()


@pytest.mark.usefixtures("tiny")
def test_files_that_do_not_fit_are_refused_by_name() -> None:
    backbone = small(frames=16, image_size=224)
    ours, theirs = backbone.state_dict(), as_transformers(backbone.state_dict())

    def changed(state: Mapping[str, Tensor], key: str, value: Tensor | None = None) -> dict[str, Tensor]:
        rest = {k: v for k, v in state.items() if k != key}
        return rest if value is None else rest | {key: value}

    layer = "videomae.encoder.layer.1.attention.attention"
    cases = [
        (changed(ours, "fc_norm.bias"), "1 tensors missing: fc_norm.bias"),
        (changed(ours, "blocks.1.attn.v_bias"), "1 tensors missing: blocks.1.attn.v_bias"),
        (changed(ours, "pos_embed", torch.zeros(1, 1568, 24)), "1 tensors unexpected: pos_embed"),
        (changed(ours, "norm_eps", torch.zeros(3)), "1 tensors unexpected: norm_eps"),
        (changed(ours, "patch_embed.proj.weight"), "patch_embed.proj.weight is missing"),
        (changed(theirs, f"{layer}.q_bias"), "1 tensors missing: blocks.1.attn.q_bias"),
        (changed(theirs, f"{layer}.value.weight"), "1 tensors missing: blocks.1.attn.qkv.weight"),
        (changed(theirs, f"{layer}.query.bias", torch.zeros(24)), "two tensors stand for blocks.1.attn.q_bias"),
        (changed(theirs, "decoder.norm.weight", torch.zeros(24)), "1 tensors unexpected: decoder.norm.weight"),
        (as_transformers(small(depth=4).state_dict()), "depth is 4 in the file and 2 in videomae-b"),
        (small(width=32).state_dict(), "VideoMAE, MCG-NJU, but width is 32 in the file and 24 in videomae-b"),
    ]
    for wrong, message in cases:
        with pytest.raises(WeightsError, match=message):
            load_backbone(wrong)


def test_parameter_counts_and_spec() -> None:
    with torch.device("meta"):
        backbone = VideoMAE(classes=None)
        assert sum(p.numel() for p in VideoMAE().parameters()) == 86_534_800
    assert sum(p.numel() for p in backbone.parameters()) == 86_227_200
    spec = backbone.spec
    assert spec == SPECS["videomae-b"]
    assert (spec.frames, spec.interval, spec.stride, spec.short_side, spec.grid_fps) == (16, 4, 16, 224, None)
    assert not spec.any_size
    assert not spec.any_length
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1, 1).expand(1, 3, 2, 1, 1)
    expected = [[-0.485 / 0.229, 0.515 / 0.229], [-0.456 / 0.224, 0.544 / 0.224], [-0.406 / 0.225, 0.594 / 0.225]]
    assert torch.allclose(small().normalise(pixels)[0, :, :, 0, 0], torch.tensor(expected), atol=1e-5)
    with pytest.raises(RecipeError, match="do not tile 15 frames of 224x224"):
        VideoMAE(frames=15)
