"""Prune the projections of an FFN together: towards what the whole FFN computes, not each layer towards its own output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparsify_compiler.errors import BudgetError, StructureError
from sparsify_compiler.passes.prune._apply import Result, apply, leave_dense, sources_of
from sparsify_compiler.passes.prune._ffn import Ffn, find
from sparsify_compiler.passes.prune._layers import Layer
from sparsify_compiler.passes.prune.repairs._base import Cut, damped
from sparsify_compiler.passes.prune.repairs.obs import obs
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.prune.structures.unstructured import Unstructured
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Stage
from sparsify_compiler.sweep import Sweep

STEPS = 3  # of Gauss-Newton for what feeds the activation, in one round


@dataclass(frozen=True)
class AlternateFfn(Pass):
    """Alternate between the weights of an FFN, cut by OBS, and what its up, gate and hidden channels should be on the calibration rows.

    Matches    down(act(up(x))) and down(act(gate(x)) * up(x)), whose weights nobody else reads
    Rewrites   each weight to weight * mask, mask a bool buffer beside the weight
    Preserves  signature; quality is measured
    Paper      SparseLLM: Towards Global Pruning for Pre-trained Language Models, arXiv:2402.17946, section 3

    From the dense FFN's values on the rows that reach it through the layers cut before, each round solves in turn for: the weights, least squares
    towards the present values and cut by OBS; the hidden channels, in closed form between what makes them and what down should give; what feeds
    the activation, by Gauss-Newton. The round of smallest error of the FFN's output is taken; before the first one it is SparseGPT's.

    structure  as of mask_weights;  density  kept / total, by default the structure's own or the user's budget
    rounds     of the alternation;  trust  weight of the hidden channels' fit to what makes them, against the FFN's output
    damping    of the Gram matrices, as a share of their mean diagonal
    targets    selectors of FFNs
    """

    structure: Structure | str = field(default_factory=Unstructured)
    density: float | None = None
    rounds: int = 4
    trust: float = 1.0
    damping: float = 0.01
    targets: tuple[str, ...] = ("ffn",)

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    gives_stage: ClassVar[Stage | None] = Stage.SPARSE

    def __post_init__(self) -> None:
        if isinstance(self.structure, str):
            object.__setattr__(self, "structure", Structure.parse(self.structure))
        self.check_density(self.density)
        if self.rounds < 0 or self.trust <= 0:
            raise BudgetError("rounds are 0 or more, and trust lies above 0", where="alternate_ffn")

    def own_density(self) -> float | None:
        assert isinstance(self.structure, Structure)
        return self.density if self.density is not None else self.structure.density

    def run(self, program: Program, ctx: Context) -> Program:
        density = self.density_of(ctx)
        ffns, left = find(program, self.targets, ctx)
        for site in left:
            leave_dense(site, program, ctx)
        sweep = Sweep(program, ctx.batches or ()) if ffns else None
        for number, ffn in enumerate(ffns):
            if sweep is None or not ctx.spend():
                break
            x = sweep.gather({ffn.up.uses[0].op: ("rows",)})[ffn.up.uses[0].op]["rows"]
            for layer, result in zip((*ffn.makers, ffn.down), self._cut(ffn, x, density), strict=True):
                for source in sources_of(layer):
                    sweep.replace(source, result.whole(layer.weight))
                apply(layer, result, str(self.structure), density, program)
            ctx.progress("alternate ffn", number + 1, len(ffns))
        return program

    def _cut(self, ffn: Ffn, x: Tensor, density: float) -> list[Result]:
        """What becomes of the makers and of down; x [rows, in] is what they read."""
        made = [ffn.of(layer, x) for layer in ffn.makers]  # what feeds the activation: up's output, and gate's
        hidden = ffn.hidden(*made)
        wanted = ffn.of(ffn.down, hidden)
        best: tuple[float, list[Result]] | None = None
        for step in range(self.rounds + 1):
            cut = [self._obs(layer, x, value - ffn.bias(layer), density) for layer, value in zip(ffn.makers, made, strict=True)]
            reached = [x @ done.whole(layer.weight).to(x).T + ffn.bias(layer) for layer, done in zip(ffn.makers, cut, strict=True)]
            real = ffn.hidden(*reached)
            cut.append(self._obs(ffn.down, real, wanted - ffn.bias(ffn.down), density))
            weight = cut[-1].whole(ffn.down.weight).to(x)
            error = float((real @ weight.T + ffn.bias(ffn.down) - wanted).square().sum())
            if best is None or error < best[0]:
                best = error, cut
            if step < self.rounds:
                hidden = self._hidden(weight, wanted - ffn.bias(ffn.down), real)
                made = _gauss_newton(ffn, made, reached, hidden, self.trust)
        assert best is not None
        return best[1]

    def _obs(self, layer: Layer, x: Tensor, wanted: Tensor, density: float) -> Result:
        """The layer cut so that it gives `wanted` [rows, out] on x, as nearly as may be."""
        assert isinstance(self.structure, Structure)
        gram = x.T @ x
        weight = layer.weight.detach().to(x)
        matrix, factor, _ = damped(gram, self.damping, x.dtype)
        target = wanted.T @ x + weight * (matrix - gram).diagonal()
        found = obs(Cut(torch.cholesky_solve(target.T, factor).T, None, self.structure, density, {"patch_gram": gram}), damping=self.damping)
        if not bool(found.weight.isfinite().all()):
            raise StructureError("OBS gave NaN or infinity", where=layer.path, hint="raise the damping, or give more calibration batches")
        return Result(found.mask, found.weight.to(layer.weight.dtype), note=found.note)

    def _hidden(self, weight: Tensor, wanted: Tensor, made: Tensor) -> Tensor:
        """argmin over h of ||h weight^T - wanted||^2 + trust * s * ||h - made||^2, s the mean squared norm of weight's columns."""
        matrix = weight.T @ weight
        pull = self.trust * float(matrix.diagonal().mean())
        matrix.diagonal().add_(max(pull, torch.finfo(matrix.dtype).tiny))
        return torch.cholesky_solve((wanted @ weight + pull * made).T, torch.linalg.cholesky(matrix)).T


def _gauss_newton(ffn: Ffn, made: list[Tensor], reached: list[Tensor], hidden: Tensor, trust: float) -> list[Tensor]:
    """For each number of its own: min over z of ||z - reached||^2 + trust * (hidden - f(z))^2, f the activation, and with a gate the product."""
    now = made
    for _ in range(STEPS):
        value, slopes = ffn.slopes(now)
        push = [r - z + trust * (hidden - value) * slope for r, z, slope in zip(reached, now, slopes, strict=True)]
        along = sum(p * slope for p, slope in zip(push, slopes, strict=True))
        curve = 1 + trust * sum(slope.square() for slope in slopes)
        then = [z + p - trust * slope * along / curve for z, p, slope in zip(now, push, slopes, strict=True)]
        better = _misfit(ffn, then, reached, hidden, trust) < _misfit(ffn, now, reached, hidden, trust)
        now = [torch.where(better, new, old) for new, old in zip(then, now, strict=True)]
    return now


def _misfit(ffn: Ffn, made: list[Tensor], reached: list[Tensor], hidden: Tensor, trust: float) -> Tensor:
    return torch.stack([(r - z).square() for r, z in zip(reached, made, strict=True)]).sum(0) + trust * (hidden - ffn.hidden(*made)).square()


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An FFN."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).eval(), (torch.randn(40, 16),)
