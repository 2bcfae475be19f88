"""Give linear layers more weights to choose from, for training them with as many as before."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.errors import ParseError
from sparsify_compiler.masked import masked_weight
from sparsify_compiler.normal_form_edit import aten, infer, insert
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Region, get_tensor
from sparsify_compiler.sites import chosen_sites
from sparsify_compiler.stored import beside, read_stored

SLACK = 1e-6            # 1 / 0.1 may be just below 10
EXPANDED = "part_of"  # node meta of the layers that stand for one: its path


@dataclass(frozen=True)
class ExpandLinears(Pass):
    """Put several linear layers in the place of one, for training from the start; mask_weights() then cuts them to the multiplications of the one.

    Matches    linear(x, w, b)
    Rewrites   parallel: linear(x, w, b) + linear(x, w1) + ...; factorized: linear(linear(x, reads), writes, b). New weights are as large as w's, in
               the mean square of what they make together at a density of 1 / growth
    Preserves  signature
    Paper      Sparse Parallel and Sparse Factorized of Sparse-IFT, arXiv:2303.11525

    form    "parallel", or "factorized"
    growth  how many times as many weights as before: 1 / density of the masks. In parallel as many whole layers as fit
    seed    of the new weights

    Between parallel layers nothing is left of the batch norms that each has in the paper's convolutional networks: their sum is one linear map.
    """

    form: Literal["parallel", "factorized"] = "parallel"
    growth: float = 2.0
    seed: int = 0
    targets: tuple[str, ...] = ("linear",)
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE

    def __post_init__(self) -> None:
        if self.form not in ("parallel", "factorized"):
            raise ParseError(f"form is 'parallel' or 'factorized', not {self.form!r}", where="expand_linears")
        if not self.growth >= 1:
            raise ParseError(f"growth is 1 or more, got {self.growth}", where="expand_linears")
        self.take_selectors("targets", "ignore")

    def run(self, program: Program, ctx: Context) -> Program:
        for site in chosen_sites(program, ("linear",), self.targets, self.ignore):
            region = program.regions[site.region]
            op = region.node(site.roles["op"])
            weight = op.kwargs["weight"]
            if not isinstance(weight, fx.Node) or weight.op != "get_attr" or masked_weight(region, op) is not None:
                ctx.miss("its weight has a mask, or is computed", site.path)
            elif EXPANDED in op.meta or len(weight.users) > 1:
                ctx.miss("it has been expanded, or shares its weight", site.path)
            elif ctx.spend():
                _EXPAND[self.form](self, region, op, weight)
        return program

    def _layer(self, region: Region, op: fx.Node, before: fx.Node, name: str, weight: Tensor, bias: fx.Node | None) -> fx.Node:
        """A new layer that reads what `op` reads, in front of a node, under a path of its own."""
        path, own = str(op.meta.get("path", op.name)), op.kwargs["weight"]
        assert isinstance(own, fx.Node)
        trained = get_tensor(region.module, str(own.target)).requires_grad
        source = read_stored(region, before, beside(str(own.target), name), self.name(), nn.Parameter(weight, trained))
        made = insert(before, aten.linear.default, op.meta["val"], input=op.kwargs["input"], weight=source, bias=bias)
        made.meta |= {"by": self.name(), "path": f"{path}.{name}", "module": op.meta.get("module"), EXPANDED: path}
        return made

    def _parallel(self, region: Region, op: fx.Node, weight: fx.Node) -> None:
        dense, total, after = get_tensor(region.module, str(weight.target)).detach(), op, op.next
        users = list(op.users)
        for branch in range(1, math.floor(self.growth + SLACK)):
            generator = self._generator(region, f"{weight.target} {branch}")
            drawn = torch.randint(dense.numel(), dense.shape, generator=generator).to(dense.device)
            made = self._layer(region, op, after, f"branch_{branch}", dense.flatten()[drawn], None)
            total = insert(after, aten.add.Tensor, op.meta["val"], self=total, other=made)
            total.meta = {"by": self.name(), "val": op.meta["val"]}
        op.meta[EXPANDED] = str(op.meta.get("path", op.name))
        for user in users:
            user.replace_input_with(op, total)

    def _factorized(self, region: Region, op: fx.Node, weight: fx.Node) -> None:
        dense, after = get_tensor(region.module, str(weight.target)).detach(), op.next
        outputs, inputs = dense.shape
        inner = max(1, int(self.growth * dense.numel() / (outputs + inputs)))
        generator = self._generator(region, str(weight.target))
        reads, writes = (torch.randn(shape, generator=generator, dtype=torch.float32) for shape in ((inner, inputs), (outputs, inner)))
        reads = reads * math.sqrt(self.growth / inputs)
        writes = writes * float(dense.float().square().mean().sqrt()) * math.sqrt(self.growth * inputs / inner)
        first = self._layer(region, op, after, "reads", reads.to(dense), None)
        last = self._layer(region, op, after, "writes", writes.to(dense), op.kwargs.get("bias"))  # type: ignore[arg-type]
        last.kwargs = {**last.kwargs, "input": first}
        first.meta["val"] = infer(first.target, dict(first.kwargs))
        op.replace_all_uses_with(last)
        region.graph.erase_node(op)

    def _generator(self, region: Region, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {region.qualified(name)}".encode()))


_EXPAND = {"parallel": ExpandLinears._parallel, "factorized": ExpandLinears._factorized}


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).eval(), (torch.randn(3, 16),)
