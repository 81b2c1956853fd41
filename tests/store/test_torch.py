from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tad.errors import StoreError
from tad.store import Level, open_store
from tad.store.torch import SnippetDataset, pad_snippets
from tad.timeline import TimeAxis
from tests.store.makers import AXIS, SOURCE, SPEC, level

RGB = {"a": 23, "b": 8, "c": 1}
FINE = TimeAxis.from_frames(fps=30, window_frames=16, stride_frames=4)


@pytest.fixture
def filled(place: str) -> str:
    """``rgb`` and ``flow`` on the same grid (flow one row shorter), ``fine`` on one of half the stride."""
    with open_store(place, "a") as store:
        for stream in ("rgb", "flow", "fine"):
            store.create_stream(stream, SPEC)
        for seed, (video, count) in enumerate(RGB.items()):
            array = np.arange(count * 3, dtype="f4").reshape(count, 3) + 1000 * seed
            store.write("rgb", video, {"features": level(array)}, duration_s=count, source=SOURCE)
            flow = np.arange(max(1, count - 1) * 2, dtype="f2").reshape(-1, 2)
            store.write("flow", video, {"features": level(flow)}, duration_s=count, source=SOURCE)
            fine = np.arange(2 * count, dtype="f4")[:, None]
            store.write("fine", video, {"features": Level(fine, FINE)}, duration_s=count, source=SOURCE)
        store.write("rgb", "rgb only", {"features": level(np.ones((4, 3), "f4"))}, duration_s=1, source=SOURCE)
    return place


def test_windows_cover_every_row_once(filled: str) -> None:
    data = SnippetDataset(filled, ["rgb"], rows=5)
    assert len(data) == 5 + 2 + 1 + 1  # 23, 8, 1 and 4 rows
    with open_store(filled) as store:
        for video in store.videos("rgb"):
            items = [item for item in data if item["video"] == video]
            whole = torch.cat([item["features"]["rgb"] for item in items])
            np.testing.assert_array_equal(whole, store["rgb", video].numpy())
            for item in items:
                assert item["axes"]["rgb"] == AXIS.shifted(item["row"])
                assert item["duration_s"] == store["rgb", video].duration_s


def test_overlapping_windows_and_whole_videos(filled: str) -> None:
    data = SnippetDataset(filled, ["rgb"], rows=8, step=4, videos=["a"])
    assert [(item["row"], len(item["features"]["rgb"])) for item in data] == [(0, 8), (4, 8), (8, 8), (12, 8), (16, 7)]
    whole = SnippetDataset(filled, ["rgb"], rows=None)
    assert [len(item["features"]["rgb"]) for item in whole] == [23, 8, 1, 4]


def test_a_step_above_the_window_makes_no_empty_one(tmp_path: Path) -> None:
    lengths = (1, 2, 4, 5, 8, 13)
    with open_store(tmp_path / "s.zarr", "a") as store:
        store.create_stream("s", SPEC)
        for count in lengths:
            array = np.arange(count, dtype="f4")[:, None]
            store.write("s", f"{count:02}", {"features": level(array)}, duration_s=count, source=SOURCE)
        for rows, step in product((1, 2, 5), (1, 4, 7, 30)):
            data = SnippetDataset(store, ["s"], rows=rows, step=step)
            items = [(item["video"], item["row"], len(item["features"]["s"])) for item in data]
            expected = []
            for count in lengths:  # windows until one reaches the end, as long as they start inside
                start = 0
                while start == 0 or (start < count and start - step + rows < count):
                    expected.append((f"{count:02}", start, min(rows, count - start)))
                    start += step
            assert items == expected


def test_other_streams_are_cut_at_the_same_seconds(filled: str) -> None:
    data = SnippetDataset(filled, ["rgb", "flow", "fine"], rows=5)
    assert data.videos == ("a", "b", "c")  # those that all streams have
    for item in data:
        rgb, flow = item["features"]["rgb"], item["features"]["flow"]
        assert len(flow) in (len(rgb), len(rgb) - 1, 1)
        assert item["axes"]["flow"] == item["axes"]["rgb"]
        start_s = item["axes"]["rgb"].center_s(-0.5)
        end_s = item["axes"]["rgb"].center_s(len(rgb) - 0.5)
        expected = [i for i in range(2 * RGB[item["video"]]) if start_s - 1e-9 <= FINE.center_s(i) < end_s - 1e-9]
        assert item["features"]["fine"][:, 0].tolist() == expected
        if expected:
            assert item["axes"]["fine"].center_s(0) == pytest.approx(FINE.center_s(expected[0]))


def test_neighbouring_windows_share_no_row_of_another_stream(filled: str) -> None:
    data = SnippetDataset(filled, ["rgb", "fine"], rows=3, videos=["a"])
    seen = [value for item in data for value in item["features"]["fine"][:, 0].tolist()]
    assert seen == sorted(set(seen))
    assert len(seen) >= 2 * RGB["a"] - 2


@pytest.mark.parametrize(("kind", "method"), [("zarr", "fork"), ("hdf5", "fork"), ("hdf5", "spawn")], indirect=["kind"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_give_what_the_main_process_gives(filled: str, method: str) -> None:
    data = SnippetDataset(filled, ["rgb", "fine"], rows=4)
    data[0]  # handles are open before the workers start
    loader = DataLoader(
        data,
        batch_size=3,
        num_workers=2 if method == "fork" else 1,
        collate_fn=pad_snippets,
        multiprocessing_context=method,
    )
    alone = DataLoader(data, batch_size=3, collate_fn=pad_snippets)
    count = 0
    for ours, theirs in zip(alone, loader, strict=True):
        assert ours["video"] == theirs["video"]
        assert ours["axes"] == theirs["axes"]
        for stream in ("rgb", "fine"):
            assert torch.equal(ours["features"][stream], theirs["features"][stream])
            assert torch.equal(ours["mask"][stream], theirs["mask"][stream])
        count += len(ours["video"])
    assert count == len(data)


def test_padding(filled: str) -> None:
    data = SnippetDataset(filled, ["rgb"], rows=None, videos=["c", "b"])
    batch = pad_snippets([data[0], data[1]])
    assert batch["features"]["rgb"].shape == (2, 8, 3)
    assert batch["mask"]["rgb"].tolist() == [[True] + [False] * 7, [True] * 8]
    assert not batch["features"]["rgb"][0, 1:].any()
    assert torch.equal(batch["features"]["rgb"][1], data[1]["features"]["rgb"])
    assert batch["video"] == ["c", "b"]


def test_indices_and_mistakes(filled: str, tmp_path: Path) -> None:
    data = SnippetDataset(filled, ["rgb"], rows=5)
    assert torch.equal(data[-1]["features"]["rgb"], data[len(data) - 1]["features"]["rgb"])
    with pytest.raises(IndexError, match=f"item {len(data)} of"):
        data[len(data)]
    with pytest.raises(StoreError, match="has no stream 'rbg'"):
        SnippetDataset(filled, ["rbg"])
    with pytest.raises(StoreError, match="has no video 'rgb only'"):
        SnippetDataset(filled, ["rgb", "flow"], videos=["rgb only"])
    with pytest.raises(StoreError, match="list of at least one name"):
        SnippetDataset(filled, "rgb")
    with pytest.raises(StoreError, match="at least 1"):
        SnippetDataset(filled, ["rgb"], rows=0)
    assert len(SnippetDataset(filled, ["rgb"], videos=[])) == 0
