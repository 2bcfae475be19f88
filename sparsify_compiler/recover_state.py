"""The state of a recovery, in memory and in a file that is whole or not there. Plain tensors, never a pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArtefactError, InputError
from .recovery import Point, Recovery
from .storage import atomic_path, read_safetensors, write_safetensors
from .training import Hook

MODEL, BEST, OPTIMIZER, META = "model.", "best.", "optimizer.", "meta"


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A copy of what an optimizer remembers, as "<number of the parameter>.<name>"."""
    state: Mapping[int, Mapping[str, Any]] = optimizer.state_dict()["state"]
    return {f"{number}.{key}": torch.as_tensor(value).detach().cpu().clone() for number, of in state.items() for key, value in of.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of optimizer_tensors, for an optimizer of the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def fingerprint(model: nn.Module, work: str) -> str:
    """Of the names and shapes of a model's tensors, and of the settings: a run goes on only where they are the same."""
    shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in model.state_dict().items()]
    return hashlib.blake2b(f"{work} {shapes}".encode(), digest_size=12).hexdigest()


class RunFile:
    """Where one run keeps its state. Raises StorageError where it cannot be written, InputError where it holds another run's."""

    def __init__(self, file: Path, key: str) -> None:
        self._file, self._key = file, key

    def write(self, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, hook: Hook, record: Recovery,
              best: Mapping[str, Tensor] | None) -> None:
        """Replace what is there, at once. `weights` and `best` are what weights_of() gave."""
        meta = {"key": self._key, "hook": hook.state_dict(), "record": asdict(record)}
        tensors = {META: torch.frombuffer(bytearray(json.dumps(meta).encode()), dtype=torch.uint8)}
        for prefix, found in ((MODEL, weights), (OPTIMIZER, optimizer_tensors(optimizer)), (BEST, best or {})):
            tensors |= {prefix + name: tensor.contiguous() for name, tensor in found.items()}
        with atomic_path(self._file, parents=True) as file:
            write_safetensors(file, tensors)

    def read(self, model: nn.Module, optimizer: torch.optim.Optimizer, hook: Hook) -> tuple[Recovery, dict[str, Tensor] | None] | None:
        """Bring all back to where write() was called, and give what it was given; None where nothing is there."""
        if not self._file.exists():
            return None
        tensors = read_safetensors(self._file)
        try:
            meta = json.loads(bytes(tensors.pop(META).tolist()))
            points = [Point(**point) for point in meta["record"].pop("points")]
            record, key, steps = Recovery(points=points, **meta["record"]), meta["key"], meta["hook"]
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError("holds no state of a recovery", where=str(self._file), hint="name another file, or remove it") from error
        if key != self._key:
            raise InputError("holds the state of another model or of other settings", where=str(self._file),
                             hint="go on with the same arguments, name another file, or remove it")
        parts = {prefix: _under(tensors, prefix) for prefix in (MODEL, OPTIMIZER, BEST)}
        model.load_state_dict(parts[MODEL])
        load_optimizer(optimizer, parts[OPTIMIZER])
        hook.load_state_dict(steps)
        return record, parts[BEST] or None


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def parameters_of(model: nn.Module) -> Sequence[nn.Parameter]:
    """What is trained. Raises InputError for nothing."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise InputError("no parameter of this model is trained", where="recover", hint="call model.requires_grad_() first")
    return trained
