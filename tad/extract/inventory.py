"""What ``tad weights`` says: which published weights there are, what is known of one, whether files are whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from tad.errors import RecipeError, TadError, did_you_mean
from tad.extract import weights as files
from tad.extract.backbones import BACKBONES, SPECS, BackboneSpec, load_backbone
from tad.extract.fetch import fetched, place_of, verify
from tad.extract.published import PUBLISHED, entry_of, of_backbone

# What of a spec says how frames are prepared; the rest describes the network.
PREPROCESSING = (
    "frames", "interval", "fps", "grid_fps", "window", "stride", "short_side", "crop", "resize", "channel_order",
    "value_range", "mean", "std",
)  # fmt: skip


def listing(*, backbone: str | None = None, folder: str | Path | None = None) -> list[dict[str, Any]]:
    """All published weights, or those of one backbone, in the order of the list; ``file`` where they are here.

    Raises
    ------
    RecipeError : no such backbone.
    """
    known = [*BACKBONES, *(entry.backbone for entry in PUBLISHED.values())]
    if backbone is not None and backbone not in known:
        raise RecipeError(f"unknown backbone '{backbone}'.{did_you_mean(backbone, known)}")
    names = PUBLISHED if backbone is None else of_backbone(backbone)
    rows = []
    for name in names:
        entry, path = PUBLISHED[name], fetched(name, folder)
        rows.append({"name": name, **asdict(entry), "file": None if path is None else str(path)})
    return rows


def describe(name: str, *, folder: str | Path | None = None) -> dict[str, Any]:
    """What is known of published weights, and the ``preprocessing`` that extraction gives the network with them.

    Raises
    ------
    RecipeError : no such name.
    """
    entry = entry_of(name)
    path = fetched(name, folder)
    base = SPECS.get(entry.backbone)
    return {
        "name": name,
        **asdict(entry),
        "hash_prefix": entry.hash_prefix,
        "file_name": entry.file,
        "file": str(place_of(name, folder)),
        "here": path is not None,
        "preprocessing": None if base is None else preprocessing_of(replace(base, **entry.spec)),
    }


def description_lines(found: Mapping[str, Any]) -> list[str]:
    """:func:`describe` as text."""
    lines = [
        f"{found['name']}: {found['backbone']}, {found['source']}",
        f"  trained on   {found['data']}",
        *([] if found["top1"] is None else [f"  top-1        {found['top1']:.2f} % (reported by its authors)"]),
        f"  licence      {found['licence']}{' - NOT FOR COMMERCIAL USE' if found['noncommercial'] else ''}",
        *(f"  address      {url}" for url in found["urls"]),
        *([f"  by hand      {found['by_hand']}"] if found["by_hand"] else []),
        f"  kept as      {found['file']}{'' if found['here'] else ' (not here yet)'}",
    ]
    if found["hash_prefix"]:
        lines.append(f"  sha256       begins with {found['hash_prefix']}")
    for key, value in (found["preprocessing"] or {}).items():
        if key == "resize" and value is None:
            continue  # the short side counts
        lines.append(f"  {key:12} {_text(value)}{' (of this file)' if key in found['spec'] else ''}")
    return lines + ([f"  {found['notes']}"] if found["notes"] else [])


def check(items: Sequence[str] = (), *, folder: str | Path | None = None) -> list[dict[str, Any]]:
    """A report for each name or file, else for each published file that is here.

    Returns
    -------
    list of dict with ``item``, ``file``, ``sha256``, ``family``, ``backbone``, ``variant``, ``parameters``,
    ``tensors``, ``preprocessing``, ``hint`` and ``problem`` (``None`` where all is well).
    """
    items = list(items) or [name for name in PUBLISHED if fetched(name, folder) is not None]
    return [_check(item, folder) for item in dict.fromkeys(items)]


def _check(item: str, folder: str | Path | None) -> dict[str, Any]:
    report: dict[str, Any] = dict.fromkeys(
        ("item", "file", "sha256", "family", "backbone", "variant", "parameters", "tensors", "preprocessing", "hint",
         "problem")
    ) | {"item": item}  # fmt: skip
    try:
        if item in PUBLISHED and not Path(item).exists():
            path = place_of(item, folder)
            if not path.is_file():
                raise RecipeError(f"{item} is not here: tad weights fetch {item}")
            report |= {"file": str(path), "sha256": verify(path)}
            weights = f"{item}={path}"
        else:
            path, weights = Path(item).expanduser(), item
            report |= {"file": str(path), "sha256": files.sha256_of(path), "hint": _hint(path)}
        state = files.read_state_dict(path)
        report |= {"family": files.family_of(state.keys()), "tensors": len(state)}
        backbone = load_backbone(weights if item in PUBLISHED else path)
        report |= {
            "backbone": backbone.spec.name,
            "variant": backbone.variant,
            "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
            "preprocessing": preprocessing_of(backbone.spec),
        }
    except TadError as error:
        report["problem"] = str(error)
    return report


def check_lines(report: Mapping[str, Any]) -> list[str]:
    """A report of :func:`check` as text."""
    facts = [] if report["file"] in (None, report["item"]) else [f"  file       {report['file']}"]
    for key in ("sha256", "family", "backbone", "variant"):
        facts += [f"  {key:10} {report[key]}"] if report[key] else []
    if report["parameters"]:
        facts.append(f"  parameters {report['parameters']:,} in {report['tensors']} tensors, all of which landed")
    if report["preprocessing"]:
        known = {key: value for key, value in report["preprocessing"].items() if key != "resize" or value}
        facts.append(f"  input      {', '.join(f'{key} {_text(value)}' for key, value in known.items())}")
    facts += [f"  hint       {report['hint']}"] if report["hint"] else []
    return [f"{report['item']}: {'PROBLEM: ' + report['problem'] if report['problem'] else 'fine'}", *facts]


def preprocessing_of(spec: BackboneSpec) -> dict[str, Any]:
    """The part of a spec that says how frames are prepared."""
    return {field.name: getattr(spec, field.name) for field in fields(spec) if field.name in PREPROCESSING}


def _hint(path: Path) -> str | None:
    """Which published weights a file has the name of, where these are prepared for otherwise than its network."""
    names = [name for name, entry in PUBLISHED.items() if entry.file == path.name and entry.spec]
    if not names:
        return None
    return (
        f"a published file of this name has another preprocessing than its network's default, which is only applied "
        f"by name: --weights {' or '.join(f'{name}=FILE' for name in names)}"
    )


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return (
            "x".join(map(str, value)) if all(isinstance(v, int) for v in value) else " ".join(f"{v:g}" for v in value)
        )
    return "each file's own" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
