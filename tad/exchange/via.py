"""Projects of the VGG Image Annotator, version 3: one JSON for all videos, opened in a browser.

A temporal segment is an entry of ``metadata`` with two times in ``z`` (seconds) and no region in ``xy``; its label is
the value of an attribute anchored at ``FILE1_Z2_XY0``: text, an option's key for radio buttons and menus, or several
keys with commas between them for check boxes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from tad.annotations._files import Problems, as_number, parse_json, read_text, shown
from tad.errors import AnnotationError
from tad.exchange.collection import Collection, Format, Options
from tad.exchange.files import Sources, json_for, video_in

TEMPORAL = "FILE1_Z2_XY0"
TEXT, CHECKBOX, SELECT = 1, 2, 4  # types of attributes
VIDEO, LOCAL, URLS = 4, 1, (2, 3)  # of files: their type, and where they are


def read_via(path: Path, options: Options) -> Collection:
    """A project's temporal segments; regions and single times are left out and counted in the notes.

    A video's id is its file's name without folder and suffix. Where a project asks several things of a segment, the
    attribute called ``label`` or ``action`` counts, else the first one. Of check boxes each that is set is a segment.
    """
    project = parse_json(read_text(path), path)
    parts = [
        project.get(name) if isinstance(project, dict) else None for name in ("attribute", "file", "view", "metadata")
    ]
    if not all(isinstance(part, dict) for part in parts):
        raise AnnotationError(f"{path} is no VIA 3 project: it needs the objects attribute, file, view and metadata")
    attributes, files, views, metadata = (dict(part or {}) for part in parts)
    problems = Problems(path)
    names = _names(files, views, problems)
    attribute, key, score_key = _attributes(attributes)
    rows: list[tuple[Any, ...]] = []
    others = 0
    for mid, entry in metadata.items():
        where = f"metadata {mid!r}"
        if not isinstance(entry, dict):
            problems.add(where, f"must be an object, got {shown(entry)}")
            continue
        times, region = entry.get("z"), entry.get("xy")
        if region or not isinstance(times, list) or len(times) != 2:
            others += 1
            continue
        video = names.get(str(entry.get("vid")))
        start_s, end_s = (as_number(value) for value in times)
        values = entry.get("av")
        labels, complaint = _labels(attribute, values.get(key) if isinstance(values, dict) else None)
        score = as_number(values.get(score_key)) if isinstance(values, dict) and score_key else None
        if video is None:
            problems.add(where, f"vid {shown(entry.get('vid'))} is no view of one file")
        elif start_s is None or end_s is None:
            problems.add(where, f"z must be two numbers of seconds, got {shown(times)}")
        elif complaint:
            problems.add(where, f"{complaint}; av is {shown(values)}")
        elif score_key and score is None:
            problems.add(where, f"av has no score, got {shown(values)}")
        else:
            rows += [(video, start_s, end_s, label, *([score] if score_key else [])) for label in labels]
    problems.raise_if_any()
    columns = ["video", "start_s", "end_s", "label", *(["score"] if score_key else [])]
    notes = [f"{others} regions and single times left out: they are no segments"] if others else []
    videos = pd.DataFrame({"video": list(dict.fromkeys(names.values()))})
    return Collection.of(pd.DataFrame(rows, columns=columns), videos, notes=notes, what=str(path))


def _names(files: dict[str, Any], views: dict[str, Any], problems: Problems) -> dict[str, str]:
    """The video's id of every view that shows one file."""
    names = {}
    sources = Sources(problems)
    for vid, view in views.items():
        shown_files = view.get("fid_list") if isinstance(view, dict) else None
        if not isinstance(shown_files, list) or len(shown_files) != 1:
            continue
        entry = files.get(str(shown_files[0]))
        name = entry.get("fname") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(name, str) or not name:
            problems.add(f"file {shown_files[0]!r}", f"has no fname, got {shown(entry)}")
            continue
        ours = entry.get("tad_video")
        given = isinstance(ours, str) and bool(ours)
        video = str(ours) if given else video_in(name, url=entry.get("loc") in (*URLS, *map(str, URLS)))
        if not video.strip():
            problems.add(f"file {shown_files[0]!r}", f"fname {shown(name)} gives no name to a video")
            continue
        sources.add(video, f"{name} (file {shown_files[0]})")
        names[str(vid)] = video
    return names


