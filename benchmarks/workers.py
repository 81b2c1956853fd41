"""``python -m benchmarks.workers``: ``tad extract --workers N`` against a plain run over the same synthetic videos.

Each run writes a store of its own. A run with workers includes their start, which imports torch in each: ``start_s`` is
what one worker takes for nothing, so that ``ratio_started`` tells what longer runs come near to.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tad.extract.cluster import connected
from tad.extract.pipeline import extract
from tad.recipe import ExtractRecipe
from tad.synth import make_video


def start_s(workers: int) -> float:
    """Seconds until ``workers`` processes are there and have imported what a video takes."""
    begun = time.perf_counter()
    with connected(workers, None, device=None) as client:
        client.wait_for_workers(workers)
        client.run(_import)
        return time.perf_counter() - begun


def _import() -> None:
    import tad.extract.cluster  # noqa: F401


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="length of the longest video; the others are shorter"
    )
    parser.add_argument("--size", type=int, nargs=2, default=(256, 340), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--fps", type=float, default=30.0)
    parser.add_argument("--backbone", nargs="+", default=["i3d-rgb"])
    parser.add_argument("--stride", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args(arguments)
    recipes = [ExtractRecipe(backbone=name, weights="random", stride=args.stride) for name in args.backbone]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        videos = Path(folder) / "videos"
        videos.mkdir()
        for number in range(args.videos):
            seconds = args.seconds * (1.0 - 0.5 * number / args.videos)
            make_video(videos / f"{number}.mp4", duration_s=seconds, seed=number, size=tuple(args.size), fps=args.fps)
        for workers in (None, *args.workers):
            started = 0.0 if workers is None else start_s(workers)
            report = extract(
                videos, store=Path(folder) / f"{workers}.zarr", recipes=recipes, device=args.device, workers=workers
            )
            plain_s = rows[0]["wall_s"] if rows else report.wall_s
            rows.append(
                {
                    "workers": workers or 0, "rows": report.rows, "wall_s": report.wall_s, "start_s": started,
                    "video_s_per_s": report.video_s / report.wall_s, "ratio": plain_s / report.wall_s,
                    "ratio_started": plain_s / max(report.wall_s - started, 1e-9),
                }
            )  # fmt: skip
            if len(rows) == 1:
                print(" ".join(f"{key:>14}" for key in rows[0]))
            print(
                " ".join(f"{v:>14.3f}" if isinstance(v, float) else f"{v!s:>14}" for v in rows[-1].values()), flush=True
            )
    name = (
        torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or platform.machine()
    )
    print(
        f"{args.videos} videos of at most {args.seconds:g} s, {args.size[1]}x{args.size[0]} at {args.fps:g} fps, "
        f"{'+'.join(args.backbone)}, {name}, {os.cpu_count()} cores; workers 0: a plain run; ratio: times as fast as it"
    )
    if args.out:
        args.out.write_text(json.dumps({"device": name, "cores": os.cpu_count(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
