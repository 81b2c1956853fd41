"""All backbones, by name. A new one is a file beside this one and a line in ``BACKBONES``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tad.errors import RecipeError, WeightsError, did_you_mean
from tad.extract import weights as files
from tad.extract.backbones import (
    csn,
    i3d,
    own,
    r2plus1d,
    r2plus1d_r50,
    resnet3d,
    slowfast,
    timesformer,
    tiny,
    tsn,
    videomae,
    vivit,
)
from tad.extract.backbones.base import Backbone, BackboneSpec, LevelInfo
from tad.extract.fetch import fetch
from tad.extract.published import PUBLISHED, split_name

__all__ = [
    "BACKBONES", "GROUPS", "SPECS", "Backbone", "BackboneSpec", "Entry", "LevelInfo", "build_backbone", "load_backbone",
]  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One name: the network, what makes it the one of this name, and the files that hold it.

    Attributes
    ----------
    build : the network's class (keyword arguments only).
    arguments : what is fixed by the name; a file fits when the arguments read off its shapes say the same.
    spec : what it was trained with.
    layouts : how public files name its tensors.
    ports : names of implementations whose arithmetic differs, if the class takes a ``port``.
    """

    build: Callable[..., Backbone]
    arguments: Mapping[str, Any]
    spec: BackboneSpec
    layouts: tuple[files.Layout, ...] = ()
    ports: tuple[str, ...] = ()


BACKBONES: dict[str, Entry] = {
    "i3d-rgb": Entry(i3d.I3D, {"in_channels": 3}, i3d.RGB, i3d.LAYOUTS, tuple(i3d.PORTS)),
    "i3d-flow": Entry(i3d.I3D, {"in_channels": 2}, i3d.FLOW, i3d.LAYOUTS, tuple(i3d.PORTS)),
    # SlowFast
    **{
        name: Entry(
            slowfast.SlowFast,
            fixed,
            slowfast.SPECS[name],
            slowfast.LAYOUTS_MMACTION2 if fixed["source"] == "mmaction2" else slowfast.LAYOUTS,
        )
        for name, fixed in slowfast.NETWORKS.items()
    },
    # Slow, I3D and C2D on ResNet-50
    **{
        name: Entry(
            resnet3d.ResNet3D,
            fixed,
            resnet3d.SPECS[name],
            resnet3d.LAYOUTS[name],
            () if "port" in fixed else resnet3d.PORTS,
        )
        for name, fixed in resnet3d.NETWORKS.items()
    },
    # CSN
    "ircsn-152": Entry(csn.CSN, {"depths": csn.R152, "interaction": "reduced"}, csn.IRCSN_152, csn.LAYOUTS),
    "ipcsn-152": Entry(csn.CSN, {"depths": csn.R152, "interaction": "preserved"}, csn.IPCSN_152, csn.IP_LAYOUTS),
    "ircsn-101": Entry(csn.CSN, {"depths": csn.R101, "interaction": "reduced"}, csn.IRCSN_101, csn.LAYOUTS),
    "ircsn-50": Entry(csn.CSN, {"depths": csn.R50, "interaction": "reduced"}, csn.IRCSN_50, csn.LAYOUTS),
    # R(2+1)D, R3D, MC3
    **{
        spec.name: Entry(r2plus1d.VideoResNet, r2plus1d.ARGUMENTS[spec.name], spec, r2plus1d.LAYOUTS[spec.name])
        for spec in r2plus1d.SPECS.values()
    },
    "r2plus1d-50": Entry(
        r2plus1d_r50.BottleneckR2Plus1D, {"depths": csn.R50}, r2plus1d_r50.R2PLUS1D_50, r2plus1d_r50.LAYOUTS
    ),
    # TSM, TSN
    "tsm-r50": Entry(tsn.TSN, {"depths": csn.R50, "shifts": True}, tsn.TSM_R50, tsn.TSM_LAYOUTS),
    "tsn-r50": Entry(tsn.TSN, {"depths": csn.R50, "shifts": False}, tsn.TSN_R50, tsn.TSN_LAYOUTS),
    # transformers
    "vivit-b": Entry(vivit.ViViT, {"width": 768, "depth": 12}, vivit.JOINT, vivit.JOINT_LAYOUTS),
    "vivit-b-fe": Entry(
        vivit.FactorisedViViT,
        {"width": 768, "depth": 12, "temporal_depth": 4},
        vivit.FACTORISED,
        vivit.FACTORISED_LAYOUTS,
    ),
    "timesformer-b": Entry(timesformer.TimeSformer, {"width": 768, "depth": 12}, timesformer.SPEC, timesformer.LAYOUTS),
    "videomae-b": Entry(videomae.VideoMAE, {"width": 768, "depth": 12}, videomae.SPEC, videomae.LAYOUTS),
    # ours
    "tiny": Entry(tiny.Tiny3D, {"modality": "rgb"}, tiny.RGB, tiny.LAYOUTS),
    "tiny-flow": Entry(tiny.Tiny3D, {"modality": "flow"}, tiny.FLOW, tiny.LAYOUTS),
}
# Several streams under one name.
GROUPS: dict[str, tuple[str, ...]] = {"i3d": ("i3d-rgb", "i3d-flow")}
SPECS: dict[str, BackboneSpec] = {name: entry.spec for name, entry in BACKBONES.items()}


