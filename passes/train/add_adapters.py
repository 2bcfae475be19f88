"""Train small adapters in place of the weights."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.errors import SelectorError, StructureError, nearest
from sparsify_compiler.named import Named
from sparsify_compiler.normal_form_edit import aten, insert
from sparsify_compiler.passes.prune._layers import chosen_linears
from sparsify_compiler.passes.prune._low_rank import MARK
from sparsify_compiler.passes.train._frozen import freeze, weight_of
from sparsify_compiler.passes.train.adapters._base import Adapter
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Region, get_tensor, set_tensor
from sparsify_compiler.splice import insert_formula
from sparsify_compiler.stored import beside, read_stored, reads

ADAPTER = "adapter_of"  # node meta of what stands beside or behind a layer: the layer's path


@dataclass(frozen=True)
class AddAdapters(Pass):
    """Freeze a model, and give its linear layers adapters that train: inside of their masks, so that zeros stay, beside or behind them.

    Matches    linear(x, w, b) and linear(x, w * mask, b)
    Rewrites   linear(x, f(w), b) and linear(x, f(w) * mask, b), f the adapter; of one beside its layer linear(x, w * mask, b) + f(x), of one behind
               it y + f(y), y = linear(x, w * mask, b). merge_adapters() makes weights of them again, where they are linear
    Preserves  values; signature, where the adapter stands for something from the start on (bottleneck, group_sums)
    Paper      LoRA, arXiv:2106.09685; SPP, arXiv:2405.16057; SQFT, arXiv:2410.03750; DSEE, arXiv:2111.00160;
               SparseAdapter, arXiv:2210.04284; LLaVA-MoLE, arXiv:2401.16160; SMoRA, arXiv:2501.15103

    adapter   a file of passes/train/adapters with its options, "masked_low_rank(rank=8)"
    freeze    all other parameters of the graphs: False lets biases and norms train too, and weights that no adapter stands for
    seed      of the adapters' start
    targets   selectors of sites, as in mask_weights: "linear", "ffn", "attention", "ffn:down", paths and patterns; all linear layers by default
    ignore    selectors of sites that get none
    also      parameters that go on training beside the adapters, by globs of their names: "*.router.*"
    """

    adapter: str = "masked_low_rank"
    freeze: bool = True
    seed: int = 0
    targets: tuple[str, ...] = ("linear",)
    ignore: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        adapter = Named.parse("adapter", self.adapter)
        adapter(torch.ones(2, 2, dtype=torch.float32), 0)
        if getattr(adapter.module, "CHANGES", False):
            object.__setattr__(self, "preserves", Preserves.SIGNATURE)
        self.take_selectors("also", "targets", "ignore")

    def run(self, program: Program, ctx: Context) -> Program:
        made: dict[tuple[str, fx.Node], fx.Node] = {}
        trained: set[tuple[str, str]] = set()
        sites = chosen_linears(program, self.targets, self.ignore)
        others = _read_by_others(program, {program.regions[site.region].node(site.roles["op"]) for site in sites})
        for site in sites:
            region = program.regions[site.region]
            found = weight_of(region, site)
            if found is None or _has_one(found[0]):
                ctx.miss("its weight has an adapter, or is computed", site.path)
            elif (site.region, found[1]) in made or ctx.spend():
                trained |= {(site.region, name) for name in self._adapt(region, *found, made, others)}
        if trained and self.freeze:
            freeze(program, trained | self._also(program))
        return program

    def _also(self, program: Program) -> set[tuple[str, str]]:
        """(path of the region, name) of what `also` names. Raises SelectorError for a glob that names nothing."""
        named = {(region.path, name): region.qualified(name) for region in program.regions.values()
                 for name, _ in region.module.named_parameters(remove_duplicate=False)}
        found: set[tuple[str, str]] = set()
        for glob in self.also:
            hits = {key for key, name in named.items() if fnmatchcase(name, glob)}
            if not hits:
                raise SelectorError(f"the glob {glob!r} matches none of {len(named)} parameters", where="add_adapters(also=...)",
                                    hint=nearest(glob, named.values()))
            found |= hits
        return found

    def _adapt(self, region: Region, op: fx.Node, weight: fx.Node, mask: str | None, made: dict[tuple[str, fx.Node], fx.Node],
               others: set[tuple[str, str]]) -> list[str]:
        """Put the adapter of a weight into the graph; the names of its parameters."""
        name = str(weight.target)
        adapter = self._of(region, name, mask, (region.path, name) in others)
        if adapter.place == "inside":
            return self._inside(region, op, weight, mask, adapter, made)
        return self._outside(region, op, name, adapter)

    def _outside(self, region: Region, op: fx.Node, weight: str, adapter: Adapter) -> list[str]:
        """Beside or behind one layer. The linear layers in it become sites "<path>.<adapter>_<tensor>"."""
        kind, path, after, before = Named.parse("adapter", self.adapter).name, str(op.meta.get("path", op.name)), op.next, set(region.graph.nodes)
        prefix = beside(weight, f"{kind}_")
        if adapter.rest is not None and not reads(region, f"{prefix}{next(iter(adapter.tensors))}"):
            trained = get_tensor(region.module, weight).requires_grad
            set_tensor(region.module, weight, nn.Parameter(adapter.rest, requires_grad=trained))
        nodes = self._parameters(region, after, prefix, adapter)
        value, argument = (op, "y") if adapter.place == "behind" else (op.kwargs["input"], "x")
        assert isinstance(value, fx.Node)
        change = insert_formula(region, after, adapter.formula, {argument: value, **nodes}, self.name())
        total = insert(after, aten.add.Tensor, self=op, other=change)
        total.meta = {"by": self.name(), "val": op.meta["val"]}
        new = {node: None for node in region.graph.nodes if node not in before}
        for node in [node for node in new if node.op == "call_function" and node is not total]:
            node.meta |= {"path": path, "module": op.meta.get("module"), ADAPTER: path}
            ours = next((key for key, source in nodes.items() if source in node.all_input_nodes), None)
            if node.target is aten.linear.default and ours is not None:
                node.meta |= {"path": f"{path}.{kind}_{ours}", **({MARK: path} if adapter.place == "beside" else {})}
        op.replace_all_uses_with(total, delete_user_cb=lambda user: user not in new)
        return [str(node.target) for node in nodes.values()]

    def _of(self, region: Region, name: str, mask: str | None, shared: bool) -> Adapter:
        """Of one weight; is it read by what gets none?"""
        dense, seed = get_tensor(region.module, name).detach(), zlib.crc32(f"{self.seed} {region.qualified(name)}".encode())
        kept = None if mask is None else get_tensor(region.module, mask)
        adapter: Adapter = Named.parse("adapter", self.adapter)(dense, seed, kept)
        if adapter.rest is not None and mask is not None:
            raise StructureError("a low-rank part of a masked weight would leave its mask", where=region.qualified(name),
                                 hint="start='zero', or add the adapters first and mask what is left")
        if adapter.rest is not None and shared:
            raise StructureError("what is left of this weight would be read by something without its low-rank part too", where=region.qualified(name),
                                 hint="start='zero', or name the layer in ignore")
        return adapter

    def _inside(self, region: Region, op: fx.Node, weight: fx.Node, mask: str | None, adapter: Adapter,
                made: dict[tuple[str, fx.Node], fx.Node]) -> list[str]:
        """Between the weight and its mask, once for all who read it."""
        place, product = made.get((region.path, weight)), op.kwargs["weight"]
        if place is None:
            before = product if mask is not None and isinstance(product, fx.Node) else op
            nodes = self._parameters(region, before, f"{weight.target}_", adapter)
            place = insert_formula(region, before, adapter.formula, {"weight": weight, **nodes}, self.name())
            made[region.path, weight] = place
            if mask is not None:
                before.replace_input_with(weight, place)
        if mask is None:
            op.kwargs = {**op.kwargs, "weight": place}
        return [f"{weight.target}_{key}" for key in adapter.tensors]

    def _parameters(self, region: Region, before: fx.Node, prefix: str, adapter: Adapter) -> dict[str, fx.Node]:
        return {key: read_stored(region, before, f"{prefix}{key}", self.name(), None if reads(region, f"{prefix}{key}") else nn.Parameter(tensor))
                for key, tensor in adapter.tensors.items()}


def _read_by_others(program: Program, ops: set[fx.Node]) -> set[tuple[str, str]]:
    """(path of the region, name) of the tensors that something else than these ops reads, such as the embedding that a head is tied to."""
    return {(region.path, str(node.target)) for region, node in program.nodes() if node.op == "get_attr" and not ops.issuperset(node.users)}


def _has_one(op: fx.Node) -> bool:
    """Is it part of an adapter, or of a low-rank part, or does one stand beside or behind it?"""
    near = (op, *op.users, *(source for user in op.users for source in user.all_input_nodes))
    return any(mark in node.meta for node in near for mark in (ADAPTER, MARK))


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).eval(), (torch.randn(3, 16),)
