"""``tad fuse``."""

from __future__ import annotations

from typing import Any

import click

from tad.cli.common import as_json, check_predictions_file, say, show


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--weights", help="One weight a file, in their order, such as 1,1,0.5.  [default: all alike]")
@click.option("--search", is_flag=True, help="Look for the weights with the best average mAP on --annotations.")
@click.option("--annotations", type=click.Path(exists=True, dir_okay=False), help="Truth, for --search.")
@click.option("--subset", help="Subset of --annotations that is scored in a search.")
@click.option(
    "--scores", type=click.Path(exists=True, dir_okay=False), help="Class scores by video, instead of theirs."
)
@click.option(
    "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override suppression (sigma=0.4) or classes.top=3."
)
@click.option("--raw", "raw_out", type=click.Path(dir_okay=False), help="Also write the pooled raw detections.")
@click.option("-o", "--out", required=True, type=click.Path(dir_okay=False), help="predictions.json or .csv")
@as_json
def fuse(
    files: tuple[str, ...],
    weights: str | None,
    search: bool,
    annotations: str | None,
    subset: str | None,
    scores: str | None,
    sets: tuple[str, ...],
    raw_out: str | None,
    out: str,
    as_json: bool,
) -> None:
    """Detections of several runs together, from the FILES that tad detect wrote with --raw or --maps.

    Maps (bmn) are averaged before they are decoded, segments are pooled; suppression and classes are those of the first
    file unless --set says otherwise. Search weights on videos that no member was trained on.

    \b
    tad fuse a-maps.npz b-maps.npz --search --annotations A.json --subset validation -o found.json
    tad fuse a-raw.npz b-raw.npz --weights 1,0.5 -o found.json
    """
    from tad.annotations import read_truth, write_predictions
    from tad.detect.fuse import Ensemble, fuse, search_weights
    from tad.detect.raw import npz_path
    from tad.detect.recipes import changed_results
    from tad.detect.video_scores import read_scores

    if search != (annotations is not None) or (search and weights):
        raise click.UsageError("--search and --annotations belong together, and exclude --weights")
    if subset and not search:
        raise click.UsageError("--subset says what is scored in a --search; all videos of the files are fused")
    if not scores and any(item.startswith("classes.softmax") for item in sets):
        raise click.UsageError("classes.softmax makes probabilities of a file of logits: give it with --scores")
    check_predictions_file(out)
    if raw_out:
        npz_path(raw_out, name="--raw")
    given = numbers(weights) if weights else None
    ensemble = Ensemble.load(files)
    postprocess, classes = changed_results(ensemble.recipe, sets)
    how: dict[str, Any] = {"postprocess": postprocess, "classes": classes}
    if scores:
        how["scores"] = read_scores(scores, classes)
    trials = []
    if search and annotations is not None:
        truth = read_truth(annotations)
        trials = search_weights(ensemble, truth.subset(subset) if subset else truth, **how)
        given = list(trials[0].weights)
        for trial in trials[:5]:
            say(f"{trial.average_map:.4f}  {','.join(f'{w:g}' for w in trial.weights)}")
    found = fuse(files, weights=given, raw_out=raw_out, **how)
    write_predictions(out, found)
    final = given or [1.0] * len(files)
    result = {
        "predictions": out,
        "weights": final,
        "segments": len(found),
        "trials": [{"weights": list(t.weights), "average_map": t.average_map} for t in trials],
    }
    if as_json:
        show(result)
        return
    told = ",".join(f"{w:g}" for w in final)
    click.echo(f"{len(found)} segments in {found['video'].nunique()} videos, weights {told}: {out}")


def numbers(text: str) -> list[float]:
    """``1,0.5`` as numbers."""
    try:
        return [float(value) for value in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--weights {text}: expected numbers separated by commas, such as 1,1,0.5") from None
