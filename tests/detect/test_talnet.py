"""TAL-Net: receptive fields, padding, targets, losses, decoding, fusion, and that it learns."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tad.detect.anchors import make_anchors
from tad.detect.detectors import DETECTORS, build_detector
from tad.detect.detectors.talnet import TALNet
from tad.detect.detectors.talnet_layers import SegmentProposalNetwork
from tad.detect.interface import Batch, LevelSpec, Targets
from tad.detect.postprocess import suppress
from tad.detect.segments import encode_center_length, paired_tiou, segment_tiou
from tad.errors import RecipeError, WeightsError
from tad.recipe import PostprocessRecipe
from tad.timeline import TimeAxis

AXIS = TimeAxis(scale_s=0.5, translation_s=0.25, window_s=0.5)  # row i fills [i / 2, (i + 1) / 2) seconds
CHANNELS = {"rgb": 6, "flow": 5}
SCALES = (1, 2, 4, 8, 16)


def talnet(seed=0, **model):
    torch.manual_seed(seed)
    options = {"channels": CHANNELS, "classes": 3, "width": 16, "anchor_scales": SCALES, **model}
    detector = TALNet(**options)
    with torch.no_grad():  # outputs that differ, so that comparing them says something
        for name, parameter in detector.named_parameters():
            if "objectness" in name or "offsets" in name or "logits" in name:
                parameter.add_(torch.randn_like(parameter))
    return detector.eval()


def batch_of(lengths, truths=None, *, axis=AXIS, seed=0, padding=0.0, total=None, dtype=torch.float32, channels=None):
    """Videos of these lengths, padded; video n has the same rows in every batch."""
    total = total or max(lengths)
    features = {
        key: torch.full((len(lengths), c, total), padding, dtype=dtype) for key, c in (channels or CHANNELS).items()
    }
    mask = torch.zeros(len(lengths), total, dtype=torch.bool)
    for i, length in enumerate(lengths):
        mask[i, :length] = True
        generator = torch.Generator().manual_seed(1000 * seed + length)
        for value in features.values():
            value[i, :, :length] = torch.randn(value.shape[1], length, generator=generator, dtype=torch.float64).to(
                dtype
            )
    targets = None
    if truths is not None:
        targets = [
            Targets(torch.tensor(s, dtype=torch.float32).reshape(-1, 2), torch.tensor(k, dtype=torch.int64))
            for s, k in truths
        ]
    names = [f"video_{n}" for n in lengths]
    return Batch(names, features, mask, [axis] * len(lengths), [axis.to_seconds(float(n)) for n in lengths], targets)


# ---- receptive fields (Table 1, section 4.1 and 4.2) -------------------------------------------------------------
def influence(network, k, rows):
    """Which input rows change the output of scale k at the middle row, as offsets from it, by gradient."""
    torch.manual_seed(1)
    features = torch.randn(48, 3, rows, requires_grad=True)  # many inputs: the max-pool passes one row each
    objectness, offsets = network(features, torch.ones(48, 1, rows))
    middle = rows // 2
    (objectness[:, middle, k].sum() + offsets[:, middle, k].sum()).backward()
    touched = torch.nonzero(features.grad.abs().sum((0, 1)) > 0).squeeze(1) - middle
    return touched.tolist()


def network_for(receptive_field, scales, *, context):
    torch.manual_seed(0)
    options = {"receptive_field": receptive_field, "context": context}
    return SegmentProposalNetwork(channels=3, width=16, scales=scales, **options)


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("scale", [1, 2, 3, 4, 5, 6, 8, 11, 16, 33, 62])
def test_receptive_field_follows_the_anchor(scale, context):
    wanted = scale * (2 if context else 1)
    first, second, pool = max(1, round(wanted / 6)), max(1, round(wanted / 3)), max(1, round(wanted / 6))
    steps = {a * first + b * second for a in (-1, 0, 1) for b in (-1, 0, 1)}
    expected = {step + shift for step in steps for shift in range(-((pool - 1) // 2), pool // 2 + 1)}
    network = network_for("multi-dilated", (scale, 1), context=context)
    seen = influence(network, 0, rows=2 * wanted + 21)
    assert set(seen) == expected
    span = seen[-1] - seen[0] + 1
    # two dilated convolutions reach over `wanted` rows, the pooling adds a sixth, the three roundings 2.5 at most
    assert abs(span - wanted * 7 / 6) <= 2.5 if wanted >= 4 else span == 5


@pytest.mark.parametrize(
    ("receptive_field", "towers", "span"), [("multi-tconv", 5, 5), ("single-tconv", 1, 5), ("single", 1, 1)]
)
def test_receptive_field_of_the_baselines_is_the_same_for_all_anchors(receptive_field, towers, span):
    network = network_for(receptive_field, SCALES, context=True)
    assert len(network.towers) == towers
    for k in range(len(SCALES)):
        assert influence(network, k, rows=31) == list(range(-(span // 2), span // 2 + 1))


# ---- padding, order, types ---------------------------------------------------------------------------------------
MODELS = [
    {},
    {"fusion": "early", "soi": "align"},
    {"receptive_field": "single-tconv", "classification_context": False, "soi": "mean"},
    {"receptive_field": "multi-tconv", "class_specific_regression": True},
    {"receptive_field": "single", "fusion": "flow"},
]


def sorted_outputs(outputs, i, rows):
    own = outputs.sample == i
    count = rows * len(SCALES)
    return [
        outputs.objectness[i, :count],
        outputs.offsets[i, :count],
        outputs.proposals[own],
        outputs.logits[own],
        outputs.regressions[own],
    ]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_a_video_alone_and_padded_in_a_batch_are_the_same(model, dtype, tolerance):
    detector = talnet(**model).to(dtype)
    lengths = [30, 1, 47, 3]
    with torch.no_grad():
        together = batch_of(lengths, dtype=dtype, padding=float("nan"), total=60)
        both = detector(together)
        detections = detector.decode(both, together)
        for i, length in enumerate(lengths):
            single = batch_of([length], dtype=dtype)
            alone = detector(single)
            for a, b in zip(sorted_outputs(alone, 0, length), sorted_outputs(both, i, length), strict=True):
                assert a.shape == b.shape
                assert torch.allclose(a, b, atol=tolerance, rtol=tolerance)
            decoded = detector.decode(alone, single)[0]
            assert torch.allclose(decoded.scores, detections[i].scores, atol=tolerance)
            assert torch.allclose(decoded.segments_s, detections[i].segments_s, atol=10 * tolerance)


def test_order_in_the_batch_does_not_matter():
    detector = talnet()
    lengths = [12, 40, 25]
    with torch.no_grad():
        one, other = batch_of(lengths), batch_of(lengths[::-1])
        forwards, backwards = detector.decode(detector(one), one), detector.decode(detector(other), other)[::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert a.video == b.video
        assert torch.allclose(a.scores, b.scores, atol=1e-5)
        assert torch.allclose(a.segments_s, b.segments_s, atol=1e-3)


def test_padding_does_not_change_the_anchor_loss():
    truths = [([[3.0, 9.0], [15.0, 17.0]], [0, 2])]
    detector = talnet(anchors_per_video=10**6, anchor_positive_share=1.0).eval()  # every anchor: nothing left to chance
    terms = []
    for batch in (batch_of([30], truths), batch_of([30], truths, total=75, padding=float("inf"))):
        losses = detector.loss(detector(batch), batch.targets)
        terms.append(losses["objectness"] + losses["proposal_regression"])
    assert torch.allclose(*terms, rtol=1e-5)


def test_the_same_seed_gives_the_same_step():
    batch = batch_of([30, 20], [([[3.0, 9.0]], [1]), ([[2.0, 4.0], [2.0, 4.0]], [0, 2])])
    gradients = []
    for _ in range(2):
        detector = talnet(dropout=0.3).train()
        torch.manual_seed(5)
        sum(detector.loss(detector(batch), batch.targets).values()).backward()
        gradients.append([p.grad for p in detector.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(g.isfinite().all() for g in gradients[0])


# ---- losses against a loop ---------------------------------------------------------------------------------------
def slow_loss(detector, outputs, truths):
    """Eq. 1 with every anchor and every proposal in the sample, one at a time, of one video."""
    entropy, distance, count = 0.0, 0.0, 0
    tiou = [[paired_tiou(a, t).item() for t, _ in truths] for a in outputs.anchors]
    best_anchor = {g: max(range(len(tiou)), key=lambda n, g=g: tiou[n][g]) for g in range(len(truths))}
    for n, (anchor, row) in enumerate(zip(outputs.anchors, tiou, strict=True)):
        forced = [g for g, best in best_anchor.items() if best == n]
        positive, negative = max(row) > 0.7 or bool(forced), max(row) < 0.3 and not forced
        if not positive and not negative:
            continue
        count += 1
        probability = outputs.objectness[0, n].sigmoid()
        entropy -= probability.log() if positive else (1 - probability).log()
        if positive:
            truth = truths[forced[0] if forced else row.index(max(row))][0]
            goal = encode_center_length(truth, anchor, weights=(10.0, 5.0))
            distance += F.smooth_l1_loss(outputs.offsets[0, n], goal, reduction="sum")
    first = {"objectness": entropy / count, "proposal_regression": distance / count}
    entropy, distance = 0.0, 0.0
    for p, proposal in enumerate(outputs.proposals):
        row = [paired_tiou(proposal, t).item() for t, _ in truths]
        truth, label = truths[row.index(max(row))]
        label = label + 1 if max(row) > 0.5 else 0
        entropy -= outputs.logits[p].log_softmax(0)[label]
        if label:
            offsets = outputs.regressions[p, label - 1 if detector.class_specific_regression else 0]
            goal = encode_center_length(truth, proposal, weights=(10.0, 5.0))
            distance += F.smooth_l1_loss(offsets, goal, reduction="sum")
    return {
        **first,
        "classification": entropy / len(outputs.proposals),
        "regression": distance / len(outputs.proposals),
    }


@pytest.mark.parametrize("class_specific", [False, True])
def test_losses_equal_a_loop_over_anchors_and_proposals(class_specific):
    everything = {"anchors_per_video": 10**6, "proposals_per_video": 10**6}
    shares = {"anchor_positive_share": 1.0, "proposal_positive_share": 1.0}
    detector = talnet(class_specific_regression=class_specific, **everything, **shares).double()
    truths = [([[3.1, 9.4], [14.2, 16.9], [20.3, 31.1]], [0, 2, 1])]  # no two anchors are equally good
    batch = batch_of([40], truths, dtype=torch.float64)
    outputs = detector(batch)  # in eval mode all proposals are there
    losses = detector.loss(outputs, batch.targets)
    expected = slow_loss(detector, outputs, list(zip(batch.targets[0].segments.double(), truths[0][1], strict=True)))
    assert (outputs.proposals[:, 0] < outputs.proposals[:, 1]).all()
    assert expected["regression"] > 0
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, rel=1e-9
    )


def test_loss_is_a_mean_over_videos():
    options = {"anchors_per_video": 10**6, "proposals_per_video": 10**6}
    detector = talnet(**options, anchor_positive_share=1.0, proposal_positive_share=1.0)
    truths = [([[3.0, 9.0]], [1]), ([[5.0, 7.0], [10.0, 30.0]], [0, 2]), ([], [])]
    lengths = [30, 40, 20]
    together = batch_of(lengths, truths)
    alone = [batch_of([n], [t]) for n, t in zip(lengths, truths, strict=True)]
    both = detector.loss(detector(together), together.targets)
    each = [detector.loss(detector(b), b.targets) for b in alone]
    for name, value in both.items():
        assert value.item() == pytest.approx(sum(e[name].item() for e in each) / 3, rel=1e-4)


def test_training_classifies_a_sample_of_the_proposals():
    truths = [([[3.0, 9.0], [15.0, 17.0]], [0, 2]), ([], [])]
    batch = batch_of([80, 60], truths)
    detector = talnet(proposals_per_video=20, append_truth=True).train()
    outputs = detector(batch)
    for i, (segments, _) in enumerate(truths):
        own = outputs.proposals[outputs.sample == i]
        assert 0 < len(own) <= 20
        tiou = [max([paired_tiou(p, torch.tensor(s)).item() for s in segments], default=0.0) for p in own]
        positives = sum(t > 0.5 for t in tiou)
        assert positives <= 5
        assert positives >= (1 if segments else 0)  # the truth itself is among the candidates
    losses = detector.loss(outputs, batch.targets)
    assert set(losses) == {"objectness", "proposal_regression", "classification", "regression"}
    batch.targets = None
    with pytest.raises(ValueError, match="targets"):
        detector(batch)


ODD = {
    "none": ([], []),
    "longer than the sequence": ([[-20.0, 90.0]], [1]),
    "shorter than a row": ([[4.2, 4.4]], [0]),
    "without length": ([[4.0, 4.0]], [0]),
    "beyond the end": ([[300.0, 310.0]], [2]),
    "across the start": ([[-3.0, 4.0]], [2]),
    "two labels": ([[2.0, 8.0], [2.0, 8.0]], [0, 1]),
    "many": ([[i * 0.5, i * 0.5 + 3] for i in range(40)], [i % 3 for i in range(40)]),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("length", [1, 25])
@pytest.mark.parametrize("append_truth", [False, True])
def test_odd_truths_give_finite_losses_and_gradients(name, length, append_truth):
    detector = talnet(append_truth=append_truth).train()
    batch = batch_of([length], [ODD[name]])
    losses = detector.loss(detector(batch), batch.targets)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    for parameter in detector.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    if name in ("none", "without length", "beyond the end"):
        assert losses["proposal_regression"] == losses["regression"] == 0
    elif name == "longer than the sequence":  # it is learnt as far as it is seen
        assert losses["proposal_regression"] > 0


def test_what_rows_look_at_beyond_their_spacing_belongs_to_them():
    # windows of four spacings: row 0 looks at rows -1.5 to 2.5, and a video's first moment is row -1.5
    axis = TimeAxis(scale_s=0.5, translation_s=1.0, window_s=2.0)
    batch = batch_of([20], [([[-1.5, 6.0]], [0])], axis=axis)
    batch.durations_s = [19 * 0.5 + 2.0]
    outputs = talnet()(batch)
    assert outputs.extent[0].tolist() == [-1.5, 21.5]
    assert outputs.proposals.min() >= 0
    assert outputs.proposals.max() <= 20


# ---- decoding ----------------------------------------------------------------------------------------------------
def test_decoding_equals_a_loop():
    detector = talnet(class_specific_regression=True)
    batch = batch_of([30], axis=TimeAxis(scale_s=0.4, translation_s=0.7, window_s=1.4))
    batch.durations_s = [12.345]
    with torch.no_grad():
        outputs = detector(batch)
        found = detector.decode(outputs, batch)[0]
    low, high = outputs.extent[0].tolist()
    expected = []
    for proposal, logits, offsets in zip(outputs.proposals, outputs.logits, outputs.regressions, strict=True):
        start, end = proposal.tolist()
        for label in range(3):
            shift, growth = offsets[label].tolist()
            center = 0.5 * (start + end) + (end - start) * shift / 10
            length = (end - start) * min(62.5, max(1 / 62.5, math.exp(growth / 5)))
            ends = [min(max(center + side * length / 2, low), high) for side in (-1, 1)]
            seconds = [min(max((e - 0.5) * 0.4 + 0.7, 0.0), 12.345) for e in ends]
            if seconds[1] > seconds[0]:
                expected.append((logits.softmax(0)[label + 1].item(), label, *seconds))
    expected.sort(reverse=True)
    assert len(found) == len(expected) <= 2000
    assert found.scores.tolist() == pytest.approx([e[0] for e in expected], abs=1e-6)
    assert sorted(found.labels.tolist()) == sorted(e[1] for e in expected)
    assert np.allclose(sorted(found.segments_s.tolist()), sorted(e[2:] for e in expected), atol=1e-4)
    assert found.segments_s.min() >= 0
    assert found.segments_s.max() <= 12.345


def test_decoding_keeps_the_best():
    detector = talnet(max_detections=10)
    batch = batch_of([30])
    with torch.no_grad():
        outputs = detector(batch)
        found = detector.decode(outputs, batch)[0]
        detector.max_detections = 10**6
        everything = detector.decode(outputs, batch)[0]
    assert len(found) == 10 < len(everything)
    assert torch.equal(found.scores, everything.scores[:10])


def test_proposals_alone_in_seconds():
    detector, batch = talnet(proposals=25), batch_of([30, 12])
    with torch.no_grad():
        outputs = detector(batch)
        for i, found in enumerate(detector.decode_proposals(outputs, batch)):
            own = outputs.sample == i
            assert 0 < len(found) <= 25
            assert torch.equal(found.segments_s, AXIS.to_seconds(outputs.proposals[own].double()))
            assert torch.equal(found.scores, outputs.confidence[own].sigmoid())
            assert (found.scores.diff() <= 0).all()
            tiou = segment_tiou(found.segments_s, found.segments_s).fill_diagonal_(0)
            assert tiou.max() < 0.7
            for score in outputs.confidence[own]:  # each is some anchor's
                assert (outputs.objectness[i] == score).any()


def test_decoding_refuses_what_is_not_finite():
    detector = talnet()
    with torch.no_grad():
        detector.proposal_networks[0].reduce.weight[0, 0] = float("nan")
        batch = batch_of([30])
        with pytest.raises(WeightsError, match="video_30"):
            detector.decode(detector(batch), batch)


def test_untrained_and_tiny_videos_go_all_the_way():
    batch = batch_of([1, 2, 5])
    detector = TALNet(channels=CHANNELS, classes=3).eval()
    with torch.no_grad():
        found = detector.decode(detector(batch), batch)
    assert [s.video for s in found] == ["video_1", "video_2", "video_5"]
    for segments, duration_s in zip(found, batch.durations_s, strict=True):
        assert len(segments) > 0
        assert segments.segments_s.min() >= 0
        assert segments.segments_s.max() <= duration_s
        assert (segments.segments_s[:, 1] > segments.segments_s[:, 0]).all()
        assert set(segments.labels.tolist()) <= {0, 1, 2}


# ---- fusion and switches -----------------------------------------------------------------------------------------
def test_late_fusion_is_the_mean_of_single_streams():
    late = talnet(fusion="late")
    batch = batch_of([30])
    with torch.no_grad():
        fused = late(batch)
        singles = []
        for i, name in enumerate(("rgb", "flow")):
            single = talnet(fusion=name)
            single.proposal_networks[0].load_state_dict(late.proposal_networks[i].state_dict())
            single.classifiers[0].load_state_dict(late.classifiers[i].state_dict())
            singles.append(single)
        firsts = [s(batch) for s in singles]
        assert torch.allclose(fused.objectness, torch.stack([f.objectness for f in firsts]).mean(0), atol=1e-6)
        assert torch.allclose(fused.offsets, torch.stack([f.offsets for f in firsts]).mean(0), atol=1e-5)
        rows = batch.mask.sum(1)
        heads = [
            s.classifiers[0](batch.features[name], rows, fused.proposals, fused.sample)
            for s, name in zip(singles, ("rgb", "flow"), strict=True)
        ]
        assert torch.allclose(fused.logits, torch.stack([h[0] for h in heads]).mean(0), atol=1e-5)
        assert torch.allclose(fused.regressions, torch.stack([h[1] for h in heads]).mean(0), atol=1e-5)


def test_streams_that_are_read():
    assert talnet().needs == (LevelSpec("rgb"), LevelSpec("flow"))
    assert talnet(fusion="early").needs == (LevelSpec("rgb"), LevelSpec("flow"))
    assert talnet(fusion="rgb").needs == (LevelSpec("rgb"),)
    assert talnet(fusion="flow").needs == (LevelSpec("flow"),)
    for fusion in ("rgb", "flow", "late", "early"):
        assert talnet(fusion=fusion, channels={"i3d-rgb": 4}).needs == (LevelSpec("i3d-rgb"),)
    three = {"a": 4, "b": 4, "c": 4}
    assert len(talnet(channels=three).proposal_networks) == 3
    with pytest.raises(RecipeError, match="a, b, c"):
        talnet(channels=three, fusion="flow")


def test_context_widens_what_is_pooled():
    inside, around = talnet(classification_context=False), talnet(classification_context=True)
    around.load_state_dict(inside.state_dict())
    batch = batch_of([60])
    segments, sample, rows = torch.tensor([[20.0, 30.0]]), torch.tensor([0]), torch.tensor([60])
    for detector, reach in ((inside, 0), (around, 5)):
        leaf = batch.features["rgb"].clone().requires_grad_()
        logits, _ = detector.classifiers[0](leaf, rows, segments, sample)
        logits.square().sum().backward()
        touched = torch.nonzero(leaf.grad[0].abs().sum(0)).squeeze(1)
        assert 20 - reach <= touched.min() < 23 - reach
        assert 27 + reach < touched.max() < 30 + reach


def test_anchors_lie_where_outputs_say():
    outputs = talnet()(batch_of([7]))
    assert torch.equal(outputs.anchors, make_anchors(7, torch.tensor(SCALES).float()).flatten(0, 1))
    assert outputs.objectness.shape == (1, 7 * len(SCALES))


# ---- building ----------------------------------------------------------------------------------------------------
def test_build_detector_checks_names_and_values():
    built = build_detector("talnet", channels=CHANNELS, classes=3, width=8, anchor_scales=[1, 2.5], fusion="early")
    assert isinstance(built, DETECTORS["talnet"])
    assert built.scales.tolist() == [1.0, 2.5]
    for options, message in [
        ({"widht": 8}, "Did you mean 'width'"),
        ({"channels_": 8}, "no model option 'channels_'"),
        ({"fusion": "lat"}, "Did you mean 'late'"),
        ({"receptive_field": "multi-dilate"}, "Did you mean 'multi-dilated'"),
        ({"soi": "median"}, "unknown soi 'median'"),
        ({"anchor_scales": []}, "anchor_scales"),
        ({"anchor_scales": [1, -2]}, "anchor_scales"),
        ({"anchor_scales": "auto"}, "resolve"),
        ({"anchor_scales": 3}, "anchor_scales"),
        ({"width": 0}, "width must be a whole number"),
        ({"width": 8.5}, "width must be a whole number"),
        ({"proposal_nms_tiou": 1.5}, "proposal_nms_tiou"),
        ({"dropout": "no"}, "dropout"),
    ]:
        with pytest.raises(RecipeError, match=message):
            build_detector("talnet", channels=CHANNELS, classes=3, **options)
    with pytest.raises(RecipeError, match="Did you mean 'talnet'"):
        build_detector("talnett", channels=CHANNELS, classes=3)
    with pytest.raises(RecipeError, match="stream"):
        build_detector("talnet", channels={}, classes=3)
    with pytest.raises(RecipeError, match="classes"):
        build_detector("talnet", channels=CHANNELS, classes=0)


def test_resolve_replaces_auto_alone():
    lengths = np.array([4.0, 5.0, 30.0])
    model = {"width": 8, "anchor_scales": "auto"}
    resolved = TALNet.resolve(model, lengths)
    assert model["anchor_scales"] == "auto"
    assert resolved["width"] == 8
    assert min(resolved["anchor_scales"]) <= 5
    assert max(resolved["anchor_scales"]) >= 21
    build_detector("talnet", channels=CHANNELS, classes=3, **resolved)
    assert TALNet.resolve({"anchor_scales": [1, 2]}, lengths) == {"anchor_scales": [1, 2]}
    assert TALNet.resolve({}, np.array([])) == {}


def test_weights_load_into_another_choice_of_recipe_values():
    trained = talnet(proposals=300)
    again = talnet(1, proposals=50, soi="align", append_truth=False)
    again.load_state_dict(copy.deepcopy(trained.state_dict()), strict=True)


# ---- precision and devices ---------------------------------------------------------------------------------------
def step_on(device, dtype):
    detector = talnet().train().to(device)
    batch = batch_of([60, 33], [([[3.0, 9.0], [20.0, 22.0]], [0, 1]), ([], [])]).to(device)
    with torch.autocast(device, dtype=dtype):
        outputs = detector(batch)
        losses = detector.loss(outputs, batch.targets)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters())
    assert outputs.logits.dtype == outputs.objectness.dtype == torch.float32
    with torch.no_grad(), torch.autocast(device, dtype=dtype):
        detector.eval()
        for segments in detector.decode(detector(batch), batch):
            assert segments.segments_s.isfinite().all()
            assert len(suppress(segments, PostprocessRecipe(method="soft_nms", min_score=0.0))) > 0


def test_bfloat16_autocast_on_cpu():
    step_on("cpu", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_on_cuda(dtype):
    step_on("cuda", dtype)


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives():
    detector, batch = talnet().double(), batch_of([50, 20], dtype=torch.float64)
    with torch.no_grad():
        here = detector.decode(detector(batch), batch)
        there = detector.cuda()(batch.to("cuda"))
        for a, b in zip(here, detector.decode(there, batch.to("cuda")), strict=True):
            assert torch.allclose(a.scores, b.scores.cpu(), atol=1e-9)
            assert torch.allclose(a.segments_s, b.segments_s.cpu(), atol=1e-7)


# ---- learning ----------------------------------------------------------------------------------------------------
def planted(seed, rows=120):
    """A video whose actions stand out of the noise: class k adds 2 to channel k of both streams."""
    generator = np.random.default_rng(seed)
    features = {key: generator.normal(0, 0.3, (c, rows)).astype(np.float32) for key, c in CHANNELS.items()}
    segments, labels, at = [], [], int(generator.integers(2, 8))
    while True:
        length, label = int(generator.choice([3, 6, 12, 20])), int(generator.integers(3))
        if at + length > rows - 2:
            break
        for value in features.values():
            value[label, at : at + length] += 2
        segments.append([at, at + length])
        labels.append(label)
        at += length + int(generator.integers(3, 12))
    return features, segments, labels


def planted_batch(seeds):
    videos = [planted(seed) for seed in seeds]
    batch = batch_of([120] * len(videos), [(segments, labels) for _, segments, labels in videos])
    for key in CHANNELS:
        batch.features[key] = torch.tensor(np.stack([features[key] for features, _, _ in videos]))
    return batch


def test_it_learns_to_find_planted_actions():
    torch.manual_seed(0)
    detector = TALNet(channels=CHANNELS, classes=3, width=32, anchor_scales=(3, 6, 12, 20))
    optimizer = torch.optim.Adam(detector.parameters(), lr=5e-3)
    totals = []
    for step in range(60):
        batch = planted_batch([2 * step, 2 * step + 1])
        total = sum(detector.loss(detector(batch), batch.targets).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert np.mean(totals[-10:]) < 0.6 * np.mean(totals[:10])
    detector.eval()
    found_truths, all_truths, right, put_out = 0, 0, 0, 0
    with torch.no_grad():
        batch = planted_batch(range(10_000, 10_008))
        for segments, target in zip(detector.decode(detector(batch), batch), batch.targets, strict=True):
            kept = suppress(segments, PostprocessRecipe(method="nms", tiou=0.3, min_score=0.5))
            truth = AXIS.to_seconds(target.segments.double())
            tiou = paired_tiou(kept.segments_s[:, None], truth)
            hit = (tiou > 0.5) & (kept.labels[:, None] == target.labels)
            found_truths += int(hit.any(0).sum())
            all_truths += len(truth)
            right += int(hit.any(1).sum())
            put_out += len(kept)
    assert found_truths / all_truths > 0.8
    assert right / put_out > 0.55


def test_two_labels_on_one_segment_are_both_learnt():
    truths = [([[10.0, 18.0], [10.0, 18.0]], [0, 2])]
    batch = batch_of([40], truths)
    torch.manual_seed(0)
    detector = TALNet(channels=CHANNELS, classes=3, width=16, anchor_scales=(4, 8, 16))
    optimizer = torch.optim.Adam(detector.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        sum(detector.loss(detector(batch), batch.targets).values()).backward()
        optimizer.step()
    detector.eval()
    with torch.no_grad():
        kept = suppress(detector.decode(detector(batch), batch)[0], PostprocessRecipe(method="nms", tiou=0.3))
    assert set(kept.labels[:2].tolist()) == {0, 2}
    assert kept.scores[:2].tolist() == pytest.approx([0.5, 0.5], abs=0.2)
    for segment in kept.segments_s[:2]:
        assert paired_tiou(segment, torch.tensor([5.0, 9.0]).double()) > 0.7
