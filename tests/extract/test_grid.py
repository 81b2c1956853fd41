"""Timestamps and the grid, against exact rational arithmetic over all frames at once."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tad.extract.grid import Clock, GridPicker

RATES = [Fraction(1), Fraction(7, 3), Fraction(10), Fraction(25, 2), Fraction(15), Fraction(24000, 1001), Fraction(25)]
RATES += [Fraction(981, 50), Fraction(30000, 1001), Fraction(30), Fraction(60), Fraction(240)]


def picked(times_s: list[float], fps: float, duration_s: float) -> list[int]:
    """Index of the decoded frame behind every grid frame, as a reader sees it: frame by frame."""
    picker = GridPicker(fps)
    picks: list[int] = []
    for index, time_s in enumerate(times_s):
        before, here = picker.advance(time_s)
        assert index > 0 or (before, here) == (0, 1)
        picks += [index - 1] * before + [index] * here
    frames, extra = picker.finish(duration_s)
    assert extra >= -1
    picks = picks[:-1] if extra < 0 else picks + [len(times_s) - 1] * extra
    assert len(picks) == frames
    return picks


def nearest(times: list[Fraction], fps: Fraction, frames: int) -> list[int]:
    """The same by comparing every frame with every grid time; min() takes the first of equals."""
    return [min(range(len(times)), key=lambda index: abs(times[index] - k / fps)) for k in range(frames)]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 700), max_size=25), st.sampled_from(RATES))
def test_picks_are_the_nearest_frames(gaps_ms: list[int], fps: Fraction) -> None:
    times = [Fraction(0)]
    for gap in gaps_ms:
        times.append(times[-1] + Fraction(gap, 1000))
    duration = times[-1] + (times[-1] / len(gaps_ms) if gaps_ms else 1 / fps)
    picks = picked([float(time) for time in times], float(fps), float(duration))
    assert len(picks) >= 1
    assert len(picks) == 1 or abs(len(picks) - duration * fps) <= Fraction(1, 2) + Fraction(1, 10**6)
    assert picks == nearest(times, fps, len(picks))


@pytest.mark.parametrize(
    "rate", [Fraction(30000, 1001), Fraction(981, 50), Fraction(24000, 1001), Fraction(25), Fraction(60)]
)
@pytest.mark.parametrize("resolution_s", [0, 1e-3], ids=["exact", "milliseconds"])
def test_constant_rate_is_the_identity(rate: Fraction, resolution_s: float) -> None:
    times = [float(index / rate) for index in range(20_000)]
    if resolution_s:
        times = [round(time / resolution_s) * resolution_s for time in times]
    clock = Clock(step_s=float(1 / rate))
    ticked = [clock.tick(7.5 + time) for time in times]  # the stream need not start at zero
    assert clock.repaired == 0
    assert picked(ticked, float(rate), clock.duration_s) == list(range(20_000))


def test_ties_go_to_the_earlier_frame() -> None:
    times = [index / 30 for index in range(300)]  # at 60 fps every second grid time is half way, but for rounding
    assert picked(times, 60.0, 10.0) == [k // 2 for k in range(600)]


def test_the_guess_about_the_next_frame_is_right_at_constant_rate() -> None:
    for fps in (5.0, 10.0, 12.5, 15.0, 25.0, 29.0, 30.0):
        picker, missed, wanted = GridPicker(fps), 0, []
        guess = True
        for index in range(300):
            before, here = picker.advance(index / 30)
            missed += bool(before and not guess)
            guess = bool(here) or picker.may_want_last()
            wanted.append(guess)
        missed += picker.finish(10.0)[1] > 0 and not guess
        assert missed == 0
        assert sum(wanted) <= 1.3 * 10 * fps  # and hardly any frame is converted in vain


def test_the_clock_repairs_what_cannot_be_a_time() -> None:
    def ticks(*raw: float, end_s: float = 0.0) -> tuple[list[float], int]:
        clock = Clock(step_s=0.1, end_s=end_s)
        times = [clock.tick(value) for value in raw]
        assert all(later > earlier for earlier, later in pairwise(times))
        return [round(time, 9) for time in times], clock.repaired

    assert ticks(5.0, 5.2, 5.3) == ([0.0, 0.2, 0.3], 0)
    assert ticks(0.0, 0.0, 0.0, 0.0) == ([0.0, 0.1, 0.2, 0.3], 3)
    assert ticks(math.nan, math.nan, math.nan) == ([0.0, 0.1, 0.2], 2)
    assert ticks(0.04, 0.08, 0.12, 0.0) == ([0.0, 0.04, 0.08, 0.18], 1)  # an AVI's last frame
    assert ticks(0.0, 0.1, 0.0, 0.1) == ([0.0, 0.1, 0.2, 0.3], 2)  # two recordings joined
    assert ticks(0.0, 0.1, 1e9, 0.3) == ([0.0, 0.1, 0.2, 0.3], 1)
    assert ticks(0.0, 0.1, 2000.0) == ([0.0, 0.1, 0.2], 1)
    assert ticks(0.0, 0.1, 2000.0, end_s=2000.1) == ([0.0, 0.1, 2000.0], 0)  # a still that the header vouches for


def test_duration_is_the_last_time_and_one_frame() -> None:
    clock = Clock(step_s=0.04)
    clock.tick(3.0)
    assert clock.duration_s == 0.04
    for raw in (3.1, 3.2, 3.6):
        clock.tick(raw)
    assert clock.duration_s == pytest.approx(0.6 + 0.2)
