"""The kernel cache: corrupt entries, folders that cannot be written, two processes at once, a process killed while it builds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from sparsify_compiler.codegen import build, cache
from sparsify_compiler.codegen.kernels.layout import Layout
from sparsify_compiler.codegen.kernels.rows import Rows
from sparsify_compiler.target import host

SCHEDULE = Rows(Layout(16, "float32", "int16"), parallel=False)
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = textwrap.dedent("""
    import sys
    from sparsify_compiler.codegen import build
    from sparsify_compiler.codegen.kernels.layout import Layout
    from sparsify_compiler.codegen.kernels.rows import Rows
    from sparsify_compiler.target import host
    print("ready", flush=True)
    sys.stdin.readline()
    kernel = build.load(Rows(Layout(16, "float32", "int16"), parallel=False), host())
    print(len(kernel.binary), flush=True)
""")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of our own, and a process that has loaded nothing yet."""
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_warnings", {})
    build._loaded.cache_clear()
    return tmp_path / "cache"


def start(folder: Path, before: str = "") -> subprocess.Popen[str]:
    """A process that will load SCHEDULE when it is told to, imports done; it runs the code `before` first."""
    environment = {**os.environ, "SPARSIFY_CACHE": str(folder), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", before + SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("rows-*.kernel"))


def works(kernel: build.Kernel) -> bool:
    """One group of 16 outputs that keeps two columns: y = bias + 2 x[0] + 3 x[1]."""
    y = torch.empty(1, 16)
    values = torch.tensor([2.0, 3.0]).repeat_interleave(16)
    columns, pointers = torch.tensor([0, 1], dtype=torch.int16), torch.tensor([0, 2], dtype=torch.int32)
    kernel.function(torch.tensor([[1.0, 10.0]]), values, columns, pointers, torch.ones(16), y)
    return bool((y == 33).all())


def test_second_load_reads_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.load(SCHEDULE, host())
    build._loaded.cache_clear()
    monkeypatch.setattr(build, "compile_binary", lambda *_: pytest.fail("compiled again"))
    begin = time.perf_counter()
    second = build.load(SCHEDULE, host())
    assert time.perf_counter() - begin < 0.1
    assert second.binary == first.binary
    assert works(second)
    assert not cache.warnings()


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:100] + b"?" + b[101:], lambda b: b"", lambda b: bytes(len(b))])
def test_corrupt_entry_is_rebuilt(folder: Path, damage: object) -> None:
    good = build.load(SCHEDULE, host()).binary
    (entry,) = entries(folder)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))  # type: ignore[operator]
    build._loaded.cache_clear()
    kernel = build.load(SCHEDULE, host())
    assert works(kernel)
    assert len(kernel.binary) == len(good)
    assert cache._read(entry) == kernel.binary


def test_unwritable_folder_builds_in_memory(folder: Path) -> None:
    folder.write_text("a file where the folder should be: not even root can write below it")
    assert works(build.load(SCHEDULE, host()))
    assert any("cache cannot be used" in warning for warning in cache.warnings())


def test_full_disk_is_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    assert works(build.load(SCHEDULE, host()))
    assert any("No space left" in warning for warning in cache.warnings())
    assert not entries(folder)
    assert not [p for p in folder.iterdir() if p.suffix not in (".lock",)]


def test_two_processes_at_once(folder: Path) -> None:
    processes = [start(folder) for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    sizes = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sizes[0] == sizes[1]
    assert len(entries(folder)) == 1


DYING = {
    "compiling": "build.compile_binary = die",
    "writing": "cache.os.fdopen = lambda handle, mode: Half(handle)",
    "renaming": "cache.os.replace = die",
}


@pytest.mark.parametrize("step", DYING)
def test_killed_while_building(folder: Path, step: str) -> None:
    process = start(folder, f"""
import os, signal
from sparsify_compiler.codegen import build, cache
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
class Half:
    def __init__(self, handle): self.handle = handle
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def write(self, data):
        os.write(self.handle, data[:len(data) // 2])
        die()
{DYING[step]}
""")
    process.communicate("go\n", timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not entries(folder)
    assert len(list(folder.glob(".rows-*"))) == (step != "compiling")
    assert works(build.load(SCHEDULE, host()))  # it waits for no lock of the dead, and cleans up
    assert len(entries(folder)) == 1
    assert not list(folder.glob(".rows-*"))
    assert not cache.warnings()
