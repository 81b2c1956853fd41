"""ViViT: the public implementation's recorded outputs (joint attention), and a plain second writing of both models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tad.errors import RecipeError, WeightsError
from tad.extract.backbones import BACKBONES, SPECS, attention, build_backbone, load_backbone
from tad.extract.backbones.vivit import FactorisedViViT, ViViT, clip_of
from tad.extract.weights import family_of
from tests.extract.filler import filled_clip, filled_state, golden, relative_error, state_sha256

SMALL = "hf_vivit_b_16x2_small"
BLOCK = {
    "attention.attention.query": (768, 768),
    "attention.attention.key": (768, 768),
    "attention.attention.value": (768, 768),
    "attention.output.dense": (768, 768),
    "intermediate.dense": (3072, 768),
    "output.dense": (768, 3072),
    "layernorm_before": (768,),
    "layernorm_after": (768,),
}
NAMES_5 = {  # of transformers 5, where they differ
    "encoder.layer.": "layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def published_shapes(tokens: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published files, for so many tokens beside the class token."""
    shapes: dict[str, tuple[int, ...]] = {
        "vivit.embeddings.cls_token": (1, 1, 768),
        "vivit.embeddings.position_embeddings": (1, 1 + tokens, 768),
    }
    layers = {f"vivit.encoder.layer.{i}.{name}": shape for i in range(12) for name, shape in BLOCK.items()}
    layers |= {"vivit.embeddings.patch_embeddings.projection": (768, 3, 2, 16, 16), "classifier": (400, 768)}
    for name, shape in {**layers, "vivit.layernorm": (768,)}.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def named_as_5(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for key, value in state.items():
        for old, new in NAMES_5.items():
            key = key.replace(old, new)
        result[key] = value
    return result


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Filled weights for 8 frames of 64x64 under the published names."""
    return filled_state(published_shapes(4 * 4 * 4))


@pytest.fixture(scope="module")
def loaded(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> ViViT:
    """Those weights through a file and the real loading path."""
    path = tmp_path_factory.mktemp("weights") / "pytorch_model.bin"
    torch.save(state, path)
    backbone = load_backbone(path)
    path.unlink()
    assert isinstance(backbone, ViViT)
    return backbone


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """``vivit-b`` and ``vivit-b-fe`` stand for tiny networks, so that loading them costs nothing."""
    for name, kind in (("vivit-b", ViViT), ("vivit-b-fe", FactorisedViViT)):
        fixed = {"width": 24, "depth": 2, **({"temporal_depth": 3} if name.endswith("fe") else {})}
        entry = replace(BACKBONES[name], arguments=fixed, build=partial(kind, heads=4))
        monkeypatch.setitem(BACKBONES, name, entry)


def small(kind: type[ViViT] | type[FactorisedViViT], seed: int = 0, **arguments: Any) -> Any:
    """A tiny network with weights that leave no tensor without effect."""
    arguments = {"classes": 5, "frames": 8, "image_size": 64, "width": 24, "depth": 2, "heads": 4} | arguments
    if kind is FactorisedViViT:
        arguments = {"temporal_depth": 3} | arguments
    backbone = kind(**arguments).eval()
    rng = torch.Generator().manual_seed(seed)
    for key, value in backbone.state_dict().items():
        value.copy_(torch.randn(value.shape, generator=rng) * 0.3 + (1.0 if "norm" in key and "weight" in key else 0.0))
    return backbone


def published_names(backbone: ViViT) -> dict[str, Tensor]:
    """The state of one of our networks as transformers 4 names it, written out by hand."""
    ours, result = backbone.state_dict(), {}
    result["vivit.embeddings.cls_token"] = ours["encoder.cls"]
    result["vivit.embeddings.position_embeddings"] = ours["encoder.positions"]
    for last in ("weight", "bias"):
        result[f"vivit.embeddings.patch_embeddings.projection.{last}"] = ours[f"patch_embed.proj.{last}"]
        result[f"vivit.layernorm.{last}"] = ours[f"encoder.norm.{last}"]
        result[f"classifier.{last}"] = ours[f"head.{last}"]
        for i in range(len(backbone.encoder.blocks)):
            theirs, block = f"vivit.encoder.layer.{i}", f"encoder.blocks.{i}"
            parts = ours[f"{block}.attn.qkv.{last}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                result[f"{theirs}.attention.attention.{name}.{last}"] = part.clone()
            result[f"{theirs}.attention.output.dense.{last}"] = ours[f"{block}.attn.proj.{last}"]
            result[f"{theirs}.intermediate.dense.{last}"] = ours[f"{block}.mlp.fc1.{last}"]
            result[f"{theirs}.output.dense.{last}"] = ours[f"{block}.mlp.fc2.{last}"]
            result[f"{theirs}.layernorm_before.{last}"] = ours[f"{block}.norm1.{last}"]
            result[f"{theirs}.layernorm_after.{last}"] = ours[f"{block}.norm2.{last}"]
    return result


# ---- recorded outputs of the public code -----------------------------------------------------------------------------


def features_and_tokens(backbone: ViViT, clip: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """The features, and what the first, a middle and the last block give."""
    outputs: dict[int, Tensor] = {}
    hooks = [
        backbone.encoder.blocks[i].register_forward_hook(lambda *a, i=i: outputs.__setitem__(i, a[2]))
        for i in (0, 5, 11)
    ]
    features = backbone(clip, levels=True)["features"]
    for hook in hooks:
        hook.remove()
    return features, outputs


def compare(backbone: ViViT, record: dict[str, Any], arrays: Mapping[str, Any]) -> None:
    clip = filled_clip(record["inputs"]["A"]["shape"], record["inputs"]["A"]["seed"]).transpose(1, 2)  # (B, C, T, H, W)
    features, outputs = features_and_tokens(backbone, clip)
    assert relative_error(features[0], arrays["feature"]) < 1e-4
    assert relative_error(backbone.classify(features)[0], arrays["logits"].reshape(-1)) < 1e-4
    for i, tokens in outputs.items():
        std = float(arrays[f"layer{i}__stats"][1])
        assert list(tokens.shape) == arrays[f"layer{i}__shape"].tolist()
        assert relative_error(tokens[0].mean(0), arrays[f"layer{i}__gap"]) < 1e-4
        assert (tokens[0, :4, :32] - torch.from_numpy(arrays[f"layer{i}__slice0"])).abs().max() < 1e-4 * std
        assert (tokens[0, -4:, :32] - torch.from_numpy(arrays[f"layer{i}__slice"])).abs().max() < 1e-4 * std


@torch.inference_mode()
def test_outputs_are_those_of_the_public_code(shared: Path, state: dict[str, Tensor], loaded: ViViT) -> None:
    record, arrays = golden(shared, SMALL)
    assert {key: list(value.shape) for key, value in state.items()} == record["keys"]
    assert sum(p.numel() for p in loaded.parameters()) == record["n_params"]
    compare(loaded, record, arrays)


@torch.inference_mode()
def test_outputs_without_the_shared_folder(state: dict[str, Tensor], loaded: ViViT) -> None:
    assert state_sha256(state) == "fce595213870a4ba79e3841872f8819214e56cb4152f375c1d7644deaa21fd39"
    features = loaded(filled_clip((1, 8, 3, 64, 64)).transpose(1, 2))["features"]
    first = torch.tensor([-0.404161, 0.521223, -1.800649, 0.652291, 0.801168, -1.037053])
    assert (features[0, :6] - first).abs().max() < 1e-4
    logits = torch.tensor([-3.100827, 1.739954, -1.705907])
    assert (loaded.classify(features)[0, :3] - logits).abs().max() < 2e-4


@pytest.mark.slow
@torch.inference_mode()
def test_full_size_outputs_are_those_of_the_public_code(shared: Path, tmp_path: Path) -> None:
    record, arrays = golden(shared, "hf_vivit_b_16x2_k400")
    assert {key: list(shape) for key, shape in published_shapes(16 * 14 * 14).items()} == record["keys"]
    weights = filled_state(record["keys"], record["gain"])
    assert state_sha256(weights) == record["filled_state_sha256"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    backbone = load_backbone(tmp_path / "pytorch_model.bin")
    assert isinstance(backbone, ViViT)
    assert backbone.spec == SPECS["vivit-b"]
    compare(backbone, record, arrays)


@torch.inference_mode()
def test_names_of_transformers_5_give_the_same_network(state: dict[str, Tensor], loaded: ViViT, tmp_path: Path) -> None:
    renamed = named_as_5(state)
    assert "vivit.layers.11.attention.q_proj.weight" in renamed
    assert "vivit.layers.0.mlp.fc2.bias" in renamed
    assert len(renamed.keys() - state.keys()) == 12 * 16  # every tensor of every layer
    save_file(renamed, tmp_path / "model.safetensors")
    backbone = load_backbone(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    clip = filled_clip((1, 3, 8, 64, 64))
    assert torch.equal(backbone(clip)["features"], loaded(clip)["features"])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_close(loaded: ViViT, dtype: torch.dtype) -> None:
    clip = filled_clip((1, 3, 8, 64, 64))
    exact = loaded(clip)["features"]
    with torch.autocast("cpu", dtype=dtype):
        half = loaded(clip)["features"].float()
    assert torch.cosine_similarity(exact, half).item() > 0.999
    assert not torch.equal(exact, half)


# ---- a second, slow writing of both models: one head and one query at a time -----------------------------------------


def plain_norm(x: Tensor, state: Mapping[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]
        + state[f"{name}.bias"]
    )


def plain_encoder(tokens: Tensor, positions: Tensor, state: Mapping[str, Tensor], name: str, heads: int) -> Tensor:
    """Tokens (L, D) of one sequence → what became of its class token, (D,)."""
    x = torch.cat([state[f"{name}.cls"][0], tokens]) + positions
    for i in range(attention.depth_of(state, rf"^{name}\.blocks\.(\d+)\.")):
        block = f"{name}.blocks.{i}"
        y = plain_norm(x, state, f"{block}.norm1")
        q, k, v = (y @ state[f"{block}.attn.qkv.weight"].T + state[f"{block}.attn.qkv.bias"]).chunk(3, 1)
        size = x.shape[1] // heads
        outs = []
        for part in (slice(head * size, (head + 1) * size) for head in range(heads)):
            rows = [torch.softmax((k[:, part] @ q[n, part]) / math.sqrt(size), 0) @ v[:, part] for n in range(len(x))]
            outs.append(torch.stack(rows))
        x = x + torch.cat(outs, 1) @ state[f"{block}.attn.proj.weight"].T + state[f"{block}.attn.proj.bias"]
        y = plain_norm(x, state, f"{block}.norm2") @ state[f"{block}.mlp.fc1.weight"].T + state[f"{block}.mlp.fc1.bias"]
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + y @ state[f"{block}.mlp.fc2.weight"].T + state[f"{block}.mlp.fc2.bias"]
    return plain_norm(x[0], state, f"{name}.norm")


def plain_tubelets(clip: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Clip (3, T, H, W) → tokens (t, h * w, D)."""
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = torch.nn.functional.conv3d(clip[None], weight, bias, stride=weight.shape[2:])[0]  # (D, t, h, w)
    return x.flatten(2).permute(1, 2, 0)


@torch.inference_mode()
def test_factorised_encoder_is_that_of_the_plain_writing() -> None:
    backbone = small(FactorisedViViT).double()
    state = backbone.state_dict()
    clips = filled_clip((2, 3, 8, 64, 64)).double()
    features = backbone(clips)["features"]
    for clip, feature in zip(clips, features, strict=True):
        tokens = plain_tubelets(clip, state)
        frames = [plain_encoder(x, state["spatial.positions"][0], state, "spatial", 4) for x in tokens]
        expected = plain_encoder(torch.stack(frames), state["temporal.positions"][0], state, "temporal", 4)
        assert relative_error(feature, expected.numpy()) < 1e-10
    logits = features @ state["head.weight"].T + state["head.bias"]
    assert torch.allclose(backbone.classify(features), logits)


@torch.inference_mode()
def test_joint_attention_is_that_of_the_plain_writing() -> None:
    backbone = small(ViViT, tubelet=(4, 16, 8)).double()
    state = backbone.state_dict()
    clip = filled_clip((1, 3, 8, 64, 64)).double()
    expected = plain_encoder(
        plain_tubelets(clip[0], state).flatten(0, 1), state["encoder.positions"][0], state, "encoder", 4
    )
    assert relative_error(backbone(clip)["features"][0], expected.numpy()) < 1e-10


# ---- positions -------------------------------------------------------------------------------------------------------


def test_positions_of_another_grid_lie_on_the_same_plane() -> None:
    """A table linear in time, height and width stays so within: in time exactly, in space but for torch's bicubic
    kernel, which bends straight lines a little."""
    old, new = (4, 6, 6), (8, 9, 12)

    def plane(sizes: tuple[int, int, int], slopes: tuple[float, float, float]) -> Tensor:
        axes = [(torch.arange(n) + 0.5) * of / n for n, of in zip(sizes, old, strict=True)]  # in patches of the old
        t, h, w = torch.meshgrid(*axes, indexing="ij")
        values = slopes[0] * t + slopes[1] * h + slopes[2] * w
        return torch.stack([values, 1.0 - 2.0 * values], -1)  # (t, h, w, 2)

    inside = (slice(1, -1), slice(3, -3), slice(4, -4))
    for slopes, tolerance in (((0.3, 0.0, 0.0), 1e-5), ((0.3, -0.7, 0.2), 0.1)):
        table = plane(old, slopes).flatten(0, 2)[None]
        got = attention.resized(table, old, new).unflatten(1, new)[0]
        assert torch.allclose(got[inside], plane(new, slopes)[inside], atol=tolerance)
        assert torch.equal(attention.resized(table, old, old), table)


def test_interpolation_is_in_height_and_width_not_across() -> None:
    table = torch.zeros(1, 2, 4, 4, 1)
    table[:, 1] = 5.0  # the later half
    table[:, :, 3] += 1.0  # the lowest row
    got = attention.resized(table.flatten(1, 3), (2, 4, 4), (2, 4, 8)).unflatten(1, (2, 4, 8))[0, ..., 0]
    expected = table[0, ..., 0].repeat_interleave(2, 2)
    assert torch.allclose(got, expected, atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("kind", [ViViT, FactorisedViViT])
def test_native_clips_are_untouched_by_interpolation(kind: type[ViViT] | type[FactorisedViViT]) -> None:
    backbone = small(kind)
    clips = filled_clip((2, 3, 8, 64, 64))
    before = backbone(clips)["features"]
    backbone.interpolate_positions = True
    assert torch.equal(backbone(clips)["features"], before)


@torch.inference_mode()
def test_an_enlarged_smooth_clip_gives_enlarged_tokens() -> None:
    """Patches that see their mean, smooth positions, a smooth clip: more of the same tokens, in their places."""
    backbone = small(ViViT, frames=8, image_size=96)
    rng = torch.Generator()

    def smooth(seed: int, channels: int, *sizes: int) -> Tensor:
        axes = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in sizes), indexing="ij")
        slopes = torch.randn(3, channels, generator=rng.manual_seed(seed))
        return torch.sin(2 * torch.stack(axes, -1) @ slopes)  # (t, h, w, channels)

    def tokens(clip: Tensor) -> Tensor:
        kept = []
        hook = backbone.encoder.blocks[-1].register_forward_hook(lambda *a: kept.append(a[2][0, 1:]))
        backbone(clip.permute(3, 0, 1, 2)[None])
        hook.remove()
        return kept[0].unflatten(0, backbone.grid(clip.permute(3, 0, 1, 2)[None]))  # (t, h, w, D)

    weight, positions = backbone.patch_embed.proj.weight, backbone.encoder.positions
    weight.copy_(weight.mean((2, 3, 4), keepdim=True).expand_as(weight))
    positions[0, 1:] = 3 * smooth(1, 24, 4, 6, 6).flatten(0, 2)
    large = smooth(2, 3, 16, 192, 192)
    with pytest.raises(RecipeError, match="has positions for 8 frames of 96x96, got clips of 16 frames of 192x192"):
        tokens(large)
    backbone.interpolate_positions = True
    native = tokens(smooth(2, 3, 8, 96, 96))

    def difference() -> float:
        pooled = torch.nn.functional.avg_pool3d(tokens(large).permute(3, 0, 1, 2), 2).permute(1, 2, 3, 0)
        return float((native - pooled).norm() / native.norm())

    assert difference() < 0.05
    table = positions[0, 1:].unflatten(0, (4, 6, 6)).clone()
    for axis in range(3):  # the same positions in other places are something else
        positions[0, 1:] = table.flip(axis).flatten(0, 2)
        assert difference() > 0.15


