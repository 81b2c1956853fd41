"""``tad evaluate`` and ``tad demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tad.cli.common import PARTLY, as_json, device_option, print_table, say, show

SHOWN = 5  # videos that a note on failures names
ASK = "and detections with labels are scored by mAP: ask for AR@AN with --proposals"

annotations_option = click.option(
    "--annotations", required=True, type=click.Path(exists=True, dir_okay=False), help="Truth."
)
subset_option = click.option("--subset", help="Subset that is scored.  [default: the protocol's, else the only one]")
protocol_option = click.option(
    "--protocol", help="thumos14-213/212/211/210, anet-1.3[-opentad|-afsd|-mmaction2], hacs: what is scored, and how."
)
tiou_option = click.option(
    "--tiou", help="tIoU thresholds, separated by commas.  [default: the protocol's, else 0.3,0.4,0.5,0.6,0.7]"
)


@click.command()
@annotations_option
@subset_option
@protocol_option
@tiou_option
@click.option("--predictions", type=click.Path(exists=True, dir_okay=False), help="ActivityNet results JSON or CSV.")
@click.option(
    "--run", type=click.Path(exists=True, file_okay=False), help="Detect with this run first (needs --store)."
)
@click.option("--store", help="Feature store for --run.")
@click.option("--proposals", is_flag=True, help="Score AR@AN and AUC, also where the predictions have labels.")
@click.option("--max-avg", type=float, help="Last number of proposals a video, for AR@AN.  [default: 100]")
@click.option(
    "--classification", type=click.Path(exists=True, dir_okay=False), help="Score a classifier: its scores by video."
)
@click.option("--bootstrap", type=int, metavar="N", help="Intervals of mAP from N samples of the videos, such as 1000.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap.")
@device_option
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="metrics.json")
@as_json
def evaluate(
    annotations: str,
    subset: str | None,
    protocol: str | None,
    tiou: str | None,
    out: str | None,
    as_json: bool,
    **o: Any,
) -> None:
    """Score against the truth: detections (mAP), proposals (AR@AN, AUC), or a classifier (top-1, top-5, mAP).

    Predictions without labels are proposals.

    \b
    tad evaluate --annotations A.json --subset validation --predictions found.json -o metrics.json
    tad evaluate --annotations A.json --subset validation --predictions found.json --bootstrap 1000
    tad evaluate --annotations A.json --subset validation --classification scores.json
    """
    from tad.annotations import read_predictions, read_truth, read_video_scores
    from tad.evaluate import bootstrap_map, classification_scores, evaluate_recall, scope, table
    from tad.evaluate import evaluate as score
    from tad.evaluate.bootstrap import check_sampling, interval_table
    from tad.evaluate.classification import classification_table
    from tad.evaluate.proposals import recall_table

    check_options(o, tiou)
    levels = thresholds_of(tiou)
    max_avg = 100.0 if o["max_avg"] is None else o["max_avg"]
    truth = read_truth(annotations)
    part = scope(truth, protocol, subset, levels)
    if o["bootstrap"] is not None:
        check_sampling(o["bootstrap"], 0.95, o["seed"])
    grids: list[Any]
    failures: list[Any] = []
    unlabelled = None  # the same proposals without the classes of whole videos, of a class-agnostic run
    if o["classification"]:
        other = set(truth.videos["video"]) - set(part.truth.videos["video"])  # of other subsets: no false positives
        leave_out = [*part.options["leave_out"], *other]
        accuracy = classification_scores(part.truth, read_video_scores(o["classification"]), leave_out=leave_out)
        data, notes = {**accuracy.to_dict(), "protocol": protocol}, (*part.notes, *accuracy.notes)
        grids = [classification_table(accuracy)]
    else:
        if o["predictions"]:
            predictions = read_predictions(o["predictions"])
        else:
            # Scored once with nothing found: what scoring refuses, it refuses before hours of detection.
            if o["proposals"]:
                evaluate_recall(truth, no_predictions(), protocol, subset, levels, max_avg=max_avg)
            else:
                score(truth, no_predictions(), protocol=protocol, subset=subset, tiou=levels)
            predictions, unlabelled, failures = detected(o, part)
        if o["proposals"] or "label" not in predictions.columns:
            if o["bootstrap"] is not None:
                raise click.UsageError("--bootstrap gives intervals of mAP; these are proposals, without labels")
            found = evaluate_recall(truth, predictions, protocol, subset, levels, max_avg=max_avg)
            data, notes, grids = found.to_dict(), found.notes, [recall_table(found)]
        else:
            if o["max_avg"] is not None:
                raise click.UsageError(f"--max-avg is of AR@AN, {ASK}")
            result = score(truth, predictions, protocol=protocol, subset=subset, tiou=levels)
            data, notes, grids = result.to_dict(), result.notes, [table(result)]
            if unlabelled is not None:
                one = score(one_class(truth), unlabelled, protocol=protocol, subset=subset, tiou=levels)
                data["without_classes"] = {key: value for key, value in one.to_dict().items() if key != "ap"}
                notes = (*notes, f"as proposals, without classes: average mAP {100 * one.average:.2f}")
            if o["bootstrap"] is not None:
                spread = bootstrap_map(
                    part.truth, predictions, part.tiou, samples=o["bootstrap"], seed=o["seed"], **part.options
                )
                data["intervals"] = spread.to_dict()
                grids.append(interval_table(spread))
        if failures:
            missed = missed_note(failures)
            data["notes"], notes = [*data["notes"], missed], (*notes, missed)
    write_result(out, data)
    for failure in failures:
        say(f"failed: {failure}")
    for note in notes:
        say(f"note: {note}")
    if as_json:
        show(data)
    else:
        for grid in grids:
            print_table(grid)
    if failures:
        click.get_current_context().exit(PARTLY)


def check_options(o: dict[str, Any], tiou: str | None) -> None:
    """Refuse options that do not go together, rather than pass over some of them."""
    if sum(bool(o[name]) for name in ("predictions", "run", "classification")) != 1 or bool(o["run"]) != bool(
        o["store"]
    ):
        raise click.UsageError("give one of --predictions FILE, --run RUN with --store S, and --classification FILE")
    if o["classification"]:
        given = {"--tiou": tiou, "--proposals": o["proposals"] or None}
        given |= {"--bootstrap": o["bootstrap"], "--max-avg": o["max_avg"]}
        if unused := [name for name, value in given.items() if value is not None]:
            raise click.UsageError(f"{', '.join(unused)}: of detections or proposals; --classification takes none")
    if o["run"] and o["max_avg"] is not None and not o["proposals"]:
        raise click.UsageError(f"--max-avg is of AR@AN, {ASK}")
    if o["proposals"] and o["bootstrap"] is not None:
        raise click.UsageError("--bootstrap gives intervals of mAP; with --proposals there is none")


def no_predictions() -> Any:
    """An empty table of predictions."""
    import pandas as pd

    names = ["video", "start_s", "end_s", "label", "score"]
    return pd.DataFrame([], columns=names).astype({"start_s": float, "end_s": float, "score": float})


def detected(o: dict[str, Any], part: Any) -> tuple[Any, Any, list[Any]]:
    """Detections of a run in the videos that are scored, and no others; where their classes are those of whole videos,
    its proposals as one class; and which videos failed."""
    import tempfile
    from pathlib import Path

    from tad.detect import Run, detect
    from tad.detect.infer import detections
    from tad.detect.raw import load_raw

    run = Run.load(o["run"])
    left_out = set(part.options["leave_out"])
    videos = [video for video in part.truth.videos["video"].tolist() if video not in left_out]
    failures: list[Any] = []
    same = {"run": run, "store": o["store"], "videos": videos, "device": o["device"], "failures": failures}
    if not run.class_agnostic:
        return detect(**same), None, failures
    if o["proposals"]:
        return detect(**same, proposals=True), None, failures
    with tempfile.TemporaryDirectory(prefix="tad-") as folder:
        raw_out = Path(folder) / "raw.npz"
        predictions = detect(**same, raw_out=raw_out)
        raw = load_raw(raw_out)
    raw.class_scores = None
    return predictions, detections(raw)[0].assign(label="action"), failures


def missed_note(failures: list[Any]) -> str:
    """One sentence on the videos that failed."""
    videos = {failure.video: failure for failure in failures}
    named = "; ".join(str(failure) for failure in list(videos.values())[:SHOWN])
    more = f"; and {len(videos) - SHOWN} more" if len(videos) > SHOWN else ""
    return f"{len(videos)} videos failed, and what is true in them counts as missed: {named}{more}"


def one_class(truth: Any) -> Any:
    """The truth with all actions of one class."""
    from dataclasses import replace

    from tad.detect.holdout import one_class

    return replace(truth, segments=one_class(truth.segments))


def thresholds_of(tiou: str | None) -> tuple[float, ...] | None:
    """``0.3,0.5`` as numbers."""
    try:
        return tuple(float(value) for value in tiou.split(",")) if tiou else None
    except ValueError:
        raise click.UsageError(f"--tiou {tiou}: expected numbers separated by commas, such as 0.3,0.5,0.7") from None


def write_result(out: str | None, data: Any) -> None:
    """JSON into a file, whole or not at all; nothing without a path."""
    if out is None:
        return
    from tad.annotations._files import write_atomically

    write_atomically(out, iter([json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)]))


@click.command()
@click.option(
    "--out",
    default="tad-demo",
    show_default=True,
    type=click.Path(file_okay=False),
    help="Folder for everything that it makes.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--fresh", is_flag=True, help="Start over instead of going on with what is there.")
@as_json
def demo(out: str, seed: int, fresh: bool, as_json: bool) -> None:
    """The whole path on synthetic videos: make, train a backbone, extract, train TAL-Net, detect, evaluate."""
    from tad.demo import run_demo

    metrics = run_demo(Path(out), seed=seed, fresh=fresh, quiet=as_json)
    if as_json:
        show(metrics)
