"""The local-global temporal encoder against a loop, its two forms against each other, and padding."""

import copy

import pytest
import torch
from torch.nn import functional as F

from tad.detect import lgte
from tad.detect.lgte import LGTE, banded_attention, masked_attention
from tad.errors import RecipeError


def encoder(seed=0, **options):
    torch.manual_seed(seed)
    layer = LGTE(**{"channels": 16, "heads": 4, "local_heads": 2, "window": 5, "feedforward": 12, **options})
    with torch.no_grad():  # so that biases and norms matter
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.double().eval()


def rows_of(lengths, *, total=None, channels=16, padding=0.0):
    total = total or max(lengths)
    x = torch.full((len(lengths), channels, total), padding, dtype=torch.float64)
    mask = torch.zeros(len(lengths), total, dtype=torch.bool)
    for i, length in enumerate(lengths):
        x[i, :, :length] = torch.randn(
            channels, length, generator=torch.Generator().manual_seed(length), dtype=torch.float64
        )
        mask[i, :length] = True
    return x, mask


def slow_encoder(layer, x):
    """One video (C, T), one row and one head at a time."""
    channels, rows = x.shape
    width = channels // layer.heads
    query, key, value = (layer.projection.weight @ x + layer.projection.bias[:, None]).split(channels)
    out = torch.zeros_like(x)
    for head in range(layer.heads):
        part = slice(head * width, (head + 1) * width)
        for i in range(rows):
            seen = range(rows)
            if head < layer.local_heads:
                seen = [j for j in seen if abs(i - j) <= layer.window // 2]
            scores = torch.stack([(query[part, i] * key[part, j]).sum() / width**0.5 for j in seen])
            for weight, j in zip(scores.exp() / scores.exp().sum(), seen, strict=True):
                out[part, i] += weight * value[part, j]
    result = torch.zeros_like(x)
    for i in range(rows):
        row = norm(x[:, i] + layer.output.weight @ out[:, i] + layer.output.bias, layer.norm1)
        hidden = (layer.hidden.weight @ row + layer.hidden.bias).clamp(min=0)
        result[:, i] = norm(row + layer.back.weight @ hidden + layer.back.bias, layer.norm2)
    return result


def norm(row, layer):
    centred = row - row.mean()
    return centred / (centred.square().mean() + layer.eps).sqrt() * layer.weight + layer.bias


@pytest.mark.parametrize("banded", [False, True])
@pytest.mark.parametrize("local_heads", [0, 1, 2, 4])
def test_it_equals_a_loop_over_rows_and_heads(monkeypatch, local_heads, banded):
    if banded:
        monkeypatch.setattr(lgte, "BAND_ABOVE", 0)
    layer = encoder(local_heads=local_heads)
    lengths = [11, 1, 3, 8]
    x, mask = rows_of(lengths, total=13, padding=float("nan"))
    with torch.no_grad():
        together = layer(x, mask)
        for i, length in enumerate(lengths):
            expected = slow_encoder(layer, x[i, :, :length])
            assert torch.allclose(together[i, :, :length], expected, atol=1e-12, rtol=1e-12)
            assert (together[i, :, length:] == 0).all()


@pytest.mark.parametrize(("heads", "window", "width"), [(1, 9, 3), (4, 5, 8), (2, 41, 2), (3, 1, 2)])
def test_the_banded_form_equals_the_masked_form_with_gradients(heads, window, width):
    torch.manual_seed(3)
    mask = torch.tensor([[True] * 17, [True] * 5 + [False] * 12, [False] * 17])
    tensors = [torch.randn(3, heads, 17, width, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    pull = torch.randn(3, heads, 17, width, dtype=torch.float64)
    outputs, gradients = [], []
    for attention in (masked_attention, banded_attention):
        out = attention(*tensors, mask, window=window, dropout=0.0)
        outputs.append(out)
        gradients.append(torch.autograd.grad((out * pull).sum(), tensors))
    assert torch.allclose(*outputs, atol=1e-12)
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_long_sequences_take_the_banded_form(monkeypatch):
    layer = encoder()
    x, mask = rows_of([1001, 700])
    with torch.no_grad():
        banded = layer(x, mask)
        monkeypatch.setattr(lgte, "BAND_ABOVE", 2000)
        assert torch.allclose(layer(x, mask), banded, atol=1e-11)
        monkeypatch.setattr(lgte, "masked_attention", None)
        monkeypatch.setattr(lgte, "BAND_ABOVE", 1000)
        layer(x, mask)
        with pytest.raises(TypeError):
            layer(x[:, :, :1000], mask[:, :1000])


def test_padding_and_order_change_nothing():
    layer = encoder()
    lengths = [9, 30, 1]
    x, mask = rows_of(lengths, total=41, padding=float("inf"))
    with torch.no_grad():
        together = layer(layer(x, mask), mask)
        backwards = layer(layer(x.flip(0), mask.flip(0)), mask.flip(0)).flip(0)
        assert torch.allclose(together, backwards, atol=1e-12)
        for i, length in enumerate(lengths):
            single, own = rows_of([length])
            alone = layer(layer(single, own), own)
            assert torch.allclose(alone[0], together[i, :, :length], atol=1e-12)


def test_unmasked_padding_counts_as_rows():
    masked, exact = encoder(), encoder(mask_padding=False)
    x, mask = rows_of([9], total=14)
    with torch.no_grad():
        everything = exact(x, mask)
        assert torch.allclose(everything[0], slow_encoder(exact, x[0]), atol=1e-12)
        assert not torch.allclose(everything[..., :9], masked(x, mask)[..., :9], atol=1e-3)
        assert (everything[..., 9:] != 0).any()


def test_which_rows_reach_which():
    x, mask = rows_of([20])
    for local_heads, seen in ((4, set(range(5, 10))), (3, set(range(20)))):
        leaf = x.clone().requires_grad_()
        encoder(local_heads=local_heads)(leaf, mask)[0, :, 7].square().sum().backward()
        assert set(torch.nonzero(leaf.grad[0].abs().sum(0)).squeeze(1).tolist()) == seen


def test_gradients_are_right_and_padding_has_none():
    layer = encoder(channels=4, heads=2, local_heads=1, window=3, feedforward=3)
    x, mask = rows_of([4, 2], channels=4)
    assert torch.autograd.gradcheck(lambda y: layer(y, mask), (x.requires_grad_(),))
    (grad,) = torch.autograd.grad(layer(x, mask).square().sum(), x)
    assert (grad[1, :, 2:] == 0).all()
    assert (grad[1, :, :2] != 0).all()


def test_a_sample_without_rows_is_zero_and_finite():
    layer = encoder().train()
    x, mask = rows_of([6, 6])
    mask[1] = False
    out = layer(x, mask)
    out.square().sum().backward()
    assert (out[1] == 0).all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("above", [0, 1000])
def test_dropout_acts_in_training_alone(monkeypatch, above):
    monkeypatch.setattr(lgte, "BAND_ABOVE", above)
    layer = encoder(dropout=0.5, local_heads=4)
    x, mask = rows_of([12])
    assert torch.equal(layer(x, mask), layer(x, mask))
    still = copy.deepcopy(layer).train()
    monkeypatch.setattr(still, "_drop", lambda y: y)  # what is left is the dropout of the weights
    assert not torch.equal(still(x, mask), still(x, mask))


@pytest.mark.parametrize("attention", [masked_attention, banded_attention])
def test_dropout_keeps_the_mean_of_the_weights(attention):
    torch.manual_seed(0)
    ones, mask = torch.ones(1, 1, 600, 2), torch.ones(1, 600, dtype=torch.bool)
    out = attention(torch.randn(1, 1, 600, 2), ones, ones, mask, window=9, dropout=0.5)
    assert out.std() > 0.1
    assert out.mean().item() == pytest.approx(1.0, abs=0.1)


def test_values_that_do_not_fit():
    for options, message in [
        ({"channels": 10}, "4 heads"),
        ({"local_heads": 5}, "5 local"),
        ({"window": 4}, "odd"),
        ({"window": -1}, "odd"),
        ({"dropout": 1.5}, "dropout"),
        ({"heads": 0}, "0 heads"),
    ]:
        with pytest.raises(RecipeError, match=message):
            encoder(**options)


def test_bfloat16_autocast():
    layer = encoder().float().train()
    x, mask = rows_of([30, 12])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.mse_loss(layer(x.float(), mask).float(), torch.ones(2, 16, 30))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
