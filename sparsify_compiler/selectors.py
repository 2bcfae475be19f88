"""Which sites: `targets` and `ignore` as text. A selector is

    encoder.layer.0.attention.q      an exact module path
    encoder.*.dense                  a glob on the dotted path (`*` and `**` cross dots)
    re:encoder\\.layer\\.[0-3]\\..*     a regular expression for the whole path
    linear                           a kind of site
    Conv2d, aten.linear              a module class, or an op
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import fx

from .errors import SelectorError, nearest
from .program import Program, Site

KINDS = ("linear", "conv", "ffn", "attention", "moe", "residual")


def select(sites: Sequence[Site], targets: str | Iterable[str] = (), ignore: str | Iterable[str] = (),
           program: Program | None = None) -> list[Site]:
    """The sites that some selector of `targets` names (all when there is none) and none of `ignore`, in their own order.

    `program` is needed for module classes and ops. Raises SelectorError for a selector that is malformed or matches nothing.
    """
    nodes, parts = _nodes(program), program is not None and program.skeleton is not None
    wanted = _matched(sites, targets, nodes, parts)
    refused = _matched(sites, ignore, nodes, parts)
    everything = not _as_tuple(targets)
    return [site for site in sites if (everything or _key(site) in wanted) and _key(site) not in refused]


def matches(selector: str, site: Site, nodes: Callable[[Site], fx.Node | None]) -> bool:
    """True when the selector names this site. `nodes` gives the site's main node, for classes and ops."""
    if selector.startswith("re:"):
        return _compile(selector).fullmatch(site.path) is not None
    if selector in (site.path, site.kind):
        return True
    if any(mark in selector for mark in "*?["):
        return fnmatchcase(site.path, selector)
    node = nodes(site)
    if node is None:
        return False
    module = str(node.meta.get("module", "")).rpartition(".")[2]
    op = str(node.target)
    return selector in (module, op, op.rpartition(".")[0])


def _matched(sites: Sequence[Site], selectors: str | Iterable[str], nodes: Callable[[Site], fx.Node | None], parts: bool) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for selector in _as_tuple(selectors):
        hits = {_key(site) for site in sites if matches(selector, site, nodes)}
        if not hits:
            raise _nothing(selector, sites, parts)
        found |= hits
    return found


def _nothing(selector: str, sites: Sequence[Site], parts: bool) -> SelectorError:
    """What to say of a selector that matches none; `parts`: was the model captured in parts?"""
    paths = [site.path for site in sites]
    below = [path for path in paths if path.startswith(f"{selector}.")]
    if below:
        hint = f"{len(below)} sites lie below it: write {selector}.*"
    elif selector in KINDS:
        hint = f"there are {', '.join(sorted({site.kind for site in sites})) or 'no others'}"
        hint += "; what lies between the parts that a model was captured in is Python, and no site" if parts else ""
    else:
        hint = nearest(selector.removeprefix("re:"), {*paths, *KINDS})
    return SelectorError(f"the selector {selector!r} matches none of {len(paths)} sites", hint=hint)


def _nodes(program: Program | None) -> Callable[[Site], fx.Node | None]:
    """Site -> the node of its role "op", where it has one."""
    if program is None:
        return lambda site: None
    index = {(region.path, node.name): node for region, node in program.nodes()}
    return lambda site: index.get((site.region, site.roles.get("op", "")))


def _compile(selector: str) -> re.Pattern[str]:
    try:
        return re.compile(selector.removeprefix("re:"))
    except re.error as error:
        raise SelectorError(f"not a regular expression: {error}", where=selector) from error


def _as_tuple(selectors: str | Iterable[str]) -> tuple[str, ...]:
    return (selectors,) if isinstance(selectors, str) else tuple(selectors)


def _key(site: Site) -> tuple[str, str]:
    return site.kind, site.path
