"""Where a sample is cut, which way it faces, which frames are shifted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tad.extract.flow import BOUND, quantise
from tad.extract.video import Geometry
from tad.joint.augment import Augmentation, Draw
from tad.joint.frames import Box, Footage

EVERYTHING = Augmentation(random_crop=True, flip=True, jitter=True)


def footage(height: int, width: int, box: Box) -> Footage:
    return Footage(100, 10.0, height, width, box)


def test_draws_depend_on_seed_epoch_and_index_alone() -> None:
    keys = [(s, e, i) for s in (0, 1, -3) for e in range(3) for i in range(4)]
    draws = {key: EVERYTHING.draw(*key) for key in keys}
    assert len({(d.place, d.jitter_seed) for d in draws.values()}) == len(keys)
    assert all(EVERYTHING.draw(*key) == draws[key] for key in reversed(keys))
    assert {d.mirrored for d in draws.values()} == {True, False}


def test_what_is_not_asked_for_is_not_done() -> None:
    assert Augmentation().draw(1, 2, 3) == Draw()
    both = EVERYTHING.draw(1, 2, 3)
    assert Augmentation(random_crop=True).draw(1, 2, 3) == Draw(place=both.place)  # the others change no draw
    assert Augmentation(jitter=True).draw(1, 2, 3) == Draw(jitter_seed=both.jitter_seed)


def test_no_draw_cuts_where_extraction_does() -> None:
    plan = Geometry(32, (24, 30)).plan(41, 67)
    box = Box(plan.top, plan.left, plan.height, plan.width)
    frames = np.random.default_rng(0).integers(0, 256, (3, *plan.resized, 3), np.uint8)
    found = Draw().applied(frames, Draw().box(footage(*plan.resized, box)), flow=False)
    np.testing.assert_array_equal(found, frames[:, plan.top : plan.top + 24, plan.left : plan.left + 30])


def test_cuts_are_uniform_over_all_that_fit() -> None:
    counts = np.zeros((4, 6))
    seen = footage(13, 25, Box(2, 3, 10, 20))  # room for 3 down, 5 across
    for index in range(4800):
        box = Augmentation(random_crop=True).draw(7, 0, index).box(seen)
        assert (box.height, box.width) == (10, 20)
        counts[box.top, box.left] += 1
    assert counts.min() > 0
    expected = 4800 / counts.size
    assert ((counts - expected) ** 2 / expected).sum() < 50  # chi square, 23 degrees of freedom: p < 1e-3
    flips = [Augmentation(flip=True).draw(7, 0, index).mirrored for index in range(4800)]
    assert abs(np.mean(flips) - 0.5) < 0.03


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(0, 30), st.integers(0, 30), st.integers(0, 1000))
def test_frames_of_another_size_are_cut_at_the_same_place(side: int, down: int, across: int, index: int) -> None:
    draw = Augmentation(random_crop=True).draw(0, 0, index)
    one = draw.box(footage(side + down, side + across, Box(0, 0, side, side)))
    two = draw.box(footage(2 * (side + down), 2 * (side + across), Box(0, 0, 2 * side, 2 * side)))
    for small, large, room in ((one.top, two.top, down), (one.left, two.left, across)):
        assert 0 <= small <= room
        assert abs(large - 2 * small) <= 1 + (room > 0)


def test_mirrored_pictures_and_flow() -> None:
    rng = np.random.default_rng(1)
    rgb = rng.integers(0, 256, (2, 5, 8, 3), np.uint8)
    box = Box(1, 2, 3, 4)
    mirrored = Draw(mirrored=True)
    np.testing.assert_array_equal(mirrored.applied(rgb, box, flow=False), rgb[:, 1:4, 2:6][:, :, ::-1])
    flow = rng.uniform(-25, 25, (2, 5, 8, 2))
    expected = flow[:, 1:4, 2:6][:, :, ::-1] * [-1, 1]
    found = mirrored.applied(quantise(flow), box, flow=True)
    np.testing.assert_array_equal(found, quantise(expected))
    assert found.dtype == np.uint8


def test_flow_is_negated_exactly_but_for_ties_of_rounding() -> None:
    """At ties, of which no motion is one, quantise rounds to even; what the numbers stand for is negated anyway."""
    flip = Draw(mirrored=True)
    steps = np.arange(256, dtype=np.uint8)
    both = np.stack([steps, steps], -1)[None, None]  # (1, 1, 256, 2)
    x = flip.applied(both, Box(0, 0, 1, 256), flow=True)[0, 0, ::-1, 0]
    pixels = steps * (2 * BOUND / 255) - BOUND
    np.testing.assert_allclose(x * (2 * BOUND / 255) - BOUND, -pixels, atol=1e-12)
    values = np.random.default_rng(2).uniform(-22, 22, 200_000)
    np.testing.assert_array_equal(255 - quantise(values).astype(int), quantise(-values))
    assert (int(quantise(np.zeros(1))[0]), 255 - int(quantise(np.zeros(1))[0])) == (128, 127)
    ties = (np.arange(255) + 0.5) * (2 * BOUND / 255) - BOUND
    assert np.abs(255 - quantise(ties).astype(int) - quantise(-ties).astype(int)).max() <= 1


@pytest.mark.parametrize("interval", [1, 2, 3, 4, 8])
def test_jitter_stays_within_the_interval_and_keeps_the_order(interval: int) -> None:
    draws = [Augmentation(jitter=True).draw(0, 0, index) for index in range(20)]
    shifts = np.stack([draw.shifts((6, 9), interval=interval) for draw in draws])  # (20, U, W)
    allowed = {-1, 0, 1} if interval == 1 else set(range(-(interval // 2), (interval - 1) // 2 + 1))
    assert set(shifts.ravel().tolist()) == allowed
    assert len(allowed) == max(interval, 3) or interval == 2
    assert len({shift.tobytes() for shift in shifts}) == 20
    if interval > 1:
        numbers = np.arange(9) * interval + shifts
        assert (np.diff(numbers, axis=-1) > 0).all()
    np.testing.assert_array_equal(draws[3].shifts((6, 9), interval=interval), shifts[3])
    assert not Draw().shifts((6, 9), interval=interval).any()
