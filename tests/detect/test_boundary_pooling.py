"""Boundary max pooling against a loop over segments, channels and rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from tad.detect.boundary_pooling import BoundaryMaxPooling, boundary_max_pool, boundary_windows, places_of_maxima
from tad.errors import RecipeError


def slow_windows(start, end, rows, *, inner=0.25, outer=0.1):
    length = end - start
    inside, outside = max(inner * length, 1.0), max(outer * length, 1.0)
    ends = (start - outside, start + inside), (end - inside, end + outside)
    return [[min(max(math.floor(edge), 0), rows - 1) for edge in pair] for pair in ends]


def slow_pool(features, segments, rows, *, begin=None, **shares):
    batch, channels, _ = features.shape
    result = []
    for b in range(batch):
        for n, (start, end) in enumerate(segments[b].tolist()):
            windows = slow_windows(start, end, int(rows[b, min(n, rows.shape[1] - 1)]), **shares)
            offset = 0 if begin is None else int(begin[n])
            for c in range(channels):
                first, last = windows[0 if c < channels // 2 else 1]
                result.append(max(features[b, c, offset + i] for i in range(first, last + 1)))
    return torch.stack(result).view(batch, -1, channels).transpose(1, 2)


def case(seed, *, batch=2, channels=4, length=19, count=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, channels, length, generator=generator, dtype=torch.float64).to(dtype)
    start = torch.rand(batch, count, generator=generator).double() * (length + 8) - 6
    segments = torch.stack((start, start + 18 * torch.rand(batch, count, generator=generator).double() ** 2), 2)
    rows = torch.randint(1, length + 1, (batch, 1), generator=generator)
    return features, segments, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_values_and_gradients_equal_a_loop(seed, dtype):
    features, segments, rows = case(seed, dtype=dtype)
    fast, slow = features.clone().requires_grad_(), features.clone().requires_grad_()
    weight = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(seed)).to(dtype)
    ours, loop = boundary_max_pool(fast, segments, rows), slow_pool(slow, segments, rows)
    assert ours.dtype == dtype
    assert torch.equal(ours, loop)
    (ours * weight).sum().backward()
    (loop * weight).sum().backward()
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-6
    assert torch.allclose(fast.grad, slow.grad, atol=tolerance)
    behind = torch.arange(19) >= rows  # (B, T)
    assert not fast.grad[behind[:, None].expand_as(features)].any()  # padding is not read


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sequences_one_behind_the_other_are_each_their_own(dtype):
    lengths = (7, 3, 9)
    parts = [case(k, length=n, dtype=dtype) for k, n in enumerate(lengths)]
    features = torch.cat([f for f, *_ in parts], 2)
    begin = torch.repeat_interleave(torch.tensor([0, 7, 10]), 12)
    rows = torch.cat([r.expand(-1, 12) for *_, r in parts], 1)
    together = boundary_max_pool(features, torch.cat([s for _, s, _ in parts], 1), rows, begin=begin)
    assert torch.equal(together, torch.cat([boundary_max_pool(*part) for part in parts], 2))
    assert torch.equal(together, slow_pool(features, torch.cat([s for _, s, _ in parts], 1), rows, begin=begin))


@settings(max_examples=80)
@given(
    start=st.floats(-50, 50),
    length=st.floats(0, 80),
    rows=st.integers(1, 40),
    inner=st.floats(0, 0.5),
    outer=st.floats(0, 0.5),
)
def test_windows_are_ordered_inside_and_as_defined(start, length, rows, inner, outer):
    segment = torch.tensor([start, start + length], dtype=torch.float64)
    first, last = boundary_windows(segment, torch.tensor(rows), inner=inner, outer=outer)
    expected = slow_windows(*segment.tolist(), rows, inner=inner, outer=outer)
    assert torch.stack((first, last), -1).tolist() == expected
    assert ((first >= 0) & (first <= last) & (last < rows)).all()


def test_windows_by_hand():
    # 20 rows from 10: 2 out, 5 in. 8 rows: 1 out (0.8), 2 in. A point: 1 and 1.
    segments = torch.tensor([[10.0, 30.0], [10.5, 18.5], [7.5, 7.5]])
    first, last = boundary_windows(segments, torch.tensor(100))
    assert first.tolist() == [[8, 25], [9, 16], [6, 6]]
    assert last.tolist() == [[15, 32], [12, 19], [8, 8]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odd_segments_are_rows_too(dtype):
    features = torch.randn(1, 4, 9).to(dtype)
    odd = [[float("nan")] * 2, [-math.inf, math.inf], [math.inf, math.inf], [1e30, 1e30], [5.0, 2.0], [3.0, 3.0]]
    pooled = boundary_max_pool(features, torch.tensor([odd]), torch.tensor([[9]]))
    assert pooled.isfinite().all()
    assert torch.equal(pooled[0, :, 3], features[0, :, 8])
    assert boundary_max_pool(features, torch.zeros(1, 0, 2), torch.tensor([[9]])).shape == (1, 4, 0)


def test_equal_rows_share_their_gradient_as_one():
    features = torch.ones(1, 2, 30, requires_grad=True)  # as zeros after ReLU
    boundary_max_pool(features, torch.tensor([[[5.0, 25.0]]]), torch.tensor([[30]])).sum().backward()
    assert features.grad.sum() == 2
    assert (features.grad > 0).sum() == 2  # the first row of either window
    assert features.grad[0, 0, 3] == features.grad[0, 1, 20] == 1


def test_places_of_maxima_order_every_float_as_itself():
    values = torch.tensor([-3.5, -0.0, 0.0, 1e-40, -1e-40, 2.5, 2.5, -1e30, 1e30, -math.inf, math.inf])
    for n in range(len(values)):
        rows = values.roll(n)[:, None]
        first = torch.arange(10)[:, None]
        place = places_of_maxima(rows, first, first + 1, longest=2)
        pairs = zip(rows[:-1, 0], rows[1:, 0], rows[place[:, 0], 0], strict=True)
        assert all(found == max(a, b) for a, b, found in pairs)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_places_of_maxima_equal_a_loop(parts):
    generator = torch.Generator().manual_seed(parts)
    rows = torch.randint(-3, 4, (23, 6), generator=generator).float()  # many are equal: the first counts
    first = torch.randint(0, 23, (40, parts), generator=generator)
    last = first + (torch.rand(40, parts, generator=generator) * (23 - first)).long()
    found = places_of_maxima(rows, first, last, longest=int((last - first).max()) + 1)
    for m in range(40):
        for c in range(6):
            part = c // (6 // parts)
            window = rows[first[m, part] : last[m, part] + 1, c].tolist()
            assert found[m, c] == (int(first[m, part]) + window.index(max(window))) * 6 + c


def test_gradient_is_that_of_the_values():
    features, segments, rows = case(3, length=8, count=3)
    assert gradcheck(lambda x: boundary_max_pool(x, segments, rows), features.requires_grad_())


def test_layer_is_the_function_and_odd_channels_are_refused():
    features, segments, rows = case(1)
    layer = BoundaryMaxPooling(inner=0.4, outer=0.3)
    assert torch.equal(layer(features, segments, rows), slow_pool(features, segments, rows, inner=0.4, outer=0.3))
    with pytest.raises(RecipeError, match="3 is odd"):
        boundary_max_pool(features[:, :3], segments, rows)
