"""Caffe2 files of PySlowFast's model zoo (``.pkl``): read without running anything in them.

Such a file is a pickle, mostly written by Python 2: ``{"blobs": {name: array}}``. Unpickling can call any function, so
here no function of the file's choice is ever called, not even numpy's: the few globals that arrays are made of are
stood in for by recorders, which check what they are given, and every other global is refused by its name.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tad.errors import WeightsError

# How torch.save begins a file: a zip archive, or (until 2020) a pickled magic number. Public files called .pkl may be
# either of these too.
TORCH_STARTS = (b"PK\x03\x04", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.")

# What damaged or hostile pickles make the unpickler and the recorders raise.
BROKEN = (EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError)

# Blobs of the solver beside the network's own.
SOLVER = re.compile(r"lr|model_iter|.*_momentum|.*_lr")
PARTS = {"w": "weight", "b": "bias", "bn_s": "bn.weight", "bn_b": "bn.bias", "bn_rm": "bn.running_mean"}
PARTS["bn_riv"] = "bn.running_var"  # riv says inverse variance; what it holds is the variance
# What begins a blob's name, what takes its place where a bn_* ends it, and where w or b ends it.
BLOBS: tuple[tuple[str, str, str], ...] = (
    (r"(?:res_)?conv1", "s1.pathway0_stem.", "s1.pathway0_stem.conv."),
    (r"t_(?:res_)?conv1", "s1.pathway1_stem.", "s1.pathway1_stem.conv."),
    (r"t_pool1_subsample", "s1_fuse.", "s1_fuse.conv_f2s."),
    (r"t_res(\d+)_\d+_branch2c_bn_subsample", r"s\1_fuse.", r"s\1_fuse.conv_f2s."),
    (r"res(\d+)_(\d+)_branch1", r"s\1.pathway0_res\2.branch1_", r"s\1.pathway0_res\2.branch1."),
    (r"t_res(\d+)_(\d+)_branch1", r"s\1.pathway1_res\2.branch1_", r"s\1.pathway1_res\2.branch1."),
    (r"res(\d+)_(\d+)_branch2([abc])", r"s\1.pathway0_res\2.branch2.\3_", r"s\1.pathway0_res\2.branch2.\3."),
    (r"t_res(\d+)_(\d+)_branch2([abc])", r"s\1.pathway1_res\2.branch2.\3_", r"s\1.pathway1_res\2.branch2.\3."),
    (r"pred", "head.projection.", "head.projection."),
)


def pyslowfast_name(blob: str) -> str | None:
    """A blob's name as PySlowFast calls the same tensor (``t_res4_5_branch2c_bn_rm`` →
    ``s4.pathway1_res5.branch2.c_bn.running_mean``); ``None`` for the solver's blobs; unknown ones keep their name.
    """
    if SOLVER.fullmatch(blob):
        return None
    split = re.fullmatch(r"(.+?)_(bn_s|bn_b|bn_rm|bn_riv|w|b)", blob)
    if split is None:
        return blob
    name, part = split[1], PARTS[split[2]]
    for pattern, norm, other in BLOBS:
        if match := re.fullmatch(pattern, name):
            return match.expand(norm if part.startswith("bn.") else other) + part
    return blob


def is_torch(start: bytes) -> bool:
    """Whether a file that begins so (16 bytes are enough) was written by ``torch.save``."""
    return start.startswith(TORCH_STARTS)


def read_blobs(path: str | Path) -> dict[Any, object]:
    """The blobs of a Caffe2 pickle by name: arrays and numbers as tensors, on the CPU, the solver's among them.

    Names are as in the file (:func:`pyslowfast_name` says what they mean). Values that are neither arrays nor numbers
    are left as they are, for the caller to refuse.

    Raises
    ------
    WeightsError : the file cannot be read, is damaged or truncated, holds no dictionary, or holds anything else than
        numbers, text, plain containers and numeric arrays; the message names the first foreign object.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"weights {path} cannot be read: {error.strerror or error}") from error
    broken = f"weights {path} are no Caffe2 pickle, or a damaged or truncated one (the file starts with {data[:16]!r})"
    if data.startswith(b"\x1f\x8b"):
        raise WeightsError(f"weights {path} are compressed: unpack them first (gunzip, or tar -xzf)")
    try:
        _check_sizes(data)
        content = _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except pickle.UnpicklingError as error:
        if isinstance(error, _Foreign):
            raise WeightsError(
                f"weights {path} need pickle: they hold {error}, and unpickling objects can run any code, so tad reads "
                "only numeric arrays from a .pkl file. If you trust the file, load it once yourself and save its "
                "tensors with torch.save as a state dict"
            ) from error
        raise WeightsError(f"{broken}: {error}") from error
    except BROKEN as error:
        raise WeightsError(f"{broken}: {error or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"weights {path} hold a {type(content).__name__}, expected a dictionary of Caffe2 blobs")
    blobs = content.get("blobs", content)
    if not isinstance(blobs, dict):
        raise WeightsError(f"weights {path}: their 'blobs' are a {type(blobs).__name__}, expected a dictionary")
    return {name: _tensor(value) for name, value in blobs.items()}


def _tensor(value: object) -> object:
    if isinstance(value, _Array):
        return value.tensor
    return torch.tensor(value) if isinstance(value, (int, float)) and abs(value) < 2**63 else value


def _check_sizes(data: bytes) -> None:
    """Walk through the opcodes without acting on them: every length must fit the data, and no memo index may be larger
    than a pickler would write, because the unpickler allocates as much as the file claims.
    """
    memo, opcodes = 0, 0
    for opcode, argument, _ in pickletools.genops(data):
        opcodes += 1
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int):
            memo = max(memo, argument)
    if memo > opcodes:
        raise ValueError(f"{opcodes} steps of it set entry {memo} of its memo")


