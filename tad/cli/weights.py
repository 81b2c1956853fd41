"""``tad weights …``."""

from __future__ import annotations

import click

from tad.cli.common import FAILED, PARTLY, as_json, print_table, say, show

folder_option = click.option(
    "--dir",
    "folder",
    type=click.Path(file_okay=False),
    help="Where files are kept.  [default: $TAD_WEIGHTS, else tad in torch.hub's folder]",
)


@click.group()
def weights() -> None:
    """List, explain, fetch and check published weights; any command takes their names where it takes a checkpoint.

    \b
    tad weights ls --backbone slowfast-r101
    tad weights fetch slowfast_r101_8x8_kinetics400
    tad extract videos/ --store S --backbone slowfast-r101 --weights slowfast_r101_8x8_kinetics400
    """


@weights.command("ls")
@click.option("--backbone", help="Only weights of this network.")
@folder_option
@as_json
def weights_ls(backbone: str | None, folder: str | None, as_json: bool) -> None:
    """List published weights: network, data, top-1 as their authors report it, licence, whether they are here."""
    from tad.extract.inventory import listing

    rows = listing(backbone=backbone, folder=folder)
    if as_json:
        show(rows)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title, right in (("name", 0), ("backbone", 0), ("data", 0), ("top-1", 1), ("licence", 0), ("here", 0)):
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(
            row["name"], row["backbone"], row["data"], "" if row["top1"] is None else f"{row['top1']:.2f}",
            row["licence"], "yes" if row["file"] else "" if row["urls"] else "by hand",
        )  # fmt: skip
    print_table(table)
    if restricted := [row["name"] for row in rows if row["noncommercial"]]:
        say(f"not for commercial use: {', '.join(restricted)}")


@weights.command("show")
@click.argument("name")
@folder_option
@as_json
def weights_show(name: str, folder: str | None, as_json: bool) -> None:
    """Show all that is known of the published weights NAME, and what the network is given with them."""
    from tad.extract.inventory import describe, description_lines

    found = describe(name, folder=folder)
    show(found) if as_json else click.echo("\n".join(description_lines(found)))


@weights.command("fetch")
@click.argument("names", nargs=-1, required=True, metavar="NAME|URL...")
@click.option(
    "--from", "source", type=click.Path(dir_okay=False), help="Take this file, got by hand, instead of downloading."
)
@folder_option
@as_json
@click.pass_context
def weights_fetch(
    ctx: click.Context, /, names: tuple[str, ...], source: str | None, folder: str | None, as_json: bool
) -> None:
    """Fetch published weights, one after the other; what is here already is only verified. Exit status 3 when some
    could not be had.
    """
    from tad.errors import TadError
    from tad.extract.fetch import fetch
    from tad.progress import progress

    if source is not None and len(names) > 1:
        raise click.UsageError("--from is one file: name one NAME with it")
    here: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name in dict.fromkeys(names):
        try:
            here[name] = str(fetch(name, folder=folder, source=source, progress=progress, say=say))
        except TadError as error:
            failed[name] = str(error)
            say(f"failed: {error}")
    if as_json:
        show({"files": here, "failures": failed})
    else:
        for name, file in here.items():
            click.echo(f"{name}: {file}")
    if failed:
        ctx.exit(PARTLY)


@weights.command("check")
@click.argument("items", nargs=-1, metavar="[NAME|FILE...]")
@folder_option
@as_json
@click.pass_context
def weights_check(ctx: click.Context, /, items: tuple[str, ...], folder: str | None, as_json: bool) -> None:
    """Check hashes, and that every tensor of a file lands in a network; without arguments all that is here. Exit
    status 1 when something is wrong.
    """
    from tad.extract.inventory import check, check_lines

    reports = check(items, folder=folder)
    if as_json:
        show(reports)
    else:
        for report in reports:
            click.echo("\n".join(check_lines(report)))
        if not reports:
            click.echo("no published weights are here yet: tad weights fetch NAME")
    if any(report["problem"] for report in reports):
        ctx.exit(FAILED)
