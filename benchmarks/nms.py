"""Suppression of many videos at once against a plain loop over videos, classes and segments.

::

    python -m benchmarks.nms [--segments 200,2000,20000] [--videos 100] [--classes 20] [--json out.json]

Two loops: ``python`` is the plain one, number by number, as the public code of BMN, TCANet and ETAD has it; ``numpy``
compares the best segment with all others in one array operation, the most that can be had from a loop. All sides do the
same work (per class, the 2000 best segments of a video, at most 200 kept) and their results are compared. The loops are
timed on a part of the videos where they would take too long.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tad.detect import Segments, suppress_all
from tad.recipe import PostprocessRecipe

LOOP_SEGMENTS = {"python": 6_000, "numpy": 60_000}  # candidates that a loop is timed on at most
RECIPES = {
    "nms 0.5": PostprocessRecipe(method="nms", tiou=0.5),
    "soft-nms 0.5": PostprocessRecipe(method="soft_nms", sigma=0.5),
}


OneClass = Callable[[np.ndarray, np.ndarray, PostprocessRecipe], list[float]]


def make(videos: int, segments: int, classes: int, seed: int = 0) -> list[Segments]:
    """Random detections: lengths log-uniform from 1 s to a third of ten minutes, all scores different."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(videos):
        length = np.exp(rng.uniform(0, np.log(200), segments))
        start = rng.uniform(0, 600 - length)
        scores = (rng.permutation(segments) + 1.0) / (segments + 1)
        pair = torch.from_numpy(np.stack([start, start + length], 1)).float()
        labels = torch.from_numpy(rng.integers(0, classes, segments))
        found.append(Segments(f"v{index}", pair, labels, torch.from_numpy(scores).float()))
    return found


def plain(found: list[Segments], recipe: PostprocessRecipe, one_class: OneClass) -> list[np.ndarray]:
    """Scores of what is kept in each video, by a loop over videos and classes."""
    result = []
    for video in found:
        order = np.argsort(-video.scores.numpy(), kind="stable")[: recipe.pre_topk]
        segments, scores = video.segments_s.numpy()[order], video.scores.numpy()[order]
        labels = video.labels.numpy()[order]
        kept: list[float] = []
        for label in np.unique(labels):
            mine = segments[labels == label], scores[labels == label]
            kept += one_class(*mine, recipe)
        result.append(np.sort(np.array(kept))[::-1][: recipe.max_segments])
    return result


def python_loop(segments: np.ndarray, scores: np.ndarray, recipe: PostprocessRecipe) -> list[float]:
    """Segment by segment, number by number."""
    starts, ends, left = segments[:, 0].tolist(), segments[:, 1].tolist(), scores.tolist()
    kept: list[float] = []
    while left:
        best = left.index(max(left))
        start, end, top = starts.pop(best), ends.pop(best), left.pop(best)
        if top < recipe.min_score or len(kept) >= recipe.max_segments:
            break
        kept.append(top)
        survivors: list[tuple[float, float, float]] = []
        for other_start, other_end, score in zip(starts, ends, left, strict=True):
            overlap = max(min(end, other_end) - max(start, other_start), 0.0)
            tiou = overlap / (end - start + other_end - other_start - overlap)
            if recipe.method == "nms":
                if tiou < recipe.tiou:
                    survivors.append((other_start, other_end, score))
            else:
                survivors.append((other_start, other_end, score * math.exp(-(tiou**2) / recipe.sigma)))
        starts, ends, left = (list(column) for column in zip(*survivors, strict=True)) if survivors else ([], [], [])
    return kept


def numpy_loop(segments: np.ndarray, scores: np.ndarray, recipe: PostprocessRecipe) -> list[float]:
    """The best segment against all others at once."""
    start, end, scores = segments[:, 0], segments[:, 1], scores.copy()
    kept = []
    while len(scores):
        best = int(np.argmax(scores))
        top = scores[best]
        if top < recipe.min_score or len(kept) >= recipe.max_segments:
            break
        kept.append(float(top))
        overlap = np.maximum(np.minimum(end, end[best]) - np.maximum(start, start[best]), 0)
        tiou = overlap / (end - start + end[best] - start[best] - overlap)
        if recipe.method == "nms":
            stays = tiou < recipe.tiou
        else:
            scores = scores * np.exp(-(tiou**2) / recipe.sigma)
            stays = scores >= recipe.min_score
        stays[best] = False
        start, end, scores = start[stays], end[stays], scores[stays]
    return kept


LOOPS: dict[str, OneClass] = {"python": python_loop, "numpy": numpy_loop}


def timed(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    best, value = float("inf"), None
    for _ in range(repeats):
        begun = time.perf_counter()
        value = function()
        best = min(best, time.perf_counter() - begun)
    return best, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", default="200,2000,20000", help="detections a video")
    parser.add_argument("--videos", type=int, default=100)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    print(f"{options.videos} videos, {options.classes} classes, {options.device}, {torch.get_num_threads()} threads")
    print(f"{'':14}{'segments':>9}{'python s':>10}{'numpy s':>9}{'ours s':>8}{'ratios':>14}   difference of scores")
    for count in map(int, options.segments.split(",")):
        found = make(options.videos, count, options.classes)
        moved = [
            Segments(s.video, s.segments_s.to(options.device), s.labels.to(options.device), s.scores.to(options.device))
            for s in found
        ]
        for name, recipe in RECIPES.items():
            row: dict[str, Any] = {"recipe": name, "segments": count}
            row["ours_s"], ours = timed(lambda: suppress_all(moved, recipe), 3)  # noqa: B023 - called at once
            worst = 0.0
            for kind, loop in LOOPS.items():
                part = found[: max(1, min(options.videos, LOOP_SEGMENTS[kind] // count))]
                seconds, theirs = timed(lambda: plain(part, recipe, loop), 1)  # noqa: B023
                row[f"{kind}_s"] = seconds * len(found) / len(part)
                for mine, kept in zip(ours, theirs, strict=False):
                    same = len(mine) == len(kept)
                    worst = max(worst, float(np.abs(mine.scores.cpu().numpy() - kept).max(initial=0)) if same else 1.0)
            row["difference"] = worst
            ratios = [row[f"{kind}_s"] / row["ours_s"] for kind in LOOPS]
            print(
                f"{name:14}{count:>9}{row['python_s']:>10.2f}{row['numpy_s']:>9.2f}{row['ours_s']:>8.3f}"
                f"{ratios[0]:>7.0f}{ratios[1]:>7.1f}   {worst:.1e}"
            )
            rows.append(row)
    if options.json:
        about = {"videos": options.videos, "classes": options.classes, "machine": platform.processor()}
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
