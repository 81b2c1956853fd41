"""``tad diagnose`` and ``tad compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tad.cli.common import as_json, print_table, say, show
from tad.cli.scores import (
    annotations_option,
    protocol_option,
    subset_option,
    thresholds_of,
    tiou_option,
    write_result,
)

if TYPE_CHECKING:
    import pandas as pd


@click.command()
@annotations_option
@subset_option
@protocol_option
@click.option(
    "--predictions",
    required=True,
    type=click.Path(exists=True, dir_okay=False),
    help="ActivityNet results JSON or CSV.",
)
@click.option("--tiou", type=float, default=0.5, show_default=True, help="Threshold of the analysis.")
@click.option(
    "--buckets",
    type=click.Choice(["activitynet", "thumos14"]),
    help="Limits of length, coverage and so on.  [default: the protocol's, else activitynet]",
)
@click.option("--limit", type=int, default=10, show_default=True, help="Predictions looked at per true segment.")
@click.option(
    "--own-label-first",
    is_flag=True,
    help="On segments with two labels, compare a prediction with its own.  [default: the first, as DETAD]",
)
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="diagnosis.json")
@as_json
def diagnose(
    annotations: str,
    subset: str | None,
    protocol: str | None,
    predictions: str,
    tiou: float,
    buckets: str | None,
    limit: int,
    own_label_first: bool,
    out: str | None,
    as_json: bool,
) -> None:
    """What kind of errors a detector makes, and what mending each kind would gain.

    \b
    tad diagnose --annotations A.json --subset validation --predictions found.json -o diagnosis.json
    """
    from tad.annotations import read_predictions, read_truth
    from tad.evaluate import diagnose as analyse
    from tad.evaluate import read_characteristics, scope, with_characteristics
    from tad.evaluate.diagnose import advice, tables
    from tad.evaluate.false_positives import MIN_TIOU

    part = scope(read_truth(annotations), protocol, subset)
    options = {name: part.options[name] for name in ("leave_out", "own_videos", "dedupe_s") if name in part.options}
    result = analyse(
        with_characteristics(part.truth.segments, read_characteristics(annotations)),
        read_predictions(predictions),
        videos=part.truth.videos,
        tiou=tiou,
        buckets=buckets or ("thumos14" if (protocol or "").startswith("thumos14") else "activitynet"),
        limit=limit,
        min_tiou=min(MIN_TIOU, tiou),
        own_label_first=own_label_first,
        **options,
    )
    data = {**result.to_dict(), "protocol": protocol}
    write_result(out, data)
    for note in (*part.notes, *result.notes):
        say(f"note: {note}")
    if as_json:
        show(data)
        return
    click.echo(f"mAP@{tiou:g} {100 * result.map:.2f}, normalised {100 * result.normalized_map:.2f}. What to do:")
    for number, line in enumerate(advice(result), start=1):
        click.echo(f"{number}. {line}")
    for grid in tables(result):
        print_table(grid)


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="A B [C...]", type=click.Path(exists=True))
@annotations_option
@subset_option
@protocol_option
@tiou_option
@click.option("--seeds", is_flag=True, help="The runs are one recipe with several seeds: print mean ± sd.")
@click.option("--samples", type=int, default=1000, show_default=True, help="Of the bootstrap and of the test.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the drawing of videos.")
@click.option("--classes", type=int, default=10, show_default=True, help="Classes printed for each.")
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="comparison.json")
@as_json
def compare(
    runs: tuple[str, ...],
    annotations: str,
    subset: str | None,
    protocol: str | None,
    tiou: str | None,
    seeds: bool,
    samples: int,
    seed: int,
    classes: int,
    out: str | None,
    as_json: bool,
) -> None:
    """Set predictions against the first: difference of average mAP, its interval, and a p value.

    Each is a file of predictions, or a folder with predictions.json or predictions.csv in it, such as a run's.

    \b
    tad compare old.json new.json --annotations A.json --subset validation
    tad compare seed0.json seed1.json seed2.json --seeds --annotations A.json --subset validation
    """
    from tad.annotations import read_truth
    from tad.evaluate import compare as against_first
    from tad.evaluate import scope, seed_spread
    from tad.evaluate.comparison import comparison_table, seed_table

    if len(runs) < (1 if seeds else 2):
        raise click.UsageError("give at least two sets of predictions to compare")
    part = scope(read_truth(annotations), protocol, subset, thresholds_of(tiou))
    named = named_predictions(runs)
    data: dict[str, Any]
    if seeds:
        spread = seed_spread(part.truth, named, part.tiou, **part.options)
        data, notes, grids = spread.to_dict(), spread.notes, [seed_table(spread)]
    else:
        result = against_first(part.truth, named, part.tiou, samples=samples, seed=seed, **part.options)
        data, notes, grids = result.to_dict(), result.notes, comparison_table(result, classes=classes)
    data["protocol"] = protocol
    write_result(out, data)
    for note in (*part.notes, *notes):
        say(f"note: {note}")
    if as_json:
        show(data)
        return
    for grid in grids:
        print_table(grid)


def named_predictions(paths: tuple[str, ...]) -> dict[str, pd.DataFrame]:
    """Tables by name: the file's stem or the folder's name where these differ, else the path as given."""
    from tad.annotations import read_predictions
    from tad.errors import AnnotationError

    files = {}
    for path in paths:
        folder = Path(path)
        if folder.is_dir():
            inside = [folder / name for name in ("predictions.json", "predictions.csv") if (folder / name).is_file()]
            if not inside:
                command = f"tad detect --store S --run {path} -o {path}/predictions.json"
                raise AnnotationError(f"{path} holds no predictions.json; write it: {command}")
            files[path] = inside[0]
        else:
            files[path] = folder
    if len(files) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise AnnotationError(f"{twice} is given twice; a comparison with itself says nothing")
    short = [Path(path).name if Path(path).is_dir() else Path(path).name.split(".")[0] for path in paths]
    names = short if len(set(short)) == len(short) else list(paths)
    return {name: read_predictions(file) for name, file in zip(names, files.values(), strict=True)}
