"""Who may import whom, and that the command line starts without the heavy libraries."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tad

PACKAGE = Path(tad.__file__).parent
ROOT = PACKAGE.parent
FREE = {"errors", "progress", "_version"}  # these import nothing of ours, everyone may import them
ALL = {
    "training",
    "exchange",
    "doctor",
    "annotations",
    "timeline",
    "recipe",
    "store",
    "extract",
    "detect",
    "evaluate",
    "synth",
    "apply",
    "demo",
    "shipped",
    "joint",
}
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "progress": set(),
    "_version": set(),
    "annotations": set(),
    "timeline": set(),
    "recipe": set(),
    "shipped": {"recipe"},
    "store": {"timeline"},
    "evaluate": {"annotations"},
    "training": {"recipe"},
    "exchange": {"annotations"},
    "extract": {"store", "annotations", "timeline", "recipe", "training"},
    "detect": {
        "store",
        "annotations",
        "timeline",
        "recipe",
        "evaluate",
        "training",
    },  # evaluate: checkpoints are chosen by mAP
    "synth": {"annotations"},
    "apply": {"store", "annotations", "timeline", "recipe", "extract", "detect", "training"},
    "joint": {"store", "annotations", "timeline", "recipe", "training", "extract", "detect", "apply"},
    "doctor": {"store", "annotations", "extract", "detect"},
    "demo": ALL - {"demo"},
    "cli": ALL,
}


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports_of(path: Path) -> set[str]:
    """The parts of tad that a file imports, wherever in the file it does."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "tad" else [node.module or ""]
            )
        found |= {name.split(".")[1] for name in names if name.startswith("tad.")}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_rules(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"{part} has no rule in this test"
    forbidden = imports_of(path) - ALLOWED[part] - FREE - {part}
    assert not forbidden, f"{path.name} imports {sorted(forbidden)}"


def test_the_rules_have_no_circle() -> None:
    seen: set[str] = set()
    while ready := {part for part, needs in ALLOWED.items() if part not in seen and needs - {part} <= seen | FREE}:
        seen |= ready
    assert seen == set(ALLOWED)


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_help_needs_none_of_the_heavy_libraries() -> None:
    heavy = ["torch", "numpy", "pandas", "zarr", "h5py", "cv2", "dask", "scipy", "pydantic", "rich"]
    loaded = python(f"import sys, tad.cli; print([m for m in {heavy} if m in sys.modules])")
    assert loaded == "[]"


def test_one_version() -> None:
    assert re.search(rf"^## \[?{re.escape(tad.__version__)}", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    out = subprocess.run([sys.executable, "-m", "tad.cli", "--version"], capture_output=True, text=True, check=True)
    assert tad.__version__ in out.stdout


def test_no_path_of_a_machine_in_the_tree() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![\w.])/(?:work|root|home)/[A-Za-z]")
    suffixes = {".py", ".md", ".toml", ".yaml", ".yml", ".txt"}
    bad = [
        name
        for name in tracked.stdout.splitlines()
        if (ROOT / name).suffix in suffixes
        and (ROOT / name).is_file()
        and pattern.search((ROOT / name).read_text(encoding="utf-8"))
        and name != "tests/test_architecture.py"
    ]
    assert not bad
