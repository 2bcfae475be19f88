"""Masks that move in training: zeros hold between updates, structures at each, the paper's choices in small, resuming, and bad input."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from typing import Any

import pytest
import torch
import training_help
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from training_help import assert_resumes, in_two_processes, net

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.errors import InputError, ParseError, StructureError
from sparsify_compiler.masked import Masked
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train import _mover
from sparsify_compiler.passes.train._moving import regrown, shared, thinned
from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.passes_api import Context
from sparsify_compiler.training import Hook

X = torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
Y = torch.randn(48, 8, generator=torch.Generator().manual_seed(2))
RIGL = "mask_weights(score='random', density=0.25) | move_masks(grow='gradient', decay='cosine(end=12)', every=3, until=12)"
SMOOTHED = "mask_weights(structure='fan_in', density=0.25) | move_masks(grow='gradient', smooth=0.9, every=3, until=12)"
SHARED = "mask_weights(score='random', density=0.25) | move_masks(grow='gradient', fraction=0.5, redistribute=True, every=1, until=3)"
step = partial(training_help.step, X, Y)
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.5),
}


def attached(recipe: Any) -> tuple[nn.Module, Hook]:
    return sc.attach(net(), (X,), recipe, calibration=[(X,)])


def masks(hook: Hook) -> list[Tensor]:
    return [mask.clone() for mask in hook.masks.values()]


@settings(max_examples=10, deadline=None)
@given(structure=st.sampled_from(["unstructured", "row", "fan_in", "2:4", "8x1", "Rows()"]), grow=st.sampled_from([None, "random", "gradient"]),
       sparsity=st.sampled_from(["constant", "cubic(end=6)", "cubic(start=2, end=5, initial=0.5)"]), optimizer=st.sampled_from(sorted(OPTIMIZERS)),
       smooth=st.sampled_from([0.0, 0.9]), told=st.booleans())
def test_zeros_hold_and_structures_too(structure: str, grow: str | None, sparsity: str, optimizer: str, smooth: float, told: bool) -> None:
    """Between updates masks stay; at an update they are of the structure, of the schedule's density, and only an updater that grows adds to them."""
    moved = MoveMasks(sparsity, grow=grow, every=2, until=7, smooth=smooth, fraction=0.5)
    start = sc.Pipeline.parse(f"mask_weights(structure={structure!r}, density={0.5 if structure == '2:4' else 0.25})")
    module, hook = attached(start | moved)
    made, level = Structure.parse(structure), catalog.get("schedule", sparsity.partition("(")[0])
    options = {} if sparsity == "constant" else {"end": 6} if "start" not in sparsity else {"start": 2, "end": 5, "initial": 0.5}
    trained = OPTIMIZERS[optimizer](module.parameters())
    for number in range(1, 9):
        before = masks(hook)
        (step if told else step_untold)(module, hook, trained)
        for old, new in zip(before, masks(hook), strict=True):
            if number not in (2, 4, 6, 7):
                assert torch.equal(old, new)
                continue
            if grow is None:
                assert not bool((new & ~old).any())
            density = 1 - (0.5 if structure == "2:4" else 0.75) * level(number, **options)
            fitted = made.at(density)
            assert torch.equal(new, torch.ones_like(new) if fitted is None else fitted.mask(new.float(), fitted.density or density))
    expected = module(X)
    for name, mask in hook.masks.items():
        weight = module.get_parameter(f"{name}.weight")
        weight.data[~mask] = 7.0
    assert torch.equal(module(X), expected), "what lies under a zero of the mask is nothing"


def step_untold(module: nn.Module, hook: Hook, optimizer: torch.optim.Optimizer) -> float:
    """A loop that does not give its optimizer to the hook."""
    (functional.mse_loss(module(X), Y) + hook.loss()).backward()
    optimizer.step()
    hook.step()
    optimizer.zero_grad()
    return 0.0


