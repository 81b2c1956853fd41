"""Caffe2 pickles: names, Python 2's bytes, and files that are damaged or hostile."""

from __future__ import annotations

import argparse
import gzip
import io
import os
import pickle
import re
import struct
import time
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from tad.errors import WeightsError
from tad.extract.backbones import load_backbone
from tad.extract.backbones.resnet3d import C2D, I3D, SLOW
from tad.extract.caffe2 import pyslowfast_name, read_blobs
from tad.extract.weights import read_state_dict
from tests.extract.filler import filled_array

PurePickler: Any = pickle._Pickler  # the one in Python, whose methods can be replaced


class Python2Pickler(PurePickler):
    """Writes text and bytes alike as Python 2's strings, and calls numpy's modules by their old names."""

    dispatch: ClassVar[dict[type, Any]] = dict(PurePickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        short = len(data) < 256
        self.write(
            pickle.SHORT_BINSTRING + bytes([len(data)]) if short else pickle.BINSTRING + struct.pack("<i", len(data))
        )
        self.write(data)
        self.memoize(value)

    def save_global(self, value: Any, name: str | None = None) -> None:
        name = name or value.__name__
        module = "numpy.core.multiarray" if name in ("_reconstruct", "scalar") else value.__module__
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string
    dispatch[type] = dispatch[type(len)] = dispatch[type(argparse)] = save_global


def python2_pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def blob_shapes(kernels: Any, stem: int, *, fast: bool = False) -> dict[str, tuple[int, ...]]:
    """Blob names and shapes of a Caffe2 file, written down from the published architecture."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, channels: int) -> None:
        shapes.update({f"{name}_{part}": (channels,) for part in ("s", "b", "rm", "riv")})

    for prefix, width, kernel, stages in (
        ("", 64, stem, kernels),
        ("t_", 8, 5, ((3,) * 3, (3,) * 4, (3,) * 6, (3,) * 3)),
    ):
        if prefix and not fast:
            continue
        shapes[f"{prefix}conv1_w"] = (width, 3, kernel, 7, 7)
        norm(f"{prefix}res_conv1_bn", width)
        channels = width + (16 if fast and not prefix else 0)
        for stage, blocks in enumerate(stages):
            inner = width * 2**stage
            for i, time_kernel in enumerate(blocks):
                name = f"{prefix}res{stage + 2}_{i}_branch"
                if i == 0:
                    shapes[f"{name}1_w"] = (4 * inner, channels, 1, 1, 1)
                    norm(f"{name}1_bn", 4 * inner)
                shapes[f"{name}2a_w"] = (inner, channels, time_kernel, 1, 1)
                shapes[f"{name}2b_w"] = (inner, inner, 1, 3, 3)
                shapes[f"{name}2c_w"] = (4 * inner, inner, 1, 1, 1)
                for part, size in (("a", inner), ("b", inner), ("c", 4 * inner)):
                    norm(f"{name}2{part}_bn", size)
                channels = 4 * inner
            if fast and not prefix:
                channels += 64 * 2**stage
    if fast:
        for name, channels in (
            ("t_pool1_subsample", 8),
            ("t_res2_2_branch2c_bn_subsample", 32),
            ("t_res3_3_branch2c_bn_subsample", 64),
            ("t_res4_5_branch2c_bn_subsample", 128),
        ):
            shapes[f"{name}_w"] = (2 * channels, channels, 7, 1, 1)
            norm(f"{name}_bn", 2 * channels)
    shapes["pred_w"], shapes["pred_b"] = (400, 2304 if fast else 2048), (400,)
    return shapes


def blobs_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Values drawn by PySlowFast's names of the same tensors, so that they can be told from each other."""
    blobs = {}
    for name, shape in shapes.items():
        key = pyslowfast_name(name)
        assert key is not None
        blobs[name] = filled_array(key, shape, 0.85)
    return blobs


def solver(blobs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What training leaves beside the network."""
    extra = {f"{name}_momentum": np.zeros((1, 1), np.float32) for name in blobs if re.search(r"_(w|b|s)$", name)}
    return extra | {name: np.ones(1, np.float32) for name in ("lr", "model_iter", "conv1_w_lr")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    keys = {key for key in one if not key.endswith("num_batches_tracked")}
    assert keys == {key for key in other if not key.endswith("num_batches_tracked")}
    return all(torch.equal(one[key], other[key]) for key in keys)


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blob", "name"),
    [
        ("conv1_w", "s1.pathway0_stem.conv.weight"),
        ("res_conv1_bn_s", "s1.pathway0_stem.bn.weight"),
        ("res_conv1_bn_riv", "s1.pathway0_stem.bn.running_var"),
        ("t_conv1_w", "s1.pathway1_stem.conv.weight"),
        ("t_res_conv1_bn_rm", "s1.pathway1_stem.bn.running_mean"),
        ("res4_0_branch1_w", "s4.pathway0_res0.branch1.weight"),
        ("res4_0_branch1_bn_b", "s4.pathway0_res0.branch1_bn.bias"),
        ("res4_22_branch2c_w", "s4.pathway0_res22.branch2.c.weight"),
        ("t_res4_5_branch2c_bn_rm", "s4.pathway1_res5.branch2.c_bn.running_mean"),
        ("t_pool1_subsample_w", "s1_fuse.conv_f2s.weight"),
        ("t_pool1_subsample_bn_s", "s1_fuse.bn.weight"),
        ("t_res4_22_branch2c_bn_subsample_w", "s4_fuse.conv_f2s.weight"),
        ("t_res4_22_branch2c_bn_subsample_bn_riv", "s4_fuse.bn.running_var"),
        ("pred_w", "head.projection.weight"),
        ("pred_b", "head.projection.bias"),
        ("lr", None),
        ("model_iter", None),
        ("res2_0_branch2a_w_momentum", None),
        ("t_res2_0_branch2a_bn_s_momentum", None),
        ("nonlocal_conv3_1_theta_w", "nonlocal_conv3_1_theta_w"),
        ("res2_0_branch2d_w", "res2_0_branch2d_w"),
        ("something", "something"),
    ],
)
def test_names(blob: str, name: str | None) -> None:
    assert pyslowfast_name(blob) == name


def test_names_are_those_of_pyslowfast(shared: Path) -> None:
    import json

    for name, shapes in (
        ("pysf_slowfast_8x8_r50", blob_shapes(SLOW, 1, fast=True)),
        ("pysf_slow_8x8_r50", blob_shapes(SLOW, 1)),
        ("pysf_i3d_8x8_r50", blob_shapes(I3D, 5)),
    ):
        record = json.loads((shared / "golden" / "backbones" / f"{name}.json").read_text(encoding="utf-8"))
        expected = {k: tuple(v) for k, v in record["keys"].items() if not k.endswith("num_batches_tracked")}
        assert {pyslowfast_name(blob): shape for blob, shape in shapes.items()} == expected


# ---- whole files -----------------------------------------------------------------------------------------------------


def test_slowfast_from_a_file_as_python_2_wrote_it(tmp_path: Path) -> None:
    blobs = blobs_of(blob_shapes(SLOW, 1, fast=True))
    path = tmp_path / "SLOWFAST_8x8_R50.pkl"
    path.write_bytes(python2_pickle({"blobs": blobs | solver(blobs), "cfg": "MODEL: ..."}))
    backbone = load_backbone(path)
    path.unlink()
    assert backbone.spec.name == "slowfast-r50"
    expected = load_backbone({str(pyslowfast_name(key)): torch.from_numpy(value) for key, value in blobs.items()})
    assert same(backbone.state_dict(), expected.state_dict())


@pytest.mark.parametrize(("name", "kernels", "stem"), [("slow-r50", SLOW, 1), ("i3d-r50", I3D, 5), ("c2d-r50", C2D, 1)])
def test_networks_of_one_path(name: str, kernels: Any, stem: int) -> None:
    blobs = blobs_of(blob_shapes(kernels, stem))
    state = {key: torch.from_numpy(value) for key, value in (blobs | solver(blobs)).items()}
    backbone = load_backbone(state)
    assert backbone.spec.name == name
    assert backbone.variant == ("nopool" if name == "c2d-r50" else None)  # the zoo's file is C2D_NOPOOL_8x8_R50
    ours = backbone.state_dict()
    assert torch.equal(ours["path.res4.5.b.bn.running_var"], state["res4_5_branch2b_bn_riv"])
    assert torch.equal(ours["path.res5.0.shortcut.conv.weight"], state["res5_0_branch1_w"])
    if name == "c2d-r50":
        more = {key: value for key, value in state.items() if key != "res3_1_branch2c_bn_rm"}
        more["nonlocal_conv3_1_theta_w"] = torch.zeros(2)
        with pytest.raises(
            WeightsError, match=r"running_mean; 1 tensors unexpected: nonlocal_conv3_1_theta_w"
        ) as caught:
            load_backbone(more)
        assert "1 tensors missing: path.res3.1.c.bn.running_mean" in str(caught.value)


ARRAYS: dict[str, Any] = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big endian": np.arange(5, dtype=">f4"),
    "half": np.array([1, 2], np.float16),
    "int64": np.array([[-1, 2**40]], np.int64),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
    "no axes": np.array(2.5, np.float32),
    "every byte": np.arange(256, dtype=np.uint8),
    "strided": np.arange(10, dtype=np.int32)[::2],
}


@pytest.mark.parametrize("write", ["python 2", 0, 1, 2, 3, 4, 5])
def test_arrays_come_back(tmp_path: Path, write: str | int) -> None:
    content = {"blobs": OrderedDict(ARRAYS | {"scalar": np.float32(0.5), "number": 3, "other": 0.25})}
    path = tmp_path / "x.pkl"
    if isinstance(write, int):
        path.write_bytes(pickle.dumps(content, protocol=write))
    else:
        path.write_bytes(python2_pickle({"blobs": dict(content["blobs"])}))
    read = read_state_dict(path)
    for name, array in ARRAYS.items():
        assert read[name].shape == array.shape
        assert str(read[name].dtype).removeprefix("torch.") == array.dtype.name
        assert np.array_equal(read[name].numpy(), array)
    assert [float(read[name]) for name in ("scalar", "number", "other")] == [0.5, 3, 0.25]
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(ARRAYS, protocol=2))  # without "blobs" around them
    assert list(read_state_dict(tmp_path / "bare.pkl")) == list(ARRAYS)


def test_torch_files_that_are_called_pkl(tmp_path: Path) -> None:
    """As some of PySlowFast's are; both of torch's formats."""
    for legacy in (False, True):
        path = tmp_path / f"{legacy}.pkl"
        torch.save({"model_state": {"a": torch.ones(2)}}, path, _use_new_zipfile_serialization=not legacy)
        assert torch.equal(read_state_dict(path)["a"], torch.ones(2))


# ---- damaged and hostile files ---------------------------------------------------------------------------------------


class Call:
    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def bytes_of(opcodes: bytes) -> bytes:
    return b"\x80\x02" + opcodes + b"."


def test_objects_are_refused_by_name_and_nothing_runs(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    np_core = np.zeros(1).__reduce__()[0]
    contents: dict[str, tuple[object, str]] = {
        "mkdir": (Call(os.mkdir, str(ran)), r"the Python object (posix|nt|os)\.mkdir"),
        "eval": (Call(eval, f"__import__('os').mkdir({str(ran)!r})"), r"the Python object \w*builtin\w*\.eval"),
        "deep": ({"blobs": {"a": [{"b": Call(os.mkdir, str(ran))}]}}, r"mkdir"),
        "getattr": (Call(getattr, 1, "real"), r"the Python object \w*builtin\w*\.getattr"),
        "namespace": ({"blobs": {}, "args": argparse.Namespace(lr=1)}, r"argparse\.Namespace"),
        "defaultdict": (defaultdict(list), r"collections\.defaultdict"),
        "tensor": ({"blobs": {"a": torch.zeros(1)}}, r"torch\._utils\._rebuild_tensor_v2"),
        "memmap": (Call(np_core, np.memmap, (0,), b"b"), r"numpy\S*\.memmap"),
        "objects": ({"blobs": {"a": np.array([None])}}, r"an array of the type 'O8'"),
        "text": ({"blobs": {"a": np.array(["x"])}}, r"an array of the type 'U1'"),
        "record": ({"blobs": {"a": np.zeros(2, [("x", "f4")])}}, r"an array of the type 'V4'"),
        "complex": ({"blobs": {"a": np.zeros(2, complex)}}, r"an array of the type 'c16'"),
    }
    for protocol in (2, 4):
        for name, (content, message) in contents.items():
            path = tmp_path / f"{name}.pkl"
            path.write_bytes(pickle.dumps(content, protocol=protocol))
            with pytest.raises(WeightsError, match=rf"{name}\.pkl need pickle: they hold .*{message}.*torch\.save"):
                read_state_dict(path)
            assert not ran.exists()


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
FLOAT = b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (ARRAY + b"(K\x01(K\x02t" + FLOAT + b"\x89U\x041234tb", r"an array of the shape \(2,\) with 4 bytes"),
        (ARRAY + b"(K\x01(J\xff\xff\xff\xfft" + FLOAT + b"\x89U\x041234tb", r"an array of the shape \(-1,\)"),
        (ARRAY + b"(K\x01(G?\xf0\0\0\0\0\0\0t" + FLOAT + b"\x89U\x041234tb", r"an array of the shape \(1\.0,\)"),
        (ARRAY + b"(K\x01(K\x01t" + FLOAT + b"\x89]tb", "array values as a list"),
        (ARRAY + b"(K\x01(K\x01tU\x02f4\x89U\x041234tb", "an array without shape, type and values"),
        (ARRAY + b"}b", "an array without shape, type and values"),
        (b"cnumpy\ndtype\n(U\x02f4tR(K\x03U\x01xtb", "its array type has the state"),
        (b"cnumpy\ndtype\n(U\x02f3tR", "an array of the type 'f3'"),
        (b"cnumpy\ndtype\n(K\x03tR", "an array of the type 3"),
        (b"cnumpy\ndtype\n}U\x01aK\x01sb", "sets the state of a function"),
        (b"cnumpy.core.multiarray\nscalar\n(NNtR", "an array without a type"),
        (b"c_codecs\nencode\n(U\x01aU\x05rot13tR", "text in the encoding 'rot13'"),
        (b"c__builtin__\nbytes\n(K\x05tR", "takes 0 positional arguments"),
        (b"cnumpy\ndtype\n)\x81", "NEWOBJ"),
        (b"Pid\n", "persistent"),
        (b"(U\x02lsiposix\nsystem\n", r"the Python object posix\.system"),
        (b"(cposix\nsystem\nU\x02lso", r"the Python object posix\.system"),
        (b"\x82\x01", "extension code 1"),
        (b"]r\xff\xff\xff\x7f", "entry 2147483647 of its memo"),  # else its 2^31 entries would be allocated
        (b"]p99999999999\n", "entry 99999999999 of its memo"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", "expected 9223372036854775807 bytes"),
        (b"T\xff\xff\xff\x7fabc", "expected 2147483647 bytes"),
        (b"h\x05", "Memo value not found|memo"),
        (b"0", "stack|pop"),
        (b"R", "stack|pop|underflow"),
        (b"\xff", "opcode"),
        (b"", "no Caffe2 pickle"),
    ],
)
def test_hostile_opcodes(tmp_path: Path, opcodes: bytes, message: str) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(bytes_of(opcodes))
    start = time.monotonic()
    with pytest.raises(WeightsError, match=f"(?s)x.pkl.*({message})"):
        read_blobs(path)
    assert time.monotonic() - start < 5


def test_the_hand_written_array_is_one(tmp_path: Path) -> None:
    """So that the hostile ones above fail for what is wrong with them alone."""
    (tmp_path / "x.pkl").write_bytes(bytes_of(b"}U\x01a" + ARRAY + b"(K\x01(K\x01t" + FLOAT + b"\x89U\x041234tbs"))
    assert read_state_dict(tmp_path / "x.pkl")["a"].numpy().tobytes() == b"1234"


def test_one_array_in_many_places_is_held_once(tmp_path: Path) -> None:
    array = np.zeros(2**20, np.float32)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"blobs": dict.fromkeys(map(str, range(2000)), array)}, protocol=2))
    read = read_state_dict(tmp_path / "x.pkl")  # 8 GB if each were copied
    assert len({tensor.data_ptr() for tensor in read.values()}) == 1


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_files_cut_or_changed_anywhere(tmp_path: Path, protocol: int) -> None:
    whole = pickle.dumps({"blobs": {"conv1_w": np.arange(6, dtype=np.float32), "lr": np.float32(1)}}, protocol=protocol)
    path = tmp_path / "x.pkl"
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(WeightsError, match=re.escape(str(path))):
            read_state_dict(path)
    rng = np.random.default_rng(protocol)
    for _ in range(300):
        changed = bytearray(whole)
        changed[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(bytes(changed))
        try:
            read_state_dict(path)
        except WeightsError as error:
            assert str(path) in str(error)  # noqa: PT017 - some changes are harmless


def test_other_files_say_what_they_are(tmp_path: Path) -> None:
    plain = pickle.dumps({"blobs": {"a": np.zeros(2)}}, protocol=2)
    (tmp_path / "x.pkl").write_bytes(gzip.compress(plain))
    with pytest.raises(WeightsError, match="are compressed: unpack them first"):
        read_state_dict(tmp_path / "x.pkl")
    for content, message in (
        ([1, 2], "hold a list, expected a dictionary of Caffe2 blobs"),
        ({"blobs": [1]}, "their 'blobs' are a list"),
        ({"blobs": {}}, "holds no tensors"),
        ({"blobs": {"a": "text", "b": np.zeros(1)}}, "no state dict: a are no tensors"),
        ({"blobs": {3: np.zeros(1)}}, "no state dict: 3 are no tensors"),
        ({"blobs": {"a": 10**30}}, "no state dict: a are no tensors"),
    ):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(WeightsError, match=message):
            read_state_dict(tmp_path / "x.pkl")
    (tmp_path / "x.pkl").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(WeightsError, match="no Caffe2 pickle"):
        load_backbone(tmp_path / "x.pkl")
    with pytest.raises(WeightsError, match="cannot be read"):
        read_blobs(tmp_path / "absent.pkl")
