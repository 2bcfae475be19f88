"""Sites: the places of a Program where a decision can be taken, found by the structure of its graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import fx

from .errors import unknown
from .program import Program, Region, Site
from .selectors import select
from .site_attention import find_attentions
from .site_ffn import find_ffns
from .site_graph import View
from .site_linear import find_convs, find_linears
from .site_moe import find_moes
from .site_residual import find_residuals

if TYPE_CHECKING:
    from .passes_api import Context

# kind -> what finds it in one region: pairs of the node that the site begins at, and the site
FINDERS: dict[str, Callable[[View], Iterator[tuple[fx.Node, Site]]]] = {
    "linear": find_linears, "conv": find_convs, "ffn": find_ffns, "attention": find_attentions, "moe": find_moes, "residual": find_residuals,
}


def find_sites(program: Program, kinds: Iterable[str] | None = None) -> list[Site]:
    """All sites of these kinds (all kinds by default), region by region in graph order.

    Paths are module paths in the whole model. Where a module makes several sites of one kind (it is called twice), the later ones are
    named path@1, path@2, ... Raises UnknownNameError for a kind that does not exist.
    """
    wanted = list(FINDERS) if kinds is None else [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in wanted:
        if kind not in FINDERS:
            raise unknown("kind of site", kind, FINDERS)
    used: dict[tuple[str, str], int] = {}
    result = []
    for region in program.regions.values():
        view = View(region)
        found = [(view.position[node], order, site) for order, kind in enumerate(FINDERS) if kind in wanted for node, site in FINDERS[kind](view)]
        for _, _, site in sorted(found, key=lambda item: item[:2]):
            again = used.get((site.kind, site.path), 0)
            used[site.kind, site.path] = again + 1
            result.append(replace(site, path=f"{site.path}@{again}") if again else site)
    return result


def op_paths(program: Program, kinds: tuple[str, ...] = ("linear",)) -> dict[tuple[str, str], str]:
    """(region, name of the op's node) -> path of the site, of sites that are one op: linears, convolutions."""
    return {(site.region, site.roles["op"]): site.path for site in find_sites(program, kinds)}


def chosen_sites(program: Program, kinds: tuple[str, ...], targets: tuple[str, ...], ignore: tuple[str, ...]) -> list[Site]:
    """The sites of these kinds that `targets` names and `ignore` does not; none, without an error, in a model that has no such site where `targets`
    asks for all of them. Raises SelectorError for a selector that matches nothing.
    """
    every = find_sites(program, kinds)
    return select(every, targets, ignore, program) if every or targets != kinds else []


def fitting_ops(program: Program, sites: Iterable[Site], ctx: Context, what: str, unfit: Callable[[Region, fx.Node], str | None]
                ) -> Iterator[tuple[Site, Region, fx.Node]]:
    """The op of each site that a pass is to rewrite now: those that fit. A miss for each other, and one where there are no sites.

    what   a model has of these sites, "convolution"
    unfit  why an op is left as it is, if it is; asked when its turn comes, as what was rewritten before it left the graph
    """
    none = True
    for site in sites:
        none, region = False, program.regions[site.region]
        op = region.node(site.roles["op"])
        why = unfit(region, op)
        if why is not None:
            ctx.miss(why, site.path)
        elif ctx.spend():
            yield site, region, op
    if none:
        ctx.miss(f"the model has no {what}")
