"""Scores of detections, proposals and classifiers, named protocols, intervals, comparison, error analysis.

>>> from tad.evaluate import detection_map, average_recall, evaluate, PROTOCOLS
>>> from tad.evaluate import bootstrap_map, classification_scores, compare, diagnose
"""

from tad.evaluate.bootstrap import Intervals, bootstrap_map
from tad.evaluate.characteristics import BUCKETS, read_characteristics, with_characteristics
from tad.evaluate.classification import ClassificationResult, classification_scores
from tad.evaluate.comparison import Comparison, SeedSpread, compare, seed_spread
from tad.evaluate.curves import pr_curves
from tad.evaluate.detection import ANET_TIOU, THUMOS_TIOU, DetectionResult, detection_map, table
from tad.evaluate.diagnose import Diagnosis, diagnose
from tad.evaluate.proposals import ProposalResult, average_recall
from tad.evaluate.protocols import PROTOCOLS, Protocol, Scope, evaluate, evaluate_recall, get_protocol, scope
from tad.evaluate.recall import recall_at_kx

__all__ = [
    "ANET_TIOU",
    "BUCKETS",
    "PROTOCOLS",
    "THUMOS_TIOU",
    "ClassificationResult",
    "Comparison",
    "DetectionResult",
    "Diagnosis",
    "Intervals",
    "ProposalResult",
    "Protocol",
    "Scope",
    "SeedSpread",
    "average_recall",
    "bootstrap_map",
    "classification_scores",
    "compare",
    "detection_map",
    "diagnose",
    "evaluate",
    "evaluate_recall",
    "get_protocol",
    "pr_curves",
    "read_characteristics",
    "recall_at_kx",
    "scope",
    "seed_spread",
    "table",
    "with_characteristics",
]
