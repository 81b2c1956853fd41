"""How far a mAP would move with other videos of the same kind: intervals from a bootstrap over videos."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tad.annotations import Truth
from tad.errors import AnnotationError
from tad.evaluate.detection import THUMOS_TIOU
from tad.evaluate.ranked import Ranked, rank
from tad.evaluate.selection import ByTiou, Thresholds

if TYPE_CHECKING:
    from rich.table import Table

Array = np.ndarray
CELLS = 1 << 22  # weights held at once: samples x predictions; bounds memory at about 200 MB


@dataclass(frozen=True, eq=False)
class Intervals:
    """Intervals of mAP.

    Attributes
    ----------
    score : the average mAP itself.
    map : (low, high) by tIoU. average : (low, high) of the average mAP. ap : columns ``low, high`` by class, of its AP
        averaged over the thresholds.
    sd : standard deviation of the average mAP over the samples. bias : mean over the samples less the score.
    level : the share of the samples inside, such as 0.95. samples : how many were drawn. seed : of the draw.
    distribution : (B, T) mAP of every sample that holds a true segment.
    notes : sentences on samples that could not be scored.
    """

    score: float
    map: dict[float, tuple[float, float]]
    average: tuple[float, float]
    ap: pd.DataFrame
    sd: float
    bias: float
    level: float
    samples: int
    seed: int
    distribution: Array
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: ``map, average_map, ap`` (pairs), ``sd, bias, level, samples, seed, notes``."""
        return {
            "map": {f"{key:g}": list(value) for key, value in self.map.items()},
            "average_map": list(self.average),
            "ap": {str(label): [plain(low), plain(high)] for label, low, high in self.ap.itertuples()},
            "sd": self.sd,
            "bias": self.bias,
            "level": self.level,
            "samples": self.samples,
            "seed": self.seed,
            "notes": list(self.notes),
        }


def bootstrap_map(
    truth: Truth | pd.DataFrame,
    predictions: pd.DataFrame,
    tiou: Thresholds = THUMOS_TIOU,
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    centred: bool = True,
    **options: Any,
) -> Intervals:
    """Intervals of mAP from videos drawn with replacement, as many as there are (Efron and Tibshirani 1993, ch. 13).

    The intervals are percentiles of the samples, moved so that the samples' mean is the score: a video that is drawn
    twice raises the precision at its own segments, so samples score higher than the videos do, by several standard
    deviations where classes are small (ActivityNet). ``centred=False`` gives the percentiles as they are.

    A video drawn twice counts as two videos with the same truth and predictions. What a prediction takes is settled
    inside its video, so predictions are matched once, and a sample only counts them anew. A class of which a sample has
    no true segment is not in its mean, as in :func:`tad.evaluate.detection_map`. Videos that only predictions name are
    drawn too.

    Parameters
    ----------
    truth, predictions, tiou, options : as :func:`tad.evaluate.detection_map`.
    samples : how many. level : the share of them inside an interval, in (0, 1). seed : of the draw.
    centred : see above.

    Raises
    ------
    AnnotationError : as :func:`tad.evaluate.detection_map`, no sample, or a level outside (0, 1).
    """
    check_sampling(samples, level, seed)
    ranked = rank(truth, predictions, tiou, **options)
    counts = draws(np.random.default_rng(seed), samples, len(ranked.videos))  # (B, V)
    ap = sampled_ap(ranked, counts)  # (B, T, C)
    scored = ~np.isnan(ap[:, 0]).all(axis=1)
    notes = list(ranked.notes)
    if lost := int((~scored).sum()):
        notes.append(f"{lost} of {samples} samples hold no true segment and are left out; there are too few videos")
    ap = ap[scored]
    if not len(ap):
        raise AnnotationError("no sample holds a true segment: draw more samples")
    own = sampled_ap(ranked, np.ones((1, len(ranked.videos)), dtype=np.int64))[0]  # (T, C)
    maps, own_maps = mean_over_classes(ap), own.mean(axis=1)  # (B, T), (T,)
    average, score = maps.mean(axis=1), float(own_maps.mean())
    keys = [round(value, 6) for value in ranked.levels]

    def around(values: Array, centre: float) -> tuple[float, float]:
        low, high = interval(values, level, centre if centred else None)
        return float(np.maximum(low, 0.0)), float(np.minimum(high, 1.0))

    by_class = [
        around(values, centre) for values, centre in zip(ap.mean(axis=1).T, own.mean(axis=0).tolist(), strict=True)
    ]
    return Intervals(
        score=score,
        map=ByTiou((key, around(maps[:, row], float(own_maps[row]))) for row, key in enumerate(keys)),
        average=around(average, score),
        ap=pd.DataFrame(by_class, index=ranked.classes, columns=["low", "high"]),
        sd=spread(average),
        bias=float(average.mean()) - score,
        level=level,
        samples=samples,
        seed=seed,
        distribution=maps,
        notes=tuple(notes),
    )


def interval_table(intervals: Intervals) -> Table:
    """Intervals as a rich table in percent: each tIoU, then the average."""
    from rich.table import Table

    grid = Table("tIoU", f"{100 * intervals.level:g} %", title=f"{intervals.samples} samples of the videos")
    for key, (low, high) in intervals.map.items():
        grid.add_row(f"{key:g}", f"{100 * low:.2f} ... {100 * high:.2f}")
    low, high = intervals.average
    grid.add_row("[b]average[/b]", f"{100 * low:.2f} ... {100 * high:.2f} (sd {100 * intervals.sd:.2f})")
    return grid