@pytest.mark.parametrize("moving", ["move_masks()", "learn_masks(chooser='top_k')", "shrink_groups()"])
def test_layers_without_a_mask_are_told(moving: str) -> None:
    ctx = Context(example_inputs=(X,))
    sc.Pipeline.parse(f"mask_weights(score='random', density=0.5, targets=('0',)) | {moving}").run(sc.capture(net(), ctx.example_inputs), ctx)
    assert [str(miss) for miss in ctx.misses] == ["at 2: its weight has no mask"]


def test_rigl_drops_the_smallest_and_grows_where_the_gradient_is_largest() -> None:
    module, hook = attached("mask_weights(score='random', density=0.25) | move_masks(grow='gradient', fraction=0.5, every=1, until=1)")
    weight, before = module.get_parameter("0.weight"), hook.masks["0"].clone()
    dense = (weight * before).detach().requires_grad_()
    hidden = functional.linear(X, dense, module.get_parameter("0.bias")).relu()
    last = module.get_parameter("2.weight") * hook.masks["2"]
    functional.mse_loss(functional.linear(hidden, last, module.get_parameter("2.bias")), Y).backward()
    assert dense.grad is not None
    optimizer = torch.optim.SGD(module.parameters(), 0.0)
    step_untold(module, hook, optimizer)
    kept = (weight.abs() * before).flatten().topk(64).indices.tolist()
    rest = dense.grad.abs().flatten()
    rest[kept] = -1
    expected = set(kept) | set(rest.topk(64).indices.tolist())
    assert set(hook.masks["0"].flatten().nonzero().flatten().tolist()) == expected
    grown = hook.masks["0"] & ~before
    assert bool(grown.any())
    assert not bool(weight[grown].any())
    assert not bool(weight[~hook.masks["0"]].any())


@pytest.mark.parametrize(("recipe", "steps"), [(RIGL, (3, 6, 9, 12)), (SMOOTHED, range(1, 13))])
def test_only_the_steps_that_update_or_smooth_read_the_dense_gradient(recipe: str, steps: Collection[int]) -> None:
    module, hook = attached(recipe)
    taps = [part for part in module.modules() if isinstance(part, Masked)]
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    wanted = []
    for _ in range(14):
        wanted.append([tap.wanted for tap in taps])
        step(module, hook, optimizer)
    assert [any(one) for one in wanted] == [number in steps for number in range(1, 15)]
    assert all(any(one) == all(one) for one in wanted)


def test_weights_that_are_not_kept_get_no_gradient_where_the_dense_one_is_read_either() -> None:
    module, hook = attached(RIGL)
    for steps in (1, 2):  # the third step updates
        hook.load_state_dict({"steps": steps})
        module.zero_grad()
        functional.mse_loss(module(X), Y).backward()
        for name, mask in hook.masks.items():
            gradient = module.get_parameter(f"{name}.weight").grad
            assert gradient is not None
            assert not bool(gradient[~mask].any())
            assert bool(gradient[mask].any())


@pytest.mark.parametrize("recipe", [RIGL, SMOOTHED, "sr_ste(structure='2:4')", "gmp(density=0.25, steps=8, every=2)"])
def test_resuming_is_bit_equal(recipe: str) -> None:
    def fresh() -> tuple[nn.Module, Hook, torch.optim.Optimizer]:
        module, hook = attached(recipe)
        return module, hook, torch.optim.AdamW(module.parameters(), 1e-2)

    assert_resumes(fresh, step, 6, 7)   # behind an update, too: a state is not updated again when it is loaded


def test_accumulated_gradients_choose_alike() -> None:
    found = []
    for accumulate in (1, 4):
        module, hook = attached(RIGL)
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(6):
            step(module, hook, optimizer, accumulate)
        found.append(masks(hook))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_that_overflow_move_nothing_and_frozen_weights_stay() -> None:
    module, hook = attached("mask_weights(score='random', density=0.25) | move_masks(grow='gradient', every=1, until=9)")
    module.get_parameter("2.weight").requires_grad_(False)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    before = masks(hook)
    (functional.mse_loss(module(X), Y) * float("inf")).backward()
    optimizer.zero_grad()  # as a scaler of the loss does: the step is left out
    hook.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, masks(hook), strict=True))
    step(module, hook, optimizer)
    moved = [not torch.equal(a, b) for a, b in zip(before, masks(hook), strict=True)]
    assert moved == [True, False]
    with pytest.raises(InputError, match="no gradient has reached"):
        hook.step(optimizer)