def build_backbone(
    name: str,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    *,
    port: str | None = None,
    expected_sha256: str | None = None,
) -> Backbone:
    """A backbone by name, in evaluation mode, on the CPU.

    Parameters
    ----------
    name : a key of ``BACKBONES``.
    weights : a checkpoint (file or state dict) of this very backbone; a name of ``tad.extract.published.PUBLISHED``,
        which is fetched if it is not there yet, and whose preprocessing ``spec`` then has (``NAME=FILE`` where that
        file lies elsewhere); ``"random"`` or ``"random:SEED"`` for an untrained network that is the same in every
        process; ``None`` to call ``load_state_dict`` yourself (its keys are those that the network's module
        documents; until then the weights differ from call to call).
    port : whose arithmetic, where implementations differ (``Entry.ports``); default: that of the file's layout.
    expected_sha256 : refuse another file than this.

    Returns
    -------
    Backbone with ``spec``, ``variant`` where there are ports, and ``weights_id``: ``sha256:...`` of the file (for a
    state dict: of its keys and tensors), ``random:SEED``, or ``None``.

    Raises
    ------
    RecipeError : unknown name, port or seed.
    WeightsError : a file that cannot be read, is another backbone's, has another hash, or does not fill the network.
    """
    entry = _entry(name)
    if weights is not None and not (isinstance(weights, str) and weights.partition(":")[0] == "random"):
        return _load(weights, name, port=port, expected_sha256=expected_sha256)
    if expected_sha256 is not None:
        raise RecipeError(f"expected_sha256 was given for {name}, but weights={weights!r} is no file")
    if weights is None:
        return _tagged(_built(name, {**entry.arguments, **_port(name, port)}), None)
    seed = _seed(str(weights))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        backbone = _built(name, {**entry.arguments, **_port(name, port)})
    return _tagged(backbone, f"random:{seed}")


def load_backbone(
    weights: str | Path | Mapping[str, Tensor], *, port: str | None = None, expected_sha256: str | None = None
) -> Backbone:
    """The backbone that a checkpoint (file or state dict) holds, told by its tensors' names and shapes, or the one
    that published weights are of; else like :func:`build_backbone`.

    Raises
    ------
    WeightsError : also where the file is of no known backbone, or could be of several.
    """
    return _load(weights, None, port=port, expected_sha256=expected_sha256)


def _load(
    weights: str | Path | Mapping[str, Tensor], name: str | None, *, port: str | None, expected_sha256: str | None
) -> Backbone:
    published, given = split_name(weights)
    listed = None if published is None else PUBLISHED[published]
    if listed is not None:
        if name not in (None, listed.backbone):
            raise WeightsError(f"the published weights {published} are of {listed.backbone}, not of {name}")
        name = _entry(listed.backbone).spec.name
        weights = given or fetch(str(published))
    if isinstance(weights, Mapping):
        where = "the state dict"
        state = files.unwrap(weights, where=where)
        sha256 = files.sha256_of_state(state)
    else:
        where = str(weights)
        sha256 = files.sha256_of(weights)
    if expected_sha256 is not None:
        files.verify_sha256(sha256, expected_sha256, where=where)
    if listed is not None and listed.hash_prefix and not sha256.startswith(listed.hash_prefix):
        raise WeightsError(f"{where} is not {published}: its sha256 is {sha256}, not {listed.hash_prefix}...")
    held = None
    if not isinstance(weights, Mapping):
        state = files.read_state_dict(weights)
        held = own.description(weights)
    if (held := held or own.description_in(state, where=where)) is not None:
        return _tagged(_load_own(held, state, name, port=port, where=where), f"sha256:{sha256}")
    try:
        fits, misfits = _matches(state)
    except WeightsError as error:
        raise WeightsError(f"{where}: {error}") from error
    if name is None and len(fits) > 1:
        raise WeightsError(f"{where} could be {' or '.join(fits)}: build_backbone(name, weights) says which")
    if name not in fits if name else not fits:
        raise WeightsError(f"{where} {_why_not(name, state, list(fits), misfits)}")
    name = name or next(iter(fits))
    layout, arguments = fits[name]
    backbone = _built(name, {**BACKBONES[name].arguments, **arguments, **_port(name, port)})
    files.load_into(backbone, layout.convert(files.renamed(state, layout.rename, where=where)), where=where)
    backbone.spec = replace(backbone.spec, **{**layout.spec, **({} if listed is None else listed.spec)})
    return _tagged(backbone, f"sha256:{sha256}")


