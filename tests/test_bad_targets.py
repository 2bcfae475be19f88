"""What cannot run is refused before it does: unknown targets and features, what the host lacks, other architectures, damage, no compiler."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.cli import main
from sparsify_compiler.codegen import build, runtime
from sparsify_compiler.codegen.cuda import build as gpu
from sparsify_compiler.codegen.kernels.layout import Layout
from sparsify_compiler.codegen.kernels.rows import Rows
from sparsify_compiler.errors import ArtefactError, InputError, KernelError, TargetError
from sparsify_compiler.target import FEATURES, Target, host, resolve

SCHEDULE = Rows(Layout(16, "float32", "int16"), parallel=False)


@pytest.mark.parametrize(("name", "meant"), [("cortex-a67", "cortex-a76"), ("neoverse-v3", "neoverse-v2"), ("x86-avx256", "x86-avx2")])
def test_unknown_targets_are_told_the_nearest(name: str, meant: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=rf"unknown target(.|\n)*{meant}"):
        resolve(name)
    (tmp_path / "mine.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(8, 8).eval(), (torch.randn(1, 8),)\n")
    assert main(["compile", f"{tmp_path}/mine.py:make", "--target", name, "--density", "0.5", "--quiet"]) == 2
    assert meant in capsys.readouterr().err


def test_unknown_features_are_told_the_nearest() -> None:
    with pytest.raises(TargetError, match=r"unknown feature 'dotprot'(.|\n)*dotprod"):
        Target("board", "aarch64", "generic", ("neon", "dotprot"), 4)


def test_code_for_features_that_the_host_lacks_is_refused_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    least = replace(host(), features=())
    kernel = build.load(SCHEDULE, host())
    monkeypatch.setattr(build, "host", lambda: least)
    with pytest.raises(KernelError, match="this machine lacks"):
        build.load_exported(build.export(kernel), SCHEDULE, host())
    other = next(arch for arch in ("aarch64", "x86_64") if arch != host().arch)
    there = Target("there", other, "generic" if other == "aarch64" else "x86-64", FEATURES[other][:1], 1)
    monkeypatch.undo()
    with pytest.raises(KernelError, match=f"made for {other}, this machine is {host().arch}"):
        build.load(SCHEDULE, there)


def test_a_truncated_library_is_never_loaded(tmp_path: Path) -> None:
    x = torch.randn(64, 256, dtype=torch.float32)
    pipeline = "mask_weights(structure='16x1', density=0.2) | pack() | lower(prefer='bytes')"
    sc.compile(torch.nn.Sequential(torch.nn.Linear(256, 256)).eval(), (x,), recipe=pipeline, calibration=[(x,)]).save(tmp_path / "out")
    library = next((tmp_path / "out" / "kernels").glob("*.binary"))
    library.write_bytes(library.read_bytes()[:1000])
    with pytest.raises(ArtefactError, match="has 1000 bytes instead of"):
        sc.load(tmp_path / "out")
    made = build.export(build.load(SCHEDULE, host()))
    older = json.dumps({**json.loads(made["made.json"]), "tvm": "0"}).encode()
    for damage in ({**made, "binary": made["binary"][:500]}, {**made, "made.json": older}):
        assert build.load_exported(damage, SCHEDULE, host()).binary == made["binary"]     # built anew
    with pytest.raises(KernelError, match="damaged"):
        build.load_exported({"binary": b""}, SCHEDULE, host())


def test_tensors_that_lie_askew_are_refused_or_copied() -> None:
    mask = torch.ones(32, 16, dtype=torch.bool)
    weight = torch.randn(32, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    stored = catalog.get("format", "bsr").encode(weight, mask, r=16, c=1)
    kernel = runtime.candidates("linear_bsr", stored.tensors(), stored.attributes(), torch.float32, (4,), host())[-1].bind()
    raw = torch.zeros(4 * 16 * 4 + 1, dtype=torch.uint8)
    askew = torch.randn(4 * 16 + 1, dtype=torch.float32)[1:].view(4, 16)         # aligned to its elements and no more
    torch.testing.assert_close(kernel(askew), askew @ weight.t(), rtol=1e-4, atol=1e-4)
    strided = torch.randn(4, 32, dtype=torch.float32)[:, ::2]
    torch.testing.assert_close(kernel(strided), strided @ weight.t(), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError):
        kernel(raw[: 4 * 16].view(4, 16))
    with pytest.raises(InputError):
        kernel(askew.double())


def test_without_nvcc_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(KernelError, match=r"there is no nvcc(.|\n)*CUDA toolkit"):
        gpu.require_nvcc("sm_90")
