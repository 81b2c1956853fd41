"""Malformed annotation and prediction files: an error that names the file and what is wrong, never another exception,
and never a quiet loss of segments.

The default run tries some hundred files; ``pytest -m slow`` 10 000.
"""

from __future__ import annotations

import copy
import json
import math
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tad.annotations import read_predictions, read_truth
from tad.errors import AnnotationError
from tad.evaluate import detection_map
from tad.exchange import FORMATS, Collection, read_collection, write_collection

JUNK: list[Any] = [
    None, True, False, 0, -1, 1e308, -1e308, 10**400, "", " ", "x", "1e5", "nan", "-inf", "1_000", [], {}, [[]], [None],
    {"a": 1}, "\ud800", "\x00", float("nan"), float("inf"), -0.0, "0.5s", [1, 2, 3], ["1", "2"], "é" * 300,
]  # fmt: skip
TRUTH = {
    "version": "1.3",
    "database": {
        "video_a": {
            "subset": "training",
            "duration": 50.0,
            "fps": 25.0,
            "annotations": [{"segment": [1.5, 4.0], "label": "Diving"}, {"segment": [10.0, 20.25], "label": "Running"}],
        },
        "video_b": {"subset": "validation", "duration": 20, "annotations": [{"segment": [0, 5], "label": "Diving"}]},
    },
}
RESULTS = {
    "version": "VERSION 1.3",
    "external_data": {},
    "results": {
        "video_a": [
            {"segment": [1.5, 4.0], "label": "Diving", "score": 0.9},
            {"segment": [10.0, 20.25], "label": "Running", "score": 0.25},
        ],
        "video_b": [{"segment": [0, 5], "label": "Diving", "score": 1}],
    },
}
TRUTH_CSV = (
    "video,start,end,label,subset,duration\nvideo_a,1.5,4,Diving,training,50\nvideo_b,0,5,Running,validation,20\n"
)
RESULTS_CSV = "video,start,end,label,score\nvideo_a,1.5,4,Diving,0.9\nvideo_b,0,5,Running,0.25\n"


def places(node: Any, path: tuple = ()) -> list[tuple]:
    """Where every value of a JSON tree stands."""
    found = [path] if path else []
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        found += places(child, (*path, key))
    return found


def mutate_json(document: dict[str, Any], rng: random.Random) -> tuple[str, str]:
    """The text of a document with one to three values replaced, removed, doubled or renamed; and what was done."""
    tree = copy.deepcopy(document)
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(places(tree))
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        action = rng.choice(("replace", "replace", "replace", "remove", "rename", "double"))
        done.append(f"{action} {path}")
        if action == "replace":
            parent[path[-1]] = copy.deepcopy(rng.choice(JUNK))
        elif action == "remove" or (action == "double" and isinstance(parent, dict)):
            del parent[path[-1]]
        elif action == "double":
            parent.append(copy.deepcopy(parent[path[-1]]))
        elif isinstance(parent, dict):
            parent["".join(rng.choices(string.ascii_letters, k=3))] = parent.pop(path[-1])
        if not places(tree):
            break
    return json.dumps(tree), "; ".join(done)


def mutate_text(text: str, rng: random.Random) -> tuple[str, str]:
    """A text cut short, or with characters or lines replaced, removed or repeated."""
    action = rng.choice(("cut", "noise", "line", "comma", "repeat", "swap"))
    at = rng.randrange(len(text))
    lines = text.split("\n")
    if action == "cut":
        text = text[:at]
    elif action == "noise":
        text = text[:at] + rng.choice('\x00,"\n;\t{}[]é-→') + text[at + rng.randrange(3) :]
    elif action == "line":
        del lines[rng.randrange(len(lines))]
        text = "\n".join(lines)
    elif action == "comma":
        text = text.replace(",", rng.choice((";", ",,", "\t", "")), rng.choice((1, -1)))
    elif action == "repeat":
        text += rng.choice(lines)
    else:
        cells = [line.split(",") for line in lines]
        row = rng.choice(cells)
        row[rng.randrange(len(row))] = str(rng.choice(JUNK[:-1]))
        text = "\n".join(",".join(row) for row in cells)
    return text, f"{action} at {at}"


