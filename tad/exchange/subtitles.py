"""Subtitles, SRT and WebVTT: any player shows what is detected while the video runs. A file a video, milliseconds."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pandas as pd

from tad.annotations._files import Problems, read_text, write_atomically
from tad.errors import AnnotationError
from tad.exchange.collection import Collection, Format, Options, file_name, files_in, video_of

SCORED = re.compile(r"(.+) · (\d+(?:\.\d+)?(?:e-?\d+)?)", re.DOTALL)  # "Diving · 0.8731"
_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{1,2})[.,](\d{1,3})"
_TIMING = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:[ \t].*)?")
_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def _read(path: Path, options: Options, *, suffix: str) -> Collection:
    """Cues as segments; ``label · score`` in every cue of all files makes them predictions."""
    rows: list[tuple[str, float, float, str]] = []
    videos = []
    for file in files_in(path, suffix):
        videos.append(video_of(file))
        rows += [(videos[-1], *cue) for cue in _cues(file, suffix)]
    table = pd.DataFrame(rows, columns=["video", "start_s", "end_s", "label"])
    matches = [SCORED.fullmatch(text) for text in table["label"]]
    scored = [match for match in matches if match is not None]
    if rows and len(scored) == len(rows):
        table["label"] = [match[1] for match in scored]
        table["score"] = [float(match[2]) for match in scored]
    return Collection.of(table, pd.DataFrame({"video": videos}), what=str(path))


def _cues(file: Path, suffix: str) -> list[tuple[float, float, str]]:
    if file.is_file() and file.stat().st_size == 0:
        return []  # an SRT file without a cue
    lines = read_text(file).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if suffix == ".vtt":
        if not lines[0].startswith("WEBVTT"):
            raise AnnotationError(f"{file} is no WebVTT: it must begin with WEBVTT, got {lines[0][:40]!r}")
        lines = lines[1:]
    problems = Problems(file)
    cues = []
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if "-->" not in line:
            continue  # a cue's number or name, a comment, an empty line
        match = _TIMING.fullmatch(line)
        text: list[str] = []
        while number < len(lines) and lines[number].strip():
            text.append(lines[number])
            number += 1
        if match is None:
            problems.add(f"line {number - len(text)}", f"expected START --> END, got {line[:60]!r}")
            continue
        start_s, end_s = _seconds(match.groups()[:4]), _seconds(match.groups()[4:])
        label = _unescape(" ".join(text).strip(), suffix)
        if not label:
            problems.add(f"line {number}", "the cue has no text to be the label")
        cues.append((start_s, end_s, label))
    problems.raise_if_any()
    return cues


def _seconds(parts: tuple[str | None, ...]) -> float:
    hours, minutes, seconds, thousandths = parts
    whole = (int(hours or 0) * 60 + int(minutes or 0)) * 60 + int(seconds or 0)
    return (whole * 1000 + int((thousandths or "0").ljust(3, "0"))) / 1000


def _unescape(text: str, suffix: str) -> str:
    if suffix != ".vtt":
        return text
    text = re.sub(r"<[^<>]*>", "", text)  # voices, classes, italics
    for character, escape in reversed(_ESCAPES.items()):
        text = text.replace(escape, character)
    return text


def _write(collection: Collection, path: Path, options: Options, *, suffix: str) -> list[Path]:
    """A folder with a file a video, cues by start. Segments may overlap: players show them one above the other."""
    if path.suffix:
        raise AnnotationError(f"{path}: subtitles are a file a video; name a folder")
    for label in collection.segments["label"].unique():
        if len(label.splitlines()) != 1 or "-->" in label or label.strip() != label:
            raise AnnotationError(f"label {label!r}: a subtitle cannot hold line breaks, --> or spaces at the ends")
        if not collection.scored and SCORED.fullmatch(label):
            raise AnnotationError(f"label {label!r} would be read back as a label with a score; rename it")
    written = []
    for video, rows in collection.by_video().items():
        parts = ["WEBVTT\n\n"] if suffix == ".vtt" else []
        scores = rows["score"].tolist() if collection.scored else [None] * len(rows)
        columns = zip(rows["start_s"].tolist(), rows["end_s"].tolist(), rows["label"].tolist(), scores, strict=True)
        for number, (start_s, end_s, label, score) in enumerate(columns, start=1):
            if min(start_s, end_s) < 0 or (score is not None and score < 0):
                raise AnnotationError(
                    f"video {video!r}: subtitles hold no negative time or score ({start_s:g} s, {score})"
                )
            if suffix == ".vtt":
                label = "".join(_ESCAPES.get(character, character) for character in label)
            text = label if score is None else f"{label} · {score:.4f}"
            parts.append(f"{number}\n{_stamp(start_s, suffix)} --> {_stamp(end_s, suffix)}\n{text}\n\n")
        file = path / file_name(video, suffix)
        write_atomically(file, iter(parts))
        written.append(file)
    return written


def _stamp(time_s: float, suffix: str) -> str:
    total = round(time_s * 1000)
    seconds, thousandths = divmod(total, 1000)
    hours, seconds = divmod(seconds, 3600)
    mark = "." if suffix == ".vtt" else ","
    return f"{hours:02d}:{seconds // 60:02d}:{seconds % 60:02d}{mark}{thousandths:03d}"


def _format(title: str, suffix: str) -> Format:
    read, write = functools.partial(_read, suffix=suffix), functools.partial(_write, suffix=suffix)
    return Format(title, suffix, read, write, True, "±0.5 ms, scores to 4 digits")


SRT = _format("SubRip subtitles", ".srt")
WEBVTT = _format("WebVTT subtitles", ".vtt")
