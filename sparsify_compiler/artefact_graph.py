"""Graphs, trees and values as JSON, and back. Reading builds only calls that are on a list: no name in a file can reach anything else."""

from __future__ import annotations

import keyword
import math
import operator
import re
import sys
from collections import namedtuple
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .artefact_shapes import ShapeReader, encode_fake, symbols
from .artefact_values import decode, encode
from .errors import ArtefactError
from .program import InputSpec, Region, TensorSpec, get_tensor, set_tensor

NAMESPACES = ("aten", "sparsify")
# Functional by schema, and yet they reach out of the process.
FORBIDDEN = frozenset({"aten.from_file"})
# Arithmetic on symbolic sizes, and tuple access.
_OPERATORS = ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "getitem", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_")
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS},
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite")},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
}  # fmt: skip
FUNCTION_NAMES = {id(function): name for name, function in FUNCTIONS.items()}
# Classes of inputs and outputs that may be imported on the word of a file. Any other class must have been imported by the user.
IMPORTABLE = ("builtins", "collections", "transformers")
TENSOR_NAME = re.compile(r"[\w.:-]+")
META = ("path", "module", "by", "site", "epilogue")  # besides "val", what of a node's metadata is saved
DEFAULT_FACTORIES: Mapping[str, Any] = {"list": list, "dict": dict, "set": set, "int": int, "float": float, "str": str, "None": None}


def encode_region(region: Region, tensor_key: Callable[[str], Any], kernel_key: Callable[[fx.Node], Any]) -> dict[str, Any]:
    """A region as JSON. `tensor_key(name)` says where a tensor is stored; `kernel_key(node)` what kernel a node runs, or None."""
    nodes = [_encode_node(node, kernel_key) for node in region.graph.nodes]
    names = dict.fromkeys(str(node.target) for node in region.graph.nodes if node.op == "get_attr")
    return {
        "path": region.path,
        "spec": _encode_spec(region.spec),
        "tensors": {name: tensor_key(name) for name in names},
        "symbols": symbols(region.graph),
        "nodes": nodes,
    }


