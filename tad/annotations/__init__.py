"""What is true and what is predicted: readers and writers of the field's files, as pandas tables.

>>> from tad.annotations import read_truth, read_annotations, read_predictions, write_predictions

Segments are rows ``video, start_s, end_s, label`` (predictions add ``score``); times are seconds.
"""

from tad.annotations._predictions import check_segments, predictions_json, read_predictions, write_predictions
from tad.annotations._scores import read_scores_about, read_video_scores, write_video_scores
from tad.annotations._truth import (
    TRAIN_NAMES,
    Truth,
    canonical_subset,
    read_annotations,
    read_truth,
    read_videos,
    training_subset,
)

__all__ = [
    "TRAIN_NAMES",
    "Truth",
    "canonical_subset",
    "check_segments",
    "predictions_json",
    "read_annotations",
    "read_predictions",
    "read_scores_about",
    "read_truth",
    "read_video_scores",
    "read_videos",
    "training_subset",
    "write_predictions",
    "write_video_scores",
]
