"""BMN: padding, targets, losses against loops, decoding, and that it learns."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tad.annotations import read_truth
from tad.detect import detect, train_detector
from tad.detect.boundary_matching import proposal_grid
from tad.detect.detectors import bmn_layers, build_detector
from tad.detect.detectors.bmn import BMN
from tad.detect.detectors.bmn_layers import balanced_cross_entropy, balanced_l2, boundary_targets
from tad.detect.interface import Batch, DenseDetector, LevelSpec, Targets
from tad.detect.lgte import LGTE
from tad.detect.postprocess import suppress
from tad.detect.segments import paired_tiou, segment_tiou
from tad.errors import RecipeError, WeightsError
from tad.evaluate import average_recall
from tad.recipe import PostprocessRecipe
from tad.timeline import TimeAxis
from tests.detect.toydetector import make_world, toy_recipe

AXIS = TimeAxis(scale_s=0.5, translation_s=0.25, window_s=0.5)  # row i fills [i / 2, (i + 1) / 2) seconds
CHANNELS = {"rgb": 5, "flow": 3}
SMALL = {
    "groups": 2,
    "width": 16,
    "tem_width": 8,
    "matching_channels": 8,
    "hidden": 12,
    "pem_width": 8,
    "samples": 6,
    "rows": 24,
}


def bmn(seed=0, **model):
    torch.manual_seed(seed)
    detector = BMN(**{"channels": CHANNELS, "classes": 3, **SMALL, **model})
    with torch.no_grad():  # outputs that differ, so that comparing them says something
        for name, parameter in detector.named_parameters():
            if "logit" in name:
                parameter.add_(torch.randn_like(parameter))
    return detector.eval()


def batch_of(lengths, truths=None, *, axis=AXIS, padding=0.0, total=None, dtype=torch.float32, channels=None):
    """Videos of these lengths, padded; a video of n rows is the same in every batch."""
    total = total or max(lengths)
    features = {
        key: torch.full((len(lengths), c, total), padding, dtype=dtype) for key, c in (channels or CHANNELS).items()
    }
    mask = torch.zeros(len(lengths), total, dtype=torch.bool)
    for i, length in enumerate(lengths):
        mask[i, :length] = True
        generator = torch.Generator().manual_seed(length)
        for value in features.values():
            rows = torch.randn(value.shape[1], length, generator=generator, dtype=torch.float64)
            value[i, :, :length] = rows.to(dtype)
    targets = None
    if truths is not None:
        targets = [
            Targets(torch.tensor(s, dtype=torch.float32).reshape(-1, 2), torch.tensor(k, dtype=torch.int64))
            for s, k in truths
        ]
    names = [f"video_{n}" for n in lengths]
    return Batch(names, features, mask, [axis] * len(lengths), [axis.to_seconds(float(n)) for n in lengths], targets)


# ---- padding, order, types -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", [{}, {"lgte": 1}, {"lgte": 2, "durations": 5, "score": "product"}, {"margin": 2.0}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_video_alone_and_padded_in_a_batch_are_the_same(model, dtype, tolerance):
    detector = bmn(**model).to(dtype)
    lengths = [14, 1, 20, 3]
    with torch.no_grad():
        together = batch_of(lengths, dtype=dtype, padding=float("nan"), total=24)
        both = detector(together)
        maps, detections = detector.dense(both, together), detector.decode(both, together)
        for i, length in enumerate(lengths):
            single = batch_of([length], dtype=dtype)
            alone = detector(single)
            own = detector.dense(alone, single)[0]
            longest = min(length, model.get("durations", 24))
            assert {name: tuple(value.shape) for name, value in own.items()} == {
                "iou_class": (longest, length),
                "iou_regression": (longest, length),
                "start": (length,),
                "end": (length,),
            }
            for name, value in own.items():
                assert value.dtype == torch.float32
                assert torch.allclose(value, maps[i][name], atol=max(tolerance, 1e-7))
            decoded = detector.decode(alone, single)[0]
            assert torch.allclose(decoded.scores, detections[i].scores, atol=max(tolerance, 1e-7))
            if dtype == torch.float64:  # there, no two are so close that they change places
                assert torch.equal(decoded.segments_s, detections[i].segments_s)


def test_rows_reach_as_far_as_they_should():
    detector = bmn().double()
    batch = batch_of([24], dtype=torch.float64)
    batch.features["rgb"].requires_grad_(True)
    outputs = detector(batch)
    (gradient,) = torch.autograd.grad(outputs.iou_class[0, 1, 9], batch.features["rgb"])  # the proposal [9, 11]
    touched = torch.nonzero(gradient[0].abs().sum(0)).squeeze(1).tolist()
    # Two 3x3 convolutions see proposals of 1 to 4 rows that start at 7 to 11: from [7, 11] to [11, 15]. With margins
    # these are 5 to 17, which lie between the centres of rows 4 and 17; three convolutions of rows add 3 at both ends.
    assert touched == list(range(1, 21))


@pytest.mark.parametrize(("durations", "rows"), [(1, 1), (5, 9), (9, 9), (13, 40), (17, 17)])
def test_convolution_in_bands_is_one_of_the_whole_map(durations, rows, monkeypatch):
    monkeypatch.setattr(bmn_layers, "BAND_DURATIONS", 4)
    torch.manual_seed(0)
    conv = bmn_layers.MapConv(3, 3, 3, padding=1).double()
    count = torch.tensor([rows, max(1, rows - 2)])
    end = torch.arange(rows) + torch.arange(1, durations + 1)[:, None]
    kept = (end <= count[:, None, None]).double()  # (B, D, T)
    y = (torch.randn(2, 3, durations, rows, dtype=torch.float64) * kept[:, None]).requires_grad_(True)
    found = conv(y, kept)
    wanted = F.relu(F.conv2d(y, conv.weight, conv.bias, padding=1)) * kept[:, None]
    assert torch.allclose(found, wanted, atol=1e-12)
    direction = torch.randn_like(wanted)
    inputs = (y, conv.weight, conv.bias)
    for a, b in zip(
        torch.autograd.grad((found * direction).sum(), inputs),
        torch.autograd.grad((wanted * direction).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-12)


def test_order_in_the_batch_does_not_matter():
    detector = bmn(lgte=2)
    lengths = [12, 24, 17]
    with torch.no_grad():
        one, other = batch_of(lengths), batch_of(lengths[::-1])
        forwards, backwards = detector.decode(detector(one), one), detector.decode(detector(other), other)[::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert a.video == b.video
        assert torch.allclose(a.scores, b.scores, atol=1e-6)


def test_padding_does_not_change_the_loss_nor_what_is_drawn_for_it():
    truths = [([[3.0, 9.0], [12.0, 19.0]], [0, 2]), ([[0.0, 4.0]], [1])]
    detector = bmn().double()
    terms = []
    for batch in (
        batch_of([20, 14], truths, dtype=torch.float64),
        batch_of([20, 14], truths, dtype=torch.float64, total=24, padding=float("inf")),
    ):
        torch.manual_seed(7)
        terms.append(detector.loss(detector(batch), batch.targets))
    for name, value in terms[0].items():
        assert value.item() == pytest.approx(terms[1][name].item(), rel=1e-10)
        assert value > 0


def test_the_same_seed_gives_the_same_step():
    batch = batch_of([20, 14], [([[3.0, 9.0]], [1]), ([[2.0, 4.0], [2.0, 4.0]], [0, 2])])
    gradients = []
    for _ in range(2):
        detector = bmn(lgte=2, lgte_dropout=0.3).train()
        torch.manual_seed(5)
        sum(detector.loss(detector(batch), batch.targets).values()).backward()
        gradients.append([p.grad for p in detector.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_half_precision():
    detector = bmn(lgte=2).train()
    batch = batch_of([20, 14], [([[3.0, 9.0]], [1]), ([[2.0, 4.0]], [2])])
    full = detector.eval()(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = detector(batch)
        losses = detector.loss(half, batch.targets)
    assert half.iou_class.dtype == torch.bfloat16
    assert torch.allclose(full.iou_class, half.iou_class.float(), atol=0.1)
    assert all(value.dtype == torch.float32 for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())


# ---- targets and losses against loops --------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.lists(st.floats(-3, 15, width=32), max_size=4),
    st.sampled_from([0.0, 1.0, 3.0, 4.5]),
)
def test_boundary_targets_equal_a_loop(rows, boundaries, region):
    found = boundary_targets(torch.tensor(boundaries, dtype=torch.float64), rows, region_rows=region)
    for i in range(rows):
        shares = [max(0.0, min(i + 1, b + region / 2) - max(i, b - region / 2)) for b in boundaries]
        assert found[i].item() == pytest.approx(max(shares, default=0.0), abs=1e-12)


def test_boundary_between_two_rows_marks_both():
    found = boundary_targets(torch.tensor([5.0]), 10, region_rows=3.0)
    assert found.tolist() == [0, 0, 0, 0.5, 1, 1, 0.5, 0, 0, 0]


def cross_entropy(logits, labels):
    """The weighted logistic loss as the paper writes it: α+ b log p + α- (1 - b) log(1 - p), a mean over all."""
    positives = sum(labels)
    parts = []
    for logit, label in zip(logits, labels, strict=True):
        p = 1 / (1 + math.exp(-logit))
        weight = 0.5 * len(labels) / (positives if label else len(labels) - positives)
        parts.append(-weight * math.log(p if label else 1 - p))
    return sum(parts) / len(parts)


def slow_losses(detector, outputs, truths, lengths):
    """The four terms, unweighted, proposal by proposal; of middling and bad ones the first so many are taken."""
    starts, ends, estimates = [], [], []
    for b, (segments, length) in enumerate(zip(truths, lengths, strict=True)):
        segments = [(max(0.0, s), min(float(length), e)) for s, e in segments]
        segments = [(s, e) for s, e in segments if e > s]
        for i in range(length):
            for k, (kept, logits) in enumerate(((starts, outputs.start), (ends, outputs.end))):
                shares = [min(i + 1, g[k] + 1.5) - max(i, g[k] - 1.5) for g in segments]
                kept.append((logits[b, i].item(), max(shares, default=0.0) > 0.5))
        for d, i in itertools.product(range(length), range(length)):
            if i + d + 1 <= length and d < outputs.iou_class.shape[1]:
                ious = [paired_tiou(torch.tensor([i, i + d + 1.0]), torch.tensor(g)).item() for g in segments]
                maps = outputs.iou_class[b, d, i].item(), outputs.iou_regression[b, d, i].item()
                estimates.append((*maps, max(ious, default=0.0)))
    good = [e for e in estimates if e[2] > 0.7]
    middling = [e for e in estimates if 0.3 < e[2] <= 0.7][: len(good)]
    lowest = 0.0 if detector.low_includes_zero else 1e-9
    bad = [e for e in estimates if lowest <= e[2] <= 0.3][: len(good)]
    chosen = good + middling + bad
    return {
        "start": cross_entropy(*zip(*starts, strict=True)),
        "end": cross_entropy(*zip(*ends, strict=True)),
        "iou_regression": 0.5 * sum((1 / (1 + math.exp(-r)) - g) ** 2 for _, r, g in chosen) / len(chosen),
        "iou_class": cross_entropy([c for c, _, _ in estimates], [g > 0.9 for _, _, g in estimates]),
    }


@pytest.mark.parametrize("model", [{}, {"low_includes_zero": True}, {"durations": 9}])
def test_losses_equal_a_loop_over_proposals(model, monkeypatch):
    monkeypatch.setattr(torch, "randperm", torch.arange)
    detector = bmn(temporal_weight=1.5, regression_weight=7.0, classification_weight=2.0, **model).double()
    truths, lengths = [[(3.1, 9.2), (11.7, 30.0)], [(-2.0, 6.8)], []], [20, 13, 6]
    batch = batch_of(lengths, [(t, [0] * len(t)) for t in truths], dtype=torch.float64)
    with torch.no_grad():
        outputs = detector(batch)
        found = detector.loss(outputs, batch.targets)
    weights = {"start": 1.5, "end": 1.5, "iou_regression": 7.0, "iou_class": 2.0}
    expected = {k: weights[k] * v for k, v in slow_losses(detector, outputs, truths, lengths).items()}
    assert {k: v.item() for k, v in found.items()} == pytest.approx(expected, rel=1e-6)


def test_balanced_l2_draws_as_many_as_are_good():
    tiou = torch.cat([torch.full((3,), 0.8), torch.full((50,), 0.5), torch.full((50,), 0.2), torch.zeros(50)])
    estimate = tiou.clone().requires_grad_(True)
    seen = torch.zeros_like(tiou)
    for seed in range(40):
        torch.manual_seed(seed)
        loss = balanced_l2(estimate + 1, tiou, high=0.7, low=0.3, low_includes_zero=False)
        assert loss.item() == pytest.approx(0.5)
        (gradient,) = torch.autograd.grad(loss, estimate)
        counts = [int((part != 0).sum()) for part in gradient.split([3, 50, 50, 50])]
        assert counts == [3, 3, 3, 0]
        seen += gradient != 0
    assert int((seen[3:103] > 0).sum()) > 80  # any may be drawn: 120 draws from 50 leave 9 % of them out
    loss = balanced_l2(estimate + 1, tiou, high=0.9, low=0.3, low_includes_zero=True)  # none is good
    assert int((torch.autograd.grad(loss, estimate)[0] != 0).sum()) == 2


def test_balanced_cross_entropy_of_one_kind_and_of_large_logits():
    logits = torch.tensor([2.0, -1.0], dtype=torch.float64)
    none = balanced_cross_entropy(logits, torch.tensor([False, False]))
    assert none.item() == pytest.approx(0.25 * (math.log1p(math.exp(2)) + math.log1p(math.exp(-1))))
    assert balanced_cross_entropy(-logits, torch.tensor([True, True])).item() == pytest.approx(none.item())
    assert balanced_cross_entropy(torch.tensor([500.0, -500.0]), torch.tensor([False, True])).item() == 500.0
    assert balanced_cross_entropy(logits[:0], torch.zeros(0, dtype=torch.bool)).item() == 0.0


def test_classes_make_no_difference():
    detector = bmn()
    terms = []
    for truth in (([[2.0, 8.0]], [2]), ([[2.0, 8.0], [2.0, 8.0]], [0, 1])):
        batch = batch_of([20], [truth])
        torch.manual_seed(1)
        terms.append(detector.loss(detector(batch), batch.targets))
    assert terms[0] == terms[1]


ODD = {
    "none": ([], []),
    "longer than the sequence": ([[-20.0, 90.0]], [1]),
    "shorter than a row": ([[4.2, 4.4]], [0]),
    "without length": ([[4.0, 4.0]], [0]),
    "beyond the end": ([[300.0, 310.0]], [2]),
    "across the start": ([[-3.0, 4.0]], [2]),
    "many": ([[i * 0.5, i * 0.5 + 3] for i in range(40)], [i % 3 for i in range(40)]),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("length", [1, 22])
def test_odd_truths_give_finite_losses_and_gradients(name, length):
    detector = bmn(lgte=1).train()
    batch = batch_of([length], [ODD[name]])
    losses = detector.loss(detector(batch), batch.targets)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    if name in ("none", "without length", "beyond the end"):
        assert losses["iou_regression"] == 0
    elif name == "longer than the sequence":  # it is learnt as far as it is seen
        assert losses["iou_regression"] > 0


# ---- decoding --------------------------------------------------------------------------------------------------------
def maps_with(cells, *, rows=10, start=(), end=()):
    """Maps that are 0 but for these: (start, end) row edges → (by class, by regression)."""
    maps = {"iou_class": torch.zeros(rows, rows), "iou_regression": torch.zeros(rows, rows)}
    for (first, last), (by_class, by_regression) in cells.items():
        maps["iou_class"][last - first - 1, first] = by_class
        maps["iou_regression"][last - first - 1, first] = by_regression
    for name, values in (("start", start), ("end", end)):
        maps[name] = torch.full((rows,), 0.01)
        for row, value in dict(values).items():
            maps[name][row] = value
    return maps


def test_hand_made_maps_in_seconds():
    axis = TimeAxis(scale_s=0.4, translation_s=1.2, window_s=1.0)  # the left edge of row 0 is at 1 s
    maps = maps_with({(2, 5): (0.5, 0.8), (0, 10): (0.9, 0.9), (9, 10): (0.2, 1.0)}, end={4: 0.7}, start={2: 0.6})
    found = bmn(pem_power=2.0).decode_dense(maps, video="v", axis=axis, duration_s=4.9)
    assert len(found) == 55
    assert found.scores[:4].tolist() == pytest.approx([0.729, 0.2, 0.04, 0.0])
    assert found.segments_s[:3].tolist() == [
        pytest.approx([1.0, 4.9]),  # row edge 10 is at 5.0 s, behind the video's end
        pytest.approx([1.8, 3.0]),
        pytest.approx([4.6, 4.9]),
    ]
    assert found.labels.tolist() == [0] * 55
    assert found.video == "v"
    assert found.duration_s == 4.9
    assert {name: value[1].item() for name, value in found.extra.items()} == pytest.approx(
        {"start": 0.6, "end": 0.7, "iou_class": 0.5, "iou_regression": 0.8}
    )


def test_default_score_is_of_the_proposal_evaluation_alone():
    found = bmn().decode_dense(maps_with({(2, 5): (0.5, 0.8)}), video="v", axis=AXIS, duration_s=5.0)
    assert found.scores[0].item() == pytest.approx(0.5**1.2 * 0.8)


def test_proposals_that_last_nothing_inside_the_video_are_left_out():
    found = bmn().decode_dense(maps_with({}), video="v", axis=AXIS, duration_s=3.0)  # six of ten rows
    assert len(found) == 55 - 10  # those from row 6 on
    assert found.segments_s.max() == 3.0


def test_the_best_are_kept():
    detector, batch = bmn(max_detections=7), batch_of([20])
    with torch.no_grad():
        outputs = detector(batch)
        few = detector.decode(outputs, batch)[0]
        detector.max_detections = 10**6
        everything = detector.decode(outputs, batch)[0]
    assert len(everything) == 210
    assert (everything.scores.diff() <= 0).all()
    assert torch.equal(few.scores, everything.scores[:7])
    assert torch.equal(few.extra["iou_class"], everything.extra["iou_class"][:7])


@pytest.mark.parametrize("rows", [1, 2, 3, 24])
def test_product_score_equals_a_loop(rows):
    detector, batch = bmn(score="product", durations=11), batch_of([rows])
    with torch.no_grad():
        outputs = detector(batch)
        found = detector.decode(outputs, batch)[0]
    start, end = (logits[0].sigmoid().tolist() for logits in (outputs.start, outputs.end))

    def peaks(p):
        inner = {i for i in range(1, rows - 1) if p[i] > p[i - 1] and p[i] > p[i + 1]}
        return inner | {i for i in range(rows) if p[i] > 0.5 * max(p)}

    starts, ends = peaks(start) | {0}, peaks(end) | {rows - 1}
    expected = []
    for s, e in itertools.product(sorted(starts), sorted(ends)):
        if s <= e and e - s < 11:
            pair = outputs.iou_class[0, e - s, s].sigmoid() * outputs.iou_regression[0, e - s, s].sigmoid()
            expected.append((start[s] * end[e] * pair.item(), s / 2, (e + 1) / 2))
    expected.sort(reverse=True)
    assert found.scores.tolist() == pytest.approx([e[0] for e in expected], abs=1e-6)
    assert sorted(found.segments_s.tolist()) == sorted([list(e[1:]) for e in expected])


def test_decoding_refuses_what_is_not_finite():
    detector = bmn()
    with torch.no_grad():
        detector.base[0].weight[0, 0] = float("nan")
        batch = batch_of([20])
        with pytest.raises(WeightsError, match="video_20"):
            detector.decode(detector(batch), batch)


def test_decode_is_decode_dense_of_dense():
    detector, batch = bmn(), batch_of([20, 9])
    assert isinstance(detector, DenseDetector)
    assert BMN.class_agnostic
    with torch.no_grad():
        outputs = detector(batch)
        for found, maps, i in zip(detector.decode(outputs, batch), detector.dense(outputs, batch), (0, 1), strict=True):
            options = {"video": batch.videos[i], "axis": batch.axes[i], "duration_s": batch.durations_s[i]}
            again = detector.decode_dense(maps, **options)
            assert torch.equal(found.scores, again.scores)
            assert torch.equal(found.segments_s, again.segments_s)
            grid = proposal_grid(len(maps["start"]))
            assert len(found) == len(grid)
            tail = torch.arange(len(maps["start"])) + torch.arange(1, len(maps["start"]) + 1)[:, None]
            assert (maps["iou_class"][tail > len(maps["start"])] == 0).all()


# ---- switches --------------------------------------------------------------------------------------------------------
def test_what_is_read_and_built():
    assert bmn().needs == (LevelSpec("rgb", layout="rescaled", rows=24), LevelSpec("flow", layout="rescaled", rows=24))
    assert bmn(layout="windowed").needs[0].layout == "windowed"
    for count in (0, 1, 2):
        kinds = [isinstance(e, LGTE) for e in bmn(lgte=count).encoders]
        assert kinds == [count == 2, count >= 1]
    default = BMN(channels={"a": 8}, classes=1)
    assert default.needs[0].rows == default.durations == 100
    assert tuple(default.proposal.matching.weight.shape) == (32, 512, 128)
    assert isinstance(build_detector("bmn", channels=CHANNELS, classes=3, **SMALL), BMN)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"groups": 3}, "groups=3"),
        ({"channels": {"a": 7}}, "7 channels"),
        ({"channels": {}}, "stream"),
        ({"layout": "full"}, "layout"),
        ({"score": "iou"}, "score"),
        ({"lgte": 3}, "lgte"),
        ({"rows": 0}, "rows"),
        ({"durations": 0}, "durations"),
        ({"samples": 1}, "samples"),
        ({"low_tiou": 0.8}, "low_tiou"),
        ({"regression_weight": -1.0}, "regression_weight"),
        ({"margin": float("inf")}, "margin"),
        ({"width": 20, "lgte": 1}, "heads"),
    ],
)
def test_wrong_values(wrong, message):
    with pytest.raises(RecipeError, match=message):
        bmn(**wrong)


# ---- learning --------------------------------------------------------------------------------------------------------
def planted(videos, rows=16, channels=8, seed=0):
    """Sequences with one or two actions, whose rows point another way than the noise."""
    generator = torch.Generator().manual_seed(seed)
    look = torch.randn(channels, generator=torch.Generator().manual_seed(99))
    features = 0.3 * torch.randn(videos, channels, rows, generator=generator)
    targets = []
    for x in features:
        segments, at = [], int(torch.randint(0, 4, (), generator=generator))
        while at + 3 <= rows:
            end = min(rows, at + int(torch.randint(3, 8, (), generator=generator)))
            segments.append([float(at), float(end)])
            x[:, at:end] += look[:, None]
            at = end + int(torch.randint(2, 6, (), generator=generator))
        targets.append(Targets(torch.tensor(segments), torch.zeros(len(segments), dtype=torch.int64)))
    mask = torch.ones(videos, rows, dtype=torch.bool)
    axis = TimeAxis.rescaled(rows=rows, duration_s=8.0)
    return Batch([f"v{i}" for i in range(videos)], {"a": features}, mask, [axis] * videos, [8.0] * videos, targets)


@pytest.mark.parametrize("score", ["pem", "product"])
def test_it_learns(score):
    torch.manual_seed(0)
    model = {**SMALL, "rows": 16, "width": 32, "pem_width": 32, "hidden": 64, "matching_channels": 16, "tem_width": 32}
    detector = BMN(channels={"a": 8}, classes=1, score=score, **model)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=4e-3)
    for step in range(60):
        batch = planted(32, seed=step)
        loss = sum(detector.loss(detector(batch), batch.targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    detector.eval()
    batch = planted(20, seed=1000)
    recipe = PostprocessRecipe(method="soft_nms", sigma=0.4)
    hits, total = 0, 0
    for found, target in zip(detector.decode(detector(batch), batch), batch.targets, strict=True):
        kept = suppress(found, recipe).segments_s[:4]
        truth = AXIS.to_seconds(target.segments)
        hits += int((segment_tiou(truth, kept.float()).amax(1) > 0.7).sum())
        total += len(truth)
    assert hits / total > 0.9  # at most three actions in a video, four proposals


@pytest.mark.parametrize("layout", [{"layout": "rescaled", "rows": 48}, {"layout": "windowed", "rows": 32}])
def test_it_trains_and_detects_through_the_pipeline(layout, tmp_path):
    torch.set_num_threads(1)
    store, annotations = make_world(tmp_path)
    model = {**SMALL, "width": 32, "pem_width": 16, "hidden": 32, "matching_channels": 16, "lgte": 1, **layout}
    recipe = toy_recipe(
        detector="bmn",
        model=model,
        data={"holdout": 0.0},
        train={"epochs": 15, "batch_videos": 4, "optimizer": "adamw", "lr": 4e-3, "ema": None, "select": "last"},
        postprocess={"method": "soft_nms", "sigma": 0.4},
        classes={"classifier": {"epochs": 1}},
    )
    train_detector(recipe, store=store, annotations=annotations, out=tmp_path / "run")
    truth = read_truth(annotations).subset("validation")
    options = {"run": tmp_path / "run", "store": store, "videos": list(truth.videos["video"]), "proposals": True}
    found = detect(**options)
    shuffled = found.sample(frac=1.0, random_state=0)
    recall, chance = (
        average_recall(truth, table.groupby("video").head(6), (0.6,), max_avg=None).average_recall[-1]
        for table in (found, shuffled)
    )
    assert recall > max(0.7, chance + 0.2)
    again = detect(**options, batch_videos=4)
    assert len(again) == len(found)
    assert again["score"].to_numpy() == pytest.approx(found["score"].to_numpy(), abs=1e-5)
    durations = found["video"].map(truth.videos.set_index("video")["duration_s"])
    assert ((found["start_s"] >= 0) & (found["end_s"] <= durations + 1e-3)).all()


def test_dropout_is_of_training_alone():
    plain, dropping = bmn(), bmn(dropout=0.5)
    dropping.load_state_dict(plain.state_dict())
    batch = batch_of([14, 20], [([[2.0, 6.0]], [0]), ([[3.0, 9.0]], [1])])
    with torch.no_grad():
        same, other = plain.eval()(batch), dropping.eval()(batch)
        for name in ("start", "iou_class"):
            assert torch.equal(getattr(same, name), getattr(other, name))
        learning = [dropping.train()(batch) for _ in range(2)]
        for name in ("start", "iou_class"):  # rows, and the map behind them
            assert not torch.allclose(getattr(learning[0], name), getattr(learning[1], name))
            assert torch.equal(getattr(plain.train()(batch), name), getattr(same, name))
