"""The exact rewrites of linears and norms, on every form that their docstrings name, in float64; and what they say where they do nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, linear, scaled_dot_product_attention

from sparsify_compiler.capture import capture
from sparsify_compiler.passes.reparam.fold_norm_affine import FoldNormAffine
from sparsify_compiler.passes.reparam.fold_scale import FoldScale
from sparsify_compiler.passes.reparam.layernorm_to_rmsnorm import LayernormToRmsnorm
from sparsify_compiler.passes.reparam.merge_adapters import MergeAdapters
from sparsify_compiler.passes.reparam.merge_linear_chain import MergeLinearChain
from sparsify_compiler.passes.reparam.merge_structured_ffn import MergeStructuredFfn
from sparsify_compiler.passes_api import Context, Pass
from sparsify_compiler.pattern import op_name
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.preserves import check_preserves, masked_weights
from sparsify_compiler.program import Program

calm = settings(deadline=None, max_examples=4)
ANY = {"x": {0: "batch"}}


def ops(program: Program) -> list[str]:
    return [op_name(n) for _, n in program.nodes() if n.op == "call_function"]


class Formula(nn.Module):
    """A function of x and of named parameters, buffers (bool) and modules."""

    def __init__(self, function: Callable[..., Tensor], **state: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in state.items():
            if isinstance(value, Tensor):
                value = nn.Parameter(value) if value.is_floating_point() else value
                self.register_parameter(name, value) if isinstance(value, nn.Parameter) else self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self)


def run(item: Pass | Pipeline, model: nn.Module, *inputs: Tensor, dynamic: Any = None,
        dtype: torch.dtype = torch.float64) -> tuple[Program, list[str]]:
    """The Program after the passes, whose values have been compared, and what was not done."""
    model = model.to(dtype).eval()
    randomise(model)
    given = tuple(i.to(dtype) if i.is_floating_point() else i for i in inputs)
    program = capture(model, given, dynamic)
    ctx = Context(example_inputs=given)
    after = (item if isinstance(item, Pipeline) else Pipeline((item,))).run(program, ctx)
    check_preserves(program, after, given, FoldScale.preserves)
    if dynamic:
        larger = tuple(torch.cat([i, i, i]) for i in given)
        check_preserves(program, after, larger, FoldScale.preserves)
    return after, [str(miss) for miss in ctx.misses]


def randomise(model: nn.Module) -> None:
    """Norms with parameters that hide no error."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
            for vector in (module.weight, getattr(module, "bias", None)):
                if vector is not None:
                    nn.init.uniform_(vector, 0.5, 2)


def r(*shape: int) -> Tensor:
    return torch.randn(*shape)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- merge_linear_chain -----------------------------------------------------------------------------------------------------------------


@calm
@given(st.lists(st.tuples(st.integers(8, 12), st.booleans()), min_size=2, max_size=4), st.booleans())
def test_a_chain_that_narrows_becomes_one_linear(layers: list[tuple[int, bool]], dynamic: bool) -> None:
    sizes = [6, *sorted(size for size, _ in layers[:-1]), 4]
    chain = nn.Sequential(*(nn.Linear(a, b, bias=bias) for a, b, (_, bias) in zip(sizes[:-1], sizes[1:], layers, strict=True)))
    after, _ = run(MergeLinearChain(), Formula(lambda x, s: s.chain(x), chain=chain), r(3, 5, 6), dynamic=ANY if dynamic else None)
    assert ops(after) == ["linear"]


def test_a_low_rank_pair_stays_with_both_numbers() -> None:
    after, told = run(MergeLinearChain(), nn.Sequential(nn.Linear(64, 4, bias=False), nn.Linear(4, 64)), r(100, 64))
    assert ops(after) == ["linear", "linear"]
    assert len(told) == 1
    assert "would raise FLOPs from" in told[0]


@pytest.mark.parametrize(("function", "reason"), [
    (lambda x, s: s.two(s.one(x)) + s.one(x).sum(), "is also used by"),
    (lambda x, s: s.two(s.one(x)) + linear(x, s.two.weight), "two.weight is tied: linear_2 reads it too"),
    (lambda x, s: linear(linear(x, s.one.weight * s.mask), s.two.weight), "would dissolve the mask"),
    (lambda x, s: linear(linear(x, s.one.weight), x.reshape(6, 6)), "v must be a parameter"),
    (lambda x, s: s.two(torch.relu(s.one(x))), "expected linear, found relu"),
])
def test_a_chain_that_is_not_merged_says_why(function: Any, reason: str) -> None:
    model = Formula(function, one=nn.Linear(6, 6), two=nn.Linear(6, 6), mask=torch.rand(6, 6) > 0.5)
    _, told = run(MergeLinearChain(), model, r(6, 6))
    assert any(reason in line for line in told), told


# --- merge_adapters ---------------------------------------------------------------------------------------------------------------------


