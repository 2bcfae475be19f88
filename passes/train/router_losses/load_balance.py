"""Load balance: all experts alike, over the rows of a call (Switch Transformer, arXiv:2101.03961, equation 4)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.train.router_losses._base import counts


def load_balance(scores: Tensor, chosen: Tensor, *, free: int = 0, tau: float = 0.75) -> Tensor:
    """E * sum over the experts of (their share of all choices) * (their mean probability): 1 where all are alike.

    free  how many at the end cost nothing: their terms count tau times, so that they are chosen more the smaller it is (MoE++, arXiv:2410.07348)
    """
    experts = scores.shape[-1]
    chosen_share = counts(chosen, experts)
    odds = scores.softmax(-1).flatten(0, -2).mean(0)
    terms = chosen_share / chosen_share.sum().clamp_min(1) * odds
    return experts * (terms[: experts - free].sum() + tau * terms[experts - free :].sum())
