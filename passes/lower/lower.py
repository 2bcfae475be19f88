"""Bind linear layers to kernels where that was measured to pay; what does not pay runs in its fastest dense form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from sparsify_compiler import catalog
from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import ParseError, TargetError
from sparsify_compiler.fakes import fake_like, mode_of
from sparsify_compiler.measure import Timing, round_robin
from sparsify_compiler.memory import give_back
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Region, Stage, get_tensor, set_tensor
from sparsify_compiler.shapes import example_shape

aten = torch.ops.aten
EAGER = "dense eager"
CHUNK = 1 << 26  # bytes of dense weights that are measured together: more than the caches hold, little beside a large model


@dataclass(frozen=True)
class Lower(Pass):
    """Choose how every linear layer runs, by measuring its kernels against the dense forms of the same layer.

    Matches    sparsify.linear_<format>(x, <format tensors>, bias), and linear(x, weight, bias) with a stored weight
    Rewrites   the same node bound to the fastest kernel; a packed node becomes linear(x, weight, bias) where no sparse kernel pays
    Preserves  values, up to float reassociation
    Paper      none: measurement; the reason for it is "sparse, but not faster", the complaint that every earlier tool met

    margin  part of the fastest dense time that a kernel must save to be taken: below it, noise would decide
    rounds  how often each form is timed; layers take turns in each round, so that caches are met as in the model
    prefer  "speed", or "bytes": a packed layer then keeps its fastest sparse kernel even where dense would be faster
    """

    margin: float = 0.05
    rounds: int = 15
    prefer: Literal["speed", "bytes"] = "speed"

    preserves: ClassVar[Preserves] = Preserves.VALUES
    needs_stage: ClassVar[Stage] = Stage.TRACED
    until_stage: ClassVar[Stage] = Stage.PACKED
    gives_stage: ClassVar[Stage | None] = Stage.LOWERED

    def __post_init__(self) -> None:
        if self.prefer not in ("speed", "bytes"):
            raise ParseError(f"prefer is 'speed' or 'bytes', not {self.prefer!r}", where="lower")

    def run(self, program: Program, ctx: Context) -> Program:
        if ctx.target is None or ctx.kernels is None:
            raise TargetError("there is no target to lower for", where=self.name(), hint="compile(..., target='cpu') gives one")
        found = [(region, node) for region, node in program.nodes() if _is_packed(node) or _is_dense(node)]
        ctx.progress("lower", 0, len(found))
        for chunk, done in _chunks(found):
            self._lower(chunk, program, ctx)
            give_back()
            ctx.progress("lower", done, len(found))
        return program

    def _lower(self, chunk: Iterable[tuple[Region, fx.Node]], program: Program, ctx: Context) -> None:
        """Measure some layers together. The forms that lose are freed on return, before the next layers are laid out."""
        layers = [_Layer.of(region, node, program, ctx) for region, node in chunk]
        timings = round_robin({layer.key: layer.forms for layer in layers}, rounds=self.rounds)
        for layer in layers:
            if ctx.spend():
                self._choose(layer, timings[layer.key])

    @staticmethod
    def _say(row: Decision, reason: str) -> None:
        """Add why; what an earlier pass said of the site stands."""
        row.reason = f"{row.reason}; {reason}" if row.reason else reason

    def _choose(self, layer: _Layer, timings: Mapping[str, Timing]) -> None:
        """Bind the fastest form to the node, and write down why."""
        dense = {name: timings[name].median for name in timings if name in layer.dense}
        sparse = {name: t.median for name, t in timings.items() if name not in layer.dense}
        yardstick = min(dense, key=lambda name: dense[name])
        if dense[yardstick] > dense[EAGER] * (1 - self.margin):
            yardstick = EAGER  # packing another copy of the weight has to pay too
        best = min(sparse, key=lambda name: sparse[name], default=None)
        gain = dense[yardstick] / sparse[best] if best is not None else 0.0
        row = layer.decision
        row.rows, row.dense_form, row.dense_ms = layer.rows, yardstick, dense[yardstick]
        row.sparse_ms = sparse[best] if best is not None else None
        if best is not None and (self.prefer == "bytes" or sparse[best] <= dense[yardstick] * (1 - self.margin)):
            layer.bind(best)
            row.kernel, row.compiled_ms, row.bytes = best, sparse[best], layer.kernels[best].resident_bytes
            self._say(row, f"{gain:.2f} times the speed of {yardstick}" + ("" if gain >= 1 else ", kept for its bytes"))
            return
        if layer.packed:
            why = f"the best kernel ({best}) has {gain:.2f} times the dense speed" if best is not None else "no kernel for this op, dtype and target"
            self._say(row, f"stays dense: {why}")
            layer.make_dense()
        layer.bind(yardstick)
        row.kernel, row.compiled_ms, row.format = yardstick, dense[yardstick], "dense"
        row.bytes = layer.weight.numel() * layer.weight.element_size()
        row.reason = row.reason or "stays dense: no pass changed it"


@dataclass
class _Layer:
    """One linear layer, and every form that it can run in."""

    region: Region
    node: fx.Node
    decision: Decision
    weight: Tensor  # dense, masked where it is masked
    bias: Tensor | None
    x: Tensor  # an input of the shape that the example inputs give
    packed: bool
    dense: set[str] = field(default_factory=lambda: {EAGER})  # names of the dense forms
    kernels: dict[str, Any] = field(default_factory=dict)
    forms: dict[str, Callable[[], object]] = field(default_factory=dict)  # the yardstick first

    @property
    def key(self) -> str:
        return f"{self.region.path}:{self.node.name}"

    @property
    def rows(self) -> int:
        return self.x.numel() // max(self.x.shape[-1], 1)

    @staticmethod
    def of(region: Region, node: fx.Node, program: Program, ctx: Context) -> _Layer:
        """The layer at a node, its kernels built and ready to run."""
        assert ctx.kernels is not None
        assert ctx.target is not None
        tensors = {k: get_tensor(region.module, str(v.target)) for k, v in node.kwargs.items() if isinstance(v, fx.Node) and v.op == "get_attr"}
        bias, op = tensors.pop("bias", None), str(node.target).split(".")[1]
        attributes = {k: v for k, v in node.kwargs.items() if isinstance(v, int)}
        packed = _is_packed(node)
        weight = catalog.get("format", op.removeprefix("linear_")).from_tensors(tensors, attributes).decode() if packed else tensors["weight"]
        layer = _Layer(region, node, _row(region, node, weight, program), weight, bias, _input(region, node, ctx), packed)
        layer.forms[EAGER] = partial(nn.functional.linear, layer.x, weight, bias)
        for candidate in ctx.kernels.candidates("linear", {"weight": weight}, {}, layer.x.dtype, (layer.rows,), ctx.target):
            layer.add(candidate)
            layer.dense.add(candidate.name)
        for candidate in ctx.kernels.candidates(op, tensors, attributes, layer.x.dtype, (layer.rows,), ctx.target) if packed else ():
            layer.add(candidate)
        return layer

    def add(self, candidate: Any) -> None:
        kernel = self.kernels[candidate.name] = candidate.bind(self.bias)
        self.forms[candidate.name] = partial(kernel, self.x)  # holds x, not the layer: a cycle would keep the weights until gc runs

    def bind(self, form: str) -> None:
        """Let the node run in this form."""
        if form in self.kernels:
            self.node.meta["kernel"] = self.kernels[form]

    def make_dense(self) -> None:
        """Replace the packed node by linear(x, weight, bias) with the masked weight."""
        region, node, graph = self.region, self.node, self.region.graph
        name = f"{_stored_under(node)}_masked"
        set_tensor(region.module, name, nn.Parameter(self.weight, requires_grad=False))
        with graph.inserting_before(node):
            weight = graph.get_attr(name)
            weight.meta = {"val": fake_like(self.weight, mode_of(region)), "by": "lower"} | _place(node)
            bias = {"bias": node.kwargs["bias"]} if node.kwargs.get("bias") is not None else {}
            self.node = graph.call_function(aten.linear.default, (), {"input": node.kwargs["x"], "weight": weight, **bias})
        self.node.meta = {**node.meta, "by": "lower"}
        node.replace_all_uses_with(self.node)
        graph.erase_node(node)


def _is_packed(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "namespace", "") == "sparsify" and "kernel" not in node.meta


def _is_dense(node: fx.Node) -> bool:
    weight = node.kwargs.get("weight")
    return node.target is aten.linear.default and isinstance(weight, fx.Node) and weight.op == "get_attr" and "kernel" not in node.meta


def _chunks(found: Iterable[tuple[Region, fx.Node]]) -> Iterator[tuple[list[tuple[Region, fx.Node]], int]]:
    """The layers in groups of about CHUNK bytes of dense weights, and how many layers are done after each."""
    chunk: list[tuple[Region, fx.Node]] = []
    size = done = 0
    for region, node in found:
        x, y = node.kwargs.get("x", node.kwargs.get("input")), node.meta["val"]
        assert isinstance(x, fx.Node)
        chunk.append((region, node))
        size, done = size + int(x.meta["val"].shape[-1]) * int(y.shape[-1]) * y.element_size(), done + 1
        if size >= CHUNK:
            yield chunk, done
            chunk, size = [], 0
    if chunk:
        yield chunk, done


def _row(region: Region, node: fx.Node, weight: Tensor, program: Program) -> Decision:
    site = str(node.meta.get("site") or node.meta.get("path") or region.qualified(node.name))
    size = weight.numel() * weight.element_size()
    fresh = Decision(site, "linear", tuple(weight.shape), str(weight.dtype).removeprefix("torch."), dense_bytes=size)
    return program.decisions.setdefault(site, fresh)


def _input(region: Region, node: fx.Node, ctx: Context) -> Tensor:
    """Noise of the shape and dtype that the layer's input has on the example inputs."""
    source = node.kwargs.get("x", node.kwargs.get("input"))
    assert isinstance(source, fx.Node)
    generator = torch.Generator().manual_seed(ctx.seed)
    return torch.randn(example_shape(region, source, ctx.example_inputs), generator=generator).to(source.meta["val"].dtype)


def _stored_under(node: fx.Node) -> str:
    """The weight's name, of a packed node: "encoder.query.weight" of "encoder.query.weight_packed.values"."""
    first = next(v for k, v in node.kwargs.items() if isinstance(v, fx.Node) and v.op == "get_attr" and k != "bias")
    return str(first.target).rpartition("_packed.")[0]


def _place(node: fx.Node) -> dict[str, Any]:
    return {key: node.meta[key] for key in ("path", "module") if key in node.meta}


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two linear layers; there is something to lower once they are masked and packed."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval(), (torch.randn(8, 64),)
