"""Checkpoints that tad writes itself: a network's tensors under its own names, and what it is, in the file's metadata.

Public files tell the network by the names and shapes of their tensors. A fine-tuned network may have begun with a file
whose normalisation or arithmetic differ from those of its name: ours say it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tad.errors import WeightsError
from tad.extract.backbones.base import Backbone, BackboneSpec

KEY = "network"  # below `tad` in the metadata of a safetensors file
EXTRA = "_extra_state"  # where torch keeps a module's own additions to its state dict
SPEC = tuple(field.name for field in fields(BackboneSpec) if field.name != "levels")


def described(backbone: Backbone) -> dict[str, Any]:
    """What to write under ``KEY``: plain data. Raises :class:`WeightsError` for a backbone not made by its name."""
    if backbone.arguments is None:
        raise WeightsError(f"{backbone.spec.name} was not made by build_backbone: its file could not say what it is")
    spec = {name: getattr(backbone.spec, name) for name in SPEC}
    plain: dict[str, Any] = json.loads(json.dumps({"arguments": backbone.arguments, "spec": spec}))
    return plain


def description(path: str | Path) -> dict[str, Any] | None:
    """What :func:`described` gave when the file was written, with tuples again; ``None`` for any other file.

    Raises :class:`WeightsError` for a description that is malformed.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return None  # whoever reads the tensors says what is wrong
    try:
        about = json.loads(metadata.get("tad", "{}"))
        held = about.get(KEY)
    except (ValueError, AttributeError):
        held = None
    return None if held is None else _understood(held, str(path))


def description_in(state: Mapping[str, Tensor], *, where: str) -> dict[str, Any] | None:
    """Likewise of a state dict that says what it is of (see ``ResidualBackbone.get_extra_state``)."""
    text = state.get(EXTRA)
    if text is None or text.dtype != torch.uint8 or text.numel() == 0:
        return None
    try:
        held = json.loads(bytes(text.flatten().tolist()))
    except ValueError as error:
        raise WeightsError(f"{where}: its {EXTRA} is no description of a network ({error}); save it again") from error
    return _understood(held, where)


def _understood(held: Any, where: str) -> dict[str, Any]:
    try:
        spec = {name: _tuples(value) for name, value in held["spec"].items() if name in SPEC}
        return {"name": str(spec["name"]), "arguments": dict(_items(held["arguments"])), "spec": spec}
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{where}: what it says of its network is malformed ({error!r}); write it again") from error


def _items(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: _tuples(value) for name, value in arguments.items()}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
