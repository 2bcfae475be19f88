"""The hook in Hugging Face's Trainer and in Lightning's."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.errors import InputError
from sparsify_compiler.training import Hook

RECIPE = "mask_weights(score='random', density=0.25) | move_masks(grow='gradient', every=2, until=6)"
X = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))


class WithLoss(nn.Module):
    """A model that gives its loss, as the Trainer asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.layer(x)
        return {"loss": (y - labels).square().mean(), "logits": y}


def attached() -> tuple[nn.Module, Hook]:
    torch.manual_seed(0)
    return sc.attach(WithLoss().eval(), {"x": X[:4], "labels": X[:4]}, RECIPE)


@pytest.mark.slow
def test_the_trainer_steps_the_hook_and_resumes(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    data = [{"x": row, "labels": row.flip(0)} for row in X]

    def trained(resume: str | None, steps: int) -> tuple[nn.Module, Hook]:
        module, hook = attached()
        arguments = transformers.TrainingArguments(str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=steps,
                                                   save_steps=4, learning_rate=0.05, lr_scheduler_type="constant", report_to=[], use_cpu=True,
                                                   disable_tqdm=True, seed=0)
        trainer = transformers.Trainer(module, arguments, train_dataset=data, callbacks=[sc.trainer_callback(hook)])
        trainer.train(resume_from_checkpoint=resume)
        return module, hook

    whole, hook = trained(None, 8)
    assert hook.steps == 8
    assert float(hook.masks["layer"].double().mean()) == 0.25
    again, other = trained(str(tmp_path / "checkpoint-4"), 8)
    assert other.steps == 8
    assert torch.equal(hook.masks["layer"], other.masks["layer"])
    torch.testing.assert_close(whole.state_dict(), again.state_dict())


def test_lightning_steps_the_hook_when_the_optimizer_did(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ModuleType("lightning.pytorch")
    made.Callback = type("Callback", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning", ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", made)
    module, hook = attached()
    callback = sc.lightning_callback(hook)
    assert isinstance(callback, made.Callback)
    trainer = SimpleNamespace(global_step=0, optimizers=[torch.optim.SGD(module.parameters(), 0.1)])
    before = hook.masks["layer"].clone()
    for number in range(4):  # two batches a step
        module(x=X[:4], labels=X[4:8])["loss"].backward()
        if number % 2:
            trainer.optimizers[0].step()
            trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, number)
    assert hook.steps == 2
    assert not torch.equal(before, hook.masks["layer"])
    state = callback.state_dict()
    _, other = attached()
    sc.lightning_callback(other).load_state_dict(state)
    assert other.steps == 2


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _, hook = attached()
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="lightning is not installed"):
        sc.lightning_callback(hook)
