"""How good a detector is while it learns: mAP on the held-out videos, by which the checkpoint is chosen."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tad.detect.data import with_proposals
from tad.detect.infer import decoded_videos, detections, table_of
from tad.detect.interface import Segments
from tad.detect.postprocess import suppress_all
from tad.detect.preflight import Plan, TrainingSet
from tad.detect.prepare import Prepared
from tad.detect.raw import Raw
from tad.detect.source import StoreSource
from tad.detect.trainer import Trainer
from tad.detect.windows import read_for_views
from tad.evaluate import detection_map
from tad.recipe import DetectRecipe
from tad.store import Store

TIOU = (0.3, 0.4, 0.5, 0.6, 0.7)  # whose average mAP on the held-out videos chooses the checkpoint
NOTHING = (np.zeros((0, 2)), np.zeros(0))  # proposals of a video that has none


def evaluate_held_out(
    trainer: Trainer,
    recipe: DetectRecipe,
    plan: Plan,
    data: TrainingSet,
    prepared: Prepared,
    source: StoreSource,
    store: Store,
) -> dict[str, float]:
    """mAP on the held-out videos, each process detecting in its share of them.

    Of a class-agnostic detector ``proposal_map`` is its mAP as if there were one class, ``average_map`` that with the
    classes of whole videos.
    """
    processes = trainer.processes
    module = trainer.judged
    module.eval()
    detector, needs = source.detector(module), trainer.detector.needs
    mine, size = data.holdout[processes.rank :: processes.size], recipe.train.batch_videos
    found: list[Segments] = []
    for group in (mine[i : i + size] for i in range(0, len(mine), size)):
        samples = [data.cache.get(v) or read_for_views(store, needs, v, recipe.data) for v in group]
        samples = [source.whole(module, sample) for sample in samples]
        if prepared.proposals is not None:
            samples = [with_proposals(s, prepared.proposals.get(s.video, NOTHING)) for s in samples]
        found += decoded_videos(detector, samples, recipe.data, device=processes.device)
    agnostic = detector.class_agnostic
    raw = Raw(found, plan.classes, agnostic, prepared.class_scores, recipe)
    tables = {"average_map": detections(raw)[0]}
    if agnostic:
        tables["proposal_map"] = table_of(suppress_all(found, recipe.postprocess), None).assign(label="action")
    truth = data.holdout_truth(plan)
    every = processes.gathered(tables)

    def score() -> dict[str, float]:
        row: dict[str, float] = {}
        for name in tables:
            parts = [part[name] for part in every]
            table = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
            known = truth if name == "average_map" else one_class(truth)
            result = detection_map(known, table, tiou=TIOU)
            row[name] = float(result.average)
            if name == "average_map":
                row |= {f"map_{t:g}": float(v) for t, v in result.map.items()}
        return row

    return processes.on_first(score)


def one_class(truth: pd.DataFrame) -> pd.DataFrame:
    """True segments as if there were one class; what had several is one segment then."""
    return truth.assign(label="action").drop_duplicates(["video", "start_s", "end_s"], ignore_index=True)
