"""Subtitles, SRT and WebVTT: any player shows what is detected while the video runs. A file a video, milliseconds."""

from __future__ import annotations

import functools
import html
import re
from pathlib import Path

import pandas as pd

from tad.annotations._files import Problems, read_text
from tad.errors import AnnotationError
from tad.exchange.collection import Collection, Format, Options, check_times
from tad.exchange.files import file_name, folder_for, videos_in

SCORED = re.compile(r"(.+) · (\d+(?:\.\d+)?(?:e-?\d+)?)", re.DOTALL)  # "Diving · 0.8731"
PREDICTIONS = "NOTE tad: predictions"  # in WebVTT without a cue, where no score says so
_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{1,2})[.,](\d{1,3})"
_TIMING = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:[ \t].*)?")
_NO_CUE = re.compile(r"(?:NOTE(?:[ \t].*)?|STYLE[ \t]*|REGION[ \t]*)")  # a block of WebVTT that begins so
_SRT_MARKUP = re.compile(r"</?(?:[bius]|font)(?:\s[^<>]*)?/?>|\{\\[^{}]*\}", re.IGNORECASE)  # <i>, {\an8}
_VTT_MARKUP = re.compile(r"<[^<>]*>")  # voices, classes, italics, times
_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def _read(path: Path, options: Options, *, suffix: str) -> Collection:
    """Cues as segments; ``label · score`` in every cue of all files makes them predictions."""
    rows: list[tuple[str, float, float, str]] = []
    marked = False
    files = videos_in(path, suffix)
    for video, file in files.items():
        cues, predicted = _cues(file, suffix)
        marked |= predicted
        rows += [(video, *cue) for cue in cues]
    table = pd.DataFrame(rows, columns=["video", "start_s", "end_s", "label"])
    matches = [SCORED.fullmatch(text) for text in table["label"]]
    scored = [match for match in matches if match is not None]
    notes = []
    if len(scored) == len(rows) and (rows or marked):
        table["label"] = [match[1] for match in scored]
        table["score"] = [float(match[2]) for match in scored]
    elif marked:
        raise AnnotationError(f"{path} holds predictions, and {len(rows) - len(scored)} cues have no score; add it")
    elif scored:
        notes.append(f"{len(scored)} of {len(rows)} cues end in a score and the others do not: all are read as labels")
    return Collection.of(table, pd.DataFrame({"video": list(files)}), notes=notes, what=str(path))


def _cues(file: Path, suffix: str) -> tuple[list[tuple[float, float, str]], bool]:
    """The cues, and whether the file says of itself that they are predictions."""
    if suffix == ".srt" and file.is_file() and file.stat().st_size == 0:
        return [], False  # an SRT file without a cue
    lines = read_text(file).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    vtt = suffix == ".vtt"
    if vtt and not re.match(r"WEBVTT(?:[ \t]|$)", lines[0]):
        raise AnnotationError(f"{file} is no WebVTT: it must begin with WEBVTT, got {lines[0][:40]!r}")
    problems = Problems(file)
    cues = []
    number = 1 if vtt else 0
    predicted = False
    while number < len(lines):
        line, at = lines[number], number + 1
        number += 1
        if vtt and _NO_CUE.fullmatch(line) and (at == 2 or not lines[at - 2].strip()):
            predicted |= line == PREDICTIONS
            while number < len(lines) and lines[number].strip():
                number += 1
            continue
        if "-->" not in line:
            continue  # a cue's number or name, an empty line
        text: list[str] = []
        while number < len(lines) and lines[number].strip() and "-->" not in lines[number]:
            text.append(lines[number])
            number += 1
        if len(text) > 1 and number < len(lines) and "-->" in lines[number] and text[-1].strip().isdecimal():
            text.pop()  # the next cue's number, with no empty line before it
        match = _TIMING.fullmatch(line)
        if match is None:
            problems.add(f"line {at}", f"expected START --> END, got {line[:60]!r}")
            continue
        label = _label_of("\n".join(text), suffix)
        if not label:
            problems.add(f"line {at}", "the cue has no text to be the label")
        cues.append((_seconds(match.groups()[:4]), _seconds(match.groups()[4:]), label))
    problems.raise_if_any()
    return cues, predicted


def _seconds(parts: tuple[str | None, ...]) -> float:
    hours, minutes, seconds, thousandths = parts
    try:
        whole = (int(hours or 0) * 60 + int(minutes or 0)) * 60 + int(seconds or 0)
        return (whole * 1000 + int((thousandths or "0").ljust(3, "0"))) / 1000
    except (OverflowError, ValueError):  # hours of hundreds or thousands of digits
        return float("inf")


def _label_of(text: str, suffix: str) -> str:
    """What a cue's text says, without markup, on one line."""
    text = html.unescape(_VTT_MARKUP.sub("", text)) if suffix == ".vtt" else _SRT_MARKUP.sub("", text)
    return " ".join(text.split())


def _text_of(label: str, suffix: str) -> str:
    """A label as a cue's text. Raises :class:`AnnotationError` where reading would give another label."""
    text = label.translate(_ESCAPES) if suffix == ".vtt" else label
    if "-->" in text or len(label.splitlines()) != 1 or _label_of(text, suffix) != label:
        raise AnnotationError(
            f"label {label!r}: {suffix} subtitles keep no line breaks, --> or markup, and no spaces but single ones "
            "between words; rename it"
        )
    return text


def _render(collection: Collection, path: Path, options: Options, *, suffix: str) -> dict[Path, str]:
    """A folder with a file a video, cues by start. Segments may overlap: players show them one above the other."""
    folder = folder_for(path, "subtitles")
    check_times(collection, "a subtitle")
    if collection.scored and (collection.segments["score"] < 0).any():
        raise AnnotationError("subtitles hold no negative score; leave out what has one (min_score=0, --min-score 0)")
    text_of = {label: _text_of(label, suffix) for label in collection.segments["label"].unique().tolist()}
    for label in [] if collection.scored else text_of:
        if SCORED.fullmatch(label):
            raise AnnotationError(f"label {label!r} would be read back as a label with a score; rename it")
    texts = {}
    for video, rows in collection.by_video().items():
        parts = ["WEBVTT\n\n"] if suffix == ".vtt" else []
        if suffix == ".vtt" and collection.scored and not rows:
            parts.append(f"{PREDICTIONS}\n\n")
        for number, (start_s, end_s, label, score) in enumerate(rows, start=1):
            text = text_of[label]
            text += "" if score is None else f" · {score + 0.0:.4f}"  # + 0.0 takes the sign off -0.0
            parts.append(f"{number}\n{_stamp(start_s, suffix)} --> {_stamp(end_s, suffix)}\n{text}\n\n")
        texts[folder / file_name(video, suffix)] = "".join(parts)
    return texts


def _stamp(time_s: float, suffix: str) -> str:
    total = round(time_s * 1000)
    seconds, thousandths = divmod(total, 1000)
    hours, seconds = divmod(seconds, 3600)
    mark = "." if suffix == ".vtt" else ","
    return f"{hours:02d}:{seconds // 60:02d}:{seconds % 60:02d}{mark}{thousandths:03d}"


def _format(title: str, suffix: str) -> Format:
    read, render = functools.partial(_read, suffix=suffix), functools.partial(_render, suffix=suffix)
    return Format(title, suffix, read, render, True, "±0.5 ms, scores to 4 digits")


SRT = _format("SubRip subtitles", ".srt")
WEBVTT = _format("WebVTT subtitles", ".vtt")
