"""Where a training's rows come from: the store. Joint mode (``tad.joint``) has a source that makes them anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tad.detect.align import Sample
from tad.detect.data import VideoDataset
from tad.detect.interface import Batch, Detector, LevelSpec
from tad.detect.preflight import Failure
from tad.detect.runs import Run, write_json
from tad.detect.trained_on import check_features
from tad.progress import ProgressFactory
from tad.recipe import DetectRecipe, TrainRecipe
from tad.store import Store
from tad.training.distributed import World
from tad.training.optim import Part

WriteWeights = Callable[..., None]  # of the detector, with what else its file should say of itself


class StoreSource:
    """Rows are read from the store and handed to the detector as they are."""

    def settled(self, recipe: DetectRecipe) -> DetectRecipe:
        """``recipe`` with what the source has chosen; a run keeps both, and either may resume it."""
        return recipe

    def check_features(self, run: Run, store: Store) -> None:
        """Raise :class:`StoreError` unless ``store`` holds the features that the training of ``run`` was begun with."""
        check_features(run.path, run.features, store)

    def lacking(
        self, needs: Sequence[LevelSpec], videos: Sequence[str], *, processes: World, progress: ProgressFactory
    ) -> tuple[list[Failure], list[str]]:
        """Which of ``videos`` cannot be used for want of anything but rows, and what is worth saying of the others; the
        same in all processes.
        """
        return [], []

    def module(
        self,
        detector: Detector,
        *,
        features: Mapping[str, Any],
        path: Path,
        processes: World,
        videos: Sequence[str] = (),
    ) -> Detector:
        """What is trained: ``detector``, with whatever makes its rows before it.

        ``features`` says how those in the store were made; ``videos`` are trained on.
        """
        return detector

    def detector(self, module: Detector) -> Detector:
        """The detector in ``module``, which reads rows."""
        return module

    def parts(self, module: Detector, recipe: TrainRecipe) -> list[Part] | None:
        """The parts of ``module`` that learn at rates of their own, where there are any."""
        return None

    def dataset(self, **samples: Any) -> VideoDataset:
        """The training samples; the arguments are those of :class:`VideoDataset`."""
        return VideoDataset(**samples)

    def collate(self) -> Callable[..., Batch | None] | None:
        """How samples become a batch, where it is not :func:`tad.detect.data.collate`."""
        return None

    def stepped(self, processes: World) -> None:
        """Called after each optimizer step."""

    def whole(self, module: Detector, sample: Sample) -> Sample:
        """A whole video with its rows as ``module`` makes them now."""
        return sample

    def write_features(self, path: Path, features: Mapping[str, Any]) -> None:
        """Write what a new run says of its features; the run can be resumed from then on."""
        write_json(path / "features.json", features)

    def write_best(self, path: Path, module: Detector, write: WriteWeights) -> None:
        """Write the best weights; ``write(file, **about)`` writes those of the detector."""
        write(path / "best.safetensors")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs of the source: tensors and plain types."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
