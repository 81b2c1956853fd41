"""The one trainer of all detectors: a recipe, a store and annotations in, a run folder out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tad.annotations import Truth, read_truth
from tad.detect.align import check_needs
from tad.detect.begin import check_same_videos, may_begin, write_head
from tad.detect.data import EpochLoader, epoch_steps
from tad.detect.detectors import DETECTORS, build_detector
from tad.detect.holdout import evaluate_held_out
from tad.detect.preflight import Plan, TrainingSet, plan_training, read_training
from tad.detect.prepare import Prepared, check_class_scores, check_place, check_recipe, prepare
from tad.detect.runs import (
    now_text,
    read_state,
    write_csv,
    write_json,
    write_state,
    write_weights,
)
from tad.detect.source import StoreSource
from tad.detect.trained_on import described_features
from tad.detect.trainer import Trainer
from tad.detect.windows import unused_keys
from tad.errors import RecipeError, StoreError, TadError
from tad.progress import ProgressFactory, silent
from tad.recipe import DetectRecipe
from tad.store import Store, open_store
from tad.training.distributed import World, world
from tad.training.optim import check_training, lr_factor, set_lr
from tad.training.rng import random_state, seed_all, set_random_state

logger = logging.getLogger("tad.detect")


def train_detector(
    recipe: DetectRecipe,
    *,
    store: Store | str | Path,
    annotations: Truth | str | Path,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    progress: ProgressFactory | None = None,
    source: StoreSource | None = None,
) -> dict[str, Any]:
    """Train a detector on stored features and write its run folder (see :mod:`tad.detect.runs`).

    Started by ``torchrun`` it trains in all its processes together: each takes its share of every batch, so that the
    result does not depend on their number but for rounding, as long as the detector's loss is a mean over videos and
    draws nothing at random.

    Parameters
    ----------
    recipe : what to train, on what, how.
    store : the features, open or where they are.
    annotations : the truth, read or where it is.
    out : the folder to write; it may exist if it is empty.
    resume : go on where the run in ``out`` stopped, to the same weights that it would have had without the stop. A
        finished run is left as it is; where there is none yet, training begins.
    overwrite : replace the run that is there.
    device : ``cpu``, ``cuda``, ``cuda:1``; by default CUDA when there is one.
    progress : shows how far it is (see :mod:`tad.progress`).
    source : where the rows come from; by default the store.

    Returns
    -------
    What ``metrics.json`` holds.

    Raises
    ------
    RecipeError : a recipe that does not fit together or differs from that of the run to resume; a folder that is taken.
    StoreError, AnnotationError : streams, videos or segments that are missing; see :mod:`tad.detect.preflight`.
    TadError : the loss is no longer finite.
    """
    if isinstance(store, (str, Path)):
        with open_store(store) as opened:
            return train_detector(
                recipe, store=opened, annotations=annotations, out=out, resume=resume, overwrite=overwrite,
                device=device, progress=progress, source=source,
            )  # fmt: skip
    if recipe.joint is not None and source is None:
        raise RecipeError("this recipe trains the backbone along (its section 'joint'): use 'tad train-joint'")
    source = source or StoreSource()
    truth = annotations if isinstance(annotations, Truth) else read_truth(annotations)
    path = Path(out)
    with world(device) as processes:
        check_training(recipe.train, device=processes.device)
        begun = processes.on_first(
            lambda: may_begin(path, recipe, truth, store, source, resume=resume, overwrite=overwrite)
        )
        if isinstance(begun, dict):
            return begun
        show = progress if progress is not None and processes.first else silent
        return _train(
            recipe, begun, store=store, truth=truth, path=path, source=source, processes=processes, progress=show
        )


def _train(
    given: DetectRecipe,
    stored: DetectRecipe | None,
    *,
    store: Store,
    truth: Truth,
    path: Path,
    source: StoreSource,
    processes: World,
    progress: ProgressFactory,
) -> dict[str, Any]:
    resuming = processes.on_first(lambda: stored is not None and (path / "resume.pt").is_file())
    if not resuming:
        check_recipe(stored or given, store)
    begun = stored is not None  # where it ended before its first epoch did, what was prepared for it stays
    plan = plan_training(stored or given, store, truth)
    recipe = stored or resolved(source.settled(given), plan, store)
    seed_all(recipe.seed)
    detector = build_detector(recipe.detector, channels=plan.channels, classes=len(plan.classes), **recipe.model)
    check_needs(detector.needs, detector=recipe.detector)
    data = read_training(plan, recipe, store, detector.needs, progress)
    lacking, remarks = source.lacking(
        detector.needs, [*data.train, *data.holdout], processes=processes, progress=progress
    )
    data = data.without(lacking)
    if lacking and recipe.train.select == "map" and data.holdout_truth(plan).empty:
        raise StoreError(f"no held-out video with segments is left to choose by; the first says: {lacking[0]}")
    if len(set(processes.gathered((tuple(data.train), tuple(data.holdout))))) > 1:
        raise StoreError(f"store {store.path}: not every process could read the same videos; run 'tad store verify'")
    notes = [*remarks, *unused_keys(recipe, detector)]
    if not resuming:
        notes += check_class_scores(recipe, classes=plan.classes, holdout=data.holdout)
    video = next(iter(data.train))
    features = described_features(store, plan.channels, video=video, row_spacing=recipe.data.row_spacing)
    if not resuming:
        processes.on_first(lambda: check_place(recipe, path, features=features, store=store, begun=begun))
    module = source.module(detector, features=features, path=path, processes=processes, videos=list(data.train))
    module = module.to(processes.device)
    trainer = Trainer(module, recipe.train, processes, parts=source.parts(module, recipe.train))
    state = read_state(path / "resume.pt") if resuming else None
    if state is not None:
        check_same_videos(state, data, path)
        trainer.load_state_dict(state)
        source.load_state_dict(state.get("source", {}))
    else:
        seed_all(recipe.seed, processes.rank)
        processes.on_first(lambda: write_head(path, recipe, given, plan, data, store, truth, processes, begun=begun))
        processes.on_first(lambda: source.write_features(path, features))  # last: with it the run can be resumed
    log = _Log(path / "log.txt" if processes.first else None)
    for message in [*plan.messages, *data.messages, *notes, *(f"left out: {f}" for f in plan.failures + data.failures)]:
        log(message)
    random = random_state()
    prepared = prepare(
        recipe, path=path, videos=list(data.train), holdout=data.holdout, store=store, truth=truth,
        processes=processes, progress=progress,
    )  # fmt: skip
    for failure in prepared.failures:
        log(f"without proposals: {failure}")
    set_random_state(random)  # whatever was drawn for that, now or before a stop
    begins = f"resumed after epoch {trainer.epoch}" if state is not None else f"begun on {processes.device}"
    counts = ", ".join(f"{name} {count}" for name, count in data.counts.items())
    log(f"{begins}, {processes.size} process(es), {recipe.train.epochs} epochs; {counts}")
    try:
        _epochs(trainer, recipe, plan, data, prepared, source, store, path, log, progress)
    except KeyboardInterrupt:
        log(f"interrupted in epoch {trainer.epoch + 1}; resume goes on from its beginning")
        raise
    except TadError as error:
        log(f"stopped: {error}")
        raise
    metrics = _metrics(trainer, recipe, data)
    processes.on_first(lambda: write_json(path / "metrics.json", metrics))
    log(f"finished: {outcome(metrics)}")
    return metrics


def resolved(recipe: DetectRecipe, plan: Plan, store: Store) -> DetectRecipe:
    """The recipe with what its detector leaves to the data filled in, such as anchor scales (``Detector.resolve``) and
    shapes of maps (``Detector.resolve_shapes``).
    """
    detector, model = DETECTORS.get(recipe.detector), recipe.model
    shaped = getattr(detector, "resolve_shapes", None)
    if shaped is not None:
        model = shaped(model, plan.shapes)
    fill = getattr(detector, "resolve", None)
    if fill is not None:
        model = fill(model, plan.lengths_rows(store, recipe.streams, recipe.data.row_spacing))
    return recipe if model is recipe.model else recipe.model_copy(update={"model": model})


def _epochs(
    trainer: Trainer,
    recipe: DetectRecipe,
    plan: Plan,
    data: TrainingSet,
    prepared: Prepared,
    source: StoreSource,
    store: Store,
    path: Path,
    log: _Log,
    progress: ProgressFactory,
) -> None:
    """Train what is left, and after every epoch write all that a stop must not lose."""
    processes, training = trainer.processes, recipe.train
    dataset = source.dataset(
        store=store,
        needs=trainer.detector.needs,
        truth=data.train,
        data=recipe.data,
        seed=recipe.seed,
        cache=data.cache,
        starts=data.starts,
        proposals=prepared.proposals,
    )
    loader = EpochLoader(
        dataset, workers=recipe.data.workers, rank=processes.rank, world=processes.size, collate=source.collate()
    )
    per_epoch = math.ceil(len(dataset) / (training.batch_videos * training.accumulate))
    with progress((training.epochs - trainer.epoch) * per_epoch, "train", "steps") as bar:
        for epoch in range(trainer.epoch, training.epochs):
            begin = time.perf_counter()
            steps = epoch_steps(
                len(dataset), batch=training.batch_videos, accumulate=training.accumulate, seed=recipe.seed, epoch=epoch
            )
            batches = loader.epoch(epoch, steps)
            sums: dict[str, float] = {}
            lr = training.lr
            trainer.detector.train()
            for index, step in enumerate(steps):
                lr = training.lr * lr_factor(training, step=epoch * per_epoch + index, steps_per_epoch=per_epoch)
                set_lr(trainer.optimizer, lr)
                for name, value in trainer.step(step, batches).items():
                    sums[name] = sums.get(name, 0.0) + value
                source.stepped(processes)
                bar.advance(1, f"epoch {epoch + 1}/{training.epochs}")
            next(batches, None)  # the loader's own end of the epoch
            processes.sync_buffers(trainer.detector)
            if trainer.average is not None:
                processes.sync_buffers(trainer.average.module)
            row: dict[str, Any] = {"epoch": epoch + 1, "lr": lr, **_means(processes.gathered(sums), len(dataset))}
            due = (epoch + 1) % training.eval_every == 0 or epoch + 1 == training.epochs
            if due and len(data.holdout_truth(plan)):
                row |= evaluate_held_out(trainer, recipe, plan, data, prepared, source, store)
            row["seconds"] = round(time.perf_counter() - begin, 3)
            trainer.history.append(row)
            trainer.epoch = epoch + 1
            _save(trainer, recipe, data, source, path)
            told = (f"{k} {v:.4g}" for k, v in row.items() if k != "epoch" and not k.startswith("map_"))
            log(f"epoch {epoch + 1}/{training.epochs}: {', '.join(told)}")


def _save(trainer: Trainer, recipe: DetectRecipe, data: TrainingSet, source: StoreSource, path: Path) -> None:
    """Checkpoints, then the state to resume from: a stop in between repeats the epoch and writes the same again."""
    row = trainer.history[-1]
    chosen = recipe.train.select == "last"
    if recipe.train.select == "map" and "average_map" in row:
        # Of equally good epochs the later one: it has seen more, and early ones tie at zero.
        chosen = trainer.best is None or row["average_map"] >= trainer.best["average_map"]
    if chosen:
        trainer.best = row
    state = trainer.state_dict() | {"train": list(data.train), "holdout": list(data.holdout)}
    state["source"] = source.state_dict()

    def write() -> None:
        weights = source.detector(trainer.judged).state_dict()
        own = {"detector": recipe.detector, "epoch": trainer.epoch, "averaged": trainer.average is not None}

        def write_detector(file: Path, **about: Any) -> None:
            write_weights(file, weights, **own, **about)

        if chosen:
            source.write_best(path, trainer.judged, write_detector)
        write_detector(path / "last.safetensors")
        write_csv(path / "metrics.csv", trainer.history)
        write_state(path / "resume.pt", state)

    trainer.processes.on_first(write)


def _metrics(trainer: Trainer, recipe: DetectRecipe, data: TrainingSet) -> dict[str, Any]:
    best, last = trainer.best or {}, trainer.history[-1]
    return {
        "detector": recipe.detector,
        "epochs": trainer.epoch,
        "select": recipe.train.select,
        "best_epoch": best.get("epoch"),
        "average_map": best.get("average_map"),
        "map": {name.removeprefix("map_"): value for name, value in best.items() if name.startswith("map_")},
        "last_average_map": last.get("average_map"),
        "last_loss": last["loss"],
        "parameters": sum(p.numel() for p in trainer.detector.parameters()),
        "seconds": round(sum(row["seconds"] for row in trainer.history), 3),
        "counts": data.counts,
    }


def outcome(metrics: Mapping[str, Any]) -> str:
    """What ``metrics.json`` says of a training, in a line."""
    counts, score = metrics["counts"], metrics["average_map"]
    said = f"epoch {metrics['best_epoch']} of {metrics['epochs']} chosen"
    if score is not None:
        said += f", average mAP {100 * score:.1f} % on {counts['holdout_videos']} held-out videos"
    missed = left_out(metrics)
    return said + (f"; {missed} video(s) left out, see failures.jsonl" if missed else "")


def left_out(metrics: Mapping[str, Any]) -> int:
    """How many videos could not be used."""
    return int(metrics["counts"]["missing_videos"] + metrics["counts"]["broken_videos"])


def _means(by_process: list[dict[str, float]], videos: int) -> dict[str, float]:
    names = dict.fromkeys(name for sums in by_process for name in sums)
    means = {f"loss_{name}": sum(sums.get(name, 0.0) for sums in by_process) / videos for name in names}
    return {"loss": sum(means.values()), **means}


class _Log:
    """Lines with their time into ``log.txt`` and to logging; silent in all processes but the first."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __call__(self, message: str) -> None:
        if self.path is not None:
            logger.info("%s", message)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"{now_text()} {message}\n")
