"""What is refused before anything is written, what is overwritten, and how ids, files and annotations go together."""

from __future__ import annotations

import gzip
import json
import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from tad.annotations import read_predictions, read_truth
from tad.cli import main
from tad.errors import AnnotationError
from tad.exchange import (
    FORMATS,
    Collection,
    Options,
    format_of,
    plan_collection,
    read_collection,
    write_collection,
)

COLUMNS = ["video", "start_s", "end_s", "label"]


def truth(*rows: tuple) -> Collection:
    return Collection.of(pd.DataFrame(list(rows) or [("v", 1.0, 2.0, "x")], columns=COLUMNS))


def target(folder: Path, name: str) -> Path:
    return folder / name if FORMATS[name].folder else folder / f"{name}{FORMATS[name].suffix}"


def convert(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["convert", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


# Speed


def test_twenty_thousand_videos() -> None:
    """Each step is linear in the videos; a quadratic one takes minutes."""
    ids = [f"video_{i}" for i in range(20_000)]
    table = pd.DataFrame({"video": np.repeat(ids, 2), "start_s": 1.0, "end_s": 2.0, "label": "x"})
    begin = time.process_time()
    collection = Collection.of(table, pd.DataFrame({"video": ids[:10_000], "fps": 25.0}))
    options = Options(fps=30.0)
    rates = [collection.fps_of(video, options) for video in ids]
    rows = collection.by_video()
    assert time.process_time() - begin < 2
    assert rates == [25.0] * 10_000 + [30.0] * 10_000
    assert all(len(rows[video]) == 2 for video in ids)


# Ids and names of files


@pytest.mark.parametrize("suffix", [".srt", ".vtt", ".eaf"])
def test_names_of_files(suffix: str, tmp_path: Path) -> None:
    name = next(name for name, format in FORMATS.items() if format.suffix == suffix)
    ids = ["Übung", "走る", "a/b", "..", "a\u200db", "a\u2028b", "é" * 100, "x.gz", "x.srt", "😀"]
    files = write_collection(truth(*[(video, 1.0, 2.0, "x") for video in ids]), tmp_path / "o", format=name)
    names = {file.name for file in files}
    assert {f"Übung{suffix}", f"走る{suffix}", f"a%2Fb{suffix}", f"x.gz{suffix}", f"😀{suffix}"} <= names
    assert f"a%E2%80%A8b{suffix}" in names
    assert all(len(name.encode()) < 255 for name in names)
    assert set(read_collection(tmp_path / "o").videos["video"]) == set(ids)
    with pytest.raises(AnnotationError, match="too long"):
        write_collection(truth(("走" * 70, 1.0, 2.0, "x")), tmp_path / "p", format=name)


def test_ids_that_are_no_text_are_refused() -> None:
    empty = pd.DataFrame(columns=COLUMNS)
    for video in ("\ud800", "", " ", 5, None, math.nan, ["a"]):
        with pytest.raises(AnnotationError, match="video id"):
            Collection.of(empty, pd.DataFrame({"video": ["a", video]}))
    with pytest.raises(AnnotationError, match=r"'a'.*subset must be text"):
        Collection.of(empty, pd.DataFrame({"video": ["a"], "subset": [5]}))
    with pytest.raises(AnnotationError, match="video id"):
        Collection.of(pd.DataFrame([("\ud800", 1.0, 2.0, "x")], columns=COLUMNS))


@pytest.mark.parametrize("names", [("a%62.srt", "ab.srt"), ("a.srt", "a.SRT"), ("a.srt", "a.srt.gz")])
def test_two_files_of_one_id(names: tuple[str, str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("1\n00:00:01,000 --> 00:00:02,000\nx\n")
    with pytest.raises(AnnotationError) as error:
        read_collection(tmp_path)
    assert all(repr(name) in str(error.value) for name in names)


@pytest.mark.parametrize("name", ["srt", "webvtt", "elan"])
def test_gzipped_files_and_folders_called_like_files(name: str, tmp_path: Path) -> None:
    (file,) = write_collection(truth(), tmp_path / "o", format=name)
    packed = tmp_path / "o" / f"v{FORMATS[name].suffix.upper()}.GZ"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()
    (tmp_path / "o" / f"x{FORMATS[name].suffix}").mkdir()
    assert format_of(packed) == format_of(tmp_path / "o") == name
    for path in (packed, tmp_path / "o"):
        assert read_collection(path).segments.values.tolist() == [["v", 1.0, 2.0, "x"]]


def test_a_folder_of_two_formats_is_not_guessed(tmp_path: Path) -> None:
    write_collection(truth(), tmp_path / "o", format="srt")
    (tmp_path / "o/b.vtt").write_text("WEBVTT\n")
    with pytest.raises(AnnotationError, match="srt and webvtt"):
        read_collection(tmp_path / "o")
    assert read_collection(tmp_path / "o", format="srt").videos["video"].tolist() == ["v"]


# What must not be written


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("w", 2.0, 1.0, "x"), "row 1, video 'w'.*before the start"),
        (("w", -1.0, 1.0, "x"), "row 1, video 'w'.*negative"),
    ],
)
def test_truth_that_cannot_be_is_refused(row: tuple, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        truth(("v", 1.0, 2.0, "x"), row)
    table = pd.DataFrame([(*row, 0.5)], columns=[*COLUMNS, "score"])
    assert Collection.of(table).scored  # false positives may lie anywhere
    for name in ("elan", "labelstudio", "srt", "webvtt"):
        with pytest.raises(AnnotationError, match=r"'w'.*cannot hold"):
            plan_collection(Collection.of(table), f"out{'' if FORMATS[name].folder else '.json'}", format=name, fps=25)


@pytest.mark.parametrize("column", ["duration_s", "fps"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, "long", 10**400, True, [1.0]])
def test_videos_that_cannot_be_are_refused(column: str, value: object) -> None:
    with pytest.raises(AnnotationError, match=f"'v'.*{column}"):
        Collection.of(pd.DataFrame(columns=COLUMNS), pd.DataFrame({"video": ["v"], column: [value]}))


@pytest.mark.parametrize("fps", [0, -1.0, math.nan, math.inf, True, "25"])
def test_frame_rates_that_cannot_be_are_refused(fps: object) -> None:
    with pytest.raises(AnnotationError, match="fps"):
        Options(fps=fps)


@pytest.mark.parametrize("fps", [25, np.float32(25), np.int64(25)])
def test_frame_rates_of_any_kind_of_number(fps: float, tmp_path: Path) -> None:
    write_collection(truth(("v", 0.04, 1.0, "x")), tmp_path / "x.json", format="labelstudio", fps=fps)
    assert read_collection(tmp_path / "x.json").segments.values.tolist() == [["v", 0.04, 1.0, "x"]]


def test_frames_beyond_counting_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="counted"):
        write_collection(truth(("v", 1.0, 1e300, "x")), tmp_path / "x.json", format="labelstudio", fps=1e20)


def test_options_are_checked_whatever_the_format(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="fold1"):
        write_collection(truth(), tmp_path / "x.json", format="activitynet", subset="fold1")
    with pytest.raises(AnnotationError, match=r"\{video\}"):
        write_collection(truth(), tmp_path / "s", format="srt", media="video.mp4")
    table = pd.DataFrame([("v", 1.0, 2.0, "x")], columns=COLUMNS)
    videos = pd.DataFrame({"video": ["v"], "subset": ["fold1"]})
    for name in ("activitynet", "csv"):
        with pytest.raises(AnnotationError, match="'v': subset 'fold1'"):
            write_collection(Collection.of(table, videos), target(tmp_path, name), format=name)
    for subset in ("Train", "val", "testing"):
        path = tmp_path / f"{subset}.json"
        write_collection(truth(), path, format="activitynet", subset=subset)
        assert read_truth(path).videos["subset"].tolist() == [subset]
    assert not (tmp_path / "s").exists()


def test_csv_of_truth_keeps_all_text_or_refuses(tmp_path: Path) -> None:
    rows = [("a\rb", 0.1, 2.0, "x\r\ny"), ("a,b", 0.0, 1.0, '"q"\n#'), ("c", 0.0, 0.1 + 0.2, "=1")]
    write_collection(truth(*rows), tmp_path / "t.csv", format="csv")
    assert [tuple(row) for row in read_collection(tmp_path / "t.csv").segments.values.tolist()] == rows
    for row in ((" a", 0.0, 1.0, "x"), ("a", 0.0, 1.0, "x\r"), ("a", 0.0, 1.0, "x\u2003")):
        with pytest.raises(AnnotationError, match="at the ends"):
            write_collection(truth(row), tmp_path / "u.csv", format="csv")
        predictions = Collection.of(pd.DataFrame([(*row, 0.5)], columns=[*COLUMNS, "score"]))
        write_collection(predictions, tmp_path / "p.csv", format="csv", overwrite=True)
        assert read_predictions(tmp_path / "p.csv").values.tolist() == [[*row, 0.5]]


@pytest.mark.parametrize("name", ["activitynet", "csv", "elan", "srt", "webvtt"])
def test_nothing_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="there is no"):
        write_collection(
            Collection.of(pd.DataFrame(columns=COLUMNS)), target(tmp_path, name), format=name, subset="test"
        )


