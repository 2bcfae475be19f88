"""Models exported as one library, run without torch by their own run.py: equal to torch's own, and polite where something does not fit."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from whole_graph_help import build_example, compiled_encoder, example, inputs, libraries, runner

from sparsify_compiler.codegen.whole_graph import compiler_for
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.errors import KernelError, ModelError, StorageError
from sparsify_compiler.target import host

try:
    compiler_for(host())
except KernelError as error:
    pytest.skip(f"needs a linker: {error}", allow_module_level=True)


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    return compiled_encoder()


@pytest.fixture(scope="module")
def folder(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "encoder"
    compiled.export(path)
    return path


def close(found: Any, expected: Tensor) -> None:
    assert tuple(found.shape) == tuple(expected.shape)
    assert float((torch.from_numpy(numpy.array(found)) - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(("batch", "length"), [(2, 6), (1, 1), (5, 19), (3, 20)])
def test_what_it_computes(folder: Path, compiled: CompiledModel, batch: int, length: int) -> None:
    model = runner(folder).Model(folder)
    ids, mask = inputs(batch, length)
    found = model.run(ids=ids.numpy(), mask=mask.numpy())
    with torch.no_grad():
        expected = compiled(ids, mask)
    assert set(found) == {"hidden", "scores"}
    for name, value in expected.items():
        close(found[name], value)


def test_nothing_runs_without_a_kernel_of_ours(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["reference"] == []
    assert manifest["symbols"] == {"batch": [1, None], "length": [1, 20]}
    assert {"symbols": ["batch", "length"], "product": (2**31 - 1) // 48} in manifest["limits"]
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}


def test_an_index_outside_of_its_table_reads_nothing_else(folder: Path) -> None:
    model = runner(folder).Model(folder)
    ids, mask = inputs(2, 6)
    wild = [model.run(ids=ids.numpy() * 0 + value, mask=mask.numpy())["hidden"] for value in (1 << 40, 49)]
    numpy.testing.assert_array_equal(*wild)


def test_it_runs_alone(folder: Path, tmp_path: Path) -> None:
    """In a process of its own, without torch and without the compiler; the command line too."""
    code = ("import sys; sys.modules |= dict.fromkeys(('torch', 'tvm', 'sparsify_compiler')); sys.path.insert(0, sys.argv[1]); import run;"
            "sys.exit(run.main([sys.argv[1], '--size', 'length=4', '--output', sys.argv[2]]))")
    runtime = Path(importlib.util.find_spec("tvm").origin).parent / "lib"  # type: ignore[arg-type, union-attr]
    plain = {**os.environ, "PYTHONPATH": "", "TVM_LIBRARY_PATH": str(runtime)}
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path)], capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr
    assert numpy.load(tmp_path / "hidden.npy").shape == (1, 4, 32)


@pytest.mark.parametrize(("change", "told"), [
    ({"ids": lambda ids: ids.astype(numpy.int32)}, "ids has dtype int32, expected int64"),
    ({"ids": lambda ids: ids[0]}, "ids has shape [6], expected ['batch', 'length']"),
    ({"ids": lambda ids: ids[:, :5]}, "mask has shape [2, 6]"),
    ({"ids": lambda ids: numpy.zeros((2, 21), numpy.int64), "mask": lambda mask: numpy.zeros((2, 21), bool)}, "with length from 1 to 20"),
    ({"ids": lambda ids: ids[:0], "mask": lambda mask: mask[:0]}, "with batch from 1 to None"),
    ({"tokens": lambda _: numpy.zeros(1)}, "inputs are ids, mask; got ids, mask, tokens"),
])  # fmt: skip
def test_calls_that_do_not_fit(folder: Path, change: dict[str, Any], told: str) -> None:
    module = runner(folder)
    given: dict[str, Any] = dict(zip(("ids", "mask"), (one.numpy() for one in inputs(2, 6)), strict=True))
    given |= {name: make(given.get(name)) for name, make in change.items()}
    with pytest.raises(module.LibraryError) as refused:
        module.Model(folder).run(**given)
    assert told in str(refused.value)


def test_memory_that_is_not_aligned(folder: Path) -> None:
    ids, mask = inputs(2, 6)
    shifted = numpy.empty(ids.numel() * 8 + 8, numpy.uint8)[8 - 1:-1].view(numpy.int64).reshape(2, 6)
    shifted[...] = ids.numpy()
    model = runner(folder).Model(folder)
    numpy.testing.assert_array_equal(*(model.run(ids=one, mask=mask.numpy())["hidden"] for one in (shifted, ids.numpy())))


def _damage(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        data = data[: len(data) // 2]
    elif kind == "changed":
        data[len(data) // 2] ^= 1
    path.unlink() if kind == "missing" else path.write_bytes(data)


def test_more_than_kernels_can_count(folder: Path) -> None:
    """Elements are counted in 32 bits: what would overflow is refused, whatever each symbol may be."""
    module = runner(folder)
    model, huge = module.Model(folder), numpy.lib.stride_tricks.as_strided
    ids, mask = huge(numpy.zeros(1, "int64"), (3_000_000, 20), (0, 0)), huge(numpy.zeros(1, bool), (3_000_000, 20), (0, 0))
    model.tensor = lambda value, dtype="": value      # nothing of that size is copied
    with pytest.raises(module.LibraryError, match="batch times length is more than"):
        model._checked(model._facts("main"), {"ids": ids, "mask": mask})


@pytest.mark.parametrize(("name", "kind"), [("model.so", "truncated"), ("model.so", "changed"), ("weights.safetensors", "changed"),
                                            ("weights.safetensors", "missing"), ("manifest.json", "truncated")])
def test_damaged_folders(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    _damage(copy, name, kind)
    module = runner(copy)
    with pytest.raises(module.LibraryError, match=r"damaged|cannot be read|no exported model"):
        module.Model(copy)


@pytest.mark.parametrize(("facts", "told"), [({"arch": "aarch64" if host().arch == "x86_64" else "x86_64"}, "this machine is"),
                                             ({"features": ["avx1024"]}, "lacks avx1024")])
def test_machines_that_cannot_run_it(folder: Path, tmp_path: Path, facts: dict[str, Any], told: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["target"] |= facts
    (copy / "manifest.json").write_text(json.dumps(manifest))
    module = runner(copy)
    with pytest.raises(module.LibraryError, match=told):
        module.Model(copy)


def test_weights_that_are_cut_off(folder: Path, tmp_path: Path) -> None:
    """Also where nobody compares hashes."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    _damage(copy, "weights.safetensors", "truncated")
    module = runner(copy)
    with pytest.raises(module.LibraryError, match="damaged"):
        module.Model(copy, check=False)


