"""Decoding: which frame comes at which time, upright, from files as messy as they are found."""

from __future__ import annotations

import builtins
import gc
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tad.errors import RecipeError, VideoError
from tad.extract import decoders, video
from tad.extract.video import FrameReader, Geometry, Plan, crop, probe, source_of
from tests.extract.videofiles import (
    LOSSLESS,
    coded,
    index_of,
    times_of,
    write_coded,
    write_cut,
    write_lying_avi,
    write_sound,
    write_video,
    write_without_frames,
)

FULL = Geometry(48, None)  # the size of coded frames: nothing is scaled
GAPS = [3003, 1500, 1501, 9000, 400, 27000, 3003, 3003, 6006, 1200, 3003, 90, 90, 18000, 2000, 3003]
VARIABLE = [int(tick) for tick in np.cumsum([0, *(GAPS * 5)])]  # in 1/90000 s


def read(path: Path, **options: Any) -> tuple[np.ndarray, FrameReader]:
    """All frames of a file and the reader after its pass."""
    with FrameReader(path, **{"geometry": FULL, **options}) as reader:
        frames = np.concatenate(list(reader))
    assert len(frames) == reader.frames
    return frames, reader


def nearest(path: Path, fps: Fraction) -> list[int]:
    """What the grid should hold, from PyAV's exact timestamps and every distance."""
    times = times_of(path)
    duration = times[-1] + times[-1] / (len(times) - 1)
    frames = max(1, round(duration * fps))
    return [min(range(len(times)), key=lambda index: abs(times[index] - k / fps)) for k in range(frames)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of well-formed files that several tests read."""
    folder = tmp_path_factory.mktemp("videos")
    write_coded(folder / "constant.mp4", 90)
    write_coded(folder / "variable.mp4", len(VARIABLE), ticks=VARIABLE)
    write_coded(folder / "variable.mkv", len(VARIABLE), ticks=VARIABLE, **LOSSLESS)
    return folder


@pytest.fixture
def pyav_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV opens files but decodes nothing, as with AV1."""
    monkeypatch.setattr(decoders.OpenCVDecoder, "grab", lambda self: False)


# ---- which frame at which time --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "rate", [Fraction(30000, 1001), Fraction(24000, 1001), Fraction(981, 50), Fraction(25), Fraction(60)]
)
@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("mp4", {}),
        ("mkv", LOSSLESS),
        ("webm", {"codec": "libvpx"}),
        ("avi", {"codec": "mpeg4"}),
        ("ts", {}),
    ],
)
def test_a_constant_rate_comes_back_frame_by_frame(tmp_path: Path, rate: Fraction, suffix: str, options: Any) -> None:
    frames, reader = read(write_coded(tmp_path / f"a.{suffix}", 70, rate=rate, **options))
    assert [index_of(frame) for frame in frames] == list(range(70))
    estimated = suffix == "ts"  # MPEG-TS states no rate, FFmpeg guesses it from the first frames
    assert reader.fps == reader.info.fps == pytest.approx(float(rate), rel=2e-3 if estimated else 1e-6)
    assert (reader.frames, reader.decoded, reader.truncated, reader.timestamps) == (70, 70, False, "pts")
    assert reader.duration_s == pytest.approx(float(70 / rate), abs=2e-3)
    assert (reader.repaired, reader.notes) == (0, ())


@pytest.mark.parametrize("fps", [5, 10, 15, 25, 30, 40, 60])
def test_a_constant_rate_resampled(files: Path, fps: int) -> None:
    frames, reader = read(files / "constant.mp4", fps=float(fps))
    assert [index_of(frame) for frame in frames] == nearest(files / "constant.mp4", Fraction(fps))
    assert reader.frames == 3 * fps
    assert reader.decoded == 90
    if fps == 10:
        assert [index_of(frame) for frame in frames] == list(range(0, 90, 3))


def test_ten_frames_a_second_shown_at_thirty(tmp_path: Path) -> None:
    frames, _ = read(write_coded(tmp_path / "a.mp4", 20, rate=10), fps=30.0)
    assert [index_of(frame) for frame in frames] == nearest(tmp_path / "a.mp4", Fraction(30))
    assert len(frames) == 60


