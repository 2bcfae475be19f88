"""What a router reads that is not the row: what another module gives for the whole text, such as the embedding of a time."""

from __future__ import annotations

from torch import Tensor, fx
from torch.nn.functional import linear

from sparsify_compiler.normal_form_edit import same_size, shape
from sparsify_compiler.passes.moe._evidence import Evidence, Formula
from sparsify_compiler.passes.moe._sites import Dense
from sparsify_compiler.passes.moe.routers._base import normal


def condition(dense: Dense, path: str) -> fx.Node | None:
    """The node that a module of the FFN's graph ends at, where it stands before the FFN; None without a path, and where there is none."""
    found = None
    for node in dense.region.graph.nodes if path else ():
        if node is dense.x:
            break
        own = str(node.meta.get("path", ""))
        if node.op == "call_function" and (own == path or own.startswith(f"{path}.")):
            found = node
    return found


def unconditioned(dense: Dense | str, path: str) -> str | None:
    """Why a router cannot read what the module gives; None where it can, or is not to."""
    if not path or isinstance(dense, str):
        return None
    found = condition(dense, path)
    if found is None:
        return f"its graph has no module {path} before it"
    given, x = shape(found), shape(dense.x)
    if given is None or x is None or len(given) != 2 or not same_size(given[0], x[0]):
        return f"{path} gives no row for each of its texts"
    return None


def by_condition(given: fx.Node, experts: int, evidence: Evidence) -> Formula:
    """A random linear of what is given [texts, width], the same scores for all rows of a text."""
    return Formula({"weight": normal((experts, int(given.meta["val"].shape[-1])), evidence)}, _scored)


def _scored(x: Tensor, given: Tensor, weight: Tensor) -> Tensor:
    scores: Tensor = linear(given, weight).float()
    return scores.reshape(scores.shape[0], *[1] * (x.dim() - 2), scores.shape[1]).expand(*x.shape[:-1], scores.shape[1])
