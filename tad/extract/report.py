"""What ``tad extract`` says: the plan before it starts, and what it did at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tad.errors import RecipeError, StoreError
from tad.extract.backbones import SPECS
from tad.extract.inputs import find_videos
from tad.extract.jobs import spread
from tad.extract.maps import map_name, map_shapes
from tad.extract.outcome import ExtractReport, Failure
from tad.extract.pipeline import plan_work, resolve_all
from tad.extract.published import PUBLISHED, split_name
from tad.extract.raw import FIELDS, RAW
from tad.extract.snippets import LevelTiler
from tad.extract.streams import Stream, expand
from tad.progress import duration_text
from tad.recipe import ExtractRecipe
from tad.store import open_store


def recipes_of(backbones: Sequence[str], weights: Sequence[str], values: Mapping[str, Any]) -> list[ExtractRecipe]:
    """One recipe a backbone; ``weights`` holds one for all (``random``), one each in order, or ``BACKBONE=FILE``.
    Names of published weights go to the backbone that they are of.

    Values that only some understand are given to those alone: ``flow`` to what reads optical flow, and what is for
    networks to networks, where there are any beside raw frames.

    Raises
    ------
    RecipeError : unknown backbones, or weights that cannot be assigned.
    """
    names = expand(backbones)
    named = dict(item.split("=", 1) for item in weights if item.split("=", 1)[0] in names)
    rest = []
    for item in weights:
        published = split_name(item)[0]
        backbone = "" if published is None else PUBLISHED[published].backbone
        if backbone in names and backbone not in named:
            named[backbone] = item
        elif item.split("=", 1)[0] not in named:
            rest.append(item)
    specs = {**SPECS, **RAW}
    networks = [name for name in names if name not in RAW]
    unnamed = [name for name in networks if name not in named]
    if len(rest) == 1 and rest[0].startswith("random") and unnamed:
        rest = rest * len(unnamed)
    if rest and len(rest) != len(unnamed):
        raise RecipeError(
            f"{len(rest)} --weights for {len(unnamed)} networks ({', '.join(unnamed)}): give one each, in this order, "
            "or as BACKBONE=FILE"
        )
    chosen = {**named, **dict(zip(unnamed, rest, strict=False))}
    if values.get("flow") is not None and all(specs[name].modality == "rgb" for name in names):
        raise RecipeError(f"--flow {values['flow']}: none of {', '.join(names)} reads optical flow")
    recipes = []
    for name in names:
        own = {k: v for k, v in values.items() if k != "flow" or specs[name].modality == "flow"}
        if name in RAW and networks:
            own = {key: value for key, value in own.items() if key in FIELDS}
        recipes.append(ExtractRecipe(backbone=name, weights=chosen.get(name), **own))
    return recipes


def dry_run(
    videos: Sequence[str | Path],
    *,
    store: str,
    recipes: Sequence[ExtractRecipe],
    names: Sequence[str] | None = None,
    format: Literal["zarr", "hdf5"] | None = None,
    overwrite: bool = False,
    device: str | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
) -> dict[str, Any]:
    """What ``extract`` would do, without writing anything: an item a missing entry, from the files' headers.

    Returns
    -------
    dict with ``entries`` (stream, video, level, rows, channels, shape, dtype, bytes), ``already``, ``failures``,
    ``video_s``, ``bytes``; with ``workers`` or ``scheduler`` also ``spread``: the videos and seconds that each process
    would get, if seconds of video cost the same everywhere. Only for a ``scheduler`` is anybody asked, about its
    workers.

    Raises
    ------
    StoreError : a stream of this name exists and was made with another recipe.
    TadError : nothing answers at ``scheduler``, or its workers cannot be used.
    """
    if workers is not None or scheduler is not None:
        from tad.extract.cluster import check_choice

        check_choice(workers, scheduler)
    streams = resolve_all(recipes, names=names, device="cpu")
    files = find_videos(videos)
    report = ExtractReport()
    try:
        opened = open_store(store, "r", format=format)
    except StoreError:
        groups = plan_work(files, streams, None, report, overwrite=overwrite)
    else:
        with opened:
            for stream in streams:
                if stream.name in opened.streams():
                    opened.check_stream(stream.name, stream.spec)
            groups = plan_work(files, streams, opened, report, overwrite=overwrite)
    work = [item for group in groups.values() for item in group]
    entries = []
    maps: dict[tuple[str, int, int], dict[str, tuple[int, ...]]] = {}  # their shapes, for each size of frames once
    for file, members, info in work:
        for stream in members:
            frames = max(1, round(info.expected_s * (stream.fps or info.fps)))
            cut = stream.geometry.plan(info.height, info.width)
            size = (cut.height, cut.width)
            if stream.maps and (stream.name, *size) not in maps:
                maps[stream.name, *size] = map_shapes(
                    stream.backbone, stream.maps, frames=stream.plan.window, size=size
                )
            arrays = _arrays(stream, frames, size, maps.get((stream.name, *size), {}))
            entries += [{"stream": stream.name, "video": file.video, **array} for array in arrays]
    plan = {
        "entries": entries,
        "already": report.already,
        "failures": [failure.__dict__ for failure in report.failures],
        "video_s": sum(info.expected_s for _, _, info in work),
        "bytes": sum(entry["bytes"] for entry in entries),
    }
    if workers is not None or scheduler is not None:
        from tad.extract.cluster import slots_at

        seconds: dict[str, float] = {}
        for file, _, info in work:  # a video once for each pass over its frames
            seconds[file.video] = seconds.get(file.video, 0.0) + info.expected_s
        slots = workers if workers is not None else slots_at(str(scheduler), device=device)
        names, lengths = list(seconds), list(seconds.values())
        plan["spread"] = [
            {"videos": [names[index] for index in part], "video_s": sum(lengths[index] for index in part)}
            for part in spread(lengths, slots)
        ]
    return plan


def _arrays(
    stream: Stream, frames: int, size: tuple[int, int], maps: Mapping[str, tuple[int, ...]]
) -> list[dict[str, Any]]:
    """What would be written of one video with ``frames`` frames of this size on the grid: an item a level."""
    spec = stream.backbone.spec
    steps = {name: LevelTiler(stream.plan, stride).step_frames for name, stride in stream.sequences.items()}
    rows = {name: -(-frames // step) for name, step in steps.items()}
    each = (spec.width, *size) if stream.raw else (spec.width,)
    shapes: dict[str, tuple[int, ...]] = {"features": (stream.plan.rows(frames), *each)}
    types = {"features": np.dtype("uint8" if stream.raw else "float32")}
    for level in stream.levels:
        shapes[level], types[level] = (rows[level], spec.levels[level].channels), np.dtype("float32")
    for name, shape in ((map_name(level), shape) for level, shape in maps.items()):
        shapes[name], types[name] = (rows[name], *shape), np.dtype("float16")
    return [
        {
            "level": level,
            "rows": shape[0],
            "channels": shape[1],
            "shape": list(shape),
            "dtype": types[level].name,
            "bytes": math.prod(shape) * types[level].itemsize,
        }
        for level, shape in shapes.items()
    ]


def dry_run_lines(plan: Mapping[str, Any], *, limit: int = 5) -> list[str]:
    """A plan as text: the first entries, the sum of every level where there are several, then the sum of all."""
    entries = plan["entries"]
    lines = [
        f"{e['stream']}/{e['video']}/{e['level']}: {e['rows']} rows x {' x '.join(map(str, e['shape'][1:]))} "
        f"{e['dtype']}, {e['bytes'] / 2**20:.2f} MiB"
        for e in entries[:limit]
    ]
    if len(entries) > limit:
        lines.append(f"… and {len(entries) - limit} more (--json lists all)")
    sums: dict[str, int] = {}
    for e in entries:
        sums[f"{e['stream']}/*/{e['level']}"] = sums.get(f"{e['stream']}/*/{e['level']}", 0) + e["bytes"]
    if len(sums) > 1:
        lines += [f"{name}: {size / 2**20:.1f} MiB in all" for name, size in sums.items()]
    lines += [f"cannot be read: {failure['message']}" for failure in plan["failures"]]
    lines.append(
        f"would write {len(entries)} arrays, {plan['bytes'] / 2**20:.1f} MiB, from {plan['video_s']:.1f} s of video; "
        f"{plan['already']} entries are there already"
    )
    if parts := plan.get("spread"):
        longest = max(part["video_s"] for part in parts)
        idle = sum(not part["videos"] for part in parts)
        gain = f", {plan['video_s'] / longest:.1f} times as fast as one at best" if longest > 0 else ""
        lines.append(
            f"{len(parts)} workers: {longest:.1f} s of video for the one with most{gain}"
            + (f"; {idle} would have nothing to do" if idle else "")
        )
        lines += [
            f"worker {number}: {len(part['videos'])} videos, {part['video_s']:.1f} s"
            for number, part in enumerate(parts[:limit])
        ]
        if len(parts) > limit:
            lines.append(f"… and {len(parts) - limit} more workers")
    return lines


def report_lines(report: ExtractReport) -> list[str]:
    """What a run did, its speed, and where the time went."""
    if not report.written and not report.failures:
        return [f"nothing to do: all {report.already} entries are there already"]
    lines = [
        f"{report.written} entries written ({report.rows} rows), {report.already} already there, "
        f"{len(report.failures)} videos failed"
    ]
    if report.wall_s > 0 and report.written:
        lines.append(
            f"{report.video_s:.1f} s of video in {duration_text(report.wall_s)} ({report.wall_s:.2f} s): "
            f"{report.video_s / report.wall_s:.2f} s of video a second"
        )
        parts = {"decode": report.decode_s, "flow": report.flow_s, "network": report.network_s, "write": report.write_s}
        split = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items())
        summed = ", summed over the workers" if report.workers else ""
        lines.append(f"time by part: {split} (decode and flow run beside the network{summed})")
    if report.workers:
        shares = sorted(report.workers.values())
        lines.append(f"{len(shares)} workers did {shares[0]:.1f} to {shares[-1]:.1f} s of video each")
    return lines


def failure_lines(failures: Sequence[Failure]) -> list[str]:
    """One line a failure."""
    return [f"failed: {failure}" for failure in failures]
