"""Installed packages against those that tad declares: missing, or of a version that it does not allow."""

from __future__ import annotations

import importlib.metadata
import re
from typing import NamedTuple

from tad.doctor.checks import Check

DISTRIBUTION = "tad-pipeline"


class Requirement(NamedTuple):
    """One declared package, as far as it concerns this machine.

    ``extra`` is "" where the package is always needed. ``certain`` is false where it may not be needed on this system.
    """

    name: str
    specifier: str
    extra: str
    certain: bool = True


def check_packages() -> list[Check]:
    """Optional packages are only noted where they are missing, and warned of where they are too old."""
    try:
        declared = importlib.metadata.requires(DISTRIBUTION) or []
        extras = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        text = f"{DISTRIBUTION} is not installed, so its requirements are not known"
        return [Check("environment", "packages", "warn", text, "pip install -e .")]
    found, missing, optional = [], [], []
    wrong: list[tuple[str, str]] = []  # (needed, installed)
    wrong_optional: list[tuple[str, str]] = []
    for text in declared:
        requirement = parsed(text, extras)
        if requirement is None:
            continue
        name, specifier, extra, certain = requirement
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if extra and extra != "test":
                optional.append(f"{name} (extra {extra})")
            elif not extra and certain:
                missing.append(f"{name}{specifier}")
            continue
        found.append(f"{name} {version}")
        if extra != "test" and not allowed(version, specifier):
            (wrong_optional if extra or not certain else wrong).append((f"{name}{specifier}", f"{name} {version}"))
    checks = [Check("environment", "packages", "ok", ", ".join(dict.fromkeys(found)))]
    if missing:
        text = f"missing: {', '.join(missing)}"
        checks.append(Check("environment", "packages missing", "fail", text, _install(missing)))
    if wrong:
        text = ", ".join(f"{has}, needed is {needed}" for needed, has in wrong)
        checks.append(
            Check("environment", "packages versions", "fail", text, _install([needed for needed, _ in wrong]))
        )
    if wrong_optional:
        text = ", ".join(f"{has}, needed is {needed}" for needed, has in wrong_optional)
        advice = _install([needed for needed, _ in wrong_optional])
        checks.append(Check("environment", "packages optional versions", "warn", text, advice))
    if optional:
        checks.append(Check("environment", "packages optional", "note", f"not installed: {', '.join(optional)}"))
    both = [name for name in ("opencv-python", "opencv-contrib-python") if installed(name)]
    if both and installed("opencv-python-headless"):
        text = f"{' and '.join(both)} beside opencv-python-headless: they overwrite each other's files"
        checks.append(Check("environment", "opencv", "warn", text, "keep one of them"))
    return checks


def installed(name: str) -> bool:
    """Whether a distribution of this name is there."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def parsed(text: str, extras: list[str]) -> Requirement | None:
    """A line of the metadata (PEP 508); None where it does not concern this system, or cannot be understood.

    Markers are evaluated by ``packaging``, which is no dependency of tad. Without it a requirement with a marker
    other than that of an extra is not certain.
    """
    try:
        from packaging.requirements import InvalidRequirement
        from packaging.requirements import Requirement as Full
    except ImportError:
        return _parsed_by_hand(text)
    try:
        full = Full(text)
    except InvalidRequirement:
        return _parsed_by_hand(text)
    specifier, marker = str(full.specifier), full.marker
    if marker is None or marker.evaluate({"extra": ""}):
        return Requirement(full.name, specifier, "")
    extra = next((name for name in extras if marker.evaluate({"extra": name})), None)
    return None if extra is None else Requirement(full.name, specifier, extra)


def _parsed_by_hand(text: str) -> Requirement | None:
    head, _, marker = text.partition(";")
    match = re.fullmatch(
        r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^\]]*\])?\s*\(?((?:[<>=!~][^()@]*)?)\)?\s*(?:@.*)?", head
    )
    if match is None:
        return None
    extra = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", marker)
    others = marker.replace(extra[0], "") if extra else marker
    return Requirement(match[1], match[2].replace(" ", ""), extra[1] if extra else "", not others.strip(" ()"))


def allowed(version: str | None, specifier: str) -> bool:
    """Whether a version is within ``>=2.0,<3``; without ``packaging`` only ``>=`` counts. Unknown versions pass."""
    if version is None:  # metadata without a version: a broken installation, which its import will show
        return True
    try:
        from packaging.specifiers import InvalidSpecifier, SpecifierSet
        from packaging.version import InvalidVersion
    except ImportError:
        return _at_least(version, specifier)
    try:
        return SpecifierSet(specifier).contains(version, prereleases=True)
    except (InvalidSpecifier, InvalidVersion):
        return _at_least(version, specifier)


def _at_least(version: str, specifier: str) -> bool:
    lowest = [part.strip()[2:] for part in specifier.split(",") if part.strip().startswith(">=")]
    return all(_numbers(version) >= _numbers(low) for low in lowest if _numbers(low) and _numbers(version))


def _numbers(version: str) -> tuple[int, ...]:
    """``2.10.0+cpu`` → (2, 10); zeros at the end go, since 2 and 2.0 are the same version."""
    match = re.match(r"\s*v?(\d+(?:\.\d+)*)", version)
    numbers = [int(part) for part in match[1].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _install(requirements: list[str]) -> str:
    return "pip install " + " ".join(f"'{text}'" if set(text) & set("<>=!~, ") else text for text in requirements)