def decode_region(data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> tuple[Region, dict[str, Any]]:
    """The region, and node name -> what `kernel_key` said. Raises ArtefactError for a call that is not on the list."""
    root = nn.Module()
    for name, tensor in tensors.items():
        set_tensor(root, name, tensor)
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    kernels: dict[str, Any] = {}
    shapes = ShapeReader(data["symbols"])
    for record in data["nodes"]:
        node = _decode_node(record, graph, nodes, shapes)
        if node.op == "get_attr":
            get_tensor(root, str(node.target))
        if "kernel" in record:
            kernels[node.name] = record["kernel"]
    return Region(data["path"], fx.GraphModule(root, graph), _decode_spec(data["spec"])), kernels


def op_name(node: fx.Node) -> str:
    """What a call_function node calls, as one name: "aten.linear.default", "operator.mul". Raises ArtefactError when it has none."""
    if isinstance(node.target, torch._ops.OpOverload):
        name = str(node.target)
        _check_op(name, node.target)
        return name
    try:
        return FUNCTION_NAMES[id(node.target)]
    except KeyError:
        raise ArtefactError(
            f"a call that cannot be saved: {node.target}", where=node.name, hint="only aten and sparsify ops and size arithmetic can"
        ) from None


def find_op(name: str) -> Callable[..., Any]:
    """The function that a name stands for. Raises ArtefactError for one that is not on the list, or that this torch does not know."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    parts = name.split(".")
    if len(parts) != 3 or parts[0] not in NAMESPACES or not all(part.isidentifier() for part in parts):
        raise ArtefactError(f"a call that no artefact may hold: {name!r}", where="graph.json", hint="the file was not written by sparsify_compiler")
    if parts[0] == "sparsify":
        _register(parts[1])
    packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
    op = getattr(packet, parts[2], None) if packet is not None else None
    if not isinstance(op, torch._ops.OpOverload):
        raise ArtefactError(
            f"this installation has no op {name!r}", where="graph.json", hint="install the versions named in manifest.json, or compile again"
        )
    _check_op(name, op)
    return op


def _register(name: str) -> None:
    """Import the file of one of our own ops, which registers it. An unknown name is reported by the caller."""
    from . import catalog

    if name in catalog.names("op"):
        catalog.get("op", name)


def _check_op(name: str, op: torch._ops.OpOverload) -> None:
    if name.partition(".")[0] not in NAMESPACES or name.rpartition(".")[0] in FORBIDDEN or op._schema.is_mutable:
        raise ArtefactError(
            f"a call that no artefact may hold: {name!r}", where="graph.json", hint="only functional aten and sparsify ops may be saved"
        )


def _encode_node(node: fx.Node, kernel_key: Callable[[fx.Node], Any]) -> dict[str, Any]:
    record: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.op == "call_function":
        record["target"] = op_name(node)
    elif node.op in ("placeholder", "get_attr"):
        record["target"] = str(node.target)
    elif node.op != "output":
        raise ArtefactError(f"a node that cannot be saved: {node.op} {node.target}", where=node.name, hint="only graphs in normal form can be saved")
    if node.args:
        record["args"] = [encode(value) for value in node.args]
    if node.kwargs:
        record["kwargs"] = {name: encode(value) for name, value in node.kwargs.items()}
    meta: dict[str, Any] = {key: node.meta[key] for key in META if isinstance(node.meta.get(key), str)}
    if "val" in node.meta:
        meta["val"] = encode_fake(node.meta["val"])
    kernel = kernel_key(node)
    _check_names(record)
    return record | ({"meta": meta} if meta else {}) | ({"kernel": kernel} if kernel is not None else {})


def _check_names(record: Mapping[str, Any]) -> None:
    """Graphs are turned into Python text: every name that goes into it must be a plain name."""
    names = [record["name"], *record.get("kwargs", {}), *([record["target"]] if record["op"] == "placeholder" else [])]
    wrong = [name for name in names if not (isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name))]
    if record["op"] == "get_attr" and not TENSOR_NAME.fullmatch(str(record["target"])):
        wrong.append(record["target"])
    if wrong:
        raise ArtefactError(f"not a name: {wrong[0]!r}", where="graph.json", hint="names are made of letters, digits and _ only")


def _decode_node(record: Mapping[str, Any], graph: fx.Graph, nodes: dict[str, fx.Node], shapes: ShapeReader) -> fx.Node:
    op, name = record["op"], record["name"]
    _check_names(record)
    args = tuple(decode(value, nodes) for value in record.get("args", ()))
    kwargs = {key: decode(value, nodes) for key, value in record.get("kwargs", {}).items()}
    node: fx.Node
    if op == "output":
        node = graph.create_node(op, "output", args, name=name)
    elif op == "call_function":
        node = graph.create_node(op, find_op(record["target"]), args, kwargs, name=name)
    elif op in ("placeholder", "get_attr"):
        node = graph.create_node(op, str(record["target"]), args, kwargs, name=name)
    else:
        raise ArtefactError(f"a node that no artefact may hold: {op}", where="graph.json", hint="the file was not written by sparsify_compiler")
    node.name = name
    meta = record.get("meta", {})
    node.meta |= {key: str(meta[key]) for key in META if key in meta}
    if "val" in meta:
        node.meta["val"] = shapes.decode(meta["val"])
    nodes[name] = node
    return node


def _encode_spec(spec: InputSpec) -> dict[str, Any]:
    leaves = [
        {"tensor": [list(leaf.shape), encode(leaf.dtype)]} if isinstance(leaf, TensorSpec) else {"constant": encode(leaf)} for leaf in spec.leaves
    ]
    return {
        "names": list(spec.names),
        "leaves": leaves,
        "parameters": list(spec.parameters),
        "inputs": encode_tree(spec.in_spec),
        "outputs": encode_tree(spec.out_spec),
        "ranges": {name: list(bounds) for name, bounds in spec.ranges.items()},
        "defaults": {name: encode(value) for name, value in spec.defaults.items()},
    }


def _decode_spec(data: Mapping[str, Any]) -> InputSpec:
    leaves = tuple(
        TensorSpec(tuple(leaf["tensor"][0]), decode(leaf["tensor"][1])) if "tensor" in leaf else decode(leaf["constant"]) for leaf in data["leaves"]
    )
    ranges = {name: (bounds[0], bounds[1]) for name, bounds in data["ranges"].items()}
    defaults = {name: decode(value) for name, value in data["defaults"].items()}
    trees = decode_tree(data["inputs"]), decode_tree(data["outputs"])
    return InputSpec(tuple(data["names"]), leaves, tuple(data["parameters"]), *trees, ranges, defaults)


def encode_tree(spec: pytree.TreeSpec) -> Any:
    """A tree of inputs or outputs. (torch's own treespec_loads imports and calls what the text names: not for files from elsewhere.)"""
    if spec.is_leaf():
        return None
    kind, context = spec.type, spec._context
    name = f"{kind.__module__}:{kind.__qualname__}"
    if kind.__name__ == "namedtuple" and isinstance(context, type):
        context = f"{context.__module__}:{context.__qualname__}"
    elif name == "collections:defaultdict":
        factory = getattr(context[0], "__name__", "None")
        if factory not in DEFAULT_FACTORIES:
            raise ArtefactError(f"a defaultdict of {factory} cannot be saved", hint="return a plain dict from the model")
        context = [factory, context[1]]
    return {"type": name, "context": encode(context), "children": [encode_tree(child) for child in spec._children]}


def decode_tree(data: Any) -> pytree.TreeSpec:
    """The tree. Raises ArtefactError when a class of it is not there, and says what to import."""
    if data is None:
        return pytree.treespec_leaf()
    context = decode(data["context"])
    if data["type"] == "collections:namedtuple":
        kind: Any = namedtuple
        context = find_class(context)
        if not (issubclass(context, tuple) and hasattr(context, "_fields")):
            raise ArtefactError(
                f"not a named tuple: {context.__qualname__}", where="graph.json", hint="the file was not written by sparsify_compiler"
            )
    else:
        kind = find_class(data["type"])
        if kind not in pytree.SUPPORTED_NODES:
            raise ArtefactError(
                f"{data['type'].replace(':', '.')} is not a registered tree of tensors",
                where="graph.json",
                hint="register it with torch.utils._pytree.register_pytree_node or torch.export.register_dataclass, then load",
            )
    if data["type"] == "collections:defaultdict":
        context = [DEFAULT_FACTORIES[context[0]], context[1]]
    return pytree.TreeSpec(kind, context, [decode_tree(child) for child in data["children"]])


def find_class(name: str) -> type:
    """A class by "module:qualname", imported only where that is safe. Raises ArtefactError otherwise."""
    module_name, _, qualname = name.partition(":")
    if module_name not in sys.modules and module_name.partition(".")[0] in IMPORTABLE:
        import importlib

        try:
            importlib.import_module(module_name)
        except ImportError as error:
            raise ArtefactError(
                f"the model's inputs or outputs use {module_name}.{qualname}: {error}",
                where="graph.json",
                hint=f"pip install {module_name.partition('.')[0]}",
            ) from error
    found: Any = sys.modules.get(module_name)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        raise ArtefactError(
            f"the model's inputs or outputs use the class {module_name}.{qualname}, which is not here",
            where="graph.json",
            hint=f"run `import {module_name}` before loading",
        )
    return found
