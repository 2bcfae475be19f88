"""Convolutions and linears in their packed dense forms: numbers, fusions, layout, the choice, artefacts."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from artefact_help import edit_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from sparsify_compiler.artefact import load
from sparsify_compiler.capture import capture
from sparsify_compiler.codegen import runtime
from sparsify_compiler.codegen.kernels import conv2d
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.epilogue import epilogues
from sparsify_compiler.errors import ArtefactError, InputError, KernelError
from sparsify_compiler.executor import flat_function
from sparsify_compiler.measure import Timing
from sparsify_compiler.passes.lower import _conv, _layer, _layout
from sparsify_compiler.passes.lower.lower import Lower
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.preserves import compare_outputs
from sparsify_compiler.program import Program
from sparsify_compiler.target import Target, host

ALWAYS = Lower(margin=-1000.0, rounds=3)
needs_packed = pytest.mark.skipif(not runtime.candidates("linear", {"weight": torch.ones(2, 2)}, {}, torch.float32, (1,), host()),
                                  reason="this torch has no packed dense forms here")
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "relu6": functional.relu6, "hardtanh": lambda x: functional.hardtanh(x, -1, 2), "hardswish": functional.hardswish,
    "silu": functional.silu, "gelu": functional.gelu, "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "leaky_relu": lambda x: functional.leaky_relu(x, 0.2), "sigmoid": torch.sigmoid, "tanh": torch.tanh, "hardsigmoid": functional.hardsigmoid,
}  # fmt: skip
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
Made = tuple[CompiledModel, Program]


class Through(nn.Module):
    """layer, then + x where it is a residual, then the activation."""

    def __init__(self, layer: nn.Module, activation: Callable[[Tensor], Tensor], residual: bool) -> None:
        super().__init__()
        self.layer, self.activation, self.residual = layer, activation, residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.activation(x + y if self.residual else y)


class Net(nn.Module):
    """A small CNN with everything: a stem, a residual block that ends in an addition, a gate, a head, two image outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.wide, self.deep = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, 1, 1, groups=32)
        self.narrow, self.gate, self.head = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = functional.hardswish(self.stem(x))
        x = torch.relu(self.narrow(functional.relu6(self.deep(functional.silu(self.wide(x))))) + x)
        gated = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(functional.adaptive_avg_pool2d(gated, 1).flatten(1)), gated, gated.reshape(gated.shape[0], 4, -1)


def lowered(model: nn.Module, inputs: Any, how: Lower = ALWAYS, dynamic: Any = None, kernels: Any = runtime, target: Target | None = None) -> Made:
    program = capture(model.eval(), inputs, dynamic)
    after = Pipeline((how,)).run(program, Context(target=target or host(), example_inputs=inputs, kernels=kernels), ())
    return CompiledModel(after, target or host()), after


def kernels_of(program: Program) -> dict[str, Any]:
    return {node.name: node.meta["kernel"] for _, node in program.nodes() if "kernel" in node.meta}


def source_of(program: Program) -> str:
    return str(flat_function(program.regions[""]).__dict__["source"])


# --- numbers ---------------------------------------------------------------------------------------------------------------------------


