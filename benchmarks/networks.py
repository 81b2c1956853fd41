"""Every network once: its error against recorded outputs of the public code, and an extraction of a real video.

::

    python -m benchmarks.networks parity --golden FOLDER [--natural] [--only ircsn] [--json out.json]
    python -m benchmarks.networks extract --video FILE [--only slowfast] [--json out.json]

``parity`` fills each network's public tensors with the numbers of the recording's rule, loads them as a checkpoint, and
compares: the largest difference of the features in standard deviations, over all recorded inputs (``--natural``: those
of the networks' own sizes too, which take minutes). Seconds are of one window of the network's own size, one clip. A
star marks a number of parameters other than recorded.
``extract`` runs ``tad extract`` with random weights, small frames where the network admits them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tad.extract import extract, load_backbone
from tad.extract.backbones import BACKBONES
from tad.extract.backbones.base import Backbone
from tad.extract.weights import family_of
from tad.recipe import ExtractRecipe
from tad.store import open_store
from tests.extract.filler import filled_clip, filled_state, golden, relative_error

TAGS = {"A": "", "A_rect": "_rect", "A_nat": "_nat"}
SMALL = (112, 112)


def parity(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a recorded network."""
    rows = []
    shared = options.golden.resolve().parent.parent
    timed: dict[str, float] = {}
    print(f"{'recording':34}{'network':22}{'inputs':>7}{'worst error':>13}{'parameters':>13}{'s a window':>12}")
    for path in sorted(options.golden.glob("*.json")):
        if path.stem == "sensitivity" or options.only not in path.stem:
            continue
        record, arrays = golden(shared, path.stem)
        state = filled_state(record["keys"], record["gain"])
        backbone = load_backbone(state)
        backbone.interpolate_positions = True  # for recordings of another size than the network's own
        errors = {}
        for tag, about in record["inputs"].items():
            large = tag == "A_nat" or path.stem.endswith("_k400")
            if f"feature{TAGS[tag]}" in arrays and (options.natural or not large):
                clip = as_clip(filled_clip(about["shape"], about["seed"]), record["layout"], backbone)
                with torch.inference_mode():
                    features = backbone(clip)["features"][0]
                errors[tag] = relative_error(features, arrays[f"feature{TAGS[tag]}"].reshape(-1))
        name = backbone.spec.name
        parameters = sum(p.numel() for p in backbone.parameters())
        if name not in timed:
            timed[name] = seconds_a_window(backbone)
        row = {
            "recording": path.stem,
            "network": name,
            "family": family_of(record["keys"]),
            "errors": errors,
            "parameters": parameters,
            "recorded_parameters": record["n_params"],
            "window_s": timed[name],
        }
        rows.append(row)
        worst = f"{max(errors.values()):.1e}" if errors else "-"
        size = f"{row['parameters']:,}" + ("" if row["parameters"] == record["n_params"] else "*")
        print(f"{path.stem:34}{name:22}{len(errors):>7}{worst:>13}{size:>13}{timed[name]:>12.2f}", flush=True)
    return rows


def as_clip(x: torch.Tensor, layout: str, backbone: Backbone) -> torch.Tensor:
    """A recorded input as (1, C, T, H, W)."""
    axes = layout.split("(")[0].split()
    x = x if axes[0] == "N" else x[None]
    axes = axes if axes[0] == "N" else ["N", *axes]
    return x.permute(*(axes.index(axis) for axis in ("N", "C", "T", "H", "W")))


def seconds_a_window(backbone: Backbone) -> float:
    """The better of two forward passes of one clip of the size that the network declares, batch norms folded."""
    spec = backbone.spec
    clip = torch.randn(1, len(spec.mean), spec.window, *spec.crop)
    backbone = backbone.eval().fuse()
    best = float("inf")
    with torch.inference_mode():
        for _ in range(2):
            begun = time.perf_counter()
            backbone(clip)
            best = min(best, time.perf_counter() - begun)
    return best


def extraction(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a network."""
    rows = []
    print(f"{options.video.name}, {torch.get_num_threads()} threads")
    print(
        f"{'network':22}{'frames x size':>16}{'interval':>9}{'fps':>8}{'rows':>6}{'every s':>9}{'levels':>22}{'s':>8}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, entry in BACKBONES.items():
            if options.only not in name:
                continue
            spec = entry.spec
            crop = SMALL if spec.any_size and min(spec.crop) > SMALL[0] else None
            recipe = ExtractRecipe(
                backbone=name,
                weights="random",
                crop=crop,
                short_side=min(SMALL) if crop else None,
                stride=options.stride,
                levels=bool(spec.levels) and options.stride is None,
            )
            store = Path(folder) / f"{name}.zarr"
            report = extract([options.video], store=store, recipes=recipe, batch=4)
            if report.failures:
                raise SystemExit(f"{name}: {report.failures[0]}")
            with open_store(store) as opened:
                feature = opened[name, report.videos[0]]
                attrs = opened.attrs(name, report.videos[0])
                levels = {
                    level: opened[name, report.videos[0], level].shape[0]
                    for level in opened.levels(name, report.videos[0])
                    if level != "features"
                }
            size = "x".join(map(str, recipe.crop or spec.crop))
            row = {
                "network": name,
                "frames": spec.window,
                "interval": spec.interval,
                "size": size,
                "fps": attrs["fps"],
                "rows": feature.shape[0],
                "axis": feature.axis.to_dict(),
                "levels": levels,
                "seconds": report.wall_s,
            }
            rows.append(row)
            told = " ".join(f"{level}:{count}" for level, count in levels.items()) or "-"
            print(
                f"{name:22}{f'{spec.window}x{size}':>16}{spec.interval:>9}{attrs['fps']:>8.2f}{feature.shape[0]:>6}"
                f"{feature.axis.scale_s:>9.3f}{told:>22}{report.wall_s:>8.1f}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("parity")
    one.add_argument("--golden", type=Path, required=True, help="folder of recorded networks")
    one.add_argument("--natural", action="store_true")
    one.set_defaults(run=parity)
    two = commands.add_parser("extract")
    two.add_argument("--video", type=Path, required=True)
    two.add_argument("--stride", type=int, help="instead of each network's own (then without levels)")
    two.set_defaults(run=extraction)
    for command in (one, two):
        command.add_argument("--only", default="", help="names that contain this")
        command.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = options.run(options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
