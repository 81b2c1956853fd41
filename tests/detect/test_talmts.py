"""TAL-MTS and AFSD as detectors: invariance, fusion of streams, losses, decoding by hand, frames, learning."""

import copy
import inspect
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tad.detect import detect, train_detector
from tad.detect.detectors import DETECTORS, build_detector
from tad.detect.detectors.talmts import AFSD, AFSD_DEFAULTS, TALMTS
from tad.detect.detectors.talmts_inputs import ACTIVITYNET_BOUNDS
from tad.detect.interface import Batch, LevelSpec, Targets
from tad.detect.postprocess import suppress
from tad.detect.recipes import detect_recipe
from tad.detect.segments import paired_tiou
from tad.errors import RecipeError, WeightsError
from tad.recipe import DetectRecipe, PostprocessRecipe
from tad.timeline import TimeAxis
from tests.detect.toydetector import make_world

AXIS = TimeAxis(scale_s=0.5, translation_s=0.25, window_s=0.5)  # row i fills [i / 2, (i + 1) / 2) seconds
CHANNELS = {"rgb": 6, "flow": 5}
ROWS = {"stt": False, "fsa": False, "frame_factor": 2}
SMALL = {"rows": 32, "pyramid_levels": 4, "width": 8, "norm_groups": 2, "classes": 3}
MAPS = {"s4-map": [6, 2, 2], "s8-map": [5, 1, 2]}
FRAMES = {
    "channels": {"rgb": 9, "frames": 3},
    "levels": list(MAPS),
    "level_channels": MAPS,
    "frames": "frames",
    "frame_size": [8, 8],
    "stt_patch": 4,
    "fsa_patch": 4,
    "transformer_width": 8,
    "transformer_heads": 2,
    "frame_factor": 4,
}


def detector_of(name="talmts", seed=0, **model):
    torch.manual_seed(seed)
    detector = build_detector(name, **{"channels": CHANNELS, **SMALL, **({} if "frames" in model else ROWS), **model})
    with torch.no_grad():  # outputs that differ, so that comparing them says something
        for parameter_name, parameter in detector.named_parameters():
            if any(
                f".{head}." in parameter_name
                for head in ("distances", "offsets", "logits", "refined_logits", "quality")
            ):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return detector.eval()


def batch_of(lengths, truths=None, *, axis=AXIS, padding=0.0, total=None, dtype=torch.float32, shapes=None):
    """Clips of these lengths, padded; clip n has the same rows in every batch. ``shapes``: key → row shape, factor."""
    total = total or max(lengths)
    shapes = shapes or {key: ((c,), 1.0) for key, c in CHANNELS.items()}
    features, masks = {}, {}
    for k, (key, (shape, factor)) in enumerate(shapes.items()):
        long = math.ceil(total * factor)
        value = torch.full((len(lengths), shape[0], long, *shape[1:]), padding, dtype=dtype)
        mask = torch.zeros(len(lengths), long, dtype=torch.bool)
        for i, length in enumerate(lengths):
            count = math.ceil(length * factor)
            generator = torch.Generator().manual_seed(100 * length + k)
            x = torch.randn(shape[0], count, *shape[1:], generator=generator, dtype=torch.float64)
            value[i, :, :count] = ((x * 40 + 128).clamp(0, 255).round() if key == "frames" else x).to(dtype)
            mask[i, :count] = True
        features[key], masks[key] = value, mask
    first = next(iter(masks))
    targets = None
    if truths is not None:
        targets = [
            Targets(torch.tensor(s, dtype=torch.float32).reshape(-1, 2), torch.tensor(k, dtype=torch.int64))
            for s, k in truths
        ]
    names = [f"video_{n}" for n in lengths]
    durations = [axis.to_seconds(float(n)) for n in lengths]
    return Batch(names, features, masks.pop(first), [axis] * len(lengths), durations, targets, masks=masks)


def frame_shapes():
    return {"rgb/s4-map": ((6, 2, 2), 1.0), "rgb/s8-map": ((5, 1, 2), 0.5), "frames": ((3, 8, 8), 4.0)}


