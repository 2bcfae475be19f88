"""Sparse models with more weights to choose from than the dense one, and sparse plus low-rank ones: sizes, starts, merging, memory, resuming."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import sparsify_compiler as sc
from sparsify_compiler.axis import Axes
from sparsify_compiler.call import instantiate
from sparsify_compiler.errors import BudgetError, ParseError, StructureError
from sparsify_compiler.passes.train.expand_linears import ExpandLinears
from sparsify_compiler.passes.train.widen_channels import WidenChannels
from sparsify_compiler.training import Hook

X = torch.randn(32, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
Y = torch.randn(32, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
FORMS = ("wide", "parallel", "factorized", "doped")


def net(inputs: int = 24, hidden: int = 32, outputs: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs)).eval()


def images() -> nn.Module:
    """Filters that end in features: places of one filter stand beside each other there."""
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU())
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 4)).eval()


def steps(module: nn.Module, hook: Hook, optimizer: torch.optim.Optimizer, count: int, autocast: bool = False) -> list[float]:
    losses = []
    for _ in range(count):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = functional.mse_loss(module(X).float(), Y) + hook.loss()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        hook.step(optimizer)
        optimizer.zero_grad()
    return losses


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(FORMS), st.sampled_from([0.55, 0.5, 0.25, 0.125]), st.integers(12, 40), st.integers(16, 48))
def test_as_many_multiplications_as_the_dense_model(form: str, density: float, inputs: int, hidden: int) -> None:
    """Never more but by what a mask rounds up, and not much less."""
    model = net(inputs, hidden)
    dense = inputs * hidden + hidden * 8
    module, hook = sc.attach(model, (torch.zeros(2, inputs, dtype=torch.float32),), sc.recipes.sparse_ift(density, form))  # type: ignore[arg-type]
    kept = sum(int(mask.sum()) for mask in hook.masks.values())
    low = sum(one.numel() for name, one in module.named_parameters() if "low_rank" in name)
    rounding = sum(1 for _ in hook.masks)
    whole = density * math.floor(1 / density) if form == "parallel" else 1.0  # layers come whole
    assert 0.8 * whole * dense - 2 * (inputs + hidden + 8) <= kept + low <= dense + rounding


def test_the_numbers_of_a_wider_table_stay_as_large() -> None:
    """What is looked up is not summed over; what is tied to it starts as the table does."""
    class Net(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(200, 64), nn.Linear(64, 200, bias=False)
            if tied:
                self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.table(x))
            return y

    for tied in (True, False):
        torch.manual_seed(0)
        model, x = Net(tied).eval(), torch.randint(200, (2, 5), generator=torch.Generator().manual_seed(1))
        module, _ = sc.attach(model, (x,), WidenChannels(0.25, targets=("embedding",)))
        table, head = module.get_parameter("table.weight"), module.state_dict().get("head.weight", module.get_parameter("table.weight"))
        assert table.shape[1] > 100
        torch.testing.assert_close(table.std(), model.table.weight.std(), rtol=0.03, atol=0)
        factor = 1.0 if tied else math.sqrt(64 / head.shape[1])
        torch.testing.assert_close(head.std(), model.head.weight.std() * factor, rtol=0.03, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_grown_model_starts_about_as_large_and_learns(form: str) -> None:
    module, hook = sc.attach(net(), (X,), sc.recipes.sparse_ift(0.5, form))  # type: ignore[arg-type]
    ratio = float((module(X).std() / net()(X).std()).detach())
    assert 0.5 < ratio < 2
    masks = {path: mask.clone() for path, mask in hook.masks.items()}
    losses = steps(module, hook, torch.optim.AdamW(module.parameters(), 1e-2), 12)
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(mask, masks[path]) for path, mask in hook.masks.items())


@pytest.mark.parametrize("density", [0.6, 0.3, 0.21])
def test_copies_of_units_change_nothing(density: float) -> None:
    for model, x in ((net(), X), (images(), torch.randn(2, 1, 7, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float32))):
        module, _ = sc.attach(model, (x,), WidenChannels(density, "copies"))
        assert sum(one.numel() for one in module.parameters()) > sum(one.numel() for one in model.parameters())
        torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)


def test_fresh_weights_are_scaled_by_their_inputs() -> None:
    model = net(24, 400, 300)
    module, _ = sc.attach(model, (X,), WidenChannels(0.25))
    weight, before = module.get_parameter("2.weight"), model.get_parameter("2.weight")
    wanted = before.std() * math.sqrt(before.shape[1] / weight.shape[1])
    torch.testing.assert_close(weight.std(), wanted, rtol=0.02, atol=0)
    other, _ = sc.attach(model, (X,), WidenChannels(0.25, seed=1))
    assert not torch.equal(weight, other.get_parameter("2.weight"))


def test_packed_sltrain_holds_what_it_says() -> None:
    """Weights, gradients and both moments of the optimizer: of the kept places and of the factors."""
    model = net(64, 96, 48)
    x, rank, density = torch.randn(16, 64, generator=torch.Generator().manual_seed(4), dtype=torch.float32), 3, 0.1
    module, hook = sc.attach(model, (x,), sc.recipes.sltrain(density, rank) | sc.Pipeline.parse("pack()"))
    optimizer = torch.optim.AdamW(module.parameters())
    functional.mse_loss(module(x), torch.zeros(16, 48, dtype=torch.float32)).backward()
    optimizer.step()
    wanted = sum(math.ceil(density * a * b) + rank * (a + b) + b for a, b in ((64, 96), (96, 48)))
    assert sum(one.numel() for one in module.parameters()) == wanted
    assert sum(one.grad.numel() for one in module.parameters() if one.grad is not None) == wanted
    moments = sum(value.numel() for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor) and value.dim())
    assert moments == 2 * wanted
    assert hook.masks["0"].sum() == math.ceil(density * 64 * 96)


def test_sltrain_packed_and_masked_are_one() -> None:
    masked, hook = sc.attach(net(), (X,), sc.recipes.sltrain(0.2, 2, seed=5))
    packed, other = sc.attach(net(), (X,), sc.recipes.sltrain(0.2, 2, seed=5) | sc.Pipeline.parse("pack()"))
    losses = [steps(module, own, torch.optim.AdamW(module.parameters(), 1e-2), 8) for module, own in ((masked, hook), (packed, other))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_sltrain_from_a_trained_weight_starts_with_what_is_left() -> None:
    """Where nothing is cut it is the weight; and the residual is smaller than the weight."""
    whole, _ = sc.attach(net(), (X,), "add_adapters(adapter=\"low_rank(rank=4, scale=0.25, start='principal')\", freeze=False)")
    torch.testing.assert_close(whole(X), net()(X), rtol=1e-4, atol=1e-5)
    before, after = net().get_parameter("0.weight"), whole.get_parameter("0.weight")
    values = torch.linalg.svdvals(before)
    torch.testing.assert_close(after.norm(), values[4:].norm(), rtol=1e-3, atol=1e-4)
    module, _ = sc.attach(net(), (X,), sc.recipes.sltrain(0.5, 4, start="principal"))
    torch.testing.assert_close(module.get_parameter("0.weight"), after)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_sltrain_merges_into_one_weight_where_that_is_asked_for() -> None:
    module, hook = sc.attach(net(), (X,), sc.recipes.sltrain(0.2, 2))
    steps(module, hook, torch.optim.AdamW(module.parameters(), 1e-2), 6)
    for fill, layers in ((False, 6), (True, 2)):
        program = sc.Pipeline.parse(f"merge_adapters(fill={fill})").run(sc.capture(module, (X,)))
        assert sum("linear" in str(node.target) for _, node in program.nodes() if node.op == "call_function") == layers
        with torch.no_grad():
            torch.testing.assert_close(instantiate(program)(X), module(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", [sc.recipes.sltrain(0.2, 2), sc.recipes.sltrain(0.2, 2) | sc.Pipeline.parse("pack()"),
                                    sc.recipes.sparse_ift(0.5, "wide"), sc.recipes.lora(2)])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_run_that_is_resumed_is_the_same_to_the_bit(recipe: sc.Pipeline, autocast: bool) -> None:
    torch.set_num_threads(1)
    module, hook = sc.attach(net(), (X,), recipe)
    frozen = {name: one.detach().clone() for name, one in module.named_parameters() if not one.requires_grad}
    optimizer = torch.optim.AdamW([one for one in module.parameters() if one.requires_grad], 1e-2)
    steps(module, hook, optimizer, 3, autocast)
    saved = {key: value.clone() for key, value in module.state_dict().items()}
    rest = copy.deepcopy((optimizer.state_dict(), hook.state_dict()))
    again, other = sc.attach(net(), (X,), recipe, seed=9)
    resumed = torch.optim.AdamW([one for one in again.parameters() if one.requires_grad], 1e-2)
    again.load_state_dict(saved)
    resumed.load_state_dict(rest[0])
    other.load_state_dict(rest[1])
    assert steps(module, hook, optimizer, 3, autocast) == steps(again, other, resumed, 3, autocast)
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert all(torch.equal(module.get_parameter(name), value) for name, value in frozen.items())


def test_weights_that_lie_in_one_module_have_adapters_of_their_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_weight, self.down = nn.Parameter(torch.randn(16, 24) / 5), nn.Parameter(torch.randn(8, 16) / 4)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(functional.relu(functional.linear(x, self.up_weight)), self.down)

    torch.manual_seed(0)
    model = Two().eval()
    module, _ = sc.attach(model, (X,), "add_adapters(adapter='low_rank(rank=2)')")
    assert [name for name, one in module.named_parameters() if one.requires_grad] == [
        "up_low_rank_reads", "up_low_rank_writes", "down_low_rank_reads", "down_low_rank_writes"]
    torch.testing.assert_close(module(X), model(X))


def test_bad_input() -> None:
    with pytest.raises(ParseError, match="growth is 1 or more"):
        ExpandLinears(growth=0.5)
    with pytest.raises(ParseError, match="form"):
        ExpandLinears("sum")  # type: ignore[arg-type]
    with pytest.raises(ParseError, match="copies"):
        WidenChannels(0.5, "more")  # type: ignore[arg-type]
    with pytest.raises(BudgetError):
        WidenChannels(0.0)


def test_a_weight_that_something_else_reads_keeps_its_numbers() -> None:
    """What the factors take over would be missing there: in an embedding, or in a layer without adapters."""
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(24, 24), nn.Linear(24, 24)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.two(functional.relu(self.one(x)))
            return y

    torch.manual_seed(0)
    model, principal = Tied().eval(), "add_adapters(adapter=\"low_rank(rank=4, scale=0.25, start='principal')\""
    module, _ = sc.attach(model, (X,), f"{principal})")
    torch.testing.assert_close(module(X), model(X), rtol=1e-4, atol=1e-5)
    with pytest.raises(StructureError, match="without its low-rank part"):
        sc.attach(model, (X,), f"{principal}, targets=('two',))")


@pytest.mark.parametrize("density", [0.5, 0.25, 0.1])
def test_neurons_grow_by_the_whole_factor(density: float) -> None:
    module, _ = sc.attach(net(12, 30, 4), (X[:, :12],), WidenChannels(density))
    assert len(module.get_parameter("0.weight")) == round(30 / density)


def test_masks_are_repeated_with_their_units() -> None:
    module, hook = sc.attach(net(), (X,), "mask_weights(density=0.5) | widen_channels(density=0.5)")
    assert all(mask.dtype == torch.bool for mask in hook.masks.values())
    assert torch.equal(hook.masks["2"][:, ::2], hook.masks["2"][:, 1::2])
    assert module(X).shape == (32, 8)


def test_what_is_left_of_a_frozen_weight_stays_frozen() -> None:
    model = net()
    model.get_parameter("0.weight").requires_grad_(False)
    module, _ = sc.attach(model, (X,), "add_adapters(adapter=\"low_rank(rank=4, start='principal')\", freeze=False)")
    assert [name for name, one in module.named_parameters() if not one.requires_grad] == ["0.weight"]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 4), st.integers(2, 4), st.integers(2, 4), st.integers(0, 99))
def test_indices_of_repeated_units_are_those_of_the_loops(a: int, b: int, c: int, seed: int) -> None:
    """Of a concatenation of products, of which units come 0 to 2 times; and as many as `kept` counts."""
    axes, generator = Axes(), torch.Generator().manual_seed(seed)
    (one,), (two,), (three,) = (axes.new(size)[0] for size in (a, b, c))
    counts = {atom: torch.randint(0, 3, (size,), generator=generator) for atom, size in ((one, a), (two, b))}
    units = [[i for i in range(a) for _ in range(int(counts[one][i]))], [j for j in range(b) for _ in range(int(counts[two][j]))], range(c)]
    axis = ((one, two), (three, one))
    wanted = [i * b + j for i in units[0] for j in units[1]] + [a * b + k * a + i for k in units[2] for i in units[0]]
    assert axes.index(axis, counts).tolist() == wanted
    assert torch.equal(axes.kept(axis, counts), torch.bincount(torch.tensor(wanted, dtype=torch.int64), minlength=a * b + c * a))
    masks = {atom: count > 0 for atom, count in counts.items()}
    assert axes.index(axis, masks).tolist() == axes.kept(axis, masks).nonzero()[:, 0].tolist()


def test_a_norm_over_copies_gives_the_copies_of_what_it_gave() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.RMSNorm(32, eps=1e-6), nn.ReLU(), nn.Linear(32, 8)).eval()
    module, _ = sc.attach(model, (X,), WidenChannels(0.5, "copies"))
    assert module.get_parameter("0.weight").shape == (64, 24)
    torch.testing.assert_close(module(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("growth", [1.0, 2.0, 8.0])
def test_factors_are_as_large_as_the_weight_whatever_the_growth(growth: float) -> None:
    """At the density that they are for: over random masks of 1 / growth."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    module, _ = sc.attach(model, (x,), f"expand_linears(form='factorized', growth={growth}) | mask_weights(score='random', density={1 / growth})")
    assert torch.equal(module.get_parameter("0.bias"), model.get_parameter("0.bias"))
    spread = [(one(x) - one.get_parameter("0.bias")).std() for one in (module, model)]
    torch.testing.assert_close(spread[0], spread[1], rtol=0.15, atol=0)
    reads = functional.linear(x, module.get_parameter("0.reads")).std() / math.sqrt(growth)
    torch.testing.assert_close(reads, x.std(), rtol=0.15, atol=0)


