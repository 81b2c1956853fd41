"""``tad store …``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tad.cli.common import PARTLY, as_json, say, show


@click.group()
def store() -> None:
    """Look into, check, clean and fill feature stores."""


@store.command("ls")
@click.argument("path")
@click.option("--stream", help="Only this stream.")
@as_json
def store_ls(path: str, stream: str | None, as_json: bool) -> None:
    """List the entries of the store at PATH: stream, video, level, shape (rows first), type, seconds."""
    from tad.store import open_store

    with open_store(path) as opened:
        if stream is not None:
            opened.stream_attrs(stream)  # an unknown one is an error
        table = opened.catalog()
    if stream is not None:
        table = table[table["stream"] == stream]
    columns = ["stream", "video", "level", "shape", "dtype", "scale_s", "duration_s"]
    if as_json:
        entries = table.to_dict("records")  # numbers as they are; where there is none, pandas has NaN
        show([{name: None if value != value else value for name, value in entry.items()} for entry in entries])
    else:
        click.echo(table[columns].to_string(index=False) if len(table) else "the store holds no entry")


@store.command("info")
@click.argument("path")
@click.option("--stream", help="Only this stream.")
@click.option("--video", help="The attributes of one entry (with --stream).")
def store_info(path: str, stream: str | None, video: str | None) -> None:
    """Show how the streams of the store at PATH were made, or everything about one entry, as JSON."""
    from tad.store import open_store

    if video is not None and stream is None:
        raise click.UsageError("--video needs --stream")
    with open_store(path) as opened:
        if video is not None and stream is not None:
            show(opened.attrs(stream, video))
            return
        names = [stream] if stream is not None else opened.streams()
        streams = {name: {"videos": len(opened.videos(name)), **opened.stream_attrs(name)} for name in names}
        show({"path": opened.path, "format": opened.format, "streams": streams})


@store.command("verify")
@click.argument("path")
@click.option("--deep", is_flag=True, help="Decode every chunk and compare the hashes.")
@as_json
@click.pass_context
def store_verify(ctx: click.Context, /, path: str, deep: bool, as_json: bool) -> None:
    """Check that every entry of the store at PATH is whole; exit status 3 when one is damaged."""
    from tad.store import open_store

    with open_store(path) as opened:
        report = opened.verify(deep=deep)
    if as_json:
        show(report.to_dict())
    else:
        for problem in report.problems:
            click.echo(f"damaged: {problem}")
        click.echo(f"{report.checked} entries checked{' deeply' if deep else ''}, {len(report.problems)} problems")
    if not report.ok:
        ctx.exit(PARTLY)


@store.command("gc")
@click.argument("path")
@click.option(
    "--min-age",
    "min_age_s",
    type=float,
    default=3600.0,
    show_default=True,
    help="Seconds that leftovers must be old, so that living writers are left alone.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def store_gc(path: str, min_age_s: float, dry_run: bool) -> None:
    """Remove what killed writers left behind in the store at PATH; entries are never touched."""
    from tad.store import open_store

    open_store(path).close()  # a mistyped path is an error, not a new store
    with open_store(path, "a") as opened:
        removed = opened.gc(dry_run=dry_run, min_age_s=min_age_s)
    for name in removed:
        click.echo(name)
    say(f"{len(removed)} leftovers {'would be' if dry_run else 'were'} removed")


@store.command("index")
@click.argument("path")
def store_index(path: str) -> None:
    """Write catalog.csv (and store.h5) of the store at PATH anew from its entries."""
    from tad.store import open_store

    open_store(path).close()
    with open_store(path, "a") as opened:
        opened.write_catalog()
        click.echo(f"{len(opened.catalog())} arrays listed")


@store.command("import")
@click.argument("folder")
@click.option("--store", "path", required=True, help="Folder or URL of the feature store; made when absent.")
@click.option("--format", type=click.Choice(["zarr", "hdf5"]), help="Format of a new store.")
@click.option("--stream", required=True, help="Name of the stream.")
@click.option("--fps", type=float, help="Frame rate that --window and --stride count.")
@click.option("--window", type=float, help="Frames behind one row.")
@click.option("--stride", type=float, help="Frames from one row to the next.")
@click.option("--offset", type=float, default=0.0, show_default=True, help="First frame of row 0.")
@click.option(
    "--layout", type=click.Choice(["TC", "CT"]), help="Rows x channels or channels x rows, where it is ambiguous."
)
@click.option("--rescaled", is_flag=True, help="Rows divide the video evenly; needs --annotations for the durations.")
@click.option(
    "--annotations", type=click.Path(exists=True, dir_okay=False), help="Truth file that knows the durations."
)
@click.option("--prefix", default="", help="Taken off the file names, e.g. v_.")
@click.option("--suffix", default="", help="Taken off the file names.")
@click.option("--allow-pickle", is_flag=True, help="Read .pkl files; pickles can run code.")
@click.option("--overwrite", is_flag=True, help="Replace entries that are there.")
@as_json
@click.pass_context
def store_import(
    ctx: click.Context, /, folder: str, path: str, stream: str, annotations: str | None, as_json: bool, **o: Any
) -> None:
    """Bring features made elsewhere (.npy, .npz, .csv, .pt, .h5) into a store, with their time axis.

    \b
    tad store import thumos_i3d/ --store S --stream i3d --fps 30 --window 16 --stride 4

    What `tad store export` wrote has an index.json, which tells ids, time axes and durations: --fps, --window and
    --stride may be left out.
    """
    from tad.store import import_features, open_store
    from tad.store.export_index import INDEX
    from tad.store.feature_files import find_files

    lacking = [f"--{name}" for name in ("fps", "window", "stride") if o[name] is None]
    indexed = len(lacking) == 3 and (Path(folder) / INDEX).is_file()
    if lacking and not o["rescaled"] and not indexed:
        raise click.UsageError(
            f"give {', '.join(lacking)}: the time axis of features is not in their files (or --rescaled)"
        )
    durations = None
    if annotations is not None:
        from tad.annotations import read_videos

        videos = read_videos(annotations).dropna(subset=["duration_s"])
        durations = dict(zip(videos["video"], videos["duration_s"].astype(float), strict=True))
    find_files(Path(folder))  # a mistyped folder is an error, and makes no store
    with open_store(path, "a", format=o.pop("format")) as opened:
        report = import_features(folder, opened, stream, durations=durations, **o)
        opened.write_catalog()
    for warning in report.warnings:
        say(f"warning: {warning}")
    for file, why in report.skipped:
        say(f"skipped {file}: {why}")
    if as_json:
        show(report.to_dict())
    else:
        click.echo(
            f"{len(report.written)} entries written, {len(report.already)} already there, {len(report.skipped)} skipped"
        )
    if report.skipped:
        ctx.exit(PARTLY)


@store.command("pack")
@click.argument("path")
@click.option("--zip", "folder", type=click.Path(file_okay=False), help="Folder for one .zarr.zip a stream (Zarr).")
@click.option("--h5", "file", type=click.Path(dir_okay=False), help="One file for all streams (HDF5).")
@click.option("--stream", "streams", multiple=True, help="Only this stream; repeatable.")
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
def store_pack(path: str, folder: str | None, file: str | None, streams: tuple[str, ...], overwrite: bool) -> None:
    """Pack the store at PATH into few large files, for handing on; zarr or h5py read them.

    \b
    tad store pack features.zarr --zip packed/
    tad store pack features-h5 --h5 features.h5
    """
    from tad.store import open_store
    from tad.store.pack import pack_h5, pack_zip

    if (folder is None) == (file is None):
        raise click.UsageError("give --zip FOLDER for a Zarr store, or --h5 FILE for an HDF5 store")
    with open_store(path) as opened:
        chosen = list(streams) or None
        if folder is not None:
            done = pack_zip(opened, folder, streams=chosen, overwrite=overwrite)
        else:
            done = [pack_h5(opened, str(file), streams=chosen, overwrite=overwrite)]
    for one in done:
        click.echo(f"{one}: {one.stat().st_size / 1e6:.1f} MB")


@store.command("export")
@click.argument("path")
@click.argument("folder", type=click.Path(file_okay=False))
@click.option("--stream", required=True, help="The stream.")
@click.option("--level", help="Its level.  [default: features, else the finest]")
@click.option("--layout", type=click.Choice(["TC", "CT"]), default="TC", show_default=True, help="Which axis is first.")
@click.option("--format", type=click.Choice(["npy", "npz"]), default="npy", show_default=True)
@click.option("--overwrite", is_flag=True, help="Write all files again, also over files that index.json does not list.")
@as_json
@click.pass_context
def store_export(ctx: click.Context, /, path: str, folder: str, stream: str, as_json: bool, **o: Any) -> None:
    """Write a stream of the store at PATH into FOLDER: a file a video, and index.json with their time axes.

    \b
    tad store export features.zarr i3d_npy/ --stream i3d-rgb
    """
    from tad.store import open_store
    from tad.store.exporters import export_features

    with open_store(path) as opened:
        report = export_features(opened, stream, folder, **o)
    for video, why in report.failures:
        say(f"failed {video}: {why}")
    if as_json:
        show(report.to_dict())
    else:
        counts = f"{len(report.written)} files written, {len(report.already)} already there"
        click.echo(f"{counts}, {len(report.failures)} failed")
    if report.failures:
        ctx.exit(PARTLY)
