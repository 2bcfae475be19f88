"""Operations and bytes of every layer of a report, dense and as it runs now: what a roofline is drawn from."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import fx

from . import catalog
from .cost import Cost, conv_cost, node_cost
from .decision import Decision
from .pattern import op_name
from .program import Program
from .sites import find_sites

FFN = "_ffn"  # what the names of ops end with that compute one
BY_CALL = "by "  # formats that select at each call what they read of a weight that is stored whole: "by input", "by neuron"


def fill_costs(rows: Iterable[Decision], captured: Program, lowered: Program) -> None:
    """Fill in FLOPs and bytes of linear layers and convolutions, at the rows that they were timed with; a row that has them already keeps them.

    captured  the Program before any pass, which knows what a convolution reads
    lowered   that what runs, which knows where the time of a row is that of a whole FFN, so that one weight's cost says nothing
    """
    ffns = {str(node.meta.get("site")) for _, node in lowered.nodes() if op_name(node).endswith(FFN)}
    convs = {site.path: captured.regions[site.region].node(site.roles["op"]) for site in find_sites(captured, "conv")}
    for row in rows:
        dense = _dense(row, convs)
        if dense is None or row.dense_bytes is None or row.flops_before is not None or row.site in ffns:
            continue
        row.flops_before, row.moved_before = dense.flops, dense.bytes
        row.flops, row.moved = dense.flops, dense.bytes
        if row.format != "dense":
            read = row.density * row.dense_bytes if row.format.startswith(BY_CALL) or row.bytes is None else row.bytes
            row.flops, row.moved = row.density * dense.flops, dense.bytes - row.dense_bytes + read


def flops_of(captured: Program, lowered: Program) -> float:
    """Operations of a call of the lowered Program: those of every node as it was captured, less what its rows no longer do."""
    fill_costs(lowered.decisions.values(), captured, lowered)
    return math.fsum([*(node_cost(node).flops for _, node in captured.nodes()),
                      *((row.flops or 0) - (row.flops_before or 0) for row in lowered.decisions.values())])


def joules_of(captured: Program, lowered: Program) -> float:
    """The same in joules (cost_models/energy.py)."""
    fill_costs(lowered.decisions.values(), captured, lowered)
    nodes = [(node_cost(node), node.meta["val"]) for _, node in captured.nodes() if isinstance(node.meta.get("val"), torch.Tensor)]
    return math.fsum([*(_joules(cost.flops, cost.bytes, str(value.dtype).removeprefix("torch.")) for cost, value in nodes),
                      *((row_joules(row) or 0) - (row_joules_before(row) or 0) for row in lowered.decisions.values())])


def row_joules(row: Decision) -> float | None:
    """What a row takes as it runs now; None where its operations are not known."""
    return None if row.flops is None or row.moved is None else _joules(row.flops, row.moved, row.dtype)


def row_joules_before(row: Decision) -> float | None:
    """What it took dense."""
    return None if row.flops_before is None or row.moved_before is None else _joules(row.flops_before, row.moved_before, row.dtype)


def _joules(flops: float, moved: float, dtype: str) -> float:
    return float(catalog.get("cost model", "energy").joules(flops, moved, dtype))


def _dense(row: Decision, convs: dict[str, fx.Node]) -> Cost | None:
    if row.rows is None or len(row.shape) < 2:
        return None
    if row.site in convs:
        return node_cost(convs[row.site])
    if len(row.shape) != 2:
        return None
    outputs, inputs = row.shape
    made = [torch.empty(size, dtype=getattr(torch, row.dtype), device="meta") for size in ((row.rows, inputs), row.shape, (row.rows, outputs))]
    return conv_cost(made[0], made[1], made[2])


def intensity(flops: float | None, moved: float | None) -> float | None:
    """Operations for each byte that moves; None where either is not known."""
    return flops / moved if flops is not None and moved and math.isfinite(moved) else None
