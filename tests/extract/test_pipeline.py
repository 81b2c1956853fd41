"""``extract`` as a whole, against windows cut by hand out of the whole video."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tad.errors import RecipeError, StoreError, WeightsError
from tad.extract import build_backbone, extract
from tad.extract.flow import FlowStream, build_flow
from tad.extract.video import FrameReader, Geometry, crop
from tad.recipe import ExtractRecipe
from tad.store import open_store
from tad.synth import make_video

SIZE = (72, 96)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for number, seconds in enumerate((0.3, 2.3, 5.0)):
        make_video(root / f"v{number}.mp4", duration_s=seconds, seed=number, size=SIZE, fps=10.0)
    return root


def recipe(**changes: object) -> ExtractRecipe:
    values: dict[str, object] = {"backbone": "tiny", "weights": "random:3", "window": 16, "stride": 8}
    return ExtractRecipe(**{**values, **changes})  # type: ignore[arg-type]


def whole(path: Path, geometry: Geometry, fps: float | None = None) -> tuple[np.ndarray, float]:
    """All frames of a video, cut, (F, H, W, 3), and the grid's rate."""
    with FrameReader(path, fps=fps, geometry=geometry) as reader:
        frames = np.concatenate(list(reader))
        return crop(frames, reader.plan), reader.fps


def reference(frames: np.ndarray, name: str, window: int, stride: int, interval: int = 1) -> np.ndarray:
    """Rows window by window, one at a time, from all frames in memory."""
    backbone = build_backbone(name, weights="random:3").eval()
    span = (window - 1) * interval + 1
    rows = max(1, int(np.ceil((len(frames) - span) / stride)) + 1)
    out = []
    for row in range(rows):
        index = np.minimum(row * stride + np.arange(window) * interval, len(frames) - 1)
        clip = torch.from_numpy(frames[index].copy()).permute(3, 0, 1, 2)[None]  # (1, C, T, H, W)
        with torch.inference_mode():
            out.append(backbone(backbone.normalise(clip))["features"][0].numpy())
    return np.stack(out)


@pytest.mark.parametrize(
    "changes", [{}, {"stride": 5, "interval": 2, "window": 9}, {"fps": 5.0}, {"fps": 25.0, "stride": 20}]
)
@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_rows_equal_those_of_windows_cut_by_hand(
    tmp_path: Path, videos: Path, changes: dict[str, object], format: str
) -> None:
    chosen = recipe(**changes)
    report = extract(videos, store=tmp_path / "s", recipes=chosen, format=format, batch=3)
    assert report.failures == []
    spec = build_backbone("tiny").spec
    with open_store(tmp_path / "s") as store:
        assert store.format == format
        for path in sorted(videos.glob("*.mp4")):
            frames, fps = whole(path, Geometry(spec.short_side, spec.crop), chosen.fps)
            expected = reference(frames, "tiny", chosen.window or 0, chosen.stride or 0, chosen.interval or 1)
            feature = store["tiny", path.stem]
            assert feature.shape == expected.shape
            np.testing.assert_allclose(feature.numpy(), expected, rtol=1e-4, atol=1e-5 * expected.std())
            span = ((chosen.window or 0) - 1) * (chosen.interval or 1) + 1
            assert feature.axis.scale_s == pytest.approx((chosen.stride or 0) / fps)
            assert feature.axis.translation_s == pytest.approx(0.5 * span / fps)
            assert feature.duration_s == pytest.approx(len(frames) / fps, abs=0.51 / fps)
            assert feature.axis.span_s(feature.shape[0] - 1)[1] >= feature.duration_s - 1e-6  # the end is covered


def test_flow_and_rgb_share_a_pass_and_equal_each_alone(tmp_path: Path, videos: Path) -> None:
    both = [recipe(), recipe(backbone="tiny-flow")]
    extract(videos, store=tmp_path / "both", recipes=both, batch=4)
    extract(videos, store=tmp_path / "alone", recipes=both[1], batch=2)
    spec = build_backbone("tiny-flow").spec
    with open_store(tmp_path / "both") as store, open_store(tmp_path / "alone") as alone:
        assert store.streams() == ["tiny", "tiny-flow"]
        for video in store.videos("tiny-flow"):
            got = store["tiny-flow", video].numpy()
            np.testing.assert_allclose(got, alone["tiny-flow", video].numpy(), rtol=1e-4, atol=1e-6)
            with FrameReader(videos / f"{video}.mp4", geometry=Geometry(spec.short_side, spec.crop)) as reader:
                estimator = FlowStream(build_flow("dis"))
                frames = np.concatenate(list(reader))
                flow = crop(np.concatenate([estimator.push(frames), estimator.finish()]), reader.plan)
            np.testing.assert_allclose(got, reference(flow, "tiny-flow", 16, 8), rtol=1e-4, atol=1e-5 * got.std())
            assert store["tiny", video].shape[0] == got.shape[0]