# ---- padding, order, types ---------------------------------------------------------------------------------------
MODELS = [
    {},
    {"name": "afsd"},
    {"fused_training": True, "rfp_interpolation": "linear", "frame_interpolation": "nearest", "row_kernel": 3},
    {"boundary_fusion": "sqrt", "fusion": "late", "frame_factor": 3},
    {"fusion": "flow", "rfp": False, "pyramid_levels": 6},
    FRAMES,
    {**FRAMES, "fsa": False, "transformer_residual": True},
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.float64, 1e-10)])
def test_a_clip_alone_and_padded_in_a_batch_are_the_same(model, dtype, tolerance):
    detector = detector_of(**model).to(dtype)
    shapes = frame_shapes() if "frames" in model else None
    lengths = [30, 1, 13, 3, 32]
    with torch.no_grad():
        together = batch_of(lengths, dtype=dtype, padding=float("nan"), shapes=shapes)
        if "frames" in model:  # as bytes, padding is a number
            together.features["frames"].nan_to_num_(255.0)
        both = detector(together)
        detections = detector.decode(both, together)
        for i, length in enumerate(lengths):
            single = batch_of([length], dtype=dtype, shapes=shapes)
            alone = detector(single)
            assert int(alone.levels.mask.sum()) == int(both.levels.mask[i].sum())
            for name in ("distances", "logits", "offsets", "refined_logits", "quality"):
                a, b = getattr(alone, name)[:, 0, alone.levels.mask[0]], getattr(both, name)[:, i, both.levels.mask[i]]
                assert torch.allclose(a, b, atol=tolerance, rtol=tolerance), name
            decoded = detector.decode(alone, single)[0]
            assert len(decoded) == len(detections[i])
            assert torch.allclose(decoded.scores, detections[i].scores, atol=tolerance)


def test_padding_and_order_change_no_detection():
    detector = detector_of().double()
    lengths = [12, 32, 25]
    with torch.no_grad():
        one = batch_of(lengths, dtype=torch.float64)
        other = batch_of(lengths[::-1], dtype=torch.float64, total=60, padding=float("inf"))
        forwards, backwards = detector.decode(detector(one), one), detector.decode(detector(other), other)[::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert a.video == b.video
        assert torch.allclose(a.scores, b.scores, atol=1e-10)
        assert torch.allclose(a.segments_s, b.segments_s, atol=1e-8)


def test_coarser_masks_follow_from_the_first_where_a_batch_has_none():
    detector = detector_of(**FRAMES).double()
    batch = batch_of([32, 14], dtype=torch.float64, shapes=frame_shapes())
    with torch.no_grad():
        given = detector(batch)
        batch.masks = {}
        derived = detector(batch)
    assert torch.equal(given.logits, derived.logits)


# ---- loss --------------------------------------------------------------------------------------------------------
def test_late_fusion_trains_every_stream_as_if_alone():
    truths = [([[3.0, 9.0], [15.0, 27.0]], [0, 2]), ([[0.0, 20.0]], [1])]
    batch = batch_of([32, 20], truths)
    late = detector_of()
    alone = []
    for k, stream in enumerate(("rgb", "flow")):
        single = detector_of(fusion=stream)
        single.networks[0].load_state_dict(late.networks[k].state_dict())
        alone.append(single)
    terms = [detector.loss(detector(batch), batch.targets) for detector in (late, *alone)]
    for name, value in terms[0].items():
        assert value.item() == pytest.approx(terms[1][name].item() + terms[2][name].item(), rel=1e-5)
    sum(terms[0].values()).backward()
    sum(terms[1].values()).backward()
    for a, b in zip(late.networks[0].parameters(), alone[0].networks[0].parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6, rtol=1e-4)


def test_fused_training_learns_from_the_average():
    batch = batch_of([32, 20], [([[3.0, 9.0]], [0]), ([[0.0, 20.0]], [1])])
    fused, apart = detector_of(fused_training=True), detector_of()
    outputs, own = fused(batch), apart(batch)
    assert outputs.distances.shape[0] == 1
    assert torch.allclose(outputs.distances[0], own.distances.mean(0))
    assert torch.allclose(outputs.logits[0], own.logits.mean(0))
    losses = fused.loss(outputs, batch.targets)
    assert losses["classification"] < apart.loss(own, batch.targets)["classification"]  # one, not two
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fused.parameters())