@pytest.mark.parametrize("option", [{"min_score": math.nan}, {"max_segments": 0}, {"max_segments": -1}])
def test_selections_that_cannot_be_meant(option: dict) -> None:
    with pytest.raises(AnnotationError, match=next(iter(option))):
        Collection.of(pd.DataFrame([("v", 1.0, 2.0, "x", 0.5)], columns=[*COLUMNS, "score"])).select(**option)


# Overwriting


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_overwritten_unless_asked(name: str, tmp_path: Path) -> None:
    path = target(tmp_path, name)
    first = write_collection(truth(), path, format=name, fps=25, subset="test")
    before = {file: file.read_bytes() for file in first}
    other = truth(("w", 1.0, 2.0, "x"))
    with pytest.raises(AnnotationError, match="--overwrite"):
        write_collection(other, path, format=name, fps=25, subset="test")
    assert {file: file.read_bytes() for file in first} == before
    write_collection(other, path, format=name, fps=25, subset="test", overwrite=True)
    assert read_collection(path, format=name, fps=25).videos["video"].tolist() == ["w"]


@pytest.mark.parametrize("name", ["elan", "srt", "webvtt"])
def test_overwriting_a_folder_removes_only_files_of_the_format(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "v1.2"
    write_collection(truth(), folder, format=name)
    (folder / f"old{FORMATS[name].suffix}").mkdir()
    for other in ("v.mp4", f".hidden{FORMATS[name].suffix}", "notes.txt"):
        (folder / other).write_text("x")
    plan = plan_collection(truth(("w", 1.0, 2.0, "x")), folder, format=name, overwrite=True)
    assert [file.name for file in plan.stale] == [f"v{FORMATS[name].suffix}"]
    assert plan.stale[0].exists()
    plan.write()
    left = {"v.mp4", f".hidden{FORMATS[name].suffix}", "notes.txt", f"old{FORMATS[name].suffix}"}
    assert {file.name for file in folder.iterdir()} == left | {f"w{FORMATS[name].suffix}"}


@pytest.mark.parametrize("name", ["elan", "srt", "webvtt"])
def test_all_of_a_folder_is_written_or_nothing(name: str, tmp_path: Path) -> None:
    write_collection(truth(), tmp_path / "o", format=name)
    rows = truth(("a", 1.0, 2.0, "x"), ("b" * 300, 1.0, 2.0, "x"))
    with pytest.raises(AnnotationError, match="too long"):
        write_collection(rows, tmp_path / "o", format=name, overwrite=True)
    assert [file.name for file in (tmp_path / "o").iterdir()] == [f"v{FORMATS[name].suffix}"]


def test_folders_and_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("elan", "srt", "webvtt", "fiftyone"):
        write_collection(truth(), tmp_path / f"{name}.v1.2", format=name)
        assert read_collection(tmp_path / f"{name}.v1.2").videos["video"].tolist() == ["v"]
        for wrong in ("x.eaf", "x.SRT", "x.csv.gz", "file"):
            with pytest.raises(AnnotationError, match="name a folder"):
                write_collection(truth(), tmp_path / wrong, format=name, overwrite=True)
    for odd in ("a\0b.json", "a" * 300 + ".json", "file/x.json"):
        with pytest.raises(AnnotationError, match=r"cannot be written|no path"):
            write_collection(truth(), tmp_path / odd, format="via", overwrite=True)
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    for link in ("gone.json", "loop.json"):
        with pytest.raises(AnnotationError, match="--overwrite"):
            write_collection(truth(), tmp_path / link, format="via")
    (tmp_path / "d.json").mkdir()
    with pytest.raises(AnnotationError, match="is a folder"):
        write_collection(truth(), tmp_path / "d.json", format="via", overwrite=True)


# The command


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two videos in ActivityNet's layout, one with all that can be known of it, one with little."""
    entry = {"annotations": [{"segment": [1, 2], "label": "x"}]}
    full = {"subset": "validation", "duration": 10.0, "fps": 10.0, **entry}
    bare = {"subset": "training", "duration": None, **entry}
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"database": {"full": full, "bare": bare}}))
    return path


