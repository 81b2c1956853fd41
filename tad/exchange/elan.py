"""ELAN's .eaf: XML, a file a video, whole milliseconds, one tier a class."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pandas as pd

from tad.annotations._files import Problems, as_number, read_text, shown, write_atomically
from tad.errors import AnnotationError
from tad.exchange.collection import Collection, Format, Options, file_name, files_in, video_of

PROPERTY = "tad"  # a property of the document's header that says what its annotations are: truth or predictions
TYPE = "default-lt"
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # what XML 1.0 cannot hold


def read_elan(path: Path, options: Options) -> Collection:
    """A file, or a folder of them; a video's id is its file's name without suffix.

    The label is the annotation's value, or the tier's name where that is empty. In files of ours the tier's
    participant is the class, and of predictions the annotation's value is the score. Annotations that refer to other
    annotations, and those whose times are not set, are left out and counted in the notes.
    """
    rows: list[tuple[str, float, float, str, float]] = []
    videos, notes = [], []
    kinds = set()
    for file in files_in(path, ".eaf"):
        video = video_of(file)
        videos.append(video)
        root = _parse(file)
        kind = next((p.text for p in root.iterfind("HEADER/PROPERTY") if p.get("NAME") == PROPERTY), None)
        found, left_out = _annotations(root, kind, file)
        if found:
            kinds.add(kind == "predictions")
        rows += [(video, *row) for row in found]
        if left_out:
            notes.append(f"{file.name}: {left_out} annotations without times of their own left out")
    if len(kinds) > 1:
        raise AnnotationError(f"{path} mixes files of truth and of predictions; keep them in two folders")
    table = pd.DataFrame(rows, columns=["video", "start_s", "end_s", "label", "score"])
    if kinds != {True}:
        table = table.drop(columns="score")
    return Collection.of(table, pd.DataFrame({"video": videos}), notes=notes, what=str(path))


def _parse(file: Path) -> ET.Element:
    text = read_text(file)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise AnnotationError(f"{file} declares entities or a document type, which no .eaf needs; it is not read")
    try:
        root = ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:
        raise AnnotationError(f"{file} is not valid XML: {error}") from None
    if root.tag != "ANNOTATION_DOCUMENT":
        raise AnnotationError(f"{file} is no .eaf: its root is {root.tag!r}, expected ANNOTATION_DOCUMENT")
    return root


def _annotations(root: ET.Element, kind: str | None, file: Path) -> tuple[list[tuple[float, float, str, float]], int]:
    problems = Problems(file)
    slots: dict[str | None, float | None] = {}
    for slot in root.iterfind("TIME_ORDER/TIME_SLOT"):
        text = slot.get("TIME_VALUE")
        slots[slot.get("TIME_SLOT_ID")] = time = None if text is None else as_number(text)
        if text is not None and time is None:
            problems.add(
                f"time slot {slot.get('TIME_SLOT_ID')!r}", f"TIME_VALUE must be milliseconds, got {shown(text)}"
            )
    rows, left_out = [], sum(1 for _ in root.iterfind("TIER/ANNOTATION/REF_ANNOTATION"))
    for tier in root.iterfind("TIER"):
        name = tier.get("TIER_ID") or ""
        for annotation in tier.iterfind("ANNOTATION/ALIGNABLE_ANNOTATION"):
            where = f"tier {name!r}, annotation {annotation.get('ANNOTATION_ID')!r}"
            references = [annotation.get("TIME_SLOT_REF1"), annotation.get("TIME_SLOT_REF2")]
            unknown = [reference for reference in references if reference not in slots]
            if unknown:
                problems.add(where, f"refers to time slots that are not there: {unknown}")
                continue
            start, end = (slots[reference] for reference in references)
            if start is None or end is None:
                left_out += 1
                continue
            value = (annotation.findtext("ANNOTATION_VALUE") or "").strip()
            label = (tier.get("PARTICIPANT") or name) if kind is not None else (value or name)
            score = as_number(value) if kind == "predictions" else None
            if kind == "predictions" and score is None:
                problems.add(where, f"the value must be the score, got {shown(value)}")
                continue
            rows.append((start / 1000, end / 1000, label, float("nan") if score is None else score))
    problems.raise_if_any()
    return rows, left_out


def write_elan(collection: Collection, path: Path, options: Options) -> list[Path]:
    """A folder with a file a video. ELAN allows no overlap within a tier: what overlaps goes to a further tier."""
    if path.suffix:
        raise AnnotationError(f"{path}: ELAN has a file a video; name a folder")
    written = []
    for video, rows in collection.by_video().items():
        media = options.media_of(video)
        root = ET.Element(
            "ANNOTATION_DOCUMENT",
            {
                "AUTHOR": "tad",
                "DATE": "1970-01-01T00:00:00+00:00",
                "FORMAT": "3.0",
                "VERSION": "3.0",
                "xmlns:xsi": "http://www.w3.org/2001/XMLSchema-instance",
                "xsi:noNamespaceSchemaLocation": "http://www.mpi.nl/tools/elan/EAFv3.0.xsd",
            },
        )
        header = ET.SubElement(root, "HEADER", {"MEDIA_FILE": "", "TIME_UNITS": "milliseconds"})
        url = {"MEDIA_URL": media, "MIME_TYPE": "video/mp4", "RELATIVE_MEDIA_URL": f"./{media}"}
        ET.SubElement(header, "MEDIA_DESCRIPTOR", url)
        kind = ET.SubElement(header, "PROPERTY", {"NAME": PROPERTY})
        kind.text = "predictions" if collection.scored else "truth"
        order = ET.SubElement(root, "TIME_ORDER")
        _tiers(root, order, rows, scored=collection.scored)
        ET.SubElement(
            root,
            "LINGUISTIC_TYPE",
            {"GRAPHIC_REFERENCES": "false", "LINGUISTIC_TYPE_ID": TYPE, "TIME_ALIGNABLE": "true"},
        )
        text = ET.tostring(root, encoding="unicode", xml_declaration=False)
        if match := _FORBIDDEN.search(text):
            raise AnnotationError(f"video {video!r}: XML cannot hold the character {match[0]!r} of an id or label")
        file = path / file_name(video, ".eaf")
        write_atomically(file, iter(['<?xml version="1.0" encoding="UTF-8"?>\n', text, "\n"]))
        written.append(file)
    return written


def _tiers(root: ET.Element, order: ET.Element, rows: pd.DataFrame, *, scored: bool) -> None:
    slots = annotations = 0
    for label, group in rows.groupby("label", sort=True):
        lanes: list[tuple[ET.Element, int]] = []  # tiers of this class, and where their last annotation ends
        scores = group["score"].tolist() if scored else [None] * len(group)
        for start_s, end_s, score in zip(group["start_s"].tolist(), group["end_s"].tolist(), scores, strict=True):
            start, end = round(start_s * 1000), round(end_s * 1000)
            lane = next((i for i, (_, busy) in enumerate(lanes) if busy <= start), len(lanes))
            if lane == len(lanes):
                name = str(label) if lane == 0 else f"{label} ({lane + 1})"
                about = {"LINGUISTIC_TYPE_REF": TYPE, "PARTICIPANT": str(label), "TIER_ID": name}
                lanes.append((ET.SubElement(root, "TIER", about), 0))
            tier = lanes[lane][0]
            lanes[lane] = tier, max(end, start)
            annotations += 1
            references = {"ANNOTATION_ID": f"a{annotations}"}
            for side, time in (("1", start), ("2", end)):
                slots += 1
                ET.SubElement(order, "TIME_SLOT", {"TIME_SLOT_ID": f"ts{slots}", "TIME_VALUE": str(time)})
                references[f"TIME_SLOT_REF{side}"] = f"ts{slots}"
            annotation = ET.SubElement(ET.SubElement(tier, "ANNOTATION"), "ALIGNABLE_ANNOTATION", references)
            ET.SubElement(annotation, "ANNOTATION_VALUE").text = str(label) if score is None else repr(score)


ELAN = Format("ELAN", ".eaf", read_elan, write_elan, True, "±0.5 ms")
