"""RePaViT's two passes: every spelling of idle channels merges, exactly; what cannot says why; a trained FFN loses least where it was told so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import CalibrationError, ParseError
from sparsify_compiler.passes.recipes.repavit import repavit
from sparsify_compiler.passes.reparam.idle_channels import IdleChannels
from sparsify_compiler.passes.reparam.merge_idle_channels import MergeIdleChannels
from sparsify_compiler.passes_api import Context, Pass
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.preserves import check_preserves, outputs
from sparsify_compiler.program import Program
from sparsify_compiler.why import why

WIDTH, HIDDEN, ACTIVE = 8, 32, 8


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def squared_relu(x: Tensor) -> Tensor:
    return functional.relu(x).square()


def slices(h: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([act(h[..., :ACTIVE]), h[..., ACTIVE:]], -1)


def split(h: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    active, idle = h.split([ACTIVE, HIDDEN - ACTIVE], -1)
    return torch.cat([act(active), idle], dim=h.dim() - 1)


def many_pieces(h: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    a, b, c, d = h.split(HIDDEN // 4, -1)
    return torch.cat([b, act(c), d, a], -1)


def chunk(h: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    first, second = h.chunk(2, -1)
    return torch.cat([second, act(first)], -1)


def tensor_split(h: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    active, idle = h.tensor_split([ACTIVE], -1)
    return torch.cat([act(active), idle], -1)


def narrow(h: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([act(h.narrow(-1, 0, ACTIVE)), h.narrow(-1, ACTIVE, HIDDEN - ACTIVE)], -1)


def from_the_end(h: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([h[..., :-ACTIVE], act(h[..., -ACTIVE:])], -1)


def fixed_mask(h: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """The spelling of the paper's own code."""
    mask = torch.zeros_like(h, dtype=torch.bool)
    mask[..., :ACTIVE] = True
    return torch.where(mask, act(h), h)


