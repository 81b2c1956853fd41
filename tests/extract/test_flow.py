"""Optical flow: direction and size of known motion, exact quantisation; chunks, threads and the past do not matter."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tad.errors import RecipeError
from tad.extract.flow import FLOWS, FlowStream, build_flow, quantise

NAMES = sorted(FLOWS)


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth random grey (H, W) uint8 with structure at several scales."""
    noise = np.random.default_rng(seed)
    total = np.zeros((height, width), np.float32)
    for sigma in (2.0, 5.0, 12.0):
        layer = cv2.GaussianBlur(noise.standard_normal((height, width)).astype(np.float32), (0, 0), sigma)
        total += layer / layer.std()
    return np.clip(128 + 40 * total, 0, 255).astype(np.uint8)


def moved(height: int, width: int, shifts: list[tuple[int, int]], seed: int = 0) -> np.ndarray:
    """RGB frames (n, H, W, 3) of one texture; frame i shows it moved by ``shifts[i]`` (x right, y down)."""
    margin = 1 + max((abs(value) for shift in shifts for value in shift), default=0)
    large = texture(height + 2 * margin, width + 2 * margin, seed)
    frames = [large[margin - y : margin - y + height, margin - x : margin - x + width] for x, y in shifts]
    return np.repeat(np.stack(frames)[..., None], 3, axis=-1)


def flow_of(name: str, frames: np.ndarray, sizes: list[int] | None = None, **options: Any) -> np.ndarray:
    """All flow of ``frames``, pushed in chunks of ``sizes``."""
    stream = FlowStream(build_flow(name), **options)
    places = np.cumsum([0, *(sizes or [len(frames)])])
    parts = [stream.push(frames[start:end]) for start, end in pairwise(places)]
    return np.concatenate([*parts, stream.finish()])


def zigzag(count: int, height: int = 60, width: int = 80, seed: int = 0) -> np.ndarray:
    steps = np.random.default_rng(seed).integers(-4, 5, (count, 2))
    return moved(height, width, [(int(x), int(y)) for x, y in np.cumsum(steps, axis=0)], seed)


# ---- the estimators -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shift", [(5, 0), (0, 5), (-5, 0), (0, -3), (7, -4), (-1, 2), (12, 9)])
def test_translations_are_recovered(name: str, shift: tuple[int, int]) -> None:
    first, second = moved(128, 170, [(0, 0), shift])[..., 0]
    flow = build_flow(name)(first, second)
    assert flow.shape == (128, 170, 2)
    assert flow.dtype == np.float32
    inner = flow[20:-20, 20:-20]
    np.testing.assert_allclose(np.median(inner, axis=(0, 1)), shift, atol=0.1)
    assert np.abs(inner - np.array(shift)).mean() < 0.3


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_the_frame_move_on_their_own(name: str) -> None:
    first = texture(96, 192)
    second = first.copy()
    second[:, :96] = np.roll(first[:, :96], 3, axis=1)
    second[:, 96:] = np.roll(first[:, 96:], -4, axis=0)
    flow = build_flow(name)(first, second)
    np.testing.assert_allclose(np.median(flow[24:-24, 24:72], axis=(0, 1)), (3, 0), atol=0.2)
    np.testing.assert_allclose(np.median(flow[24:-24, 120:168], axis=(0, 1)), (0, -4), atol=0.2)


@pytest.mark.parametrize("name", NAMES)
def test_mirrored_frames_mirror_the_flow(name: str) -> None:
    frames = moved(96, 128, [(0, 0), (4, 2)])
    flow = flow_of(name, frames)[0].astype(int)
    mirrored = flow_of(name, np.ascontiguousarray(frames[:, :, ::-1]))[0, :, ::-1].astype(int)
    inner = (slice(16, -16), slice(16, -16))
    assert abs(int(np.median(flow[inner][..., 0])) - 128 - 26) <= 1  # 4 px * 6.375 steps a pixel
    assert np.abs(mirrored[..., 0] + flow[..., 0] - 255)[inner].mean() < 1.0  # x changes its sign
    assert np.abs(mirrored[..., 1] - flow[..., 1])[inner].mean() < 1.0  # y does not


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 300), (11, 40), (15, 16), (33, 9)])
def test_tiny_frames(name: str, size: tuple[int, int]) -> None:
    first, second = moved(*size, [(0, 0), (1, 0)])[..., 0]
    flow = build_flow(name)(first, second)
    assert flow.shape == (*size, 2)
    assert np.isfinite(flow).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_past_leaves_no_trace(name: str) -> None:
    frames = moved(96, 128, [(0, 0), (3, -2)])[..., 0]
    expected = build_flow(name)(*frames)
    used = build_flow(name)
    for height, width in (
        (12, 12),
        (200, 20),
        (16, 400),
        (96, 128),
        (5, 5),
    ):  # OpenCV's DIS changes itself on small frames
        used(*moved(height, width, [(0, 0), (1, 1)], seed=4)[..., 0])
    np.testing.assert_array_equal(used(*frames), expected)


@pytest.mark.parametrize("name", NAMES)
def test_opencv_threads_do_not_matter(name: str) -> None:
    frames = moved(96, 128, [(0, 0), (3, -2)])[..., 0]
    before = cv2.getNumThreads()
    try:
        results = []
        for threads in (1, 2, 7):
            cv2.setNumThreads(threads)
            results.append(build_flow(name)(*frames))
    finally:
        cv2.setNumThreads(before)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_parameters_are_what_opencv_calls_medium() -> None:
    preset = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    params = build_flow("dis").params
    assert params == {
        "finest_scale": preset.getFinestScale(),
        "patch_size": preset.getPatchSize(),
        "patch_stride": preset.getPatchStride(),
        "gradient_descent_iterations": preset.getGradientDescentIterations(),
        "mean_normalization": preset.getUseMeanNormalization(),
        "spatial_propagation": preset.getUseSpatialPropagation(),
        "refinement_iterations": preset.getVariationalRefinementIterations(),
        "refinement_alpha": preset.getVariationalRefinementAlpha(),
        "refinement_delta": preset.getVariationalRefinementDelta(),
        "refinement_gamma": preset.getVariationalRefinementGamma(),
    }
    frames = moved(96, 128, [(0, 0), (3, -2)])[..., 0]
    np.testing.assert_array_equal(build_flow("dis")(*frames), preset.calc(*frames, None))


