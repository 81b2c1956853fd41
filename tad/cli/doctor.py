"""``tad doctor``."""

from __future__ import annotations

import dataclasses
import os

import click

from tad.cli.common import FAILED, as_json, show

MARKS = {"ok": ("ok", "green"), "note": ("note", "blue"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}


@click.command()
@click.option("--store", help="Feature store to look at.")
@click.option("--annotations", type=click.Path(), help="Truth to look at, and to compare with the others.")
@click.option("--run", type=click.Path(), help="Run folder to look at.")
@click.option("--videos", type=click.Path(), help="Videos (file, folder or .txt list) to look at.")
@as_json
@click.pass_context
def doctor(ctx: click.Context, as_json: bool, **given: str | None) -> None:
    """Check the machine, and truth, features, run and videos, before anything expensive starts.

    \b
    tad doctor
    tad doctor --annotations truth.json --store features.zarr
    """
    from tad.doctor import doctor as look
    from tad.progress import progress

    checks = look(**given, progress=progress)
    failed = sum(check.status == "fail" for check in checks)
    if as_json:
        show({"ok": not failed, "checks": [dataclasses.asdict(check) for check in checks]})
    else:
        color = None if not os.environ.get("NO_COLOR") else False
        for check in checks:
            mark, paint = MARKS[check.status]
            click.secho(f"{mark:>4} ", fg=paint, nl=False, color=color)
            click.echo(
                f" {check.group}: {check.name}: {check.message}" + (f" → {check.advice}" if check.advice else "")
            )
        warned = sum(check.status == "warn" for check in checks)
        click.echo(f"{len(checks)} checks, {failed} failed, {warned} warnings")
    if failed:
        ctx.exit(FAILED)
