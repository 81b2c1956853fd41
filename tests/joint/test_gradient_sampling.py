"""Encoder gradient sampling against plain backpropagation, in double precision."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tad.errors import RecipeError, WeightsError
from tad.extract.backbones import Backbone
from tad.joint.encoder import Encoder
from tad.joint.freezing import freeze
from tad.joint.gradient_sampling import choose, encode_sampled, in_order
from tests.joint.toys import noise, one_by_one, tiny

SAMPLERS = ("random", "grid", "block", "fps", "dpp")
CLIPS = [noise(clips=7, seed=1), noise(clips=4, seed=2)]  # the samples of a batch may have different lengths


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def head(rows: Tensor) -> Tensor:
    """A loss to which all rows matter, those without gradients through those with."""
    mixing = torch.linspace(-1, 1, len(rows) ** 2, dtype=rows.dtype).view(len(rows), -1)
    return (mixing.sin() @ rows).tanh().square().sum()


def gradients(backbone: Backbone, loss: Tensor) -> dict[str, Tensor | None]:
    backbone.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in backbone.named_parameters()}


def check_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12)


def chosen_rows(rows: Tensor, backbone: Backbone) -> list[bool]:
    """Which rows have a gradient: those of which a sum reaches the last convolution."""
    weight = backbone.get_parameter("s4.1.0.weight")
    reached = [torch.autograd.grad(row.sum(), weight, retain_graph=True)[0] for row in rows]
    return [bool(gradient.any()) for gradient in reached]


@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("stages", [0, 2])
def test_all_of_them_is_plain_backpropagation(chunk: int, checkpoint: bool, stages: int) -> None:
    backbone = tiny()
    freeze(backbone, stages=stages, norms=True)
    encoder = Encoder(backbone=backbone, chunk=chunk, checkpoint=checkpoint).train()
    plain = [torch.cat(one_by_one(backbone, clip)) for clip in CLIPS]
    expected = gradients(backbone, sum(head(rows) for rows in plain))
    rows = encode_sampled(encoder, CLIPS, ratio=1.0)
    for found, wanted in zip(rows, plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    check_same(gradients(backbone, sum(head(found) for found in rows)), expected)
    assert all((p.grad is not None) == p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("ratio", [0.3, 0.6])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_part_of_them_is_plain_backpropagation_in_which_the_others_are_detached(
    sampler: str, ratio: float, checkpoint: bool
) -> None:
    backbone = tiny()
    freeze(backbone, stages=1, norms=True)
    encoder = Encoder(backbone=backbone, chunk=3, checkpoint=checkpoint).train()
    rows = encode_sampled(encoder, CLIPS, ratio=ratio, sampler=sampler)
    slow = []
    for clip, found in zip(CLIPS, rows, strict=True):
        kept = chosen_rows(found, backbone)
        assert sum(kept) == max(1, math.floor(ratio * len(clip.index)))
        one = one_by_one(backbone, clip)
        slow.append(torch.cat([row if keep else row.detach() for row, keep in zip(one, kept, strict=True)]))
        torch.testing.assert_close(found, slow[-1], rtol=1e-12, atol=1e-12)  # the order is that of the clips
    found_gradients = gradients(backbone, sum(head(found) for found in rows))
    expected = gradients(backbone, sum(head(one) for one in slow))
    check_same(found_gradients, expected)
    full = gradients(backbone, sum(head(torch.cat(one_by_one(backbone, clip))) for clip in CLIPS))
    assert not torch.allclose(found_gradients["s4.1.0.weight"], full["s4.1.0.weight"], rtol=1e-3)


def test_none_of_them_has_no_graph() -> None:
    encoder = Encoder(backbone=tiny(), chunk=2).train()
    before = torch.random.get_rng_state()
    rows = encode_sampled(encoder, CLIPS, ratio=0.0, sampler="dpp")
    for clip, found in zip(CLIPS, rows, strict=True):
        assert not found.requires_grad
        expected = torch.cat(one_by_one(encoder.backbone.eval(), clip))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_is_drawn_where_nothing_is_to_choose(sampler: str) -> None:
    encoder, before = Encoder(backbone=tiny()), torch.random.get_rng_state()
    encode_sampled(encoder, CLIPS, ratio=1.0, sampler=sampler)
    with torch.no_grad():  # as in validation
        rows = encode_sampled(encoder, CLIPS, ratio=0.5, sampler=sampler)
    assert not any(found.requires_grad for found in rows)
    assert torch.equal(torch.random.get_rng_state(), before)
    encode_sampled(encoder, CLIPS, ratio=0.5, sampler=sampler)
    assert not torch.equal(torch.random.get_rng_state(), before)


def test_draws_are_those_of_the_global_generator_and_differ_from_step_to_step() -> None:
    drawn = []
    for _ in range(2):
        torch.default_generator.manual_seed(4)
        drawn.append([choose(40, ratio=0.3, sampler="random", features=no_features)[0].tolist() for _ in range(3)])
    assert drawn[0] == drawn[1]
    assert len({tuple(rows) for rows in drawn[0]}) == 3


def no_features() -> Tensor:
    raise AssertionError("not to be called")


@pytest.mark.parametrize("sampler", ["random", "grid", "block"])
def test_chosen_and_others_are_everything_once(sampler: str) -> None:
    for count in (1, 2, 3, 10, 128):
        for ratio in (0.0, 1e-9, 0.1, 0.3, 0.5, 0.999, 1.0):
            chosen, others = choose(count, ratio=ratio, sampler=sampler, features=no_features)
            assert sorted([*chosen.tolist(), *others.tolist()]) == list(range(count))
            assert chosen.tolist() == sorted(chosen.tolist())
            assert len(chosen) == (0 if ratio == 0 else max(1, math.floor(ratio * count + 1e-9)))


@pytest.mark.parametrize(("sampler", "plain"), [("random", 5), ("grid", 5), ("fps", 7), ("dpp", 7)])
def test_how_many_clips_are_computed(sampler: str, plain: int) -> None:
    """Two of seven with a graph; before them the five others without, or all where the sampler looks at their rows."""
    backbone, passes = tiny(), []
    backbone.register_forward_pre_hook(lambda _, args: passes.append((torch.is_grad_enabled(), len(args[0]))))
    encode_sampled(Encoder(backbone=backbone, chunk=2), CLIPS[:1], ratio=0.3, sampler=sampler)
    assert passes == [*((False, len(part)) for part in torch.arange(plain).split(2)), (True, 2)]


def test_fps_looks_at_the_rows_or_at_what_it_is_given() -> None:
    backbone = tiny()
    encoder = Encoder(backbone=backbone)
    far = torch.zeros(7, 2)
    far[2], far[5] = torch.tensor([100.0, 0.0]), torch.tensor([-60.0, 0.0])
    for seed in range(4):
        torch.default_generator.manual_seed(seed)
        rows = encode_sampled(encoder, CLIPS[:1], ratio=0.45, sampler="fps", features=[far])[0]
        kept = chosen_rows(rows, backbone)
        assert sum(kept) == 3
        assert kept[2]
        assert kept[5]
    with pytest.raises(WeightsError, match="not finite"):
        encode_sampled(encoder, CLIPS[:1], ratio=0.45, sampler="dpp", features=[far / 0])


def test_the_pass_without_graph_does_not_touch_norms_that_train() -> None:
    """Running statistics after a step are those of the chosen clips alone, and the others' rows do not see them."""
    backbone = tiny()
    freeze(backbone, stages=0, norms=False)
    clip = noise(clips=6, side=32, seed=3)
    encoder = Encoder(backbone=backbone, chunk=8).train()
    before = copy.deepcopy(backbone)
    rows = encode_sampled(encoder, [clip], ratio=0.5)[0]
    kept = torch.tensor(chosen_rows(rows, backbone))
    assert int(kept.sum()) == 3
    still = torch.cat(one_by_one(copy.deepcopy(before).eval(), clip))
    torch.testing.assert_close(rows[~kept], still[~kept], rtol=1e-12, atol=1e-12)
    alone = Encoder(backbone=before, chunk=8).train()(clip.frames, clip.index[kept])["features"]
    torch.testing.assert_close(rows[kept], alone, rtol=1e-12, atol=1e-12)
    for name, value in before.named_buffers():
        assert torch.equal(value, backbone.get_buffer(name)), name
    assert all(module.training for module in backbone.modules())


