"""Every router and every selector at the edges: one row, all alike, odd sizes, all experts, none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from sparsify_compiler import catalog
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.passes.activation.select_neurons import GatedFfn
from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program

ROUTERS, SELECTORS = catalog.names("router"), catalog.names("expert selector")
EVERY = [*((router, "top_k") for router in ROUTERS), *(("ridge", selector) for selector in SELECTORS if selector != "top_k")]
WIDTH, HIDDEN, EXPERTS = 7, 23, 5  # none divides another


def mixture(router: str, selector: str, density: float, shared: float = 0.1) -> tuple[nn.Module, Program, nn.Module]:
    torch.manual_seed(0)
    model, x = GatedFfn(WIDTH, HIDDEN).eval(), torch.randn(2, 30, WIDTH)
    split = SplitExperts(EXPERTS, "activity_kmeans", router, selector, shared, repair="none", density=density)
    program = Pipeline((split,)).run(capture(model, (x,), {"x": {0: "texts", 1: "rows"}}), Context(batches=[(x,)]))
    return model, program, instantiate(program)


class Seen(fx.Interpreter):
    """Runs a graph and keeps what its experts_ffn was given, and gave."""

    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        if node.target is experts_ffn.op:
            self.given = {name: self.env[one] if isinstance(one, fx.Node) else one for name, one in node.kwargs.items()}
            self.gave = value
        return value


def by_hand(given: dict[str, Tensor]) -> Tensor:
    """What the op is to give, row by row and expert by expert."""
    x, chosen = given["x"].flatten(0, -2), given["chosen"].flatten(0, -2)
    found = torch.zeros(x.shape[0], given["down"].shape[1])
    for row, experts in enumerate(chosen.tolist()):
        for expert in experts:
            if expert >= 0:
                neurons = nn.functional.silu(given["gate"][expert] @ x[row]) * (given["up"][expert] @ x[row])
                found[row] += given["down"][expert] @ neurons
    return found.reshape(*given["x"].shape[:-1], -1)


@pytest.mark.parametrize(("router", "selector"), EVERY)
def test_every_choice_is_computed_whatever_the_rows(router: str, selector: str) -> None:
    _, program, module = mixture(router, selector, 0.5)
    torch.manual_seed(1)
    alike = torch.randn(1, 1, WIDTH)
    for x in (torch.randn(1, 1, WIDTH), torch.randn(3, 11, WIDTH), alike.expand(2, 9, -1), torch.zeros(1, 4, WIDTH),
              1e4 * torch.randn(1, 5, WIDTH)):
        seen = Seen(program.regions[""].module)
        seen.run(x)
        assert module(x).shape == x.shape
        assert bool(module(x).isfinite().all())
        chosen = seen.given["chosen"].flatten(0, -2)
        assert all(len({*own} - {-1}) == len([one for one in own if one >= 0]) for own in chosen.tolist()), "none twice in a row"
        assert bool(((chosen >= -1) & (chosen < EXPERTS)).all())
        torch.testing.assert_close(seen.gave, by_hand(seen.given), rtol=1e-4, atol=1e-5 * max(1.0, float(x.abs().max()) ** 2))
    if selector != "expert_choice":
        x = torch.randn(2, 6, WIDTH)
        torch.testing.assert_close(module(x)[1:], module(x[1:]), rtol=1e-4, atol=1e-6)  # a row does not know the others


@pytest.mark.parametrize(("router", "selector"), EVERY)
def test_all_experts_are_the_dense_ffn_on_rows_that_calibration_never_saw(router: str, selector: str) -> None:
    model, _, module = mixture(router, selector, 1.0)
    for x in (torch.randn(3, 5, WIDTH), torch.zeros(1, 2, WIDTH), 100 * torch.randn(1, 4, WIDTH)):
        torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5 * max(1.0, float(x.abs().max()) ** 2))


def test_a_row_that_reaches_no_expert_has_what_is_shared_alone() -> None:
    model, program, _ = mixture("ridge", "threshold", 0.5, shared=0.0)
    limit = next(name for name, one in program.regions[""].module.named_buffers() if "limit" in name)
    module = instantiate(program)
    module.state_dict()[limit].fill_(torch.inf)
    x = torch.randn(2, 3, WIDTH)
    bias = model.down.bias if getattr(model.down, "bias", None) is not None else torch.zeros(WIDTH)  # type: ignore[union-attr]
    torch.testing.assert_close(module(x), bias.expand_as(x))
