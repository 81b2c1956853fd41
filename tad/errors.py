"""The exceptions of tad, all in one tree.

::

    TadError
    ├── VideoError        a file that cannot be decoded, or holds no frame
    ├── StoreError        a feature store that is missing, damaged, or made with another recipe
    ├── RecipeError       a configuration that does not make sense (also a ValueError)
    ├── AnnotationError   truth or predictions that cannot be meant (also a ValueError)
    └── WeightsError      a checkpoint that does not fit, or is not the one that was recorded

A message says what is wrong, where (video, stream, file), and what to do about it.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class TadError(Exception):
    """Anything that tad refuses; the command line prints it without a traceback and exits with status 1."""


class VideoError(TadError):
    """A video that cannot be opened or decoded, or has no frame."""


class StoreError(TadError):
    """A feature store, stream or entry that is missing, damaged, or bound to another recipe."""


class RecipeError(TadError, ValueError):
    """A recipe with unknown keys or values that do not fit together."""


class AnnotationError(TadError, ValueError):
    """Truth or predictions with a malformed file, segment, label or id."""


class WeightsError(TadError):
    """A checkpoint that is missing, does not fit the network, or has another hash than recorded."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` when something close is known, else ``` Known: a, b.```"""
    options = sorted(known)
    close = get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(options)}." if options else ""
