"""Matching and set prediction loss of SP-TAD against brute force and loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tad.detect.detectors.sptad_losses import WORST, focal_loss, hungarian, matching_cost, set_loss

WEIGHTS = (2.0, 5.0, 2.0)
FOCAL = {"alpha": 0.25, "gamma": 2.0}


def slow_focal(logit: float, positive: bool, *, alpha: float = 0.25, gamma: float = 2.0) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -alpha * (1 - p) ** gamma * math.log(p) if positive else -(1 - alpha) * p**gamma * math.log(1 - p)


def slow_giou(a: list[float], b: list[float]) -> float:
    inter = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    union = a[1] - a[0] + b[1] - b[0] - inter
    hull = max(a[1], b[1]) - min(a[0], b[0])
    return inter / union - (hull - union) / hull


def random_parts(*shape: int, classes: int = 4, truths: int = 3, seed: int = 0):
    torch.manual_seed(seed)
    ends = torch.rand(*shape, 2, dtype=torch.float64).sort(-1).values
    wanted = torch.rand(truths, 2, dtype=torch.float64).sort(-1).values
    return torch.randn(*shape, classes, dtype=torch.float64), ends, wanted, torch.randint(classes, (truths,))


def test_focal_loss_is_its_formula() -> None:
    logits = torch.tensor([-3.0, -0.5, 0.0, 2.0, 5.0], dtype=torch.float64)
    for gamma in (0.0, 0.5, 2.0):
        for positive in (True, False):
            found = focal_loss(logits, torch.full_like(logits, float(positive)), alpha=0.25, gamma=gamma)
            expected = [slow_focal(x, positive, gamma=gamma) for x in logits.tolist()]
            assert found.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_loss_has_a_gradient_where_it_is_certain(gamma: float) -> None:
    logits = torch.tensor([-200.0, -40.0, 0.0, 40.0, 200.0], requires_grad=True)
    for goal in (0.0, 1.0):
        loss = focal_loss(logits, torch.full_like(logits, goal), alpha=0.25, gamma=gamma)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()


def test_cost_against_a_loop() -> None:
    logits, segments, wanted, labels = random_parts(2, 5)
    found = matching_cost(logits, segments, wanted, labels, weights=WEIGHTS, **FOCAL)
    assert found.shape == (2, 5, 3)
    for h, n, g in itertools.product(range(2), range(5), range(3)):
        logit = logits[h, n, labels[g]].item()
        a, b = segments[h, n].tolist(), wanted[g].tolist()
        expected = 2 * (slow_focal(logit, True) - slow_focal(logit, False))
        expected += 5 * (abs(a[0] - b[0]) + abs(a[1] - b[1])) - 2 * slow_giou(a, b)
        assert found[h, n, g].item() == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_matching_is_the_cheapest_of_all(proposals: int, truths: int, seed: int) -> None:
    cost = torch.randn(proposals, truths, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    proposal, truth = hungarian(cost)
    size = min(proposals, truths)
    assert len(proposal) == len(truth) == size
    assert len(set(proposal.tolist())) == len(set(truth.tolist())) == size
    if truths <= proposals:
        options = (sum(cost[n, g] for g, n in enumerate(p)) for p in itertools.permutations(range(proposals), truths))
    else:
        options = (sum(cost[n, g] for n, g in enumerate(p)) for p in itertools.permutations(range(truths), proposals))
    assert cost[proposal, truth].sum().item() == pytest.approx(min(float(option) for option in options), abs=1e-12)


def test_every_head_is_matched_for_itself_and_odd_costs_count_as_worst() -> None:
    cost = torch.tensor([[[0.0, 5.0], [1.0, 9.0]], [[5.0, 0.0], [9.0, 1.0]]])
    proposal, truth = hungarian(cost)
    pairs = [set(zip(p.tolist(), t.tolist(), strict=True)) for p, t in zip(proposal, truth, strict=True)]
    assert pairs[0] == {(0, 1), (1, 0)}  # 5 + 1 < 0 + 9
    assert pairs[1] == {(0, 0), (1, 1)}
    proposal, truth = hungarian(torch.tensor([[math.nan], [math.inf], [3.0]]))
    assert (proposal.tolist(), truth.tolist()) == ([2], [0])
    assert WORST > 1e6


def test_set_loss_against_brute_force() -> None:
    logits, segments, _, _ = random_parts(2, 3, 4)
    truths = []
    for seed, count in ((1, 3), (2, 0), (3, 2)):
        _, _, wanted, labels = random_parts(1, truths=max(count, 1), seed=seed)
        truths.append((wanted[:count], labels[:count]))
    named, l1, giou = set_loss(logits, segments, truths, cost_weights=WEIGHTS, **FOCAL)
    for h in range(2):
        positive, distance, apart = set(), 0.0, 0.0
        for b, (wanted, labels) in enumerate(truths):
            cost = matching_cost(logits[h, b], segments[h, b], wanted, labels, weights=WEIGHTS, **FOCAL)
            best = min(
                itertools.permutations(range(4), len(labels)),
                key=lambda p, cost=cost: sum(cost[n, g].item() for g, n in enumerate(p)),
            )
            for g, n in enumerate(best):
                positive.add((b, n, labels[g].item()))
                a, t = segments[h, b, n].tolist(), wanted[g].tolist()
                distance += abs(a[0] - t[0]) + abs(a[1] - t[1])
                apart += 1 - slow_giou(a, t)
        entropy = sum(
            slow_focal(logits[h, b, n, k].item(), (b, n, k) in positive)
            for b, n, k in itertools.product(range(3), range(4), range(4))
        )
        assert named[h].item() == pytest.approx(entropy / 5, rel=1e-9)
        assert l1[h].item() == pytest.approx(distance / 5, rel=1e-9)
        assert giou[h].item() == pytest.approx(apart / 5, rel=1e-9)


def test_without_truth_only_naming_is_learnt() -> None:
    logits, segments, wanted, labels = random_parts(2, 3, 4)
    logits.requires_grad_()
    nothing = [(wanted[:0], labels[:0])] * 3
    named, l1, giou = set_loss(logits, segments, nothing, cost_weights=WEIGHTS, **FOCAL)
    assert l1.tolist() == giou.tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(named.sum(), logits)
    assert (gradient > 0).all()  # every probability is pushed down


def test_more_truths_than_proposals_and_two_classes_on_one_segment() -> None:
    logits, segments, _, _ = random_parts(1, 1, 3)
    wanted = torch.tensor([[0.1, 0.3]] * 5, dtype=torch.float64)
    l1 = set_loss(logits, segments, [(wanted, torch.tensor([0, 1, 2, 3, 0]))], cost_weights=WEIGHTS, **FOCAL)[1]
    expected = (segments[0, 0] - wanted[0]).abs().sum() / 3  # all three proposals have a truth
    torch.testing.assert_close(l1[0], expected)
    logits.requires_grad_()
    both = [(wanted[:2], torch.tensor([0, 2]))]
    named, _, _ = set_loss(logits, segments, both, cost_weights=WEIGHTS, **FOCAL)
    (gradient,) = torch.autograd.grad(named.sum(), logits)
    up = torch.nonzero(gradient[0, 0] < 0)
    assert sorted(up[:, 1].tolist()) == [0, 2]
    assert len(set(up[:, 0].tolist())) == 2  # one proposal each


def test_loss_that_is_not_a_number_is_not_hidden() -> None:
    logits, segments, wanted, labels = random_parts(1, 1, 4)
    segments[0, 0, :, 1] = math.nan
    terms = set_loss(logits, segments, [(wanted, labels)], cost_weights=WEIGHTS, **FOCAL)
    assert terms[1].isnan().all()
