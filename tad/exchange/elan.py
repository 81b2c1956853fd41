"""ELAN's .eaf: XML, a file a video, whole milliseconds, one tier a class."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pandas as pd

from tad.annotations._files import Problems, as_number, read_text, shown
from tad.errors import AnnotationError
from tad.exchange.collection import Collection, Format, Options, Segment, check_times
from tad.exchange.files import file_name, folder_for, videos_in

PROPERTY = "tad"  # a property of the document's header that says what its annotations are
KINDS = ("truth", "predictions")
TYPE = "default-lt"
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # what XML 1.0 cannot hold


def read_elan(path: Path, options: Options) -> Collection:
    """A file, or a folder of them; a video's id is its file's name without suffix.

    The label is the annotation's value, or the tier's name where that is empty. In files of ours the tier's
    participant is the class; of predictions the annotation's value is the score, and in truth it is the class too
    until somebody corrects it. Annotations that refer to other annotations, and those whose times are not set, are
    left out and counted in the notes.
    """
    rows: list[tuple[str, float, float, str, float]] = []
    notes = []
    kinds = set()
    files = videos_in(path, ".eaf")
    for video, file in files.items():
        root = _parse(file)
        kind = next((p.text for p in root.iterfind("HEADER/PROPERTY") if p.get("NAME") == PROPERTY), None)
        if kind is not None and kind not in KINDS:
            raise AnnotationError(f"{file}: the property {PROPERTY!r} must be one of {KINDS}, got {shown(kind)}")
        found, left_out = _annotations(root, kind, file)
        if found or kind is not None:
            kinds.add(kind == "predictions")
        rows += [(video, *row) for row in found]
        if left_out:
            notes.append(f"{file.name}: {left_out} annotations without times of their own left out")
    if len(kinds) > 1:
        raise AnnotationError(f"{path} mixes files of truth and of predictions; keep them in two folders")
    table = pd.DataFrame(rows, columns=["video", "start_s", "end_s", "label", "score"])
    if kinds != {True}:
        table = table.drop(columns="score")
    return Collection.of(table, pd.DataFrame({"video": list(files)}), notes=notes, what=str(path))


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
    for header in root.iterfind("HEADER"):
        unit = header.get("TIME_UNITS", "milliseconds")
        if unit != "milliseconds":
            raise AnnotationError(f"{file} counts time in {unit!r}; only milliseconds are read: export it with them")
    return root


def _slots(root: ET.Element, problems: Problems) -> dict[str | None, float | None]:
    slots: dict[str | None, float | None] = {}
    for slot in root.iterfind("TIME_ORDER/TIME_SLOT"):
        text = slot.get("TIME_VALUE")
        slots[slot.get("TIME_SLOT_ID")] = time = None if text is None else as_number(text)
        if text is not None and time is None:
            problems.add(
                f"time slot {slot.get('TIME_SLOT_ID')!r}", f"TIME_VALUE must be milliseconds, got {shown(text)}"
            )
    return slots


def _annotations(root: ET.Element, kind: str | None, file: Path) -> tuple[list[tuple[float, float, str, float]], int]:
    problems = Problems(file)
    slots = _slots(root, problems)
    rows, left_out = [], sum(1 for _ in root.iterfind("TIER/ANNOTATION/REF_ANNOTATION"))
    for tier in root.iterfind("TIER"):
        name = tier.get("TIER_ID") or ""
        participant = (tier.get("PARTICIPANT") or "") if kind is not None else ""
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
            label, score = participant or name, float("nan")
            if kind == "predictions":
                number = as_number(value)
                if number is None:
                    problems.add(where, f"the value must be the score, got {shown(value)}")
                    continue
                score = number
            elif value and value != _as_read(participant):
                label = value
            rows.append((start / 1000, end / 1000, label, score))
    problems.raise_if_any()
    return rows, left_out


def _as_read(label: str) -> str:
    """What an annotation's value that was written as this label is when read: XML has one kind of line break."""
    return label.replace("\r\n", "\n").replace("\r", "\n").strip()


def render_elan(collection: Collection, path: Path, options: Options) -> dict[Path, str]:
    """A folder with a file a video. ELAN allows no overlap within a tier: what overlaps goes to a further tier."""
    folder = folder_for(path, "ELAN")
    check_times(collection, "ELAN")
    texts = {}
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
        _tiers(root, order, rows)
        ET.SubElement(
            root,
            "LINGUISTIC_TYPE",
            {"GRAPHIC_REFERENCES": "false", "LINGUISTIC_TYPE_ID": TYPE, "TIME_ALIGNABLE": "true"},
        )
        text = ET.tostring(root, encoding="unicode", xml_declaration=False)
        if match := _FORBIDDEN.search(text):
            raise AnnotationError(f"video {video!r}: XML cannot hold the character {match[0]!r} of an id or label")
        texts[folder / file_name(video, ".eaf")] = f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'
    return texts


def _tiers(root: ET.Element, order: ET.Element, rows: list[Segment]) -> None:
    slots = annotations = 0
    by_label: dict[str, list[Segment]] = {}
    for row in rows:
        by_label.setdefault(row.label, []).append(row)
    names = set(by_label)  # a class's first tier is called like it; further ones take what no class is called
    for label, group in sorted(by_label.items()):
        lanes: list[tuple[ET.Element, int]] = []  # tiers of this class, and where their last annotation ends
        number = 1
        for start_s, end_s, _, score in group:
            start, end = round(start_s * 1000), round(end_s * 1000)
            lane = next((i for i, (_, busy) in enumerate(lanes) if busy <= start), len(lanes))
            if lane == len(lanes):
                name = label
                while lane and name in names:
                    number += 1
                    name = f"{label} ({number})"
                names.add(name)
                about = {"LINGUISTIC_TYPE_REF": TYPE, "PARTICIPANT": label, "TIER_ID": name}
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
            ET.SubElement(annotation, "ANNOTATION_VALUE").text = label if score is None else repr(score)


ELAN = Format("ELAN", ".eaf", read_elan, render_elan, True, "±0.5 ms")
