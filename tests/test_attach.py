"""Recipes in the user's own training loop: terms of the loss, schedules, resuming, and going on to compile()."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsify_compiler as sc
from sparsify_compiler import catalog, training_attention
from sparsify_compiler.errors import InputError, ParseError
from sparsify_compiler.measure import Timing
from sparsify_compiler.passes.activation.select_neurons import GatedFfn
from sparsify_compiler.passes.lower import lower
from sparsify_compiler.passes.train.penalise_activations import PenaliseActivations
from sparsify_compiler.training import Hook

ENDS = (3, 6, 9)
RECIPE = sc.recipes.prosparse(weight=0.1, threshold=0.02, ends=ENDS, levels=(0.1, 0.5, 1.0))
X = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))


def attached(recipe: Any = RECIPE) -> tuple[nn.Module, Hook, nn.Module]:
    torch.manual_seed(0)
    net = GatedFfn(16, 32).eval()
    module, hook = sc.attach(net, (X,), recipe, dynamic={"x": {0: "rows"}})
    return module, hook, net


def run(module: nn.Module, hook: Hook, optimizer: torch.optim.Optimizer, steps: int, accumulate: int = 1) -> list[float]:
    losses = []
    for _ in range(steps):
        for part in X.chunk(accumulate):
            loss = (module(part) - part).square().mean() + hook.loss()
            (loss / accumulate).backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        hook.step()
    return losses


def test_the_loss_is_its_formula_and_moves_by_schedule() -> None:
    module, hook, _ = attached()
    module(X)
    gate, up = functional.linear(X, module.gate.weight).relu(), functional.linear(X, module.up.weight)
    for step in (0, 1, 3, 4, 8, 9, 50):
        hook.load_state_dict({"steps": step})
        level = catalog.get("schedule", "sine_stages")(step, ends=ENDS, levels=(0.1, 0.5, 1.0))
        assert float(hook.loss().detach()) == pytest.approx(0.1 * level * float((gate * up).detach().abs().mean()), rel=1e-5)
        assert float(module.gate.limit_folded) == pytest.approx(0.02 if step >= 9 else 0.0)


def test_sine_stages() -> None:
    at = catalog.get("schedule", "sine_stages")
    levels = [at(step, ends=(10, 20, 40), levels=(1.0, 3.0, 4.0)) for step in range(45)]
    assert levels[:10] == [1.0] * 10
    assert levels == sorted(levels)
    assert levels[15] == pytest.approx(2.0)
    assert levels[40:] == [4.0] * 5
    assert levels[12] == pytest.approx(1 + (1 + math.sin(math.pi * (0.2 - 0.5))))
    with pytest.raises(ParseError, match="ends that grow"):
        PenaliseActivations(schedule="sine_stages(ends=(3, 3), levels=(1.0, 2.0))")


@pytest.mark.parametrize("name", catalog.names("activation loss"))
def test_losses_are_means_that_fall_with_density(name: str) -> None:
    loss = catalog.get("activation loss", name)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    sparse = torch.where(x.abs() > 1, x, 0)
    assert 0 <= float(loss(sparse)) < float(loss(x))
    torch.testing.assert_close(loss(torch.cat([x, x])), loss(x))
    assert float(loss(torch.zeros(3, 4))) == 0
    x[0, 0] = float("nan")
    assert bool(loss(x).isnan())
    torch.autograd.gradcheck(loss, (torch.randn(3, 5, dtype=torch.float64).requires_grad_(),))


def test_training_makes_it_sparse_and_the_users_model_stays() -> None:
    module, hook, net = attached(sc.recipes.prosparse(weight=3.0, ends=ENDS))
    before = copy.deepcopy(net.state_dict())
    module(X)
    start = hook.densities()["up"]
    run(module, hook, torch.optim.AdamW(module.parameters(), 1e-2), 100)
    assert hook.densities()["up"] < 0.7 * start
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_resuming_is_bit_equal() -> None:
    module, hook, _ = attached()
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    run(module, hook, optimizer, 5)
    saved = copy.deepcopy((module.state_dict(), optimizer.state_dict(), hook.state_dict()))
    expected = run(module, hook, optimizer, 6)
    again, other, _ = attached()
    fresh = torch.optim.AdamW(again.parameters(), 1e-2)
    again.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    assert run(again, other, fresh, 6) == expected
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in module.state_dict().items())
    with pytest.raises(InputError, match="no state of a hook"):
        other.load_state_dict({"step": 3})


def test_gradient_accumulation_and_mixed_precision() -> None:
    module, hook, _ = attached()
    run(module, hook, torch.optim.SGD(module.parameters(), 1e-2), 3, accumulate=4)
    assert hook.steps == 3
    with torch.autocast("cpu", torch.bfloat16):
        module(X)
    assert hook.loss().dtype is torch.float32
    hook.loss().backward()


def test_activations_are_there_for_a_loss_of_ones_own() -> None:
    module, hook, _ = attached("replace_activation(to='relu')")
    assert hook.activations == {}
    assert float(hook.loss().detach()) == 0
    module(X)
    value, = hook.activations.values()
    torch.testing.assert_close(value, functional.linear(X, module.gate.weight).relu())
    value.sum().backward()
    assert module.gate.weight.grad is not None
    assert module.up.weight.grad is None
    copied = copy.deepcopy(module)
    torch.testing.assert_close(copied(X), module(X))


def test_gradients_of_top_k_go_straight_through() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16)).eval()
    grads = {}
    for straight in (True, False):
        recipe = f"select_inputs(selector='top_k', density=0.25, straight_through={straight})"
        module, _ = sc.attach(net, (X,), recipe, calibration=[(X,)])
        x = X.clone().requires_grad_()
        module(x).sum().backward()
        grads[straight] = x.grad
        assert int((module(X) != net(X)).sum())
    assert grads[True] is not None
    assert grads[False] is not None
    torch.testing.assert_close(grads[True], net[0].weight.sum(0).expand_as(X))  # type: ignore[union-attr, operator]
    assert int((grads[False] != 0).sum()) == 32 * 4
    assert "straight_through=True" in str(sc.recipes.q_sparse())


@pytest.mark.parametrize("pays", [False, True])
def test_what_was_trained_compiles_and_skips_its_zeros(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threshold that the model was trained with stays where a kernel for it does not pay."""
    def time(name: str) -> float:
        return 2.0 if name.startswith("dense") == pays else 1.0

    monkeypatch.setattr(lower, "round_robin", lambda groups, **_: {
        key: {name: Timing(time(name), time(name), time(name)) for name in forms} for key, forms in groups.items()})
    module, hook, _ = attached()
    run(module, hook, torch.optim.AdamW(module.parameters(), 1e-2), 12)
    compiled = sc.compile(module, (X,), recipe="exact_zeros", calibration=[(X,)], dynamic={"x": {0: "rows"}})
    with torch.no_grad():
        torch.testing.assert_close(compiled(X[:7]), module(X[:7]))
    row = next(row for row in compiled.report().sites if row.site == "down")
    assert row.density == pytest.approx(hook.densities()["up"], abs=0.15) if pays else row.format == "dense"


