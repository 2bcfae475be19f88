"""Calling a captured graph the way the model is called: arguments in, flat tensors through the graph, the model's output structure out."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .call_check import literal_check
from .call_signature import spelled
from .errors import InputError, nearest
from .executor import live_function
from .library_attention import give_indexers
from .program import InputSpec, Program, Region, TensorSpec
from .session import INPUT, Session

_CACHED_CALLS = 512
NOTING = ("sparsify.noted.default", "sparsify.held_ffn.default")  # ops that read and write notes of a session


def call_arguments(example: tuple[Any, ...] | Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs, a tuple of positional or a dict of named arguments, as (args, kwargs) of a call."""
    return (example, {}) if isinstance(example, tuple) else ((), dict(example))


class Flattener:
    """Turns the arguments of one call into the tensors of the graph's placeholders, in order, and refuses what the graph was not made for.

    A call whose shapes, dtypes and constants were seen before is let through after one dictionary lookup.
    """

    def __init__(self, spec: InputSpec, device: torch.device | None = None) -> None:
        self.spec, self.device = spec, device
        positional, named = spec.in_spec.children()
        self._positional, self._named = positional.num_children, dict(zip(named.context, named.children(), strict=True))
        self._keys = tuple(self._named)
        self._flat = self._positional == 0 and all(child.is_leaf() for child in self._named.values())
        self._tensors = tuple(i for i, leaf in enumerate(spec.leaves) if isinstance(leaf, TensorSpec))
        self._all_tensors = len(self._tensors) == len(spec.leaves)
        self._ordered = self._flat and self._keys == spec.parameters[:len(self._keys)]
        self._seen: dict[Any, bool] = {}    # what tells calls apart -> is any of its tensors one of a sign that it does not hold?
        self._labels = _labels(spec)

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Raises InputError where the call does not fit the captured graph."""
        leaves = self._leaves(args, kwargs)
        if torch.compiler.is_compiling():  # a set that grows at the first call would be a reason to compile again at the second
            self._check(leaves)
            return leaves if self._all_tensors else [leaves[i] for i in self._tensors]
        key = tuple([(x.shape, x.dtype, x.device, x.layout, x.is_neg()) if isinstance(x, Tensor) else x for x in leaves])
        try:
            lazy = self._seen.get(key)
        except TypeError:  # an unhashable argument: the check below names it
            lazy = None
        if lazy is None:
            self._check(leaves)
            if len(self._seen) >= _CACHED_CALLS:
                self._seen.clear()
            lazy = self._seen[key] = any(isinstance(x, Tensor) and x.is_neg() for x in leaves)
        if lazy:    # kernels read what is in memory
            leaves = [x.resolve_neg() if isinstance(x, Tensor) else x for x in leaves]
        return leaves if self._all_tensors else [leaves[i] for i in self._tensors]

    def _leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        if self._ordered and not kwargs and len(args) == len(self._keys):
            return list(args)
        rest: tuple[Any, ...] = ()
        if args:
            rest, kwargs = self.spec.bind(args, kwargs)
        if self._flat and not rest:
            if len(kwargs) == len(self._keys):
                try:
                    return [kwargs[key] for key in self._keys]
                except KeyError:
                    pass
            kwargs = self._complete(kwargs)
            return [kwargs[key] for key in self._keys]
        if len(rest) != self._positional:
            raise InputError(f"{len(rest)} positional arguments were given, the example inputs had {self._positional}")
        named = self._complete(kwargs)
        leaves, structure = pytree.tree_flatten((rest, {key: named[key] for key in self._keys}))
        if structure != self.spec.in_spec:
            raise InputError("the structure of the arguments differs from the example inputs'",
                             hint=f"captured with {_shape_of(self.spec.in_spec)}, called with {_shape_of(structure)}")
        return leaves

    def _complete(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """The named arguments with captured constants filled in; an argument that the example left out may be None or its default."""
        result = {key: value for key, value in named.items() if key in self._named or not self._is_default(key, value)}
        for key in result:
            if key not in self._named:
                known = f"captured with {', '.join(self._keys)}; {nearest(key, self._keys)}" if self._keys else ""
                raise InputError("this argument was not among the example inputs", where=key, hint=known)
        place = self._positional_leaves()
        for key, child in self._named.items():
            here = self.spec.leaves[place:place + child.num_leaves]
            place += child.num_leaves
            if key in result:
                continue
            if any(isinstance(leaf, TensorSpec) for leaf in here):
                raise InputError("this argument is missing", where=key, hint="the example inputs had it, so the captured graph needs it")
            result[key] = pytree.tree_unflatten(list(here), child)
        return result

    def _is_default(self, key: str, value: Any) -> bool:
        """Does this argument, which the example left out, have the value that it then had?"""
        return value is None or (key in self.spec.defaults and type(value) is type(self.spec.defaults[key]) and value == self.spec.defaults[key])

    def _positional_leaves(self) -> int:
        leaves: int = self.spec.in_spec.children()[0].num_leaves
        return leaves

    def _check(self, leaves: Sequence[Any]) -> None:
        sizes: dict[str, tuple[int, str]] = {}
        for name, leaf, value in zip(self._labels, self.spec.leaves, leaves, strict=True):
            if isinstance(leaf, TensorSpec):
                self._check_tensor(name, leaf, value, sizes)
            elif isinstance(value, Tensor) or type(value) is not type(leaf) or value != leaf:
                raise InputError(f"is {_show(value)}, but was captured with {leaf!r}", where=name,
                                 hint="capture again with that value in example_inputs")

    def _check_tensor(self, name: str, spec: TensorSpec, value: Any, sizes: dict[str, tuple[int, str]]) -> None:
        if not isinstance(value, Tensor):
            raise InputError(f"is {_show(value)}, but was captured as a tensor", where=name)
        if value.dtype != spec.dtype:
            raise InputError(f"has dtype {value.dtype}, but was captured with {spec.dtype}", where=name)
        if value.layout is not torch.strided:
            raise InputError(f"has layout {value.layout}, but was captured as a dense tensor", where=name, hint="give its to_dense()")
        if self.device is not None and value.device != self.device:
            raise InputError(f"is on {value.device}, but the model is on {self.device}", where=name)
        if value.dim() != len(spec.shape):
            raise InputError(f"has {value.dim()} dimensions, but was captured with {len(spec.shape)}", where=name)
        for axis, (size, wanted) in enumerate(zip(value.shape, spec.shape, strict=True)):
            if isinstance(wanted, int):
                if size != wanted:
                    hint = f'name it in dynamic={{"{name}": {{{axis}: "some_name"}}}}'
                    raise InputError(f"dimension {axis} is {size}, but was captured with the fixed size {wanted}", where=name, hint=hint)
                continue
            low, high = self.spec.ranges.get(wanted, (1, None))
            if size < low or (high is not None and size > high):
                legal = f"{low} to {high}" if high is not None else f"{low} or more"
                raise InputError(f"dimension {axis} ({wanted!r}) is {size}; the captured model takes {legal}", where=name)
            seen, where = sizes.setdefault(wanted, (size, f"dimension {axis} of {name}"))
            if seen != size:
                raise InputError(f"dimension {axis} ({wanted!r}) is {size}, but {where} has the same name and is {seen}", where=name)


def flatten_call(spec: InputSpec, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The graph's input tensors for one call of the model. Raises InputError. For many calls make one Flattener."""
    return Flattener(spec)(args, kwargs)


