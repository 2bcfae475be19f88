"""Where a published method is: every entry of the catalogue, and every public name, whose documentation says a name, a title or a number."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from . import catalog
from .catalog import Description

PUBLIC = "sc"  # the kind of what is imported from the package itself, sc.ZerothOrder
SHORT = 4  # names of so few letters are looked for as words of their own, as they are written: IST is in "exist"


def mentions(words: str) -> list[Description]:
    """Recipes first, then public names, then all else; those that are called so before those that speak of it.

        mentions("Sparse MeZO")        # hyphens, spaces and case do not matter; also "2402.15751", "SPP", "winning tickets"
    """
    order = {kind: number for number, kind in enumerate(("recipe", PUBLIC, *catalog.KINDS))}
    found = [(_plain(words) != _plain(one.name), order[one.kind], one) for one, text in _all() if _says(words, one.name, text)]
    return [one for *_, one in sorted(found, key=lambda item: item[:2])]


def _says(words: str, name: str, text: str) -> bool:
    plain = _plain(words)
    if not plain:
        return False
    if len(plain) <= SHORT:
        return plain == _plain(name) or re.search(rf"(?<![A-Za-z0-9]){re.escape(words.strip())}(?![A-Za-z0-9])", text) is not None
    return plain in _plain(name) or plain in _plain(text)


def _plain(text: str) -> str:
    return re.sub(r"[\W_]", "", text).lower()


@cache
def _all() -> tuple[tuple[Description, str], ...]:
    """What there is, with all of its documentation: read once a process."""
    return tuple(_read())


def _read() -> Iterator[tuple[Description, str]]:
    for kind in catalog.KINDS:
        for name in catalog.names(kind):
            described = catalog.describe(kind, name)
            yield described, "\n".join(_documentation(described.file, name))
    from . import _LAZY

    for name, module in _LAZY.items():
        file = Path(__file__).with_name(f"{module}.py")
        if file.exists():
            texts = _documentation(file, name)
            yield Description(PUBLIC, name, texts[-1].partition("\n")[0], file, catalog.read_fields(texts[-1])), "\n".join(texts)


def _documentation(file: Path, name: str) -> list[str]:
    """That of a file, and of what is called so in it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    own = [one for one in tree.body if isinstance(one, ast.ClassDef | ast.FunctionDef) and _plain(one.name) == _plain(name)]
    return [ast.get_docstring(one) or "" for one in (tree, *own)]
