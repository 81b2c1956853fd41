"""Stage outputs that are stored with their height and width: how they are called, what type they have, how large."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tad.errors import RecipeError, TadError, did_you_mean
from tad.extract.backbones.base import Backbone, BackboneSpec


def map_name(level: str) -> str:
    """What the store calls the stage output ``level`` with its height and width; averaged it keeps its own name."""
    return f"{level}-map"


def maps_of(spec: BackboneSpec, wanted: Sequence[str]) -> dict[str, int]:
    """Stage outputs to be kept -> frames a position, in the network's order.

    Raises
    ------
    RecipeError : the network has no such stage output.
    """
    for level in wanted:
        if level not in spec.levels:
            hint = did_you_mean(level, spec.levels) if spec.levels else " It has none"
            raise RecipeError(f"--maps {level}: {spec.name} has no such stage output.{hint}")
    return {level: info.stride for level, info in spec.levels.items() if level in wanted}


def as_half(maps: Tensor, *, where: str) -> Tensor:
    """``maps`` in float16. Raises :class:`TadError` instead of making infinity of large values."""
    largest = float(maps.abs().amax())
    if not largest <= torch.finfo(torch.float16).max:
        raise TadError(f"{where} has values up to {largest:g}, float16 ends at 65504: its maps cannot be stored")
    return maps.half()


def map_shapes(
    backbone: Backbone, levels: Iterable[str], *, frames: int, size: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    """(C, H', W') of these stage outputs for clips of ``size`` (height, width), by level; nothing is computed."""
    tensors = {name: tensor.to("meta") for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers())}
    clip = torch.empty(1, len(backbone.spec.mean), frames, *size, device="meta")
    with torch.no_grad():
        outputs = torch.func.functional_call(backbone, tensors, (clip,), {"levels": True})
    return {level: (outputs[level].shape[1], *outputs[level].shape[3:]) for level in levels}
