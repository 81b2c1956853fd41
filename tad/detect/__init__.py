"""Detection: from a feature store to segments in time. See docs/detect.md.

>>> from tad.detect import DETECTORS, build_detector, train_detector, detect, nms, soft_nms
"""

from tad.detect.detectors import DETECTORS, build_detector
from tad.detect.infer import detect, resuppress
from tad.detect.interface import Batch, Detector, LevelSpec, Segments, Targets
from tad.detect.postprocess import suppress, suppress_all
from tad.detect.preflight import Failure
from tad.detect.runs import Run
from tad.detect.suppression import nms, soft_nms, vote
from tad.detect.train import train_detector

__all__ = [
    "DETECTORS",
    "Batch",
    "Detector",
    "Failure",
    "LevelSpec",
    "Run",
    "Segments",
    "Targets",
    "build_detector",
    "detect",
    "nms",
    "resuppress",
    "soft_nms",
    "suppress",
    "suppress_all",
    "train_detector",
    "vote",
]