@torch.inference_mode()
@pytest.mark.parametrize("kind", [ViViT, FactorisedViViT])
def test_interpolated_network_is_one_built_with_the_interpolated_positions(kind: Any) -> None:
    backbone = small(kind)
    larger = kind(
        **{"temporal_depth": 3} if kind is FactorisedViViT else {},
        classes=5,
        frames=12,
        image_size=96,
        width=24,
        depth=2,
        heads=4,
    ).eval()
    grids = {"encoder": ((4, 4, 4), (6, 6, 6)), "spatial": ((1, 4, 4), (1, 6, 6)), "temporal": ((4, 1, 1), (6, 1, 1))}
    state = backbone.state_dict()
    for key in [key for key in state if key.endswith("positions")]:
        patches = attention.resized(state[key][:, 1:], *grids[key.partition(".")[0]])
        state[key] = torch.cat([state[key][:, :1], patches], 1)
    larger.load_state_dict(state)
    backbone.interpolate_positions = True
    clips = filled_clip((2, 3, 12, 96, 96))
    assert torch.equal(backbone(clips)["features"], larger(clips)["features"])


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        (torch.zeros(1, 3, 8, 64, 72), "blocks of 2 frames of 16x16 pixels, which do not tile 8 frames of 64x72"),
        (torch.zeros(1, 3, 7, 64, 64), "which do not tile 7 frames of 64x64: take multiples"),
        (torch.zeros(1, 3, 1, 64, 64), "needs at least 2 frames of 16x16"),
        (torch.zeros(1, 3, 8, 8, 64), "needs at least 2 frames of 16x16"),
        (torch.zeros(1, 4, 8, 64, 64), r"takes clips \(B, 3, T, H, W\)"),
        (torch.zeros(1, 3, 8, 64, 64, dtype=torch.uint8), "call normalise"),
    ],
)
@pytest.mark.parametrize("kind", [ViViT, FactorisedViViT])
def test_clips_that_cannot_be_meant(kind: Any, clips: Tensor, message: str) -> None:
    backbone = small(kind)
    backbone.interpolate_positions = True
    with pytest.raises(RecipeError, match=message):
        backbone(clips)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("prefix", ["", "model.", "module."])
