"""Whether one detector is better than another on the same videos, and how far runs of one recipe lie apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tad.annotations import Truth
from tad.errors import AnnotationError
from tad.evaluate.bootstrap import (
    check_sampling,
    draws,
    interval,
    mean_over_classes,
    plain,
    sampled_ap,
    weighted_ap,
)
from tad.evaluate.detection import THUMOS_TIOU, detection_map
from tad.evaluate.ranked import Ranked, rank
from tad.evaluate.selection import ByTiou, Thresholds

if TYPE_CHECKING:
    from rich.table import Table

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Difference:
    """One detector less the first.

    Attributes
    ----------
    name : of the detector. average : its average mAP.
    difference : average mAP less that of the first. interval : (low, high) of it.
    p : two-sided p value of the permutation test.
    by_class : columns ``first, this, difference, low, high`` by class: AP averaged over the thresholds.
    by_tiou : difference of mAP.
    """

    name: str
    average: float
    difference: float
    interval: tuple[float, float]
    p: float
    by_class: pd.DataFrame
    by_tiou: dict[float, float]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Detectors on the same videos; the others are set against the first.

    Attributes
    ----------
    first : its name. average : its average mAP. others : one :class:`Difference` each.
    level, samples, seed : of the intervals and the test. counts : of the first, as in a DetectionResult.
    """

    first: str
    average: float
    others: tuple[Difference, ...]
    level: float
    samples: int
    seed: int
    counts: dict[str, Any]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "first": {"name": self.first, "average_map": self.average},
            "others": [
                {
                    "name": one.name,
                    "average_map": one.average,
                    "difference": one.difference,
                    "interval": list(one.interval),
                    "p": one.p,
                    "map_difference": {f"{key:g}": value for key, value in one.by_tiou.items()},
                    "ap": {
                        str(label): {str(name): plain(value) for name, value in row.items()}
                        for label, row in one.by_class.to_dict(orient="index").items()
                    },
                }
                for one in self.others
            ],
            "level": self.level,
            "samples": self.samples,
            "seed": self.seed,
            "counts": self.counts,
            "notes": list(self.notes),
        }


def compare(
    truth: Truth | pd.DataFrame,
    predictions: Mapping[str, pd.DataFrame],
    tiou: Thresholds = THUMOS_TIOU,
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    **options: Any,
) -> Comparison:
    """Set detectors against the first one: difference of average mAP, its interval, and whether chance explains it.

    Interval: both are scored on the same bootstrap samples of the videos (:func:`tad.evaluate.bootstrap_map`), which
    takes out what makes videos easy or hard for both; percentiles of the differences, moved to lie around the
    difference found.

    p value: if the two were alike, it would not matter which of them a video's predictions come from. They are
    exchanged on a random half of the videos, ``samples`` times; p is the share of exchanges that give at least the
    difference found, (1 + that number) / (1 + samples). Scores of two detectors have no common scale, so for this test
    a score is replaced by its rank in its class and detector, which leaves both mAPs as they are.

    p is not corrected for the number of detectors, and says nothing about other training seeds
    (:func:`seed_spread`).

    Parameters
    ----------
    truth, tiou, options : as :func:`tad.evaluate.detection_map`. predictions : at least two tables by name.
    samples : of the bootstrap, and of the test. level, seed : as :func:`tad.evaluate.bootstrap_map`.

    Raises
    ------
    AnnotationError : as :func:`tad.evaluate.bootstrap_map`, or fewer than two detectors.
    """
    check_sampling(samples, level, seed)
    if len(predictions) < 2:
        raise AnnotationError(f"a comparison needs at least two sets of predictions, got {len(predictions)}")
    ranked = _on_all_videos({name: rank(truth, table, tiou, **options) for name, table in predictions.items()})
    (first, base), *rest = ranked.items()
    generator = np.random.default_rng(seed)
    counts = draws(generator, samples, len(base.videos))
    sampled = {name: sampled_ap(one, counts) for name, one in ranked.items()}  # (B, T, C) each
    whole = {name: sampled_ap(one, np.ones((1, len(base.videos)), np.int64))[0] for name, one in ranked.items()}
    usable = ~np.isnan(sampled[first][:, 0]).all(axis=1)
    notes = [note for name, one in ranked.items() for note in (f"{name}: {text}" for text in one.notes)]
    if lost := int((~usable).sum()):
        notes.append(f"{lost} of {samples} samples hold no true segment and are left out; there are too few videos")
    if not usable.any():
        raise AnnotationError("no sample holds a true segment: draw more samples")
    swaps = generator.integers(0, 2, (samples, len(base.videos)))

    others = []
    for name, one in rest:
        apart = whole[name] - whole[first]  # (T, C)
        between = mean_over_classes(sampled[name][usable]) - mean_over_classes(sampled[first][usable])
        found = float(apart.mean())
        others.append(
            Difference(
                name=name,
                average=float(whole[name].mean()),
                difference=found,
                interval=interval(between.mean(axis=1), level, found),
                p=_exchange_test(base, one, swaps),
                by_class=_by_class(whole[first], whole[name], sampled[name] - sampled[first], base.classes, level),
                by_tiou=ByTiou((round(value, 6), float(apart[row].mean())) for row, value in enumerate(base.levels)),
            )
        )
    return Comparison(
        first=first,
        average=float(whole[first].mean()),
        others=tuple(others),
        level=level,
        samples=samples,
        seed=seed,
        counts=base.counts,
        notes=tuple(notes),
    )