def test_padding_does_not_change_the_loss():
    truths = [([[3.0, 9.0], [15.0, 27.0]], [0, 2])]
    for name in ("talmts", "afsd"):
        detector = detector_of(name).double()
        terms = []
        for batch in (
            batch_of([28], truths, dtype=torch.float64),
            batch_of([28], truths, dtype=torch.float64, total=75, padding=float("nan")),
        ):
            terms.append(detector.loss(detector(batch), batch.targets))
        assert set(terms[0]) >= {"classification", "localisation", "refined_localisation", "quality"}
        assert ("boundaries" in terms[0]) == (name == "afsd")
        for key, value in terms[0].items():
            assert value.item() == pytest.approx(terms[1][key].item(), rel=1e-9)


def test_loss_does_not_grow_with_the_batch():
    truths = ([[3.0, 9.0], [15.0, 27.0]], [0, 2])
    detector = detector_of("afsd").double()
    one, three = batch_of([30], [truths], dtype=torch.float64), batch_of([30] * 3, [truths] * 3, dtype=torch.float64)
    ours, theirs = (detector.loss(detector(b), b.targets) for b in (one, three))
    assert {k: v.item() for k, v in ours.items()} == pytest.approx({k: v.item() for k, v in theirs.items()}, rel=1e-9)


