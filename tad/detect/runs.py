"""The folder of a detector's run: what is in it, how it is written, how it is read back. Nothing in it is pickled code.

::

    RUN/
      recipe.yaml            the recipe with everything filled in; a run can be repeated from it
      classes.json           names of the classes, in the order of the network's outputs
      features.json          streams, their extraction recipes and fingerprints, channels, time axis, row spacing
      env.json               versions, device, command, seed, store and annotations (with SHA-256), the recipe as given
      best.safetensors       weights of the chosen epoch (averaged ones with EMA)
      last.safetensors       weights of the last finished epoch (likewise)
      resume.pt              everything that training needs to go on: plain types and tensors, ``weights_only=True``
      metrics.csv            one row an epoch
      metrics.json           the outcome; its presence says that the run is finished
      failures.jsonl         videos that could not be used, and why (only if there were any)
      log.txt
      raw/*.npz              what the network found before suppression, where ``detect`` was told to write it here
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from tad._version import __version__
from tad.detect.detectors import build_detector
from tad.detect.interface import Detector
from tad.errors import RecipeError, WeightsError
from tad.recipe import DetectRecipe, dump_yaml, load_mapping, validated

FILES = (
    "recipe.yaml",
    "classes.json",
    "features.json",
    "env.json",
    "best.safetensors",
    "last.safetensors",
    "resume.pt",
    "metrics.csv",
    "metrics.json",
    "failures.jsonl",
    "log.txt",
)
FEATURE_KEYS = (
    "spec",
    "fingerprint",
    "channels",
    "dtype",
    "axis",
)  # of every stream in features.json, beside its own info


# ---- writing: a reader sees the old file or the new one, never half of it --------------------------------------------
def write_atomic(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    """``fill`` a file beside ``path`` and put it in its place at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as CSV under the columns of all of them; a value that is missing or ``None`` is left empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_weights(path: Path, state: Mapping[str, Tensor], **about: Any) -> None:
    """A state dict as safetensors, on the CPU; ``about`` goes into its metadata as JSON under ``tad``.

    One key only: safetensors writes several in random order, and equal weights should give equal files.
    """
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    data = save_safetensors(tensors, {"tad": json.dumps(about, default=str)})
    write_atomic(path, lambda file: file.write(data))


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """What :func:`read_state` reads: nested dicts and lists of tensors and plain types."""
    write_atomic(path, lambda file: torch.save(dict(state), file))


