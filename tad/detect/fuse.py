"""Ensembles from saved raw detections: averaged maps, pooled segments, a weight for each member.

Qing et al. 2021 ("Exploring Stronger Feature for Temporal Action Localization", §3) average the confidence maps of
several BMNs and pool the refined proposals of several TCANets.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tad.annotations import Truth
from tad.detect.align import SAME_AXIS
from tad.detect.detectors import build_detector
from tad.detect.infer import detections, with_scores
from tad.detect.interface import DenseDetector, Segments
from tad.detect.raw import MapView, Raw, RawMaps, holds_maps, load_maps, load_raw, npz_path, save_raw
from tad.detect.windows import of_whole_videos
from tad.errors import RecipeError
from tad.evaluate import detection_map
from tad.recipe import ClassesRecipe, DetectRecipe, PostprocessRecipe

logger = logging.getLogger("tad.detect")
TIOU = (0.3, 0.4, 0.5, 0.6, 0.7)  # whose average mAP a search maximises
TRIED = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # weights that a search gives a member, times its own


@dataclass(frozen=True)
class Ensemble:
    """Members of an ensemble, read once; ``predict`` says what they find together."""

    members: tuple[Raw | RawMaps, ...]
    names: tuple[str, ...]

    @classmethod
    def load(cls, files: Sequence[str | Path]) -> Ensemble:
        """Members from files of ``detect(..., raw_out=...)`` and ``detect(..., maps_out=...)``.

        Raises
        ------
        RecipeError : no file, one that is not raw detections or maps, members that find classes beside such that do
            not, maps over different grids.
        """
        if not files:
            raise RecipeError("an ensemble needs at least one file of raw detections or maps")
        members = tuple(load_maps(file) if holds_maps(file) else load_raw(file) for file in files)
        names = tuple(map(str, files))
        if len({_agnostic(member) for member in members}) > 1:
            told = ", ".join(f"{n}: {'no' if _agnostic(m) else 'yes'}" for n, m in zip(names, members, strict=True))
            raise RecipeError(f"members that find classes cannot be fused with such that do not ({told})")
        maps = [(n, m) for n, m in zip(names, members, strict=True) if isinstance(m, RawMaps)]
        _check_same_grids(maps)
        return cls(members, names)

    def raw(self, weights: Sequence[float] | None = None) -> Raw:
        """All members' segments before suppression.

        Maps are averaged, by weight, and decoded as those of one member, of their mean weight; the scores of every
        member's segments are multiplied by its weight over the largest. Class scores are averaged by weight as well.
        A video that some members lack is that of the others.
        """
        weights = checked_weights(weights, len(self.members))
        largest = max(weights)
        groups: list[tuple[float, Raw]] = []
        averaged = [(m, w) for m, w in zip(self.members, weights, strict=True) if isinstance(m, RawMaps) and w > 0]
        if averaged:
            mean = sum(w for _, w in averaged) / len(averaged)
            groups.append((mean / largest, _decoded(averaged)))
        groups += [(w / largest, m) for m, w in zip(self.members, weights, strict=True) if isinstance(m, Raw) and w > 0]
        classes = list(dict.fromkeys(name for member in self.members for name in member.classes))
        pooled = of_whole_videos(
            replace(s, scores=s.scores * factor, labels=_relabelled(s, raw, classes), extra={})
            for factor, raw in groups
            for s in raw.segments
        )
        agnostic = _agnostic(self.members[0])
        scores = _mean_scores([m.class_scores for m in self.members], weights) if agnostic else None
        return Raw(pooled, classes, agnostic, scores, self.recipe)

    @property
    def recipe(self) -> DetectRecipe | None:
        """Of the first member: its suppression and class fusion are the ensemble's, unless others are given."""
        return self.members[0].recipe

    def predict(
        self,
        weights: Sequence[float] | None = None,
        *,
        postprocess: PostprocessRecipe | None = None,
        classes: ClassesRecipe | None = None,
        scores: pd.DataFrame | None = None,
    ) -> pd.DataFrame:
        """What the members find together: a table video, start_s, end_s, label, score."""
        return _table(with_scores(self.raw(weights), scores), postprocess, classes)


