"""What kind of errors a detector makes, and what mending each would be worth, in the manner of DETAD.

Alwassel, Caba Heilbron, Escorcia and Ghanem: Diagnosing Error in Temporal Action Detectors, ECCV 2018.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tad.annotations import Truth
from tad.errors import AnnotationError
from tad.evaluate.characteristics import Buckets, buckets_of, characteristics, with_characteristics
from tad.evaluate.curves import confusion, map_at, pr_curves
from tad.evaluate.false_negatives import MIN_PRECISION, miss_rates, missed, sensitivity
from tad.evaluate.false_positives import KINDS, MIN_TIOU, by_limit, gain, kinds
from tad.evaluate.ranked import rank

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["KINDS", "Diagnosis", "advice", "diagnose", "pr_curves", "tables"]

_MEANING = {
    "background": "they overlap no true segment: train with more negatives, or score actionness",
    "localization": "right class, boundaries off: refine the boundaries, or take features of a finer stride",
    "double_detection": "a second detection of a segment already found: suppress harder (NMS, lower sigma or tIoU)",
    "wrong_label": "right place, wrong class: better classification, or fuse a video-level classifier",
    "confusion": "wrong class and wrong boundaries: as for wrong labels, then as for localization",
}
_NAMES = {
    "background": "background predictions",
    "localization": "badly localized predictions",
    "double_detection": "double detections",
    "wrong_label": "predictions with a wrong label",
    "confusion": "badly localized predictions with a wrong label",
}


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Error analysis at one threshold; every share and score is a fraction.

    Attributes
    ----------
    tiou : the threshold.
    map, normalized_map : over all predictions; see :func:`tad.evaluate.matching.normalized_precision`.
    false_positives : ``by_limit`` (:func:`~tad.evaluate.false_positives.by_limit`), and the ``gain`` in normalised mAP
        by kind (:func:`~tad.evaluate.false_positives.gain`), both of the first ``limit`` G predictions of each class.
    false_negatives : by characteristic, rows ``bucket, share, count``.
    sensitivity : ``overall``, and by characteristic rows ``bucket, ap, count``.
    confusion : ``classes, matrix`` (:func:`~tad.evaluate.curves.confusion`) of the same predictions.
    kind : (N,) kind of each of ``predictions``; ``missed`` : (M,) booleans, of ``truth``.
    predictions, truth : the tables that were scored; predictions by class, then falling score.
    limited_map : normalised mAP that ``gain`` is counted from.
    missed_share : share of the true segments that are missed.
    counts, protocol, notes : as in :class:`~tad.evaluate.detection.DetectionResult`.
    """

    tiou: float
    map: float
    normalized_map: float
    limited_map: float
    limit: int
    missed_share: float
    false_positives: dict[str, Any]
    false_negatives: dict[str, list[dict[str, Any]]]
    sensitivity: dict[str, Any]
    confusion: dict[str, Any]
    kind: pd.Series
    missed: np.ndarray
    predictions: pd.DataFrame
    truth: pd.DataFrame
    counts: dict[str, Any]
    protocol: str | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the tables of predictions and truth are not in it."""
        return {
            "tiou": self.tiou,
            "map": self.map,
            "normalized_map": self.normalized_map,
            "limit": self.limit,
            "missed": self.missed_share,
            "false_positives": self.false_positives,
            "false_negatives": self.false_negatives,
            "sensitivity": self.sensitivity,
            "confusion": self.confusion,
            "counts": self.counts,
            "protocol": self.protocol,
            "notes": list(self.notes),
        }


def diagnose(
    truth: Truth | pd.DataFrame,
    predictions: pd.DataFrame,
    *,
    videos: pd.DataFrame | None = None,
    tiou: float = 0.5,
    buckets: Buckets = "activitynet",
    limit: int = 10,
    min_tiou: float = MIN_TIOU,
    min_precision: float = MIN_PRECISION,
    own_label_first: bool = False,
    leave_out: Collection[str] = (),
    own_videos: bool = False,
    dedupe_s: float | None = None,
    only: Iterable[str] | None = None,
) -> Diagnosis:
    """Analyse the errors of a detector at one threshold.

    The kinds of false positives are defined in :func:`tad.evaluate.false_positives.kinds`. Values equal those of DETAD
    at one threshold, with two exceptions: true segments that cover more than their video stay in (there they are
    dropped), and every prediction on a video without truth is background (there, from the second one on, it is
    compared with the truth of another video). True segments of zero length are left out, as there.

    Parameters
    ----------
    truth, predictions : as :func:`tad.evaluate.detection_map`. Columns of the truth that are named after a
        characteristic (``coverage``, ``context-size``, ...) are used; see :func:`read_characteristics`.
    videos : ``video, duration_s``, for coverage; default: those of a :class:`~tad.annotations.Truth`.
    tiou : the threshold, in (0, 1].
    buckets : limits of the characteristics: ``"thumos14"``, ``"activitynet"``, or one's own
        (:func:`tad.evaluate.characteristics.buckets_of`).
    limit : the analysis of false positives looks at so many predictions per true segment of a class.
    min_tiou : below it a prediction is background.
    min_precision : what is found at a lower normalised precision counts as missed.
    own_label_first : how a prediction on a segment that is annotated twice is named, see
        :func:`tad.evaluate.false_positives.kinds`.
    leave_out, own_videos, dedupe_s : as in :func:`tad.evaluate.detection_map`.
    only : analyse these videos only.

    Raises
    ------
    AnnotationError : as :func:`tad.evaluate.detection_map`, unknown buckets, or a limit below 1.
    """
    if not isinstance(limit, int) or limit < 1:
        raise AnnotationError(f"limit must be a whole number of at least 1, got {limit!r}")
    if not 0 < min_tiou <= tiou:
        raise AnnotationError(f"min_tiou must lie above 0 and not above tiou {tiou:g}, got {min_tiou:g}")
    ranked = rank(
        truth,
        predictions,
        tiou,
        videos=only,
        leave_out=leave_out,
        own_videos=own_videos,
        dedupe_s=dedupe_s,
        drop_zero_length=True,
    )
    extra = _kept_columns(truth, ranked.truth, buckets)
    features, notes = characteristics(extra, _durations(truth, videos), buckets)

    kind = kinds(ranked, min_tiou=min_tiou, own_label_first=own_label_first)
    limited, gains = gain(ranked, kind, limit)
    unseen = missed(ranked, min_precision=min_precision)
    sensitive = sensitivity(ranked, features)
    return Diagnosis(
        tiou=float(tiou),
        map=map_at(ranked),
        normalized_map=sensitive["overall"],
        limited_map=limited,
        limit=limit,
        missed_share=float(unseen.mean()),
        false_positives={"by_limit": by_limit(ranked, kind, limit), "gain": gains},
        false_negatives=miss_rates(unseen, features),
        sensitivity=sensitive,
        confusion=confusion(ranked, ranked.rank < limit * ranked.positives[ranked.label]),
        kind=pd.Series(np.array(KINDS, dtype="object")[kind], name="kind"),
        missed=unseen,
        predictions=ranked.predictions,
        truth=ranked.truth,
        counts=ranked.counts,
        notes=(*ranked.notes, *notes),
    )


def advice(diagnosis: Diagnosis) -> list[str]:
    """What to do, in sentences, the most rewarding first; at least one."""
    gains = sorted(diagnosis.false_positives["gain"].items(), key=lambda item: -item[1])
    lines = [
        f"removing {_NAMES[kind]} would gain {100 * value:.1f} mAP: {_MEANING[kind]}"
        for kind, value in gains
        if value >= 0.0005
    ]
    if not lines:
        lines.append("removing false positives of any one kind would gain nothing")
    if diagnosis.missed_share:
        lines.append(
            f"{100 * diagnosis.missed_share:.1f} % of the true segments are found by no prediction of a useful rank"
            f"{_worst(diagnosis)}: more or better candidates, not another order of those that there are"
        )
    return lines


def tables(diagnosis: Diagnosis) -> list[Table]:
    """The analysis as rich tables in percent: false positives, gains, and the characteristics."""
    from rich.table import Table

    profile = Table("kind", *(f"{row['g']}G" for row in diagnosis.false_positives["by_limit"]), "gain mAP")
    profile.title = f"predictions by kind in %, tIoU {diagnosis.tiou:g}, G: true segments of the class"
    for kind in KINDS:
        gained = diagnosis.false_positives["gain"].get(kind)
        shares = (f"{100 * row[kind]:.1f}" for row in diagnosis.false_positives["by_limit"])
        profile.add_row(kind.replace("_", " "), *shares, "" if gained is None else f"{100 * gained:.2f}")
    grid = Table("characteristic", "bucket", "true segments", "missed %", "normalised mAP")
    grid.title = f"true segments: {100 * diagnosis.missed_share:.1f} % missed"
    grid.add_row("all", "", str(len(diagnosis.missed)), f"{100 * diagnosis.missed_share:.1f}", _percent(diagnosis))
    for name, rows in diagnosis.false_negatives.items():
        for lost, scored in zip(rows, diagnosis.sensitivity[name], strict=True):
            values = (str(lost["count"]), f"{100 * lost['share']:.1f}", f"{100 * scored['ap']:.2f}")
            grid.add_row(name, lost["bucket"], *values)
    return [profile, grid]


def _percent(diagnosis: Diagnosis) -> str:
    return f"{100 * diagnosis.normalized_map:.2f}"


def _worst(diagnosis: Diagnosis) -> str:
    """The bucket in which the largest share is missed, as part of a sentence; "" when none stands out."""
    enough = 0.05 * len(diagnosis.missed)
    rows = [(row["share"], name, row) for name, rows in diagnosis.false_negatives.items() for row in rows]
    rows = [item for item in rows if item[2]["count"] >= enough and item[0] > 1.1 * diagnosis.missed_share]
    if not rows:
        return ""
    share, name, row = max(rows, key=lambda item: item[0])
    return f", most where {name} is {row['bucket']} ({100 * share:.1f} % of {row['count']})"


def _durations(truth: Truth | pd.DataFrame, videos: pd.DataFrame | None) -> dict[Any, float] | None:
    table = videos if videos is not None else (truth.videos if isinstance(truth, Truth) else None)
    if table is None:
        return None
    if not isinstance(table, pd.DataFrame) or not {"video", "duration_s"} <= set(table.columns):
        raise AnnotationError("videos must be a table with the columns video and duration_s")
    seconds = pd.to_numeric(table["duration_s"], errors="coerce")
    return dict(zip(table["video"].tolist(), seconds.tolist(), strict=True))


def _kept_columns(truth: Truth | pd.DataFrame, scored: pd.DataFrame, buckets: Buckets) -> pd.DataFrame:
    """The scored true segments with the columns of characteristics that the given table has for them."""
    given = truth.segments if isinstance(truth, Truth) else truth
    names = [name for name in buckets_of(buckets) if name in given.columns]
    return with_characteristics(scored, given[["video", "start_s", "end_s", "label", *names]]) if names else scored