def written_into(h: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    h = h.clone()
    h[..., :ACTIVE] = act(h[..., :ACTIVE])
    return h


def two_functions(h: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    a, b, c, d = h.split(HIDDEN // 4, -1)
    return torch.cat([act(a), torch.tanh(b), c, d], -1)


SPELLINGS = [slices, split, many_pieces, chunk, tensor_split, narrow, from_the_end, fixed_mask, written_into, two_functions]
ACTIVATIONS = [functional.gelu, functional.relu, functional.silu, functional.hardswish, functional.leaky_relu, torch.tanh, quick_gelu, squared_relu]


class RePa(nn.Module):
    """An FFN with idle channels. `norms` counts its BatchNorms: before the first linear, before the second."""

    def __init__(self, spelling: Any, act: Any = functional.gelu, *, norms: int = 0, flat: bool = False, shortcut: bool = True, bias: bool = True,
                 out: int = WIDTH) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN, bias=bias), nn.Linear(HIDDEN, out, bias=bias)
        self.norm1 = nn.BatchNorm1d(WIDTH) if norms > 0 else None
        self.norm2 = nn.BatchNorm1d(HIDDEN, affine=bias) if norms > 1 else None
        self.spelling, self.act, self.flat, self.shortcut = spelling, act, flat, shortcut
        for norm in (self.norm1, self.norm2):
            for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias) if norm is not None else ():
                if tensor is not None:
                    tensor.data.uniform_(0.5, 2)

    def norm(self, norm: nn.Module | None, x: Tensor) -> Tensor:
        if norm is None or x.dim() == 2:
            return x if norm is None else norm(x)
        if self.flat:
            return norm(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        return norm(x.transpose(-1, -2)).transpose(-1, -2) if x.dim() == 3 else norm(x.flatten(1, 2).mT).mT.unflatten(1, x.shape[1:3])

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(self.norm(self.norm2, self.spelling(self.fc1(self.norm(self.norm1, x)), self.act)))
        return x + y if self.shortcut else y


def merged(model: nn.Module, x: Tensor, dynamic: Any = None) -> list[str]:
    """The ops that are left, after checking that the values are the same to 1e-10."""
    program = capture(model.double().eval(), (x.double(),), dynamic)
    after = Pipeline((MergeIdleChannels(),)).run(program, Context())
    check_preserves(program, after, (x.double(),), MergeIdleChannels.preserves)
    return ops(after)


def ops(program: Program) -> list[str]:
    return [str(n.target).split(".")[1] for _, n in program.nodes() if n.op == "call_function"]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("norms", [0, 2])
def test_every_spelling_merges(spelling: Any, norms: int) -> None:
    torch.manual_seed(0)
    left = merged(RePa(spelling, norms=norms), torch.randn(2, 5, WIDTH))
    thin = ["linear", "gelu", "linear"]
    assert left == ([*thin, "linear", "tanh", "linear", "linear", "add", "add"] if spelling is two_functions else [*thin, "linear", "add"])


@settings(deadline=None, max_examples=10)
@given(st.data())
def test_every_activation_norm_and_rank(data: st.DataObject) -> None:
    torch.manual_seed(0)
    act, spelling = data.draw(st.sampled_from(ACTIVATIONS)), data.draw(st.sampled_from(SPELLINGS))
    norms, bias, shortcut = data.draw(st.integers(0, 2)), data.draw(st.booleans()), data.draw(st.booleans())
    shape = data.draw(st.sampled_from([(3, WIDTH), (2, 5, WIDTH), (2, 3, 3, WIDTH)]))
    flat, dynamic = data.draw(st.booleans()) or len(shape) == 4, data.draw(st.sampled_from([None, {"x": {0: "batch"}}]))
    model = RePa(spelling, act, norms=norms, flat=flat, bias=bias, shortcut=shortcut, out=WIDTH if shortcut else 4)
    left = merged(model, torch.randn(shape), dynamic)
    assert left.count("linear") == (5 if spelling is two_functions and act is not torch.tanh else 3)  # it uses tanh beside act
    assert "batch_norm" not in left
    assert "cat" not in left


@pytest.mark.parametrize("order", [(0, 3, 1, 2), (0, 3, 2, 1)])
def test_a_norm_between_permutations(order: tuple[int, ...]) -> None:
    class Swin(RePa):
        def norm(self, norm: nn.Module | None, x: Tensor) -> Tensor:
            back = sorted(range(4), key=order.__getitem__)
            return functional.batch_norm(x.permute(order), norm.running_mean, norm.running_var, norm.weight, norm.bias).permute(back)

    torch.manual_seed(0)
    assert merged(Swin(slices, norms=2), torch.randn(2, 3, 4, WIDTH)) == ["linear", "gelu", "linear", "linear", "add"]


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("dynamic", [None, {"x": {0: "batch"}}])
def test_norms_may_be_folded_before(flat: bool, dynamic: Any) -> None:
    torch.manual_seed(0)
    model, x = RePa(slices, norms=2, flat=flat).double().eval(), torch.randn(2, 5, WIDTH).double()
    program = capture(model, (x,), dynamic)
    after = Pipeline.parse("fold_batchnorm() | merge_idle_channels()").run(program)
    check_preserves(program, after, (x,), MergeIdleChannels.preserves)
    assert ops(after) == ["linear", "gelu", "linear", "linear", "add"]


def test_a_norm_with_other_readers_stays_for_them() -> None:
    class Parallel(RePa):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.norm1, x)
            return x + self.fc2(slices(self.fc1(y), functional.gelu)) + torch.sin(y)

    torch.manual_seed(0)
    left = merged(Parallel(slices, norms=1), torch.randn(2, 5, WIDTH))
    assert left.count("batch_norm") == 1
    assert left.count("linear") == 3


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Prelu(RePa):
    def __init__(self) -> None:
        super().__init__(slices)
        self.slope = nn.Parameter(torch.rand(1))
        self.act = lambda x: functional.prelu(x, self.slope)


class Leak(RePa):
    def forward(self, x: Tensor) -> Any:
        h = self.fc1(x)
        return self.fc2(slices(h, functional.gelu)), h.sum()


class ByInput(RePa):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(torch.where(h > 0, functional.gelu(h), h))


class ByRow(RePa):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(torch.where(x.sum(-1, keepdim=True) > 0, functional.gelu(h), h))


@pytest.mark.parametrize(("model", "reason"), [
    (Gated(), "it is gated"),
    (Prelu(), "has parameters of its own (slope)"),
    (Leak(slices), "the intermediate value linear is also used by sum"),
    (ByInput(slices), "every hidden channel goes through the activation: none is idle"),
    (ByRow(slices), "sum_1 (aten.sum.dim_IntList) is no elementwise function"),
    (RePa(lambda h, act: act(h)), "every hidden channel goes through the activation: none is idle"),
    (RePa(lambda h, act: h), "two linears in a row"),
    (RePa(lambda h, act: torch.cat([act(h[..., :30]), h[..., 30:]], -1)), "would raise FLOPs from"),
    (RePa(lambda h, act: torch.cat([act(h[..., ::2]), h[..., 1::2]], -1)), "takes every 2th channel"),
])
def test_what_does_not_merge_says_why(model: nn.Module, reason: str) -> None:
    told = [str(m) for m in why("merge_idle_channels", model.eval(), (torch.randn(2, 5, WIDTH),))]
    assert len(told) == 1
    assert reason in told[0]


def test_cost_decides() -> None:
    """Merged where 2 * width * idle exceeds width * width by more than the sum costs."""
    def left(idle: int) -> int:
        spelling = lambda h, act: torch.cat([act(h[..., idle:]), h[..., :idle]], -1)  # noqa: E731
        return ops(MergeIdleChannels().run(capture(RePa(spelling).eval(), (torch.randn(4, 16, WIDTH),)).clone(), Context())).count("linear")

    assert [left(idle) for idle in (1, 2, 8, 24)] == [2, 2, 3, 3]


def test_a_mask_on_the_merged_weights_is_not_dissolved() -> None:
    model = RePa(slices).eval()
    program = (Pipeline.parse("mask_weights(density=0.5)")).run(capture(model, (torch.randn(2, 5, WIDTH),)))
    ctx = Context()
    assert Pipeline((MergeIdleChannels(),)).run(program, ctx).text() == program.text()
    assert "would dissolve the mask" in str(ctx.misses[0])


# --- the train-time pass ---------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, scale: bool = False) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(functional.gelu(self.fc1(self.norm(x))))
        return x + (y if self.scale is None else y * self.scale)


def applied(item: Pass, model: nn.Module, x: Tensor) -> tuple[Program, Program, Context]:
    ctx = Context()
    ctx.calibrate = lambda program, needs: calibrate(program, [(x,)], needs, cache=False)
    program = capture(model.eval(), (x,))
    return program, Pipeline((item,)).run(program, ctx), ctx


@pytest.mark.parametrize("which", ["last", "first"])
def test_the_idle_ffn_is_the_papers_formula(which: str) -> None:
    torch.manual_seed(0)
    model, x = Block().double(), torch.randn(2, 5, WIDTH).double()
    _, after, _ = applied(IdleChannels(theta=0.75, which=which), model, x)
    h = model.fc1(model.norm(x))
    active = slice(0, 8) if which == "last" else slice(24, 32)
    h[..., active] = functional.gelu(h[..., active])
    torch.testing.assert_close(outputs(after, (x,))[0], x + model.fc2(h), rtol=1e-12, atol=1e-12)


def test_the_idle_ffn_trains_and_then_merges() -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(4, 6, WIDTH)
    _, program, _ = applied(repavit()[0], model, x)
    module, target = instantiate(program), torch.randn(4, 6, WIDTH)
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {name for name, _ in model.named_parameters()}
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = functional.mse_loss(module(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = repavit()[1:].run(program)
    check_preserves(program, after, (x,), MergeIdleChannels.preserves)
    assert ops(after) == ["layer_norm", "linear", "gelu", "linear", "linear", "add", "add"]


def test_the_straightest_channels_lose_least() -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(16, 20, WIDTH)
    model.fc1.bias.data = torch.linspace(-4, 4, HIDDEN)[torch.randperm(HIDDEN)]  # some channels are nearly linear, others are not
    errors = {}
    for which in ("last", "straightest"):
        before, after, _ = applied(IdleChannels(theta=0.75, which=which), model, x)
        errors[which] = float((outputs(before, (x,))[0] - outputs(after, (x,))[0]).norm())
        merged_program = Pipeline((MergeIdleChannels(),)).run(after)
        check_preserves(after, merged_program, (x,), MergeIdleChannels.preserves)
        assert ops(merged_program).count("linear") == 3
    assert errors["straightest"] < 0.2 * errors["last"]


def test_the_straightest_fit_is_least_squares() -> None:
    """With every channel but one idle, each follows its own regression line on the calibration data."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(WIDTH, HIDDEN, bias=False), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN)).double(), torch.randn(50, WIDTH).double()
    nn.init.eye_(model[2].weight)
    _, after, _ = applied(IdleChannels(theta=31 / 32, which="straightest"), model, x)
    with torch.no_grad():
        h = model[0](x)
        a = functional.silu(h)
        slope = ((h - h.mean(0)) * (a - a.mean(0))).sum(0) / (h - h.mean(0)).square().sum(0)
        line = slope * (h - h.mean(0)) + a.mean(0)
    curved = (a - line).norm(dim=0).argmax()
    line[:, curved] = a[:, curved]
    torch.testing.assert_close(outputs(after, (x,))[0], line + model[2].bias, rtol=1e-5, atol=1e-5)
    assert torch.equal(model[0].weight, instantiate(capture(model, (x,))).state_dict()["0.weight"])


def test_a_layer_norm_becomes_a_batch_norm_and_the_shortcut_is_absorbed() -> None:
    torch.manual_seed(0)
    model, x = Block(scale=True), torch.randn(32, 10, WIDTH) * torch.linspace(0.5, 3, WIDTH) + 1
    _, program, ctx = applied(IdleChannels(norm="batch"), model, x)
    assert not ctx.misses
    assert ops(program)[:3] == ["transpose", "batch_norm", "transpose"]
    state = instantiate(program).state_dict()
    torch.testing.assert_close(state["norm.running_mean"], x.flatten(0, 1).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["norm.running_var"], x.flatten(0, 1).var(0, correction=0), rtol=1e-4, atol=1e-5)
    after = repavit()[1:].run(program)
    check_preserves(program, after, (x,), MergeIdleChannels.preserves)
    assert ops(after) == ["linear", "gelu", "linear", "linear", "add"]


@pytest.mark.parametrize(("item", "model", "reason"), [
    (IdleChannels(), Gated(), "it is gated"),
    (IdleChannels(theta=0.001), Block(), "there must be both"),
    (IdleChannels(), nn.Linear(8, 8), "the model has no FFN"),
    (IdleChannels(norm="batch"), nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)), "there is no LayerNorm"),
])
def test_what_cannot_have_idle_channels_says_why(item: Pass, model: nn.Module, reason: str) -> None:
    _, _, ctx = applied(item, model, torch.randn(2, 5, WIDTH))
    assert reason in str(ctx.misses[0])


def test_options_are_checked() -> None:
    with pytest.raises(ParseError, match=r"theta lies between 0 and 1, got 1\.5"):
        IdleChannels(theta=1.5)
    with pytest.raises(ParseError, match="which is one of"):
        IdleChannels(which="middle")
    with pytest.raises(CalibrationError, match="there is none"):
        Pipeline((IdleChannels(which="straightest"),)).run(capture(Block().eval(), (torch.randn(2, 5, WIDTH),)))


def test_only_selected_ffns_change() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(3))).eval()
    program = capture(model, (torch.randn(2, 8),))
    assert ops(Pipeline((IdleChannels(targets=("0", "2")),)).run(program)).count("cat") == 2
    assert ops(Pipeline((IdleChannels(ignore="1"),)).run(program)).count("cat") == 2
