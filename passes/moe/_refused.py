"""Experts that a router may not choose: numbers added to its scores."""

from __future__ import annotations

from torch import Tensor, fx

from sparsify_compiler.fold import put
from sparsify_compiler.passes.moe._write import SCORES
from sparsify_compiler.program import Region
from sparsify_compiler.splice import insert_formula


def added(region: Region, scores: fx.Node, values: Tensor, argument: str, by: str) -> fx.Node:
    """Let scores + values stand for the scores wherever they are read: values [E] of their dtype, or [n, E] of which the first row counts.

    They are stored as a buffer of that name. Returns the new node, which is a router's scores from now on.
    """
    before = scores.next
    made = put(region, before, values, argument, (), scores.meta, by)
    new = insert_formula(region, before, _first_row if values.dim() > 1 else _plain, {"scores": scores, "values": made}, by)
    new.meta |= {**{name: value for name, value in scores.meta.items() if name not in new.meta}, SCORES: True}
    scores.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


def _plain(scores: Tensor, values: Tensor) -> Tensor:
    return scores + values


def _first_row(scores: Tensor, values: Tensor) -> Tensor:
    return scores + values[0].to(scores.dtype)
