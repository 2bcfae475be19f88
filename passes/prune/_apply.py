"""Writing what was decided into the Program: masks, repaired weights and biases, and rows of the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.decision import Decision
from sparsify_compiler.fakes import fake_like, mode_of
from sparsify_compiler.passes.prune._layers import Layer, LeftDense, Use
from sparsify_compiler.passes.prune._low_rank import add_low_rank
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, get_tensor, set_tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Result:
    """What became of a layer. mask bool of the weight's shape; weight and bias in the layer's dtype, None where they stay."""

    mask: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None  # to be added to the layer's own
    note: str = ""
    low_rank: tuple[Tensor, Tensor] | None = None  # (reads [r, K], writes [out, r]): what the layer computes besides, as two dense layers

    def tensors(self) -> dict[str, Tensor]:
        """As plain tensors, to be stored."""
        reads, writes = self.low_rank or (None, None)
        note = torch.tensor(list(self.note.encode()), dtype=torch.uint8)
        parts = {"mask": self.mask, "weight": self.weight, "bias": self.bias, "note": note, "reads": reads, "writes": writes}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Result:
        """The inverse of `tensors`."""
        low_rank = (tensors["reads"], tensors["writes"]) if "reads" in tensors else None
        return Result(tensors["mask"], tensors.get("weight"), tensors.get("bias"), bytes(tensors["note"].tolist()).decode(), low_rank)

    def whole(self, dense: Tensor) -> Tensor:
        """The weight that the layer computes with in effect; `dense` is what it was. A repaired weight is zero beyond its mask already."""
        cut = dense.detach() * self.mask if self.weight is None else self.weight
        return cut if self.low_rank is None else cut + (self.low_rank[1] @ self.low_rank[0])

    @property
    def density(self) -> float:
        """Numbers that are kept / weights; those of the low-rank part count too."""
        besides = sum(part.numel() for part in self.low_rank or ())
        return float(self.mask.double().mean()) + besides / max(self.mask.numel(), 1)


def sources_of(layer: Layer) -> list[fx.Node]:
    """The get_attr nodes of the layer's weight."""
    return list(dict.fromkeys(source for use in layer.uses if isinstance(source := use.op.kwargs["weight"], fx.Node)))


def apply(layer: Layer, result: Result, structure: str, budget: float, program: Program) -> list[Callable[[], None]]:
    """Mask the layer in all its uses. What it gives back is to be called when all layers are cut: it changes what others read."""
    later: list[Callable[[], None]] = []
    products: dict[fx.Node, fx.Node] = {}
    biases: dict[Any, fx.Node] = {}
    for use in layer.uses:
        source = use.op.kwargs["weight"]
        assert isinstance(source, fx.Node)
        if source not in products:
            if result.weight is not None:
                old = get_tensor(use.region.module, str(source.target))
                set_tensor(use.region.module, str(source.target), nn.Parameter(result.weight, requires_grad=old.requires_grad))
            products[source] = _multiply(use.region, source, result.mask, use.op.meta)
        use.op.kwargs = {**use.op.kwargs, "weight": products[source]}
        if result.bias is not None:
            old_bias = use.op.kwargs.get("bias")
            if (use.region.path, old_bias) not in biases:
                biases[use.region.path, old_bias] = add_bias(use, source, result.bias)
            use.op.kwargs = {**use.op.kwargs, "bias": biases[use.region.path, old_bias]}
        if result.low_rank is not None:
            later.append(partial(add_low_rank, use.region, use.op, source, result.low_rank))
        use.op.meta["site"] = use.site.path
        program.decisions[use.site.path] = row = _row(use, layer.weight)
        row.structure, row.density, row.budget = structure, result.density, budget
        if use is not layer.uses[0]:
            row.dense_bytes, row.reason = None, f"shares the weight of {layer.path}"
    return later


def leave_dense(left: LeftDense, program: Program, ctx: Context) -> None:
    """Write down why a site stays dense; what an earlier pass decided there stands."""
    use = left.use
    if left.chosen:
        ctx.miss(left.reason, use.site.path)
    source = use.op.kwargs.get("weight")
    weight = get_tensor(use.region.module, str(source.target)) if isinstance(source, fx.Node) and source.op == "get_attr" else None
    if use.site.path not in program.decisions:
        program.decisions[use.site.path] = replace(_row(use, weight), reason=f"stays dense: {left.reason}")


def _multiply(region: Region, weight: fx.Node, mask: Tensor, meta: Mapping[str, Any]) -> fx.Node:
    """Insert weight * mask behind the weight's get_attr; the mask becomes a buffer beside the weight."""
    name, number = f"{weight.target}_mask", 0
    taken = _names(region)
    while name in taken and get_tensor(region.module, name) is not mask:
        name, number = f"{weight.target}_mask{number + 1}", number + 1
    set_tensor(region.module, name, mask)
    about = {"by": "mask_weights"} | {key: meta[key] for key in ("path", "module") if key in meta}
    with region.graph.inserting_after(weight):
        mask_node = region.graph.get_attr(name)
    mask_node.meta = about | {"val": fake_like(mask, mode_of(region))}
    with region.graph.inserting_after(mask_node):
        product = region.graph.call_function(aten.mul.Tensor, (), {"self": weight, "other": mask_node})
    product.meta = about | {"val": fake_like(get_tensor(region.module, str(weight.target)), mode_of(region))}
    return product


def add_bias(use: Use, weight: fx.Node, change: Tensor, by: str = "mask_weights") -> fx.Node:
    """A get_attr of the layer's bias plus `change`, under the bias's own name where nothing else reads that."""
    region, old = use.region, use.op.kwargs.get("bias")
    was = get_tensor(region.module, str(old.target)) if isinstance(old, fx.Node) and old.op == "get_attr" else None
    owner = str(weight.target).rpartition(".")[0]
    base = str(old.target) if isinstance(old, fx.Node) and was is not None else f"{owner}.bias" if owner else "bias"
    name, number = base, 0
    alone = was is None or all(user is use.op for node in region.graph.nodes if node.op == "get_attr" and node.target == base for user in node.users)
    while name in _names(region) and not (alone and was is not None and name == base):
        name, number = f"{base}_repaired{number or ''}", number + 1
    new = change if was is None else was + change
    set_tensor(region.module, name, nn.Parameter(new, requires_grad=was.requires_grad if was is not None else False))
    with region.graph.inserting_after(weight):
        node = region.graph.get_attr(name)
    about = {key: use.op.meta[key] for key in ("path", "module") if key in use.op.meta}
    node.meta = about | {"by": by, "val": fake_like(new, mode_of(region))}
    return node


def _names(region: Region) -> set[str]:
    return {str(node.target) for node in region.graph.nodes if node.op == "get_attr"}


def _row(use: Use, weight: Tensor | None) -> Decision:
    if weight is None:
        return Decision(use.site.path, use.site.kind)
    return Decision.of(use.site.path, use.site.kind, weight)
