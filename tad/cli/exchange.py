"""``tad convert``."""

from __future__ import annotations

from typing import Any

import click

from tad.cli.common import as_json, say, show

FORMATS = ("activitynet", "csv", "fiftyone", "via", "elan", "labelstudio", "srt", "webvtt")


@click.command()
@click.argument("source", type=click.Path(exists=True))
@click.option("--to", required=True, type=click.Choice(FORMATS), help="Format to write.")
@click.option("--from", "from_", type=click.Choice(FORMATS), help="Format of SOURCE.  [default: by its content]")
@click.option("-o", "--out", required=True, type=click.Path(), help="File, or folder for a file a video.")
@click.option("--overwrite", is_flag=True, help="Replace OUT; in a folder all files of the format's suffix.")
@click.option("--dry-run", is_flag=True, help="Say what would be written and removed, and touch nothing.")
@click.option("--subset", help="Only the videos of this subset.")
@click.option(
    "--annotations",
    type=click.Path(exists=True, dir_okay=False),
    help="Truth that knows the subsets, durations and frame rates which SOURCE does not say.",
)
@click.option("--fps", type=click.FloatRange(0, min_open=True), help="Frame rate of videos whose own is not known.")
@click.option("--new-subset", metavar="NAME", help="Subset of videos that have none, for ActivityNet's layout.")
@click.option("--min-score", type=float, help="Leave out predictions below this score.")
@click.option("--max-segments", type=click.IntRange(1), help="Keep the best predictions of each video, at most.")
@click.option("--media", default="{video}.mp4", show_default=True, help="How a video's file is called.")
@as_json
def convert(source: str, to: str, from_: str | None, out: str, as_json: bool, **o: Any) -> None:
    """Convert truth or predictions to and from other tools' files: FiftyOne, VIA 3, ELAN, Label Studio, SRT, WebVTT.

    \b
    tad convert found.json --to webvtt -o subtitles/ --min-score 0.3
    tad convert project.json --to activitynet --new-subset validation -o truth.json
    """
    import os
    from pathlib import Path

    from tad.annotations import read_truth
    from tad.errors import AnnotationError
    from tad.exchange import plan_collection, read_collection

    inputs = [Path(source)]
    known = None
    if os.path.realpath(out) == os.path.realpath(source):
        raise AnnotationError(f"{out} is read from; name another file or folder to write")
    if o["annotations"]:
        inputs.append(Path(o["annotations"]))
        known = read_truth(o["annotations"], beyond_end="keep", keep_ambiguous=True)
    collection = read_collection(source, format=from_, fps=o["fps"], videos=known)
    for note in collection.notes:
        say(f"note: {note}")
    if known is not None and not set(collection.videos["video"]) & set(known.videos["video"]):
        say(f"note: {o['annotations']} lists none of the videos of {source}")
    collection = collection.select(subset=o["subset"], min_score=o["min_score"], max_segments=o["max_segments"])
    plan = plan_collection(
        collection, out, format=to, fps=o["fps"], subset=o["new_subset"], media=o["media"], overwrite=o["overwrite"]
    )
    plan.keep(*inputs)
    bare = len(collection.videos) - collection.segments["video"].nunique()
    if to == "csv" and bare:
        say(f"note: CSV has no place for a video without a segment: {bare} videos left out")
    if not o["dry_run"]:
        plan.write()
    done = {
        "kind": "predictions" if collection.scored else "truth",
        "videos": len(collection.videos),
        "segments": len(collection.segments),
        "files": [str(file) for file in plan.texts],
        "removed": [str(file) for file in plan.stale],
        "dry_run": o["dry_run"],
    }
    if as_json:
        show(done)
        return
    would = "would be " if o["dry_run"] else ""
    click.echo(f"{done['segments']} segments of {done['videos']} videos {would}written to {out}")
    if o["dry_run"]:
        for file in plan.texts:
            click.echo(f"write   {file}")
    for file in plan.stale:
        click.echo(f"{'remove ' if o['dry_run'] else 'removed'} {file}")
