"""The recipes that come with tad: YAML files of detectors, one or more a row of the papers' tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tad.errors import RecipeError, did_you_mean
from tad.recipe import load_mapping

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Shipped:
    """One recipe of a detector: ``name`` is its path in the collection without suffix, ``about`` its first line."""

    name: str
    detector: str
    streams: tuple[str, ...]
    about: str
    path: Path


def recipes_folder() -> Path:
    """The collection: inside the installed package, or beside it in a checkout. Raises :class:`RecipeError`."""
    package = Path(__file__).parent
    if (package / "recipes").is_dir():
        return package / "recipes"
    if (package.parent / "pyproject.toml").is_file() and (package.parent / "recipes").is_dir():
        return package.parent / "recipes"
    raise RecipeError("this installation of tad came without its recipes; install it again, or name a recipe's file")


def shipped_recipes(detector: str | None = None) -> list[Shipped]:
    """The recipes of detectors, or of one ``detector``, by name.

    Raises :class:`RecipeError` where there are none for ``detector``, and see :func:`recipes_folder`.
    """
    folder = recipes_folder()
    found = [_read(path, folder) for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES]
    recipes = [recipe for recipe in found if recipe is not None]
    if detector is None:
        return recipes
    chosen = [recipe for recipe in recipes if recipe.detector == detector]
    if not chosen:
        hint = did_you_mean(detector, {recipe.detector for recipe in recipes})
        raise RecipeError(f"no recipe of a detector '{detector}' comes with tad.{hint}")
    return chosen


def find_recipe(name: str | Path) -> Path:
    """The file behind ``name``: a file as it is, else one of :func:`shipped_recipes`.

    Those are known by their name (``bmn/hacs-table3-5-csn``), also with its suffix or ``recipes/`` before it, and by
    the last part of the name where only one has it.

    Raises
    ------
    RecipeError : nothing is called so, or several are.
    """
    if Path(name).is_file():
        return Path(name)
    text = Path(name).as_posix().removeprefix("recipes/")
    wanted = text.removesuffix(".yaml").removesuffix(".yml")
    for suffix in SUFFIXES:
        if (path := recipes_folder() / f"{wanted}{suffix}").is_file():
            return path
    recipes = {recipe.name: recipe.path for recipe in shipped_recipes()}
    same = [known for known in recipes if known.rpartition("/")[2] == wanted]
    if len(same) == 1:
        return recipes[same[0]]
    if same:
        raise RecipeError(f"several recipes are called '{wanted}': {', '.join(same)}; give one of these names")
    hint = did_you_mean(wanted, recipes)
    hint = hint if hint.startswith(" Did") else " 'tad recipe ls' lists them."  # rather than all names here
    raise RecipeError(f"no file and no recipe of tad is called '{name}'.{hint}")


def _read(path: Path, folder: Path) -> Shipped | None:
    """One file of the collection; None where it is no detector's recipe, as those in ``backbones/``."""
    data = load_mapping(path)
    if "detector" not in data:
        return None
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return Shipped(
        name=path.relative_to(folder).with_suffix("").as_posix(),
        detector=str(data["detector"]),
        streams=tuple(map(str, data.get("streams") or ())),
        about=first.lstrip("# ") if first.startswith("#") else "",
        path=path,
    )
