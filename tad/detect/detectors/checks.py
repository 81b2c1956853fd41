"""Checks of a detector's keyword arguments."""

from __future__ import annotations

from collections.abc import Sequence

from tad.errors import RecipeError, did_you_mean


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise :class:`RecipeError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise RecipeError(f"unknown {name} {value!r}.{did_you_mean(str(value), choices)}")


def check_numbers(low: float, high: float, **values: float) -> None:
    """Raise :class:`RecipeError` unless each value lies in ``[low, high]``, and is whole where ``low`` is an ``int``."""
    whole = isinstance(low, int)
    for name, value in values.items():
        right_type = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not right_type or not low <= value <= high:
            raise RecipeError(f"{name} must be a {'whole ' if whole else ''}number from {low} to {high}, got {value!r}")
