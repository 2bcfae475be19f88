"""FFNs of which every linear selects its inputs: one kernel for the whole, where it was measured to be faster than one for each linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, fx

from sparsify_compiler.measure import Timing
from sparsify_compiler.normal_form_edit import aten, insert, is_call, only_user, take_place
from sparsify_compiler.operands import operands
from sparsify_compiler.ops import select, select_inputs_ffn
from sparsify_compiler.passes.lower import _selected
from sparsify_compiler.passes.lower._dense_ffn import add_dense, hidden
from sparsify_compiler.passes.lower._layer import Form, row_of, rows_of, say
from sparsify_compiler.passes.lower._linear import Linear, eager
from sparsify_compiler.passes.lower._selected_ffn import RAISED, activation_of
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region

BY = ("limit", "scale", "center")
ONE_BY_ONE = "gather by input"


@dataclass(frozen=True)
class Ffn:
    """The nodes of down(activation(gate(x)) * up(x)), or of down(activation(gate(x))); each a packed select_linear with a stored limit."""

    gate: Any
    up: Any | None
    down: Any
    activation: str

    @property
    def linears(self) -> dict[str, fx.Node]:
        return {name: node for name, node in (("gate", self.gate), ("up", self.up), ("down", self.down)) if node is not None}


@dataclass(eq=False)
class Whole(Linear):
    """An FFN that is measured as a whole."""

    ffn: Ffn = field(kw_only=True)


def find(down: fx.Node) -> Ffn | None:
    """The FFN that ends at a node; None where it is another, or computed otherwise."""
    source = down.kwargs.get("x") if _stored(down) else None
    if not isinstance(source, fx.Node) or only_user(source) is None:
        return None
    pairs = [(source, None)]
    if is_call(source, aten.mul.Tensor):
        one, other = source.kwargs["self"], source.kwargs["other"]
        pairs = [(one, other), (other, one)]
    for activated, up in pairs:
        gate, name = activation_of(activated)
        if is_call(up, aten.relu.default) and name in RAISED and only_user(up) is not None:
            up, name = up.kwargs["self"], RAISED[name]
        parts = [gate] if up is None else [gate, up]
        alone = bool(name) and only_user(activated) is not None and all(_stored(part) and only_user(part) is not None for part in parts)
        if alone and all(part.kwargs["x"] is gate.kwargs["x"] for part in parts):
            return Ffn(gate, up, down, name)
    return None


def size_of(region: Region, node: fx.Node) -> int:
    """Bytes of the weights of the FFN that ends at a node."""
    ffn = find(node)
    return 0 if ffn is None else sum(_selected.size_of(region, linear) for linear in ffn.linears.values())


def whole(region: Region, node: fx.Node, program: Program, ctx: Context) -> Whole:
    """The FFN that ends at a node, its kernels built and ready to run with as many selected inputs as calibration found."""
    ffn = find(node)
    assert ffn is not None
    assert ctx.kernels is not None
    assert ctx.target is not None
    tensors, biases = _operands(region, ffn)
    weight, x, bias = tensors["down"].t(), rows_of(region, ffn.gate, ctx), biases["down"]
    row = row_of(region, ffn.down, "linear", weight, program)
    layer = Whole(region, ffn.down, row, weight, bias, packed=True, rows=x.shape[0], selects=True, ffn=ffn)
    dense = {name: (tensors[name].t(), biases[name]) for name in ffn.linears}
    add_dense(layer, dense, ffn.activation, x, ctx)
    densities = {name: row_of(region, linear, "linear", tensors[name].t(), program).density for name, linear in ffn.linears.items()}
    neurons = hidden({name: partial(eager, *pair) for name, pair in dense.items()}, ffn.activation, x)
    measured, attributes = _as_dense_as(densities, x, tensors, neurons), {"activation": ffn.activation}
    expected = partial(select_inputs_ffn.op, x, **measured, bias=bias, **attributes)
    for candidate, rival in zip(*(ctx.kernels.candidates("select_inputs_ffn", given, attributes, x.dtype, (layer.rows,), ctx.target)
                                  for given in (tensors, measured)), strict=True):
        timed = rival.bind(bias)
        layer.add(ONE_BY_ONE, timed.one_by_one, x, None, Form(False))
        layer.add(candidate.name, timed, x, None, Form(False, candidate.bind(bias)), expected)
    return layer


def _operands(region: Region, ffn: Ffn) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """The tensors of select_inputs_ffn but the last bias, and the biases by linear."""
    tensors: dict[str, Tensor] = {}
    biases: dict[str, Tensor | None] = {}
    for name, linear in ffn.linears.items():
        own, _, bias = operands(region, linear)
        tensors |= {name: own["weight"], **{f"{name}_{by}": own[by] for by in BY if by in own}}
        tensors |= {f"{name}_bias": bias} if bias is not None and name != "down" else {}
        biases[name] = bias
    return tensors, biases


def choose(layer: Whole, timings: Mapping[str, Timing], margin: float, program: Program) -> bool:
    """Put the kernel of the whole in place of its linears where it is the fastest, and write down why; False where they are to be looked at alone."""
    times = {name: timing.median for name, timing in timings.items()}
    best = next((name for name, form in layer.forms.items() if form.kernel is not None), None)
    if best is None:
        return False
    dense = min((name for name, form in layer.forms.items() if form.dense), key=times.__getitem__)
    gain, apart, row = times[dense] / times[best], times[dense] / times[ONE_BY_ONE], layer.decision
    if times[best] > min(times[dense] * (1 - margin), times[ONE_BY_ONE] * (1 - min(margin, 0))):
        say(row, f"its FFN has {gain:.2f} times the dense speed in one call, {apart:.2f} linear by linear")
        return False
    rows = [row_of(layer.region, node, "linear", layer.weight, program) for node in layer.ffn.linears.values()]
    _replace(layer)
    layer.bind(best)
    row.rows, row.dense_form, row.dense_ms, row.sparse_ms, row.compiled_ms = layer.rows, dense, times[dense], times[best], times[best]
    for one in rows:
        one.kernel, one.bytes = best, one.dense_bytes
        say(one, f"{one.density:.0%} of its inputs selected; its FFN has {gain:.2f} times the speed of {dense} in one call, "
                 f"{apart:.2f} linear by linear" + ("" if one is row else f"; times at {row.site}"))
    return True


def _replace(layer: Whole) -> None:
    """The linears -> select_inputs_ffn."""
    ffn, node = layer.ffn, layer.node
    given: dict[str, Any] = {"x": ffn.gate.kwargs["x"]}
    for name, linear in ffn.linears.items():
        given |= {name: linear.kwargs["weight"], f"{name}_bias": linear.kwargs.get("bias"), **{f"{name}_{by}": linear.kwargs.get(by) for by in BY}}
    given["bias"] = given.pop("down_bias")
    layer.node = insert(node, select_inputs_ffn.op, **{name: value for name, value in given.items() if value is not None}, activation=ffn.activation)
    take_place(node, layer.node, "lower")


def _stored(node: Any) -> bool:
    """A packed linear that selects by a stored limit."""
    return isinstance(node, fx.Node) and _selected.is_packed(node) and node.kwargs["limit"].op == "get_attr"  # type: ignore[union-attr]


def _as_dense_as(densities: Mapping[str, float], x: Tensor, tensors: Mapping[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
    """The same tensors with limits that so many inputs of these rows reach."""
    made = dict(tensors)
    for name, density in densities.items():
        scores = select.score(hidden if name == "down" else x, tensors.get(f"{name}_scale"), tensors.get(f"{name}_center"))
        made[f"{name}_limit"] = _selected.limit_of(scores, density)
    return made