def test_names() -> None:
    assert all(build_flow(name).name == name for name in NAMES)
    with pytest.raises(RecipeError, match="Did you mean 'farneback'"):
        build_flow("farnebeck")
    with pytest.raises(RecipeError, match="Known: dis, farneback"):
        build_flow("xyz123")


# ---- quantisation ---------------------------------------------------------------------------------------------------
def test_quantisation_by_hand() -> None:
    flow = np.array([-1e9, -20.5, -20, -10, -1, -0.08, 0, 0.01, 0.08, 1, 10, 20, 20.5, 1e9, np.inf, -np.inf, np.nan])
    expected = [0, 0, 0, 64, 121, 127, 128, 128, 128, 134, 191, 255, 255, 255, 255, 0, 128]
    result = quantise(flow.astype(np.float32))
    assert result.dtype == np.uint8
    assert result.tolist() == expected
    assert quantise(np.array([-8.0, 0.0, 4.0, 8.0, 9.0]), bound=8.0).tolist() == [0, 128, 191, 255, 255]
    for bound in (0.0, -1.0, float("nan")):
        with pytest.raises(RecipeError):
            quantise(flow, bound)


@given(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=3), elements=st.floats(-100, 100, width=32)), st.floats(0.5, 64)
)
def test_quantisation_is_within_half_a_step(flow: np.ndarray, bound: float) -> None:
    before = flow.copy()
    restored = quantise(flow, bound).astype(float) * (2 * bound / 255) - bound
    assert np.abs(restored - np.clip(flow, -bound, bound)).max() <= bound / 255 * 1.001
    np.testing.assert_array_equal(flow, before)


# ---- the stream -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_flow_k_leads_from_frame_k_to_the_next(name: str) -> None:
    frames = zigzag(6)
    flow = flow_of(name, frames)
    assert flow.shape == (6, 60, 80, 2)
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    for k in range(5):
        np.testing.assert_array_equal(flow[k], quantise(build_flow(name)(gray[k], gray[k + 1])))
    np.testing.assert_array_equal(flow[5], flow[4])


def test_grey_is_made_of_rgb() -> None:
    red, blue = np.zeros((2, 2, 40, 60, 3), np.uint8)
    red[0, :, :30, 0], red[1, :, :33, 0] = 255, 255
    blue[0, :, :30, 2], blue[1, :, :33, 2] = 255, 255
    seen: list[int] = []

    class Spy:
        name, params = "spy", {}

        def __call__(self, previous_gray: np.ndarray, next_gray: np.ndarray) -> np.ndarray:
            seen.append(int(previous_gray.max()))
            return np.zeros((*previous_gray.shape, 2), np.float32)

    for frames in (red, blue):
        FlowStream(Spy()).push(frames)
    assert seen == [76, 29]  # 0.299 and 0.114 of 255


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.sampled_from(NAMES), st.integers(1, 3))
def test_chunks_and_threads_do_not_matter(sizes: list[int], name: str, threads: int) -> None:
    frames = zigzag(sum(sizes), 32, 40) if sum(sizes) else np.empty((0, 32, 40, 3), np.uint8)
    flow = flow_of(name, frames, sizes, threads=threads)
    assert len(flow) == len(frames)
    if len(frames):
        np.testing.assert_array_equal(flow, flow_of(name, frames))


def test_each_push_gives_what_is_complete() -> None:
    stream, frames = FlowStream(build_flow("dis")), zigzag(7)
    assert [len(stream.push(frames[start:end])) for start, end in ((0, 1), (1, 1), (1, 4), (4, 7))] == [0, 0, 3, 3]
    last = stream.finish()
    assert last.shape == (1, 60, 80, 2)
    assert stream.flow_s > 0
    assert stream.finish().shape == (0, 0, 0, 2)


@pytest.mark.parametrize("name", NAMES)
def test_stillness_is_128(name: str) -> None:
    still = np.repeat(zigzag(1), 4, axis=0)
    assert (flow_of(name, still) == 128).all()
    assert (flow_of(name, still[:1]) == 128).all()
    assert flow_of(name, still[:1]).shape == (1, 60, 80, 2)


def test_a_stream_starts_anew_after_finish() -> None:
    stream = FlowStream(build_flow("dis"))
    first, second = zigzag(3), zigzag(4, 48, 64, seed=5)
    stream.push(first)
    stream.finish()
    flow = np.concatenate([stream.push(second), stream.finish()])
    np.testing.assert_array_equal(flow, flow_of("dis", second))
    with pytest.raises(ValueError, match="differ in size"):
        [stream.push(frames) for frames in (first, second)]


def test_flow_does_not_change_after_it_was_given() -> None:
    stream, frames = FlowStream(build_flow("dis")), zigzag(9)
    given_out = [stream.push(frames[start : start + 3]) for start in (0, 3, 6)]
    copies = [flow.copy() for flow in given_out]
    np.testing.assert_array_equal(np.concatenate(given_out), np.concatenate(copies))
    given_out[2][:] = 7  # and belongs to who asked
    np.testing.assert_array_equal(stream.finish()[0], copies[2][-1])
