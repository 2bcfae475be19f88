"""Linear layers, masked and packed or dense: each runs in the fastest of its forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify_compiler import catalog
from sparsify_compiler.epilogue import Epilogue
from sparsify_compiler.measure import Timing
from sparsify_compiler.operands import input_of, operands, operator_of, packed_operator, packed_weight
from sparsify_compiler.passes.lower._layer import EAGER, Form, Layer, Source, bound, fastest, fused, noise, on_taken_rows, row_of, rows_of, say
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region

aten = torch.ops.aten
REFERENCE = "reference"  # the packed op as it is everywhere, where no kernel computes it: small and slow


@dataclass(eq=False)
class Linear(Layer):
    """One linear layer; rows is the number of rows of its input."""

    rows: int = 0


def is_packed(node: fx.Node) -> bool:
    """A sparse op that has no kernel yet."""
    return packed_operator(node) == "linear" and "kernel" not in node.meta


def is_linear(node: fx.Node) -> bool:
    """A linear layer with a stored weight that is in its place already."""
    weight = node.kwargs.get("weight")
    return node.target is aten.linear.default and isinstance(weight, fx.Node) and weight.op == "get_attr" and "kernel" not in node.meta


def size_of(region: Region, node: fx.Node) -> int:
    """Bytes of the dense weight."""
    y = node.meta["val"]
    return int(input_of(node).meta["val"].shape[-1]) * int(y.shape[-1]) * int(y.element_size())


@dataclass(frozen=True)
class Offered:
    """A layer before its kernels are built: what they are called with, those that could run it, and what is known of such layers."""

    layer: Linear
    x: Tensor
    other: Tensor | None
    found: list[tuple[Epilogue, Any]]
    key: Any
    record: Any


def offered(region: Region, node: fx.Node, program: Program, ctx: Context, taken: set[fx.Node]) -> Offered:
    """The layer at a node, and its kernels, none of them built."""
    assert ctx.kernels is not None
    assert ctx.target is not None
    tensors, attributes, bias = operands(region, node)
    op, packed = operator_of(node), is_packed(node)
    weight = packed_weight(region, node) if packed else tensors["weight"]
    # A model in parts is a language model with a cache, as a rule: of what it does with any number of rows, generating a token is most.
    x = noise(region, input_of(node), ctx) if packed or not region.path else rows_of(region, node, ctx)
    rows = x.numel() // max(x.shape[-1], 1)
    layer = Linear(region, node, row_of(region, node, "linear", weight, program), weight, bias, packed=packed, rows=rows)
    fixed = all(isinstance(size, int) for size in input_of(node).meta["val"].shape) and not on_taken_rows(node)
    sources: list[Source] = [("linear", {"weight": weight}, {} if fixed else {"any_rows": True}), *([(op, tensors, attributes)] if packed else [])]
    found = fused(node, sources, x.dtype, (rows,), ctx, taken)
    layer.chain = found[-1][0] if found else layer.chain
    other = None if layer.chain.other is None else noise(region, node, ctx).reshape(-1, weight.shape[0])[:rows].reshape(*x.shape[:-1], -1)
    kept = tensors["values"].numel() / max(weight.numel(), 1) if packed else 1.0
    about = (op, (weight.shape[0], weight.shape[1]), rows, kept, attributes, layer.chain.label, str(x.dtype), ctx.target)
    key, record = ctx.kernels.known(*about) if weight.is_cpu else (None, None)
    return Offered(layer, x, other, found, key, record)


def linear(region: Region, node: fx.Node, program: Program, ctx: Context, taken: set[fx.Node]) -> Linear:
    """The layer at a node, its kernels built and ready to run: those that tuning has found worth trying, where it has."""
    offer = offered(region, node, program, ctx, taken)
    layer, x, other = offer.layer, offer.x, offer.other
    layer.record = offer.record
    layer.add(EAGER, partial(eager, layer.weight, layer.bias), x, other, Form())
    for epilogue, candidate in offer.found if offer.record is None else ctx.kernels.as_tuned(offer.found, offer.record):  # type: ignore[union-attr]
        kernel = bound(candidate, layer.bias, ctx)
        layer.add(candidate.name + epilogue.label, kernel, x, other, Form(candidate.op == "linear", kernel, epilogue))
    if layer.packed and all(form.dense for form in layer.forms.values()):
        tensors, attributes, bias = operands(region, node)
        run = partial(catalog.get("op", operator_of(node)).op, **tensors, bias=bias, **attributes)
        layer.add(REFERENCE, run, x, other, Form(False))
    return layer


def choose(layer: Linear, timings: Mapping[str, Timing], margin: float, prefer: str) -> None:
    """Bind the fastest form to the node, and write down why."""
    dense = {name: t.median for name, t in timings.items() if layer.forms[name].dense}
    sparse = {name: t.median for name, t in timings.items() if not layer.forms[name].dense}
    yardstick = fastest(dense, layer.forms)
    if prefer == "bytes" or dense[yardstick] > dense[EAGER] * (1 - margin):
        yardstick = EAGER  # packing another copy of the weight has to pay too
    bar = dense[EAGER] if yardstick == EAGER else min(dense.values())
    best = fastest(sparse, layer.forms) if sparse else None
    gain = dense[yardstick] / sparse[best] if best is not None else 0.0
    row = layer.decision
    row.rows, row.dense_form, row.dense_ms = layer.rows, yardstick, dense[yardstick]
    row.sparse_ms = sparse[best] if best is not None else None
    if best is not None and (prefer == "bytes" or sparse[best] <= bar * (1 - margin)):
        layer.bind(best)
        row.kernel, row.compiled_ms = best, sparse[best]
        if best != REFERENCE:
            row.bytes = layer.forms[best].kernel.resident_bytes
        say(row, f"{gain:.2f} times the speed of {yardstick}" + ("" if gain >= 1 else ", kept for its bytes"))
        return
    if layer.packed:
        none = best is None or best == REFERENCE
        why = "no kernel for this op, dtype and target" if none else f"the best kernel ({best}) has {gain:.2f} times the dense speed"
        say(row, f"stays dense: {why}")
        layer.make_dense()
    layer.bind(yardstick)
    row.kernel, row.compiled_ms, row.format = yardstick, dense[yardstick], "dense"
    row.bytes = layer.weight.numel() * layer.weight.element_size()
    row.reason = row.reason or "stays dense: no pass changed it"


def eager(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """torch's own operator."""
    return nn.functional.linear(x, weight, bias)
