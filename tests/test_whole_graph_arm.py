"""Exported libraries on 64-bit Arm under qemu, from Python and from C++: equal to torch here, small, and polite to processors that lack something."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from arm_emulator import PROCESSORS, PYTHON, missing, qemu, sysroot
from test_whole_graph_blocks import STREAM, reader
from test_whole_graph_models import Decoder
from test_whole_graph_scores import SCORED
from test_whole_graph_selections import Choosing
from whole_graph_help import build_example, compiled_encoder, example, inputs, libraries

import sparsify_compiler as sc
from sparsify_compiler.capture import capture
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.executor import flat_function
from sparsify_compiler.export_library_cached import empty_caches, with_cache
from sparsify_compiler.passes_api import Context
from sparsify_compiler.target import resolve

pytestmark = pytest.mark.arm
TARGET = "cortex-a76"
MOST = 10_000_000   # bytes of the program and the libraries that it needs beside the model


@pytest.fixture(scope="module")
def site() -> Path:
    if missing() or shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip(missing() or "needs aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)")
    return sysroot.root() / "site"


@pytest.fixture(scope="module")
def folder(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arm") / "encoder"
    compiled_encoder().export(path, TARGET)
    return path


@pytest.fixture(scope="module")
def program(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_example(tmp_path_factory.mktemp("arm_cpp"), resolve(TARGET), site)


def emulated(processor: str, site: Path) -> list[Any]:
    """The command that runs a program of that processor's."""
    path = ":".join(str(one / "lib") for one in libraries(site))
    return qemu(processor, LD_LIBRARY_PATH=path, PYTHONPATH=site)


def expected(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return compiled_encoder()(ids, mask)  # type: ignore[no-any-return]


def agrees(found: dict[str, Any], ids: torch.Tensor, mask: torch.Tensor) -> None:
    for name, value in expected(ids, mask).items():
        assert float((torch.from_numpy(found[name]) - value).abs().max()) <= 1e-4 * float(value.abs().max())


def test_from_c_plus_plus(program: Path, folder: Path, site: Path, tmp_path: Path) -> None:
    ids, mask = inputs(3, 7)
    agrees(example(program, folder, {"ids": ids, "mask": mask}, tmp_path, emulated(PROCESSORS[TARGET], site), site), ids, mask)
    assert sum(os.path.getsize(one) for one in (program, *(place / "lib" / f"lib{name}.so" for place, name in zip(libraries(site), (
        "tvm_ffi", "tvm_runtime"), strict=True)))) < MOST


def test_from_python(folder: Path, site: Path, tmp_path: Path) -> None:
    ids, mask = inputs(2, 5)
    found = example(PYTHON, folder / "run.py", {"ids": ids, "mask": mask}, tmp_path, emulated(PROCESSORS[TARGET], site), site, [str(folder)])
    agrees(found, ids, mask)


def test_layers_that_choose_what_they_read(program: Path, site: Path, tmp_path: Path) -> None:
    """Inputs, and experts that a router takes: one row, and several."""
    torch.manual_seed(0)
    compiled = CompiledModel(capture(Choosing(32, 48, ("inputs", "experts")).eval(), {"x": torch.randn(1, 3, 32, dtype=torch.float32)},
                                     {"x": {0: "batch", 1: "tokens"}}))
    compiled.export(tmp_path / "library", TARGET)
    for tokens in (1, 9):
        x = torch.randn(1, tokens, 32, dtype=torch.float32)
        found = example(program, tmp_path / "library", {"x": x}, tmp_path, emulated(PROCESSORS[TARGET], site), site)["output"]
        with torch.no_grad():
            wanted = compiled(x)
        assert float((torch.from_numpy(found) - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("passes", [STREAM, SCORED])
def test_attention_by_blocks(passes: str, program: Path, site: Path, tmp_path: Path) -> None:
    """A window and sinks, and blocks of highest score; texts that are padded on the left; shorter ones are dense."""
    compiled = reader(passes)
    compiled.export(tmp_path / "library", TARGET, longest=64)
    for length in (9, 40):
        x, mask = torch.randn(2, length, 32, dtype=torch.float32), torch.ones(2, length, dtype=torch.bool)
        mask[1, :4] = False
        with torch.no_grad():
            wanted = compiled(x, mask)
        for command, more in (([program, tmp_path / "library"], []), ([PYTHON, tmp_path / "library" / "run.py"], [str(tmp_path / "library")])):
            found = example(*command, {"x": x, "mask": mask}, tmp_path, emulated(PROCESSORS[TARGET], site), site, more)["output"]
            assert float((torch.from_numpy(found) - wanted)[mask].abs().max()) <= 1e-4 * float(wanted.abs().max())


def test_a_step_of_decoding_in_bfloat16(program: Path, site: Path, tmp_path: Path) -> None:
    """The kernel of one token, over all keys of a short text and over blocks of a longer one."""
    torch.manual_seed(0)
    made = capture(Decoder().eval().to(torch.bfloat16), (torch.randint(0, 40, (2, 6)),), {"input_ids": {0: "batch", 1: "tokens"}})
    passes = sc.Pipeline.parse("select_blocks(always=(SlidingWindow(window=3), Sinks(tokens=1)), block_q=4, block_k=4, dense_below=8)")
    compiled = CompiledModel(passes.run(made, Context()))
    compiled.export(tmp_path / "library", TARGET, cache=True, longest=24)
    cached = with_cache(compiled.program.regions[""], 24)
    run = flat_function(cached.region)
    for past in (5, 19):
        ids, caches = torch.randint(0, 40, (1, past + 1)), empty_caches(cached.caches, 1, 24)
        with torch.no_grad():
            run(ids[:, :-1], torch.tensor([0]), *caches)
            given = {"input_ids": ids[:, -1:], "past": torch.tensor([past]), **dict(zip(cached.caches, [one.clone() for one in caches], strict=True))}
            expected = run(ids[:, -1:], torch.tensor([past]), *caches)[0]
        for command, more in (([program, tmp_path / "library"], []), ([PYTHON, tmp_path / "library" / "run.py"], [str(tmp_path / "library")])):
            more = [*more, "--function", "decode"]
            found = example(*command, given, tmp_path, emulated(PROCESSORS[TARGET], site), site, more)["logits"]
            assert float((torch.from_numpy(found) - expected).abs().max()) <= 1e-2 * float(expected.abs().max())
    with pytest.raises(RuntimeError, match="past is 24, but caches of 24 have room for these tokens after 0 to 23"):
        example(program, tmp_path / "library", given | {"past": torch.tensor([24])}, tmp_path, emulated(PROCESSORS[TARGET], site), site, more[-2:])


def test_a_processor_that_lacks_instructions_says_so(program: Path, folder: Path, site: Path) -> None:
    done = subprocess.run([*emulated("cortex-a53", site), program, folder], capture_output=True, text=True)
    assert done.returncode == 1
    assert "this machine lacks dotprod, fullfp16" in done.stderr
    with pytest.raises(RuntimeError, match="this machine is aarch64"):
        _here(folder, program, site)


def _here(folder: Path, program: Path, site: Path) -> None:
    """A library of this machine's kind, on the other one."""
    copy = Path(shutil.copytree(folder, folder.parent / "other", dirs_exist_ok=True))
    manifest = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(manifest.replace('"arch": "aarch64"', '"arch": "x86_64"'))
    done = subprocess.run([*emulated(PROCESSORS[TARGET], site), program, copy], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