def check_truth(path: Path) -> int:
    truth = read_truth(path)
    for start_s, end_s, label in truth.segments[["start_s", "end_s", "label"]].itertuples(index=False):
        assert 0 <= start_s <= end_s < math.inf
        assert label.strip()
    assert set(truth.segments["video"]) <= set(truth.videos["video"])
    assert not truth.videos["video"].duplicated().any()
    assert not (truth.videos["duration_s"] <= 0).any()
    return len(truth.segments)


def check_predictions(path: Path) -> int:
    table = read_predictions(path)
    assert table[["start_s", "end_s", "score"]].map(math.isfinite).all().all()
    if "label" in table and len(table):
        truth = table.rename(columns={"score": "unused"})
        truth = truth[truth["end_s"] > truth["start_s"]]
        if len(truth):
            result = detection_map(truth, table, tiou=(0.5,))
            assert 0 <= result.average <= 1
    return len(table)


SOURCES: dict[str, tuple[Any, Callable[[Path], int], str]] = {
    "truth.json": (TRUTH, check_truth, "database"),
    "results.json": (RESULTS, check_predictions, "results"),
    "truth.csv": (TRUTH_CSV, check_truth, ""),
    "results.csv": (RESULTS_CSV, check_predictions, ""),
}


def try_one(name: str, rng: random.Random, folder: Path) -> bool:
    """One malformed file; whether it was refused."""
    original, check, _ = SOURCES[name]
    if isinstance(original, dict) and rng.random() < 0.8:
        text, what = mutate_json(original, rng)
    else:
        text, what = mutate_text(original if isinstance(original, str) else json.dumps(original, indent=1), rng)
    path = folder / name
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        count = check(path)
    except AnnotationError as error:
        message = str(error)
        assert name in message, f"{what}: the error does not name the file: {message}"
        assert len(message) > len(str(path)) + 10, f"{what}: the error says nothing: {message}"
        assert len(message) < 3000 + 5 * len(str(path)), what
        return True
    if count == 0:  # nothing is left only if the file really holds nothing: no list of segments, no row of CSV
        assert '"segment"' not in text, f"{what}: segments were lost without a word"
        assert path.suffix == ".json" or len([line for line in text.split("\n") if line.strip()]) <= 1, what
    return False


@pytest.mark.parametrize("name", SOURCES)
def test_malformed_files(name: str, tmp_path: Path) -> None:
    rng = random.Random(name)
    refused = sum(try_one(name, rng, tmp_path) for _ in range(200))
    assert refused > 80  # most of what is done to the files is an error


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SOURCES)
def test_ten_thousand_malformed_files(name: str, tmp_path: Path) -> None:
    rng = random.Random(f"slow {name}")
    assert sum(try_one(name, rng, tmp_path) for _ in range(2500)) > 1000


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda d: d["video_a"]["annotations"][1].update(segment=[5, "later"]), "end"),
        (lambda d: d["video_a"]["annotations"][1].update(segment=[7]), "segment"),
        (lambda d: d["video_a"]["annotations"][1].pop("label"), "label"),
        (lambda d: d["video_a"]["annotations"][1].update(label=7.5), "label"),
        (lambda d: d["video_a"]["annotations"][1].update(segment=[-2, 3]), "start"),
        (lambda d: d["video_a"]["annotations"][1].update(segment=[9, 3]), "end"),
        (lambda d: d["video_a"].update(duration="long"), "duration"),
        (lambda d: d["video_a"].update(fps=-1), "fps"),
        (lambda d: d["video_a"].update(subset="trainnig"), "subset"),
        (lambda d: d["video_a"].update(annotations={}), "annotations"),
        (lambda d: d.update(video_a=[]), "video_a"),
    ],
)
def test_the_error_names_video_and_field(change: Callable[[dict], Any], field: str, tmp_path: Path) -> None:
    document = copy.deepcopy(TRUTH)
    change(document["database"])
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(document))
    with pytest.raises(AnnotationError) as error:
        read_truth(path)
    assert "truth.json" in str(error.value)
    assert "video_a" in str(error.value)
    assert field in str(error.value)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("activitynet", "csv")])
