"""The dense FFN that a mixture was made of, in the same compile: what the mixture, its router and its shared expert must be faster than."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from sparsify_compiler.executor import part_function
from sparsify_compiler.fakes import fake_like, mode_of
from sparsify_compiler.fold import erase_dead
from sparsify_compiler.normal_form_edit import aten, is_call
from sparsify_compiler.passes.lower._dense_ffn import linears_before
from sparsify_compiler.passes.moe._sites import Dense, dense_of
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Region, get_tensor, set_tensor
from sparsify_compiler.sites import find_sites

MADE_BY = "split_experts"


@dataclass(frozen=True)
class Origin:
    """One such FFN, and the node that the whole mixture ends at: op, or what adds the shared expert to it."""

    dense: Dense
    end: fx.Node


def origin_of(region: Region, op: fx.Node, ctx: Context) -> Origin | None:
    """None where the mixture is the model's own, was trained since it was divided, or has a router that reads more than its x."""
    if op.meta.get("by") != MADE_BY or ctx.given is None or region.path not in ctx.given.regions:
        return None
    found = [site for site in find_sites(ctx.given, ("ffn",)) if site.path == op.meta["site"] and site.region == region.path]
    dense = dense_of(ctx.given.regions[region.path], found[0], "") if found else "none"
    if not isinstance(dense, Dense):
        return None
    try:
        _route(region, op)
    except KeyError:
        return None
    users = [user for user in op.users if is_call(user, aten.add.Tensor) and user.meta.get("by") == MADE_BY]
    return Origin(dense, users[0] if users else op)


def around(region: Region, op: fx.Node, end: fx.Node, mixture: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """x -> what the mixture gives with all that was put around it; mixture(x, chosen(, weights)) is the op in one of its forms."""
    route = _route(region, op)
    if end is op:
        return lambda x: mixture(x, *route(x))
    beside = part_function(region, [op.kwargs["x"]], [end.kwargs["other"]])  # type: ignore[list-item]
    return lambda x: mixture(x, *route(x)) + beside(x)[0]


def _route(region: Region, op: fx.Node) -> Callable[..., Any]:
    """x -> chosen(, weights). Raises KeyError where these depend on more than x."""
    routes = [node for name in ("chosen", "weights") if isinstance(node := op.kwargs.get(name), fx.Node)]
    return part_function(region, [op.kwargs["x"]], routes)  # type: ignore[list-item]


def linears_of(origin: Origin) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias of "gate", "up" and "down"; an FFN without a gate has no "up"."""
    ffn = origin.dense.ffn
    parts = {"gate": (ffn.gate, ffn.gate_bias), "up": (ffn.up, ffn.up_bias), "down": (ffn.down, ffn.bias)}
    return {name: (weight, bias) for name, (weight, bias) in parts.items() if weight is not None}


def restore(region: Region, origin: Origin, x: fx.Node) -> list[fx.Node]:
    """The dense FFN in the place of the mixture and what is around it, under the names that its linears had. Returns them."""
    dense, end = origin.dense, origin.end
    stored = {name: (_stored(region, origin, name, "weight", weight), None if bias is None else _stored(region, origin, name, "bias", bias))
              for name, (weight, bias) in linears_of(origin).items()}
    linears = linears_before(region, end, x, stored, dense.activation)
    for name, one in zip(stored, linears, strict=True):
        old = dense.parts[name][0]
        one.meta |= {key: old.meta[key] for key in ("path", "module", "site") if key in old.meta}
    end.replace_all_uses_with(linears[-1])
    erase_dead([end])
    return linears


def _stored(region: Region, origin: Origin, name: str, key: str, value: Tensor) -> fx.Node:
    """A weight or bias of the dense FFN, under its own name where it is all that has this name."""
    old: Any = origin.dense.parts[name][0].kwargs[key]
    before = get_tensor(origin.dense.region.module, str(old.target)) if old.op == "get_attr" else None
    whole = before is not None and before.shape == value.shape
    target = str(old.target) if whole else f"{name}_{key}_of_{origin.end.name}"
    set_tensor(region.module, target, before if whole else nn.Parameter(value, requires_grad=False))  # type: ignore[arg-type]
    with region.graph.inserting_before(origin.end):
        made = region.graph.get_attr(target)
    made.meta = {"val": fake_like(value, mode_of(region)), "by": "lower"}
    return made
