"""From a PrimFunc with threads to machine code of a GPU, on a machine that has none: TVM writes CUDA source, nvcc compiles it.

A kernel is a small archive: `host.so`, which checks the arguments, works out the grid and launches; `device`, the machine code, as TVM's CUDA
runtime loads it; `kernel.cu`, the source to read; `resources.json`, registers and memory of a thread. No driver, stub or linker is needed.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sparsify_compiler.codegen import build as cpu
from sparsify_compiler.codegen import cache as store
from sparsify_compiler.errors import KernelError
from sparsify_compiler.target import Target

HOME = Path(__file__).parent
# Device functions, and the feature that targets need for them.
HEADERS = {"ptx.cuh": "", "group.cuh": "wgmma", "cluster.cuh": "cluster", "device.cuh": ""}
EARLY = "dependent-launch"  # the feature of targets whose kernels may begin before the last one's end
FUNCTION = "main_kernel"    # what TVM calls the device's part of "main"
USED = re.compile(r"Used (\d+) registers")
THREADS, SHARED = re.compile(r'launch_thread\("threadIdx.x", (\d+)\)'), re.compile(r'alloc_buffer\(\((\d+),\), "uint8", scope="shared.dyn"')
BOUNDS = re.compile(r"__launch_bounds__\((\d+)\)")
SERIALIZED = "wgmma.mma_async instructions are serialized"
SPILLED = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Source:
    """A kernel as TVM writes it: the object file of the host's part, the CUDA source of the device's, and what the runtime is told about it."""

    host: bytes
    cuda: str
    description: bytes      # serialised, between format and code: see _device
    block: Mapping[str, int]    # threads and bytes of shared memory
    tags: tuple[str, ...]       # what a launch is given behind the arguments: extents of blocks and threads, bytes of shared memory


@dataclass(frozen=True)
class Resources:
    """What a kernel needs: registers of a thread, bytes of stack and of spills (none may spill); threads, and bytes of shared memory, of a block;
    and whether ptxas makes products of four warps wait for each other."""

    registers: int
    stack: int
    spills: int
    threads: int
    shared: int
    serialized: bool = False

    def warps(self, registers: int = 1 << 16, shared: int = 227 << 10, most: int = 64) -> int:
        """How many a processor holds at once, which has so many registers and bytes, and room for so many: those of Hopper."""
        blocks = min(registers // (-(-self.registers // 8) * 8 * self.threads), shared // (self.shared + 1024), most * 32 // self.threads, 32)
        return blocks * self.threads // 32


def nvcc() -> str | None:
    """Its path: the first on PATH."""
    return shutil.which("nvcc")


def require_nvcc(where: str) -> str:
    """The same. Raises KernelError."""
    found = nvcc()
    if found is None:
        raise KernelError("there is no nvcc to compile kernels for a GPU", where=where,
                          hint="install the CUDA toolkit (13.0 or later) and put nvcc on PATH, or load kernels that were exported elsewhere")
    return found


def load(schedule: cpu.Schedule, target: Target) -> bytes:
    """The archive of this schedule for a GPU, from the cache when it was built before. Raises KernelError."""
    return store.read_or_build(key(schedule, target), lambda: compile_archive(schedule, target))


def key(schedule: cpu.Schedule, target: Target) -> str:
    """The name in the cache: schedule, architecture, TVM's version and all sources of this package."""
    return f"{schedule.name}-{cpu.digest(json.dumps([repr(schedule), target.mcpu, cpu.version(), cpu.sources(), _device_sources()]))}"


def compile_archive(schedule: cpu.Schedule, target: Target) -> bytes:
    """See the module. Raises KernelError: nvcc is missing, or refuses the source."""
    if target.arch != "cuda":
        raise KernelError(f"{schedule.name} is a kernel for GPUs", where=target.name, hint="compile it for sm_80 or sm_90")
    compiler = require_nvcc(schedule.name)
    source = source_of(schedule)
    text = whole_text(_clustered(source.cuda, cluster_of(schedule)), target)
    code, used = _compiled(compiler, text, target.mcpu, schedule.name)
    if used["spills"]:  # ptxas does that to have more blocks at once
        text = BOUNDS.sub(r"__launch_bounds__(\1, 1)", text)
        code, used = _compiled(compiler, text, target.mcpu, schedule.name)
    resources = {**used, **source.block}
    files = {"host.so": host_library(source), "device": _device(source, code, target), "kernel.cu": text.encode(),
             "resources.json": json.dumps(resources).encode()}
    return packed(files)


def cluster_of(schedule: cpu.Schedule) -> int:
    """Blocks of a cluster: neighbours along y, which run at once."""
    return int(getattr(schedule, "cluster", 1))


def _clustered(cuda: str, cluster: int) -> str:
    return cuda.replace("__launch_bounds__", f"__cluster_dims__(1, {cluster}, 1) __launch_bounds__", 1) if cluster > 1 else cuda


def source_of(schedule: cpu.Schedule) -> Source:
    """What TVM makes of a schedule. Raises KernelError."""
    import tvm

    with tempfile.TemporaryDirectory() as folder:
        try:
            target = tvm.target.Target({"kind": "cuda", "arch": "sm_80"}, host={"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu"})
            function = schedule.compute()
            made = tvm.compile(tvm.IRModule({"main": function}), target=target, tir_pipeline="tirx").mod
            (device,) = made.imports
            cuda = device.inspect_source("cuda")
            blob = tvm.get_global_func("runtime.ModulePackImportsToTensor")(made).numpy().tobytes()
            path = Path(folder) / "host.o"
            made.write_to_file(str(path), "o")
            host = path.read_bytes()
        except (RuntimeError, ValueError, TypeError) as error:
            raise KernelError(f"TVM could not compile it: {str(error).strip().splitlines()[-1]}", where=schedule.name,
                              hint="report this as a bug") from error
    description = _description(blob, cuda)
    return Source(host, cuda[cuda.index('extern "C" __global__'):], description, _block(function.script()), _tags(description))


