"""Label Studio tasks with ``TimelineLabels``: ranges of frames, counted from 1, both ends included."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from tad.annotations._files import Problems, as_number, parse_json, read_text, shown
from tad.errors import AnnotationError
from tad.exchange.collection import Collection, Format, Options, check_times, frames_of, seconds_of
from tad.exchange.files import Sources, json_for, video_in

TYPE = "timelinelabels"
FROM_NAME, TO_NAME = "timelineLabels", "video"  # of the tags in the labelling configuration


class _Task(NamedTuple):
    video: str
    fps: float | None
    where: str
    groups: dict[str, list[dict[str, Any]]]  # "annotations" and "predictions", those that count first


def read_labelstudio(path: Path, options: Options) -> Collection:
    """An export (JSON, not JSON-MIN). Where any task is annotated, with regions or without, annotations are truth and
    predictions are left out; where none is and any has predictions, these are read.

    The video's id is ``data.tad_video`` in files of ours, else the name of the file under ``data.video`` (or of the
    only text there that looks like a file) without folder and suffix. Frames become seconds at ``data.fps``, else at
    the options' rate. Cancelled annotations are left out. Of several annotations of a task one counts: that marked as
    ground truth, else the first; so does the first of several predictions. The notes count what is left out.
    """
    content = parse_json(read_text(path), path)
    if not isinstance(content, list):
        raise AnnotationError(f"{path} is no Label Studio export: it must be a list of tasks, got {shown(content)}")
    problems = Problems(path)
    sources = Sources(problems)
    tasks = []
    for number, entry in enumerate(content):
        if (task := _task(entry, f"task {number}", options, sources, problems)) is not None:
            tasks.append(task)
    annotated = [task for task in tasks if task.groups["annotations"]]
    scored = not annotated and any(task.groups["predictions"] for task in tasks)
    kind = "predictions" if scored else "annotations"
    rows: list[tuple[Any, ...]] = []
    others = 0
    for task in tasks:
        for group in task.groups[kind][:1]:
            others += _regions(group, task, kind, problems, rows)
    problems.raise_if_any()
    table = pd.DataFrame(rows, columns=["video", "start_s", "end_s", "label", "score"])
    if not scored:
        table = table.drop(columns="score")
    rates = {task.video: math.nan if task.fps is None else task.fps for task in tasks}
    known = pd.DataFrame({"video": list(rates), "fps": pd.Series(list(rates.values()), dtype="float64")})
    return Collection.of(table, known, notes=_notes(tasks, annotated, kind, others), what=str(path))


def _task(entry: object, where: str, options: Options, sources: Sources, problems: Problems) -> _Task | None:
    """A task's video, frame rate and groups of regions, or None after saying what is wrong with it."""
    data = entry.get("data") if isinstance(entry, dict) else None
    named = _video(data) if isinstance(data, dict) else None
    if not isinstance(entry, dict) or not isinstance(data, dict) or named is None:
        problems.add(where, f"'data' names no video, got {shown(data)}")
        return None
    video, source = named
    sources.add(video, source)
    fps = as_number(data["fps"]) if data.get("fps") is not None else options.fps_of(video)
    if data.get("fps") is not None and not (fps is not None and 0 < fps < math.inf):
        problems.add(where, f"data.fps must be a positive number, got {shown(data['fps'])}")
        return None
    groups: dict[str, list[dict[str, Any]]] = {}
    for kind in ("annotations", "predictions"):
        given = entry.get(kind)
        if given is not None and not isinstance(given, list):
            problems.add(where, f"{kind} must be a list, got {shown(given)}")
            return None
        groups[kind] = []
        for group in given or []:
            if kind == "predictions" and isinstance(group, int) and not isinstance(group, bool):
                continue  # exports may give predictions by their numbers only
            if not isinstance(group, dict):
                problems.add(where, f"each of {kind} must be an object, got {shown(group)}")
            elif not group.get("was_cancelled"):
                groups[kind].append(group)
        groups[kind].sort(key=lambda group: group.get("ground_truth") is not True)
    return _Task(video, fps, where, groups)


def _video(data: dict[str, Any]) -> tuple[str, str] | None:
    """A task's video id, and what it comes from."""
    texts = [value for key, value in data.items() if isinstance(value, str) and "." in value and key != "tad_video"]
    name = data.get("video") or (texts[0] if len(texts) == 1 else None)
    name = name if isinstance(name, str) else ""
    ours = data.get("tad_video")
    video = ours if isinstance(ours, str) and ours else video_in(name, url=_is_url(name))
    return (video, name) if video.strip() else None