def unflatten_result(spec: InputSpec, flat: Sequence[Any]) -> Any:
    """The model's output structure around the graph's flat outputs."""
    return flat[0] if spec.out_spec.is_leaf() else pytree.tree_unflatten(flat, spec.out_spec)


class CapturedModule(nn.Module):
    """A region, called like the module that it was captured from. Parameters and buffers keep that module's names and are the region's own."""

    def __init__(self, region: Region) -> None:
        super().__init__()
        graph = region.module
        self._graph = (graph,)  # in a tuple, so that it is no submodule: the tensors show under their own names instead
        self._modules, self._parameters, self._buffers = graph._modules, graph._parameters, graph._buffers
        # The graph's code is run on this module: torch.compile then sees the parameters as the module's own, and can freeze them.
        self._code: Callable[..., Sequence[Any]] = type(graph).forward
        self._kernels: Callable[..., Sequence[Any]] | None = vars(graph).get("forward")
        tapped = any(node.op == "call_module" for node in region.graph.nodes)  # calibration looks into a copy of the graph
        self._live = None if self._kernels is not None or tapped else live_function(region)
        self._spec, self._single = region.spec, region.spec.out_spec.is_leaf()
        self._flatten, self._fits = Flattener(region.spec, _device(graph)), literal_check(region.spec, _device(graph))
        self.eval()
        self.__class__ = spelled(type(self), region.spec)  # so that it can be captured, exported and bound like the model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises InputError where the call does not fit what was captured."""
        checked = torch.compiler.is_compiling() and self._fits is not None and self._fits(args, kwargs)
        inputs = args if checked else self._flatten(args, kwargs)
        flat = self._kernels(*inputs) if self._kernels is not None else self._run(inputs)
        return flat[0] if self._single else unflatten_result(self._spec, flat)

    def _run(self, inputs: Sequence[Tensor]) -> Sequence[Any]:
        if self._live is None or torch.compiler.is_compiling():
            return self._code(self, *inputs)
        try:
            flat: Sequence[Any] = self._live(self, *inputs)
            return flat
        except KeyError:  # a parameter was replaced by a computed one (torch's parametrizations): the slower way asks for attributes
            return self._code(self, *inputs)


