"""From decoded segments to detections: the recipe's suppression over many videos at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from tad.detect.interface import Segments
from tad.detect.suppression import nms, soft_nms, vote
from tad.errors import RecipeError
from tad.recipe import PostprocessRecipe

TOGETHER = 2**18  # segments that are suppressed in one go
PAIRS = 2**22  # pairs of segments that voting compares in one go


def suppress(segments: Segments, recipe: PostprocessRecipe) -> Segments:
    """One video's ``segments`` after ``recipe``; see :func:`suppress_all`."""
    return suppress_all([segments], recipe)[0]


def suppress_all(found: Iterable[Segments], recipe: PostprocessRecipe) -> list[Segments]:
    """Every video's segments after ``recipe``: what is too short or too low out, best ``pre_topk``, suppression,
    voting, best ``max_segments``.

    Videos and labels are suppressed side by side, without a loop over either. Each video's result is sorted by falling
    score, keeps ``extra``, and does not depend on the other videos. Suppression is per label unless
    ``recipe.class_agnostic``.

    Raises
    ------
    RecipeError : a threshold that grows with the width of segments, and a video whose duration is not known; times or
        scores that are not finite.
    """
    result: list[Segments] = []
    for group in _groups(list(found)):
        result += _suppressed(group, recipe)
    return result


def _groups(found: Sequence[Segments]) -> Iterator[list[Segments]]:
    """Videos in order, as many together as have ``TOGETHER`` segments."""
    group: list[Segments] = []
    count = 0
    for segments in found:
        if group and count + len(segments) > TOGETHER:
            yield group
            group, count = [], 0
        group.append(segments)
        count += len(segments)
    if group:
        yield group


def _suppressed(found: Sequence[Segments], recipe: PostprocessRecipe) -> list[Segments]:
    places = [_candidates(segments, recipe) for segments in found]  # in each video
    segments_s = torch.cat([s.segments_s[place] for s, place in zip(found, places, strict=True)])  # (N, 2)
    scores = torch.cat([s.scores[place] for s, place in zip(found, places, strict=True)])  # (N,)
    labels = torch.cat([s.labels[place] for s, place in zip(found, places, strict=True)])  # (N,)
    sizes = torch.tensor([len(place) for place in places], device=scores.device)
    video = torch.repeat_interleave(torch.arange(len(found), device=scores.device), sizes)  # (N,)
    groups = _group_ids(video, labels, class_agnostic=recipe.class_agnostic)
    chosen, new_scores = _chosen(found, segments_s, scores, video, groups, recipe)
    moved = segments_s[chosen]
    if recipe.voting is not None:
        moved = _voted(moved, chosen, segments_s, scores, groups, recipe)
    starts = torch.cumsum(sizes, 0) - sizes
    by_video = torch.argsort(video[chosen], stable=True)
    parts = by_video.split(torch.bincount(video[chosen], minlength=len(found)).tolist())
    result = []
    for number, (segments, place, part) in enumerate(zip(found, places, parts, strict=True)):
        part = part[: recipe.max_segments]
        own = place[chosen[part] - starts[number]]
        extra = {name: value[own] for name, value in segments.extra.items()}
        kept_s = moved[part].to(segments.segments_s.dtype)
        kept_scores = new_scores[part].to(segments.scores.dtype)
        result.append(Segments(segments.video, kept_s, segments.labels[own], kept_scores, extra, segments.duration_s))
    return result


def _candidates(segments: Segments, recipe: PostprocessRecipe) -> Tensor:
    """Places of the ``pre_topk`` best-scored segments that are long and good enough, by falling score, then place."""
    if not (torch.isfinite(segments.segments_s).all() and torch.isfinite(segments.scores).all()):
        raise RecipeError(
            f"video {segments.video}: times or scores of its segments are not finite; has the detector diverged?"
        )
    lengths = segments.segments_s[:, 1] - segments.segments_s[:, 0]
    places = torch.nonzero((segments.scores >= recipe.min_score) & (lengths >= recipe.min_length_s)).squeeze(1)
    if len(places) > recipe.pre_topk:  # before sorting: sorting all of them would take longer than suppression
        scores = segments.scores[places]
        places = places[scores >= scores.topk(recipe.pre_topk).values[-1]]
    return places[torch.argsort(segments.scores[places], descending=True, stable=True)][: recipe.pre_topk]