def _is_url(name: str) -> bool:
    """Whether a name is percent-encoded: addresses are, the keys of s3:// and other buckets are not."""
    return name.lower().startswith(("http://", "https://", "/data/"))


def _regions(group: dict[str, Any], task: _Task, kind: str, problems: Problems, rows: list[tuple[Any, ...]]) -> int:
    """Adds the rows of a group of regions; returns how many results are no timeline labels."""
    where = f"{task.where}, {kind}"
    regions = group.get("result")
    if not isinstance(regions, list):
        problems.add(where, f"'result' must be a list, got {shown(regions)}")
        return 0
    others = 0
    for region in regions:
        if not isinstance(region, dict):
            problems.add(where, f"a region must be an object, got {shown(region)}")
            continue
        if region.get("type") != TYPE:
            others += 1
            continue
        value = region.get("value")
        ranges = value.get("ranges") if isinstance(value, dict) else None
        labels = value.get(TYPE) if isinstance(value, dict) else None
        whole = isinstance(ranges, list) and isinstance(labels, list) and ranges and labels
        if not whole or not all(isinstance(label, str) for label in labels or []):
            problems.add(where, f"a region needs value.ranges and value.{TYPE}, not empty, got {shown(value)}")
            continue
        if task.fps is None:
            problems.add(where, "ranges count frames and the task has no data.fps; give the frame rate (fps)")
            return others
        score = as_number(region.get("score", group.get("score")))
        if kind == "predictions" and score is None:
            problems.add(where, f"a predicted region needs a score that is a number, got {shown(region.get('score'))}")
            continue
        for span in ranges or []:
            first, last = (as_number(span.get(key)) if isinstance(span, dict) else None for key in ("start", "end"))
            if first is None or last is None or not 1 <= first <= last:
                problems.add(where, f"a range needs frames 'start' and 'end', counted from 1, got {shown(span)}")
                continue
            times = seconds_of(first, last, task.fps)
            rows.extend((task.video, *times, label, score) for label in labels or [])
    return others


def _notes(tasks: list[_Task], annotated: list[_Task], kind: str, others: int) -> list[str]:
    notes = []
    if further := sum(max(len(task.groups[kind]) - 1, 0) for task in tasks):
        notes.append(f"{further} further {kind} of tasks that have several left out: one a task counts")
    if annotated and (predicted := sum(1 for task in tasks if task.groups["predictions"])):
        notes.append(f"the predictions of {predicted} tasks left out: annotations are what is read")
    if annotated and len(annotated) < len(tasks):
        notes.append(f"{len(tasks) - len(annotated)} tasks are not annotated: their videos have no segment")
    if repeated := len(tasks) - len({task.video for task in tasks}):
        notes.append(f"{repeated} tasks are of a video that another task has too: their segments are put together")
    if others:
        notes.append(f"{others} results that are no {TYPE} left out")
    return notes


def render_labelstudio(collection: Collection, path: Path, options: Options) -> dict[Path, str]:
    """Tasks to import: truth as annotations, predictions as predictions. Every video's frame rate must be known."""
    file = json_for(path, "a list of Label Studio tasks")
    check_times(collection, "Label Studio")
    tasks = []
    for video, rows in collection.by_video().items():
        fps = collection.fps_of(video, options)
        result = []
        for number, (start_s, end_s, label, score) in enumerate(rows):
            first, last = frames_of(start_s, end_s, fps)
            value = {"ranges": [{"start": first, "end": last}], TYPE: [label]}
            region = {"id": f"s{number}", "type": TYPE, "from_name": FROM_NAME, "to_name": TO_NAME, "value": value}
            result.append(region | ({} if score is None else {"score": score}))
        kind = {"predictions": [{"model_version": "tad", "result": result}]}
        groups = kind if collection.scored else {"annotations": [{"result": result}]}
        tasks.append({"data": {"video": options.media_of(video), "tad_video": video, "fps": fps}, **groups})
    return {file: json.dumps(tasks, ensure_ascii=False) + "\n"}


LABELSTUDIO = Format("Label Studio", ".json", read_labelstudio, render_labelstudio, False, "±1 frame")
