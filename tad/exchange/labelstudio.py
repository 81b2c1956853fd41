"""Label Studio tasks with ``TimelineLabels``: ranges of frames, counted from 1, both ends included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from tad.annotations._files import Problems, as_number, parse_json, read_text, shown, write_atomically
from tad.errors import AnnotationError
from tad.exchange.collection import Collection, Format, Options, frames_of, seconds_of

TYPE = "timelinelabels"
FROM_NAME, TO_NAME = "timelineLabels", "video"  # of the tags in the labelling configuration


def read_labelstudio(path: Path, options: Options) -> Collection:
    """An export (JSON, not JSON-MIN). A task's annotations are truth; a task with none of them has predictions.

    The video's id is ``data.tad_video`` in files of ours, else the name of the file under ``data.video`` (or of the
    only text there that looks like a file) without folder and suffix. Frames become seconds at ``data.fps``, else at
    ``options.fps``. Cancelled annotations are left out.
    """
    tasks = parse_json(read_text(path), path)
    if not isinstance(tasks, list):
        raise AnnotationError(f"{path} is no Label Studio export: it must be a list of tasks, got {shown(tasks)}")
    problems = Problems(path)
    videos: dict[str, float | None] = {}
    found: dict[str, list[tuple[Any, ...]]] = {"annotations": [], "predictions": []}
    for number, task in enumerate(tasks):
        data = task.get("data") if isinstance(task, dict) else None
        video = _video(data) if isinstance(data, dict) else None
        if not isinstance(task, dict) or not isinstance(data, dict) or video is None:
            problems.add(f"task {number}", f"'data' names no video, got {shown(data)}")
            continue
        fps = as_number(data.get("fps")) or options.fps
        videos[video] = fps
        for kind, rows in found.items():
            for group in task.get(kind) or []:
                if isinstance(group, dict) and not group.get("was_cancelled"):
                    _regions(group.get("result"), video, fps, f"task {number}, {kind}", problems, rows)
    scored = not found["annotations"] and bool(found["predictions"])
    problems.raise_if_any()
    columns = ["video", "start_s", "end_s", "label", "score"]
    table = pd.DataFrame(found["predictions" if scored else "annotations"], columns=columns)
    if not scored:
        table = table.drop(columns="score")
    elif table["score"].isna().any():
        raise AnnotationError(f"{path}: predictions without a 'score' in a region; give every region one")
    known = pd.DataFrame({"video": list(videos), "fps": list(videos.values())})
    notes = []
    if found["annotations"] and found["predictions"]:
        notes.append(f"{len(found['predictions'])} predicted regions left out beside the annotations")
    return Collection.of(table, known, notes=notes, what=str(path))


def _video(data: dict[str, Any]) -> str | None:
    ours = data.get("tad_video")
    if isinstance(ours, str) and ours:
        return ours
    texts = [value for value in data.values() if isinstance(value, str) and "." in value]
    name = data.get("video") or (texts[0] if len(texts) == 1 else None)
    if not isinstance(name, str) or not name:
        return None
    stem = name.partition("?")[0].replace("\\", "/").rpartition("/")[2]
    return stem.rpartition(".")[0] or stem


def _regions(
    regions: object, video: str, fps: float | None, where: str, problems: Problems, rows: list[tuple[Any, ...]]
) -> None:
    for region in regions if isinstance(regions, list) else []:
        if not isinstance(region, dict) or region.get("type") != TYPE:
            continue
        value = region.get("value")
        ranges = value.get("ranges") if isinstance(value, dict) else None
        labels = value.get(TYPE) if isinstance(value, dict) else None
        if not isinstance(ranges, list) or not isinstance(labels, list) or not all(isinstance(x, str) for x in labels):
            problems.add(where, f"a region needs value.ranges and value.{TYPE}, got {shown(value)}")
            continue
        if fps is None:
            problems.add(where, "ranges count frames and the task has no data.fps; give the frame rate (fps)")
            return
        for span in ranges:
            first, last = (as_number(span.get(key)) if isinstance(span, dict) else None for key in ("start", "end"))
            if first is None or last is None:
                problems.add(where, f"a range needs numbers 'start' and 'end', got {shown(span)}")
                continue
            times = seconds_of(first, last, fps)
            rows.extend((video, *times, label, as_number(region.get("score"))) for label in labels)


def write_labelstudio(collection: Collection, path: Path, options: Options) -> list[Path]:
    """Tasks to import: truth as annotations, predictions as predictions. Every video's frame rate must be known."""
    if path.suffix.lower() != ".json":
        raise AnnotationError(f"{path}: Label Studio tasks are written as .json")
    tasks = []
    for video, rows in collection.by_video().items():
        fps = collection.fps_of(video, options)
        scores = rows["score"].tolist() if collection.scored else [None] * len(rows)
        columns = zip(rows["start_s"].tolist(), rows["end_s"].tolist(), rows["label"].tolist(), scores, strict=True)
        result = []
        for number, (start_s, end_s, label, score) in enumerate(columns):
            first, last = frames_of(start_s, end_s, fps)
            value = {"ranges": [{"start": first, "end": last}], TYPE: [label]}
            region = {"id": f"s{number}", "type": TYPE, "from_name": FROM_NAME, "to_name": TO_NAME, "value": value}
            result.append(region | ({} if score is None else {"score": score}))
        kind = {"predictions": [{"model_version": "tad", "result": result}]}
        groups = kind if collection.scored else {"annotations": [{"result": result}]}
        tasks.append({"data": {"video": options.media_of(video), "tad_video": video, "fps": fps}, **groups})
    write_atomically(path, iter([json.dumps(tasks, ensure_ascii=False) + "\n"]))
    return [path]


LABELSTUDIO = Format("Label Studio", ".json", read_labelstudio, write_labelstudio, False, "±1 frame")
