"""What one has to know of THUMOS14 to read its files: the classes, the pattern of its ids, and its broken segments."""

import re

# The 20 detection classes. gtad's `label-idx` counts them in this (alphabetical) order; -1 is Ambiguous.
CLASSES = (
    "BaseballPitch",
    "BasketballDunk",
    "Billiards",
    "CleanAndJerk",
    "CliffDiving",
    "CricketBowling",
    "CricketShot",
    "Diving",
    "FrisbeeCatch",
    "GolfSwing",
    "HammerThrow",
    "HighJump",
    "JavelinThrow",
    "LongJump",
    "PoleVault",
    "Shotput",
    "SoccerPenalty",
    "TennisSwing",
    "ThrowDiscus",
    "VolleyballSpiking",
)

# Of each of CLASSES its number in UCF101's list of 101, counted from 1: the columns of classifiers trained on that.
UCF101_NUMBERS = (7, 9, 12, 21, 22, 23, 24, 26, 31, 33, 36, 40, 45, 51, 68, 79, 85, 92, 93, 97)
UCF101_CLASSES = 101
VIDEOS = {"validation": 1010, "test": 1574}  # numbered from 1 in their ids; most of them have no segments

AMBIGUOUS = "Ambiguous"  # marks what the annotators were unsure of; no class, scored by nobody

VIDEO_ID = re.compile(r"video_(test|validation)_\d{7}")

# Segments that end far behind the end of their video, in every public copy of the annotation. The value is the
# latest end in seconds. Everybody trains and scores with them, so they are kept; later ones would be a new error.
BEYOND_THE_END = {
    "video_test_0000270": 713.7,  # 176.25 s long: 22 of its 29 HammerThrow segments lie behind the end
    "video_test_0000814": 337.1,  # 181.13 s long: 3 segments
    "video_test_0001081": 130.1,  # 117.13 s long: 127.5-130.1 s
    "video_validation_0000364": 127.0,  # 112.53 s long: 2 segments
    "video_validation_0000856": 91.5,  # 83.03 s long: 2 segments
}


def subset_of(video: str) -> str:
    """``test`` or ``validation`` when the id is one of THUMOS14, else nothing: its CSV files hold no subset column."""
    match = VIDEO_ID.fullmatch(video)
    return match.group(1) if match else ""