def fuse(
    files: Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    postprocess: PostprocessRecipe | None = None,
    classes: ClassesRecipe | None = None,
    scores: pd.DataFrame | None = None,
    raw_out: str | Path | None = None,
) -> pd.DataFrame:
    """Detections of an ensemble from its members' raw detections and maps; see :class:`Ensemble`.

    Parameters
    ----------
    files : of ``detect(..., raw_out=...)`` or ``detect(..., maps_out=...)``.
    weights : one a member, at least 0; by default all alike.
    postprocess, classes : by default the first member's.
    scores : class scores by video instead of the members' own.
    raw_out : also write the pooled segments before suppression to this ``.npz``, itself a member of other ensembles.

    Raises
    ------
    RecipeError : files or weights that do not fit together.
    """
    path = None if raw_out is None else npz_path(raw_out, name="raw_out")
    ensemble = Ensemble.load(files)
    raw = with_scores(ensemble.raw(weights), scores)
    if path is not None:
        save_raw(path, raw)
    return _table(raw, postprocess, classes)


def _table(raw: Raw, postprocess: PostprocessRecipe | None, classes: ClassesRecipe | None) -> pd.DataFrame:
    table, unscored = detections(raw, postprocess, classes)
    if unscored:
        logger.warning("%d videos have no class scores and no detections, such as %s", len(unscored), unscored[0])
    return table


@dataclass(frozen=True)
class Trial:
    """One set of weights of a search, and its average mAP."""

    weights: tuple[float, ...]
    average_map: float


def search_weights(
    ensemble: Ensemble,
    truth: Truth | pd.DataFrame,
    *,
    tiou: Sequence[float] = TIOU,
    rounds: int = 3,
    **predict: Any,
) -> list[Trial]:
    """Weights with the best average mAP on ``truth``, by coordinate ascent from equal ones; all trials, best first.

    In a round every member in turn is given each of :data:`TRIED` times its weight (and once its start), the others
    kept; it ends with a round that finds nothing better. Use videos on which no member was trained. ``predict`` are
    further arguments of :meth:`Ensemble.predict`.
    """
    segments = truth.segments if isinstance(truth, Truth) else truth
    tried: dict[tuple[float, ...], float] = {}

    def score(weights: tuple[float, ...]) -> float:
        key = tuple(round(w / max(weights), 6) for w in weights)
        if key not in tried:
            found = ensemble.predict(weights, **predict)
            if "label" not in found:
                raise RecipeError("a search needs detections with classes: the members have no class scores")
            tried[key] = float(detection_map(segments, found, tiou=tuple(tiou)).average)
        return tried[key]

    best: tuple[float, ...] = (1.0,) * len(ensemble.members)
    score(best)
    for _ in range(rounds):
        before = best
        for index in range(len(best)):
            for weights in _variants(best, index):
                if score(weights) > score(best):
                    best = weights
        if best == before:
            break
    trials = [Trial(weights, value) for weights, value in tried.items()]
    return sorted(trials, key=lambda trial: -trial.average_map)


def checked_weights(weights: Sequence[float] | None, members: int) -> tuple[float, ...]:
    """One weight a member. Raises :class:`RecipeError` for another number of them, negative ones, or only zeros."""
    if weights is None:
        return (1.0,) * members
    if len(weights) != members:
        raise RecipeError(f"{len(weights)} weights for {members} members: give one each, in their order")
    if not all(math.isfinite(w) and w >= 0 for w in weights) or max(weights) == 0:
        raise RecipeError(f"weights must be at least 0, one of them above, got {', '.join(f'{w:g}' for w in weights)}")
    return tuple(float(w) for w in weights)


def _variants(weights: tuple[float, ...], index: int) -> Iterator[tuple[float, ...]]:
    for factor in TRIED:
        value = (weights[index] or 1.0) * factor
        changed = (*weights[:index], value, *weights[index + 1 :])
        if max(changed) > 0:
            yield changed


