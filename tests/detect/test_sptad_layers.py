"""The parts of SP-TAD against slow references: pyramid, choice of level, SoI align, sparse interaction, one head."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tad.detect.detectors.sptad_layers import (
    DetectionHead,
    PyramidTable,
    SparseInteraction,
    TemporalPyramid,
    doubled,
    halved_mask,
    halved_max,
    level_of,
)


def masks_of(lengths: list[int], levels: int, *, total: int | None = None) -> list[Tensor]:
    """Masks of a pyramid: on each level half the rows of the one before, rounded up."""
    found, total = [], total or max(lengths)
    for _ in range(levels):
        found.append(torch.arange(total) < torch.tensor(lengths)[:, None])
        lengths, total = [-(-n // 2) for n in lengths], -(-total // 2)
    return found


def maps_like(masks: list[Tensor], channels: int, *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(len(m), channels, m.shape[1], generator=generator, dtype=torch.float64) * m[:, None] for m in masks
    ]


# ---- pyramid (section 3.1.2) -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("lengths", [[13, 6], [1, 1], [16, 3]])
def test_pyramid_against_loops(lengths: list[int]) -> None:
    torch.manual_seed(0)
    pyramid = TemporalPyramid(channels=[5, 6, 7], width=4, levels=4, kernel=1, further="max").double()
    nn.init.normal_(pyramid.lateral[0].bias)
    masks = masks_of(lengths, 3)
    maps = [maps_like([m], c)[0] for m, c in zip(masks, [5, 6, 7], strict=True)]
    found, found_masks = pyramid(maps, masks)
    assert len(found) == len(found_masks) == 4
    for b, length in enumerate(lengths):
        counts = [-(-length // 2**k) for k in range(4)]
        rows = [
            [conv.weight[:, :, 0] @ x[b, :, j] + conv.bias for j in range(n)]
            for conv, x, n in zip(pyramid.lateral, maps, counts, strict=False)
        ]
        rows[1] = [row + rows[2][j // 2] for j, row in enumerate(rows[1])]
        rows[0] = [row + rows[1][j // 2] for j, row in enumerate(rows[0])]
        pairs = [rows[2][2 * j : 2 * j + 2] for j in range(counts[3])]
        rows.append([torch.stack(pair).amax(0) for pair in pairs])
        for x, mask, expected in zip(found, found_masks, rows, strict=True):
            assert mask[b].sum() == len(expected)
            torch.testing.assert_close(x[b, :, : len(expected)], torch.stack(expected, 1))
            assert (x[b, :, len(expected) :] == 0).all()


def test_further_levels_by_convolution_look_at_both_rows_and_their_neighbours() -> None:
    torch.manual_seed(0)
    pyramid = TemporalPyramid(channels=[3], width=64, levels=2, kernel=1, further="conv")
    x = torch.randn(1, 3, 13, requires_grad=True)
    found, masks = pyramid([x], masks_of([13], 1))
    assert [m.shape[2] for m in found] == [13, 7]
    assert masks[1].all()
    for j, seen in ((3, [5, 6, 7, 8]), (0, [0, 1, 2]), (6, [11, 12])):
        (gradient,) = torch.autograd.grad(found[1][0, :, j].sum(), x, retain_graph=True)
        assert torch.nonzero(gradient[0].abs().sum(0)).squeeze(1).tolist() == seen


@pytest.mark.parametrize("further", ["max", "conv"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_padding_does_not_reach_the_pyramid(further, kernel: int) -> None:
    torch.manual_seed(0)
    pyramid = TemporalPyramid(channels=[3, 3], width=4, levels=5, kernel=kernel, further=further).double()
    for conv in [*pyramid.lateral, *pyramid.down]:
        nn.init.normal_(conv.bias)
    alone, padded = masks_of([7], 2), masks_of([7], 2, total=22)
    maps = maps_like(alone, 3)
    wide = [F.pad(x, (0, m.shape[1] - x.shape[2])) for x, m in zip(maps, padded, strict=True)]
    for a, b in zip(pyramid(maps, alone)[0], pyramid(wide, padded)[0], strict=True):
        torch.testing.assert_close(a, b[..., : a.shape[2]])
        assert (b[..., a.shape[2] :] == 0).all()


def test_rows_doubled_and_halved() -> None:
    x = torch.tensor([[[-3.0, -1.0, -2.0, 5.0, 9.0]]])
    mask = torch.tensor([[True, True, True, False, False]])
    assert doubled(x[..., :2], 3).tolist() == [[[-3, -3, -1]]]
    assert doubled(x[..., :2], 5).tolist() == [[[-3, -3, -1, -1, 0]]]
    assert halved_mask(mask).tolist() == [[True, True, False]]
    assert halved_max(x, mask).tolist() == [[[-1, -2, 0]]]  # what is not real is no maximum, even of negative rows


# ---- choice of the level (Eq. 1) -------------------------------------------------------------------------------------
def test_level_by_hand() -> None:
    lengths = torch.tensor([128.0, 127.9, 64.0, 63.9, 32.0, 31.9, 16.0, 15.9, 1.0, 0.0, 128.1, 255.9, 256.0, 1e9])
    assert level_of(lengths, clip=128, levels=4).tolist() == [3, 2, 2, 1, 1, 0, 0, 0, 0, 0, 3, 3, 3, 3]
    assert level_of(torch.tensor([100.0, 50.0, 25.0]), clip=100, levels=2).tolist() == [1, 0, 0]
    assert level_of(torch.tensor([3.0, 700.0]), clip=128, levels=1).tolist() == [0, 0]
    assert 0 <= level_of(torch.tensor([math.nan]), clip=128, levels=4).item() <= 3


@given(st.floats(0.01, 1000), st.integers(8, 512), st.integers(1, 6))
def test_level_is_the_formula(length: float, clip: int, levels: int) -> None:
    expected = min(max(math.floor(levels - 1 + math.log2(length / clip)), 0), levels - 1)
    assert level_of(torch.tensor(length, dtype=torch.float64), clip=clip, levels=levels).item() == expected


# ---- SoI align -------------------------------------------------------------------------------------------------------
def slow_align(x: Tensor, count: int, segment: list[float], level: int, points: int) -> Tensor:
    """Row by row: x (C, T) of one level, its first ``count`` rows real; zeros outside."""
    start, end = (edge / 2**level for edge in segment)
    found = []
    for p in range(points):
        at = start + (end - start) * (p + 0.5) / points - 0.5
        low = math.floor(at)
        value = torch.zeros(len(x), dtype=x.dtype)
        for row, share in ((low, 1 - (at - low)), (low + 1, at - low)):
            if 0 <= row < count:
                value = value + share * x[:, row]
        found.append(value)
    return torch.stack(found)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_soi_align_against_interpolation_point_by_point(data) -> None:
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    points, levels = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    masks = masks_of(lengths, levels, total=max(lengths) + data.draw(st.integers(0, 3)))
    maps = maps_like(masks, 3, seed=data.draw(st.integers(0, 99)))
    edges = st.floats(-30, 60)
    segments = [[sorted(data.draw(st.tuples(edges, edges))) for _ in range(4)] for _ in lengths]
    level = [[data.draw(st.integers(0, levels - 1)) for _ in range(4)] for _ in lengths]
    table = PyramidTable(maps, masks)
    found = table.align(torch.tensor(segments, dtype=torch.float64), torch.tensor(level), points=points)
    assert found.shape == (len(lengths), 4, points, 3)
    for b, n in [(b, n) for b in range(len(lengths)) for n in range(4)]:
        k = level[b][n]
        expected = slow_align(maps[k][b], int(masks[k][b].sum()), segments[b][n], k, points)
        torch.testing.assert_close(found[b, n], expected)


def test_what_lies_behind_a_sample_is_not_read() -> None:
    masks = masks_of([5, 12], 2)
    maps = [x.masked_fill(~m[:, None], 1e6) for x, m in zip(maps_like(masks, 3), masks, strict=True)]
    clean = [x.masked_fill(~m[:, None], 0.0) for x, m in zip(maps, masks, strict=True)]
    segments = torch.tensor([[[2.0, 11.0], [4.0, 30.0]], [[2.0, 11.0], [-4.0, 30.0]]], dtype=torch.float64)
    level = torch.tensor([[0, 1], [0, 1]])
    found = PyramidTable(maps, masks).align(segments, level, points=8)
    torch.testing.assert_close(found, PyramidTable(clean, masks).align(segments, level, points=8))
    assert (found[0, :, -1] == 0).all()


def test_linear_rows_are_read_exactly_and_gradients_go_to_rows_alone() -> None:
    masks = masks_of([32], 3)
    maps = [torch.arange(m.shape[1], dtype=torch.float64)[None, None].clone().requires_grad_() for m in masks]
    segments = torch.tensor([[[8.0, 24.0], [4.0, 12.0]]], dtype=torch.float64, requires_grad=True)
    level = torch.tensor([[2, 1]])
    found = PyramidTable(maps, masks).align(segments, level, points=4)
    assert found[0, 0, :, 0].tolist() == [2.0, 3.0, 4.0, 5.0]  # rows 2 to 5 of level 2 fill edges 8 to 24
    assert found[0, 1, :, 0].tolist() == [2.0, 3.0, 4.0, 5.0]
    found[0, 0].sum().backward()
    assert segments.grad is None
    assert maps[2].grad is not None
    assert maps[2].grad[0, 0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def test_wild_segments_have_an_index() -> None:
    masks = masks_of([9, 4], 2)
    segments = torch.tensor([[[math.nan, 3.0], [-1e30, 1e30]], [[math.inf, math.inf], [1e12, 1e12]]])
    found = PyramidTable([x.float() for x in maps_like(masks, 3)], masks).align(
        segments, torch.ones(2, 2, dtype=torch.int64), points=3
    )
    assert found.shape == (2, 2, 3, 3)
    assert (found[1, 1] == 0).all()


# ---- sparse interaction (Fig. 3) -------------------------------------------------------------------------------------
def test_interaction_against_a_loop_over_proposals() -> None:
    torch.manual_seed(0)
    module = SparseInteraction(width=6, hidden=4, points=3).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    features, soi = torch.randn(2, 5, 6).double(), torch.randn(2, 5, 3, 6).double()
    found = module(features, soi)

    def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
        return (x - x.mean()) / (x.var(unbiased=False) + layer.eps).sqrt() * layer.weight + layer.bias

    for b, n in [(b, n) for b in range(2) for n in range(5)]:
        first = (module.first.weight @ features[b, n] + module.first.bias).reshape(6, 4)
        second = (module.second.weight @ features[b, n] + module.second.bias).reshape(4, 6)
        rows = []
        for row in soi[b, n]:
            hidden = norm(row @ first, module.norms[0]).clamp(min=0)
            rows.append(norm(hidden @ second, module.norms[1]).clamp(min=0))
        out = module.out.weight @ torch.cat(rows) + module.out.bias
        torch.testing.assert_close(found[b, n], norm(out, module.out_norm).clamp(min=0))


# ---- one head --------------------------------------------------------------------------------------------------------
def head_of(**changes) -> DetectionHead:
    torch.manual_seed(0)
    options = {"width": 16, "hidden": 8, "points": 16, "eta": 5.0, "classes": 3, "attention_heads": 4}
    return DetectionHead(**{**options, "feedforward": 32, "dropout": 0.0, **changes}).eval()


def test_a_segment_sees_itself_and_a_fifth_more_on_its_own_level() -> None:
    head = head_of()
    masks = masks_of([128], 4)
    maps = [torch.randn(1, 16, m.shape[1], requires_grad=True) for m in masks]
    for segment, level in (([40.0, 55.0], 0), ([20.0, 60.0], 1), ([30.0, 94.0], 2), ([0.0, 128.0], 3)):
        features, _, _ = head(
            torch.randn(1, 1, 16), torch.tensor([[segment]]), PyramidTable(maps, masks), clip=128, levels=4
        )
        gradients = torch.autograd.grad(features.square().sum(), maps, allow_unused=True)
        touched = [torch.nonzero(g[0].abs().sum(0)).squeeze(1) for g in gradients if g is not None]
        assert [k for k, rows in enumerate(touched) if len(rows)] == [level]
        length = segment[1] - segment[0]
        low, high = (segment[0] - length / 5) / 2**level, (segment[1] + length / 5) / 2**level
        step = (high - low) / 16
        count = masks[level].sum().item()
        assert touched[level].min() == max(0, math.floor(low + step / 2 - 0.5))
        assert touched[level].max() == min(count - 1, math.floor(high - step / 2 - 0.5) + 1)


def test_a_head_that_has_learnt_nothing_leaves_segments_alone() -> None:
    head, masks = head_of(), masks_of([20, 9], 2)
    table = PyramidTable([x.float() for x in maps_like(masks, 16)], masks)
    segments = torch.tensor([[3.0, 7.0], [0.0, 20.0], [5.0, 5.5]]).expand(2, 3, 2)
    _, refined, logits = head(torch.randn(2, 3, 16), segments, table, clip=20, levels=2)
    torch.testing.assert_close(refined, segments)
    assert logits.shape == (2, 3, 3)
    assert head.logits.bias.sigmoid().tolist() == pytest.approx([0.01] * 3)


def test_proposals_of_a_sample_know_of_each_other_and_of_no_other_sample() -> None:
    head, masks = head_of(), masks_of([20, 20], 2)
    table = PyramidTable([x.float() for x in maps_like(masks, 16)], masks)
    features = torch.randn(2, 3, 16, requires_grad=True)
    segments = torch.tensor([[3.0, 7.0], [0.0, 20.0], [5.0, 9.0]]).expand(2, 3, 2)
    x, _, _ = head(features, segments, table, clip=20, levels=2)
    (gradient,) = torch.autograd.grad(x[0, 0].square().sum(), features)
    assert (gradient[0].abs().sum(1) > 0).all()
    assert (gradient[1] == 0).all()
