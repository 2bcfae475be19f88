"""Weights that stay as they are while what a pass has added to them is trained."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx, nn

from sparsify_compiler.masked import masked_weight
from sparsify_compiler.program import Program, Region, Site, set_tensor


def freeze(program: Program, but: Collection[tuple[str, str]]) -> None:
    """No parameter of the graphs trains, but for those named: (path of the region, name)."""
    for region in program.regions.values():
        for name, parameter in list(region.module.named_parameters(remove_duplicate=False)):
            if parameter.requires_grad and (region.path, name) not in but:
                set_tensor(region.module, name, nn.Parameter(parameter.detach(), requires_grad=False))


def weight_of(region: Region, site: Site) -> tuple[fx.Node, fx.Node, str | None] | None:
    """The op of a linear site, the get_attr of its weight, and the name of its mask if it has one; None where the weight is computed otherwise."""
    op = region.node(site.roles["op"])
    masked = masked_weight(region, op)
    if masked is not None:
        return op, next(one for one in masked.product.all_input_nodes if one.target == masked.weight), masked.mask
    source = op.kwargs["weight"]
    return (op, source, None) if isinstance(source, fx.Node) and source.op == "get_attr" else None
