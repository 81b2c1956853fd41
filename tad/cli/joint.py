"""``tad train-joint``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tad.cli.common import as_json, device_option, sets_option, show_training

if TYPE_CHECKING:
    from tad.recipe import DetectRecipe

MODES = ("egs", "full", "bank", "pre-extracted")
SAMPLERS = ("random", "grid", "block", "fps", "dpp")


@click.command("train-joint")
@click.argument("name", required=False)
@click.option("--recipe", help="Recipe file, or the name of a shipped one (tad recipe ls).")
@click.option("--store", required=True, help="Feature store of the starting backbones, with the frames.")
@click.option("--streams", help="Streams, separated by commas; order matters (RGB, then flow).")
@click.option(
    "--annotations",
    required=True,
    type=click.Path(exists=True, dir_okay=False),
    help="Truth: ActivityNet JSON, THUMOS14 CSV or plain CSV.",
)
@click.option("--mode", type=click.Choice(MODES), help="Which snippets gradients go through.  [default: egs]")
@click.option("--ratio", type=click.FloatRange(0, 1), help="That part of them, for egs and bank.  [default: 0.3]")
@click.option("--sampler", type=click.Choice(SAMPLERS), help="How that part is drawn.  [default: random]")
@click.option(
    "--backbone-lr", type=click.FloatRange(0), help="Learning rate of the backbones; 0: they stay.  [default: 1e-6]"
)
@click.option(
    "--videos",
    type=click.Path(exists=True),
    help="Decode this file, folder or list of videos; the store needs no frames then.",
)
@click.option(
    "--memory", metavar="SIZE", help="Take what fits into this much, e.g. 8GiB: full, else a smaller ratio, ...."
)
@sets_option
@click.option("--seed", type=int, help="Seed of everything random.")
@device_option
@click.option("--resume", is_flag=True, help="Go on where the run in -o stopped.")
@click.option("--overwrite", is_flag=True, help="Replace the run in -o.")
@click.option("-o", "--out", required=True, type=click.Path(file_okay=False), help="The run's folder.")
@as_json
@click.pass_context
def train_joint(
    ctx: click.Context,
    name: str | None,
    recipe: str | None,
    streams: str | None,
    memory: str | None,
    sets: tuple[str, ...],
    seed: int | None,
    as_json: bool,
    **o: Any,
) -> None:
    """Train detector NAME (or the one of --recipe) together with the backbones whose features it reads: their rows are
    computed anew from frames, and the detector's loss reaches into them.

    \b
    tad extract videos/ --store S --backbone tiny --weights W --stride 8 --fps 12.5
    tad train-joint talnet --store S --streams tiny --annotations A.json --videos videos/ -o runs/joint
    tad detect talk.mp4 --run runs/joint -o found.json
    """
    from tad.detect.recipes import detect_recipe
    from tad.joint import train_joint as run
    from tad.progress import progress
    from tad.shipped import find_recipe

    memory_bytes = None
    if memory is not None:
        from tad.joint.memory import parse_bytes

        memory_bytes = parse_bytes(memory)
    given = {key: o.pop(key) for key in ("mode", "ratio", "sampler", "backbone_lr", "videos")}
    chosen = detect_recipe(
        name,
        file=find_recipe(recipe) if recipe else None,
        streams=streams.split(",") if streams else None,
        sets=sets,
        seed=seed,
    )
    metrics = run(with_joint(chosen, given), memory_bytes=memory_bytes, progress=progress, **o)
    ctx.exit(show_training(metrics, out=o["out"], as_json=as_json))


def with_joint(recipe: DetectRecipe, given: dict[str, Any]) -> DetectRecipe:
    """``recipe`` with what flags say of its section ``joint``, which one that has none gets with its defaults."""
    from tad.recipe import DetectRecipe, validated

    data = recipe.model_dump(mode="json")
    said = {key: value for key, value in given.items() if value is not None}
    data["joint"] = {**(data["joint"] or {}), **said}
    return validated(DetectRecipe, data, where="tad train-joint")
