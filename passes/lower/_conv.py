"""Convolutions: each region runs them as the model does, or packed and channels last, whichever makes the whole region faster.

A packed convolution gives y channels last, and what follows keeps that layout up to the next one. So it is not for one layer to choose: a layer
that is faster in a layout of its own costs the others a conversion. Forms of a layer are measured first, then the region as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.call import call_arguments, flatten_call
from sparsify_compiler.epilogue import META
from sparsify_compiler.executor import flat_function
from sparsify_compiler.measure import Timing, interleave
from sparsify_compiler.operands import CONVOLUTIONS, GEOMETRY, input_of, operands, operator_of
from sparsify_compiler.passes.lower._layer import EAGER, Form, Layer, fused, noise, row_of, say
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region
from sparsify_compiler.shapes import example_shape

aten = torch.ops.aten
LAST = "dense eager, channels last"
# A packed weight that is more than so many times its own bytes (oneDNN pads groups of few channels to blocks of 16) has to save so much of the
# layer's time to be worth its room; nobody minds a few kilobytes.
SWOLLEN, SAVES, FEW_BYTES = 2, 0.2, 1 << 16
# Read memory as it lies, whatever the layout of their input is.
STRIDED = frozenset({aten.as_strided.default, aten.view.dtype, aten.view_as_complex.default})


@dataclass(eq=False)
class Conv(Layer):
    """One convolution; `own` is its time in the model's layout, `chosen` the form that it would take channels last, with its time."""

    positions: int = 0
    own: float = 0.0
    chosen: str = LAST
    time: float = 0.0
    weighed: str = ""  # what was said of a packed weight that is many times larger than the layer's own

    def pick(self, timings: Mapping[str, Timing], margin: float) -> None:
        """Choose a form for channels last, and let go of the others."""
        times, bar = {name: timing.median for name, timing in timings.items()}, 1 - abs(margin)
        packed = [name for name in times if self.forms[name].kernel is not None]
        best = LAST
        # Packed where it takes the same time, as it brings x into this layout for whatever follows; and with all that it can compute besides.
        for name in [name for name in packed if not self._swells(name)]:
            best = best if times[best] < times[name] * bar else name
        large = min((name for name in packed if self._swells(name)), key=lambda name: times[name], default=None)
        if large is not None and times[large] < times[best]:
            pays, held = times[large] < times[best] * (1 - SAVES), self.forms[large].kernel.resident_bytes
            self.weighed = f"{large} holds {held:,} bytes for a weight of {self._bytes:,} and takes {times[large]:.3g} ms instead of " \
                f"{times[best]:.3g}: {'worth it' if pays else 'not worth it'}"
            best = large if pays else best
        self.chosen = best
        self.own, self.time = times[EAGER], times[self.chosen]
        self.forms = {self.chosen: self.forms[self.chosen]}
        self.runs.clear()

    @property
    def _bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def _swells(self, form: str) -> bool:
        held = self.forms[form].kernel.resident_bytes
        return bool(held > SWOLLEN * self._bytes and held - self._bytes > FEW_BYTES)

    def write(self, form: str, time: float, reason: str) -> None:
        """Note in the decision what runs."""
        row = self.decision
        row.rows, row.dense_form, row.dense_ms, row.kernel, row.compiled_ms = self.positions, form, time, form, time
        row.bytes = self._bytes
        say(row, f"{reason}; {self.weighed}" if self.weighed else reason)


def is_conv(node: fx.Node) -> bool:
    """A convolution with a stored weight over a batch."""
    weight = node.kwargs.get("weight")
    if node.target not in CONVOLUTIONS or not isinstance(weight, fx.Node) or weight.op != "get_attr" or "kernel" in node.meta:
        return False
    return bool(input_of(node).meta["val"].dim() == weight.meta["val"].dim())


def size_of(region: Region, node: fx.Node, ctx: Context) -> int:
    """Bytes that measuring this layer holds: its weight, and x and y in two layouts."""
    weight = node.kwargs["weight"]
    assert isinstance(weight, fx.Node)
    shapes = [example_shape(region, one, ctx.example_inputs) for one in (input_of(node), node, weight)]
    x, y, w = (torch.Size(shape).numel() for shape in shapes)
    return int((2 * x + y + w) * node.meta["val"].element_size())


def conv(region: Region, node: fx.Node, program: Program, ctx: Context, taken: set[fx.Node], packs: bool = True) -> Conv:
    """The layer at a node, its kernels packed and ready to run; without any where `packs` is False."""
    tensors, attributes, bias = operands(region, node)
    weight, x = tensors["weight"], _as_captured(noise(region, input_of(node), ctx), input_of(node))
    dense = fused(node, operator_of(node), {"weight": weight}, attributes, x.dtype, tuple(x.shape), ctx, taken) if packs else []
    y = noise(region, node, ctx)
    layer = Conv(region, node, row_of(region, node, "conv", weight, program), weight, bias, positions=y[:, 0].numel())
    layer.chain = dense[-1][0] if dense else layer.chain
    last, other, other_last = channels_last(x), _as_captured(y, node), channels_last(y)
    eager = partial(_eager, node.target, weight, bias, [attributes[name] for name in GEOMETRY])
    layer.add(EAGER, eager, x, other, Form())
    layer.add(LAST, eager, last, other_last, Form())
    for epilogue, candidate in dense:
        kernel = candidate.bind(bias)
        layer.add(candidate.name + epilogue.label, kernel, last, other_last, Form(True, kernel, epilogue))
    return layer


