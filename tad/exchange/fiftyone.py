"""FiftyOne's dataset type ``FiftyOneTemporalDetectionDataset``: ``labels.json`` beside a folder ``data`` of videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from tad.annotations._files import Problems, as_number, parse_json, read_text, shown
from tad.errors import AnnotationError
from tad.exchange.collection import Collection, Format, Options, seconds_of
from tad.exchange.files import folder_for

KIND = "tad"  # a key beside 'labels', which FiftyOne does not look at: "truth" or "predictions"


def read_fiftyone(path: Path, options: Options) -> Collection:
    """``timestamps`` (seconds) or ``support`` (first and last frame, counted from 1; needs ``fps``) of each detection.

    All detections with a ``confidence`` are predictions; where only some have one, it is an error. Files of ours say
    what they hold, so that predictions of which none is left are predictions still.
    """
    path = path / "labels.json" if path.is_dir() else path
    content = parse_json(read_text(path), path)
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(labels, dict):
        raise AnnotationError(f"{path} is no FiftyOne labels.json: it needs an object 'labels' by video")
    classes, kind = content.get("classes"), content.get(KIND)
    problems = Problems(path)
    rows: list[tuple[str, float, float, str, float | None]] = []
    for video, detections in labels.items():
        if detections is not None and not isinstance(detections, list):
            problems.add(f"video {video!r}", f"labels must be a list, got {shown(detections)}")
            continue
        for index, detection in enumerate(detections or []):
            where = f"video {video!r}, detection {index}"
            if not isinstance(detection, dict):
                problems.add(where, f"must be an object, got {shown(detection)}")
                continue
            label = _label(detection.get("label"), classes)
            times = _times(detection, options.fps_of(video), where, problems)
            score = detection.get("confidence")
            if label is None:
                problems.add(where, f"label {shown(detection.get('label'))} is no text and no index of 'classes'")
            elif score is not None and as_number(score) is None:
                problems.add(where, f"confidence must be a number, got {shown(score)}")
            elif score is None and kind == "predictions":
                problems.add(where, "these are predictions, and it has no confidence; give it one")
            elif times is not None:
                rows.append((video, *times, label, None if score is None else as_number(score)))
    if len({row[4] is None for row in rows}) > 1:
        problems.add("", "some detections have a confidence and others have none; give all or none")
    problems.raise_if_any()
    table = pd.DataFrame(rows, columns=["video", "start_s", "end_s", "label", "score"])
    scored = rows[0][4] is not None if rows else kind == "predictions"
    if not scored:
        table = table.drop(columns="score")
    return Collection.of(table, pd.DataFrame({"video": list(labels)}), what=str(path))


def _label(label: object, classes: object) -> str | None:
    if isinstance(label, int) and not isinstance(label, bool) and isinstance(classes, list):
        label = classes[label] if 0 <= label < len(classes) else None
    return label if isinstance(label, str) and label else None


def _times(detection: dict[str, Any], fps: float | None, where: str, problems: Problems) -> tuple[float, float] | None:
    name = "timestamps" if detection.get("timestamps") is not None else "support"
    given = detection.get(name)
    values = [as_number(value) for value in given] if isinstance(given, list) else []
    if len(values) != 2 or values[0] is None or values[1] is None:
        problems.add(where, f"{name} must be two numbers, got {shown(given)}")
        return None
    if name == "timestamps":
        return values[0], values[1]
    if fps is None:
        problems.add(where, "'support' counts frames; give the videos' frame rate (fps)")
        return None
    return seconds_of(values[0], values[1], fps)


def render_fiftyone(collection: Collection, path: Path, options: Options) -> dict[Path, str]:
    """``labels.json`` (``path`` itself if it ends in .json, else inside it); the videos are the user's to put or link
    into ``data/`` beside it, under their ids.
    """
    named = path.suffix.lower() == ".json" and not path.is_dir()
    file = path if named else folder_for(path, "FiftyOne") / "labels.json"
    classes = sorted(collection.segments["label"].unique().tolist())
    index = {label: number for number, label in enumerate(classes)}
    labels: dict[str, list[dict[str, Any]]] = {}
    for video, rows in collection.by_video().items():
        labels[video] = [
            {"label": index[label], "timestamps": [start_s, end_s]} | ({} if score is None else {"confidence": score})
            for start_s, end_s, label, score in rows
        ]
    kind = "predictions" if collection.scored else "truth"
    return {file: json.dumps({KIND: kind, "classes": classes, "labels": labels}, ensure_ascii=False) + "\n"}


FIFTYONE = Format("FiftyOne temporal detections", ".json", read_fiftyone, render_fiftyone, False, "exact")
