"""Carrying out a rewrite: trace the formula on fake tensors, copy its nodes into the graph, fold what became constant, let it take over."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from .cost import total
from .errors import SparsifyError
from .fakes import fake_of, mode_of
from .fold import erase_dead, is_constant, plan, store
from .normal_form import normalise
from .passes_api import Context, Miss
from .pattern import op_name
from .program import Region

if TYPE_CHECKING:
    from .rule import Match, Rule


def rewrite(rule: Rule, match: Match, ctx: Context, by: str) -> Miss | None:
    """Trace the formula, splice it before the matched output, fold, and let it take over. A Miss when that would dissolve a mask."""
    region, output = match.region, match.output
    created, result = _splice(_formula(rule, match), match, by)
    why = _dearer(match, created) if rule.only_if_cheaper else None
    folds = why or (plan(region, created, result) if rule.folds else [])
    if isinstance(folds, Miss):
        erase_dead(reversed(created))
        return folds
    ctx.spend()
    if isinstance(result, fx.Node):
        output.replace_all_uses_with(result)
    for item in folds:
        store(region, item, by)
    erase_dead([*reversed(match.nodes), *reversed(created)])
    return None


def _dearer(match: Match, created: Sequence[fx.Node]) -> Miss | None:
    """A Miss when the new nodes, without those that fold, cost more than the matched ones."""
    raised = total(node for node in created if not is_constant(node)).dearer(total(node for node in match.nodes if not is_constant(node)))
    return None if raised is None else Miss(f"would raise {raised}")


def insert_formula(region: Region, before: fx.Node, function: Callable[..., Tensor], inputs: Mapping[str, fx.Node], by: str) -> fx.Node:
    """Compute `function(**inputs)`, a formula in plain torch, in front of a node; returns the node of its result."""
    formula = _traced(region, function, inputs)
    new = dict(zip((node for node in formula.module.graph.nodes if node.op == "placeholder"), formula.inputs, strict=True))
    place = {key: before.meta[key] for key in ("path", "module") if key in before.meta}
    for node in formula.module.graph.nodes:
        if node.op == "output":
            result: fx.Node = new[node.args[0]]
            return result
        if node.op == "call_function":
            with region.graph.inserting_before(before):
                new[node] = region.graph.node_copy(node, new.__getitem__)
            new[node].meta = {**place, "by": by, "val": node.meta.get("val")}
    raise SparsifyError("a formula returns one tensor", where=f"node {before.name}")


@dataclass(frozen=True)
class Formula:
    """A rewrite in normal form, and the node that each of its placeholders stands for."""

    module: fx.GraphModule
    inputs: tuple[fx.Node, ...]


def _formula(rule: Rule, match: Match) -> Formula:
    wanted = inspect.signature(rule.rewrite).parameters
    bound: Mapping[str, Any] = match.binding.variables
    fixed = {name: bound.get(name) for name in wanted if not isinstance(bound.get(name), fx.Node)}
    nodes = {name: node for name in wanted if isinstance(node := bound.get(name), fx.Node)}
    try:
        return _traced(match.region, partial(rule.rewrite, **fixed), nodes)
    except SparsifyError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{name}: {_shape(fake_of(match.region, node, mode_of(match.region)))}" for name, node in nodes.items())
        raise SparsifyError(f"the rewrite of {type(rule).__name__} failed with {type(error).__name__}: {error}", where=f"node {match.output.name}",
                            hint=shapes) from error


def _traced(region: Region, function: Callable[..., Any], nodes: Mapping[str, fx.Node]) -> Formula:
    """The function of these nodes' values, run on fake tensors, as a graph in normal form."""
    mode = mode_of(region)
    fakes = [fake_of(region, node, mode) for node in nodes.values()]

    def formula(*values: Any) -> Any:
        return function(**dict(zip(nodes, values, strict=True)))

    with torch.inference_mode(False), torch.no_grad(), mode:
        module = make_fx(formula, pre_dispatch=True)(*fakes)
    normalise(module, trains=True)
    return Formula(module, tuple(nodes.values()))


def _splice(formula: Formula, match: Match, by: str) -> tuple[list[fx.Node], fx.Node]:
    """Copy the formula's nodes into the region. Returns the new nodes and the one that holds the result."""
    graph, old_output = match.region.graph, match.output
    sources = iter(formula.inputs)
    new: dict[fx.Node, fx.Node] = {}
    result: Any = None
    with graph.inserting_before(old_output):
        for node in formula.module.graph.nodes:
            if node.op == "placeholder":
                new[node] = next(sources)
            elif node.op == "output":
                result = new.get(node.args[0])
            elif node.op == "call_function":
                new[node] = graph.node_copy(node, new.__getitem__)
                place = match.source(op_name(node))
                new[node].meta = {k: place.meta[k] for k in ("path", "module") if k in place.meta} | {"by": by, "val": node.meta.get("val")}
            else:
                raise SparsifyError(f"a rewrite has a tensor of its own ({node.target})", where=f"node {old_output.name}",
                                    hint="make constants with torch.zeros, ones, full or eye")
    if not isinstance(result, fx.Node):
        raise SparsifyError("a rewrite returns one tensor", where=f"node {old_output.name}")
    before, after = old_output.meta["val"], result.meta.get("val")
    if _shape(before) != _shape(after):
        raise SparsifyError(f"a rewrite must keep shape and dtype: {_shape(before)} became {_shape(after)}", where=f"node {old_output.name}")
    return [node for node in new.values() if node.meta.get("by") == by and node not in formula.inputs], result


def _shape(value: Any) -> str:
    return f"{value.dtype} [{', '.join(map(str, value.shape))}]" if isinstance(value, Tensor) else repr(value)
