"""The example call: example_inputs bound to the model's signature, which dimensions are dynamic, and the same call at other sizes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .call import forward_parameters
from .errors import InputError, nearest

Axes = dict[int, str]  # axis -> name of the dynamic dimension
SETTINGS = ("return_dict", "output_attentions", "output_hidden_states", "use_cache")


@dataclass(frozen=True)
class ExampleCall:
    """One call of the model, flat.

    leaves      the flat leaves of (args, kwargs)
    names       a name for each leaf: its argument's name, with the place inside a nested argument
    axes        for each leaf its dynamic dimensions
    structure   tree of (args, kwargs); all that has a parameter name is in kwargs, in the order of the signature
    parameters  names that positional arguments bind to; empty where forward() takes *args
    defaults    plain defaults of the parameters that this call leaves out, and what the model's configuration says of them
    """

    leaves: tuple[Any, ...]
    names: tuple[str, ...]
    axes: tuple[Axes, ...]
    structure: pytree.TreeSpec
    parameters: tuple[str, ...]
    defaults: Mapping[str, bool | int | float | str] = field(default_factory=dict)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) to call the model with."""
        args, kwargs = pytree.tree_unflatten(list(self.leaves), self.structure)
        return args, kwargs

    def sizes(self) -> dict[str, int]:
        """Name of each dynamic dimension -> its size here."""
        return {name: leaf.shape[axis] for leaf, axes in zip(self.leaves, self.axes, strict=True) for axis, name in axes.items()}

    def resized(self, sizes: Mapping[str, int]) -> ExampleCall:
        """The same call with named dimensions at other sizes: cut short, or repeated from the start."""
        leaves = []
        for leaf, axes in zip(self.leaves, self.axes, strict=True):
            for axis, name in axes.items():
                if name in sizes and sizes[name] != leaf.shape[axis]:
                    leaf = leaf.index_select(axis, torch.arange(sizes[name], device=leaf.device) % leaf.shape[axis])
            leaves.append(leaf)
        return replace(self, leaves=tuple(leaves))


def read_call(model: nn.Module, example_inputs: Any, dynamic: Any) -> ExampleCall:
    """Bind example_inputs to the model's signature.

    Raises InputError for inputs that are no tuple or dict, names that forward() does not have, missing arguments, and a `dynamic` that names
    an unknown input or a dimension out of range.
    """
    if isinstance(example_inputs, Mapping):
        given, named = (), {str(key): value for key, value in example_inputs.items()}
    elif isinstance(example_inputs, (tuple, list)):
        given, named = tuple(example_inputs), {}
    else:
        raise InputError(f"example_inputs is {type(example_inputs).__name__}; it must be a tuple of positional arguments or a dict of named ones",
                         where="example_inputs", hint="for one tensor x write (x,)")
    signature = forward_parameters(model)
    args, kwargs = bind(signature, given, named)
    by_position = not any(p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in signature)
    args, kwargs = pytree.tree_map_only(Tensor, _plain, (args, kwargs))
    paths, structure = pytree.tree_flatten_with_path((args, kwargs))
    names = leaf_names([path for path, _ in paths], signature)
    leaves = tuple(leaf for _, leaf in paths)
    tops = tuple(str(path[1].key) if path[0].idx == 1 else f"{path[1].idx}" for path, _ in paths)  # type: ignore[attr-defined]
    parameters = tuple(p.name for p in signature if p.kind is p.POSITIONAL_OR_KEYWORD) if by_position else ()
    axes = _dynamic_axes(dynamic, tops, names, leaves, parameters)
    call = ExampleCall(leaves, names, axes, structure, parameters, left_out(model, signature, kwargs))
    _same_sizes(call)
    return call


