"""The check of a call as one flat function whose sizes and dtypes are literals: all that torch.compile guards of it is its code.

What a check reads from objects torch.compile reads again before every call of what it compiled: 40 guards a region, a tenth of a token's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .executor import defined
from .program import InputSpec, TensorSpec


def literal_check(spec: InputSpec, device: torch.device | None) -> Callable[..., bool] | None:
    """fits(args, kwargs): are these positional arguments, one a tensor of the graph, which a Flattener would let through?

    False says nothing: a Flattener binds names, and tells what is wrong. None where the graph takes anything but tensors in the order of forward().
    """
    positional, named = spec.in_spec.children()
    plain = positional.num_children == 0 and all(child.is_leaf() for child in named.children())
    if not plain or tuple(named.context) != spec.parameters[:len(named.context)] or not all(isinstance(leaf, TensorSpec) for leaf in spec.leaves):
        return None
    source = f"def fits(args, kwargs):\n    return {' and '.join(_conditions(spec, device))}\n"
    return defined("fits", source, f"<sparsify check of {', '.join(spec.names)}>", {"torch": torch, "Tensor": Tensor})


def _conditions(spec: InputSpec, device: torch.device | None) -> Iterator[str]:
    yield f"not kwargs and len(args) == {len(spec.leaves)}"
    places: dict[str, str] = {}
    for i, leaf in enumerate(spec.leaves):
        assert isinstance(leaf, TensorSpec)
        yield f"isinstance(args[{i}], Tensor) and args[{i}].dtype == {leaf.dtype} and args[{i}].dim() == {len(leaf.shape)}"
        if device is not None:
            yield f"args[{i}].device == torch.{device!r}"
        for axis, size in enumerate(leaf.shape):
            place = f"args[{i}].shape[{axis}]"
            if isinstance(size, int):
                yield f"{place} == {size}"
                continue
            low, high = spec.ranges.get(size, (1, None))
            yield f"{place} >= {low}" + ("" if high is None else f" and {place} <= {high}")
            if places.setdefault(size, place) != place:
                yield f"{place} == {places[size]}"
