"""Pooling over segments against loops over bins and rows, with the sequence padded by zeros in the loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F

from tad.detect.pooling import EDGE, RangeMaxima, SlidingMax, SoIAlign, soi_align, soi_max_pool, soi_mean_pool


def row(features, rows, sample, index):
    return features[sample, :, index] if 0 <= index < rows[sample] else torch.zeros_like(features[sample, :, 0])


def bin_edges(segment, bins):
    start, end = segment.tolist()
    return [(start + (end - start) * j / bins, start + (end - start) * (j + 1) / bins) for j in range(bins)]


def slow_max(features, rows, segments, sample, *, bins):
    result = []
    for segment, b in zip(segments, sample.tolist(), strict=True):
        for low, high in bin_edges(segment, bins):
            first = math.floor(low + EDGE)
            stop = max(math.ceil(high - EDGE), first + 1)
            result.append(torch.stack([row(features, rows, b, i) for i in range(first, stop)]).amax(0))
    return torch.stack(result).view(len(segments), bins, -1).transpose(1, 2)


def slow_mean(features, rows, segments, sample, *, bins):
    result = []
    for segment, b in zip(segments, sample.tolist(), strict=True):
        for low, high in bin_edges(segment, bins):
            if high - low < EDGE:
                low, high = 0.5 * (low + high) - 0.5 * EDGE, 0.5 * (low + high) + 0.5 * EDGE
            touched = range(math.floor(low), math.ceil(high) + 1)
            total = sum(max(0.0, min(high, i + 1) - max(low, i)) * row(features, rows, b, i) for i in touched)
            result.append(total / (high - low))
    return torch.stack(result).view(len(segments), bins, -1).transpose(1, 2)


def slow_align(features, rows, segments, sample, *, bins, samples=1):
    result = []
    for segment, b in zip(segments, sample.tolist(), strict=True):
        for low, high in bin_edges(segment, bins):
            points = [low + (high - low) * (k + 0.5) / samples - 0.5 for k in range(samples)]
            values = [
                (1 - (p - math.floor(p))) * row(features, rows, b, math.floor(p))
                + (p - math.floor(p)) * row(features, rows, b, math.floor(p) + 1)
                for p in points
            ]
            result.append(sum(values) / samples)
    return torch.stack(result).view(len(segments), bins, -1).transpose(1, 2)


PAIRS = [(soi_max_pool, slow_max), (soi_mean_pool, slow_mean), (soi_align, slow_align)]


def case(seed, *, samples=3, length=23, count=40, channels=4):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.tensor([length, 1, 7, 12][:samples])
    features = torch.randn(samples, channels, length, generator=generator, dtype=torch.float64)
    start = torch.rand(count, generator=generator).double() * 40 - 10
    segments = torch.stack((start, start + 25 * torch.rand(count, generator=generator).double() ** 2), 1)
    return features, rows, segments, torch.arange(count) % samples


@pytest.mark.parametrize(("fast", "slow"), PAIRS)
@pytest.mark.parametrize("bins", [1, 7, 16])
def test_pooling_equals_the_slow_loop(fast, slow, bins):
    args = case(bins)
    assert torch.allclose(fast(*args, bins=bins), slow(*args, bins=bins), atol=1e-9)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(-20, 60), st.integers(0, 60)), min_size=1, max_size=5),
    st.integers(1, 20),
    st.integers(1, 5),
)
def test_pooling_equals_the_slow_loop_on_edges(segments, length, bins):
    # quarters of rows: bin edges fall on row edges, segments have no length, or lie outside altogether
    segments = torch.tensor([(start / 4, (start + extent) / 4) for start, extent in segments], dtype=torch.float64)
    features = torch.randn(1, 2, length + 3, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    sample = torch.zeros(len(segments), dtype=torch.int64)
    for fast, slow in PAIRS:
        args = (features, torch.tensor([length]), segments, sample)
        assert torch.allclose(fast(*args, bins=bins), slow(*args, bins=bins), atol=1e-9)


@pytest.mark.parametrize(("fast", "slow"), PAIRS)
def test_pooling_gradients_equal_those_of_the_slow_loop(fast, slow):
    features, rows, segments, sample = case(5)
    weight = torch.randn(len(segments), features.shape[1], 7, dtype=torch.float64)
    grads = []
    for pool in (fast, slow):
        leaf = features.clone().requires_grad_()
        (pool(leaf, rows, segments, sample, bins=7) * weight).sum().backward()
        grads.append(leaf.grad)
    assert torch.allclose(*grads, atol=1e-9)
    assert grads[0].abs().sum() > 0


@pytest.mark.parametrize("pool", [soi_mean_pool, soi_align])
def test_gradients_reach_the_segments(pool):
    features = torch.randn(2, 3, 9, dtype=torch.float64)
    segments = torch.tensor([[1.3, 6.2], [0.71, 2.33], [4.4, 8.7]], dtype=torch.float64, requires_grad=True)
    sample = torch.tensor([0, 1, 1])
    assert gradcheck(lambda s: pool(features, torch.tensor([9, 9]), s, sample, bins=3), segments)


@pytest.mark.parametrize(("pool", "_"), PAIRS)
def test_padding_is_not_read(pool, _):
    features, rows, segments, sample = case(6)
    padded = torch.full((3, 4, 50), float("nan"), dtype=torch.float64)
    for i, n in enumerate(rows.tolist()):
        padded[i, :, :n] = features[i, :, :n]
    alone = pool(features, rows, segments, sample, bins=7)
    assert torch.allclose(pool(padded, rows, segments, sample, bins=7), alone, atol=1e-9)


@pytest.mark.parametrize(("pool", "_"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_segments_no_rows_and_types(pool, _, dtype):
    features = torch.randn(2, 3, 5, dtype=dtype)
    none = pool(features, torch.tensor([5, 5]), torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), bins=7)
    assert none.shape == (0, 3, 7)
    rows, segments = torch.tensor([5, 0]), torch.tensor([[0.0, 5.0], [-2.0, 3.0]])
    pooled = pool(features, rows, segments, torch.tensor([0, 1]), bins=5)
    assert pooled.dtype == dtype
    assert torch.allclose(pooled[0], features[0], atol=1e-6)  # five bins over five rows are the rows
    assert (pooled[1] == 0).all()  # a sample without any row


def test_bins_of_whole_rows_do_not_touch_their_neighbours():
    # 0.3 + 7 * 0.1 is not 1.0 in floating point; a bin edge a hair past a row must not take that row in
    features = torch.arange(30.0).view(1, 1, 30)
    segments = torch.tensor([[3.0 - 1e-6, 10.0 + 1e-6], [0.1 * 3 * 10, 10.0]])
    pooled = soi_max_pool(features, torch.tensor([30]), segments, torch.tensor([0, 0]), bins=7)
    assert pooled[:, 0].tolist() == [[3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]] * 2


def test_align_averages_its_samples():
    features, rows, segments, sample = case(8)
    module = SoIAlign(bins=4, samples=3)
    slow = slow_align(features, rows, segments, sample, bins=4, samples=3)
    assert torch.allclose(module(features, rows, segments, sample), slow, atol=1e-9)


@pytest.mark.parametrize("length", [1, 2, 8, 13, 64])
def test_range_maxima_of_every_range(length):
    rows = torch.randn(2, length, 3)
    maxima = RangeMaxima(rows, longest=length)
    ranges = [(b, i, j) for b in range(2) for i in range(length) for j in range(i + 1, length + 1)]
    sample, first, stop = torch.tensor(ranges).T
    expected = torch.stack([rows[b, i:j].amax(0) for b, i, j in ranges])
    assert torch.equal(maxima(sample, first, stop), expected)


@pytest.mark.parametrize("length", [1, 3, 20])
@pytest.mark.parametrize("longest", [1, 2, 5, 8, 23])
def test_sliding_max_is_max_pooling(length, longest):
    x = torch.rand(2, 3, length, requires_grad=True)
    sliding = SlidingMax(x, longest=longest)
    for kernel in range(1, longest + 1):
        expected = F.max_pool1d(F.pad(x, ((kernel - 1) // 2, kernel // 2)), kernel, stride=1)
        assert torch.equal(sliding(kernel), expected)
        ours, theirs = (
            torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (sliding(kernel), expected)
        )
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("pool", "_"), PAIRS)
def test_cuda_gives_what_the_cpu_gives(pool, _):
    args = case(9)
    assert torch.allclose(pool(*(a.cuda() for a in args), bins=7).cpu(), pool(*args, bins=7), atol=1e-9)
