"""What libraries know otherwise, or not at all: layers that choose what they read, as kernels take them, and operators as plain formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from .errors import KernelError
from .export_library_formulas import SPELLINGS, arguments
from .export_library_single import with_batch
from .fold import plan, store
from .normal_form_edit import insert
from .ops import experts_ffn, held_ffn, noted, predicted_ffn, put_rows, select, select_ffn, select_inputs_ffn, select_linear, take_rows
from .ops._linear import compute_dtype
from .passes_api import Miss
from .program import Region
from .splice import insert_formula

aten = torch.ops.aten
BY = "export"


def differences(self: Tensor, *, n: int = 1, dim: int = -1, prepend: Tensor | None = None, append: Tensor | None = None) -> Tensor:
    """torch.diff."""
    whole = torch.cat([part for part in (prepend, self, append) if part is not None], dim)
    for _ in range(n):
        whole = aten.slice.Tensor(whole, dim, 1) - aten.slice.Tensor(whole, dim, 0, -1)
    return whole


# What is a formula of other ops wherever it stands. Of rows that are closed nothing is kept.
SPELLED: Mapping[Any, Callable[..., Tensor]] = {select.op: select.reference, take_rows.op: take_rows.reference, put_rows.op: put_rows.reference,
                                                aten.diff.default: differences}
REMEMBERING = {noted.op: "what another layer noted", held_ffn.op: "what a text's prompt used"}


def every_expert(x: Tensor, chosen: Tensor, weights: Tensor, gate: Tensor, down: Tensor, up: Tensor | None = None, gate_bias: Tensor | None = None,
                 up_bias: Tensor | None = None, bias: Tensor | None = None, *, activation: str) -> Tensor:
    """experts_ffn by computing all experts for all rows, and leaving out what was not chosen."""
    dtype = compute_dtype(x, gate)
    total = x.new_zeros((*x.shape[:-1], down.shape[1]), dtype=dtype)
    for expert in range(gate.shape[0]):
        own = [None if part is None else part[expert].to(dtype) for part in (gate, up, down, gate_bias, up_bias, bias)]
        gates = torch.nn.functional.linear(x.to(dtype), own[0], own[3])  # type: ignore[arg-type]
        ups = None if own[1] is None else torch.nn.functional.linear(x.to(dtype), own[1], own[4])
        given = torch.nn.functional.linear(select_ffn.hidden(activation, gates, ups), own[2], own[5])  # type: ignore[arg-type]
        mine = chosen == expert
        factor = torch.where(mine, weights, 0.0).sum(-1, keepdim=True).to(dtype)
        total = total + torch.where(mine.any(-1, keepdim=True), given * factor, 0.0)
    return total.to(x.dtype)


FORMULAS: Mapping[Any, Callable[..., Tensor]] = {
    select_linear.op: select_linear.reference, select_ffn.op: select_ffn.reference, select_inputs_ffn.op: select_inputs_ffn.reference,
    predicted_ffn.op: predicted_ffn.reference, experts_ffn.op: every_expert}


def spell(region: Region) -> None:
    """Write what kernels of whole graphs are given in the dtypes that they take, and what has no kernel of its own as formulas, in place.

    Raises KernelError for an op that remembers something from one call to the next.
    """
    for node in list(region.graph.nodes):
        with_batch(node)
        if node.target in REMEMBERING:
            raise KernelError(f"{str(node.target).split('.')[1]} reads {REMEMBERING[node.target]}, which whole graphs do not remember",
                              where=node.name, hint="compile without the pass that made it for this form; save() keeps it for PyTorch")
        if node.target in SPELLED:
            as_formula(region, node, SPELLED[node.target])
        elif node.target in SPELLINGS and SPELLINGS[node.target][0](node):
            _folded(region, node, SPELLINGS[node.target][1])
        elif node.target is experts_ffn.op:
            _plain_choice(node)


def _folded(region: Region, node: fx.Node, formula: Callable[..., Tensor]) -> None:
    """Put a formula in the place of a node; what is computed of tensors of the model alone is a tensor of the library."""
    before = set(region.graph.nodes)
    as_formula(region, node, formula)
    plans = plan(region, [one for one in region.graph.nodes if one not in before], None)
    for item in [] if isinstance(plans, Miss) else plans:
        store(region, item, BY)


def _plain_choice(node: fx.Node) -> None:
    """The places that rows choose as int32, and their weights as float32, ones where there are none."""
    chosen, weights = node.kwargs["chosen"], node.kwargs.get("weights")
    assert isinstance(chosen, fx.Node)
    if not isinstance(weights, fx.Node):
        weights = insert(node, aten.ones_like.default, self=chosen)
    if weights.meta["val"].dtype is not torch.float32:
        weights = insert(node, aten.to.dtype, self=weights, dtype=torch.float32)
    if chosen.meta["val"].dtype is not torch.int32:
        chosen = insert(node, aten.to.dtype, self=chosen, dtype=torch.int32)
    node.kwargs = {**node.kwargs, "chosen": chosen, "weights": weights}


def as_formula(region: Region, node: fx.Node, formula: Callable[..., Tensor]) -> None:
    """Put what the formula gives in the place of a node."""
    given = arguments(node)
    tensors = {name: value for name, value in given.items() if isinstance(value, fx.Node)}
    others = {name: value for name, value in given.items() if value is not None and name not in tensors}
    result = insert_formula(region, node, partial(formula, **others), tensors, BY)
    node.replace_all_uses_with(result)
    region.graph.erase_node(node)
