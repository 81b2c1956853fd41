"""``tad classify``: scores of whole videos, the mean over clips of what a classifier says of each.

With the folder of a fine-tuned backbone its own head is asked; the background's probability is dropped from the mean
and the rest made to sum to 1, so that clips of the background count little. With a public checkpoint its own classifier
is asked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tad.annotations import Truth, read_truth
from tad.errors import AnnotationError, RecipeError, TadError, VideoError
from tad.extract.backbones import build_backbone, load_backbone
from tad.extract.backbones.base import Backbone
from tad.extract.clip_reading import StreamReader
from tad.extract.clip_sampling import ClipPlan, in_sequence
from tad.extract.clip_trainer import clip_logits
from tad.extract.clips import BACKGROUND, Clip, ClipFormat, LabelledVideo, count_frames, frames_at
from tad.extract.finetune_recipe import FinetuneRecipe, resolved
from tad.extract.finetune_run import FinetunedRun
from tad.extract.frames import UNREADABLE
from tad.extract.inputs import VideoFile, find_videos
from tad.extract.score_file import ScoreFile, video_accuracy
from tad.extract.streams import EXTRACTOR
from tad.extract.video import source_of
from tad.extract.weights import sha256_of
from tad.progress import ProgressFactory, silent
from tad.training.distributed import pick_device

DECODERS = 2  # threads


@dataclass
class ClassifyReport:
    """What a run did: ``scores`` are those in the file now, of this call's videos only."""

    scores: pd.DataFrame
    written: int = 0
    already: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)  # video, path, message
    accuracy: dict[str, Any] | None = None


@dataclass(frozen=True)
class VideoClassifier:
    """A network with a classifier: clips' logits (B, N), of which ``skip`` first ones are no class."""

    backbone: Backbone
    classify: torch.nn.Module
    classes: list[str]
    skip: int
    form: ClipFormat
    about: dict[str, Any]

    def scores(self, probabilities: np.ndarray) -> np.ndarray:
        """Probabilities of clips (clips, N) → scores of the video (K,): the mean, its classes made to sum to 1."""
        mean = probabilities.mean(axis=0, dtype=np.float64)[self.skip :]
        total = mean.sum()
        return mean / total if total > 0 else np.full(len(mean), 1 / len(mean))


def classify(
    videos: str | Path | Iterable[str | Path],
    *,
    weights: str | Path,
    out: str | Path,
    backbone: str | None = None,
    classes: str | Path | Sequence[str] | None = None,
    clips: int = 32,
    annotations: Truth | str | Path | None = None,
    subset: str | None = None,
    batch: int = 8,
    precision: Literal["fp32", "fp16", "bf16"] = "fp32",
    device: str | None = None,
    overwrite: bool = False,
    progress: ProgressFactory = silent,
) -> ClassifyReport:
    """Score every video by class and write :func:`tad.annotations.write_video_scores`'s file ``out``.

    Videos that are in ``out`` already and have not changed are left as they are; scores are saved every minute and when
    the call is interrupted.

    Parameters
    ----------
    videos : files, folders or lists, as for :func:`tad.extract.extract`.
    weights : the folder of :func:`tad.extract.finetune.finetune`, or a checkpoint that has a classifier.
    backbone : its name, where a checkpoint could be of several networks.
    classes : names of a checkpoint's classes, in their order, or a file with one a line; default ``class_0`` and so on.
    clips : clips a video, evenly spread; fewer where a video has not that many different ones.
    annotations : the truth, for ``subset`` and for accuracy. subset : only its videos.
    batch : clips a forward pass.
    overwrite : begin anew if ``out`` holds scores of other weights, classes or clips.

    Raises
    ------
    RecipeError : ``out`` holds other scores; classes that do not fit. WeightsError : weights that cannot be used.
    AnnotationError : an unknown subset. A video that fails is listed in the report instead.
    """
    if clips < 1 or batch < 1:
        raise RecipeError(f"clips and batch must be at least 1, got {clips} and {batch}")
    if Path(out).suffix.lower() != ".json":
        raise RecipeError(f"{out}: scores of videos are written as .json")
    if subset is not None and annotations is None:
        raise RecipeError("subset needs the annotations that say which videos it holds")
    truth = annotations if isinstance(annotations, Truth) or annotations is None else read_truth(annotations)
    chosen = pick_device(device)
    if precision == "fp16" and chosen.type != "cuda":
        raise RecipeError("precision=fp16 needs a CUDA device; take bf16 or fp32 on the CPU")
    files = find_videos([videos] if isinstance(videos, (str, Path)) else videos)
    if truth is not None and subset is not None:
        wanted = set(map(str, truth.subset(subset).videos["video"]))
        files = [file for file in files if file.video in wanted]
        if not files:
            raise AnnotationError(f"none of the video files is of subset '{subset}' of {truth.path}")
    network = build_classifier(weights, backbone=backbone, classes=classes)
    about = {**network.about, "clips": clips, "precision": precision}
    table = ScoreFile(Path(out), network.classes, about, overwrite=overwrite)
    report = ClassifyReport(pd.DataFrame())
    todo = [file for file in files if not table.holds(file)]
    report.already = len(files) - len(todo)
    network.backbone.to(chosen)
    network.classify.to(chosen)

    broken: dict[str, str] = {}
    sources: dict[str, dict[str, str | int]] = {}
    try:
        with progress(len(todo), "classify", "videos") as bar:
            for file, arrays in _clips_of(todo, network.form, clips, broken, sources):
                if file.video not in broken:
                    parts = [
                        _probabilities(network, arrays[k : k + batch], chosen, precision)
                        for k in range(0, len(arrays), batch)
                    ]
                    try:
                        table.add(file, network.scores(np.concatenate(parts)), source=sources[file.video])
                        report.written += 1
                    except VideoError as error:  # the file changed meanwhile
                        broken[file.video] = str(error)
                if file.video in broken:
                    failure = {"video": file.video, "path": str(file.path), "message": broken[file.video]}
                    report.failures.append(failure)
                bar.advance(1, file.video)
    finally:
        table.save()
    report.scores = table.frame([file.video for file in files])
    report.accuracy = None if truth is None else video_accuracy(report.scores, truth)
    return report


