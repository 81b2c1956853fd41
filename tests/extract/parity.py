"""Comparing a residual network with the recorded outputs of its public implementation, and with a plain writing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad.extract.backbones import BACKBONES, Backbone, load_backbone
from tad.extract.weights import family_of, renamed, unwrap
from tests.extract.filler import filled_clip, filled_state, golden, relative_error, state_sha256

SUFFIXES = {"A": "", "A_rect": "_rect", "A_nat": "_nat"}
Loaded = tuple[Backbone, dict[str, Any], dict[str, np.ndarray]]


def loaded_golden(shared: Path, name: str, folder: Path) -> Loaded:
    """The golden weights under the public key names, through a file and the real loading path."""
    record, arrays = golden(shared, name)
    state = filled_state(record["keys"], record["gain"])
    assert state_sha256(state) == record["filled_state_sha256"]
    path = folder / f"{name}.pth"
    torch.save({"state_dict": state, "epoch": 3} if name.startswith("mma_") else state, path)
    try:
        return load_backbone(path), record, arrays
    finally:
        path.unlink()


def golden_clip(record: Mapping[str, Any], tag: str = "A") -> Tensor:
    """The recorded input as (1, 3, T, H, W); networks of single frames were given (T, 3, H, W)."""
    clip = filled_clip(record["inputs"][tag]["shape"], record["inputs"][tag]["seed"])
    return clip if clip.ndim == 5 else clip.transpose(0, 1)[None]


def error(value: Tensor, expected: Tensor | np.ndarray, std: float | None = None) -> float:
    expected = np.asarray(expected, np.float64)
    if std is None:
        return relative_error(value.detach(), expected)
    return float(np.abs(value.detach().numpy() - expected).max() / std)


def check_outputs(loaded: Loaded, tag: str, endpoints: Mapping[str, str], tolerance: float = 1e-4) -> dict[str, Tensor]:
    """Features and level maps against what was recorded; ``endpoints`` names the record of each level."""
    backbone, record, arrays = loaded
    suffix = SUFFIXES[tag]
    clip = golden_clip(record, tag)
    outputs = backbone(clip, levels=True)
    assert list(outputs) == ["features", *backbone.spec.levels] == ["features", *endpoints]
    assert error(outputs["features"][0], arrays[f"feature{suffix}"]) < tolerance
    assert outputs["features"].shape == (1, backbone.spec.width)
    for level, name in endpoints.items():
        map_, std = outputs[level][0], float(arrays[f"{name}{suffix}__stats"][1])  # (C, T', H', W')
        shape = arrays[f"{name}{suffix}__shape"].tolist()
        assert list(map_.shape) == (shape[1:] if len(shape) == 5 else [shape[1], shape[0], *shape[2:]])
        info = backbone.spec.levels[level]
        assert (map_.shape[0], map_.shape[1]) == (info.channels, -(-clip.shape[2] // info.stride))
        assert error(map_.mean((1, 2, 3)), arrays[f"{name}{suffix}__gap"]) < tolerance
        assert error(map_[:16, 0, :3, :3], arrays[f"{name}{suffix}__slice0"], std) < tolerance
        assert error(map_[:16, -1, -3:, -3:], arrays[f"{name}{suffix}__slice"], std) < tolerance
        stats = torch.stack([map_.mean(), map_.std(correction=0), map_.abs().max()])
        assert error(stats, arrays[f"{name}{suffix}__stats"], std) < tolerance
    return outputs


def check_keys_land(keys: Mapping[str, list[int]], name: str, prefixes: Sequence[str] = ("", "model.")) -> None:
    """Every public key has its place, in its shape, in the network called ``name``, and no place stays empty; also
    with one of the ``prefixes`` before every key. No other network takes the file.
    """
    built: dict[str, dict[str, torch.Size]] = {}
    for prefix in prefixes:
        empty = {f"{prefix}{key}": torch.zeros(()).expand(shape) for key, shape in keys.items()}
        state = unwrap(empty, where="the state")
        family, matching = family_of(state.keys()), []
        for other, entry in BACKBONES.items():
            for layout in entry.layouts:
                if layout.family == family:
                    read = layout.arguments(state)
                    if all(read.get(key) == value for key, value in entry.arguments.items()):
                        matching.append((other, entry, layout, read))
        assert [other for other, *_ in matching] == [name]
        _, entry, layout, read = matching[0]
        if str(read) not in built:
            with torch.device("meta"):
                own = tensors_of(entry.build(**{**entry.arguments, **read}))
            built[str(read)] = {key: value.shape for key, value in own.items()}
        theirs = layout.convert(renamed(state, layout.rename, where="the state"))
        assert {key: value.shape for key, value in theirs.items()} == built[str(read)]
    assert len(built) == 1  # the prefix changes nothing


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The weights and statistics, without the description that stands beside them in the state dict."""
    return {key: value for key, value in module.state_dict().items() if not key.endswith("_extra_state")}


def check_parameters(name: str, plain: int) -> None:
    """``plain`` parameters without the classifier, and that of 400 classes."""
    entry = BACKBONES[name]
    with torch.device("meta"):
        network = entry.build(**entry.arguments)
    numbers = {key: value.numel() for key, value in network.named_parameters()}
    assert sum(value for key, value in numbers.items() if not key.startswith("classifier.")) == plain
    assert sum(numbers.values()) == plain + (entry.spec.width + 1) * 400


def check_batches(backbone: Backbone, clips: Tensor) -> None:
    """Clips together are the clips one by one, in double precision also their maps; no clips give no features."""
    backbone = backbone.double()
    together = backbone(clips.double(), levels=True)
    for row in range(clips.shape[0]):
        alone = backbone(clips[row : row + 1].double(), levels=True)
        assert all(error(together[key][row], value[0]) < 1e-10 for key, value in alone.items())
    backbone.float()
    assert backbone(clips[:0])["features"].shape == (0, backbone.spec.width)
    before = clips.clone()
    view = clips.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)  # as extraction hands them over
    assert error(backbone(view)["features"], backbone(clips)["features"]) < 3e-5
    assert torch.equal(clips, before)


def check_training(backbone: Backbone, clips: Tensor) -> None:
    """A training step reaches every parameter; so do gradients through the network folded for inference."""
    backbone = copy.deepcopy(backbone).train()
    backbone.classify(backbone(clips)["features"]).square().mean().backward()
    grads = {name: value.grad for name, value in backbone.named_parameters()}
    assert all(grad is not None and bool(grad.isfinite().all()) and bool(grad.any()) for grad in grads.values())
    clips = clips.clone().requires_grad_()
    backbone.eval().fuse()(clips)["features"].sum().backward()
    assert clips.grad is not None
    assert bool(clips.grad.any())


# ---- a plain writing of the layers, straight from a state dict, in the public files' own arithmetic ------------------


def norm(state: Mapping[str, Tensor], x: Tensor, name: str, eps: float) -> Tensor:
    """Batch norm by its formula."""
    mean, var, weight, bias = (
        state[f"{name}.{part}"].view(1, -1, *[1] * (x.ndim - 2))
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(var + eps) * weight + bias


def conv(state: Mapping[str, Tensor], x: Tensor, name: str, stride: int | tuple[int, ...] = 1) -> Tensor:
    """Convolution with half its kernel of zeros around, channel-wise where its weight is."""
    weight = state[f"{name}.weight"]
    function: Callable[..., Tensor] = F.conv3d if x.ndim == 5 else F.conv2d
    padding = tuple(size // 2 for size in weight.shape[2:])
    return function(x, weight, None, stride, padding, 1, x.shape[1] // weight.shape[1])
