"""Machine code for GPUs without one: what is made, kept, refused; that no kernel spills; and that launches are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import tvm_ffi
from cuda_help import needs_compiler, needs_nvcc, numbers
from emulator.emulate import Lent, function_of

from sparsify_compiler.codegen import build as cpu
from sparsify_compiler.codegen import runtime
from sparsify_compiler.codegen.cuda import build, device
from sparsify_compiler.codegen.cuda.attend_few import CudaAttendFew
from sparsify_compiler.codegen.cuda.attend_many import CudaAttendMany
from sparsify_compiler.codegen.cuda.gather_rows import CudaGatherRows
from sparsify_compiler.codegen.cuda.grouped import CudaCombine, CudaGrouped
from sparsify_compiler.codegen.cuda.neurons import CudaDownRows, CudaNeurons
from sparsify_compiler.codegen.cuda.sparse24 import CudaSparse24
from sparsify_compiler.codegen.cuda.sparse24_group import CudaSparse24Group
from sparsify_compiler.codegen.cuda.sparse24_rows import CudaSparse24Rows
from sparsify_compiler.codegen.cuda.sparse_rows import CudaSparseRows
from sparsify_compiler.codegen.cuda.strip_rows import CudaStripRows
from sparsify_compiler.codegen.cuda.strips import CudaStrips
from sparsify_compiler.codegen.cuda.strips_group import CudaStripsGroup
from sparsify_compiler.codegen.cuda.strips_wide import CudaStripsWide
from sparsify_compiler.codegen.cuda.turn import CudaTurn
from sparsify_compiler.errors import KernelError
from sparsify_compiler.formats.csr import Csr
from sparsify_compiler.target import Target, resolve

GPUS = [resolve("sm_80"), resolve("sm_90")]
SMALL = CudaCombine("bfloat16")
EVERY = [
    *[CudaGatherRows(dtype, rows, True, True, warps=warps)
      for dtype in ("bfloat16", "float16", "float32") for rows in (1, 2, 4) for warps in (8, 16)],
    CudaGatherRows("bfloat16", 1, source="float32"),
    *[CudaStrips(dtype, r, rows) for dtype in ("bfloat16", "float16") for r in (16, 32, 64, 128) for rows in (32, 128)],
    *[CudaStripsWide(r) for r in (16, 32, 64, 128)],
    *[CudaStripRows(dtype, r, rows) for dtype in ("bfloat16", "float16", "float32") for r in (16, 128) for rows in (1, 4)],
    *[CudaSparse24(dtype, rows) for dtype in ("bfloat16", "float16") for rows in (32, 64, 128)],
    *[CudaSparseRows(dtype, index, rows, 4096) for dtype in ("bfloat16", "float16", "float32") for index in ("int16", "int32") for rows in (1, 4)],
    *[CudaSparse24Rows(dtype, rows) for dtype in ("bfloat16", "float16") for rows in (1, 2, 4)],
    *[CudaAttendMany(dtype, width, width, warps, 64 if warps > 1 else 32)
      for dtype in ("bfloat16", "float16") for width in (64, 96, 128) for warps in (1, 2, 4)],
    *[CudaAttendFew(dtype, width, width) for dtype in ("bfloat16", "float16") for width in (64, 96, 128)],
    *[CudaGrouped(dtype, True, "silu", biased=True, raised=True, tall=tall) for dtype in ("bfloat16", "float16") for tall in (32, 128)],
    *[CudaGrouped(dtype, False, "", True, True, result="float32", tall=tall) for dtype in ("bfloat16", "float16") for tall in (32, 128)],
    *[CudaNeurons(dtype, "gelu", select=select) for dtype in ("bfloat16", "float16", "float32") for select in ("", "gate", "scores")],
    *[CudaDownRows(dtype, True) for dtype in ("bfloat16", "float16", "float32")],
    *[CudaCombine(dtype) for dtype in ("bfloat16", "float16")],
    CudaTurn(),
]  # fmt: skip
HOPPER = [
    *[CudaGatherRows(dtype, rows, True, True, across=across, cluster=cluster, warps=warps) for dtype in ("bfloat16", "float32") for rows in (1, 2, 4)
      for across, cluster, warps in ((8, 2, 16), (32, 8, 4), (32, 8, 8), (32, 8, 16))],
    *[CudaStripsGroup(dtype, r, rows, straight) for dtype in ("bfloat16", "float16") for r in (64, 128) for rows in (128, 256)
      for straight in (False, True)],
    *[CudaSparse24Group(dtype, rows) for dtype in ("bfloat16", "float16") for rows in (128, 256)],
    *[CudaGrouped(dtype, True, "silu", biased=True, raised=True, group=True) for dtype in ("bfloat16", "float16")],
    *[CudaGrouped(dtype, False, "", True, True, result="float32", group=True) for dtype in ("bfloat16", "float16")],
    *[CudaAttendMany(dtype, width, width, group=True) for dtype in ("bfloat16", "float16") for width in (64, 128)],
]  # fmt: skip


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of one's own."""
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    return tmp_path


