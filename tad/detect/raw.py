"""What networks found, on disk: decoded segments, and maps over a grid of proposals, before suppression and classes.

From these files alone suppression, fusion with class scores, and ensembles run again, without any network.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tad.detect.interface import Segments
from tad.detect.runs import write_atomic
from tad.errors import RecipeError
from tad.recipe import DetectRecipe, validated
from tad.timeline import TimeAxis

NO_ARRAYS = (OSError, EOFError, ValueError, BadZipFile, zlib.error)  # what NumPy raises for files that are none of its


@dataclass
class Raw:
    """Decoded segments by video, and what makes detections of them.

    ``class_scores``: index video, columns class names; of class-agnostic segments, whose labels are all 0.
    ``recipe``: of the run that found them, None in files of tad 0.1.
    """

    segments: list[Segments]
    classes: list[str]
    class_agnostic: bool = False
    class_scores: pd.DataFrame | None = None
    recipe: DetectRecipe | None = None


@dataclass
class MapView:
    """The maps of one view of a video (see :class:`~tad.detect.interface.DenseDetector`), and where it lies in time."""

    video: str
    axis: TimeAxis
    duration_s: float
    maps: dict[str, Tensor]


@dataclass
class RawMaps:
    """Maps of all views of all videos, and what decodes them; ``channels`` is stream → width."""

    views: list[MapView]
    classes: list[str]
    recipe: DetectRecipe
    channels: dict[str, int] = field(default_factory=dict)
    class_scores: pd.DataFrame | None = None


def npz_path(path: str | Path, *, name: str) -> Path:
    """``path``, checked. Raises :class:`RecipeError` unless it ends in ``.npz``."""
    if Path(path).suffix != ".npz":
        raise RecipeError(f"{name} {path} must end in .npz")
    return Path(path)


def save_raw(path: Path, raw: Raw) -> None:
    """Write decoded segments as one ``.npz``.

    ``videos`` and ``classes`` are names, ``durations`` the videos' lengths in seconds; ``video`` (N,) and ``labels``
    (N,) index them; ``segments`` (N, 2) seconds, ``scores`` (N,), and ``extra/<name>`` of what all videos have.
    ``class_scores`` (videos, classes) are there for class-agnostic segments, NaN where a video has none.
    """
    found = raw.segments
    extras = set.intersection(*[set(s.extra) for s in found]) if found else set()
    arrays: dict[str, Any] = {
        "videos": np.array([s.video for s in found], dtype=str),
        "durations": np.array([s.duration_s for s in found], dtype=np.float64),
        "video": np.repeat(np.arange(len(found), dtype=np.int32), [len(s) for s in found]),
        "segments": joined([s.segments_s for s in found], torch.zeros(0, 2)).numpy(),
        "labels": joined([s.labels for s in found], torch.zeros(0, dtype=torch.int64)).numpy().astype(np.int32),
        "scores": joined([s.scores for s in found], torch.zeros(0)).numpy(),
        "class_agnostic": np.array(raw.class_agnostic),
        **{f"extra/{name}": torch.cat([s.extra[name] for s in found]).numpy() for name in sorted(extras)},
        **_common(raw.classes, raw.recipe, raw.class_scores),
    }
    write_atomic(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def load_raw(path: str | Path) -> Raw:
    """What :func:`save_raw` wrote. Raises :class:`RecipeError` when the file is not one of ours."""
    try:
        data = _arrays(path)
        videos = data["videos"].tolist()
        bounds = np.searchsorted(data["video"], np.arange(len(videos) + 1))
        durations = data["durations"] if "durations" in data else np.full(len(videos), np.nan)  # absent in tad 0.1
        fields = ("segments", "labels", "scores")
        tensors = {k: torch.from_numpy(v) for k, v in data.items() if k in fields or k.startswith("extra/")}
        found = []
        for index, video in enumerate(videos):
            part = {name: value[bounds[index] : bounds[index + 1]] for name, value in tensors.items()}
            segments, labels, scores = (part.pop(name) for name in fields)
            extra = {name.removeprefix("extra/"): value for name, value in part.items()}
            found.append(Segments(video, segments, labels.long(), scores, extra, float(durations[index])))
        classes, recipe, class_scores = _read_common(data, path)
        agnostic = bool(data.get("class_agnostic", np.array(False)))
    except (*NO_ARRAYS, TypeError, LookupError) as error:
        raise RecipeError(
            f"{path} does not hold raw detections ({error}); write it with detect(..., raw_out=...)"
        ) from error
    return Raw(found, classes, agnostic, class_scores, recipe)


def save_maps(path: Path, raw: RawMaps) -> None:
    """Write maps as one compressed ``.npz``: ``<number of the view>/<map>`` in half precision, and their table.

    Vectors keep single precision: rounded, neighbours would fall together and peaks be lost.
    """
    table = [{"video": v.video, "axis": v.axis.to_dict(), "duration_s": v.duration_s} for v in raw.views]
    arrays: dict[str, Any] = {
        f"{number}/{name}": value.numpy().astype(np.float16 if value.ndim > 1 else np.float32)
        for number, view in enumerate(raw.views)
        for name, value in view.maps.items()
    }
    arrays["views"] = np.array(json.dumps(table))
    arrays["channels"] = np.array(json.dumps(raw.channels))
    arrays |= _common(raw.classes, raw.recipe, raw.class_scores)
    write_atomic(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))


def load_maps(path: str | Path) -> RawMaps:
    """What :func:`save_maps` wrote, in float32. Raises :class:`RecipeError` when the file is not one of ours."""
    try:
        data = _arrays(path)
        maps: dict[int, dict[str, Tensor]] = {}
        for key, value in data.items():
            number, slash, name = key.partition("/")
            if slash:
                maps.setdefault(int(number), {})[name] = torch.from_numpy(value.astype(np.float32))
        views = [
            MapView(entry["video"], TimeAxis(**entry["axis"]), float(entry["duration_s"]), maps[number])
            for number, entry in enumerate(json.loads(str(data["views"])))
        ]
        classes, recipe, class_scores = _read_common(data, path)
        if recipe is None:
            raise ValueError("it has no recipe")
        channels = {str(k): int(v) for k, v in json.loads(str(data["channels"])).items()}
    except (*NO_ARRAYS, TypeError, LookupError) as error:
        raise RecipeError(
            f"{path} does not hold raw maps ({error}); write it with detect(..., maps_out=...)"
        ) from error
    return RawMaps(views, classes, recipe, channels, class_scores)


def holds_maps(path: str | Path) -> bool:
    """Whether a file is one of :func:`save_maps`. Raises :class:`RecipeError` when it cannot be read as ``.npz``."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            return "views" in file.files
    except (*NO_ARRAYS, TypeError, AttributeError) as error:
        raise RecipeError(f"{path} is not a file of raw detections or maps ({error})") from error


