"""Shared by the tests of what acts in training: a small network, a step of a user's loop, resuming, two processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify_compiler.training import Hook

Attached = Callable[[Any], tuple[Any, ...]]     # of a recipe: module, hook, and what else a test has


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """[..., 16] -> [..., 8], the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).to(dtype).eval()


def step(x: Tensor, y: Tensor, module: nn.Module, hook: Hook, optimizer: torch.optim.Optimizer, accumulate: int = 1,
         dtype: torch.dtype | None = None) -> float:
    """The loss of a step on x, whose gradient comes from so many batches. dtype: of an autocast."""
    total = 0.0
    for some, wanted in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = ((module(some).float() - wanted).square().mean() + hook.loss()) / accumulate
        loss.backward()
        total += float(loss.detach())
    optimizer.step()
    hook.step(optimizer)
    optimizer.zero_grad()
    return total


def assert_resumes(attached: Callable[[], tuple[Any, ...]], step: Callable[..., float], before: int, after: int) -> None:
    """What goes on from the states of (module, hook, optimizer) after `before` steps is the same to the bit, losses and tensors."""
    one = attached()
    for _ in range(before):
        step(*one)
    saved = copy.deepcopy([part.state_dict() for part in one])
    expected = [step(*one) for _ in range(after)]
    other = attached()
    for part, state in zip(other, saved, strict=True):
        part.load_state_dict(state)
    assert [step(*other) for _ in range(after)] == expected
    for name, value in one[0].state_dict().items():
        assert torch.equal(value, other[0].state_dict()[name]), name


def in_two_processes(attached: Attached, recipe: Any, x: Tensor, y: Tensor, steps: int, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that each of two processes has after so many steps of SGD on its half of x."""
    from safetensors.torch import load_file

    given = (attached, recipe, x, y, steps, str(folder / "meet"), str(folder / "out"))
    torch.multiprocessing.spawn(_rank, given, nprocs=2)  # type: ignore[no-untyped-call]
    return load_file(folder / "out0"), load_file(folder / "out1")


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    """Of what trains."""
    return torch.optim.SGD([one for one in module.parameters() if one.requires_grad], 0.1)


def _rank(rank: int, attached: Attached, recipe: Any, x: Tensor, y: Tensor, steps: int, place: str, out: str) -> None:
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    module, hook = attached(recipe)[:2]
    parallel, optimizer = nn.parallel.DistributedDataParallel(module), sgd(module)
    for _ in range(steps):
        step(x.chunk(2)[rank], y.chunk(2)[rank], parallel, hook, optimizer)
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, f"{out}{rank}")
    torch.distributed.destroy_process_group()
