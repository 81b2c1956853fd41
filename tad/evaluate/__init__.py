"""Scores: mAP of detections, average recall of proposals, and the named protocols that fix what is counted.

>>> from tad.evaluate import detection_map, average_recall, evaluate, PROTOCOLS
"""

from tad.evaluate.detection import ANET_TIOU, THUMOS_TIOU, DetectionResult, detection_map, table
from tad.evaluate.proposals import ProposalResult, average_recall
from tad.evaluate.protocols import PROTOCOLS, Protocol, evaluate, evaluate_recall, get_protocol

__all__ = [
    "ANET_TIOU",
    "PROTOCOLS",
    "THUMOS_TIOU",
    "DetectionResult",
    "ProposalResult",
    "Protocol",
    "average_recall",
    "detection_map",
    "evaluate",
    "evaluate_recall",
    "get_protocol",
    "table",
]