class CapturedPart(CapturedModule):
    """A region inside a user's model, which may read plain attributes of the module that was there (a Linear's in_features)."""

    def __init__(self, region: Region, attributes: Mapping[str, Any]) -> None:
        super().__init__(region)
        self._attributes = dict(attributes)

    def __getattr__(self, name: str) -> Any:
        attributes = self.__dict__.get("_attributes")
        if attributes and name in attributes:
            return attributes[name]
        return super().__getattr__(name)


class Hole(nn.Module):
    """Stands in a skeleton where a region goes. Keeps the module's plain attributes (a Linear's in_features), which its neighbours may read."""

    def __init__(self, attributes: Mapping[str, Any], path: str, kind: str) -> None:
        super().__init__()
        self.attributes, self.path, self.kind = dict(attributes), path, kind
        self.training = False


def instantiate(program: Program) -> nn.Module:
    """A module with the model's signature and output structure that runs the Program's graphs.

    Of a model captured whole, a CapturedModule; of one captured in regions, the user's own classes (generate(), config, ...) around them.
    The tensors are shared with the Program, the module tree is not.
    """
    if program.skeleton is None:
        return CapturedModule(program.regions[""])
    model = clone_structure(program.skeleton)
    filled: dict[str, CapturedPart] = {}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if isinstance(child, Hole):
                if child.path not in filled:
                    filled[child.path] = CapturedPart(program.regions[child.path], child.attributes)
                module._modules[name] = filled[child.path]
    give_indexers(model, program.attentions, program.learned)
    keys = [str(node.kwargs["key"]) for _, node in program.nodes() if str(node.target) in NOTING]
    if keys:
        Session().watch(model, {path: model.get_submodule(path) for key in keys if (path := key.removeprefix(INPUT)) != key})
    return model


def clone_structure(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every tensor with the original."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]:
            if isinstance(value, Tensor):
                memo[id(value)] = value
    return copy.deepcopy(model, memo)


def own_tensors(module: nn.Module) -> nn.Module:
    """The same module with tensors of its own; what is shared inside stays shared."""
    copies: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in copies:
                    fresh = tensor.detach().clone()
                    copies[id(tensor)] = nn.Parameter(fresh, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fresh
                tensors[name] = copies[id(tensor)]  # type: ignore[assignment]
    return module


def forward_parameters(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of the model's forward(), without self."""
    return list(inspect.signature(model.forward).parameters.values())


def _labels(spec: InputSpec) -> tuple[str, ...]:
    """How messages name each leaf: the argument, not the placeholder (fx renames some: input becomes input_1)."""
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(spec.names), spec.in_spec))
    return tuple(str(path[1].key) if len(path) == 2 and path[0].idx == 1 else name for path, name in paths)  # type: ignore[attr-defined]


def _device(graph: nn.Module) -> torch.device | None:
    tensor = next(graph.parameters(), None)
    return None if tensor is None else tensor.device


def _show(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"[:80]


def _shape_of(structure: pytree.TreeSpec) -> str:
    text = str(pytree.tree_unflatten(["*"] * structure.num_leaves, structure)).replace("'*'", "*")
    return text if len(text) < 200 else text[:197] + "..."


