"""A weight's share of its channel, times the channel's activation norm (the fine-grained score of CFSP, arXiv:2409.13199)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sparsify_compiler.passes.prune.scores._base import along_inputs, along_outputs, share

STATISTICS: tuple[str, ...] = ("input_norm", "hidden_norm")


def channel_share(weight: Tensor, statistics: Mapping[str, Tensor], seed: int, *, power: float = 1.0) -> Tensor:
    """|W[n, k]| / sum of |W[:, k]| * ||x[k]||^power; for up and gate of an FFN |W[n, k]| / sum of |W[n, :]| * ||h[n]||^power, with h as they make it.

    Summed over a hidden channel it is ||h[n]||^power: the three projections of an FFN then agree about which channels matter.
    """
    hidden = statistics["hidden_norm"]
    if hidden.numel() == 0:
        return share(weight, 0) * along_inputs(statistics["input_norm"] ** power, weight)
    return share(weight, 1) * along_outputs(hidden**power, weight)
