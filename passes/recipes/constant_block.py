"""Constant blocks."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures.block import Block
from sparsify_compiler.pipeline import Pipeline


def constant_block(rows: int = 4, columns: int = 1, density: float | None = None, score: str = "magnitude",
                   targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Cut blocks of 4 outputs by 1 input, as sparse kernels for vector instructions want them.

    Paper      An Efficient Sparse Inference Software Accelerator for Transformer-based Language Models on CPUs, Shen et al., arXiv:2306.16601
    """
    return Pipeline((MaskWeights(score, Block(rows, columns), "uniform", density, targets, ignore),))
