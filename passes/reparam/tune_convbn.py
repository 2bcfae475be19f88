"""Fine-tuning with BatchNorm's statistics fixed: the norm moves into the weights, which stay trainable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d

from sparsify_compiler.passes.reparam.fold_batchnorm import ConvThenNorm, LinearThenNorm, TransposedThenNorm
from sparsify_compiler.rule import Rule, RulePass


@dataclass(frozen=True)
class TuneConvbn(RulePass):
    """Compute a conv's weight with the norm in it on the fly, so that training keeps no normalised copy of the activations.

    Matches    batch_norm(conv(x, w, b), mean, var, g, beta, eps), mean and var fixed; conv, transposed conv or linear
    Rewrites   with s = g / sqrt(var + eps), computed at every step from the parameters: conv(x, w * s, b * s + beta - mean * s)
    Preserves  values, up to float reassociation; gradients of x, w, b, g and beta too
    Paper      You et al., Efficient ConvBN Blocks for Transfer Learning and Beyond, arXiv:2305.11624 (Tune mode)

    The arithmetic on weights stays in the graph: training what `call.instantiate` gives updates w, b, g and beta as in the unfused model
    (folded into one weight, the steps would be others, and unstable: the paper's Deploy mode). Afterwards any folding pass or
    `fold.fold_all` makes a plain conv of it. Worth it where activations outweigh weights: the conv's output is no longer kept for the
    backward pass, the scaled weight is.
    """

    about: ClassVar[frozenset[str]] = frozenset({"batch_norm"})

    def rules(self) -> Sequence[Rule]:
        plain, transposed = (conv1d, conv2d, conv3d), (conv_transpose1d, conv_transpose2d, conv_transpose3d)
        return [TuneLinear(), *map(TuneConv, plain), *map(TuneTransposed, transposed)]


class TuneLinear(LinearThenNorm):
    """On [batch, features]."""

    folds = False


class TuneConv(ConvThenNorm):
    """A conv of any number of dimensions and groups."""

    folds = False


class TuneTransposed(TransposedThenNorm):
    """A transposed conv."""

    folds = False


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A conv and its norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    norm = model[1]
    for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
    return model.eval(), (torch.randn(2, 3, 8, 8),)
