"""Every recipe of recipes/sptad builds its detector, and docs/sptad.md says the truth about them and the defaults."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tad.detect.align import check_needs
from tad.detect.detectors import DETECTORS, build_detector
from tad.detect.detectors.sptad import SPTAD
from tad.detect.recipes import DEFAULTS, detect_recipe
from tad.detect.windows import detection_stride_fits

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "sptad").glob("*.yaml"))
PAGE = (ROOT / "docs" / "sptad.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_build(path: Path) -> None:
    recipe = detect_recipe(file=path)
    assert recipe.detector == "sptad"
    model = SPTAD.resolve(recipe.model, np.full(50, 40.0))
    with torch.device("meta"):
        detector = build_detector("sptad", channels=dict.fromkeys(recipe.streams, 1024), classes=20, **model)
    assert isinstance(detector, SPTAD)
    check_needs(detector.needs, detector="sptad")
    detection_stride_fits(detector.needs, recipe.data)
    assert path.stem == "planted" or f"`{path.name}`" in PAGE


def test_recipes_differ_from_the_paper_where_they_say() -> None:
    def model(name: str) -> dict:
        return detect_recipe(file=ROOT / "recipes" / "sptad" / f"{name}.yaml").model

    base = detect_recipe(file=ROOT / "recipes" / "sptad" / "thumos14.yaml")
    assert base.model["rows"] * 2 == 256
    assert (base.data.train_stride, base.data.detect_stride) == (15, 64)
    keywords = {name: p.default for name, p in inspect.signature(SPTAD).parameters.items()}
    for key in ("proposals", "heads", "rows"):
        assert base.model[key] == keywords[key]
    for name, changes in {
        "thumos14-table5-single": {"pyramid": "single"},
        "thumos14-table5-high": {"pyramid": "high"},
        "thumos14-table6-1-head": {"heads": 1},
        "thumos14-table6-2-heads": {"heads": 2},
        "thumos14-table6-6-heads": {"heads": 6},
        "thumos14-table7-no-action-head": {"action_head": False},
        "thumos14-table8-clip-224": {"rows": 112},
        "thumos14-table8-clip-288": {"rows": 144},
        "thumos14-table8-clip-320": {"rows": 160},
    }.items():
        assert model(name) == {**base.model, **changes}
    assert len(RECIPES) == 14


def test_defaults_build() -> None:
    recipe = detect_recipe("sptad", streams=["rgb"])
    model = SPTAD.resolve(recipe.model, np.full(50, 40.0))
    assert model["rows"] == 64
    assert DETECTORS["sptad"] is SPTAD
    assert set(DEFAULTS["sptad"]["model"]) <= set(inspect.signature(SPTAD).parameters)
    build_detector("sptad", channels={"rgb": 8}, classes=2, **model)


def test_the_page_runs_and_names_keys_that_exist() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/sptad.md", "exec"), {})
    keywords = set(inspect.signature(SPTAD).parameters)
    table = PAGE.split("## What the paper fixes")[1].split("## ")[0]
    keys = {key for row in table.splitlines() if row.startswith("|") for key in re.findall(r"`([a-z_0-9]+)`", row)}
    assert keys
    assert keys <= keywords, keys - keywords
