"""The catalogue: the file tree is the registry. Nothing is imported until it is asked for by name.

A file `passes/reparam/fold_batchnorm.py` is the pass `fold_batchnorm`; the same holds for every kind in KINDS. Files that start with "_"
are helpers. A plug-in is a package with the same folders, named by an entry point of the group "sparsify_compiler.plugins".
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from .errors import SparsifyError, nearest, unknown

PLUGINS = "sparsify_compiler.plugins"
FIELDS = ("Matches", "Rewrites", "Preserves", "Paper")


@dataclass(frozen=True)
class Kind:
    """Where the files of a kind are, and what one holds: an object named like the file, or the module itself."""

    pattern: str
    holds_object: bool = True
    without: tuple[str, ...] = ()  # names of folders that belong to another kind
    named_like: str = ""  # the kind that gives an entry its name; files of other names beside them are helpers


KINDS: Mapping[str, Kind] = {
    "pass": Kind("passes/*/*.py", without=("recipes",)),
    "recipe": Kind("passes/recipes/*.py"),
    "score": Kind("passes/prune/scores/*.py"),
    "structure": Kind("passes/prune/structures/*.py"),
    "budget": Kind("passes/prune/budgets/*.py"),
    "repair": Kind("passes/prune/repairs/*.py"),
    "scorer": Kind("passes/activation/scorers/*.py"),
    "activation loss": Kind("passes/train/losses/*.py"),
    "weight loss": Kind("passes/train/weight_losses/*.py"),
    "distillation": Kind("passes/train/distillations/*.py"),
    "router loss": Kind("passes/train/router_losses/*.py"),
    "router gradient": Kind("passes/train/router_gradients/*.py"),
    "schedule": Kind("passes/train/schedules/*.py"),
    "chooser": Kind("passes/train/choosers/*.py"),
    "adapter": Kind("passes/train/adapters/*.py"),
    "activation": Kind("passes/activation/functions/*.py"),
    "selector": Kind("passes/activation/selectors/*.py"),
    "input budget": Kind("passes/activation/budgets/*.py"),
    "input repair": Kind("passes/activation/repairs/*.py"),
    "attention pattern": Kind("passes/attention/patterns/*.py"),
    "block scorer": Kind("passes/attention/scorers/*.py"),
    "block selector": Kind("passes/attention/selectors/*.py"),
    "token order": Kind("passes/attention/orders/*.py"),
    "block rest": Kind("passes/attention/rests/*.py"),
    "attention branch": Kind("passes/attention/branches/*.py"),
    "partition": Kind("passes/moe/partitions/*.py"),
    "importance": Kind("passes/moe/importances/*.py"),
    "router": Kind("passes/moe/routers/*.py"),
    "expert selector": Kind("passes/moe/selectors/*.py"),
    "shared expert": Kind("passes/moe/shared_experts/*.py"),
    "free expert": Kind("passes/moe/free_experts/*.py"),
    "expert weight": Kind("passes/moe/weights/*.py"),
    "expert repair": Kind("passes/moe/repairs/*.py"),
    "block importance": Kind("passes/moe/block_importances/*.py"),
    "token importance": Kind("passes/moe/token_importances/*.py"),
    "expert score": Kind("passes/moe/expert_scores/*.py"),
    "format": Kind("formats/*.py"),
    "op": Kind("ops/*.py", holds_object=False),
    "kernel": Kind("codegen/kernels/*.py", holds_object=False, named_like="cost"),  # costs are there for our ops and for dense ones
    "cost": Kind("cost_models/ops/*.py", holds_object=False),
    "cost model": Kind("cost_models/*.py", holds_object=False),
    "solver": Kind("cost_models/solve.py", holds_object=False),
}


@dataclass(frozen=True)
class Description:
    """What the docstring of an entry says. `fields` maps Matches, Rewrites, Preserves and Paper to their text, where given."""

    kind: str
    name: str
    summary: str
    file: Path
    fields: Mapping[str, str] = field(default_factory=dict)


def names(kind: str) -> tuple[str, ...]:
    """The names of a kind, sorted. Raises UnknownNameError for an unknown kind, SparsifyError for a name used twice."""
    return tuple(sorted(_entries(kind)))


def get(kind: str, name: str) -> Any:
    """The pass class, recipe function, score function, structure class …, or for ops, kernels and costs the module, of that name.

    Raises UnknownNameError with the nearest names, and SparsifyError where the file does not hold what its name says.
    """
    module = importlib.import_module(_entry(kind, name)[0])
    if not KINDS[kind].holds_object:
        return module
    for attribute, value in vars(module).items():
        if _plain(attribute) == _plain(name) and getattr(value, "__module__", None) == module.__name__:
            return value
    raise SparsifyError(f"the file holds nothing named {name!r}", where=str(module.__file__),
                        hint=f"define the {kind} under its file's name (case and underscores do not matter)")


def find(kinds: tuple[str, ...], label: str) -> Any:
    """The object whose own name is `label` (a class name such as "NM"), among several kinds. Raises UnknownNameError."""
    known = {_plain(name): (kind, name) for kind in reversed(kinds) for name in names(kind)}
    if _plain(label) not in known:
        raise unknown(" or ".join(kinds), label, {name for _, name in known.values()})
    return get(*known[_plain(label)])


def describe(kind: str, name: str) -> Description:
    """The entry's docstring, read from the file without importing it."""
    file = _entry(kind, name)[1]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    text = ast.get_docstring(tree) or ""
    for statement in tree.body if KINDS[kind].holds_object else ():
        if isinstance(statement, ast.ClassDef | ast.FunctionDef) and _plain(statement.name) == _plain(name):
            text = ast.get_docstring(statement) or text
    return Description(kind, name, text.partition("\n")[0], file, read_fields(text))