def test_malformed_files_of_other_tools(name: str, tmp_path: Path) -> None:
    """Whatever is done to them, they are read into sound tables or refused with the file's name."""
    truth = read_truth_of(TRUTH, tmp_path)
    place = tmp_path / ("x" if FORMATS[name].folder else f"x{FORMATS[name].suffix}")
    file = write_collection(truth, place, format=name, fps=25)[0]
    text = file.read_text(encoding="utf-8")
    rng = random.Random(name)
    refused = unnamed = 0
    for _ in range(150):
        if FORMATS[name].suffix == ".json" and rng.random() < 0.8:
            document = json.loads(text)
            changed, what = mutate_json({"x": document} if isinstance(document, list) else document, rng)
            if isinstance(document, list):
                changed = json.dumps(json.loads(changed).get("x"))
        else:
            changed, what = mutate_text(text, rng)
        file.write_bytes(changed.encode("utf-8", "surrogatepass"))
        try:
            found = read_collection(file, format=name, fps=25)
        except AnnotationError as error:
            unnamed += file.name not in str(error)
            refused += 1
            continue
        check_collection(found, what)
    assert refused > 10
    assert not unnamed


@pytest.mark.parametrize("scored", [False, True], ids=["truth", "predictions"])
@pytest.mark.parametrize("name", ["via", "fiftyone", "labelstudio"])
def test_every_value_of_other_tools_files(name: str, scored: bool, tmp_path: Path) -> None:
    """Every place of a small file, with every kind of junk in it, in order and not by chance."""
    row = ("video_a", 1.0, 2.0, "Diving", 0.5)
    table = pd.DataFrame([row], columns=["video", "start_s", "end_s", "label", "score"])
    given = Collection.of(table if scored else table.drop(columns="score"))
    (file,) = write_collection(given, tmp_path / f"{name}.json", format=name, fps=25)
    document = {"x": json.loads(file.read_text())} if name == "labelstudio" else json.loads(file.read_text())
    meant = [path for path in places(document) if path[0] not in ("project", "config")]  # VIA's own business
    tried = refused = 0
    unnamed = []
    for path in meant:
        for junk in JUNK:
            tree = copy.deepcopy(document)
            parent = tree
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = junk
            file.write_bytes(json.dumps(tree["x"] if name == "labelstudio" else tree).encode("utf-8", "surrogatepass"))
            tried += 1
            what = f"{path} = {junk!r:.60}"
            try:
                found = read_collection(file, format=name, fps=25)
            except AnnotationError as error:
                if file.name not in str(error):
                    unnamed.append(what)
                refused += 1
                continue
            check_collection(found, what)
    assert not unnamed
    assert tried == len(meant) * len(JUNK)
    assert refused > tried // 5


def check_collection(found: Collection, what: str) -> None:
    """A table as all of tad expects it, which can be written again."""
    assert found.segments[["start_s", "end_s"]].map(math.isfinite).all().all(), what
    assert found.segments["label"].map(lambda label: isinstance(label, str) and bool(label.strip())).all(), what
    assert found.videos["video"].map(lambda video: isinstance(video, str) and bool(video.strip())).all(), what
    assert not found.videos["video"].duplicated().any(), what
    assert not ((found.videos["fps"] <= 0) | (found.videos["fps"] == math.inf)).any(), what
    if not found.scored:
        assert ((found.segments["start_s"] >= 0) & (found.segments["end_s"] >= found.segments["start_s"])).all(), what


def read_truth_of(document: dict[str, Any], folder: Path) -> Collection:
    path = folder / "given.json"
    path.write_text(json.dumps(document))
    truth = read_truth(path)
    return Collection.of(truth.segments, truth)