@pytest.mark.parametrize("name", ["variable.mp4", "variable.mkv"])
@pytest.mark.parametrize(
    "fps", [Fraction(3), Fraction(8), Fraction(10), Fraction(25), Fraction(30), Fraction(30000, 1001)]
)
def test_a_variable_rate_gives_the_nearest_frames(files: Path, name: str, fps: Fraction) -> None:
    frames, reader = read(files / name, fps=float(fps))
    assert [index_of(frame) for frame in frames] == nearest(files / name, fps)
    assert reader.timestamps == "pts"
    assert reader.decoded == len(VARIABLE)
    assert not reader.truncated


def test_a_gap_that_nobody_could_foresee(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Steady 30 fps read at 3: frame 36 is passed over, as 40 would be nearest to 1.333 s; but nothing comes until 5 s.
    ticks = [3000 * index for index in range(37)] + [450_000 + 3000 * index for index in range(30)]
    path = write_coded(tmp_path / "gap.mkv", len(ticks), ticks=ticks, **LOSSLESS)
    went_back = []
    again = FrameReader._again
    monkeypatch.setattr(FrameReader, "_again", lambda self, index: went_back.append(index) or again(self, index))
    frames, reader = read(path, fps=3.0)
    assert [index_of(frame) for frame in frames] == nearest(path, Fraction(3))
    assert reader.decoded == len(ticks)
    assert went_back == [36]


class FakeDecoder:
    """Times given, every frame one pixel that holds its index."""

    name = "fake"

    def __init__(self, times_s: list[float], header_frames: int | None = None) -> None:
        self.times_s = times_s
        self.header_frames = header_frames
        self.index = 0

    def grab(self) -> bool:
        self.index += 1
        return self.index < len(self.times_s)

    def time_s(self) -> float:
        return self.times_s[self.index]

    def retrieve(self) -> np.ndarray | None:
        return None if self.index >= len(self.times_s) else np.full((1, 1, 3), self.index % 256, np.uint8)

    def header(self) -> decoders.Header:
        duration_s = None if self.header_frames is None else self.header_frames / 30
        return decoders.Header("fake", 30.0, self.header_frames, duration_s, 0.0, 0)

    def close(self) -> None:
        pass


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([1, 10, 33, 34, 40, 100, 333, 1000]), max_size=40),
    st.sampled_from([Fraction(2), Fraction(5), Fraction(10), Fraction(16), Fraction(25), Fraction(30), Fraction(90)]),
    st.integers(1, 9),
)
def test_any_gaps_any_rate_any_chunks(gaps_ms: list[int], fps: Fraction, chunk_frames: int) -> None:
    times = [Fraction(int(time), 1000) for time in np.cumsum([0, *gaps_ms])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "open_decoder", lambda *_, **__: FakeDecoder([float(time) + 3.0 for time in times]))
        reader = FrameReader("fake", geometry=Geometry(1, None), fps=float(fps), chunk_frames=chunk_frames)
        frames = np.concatenate(list(reader))
    assert len(frames) == reader.frames == max(1, round(reader.duration_s * reader.fps))
    best = [min(range(len(times)), key=lambda index: abs(times[index] - k / fps)) for k in range(len(frames))]
    assert frames[:, 0, 0, 0].tolist() == best
    assert reader.decoded == len(times)
    assert reader.repaired == 0