def test_gradients_that_overflow_do_not_stay_in_the_average() -> None:
    module, hook = attached(SMOOTHED)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    (functional.mse_loss(module(X), Y) * float("inf")).backward()
    optimizer.zero_grad()
    hook.step(optimizer)
    averages = [tap.smoothed for tap in module.modules() if isinstance(tap, Masked)]
    assert not any(bool(average.any()) for average in averages if average is not None)
    before = masks(hook)
    step(module, hook, optimizer)
    step(module, hook, optimizer)
    assert all(bool(average.isfinite().all() and average.any()) for average in averages if average is not None)
    assert not any(torch.equal(a, b) for a, b in zip(before, masks(hook), strict=True))


def test_the_optimizer_forgets_what_went_and_what_came() -> None:
    module, hook = attached("mask_weights(score='random', density=0.25) | move_masks(grow='random', every=4, until=4)")
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    for _ in range(3):
        step(module, hook, optimizer)
    before = hook.masks["0"].clone()
    step(module, hook, optimizer)
    state = optimizer.state[module.get_parameter("0.weight")]
    stayed = before & hook.masks["0"]
    assert float(state["exp_avg"][~stayed].abs().max()) == 0
    assert bool((state["exp_avg_sq"][stayed] > 0).any())
    module, hook = attached("mask_weights(score='random', density=0.25) | move_masks(grow='random', every=1, until=1)")
    decaying = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, weight_decay=0.1)  # it remembers the decay of weights under a zero too
    before = hook.masks["0"].clone()
    step(module, hook, decaying)
    momentum = decaying.state[module.get_parameter("0.weight")]["momentum_buffer"]
    assert bool((hook.masks["0"] & ~before).any())
    assert not bool(momentum[~(before & hook.masks["0"])].any())
    assert bool(momentum[before & hook.masks["0"]].any())
    module, hook = attached("mask_weights(score='random', density=0.25) | move_masks(grow='random', every=1, until=4)")
    with pytest.raises(InputError, match="does not train the attached module's weights"):
        hook.step(torch.optim.SGD(net().parameters(), 0.1))


def test_straight_through_gradients_and_the_penalty() -> None:
    module, hook = attached("sr_ste(structure='2:4', penalty=0.5)")
    weight, mask = module.get_parameter("2.weight"), hook.masks["2"].clone()
    hidden = functional.linear(X, module.get_parameter("0.weight") * hook.masks["0"], module.get_parameter("0.bias")).relu().detach()
    loss = functional.mse_loss(module(X), Y) + hook.loss()
    loss.backward()
    dense = (weight * mask).detach().requires_grad_()
    functional.mse_loss(functional.linear(hidden, dense, module.get_parameter("2.bias")), Y).backward()
    assert dense.grad is not None
    torch.testing.assert_close(weight.grad, dense.grad + 0.5 * weight.detach() * ~mask)
    optimizer = torch.optim.SGD(module.parameters(), 0.5)
    for _ in range(10):
        step(module, hook, optimizer)
    assert not torch.equal(mask, hook.masks["2"]), "weights that are not kept learn, and come back"


def test_the_last_update_is_where_it_ends() -> None:
    _, hook = attached("mask_weights(density=0.25) | move_masks(sparsity='cubic(end=7)', every=3, until=7)")
    for _ in range(7):
        hook.step()
    assert [float(mask.double().mean()) for mask in masks(hook)] == [0.25, 0.25]