def check_sampling(samples: int, level: float, seed: int) -> None:
    """Raises AnnotationError for numbers of samples, levels and seeds that cannot be meant."""
    if isinstance(samples, bool) or not isinstance(samples, int | np.integer) or samples < 1:
        raise AnnotationError(f"samples must be a whole number of at least 1, got {samples!r}")
    if not 0 < level < 1:
        raise AnnotationError(f"level must lie between 0 and 1, such as 0.95, got {level!r}")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise AnnotationError(f"seed must be a whole number of at least 0, got {seed!r}")


def draws(generator: np.random.Generator, samples: int, videos: int) -> Array:
    """(B, V) how often each video is drawn when as many are drawn as there are, with replacement."""
    return generator.multinomial(videos, np.full(videos, 1.0 / videos), size=samples)


def sampled_ap(ranked: Ranked, counts: Array) -> Array:
    """AP with every video counted so many times.

    A prediction of a video that counts w times stands w times at its rank; between equals the precision rises with
    every right one, so the envelope over them is the precision behind the last.

    Parameters
    ----------
    counts : (B, V) whole numbers.

    Returns
    -------
    (B, T, C) ; NaN for a class without a true segment.
    """
    classes, videos = len(ranked.classes), len(ranked.videos)
    positives = np.zeros((videos, classes))
    np.add.at(positives, (ranked.true_video, ranked.true_label), 1.0)
    total = counts @ positives  # (B, C)
    result = np.zeros((len(counts), len(ranked.levels), classes))
    for part in _parts(len(counts), len(ranked.label)):
        weight = counts[part].astype(np.int32)[:, ranked.video]  # (b, N)
        seen = np.cumsum(weight, axis=1, dtype=np.int32)
        for row, taken in enumerate(ranked.taken):
            result[part, row] = weighted_ap(weight, seen, taken >= 0, ranked.label, classes)
    with np.errstate(invalid="ignore", divide="ignore"):
        result /= total[:, None, :]
    result[np.broadcast_to(total[:, None, :] == 0, result.shape)] = np.nan
    return result


def weighted_ap(weight: Array, seen: Array, hit: Array, label: Array, classes: int) -> Array:
    """Sum over the right predictions of weight times the best precision from there on; by class.

    Parameters
    ----------
    weight : (b, N) integers, how often each prediction counts, by class, then falling score. seen : (b, N) int32, its
        running sum.
    hit : (N,) whether each is right. label : (N,) class of each, rising.

    Returns
    -------
    (b, C), to be divided by the number of true segments.
    """
    result = np.zeros((len(weight), classes))
    place = np.flatnonzero(hit)
    if not len(place):
        return result
    group = label[place]
    begin = np.flatnonzero(np.diff(group, prepend=-1))  # first right prediction of each class that has one
    index = np.repeat(np.arange(len(begin)), np.diff(begin, append=len(place)))
    first = np.searchsorted(label, group[begin])  # first prediction of these classes, right or not
    right = weight[:, place].astype(np.int32)  # (b, H)
    found = np.cumsum(right, axis=1, dtype=np.int32)
    found -= np.repeat(found[:, begin] - right[:, begin], np.diff(begin, append=len(place)), axis=1)
    behind = seen[:, place]
    behind -= np.repeat(seen[:, first] - weight[:, first], np.diff(begin, append=len(place)), axis=1)
    np.maximum(behind, 1, out=behind)  # where nothing is drawn yet nothing is found either
    precision = found / behind
    # Best from here on, class by class in one go: classes further left are lifted above those on their right.
    lift = 2.0 * (len(begin) - index)
    precision += lift
    backwards = precision[:, ::-1]
    np.maximum.accumulate(backwards, axis=1, out=backwards)
    precision -= lift
    precision *= right
    result[:, group[begin]] = np.add.reduceat(precision, begin, axis=1)
    return result


def mean_over_classes(ap: Array) -> Array:
    """(B, T) mean of (B, T, C) over the classes that a sample has (the same for every threshold)."""
    present = ~np.isnan(ap)
    return np.where(present, ap, 0.0).sum(axis=-1) / present.sum(axis=-1)


def spread(values: Array) -> float:
    """Standard deviation, with n - 1; 0 of a single value."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def plain(value: float) -> float | None:
    """A float for JSON, which knows no NaN."""
    return None if np.isnan(value) else float(value)


def interval(values: Array, level: float, centre: float | None = None) -> tuple[float, float]:
    """The percentiles between which the middle ``level`` of some values lies, moved so that their mean is ``centre``.

    NaN is passed over; (NaN, NaN) when nothing else is there.
    """
    values = values[~np.isnan(values)]
    if not len(values):
        return np.nan, np.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    shift = 0.0 if centre is None else centre - float(values.mean())
    return float(low) + shift, float(high) + shift


def _parts(samples: int, predictions: int) -> Iterator[slice]:
    """Samples a few at a time, so that samples x predictions stays bounded."""
    step = max(1, CELLS // max(1, predictions))
    for first in range(0, samples, step):
        yield slice(first, first + step)
