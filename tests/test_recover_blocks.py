"""recover(blockwise=True): one block's gradients, moments and activations at a time; resuming; what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recover import DATA, Residual, distance, same, sparse
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler import recover_loop
from sparsify_compiler.errors import InputError
from sparsify_compiler.recover_pair import Student
from sparsify_compiler.training import EndsHereError


def test_blocks_learn_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss falls as far as all at once, zeros stay, and each optimizer holds one block; then comes the head."""
    held: list[int] = []
    adamw = torch.optim.AdamW

    def counted(parameters: list[nn.Parameter], *rest: Any, **named: Any) -> torch.optim.Optimizer:
        held.append(sum(parameter.numel() for parameter in parameters))
        return adamw(parameters, *rest, **named)

    monkeypatch.setattr(torch.optim, "AdamW", counted)
    module, hook, model = sparse()
    start, trained = distance(module, model), list(module.parameters())
    masks = {name: mask.clone() for name, mask in hook.masks.items()}
    told: list[int] = []
    _, recovery = sc.recover(module, model, DATA, hook=hook, steps=40, rate=1e-2, blockwise=True,
                             progress=lambda what, done, total: told.append(done))
    assert distance(module, model) < 0.3 * start
    block = 16 * 32 * 2 + 16 + 32
    assert held == [block, block, 16 * 5 + 5]
    assert all(torch.equal(mask, hook.masks[name]) for name, mask in masks.items())
    assert all(parameter.requires_grad for parameter in trained)
    assert (recovery.steps, recovery.stopped, [point.step for point in recovery.points]) == (120, "all steps are done", list(range(1, 121)))
    assert recovery.losses == ["squarehead", "outputs"]
    assert told == sorted(told)
    assert told[-1] == 1000


def test_the_backward_pass_holds_one_block() -> None:
    """Of a model of eight blocks, an eighth of the activations that it holds otherwise."""
    def most(blockwise: bool) -> int:
        torch.manual_seed(0)
        model = Residual(blocks=8).eval()
        module, hook = sc.attach(model, DATA[0], "mask_weights(structure='2:4', ignore=('head',))")
        now, found = [0], [0]

        def pack(x: Tensor) -> Tensor:
            now[0] += size(x)
            found[0] = max(found[0], now[0])
            return x

        def unpack(x: Tensor) -> Tensor:
            now[0] -= size(x)
            return x

        def size(x: Tensor) -> int:
            return x.numel() if type(x) in (Tensor, nn.Parameter) else 0  # a capture of the teacher keeps stand-ins, which have no bytes

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            sc.recover(module, model, DATA, hook=hook, steps=1, blockwise=blockwise)
        return found[0]

    assert most(blockwise=True) < 0.35 * most(blockwise=False)  # eight steps' worth that was never freed would be no less


def test_a_killed_run_goes_on_in_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover_loop, "SAVE_EVERY", -1.0)
    common: dict[str, Any] = {"steps": 5, "rate": 1e-2, "blockwise": True}
    whole, hook, model = sparse()
    _, expected = sc.recover(whole, model, DATA, hook=hook, **common)

    class Killed(list[Any]):
        left = 9

        def __iter__(self) -> Iterator[Any]:
            for batch in super().__iter__():
                self.left -= 1
                if not self.left:
                    raise KeyboardInterrupt
                yield batch

    module, hook, _ = sparse()
    with pytest.raises(KeyboardInterrupt):
        sc.recover(module, model, Killed(DATA), hook=hook, checkpoint=tmp_path / "run", **common)
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.0", "run.1"]
    module, hook, _ = sparse()
    _, found = sc.recover(module, model, DATA, hook=hook, checkpoint=tmp_path / "run", **common)
    assert same(whole, module)
    assert [(p.step, p.loss, p.rate) for p in found.points] == [(p.step, p.loss, p.rate) for p in expected.points]


def test_a_loss_that_is_no_number_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """No later block is trained on what a failed one hands on."""
    tried: list[int] = []

    def counted(*given: Any, number: int, **named: Any) -> Tensor:
        tried.append(number)
        return block_loss(*given, number=number, **named)

    block_loss = Student.block_loss
    monkeypatch.setattr(Student, "block_loss", counted)
    module, hook, model = sparse()
    before = copy.deepcopy(module.state_dict())
    data = [(DATA[0][0] * torch.nan,)]
    _, recovery = sc.recover(module, model, data, hook=hook, steps=5, blockwise=True)
    assert recovery.failed
    assert tried == [0]
    assert recovery.steps == 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_what_block_by_block_refuses() -> None:
    module, hook, model = sparse("mask_weights(score='random', density=0.25) | move_masks(grow='random', every=1, until=2)")
    with pytest.raises(InputError, match="moves masks"):
        sc.recover(module, model, DATA, hook=hook, steps=2, blockwise=True)
    module, hook, model = sparse()
    with pytest.raises(InputError, match="walked over once"):
        sc.recover(module, model, iter(DATA), hook=hook, steps=2, blockwise=True)
    with pytest.raises(InputError, match="no loss looks at the states"):
        sc.recover(module, model, DATA, hook=hook, steps=2, blockwise=True, losses="outputs")
    with hook.ending_at("blocks.0@0"), pytest.raises(EndsHereError):
        module(*DATA[0])
    module(*DATA[0])