def _group_ids(video: Tensor, labels: Tensor, *, class_agnostic: bool) -> Tensor:
    """(M,) one number for every pair of video and label (every video, if class-agnostic)."""
    if class_agnostic:
        return video
    classes, index = torch.unique(labels, return_inverse=True)
    return video * len(classes) + index


def _chosen(
    found: Sequence[Segments],
    segments_s: Tensor,
    scores: Tensor,
    video: Tensor,
    groups: Tensor,
    recipe: PostprocessRecipe,
) -> tuple[Tensor, Tensor]:
    """Places that suppression leaves, by falling score, and their scores."""
    if recipe.method == "nms":
        chosen = nms(segments_s, scores, groups, tiou=recipe.tiou)
        return chosen, scores[chosen]
    if recipe.method == "none":
        chosen = torch.argsort(scores, descending=True, stable=True)
        return chosen, scores[chosen]
    if recipe.soft_tiou_high is not None:
        durations = torch.tensor([s.duration_s for s in found], dtype=torch.float32, device=segments_s.device)
        unknown = [found[index].video for index in video.unique().tolist() if not found[index].duration_s > 0]
        if unknown:
            raise RecipeError(
                f"postprocess.soft_tiou_high grows with a segment's share of its video, and the duration of "
                f"{unknown[0]} is not known"
            )
        segments_s = segments_s / durations[video][:, None]
    return soft_nms(
        segments_s,
        scores,
        groups,
        method=recipe.decay,
        sigma=recipe.sigma,
        tiou=recipe.soft_tiou,
        tiou_high=recipe.soft_tiou_high,
        power=recipe.power,
        min_score=recipe.min_score,
        max_per_label=recipe.max_segments,
    )


def _voted(
    moved: Tensor, chosen: Tensor, segments_s: Tensor, scores: Tensor, groups: Tensor, recipe: PostprocessRecipe
) -> Tensor:
    """Voting inside each group, groups side by side: a row of a table each, padded with segments that weigh nothing."""
    assert recipe.voting is not None
    if len(chosen) == 0:
        return moved
    ids = torch.unique(groups, return_inverse=True)[1]  # (M,) 0, 1, 2, ...
    count = int(ids.max()) + 1
    voters, electees = _table(ids, count), _table(ids[chosen], count)  # (G, n), (G, k); -1 = padding
    result = moved.clone()
    rows = max(1, PAIRS // max(1, voters.shape[1] * electees.shape[1]))
    for voter, elected in zip(voters.split(rows), electees.split(rows), strict=True):
        weights = torch.where(voter >= 0, scores[voter.clamp(min=0)], 0.0)  # (g, n)
        means = vote(
            moved[elected.clamp(min=0)],
            segments_s[voter.clamp(min=0)],
            weights,
            tiou=recipe.voting,
            by_tiou=recipe.voting_by_tiou,
        )  # (g, k, 2)
        result[elected[elected >= 0]] = means[elected >= 0]
    return result


def _table(ids: Tensor, count: int) -> Tensor:
    """Places of every id 0 … count - 1 as rows (count, longest), padded with -1."""
    sizes = torch.bincount(ids, minlength=count)
    order = torch.argsort(ids, stable=True)
    column = torch.arange(len(ids), device=ids.device) - (torch.cumsum(sizes, 0) - sizes)[ids[order]]
    table = torch.full((count, int(sizes.max())), -1, dtype=torch.int64, device=ids.device)
    table[ids[order], column] = order
    return table
