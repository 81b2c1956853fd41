"""Scores of videos in NumPy's files, which may lack names: whose rows and columns they are is given beside them."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from tad.annotations._files import SHOWN, Problems, bad_text, read_text
from tad.annotations._thumos14 import CLASSES, UCF101_CLASSES, UCF101_NUMBERS, VIDEOS
from tad.errors import AnnotationError

Array = np.ndarray
MAGIC = (b"\x93NUMPY", b"PK\x03\x04", b"PK\x05\x06")  # of .npy, of .npz, of an empty .npz


def is_array_file(path: Path) -> bool:
    """Whether a file is NumPy's, by its first bytes; False for what cannot be read, of which the text reader tells."""
    try:
        with open(path, "rb") as file:
            head = file.read(6)
    except (OSError, ValueError):
        return False
    return head.startswith(MAGIC)


def read_array_scores(path: Path, *, videos: list[str] | None, classes: list[str] | None) -> pd.DataFrame:
    """The ``.npy`` and ``.npz`` layouts of :func:`tad.annotations.read_video_scores`."""
    arrays = _loaded(path)
    values, names = _scores_of(arrays, path)
    for what, given in (("videos", videos), ("classes", classes)):
        if what in names and given is not None:
            raise AnnotationError(f"{path} names its {what} itself: leave {what} out")
    videos, classes = names.get("videos", videos), names.get("classes", classes)
    if not (np.issubdtype(values.dtype, np.floating) or np.issubdtype(values.dtype, np.integer)):
        raise AnnotationError(f"{path}: scores must be numbers, these are of type {values.dtype}")
    if values.ndim == 3 and values.shape[1] == 1:  # a list of its own around each video's scores, as in TCANet's JSON
        values = values[:, 0]
    if values.ndim != 2:
        raise AnnotationError(f"{path}: scores must be an array (videos, classes), got shape {values.shape}")
    if classes is None and values.shape[1] == UCF101_CLASSES:
        values, classes = values[:, np.array(UCF101_NUMBERS) - 1], list(CLASSES)
        videos = _numbered(len(values), path) if videos is None else videos
    for what, found, count in (("videos", videos, values.shape[0]), ("classes", classes, values.shape[1])):
        if found is None:
            raise AnnotationError(
                f"{path} holds {values.shape[0]} rows and {values.shape[1]} columns of scores without names: give the "
                f"{what} they are of, a list or a text file with one a line"
            )
        if len(found) != count:
            raise AnnotationError(f"{path} holds scores of {count} {what}, but {len(found)} are named")
    assert videos is not None
    assert classes is not None
    problems = Problems(path)
    check_names(problems, videos, "video")
    check_names(problems, classes, "class")
    for row in np.flatnonzero(~np.isfinite(values).all(axis=1)):
        problems.add(f"video {videos[row]!r}", "scores must be finite")
    problems.raise_if_any()
    return pd.DataFrame(values.astype(float), index=pd.Index(videos, name="video", dtype="str"), columns=classes)


def names_of(given: str | Path | Sequence[str] | None, what: str) -> list[str] | None:
    """Names that a caller gives, as a list or as a text file with one a line."""
    if given is None:
        return None
    if not isinstance(given, (str, Path)):
        return list(given)
    names = [line.strip() for line in read_text(given).splitlines()]
    while names and not names[-1]:
        names.pop()
    if not all(names):
        raise AnnotationError(f"{given}: line {names.index('') + 1} is empty; it must name a {what}")
    return names


def check_names(problems: Problems, names: Sequence[object], what: str) -> None:
    """Add what is wrong with the names of videos or classes; there must be a class, not so a video."""
    many = {"video": "videos", "class": "classes"}[what]
    for number, name in enumerate(names):
        if (bad := bad_text(name, f"a {what}")) is not None:
            problems.add(f"{what} {number}", bad)
    if what == "class" and not len(names):
        problems.add(many, "there is none")
    counts = Counter(name for name in names if isinstance(name, str))
    if twice := sorted(name for name, count in counts.items() if count > 1):
        problems.add(many, f"{', '.join(map(repr, twice[:SHOWN]))} more than once")


def _loaded(path: Path) -> dict[str, Array]:
    try:
        with open(path, "rb") as file:  # which NumPy would leave open where it is damaged
            loaded = np.load(file, allow_pickle=False)
            return {"": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except ValueError as error:
        if "allow_pickle" in str(error) or "Object arrays" in str(error):
            raise AnnotationError(
                f"{path} holds pickled Python objects, which could run any code and are not read: "
                "save it as an .npz of plain arrays scores, videos, classes"
            ) from None
        raise AnnotationError(f"{path} is damaged or no NumPy file: {error}") from error
    except (OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise AnnotationError(f"{path} is damaged or no NumPy file: {error}") from error


def _scores_of(arrays: dict[str, Array], path: Path) -> tuple[Array, dict[str, list[str]]]:
    """The scores, and the names that stand beside them in the file."""
    names: dict[str, list[str]] = {}
    for what in ("videos", "classes"):
        if what in arrays and "scores" in arrays:
            found = arrays[what]
            if found.ndim != 1 or found.dtype.kind not in "US":
                raise AnnotationError(
                    f"{path}: '{what}' must be a list of text, got {found.dtype} of shape {found.shape}"
                )
            try:
                names[what] = [text.decode("utf-8") if isinstance(text, bytes) else text for text in found.tolist()]
            except UnicodeDecodeError:
                raise AnnotationError(f"{path}: '{what}' is not UTF-8 text") from None
    if "scores" in arrays:
        return arrays["scores"], names
    if len(arrays) == 1:
        return next(iter(arrays.values())), names
    raise AnnotationError(
        f"{path} holds the arrays {', '.join(sorted(arrays)) or 'none'}: scores of videos are an array 'scores' "
        "with 'videos' and 'classes' beside it, or one array alone"
    )


def _numbered(rows: int, path: Path) -> list[str]:
    """THUMOS14's ids in the order of their numbers, the subset told by how many there are."""
    for subset, count in VIDEOS.items():
        if rows == count:
            return [f"video_{subset}_{number:07d}" for number in range(1, rows + 1)]
    counts = ", ".join(f"{count} of {subset}" for subset, count in VIDEOS.items())
    raise AnnotationError(
        f"{path} looks like UntrimmedNets' scores of THUMOS14 ({UCF101_CLASSES} columns), but has {rows} rows, not "
        f"{counts}: give the videos they are of"
    )
