"""Blocks that train in turns: only the chosen move, importance follows the loss, and a run goes on where it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsify_compiler as sc
from sparsify_compiler.errors import InputError
from sparsify_compiler.layer_choice import LayerChoice
from sparsify_compiler.training import Hook

X = torch.randn(16, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
Y = torch.randn(16, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float32)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(functional.relu(self.up(x)))
        return y


def attached() -> tuple[nn.Module, Hook]:
    torch.manual_seed(0)
    return sc.attach(nn.Sequential(*(Block() for _ in range(4))).eval(), (X,), sc.recipes.lora(2))


def loss(module: nn.Module) -> Tensor:
    return functional.mse_loss(module(X), Y)


def steps(module: nn.Module, hook: Hook, choice: LayerChoice, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        found = loss(module)
        found.backward()
        losses.append(float(found.detach()))
        optimizer.step()
        hook.step(optimizer)
        optimizer.zero_grad()
        choice.step(lambda: loss(module))
    return losses


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([one for name, one in module.named_parameters() if "low_rank" in name], 1e-2)


def test_only_the_chosen_blocks_move_in_a_step() -> None:
    module, hook = attached()
    assert len(hook.blocks) == 4
    choice, optimizer = LayerChoice(module, hook, 2, every=3), optimizer_of(module)
    seen: set[str] = set()
    for _ in range(12):
        now = choice.training
        assert len(now) == 2
        before = {path: [one.detach().clone() for one in own] for path, own in hook.blocks.items()}
        steps(module, hook, choice, optimizer, 1)
        for path, own in hook.blocks.items():
            changed = any(not torch.equal(one, was) for one, was in zip(own, before[path], strict=True))
            assert changed == (path in now)
        seen.update(now)
    assert seen == set(hook.blocks)


def test_it_learns_and_a_resumed_run_is_the_same_to_the_bit() -> None:
    torch.set_num_threads(1)
    module, hook = attached()
    choice, optimizer = LayerChoice(module, hook, 2, every=2), optimizer_of(module)
    first = steps(module, hook, choice, optimizer, 15)
    again, other = attached()
    later, resumed = LayerChoice(again, other, 2, every=2), optimizer_of(again)
    again.load_state_dict(copy.deepcopy(module.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    later.load_state_dict(choice.state_dict())
    rest = steps(module, hook, choice, optimizer, 6)
    assert rest == steps(again, other, later, resumed, 6)
    assert choice.state_dict() == later.state_dict()
    assert rest[-1] < 0.9 * first[0]
    assert any(choice.importance.values())


def test_the_block_that_matters_becomes_important() -> None:
    """One block's adapters do all that is good; it is drawn more often than by chance."""
    module, hook = attached()
    good = list(hook.blocks)[1]
    choice = LayerChoice(module, hook, 1, every=1, candidates=4, rate=20.0)
    writes = [one for name, one in module.named_parameters() if name.startswith("1.") and name.endswith("writes")]
    with torch.no_grad():
        for one in writes:
            one.fill_(1.0)
    chosen = []
    for _ in range(60):
        choice.step(lambda: 1.0 - float(writes[0].mean()))
        chosen.append(choice.training[0])
    assert max(choice.importance, key=lambda path: choice.importance[path]) == good
    assert chosen[30:].count(good) > 15
    assert all(bool((one == 1).all()) for one in writes)


def test_bad_input() -> None:
    module, hook = attached()
    for options in ((0,), (5,), (2, 0), (2, 1, 1)):
        with pytest.raises(InputError, match="chosen lies between 1 and 4"):
            LayerChoice(module, hook, *options)
    choice = LayerChoice(module, hook, 2, every=1)
    before = [one.detach().clone() for one in module.parameters()]
    with pytest.raises(InputError, match="not finite"):
        choice.step(lambda: float("nan"))
    assert choice.steps == 0
    assert all(torch.equal(one, was) for one, was in zip(module.parameters(), before, strict=True))
    with pytest.raises(InputError, match="no state"):
        choice.load_state_dict({"steps": 1, "importance": [0.0]})
    torch.manual_seed(0)
    dense, whole = sc.attach(nn.Sequential(Block(), Block()).eval(), (X,), sc.Pipeline(()))
    with pytest.raises(InputError, match="0 have adapters"):
        LayerChoice(dense, whole, 1)


def test_an_autocast_around_the_lesson_does_not_hide_what_is_weakened() -> None:
    module, hook = attached()
    with torch.no_grad():
        for name, one in module.named_parameters():
            if name.endswith("writes"):
                one.fill_(0.5)
    choice, seen = LayerChoice(module, hook, 4, every=1), []
    with torch.autocast("cpu", torch.bfloat16):
        before = float(loss(module).detach())

        def measured() -> float:
            seen.append(float(loss(module).detach()))
            return seen[-1]

        choice.step(measured)
        assert float(loss(module).detach()) == before
    assert before not in seen


def test_blocks_that_do_not_train_now_have_no_gradients_and_what_was_frozen_stays_so() -> None:
    module, hook = attached()
    frozen = {name for name, one in module.named_parameters() if not one.requires_grad}
    choice = LayerChoice(module, hook, 1, every=100)
    for _ in range(6):
        loss(module).backward()
        choice.step(lambda: loss(module))
        for path, own in hook.blocks.items():
            assert path in choice.training or all(one.grad is None for one in own)
    assert all(not module.get_parameter(name).requires_grad for name in frozen)


def test_weakened_adapters_come_back_to_the_bit_and_equal_losses_teach_nothing() -> None:
    module, hook = attached()
    with torch.no_grad():
        for one in module.parameters():
            one.add_(torch.rand(one.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float32))
    before = [one.detach().clone() for one in module.parameters()]
    choice = LayerChoice(module, hook, 1, every=1, weakened=0.3)
    choice.step(lambda: 1.0)
    assert all(torch.equal(one, was) for one, was in zip(module.parameters(), before, strict=True))
    assert list(choice.importance.values()) == [0.0] * 4


def test_another_seed_draws_other_blocks() -> None:
    drawn = []
    for seed in (0, 0, 1):
        module, hook = attached()
        choice = LayerChoice(module, hook, 1, every=100, seed=seed)
        drawn.append([])
        for _ in range(12):
            choice.step(lambda: 1.0)
            drawn[-1].append(choice.training)
    assert drawn[0] == drawn[1] != drawn[2]
