import csv
import os
from pathlib import Path

import pandas as pd
import pytest

from tad.store import Level, open_store
from tests.store.makers import AXIS, SOURCE, SPEC, put, rows

IDS = [
    "NA",
    "null",
    "001",
    "1e5",
    "",
    "a,b",
    'say "hi"',
    "a\nb",
    "a\rb\r\n",
    "nul\0",
    "ü/ö",
    "x" * 60,
    "=1+1",
    " lead",
    "True",
]


def fill(place: str) -> None:
    with open_store(place, "a") as store:
        for number, video in enumerate(filter(None, IDS)):
            put(store, video, rows(3 + number))
        store.create_stream("p", SPEC)
        levels = {"s2": Level(rows(8), AXIS), "s4": Level(rows(4, 6).astype("f2"), AXIS.pooled(2), fps=0.1 + 0.2)}
        store.write("p", "v", levels, duration_s=1 / 3, source=SOURCE)


def test_the_table(any_place: str) -> None:
    fill(any_place)
    with open_store(any_place) as store:
        table = store.catalog()
        assert list(zip(table["stream"], table["video"], strict=True)) == [
            *[("p", "v")] * 2,
            *[("s", video) for video in sorted(filter(None, IDS))],
        ]
        fine, coarse = table.iloc[0], table.iloc[1]
        assert (fine["level"], coarse["level"]) == ("s2", "s4")
        assert (coarse["rows"], coarse["channels"], coarse["dtype"]) == (4, 6, "float16")
        assert coarse["duration_s"] == 1 / 3
        assert coarse["fps"] == 0.1 + 0.2
        assert pd.isna(coarse["stride_frames"])
        axis = AXIS.pooled(2)
        assert (coarse["scale_s"], coarse["translation_s"], coarse["window_s"]) == (
            axis.scale_s,
            axis.translation_s,
            axis.window_s,
        )
        assert fine["path"] == "p/v/s2"
        assert set(table["path"]) >= {"s/ü%2Fö/features", "s/nul%00/features"}
        assert (table["rows"].dtype, table["scale_s"].dtype) == ("int64", "float64")


def test_the_file_says_the_same(any_place: str) -> None:
    fill(any_place)
    with open_store(any_place, "a") as store:
        scanned = store.catalog()
        store.write_catalog()
        pd.testing.assert_frame_equal(store.catalog(refresh=False), scanned)


def test_the_file_is_plain_csv(place: str) -> None:
    with open_store(place, "a") as store:
        put(store, "a,b ü", rows(3))
        store.write_catalog()
    with Path(place, "catalog.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["video"], row["rows"], row["dtype"]) == ("a,b ü", "3", "float32")
    assert pd.read_csv(Path(place, "catalog.csv"))["scale_s"].tolist() == [AXIS.scale_s]


def test_an_outdated_file_is_not_taken(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(place, "a") as store:
        put(store, "v", rows(3))
        store.write_catalog()
        monkeypatch.setattr("tad.store.catalog._scan", lambda store: pytest.fail("scanned although it need not"))
        assert store.catalog(refresh=False)["rows"].tolist() == [3]
        monkeypatch.undo()
        put(store, "w", rows(4))
        assert store.catalog(refresh=False)["rows"].tolist() == [3, 4]  # an entry more
        store.write_catalog()
        put(store, "w", rows(5), overwrite=True)
        assert store.catalog(refresh=False)["rows"].tolist() == [3, 5]  # another entry
        store.write_catalog()
        store.delete("s", "v")
        assert store.catalog(refresh=False)["rows"].tolist() == [5]
        Path(place, "catalog.csv").write_text("stream,video\nx,y\n")
        assert store.catalog(refresh=False)["rows"].tolist() == [5]  # a damaged file


def test_an_empty_store(any_place: str) -> None:
    with open_store(any_place, "a") as store:
        for _ in range(2):
            assert len(store.catalog()) == len(store.catalog(refresh=False)) == 0
            assert "duration_s" in store.catalog().columns
            store.write_catalog()


def test_listing_opens_no_entry(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(place, "a") as store:
        for video in "abc":
            put(store, video, rows(2))
    with open_store(place) as store:
        monkeypatch.setattr(store._made, "entry_attrs", lambda *names: pytest.fail(f"opened {names}"))
        assert store.videos("s") == ["a", "b", "c"]
        assert store.has("s", "a")
        assert os.path.isdir(place)