ODD = {
    "none": ([], []),
    "longer than the clip": ([[-20.0, 90.0]], [1]),
    "shorter than a row": ([[4.2, 4.4]], [0]),
    "shorter, round a centre": ([[4.45, 4.55]], [0]),
    "without length": ([[4.0, 4.0]], [0]),
    "beyond the end": ([[300.0, 310.0]], [2]),
    "across the start": ([[-3.0, 4.0]], [2]),
    "two labels": ([[2.0, 8.0], [2.0, 8.0]], [0, 1]),
    "many": ([[i * 0.5, i * 0.5 + 3] for i in range(40)], [i % 3 for i in range(40)]),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("length", [1, 25])
@pytest.mark.parametrize("detector_name", ["talmts", "afsd"])
def test_odd_truths_give_finite_losses_and_gradients(name, length, detector_name):
    detector = detector_of(detector_name).train()
    batch = batch_of([length], [ODD[name]])
    losses = detector.loss(detector(batch), batch.targets)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    for parameter_name, parameter in detector.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all()
    if name in ("none", "without length", "beyond the end", "shorter than a row"):
        assert losses["localisation"] == losses["refined_localisation"] == losses["quality"] == 0
    elif name in ("longer than the clip", "across the start"):  # learnt as far as it is seen
        assert losses["localisation"] > 0


def test_two_classes_on_one_segment_are_both_learnt():
    truths = [([[4.0, 26.0], [4.0, 26.0]], [0, 2])]
    detector, batch = detector_of(fusion="rgb").train(), batch_of([32], truths)
    outputs = detector(batch)
    torch.manual_seed(0)
    drawn = {round(detector.loss(outputs, batch.targets)["classification"].item(), 6) for _ in range(4)}
    assert len(drawn) > 1
    detector.eval()
    assert len({detector.loss(outputs, batch.targets)["classification"].item() for _ in range(3)}) == 1


def test_bounds_say_which_level_learns_what():
    # 24 rows long: its farther end is 12 to 24 rows from any place inside
    truths = [([[2.0, 26.0]], [0])]
    batch = batch_of([32], truths)
    weights = []
    for bounds in (None, [[0, 4], [2, 8], [4, 16], [8, 32]], [[0, 4], [0, 4], [0, 4], [0, 4]]):
        detector = detector_of(bounds=bounds, fusion="rgb")
        outputs = detector(batch)
        outputs.distances.retain_grad()
        detector.loss(outputs, batch.targets)["localisation"].backward()
        touched = outputs.distances.grad[0, 0].abs().sum(1) > 0
        weights.append(set(outputs.levels.strides[touched].tolist()))
    assert weights == [{1.0, 2.0, 4.0, 8.0}, {4.0, 8.0}, set()]
    anet = detector_of(bounds="activitynet", rows=96, pyramid_levels=6)
    assert anet.bounds.tolist() == [[low / 8, high / 8] for low, high in ACTIVITYNET_BOUNDS]
    for wrong in ("other", [[0, 1]], [[2, 1]] * 4):
        with pytest.raises(RecipeError, match="bounds"):
            detector_of(bounds=wrong)


# ---- decoding ----------------------------------------------------------------------------------------------------
def by_hand(detector, outputs, rule):
    """Eq. 13 place by place: (score, label, start, end) in seconds of a clip of 20 rows."""
    levels, expected = outputs.levels, []
    streams = range(len(outputs.distances))
    for n in torch.nonzero(levels.mask[0]).flatten().tolist():
        center, stride = levels.centers[n].item(), levels.strides[n].item()
        raw = outputs.distances[:, 0, n].tolist()
        moves = outputs.offsets[:, 0, n].tolist()
        if rule == "mean":
            raw = [[sum(r[e] for r in raw) / len(raw) for e in (0, 1)]]
            moves = [[sum(m[e] for m in moves) / len(moves) for e in (0, 1)]]
        finals = []
        for (before, after), (shift_start, shift_end) in zip(raw, moves, strict=True):
            start, end = center - stride * math.exp(before), center + stride * math.exp(after)
            length = end - start
            finals.append((start + 0.5 * length * shift_start, end + 0.5 * length * shift_end))
        if rule == "mean":
            start, end = finals[0]
        else:
            start, end = (math.sqrt(max(finals[0][e], 0) * max(finals[1][e], 0)) for e in (0, 1))
        coarse = (sum(outputs.logits[s, 0, n] for s in streams) / len(streams)).softmax(0)
        refined = (sum(outputs.refined_logits[s, 0, n] for s in streams) / len(streams)).softmax(0)
        quality = (sum(outputs.quality[s, 0, n] for s in streams) / len(streams)).sigmoid()
        start_s, end_s = (min(max(x, 0.0), 20.0) * 0.5 for x in (start, end))
        if end_s > start_s:
            for label in range(3):
                score = 0.5 * (coarse[label + 1] + refined[label + 1]) * quality
                expected.append((score.item(), label, start_s, end_s))
    return sorted(expected, reverse=True)


@pytest.mark.parametrize("rule", ["mean", "sqrt"])
def test_decoding_equals_equation_13_by_hand(rule):
    detector = detector_of(boundary_fusion=rule).double()
    batch = batch_of([20], dtype=torch.float64)
    with torch.no_grad():
        outputs = detector(batch)
        found = detector.decode(outputs, batch)[0]
    expected = by_hand(detector, outputs, rule)
    assert len(found) == len(expected) > 50
    ours = sorted(
        zip(found.scores.tolist(), found.labels.tolist(), *found.segments_s.T.tolist(), strict=True), reverse=True
    )
    assert np.allclose(np.array(ours), np.array(expected), atol=1e-9)
    detector.max_detections = 7
    assert detector.decode(outputs, batch)[0].scores.tolist() == pytest.approx([e[0] for e in expected[:7]])


def test_one_stream_is_what_its_fusion_says():
    late = detector_of()
    batch = batch_of([20])
    with torch.no_grad():
        outputs = late(batch)
        for k, stream in enumerate(("rgb", "flow")):
            single = detector_of(fusion=stream)
            assert single.needs == (LevelSpec(stream, "features", "windowed", 32),)
            single.networks[0].load_state_dict(late.networks[k].state_dict())
            assert torch.equal(single(batch).logits[0], outputs.logits[k])


def test_outputs_that_are_not_finite_are_refused():
    detector = detector_of()
    batch = batch_of([20])
    batch.features["rgb"][0, 0, 3] = float("nan")
    with torch.no_grad(), pytest.raises(WeightsError, match="video_20"):
        detector.decode(detector(batch), batch)


def test_far_boundaries_stay_finite():
    detector = detector_of()
    with torch.no_grad():
        for network in detector.networks:
            network.distances.bias.fill_(1e4)
        batch = batch_of([20])
        found = detector.decode(detector(batch), batch)[0]
    assert found.segments_s.isfinite().all()
    assert found.segments_s.max() <= 10.0


# ---- frames and maps ---------------------------------------------------------------------------------------------
def test_frames_and_maps_are_read_and_trained_on():
    truths = [([[3.0, 9.0], [15.0, 27.0]], [0, 2]), ([[0.0, 13.0]], [1])]
    batch = batch_of([32, 14], truths, shapes=frame_shapes())
    batch.features["frames"] = batch.features["frames"].to(torch.uint8)
    detector = detector_of(**FRAMES).train()
    assert detector.needs == (
        LevelSpec("rgb", "s4-map", "windowed", 32),
        LevelSpec("rgb", "s8-map", "windowed", 16),
        LevelSpec("frames", "features", "windowed", 128),
    )
    optimizer = torch.optim.Adam(detector.parameters(), lr=2e-3)
    totals = []
    for _ in range(5):
        total = sum(detector.loss(detector(batch), batch.targets).values())
        optimizer.zero_grad()
        total.backward()
        missing = [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.any()]
        assert not [name for name in missing if "key" not in name and not name.endswith("project.bias")]
        optimizer.step()
        totals.append(total.item())
    assert totals[1] < totals[0]
    assert totals[-1] < 0.95 * totals[0]


@pytest.mark.parametrize(("module", "heads"), [("stt", {"logits"}), ("fsa", {"offsets", "refined_logits", "quality"})])
def test_each_module_reaches_what_the_paper_feeds_with_it(module, heads):
    detector = detector_of(**{**FRAMES, "stt": module == "stt", "fsa": module == "fsa"})
    batch = batch_of([32], shapes=frame_shapes())
    with torch.no_grad():
        before = detector(batch)
        batch.features["frames"] = 255 - batch.features["frames"]
        after = detector(batch)
    changed = {
        name
        for name in ("distances", "logits", "offsets", "refined_logits", "quality")
        if not torch.equal(getattr(before, name), getattr(after, name))
    }
    # the class branch goes on into the refined class; distances come of the pyramid alone (Eq. 3)
    assert changed == (heads | {"refined_logits"})


def test_streams_may_have_frames_of_their_own():
    channels = {"i3d-rgb": 9, "i3d-flow": 9, "frames": 3, "flow-frames": 2}
    frames = {"i3d-rgb": "frames", "i3d-flow": "flow-frames"}
    detector = detector_of(**{**FRAMES, "channels": channels, "frames": frames})
    assert [need.stream for need in detector.needs] == ["i3d-rgb", "i3d-flow"] * 2 + ["frames", "flow-frames"]
    assert [network.stt.embed.shape for network in detector.networks] == [(3, 8, 8), (2, 8, 8)]
    flow = detector_of(**{**FRAMES, "channels": channels, "frames": frames, "fusion": "flow"})
    assert [need.stream for need in flow.needs] == ["i3d-flow", "i3d-flow", "flow-frames"]


# ---- recipes -----------------------------------------------------------------------------------------------------
WRONG = [
    ({"stt": True}, "stt and fsa read frames"),
    ({"fsa": True}, "stt and fsa read frames"),
    ({"frames": "frame"}, "'frame' is not among"),
    ({"frames": {"rgb": "flow"}, "channels": {**CHANNELS, "more": 3}, "stt": True}, "every stream"),
    ({"channels": {"a": 1, "b": 1, "c": 1}, "fusion": "rgb"}, "one of two streams"),
    ({"channels": {}}, "at least one stream"),
    ({"channels": {"frames": 3}, "frames": "frames"}, "at least one stream"),
    ({"rows": 4}, "at least 8"),
    ({"rows": "auto"}, "resolve"),
    ({"rows": 33, "levels": ["a", "b"]}, "multiple of 2"),
    ({"levels": "features"}, "list of names"),
    ({"levels": []}, "list of names"),
    ({"levels": ["a", "a"]}, "repeat"),
    ({"levels": ["a"], "level_channels": {"b": 3}}, "must name the levels a, got b"),
    ({"levels": ["a"], "level_channels": {"a": [1, 2]}}, "height, width"),
    ({"levels": ["a"], "level_channels": {"a": 0}}, "height, width"),
    ({"levels": ["a"], "level_channels": {"a": "6x6"}}, "height, width"),
    ({"levels": ["a", "b"], "pyramid_levels": 1}, "less than the 2 levels"),
    ({"width": 9}, "multiple of 2"),
    ({"width": 7, "norm_groups": 7}, "multiple of 2"),
    ({"row_kernel": 2}, "odd"),
    ({"transformer_width": 12}, "multiple of 8"),
    ({"fusion": "both"}, "fusion"),
    ({"boundary_fusion": "max"}, "boundary_fusion"),
    ({"refine_loss": "l2"}, "refine_loss"),
    ({"rfp_interpolation": "cubic"}, "rfp_interpolation"),
    ({"quality_over": "all"}, "quality_over"),
    ({"layout": "full"}, "layout"),
    ({"focal_alpha": 1.5}, "focal_alpha"),
    ({"boundary_weight": -1.0}, "boundary_weight"),
    ({"classes": 0}, "classes"),
    ({"frame_size": [96]}, "frame_size"),
]


@pytest.mark.parametrize(("model", "match"), WRONG)
def test_values_that_do_not_fit_are_refused(model, match):
    options = {"channels": CHANNELS, **SMALL, **ROWS, **model}
    with pytest.raises(RecipeError, match=match):
        build_detector("talmts", **options)


def test_afsd_is_talmts_without_its_modules():
    assert DETECTORS["talmts"] is TALMTS
    assert DETECTORS["afsd"] is AFSD
    afsd = build_detector("afsd", channels=CHANNELS, **SMALL)
    assert not any(network.stt or network.fsa or network.pyramid.refined for network in afsd.networks)
    ours, theirs = (inspect.signature(cls).parameters for cls in (TALMTS, AFSD))
    assert list(ours) == list(theirs)  # what build_detector lets through, and `tad recipe show` shows
    assert {name for name in ours if ours[name].default != theirs[name].default} == set(AFSD_DEFAULTS)
    assert all(theirs[name].default == value for name, value in AFSD_DEFAULTS.items())
    same = build_detector("talmts", channels=CHANNELS, **SMALL, **AFSD_DEFAULTS)
    same.load_state_dict(afsd.state_dict())
    batch = batch_of([30], [([[3.0, 9.0]], [1])])
    terms = [d.eval().loss(d(batch), batch.targets) for d in (afsd, same)]
    assert terms[0] == terms[1]
    with pytest.raises(RecipeError, match="stt and fsa"):
        build_detector("talmts", channels=CHANNELS, **SMALL)


def test_clips_as_long_as_most_actions():
    lengths = np.array([3.0] * 90 + [100.0] * 8 + [300.0] * 2)
    assert TALMTS.resolve({"rows": "auto"}, lengths)["rows"] == 128
    assert TALMTS.resolve({"rows": "auto"}, np.zeros(0))["rows"] == 64
    assert TALMTS.resolve({"rows": "auto"}, np.full(9, 1e6))["rows"] == 1024
    assert AFSD.resolve({"rows": 96, "width": 4}, lengths) == {"rows": 96, "width": 4}
    with pytest.raises(RecipeError, match="levels"):
        TALMTS.resolve({"rows": "auto", "levels": ["s4", "s8"]}, lengths)


@pytest.mark.parametrize("name", ["talmts", "afsd"])
def test_a_named_detector_has_a_recipe(name):
    recipe = detect_recipe(name, streams=["rgb", "flow"])
    model = DETECTORS[name].resolve(recipe.model, np.array([20.0]))
    detector = build_detector(name, channels={"rgb": 16, "flow": 16}, classes=3, **model)
    assert [need.rows for need in detector.needs] == [64, 64]


# ---- learning ----------------------------------------------------------------------------------------------------
def planted(seed, *, rows=64):
    """A clip of noise with actions of two classes in it, and its truth."""
    rng = np.random.default_rng(seed)
    features, at, segments, labels = 0.5 * rng.standard_normal((8, rows)), int(rng.integers(1, 8)), [], []
    while at + 24 < rows:
        label, length = int(rng.integers(2)), int(rng.choice([4, 9, 20]))
        features[label * 3 : label * 3 + 3, at : at + length] += 2.0
        segments.append([at, at + length])
        labels.append(label)
        at += length + int(rng.integers(3, 8))
    return features, (segments, labels)


@pytest.mark.parametrize("name", ["talmts", pytest.param("afsd", marks=pytest.mark.slow)])
def test_learns_planted_actions(name):
    torch.manual_seed(0)
    options = {"rows": 64, "pyramid_levels": 5, "width": 32, "norm_groups": 4, "frame_factor": 1, "classes": 2}
    modules = {"stt": False, "fsa": False} if name == "talmts" else {}
    detector = build_detector(name, channels={"rgb": 8}, **options, **modules)
    optimizer = torch.optim.Adam(detector.parameters(), lr=3e-3)

    def clips(seeds):
        made = [planted(seed) for seed in seeds]
        batch = batch_of([64] * len(made), [truth for _, truth in made], shapes={"rgb": ((8,), 1.0)})
        batch.features["rgb"] = torch.tensor(np.stack([x for x, _ in made]), dtype=torch.float32)
        batch.videos = [f"clip_{seed}" for seed in seeds]
        return batch

    detector.train()
    for step in range(130):
        batch = clips(range(8 * (step % 8), 8 * (step % 8) + 8))
        total = sum(detector.loss(detector(batch), batch.targets).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    detector.eval()
    test = clips(range(1000, 1012))
    with torch.no_grad():
        found = detector.decode(detector(test), test)
    hits = total_truths = 0
    for segments, target in zip(found, test.targets, strict=True):
        kept = suppress(segments, PostprocessRecipe(method="nms", tiou=0.4, max_segments=len(target.labels)))
        for truth, label in zip(target.segments * 0.5, target.labels, strict=True):
            own = kept.segments_s[kept.labels == label]
            total_truths += 1
            hits += bool(len(own)) and paired_tiou(own, truth).max().item() > 0.6
    assert hits / total_truths > 0.8


def test_half_precision_trains_and_detects():
    batch = batch_of([32, 13], [([[3.0, 9.0]], [1]), ([[2.0, 12.0]], [2])], shapes=frame_shapes())
    detector = detector_of(**FRAMES, boundary_weight=1.0).train()
    exact = detector.loss(detector(batch), batch.targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = detector.loss(detector(batch), batch.targets)
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())
    for name in ("classification", "localisation", "boundaries"):
        assert losses[name].item() == pytest.approx(exact[name].item(), rel=0.05)


def test_trains_and_detects_from_a_store(tmp_path):
    torch.set_num_threads(1)
    store, annotations = make_world(tmp_path, training=8, testing=2, rows=(20, 60))
    model = {"rows": 32, "pyramid_levels": 4, "width": 16, "norm_groups": 4, "stt": False, "fsa": False}
    recipe = DetectRecipe.model_validate(
        {
            "detector": "talmts",
            "streams": ["rgb", "flow"],
            "model": {**model, "frame_factor": 1, "fused_training": True},
            "data": {"holdout": 0.0},
            "train": {"epochs": 3, "batch_videos": 4, "lr": 3e-3, "select": "last"},
        }
    )
    train_detector(recipe, store=store, annotations=annotations, out=tmp_path / "run", device="cpu")
    found = [
        detect(run=tmp_path / "run", store=store, subset="validation", annotations=annotations, batch_videos=n)
        for n in (1, 3)
    ]
    assert set(found[0]["video"]) == {"video_008", "video_009"}
    assert (found[0]["end_s"] > found[0]["start_s"]).all()
    assert np.allclose(found[0]["score"], found[1]["score"], atol=1e-4)


def test_the_same_seed_gives_the_same_step():
    batch = batch_of([30, 20], [([[3.0, 9.0]], [1]), ([[2.0, 14.0], [2.0, 14.0]], [0, 2])])
    detector = detector_of().train()
    gradients = []
    for clone in (detector, copy.deepcopy(detector)):
        torch.manual_seed(5)
        sum(clone.loss(clone(batch), batch.targets).values()).backward()
        gradients.append([p.grad for p in clone.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_code_of_the_documentation_runs():
    text = (Path(__file__).parents[2] / "docs" / "talmts.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/talmts.md", "exec"), {})
    shown = set(re.findall(r"`(\w+)(?:: [^`]*)?`", text))
    keywords = set(inspect.signature(TALMTS).parameters) - {"channels", "classes"}
    # every option but those that explain themselves
    assert keywords - shown <= {"layout", "row_kernel", "tower_convs", "max_detections"}