def test_annotations_fill_in_what_the_source_does_not_say(source: Path, tmp_path: Path) -> None:
    late = [{"segment": [1, 99], "label": "Ambiguous"}]  # behind the end, and no class: nothing of it is asked for
    about = {"subset": "testing", "duration": 20.0, "fps": 20.0, "annotations": late}
    known = tmp_path / "known.json"
    known.write_text(json.dumps({"database": {"full": about, "bare": about, "third": about}}))
    assert convert(source, "--to", "csv", "-o", tmp_path / "o.csv", "--annotations", known).exit_code == 0
    videos = read_truth(tmp_path / "o.csv").videos.values.tolist()
    assert videos == [["full", "validation", 10.0, 10.0], ["bare", "training", 20.0, 20.0]]
    known.write_text(json.dumps({"database": {"bare": about}}))
    out = convert(source, "--to", "csv", "-o", tmp_path / "o.csv", "--annotations", known, "--overwrite", "--json")
    assert json.loads(out.stdout)["videos"] == 2
    assert read_truth(tmp_path / "o.csv").videos["video"].tolist() == ["full", "bare"]
    assert "1 videos left out" not in out.stderr
    known.write_text(json.dumps({"database": {"third": about}}))
    out = convert(source, "--to", "csv", "-o", tmp_path / "p.csv", "--annotations", known)
    assert "lists none of the videos" in out.stderr


