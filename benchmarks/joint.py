"""Peak memory and time of a step of joint training, against the part of the snippets that carry gradients.

::

    python -m benchmarks.joint [--snippets 32 --frames 8 --size 112] [--threads 2] [--json out.json]
    python -m benchmarks.joint --device cuda --snippets 128 --frames 8 --size 224 [--precision bf16]

A backbone with random weights, its first two stages and all batch norms frozen, before ETAD with a row a snippet: one
sample (``--batch``) of random frames goes forward, back, and through AdamW. 0% computes all snippets without graph;
100% is end-to-end training, once more with checkpointing. Each way runs in a process of its own: a step that is not
timed, then ``--repeats`` steps. Peak memory is of them all, the optimizer's state included: on CUDA what torch has
allocated at most, on the CPU what the process has grown by since its libraries were loaded and warm. ``estimate`` is
what ``tad.joint.memory`` says of the step without running it. The columns ``ratio`` set a way against 100% of the same
run. ETAD's paper (Table 1, TSM on ResNet-50, 128 snippets of 8 frames of 224x224, GPU) has 34 GB of memory at 100% and
11 GB at 30%. A way that fails, out of memory say, is listed and the others go on.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tad.detect.detectors.etad import ETAD
from tad.detect.interface import Targets
from tad.errors import TadError
from tad.extract.backbones import Backbone, build_backbone
from tad.joint.clips import Clips, JointBatch
from tad.joint.counting import StreamCost, measure_backbone, measure_detector
from tad.joint.encoder import Encoder
from tad.joint.freezing import freeze
from tad.joint.memory import estimate
from tad.joint.model import JointModel
from tad.recipe import JointRecipe
from tad.timeline import TimeAxis
from tad.training.precision import AUTOCAST, autocast

PAPER_GB = {"30%": 11, "100%": 34}
FPS = 30.0
CPU, GPU = {"snippets": 32, "size": 112}, {"snippets": 128, "size": 224}
STREAM = "rgb"
# an ETAD that takes next to no memory
SMALL = {
    "width": 32, "lstm_width": 16, "branch_width": 16, "norm_groups": 4, "roi_channels": 8, "head_width": 16,
    "branch_head_width": 8,
}  # fmt: skip
PASSED_ON = (
    "device", "backbone", "snippets", "frames", "size", "batch", "chunk", "frozen_stages", "precision", "repeats",
    "threads",
)  # fmt: skip


def make_model(
    options: argparse.Namespace, name: str, way: tuple[float, bool], *, rows: int, **etad: Any
) -> tuple[JointModel, Backbone]:
    """Backbone and ETAD on the device, ``way`` being the ratio and whether activations are checkpointed."""
    torch.manual_seed(0)
    ratio, checkpoint = way
    backbone = build_backbone(name, "random")
    freeze(backbone, stages=options.frozen_stages, norms=True)
    encoder = Encoder(backbone=backbone, chunk=options.chunk, checkpoint=checkpoint)
    detector = ETAD(channels={STREAM: backbone.spec.width}, classes=1, rows=rows, **etad)
    joint = JointRecipe(ratio=ratio, chunk=options.chunk, checkpoint=checkpoint)
    model = JointModel(detector=detector, encoders={STREAM: encoder}, joint=joint).to(options.device)
    return model, backbone


def make_batch(options: argparse.Namespace, backbone: Backbone, *, snippets: int, size: int) -> JointBatch:
    """Random frames, each snippet its own, and an action in the middle third of every sample."""
    count, channels, width = snippets * options.frames, len(backbone.spec.mean), backbone.spec.width
    index = torch.arange(count).view(snippets, options.frames)
    clips = [
        Clips(
            frames=torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8),
            index=index,
            rows=torch.arange(snippets),
            place=torch.arange(snippets, dtype=torch.float32),
        )
        for _ in range(options.batch)
    ]
    action = Targets(torch.tensor([[snippets / 3, 2 * snippets / 3]]), torch.tensor([0]))
    batch = JointBatch(
        videos=[f"video_{number}" for number in range(options.batch)],
        features={STREAM: torch.zeros(options.batch, width, snippets)},
        mask=torch.ones(options.batch, snippets, dtype=torch.bool),
        axes=[TimeAxis.from_frames(fps=FPS, window_frames=options.frames, stride_frames=options.frames)]
        * options.batch,
        durations_s=[count / FPS] * options.batch,
        targets=[action] * options.batch,
        clips={STREAM: clips},
    )
    return batch.to(options.device)


def step(model: JointModel, batch: JointBatch, optimizer: torch.optim.Optimizer, precision: str) -> float:
    """One step of training; returns its seconds."""
    device = batch.mask.device
    _wait(device)
    begun = time.perf_counter()
    with autocast(device, precision):
        terms = model.loss(model(batch), batch.targets or [])
    torch.stack([term.float() for term in terms.values()]).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _wait(device)
    return time.perf_counter() - begun


def measure(options: argparse.Namespace, ratio: float, checkpoint: bool) -> dict[str, Any]:
    """Figures of one way, in this process, which has done nothing else before."""
    torch.set_num_threads(options.threads)
    cuda = options.device.startswith("cuda")
    # a small step of the same kind loads and warms what the libraries need
    warm, small = make_model(options, "tiny", (0.5, False), rows=8, **SMALL)
    step(warm, make_batch(options, small, snippets=8, size=32), torch.optim.AdamW(warm.parameters()), options.precision)
    del warm, small
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = _peak_bytes(cuda=False)

    model, backbone = make_model(options, options.backbone, (ratio, checkpoint), rows=options.snippets)
    batch = make_batch(options, backbone, snippets=options.snippets, size=options.size)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    times = [step(model, batch, optimizer, options.precision) for _ in range(1 + options.repeats)]
    peak = _peak_bytes(cuda=True) if cuda else _peak_bytes(cuda=False) - before
    return {
        "peak_bytes": peak,
        "seconds": statistics.median(times[1:]),
        **estimated(options, model, backbone, batch),
    }


def estimated(options: argparse.Namespace, model: JointModel, backbone: Backbone, batch: JointBatch) -> dict[str, Any]:
    """What ``tad.joint.memory`` expects of this step, in all and by its parts."""
    frames = batch.clips[STREAM][0].frames
    clip = (frames.shape[1], options.frames, options.size, options.size)
    stream = StreamCost(
        measure_backbone(backbone, clip=clip, precision=options.precision),
        clips=options.snippets,
        frame_bytes=frames.nbytes,
    )
    stored = replace(batch, features={key: rows.requires_grad_() for key, rows in batch.features.items()})

    def of_detector() -> object:
        with autocast(batch.mask.device, options.precision):
            return model.detector.loss(model.detector(stored), stored.targets or [])

    found = estimate(
        [stream],
        samples=options.batch,
        mode="egs",
        ratio=model.joint.ratio,
        checkpoint=model.joint.checkpoint,
        chunk=options.chunk,
        detector=measure_detector(model.detector, of_detector),
        optimizer="adamw",
    )
    return {"estimate_bytes": found.total, "estimate_parts": asdict(found)}


def _peak_bytes(*, cuda: bool) -> int:
    if cuda:
        return torch.cuda.max_memory_allocated()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(kilobytes if sys.platform == "darwin" else 1024 * kilobytes)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_a_process(options: argparse.Namespace, ratio: float, checkpoint: bool) -> dict[str, Any]:
    """The same figures from a fresh process; of one that fails ``failed`` with its last line."""
    command = [sys.executable, "-m", "benchmarks.joint", "--way", f"{ratio}{'+' if checkpoint else ''}"]
    for name in PASSED_ON:
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return {"failed": said[-1] if said else f"ended with status {done.returncode}, out of memory perhaps"}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def ratio_of(row: dict[str, Any], whole: dict[str, Any] | None, key: str) -> str:
    """``row`` against 100 %, as text."""
    return f"{row[key] / whole[key]:.2f}" if whole is not None and key in row and key in whole else ""


def table(rows: list[dict[str, Any]], *, paper: bool) -> list[str]:
    """Lines; ``paper``: with the paper's figures, of the same sizes."""
    whole = next((row for row in rows if row["ratio"] == 1 and not row["checkpoint"]), None)
    lines = [
        f"{'gradients':24}{'peak MiB':>10}{'estimate':>10}{'ratio':>7}{'s/step':>9}{'ratio':>7}" + "  paper" * paper
    ]
    for row in rows:
        percent = f"{100 * row['ratio']:g}%"
        name = percent + (", checkpointing" if row["checkpoint"] else "")
        if "failed" in row:
            lines.append(f"{name:24}{row['failed']}")
            continue
        published = f"{PAPER_GB[percent]} GB" if paper and percent in PAPER_GB and not row["checkpoint"] else ""
        memory = f"{row['peak_bytes'] / 2**20:>10.0f}{row['estimate_bytes'] / 2**20:>10.0f}"
        memory += f"{ratio_of(row, whole, 'peak_bytes'):>7}"
        times = f"{row['seconds']:>9.2f}{ratio_of(row, whole, 'seconds'):>7}"
        lines.append(f"{name:24}{memory}{times}  {published}".rstrip())
    return lines


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cpu")
    made.add_argument("--backbone", default="tsm-r50")
    made.add_argument("--snippets", type=int, help="32 on the CPU, 128 else")
    made.add_argument("--frames", type=int, default=8, help="of a snippet")
    made.add_argument("--size", type=int, help="of the frames in pixels, 112 on the CPU, 224 else")
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--chunk", type=int, default=8, help="snippets in a forward pass")
    made.add_argument("--frozen-stages", type=int, default=2)
    made.add_argument("--precision", choices=tuple(AUTOCAST), default="fp32")
    made.add_argument("--ratios", type=float, nargs="+", default=[0, 0.1, 0.3, 0.5, 1])
    made.add_argument("--repeats", type=int, default=2)
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--json", type=Path)
    made.add_argument("--way", help=argparse.SUPPRESS)  # a process of one measurement
    return made


