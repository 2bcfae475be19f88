"""Sparse convolutions through compile(): packed, lowered where they pay, reported, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from artefact_help import edit_graph
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

import sparsify_compiler as sc
from sparsify_compiler.artefact import load
from sparsify_compiler.artefact_dense import dense_program
from sparsify_compiler.capture import capture
from sparsify_compiler.codegen import planes, runtime
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.errors import ArtefactError
from sparsify_compiler.operands import packed_operator
from sparsify_compiler.passes.lower import _layout
from sparsify_compiler.passes.lower.lower import Lower
from sparsify_compiler.passes.lower.pack import Pack
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.preserves import compare_outputs, masked_weights
from sparsify_compiler.program import Program
from sparsify_compiler.target import host

ALWAYS = Lower(margin=-1000.0, rounds=3)


class Net(nn.Module):
    """A small CNN with a stem, a residual block around a depthwise convolution, a grouped convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.wide, self.deep = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, 1, 1, groups=32)
        self.narrow, self.group, self.head = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = functional.hardswish(self.stem(x))
        x = torch.relu(self.narrow(functional.relu6(self.deep(functional.silu(self.wide(x))))) + x)
        x = self.group(x)
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1)), x


def pruned(model: nn.Module, names: tuple[str, ...] = ("stem", "wide", "narrow", "group"), amount: float = 0.7) -> nn.Module:
    """With masks of torch.nn.utils.prune on some convolutions."""
    for name in names:
        prune.random_unstructured(getattr(model, name), "weight", amount=amount)  # type: ignore[no-untyped-call]
    return model.eval().requires_grad_(False)


def lowered(model: nn.Module, inputs: tuple[Tensor, ...], how: Lower = ALWAYS, dynamic: Any = None, fuel: int | None = None) -> tuple[
        CompiledModel, Program]:
    program = capture(model.eval(), inputs, dynamic)
    ctx = Context(target=host(), example_inputs=inputs, kernels=runtime, fuel=fuel)
    after = Pipeline((Pack(), how)).run(program, ctx, ())
    return CompiledModel(after, host()), after


def kernels_of(program: Program) -> dict[str, Any]:
    return {str(node.meta.get("site", node.name)): node.meta["kernel"] for _, node in program.nodes() if "kernel" in node.meta}


def same(model: nn.Module, compiled: CompiledModel, x: Tensor) -> None:
    want, got = model(x), compiled(x)
    compare_outputs(want, got)
    assert all(a.stride() == b.stride() for a, b in zip(want, got, strict=True))


