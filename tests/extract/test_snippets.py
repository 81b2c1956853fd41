"""Windows and levels against a slow reference that holds the whole video."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tad.errors import RecipeError
from tad.extract.snippets import FrameBuffer, LevelTiler, SnippetPlan

plans = st.builds(SnippetPlan, window=st.integers(1, 9), interval=st.integers(1, 4), stride=st.integers(1, 12))


def numbered(frames: int) -> torch.Tensor:
    """Frames whose two pixels hold the frame's number, (n, 1, 2, 1)."""
    return torch.arange(frames, dtype=torch.int32).view(-1, 1, 1, 1).expand(-1, 1, 2, 1)


def all_windows(plan: SnippetPlan, frames: int) -> np.ndarray:
    """Frame numbers of every window, (rows, window): the last frame repeats beyond the end."""
    starts = np.arange(plan.rows(frames)) * plan.stride
    return np.minimum(starts[:, None] + np.arange(plan.window)[None] * plan.interval, frames - 1)


@given(plan=plans, frames=st.integers(1, 200))
def test_rows_cover_every_frame_with_as_few_windows_as_it_takes(plan: SnippetPlan, frames: int) -> None:
    rows = plan.rows(frames)
    assert (rows - 1) * plan.stride + plan.span >= frames  # the last window reaches the end
    assert rows == 1 or (rows - 2) * plan.stride + plan.span < frames  # one fewer would not


@settings(max_examples=150, deadline=None)
@given(plan=plans, frames=st.integers(1, 120), batch=st.integers(1, 7), data=st.data())
def test_streaming_gives_the_windows_of_the_whole_video(
    plan: SnippetPlan, frames: int, batch: int, data: st.DataObject
) -> None:
    buffer = FrameBuffer(plan, batch=batch)
    video, at, found = numbered(frames), 0, []
    while at < frames:
        chunk = data.draw(st.integers(1, 40))
        found += list(buffer.push(video[at : at + chunk]))
        assert buffer._held is not None
        assert len(buffer._held) <= chunk + batch * plan.stride + plan.span  # what is held does not grow with the video
        at += chunk
    found += list(buffer.finish())
    assert all(len(windows) == batch for windows in found[:-1])
    got = torch.cat(found)[:, :, 0, 0, 0].numpy()
    np.testing.assert_array_equal(got, all_windows(plan, frames))


def test_no_frames_give_no_windows() -> None:
    assert list(FrameBuffer(SnippetPlan(4, 1, 2), batch=2).finish()) == []


@settings(max_examples=150, deadline=None)
@given(
    level=st.sampled_from([1, 2, 4, 8]),
    windows=st.integers(1, 4),
    steps=st.integers(1, 4),
    interval=st.integers(1, 3),
    frames=st.integers(1, 400),
    batch=st.integers(1, 5),
)
def test_levels_join_to_one_gapless_sequence(
    level: int, windows: int, steps: int, interval: int, frames: int, batch: int
) -> None:
    plan = SnippetPlan(window=8 * windows, interval=interval, stride=8 * min(steps, windows) * interval)
    plan.check_level("s", level)
    tiler, rows = LevelTiler(plan, level), plan.rows(frames)
    # position p of window w lies at frame w * stride + p * level * interval: the map holds that number, channels differ
    starts = torch.arange(rows)[:, None] * plan.stride + torch.arange(plan.window // level)[None] * level * interval
    for at in range(0, rows, batch):
        tiler.push(torch.stack([starts[at : at + batch], -starts[at : at + batch]], dim=1))  # (B, 2, T')
    joined = tiler.finish(frames)
    step = level * interval
    expected = torch.arange(0, frames, step)
    assert torch.equal(joined, torch.stack([expected, -expected], dim=1))


def test_positions_come_from_the_middle_of_their_window() -> None:
    plan, level = SnippetPlan(window=16, interval=1, stride=8), 4
    tiler = LevelTiler(plan, level)
    owner = torch.arange(3)[:, None].expand(3, 4)[:, None]  # (windows, 1, positions): which window
    tiler.push(owner)
    # 4 positions a window, 2 a step: the first gives its head, each then its middle two, the last its tail
    assert tiler.finish(32)[:, 0].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(("window", "stride", "interval"), [(12, 8, 1), (16, 4, 1), (16, 24, 1), (16, 8, 2)])
def test_levels_that_windows_do_not_tile_are_refused(window: int, stride: int, interval: int) -> None:
    with pytest.raises(RecipeError, match="multiple of 8"):
        SnippetPlan(window, interval, stride).check_level("s8", 8)


def test_time_axis_of_spaced_windows() -> None:
    axis = SnippetPlan(window=32, interval=2, stride=16).axis(30.0)
    assert axis.scale_s == pytest.approx(16 / 30)
    assert axis.translation_s == pytest.approx(0.5 * 63 / 30)  # frames 0, 2, … 62