def test_a_language_model_in_regions_trains() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    lm = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 96, (2, 7))
    module, hook = sc.attach(lm, {"input_ids": ids}, sc.recipes.deft(weight=0.5), dynamic={"input_ids": {0: "batch", 1: "tokens"}})
    module.train()
    loss = module(input_ids=ids, labels=ids).loss + hook.loss()
    loss.backward()
    assert len(hook.activations) == 2
    assert float(hook.loss().detach()) > 0
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert not any(parameter.grad is not None for parameter in lm.parameters())


def test_bad_input_is_refused() -> None:
    net = GatedFfn(16, 32).eval()
    with pytest.raises(InputError, match=r"does not train packed: sparsify\.select"):
        sc.attach(net, (X,), "select_inputs(density=0.5) | pack()", calibration=[(X,)])
    with pytest.raises(ParseError, match="0 or more"):
        PenaliseActivations(weight=-1.0)
    with pytest.raises(ParseError, match="of is"):
        PenaliseActivations(of="gates")  # type: ignore[arg-type]


def test_values_are_kept_by_an_untrained_model() -> None:
    module, _, net = attached(sc.recipes.deft())
    x: Tensor = torch.randn(3, 16)
    torch.testing.assert_close(module(x), net(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_short_attention_of_16_bits_trains_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches torch's attention; an export sees the attention as it is, and gradients are those of the wide one."""
    seen: list[torch.dtype] = []

    def watched(query: Tensor, *rest: Any, **named: Any) -> Tensor:
        seen.append(query.dtype)
        return functional.scaled_dot_product_attention(query, *rest, **named)

    monkeypatch.setattr(training_attention, "scaled_dot_product_attention", watched)
    q, k, v = (torch.randn(2, 3, 7, 4, dtype=torch.float32, requires_grad=True) for _ in range(3))
    mask = torch.randn(7, 7, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        y = training_attention.attend(q.to(dtype), k.to(dtype), v.to(dtype), mask.to(dtype), scale=0.3)
    assert y.dtype == dtype
    found = torch.autograd.grad(y.float().sum(), (q, k, v))
    expected = torch.autograd.grad(functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3).sum(), (q, k, v))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2)
    with torch.no_grad():
        training_attention.attend(q.to(dtype), k.to(dtype), v.to(dtype))
    long = torch.zeros(1, 1, training_attention.KEYS + 1, 4, dtype=dtype, requires_grad=True)
    training_attention.attend(long, long, long)
    assert seen == [torch.float32, dtype, dtype]


def test_under_torch_compile_the_loss_is_the_same() -> None:
    module, hook, _ = attached()
    module(X)
    expected = float(hook.loss().detach())
    compiled = torch.compile(module, backend="aot_eager")
    found = []
    for x in (X * 3, X):
        compiled(x)
        found.append(hook.loss())
    assert float(found[1].detach()) == pytest.approx(expected)
    assert float(found[0].detach()) > 2 * expected
    found[1].backward()
    assert module.gate.weight.grad is not None


@pytest.mark.parametrize("recipe", ["lazy_neuron(density=0.25)", "select_neurons(selector='top_k', density=0.25)",
                                    "relu2_wins() | lazy_neuron(density=0.25)", "select_neurons(selector='statistical_top_k', density=0.25)"])
def test_activations_that_are_selected_by_row_are_there_too(recipe: str) -> None:
    torch.manual_seed(0)
    for net in (GatedFfn(16, 32).eval(), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).eval()):
        module, hook = sc.attach(net, (X,), recipe, calibration=[(X,)])
        module(X)
        density, = hook.densities().values()
        if isinstance(net, nn.Sequential) or "select_neurons" in recipe:
            assert density == pytest.approx(0.25, abs=0.05)
        else:
            assert density > 0.3, "of a gated FFN, lazy_neuron selects the products"


