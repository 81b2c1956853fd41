"""Which of many candidates are worked on: samplers over proposals (DPS) and snippets (EGS) of ETAD, §3.3.

Candidates are places on a map: (start, end) for proposals, (row,) for snippets. :func:`sample` picks exactly ``count``
of them; ``SAMPLERS`` holds the strategies of Table 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tad.errors import RecipeError, WeightsError, did_you_mean

DIAGONAL = 1e-2  # what Appendix H adds to the diagonal of the DPP's kernel
STRATA = (0.0, 0.3, 0.7)  # lower edges, exclusive, of the three strata of balanced sampling (§3.3)


@dataclass(frozen=True)
class Candidates:
    """What a sampler may look at. All draws are made on the CPU, with ``generator`` or torch's global one."""

    count: int
    map_index: Tensor  # (N, 2) or (N, 1) int64, on the CPU
    features: Callable[[], Tensor] | None  # gives (N, C); called by feature-guided samplers only
    tiou: Tensor | None  # (N,) with the best truth
    scale: Tensor | None  # (N,) length as a part of the longest
    generator: torch.Generator | None
    fixed: bool

    def __len__(self) -> int:
        return len(self.map_index)


Sampler = Callable[[Candidates], Tensor]


def sample(
    name: str,
    *,
    count: int,
    map_index: Tensor,
    features: Callable[[], Tensor] | None = None,
    tiou: Tensor | None = None,
    scale: Tensor | None = None,
    generator: torch.Generator | None = None,
    fixed: bool = False,
) -> Tensor:
    """Exactly ``count`` of N candidates, as indices (count,) int64: distinct, rising, on the device of ``map_index``.

    Parameters
    ----------
    name : one of ``SAMPLERS``.
    map_index : (N, 2) start and end places of proposals in their grid, or (N, 1) places of snippets, int64.
    features : gives (N, C) when called; only ``fps`` and ``dpp`` do.
    tiou, scale : (N,) in 0..1, for ``iou-balanced`` and ``scale-balanced``.
    generator : of the CPU; None is torch's global one.
    fixed : the same sample every time, as detection wants it. ``grid``, ``block`` and ``fps`` then start in the middle
        or at the first candidate; samplers that must draw do so from a seed of their own.

    Raises
    ------
    RecipeError : an unknown sampler, or one that needs features, tIoU or scales and gets none.
    ValueError : ``count`` is not from 1 to N, or the arguments' shapes disagree.
    WeightsError : features that are not finite.
    """
    if name not in SAMPLERS:
        raise RecipeError(f"unknown sampler {name!r}.{did_you_mean(str(name), SAMPLERS)}")
    if map_index.dim() != 2 or map_index.shape[1] not in (1, 2) or map_index.is_floating_point():
        raise ValueError(f"map_index must be (N, 2) or (N, 1) whole numbers, got {tuple(map_index.shape)}")
    if not 1 <= count <= len(map_index):
        raise ValueError(f"cannot sample {count} of {len(map_index)} candidates")
    for what, values in (("tiou", tiou), ("scale", scale)):
        if values is not None and values.shape != (len(map_index),):
            raise ValueError(f"{what} must be ({len(map_index)},), got {tuple(values.shape)}")
    if fixed and generator is None:
        generator = torch.Generator().manual_seed(0)
    candidates = Candidates(count, map_index.cpu(), features, tiou, scale, generator, fixed)
    return SAMPLERS[name](candidates).sort().values.to(map_index.device)


def sample_count(ratio: float, candidates: int) -> int:
    """How many a ratio in (0, 1] is: rounded down as in Appendix H, at least one. 6 % of 8256 proposals are 495.

    Raises :class:`RecipeError` for another ratio.
    """
    if not 0 < ratio <= 1:
        raise RecipeError(f"a sampling ratio lies above 0 and at most at 1, got {ratio!r}")
    return min(max(1, math.floor(ratio * candidates * (1 + 1e-12))), candidates)


# ---- heuristic -----------------------------------------------------------------------------------------------------
def random_sample(candidates: Candidates) -> Tensor:
    """Uniform, without replacement."""
    return torch.randperm(len(candidates), generator=candidates.generator)[: candidates.count]


