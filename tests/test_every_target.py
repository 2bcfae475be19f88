"""Every kernel of every family compiles for every kind of processor; what there is no counterpart for is not offered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_compiler import catalog
from sparsify_compiler.codegen import build, runtime
from sparsify_compiler.errors import KernelError
from sparsify_compiler.target import Target, resolve

pytestmark = [pytest.mark.arm, pytest.mark.usefixtures("seeded")]
PROCESSORS = ("cortex-a53", "neoverse-v2", "x86-avx2", "x86-amx")     # others run them in `make test-arm`, or have a part of these instructions
SPARSE: list[tuple[str, dict[str, int]]] = [("csr", {}), ("nm", {"n": 2, "m": 4}), *(("bsr", {"r": r, "c": 1}) for r in (2, 4, 8, 16))]
DTYPES = (torch.float32, torch.bfloat16)


class Recorder:
    """Schedules of the kernels that are asked for, in place of kernels."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.schedules: dict[Any, None] = {}
        patch.setattr(build, "load", self.load)

    def load(self, schedule: Any, target: Target) -> build.Kernel:
        self.schedules[schedule] = None
        return build.Kernel(schedule, target, b"", lambda *_: None)


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32).to(dtype)


def _ops(dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Any], tuple[int, ...]]]:
    """Op, tensors, attributes and rows of what kernels of ours run."""
    for structure, sizes in SPARSE:
        mask = catalog.get("format", structure)
        kept = torch.zeros(64, 64, dtype=torch.bool)
        kept[:, ::2] = True
        form = mask.encode(_random(64, 64, dtype=dtype), kept, **sizes)
        for rows in ((1,), (1, 64)):
            yield f"linear_{structure}", form.tensors(), form.attributes(), rows
    yield "linear", {"weight": _random(64, 64, dtype=dtype)}, {}, (1,)
    limit = torch.ones(1, dtype=torch.float32)
    yield "select_linear", {"weight": _random(64, 64, dtype=dtype), "limit": limit}, {}, (1,)
    ffn = {"gate": _random(64, 64, dtype=dtype), "up": _random(64, 64, dtype=dtype), "down": _random(64, 64, dtype=dtype)}
    yield "select_ffn", {**ffn, "limit": limit}, {"activation": "silu"}, (1,)
    yield "predicted_ffn", {**ffn, "limit": limit}, {"activation": "relu"}, (1,)
    yield "select_inputs_ffn", {**ffn, **{f"{name}_limit": limit for name in ffn}}, {"activation": "silu"}, (1,)
    experts = {name: torch.stack([tensor] * 3) for name, tensor in ffn.items()}
    yield "experts_ffn", experts, {"activation": "silu"}, (1, 64)


def _schedules(target: Target, patch: pytest.MonkeyPatch) -> dict[str, set[Any]]:
    """Of everything that is offered for a target, by family."""
    found: dict[str, set[Any]] = {}
    for dtype in DTYPES:
        for op, tensors, attributes, rows in _ops(dtype):
            for candidate in runtime.candidates(op, tensors, attributes, dtype, rows, target):
                recorder = Recorder(patch)
                try:
                    candidate.bind()
                except KernelError as error:
                    raise AssertionError(f"{candidate.name} is offered for {target.name} and cannot be bound: {error}") from error
                found.setdefault(str(candidate.options["family"]), set()).update(recorder.schedules)
    return {family: schedules for family, schedules in found.items() if schedules}


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_is_offered_compiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = resolve(name)
    found = _schedules(target, monkeypatch)
    monkeypatch.undo()
    everywhere = {"strips", "lanes", "streams", "gather", "gather_ffn", "gather_inputs_ffn", "gather_predicted_ffn", "experts_ffn"}
    assert everywhere <= set(found)
    assert ("slices" in found) == target.has("avx512f")
    for schedules in found.values():
        for schedule in schedules:
            assert build.compile_binary(schedule.compute(), schedule.name, target)[:4] == b"\x7fELF"


def test_bfloat16_is_multiplied_in_pairs_where_arm_can() -> None:
    """By the instruction that takes one lane of the weights, once for every register of sums: LLVM's own way copies the lane first."""
    import tvm

    from sparsify_compiler.codegen.targets import tvm_target

    stored = next(tensors for op, tensors, attributes, _ in _ops(torch.bfloat16) if op == "linear_bsr" and attributes["r"] == 16)
    attributes = next(attributes for op, _, attributes, _ in _ops(torch.bfloat16) if op == "linear_bsr" and attributes["r"] == 16)
    for name in ("cortex-a76", "neoverse-v1", "neoverse-v2"):
        target = resolve(name)
        found = runtime.candidates("linear_bsr", stored, attributes, torch.bfloat16, (64,), target)
        (laid,) = [one.lay() for one in found if one.options["family"] == "lanes"]
        schedule = next(one for variant, one in laid.variants.schedules.items() if variant.startswith("panel"))
        text = tvm.compile(tvm.IRModule({"main": schedule.compute()}), target=tvm_target(target), tir_pipeline="tirx").mod.inspect_source("asm")
        lanes = [line for line in text.splitlines() if "bfdot" in line]
        assert bool(lanes) == target.has("bf16")
        assert all("2h[" in line for line in lanes)
