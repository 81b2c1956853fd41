"""Frames of the store and of files, the same ones; what is refused before a training."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from tad.detect.interface import LevelSpec
from tad.errors import RecipeError, StoreError, VideoError
from tad.extract import extract
from tad.extract.flow import FlowStream, build_flow
from tad.extract.inputs import find_videos
from tad.extract.video import FrameReader, Geometry
from tad.joint.augment import Augmentation
from tad.joint.dataset import check_frames
from tad.joint.frames import Box, DecodedFrames, Grid, StoredFrames, open_sources
from tad.store import Level, Store, open_store
from tad.timeline import TimeAxis
from tests.joint.footage import SECONDS, filled, make_footage, recipe

STREAMS = {
    "rgb": recipe(fps=8.0),
    "flow": recipe("tiny-flow", fps=8.0),
    "frames": recipe("frames", fps=8.0),
    "flow-frames": recipe("flow-frames", fps=8.0),
    "plain": recipe(),  # at each file's own rate
}


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_footage(tmp_path_factory.mktemp("footage"))


@pytest.fixture(scope="module")
def store(listed: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return filled(listed, tmp_path_factory.mktemp("store") / "s.zarr", STREAMS)


def all_frames(path: Path, *, fps: float | None, flow: bool) -> np.ndarray:
    """Scaled and uncut, in one go."""
    with FrameReader(path, fps=fps, geometry=Geometry(32, None)) as reader:
        frames = np.concatenate(list(reader))
    if not flow:
        return frames
    stream = FlowStream(build_flow("dis"))
    return np.concatenate([stream.push(frames), stream.finish()])


@pytest.mark.parametrize("stream", ["rgb", "flow"])
def test_stored_and_decoded_frames_are_those_of_the_file(store: Store, listed: Path, stream: str) -> None:
    needs = [LevelSpec(stream)]
    stored = open_sources(store, needs)[stream]
    decoded = open_sources(store, needs, videos=listed)[stream]
    assert isinstance(stored, StoredFrames)
    assert isinstance(decoded, DecodedFrames)
    decoded.chunk_frames = 7
    for file in find_videos([listed]):
        frames = all_frames(file.path, fps=8.0, flow=stream == "flow")
        about = stored.about(file.video)
        assert decoded.about(file.video) == about
        assert (about.frames, about.fps, about.height, about.width) == (len(frames), 8.0, 32, 45)
        assert (about.box.top, about.box.left, about.box.height, about.box.width) == (4, 6, 24, 32)
        count = len(frames)
        reads = [(0, count), (0, 1), (count // 2, count), (count // 3, count // 2 + 1), (count - 1, count), (0, 2)]
        for first, stop in reads:  # forwards, backwards, again
            for source in (stored, decoded):
                found = source.read(file.video, first, stop)
                assert found.dtype == np.uint8
                np.testing.assert_array_equal(found, frames[first:stop])
    decoded.close()


def test_windows_in_order_are_decoded_in_one_pass(store: Store, listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tad.joint import frames as module

    opened: list[Path] = []

    class Counting(FrameReader):
        def __init__(self, path: Path, **options: object) -> None:
            opened.append(path)
            super().__init__(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "FrameReader", Counting)
    files = {file.video: file.path for file in find_videos([listed])}
    source = DecodedFrames(store, files, features="rgb", chunk_frames=4)
    for first in range(0, 40, 5):
        source.read("a/b ünï", first, first + 9)
    assert len(opened) == 1
    assert source._pass is not None
    assert sum(map(len, source._pass._parts)) <= 9 + 2 * 4  # what lies behind is let go
    assert source._pass._reader.decoded < 61  # and the file's end was not reached
    source.read("third", 0, 3)
    source.read("a/b ünï", 0, 3)
    assert len(opened) == 3
    assert pickle.loads(pickle.dumps(source)).read("third", 2, 5).shape == (3, 32, 45, 3)
    source.close()


def test_frames_cut_already_give_the_same_middle(listed: Path, store: Store, tmp_path: Path) -> None:
    """The centre of a centre is up to a pixel beside the centre; extraction's own box counts."""
    for crop in ((24, 32), (25, 33), (29, 41), (32, 45)):
        streams = {"rgb": recipe(), "frames": recipe("frames", crop=crop)}
        with filled(listed, tmp_path / f"{crop[0]}.zarr", streams) as cut:
            source = StoredFrames(cut, "frames", features="rgb")
            whole = DecodedFrames(cut, {"third": listed.parent / "v2.mp4"}, features="rgb")
            boxes = [(source, source.about("third")), (whole, whole.about("third"))]
            parts = []
            for reader, about in boxes:
                box = about.box
                frames = reader.read("third", 3, 9)
                parts.append(frames[:, box.top : box.top + box.height, box.left : box.left + box.width])
            np.testing.assert_array_equal(*parts)
            assert boxes[0][1].room == max(crop[0] - 24, crop[1] - 32)
            whole.close()


