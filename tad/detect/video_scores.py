"""Which class scores the proposals of a class-agnostic run are fused with: a file's, or its own classifier's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from tad.annotations import read_video_scores, write_video_scores
from tad.detect.classes import softmax_scores
from tad.detect.classifier_run import classifier_scores
from tad.detect.runs import Run
from tad.errors import RecipeError
from tad.recipe import ClassesRecipe
from tad.store import Store


def class_scores(
    run: Run,
    *,
    store: Store,
    videos: Sequence[str],
    device: torch.device | str,
    scores: pd.DataFrame | str | Path | None = None,
    classes: ClassesRecipe | None = None,
) -> pd.DataFrame:
    """Class scores of ``videos`` (index video, columns classes): ``scores`` where given, else those that the run was
    trained with: its file of scores, which need not know all videos, or its classifier, which is asked.

    Whether a file that is given holds logits says ``classes``, by default the run's.

    Raises
    ------
    RecipeError : the run has neither. AnnotationError : a file that cannot be read.
    """
    if isinstance(scores, pd.DataFrame):
        return scores
    if scores is not None:
        return read_scores(scores, classes or run.recipe.classes)
    if run.scores_path.is_file():
        return read_video_scores(run.scores_path)
    if run.classifier_path.is_dir():
        return classifier_scores(run.classifier_path, store=store, videos=videos, device=device)
    raise RecipeError(
        f"run {run.path} has neither class scores nor a classifier: was its training stopped before its first epoch? "
        "Resume it, or give scores"
    )


def read_scores(path: str | Path, recipe: ClassesRecipe) -> pd.DataFrame:
    """A file of scores by video, logits made probabilities where ``recipe.softmax`` says that they are logits."""
    table = read_video_scores(path)
    return table if recipe.softmax is None else softmax_scores(table, recipe.softmax)


def keep_scores(path: Path, table: pd.DataFrame, *, source: str) -> None:
    """Write class scores into a run's folder, so that it does not depend on where they came from."""
    write_video_scores(path, table, about={"source": source})
