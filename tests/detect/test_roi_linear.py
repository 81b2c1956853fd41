"""RoILinear equals RoI align followed by nn.Linear, in both of its orders, values and gradients alike."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tad.detect import roi_linear
from tad.detect.pooling import soi_align
from tad.detect.roi_linear import RoILinear, points_first, products_first, roi_places

ORDERS = {"points": points_first, "products": products_first}


def case(*, lengths=(9, 1, 14), counts=(40, 3, 25), total=16, channels=5, seed=0):
    """Segments inside, outside, across the ends, tiny and longer than everything; NaN behind the real rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(lengths), total, channels, generator=generator, dtype=torch.float64)
    start = torch.rand(sum(counts), generator=generator, dtype=torch.float64) * 24 - 6
    length = torch.rand(sum(counts), generator=generator, dtype=torch.float64) ** 3 * 40
    segments = torch.stack((start, start + length), 1)
    segments[:3] = torch.tensor([[2.0, 2.0], [-50.0, -40.0], [-3.0, 90.0]], dtype=torch.float64)
    return rows, torch.tensor(lengths), segments, counts


def slow(layer, rows, lengths, segments, counts):
    """Every segment, one at a time, through soi_align and one nn.Linear a group."""
    linears = []
    for g in range(layer.groups):
        linear = nn.Linear(layer.points * layer.channels, layer.out).double()
        linear.weight = nn.Parameter(layer.weight[g].detach().flatten(0, 1).T.clone())
        linear.bias = nn.Parameter(layer.bias.detach().view(layer.groups, -1)[g].clone())
        linears.append(linear)
    results = []
    sample = [i for i, count in enumerate(counts) for _ in range(count)]
    for segment, i in zip(segments, sample, strict=True):
        clean = rows[i : i + 1].transpose(1, 2)  # (1, C, T)
        roi = soi_align(clean, lengths[i : i + 1], segment[None], torch.tensor([0]), bins=layer.points)  # (1, C, N)
        roi = roi.transpose(1, 2).flatten()
        results.append(torch.stack([linear(roi) for linear in linears]))
    y = torch.stack(results, 1)  # (G, P, out)
    return (F.relu(y) if layer.relu else y), linears


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("groups", "relu"), [(1, False), (3, True)])
@pytest.mark.parametrize("chunk", [7, 512])
def test_equals_align_then_linear_with_gradients(order, groups, relu, chunk, monkeypatch):
    monkeypatch.setattr(roi_linear, "CHUNK", chunk)
    monkeypatch.setattr(RoILinear, "few", lambda *_: order == "points")
    torch.manual_seed(3)
    layer = RoILinear(channels=5, points=6, out=4, groups=groups, relu=relu).double()
    rows, lengths, segments, counts = case()
    fast_rows, slow_rows = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    fast = layer(fast_rows, roi_places(segments, lengths, counts, points=6))
    expected, linears = slow(layer, slow_rows, lengths, segments, counts)
    assert torch.allclose(fast, expected, atol=1e-12, rtol=0)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    fast.backward(upstream)
    expected.backward(upstream)
    assert torch.allclose(fast_rows.grad, slow_rows.grad, atol=1e-11, rtol=0)
    assert fast_rows.grad.abs().sum() > 0
    for g, linear in enumerate(linears):
        assert torch.allclose(layer.weight.grad[g].flatten(0, 1).T, linear.weight.grad, atol=1e-10, rtol=0)
        assert torch.allclose(layer.bias.grad.view(groups, -1)[g], linear.bias.grad, atol=1e-10, rtol=0)


def test_rows_behind_the_real_ones_are_never_read():
    rows, lengths, segments, counts = case()
    layer = RoILinear(channels=5, points=8, out=3).double()
    places = roi_places(segments, lengths, counts, points=8)
    outside = torch.arange(rows.shape[1]) >= lengths[:, None]
    for order in ORDERS.values():
        clean = order(rows, layer.weight, layer.bias.view(1, 1, -1), places)
        other = order(rows.masked_fill(outside[..., None], 1e9), layer.weight, layer.bias.view(1, 1, -1), places)
        assert torch.equal(clean, other)


def test_products_first_passes_gradcheck():
    rows, lengths, segments, counts = case(lengths=(4, 3), counts=(6, 2), total=4, channels=2)
    weight = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True)
    places = roi_places(segments, lengths, counts, points=3)
    for relu in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, w, b, relu=relu: products_first(x, w, b, places, relu=relu),
            (rows.requires_grad_(), weight, bias),
        )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("counts", [(0, 0, 0), (0, 5, 0), (3, 0, 4)])
def test_samples_without_segments(order, counts, monkeypatch):
    monkeypatch.setattr(RoILinear, "few", lambda *_: order == "points")
    rows, lengths, segments, _ = case()
    segments = segments[: sum(counts)]
    layer = RoILinear(channels=5, points=4, out=3, groups=2, relu=True).double()
    result = layer(rows, roi_places(segments, lengths, counts, points=4))
    assert result.shape == (2, sum(counts), 3)
    expected = [slow(layer, rows, lengths, segments, counts)[0]] if sum(counts) else []
    assert all(torch.allclose(result, e) for e in expected)
    result.sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_part_of_the_places_is_a_quarter_of_the_segment():
    """The first 8 of 32 points of a segment are 8 points of its first quarter."""
    rows, lengths, segments, counts = case()
    whole = roi_places(segments, lengths, counts, points=32)
    quarter = torch.stack((segments[:, 0], segments[:, 0] + 0.25 * (segments[:, 1] - segments[:, 0])), 1)
    alone = roi_places(quarter, lengths, counts, points=8)
    layer = RoILinear(channels=5, points=8, out=3).double()
    assert torch.allclose(layer(rows, whole.part(0, 8)), layer(rows, alone), atol=1e-9)


def test_the_order_follows_the_cost():
    layer = RoILinear(channels=128, points=2, out=3)
    assert layer.few(50, 128)
    assert not layer.few(495, 128)
    assert not layer.few(80, 128)  # a backward pass is dearer point by point
    with torch.no_grad():
        assert layer.few(80, 128)
        assert not layer.few(200, 128)
    assert RoILinear(channels=16, points=2, out=3).few(10**6, 128)  # so narrow that sums cost more than products


def test_initialisation_and_decay_are_those_of_linear():
    torch.manual_seed(0)
    layer, linear = RoILinear(channels=64, points=8, out=256), nn.Linear(512, 256)
    assert layer.weight.max().item() == pytest.approx(linear.weight.max().item(), rel=1e-2)
    assert layer.weight.std().item() == pytest.approx(linear.weight.std().item(), rel=1e-2)
    assert layer.bias.ndim == 1
    assert layer.bias.numel() == 256


def test_half_precision_sums_in_single():
    layer = RoILinear(channels=5, points=4, out=3)
    rows, lengths, segments, counts = case()
    places = roi_places(segments.float(), lengths, counts, points=4)
    expected = layer(rows.bfloat16().float(), places)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(rows.bfloat16(), places)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


def test_places_that_do_not_fit_are_refused():
    rows, lengths, segments, counts = case()
    layer = RoILinear(channels=5, points=4, out=3).double()
    with pytest.raises(ValueError, match="5 points"):
        layer(rows, roi_places(segments, lengths, counts, points=5))
    with pytest.raises(ValueError, match="samples"):
        layer(rows[:2], roi_places(segments, lengths, counts, points=4))