def grid_sample(candidates: Candidates) -> Tensor:
    """A regular grid on which ``count`` or somewhat more candidates lie, then thinned out evenly to ``count``.

    The spacing is the same along every axis of the map and need not be whole: lines lie at ``floor((i + phase) *
    spacing)``. It is sqrt(N / count), N / count for snippets, or as little below as ``count`` demands. The phase of
    each axis is random; fixed, it is one half.
    """
    places = candidates.map_index - candidates.map_index.min(0).values  # (N, A) from 0
    axes = places.shape[1]
    phases = torch.full((axes,), 0.5) if candidates.fixed else torch.rand(axes, generator=candidates.generator)
    extent = int(places.max()) + 1

    def on_grid(spacing: float) -> Tensor:
        """(N,) bool."""
        lines = (torch.arange(math.ceil(extent / spacing) + 1) + phases[:, None].double()) * spacing  # (A, lines)
        marked = torch.zeros(axes, extent + 1, dtype=torch.bool)
        marked.scatter_(1, lines.long().clamp(max=extent), True)  # the last column lies beyond the map
        return torch.stack([marked[axis, places[:, axis]] for axis in range(axes)]).all(0)

    even = (len(candidates) / candidates.count) ** (1 / axes)
    densest, widest, kept = 1.0, even, on_grid(even)
    if int(kept.sum()) < candidates.count:
        kept = torch.ones(len(candidates), dtype=torch.bool)  # spacing 1 holds them all
        while widest - densest > 1e-3:
            spacing = 0.5 * (densest + widest)
            found = on_grid(spacing)
            if int(found.sum()) >= candidates.count:
                densest, kept = spacing, found
            else:
                widest = spacing
    chosen = kept.nonzero().squeeze(1)
    return chosen[_spread(len(chosen), candidates.count)]


def block_sample(candidates: Candidates) -> Tensor:
    """A square of the map (consecutive snippets) around a random candidate, grown until it holds ``count``.

    Of the last ring, those that come first are taken. Fixed, the square lies around the middle one of the candidates.
    """
    middle = len(candidates) // 2
    if not candidates.fixed:
        middle = int(torch.randint(len(candidates), (), generator=candidates.generator))
    distance = (candidates.map_index - candidates.map_index[middle]).abs().amax(1)  # (N,) rings
    return distance.argsort(stable=True)[: candidates.count]


def _spread(available: int, count: int) -> Tensor:
    """``count`` of ``range(available)`` at equal distances."""
    return ((torch.arange(count, dtype=torch.float64) + 0.5) * available / count).long()


# ---- feature-guided ------------------------------------------------------------------------------------------------
def fps_sample(candidates: Candidates) -> Tensor:
    """Farthest point sampling in feature space, from a random candidate on; fixed, from the first."""
    features = _features(candidates, "fps")
    first = 0
    if not candidates.fixed:
        first = int(torch.randint(len(candidates), (), generator=candidates.generator))
    return farthest_points(features[None], count=candidates.count, first=torch.tensor([first]))[0].cpu()


def farthest_points(features: Tensor, *, count: int, first: Tensor) -> Tensor:
    """Indices (B, count): ``first`` (B,), then always the row of ``features`` (B, N, C) farthest from all before it.

    Euclidean distance; of equally far ones the first. Never the same row twice, even where rows are equal.
    """
    # squared distances as x·x - 2 x·p + p·p, faster than differences; centred, so that little is lost to rounding
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    features = features - features.mean(1, keepdim=True)
    with torch.autocast(features.device.type, enabled=False):  # rounded, distances would name a row twice
        return _farthest(features, first.to(features.device), count)


def _farthest(features: Tensor, first: Tensor, count: int) -> Tensor:
    batch, _, channels = features.shape
    squares = features.square().sum(2)  # (B, N)
    current = first
    chosen = [current]
    nearest = torch.full_like(squares, math.inf)  # (B, N) squared distance to what is chosen
    for _ in range(count - 1):
        point = features.gather(1, current.view(batch, 1, 1).expand(-1, -1, channels))  # (B, 1, C)
        products = torch.bmm(features, point.transpose(1, 2)).squeeze(2)  # (B, N)
        distance = torch.add(squares, products, alpha=-2).add_(squares.gather(1, current[:, None]))
        nearest = torch.minimum(nearest, distance).scatter_(1, current[:, None], -math.inf)
        current = nearest.argmax(1)
        chosen.append(current)
    return torch.stack(chosen, 1)


