"""TimeAxis against the frames that the rows are made of."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tad.errors import StoreError
from tad.timeline import TimeAxis

axes = st.builds(
    TimeAxis,
    scale_s=st.floats(1e-3, 1e3),
    translation_s=st.floats(-1e3, 1e3),
    window_s=st.floats(0, 1e3),
)


def test_rows_are_centred_on_their_frames() -> None:
    # row i holds frames 8 i … 8 i + 31 at 25 fps; frame k fills [k, k + 1) / 25
    axis = TimeAxis.from_frames(fps=25.0, window_frames=32, stride_frames=8)
    for row in range(5):
        frames = np.arange(8 * row, 8 * row + 32)
        assert axis.center_s(row) == pytest.approx(((frames + 0.5) / 25).mean())
        assert axis.span_s(row) == pytest.approx((frames[0] / 25, (frames[-1] + 1) / 25))


def test_matches_the_formula_that_actionformer_states() -> None:
    # t = (row * stride + 0.5 * window) / fps
    axis = TimeAxis.from_frames(fps=29.97, window_frames=16, stride_frames=4)
    assert axis.center_s(100) == pytest.approx((100 * 4 + 0.5 * 16) / 29.97)


def test_rescaled_rows_share_the_duration() -> None:
    axis = TimeAxis.rescaled(rows=100, duration_s=37.0)
    assert axis.to_seconds(0.0) == pytest.approx(0.0)
    assert axis.to_seconds(100.0) == pytest.approx(37.0)
    assert axis.to_rows(18.5) == pytest.approx(50.0)


@given(axis=axes, row=st.floats(-1e4, 1e4))
def test_rows_and_seconds_are_inverse(axis: TimeAxis, row: float) -> None:
    assert axis.row_at(axis.center_s(row)) == pytest.approx(
        row, abs=1e-6 * max(1.0, abs(row), 1e6 / axis.scale_s / 1e4)
    )
    assert axis.to_rows(axis.to_seconds(row)) == pytest.approx(
        row, abs=1e-6 * max(1.0, abs(row), 1e6 / axis.scale_s / 1e4)
    )


@given(axis=axes, rows=st.integers(0, 60), start=st.floats(-50, 80), length=st.floats(0, 90))
def test_rows_between_holds_exactly_the_centres_inside(axis: TimeAxis, rows: int, start: float, length: float) -> None:
    start_s, end_s = float(axis.center_s(start)), float(axis.center_s(start + length))
    found = axis.rows_between(start_s, end_s, rows=rows)
    inside = [i for i in range(rows) if start - 1e-6 <= i <= start + length + 1e-6]
    surely = [i for i in range(rows) if start + 1e-6 <= i <= start + length - 1e-6]
    chosen = list(range(rows))[found]
    assert set(surely) <= set(chosen) <= set(inside)


def test_rows_between_takes_infinity_and_refuses_nan() -> None:
    axis, inf = TimeAxis(0.5, 0.25, 0.5), float("inf")
    picked = {ends: list(range(10))[axis.rows_between(*ends, rows=10)] for ends in ((1.0, inf), (-inf, 1.0))}
    assert picked == {(1.0, inf): [2, 3, 4, 5, 6, 7, 8, 9], (-inf, 1.0): [0, 1]}
    for ends, count in (((-inf, inf), 10), ((inf, inf), 0), ((-inf, -inf), 0), ((inf, -inf), 0), ((1e300, 1e308), 0)):
        assert len(list(range(10))[axis.rows_between(*ends, rows=10)]) == count
    for bad in ((float("nan"), 1.0), (1.0, float("nan"))):
        with pytest.raises(StoreError, match="NaN is no time"):
            axis.rows_between(*bad, rows=10)


@given(axis=axes, factor=st.integers(1, 8), row=st.integers(0, 20))
def test_pooling_keeps_the_mean_of_the_centres_and_all_that_was_seen(axis: TimeAxis, factor: int, row: int) -> None:
    members = [row * factor + k for k in range(factor)]
    pooled = axis.pooled(factor)
    assert pooled.center_s(row) == pytest.approx(np.mean([axis.center_s(m) for m in members]), rel=1e-9, abs=1e-6)
    assert pooled.span_s(row)[0] == pytest.approx(axis.span_s(members[0])[0], rel=1e-9, abs=1e-6)
    assert pooled.span_s(row)[1] == pytest.approx(axis.span_s(members[-1])[1], rel=1e-9, abs=1e-6)


def test_a_window_of_rows_keeps_its_place_in_time() -> None:
    axis = TimeAxis(0.5, 0.3, 1.0)
    assert axis.shifted(7).center_s(2) == pytest.approx(axis.center_s(9))


def test_takes_arrays_and_tensors() -> None:
    axis = TimeAxis(0.25, 0.1, 0.5)
    assert axis.to_rows(np.array([[0.1, 0.35]])) == pytest.approx(np.array([[0.5, 1.5]]))
    assert torch.allclose(axis.to_seconds(torch.tensor([0.5, 1.5])), torch.tensor([0.1, 0.35]))


@pytest.mark.parametrize(
    "values", [(0.0, 0.0, 1.0), (-1.0, 0.0, 1.0), (1.0, 0.0, -1.0), (float("nan"), 0.0, 1.0), (1.0, float("inf"), 1.0)]
)
def test_refuses_axes_that_are_none(values: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="TimeAxis"):
        TimeAxis(*values)
