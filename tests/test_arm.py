"""Kernels for 64-bit Arm, built here without a linker and run under qemu. Part of it always runs; `make test-arm` runs the rest,
and the tests of kernels that run here on every kind of processor (`--target`)."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from arm_emulator import PROCESSORS, PYTHON, Emulator, emulated, needs_emulator, qemu
from test_kernels import assert_right, mask_of

from sparsify_compiler import catalog, host_features
from sparsify_compiler.codegen import build, elf, emit, runtime
from sparsify_compiler.errors import KernelError
from sparsify_compiler.target import Target, host, resolve

pytestmark = [needs_emulator, pytest.mark.usefixtures("seeded")]


@pytest.fixture(scope="module")
def board() -> Iterator[Target]:
    """A Cortex-A53: the least that any 64-bit Arm has."""
    with emulated("cortex-a53") as target:
        yield target


@pytest.mark.parametrize(("structure", "sizes", "dtype"), [("csr", {}, torch.float32), ("bsr", {"r": 16, "c": 1}, torch.bfloat16)])
def test_sparse_layers(board: Target, structure: str, sizes: dict[str, int], dtype: torch.dtype) -> None:
    assert host() is board
    mask = mask_of(structure, 37, 60, 0.2, **sizes)
    weight, bias = torch.randn(37, 60, dtype=torch.float32).to(dtype), torch.randn(37, dtype=torch.float32).to(dtype)
    stored = catalog.get("format", structure).encode(weight, mask, **sizes)
    found = runtime.candidates(f"linear_{structure}", stored.tensors(), stored.attributes(), dtype, (1,), board)
    kernel = found[-1].bind(bias)
    for rows in (1, 7):
        assert_right(kernel, weight.double() * mask, bias.double(), torch.randn(rows, 60, dtype=torch.float32).to(dtype))


def test_what_went_wrong_there_is_told_here(board: Target) -> None:
    stored = catalog.get("format", "csr").encode(torch.ones(4, 8, dtype=torch.float32), torch.ones(4, 8, dtype=torch.bool))
    kernel = runtime.candidates("linear_csr", stored.tensors(), stored.attributes(), torch.float32, (1,), board)[-1].bind()
    function = kernel._kernels["rows-alone"].function
    with pytest.raises(RuntimeError, match="TypeError"):
        function(torch.zeros(1, 8, dtype=torch.int32))
    assert kernel(torch.ones(1, 8, dtype=torch.float32)).tolist() == [[8.0] * 4]


@pytest.mark.skipif(not resolve("x86-avx2").runs_on(host()), reason="this machine is no x86 with AVX2")
def test_a_machine_within_another_is_the_one_that_counts() -> None:
    """`--target` is the outer one; kernels for it ended up in the emulator of the inner one."""
    before = build.host()
    with emulated("cortex-a53") as outer:
        there = build._function
        with emulated("x86-avx2") as inner:
            assert build.host() is inner
            assert build._function is not there
        assert build.host() is outer
        assert build._function == there
    assert build.host() is before


def test_a_process_that_ends_says_how() -> None:
    machine = Emulator(resolve("cortex-a53"))
    machine._process.kill()
    with pytest.raises(RuntimeError, match=r"the emulated machine ended with -9"):
        machine.load(b"")


@pytest.mark.parametrize("name", ["cortex-a53", "cortex-a76", "neoverse-v2"])
def test_the_system_tells_what_instructions_a_processor_has(name: str) -> None:
    script = "import host_features; print(host_features.aarch64_features())"
    command = [*qemu(PROCESSORS[name], PYTHONPATH=Path(host_features.__file__).parent), PYTHON, "-c", script]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {feature for feature, there in ast.literal_eval(told).items() if there} == set(resolve(name).features)


def _object(name: str, target: Target, body: Any) -> bytes:
    import tempfile

    import tvm

    from sparsify_compiler.codegen.targets import tvm_target

    library = tvm.compile(tvm.IRModule({name: emit.function(name, body)}), target=tvm_target(target), tir_pipeline="tirx").mod
    with tempfile.TemporaryDirectory() as folder:
        return build._written(library, Path(folder), "o")


def _ones() -> None:
    y = emit.argument((emit.int32(),), "float32")
    emit.store(y, emit.constant(1.0, "float32"), 0)


def test_the_linker_refuses_what_it_does_not_know() -> None:
    arm, x86 = (_object("main", resolve(name), _ones) for name in ("cortex-a53", "x86-avx2"))
    assert elf.shared_library(arm)[:4] == elf.shared_library(x86)[:4] == b"\x7fELF"
    for objects, message in (((arm, x86), "several machines"), ((arm, arm), "defined by two objects"), ((arm[:40],), "not an ELF object"),
                             ((), "0 objects")):
        with pytest.raises(elf.UnsupportedError, match=message):
            elf.shared_library(*objects)


def test_binaries_are_libraries_for_any_processor() -> None:
    """No LLVM bitcode, which would need a compiler where it runs."""
    for name in ("cortex-a53", "neoverse-v2", "x86-avx2"):
        assert build.compile_binary(emit.function("main", _ones), "ones", resolve(name))[:4] == b"\x7fELF"


@pytest.mark.skipif(host().arch != "x86_64", reason="this is such a machine")
def test_nothing_is_loaded_without_an_emulator() -> None:
    with pytest.raises(KernelError, match="made for aarch64, this machine is x86_64"):
        build.require(resolve("cortex-a76"), resolve("x86-avx2"))
