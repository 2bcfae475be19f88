"""Train some places of each weight alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.named import Named
from sparsify_compiler.normal_form_edit import aten
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train._frozen import freeze, weight_of
from sparsify_compiler.passes_api import Context, Pass
from sparsify_compiler.program import Program, Region, Site, get_tensor
from sparsify_compiler.sites import chosen_sites
from sparsify_compiler.splice import insert_formula
from sparsify_compiler.stored import read_stored, reads

CHANGE = "change_of"    # node meta of the layer that is trained: the path of the one that it stands beside


@dataclass(frozen=True)
class TrainSubset(Pass):
    """Freeze a model, and let some places of its linear weights learn: the change is a masked weight beside each, which pack() makes small.

    Matches    linear(x, w, b) and linear(x, w * mask, b)
    Rewrites   linear(x, w, b) + linear(x, change * places), change zeros that train, places a bool buffer, inside of the mask where there is one.
               merge_adapters() adds the change to the weight, whose zeros stay
    Preserves  values
    Paper      none: what SMT (arXiv:2405.15525), S2FT (arXiv:2412.06289) and SFT (arXiv:2401.16405) have in common

    score      a file of passes/prune/scores: the highest learn
    structure  which places may be chosen together, "unstructured", "32x32", "Columns()"
    density    share of the places of a weight
    seed       of random scores
    """

    score: str = "magnitude"
    structure: Structure | str = "unstructured"
    density: float = 0.05
    seed: int = 0
    targets: tuple[str, ...] = ("linear",)
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Named.parse("score", self.score)
        if isinstance(self.structure, str):
            object.__setattr__(self, "structure", Structure.parse(self.structure))
        self.check_density(self.density)
        self.take_selectors("targets", "ignore")

    def own_density(self) -> float | None:
        """What is kept is not its business."""
        return None

    def needs(self, program: Program) -> Mapping[str, frozenset[str]]:
        names = frozenset(Named.parse("score", self.score).statistics)
        return {site.path: names for site in chosen_sites(program, ("linear",), self.targets, self.ignore)} if names else {}

    def run(self, program: Program, ctx: Context) -> Program:
        trained: set[tuple[str, str]] = set()
        for site in chosen_sites(program, ("linear",), self.targets, self.ignore):
            region = program.regions[site.region]
            found = weight_of(region, site)
            if found is None or CHANGE in found[0].meta or any(CHANGE in one.meta for user in found[0].users for one in user.all_input_nodes):
                ctx.miss("its weight has a part that trains, or is computed", site.path)
            elif ctx.spend():
                op, weight, mask = found
                trained.add((site.region, self._add(region, op, weight, self._places(region, site, weight, mask, ctx))))
        if trained:
            freeze(program, trained)
        return program

    def _places(self, region: Region, site: Site, weight: fx.Node, mask: str | None, ctx: Context) -> Tensor:
        """bool of the weight's shape."""
        assert isinstance(self.structure, Structure)
        dense, score = get_tensor(region.module, str(weight.target)).detach(), Named.parse("score", self.score)
        known = {name: ctx.statistics.get(site.path, name) for name in score.statistics} if ctx.statistics is not None else {}
        found: Tensor = score(dense, known, self.seed)
        kept = None if mask is None else get_tensor(region.module, mask)
        ranked = found if kept is None else found.masked_fill(~kept, -torch.inf)
        chosen = self.structure.mask(ranked, self.structure.density or self.density)
        return chosen if kept is None else chosen & kept

    def _add(self, region: Region, op: fx.Node, weight: fx.Node, places: Tensor) -> str:
        """Put the layer that trains beside another; the name of its weight."""
        dense, name = get_tensor(region.module, str(weight.target)), f"{weight.target}_change"
        made = (None, None) if reads(region, name) else (nn.Parameter(torch.zeros_like(dense, requires_grad=False)), places)
        after = op.next
        nodes = {key: read_stored(region, after, target, self.name(), tensor)
                 for key, target, tensor in zip(("change", "places"), (name, f"{name}_mask"), made, strict=True)}
        source = op.kwargs["input"]
        assert isinstance(source, fx.Node)
        layer = insert_formula(region, after, _layer, {"x": source, **nodes}, self.name())
        path = str(op.meta.get("path", op.name))
        layer.meta |= {"path": f"{path}.change", "module": op.meta.get("module"), CHANGE: path}
        with region.graph.inserting_before(after):
            total = region.graph.call_function(aten.add.Tensor, (), {"self": op, "other": layer})
        total.meta = {"by": self.name(), "val": op.meta["val"], "path": path}
        op.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        return name


def _layer(x: Tensor, change: Tensor, places: Tensor) -> Tensor:
    return nn.functional.linear(x, change * places)


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).eval(), (torch.randn(3, 16),)