@needs_packed
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_packed_convolution_computes_what_aten_does(data: st.DataObject) -> None:
    draw, rank = data.draw, data.draw(st.sampled_from([1, 2, 2, 2, 3]))
    sizes = st.integers(1, 3)
    groups, dtype = draw(st.sampled_from([1, 1, 2, 4])), draw(st.sampled_from([torch.float32, torch.bfloat16]))
    inside, outside = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4))
    kernel, stride, dilation = ([draw(sizes) for _ in range(rank)] for _ in range(3))
    padding = [draw(st.integers(0, 2)) for _ in range(rank)]
    if dtype is torch.bfloat16:
        stride = [1] * rank  # with AMX, oneDNN reads past small inputs where it strides (torch 2.13): eager convolutions are wrong there as well
    extent = [(k - 1) * d + 1 + draw(st.integers(0, 9)) for k, d in zip(kernel, dilation, strict=True)]
    weight = torch.randn(outside, inside // groups, *kernel).to(dtype)
    bias = torch.randn(outside).to(dtype) if draw(st.booleans()) else None
    attributes = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    rows = (draw(st.integers(1, 3)), inside, *extent)
    found = runtime.candidates(f"conv{rank}d", {"weight": weight}, attributes, dtype, rows, host())
    if not found:
        return  # no packed convolution of this dtype here
    packed = found[0].bind(bias)
    conv = getattr(functional, f"conv{rank}d")
    for batch, extra in ((rows[0], 0), (rows[0] + 1, 3), (0, 0)):
        x = torch.randn(batch, inside, *(n + extra for n in extent)).to(dtype)
        for given_x in (x, _conv.channels_last(x), x.flip(-1)):
            want = conv(given_x.float(), weight.float(), None if bias is None else bias.float(), stride, padding, dilation, groups)
            assert packed(given_x).dtype is dtype
            assert_close(packed(given_x), want)


@needs_packed
@pytest.mark.parametrize(("kernel", "padding", "offered"), [(1, 0, True), (1, 1, False), (3, 2, True), (3, 3, False)])
def test_no_window_lies_in_the_padding(kernel: int, padding: int, offered: bool) -> None:
    """oneDNN crashes there now and then."""
    weight = torch.randn(8, 4, kernel, 3)
    attributes = {"stride": [2, 2], "padding": [padding, 1], "dilation": [1, 1], "groups": 1}
    names = [one.name for one in runtime.candidates("conv2d", {"weight": weight}, attributes, torch.float32, (1, 4, 9, 9), host())]
    assert (conv2d.LABEL in names) == offered
    if not offered:
        with pytest.raises(KernelError, match="no packed dense convolution"):
            conv2d.bind("conv2d", {"input_size": [1, 4, 9, 9]}, {"weight": weight}, attributes, None, {}, host(), [])


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    rough = got.dtype is torch.bfloat16
    torch.testing.assert_close(got.float(), want.float(), rtol=1.6e-2 if rough else 1e-5, atol=5e-2 if rough else 2e-5)


@needs_packed
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("rank", [1, 2])
def test_what_follows_a_convolution_is_computed_with_it(name: str, residual: bool, rank: int) -> None:
    torch.manual_seed(0)
    model = Through(CONVS[rank](8, 8, 3, padding=1), ACTIVATIONS[name], residual)
    x = 3 * torch.randn(2, 8, *[9] * rank)
    compiled, program = lowered(model, (x,))
    assert len(kernels_of(program)) == 1
    fuses = not residual or name == "relu"
    assert len(source_of(program).splitlines()) == 4 + (not fuses), "def, the fused kernel, contiguous() at the output, return"
    compare_outputs([model(x)], [compiled(x)])
    row = program.decisions["layer"]
    assert row.kernel == "dense packed" + " + add" * residual + f" + {name.removesuffix('_tanh')}" * fuses


@needs_packed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_follows_a_linear_is_computed_with_it(dtype: torch.dtype) -> None:
    x = torch.randn(5, 64).to(dtype)
    for activation, residual in [(a, False) for a in ACTIVATIONS.values()] + [(nn.Identity(), True), (torch.relu, True)]:
        model = Through(nn.Linear(64, 64), activation, residual).to(dtype)
        compiled, program = lowered(model, (x,))
        compare_outputs([model(x)], [compiled(x)])
        (node,) = [node for _, node in program.nodes() if node.target is torch.ops.aten.linear.default]
        for epilogue in epilogues(node)[1:]:
            found = runtime.candidates("linear", {"weight": model.layer.weight}, epilogue.attributes(), dtype, (5,), host())
            assert any(c.options["family"] == "linear" for c in found) == (len(epilogue.nodes) == 1), "oneDNN: one thing at a time after a linear"
            for candidate in found:
                compare_outputs([epilogue(model.layer(x), x)], [candidate.bind(model.layer.bias)(*((x, x) if residual else (x,)))])


@needs_packed
def test_a_nan_stays_one_where_the_activation_is_no_bound() -> None:
    x = torch.randn(1, 4, 5, 5)
    x[0, 2, 3, 3] = float("nan")
    for name in ("none", "hardswish", "silu", "gelu", "leaky_relu", "sigmoid", "tanh"):
        model = Through(nn.Conv2d(4, 4, 1), ACTIVATIONS.get(name, nn.Identity()), False)
        assert torch.equal(lowered(model, (x,))[0](x).isnan(), model(x).isnan()), name


def test_what_cannot_be_computed_with_a_convolution_is_left_alone() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.scale = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Parameter(torch.randn(1, 4, 1, 1))

        def forward(self, x: Tensor) -> Any:
            a, b, c = self.a(x), self.b(x), self.c(x)
            return torch.relu(a) + a, b + self.scale, c + c, functional.elu(self.a(x)), torch.add(self.b(x), x, alpha=2)

    program = capture(Other().eval(), (torch.randn(2, 4, 3, 3),))
    found = {node.name: [e.label for e in epilogues(node)] for _, node in program.nodes() if _conv.is_conv(node)}
    assert set(map(tuple, found.values())) == {("",)}
    compiled, _ = lowered(Other(), (torch.randn(2, 4, 3, 3),))
    assert len(compiled(torch.randn(2, 4, 3, 3))) == 5


@needs_packed
def test_two_convolutions_that_are_added_share_one_addition() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.a(x) + self.b(x))

    model, x = Two(), torch.randn(2, 4, 5, 5)
    compiled, program = lowered(model, (x,))
    compare_outputs([model(x)], [compiled(x)])
    assert sorted(program.decisions[site].kernel for site in "ab") == ["dense packed", "dense packed + add + relu"]
    lines = source_of(program).splitlines()
    assert len(lines) == 5, "two convolutions, contiguous, return"


