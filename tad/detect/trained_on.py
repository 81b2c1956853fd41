"""The annotations and features (``features.json``) that a run was trained on, and whether others are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tad.annotations import Truth
from tad.detect.align import feature_of
from tad.detect.interface import LevelSpec
from tad.detect.preflight import check_streams
from tad.errors import RecipeError, StoreError
from tad.store import Store
from tad.training.files import describe_differences, differing_keys, read_json, sha256_of

STARTING = "starting.json"  # of a run whose backbones were trained along: the features that it was begun with
# of every stream, beside its own info
KEYS: dict[str, type] = {"spec": dict, "fingerprint": str, "channels": int, "dtype": str, "axis": dict}
TABLES = (  # of a Truth: columns of words and of numbers
    ("videos", ("video", "subset"), ("duration_s", "fps")),
    ("segments", ("video", "label", "subset"), ("start_s", "end_s")),
)


def described_annotations(truth: Truth) -> dict[str, Any]:
    """What ``env.json`` holds: path and SHA-256 of the file, where there is one, and SHA-256 of what was made of it."""
    file = sha256_of(truth.path) if truth.path and Path(truth.path).is_file() else None
    digest = hashlib.sha256()
    for name, words, numbers in TABLES:
        table = getattr(truth, name).reindex(columns=[*words, *numbers]).astype(dict.fromkeys(numbers, "float64"))
        digest.update(table.to_csv(index=False, lineterminator="\n").encode())
    return {"path": str(truth.path), "sha256": file, "tables_sha256": digest.hexdigest()}


def check_annotations(path: Path, known: Mapping[str, Any], truth: Truth) -> None:
    """Raise :class:`RecipeError` unless ``truth`` is what the run at ``path`` was begun with: file and tables.

    ``known`` is what :func:`described_annotations` said then; an earlier version's says nothing of the tables.
    """
    now = described_annotations(truth)
    if any(known[key] != now[key] for key in ("sha256", "tables_sha256") if key in known):
        raise RecipeError(
            f"run {path} cannot be resumed: annotations {truth.path or '(made in memory)'} are not those that it was "
            "begun with"
        )


def described_features(
    store: Store, channels: Mapping[str, int], *, video: str, row_spacing: int
) -> dict[str, dict[str, Any]]:
    """What ``features.json`` holds: by stream its recipe, fingerprint, channels, type, and the axis of ``video``."""
    features: dict[str, dict[str, Any]] = {}
    for stream, width in channels.items():
        attrs = {key: value for key, value in store.stream_attrs(stream).items() if not key.startswith("encoding-")}
        feature = feature_of(store, LevelSpec(stream), video)
        axis = feature.axis.pooled(row_spacing).to_dict()
        features[stream] = attrs | {"channels": width, "dtype": str(feature.dtype), "axis": axis}
    return features


def read_features(
    path: Path, streams: Sequence[str], *, of: str, name: str = "features.json"
) -> dict[str, dict[str, Any]]:
    """``features.json``, or the file ``name`` like it, of the run at ``path``, in the order of ``streams``.

    Raises :class:`RecipeError` when it is missing or malformed.
    """
    features = read_json(path / name, of=of)
    if not isinstance(features, dict):
        raise RecipeError(f"run {path}: {name} must hold an object of streams")
    for stream in streams:
        known = features.get(stream, {})
        if not isinstance(known, dict):
            raise RecipeError(f"run {path}: {name} must hold an object for stream '{stream}', got {known!r}")
        lacking = [key for key in KEYS if key not in known]
        if lacking:
            raise RecipeError(f"run {path}: {name} lacks {', '.join(lacking)} of stream '{stream}'")
        wrong = [key for key, kind in KEYS.items() if type(known[key]) is not kind]
        if wrong:
            kinds = ", ".join(f"{key} must be of type {KEYS[key].__name__}" for key in wrong)
            raise RecipeError(f"run {path}: {name} is malformed for stream '{stream}': {kinds}")
    return {stream: features[stream] for stream in streams}


def check_features(path: Path, features: Mapping[str, Mapping[str, Any]], store: Store) -> None:
    """Raise :class:`StoreError` unless the store's streams were made exactly as those that the run knows."""
    check_streams(store, list(features))
    joint = (path / STARTING).is_file()
    starting = read_features(path, list(features), of="detector's run", name=STARTING) if joint else {}
    for stream, known in features.items():
        attrs = store.stream_attrs(stream)
        if attrs["fingerprint"] != known["fingerprint"]:
            if joint and starting[stream]["fingerprint"] == attrs["fingerprint"]:
                raise StoreError(
                    f"stream '{stream}' of store {store.path} holds the features that the training of run {path} was "
                    "begun with, and its backbone was trained since: extract into another store with "
                    f"'tad extract VIDEOS --run {path} --store STORE', or detect in VIDEOS themselves"
                )
            differences = (
                describe_differences(differing_keys(known["spec"], attrs["spec"])) or "only their fingerprints differ"
            )
            raise StoreError(
                f"run {path} was trained on other features than stream '{stream}' of store {store.path} holds: "
                f"{differences}. Extract the stream again as it was, or train again on this store"
            )
