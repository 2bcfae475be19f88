"""Convolutions, masked and packed or dense: the forms that each can run in, in each layout of the images that go through the network.

A packed dense convolution gives y channels last, as does a sparse 1×1 one in bfloat16; a sparse one in float32 reads and writes planes. Which layout
a region takes is chosen for all of its convolutions together (_layout.py); here each finds its best form in every layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.measure import Timing
from sparsify_compiler.operands import CONVOLUTIONS, DENSE, GEOMETRY, input_of, operands, operator_of, packed_operator, packed_weight
from sparsify_compiler.passes.lower._layer import EAGER, NOTHING, Form, Layer, Source, bound, fused, noise, row_of, say
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region
from sparsify_compiler.shapes import example_shape

aten = torch.ops.aten
LAST, PLANES = "channels last", "planes"  # layouts that kernels want: channels side by side in memory, or pixels
TORCH = {LAST: f"{EAGER}, {LAST}", PLANES: f"{EAGER}, {PLANES}"}  # torch's own convolution in each
# A packed weight that is more than so many times its own bytes (oneDNN pads groups of few channels to blocks of 16) has to save so much of the
# layer's time to be worth its room; nobody minds a few kilobytes.
SWOLLEN, SAVES, FEW_BYTES = 2, 0.2, 1 << 16


@dataclass(eq=False)
class Conv(Layer):
    """One convolution; `own` is its time in the model's layout by torch, `picks` and `times` its best form in each layout, and that one's time."""

    positions: int = 0
    own: float = 0.0
    layouts: dict[str, str] = field(default_factory=dict)  # form -> its layout
    picks: dict[str, str] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    dense_form: str = EAGER  # the fastest one
    dense_ms: float = 0.0
    sparse_ms: float | None = None
    weighed: str = ""  # what was said of a packed weight that is many times larger than the layer's own

    def pick(self, timings: Mapping[str, Timing], margin: float, prefer: str) -> None:
        """Choose a form for each layout, and let go of the others.

        A kernel is taken where it needs the same time as torch's operator, as it brings x into this layout for whatever follows, and computes what
        follows it; where bytes count, a sparse one is taken even where it is slower.
        """
        times, bar = {name: timing.median for name, timing in timings.items()}, 1 - abs(margin)
        for layout, best in TORCH.items():
            if best not in times:
                continue
            made = [name for name in times if self.layouts[name] == layout]
            for name in [name for name in made if not self._swells(name)]:
                kept_for_bytes = prefer == "bytes" and not self.forms[name].dense and self.forms[best].dense
                best = name if kept_for_bytes or times[best] >= times[name] * bar else best
            large = min((name for name in made if self._swells(name)), key=lambda name: times[name], default=None)
            best = self._weigh(large, best, times) if large is not None and times[large] < times[best] else best
            self.picks[layout], self.times[layout] = best, times[best]
        dense = {name: time for name, time in times.items() if self.forms[name].dense}
        self.dense_form = min(dense, key=lambda name: dense[name])
        self.own, self.dense_ms = times[EAGER], dense[self.dense_form]
        self.sparse_ms = min((time for name, time in times.items() if not self.forms[name].dense), default=None)
        self.forms = {name: self.forms[name] for name in (EAGER, *self.picks.values())}
        self.runs.clear()

    @property
    def _bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def _swells(self, form: str) -> bool:
        held = self.forms[form].kernel.resident_bytes
        return bool(held > SWOLLEN * self._bytes and held - self._bytes > FEW_BYTES)

    def _weigh(self, large: str, best: str, times: Mapping[str, float]) -> str:
        """A faster form whose weight is many times larger than the layer's own, or the best of the others."""
        pays, held = times[large] < times[best] * (1 - SAVES), self.forms[large].kernel.resident_bytes
        self.weighed = f"{large} holds {held:,} bytes for a weight of {self._bytes:,} and takes {times[large]:.3g} ms instead of " \
            f"{times[best]:.3g}: {'worth it' if pays else 'not worth it'}"
        return large if pays else best

    @property
    def by_torch(self) -> tuple[str, ...]:
        """Forms that are torch's own operator: for a packed layer they are kernels too, until it is made dense."""
        return (EAGER, *TORCH.values())

    def kernel_in(self, layout: str) -> bool:
        """Is its best form in this layout one of the kernel room's?"""
        return self.picks.get(layout, EAGER) not in self.by_torch

    def is_sparse_in(self, layout: str) -> bool:
        """Is its best form in this layout sparse?"""
        return not self.forms[self.picks.get(layout, EAGER)].dense

    def time_of(self, form: str) -> float:
        """Milliseconds of a form that was picked."""
        return next(self.times[layout] for layout, name in self.picks.items() if name == form)

    def write(self, form: str, time: float, where: str) -> None:
        """Note in the decision what runs, and why; `where` tells of the region's layout."""
        row, made = self.decision, self.forms[form]
        row.rows, row.kernel, row.compiled_ms, row.sparse_ms = self.positions, form, time, self.sparse_ms
        if not made.dense:
            row.dense_form, row.dense_ms, row.bytes = self.dense_form, self.dense_ms, made.kernel.resident_bytes
            say(row, f"{self.dense_ms / time:.2f} times the speed of {self.dense_form}, {where}")
            return
        row.dense_form, row.dense_ms, row.format = form, time, "dense"
        row.bytes = self._bytes
        where = f"{where}; {self.weighed}" if self.weighed else where
        if self.packed:
            gain = None if self.sparse_ms is None else self.dense_ms / self.sparse_ms
            why = "no kernel for this op, dtype and target" if gain is None else f"the best sparse kernel has {gain:.2f} times the dense speed"
            say(row, f"stays dense: {why}; {where}")
        elif where.startswith((LAST, PLANES, "in ")):
            say(row, f"stays dense, {where}")
        else:
            say(row, f"stays dense: {where}")