def joined(parts: list[Tensor], empty: Tensor) -> Tensor:
    """All ``parts`` in one, ``empty`` where there is none."""
    return torch.cat([empty, *parts])


def _arrays(path: str | Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _common(
    classes: Sequence[str], recipe: DetectRecipe | None, class_scores: pd.DataFrame | None
) -> dict[str, np.ndarray]:
    arrays = {"classes": np.array(list(classes), dtype=str)}
    if recipe is not None:
        arrays["recipe"] = np.array(recipe.model_dump_json())
    if class_scores is not None:
        arrays["class_scores"] = class_scores.to_numpy(np.float64)
        arrays["class_score_videos"] = np.array([str(video) for video in class_scores.index], dtype=str)
        arrays["class_score_names"] = np.array([str(name) for name in class_scores.columns], dtype=str)
    return arrays


def _read_common(
    data: Mapping[str, np.ndarray], path: str | Path
) -> tuple[list[str], DetectRecipe | None, pd.DataFrame | None]:
    recipe = None
    if "recipe" in data:
        recipe = validated(DetectRecipe, json.loads(str(data["recipe"])), where=str(path))
    scores = None
    if "class_scores" in data:
        scores = pd.DataFrame(
            data["class_scores"], index=data["class_score_videos"].tolist(), columns=data["class_score_names"].tolist()
        )
    return data["classes"].tolist(), recipe, scores
