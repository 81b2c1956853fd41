"""Class-agnostic proposals become detections: each takes the best classes of its whole video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch

from tad.detect.interface import Segments
from tad.errors import AnnotationError, RecipeError

Array = np.ndarray
COMBINE = ("product", "sqrt")
SHOWN = 5  # names of a list that a message spells out


def fused(
    found: Sequence[Segments],
    scores: pd.DataFrame,
    *,
    classes: Sequence[str],
    top: int = 2,
    combine: Literal["product", "sqrt"] = "product",
    max_segments: int | None = None,
) -> tuple[list[Segments], list[str]]:
    """Every proposal of a video as a detection of each of the video's ``top`` best classes.

    The usual end of proposal-based systems (BSN, BMN, TCANet, ETAD: ``product``; ActionFormer: ``sqrt``).

    Parameters
    ----------
    found : proposals, all with label 0; scores of at least 0.
    scores : index of video ids, a column a class, values of at least 0 (probabilities); NaN where a video was not
        scored for a class. Columns that are not in ``classes`` are passed over before the best are taken, and classes
        without a column are never given.
    classes : names of the detections' labels.
    top : classes a video; of equal ones the earlier columns.
    combine : how a proposal's score s and a class' score c make the detection's: ``s * c``, or ``sqrt(s * c)``.
    max_segments : detections to keep of every video, the best ones; None: all.

    Returns
    -------
    One :class:`Segments` for each of ``found``, sorted by falling score, ``labels`` indexing ``classes``, with the
    proposals' ``extra``; and the videos without scores, of which all proposals are left out.

    Raises
    ------
    RecipeError : ``top``, ``combine`` or ``max_segments`` out of range; proposals that have classes or negative scores.
    AnnotationError : a video or class twice, no column in ``classes``, negative or infinite scores.
    """
    if top < 1:
        raise RecipeError(f"top must be at least 1 class a video, got {top}")
    if combine not in COMBINE:
        raise RecipeError(f"combine must be one of {', '.join(COMBINE)}, got {combine!r}")
    if max_segments is not None and max_segments < 1:
        raise RecipeError(f"max_segments must be at least 1, got {max_segments}")
    _check_proposals(found)
    names, values = _usable(scores, classes)
    best = np.argsort(np.where(np.isnan(values), math.inf, -values), axis=1, kind="stable")[:, :top]  # (videos, k)
    label_of = np.array([list(classes).index(name) for name in names], np.int64)
    of_class = np.take_along_axis(values, best, axis=1)  # (videos, k)
    row = pd.Index(scores.index, dtype="object").get_indexer(pd.Index([s.video for s in found], dtype="object"))
    missing = list(dict.fromkeys(s.video for s, r in zip(found, row, strict=True) if r < 0))
    if not found:
        return [], missing

    counts = np.array([len(s) for s in found])
    video = np.repeat(np.arange(len(found)), counts)  # (N,) of every proposal
    video, proposal, k = _pairs(video, row, of_class)  # (M,) each
    picked = row[video]
    c = of_class[picked, k].astype(np.float64)
    s = torch.cat([f.scores for f in found]).detach().double().cpu().numpy()[proposal]
    score = s * c if combine == "product" else np.sqrt(s * c)  # (M,)
    order = np.lexsort((-score, video))  # stable: equal scores stay in the order of proposals, then classes
    video, proposal, k, score = video[order], proposal[order], k[order], score[order]
    begin = np.searchsorted(video, np.arange(len(found)))
    end = np.searchsorted(video, np.arange(len(found)), side="right")
    if max_segments is not None:
        end = np.minimum(end, begin + max_segments)
    first = np.concatenate(([0], np.cumsum(counts)[:-1]))  # of every video, in the joined proposals
    labels = label_of[best[row[video], k]]
    return [
        _taken(f, proposal[b:e] - offset, labels[b:e], score[b:e])
        for f, b, e, offset in zip(found, begin, end, first, strict=True)
    ], missing


def softmax_scores(logits: pd.DataFrame, factor: float = 1.0) -> pd.DataFrame:
    """``softmax(factor * logits)`` of every row; TCANet takes factor 2 on HACS.

    Raises
    ------
    RecipeError : a factor that is not a positive number. AnnotationError : logits that are not finite, or none.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise RecipeError(f"the factor of the softmax must be above 0, got {factor}")
    values = _numbers(logits)
    if values.shape[1] == 0:
        raise AnnotationError("the logits have no class")
    if not np.isfinite(values).all():
        raise AnnotationError(f"logits are not finite, such as those of {_some(_rows(logits, ~np.isfinite(values)))}")
    scaled = factor * (values - values.max(axis=1, keepdims=True))
    exp = np.exp(scaled)
    return pd.DataFrame(exp / exp.sum(axis=1, keepdims=True), index=logits.index, columns=logits.columns)