def lora(x: Tensor, s: Any, down: str = "p", up: str = "u") -> Tensor:
    return linear(linear(x, getattr(s, down)), getattr(s, up))


LORAS: dict[str, Callable[..., Tensor]] = {
    "plain": lambda x, s: s.base(x) + lora(x, s),
    "scaled": lambda x, s: s.base(x) + 0.5 * lora(x, s),
    "adapter first": lambda x, s: lora(x, s) * 2.0 + s.base(x),
    "divided": lambda x, s: s.base(x) + lora(x, s) * (1 / 8),
    "between": lambda x, s: s.base(x) + linear(linear(x, s.p) * 0.25, s.u),
    "input": lambda x, s: s.base(x) + lora(x * 3.0, s),
    "by matrices": lambda x, s: s.base(x) + (x @ s.p.t() @ s.u.t()) * 2.0,
    "learned scale": lambda x, s: s.base(x) + lora(x, s) * s.scale,
    "vera": lambda x, s: s.base(x) + linear(linear(x, s.p) * s.inner, s.u) * s.outer,
    "two": lambda x, s: s.base(x) + 0.5 * lora(x, s) + 2.0 * lora(x, s, "p2", "u2"),
    "two summed": lambda x, s: s.base(x) + (0.5 * lora(x, s) + lora(x, s, "p2", "u2")),
    "residual between": lambda x, s: (s.base(x) + x.sum(-1, keepdim=True)) + lora(x, s),
    "biased": lambda x, s: s.base(x) + linear(linear(x, s.p, s.inner), s.u, s.outer) * 2.0,
    "serial": lambda x, s: (lambda h: h + 0.5 * linear(linear(h, s.p3), s.u))(s.base(x)),
    "full": lambda x, s: s.base(x) + 0.5 * linear(x, s.full),
    "in the weight": lambda x, s: linear(x, s.base.weight + 0.5 * (s.u @ s.p), s.base.bias),
    "dora in the weight": lambda x, s: linear(x, (s.m / (s.base.weight + s.u @ s.p).norm(dim=1))[:, None] * (s.base.weight + s.u @ s.p), s.base.bias),
}


def adapted(function: Callable[..., Tensor], bias: bool = True) -> Formula:
    return Formula(function, base=nn.Linear(6, 10, bias=bias), p=r(2, 6), u=r(10, 2), p2=r(3, 6), u2=r(10, 3), p3=r(2, 10), full=r(10, 6), m=r(10),
                   scale=r(1), inner=r(2), outer=r(10))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", list(LORAS))
def test_every_spelling_of_an_adapter(name: str, bias: bool) -> None:
    left = ["sum", "linear", "add"] if name == "residual between" else ["linear"]
    x, dynamic = (r(3, 6), None) if bias else (r(2, 3, 6), ANY)
    after, _ = run(MergeAdapters(), adapted(LORAS[name], bias), x, dynamic=dynamic)
    assert sorted(op for op in ops(after) if not op.startswith("sym_")) == sorted(left)


@calm
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5))
def test_an_adapter_of_any_size(inputs: int, outputs: int, rank: int, rows: int) -> None:
    model = Formula(LORAS["scaled"], base=nn.Linear(inputs, outputs), p=r(rank, inputs), u=r(outputs, rank))
    assert ops(run(MergeAdapters(), model, r(rows, inputs))[0]) == ["linear"]


def test_an_adapter_in_bfloat16() -> None:
    after, _ = run(MergeAdapters(), adapted(LORAS["two"]), r(3, 6), dtype=torch.bfloat16)
    assert ops(after) == ["linear"]
    assert all(n.meta["val"].dtype == torch.bfloat16 for _, n in after.nodes() if n.op != "output")


@pytest.mark.parametrize("bias", [True, False])
def test_dora_as_peft_computes_it(bias: bool) -> None:
    def dora(x: Tensor, s: Any) -> Tensor:
        h = s.base(x)
        weight = s.base.weight + 4.0 * linear(linear(torch.eye(6, dtype=x.dtype), s.p), s.u).T
        g = (s.m / torch.linalg.norm(weight, dim=1)).view(1, -1)
        alone = h - s.base.bias if bias else h
        return h + ((g - 1) * alone + g * lora(x, s) * 4.0)

    after, _ = run(MergeAdapters(), adapted(dora, bias), r(3, 6))
    assert ops(after) == ["linear"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_dora_by_hand(bias: bool, scale: float) -> None:
    def dora(x: Tensor, s: Any) -> Tensor:
        g = s.m / (s.base.weight + scale * s.u @ s.p).norm(dim=1)
        return g * (s.base(x) + (lora(x, s) if scale == 1 else scale * lora(x, s)))  # type: ignore[no-any-return]

    after, _ = run(MergeAdapters(), adapted(dora, bias), r(3, 6))
    assert ops(after) == ["linear"]


def test_adapters_of_convs_and_embeddings() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1, stride=2)
    model = Formula(lambda x, s: s.conv(x) + conv2d(conv2d(x, s.p, None, 2, 1), s.u) * 0.5, conv=conv, p=r(2, 3, 3, 3), u=r(4, 2, 1, 1))
    assert ops(run(MergeAdapters(), model, r(2, 3, 7, 7))[0]) == ["conv2d"]
    wide = Formula(lambda x, s: s.conv(x) + conv2d(conv2d(x, s.p), s.u, padding=1) * 0.5, conv=nn.Conv2d(3, 4, 3, padding=1),
                   p=r(2, 3, 1, 1), u=r(4, 2, 3, 3))
    assert ops(run(MergeAdapters(), wide, r(2, 3, 7, 7))[0]) != ["conv2d"]
    table = Formula(lambda x, s: s.table(x) + (nn.functional.embedding(x, s.p.t()) @ s.u.t()) * 2.0, table=nn.Embedding(9, 4), p=r(2, 9), u=r(4, 2))
    assert ops(run(MergeAdapters(), table, torch.randint(0, 9, (2, 3)))[0]) == ["embedding"]


