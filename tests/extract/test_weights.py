"""Reading, verifying, recognising and loading checkpoints."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from tad.errors import RecipeError, TadError, WeightsError
from tad.extract.backbones import BACKBONES, GROUPS, build_backbone, load_backbone
from tad.extract.weights import (
    FAMILIES,
    Layout,
    axis_size,
    family_of,
    load_into,
    read_state_dict,
    renamed,
    sha256_of,
    sha256_of_state,
    unwrap,
)
from tests.extract.filler import filled_clip, filled_state, golden, state_sha256

SMALL = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "a.bias": torch.tensor([1.5, -2.0]),
    "n.num_batches_tracked": torch.tensor(3),
}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def rgb() -> dict[str, Tensor]:
    shapes = {key: value.shape for key, value in build_backbone("i3d-rgb").state_dict().items()}
    return filled_state(shapes)


@pytest.fixture(scope="module")
def clip() -> Tensor:
    return filled_clip((1, 3, 9, 33, 32))


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_wrappers_and_prefixes_come_off(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    state: dict[str, Any] = {prefix + key: value for key, value in SMALL.items()}
    content = (
        state
        if wrapper is None
        else {"epoch": 3, "meta": {"classes": ["a"]}, wrapper: state, "optimizer": {"lr": [0.1]}}
    )
    torch.save(content, tmp_path / "x.pyth")
    assert same(read_state_dict(tmp_path / "x.pyth"), SMALL)


def test_kinds_of_files(tmp_path: Path) -> None:
    torch.save(OrderedDict(SMALL), tmp_path / "zip.pth")
    torch.save(SMALL, tmp_path / "old.pt", _use_new_zipfile_serialization=False)  # the form of before torch 1.6
    torch.save({"state_dict": {"model": SMALL}}, tmp_path / "twice.pt")
    save_file(SMALL, tmp_path / "safe.safetensors")
    for path in tmp_path.iterdir():
        assert same(read_state_dict(path), SMALL), path
    parameter = {"w": nn.Parameter(torch.ones(2))}
    assert not unwrap(parameter, where="x")["w"].requires_grad


def test_a_prefix_that_only_some_have_stays() -> None:
    state = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert set(unwrap(state, where="x")) == {"module.a", "b"}


def bytes_of(content: object) -> bytes:
    return pickle.dumps(content, protocol=2)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"<!DOCTYPE html>Not Found", b"version https://git-lfs.github.com/spec/v1\n", b"\x00" * 4096, b"PK\x03\x04"],
)
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"no checkpoint, or a damaged") as caught:
        read_state_dict(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("new", [True, False])
def test_truncated_anywhere(tmp_path: Path, new: bool) -> None:
    whole = tmp_path / "whole.pt"
    torch.save(SMALL, whole, _use_new_zipfile_serialization=new)
    data = whole.read_bytes()
    cut = tmp_path / "cut.pt"
    for length in range(0, len(data) - 1, max(1, len(data) // 60)):
        cut.write_bytes(data[:length])
        with pytest.raises(WeightsError):
            read_state_dict(cut)
    save_file(SMALL, tmp_path / "safe.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "safe.safetensors").read_bytes()[:-3])
    with pytest.raises(WeightsError):
        read_state_dict(tmp_path / "cut.safetensors")


@given(data=st.binary(max_size=200), start=st.sampled_from([b"", b"\x80\x02", b"\x80\x02}q\x00", b"PK\x03\x04"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise_is_a_weights_error_whatever_it_is(tmp_path: Path, data: bytes, start: bytes) -> None:
    path = tmp_path / "noise.pt"
    path.write_bytes(start + data)
    with pytest.raises(WeightsError):
        read_state_dict(path)


def test_missing_files(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pt", tmp_path, tmp_path / "absent.safetensors"):
        for function in (read_state_dict, sha256_of, load_backbone):
            with pytest.raises(WeightsError, match="cannot be read") as caught:
                function(path)
            assert str(path) in str(caught.value)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickled_objects_are_refused_and_never_run(tmp_path: Path) -> None:
    torch.save({"state_dict": SMALL, "x": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    (tmp_path / "evil.pth").write_bytes(bytes_of(Evil(tmp_path / "ran")))
    torch.save({"model": SMALL, "args": argparse.Namespace(lr=1)}, tmp_path / "args.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    (tmp_path / "caffe2.pth").write_bytes(bytes_of({"blobs": {"conv1_w": np.zeros(3, np.float32)}}))
    objects = {
        "evil.pt": "mkdir",
        "evil.pth": "mkdir",
        "args.pth": "argparse.Namespace",
        "module.pt": "Linear",
        "caffe2.pth": "numpy",
    }
    for name, object_ in objects.items():
        with pytest.raises(WeightsError, match=rf"{name} need pickle.*{object_}.*weights_only=False"):
            read_state_dict(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(2), "holds a Tensor, expected a dictionary of tensors"),
        ([torch.zeros(2)], "holds a list"),
        ({}, "holds no tensors"),
        ({"state_dict": {}}, "holds no tensors"),
        (
            {"net": {"w": torch.zeros(1)}, "epoch": 3},
            "no state dict: net, epoch are no tensors.*state_dict, model_state",
        ),
        ({3: torch.zeros(2)}, "no state dict: 3 are no tensors"),
    ],
)
def test_contents_without_a_state_dict(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=message):
        read_state_dict(tmp_path / "x.pt")


# ---- hashes ----------------------------------------------------------------------------------------------------------


def test_hash_of_a_file_is_read_again_only_when_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(b"one")
    stamp = path.stat().st_mtime_ns
    assert sha256_of(path) == sha256_of(str(path)) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two")
    os.utime(path, ns=(stamp, stamp))
    assert sha256_of(path) == hashlib.sha256(b"one").hexdigest()  # same size and time: it was not read again
    os.utime(path, ns=(stamp + 1, stamp + 1))
    assert sha256_of(path) == hashlib.sha256(b"two").hexdigest()


def test_hash_of_tensors_is_over_sorted_keys_and_bytes() -> None:
    assert sha256_of_state(SMALL) == sha256_of_state(dict(reversed(SMALL.items()))) == state_sha256(SMALL)
    strided = {"w": torch.arange(6.0).view(2, 3).t()}
    assert sha256_of_state(strided) == sha256_of_state({"w": strided["w"].contiguous()})
    assert (
        sha256_of_state({"w": torch.ones(2, dtype=torch.bfloat16)})
        == hashlib.sha256(b"w" + b"\x80\x3f" * 2).hexdigest()
    )
    assert sha256_of_state({"v": SMALL["a.bias"]}) != sha256_of_state({"w": SMALL["a.bias"]})
    sha256_of_state({"empty": torch.zeros(0, 3)})


def test_expected_hash(tmp_path: Path, rgb: dict[str, Tensor]) -> None:
    path = tmp_path / "rgb.pt"
    torch.save(rgb, path)
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    for expected in (actual, actual.upper(), f"sha256:{actual}"):
        assert load_backbone(path, expected_sha256=expected).weights_id == f"sha256:{actual}"
    other = "0" * 64
    with pytest.raises(WeightsError, match=rf"sha256 is {actual}, expected {other}"):
        build_backbone("i3d-rgb", path, expected_sha256=other)
    with pytest.raises(WeightsError, match=other):
        load_backbone(rgb, expected_sha256=other)
    with pytest.raises(RecipeError, match="64 hexadecimal digits"):
        load_backbone(path, expected_sha256="abc")
    with pytest.raises(RecipeError, match="is no file"):
        build_backbone("i3d-rgb", "random", expected_sha256=actual)
    damaged = tmp_path / "damaged.pt"  # the hash is compared before anything is unpickled
    damaged.write_bytes(b"x")
    with pytest.raises(WeightsError, match="expected"):
        load_backbone(damaged, expected_sha256=other)


# ---- loading ---------------------------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))


def test_every_tensor_lands() -> None:
    source, target = net(), net()
    state = source.state_dict()
    del state["1.num_batches_tracked"]
    load_into(target, {key: value.half().float() for key, value in state.items()}, where="x")
    load_into(target, {key: value.double() for key, value in state.items()}, where="x")
    assert all(torch.equal(target.state_dict()[key], value) for key, value in state.items())
    assert target[0].weight.dtype == torch.float32


def test_what_does_not_fit_is_named_and_changes_nothing() -> None:
    module = net()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = {key: torch.full_like(value, 7) for key, value in before.items()}
    state["0.weight"] = torch.zeros(3, 2, 1, 1, 1)
    state["1.bias"] = torch.zeros(3, dtype=torch.int64)
    del state["1.running_mean"]
    state |= {f"head.{number}": torch.zeros(1) for number in range(7)}
    with pytest.raises(WeightsError) as caught:
        load_into(module, state, where="file.pt")
    message = str(caught.value)
    assert "file.pt does not fit Sequential" in message
    assert "1 tensors missing: 1.running_mean;" in message
    assert "7 tensors unexpected: head.0, head.1, head.2, head.3, head.4, ... (7 in all)" in message
    assert "head.5" not in message
    assert "0.weight is [3, 2, 1, 1, 1], the network has [3, 2, 1, 1]" in message
    assert "1.bias is [3] (not floating point), the network has [3]" in message
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    with pytest.raises(WeightsError, match=r"Sequential \(it looks like a file of pytorchvideo SlowFast\)"):
        load_into(module, {"blocks.0.multipathway_blocks.0.conv.weight": torch.zeros(1)}, where="x")


def test_two_tensors_for_one_place() -> None:
    with pytest.raises(WeightsError, match="x: two tensors stand for a, one of them is B"):
        renamed({"b": torch.zeros(1), "B": torch.zeros(1)}, lambda key: "a", where="x")
    assert list(renamed({"a": torch.zeros(1), "fc": torch.zeros(1)}, {"a": "b"}.get, where="x")) == ["b"]


def test_axis_size() -> None:
    assert axis_size(SMALL, "a.weight", 1) == 3
    with pytest.raises(WeightsError, match=r"b.weight is missing"):
        axis_size(SMALL, "b.weight", 0)
    with pytest.raises(WeightsError, match=r"a.bias has the shape \[2\]"):
        axis_size(SMALL, "a.bias", 1)


def test_files_of_torch_0_3_and_of_half_precision(tmp_path: Path, rgb: dict[str, Tensor], clip: Tensor) -> None:
    old = OrderedDict((f"module.{key}", value) for key, value in rgb.items() if not key.endswith("num_batches_tracked"))
    torch.save(old, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(
        {key: value.half() if value.is_floating_point() else value for key, value in rgb.items()},
        tmp_path / "half.safetensors",
    )
    with torch.inference_mode():
        expected = build_backbone("i3d-rgb", rgb)(clip)["features"]
        assert torch.equal(build_backbone("i3d-rgb", tmp_path / "old.pt")(clip)["features"], expected)
        half = load_backbone(tmp_path / "half.safetensors")
        assert half.logits.conv3d.weight.dtype == torch.float32
        assert 0 < float((half(clip)["features"] - expected).abs().max()) < 0.05 * float(expected.std())


def test_a_state_dict_is_hashed_by_its_tensors(rgb: dict[str, Tensor]) -> None:
    backbone = load_backbone({"state_dict": rgb, "epoch": 1})
    assert (backbone.spec.name, backbone.weights_id) == ("i3d-rgb", f"sha256:{state_sha256(rgb)}")
    assert same(backbone.state_dict(), rgb)
    rgb["logits.conv3d.bias"][0] += 1
    assert backbone.weights_id != load_backbone(rgb).weights_id
    rgb["logits.conv3d.bias"][0] -= 1
    backbone.logits.conv3d.bias.data.zero_()
    assert float(rgb["logits.conv3d.bias"].abs().max()) > 0  # copied, not shared


def test_classifier_is_the_file_s(rgb: dict[str, Tensor]) -> None:
    bare = {key: value for key, value in rgb.items() if not key.startswith("logits.")}
    assert load_backbone(bare).logits is None
    charades = bare | {"logits.conv3d.weight": torch.ones(157, 1024, 1, 1, 1), "logits.conv3d.bias": torch.zeros(157)}
    assert load_backbone(charades).classify(torch.ones(2, 1024)).shape == (2, 157)
    with pytest.raises(WeightsError, match=r"1 tensors missing: logits.conv3d.bias"):
        load_backbone(bare | {"logits.conv3d.weight": charades["logits.conv3d.weight"]})


def test_weights_of_another_modality(tmp_path: Path, rgb: dict[str, Tensor]) -> None:
    torch.save(rgb, tmp_path / "rgb.pt")
    with pytest.raises(
        WeightsError, match=r"rgb.pt .*holds i3d-rgb, not i3d-flow \(in_channels is 3 in the file and 2 in i3d-flow\)"
    ):
        build_backbone("i3d-flow", tmp_path / "rgb.pt")
    stem = "Conv3d_1a_7x7.conv3d.weight"
    assert load_backbone(rgb | {stem: rgb[stem][:, :2]}).spec.name == "i3d-flow"
    with pytest.raises(
        WeightsError, match=r"in_channels is 4 in the file and 3 in i3d-rgb; in_channels is 4 in the file and 2"
    ):
        load_backbone(rgb | {stem: torch.zeros(64, 4, 7, 7, 7)})
    with pytest.raises(WeightsError, match=rf"the state dict: {stem} has the shape \[64\]"):
        load_backbone(rgb | {stem: torch.zeros(64)})


def test_tensors_that_i3d_lacks_or_has_no_place_for(rgb: dict[str, Tensor]) -> None:
    lacking = {key: value for key, value in rgb.items() if not key.startswith("Mixed_4d.b1b.")}
    with pytest.raises(WeightsError, match=r"5 tensors missing: Mixed_4d.b1b.conv3d.weight, Mixed_4d.b1b.bn.weight"):
        load_backbone(lacking)
    with pytest.raises(WeightsError, match=r"1 tensors unexpected: Mixed_6a.weight"):
        load_backbone(rgb | {"Mixed_6a.weight": torch.zeros(1)})


# ---- families --------------------------------------------------------------------------------------------------------

FAMILY_OF = {
    "i3d": "I3D, piergiaj",
    "i3d_hassony": "I3D, hassony2/video_features",
    "ptv_slowfast": "pytorchvideo SlowFast",
    "ptv_r2plus1d": "pytorchvideo R(2+1)D",
    "ptv": "pytorchvideo ResNet (Slow, I3D-R50, C2D, CSN)",
    "pysf_slowfast": "PySlowFast SlowFast",
    "pysf": "PySlowFast ResNet (Slow, I3D-R50, C2D)",
    "mma_slowfast": "mmaction2 SlowFast",
    "mma_r2plus1d": "mmaction2 R(2+1)D",
    "mma_ircsn": "mmaction2 CSN",
    "mma_ipcsn": "mmaction2 CSN",
    "mma_tsm": "mmaction2 TSM",
    "mma": "mmaction2 ResNet (TSN, SlowOnly, I3D-R50)",
    "mit_tsm": "TSM, mit-han-lab",
    "mit_tsn": "TSN, mit-han-lab",
    "tsp": "TSP R(2+1)D or R3D",
    "vmz": "VMZ CSN",
    "tv": "torchvision/ig65m R(2+1)D, R3D or MC3",
    "ig65m": "torchvision/ig65m R(2+1)D, R3D or MC3",
    "fb_timesformer": "TimeSformer, official",
    "hf_timesformer": "TimeSformer, transformers",
    "hf_vivit": "ViViT, transformers",
    "hf_videomae": "VideoMAE, transformers",
    "mcg_videomae": "VideoMAE, MCG-NJU",
}


def test_every_public_key_table_is_of_one_family(shared: Path) -> None:
    seen = set()
    for path in sorted((shared / "golden" / "backbones").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "keys" not in record:
            continue
        keys = unwrap({key: torch.zeros(0) for key in record["keys"]}, where=path.name)
        prefix = max((name for name in FAMILY_OF if path.stem.startswith(name)), key=len)
        found = [family for family, predicate in FAMILIES.items() if predicate(keys)]
        assert found == [FAMILY_OF[prefix]], path.stem
        wrapped = [f"model.{key.removeprefix('model.')}" for key in keys]  # as PySlowFast wraps pytorchvideo's networks
        assert found == [family for family, predicate in FAMILIES.items() if predicate(wrapped)]
        seen.add(prefix)
    assert seen == set(FAMILY_OF)


def test_families_without_golden_tables() -> None:
    assert family_of(["conv1_w", "res_conv1_bn_s", "pred_w", "pred_b"]) == "PySlowFast Caffe2 ResNet"
    assert family_of(["conv1_w", "t_conv1_w", "pred_w", "pred_b"]) == "PySlowFast Caffe2 SlowFast"
    timesformer = ["backbone.time_embed", "backbone.transformer_layers.layers.0.norms.0.weight"]
    assert family_of(timesformer) == "mmaction2 TimeSformer"
    assert family_of(build_backbone("tiny").state_dict().keys()) == "tad Tiny3D"
    assert family_of(["conv1.weight", "layer1.0.conv1.weight"]) is None
    assert all(layout.family in FAMILIES for entry in BACKBONES.values() for layout in entry.layouts)


def test_networks_that_tad_lacks_are_called_by_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from tad.extract import backbones

    monkeypatch.setattr(backbones, "BACKBONES", {name: BACKBONES[name] for name in ("tiny", "i3d-rgb")})
    state = {"conv1_w": torch.zeros(1), "pred_w": torch.zeros(1)}
    message = (
        "the state dict looks like a file of PySlowFast Caffe2 ResNet; tad has no such backbone yet. Known: .*i3d-rgb"
    )
    for load in (load_backbone, lambda weights: build_backbone("i3d-rgb", weights)):
        with pytest.raises(WeightsError, match=message):
            load(state)
    with pytest.raises(WeightsError, match=r"no network that tad knows, its tensors are called a.weight, a.bias"):
        load_backbone(SMALL)


def test_one_file_of_several_names_must_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    state = build_backbone("tiny", "random").state_dict()
    monkeypatch.setitem(BACKBONES, "tiny-too", BACKBONES["tiny"])
    with pytest.raises(WeightsError, match=r"could be tiny or tiny-too: build_backbone\(name, weights\)"):
        load_backbone(state)
    assert build_backbone("tiny-too", state).weights_id == f"sha256:{state_sha256(state)}"


def test_port_is_the_layout_s_unless_told(shared: Path) -> None:
    record, _ = golden(shared, "i3d_hassony_flow")
    state = filled_state(record["keys"])
    backbone = build_backbone("i3d-flow", state)
    assert (backbone.variant, backbone.spec.name) == ("hassony", "i3d-flow")
    assert backbone.Mixed_5c.b3b.bn.eps == 1e-5
    told = build_backbone("i3d-flow", state, port="piergiaj")
    assert (told.variant, told.Mixed_5c.b3b.bn.eps, told.weights_id) == ("piergiaj", 1e-3, backbone.weights_id)
    assert same(told.state_dict(), backbone.state_dict())
    twice = state | {"Mixed_3b.b0.conv3d.weight": torch.zeros(64, 192, 1, 1, 1)}
    with pytest.raises(WeightsError, match=r"two tensors stand for Mixed_3b.b0.conv3d.weight"):
        load_backbone(twice)


LARGE = ("r101", "r2plus1d-34", "vivit", "timesformer", "videomae", "csn-152")  # of seconds each: `-m slow`


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if any(part in name for part in LARGE) else ())
        for name, entry in BACKBONES.items()
        if entry.layouts
    ],
)
def test_a_saved_state_dict_loads_back(name: str, tmp_path: Path) -> None:
    backbone = build_backbone(name, "random:5")
    torch.save(backbone.state_dict(), tmp_path / "own.pt")
    loaded = load_backbone(tmp_path / "own.pt")
    assert loaded.spec == backbone.spec
    assert same(loaded.state_dict(), backbone.state_dict())


# ---- by name ---------------------------------------------------------------------------------------------------------


def test_random_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = build_backbone("tiny", "random")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = build_backbone("tiny", "random:0"), build_backbone("tiny", "random:1")
    assert (first.weights_id, again.weights_id, other.weights_id) == ("random:0", "random:0", "random:1")
    assert same(first.state_dict(), again.state_dict())
    assert not same(first.state_dict(), other.state_dict())
    i3d = build_backbone("i3d-flow", "random:7").state_dict()
    assert same(i3d, build_backbone("i3d-flow", "random:7").state_dict())


def test_no_weights_are_the_caller_s(rgb: dict[str, Tensor]) -> None:
    backbone = build_backbone("i3d-rgb")
    assert backbone.weights_id is None
    backbone.load_state_dict(rgb, strict=True)  # the public file's keys are the module's
    assert not backbone.training


@pytest.mark.parametrize("weights", ["random:", "random:x", "random:-1", "random:1.5", "random:²", f"random:{2**63}"])
def test_seeds_that_are_none(weights: str) -> None:
    with pytest.raises(RecipeError, match="a seed is a whole number"):
        build_backbone("tiny", weights)


def test_names_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown backbone 'i3d_rgb'. Did you mean 'i3d-rgb'"):
        build_backbone("i3d_rgb")
    with pytest.raises(RecipeError, match="'i3d' stands for i3d-rgb and i3d-flow"):
        build_backbone("i3d", "random")
    with pytest.raises(RecipeError, match=r"no port 'hasony'. Did you mean 'hassony'"):
        build_backbone("i3d-rgb", port="hasony")
    with pytest.raises(RecipeError, match="tiny has no port 'piergiaj'"):
        build_backbone("tiny", "random", port="piergiaj")
    with pytest.raises(WeightsError, match=r"weights random.pt cannot be read"):
        build_backbone("i3d-rgb", "random.pt")
    with pytest.raises(WeightsError, match="weights random cannot be read"):
        build_backbone("i3d-rgb", Path("random"))
    assert all(member in BACKBONES for members in GROUPS.values() for member in members)
    assert not set(GROUPS) & set(BACKBONES)


def test_layouts_default_to_the_same_names() -> None:
    assert Layout("tad Tiny3D", lambda state: {}).rename("a.b") == "a.b"
    assert issubclass(WeightsError, TadError)
