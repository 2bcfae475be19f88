"""Options of the command line that take some reading: dynamic dimensions and the budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, StorageError

if TYPE_CHECKING:
    from .budget import Budget


def parse_dynamic(entries: Sequence[str]) -> dict[str, dict[int, str]] | None:
    """["input_ids.0=batch", "input_ids.1=seq"] -> {"input_ids": {0: "batch", 1: "seq"}}. Raises InputError."""
    found: dict[str, dict[int, str]] = {}
    for entry in entries:
        place, _, name = entry.partition("=")
        argument, _, axis = place.rpartition(".")
        if not (argument and axis.isdigit() and name.isidentifier()):
            raise InputError(f"cannot read {entry!r}", where="--dynamic", hint="write argument.axis=name, for example input_ids.0=batch")
        found.setdefault(argument, {})[int(axis)] = name
    return found or None


def parse_sizes(entries: Sequence[str]) -> dict[str, int]:
    """["batch=8"] -> {"batch": 8}. Raises InputError."""
    sizes: dict[str, int] = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        if not (name and value.isdigit() and int(value) > 0):
            raise InputError(f"cannot read {entry!r}", where="--size", hint="write name=number, for example batch=8")
        sizes[name] = int(value)
    return sizes


def make_budget(**given: Any) -> Budget | None:
    """The budget that the options name; None when they name none. Raises BudgetError for several."""
    from .budget import Budget

    named = {name: value for name, value in given.items() if value is not None}
    return Budget(**named) if named else None


def check_outputs(folder: Path | None, files: Iterable[Path | None]) -> None:
    """Refuse, before any work is done, places that results cannot be written to. Raises StorageError."""
    from .artefact_manifest import is_artefact

    if folder is not None and folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or is_artefact(folder))):
        raise StorageError("something else is there already", where=str(folder), hint="choose a new folder, or remove this one yourself")
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise StorageError("there is no such folder to write into", where=str(file), hint=f"mkdir -p {file.parent}")
        if file is not None and file.is_dir():
            raise StorageError("this is a folder, not a file", where=str(file), hint=f"name a file, for example {file / 'report'}")


def set_threads(threads: int | None) -> None:
    """torch's intra-op threads, where a number was given."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