def inside(**given: Any) -> Formula:
    """A layer with a path: masks are compared by it."""
    return Formula(lambda x, s: s.layer(x), layer=Formula(**given))


def masked(function: Callable[..., Tensor]) -> Formula:
    return inside(function=function, weight=r(8, 8), mask=torch.rand(8, 8) > 0.5, other=torch.rand(8, 8) > 0.5, p=r(2, 8), u=r(8, 2),
                  column=r(8, 1), row=r(1, 8), down=torch.rand(8, 2) > 0.5)


MASK_KEPT: dict[str, Callable[..., Tensor]] = {
    "sqft, of the result": lambda x, s: linear(x, s.weight * s.mask) + 2.0 * linear(x, (s.u @ s.p) * s.mask),
    "sqft, of the weight": lambda x, s: linear(x, s.weight * s.mask + 2.0 * ((s.u @ s.p) * s.mask)),
    "spp, of the result": lambda x, s: linear(x, s.weight * s.mask) + linear(x, s.column * s.row * (s.weight * s.mask)) * 2.0,
    "spp, of the weight": lambda x, s: linear(x, (s.weight * s.mask) * (1.0 + s.column * s.row)),
}
MASK_LOST: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "lora": (lambda x, s: linear(x, s.weight * s.mask), lambda x, s: 2.0 * lora(x, s)),
    "another mask": (lambda x, s: linear(x, s.weight * s.mask), lambda x, s: linear(x, (s.u @ s.p) * s.other)),
    "lora in the weight": (lambda x, s: linear(x, s.weight * s.mask + s.u @ s.p), lambda x, s: x),
    "masked adapter": (lambda x, s: linear(x, s.weight), lambda x, s: linear(linear(x, s.p), s.u * s.down)),
}


@pytest.mark.parametrize("name", list(MASK_KEPT))
def test_a_mask_survives_a_merge(name: str) -> None:
    model = masked(MASK_KEPT[name])
    after, _ = run(MergeAdapters(), model, r(3, 8))
    assert ops(after) == ["mul", "linear"], "one weight, and its mask"
    (_, weight), = masked_weights(after)
    assert torch.equal(weight != 0, model.layer.mask)


@pytest.mark.parametrize("name", list(MASK_LOST))
def test_a_merge_that_would_fill_the_zeros_is_refused(name: str) -> None:
    base, adapter = (masked(function) for function in MASK_LOST[name])
    model = Formula(lambda x, s: s.base(x) + s.adapter(x), base=base, adapter=adapter)
    after, told = run(MergeAdapters(), model, r(3, 8))
    assert any("would dissolve the mask" in line for line in told), told
    assert len(ops(after)) > 2


@pytest.mark.parametrize(("function", "reason"), [
    (lambda x, s: s.base(x) + linear(torch.relu(linear(x, s.p)), s.u), "expected linear, found relu"),
    (lambda x, s: s.base(x) + lora(x.tanh(), s), "expected the same x"),
    (lambda x, s: s.base(x) + lora(x, s) * x[:, :1], "s must be a parameter"),
    (lambda x, s: (lambda h: h + lora(x, s) + h.tanh())(s.base(x)), "is also used by"),
    (lambda x, s: s.base(x) + lora(x, s) + linear(x, s.base.weight).tanh(), "base.weight is tied: linear_3 reads it too"),
])
def test_an_adapter_that_is_not_merged_says_why(function: Any, reason: str) -> None:
    _, told = run(MergeAdapters(), adapted(function), r(3, 6))
    assert any(reason in line for line in told), told


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True, "lora_alpha": 3}])
def test_the_same_as_merge_and_unload_of_peft(options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out, self.conv = nn.Linear(8, 16), nn.Linear(16, 4, bias=False), nn.Conv1d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(torch.relu(self.fc(x)))
            return y

    targets = ["fc"] if "lora_bias" in options else ["fc", "out"]
    config = peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.1, init_lora_weights=False, **options)
    model = peft.get_peft_model(Net(), config).double().eval()
    x = r(5, 8).double()
    after, _ = run(MergeAdapters(), copy.deepcopy(model), x)
    assert ops(after) == ["linear", "relu", "linear"]
    expected = model.merge_and_unload()
    with torch.no_grad():
        found = after.regions[""].module(x)
    torch.testing.assert_close(found[0], expected(x), rtol=1e-10, atol=1e-12)
    weights = [w for _, w in masked_weights(after, every=True)]
    for weight, module in zip(weights, (expected.fc, expected.out), strict=True):
        torch.testing.assert_close(weight, module.weight, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_conv_adapters_of_peft(options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **options)
    model = peft.get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()), config)
    assert ops(run(MergeAdapters(), model, r(2, 3, 6, 6))[0]) == ["conv2d", "relu"]


