"""Which clips an epoch trains on, and in which order: known before a frame is decoded, so that videos can be read once,
in sequence, and a training that was stopped goes on with the very clips that were left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tad.errors import RecipeError
from tad.extract.clips import BACKGROUND, FIXED, Clip, LabelledVideo, frames_at


class ClipSampler:
    """Draws training clips: background in its share, the rest from all classes alike and from all actions of a class
    alike, however long they are. Step ``k`` draws the same clips whenever it is asked for.

    Parameters
    ----------
    classes : K. offsets : frame offsets of a clip's frames.
    batch : clips a step.
    background : share of the clips whose centre lies in no action.
    mirror : class index → class index of the flipped picture or ``FIXED``, (K + 1,); with it half of the clips flip.
    jitter : a clip's speed is uniform in 1 ± ``jitter``. random_crop : whether the crop's place is drawn.

    Raises
    ------
    RecipeError : no clip's centre lies in an action, or none outside of all actions.
    """

    def __init__(
        self,
        videos: Sequence[LabelledVideo],
        *,
        classes: int,
        offsets: np.ndarray,
        batch: int,
        background: float,
        mirror: np.ndarray | None = None,
        jitter: float = 0.0,
        random_crop: bool = False,
        seed: int = 0,
    ) -> None:
        self.videos, self.offsets, self.batch, self.seed = videos, offsets, batch, seed
        self.background, self.mirror, self.jitter, self.random_crop = background, mirror, jitter, random_crop
        pools: list[list[tuple[int, np.ndarray]]] = [
            [] for _ in range(classes + 1)
        ]  # class → (video, starts) an action
        for number, video in enumerate(videos):
            for action in np.unique(video.actions):
                starts = np.flatnonzero(video.actions == action)
                pools[video.labels[starts[0]]].append((number, starts))
        self.calm, self.actions = pools[BACKGROUND], [pool for pool in pools[BACKGROUND + 1 :] if pool]
        if not self.calm or not self.actions:
            where = "outside of all actions" if self.actions else "inside an action"
            raise RecipeError(
                f"no clip of {len(offsets)} frames has its centre {where}: there is nothing to tell apart"
            )
        lengths = np.array([len(starts) for _, starts in self.calm])
        self.calm_share = lengths / lengths.sum()

    @property
    def natural_steps(self) -> int:
        """Steps in which as many clips of actions are drawn as there are actions, at least one."""
        actions = sum(map(len, self.actions))
        return max(1, math.ceil(actions / (1 - self.background) / self.batch))

    def step(self, step: int) -> list[Clip]:
        """The clips of one step of the optimizer."""
        rng = np.random.default_rng((self.seed, step))
        return [self._one(rng) for _ in range(self.batch)]

    def _one(self, rng: np.random.Generator) -> Clip:
        if rng.random() < self.background:
            number, starts = self.calm[rng.choice(len(self.calm), p=self.calm_share)]
        else:
            pool = self.actions[rng.integers(len(self.actions))]
            number, starts = pool[rng.integers(len(pool))]
        video, start = self.videos[number], int(starts[rng.integers(len(starts))])
        label = int(video.labels[start])
        flipped = bool(self.mirror is not None and self.mirror[label] != FIXED and rng.random() < 0.5)
        if flipped and self.mirror is not None:
            label = int(self.mirror[label])
        speed = rng.uniform(1 - self.jitter, 1 + self.jitter) if self.jitter else 1.0
        place = (float(rng.random()), float(rng.random())) if self.random_crop else None
        frames = frames_at(start, self.offsets, frames=video.frames, speed=speed)
        return Clip(number, frames, label, flipped, place)


@dataclass(frozen=True)
class ClipPlan:
    """``clips`` in the order in which they are wanted; ``visits``: the videos in the order in which they are decoded,
    each as the positions of its clips, by the frame that completes them. At every moment the clips that have been
    decoded but are not wanted yet are at most ``pool``.
    """

    clips: list[Clip]
    visits: list[list[int]]
    pool: int

    def part(self, positions: Sequence[int]) -> ClipPlan:
        """The plan of some of its clips (positions in rising order)."""
        new = {old: position for position, old in enumerate(positions)}
        visits = [[new[old] for old in visit if old in new] for visit in self.visits]
        return ClipPlan([self.clips[old] for old in positions], [visit for visit in visits if visit], self.pool)


def in_sequence(clips: Sequence[Clip]) -> ClipPlan:
    """The plan of clips that are sorted already by video and by their last frame: no shuffling, a pool of one."""
    visits: dict[int, list[int]] = {}
    for position, clip in enumerate(clips):
        visits.setdefault(clip.video, []).append(position)
    return ClipPlan(list(clips), list(visits.values()), 1)


def shuffled(clips: Sequence[Clip], *, pool: int | None, rng: np.random.Generator) -> ClipPlan:
    """An epoch's plan: videos are visited once each, in random order; their clips go into a pool of ``pool`` clips, and
    whenever it is full a clip chosen at random leaves it. A pool that holds all (or ``None``) keeps the clips' order,
    which is random already.
    """
    order: dict[int, list[int]] = {}
    for position in sorted(range(len(clips)), key=lambda k: (int(clips[k].frames[-1]), k)):
        order.setdefault(clips[position].video, []).append(position)
    videos = sorted(order)
    visits = [order[videos[k]] for k in rng.permutation(len(videos))]
    if pool is None or pool >= len(clips):
        return ClipPlan(list(clips), visits, len(clips))
    held: list[int] = []
    leaving: list[int] = []
    for position in (position for visit in visits for position in visit):
        if len(held) == pool:
            leaving.append(_take(held, rng))
        held.append(position)
    while held:
        leaving.append(_take(held, rng))
    place = {position: number for number, position in enumerate(leaving)}
    return ClipPlan([clips[k] for k in leaving], [[place[k] for k in visit] for visit in visits], pool)


def _take(held: list[int], rng: np.random.Generator) -> int:
    chosen = int(rng.integers(len(held)))
    held[chosen], held[-1] = held[-1], held[chosen]
    return held.pop()
