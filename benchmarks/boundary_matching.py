"""Boundary matching against the dense sampling matrix of the public codes: peak memory and time of a training step.

::

    python -m benchmarks.boundary_matching [--rows 100 200] [--batch 1] [--hidden 512] [--device cuda] [--json out.json]

Both sides make a vector for every proposal of ``rows`` rows, forwards and backwards. ``dense`` multiplies the rows by a
matrix (T, 32·T·T) and joins the 32 points by a Conv3d; ``ours`` is ``tad.detect.boundary_matching.BoundaryMatching``.
Each runs in a process of its own. Peak memory is what the process grows by from when the libraries are loaded and warm:
matrix, activations and gradients (on CUDA: what is allocated). Time is the best of ``--repeats`` after one that is not
counted. The first column of ``difference`` compares the proposals that exist, the second one the gradients.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tad.detect.boundary_matching import BoundaryMatching, map_to_cells, sampling_matrix

SAMPLES, PER_BIN, MARGIN = 32, 3, 0.5
SIDES = ("dense", "ours")


def dense_matrix(rows: int, device: str) -> Tensor:
    """(T, 32·T·T) float32, as the public codes keep it."""
    there, _ = sampling_matrix(rows, rows, SAMPLES, PER_BIN, MARGIN)
    places = map_to_cells(torch.arange(rows * rows).view(rows, rows))  # (N,)
    sizes = torch.cat([there.begins, torch.tensor([len(there.values)])]).diff()
    cell = places[torch.repeat_interleave(sizes)]
    row, point = there.columns.long() // SAMPLES, there.columns.long() % SAMPLES
    matrix = torch.zeros(rows, SAMPLES, rows * rows, device=device)
    matrix[row.to(device), point.to(device), cell.to(device)] = there.values.float().to(device)
    return matrix.flatten(1)


def step_of(side: str, rows: int, layer: BoundaryMatching, device: str) -> Callable[[Tensor], Tensor]:
    """x (B, C, T) → cells (B, N, H)."""
    if side == "ours":
        return layer
    matrix = dense_matrix(rows, device)

    def dense(x: Tensor) -> Tensor:
        sampled = torch.matmul(x, matrix).unflatten(2, (SAMPLES, rows, rows))  # (B, C, S, D, T)
        kernel = layer.weight.permute(1, 2, 0)[..., None, None]  # (H, C, S, 1, 1)
        return F.conv3d(sampled, kernel, layer.bias).squeeze(2)  # (B, H, D, T)

    return dense


def peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(kilobytes if sys.platform == "darwin" else 1024 * kilobytes)


def measure(side: str, options: argparse.Namespace, rows: int) -> None:
    """One side, in this process; its figures go to stdout, its results to ``options.keep``."""
    device = options.device
    torch.manual_seed(0)

    def build(length: int) -> tuple[BoundaryMatching, Tensor]:
        layer = BoundaryMatching(channels=options.channels, hidden=options.hidden).to(device)
        return layer, torch.randn(options.batch, options.channels, length, device=device, requires_grad=True)

    layer, x = build(8)
    step_of(side, 8, layer, device)(x).sum().backward()
    layer, x = build(rows)
    before = peak_bytes(device)
    step = step_of(side, rows, layer, device)
    times = []
    for _ in range(1 + options.repeats):
        x.grad = layer.weight.grad = layer.bias.grad = None
        _wait(device)
        begun = time.perf_counter()
        output = step(x)
        # the mean square of the proposals that exist, so that both sides have the same gradients
        if side == "dense":
            output = output * _exists(rows, device)
        (output.square().sum() / (rows * rows)).backward()
        _wait(device)
        times.append(time.perf_counter() - begun)
    peak = peak_bytes(device) - before
    if side == "dense":
        output = map_to_cells(output).transpose(1, 2)
    assert x.grad is not None and layer.weight.grad is not None  # noqa: PT018 - for mypy
    torch.save({"cells": output.detach().cpu(), "gradients": [x.grad.cpu(), layer.weight.grad.cpu()]}, options.keep)
    print(json.dumps({"peak_bytes": peak, "seconds": min(times[1:])}))


def _exists(rows: int, device: str) -> Tensor:
    start = torch.arange(rows, device=device)
    return (start + start[:, None] < rows).float()


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def difference(a: Tensor, b: Tensor) -> float:
    """Of two tensors, by the largest value of one."""
    return float((a - b).abs().max() / b.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 200])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # a process of one measurement
    parser.add_argument("--keep", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        measure(options.side, options, options.rows[0])
        return
    print(
        f"{options.channels} channels, {options.hidden} hidden, batch {options.batch}, {options.device}, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"{'rows':>5}{'dense MB':>10}{'ours MB':>9}{'ratio':>7}{'dense s':>9}{'ours s':>8}{'ratio':>7}   difference")
    rows_of_table = []
    for rows in options.rows:
        row: dict[str, Any] = {"rows": rows}
        kept = {}
        with tempfile.TemporaryDirectory() as folder:
            for side in SIDES:
                keep = Path(folder) / side
                command = [sys.executable, "-m", "benchmarks.boundary_matching", "--side", side, "--keep", str(keep)]
                for name in ("batch", "channels", "hidden", "repeats", "device"):
                    command += [f"--{name}", str(getattr(options, name))]
                done = subprocess.run([*command, "--rows", str(rows)], check=True, stdout=subprocess.PIPE, text=True)
                row[side] = json.loads(done.stdout)
                kept[side] = torch.load(keep, weights_only=True)
        row["memory_ratio"] = row["dense"]["peak_bytes"] / row["ours"]["peak_bytes"]
        row["time_ratio"] = row["dense"]["seconds"] / row["ours"]["seconds"]
        row["difference"] = difference(kept["ours"]["cells"], kept["dense"]["cells"])
        row["gradient_difference"] = max(
            difference(a, b) for a, b in zip(kept["ours"]["gradients"], kept["dense"]["gradients"], strict=True)
        )
        print(
            f"{rows:>5}{row['dense']['peak_bytes'] / 1e6:>10.0f}{row['ours']['peak_bytes'] / 1e6:>9.0f}"
            f"{row['memory_ratio']:>7.1f}{row['dense']['seconds']:>9.2f}{row['ours']['seconds']:>8.3f}"
            f"{row['time_ratio']:>7.1f}   {row['difference']:.1e} {row['gradient_difference']:.1e}"
        )
        rows_of_table.append(row)
    if options.json:
        about = {name: getattr(options, name) for name in ("channels", "hidden", "batch", "device")}
        options.json.write_text(json.dumps({**about, "results": rows_of_table}, indent=2))


if __name__ == "__main__":
    main()
