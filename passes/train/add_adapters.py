"""Train small adapters in place of the weights."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import partial
from inspect import signature

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.errors import ParseError
from sparsify_compiler.fakes import fake_like, mode_of
from sparsify_compiler.named import Named
from sparsify_compiler.passes.prune._low_rank import MARK, add_low_rank
from sparsify_compiler.passes.train._frozen import freeze, weight_of
from sparsify_compiler.passes.train.adapters._base import factors
from sparsify_compiler.passes_api import Context, Pass
from sparsify_compiler.program import Program, Region, get_tensor, set_tensor
from sparsify_compiler.sites import chosen_sites
from sparsify_compiler.splice import insert_formula


@dataclass(frozen=True)
class AddAdapters(Pass):
    """Freeze a model, and give its linear layers adapters that train: inside of their masks, so that zeros stay, or beside them.

    Matches    linear(x, w, b) and linear(x, w * mask, b)
    Rewrites   linear(x, f(w, reads, writes), b) and linear(x, f(w, reads, writes) * mask, b), f the adapter; of one that stands beside its layer
               linear(x, w * mask, b) + linear(linear(x, scale * reads), writes). merge_adapters() makes weights of them again
    Preserves  values
    Paper      LoRA, arXiv:2106.09685; SPP, arXiv:2405.16057; SQFT, arXiv:2410.03750; DSEE, arXiv:2111.00160

    adapter   a file of passes/train/adapters with its options, "masked_low_rank(rank=8)"
    freeze    all other parameters of the graphs: False lets biases and norms train too, and weights that no adapter stands for
    seed      of the adapters' start
    """

    adapter: str = "masked_low_rank"
    freeze: bool = True
    seed: int = 0
    targets: tuple[str, ...] = ("linear",)
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self._rank < 1:
            raise ParseError(f"a rank is 1 or more, got {self._rank}", where=self.adapter)
        self.take_selectors("targets", "ignore")

    @property
    def _form(self) -> Named:
        return Named.parse("adapter", self.adapter)

    @property
    def _rank(self) -> int:
        form = self._form
        return int(form.options.get("rank", signature(form.function).parameters["rank"].default))

    def run(self, program: Program, ctx: Context) -> Program:
        made: dict[tuple[str, fx.Node], fx.Node] = {}
        trained: set[tuple[str, str]] = set()
        for site in chosen_sites(program, ("linear",), self.targets, self.ignore):
            region = program.regions[site.region]
            found = weight_of(region, site)
            if found is None or MARK in found[0].meta or _has_one(found[0]):
                ctx.miss("its weight has an adapter, or is computed", site.path)
            elif (site.region, found[1]) in made or ctx.spend():
                trained |= {(site.region, name) for name in self._adapt(region, *found, made)}
        if trained and self.freeze:
            freeze(program, trained)
        return program

    def _adapt(self, region: Region, op: fx.Node, weight: fx.Node, mask: str | None, made: dict[tuple[str, fx.Node], fx.Node]) -> tuple[str, ...]:
        """Put the adapter of a weight into the graph; the names of its parameters."""
        form, dense = self._form, get_tensor(region.module, str(weight.target))
        reads, writes = factors(dense.detach(), self._rank, zlib.crc32(f"{self.seed} {region.qualified(str(weight.target))}".encode()))
        owner = str(weight.target).rpartition(".")[0]
        if form.module.BESIDE:
            add_low_rank(region, op, weight, (float(form.options.get("scale", 1.0)) * reads, writes), by=self.name())
            names = tuple(f"{owner}.low_rank_{kind}".lstrip(".") for kind in ("reads", "writes"))
            for name in names:
                get_tensor(region.module, name).requires_grad_()
            return names
        place = made.get((region.path, weight))
        names = tuple(f"{weight.target}_{kind}" for kind in ("reads", "writes"))
        if place is None:
            product = op.kwargs["weight"] if mask is not None else None
            nodes = {kind: _parameter(region, name, tensor, weight, self.name())
                     for kind, name, tensor in zip(("reads", "writes"), names, (reads, writes), strict=True)}
            before = product if isinstance(product, fx.Node) else op
            place = insert_formula(region, before, partial(form.function, **form.options), {"weight": weight, **nodes}, self.name())
            made[region.path, weight] = place
            if isinstance(product, fx.Node):
                product.replace_input_with(weight, place)
        if mask is None:
            op.kwargs = {**op.kwargs, "weight": place}
        return names


def _has_one(op: fx.Node) -> bool:
    """Does an adapter stand beside it?"""
    return any(MARK in source.meta for user in op.users for source in user.all_input_nodes)


def _parameter(region: Region, name: str, tensor: Tensor, beside: fx.Node, by: str) -> fx.Node:
    set_tensor(region.module, name, nn.Parameter(tensor))
    with region.graph.inserting_after(beside):
        node = region.graph.get_attr(name)
    node.meta = {"by": by, "val": fake_like(tensor, mode_of(region))}
    return node


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).eval(), (torch.randn(3, 16),)
