"""``python -m benchmarks.backbones``: windows a second of the networks' bare forward passes.

Every network is timed in each precision that the device has (autocast over float32 weights, as ``tad extract`` does
it) and in each way of running it: ``eager``, ``channels-last`` (weights and clips laid out with the channels innermost)
and, with ``--compile``, ``torch.compile`` of both. Weights are random, batch norms folded where the network can, clips
normalised beforehand. Each figure is the median of ``--repeats`` passes after ``--warmup`` passes that do not count;
``ratio`` sets it against eager float32 of the same network in the same run. A network that fails (out of memory, say)
is listed and the others go on.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tad.errors import TadError
from tad.extract.backbones import BACKBONES, build_backbone
from tad.training.precision import AUTOCAST, autocast

COLUMNS = ("backbone", "frames", "crop", "precision", "mode", "windows_per_s", "ratio", "first_s", "memory_mib")


def channels_last(tensor: Tensor) -> Tensor:
    """The same tensor, laid out with the channels innermost where it has 4 or 5 axes."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats[tensor.ndim]) if tensor.ndim in formats else tensor


def with_channels_last(module: nn.Module) -> None:
    """Lay out all parameters so, in place."""
    for parameter in module.parameters():
        parameter.data = channels_last(parameter.data)


def synchronise(device: torch.device) -> None:
    """Wait for the GPU, where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device, *, warmup: int, repeats: int) -> tuple[float, float]:
    """(seconds of the first pass, median seconds of the passes that count)."""
    times = []
    for _ in range(max(1, warmup) + repeats):
        synchronise(device)
        begun = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - begun)
    return times[0], statistics.median(times[max(1, warmup) :])


def measure(
    name: str,
    *,
    device: torch.device,
    precisions: Sequence[str],
    compiled: bool,
    batch: int,
    frames: int | None,
    crop: tuple[int, int] | None,
    warmup: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """A row for each precision and mode of one network, the first being eager float32."""
    rows: list[dict[str, Any]] = []
    for mode in ("eager", "channels-last", *(("compile", "compile, channels-last") if compiled else ())):
        backbone = build_backbone(name, "random").fuse().to(device)
        spec = backbone.spec
        height, width = crop or spec.crop
        length = frames or spec.window
        backbone.interpolate_positions = not (spec.any_size and spec.any_length)
        size = (batch, len(spec.mean), length, height, width)
        generator = torch.Generator().manual_seed(0)
        clips = backbone.normalise(torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).to(device))
        if "channels-last" in mode:
            with_channels_last(backbone)
            clips = channels_last(clips)
        forward: Callable[[Tensor], Any] = torch.compile(backbone) if "compile" in mode else backbone
        for precision in precisions:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            first_s, seconds = _timed(forward, clips, precision, device, warmup=warmup, repeats=repeats)
            memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
            base = rows[0]["windows_per_s"] if rows else batch / seconds
            rows.append(
                {
                    "backbone": name, "frames": length, "crop": f"{height}x{width}", "precision": precision,
                    "mode": mode, "windows_per_s": batch / seconds, "ratio": batch / seconds / base,
                    "first_s": first_s, "memory_mib": memory,
                }
            )  # fmt: skip
    return rows


def _timed(
    forward: Callable[[Tensor], Any], clips: Tensor, precision: str, device: torch.device, **counts: int
) -> tuple[float, float]:
    def call() -> object:
        with (
            torch.inference_mode(),
            autocast(device, precision),
        ):
            return forward(clips)["features"]

    return seconds_of(call, device, **counts)


def text_of(row: dict[str, Any]) -> str:
    """One line of the table."""
    cells = []
    for column in COLUMNS:
        value = row[column]
        cells.append("-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value))
    widths = ("<22", ">6", ">9", ">9", "<22", ">13", ">6", ">8", ">10")
    return " ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))


def size_of(text: str) -> tuple[int, int]:
    """``HEIGHTxWIDTH``."""
    height, _, width = text.partition("x")
    return int(height), int(width)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(BACKBONES), metavar="BACKBONE", help="these networks")
    parser.add_argument("--crop", type=size_of, help="HEIGHTxWIDTH of the windows [default: each network's]")
    parser.add_argument("--frames", type=int, help="frames of a window [default: each network's]")
    parser.add_argument("--batch", type=int, default=8, help="windows a pass")
    parser.add_argument("--precision", nargs="+", choices=list(AUTOCAST), help="[default: all that the device has]")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    available = [p for p in AUTOCAST if p != "fp16" or device.type == "cuda"]
    if args.precision and not set(args.precision) <= set(available):
        parser.error(f"{device.type} has no {', '.join(sorted(set(args.precision) - set(available)))}")
    # float32 comes first: the ratios are against it
    precisions = [p for p in available if p == "fp32" or not args.precision or p in args.precision]
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    print(text_of(dict(zip(COLUMNS, COLUMNS, strict=True))), flush=True)
    for name in args.only or BACKBONES:
        try:
            found = measure(
                name, device=device, precisions=precisions, compiled=args.compile, batch=args.batch,
                frames=args.frames, crop=args.crop, warmup=args.warmup, repeats=args.repeats,
            )  # fmt: skip
        except (TadError, RuntimeError) as error:
            failures[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"{name}: failed, {failures[name]}", flush=True)
            continue
        rows += found
        print("\n".join(map(text_of, found)), flush=True)
        best = max(found, key=lambda row: row["windows_per_s"])
        print(f"{name}: best is {best['precision']} {best['mode']}, {best['ratio']:.2f} times eager fp32", flush=True)
    cuda = device.type == "cuda"
    about = {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "batch": args.batch,
        "warmup": max(1, args.warmup), "repeats": args.repeats,
        "tf32": torch.backends.cudnn.allow_tf32 if cuda else None,
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    if args.out:
        args.out.write_text(json.dumps({**about, "rows": rows, "failures": failures}, indent=2), encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