# --- layout ----------------------------------------------------------------------------------------------------------------------------


NEVER = Lower(margin=1e6, rounds=3)     # a network saves no millions of times what its convolutions took, however busy the machine was meanwhile


@pytest.mark.parametrize("how", [ALWAYS, NEVER])
def test_a_network_gives_its_values_shapes_and_strides_at_any_size(how: Lower) -> None:
    model = Net().eval()
    compiled, program = lowered(model, (torch.randn(2, 3, 32, 32),), how, {"x": {0: "batch", 2: "height", 3: "width"}})
    for shape in ((2, 3, 32, 32), (1, 3, 32, 32), (5, 3, 17, 40)):
        x = torch.randn(shape)
        for given_x in (x, x.contiguous(memory_format=torch.channels_last)):
            want, got = model(x), compiled(given_x)
            compare_outputs(want, got)
            assert given_x is not x or all(a.stride() == b.stride() for a, b in zip(want, got, strict=True))
    assert bool([name for name in kernels_of(program) if "conv" in name]) == (how is ALWAYS and bool(kernels_of(program)))


@needs_packed
def test_a_model_in_channels_last_stays_so() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).to(memory_format=torch.channels_last), torch.randn(1, 3, 8, 8)
    x = x.contiguous(memory_format=torch.channels_last)
    compiled, _ = lowered(model, (x,))
    assert model(x).stride() == compiled(x).stride()
    assert not model(x).is_contiguous()


def test_what_reads_memory_as_it_lies_keeps_the_layout() -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            return torch.as_strided(y, (4, 2), (2, 1))

    model, x = Strided(), torch.randn(1, 3, 4, 4)
    compiled, program = lowered(model, (x,))
    assert torch.equal(compiled(x), model(x))
    assert not kernels_of(program)
    assert "memory as it lies" in program.decisions["conv"].reason or not compiled._kernels


# --- the choice ------------------------------------------------------------------------------------------------------------------------


@dataclass
class Slow:
    """The kernel room, whose kernels for convolutions take their time."""

    calls: int = 0

    def candidates(self, op: str, *rest: Any) -> Sequence[Any]:
        return [Waits(candidate, self) for candidate in runtime.candidates(op, *rest)]

    def __getattr__(self, name: str) -> Any:
        return getattr(runtime, name)


@dataclass
class Waits:
    candidate: Any
    room: Slow

    def __getattr__(self, name: str) -> Any:
        return getattr(self.candidate, name)

    def bind(self, bias: Tensor | None) -> Any:
        kernel = self.candidate.bind(bias)

        def run(*inputs: Tensor) -> Any:
            self.room.calls += 1
            threading.Event().wait(2e-3)
            return kernel(*inputs)

        run.resident_bytes = kernel.resident_bytes  # type: ignore[attr-defined]
        return run