def test_a_missing_raw_stream_names_its_command(listed: Path, tmp_path: Path) -> None:
    with filled(listed, tmp_path / "s.zarr", {"rgb": recipe(fps=29.97002997), "flow": recipe("tiny-flow")}) as bare:
        with pytest.raises(StoreError, match="no stream 'frames' with the frames behind 'rgb'") as caught:
            open_sources(bare, [LevelSpec("rgb")])
        path = tmp_path / "s.zarr"
        assert (
            f"tad extract VIDEOS --store {path} --backbone frames --fps 29.97002997 --short-side 32 --crop full\n"
            in str(caught.value)
        )
        with pytest.raises(StoreError, match="no stream 'other' with") as caught:
            open_sources(bare, [LevelSpec("flow")], flow_frames="other")
        assert (
            f"tad extract VIDEOS --store {path} --backbone flow-frames --fps native --short-side 32 --crop full "
            "--flow dis --stream other\n"
        ) in str(caught.value)
        with pytest.raises(StoreError, match=r"no stream 'rbg'\. Did you mean 'rgb'"):
            open_sources(bare, [LevelSpec("rbg")])


@pytest.mark.parametrize(
    ("stream", "raw", "match"),
    [
        ("rgb", recipe("frames"), "fps 8.0 and native"),
        ("rgb", recipe("frames", fps=8.0, short_side=48), "short side 32 and 48"),
        ("rgb", recipe("flow-frames", fps=8.0), "flow none and dis"),
        ("flow", recipe("flow-frames", fps=8.0, flow="farneback"), "flow dis and farneback"),
        ("rgb", recipe(fps=8.0), "holds features, not frames"),
    ],
)
def test_other_frames_are_refused(
    listed: Path, store: Store, tmp_path: Path, stream: str, raw: object, match: str
) -> None:
    shutil.copytree(Path(store.path), tmp_path / "s.zarr")
    extract(listed.parent / "v1.mp4", store=tmp_path / "s.zarr", recipes=raw, names=["odd"])  # type: ignore[arg-type]
    with open_store(tmp_path / "s.zarr") as changed, pytest.raises(RecipeError, match=match):
        StoredFrames(changed, "odd", features=stream)