# --- merge_structured_ffn ---------------------------------------------------------------------------------------------------------------


def block_shuffle(x: Tensor, s: Any) -> Tensor:
    (k, _, p), (l, o, i) = s.a.shape, s.b.shape  # noqa: E741
    flat = x.reshape(-1, k, p).transpose(0, 1)
    mixed = torch.bmm(flat, s.a.transpose(-1, -2)).transpose(0, 1).reshape(-1, i, l).transpose(-1, -2).contiguous().transpose(0, 1)
    return torch.bmm(mixed, s.b.transpose(-1, -2)).permute(1, 2, 0).reshape(*x.shape[:-1], o * l) + s.bias


def block_dense(x: Tensor, s: Any) -> Tensor:
    k, q, p = s.a.shape
    blocks = torch.bmm(x.reshape(-1, k, p).transpose(0, 1), s.a.transpose(-1, -2)).transpose(0, 1).reshape(-1, k * q)
    return torch.mm(blocks, s.u.transpose(-1, -2)).reshape(*x.shape[:-1], s.u.shape[0]) + s.bias


@calm
@given(st.sampled_from([(2, 3, 4, 5), (4, 2, 2, 2), (1, 3, 5, 2), (2, 6, 3, 4)]), st.booleans(), st.sampled_from([(3,), (2, 5)]), st.booleans())
def test_structured_layers_become_dense(sizes: tuple[int, int, int, int], shuffled: bool, rows: tuple[int, ...], dynamic: bool) -> None:
    k, q, p, outputs = sizes
    if shuffled:
        l = 2 if k * q % 2 == 0 else 1  # noqa: E741
        model = Formula(block_shuffle, a=r(k, q, p), b=r(l, outputs, k * q // l), bias=r(l * outputs))
    else:
        model = Formula(block_dense, a=r(k, q, p), u=r(outputs, k * q), bias=r(outputs))
    after, _ = run(MergeStructuredFfn(when="always"), model, r(*rows, k * p), dynamic=ANY if dynamic and len(rows) > 1 else None)
    assert [op for op in ops(after) if not op.startswith("sym_")] == ["linear", "add"]


def test_few_rows_are_merged_and_many_stay_structured() -> None:
    low_rank = nn.Sequential(nn.Linear(64, 16, bias=False), nn.Linear(16, 64))
    assert ops(run(MergeStructuredFfn(), low_rank, r(1, 64))[0]) == ["linear"]
    after, told = run(MergeStructuredFfn(), low_rank, r(2000, 64))
    assert ops(after) == ["linear", "linear"]
    assert "dense would cost" in told[0]
    assert "it pays for fewer rows" in told[0]
    assert ops(run(MergeStructuredFfn(when="always"), low_rank, r(2000, 64))[0]) == ["linear"]
    assert ops(run(MergeStructuredFfn(launch=10**9), low_rank, r(2000, 64))[0]) == ["linear"]


def test_blocks_that_are_something_else_say_so() -> None:
    def other(x: Tensor, s: Any) -> Tensor:
        return linear(torch.bmm(x.reshape(2, 3, 4).transpose(0, 1), s.a.transpose(-1, -2)).transpose(0, 1).reshape(-1, 5), s.u)

    _, told = run(MergeStructuredFfn(when="always"), Formula(other, a=r(3, 5, 4), u=r(7, 5)), r(4, 6))
    assert told == ["at linear: the input is not split into 3 blocks of 4 features"]


# --- fold_norm_affine -------------------------------------------------------------------------------------------------------------------


def affine_left(program: Program) -> bool:
    return any({"weight", "bias"} & n.kwargs.keys() for _, n in program.nodes() if "norm" in str(n.target) and n.op == "call_function")


@calm
@given(st.sampled_from(["layer", "no bias", "rms"]), st.booleans(), st.integers(1, 3), st.booleans())
def test_norms_of_any_kind_before_linears(kind: str, bias: bool, readers: int, dynamic: bool) -> None:
    norm: nn.Module = nn.RMSNorm(6, eps=1e-5) if kind == "rms" else nn.LayerNorm(6, bias=kind == "layer")
    heads = nn.ModuleList(nn.Linear(6, 4, bias=bias) for _ in range(readers))
    model = Formula(lambda x, s: sum(torch.tanh(h(s.norm(x))) for h in s.heads), norm=norm, heads=heads)  # type: ignore[arg-type, return-value]
    after, _ = run(FoldNormAffine(), model, r(2, 3, 6), dynamic=ANY if dynamic else None)
    assert not affine_left(after)


@pytest.mark.parametrize("view", [
    lambda z: z.reshape(-1, 6), lambda z: z[:, 0], lambda z: z.transpose(0, 1), lambda z: z[:, 1:, None], lambda z: z.permute(1, 0, 2).flatten(0, 1),
    lambda z: z[torch.arange(2), torch.tensor([0, 1])], lambda z: z[:, :1].expand(2, 4, 6), lambda z: z.unsqueeze(1),
])
def test_a_view_of_the_norm_is_looked_through(view: Callable[[Tensor], Tensor]) -> None:
    model = Formula(lambda x, s: s.head(view(s.norm(x))), norm=nn.LayerNorm(6), head=nn.Linear(6, 4))
    assert not affine_left(run(FoldNormAffine(), model, r(2, 3, 6))[0])


def test_a_norm_written_by_hand_and_a_shifted_weight_as_gemma_has_it() -> None:
    def gemma(x: Tensor, s: Any) -> Tensor:
        return s.head(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + s.g))

    after, _ = run(FoldNormAffine(), Formula(gemma, g=r(6), head=nn.Linear(6, 4)), r(2, 6))
    assert ops(after) == ["rms_norm", "linear"]
    assert not affine_left(after)


def test_an_rms_norm_of_llama_in_bfloat16() -> None:
    def llama(x: Tensor, s: Any) -> Tensor:
        wide = x.to(torch.float32)
        z = s.g * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return s.head(z) + s.gate(z)  # type: ignore[no-any-return]

    model = Formula(llama, g=r(6), head=nn.Linear(6, 4), gate=nn.Linear(6, 4))
    after, _ = run(FoldNormAffine(), model, r(2, 6), dtype=torch.bfloat16)
    assert ops(after) == ["to", "rms_norm", "to", "linear", "linear", "add"]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_group_norm_goes_into_unpadded_convs(groups: int, kernel: int) -> None:
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 6, kernel, groups=groups))
    assert not affine_left(run(FoldNormAffine(), model, r(2, 4, 5, 5))[0])
    padded = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 3, padding=1))
    after, told = run(FoldNormAffine(), padded, r(2, 4, 5, 5))
    assert affine_left(after)
    assert told == ["at group_norm: conv2d pads by [1, 1] after the norm: beta would reach its border"]


