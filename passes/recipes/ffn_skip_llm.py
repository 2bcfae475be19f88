"""FFN-SkipLLM."""

from __future__ import annotations

from sparsify_compiler.passes.activation.skip_ffns import SkipFfns
from sparsify_compiler.pipeline import Pipeline


def ffn_skip_llm(density: float | None = None, first: float = 0.25, last: float = 0.15, warm: int = 16, targets: tuple[str, ...] = ("ffn",),
                 ignore: tuple[str, ...] = ()) -> Pipeline:
    """Skip, for each token, the FFNs behind one that hardly turned the residual stream, but not the first and last ones; needs calibration.

    Paper      FFN-SkipLLM: A Hidden Gem for Autoregressive Decoding with Adaptive Feed Forward Skipping, Jaiswal et al., arXiv:2404.03865
    """
    return Pipeline((SkipFfns(density, first, last, warm, targets, ignore),))
