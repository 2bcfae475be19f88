"""Thresholded SiLU: SiLU whose results of small magnitude are zero (CATS, arXiv:2404.08763, section 4)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from sparsify_compiler.ops import select
from sparsify_compiler.passes.activation.functions._base import Activation


def thresholded_silu(*, threshold: float = 0.1) -> Activation:
    """silu(x) where |silu(x)| >= threshold, else 0. The threshold is a buffer; select_neurons() calibrates one for a density instead."""

    def formula(x: Tensor, limit: Tensor) -> Tensor:
        y: Tensor = select.op(functional.silu(x), limit)
        return y

    return Activation(formula, {"limit": threshold})