def test_a_kernel_that_is_slower_is_not_taken() -> None:
    model, x, room = Net().eval(), torch.randn(2, 3, 32, 32), Slow()
    compiled, program = lowered(model, (x,), Lower(rounds=3), kernels=room)
    assert not kernels_of(program)
    assert not any(_layer.META in node.meta or "contiguous" in node.name for _, node in program.nodes())
    for row in program.decisions.values():
        assert row.kernel == row.dense_form == "dense eager"
        assert row.compiled_ms == row.dense_ms is not None
        assert row.reason.startswith("stays dense")
    assert all(torch.equal(a, b) for a, b in zip(model(x), compiled(x), strict=True))
    assert room.calls > 0 or not runtime.candidates("linear", {"weight": torch.ones(2, 2)}, {}, torch.float32, (1,), host())


@needs_packed
def test_a_region_that_is_slower_as_a_whole_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel is faster by itself, the whole is not: what was bound is undone."""
    measured: list[str] = []

    def whole(*given: Any) -> dict[str, float]:
        measured.append("whole")
        return {_layer.EAGER: 1.0, _conv.LAST: 1.1}

    monkeypatch.setattr(_layout, "_measure", whole)
    model, x = Net().eval(), torch.randn(2, 3, 32, 32)
    before = capture(model, (x,)).text()
    compiled, program = lowered(model, (x,), Lower(rounds=3, margin=0.999999))
    assert measured == ["whole"]
    assert program.text().replace("stage=lowered", "stage=traced") == before
    assert not any("kernel" in node.meta or _layer.META in node.meta for _, node in program.nodes() if _conv.is_conv(node) or "kernel" in node.meta)
    assert "model's own layout" in program.decisions["stem"].reason
    assert all(torch.equal(a, b) for a, b in zip(model(x), compiled(x), strict=True))


def timing(milliseconds: float) -> Timing:
    return Timing(milliseconds, milliseconds, milliseconds)


@needs_packed
@pytest.mark.parametrize(("large", "taken"), [(0.5, True), (0.9, False), (1.2, False)])
def test_a_packed_weight_that_is_many_times_larger_has_to_earn_its_room(large: float, taken: bool) -> None:
    """Groups of two channels are padded to blocks of 16."""
    x = torch.randn(1, 64, 8, 8)
    program = capture(nn.Conv2d(64, 64, 3, groups=32).eval(), (x,))
    (region, node), = [found for found in program.nodes() if _conv.is_conv(found[1])]
    ctx = Context(target=host(), example_inputs=(x,), kernels=runtime)
    layer = _conv.conv(region, node, program, ctx, set())
    held, own = layer.forms["dense packed"].kernel.resident_bytes, 64 * 2 * 9 * 4
    assert held > 30 * own
    eager = _conv.TORCH[_conv.LAST]
    layer.pick({_layer.EAGER: timing(1.1), eager: timing(1.0), "dense packed": timing(large)}, 0.05, "speed")
    chosen = layer.picks[_conv.LAST]
    assert chosen == ("dense packed" if taken else eager)
    layer.write(chosen, layer.times[_conv.LAST], "dense")
    said = layer.decision.reason
    assert (f"{held:,} bytes for a weight of {own:,}" in said) == (large < 1)
    assert said.endswith({0.5: "0.5 ms instead of 1: worth it", 0.9: "0.9 ms instead of 1: not worth it", 1.2: "stays dense: dense"}[large])


@needs_packed
def test_one_channel_to_several_a_group_runs_depthwise_on_repeated_channels() -> None:
    torch.manual_seed(0)
    for outputs, residual, activation in ((24, False, torch.relu), (24, True, nn.Identity()), (16, False, functional.gelu)):
        layer = nn.Conv2d(8, outputs, 3, padding=1, stride=2 - residual, groups=8)
        weight, x = layer.weight.detach(), torch.randn(2, 8, 9, 7)
        attributes = {"stride": [2 - residual] * 2, "padding": [1, 1], "dilation": [1, 1], "groups": 8}
        y = layer(x)
        other = torch.randn_like(y)
        fused = attributes | ({"add": True} if residual else {"activation": "relu"} if activation is torch.relu else
                              {"activation": "gelu", "arguments": {"approximate": "none"}})
        names = [found.name for found in runtime.candidates("conv2d", {"weight": weight}, fused, torch.float32, (2, 8, 9, 7), host())]
        assert names == ["dense packed", "dense packed, channels repeated"]
        found = runtime.candidates("conv2d", {"weight": weight}, fused, torch.float32, (2, 8, 9, 7), host())[1].bind(layer.bias)
        assert found.resident_bytes <= 2 * 4 * weight.numel()
        want = y + other if residual else activation(y)
        for given_x in (x, _conv.channels_last(x), x[:0]):
            n = len(given_x)
            assert_close(found(given_x, other[:n]) if residual else found(given_x), want[:n])
        again = runtime.rebind("conv2d", found.options, {"weight": weight}, fused, layer.bias, {}, host())
        assert type(again) is type(found)
    for weight, groups in ((torch.randn(8, 1, 3, 3), 8), (torch.randn(8, 1, 3, 3), 1), (torch.randn(8, 2, 3, 3), 4)):
        attributes = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": groups}
        rows = (2, groups * weight.shape[1], 9, 7)
        names = [found.name for found in runtime.candidates("conv2d", {"weight": weight}, attributes, torch.float32, rows, host())]
        assert names == ["dense packed"]


@pytest.mark.skipif(not torch._C.has_mkl or host().arch != "x86_64", reason="no MKL here")
def test_a_linear_packed_by_mkl() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 70)
    tensors, x = {"weight": layer.weight.detach()}, torch.randn(3, 5, 40)
    found = {c.name: c for c in runtime.candidates("linear", tensors, {}, torch.float32, (15,), host())}["dense packed by MKL"]
    kernel = found.bind(layer.bias)
    for given_x in (x, x[:1], x[:0], x.flip(0), torch.randn(40, 15).T):
        assert_close(kernel(given_x), layer(given_x))
    with pytest.raises(InputError, match=r"expected \[..., 40\], got \[3, 39\]"):
        kernel(torch.randn(3, 39))
    assert type(runtime.rebind("linear", kernel.options, tensors, {}, layer.bias, {}, host())) is type(kernel)
    for attributes, dtype in (({"activation": "relu"}, torch.float32), ({"add": True}, torch.float32), ({"any_rows": True}, torch.float32),
                              ({}, torch.bfloat16)):
        given = {"weight": tensors["weight"].to(dtype)}
        assert "dense packed by MKL" not in [c.name for c in runtime.candidates("linear", given, attributes, dtype, (15,), host())]


@needs_packed
def test_every_site_is_in_the_report() -> None:
    from sparsify_compiler.report import Report

    _, program = lowered(Net(), (torch.randn(2, 3, 32, 32),))
    rows = {row.site: row for row in program.decisions.values()}
    assert set(rows) == {"stem", "wide", "deep", "narrow", "gate", "head"}
    for row in (rows[name] for name in rows if name != "head"):
        assert row.kind == "conv"
        assert row.kernel == row.dense_form
        assert row.kernel.startswith("dense packed + ")
        assert row.dense_ms is not None
        assert row.compiled_ms is not None
        assert "channels last" in row.reason
    text = str(Report(sites=list(rows.values())))
    assert "channels last: the whole" in " ".join(text.split())
    assert "stem" in text


def test_other_machines_and_dtypes_stay_eager() -> None:
    model, x = Net().eval(), torch.randn(1, 3, 16, 16)
    arm = Target("board", "aarch64", "generic", ("neon",), 1)
    for made, inputs, target in ((model, x, arm), (Net().double().eval(), x.double(), None)):
        compiled, program = lowered(made, (inputs,), target=target)
        assert not kernels_of(program)
        assert all("no packed form" in row.reason for row in program.decisions.values() if row.kind == "conv")
        assert all(torch.equal(a, b) for a, b in zip(made(inputs), compiled(inputs), strict=True))


def test_where_bytes_count_no_weight_is_held_twice() -> None:
    _, program = lowered(Net(), (torch.randn(1, 3, 16, 16),), Lower(margin=-1000.0, rounds=3, prefer="bytes"))
    assert not [name for name in kernels_of(program) if "conv" in name]
    assert all(row.reason for row in program.decisions.values())


@needs_packed
def test_regions_inside_a_model_choose_for_themselves() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.first(x)
            if float(y.sum()) > 0:
                y = y.view(y.shape[0], -1).view(y.shape)  # needs the layout that the model gave
            return self.second(y)  # type: ignore[no-any-return]

    model, x = Outer().eval(), torch.randn(2, 3, 12, 12)
    compiled, program = lowered(model, (x,))
    assert set(program.regions) == {"first", "second"}
    assert len(kernels_of(program)) >= 1
    compare_outputs([model(x)], [compiled(x)])


def test_a_torch_without_onednn_stays_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    _, program = lowered(Net(), (torch.randn(1, 3, 16, 16),))
    assert not kernels_of(program)
    with pytest.raises(KernelError, match="no packed dense convolution"):
        runtime.rebind("conv2d", {"family": "conv2d", "input_size": [1, 2, 4, 4]}, {"weight": torch.ones(2, 2, 1, 1)},
                       {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}, None, {}, host())


# --- artefacts, tracing, threads -------------------------------------------------------------------------------------------------------


@needs_packed
def test_saves_and_loads_bit_for_bit(tmp_path: Path) -> None:
    model = Net().eval()
    compiled, _ = lowered(model, (torch.randn(2, 3, 32, 32),), dynamic={"x": {0: "batch"}})
    compiled.save(tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert len(loaded._kernels) == len(compiled._kernels) > 4
    assert loaded.resident_bytes() == compiled.resident_bytes() > sum(p.numel() * 4 for p in model.parameters())
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 32, 32)
        assert all(torch.equal(a, b) for a, b in zip(compiled(x), loaded(x), strict=True))


@needs_packed
def test_an_artefact_whose_fusion_does_not_fit_its_graph_is_refused(tmp_path: Path) -> None:
    compiled, _ = lowered(Net(), (torch.randn(2, 3, 32, 32),))

    def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
        def apply(graph: dict[str, Any]) -> None:
            node = next(n for n in graph["regions"][0]["nodes"] if "epilogue" in n.get("meta", {}))
            change({"node": node, "kernel": graph["kernels"][node["kernel"]]})

        return apply

    for number, change in enumerate((
        lambda found: found["node"]["meta"].update(epilogue="stem"),
        lambda found: found["node"]["meta"].update(epilogue="output"),
        lambda found: found["kernel"]["options"].update(input_size=[1, 2]),
        lambda found: found["kernel"]["options"].update(input_size=[1, 5, 4, 4]),
        lambda found: found["kernel"]["options"].update(input_size="many"),
        lambda found: found["kernel"]["options"].clear(),
    )):
        folder = tmp_path / str(number)
        compiled.save(folder)
        edit_graph(folder, edit(change))
        with pytest.raises(ArtefactError):
            load(folder)


@needs_packed
def test_export_traces_the_plain_graph() -> None:
    model, x = Net().eval(), torch.randn(2, 3, 32, 32)
    compiled, _ = lowered(model, (x,))
    exported = torch.export.export(compiled, (x,), strict=False).module()
    compare_outputs(model(x), exported(x))


@needs_packed
def test_from_several_threads_at_sizes_of_their_own() -> None:
    model = Net().eval()
    compiled, _ = lowered(model, (torch.randn(2, 3, 32, 32),), dynamic={"x": {0: "batch", 2: "height"}})
    inputs = [torch.randn(n, 3, 16 * n, 32) for n in (1, 2, 3, 4)]
    want, wrong = [compiled(x) for x in inputs], []

    def call(index: int) -> None:
        for _ in range(10):
            wrong.extend([1] * (not all(torch.equal(a, b) for a, b in zip(compiled(inputs[index]), want[index], strict=True))))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_packed
def test_fuel_stops_between_convolutions() -> None:
    program = capture(Net().eval(), (torch.randn(1, 3, 16, 16),))
    ctx = Context(target=host(), example_inputs=(torch.randn(1, 3, 16, 16),), kernels=runtime, fuel=3)
    after = Pipeline((replace(ALWAYS, rounds=1),)).run(program, ctx, ())
    assert len([name for name in kernels_of(after) if "conv" in name]) == 2, "the linear layer took the first of the three"
    compare_outputs(Net().eval()(torch.ones(1, 3, 16, 16)), CompiledModel(after, host())(torch.ones(1, 3, 16, 16)))
    assert json.dumps([row.kernel for row in after.decisions.values()]).count("packed + ") == 2
