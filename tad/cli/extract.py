"""``tad extract``."""

from __future__ import annotations

from typing import Any

import click

from tad.cli.common import PARTLY, as_json, device_option, fps_option, say, show, size_option


@click.command()
@click.argument("videos", nargs=-1, required=True)
@click.option("--store", required=True, help="Folder or URL of the feature store; made when absent.")
@click.option(
    "--format", type=click.Choice(["zarr", "hdf5"]), help="Format of a new store.  [default: by its name, else zarr]"
)
@click.option(
    "--backbone",
    "backbones",
    multiple=True,
    help="Network; repeatable. i3d = i3d-rgb and i3d-flow; frames and flow-frames are small uint8 frames themselves.",
)
@click.option(
    "--run",
    type=click.Path(exists=True, file_okay=False),
    help="Instead of --backbone: what this detector's run reads, with its own backbones if they were trained along.",
)
@click.option(
    "--weights",
    multiple=True,
    metavar="[BACKBONE=]FILE|NAME|random[:SEED]",
    help="Checkpoint or published name (tad weights ls), one a backbone in the same order, or named.",
)
@click.option(
    "--stream", "names", multiple=True, help="Name of the stream, one a backbone.  [default: the backbone's name]"
)
@click.option("--window", type=click.IntRange(1), help="Frames of a snippet.  [default: the backbone's]")
@click.option(
    "--interval",
    type=click.IntRange(1),
    help="Take every Nth frame of the grid into a snippet.  [default: the backbone's]",
)
@click.option("--stride", type=click.IntRange(1), help="Frames from one row to the next.  [default: the backbone's]")
@click.option(
    "--fps",
    callback=fps_option,
    metavar="FPS|native",
    help="Frame rate of the grid; native is each file's own.  [default: the backbone's]",
)
@click.option(
    "--short-side", type=click.IntRange(16), help="Scale frames to this short side.  [default: the backbone's]"
)
@click.option("--crop", callback=size_option, metavar="HxW|full", help="Centre crop.  [default: the backbone's]")
@click.option(
    "--interpolate-positions", is_flag=True, help="Let a transformer take another size or length than in its training."
)
@click.option("--flow", help="Optical flow for flow networks: dis, farneback.  [default: dis]")
@click.option(
    "--levels", is_flag=True, help="Store the last three stage outputs as well (s2, s4, s8; res3, res4, res5)."
)
@click.option(
    "--maps",
    callback=lambda ctx, param, value: tuple(name.strip() for name in value.split(",")) if value else (),
    metavar="LEVEL,...",
    help="Store these stage outputs with height and width, float16 (s4,s8 as s4-map, s8-map).",
)
@click.option("--port", help="Whose arithmetic, where ports of a network differ.  [default: the checkpoint's]")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True)
@device_option
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Windows a forward pass.")
@click.option(
    "--workers", type=click.IntRange(1), metavar="N", help="Divide the videos among N processes of this machine."
)
@click.option(
    "--scheduler", metavar="ADDRESS", help="Divide them among the workers of a dask cluster (tcp://host:8786)."
)
@click.option("--overwrite", is_flag=True, help="Extract again what the store already holds.")
@click.option(
    "--failures",
    type=click.Path(dir_okay=False),
    help="Where failing videos are listed.  [default: STORE/failures.jsonl]",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done: rows, bytes, what is there already.")
@as_json
@click.pass_context
def extract(ctx: click.Context, /, videos: tuple[str, ...], dry_run: bool, as_json: bool, **o: Any) -> None:
    """Extract features of VIDEOS (files, folders, .txt lists) into a store; what is there already is skipped.

    \b
    tad extract videos/ --store features.zarr --backbone i3d --weights rgb_imagenet.pt --weights flow_imagenet.pt
    tad extract v.mp4 --store features.zarr --backbone i3d-rgb --weights random --crop 256x320 --stride 4
    tad extract videos/ --store maps.zarr --backbone i3d-rgb --backbone frames --weights w.pt --fps 10 --maps s4,s8
    tad extract videos/ --store s3://bucket/features.zarr --backbone i3d-rgb --weights w.pt --scheduler tcp://host:8786
    tad extract videos/ --store trained.zarr --run runs/joint
    """
    from tad.extract import pipeline, report
    from tad.progress import progress

    same = ("window", "interval", "stride", "fps", "short_side", "crop", "flow", "levels", "maps", "precision", "port",
            "interpolate_positions")  # fmt: skip
    if o["run"] is None:
        if not o["backbones"]:
            raise click.UsageError("name a --backbone, or a --run whose features are extracted")
        recipes = report.recipes_of(o["backbones"], o["weights"], {key: o[key] for key in same})
        names = list(o["names"]) or None
    else:
        if given := [key for key in ("backbones", "weights", "names", *same) if _is_given(ctx, key)]:
            raise click.UsageError(f"--run says how its features are made: leave {', '.join(map(_flag, given))} out")
        from tad.apply import feature_recipes
        from tad.detect.runs import Run

        of_run = feature_recipes(Run.load(o["run"]), weights={})
        recipes, names = list(of_run.values()), list(of_run)
    common = {
        "store": o["store"],
        "recipes": recipes,
        "names": names,
        "format": o["format"],
        "overwrite": o["overwrite"],
        "device": o["device"],
        "workers": o["workers"],
        "scheduler": o["scheduler"],
    }
    if dry_run:
        plan = report.dry_run(videos, **common)
        show(plan) if as_json else click.echo("\n".join(report.dry_run_lines(plan)))
        return
    done = pipeline.extract(videos, **common, batch=o["batch"], failures=o["failures"], progress=progress)
    for line in report.failure_lines(done.failures):
        say(line)
    show(done.to_dict()) if as_json else click.echo("\n".join(report.report_lines(done)))
    if done.failures:
        ctx.exit(PARTLY)


def _is_given(ctx: click.Context, key: str) -> bool:
    return ctx.get_parameter_source(key) is not click.core.ParameterSource.DEFAULT


def _flag(key: str) -> str:
    """An option as it is typed."""
    return {"backbones": "--backbone", "names": "--stream"}.get(key, f"--{key.replace('_', '-')}")
