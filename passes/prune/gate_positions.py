"""Multiply the places of each convolution's image with a gate each, the same for all of its filters, of which some are shut."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.passes.prune._gates import gate, put_gate
from sparsify_compiler.passes.prune.structures._base import keep_top
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Region
from sparsify_compiler.sites import chosen_sites, fitting_ops


@dataclass(frozen=True)
class GatePositions(Pass):
    """Shut some places of the image that a convolution gives, in all of its filters at once: columns of the product that it is computed as.

    Matches    conv(x, w, b), of images of known size
    Rewrites   conv(x, w, b) * (gate * mask), gate float, 1 at first, and mask bool, [1, 1, height, width]
    Preserves  signature; quality is measured
    Paper      Accelerating Deep Neural Networks via Semi-Structured Activation Sparsity, Grimaldi et al., arXiv:2309.06626

    density  open / all places of each convolution; by default the user's budget
    seed     of the places that are open at first, which the convolutions of images of one size have in common (it reaches across layers, so that
             an image loses the same places in all of them)
    targets  selectors of convolution sites; all by default
    ignore   selectors of convolution sites

    learn_masks(of="gates") lets the places be learnt. A convolution that gives a single place stays.
    """

    density: float | None = None
    seed: int = 0
    targets: tuple[str, ...] = ("conv",)
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    idempotent: ClassVar[bool] = False  # a second time puts gates behind gates

    def __post_init__(self) -> None:
        self.check_density(self.density)
        self.take_selectors("targets", "ignore")

    def run(self, program: Program, ctx: Context) -> Program:
        density = self.density_of(ctx)
        sites = chosen_sites(program, ("conv",), self.targets, self.ignore)
        for site, region, conv in fitting_ops(program, sites, ctx, "convolution", _unfit):
            value: Tensor = conv.meta["val"]
            mask = self._open(tuple(value.shape[2:]), density).to(value.device)
            gate(conv, put_gate(region, conv, site.path, mask, value.dtype, self.name()), self.name())
        return program

    def _open(self, places: tuple[int, ...], density: float) -> Tensor:
        """bool [1, 1, ...]: as many as make the density, at least one."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {places}".encode()))
        drawn = torch.rand(1, torch.Size(places).numel(), generator=generator, dtype=torch.float32)
        return keep_top(drawn, max(1, round(density * drawn.numel()))).view(1, 1, *places)


def _unfit(region: Region, conv: fx.Node) -> str | None:
    value: Tensor = conv.meta["val"]
    places = value.shape[2:]
    if conv.kwargs["weight"].meta["val"].dim() != value.dim():  # type: ignore[union-attr]
        return "its input is no batch"
    if not all(isinstance(size, int) for size in places):
        return "the size of its image is not fixed"
    return "it gives a single place" if places.numel() == 1 else None


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two convolutions."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3)).eval(), (torch.randn(2, 3, 8, 8),)
