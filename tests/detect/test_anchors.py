"""Anchors: which are positive, which truth is whose, and the choice of scales; sampling of examples."""

import numpy as np
import pytest
import torch

from tad.detect.anchors import anchor_scales_for, best_truth, make_anchors, match_anchors
from tad.detect.sampling import balanced_sample
from tad.detect.segments import segment_tiou
from tad.errors import RecipeError


def test_anchors_are_centred_on_rows():
    anchors = make_anchors(4, torch.tensor([1.0, 3.0]))
    assert anchors.shape == (4, 2, 2)
    assert anchors[0].tolist() == [[0.0, 1.0], [-1.0, 2.0]]
    assert anchors[3].tolist() == [[3.0, 4.0], [2.0, 5.0]]


def matched(truths, rows=40, scales=(2.0, 4.0, 8.0)):
    anchors = make_anchors(rows, torch.tensor(scales)).flatten(0, 1)
    truths = torch.tensor(truths).reshape(-1, 2)
    return anchors, match_anchors(anchors, truths, segment_tiou(anchors, truths), above=0.7, below=0.3)


def test_thresholds_decide():
    anchors, (positive, negative, truth) = matched([[10.0, 14.5]])
    tiou = segment_tiou(anchors, torch.tensor([[10.0, 14.5]]))[:, 0]
    assert torch.equal(negative, tiou < 0.3)
    assert torch.equal(positive, tiou > 0.7)
    assert positive.any()
    assert ((tiou >= 0.3) & (tiou <= 0.7)).any()  # neither
    assert (truth == 0).all()


@pytest.mark.parametrize("segment", [[20.1, 20.4], [3.0, 6.0], [-4.0, 1.5], [0.0, 40.0], [-30.0, 80.0], [5.3, 16.9]])
def test_every_truth_has_a_positive_anchor(segment):
    anchors, (positive, negative, truth) = matched([segment, [30.0, 34.0]])
    own = positive & (truth == 0)
    tiou = segment_tiou(anchors, torch.tensor([segment]))[:, 0]
    assert own.any()
    assert tiou[own].max() == tiou.max()
    assert not (positive & negative).any()


def test_a_truth_longer_than_all_anchors_takes_the_one_in_its_middle():
    anchors, (positive, _, _) = matched([[0.0, 40.0]])
    chosen = anchors[positive]
    assert chosen.tolist() == [[15.5, 23.5], [16.5, 24.5]]  # both as near to the middle, 20


def test_equal_anchors_on_either_side_are_both_positive():
    anchors, (positive, _, _) = matched([[10.0, 12.0]])
    assert anchors[positive].tolist() == [[9.5, 11.5], [10.5, 12.5]]


def test_a_truth_beyond_the_sequence_takes_nothing():
    _, (positive, negative, _) = matched([[100.0, 110.0]])
    assert not positive.any()
    assert negative.all()


def test_no_truth_at_all():
    _, (positive, negative, truth) = matched([])
    assert not positive.any()
    assert negative.all()
    assert (truth == 0).all()


def test_a_forced_anchor_belongs_to_the_truth_that_forces_it():
    # the short truth's best anchor overlaps the long one more, yet is the short one's only chance
    anchors, (positive, _, truth) = matched([[9.0, 17.0], [13.4, 13.6]])
    short = positive & (truth == 1)
    assert anchors[short].tolist() == [[12.5, 14.5]]
    assert (positive & (truth == 0)).any()


def test_labels_on_one_segment_are_drawn_in_equal_shares():
    torch.manual_seed(0)
    tiou = torch.tensor([[0.8, 0.1, 0.8]]).expand(2000, 3)
    best, truth = best_truth(tiou, draw=True)
    shares = torch.bincount(truth, minlength=3) / 2000
    assert torch.allclose(best, torch.tensor(0.8))
    assert shares.tolist() == pytest.approx([0.5, 0.0, 0.5], abs=0.05)


# ---- scales ------------------------------------------------------------------------------------------------------
def covered(lengths, scales, overlap):
    ratio = lengths[:, None] / np.asarray(scales)
    return (np.minimum(ratio, 1 / ratio).max(1) >= overlap).mean()


@pytest.mark.parametrize("overlap", [0.6, 0.7, 0.85])
@pytest.mark.parametrize("spread", [(3, 120), (1, 6), (20, 22)])
def test_scales_cover_the_lengths_and_are_few(overlap, spread):
    lengths = np.exp(np.random.default_rng(0).uniform(*np.log(spread), 500))
    scales = anchor_scales_for(lengths, overlap=overlap)
    assert covered(lengths, scales, overlap) >= 0.98
    assert list(scales) == sorted(set(scales))
    assert min(scales) >= 1
    # neighbours in a perfect series differ by overlap**-2; rounding may cost one or two more
    assert len(scales) <= np.log(spread[1] / spread[0]) / np.log(overlap**-2) + 3


def test_rare_lengths_do_not_stretch_the_scales():
    lengths = np.concatenate([np.linspace(4, 30, 995), [4000.0] * 5])
    assert max(anchor_scales_for(lengths)) < 60


def test_scales_on_demand_and_of_tiny_actions():
    assert len(anchor_scales_for(np.array([3.0, 100.0]), 9)) == 9
    assert anchor_scales_for(np.array([5.0])) == (5.0,)
    assert anchor_scales_for(np.array([0.05, 0.2, 0.4])) == (1.0,)
    assert anchor_scales_for(np.array([5.0, np.nan, np.inf, -3.0, 0.0])) == (5.0,)


def test_scales_of_nothing_are_refused():
    with pytest.raises(RecipeError, match="anchor_scales"):
        anchor_scales_for(np.array([]))
    with pytest.raises(RecipeError, match="overlap"):
        anchor_scales_for(np.array([3.0]), overlap=1.5)


# ---- sampling ----------------------------------------------------------------------------------------------------
def test_samples_keep_their_shares():
    positive = torch.zeros(4, 500, dtype=torch.bool)
    negative = torch.zeros(4, 500, dtype=torch.bool)
    positive[0, :200] = positive[1, :10] = positive[3, :300] = True
    negative[0, 300:] = negative[1, 100:] = negative[2, 50:80] = True
    chosen_positive, chosen_negative = balanced_sample(positive, negative, count=64, positive_share=0.25)
    assert chosen_positive.sum(1).tolist() == [16, 10, 0, 16]
    assert chosen_negative.sum(1).tolist() == [48, 54, 30, 0]
    assert not (chosen_positive & ~positive).any()
    assert not (chosen_negative & ~negative).any()


def test_samples_are_uniform_and_repeatable():
    positive = torch.arange(40)[None] < 20
    counts = torch.zeros(40)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        chosen = balanced_sample(positive, ~positive, count=10, positive_share=0.5, generator=generator)
        counts += (chosen[0] | chosen[1])[0]
    assert torch.allclose(counts / 2000, torch.tensor(0.25), atol=0.05)
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        draws.append(balanced_sample(positive, ~positive, count=10, positive_share=0.5)[0])
    assert torch.equal(*draws)


def test_a_sample_drawn_again_stays():
    torch.manual_seed(0)
    positive = torch.rand(1, 300) > 0.9
    first = balanced_sample(positive, ~positive, count=64, positive_share=0.25)
    kept = (first[0] | first[1])[0]
    again = balanced_sample(positive[:, kept], ~positive[:, kept], count=64, positive_share=0.25)
    assert (again[0] | again[1]).all()


def test_sampling_of_nothing():
    none = torch.zeros(2, 0, dtype=torch.bool)
    assert balanced_sample(none, none, count=8, positive_share=0.5)[0].shape == (2, 0)