def _load_own(
    held: Mapping[str, Any], state: Mapping[str, Tensor], name: str | None, *, port: str | None, where: str
) -> Backbone:
    """A network from a file of ours, which says what it is (see ``own.py``)."""
    known = held["name"]
    if name not in (None, known):
        raise WeightsError(f"{where} holds {known}, not {name}")
    if known not in BACKBONES:
        raise WeightsError(f"{where} holds {known}, which this tad does not know; update tad")
    try:
        backbone = _built(known, {**held["arguments"], **_port(known, port)})
        spec = replace(backbone.spec, **held["spec"])
    except TypeError as error:
        raise WeightsError(f"{where}: {known} cannot be built as the file says ({error}); update tad") from error
    files.load_into(backbone, {key: value for key, value in state.items() if key != own.EXTRA}, where=where)
    backbone.spec = spec
    return backbone


def _matches(state: Mapping[str, Tensor]) -> tuple[dict[str, tuple[files.Layout, dict[str, Any]]], dict[str, str]]:
    """Backbones whose layout and fixed arguments the tensors have, and why others of the same family are not meant."""
    family = files.family_of(state.keys())
    fits, misfits = {}, {}
    for name, entry in BACKBONES.items():
        for layout in entry.layouts:
            if layout.family == family:
                read = layout.arguments(state)
                differing = {key: value for key, value in entry.arguments.items() if read.get(key) != value}
                if not differing:
                    fits[name] = layout, read
                misfits[name] = ", ".join(
                    f"{key} is {read.get(key)} in the file and {value} in {name}" for key, value in differing.items()
                )
    return fits, misfits


def _why_not(name: str | None, state: Mapping[str, Tensor], fits: list[str], misfits: Mapping[str, str]) -> str:
    """What the file is instead, continuing a sentence that begins with its name."""
    family = files.family_of(state.keys())
    if family is None:
        return f"is of no network that tad knows, its tensors are called {', '.join(list(state)[:5])}, ..."
    looks = f"looks like a file of {family}"
    if fits:
        because = f" ({misfits[name]})" if name and name in misfits else ""
        return f"{looks} and holds {' or '.join(fits)}, not {name}{because}"
    if misfits:
        return f"{looks}, but {'; '.join(misfits.values())}"
    return f"{looks}; tad has no such backbone yet. Known: {', '.join(BACKBONES)}"


def _entry(name: str) -> Entry:
    if name in GROUPS:
        raise RecipeError(f"'{name}' stands for {' and '.join(GROUPS[name])}: build them one by one")
    if name not in BACKBONES:
        raise RecipeError(f"unknown backbone '{name}'.{did_you_mean(name, BACKBONES)}")
    return BACKBONES[name]


def _port(name: str, port: str | None) -> dict[str, str]:
    ports = BACKBONES[name].ports
    if port is None:
        return {}
    if port not in ports:
        raise RecipeError(f"{name} has no port '{port}'.{did_you_mean(port, ports)}")
    return {"port": port}


def _seed(weights: str) -> int:
    text = weights.partition(":")[2] if ":" in weights else "0"
    if not (text.isascii() and text.isdigit() and int(text) < 2**63):
        raise RecipeError(
            f"weights '{weights}': a seed is a whole number, such as random:0 (a file of this name: ./{weights})"
        )
    return int(text)


def _built(name: str, arguments: Mapping[str, Any]) -> Backbone:
    backbone = BACKBONES[name].build(**arguments)
    backbone.arguments = dict(arguments)
    return backbone


def _tagged(backbone: Backbone, weights_id: str | None) -> Backbone:
    backbone.weights_id = weights_id
    return backbone.eval()
