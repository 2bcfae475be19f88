"""Turn masked weights into storage formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from sparsify_compiler import catalog
from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import ParseError
from sparsify_compiler.fakes import fake_like, mode_of
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Region, Stage, get_tensor, set_tensor

aten = torch.ops.aten
# Tried on a mask whose structure nobody wrote down, beside condensed and csr, which need no numbers.
COMMON = ("2:4", "1:4", "4:8", "2:8", "32x32", "16x16", "32x1", "16x1", "8x1", "4x1")


@dataclass(frozen=True)
class Pack(Pass):
    """Store each masked weight in the smallest format that its mask fits, and compute with that format's op.

    Matches    linear(x, weight * mask, bias), mask a bool buffer
    Rewrites   sparsify.linear_<format>(x, <format tensors>, bias); any other use of weight * mask gets the product as a dense weight
    Preserves  values and the mask, exactly
    Paper      none: storage; each format names its own source
    """

    preserves: ClassVar[Preserves] = Preserves.VALUES
    gives_stage: ClassVar[Stage | None] = Stage.PACKED

    def run(self, program: Program, ctx: Context) -> Program:
        found = [(region, node) for region, node in program.nodes() if _is_masked(region, node)]
        for done, (region, node) in enumerate(found):
            if not ctx.spend():
                break
            self._pack(region, node, program, ctx)
            ctx.progress("pack", done + 1, len(found))
        return program

    def _pack(self, region: Region, product: fx.Node, program: Program, ctx: Context) -> None:
        """Replace every use of one weight * mask."""
        weight, mask = (get_tensor(region.module, str(_node(product, name).target)) for name in ("self", "other"))
        linears = [user for user in product.users if _is_linear_weight(user, product)]
        others = [user for user in product.users if user not in linears]
        rows = {user: _row(user, region, program) for user in product.users}
        if linears:
            form = smallest(weight, mask, rows[linears[0]].structure)
            stored = _store(region, product, form)
            for user in linears:
                _replace(region, user, stored, form)
                row = rows[user]
                row.format, row.bytes = form.name(), form.bytes() if user is linears[0] else 0
        if others:
            _fold(region, product, weight, mask)
            for user in others:
                row = rows[user]
                row.bytes, row.reason = row.dense_bytes, "stays dense: only linear layers are packed; the mask is folded into the weight"
                ctx.miss(f"{user.target} is not packed; its mask is folded into the weight", str(user.meta.get("path", "")))


def smallest(weight: Tensor, mask: Tensor, structure: str) -> Any:
    """The weight [N, K] in the format with the fewest bytes, among those that suit its structure (text) and fit its mask."""
    made = []
    for name, attributes in _suited(structure):
        kind = catalog.get("format", name)
        if kind.fits(weight, mask, **attributes) is None:
            made.append(kind.encode(weight, mask, **attributes))
    if not made:  # the mask is not what its structure says, or the structure is unknown
        made = [catalog.get("format", "csr").encode(weight, mask)]
    return min(made, key=lambda form: form.bytes())


def _suited(structure: str) -> tuple[tuple[str, Mapping[str, int]], ...]:
    try:
        return Structure.parse(structure).formats()
    except ParseError:
        common = tuple(pair for text in COMMON for pair in Structure.parse(text).formats())
        return (*common, ("condensed", {}), ("csr", {}))


def _store(region: Region, product: fx.Node, form: Any) -> dict[str, fx.Node]:
    """Put the format's tensors beside the weight, as <weight>_packed.<tensor>; a get_attr for each."""
    prefix = f"{_node(product, 'self').target}_packed"
    nodes: dict[str, fx.Node] = {}
    for name, tensor in form.tensors().items():
        set_tensor(region.module, f"{prefix}.{name}", tensor)
        with region.graph.inserting_before(product):
            node = nodes[name] = region.graph.get_attr(f"{prefix}.{name}")
        node.meta = _meta(product, fake_like(tensor, mode_of(region)))
    return nodes


