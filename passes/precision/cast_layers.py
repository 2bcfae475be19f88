"""Compute layers in another dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import ParseError
from sparsify_compiler.fold import put
from sparsify_compiler.normal_form_edit import insert, is_call
from sparsify_compiler.operands import input_of
from sparsify_compiler.passes.prune._layers import DEFAULT, Layer, Use, find_layers
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, get_tensor
from sparsify_compiler.work import Work

aten = torch.ops.aten
DTYPES: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class CastLayers(Pass):
    """Store and compute linear layers in another dtype; their inputs are cast on the way in, and their outputs back.

    Matches    linear(x, weight, bias), weight and bias parameters of another floating-point dtype
    Rewrites   linear(x.to(dtype), weight.to(dtype), bias.to(dtype)).to(x.dtype); layers that read the same value share its cast
    Preserves  signature; quality is measured
    Paper      Mixed Precision Training, Micikevicius et al., arXiv:1710.03740: which layers is left to the planner

    dtype    "bfloat16", "float16" or "float32"
    targets  selectors of sites, as in mask_weights
    ignore   selectors of sites that stay as they are
    density  1: nothing is cut
    """

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    targets: tuple[str, ...] = DEFAULT
    ignore: tuple[str, ...] = ()
    density: float | None = None

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE

    def __post_init__(self) -> None:
        self.take_selectors("targets", "ignore")
        if self.dtype not in DTYPES:
            raise ParseError(f"dtype is one of {', '.join(DTYPES)}, not {self.dtype!r}", where="cast_layers")
        if self.density not in (None, 1.0):
            raise ParseError("nothing is cut: the density is 1", where="cast_layers", hint="mask_weights cuts")

    def own_density(self) -> float | None:
        return 1.0

    def work(self, shape: tuple[int, int], rows: int, density: float, dtype: str, between: int) -> tuple[Work, ...]:
        cast = [Work.make("elementwise", dtype, between, taps=1, read=size, written=size) for size in (rows * shape[1], rows * shape[0])]
        return (Work.of(shape, rows, dtype=self.dtype, between=between), *cast)

    def run(self, program: Program, ctx: Context) -> Program:
        layers, left = find_layers(program, self.targets, self.ignore)
        for one in left:
            if one.chosen:
                ctx.miss(one.reason, one.use.site.path)
        for layer in layers:
            if layer.weight.dtype == DTYPES[self.dtype]:
                ctx.miss(f"it is {self.dtype} already", layer.path)
            elif all(is_call(use.op, aten.linear.default) for use in layer.uses) and ctx.spend():
                weight = nn.Parameter(layer.weight.detach().to(DTYPES[self.dtype]), requires_grad=layer.weight.requires_grad)
                for use in layer.uses:
                    self._cast(layer, use, weight, program)
        return program

    def _cast(self, layer: Layer, use: Use, weight: Tensor, program: Program) -> None:
        first = use is layer.uses[0]
        region, op, source = use.region, use.op, input_of(use.op)
        before: torch.dtype = op.meta["val"].dtype
        stored = {"weight": weight}
        bias = op.kwargs.get("bias")
        if isinstance(bias, fx.Node) and bias.op == "get_attr":
            stored["bias"] = get_tensor(region.module, str(bias.target)).detach().to(weight.dtype)
        put_in = {name: put(region, op, tensor, name, [_leaf(op, name)], op.meta, self.name()) for name, tensor in stored.items()}
        op.kwargs = {**op.kwargs, **put_in, "input": self._read(source, weight.dtype, op)}
        op.meta["val"], op.meta["site"] = op.meta["val"].to(weight.dtype), use.site.path
        with region.graph.inserting_after(op):
            back = region.graph.call_function(aten.to.dtype, (), {"self": op, "dtype": before})
        back.meta = {key: op.meta[key] for key in ("path", "module") if key in op.meta} | {"by": self.name(), "val": op.meta["val"].to(before)}
        op.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
        program.decisions[use.site.path] = row = Decision.of(use.site.path, use.site.kind, weight)
        if not first:
            row.dense_bytes, row.reason = None, f"shares the weight of {layer.path}"

    def _read(self, source: fx.Node, dtype: torch.dtype, op: fx.Node) -> fx.Node:
        """The cast of what the op reads, made once for all of its readers."""
        mine = [user for user in source.users if is_call(user, aten.to.dtype) and user.meta.get("by") == self.name()]
        known = next((user for user in mine if user.kwargs["dtype"] == dtype), None)
        if known is not None:
            return known
        first = min(source.users, key=list(op.graph.nodes).index)
        made = insert(first, aten.to.dtype, source.meta["val"].to(dtype), self=source, dtype=dtype)
        made.meta["by"] = self.name()
        return made


def _leaf(op: fx.Node, name: str) -> fx.Node:
    node = op.kwargs[name]
    assert isinstance(node, fx.Node)
    return node


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).eval(), (torch.randn(64, 32),)
