"""Linear layers of which every row selects its inputs: packed input by input, and lowered to a kernel that reads the selected weights only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.fakes import fake_like, mode_of
from sparsify_compiler.measure import Timing
from sparsify_compiler.normal_form_edit import insert, take_place
from sparsify_compiler.operands import operands
from sparsify_compiler.ops import select, select_linear
from sparsify_compiler.pages import resident
from sparsify_compiler.passes.lower._layer import EAGER, Form, Source, bound, fused, row_of, rows_of, say, usable
from sparsify_compiler.passes.lower._linear import Linear, eager
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, get_tensor, set_tensor

aten = torch.ops.aten
BY_INPUT = "_by_input"


def reads_selection(node: fx.Node) -> bool:
    """A linear layer that reads selected inputs, with a stored weight."""
    source, weight = node.kwargs.get("input"), node.kwargs.get("weight")
    selects = isinstance(source, fx.Node) and source.target is select.op
    return selects and node.target is aten.linear.default and isinstance(weight, fx.Node) and weight.op == "get_attr"


def is_selecting(node: fx.Node) -> bool:
    """One whose inputs are selected by what they are themselves."""
    return reads_selection(node) and node.kwargs["input"].kwargs.get("scores") is None  # type: ignore[union-attr]


def is_packed(node: fx.Node) -> bool:
    """A layer that `pack` has packed, and that has no kernel yet."""
    return node.target is select_linear.op and "kernel" not in node.meta


def pack(region: Region, node: fx.Node, program: Program, by: str) -> None:
    """linear(select(x, ...), weight [N, K], bias) -> select_linear(x, ..., weight [K, N], bias)."""
    source: Any = node.kwargs["input"]
    given = {key: source.kwargs[key] for key in ("limit", "scale", "center") if source.kwargs.get(key) is not None}
    pack_as(region, node, source.kwargs["x"], given, program, by)


def pack_as(region: Region, node: fx.Node, x: Any, given: Mapping[str, Any], program: Program, by: str) -> None:
    """The linear at a node -> select_linear(x, ..., weight [K, N], bias)."""
    dense = get_tensor(region.module, str(node.kwargs["weight"].target)).detach()  # type: ignore[union-attr]
    optional = node.kwargs["input"].meta.get("optional", False)  # type: ignore[union-attr]
    bias = {"bias": node.kwargs["bias"]} if node.kwargs.get("bias") is not None else {}
    stored = by_input(region, node, by)
    with region.graph.inserting_before(node):
        packed = region.graph.call_function(select_linear.op, (), {"x": x, "weight": stored, **given, **bias})
    take_place(node, packed, by, optional=optional)
    row_of(region, packed, "linear", dense, program).format = "by input"


def by_input(region: Region, node: fx.Node, by: str) -> fx.Node:
    """A linear's weight [N, K] stored as [K, N]; the get_attr of it, in front of the linear."""
    weight: Any = node.kwargs["weight"]
    name = f"{weight.target}{BY_INPUT}"
    if not any(other.op == "get_attr" and other.target == name for other in region.graph.nodes):
        set_tensor(region.module, name, resident(get_tensor(region.module, str(weight.target)).detach().t()))
    with region.graph.inserting_before(node):
        stored = region.graph.get_attr(name)
    place: dict[str, Any] = {key: node.meta[key] for key in ("path", "module") if key in node.meta}
    stored.meta = {"by": by, "val": fake_like(get_tensor(region.module, name), mode_of(region)), **place}
    return stored


def dense_weight(region: Region, before: fx.Node, stored: Any, weight: Tensor) -> fx.Node:
    """The inverse of by_input: the weight [N, K] under the name that it had; the get_attr of it, in front of a node."""
    name, dense = str(stored.target).removesuffix(BY_INPUT), weight.contiguous()
    set_tensor(region.module, name, torch.nn.Parameter(dense, requires_grad=False))
    with region.graph.inserting_before(before):
        found = region.graph.get_attr(name)
    found.meta = {"val": fake_like(dense, mode_of(region)), "by": "lower"}
    return found


def size_of(region: Region, node: fx.Node) -> int:
    """Bytes of the weight."""
    weight = node.kwargs["weight"].meta["val"]  # type: ignore[union-attr]
    return int(weight.numel() * weight.element_size())


