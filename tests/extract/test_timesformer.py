"""TimeSformer against recorded outputs of the official code and of transformers, and against invariants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from tad.extract.backbones.timesformer import TimeSformer
from tad.extract.weights import family_of
from tests.extract.filler import filled_clip, filled_state, golden, relative_error, state_sha256

GOLDEN = ("fb_timesformer_base_small", "hf_timesformer_base_small")
FULL = ("fb_timesformer_base_8x32_k400", "hf_timesformer_base_k400")
BLOCK = {
    "norm1": (768,),
    "attn.qkv": (2304, 768),
    "attn.proj": (768, 768),
    "temporal_norm1": (768,),
    "temporal_attn.qkv": (2304, 768),
    "temporal_attn.proj": (768, 768),
    "temporal_fc": (768, 768),
    "norm2": (768,),
    "mlp.fc1": (3072, 768),
    "mlp.fc2": (768, 3072),
}
# The official name of a part → the one of transformers, and of mmaction2.
TRANSFORMERS = {
    "norm1.": "layernorm_before.",
    "attn.qkv.": "attention.attention.qkv.",
    "attn.proj.": "attention.output.dense.",
    "temporal_norm1.": "temporal_layernorm.",
    "temporal_attn.qkv.": "temporal_attention.attention.qkv.",
    "temporal_attn.proj.": "temporal_attention.output.dense.",
    "temporal_fc.": "temporal_dense.",
    "norm2.": "layernorm_after.",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
}
MMACTION = {
    "norm1.": "attentions.1.norm.",
    "attn.qkv.": "attentions.1.attn.in_proj_",
    "attn.proj.": "attentions.1.attn.out_proj.",
    "temporal_norm1.": "attentions.0.norm.",
    "temporal_attn.qkv.": "attentions.0.attn.in_proj_",
    "temporal_attn.proj.": "attentions.0.attn.out_proj.",
    "temporal_fc.": "attentions.0.temporal_fc.",
    "norm2.": "ffns.0.norm.",
    "mlp.fc1.": "ffns.0.layers.0.0.",
    "mlp.fc2.": "ffns.0.layers.1.",
}


def official_shapes(frames: int, patches: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official files."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.cls_token": (1, 1, 768),
        "model.pos_embed": (1, 1 + patches, 768),
        "model.time_embed": (1, frames, 768),
    }
    parts = {f"blocks.{i}.{name}": shape for i in range(12) for name, shape in BLOCK.items()}
    parts |= {"patch_embed.proj": (768, 3, 16, 16), "norm": (768,), "head": (400, 768)}
    for name, shape in parts.items():
        shapes |= {f"model.{name}.weight": shape, f"model.{name}.bias": shape[:1]}
    return shapes


def renamed(
    state: Mapping[str, Tensor], parts: Mapping[str, str], blocks: str, outside: Mapping[str, str]
) -> dict[str, Tensor]:
    """Official names (without ``model.``) → those of another code base."""
    result = {}
    for key, value in state.items():
        words = key.split(".", 2)
        if words[0] == "blocks":
            part = max((old for old in parts if words[2].startswith(old)), key=len)
            key = f"{blocks}.{words[1]}.{parts[part]}{words[2].removeprefix(part)}"
        else:
            key = next((new + key.removeprefix(old) for old, new in outside.items() if key.startswith(old)), key)
        result[key] = value
    return result


def as_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    inside = "timesformer.embeddings"
    outside = {
        "cls_token": f"{inside}.cls_token",
        "pos_embed": f"{inside}.position_embeddings",
        "time_embed": f"{inside}.time_embeddings",
        "patch_embed.proj.": f"{inside}.patch_embeddings.projection.",
        "norm.": "timesformer.layernorm.",
        "head.": "classifier.",
    }
    return renamed(state, TRANSFORMERS, "timesformer.encoder.layer", outside)


def as_mmaction(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    outside = {
        "cls_token": "backbone.cls_token",
        "pos_embed": "backbone.pos_embed",
        "time_embed": "backbone.time_embed",
        "patch_embed.proj.": "backbone.patch_embed.projection.",
        "norm.": "backbone.norm.",
        "head.": "cls_head.fc_cls.",
    }
    return renamed(state, MMACTION, "backbone.transformer_layers.layers", outside)


def as_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{key}": value for key, value in state.items()}


SPELLINGS: dict[str, tuple[Callable[[Mapping[str, Tensor]], dict[str, Tensor]], str]] = {
    "official": (as_official, "TimeSformer, official"),
    "own": (dict, "TimeSformer, official"),
    "transformers": (as_transformers, "TimeSformer, transformers"),
    "mmaction": (as_mmaction, "mmaction2 TimeSformer"),
}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Filled weights for 4 frames of 64x64 under the official names."""
    return filled_state(official_shapes(4, 4 * 4))


