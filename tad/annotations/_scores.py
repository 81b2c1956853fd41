"""Scores of whole videos by class: what ``tad classify`` writes and fusion reads, and what others share."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tad.annotations._files import Problems, as_number, bad_text, parse_json, read_text, shown, write_atomically
from tad.annotations._score_formats import check_names, is_array_file, names_of, read_array_scores
from tad.errors import AnnotationError

VERSION = "tad-video-scores-1"
_OWN = ("version", "classes", "results")


def read_video_scores(
    path: str | Path,
    *,
    videos: str | Path | Sequence[str] | None = None,
    classes: str | Path | Sequence[str] | None = None,
) -> pd.DataFrame:
    """Read scores of videos: one row a video (index ``video``, in the file's order), one float column a class.

    Read are, told apart by what they hold:

    * JSON of :func:`write_video_scores`, ``{"version", "classes": [...], "results": {video: [scores]}}``;
    * JSON of the CUHK classifier that ActivityNet's systems share, ``{"class": [...], "results": {video: [scores]}}``,
      and TCANet's of HACS, where the scores are logits and stand in a list of their own, ``{video: [[logits]]}``;
    * ``.npz`` with ``scores`` (videos, classes), and ``videos`` and ``classes`` as arrays of text;
    * ``.npy`` or one-array ``.npz`` (videos, classes) with ``videos`` and ``classes`` given;
    * UntrimmedNets' array of THUMOS14 (``uNet_test.npy``), which needs neither: row i is video number i + 1, the
      columns are UCF101's 101 classes, and those of THUMOS14's 20 are returned.

    Scores are given back as they are; whether they are probabilities is the file's business. Nothing is unpickled.

    Parameters
    ----------
    videos, classes : ids of the rows and names of the columns where the file has none, or a text file with one a line.

    Raises
    ------
    AnnotationError : unreadable or unknown file, repeated videos or classes, rows of another length, scores that are
        not finite, names that are missing or given though the file has its own.
    """
    path = Path(path)
    if is_array_file(path):
        return read_array_scores(path, videos=names_of(videos, "video"), classes=names_of(classes, "class"))
    if videos is not None:
        raise AnnotationError(f"{path} names its videos itself: leave videos out")
    content = _content(path, classes=names_of(classes, "class"))
    problems = Problems(path)
    names, results = content["classes"], content["results"]
    check_names(problems, names, "class")
    rows: list[list[float]] = []
    for video, given in results.items():
        scores = given[0] if isinstance(given, list) and len(given) == 1 and isinstance(given[0], list) else given
        numbers = [as_number(score) for score in scores] if isinstance(scores, list) else []
        if not isinstance(scores, list) or len(scores) != len(names):
            found = f"{len(scores)} scores" if isinstance(scores, list) else shown(scores)
            problems.add(f"video {video!r}", f"needs a list of {len(names)} scores, got {found}")
        elif any(number is None or not math.isfinite(number) for number in numbers):
            problems.add(f"video {video!r}", f"scores must be finite numbers, got {shown(scores)}")
        elif not video.strip():
            problems.add("results", "a video id is empty")
        else:
            rows.append([number for number in numbers if number is not None])
    problems.raise_if_any()
    index = pd.Index(list(results), name="video", dtype="str")
    return pd.DataFrame(np.array(rows, float).reshape(len(rows), len(names)), index=index, columns=list(names))


def read_scores_about(path: str | Path) -> dict[str, Any]:
    """What a file of scores says beside classes and results: ``backbone``, ``weights`` and so on."""
    return {key: value for key, value in _content(Path(path)).items() if key not in _OWN}


def write_video_scores(path: str | Path, scores: pd.DataFrame, *, about: Mapping[str, Any] | None = None) -> None:
    """Write what :func:`read_video_scores` reads, number by number; the file is whole or absent.

    Parameters
    ----------
    scores : index of video ids, a column a class.
    about : further keys for the file, such as ``backbone`` and ``weights``; plain data.

    Raises
    ------
    AnnotationError : another suffix than ``.json``, ids or classes that are no text or repeat, scores that are not
        finite, or a folder that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        raise AnnotationError(f"{str(path)!r}: scores of videos are written as .json")
    problems = Problems("the scores")
    for what, names in (("video", scores.index.tolist()), ("class", scores.columns.tolist())):
        for name in names:
            if (bad := bad_text(name, f"a {what}")) is not None:
                problems.add("", bad)
        if len(set(map(str, names))) < len(names):
            problems.add("", f"a {what} occurs more than once")
    if not len(scores.columns):
        problems.add("", "there is no class")
    values = scores.to_numpy(float)
    for video, finite in zip(scores.index.tolist(), np.isfinite(values).all(axis=1), strict=True):
        if not finite:
            problems.add(f"video {video!r}", "scores must be finite")
    if clash := sorted(set(about or {}) & set(_OWN)):
        problems.add("about", f"{', '.join(clash)} is the file's own")
    problems.raise_if_any()
    write_atomically(path, _chunks(scores, values, dict(about or {})))


def _chunks(scores: pd.DataFrame, values: np.ndarray, about: dict[str, Any]) -> Iterator[str]:
    """One video a line."""
    head = {"version": VERSION, **about, "classes": scores.columns.tolist()}
    yield json.dumps(head, ensure_ascii=False)[:-1] + ',\n"results": {'
    for number, (video, row) in enumerate(zip(scores.index.tolist(), values.tolist(), strict=True)):
        yield f"{',' if number else ''}\n{json.dumps(video, ensure_ascii=False)}: {json.dumps(row)}"
    yield "\n}}\n"


def _content(path: Path, *, classes: list[str] | None = None) -> dict[str, Any]:
    """The file as ``classes``, ``results`` and the rest, its layout told by its keys."""
    content = parse_json(read_text(path), path)
    known = f'known layouts: {{"version": "{VERSION}", "classes", "results"}} and CUHK\'s {{"class", "results"}}'
    if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
        raise AnnotationError(f"{path} holds no scores of videos; {known}")
    key = "classes" if "classes" in content else "class"
    if classes is not None:
        if key in content:
            raise AnnotationError(f"{path} names its classes itself: leave classes out")
        return {**content, "classes": classes}
    if not isinstance(content.get(key), list):
        raise AnnotationError(f"{path} names no classes; {known}; or give the classes beside it")
    version = content.get("version", VERSION)
    if key == "classes" and version != VERSION:
        raise AnnotationError(f"{path} is of version {shown(version)}, this tad reads {VERSION}; update tad")
    return {**{k: v for k, v in content.items() if k != key}, "classes": content[key]}
