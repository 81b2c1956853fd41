"""Optical flow between neighbouring frames, quantised to uint8 as the flow networks were trained on it.

Flow points forward: ``previous(y, x)`` has moved to ``next(y + flow_y, x + flow_x)``, in pixels a frame.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any, Protocol

import cv2
import numpy as np

from tad.errors import RecipeError, did_you_mean

BOUND = 20.0  # pixels a frame that 0 and 255 stand for
DIS_MIN_SIDE = 16  # OpenCV's DIS refuses sides below 12 and gives NaN at 8 x 300


class FlowEstimator(Protocol):
    """A method. ``params`` is recorded with the features; calls may come from several threads at once."""

    name: str
    params: dict[str, Any]

    def __call__(self, previous_gray: np.ndarray, next_gray: np.ndarray) -> np.ndarray:
        """Two uint8 frames (H, W) → float32 flow (H, W, 2), x then y, in pixels a frame."""


class DISFlow:
    """Dense inverse search (Kroeger et al., ECCV 2016), OpenCV's port with the values of its *medium* preset.

    The values are written out, since an OpenCV release may redefine a preset; the coarsest scale follows the size.
    """

    name = "dis"

    def __init__(self) -> None:
        self.params: dict[str, Any] = {
            "finest_scale": 1,
            "patch_size": 8,
            "patch_stride": 3,
            "gradient_descent_iterations": 25,
            "mean_normalization": True,
            "spatial_propagation": True,
            "refinement_iterations": 5,
            "refinement_alpha": 20.0,
            "refinement_delta": 5.0,
            "refinement_gamma": 10.0,
        }
        self._local = threading.local()  # the OpenCV object keeps its buffers: one for each thread

    def _estimator(self) -> cv2.DISOpticalFlow:
        dis = getattr(self._local, "dis", None)
        if dis is None:
            dis = self._local.dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
            dis.setPatchStride(self.params["patch_stride"])
            dis.setGradientDescentIterations(self.params["gradient_descent_iterations"])
            dis.setUseMeanNormalization(self.params["mean_normalization"])
            dis.setUseSpatialPropagation(self.params["spatial_propagation"])
            dis.setVariationalRefinementIterations(self.params["refinement_iterations"])
            dis.setVariationalRefinementAlpha(self.params["refinement_alpha"])
            dis.setVariationalRefinementDelta(self.params["refinement_delta"])
            dis.setVariationalRefinementGamma(self.params["refinement_gamma"])
        # On a small frame the object lowers these for good, and all later flow would depend on what came before.
        dis.setFinestScale(self.params["finest_scale"])
        dis.setPatchSize(self.params["patch_size"])
        return dis

    def __call__(self, previous_gray: np.ndarray, next_gray: np.ndarray) -> np.ndarray:
        height, width = previous_gray.shape
        below, right = max(0, DIS_MIN_SIDE - height), max(0, DIS_MIN_SIDE - width)
        if below or right:
            previous_gray, next_gray = (
                cv2.copyMakeBorder(gray, 0, below, 0, right, cv2.BORDER_REPLICATE)
                for gray in (previous_gray, next_gray)
            )
        return self._estimator().calc(previous_gray, next_gray, None)[:height, :width]


class FarnebackFlow:
    """Polynomial expansion (Farnebäck, SCIA 2003), as in OpenCV; smoother than DIS, with artefacts at the edges."""

    name = "farneback"

    def __init__(self) -> None:
        self.params: dict[str, Any] = {
            "pyramid_scale": 0.5,
            "levels": 5,
            "window": 15,
            "iterations": 3,
            "polynomial_neighbours": 5,
            "polynomial_sigma": 1.1,
        }

    def __call__(self, previous_gray: np.ndarray, next_gray: np.ndarray) -> np.ndarray:
        p = self.params
        return cv2.calcOpticalFlowFarneback(
            previous_gray,
            next_gray,
            None,
            p["pyramid_scale"],
            p["levels"],
            p["window"],
            p["iterations"],
            p["polynomial_neighbours"],
            p["polynomial_sigma"],
            0,
        )


FLOWS: dict[str, Callable[[], FlowEstimator]] = {
    "dis": DISFlow,
    "farneback": FarnebackFlow,
}


def build_flow(name: str) -> FlowEstimator:
    """The estimator called ``name`` in :data:`FLOWS`. Raises :class:`RecipeError` for any other name."""
    if name not in FLOWS:
        raise RecipeError(f"no flow method is called '{name}'.{did_you_mean(name, FLOWS)}")
    return FLOWS[name]()


def quantise(flow: np.ndarray, bound: float = BOUND) -> np.ndarray:
    """Flow in pixels → uint8, same shape: clipped to ±bound, then ``round((flow + bound) * 255 / (2 * bound))``.

    -bound → 0, 0 → 128, bound → 255, as the flow stream of I3D was trained (README of kinetics-i3d). NaN is no motion.
    """
    if not bound > 0:
        raise RecipeError(f"the flow's bound must be positive, got {bound}")
    clipped = np.clip(np.nan_to_num(flow, nan=0.0, posinf=bound, neginf=-bound), -bound, bound)
    return np.rint((clipped + bound) * (255.0 / (2.0 * bound))).astype(np.uint8)


class FlowStream:
    """Frames of one video in, quantised flow out, each pair once; the output does not depend on how frames are chunked.

    Flow ``k`` leads from frame ``k`` to ``k + 1``; ``finish`` repeats the last one, so that n frames give n flows (a
    single frame: no motion). After ``finish`` the stream is as new. Identical neighbours (a frame repeated on the grid)
    are no motion by definition and are not estimated.

    Parameters
    ----------
    threads : pairs estimated at once; they are independent, so that this changes the speed only.

    Attributes
    ----------
    flow_s : seconds spent here so far, over all videos.
    """

    def __init__(self, estimator: FlowEstimator, *, bound: float = BOUND, threads: int = 1) -> None:
        self.estimator = estimator
        self.bound = bound
        self.threads = max(1, threads)
        self.flow_s = 0.0
        self._size = (0, 0)  # height and width of this video's frames
        self._gray: np.ndarray | None = None  # the last frame, (H, W)
        self._flow: np.ndarray | None = None  # the last flow, (H, W, 2)

    def push(self, frames: np.ndarray) -> np.ndarray:
        """uint8 RGB frames (n, H, W, 3) → the flows that they complete: (n, H, W, 2), at a video's start n - 1."""
        begun = perf_counter()
        height, width = frames.shape[1:3]
        if self._gray is not None and self._size != (height, width):
            raise ValueError(f"frames of one video differ in size: {self._size} and {(height, width)}; finish() first")
        self._size = (height, width)
        grays = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
        if self._gray is not None:
            grays.insert(0, self._gray)
        flows = np.empty((max(0, len(grays) - 1), height, width, 2), np.uint8)

        def estimate(index: int) -> None:
            flows[index] = self._pair(grays[index], grays[index + 1])

        if self.threads > 1 and len(flows) > 1:
            with ThreadPoolExecutor(min(self.threads, len(flows))) as pool:
                list(pool.map(estimate, range(len(flows))))
        else:
            for index in range(len(flows)):
                estimate(index)
        if grays:
            self._gray = grays[-1]
        if len(flows):
            self._flow = flows[-1].copy()
        self.flow_s += perf_counter() - begun
        return flows

    def _pair(self, previous: np.ndarray, following: np.ndarray) -> np.ndarray:
        if np.array_equal(previous, following):
            return quantise(np.zeros((*previous.shape, 2), np.float32), self.bound)
        return quantise(self.estimator(previous, following), self.bound)

    def finish(self) -> np.ndarray:
        """The flow of the video's last frame, uint8 (1, H, W, 2); (0, H, W, 2) when no frame was pushed."""
        last, single, size = self._flow, self._gray is not None, self._size
        self._flow, self._gray, self._size = None, None, (0, 0)
        if last is not None:
            return last[None]
        return quantise(np.zeros((int(single), *size, 2), np.float32), self.bound)
