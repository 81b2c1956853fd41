"""The encoder against extraction, and its checkpointing against none."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tad.errors import RecipeError
from tad.extract.backbones import Backbone, build_backbone
from tad.extract.streams import Stream, resolve
from tad.joint.encoder import Encoder, without_graph
from tad.joint.freezing import freeze
from tad.recipe import ExtractRecipe
from tests.joint.toys import noise, one_by_one, tiny


def stream_of(backbone: Backbone, *, window: int, stride: int, **levels: object) -> Stream:
    """The stream that extraction would make with exactly this network."""
    recipe = ExtractRecipe(
        backbone=backbone.spec.name, weights="random", window=window, interval=1, stride=stride, **levels
    )
    return replace(resolve(recipe), backbone=backbone)


@pytest.mark.parametrize(
    ("name", "window", "side", "levels"),
    [
        ("tiny", 8, 32, {"levels": True, "maps": ("s2", "s4")}),
        ("tiny-flow", 8, 64, {"levels": True}),
        ("tsm-r50", 3, 40, {}),
        ("tsn-r50", 2, 33, {"levels": True}),
        ("i3d-rgb", 8, 64, {"levels": True, "maps": ("s8",)}),
    ],
)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_rows_are_those_of_extraction(name: str, window: int, side: int, levels: dict, checkpoint: bool) -> None:
    backbone = build_backbone(name, weights="random:2")
    stream = stream_of(backbone, window=window, stride=window, **levels)
    clip = noise(clips=3, window=window, side=side, channels=len(backbone.spec.mean))
    with torch.inference_mode():
        expected = stream.run(clip.frames.permute(0, 2, 3, 1)[clip.index])  # windows (B, T, H, W, C)
    encoder = Encoder(backbone=backbone, keys=("features", *stream.sequences), chunk=8, checkpoint=checkpoint)
    found = encoder.eval()(clip.frames, clip.index)
    assert list(found) == list(encoder.keys)
    assert set(found) == set(expected)
    for key, rows in found.items():
        assert rows.dtype == torch.float32
        assert torch.equal(rows.to(expected[key].dtype), expected[key]), key


def test_colours_in_the_order_that_the_network_takes() -> None:
    backbone = tiny()
    backbone.spec = replace(backbone.spec, channel_order="bgr")
    clip = noise(clips=2)
    turned = replace(clip, frames=clip.frames.flip(1))
    rows = Encoder(backbone=backbone)(clip.frames, clip.index)["features"]
    backbone.spec = replace(backbone.spec, channel_order="rgb")
    torch.testing.assert_close(Encoder(backbone=backbone)(turned.frames, turned.index)["features"], rows)


@pytest.mark.parametrize("chunk", [1, 2, 5, 7])
def test_chunks_change_nothing_where_norms_do_not_train(chunk: int) -> None:
    backbone, clip = tiny(), noise(clips=5)
    encoder = Encoder(backbone=backbone, keys=("s2", "features", "s4-map"), chunk=chunk).eval()
    sizes: list[int] = []
    backbone.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    found = encoder(clip.frames, clip.index)
    assert sizes == [len(part) for part in torch.arange(5).split(chunk)]
    for key, level in (("features", "features"), ("s4-map", "s4"), ("s2", "s2")):
        expected = torch.cat(one_by_one(backbone, clip, level))
        expected = expected.mean((-2, -1)) if key == "s2" else expected
        torch.testing.assert_close(found[key], expected, rtol=1e-12, atol=1e-12)
    assert found["features"].dtype == torch.float64


def losses(encoder: Encoder, *, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss and gradients of a pass with a nonlinear loss over all rows."""
    clip = noise(clips=5, side=32)
    encoder.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        rows = encoder(clip.frames, clip.index)
        loss = sum((value.float() if autocast else value).square().mean() for value in rows.values())
    assert isinstance(loss, Tensor)
    loss.backward()
    return loss, {name: p.grad for name, p in encoder.named_parameters()}