def test_schedules() -> None:
    cubic, cosine = catalog.get("schedule", "cubic"), catalog.get("schedule", "cosine")
    assert [cubic(s, start=10, end=20, initial=0.5) for s in (0, 10, 15, 20, 30)] == [0.5, 0.5, 1 - 0.5 * 0.125, 1, 1]
    assert [cosine(s, end=10) for s in (0, 5, 10, 20)] == pytest.approx([1, 0.5, 0, 0])
    for text in ("cubic(start=5, end=5)", "cosine(end=0)"):
        with pytest.raises(ParseError):
            MoveMasks(sparsity=text)


def test_rows_of_which_little_matters_go_as_a_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    score, growth = torch.rand(16, 32, generator=generator) + 1, torch.rand(16, 32, generator=generator)
    score[:6], growth[:6] = score[:6] * 1e-3, growth[:6] * 1e-3
    fan_in = Structure.parse("fan_in")
    mask = fan_in.mask(score, 0.25)
    found = regrown(mask, score, growth, fan_in, 0.25, 0.125, least=0.5)
    counts = found.sum(1)
    assert counts[:6].tolist() == [0] * 6
    assert len(set(counts[6:].tolist())) == 1
    assert abs(int(found.sum()) - int(mask.sum())) < 10
    everything = regrown(mask, score, growth, fan_in, 0.25, 0.125, least=1.0)
    assert everything.any(1).sum() >= math.ceil(0.25 * 16), "enough rows stay to hold what is kept"


def test_rows_that_could_not_hold_what_is_kept_do_not_stay_alone() -> None:
    """Four rows of five matter, and have room for 128 weights of 139."""
    mask, growth = torch.zeros(16, 32, dtype=torch.bool), torch.zeros(16, 32)
    mask[:5, :28] = True
    growth[:3], growth[3, 0] = torch.tensor([3.0, 2.0, 1.0])[:, None], 4.0
    score = torch.arange(16.0, 0.0, -1.0)[:, None].expand(16, 32)
    found = regrown(mask, score, growth, Structure.parse("fan_in"), 0.27, 0.135, least=1.0)
    assert int(found.sum()) >= 139


def test_rows_of_the_last_layer_stay_and_the_fraction_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    module, hook = attached("srigl(density=0.25, least=0.5, steps=2, every=1)")
    found: list[tuple[float, float]] = []

    def noted(*given: Any) -> Tensor:
        density, stays, least = given[-3:]
        found.append((stays / density, least))
        return regrown(*given)

    monkeypatch.setattr(_mover, "regrown", noted)
    step(module, hook, torch.optim.SGD(module.parameters(), 0.1))
    assert found == [(pytest.approx(1 - 0.3 / 2), 0.5), (pytest.approx(1 - 0.3 / 2), 0.0)]