@pytest.mark.parametrize(("function", "reason"), [
    (lambda x, s: s.head(s.norm(x)) + s.norm(x)[..., :4], "slice_1 (slice_1) reads it too"),
    (lambda x, s: s.head(s.norm(x)) + s.norm(x).sum(), "sum (sum_1) reads it too"),
    (lambda x, s: (s.head(s.norm(x)), s.norm(x)), "the output reads it too"),
    (lambda x, s: s.head(s.norm(x)) + s.head(x), "head.weight is tied: linear_1 reads it too"),
    (lambda x, s: s.head(torch.cat([s.norm(x), x])), "cat (cat) reads it too"),
    (lambda x, s: linear(s.norm(x), x.reshape(6, 6)), "linear (linear) reads it too"),
    (lambda x, s: s.head(s.norm(x).reshape(12, 3).reshape(6, 6)), "reshape (reshape) reads it too"),
    (lambda x, s: s.head(x), "there is no norm with a weight or bias"),
])
def test_a_norm_that_keeps_its_affine_says_why(function: Any, reason: str) -> None:
    _, told = run(FoldNormAffine(), Formula(function, norm=nn.LayerNorm(6), head=nn.Linear(6, 4)), r(6, 6))
    assert any(reason.split(" (")[-1] in line for line in told), told


def test_a_tied_head_gets_its_own_copy_when_asked() -> None:
    def model() -> Formula:
        return Formula(lambda x, s: linear(s.norm(s.table(x)), s.table.weight), table=nn.Embedding(9, 6), norm=nn.LayerNorm(6))

    ids = torch.randint(0, 9, (2, 3))
    after, told = run(FoldNormAffine(), model(), ids)
    assert affine_left(after)
    assert told == ["at layer_norm: table.weight is tied: embedding reads it too"]
    assert not affine_left(run(FoldNormAffine(untie=True), model(), ids)[0])