@pytest.mark.parametrize("checkpoint", [False, True])
def test_under_autocast_the_chosen_ones_have_their_gradient(checkpoint: bool) -> None:
    """Autocast keeps rounded weights for its whole span; those of the pass without graph must not be among them."""
    backbone = tiny(double=False)
    freeze(backbone, stages=0, norms=True)
    encoder = Encoder(backbone=backbone, chunk=2, checkpoint=checkpoint).train()
    results = []
    for enabled in (False, True):
        torch.default_generator.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            rows = encode_sampled(encoder, CLIPS, ratio=0.5)
            loss = sum(head(found) for found in rows)
        results.append(gradients(backbone, loss.float()))
    for name, gradient in results[0].items():
        found = results[1][name]
        assert (found is None) == (gradient is None) == (not backbone.get_parameter(name).requires_grad), name
        if gradient is not None:
            assert torch.cosine_similarity(found.flatten(), gradient.flatten(), dim=0) > 0.9, name


def test_rows_go_back_to_their_places() -> None:
    for _ in range(20):
        rows, places = torch.randn(9, 2), torch.randperm(9)
        parts = [(part, rows[part]) for part in places.split([4, 0, 5])]
        assert torch.equal(in_order(parts), rows)


def test_what_is_refused() -> None:
    encoder = Encoder(backbone=tiny())
    for ratio in (-0.1, 1.1, math.nan):
        with pytest.raises(RecipeError, match=r"joint\.ratio"):
            encode_sampled(encoder, CLIPS, ratio=ratio)
    with pytest.raises(RecipeError, match="unknown sampler 'rando'"):
        encode_sampled(encoder, CLIPS, ratio=0.5, sampler="rando")
    with pytest.raises(RecipeError, match="iou-balanced"):
        encode_sampled(encoder, CLIPS, ratio=0.5, sampler="iou-balanced")
    with pytest.raises(ValueError, match="level features"):
        encode_sampled(Encoder(backbone=tiny(), keys=("s4",)), CLIPS, ratio=0.5)
    for ratio in (0.0, 0.5, 1.0):
        with pytest.raises(ValueError, match="no clips"):
            encode_sampled(encoder, [noise(clips=0)], ratio=ratio)
    assert encode_sampled(encoder, [], ratio=0.5) == []
