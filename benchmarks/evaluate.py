"""How long mAP and AR@AN take, against a loop over predictions: ``python -m benchmarks.evaluate [--out FILE]``.

The data are made here: videos with one to three true segments, and predictions that are those segments jittered, or
anything else. The loop does what the public evaluators do for one prediction after another, without pandas, so it is
a lower bound of their times; it runs on a share of the videos, and the two results must agree. Error analysis and
bootstrap are timed on that share too.

With ``--annotations A --predictions P [--subset S]`` the steps of scoring these files are timed instead, reading
included, which is what the public evaluators' times hold.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tad.annotations import read_predictions, read_truth
from tad.evaluate import ANET_TIOU, average_recall, bootstrap_map, detection_map, diagnose, scope


def make(videos: int, per_video: int, classes: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """True and predicted segments in seconds; half of a video's predictions are about a true segment of it."""
    draw = np.random.default_rng(seed)
    true_count = draw.integers(1, 4, videos)
    video = np.repeat(np.arange(videos), true_count)
    start = draw.uniform(0, 150, len(video))
    length = draw.lognormal(3, 1, len(video))
    label = draw.integers(0, classes, videos)[video]  # one action a video, as nearly always in ActivityNet
    names = np.array([f"video_{index:06d}" for index in range(videos)])
    labels = np.array([f"action {index}" for index in range(classes)])
    truth = pd.DataFrame({"video": names[video], "start_s": start, "end_s": start + length, "label": labels[label]})

    owner = np.repeat(np.arange(videos), per_video)
    first = np.cumsum(true_count) - true_count
    about = first[owner] + draw.integers(0, 1 << 30, len(owner)) % true_count[owner]
    jitter = draw.normal(0, 0.3, (2, len(owner))) * length[about]
    free = draw.random(len(owner)) < 0.5
    free_start = draw.uniform(0, 200, len(owner))
    begin = np.where(free, free_start, start[about] + jitter[0])
    end = np.where(free, free_start + draw.lognormal(2, 1, len(owner)), (start + length)[about] + jitter[1])
    wrong = draw.random(len(owner)) < 0.3
    guess = np.where(wrong, draw.integers(0, classes, len(owner)), label[about])
    predictions = pd.DataFrame(
        {
            "video": names[owner],
            "start_s": begin,
            "end_s": np.maximum(end, begin + 0.1),
            "label": labels[guess],
            "score": draw.random(len(owner)),
        }
    )
    return truth, predictions


