"""Every kernel × dtype × kind of 64-bit Arm against what it means, under qemu. The table is matrix_help.CASES: a kernel in no case fails here.

What a dtype or a processor has no kernel for must not be offered: the op's own reference runs then, which reports mark.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from arm_emulator import _forget, emulated, missing
from matrix_help import BFLOAT, CASES, FLOAT, HALF

from sparsify_compiler.codegen import build
from sparsify_compiler.codegen.kernels import __path__ as kernels
from sparsify_compiler.target import HERE, NAMES, Target, resolve

PLAIN = ("aarch64", "apple-m1")     # qemu runs them as the Cortex-A53 and the Cortex-A76, which are here
PROCESSORS = [name for name in NAMES if name not in (*HERE, *PLAIN) and resolve(name).arch == "aarch64"]
FIRST = {resolve(name).features: name for name in reversed(PROCESSORS)}     # by instructions; code for others of the same is ordered otherwise
DTYPES = (FLOAT, BFLOAT, HALF)


def test_every_kernel_has_a_case() -> None:
    written = {node.name for path in Path(kernels[0]).glob("*.py") for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)
               and any(isinstance(part, ast.FunctionDef) and part.name == "compute" for part in node.body)}
    assert written == {schedule for case in CASES.values() for schedule in case.schedules}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "machine" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--target")
        names = [pytest.param(name, marks=[] if name in (wanted, *FIRST.values()) else [pytest.mark.slow])
                 for name in ([wanted] if wanted else PROCESSORS)]
        metafunc.parametrize("machine", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def machine(request: pytest.FixtureRequest) -> Iterator[Target]:
    if resolve(request.param).arch == "aarch64" and missing():
        pytest.skip(missing())
    with emulated(request.param) as there:
        yield there


@pytest.mark.arm
@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_numbers(name: str, dtype: torch.dtype, machine: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: set[str] = set()
    load = build.load

    def recorded(schedule: Any, target: Target) -> build.Kernel:
        loaded.add(type(schedule).__name__)
        return load(schedule, target)

    _forget()
    monkeypatch.setattr(build, "load", recorded)
    expected = CASES[name].expected(dtype, machine)
    ran = sum(1 for _ in CASES[name].run(dtype)) if expected or name not in ("training", "graphs") else 0
    assert loaded == expected
    assert bool(ran) == bool(expected)
