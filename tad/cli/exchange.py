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
@click.option("--subset", help="Only the videos of this subset.")
@click.option(
    "--annotations",
    type=click.Path(exists=True, dir_okay=False),
    help="Truth that knows the videos' subsets, durations and frame rates.",
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
    from tad.annotations import read_truth
    from tad.exchange import Collection, read_collection, write_collection

    collection = read_collection(source, format=from_, fps=o["fps"])
    for note in collection.notes:
        say(f"note: {note}")
    if o["annotations"]:
        known = read_truth(o["annotations"]).videos
        ids = collection.videos["video"]
        known = known[known["video"].isin(ids)]
        collection = Collection.of(collection.segments, known if len(known) else collection.videos)
    collection = collection.select(subset=o["subset"], min_score=o["min_score"], max_segments=o["max_segments"])
    files = write_collection(collection, out, format=to, fps=o["fps"], subset=o["new_subset"], media=o["media"])
    done = {"videos": len(collection.videos), "segments": len(collection.segments), "files": [str(f) for f in files]}
    if as_json:
        show(done)
    else:
        click.echo(f"{done['segments']} segments of {done['videos']} videos written to {out}")
