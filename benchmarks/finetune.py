"""``python -m benchmarks.finetune``: what fine-tuning a backbone gains, on clips and in a detector, at two resolutions.

Synthetic videos (``tad.synth``) in three subsets, as in ``tad demo``. At each resolution ``tiny`` is taken as it is
drawn at random and as ``tad train-backbone`` leaves it. On the testing videos two things are measured of either: how
many clips a linear classifier on its features tells right (all rows of extraction, background included), and the mAP of
TAL-Net, trained on these features with the recipe of the demo. "head" is the classifier that was trained with the
network, "probe" one that was trained on the frozen features afterwards, with the same shares of background and classes.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tad.annotations import Truth, read_truth
from tad.detect import detect, train_detector
from tad.detect.recipes import detect_recipe
from tad.evaluate import evaluate
from tad.extract import extract
from tad.extract.clips import BACKGROUND, clip_labels
from tad.extract.finetune import finetune, finetune_recipe
from tad.extract.finetune_run import FinetunedRun
from tad.recipe import ExtractRecipe
from tad.store import open_store
from tad.synth import FPS, MIRRORED, make_videos

SHARE = 0.35  # of background among the clips, in fine-tuning and for the probe
SPAN = 16  # frames of a clip
Rows = tuple[Tensor, Tensor]  # features (N, D), labels (N,)


def rows_of(store: Path, truth: Truth, subset: str, classes: Sequence[str]) -> Rows:
    """All rows of a subset's videos and the class at the centre of each."""
    part = truth.subset(subset)
    features, labels = [], []
    with open_store(store) as opened:
        for video in part.videos["video"]:
            feature = opened["tiny", str(video)]
            array = np.asarray(feature.numpy(), np.float32)
            stride = round(feature.axis.scale_s * FPS)
            own = part.segments[part.segments["video"] == video]
            found, _ = clip_labels(own, classes, starts=len(array) * stride, span=SPAN, fps=FPS)
            features.append(array)
            labels.append(found[::stride])
    return torch.from_numpy(np.concatenate(features)), torch.from_numpy(np.concatenate(labels))