def _attributes(attributes: dict[str, Any]) -> tuple[dict[str, Any], str | None, str | None]:
    """The attribute that holds the label, its key, and the key of the one that holds the score."""
    temporal = {
        str(key): value
        for key, value in attributes.items()
        if isinstance(value, dict) and value.get("anchor_id") == TEMPORAL
    }
    by_name = {str(value.get("aname")).strip().lower(): key for key, value in temporal.items()}
    score = by_name.get("score")
    others = [key for key in temporal if key != score]
    chosen = by_name.get("label") or by_name.get("action") or next(iter(others), None)
    return (temporal[chosen] if chosen else {}), chosen, score


def _labels(attribute: dict[str, Any], value: object) -> tuple[list[str], str]:
    """The labels that a value of the attribute stands for, or what is wrong with it."""
    kind, options = as_number(attribute.get("type")), attribute.get("options")
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not attribute or not text.strip():
        return [], f"has no value of a temporal attribute ({TEMPORAL}) in av"
    if kind == TEXT:
        return [text], ""
    keys = [key.strip() for key in text.split(",") if key.strip()] if kind == CHECKBOX else [text]
    known = options if isinstance(options, dict) else {}
    gone = [key for key in keys if not isinstance(known.get(key), str) or not known[key].strip()]
    if gone or not keys:
        return (
            [],
            f"attribute {attribute.get('aname')!r} has no option {', '.join(map(repr, gone or [text]))} (any more)",
        )
    return [known[key] for key in dict.fromkeys(keys)], ""


def render_via(collection: Collection, path: Path, options: Options) -> dict[Path, str]:
    """One project with a view a video; classes are a menu, scores a second attribute."""
    file = json_for(path, "a VIA project")
    labels = sorted(collection.segments["label"].unique().tolist())
    keys = {label: str(index) for index, label in enumerate(labels)}
    attribute = {"anchor_id": TEMPORAL, "desc": "", "default_option_id": ""}
    attributes: dict[str, Any] = {
        "1": {"aname": "label", "type": SELECT, "options": {key: label for label, key in keys.items()}, **attribute}
    }
    if collection.scored:
        attributes["2"] = {"aname": "score", "type": TEXT, "options": {}, **attribute}
    files, views, metadata = {}, {}, {}
    for index, (video, rows) in enumerate(collection.by_video().items(), start=1):
        fid = str(index)
        name = options.media_of(video)
        files[fid] = {"fid": fid, "fname": name, "type": VIDEO, "loc": LOCAL, "src": "", "tad_video": video}
        views[fid] = {"fid_list": [fid]}
        for number, (start_s, end_s, label, score) in enumerate(rows):
            values = {"1": keys[label]} | ({} if score is None else {"2": repr(score)})
            metadata[f"{fid}_{number:08d}"] = {"vid": fid, "flg": 0, "z": [start_s, end_s], "xy": [], "av": values}
    project = {
        "project": {
            "pid": "__VIA_PROJECT_ID__",
            "rev": "__VIA_PROJECT_REV_ID__",
            "rev_timestamp": "__VIA_PROJECT_REV_TIMESTAMP__",
            "pname": path.stem,
            "creator": "tad",
            "created": 0,
            "data_format_version": "3.1.1",
            "vid_list": list(views),
        },
        "config": {
            "file": {"loc_prefix": {"1": "", "2": "", "3": "", "4": ""}},
            "ui": {
                "file_content_align": "center",
                "file_metadata_editor_visible": True,
                "spatial_metadata_editor_visible": True,
                "temporal_segment_metadata_editor_visible": True,
                "spatial_region_label_attribute_id": "",
                "gtimeline_visible_row_count": "4",
            },
        },
        "attribute": attributes,
        "file": files,
        "metadata": metadata,
        "view": views,
    }
    return {file: json.dumps(project, ensure_ascii=False) + "\n"}


VIA = Format("VGG Image Annotator 3", ".json", read_via, render_via, False, "exact")
