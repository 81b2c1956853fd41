"""Videos: whether every file opens, and whether files and annotations speak of the same videos."""

from __future__ import annotations

from pathlib import Path

from tad.annotations import Truth
from tad.doctor.checks import Check, some
from tad.progress import ProgressFactory, silent

GROUP = "videos"
MANY = 50  # files beyond which progress is shown: each is opened, and its first frame decoded


def check_videos(videos: str | Path, truth: Truth | None, *, progress: ProgressFactory | None) -> list[Check]:
    """Raises :class:`VideoError` for a folder or list without any video."""
    from tad.extract.frames import UNREADABLE
    from tad.extract.inputs import find_videos
    from tad.extract.video import probe

    files = find_videos([videos])
    broken, drift = [], []
    known = {} if truth is None else dict(zip(truth.videos["video"], truth.videos["duration_s"], strict=True))
    shown = progress if progress is not None and len(files) > MANY else silent
    with shown(len(files), "open", "videos") as bar:
        for file in files:
            bar.advance(1)
            try:
                info = probe(file.path)
            except UNREADABLE as error:
                broken.append(str(error))
                continue
            annotated, header = known.get(file.video), info.expected_s
            if annotated and header and abs(header - annotated) > max(1.0, 0.02 * annotated):  # never where it is NaN
                drift.append(f"{file.video} {header:.1f} s against {annotated:.1f} s")
    if broken:
        text = f"{len(broken)} of {len(files)} cannot be opened: {some(broken)}"
        checks = [Check(GROUP, "readable", "fail" if len(broken) == len(files) else "warn", text)]
    else:
        checks = [Check(GROUP, "readable", "ok", f"{len(files)} videos were probed, all of them can be opened")]
    if drift:
        text = f"{len(drift)} files last longer or shorter than the annotations say: {some(drift)}"
        checks.append(Check(GROUP, "durations", "warn", text, "another cut of the video? segments would be shifted"))
    return checks + ([] if truth is None else _ids({file.video for file in files}, truth))


def _ids(ids: set[str], truth: Truth) -> list[Check]:
    annotated = truth.videos["video"].tolist()
    lacking = [video for video in annotated if video not in ids]
    extra = sorted(ids - set(annotated))
    if lacking and len(lacking) == len(annotated):
        text = f"none of the {len(annotated)} annotated videos has a file ({some(annotated)} against {some(extra)})"
        return [Check(GROUP, "files", "fail", text, "a file's name without suffix must be the video's id")]
    checks = []
    if lacking:
        text = f"{len(lacking)} annotated videos have no file: {some(lacking)}"
        checks.append(Check(GROUP, "files", "warn", text, "a file's name without suffix must be the video's id"))
    if extra:
        checks.append(Check(GROUP, "files extra", "note", f"{len(extra)} files are not annotated: {some(extra)}"))
    return checks