def dpp_sample(candidates: Candidates) -> Tensor:
    """Exact k-DPP with the kernel L = cosine similarity + 1e-2 I (Appendix H; Kulesza & Taskar 2011)."""
    features = _features(candidates, "dpp").double().cpu()
    # the cosine of a candidate without any feature is 0 with everything
    unit = features / features.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return k_dpp(unit, count=candidates.count, diagonal=DIAGONAL, generator=candidates.generator)


def k_dpp(features: Tensor, *, count: int, diagonal: float, generator: torch.Generator | None = None) -> Tensor:
    """``count`` of N rows, a set A with probability proportional to det((X Xᵀ + ``diagonal`` I)_A); X (N, C) float64.

    Exact, without an N x N matrix. The determinant is the sum over the subsets B of A of diagonal^(k - |B|)
    det((X Xᵀ)_B), so that A is a sample B of the determinantal process of X Xᵀ, of at most rank(X) rows, and k - |B|
    others drawn uniformly. The number b of rows in B has weights e_b(λ) diagonal^(k - b) binomial(N - b, k - b), with
    e_b the elementary symmetric polynomials of the eigenvalues λ, taken from the Gram matrix of size min(N, C).
    """
    total = len(features)
    values, vectors = _spectrum(features)  # (R,), (N, R)
    most = min(count, len(values))
    polynomials = _log_elementary_symmetric(values, most)  # (R + 1, most + 1)
    size = torch.arange(most + 1, dtype=torch.float64)
    ways = torch.lgamma(total - size + 1) - torch.lgamma(count - size + 1) - math.lgamma(total - count + 1)
    if diagonal > 0:
        weights = polynomials[-1] + (count - size) * math.log(diagonal) + ways
    else:
        weights = torch.where(size == count, polynomials[-1], -math.inf)
    if not weights.isfinite().any():
        raise ValueError(f"a determinantal process of rank {len(values)} has no samples of {count} rows")
    guided = int(torch.multinomial((weights - weights.max()).exp(), 1, generator=generator))
    kept = _choose_eigenvectors(values, polynomials, guided, generator)
    chosen = _projection_dpp(vectors[:, kept], generator)  # (guided,)
    free = torch.ones(total, dtype=torch.bool)
    free[chosen] = False
    others = free.nonzero().squeeze(1)
    return torch.cat((chosen, others[torch.randperm(len(others), generator=generator)[: count - guided]]))


