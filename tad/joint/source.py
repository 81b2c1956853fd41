"""Where joint mode's rows come from: frames, through the backbone that is being trained (see ``tad.detect.source``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tad.apply import feature_recipes
from tad.detect.align import Sample
from tad.detect.data import VideoDataset
from tad.detect.interface import Batch, Detector, LevelSpec
from tad.detect.preflight import Failure
from tad.detect.runs import Run
from tad.detect.source import StoreSource, WriteWeights
from tad.detect.trained_on import check_features
from tad.errors import RecipeError, StoreError
from tad.extract.backbones import build_backbone
from tad.extract.rows import StreamRows
from tad.extract.streams import Stream, resolve
from tad.joint.augment import Augmentation
from tad.joint.bank import FeatureBank
from tad.joint.dataset import JointDataset, check_frames, check_joint, collate, damaged, row_positions, snippet_clips
from tad.joint.encoder import Encoder
from tad.joint.frames import FrameSource, open_sources
from tad.joint.freezing import freeze
from tad.joint.model import JointModel
from tad.joint.runs import finish_saving, save_backbones, starting_features, write_starting
from tad.progress import ProgressFactory
from tad.recipe import DetectRecipe, TrainRecipe
from tad.store import Level, Store
from tad.training.distributed import World
from tad.training.optim import Part
from tad.training.precision import autocast

PIECE_FRAMES = 64  # read at a time where a whole video goes through the backbone


class JointSource(StoreSource):
    """Rows are made anew in each step; in mode ``pre-extracted`` they are those of the store, as for two stages.

    Parameters
    ----------
    recipe : with its section ``joint``.
    store : the features that the training starts from, and the frames unless they are decoded.
    remarks : for the log, such as what a step will take.
    """

    def __init__(self, recipe: DetectRecipe, store: Store, *, remarks: Sequence[str] = ()) -> None:
        assert recipe.joint is not None
        self.recipe, self.store, self.joint, self.remarks = recipe, store, recipe.joint, list(remarks)
        self.anew = self.joint.mode != "pre-extracted"
        self.features: Mapping[str, Any] = {}
        self.sources: dict[str, FrameSource] = {}
        self.streams: dict[str, Stream] = {}
        self.banks: dict[str, FeatureBank] = {}
        self.augmentation = Augmentation(
            random_crop=self.joint.random_crop, flip=self.joint.flip, jitter=self.joint.jitter
        )

    # ---- before the first epoch --------------------------------------------------------------------------------------
    def settled(self, recipe: DetectRecipe) -> DetectRecipe:
        """With the mode that fits into the memory."""
        return recipe.model_copy(update={"joint": self.joint})

    def check_features(self, run: Run, store: Store) -> None:
        """The store holds what the training was begun with; what it made of it since is elsewhere."""
        check_features(run.path, starting_features(run.path), store)
        finish_saving(run.path)

    def lacking(
        self, needs: Sequence[LevelSpec], videos: Sequence[str], *, processes: World, progress: ProgressFactory
    ) -> tuple[list[Failure], list[str]]:
        """Videos whose frames are missing, damaged or not those behind their rows, and what is worth saying of the
        others. All frames are read once, as rows are before a training; each process reads its share.

        Raises
        ------
        RecipeError, StoreError : no video has frames, or the rows cannot be made of them.
        """
        if not self.anew:
            return [], self.remarks
        joint = self.joint
        self.sources = open_sources(
            self.store, needs, frames=joint.frames, flow_frames=joint.flow_frames, videos=joint.videos
        )
        check_joint(needs, self.recipe.data, self.sources)
        found = check_frames(self.store, needs, self.sources, videos, augmentation=self.augmentation)
        failed = {failure.video for failure in found.failures}
        share = [video for video in videos if video not in failed][processes.rank :: processes.size]
        parts = processes.gathered(damaged(self.sources, share, progress))
        failures = found.failures + [failure for part in parts for failure in part]
        if videos and len(failures) == len(videos):
            raise StoreError(f"none of the {len(videos)} videos has frames to train from; the first: {failures[0]}")
        return failures, [*self.remarks, *found.messages]

    def module(
        self,
        detector: Detector,
        *,
        features: Mapping[str, Any],
        path: Path,
        processes: World,
        videos: Sequence[str] = (),
    ) -> Detector:
        """The backbones of the streams that ``detector`` reads, loaded and frozen as the recipe says, before it.

        Raises
        ------
        RecipeError, WeightsError : features not extracted by tad, or weights that are no longer there.
        """
        self.features = features
        if not self.anew:
            return detector
        run = Run(path, self.recipe, [], {stream: dict(known) for stream, known in features.items()})
        read = dict.fromkeys(need.stream for need in detector.needs if not self.sources[need.stream].grid.raw)
        encoders = {}
        for stream, recipe in feature_recipes(run, weights={}).items():
            if stream not in read:
                continue
            backbone = build_backbone(recipe.backbone, weights=recipe.weights, port=recipe.port)
            backbone.interpolate_positions = recipe.interpolate_positions
            freeze(backbone, stages=self.joint.frozen_stages, norms=self.joint.frozen_norms)
            levels = list(dict.fromkeys(need.level for need in detector.needs if need.stream == stream))
            encoders[stream] = Encoder(
                backbone=backbone, keys=levels, chunk=self.joint.chunk, checkpoint=self.joint.checkpoint
            )
            # one backbone is enough: the network that is trained takes the place of this one
            self.streams[stream] = replace(resolve(recipe, name=stream), backbone=backbone, device=processes.device)
        if self.joint.mode == "bank":
            self.banks = {stream: FeatureBank((v, self._stored(stream, v)) for v in videos) for stream in encoders}
        return JointModel(
            detector=detector,
            encoders=encoders,
            joint=self.joint,
            feature_dropout=self.recipe.train.feature_dropout,
            banks=self.banks,
        )

    def _stored(self, stream: str, video: str) -> torch.Tensor:
        """(R, D) float32."""
        return torch.from_numpy(np.asarray(self.store[stream, video][:], np.float32))

    def detector(self, module: Detector) -> Detector:
        """See :class:`StoreSource`."""
        return module.detector if isinstance(module, JointModel) else module

    def parts(self, module: Detector, recipe: TrainRecipe) -> list[Part] | None:
        """The detector, and the backbones at a rate of their own."""
        if not isinstance(module, JointModel):
            return None
        return [Part(module.detector), Part(module.encoders, self.joint.backbone_lr / recipe.lr)]

    def dataset(self, **samples: Any) -> VideoDataset:
        """Samples with the frames behind their rows."""
        if not self.anew:
            return VideoDataset(**samples)
        return JointDataset(sources=self.sources, augmentation=self.augmentation, **samples)

    def collate(self) -> Callable[..., Batch | None] | None:
        """See :class:`StoreSource`."""
        return collate if self.anew else None

    # ---- from epoch to epoch -----------------------------------------------------------------------------------------
    def stepped(self, processes: World) -> None:
        """Every process learns what the others have written to the banks."""
        if processes.size == 1:
            return
        for bank in self.banks.values():
            for updates in processes.gathered(bank.pending()):
                bank.apply(updates)

    def whole(self, module: Detector, sample: Sample) -> Sample:
        """A video's rows as extraction with the backbones of ``module`` would make them, without augmentation."""
        if not isinstance(module, JointModel):
            return sample
        features = dict(sample.features)
        for stream, encoder in zip(module.streams, module.encoders, strict=True):
            assert isinstance(encoder, Encoder)
            needs = [need for need in module.needs if need.stream == stream]
            if needs[0].layout == "rescaled":
                features[stream] = self._rescaled(encoder, stream, sample)
                continue
            levels = self.levels(encoder, stream, sample.video)
            for need in needs:
                rows = features[need.key].shape[0]
                made = levels.get(need.level)
                if made is None or len(made) < rows:
                    raise RecipeError(f"video '{sample.video}': '{need.key}' has fewer rows than the store's")
                features[need.key] = made[:rows]
        return replace(sample, features=features)

    def levels(self, encoder: Encoder, stream: str, video: str) -> dict[str, np.ndarray]:
        """Every level of one video, (rows, ..), as extraction makes them."""
        rows = StreamRows(replace(self.streams[stream], backbone=encoder.backbone), batch=self.joint.chunk)
        made = levels_of(rows, self.sources[stream], video)
        return {name: np.asarray(level.array) for name, level in made.items()}

    def _rescaled(self, encoder: Encoder, stream: str, sample: Sample) -> np.ndarray:
        """Rows (T, D) of a video squeezed into T, of which only those that are read are made."""
        needs = [LevelSpec(stream, layout="rescaled", rows=sample.rows)]
        at = row_positions(self.store, needs, sample.video).features[stream][:, 0]
        clips = snippet_clips(self.sources[stream], sample.video, at).to(self.streams[stream].device)
        precision = self.streams[stream].recipe.precision
        with torch.inference_mode(), autocast(clips.frames.device, precision):
            made = encoder(clips.frames, clips.index)["features"].float().cpu().numpy()  # (U, D)
        low = np.floor(clips.place.cpu().numpy()).astype(int)
        part = (clips.place.cpu().numpy() - low)[:, None]
        high = np.minimum(low + 1, len(made) - 1)
        return np.asarray(made[low] * (1 - part) + made[high] * part, np.float32)

    # ---- files -------------------------------------------------------------------------------------------------------
    def write_features(self, path: Path, features: Mapping[str, Any]) -> None:
        """``starting.json`` beside ``features.json``."""
        write_starting(path, features)

    def write_best(self, path: Path, module: Detector, write: WriteWeights) -> None:
        """The detector with its backbones, and the features that these give."""
        backbones = {}
        if isinstance(module, JointModel):
            for stream, encoder in zip(module.streams, module.encoders, strict=True):
                assert isinstance(encoder, Encoder)
                backbones[stream] = encoder.backbone
        save_backbones(path, self.features, backbones, write)

    def state_dict(self) -> dict[str, Any]:
        """The banks."""
        return {"banks": {stream: bank.state_dict() for stream, bank in self.banks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`StoreSource`."""
        for stream, bank in self.banks.items():
            bank.load_state_dict(state["banks"][stream])


def levels_of(rows: StreamRows, source: FrameSource, video: str) -> dict[str, Level]:
    """All frames of a video, cut as extraction cuts them, through the network of ``rows``."""
    footage = source.about(video)
    box = footage.box
    for first in range(0, footage.frames, PIECE_FRAMES):
        frames = source.read(video, first, min(first + PIECE_FRAMES, footage.frames))  # (n, H, W, C)
        cut = frames[:, box.top : box.top + box.height, box.left : box.left + box.width]
        rows.push(np.ascontiguousarray(cut))
    rows.finish()
    return rows.levels(footage.fps)
