"""The files of a training's folder: written whole or not at all, read back without running anything in them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import pickle
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
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
from tad.errors import RecipeError, WeightsError


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


def read_json(path: Path, *, of: str = "run") -> Any:
    """A JSON file of a run. Raises :class:`RecipeError` when it is missing or malformed; ``of`` says whose it is."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"run {path.parent} has no {path.name}: is it the folder of a {of}?") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"run {path.parent}: {path.name} cannot be read: {error}") from error


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- whose folder it is ----------------------------------------------------------------------------------------------
FolderState = Literal["absent", "empty", "foreign", "unfinished", "finished"]


def folder_state(path: Path, *, files: Sequence[str]) -> FolderState:
    """What stands at ``path`` now: a run has ``recipe.yaml``, a finished one ``metrics.json``; ``foreign`` is anything
    else. ``files`` are the names that a run's folder holds."""
    if not path.exists():
        return "absent"
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return "finished" if (path / "metrics.json").is_file() else "unfinished"
    if path.is_dir() and all(is_temporary(file.name, files=files) for file in path.iterdir()):
        return "empty"
    return "foreign"


def remove_files(path: Path, *, files: Sequence[str]) -> None:
    """Remove ``files`` of a run's folder and what a killed writer left of them; ``recipe.yaml`` goes last, so that a
    rest is still seen as a run."""
    for file in [file for file in path.iterdir() if is_temporary(file.name, files=files)]:
        file.unlink(missing_ok=True)
    for name in sorted(files, key=lambda name: name == "recipe.yaml"):
        (path / name).unlink(missing_ok=True)


def is_temporary(name: str, *, files: Sequence[str]) -> bool:
    """Whether a killed :func:`write_atomic` left this beside one of ``files``."""
    return name.startswith(".") and name.endswith(".tmp") and any(name.startswith(f".{known}.") for known in files)


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


# ---- what a run notes of itself --------------------------------------------------------------------------------------
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
