"""Is the emulator honest? It must round as a GPU does, and find what goes wrong in kernels that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cuda_help import needs_compiler
from emulator.emulate import run

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c
from sparsify_compiler.codegen.cuda import tiles as t

pytestmark = needs_compiler
THREADS = 64


@dataclass(frozen=True)
class Sample:
    """f(x [N], y [N]): what a block of 64 threads does, by name."""

    does: str
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return self.does

    def compute(self) -> Any:
        def body() -> None:
            n = e.int32()
            x, y = c.parameter("x", (n,), self.dtype), c.parameter("y", (n,), "float32" if self.dtype != "int32" else "int32")
            with c.launch((1,), THREADS) as (_, thread):
                DOES[self.does](x, y, thread, c.Shared(4096))

        return e.function("main", body)


def reverse(x: Any, y: Any, thread: Any, shared: Any, *, barrier: bool = True) -> None:
    e.store(shared.floats, e.load(x, thread), thread)
    if barrier:
        c.barrier()
    e.store(y, e.load(shared.floats, THREADS - 1 - thread), thread)


def copied(x: Any, y: Any, thread: Any, shared: Any, *, wait: bool = True, offset: int = 0) -> None:
    with e.when(thread < THREADS // 4):
        c.do("copy16", shared.at(thread * 16), c.address(x, thread * 4 + offset), t.true())
    c.do("copies_end_group")
    if wait:
        c.do("copies_wait", c.const(0))
    c.barrier()
    e.store(y, e.load(shared.floats, thread), thread)


def barrier_of_some(x: Any, y: Any, thread: Any, shared: Any) -> None:
    with e.when(thread < 32):
        c.barrier()
    e.store(y, e.load(x, thread), thread)


def shuffle_of_some(x: Any, y: Any, thread: Any, shared: Any) -> None:
    with e.when(thread < 16):
        e.store(y, c.of("float32", "warp_sum", e.load(x, thread)), thread)


def lanes(x: Any, y: Any, thread: Any, shared: Any) -> None:
    scanned = c.of("int32", "warp_scan", e.cast("int32", e.load(x, thread)))
    e.store(y, c.of("float32", "warp_sum", e.load(x, thread)) + e.cast("float32", scanned) * e.constant(1000.0, "float32"), thread)


def rounded(x: Any, y: Any, thread: Any, shared: Any) -> None:
    size = e.let(e.cast("int32", x.shape[0]))
    with e.loop(c.ceil(size, THREADS)) as i:
        at = e.let(thread + i * THREADS)
        with e.when(at < size):
            kind = c.SHORT[str(x.dtype)]
            c.do(f"write_{kind}", c.address(x, at), c.read(x, at))
            e.store(y, c.read(x, at), at)


def narrowed(x: Any, y: Any, thread: Any, shared: Any) -> None:
    """Through float16 and bfloat16, in turn."""
    with e.loop(c.ceil(x.shape[0], THREADS)) as i:
        at = e.let(thread + i * THREADS)
        with e.when(at < x.shape[0]):
            for kind, parity in (("fp16", 0), ("bf16", 1)):
                with e.when(at % 2 < 1 if not parity else at % 2 > 0):
                    c.do(f"write_{kind}", shared.at(thread * 4), e.load(x, at))
                    e.store(y, c.of("float32", f"read_{kind}", shared.at(thread * 4)), at)


DOES: dict[str, Callable[..., None]] = {
    "reverse": reverse, "no_barrier": lambda *a: reverse(*a, barrier=False), "copied": copied, "no_wait": lambda *a: copied(*a, wait=False),
    "misaligned": lambda *a: copied(*a, offset=1), "barrier_of_some": barrier_of_some, "shuffle_of_some": shuffle_of_some, "lanes": lanes,
    "rounded": rounded, "narrowed": narrowed, "behind": lambda x, y, thread, shared: e.store(y, e.load(x, thread + 1), thread),
    "before": lambda x, y, thread, shared: e.store(y, e.load(x, thread - 1), thread),
    "behind_shared": lambda x, y, thread, shared: e.store(shared.floats, e.load(x, thread), thread * 17),
}  # fmt: skip


@pytest.mark.parametrize(("does", "says"), [
    ("no_barrier", "order of its threads"), ("no_wait", "order of its threads"), ("misaligned", "not aligned"),
    ("barrier_of_some", "wait for others"),
    ("shuffle_of_some", "wait for others"), ("behind", "outside of its tensors"), ("before", "outside of its tensors"),
    ("behind_shared", "outside of its tensors")])
def test_what_is_wrong_is_found(does: str, says: str) -> None:
    x = torch.arange(THREADS, dtype=torch.float32) + 1
    with pytest.raises(RuntimeError, match=says):
        run(Sample(does), x, torch.zeros(THREADS, dtype=torch.float32))


def test_barriers_copies_and_lanes() -> None:
    x, y = torch.arange(THREADS, dtype=torch.float32), torch.zeros(THREADS, dtype=torch.float32)
    run(Sample("reverse"), x, y)
    assert torch.equal(y, x.flip(0))
    run(Sample("copied"), x, y)
    assert torch.equal(y, x)
    run(Sample("lanes"), x, y)
    warps = x.view(2, 32)
    assert torch.equal(y.view(2, 32), warps.sum(1, keepdim=True) + 1000 * warps.cumsum(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_sixteen_bits_is_read_and_written_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    x, y = every.clone(), torch.zeros(1 << 16, dtype=torch.float32)
    run(Sample("rounded", str(dtype).removeprefix("torch.")), x, y)
    numbers = ~every.isnan()
    assert torch.equal(x.view(torch.int16)[numbers], every.view(torch.int16)[numbers])
    assert torch.equal(y[numbers], every.float()[numbers])
    assert x[~numbers].isnan().all()
    assert y[~numbers].isnan().all()


@dataclass(frozen=True)
class Exchange:
    """f(x [128], y [128]): two blocks of a cluster give each other their 64 numbers, doubled. `begins` and `ends`: are they waited for?"""

    begins: bool = True
    ends: bool = True
    to: int = 1
    cluster: int = 2
    name: str = "exchange"

    def compute(self) -> Any:
        return e.function("main", self._body)

    def _body(self) -> None:
        x, y = (c.parameter(name, (2 * THREADS,), "float32") for name in ("x", "y"))
        with c.launch((1, 2), THREADS) as (_, block, thread):
            shared, own, at = c.Shared(4096), c.registers(4), e.let(block * THREADS + thread)
            if self.begins:
                c.do("cluster_arrive")
                c.do("cluster_wait")
            with e.when(thread < THREADS // 4):
                for i in range(4):
                    e.store(own, e.load(x, block * THREADS + thread * 4 + i) * e.constant(2.0, "float32"), i)
                c.do("push16", shared.at(thread * 16), self.to - block, own.data)
            if self.ends:
                c.do("cluster_arrive")
                c.do("cluster_wait")
            e.store(y, e.load(shared.floats, thread), at)


def test_blocks_of_a_cluster_write_to_each_other() -> None:
    x = torch.arange(2 * THREADS, dtype=torch.float32)
    y = torch.zeros_like(x)
    run(Exchange(), x, y)
    assert torch.equal(y, x.view(2, THREADS).flip(0).reshape(-1) * 2)


@pytest.mark.parametrize(("how", "says"), [
    (Exchange(begins=False), "may not have begun"), (Exchange(ends=False), "may have left"), (Exchange(to=2), "no such block")])
def test_what_is_wrong_in_a_cluster_is_found(how: Any, says: str) -> None:
    x = torch.ones(2 * THREADS, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=says):
        run(how, x, torch.zeros_like(x))


def test_numbers_are_rounded_to_even() -> None:
    torch.manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (20_000,), dtype=torch.int64).to(torch.int32)
    halfway = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 3 * 2**-26, 65519.0, 65520.0, 1 + 2**-9, 1 + 2**-8, 0.0, -0.0], dtype=torch.float32)
    x = torch.cat((bits.view(torch.float32), numbers_near_one(20_000), halfway.repeat_interleave(2)))
    y = torch.zeros_like(x)
    run(Sample("narrowed"), x, y)
    wanted = torch.where(torch.arange(len(x)) % 2 == 0, x.half().float(), x.bfloat16().float())
    assert torch.equal(y.nan_to_num(nan=7.5), wanted.nan_to_num(nan=7.5))


def numbers_near_one(count: int) -> torch.Tensor:
    return torch.randn(count, dtype=torch.float32) * torch.exp2(torch.randint(-20, 16, (count,)).float())
