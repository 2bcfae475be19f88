"""Blocks: the layers that a residual network is a stack of. For a transformer one block is its attention and the FFN behind it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .normal_form_edit import aten, is_call
from .program import Program, Region, Site
from .site_graph import View, common_path
from .site_residual import find_residuals


@dataclass(frozen=True)
class Block:
    """A run of residual branches: those with attention, and then the first without.

    path           module path, unique in the program
    input, output  names of the nodes that hold the residual stream before and after it
    ops            names of all nodes inside of its branches
    """

    path: str
    region: str
    input: str
    output: str
    ops: frozenset[str]


def find_blocks(program: Program) -> list[Block]:
    """The blocks of all regions, in the order of execution. Empty where the model has no residual stream."""
    found: list[Block] = []
    for region in program.regions.values():
        view, run = View(region), list[tuple[Site, frozenset[str], bool]]()
        for _, site in find_residuals(view):
            inside = _inside(view, site)
            attends = any(is_call(node, aten.scaled_dot_product_attention.default) for node in inside)
            if run and not run[-1][2]:
                found.append(_block(region, run, len(found)))
                run = []
            run.append((site, frozenset(node.name for node in inside), attends))
        if run:
            found.append(_block(region, run, len(found)))
    return found


def _block(region: Region, run: list[tuple[Site, frozenset[str], bool]], number: int) -> Block:
    common = common_path(site.path for site, _, _ in run) or run[0][0].path
    first, last = run[0][0].roles, run[-1][0].roles
    return Block(f"{common}@{number}", region.path, first["input"], last["add"], frozenset().union(*(inside for _, inside, _ in run)))


def _inside(view: View, site: Site) -> list[fx.Node]:
    """The nodes that the branch is computed with from the residual stream."""
    names = {node.name: node for node in view.position}
    start, waiting = names[site.roles["input"]], [names[site.roles["branch"]]]
    above: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in above and view.position[node] > view.position[start]:
            above.add(node)
            waiting += node.all_input_nodes
    reached = {start}
    for node in sorted(above, key=view.position.__getitem__):
        if any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return [node for node in above if node in reached]