def whole_text(cuda: str, target: Target) -> str:
    """With the device functions in front that a target has."""
    names = [name for name, feature in HEADERS.items() if not feature or feature in target.features]
    return "\n".join([(HOME / name).read_text() for name in names] + [cuda])


def host_library(source: Source) -> bytes:
    """A shared library of the host's part."""
    from sparsify_compiler.codegen import elf

    return elf.shared_library(source.host)


def resources_of(archive: bytes) -> Resources:
    """Of a kernel that was compiled."""
    return Resources(**json.loads(unpacked(archive)["resources.json"]))


def packed(files: Mapping[str, bytes]) -> bytes:
    """The same files make the same bytes."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
    return made.getvalue()


def unpacked(archive: bytes) -> dict[str, bytes]:
    """The files. Raises KernelError where the archive is damaged."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as read:
            return {name: read.read(name) for name in read.namelist()}
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise KernelError(f"the kernel is damaged: {error}", where="cuda", hint="build it again") from error


def _block(script: str) -> dict[str, int]:
    """Threads and shared memory, as the kernel's text asks for them."""
    threads, shared = THREADS.search(script), SHARED.search(script)
    return {"threads": int(threads[1]) if threads else 1, "shared": int(shared[1]) if shared else 0}


def _compiled(compiler: str, text: str, architecture: str, name: str) -> tuple[bytes, dict[str, int]]:
    """Machine code, and what ptxas says about it. Raises KernelError."""
    with tempfile.TemporaryDirectory() as folder:
        path, made = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
        path.write_text(text)
        done = subprocess.run([compiler, "-cubin", "-O3", "-std=c++17", f"-arch={architecture}", "--ptxas-options=-v", str(path), "-o", str(made)],
                              capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr.strip() or "no message"]
            raise KernelError(f"nvcc refuses it: {lines[0].replace(folder, '')}", where=name, hint="report this as a bug")
        used, spilled = USED.search(done.stderr), SPILLED.search(done.stderr)
        stack, stores, loads = (int(number) for number in spilled.groups()) if spilled else (0, 0, 0)
        registers, serialized = int(used[1]) if used else 0, SERIALIZED in done.stderr
        return made.read_bytes(), {"registers": registers, "stack": stack, "spills": stores + loads, "serialized": serialized}


# The format of TVM's serialised CUDA modules (src/backend/cuda/runtime/cuda_module.cc, SaveToBytes): format, description of the functions, code;
# strings behind their lengths in 8 bytes. A module without CUDA's runtime holds the source: it is put together again with machine code.


def _text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _description(blob: bytes, cuda: str) -> bytes:
    """Of the functions, from the imports of a library. Raises KernelError where TVM writes another format."""
    begin, end = _text(b"cuda"), _text(cuda.encode())
    kind = blob.find(begin)
    first, last = blob.find(begin, kind + len(begin)), blob.rfind(end)
    if kind < 0 or first < 0 or last < first or len(blob) != last + len(end):
        raise KernelError("this version of TVM writes CUDA modules in another way", where="cuda", hint=f"use TVM {cpu.version()} as it was tested")
    return blob[first + len(begin):last]


def _device(source: Source, code: bytes, target: Target) -> bytes:
    description = _begins_early(source.description) if EARLY in target.features else source.description
    return _text(b"cubin") + description + _text(code)


def _begins_early(description: bytes) -> bytes:
    """The same with the tag that lets a launch begin before the last kernel's end; the one for shared memory has to be the last."""
    tags, last = _tags(description), _text(b"tirx.use_dyn_shared_memory")
    whole = b"".join(_text(tag.encode()) for tag in tags)
    at = description.index(struct.pack("<Q", len(tags)) + whole)
    front = whole.removesuffix(last)
    return (description[:at] + struct.pack("<Q", len(tags) + 1) + front + _text(b"tirx.use_programtic_dependent_launch") + whole[len(front):]
            + description[at + 8 + len(whole):])


def _tags(description: bytes) -> tuple[str, ...]:
    """Of the launch: one function, its name twice, its argument types of four bytes each, its tags."""
    at = 8

    def number() -> int:
        nonlocal at
        (value,) = struct.unpack_from("<Q", description, at)
        at += 8
        return int(value)

    def text() -> str:
        nonlocal at
        length = number()
        at += length  # behind what number() has read
        return description[at - length:at].decode()

    text(), text()
    types = number()
    at += 4 * types
    return tuple(text() for _ in range(number()))


@cache
def _device_sources() -> str:
    return cpu.digest("".join((HOME / name).read_text() for name in HEADERS))


def load_function(archive: bytes) -> Any:
    """The function that launches the kernel, on a machine with TVM's CUDA runtime. Raises KernelError."""
    import tvm_ffi

    files = unpacked(archive)
    make = tvm_ffi.get_global_func("ffi.Module.load_from_bytes.cuda", allow_missing=True)
    if make is None:
        raise KernelError("TVM's CUDA runtime is not loaded", where="cuda", hint="a driver (libcuda.so.1) and libtvm_runtime_cuda.so must be there")
    return linked(files["host.so"], make(files["device"]))


def linked(host: bytes, device: Any) -> Any:
    """The host's function "main", with this module to launch in."""
    import tvm_ffi

    with cpu.as_file(host, ".so") as path:
        module = tvm_ffi.get_global_func("ffi.Module.load_from_file.so")(path, "so")
    module.import_module(device)
    return module["main"]