def test_a_mask_of_a_reader_is_kept_and_nothing_is_half_done() -> None:
    model = inside(function=lambda x, s: linear(s.norm(x), s.w * s.mask, s.b), norm=nn.LayerNorm(6), w=r(4, 6), b=r(4), mask=torch.rand(4, 6) > 0.5)
    after, _ = run(FoldNormAffine(), model, r(3, 6))
    assert ops(after) == ["layer_norm", "mul", "linear"]
    assert not affine_left(after)
    assert torch.equal(masked_weights(after)[0][1] != 0, model.layer.mask)
    half = inside(function=lambda x, s: (linear(s.norm(x), s.v, s.b), linear(s.norm(x), (s.w * s.mask) @ s.v2, s.b)), norm=nn.LayerNorm(6),
                  v=r(4, 6), w=r(4, 4), b=r(4), v2=r(4, 6), mask=torch.rand(4, 4) > 0.5)
    after, told = run(FoldNormAffine(), half, r(3, 6))
    assert any("would dissolve the mask" in line for line in told), told
    assert not [n for _, n in after.nodes() if n.meta.get("by") == "fold_norm_affine"]


# --- layernorm_to_rmsnorm ---------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool, affine: bool = True, post: bool = False) -> None:
        super().__init__()
        self.heads, self.causal, self.post = heads, causal, post
        self.first, self.second = (nn.LayerNorm(width, elementwise_affine=affine) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def attention(self, z: Tensor) -> Tensor:
        b, n, d = z.shape
        q, k, v = (part.reshape(b, n, self.heads, d // self.heads).transpose(1, 2) for part in self.qkv(z).chunk(3, dim=-1))
        y: Tensor = self.out(scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).reshape(b, n, d))
        return y

    def forward(self, h: Tensor) -> Tensor:
        if self.post:
            h = self.first(h + self.attention(h))
            z: Tensor = self.second(h + self.down(gelu(self.up(h))))
            return z
        h = h + self.attention(self.first(h))
        return h + 0.5 * self.down(gelu(self.up(self.second(h))))


class Language(nn.Module):
    """Like GPT."""

    def __init__(self, tied: bool = False, affine: bool = True, post: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(13, 8), nn.Embedding(10, 8)
        self.first = nn.LayerNorm(8, elementwise_affine=affine) if post else nn.Identity()
        self.blocks = nn.Sequential(*(Block(8, 2, True, affine, post) for _ in range(2)))
        self.last, self.head = nn.LayerNorm(8, elementwise_affine=affine), nn.Linear(8, 13, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(self.first(self.tokens(x) + self.positions(torch.arange(x.shape[1]))))
        y: Tensor = self.head(self.last(h))
        return y


class Vision(nn.Module):
    """Like ViT: patches by a conv, a class token beside them, position parameters, one token read at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token, self.positions = nn.Parameter(r(1, 1, 8)), nn.Parameter(r(1, 5, 8))
        self.blocks, self.last, self.head = nn.Sequential(*(Block(8, 2, False) for _ in range(2))), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(x.shape[0], -1, -1), patches], dim=1) + self.positions
        y: Tensor = self.head(self.last(self.blocks(h)[:, 0]))
        return y


TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])
BOTH = FoldNormAffine() | LayernormToRmsnorm()


def norms(program: Program) -> list[str]:
    return sorted({op for op in ops(program) if "norm" in op})


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["gpt", "vit"])
def test_a_pre_norm_transformer_has_rms_norms_only(kind: str, dynamic: bool) -> None:
    model, x = (Language(), TOKENS) if kind == "gpt" else (Vision(), r(2, 3, 8, 8))
    for item in (Pipeline((LayernormToRmsnorm(),)), BOTH):
        after, told = run(item, copy.deepcopy(model), x, dynamic=ANY if dynamic else None)
        assert norms(after) == ["rms_norm"], told
        assert affine_left(after) == (item is not BOTH)
    writers = [n for _, n in after.nodes() if n.meta.get("by") == "layernorm_to_rmsnorm" and n.op == "get_attr"]
    assert len(writers) >= 8


def test_the_stream_has_no_mean_any_more() -> None:
    after, _ = run(BOTH, Language(), TOKENS)
    module = after.regions[""].module
    seen: list[Tensor] = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if "rms_norm" in str(n.target):
                seen.append(self.env[n.kwargs["input"]])  # type: ignore[index]
            return value

    Watch(module).run(TOKENS)
    assert len(seen) == 5
    assert all(float(h.mean(-1).detach().abs().max()) < 1e-12 for h in seen)


def test_post_norm_without_affine_is_exact_and_with_it_refused() -> None:
    after, _ = run(LayernormToRmsnorm(), Language(affine=False, post=True), TOKENS)
    assert norms(after) == ["rms_norm"]
    after, told = run(LayernormToRmsnorm(), Language(post=True), TOKENS)
    assert "layer_norm" in norms(after)
    assert any("reads the residual stream" in line for line in told), told


@pytest.mark.parametrize(("change", "reason"), [
    (lambda h, s: h + h.relu(), "relu (relu) reads the residual stream add itself, and would see what is changed in it"),
    (lambda h, s: h + s.one.tanh() * 1.0 + s.extra(h), "reads the residual stream add itself"),
    (lambda h, s: h + s.one * s.extra(s.norm(h)), "scales what it writes to the residual stream: fold_scale first"),
    (lambda h, s: h + s.extra(s.norm(h)).relu(), "writes to the residual stream, and has no weight to take the mean out of"),
    (lambda h, s: h + 1.0, "adds a number to the residual stream"),
    (lambda h, s: h + linear(s.norm(h), s.extra.weight * s.mask), "would dissolve the mask"),
    (lambda h, s: h + s.extra(s.extra(s.norm(h))), "extra.weight is tied"),
    (lambda h, s: h + s.norm(h).sum(), "does not keep the features of sum_1 together"),
])
def test_a_stream_that_keeps_its_mean_says_why(change: Callable[..., Tensor], reason: str) -> None:
    model = Formula(lambda x, s: s.head(s.last(change(s.first(x) + s.one, s))), first=nn.Linear(6, 6), extra=nn.Linear(6, 6), head=nn.Linear(6, 3),
                    norm=nn.LayerNorm(6), last=nn.LayerNorm(6), one=r(6), mask=torch.rand(6, 6) > 0.5)
    after, told = run(LayernormToRmsnorm(), model, r(4, 6))
    assert norms(after) == ["layer_norm"]
    assert any(reason in line for line in told), told
    assert not [n for _, n in after.nodes() if n.meta.get("by") == "layernorm_to_rmsnorm"]


def test_an_input_as_stream_and_a_tied_embedding_are_refused() -> None:
    _, told = run(LayernormToRmsnorm(), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)), r(4, 6))
    assert told == ["at input_1: the input input_1 writes to the residual stream, and has no weight to take the mean out of"]
    _, told = run(LayernormToRmsnorm(), Language(tied=True), TOKENS)
    assert any("tokens.weight is tied" in line for line in told), told
    assert norms(run(FoldNormAffine(untie=True) | LayernormToRmsnorm(untie=True), Language(tied=True), TOKENS)[0]) == ["rms_norm"]


def test_layer_scale_in_the_branch_is_folded_first() -> None:
    def scaled(x: Tensor, s: Any) -> Tensor:
        h = s.first(x)
        return s.head(s.last(h + s.gamma * s.extra(s.norm(h))))  # type: ignore[no-any-return]

    model = Formula(scaled, first=nn.Linear(6, 6), extra=nn.Linear(6, 6), head=nn.Linear(6, 3), norm=nn.LayerNorm(6), last=nn.LayerNorm(6),
                    gamma=r(6))
    assert norms(run(FoldScale() | BOTH, model, r(4, 6))[0]) == ["rms_norm"]


@pytest.mark.slow
def test_models_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    gpt = transformers.GPT2Config(vocab_size=17, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False)
    vit = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4)
    for name, inner, x in (("logits", transformers.GPT2LMHeadModel(gpt), TOKENS),
                           ("last_hidden_state", transformers.ViTModel(vit, add_pooling_layer=False), r(2, 3, 8, 8))):
        for parameter in inner.parameters():
            nn.init.normal_(parameter)
        model = Formula(lambda x, s, name=name: getattr(s.inner(x), name), inner=inner)  # type: ignore[misc]
        after, told = run(FoldNormAffine(untie=True) | LayernormToRmsnorm(untie=True), model, x)
        assert norms(after) == (["rms_norm"]), told


# --- fold_scale -------------------------------------------------------------------------------------------------------------------------


SCALES: dict[str, tuple[Callable[..., Tensor], list[str]]] = {
    "number after": (lambda x, s: s.fc(x) * 3.0, ["linear"]),
    "number before": (lambda x, s: s.fc(2 * x), ["linear"]),
    "divided after": (lambda x, s: s.fc(x) / 7.0, ["linear"]),
    "divided before": (lambda x, s: s.fc(x / 3), ["linear"]),
    "layer scale": (lambda x, s: s.gamma * s.fc(x), ["linear"]),
    "layer scale of three dimensions": (lambda x, s: s.gamma.reshape(1, 1, -1) * s.fc(x), ["linear"]),
    "divided by a vector": (lambda x, s: s.fc(x) / s.gamma, ["linear"]),
    "vector before": (lambda x, s: s.fc(x * s.delta), ["linear"]),
    "one learned number": (lambda x, s: s.fc(x * s.one) * s.one.exp(), ["linear"]),
    "twice": (lambda x, s: s.fc(x * 2.0) * 3.0 / 5.0, ["linear"]),
    "computed": (lambda x, s: s.fc(x) * torch.sigmoid(s.gamma), ["linear"]),
    "through views": (lambda x, s: s.fc(x).reshape(2, 3, 2, 4).transpose(1, 2) * 0.5, ["linear", "reshape", "transpose"]),
    "divided through views": (lambda x, s: s.fc(x).transpose(0, 1) / 8.0, ["linear", "transpose"]),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", list(SCALES))
def test_every_place_of_a_scale(name: str, bias: bool) -> None:
    function, left = SCALES[name]
    model = Formula(function, fc=nn.Linear(6, 8, bias=bias), gamma=torch.rand(8) + 0.5, delta=r(6), one=r(1))
    assert ops(run(FoldScale(), model, r(2, 3, 6))[0]) == left
    if name in ("layer scale", "number before", "divided through views"):
        assert [op for op in ops(run(FoldScale(), model, r(2, 3, 6), dynamic=ANY)[0]) if not op.startswith("sym")] == left


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_scales_around_convs(rank: int, groups: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](4, 6, 3, padding=1, groups=groups)
    one = [1] * rank
    model = Formula(lambda x, s: s.gamma * s.conv(x * s.delta) / 3.0, conv=conv, gamma=r(6, *one), delta=r(1, 4, *one))
    assert ops(run(FoldScale(), model, r(2, 4, *[5] * rank))[0]) == [f"conv{rank}d"]


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"is_causal": True}])
def test_a_scale_on_queries_and_keys_joins_that_of_the_attention(options: dict[str, Any]) -> None:
    def attention(x: Tensor, s: Any) -> Tensor:
        q, k = ((x @ p).reshape(2, 5, 2, 4).transpose(1, 2).tanh() for p in (s.q, s.k))
        return scaled_dot_product_attention(q * 3.0, k / 2.0, k, **options)

    after, _ = run(FoldScale(), Formula(attention, q=r(8, 8), k=r(8, 8)), r(2, 5, 8))
    assert {"mul", "div"}.isdisjoint(ops(after))


@pytest.mark.parametrize(("function", "reason"), [
    (lambda x, s: s.fc(x) * x.sum(), "s must be a parameter, it is sum (sum_1)"),
    (lambda x, s: s.fc(x) * s.rows, "does not lie along the 8 features"),
    (lambda x, s: s.fc(x) * s.wide, "does not lie along the 8 features"),
    (lambda x, s: s.fc(x * s.rows), "does not lie along the 6 features"),
    (lambda x, s: s.fc(x) * 2.0 + s.fc(x), "is also used by"),
    (lambda x, s: s.fc(x) * 2.0 + linear(x.tanh(), s.fc.weight), "fc.weight is tied: linear_1 reads it too"),
    (lambda x, s: s.fc(x).t() * 2.0 + linear(x.tanh(), s.fc.weight).t(), "fc.weight is tied: linear_1 reads it too"),
    (lambda x, s: torch.relu(s.fc(x)) * 2.0, "expected linear"),
])
def test_a_scale_that_stays_says_why(function: Any, reason: str) -> None:
    model = Formula(function, fc=nn.Linear(6, 8), rows=r(4, 1), wide=r(1, 1, 8), one=r(1))
    _, told = run(FoldScale(), model, r(4, 6))
    assert any(reason in line for line in told), told


def test_a_scale_of_a_masked_or_tied_weight() -> None:
    model = inside(function=lambda x, s: linear(x, s.w * s.mask, s.b) * 3.0, w=r(4, 6), b=r(4), mask=torch.rand(4, 6) > 0.5)
    after, _ = run(FoldScale(), model, r(3, 6))
    assert ops(after) == ["mul", "linear"]
    assert torch.equal(masked_weights(after)[0][1] != 0, model.layer.mask)
    tied = Formula(lambda x, s: s.fc(s.fc(x).tanh()) * 2.0, fc=nn.Linear(6, 6))
    assert ops(run(FoldScale(untie=True), tied, r(3, 6))[0]) == ["linear", "tanh", "linear"]


def test_in_bfloat16_and_with_mixed_dtypes() -> None:
    for item, model in ((FoldScale(), Formula(lambda x, s: s.fc(x) * s.gamma / 3.0, fc=nn.Linear(6, 8), gamma=r(8))), (BOTH, Language()),
                        (MergeLinearChain(), nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)))):
        run(item, model, TOKENS if isinstance(model, Language) else r(3, 6), dtype=torch.bfloat16)
    program = capture(Formula(lambda x, s: s.fc(x) * s.fc.bias.double(), fc=nn.Linear(6, 8)).eval(), (r(3, 6),))
    ctx = Context()
    Pipeline((FoldScale(),)).run(program, ctx)
    assert any("the scale is torch.float64, the product torch.float32" in str(miss) for miss in ctx.misses)


@pytest.mark.parametrize("item", [MergeLinearChain(), FoldScale(), FoldNormAffine(), LayernormToRmsnorm(), MergeAdapters(), MergeStructuredFfn()])
def test_without_fuel_nothing_happens(item: Pass) -> None:
    import importlib

    model, inputs = importlib.import_module(type(item).__module__).example()
    program = capture(model, inputs)
    assert Pipeline((item,)).run(program, Context(fuel=0)).text() == program.text()
