"""The hook of an attached model in other people's loops: a callback for Hugging Face's Trainer, and one for Lightning's."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import InputError
from .training import Hook

LIGHTNING = ("lightning.pytorch", "pytorch_lightning")


def trainer_callback(hook: Hook) -> Any:
    """A transformers.TrainerCallback that calls hook.step() after every step of the optimizer, and goes on where a resumed training does.

        module, hook = sc.attach(model, example_inputs, "rigl", density=0.1)
        trainer = Trainer(module, arguments, train_dataset=data, callbacks=[sc.trainer_callback(hook)])

    The Trainer computes the loss by itself: where a recipe adds to it (prosparse, sr_ste, ...), add hook.loss() in its `compute_loss_func`.
    Raises InputError where transformers is not installed.
    """
    base = _base(("transformers",), "TrainerCallback")

    class Callback(base):  # type: ignore[misc, valid-type]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            hook.load_state_dict({"steps": state.global_step})

        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            if state.global_step > hook.steps:  # a step that a scaler of the loss left out is counted too, as the Trainer counts it
                hook.step(optimizer)

    return Callback()


def lightning_callback(hook: Hook) -> Any:
    """A callback for a Lightning Trainer that calls hook.step() after every step of the (first) optimizer, and saves and loads the hook's state.

        trainer = Trainer(callbacks=[sc.lightning_callback(hook)])

    Where a recipe adds to the loss, add hook.loss() in training_step(). Raises InputError where Lightning is not installed.
    """
    base = _base(LIGHTNING, "Callback")

    class Callback(base):  # type: ignore[misc, valid-type]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            if trainer.global_step > hook.steps:  # batches are accumulated: not every one makes a step
                hook.step(trainer.optimizers[0])

        def state_dict(self) -> dict[str, Any]:
            return dict(hook.state_dict())

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            hook.load_state_dict(state_dict)

    return Callback()


def _base(modules: tuple[str, ...], name: str) -> Any:
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except ImportError:
            continue
    raise InputError(f"{modules[0].partition('.')[0]} is not installed", where=name, hint="call hook.step(optimizer) in the loop instead")
