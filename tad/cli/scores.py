"""``tad evaluate`` and ``tad demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tad.cli.common import as_json, device_option, print_table, say, show


@click.command()
@click.option("--annotations", required=True, type=click.Path(exists=True, dir_okay=False), help="Truth.")
@click.option("--subset", help="Subset that is scored.  [default: the protocol's, else all that have truth]")
@click.option("--protocol", help="thumos14-213/212/211/210, anet-1.3, hacs: subset, tIoUs and what is left out.")
@click.option(
    "--tiou", help="tIoU thresholds, separated by commas.  [default: the protocol's, else 0.3,0.4,0.5,0.6,0.7]"
)
@click.option("--predictions", type=click.Path(exists=True, dir_okay=False), help="ActivityNet results JSON or CSV.")
@click.option(
    "--run", type=click.Path(exists=True, file_okay=False), help="Detect with this run first (needs --store)."
)
@click.option("--store", help="Feature store for --run.")
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
    """Score detections against the truth: mAP per tIoU, with the videos and segments that it counts.

    \b
    tad evaluate --annotations A.json --subset validation --predictions found.json -o metrics.json
    """
    from tad.annotations import read_predictions, read_truth
    from tad.evaluate import evaluate as score
    from tad.evaluate import table

    try:
        thresholds = tuple(float(value) for value in tiou.split(",")) if tiou else None
    except ValueError:
        raise click.UsageError(f"--tiou {tiou}: expected numbers separated by commas, such as 0.3,0.5,0.7") from None
    truth = read_truth(annotations)
    if o["predictions"]:
        predictions = read_predictions(o["predictions"])
    elif o["run"] and o["store"]:
        from tad.detect import detect as from_store

        chosen = subset or score_subset(protocol)
        predictions = from_store(run=o["run"], store=o["store"], subset=chosen, annotations=truth, device=o["device"])
    else:
        raise click.UsageError("give --predictions FILE, or --run RUN with --store S")
    result = score(truth, predictions, protocol=protocol, subset=subset, tiou=thresholds)
    data = result.to_dict()
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")
    for note in result.notes:
        say(f"note: {note}")
    if as_json:
        show(data)
    else:
        print_table(table(result))


def score_subset(protocol: str | None) -> str | None:
    """The subset that a protocol scores."""
    from tad.evaluate import PROTOCOLS

    return PROTOCOLS[protocol].subset if protocol in PROTOCOLS else None


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
