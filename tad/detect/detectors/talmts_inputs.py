"""What a TAL-MTS recipe says about its inputs, checked: streams, frames, stored levels, bounds of the levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tad.detect.detectors.common import check_names, is_list
from tad.detect.interface import Batch
from tad.errors import RecipeError, did_you_mean

Bounds = Sequence[Sequence[float]]
# AFSD's on ActivityNet-1.3: frames to the farther end of an action, of a clip of 768 frames, for each of six levels
ACTIVITYNET_BOUNDS = ((0, 30), (15, 60), (30, 120), (60, 240), (96, 768), (256, 768))
ACTIVITYNET_FRAMES = 768


def streams_read(
    channels: Mapping[str, int], fusion: str, frames: str | Mapping[str, str] | None
) -> tuple[list[str], list[str | None]]:
    """The streams of features that ``fusion`` reads, in order, and of each the stream of frames that goes with it.

    Raises :class:`RecipeError` for names that are not in ``channels``, or no stream of features to read.
    """
    if frames is not None and not isinstance(frames, (str, Mapping)):
        raise RecipeError(f"frames must name a stream, or give streams of features one each, got {frames!r}")
    named = dict(frames) if isinstance(frames, Mapping) else {}
    pictures = [frames] if isinstance(frames, str) else list(named.values())
    for name in [*named, *pictures]:
        if not isinstance(name, str) or name not in channels:
            raise RecipeError(f"frames: {name!r} is not among the recipe's streams.{did_you_mean(str(name), channels)}")
    streams = [stream for stream in channels if stream not in pictures]
    if not streams:
        raise RecipeError("at least one stream of features is needed, beside frames")
    if fusion != "late" and len(streams) > 1:
        if len(streams) != 2:
            raise RecipeError(f"fusion '{fusion}' picks one of two streams (rgb first), got {', '.join(streams)}")
        streams = streams[:1] if fusion == "rgb" else streams[1:]
    return streams, [frames if isinstance(frames, str) else named.get(stream) for stream in streams]


def level_shapes(
    levels: Sequence[str], level_channels: Mapping[str, int | Sequence[int]] | None, channels: int
) -> dict[str, tuple[int, ...]]:
    """Level → shape of its stored rows, (C,) or (C, H, W); ``channels`` where it is not given.

    Raises :class:`RecipeError` for levels that are no names or repeat, and shapes that are none, or of other levels.
    """
    check_names("levels", levels, such_as="[s4-map, s8-map]")
    if level_channels is None:
        return dict.fromkeys(levels, (channels,))
    if not isinstance(level_channels, Mapping) or set(level_channels) != set(levels):
        got = ", ".join(map(str, level_channels)) if isinstance(level_channels, Mapping) else repr(level_channels)
        raise RecipeError(f"level_channels must name the levels {', '.join(levels)}, got {got}")
    shapes = {}
    for level in levels:
        given = level_channels[level]
        shape = (given,) if isinstance(given, int) else given
        numbers = isinstance(shape, Sequence) and not isinstance(shape, str)
        if not numbers or len(shape) not in (1, 3) or not all(type(n) is int and n >= 1 for n in shape):
            raise RecipeError(
                f"level_channels: level '{level}' has channels, or [channels, height, width] of maps, got {given!r}"
            )
        shapes[level] = tuple(shape)
    return shapes


def stored_shapes(
    model: Mapping[str, Any], stored: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> dict[str, list[int] | dict[str, int | list[int]]]:
    """``frame_size`` and ``level_channels`` of a recipe's ``model``, from ``stored``: stream → level → shape of a row.

    What streams do not agree on, or no stream has, is left out; so are the channels of rows that are just ``features``.
    """
    frames, levels = model.get("frames"), model.get("levels", ["features"])
    pictures = list(frames.values()) if isinstance(frames, Mapping) else [frames]
    found: dict[str, list[int] | dict[str, int | list[int]]] = {}
    sizes = {shape[1:] for name, own in stored.items() if name in pictures for shape in own.values() if len(shape) == 3}
    if len(sizes) == 1:
        found["frame_size"] = list(sizes.pop())
    features = [own for name, own in stored.items() if name not in pictures]
    names = [name for name in levels if isinstance(name, str)] if isinstance(levels, list | tuple) else []
    shapes = {tuple(own.get(name, ()) for name in names) for own in features if names}
    for shape in shapes:
        maps = any(len(row) > 1 for row in shape)
        if len(shapes) == 1 and all(shape) and (maps or names != ["features"]):
            found["level_channels"] = {
                n: row[0] if len(row) == 1 else [*row] for n, row in zip(names, shape, strict=True)
            }
    return found


def frame_shape(size: Sequence[int]) -> tuple[int, int]:
    """Height and width of frames. Raises :class:`RecipeError`."""
    if not is_list(size) or len(size) != 2 or not all(type(side) is int and side >= 1 for side in size):
        raise RecipeError(f"frame_size must be [height, width] in pixels, got {size!r}")
    return size[0], size[1]


def level_bounds(bounds: Bounds | Literal["activitynet"] | None, levels: int, rows: int) -> Tensor | None:
    """(levels, 2) in rows of the finest level, of which a clip has ``rows``; None: no bounds. Raises RecipeError."""
    if bounds is None:
        return None
    if isinstance(bounds, str):
        if bounds != "activitynet" or levels != len(ACTIVITYNET_BOUNDS):
            raise RecipeError(
                f"bounds '{bounds}' with {levels} levels: there are those of 'activitynet', for "
                f"{len(ACTIVITYNET_BOUNDS)}; or give [low, high] for every level, in rows"
            )
        return torch.tensor(ACTIVITYNET_BOUNDS, dtype=torch.float32) * rows / ACTIVITYNET_FRAMES
    if not is_list(bounds) or len(bounds) != levels or not all(map(_is_span, bounds)):
        raise RecipeError(f"bounds must be [low, high] in rows for each of {levels} levels, got {bounds!r}")
    return torch.tensor([tuple(map(float, pair)) for pair in bounds], dtype=torch.float32)


def _is_span(pair: object) -> bool:
    if not isinstance(pair, Sequence) or len(pair) != 2:
        return False
    return all(isinstance(side, (int, float)) for side in pair) and bool(pair[0] < pair[1])


def mask_of(batch: Batch, key: str, rows: int) -> Tensor:
    """(B, ``rows``) bool of the rows behind ``key``: the batch's own, or those that cover the real rows of its mask."""
    mask = batch.mask_of(key)
    if mask.shape[1] == rows:
        return mask
    count = (mask.sum(1, keepdim=True) * rows + mask.shape[1] - 1) // mask.shape[1]
    return torch.arange(rows, device=mask.device) < count