def build_classifier(
    weights: str | Path, *, backbone: str | None = None, classes: str | Path | Sequence[str] | None = None
) -> VideoClassifier:
    """The network behind ``weights`` (see :func:`classify`), on the CPU, in evaluation mode."""
    path = Path(weights)
    if path.is_dir():
        run = FinetunedRun.load(path)
        if backbone not in (None, run.recipe.backbone):
            raise RecipeError(f"run {path} is of {run.recipe.backbone}, not of {backbone}")
        if classes is not None:
            raise RecipeError(f"run {path} has classes of its own: leave classes out")
        head_id = f"sha256:{sha256_of(path / 'head.safetensors')}"
        about = _about(run.backbone, run.form) | {"head": head_id}
        return VideoClassifier(run.backbone, run.head, run.classes, BACKGROUND + 1, run.form, about)
    if (path.parent / "head.safetensors").is_file() and path.name == "backbone.safetensors":
        raise RecipeError(f"{path} is of a fine-tuned backbone; its classifier is used with the folder: {path.parent}")
    network = load_backbone(path) if backbone is None else build_backbone(backbone, weights=path)
    _, form = resolved(FinetuneRecipe(backbone=network.spec.name), network)
    head = _Own(network)
    with torch.inference_mode():
        count = head(torch.zeros(1, network.spec.width)).shape[-1]
    names = [f"class_{k}" for k in range(count)] if classes is None else _names(classes)
    if len(names) != count:
        raise RecipeError(f"{len(names)} class names for the {count} classes of {path}")
    return VideoClassifier(network, head, names, 0, form, _about(network, form))


class _Own(torch.nn.Module):
    """A backbone's own classifier, features → logits."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, features: Tensor) -> Tensor:
        return self.backbone.classify(features)


def _about(backbone: Backbone, form: ClipFormat) -> dict[str, Any]:
    geometry, snippets = form.geometry, form.snippets
    return {
        "backbone": backbone.spec.name,
        "weights": backbone.weights_id,
        "variant": backbone.variant,
        "window": snippets.window,
        "interval": snippets.interval,
        "fps": form.fps,
        "short_side": geometry.short_side,
        "crop": None if geometry.crop is None else list(geometry.crop),
        "resize": None if geometry.resize is None else list(geometry.resize),
        "flow": form.flow,
        "extractor": EXTRACTOR,
    }


def _names(classes: str | Path | Sequence[str]) -> list[str]:
    if not isinstance(classes, (str, Path)):
        names = list(classes)
    else:
        try:
            names = [line.strip() for line in Path(classes).read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"class names {classes} cannot be read: {error}") from error
        while names and not names[-1]:
            names.pop()
    if not all(names) or len(set(names)) < len(names):
        raise RecipeError("class names must be one a line, none empty, none twice")
    return names


# ---- clips ----------------------------------------------------------------------------------------------------------
def spread(frames: int, span: int, clips: int) -> np.ndarray:
    """First frames of ``clips`` clips of ``span`` frames, each in the middle of its share of a video; none twice."""
    starts = max(1, frames - span + 1)
    return np.unique(((np.arange(clips) + 0.5) * starts / clips).astype(np.int64))


def _clips_of(
    files: Sequence[VideoFile],
    form: ClipFormat,
    clips: int,
    broken: dict[str, str],
    sources: dict[str, dict[str, str | int]],
) -> Iterator[tuple[VideoFile, list[np.ndarray]]]:
    """Each video with its clips (window, h, w, C), the next ones being decoded meanwhile; ``broken`` is told of those
    that cannot be read, and why, ``sources`` of what each file was before it was opened.
    """
    opened: list[LabelledVideo] = []
    begun: deque[tuple[VideoFile, int]] = deque()  # how many clips will come of each video

    def plans() -> Iterator[ClipPlan]:
        for file in files:
            try:
                sources[file.video] = source_of(file.path)
                frames, fps = count_frames(file.path, fps=form.fps)
            except UNREADABLE as error:
                broken[file.video] = str(error) if isinstance(error, TadError) else repr(error)
                begun.append((file, 0))
                continue
            opened.append(LabelledVideo(file.video, file.path, frames, fps, np.zeros(0), np.zeros(0)))
            starts = spread(frames, form.snippets.span, clips)
            begun.append((file, len(starts)))
            cut = [Clip(len(opened) - 1, frames_at(int(k), form.offsets(), frames=frames), 0) for k in starts]
            yield in_sequence(cut)

    reader = StreamReader(opened, form, workers=DECODERS, failed=lambda video, message: broken.update({video: message}))
    own: list[np.ndarray | None] = []
    with closing(reader.read(plans())) as arrays:
        for array in arrays:
            while begun[0][1] == 0:
                yield begun.popleft()[0], []
            own.append(array)
            if len(own) == begun[0][1]:
                yield begun.popleft()[0], [clip for clip in own if clip is not None]
                own = []
    for file, _ in begun:
        yield file, []


def _probabilities(
    network: VideoClassifier, clips: Sequence[np.ndarray], device: torch.device, precision: str
) -> np.ndarray:
    with torch.inference_mode():
        logits = clip_logits(network.backbone, network.classify, clips, device=device, precision=precision)
    return torch.softmax(logits, dim=1).cpu().numpy()
