"""Gates in a graph: a float parameter times a mask, which multiplies values and whose mask is learnt or moved like that of a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.fakes import fake_like, mode_of
from sparsify_compiler.normal_form_edit import aten, insert
from sparsify_compiler.program import Region, set_tensor


def put_gate(region: Region, before: fx.Node, path: str, mask: Tensor, dtype: torch.dtype, by: str) -> fx.Node:
    """gate * mask in front of a node: gate ones of the mask's shape, of two dimensions or more, both stored as gates_<path> and gates_<path>_mask."""
    base = f"gates_{path.replace('.', '_')}".rstrip("_")
    name, number = base, 1
    while hasattr(region.module, name):
        name, number = f"{base}_{number}", number + 1
    made: list[fx.Node] = []
    parts: dict[str, Any] = {name: nn.Parameter(torch.ones(mask.shape, dtype=dtype, device=mask.device)), f"{name}_mask": mask}
    for key, tensor in parts.items():
        set_tensor(region.module, key, tensor)
        with region.graph.inserting_before(before):
            node = region.graph.get_attr(key)
        node.meta = {"val": fake_like(tensor, mode_of(region)), "by": by, "path": path}
        made.append(node)
    product = insert(before, aten.mul.Tensor, self=made[0], other=made[1])
    product.meta |= {"by": by, "path": name}
    return product


def gate(op: fx.Node, product: fx.Node, by: str) -> None:
    """Multiply what an op gives with gates that stand in front of it."""
    users = list(op.users)
    gated = insert(op.next, aten.mul.Tensor, self=op, other=product)
    gated.meta |= {"by": by, "path": op.meta.get("path", op.name)}
    for user in users:
        user.replace_input_with(op, gated)
