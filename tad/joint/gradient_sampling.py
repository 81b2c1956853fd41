"""Encoder gradient sampling (ETAD, section 3.2.1 and Algorithm 1): all snippets are computed, some with a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tad.detect.samplers import sample, sample_count
from tad.errors import RecipeError
from tad.joint.clips import Clips
from tad.joint.encoder import Encoder, without_graph


def encode_sampled(
    encoder: Encoder,
    clips: Sequence[Clips],
    *,
    ratio: float,
    sampler: str = "random",
    features: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Rows (U, D) of each sample's clips, in their order; those of a part of the snippets carry gradients.

    Of each sample, the snippets that are not chosen are computed first, in chunks without a graph (see
    :func:`~tad.joint.encoder.without_graph`: batch norms use running statistics), then the chosen ones with a graph.
    Where gradients are switched off, all are computed so, whatever the ratio, and nothing is drawn.

    Parameters
    ----------
    encoder : computes ``features``.
    ratio : of the snippets that are chosen, rounded down, at least one; 0: none, 1: all. Then nothing is drawn.
    sampler : a strategy of ``tad.detect.samplers`` that needs no truth: ``random``, ``grid``, ``block``, ``fps``,
        ``dpp``. Draws are from torch's global generator.
    features : (U, C) of each sample, what ``fps`` and ``dpp`` look at. None: the rows themselves, so that all
        snippets are computed without a graph, and the chosen ones a second time with it.

    Raises
    ------
    RecipeError : a ratio outside 0 to 1, an unknown sampler or one that needs the truth.
    WeightsError : features that are not finite, of ``fps`` and ``dpp``.
    ValueError : a sample without clips, or an encoder that does not compute ``features``.
    """
    if "features" not in encoder.keys:
        raise ValueError(f"snippets are rows of the level features, the encoder computes {', '.join(encoder.keys)}")
    ratio = checked(ratio) if torch.is_grad_enabled() else 0.0
    given: Sequence[Tensor | None] = [None] * len(clips) if features is None else features
    return [
        _encode(encoder, clip, ratio=ratio, sampler=sampler, features=guide)
        for clip, guide in zip(clips, given, strict=True)
    ]


def choose(count: int, *, ratio: float, sampler: str, features: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Which of ``count`` snippets carry gradients, and which do not: indices, rising, on the CPU.

    ``features`` gives (count, C) when called; only ``fps`` and ``dpp`` do. Nothing is drawn where all or none are
    chosen.

    Raises
    ------
    RecipeError : a ratio outside 0 to 1, or a sampler that is unknown or needs more.
    """
    wanted = sample_count(ratio, count) if checked(ratio) > 0 else 0
    chosen = torch.zeros(count, dtype=torch.bool)
    if wanted == count:
        chosen[:] = True
    elif wanted:
        chosen[sample(sampler, count=wanted, map_index=torch.arange(count)[:, None], features=features)] = True
    return chosen.nonzero().squeeze(1), (~chosen).nonzero().squeeze(1)


def checked(ratio: float) -> float:
    """``ratio``, if it lies in 0 to 1. Raises :class:`RecipeError`."""
    if not 0 <= ratio <= 1:
        raise RecipeError(f"joint.ratio lies between 0 and 1, got {ratio!r}")
    return ratio


def in_order(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Rows (U, D) of parts (places, rows): each row at its place; every place from 0 to U - 1 occurs once."""
    places = torch.cat([places for places, _ in parts])
    rows = torch.cat([rows for _, rows in parts])
    return rows.index_select(0, places.argsort().to(rows.device))


def encode_snippets(encoder: Encoder, clip: Clips, chosen: Tensor) -> Tensor:
    """Rows (n, D) of these of a sample's clips, (n,) indices on the CPU."""
    return encoder(clip.frames, clip.index[chosen.to(clip.index.device)])["features"]


def _encode(encoder: Encoder, clip: Clips, *, ratio: float, sampler: str, features: Tensor | None) -> Tensor:
    everything = torch.arange(len(clip.index))
    seen: Tensor | None = None  # (U, D), once a sampler has looked

    def look() -> Tensor:
        nonlocal seen
        if features is not None:
            return features
        with without_graph(encoder):
            seen = encode_snippets(encoder, clip, everything)
        return seen

    if not len(everything):
        raise ValueError("a sample has no clips")
    chosen, others = choose(len(everything), ratio=ratio, sampler=sampler, features=look)
    parts: list[tuple[Tensor, Tensor]] = []
    if len(others):
        if seen is None:
            with without_graph(encoder):
                parts.append((others, encode_snippets(encoder, clip, others)))
        else:
            parts.append((others, seen[others.to(seen.device)]))
    if len(chosen):
        parts.append((chosen, encode_snippets(encoder, clip, chosen)))
    return in_order(parts)
