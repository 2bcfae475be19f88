"""Activations with exact zeros: what each computes, that it trains, and that kernels skip its zeros exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsify_compiler as sc
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import ParseError, UnknownNameError
from sparsify_compiler.passes.activation.replace_activation import ReplaceActivation
from sparsify_compiler.passes.activation.select_neurons import GatedFfn
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program
from sparsify_compiler.sites import find_sites

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu, "relu2": lambda x: functional.relu(x) ** 2, "drelu": functional.relu, "shifted_relu": lambda x: functional.relu(x - 1),
    "shifted_relu(shift=0.25, learned=False)": lambda x: functional.relu(x - 0.25),
    "fatrelu(threshold=0.3)": lambda x: torch.where(x >= 0.3, x, 0), "star_relu": lambda x: 0.8944 * functional.relu(x) ** 2 - 0.4472,
    "thresholded_silu(threshold=0.2)": lambda x: torch.where(functional.silu(x).abs() >= 0.2, functional.silu(x), 0),
}  # fmt: skip
every = pytest.mark.parametrize("to", list(FORMULAS))


class Plain(nn.Module):
    """down(gelu(up(x)))"""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(functional.gelu(self.up(x)))
        return y


def models(gated: bool, bias: bool = True) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return (GatedFfn(16, 32, bias) if gated else Plain()).eval(), torch.randn(5, 16)


def rewritten(to: str, net: nn.Module, x: Tensor) -> tuple[Program, Context]:
    ctx = Context()
    return Pipeline((ReplaceActivation(to),)).run(capture(net, (x,)), ctx, ()), ctx


def expected(net: nn.Module, x: Tensor, to: str) -> Tensor:
    act = FORMULAS[to]
    if isinstance(net, Plain):
        y: Tensor = net.down(act(net.up(x)))
        return y
    assert isinstance(net, GatedFfn)
    up = net.up(x)
    gated: Tensor = net.down(act(net.gate(x)) * (functional.relu(up) if to == "drelu" else up))
    return gated


@every
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_each_is_its_formula_and_trains(to: str, gated: bool, bias: bool) -> None:
    net, x = models(gated, bias)
    program, ctx = rewritten(to, net, x)
    module = instantiate(program)
    torch.testing.assert_close(module(x), expected(net, x, to))
    assert ctx.rewrites == 1
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
    learned = {name.rpartition(".")[2] for name, _ in module.named_parameters()} - {"weight", "bias"}
    assert ("scale_folded" in learned) == (to == "star_relu")


@every
def test_what_comes_of_it_is_an_ffn_that_can_be_replaced_again(to: str) -> None:
    net, x = models(True)
    program, _ = rewritten(to, net, x)
    site, = find_sites(program, ("ffn",))
    assert site.facts["gated"]
    again = Pipeline((ReplaceActivation("relu2"),)).run(program, Context(), ())
    if "shifted" not in to:  # whose shift stays in the bias
        torch.testing.assert_close(instantiate(again)(x), expected(net, x, "relu2"))
    assert len(find_sites(again, ("ffn",))) == 1


def test_a_square_that_is_a_product_is_an_activation_too() -> None:
    class Squared(Plain):
        def forward(self, x: Tensor) -> Tensor:
            h = functional.relu(self.up(x))
            y: Tensor = self.down(h * h)
            return y

    torch.manual_seed(0)
    site, = find_sites(capture(Squared().eval(), (torch.randn(3, 16),)), ("ffn",))
    assert not site.facts["gated"]


def test_a_gate_in_one_linear_with_up() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.down = nn.Linear(16, 64), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.both(x).chunk(2, -1)
            y: Tensor = self.down(functional.silu(gate) * up)
            return y

    torch.manual_seed(0)
    net, x = Fused().eval(), torch.randn(3, 16)
    gate, up = net.both(x).chunk(2, -1)
    torch.testing.assert_close(instantiate(rewritten("drelu", net, x)[0])(x), net.down(gate.relu() * up.relu()))
    _, ctx = rewritten("shifted_relu", net, x)
    assert "one linear" in ctx.misses[0].why


def test_bad_input_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="reluu"):
        ReplaceActivation("reluu")
    with pytest.raises(ParseError, match="no option"):
        ReplaceActivation("fatrelu(limit=3.0)")
    ctx = Context()
    Pipeline((ReplaceActivation("relu"),)).run(capture(nn.Linear(3, 3).eval(), (torch.randn(2, 3),)), ctx, ())
    assert [miss.why for miss in ctx.misses] == ["the model has no FFN"]


@pytest.mark.parametrize("to", ["relu", "relu2", "drelu", "shifted_relu(shift=0.5)", "fatrelu(threshold=0.3)"])
@pytest.mark.parametrize("gated", [False, True])
def test_zeros_are_skipped_exactly_by_kernels(to: str, gated: bool) -> None:
    torch.manual_seed(0)
    net = (GatedFfn(64, 128) if gated else nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))).eval()
    data = [(torch.randn(20, 64),) for _ in range(2)]
    dynamic = {0: {0: "rows"}} if not gated else {"x": {0: "rows"}}
    trained, _ = sc.attach(net, data[0], f"replace_activation(to='{to}')", dynamic=dynamic)
    recipe = Pipeline.parse("exact_zeros() | pack() | lower(margin=-1000.0, rounds=3)")
    compiled = sc.compile(trained.eval(), (torch.randn(1, 64),), recipe=recipe, calibration=data, dynamic=dynamic)
    row = next(row for row in compiled.report().sites if row.structure.startswith("neurons"))
    assert 0.05 < row.density < 0.7, "about half of the neurons are zero, and none else is skipped"
    for rows in (1, 2, 30):
        x = torch.randn(rows, 64)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), trained(x), rtol=1e-5, atol=1e-6)


def test_star_relu_becomes_squared_relu_when_it_is_trained() -> None:
    net, x = models(False)
    trained, _ = sc.attach(net, (x,), "replace_activation(to='star_relu')")
    merged = sc.reparameterize(trained.eval(), (x,))
    torch.testing.assert_close(merged(x), trained(x))
    compiled = sc.compile(merged, (x,), recipe="exact_zeros", calibration=[(x,)], dynamic={"x": {0: "rows"}})
    torch.testing.assert_close(compiled(x[:2]), trained(x[:2]))
    row = next(row for row in compiled.report().sites if row.structure.startswith("neurons") or row.site == "down")
    assert row.density < 0.9 or row.format == "dense"
