"""What all commands share: printing, errors as exit statuses, options."""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import click

from tad.errors import TadError

FAILED, PARTLY, INTERRUPTED = 1, 3, 130


class TadGroup(click.Group):
    """Turns tad's own errors into one line and an exit status; ``-v`` shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TadError as error:
            if ctx.find_root().params.get("verbose"):
                traceback.print_exc()
            say(f"tad: error: {error}")
            ctx.exit(FAILED)
        except KeyboardInterrupt:
            say("\ntad: interrupted; what is complete is kept. Run the same again to go on (training: with --resume).")
            ctx.exit(INTERRUPTED)


def say(text: str) -> None:
    """A line for people, on stderr."""
    click.echo(text, err=True)


def show(data: Any) -> None:
    """JSON on stdout."""
    tell(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def tell(text: str) -> None:
    """A result on stdout; of processes that ``torchrun`` started together the first one's."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(text)


def show_training(metrics: dict[str, Any], *, out: str, as_json: bool) -> int:
    """What a detector's training came to; returns the exit status, ``PARTLY`` where videos were left out.

    Under ``torchrun`` that is 0: it takes every other status for a crash.
    """
    from tad.detect.train import left_out, outcome

    show(metrics) if as_json else tell(f"{out}: {outcome(metrics)}")
    together = os.environ.get("WORLD_SIZE", "1") != "1"
    return PARTLY if left_out(metrics) and not together else 0


def print_table(table: Any) -> None:
    """A rich table on stdout, plain where that is no terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(table)


def check_predictions_file(out: str | None) -> None:
    """Say before hours of work that they could not be written."""
    if out is not None and not out.lower().endswith((".json", ".csv")):
        raise click.UsageError(f"-o {out}: predictions are written as .json or .csv")


def size_option(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | str | None:
    """``224x224`` (height x width), ``224`` or ``full``."""
    if value is None or value == "full":
        return value
    parts = value.lower().split("x")
    if not 1 <= len(parts) <= 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"'{value}' is not HEIGHTxWIDTH such as 224x224 or 256x320, nor 'full'")
    return int(parts[0]), int(parts[-1])


def fps_option(_: click.Context, __: click.Parameter, value: str | None) -> float | str | None:
    """Frames a second, or ``native``."""
    if value is None or value == "native":
        return value
    try:
        fps = float(value)
    except ValueError:
        fps = 0.0
    if not 0 < fps < float("inf"):
        raise click.BadParameter(f"'{value}' is no frame rate above 0 such as 25, nor 'native'")
    return fps


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout and nothing else there.")
device_option = click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda when there is one]")
sets_option = click.option(
    "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override one value of the recipe, e.g. train.epochs=10."
)