@pytest.mark.parametrize("release", [4, 5])
def test_every_spelling_of_a_published_file_loads(prefix: str, release: int, tmp_path: Path) -> None:
    backbone = small(ViViT)
    state = published_names(backbone)
    state = named_as_5(state) if release == 5 else state
    state["vivit.pooler.dense.weight"] = torch.zeros(24, 24)  # follows the feature
    torch.save({"state_dict": {prefix + key: value for key, value in state.items()}}, tmp_path / "a.pth")
    again = load_backbone(tmp_path / "a.pth")
    assert isinstance(again, ViViT)
    assert again.state_dict().keys() == backbone.state_dict().keys()
    assert all(torch.equal(value, backbone.state_dict()[key]) for key, value in again.state_dict().items())
    assert again.spec == backbone.spec


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("kind", [ViViT, FactorisedViViT])
@torch.inference_mode()
def test_what_tad_saves_it_loads(kind: Any, tmp_path: Path) -> None:
    for classes in (5, None):
        backbone = small(kind, classes=classes)
        family = "tad ViViT factorised encoder" if kind is FactorisedViViT else "tad ViViT"
        assert family_of(backbone.state_dict().keys()) == family
        save_file(backbone.state_dict(), tmp_path / "backbone.safetensors")
        again = load_backbone(tmp_path / "backbone.safetensors")
        assert again.spec == backbone.spec
        clips = filled_clip((1, 3, 8, 64, 64))
        assert torch.equal(again(clips)["features"], backbone(clips)["features"])
    with pytest.raises(RecipeError, match="has no classifier"):
        again.classify(torch.zeros(1, 24))