def through_a_file(state: Mapping[str, Tensor], path: Path) -> TimeSformer:
    torch.save({"model_state": dict(state), "epoch": 3}, path)
    backbone = load_backbone(path)
    path.unlink()
    assert isinstance(backbone, TimeSformer)
    return backbone


@pytest.fixture(scope="module")
def loaded(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> TimeSformer:
    return through_a_file(state, tmp_path_factory.mktemp("weights") / "TimeSformer.pyth")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """``timesformer-b`` stands for a tiny network, so that loading it costs nothing."""
    build = partial(TimeSformer, heads=4)
    entry = replace(BACKBONES["timesformer-b"], arguments={"width": 24, "depth": 2}, build=build)
    monkeypatch.setitem(BACKBONES, "timesformer-b", entry)


def small(seed: int = 0, **arguments: Any) -> TimeSformer:
    """A tiny network with weights that leave no tensor without effect."""
    arguments = {"classes": 5, "frames": 4, "image_size": 64, "width": 24, "depth": 2, "heads": 4} | arguments
    backbone = TimeSformer(**arguments).eval()
    rng = torch.Generator().manual_seed(seed)
    for key, value in backbone.state_dict().items():
        value.copy_(torch.randn(value.shape, generator=rng) * 0.3 + (1.0 if "norm" in key and "weight" in key else 0.0))
    return backbone


# ---- recorded outputs of the public code -----------------------------------------------------------------------------


def features_and_tokens(backbone: TimeSformer, clip: Tensor) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
    """The features, and what the first, a middle and the last block give: class token and patches."""
    outputs: dict[int, tuple[Tensor, Tensor]] = {}
    hooks = [backbone.blocks[i].register_forward_hook(lambda *a, i=i: outputs.__setitem__(i, a[2])) for i in (0, 5, 11)]
    features = backbone(clip, levels=True)["features"]
    for hook in hooks:
        hook.remove()
    return features, outputs


def compare(backbone: TimeSformer, record: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    transformers = record["model"].startswith("hf_")
    for tag, given in record["inputs"].items():
        suffix = "" if tag == "A" else "_rect"
        clip = filled_clip(given["shape"], given["seed"])
        clip = clip.transpose(1, 2) if transformers else clip  # (B, C, T, H, W)
        if tag == "A_rect":
            with pytest.raises(RecipeError, match="set interpolate_positions"):
                backbone(clip)
        backbone.interpolate_positions = tag == "A_rect"
        features, outputs = features_and_tokens(backbone, clip)
        assert relative_error(features[0], arrays[f"feature{suffix}"]) < 1e-4
        assert relative_error(backbone.classify(features)[0], arrays[f"logits{suffix}"].reshape(-1)) < 1e-4
        for i, (cls, x) in outputs.items():
            tokens = torch.cat([cls[0], x[0].transpose(0, 1).flatten(0, 1)])  # theirs run through time fastest
            name = f"{'layer' if transformers else 'block'}{i}{suffix}"
            std = float(arrays[f"{name}__stats"][1])
            assert [1, *tokens.shape] == arrays[f"{name}__shape"].tolist()
            assert relative_error(tokens.mean(0), arrays[f"{name}__gap"]) < 1e-4
            assert (tokens[:4, :32] - torch.from_numpy(arrays[f"{name}__slice0"])).abs().max() < 1e-4 * std
            assert (tokens[-4:, :32] - torch.from_numpy(arrays[f"{name}__slice"])).abs().max() < 1e-4 * std
    backbone.interpolate_positions = False


@torch.inference_mode()
def test_outputs_are_those_of_the_official_code(shared: Path, state: dict[str, Tensor], loaded: TimeSformer) -> None:
    record, arrays = golden(shared, GOLDEN[0])
    assert {key: list(value.shape) for key, value in state.items()} == record["keys"]
    assert sum(p.numel() for p in loaded.parameters()) == record["n_params"]
    compare(loaded, record, arrays)


@torch.inference_mode()
def test_outputs_are_those_of_transformers(shared: Path, tmp_path: Path) -> None:
    record, arrays = golden(shared, GOLDEN[1])
    weights = filled_state(record["keys"], record["gain"])
    assert state_sha256(weights) == record["filled_state_sha256"]
    compare(through_a_file(weights, tmp_path / "pytorch_model.bin"), record, arrays)


@torch.inference_mode()
def test_outputs_without_the_shared_folder(state: dict[str, Tensor], loaded: TimeSformer) -> None:
    assert state_sha256(state) == "1325cc4f113fc38b2eac6051e26c4a2281b1c812dbeca4ac18ed8dc138688faa"
    features = loaded(filled_clip((1, 3, 4, 64, 64)))["features"]
    first = torch.tensor([0.753980, -0.450117, 0.273112, 0.290043, -1.082381, -0.700118])
    assert (features[0, :6] - first).abs().max() < 1e-4
    logits = torch.tensor([0.749547, -1.426897, 0.394875])
    assert (loaded.classify(features)[0, :3] - logits).abs().max() < 2e-4
    loaded.interpolate_positions = True
    wide = loaded(filled_clip((1, 3, 4, 64, 96)))["features"]
    loaded.interpolate_positions = False
    first = torch.tensor([-0.230766, -0.370010, -0.303814, -0.243068, 0.406383, 0.346328])
    assert (wide[0, :6] - first).abs().max() < 1e-4


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("name", FULL)
def test_full_size_outputs_are_those_of_the_public_code(shared: Path, tmp_path: Path, name: str) -> None:
    record, arrays = golden(shared, name)
    weights = filled_state(record["keys"], record["gain"])
    assert state_sha256(weights) == record["filled_state_sha256"]
    backbone = through_a_file(weights, tmp_path / "weights.pth")
    assert backbone.spec == SPECS["timesformer-b"]
    compare(backbone, record, arrays)


@torch.inference_mode()
def test_names_of_mmaction2_give_the_same_network_for_other_pixels(
    state: dict[str, Tensor], loaded: TimeSformer, tmp_path: Path
) -> None:
    weights = as_mmaction({key.removeprefix("model."): value for key, value in state.items()})
    assert "backbone.transformer_layers.layers.11.attentions.0.attn.in_proj_weight" in weights
    assert "backbone.transformer_layers.layers.0.ffns.0.layers.0.0.bias" in weights
    torch.save({"state_dict": weights, "meta": {}}, tmp_path / "mm.pth")
    backbone = load_backbone(tmp_path / "mm.pth")
    (tmp_path / "mm.pth").unlink()
    clip = filled_clip((1, 3, 4, 64, 64))
    assert torch.equal(backbone(clip)["features"], loaded(clip)["features"])
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1, 1).expand(1, 3, 2, 1, 1)
    assert torch.allclose(backbone.normalise(pixels)[0, 1, :, 0, 0], torch.tensor([-1.0, 1.0]), atol=1e-6)
    assert torch.allclose(loaded.normalise(pixels)[0, 1, :, 0, 0], torch.tensor([-2.0, 0.55 / 0.225]), atol=1e-6)
    assert (backbone.spec.grid_fps, loaded.spec.grid_fps) == (None, 30.0)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_close(loaded: TimeSformer, dtype: torch.dtype) -> None:
    clip = filled_clip((1, 3, 4, 64, 64))
    exact = loaded(clip)["features"]
    with torch.autocast("cpu", dtype=dtype):
        half = loaded(clip)["features"].float()
    assert torch.cosine_similarity(exact, half).item() > 0.999
    assert not torch.equal(exact, half)


# ---- positions and invariants ----------------------------------------------------------------------------------------


@torch.inference_mode()
def test_native_clips_are_untouched_by_interpolation() -> None:
    backbone = small()
    clips = filled_clip((2, 3, 4, 64, 64))
    before = backbone(clips)["features"]
    backbone.interpolate_positions = True
    assert torch.equal(backbone(clips)["features"], before)


@torch.inference_mode()
def test_repeated_frames_change_nothing() -> None:
    """Twice the frames take the nearest positions in time, each twice: attention over doubled tokens is the same."""
    backbone = small().double()
    clip = filled_clip((1, 3, 4, 64, 64)).double()
    doubled = clip.repeat_interleave(2, dim=2)
    with pytest.raises(RecipeError, match="has positions for 4 frames of 64x64, got clips of 8 frames of 64x64"):
        backbone(doubled)
    backbone.interpolate_positions = True
    expected = backbone(clip)["features"].numpy()
    assert relative_error(backbone(doubled)["features"], expected) < 1e-12
    assert relative_error(backbone(clip.repeat(1, 1, 2, 1, 1))["features"], expected) > 1e-2  # another order


@torch.inference_mode()
def test_positions_of_another_size_are_the_nearest() -> None:
    backbone = small()
    space, time = backbone.positions_for((6, 8, 2))
    table = backbone.pos_embed[0, 1:].unflatten(0, (4, 4))
    rows, columns = [i // 2 for i in range(8)], [0, 2]
    assert torch.equal(space[:, :1], backbone.pos_embed[:, :1])
    assert torch.equal(space[0, 1:].unflatten(0, (8, 2)), table[rows][:, columns])
    assert torch.equal(time[0], backbone.time_embed[0, [0, 0, 1, 2, 2, 3]])
    backbone.interpolate_positions = True
    assert backbone(filled_clip((1, 3, 6, 128, 32)))["features"].shape == (1, 24)


@torch.inference_mode()
def test_as_many_patches_in_another_shape_are_another_grid() -> None:
    backbone = small()
    backbone.interpolate_positions = True
    space, _ = backbone.positions_for((4, 2, 8))
    assert not torch.equal(space, backbone.pos_embed)
    assert torch.equal(space[0, 1:].unflatten(0, (2, 8))[1, ::2], backbone.pos_embed[0, 1:].unflatten(0, (4, 4))[2])


@torch.inference_mode()
def test_time_is_seen_through_the_positions_alone() -> None:
    backbone = small()
    clip = filled_clip((1, 3, 4, 64, 64))
    expected = backbone(clip)["features"].numpy()
    assert relative_error(backbone(clip.flip(2))["features"], expected) > 1e-2
    backbone.time_embed.copy_(backbone.time_embed[:, :1].expand_as(backbone.time_embed))
    expected = backbone(clip)["features"].numpy()
    assert relative_error(backbone(clip.flip(2))["features"], expected) < 1e-4


@torch.inference_mode()
def test_a_batch_is_its_clips_one_by_one_and_views_are_no_matter() -> None:
    backbone = small().double()
    frames = filled_clip((3, 4, 64, 64, 3)).double()
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
    features = backbone(filled_clip((2, 3, 4, 64, 64)))["features"]
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
        (torch.zeros(1, 3, 4, 64, 72), "blocks of 1 frames of 16x16 pixels, which do not tile 4 frames of 64x72"),
        (torch.zeros(1, 3, 0, 64, 64), "needs at least 1 frames"),
        (torch.zeros(1, 3, 4, 8, 64), "needs at least 1 frames of 16x16"),
        (torch.zeros(1, 2, 4, 64, 64), r"takes clips \(B, 3, T, H, W\)"),
        (torch.zeros(1, 3, 4, 64, 64, dtype=torch.uint8), "call normalise"),
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
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_file_loads(spelling: str, prefix: str, tmp_path: Path) -> None:
    backbone = small(classes=7)
    rename, family = SPELLINGS[spelling]
    state = rename(backbone.state_dict())
    assert family_of(state.keys()) == family
    prefix = "" if spelling == "official" and prefix == "model." else prefix  # it has it already
    save_file({prefix + key: value for key, value in state.items()}, tmp_path / "a.safetensors")
    again = load_backbone(tmp_path / "a.safetensors")
    ours = backbone.state_dict()
    assert again.state_dict().keys() == ours.keys()
    assert all(torch.equal(value, ours[key]) for key, value in again.state_dict().items())
    assert (again.spec.frames, again.spec.crop, again.spec.width) == (4, (64, 64), 24)
    without = {key: value for key, value in state.items() if not key.startswith(("model.head", "head", "cl"))}
    without |= {key: value for key, value in state.items() if "cls_token" in key}
    with pytest.raises(RecipeError, match="has no classifier"):
        load_backbone(without).classify(torch.zeros(1, 24))


@pytest.mark.usefixtures("tiny")
def test_files_that_do_not_fit_are_refused_by_name() -> None:
    state = as_official(small().state_dict())

    def changed(key: str, value: Tensor | None = None) -> dict[str, Tensor]:
        rest = {k: v for k, v in state.items() if k != key}
        return rest if value is None else rest | {key: value}

    cases = [
        (changed("model.norm.bias"), "1 tensors missing: norm.bias"),
        (changed("model.blocks.1.temporal_fc.weight"), "1 tensors missing: blocks.1.temporal_fc.weight"),
        (changed("model.blocks.0.extra", torch.zeros(1)), "1 tensors unexpected: blocks.0.extra"),
        (changed("model.time_embed"), "time_embed is missing"),
        (changed("model.pos_embed", torch.zeros(1, 14, 24)), "13 patches a frame, which are no square"),
        (changed("model.head.weight", torch.zeros(5, 23)), r"head.weight is \[5, 23\], the network has \[5, 24\]"),
        (as_official(small(depth=1).state_dict()), "depth is 1 in the file and 2 in timesformer-b"),
        (as_mmaction(small(width=32).state_dict()), "mmaction2 TimeSformer, but width is 32 in the file and 24"),
    ]
    for wrong, message in cases:
        with pytest.raises(WeightsError, match=message):
            load_backbone(wrong)


def test_published_variants_declare_their_clips() -> None:
    with torch.device("meta"):
        base = TimeSformer(classes=None)
        high, long, other = (TimeSformer(frames=n, image_size=s) for n, s in ((16, 448), (96, 224), (32, 224)))
        assert sum(p.numel() for p in TimeSformer().parameters()) == 121_566_352
    assert sum(p.numel() for p in base.parameters()) == 121_258_752
    assert base.spec == SPECS["timesformer-b"]
    clips = [(b.spec.frames, b.spec.interval, b.spec.crop, b.spec.short_side) for b in (base, high, long, other)]
    assert clips == [
        (8, 32, (224, 224), 224),
        (16, 16, (448, 448), 448),
        (96, 4, (224, 224), 224),
        (32, 32, (224, 224), 224),
    ]
    assert not base.spec.any_size
    assert not base.spec.any_length
    with pytest.raises(RecipeError, match="do not tile 8 frames of 230x230"):
        TimeSformer(image_size=230)