def check_scores(scores: pd.DataFrame, classes: Sequence[str]) -> None:
    """Raise what :func:`fused` would raise for these scores and classes, whatever the proposals."""
    _usable(scores, classes)


# ---- checks ----------------------------------------------------------------------------------------------------------
def _check_proposals(found: Sequence[Segments]) -> None:
    for segments in found:
        if bool((segments.labels != 0).any()):
            raise RecipeError(
                f"video '{segments.video}': its detections have classes already; class scores are for proposals, "
                "which all have label 0"
            )
        if bool((segments.scores < 0).any()):
            raise RecipeError(f"video '{segments.video}': proposals with scores below 0 cannot be weighted by classes")


def _usable(scores: pd.DataFrame, classes: Sequence[str]) -> tuple[list[str], Array]:
    """The columns that are classes, in their order, and their values (videos, columns)."""
    if len(set(classes)) < len(classes):
        raise RecipeError("classes repeat")
    for what, index in (("video", scores.index), ("class", scores.columns)):
        if not index.is_unique:
            raise AnnotationError(
                f"the scores have a {what} twice: {_some(index[index.duplicated()].unique().tolist())}"
            )
    known = set(classes)
    keep = np.array([name in known for name in scores.columns], dtype=bool)
    names = [str(name) for name in scores.columns[keep]]
    if not names:
        raise AnnotationError(
            f"none of the {len(scores.columns)} scored classes ({_some(scores.columns.tolist())}) is one of the "
            f"{len(known)} that are looked for ({_some(list(classes))}): are the names spelled alike?"
        )
    values = _numbers(scores.loc[:, keep])
    if np.isinf(values).any():
        raise AnnotationError(f"scores are infinite, such as those of {_some(_rows(scores, np.isinf(values)))}")
    if (values < 0).any():
        raise AnnotationError(
            f"scores are below 0, such as those of {_some(_rows(scores, values < 0))}: "
            "if they are logits, turn them into probabilities with a softmax first (classes.softmax=1)"
        )
    return names, values


def _numbers(table: pd.DataFrame) -> Array:
    try:
        return table.to_numpy(np.float64)
    except (TypeError, ValueError) as error:
        raise AnnotationError(f"scores must be numbers: {error}") from error


def _rows(table: pd.DataFrame, where: Array) -> list[str]:
    return table.index[np.flatnonzero(where.any(axis=1))].astype(str).tolist()


def _some(names: Sequence[object]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(str(name)) for name in names[:SHOWN]) + more


# ---- arrays ----------------------------------------------------------------------------------------------------------
def _pairs(video: Array, row: Array, of_class: Array) -> tuple[Array, Array, Array]:
    """Every proposal with every class that its video was scored for: which video, which proposal, which class."""
    size = of_class.shape[1]
    proposal = np.repeat(np.arange(len(video)), size)  # (N * k,)
    k = np.tile(np.arange(size), len(video))
    rows = row[video[proposal]]
    scored = (rows >= 0) & ~np.isnan(of_class[rows, k]) if len(of_class) else np.zeros(len(k), dtype=bool)
    return video[proposal][scored], proposal[scored], k[scored]


def _taken(found: Segments, which: Array, labels: Array, scores: Array) -> Segments:
    at = torch.from_numpy(which).to(found.scores.device)
    return Segments(
        found.video,
        found.segments_s[at],
        torch.from_numpy(labels).to(found.labels.device),
        torch.from_numpy(scores).to(found.scores),
        {name: value[at] for name, value in found.extra.items()},
        found.duration_s,
    )