def _spectrum(features: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (R,) of X Xᵀ that are not zero, and their orthonormal eigenvectors (N, R)."""
    dual = features.shape[1] < features.shape[0]
    values, vectors = torch.linalg.eigh(features.T @ features if dual else features @ features.T)
    kept = values > max(features.shape) * torch.finfo(torch.float64).eps * values[-1:].clamp(min=0.0)
    values, vectors = values[kept], vectors[:, kept]
    return values, features @ vectors / values.sqrt() if dual else vectors


def _log_elementary_symmetric(values: Tensor, most: int) -> Tensor:
    """(R + 1, most + 1): log e_b of the first r of ``values`` (R,), all positive."""
    row = torch.full((most + 1,), -math.inf, dtype=torch.float64)
    row[0] = 0.0
    rows = [row]
    for value in values.log():
        row = row.clone()
        row[1:] = torch.logaddexp(rows[-1][1:], rows[-1][:-1] + value)
        rows.append(row)
    return torch.stack(rows)


def _choose_eigenvectors(
    values: Tensor, polynomials: Tensor, size: int, generator: torch.Generator | None
) -> list[int]:
    """A set of ``size`` eigenvectors with probability proportional to the product of their eigenvalues."""
    draws = torch.rand(len(values), generator=generator, dtype=torch.float64).tolist()
    logs, table = values.log().tolist(), polynomials.tolist()
    chosen: list[int] = []
    for r in range(len(values), 0, -1):
        left = size - len(chosen)
        if left == 0:
            break
        taken = logs[r - 1] + table[r - 1][left - 1] - table[r][left]  # log of the probability
        if left == r or draws[r - 1] < math.exp(min(0.0, taken)):
            chosen.append(r - 1)
    return chosen


def _projection_dpp(vectors: Tensor, generator: torch.Generator | None) -> Tensor:
    """Rows (b,) drawn from the process whose kernel projects on ``vectors`` (N, b), orthonormal columns.

    Row by row with probability proportional to the squared length of what the rows before it leave of a row.
    """
    size = vectors.shape[1]
    left = vectors.square().sum(1)  # (N,)
    basis = vectors.new_zeros(size, size)  # orthonormal rows: the span of the chosen rows of ``vectors``
    chosen: list[int] = []
    for step in range(size):
        row = int(torch.multinomial(left, 1, generator=generator))
        direction = vectors[row]
        for _ in range(2):  # Gram-Schmidt, twice against rounding
            direction = direction - basis[:step].T @ (basis[:step] @ direction)
        basis[step] = direction / direction.norm()
        left = (left - (vectors @ basis[step]).square()).clamp_(min=0.0)
        chosen.append(row)
        left[chosen] = 0.0
    return torch.tensor(chosen, dtype=torch.int64)


def _features(candidates: Candidates, name: str) -> Tensor:
    """(N, C), checked, without gradient."""
    if candidates.features is None:
        raise RecipeError(f"sampler '{name}' looks at features, and there are none where it is used: choose another")
    features = candidates.features().detach()
    if features.dim() != 2 or len(features) != len(candidates) or features.shape[1] == 0:
        raise ValueError(f"sampler '{name}': features must be ({len(candidates)}, C), got {tuple(features.shape)}")
    if not features.isfinite().all():
        raise WeightsError(
            f"sampler '{name}': the features that it looks at are not finite. Either the stored features hold NaN "
            "(run tad store verify --deep), or the training has diverged (take a smaller train.lr)"
        )
    return features


# ---- label-guided --------------------------------------------------------------------------------------------------
def iou_balanced_sample(candidates: Candidates) -> Tensor:
    """As many candidates with tIoU in (0, .3], (.3, .7] and (.7, 1] each, as far as there are so many."""
    return _balanced(candidates, candidates.tiou, "iou-balanced", "tIoU with the truth, which only training knows")


def scale_balanced_sample(candidates: Candidates) -> Tensor:
    """As many short, middle and long candidates, in (0, .3], (.3, .7] and (.7, 1] of the longest, where there are."""
    return _balanced(candidates, candidates.scale, "scale-balanced", "scales of the candidates")


def _balanced(candidates: Candidates, values: Tensor | None, name: str, needed: str) -> Tensor:
    """Equal numbers of the three strata; a stratum's lack goes to the others, then to values of 0 and below."""
    if values is None:
        raise RecipeError(f"sampler '{name}' needs the {needed}: choose another here")
    values = values.detach().double().cpu()
    if values.isnan().any():
        raise ValueError(f"sampler '{name}': {int(values.isnan().sum())} values are NaN")
    # 0: in no stratum. float32 values of .3 and .7 belong to the stratum that they close
    stratum = torch.bucketize(values, torch.tensor([STRATA[0], *(edge + 1e-6 for edge in STRATA[1:])]).double())
    sizes = torch.bincount(stratum, minlength=len(STRATA) + 1).tolist()
    wanted = _shares(sizes[1:], candidates.count)
    wanted = [candidates.count - sum(wanted), *wanted]
    shuffled = torch.randperm(len(values), generator=candidates.generator)
    order = shuffled[stratum[shuffled].argsort(stable=True)]  # stratum by stratum, each shuffled
    return torch.cat([part[:n] for part, n in zip(order.split(sizes), wanted, strict=True)])


def _shares(sizes: list[int], count: int) -> list[int]:
    """How many to take of each stratum: as equal as ``sizes`` allow, ``count`` in all if there are so many."""
    shares = [0] * len(sizes)
    left = min(count, sum(sizes))
    open_ = sorted(range(len(sizes)), key=lambda i: sizes[i])  # the smallest is filled first
    for position, i in enumerate(open_):
        shares[i] = min(sizes[i], left // (len(open_) - position))
        left -= shares[i]
    return shares


SAMPLERS: dict[str, Sampler] = {
    "random": random_sample,
    "grid": grid_sample,
    "block": block_sample,
    "fps": fps_sample,
    "dpp": dpp_sample,
    "iou-balanced": iou_balanced_sample,
    "scale-balanced": scale_balanced_sample,
}