def test_imported_streams_have_no_frames(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.zarr", "a") as made:
        made.create_stream("rgb", {"imported": True})
        rows = Level(np.zeros((3, 2), np.float32), TimeAxis(1, 0.5, 1))
        made.write("rgb", "v", {"features": rows}, duration_s=3.0, source={"name": "v", "size": 1, "mtime_ns": 1})
        with pytest.raises(RecipeError, match=r"'rgb' .* has no frames to train from: .*imported"):
            Grid.of(made, "rgb")


def test_frames_scaled_to_an_exact_size_come_from_files_alone(listed: Path, store: Store, tmp_path: Path) -> None:
    """As R(2+1)D's are: whatever the aspect."""
    shutil.copytree(Path(store.path), tmp_path / "s.zarr")
    spec = store.stream_attrs("rgb")["spec"] | {"resize": [30, 41], "crop": [24, 32]}
    kept = {key: value for key, value in store.attrs("rgb", "third").items() if key in ("frames", "fps", "size")}
    source = store.attrs("rgb", "third")["source"]
    with open_store(tmp_path / "s.zarr", "a") as changed:
        changed.create_stream("exact", spec)
        level = Level(store["rgb", "third"].numpy(), store["rgb", "third"].axis)
        changed.write("exact", "third", {"features": level}, duration_s=3.3, source=source, attrs=kept)
        with pytest.raises(RecipeError, match=r"scaled to exactly 30x41.*joint\.videos"):
            StoredFrames(changed, "frames", features="exact")
        decoded = DecodedFrames(changed, {"third": listed.parent / "v2.mp4"}, features="exact")
        about = decoded.about("third")
        assert (about.height, about.width, about.box) == (30, 41, Box(3, 4, 24, 32))
        with FrameReader(listed.parent / "v2.mp4", fps=8.0, geometry=Geometry(1, None, (30, 41))) as reader:
            np.testing.assert_array_equal(decoded.read("third", 0, about.frames), np.concatenate(list(reader)))
        decoded.close()


def test_a_file_that_cannot_be_decoded_is_named(listed: Path, store: Store, tmp_path: Path) -> None:
    """Of the same length in bytes, so that only decoding tells."""
    path = tmp_path / "v2.mp4"
    path.write_bytes(bytes((listed.parent / "v2.mp4").stat().st_size))
    source = DecodedFrames(store, {"third": path}, features="rgb")
    assert source.about("third").frames > 20
    with pytest.raises(VideoError, match=r"v2\.mp4"):
        source.read("third", 0, 5)


def test_videos_without_their_frames_are_listed(listed: Path, tmp_path: Path) -> None:
    streams = {"rgb": recipe(), "frames": recipe("frames"), "tall": recipe(crop=(40, 60))}
    filled(listed, tmp_path / "s.zarr", streams).close()
    needs = [LevelSpec("rgb")]
    with open_store(tmp_path / "s.zarr", "a") as store:
        store.delete("frames", "short")
        again = {"frames": recipe("frames")}
        other = tmp_path / "other.txt"
        other.write_text(f"third\t{listed.parent / 'v1.mp4'}", encoding="utf-8")
        extract(other, store=store, recipes=list(again.values()), names=list(again), overwrite=True)
        sources = open_sources(store, needs)
        found = check_frames(store, needs, sources, sorted(SECONDS), augmentation=Augmentation(random_crop=True))
        told = {failure.video: failure.message for failure in found.failures}
        assert sorted(told) == ["short", "third"]
        assert "has no frames of it; extract them with\n  tad extract VIDEOS" in told["short"]
        assert "has 4 frames at 10 fps, but 'rgb' was made of 33" in told["third"]
        assert found.messages == []  # there is room
        none = check_frames(store, needs, sources, ["short", "third"], augmentation=Augmentation())
        assert [failure.video for failure in none.failures] == ["short", "third"]
        tall = open_sources(store, [LevelSpec("tall")])["tall"]  # its crop does not fit: frames were scaled up for it
        with pytest.raises(StoreError, match=r"32x45 .*'tall' was made of 40x60 .*--crop full.*joint\.videos"):
            tall.about("a/b ünï")


def test_files_that_changed_or_are_missing_are_found_before_decoding(
    listed: Path, store: Store, tmp_path: Path
) -> None:
    files = {"short": tmp_path / "short.mp4", "third": listed.parent / "v0.mp4", "a/b ünï": tmp_path / "gone.mp4"}
    shutil.copy(listed.parent / "v1.mp4", files["short"])  # another name and time, the same file
    source = DecodedFrames(store, files, features="rgb")
    assert source.about("short").frames == StoredFrames(store, "frames", features="rgb").about("short").frames
    with pytest.raises(StoreError, match=r"'third': .*v0\.mp4 is not the file that 'rgb' was extracted from"):
        source.about("third")
    with pytest.raises(VideoError, match=r"gone\.mp4"):
        source.about("a/b ünï")
    del source.files["third"]
    with pytest.raises(StoreError, match=r"'third' is not among the 2 files of joint\.videos\. Known: a/b ünï, short"):
        source.about("third")
    with pytest.raises(VideoError, match=r"short\.mp4: has \d frames, the features were made of"):
        source.read("short", 0, 30)


def test_no_room_for_random_cuts_is_said(listed: Path, tmp_path: Path) -> None:
    streams = {"rgb": recipe(), "frames": recipe("frames", crop=(24, 32))}
    with filled(listed, tmp_path / "s.zarr", streams) as store:
        needs = [LevelSpec("rgb")]
        options = store, needs, open_sources(store, needs), sorted(SECONDS)
        found = check_frames(*options, augmentation=Augmentation(random_crop=True))
        assert found.failures == []
        assert len(found.messages) == 1
        assert "'rgb' are no larger than its crop" in found.messages[0]
        assert check_frames(*options, augmentation=Augmentation(flip=True)).messages == []