@pytest.mark.usefixtures("tiny")
def test_files_that_do_not_fit_are_refused_by_name() -> None:
    state = published_names(small(ViViT))

    def changed(key: str, value: Tensor | None = None) -> dict[str, Tensor]:
        rest = {k: v for k, v in state.items() if k != key}
        return rest if value is None else rest | {key: value}

    cases = [
        (changed("vivit.layernorm.bias"), "1 tensors missing: encoder.norm.bias"),
        (changed("vivit.encoder.layer.1.attention.attention.key.weight"), "missing: encoder.blocks.1.attn.qkv.weight"),
        (changed("vivit.encoder.layer.0.scale", torch.zeros(1)), r"unexpected: encoder.blocks.0.scale"),
        (changed("vivit.embeddings.position_embeddings"), "position_embeddings is missing"),
        (changed("vivit.embeddings.position_embeddings", torch.zeros(1, 1, 24)), "no positions beside"),
        (changed("classifier.bias"), "missing: head.bias"),
        (changed("classifier.weight", torch.zeros(7, 24)), r"head.bias is \[5\], the network has \[7\]"),
        (
            changed("vivit.encoder.layer.0.attention.attention.query.weight", torch.zeros(12, 24)),
            r"unexpected: .*encoder.blocks.0.attn.q.weight",
        ),
        (
            published_names(small(ViViT, depth=3)),
            "looks like a file of ViViT, transformers, but depth is 3 in the file and 2 in vivit-b",
        ),
        (published_names(small(ViViT, width=32)), "width is 32 in the file and 24 in vivit-b"),
        (
            small(FactorisedViViT, temporal_depth=2).state_dict(),
            "tad ViViT factorised encoder, but temporal_depth is 2 in the file and 3 in vivit-b-fe",
        ),
    ]
    for wrong, message in cases:
        with pytest.raises(WeightsError, match=message):
            load_backbone(wrong)
    with pytest.raises(WeightsError, match="holds vivit-b-fe, not vivit-b"):
        build_backbone("vivit-b", small(FactorisedViViT).state_dict())
    crooked = small(FactorisedViViT).state_dict() | {"spatial.positions": torch.zeros(1, 12, 24)}
    with pytest.raises(WeightsError, match="positions for 11 patches a frame, which are no square"):
        load_backbone(crooked)


