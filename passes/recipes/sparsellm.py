"""SparseLLM."""

from __future__ import annotations

from sparsify_compiler.passes.prune.alternate_ffn import AlternateFfn
from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.pipeline import Pipeline


def sparsellm(structure: Structure | str = "unstructured", density: float | None = None, rounds: int = 4, trust: float = 1.0) -> Pipeline:
    """Each FFN's projections are cut together, towards the FFN's output, by alternation; then all other linear layers by SparseGPT.

    Needs calibration. The authors cut attention and FFN block by block; here all FFNs come first, on the rows of a model whose attention is dense.

    Paper      SparseLLM: Towards Global Pruning for Pre-trained Language Models, Bai et al., arXiv:2402.17946
    """
    return Pipeline((AlternateFfn(structure, density, rounds, trust),
                     MaskWeights("repair", structure, density=density, repair="obs", inputs="pruned")))
