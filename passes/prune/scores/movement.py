"""Movement: weights that training moves away from zero matter (Sanh et al., arXiv:2005.07683, equation 3)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

STATISTICS: tuple[str, ...] = ("movement",)


def movement(weight: Tensor, statistics: Mapping[str, Tensor], seed: int) -> Tensor:
    """The sum over training steps of -g * W, of the weight's shape; negative for what training moves towards zero.

    The sum comes from a `Movement` around the user's training loop, through compile(known=...). Without one it is that of the calibration batches
    at the weights as they are.
    """
    return statistics["movement"].to(weight.device)
