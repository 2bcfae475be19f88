"""SPT."""

from __future__ import annotations

from sparsify_compiler.passes.attention.select_blocks import SelectBlocks
from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes.train.add_adapters import AddAdapters
from sparsify_compiler.passes.train.penalise_routing import PenaliseRouting
from sparsify_compiler.pipeline import Pipeline


def spt(share: float = 0.125, density: float = 0.5, experts: int = 8, rank: int = 8, block: int = 16, balance: float = 0.01) -> Pipeline:
    """For fine-tuning: attention reads the keys whose codes are most alike the query's, an FFN runs the groups of neurons that a token is routed to.

    share: of the keys, in blocks; density: of an FFN's neurons. Routers train, and low-rank adapters beside the layers outside of FFNs. Keys are
    chosen for blocks of queries together, and code words stay as calibration found them, where the paper moves them and chooses for each query.

    Paper      SPT: Fine-Tuning Transformer-based Language Models Efficiently with Sparsification, Gui et al., arXiv:2312.10365
    """
    attention = SelectBlocks((), "shared_codes(number=16)", f"top_k(share={share})", block, block, dense_below=0)
    neurons = SplitExperts(experts, "contiguous", "ridge", "top_k", 0.0, weight="sigmoid", repair="none", density=density)
    adapters = AddAdapters(f"low_rank(rank={rank})", also=("*router*",), ignore=("re:.*router.*",))
    return Pipeline((attention, neurons, adapters, PenaliseRouting("load_balance", balance)))
