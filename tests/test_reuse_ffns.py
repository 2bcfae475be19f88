"""FFNs that rows run through several times, and slices of them: VersatileFFN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu

import sparsify_compiler as sc
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import ParseError
from sparsify_compiler.passes.moe._routing import found_mixtures
from sparsify_compiler.passes.moe.reuse_ffns import ReuseFfns, at_least, one_of
from sparsify_compiler.passes.train.draw_loops import DrawLoops, Drawn, Every, example
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline


class Block(nn.Module):
    """x + ffn(norm(x)), with or without gate and biases."""

    def __init__(self, gated: bool, bias: bool, norm: bool, fused: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8) if norm else nn.Identity()
        self.fused = fused
        self.up, self.down = nn.Linear(8, 48 if fused else 24, bias=bias), nn.Linear(24, 8, bias=bias)
        self.gate = nn.Linear(8, 24, bias=bias) if gated and not fused else None

    def part(self, x: Tensor, rows: slice) -> Tensor:
        """What these neurons give, without the last bias."""
        if self.fused:
            gate, up = self.up(x).chunk(2, -1)
            return linear((silu(gate) * up)[..., rows], self.down.weight[:, rows])
        hidden = gelu(self.up(x)) if self.gate is None else silu(self.gate(x)) * self.up(x)
        return linear(hidden[..., rows], self.down.weight[:, rows])

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            gate, up = self.up(self.norm(x)).chunk(2, -1)
            return x + self.down(silu(gate) * up)
        read = self.norm(x)
        found: Tensor = x + self.down(gelu(self.up(read)) if self.gate is None else silu(self.gate(read)) * self.up(read))
        return found


def by_hand(block: Block, x: Tensor, loops: Tensor, slices: Tensor, one: ReuseFfns, fixed: int = 0) -> Tensor:
    """Row by row, after the authors' program: both routers read the stream."""
    bias = 0 if block.down.bias is None else block.down.bias
    size, every, found = 24 // one.slices, slice(0, 24), []
    for row in x.flatten(0, -2):
        count = fixed or int((loops @ row).argmax()) + 1
        state = row
        for _ in range(count):
            state = state + block.part(block.norm(state), every) + bias
        best = (slices @ row).topk(one.top_k)
        wide = row + bias
        for share, at in zip(best.values.softmax(-1), best.indices.tolist(), strict=True):
            wide = wide + share * block.part(block.norm(row), slice(at * size, at * size + size))
        weight = count / one.loops
        found.append(weight * state + (1 - weight) * wide)
    return torch.stack(found).view(x.shape) if found else x


def routers(module: nn.Module) -> tuple[Tensor, Tensor]:
    named = dict(module.named_parameters())
    return tuple(next(value for name, value in named.items() if f"{part}.weight" in name) for part in ("loops", "router"))  # type: ignore[return-value]


@settings(max_examples=8, derandomize=True, deadline=None)
@given(st.sampled_from([2, 3, 4]), st.sampled_from([(2, 1), (3, 3), (8, 2), (4, 2), (1, 1)]), st.booleans(), st.booleans(), st.booleans(),
       st.booleans(), st.sampled_from([(7,), (2, 5), (1,)]), st.integers(0, 99))
def test_rows_loop_and_take_slices_as_their_routers_say(loops: int, slices: tuple[int, int], gated: bool, bias: bool, norm: bool, fused: bool,
                                                        lead: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    block, x, one = Block(gated, bias, norm, fused).eval(), torch.randn(*lead, 8), ReuseFfns(slices[0], slices[1], loops)
    seen = torch.randn(*lead[:-1], 9, 8)
    program = Pipeline((one,)).run(capture(block, (seen,), {"x": {len(lead) - 1: "rows"}}), Context(seed=seed))
    module = instantiate(program)
    with torch.no_grad():
        torch.testing.assert_close(module(x), by_hand(block, x, *routers(module), one), rtol=1e-4, atol=1e-5)
    assert len(list(found_mixtures(program))) == 1  # its slices; loops are no experts that a router could be pruned to


def test_a_row_computes_no_more_loops_than_it_has() -> None:
    """What is computed beyond them would have a weight of 0, and no other test would see it."""
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 4.0, 1.0], [0.0, 0.0, 5.0]])
    share = one_of(scores)
    assert share.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert [at_least(share, loop).flatten().tolist() for loop in (1, 2, 3)] == [[0, 0, 0], [-1, 0, 0], [-1, -1, 0]]


def test_no_weight_is_added_but_two_routers_and_all_of_them_learn() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(True, False, True), Block(True, False, True)).eval(), torch.randn(64, 8)
    module, hook = sc.attach(model, (x,), sc.recipes.versatile_ffn(slices=4, loops=3, steps=25))
    own, new = sum(one.numel() for one in model.parameters()), sum(one.numel() for one in module.parameters())
    assert new == own + 2 * (4 + 3) * 8
    goal = torch.randn(64, 8)
    optimizer, losses = torch.optim.Adam(module.parameters(), 2e-2), []
    for step in range(40):
        loss = (module(x) - goal).square().mean()
        optimizer.zero_grad(), (loss + hook.loss()).backward()
        assert step or all(one.grad is not None and bool(one.grad.ne(0).any()) for one in module.parameters())
        optimizer.step(), hook.step(optimizer)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    drawn = [one for one in module.modules() if isinstance(one, Drawn)]
    assert len(drawn) == 2
    assert all(float(one.heat) == pytest.approx(0.1) for one in drawn)
    module.eval()
    with torch.no_grad():
        assert torch.equal(module(x), module(x))
        compiled = sc.compile(module, (x,), recipe="lower()")
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-4)


