"""Gradual magnitude pruning."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.pipeline import Pipeline


def gmp(density: float | None = None, structure: Structure | str = "unstructured", budget: str = "uniform", steps: int = 1000, every: int = 100,
        targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training: from dense to `density` along a cubic, the smallest weights going every few steps; nothing comes back. `steps`: of the last cut.

    Sparse WaveRNN (Kalchbrenner et al., Efficient Neural Audio Synthesis, arXiv:1802.08435) trains so, in 16x1 blocks, and so do Fast Sparse ConvNets
    (Elsen et al., arXiv:1911.09723), with targets=("conv",). SparseByteNN (Xu et al., arXiv:2310.19509) cuts groups of a convolution's weights, more
    than single ones and less than filters: structure="4x1". Accurate Neural Network Pruning Requires Rethinking Sparse Optimization (Kuznedelev et
    al., arXiv:2308.02060) finds that networks need more steps at high sparsity than dense ones do: give steps, and the loop, room.

    Paper      To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression, Zhu and Gupta, arXiv:1710.01878
    """
    start = MaskWeights("magnitude", structure, budget, density, targets, ignore)
    return Pipeline((start, MoveMasks(f"cubic(end={steps})", every=every, until=steps)))