def test_only_wanted_frames_are_converted(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = []
    retrieve = decoders.OpenCVDecoder.retrieve
    monkeypatch.setattr(decoders.OpenCVDecoder, "retrieve", lambda self: converted.append(1) or retrieve(self))
    read(files / "constant.mp4", fps=10.0)
    assert len(converted) <= 30 + 4  # of 90; the first frame is looked at when the file is opened
    converted.clear()
    read(files / "constant.mp4", fps=90.0)
    assert len(converted) <= 90 + 4  # frames that are given three times are converted once


def test_a_stream_that_does_not_start_at_zero(tmp_path: Path) -> None:
    for suffix, options in (("mp4", {}), ("mkv", LOSSLESS), ("ts", {})):
        ticks = [450_000 + 3000 * index for index in range(60)]
        _, reader = read(write_coded(tmp_path / f"late.{suffix}", 60, ticks=ticks, **options))
        assert (reader.frames, reader.decoded, reader.truncated) == (60, 60, False)
        assert reader.duration_s == pytest.approx(2.0, abs=2e-3)
        assert reader.info.start_s == pytest.approx(5.0, abs=0.05) or suffix == "ts"  # TS adds its own delay


def test_one_frame(tmp_path: Path) -> None:
    for fps, expected in ((None, 1), (1.0, 1), (75.0, 3)):
        frames, reader = read(write_coded(tmp_path / "one.mkv", 1, rate=25, **LOSSLESS), fps=fps)
        assert len(frames) == reader.frames == expected
        assert reader.decoded == 1
        assert reader.duration_s == pytest.approx(0.04)


def test_without_timestamps_frames_are_counted(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "raw.h264", 50, container="h264")  # an elementary stream has no times
    frames, reader = read(path)
    assert [index_of(frame) for frame in frames] == list(range(50))
    assert reader.timestamps == "index"
    assert reader.repaired == 49
    assert "25 fps" in reader.notes[0]
    assert reader.info.header_frames is None
    half, _ = read(path, fps=12.5)
    assert [index_of(frame) for frame in half] == list(range(0, 50, 2))


def test_a_rate_that_is_a_clock_is_measured(tmp_path: Path) -> None:
    # H.264 with B-frames and odd times in AVI: the header counts ticks, 600 a second, and times come in decoding order.
    path = write_coded(tmp_path / "ticks.avi", 60, ticks=[3000 * index for index in range(60)])
    assert probe(path).header_frames != 60
    frames, reader = read(path)
    assert [index_of(frame) for frame in frames] == list(range(60))
    assert reader.fps == pytest.approx(30, rel=1e-6)
    assert not reader.truncated


# ---- files that lie or are broken -----------------------------------------------------------------------------------
def test_a_truncated_file_is_flagged_and_used(tmp_path: Path) -> None:
    path = write_cut(tmp_path / "cut.mp4", 300, 0.6)
    frames, reader = read(path)
    assert 30 < reader.decoded < 290
    assert [index_of(frame) for frame in frames] == list(range(reader.decoded))
    assert reader.truncated
    assert reader.info.header_frames == 300
    assert reader.info.header_duration_s == pytest.approx(10.0)
    assert "cut off or damaged" in reader.notes[0]
    assert "10.00 s" in reader.notes[0]


@pytest.mark.parametrize(
    ("frames", "rate", "header_frames", "truncated"),
    [
        (100, 30, 100, False),
        (98, 30, 100, False),
        (97, 30, 100, True),
        (980, 30, 1000, False),
        (979, 30, 1000, True),
        (1, 30, 3, False),
        (50, 15, 100, False),  # half the frames in the whole time: a variable rate
        (100, 60, 100, False),  # all the frames in half the time: the last one lasts
        (200, 30, 100, False),
        (50, 30, None, False),
    ],
)
def test_truncated_means_frames_and_seconds_are_missing(
    monkeypatch: pytest.MonkeyPatch, frames: int, rate: int, header_frames: int | None, truncated: bool
) -> None:
    times = [index / rate for index in range(frames)]
    monkeypatch.setattr(video, "open_decoder", lambda *_, **__: FakeDecoder(times, header_frames))
    reader = FrameReader("fake", geometry=Geometry(1, None))
    list(reader)
    assert (reader.truncated, len(reader.notes)) == (truncated, int(truncated))


def test_a_header_that_lies_sizes_nothing(tmp_path: Path) -> None:
    for claimed in (4, 38, 41, 4000):
        frames, reader = read(write_lying_avi(tmp_path / "lie.avi", 40, claimed))
        assert reader.info.header_frames == claimed
        assert [index_of(frame) for frame in frames] == list(range(40))
        assert reader.truncated == (claimed == 4000)


def test_damage_inside_gives_the_same_bytes_every_time(shared: Path, tmp_path: Path) -> None:
    data = bytearray((shared / "data/videos/mmaction2_test.mp4").read_bytes())
    noise = np.random.default_rng(3)
    for place in noise.integers(len(data) // 4, len(data) * 3 // 4, 200):
        data[place] = noise.integers(256)
    (tmp_path / "damaged.mp4").write_bytes(data)
    first, _ = read(tmp_path / "damaged.mp4", geometry=Geometry(64, None))
    second, reader = read(tmp_path / "damaged.mp4", geometry=Geometry(64, None))
    np.testing.assert_array_equal(first, second)
    assert reader.decoded > 250


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files without pictures, and what the message has to say of each."""
    whole = write_coded(folder / "whole.mp4", 30).read_bytes()
    files = {
        "missing": (folder / "missing.mp4", "no such file"),
        "below a file": (folder / "whole.mp4" / "x.mp4", "no such file"),
        "folder": (folder, "directory"),
        "empty": (folder / "empty.mp4", "empty"),
        "noise": (folder / "noise.mp4", "not a video"),
        "text": (folder / "text.txt", "not a video"),
        "table": (folder / "table.csv", "not a video"),
        "picture": (folder / "picture.mp4", "not a video"),
        "sound": (write_sound(folder / "sound.mp4"), "only sound"),
        "pcm": (write_sound(folder / "sound.wav"), "only sound"),
        "without index": (folder / "noindex.mp4", "cut off or damaged"),
        "no frames": (write_without_frames(folder / "none.avi"), "no frame"),
        "no frames, mp4": (write_without_frames(folder / "none.mp4"), "without a frame"),
        "no frames, mkv": (write_without_frames(folder / "none.mkv"), "without a frame"),
        "bad name": (folder / os.fsdecode(b"\xff.mp4"), "UTF-8"),
    }
    files["empty"][0].write_bytes(b"")
    files["noise"][0].write_bytes(np.random.default_rng(0).bytes(5000))
    files["text"][0].write_text("a list of videos\n" * 50)
    files["table"][0].write_text("video,start\nx,1\n" * 50)
    files["picture"][0].write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    files["without index"][0].write_bytes(whole[: len(whole) * 6 // 10])
    files["bad name"][0].write_bytes(whole)
    return files


@pytest.mark.parametrize("pyav", [True, False], ids=["with pyav", "without pyav"])
def test_what_is_wrong_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pyav: bool) -> None:
    files = bad_files(tmp_path)
    if not pyav:
        monkeypatch.setitem(sys.modules, "av", None)
    for case, (path, expected) in files.items():
        for action in (probe, lambda path: FrameReader(path, geometry=FULL)):
            with pytest.raises(VideoError) as caught:
                action(path)
            message = str(caught.value)
            assert expected in message or (not pyav and "pip install" in message), f"{case}: {message}"
            assert path.name in message or case == "bad name"
            assert message.endswith((".", "'.")), message


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_coded(tmp_path / "secret.mp4", 3)
    path.chmod(0)
    if os.access(path, os.R_OK):  # the superuser may read everything

        def refuse(name: Any, *rest: Any, **more: Any) -> Any:
            raise PermissionError(13, "Permission denied", str(name))

        monkeypatch.setattr(decoders, "open", refuse, raising=False)
        assert decoders.open is not builtins.open
    with pytest.raises(VideoError, match=r"secret\.mp4: no permission"):
        probe(path)


def test_the_terminal_stays_clean(tmp_path: Path) -> None:
    files = [path for path, _ in bad_files(tmp_path).values()] + [write_cut(tmp_path / "cut.mp4", 100, 0.6)]
    program = (
        "import sys\n"
        "from tad.errors import VideoError\n"
        "from tad.extract.video import FrameReader, Geometry\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        list(FrameReader(path, geometry=Geometry(48, None)))\n"
        "    except VideoError:\n"
        "        continue\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENCV")}
    command = [sys.executable, "-c", program, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_name_that_ffmpeg_would_take_for_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a:b.mp4", "clip %03d #?é.mp4", "-v.mp4", "http:x.mp4"):
        write_coded(tmp_path / name, 3)
        assert read(Path(name))[1].decoded == 3


def test_a_reader_reads_once(files: Path) -> None:
    reader = FrameReader(files / "constant.mp4", geometry=FULL)
    list(reader)
    with pytest.raises(VideoError, match="once"):
        list(reader)
    with FrameReader(files / "constant.mp4", geometry=FULL, chunk_frames=4) as reader:
        chunks = iter(reader)
        next(chunks)
    with pytest.raises(VideoError, match="closed"):
        list(chunks)
    with pytest.raises(VideoError, match="once"):
        iter(reader)


@pytest.mark.parametrize("options", [{"fps": 0.0}, {"fps": float("nan")}, {"fps": -1.0}, {"chunk_frames": 0}])
def test_options_that_cannot_be_meant(files: Path, options: Any) -> None:
    with pytest.raises(RecipeError):
        FrameReader(files / "constant.mp4", geometry=FULL, **options)


# ---- pixels ---------------------------------------------------------------------------------------------------------
def corners(frame: np.ndarray) -> list[str]:
    """Colour names at the four corners, row by row."""
    names = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 1): "white"}
    height, width = frame.shape[:2]
    places = [(y, x) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return [names.get(tuple(int(value > 127) for value in frame[y, x]), "?") for y, x in places]


def quarters() -> np.ndarray:
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:24, :32], frame[:24, 32:], frame[24:, :32], frame[24:, 32:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), 255
    return frame


def test_colours_are_rgb_and_exact(tmp_path: Path) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8)
    frames, _ = read(write_video(tmp_path / "a.mkv", [picture] * 3, **LOSSLESS))
    np.testing.assert_array_equal(frames, np.stack([picture] * 3))


@pytest.mark.parametrize("backend", ["opencv", "pyav"])
@pytest.mark.parametrize(
    ("rotation", "expected"),
    [
        (0, ["red", "green", "blue", "white"]),
        (90, ["green", "white", "red", "blue"]),
        (180, ["white", "blue", "green", "red"]),
        (270, ["blue", "red", "white", "green"]),
    ],
)
def test_rotated_files_come_upright(
    tmp_path: Path, request: pytest.FixtureRequest, rotation: int, expected: list[str], backend: str
) -> None:
    path = write_video(tmp_path / "r.mp4", [quarters()] * 4, rotation=rotation)
    if backend == "pyav":
        request.getfixturevalue("pyav_only")
    info = probe(path)
    assert info.decoder.startswith(backend)
    assert (info.height, info.width) == ((64, 48) if rotation % 180 else (48, 64))
    assert info.rotation_degrees == -rotation % 360
    frames, reader = read(path, geometry=Geometry(32, None))
    assert frames.shape == (4, 43, 32, 3) if rotation % 180 else (4, 32, 43, 3)
    assert reader.plan.resized == frames.shape[1:3]
    assert all(corners(frame) == expected for frame in frames)


@pytest.mark.parametrize("size", [(47, 63), (49, 65), (1, 1), (3, 200), (33, 17)])
def test_odd_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    picture = np.random.default_rng(2).integers(0, 256, (*size, 3), np.uint8)
    path = write_video(tmp_path / "odd.mkv", [picture] * 3, **LOSSLESS)
    frames, reader = read(path, geometry=Geometry(min(size), None))
    np.testing.assert_array_equal(frames, np.stack([picture] * 3))
    assert (reader.info.height, reader.info.width) == size


def test_the_file_may_change_its_size_midway(tmp_path: Path) -> None:
    for size in ((48, 64), (96, 128)):
        write_coded_size(tmp_path / f"{size[0]}.ts", size)
    joined = tmp_path / "joined.ts"
    joined.write_bytes((tmp_path / "48.ts").read_bytes() + (tmp_path / "96.ts").read_bytes())
    frames, reader = read(joined)
    assert frames.shape[1:] == (48, 64, 3)
    assert reader.decoded == 40
    assert [index_of(frame) for frame in frames][-20:] == list(range(20))


def write_coded_size(path: Path, size: tuple[int, int]) -> Path:
    return write_video(path, [coded(index, *size) for index in range(20)])


@given(
    st.integers(16, 2000),
    st.integers(16, 2000),
    st.integers(16, 400),
    st.one_of(st.none(), st.tuples(st.integers(1, 400), st.integers(1, 400))),
)
def test_plans_cover_the_crop(height: int, width: int, short_side: int, cut: tuple[int, int] | None) -> None:
    plan = Geometry(short_side, cut).plan(height, width)
    tall, wide = plan.resized
    assert plan.height, plan.width == (cut or plan.resized)
    assert 0 <= plan.top <= tall - plan.height
    assert 0 <= plan.left <= wide - plan.width
    assert abs(tall - plan.height - 2 * plan.top) <= 1
    assert abs(wide - plan.width - 2 * plan.left) <= 1
    assert min(tall, wide) >= short_side
    scale = max([short_side / min(height, width), *([cut[0] / height, cut[1] / width] if cut else [])])
    assert abs(tall - height * scale) <= 0.5 + 1e-9 * tall
    assert abs(wide - width * scale) <= 0.5 + 1e-9 * wide
    if cut is None or (cut[0] <= short_side and cut[1] <= short_side):
        assert min(tall, wide) == short_side


def test_plans_by_hand() -> None:
    assert Geometry(256, None).plan(360, 640) == Plan((256, 455), 0, 0, 256, 455)
    assert Geometry(256, (224, 224)).plan(360, 640) == Plan((256, 455), 16, 115, 224, 224)
    assert Geometry(256, (256, 320)).plan(240, 320) == Plan((256, 341), 0, 10, 256, 320)
    assert Geometry(256, (256, 320)).plan(640, 360) == Plan((569, 320), 156, 0, 256, 320)
    assert Geometry(256, (256, 256)).plan(256, 340) == Plan((256, 340), 0, 42, 256, 256)
    for short_side, cut in ((0, None), (256, (0, 5)), (-3, (4, 4))):
        with pytest.raises(RecipeError):
            Geometry(short_side, cut)


def test_crop_is_a_view_of_the_centre() -> None:
    frames = np.arange(2 * 6 * 8 * 3, dtype=np.uint8).reshape(2, 6, 8, 3)
    cut = crop(frames, Plan((6, 8), 1, 2, 4, 4))
    np.testing.assert_array_equal(cut, frames[:, 1:5, 2:6])
    assert np.shares_memory(cut, frames)


def test_scaling_keeps_the_picture(files: Path) -> None:
    for geometry, size in ((Geometry(24, None), (24, 32)), (Geometry(96, (96, 150)), (113, 150))):
        frames, reader = read(files / "constant.mp4", geometry=geometry)
        assert frames.shape[1:3] == reader.plan.resized == size
        assert [index_of(frame) for frame in frames] == list(range(90))


# ---- streaming ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fps", [None, 7.0, 90.0])
def test_chunk_sizes_do_not_matter(files: Path, fps: float | None) -> None:
    whole, _ = read(files / "variable.mp4", fps=fps, chunk_frames=10_000)
    for chunk_frames in (1, 7, 32, len(whole) - 1, len(whole), len(whole) + 1):
        with FrameReader(files / "variable.mp4", geometry=FULL, fps=fps, chunk_frames=chunk_frames) as reader:
            chunks = list(reader)
        assert all(len(chunk) == chunk_frames for chunk in chunks[:-1])
        assert 1 <= len(chunks[-1]) <= chunk_frames
        np.testing.assert_array_equal(np.concatenate(chunks), whole)


def test_threads_and_passes_give_the_same_bytes(shared: Path) -> None:
    path = shared / "data/videos/mmaction2_demo.mp4"
    first, _ = read(path, geometry=Geometry(64, None))
    for threads in (1, 2):
        again, _ = read(path, geometry=Geometry(64, None), decode_threads=threads)
        np.testing.assert_array_equal(first, again)


def test_chunks_own_their_memory_and_may_go_to_another_thread(files: Path) -> None:
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def produce() -> None:
        with FrameReader(files / "constant.mp4", geometry=FULL, chunk_frames=8) as reader:
            seen.extend((chunk, chunk.copy()) for chunk in reader)

    thread = threading.Thread(target=produce)
    thread.start()
    thread.join()
    assert len(seen) == 12
    for number, (chunk, copy) in enumerate(seen):
        assert chunk.dtype == np.uint8
        assert chunk.flags.c_contiguous
        assert chunk.base is None
        np.testing.assert_array_equal(chunk, copy)
        assert not any(np.shares_memory(chunk, other) for other, _ in seen[:number])


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    long = write_coded(tmp_path / "long.mkv", 3000, codec="mjpeg", pix_fmt="yuvj420p")
    still = write_coded(tmp_path / "still.mkv", 2, ticks=[0, 90_000 * 300], **LOSSLESS)  # one picture for five minutes
    for path, fps, expected in ((long, None, 3000), (still, 10.0, 6000)):
        gc.collect()
        tracemalloc.start()
        frames = 0
        with FrameReader(path, fps=fps, geometry=FULL, chunk_frames=16) as reader:
            for chunk in reader:
                frames += len(chunk)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert frames == reader.frames == expected
        assert peak < 4 * 16 * 48 * 64 * 3  # all frames would be 100 times that


# ---- PyAV in OpenCV's place -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["constant.mp4", "variable.mp4", "variable.mkv"])
@pytest.mark.parametrize("fps", [None, 10.0])
def test_both_decoders_give_the_same(files: Path, request: pytest.FixtureRequest, name: str, fps: float | None) -> None:
    expected, by_opencv = read(files / name, fps=fps)
    request.getfixturevalue("pyav_only")
    frames, by_pyav = read(files / name, fps=fps)
    assert by_opencv.info.decoder.startswith("opencv ")
    assert by_pyav.info.decoder.startswith("pyav ")
    assert np.abs(frames.astype(int) - expected).max() <= 6  # colours are converted by different code
    for attribute in ("frames", "decoded", "truncated", "timestamps", "plan"):
        assert getattr(by_pyav, attribute) == getattr(by_opencv, attribute), attribute
    assert by_pyav.fps == pytest.approx(by_opencv.fps, rel=1e-6)
    assert by_pyav.duration_s == pytest.approx(by_opencv.duration_s, rel=1e-6)


def test_pyav_survives_a_cut_file(tmp_path: Path, pyav_only: None) -> None:
    frames, reader = read(write_cut(tmp_path / "cut.mp4", 300, 0.6))
    assert [index_of(frame) for frame in frames] == list(range(reader.decoded))
    assert reader.truncated


def test_pyav_without_timestamps(tmp_path: Path, pyav_only: None) -> None:
    frames, reader = read(write_coded(tmp_path / "raw.h264", 50, container="h264"))
    assert [index_of(frame) for frame in frames] == list(range(50))
    assert reader.timestamps in ("pts", "index")


@pytest.fixture
def av1(tmp_path: Path) -> Path:
    if "libsvtav1" not in av.codecs_available:
        pytest.skip("this PyAV cannot encode AV1")
    frames = (coded(index, 96, 128) for index in range(25))
    return write_video(tmp_path / "a.mp4", frames, codec="libsvtav1", options={"crf": "20"})


def test_av1_is_read_through_pyav(av1: Path) -> None:
    frames, reader = read(av1)
    assert reader.info.codec == "av01"
    assert [index_of(frame) for frame in frames] == list(range(25))
    assert reader.info.decoder == f"pyav {av.__version__}"  # OpenCV's own AV1 decoder needs hardware


def test_av1_without_pyav_says_what_to_install(av1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(VideoError, match=r"AV1.*tad-pipeline\[video\]"):
        probe(av1)


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_a_codec_that_nobody_knows(tmp_path: Path, suffix: str) -> None:
    path = write_coded(tmp_path / f"odd.{suffix}", 20)
    data = path.read_bytes()
    at = data.rindex(b"avc1")
    path.write_bytes(data[:at] + b"zzz9" + data[at + 4 :])
    for action in (probe, lambda path: FrameReader(path, geometry=FULL)):
        with pytest.raises(VideoError, match=rf"odd\.{suffix}: codec unknown"):
            action(path)


def test_tags_that_are_not_utf_8_do_not_hide_the_pictures(tmp_path: Path, pyav_only: None) -> None:
    path = write_coded(tmp_path / "latin.mkv", 20, **LOSSLESS)
    data = path.read_bytes()
    assert b"ENCODER" in data
    path.write_bytes(data.replace(b"Lavf", b"L\xe9vf").replace(b"Lavc", b"L\xe9vc"))
    frames, _ = read(path)
    assert [index_of(frame) for frame in frames] == list(range(20))


@pytest.mark.parametrize(
    "error",
    [
        AttributeError("'NoneType' object has no attribute 'x'"),
        UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid"),
        ValueError("unsupported"),
        av.error.PatchWelcomeError(0, "not yet"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("begun", [0, 5])
def test_whatever_pyav_raises_is_the_videos_fault(
    files: Path, pyav_only: None, monkeypatch: pytest.MonkeyPatch, error: Exception, begun: int
) -> None:
    decoded = decoders.PyAVDecoder._decoded

    def breaks(self: decoders.PyAVDecoder) -> Any:
        for _, frame in zip(range(begun), decoded(self), strict=False):
            yield frame
        raise error

    monkeypatch.setattr(decoders.PyAVDecoder, "_decoded", breaks)
    with pytest.raises(VideoError, match=r"constant\.mp4: pyav .* cannot decode it"):
        read(files / "constant.mp4")


# ---- probe, source, real files --------------------------------------------------------------------------------------
def test_probe_reads_the_header(files: Path) -> None:
    info = probe(str(files / "constant.mp4"))
    assert (info.width, info.height, info.fps, info.header_frames) == (64, 48, 30.0, 90)
    assert info.header_duration_s == pytest.approx(3.0)
    assert (info.codec, info.rotation_degrees, info.start_s) == ("h264", 0, 0.0)
    assert info.path == str(files / "constant.mp4")


@pytest.mark.parametrize("backend", ["opencv", "pyav"])
@pytest.mark.parametrize("start_s", [1, 5])  # less and more than the file's length
@pytest.mark.parametrize(
    ("suffix", "options"),
    [("mkv", LOSSLESS), ("wmv", {"codec": "wmv2"}), ("mp4", {}), ("ts", {}), ("flv", {"codec": "flv"})],
)
def test_what_the_header_promises_counts_from_the_first_frame(
    request: pytest.FixtureRequest, tmp_path: Path, suffix: str, options: Any, start_s: int, backend: str
) -> None:
    ticks = [90_000 * start_s + 3000 * index for index in range(60)]
    path = write_coded(tmp_path / f"late.{suffix}", 60, ticks=ticks, **options)
    if backend == "pyav":
        request.getfixturevalue("pyav_only")
    assert probe(path).expected_s == pytest.approx(2.0, abs=0.11)


def test_a_late_file_that_is_cut_off_is_flagged(tmp_path: Path) -> None:
    options = {"ticks": [450_000 + 3000 * i for i in range(90)], "container_options": {"movflags": "faststart"}}
    path = write_coded(tmp_path / "late.mp4", 90, **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 7 // 10])
    _, reader = read(path)
    assert reader.truncated
    assert "its header tells of 3.00 s" in reader.notes[0]


def test_expected_seconds_of_odd_headers() -> None:
    def expected(duration_s: float | None, start_s: float, ends_on_clock: bool) -> float:
        odd = video.VideoInfo("v", 8, 8, 25.0, None, duration_s, 0, "x", "y", start_s, ends_on_clock)
        return odd.expected_s

    assert expected(None, 0.0, True) == expected(None, 5.0, False) == expected(-1.0, 0.0, True) == 0.0
    assert expected(7.0, 5.0, True) == 2.0
    assert expected(7.0, 5.0, False) == 7.0
    assert expected(2.0, 5.0, True) == 2.0  # no end lies before the first frame: it is a length


def test_source_of_notices_a_change(tmp_path: Path) -> None:
    path = tmp_path / "ünï.mp4"
    path.write_bytes(b"12345")
    os.utime(path, ns=(1, 123456789))
    assert source_of(path) == {"name": "ünï.mp4", "size": 5, "mtime_ns": 123456789}
    assert json.loads(json.dumps(source_of(path))) == source_of(str(path))
    with pytest.raises(VideoError, match="no such file"):
        source_of(tmp_path / "none.mp4")


def test_real_files(shared: Path) -> None:
    recorded = json.loads((shared / "data/videos/videos.json").read_text())["videos"]
    assert len(recorded) == 7
    for name, truth in recorded.items():
        path = shared / "data" / name
        info = probe(path)
        assert (info.width, info.height, info.header_frames) == (
            truth["width"],
            truth["height"],
            truth["header_frames"],
        )
        assert info.fps == pytest.approx(float(Fraction(truth["average_rate"])), rel=1e-6)
        frames, reader = read(path, geometry=Geometry(min(info.width, info.height), None))
        assert reader.decoded == truth["decoded_frames"]
        spacing = (truth["last_pts_s"] - truth["first_pts_s"]) / (truth["decoded_frames"] - 1)
        assert reader.duration_s == pytest.approx(truth["last_pts_s"] - truth["first_pts_s"] + spacing, abs=1e-3)
        assert not reader.truncated
        assert reader.timestamps == "pts"
        steady = reader.duration_s == pytest.approx(reader.decoded / info.fps, abs=0.2 / info.fps)
        assert (reader.frames == reader.decoded) == steady  # part_0 and part_1 lack a frame before their last one
        np.testing.assert_allclose(frames[0].mean(axis=(0, 1)), truth["first_frame_rgb_mean"], atol=1.0)
        assert reader.decode_s > 0
