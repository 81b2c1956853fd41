"""The machine: versions, GPU, decoders, file locks, disk. Runs with packages missing, and says which."""

from __future__ import annotations

import errno
import importlib.metadata
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from tad._version import __version__
from tad.doctor.checks import Check, Status
from tad.doctor.packages import check_packages, installed

STORE_FILES = ("zarr.json", "__store__.json")  # a folder that holds one of them is a feature store
NO_WRITING = (errno.EACCES, errno.EPERM, errno.EROFS)
MIN_FREE_GB = 5.0
MIN_SHM_GB = 1.0
GB = 1e9


def check_environment(target: Path | None) -> list[Check]:
    """``target`` is the store, there or to be written: its disk and its locks are looked at.

    None is no store on this machine: the current folder is looked at, where nothing need be written.
    """
    python_ok = sys.version_info >= (3, 11)
    about = f"tad {__version__}, Python {platform.python_version()}, {platform.system()} {platform.release()}"
    checks = [
        Check("environment", "python", "ok" if python_ok else "fail", about, "" if python_ok else "tad needs 3.11"),
        *check_packages(),
        *_torch(),
        *_decoders(),
    ]
    folder = _existing(target)
    if target is not None and any(os.path.isfile(folder / name) for name in STORE_FILES):
        places = [*_disk(folder), *_locks_of_store(folder)]
    else:
        places = [*_disk(folder), _locks(folder, refused="warn" if target is None else "fail")]
    return [*checks, *places, _shared_memory(), _processes()]


def _existing(target: Path | None) -> Path:
    """The folder itself or the nearest one above it; one behind a closed folder counts as absent."""
    whole = Path(os.path.abspath(target or Path()))
    # os.path, since Path.is_dir raises where a folder above may not be entered
    return next((path for path in (whole, *whole.parents) if os.path.isdir(path)), Path(os.sep))


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
    if installed("av"):
        checks.append(Check("environment", "decoder av1", "ok", f"PyAV {importlib.metadata.version('av')} reads AV1"))
    else:
        text = "OpenCV cannot decode AV1, and PyAV is not installed"
        checks.append(Check("environment", "decoder av1", "note", text, "for AV1 videos: pip install av"))
    return checks


def _disk(folder: Path) -> list[Check]:
    try:
        usage = shutil.disk_usage(folder)
        inodes = os.statvfs(folder) if hasattr(os, "statvfs") else None
    except OSError as error:
        return [Check("environment", "disk", "note", f"the disk of {folder} tells nothing: {error.strerror}")]
    free = usage.free / GB
    text = f"{free:.0f} GB free of {usage.total / GB:.0f} GB at {folder}"
    status: Status = "ok" if free >= MIN_FREE_GB else "warn"
    advice = "" if status == "ok" else "an hour of two-stream I3D features at stride 8 takes about 0.1 GB"
    checks = [Check("environment", "disk", status, text, advice)]
    if inodes is not None and inodes.f_files:
        share = inodes.f_favail / inodes.f_files
        text = f"{inodes.f_favail} files can still be made ({share:.0%})"
        advice = "" if share > 0.05 else "a Zarr store has several files a video; HDF5 has one (--format hdf5)"
        checks.append(Check("environment", "inodes", "ok" if share > 0.05 else "warn", text, advice))
    return checks


def _locks(folder: Path, *, refused: Status) -> Check:
    """Whether files can be made, renamed and locked there: HDF5 locks, and stores rename.

    ``refused`` is the status where nothing may be written.
    """
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
    except OSError as error:
        if error.errno in NO_WRITING:
            text = f"{folder} cannot be written to: {error.strerror}"
            if refused == "note":
                return Check("environment", "locks", refused, f"locks are not tried: {text}")
            return Check("environment", "locks", refused, text, "chmod, or another folder")
        text = f"files in {folder} cannot be locked or renamed: {error.strerror}"
        return Check("environment", "locks", "warn", text, "set HDF5_USE_FILE_LOCKING=FALSE, or use a Zarr store")
    return Check("environment", "locks", "ok", f"files in {folder} can be made, renamed and locked")


def _locks_of_store(store: Path) -> list[Check]:
    """The same for a store that is there, of which nothing is touched: what is tried is tried beside it."""
    checks = []
    if not os.access(store, os.W_OK | os.X_OK):
        text = f"{store} can only be read, which is all that training and detection need; extraction writes to it"
        checks.append(Check("environment", "store writable", "note", text))
    if os.path.ismount(store):
        text = f"{store} is a file system of its own: locks cannot be tried beside it"
        return [*checks, Check("environment", "locks", "note", text)]
    return [*checks, _locks(Path(os.path.realpath(store)).parent, refused="note")]


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