@pytest.mark.parametrize(
    ("tokens", "tubelet", "frames", "size"),
    [
        (16 * 14 * 14, (2, 16, 16), 32, 224),
        (8 * 14 * 14, (2, 16, 16), 16, 224),
        (64 * 14 * 14, (2, 16, 16), 128, 224),
        (8 * 14 * 14, (4, 16, 16), 32, 224),
        (16 * 20 * 20, (2, 16, 16), 32, 320),
        (16 * 7 * 7, (2, 32, 32), 32, 224),
        (4 * 4 * 4, (2, 16, 16), 8, 64),
    ],
)
def test_the_clip_behind_a_number_of_tokens(tokens: int, tubelet: tuple[int, int, int], frames: int, size: int) -> None:
    assert clip_of(tokens, tubelet, "positions") == {"frames": frames, "image_size": size}


# ---- behaviour -------------------------------------------------------------------------------------------------------


def test_parameter_counts() -> None:
    with torch.device("meta"):
        joint, factorised = ViViT(classes=None), FactorisedViViT()
        assert sum(p.numel() for p in joint.parameters()) == 88_646_400
        assert sum(p.numel() for p in ViViT().parameters()) == 88_954_000
    # 115.1 million in table 2 of the paper
    assert sum(p.numel() for p in factorised.parameters()) == 115_062_928
    assert joint.spec == SPECS["vivit-b"]
    assert factorised.spec == SPECS["vivit-b-fe"]
    for spec in (joint.spec, factorised.spec):
        assert (spec.frames, spec.interval, spec.stride, spec.short_side, spec.crop) == (32, 2, 16, 256, (224, 224))
        assert not spec.any_size
        assert not spec.any_length


