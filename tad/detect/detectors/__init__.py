"""The detectors, by name."""

from __future__ import annotations

import inspect
from typing import Any

from tad.detect.detectors.bmn import BMN
from tad.detect.detectors.etad import ETAD
from tad.detect.detectors.sptad import SPTAD
from tad.detect.detectors.talmts import AFSD, TALMTS
from tad.detect.detectors.talnet import TALNet
from tad.detect.detectors.tcanet import TCANet
from tad.detect.interface import Detector
from tad.errors import RecipeError, did_you_mean

DETECTORS: dict[str, type[Detector]] = {
    "talnet": TALNet,
    "tcanet": TCANet,
    "sptad": SPTAD,
    "bmn": BMN,
    "afsd": AFSD,
    "talmts": TALMTS,
    "etad": ETAD,
}


def build_detector(name: str, *, channels: dict[str, int], classes: int, **model: Any) -> Detector:
    """The detector ``name`` for streams of these widths and this many classes; ``model`` are its own keyword arguments.

    Parameters
    ----------
    channels : stream → width of its rows, in the recipe's order.
    classes : how many classes there are.

    Raises
    ------
    RecipeError : an unknown detector or keyword (with what was probably meant), or values that the detector refuses.
    """
    if name not in DETECTORS:
        raise RecipeError(f"unknown detector '{name}'.{did_you_mean(name, DETECTORS)}")
    detector = DETECTORS[name]
    options = inspect.signature(detector).parameters
    known = [key for key in options if key not in ("channels", "classes")]
    unknown = [f"'{key}'.{did_you_mean(key, known)}" for key in model if key not in known]
    if unknown:
        raise RecipeError(f"detector '{name}' has no model option " + " Nor ".join(unknown))
    for key, value in model.items():
        if options[key].annotation in ("bool", bool) and not isinstance(value, bool):
            raise RecipeError(f"detector '{name}': {key} must be true or false, got {value!r}")
    return detector(channels=channels, classes=classes, **model)
