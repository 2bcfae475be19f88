"""An fx graph in normal form as a Relax function: TVM's importer of exported programs, node by node, with converters of ours before its own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from tvm import relax, tirx
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from sparsify_compiler.codegen.host import emit_within
from sparsify_compiler.codegen.whole_graph import Function
from sparsify_compiler.codegen.whole_graph_functions import Parameter, declared, function
from sparsify_compiler.errors import KernelError, SparsifyError
from sparsify_compiler.target import Target

STORED_VIEWS = (torch.ops.aten.slice.Tensor, torch.ops.aten.transpose.int)


@dataclass
class Parts:
    """What the functions of a library share: the module that is built, its kernels by what they are, parameters by name, symbols."""

    builder: Any
    target: Target
    ranges: dict[str, tuple[int, int | None]]
    kernels: dict[Any, Any] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    reference: list[str] = field(default_factory=list)

    def kernel(self, key: Any, parameters: Sequence[Parameter], emit: Callable[[list[Any]], None], name: str) -> Any:
        """The function of the module with these parameters and this body; `key` tells it from others."""
        key = (key, tuple(parameters))
        if key not in self.kernels:
            self.kernels[key] = self.builder.add_func(function(parameters, emit), name)
        return self.kernels[key]


class GraphImporter(ExportedProgramImporter):  # type: ignore[misc]
    """One graph. Tensors of the model are made when `env` is first asked for them, so that only those that are read are parameters."""

    def __init__(self, source: Function, parts: Parts) -> None:
        from sparsify_compiler.codegen.whole_graph_convert import CONVERTERS

        super().__init__()
        self.source, self.parts, self.block_builder = source, parts, parts.builder
        self.params_read: dict[str, Any] = {}
        self.symbols: dict[Any, Any] = {}
        self.named: dict[str, Any] = {}
        self.env = _Values(self)
        self.own: dict[str, Callable[[GraphImporter, fx.Node], Any]] = dict(CONVERTERS)

    def translate(self) -> dict[str, Any]:
        """Add the function to the module; what it takes and returns, for the manifest."""
        inputs = self._inputs()
        with self.block_builder.function(self.source.name, attrs={"num_input": len(inputs)}):
            with self.block_builder.dataflow():
                results = self._results()
                shapes = [[self._size(size) for size in result.ty.shape] for result in results]
                output = self.block_builder.emit_output(results[0] if len(results) == 1 else relax.Tuple(results))
            self.block_builder.emit_func_output(output, [*inputs, *self.params_read.values()])
        outputs = [{"name": name, "dtype": declared(result).dtype, "shape": shape}
                   for name, result, shape in zip(self.source.outputs, results, shapes, strict=True)]
        given = [{"name": one.name, "dtype": one.dtype, "shape": list(one.shape)} | ({"updated": True} if one.updated else {})
                 for one in self.source.inputs]
        return {"inputs": given, "outputs": outputs, "parameters": list(self.params_read)}

    def _inputs(self) -> list[Any]:
        found = []
        placeholders = [node for node in self.source.graph.nodes if node.op == "placeholder"]
        for node, given in zip(placeholders, self.source.inputs, strict=True):
            shape = []
            for size, seen in zip(given.shape, node.meta["val"].shape, strict=True):
                if isinstance(size, str):
                    size = self.named.setdefault(size, tirx.Var(size, "int64"))
                if isinstance(seen, torch.SymInt):
                    self.symbols[seen.node.expr] = size
                shape.append(size)
            var = relax.Var(given.name, relax.TensorType(shape, given.dtype))
            self.env[node] = var
            found.append(var)
        return found

    def _results(self) -> list[Any]:
        results: list[Any] = []
        for node in list(self.source.graph.nodes):
            if node.op == "output":
                results = [self.env[value] for value in node.args[0]]
            elif node in self.source.products:
                self.env[node] = self._guarded(node, self.own["product"])
            elif node.op == "call_function" and node not in self.env and node not in self.source.computed and not self._is_stored(node):
                self.env[node] = self._guarded(node, self._convert)
        if not all(isinstance(result, relax.Expr) and isinstance(result.ty, relax.TensorType) for result in results):
            raise KernelError("a result is no tensor of a known shape", where=self.source.name, hint="save() keeps the model for PyTorch")
        return results

    def _is_stored(self, node: fx.Node) -> bool:
        """A view of a stored tensor that only products read."""
        read = all(user in self.source.computed or user in self.source.products for user in node.users)
        while node.op != "get_attr":
            given = node.all_input_nodes
            if len(given) != 1 or node.target not in STORED_VIEWS:
                return False
            node = given[0]
        return read

    def _guarded(self, node: fx.Node, convert: Callable[[Any, fx.Node], Any]) -> Any:
        try:
            return convert(self, node)
        except SparsifyError:
            raise
        except (KeyError, ValueError, TypeError, NotImplementedError, AssertionError, AttributeError, IndexError, RuntimeError) as error:
            raise KernelError(f"{node.target} cannot be translated: {type(error).__name__} {str(error).strip().splitlines()[-1:]}", where=node.name,
                              hint="save() keeps the model for PyTorch; whole graphs take the operators of encoders, CNNs and decoders") from error

    @staticmethod
    def _convert(self: GraphImporter, node: fx.Node) -> Any:
        _positional(node)
        own = self.own.get(_name(node))
        return self.plain(node) if own is None else own(self, node)

    def plain(self, node: fx.Node) -> Any:
        """A node as TVM's importer translates it, in the dtype that it has: of some operators the importer leaves that out."""
        found, wanted = self._by_tvm(node), node.meta.get("val")
        dtype = str(wanted.dtype).removeprefix("torch.") if isinstance(wanted, Tensor) else ""
        if isinstance(found, relax.Expr) and isinstance(found.ty, relax.TensorType) and dtype not in ("", declared(found).dtype):
            return self.block_builder.emit(relax.op.astype(found, dtype))
        return found

    def _by_tvm(self, node: fx.Node) -> Any:
        if _name(node) not in self.convert_map:
            raise KernelError(f"no whole graph has the operator {node.target}", where=node.name, hint="save() keeps the model for PyTorch")
        return self.convert_map[_name(node)](node)

    def value(self, node: Any) -> Any:
        """The Relax value of a node, or a constant as it is."""
        return self.env[node] if isinstance(node, fx.Node) else node

    def shape(self, node: fx.Node) -> list[Any]:
        """The shape of a node's value: numbers, and expressions of symbols."""
        return [self.size(size) for size in node.meta["val"].shape]

    def size(self, size: Any) -> Any:
        """An int, or a torch.SymInt as an expression of the function's symbols."""
        return size if isinstance(size, int) else self._expression(size.node.expr)

    def _expression(self, found: Any) -> Any:
        if found in self.symbols:
            return self.symbols[found]
        if found.is_Integer:
            return int(found)
        parts = [self._expression(one) for one in found.args]
        kind = type(found).__name__
        if kind in ("Add", "Mul"):
            whole = parts[0]
            for part in parts[1:]:
                whole = whole + part if kind == "Add" else whole * part
            return whole
        binary = {"FloorDiv": operator.floordiv, "Mod": operator.mod, "PythonMod": operator.mod, "Max": tirx.max, "Min": tirx.min}
        if kind in binary and len(parts) == 2:
            return binary[kind](*(tirx.const(part, "int64") if isinstance(part, int) else part for part in parts))
        raise KernelError(f"a size is {found}, which no whole graph computes", where=self.source.name, hint="fix that dimension when compiling")

    def _size(self, size: Any) -> int | str:
        """A dimension of an output for the manifest."""
        return int(size) if isinstance(size, tirx.IntImm) else str(size)

    def one_kernel(self, schedule: Any, inputs: Sequence[Any], shape: Sequence[Any], dtype: str = "float32") -> Any:
        """The result of one kernel on these values."""
        out = Parameter(tuple(size if isinstance(size, int) else None for size in shape), dtype)
        return self.call(self.kernel_of(schedule, [*map(declared, inputs), out]), inputs, shape, dtype)

    def kernel_of(self, schedule: Any, parameters: Sequence[Parameter]) -> Any:
        """The function of the module that is this one kernel."""
        return self.parts.kernel(repr(schedule), parameters, partial(emit_within, schedule), schedule.name)

    def call(self, kernel: Any, inputs: Sequence[Any], shape: Sequence[Any], dtype: str = "float32") -> Any:
        """The result of a kernel of the module."""
        return self.block_builder.emit(relax.call_tir(kernel, list(inputs), out_ty=relax.TensorType(shape, dtype)))

    def parameter(self, name: str, tensor: Tensor) -> Any:
        """A tensor as a parameter of the function; the same one twice is one."""
        if name not in self.params_read:
            self.params_read[name] = relax.Var(name, relax.TensorType(list(tensor.shape), str(tensor.dtype).removeprefix("torch.")))
            self.parts.parameters.setdefault(name, tensor.detach().contiguous())
        return self.params_read[name]


class _Values(dict[fx.Node, Any]):
    """Node -> its Relax value; tensors of the model become parameters when they are first read."""

    def __init__(self, importer: GraphImporter) -> None:
        self.importer = importer

    def __missing__(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            name = str(node.target)
            self[node] = found = self.importer.parameter(name, self.importer.source.tensors(name))
            return found
        raise KeyError(node.name)


def _name(node: fx.Node) -> str:
    return str(node.target.__name__)  # type: ignore[union-attr]


def _positional(node: fx.Node) -> None:
    """Arguments by position, as TVM's importer reads them, with defaults for those before the last that is given."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.args:
        return
    named, positional = dict(node.kwargs), []
    for argument in node.target._schema.arguments:
        if argument.kwarg_only or not any(other.name in named for other in node.target._schema.arguments if not other.kwarg_only):
            break
        positional.append(named.pop(argument.name, argument.default_value))
    node.args, node.kwargs = tuple(positional), named
