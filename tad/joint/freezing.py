"""What of a backbone trains in joint mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tad.errors import RecipeError
from tad.extract.backbones import (
    BACKBONES,
    Backbone,
    csn,
    i3d,
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

BatchNorm: TypeAlias = _BatchNorm  # of one to three dimensions, and synchronised ones
Stages: TypeAlias = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]

RESIDUAL: Stages = (("stem",), ("res2",), ("res3",), ("res4",), ("res5",))

# Modules and parameters of the stem and of four stages. A stage is what lies between two halvings of the picture, as
# the Mixed_3, 4 and 5 blocks of I3D do; of SlowFast a lateral goes with the stage whose output it hands over.
STAGES: dict[type[Backbone], Stages] = {
    csn.CSN: RESIDUAL,
    r2plus1d.VideoResNet: RESIDUAL,
    r2plus1d_r50.BottleneckR2Plus1D: RESIDUAL,
    tsn.TSN: RESIDUAL,
    resnet3d.ResNet3D: (("path.stem",), ("path.res2",), ("path.res3",), ("path.res4",), ("path.res5",)),
    slowfast.SlowFast: (
        ("slow.stem", "fast.stem", "laterals.0"),
        ("slow.res2", "fast.res2", "laterals.1"),
        ("slow.res3", "fast.res3", "laterals.2"),
        ("slow.res4", "fast.res4", "laterals.3"),
        ("slow.res5", "fast.res5"),
    ),
    i3d.I3D: (
        ("Conv3d_1a_7x7",),
        ("Conv3d_2b_1x1", "Conv3d_2c_3x3"),
        ("Mixed_3b", "Mixed_3c"),
        ("Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f"),
        ("Mixed_5b", "Mixed_5c"),
    ),
    tiny.Tiny3D: (("motion", "stem"), ("s1",), ("s2",), ("s4.0",), ("s4.1",)),
}

# The stages of transformers are quarters of their blocks (``.*``), counted through. What is named before the first
# block is the stem, what is named after a block goes with it.
BLOCKS: dict[type[Backbone], tuple[str, ...]] = {
    vivit.ViViT: ("patch_embed", "encoder.cls", "encoder.positions", "encoder.blocks.*", "encoder.norm"),
    vivit.FactorisedViViT: (
        "patch_embed", "spatial.cls", "spatial.positions", "spatial.blocks.*", "spatial.norm",
        "temporal.blocks.*", "temporal.cls", "temporal.positions", "temporal.norm",
    ),
    timesformer.TimeSformer: ("patch_embed", "cls_token", "pos_embed", "time_embed", "blocks.*", "norm"),
    videomae.VideoMAE: ("patch_embed", "blocks.*", "fc_norm"),
}  # fmt: skip

# Classifiers that came with the weights: features do not pass through them, so that no loss reaches them.
HEADS = ("classifier", "region_classifier", "projection", "logits", "head")


def stages_of(backbone: Backbone) -> Stages:
    """Names of the modules and parameters of the stem and of the four stages.

    Raises
    ------
    RecipeError : the backbone has no entry in ``STAGES`` or ``BLOCKS``.
    """
    for kind in type(backbone).__mro__:
        if kind in STAGES:
            return STAGES[kind]
        if kind in BLOCKS:
            return _quarters(backbone, BLOCKS[kind])
    known = [name for name, entry in BACKBONES.items() if entry.build in STAGES or entry.build in BLOCKS]
    raise RecipeError(
        f"tad does not know the stages of {backbone.spec.name}: set joint.frozen_stages=0, or take one of "
        f"{', '.join(known)}"
    )


def _quarters(backbone: Backbone, order: tuple[str, ...]) -> Stages:
    counts = {
        name: len(list(backbone.get_submodule(name.removesuffix(".*")).children()))
        for name in order
        if name.endswith(".*")
    }
    stages: list[list[str]] = [[], [], [], [], []]
    stage = passed = 0
    for name in order:
        for block in range(counts.get(name, 0)):
            stage = 1 + 4 * passed // sum(counts.values())
            passed += 1
            stages[stage].append(name.replace("*", str(block)))
        if name not in counts:
            stages[stage].append(name)
    stem, first, second, third, fourth = map(tuple, stages)
    return stem, first, second, third, fourth


def batch_norms(module: nn.Module) -> Iterator[BatchNorm]:
    return (child for child in module.modules() if isinstance(child, _BatchNorm))


def freeze(backbone: Backbone, *, stages: int, norms: bool) -> None:
    """Say which parameters of ``backbone`` train; all others than the following do.

    Its classifiers never train. Batch norms whose parameters do not train use their running statistics and leave them
    be; :func:`set_modes` restores that after ``backbone.train()``.

    Parameters
    ----------
    stages : 0: everything trains; 1: the stem and the first stage do not; ... 4: nothing trains. ETAD's
        appendix B.1: 2.
    norms : no batch norm trains, wherever it is (the same).

    Raises
    ------
    RecipeError : another number of stages, or stages of a backbone that has no entry in ``STAGES`` or ``BLOCKS``.
    """
    if stages not in range(5):
        raise RecipeError(f"joint.frozen_stages is a number from 0 to 4, got {stages!r}")
    frozen: tuple[str, ...] = HEADS
    if stages:
        frozen += tuple(name for part in stages_of(backbone)[: stages + 1] for name in part)
    prefixes = tuple(f"{name}." for name in frozen)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(not f"{name}.".startswith(prefixes))
    if norms:
        for norm in batch_norms(backbone):
            norm.requires_grad_(False)
    set_modes(backbone)


def set_modes(backbone: nn.Module) -> None:
    """Put batch norms whose parameters do not train into evaluation mode; to be called after ``train()``."""
    for norm in batch_norms(backbone):
        if norm.weight is not None and not norm.weight.requires_grad:
            norm.eval()