def layer(region: Region, node: fx.Node, program: Program, ctx: Context, behind: Callable[..., Tensor] | None = None) -> Linear:
    """The layer at a node, its kernels built and ready to run on as many selected inputs as calibration found.

    behind  called with a kernel that selects, and with x: what has to be done before it
    """
    assert ctx.kernels is not None
    assert ctx.target is not None
    tensors, _, bias = operands(region, node)
    weight = tensors["weight"].t()
    x = rows_of(region, node, ctx)
    row = row_of(region, node, "linear", weight, program)
    layer = Linear(region, node, row, weight, bias, packed=True, rows=x.shape[0])
    x, limit = _as_dense_as(row.density, x, tensors)
    sources: list[Source] = [("linear", {"weight": weight}, {"any_rows": True})]
    dense = [(epilogue, one) for epilogue, one in fused(node, sources, x.dtype, (layer.rows,), ctx, set()) if not epilogue.nodes]
    layer.add(EAGER, partial(eager, weight, bias), x, None, Form())
    for epilogue, candidate in dense:
        kernel = bound(candidate, bias, ctx)
        layer.add(candidate.name, kernel, x, None, Form(True, kernel, epilogue))
    dynamic = () if "limit" in tensors else (limit,)
    for candidate in usable(ctx.kernels.candidates("select_linear", tensors, {}, x.dtype, (layer.rows,), ctx.target), ctx):
        kernel = bound(candidate, bias, ctx)
        called = partial(_call, kernel, dynamic)
        layer.add(candidate.name, called if behind is None else partial(behind, called), x, None, Form(False, kernel))
    return layer


def choose(layer: Linear, timings: Mapping[str, Timing], margin: float) -> bool:
    """Bind the kernel where it pays, and write down why; False where all inputs are to be read: skipping some would gain nothing."""
    times = {name: timing.median for name, timing in timings.items()}
    sparse = {name: time for name, time in times.items() if not layer.forms[name].dense}
    dense = {name: time for name, time in times.items() if layer.forms[name].dense}
    yardstick, best = min(dense, key=lambda name: dense[name]), min(sparse, key=lambda name: sparse[name], default=None)
    row = layer.decision
    row.rows, row.dense_form, row.dense_ms = layer.rows, yardstick, dense[yardstick]
    row.sparse_ms = sparse[best] if best is not None else None
    if best is not None and sparse[best] <= dense[yardstick] * (1 - margin):
        layer.bind(best)
        row.kernel, row.compiled_ms, row.bytes = best, sparse[best], layer.forms[best].kernel.resident_bytes
        what = row.structure.partition(" ")[0]
        say(row, f"{dense[yardstick] / sparse[best]:.2f} times the speed of {yardstick}, {row.density:.0%} of its {what} selected")
        return True
    row.format, row.density = "dense", 1.0
    gain = "no kernel for this dtype and target" if best is None else f"the kernel has {dense[yardstick] / sparse[best]:.2f} times the dense speed"
    say(row, f"reads everything: {gain}")
    return False


def make_dense(layer: Linear, x: Any = None) -> list[fx.Node]:
    """select_linear -> linear of all inputs, or of those that the model itself selects, or of what is given. Returns it."""
    region, node = layer.region, layer.node
    x = as_selected(node, node.kwargs["x"]) if x is None else x
    weight = dense_weight(region, node, node.kwargs["weight"], layer.weight)
    bias = {"bias": node.kwargs["bias"]} if node.kwargs.get("bias") is not None else {}
    with region.graph.inserting_before(node):
        layer.node = region.graph.call_function(aten.linear.default, (), {"input": x, "weight": weight, **bias})
    take_place(node, layer.node, "lower")
    return [layer.node]


def as_selected(node: fx.Node, x: Any) -> Any:
    """x, or select(x) as a packed node has it, where that selection was the model's own and not made for speed."""
    if node.meta.get("optional"):
        return x
    given = {key: node.kwargs[key] for key in ("limit", "scale", "center", "scores") if node.kwargs.get(key) is not None}
    return insert(node, select.op, x=x, **given)


def limit_of(scores: Tensor, density: float) -> Tensor:
    """float32 []: what so many of the scores, all at least 0, reach: halfway to the next one, as rounding decides of one that is at the limit."""
    scores = scores.flatten().float()
    skipped = min(round((1 - density) * scores.numel()), scores.numel() - 1)
    last = scores.kthvalue(skipped + 1).values
    before = scores.kthvalue(skipped).values if skipped else torch.zeros_like(last)
    middle = (last + before) / 2
    return torch.where(middle > before, middle, last)   # between neighbouring floats there is none


def _call(kernel: Any, limits: tuple[Tensor, ...], x: Tensor) -> Tensor:
    y: Tensor = kernel(x, *limits)
    return y


def _as_dense_as(density: float, x: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """x with so many inputs, the same in every row, whose score reaches the limit, and that limit [rows, 1]."""
    width = x.shape[-1]
    scale = tensors.get("scale", torch.ones(width, dtype=torch.float32)).clamp_min(1e-30)
    limit = tensors.get("limit", torch.ones((), dtype=torch.float32))
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))[: max(1, round(density * width))]
    size = torch.zeros(width, dtype=torch.float32)
    size[order] = ((2 * limit.float()).clamp_min(1.0) / scale.float())[order].clamp_max(1e30)
    made = tensors.get("center", torch.zeros(width, dtype=torch.float32)).float() + size
    return made.to(x.dtype).expand(x.shape[0], width).contiguous(), limit.float().expand(x.shape[0], 1)
