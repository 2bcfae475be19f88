"""FATReLU: ReLU whose small results are zero as well (Kurtz et al., ICML 2020; ProSparse, arXiv:2402.13516, section 3.2)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from sparsify_compiler.ops import select
from sparsify_compiler.passes.activation.functions._base import Activation


def fatrelu(*, threshold: float = 0.01) -> Activation:
    """x where x >= threshold, else 0. The threshold is a buffer, which schedule_threshold() moves in training."""

    def formula(x: Tensor, limit: Tensor) -> Tensor:
        y: Tensor = select.op(functional.relu(x), limit)
        return y

    return Activation(formula, {"limit": threshold})