def main() -> None:
    made = parser()
    options = made.parse_args()
    if not all(0 <= ratio <= 1 for ratio in options.ratios):
        made.error(f"ratios lie from 0 to 1, got {options.ratios}")
    for name, value in (CPU if options.device == "cpu" else GPU).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.way:
        try:
            print(json.dumps(measure(options, float(options.way.rstrip("+")), options.way.endswith("+"))))
        except TadError as error:
            sys.exit(str(error))
        return
    about = {name: getattr(options, name) for name in PASSED_ON}
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or "CPU"
    print(
        f"{options.backbone} (first {options.frozen_stages} stages frozen) and etad, {options.batch} sample(s) of "
        f"{options.snippets} snippets of {options.frames} frames of {options.size}x{options.size}, "
        f"{options.precision}, chunks of {options.chunk}, {device}, {options.threads} threads"
    )
    ways = [(ratio, False) for ratio in options.ratios] + [(1.0, True)]
    rows = [
        {"ratio": ratio, "checkpoint": checkpoint, **in_a_process(options, ratio, checkpoint)}
        for ratio, checkpoint in ways
    ]
    sizes = (options.backbone, options.snippets, options.frames, options.size, options.batch)
    print("\n".join(table(rows, paper=sizes == ("tsm-r50", 128, 8, 224, 1))))
    if options.json:
        options.json.write_text(json.dumps({**about, "device_name": device, "results": rows}, indent=2))


if __name__ == "__main__":
    main()
