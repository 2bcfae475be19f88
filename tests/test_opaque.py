"""Under torch.compile the same kernels run, through one op; the graph does not break there, and a kernel that is gone is a typed error."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable

import pytest
import torch
from kernel_help import longest_first, needs_avx512
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler import opaque
from sparsify_compiler.errors import ModelError
from sparsify_compiler.executor import traced_function
from sparsify_compiler.passes.lower import lower

FORCED = "lower(margin=-1000.0)"


class Selected(nn.Module):
    """A gated FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Images(nn.Module):
    """A convolution whose y has room between its planes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))).flatten(1)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "sparse linears": (lambda: nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)), (16, 64), "mask_weights(structure='16x1') | pack()"),
    "inputs": (Selected, (1, 64), "select_inputs() | pack()"),
    "neurons": (Selected, (1, 64), "select_neurons() | pack()"),
    "convolutions": (Images, (2, 8, 7, 9), "mask_weights(structure='4x1', targets=('first', 'second')) | pack()"),
}


@pytest.fixture(autouse=True)
def ours_are_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower, "round_robin", longest_first)
    torch._dynamo.reset()  # torch compiles one function for eight models at the most, those of other tests among them


def compiled(name: str) -> tuple[sc.CompiledModel, Tensor]:
    torch.manual_seed(0)
    make, shape, passes = CASES[name]
    model, x = make().eval(), torch.randn(shape)
    return sc.compile(model, (x,), recipe=f"{passes} | {FORCED}", budget=sc.Budget(density=0.5), calibration=[(x,)]), x


@needs_avx512
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_same_numbers_without_a_break(name: str, backend: str) -> None:
    if backend == "inductor" and shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    model, x = compiled(name)
    called = []

    def watch(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        called.extend(node for node in graph.graph.nodes if node.target in (opaque.op, opaque.inputs_op))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    with torch.no_grad():
        traced = torch.compile(model, fullgraph=True, backend=watch)
        torch.testing.assert_close(traced(x), model(x), rtol=0 if backend != "inductor" else 1e-5, atol=0 if backend != "inductor" else 1e-6)
    assert len(called) > 0, "no kernel was called"


@needs_avx512
@pytest.mark.parametrize("name", CASES)
def test_what_it_says_it_returns_it_returns(name: str) -> None:
    model, _ = compiled(name)
    shape = CASES[name][1]
    kernels = [node.meta["kernel"] for _, node in model.program.nodes() if isinstance(node.meta.get("kernel"), opaque.Opaque)]
    assert kernels
    for kernel in kernels:
        width = getattr(kernel, "in_features", getattr(kernel, "_inputs", None))
        x = torch.randn(shape[0], width, *shape[2:])
        said, real = kernel.empty(x), kernel(x)
        assert (said.shape, said.stride(), said.dtype) == (real.shape, real.stride(), real.dtype)


@needs_avx512
def test_a_kernel_that_is_gone_is_an_error() -> None:
    model, x = compiled("sparse linears")
    region = model.program.regions[""].clone()
    opaque.make_opaque(region)
    torch.testing.assert_close(traced_function(region)(region.module, x)[0], model(x))
    number = next(n.args[1] for n in region.graph.nodes if n.target is opaque.op)
    with pytest.raises(ModelError, match="gone"):
        opaque.op(x, number ^ 1 << opaque.COUNT_BITS)  # of another signature
    del region, model
    gc.collect()
    with pytest.raises(ModelError, match="gone"):
        opaque.op(x, number)
