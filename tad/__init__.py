"""tad: temporal action detection, from videos to features to detections to scores.

Nothing heavy is imported here; take what you need from :mod:`tad.extract`, :mod:`tad.store`, :mod:`tad.detect`,
:mod:`tad.evaluate` and :mod:`tad.annotations`.
"""

from tad._version import __version__

__all__ = ["__version__"]
