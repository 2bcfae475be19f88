"""Bind packed ops to kernels where that was measured to pay; what does not pay goes back to its fastest dense form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from sparsify_compiler import catalog
from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import TargetError
from sparsify_compiler.measure import Timing, round_robin
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Region, Stage, get_tensor, prune_unused, set_tensor
from sparsify_compiler.shapes import example_shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Lower(Pass):
    """Choose a kernel for every packed op by measuring it against the dense form of the same layer.

    Matches    sparsify.linear_<format>(x, <format tensors>, bias)
    Rewrites   the same node bound to the fastest kernel, or linear(x, weight, bias) where no kernel is faster by `margin`
    Preserves  values, up to float reassociation
    Paper      none: measurement; the reason for it is "sparse, but not faster", the complaint that every earlier tool met

    margin  part of the dense time that a sparse kernel must save to be taken: below it, noise would decide
    rounds  how often each form is timed; all layers take turns in each round, so that caches are met as in the model
    """

    margin: float = 0.05
    rounds: int = 15

    preserves: ClassVar[Preserves] = Preserves.VALUES
    needs_stage: ClassVar[Stage] = Stage.TRACED
    until_stage: ClassVar[Stage] = Stage.PACKED
    gives_stage: ClassVar[Stage | None] = Stage.LOWERED

    def run(self, program: Program, ctx: Context) -> Program:
        if ctx.target is None or ctx.kernels is None:
            raise TargetError("there is no target to lower for", where=self.name(), hint="compile(..., target='cpu') gives one")
        packed = [_Packed.of(region, node, program, ctx) for region, node in program.nodes() if _is_packed(node)]
        forms = {layer.key: layer.forms(ctx) for layer in packed}
        timings = round_robin(forms, rounds=self.rounds) if packed else {}
        for done, layer in enumerate(packed):
            if not ctx.spend():
                break
            layer.choose(forms[layer.key], timings[layer.key], self.margin)
            ctx.progress("lower", done + 1, len(packed))
        for region in program.regions.values():
            prune_unused(region)
        return program


def _is_packed(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "namespace", "") == "sparsify" and "kernel" not in node.meta


@dataclass
class _Packed:
    """One packed op, and what is needed to run it in each of its forms."""

    region: Region
    node: fx.Node
    decision: Decision
    tensors: dict[str, Tensor]  # of the format, by name
    attributes: dict[str, int]
    bias: Tensor | None
    weight: Tensor  # the dense masked weight
    x: Tensor  # an input of the shape that the example inputs give

    @property
    def key(self) -> str:
        return f"{self.region.path}:{self.node.name}"

    @property
    def rows(self) -> int:
        return self.x.numel() // max(self.x.shape[-1], 1)

    @staticmethod
    def of(region: Region, node: fx.Node, program: Program, ctx: Context) -> _Packed:
        given = {k: get_tensor(region.module, str(v.target)) for k, v in node.kwargs.items() if isinstance(v, fx.Node) and k != "x"}
        bias = given.pop("bias", None)
        attributes = {k: v for k, v in node.kwargs.items() if isinstance(v, int)}
        encoded = catalog.get("format", _format_of(node)).from_tensors(given, attributes)
        source = node.kwargs["x"]
        assert isinstance(source, fx.Node)
        shape = example_shape(region, source, ctx.example_inputs)
        generator = torch.Generator().manual_seed(ctx.seed)
        x = torch.randn(shape, generator=generator).to(source.meta["val"].dtype)
        decision = program.decisions.get(node.meta.get("site", ""))
        if decision is None:
            decision = program.decisions.setdefault(region.qualified(node.name), Decision(region.qualified(node.name), "linear"))
        return _Packed(region, node, decision, given, attributes, bias, encoded.decode(), x)

    def forms(self, ctx: Context) -> dict[str, Callable[[], object]]:
        """Every way to run this layer, by name: the dense yardstick first, then each kernel candidate."""
        assert ctx.kernels is not None
        assert ctx.target is not None
        x, weight, bias = self.x, self.weight, self.bias
        forms: dict[str, Callable[[], object]] = {DENSE: _Dense(x, weight, bias)}
        op = str(self.node.target).split(".")[1]
        for candidate in ctx.kernels.candidates(op, self.tensors, self.attributes, x.dtype, (self.rows,), ctx.target):
            forms[candidate.name] = _Bound(candidate.bind(bias), x)
        return forms

    def choose(self, forms: Mapping[str, Any], timings: Mapping[str, Timing], margin: float) -> None:
        """Bind the fastest kernel to the node, or put the dense layer back; write down why."""
        dense, sparse = timings[DENSE].median, {name: t.median for name, t in timings.items() if name != DENSE}
        best = min(sparse, key=lambda name: sparse[name], default=None)
        row = self.decision
        row.rows, row.dense_form, row.dense_ms = self.rows, DENSE, dense
        row.sparse_ms = sparse[best] if best is not None else None
        if best is not None and sparse[best] <= dense * (1 - margin):
            self.node.meta["kernel"] = forms[best].kernel
            row.kernel, row.compiled_ms, row.bytes = best, sparse[best], forms[best].kernel.resident_bytes
            row.reason = f"{dense / sparse[best]:.2f} times the speed of {DENSE}"
            return
        row.kernel, row.compiled_ms, row.bytes, row.format = DENSE, dense, row.dense_bytes, "dense"
        row.reason = (f"stays dense: the best kernel ({best}) has {dense / sparse[best]:.2f} times the dense speed" if best is not None
                      else "stays dense: no kernel for this op, dtype and target")
        self.make_dense()

    def make_dense(self) -> None:
        """Replace the packed op by linear(x, weight, bias) with the masked weight."""
        region, node, graph = self.region, self.node, self.region.graph
        name = f"{_owner(node)}.weight"
        with graph.inserting_before(node):
            set_tensor(region.module, name, torch.nn.Parameter(self.weight, requires_grad=False))
            weight = graph.get_attr(name)
            weight.meta = {"val": node.meta["val"].new_empty(self.weight.shape), "by": "lower", "path": node.meta.get("path", "")}
            arguments = {"input": node.kwargs["x"], "weight": weight} | ({"bias": node.kwargs["bias"]} if node.kwargs.get("bias") is not None else {})
            dense = graph.call_function(aten.linear.default, (), arguments)
            dense.meta = {**node.meta, "by": "lower"}
        node.replace_all_uses_with(dense)
        graph.erase_node(node)


DENSE = "dense eager"


class _Dense:
    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.x, self.weight, self.bias = x, weight, bias

    def __call__(self) -> Tensor:
        return torch.nn.functional.linear(self.x, self.weight, self.bias)


class _Bound:
    def __init__(self, kernel: Any, x: Tensor) -> None:
        self.kernel, self.x = kernel, x

    def __call__(self) -> Any:
        return self.kernel(self.x)


def _format_of(node: fx.Node) -> str:
    return str(node.target).split(".")[1].removeprefix("linear_")


def _owner(node: fx.Node) -> str:
    """Where the packed weight lay, for example "encoder.layer.0.attention.self.query" of "....query.weight_packed.values"."""
    first = next(v for k, v in node.kwargs.items() if isinstance(v, fx.Node) and v.op == "get_attr" and k != "bias")
    return str(first.target).rpartition(".weight_packed.")[0] or f"{node.name}_dense"


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two linear layers; there is something to lower once they are masked and packed."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval(), (torch.randn(8, 64),)
