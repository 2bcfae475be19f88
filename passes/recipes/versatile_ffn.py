"""VersatileFFN."""

from __future__ import annotations

from sparsify_compiler.passes.moe.reuse_ffns import ReuseFfns
from sparsify_compiler.passes.train.draw_loops import DrawLoops
from sparsify_compiler.passes.train.penalise_routing import PenaliseRouting
from sparsify_compiler.pipeline import Pipeline


def versatile_ffn(slices: int = 8, top_k: int = 2, loops: int = 4, steps: int = 10000, balance: float = 0.01) -> Pipeline:
    """For training: rows run through slices of their FFN (the paper's width path) and through all of it once or several times (its depth path).

    How often, a router learns by draws that cool for so many steps; the more often, the less the slices count. No weight is added but those of the
    two routers

    Paper      VersatileFFN: Achieving Parameter Efficiency in LLMs via Adaptive Wide-and-Deep Reuse, arXiv:2512.14531
    """
    return Pipeline((ReuseFfns(slices, top_k, loops), DrawLoops(steps=steps), PenaliseRouting("load_balance", balance)))
