"""SP-TAD: padding, order, levels, losses, decoding, switches, and that it learns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from tad.detect.detectors import DETECTORS, build_detector
from tad.detect.detectors.sptad import SPTAD
from tad.detect.interface import Batch, LevelSpec, Targets
from tad.detect.postprocess import suppress
from tad.detect.segments import paired_tiou
from tad.errors import RecipeError, WeightsError
from tad.recipe import PostprocessRecipe
from tad.timeline import TimeAxis

AXIS = TimeAxis(scale_s=0.5, translation_s=0.25, window_s=0.5)  # row i fills [i / 2, (i + 1) / 2) seconds
CHANNELS = {"rgb": 6, "flow": 5}
SMALL = {
    "rows": 32,
    "proposals": 9,
    "heads": 3,
    "width": 16,
    "interaction_width": 8,
    "attention_heads": 4,
    "feedforward": 24,
    "soi_points": 5,
}
THREE = {"levels": ("s2", "s4", "s8")}


def sptad(seed=0, **model) -> SPTAD:
    torch.manual_seed(seed)
    detector = SPTAD(**{"channels": CHANNELS, "classes": 3, **SMALL, **model})
    with torch.no_grad():  # outputs that differ, so that comparing them says something
        for name, parameter in detector.named_parameters():
            if "offsets" in name or "logits" in name or "bias" in name or "action" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return detector.eval()


def batch_for(
    detector, lengths, truths=None, *, axis=AXIS, padding=0.0, total=None, dtype=torch.float32, channels=None
):
    """Clips of these lengths in rows of the first need, padded; a clip has the same rows in every batch.

    Levels of other resolution have ``ceil(length / factor)`` rows and masks of their own.
    """
    total, first = total or max(lengths), detector.needs[0].rows
    features, masks = {}, {}
    for order, need in enumerate(detector.needs):
        factor = first // need.rows
        rows = -(-total // factor)
        mask = torch.zeros(len(lengths), rows, dtype=torch.bool)
        x = torch.full((len(lengths), (channels or CHANNELS)[need.stream], rows), padding, dtype=dtype)
        for i, length in enumerate(lengths):
            count = -(-length // factor)
            mask[i, :count] = True
            generator = torch.Generator().manual_seed(1000 * order + length)
            x[i, :, :count] = torch.randn(x.shape[1], count, generator=generator, dtype=torch.float64).to(dtype)
        features[need.key], masks[need.key] = x, mask
    if truths is not None:
        truths = [
            Targets(torch.tensor(s, dtype=torch.float32).reshape(-1, 2), torch.tensor(k, dtype=torch.int64))
            for s, k in truths
        ]
    mask = masks[detector.needs[0].key]
    if all(m.shape == mask.shape for m in masks.values()):
        masks = {}
    names, durations_s = [f"video_{n}" for n in lengths], [axis.to_seconds(float(n)) for n in lengths]
    return Batch(names, features, mask, [axis] * len(lengths), durations_s, truths, masks=masks)


# ---- padding, order, types -------------------------------------------------------------------------------------------
MODELS = [
    {},
    {"further": "conv", "lateral_kernel": 3},
    {"pyramid": "single", "action_head": False},
    THREE,
    {**THREE, "pyramid": "high", "lateral_kernel": 5},
    {"heads": 1, "pyramid_levels": 6, "channels": {"flow": 5}},
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.float64, 1e-11)])
def test_a_clip_alone_and_padded_in_a_batch_are_the_same(model, dtype, tolerance):
    detector = sptad(**model).to(dtype)
    detector.heads[0].to(dtype)
    lengths = [n for n in (30, 1, 17, 3, 32) if n <= detector.clip]
    with torch.no_grad():
        together = batch_for(detector, lengths, dtype=dtype, padding=math.nan, total=32)
        both = detector(together)
        detections = detector.decode(both, together)
        for i, length in enumerate(lengths):
            single = batch_for(detector, [length], dtype=dtype)
            alone = detector(single)
            torch.testing.assert_close(alone.logits[:, 0], both.logits[:, i], atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(alone.segments[:, 0], both.segments[:, i], atol=tolerance, rtol=tolerance)
            if alone.action is not None:
                torch.testing.assert_close(alone.action[0], both.action[i], atol=tolerance, rtol=tolerance)
            decoded = detector.decode(alone, single)[0]
            assert len(decoded) == len(detections[i])
            assert len(decoded) > 0 or length < 4  # no proposal may lie on so few rows
            torch.testing.assert_close(decoded.scores, detections[i].scores, atol=tolerance, rtol=tolerance)


def test_order_in_the_batch_does_not_matter():
    detector = sptad(**THREE)
    lengths = [12, 32, 25]
    with torch.no_grad():
        one, other = batch_for(detector, lengths), batch_for(detector, lengths[::-1])
        forwards, backwards = detector.decode(detector(one), one), detector.decode(detector(other), other)[::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert a.video == b.video
        torch.testing.assert_close(a.scores, b.scores)
        torch.testing.assert_close(a.segments_s, b.segments_s, atol=1e-4, rtol=1e-4)


def test_order_of_proposals_does_not_matter():
    detector, batch = sptad(), None
    shuffled, order = sptad(), torch.randperm(9)
    with torch.no_grad():
        for name in ("centers", "log_lengths", "features"):
            getattr(shuffled, name).copy_(getattr(detector, name)[order])
        batch = batch_for(detector, [30, 11])
        a, b = detector(batch), shuffled(batch)
    torch.testing.assert_close(a.logits[:, :, order], b.logits, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(a.segments[:, :, order], b.segments, atol=1e-3, rtol=1e-3)


def test_padding_does_not_change_the_loss():
    truths, terms = [([[3.0, 9.0], [15.0, 17.0]], [0, 2])], []
    detector = sptad(**THREE)
    for total, padding in ((None, 0.0), (32, math.inf)):
        batch = batch_for(detector, [20], truths, total=total, padding=padding)
        terms.append(detector.loss(detector(batch), batch.targets))
    assert set(terms[0]) == {"classification", "l1", "giou", "auxiliary", "action"}
    for name, value in terms[0].items():
        torch.testing.assert_close(value, terms[1][name])


def test_every_level_and_stream_is_used():
    detector = sptad(**THREE, proposals=40)
    batch = batch_for(detector, [32])
    for value in batch.features.values():
        value.requires_grad_()
    detector(batch).logits[-1].square().sum().backward()
    for need in detector.needs:
        assert (batch.features[need.key].grad.abs().sum((0, 2)) > 0).all(), need


# ---- initial proposals and heads -------------------------------------------------------------------------------------
def test_proposals_are_spread_over_the_clip_and_its_scales():
    detector = SPTAD(channels=CHANNELS, classes=3, rows=128, heads=1)
    lengths = detector.log_lengths.exp()
    assert 1 / 32 <= lengths.min() < 1 / 24
    assert 3 / 8 < lengths.max() <= 1 / 2
    assert torch.allclose(detector.centers.diff(), torch.full((49,), 1 / 50))
    for part in range(5):  # every fifth of the clip has short, middling and long ones
        here = lengths[10 * part : 10 * part + 10]
        assert (here < 1 / 12).any()
        assert ((here > 1 / 12) & (here < 1 / 4)).any()
        assert (here > 1 / 4).any()


def test_heads_pass_on_features_with_gradient_and_segments_without():
    detector = sptad()
    outputs = detector(batch_for(detector, [30]))
    first = [detector.heads[0].offsets[0].weight, detector.heads[0].interaction.first.weight]
    by_segments = torch.autograd.grad(outputs.segments[-1].sum(), first, retain_graph=True)
    assert by_segments[0].abs().sum() == 0  # the first head's regression learns from its own loss alone
    assert by_segments[1].abs().sum() > 0  # its features serve all heads
    start = torch.autograd.grad(outputs.segments[0].square().sum(), [detector.centers, detector.log_lengths])
    assert all((gradient.abs() > 0).all() for gradient in start)


def test_refinement_starts_from_the_head_before():
    detector = sptad()
    with torch.no_grad():
        for head in detector.heads[1:]:
            nn.init.zeros_(head.offsets[-1].weight)
            nn.init.zeros_(head.offsets[-1].bias)
        outputs = detector(batch_for(detector, [30]))
    torch.testing.assert_close(outputs.segments[1], outputs.segments[0])
    torch.testing.assert_close(outputs.segments[2], outputs.segments[0])
    assert not torch.allclose(outputs.logits[1], outputs.logits[0])


# ---- action classification head (section 3.1.4) ----------------------------------------------------------------------
def test_action_head_sees_the_mean_over_real_rows_of_every_level():
    detector = sptad(**THREE)
    lengths = [13, 30]
    batch = batch_for(detector, lengths, padding=math.nan, total=32)
    outputs = detector(batch)
    for i in range(2):
        means = []
        for level in ("s2", "s4", "s8"):
            for stream in ("rgb", "flow"):
                key = f"{stream}/{level}"
                means.append(batch.features[key][i][:, batch.masks[key][i]].mean(1))
        torch.testing.assert_close(outputs.action[i], detector.action(torch.cat(means)))


def test_action_loss_is_of_the_classes_present():
    detector = sptad(action_weight=3.0)
    truths = [([[3.0, 9.0], [3.0, 9.0], [12.0, 15.0]], [0, 2, 0]), ([], [])]
    batch = batch_for(detector, [20, 30], truths)
    outputs = detector(batch)
    p = outputs.action.sigmoid()
    expected = -(p[0, 0].log() + (1 - p[0, 1]).log() + p[0, 2].log() + (1 - p[1]).log().sum()) / 6
    torch.testing.assert_close(detector.loss(outputs, batch.targets)["action"], 3 * expected)


# ---- loss ------------------------------------------------------------------------------------------------------------
def test_loss_weights_and_auxiliary_terms():
    truths = [([[3.0, 9.0], [15.0, 17.0]], [0, 2])]
    costs = {"cost_class": 1.0, "cost_l1": 1.0, "cost_giou": 1.0}
    plain = sptad(**costs, class_weight=1.0, l1_weight=1.0, giou_weight=1.0)
    weighed = sptad(**costs, class_weight=2.0, l1_weight=5.0, giou_weight=7.0)
    batch = batch_for(plain, [30], truths)
    outputs = plain(batch)
    a, b = plain.loss(outputs, batch.targets), weighed.loss(outputs, batch.targets)
    for name, factor in (("classification", 2), ("l1", 5), ("giou", 7), ("action", 1)):
        torch.testing.assert_close(b[name], factor * a[name])
    others = 0.0
    for head in range(2):  # as if the network had ended there
        outputs_so_far = type(outputs)(
            outputs.logits[: head + 1], outputs.segments[: head + 1], outputs.action, outputs.extent
        )
        single = plain.loss(outputs_so_far, batch.targets)
        others += single["classification"] + single["l1"] + single["giou"]
    torch.testing.assert_close(a["auxiliary"], others)
    alone = sptad(heads=1)
    assert "auxiliary" not in alone.loss(alone(batch), batch.targets)


def test_boundaries_count_in_shares_of_the_clip():
    detector = sptad(heads=1, proposals=1, l1_weight=1.0)
    batch = batch_for(detector, [32], [([[8.0, 12.0]], [1])])
    outputs = detector(batch)
    start, end = outputs.segments[-1, 0, 0].tolist()
    expected = (abs(start - 8) + abs(end - 12)) / 32
    assert detector.loss(outputs, batch.targets)["l1"].item() == pytest.approx(expected, rel=1e-5)


ODD = {
    "none": ([], []),
    "longer than the clip": ([[-20.0, 90.0]], [1]),
    "shorter than a row": ([[4.2, 4.4]], [0]),
    "without length": ([[4.0, 4.0]], [0]),
    "beyond the end": ([[300.0, 310.0]], [2]),
    "two labels": ([[0.2, 0.8], [0.2, 0.8]], [0, 1]),
    "more than proposals": ([[i * 0.5, i * 0.5 + 3] for i in range(40)], [i % 3 for i in range(40)]),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("length", [1, 25])
def test_odd_truths_give_finite_losses_and_gradients(name, length):
    detector = sptad(**THREE).train()
    batch = batch_for(detector, [length], [ODD[name]])
    losses = detector.loss(detector(batch), batch.targets)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    for parameter in detector.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    if name in ("none", "without length", "beyond the end"):
        assert losses["l1"] == losses["giou"] == 0


def test_the_same_seed_gives_the_same_step():
    gradients = []
    for _ in range(2):
        detector = sptad(dropout=0.3).train()
        batch = batch_for(detector, [30, 20], [([[3.0, 9.0]], [1]), ([[2.0, 4.0], [2.0, 4.0]], [0, 2])])
        torch.manual_seed(5)
        sum(detector.loss(detector(batch), batch.targets).values()).backward()
        gradients.append([p.grad for p in detector.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ---- decoding --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("action_head", [True, False])
def test_decoding_equals_a_loop(action_head):
    detector = sptad(action_head=action_head)
    batch = batch_for(detector, [30], axis=TimeAxis(scale_s=0.4, translation_s=0.7, window_s=1.4))
    batch.durations_s = [12.345]
    with torch.no_grad():
        outputs = detector(batch)
        found = detector.decode(outputs, batch)[0]
    low, high = outputs.extent[0].tolist()
    expected = []
    for segment, logits in zip(outputs.segments[-1, 0].tolist(), outputs.logits[-1, 0], strict=True):
        ends = [min(max(edge, low), high) for edge in segment]
        seconds = [min(max((edge - 0.5) * 0.4 + 0.7, 0.0), 12.345) for edge in ends]
        if seconds[1] > seconds[0]:
            for label in range(3):
                score = logits[label].sigmoid()
                score = score * outputs.action[0, label].sigmoid() if action_head else score
                expected.append((score.item(), label, *seconds))
    expected.sort(reverse=True)
    assert len(found) == len(expected) > 0
    assert found.scores.tolist() == pytest.approx([e[0] for e in expected], abs=1e-6)
    assert found.labels.tolist() == [e[1] for e in expected]
    assert np.allclose(found.segments_s.tolist(), [e[2:] for e in expected], atol=1e-4)
    detector.max_detections = 5
    few = detector.decode(outputs, batch)[0]
    assert torch.equal(few.scores, found.scores[:5])


def test_detections_lie_inside_the_video_and_behind_a_window_before_it():
    detector = sptad()
    batch = batch_for(detector, [32, 20], axis=AXIS.shifted(100))
    with torch.no_grad():
        for segments, end_s in zip(detector.decode(detector(batch), batch), batch.durations_s, strict=True):
            assert len(segments) > 0
            assert segments.segments_s.min() >= 50.0
            assert segments.segments_s.max() <= end_s


def test_decoding_refuses_what_is_not_finite():
    detector = sptad()
    batch = batch_for(detector, [30])
    with torch.no_grad():
        batch.features["rgb"][0, 0, 3] = math.nan
        with pytest.raises(WeightsError, match="video_30"):
            detector.decode(detector(batch), batch)


# ---- switches --------------------------------------------------------------------------------------------------------
def test_levels_that_are_read():
    def read(**model):
        return [(need.key, need.layout, need.rows) for need in sptad(**model).needs]

    assert read() == [("rgb", "windowed", 32), ("flow", "windowed", 32)]
    assert read(layout="rescaled") == [("rgb", "rescaled", 32), ("flow", "rescaled", 32)]
    three = [
        ("rgb/s2", "windowed", 32), ("flow/s2", "windowed", 32),
        ("rgb/s4", "windowed", 16), ("flow/s4", "windowed", 16),
        ("rgb/s8", "windowed", 8), ("flow/s8", "windowed", 8),
    ]  # fmt: skip
    assert read(**THREE) == three
    assert read(**THREE, pyramid="high") == read(**THREE, pyramid="single") == three[-2:]
    assert sptad(**THREE, pyramid="single").clip == 8  # the same time, in rows of the coarsest level
    assert sptad(**THREE, pyramid="single").needs[0] == LevelSpec("rgb", "s8", "windowed", 8)


def test_levels_of_their_own_width():
    wide = {**THREE, "level_channels": {"s2": 4, "s4": 7, "s8": 9}}
    assert sptad(**wide).widths == [8, 14, 18]
    assert sptad(**wide, pyramid="high").widths == [18]
    detector = sptad(**wide)
    batch = batch_for(detector, [32, 20])
    with pytest.raises(RecipeError, match=r"rgb/s2 and flow/s2 have 11 channels.*level_channels"):
        detector(batch)
    for need, width in zip(detector.needs, (4, 4, 7, 7, 9, 9), strict=True):
        batch.features[need.key] = torch.randn(2, width, batch.features[need.key].shape[2])
    outputs = detector(batch)
    assert outputs.segments.isfinite().all()
    assert outputs.action.shape == (2, 3)


def test_pyramids_have_the_levels_that_they_say():
    for model, expected in (
        ({}, [32, 16, 8, 4]),
        (THREE, [32, 16, 8, 4]),
        ({**THREE, "pyramid": "high"}, [8, 4, 2, 1]),
        ({**THREE, "pyramid": "single"}, [8]),
        ({"pyramid_levels": 2, "further": "conv"}, [32, 16]),
    ):
        detector = sptad(**model)
        batch = batch_for(detector, [detector.clip])
        maps = []
        detector.pyramid.register_forward_hook(lambda _, __, result, maps=maps: maps.extend(result[0]))
        detector(batch)
        assert [x.shape[2] for x in maps] == expected


def test_build_detector_checks_names_and_values():
    built = build_detector("sptad", channels=CHANNELS, classes=3, **{**SMALL, "eta": 4})
    assert isinstance(built, DETECTORS["sptad"])
    assert not built.class_agnostic
    assert not built.reads_proposals
    for options, message in [
        ({"widht": 8}, "Did you mean 'width'"),
        ({"pyramid": "inner"}, "Did you mean 'inter'"),
        ({"layout": "full"}, "unknown layout 'full'"),
        ({"further": "min"}, "unknown further 'min'"),
        ({"rows": "auto"}, "resolve"),
        ({"rows": 0}, "rows must be a whole number"),
        ({"rows": 30, "levels": ["s2", "s4", "s8"]}, "multiple of 4"),
        ({"levels": "s2"}, "levels must be a list"),
        ({"levels": ["s2", "s4"], "level_channels": {"s2": 4}}, "for each of s2, s4"),
        ({"level_channels": {"features": 0}}, "level_channels.features must be a whole number"),
        ({"levels": []}, "levels must be a list"),
        ({"levels": ["s2", "s2"]}, "levels repeat"),
        ({"levels": ["s2", "s4", "s8"], "pyramid_levels": 2}, "less than the 3 levels"),
        ({"lateral_kernel": 2}, "odd"),
        ({"width": 20, "attention_heads": 8}, "multiple of attention_heads"),
        ({"proposals": 0}, "proposals"),
        ({"eta": 0}, "eta"),
        ({"dropout": 2.0}, "dropout"),
        ({"l1_weight": -1}, "l1_weight"),
        ({"channels": {}}, "stream"),
        ({"classes": 0}, "classes"),
    ]:
        with pytest.raises(RecipeError, match=message):
            build_detector("sptad", **{"channels": CHANNELS, "classes": 3, **SMALL, **options})


def test_resolve_replaces_auto_alone():
    lengths = np.concatenate([np.full(98, 20.0), [600.0, 900.0]])
    assert SPTAD.resolve({"rows": "auto", "width": 8}, lengths)["rows"] in (32, 64, 128, 256, 512, 1024)
    assert SPTAD.resolve({"rows": "auto"}, np.full(100, 100.0)) == {"rows": 128}
    assert SPTAD.resolve({"rows": "auto"}, np.full(100, 128.0)) == {"rows": 128}
    assert SPTAD.resolve({"rows": "auto"}, np.full(100, 129.0)) == {"rows": 256}
    assert SPTAD.resolve({"rows": "auto"}, np.array([])) == {"rows": 32}
    assert SPTAD.resolve({"rows": "auto"}, np.full(3, 1e6)) == {"rows": 1024}
    assert SPTAD.resolve({"rows": 48}, lengths) == {"rows": 48}
    assert SPTAD.resolve({}, lengths) == {}
    with pytest.raises(RecipeError, match="finest level"):
        SPTAD.resolve({"rows": "auto", "levels": ["s2", "s4"]}, lengths)


def test_vectors_of_the_initial_segments_are_not_decayed():
    detector = sptad()
    assert detector.centers.ndim == detector.log_lengths.ndim == 1  # AdamW of tad.training decays matrices alone


# ---- precision and devices -------------------------------------------------------------------------------------------
def step_on(device, dtype):
    detector = sptad(**THREE).train().to(device)
    batch = batch_for(detector, [32, 13], [([[3.0, 9.0], [20.0, 22.0]], [0, 1]), ([], [])]).to(device)
    with torch.autocast(device, dtype=dtype):
        outputs = detector(batch)
        losses = detector.loss(outputs, batch.targets)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters())
    assert outputs.logits.dtype == outputs.segments.dtype == outputs.action.dtype == torch.float32
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
    detector = sptad(**THREE).double()
    truths = [([[3.0, 9.0], [20.0, 22.0]], [0, 1]), ([[1.0, 5.0]], [2])]
    batch = batch_for(detector, [32, 20], truths, dtype=torch.float64)
    with torch.no_grad():
        here = detector(batch)
        losses = detector.loss(here, batch.targets)
        decoded = detector.decode(here, batch)
        detector, batch = detector.cuda(), batch.to("cuda")
        there = detector(batch)
        for name, value in detector.loss(there, batch.targets).items():
            torch.testing.assert_close(value.cpu(), losses[name])
        for a, b in zip(decoded, detector.decode(there, batch), strict=True):
            torch.testing.assert_close(a.scores, b.scores.cpu())


# ---- learning --------------------------------------------------------------------------------------------------------
def planted_batch(seeds, rows=64):
    """Clips whose actions stand out of the noise: class k adds 2 to channel k of both streams."""
    videos, features = [], {key: [] for key in CHANNELS}
    for seed in seeds:
        generator = np.random.default_rng(seed)
        arrays = {key: generator.normal(0, 0.3, (c, rows)).astype(np.float32) for key, c in CHANNELS.items()}
        segments, labels, at = [], [], int(generator.integers(2, 8))
        while True:
            length, label = int(generator.choice([4, 8, 16])), int(generator.integers(3))
            if at + length > rows - 2:
                break
            for value in arrays.values():
                value[label, at : at + length] += 2
            segments.append([at, at + length])
            labels.append(label)
            at += length + int(generator.integers(3, 12))
        videos.append((segments, labels))
        for key, value in arrays.items():
            features[key].append(value)
    detector = sptad(rows=rows)
    batch = batch_for(detector, [rows] * len(videos), videos)
    batch.features = {key: torch.tensor(np.stack(value)) for key, value in features.items()}
    return batch


LEARNER = {
    "channels": CHANNELS, "classes": 3, "rows": 64, "proposals": 16, "heads": 3, "width": 32, "interaction_width": 16,
    "feedforward": 64, "soi_points": 8, "lateral_kernel": 3,
}  # fmt: skip


def test_it_learns_to_find_planted_actions():
    torch.manual_seed(0)
    detector = SPTAD(**LEARNER).train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=4e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
    for step in range(120):
        batch = planted_batch(range(8 * step, 8 * step + 8))
        total = sum(detector.loss(detector(batch), batch.targets).values())
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    detector.eval()
    hits, truths, right, put_out = 0, 0, 0, 0
    with torch.no_grad():
        batch = planted_batch(range(10_000, 10_016))
        for segments, target in zip(detector.decode(detector(batch), batch), batch.targets, strict=True):
            kept = suppress(segments, PostprocessRecipe(method="nms", tiou=0.3, min_score=0.2))
            tiou = paired_tiou(kept.segments_s[:, None], AXIS.to_seconds(target.segments.double()))
            hit = (tiou > 0.5) & (kept.labels[:, None] == target.labels)
            hits, truths = hits + int(hit.any(0).sum()), truths + len(target.labels)
            right, put_out = right + int(hit.any(1).sum()), put_out + len(kept)
    assert hits / truths > 0.8
    assert right / put_out > 0.7


def test_two_classes_on_one_segment_are_both_learnt():
    torch.manual_seed(0)
    detector = SPTAD(**LEARNER).train()
    batch = batch_for(detector, [40], [([[10.0, 18.0], [10.0, 18.0]], [0, 2])])
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    for _ in range(80):
        optimizer.zero_grad()
        sum(detector.loss(detector(batch), batch.targets).values()).backward()
        optimizer.step()
    detector.eval()
    with torch.no_grad():
        kept = suppress(detector.decode(detector(batch), batch)[0], PostprocessRecipe(method="nms", tiou=0.3))
    assert set(kept.labels[:2].tolist()) == {0, 2}
    assert kept.scores[1] > 0.5
    for segment in kept.segments_s[:2]:
        assert paired_tiou(segment, torch.tensor([5.0, 9.0]).double()) > 0.8