def is_conv(node: fx.Node) -> bool:
    """A convolution with a stored weight, dense or packed, over a batch, which has no kernel yet."""
    if "kernel" in node.meta:
        return False
    if packed_operator(node) == "conv2d":
        return True
    weight = node.kwargs.get("weight")
    if node.target not in CONVOLUTIONS or not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return False
    return bool(input_of(node).meta["val"].dim() == weight.meta["val"].dim())


def size_of(region: Region, node: fx.Node, ctx: Context) -> int:
    """Bytes that measuring this layer holds: its weight, and x and y in two layouts."""
    shapes = [example_shape(region, one, ctx.example_inputs) for one in (input_of(node), node)]
    x, y = (torch.Size(shape).numel() for shape in shapes)
    tensors, attributes, _ = operands(region, node)
    weight = attributes["out_features"] * attributes["in_features"] if packed_operator(node) else tensors["weight"].numel()
    return int((2 * x + y + weight) * node.meta["val"].element_size())


def conv(region: Region, node: fx.Node, program: Program, ctx: Context, taken: set[fx.Node], packs: bool = True, planes: bool = False) -> Conv:
    """The layer at a node, its kernels packed and ready to run.

    packs   whether kernels may hold a dense weight a second time
    planes  whether kernels over planes are wanted, for some convolution of the region is sparse
    """
    tensors, attributes, bias = operands(region, node)
    packed = bool(packed_operator(node))
    weight = packed_weight(region, node) if packed else tensors["weight"]
    x = as_captured(noise(region, input_of(node), ctx), input_of(node))
    geometry = {name: attributes[name] for name in GEOMETRY}
    sources: list[Source] = [(operator_of(node), tensors, attributes)] if packed else []
    if packs:
        operator = "conv2d" if packed else operator_of(node)
        sources += [(operator, {"weight": weight}, geometry | layout) for layout in ([{}, {"layout": PLANES}] if planes else [{}])]
    found = fused(node, sources, x.dtype, tuple(x.shape), ctx, taken)
    most = max((len(epilogue.nodes) for epilogue, made in found if layout_of(made) == PLANES), default=0)
    found = [(epilogue, made) for epilogue, made in found if layout_of(made) == LAST or len(epilogue.nodes) == most]  # it costs nothing there
    y = noise(region, node, ctx)
    chain = max((epilogue for epilogue, _ in found), key=lambda epilogue: len(epilogue.nodes), default=NOTHING)
    layer = Conv(region, node, row_of(region, node, "conv", weight, program), weight, bias, packed, chain, positions=y[:, 0].numel())
    target = DENSE["conv2d"] if packed else node.target
    eager = partial(_eager, target, weight, bias, list(geometry.values()))
    form = Form(True, eager) if packed else Form()
    inputs = {LAST: (channels_last(x), channels_last(y)), PLANES: (x.contiguous(), y.contiguous())}
    layer.add(EAGER, eager, x, as_captured(y, node), form)
    layer.layouts[EAGER] = ""
    for layout in (LAST, PLANES) if planes else (LAST,):
        layer.add(TORCH[layout], eager, *inputs[layout], form)
        layer.layouts[TORCH[layout]] = ""
    for epilogue, candidate in found:
        kernel, name = bound(candidate, bias, ctx), candidate.name + epilogue.label
        layer.layouts[name] = layout_of(candidate)
        layer.add(name, kernel, *inputs[layer.layouts[name]], Form("weight" in candidate.tensors, kernel, epilogue))
    return layer


def layout_of(candidate: Any) -> str:
    """The layout that a kernel of the kernel room reads and writes."""
    return str(candidate.options.get("layout", LAST))


def channels_last(x: Tensor) -> Tensor:
    """x [N, C, ...] with its channels side by side in memory."""
    if x.dim() == 3:
        return x.unsqueeze(2).contiguous(memory_format=torch.channels_last).squeeze(2)
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def as_captured(x: Tensor, node: fx.Node) -> Tensor:
    """x in the layout that the node's value had when the model was captured."""
    strides = [_hint(s) for s in node.meta["val"].stride()]
    return channels_last(x) if x.dim() > 2 and strides[1] == 1 and not is_contiguous(node.meta["val"]) else x


def is_contiguous(fake: Tensor) -> bool:
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
