"""Order the hidden channels of FFNs so that a mask of n:m, or of blocks, keeps more."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.errors import ParseError
from sparsify_compiler.named import Named
from sparsify_compiler.normal_form_edit import aten, is_call
from sparsify_compiler.passes.prune._layers import Layer, find_layers
from sparsify_compiler.passes.prune._permutation import search
from sparsify_compiler.passes.prune._row_order import search_rows
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.prune.structures.block import Block
from sparsify_compiler.passes.prune.structures.nm import NM
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Region, Site, get_tensor, set_tensor
from sparsify_compiler.selectors import select
from sparsify_compiler.sites import find_sites


@dataclass(frozen=True)
class PermuteChannels(Pass):
    """Reorder the hidden channels of each FFN so that a mask keeps more score; run before mask_weights.

    Of n:m it is the down projection's, whose inputs stand in groups of m; of blocks r x c the up and gate projections', of whose outputs r neighbours
    are kept or cut together: channels that need the same inputs become neighbours.

    Matches    down(act(up(x))) and down(act(gate(x)) * up(x)), whose weights nobody else reads
    Rewrites   up and gate with rows (and biases) in the new order, down with columns in it: no gather at run time
    Preserves  values, up to float reassociation of down's sums
    Paper      Channel Permutations for N:M Sparsity, Pool and Yu, NeurIPS 2021 (proceedings hash 6e8404c3b93a9527c8db241a1846599a); the assignment
               slot by slot from Plug-and-Play, ICLR 2024, with swaps in place of the Hungarian method; none: neither is on arXiv. For blocks
               Shfl-BW, arXiv:2203.05016, whose shuffle here goes into the weights

    score      what an order should keep: a file of passes/prune/scores, best the one that the mask is made with
    structure  NM(n, m) or Block(rows, columns), or "2:4", "32x1" and the like
    density    share of the blocks that the mask will keep; by default the user's budget. n:m has its own
    targets    selectors of FFNs; all by default
    rounds     of going through the m slots, or of assigning all channels anew, at most
    rows       of n:m: how many output rows the search looks at; with more, a sample
    seed       of the sample, the order of slots and the first clusters; by default the compile's own
    """

    score: str = "magnitude"
    structure: Structure | str = field(default_factory=lambda: NM(2, 4))
    density: float | None = None
    targets: tuple[str, ...] = ("ffn",)
    rounds: int = 4
    rows: int = 1024
    seed: int | None = None

    preserves: ClassVar[Preserves] = Preserves.VALUES
    idempotent: ClassVar[bool] = False  # a second search starts where the first one stopped, and may find more

    def __post_init__(self) -> None:
        Named.parse("score", self.score)
        structure = Structure.parse(self.structure) if isinstance(self.structure, str) else self.structure
        if not isinstance(structure, Block) and (not isinstance(structure, NM) or structure.along != "inputs"):
            raise ParseError(f"orders channels for N:M along inputs and for blocks, not for {structure}", where="permute_channels",
                             hint='write structure="2:4", or "32x1"')
        object.__setattr__(self, "structure", structure)
        self.check_density(self.density)
        self.take_selectors("targets")

    def needs(self, program: Program) -> Mapping[str, frozenset[str]]:
        names = frozenset(Named.parse("score", self.score).statistics)
        ffns, layers = self._find(program)
        seen = [layers.get((site.region, site.roles[role])) for site in ffns for role in self._scored if role in site.roles] if names else []
        return {layer.path: names for layer in seen if layer is not None}

    def run(self, program: Program, ctx: Context) -> Program:
        ffns, layers = self._find(program)
        if not ffns:
            ctx.miss("the model has no FFN")
        for done, site in enumerate(ffns):
            parts = {role: layers.get((site.region, site.roles[role])) for role in ("up", "gate", "down") if role in site.roles}
            reason = self._unfit(site, parts, program)
            if reason is not None:
                ctx.miss(reason, site.path)
            else:
                self._permute(site, {role: layer for role, layer in parts.items() if layer is not None}, program, ctx)
            ctx.progress("permute channels", done + 1, len(ffns))
        return program

    @property
    def _scored(self) -> tuple[str, ...]:
        """The roles of the layers whose masks are to keep more."""
        return ("up", "gate") if isinstance(self.structure, Block) else ("down",)

    def _find(self, program: Program) -> tuple[list[Site], dict[tuple[str, str], Layer]]:
        """The FFNs, and the layers that have a weight of their own, by (region, op)."""
        every = find_sites(program, ("ffn",))
        if not every:
            return [], {}
        layers, _ = find_layers(program, ("ffn",), ())
        return select(every, self.targets, (), program), {(use.region.path, use.op.name): layer for layer in layers for use in layer.uses}

    def _unfit(self, site: Site, parts: Mapping[str, Layer | None], program: Program) -> str | None:
        hidden = int(site.facts["hidden"])
        size = self._group
        if hidden == 0 or hidden % size:
            return f"{hidden} hidden channels do not divide into groups of {size}"
        for role, layer in parts.items():
            if layer is None:
                return f"the weight of its {role} projection is tied, masked or computed"
            if len(layer.uses) > 1:
                return f"the weight of its {role} projection is used {len(layer.uses)} times"
            if layer.weight.shape[0 if role != "down" else 1] % hidden:
                return f"the {role} projection does not make the {hidden} hidden channels"
            if isinstance(self.structure, Block) and role in self._scored and (why := self.structure.misfit(*layer.weight.shape)) is not None:
                return f"the {role} projection: {why}"
            bias = layer.uses[0].op.kwargs.get("bias")
            if role != "down" and bias is not None and not _is_own(bias, program):
                return f"the bias of its {role} projection is read elsewhere too, or computed"
        activation = program.regions[site.region].node(site.roles["activation"])
        if is_call(activation, aten.prelu.default):
            return "its activation has a parameter for each channel"
        return None

    def _permute(self, site: Site, parts: Mapping[str, Layer], program: Program, ctx: Context) -> None:
        own = parts if site.roles.get("gate") != site.roles["up"] else {role: parts[role] for role in ("up", "down")}
        hidden, seed = int(site.facts["hidden"]), zlib.crc32(f"{self.seed if self.seed is not None else ctx.seed} {site.path}".encode())
        scores = [self._score(own[role], seed, ctx) for role in self._scored if role in own]
        order = self._search(scores, hidden, seed, ctx)
        if torch.equal(order, torch.arange(len(order), device=order.device)):
            ctx.miss("no order was found that keeps more", site.path)
        elif ctx.spend():
            for role, layer in own.items():
                _reorder(layer, order, 1 if role == "down" else 0)

    def _score(self, layer: Layer, seed: int, ctx: Context) -> Tensor:
        """float32 [out, in]."""
        named = Named.parse("score", self.score)
        given = {name: ctx.statistics.get(layer.path, name) for name in named.statistics} if ctx.statistics is not None else {}
        values: Tensor = named(layer.weight.detach(), given, seed).float()
        return values

    def _search(self, scores: list[Tensor], hidden: int, seed: int, ctx: Context) -> Tensor:
        """The order int64 [hidden]."""
        structure = self.structure
        if isinstance(structure, NM):
            return search(scores[0], structure.n, structure.m, self.rounds, self.rows, seed)
        assert isinstance(structure, Block)  # __post_init__ saw to it
        parts = [part for score in scores for part in torch.split(score.view(len(score), -1, structure.columns).sum(-1), hidden)]
        return search_rows(parts, structure.rows, self.density_of(ctx), self.rounds, seed)

    @property
    def _group(self) -> int:
        """Into runs of how many neighbours the channels divide."""
        return self.structure.m if isinstance(self.structure, NM) else self.structure.rows if isinstance(self.structure, Block) else 1


def _reorder(layer: Layer, order: Tensor, dim: int) -> None:
    """Put the weight's rows (dim 0; of a fused projection, each part's) or columns, and the bias with its rows, into the new order."""
    op, region = layer.uses[0].op, layer.uses[0].region
    for name in ("weight", "bias") if dim == 0 else ("weight",):
        source = op.kwargs.get(name)
        if not isinstance(source, fx.Node):
            continue
        old = get_tensor(region.module, str(source.target))
        with torch.inference_mode(False), torch.no_grad():
            parts = old.detach().shape[dim] // len(order)
            places = torch.cat([order + part * len(order) for part in range(parts)])
            new = old.detach().clone().index_select(dim, places)
        set_tensor(region.module, str(source.target), nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new)
        _mark(region, source, op)


def _mark(region: Region, source: fx.Node, op: fx.Node) -> None:
    source.meta["by"] = op.meta["by"] = "permute_channels"


def _is_own(source: object, program: Program) -> bool:
    """Whether a value is a stored tensor that only one node reads."""
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return False
    held = program.skeleton.parameters() if program.skeleton is not None else ()  # by parts that stayed eager Python
    reads, mine = Counter(tensor.data_ptr() for tensor in held), None
    for region, node in program.nodes():
        if node.op == "get_attr":
            tensor = get_tensor(region.module, str(node.target))
            reads[tensor.data_ptr()] += len(node.users)
            mine = tensor.data_ptr() if node is source else mine
    return mine is not None and reads[mine] == 1


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An FFN whose hidden channels are sorted by size, so that large ones share their groups."""
    torch.manual_seed(0)
    up, down = nn.Linear(8, 16), nn.Linear(16, 8)
    with torch.no_grad():
        down.weight *= torch.linspace(0.1, 2.0, 16)
    return nn.Sequential(up, nn.GELU(), down).eval(), (torch.randn(2, 8),)