@dataclass(frozen=True, eq=False)
class SeedSpread:
    """Runs of one recipe with different seeds.

    Attributes
    ----------
    names : of the runs. map : one row a run, one column a tIoU, and ``average``.
    mean, sd : by column of ``map``; sd with n - 1, NaN for a single run.
    """

    names: tuple[str, ...]
    map: pd.DataFrame
    mean: pd.Series
    sd: pd.Series
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: ``runs`` (name, then mAP by tIoU and ``average``), ``mean, sd``."""

        def values(row: pd.Series) -> dict[str, float | None]:
            return {_key(key): plain(value) for key, value in row.items()}

        return {
            "runs": {name: values(self.map.T[name]) for name in self.names},
            "mean": values(self.mean),
            "sd": values(self.sd),
            "notes": list(self.notes),
        }


def seed_spread(
    truth: Truth | pd.DataFrame,
    predictions: Mapping[str, pd.DataFrame],
    tiou: Thresholds = THUMOS_TIOU,
    **options: Any,
) -> SeedSpread:
    """Mean and standard deviation of mAP over runs of one recipe; parameters as :func:`compare`.

    Raises
    ------
    AnnotationError : as :func:`tad.evaluate.detection_map`, or no run.
    """
    if not predictions:
        raise AnnotationError("there is no run to average")
    results = {name: detection_map(truth, table, tiou, **options) for name, table in predictions.items()}
    rows = {name: {**dict(one.map), "average": one.average} for name, one in results.items()}
    table = pd.DataFrame.from_dict(rows, orient="index")
    notes = tuple(f"{name}: {note}" for name, one in results.items() for note in one.notes)
    return SeedSpread(tuple(results), table, table.mean(), table.std(ddof=1), notes)


def comparison_table(comparison: Comparison, *, classes: int = 10) -> list[Table]:
    """A comparison as rich tables in percent: the averages, then the classes that differ most."""
    from rich.markup import escape
    from rich.table import Table

    grid = Table("predictions", "average mAP", "difference", f"{100 * comparison.level:g} %", "p")
    grid.title = f"{comparison.counts['videos']} videos, {comparison.counts['segments']} segments"
    grid.add_row(escape(comparison.first), f"{100 * comparison.average:.2f}", "", "", "")
    tables = [grid]
    for one in comparison.others:
        low, high = one.interval
        grid.add_row(
            escape(one.name),
            f"{100 * one.average:.2f}",
            f"{100 * one.difference:+.2f}",
            f"{100 * low:+.2f} ... {100 * high:+.2f}",
            f"{one.p:.3f}",
        )
        detail = Table(
            "class", escape(comparison.first), escape(one.name), "difference", f"{100 * comparison.level:g} %"
        )
        detail.title = f"{escape(one.name)}: classes that differ most, AP averaged over tIoU"
        most = one.by_class.reindex(one.by_class["difference"].abs().sort_values(ascending=False, kind="stable").index)
        for label, row in most.head(classes).iterrows():
            detail.add_row(
                escape(str(label)),
                f"{100 * row['first']:.2f}",
                f"{100 * row['this']:.2f}",
                f"{100 * row['difference']:+.2f}",
                f"{100 * row['low']:+.2f} ... {100 * row['high']:+.2f}",
            )
        tables.append(detail)
    return tables


def seed_table(spread_of: SeedSpread) -> Table:
    """Runs as a rich table in percent, mean ± sd last."""
    from rich.markup import escape
    from rich.table import Table

    grid = Table("run", *(_key(key) for key in spread_of.map.columns), title=f"{len(spread_of.names)} runs, mAP")
    for name, *values in spread_of.map.itertuples():
        grid.add_row(escape(str(name)), *(f"{100 * value:.2f}" for value in values))
    ends = [
        f"{100 * mean:.2f}" + ("" if np.isnan(sd) else f" ± {100 * sd:.2f}")
        for mean, sd in zip(spread_of.mean, spread_of.sd, strict=True)
    ]
    grid.add_row("[b]mean ± sd[/b]", *ends)
    return grid


def _key(key: object) -> str:
    return f"{key:g}" if isinstance(key, float) else str(key)


def _on_all_videos(ranked: dict[str, Ranked]) -> dict[str, Ranked]:
    """The same with one list of videos for all: those scored, then those that any detector's predictions name."""
    scored = [one.videos[: one.counts["videos"]] for one in ranked.values()]
    outside = dict.fromkeys(video for one in ranked.values() for video in one.videos[one.counts["videos"] :])
    videos = pd.Index([*scored[0], *outside], dtype="object")
    return {
        name: replace(one, videos=videos, video=videos.get_indexer(one.videos)[one.video])
        for name, one in ranked.items()
    }


