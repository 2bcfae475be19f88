"""Export in the layout of Hugging Face: config.json and model.safetensors, which AutoModel.from_pretrained loads without us.

The architecture must be one that its class can be configured to: masks and exact rewrites within a layer leave it alone, and neurons that went from
every layer alike are another number in the configuration.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .artefact_dense import dense_tensors
from .compiled import CompiledModel
from .errors import InputError, ModelError
from .storage import write_safetensors, writing

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HEADS = ("num_attention_heads", "num_key_value_heads")
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Like:
    """A class of models, a configuration of it, and weights to take where the compiled model has none."""

    kind: Any
    config: Any
    spare: Mapping[str, Tensor]


def export_huggingface(compiled: CompiledModel, path: str | Path, like: Any = None) -> None:
    """Write the folder, whole or not at all, every weight dense.

    like  the model that was compiled, or the folder it was loaded from: its configuration, and weights that no output of the capture needed. May
          be left out for a model that was captured in parts, which has a configuration itself

    Raises ModelError where the weights fit no configuration of the class, InputError for a `like` without one, StorageError.
    """
    model = _like(compiled, like)
    tensors = dict(dense_tensors(compiled.program))
    tensors |= {other: tensors[name] for other, name in compiled.program.aliases.items() if name in tensors}
    before = _shapes(model.kind, model.config)
    unknown, missing = sorted(set(tensors) - set(before) - set(model.spare)), sorted(set(before) - set(tensors) - set(model.spare))
    if unknown or missing:
        raise ModelError(f"{model.kind.__name__} has no weight {unknown[0]!r}" if unknown else f"its weight {missing[0]!r} was not captured",
                         where=model.kind.__name__, hint="export it as ONNX or as a library" if unknown else "give the original model as `like`")
    written = {name: tensors[name] if name in tensors else model.spare[name] for name in before}
    config = _fitting(model, before, {name: tuple(tensor.shape) for name, tensor in written.items()})
    config.architectures = [model.kind.__name__]
    with writing(Path(path), replaceable=_is_export) as folder:
        config.save_pretrained(folder)
        write_safetensors(folder / WEIGHTS, {name: tensor.detach().contiguous() for name, tensor in written.items()})


def _like(compiled: CompiledModel, like: Any) -> Like:
    """The class and the configuration that the export has."""
    if isinstance(like, str | Path):
        import transformers

        try:
            transformers.AutoConfig.from_pretrained(like, local_files_only=True)
        except (OSError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise InputError(f"no configuration of Hugging Face: {why}", where=str(like), hint="give the model's folder") from error
        like = getattr(transformers, compiled.report().model, transformers.AutoModel).from_pretrained(like, local_files_only=True)
    found: Any = like if like is not None else compiled.program.skeleton
    if not hasattr(getattr(found, "config", None), "save_pretrained"):
        raise InputError("there is no configuration of Hugging Face", where="like", hint="give the model that was compiled, or its folder")
    buffers = {} if like is None else dict(found.named_buffers())
    return Like(type(found), found.config, {**buffers, **({} if like is None else found.state_dict())})


def _fitting(model: Like, before: Shapes, after: Shapes) -> Any:
    """A configuration of the model's class whose weights have these shapes. Raises ModelError."""
    if after == before:
        return copy.deepcopy(model.config)
    for config in _candidates(model.config, before, after):
        if _shapes(model.kind, config) == after:
            return config
    wrong = next(name for name in before if before[name] != after[name])
    raise ModelError(f"{wrong} is {list(after[wrong])}, which no configuration of {model.kind.__name__} gives: neurons, heads or features went "
                     "from some layers and not from others", where=model.kind.__name__, hint="export it as ONNX, a library or dense safetensors")


def _candidates(own: Any, before: Shapes, after: Shapes) -> Iterator[Any]:
    """The model's own configuration with one number changed as a dimension of its weights did."""
    changed = sorted({(old, new) for name in after for old, new in zip(before[name], after[name], strict=True) if old != new})
    for old, new in changed:
        for attribute, value in vars(own).items():
            if value == old and isinstance(value, int):
                yield _with(own, {attribute: new})
        heads = {name: value * new // old for name in HEADS if isinstance(value := getattr(own, name, None), int) and value * new % old == 0}
        if heads:
            yield _with(own, heads)


def _with(own: Any, changes: Mapping[str, int]) -> Any:
    config = copy.deepcopy(own)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def _shapes(kind: Any, config: Any) -> Shapes:
    """Of the weights of a class in a configuration; nothing where it cannot be."""
    try:
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in kind(config).state_dict().items()}
    except (ValueError, RuntimeError, ZeroDivisionError):
        return {}


def _is_export(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()

