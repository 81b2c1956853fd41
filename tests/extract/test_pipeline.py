"""``extract`` as a whole, against windows cut by hand out of the whole video."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from tad.errors import RecipeError, StoreError, VideoError, WeightsError
from tad.extract import build_backbone, extract, pipeline
from tad.extract.flow import FlowStream, build_flow
from tad.extract.frames import Frames
from tad.extract.outcome import ExtractReport
from tad.extract.pipeline import VideoRun
from tad.extract.report import dry_run
from tad.extract.rows import level_of
from tad.extract.streams import resolve
from tad.extract.video import FrameReader, Geometry, VideoInfo, crop, source_of
from tad.progress import Progress, silent
from tad.recipe import ExtractRecipe
from tad.store import open_store
from tad.synth import make_video
from tests.extract.videofiles import LOSSLESS, write_coded

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


def test_a_file_that_breaks_the_decoder_never_stops_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "videos"
    own.mkdir()
    data = write_coded(own / "good.mp4", 20).read_bytes()
    at = data.rindex(b"avc1")
    (own / "bad.mp4").write_bytes(data[:at] + b"zzz9" + data[at + 4 :])
    plan = dry_run([own], store=str(tmp_path / "s"), recipes=[recipe()])
    assert [failure["video"] for failure in plan["failures"]] == ["bad"]
    probe = pipeline.probe

    def strange(path: Path) -> VideoInfo:
        if path.stem == "strange":
            raise MemoryError("so large a picture")
        return probe(path)

    (own / "strange.mp4").write_bytes(data)
    monkeypatch.setattr(pipeline, "probe", strange)
    report = extract(own, store=tmp_path / "s", recipes=recipe())
    assert (report.written, report.videos) == (1, ["good"])
    errors = {failure.video: failure.error for failure in report.failures}
    assert errors == {"bad": "VideoError", "strange": "MemoryError"}


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grows = tmp_path / "grows.mp4"
    grows.write_bytes((videos / "v0.mp4").read_bytes())
    finish = VideoRun.finish

    def meanwhile(self: VideoRun) -> float:
        if self.begin.file.video == "grows":
            grows.write_bytes((videos / "v1.mp4").read_bytes())
        return finish(self)

    monkeypatch.setattr(VideoRun, "finish", meanwhile)
    report = extract([grows, videos / "v2.mp4"], store=tmp_path / "s", recipes=recipe())
    assert report.videos == ["v2"]
    assert ["changed while it was read" in failure.message for failure in report.failures] == [True]
    monkeypatch.undo()
    again = extract(grows, store=tmp_path / "s", recipes=recipe())
    assert (again.written, again.failures) == (1, [])
    with open_store(tmp_path / "s") as store:
        assert store["tiny", "grows"].duration_s == pytest.approx(2.3)
        assert store.attrs("tiny", "grows")["source"] == source_of(grows)


def test_an_id_belongs_to_one_file(tmp_path: Path, videos: Path) -> None:
    one, two = tmp_path / "one/game.mp4", tmp_path / "two/game.mkv"
    for path, video in ((one, "v0"), (two, "v1")):
        path.parent.mkdir()
        path.write_bytes((videos / f"{video}.mp4").read_bytes())
    same: dict[str, Any] = {"store": tmp_path / "s", "recipes": recipe()}
    assert extract(one, **same).written == 1
    planned = dry_run([two], store=str(tmp_path / "s"), recipes=[recipe()])
    for failures in (extract(two, **same).failures, extract(two, **same).failures):  # tried again, refused again
        assert [failure.video for failure in failures] == ["game"]
        assert re.search(r"id 'game' is taken by game\.mp4 .*another id in a list.*--overwrite", failures[0].message)
        assert [failure["message"] for failure in planned["failures"]] == [failures[0].message]
    assert len((tmp_path / "s/failures.jsonl").read_text().splitlines()) == 1
    assert extract(one, **same).already == 1
    # nor is another stream of the same call begun
    streams = {"recipes": [recipe(), recipe(stride=4)], "names": ["tiny", "fine"]}
    assert extract(two, **{**same, **streams}).written == 0
    # one file that has changed is the same video, wherever it lies
    moved = tmp_path / "two/game.mp4"
    moved.write_bytes((videos / "v1.mp4").read_bytes())
    assert extract(moved, **same).written == 1
    (tmp_path / "list.txt").write_text("other game\ttwo/game.mkv\n")
    assert extract(tmp_path / "list.txt", **same).videos == ["other game"]
    assert extract(two, **same, overwrite=True).written == 1
    with open_store(tmp_path / "s") as store:
        assert store.attrs("tiny", "game")["source"]["name"] == "game.mkv"
        assert store["tiny", "game"].shape == store["tiny", "other game"].shape


def test_an_entry_without_a_name_is_made_again(tmp_path: Path, videos: Path) -> None:
    extract(videos / "v0.mp4", store=tmp_path / "s", recipes=recipe())
    with open_store(tmp_path / "s", "a") as store:
        feature = store["tiny", "v0"]
        level = level_of(feature.numpy(), feature.axis, 10.0, 8, 16, 3)
        store.write("tiny", "v0", {"features": level}, duration_s=0.3, source={"size": 7}, overwrite=True)
    report = extract(videos / "v0.mp4", store=tmp_path / "s", recipes=recipe())
    assert (report.written, report.failures) == (1, [])


def test_an_id_that_is_taken_meanwhile(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "v0.mkv"
    own.write_bytes((videos / "v0.mp4").read_bytes())
    finish = VideoRun.finish

    def meanwhile(self: VideoRun) -> float:
        monkeypatch.setattr(VideoRun, "finish", finish)
        assert extract(videos / "v0.mp4", store=tmp_path / "s", recipes=recipe()).written == 1
        return finish(self)

    monkeypatch.setattr(VideoRun, "finish", meanwhile)
    report = extract(own, store=tmp_path / "s", recipes=recipe())
    assert (report.written, ["taken by v0.mp4" in failure.message for failure in report.failures]) == (0, [True])


@pytest.mark.parametrize(("where", "both"), [("push", True), ("push", False), ("finish", False), ("begin", False)])
def test_a_video_that_the_network_refuses_is_left_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, both: bool
) -> None:
    write_coded(tmp_path / "a.mp4", 450 if where != "finish" else 20)
    write_coded(tmp_path / "b.mp4", 70)
    grabbed: Counter[str] = Counter()
    grab, run = FrameReader._grab, VideoRun

    def counted(self: FrameReader) -> bool:
        grabbed[Path(self.path).stem] += 1
        return grab(self)

    class Refusing(run):  # type: ignore[valid-type, misc]
        def refuse(self, here: str) -> None:
            if here == where and self.begin.file.video == "a":
                raise RuntimeError("no room for it")

        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            self.refuse("begin")

        def push(self, item: Frames) -> float:
            self.refuse("push")
            return float(super().push(item))

        def finish(self) -> float:
            self.refuse("finish")
            return float(super().finish())

    monkeypatch.setattr(FrameReader, "_grab", counted)
    monkeypatch.setattr(pipeline, "VideoRun", Refusing)
    small: dict[str, Any] = {"short_side": 32, "crop": (32, 32)}
    recipes = [recipe(**small), recipe(backbone="tiny-flow", **small)][: 1 + both]
    reports: list[ExtractReport] = []
    files = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    work = threading.Thread(
        target=lambda: reports.append(extract(files, store=tmp_path / "s", recipes=recipes)), daemon=True
    )
    work.start()
    work.join(60)
    assert reports, "the extraction hangs"
    assert [(failure.video, failure.message) for failure in reports[0].failures] == [
        ("a", "RuntimeError: no room for it")
    ]
    assert (reports[0].videos, reports[0].written) == (["b"], 1 + both)
    assert reports[0].video_s == pytest.approx(70 / 30)
    assert grabbed["b"] == 70
    assert grabbed["a"] <= 8 * 32 + 1  # what the queue holds, what is being made, what is held back
    with open_store(tmp_path / "s") as store:
        assert list(store) == [(recipe.backbone, "b") for recipe in recipes]


def test_a_video_that_fails_twice_is_listed_once(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: VideoRun, item: Frames) -> float:
        raise RuntimeError("no room for it")

    def unreadable(self: FrameReader) -> Iterator[np.ndarray]:
        yield np.zeros((32, *self.plan.resized, 3), np.uint8)
        raise VideoError("damaged")

    monkeypatch.setattr(VideoRun, "push", refuse)
    monkeypatch.setattr(FrameReader, "_pass", unreadable)
    report = extract([videos / "v1.mp4", videos / "v2.mp4"], store=tmp_path / "s", recipes=recipe())
    assert [failure.video for failure in report.failures] == ["v1", "v2"]


def test_a_late_clock_changes_no_forecast(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "late.mkv", 60, ticks=[450_000 + 3000 * i for i in range(60)], **LOSSLESS)
    totals = []

    @contextmanager
    def watching(total: float, label: str, unit: str) -> Iterator[Progress]:
        totals.append(total)
        with silent(total, label, unit) as bar:
            yield bar

    for chosen in (recipe(), recipe(backbone="frames", weights=None, window=None, stride=None)):
        plan = dry_run([path], store=str(tmp_path / "s"), recipes=[chosen])
        report = extract(path, store=tmp_path / "s", recipes=chosen, progress=watching)
        assert [entry["rows"] for entry in plan["entries"]] == [report.rows]
        assert plan["video_s"] == pytest.approx(report.video_s, abs=1e-3)
    assert totals == pytest.approx([2.0, 2.0])


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


@pytest.mark.parametrize("batch", [0, -1])
@pytest.mark.parametrize("workers", [None, 1])
def test_a_batch_holds_at_least_one_window(tmp_path: Path, videos: Path, batch: int, workers: int | None) -> None:
    with pytest.raises(RecipeError, match="batch must be at least 1"):
        extract(videos, store=tmp_path / "s", recipes=recipe(), batch=batch, workers=workers)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("device", "words"), [("cuda", "no CUDA here"), ("cuda:7", "no CUDA"), ("foo", "unknown dev")])
def test_a_device_that_is_not_there(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch, device: str, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=words):
        extract(videos, store=tmp_path / "s", recipes=recipe(), device=device)
    with pytest.raises(RecipeError, match=words):
        resolve(recipe(), device=device)  # as a worker does
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