def _by_class(first: Array, this: Array, sampled: Array, classes: pd.Index, level: float) -> pd.DataFrame:
    """AP averaged over the thresholds of both, the difference and its interval."""
    mine, base = this.mean(axis=0), first.mean(axis=0)
    difference = mine - base
    ends = [
        interval(values, level, centre)
        for values, centre in zip(sampled.mean(axis=1).T, difference.tolist(), strict=True)
    ]
    table = pd.DataFrame({"first": base, "this": mine, "difference": difference}, index=classes)
    return table.assign(low=[low for low, _ in ends], high=[high for _, high in ends])


def _exchange_test(first: Ranked, other: Ranked, swaps: Array) -> float:
    """Two-sided p value of the difference in average mAP when predictions are exchanged video by video.

    Parameters
    ----------
    swaps : (B, V) 1 where a video's predictions are exchanged, else 0.
    """
    label = np.concatenate((first.label, other.label))
    order = np.lexsort((np.concatenate((first.rank, other.rank)), label))  # by class, then rank; equal ranks: first
    label = label[order]
    video = np.concatenate((first.video, other.video))[order]
    taken = np.concatenate((first.taken, other.taken), axis=1)[:, order]
    source = np.repeat([False, True], [len(first.label), len(other.label)])[order]

    def difference(swapped: Array) -> Array:
        result = np.zeros(len(swapped))
        others = swapped.astype(bool)[:, video] ^ source  # (b, N) whether it now stands for the other detector
        for sign, weight in ((-1.0, ~others), (1.0, others)):
            weight = weight.view(np.int8)
            seen = np.cumsum(weight, axis=1, dtype=np.int32)
            for hits in taken >= 0:
                ap = weighted_ap(weight, seen, hits, label, len(first.classes)) / first.positives
                result += sign * ap.mean(axis=1) / len(taken)
        return result

    found = difference(np.zeros((1, swaps.shape[1]), dtype=swaps.dtype))[0]
    step = max(1, (1 << 21) // max(1, len(label)))
    chance = np.concatenate([difference(swaps[i : i + step]) for i in range(0, len(swaps), step)])
    # Two exchanges that give the same difference differ by rounding.
    return float((1 + (np.abs(chance) >= abs(found) - 1e-12).sum()) / (1 + len(chance)))