@pytest.mark.parametrize("structure", ["2:4", "32x1", "fan_in"])
def test_a_hole_in_a_mask_never_becomes_a_weight(structure: str) -> None:
    """For speed pack() keeps a few zeros more, so that a mask with holes is of its structure again; in training they would have learned."""
    net = nn.Sequential(nn.Linear(64, 64, bias=False)).eval()
    kept = next(one for one in masked(net, structure).buffers() if one.dtype is torch.bool).clone()
    kept[tuple(kept.nonzero()[7])] = False

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(net[0].weight.detach().clone())
            self.register_buffer("mask", kept)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight * self.mask)

    module, hook = sc.attach(Masked().eval(), (torch.randn(8, 64),), "pack()")
    optimizer = torch.optim.SGD(module.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (module(torch.randn(8, 64)) - 1).square().sum().backward()
        optimizer.step()
        hook.step()
    with torch.no_grad():
        weight = module(torch.eye(64)).t()
    assert not bool(weight[~kept].any())
    assert bool(weight[kept].all())


def masked(net: nn.Module, structure: str) -> nn.Module:
    return sc.attach(net, (torch.randn(8, 64),), f"mask_weights(structure='{structure}', density=0.5)")[0]


class Rounded(nn.Module):
    """Rounds with the gradient of what it rounds, and multiplies with a value that is to have none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(h + (h.round() - h).detach()) * h.detach().mean()


class Branching(nn.Module):
    """No graph holds it whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Rounded()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x if float(x.sum()) < 1e9 else -x)