def test_pixels_are_mapped_to_minus_one_to_one() -> None:
    for kind in (ViViT, FactorisedViViT):
        clips = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 3, 1, 1).expand(1, 3, 3, 1, 1)
        assert torch.allclose(small(kind).normalise(clips)[0, 2, :, 0, 0], torch.tensor([-1.0, -0.6, 1.0]), atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("kind", [ViViT, FactorisedViViT])
def test_a_batch_is_its_clips_one_by_one_and_views_are_no_matter(kind: Any) -> None:
    backbone = small(kind).double()
    frames = filled_clip((3, 8, 64, 64, 3)).double()
    clips = frames.permute(0, 4, 1, 2, 3)  # as extraction hands them over
    together = backbone(clips)["features"]
    for row in range(3):
        alone = backbone(clips[row : row + 1].contiguous())["features"]
        assert relative_error(together[row], alone[0].numpy()) < 1e-11
    assert backbone(clips[:0])["features"].shape == (0, 24)
    assert backbone.fuse() is backbone  # there is nothing to fold
    assert torch.equal(backbone(clips)["features"], together)


@pytest.mark.parametrize("kind", [ViViT, FactorisedViViT])
def test_every_tensor_is_trained(kind: Any) -> None:
    backbone = small(kind, dropout=0.5).train()
    features = backbone(filled_clip((2, 3, 8, 64, 64)))["features"]
    first, second = backbone.classify(features), backbone.classify(features)
    assert not torch.equal(first, second)
    first.square().sum().backward()
    still = {name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert not still
    backbone.eval()
    assert torch.equal(backbone.classify(features), backbone.classify(features))


@torch.inference_mode()
def test_factorised_encoder_sees_time_only_through_its_second_transformer() -> None:
    backbone = small(FactorisedViViT)
    clips = filled_clip((1, 3, 8, 64, 64))
    swapped = clips.unflatten(2, (4, 2)).flip(2).flatten(2, 3)  # tubelets in the opposite order
    assert relative_error(backbone(clips)["features"], backbone(swapped)["features"].numpy()) > 1e-2
    backbone.temporal.positions[0, 1:] = backbone.temporal.positions[0, 1]
    assert relative_error(backbone(clips)["features"], backbone(swapped)["features"].numpy()) < 1e-4


def test_wrong_uses_say_so() -> None:
    with pytest.raises(RecipeError, match="which do not tile 31 frames of 224x224"):
        ViViT(frames=31)
    with pytest.raises(RecipeError, match="which do not tile 32 frames of 100x100"):
        FactorisedViViT(image_size=100)
    with pytest.raises(RecipeError, match="5 attention heads do not share 24 channels evenly"):
        small(ViViT, heads=5)
    with pytest.raises(RecipeError, match="vivit-b has no classifier"):
        small(ViViT, classes=None).classify(torch.zeros(1, 24))