def test_draws_are_gumbels_in_training_alone_and_run_every_loop() -> None:
    scores, share = torch.tensor([[0.0, 1.0, 2.0]]).expand(4000, 3), torch.tensor([[0.0, 0.0, 1.0]]).expand(4000, 3)
    torch.manual_seed(0)
    found = Drawn(1.0)(share, scores)
    torch.testing.assert_close(found.mean(0), scores[0].softmax(-1), rtol=0.1, atol=0.02)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    runs = torch.tensor([[0.0], [1.0]])
    assert torch.equal(Every()(runs), torch.ones(2, 1))
    assert torch.equal(Every().eval()(runs), runs)
    assert torch.equal(Drawn(1.0).eval()(share, scores), share)
    with torch.no_grad():
        assert torch.equal(Every()(runs), runs)
        assert torch.equal(Drawn(1.0)(share, scores), share)


def test_a_temperature_that_falls_is_no_new_graph_for_torch_compile() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, inputs = example()
    module, hook = sc.attach(model, inputs, Pipeline((DrawLoops(5.0, 0.1, 4),)))
    assert "heat" not in " ".join(module.state_dict()), "it follows from the number of steps"
    graphs = CompileCounter()
    compiled = torch.compile(module, backend=graphs)
    found = set()
    for _ in range(5):
        compiled(*inputs)
        found.add(graphs.frame_count)
        hook.step()
    assert len(found) == 1, "one graph for all steps"
    assert all(float(one.heat) == pytest.approx(0.1) for one in module.modules() if isinstance(one, Drawn))


@pytest.mark.parametrize("loops", [2, 3])
def test_a_model_whose_rows_loop_learns_how_often_when_it_is_captured_again(loops: int) -> None:
    torch.manual_seed(0)
    block, x = Block(True, False, True).eval(), torch.randn(64, 8)
    once, _ = sc.attach(block, (x,), Pipeline((ReuseFfns(4, 2, loops),)))
    module, _ = sc.attach(once.eval(), (x,), Pipeline((DrawLoops(1.0),)))
    seen: list[Tensor] = []
    for one in (one for one in module.modules() if isinstance(one, Drawn)):
        one.register_forward_hook(lambda _, given, found: seen.append(found.detach()))
    module(x).square().mean().backward()
    (share,) = seen
    assert bool((share.sum(0) > 0).all())  # drawn, not the last for all
    grads = [value.grad for name, value in module.named_parameters() if "loops" in name]
    assert len(grads) == 1
    assert all(one is not None and bool(one.ne(0).any()) for one in grads)
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(x), once(x))


def test_every_loop_is_run_in_training_for_rows_that_drew_fewer() -> None:
    """A gradient of how often reaches the scores by what each loop would have given."""
    model, inputs = example()
    module, _ = sc.attach(model, inputs, Pipeline((DrawLoops(1.0),)))
    runs: list[Tensor] = []
    for one in (one for one in module.modules() if isinstance(one, Every)):
        one.register_forward_hook(lambda _, given, found: runs.append(found))
    module(*inputs)
    assert len(runs) == 2
    assert all(bool((one == 1).all()) for one in runs)


def test_the_stream_may_be_wider_than_what_the_ffn_computes_in() -> None:
    class Wide(Block):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = x + self.down(gelu(self.up(self.norm(x).bfloat16())))
            return found

    torch.manual_seed(0)
    model, x = Wide(False, True, True).eval(), torch.randn(6, 8)
    model.up.bfloat16(), model.down.bfloat16()
    program = Pipeline((ReuseFfns(4, 2, 3),)).run(capture(model, (x,)), ctx := Context())
    assert ctx.rewrites == 1, ctx.misses
    module = instantiate(program)
    assert all(one.dtype is torch.float32 for one in routers(module))
    with torch.no_grad():
        torch.testing.assert_close(module(x), by_hand(model.float(), x, *routers(module), ReuseFfns(4, 2, 3)), rtol=3e-2, atol=3e-2)


def test_which_loop_a_row_takes_learns_from_loops_that_it_did_not_take() -> None:
    """One block that must give what it gives after three loops, which few rows take at first."""
    torch.manual_seed(0)
    block, x = Block(True, False, False).eval(), torch.randn(256, 8)
    with torch.no_grad():
        goal = by_hand(block, x, torch.zeros(3, 8), torch.zeros(1, 8), ReuseFfns(1, 1, 3), fixed=3)
    module, hook = sc.attach(block, (x,), Pipeline((ReuseFfns(1, 1, 3), DrawLoops(1.0, 0.1, 200))))
    loops, _ = routers(module)
    optimizer, first = torch.optim.Adam([loops], 0.05), None
    for _ in range(150):
        loss = (module(x) - goal).square().mean()
        first = first or float(loss.detach())
        optimizer.zero_grad(), loss.backward(), optimizer.step(), hook.step(optimizer)
    with torch.no_grad():
        assert float((module.eval()(x) - goal).square().mean()) < 0.5 * first  # type: ignore[operator]


@pytest.mark.parametrize(("options", "why"), [({"slices": 5, "top_k": 2}, "24 neurons make no 5 slices"), ({}, "no sum with what goes by it")])
def test_what_does_not_fit_stays_and_says_why(options: dict[str, Any], why: str) -> None:
    model = Block(True, False, True) if options else nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
    ctx, x = Context(), torch.randn(6, 8)
    program = Pipeline((ReuseFfns(**options),)).run(capture(model.eval(), (x,)), ctx)
    assert why in str(ctx.misses[0])
    assert torch.equal(instantiate(program)(x), model(x))


@pytest.mark.parametrize("options", [{"loops": 1}, {"top_k": 9}, {"top_k": 0}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ParseError):
        ReuseFfns(**options)
    with pytest.raises(ParseError):
        DrawLoops(first=0.1, last=0.2)
