"""Add a term of the weights themselves to the training loss."""

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
from sparsify_compiler.passes.train.move_masks import KINDS
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region
from sparsify_compiler.sites import chosen_sites
from sparsify_compiler.training import Marked, Part, TrainingPass


@dataclass(frozen=True)
class PenaliseWeights(TrainingPass):
    """In training, add a loss of the weights of all masked layers, which knows how many are to be kept, times a weight that a schedule moves.

    Matches    linear(x, weight * mask, bias) and conv(x, weight * mask, bias, ...), mask a bool buffer, as mask_weights() leaves it;
               with masked=False linear(x, weight, bias) and conv(x, weight, bias, ...), weight a parameter
    Rewrites   nothing: it marks what hook.loss() of sc.attach() is made of
    Preserves  values
    Paper      none: the frame that HyperSparse (arXiv:2308.07163) and PAT's Identity Loss (arXiv:2408.14721) fill in

    loss      a file of passes/train/weight_losses, with options of its own in parentheses
    weight    what the loss, a sum over all weights, is multiplied with
    schedule  a file of passes/train/schedules, of the number of steps, which multiplies the weight
    masked    False: of layers without a mask, as the matrices that they are, rather than as the list of what a mask keeps
    targets   selectors of linear and convolution sites; all that have a mask (or have none) by default
    ignore    selectors of sites

    Weights that the mask has cut by then, and frozen ones, are not counted. To cut at the end, put move_masks(sparsity="after(start=...)") before it.
    """

    loss: str = "hyper_sparse"
    weight: float = 5e-6
    schedule: str = "constant"
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    masked: bool = True

    def __post_init__(self) -> None:
        Named.parse("weight loss", self.loss)
        check_weight(self.weight, self.schedule, "penalise_weights")
        self.take_selectors("targets", "ignore")

    def run(self, program: Program, ctx: Context) -> Program:
        if self.masked:
            return mark_masked(self, program, ctx, self.targets, self.ignore)
        for site in chosen_sites(program, KINDS, self.targets, self.ignore):
            node = program.regions[site.region].node(site.roles["op"])
            source = node.kwargs.get("weight")
            if isinstance(source, fx.Node) and source.op == "get_attr":
                self.mark(node, site, ctx)
            else:
                ctx.miss("its weight is computed, or has a mask", site.path)
        return program

    def tap(self, region: Region, name: str, node: fx.Node) -> Masked:
        return Masked()  # which stands nowhere: the weights are all that it looks at, and who moves the mask has the product

    def part(self, marked: Sequence[Marked]) -> Part:
        loss = Named.parse("weight loss", self.loss)
        whole = {id(one.tensors["weight"]): one.tensors["weight"] for one in marked if not self.masked}  # a layer that is called twice has one
        terms = partial(_terms, loss, aimed(marked)) if self.masked else partial(_whole, loss, list(whole.values()))
        return Penalty(self.weight, self.schedule, terms)


def _whole(loss: Named, weights: Sequence[Tensor]) -> Iterator[Tensor]:
    """One, of all layers together."""
    trained = [weight.float() for weight in weights if weight.requires_grad]
    if trained:
        yield loss(trained, sum(weight.numel() for weight in trained))


def _terms(loss: Named, places: Sequence[Aimed]) -> Iterator[Tensor]:
    """One, of all layers together."""
    trained = [place for place in places if place.parameter.requires_grad]
    if trained:
        kept = sum(round(place.density * place.mask.numel()) for place in trained)
        yield loss([place.parameter[place.mask].float() for place in trained], kept)


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two linear layers with masks."""
    return move_masks.example()