def choose(region: Region, layers: Sequence[Conv], ctx: Context, margin: float) -> None:
    """Run the region's convolutions channels last where that saves at least the margin's part of their time; write down why."""
    strided = next((node for node in region.graph.nodes if node.target in STRIDED), None)
    packed = [layer for layer in layers if layer.chosen != LAST]
    if not packed or strided is not None:
        why = "no packed form is faster, or there is none for this dtype, target and budget"
        if strided is not None:
            why = f"{strided.target} reads memory as it lies"
        for layer in layers:
            layer.write(EAGER, layer.own, f"stays dense: {why}")
        return
    before = flat_function(region)
    bound = {layer for layer in packed if ctx.spend()}
    for layer in bound:
        layer.bind(layer.chosen)
    exits = _contiguous_outputs(region)
    own, last = _times(region, before, layers, ctx)
    times = f"the whole takes {last:.3g} instead of {own:.3g} ms"
    if own - last >= margin * sum(layer.own for layer in layers):
        for layer in layers:
            layer.write(layer.chosen if layer in bound else LAST, layer.time, f"stays dense, channels last: {times}")
        return
    _undo(bound, exits)
    for layer in layers:
        layer.write(EAGER, layer.own, f"stays dense, in the model's own layout: channels last, {times}")


def channels_last(x: Tensor) -> Tensor:
    """x [N, C, ...] with its channels side by side in memory."""
    if x.dim() == 3:
        return x.unsqueeze(2).contiguous(memory_format=torch.channels_last).squeeze(2)
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def _as_captured(x: Tensor, node: fx.Node) -> Tensor:
    """x in the layout that the node's value had when the model was captured."""
    strides = [_hint(s) for s in node.meta["val"].stride()]
    return channels_last(x) if x.dim() > 2 and strides[1] == 1 and not _is_contiguous(node.meta["val"]) else x


def _is_contiguous(fake: Tensor) -> bool:
    """By the sizes seen at capture: asking a fake tensor would restrict its dynamic sizes."""
    sizes, strides = ([_hint(n) for n in numbers] for numbers in (fake.shape, fake.stride()))
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size is None or stride is None:
            return True  # depends on the data: nobody can know before
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _hint(size: Any) -> int | None:
    return size if isinstance(size, int) else size.node.hint if size.node.has_hint() else None


def _eager(target: Any, weight: Tensor, bias: Tensor | None, geometry: Sequence[Any], x: Tensor) -> Tensor:
    y: Tensor = target(x, weight, bias, *geometry)
    return y


def _contiguous_outputs(region: Region) -> list[fx.Node]:
    """The model gave these outputs contiguous: give them so again. Returns the new nodes."""
    output = next(node for node in reversed(region.graph.nodes) if node.op == "output")
    made: dict[fx.Node, fx.Node] = {}
    for node in output.all_input_nodes:
        fake = node.meta.get("val")
        if node.op == "call_function" and isinstance(fake, Tensor) and fake.dim() > 2 and _is_contiguous(fake):
            with region.graph.inserting_before(output):
                made[node] = region.graph.call_function(aten.contiguous.default, (), {"self": node})
            made[node].meta = {**{key: node.meta[key] for key in ("path", "module", "val") if key in node.meta}, "by": "lower"}
            output.replace_input_with(node, made[node])
    return list(made.values())


def _undo(layers: Iterable[Conv], exits: Sequence[fx.Node]) -> None:
    """Take the kernels off again, and the nodes at the outputs."""
    for layer in layers:
        layer.node.meta.pop("kernel", None)
        layer.node.meta.pop(META, None)
    for node in exits:
        given = node.kwargs["self"]
        assert isinstance(given, fx.Node)
        node.replace_all_uses_with(given)
        node.graph.erase_node(node)


def _times(region: Region, before: Any, layers: Sequence[Conv], ctx: Context) -> tuple[float, float]:
    """Milliseconds of the region before and after; sums over its convolutions where nobody knows inputs to run it on."""
    inputs = _inputs(region, ctx)
    if inputs is None:
        return sum(layer.own for layer in layers), sum(layer.time for layer in layers)
    after = flat_function(region)
    timings = interleave({EAGER: lambda: before(*inputs), LAST: lambda: after(*inputs)})
    return timings[EAGER].median, timings[LAST].median


def _inputs(region: Region, ctx: Context) -> Sequence[Tensor] | None:
    """The example inputs; for a region inside of the model noise of the captured shapes, and None where an input is no floating point tensor."""
    if region.path == "" and ctx.example_inputs is not None:
        return flatten_call(region.spec, *call_arguments(ctx.example_inputs))
    places = [node for node in region.graph.nodes if node.op == "placeholder"]
    if not all(isinstance(node.meta.get("val"), Tensor) and node.meta["val"].is_floating_point() for node in places):
        return None
    return [_as_captured(noise(region, node, ctx), node) for node in places]
