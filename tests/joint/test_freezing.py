"""Which parts of a backbone train, that the others do not move, and the optimizer's groups."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tad.errors import RecipeError
from tad.extract.backbones import BACKBONES, Backbone, build_backbone
from tad.extract.backbones.timesformer import TimeSformer
from tad.extract.backbones.tiny import Tiny3D
from tad.extract.backbones.videomae import VideoMAE
from tad.extract.backbones.vivit import FactorisedViViT, ViViT
from tad.joint.freezing import BLOCKS, HEADS, STAGES, batch_norms, freeze, set_modes, stages_of
from tad.recipe import TrainRecipe
from tad.training.optim import Part, build_optimizer, set_lr

ONE_OF_EACH = list({entry.build: name for name, entry in BACKBONES.items()}.values())  # network's class

# What is left to train after 0 to 4 stages, by the first parts of the parameters' names.
LEFT: dict[str, list[set[str]]] = {
    "tsm-r50": [
        {"stem", "res2", "res3", "res4", "res5"}, {"res3", "res4", "res5"}, {"res4", "res5"}, {"res5"}, set(),
    ],
    "i3d-flow": [
        {"Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3", "Mixed_3b", "Mixed_3c", "Mixed_4b", "Mixed_4c", "Mixed_4d",
         "Mixed_4e", "Mixed_4f", "Mixed_5b", "Mixed_5c"},
        {"Mixed_3b", "Mixed_3c", "Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f", "Mixed_5b", "Mixed_5c"},
        {"Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f", "Mixed_5b", "Mixed_5c"},
        {"Mixed_5b", "Mixed_5c"},
        set(),
    ],
    "tiny": [{"stem", "s1", "s2", "s4"}, {"s2", "s4"}, {"s4"}, {"s4"}, set()],
}  # fmt: skip


def on_meta(name: str) -> Backbone:
    """A backbone whose tensors have no values."""
    with torch.device("meta"):
        return BACKBONES[name].build(**BACKBONES[name].arguments)


def trains(backbone: nn.Module) -> set[str]:
    return {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}


def clips(count: int = 3) -> Tensor:
    drawn = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, 4, 32, 32, generator=drawn)


def test_every_backbone_has_stages() -> None:
    assert {entry.build for entry in BACKBONES.values()} == {*STAGES, *BLOCKS}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_parameter_is_in_one_stage_or_in_a_classifier_and_stages_grow_from_the_input(name: str) -> None:
    backbone = on_meta(name)
    parts = [*stages_of(backbone), HEADS]
    for parameter, _ in backbone.named_parameters():
        holding = [n for n, part in enumerate(parts) for prefix in part if f"{parameter}.".startswith(f"{prefix}.")]
        assert len(holding) == 1, f"{parameter}: {holding}"
    everything = {n for n, _ in backbone.named_parameters()}
    for part in parts[1:5]:  # every stage has something to train, and nothing that is not there
        for prefix in part:
            assert any(f"{n}.".startswith(f"{prefix}.") for n in everything), prefix
    assert all(norm.weight is not None for norm in batch_norms(backbone))  # by which set_modes knows them
    left = []
    for stages in range(5):
        freeze(backbone, stages=stages, norms=False)
        left.append(trains(backbone))
    heads = {n for n, _ in backbone.named_parameters() if n.split(".")[0] in HEADS}
    assert left[0] == {n for n, _ in backbone.named_parameters()} - heads
    assert all(more > fewer for more, fewer in pairwise(left))
    assert left[4] == set()


@pytest.mark.parametrize("name", LEFT)
def test_which_parts_are_left(name: str) -> None:
    backbone = on_meta(name)
    for stages, expected in enumerate(LEFT[name]):
        freeze(backbone, stages=stages, norms=False)
        assert {n.split(".")[0] for n in trains(backbone)} == expected
    if name == "tiny":
        freeze(backbone, stages=3, norms=False)
        assert {n.rsplit(".", 2)[0] for n in trains(backbone)} == {"s4.1"}


def test_gradients_end_where_the_frozen_stages_do() -> None:
    """Of real passes: a frozen stage stands before all that train, so that nothing is computed through it."""
    for name, side, first in (("tsm-r50", 33, "res4.0.conv1"), ("i3d-rgb", 32, "Mixed_4b.b0")):
        backbone = build_backbone(name, weights="random")
        freeze(backbone, stages=2, norms=True)
        inputs: list[Tensor] = []
        backbone.get_submodule(first).register_forward_pre_hook(lambda _, args, into=inputs: into.append(args[0]))
        backbone(torch.randn(1, 3, 2, side, side))["features"].sum().backward()
        assert [x.requires_grad for x in inputs] == [False]
        for parameter_name, parameter in backbone.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, parameter_name


def test_blocks_of_transformers_are_frozen_by_quarters() -> None:
    small = {"classes": 3, "frames": 4, "image_size": 16, "width": 8, "heads": 2}
    tubelet = {"tubelet": (2, 8, 8)}
    joint = ViViT(depth=8, **small, **tubelet)
    freeze(joint, stages=1, norms=True)
    still = ("patch_embed.", "encoder.cls", "encoder.positions", "encoder.blocks.0.", "encoder.blocks.1.", "head.")
    everything = {n for n, _ in joint.named_parameters()}
    assert everything - trains(joint) == {n for n in everything if n.startswith(still)}
    factorised = FactorisedViViT(depth=3, temporal_depth=1, **small, **tubelet)
    freeze(factorised, stages=3, norms=True)
    assert {n.split(".")[0] for n in trains(factorised)} == {"temporal"}
    assert {"temporal.cls", "temporal.positions", "temporal.norm.weight"} <= trains(factorised)
    six = VideoMAE(depth=6, **small, **tubelet)  # 2, 1, 2 and 1 blocks
    freeze(six, stages=2, norms=True)
    assert {n.split(".")[1] for n in trains(six) if n.startswith("blocks")} == {"3", "4", "5"}
    two = TimeSformer(depth=2, patch_size=8, **small)  # fewer blocks than stages
    freeze(two, stages=2, norms=True)
    assert {n.split(".")[1] for n in trains(two) if n.startswith("blocks")} == {"1"}
    assert "norm.weight" in trains(two)
    assert not trains(two) & {"cls_token", "pos_embed", "time_embed"}


@pytest.mark.parametrize(("stages", "norms"), [(0, True), (1, False), (2, True), (3, False)])
def test_what_is_frozen_does_not_move_in_a_step_nor_do_its_statistics(stages: int, norms: bool) -> None:
    backbone = build_backbone("tiny", weights="random:1")
    freeze(backbone, stages=stages, norms=norms)
    backbone.train()
    set_modes(backbone)
    before = copy.deepcopy(dict(backbone.state_dict()))
    detector = nn.Linear(128, 2)
    train = TrainRecipe(optimizer="adamw", lr=1e-2, weight_decay=0.1)
    optimizer = build_optimizer(nn.ModuleList([detector, backbone]), train)
    detector(backbone(clips())["features"]).square().sum().backward()
    optimizer.step()
    moved = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    frozen_parts = [name for part in stages_of(backbone)[: stages + 1] for name in part] if stages else []
    for name in backbone.state_dict():
        inside = name.startswith(tuple(f"{part}." for part in frozen_parts))
        of_norm = isinstance(backbone.get_submodule(name.rpartition(".")[0]), _BatchNorm)
        fixed = inside or name == "motion.floor" or (norms and of_norm)
        assert (name not in moved) == fixed, name


def test_modes_survive_train_eval_and_copies() -> None:
    backbone = build_backbone("tiny", weights="random")
    freeze(backbone, stages=1, norms=False)
    for module in (backbone, copy.deepcopy(backbone)):
        module.eval()
        set_modes(module)
        assert not any(norm.training for norm in batch_norms(module))
        module.train()
        set_modes(module)
        modes = {name: norm.training for name, norm in module.named_modules() if isinstance(norm, _BatchNorm)}
        assert modes == {"stem.1": False, "s1.1": False, "s2.1": True, "s4.0.1": True, "s4.1.1": True}


def test_freezing_again_says_everything_anew() -> None:
    backbone = build_backbone("tiny", weights="random").train()
    everything = trains(backbone)
    freeze(backbone, stages=4, norms=True)
    assert trains(backbone) == set()
    freeze(backbone, stages=0, norms=False)
    assert trains(backbone) == everything


def test_a_stage_is_not_taken_for_another_whose_name_begins_alike() -> None:
    class Named(Tiny3D):
        def __init__(self) -> None:
            super().__init__()
            self.s10 = nn.Linear(1, 1)

    backbone = Named()
    freeze(backbone, stages=1, norms=False)
    assert {"s10.weight", "s10.bias"} <= trains(backbone)
    assert not any(name.startswith("s1.") for name in trains(backbone))


def test_unknown_backbones_and_stages_are_refused() -> None:
    class Other(Backbone):
        spec = replace(BACKBONES["tiny"].spec, name="other")

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.norm = nn.BatchNorm1d(2)

    other = Other()
    with pytest.raises(RecipeError, match=r"stages of other.*frozen_stages=0.*i3d-rgb.*tsm-r50.*videomae-b.*tiny"):
        freeze(other, stages=1, norms=False)
    freeze(other, stages=0, norms=True)  # needs to know no stages
    assert trains(other) == {"layer.weight", "layer.bias"}
    for stages in (-1, 5):
        with pytest.raises(RecipeError, match="from 0 to 4"):
            freeze(other, stages=stages, norms=True)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_parts_have_two_speeds_and_the_decay_that_one_part_has(optimizer: Any) -> None:
    backbone, detector = build_backbone("tiny", weights="random"), nn.Sequential(nn.Linear(128, 4), nn.LayerNorm(4))
    freeze(backbone, stages=2, norms=False)
    train = TrainRecipe(optimizer=optimizer, lr=1e-3, weight_decay=0.05)
    both = nn.ModuleList([detector, backbone])
    made = build_optimizer(both, train, parts=[Part(detector), Part(backbone, 1e-3)])
    found = {p: group for group in made.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in made.param_groups) == len(found)
    assert set(found) == {p for p in both.parameters() if p.requires_grad}
    decays = {p: group["weight_decay"] for group in build_optimizer(both, train).param_groups for p in group["params"]}
    assert {p: group["weight_decay"] for p, group in found.items()} == decays
    for lr in (1e-3, 5e-4):
        assert all(math.isclose(found[p]["lr"], lr) for p in detector.parameters())
        assert all(math.isclose(found[p]["lr"], lr * 1e-3) for p in backbone.parameters() if p.requires_grad)
        set_lr(made, 5e-4)


def test_parts_of_which_one_does_not_train() -> None:
    backbone, detector = build_backbone("tiny", weights="random"), nn.Linear(128, 4)
    train = TrainRecipe(optimizer="adam", lr=1e-3)
    both = nn.ModuleList([detector, backbone])
    freeze(backbone, stages=4, norms=True)
    parts = [Part(detector), Part(backbone, 1e-3)]
    assert [group["lr_factor"] for group in build_optimizer(both, train, parts=parts).param_groups] == [1.0]
    detector.requires_grad_(False)
    with pytest.raises(RecipeError, match="parameter to train"):
        build_optimizer(both, train, parts=parts)
