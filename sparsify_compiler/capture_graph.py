"""One torch.export of a module → a Region: an fx graph over the module's own tensors, under their own names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind, OutputKind

from .capture_gradients import inline_gradient_modes
from .capture_inputs import ExampleCall
from .errors import InputError
from .normal_form_edit import NotFunctionalError
from .normal_form_inplace import functionalise
from .program import InputSpec, Region, TensorSpec, set_tensor
from .silence import silenced

# Which tell of a failed attempt; the reason is reported instead.
LOGGERS = ("torch.fx.experimental.symbolic_shapes", "torch.export", "torch._export", "torch._dynamo")


@dataclass
class NotExportableError(Exception):
    """Why a module could not be captured as one graph, in one sentence."""

    reason: str

    def __str__(self) -> str:
        return self.reason


def export_region(module: nn.Module, call: ExampleCall, path: str, trains: bool) -> tuple[Region, dict[str, str]]:
    """Capture `module`, which stands at `path` in the model, as one graph (not yet in normal form).

    trains  gradients will pass through it, but for where the model has switched them off

    Returns the Region and its tied parameters: other name -> the name that the graph uses. Raises NotExportableError, and InputError where the
    model fixes a dimension that the call declares dynamic.
    """
    for name, leaf in zip(call.names, call.leaves, strict=True):
        if not isinstance(leaf, (Tensor, bool, int, float, str, type(None))):
            raise NotExportableError(f"its argument {name!r} is a {type(leaf).__name__}, which is no tensor or plain value")
    sizes = call.sizes()
    enlarged = call.resized({name: 2 for name, size in sizes.items() if size < 2})
    exported = _export(module, enlarged, trains)
    _refuse_effects(exported)
    aliases = _tied(module)
    graph_module = _build(module, exported, call, path, aliases)
    try:
        functionalise(graph_module.graph)
    except NotFunctionalError:  # views of what is written: export's own functionalisation knows them, and then names effects on buffers
        exported = _functional(exported)
        _refuse_effects(exported)
        graph_module = _build(module, exported, call, path, aliases)
        _refuse_writes(graph_module.graph)
    return Region(path, graph_module, _input_spec(exported, graph_module, call)), aliases


def _functional(exported: ExportedProgram) -> ExportedProgram:
    try:
        with silenced(*LOGGERS):
            found: ExportedProgram = exported.run_decompositions({})
            return found
    except Exception as problem:  # its own checks fail, of a buffer that two modules write into
        raise NotExportableError(_sentence(problem)) from problem


def _export(module: nn.Module, call: ExampleCall, trains: bool) -> ExportedProgram:
    args, kwargs = call.arguments()
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    for leaf, axes in zip(call.leaves, call.axes, strict=True):
        if axes:
            shapes[leaf] = dict.fromkeys(axes, Dim.DYNAMIC)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(trains), silenced(*LOGGERS), _spelled(module, kwargs):
            exported = torch.export.export(module, args, kwargs, dynamic_shapes=shapes if any(call.axes) else None, strict=False)
    except Exception as problem:  # torch.export raises whatever the traced code or its own checks raise
        _refuse_fixed_dimension(problem, call)
        raise NotExportableError(_sentence(problem)) from problem
    if reason := inline_gradient_modes(exported):
        raise NotExportableError(reason)
    return exported


@contextmanager
def _spelled(module: nn.Module, named: Mapping[str, Any]) -> Iterator[None]:
    """Within, forward() names what its **kwargs get: torch.export 2.13 looks for such an argument in two places, and dynamic shapes never fit."""
    signature = inspect.signature(module.forward)
    plain = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in named if name not in signature.parameters]
    if not extra or "forward" in vars(module):
        yield
        return
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    forward.__signature__ = signature.replace(parameters=[*plain, *extra])  # type: ignore[attr-defined]
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


# How torch.export says that a dimension declared dynamic has one size only.
_SPECIALISED = re.compile(r"L\['(\w+)'\](?:\[[^\]]*\])*\.size\(\)\[(\d+)\] as dynamic but your code specialized it to be a constant \((\d+)\)")


def _refuse_fixed_dimension(problem: Exception, call: ExampleCall) -> None:
    """Raise InputError when export says that a dynamic dimension of the call is fixed by the model."""
    text = str(problem)
    for argument, axis, size in _SPECIALISED.findall(text):
        for name, axes in zip(call.names, call.axes, strict=True):
            if int(axis) in axes and (name == argument or name.startswith(argument)):
                raise InputError(f"dimension {axis} ({axes[int(axis)]!r}) is declared dynamic, but the model fixes it to {size}: it meets a tensor "
                                 f"or a number of that size, or is looped over", where=name, hint="leave it out of dynamic") from problem


def _sentence(problem: Exception) -> str:
    """The message of an export failure in one readable sentence."""
    text = str(problem)
    if "data-dependent" in text or "DataDependent" in type(problem).__name__:
        code = re.search(r'File "([^"]+)", line (\d+), in (\w+)\n\s+(.+)', text[text.find("The following call raised"):])
        where = f": {code.group(4).strip()}  (line {code.group(2)} of {code.group(1).rpartition('/')[2]})" if code else ""
        return f"Python control flow depends on the data{where}"
    if found := re.search(r"Found <class '([\w.]+)'> in output", text):
        return f"it returns a {found.group(1).rpartition('.')[2]}, which is no tensor or plain container"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else ""
    return f"{type(problem).__name__}: {first[:200]}".rstrip(": ")


_EFFECTS = {OutputKind.BUFFER_MUTATION: "writes to its buffer", OutputKind.USER_INPUT_MUTATION: "writes to its input",
            OutputKind.PARAMETER_MUTATION: "writes to its parameter"}


def _refuse_effects(exported: ExportedProgram) -> None:
    for spec in exported.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise NotExportableError(f"it {_EFFECTS.get(spec.kind, f'has an effect of kind {spec.kind.name}')} {spec.target or ''}".rstrip())
    for spec in exported.graph_signature.input_specs:
        if spec.kind in (InputKind.CUSTOM_OBJ, InputKind.TOKEN):
            raise NotExportableError(f"it uses an object that is no tensor: {spec.target or spec.kind.name}")
    for node in exported.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise NotExportableError(f"it uses the higher-order operator {node.target}")


def _refuse_writes(graph: fx.Graph) -> None:
    try:
        functionalise(graph)
    except NotFunctionalError as problem:
        raise NotExportableError(str(problem)) from problem


def _tied(module: nn.Module) -> dict[str, str]:
    """Other name -> first name, of every tensor that the module holds under several names."""
    first: dict[int, str] = {}
    aliases = {}
    for name, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        known = first.setdefault(id(tensor), name)
        if known != name:
            aliases[name] = known
    return aliases


def _build(module: nn.Module, exported: ExportedProgram, call: ExampleCall, path: str, aliases: Mapping[str, str]) -> fx.GraphModule:
    """The exported graph with its lifted tensors put back as get_attr nodes, and placeholders only for the call's tensors."""
    root, graph = nn.Module(), fx.Graph()
    own = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
    kinds = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    user_inputs = iter(zip(call.names, call.leaves, strict=True))
    memo: dict[fx.Node, fx.Node] = {}
    attributes: dict[str, fx.Node] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = kinds[node.name]
            if spec.kind is InputKind.USER_INPUT:
                name, leaf = next(user_inputs)
                if isinstance(leaf, Tensor):
                    memo[node] = graph.placeholder(re.sub(r"\W", "_", name))
                    memo[node].meta = {"val": node.meta["val"], "by": "capture", "path": path}
                elif node.users:
                    raise NotExportableError(f"the constant argument {name!r} is used as a value in the graph")
                continue
            target = _attribute_name(str(spec.target), own, aliases)
            if target not in attributes:
                set_tensor(root, target, own[target] if target in own else _constant(exported, str(spec.target)))
                attributes[target] = graph.get_attr(target)
                owner = target.rpartition(".")[0] if target in own else ""
                attributes[target].meta = {"val": node.meta["val"], "by": "capture", "path": _join(path, owner)}
            memo[node] = attributes[target]
        else:
            memo[node] = graph.node_copy(node, lambda n: memo[n])
            memo[node].meta = _provenance(node, path)
    _inputs_first(graph)
    return fx.GraphModule(root, graph)


