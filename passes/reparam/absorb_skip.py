"""A skip connection around a conv becomes a tap of its kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from sparsify_compiler.passes.reparam._branches import Branch, Conv, Identity, MergeBranches, Normed
from sparsify_compiler.passes.reparam._frames import Frame, Kernel
from sparsify_compiler.passes.reparam._norms import NORM, along, batch_statistics, by_input, norm, plus, scale_and_shift
from sparsify_compiler.passes_api import Miss
from sparsify_compiler.rule import Match, Rule, RulePass


@dataclass(frozen=True)
class AbsorbSkip(RulePass):
    """Absorb the skip around a conv into its kernel, a layer scale and a norm beside the conv too; run it after fold_batchnorm.

    Matches    x + conv(x, w, b), x + scale * conv(x, w, b), x + scale * (conv(x, w, b) - batch_norm(x, mean, var, g, beta, eps)), all of
               stride 1, and x + batch_norm(x, mean, var, g, beta, eps)
    Rewrites   conv(x, eye + scale * (w - diag(s)), scale * (b - t)), where s = g / sqrt(var + eps), t = beta - mean * s, and eye is 1 for
               each channel at the tap that reads the output's own place; and batch_norm with g + sqrt(var + eps), beta + mean
    Preserves  values, up to float reassociation
    Paper      Vasu et al., FastViT: A Fast Hybrid Vision Transformer using Structural Reparameterization, arXiv:2303.14189
    """

    about: ClassVar[frozenset[str]] = frozenset({"conv1d", "conv2d", "conv3d", "batch_norm"})

    def rules(self) -> Sequence[Rule]:
        found: list[Rule] = []
        for rank in (2, 1, 3):
            x, conv, normed = Identity(rank), Conv(rank), Normed(Identity(rank))
            found += [MergeBranches(conv, normed, -1), MergeBranches(conv, x), MergeBranches(Scaled(conv), x)]
            found += [MergeBranches(branch, x) for branch in (Normed(conv), ConvOfNorm(rank), Normed(ConvOfNorm(rank)))]
        return [*found, SkipAroundNorm()]


class Scaled(Branch):
    """Another branch times a constant: one number, or one for each channel."""

    def __init__(self, inner: Branch) -> None:
        super().__init__(inner.rank)
        self.inner, self.names = inner, (*inner.names, "scale")

    def write(self, x: Any, a: Any) -> Any:
        return self.inner.write(x, a) * a.scale

    def refuse(self, x: Any, a: Any) -> Miss | None:
        if isinstance(a.scale, Tensor) and a.scale.numel() != 1:
            channels, shape = a.w.shape[0], tuple(a.scale.shape)
            if math.prod(shape) != channels or len(shape) <= self.rank or shape[-1 - self.rank] != channels:
                return Miss(f"the scale {shape} is not one factor for each of the {channels} channels")
        return self.inner.refuse(x, a)

    def frame(self, a: Any) -> Frame:
        return self.inner.frame(a)

    def kernel(self, x: Tensor, a: Any) -> Kernel:
        inner = self.inner.kernel(x, a)
        scale = a.scale.reshape(-1) if isinstance(a.scale, Tensor) else a.scale
        weight = inner.weight * (along(scale, inner.weight, 0) if isinstance(scale, Tensor) else scale)
        return Kernel(weight, None if inner.bias is None else inner.bias * scale, inner.frame, inner.groups)


class ConvOfNorm(Conv):
    """A conv behind a norm, as in the paper's x + BN(dwconv(BN(x))): at the border its zeros are not those of x."""

    names = (*Conv.names, *(f"{name}_before" for name in NORM))

    def write(self, x: Any, a: Any) -> Any:
        return super().write(norm(x, *(getattr(a, f"{name}_before") for name in NORM)), a)

    def refuse(self, x: Any, a: Any) -> Miss | None:
        if x.ndim != self.rank + 2:
            return Miss(f"the norm's channels are not the conv's: the input has {x.ndim} dimensions, not {self.rank + 2}")
        if any(p > 0 for line in self.frame(a) for p in line.pads):
            return Miss(f"the conv pads by {a.padding} after the norm: at the border its zeros are not those of the skip's x")
        return batch_statistics(a.mean_before, a.var_before, a.training_before)

    def kernel(self, x: Tensor, a: Any) -> Kernel:
        s, t = scale_and_shift(a.mean_before, a.var_before, a.g_before, a.beta_before, a.eps_before)
        return Kernel(a.w * by_input(s, a.w, a.groups), plus((a.w * by_input(t, a.w, a.groups)).flatten(1).sum(1), a.b), self.frame(a), a.groups)


class SkipAroundNorm(Rule):
    """x + batch_norm(x): a norm of the same statistics."""

    params = ("mean", "var", "g", "beta")

    @staticmethod
    def pattern(x: Any, mean: Any, var: Any, g: Any, beta: Any, eps: Any, training: Any) -> Any:
        return x + norm(x, mean, var, g, beta, eps, training)

    def check(self, m: Match) -> Miss | None:
        return batch_statistics(m.mean, m.var, m.training)

    @staticmethod
    def rewrite(x: Tensor, mean: Tensor, var: Tensor, g: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
        deviation = torch.sqrt(var + eps)
        return batch_norm(x, mean, var, deviation + 1 if g is None else g + deviation, mean if beta is None else beta + mean, eps=eps)


class _RepMixer(nn.Module):
    """FastViT's token mixer as it is trained, without the norms that fold_batchnorm folds."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mixer = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.BatchNorm2d(channels)
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layer_scale * (self.mixer(x) - self.norm(x))
        return y


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A RepMixer block."""
    torch.manual_seed(0)
    return nn.Sequential(_RepMixer(4), nn.ReLU()).eval(), (torch.randn(2, 4, 8, 8),)
