"""``tad recipe``: the recipes that come with tad, filled in and checked."""

from __future__ import annotations

import dataclasses

import click

from tad.cli.common import FAILED, as_json, device_option, print_table, say, sets_option, show


@click.group()
def recipe() -> None:
    """Recipes of detectors: list those that come with tad, show one in full, check one against a store.

    \b
    tad recipe ls --detector bmn
    tad recipe show bmn/hacs-table3-5-csn --set train.epochs=5 > mine.yaml
    tad recipe check mine.yaml --store S --annotations A.json
    """


@recipe.command("ls")
@click.option("--detector", help="Only those of this detector.")
@as_json
def recipe_ls(detector: str | None, as_json: bool) -> None:
    """List the recipes that come with tad: the rows of the papers' tables."""
    from tad.shipped import shipped_recipes

    recipes = shipped_recipes(detector)
    if as_json:
        show([{**dataclasses.asdict(r), "path": str(r.path)} for r in recipes])
        return
    from rich.table import Table

    table = Table("name", "detector", "streams", "about", box=None)
    table.columns[0].no_wrap = True
    for known in recipes:
        table.add_row(known.name, known.detector, ", ".join(known.streams), known.about)
    print_table(table)


@recipe.command("show")
@click.argument("name")
@click.option("--streams", help="Streams in place of the recipe's, separated by commas.")
@sets_option
@click.option("--seed", type=int, help="Seed of everything random.")
def recipe_show(name: str, streams: str | None, sets: tuple[str, ...], seed: int | None) -> None:
    """Print a recipe as YAML with every default in it, for --recipe. NAME is one of 'tad recipe ls', or a file."""
    from tad.detect.recipe_check import full_recipe
    from tad.detect.recipes import detect_recipe
    from tad.recipe import dump_yaml
    from tad.shipped import find_recipe

    given = streams.split(",") if streams else None
    chosen = detect_recipe(file=find_recipe(name), streams=given, sets=sets, seed=seed)
    click.echo(dump_yaml(full_recipe(chosen)), nl=False)


@recipe.command("check")
@click.argument("name")
@click.option("--store", required=True, help="Feature store to train on.")
@click.option("--annotations", required=True, type=click.Path(dir_okay=False), help="Truth to train on.")
@click.option("--streams", help="Streams in place of the recipe's, separated by commas.")
@sets_option
@click.option("--quick", is_flag=True, help="Do not read the features: annotations and metadata only.")
@device_option
@as_json
@click.pass_context
def recipe_check(
    ctx: click.Context,
    name: str,
    store: str,
    annotations: str,
    streams: str | None,
    sets: tuple[str, ...],
    quick: bool,
    device: str | None,
    as_json: bool,
) -> None:
    """Say all that would stop a training, without training. NAME is one of 'tad recipe ls', or a file.

    Streams, the detector's options, videos with features, classes, windows; of a recipe with a section 'joint' its
    frames, mode and backbones. Exit status 1 when something is wrong.
    """
    from tad.detect.recipe_check import check_recipe
    from tad.detect.recipes import detect_recipe
    from tad.progress import progress
    from tad.shipped import find_recipe

    given = streams.split(",") if streams else None
    chosen = detect_recipe(file=find_recipe(name), streams=given, sets=sets)
    check = check_recipe(chosen, store=store, annotations=annotations, read=not quick, device=device, progress=progress)
    if chosen.joint is not None:
        from tad.joint.check import check_joint_recipe

        check_joint_recipe(check, chosen, store=store, annotations=annotations, read=not quick)
    if as_json:
        show({"ok": not check.problems, **dataclasses.asdict(check)})
    else:
        for note in check.notes:
            click.echo(note)
        if check.counts:
            click.echo(", ".join(f"{key} {count}" for key, count in check.counts.items()))
        for problem in check.problems:
            say(f"problem: {problem}")
        click.echo(f"{len(check.problems)} problems" if check.problems else "nothing stops this training")
    if check.problems:
        ctx.exit(FAILED)