# ---- reading ---------------------------------------------------------------------------------------------------------
def read_weights(path: Path) -> dict[str, Tensor]:
    """Raises :class:`WeightsError` when the file is missing or damaged."""
    try:
        return load_safetensors(path.read_bytes())
    except OSError as error:
        raise WeightsError(f"weights {path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise WeightsError(f"weights {path} are damaged ({error}); resume the training to write them again") from error


def read_state(path: Path) -> dict[str, Any]:
    """Raises :class:`WeightsError` when the file is damaged or holds more than plain types and tensors."""
    import pickle

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        what = "it holds more than plain types" if "Unsupported" in str(error) else str(error).split("\n")[0]
        raise WeightsError(f"{path} cannot be read ({what}); train again with overwrite") from error
    if not isinstance(state, dict):
        raise WeightsError(
            f"{path} holds {type(state).__name__}, not the state of a training; train again with overwrite"
        )
    return state


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"run {path.parent} has no {path.name}: is it the folder of a detector's run?") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"run {path.parent}: {path.name} cannot be read: {error}") from error


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- the run itself --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    """A trained detector with all that its inference needs."""

    path: Path
    recipe: DetectRecipe
    classes: list[str]
    features: dict[
        str, dict[str, Any]
    ]  # stream, in the order of the recipe -> how it was when the detector was trained on it

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read a run's folder; the weights wait for :meth:`build`.

        Raises
        ------
        RecipeError : there is no such folder, or its recipe, classes or features are missing or malformed.
        """
        path = Path(path)
        if not path.is_dir():
            raise RecipeError(f"run {path} does not exist; 'tad train-detector ... -o {path}' makes one")
        if not (path / "recipe.yaml").is_file():
            raise RecipeError(f"run {path} has no recipe.yaml: is it the folder of a detector's run?")
        recipe = validated(DetectRecipe, load_mapping(path / "recipe.yaml"), where=str(path / "recipe.yaml"))
        classes, features = read_json(path / "classes.json"), read_json(path / "features.json")
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise RecipeError(f"run {path}: classes.json must hold a list of names")
        for stream in recipe.streams:
            known = features.get(stream, {}) if isinstance(features, dict) else {}
            lacking = [key for key in FEATURE_KEYS if key not in known]
            if lacking:
                raise RecipeError(f"run {path}: features.json lacks {', '.join(lacking)} of stream '{stream}'")
        return cls(path, recipe, classes, {stream: features[stream] for stream in recipe.streams})

    @property
    def channels(self) -> dict[str, int]:
        return {stream: int(known["channels"]) for stream, known in self.features.items()}

    @property
    def finished(self) -> bool:
        return (self.path / "metrics.json").is_file()

    def build(self, weights: Literal["best", "last"] = "best", *, device: str | torch.device = "cpu") -> Detector:
        """The detector in evaluation mode with its weights.

        Raises
        ------
        WeightsError : no checkpoint was written yet, it is damaged, or it does not fit the recipe's network.
        """
        file = self.path / f"{weights}.safetensors"
        if not file.is_file():
            raise WeightsError(
                f"run {self.path} has no {file.name}: "
                + ("the file was removed" if self.finished else "no epoch was finished yet, resume the training")
            )
        model = self.recipe.model
        detector = build_detector(self.recipe.detector, channels=self.channels, classes=len(self.classes), **model)
        load_into(detector, read_weights(file), where=str(file))
        return detector.to(device).eval()


def load_into(detector: Detector, state: Mapping[str, Tensor], *, where: str) -> None:
    """Load weights of which every tensor must land. Raises :class:`WeightsError` naming those that do not."""
    own = detector.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{name} is {tuple(state[name].shape)}, the network has {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    if missing or unknown or shapes:
        parts = [
            ("missing: " + ", ".join(missing)) if missing else "",
            ("unknown: " + ", ".join(unknown)) if unknown else "",
        ]
        problems = "; ".join(part for part in [*parts, *shapes] if part)
        raise WeightsError(f"{where} does not fit the network that recipe.yaml describes: {problems}")
    detector.load_state_dict(dict(state))


def run_state(path: Path) -> Literal["absent", "empty", "foreign", "unfinished", "finished"]:
    """What stands at ``path`` now; ``foreign`` is anything that is not a run."""
    if not path.exists():
        return "absent"
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return "finished" if (path / "metrics.json").is_file() else "unfinished"
    if path.is_dir() and all(_is_temporary(file.name) for file in path.iterdir()):
        return "empty"
    return "foreign"


def remove_run(path: Path) -> None:
    """Remove the files of a run and nothing else; ``recipe.yaml`` goes last, so that a rest is still seen as a run."""
    for file in [*path.glob("raw/*.npz"), *(file for file in path.iterdir() if _is_temporary(file.name))]:
        file.unlink(missing_ok=True)
    for name in sorted(FILES, key=lambda name: name == "recipe.yaml"):
        (path / name).unlink(missing_ok=True)


def _is_temporary(name: str) -> bool:
    """Whether a killed :func:`write_atomic` left this."""
    return name.startswith(".") and name.endswith(".tmp") and any(name.startswith(f".{known}.") for known in FILES)


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], *, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """``(dotted key, old, new)`` of everything that differs between two nested mappings; absent is ``None``."""
    result = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            result += differing_keys(a, b, prefix=f"{prefix}{key}.")
        elif a != b:
            result.append((f"{prefix}{key}", a, b))
    return result


def describe_differences(differences: Sequence[tuple[str, Any, Any]]) -> str:
    return "; ".join(f"{key} was {old!r}, is {new!r}" for key, old, new in differences)


def environment(*, device: torch.device, seed: int, world: int) -> dict[str, Any]:
    """Versions, device and command of this process, for ``env.json``."""
    return {
        "started_at": now_text(),
        "tad": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "device_type": device.type,
        "cuda": torch.version.cuda,
        "processes": world,
        "command": shlex.join(sys.argv),
        "seed": seed,
    }


def now_text() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def dump_recipe(path: Path, recipe: DetectRecipe) -> None:
    write_text(path / "recipe.yaml", dump_yaml(recipe))


def require_free(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise :class:`RecipeError` unless a run may be written to ``path``."""
    state = run_state(path)
    if resume and overwrite:
        raise RecipeError("resume and overwrite exclude each other: choose one")
    if state == "foreign":
        raise RecipeError(f"{path} exists and is not the folder of a run; choose another output folder")
    if state in ("unfinished", "finished") and not (resume or overwrite):
        raise RecipeError(
            f"{path} holds {'a finished' if state == 'finished' else 'an unfinished'} run; "
            + ("" if state == "finished" else "resume it, ")
            + "overwrite it, or choose another output folder"
        )