def read_fields(docstring: str) -> dict[str, str]:
    """The fields of a docstring: a known word at the start of a line, its text, and the indented lines that follow it."""
    found: dict[str, str] = {}
    current = ""
    for line in docstring.splitlines():
        start = re.match(rf"({'|'.join(FIELDS)})\s+(\S.*)", line)
        if start:
            current = start[1]
            found[current] = start[2].strip()
        elif current and line.startswith(" ") and line.strip():
            found[current] += "\n" + line.strip()
        else:
            current = ""
    return found


def refresh() -> None:
    """Forget what was seen of the file tree (a file or plug-in was added while the process runs)."""
    _roots.cache_clear()
    _entries.cache_clear()


def _entry(kind: str, name: str) -> tuple[str, Path]:
    entries = _entries(kind)
    if name not in entries:
        raise unknown(kind, name, entries)
    return entries[name]


@cache
def _entries(kind: str) -> dict[str, tuple[str, Path]]:
    """name -> (module to import, file)."""
    if kind not in KINDS:
        raise unknown("kind of entry", kind, KINDS)
    entries: dict[str, tuple[str, Path]] = {}
    known = _entries(KINDS[kind].named_like) if KINDS[kind].named_like else None
    for package, root in _roots():
        for file in sorted(root.glob(KINDS[kind].pattern)):
            if file.name.startswith("_") or file.parent.name in KINDS[kind].without or (known is not None and file.stem not in known):
                continue
            if file.stem in entries:
                raise SparsifyError(f"the {kind} {file.stem!r} is defined twice", where=f"{entries[file.stem][1]} and {file}",
                                    hint="rename one of the files")
            relative = file.relative_to(root).with_suffix("")
            entries[file.stem] = (".".join([package, *relative.parts]), file)
    return entries


@cache
def _roots() -> tuple[tuple[str, Path], ...]:
    """The packages to look into: ours, then the plug-ins sorted by name."""
    own = [(__package__ or "sparsify_compiler", Path(__file__).parent)]
    return tuple(own + [_plugin(entry.name, entry.value) for entry in sorted(entry_points(group=PLUGINS), key=lambda e: e.name)])


def _plugin(name: str, package: str) -> tuple[str, Path]:
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise SparsifyError(f"{package!r} is not a package", where=f"plug-in {name}", hint=nearest(package, []))
    return package, Path(folders[0])


def _plain(name: str) -> str:
    return name.replace("_", "").lower()