class WithDropout(nn.Module):
    """Dropout behind the stem, so that random numbers are drawn inside a chunk."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem = stem

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.stem(x), 0.3, self.training)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_changes_no_gradient_statistic_or_random_number(norms: bool, autocast: bool) -> None:
    results = []
    for checkpoint in (False, True):
        backbone = tiny(double=not autocast)
        backbone.stem = WithDropout(backbone.stem)
        freeze(backbone, stages=1, norms=norms)
        encoder = Encoder(backbone=backbone, keys=("features", "s2"), chunk=2, checkpoint=checkpoint).train()
        torch.default_generator.manual_seed(5)
        loss, gradients = losses(encoder, autocast=autocast)
        results.append((loss, gradients, copy.deepcopy(encoder.state_dict()), torch.rand(3)))
    plain, again = results
    assert torch.equal(plain[0], again[0])
    for name, gradient in plain[1].items():
        assert (gradient is None) == name.startswith(("backbone.stem", "backbone.s1")) or norms
        assert (gradient is None) == (again[1][name] is None)
        assert gradient is None or torch.equal(gradient, again[1][name]), name
    assert plain[2].keys() == again[2].keys()
    for name, value in plain[2].items():
        assert torch.equal(value, again[2][name]), name
    assert torch.equal(plain[3], again[3])
    if not norms:  # a chunk is seen once: 3 chunks of at most 2 clips, after the three passes of the toy
        assert int(again[2]["backbone.s4.1.1.num_batches_tracked"]) == 6
        assert int(again[2]["backbone.s1.1.num_batches_tracked"]) == 3


def test_checkpointing_keeps_no_activations_and_may_be_gone_through_twice() -> None:
    clip, kept = noise(clips=4, side=32), {}
    gradients = {}
    for checkpoint in (False, True):
        encoder = Encoder(backbone=tiny(), chunk=2, checkpoint=checkpoint).train()
        sizes: list[int] = []

        def pack(tensor: Tensor, into: list[int] = sizes) -> Tensor:
            if tensor.data_ptr() != clip.frames.data_ptr():
                into.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = encoder(clip.frames, clip.index)["features"].square().sum()
        kept[checkpoint] = sum(sizes)
        statistics = copy.deepcopy(dict(encoder.named_buffers()))
        loss.backward(retain_graph=True)
        loss.backward()
        gradients[checkpoint] = [p.grad for p in encoder.parameters()]
        for name, value in encoder.named_buffers():
            assert torch.equal(value, statistics[name]), name
    assert 0 < kept[True] < kept[False] / 1000  # indices
    assert all(torch.equal(a, b) for a, b in zip(*gradients.values(), strict=True))


def test_autocast_around_it_is_autocast_inside() -> None:
    backbone, clip = tiny(double=False), noise(clips=3)
    encoder = Encoder(backbone=backbone, keys=("features", "s2")).eval()
    plain = encoder(clip.frames, clip.index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encoder(clip.frames, clip.index)
    recipe = ExtractRecipe(backbone="tiny", weights="random", window=4, stride=4, levels=True, precision="bf16")
    stored = replace(resolve(recipe), backbone=backbone).run(clip.frames.permute(0, 2, 3, 1)[clip.index])
    for key, rows in found.items():
        assert torch.equal(rows, stored[key])
        assert rows.dtype == torch.float32
        assert not torch.equal(rows, plain[key])


def test_a_pass_without_graph_leaves_norms_and_the_later_pass_with_graph_alone() -> None:
    """A rounded weight that autocast kept from a pass without graph would end the gradient of the one with graph."""
    backbone, clip = tiny(double=False), noise(clips=3)
    encoder = Encoder(backbone=backbone).train()
    before = copy.deepcopy(encoder.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with without_graph(encoder):
            rows = encoder(clip.frames, clip.index)["features"]
            assert not rows.requires_grad
            assert not torch.is_autocast_cache_enabled()  # of which older torch loses the gradient
        assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
        assert torch.equal(rows, encoder.eval()(clip.frames, clip.index)["features"])  # running statistics
        encoder.train()
        with pytest.raises(ZeroDivisionError), without_graph(encoder):
            raise ZeroDivisionError
        assert torch.is_autocast_cache_enabled()
        encoder(clip.frames, clip.index)["features"].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in encoder.parameters())
    assert not torch.equal(encoder.state_dict()["backbone.s2.1.running_mean"], before["backbone.s2.1.running_mean"])


def test_train_keeps_what_is_frozen() -> None:
    backbone = tiny()
    freeze(backbone, stages=2, norms=False)
    outer = nn.ModuleList([Encoder(backbone=backbone)]).eval().train()
    assert outer[0].training
    assert not backbone.s2[1].training
    assert backbone.s4[0][1].training


def test_what_is_refused() -> None:
    backbone, clip = tiny(), noise(clips=2)
    for keys, message in (
        (("s3",), "tiny has no level 's3'.*s4-map"), (("features-map",), "no level"), ((), "once each"),
        (("s2", "s2"), "once each"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=message):
            Encoder(backbone=backbone, keys=keys)
    with pytest.raises(RecipeError, match="chunk=0"):
        Encoder(backbone=backbone, chunk=0)
    encoder = Encoder(backbone=backbone)
    for frames, index in (
        (clip.frames.float(), clip.index),
        (clip.frames[0], clip.index),
        (clip.frames, clip.index[:0]),
        (clip.frames, clip.index[:, :0]),
        (clip.frames, clip.index[0]),
        (clip.frames, clip.index.int()),
    ):
        with pytest.raises(ValueError, match="must be"):
            encoder(frames, index)
    with pytest.raises(RecipeError, match="tiny reads frames of 3 channels"):
        encoder(clip.frames[:, :2], clip.index)
