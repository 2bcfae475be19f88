"""Selections by predicted scores, for which there is no kernel: everything is computed, for choosing would cost and save nothing."""

from __future__ import annotations

from sparsify_compiler.fold import erase_dead
from sparsify_compiler.ops import select
from sparsify_compiler.passes.lower._layer import say
from sparsify_compiler.program import Program

BY = "by prediction"  # how the decisions about such sites call their structure


def make_dense(program: Program) -> None:
    """select(x, limit, scores) -> x, without what the scores are computed with; a selection that is the model's own stays."""
    found = [node for _, node in program.nodes()
             if node.target is select.op and node.kwargs.get("scores") is not None and node.meta.get("optional")]
    for node in found:
        node.replace_all_uses_with(node.kwargs["x"])  # type: ignore[arg-type]
        erase_dead([node])
    for row in program.decisions.values():
        if found and row.structure.endswith(BY):
            row.density = 1.0
            say(row, "reads everything: no kernel reads by predicted scores")
