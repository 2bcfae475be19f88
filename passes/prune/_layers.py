"""Which weights can be pruned: the selected linear and convolution sites, those that share a weight taken together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from torch import Tensor, fx

from sparsify_compiler.errors import SelectorError, nearest
from sparsify_compiler.passes.prune._low_rank import MARK
from sparsify_compiler.program import Program, Region, Site, get_tensor
from sparsify_compiler.selectors import select
from sparsify_compiler.sites import find_sites

BASIC = ("linear", "conv")
DEFAULT = ("linear",)
COMPOSITE = ("ffn", "attention", "moe")  # each stands for the basic sites that its roles name
ROLES = {"ffn": ("up", "gate", "down"), "attention": ("q", "k", "v", "out"), "moe": ("router",)}  # "ffn:up" stands for that role alone
AROUND = ("input",)  # roles of what a composite reads, which may be a linear of its own


@dataclass(frozen=True)
class Use:
    """One site, the region it lies in, and the node of its op."""

    site: Site
    region: Region
    op: fx.Node


@dataclass(frozen=True)
class Layer:
    """A weight and every site that uses it. Several uses: a module that is called more than once, or tied weights."""

    uses: tuple[Use, ...]
    weight: Tensor

    @property
    def path(self) -> str:
        """The site that stands for all."""
        return self.uses[0].site.path


@dataclass(frozen=True)
class LeftDense:
    """A site whose weight is not pruned, and why. `chosen` is False for a site that no selector asked for."""

    use: Use
    reason: str
    chosen: bool = True


def find_layers(program: Program, targets: Iterable[str], ignore: Iterable[str]) -> tuple[list[Layer], list[LeftDense]]:
    """The weights to prune, in the order of execution, and the sites that stay dense. Raises SelectorError."""
    sites = find_sites(program, (*BASIC, *COMPOSITE))
    basic = [site for site in sites if site.kind in BASIC]
    targets, ignore = tuple(targets), tuple(ignore)
    nothing = targets == DEFAULT and not any(site.kind == "linear" for site in basic)  # a default is not a wrong selector
    wanted = set() if nothing else _selected(sites, targets or ("*",), program)
    wanted -= _selected(sites, ignore, program)
    nodes = {(region.path, node.name): node for region, node in program.nodes()}
    uses = [Use(site, program.regions[site.region], nodes[site.region, site.roles["op"]]) for site in basic]
    chosen = [use for use in uses if (use.site.region, use.op.name) in wanted]
    left = [LeftDense(use, "not selected", chosen=False) for use in uses if use not in chosen]
    readers, eager = _readers(program), _eager(program)
    groups: dict[Hashable, list[Use]] = {}
    for use in chosen:
        reason = _unfit(use, readers, eager, chosen)
        if reason is not None:
            left.append(LeftDense(use, reason))
        else:
            groups.setdefault(_identity(_weight(use)), []).append(use)
    return [Layer(tuple(group), _weight(group[0])) for group in groups.values()], left


def chosen_ops(program: Program, selectors: Iterable[str]) -> set[tuple[str, str]]:
    """(region, node) of the linears and convolutions that selectors mean, as in find_layers. Raises SelectorError for one that matches nothing."""
    return _selected(find_sites(program, (*BASIC, *COMPOSITE)), selectors, program)


def chosen_linears(program: Program, targets: Iterable[str], ignore: Iterable[str]) -> list[Site]:
    """The linear sites that `targets` means and `ignore` does not, as in find_layers, whatever their weights are. Raises SelectorError."""
    every, targets = find_sites(program, ("linear",)), tuple(targets)
    if not every and targets == DEFAULT:  # a default is not a wrong selector
        return []
    wanted = chosen_ops(program, targets) - chosen_ops(program, ignore)
    return [site for site in every if (site.region, site.roles["op"]) in wanted]


def _selected(sites: list[Site], selectors: Iterable[str], program: Program) -> set[tuple[str, str]]:
    """(region, node) of the ops that the selectors mean. Raises SelectorError for one that matches nothing.

    "ffn", "attention" and "moe" stand for the members of all sites of that kind, "ffn:up" and the like for those in that role. Paths, patterns
    and classes see linear and convolution sites only, so that they never reach beyond what they match.
    """
    found: set[tuple[str, str]] = set()
    for selector in selectors:
        kind, _, role = selector.partition(":")
        if kind not in COMPOSITE:
            kind, role = selector, ""
        elif role and role not in ROLES[kind]:
            raise SelectorError(f"{kind} has no role {role!r}", where=selector, hint=nearest(role, ROLES[kind]))
        kinds = COMPOSITE if kind in COMPOSITE else BASIC
        for site in select([site for site in sites if site.kind in kinds], (kind,), (), program):
            found |= {(site.region, node) for name, node in site.roles.items() if role in ("", name) and name not in AROUND}
    return found


def _unfit(use: Use, readers: dict[Hashable, list[tuple[Region, fx.Node]]], eager: dict[Hashable, str], chosen: list[Use]) -> str | None:
    """Why this site's weight cannot be pruned by itself; None when it can."""
    source = use.op.kwargs.get("weight")
    if MARK in use.op.meta:
        return f"it is the low-rank part of {use.op.meta[MARK]}"
    if not isinstance(source, fx.Node):
        return "it has no weight"
    if source.op != "get_attr":
        masked = source.op == "call_function" and any(_is_mask(use.region, node) for node in source.all_input_nodes)
        return "its weight has a mask already" if masked else f"its weight is computed in the graph ({source.target})"
    weight = _weight(use)
    if not weight.is_floating_point():
        return f"its weight is stored as {str(weight.dtype).removeprefix('torch.')}: only floats can be pruned"
    if _identity(weight) in eager:
        return f"its weight is tied: {eager[_identity(weight)]}, outside of what was captured, is the same"
    ours = {(other.region.path, other.op) for other in chosen if other.op.kwargs.get("weight") is not None}
    for region, reader in readers[_identity(weight)]:
        if (region.path, reader) not in ours:
            where = reader.meta.get("path") or region.qualified(reader.name)
            return f"its weight is tied: {where} ({reader.target}) reads it too"
    return None


def _readers(program: Program) -> dict[Hashable, list[tuple[Region, fx.Node]]]:
    """Weight -> every node that reads it, in any region, under any name."""
    found: dict[Hashable, list[tuple[Region, fx.Node]]] = {}
    for region, node in program.nodes():
        if node.op == "get_attr":
            found.setdefault(_identity(get_tensor(region.module, str(node.target))), []).extend((region, user) for user in node.users)
    return found


def _eager(program: Program) -> dict[Hashable, str]:
    """Weight -> its name, for those that the parts hold that stayed eager Python."""
    held = program.skeleton.named_parameters(remove_duplicate=False) if program.skeleton is not None else ()
    return {_identity(tensor): name for name, tensor in held}


def _weight(use: Use) -> Tensor:
    source = use.op.kwargs["weight"]
    assert isinstance(source, fx.Node)
    return get_tensor(use.region.module, str(source.target))


def _is_mask(region: Region, node: fx.Node) -> bool:
    return node.op == "get_attr" and get_tensor(region.module, str(node.target)).dtype.is_floating_point is False


def _identity(tensor: Tensor) -> Hashable:
    """Equal for two names of the same numbers in memory."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
