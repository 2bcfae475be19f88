"""Experts that retire in training: who goes, when, and what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from training_help import in_two_processes, sgd, step

import sparsify_compiler as sc
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import ParseError
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.passes.activation.select_neurons import GatedFfn
from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes.train.retire_experts import RetireExperts, _Ledgers, needed
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.training import LOWEST, Marked, Watch

SPLIT = SplitExperts(6, "copies", "random", "top_k(k=1)", 0.0, "weight_norm", "softmax", "none")


def attached(retire: RetireExperts, split: SplitExperts = SPLIT) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), GatedFfn(8, 32)).eval(), torch.randn(200, 8)
    module, hook = sc.attach(model, (x,), Pipeline((split, retire)))
    return module, hook, x


def ledger(module: nn.Module) -> Tensor:
    return next(value for name, value in module.named_buffers() if "ledger" in name)


def stepped(module: nn.Module, hook: Any, x: Tensor, steps: int) -> list[int]:
    """How many experts are left behind each step."""
    found = []
    for _ in range(steps):
        module(x)
        hook.step()
        found.append(int((ledger(module)[0] == 0).sum()))
    return found


def test_they_go_by_the_schedule_at_the_end_of_windows_and_are_chosen_no_more() -> None:
    module, hook, x = attached(RetireExperts(2, "ramp(end=8)", 2))
    before = {name: one.clone() for name, one in module.named_parameters()}
    assert stepped(module, hook, x, 12) == [6, 5, 5, 4, 4, 3, 3, 2, 2, 2, 2, 2]
    assert all(torch.equal(one, before[name]) for name, one in module.named_parameters())
    left = (ledger(module)[0] == 0).nonzero()[:, 0]
    router = next(one for name, one in module.named_parameters() if "router.weight" in name)
    chosen = choices(module, x)
    assert set(chosen.unique().tolist()) <= set(left.tolist())
    assert router.shape == (6, 8)


def choices(module: nn.Module, x: Tensor) -> Tensor:
    """The choice of the one mixture on these rows."""
    program = capture(module.eval(), (x,))
    region = next(iter(program.regions.values()))
    found: list[Tensor] = []

    class Look(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            found.extend([value[0]] if n is chosen and isinstance(value, tuple) else [value] if n is chosen else [])
            return value

    chosen = next(node for node in region.graph.nodes if node.target is experts_ffn.op).kwargs["chosen"]
    Look(region.module).run(x)
    return found[0]


def test_the_least_needed_go_first() -> None:
    module, hook, x = attached(RetireExperts(1, "ramp(end=5)", 1))
    with torch.no_grad():
        counts = torch.bincount(choices(module, x).flatten(), minlength=6)
    stepped(module, hook, x, 1)
    gone = (ledger(module)[0] != 0).nonzero()[:, 0]
    assert len(gone) == 1
    assert float(ledger(module)[1, gone]) == float(ledger(module)[1].min())
    assert int(counts[gone]) <= int(counts.sort().values[2])
    assert stepped(module, hook, x, 6)[-1] == 1


def test_no_fewer_are_left_than_a_row_takes_and_a_saved_state_goes_on() -> None:
    split = SplitExperts(6, "copies", "random", "top_k(k=3)", 0.0, "weight_norm", "normalised", "none")
    module, hook, x = attached(RetireExperts(1, "ramp(end=4)", 1), split)
    stepped(module, hook, x, 2)
    other, second, _ = attached(RetireExperts(1, "ramp(end=4)", 1), split)
    other.load_state_dict(module.state_dict()), second.load_state_dict(hook.state_dict())
    assert torch.equal(ledger(other), ledger(module))
    assert stepped(module, hook, x, 5)[-1] == stepped(other, second, x, 5)[-1] == 3
    assert torch.equal(ledger(other), ledger(module))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.floats(0, 1), st.floats(0, 0.99), st.integers(0, 99))
def test_those_that_are_left_are_the_most_needed(experts: int, last: int, taken: int, share: float, early: float, seed: int) -> None:
    torch.manual_seed(seed)
    taken = min(taken, experts)
    book = torch.stack([torch.zeros(experts), torch.rand(experts)])
    book[0, torch.randperm(experts)[: (experts - taken) // 2]] = LOWEST
    before = book[0] == 0
    ledgers = _Ledgers(RetireExperts(last, "constant", 1, early=early), [Marked("m", Watch(), {"self": book})])
    ledgers._retire(book, taken, share)
    left, least = book[0] == 0, max(min(last, experts), taken)
    assert not bool((left & ~before).any())  # none comes back
    assert int(left.sum()) >= min(least, int(before.sum()))
    if bool((before & ~left).any()):
        assert float(book[1, left].min()) >= float(book[1, before & ~left].max())
    assert int(left.sum()) <= max(round(experts + (least - experts) * share), least)
    mean = float(book[1, before].mean())
    assert int(left.sum()) <= least or float(book[1, left].min()) >= early * mean - 1e-6


def test_needs_add_up_over_the_steps() -> None:
    module, hook, x = attached(RetireExperts(1, "ramp(start=50, end=60)", 7))
    seen = []
    for rows in (x[:50], x[50:]):
        before = ledger(module)[1].clone()
        module(rows)
        hook.step()
        seen.append(ledger(module)[1] - before)
    other, second, _ = attached(RetireExperts(1, "ramp(start=50, end=60)", 7))
    other(x[50:])
    second.step()
    torch.testing.assert_close(seen[1], ledger(other)[1])
    torch.testing.assert_close(seen[0] + seen[1], ledger(module)[1])
    assert float(ledger(module)[1].sum()) > 1.2 * float(seen[1].sum())


def in_parts(recipe: RetireExperts) -> tuple[nn.Module, Any]:
    module, hook, _ = attached(recipe)
    return module, hook


@pytest.mark.slow
def test_two_processes_count_what_both_need(tmp_path: Path) -> None:
    """Halves of a batch that need other experts: what retires is what neither needs, as for one process on both."""
    retire, x = RetireExperts(2, "ramp(end=4)", 1), attached(RetireExperts())[2]
    with torch.no_grad():
        order = choices(attached(retire)[0], x).flatten().argsort()
    rows = x[order]
    one, other = in_two_processes(in_parts, retire, rows, torch.zeros(200, 8), 5, tmp_path)
    module, hook, _ = attached(retire)
    optimizer = sgd(module)
    for _ in range(5):
        step(rows, torch.zeros(200, 8), module, hook, optimizer)
    name = next(name for name in one if "ledger" in name)
    assert torch.equal(one[name], other[name])
    assert torch.equal(one[name][0], ledger(module)[0])
    torch.testing.assert_close(one[name][1], ledger(module)[1], rtol=1e-3, atol=1e-4)


def test_need_is_its_formula() -> None:
    scores, chosen = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]).log(), torch.tensor([[0, -1], [2, 1]])
    scores[0] = torch.tensor([2.0, 1.0, 1.0]).log()
    torch.testing.assert_close(needed(scores, chosen, "probability"), torch.tensor([0.5 / 2, (2 / 6) / 2, (3 / 6) / 2]))
    torch.testing.assert_close(needed(scores, chosen, "hits"), torch.tensor([0.5, 0.5, 0.5]))


def test_a_recipe_ends_in_one_expert_that_is_what_was_trained() -> None:
    module, hook, x = attached(RetireExperts(1, "ramp(end=4)", 2))
    stepped(module, hook, x, 4)
    trained = module.eval()
    program = Pipeline((sc.Pipeline.parse("drop_experts(density=0.1666667)").passes[0],)).run(capture(trained, (x,)), Context(batches=[(x,)]))
    op = next(node for _, node in program.nodes() if node.target is experts_ffn.op)
    assert op.kwargs["gate"].meta["val"].shape[0] == 1
    from sparsify_compiler.call import instantiate
    torch.testing.assert_close(instantiate(program)(x), trained(x), rtol=1e-5, atol=1e-6)
    assert [type(one).__name__ for one in sc.recipes.task_expert_pruning(steps=10).passes] == ["RetireExperts"]
    assert [type(one).__name__ for one in sc.recipes.task_expert_pruning(0.5).passes] == ["DropExperts"]


def test_twice_is_once_and_a_wrong_option_is_refused() -> None:
    ctx = Context()
    torch.manual_seed(0)
    model, x = GatedFfn(8, 32).eval(), torch.randn(20, 8)
    Pipeline((SPLIT, RetireExperts(), RetireExperts(2))).run(capture(model, (x,)), ctx)
    assert ["retire already" in str(miss) for miss in ctx.misses] == [True]
    whole, ctx = SplitExperts(6, "copies", "random", "threshold", 0.0, "weight_norm", "softmax", "none", density=0.5), Context(batches=[(x,)])
    Pipeline((whole, RetireExperts())).run(capture(model, (x,)), ctx)
    assert ["a row may take all of its experts" in str(miss) for miss in ctx.misses] == [True]
    for wrong in ({"last": 0}, {"window": 0}, {"early": 1.0}, {"measure": "weight"}):
        with pytest.raises(ParseError):
            RetireExperts(**wrong)  # type: ignore[arg-type]