def bind(signature: list[inspect.Parameter], given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of the call; with a plain signature everything is in kwargs, in the order of the signature."""
    known = [p.name for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature)
    for name in named:
        if name not in known and not (open_ended and not difflib.get_close_matches(name, known, n=1, cutoff=0.8)):
            raise InputError(f"forward() has no argument {name!r}", where="example_inputs", hint=nearest(name, known))
    try:
        bound = inspect.Signature(signature).bind(*given, **named)
    except TypeError as problem:
        raise InputError(f"example_inputs do not fit forward(): {problem}", where="example_inputs",
                         hint=f"forward({', '.join(str(p) for p in signature)})"[:300]) from problem
    if any(p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in signature):
        return bound.args, bound.kwargs
    kwargs = dict(bound.arguments)
    for p in signature:
        if p.kind is p.VAR_KEYWORD:
            kwargs.update(kwargs.pop(p.name, {}))
    return (), kwargs


def left_out(model: nn.Module, signature: list[inspect.Parameter], given: Container[str]) -> dict[str, bool | int | float | str]:
    """The plain defaults of what a call leaves out; of a model of Hugging Face also what it then reads in its configuration."""
    asked = {p.name for p in signature if p.default is None}
    asked = set(SETTINGS) if any(p.kind is p.VAR_KEYWORD for p in signature) else asked.intersection(SETTINGS)
    config = getattr(model, "config", None)
    settings = {name: getattr(config, name, None) for name in SETTINGS if name in asked}
    found: dict[str, bool | int | float | str] = {name: value for name, value in settings.items() if isinstance(value, bool)}
    found |= {p.name: p.default for p in signature if isinstance(p.default, bool | int | float | str)}
    return {name: value for name, value in found.items() if name not in given}


def _plain(tensor: Tensor) -> Tensor:
    """A tensor that export can take, even when the user made it in inference mode or with a gradient."""
    if tensor.is_inference():
        with torch.inference_mode(False):
            return tensor.clone()
    return tensor.detach()


def leaf_names(paths: Sequence[tuple[Any, ...]], signature: list[inspect.Parameter]) -> tuple[str, ...]:
    """A name for each leaf of (args, kwargs): its argument's name and its place inside."""
    return tuple(_leaf_name(path, signature) for path in paths)


def _leaf_name(path: tuple[Any, ...], signature: list[inspect.Parameter]) -> str:
    top, *inner = path
    parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in inner]
    if top.idx == 0:  # left positional: forward() takes *args
        names = [p.name for p in signature if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        rest = next((p.name for p in signature if p.kind is p.VAR_POSITIONAL), "input")
        place = int(parts[0])
        parts[0] = names[place] if place < len(names) else f"{rest}_{place - len(names)}"
    return "_".join(parts)


def _dynamic_axes(dynamic: Any, tops: Sequence[str], names: Sequence[str], leaves: Sequence[Any], parameters: tuple[str, ...]) -> tuple[Axes, ...]:
    wanted = _by_argument(dynamic, tops, parameters)
    known = list(dict.fromkeys([*tops, *names]))
    for key in wanted:
        if key not in known:
            raise InputError(f"dynamic names {key!r}, which is not among the example inputs", where="dynamic", hint=nearest(key, known))
    result = []
    for top, name, leaf in zip(tops, names, leaves, strict=True):
        spec = wanted.get(name, wanted.get(top))
        result.append(_axes(spec, name, leaf) if spec else {})
    return tuple(result)


def _by_argument(dynamic: Any, tops: Sequence[str], parameters: tuple[str, ...]) -> dict[str, Any]:
    """`dynamic` in any of its spellings as argument name -> axes."""
    if dynamic is None:
        return {}
    if isinstance(dynamic, (tuple, list)):
        dynamic = dict(enumerate(dynamic))
    if not isinstance(dynamic, Mapping):
        raise InputError(f"dynamic is {type(dynamic).__name__}", where="dynamic", hint='write {"input_ids": {0: "batch", 1: "seq"}}')
    order = parameters or tuple(dict.fromkeys(tops))
    result = {}
    for key, axes in dynamic.items():
        if isinstance(key, int) and not isinstance(key, bool):
            if not 0 <= key < len(order):
                raise InputError(f"dynamic names argument {key}, but there are {len(order)}", where="dynamic")
            key = order[key]
        if axes:
            result[str(key)] = axes
    return result


def _axes(spec: Any, name: str, leaf: Any) -> Axes:
    if not isinstance(leaf, Tensor):
        raise InputError("dynamic dimensions are for tensors, but this input is none", where=f"dynamic[{name!r}]", hint=f"it is {leaf!r}"[:80])
    if isinstance(spec, (tuple, list)):
        spec = {axis: dim for axis, dim in enumerate(spec) if dim is not None}
    if not isinstance(spec, Mapping):
        raise InputError(f"must map dimensions to names, got {spec!r}", where=f"dynamic[{name!r}]", hint='for example {0: "batch", 1: "seq"}')
    axes: Axes = {}
    for axis, dim in spec.items():
        if not isinstance(axis, int) or not -leaf.dim() <= axis < leaf.dim():
            raise InputError(f"dimension {axis!r} is out of range; the tensor has {leaf.dim()}", where=f"dynamic[{name!r}]")
        label = dim if isinstance(dim, str) else getattr(dim, "__name__", "")
        if not label:
            raise InputError(f"dimension {axis} needs a name, got {dim!r}", where=f"dynamic[{name!r}]", hint='for example "batch"')
        axes[axis % leaf.dim()] = label
    return axes


def _same_sizes(call: ExampleCall) -> None:
    sizes: dict[str, tuple[int, str]] = {}
    for name, leaf, axes in zip(call.names, call.leaves, call.axes, strict=True):
        for axis, dim in axes.items():
            size, where = sizes.setdefault(dim, (leaf.shape[axis], name))
            if size != leaf.shape[axis]:
                raise InputError(f"dimension {dim!r} is {leaf.shape[axis]} in {name} but {size} in {where}; the same name means the same size",
                                 where="dynamic", hint="give them different names")
            if size == 0:
                raise InputError(f"dimension {dim!r} of {name} is empty", where="example_inputs")