def probe(rows: Rows, classes: int, *, seed: int) -> nn.Module:
    """A linear classifier on standardised features: logistic regression, the classes weighted as clips are drawn."""
    features, labels = rows
    torch.manual_seed(seed)
    mean, std = features.mean(0), features.std(0).clamp_min(1e-4)
    linear = nn.Linear(features.shape[1], classes + 1)
    counts = torch.bincount(labels, minlength=classes + 1).float()
    shares = torch.full((classes + 1,), (1 - SHARE) / classes)
    shares[BACKGROUND] = SHARE
    weights = shares / counts.clamp_min(1)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    scaled = (features - mean) / std

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(linear(scaled), labels, weights) + 1e-4 * linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)

    class Standardised(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = linear((x - mean) / std)
            return result

    return Standardised()


def accuracy(classifier: nn.Module, rows: Rows) -> dict[str, float]:
    """``top1`` over all rows, and ``recall``: the mean over background and classes."""
    features, labels = rows
    with torch.inference_mode():
        guesses = classifier(features).argmax(1)
    right = guesses == labels
    recall = [float(right[labels == k].float().mean()) for k in labels.unique()]
    return {"top1": float(right.float().mean()), "recall": float(np.mean(recall))}


def detector_map(store: Path, annotations: Path, out: Path, *, epochs: int, seed: int) -> dict[str, float]:
    """mAP on the testing videos of TAL-Net trained on these features, as in the demo."""
    sets = [
        "data.train_subset=training", "data.holdout_subset=validation", f"train.epochs={epochs}", "model.width=128",
    ]  # fmt: skip
    recipe = detect_recipe("talnet", streams=["tiny"], sets=sets, seed=seed)
    train_detector(recipe, store=store, annotations=annotations, out=out)
    truth = read_truth(annotations)
    result = evaluate(truth, detect(run=out, store=store, annotations=truth, subset="testing"), subset="testing")
    return {"map_0.5": float(result.map[0.5]), "average_map": float(result.average)}


def measured(root: Path, side: int, *, seed: int, steps: int, epochs: int) -> list[dict[str, Any]]:
    """The rows of the table for one resolution: before, and after fine-tuning."""
    videos, annotations = root / "videos", root / "annotations.json"
    truth = read_truth(annotations)
    known = set(truth.subset("training").segments["label"])
    mirror = {label: other if other in known else None for label, other in MIRRORED.items() if label in known}
    sets = [
        "train_subset=training", "holdout_subset=validation", "epochs=1", f"steps={steps}", f"background={SHARE}",
        f"short_side={side}", f"crop=[{side}, {side}]", f"mirror={json.dumps(mirror)}", f"fps={FPS}",
    ]  # fmt: skip
    begun = time.perf_counter()
    run = root / f"backbone-{side}"
    metrics = finetune(finetune_recipe("tiny", sets=sets, seed=seed), videos=videos, annotations=truth, out=run)
    tuning_s = time.perf_counter() - begun
    rows = []
    for name, weights in (("before", f"random:{seed}"), ("after", str(run / "backbone.safetensors"))):
        store = root / f"{name}-{side}.zarr"
        recipe = ExtractRecipe(backbone="tiny", weights=weights, fps=FPS, short_side=side, crop=(side, side))
        extract(videos, store=store, recipes=recipe)
        train, test = (rows_of(store, truth, subset, metrics["classes"]) for subset in ("training", "testing"))
        row: dict[str, Any] = {"side": side, "weights": name, "tuning_s": tuning_s if name == "after" else 0.0}
        row |= {f"probe_{k}": v for k, v in accuracy(probe(train, len(metrics["classes"]), seed=seed), test).items()}
        if name == "after":
            row |= {f"head_{k}": v for k, v in accuracy(FinetunedRun.load(run).head, test).items()}
        row |= detector_map(store, annotations, root / f"talnet-{name}-{side}", epochs=epochs, seed=seed)
        row["clips"] = len(test[1])
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, nargs=3, default=(28, 6, 16), metavar=("TRAIN", "VALIDATION", "TEST"))
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 48], help="of the square frames, in pixels")
    parser.add_argument("--steps", type=int, default=450, help="of fine-tuning, 16 clips each")
    parser.add_argument("--epochs", type=int, default=15, help="of TAL-Net")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--quick", action="store_true", help="a smoke test: the numbers mean nothing")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    duration_s = (30.0, 60.0)
    if args.quick:
        args.videos, args.steps, args.epochs, duration_s = (4, 2, 2), 10, 1, (12.0, 16.0)
    begun, rows = time.perf_counter(), []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory(prefix="tad-finetune-") as folder:
            root = Path(folder)
            for subset, count in zip(("training", "validation", "testing"), args.videos, strict=True):
                make_videos(root, videos=count, seed=seed, subset=subset, duration_s=duration_s, size=(64, 64))
            for side in args.sides:
                rows += [{"seed": seed, **row} for row in measured(
                    root, side, seed=seed, steps=args.steps, epochs=args.epochs
                )]  # fmt: skip
    print("seed  frames  weights  clips  probe top-1  recall   head top-1  recall   mAP@0.5  average")
    for row in rows:
        head = [f"{100 * row[k]:.1f}" if k in row else "-" for k in ("head_top1", "head_recall")]
        print(
            f"{row['seed']:4d}  {row['side']:3d}x{row['side']:<3d} {row['weights']:>7s}  {row['clips']:5d}  "
            f"{100 * row['probe_top1']:11.1f}  {100 * row['probe_recall']:6.1f}  {head[0]:>11s}  {head[1]:>6s}  "
            f"{100 * row['map_0.5']:8.1f}  {100 * row['average_map']:7.1f}"
        )
    seconds = time.perf_counter() - begun
    print(f"{seconds:.0f} s in all; fine-tuning {sum(row['tuning_s'] for row in rows):.0f} s")
    if args.out:
        settings = {"videos": list(args.videos), "steps": args.steps, "epochs": args.epochs, "quick": args.quick}
        about = {"seconds": seconds, "threads": torch.get_num_threads(), "machine": platform.machine()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**about, **settings, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
