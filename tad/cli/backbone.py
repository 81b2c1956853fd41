"""``tad train-backbone`` and ``tad classify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tad.cli.common import PARTLY, as_json, device_option, say, sets_option, show, tell


@click.command("train-backbone")
@click.argument("videos", nargs=-1, required=True)
@click.option("--backbone", metavar="NAME", help="Backbone to train.")
@click.option(
    "--recipe",
    type=click.Path(exists=True, dir_okay=False),
    help="Recipe file (recipes/backbones holds those of the paper's table).",
)
@click.option("--weights", metavar="FILE", help="Checkpoint to begin with.  [default: the recipe's, else at random]")
@click.option(
    "--annotations",
    required=True,
    type=click.Path(exists=True, dir_okay=False),
    help="Truth: ActivityNet JSON, THUMOS14 CSV or plain CSV.",
)
@sets_option
@click.option("--seed", type=int, help="Seed of everything random.")
@device_option
@click.option("--resume", is_flag=True, help="Go on where the run in -o stopped.")
@click.option("--overwrite", is_flag=True, help="Replace the run in -o.")
@click.option("-o", "--out", required=True, type=click.Path(file_okay=False), help="The run's folder.")
@as_json
@click.pass_context
def train_backbone(
    ctx: click.Context,
    videos: tuple[str, ...],
    backbone: str | None,
    recipe: str | None,
    weights: str | None,
    sets: tuple[str, ...],
    seed: int | None,
    as_json: bool,
    **o: Any,
) -> None:
    """Train a backbone on clips of annotated VIDEOS (files, folders or lists): each says which action is at its
    centre, or that it is background.

    \b
    tad train-backbone videos/ --backbone tiny --annotations A.json -o runs/tiny
    tad train-backbone videos/ --recipe R.yaml --weights pretrained.pyth --annotations A.json -o runs/tuned
    tad extract videos/ --store S --backbone tiny --weights runs/tiny/backbone.safetensors
    """
    from tad.extract.finetune import finetune, finetune_recipe
    from tad.progress import progress

    if backbone is None and recipe is None:
        raise click.UsageError("name a --backbone, or a --recipe")
    if o["resume"] and o["overwrite"]:
        raise click.UsageError("--resume and --overwrite exclude each other: choose one")
    chosen = finetune_recipe(backbone, file=recipe, sets=sets, seed=seed)
    if weights is not None:
        chosen = chosen.model_copy(update={"weights": weights})
    metrics = finetune(chosen, videos=videos, progress=progress, **o)
    if as_json:
        show(metrics)
    else:
        tell(f"{o['out']}: epoch {metrics['best_epoch']} of {metrics['epochs']} chosen, {_told(metrics)}")
    for failure in metrics["failures"]:
        say(f"left out: {failure['video']}: {failure['message']}")
    if metrics["failures"]:
        ctx.exit(PARTLY)


def _told(metrics: dict[str, Any]) -> str:
    scores = metrics["holdout"]
    if scores is None:
        return "no video was held out to judge by"
    names = {"top1": "clip top-1", "background_recall": "background recall", "class_recall": "mean class recall"}
    parts = [f"{name} {100 * scores[key]:.1f} %" for key, name in names.items() if scores[key] is not None]
    return f"{', '.join(parts)} on {scores['clips']} clips of held-out videos"


@click.command()
@click.argument("videos", nargs=-1)
@click.option(
    "--weights",
    metavar="RUN|FILE",
    type=click.Path(exists=True),
    help="Run folder of train-backbone, or a checkpoint that has a classifier.",
)
@click.option("--store", help="Score the videos of this feature store instead, with --run.")
@click.option(
    "--run", type=click.Path(exists=True, file_okay=False), help="Run folder of train-classifier, for --store."
)
@click.option("--backbone", metavar="NAME", help="What a checkpoint is of, where it could be of several networks.")
@click.option("--classes", type=click.Path(exists=True, dir_okay=False), help="A checkpoint's class names, one a line.")
@click.option("--clips", type=click.IntRange(1), default=32, show_default=True, help="Clips a video, evenly spread.")
@click.option(
    "--annotations",
    type=click.Path(exists=True, dir_okay=False),
    help="Truth: says how good the scores are, and which videos --subset holds.",
)
@click.option("--subset", help="Only the videos of this subset (with --annotations).")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Clips a forward pass.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True)
@device_option
@click.option("--overwrite", is_flag=True, help="Begin anew if -o holds scores of other weights, classes or clips.")
@click.option("-o", "--out", required=True, type=click.Path(dir_okay=False), help="scores.json")
@as_json
@click.pass_context
def classify(
    ctx: click.Context,
    videos: tuple[str, ...],
    weights: str | None,
    store: str | None,
    run: str | None,
    as_json: bool,
    **o: Any,
) -> None:
    """Score whole VIDEOS by class, as the mean over clips; what is in -o already is not done again. Or score the
    videos of a feature store with a classifier that reads features.

    \b
    tad classify videos/ --weights runs/tuned -o scores.json
    tad classify videos/ --weights SLOWFAST.pyth --classes kinetics.txt --clips 10 -o scores.json
    tad classify --store S --run runs/classifier --annotations A.json --subset validation -o scores.json
    """
    from tad.progress import progress

    if o["subset"] and not o["annotations"]:
        raise click.UsageError("--subset needs --annotations, which say what it holds")
    if store is not None or run is not None:
        from tad.cli.classifier import classify_features

        classify_features(ctx, videos=videos, weights=weights, store=store, run=run, as_json=as_json, **o)
        return
    if not videos or weights is None:
        raise click.UsageError("name VIDEOS and --weights, or a feature --store and --run")
    from tad.extract.classify import classify as classify_videos

    report = classify_videos(videos, weights=Path(weights), progress=progress, **o)
    if as_json:
        show({
            "written": report.written,
            "already": report.already,
            "failures": report.failures,
            "accuracy": report.accuracy,
            "out": o["out"],
        })  # fmt: skip
    else:
        click.echo(f"{o['out']}: {report.written} videos scored, {report.already} were there")
        if report.accuracy is not None:
            a = report.accuracy
            click.echo(
                f"top-1 {100 * a['top1']:.1f} %, top-5 {100 * a['top5']:.1f} %, mAP {100 * a['map']:.1f} % "
                f"on {a['videos']} videos"
            )
        elif o["annotations"]:
            click.echo("no scored class occurs in the annotations of these videos: accuracy is unknown")
    for failure in report.failures:
        say(f"failed: {failure['video']}: {failure['message']}")
    if report.failures:
        ctx.exit(PARTLY)
