"""Compiling for a machine that is not here: chosen by what is known of it, run here by reference, and there by the kernels that were built for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsify_compiler as sc
from sparsify_compiler import artefact, machines
from sparsify_compiler.codegen import build
from sparsify_compiler.codegen.bound import BoundKernel
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.cost_models.machine import known
from sparsify_compiler.errors import ArtefactError, KernelError, TargetError
from sparsify_compiler.far import FarKernel, far_kernels, is_far
from sparsify_compiler.machines import nearest_machine
from sparsify_compiler.target import Target, host, resolve

BOARD = resolve("cortex-a76")
NEVER_SEEN = Target("my-board", "aarch64", "generic", ("neon",), 2)
ELSEWHERE = Target("far-away", host().arch, host().mcpu, host().features, host().cores)
AWAY = BOARD if host().arch == "x86_64" else Target("away", "x86_64", "x86-64", ("avx2", "fma"), 4)
only_x86 = pytest.mark.skipif(host().arch != "x86_64", reason="here the board's code runs")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).eval()


def compiled_for(target: Target, density: float = 0.1, **options: Any) -> tuple[CompiledModel, torch.Tensor]:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    recipe = options.pop("recipe", sc.recipes.wanda(structure="16x1"))
    budget = options.pop("budget", sc.Budget(density=density))
    return sc.compile(network(), (x,), recipe=recipe, target=target, budget=budget, calibration=[(x,)], **options), x


@pytest.fixture(scope="module")
def made() -> tuple[CompiledModel, torch.Tensor]:
    return compiled_for(BOARD)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """This machine cannot run ELSEWHERE, until the function is called."""
    runs_on = Target.runs_on
    with monkeypatch.context() as patch:
        patch.setattr(Target, "runs_on", lambda self, other: self.name != "far-away" and runs_on(self, other))
        yield patch.undo


@only_x86
def test_kernels_are_chosen_by_what_is_known_of_the_machine(made: tuple[CompiledModel, torch.Tensor]) -> None:
    model, _ = made
    report = model.report()
    assert report.target["name"] == "cortex-a76"
    assert "2 kernels laid out and built for cortex-a76" in report.elsewhere
    for row in report.sites:
        assert row.source == "predicted for cortex-a76"
        assert row.source in row.reason
        assert "measured" not in row.reason
        assert row.dense_ms is not None
        assert row.compiled_ms is not None
        assert row.compiled_ms < row.dense_ms
    kernels = far_kernels(model.program)
    assert [kernel.laid.target for kernel in kernels] == [BOARD, BOARD]
    assert report.compiled is not None
    assert (report.speedup or 0) > 1
    assert "2 kernels" in str(report)
    assert "predicted for cortex-a76 with 64 rows" in explained(model)


def explained(model: CompiledModel) -> str:
    from sparsify_compiler.report.story import explain

    return explain(model.report(), model.report().sites[0].site)


@only_x86
def test_this_machine_computes_it_by_reference(made: tuple[CompiledModel, torch.Tensor], tmp_path: Path) -> None:
    model, x = made
    dense = network()
    dense.load_state_dict(_dense_weights(model, tmp_path), strict=False)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(KernelError, match="runs on cortex-a76 only"):
        far_kernels(model.program)[0](x)


def _dense_weights(model: CompiledModel, folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    artefact.export_dense(model, folder / "dense.safetensors")
    return load_file(folder / "dense.safetensors")


@only_x86
def test_an_artefact_keeps_what_was_built_for_the_machine(made: tuple[CompiledModel, torch.Tensor], tmp_path: Path) -> None:
    model, x = made
    model.save(tmp_path / "one")
    loaded = sc.load(tmp_path / "one")
    assert loaded.target == BOARD
    assert torch.equal(loaded(x), model(x))
    assert [kernel.files() for kernel in far_kernels(loaded.program)] == [kernel.files() for kernel in far_kernels(model.program)]
    loaded.save(tmp_path / "two")
    assert {file.name for file in (tmp_path / "two" / "kernels").iterdir()} == {file.name for file in (tmp_path / "one" / "kernels").iterdir()}
    here = sc.load(tmp_path / "two", target="cpu")     # what is asked for is built for this machine
    assert here.target == host()
    assert not far_kernels(here.program)
    torch.testing.assert_close(here(x), model(x))
    (tmp_path / "one" / "kernels" / next(iter((tmp_path / "one" / "kernels").iterdir())).name).write_bytes(b"")
    with pytest.raises(ArtefactError, match="bytes instead of"):
        sc.load(tmp_path / "one")


def test_binaries_run_where_they_were_built_for(elsewhere: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "_host", lambda: known("neoverse-n1"))    # nothing is measured for it
    model, x = compiled_for(ELSEWHERE, recipe="mask_weights(structure='16x1') | pack() | lower(prefer='bytes')")
    assert is_far(ELSEWHERE)
    expected = model(x)
    assert len(far_kernels(model.program)) == 2
    model.save(tmp_path / "out")
    elsewhere()
    build._loaded.cache_clear()
    monkeypatch.setattr(build, "compile_binary", lambda *_: pytest.fail("it was built already"))
    there = sc.load(tmp_path / "out")
    assert there.target == ELSEWHERE
    assert all(isinstance(node.meta["kernel"], BoundKernel) for _, node in there.program.nodes() if "kernel" in node.meta)
    torch.testing.assert_close(there(x), expected)


@only_x86
def test_what_does_not_pay_there_stays_dense() -> None:
    model, x = compiled_for(BOARD, recipe=sc.recipes.wanda(structure="unstructured"), density=0.9)
    assert not far_kernels(model.program)
    assert all(row.format == "dense" and "stays dense" in row.reason and "predicted for cortex-a76" in row.reason for row in model.report().sites)
    assert model.report().speedup == pytest.approx(1.0)
    assert model(x).shape == (64, 256)


@only_x86
@pytest.mark.parametrize("structure", ["unstructured", "16x1"])
def test_nobody_is_promised_more_than_density_gives(structure: str) -> None:
    model, _ = compiled_for(BOARD, recipe=sc.recipes.wanda(structure=structure), density=0.5)
    for row in model.report().sites:
        assert row.sparse_ms is not None
        assert row.dense_ms is not None
        assert row.sparse_ms > 0.5 * row.dense_ms


@only_x86
def test_a_machine_without_a_data_sheet_is_taken_for_the_nearest(tmp_path: Path) -> None:
    model, _ = compiled_for(NEVER_SEEN)
    nearest, own = nearest_machine(NEVER_SEEN)
    assert not own
    assert (nearest.arch, nearest.cores, nearest.features) == ("aarch64", 2, ("neon",))
    assert {row.source for row in model.report().sites} == {f"predicted for my-board, by what is known of {nearest.name}"}


@only_x86
@pytest.mark.parametrize("budget", [sc.Budget(speedup=1.3), sc.Budget(latency_ms=0.45), sc.Budget(bytes=500_000)])
def test_budgets_hold_as_predicted(budget: sc.Budget) -> None:
    model, _ = compiled_for(BOARD, budget=budget)
    report = model.report()
    assert report.compiled is not None
    assert report.compiled.median is not None
    if budget.speedup is not None:
        assert (report.speedup or 0) >= 1.3
    if budget.latency_ms is not None:
        assert report.compiled.median <= 0.45
    if budget.bytes is not None:
        assert model.resident_bytes() <= 500_000


@only_x86
def test_a_plan_is_made_for_the_machine() -> None:
    model, _ = compiled_for(BOARD, recipe="auto", budget=sc.Budget(speedup=1.15))
    report = model.report()
    assert (report.speedup or 0) >= 1.15
    assert report.plan is not None
    assert far_kernels(model.program)


@only_x86
def test_what_does_not_pay_on_another_machine_or_has_no_kernel_for_it_is_dense() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    pipeline = sc.Pipeline.parse("select_inputs(density=0.5)")
    net = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
    model = sc.compile(net, (x,), recipe=pipeline, target=BOARD, calibration=[(x,)])
    assert all("reads everything: the kernel has 0." in row.reason and "predicted for" in row.source for row in model.report().sites)
    torch.testing.assert_close(model(x), net(x))
    conv = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU()).eval()
    image = torch.randn(1, 16, 8, 8, dtype=torch.float32)
    masked = sc.compile(conv, (image,), recipe="wanda", budget=sc.Budget(density=0.1), target=BOARD, calibration=[(image,)])
    assert all(row.format == "dense" and row.source for row in masked.report().sites)
    assert not any(isinstance(node.meta.get("kernel"), FarKernel) for _, node in masked.program.nodes())


def test_targets_that_nothing_is_lowered_for_are_refused() -> None:
    with pytest.raises(TargetError, match="sm_90: layers are not lowered for cuda"):
        compiled_for(resolve("sm_90"))
    with pytest.raises(TargetError, match="did you mean cortex-a76"):
        compiled_for(resolve("cortex-a77"))