def _agnostic(member: Raw | RawMaps) -> bool:
    return True if isinstance(member, RawMaps) else member.class_agnostic


def _relabelled(segments: Segments, raw: Raw, classes: list[str]) -> Tensor:
    """Labels of one member as those of the ensemble, whose classes are the union of all members'."""
    if raw.class_agnostic or raw.classes == classes:
        return segments.labels
    return torch.tensor([classes.index(name) for name in raw.classes], dtype=torch.int64)[segments.labels]


def _decoded(members: Sequence[tuple[RawMaps, float]]) -> Raw:
    """Weighted means of maps, view by view, decoded by the first member's detector (which needs no weights for it)."""
    first = members[0][0]
    recipe = first.recipe
    detector = build_detector(recipe.detector, channels=first.channels, classes=len(first.classes), **recipe.model)
    if not isinstance(detector, DenseDetector):
        raise RecipeError(f"'{recipe.detector}' does not decode maps")
    views: dict[tuple[str, int], list[tuple[MapView, float]]] = {}
    for member, weight in members:
        for key, view in _numbered(member.views):
            views.setdefault(key, []).append((view, weight))
    found = []
    for parts in views.values():
        total = sum(weight for _, weight in parts)
        maps = {name: torch.stack([v.maps[name] * (w / total) for v, w in parts]).sum(0) for name in parts[0][0].maps}
        view = parts[0][0]
        segments = detector.decode_dense(maps, video=view.video, axis=view.axis, duration_s=view.duration_s)
        found.append(replace(segments, duration_s=view.duration_s))
    return Raw(of_whole_videos(found), first.classes, class_agnostic=True, recipe=recipe)


def _numbered(views: Sequence[MapView]) -> Iterator[tuple[tuple[str, int], MapView]]:
    """Views with their video and number in it."""
    counts: dict[str, int] = {}
    for view in views:
        number = counts.get(view.video, 0)
        counts[view.video] = number + 1
        yield (view.video, number), view


def _check_same_grids(members: Sequence[tuple[str, RawMaps]]) -> None:
    """Raise :class:`RecipeError` unless the maps of every video, in all members that have it, lie over the same
    proposals."""
    known: dict[str, tuple[str, list[MapView]]] = {}  # of the first member that has a video
    for name, member in members:
        by_video: dict[str, list[MapView]] = {}
        for view in member.views:
            by_video.setdefault(view.video, []).append(view)
        for video, views in by_video.items():
            first_name, first = known.setdefault(video, (name, views))
            if [_shapes(view) for view in views] != [_shapes(view) for view in first]:
                raise RecipeError(f"video {video}: the maps of {first_name} and {name} are not over the same proposals")
            for same, view in zip(first, views, strict=True):
                last = max(map(max, _shapes(view).values()))
                drift_s = max(abs(same.axis.center_s(row) - view.axis.center_s(row)) for row in (0, last))
                if drift_s > SAME_AXIS * same.axis.scale_s:
                    raise RecipeError(
                        f"video {video}: the maps of {first_name} and {name} lie {drift_s:.3g} s apart; "
                        "members must be rescaled, or windowed, in the same way"
                    )


def _shapes(view: MapView) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in view.maps.items()}


def _mean_scores(tables: Sequence[pd.DataFrame | None], weights: Sequence[float]) -> pd.DataFrame | None:
    """Class scores averaged by weight, over the members that have them for a video and class."""
    given = [(table, weight) for table, weight in zip(tables, weights, strict=True) if table is not None and weight > 0]
    if not given:
        return None
    videos = pd.Index(list(dict.fromkeys(video for table, _ in given for video in table.index)))
    names = pd.Index(list(dict.fromkeys(name for table, _ in given for name in table.columns)))
    total = pd.DataFrame(0.0, index=videos, columns=names)
    weight_of = total.copy()
    for table, weight in given:
        full = table.reindex(index=videos, columns=names)
        total += weight * full.fillna(0.0)
        weight_of += weight * full.notna()
    return total / weight_of.where(weight_of > 0)
