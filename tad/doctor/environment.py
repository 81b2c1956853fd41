"""The machine: versions, GPU, decoders, file locks, disk. Runs with packages missing, and says which."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path

from tad._version import __version__
from tad.doctor.checks import Check, Status

DISTRIBUTION = "tad-pipeline"
MIN_FREE_GB = 5.0
MIN_SHM_GB = 1.0
GB = 1e9


def check_environment(target: Path) -> list[Check]:
    """``target`` is where features would be written: its disk and its locks are looked at."""
    python_ok = sys.version_info >= (3, 11)
    about = f"tad {__version__}, Python {platform.python_version()}, {platform.system()} {platform.release()}"
    checks = [
        Check("environment", "python", "ok" if python_ok else "fail", about, "" if python_ok else "tad needs 3.11"),
        *_packages(),
        *_torch(),
        *_decoders(),
    ]
    folder = next(p for p in (target.absolute(), *target.absolute().parents) if p.is_dir())
    return [*checks, *_disk(folder), _locks(folder), _shared_memory(), _processes()]


def _packages() -> list[Check]:
    """Installed versions against what the package declares; optional ones are only noted."""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        text = f"{DISTRIBUTION} is not installed, so its requirements are not known"
        return [Check("environment", "packages", "warn", text, "pip install -e .")]
    found, missing, optional = [], [], []
    for requirement in requirements:
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        if match is None:
            continue
        name, extra = match[0], re.search(r"extra\s*==\s*['\"](\w+)['\"]", requirement)
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            if extra is None:
                missing.append(name)
            elif extra[1] != "test":
                optional.append(f"{name} (extra {extra[1]})")
    checks = [Check("environment", "packages", "ok", ", ".join(dict.fromkeys(found)))]
    if missing:
        text = f"missing: {', '.join(missing)}"
        checks.append(Check("environment", "packages missing", "fail", text, f"pip install {' '.join(missing)}"))
    if optional:
        checks.append(Check("environment", "packages optional", "note", f"not installed: {', '.join(optional)}"))
    both = [name for name in ("opencv-python", "opencv-contrib-python") if _installed(name)]
    if both and _installed("opencv-python-headless"):
        text = f"{' and '.join(both)} beside opencv-python-headless: they overwrite each other's files"
        checks.append(Check("environment", "opencv", "warn", text, "keep one of them"))
    return checks


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _torch() -> list[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Check("environment", "torch", "fail", f"torch cannot be imported: {error}", "install torch")]
    threads = f"torch {torch.__version__}, {torch.get_num_threads()} threads on {os.cpu_count()} cores"
    checks = [Check("environment", "torch", "ok", threads)]
    if not torch.cuda.is_available():
        build = (
            "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}, but finds no GPU"
        )
        return [*checks, Check("environment", "gpu", "note", f"none: torch is {build}; networks run on the CPU")]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        text = f"cuda:{index} {about.name}, {about.total_memory / GB:.0f} GB, CUDA {torch.version.cuda}"
        checks.append(Check("environment", "gpu", "ok", text))
    return checks


def _decoders() -> list[Check]:
    try:
        import cv2
    except (ImportError, OSError) as error:
        advice = "pip install opencv-python-headless (opencv-python needs libGL)"
        return [Check("environment", "decoder", "fail", f"OpenCV cannot be imported: {error}", advice)]
    has_ffmpeg = cv2.CAP_FFMPEG in cv2.videoio_registry.getBackends()
    status: Status = "ok" if has_ffmpeg else "fail"
    advice = "" if has_ffmpeg else "install the wheel of opencv-python-headless, which has FFmpeg"
    text = f"OpenCV {cv2.__version__} {'with' if has_ffmpeg else 'without'} FFmpeg"
    checks = [Check("environment", "decoder", status, text, advice)]
    if _installed("av"):
        checks.append(Check("environment", "decoder av1", "ok", f"PyAV {importlib.metadata.version('av')} reads AV1"))
    else:
        text = "OpenCV cannot decode AV1, and PyAV is not installed"
        checks.append(Check("environment", "decoder av1", "note", text, "for AV1 videos: pip install av"))
    return checks


def _disk(folder: Path) -> list[Check]:
    usage = shutil.disk_usage(folder)
    free = usage.free / GB
    text = f"{free:.0f} GB free of {usage.total / GB:.0f} GB at {folder}"
    status: Status = "ok" if free >= MIN_FREE_GB else "warn"
    advice = "" if status == "ok" else "an hour of two-stream I3D features at stride 8 takes about 0.1 GB"
    checks = [Check("environment", "disk", status, text, advice)]
    if hasattr(os, "statvfs") and (stat := os.statvfs(folder)).f_files:
        share = stat.f_favail / stat.f_files
        text = f"{stat.f_favail} files can still be made ({share:.0%})"
        advice = "" if share > 0.05 else "a Zarr store has several files a video; HDF5 has one (--format hdf5)"
        checks.append(Check("environment", "inodes", "ok" if share > 0.05 else "warn", text, advice))
    return checks


def _locks(folder: Path) -> Check:
    """Whether files can be made, renamed and locked there: HDF5 locks, and stores rename."""
    try:
        import fcntl
    except ImportError:  # Windows
        return Check("environment", "locks", "note", "file locks are not checked on this system")
    try:
        with tempfile.TemporaryDirectory(prefix=".tad-doctor-", dir=folder) as scratch:
            first, second = Path(scratch) / "a", Path(scratch) / "b"
            with first.open("w") as file:
                os.replace(first, second)
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError as error:
        return Check(
            "environment", "locks", "fail", f"{folder} cannot be written to: {error.strerror}", "chmod, or --store"
        )
    except OSError as error:
        text = f"files in {folder} cannot be locked or renamed: {error.strerror}"
        return Check("environment", "locks", "warn", text, "set HDF5_USE_FILE_LOCKING=FALSE, or use a Zarr store")
    return Check("environment", "locks", "ok", f"files in {folder} can be made, renamed and locked")


def _shared_memory() -> Check:
    shm = Path("/dev/shm")  # torch's workers hand over tensors there
    if not shm.is_dir():
        return Check("environment", "shared memory", "note", "there is no /dev/shm on this system")
    free = shutil.disk_usage(shm).free / GB
    advice = "" if free >= MIN_SHM_GB else "data.workers=0, or start the container with --shm-size 8g"
    status: Status = "ok" if free >= MIN_SHM_GB else "warn"
    return Check("environment", "shared memory", status, f"{free:.1f} GB free in /dev/shm", advice)


def _processes() -> Check:
    return Check("environment", "processes", "ok", f"start method {multiprocessing.get_start_method(allow_none=False)}")