def _replace(region: Region, linear: fx.Node, stored: Mapping[str, fx.Node], form: Any) -> None:
    """Compute a linear node with the format's op instead."""
    op = catalog.get("op", f"linear_{form.name()}").op
    bias = {"bias": linear.kwargs["bias"]} if linear.kwargs.get("bias") is not None else {}
    with region.graph.inserting_before(linear):
        packed = region.graph.call_function(op, (), {"x": linear.kwargs["input"], **stored, **bias, **form.attributes()})
    packed.meta = {**linear.meta, "by": "pack"}
    linear.replace_all_uses_with(packed)
    region.graph.erase_node(linear)


def _fold(region: Region, product: fx.Node, weight: Tensor, mask: Tensor) -> None:
    """Store weight * mask, zeros where the mask says so, and read it in place of the product."""
    dense = weight.detach().masked_fill(~mask, 0)
    name = f"{_node(product, 'self').target}_masked"
    set_tensor(region.module, name, nn.Parameter(dense, requires_grad=False) if isinstance(weight, nn.Parameter) else dense)
    with region.graph.inserting_before(product):
        node = region.graph.get_attr(name)
    node.meta = _meta(product, fake_like(dense, mode_of(region)))
    product.replace_all_uses_with(node)


def _is_masked(region: Region, node: fx.Node) -> bool:
    """Is this weight * mask, both stored, the mask bool, its shape the weight's?"""
    if node.target is not aten.mul.Tensor:
        return False
    tensors = []
    for name in ("self", "other"):
        source = node.kwargs.get(name)
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            return False
        tensors.append(get_tensor(region.module, str(source.target)))
    weight, mask = tensors
    return weight.is_floating_point() and mask.dtype == torch.bool and mask.shape == weight.shape


def _is_linear_weight(user: fx.Node, product: fx.Node) -> bool:
    """True when the product is the [N, K] weight of this linear node, and nothing else of it."""
    only = [name for name, value in user.kwargs.items() if value is product] == ["weight"]
    return user.target is aten.linear.default and only and product.meta["val"].dim() == 2


def _node(node: fx.Node, name: str) -> fx.Node:
    value = node.kwargs[name]
    assert isinstance(value, fx.Node)
    return value


def _row(user: fx.Node, region: Region, program: Program) -> Decision:
    """The decision of the site that the node belongs to; a new one for a mask that no pass of ours made."""
    site = str(user.meta.get("site") or user.meta.get("path") or region.qualified(user.name))
    user.meta["site"] = site
    if site not in program.decisions:
        program.decisions[site] = _unknown_row(user, region, site)
    return program.decisions[site]


def _unknown_row(user: fx.Node, region: Region, site: str) -> Decision:
    product = user.kwargs.get("weight")
    if not isinstance(product, fx.Node) or not _is_masked(region, product):
        return Decision(site, "linear")
    weight, mask = (get_tensor(region.module, str(_node(product, name).target)) for name in ("self", "other"))
    kind = "linear" if user.target is aten.linear.default else "conv"
    return Decision(site, kind, tuple(weight.shape), str(weight.dtype).removeprefix("torch."), "unknown", float(mask.double().mean()),
                    dense_bytes=weight.numel() * weight.element_size())


def _meta(like: fx.Node, value: Tensor) -> dict[str, Any]:
    return {"by": "pack", "val": value} | {key: like.meta[key] for key in ("path", "module") if key in like.meta}


class _Masked(nn.Module):
    """A linear layer with a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 16))
        self.register_buffer("weight_mask", torch.arange(16).expand(32, 16) % 4 < 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.weight_mask
        assert isinstance(mask, Tensor)
        return nn.functional.linear(x, self.weight * mask)


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """One masked linear layer."""
    torch.manual_seed(0)
    return _Masked().eval(), (torch.randn(2, 16),)
