"""Samplers: exact counts, the distributions they promise, and slow references."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tad.detect.samplers import DIAGONAL, SAMPLERS, farthest_points, k_dpp, sample, sample_count
from tad.errors import RecipeError, WeightsError


def triangle(rows: int) -> Tensor:
    """(N, 2): all (start, end) with start <= end."""
    return torch.stack(tuple(torch.triu_indices(rows, rows)), 1)


def drawn(name: str, map_index: Tensor, count: int, seed: int = 0, *, fixed: bool = False) -> Tensor:
    """A sample with everything that any sampler could ask for, from a seed."""
    made = torch.Generator().manual_seed(seed)
    total = len(map_index)
    return sample(
        name,
        count=count,
        map_index=map_index,
        features=lambda: torch.randn(total, 5, generator=made),
        tiou=torch.rand(total, generator=made) * (torch.rand(total, generator=made) < 0.5),
        scale=torch.rand(total, generator=made),
        generator=None if fixed else torch.Generator().manual_seed(seed + 1),
        fixed=fixed,
    )


@pytest.mark.parametrize("name", SAMPLERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_as_many_as_asked_all_different_and_repeatable(name: str, data: st.DataObject) -> None:
    if data.draw(st.booleans(), label="snippets"):
        map_index = torch.arange(data.draw(st.integers(1, 60), label="rows"))[:, None]
    else:
        map_index = triangle(data.draw(st.integers(1, 14), label="rows"))
        some = data.draw(st.integers(1, len(map_index)), label="candidates")
        map_index = map_index[torch.randperm(len(map_index), generator=torch.Generator().manual_seed(some))[:some]]
    count = data.draw(st.integers(1, len(map_index)), label="count")
    fixed = data.draw(st.booleans(), label="fixed")
    seed = data.draw(st.integers(0, 1000), label="seed")
    chosen = drawn(name, map_index, count, seed, fixed=fixed)
    assert chosen.dtype == torch.int64
    assert chosen.shape == (count,)
    assert (chosen.diff() > 0).all()
    assert chosen[0] >= 0
    assert chosen[-1] < len(map_index)
    assert torch.equal(chosen, drawn(name, map_index, count, seed, fixed=fixed))


@pytest.mark.parametrize("name", SAMPLERS)
def test_all_of_them(name: str) -> None:
    assert drawn(name, triangle(5), 15).tolist() == list(range(15))


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"grid"}))
def test_training_samples_differ_and_follow_the_global_seed(name: str) -> None:
    map_index, features, values = triangle(12), torch.randn(78, 4), torch.rand(78)

    def once() -> list[int]:
        return sample(
            name, count=20, map_index=map_index, features=lambda: features, tiou=values, scale=values
        ).tolist()

    torch.manual_seed(3)
    first, second = once(), once()
    torch.manual_seed(3)
    assert once() == first
    assert first != second


def test_only_feature_guided_samplers_look_at_features() -> None:
    def forbidden() -> Tensor:
        raise AssertionError("called")

    values = torch.rand(10)
    for name in set(SAMPLERS) - {"fps", "dpp"}:
        sample(name, count=3, map_index=triangle(4), features=forbidden, tiou=values, scale=values)


# ---- random --------------------------------------------------------------------------------------------------------
def test_random_takes_each_candidate_equally_often() -> None:
    generator, seen = torch.Generator().manual_seed(1), torch.zeros(12)
    draws = 6000
    for _ in range(draws):
        seen[sample("random", count=3, map_index=torch.arange(12)[:, None], generator=generator)] += 1
    deviation = (0.25 * 0.75 / draws) ** 0.5
    assert ((seen / draws - 0.25).abs() < 4.5 * deviation).all()


# ---- grid ----------------------------------------------------------------------------------------------------------
def test_six_percent_of_128_rows_is_every_fourth_row_and_column() -> None:
    map_index = triangle(128)
    count = sample_count(0.06, len(map_index))
    assert count == 495
    starts, ends = map_index[drawn("grid", map_index, count, fixed=True)].T
    for lines in (starts.unique(), ends.unique()):
        assert set(lines.diff().tolist()) <= {4, 5}
        assert len(lines) >= 29


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(20, 60), ratio=st.floats(0.02, 1.0), seed=st.integers(0, 10_000), fixed=st.booleans())
def test_a_grid_is_even_over_the_map(rows: int, ratio: float, seed: int, fixed: bool) -> None:
    map_index = triangle(rows)
    count = sample_count(ratio, len(map_index))
    chosen = map_index[drawn("grid", map_index, count, seed, fixed=fixed)]
    marked = torch.zeros(rows, rows)
    marked[tuple(chosen.T)] = 1
    side = math.ceil(3 * math.sqrt(len(map_index) / count))  # a square of this side should hold about nine
    assume(side <= rows // 2)
    sums = torch.nn.functional.avg_pool2d(marked[None, None], side, stride=1, divisor_override=1)[0, 0]
    starts, ends = torch.meshgrid(torch.arange(len(sums)), torch.arange(len(sums)), indexing="ij")
    inside = sums[starts + side - 1 <= ends]  # squares above the diagonal
    if inside.numel():
        assert inside.min() >= 1
        assert inside.max() <= 25
    lines = chosen.T[0].unique()
    assert lines[0] < side
    assert chosen.max() >= rows - side


@given(rows=st.integers(1, 200), part=st.floats(0.001, 1.0), seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_a_grid_of_snippets_has_equal_steps(rows: int, part: float, seed: int) -> None:
    count = sample_count(part, rows)
    chosen = drawn("grid", torch.arange(rows)[:, None], count, seed)
    assert all(abs(step - rows / count) < 1 for step in chosen.diff().tolist())
    assert chosen[0] < rows / count
    assert rows - chosen[-1] < rows / count + 1


def test_the_phase_of_a_grid_is_random_in_training_only() -> None:
    def starts(fixed: bool) -> set[int]:
        rows = torch.arange(40)[:, None]
        return {int(sample("grid", count=10, map_index=rows, fixed=fixed)[0]) for _ in range(60)}

    torch.manual_seed(0)
    assert starts(fixed=False) == {0, 1, 2, 3}
    assert starts(fixed=True) == {2}


# ---- block ---------------------------------------------------------------------------------------------------------
@given(rows=st.integers(1, 80), seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_block_of_snippets_is_consecutive(rows: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, rows))
    chosen = drawn("block", torch.arange(rows)[:, None], count, seed)
    assert int(chosen[-1] - chosen[0]) == count - 1


@given(rows=st.integers(2, 30), seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_block_of_proposals_is_a_full_square_of_the_map(rows: int, seed: int, data: st.DataObject) -> None:
    map_index = triangle(rows)
    count = data.draw(st.integers(1, len(map_index)))
    chosen = set(map(tuple, map_index[drawn("block", map_index, count, seed)].tolist()))
    candidates = list(map(tuple, map_index.tolist()))

    def square(centre: tuple[int, int], radius: int) -> set[tuple[int, int]]:
        return {c for c in candidates if max(abs(c[0] - centre[0]), abs(c[1] - centre[1])) <= radius}

    # between two squares round one of its members, one ring apart
    assert any(
        square(centre, radius - 1) <= chosen <= square(centre, radius) for centre in chosen for radius in range(rows)
    )


def test_blocks_lie_anywhere() -> None:
    centres = {int(drawn("block", torch.arange(30)[:, None], 4, seed)[0]) for seed in range(300)}
    assert centres == set(range(27))


# ---- farthest points -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("total", "channels", "count"), [(1, 3, 1), (7, 1, 7), (30, 6, 12), (50, 2, 50)])
def test_farthest_points_as_a_loop_finds_them(total: int, channels: int, count: int) -> None:
    features = torch.randn(3, total, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(total))
    first = torch.tensor([0, total - 1, total // 2])
    found = farthest_points(features, count=count, first=first)
    for b in range(3):
        chosen = [int(first[b])]
        while len(chosen) < count:
            distance = {
                i: min(float((features[b, i] - features[b, j]).square().sum()) for j in chosen)
                for i in range(total)
                if i not in chosen
            }
            chosen.append(max(distance, key=lambda i: distance[i]))
        assert found[b].tolist() == chosen


def test_farthest_points_of_equal_rows_are_different_rows() -> None:
    chosen = farthest_points(torch.full((2, 9, 4), 0.3), count=9, first=torch.tensor([4, 0]))
    assert chosen.sort(1).values.tolist() == [list(range(9))] * 2


def test_fps_far_from_the_origin_and_in_half_precision() -> None:
    points = torch.tensor([[0.0], [1.0], [5.0], [9.0], [10.0]])
    for features in (points + 1000, points.half()):
        chosen = sample("fps", count=3, map_index=torch.arange(5)[:, None], features=lambda f=features: f, fixed=True)
        assert chosen.tolist() == [0, 2, 4]


# ---- determinantal process -----------------------------------------------------------------------------------------
def set_probabilities(kernel: Tensor, count: int) -> dict[tuple[int, ...], float]:
    """By enumeration of all sets: det(L_A) / sum of det(L_B)."""
    sets = list(itertools.combinations(range(len(kernel)), count))
    minors = [float(torch.linalg.det(kernel[list(s)][:, list(s)])) for s in sets]
    return {s: max(minor, 0.0) / sum(minors) for s, minor in zip(sets, minors, strict=True)}


@pytest.mark.parametrize(
    ("total", "channels", "count", "diagonal"),
    [(6, 3, 2, DIAGONAL), (8, 2, 3, DIAGONAL), (7, 9, 3, DIAGONAL), (6, 2, 3, 0.5), (6, 4, 2, 0.0), (6, 1, 3, 1.0)],
)
def test_dpp_draws_sets_as_often_as_their_determinants_say(
    total: int, channels: int, count: int, diagonal: float
) -> None:
    generator = torch.Generator().manual_seed(total * 100 + channels)
    features = torch.randn(total, channels, generator=generator, dtype=torch.float64)
    features = features / features.norm(dim=1, keepdim=True)
    wanted = set_probabilities(features @ features.T + diagonal * torch.eye(total, dtype=torch.float64), count)
    draws = 1500
    seen = dict.fromkeys(wanted, 0)
    for _ in range(draws):
        seen[tuple(sorted(k_dpp(features, count=count, diagonal=diagonal, generator=generator).tolist()))] += 1
    # of sets
    for chosen, probability in wanted.items():
        assert abs(seen[chosen] / draws - probability) < 4.5 * (probability * (1 - probability) / draws) ** 0.5 + 1e-9
    # of rows
    for row in range(total):
        probability = sum(p for chosen, p in wanted.items() if row in chosen)
        found = sum(n for chosen, n in seen.items() if row in chosen) / draws
        assert abs(found - probability) < 4.5 * (probability * (1 - probability) / draws) ** 0.5 + 1e-9


def test_dpp_is_of_cosines() -> None:
    """Lengths of the features do not matter: two of one direction and one of another, far longer."""
    features = torch.tensor([[1.0, 0.0], [100.0, 0.0], [0.0, 1e-3]])
    kernel = torch.tensor([[1.01, 1.0, 0.0], [1.0, 1.01, 0.0], [0.0, 0.0, 1.01]], dtype=torch.float64)
    wanted = set_probabilities(kernel, 2)
    generator, seen, draws = torch.Generator().manual_seed(0), dict.fromkeys(wanted, 0), 1000
    for _ in range(draws):
        chosen = sample(
            "dpp", count=2, map_index=torch.arange(3)[:, None], features=lambda: features, generator=generator
        )
        seen[tuple(chosen.tolist())] += 1
    for key, probability in wanted.items():
        assert abs(seen[key] / draws - probability) < 4.5 * (probability * (1 - probability) / draws) ** 0.5


def test_dpp_of_features_that_say_nothing_is_uniform() -> None:
    generator, seen, draws = torch.Generator().manual_seed(0), torch.zeros(6), 1500
    for _ in range(draws):
        seen[k_dpp(torch.zeros(6, 3).double(), count=2, diagonal=DIAGONAL, generator=generator)] += 1
    assert ((seen / draws - 1 / 3).abs() < 4.5 * (2 / 9 / draws) ** 0.5).all()


def test_dpp_without_a_diagonal_cannot_exceed_the_rank() -> None:
    with pytest.raises(ValueError, match="rank 2 has no samples of 3"):
        k_dpp(torch.randn(6, 2).double(), count=3, diagonal=0.0)


def test_dpp_is_more_diverse_than_chance() -> None:
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(10, 16, generator=generator)
    sizes = [400, 200, 100, 50, 25, 10, 5, 4, 3, 3]
    features = torch.cat([c + 0.05 * torch.randn(n, 16, generator=generator) for c, n in zip(centres, sizes)])  # noqa: B905
    cluster = torch.arange(10).repeat_interleave(torch.tensor(sizes))
    rows = torch.arange(800)[:, None]

    def clusters(name: str) -> float:
        found = [
            sample(name, count=12, map_index=rows, features=lambda: features, generator=generator) for _ in range(20)
        ]
        return sum(len(cluster[chosen].unique()) for chosen in found) / 20

    assert clusters("dpp") > clusters("random") + 3


# ---- balanced ------------------------------------------------------------------------------------------------------
def strata(values: Tensor) -> list[int]:
    bounds = [(-math.inf, 0.0), (0.0, 0.3), (0.3, 0.7), (0.7, math.inf)]
    return [int(((values > low) & (values <= high)).sum()) for low, high in bounds]


@pytest.mark.parametrize(("name", "key"), [("iou-balanced", "tiou"), ("scale-balanced", "scale")])
@pytest.mark.parametrize(
    ("sizes", "count", "wanted"),
    [
        ((50, 50, 50, 50), 30, (0, 10, 10, 10)),
        ((50, 50, 50, 4), 30, (0, 13, 13, 4)),
        ((50, 50, 4, 2), 30, (0, 24, 4, 2)),
        ((50, 3, 4, 2), 30, (21, 3, 4, 2)),
        ((50, 0, 0, 0), 30, (30, 0, 0, 0)),
        ((0, 50, 50, 50), 1, None),
        ((5, 5, 5, 5), 20, (5, 5, 5, 5)),
    ],
)
def test_strata_are_equal_as_far_as_there_are_so_many(
    name: str, key: str, sizes: tuple[int, ...], count: int, wanted: tuple[int, ...] | None
) -> None:
    edges = torch.tensor([[0.0, 0.0], [0.01, 0.3], [0.31, 0.7], [0.71, 1.0]])
    values = torch.cat([torch.linspace(low, high, n) for (low, high), n in zip(edges.tolist(), sizes, strict=True)])
    values = values[torch.randperm(len(values))]
    chosen = sample(name, count=count, map_index=torch.arange(len(values))[:, None], **{key: values})
    assert sum(strata(values[chosen] - 1e-6)) == count
    if wanted is not None:
        found = (values[chosen].double() - 1e-6).tolist()
        assert strata(torch.tensor(found)) == list(wanted)


def test_members_of_a_stratum_are_drawn_at_random() -> None:
    values = torch.cat((torch.full((20,), 0.1), torch.full((20,), 0.5), torch.full((20,), 0.9)))
    generator, seen = torch.Generator().manual_seed(0), torch.zeros(60)
    for _ in range(2000):
        seen[
            sample("iou-balanced", count=6, map_index=torch.arange(60)[:, None], tiou=values, generator=generator)
        ] += 1
    assert ((seen / 2000 - 0.1).abs() < 4.5 * (0.09 / 2000) ** 0.5).all()


# ---- errors --------------------------------------------------------------------------------------------------------
def test_what_a_sampler_needs_and_does_not_get() -> None:
    rows = torch.arange(4)[:, None]
    for name, needed in {
        "fps": "features",
        "dpp": "features",
        "iou-balanced": "tIoU",
        "scale-balanced": "scale",
    }.items():
        with pytest.raises(RecipeError, match=needed):
            sample(name, count=2, map_index=rows)
    with pytest.raises(RecipeError, match="Did you mean 'random'"):
        sample("randm", count=2, map_index=rows)


@pytest.mark.parametrize("count", [0, -1, 5])
def test_counts_that_cannot_be(count: int) -> None:
    with pytest.raises(ValueError, match=f"cannot sample {count} of 4"):
        sample("random", count=count, map_index=torch.arange(4)[:, None])


def test_no_candidates() -> None:
    with pytest.raises(ValueError, match="of 0 candidates"):
        sample("grid", count=1, map_index=torch.zeros(0, 2, dtype=torch.int64))


def test_odd_arguments() -> None:
    rows = torch.arange(4)[:, None]
    with pytest.raises(ValueError, match="map_index"):
        sample("random", count=2, map_index=torch.arange(4))
    with pytest.raises(ValueError, match="tiou must be"):
        sample("iou-balanced", count=2, map_index=rows, tiou=torch.rand(3))
    with pytest.raises(ValueError, match="1 values are NaN"):
        sample("iou-balanced", count=2, map_index=rows, tiou=torch.tensor([0.1, math.nan, 0.2, 0.3]))
    for name in ("fps", "dpp"):
        with pytest.raises(ValueError, match=r"features must be \(4, C\)"):
            sample(name, count=2, map_index=rows, features=lambda: torch.rand(3, 2))
        with pytest.raises(WeightsError, match="not finite"):
            sample(name, count=2, map_index=rows, features=lambda: torch.full((4, 2), math.nan))


@pytest.mark.parametrize(("ratio", "count"), [(0.06, 495), (1.0, 8256), (1e-9, 1), (0.2, 1651)])
def test_counts_of_ratios(ratio: float, count: int) -> None:
    assert sample_count(ratio, 8256) == count


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_a_ratio_that_is_a_whole_count_gives_it(part: int, total: int) -> None:
    part = min(part, total)
    assert sample_count(part / total, total) == part


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, math.nan])
def test_ratios_that_cannot_be(ratio: float) -> None:
    with pytest.raises(RecipeError, match="ratio"):
        sample_count(ratio, 10)


def test_farthest_points_are_found_in_single_precision_whatever_surrounds_them() -> None:
    torch.manual_seed(0)
    features = torch.randn(1, 128, 64)
    features[0, 3:5] *= 50
    first = torch.tensor([0])
    expected = farthest_points(features, count=38, first=first)
    with torch.autocast("cpu", torch.bfloat16):
        found = farthest_points(features, count=38, first=first)
    assert torch.equal(found, expected)
    assert len(found.unique()) == 38
