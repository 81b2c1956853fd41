"""What the run of a joint training holds beside a detector's (``tad/detect/runs.py``): the backbones trained along.

::

    RUN/
      starting.json                the features it was begun with; a training is resumed on these
      weights/STREAM-DIGITS.safetensors   a stream's backbone, named after its SHA-256; extraction reads it
      best.safetensors             the detector; its metadata holds the fingerprints of the features it belongs to
      features.json                the features that those backbones give, from which detection is extracted

They are written in this order, each whole or not at all, and what ``features.json`` no longer names is removed last. So
wherever a training is stopped, ``best.safetensors`` stands beside its own backbones, or ``Run.build`` says that it does
not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from tad._version import __version__
from tad.detect.runs import WEIGHTS, read_about, remove_weights, trained_weights
from tad.detect.trained_on import STARTING, read_features
from tad.errors import RecipeError
from tad.extract.backbones import own
from tad.extract.backbones.base import Backbone
from tad.store.fingerprint import fingerprint_of
from tad.store.names import encode_name
from tad.training.files import read_json, sha256_of, write_json, write_weights

DIGITS = 12  # of the SHA-256 in a file's name, see tad.detect.runs.OF_TRAINING
Features = Mapping[str, Mapping[str, Any]]  # stream -> what features.json says of it


def write_starting(path: Path, features: Features) -> None:
    """Begin a run at ``path``: the starting ``features``, as both ``starting.json`` and, last, ``features.json``."""
    write_json(path / STARTING, features)
    write_json(path / "features.json", features)


def starting_features(path: str | Path) -> dict[str, dict[str, Any]]:
    """The features that the training of the run at ``path`` was begun with, by stream, in their order.

    Raises
    ------
    RecipeError : it is not the run of a joint training, or its files are malformed.
    """
    path = Path(path)
    content = read_json(path / STARTING, of="joint training's run")
    streams = list(content) if isinstance(content, dict) else []
    return read_features(path, streams, of="joint training's run", name=STARTING)


def save_backbones(
    path: str | Path,
    features: Features,
    backbones: Mapping[str, Backbone],
    write_detector: Callable[..., None],
) -> dict[str, dict[str, Any]]:
    """Write backbones and the detector that was trained along with them into the run at ``path``.

    Equal weights give equal files and equal fingerprints, whatever the epoch.

    Parameters
    ----------
    features : those that the training was begun with, as ``starting.json`` has them.
    backbones : stream → its backbone as it is now, made by ``build_backbone`` and not fused; other streams stay as
        they are.
    write_detector : called as ``write_detector(file, features=fingerprints)``; writes the detector to ``file`` with
        ``fingerprints`` (stream → that of its features) in its metadata (``write_weights(file, state, **about)``).
        Without ``backbones`` there is nothing to tell apart: it is called with the file alone.

    Returns
    -------
    The content of the new ``features.json``.

    Raises
    ------
    RecipeError : a backbone of a stream that is not among the ``features``.
    WeightsError : a backbone that was not made by its name, so that its file could not say what it is.
    """
    path = Path(path)
    if unknown := sorted(backbones.keys() - features.keys()):
        raise RecipeError(f"backbones of streams that the run does not read: {', '.join(unknown)}")
    now = {stream: deepcopy(dict(known)) for stream, known in features.items()}
    kept = set()
    for stream, backbone in backbones.items():
        file = _write_backbone(path / WEIGHTS, stream, backbone)
        kept.add(file.name)
        _name_weights(now[stream], file)
    fingerprints = {stream: known["fingerprint"] for stream, known in now.items()}
    write_detector(path / "best.safetensors", **({"features": fingerprints} if backbones else {}))
    write_json(path / "features.json", now)
    remove_weights(path, keep=kept)
    return now


def finish_saving(path: str | Path) -> bool:
    """Put ``features.json`` right after a stop between it and ``best.safetensors``, whose backbones lie there already.

    Returns whether there was anything to do. For resuming: the epoch that was being saved is trained again, but where
    that does not give the same weights it may no longer be the best one.

    Raises
    ------
    RecipeError : it is not the run of a joint training. WeightsError : ``best.safetensors`` is damaged.
    """
    path = Path(path)
    now = starting_features(path)
    best = path / "best.safetensors"
    belongs = read_about(best).get("features") if best.is_file() else None
    written = read_features(path, list(now), of="joint training's run")
    if belongs is None or belongs == {stream: known["fingerprint"] for stream, known in written.items()}:
        return False
    for stream, known in now.items():
        for file in trained_weights(path):
            if known["fingerprint"] != belongs.get(stream) and file.name.startswith(f"{encode_name(stream)}-"):
                _name_weights(candidate := deepcopy(known), file)
                if candidate["fingerprint"] == belongs.get(stream):
                    now[stream] = candidate
                    break
    if belongs != {stream: known["fingerprint"] for stream, known in now.items()}:
        return False  # a file was removed; the next best epoch writes all of them again
    write_json(path / "features.json", now)
    return True


def _write_backbone(folder: Path, stream: str, backbone: Backbone) -> Path:
    """A file of ours that tells which network it is, under the name that its content gives it."""
    about = {"backbone": backbone.spec.name, "stream": stream, "tad_version": __version__}
    unnamed = folder / f".{encode_name(stream)}.tmp"
    write_weights(unnamed, backbone.state_dict(), **about, **{own.KEY: own.described(backbone)})
    file = folder / f"{encode_name(stream)}-{sha256_of(unnamed)[:DIGITS]}.safetensors"
    os.replace(unnamed, file)
    return file


def _name_weights(features: dict[str, Any], file: Path) -> None:
    """Let one stream's ``features`` be those of the backbone in ``file``."""
    features["spec"]["weights"] = f"sha256:{sha256_of(file)}"
    features["weights_source"] = str(file.resolve())
    features["tad_version"] = __version__
    features["fingerprint"] = fingerprint_of(features["spec"])
