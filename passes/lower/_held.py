"""FFNs that hold a part of their neurons while a text goes on: kept where that pays at one token, made dense elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler import session
from sparsify_compiler.measure import Timing
from sparsify_compiler.operands import operands
from sparsify_compiler.ops import held_ffn
from sparsify_compiler.passes.lower._dense_ffn import ffn_layer, insert_ffn, size_of
from sparsify_compiler.passes.lower._layer import Form, rows_of, say
from sparsify_compiler.passes.lower._linear import Linear
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region

__all__ = ["choose", "is_packed", "layer", "make_dense", "size_of"]

HELD = "weights cut out"


def is_packed(node: fx.Node) -> bool:
    """An FFN that holds neurons."""
    return node.target is held_ffn.op


def layer(region: Region, node: fx.Node, program: Program, ctx: Context) -> Linear:
    """The FFN at a node, as it runs on a token of a text that goes on, and dense."""
    tensors, _, bias = operands(region, node)
    options = {name: node.kwargs[name] for name in ("activation", "density", "share", "prompt", "key")}
    x = rows_of(region, node, ctx)[:1]
    layer = ffn_layer(region, node, x, tensors["down"], program, ctx)
    layer.add(HELD, _GoingOn(tensors, bias, options), x[None], None, Form(False))
    return layer


def choose(layer: Linear, timings: Mapping[str, Timing], margin: float) -> bool:
    """Whether it stays as it is; what was measured is written down."""
    times = {name: timing.median for name, timing in timings.items()}
    yardstick = min((name for name in times if layer.forms[name].dense), key=lambda name: times[name])
    row, gain = layer.decision, times[yardstick] / times[HELD]
    row.rows, row.dense_form, row.dense_ms, row.sparse_ms = layer.rows, yardstick, times[yardstick], times[HELD]
    if times[HELD] <= times[yardstick] * (1 - margin):
        row.format, row.kernel, row.compiled_ms = "neurons", HELD, times[HELD]
        say(row, f"{gain:.2f} times the speed of {yardstick} while a text goes on, {row.density:.0%} of its neurons held")
        return True
    row.density = 1.0
    say(row, f"computes everything: the weights that were cut out have {gain:.2f} times the dense speed")
    return False


def make_dense(layer: Linear) -> list[fx.Node]:
    """held_ffn -> the FFN with all of its neurons. Returns its linears."""
    return insert_ffn(layer.region, layer.node, layer.node.kwargs["down"])  # type: ignore[arg-type]


class _GoingOn:
    """The op on a token of a text whose prompt voted, for each neuron as chance has it."""

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None, options: Mapping[str, Any]) -> None:
        votes = torch.rand(1, tensors["down"].shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        text = {str(options["key"]): held_ffn.Held(votes)}
        self._arguments = {**tensors, **({} if bias is None else {"bias": bias}), **options}
        self._call = session.Call(text, 1, (1, 1), None)

    def __call__(self, x: Tensor) -> Tensor:
        with session.running(self._call):
            y: Tensor = held_ffn.op(x, **self._arguments)
            return y
