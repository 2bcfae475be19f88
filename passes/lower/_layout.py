"""The layout in which the images go through a region: as the model has them, channels last, or planes; whichever makes the whole fastest.

What follows a convolution keeps its layout up to the next one. So it is not for one layer to choose: a layer that is faster in a layout of its own
costs the others a conversion. Forms of a layer are measured first (_conv.py), then the region as a whole in each layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.call import call_arguments, flatten_call
from sparsify_compiler.epilogue import META
from sparsify_compiler.executor import flat_function
from sparsify_compiler.far import is_far
from sparsify_compiler.measure import interleave
from sparsify_compiler.passes.lower._conv import LAST, PLANES, Conv, as_captured, is_contiguous
from sparsify_compiler.passes.lower._layer import EAGER, noise
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Region

aten = torch.ops.aten
# Read memory as it lies, whatever the layout of their input is.
STRIDED = frozenset({aten.as_strided.default, aten.view.dtype, aten.view_as_complex.default})
Run = Callable[..., Any]


def choose(region: Region, layers: Sequence[Conv], ctx: Context, margin: float, prefer: str) -> None:
    """Run the region's convolutions in the layout that saves most, if that is the margin's part of their time; write down why.

    Where bytes count, it is one in which a convolution is sparse, if there is any.
    """
    strided = next((node for node in region.graph.nodes if node.target in STRIDED), None)
    offered = [] if strided is not None else [layout for layout in (LAST, PLANES) if any(layer.kernel_in(layout) for layer in layers)]
    if not offered:
        why = f"{strided.target} reads memory as it lies" if strided is not None else (
            "no packed form is faster, or there is none for this dtype, target and budget")
        _settle(region, layers, dict.fromkeys(layers, EAGER), ctx, lambda layer: why)
        return
    times = _measure(region, layers, offered, ctx)
    best = min(offered, key=lambda layout: times[layout])
    said = [f"{layout}, the whole takes {times[layout]:.3g} instead of {times[EAGER]:.3g} ms" for layout in offered]
    sparse = [layout for layout in offered if any(layer.is_sparse_in(layout) for layer in layers)]
    best = min(sparse, key=lambda layout: times[layout]) if prefer == "bytes" and sparse else best
    pays = times[EAGER] - times[best] >= margin * sum(layer.own for layer in layers)
    if pays or (prefer == "bytes" and sparse):
        _settle(region, layers, {layer: layer.picks.get(best, EAGER) for layer in layers}, ctx,
                lambda layer: f"{best}: {said[offered.index(best)].partition(', ')[2]}")
        _outputs_as_captured(region, best)
        return
    _settle(region, layers, dict.fromkeys(layers, EAGER), ctx, lambda layer: f"in the model's own layout: {'; '.join(said)}")


def _settle(region: Region, layers: Sequence[Conv], forms: dict[Conv, str], ctx: Context, where: Callable[[Conv], str]) -> None:
    """Bind every layer to its form for good. A layer that runs torch's own operator needs no fuel; without fuel a packed one stays as it is."""
    for layer in layers:
        name = forms[layer]
        form = layer.forms[name]
        spent = form.kernel is None or ctx.spend()
        name = name if spent else EAGER
        time = layer.own if name == EAGER else layer.time_of(name)
        layer.write(name, time, where(layer))
        if not spent:
            continue
        if layer.packed and form.dense:
            layer.make_dense()
        if name not in layer.by_torch:
            layer.bind(name)


def _measure(region: Region, layers: Sequence[Conv], layouts: Sequence[str], ctx: Context) -> dict[str, float]:
    """Milliseconds of the region as it is (EAGER) and in each layout; sums over its convolutions where
    nobody knows inputs to run it on, or the machine is not here."""
    inputs = None if is_far(ctx.target) else _inputs(region, ctx)
    if inputs is None:
        return {EAGER: sum(layer.own for layer in layers)} | {
            layout: sum(layer.times.get(layout, layer.own) for layer in layers) for layout in layouts}
    runs: dict[str, Run] = {}
    for layout in (EAGER, *layouts):
        for layer in layers:
            layer.bind(layer.picks.get(layout, EAGER))
        made = [] if layout == EAGER else _outputs_as_captured(region, layout)
        runs[layout] = flat_function(region)
        _undo(layers, made)
    timings = interleave({layout: lambda run=run: run(*inputs) for layout, run in runs.items()})  # type: ignore[misc]
    return {layout: timing.median for layout, timing in timings.items()}


def _outputs_as_captured(region: Region, layout: str) -> list[fx.Node]:
    """The model gave these outputs in another layout: give them so again. Returns the new nodes."""
    output = next(node for node in reversed(region.graph.nodes) if node.op == "output")
    made: dict[fx.Node, fx.Node] = {}
    for node in output.all_input_nodes:
        fake = node.meta.get("val")
        if node.op != "call_function" or not isinstance(fake, Tensor) or fake.dim() < 3:
            continue
        contiguous = is_contiguous(fake)
        if layout == LAST and not contiguous:
            continue
        last = {} if contiguous else {"memory_format": torch.channels_last if fake.dim() == 4 else torch.channels_last_3d}
        with region.graph.inserting_before(output):
            made[node] = region.graph.call_function(aten.contiguous.default, (), {"self": node, **last})
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


def _inputs(region: Region, ctx: Context) -> Sequence[Tensor] | None:
    """The example inputs; for a region inside of the model noise of the captured shapes, and None where an input is no floating point tensor."""
    if region.path == "" and ctx.example_inputs is not None:
        return flatten_call(region.spec, *call_arguments(ctx.example_inputs))
    places = [node for node in region.graph.nodes if node.op == "placeholder"]
    if not all(isinstance(node.meta.get("val"), Tensor) and node.meta["val"].is_floating_point() for node in places):
        return None
    return [as_captured(noise(region, node, ctx), node) for node in places]
