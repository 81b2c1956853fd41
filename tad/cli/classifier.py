"""``tad train-classifier``, and ``tad classify`` of a feature store."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from tad.cli.common import PARTLY, as_json, device_option, say, show, tell

ONLY_OF_VIDEOS = {"backbone": "--backbone", "classes": "--classes", "clips": "--clips", "batch": "--batch",
                  "precision": "--precision"}  # fmt: skip


@click.command("train-classifier")
@click.option("--store", required=True, help="Feature store to read.")
@click.option("--streams", required=True, help="Streams, separated by commas.")
@click.option(
    "--annotations",
    required=True,
    type=click.Path(exists=True, dir_okay=False),
    help="Truth: ActivityNet JSON, THUMOS14 CSV or plain CSV.",
)
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one value of the recipe, e.g. epochs=30 or data.holdout=0.2.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
@device_option
@click.option("--resume", is_flag=True, help="Go on where the run in -o stopped.")
@click.option("--overwrite", is_flag=True, help="Replace the run in -o.")
@click.option("-o", "--out", required=True, type=click.Path(file_okay=False), help="The run's folder.")
@as_json
def train_classifier(streams: str, sets: tuple[str, ...], as_json: bool, **o: Any) -> None:
    """Train a classifier of whole videos on stored features; its scores give classes to class-agnostic proposals.

    \b
    tad train-classifier --store S --streams i3d-rgb,i3d-flow --annotations A.json -o runs/classifier
    tad classify --store S --run runs/classifier -o scores.json
    """
    from tad.detect.classifier_train import classifier_recipe
    from tad.detect.classifier_train import train_classifier as run
    from tad.progress import progress

    recipe, data = classifier_recipe(sets)
    names = [stream.strip() for stream in streams.split(",")]
    metrics = run(recipe, data=data, streams=names, progress=progress, **o)
    if as_json:
        show(metrics)
    elif metrics["holdout"] is None:
        tell(f"{o['out']}: epoch {metrics['best_epoch']}, no video was held out to judge by")
    else:
        tell(f"{o['out']}: epoch {metrics['best_epoch']}, {_told(metrics['holdout'], 'held-out videos')}")


def classify_features(
    ctx: click.Context,
    *,
    videos: tuple[str, ...],
    weights: str | None,
    store: str | None,
    run: str | None,
    as_json: bool,
    **o: Any,
) -> None:
    """``tad classify --store S --run RUN``."""
    from tad.detect.classifier_run import classify_store
    from tad.progress import progress

    if store is None or run is None:
        raise click.UsageError("--store and --run belong together: whose features, and which classifier of features")
    if videos or weights is not None:
        raise click.UsageError("VIDEOS and --weights are for classifiers of videos; --store and --run of features")
    given = [
        flag for name, flag in ONLY_OF_VIDEOS.items() if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(f"{', '.join(given)}: for classifiers of videos, not with --store")
    kept = {name: value for name, value in o.items() if name not in ONLY_OF_VIDEOS}
    report = classify_store(run, store=store, progress=progress, **kept)
    if as_json:
        show({
            "written": len(report.scores),
            "already": report.already,
            "failures": [failure.__dict__ for failure in report.failures],
            "accuracy": report.accuracy,
            "out": o["out"],
        })  # fmt: skip
    else:
        click.echo(f"{o['out']}: {len(report.scores)} videos scored, {report.already} others were there")
        if report.accuracy is not None:
            click.echo(_told(report.accuracy, "videos"))
        elif o["annotations"]:
            click.echo("no scored class occurs in the annotations of these videos: accuracy is unknown")
    for failure in report.failures:
        say(f"failed: {failure}")
    if report.failures:
        ctx.exit(PARTLY)


def _told(scores: dict[str, float], videos: str) -> str:
    names = {"top1": "top-1", "top2": "top-2", "top5": "top-5", "map": "mAP"}
    parts = ", ".join(f"{name} {100 * scores[key]:.1f} %" for key, name in names.items())
    return f"{parts} on {scores['videos']:.0f} {videos}"