def test_growth_leaves_frozen_weights_frozen_and_shared_ones_alone() -> None:
    model = net().requires_grad_(False)
    for grown in ("expand_linears(growth=2.7)", "expand_linears(form='factorized')", "widen_channels(density=0.5)"):
        module, _ = sc.attach(model, (X,), grown)
        assert not any(one.requires_grad for one in module.parameters())
    assert len(list(sc.attach(model, (X,), "expand_linears(growth=2.7)")[0].parameters())) == 4 + 2 * 1
    one = nn.Linear(24, 24)
    shared = nn.Sequential(one, nn.ReLU(), one).eval()
    for form in ("parallel", "factorized"):
        module, _ = sc.attach(shared, (X,), ExpandLinears(form))  # type: ignore[arg-type]
        assert sum(parameter.numel() for parameter in module.parameters()) == 24 * 24 + 24
        assert torch.equal(module(X), shared(X))


def test_a_mask_stays_where_nothing_merges_it() -> None:
    """The low-rank part reads something else, or something else reads the layer."""
    class Net(nn.Module):
        def __init__(self, other: bool) -> None:
            super().__init__()
            self.one, self.reads, self.writes, self.other = nn.Linear(24, 8), nn.Linear(24, 2, bias=False), nn.Linear(2, 8, bias=False), other

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.one(x)
            total: Tensor = y + self.writes(self.reads(x.relu() if self.other else x))
            return total if self.other else total * y

    for other in (True, False):
        torch.manual_seed(0)
        module, _ = sc.attach(Net(other).eval(), (X,), "mask_weights(density=0.5, targets=('one',))")
        program = sc.Pipeline.parse("merge_adapters(fill=True)").run(sc.capture(module, (X,)))
        assert any(node.target == "one.weight_mask" for _, node in program.nodes())
