"""``tad train-detector`` and ``tad detect``."""

from __future__ import annotations

from typing import Any

import click

from tad.cli.common import (
    PARTLY,
    as_json,
    check_predictions_file,
    device_option,
    say,
    sets_option,
    show_training,
)  # fmt: skip


@click.command("train-detector")
@click.argument("name", required=False)
@click.option("--recipe", help="Recipe file, or the name of a shipped one (tad recipe ls).")
@click.option("--store", required=True, help="Feature store to read.")
@click.option("--streams", help="Streams, separated by commas; order matters (RGB, then flow).")
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
def train_detector(
    ctx: click.Context,
    name: str | None,
    recipe: str | None,
    streams: str | None,
    sets: tuple[str, ...],
    seed: int | None,
    as_json: bool,
    **o: Any,
) -> None:
    """Train detector NAME (or the one of --recipe) on stored features; the checkpoint is chosen by mAP on videos
    kept aside.

    \b
    tad train-detector talnet --store S --streams i3d-rgb,i3d-flow --annotations A.json -o runs/talnet
    """
    from tad.detect import train_detector as run
    from tad.detect.recipes import detect_recipe
    from tad.progress import progress
    from tad.shipped import find_recipe

    file = find_recipe(recipe) if recipe else None
    chosen = detect_recipe(name, file=file, streams=streams.split(",") if streams else None, sets=sets, seed=seed)
    metrics = run(chosen, progress=progress, **o)
    ctx.exit(show_training(metrics, out=o["out"], as_json=as_json))


@click.command()
@click.argument("videos", nargs=-1)
@click.option(
    "--run", required=True, type=click.Path(exists=True, file_okay=False), help="Run folder of train-detector."
)
@click.option("--store", help="Detect in this store's features; with VIDEOS: keep their features here.")
@click.option(
    "--annotations", type=click.Path(exists=True, dir_okay=False), help="Truth that says which videos --subset holds."
)
@click.option("--subset", help="Only the videos of this subset (with --annotations).")
@click.option(
    "--weights", multiple=True, metavar="STREAM=FILE", help="Where a stream's checkpoint is now, if it was moved."
)
@click.option(
    "--scores",
    type=click.Path(exists=True, dir_okay=False),
    help="Class scores by video for a class-agnostic run.  [default: its own]",
)
@click.option("--proposals", is_flag=True, help="Proposals of a class-agnostic run as they are, without labels.")
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override suppression, e.g. tiou=0.5 or method=soft_nms; classes.top=3 for a class-agnostic run.",
)
@click.option("--raw", "raw_out", type=click.Path(dir_okay=False), help="Also write what was found before suppression.")
@click.option(
    "--maps", "maps_out", type=click.Path(dir_okay=False), help="Also write the maps behind it (bmn), for tad fuse."
)
@device_option
@click.option(
    "-o", "--out", type=click.Path(dir_okay=False), help="predictions.json or .csv.  [default: JSON on stdout]"
)
@click.pass_context
def detect(
    ctx: click.Context,
    /,
    videos: tuple[str, ...],
    run: str,
    store: str | None,
    weights: tuple[str, ...],
    sets: tuple[str, ...],
    **o: Any,
) -> None:
    """Say which actions happen when, in VIDEOS (features are extracted as the run wants them) or in a feature store.

    \b
    tad detect talk.mp4 --run runs/talnet -o found.json
    tad detect --store S --annotations A.json --subset validation --run runs/talnet -o found.json
    """
    from tad.annotations import predictions_json, write_predictions
    from tad.detect.recipes import result_recipes
    from tad.progress import progress

    if not videos and store is None:
        raise click.UsageError("name VIDEOS, or a --store whose features are searched")
    if videos and (o["subset"] or o["annotations"]):
        raise click.UsageError("--subset and --annotations choose videos of a store; here VIDEOS are named")
    if wrong := [item for item in weights if "=" not in item]:
        raise click.UsageError(f"--weights {wrong[0]}: say which stream it is of, as STREAM=FILE")
    if videos and (o["raw_out"] or o["maps_out"]):
        raise click.UsageError("--raw and --maps need features in a --store, without VIDEOS")
    if o["proposals"] and any(item.startswith("classes.") for item in sets):
        raise click.UsageError("--proposals gives no classes: leave --set classes.... out")
    if not videos and weights:
        raise click.UsageError("--weights is for extraction from VIDEOS; the features of a --store are there already")
    if not videos and o["annotations"] and not o["subset"]:
        raise click.UsageError("--annotations says which videos a --subset holds: name the subset too")
    check_predictions_file(o["out"])
    suppression, classes = result_recipes(run, sets)
    failures: list[Any] = []
    searched: list[str] = []
    if videos:
        from tad.apply import detect_videos

        given = dict(item.split("=", 1) for item in weights)
        found = detect_videos(
            videos, run=run, store=store, weights=given, device=o["device"], postprocess=suppression, classes=classes,
            scores=o["scores"], proposals=o["proposals"], progress=progress,
        )  # fmt: skip
        predictions, searched, failures = found.predictions, found.videos, found.failures
    elif store is not None:
        from tad.detect import detect as from_store

        predictions = from_store(
            run=run, store=store, subset=o["subset"], annotations=o["annotations"], device=o["device"],
            postprocess=suppression, classes=classes, scores=o["scores"], proposals=o["proposals"],
            raw_out=o["raw_out"], maps_out=o["maps_out"], failures=failures, progress=progress,
        )  # fmt: skip
    if o["out"]:
        write_predictions(o["out"], predictions, videos=searched)
        click.echo(f"{len(predictions)} segments in {predictions['video'].nunique()} videos: {o['out']}")
    else:
        click.echo(predictions_json(predictions, videos=searched), nl=False)
    for failure in failures:
        say(f"failed: {failure}")
    if failures:
        ctx.exit(PARTLY)