@needs_nvcc
@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
def test_machine_code_is_made_once(kept: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = build.load(SMALL, target)
    files = build.unpacked(archive)
    assert files["host.so"][:4] == b"\x7fELF"
    assert files["device"][:13] == b"\x05\0\0\0\0\0\0\0cubin"
    assert b"\x7fELF" in files["device"]
    assert b"main_kernel" in files["device"]
    assert (b"use_programtic_dependent_launch" in files["device"]) == (target.name == "sm_90")
    assert build.resources_of(archive).spills == 0 < build.resources_of(archive).registers
    monkeypatch.setattr(build, "nvcc", lambda: None)
    assert build.load(SMALL, target) == archive     # out of the cache, without a compiler


def test_a_launch_that_begins_early_says_so_before_its_shared_memory() -> None:
    for schedule in (SMALL, CudaTurn()):
        source = build.source_of(schedule)
        early = build._begins_early(source.description)
        tag = "tirx.use_programtic_dependent_launch"
        own = [one for one in source.tags if "shared_memory" not in one]
        assert list(build._tags(early)) == [*own, tag, *source.tags[len(own):]]
        assert early.replace(build._text(tag.encode()), b"")[-24:] == source.description[-24:], "what stands behind the tags is the same"


@needs_nvcc
@pytest.mark.cuda
@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
@pytest.mark.parametrize("schedule", EVERY, ids=repr)
def test_no_kernel_spills(schedule: Any, target: Target) -> None:
    used = build.resources_of(build.load(schedule, target))
    assert used.spills == used.stack == 0
    assert used.registers <= 255


@needs_nvcc
@pytest.mark.parametrize("schedule", [HOPPER[0], *[pytest.param(one, marks=pytest.mark.cuda) for one in HOPPER[1:]]], ids=repr)
def test_no_kernel_for_hopper_spills_or_waits_for_each_product(schedule: Any) -> None:
    used = build.resources_of(build.load(schedule, resolve("sm_90")))
    assert used.spills == used.stack == used.serialized == 0
    assert used.registers <= 255


def test_without_nvcc_it_says_what_to_do(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "nvcc", lambda: None)
    with pytest.raises(KernelError, match="no nvcc") as refused:
        build.load(SMALL, GPUS[0])
    assert "PATH" in str(refused.value)
    assert "cuda_combine" in str(refused.value)
    with pytest.raises(KernelError, match="kernel for GPUs"):
        build.load(SMALL, resolve("cortex-a76"))


@needs_nvcc
def test_source_that_nvcc_refuses(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "whole_text", lambda cuda, target: "this is no source")
    with pytest.raises(KernelError, match="nvcc refuses it"):
        build.load(SMALL, GPUS[0])


@needs_nvcc
def test_damaged_archives_and_a_missing_runtime() -> None:
    archive = build.load(SMALL, GPUS[0])
    for wrong in (archive[:100], b"", b"PK" + archive[2:-30]):
        with pytest.raises(KernelError, match="damaged"):
            build.unpacked(wrong)
    if tvm_ffi.get_global_func("ffi.Module.load_from_bytes.cuda", allow_missing=True) is None:
        with pytest.raises(KernelError, match="CUDA runtime is not loaded"):
            build.load_function(archive)


def test_another_format_of_modules_is_refused() -> None:
    with pytest.raises(KernelError, match="another way"):
        build._description(b"nothing of this kind", "source")


@needs_compiler
def test_a_launch_checks_its_arguments() -> None:
    launch, _ = function_of(SMALL)
    parts, places, y = torch.zeros(2, 64, dtype=torch.float32), torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 64, dtype=torch.bfloat16)
    lent = [Lent(tensor, at_begin=False) for tensor in (parts, places, y)]
    with pytest.raises(Exception, match="device"):
        launch(*[tvm_ffi.from_dlpack(tensor) for tensor in (parts, places, y)])     # of the CPU
    with pytest.raises(Exception, match=r"[Mm]ismatch|shape|ndim|dtype"):
        launch(lent[0].tensor(), lent[1].tensor(), lent[0].tensor())
    for one in lent:
        one.give_back()


