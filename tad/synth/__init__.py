"""Synthetic untrimmed videos with their truth, for the demo, the tests and the benchmarks.

In every video a few textured objects are in view from the first frame to the last. Most of the time they rest, jitter
or drift; now and then one of them performs an *action*: it circles or spins (clockwise or counter-clockwise), swings,
bounces, opens (grows slowly and snaps back) or closes (the same, backwards). An action starts from the pose in which
the object is and leaves it in the pose which it has reached, and all poses are drawn from the same ranges. So no single
frame tells whether an action is going on, nor which: only motion does, and in three pairs of classes only its order.

The background is textured and moves with a camera that pans, zooms and shakes; the light changes; the sensor is noisy.
Everything follows from one seed a video: the same call gives the same frames, and videos do not depend on each other.

>>> from tad.synth import make_video, make_videos
"""

from tad.synth.files import SynthVideo, make_video, make_videos
from tad.synth.plan import ACTIONS, CLASSES, DISTRACTORS, FPS, MIRRORED, SIZE, Plan, plan_video
from tad.synth.render import render

__all__ = [
    "ACTIONS",
    "CLASSES",
    "DISTRACTORS",
    "FPS",
    "MIRRORED",
    "SIZE",
    "Plan",
    "SynthVideo",
    "make_video",
    "make_videos",
    "plan_video",
    "render",
]
