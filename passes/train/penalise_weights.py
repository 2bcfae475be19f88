"""Add a term to the training loss that makes masked weights small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, fx, nn

from sparsify_compiler.masked import Masked
from sparsify_compiler.named import Named
from sparsify_compiler.passes.train import move_masks
from sparsify_compiler.passes.train._masked_weights import Aimed, aimed, mark_masked
from sparsify_compiler.passes.train._penalty import Penalty, check_weight
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region
from sparsify_compiler.training import Marked, Part, TrainingPass


@dataclass(frozen=True)
class PenaliseWeights(TrainingPass):
    """In training, add a loss of the weights of all masked layers, which knows how many of them are to be kept, times a weight that a schedule moves.

    Matches    linear(x, weight * mask, bias) and conv(x, weight * mask, bias, ...), mask a bool buffer, as mask_weights() leaves it
    Rewrites   nothing: it marks what hook.loss() of sc.attach() is made of
    Preserves  values
    Paper      none: the frame that HyperSparse (arXiv:2308.07163) fills in

    loss      a file of passes/train/weight_losses, with options of its own in parentheses
    weight    what the loss, a sum over all weights, is multiplied with
    schedule  a file of passes/train/schedules, of the number of steps, which multiplies the weight
    targets   selectors of linear and convolution sites; all that have a mask by default
    ignore    selectors of sites

    Weights that the mask has cut by then, and frozen ones, are not counted. To cut at the end, put move_masks(sparsity="after(start=...)") before it.
    """

    loss: str = "hyper_sparse"
    weight: float = 5e-6
    schedule: str = "constant"
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Named.parse("weight loss", self.loss)
        check_weight(self.weight, self.schedule, "penalise_weights")
        self.take_selectors("targets", "ignore")

    def run(self, program: Program, ctx: Context) -> Program:
        return mark_masked(self, program, ctx, self.targets, self.ignore)

    def tap(self, region: Region, name: str, node: fx.Node) -> Masked:
        return Masked()  # which stands nowhere: the weights are all that it looks at, and who moves the mask has the product

    def part(self, marked: Sequence[Marked]) -> Part:
        return Penalty(self.weight, self.schedule, partial(_terms, Named.parse("weight loss", self.loss), aimed(marked)))


def _terms(loss: Named, places: Sequence[Aimed]) -> Iterator[Tensor]:
    """One, of all layers together."""
    trained = [place for place in places if place.parameter.requires_grad]
    if trained:
        kept = sum(round(place.density * place.mask.numel()) for place in trained)
        yield loss([place.parameter[place.mask].float() for place in trained], kept)


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two linear layers with masks."""
    return move_masks.example()