def test_annotations_know_the_frame_rates_for_reading(tmp_path: Path) -> None:
    labels = {"full": [{"label": "x", "support": [11, 20]}], "other": [{"label": "x", "support": [6, 10]}]}
    (tmp_path / "labels.json").write_text(json.dumps({"labels": labels}))
    known = tmp_path / "known.json"
    known.write_text(json.dumps({"database": {"full": {"subset": "val", "fps": 10, "annotations": []}}}))
    arguments = (tmp_path / "labels.json", "--to", "csv", "-o", tmp_path / "o.csv", "--annotations", known)
    assert "fps" in convert(*arguments).stderr
    assert convert(*arguments, "--fps", 5).exit_code == 0
    assert read_truth(tmp_path / "o.csv").segments.values.tolist() == [
        ["full", 1.0, 2.0, "x", "val"],
        ["other", 1.0, 2.0, "x", ""],
    ]


def test_the_command_never_writes_over_what_it_reads(source: Path, tmp_path: Path) -> None:
    text = source.read_bytes()
    for overwrite in ((), ("--overwrite",)):
        out = convert(source, "--to", "activitynet", "-o", source, *overwrite)
        assert (out.exit_code, "is read from" in out.stderr) == (1, True)
    (tmp_path / "link.json").symlink_to(source)
    out = convert(source, "--to", "via", "-o", tmp_path / "link.json", "--overwrite")
    assert "read from" in out.stderr
    assert convert(source, "--to", "elan", "-o", tmp_path / "eaf").exit_code == 0
    before = sorted((tmp_path / "eaf").iterdir())
    for path, to in (("eaf", "elan"), ("eaf", "srt"), ("eaf/bare.eaf", "elan")):
        out = convert(tmp_path / path, "--to", to, "-o", tmp_path / "eaf", "--overwrite")
        assert "read from" in out.stderr, (path, to)
    out = convert(tmp_path / "eaf", "--to", "via", "-o", tmp_path / "x.json", "--annotations", source)
    assert out.exit_code == 0
    arguments = ("--to", "activitynet", "-o", source, "--annotations", source, "--overwrite")
    assert "read from" in convert(tmp_path / "eaf", *arguments).stderr
    assert sorted((tmp_path / "eaf").iterdir()) == before
    assert source.read_bytes() == text


def test_overwrite_and_dry_run(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    arguments = (source, "--to", "srt", "-o", folder)
    out = convert(*arguments, "--dry-run")
    assert out.exit_code == 0
    assert "2 segments of 2 videos would be written" in out.stdout
    assert str(folder / "full.srt") in out.stdout
    assert not folder.exists()
    assert convert(*arguments).exit_code == 0
    out = convert(*arguments, "--dry-run")
    assert (out.exit_code, "--overwrite" in out.stderr) == (1, True)
    out = convert(*arguments, "--subset", "val", "--overwrite", "--dry-run", "--json")
    expected = {"files": [str(folder / "full.srt")], "removed": [str(folder / "bare.srt")], "dry_run": True}
    assert {key: json.loads(out.stdout)[key] for key in expected} == expected
    assert (folder / "bare.srt").exists()
    assert convert(*arguments, "--subset", "val", "--overwrite").exit_code == 0
    assert [file.name for file in folder.iterdir()] == ["full.srt"]


def test_videos_that_csv_leaves_out_are_counted(source: Path, tmp_path: Path) -> None:
    document = json.loads(source.read_text())
    document["database"]["bare"]["annotations"] = []
    source.write_text(json.dumps(document))
    out = convert(source, "--to", "csv", "-o", tmp_path / "o.csv")
    assert (out.exit_code, "1 videos left out" in out.stderr) == (0, True)


@pytest.mark.parametrize(
    "wrong",
    [
        ("--fps", "nan"),
        ("--fps", "inf"),
        ("--fps", "0"),
        ("--fps", "-1"),
        ("--new-subset", "fold1"),
        ("--media", "x.mp4"),
        ("--subset", "fold1"),
        ("--min-score", "0.5"),
    ],
)
def test_wrong_options_are_one_line(wrong: tuple[str, str], source: Path, tmp_path: Path) -> None:
    out = convert(source, "--to", "srt", "-o", tmp_path / "s", *wrong)
    assert out.exit_code in (1, 2)
    assert "rror: " in out.stderr
    assert not (tmp_path / "s").exists()