def loop_map(truth: pd.DataFrame, predictions: pd.DataFrame, tiou: tuple[float, ...]) -> float:
    """Average mAP by the loop: per class, per prediction in falling score, per threshold, its best free segment."""
    by_class = dict(list(predictions.groupby("label")))
    aps = []
    for label, true in truth.groupby("label"):
        own = {video: group[["start_s", "end_s"]].to_numpy() for video, group in true.groupby("video")}
        taken = {video: np.zeros((len(tiou), len(segments)), dtype=bool) for video, segments in own.items()}
        rows = by_class[label].sort_values("score", ascending=False, kind="stable") if label in by_class else true[:0]
        hits = np.zeros((len(tiou), len(rows)))
        segments = rows[["start_s", "end_s"]].to_numpy()
        for index, video in enumerate(rows["video"]):
            if video not in own:
                continue
            overlap = np.minimum(segments[index, 1], own[video][:, 1]) - np.maximum(
                segments[index, 0], own[video][:, 0]
            )
            overlap = overlap.clip(0)
            union = (own[video][:, 1] - own[video][:, 0]) + (segments[index, 1] - segments[index, 0]) - overlap
            ratio = overlap / union
            for level, threshold in enumerate(tiou):
                for best in ratio.argsort()[::-1]:
                    if ratio[best] < threshold:
                        break
                    if not taken[video][level, best]:
                        taken[video][level, best] = True
                        hits[level, index] = 1
                        break
        precision = np.cumsum(hits, axis=1) / np.arange(1, len(rows) + 1)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        aps.append((envelope * hits).sum(axis=1) / len(true))
    return float(np.mean(aps))


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The best time of some calls, and what the last returned."""
    best, result = np.inf, None
    for _ in range(repeats):
        began = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - began)
    return best, result


def time_files(options: argparse.Namespace) -> list[tuple[str, int, float, str]]:
    """What scoring two files takes, step by step."""
    read_truth_s, truth = timed(lambda: read_truth(options.annotations), options.repeats)
    read_s, predictions = timed(lambda: read_predictions(options.predictions), options.repeats)
    part = scope(truth, options.protocol, options.subset)
    map_s, score = timed(lambda: detection_map(part.truth, predictions, part.tiou, **part.options), options.repeats)
    recall_s, recall = timed(lambda: average_recall(part.truth, predictions), options.repeats)
    diagnose_s, errors = timed(lambda: diagnose(part.truth, predictions), options.repeats)
    samples = options.samples
    drawn_s, drawn = timed(
        lambda: bootstrap_map(part.truth, predictions, part.tiou, samples=samples, **part.options), 1
    )
    reading = read_truth_s + read_s
    number = len(predictions)
    return [
        ("read both", number, reading, f"{len(part.truth.segments)} true segments"),
        (f"mAP, {len(score.map)} tIoU", number, map_s, f"average mAP {score.average:.6f}"),
        ("mAP and reading", number, map_s + reading, ""),
        ("AR@1...100, 10 tIoU", number, recall_s, f"AUC {recall.auc:.6f}"),
        ("AR and reading", number, recall_s + reading, ""),
        ("error analysis", number, diagnose_s, f"normalised mAP {errors.normalized_map:.6f}"),
        (f"bootstrap, {samples} samples", number, drawn_s, f"{drawn.average[0]:.4f} ... {drawn.average[1]:.4f}"),
    ]


def show(rows: list[tuple[str, int, float, str]], options: argparse.Namespace, **more: float) -> None:
    """Print the rows, and write them when asked."""
    print(f"{'what':<26}{'predictions':>12}{'seconds':>10}  result")
    for what, number, seconds, note in rows:
        print(f"{what:<26}{number:>12,}{seconds:>10.3f}  {note}")
    if options.out is not None:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        figures = {
            "benchmark": "evaluate",
            "settings": {key: value for key, value in settings.items() if key != "out"},
            "machine": {"processor": platform.machine(), "python": platform.python_version(), "numpy": np.__version__},
            "rows": [{"what": what, "predictions": number, "seconds": s} for what, number, s, _ in rows],
            **more,
        }
        options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run, print a table, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=5000)
    parser.add_argument("--per-video", type=int, default=100, help="predictions of each video")
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.05, help="share of the videos that the loop gets")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--samples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--annotations", type=Path, help="time the scoring of files instead of made-up data")
    parser.add_argument("--predictions", type=Path)
    parser.add_argument("--subset")
    parser.add_argument("--protocol")
    options = parser.parse_args()
    if options.annotations is not None:
        if options.predictions is None:
            parser.error("--annotations needs --predictions")
        show(time_files(options), options)
        return

    truth, predictions = make(options.videos, options.per_video, options.classes, options.seed)
    few = make(max(1, round(options.videos * options.share)), options.per_video, options.classes, options.seed)
    whole_s, whole = timed(lambda: detection_map(truth, predictions, ANET_TIOU), options.repeats)
    recall_s, recall = timed(lambda: average_recall(truth, predictions), options.repeats)
    few_s, small = timed(lambda: detection_map(*few, ANET_TIOU), options.repeats)
    loop_s, reference = timed(lambda: loop_map(*few, ANET_TIOU), 1)
    if abs(small.average - reference) > 1e-9:
        raise SystemExit(f"the loop gives another average mAP: {reference} instead of {small.average}")

    errors_s, errors = timed(lambda: diagnose(*few), options.repeats)
    drawn_s, drawn = timed(lambda: bootstrap_map(*few, ANET_TIOU, samples=options.samples), 1)
    ends = f"{drawn.average[0]:.4f} ... {drawn.average[1]:.4f}"
    rows = [
        ("mAP, 10 tIoU", len(predictions), whole_s, f"average mAP {whole.average:.4f}"),
        ("AR@1...100, 10 tIoU", len(predictions), recall_s, f"AUC {recall.auc:.4f}"),
        ("mAP, 10 tIoU", len(few[1]), few_s, f"average mAP {small.average:.4f}"),
        ("mAP, 10 tIoU, loop", len(few[1]), loop_s, f"{loop_s / few_s:.0f} times as long"),
        ("error analysis", len(few[1]), errors_s, f"normalised mAP {errors.normalized_map:.4f}"),
        (f"bootstrap, {options.samples} samples", len(few[1]), drawn_s, ends),
    ]
    show(rows, options, map_s=whole_s, recall_s=recall_s, map_few_s=few_s, loop_few_s=loop_s, loop_ratio=loop_s / few_s)


if __name__ == "__main__":
    main()
