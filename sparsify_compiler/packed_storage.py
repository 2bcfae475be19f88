"""A packed weight whose kernel runs is in memory once, as the kernel laid it out: what is stored of it lies in a file until something reads it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from .errors import StorageError
from .program import Program, Region, get_tensor, set_tensor
from .storage import map_safetensors, mapped_copies

MAPS = os.name == "posix"  # elsewhere a file that is mapped can be neither removed nor replaced


def leave_in_artefact(weights: Path, graph: Mapping[str, Any], program: Program) -> list[Tensor]:
    """Map the stored tensors of a loaded program from the artefact's own file. Returns what is mapped now."""
    found: dict[str, Tensor] = {}
    keys = {data["path"]: {name: record["key"] for name, record in data["tensors"].items()} for data in graph["regions"]}

    def mapped(region: Region, name: str) -> Tensor | None:
        if not found:
            found.update(map_safetensors(weights))
        return found.get(keys[region.path][name])

    return _replace(program, mapped)


def leave_in_temporary_file(program: Program) -> list[Tensor]:
    """Map the stored tensors of a compiled program from a file that no name leads to and that goes with them. Returns what is mapped now.

    Nothing is where there is no room for it.
    """
    held = {region.qualified(name): get_tensor(region.module, name) for region, name in _idle(program)} if MAPS else {}
    try:
        copies = mapped_copies(held) if held else {}
    except StorageError:
        return []
    return _replace(program, lambda region, name: copies.get(region.qualified(name)))


def _replace(program: Program, mapped: Callable[[Region, str], Tensor | None]) -> list[Tensor]:
    """Put mapped tensors in the place of those that only tracing, saving and state_dict() read."""
    replaced: list[Tensor] = []
    for region, name in _idle(program):
        held, tensor = get_tensor(region.module, name), mapped(region, name)
        if tensor is not None and (tensor.dtype, tensor.shape) == (held.dtype, held.shape) and held.is_contiguous():
            set_tensor(region.module, name, tensor)
            replaced.append(tensor)
    return replaced


def _idle(program: Program) -> Iterator[tuple[Region, str]]:
    """The stored tensors of packed weights that have a kernel, by the name in their region, each once; none where files cannot be mapped."""
    seen: set[tuple[str, str]] = set()
    for region, node in program.nodes() if MAPS else ():
        if node.meta.get("kernel") is None or getattr(node.target, "namespace", "") != "sparsify":
            continue
        for key, value in node.kwargs.items():
            if key == "bias" or not isinstance(value, fx.Node) or value.op != "get_attr" or (region.path, str(value.target)) in seen:
                continue
            seen.add((region.path, str(value.target)))
            if not isinstance(get_tensor(region.module, str(value.target)), nn.Parameter):
                yield region, str(value.target)
