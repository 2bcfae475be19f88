"""The cases of benchmarks/gpu.py, which no GPU here runs: small ones emulated, and a folder whose parts fit together."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from cuda_help import emulated, needs_compiler

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu
import gpu_cases

from sparsify_compiler.target import resolve

__all__ = ["emulated"]
SMALL, TIMED = list(gpu_cases.small()), list(gpu_cases.timed())


def is_right(make: Any) -> None:
    case = make(torch.device("cpu"))
    found, wanted = case.ours().float(), case.wanted().float()
    scale = wanted.abs().max()
    assert float((found - wanted).abs().max()) < 1.5e-2 * float(scale), case.name
    assert case.bytes > 0 < case.products


@needs_compiler
@pytest.mark.parametrize("number", [0, 1, len(SMALL) - 1])
def test_some_cases_are_right(emulated: list[Any], number: int) -> None:
    is_right(SMALL[number])
    assert emulated


@needs_compiler
@pytest.mark.cuda
@pytest.mark.parametrize("number", range(2, len(SMALL) - 1))
def test_small_cases_are_right(emulated: list[Any], number: int) -> None:
    is_right(SMALL[number])


def test_every_case_that_is_timed_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels are those of the same case with fewer outputs: the folder of benchmarks/gpu.py holds what these ask for."""
    from sparsify_compiler.codegen.cuda import device

    asked: list[Any] = []
    monkeypatch.setattr(device, "function", lambda schedule, _: asked.append(schedule) or (lambda *given: None))
    monkeypatch.setattr(device, "processors", lambda _: 132)
    for name in gpu.TARGETS:
        monkeypatch.setattr(device, "target_of", lambda _, name=name: resolve(name))
        for make in TIMED:
            make.shrunk()(torch.device("cpu")).ours()
    kinds = ("gather_rows", "sparse24", "strips", "grouped", "attend_many", "attend_few", "neurons", "down_rows", "sparse_rows", "strip_rows")
    assert {schedule.name for schedule in asked} >= {f"cuda_{kind}" for kind in kinds}


def test_the_folder_holds_all_modules_that_its_cases_need(tmp_path: Path) -> None:
    """As on the machine with the GPU: without TVM's compiler, and without this checkout."""
    gpu.copy(tmp_path / "folder", f"{sys.version_info.major}.{sys.version_info.minor}")
    said = """
import sys, gpu
torch = gpu.prepare()
import gpu_cases, sparsify_compiler
from sparsify_compiler.codegen.cuda import device
from sparsify_compiler.target import resolve
asked = []
device.function = lambda schedule, _: asked.append(schedule.name) or (lambda *given: None)
device.processors, device.target_of = lambda _: 132, lambda _: resolve("sm_90")
for make in {make.case.__name__: make for make in gpu_cases.small()}.values():
    make(torch.device("cpu")).ours()
assert sparsify_compiler.__file__.startswith(str(gpu.HERE)), sparsify_compiler.__file__
print(len(set(asked)))
"""
    done = subprocess.run([sys.executable, "-c", said], cwd=tmp_path / "folder", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1]) >= 6


class Clock:
    """As much of torch.cuda as timing needs: calls advance it, graphs repeat what was called while they were made, unless they may not be made."""

    def __init__(self, graphs: bool) -> None:
        self.now, self.recorded, self.graphs = 0.0, None, graphs
        self.cuda = self
        self.replays = 0

    def spend(self, seconds: float) -> None:
        if self.recorded is None:
            self.now += seconds
        else:
            self.recorded.append(seconds)

    def synchronize(self) -> None: ...

    def Stream(self) -> None: ...

    def CUDAGraph(self) -> Any:
        clock = self

        class Graph:
            made: ClassVar[list[float]] = []

            def replay(self) -> None:
                clock.replays += 1
                clock.now += sum(self.made)

        return Graph()

    @contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        if not self.graphs:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded = []
        yield
        graph.made, self.recorded = self.recorded, None

    def Event(self, enable_timing: bool) -> Any:
        clock = self

        class Event:
            def record(self) -> None:
                self.at = clock.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, other: Any) -> float:
                return (other.at - self.at) * 1e3

        return Event()


@pytest.mark.parametrize("graphs", [True, False])
def test_times_are_of_one_call_each(graphs: bool) -> None:
    clock = Clock(graphs)
    case = gpu_cases.Case("case", lambda: clock.spend(1e-6), lambda: None, {"rival": lambda: clock.spend(3e-6)}, bytes=2e6, products=5e6, turns=5,
                          waits=() if graphs else ("ours", "rival"))
    found = gpu._timings(clock, case, peak=4e12)
    assert found["microseconds"] == pytest.approx(1.0)
    assert found["ratios"] == {"rival": pytest.approx(3.0)}
    assert found["bandwidth"] == pytest.approx(0.5)
    assert found["tflops"] == pytest.approx(10.0)
    assert (clock.replays > 0) == graphs


def test_a_case_that_fails_is_reported_and_the_others_go_on() -> None:
    def broken(device: torch.device) -> Any:
        raise RuntimeError("no kernel image is available")

    found = gpu.one(torch, gpu_cases.of(lambda device: broken(device)), torch.device("cpu"), timed=False, peak=1.0)
    assert not found["right"]
    assert "no kernel image" in found["failed"]
    right = gpu_cases.Case("sum", lambda: torch.ones(3, dtype=torch.float32), lambda: torch.ones(3, dtype=torch.float32))
    assert gpu.one(torch, gpu_cases.of(lambda device: right), torch.device("cpu"), timed=False, peak=1.0)["right"]
    right.wanted = lambda: torch.tensor([1.0, 1.0, torch.nan], dtype=torch.float32)
    assert not gpu.one(torch, gpu_cases.of(lambda device: right), torch.device("cpu"), timed=False, peak=1.0)["right"]
