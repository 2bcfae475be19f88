"""Recipes by name: `recipes.wanda(structure="2:4")` is the Pipeline of that published method. Each is imported when it is asked for."""

from __future__ import annotations

from typing import Any

from . import catalog
from .errors import UnknownNameError, nearest


class UnknownRecipeError(UnknownNameError, AttributeError):
    """A recipe that the catalogue does not hold. Also an AttributeError, so that hasattr() and getattr() work as usual."""


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name not in catalog.names("recipe"):
        raise UnknownRecipeError(f"unknown recipe {name!r}", hint=nearest(name, catalog.names("recipe")))
    return catalog.get("recipe", name)


def __dir__() -> list[str]:
    return list(catalog.names("recipe"))
