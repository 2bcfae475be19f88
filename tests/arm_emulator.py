"""Kernels for 64-bit Arm that run under qemu as if they ran here: their tensors are copied into a file that both sides have in memory, and back.

Beside tests of their own (test_arm.py) every test of kernels can run on such a machine: `pytest --target cortex-a76 tests/test_kernels.py`.
"""

from __future__ import annotations

import json
import mmap
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_compiler.codegen import attend, build, top_pages
from sparsify_compiler.target import Target, resolve
from sparsify_compiler.target import host as here

SCRIPTS = Path(__file__).parent.parent / "scripts" / "arm"
sys.path.insert(0, str(SCRIPTS))
import sysroot  # noqa: E402

PYTHON = sysroot.root() / f"usr/bin/python{sysroot.PYTHON}"
# What qemu calls a processor that has a target's instructions; it has no model of the later ones.
PROCESSORS = {"cortex-a53": "cortex-a53", "cortex-a72": "cortex-a72", "cortex-a76": "cortex-a76", "neoverse-n1": "neoverse-n1",
              "aarch64": "cortex-a53", "apple-m1": "cortex-a76", "neoverse-v1": "max,sve256=on,sve512=off",
              "neoverse-v2": "max,sve128=on,sve256=off"}
SIZE = 1 << 28      # bytes of the file, which is sparse
CODES = {torch.float32: (2, 32), torch.float16: (2, 16), torch.bfloat16: (4, 16), torch.int64: (0, 64), torch.int32: (0, 32), torch.int16: (0, 16),
         torch.int8: (0, 8), torch.uint8: (1, 8), torch.bool: (6, 8)}


def missing() -> str:
    """Why nothing can be emulated here; "" where it can."""
    if shutil.which("qemu-aarch64") is None:
        return "qemu-aarch64 is not installed (Debian: qemu-user)"
    return "" if sysroot.ready() else f"no root folder for arm64: {sysroot.COMMAND} makes one"


needs_emulator = pytest.mark.skipif(bool(missing()), reason=missing())


def qemu(processor: str, **variables: Any) -> list[str | Path]:
    """The command that a program of that processor's, such as PYTHON, and its arguments follow."""
    variables = {"TVM_NUM_THREADS": 2, "PYTHONDONTWRITEBYTECODE": 1, "PYTHONNOUSERSITE": 1, **variables}
    environment = [part for name, value in variables.items() for part in ("-E", f"{name}={value}")]
    return ["qemu-aarch64", "-cpu", processor, "-L", sysroot.root(), *environment]


class Emulator:
    """A process under qemu that runs kernels for a target. Raises RuntimeError where one of them fails or the process dies."""

    def __init__(self, target: Target, processor: str = "") -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name) / "memory"
        with self._file.open("wb") as file:
            file.truncate(SIZE)
        with self._file.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), SIZE)
        self._used, self._loaded, self._lock = 0, 0, threading.Lock()
        command = [*qemu(processor or PROCESSORS[target.name]), PYTHON, SCRIPTS / "guest.py", self._file, str(SIZE), sysroot.root() / "site"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._base = int(self._answer()["base"])

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(timeout=60)
        self._folder.cleanup()

    def load(self, binary: bytes, *, on_torch_threads: bool = True) -> Any:
        """The function "main" of a kernel's library, called with torch tensors of this process."""
        with self._lock:
            self._loaded += 1
            path = Path(self._folder.name) / f"kernel{self._loaded}.so"
            path.write_bytes(binary)
            kernel = self._do({"load": str(path)})["kernel"]
        return lambda *arguments: self._call(kernel, arguments)

    def lend(self, tensor: Tensor) -> int:
        """The address of a copy of a tensor's memory in the emulated machine, until the next call of a kernel is over."""
        return self._base + self._placed(tensor)["at"]  # type: ignore[no-any-return]

    def _call(self, kernel: int, arguments: tuple[Any, ...]) -> None:
        with self._lock:
            tensors = [torch.from_dlpack(one) if hasattr(one, "__dlpack__") else one for one in arguments]
            places = [self._placed(one) if isinstance(one, Tensor) else one for one in tensors]
            self._do({"call": kernel, "arguments": places})
            for place, tensor in zip(places, tensors, strict=True):
                if isinstance(tensor, Tensor) and tensor.numel():
                    self._fetch(place["at"], tensor)
            self._used = 0

    def _placed(self, tensor: Tensor) -> dict[str, Any]:
        """Copy it, no better aligned than its elements."""
        size, flat = tensor.element_size(), _flat(tensor)
        at = -(-self._used // 64) * 64 + size
        self._used = at + flat.numel() * size
        assert self._used <= SIZE, "too large for the emulator's memory"
        if flat.numel():
            self._view(at, flat).copy_(flat)
        code, bits = CODES[tensor.dtype]
        return {"at": at, "code": code, "bits": bits, "shape": list(tensor.shape), "strides": list(tensor.stride())}

    def _view(self, at: int, flat: Tensor) -> Tensor:
        return torch.frombuffer(self._memory, dtype=flat.dtype, count=flat.numel(), offset=at)

    def _fetch(self, at: int, tensor: Tensor) -> None:
        flat = _flat(tensor)
        found = self._view(at, flat)
        if not torch.equal(found.view(torch.uint8), flat.view(torch.uint8)):
            flat.copy_(found)

    def _do(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, errors = self._process.communicate()
            raise RuntimeError(f"the emulated machine ended with {self._process.returncode}: {errors.strip()[-800:]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


def _flat(tensor: Tensor) -> Tensor:
    """All memory from a tensor's first element to its last, whatever its strides."""
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    return tensor.detach().as_strided((extent,), (1,), tensor.storage_offset())


_ADDRESSED, _FUNCTION = attend._addressed, build._function
_HOSTS: list[Any] = [here]  # what modules have as host(): this, or what an outer emulated() gave them


@contextmanager
def emulated(name: str, processor: str = "") -> Iterator[Target]:
    """`with emulated("cortex-a76") as target:` kernels for this target run, under qemu; it is this machine, for whom asks for the host.

    What runs here, such as "x86-avx2", does so. Within another one this machine counts, until it ends.
    """
    target, patch = resolve(name), pytest.MonkeyPatch()
    machine = None if target.runs_on(here()) else Emulator(target, processor)
    _HOSTS.append(lambda: target)
    try:
        _forget()
        patch.setattr(build, "_function", _FUNCTION if machine is None else machine.load)
        patch.setattr(attend, "_addressed", _ADDRESSED if machine is None else lambda bias: (machine.lend(bias), *_ADDRESSED(bias)[1:]))
        for module in [module for module in sys.modules.values() if any(getattr(module, "host", None) is one for one in _HOSTS)]:
            patch.setattr(module, "host", _HOSTS[-1])
        yield target
    finally:
        patch.undo()
        _HOSTS.pop()
        _forget()
        if machine is not None:
            machine.close()


def _forget() -> None:
    """Kernels that are loaded, for whatever machine."""
    for cached in (build._loaded, attend._few, attend._panel, attend._tiles, attend._missing, top_pages._kernel, top_pages._lanes):
        cached.cache_clear()
    attend.PLANS.clear()
