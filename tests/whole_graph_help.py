"""A small encoder, exported libraries, and the programs that run them: here, or under qemu."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.capture import capture
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.passes_api import Context
from sparsify_compiler.target import Target

SOURCES = Path(sc.__file__).parent / "codegen" / "deploy" / "cpp"


class Encoder(nn.Module):
    """One layer of an encoder: embeddings, attention under a mask of keys, a gated and a plain activation, norms of both kinds, an odd size."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 32), nn.Parameter(torch.randn(20, 32))
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.before, self.after = nn.LayerNorm(32), nn.RMSNorm(32)
        self.up, self.gate, self.down, self.head = nn.Linear(32, 48), nn.Linear(32, 48, bias=False), nn.Linear(48, 32), nn.Linear(32, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.before(self.words(ids) + self.places[: ids.shape[1]])
        q, k, v = (layer(x).unflatten(-1, (2, 16)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = self.after(x + self.o(mixed.transpose(1, 2).flatten(2)))
        x = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return {"hidden": x, "scores": self.head(x[:, 0]).softmax(-1)}


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    mask = torch.arange(length) < torch.arange(length, 0, -1)[:batch, None].clamp(min=1)
    return torch.randint(0, 50, (batch, length)), mask


def compiled_encoder() -> CompiledModel:
    """Half of its layers sparse, in blocks, the others dense."""
    torch.manual_seed(0)
    both = {0: "batch", 1: "length"}
    program = capture(Encoder().eval(), inputs(2, 6), {"ids": both, "mask": both})
    passes = sc.Pipeline.parse("mask_weights(score=magnitude, structure='16x1', density=0.5, targets=('up', 'gate', 'o')) | pack()")
    return CompiledModel(passes.run(program, Context()))


def runner(folder: Path) -> ModuleType:
    """The folder's own run.py."""
    spec = importlib.util.spec_from_file_location("exported_run", folder / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def libraries(site: Path | None = None) -> tuple[Path, Path]:
    """Folders of the packages tvm_ffi and tvm: this environment's, or those in a folder of wheels."""
    if site is not None:
        return site / "tvm_ffi", site / "tvm"
    found = [importlib.util.find_spec(name) for name in ("tvm_ffi", "tvm")]
    return Path(found[0].origin).parent, Path(found[1].origin).parent  # type: ignore[arg-type, union-attr, return-value]


def build_example(folder: Path, target: Target, site: Path | None = None) -> Path:
    """sparsify_example for a target, from its makefile."""
    compiler = {"x86_64": "g++", "aarch64": "aarch64-linux-gnu-g++"}[target.arch]
    command = ["make", "-j2", "-C", SOURCES, f"OUT={folder}", f"FFI={libraries(site)[0]}", f"INCLUDE={libraries()[0]}/include", "CXXFLAGS=-O0",
               f"CXX={compiler}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "sparsify_example"


def example(program: Path, folder: Path, given: Mapping[str, Tensor], work: Path, before: Sequence[str | Path] = (), site: Path | None = None,
            more: Sequence[str] = (), text: bool = False) -> Any:
    """The outputs of the example program, by name, or what it prints. Raises RuntimeError with what it says where it fails."""
    (work / "out").mkdir(exist_ok=True)
    options = []
    for name, value in given.items():
        numpy.save(work / f"{name}.npy", value.numpy())
        options += ["--input", f"{name}={work}/{name}.npy"]
    path = ":".join(str(one / "lib") for one in libraries(site))
    done = subprocess.run([*before, program, folder, *options, "--output", work / "out", *more], capture_output=True, text=True,
                          env={**os.environ, "LD_LIBRARY_PATH": path} if not before else None)
    if done.returncode:
        raise RuntimeError(done.stderr)
    if text:
        return done.stdout
    return {file.stem: numpy.load(file) for file in (work / "out").glob("*.npy")}
