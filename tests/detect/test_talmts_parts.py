"""The parts of TAL-MTS against slow references: pyramid, RFP, frames, transformers, assignment, losses."""

import math

import pytest
import torch
from torch.nn import functional as F

from tad.detect.detectors.talmts_frames import (
    FrameSelfAttention,
    PatchEmbedding,
    SelfAttention,
    SpatialTemporalTransformer,
    patches_of,
)
from tad.detect.detectors.talmts_layers import (
    ConvBlock,
    Downsample,
    FeaturePyramid,
    FrameBranch,
    Lateral,
    Levels,
    upsampled,
)
from tad.detect.detectors.talmts_losses import assign, boundary_loss, detection_losses, refined_segments, softmax_focal
from tad.detect.segments import paired_generalised_tiou, paired_tiou
from tad.errors import RecipeError


def masks_of(*counts, total):
    return torch.arange(total) < torch.tensor(counts)[:, None]


# ---- levels, convolutions ----------------------------------------------------------------------------------------
def test_levels_lie_one_behind_the_other():
    levels = Levels([masks_of(6, 3, total=6), masks_of(3, 2, total=3), masks_of(2, 1, total=2)])
    assert levels.mask.int().tolist() == [
        [1] * 6 + [0] + [1] * 3 + [0] + [1, 1, 0],
        [1] * 3 + [0] * 4 + [1, 1, 0, 0, 1, 0, 0],
    ]
    assert levels.centers[:6].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    assert levels.centers[7:10].tolist() == [1.0, 3.0, 5.0]
    assert levels.centers[11:13].tolist() == [2.0, 6.0]
    assert levels.strides.tolist() == [1.0] * 7 + [2.0] * 4 + [4.0] * 3
    assert levels.begin.tolist() == [0] * 7 + [7] * 4 + [11] * 3
    assert levels.rows.tolist() == [[6] * 7 + [3] * 4 + [2] * 3, [3] * 7 + [2] * 4 + [1] * 3]
    parts = [torch.randn(2, 5, n) for n in (6, 3, 2)]
    joined = levels.joined(parts)
    assert not joined[..., [6, 10, 13]].any()
    assert all(torch.equal(a, b) for a, b in zip(levels.split(joined), parts, strict=True))


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_block_on_all_levels_is_the_block_on_each_alone(kernel):
    torch.manual_seed(0)
    block = ConvBlock(4, 6, kernel, groups=3).double()
    torch.nn.init.normal_(block.norm.weight)
    torch.nn.init.normal_(block.norm.bias)
    masks = [masks_of(8, 5, total=8), masks_of(4, 3, total=4)]
    parts = [torch.randn(2, 4, m.shape[1]).double() * m[:, None] for m in masks]
    levels = Levels(masks)
    found = levels.split(block(levels.joined(parts), levels))
    for part, mask, ours in zip(parts, masks, found, strict=True):
        for b in range(2):
            rows = int(mask[b].sum())
            y = F.conv1d(part[b : b + 1, :, :rows], block.conv.weight, block.conv.bias, padding=kernel // 2)
            y = F.relu(F.group_norm(y, 3, block.norm.weight, block.norm.bias))[0]
            assert torch.allclose(ours[b, :, :rows], y, atol=1e-12)
            assert not ours[b, :, rows:].any()


@pytest.mark.parametrize("rows", [1, 2, 7, 8])
def test_downsampling_sees_rows_2j_to_2j_plus_2(rows):
    torch.manual_seed(0)
    layer = Downsample(4, 6, groups=2).double()
    x = torch.randn(1, 4, 12).double()
    x[..., rows:] = 0
    found, mask = layer(x, masks_of(rows, total=12))
    count = math.ceil(rows / 2)
    assert found.shape == (1, 6, 6)
    assert mask.sum() == count
    padded = F.pad(x[..., :rows], (0, 4))
    slow = torch.stack(
        [
            sum(layer.conv.weight[:, :, k] @ padded[0, :, 2 * j + k] for k in range(3)) + layer.conv.bias
            for j in range(count)
        ],
        1,
    )
    slow = F.relu(F.group_norm(slow[None], 2))
    assert torch.allclose(found[..., :count], slow, atol=1e-12)
    assert not found[..., count:].any()


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_map_is_read_whole_and_a_row_is_a_map_of_one_pixel(kernel):
    torch.manual_seed(0)
    layer = Lateral((3, 4, 2), 4, kernel=kernel, groups=2).double()
    x = torch.randn(2, 3, 5, 4, 2).double()
    mask = masks_of(5, 3, total=5)
    garbage = x.clone()
    garbage[1, :, 3:] = float("nan")
    found = layer(garbage, mask)
    for b, rows in ((0, 5), (1, 3)):
        padded = F.pad(x[b, :, :rows], (0, 0, 0, 0, kernel // 2, kernel // 2))
        slow = torch.stack(
            [
                torch.einsum("octhw,cthw->o", layer.conv.weight, padded[:, t : t + kernel]) + layer.conv.bias
                for t in range(rows)
            ],
            1,
        )
        slow = F.relu(F.group_norm(slow[None], 2))[0]
        assert torch.allclose(found[b, :, :rows], slow, atol=1e-10)
        assert not found[b, :, rows:].any()
    rows_layer = Lateral((3,), 4, kernel=kernel, groups=2).double()
    with torch.no_grad():
        rows_layer.conv.weight.copy_(layer.conv.weight[..., :1, :1])
    pixel = Lateral((3, 1, 1), 4, kernel=kernel, groups=2).double()
    pixel.load_state_dict(rows_layer.state_dict())
    assert torch.equal(rows_layer(x[..., 0, 0], mask), pixel(x[..., :1, :1], mask))
    with pytest.raises(RecipeError, match=r"\(3, 4, 2\)"):
        layer(x[..., :1], mask)


# ---- interpolation and RFP ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("nearest", [1.0, 1.0, 5.0, 5.0, 9.0, 9.0, 9.0]),
        ("linear", [1.0, 2.0, 4.0, 6.0, 8.0, 9.0, 9.0]),
    ],
)
def test_interpolation_by_hand(mode, expected):
    x = torch.tensor([[[1.0, 5.0, 9.0, float("nan")]]])
    found = upsampled(x, masks_of(3, total=4), factor=2, rows=7, mode=mode)
    assert found[0, 0].tolist() == expected
    assert upsampled(x, masks_of(3, total=4), factor=1, rows=3, mode=mode)[0, 0].tolist() == [1.0, 5.0, 9.0]
    longer = upsampled(x[..., :3], masks_of(3, total=3), factor=4, rows=15, mode=mode)
    assert longer.shape == (1, 1, 15)
    assert (longer[..., 12:] == 9.0).all()


def pyramid(refined, mode="nearest", shapes=((5,),), levels=4):
    torch.manual_seed(0)
    return FeaturePyramid(
        shapes=shapes, width=4, levels=levels, groups=2, kernel=1, refined=refined, mode=mode
    ).double()


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_rfp_adds_every_level_above_down_to_the_finest(mode):
    x, mask = torch.randn(2, 5, 11).double(), masks_of(11, 6, total=11)
    raw, masks = pyramid(False)([x], [mask])
    refined, _ = pyramid(True, mode)([x], [mask])
    assert [m.sum(1).tolist() for m in masks] == [[11, 6], [6, 3], [3, 2], [2, 1]]
    assert torch.equal(refined[3], raw[3])
    for b in range(2):
        above = None
        for k in (3, 2, 1, 0):
            count = int(masks[k][b].sum())
            expected = raw[k][b, :, :count].clone()
            if above is not None:
                for i in range(count):
                    place = min(max((i + 0.5) / 2 - 0.5, 0.0), above.shape[1] - 1.0)
                    low, share = (i // 2, 0.0) if mode == "nearest" else (int(place), place - int(place))
                    high = min(low + 1, above.shape[1] - 1)
                    expected[:, i] += (1 - share) * above[:, low] + share * above[:, high]
            assert torch.allclose(refined[k][b, :, :count], expected, atol=1e-12)
            assert not refined[k][b, :, count:].any()
            above = expected
    assert sum(p.numel() for p in pyramid(True).parameters()) == sum(p.numel() for p in pyramid(False).parameters())


def test_without_rfp_only_stored_levels_add_the_stored_one_above():
    shapes = ((3, 2, 2), (5, 1, 1))
    stored = [torch.randn(1, 3, 8, 2, 2).double(), torch.randn(1, 5, 4, 1, 1).double()]
    masks = [masks_of(8, total=8), masks_of(4, total=4)]
    network = pyramid(False, shapes=shapes)
    found, _ = network(stored, masks)
    own = [lateral(x, m) for lateral, x, m in zip(network.lateral, stored, masks, strict=True)]
    assert torch.equal(found[0], own[0] + own[1].repeat_interleave(2, 2))
    assert torch.equal(found[1], own[1])
    refined, _ = pyramid(True, shapes=shapes)(stored, masks)
    assert torch.allclose(refined[0], own[0] + refined[1].repeat_interleave(2, 2))  # the level above once, not twice
    assert [f.shape[2] for f in found] == [8, 4, 2, 1]


def test_frame_level_feature_has_factor_rows_for_each_of_level_0():
    torch.manual_seed(0)
    branch = FrameBranch(width=4, groups=2, factor=4, mode="linear").double()
    x = torch.randn(2, 4, 6).double()
    both = branch(x * masks_of(6, 3, total=6)[:, None], masks_of(6, 3, total=6))
    alone = branch(x[1:, :, :3], masks_of(3, total=3))
    assert both.shape == (2, 4, 24)
    assert torch.allclose(both[1:, :, :12], alone, atol=1e-12)
    assert not both[1, :, 12:].any()


# ---- frames ------------------------------------------------------------------------------------------------------
def frames_of(batch=1, channels=3, count=5, height=4, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, channels, count, height, width), generator=generator, dtype=torch.uint8)


def test_patches_are_blocks_of_pixels_row_by_row():
    frames = frames_of(batch=2)
    patches = patches_of(frames, 2)
    assert patches.shape == (2, 5, 6, 12)
    for z in range(6):
        top, left = 2 * (z // 3), 2 * (z % 3)
        block = frames[1, :, 4, top : top + 2, left : left + 2]
        assert torch.equal(patches[1, 4, z], block.flatten())


def test_pixels_are_scaled_and_places_embedded():
    embed = PatchEmbedding(channels=3, size=(4, 6), patch=2, width=8).double()
    frames = frames_of()
    patch = patches_of(frames, 2)[0, 2, 4].double()
    expected = embed.project.weight @ (patch / 255 * 2 - 1) + embed.project.bias + embed.position[4]
    assert torch.allclose(embed(frames)[0, 2, 4], expected)
    assert torch.allclose(embed(frames.float())[0, 2, 4], expected)  # as the data path hands them over
    with pytest.raises(RecipeError, match="frame_size"):
        embed(frames[..., :4])
    with pytest.raises(RecipeError, match="do not fill"):
        PatchEmbedding(channels=3, size=(4, 6), patch=4, width=8)


@pytest.mark.parametrize("residual", [False, True])
def test_attention_equals_a_loop_over_heads_and_rows(residual):
    torch.manual_seed(0)
    layer = SelfAttention(width=6, heads=2, residual=residual).double()
    x, mask = torch.randn(2, 5, 6).double(), masks_of(5, 3, total=5)
    found = layer(x, mask)
    for b in range(2):
        rows = int(mask[b].sum())
        q, k, v = layer.project(F.layer_norm(x[b], (6,))).chunk(3, -1)
        joined = torch.zeros(5, 6, dtype=torch.float64)
        for head in (slice(0, 3), slice(3, 6)):
            for i in range(5):
                weights = torch.softmax(q[i, head] @ k[:rows, head].T / math.sqrt(3), 0)
                joined[i, head] = weights @ v[:rows, head]
        expected = layer.out(joined) + (x[b] if residual else 0)
        assert torch.allclose(found[b], expected, atol=1e-12)


def stt(*, factor=1, levels=1, frames=8, seed=0):
    torch.manual_seed(seed)
    options = {"channels": 3, "size": (4, 6), "patch": 2, "hidden": 8, "heads": 2, "width": 4, "residual": False}
    return SpatialTemporalTransformer(frames=frames, factor=factor, levels=levels, groups=2, **options).double()


def shuffled_patches(frames, order):
    """The frames with their 2x2 blocks in another order."""
    result = torch.empty_like(frames)
    for z, source in enumerate(order):
        (top, left), (above, beside) = ((2 * (k // 3), 2 * (k % 3)) for k in (z, source))
        result[..., top : top + 2, left : left + 2] = frames[..., above : above + 2, beside : beside + 2]
    return result


def test_stt_gives_the_lengths_of_the_pyramid():
    network = stt(factor=4, levels=3, frames=32)
    found = network(frames_of(2, count=32), masks_of(32, 12, total=32))
    assert [x.shape for x in found] == [(2, 4, 8), (2, 4, 4), (2, 4, 2)]
    assert not found[0][1, :, 3:].any()
    assert found[0][1, :, :3].any()
    with pytest.raises(RecipeError, match="power of 2"):
        stt(factor=3)
    with pytest.raises(RecipeError, match="33 frames"):
        network(frames_of(count=33), masks_of(33, total=33))


def test_stt_knows_places_by_their_embedding_alone():
    network, frames, mask = stt(), frames_of(count=8), masks_of(8, total=8)
    order = [4, 2, 0, 5, 1, 3]
    moved = shuffled_patches(frames, order)
    assert not torch.allclose(network(frames, mask)[0], network(moved, mask)[0])
    with torch.no_grad():
        embedded = network.embed.position.clone()
        network.embed.position.copy_(embedded[order])  # each block finds its old place at its new one
        with_places = network(moved, mask)[0]
        network.embed.position.copy_(embedded)
    assert torch.allclose(with_places, network(frames, mask)[0], atol=1e-12)


def test_stt_knows_the_order_of_frames_by_their_embedding_alone():
    network, frames, mask = stt(), frames_of(count=8), masks_of(8, total=8)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    assert not torch.allclose(network(frames[:, :, order], mask)[0], network(frames, mask)[0][..., order])
    torch.nn.init.zeros_(network.temporal_position)
    assert torch.allclose(network(frames[:, :, order], mask)[0], network(frames, mask)[0][..., order], atol=1e-12)


def test_stt_sees_the_whole_clip_but_no_padding():
    network, frames = stt(factor=2, levels=2), frames_of(count=8)
    mask = masks_of(6, total=8)
    before = network(frames, mask)
    padded = frames.clone()
    padded[:, :, 6:] = 255
    assert all(torch.equal(a, b) for a, b in zip(before, network(padded, mask), strict=True))
    alone = network(frames[:, :, :6], masks_of(6, total=6))
    assert torch.allclose(before[0][..., :3], alone[0], atol=1e-12)
    changed = frames.clone()
    changed[:, :, 5] = 0
    assert not torch.allclose(network(changed, mask)[0][..., 0], before[0][..., 0])  # the far end is seen


def fsa():
    torch.manual_seed(0)
    options = {"channels": 3, "size": (4, 6), "patch": 2, "hidden": 8, "heads": 2, "width": 4, "residual": False}
    return FrameSelfAttention(**options).double()


def test_fsa_sees_each_frame_by_itself():
    network, frames = fsa(), frames_of(2, count=7)
    found = network(frames)
    assert found.shape == (2, 4, 7)
    for b in range(2):
        for t in range(7):
            one = network(frames[b : b + 1, :, t : t + 1])
            assert torch.allclose(found[b : b + 1, :, t : t + 1], one, atol=1e-12)


def test_fsa_relates_the_patches_of_a_frame_and_knows_their_places():
    network, frames = fsa(), frames_of()
    moved = shuffled_patches(frames, [1, 0, 2, 3, 4, 5])
    assert not torch.allclose(network(frames), network(moved))
    with torch.no_grad():  # without places, and every patch weighed alike, their order says nothing
        torch.nn.init.zeros_(network.embed.position)
        network.linear.weight.copy_(network.linear.weight[:, :8].repeat(1, 6))
    assert torch.allclose(network(frames), network(moved), atol=1e-12)
    changed = frames.clone()
    changed[..., :2, :2] = 0  # the first patch reaches what the others contribute
    encoded = [network.encoder(network.embed(x).flatten(0, 1))[:, 1:] for x in (frames, changed)]
    assert not torch.allclose(*encoded)


# ---- assignment --------------------------------------------------------------------------------------------------
def slow_assign(centers, segments, labels, bounds=None):
    classes, chosen = [], []
    for n, center in enumerate(centers.tolist()):
        best = None
        for (start, end), label in zip(segments.tolist(), labels.tolist(), strict=True):
            if not start <= center <= end:
                continue
            farther = max(center - start, end - center)
            if bounds is not None and not bounds[n, 0] < farther <= bounds[n, 1]:
                continue
            if best is None or end - start < best[0]:
                best = end - start, label + 1, (start, end)
        classes.append(best[1] if best else 0)
        chosen.append(best[2] if best else None)
    return classes, chosen


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_every_place_learns_the_shortest_action_round_it(seed, bounded):
    generator = torch.Generator().manual_seed(seed)
    levels = Levels([torch.ones(1, n, dtype=torch.bool) for n in (32, 16, 8)])
    start = torch.rand(7, generator=generator).double() * 28
    segments = torch.stack((start, start + 25 * torch.rand(7, generator=generator).double() ** 2), 1)
    segments[0] = torch.tensor([4.5, 10.5])  # both ends on centres
    labels = torch.arange(7)
    bounds = torch.tensor([[0.0, 4.0], [2.0, 8.0], [6.0, 64.0]])[levels.strides.log2().long()] if bounded else None
    classes, truths = assign(levels.centers.double(), segments, labels, bounds=bounds)
    expected, chosen = slow_assign(levels.centers, segments, labels, bounds)
    assert classes.tolist() == expected
    assert len(set(expected)) > 3
    assert 0 in expected
    for ours, theirs in zip(truths.tolist(), chosen, strict=True):
        assert theirs is None or ours == pytest.approx(theirs)


def test_two_classes_on_one_segment_take_turns():
    centers = torch.arange(400) / 40 + 0.01
    segments, labels = torch.tensor([[0.0, 10.0], [2.0, 6.0], [2.0, 6.0]]), torch.tensor([0, 1, 2])
    fixed, _ = assign(centers, segments, labels)
    assert fixed.unique().tolist() == [1, 2]
    torch.manual_seed(0)
    drawn, truths = assign(centers, segments, labels, draw=True)
    inside = (centers > 2) & (centers < 6)
    assert (drawn[~inside] == 1).all()
    assert 50 < (drawn[inside] == 2).sum() < 110
    assert (drawn[inside] == 2).sum() + (drawn[inside] == 3).sum() == inside.sum()
    assert torch.equal(truths[inside], segments[1].expand(int(inside.sum()), 2))
    nothing, _ = assign(centers, segments[:0], labels[:0], draw=True)
    assert not nothing.any()


# ---- losses ------------------------------------------------------------------------------------------------------
def slow_focal(logits, label, alpha, gamma):
    p = logits.softmax(0)[label]
    return -(alpha if label else 1 - alpha) * (1 - p) ** gamma * p.log()


def test_focal_loss_by_hand():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 0.0]], dtype=torch.float64)
    found = softmax_focal(logits, torch.tensor([0, 2]), alpha=0.75, gamma=2.0)
    p = math.exp(2) / (math.exp(2) + 1 + math.exp(-1))
    assert found[0].item() == pytest.approx(-0.25 * (1 - p) ** 2 * math.log(p))
    p = 1 / (2 + math.exp(3))
    assert found[1].item() == pytest.approx(-0.75 * (1 - p) ** 2 * math.log(p))
    sure = torch.tensor([[200.0, 0.0]], requires_grad=True)
    softmax_focal(sure, torch.tensor([0]), alpha=0.75, gamma=0.5).sum().backward()
    assert sure.grad.isfinite().all()


@pytest.mark.parametrize("quality_over", ["refined", "coarse"])
@pytest.mark.parametrize("refine_loss", ["smooth_l1", "l1"])
def test_losses_equal_a_loop_over_places(quality_over, refine_loss):
    torch.manual_seed(2)
    batch, places, classes = 3, 40, 4
    truths = torch.rand(batch, places, 1).double() * 10 + torch.tensor([0.0, 6.0])
    segments = truths + torch.randn(batch, places, 2).double() * 1.2
    values = {
        "logits": torch.randn(batch, places, classes + 1).double(),
        "offsets": torch.randn(batch, places, 2).double(),
        "refined_logits": torch.randn(batch, places, classes + 1).double(),
        "quality": torch.randn(batch, places).double(),
    }
    labels = torch.randint(0, classes + 1, (batch, places))
    valid = torch.rand(batch, places) > 0.2
    found = detection_losses(
        segments=segments, **values, valid=valid, classes=labels, truths=truths, alpha=0.75, gamma=2.0,
        refine_tiou=0.5, refine_loss=refine_loss, quality_over=quality_over,
    )  # fmt: skip
    sums, coarse, refined, judged = dict.fromkeys(found, 0.0), 0, 0, 0
    for b in range(batch):
        for n in range(places):
            if not valid[b, n]:
                continue
            label, segment, truth = int(labels[b, n]), segments[b, n], truths[b, n]
            good = label > 0 and paired_tiou(segment, truth) > 0.5
            sums["classification"] += slow_focal(values["logits"][b, n], label, 0.75, 2.0)
            sums["refined_classification"] += slow_focal(
                values["refined_logits"][b, n], label if good else 0, 0.75, 2.0
            )
            if label:
                coarse += 1
                sums["localisation"] += 1 - paired_generalised_tiou(segment, truth)
            offsets = values["offsets"][b, n]
            length = segment[1] - segment[0]
            if good:
                refined += 1
                for end in (0, 1):
                    away = abs(offsets[end] - (truth[end] - segment[end]) / (0.5 * length))
                    smooth = 0.5 * away**2 if away < 1 else away - 0.5
                    sums["refined_localisation"] += away if refine_loss == "l1" else smooth
            if good if quality_over == "refined" else label:
                judged += 1
                reached = paired_tiou(segment + 0.5 * length * offsets, truth)
                p = values["quality"][b, n].sigmoid()
                sums["quality"] -= reached * p.log() + (1 - reached) * (1 - p).log()
    assert 0 < refined < coarse
    counts = {"classification": coarse, "localisation": coarse, "quality": judged}
    for name, value in found.items():
        assert value.item() == pytest.approx(sums[name].item() / counts.get(name, refined), rel=1e-9), name


def test_refined_segments_by_hand():
    # length 8: an offset of 1 moves an end by 4
    moved = refined_segments(torch.tensor([2.0, 10.0]), torch.tensor([0.5, -0.25]))
    assert moved.tolist() == [4.0, 9.0]


def test_boundary_supervision_equals_a_loop():
    torch.manual_seed(0)
    features, mask = torch.rand(2, 6, 40).double() * 2, masks_of(40, 25, total=40)
    truths = [torch.tensor([[2.0, 12.0], [15.0, 18.0]]).double(), torch.zeros(0, 2).double()]
    found = boundary_loss(features, mask, truths, scale=2, least=3.0)
    total = 0.0
    for b in range(2):
        for t in range(int(mask[b].sum())):
            for side in (0, 1):
                p = features[b, 3 * side : 3 * side + 3, t].tanh().mean()
                near = any(
                    abs(t + 0.5 - 2 * float(s[side])) <= 0.5 * max(0.2 * float(s[1] - s[0]), 3.0) for s in truths[b]
                )
                total -= p.log() if near else (1 - p).log()
    assert found.item() == pytest.approx(total.item() / 65, rel=1e-9)
    dead = torch.zeros(1, 4, 8, requires_grad=True)
    boundary_loss(dead, masks_of(8, total=8), [torch.tensor([[2.0, 6.0]])], scale=1, least=2.0).backward()
    assert dead.grad.isfinite().all()


@pytest.mark.parametrize(("shape", "kernel"), [((5,), 1), ((5,), 3), ((4, 3, 2), 1), ((4, 3, 2), 3)])
def test_a_lateral_convolution_is_that_of_three_dimensions(shape, kernel):
    torch.manual_seed(0)
    lateral = Lateral(shape, 8, kernel=kernel, groups=2).double()
    x = torch.randn(2, shape[0], 6, *shape[1:], dtype=torch.float64)
    expected = lateral.conv(x if len(shape) == 3 else x[..., None, None])[..., 0, 0]
    assert torch.allclose(lateral._collapsed(x), expected, atol=1e-12)