@pytest.fixture
def planes_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planes are measured to be the fastest."""
    measure = _layout._measure
    monkeypatch.setattr(_layout, "_measure", lambda *given: {**measure(*given), _layout.PLANES: 0.0})


@pytest.mark.usefixtures("planes_always")
def test_masked_convolutions_run_sparse_with_what_follows_them() -> None:
    model = pruned(Net())
    how = Lower(rounds=3, prefer="bytes")  # no dense kernel may win
    compiled, program = lowered(model, (torch.randn(2, 3, 32, 32),), how, {"x": {0: "batch", 2: "height"}})
    for shape in ((2, 3, 32, 32), (1, 3, 32, 32), (3, 3, 17, 32)):
        for x in (torch.randn(shape), torch.randn(shape).contiguous(memory_format=torch.channels_last)):
            same(model, compiled, x.contiguous())
            compare_outputs(model(x), compiled(x))
    kernels = kernels_of(program)
    assert all(isinstance(kernels[site], planes.BoundPlanes) for site in ("stem", "wide", "narrow", "group"))
    rows = program.decisions
    assert [rows[site].kernel.partition(" + ")[2] for site in ("stem", "wide", "narrow", "group")] == ["hardswish", "silu", "add + relu", ""]
    for site in ("stem", "wide", "narrow", "group"):
        row = rows[site]
        assert row.format != "dense"
        assert row.kernel.startswith("planes ")
        assert row.sparse_ms is not None
        assert row.compiled_ms is not None
        assert row.sparse_ms <= row.compiled_ms  # the fastest sparse kernel, and the one with the fewest bytes
        assert row.bytes == kernels[site].resident_bytes
        assert "times the speed of dense" in row.reason
        assert "planes: the whole takes" in row.reason


@pytest.mark.usefixtures("planes_always")
def test_dense_convolutions_between_sparse_ones_run_on_planes_too() -> None:
    model = pruned(Net())
    compiled, program = lowered(model, (torch.randn(2, 3, 32, 32),))
    assert program.decisions["deep"].kernel == "planes depthwise + relu6"
    same(model, compiled, torch.randn(2, 3, 32, 32))


@pytest.mark.usefixtures("planes_always")
def test_saves_and_loads_bit_for_bit(tmp_path: Path) -> None:
    compiled, _ = lowered(pruned(Net()), (torch.randn(2, 3, 32, 32),), dynamic={"x": {0: "batch"}})
    compiled.save(tmp_path / "out")
    loaded = load(tmp_path / "out")
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 32, 32)
        assert all(torch.equal(a, b) for a, b in zip(compiled(x), loaded(x), strict=True))
    assert len(loaded._kernels) == len(compiled._kernels)


def test_a_layer_that_does_not_pay_becomes_dense_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_layout, "_measure", lambda region, layers, layouts, ctx: dict.fromkeys(layouts, 2.0) | {"dense eager": 1.0})
    model = pruned(Net())
    compiled, program = lowered(model, (torch.randn(2, 3, 32, 32),), Lower(margin=0.9, rounds=3))
    assert not any(packed_operator(node) for _, node in program.nodes())
    assert not [node for _, node in program.nodes() if "kernel" in node.meta and "conv" in node.name]
    same(model, compiled, torch.randn(2, 3, 32, 32))
    for site in ("stem", "wide", "narrow", "group"):
        row = program.decisions[site]
        assert row.kernel == row.dense_form == "dense eager"
        assert row.format == "dense"
        assert "stays dense: the best sparse kernel has" in row.reason
        assert "in the model's own layout" in row.reason


def test_where_bytes_count_convolutions_stay_sparse() -> None:
    model = pruned(Net())
    compiled, program = lowered(model, (torch.randn(2, 3, 32, 32),), Lower(rounds=3, prefer="bytes"))
    kernels = kernels_of(program)
    assert {site for site, kernel in kernels.items() if isinstance(kernel, planes.BoundPlanes)} == {"stem", "wide", "narrow", "group"}
    same(model, compiled, torch.randn(2, 3, 32, 32))


def test_without_fuel_a_packed_convolution_computes_as_its_reference_does() -> None:
    model = pruned(Net())
    compiled, _ = lowered(model, (torch.randn(2, 3, 16, 16),), fuel=6)
    same(model, compiled, torch.randn(2, 3, 16, 16))


def test_a_dtype_without_kernels_falls_back_to_dense() -> None:
    model = pruned(Net()).double()
    compiled, program = lowered(model, (torch.randn(2, 3, 16, 16).double(),))
    assert not any(packed_operator(node) for _, node in program.nodes())
    assert "no kernel for this op, dtype and target" in program.decisions["wide"].reason
    same(model, compiled, torch.randn(2, 3, 16, 16).double())


@pytest.mark.usefixtures("planes_always")
def test_a_model_in_channels_last_gives_its_outputs_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval().requires_grad_(False)
    prune.random_unstructured(model[0], "weight", amount=0.5)  # type: ignore[no-untyped-call]
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    compiled, program = lowered(model, (x,))
    assert kernels_of(program)
    assert compiled(x).stride() == model(x).stride()
    compare_outputs([model(x)], [compiled(x)])


def test_other_convolutions_keep_their_mask_in_a_dense_weight() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU()).eval()
    prune.random_unstructured(model[0], "weight", amount=0.5)  # type: ignore[no-untyped-call]
    compiled, program = lowered(model, (torch.randn(2, 3, 9),))
    assert "two-dimensional" in program.decisions["0"].reason
    compare_outputs([model(torch.ones(2, 3, 9))], [compiled(torch.ones(2, 3, 9))])


@pytest.mark.parametrize("amount", [0.0, 1.0])
def test_all_kept_and_all_cut(amount: float) -> None:
    model = pruned(Net(), amount=amount)
    compiled, _ = lowered(model, (torch.randn(2, 3, 16, 16),))
    same(model, compiled, torch.randn(2, 3, 16, 16))


def test_packed_weights_come_back_dense() -> None:
    model = pruned(Net())
    program = Pipeline((Pack(),)).run(capture(model, (torch.randn(2, 3, 16, 16),)), Context(), ())
    found = dict(masked_weights(program))
    for name in ("stem", "wide", "narrow", "group"):
        assert torch.equal(found[name], getattr(model, name).weight)
    dense = dense_program(program)
    assert not any(packed_operator(node) for _, node in dense.nodes())
    x = torch.randn(2, 3, 16, 16)
    compare_outputs(CompiledModel(program, host())(x), CompiledModel(dense, host())(x))


@pytest.mark.parametrize("structure", ["unstructured", "16x1", "2:4", "row"])
def test_compile_from_a_recipe(structure: str, tmp_path: Path) -> None:
    model, x = Net().eval(), torch.randn(1, 3, 32, 32)
    recipe = f'mask_weights(score=magnitude, structure="{structure}", density=0.5, targets=("wide", "narrow")) | pack() | lower()'
    compiled = sc.compile(model, (x,), recipe=sc.Pipeline.parse(recipe))
    assert "wide" in str(compiled.report())
    compiled.save(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), sc.load(tmp_path / "out")(x), strict=True))


@pytest.mark.usefixtures("planes_always")
def test_a_damaged_artefact_is_refused(tmp_path: Path) -> None:
    compiled, _ = lowered(pruned(Net()), (torch.randn(2, 3, 16, 16),), Lower(rounds=3, prefer="bytes"))

    def packed(graph: dict[str, Any], name: str) -> dict[str, Any]:
        return next(node for node in graph["regions"][0]["nodes"] if "sparsify.conv2d" in node.get("target", "") and node["name"] == name)

    for number, (name, change) in enumerate([("conv2d", {"groups": 5}), ("conv2d", {"kernel_size": [2, 2]}), ("conv2d", {"stride": [0, 1]}),
                                             ("conv2d_1", {"out_features": 31})]):
        folder = tmp_path / str(number)
        compiled.save(folder)
        edit_graph(folder, lambda graph, name=name, change=change: packed(graph, name)["kwargs"].update(change))  # type: ignore[misc]
        with pytest.raises(ArtefactError):
            load(folder)