def test_levels_of_one_window_are_its_maps(tmp_path: Path, videos: Path) -> None:
    # one window covers the whole video, so that the joined level must be the network's own map, averaged over space
    extract(videos / "v1.mp4", store=tmp_path / "s", recipes=recipe(window=32, stride=32, levels=True))
    backbone = build_backbone("tiny", weights="random:3").eval()
    frames, fps = whole(videos / "v1.mp4", Geometry(backbone.spec.short_side, backbone.spec.crop))
    index = np.minimum(np.arange(32), len(frames) - 1)
    with torch.inference_mode():
        maps = backbone(
            backbone.normalise(torch.from_numpy(frames[index].copy()).permute(3, 0, 1, 2)[None]), levels=True
        )
    with open_store(tmp_path / "s") as store:
        assert set(store.levels("tiny", "v1")) == {"features", *backbone.spec.levels}
        for level, info in backbone.spec.levels.items():
            feature = store["tiny", "v1", level]
            assert feature.shape == (-(-len(frames) // info.stride), info.channels)
            expected = maps[level][0].mean(dim=(-2, -1)).T.numpy()[: feature.shape[0]]
            np.testing.assert_allclose(feature.numpy(), expected, rtol=1e-4, atol=1e-5)
            assert feature.axis.scale_s == pytest.approx(info.stride / fps)
            assert feature.axis.translation_s == pytest.approx(info.stride / 2 / fps)


def test_again_does_nothing_and_a_changed_file_is_done_again(tmp_path: Path, videos: Path) -> None:
    own = tmp_path / "videos"
    own.mkdir()
    for path in videos.glob("*.mp4"):
        (own / path.name).write_bytes(path.read_bytes())
    first = extract(own, store=tmp_path / "s", recipes=recipe())
    assert (first.written, first.already, first.videos) == (3, 0, ["v0", "v1", "v2"])
    again = extract(own, store=tmp_path / "s", recipes=recipe())
    assert (again.written, again.already, again.videos, again.network_s) == (0, 3, ["v0", "v1", "v2"], 0.0)
    os.utime(own / "v1.mp4", ns=(1, 1))
    assert extract(own, store=tmp_path / "s", recipes=recipe()).written == 1
    assert extract(own, store=tmp_path / "s", recipes=recipe(), overwrite=True).written == 3


def test_one_bad_video_never_stops_a_run(tmp_path: Path, videos: Path) -> None:
    own = tmp_path / "videos"
    own.mkdir()
    (own / "a_bad.mp4").write_bytes(b"this is not a video at all")
    (own / "b_good.mp4").write_bytes((videos / "v1.mp4").read_bytes())
    (own / "c_empty.mp4").write_bytes(b"")
    report = extract([own, own / "d_missing.mp4"], store=tmp_path / "s", recipes=recipe())
    assert (report.written, report.videos) == (1, ["b_good"])
    lines = [json.loads(line) for line in (tmp_path / "s/failures.jsonl").read_text().splitlines()]
    assert {line["video"] for line in lines} == {"a_bad", "c_empty", "d_missing"}
    assert all(line["error"] == "VideoError" and line["path"] and line["message"] for line in lines)
    # a video that is mended leaves the list
    (own / "a_bad.mp4").write_bytes((videos / "v0.mp4").read_bytes())
    extract(own, store=tmp_path / "s", recipes=recipe())
    assert {json.loads(line)["video"] for line in (tmp_path / "s/failures.jsonl").read_text().splitlines()} == {
        "c_empty",
        "d_missing",
    }


def test_a_stream_is_bound_to_its_recipe(tmp_path: Path, videos: Path) -> None:
    extract(videos, store=tmp_path / "s", recipes=recipe())
    with pytest.raises(StoreError, match="stride"):
        extract(videos, store=tmp_path / "s", recipes=recipe(stride=4))
    with pytest.raises(StoreError, match="weights"):
        extract(videos, store=tmp_path / "s", recipes=recipe(weights="random:4"))
    extract(videos, store=tmp_path / "s", recipes=recipe(stride=4), names=["tiny-4"])
    with open_store(tmp_path / "s") as store:
        assert store.streams() == ["tiny", "tiny-4"]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"weights": None}, WeightsError, "random"),
        ({"backbone": "tinny"}, RecipeError, "tiny"),
        ({"flow": "dis"}, RecipeError, "RGB"),
        ({"window": 14, "levels": True}, RecipeError, "multiple"),
        ({"weights": "absent.pt"}, WeightsError, "absent.pt"),
    ],
)
def test_recipes_that_cannot_be_are_refused_before_anything_is_written(
    tmp_path: Path, videos: Path, changes: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        extract(videos, store=tmp_path / "s", recipes=recipe(**changes))
    assert not (tmp_path / "s").exists()


def test_crops_square_rectangular_and_full(tmp_path: Path, videos: Path) -> None:
    i3d = {"backbone": "i3d-rgb", "short_side": 64, "stride": 16}
    for name, size in (("square", (64, 64)), ("rectangular", (48, 72)), ("full", "full")):
        extract(videos / "v1.mp4", store=tmp_path / "s", recipes=recipe(**i3d, crop=size), names=[name])
    with open_store(tmp_path / "s") as store:
        rows = {name: store[name, "v1"].numpy() for name in store.streams()}
        frames, _ = whole(videos / "v1.mp4", Geometry(64, None))
        assert store["full", "v1"].attrs["frames"] == len(frames)
    assert frames.shape[1:3] == (64, 85)
    np.testing.assert_allclose(rows["full"], reference(frames, "i3d-rgb", 16, 16), rtol=1e-3, atol=1e-5)
    assert not np.allclose(rows["square"], rows["full"], rtol=1e-2)
    assert not np.allclose(rows["square"], rows["rectangular"], rtol=1e-2)


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    """Ten minutes against half a minute: all frames of the long one would be 83 MB, its rows are under 1 MB."""
    peaks = {}
    for seconds in (30, 600):
        path = tmp_path / f"v{seconds}.mp4"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 5.0, (128, 96))
        ramp = np.tile(np.arange(128, dtype=np.uint8), (96, 1))
        for index in range(seconds * 5):
            writer.write(cv2.merge([np.roll(ramp, index), ramp, np.roll(ramp, -index)]))
        writer.release()
        code = f"""
            import resource, torch
            torch.set_num_threads(1)
            from tad.extract import extract
            from tad.recipe import ExtractRecipe
            same = dict(weights="random", stride=16, short_side=96, crop=(96, 96))
            recipes = [ExtractRecipe(backbone=n, **same) for n in ("tiny", "tiny-flow")]
            report = extract({str(path)!r}, store={str(tmp_path / f"s{seconds}")!r}, recipes=recipes, batch=4)
            assert report.video_s > {seconds} - 1, report
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        """
        out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
        peaks[seconds] = int(out.stdout) / 1024  # MiB
    assert peaks[600] < peaks[30] + 30, peaks


def test_every_real_video_goes_into_both_kinds_of_store(tmp_path: Path, shared: Path) -> None:
    files = json.loads((shared / "data/videos/videos.json").read_text())["videos"]
    same = {"stride": 16, "short_side": 32, "crop": (32, 32)}  # the same frames, so that each is decoded once
    recipes = [recipe(backbone=name, **same) for name in ("tiny", "tiny-flow")]
    for format in ("zarr", "hdf5"):
        report = extract(shared / "data/videos", store=tmp_path / format, recipes=recipes, format=format)
        assert not report.failures
        assert report.written == 2 * len(files)
        assert report.video_s == pytest.approx(
            sum(f["decoded_frames"] / eval(f["average_rate"]) for f in files.values()), rel=0.01
        )
        with open_store(tmp_path / format) as store:
            assert store.verify(deep=True).ok
            assert {"mmaction2_test.mp4", "mmaction2_test.avi", "v_GGSY1Qvo990"} <= set(store.videos("tiny"))
        assert extract(shared / "data/videos", store=tmp_path / format, recipes=recipes).already == 2 * len(files)
