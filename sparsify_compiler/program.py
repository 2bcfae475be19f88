"""Program: the captured model — graphs in normal form, parameters, provenance, input spec, and what was decided so far.

A model captured whole is one region at path "". Where the whole cannot be exported, each exportable submodule is a region of its own
and `skeleton`, a copy of the user's module tree that shares its tensors, stays eager Python around them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .decision import Decision
from .errors import InputError


class Stage(StrEnum):
    """How far a Program has come; `verify` holds what each stage allows."""

    TRACED = "traced"  # as captured: dense aten ops in normal form
    SPARSE = "sparse"  # masks, gates, experts: still plain, trainable PyTorch
    PACKED = "packed"  # masked weights are storage formats under our own ops; inference only
    LOWERED = "lowered"  # ops bound to kernels where that was measured to pay


@dataclass(frozen=True)
class TensorSpec:
    """What a graph input must be. Each dimension is an int (fixed) or a name (dynamic; the same name means the same size)."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class InputSpec:
    """How a call of the model becomes the graph's flat inputs, and how its flat outputs become the call's result.

    names      placeholder names of the graph, one a flat leaf of (args, kwargs), in order
    leaves     TensorSpec for a tensor; the constant that capture baked in for anything else (None, bool, int, float, str)
    parameters names of forward()'s parameters, to bind positional and keyword arguments alike
    in_spec    tree of (args, kwargs) as given in the example: all that has a parameter name is in kwargs
    out_spec   tree of the outputs
    ranges     dynamic dimension name -> (smallest, largest or None)
    defaults   defaults of forward()'s parameters that the example left out: a call may spell them, with that value
    """

    names: tuple[str, ...]
    leaves: tuple[TensorSpec | bool | int | float | str | None, ...]
    parameters: tuple[str, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    ranges: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    defaults: Mapping[str, bool | int | float | str] = field(default_factory=dict)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with every positional argument that has a parameter name turned into a keyword argument.

        Raises InputError for too many positional arguments, or one given twice.
        """
        named = dict(kwargs)
        positional = len(self.parameters)
        for name, value in zip(self.parameters, args[:positional], strict=False):
            if name in named:
                raise InputError(f"argument {name!r} is given twice", hint="once by position and once by name")
            named[name] = value
        return tuple(args[positional:]), named


@dataclass
class Region:
    """One captured graph and where it stands in the model.

    path    module path of the captured submodule; "" for the whole model
    module  fx.GraphModule in normal form. Parameters and buffers keep the names that they have in the model's state_dict, relative to path.
            Node metadata: "path" (module path in the model), "module" (its class), "by" (who made the node), "val" (fake tensor: shape, dtype)
    """

    path: str
    module: fx.GraphModule
    spec: InputSpec

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def node(self, name: str) -> fx.Node:
        """The node of that name. Raises KeyError when there is none."""
        found: fx.Node | None = next((node for node in self.graph.nodes if node.name == name), None)
        if found is None:
            raise KeyError(name)
        return found

    def qualified(self, name: str) -> str:
        """A name inside this region as it reads in the whole model."""
        return f"{self.path}.{name}" if self.path else name

    def clone(self) -> Region:
        """A copy whose graph can be edited; tensors are shared."""
        graph = fx.Graph()
        memo: dict[fx.Node, fx.Node] = {}
        result = graph.graph_copy(self.graph, memo)
        graph.output(result)
        old_output, new_output = _output(self.graph), _output(graph)
        new_output.meta = dict(old_output.meta)
        for old, new in memo.items():
            new.name, new.meta = old.name, dict(old.meta)
        return Region(self.path, fx.GraphModule(_share(self.module), graph), self.spec)


@dataclass(frozen=True)
class Site:
    """A place where a decision can be taken. Nodes are named, not held, so that a Site outlives a copy of its graph.

    kind    "linear", "conv", "ffn", "attention", "moe" or "residual"
    path    module path in the whole model, what selectors match; unique within a kind
    region  path of the region that it lies in
    roles   role -> node name. linear, conv: {"op"}; ffn: {"input", "up", "activation", "down", "gate" when gated}; attention: {"q", "k", "v",
            "attention", "out"}; moe: {"input", "router", "output"} where visible; residual: {"input", "branch", "add"}
    facts   what can be said without weights: {"gated": True}, {"heads": 12, "kv_heads": 4, "head_dim": 64, "mask": "causal"}, {"experts": 8}
    """

    kind: str
    path: str
    region: str
    roles: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LeftOut:
    """A part of the model that could not be captured and stays eager Python, or experts that are no one op of ours, and why."""

    path: str
    reason: str


@dataclass
class Program:
    """The captured model. Passes receive a private clone, edit it and return it."""

    regions: dict[str, Region]
    stage: Stage = Stage.TRACED
    skeleton: nn.Module | None = None
    left_out: tuple[LeftOut, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)  # tied parameters: other name -> the name that the graphs use
    decisions: dict[str, Decision] = field(default_factory=dict)  # site path -> what was decided there
    attentions: dict[str, str] = field(default_factory=dict)  # of the skeleton: module path of an attention -> text of its Indexer or Branches
    learned: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # module path of such an attention -> the tensors that its indexer names

    def clone(self) -> Program:
        """A Program whose graphs and decisions can be edited without touching this one; tensors are shared."""
        regions = {path: region.clone() for path, region in self.regions.items()}
        decisions = {k: copy.copy(v) for k, v in self.decisions.items()}
        return replace(self, regions=regions, decisions=decisions, attentions=dict(self.attentions), learned=dict(self.learned))

    def nodes(self) -> Iterator[tuple[Region, fx.Node]]:
        """Every node of every region, in the order of execution within a region."""
        for region in self.regions.values():
            for node in list(region.graph.nodes):
                yield region, node

    def text(self) -> str:
        """The Program as readable text: one line a node, with shape, dtype, module path and maker. Deterministic."""
        lines = [f"program  stage={self.stage}  regions={len(self.regions)}"]
        for region in self.regions.values():
            lines.append(f"region {region.path or '(whole model)'}")
            lines += [f"  {describe(node)}" for node in region.graph.nodes]
        lines += [f"attention {path}: {text}" for path, text in self.attentions.items()]
        lines += [f"left out {part.path}: {part.reason}" for part in self.left_out]
        return "\n".join(lines) + "\n"


def describe(node: fx.Node) -> str:
    """One line about a node: name, what it computes, shape and dtype, module path, maker."""
    value = node.meta.get("val")
    kind = f"{str(value.dtype).removeprefix('torch.')}[{', '.join(str(d) for d in value.shape)}]" if isinstance(value, Tensor) else ""
    where = node.meta.get("path", "")
    made = f"  by {node.meta['by']}" if "by" in node.meta else ""
    at = f"  at {where}" if where else ""
    trained = "".join(f"  in training {by}" for by, _ in node.meta.get("training", ()))
    return f"{node.name}: {kind} = {_call(node)}{at}{made}{trained}"


def _call(node: fx.Node) -> str:
    if node.op in ("placeholder", "get_attr"):
        return f"{node.op} {node.target}"
    arguments = [str(a) for a in node.args] + [f"{k}={v}" for k, v in node.kwargs.items()]
    return f"{node.target}({', '.join(arguments)})"


def get_tensor(module: nn.Module, path: str) -> Tensor:
    """The parameter or buffer at a dotted path."""
    owner, _, name = path.rpartition(".")
    value = getattr(module.get_submodule(owner), name)
    if not isinstance(value, Tensor):
        raise KeyError(path)
    return value


def set_tensor(module: nn.Module, path: str, tensor: Tensor) -> None:
    """Put a Parameter (stays one) or a plain tensor (becomes a buffer) at a dotted path, making the modules in between."""
    owner, _, name = path.rpartition(".")
    parent = module
    for part in owner.split(".") if owner else []:
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent._modules[part]  # type: ignore[assignment]
    parent._parameters.pop(name, None)
    parent._buffers.pop(name, None)
    if isinstance(tensor, nn.Parameter):
        parent.register_parameter(name, tensor)
    else:
        parent.register_buffer(name, tensor)


def prune_unused(region: Region) -> None:
    """Drop dead nodes, then the parameters and buffers that no node reads, and recompile."""
    region.graph.eliminate_dead_code()
    used = {str(node.target) for node in region.graph.nodes if node.op == "get_attr"}
    fresh = nn.Module()
    for name in sorted(used):
        set_tensor(fresh, name, get_tensor(region.module, name))
    region.module = fx.GraphModule(fresh, region.graph)


def _share(module: nn.Module) -> nn.Module:
    """A new module tree with the same tensors under the same names."""
    fresh = nn.Module()
    for name, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        set_tensor(fresh, name, tensor)
    return fresh


def _output(graph: fx.Graph) -> fx.Node:
    output: fx.Node = next(node for node in reversed(graph.nodes) if node.op == "output")
    return output
