"""Linears that read what given scores have selected, as attention's output does where heads are predicted: what was left out is 0, and its weights
are not read.

The values are those of the selection (denormals count as 0); it is still made, and what only the selection needs is counted as the kernel's own time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx

from sparsify_compiler.fakes import fake_like, mode_of
from sparsify_compiler.fold import erase_dead
from sparsify_compiler.ops import select
from sparsify_compiler.passes.lower import _selected
from sparsify_compiler.passes.lower._layer import rows_of
from sparsify_compiler.passes.lower._linear import Linear
from sparsify_compiler.passes.lower._predicted import predictor
from sparsify_compiler.passes.lower._selected import choose, size_of
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, set_tensor

__all__ = ["choose", "is_packed", "is_scored", "layer", "make_dense", "pack", "size_of"]

LEAST = torch.finfo(torch.float32).tiny     # whatever is no 0 reaches it, but for denormals
LIMIT = "least_selected"


def is_scored(node: fx.Node) -> bool:
    """A linear layer with a stored weight that reads what was selected by scores and a limit, with 0 for the rest."""
    source = node.kwargs.get("input")
    return (_selected.reads_selection(node) and isinstance(source, fx.Node) and source.kwargs.get("scores") is not None
            and source.kwargs.get("center") is None and len(source.users) == 1)


def is_packed(node: fx.Node) -> bool:
    """Such a layer that `pack` has packed, and that has no kernel yet."""
    source = node.kwargs.get("x")
    return (_selected.is_packed(node) and isinstance(source, fx.Node) and source.target is select.op
            and source.kwargs.get("scores") is not None)


def pack(region: Region, node: fx.Node, program: Program, by: str) -> None:
    """linear(select(x, limit, scores), weight [N, K], bias) -> select_linear(select(x, limit, scores), weight [K, N], bias), by what is no 0."""
    name = f"{node.kwargs['weight'].target}_{LIMIT}"  # type: ignore[union-attr]
    set_tensor(region.module, name, torch.tensor(LEAST, dtype=torch.float32))
    with region.graph.inserting_before(node):
        limit = region.graph.get_attr(name)
    limit.meta = {"by": by, "val": fake_like(torch.empty((), dtype=torch.float32), mode_of(region))}
    _selected.pack_as(region, node, node.kwargs["input"], {"limit": limit}, program, by)


def layer(region: Region, node: fx.Node, program: Program, ctx: Context) -> Linear:
    """The layer at a node, its kernels behind what selects for them."""
    source: Any = node.kwargs["x"]
    x = rows_of(region, source, ctx)
    predict, limit = predictor(region, source, x), torch.full((x.shape[0], 1), 0.5, dtype=torch.float32)
    scores = torch.ones_like(x, dtype=torch.float32)
    return _selected.layer(region, node, program, ctx, partial(_behind, predict, limit, scores))


def _behind(predict: Callable[[], object], limit: Tensor, scores: Tensor, kernel: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The kernel behind the scores and the selection; what those say of random rows counts for nothing."""
    predict()
    return kernel(select.op(x, limit, scores=scores))


def make_dense(layer: Linear) -> list[fx.Node]:
    """select_linear -> linear, of everything where the selections were made for speed, of what the model itself selects otherwise. Returns it."""
    node, source = layer.node, cast(Any, layer.node.kwargs["x"])
    read = source.kwargs["x"] if source.meta.get("optional") else source
    ours = str(node.kwargs["limit"].target).endswith(LIMIT)  # type: ignore[union-attr]
    made = _selected.make_dense(layer, read if ours else _selected.as_selected(node, read))
    erase_dead([source])
    return made
