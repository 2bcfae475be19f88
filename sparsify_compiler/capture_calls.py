"""How a model calls its submodules: seen by forward hooks during eager runs at two sizes, which shows the dimensions that vary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .call import forward_parameters
from .capture_inputs import ExampleCall, bind, leaf_names, left_out
from .capture_verify import unchanged
from .errors import InputError

_PLAIN = (Tensor, bool, int, float, str, type(None))


@dataclass(frozen=True)
class _Kind:
    """What a call's tensor argument was."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass
class Record:
    """All calls of one submodule: leaves (a _Kind for a tensor), structure, names and the sizes of the model's dynamic dimensions in that run."""

    leaves: list[list[Any]] = field(default_factory=list)
    structures: list[pytree.TreeSpec] = field(default_factory=list)
    names: list[tuple[str, ...]] = field(default_factory=list)
    sizes: list[Mapping[str, int]] = field(default_factory=list)
    foreign: str = ""  # why its calls cannot be captured: an argument or result that is no tensor


def record(model: nn.Module, call: ExampleCall) -> dict[str, Record]:
    """Run the model on the example call, at the example's sizes (2 at least) and at others; path -> calls. `model` must be a private copy.

    Raises InputError where the model fails at both other sizes.
    """
    records: dict[str, Record] = {}
    first = call.resized({name: 2 for name, size in call.sizes().items() if size < 2})
    with _hooks(model, records, first.sizes()):
        _run(model, first)
    if not call.sizes():
        return records
    problems = []
    for change in (1, -1):  # each dimension by a different amount, so that two that vary are told apart
        sizes = {name: max(2, size + change * (i + 1)) for i, (name, size) in enumerate(first.sizes().items())}
        other = first.resized(sizes)
        more: dict[str, Record] = {}
        try:
            with _hooks(model, more, sizes):
                _run(model, other)
        except Exception as problem:  # noqa: BLE001  the model's own code may raise anything
            problems.append(f"{type(problem).__name__}: {problem} with sizes {sizes}")
            continue
        return _merged(records, more)
    raise InputError(f"the model fails when its dynamic dimensions change: {problems[0]}", where="dynamic",
                     hint="leave out the dimension that must stay fixed")


def _kind(leaf: Any) -> Any:
    """What is kept of a leaf: shape and dtype of a tensor, a plain value, the class of anything else."""
    if isinstance(leaf, Tensor):
        return _Kind(tuple(leaf.shape), leaf.dtype, leaf.device)
    return leaf if isinstance(leaf, _PLAIN) else type(leaf)


def _run(model: nn.Module, call: ExampleCall) -> None:
    """Buffers that the call writes into become the copy's own: what it counts is not counted in the user's model."""
    args, kwargs = call.arguments()
    with torch.no_grad(), unchanged(model) as changed:
        model(*args, **kwargs)
        written = changed()
    own: dict[int, Tensor] = {}  # one that modules share stays shared
    for module, name, buffer in written:
        module._buffers[name] = own.setdefault(id(buffer), buffer.clone())


def _merged(records: dict[str, Record], more: dict[str, Record]) -> dict[str, Record]:
    for path, other in more.items():
        own = records.setdefault(path, Record())
        own.leaves += other.leaves
        own.structures += other.structures
        own.names += other.names
        own.sizes += other.sizes
        own.foreign = own.foreign or other.foreign
    return records


@contextmanager
def _hooks(model: nn.Module, records: dict[str, Record], sizes: Mapping[str, int]) -> Iterator[None]:
    handles = []
    try:
        for path, module in model.named_modules():
            if path:
                handles.append(module.register_forward_pre_hook(_before(path, records, sizes), with_kwargs=True))
                handles.append(module.register_forward_hook(_after(path, records)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(path: str, records: dict[str, Record], sizes: Mapping[str, int]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = records.setdefault(path, Record())
        signature = forward_parameters(module)
        paths, structure = pytree.tree_flatten_with_path(bind(signature, args, kwargs))
        found.names.append(leaf_names([p for p, _ in paths], signature))
        found.leaves.append([_kind(x) for _, x in paths])
        found.structures.append(structure)
        found.sizes.append(sizes)
        for name, (_, leaf) in zip(found.names[-1], paths, strict=True):
            if not isinstance(leaf, _PLAIN):
                found.foreign = found.foreign or f"its argument {name!r} is a {type(leaf).__name__}, which is no tensor or plain value"

    return hook


def _after(path: str, records: dict[str, Record]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        records[path].foreign = records[path].foreign or foreign_result(result)

    return hook


def foreign_result(result: Any) -> str:
    """Why a result cannot come out of a captured graph; empty when it can."""
    for leaf in pytree.tree_leaves(result):
        if not isinstance(leaf, _PLAIN):
            return f"it returns a {type(leaf).__name__}, which is no tensor or plain container"
    return ""


def learned_call(module: nn.Module, found: Record) -> ExampleCall | str:
    """One example call that stands for all recorded ones, with the dimensions that vary between them dynamic; or why there is none."""
    if found.foreign:
        return found.foreign
    if any(structure != found.structures[0] for structure in found.structures):
        return "it is called with different arguments at different places"
    columns = list(zip(*found.leaves, strict=True))
    names = found.names[0]
    leaves: list[Any] = []
    axes: list[dict[int, str]] = []
    dims: dict[tuple[int, ...], str] = {}
    for name, column in zip(names, columns, strict=True):
        first = column[0]
        if not isinstance(first, _Kind):
            if any(type(x) is not type(first) or x != first for x in column):
                return f"its argument {name!r} differs between calls"
            leaves.append(first)
            axes.append({})
            continue
        if any(not isinstance(x, _Kind) or len(x.shape) != len(first.shape) or x.dtype != first.dtype for x in column):
            return f"its argument {name!r} differs in kind between calls"
        leaves.append(_example(first))
        axes.append(_varying([x.shape for x in column], found.sizes, dims))
    parameters = _positional_names(module)
    defaults = left_out(module, forward_parameters(module), found.structures[0].children()[1].context)
    return ExampleCall(tuple(leaves), names, tuple(axes), found.structures[0], parameters, defaults)


def _varying(shapes: list[tuple[int, ...]], sizes: list[Mapping[str, int]], dims: dict[tuple[int, ...], str]) -> dict[int, str]:
    """axis -> name, of the dimensions whose size differs between calls. Those that always agree with each other share a name."""
    axes = {}
    for axis, seen in enumerate(zip(*shapes, strict=True)):
        if len(set(seen)) > 1:
            if seen not in dims:
                known = [name for name in sizes[0] if all(size.get(name) == s for size, s in zip(sizes, seen, strict=True))]
                dims[seen] = known[0] if known else f"dim{len(dims)}"
            axes[axis] = dims[seen]
    return axes


def _example(kind: _Kind) -> Tensor:
    """A tensor of that kind: noise, or zeros where it may be an index."""
    if kind.dtype.is_floating_point:
        return torch.randn(kind.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(kind.device, kind.dtype)
    return torch.zeros(kind.shape, dtype=kind.dtype, device=kind.device) if kind.dtype != torch.bool else torch.ones(kind.shape, dtype=torch.bool)


def _positional_names(module: nn.Module) -> tuple[str, ...]:
    signature = forward_parameters(module)
    if any(p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in signature):
        return ()
    return tuple(p.name for p in signature if p.kind is p.POSITIONAL_OR_KEYWORD)
