"""Boundary matching: against a loop over proposals, against the dense matrix and Conv3d, in mirrored time, padded."""

import math

import pytest
import torch
from torch.nn import functional as F

from tad.detect import boundary_matching
from tad.detect.boundary_matching import (
    BoundaryMatching,
    cells_to_map,
    map_to_cells,
    proposal_grid,
    sampling_matrix,
)
from tad.errors import RecipeError


def reading(position, rows):
    """How much of each row a point at row edge ``position`` reads: a list of (row, weight)."""
    center = position - 0.5
    near = (math.floor(center), math.floor(center) + 1)
    return [(row, 1 - abs(center - row)) for row in near if 0 <= row < rows]


def points(start, end, *, samples, samples_per_bin, margin):
    """The groups of points of one proposal."""
    length, count = end - start, samples * samples_per_bin
    step = length * (1 + 2 * margin) / (count - 1)
    flat = [start - margin * length + step * k for k in range(count)]
    return [flat[n * samples_per_bin : (n + 1) * samples_per_bin] for n in range(samples)]


def naive(x, layer, longest):
    """Proposal by proposal, point by point: (B, N, H)."""
    rows = x.shape[2]
    options = {"samples": layer.samples, "samples_per_bin": layer.samples_per_bin, "margin": layer.margin}
    cells = []
    for length in range(1, longest + 1):
        for start in range(rows - length + 1):
            total = layer.bias
            for n, group in enumerate(points(start, start + length, **options)):
                read = x.new_zeros(x.shape[:2])  # (B, C)
                for position in group:
                    for row, weight in reading(position, rows):
                        read = read + weight / len(group) * x[:, :, row]
                total = total + read @ layer.weight[n].T
            cells.append(total)
    return torch.stack(cells, 1)


def layer_and_rows(rows, *, channels=3, hidden=5, batch=2, seed=0, **options):
    torch.manual_seed(seed)
    layer = BoundaryMatching(channels=channels, hidden=hidden, **options).double()
    return layer, torch.randn(batch, channels, rows, dtype=torch.float64, requires_grad=True)


CASES = [
    (1, {"samples": 4, "samples_per_bin": 3}),
    (2, {"samples": 32, "samples_per_bin": 3}),
    (7, {"samples": 5, "samples_per_bin": 1}),
    (9, {"samples": 3, "samples_per_bin": 4, "durations": 4}),
    (12, {"samples": 6, "samples_per_bin": 2, "margin": 0.0}),
    (6, {"samples": 2, "samples_per_bin": 3, "margin": 1.25, "durations": 100}),
    (15, {"samples": 2, "samples_per_bin": 9, "durations": 15}),  # points of a group many rows apart
]


@pytest.mark.parametrize(("rows", "options"), CASES)
def test_equals_a_loop_over_proposals(rows, options, monkeypatch):
    monkeypatch.setattr(boundary_matching, "CPU_COLUMNS", 2)  # five columns in three parts
    layer, x = layer_and_rows(rows, **options)
    ours, wanted = layer(x), naive(x, layer, min(options.get("durations", rows), rows))
    assert ours.shape == wanted.shape
    assert torch.allclose(ours, wanted, atol=1e-12)
    direction = torch.randn_like(wanted)
    inputs = [x, layer.weight, layer.bias]
    for a, b in zip(
        torch.autograd.grad((ours * direction).sum(), inputs),
        torch.autograd.grad((wanted * direction).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-11)


def test_gradients_by_differences():
    layer, x = layer_and_rows(5, channels=2, hidden=3, samples=3, samples_per_bin=2)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradcheck(
        lambda weight: torch.func.functional_call(layer, {"weight": weight}, (x,)), (layer.weight,)
    )


def test_equals_the_dense_matrix_and_a_convolution_over_points():
    rows, samples, per_bin = 10, 8, 3
    layer, x = layer_and_rows(rows, samples=samples, samples_per_bin=per_bin)
    dense = torch.zeros(rows, samples, rows, rows, dtype=torch.float64)  # (T, S, D, T)
    for d in range(rows):
        for i in range(rows - d):
            for n, group in enumerate(points(i, i + d + 1, samples=samples, samples_per_bin=per_bin, margin=0.5)):
                for position in group:
                    for row, weight in reading(position, rows):
                        dense[row, n, d, i] += weight / per_bin
    sampled = (x @ dense.flatten(1)).unflatten(2, (samples, rows, rows))  # (B, C, S, D, T)
    kernel = layer.weight.permute(1, 2, 0)[..., None, None]  # (H, C, S, 1, 1)
    wanted = F.conv3d(sampled, kernel, layer.bias).squeeze(2)  # (B, H, D, T)
    ours = cells_to_map(layer(x), rows=rows)
    valid = torch.arange(rows) + torch.arange(1, rows + 1)[:, None] <= rows  # (D, T)
    assert torch.allclose(ours, wanted * valid, atol=1e-12)


def test_mirrored_time_gives_mirrored_proposals():
    rows = 11
    layer, x = layer_and_rows(rows, samples=7)
    forwards = layer(x)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(0))
    backwards = layer(x.flip(2))
    grid = [tuple(p) for p in proposal_grid(rows).tolist()]
    mirror = [grid.index((rows - end, rows - start)) for start, end in grid]
    assert torch.allclose(forwards, backwards[:, mirror], atol=1e-12)


