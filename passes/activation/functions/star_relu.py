"""StarReLU: squared ReLU brought to mean 0 and variance 1 by a scale and an offset (MetaFormer Baselines, arXiv:2210.13452, section 3.4)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from sparsify_compiler.passes.activation.functions._base import Activation


def star_relu(*, scale: float = 0.8944, offset: float = -0.4472, learned: bool = True) -> Activation:
    """scale * max(x, 0)² + offset. Zero becomes the offset; once trained, sc.reparameterize() takes both numbers into the down projection of an
    FFN without a gate, and exact zeros are left.

    learned  whether the two numbers are trained
    """

    def formula(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return functional.relu(x).square() * scale + offset

    return Activation(formula, {"scale": scale, "offset": offset}, learned=learned)