def test_what_export_refuses(compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious.txt").write_text("mine")
    program = compiled.program.clone()
    program.skeleton = nn.Module()
    with pytest.raises(ModelError, match="captured in parts"):
        CompiledModel.export(_with(compiled, program), tmp_path / "out")
    program.skeleton.generate = lambda: None        # a language model, compiled with its cache
    with pytest.raises(ModelError, match=r'"use_cache": False.*cache=True'):
        CompiledModel.export(_with(compiled, program), tmp_path / "out")
    monkeypatch.setenv("SPARSIFY_CC", "no-such-compiler")
    with pytest.raises(KernelError, match="no-such-compiler"):
        compiled.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "taken" / "precious.txt").read_text() == "mine"


def _with(compiled: CompiledModel, program: Any) -> Any:
    """Something with another program, which cannot be run."""
    class Stub:
        target = compiled.target
    stub = Stub()
    stub.program = program  # type: ignore[attr-defined]
    return stub


def test_a_folder_of_something_else_is_left_alone(compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsify_compiler import export_library

    (tmp_path / "precious.txt").write_text("mine")
    monkeypatch.setattr(export_library, "_compile", lambda *_: (None, {}))
    with pytest.raises(StorageError):
        compiled.export(tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ example program."""
    if shutil.which("make") is None or shutil.which("g++") is None:
        pytest.skip("needs make and g++")
    return build_example(tmp_path_factory.mktemp("cpp"), host())


def test_from_c_plus_plus(program: Path, folder: Path, compiled: CompiledModel, tmp_path: Path) -> None:
    ids, mask = inputs(3, 7)
    found = example(program, folder, {"ids": ids, "mask": mask}, tmp_path)
    with torch.no_grad():
        expected = compiled(ids, mask)
    for name, value in expected.items():
        close(found[name], value)


def _threads(command: list[Any]) -> list[dict[str, str]]:
    """What /proc says of each thread beside the first, at the end of a program that runs on two."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("TVM_")}
    places = ":".join(str(one / "lib") for one in libraries())
    with subprocess.Popen(command, env={**plain, "TVM_NUM_THREADS": "2", "LD_LIBRARY_PATH": places}, stdout=subprocess.DEVNULL) as process:
        found: dict[str, dict[str, str]] = {}
        while process.poll() is None:
            for task in Path(f"/proc/{process.pid}/task").glob("*/status"):
                with contextlib.suppress(OSError):
                    found[task.parent.name] = dict(line.split(":\t", 1) for line in task.read_text().splitlines() if ":\t" in line)
        assert process.returncode == 0
    return [status for name, status in found.items() if name != str(process.pid)]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir() or len(os.sched_getaffinity(0)) < 2, reason="needs /proc and two processors")
@pytest.mark.parametrize("language", ["Python", "C++"])
def test_threads_sleep_where_they_wait_and_stay_on_no_processor(language: str, program: Path, folder: Path) -> None:
    """One that is bound, or yields in a loop, has a program beside before it at every kernel: calls took a hundred times as long."""
    command = [sys.executable, folder / "run.py"] if language == "Python" else [program]
    workers = _threads([*command, folder, "--size", "batch=8", "--size", "length=20", "--repeat", "400"])
    assert workers
    own = next(line.split("\t")[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Cpus_allowed_list"))
    assert {one["Cpus_allowed_list"] for one in workers} == {own}
    assert max(int(one["voluntary_ctxt_switches"]) for one in workers) >= 200, "none slept"


def test_what_c_plus_plus_refuses(program: Path, folder: Path, tmp_path: Path) -> None:
    ids, mask = inputs(2, 6)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for given, told in (({"ids": ids.int(), "mask": mask}, "ids has dtype int32, expected int64"), ({"ids": ids[0], "mask": mask}, "1 dimensions"),
                        ({"ids": ids[:, :5], "mask": mask}, "dimension 1 of mask is 6, expected length"), ({"words": ids}, "no input words")):
        with pytest.raises(RuntimeError, match=told):
            example(program, copy, given, tmp_path)
    for name, kind in (("weights.safetensors", "changed"), ("model.so", "truncated"), ("manifest.json", "truncated"), ("model.so", "missing")):
        damaged = Path(shutil.copytree(folder, tmp_path / f"{name} {kind}"))
        _damage(damaged, name, kind)
        with pytest.raises(RuntimeError, match=r"damaged|cannot be read"):
            example(program, damaged, {}, tmp_path)
    manifest = json.loads((copy / "manifest.json").read_text())
    for facts, told in (({"arch": "riscv64"}, "this machine is"), ({"features": ["avx1024"]}, "lacks avx1024")):
        (copy / "manifest.json").write_text(json.dumps({**manifest, "target": {**manifest["target"], **facts}}))
        with pytest.raises(RuntimeError, match=told):
            example(program, copy, {}, tmp_path)