def test_constant_rows_are_seen_whole_inside_and_fade_at_the_ends():
    layer, _ = layer_and_rows(20, channels=1, hidden=1, samples=4, margin=0.5)
    with torch.no_grad():
        layer.weight.fill_(0.25)
        layer.bias.zero_()
    cells = dict(
        zip(map(tuple, proposal_grid(20).tolist()), layer(torch.ones(1, 1, 20).double())[0, :, 0], strict=True)
    )
    assert cells[8.0, 12.0].item() == pytest.approx(1.0)  # extended to [6, 14]
    assert cells[0.0, 20.0].item() == pytest.approx(0.5)  # half of [-10, 30] lies outside
    assert cells[0.0, 4.0].item() == pytest.approx(cells[16.0, 20.0].item())


def test_padding_with_zeros_changes_nothing():
    layer, x = layer_and_rows(9, samples=6)
    short = cells_to_map(layer(x), rows=9)
    long = cells_to_map(layer(F.pad(x, (0, 5))), rows=14)[:, :, :9, :9]
    valid = torch.arange(9) + torch.arange(1, 10)[:, None] <= 9
    assert torch.allclose(long * valid, short, atol=1e-12)


@pytest.mark.parametrize(("rows", "durations"), [(1, None), (6, None), (6, 2), (4, 9)])
def test_grid_map_and_cells_have_one_order(rows, durations):
    grid = proposal_grid(rows, durations)
    longest = min(durations or rows, rows)
    assert grid.tolist() == [[i, i + d + 1] for d in range(longest) for i in range(rows) if i + d + 1 <= rows]
    cells = torch.randn(2, len(grid), 3)
    made = cells_to_map(cells, rows=rows, durations=durations)
    assert made.shape == (2, 3, longest, rows)
    for n, (start, end) in enumerate(grid.long().tolist()):
        assert torch.equal(made[:, :, end - start - 1, start], cells[:, n])
    assert int((made != 0).sum()) == cells.numel()
    assert torch.equal(map_to_cells(made), cells.transpose(1, 2))


def test_the_matrix_is_sparse_and_its_transpose_is_one():
    there, back = sampling_matrix(40, 40, 32, 3, 0.5)
    size = (40 * 41 // 2, 40 * 32)
    assert len(there.values) <= size[0] * 32 * 2 * 3  # two rows for each of three points, merged where equal

    def dense(matrix, shape):
        row = torch.repeat_interleave(torch.cat([matrix.begins, torch.tensor([len(matrix.values)])]).diff())
        made = torch.zeros(shape)
        assert len({*zip(row.tolist(), matrix.columns.tolist(), strict=True)}) == len(row)  # equal places are merged
        made[row, matrix.columns.long()] = matrix.values
        return made

    assert torch.equal(dense(there, size), dense(back, size[::-1]).T)


@pytest.mark.filterwarnings("error")
def test_half_precision():
    torch.manual_seed(0)
    layer, x = BoundaryMatching(channels=8, hidden=6), torch.randn(2, 8, 20)
    full = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(full, half.float(), atol=0.02)
    wanted = torch.autograd.grad(full.square().sum(), layer.parameters())
    found = torch.autograd.grad(half.float().square().sum(), layer.parameters())
    for a, b in zip(wanted, found, strict=True):
        assert b.dtype == torch.float32
        assert torch.allclose(a, b, rtol=0.05, atol=0.02 * a.abs().max())


def test_nothing_but_weights_is_saved():
    assert set(BoundaryMatching(channels=2).state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize(
    "wrong",
    [{"channels": 0}, {"hidden": 0}, {"durations": 0}, {"samples": 1}, {"samples_per_bin": 0}, {"margin": -0.1}],
)
def test_wrong_sizes(wrong):
    with pytest.raises(RecipeError, match="boundary matching"):
        BoundaryMatching(**{"channels": 2, **wrong})


@pytest.mark.gpu
def test_the_same_on_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    torch.manual_seed(0)
    layer, x = BoundaryMatching(channels=8, hidden=16), torch.randn(2, 8, 30, requires_grad=True)
    wanted = layer(x)
    wanted.square().sum().backward()
    expected = [x.grad, layer.weight.grad]
    moved = BoundaryMatching(channels=8, hidden=16).cuda()
    moved.load_state_dict(layer.state_dict())
    y = x.detach().cuda().requires_grad_()
    found = moved(y)
    found.square().sum().backward()
    assert torch.allclose(found.cpu(), wanted, atol=1e-4)
    for a, b in zip(expected, [y.grad, moved.weight.grad], strict=True):
        assert torch.allclose(a, b.cpu(), atol=1e-3, rtol=1e-3)


def test_what_was_looked_up_without_gradients_serves_training_afterwards() -> None:
    """Detection runs in inference mode, and its tables are kept for the next call of the same size."""
    layer = BoundaryMatching(channels=3, hidden=2, samples=4)
    with torch.inference_mode():
        cells_to_map(torch.zeros(1, 28, 2), rows=7)
        layer(torch.zeros(1, 3, 7))
    features = torch.randn(1, 3, 7, requires_grad=True)
    layer(features).square().sum().backward()
    assert features.grad is not None
    assert features.grad.abs().sum() > 0
    cells = torch.zeros(1, 28, 2, requires_grad=True)
    cells_to_map(cells, rows=7).sum().backward()
    assert torch.equal(cells.grad, torch.ones(1, 28, 2))
