"""Checkpoints: read without running code from the file, hashed, recognised by their tensors' names, loaded whole.

A *family* is who wrote a file: each public code base names the tensors of its networks in its own way. A
:class:`Layout` says how the files of one family map onto one of our networks. What is not understood is an error: no
tensor is left out, or left at its random start, silently.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import struct
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tad.errors import RecipeError, WeightsError
from tad.extract import caffe2

State = Mapping[str, Tensor]

# Keys under which training code keeps the state dict, in the order of preference, and what wrappers of the module put
# before every name.
WRAPPERS = ("state_dict", "model_state", "model_state_dict", "model", "module")
PREFIXES = ("module.", "_orig_mod.")

# Tensors that a file may lack: no inference reads the count of batches, and files of before 2018 lack it; what a
# network of ours was built with stands in our own files only.
OPTIONAL = ("num_batches_tracked", "settings")

# What a damaged file makes torch's unpickler raise, apart from pickle.UnpicklingError.
DAMAGED = (
    RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError,
    MemoryError, struct.error,
)  # fmt: skip


def _has(*parts: str) -> Callable[[Collection[str]], bool]:
    """True where every one of ``parts`` begins some key; a leading ``model.`` of the keys does not count."""

    def predicate(keys: Collection[str]) -> bool:
        return all(any(key.removeprefix("model.").startswith(part) for key in keys) for part in parts)

    return predicate


def _has_not(part: str, *parts: str) -> Callable[[Collection[str]], bool]:
    """Like :func:`_has` of ``parts``, and no key begins with ``part``."""
    return lambda keys: _has(*parts)(keys) and not _has(part)(keys)


# Who wrote a file, by the names of its tensors. A file belongs to one family at most; whether tad has a network for it
# is written in BACKBONES.
FAMILIES: dict[str, Callable[[Collection[str]], bool]] = {
    "I3D, piergiaj": _has("Conv3d_1a_7x7.conv3d.weight"),
    "I3D, hassony2/video_features": _has("conv3d_1a_7x7.conv3d.weight"),
    "pytorchvideo SlowFast": _has("blocks.0.multipathway_blocks."),
    "pytorchvideo R(2+1)D": _has("blocks.0.conv.", "blocks.1.res_blocks.0.branch2.conv_b.conv_t."),
    "pytorchvideo ResNet (Slow, I3D-R50, C2D, CSN)": _has_not(
        "blocks.1.res_blocks.0.branch2.conv_b.conv_t.", "blocks.0.conv.", "blocks.1.res_blocks.0.branch2.conv_b."
    ),
    "PySlowFast SlowFast": _has("s1.pathway1_stem."),
    "PySlowFast ResNet (Slow, I3D-R50, C2D)": _has_not("s1.pathway1_stem.", "s1.pathway0_stem."),
    "PySlowFast Caffe2 SlowFast": _has("conv1_w", "pred_w", "t_conv1_w"),
    "PySlowFast Caffe2 ResNet": _has_not("t_conv1_w", "conv1_w", "pred_w"),
    "mmaction2 SlowFast": _has("backbone.slow_path."),
    "mmaction2 R(2+1)D": _has("backbone.conv1.conv.conv_s."),
    "mmaction2 CSN": _has("backbone.conv1.conv.", "backbone.layer1.0.conv2.0."),
    "mmaction2 TSM": _has("backbone.conv1.conv.", "backbone.layer1.0.conv1.conv.net."),
    "mmaction2 ResNet (TSN, SlowOnly, I3D-R50)": _has(
        "backbone.conv1.conv.weight", "backbone.layer1.0.conv1.conv.weight", "backbone.layer1.0.conv2.conv."
    ),
    "mmaction2 TimeSformer": _has("backbone.transformer_layers.layers.0.", "backbone.time_embed"),
    "TSM, mit-han-lab": _has("base_model.layer1.0.conv1.net."),
    "TSN, mit-han-lab": _has("base_model.layer1.0.conv1.weight"),
    "TSP R(2+1)D or R3D": _has("features.stem.0.", "features.layer1.0.conv1.0."),
    "VMZ CSN": _has("stem.0.", "layer1.0.conv1.0.", "layer1.0.conv3.0."),
    "torchvision/ig65m R(2+1)D, R3D or MC3": _has_not("layer1.0.conv3.", "stem.0.", "layer1.0.conv1.0."),
    "TimeSformer, official": _has("blocks.0.temporal_attn.", "patch_embed.proj."),
    "TimeSformer, transformers": _has("timesformer."),
    "ViViT, transformers": _has("vivit."),
    "VideoMAE, transformers": _has("videomae."),
    "VideoMAE, MCG-NJU": _has("blocks.0.attn.q_bias", "patch_embed.proj."),
    "tad ViViT": _has("encoder.positions", "encoder.blocks.0."),
    "tad ViViT factorised encoder": _has("spatial.positions", "temporal.positions"),
    "tad SlowFast": _has("slow.stem.conv.", "fast.stem.conv."),
    "tad ResNet3D": _has("path.stem.conv.", "path.res2.0.a.conv."),
    "tad Tiny3D": _has("stem.0.weight", "s1.0.weight", "s4.1.0.weight"),
}


@dataclass(frozen=True)
class Layout:
    """How the files of one family hold one of our networks.

    Attributes
    ----------
    family : a key of ``FAMILIES``.
    arguments : the file's tensors → keyword arguments of the network, read off their shapes (``classes``, depths, ...).
    rename : a tensor's name in the file → its name in our module; ``None`` where it has no place there on purpose.
    spec : fields of the network's spec that are others for files of this family (``mean``, ``frames``, ...).
    convert : the renamed tensors → those of our module, where a name alone is not enough (such as fused qkv matrices).
    """

    family: str
    arguments: Callable[[State], dict[str, Any]]
    rename: Callable[[str], str | None] = str
    spec: Mapping[str, Any] = field(default_factory=dict)
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict


def family_of(keys: Collection[str]) -> str | None:
    """The family that names its tensors so, or ``None``."""
    return next((family for family, predicate in FAMILIES.items() if predicate(keys)), None)


def axis_size(state: State, key: str, axis: int) -> int:
    """Length of one axis of a tensor. Raises :class:`WeightsError` where there is no such tensor or axis."""
    if key not in state or axis >= state[key].ndim:
        found = f"has the shape {list(state[key].shape)}" if key in state else "is missing"
        raise WeightsError(f"{key} {found}, the network cannot be told without its axis {axis}")
    return int(state[key].shape[axis])


def sha256_of(path: str | Path) -> str:
    """Hex SHA-256 of a file, read once in a process while its size and modification time stay.

    Raises
    ------
    WeightsError : the file cannot be read.
    """
    path = Path(path).expanduser()
    try:
        stat = path.stat()
        key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        if key not in _HASHES:
            with path.open("rb") as file:
                _HASHES[key] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"weights {path} cannot be read: {error.strerror or error}") from error
    return _HASHES[key]


_HASHES: dict[tuple[str, int, int], str] = {}


def sha256_of_state(state: State) -> str:
    """Hex SHA-256 over the keys in sorted order, each followed by the bytes of its tensor (little endian, C order)."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def verify_sha256(actual: str, expected: str, *, where: str) -> None:
    """Compare hex digests; ``expected`` may begin with ``sha256:``. Raises :class:`WeightsError` with both."""
    wanted = expected.lower().removeprefix("sha256:")
    if not re.fullmatch(r"[0-9a-f]{64}", wanted):
        raise RecipeError(f"'{expected}' is no SHA-256: 64 hexadecimal digits are expected")
    if actual != wanted:
        raise WeightsError(f"{where} is another file than recorded: its sha256 is {actual}, expected {wanted}")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint (``.safetensors``, Caffe2's ``.pkl``, or what ``torch.save`` wrote), on the CPU, see
    :func:`unwrap`.

    Nothing in the file is executed: ``torch.load(weights_only=True)`` admits tensors and plain containers only.

    Raises
    ------
    WeightsError : the file is missing, damaged, no checkpoint, or needs unrestricted pickle.
    """
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise WeightsError(f"weights {path} cannot be read: {error.strerror or error}") from error
    broken = f"weights {path} are no checkpoint, or a damaged or truncated one (the file starts with {start!r})"
    if path.suffix == ".pkl" and not caffe2.is_torch(start):
        return unwrap(caffe2.read_blobs(path), where=str(path))
    if path.suffix == ".safetensors":
        try:
            return unwrap(load_file(path), where=str(path))
        except (SafetensorError, *DAMAGED) as error:
            raise WeightsError(f"{broken}: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch comments on old pickles; what matters here is whether they load
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        blocked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if blocked is None:
            raise WeightsError(broken) from error
        raise WeightsError(
            f"weights {path} need pickle: they hold the Python object {blocked[1]}, and unpickling objects can run any "
            "code, so tad reads only tensors. If you trust the file, load it once with torch.load(..., "
            "weights_only=False) and save its state dict alone"
        ) from error
    except (OSError, *DAMAGED) as error:
        raise WeightsError(f"{broken}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    return unwrap(content, where=str(path))


def unwrap(content: object, *, where: str) -> dict[str, Tensor]:
    """The state dict inside what a checkpoint holds: below one of ``WRAPPERS``, with common ``PREFIXES`` taken off.

    Raises
    ------
    WeightsError : there is none, or it holds something else than tensors.
    """
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise WeightsError(f"{where} holds a {type(content).__name__}, expected a dictionary of tensors")
    if not content:
        raise WeightsError(f"{where} holds no tensors")
    other = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if other:
        raise WeightsError(
            f"{where} is no state dict: {_some(other)} are no tensors; a state dict is looked for at the top or under "
            f"{', '.join(WRAPPERS)}"
        )
    state = {key: value.detach() for key, value in content.items()}
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def renamed(state: State, rename: Callable[[str], str | None], *, where: str) -> dict[str, Tensor]:
    """The tensors under our names. Raises :class:`WeightsError` where two of them get the same one."""
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = rename(key)
        if name in result:
            raise WeightsError(f"{where}: two tensors stand for {name}, one of them is {key}")
        if name is not None:
            result[name] = tensor
    return result


def load_into(module: nn.Module, state: State, *, where: str) -> None:
    """Copy ``state`` into ``module``: every tensor must land, and every tensor of the module must come, in its shape.

    What ends in one of ``OPTIONAL`` may be absent.

    Raises
    ------
    WeightsError : naming the first tensors that do not fit, and the family that the file looks like.
    """
    own = {key: value for key, value in module.state_dict().items() if not key.endswith("_extra_state")}  # no weights
    missing = [key for key in own if key not in state and not key.endswith(OPTIONAL)]
    unexpected = [key for key in state if key not in own]
    other = [
        f"{key} is {_form(state[key])}, the network has {_form(own[key])}"
        for key in own.keys() & state.keys()
        if _form(state[key]) != _form(own[key])
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": sorted(other)}
    problems = [f"{len(names)} tensors {kind}: {_some(names)}" for kind, names in kinds.items() if names]
    if problems:
        family = family_of(state.keys())
        looks = f" (it looks like a file of {family})" if family else ""
        raise WeightsError(f"{where} does not fit {type(module).__name__}{looks}: {'; '.join(problems)}")
    module.load_state_dict(dict(state), strict=False)


def _form(tensor: Tensor) -> str:
    """Shape, and whether it holds integers; any precision of floating point may be loaded into any other."""
    return f"{list(tensor.shape)}{'' if tensor.is_floating_point() else ' (not floating point)'}"


def _some(names: Iterable[str], count: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f", ... ({len(names)} in all)" if len(names) > count else "")
