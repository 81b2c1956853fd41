"""Named ways to score, each fixed down to the list of videos, so that two numbers under one name are comparable."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from tad.annotations import Truth, canonical_subset
from tad.errors import AnnotationError, did_you_mean
from tad.evaluate.detection import ANET_TIOU, THUMOS_TIOU, DetectionResult, detection_map
from tad.evaluate.proposals import ProposalResult, average_recall
from tad.evaluate.selection import Thresholds


@dataclass(frozen=True)
class Protocol:
    """One way to score.

    Attributes
    ----------
    name : what it is called.
    tiou : thresholds.
    subset : the subset that it scores unless another is named.
    left_out : videos that take no part: neither their truth nor predictions on them.
    drop_zero_length, dedupe_s, own_videos, single_precision : what its tool does unlike ActivityNet's
        evaluator; see :func:`tad.evaluate.detection_map`.
    sizes : pairs (videos, segments) that the public annotation files give; other counts are noted.
    note : who scores so, and what is particular.
    """

    name: str
    tiou: tuple[float, ...]
    subset: str
    left_out: tuple[str, ...] = ()
    drop_zero_length: bool = False
    dedupe_s: float | None = None
    own_videos: bool = False
    single_precision: bool = False
    sizes: tuple[tuple[int, int], ...] = ()
    note: str = ""


_AMBIGUOUS_ONLY = "video_test_0001292"  # all its segments are Ambiguous
_BROKEN_TIMES = "video_test_0000270"  # 29 HammerThrow segments, 22 of them behind the end of the video
_CRICKET = "video_test_0001496"  # 18 CricketShot segments; absent from gtad's file

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="thumos14-213",
            tiou=THUMOS_TIOU,
            subset="test",
            sizes=((213, 3358),),
            note="All test videos with temporal annotation. video_test_0001292 has only Ambiguous segments: "
            "what is predicted there is a false positive.",
        ),
        Protocol(
            name="thumos14-212",
            tiou=THUMOS_TIOU,
            subset="test",
            left_out=(_AMBIGUOUS_ONLY,),
            drop_zero_length=True,
            dedupe_s=1e-3,
            sizes=((212, 3358),),
            note="ActionFormer and DETAD. Duplicate and zero-length truth is left out; THUMOS14 has neither.",
        ),
        Protocol(
            name="thumos14-211",
            tiou=THUMOS_TIOU,
            subset="test",
            left_out=(_BROKEN_TIMES, _AMBIGUOUS_ONLY),
            drop_zero_length=True,
            dedupe_s=1e-3,
            sizes=((211, 3329), (211, 3325)),
            note="OpenTAD. Its logs report 3325 segments of its own annotation file; the public CSV files give 3329.",
        ),
        Protocol(
            name="thumos14-210",
            tiou=THUMOS_TIOU,
            subset="test",
            left_out=(_BROKEN_TIMES, _AMBIGUOUS_ONLY, _CRICKET),
            sizes=((210, 3311),),
            note="G-TAD, AFSD and TadTR (thumos_gt.json).",
        ),
        Protocol(
            name="anet-1.3",
            tiou=ANET_TIOU,
            subset="validation",
            sizes=((4728, 7293), (4926, 7654)),
            note="The official evaluator: duplicate and zero-length truth counts. 4,926 videos are official; BSN, BMN, "
            "AFSD and OpenTAD score the 4,728 that they could download. No list of blocked videos is applied.",
        ),
        Protocol(
            name="anet-1.3-opentad",
            tiou=ANET_TIOU,
            subset="validation",
            drop_zero_length=True,
            dedupe_s=1e-3,
            sizes=((4728, 7271), (4926, 7630)),
            note="OpenTAD and ActionFormer: duplicate and zero-length truth is left out.",
        ),
        Protocol(
            name="anet-1.3-afsd",
            tiou=ANET_TIOU,
            subset="validation",
            own_videos=True,
            sizes=((4728, 7293), (4926, 7654)),
            note="AFSD: predictions on videos without truth are left out; elsewhere they are false positives.",
        ),
        Protocol(
            name="anet-1.3-mmaction2",
            tiou=ANET_TIOU,
            subset="validation",
            single_precision=True,
            sizes=((4728, 7293), (4926, 7654)),
            note="mmaction2: tIoU is rounded to float32, so that exact hits at 0.65, 0.7, 0.9 and 0.95 are missed.",
        ),
        Protocol(
            name="hacs",
            tiou=ANET_TIOU,
            subset="validation",
            left_out=("S8GtH2Zayds", "saZkh1Xacp0", "uRCf7b3qk0I", "ukyFvye2yK0", "VsZiOEzQqyI", "KhkQyn-WblM"),
            note="HACS Segments, scored as ActivityNet, without the six videos that TCANet leaves out.",
        ),
    )
}


def get_protocol(name: str) -> Protocol:
    """A protocol by name.

    Raises
    ------
    AnnotationError : unknown, with the closest name.
    """
    if name not in PROTOCOLS:
        raise AnnotationError(f"unknown protocol {name!r}.{did_you_mean(str(name), PROTOCOLS)}")
    return PROTOCOLS[name]


def evaluate(
    truth: Truth,
    predictions: pd.DataFrame,
    protocol: str | None = None,
    subset: str | None = None,
    tiou: Thresholds | None = None,
    *,
    leave_out: Collection[str] = (),
) -> DetectionResult:
    """mAP under a named protocol, or, with none, of the subset and thresholds given and every video and segment in it.

    Nothing is printed; the result's ``counts`` say how many videos and segments were scored, its ``notes`` where that
    differs from the protocol's public numbers.

    Parameters
    ----------
    truth : the annotation, whole; the subset is taken here.
    predictions : ``video, start_s, end_s, label, score``. Those on other subsets' videos are false positives.
    protocol : a name in :data:`PROTOCOLS`.
    subset : the subset to score; default the protocol's. Without either the truth must have at most one.
    tiou : thresholds; default the protocol's, else 0.3 ... 0.7.
    leave_out : further videos to leave out, such as those that are no longer to be had.

    Raises
    ------
    AnnotationError : unknown protocol or subset, several subsets and none named, or as
        :func:`tad.evaluate.detection_map`.
    """
    part = scope(truth, protocol, subset, tiou, leave_out=leave_out)
    result = detection_map(part.truth, predictions, part.tiou, **part.options)
    return replace(result, protocol=protocol, notes=(*part.all_notes(result.counts), *result.notes))


def evaluate_recall(
    truth: Truth,
    predictions: pd.DataFrame,
    protocol: str | None = None,
    subset: str | None = None,
    tiou: Thresholds | None = None,
    *,
    max_avg: float | None = 100,
    leave_out: Collection[str] = (),
) -> ProposalResult:
    """AR@AN on the videos of a named protocol; thresholds are 0.5 ... 0.95 by default, under every protocol.

    Parameters and errors as :func:`evaluate`; ``max_avg`` as in :func:`tad.evaluate.average_recall`.
    """
    part = scope(truth, protocol, subset, tiou, leave_out=leave_out)
    levels = tiou if tiou is not None else ANET_TIOU
    options = {name: value for name, value in part.options.items() if name != "single_precision"}
    result = average_recall(part.truth, predictions, levels, max_avg, **options)
    return replace(result, protocol=protocol, notes=(*part.all_notes(result.counts), *result.notes))


@dataclass(frozen=True, eq=False)
class Scope:
    """What a protocol, or a subset, makes of an annotation.

    Attributes
    ----------
    truth : the part of the annotation to score.
    tiou : thresholds. options : keyword arguments of :func:`tad.evaluate.detection_map`.
    protocol : None when none was named. notes : sentences for the reader of the score.
    public : whether the protocol's public numbers are to be expected.
    """

    truth: Truth
    tiou: Thresholds
    options: dict[str, Any]
    protocol: Protocol | None
    notes: tuple[str, ...]
    public: bool

    def all_notes(self, counts: Mapping[str, Any]) -> tuple[str, ...]:
        """The notes, and one when the annotation is not the public one that the protocol is known by."""
        if self.protocol is None or not self.protocol.sizes or not self.public:
            return self.notes
        if (counts["videos"], counts["segments"]) in self.protocol.sizes:
            return self.notes
        public = " or ".join(f"{videos} videos and {segments} segments" for videos, segments in self.protocol.sizes)
        size = f"{self.protocol.name} is {public}; this annotation gives {counts['videos']} and {counts['segments']}"
        return (*self.notes, size)


def scope(
    truth: Truth,
    protocol: str | None = None,
    subset: str | None = None,
    tiou: Thresholds | None = None,
    *,
    leave_out: Collection[str] = (),
) -> Scope:
    """The part of an annotation that :func:`evaluate` scores, and how; parameters and errors as there."""
    if not isinstance(truth, Truth):
        raise AnnotationError(
            f"evaluate needs a Truth (read_truth), got {type(truth).__name__}; tables go to detection_map"
        )
    chosen = get_protocol(protocol) if protocol is not None else None
    extra = (leave_out,) if isinstance(leave_out, str) else tuple(leave_out)
    options: dict[str, Any] = {"leave_out": extra}
    notes = list(truth.notes)
    if chosen is not None:
        options = {
            "leave_out": (*chosen.left_out, *extra),
            "drop_zero_length": chosen.drop_zero_length,
            "dedupe_s": chosen.dedupe_s,
            "own_videos": chosen.own_videos,
            "single_precision": chosen.single_precision,
        }
    nowhere = int((truth.videos["subset"] == "").sum())
    if nowhere and (truth.subsets or subset is not None):
        notes.append(f"{nowhere} videos of the annotation have no subset and are not scored")
    part = truth
    public = chosen is not None and not extra
    if subset is not None:
        part = truth.subset(subset)
        public = public and chosen is not None and canonical_subset(subset) == canonical_subset(chosen.subset)
    elif not truth.subsets:
        if chosen is not None:
            notes.append(f"the annotation names no subset; {chosen.name} scores {chosen.subset!r}, here all is scored")
    elif chosen is not None:
        part = truth.subset(chosen.subset)
    elif len(truth.subsets) > 1:
        raise AnnotationError(
            f"{truth.path or 'the annotation'} has the subsets {', '.join(truth.subsets)}: name one, or a protocol"
        )
    else:
        part = truth.subset(truth.subsets[0])
    levels = tiou if tiou is not None else (chosen.tiou if chosen else THUMOS_TIOU)
    return Scope(part, levels, options, chosen, tuple(notes), public)
