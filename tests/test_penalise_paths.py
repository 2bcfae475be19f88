"""The prior over times of Switch-DiT: windows, matching, and what the loss does to routers."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparsify_compiler as sc
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import ParseError
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.passes.moe._routing import Routing
from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes.train.penalise_paths import PenalisePaths, divergence, example, matched, windows
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline

DYNAMIC = {"x": {0: "images", 1: "patches"}, "t": {0: "images"}}


def test_windows_slide_with_the_time() -> None:
    times = torch.tensor([0, 500, 1000, 250])
    assert windows(times, 5, 2, 1000.0, 1.0).tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1], [0, 1, 1, 0, 0]]
    assert windows(times, 5, 2, 1000.0, 4.0)[1].tolist() == [1, 1, 0, 0, 0]  # a sixteenth of three places
    assert windows(torch.tensor([2000.0]), 4, 4, 1000.0, 1.0).tolist() == [[1, 1, 1, 1]]


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_no_order_of_the_columns_is_nearer(count: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    wanted, chosen = (torch.randint(0, 2, (rows, count)).float() for _ in range(2))
    best = min(float((wanted[:, list(order)] - chosen).abs().sum()) for order in permutations(range(count)))
    found = matched(wanted, chosen)
    assert float((found - chosen).abs().sum()) == best
    assert sorted(found.T.tolist()) == sorted(wanted.T.tolist())


def test_divergence_is_its_formula() -> None:
    a, b = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.25, 0.5]])
    middle = (a + b) / 2
    wanted = sum(p * (p / m).log() for one in (a, b) for p, m in zip(one[0], middle[0], strict=True) if p) / 2
    assert float(divergence(a, b)) == pytest.approx(float(wanted), abs=1e-4)
    assert float(divergence(a, a)) == pytest.approx(0.0, abs=1e-6)


def test_texts_of_near_times_come_to_share_experts() -> None:
    """The loss is that of all routers together, and brings a router of times to windows: the further the times, the fewer experts in common."""
    from test_condition import Diffusion

    torch.manual_seed(0)
    net, t = Diffusion().eval(), torch.linspace(0, 999, 64)
    x = torch.randn(64, 3, 8)
    split = SplitExperts(3, "copies", "random", "top_k(k=1)", 0.25, "weight_norm", "normalised", "none", given="t_embedder")
    module, hook = sc.attach(net, (x, t), Pipeline((split, PenalisePaths(bend=1.0))), dynamic=DYNAMIC)
    routers = [one for name, one in module.named_parameters() if "router" in name]
    assert len(routers) == 2

    def odds() -> Tensor:
        with torch.no_grad():
            return torch.cat([(net.time(t) @ one.T).softmax(-1) for one in routers], 1) / 2

    module(x, t)
    chosen = torch.cat([torch.nn.functional.one_hot((net.time(t) @ one.T).argmax(-1), 3) for one in routers], 1).float()
    wanted = windows(t, 6, 2, 999.0, 1.0)
    by_hand = divergence(odds(), matched(wanted, chosen) / 2)
    assert float(hook.loss().detach()) == pytest.approx(float(by_hand), rel=1e-4)
    optimizer, losses = torch.optim.Adam(list(module.parameters()), 0.02), []
    for _ in range(150):
        module(x, t)
        loss = hook.loss()
        optimizer.zero_grad(), loss.backward(), optimizer.step(), hook.step(optimizer)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_rows_that_are_no_texts_and_scores_that_are_not_known_are_misses() -> None:
    class Flat(Routing):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward((x + t[:, None, None]).flatten(0, 1)).view(x.shape)

    class Given(Routing):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            chosen = (t[:, None, None] + torch.zeros_like(x[..., :1])).long().clamp(max=3)
            y: Tensor = experts_ffn.op(x, chosen, None, self.gate, None, self.down, activation="relu")
            return y

    for net, why in ((Flat(), "no row or rows for each of the texts"), (Given(), "scores of its router are not known")):
        ctx = Context()
        Pipeline((PenalisePaths(),)).run(capture(net.eval(), (torch.randn(6, 3, 8), torch.arange(6))), ctx)
        assert [why in str(miss) for miss in ctx.misses] == [True]


def test_a_model_without_such_an_input_says_so() -> None:
    (net, inputs), ctx = example(), Context()
    Pipeline((PenalisePaths("time"),)).run(capture(net, inputs), ctx)
    assert ["no input time of [texts]" in str(miss) for miss in ctx.misses] == [True]
    for wrong in ({"most": 0.0}, {"bend": 0.0}, {"weight": -1.0}):
        with pytest.raises(ParseError):
            PenalisePaths(**wrong)
