"""``python -m benchmarks.extract``: the whole of ``tad extract`` against the network's bare forward passes on the
same windows.

A synthetic file is extracted into a store (decoding, flow, windows, normalisation, network, writing). Then the same
windows,
already normalised in memory, go through the same network, and only that is timed. The ratio of the two is what the
pipeline costs.
Both are repeated alternately and the best of each counts, since other load only ever adds time.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tad.extract.frames import Frames, read_videos
from tad.extract.inputs import find_videos
from tad.extract.pipeline import extract
from tad.extract.snippets import FrameBuffer
from tad.extract.streams import resolve
from tad.recipe import ExtractRecipe
from tad.synth import make_video


def forward_s(video: Path, recipes: list[ExtractRecipe], *, device: str, batch: int) -> float:
    """Seconds of the bare forward passes of all streams over all windows of ``video``."""
    total = 0.0
    for recipe in recipes:
        stream = resolve(recipe, device=device)
        buffer = FrameBuffer(stream.plan, batch=batch, device=device)
        flows = [] if stream.flow is None else [stream.flow]
        items = read_videos(
            find_videos([video]), fps=stream.fps, geometry=stream.geometry, rgb=stream.flow is None, flows=flows
        )
        batches = []
        for item in items:
            if isinstance(item, Frames):
                frames = item.rgb if stream.flow is None else item.flow[stream.flow.name]
                if frames is not None and len(frames):
                    batches += list(buffer.push(torch.from_numpy(frames)))
        batches += list(buffer.finish())
        with torch.inference_mode():
            for windows in batches:
                clips = stream.backbone.normalise(windows.permute(0, 4, 1, 2, 3))  # (B, C, T, H, W)
                synchronise(device)
                begun = time.perf_counter()
                stream.backbone(clips)
                synchronise(device)
                total += time.perf_counter() - begun
    return total


def synchronise(device: str) -> None:
    """Wait for the GPU, where there is one."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the synthetic video")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "video.mp4"
        make_video(video, duration_s=args.seconds, seed=0, size=(256, 340), fps=30.0)
        for backbones in (["i3d-rgb"], ["i3d-flow"], ["i3d-rgb", "i3d-flow"]):
            for stride in (8, 16):
                recipes = [ExtractRecipe(backbone=name, weights="random", stride=stride) for name in backbones]
                whole, bare, report = float("inf"), float("inf"), None
                for repeat in range(args.repeats):
                    store = Path(folder) / f"{'+'.join(backbones)}-{stride}-{repeat}.zarr"
                    begun = time.perf_counter()
                    found = extract(video, store=store, recipes=recipes, device=args.device, batch=args.batch)
                    seconds = time.perf_counter() - begun
                    if seconds < whole:
                        whole, report = seconds, found
                    bare = min(bare, forward_s(video, recipes, device=args.device, batch=args.batch))
                assert report is not None
                rows.append(
                    {
                        "streams": "+".join(backbones), "stride": stride, "rows": report.rows, "forward_s": bare,
                        "extract_s": whole, "ratio": whole / bare, "video_s_per_s": report.video_s / whole,
                        "decode_s": report.decode_s, "flow_s": report.flow_s, "network_s": report.network_s,
                        "write_s": report.write_s,
                    }
                )  # fmt: skip
                if len(rows) == 1:
                    print(" ".join(f"{key:>16}" for key in rows[0]))
                print(
                    " ".join(f"{v:>16.3f}" if isinstance(v, float) else f"{v!s:>16}" for v in rows[-1].values()),
                    flush=True,
                )
    name = (
        torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or platform.machine()
    )
    print(
        f"{args.seconds:g} s of 340x256 at 30 fps, windows of 16 frames at 224x224, {name}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    if args.out:
        args.out.write_text(json.dumps({"device": name, "threads": torch.get_num_threads(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
