"""``tad report`` and ``tad plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tad.cli.common import PARTLY, say
from tad.errors import RecipeError, TadError

FACTS = ("detector", "streams", "seed")  # of a run's recipe, in the report's heading
NEEDS = {
    "map": "scores",
    "recall": "scores",
    "pr": "scores",
    "errors": "scores",
    "sensitivity": "scores",
    "missed": "scores",
    "confusion": "scores",
    "training": "run",
    "timeline": "tables",
}

annotations_option = click.option(
    "--annotations", type=click.Path(exists=True, dir_okay=False), help="Truth; without it nothing is scored."
)
predictions_option = click.option(
    "--predictions", type=click.Path(exists=True, dir_okay=False), help="ActivityNet results JSON or CSV."
)
subset_option = click.option("--subset", help="Subset that is scored.  [default: the protocol's, else the only one]")
protocol_option = click.option("--protocol", help="As for tad evaluate: subset, tIoUs and what is left out.")
tiou_option = click.option(
    "--error-tiou", type=float, default=0.5, show_default=True, help="tIoU of the curves and the error analysis."
)
run_option = click.option("--run", type=click.Path(exists=True, file_okay=False), help="The run that detected.")


@click.command()
@annotations_option
@predictions_option
@run_option
@subset_option
@protocol_option
@tiou_option
@click.option("--videos", type=click.Path(exists=True, file_okay=False), help="Folder of the video files.")
@click.option(
    "--proxy",
    is_flag=True,
    help="Copy the videos beside the report, small and in VP8: for browsers that do not play them.",
)
@click.option(
    "--bootstrap", "samples", type=int, default=0, show_default=True, help="Draws for an interval of the mAP."
)
@click.option("--title", help="Heading.  [default: of the predictions' file]")
@click.option("-o", "--out", default="report.html", show_default=True, type=click.Path(dir_okay=False))
@click.pass_context
def report(
    ctx: click.Context,
    annotations: str | None,
    predictions: str | None,
    run: str | None,
    videos: str | None,
    proxy: bool,
    title: str | None,
    out: str,
    **o: Any,
) -> None:
    """One HTML file with scores, errors and the timeline of every video beside the video itself. It opens from disk
    and loads nothing from elsewhere.

    \b
    tad report --annotations A.json --predictions found.json --run runs/talnet --videos videos/ -o report.html
    """
    from tad.evaluate.report import build_report, files_of, make_proxies
    from tad.progress import progress

    if predictions is None:
        raise click.UsageError("give --predictions FILE (tad detect ... -o FILE makes one)")
    if proxy and videos is None:
        raise click.UsageError("--proxy copies videos: say where they are with --videos FOLDER")
    given = scored(annotations, predictions, **o)
    failures: list[str] = []
    files: dict[str, Path] = {}
    if videos is not None:
        shown = [*given["truth"].videos["video"]] if given["truth"] is not None else []
        files = files_of(dict.fromkeys([*shown, *given["predictions"]["video"]]), videos)
        if not files:
            say(f"note: no file below {videos} has the name of a video in the report")
    if proxy:
        folder = Path(out).with_name(f"{Path(out).stem}-videos")
        files, failures = make_proxies(files, folder, progress=progress)
    about = {"run": run, **_facts(run), "protocol": o["protocol"], "subset": o["subset"]}
    about |= {"annotations": annotations, "predictions": predictions}
    path = build_report(
        **given,
        out=out,
        title=title or f"Detections: {Path(run or predictions).stem}",
        videos=files,
        training=training_rows(run) if run else (),
        about={name: str(value) for name, value in about.items() if value},
        recipe=_text(run, "recipe.yaml"),
    )
    count = f"{given['predictions']['video'].nunique()} videos with predictions, {len(files)} with a file"
    click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {count}")
    for failure in failures:
        say(f"failed: {failure}")
    if failures:
        ctx.exit(PARTLY)


@click.command()
@click.argument("kind", type=click.Choice(list(NEEDS)))
@annotations_option
@predictions_option
@run_option
@subset_option
@protocol_option
@tiou_option
@click.option("--video", help="Id of the video (timeline).")
@click.option("--min-score", type=float, help="Least score that is drawn (timeline).")
@click.option("-o", "--out", required=True, type=click.Path(dir_okay=False), help="figure.png, .svg or .pdf")
def plot(
    kind: str,
    annotations: str | None,
    predictions: str | None,
    run: str | None,
    video: str | None,
    min_score: float | None,
    out: str,
    **o: Any,
) -> None:
    """Draw one figure of the report with matplotlib (needs the extra 'report').

    \b
    tad plot pr --annotations A.json --predictions found.json --subset validation -o pr.png
    tad plot timeline --annotations A.json --predictions found.json --video v_1 -o v_1.svg
    tad plot training --run runs/talnet -o training.png
    """
    from tad.evaluate import plots

    plots.require_matplotlib()
    if NEEDS[kind] == "run":
        if run is None:
            raise click.UsageError(f"'{kind}' draws a run's metrics.csv: give --run RUN")
        figure = plots.plot_training(training_rows(run))
    elif predictions is None or (annotations is None and NEEDS[kind] == "scores"):
        raise click.UsageError(
            f"'{kind}' needs --predictions FILE" + (" and --annotations FILE" * (kind != "timeline"))
        )
    elif kind == "timeline":
        if video is None:
            raise click.UsageError("'timeline' draws one video: give --video ID")
        truth, found = tables(annotations, predictions)
        figure = plots.plot_timeline(truth, found, video, min_score=min_score, tiou=o["error_tiou"])
    else:
        given = scored(annotations, predictions, **o)
        if "metrics" not in given:
            raise TadError(f"{annotations}: no true segment to score; is it the right file and subset?")
        figure = plots.PLOTS[kind](given)
    plots.save(figure, out)
    click.echo(out)


def tables(annotations: str | None, predictions: str) -> tuple[Any, Any]:
    """Truth (None without a file) and predictions."""
    from tad.annotations import read_predictions, read_truth

    return read_truth(annotations) if annotations else None, read_predictions(predictions)


def scored(
    annotations: str | None, predictions: str, *, subset: str | None, protocol: str | None, error_tiou: float, **o: Any
) -> dict[str, Any]:
    """What :func:`tad.evaluate.report.score_report` makes of two files; without annotations the predictions alone."""
    from tad.evaluate.report import score_report

    if not 0 < error_tiou <= 1:
        raise click.UsageError(f"--error-tiou {error_tiou:g}: must lie above 0 and not above 1")
    truth, found = tables(annotations, predictions)
    if truth is None:
        if subset or protocol:
            raise click.UsageError("--subset and --protocol say what of --annotations is scored: give that too")
        return {"truth": None, "predictions": found, "tiou": error_tiou}
    return score_report(truth, found, protocol, subset, error_tiou=error_tiou, **o)


def training_rows(run: str) -> list[dict[str, str]]:
    """The rows of a run's ``metrics.csv`` as text; none when no epoch is finished."""
    import csv

    path = Path(run) / "metrics.csv"
    if not path.is_file():
        say(f"note: {run} has no metrics.csv: no epoch is finished, or it is no run's folder")
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file, restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error


def _facts(run: str | None) -> dict[str, Any]:
    """What the heading says of a run."""
    from tad.recipe import load_mapping

    if run is None or not (Path(run) / "recipe.yaml").is_file():
        return {}
    recipe = load_mapping(Path(run) / "recipe.yaml")
    found = {name: recipe[name] for name in FACTS if recipe.get(name) not in (None, [])}
    return {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in found.items()}


def _text(run: str | None, name: str) -> str:
    path = Path(run or ".") / name
    return path.read_text(encoding="utf-8", errors="replace") if run and path.is_file() else ""