@settings(max_examples=50, deadline=None)
@example(places=[(1, 2.0), (3, 1.0), (4, 0.0)], share=1.0)
@example(places=[(1, 1.0), (1, 0.0), (3, 1.0)], share=1.0)
@given(places=st.lists(st.tuples(st.integers(0, 20), st.floats(0, 4)), min_size=1, max_size=6), share=st.floats(0, 1))
def test_what_is_shared_out_adds_up(places: list[tuple[int, float]], share: float) -> None:
    """In proportion where there is room, and never above it."""
    room, weights = [size for size, _ in places], [weight for _, weight in places]
    total = int(share * sum(room))
    found = shared(total, room, weights)
    assert sum(found) == total
    assert all(0 <= got <= size for got, size in zip(found, room, strict=True))
    if sum(weights) and all(total * weight / sum(weights) <= size for weight, size in zip(weights, room, strict=True)):
        assert all(abs(got - total * weight / sum(weights)) <= 1 for got, weight in zip(found, weights, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_weights_move_between_layers_by_their_gradients(packed: bool) -> None:
    """As many in all; more in the layer of larger gradients; packed parameters grow and shrink, with what the optimizer remembers."""
    module, hook = attached(SHARED + (" | pack()" if packed else ""))
    optimizer = OPTIMIZERS["adamw"](module.parameters())
    counts = [[int(mask.sum()) for mask in masks(hook)]]
    for _ in range(3):
        step(module, hook, optimizer)
        counts.append([int(mask.sum()) for mask in masks(hook)])
    assert len({sum(count) for count in counts}) == 1
    assert counts[1] != counts[0]
    step(module, hook, optimizer)
    masked, other = attached(SHARED)
    (functional.mse_loss(masked(X), Y) * 8).backward()
    gradients = [masked.get_parameter(f"{name}.weight").grad[mask].abs().mean() for name, mask in other.masks.items()]  # type: ignore[index]
    assert (counts[1][0] > counts[0][0]) == bool(gradients[0] > gradients[1] * counts[0][0] / counts[0][1]), "in proportion to the means"


def test_each_layer_drops_a_share_of_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many it is to have when those of all layers are shared out."""
    module, hook = attached(SHARED)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    step(module, hook, optimizer)
    kept, found = [float(mask.double().mean()) for mask in masks(hook)], []

    def noted(*given: Any) -> Tensor:
        found.append(given[-2])
        return regrown(*given)

    monkeypatch.setattr(_mover, "regrown", noted)
    step(module, hook, optimizer)
    assert found == pytest.approx([0.5 * density for density in kept])


def test_a_layer_whose_gradient_is_not_finite_takes_no_part_in_sharing_out() -> None:
    """As many weights in all as before: what moved between layers in earlier steps stays with them."""
    module, hook = attached(SHARED)
    step(module, hook, torch.optim.SGD(module.parameters(), 0.1))
    before = masks(hook)
    assert len({float(mask.double().mean()) for mask in before}) == 2
    functional.mse_loss(module(X), Y).backward()
    next(tap for tap in module.modules() if isinstance(tap, Masked)).take = lambda: torch.full((32, 16), math.inf)  # type: ignore[method-assign]
    hook.step()
    assert torch.equal(masks(hook)[0], before[0])
    assert [int(mask.sum()) for mask in masks(hook)] == [int(mask.sum()) for mask in before]


def test_edges_of_one_update() -> None:
    free = Structure.parse("unstructured")
    one = torch.tensor([[True, False]])
    assert int(regrown(one, torch.ones(1, 2), torch.zeros(1, 2), free, 0.5, 0.0).sum()) == 1
    empty = torch.zeros(0, 4, dtype=torch.bool)
    assert thinned(empty, torch.zeros(0, 4), free, 0.5).shape == (0, 4)
    full = torch.ones(3, 5, dtype=torch.bool)
    assert bool(thinned(full, torch.rand(3, 5), free, 1.0).all())
    assert int(thinned(full, torch.zeros(3, 5), free, 0.4).sum()) == 6


def test_a_convolution_and_bfloat16() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    x = torch.randn(6, 4, 8, 8)
    recipe = "mask_weights(targets=('linear', 'conv'), score='random', density=0.25) | move_masks(grow='gradient', every=2, until=8)"
    module, hook = sc.attach(model, (x,), recipe)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(x).float().square().mean()
        loss.backward()
        optimizer.step()
        hook.step(optimizer)
        optimizer.zero_grad()
    assert [round(float(mask.float().mean()), 2) for mask in masks(hook)] == [0.25, 0.25]
    compiled = sc.compile(module.eval(), (x,), recipe=sc.Pipeline.parse("pack()"))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))


def test_a_shared_weight_moves_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    torch.manual_seed(0)
    module, hook = sc.attach(Twice().eval(), (X,), "mask_weights(density=0.25) | move_masks(grow='gradient', every=1, until=5)")
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(3):
        module(X).square().mean().backward()
        optimizer.step()
        hook.step(optimizer)
        optimizer.zero_grad()
    assert {float(mask.float().mean()) for mask in masks(hook)} == {0.25}


def test_a_mask_that_is_multiplied_twice_grows_by_the_sum_of_both_gradients() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16))
            self.register_buffer("mask", torch.rand(16, 16) < 0.25)

        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.mask, Tensor)
            return functional.linear(functional.linear(x, self.weight * self.mask).tanh(), self.mask * self.weight)  # two nodes

    torch.manual_seed(0)
    module, hook = sc.attach(Twice().eval(), (X,), "move_masks(grow='gradient', fraction=0.5, every=1, until=1)")
    taps = [part for part in module.modules() if isinstance(part, Masked)]
    assert len(taps) == 2
    weight, mask = module.get_parameter("weight"), masks(hook)[0]
    dense = (weight * mask).detach().requires_grad_()
    functional.linear(functional.linear(X, dense).tanh(), dense).square().mean().backward()
    module(X).square().mean().backward()
    assert dense.grad is not None
    hook.step()
    count = int(mask.sum())
    kept = (weight.abs() * mask).flatten().topk(math.ceil(count / 2)).indices
    rest = dense.grad.abs().flatten().index_fill(0, kept, -1.0)
    assert set(masks(hook)[0].flatten().nonzero()[:, 0].tolist()) == {*kept.tolist(), *rest.topk(count - len(kept)).indices.tolist()}


def test_a_padded_group_stays_as_thin_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(12, 8)).eval()
    module, hook = sc.attach(model, (X[:, :12],), sc.recipes.sr_ste("NM(n=1, m=8, padded=True)"))
    before = masks(hook)[0].sum(1)
    module(X[:, :12]).square().mean().backward()
    hook.step()
    assert masks(hook)[0].sum(1).tolist() == before.tolist() == [2] * 8


def test_masks_that_were_there_move_unstructured() -> None:
    module, _ = attached("mask_weights(structure='2:4')")
    _, hook = sc.attach(module.eval(), (X,), "gmp(density=0.25, steps=4)")
    assert [float(mask.float().mean()) for mask in masks(hook)] == [1.0, 1.0]
    with pytest.raises(StructureError, match="do not divide"):
        sc.attach(module, (X,), "move_masks(structure=NM(n=1, m=7))")


def test_under_torch_compile_masks_move_alike() -> None:
    found = []
    for compiled in (False, True):
        module, hook = attached("mask_weights(score='random', density=0.25) | move_masks(grow='gradient', every=2, until=4)")
        called = torch.compile(module, backend="aot_eager") if compiled else module
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(4):
            functional.mse_loss(called(X), Y).backward()
            optimizer.step()
            hook.step(optimizer)
            optimizer.zero_grad()
        found.append(masks(hook))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_a_mask_is_moved_by_one_pass(packed: bool) -> None:
    """The second would otherwise act with what the first has put in the graph."""
    behind = " | pack()" if packed else ""
    start = "mask_weights(score='random', density=0.25)"
    with pytest.raises(InputError, match="another pass"):
        attached(f"{start} | move_masks(every=2) | move_masks(grow='gradient', every=3){behind}")
    for fine in ("move_masks(every=2, targets=('0',)) | move_masks(grow='gradient', every=3, targets=('2',))",
                 "penalise_weights(loss='l1') | penalise_weights(loss='hyper_sparse') | move_masks()"):
        if not (packed and "penalise" in fine):
            attached(f"{start} | {fine}{behind}")


def test_a_schedule_that_grows_beyond_numbers_is_refused() -> None:
    exponential = catalog.get("schedule", "exponential")
    assert exponential(999, rate=-0.7) > 1e300
    with pytest.raises(ParseError, match="beyond what a number holds"):
        exponential(0, rate=-0.8)
    assert exponential(999, rate=5.0) == 0
    with pytest.raises(ParseError, match="beyond"):
        sc.recipes.hyper_sparse(0.1, steps=1000, growth=1.0)


def test_bad_options() -> None:
    for wrong in ({"every": 0}, {"fraction": 1.5}, {"drop": "movement"}, {"least": 0.3}, {"penalty": -1.0}):
        with pytest.raises(ParseError):
            MoveMasks(**wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_processes_choose_alike(tmp_path: Any) -> None:
    """As one process on both halves of the batch does."""
    one, other = in_two_processes(attached, RIGL, X, Y, 7, tmp_path)
    module, hook = attached(RIGL)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(7):
        step(module, hook, optimizer)
    for name, value in module.state_dict().items():
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], value)