def test_what_there_is_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what torch says of it: no GPU is here."""
    for capability, name in (((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        device.target_of.cache_clear()
        assert device.target_of(torch.device("cuda")).name == name
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    device.target_of.cache_clear()
    with pytest.raises(KernelError, match=r"compute capability 7\.5"):
        device.target_of(torch.device("cuda"))
    device.target_of.cache_clear()


class OnGpu:
    """As much of a tensor as says where it lies."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self.device = tensor, torch.device("cuda", 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)


def test_weights_on_a_gpu_are_offered_kernels_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = numbers(16, 64)
    stored = Csr.encode(weight, weight > 0)
    tensors: Any = {name: OnGpu(tensor) for name, tensor in stored.tensors().items()}
    given = ("linear_csr", tensors, stored.attributes(), torch.float32, (1,), GPUS[0])
    monkeypatch.setattr(device, "target_of", lambda _: GPUS[1])
    monkeypatch.setattr(build, "nvcc", lambda: "nvcc")
    (found,) = runtime.candidates(*given)
    assert found.options["family"] == "cuda_linear"
    assert found.target is GPUS[1]
    monkeypatch.setattr(build, "nvcc", lambda: None)
    assert runtime.candidates(*given) == []
    assert runtime.candidates(given[0], {**tensors, "values": stored.values}, *given[2:]) == []     # half of it elsewhere


def test_kernels_of_an_artefact_are_taken_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    here, target = torch.device("cpu"), GPUS[0]
    monkeypatch.setattr(device, "target_of", lambda _: target)
    monkeypatch.setattr(device, "function", lambda schedule, _: lambda *given: ("built", given))
    monkeypatch.setattr(build, "load", lambda schedule, target: b"archive")
    monkeypatch.setattr(build, "load_function", lambda archive: lambda *given: None)
    first = device.Kernels(here, {})
    first(SMALL, 1)
    files = first.files()
    assert sorted(name.rpartition(".")[2] for name in files) == ["archive", "json"]
    monkeypatch.setattr(device, "function", lambda schedule, _: pytest.fail("it was stored"))
    loaded = device.Kernels(here, files)
    loaded(SMALL, 1)
    monkeypatch.setattr(build, "load", lambda schedule, target: pytest.fail("it was stored"))
    assert loaded.files() == files      # saved again where there is no nvcc
    monkeypatch.setattr(cpu, "version", lambda: "another")
    with pytest.raises(pytest.fail.Exception):
        device.Kernels(here, files)(SMALL, 1)


def test_counters_are_those_of_a_stream_and_new_in_every_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    here, counters, now = torch.device("cpu"), device.Counters(), [1, False]
    monkeypatch.setattr(device, "stream", lambda _: tuple(now))
    first = counters(here, 3)
    assert first.tolist() == [0, 0, 0]
    assert first.dtype is torch.int32
    assert counters(here, 3) is first
    assert len(counters(here, 4)) == 4
    now[0] = 2
    assert counters(here, 3) is not first
    now[:] = 1, True    # a graph sets its own before each run, whichever graph runs first
    one, two = counters(here, 3), counters(here, 3)
    assert len({id(found) for found in (first, one, two)}) == 3
    assert one.tolist() == two.tolist() == [0, 0, 0]
    now[1] = False
    assert counters(here, 3) is first
