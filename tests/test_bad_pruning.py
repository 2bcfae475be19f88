"""What a user may give to any method of pruning: zero rows and layers, one sample, sizes that do not divide, tied, shared, quantised, packed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.errors import ModelError, StructureError
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program, get_tensor

METHODS = ["magnitude", "wanda", "ria", "sparsegpt", "dsnot", "icbs", "oats", "snip", "movement", "sparsellm", "aligned"]
every_method = pytest.mark.parametrize("method", METHODS)


def net(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width), nn.Linear(width, 8)).eval()


def batches(count: int = 3, rows: int = 20, width: int = 16) -> list[tuple[Tensor, ...]]:
    return [(torch.randn(rows, width, generator=torch.Generator().manual_seed(i)),) for i in range(count)]


def run(model: nn.Module, recipe: Pipeline, given: Any = None) -> tuple[Program, Context]:
    given = batches() if given is None else given
    ctx = Context(density=0.5, batches=given)
    ctx.calibrate = lambda program, needs: calibrate(program, given, needs, cache=False)
    return recipe.run(capture(model, given[0]), ctx, ()), ctx


def finite(program: Program, given: Any = None) -> bool:
    with torch.no_grad():
        return all(bool(instantiate(program)(*batch).isfinite().all()) for batch in given or batches())


@every_method
def test_zero_rows_zero_columns_and_inputs_that_are_always_zero(method: str) -> None:
    model, given = net(), batches()
    with torch.no_grad():
        model[0].weight[3:9] = 0
        model[0].bias[3:9] = 0
        model[2].weight[:, 20:] = 0
    for (x,) in given:
        x[:, 5] = 0
    after, _ = run(model, getattr(sc.recipes, method)(), given)
    assert finite(after, given)
    sizes = {"0": 16 * 32, "2": 32 * 16, "3": 16 * 8}
    assert 0.4 < sum(after.decisions[site].density * size for site, size in sizes.items()) / sum(sizes.values()) < 0.6


@every_method
def test_a_layer_of_zeros_stays_and_says_so(method: str) -> None:
    model = net()
    nn.init.zeros_(model[3].weight)
    after, ctx = run(model, getattr(sc.recipes, method)())
    assert finite(after)
    assert any(miss.at == "3" and "zero" in miss.why for miss in ctx.misses)
    assert after.decisions["3"].structure == "dense"


@every_method
def test_one_sample_of_one_row(method: str) -> None:
    """The Gram matrix has rank one: it is damped."""
    given = batches(1, 1)
    after, _ = run(net(), getattr(sc.recipes, method)(), given)
    assert finite(after, given)
    assert any(row.structure != "dense" for row in after.decisions.values())


@pytest.mark.parametrize("method", ["sparsegpt", "aligned"])
def test_a_gram_matrix_that_cannot_be_inverted_is_told(method: str) -> None:
    """Twice the same input: with next to no damping Cholesky refuses, the damping grows, and the report knows."""
    from dataclasses import replace

    given = batches(1, 4)
    item: Any = getattr(sc.recipes, method)().passes[0]
    _, ctx = run(net(), Pipeline((replace(item, repair="obs(damping=0.0)" if method == "sparsegpt" else "aligned(damping=0.0)"),)), given)
    assert any("singular" in miss.why and "damped by" in miss.why for miss in ctx.misses)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "icbs", "sparsellm", "aligned"])
def test_groups_that_do_not_divide_are_refused_or_padded(method: str) -> None:
    model, given = net(18), batches(width=18)
    recipe = getattr(sc.recipes, method)
    with pytest.raises(StructureError, match="inputs do not divide"):
        run(model, recipe("2:4"), given)
    after, _ = run(model, recipe("NM(n=2, m=4, padded=True)"), given)
    assert finite(after, given)
    mask = get_tensor(after.regions[""].module, "0.weight_mask")
    assert mask.view(32, 18)[:, :16].reshape(32, 4, 4).sum(2).eq(2).all()
    assert mask[:, 16:].all()


@every_method
def test_tied_and_shared_weights(method: str) -> None:
    """The head is the embedding: left. One layer is called twice: cut once."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.shared, self.head = nn.Embedding(24, 16), nn.Linear(16, 16), nn.Linear(16, 24, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.shared(self.shared(self.embed(tokens)).relu()).relu())

    given = [(torch.randint(0, 24, (2, 9), generator=torch.Generator().manual_seed(i)),) for i in range(2)]
    after, ctx = run(Tied().eval(), getattr(sc.recipes, method)(), given)
    assert finite(after, given)
    assert any("tied" in miss.why and miss.at == "head" for miss in ctx.misses)
    assert len([name for name in instantiate(after).state_dict() if name.endswith("_mask")]) == 1


def test_quantised_weights_are_refused_or_left() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}, dtype=torch.qint8)
    for model in (quantised, quantised.eval()):
        with pytest.raises(ModelError, match=r"(?s)quantised.*dense floating-point"):
            sc.compile(model, batches()[0], recipe="magnitude", budget=sc.Budget(density=0.5))

    class Int8(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randint(-8, 8, (32, 16), dtype=torch.int8))
            self.out = nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(nn.functional.linear(x, self.weight.float()))

    after, ctx = run(Int8().eval(), sc.recipes.magnitude())
    assert len(ctx.misses) == 1
    assert after.decisions["out"].density == 0.5


def test_what_is_packed_is_not_cut_again() -> None:
    packed = Pipeline.parse("mask_weights(structure='16x1', density=0.5) | pack()").run(capture(net(), batches()[0]), Context(), ())
    with pytest.raises(ModelError, match=r"(?s)compiled already.*made of"):
        sc.compile(CompiledModel(packed), batches()[0], recipe="magnitude", budget=sc.Budget(density=0.5))
