"""Which module hands a region what it reads: for a model in regions, what stands around a region is known by watching the model run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from .call import CapturedPart, call_arguments, instantiate
from .program import Program


def find_givers(program: Program, batch: tuple[Any, ...] | Mapping[str, Any]) -> dict[str, str]:
    """Path of a region -> path of the module whose result is the first tensor that the region is called on, and which was itself called on a tensor
    of that shape: for an FFN the norm in front of it, which reads the residual stream. The innermost one, where several hand the same tensor on;
    regions that read what no module gave are not in it.
    """
    model = instantiate(program)
    made: dict[int, tuple[ref[Tensor], str]] = {}  # by id, which may come again once a tensor is gone
    found: dict[str, str] = {}

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _first(args, kwargs)
            seen = None if x is None else made.get(id(x))
            if seen is not None and seen[0]() is x:
                found.setdefault(path, seen[1])

        return hook

    def after(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            x = _first(args, kwargs)
            known = made.get(id(result))
            if isinstance(result, Tensor) and x is not None and x.shape == result.shape and (known is None or known[0]() is not result):
                made[id(result)] = ref(result), path

        return hook

    for path, module in model.named_modules():
        if isinstance(module, CapturedPart):
            module.register_forward_pre_hook(before(path), with_kwargs=True)
        elif path:
            module.register_forward_hook(after(path), with_kwargs=True)
    args, kwargs = call_arguments(batch)
    with torch.no_grad():
        model(*args, **kwargs)
    return found


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
