"""ETAD: architecture, padding, cascade, losses against loops, scores, sampling, and that it learns."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tad.detect.detectors import build_detector, etad_losses
from tad.detect.detectors.etad import ETAD, all_candidates, boundary_peaks
from tad.detect.detectors.etad_layers import DirectedLSTM, GroupedLinear, settled
from tad.detect.interface import Batch, LevelSpec, Targets
from tad.detect.norms import MaskedGroupNorm
from tad.detect.pooling import soi_align
from tad.detect.samplers import SAMPLERS, sample
from tad.detect.segments import encode_center_length, paired_tiou
from tad.errors import RecipeError, WeightsError
from tad.timeline import TimeAxis

AXIS = TimeAxis(scale_s=0.5, translation_s=0.25, window_s=0.5)  # row i fills [i / 2, (i + 1) / 2) seconds
CHANNELS = {"rgb": 6, "flow": 5}
SMALL = {
    "rows": 64, "width": 16, "lstm_width": 16, "branch_width": 8, "norm_groups": 4, "roi_channels": 8,
    "head_width": 16, "branch_head_width": 8,
}  # fmt: skip


def etad(seed=0, **model):
    torch.manual_seed(seed)
    detector = ETAD(**{"channels": CHANNELS, "classes": 3, **SMALL, **model})
    with torch.no_grad():  # outputs that differ, so that comparing them says something
        for stage in detector.stages:
            for heads in (stage.start, stage.end, stage.extended):
                heads.roi.weight.mul_(5)
                for layer in heads.layers:
                    layer.weight.mul_(3)
        detector.boundary.output.weight.mul_(8)
    return detector.eval()


def batch_of(lengths, truths=None, *, axis=AXIS, padding=0.0, total=None, dtype=torch.float32):
    """Videos of these lengths, padded; a video of one length has the same rows in every batch."""
    total = total or max(lengths)
    features = {key: torch.full((len(lengths), c, total), padding, dtype=dtype) for key, c in CHANNELS.items()}
    mask = torch.zeros(len(lengths), total, dtype=torch.bool)
    for i, length in enumerate(lengths):
        mask[i, :length] = True
        generator = torch.Generator().manual_seed(length)
        for value in features.values():
            value[i, :, :length] = torch.randn(value.shape[1], length, generator=generator, dtype=torch.float64)
    targets = None
    if truths is not None:
        targets = [
            Targets(torch.tensor(s, dtype=torch.float32).reshape(-1, 2), torch.tensor(k, dtype=torch.int64))
            for s, k in truths
        ]
    names = [f"video_{n}" for n in lengths]
    return Batch(names, features, mask, [axis] * len(lengths), [axis.to_seconds(float(n)) for n in lengths], targets)


# ---- architecture (appendix A) -------------------------------------------------------------------------------------
def test_layers_are_those_of_the_paper():
    detector = build_detector("etad", channels={"rgb": 1024, "flow": 1024}, classes=200)
    enhancement = detector.enhancement
    assert enhancement.input.conv.weight.shape == (256, 2048, 3)
    for branch in (enhancement.forwards, enhancement.backwards):
        assert (branch.context.lstm.input_size, branch.context.lstm.hidden_size) == (256, 256)
        assert not branch.context.lstm.bidirectional
        assert branch.conv.conv.weight.shape == (128, 256, 3)
    assert enhancement.backwards.context.backward_in_time
    assert not enhancement.forwards.context.backward_in_time
    assert enhancement.residual.conv.weight.shape == (256, 256, 1)
    assert enhancement.output.conv.weight.shape == (256, 512, 1)
    norms = [m for m in detector.modules() if isinstance(m, MaskedGroupNorm)]
    assert len(norms) == 6
    assert all(norm.groups == 16 for norm in norms)
    assert detector.boundary.hidden.conv.weight.shape == (256, 256, 3)
    assert detector.boundary.output.weight.shape == (2, 256, 1)
    assert len(detector.stages) == 3
    for stage in detector.stages:
        assert stage.reduce.weight.shape == (128, 256)
        assert stage.points == 32
        for heads, groups, points, out in (
            (stage.start, 1, 8, 1),
            (stage.end, 1, 8, 1),
            (stage.extended, 3, 32, 2),
        ):
            assert heads.roi.weight.shape == (groups, points, 128, 512)
            sizes = [tuple(layer.weight.shape) for layer in heads.layers]
            assert sizes == [(groups, 512, 128), (groups, 128, 128), (groups, 128, 128), (groups, 128, out)]
    one = 2 * (1024 * 512 + 512) + 3 * (4096 * 512 + 512) + 5 * (512 * 128 + 2 * 128 * 128 + 3 * 128)
    one += 2 * (128 + 1) + 3 * (2 * 128 + 2) + 256 * 128 + 128
    assert sum(p.numel() for p in detector.stages[0].parameters()) == one
    assert detector.class_agnostic
    assert not detector.reads_proposals
    assert detector.needs == (
        LevelSpec("rgb", layout="rescaled", rows=128),
        LevelSpec("flow", layout="rescaled", rows=128),
    )
    # matrices decay, biases and norms do not: the optimizer goes by the number of dimensions
    for name, parameter in detector.named_parameters():
        assert (parameter.ndim == 1) == ("bias" in name or "norm" in name), name


def test_roi_of_the_public_code():
    stage = etad(roi="code").stages[0]
    assert (stage.points, stage.quarter) == (24, 6)
    assert stage.start.roi.points == 6


def test_a_stage_equals_one_proposal_at_a_time():
    """RoI regions and the columns of Table 6, written out with soi_align and nn.functional alone."""
    detector = etad().double()
    stage = detector.stages[0]
    x, rows = torch.randn(1, 20, 16, dtype=torch.float64), torch.tensor([20])
    proposals = torch.tensor([[3.0, 7.0], [0.0, 20.0], [11.0, 12.0], [2.5, 18.3]], dtype=torch.float64)
    extent = torch.tensor([[0.0, 20.0]], dtype=torch.float64).expand(4, 2)
    found = stage(x, rows, proposals, [4], extent)
    reduced = F.relu(x @ stage.reduce.weight.T + stage.reduce.bias).transpose(1, 2)

    def column(heads, group, segment, points):
        roi = soi_align(reduced, rows, torch.tensor([segment], dtype=torch.float64), torch.tensor([0]), bins=points)
        y = roi[0].T.flatten() @ heads.roi.weight[group].flatten(0, 1)
        y = y + heads.roi.bias.view(heads.roi.groups, -1)[group]
        for layer in heads.layers:
            y = F.relu(y) @ layer.weight[group] + layer.bias.view(layer.groups, -1)[group]
        return y

    for p, (s, e) in enumerate(proposals.tolist()):
        half = 0.5 * (e - s)
        wide = [s - half, e + half]
        offsets = torch.cat((column(stage.start, 0, [s - half, s], 8), column(stage.end, 0, [e, e + half], 8)))
        center, boundary, iou = (column(stage.extended, g, wide, 32) for g in range(3))
        assert torch.allclose(found.boundary_offsets[p], offsets, atol=1e-10)
        assert torch.allclose(found.center_offsets[p], center, atol=1e-10)
        assert torch.allclose(found.boundary_logits[p], boundary, atol=1e-10)
        assert torch.allclose(found.iou_logits[p], iou, atol=1e-10)
        shift, growth = center.tolist()
        middle, length = (s + e) / 2 + (e - s) * shift, (e - s) * math.exp(growth)
        ends = [s + (e - s) * offsets[0].item(), e + (e - s) * offsets[1].item()]
        mean = [0.5 * (ends[0] + middle - length / 2), 0.5 * (ends[1] + middle + length / 2)]
        clipped = [min(max(m, 0.0), 20.0) for m in mean]
        if clipped[1] - clipped[0] >= 0.1:
            assert found.refined[p].tolist() == pytest.approx(clipped, abs=1e-9)
    assert not found.refined.requires_grad


def test_refined_proposals_have_a_length_and_stay_inside():
    segments = torch.tensor([[2.0, 5.0], [5.0, 2.0], [-9.0, -4.0], [8.0, 99.0], [3.0, 3.01]])
    kept = settled(segments, torch.tensor([[0.0, 10.0]]).expand(5, 2))
    expected = [[2.0, 5.0], [3.45, 3.55], [-0.05, 0.05], [8.0, 10.0], [2.955, 3.055]]
    assert torch.allclose(kept, torch.tensor(expected), atol=1e-6)


def test_masked_norm_is_group_norm_of_the_real_rows():
    norm, reference = MaskedGroupNorm(4, 8).double(), nn.GroupNorm(4, 8).double()
    for module in (norm, reference):
        nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
        nn.init.normal_(module.bias, generator=torch.Generator().manual_seed(2))
    x = 5 + torch.randn(3, 8, 10, dtype=torch.float64)
    mask = torch.arange(10) < torch.tensor([[10], [4], [1]])
    found = norm(x, mask[:, None])
    assert torch.allclose(norm(x, None), reference(x), atol=1e-12)
    for i, rows in enumerate((10, 4, 1)):
        assert torch.allclose(found[i, :, :rows], reference(x[i : i + 1, :, :rows])[0], atol=1e-10)


def test_backward_lstm_starts_at_the_last_real_row():
    lstm = DirectedLSTM(3, 4, backward=True)
    x = torch.randn(2, 3, 7)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    y = lstm(x * mask[:, None], mask[:, None])
    for i, rows in enumerate((7, 4)):
        state, expected = None, []
        for t in reversed(range(rows)):
            out, state = lstm.lstm(x[i : i + 1, :, t][:, None], state)
            expected.insert(0, out[0, 0])
        assert torch.allclose(y[i, :, :rows].T, torch.stack(expected), atol=1e-6)
    assert (y[1, :, 4:] == 0).all()


@pytest.mark.parametrize("enhancement", ["lstm", "conv", "transformer"])
def test_how_far_the_enhancements_see(enhancement):
    detector = etad(enhancement=enhancement)
    detector.enhancement.eval()
    x = torch.randn(1, 11, 40, requires_grad=True)
    for block in detector.enhancement.modules():  # statistics of the norm see everything: leave them out
        if isinstance(block, MaskedGroupNorm):
            block.forward = lambda x, mask: x
    detector.enhancement(x, None)[0, :, 20].square().sum().backward()
    seen = torch.nonzero(x.grad[0].abs().sum(0)).squeeze(1)
    assert (len(seen) == 40) == (enhancement != "conv")


# ---- candidates and sampling ---------------------------------------------------------------------------------------
def test_candidates_are_all_pairs_of_row_edges():
    assert len(all_candidates(128, 1, None, device="cpu")) == 8256
    for rows, shortest, longest in [(1, 1, None), (7, 1, None), (7, 3, 5), (4, 9, None), (5, 2, 2)]:
        found = [tuple(pair) for pair in all_candidates(rows, shortest, longest, device="cpu").tolist()]
        low = min(shortest, rows)
        assert found == [
            (s, e) for s in range(rows) for e in range(s + 1, rows + 1) if low <= e - s <= (longest or rows)
        ]


@pytest.mark.parametrize("name", SAMPLERS)
def test_training_evaluates_a_sample_exactly_as_in_full(name):
    """A sampled step is the full one restricted to the sample: same proposals, same outputs."""
    truths = [([[3.0, 9.0], [15.0, 17.0]], [0, 2]), ([], []), ([[0.0, 1.0]], [1])]
    batch = batch_of([30, 22, 1], truths)
    full = etad(boundary_peaks=False)(batch)
    few = etad(sampler=name, ratio=0.1).train()(batch)
    assert [len(o.sample) for o in (full, few)] == [465 + 253 + 1, 46 + 25 + 1]
    where = {
        (i, *pair): n for n, (i, pair) in enumerate(zip(full.sample.tolist(), full.candidates.tolist(), strict=True))
    }
    index = torch.tensor(
        [where[i, *pair] for i, pair in zip(few.sample.tolist(), few.candidates.tolist(), strict=True)]
    )
    assert len(index.unique()) == len(index)
    for a, b in zip(full.stages, few.stages, strict=True):
        for field in ("proposals", "boundary_offsets", "center_offsets", "boundary_logits", "iou_logits", "refined"):
            assert torch.allclose(getattr(a, field)[index], getattr(b, field), atol=2e-4, rtol=1e-3), field


def test_random_samples_follow_torch_s_seed():
    detector, batch = etad(ratio=0.1).train(), batch_of([30])
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(detector(batch).candidates)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_balanced_sampling_needs_the_truth_and_uses_it():
    detector = etad(sampler="iou-balanced", ratio=0.2).train()
    with pytest.raises(ValueError, match="targets"):
        detector(batch_of([30]))
    batch = batch_of([30], [([[5.0, 20.0]], [0])])
    pairs = detector(batch).candidates.float()
    balanced = (paired_tiou(pairs, torch.tensor([5.0, 20.0])) > 0.7).sum().item()
    detector.sampler = "random"
    pairs = detector(batch).candidates.float()
    assert balanced >= 20 > (paired_tiou(pairs, torch.tensor([5.0, 20.0])) > 0.7).sum().item()


def test_detection_takes_the_grid_and_is_the_same_every_time():
    batch = batch_of([30, 12])
    detector = etad(detect_ratio=0.2, boundary_peaks=False)
    with torch.no_grad():
        first, second = detector(batch), detector(batch)
    assert torch.equal(first.candidates, second.candidates)
    edges = all_candidates(30, 1, None, device="cpu")
    kept = sample("grid", count=93, map_index=edges - torch.tensor([0, 1]), fixed=True)
    assert torch.equal(first.candidates[first.sample == 0], edges[kept])
    assert len(first.candidates) == 93 + 15


def test_boundaries_that_are_no_peaks_are_not_evaluated():
    p = torch.tensor([[0.1, 0.3, 0.2, 0.9, 0.5, 0.2, 0.2], [0.9, 0.1, 0.2, 0.1, 0.6, 0.1, 0.9]])
    mask = torch.arange(7) < 6
    found = boundary_peaks(p[None], mask[None])[0]
    assert found[0].tolist() == [True, True, False, True, True, False, False]  # first row; 0.3 and 0.9 peaks; 0.5 high
    assert found[1].tolist() == [True, False, True, False, True, True, False]
    detector, batch = etad(), batch_of([30, 12])
    with torch.no_grad():
        some, everything = detector(batch), etad(boundary_peaks=False)(batch)
    peaks = boundary_peaks(some.boundary.sigmoid(), batch.mask)
    keep = [
        n
        for n, (i, (s, e)) in enumerate(zip(everything.sample.tolist(), everything.candidates.tolist(), strict=True))
        if peaks[i, 0, s] and peaks[i, 1, e - 1]
    ]
    assert 0 < len(keep) < len(everything.sample)
    assert torch.equal(some.candidates, everything.candidates[keep])
    assert torch.allclose(some.stages[2].iou_logits, everything.stages[2].iou_logits[keep], atol=1e-4)


# ---- padding, order ------------------------------------------------------------------------------------------------
MODELS = [
    {},
    {"enhancement": "conv", "score": "code", "roi": "code"},
    {"enhancement": "transformer", "boundary_peaks": False},
    {"detect_ratio": 0.3, "stages": 1, "tiou_thresholds": (0.5,), "layout": "windowed"},
    {"detect_sampler": "dpp", "detect_ratio": 0.1, "longest": 20, "shortest": 2},
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.float64, 1e-10)])
def test_a_video_alone_and_padded_in_a_batch_are_the_same(model, dtype, tolerance):
    detector = etad(**model).to(dtype)
    lengths = [25, 1, 31, 3]
    with torch.no_grad():
        together = batch_of(lengths, dtype=dtype, padding=float("nan"), total=40)
        both = detector(together)
        detections = detector.decode(both, together)
        for i, length in enumerate(lengths):
            single = batch_of([length], dtype=dtype)
            alone = detector(single)
            own = both.sample == i
            assert torch.allclose(alone.boundary[0], both.boundary[i, :, :length], atol=tolerance)
            assert torch.equal(alone.candidates, both.candidates[own])
            for a, b in zip(alone.stages, both.stages, strict=True):
                assert torch.allclose(a.iou_logits, b.iou_logits[own], atol=tolerance, rtol=tolerance)
                assert torch.allclose(a.refined, b.refined[own], atol=10 * tolerance)
            decoded = detector.decode(alone, single)[0]
            assert len(decoded) == len(detections[i]) > 0
            assert torch.allclose(decoded.scores, detections[i].scores, atol=tolerance)


def test_order_in_the_batch_does_not_matter():
    detector, lengths = etad(), [12, 30, 25]
    with torch.no_grad():
        one, other = batch_of(lengths), batch_of(lengths[::-1])
        forwards, backwards = detector.decode(detector(one), one), detector.decode(detector(other), other)[::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert a.video == b.video
        assert torch.allclose(a.scores, b.scores, atol=1e-5)


def test_padding_does_not_change_the_loss():
    truths = [([[3.0, 9.0], [15.0, 17.0]], [0, 2])]
    detector, terms = etad(boundary_peaks=False), []
    for batch in (batch_of([30], truths), batch_of([30], truths, total=64, padding=float("inf"))):
        losses = detector.loss(detector(batch), batch.targets)
        losses.pop("iou_class")  # draws
        terms.append(sum(losses.values()))
    assert torch.allclose(*terms, rtol=1e-4)


# ---- losses against loops ------------------------------------------------------------------------------------------
def slow_balanced(probabilities, labels):
    positives = [-math.log(p) for p, y in zip(probabilities, labels, strict=True) if y]
    negatives = [-math.log(1 - p) for p, y in zip(probabilities, labels, strict=True) if not y]
    n = len(labels)  # Eq. 2 over N
    total = sum(n / (2 * len(positives)) * v for v in positives) if positives else 0.0
    return (total + (sum(n / (2 * len(negatives)) * v for v in negatives) if negatives else 0.0)) / n


def slow_loss(detector, outputs, truths):
    """Eq. 1 to 4 without the drawn term, one row and one proposal at a time."""
    result = dict.fromkeys(("boundary", "proposal_boundary", "iou_l2", "regression"), 0.0)
    for side in (0, 1):
        probabilities, labels = [], []
        for i, mask in enumerate(outputs.mask):
            for t in range(int(mask.sum())):
                probabilities.append(outputs.boundary[i, side, t].sigmoid().item())
                regions = [(g[side] - 1.5, g[side] + 1.5) for g in truths[i]]  # more than half of [t, t + 1] in one
                labels.append(any(min(t + 1, high) - max(t, low) > 0.5 for low, high in regions))
        result["boundary"] += slow_balanced(probabilities, labels)
    assigned = []
    for pair, i in zip(outputs.stages[0].proposals, outputs.sample.tolist(), strict=True):
        tious = [paired_tiou(pair, torch.tensor(g).double()).item() for g in truths[i]]
        assigned.append(truths[i][max(range(len(tious)), key=tious.__getitem__)] if tious else None)
    for stage, threshold in zip(outputs.stages, detector.tiou_thresholds, strict=True):
        for side in (0, 1):
            labels = [
                any(abs(pair[side] - g[side]) < 1.5 for g in truths[i])
                for pair, i in zip(stage.proposals.tolist(), outputs.sample.tolist(), strict=True)
            ]
            result["proposal_boundary"] += slow_balanced(stage.boundary_logits[:, side].sigmoid().tolist(), labels)
        squares, distances = [], []
        for p, (pair, i) in enumerate(zip(stage.proposals, outputs.sample.tolist(), strict=True)):
            best = max([paired_tiou(pair, torch.tensor(g).double()).item() for g in truths[i]], default=0.0)
            squares.append((stage.iou_logits[p, 1].sigmoid().item() - best) ** 2)
            if assigned[p] is None or paired_tiou(pair, torch.tensor(assigned[p]).double()) <= threshold:
                continue
            goal, length = torch.tensor(assigned[p]).double(), pair[1] - pair[0]
            wanted = torch.stack([*((goal - pair) / length), *encode_center_length(goal, pair)])
            given = torch.cat((stage.boundary_offsets[p], stage.center_offsets[p]))
            distances.append(F.smooth_l1_loss(given, wanted, reduction="sum").item())
        result["iou_l2"] += sum(squares) / len(squares)
        result["regression"] += sum(distances) / max(1, len(distances))
    return result


def test_losses_equal_a_loop_over_rows_and_proposals():
    weights = {"boundary_loss_weight": 2.0, "boundary_class_weight": 0.5, "iou_weight": 3.0, "iou_l2_weight": 5.0}
    detector = etad(boundary_peaks=False, tiou_thresholds=(0.3, 0.4, 0.5), **weights).double()
    truths = [[[3.1, 9.4], [14.2, 18.9]], [], [[0.0, 12.0]]]
    batch = batch_of([20, 9, 13], [(t, [0] * len(t)) for t in truths], dtype=torch.float64)
    outputs = detector(batch)
    losses = detector.loss(outputs, batch.targets)
    single = [[[float(torch.tensor(v, dtype=torch.float32)) for v in g] for g in t] for t in truths]
    expected = slow_loss(detector, outputs, single)
    assert min(expected.values()) > 0
    for name, factor in {"boundary": 2, "proposal_boundary": 0.5, "iou_l2": 15, "regression": 10}.items():
        assert losses[name].item() == pytest.approx(factor * expected[name], rel=1e-9), name
    assert any(p.grad is None for p in detector.parameters())
    sum(losses.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in detector.parameters())


def test_balanced_entropy_of_one_sided_labels():
    logits = torch.tensor([0.3, -1.2, 2.0])
    for labels in ([True, False, False], [False] * 3, [True] * 3):
        found = etad_losses.balanced_bce(logits, torch.tensor(labels)).item()
        assert found == pytest.approx(slow_balanced(logits.sigmoid().tolist(), labels), rel=1e-6)


def test_tiou_classification_takes_as_many_negatives_as_positives():
    tiou = torch.tensor([0.95, 0.2, 0.91, 0.9, 0.5, 0.0, 0.3, 0.89])
    logits = torch.zeros(8, requires_grad=True)
    seen = torch.zeros(8)
    for seed in range(40):
        torch.manual_seed(seed)
        logits.grad = None
        loss = etad_losses.iou_class_loss(logits, tiou)
        loss.backward()
        assert loss.item() == pytest.approx(math.log(2))
        used = logits.grad != 0
        assert used[[0, 2]].all()
        assert used.sum() == 4
        seen += used
    assert (seen > 0).all()
    logits.grad = None
    etad_losses.iou_class_loss(logits, torch.zeros(8)).backward()
    assert (logits.grad != 0).sum() == 1


def test_truth_is_assigned_once():
    """A proposal that moves nearer another truth is still regressed to its own, and no more below the threshold."""
    truths = torch.tensor([[[0.0, 10.0], [10.0, 20.0]]]).expand(2, 2, 2)
    initial, moved = torch.tensor([[1.0, 10.0], [9.0, 20.0]]), torch.tensor([[1.0, 11.0], [4.0, 10.5]])
    own = etad_losses.assigned_truth(initial, truths)
    assert own.tolist() == [[0.0, 10.0], [10.0, 20.0]]
    detector, batch = etad(boundary_peaks=False, tiou_thresholds=(0.7, 0.8, 0.8)), batch_of([20])
    outputs = detector(batch)
    outputs.candidates, outputs.sample = initial.long(), torch.tensor([0, 0])
    for stage, pairs in zip(outputs.stages, (initial, moved, moved), strict=True):
        stage.proposals = pairs
        stage.boundary_offsets, stage.center_offsets = torch.zeros(2, 2), torch.zeros(2, 2)
        stage.boundary_logits, stage.iou_logits = torch.zeros(2, 2), torch.zeros(2, 2)
    losses = detector.loss(outputs, [Targets(truths[0], torch.tensor([0, 1]))])

    def distance(pair, goal):
        pair, goal = torch.tensor(pair), torch.tensor(goal)
        wanted = torch.stack([*((goal - pair) / (pair[1] - pair[0])), *encode_center_length(goal, pair)])
        return F.smooth_l1_loss(torch.zeros(4), wanted, reduction="sum").item()

    first = 0.5 * (distance([1.0, 10.0], [0.0, 10.0]) + distance([9.0, 20.0], [10.0, 20.0]))
    second = distance([1.0, 11.0], [0.0, 10.0])  # the other's tIoU with its own truth is low now
    assert losses["regression"].item() == pytest.approx(10 * (first + 2 * second), rel=1e-5)


ODD = {
    "none": ([], []),
    "longer than the sequence": ([[-20.0, 90.0]], [1]),
    "shorter than a row": ([[4.2, 4.4]], [0]),
    "without length": ([[4.0, 4.0]], [0]),
    "beyond the end": ([[300.0, 310.0]], [2]),
    "two labels": ([[2.0, 8.0], [2.0, 8.0]], [0, 1]),
    "many": ([[i * 0.5, i * 0.5 + 3] for i in range(40)], [i % 3 for i in range(40)]),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("length", [1, 25])
def test_odd_truths_give_finite_losses_and_gradients(name, length):
    detector = etad(ratio=0.5).train()
    batch = batch_of([length, 3], [ODD[name], ([], [])])
    losses = detector.loss(detector(batch), batch.targets)
    sum(losses.values()).backward()
    assert set(losses) == {"boundary", "proposal_boundary", "iou_class", "iou_l2", "regression"}
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    if name in ("none", "without length", "beyond the end"):
        assert losses["regression"] == 0


def test_two_labels_on_one_segment_count_once():
    detector = etad(boundary_peaks=False)
    terms = []
    for truths in (([[2.0, 8.0]], [1]), ([[2.0, 8.0], [2.0, 8.0]], [0, 1])):
        batch = batch_of([20], [truths])
        torch.manual_seed(0)
        terms.append({k: v.item() for k, v in detector.loss(detector(batch), batch.targets).items()})
    assert terms[0] == pytest.approx(terms[1], rel=1e-5)


# ---- decoding ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("score", ["paper", "code"])
def test_decoding_equals_a_loop(score):
    detector = etad(score=score, boundary_peaks=False)
    batch = batch_of([18], axis=TimeAxis(scale_s=0.4, translation_s=0.7, window_s=1.4))
    batch.durations_s = [7.345]
    with torch.no_grad():
        outputs = detector(batch)
        found = detector.decode(outputs, batch)[0]
    low, high = outputs.extent[0].tolist()
    start, end = outputs.boundary[0].sigmoid().tolist()
    expected = []
    for p, (s, e) in enumerate(outputs.candidates.tolist()):
        cls, reg = (sum(st.iou_logits[p, k].sigmoid().item() for st in outputs.stages) / 3 for k in (0, 1))
        value = cls * reg * (start[s] * end[e - 1] if score == "paper" else 1.0)
        ends = [sum(st.refined[p, k].item() for st in outputs.stages) / 3 for k in (0, 1)]
        seconds = [min(max((min(max(v, low), high) - 0.5) * 0.4 + 0.7, 0.0), 7.345) for v in ends]
        expected.append((value, *seconds))
    expected = sorted((e for e in expected if e[2] > e[1]), reverse=True)
    assert len(found) == len(expected)
    assert found.scores.tolist() == pytest.approx([e[0] for e in expected], rel=1e-4, abs=1e-9)
    assert sorted(found.segments_s[:, 0].tolist()) == pytest.approx(sorted(e[1] for e in expected), abs=1e-4)
    assert sorted(found.segments_s[:, 1].tolist()) == pytest.approx(sorted(e[2] for e in expected), abs=1e-4)
    assert (found.labels == 0).all()


def test_each_stage_begins_where_the_last_one_ended():
    detector = etad()
    outputs = detector(batch_of([20]))
    assert torch.equal(outputs.stages[0].proposals, outputs.candidates.float())
    assert torch.equal(outputs.stages[1].proposals, outputs.stages[0].refined)
    assert torch.equal(outputs.stages[2].proposals, outputs.stages[1].refined)
    outputs.stages[2].boundary_offsets.sum().backward()
    assert all(p.grad is None for p in detector.stages[0].parameters())  # nothing flows back through proposals


def test_decoding_keeps_the_best():
    detector, batch = etad(max_detections=10), batch_of([20])
    with torch.no_grad():
        outputs = detector(batch)
        found = detector.decode(outputs, batch)[0]
        detector.max_detections = 10**6
        everything = detector.decode(outputs, batch)[0]
    assert len(found) == 10 < len(everything)
    assert torch.equal(found.scores, everything.scores[:10])


@pytest.mark.parametrize("where", ["enhancement.input.conv.weight", "stages.1.reduce.weight", "features"])
def test_decoding_refuses_what_is_not_finite(where):
    detector, batch = etad(), batch_of([20])
    with torch.no_grad():
        if where == "features":
            batch.features["rgb"][0, 0, 3] = float("nan")
        else:
            detector.get_parameter(where)[0, 0] = float("nan")
        with pytest.raises(WeightsError, match="video_20"):
            detector.decode(detector(batch), batch)


# ---- building and learning -----------------------------------------------------------------------------------------
def test_build_detector_checks_names_and_values():
    for options, message in [
        ({"widht": 8}, "Did you mean 'width'"),
        ({"enhancement": "ltsm"}, "Did you mean 'lstm'"),
        ({"roi": "papre"}, "Did you mean 'paper'"),
        ({"score": "both"}, "unknown score"),
        ({"sampler": "gird"}, "Did you mean 'grid'"),
        ({"detect_sampler": "iou-balanced"}, "truth"),
        ({"layout": "full"}, "unknown layout"),
        ({"ratio": 0.0}, "ratio"),
        ({"ratio": 1.5}, "ratio"),
        ({"detect_ratio": 0.0}, "ratio"),
        ({"stages": 2}, "2 stages need as many tiou_thresholds"),
        ({"tiou_thresholds": (0.5, 0.6, 7)}, "tiou_thresholds"),
        ({"width": 40}, "width=40 is not divisible by norm_groups=16"),
        ({"branch_width": 40}, "branch_width=40"),
        ({"rows": 0}, "rows"),
        ({"shortest": 9, "longest": 3}, "at least 9"),
        ({"iou_weight": -1.0}, "iou_weight"),
    ]:
        with pytest.raises(RecipeError, match=message):
            build_detector("etad", channels=CHANNELS, classes=3, **options)
    with pytest.raises(RecipeError, match="stream"):
        build_detector("etad", channels={}, classes=3)


def planted(count, seed, rows=20):
    """Sequences in which an action adds one direction to the noise of its rows."""
    generator = torch.Generator().manual_seed(seed)
    batch = batch_of([rows] * count)
    batch.targets = []
    for i in range(count):
        segments, at = [], 1
        while at + 8 < rows:
            length = int(torch.randint(3, 8, (), generator=generator))
            segments.append([float(at), float(at + length)])
            at += length + int(torch.randint(2, 7, (), generator=generator))
        for key, value in batch.features.items():
            value[i] = 0.5 * torch.randn(value[i].shape, generator=generator)
            for s, e in segments:
                value[i, :3, int(s) : int(e)] += 2.0 if key == "rgb" else -1.0
        batch.targets.append(Targets(torch.tensor(segments), torch.zeros(len(segments), dtype=torch.int64)))
    return batch


def test_it_learns_planted_actions():
    torch.manual_seed(1)
    detector = ETAD(channels=CHANNELS, classes=1, **SMALL, ratio=0.25).train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=5e-3)
    for step in range(80):
        batch = planted(6, step)
        loss = sum(detector.loss(detector(batch), batch.targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    detector.eval()
    batch = planted(10, 9999)
    with torch.no_grad():
        found = detector.decode(detector(batch), batch)
    hits, wanted = 0, 0
    for segments, target in zip(found, batch.targets, strict=True):
        truths = AXIS.to_seconds(target.segments.double())
        kept = []
        for segment in segments.segments_s:  # greedy suppression, as many as there are truths
            if all(paired_tiou(segment, k) < 0.3 for k in kept):
                kept.append(segment)
        for truth in truths:
            wanted += 1
            hits += any(paired_tiou(k, truth) > 0.7 for k in kept[: len(truths)])
    assert hits / wanted > 0.7, f"{hits} of {wanted}"


def test_grouped_linear_is_linear_side_by_side():
    torch.manual_seed(0)
    layer = GroupedLinear(3, 5, 2)
    x = torch.randn(3, 7, 5)
    y = layer(x)
    for g in range(3):
        expected = F.linear(x[g], layer.weight[g].T, layer.bias.view(3, 2)[g])
        assert torch.allclose(y[g], expected, atol=1e-6)


def test_dropout_is_of_training_alone():
    plain, dropping = etad(ratio=1.0), etad(ratio=1.0, dropout=0.5)
    dropping.load_state_dict(plain.state_dict())
    batch = batch_of([9, 7], [([[2.0, 6.0]], [0]), ([[1.0, 5.0]], [1])])
    with torch.no_grad():
        same, other = plain.eval()(batch), dropping.eval()(batch)
        assert torch.equal(same.boundary, other.boundary)
        assert torch.equal(same.stages[2].iou_logits, other.stages[2].iou_logits)
        learning = [dropping.train()(batch) for _ in range(2)]
        assert not torch.allclose(learning[0].boundary, learning[1].boundary)
        assert not torch.allclose(learning[0].stages[0].iou_logits, learning[1].stages[0].iou_logits)
