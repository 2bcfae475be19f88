"""Learn the masks of weights that stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.errors import ParseError
from sparsify_compiler.masked import Masked, gate_products, tap_product
from sparsify_compiler.named import Named
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train._chosen import Chosen
from sparsify_compiler.passes.train._frozen import freeze
from sparsify_compiler.passes.train._learner import Learner
from sparsify_compiler.passes.train.choosers._base import Chooser
from sparsify_compiler.passes.train.move_masks import masked_sites
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, Site, get_tensor, set_tensor
from sparsify_compiler.selectors import select
from sparsify_compiler.training import Marked, Part, TrainingPass


@dataclass(frozen=True)
class LearnMasks(TrainingPass):
    """Freeze the weights, and let scores learn which of them are kept, within the structure and at the density of the mask that is there.

    Matches    linear(x, weight * mask, bias) and conv(x, weight * mask, bias, ...), mask a bool buffer, as mask_weights() leaves it;
               y * (gate * mask), as gate_channels() leaves it
    Rewrites   nothing: it marks the masks that hook.step() of sc.attach() moves, and freezes
    Preserves  values
    Paper      none: the frame that MaskLLM (arXiv:2409.17481), Lottery Jackpots (arXiv:2104.08700), PST (arXiv:2205.11005) and PAT
               (arXiv:2408.14721) fill in

    chooser    a file of passes/train/choosers with its options, "gumbel(prior=3.0)" or "top_k": its scores are among the module's parameters
    until      the step of the last choice. From there on the mask stays, and forward passes of training multiply with it too, as all others do
    every      steps between two choices
    reward     weight of the sum of the squares of the weights, as a training pass multiplies with them, taken off the loss; it falls to 0 in a line
               (MaskLLM's sparse weight regularization)
    freeze     everything that the graphs hold; False: the masked weights alone
    sparsity   a schedule that multiplies the layer's sparsity, "cubic(end=700)", for choosers whose masks can thin out: factored, top_k(power=0.0)
    structure  of the masks; None for that with which mask_weights() made them (unstructured, where the mask was there)
    seed       of noise
    of         the masks of "weights" or of "gates"
    targets    selectors of linear and convolution sites, or of gates by their names; all that have a mask by default
    ignore     selectors of sites whose masks stay

    A weight that add_adapters(), behind this pass, makes of a frozen one and an adapter inside of the mask is chosen from as well.
    The mask is always one of the structure, and a forward pass without gradients (an evaluation, compile()) multiplies with it alone. Scores that are
    not finite leave it as it is. An optimizer's weight decay pulls scores to 0, the same for all, so that it should be 0 for them.
    """

    chooser: str = "gumbel"
    until: int = 1000
    every: int = 1
    reward: float = 0.0
    freeze: bool = True
    sparsity: str = "constant"
    structure: Structure | str | None = None
    seed: int = 0
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    of: Literal["weights", "gates"] = "weights"

    def __post_init__(self) -> None:
        Named.parse("schedule", self.sparsity)(0)
        thins = self.made().thins
        if self.sparsity != "constant" and not thins:
            raise ParseError(f"the masks of {self.chooser} do not thin out", where="learn_masks", hint="sparsity='constant', or the chooser factored")
        if isinstance(self.structure, str):
            object.__setattr__(self, "structure", Structure.parse(self.structure))
        if self.every < 1 or self.until < 1:
            raise ParseError(f"every and until are 1 or more, got {self.every} and {self.until}", where="learn_masks")
        if self.of not in ("weights", "gates"):
            raise ParseError(f"of is 'weights' or 'gates', not {self.of!r}", where="learn_masks")
        if not 0 <= self.reward < float("inf"):
            raise ParseError(f"reward is a number of 0 or more, got {self.reward}", where="learn_masks")
        self.take_selectors("targets", "ignore")

    def made(self) -> Chooser:
        """The chooser with its options."""
        found: Chooser = Named.parse("chooser", self.chooser)()
        return found

    def run(self, program: Program, ctx: Context) -> Program:
        for region, site, product, weight in list(self._products(program, ctx)):
            before = ctx.rewrites
            self.mark(product, site, ctx)
            if ctx.rewrites > before and self.freeze:
                freeze(program, ())
            elif ctx.rewrites > before:
                set_tensor(region.module, weight, nn.Parameter(get_tensor(region.module, weight).detach(), requires_grad=False))
        return program

    def _products(self, program: Program, ctx: Context) -> Iterator[tuple[Region, Site, fx.Node, str]]:
        """The products whose masks are learnt, with their sites and the names of what is masked."""
        if self.of == "gates":
            found = {region.qualified(gate): (region, product, gate)
                     for region in program.regions.values() for product, gate in gate_products(region)}
            sites = [Site("gate", path, region.path, {}) for path, (region, _, _) in found.items()]
            for site in select(sites, self.targets, self.ignore) if found else ():
                region, product, gate = found[site.path]
                yield region, site, product, gate
            if not found:
                ctx.miss("the model has no gates")
            return
        for region, site, masked in masked_sites(program, ctx, self.targets, self.ignore):
            yield region, site, masked.product, masked.weight

    def tap(self, region: Region, name: str, node: fx.Node) -> Masked:
        found = _choice_of(region, node)
        if found is not None:  # the same weight and mask, multiplied twice, have one choice
            return tap_product(region, found[0], node, lambda weight: found[1])
        return tap_product(region, name, node, lambda weight: Chosen(self.made(), weight))

    def part(self, marked: Sequence[Marked]) -> Part:
        return Learner(self, marked)


def _choice_of(region: Region, product: fx.Node) -> tuple[str, Chosen] | None:
    """What stands for a product of the same two tensors already, and its name."""
    names = sorted(str(source.target) for source in product.all_input_nodes)
    for node in region.graph.nodes:
        if node.op == "call_module" and sorted(str(source.target) for source in node.all_input_nodes) == names:
            made = region.module.get_submodule(str(node.target))
            if isinstance(made, Chosen):
                return str(node.target), made
    return None


class _Example(nn.Module):
    """A linear layer with a 2:4 mask, and one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8)
        self.register_buffer("up_mask", torch.tensor([True, False, False, True]).repeat(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.up_mask, Tensor)
        y: Tensor = self.down(nn.functional.linear(x, self.up.weight * self.up_mask, self.up.bias).relu())
        return y


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A linear layer with a mask, and one after it."""
    torch.manual_seed(0)
    return _Example().eval(), (torch.randn(2, 16),)
