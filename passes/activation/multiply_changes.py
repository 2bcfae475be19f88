"""Let each layer multiply what has changed since the time step before, and add it up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.errors import ParseError
from sparsify_compiler.normal_form_edit import insert
from sparsify_compiler.ops import changes
from sparsify_compiler.passes.prune._layers import chosen_linears
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Region
from sparsify_compiler.sites import fitting_ops
from sparsify_compiler.splice import insert_formula

KIND = ("linear",)


@dataclass(frozen=True)
class MultiplyChanges(Pass):
    """Round what a layer reads, and multiply only by how much that differs from the time step before: what stays the same is an exact zero.

    Matches    linear(x, weight, bias), x [batch, time, inputs]
    Rewrites   cumsum(linear(sparsify.changes(x, step), weight), time) + bias
    Preserves  signature; with a step of 0 nothing is rounded, and it is the layer up to float reassociation
    Paper      Training for temporal sparsity in deep neural networks, Yousefzadeh and Sifalakis, arXiv:2107.07305

    step     what values are multiples of: a larger one makes more of them stay the same. Gradients pass it straight through
    targets  selectors of sites, as in mask_weights: "linear", "ffn", "attention", "ffn:down", paths and patterns; all linear layers by default
    ignore   selectors of sites that multiply all

    For streams whose steps resemble each other: frames, sound. penalise_activations(of="inputs") makes changes rarer in training, and
    select_inputs(selector="nonzero") then skips the weights of what did not change. A call holds the whole stream: none is kept from call to call.
    """

    step: float = 0.1
    targets: tuple[str, ...] = KIND
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE

    def __post_init__(self) -> None:
        if not 0 <= self.step < float("inf"):
            raise ParseError(f"step is a number of 0 or more, got {self.step}", where="multiply_changes")
        self.take_selectors("targets", "ignore")

    def run(self, program: Program, ctx: Context) -> Program:
        for _, region, op in fitting_ops(program, chosen_linears(program, self.targets, self.ignore), ctx, "linear layer", self._unfit):
            self._write(region, op)
        return program

    def _unfit(self, region: Region, op: fx.Node) -> str | None:
        source = op.kwargs["input"]
        assert isinstance(source, fx.Node)
        if source.target is changes.op:
            return "it multiplies changes already"
        return None if len(source.meta["val"].shape) == 3 else "its input is not [batch, time, inputs]"

    def _write(self, region: Region, op: fx.Node) -> None:
        source, bias, readers = op.kwargs["input"], op.kwargs.get("bias"), list(op.users)
        assert isinstance(source, fx.Node)
        changed = insert(op, changes.op, x=source, step=float(self.step))
        changed.meta |= {"by": self.name()}
        op.kwargs = {**op.kwargs, "input": changed, "bias": None}
        op.meta["by"] = self.name()
        parts = {"y": op} if bias is None else {"y": op, "bias": bias}
        total = insert_formula(region, op.next, summed, parts, self.name())  # type: ignore[arg-type]
        for reader in readers:
            reader.replace_input_with(op, total)


def summed(y: Tensor, bias: Tensor | None = None) -> Tensor:
    """[batch, time, outputs]: sums over the time so far, in float32 at least, and the bias."""
    total = y.cumsum(1, dtype=torch.promote_types(y.dtype, torch.float32)).to(y.dtype)
    return total if bias is None else total + bias


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two layers over two streams of 12 steps that change little."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval(), (torch.randn(2, 12, 8).cumsum(1) / 4,)
