"""tad.detect.segments against plain arithmetic, its inverses and its own gradients."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from tad.detect.segments import (
    MAX_LENGTH_RATIO,
    center_length,
    clip_segments,
    decode_boundaries,
    decode_center_length,
    encode_boundaries,
    encode_center_length,
    expand_segments,
    from_center_length,
    generalised_tiou,
    paired_generalised_tiou,
    paired_tiou,
    segment_tiou,
)

TIMES = st.floats(-1e4, 1e4, allow_nan=False, width=32)
SEGMENT = st.tuples(TIMES, TIMES).map(sorted).map(tuple)
SEGMENTS = st.lists(SEGMENT, min_size=0, max_size=6)


def slow_tiou(a, b):
    inter = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    union = (a[1] - a[0]) + (b[1] - b[0]) - inter
    return inter / union if union > 0 else 0.0


def slow_generalised(a, b):
    hull = max(a[1], b[1]) - min(a[0], b[0])
    if hull == 0:
        return 0.0
    inter = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    union = (a[1] - a[0]) + (b[1] - b[0]) - inter
    return (inter / union if union > 0 else 0.0) - (hull - union) / hull


def tensor(segments):
    return torch.tensor(segments, dtype=torch.float64).reshape(-1, 2)


@given(SEGMENTS, SEGMENTS)
def test_tiou_of_all_pairs_equals_plain_arithmetic(a, b):
    tiou, generalised = segment_tiou(tensor(a), tensor(b)), generalised_tiou(tensor(a), tensor(b))
    assert tiou.shape == generalised.shape == (len(a), len(b))
    for i, one in enumerate(a):
        for j, other in enumerate(b):
            assert tiou[i, j].item() == pytest.approx(slow_tiou(one, other), abs=1e-12)
            assert generalised[i, j].item() == pytest.approx(slow_generalised(one, other), abs=1e-9)


@given(SEGMENT, SEGMENT, st.floats(-100, 100), st.floats(0.01, 100))
def test_tiou_knows_neither_origin_nor_unit(a, b, shift, scale):
    assume(min(a[1] - a[0], b[1] - b[0]) > 1e-6)  # shorter ones are lost beside the shift
    a, b = tensor([a]), tensor([b])
    assert torch.allclose(paired_tiou(a, b), paired_tiou(b, a))
    assert torch.allclose(paired_tiou(scale * a + shift, scale * b + shift), paired_tiou(a, b), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("a", "b", "tiou", "generalised"),
    [
        ((0, 4), (0, 4), 1.0, 1.0),
        ((0, 4), (2, 6), 1 / 3, 1 / 3),
        ((0, 4), (1, 2), 0.25, 0.25),
        ((0, 2), (2, 4), 0.0, 0.0),
        ((0, 1), (3, 4), 0.0, -0.5),
        ((2, 2), (2, 2), 0.0, 0.0),
        ((2, 2), (0, 4), 0.0, 0.0),
        ((1, 1), (3, 3), 0.0, -1.0),
        ((5, 3), (0, 10), 0.0, -0.2),
    ],
)
def test_tiou_of_odd_pairs_and_finite_gradients(a, b, tiou, generalised, dtype):
    for function, expected in ((paired_tiou, tiou), (paired_generalised_tiou, generalised)):
        x, y = (torch.tensor(s, dtype=dtype, requires_grad=True) for s in (a, b))
        value = function(x, y)
        assert value.dtype == dtype
        assert value.item() == pytest.approx(expected)
        value.backward()
        assert torch.isfinite(x.grad).all()
        assert torch.isfinite(y.grad).all()


@pytest.mark.parametrize("function", [segment_tiou, generalised_tiou])
def test_tiou_gradients_are_right(function):
    a = torch.tensor([[0.0, 4.0], [1.0, 2.5], [7.0, 9.0]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[0.5, 3.0], [8.0, 12.0]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(function, (a, b))


def test_tiou_broadcasts_over_leading_dimensions():
    a, b = torch.rand(3, 5, 2).cumsum(-1), torch.rand(3, 4, 2).cumsum(-1)
    both = segment_tiou(a, b)
    assert both.shape == (3, 5, 4)
    for i in range(3):
        assert torch.equal(both[i], segment_tiou(a[i], b[i]))


def test_generalised_tiou_pulls_a_distant_segment_nearer():
    distant = torch.tensor([10.0, 12.0], requires_grad=True)
    paired_generalised_tiou(distant, torch.tensor([0.0, 2.0])).backward()
    assert distant.grad[0] < 0  # moving the start to the left helps; plain tIoU has no gradient here


LENGTH = st.floats(0.1, 50)
WEIGHTS = st.sampled_from([(1.0, 1.0), (10.0, 5.0), (5.0, 5.0)])


@given(st.floats(-500, 500), LENGTH, st.floats(-500, 500), LENGTH, WEIGHTS)
def test_decoding_inverts_encoding(center, length, anchor_center, anchor_length, weights):
    segment = from_center_length(torch.tensor([center]).double(), torch.tensor([length]).double())
    anchor = from_center_length(torch.tensor([anchor_center]).double(), torch.tensor([anchor_length]).double())
    again = decode_boundaries(encode_boundaries(segment, anchor, weights=weights), anchor, weights=weights)
    assert torch.allclose(again, segment, atol=1e-8)
    if 1 / MAX_LENGTH_RATIO < length / anchor_length < MAX_LENGTH_RATIO:
        offsets = encode_center_length(segment, anchor, weights=weights)
        assert torch.allclose(decode_center_length(offsets, anchor, weights=weights), segment, atol=1e-8)


def test_offsets_are_those_of_the_papers():
    segment, anchor = torch.tensor([[10.0, 16.0]]), torch.tensor([[8.0, 12.0]])
    expected = torch.tensor([[10 * (13 - 10) / 4, 5 * math.log(6 / 4)]])
    assert torch.allclose(encode_center_length(segment, anchor, weights=(10.0, 5.0)), expected)
    assert torch.allclose(encode_boundaries(segment, anchor), torch.tensor([[2 / 4, 4 / 4]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_huge_offsets_decode_to_finite_segments(dtype):
    offsets = torch.tensor([[0.0, 6e4], [0.0, -6e4], [0.0, 0.0]]).to(dtype)
    segments = decode_center_length(offsets, torch.tensor([[0.0, 2.0]]), weights=(10.0, 5.0))
    assert segments.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    lengths = center_length(segments)[1]
    assert torch.allclose(lengths.double(), torch.tensor([125.0, 2 / 62.5, 2.0]).double(), rtol=1e-4)


def test_an_action_without_length_has_finite_offsets():
    offsets = encode_center_length(torch.tensor([[3.0, 3.0]]), torch.tensor([[0.0, 4.0]]))
    assert torch.isfinite(offsets).all()


def test_offsets_are_differentiable():
    segments = torch.tensor([[10.0, 16.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    anchors = torch.tensor([[8.0, 12.0], [2.0, 5.0]], dtype=torch.float64, requires_grad=True)
    for function in (encode_center_length, decode_center_length, encode_boundaries, decode_boundaries):
        assert gradcheck(function, (0.1 * segments, anchors))


def test_clipping_and_expanding():
    segments = torch.tensor([[-3.0, 5.0], [8.0, 14.0]])
    assert clip_segments(segments, 0.0, 10.0).tolist() == [[0.0, 5.0], [8.0, 10.0]]
    limits = torch.tensor([[2.0], [20.0]])
    assert clip_segments(segments[None], 0.0, limits[:, None]).tolist() == [
        [[0.0, 2.0], [2.0, 2.0]],
        [[0.0, 5.0], [8.0, 14.0]],
    ]
    assert expand_segments(segments, 0.5).tolist() == [[-7.0, 9.0], [5.0, 17.0]]
