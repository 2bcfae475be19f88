"""`sparsify bench`: how fast a saved model is, beside the dense forms of it, interleaved in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from .measure import Timing
    from .program import InputSpec, TensorSpec

USUAL = 8  # size of a dynamic dimension that nobody named


def bench(path: Path, spec: str | None, sizes: Mapping[str, int], rounds: int) -> dict[str, Timing]:
    """Name of a form -> its time. Dense forms first: the same weights without sparse kernels, and the original model where it is given."""
    import torch

    from .artefact import load
    from .artefact_dense import dense_program
    from .call import instantiate
    from .cli_model import load_model
    from .compiled import CompiledModel
    from .measure import interleave

    source = load_model(spec) if spec else None
    compiled = load(path, source.model if source else None)
    forms: dict[str, Callable[[], object]] = {}
    if compiled.program.skeleton is not None and source is None:
        raise InputError("a model captured in parts is measured with its own inputs", where="MODEL", hint="name the model after the folder")
    with torch.inference_mode():
        args, kwargs = _call_of(source.example_inputs) if source else example_call(compiled.program.regions[""].spec, sizes)
        if source:
            forms["original model, eager"] = lambda: source.model(*args, **kwargs)
        try:
            compiled(*args, **kwargs)
        except InputError as error:
            what = f"its example inputs do not fit the saved model: {error.where}: {error.what}"
            raise InputError(what, where=spec or str(path), hint=f"name the model that {path} was compiled from") from error
        dense = CompiledModel(dense_program(compiled.program)) if compiled.program.skeleton is None else instantiate(dense_program(compiled.program))
        forms["same graph, dense weights"] = lambda: dense(*args, **kwargs)
        forms["compiled"] = lambda: compiled(*args, **kwargs)
        return interleave(forms, rounds=rounds, at_most=60.0)


def example_call(spec: InputSpec, sizes: Mapping[str, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs that fit the spec: normal random floats, ones for whole numbers (a token id that every vocabulary has), True for bools."""
    from torch.utils import _pytree as pytree

    from .program import TensorSpec

    names = {size for leaf in spec.leaves if isinstance(leaf, TensorSpec) for size in leaf.shape if isinstance(size, str)}
    unknown = sorted(set(sizes) - names)
    if unknown:
        raise InputError(f"no dynamic dimension {unknown[0]!r}", where="--size", hint=f"there are {', '.join(sorted(names)) or 'none'}")
    leaves = [_tensor(leaf, {**_usual(spec), **sizes}) if isinstance(leaf, TensorSpec) else leaf for leaf in spec.leaves]
    args, kwargs = pytree.tree_unflatten(leaves, spec.in_spec)
    return args, kwargs


def _usual(spec: InputSpec) -> dict[str, int]:
    from .program import TensorSpec

    sizes = {}
    for leaf in spec.leaves:
        for size in leaf.shape if isinstance(leaf, TensorSpec) else ():
            if isinstance(size, str):
                low, high = spec.ranges.get(size, (1, None))
                sizes[size] = max(low, USUAL) if high is None else min(max(low, USUAL), high)
    return sizes


def _tensor(leaf: TensorSpec, sizes: Mapping[str, int]) -> Any:
    import torch

    shape = [sizes[size] if isinstance(size, str) else size for size in leaf.shape]
    if leaf.dtype.is_floating_point:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(leaf.dtype)
    return torch.ones(shape, dtype=leaf.dtype)


def _call_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), dict(example)) if isinstance(example, Mapping) else (tuple(example), {})