class _Foreign(pickle.UnpicklingError):
    """Something that is no array, number, text or container."""


class _Dtype:
    """Stands for ``numpy.dtype``: booleans, integers and floating point numbers only."""

    def __init__(self, code: object, *_: object) -> None:
        match = re.fullmatch(r"([<>|=]?)([biuf])([1248])", code) if isinstance(code, str) else None
        if match is None or match[2] + match[3] in ("b2", "b4", "b8", "f1"):
            raise _Foreign(f"an array of the type {code!r}")
        self.order, self.code = match[1], match[2] + match[3]

    def __setstate__(self, state: object) -> None:
        """(version, byte order, ...): the rest describes records and dates, which are not admitted."""
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"its array type has the state {state!r}")
        self.order = state[1]

    def values(self, data: object, shape: object, order: str) -> np.ndarray:
        """A new array of these bytes in the machine's byte order."""
        if isinstance(data, str):
            data = data.encode("latin1")  # how Python 2's bytes arrive
        if not isinstance(data, (bytes, bytearray)):
            raise _Foreign(f"array values as a {type(data).__name__}")
        dtype = np.dtype(self.order.replace("|", "=") + self.code)
        sizes = shape if isinstance(shape, tuple) else (shape,)
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise pickle.UnpicklingError(f"it has an array of the shape {shape!r}")
        if len(sizes) > 32 or math.prod(sizes) * dtype.itemsize != len(data):
            raise pickle.UnpicklingError(f"it has an array of the shape {shape!r} with {len(data)} bytes")
        array = np.frombuffer(data, dtype).reshape(sizes, order="F" if order == "F" else "C")
        return np.array(array, dtype=dtype.newbyteorder("="), order="C")  # a copy: bytes cannot be written to


class _Array:
    """Stands for ``numpy.ndarray`` being rebuilt: empty until its state arrives."""

    tensor: Tensor

    def __init__(self, *_: object) -> None:
        self.tensor = torch.empty(0)

    def __setstate__(self, state: object) -> None:
        """(version,) shape, dtype, whether in Fortran's order, bytes."""
        parts = state[-4:] if isinstance(state, tuple) else ()
        if len(parts) != 4 or not isinstance(parts[1], _Dtype):
            raise pickle.UnpicklingError("it has an array without shape, type and values")
        shape, dtype, fortran, data = parts
        self.tensor = torch.from_numpy(dtype.values(data, shape, "F" if fortran else "C"))


def _of_buffer(data: object, dtype: object, shape: object, order: object) -> _Array:
    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError("it has an array without a type")
    array = _Array()
    array.tensor = torch.from_numpy(dtype.values(data, shape, str(order)))
    return array


def _scalar(dtype: object, data: object) -> _Array:
    return _of_buffer(data, dtype, (), "C")


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """How Python 3 writes bytes where the protocol has none."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _Foreign(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


class _Recorder:
    """A callable that a pickle may call and not change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it sets the state of a function")


# Global → what stands for it; numpy 2 calls numpy.core another name, Python 2 the builtins.
ADMITTED: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    **{(module, "bytes"): _no_bytes for module in ("builtins", "__builtin__")},
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _Array),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _of_buffer),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        stand_in = ADMITTED.get((module, name))
        if stand_in is None:
            raise _Foreign(f"the Python object {module}.{name}")
        return _Recorder(stand_in)