class Stopped(nn.Module):
    """Computes some values without gradients, one with them again, and hands one through."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    @torch.no_grad()
    def places(self, x: Tensor) -> tuple[Tensor, int, Tensor]:
        h = self.first(x)
        h.clamp_(-1, 1)
        with torch.enable_grad():
            g = self.second(h)
        return h.round() + g, len(h), x

    def forward(self, x: Tensor) -> Tensor:
        h, rows, same = self.places(self.second(x))
        return self.third((h + same) / rows)


class Written(nn.Module):
    """Scales a value that has gradients without them: they are those of the value before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        with torch.no_grad():
            h[:, 2:].mul_(0.5)
        y: Tensor = self.second(h)
        return y


@pytest.mark.parametrize("make", [Rounded, Branching, Stopped, Written])
def test_what_the_model_detaches_stays_detached(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(5, 8)
    attached, _ = sc.attach(model, (x,), "mask_weights(score=magnitude, density=1.0)")
    for one in (model, attached):
        one(x).sum().backward()
    gradients = {name: parameter.grad for name, parameter in attached.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad) if parameter.grad is not None else None
        assert (gradients[name] is None) == (parameter.grad is None), name
    assert "detach" not in str(next(iter(sc.capture(model, (x,)).regions.values())).graph), "no gradient passes through a model that only runs"


class Turned(nn.Module):
    """Positions as language models make them, without gradients: there is nothing to stop, and passes see through."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("waves", torch.arange(8.0, dtype=torch.float32))

    @torch.no_grad()
    def turns(self, x: Tensor) -> Tensor:
        turns: Tensor = (torch.arange(x.shape[0])[:, None] * self.waves).cos()
        return turns

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x * self.turns(x))
        return y


def test_positions_without_gradients_are_not_detached() -> None:
    captured = sc.capture(Turned().eval(), (X[:, :8],), trains=True)
    assert "cos" in (text := captured.text())
    assert "detach" not in text
    assert not captured.left_out


class Marked(nn.Module):
    """Writes, without gradients, to a value that has had none since it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.first(x)
        y: Tensor = self.second(x)
        with torch.no_grad():
            h.clamp_(-1, 1)
        return y * h.mean()


def test_what_was_detached_may_be_written_to() -> None:
    torch.manual_seed(0)
    model, x = Marked().eval(), X[:, :8]
    captured = sc.capture(model, (x,), trains=True)
    assert not captured.left_out
    module, _ = sc.attach(model, (x,), "mask_weights(score=magnitude, density=1.0)")
    module(x).sum().backward(), model(x).sum().backward()
    assert module.get_parameter("first.weight").grad is None
    torch.testing.assert_close(module.get_parameter("second.weight").grad, model.second.weight.grad)


def test_an_optimizer_that_was_made_before_is_refused() -> None:
    """It trains the user's own model, whether masks move or not."""
    for recipe in ("mask_weights(structure='2:4')", sc.recipes.gmp(density=0.5, steps=4, every=2)):
        net = GatedFfn(16, 32).eval()
        early = torch.optim.SGD(net.parameters(), 0.1)
        module, hook = sc.attach(net, (X,), recipe)
        with pytest.raises(InputError, match="does not train the attached module"):
            hook.step(early)
        assert hook.steps == 0
        hook.step(torch.optim.SGD(module.parameters(), 0.1))
        assert hook.steps == 1