def _inputs_first(graph: fx.Graph) -> None:
    """Placeholders before the get_attr nodes, as fx wants them."""
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        if node.op == "placeholder":
            first.prepend(node)


def _attribute_name(name: str, own: Mapping[str, Tensor], aliases: Mapping[str, str]) -> str:
    if name in own:
        return aliases.get(name, name)
    return f"constants.{re.sub(r'[^0-9A-Za-z_]', '_', name)}"


def _constant(exported: ExportedProgram, name: str) -> Tensor:
    value = exported.state_dict.get(name, exported.constants.get(name))
    if not isinstance(value, Tensor):
        raise NotExportableError(f"it uses the object {name}, which is no tensor")
    return value.detach()


def _provenance(node: fx.Node, path: str) -> dict[str, Any]:
    """Where a node came from: the innermost module of the stack that export recorded."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    inner, kind = stack[-1] if stack else ("", "")
    inner = "" if inner == "_empty_nn_module_stack_from_metadata_hook" else inner  # what export writes where it knows no module
    kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    meta = {"path": _join(path, re.sub(r"@\d+", "", inner)), "module": kind.rpartition(".")[2], "by": "capture"}
    return meta | ({"val": node.meta["val"]} if "val" in node.meta else {})


def _join(path: str, inner: str) -> str:
    return f"{path}.{inner}" if path and inner else path or inner


def _input_spec(exported: ExportedProgram, graph_module: fx.GraphModule, call: ExampleCall) -> InputSpec:
    placeholders = iter([node for node in graph_module.graph.nodes if node.op == "placeholder"])
    names: list[str] = []
    leaves: list[Any] = []
    ranges: dict[str, tuple[int, int | None]] = {}
    for name, leaf, axes in zip(call.names, call.leaves, call.axes, strict=True):
        if not isinstance(leaf, Tensor):
            names.append(name)
            leaves.append(leaf)
            continue
        node = next(placeholders)
        names.append(node.name)
        value = node.meta["val"]
        leaves.append(TensorSpec(tuple(axes.get(i, size) for i, size in enumerate(leaf.shape)), leaf.dtype))
        for axis, dim in axes.items():
            low, high = _range(exported, value.shape[axis])
            known = ranges.get(dim, (1, None))
            ranges[dim] = (max(low, known[0]), high if known[1] is None else known[1] if high is None else min(high, known[1]))
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    return InputSpec(tuple(names), tuple(leaves), call.parameters, call.structure, out_spec, ranges, call.defaults)


def _range(exported: ExportedProgram, size: Any) -> tuple[int, int | None]:
    """The smallest and largest legal size of a dimension, as far as the model's own comparisons say.

    Export always says at least 2, for it traces with sizes that are not 1; `capture` tries size 1 and decides.
    """
    if not isinstance(size, torch.SymInt):
        return 1, None
    bounds = exported.range_constraints.get(size.node.expr)
    if bounds is None:
        return 1, None
    upper = str(bounds.upper)
    return max(1, int(bounds.lower)), int(upper) if upper.isdigit() and int(upper) < 2**31 else None
