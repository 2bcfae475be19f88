"""Where a command gets its model from: a function in a module or file, or a local Hugging Face folder."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, nearest

if TYPE_CHECKING:
    from torch import nn

HINT = "give package.module:callable, path/to/file.py:callable, or hf:PATH of a local Hugging Face folder"
TRACEBACK = "add --traceback to see where"
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A compiler turns a program into another one that does the same, faster.",
    "It rained all night, and in the morning the river was over its banks.",
    "She sells sea shells by the sea shore.",
)


@dataclass(frozen=True)
class Source:
    """A model in eval mode with its example inputs; calibration batches where its function gave some."""

    name: str
    model: nn.Module
    example_inputs: Any
    calibration: Any = None


def load_model(spec: str, *, batch: int = 1, sequence: int = 128) -> Source:
    """The model that a command line names. Raises InputError for a spec or a function that does not give one."""
    if spec.startswith("hf:"):
        return _hugging_face(Path(spec.removeprefix("hf:")), batch, sequence)
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise InputError(f"not a model: {spec!r}", where="MODEL", hint=HINT)
    module = _file(Path(where)) if where.endswith(".py") else _module(where)
    function = getattr(module, name, None)
    if not callable(function):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{where} has no function {name!r}", where="MODEL", hint=nearest(name, callables))
    return _call(spec, function)


def _call(spec: str, function: Callable[[], Any]) -> Source:
    from torch import nn

    try:
        result = function()
    except Exception as error:  # the user's own code may raise anything
        raise InputError(f"the function raised {type(error).__name__}: {error}", where=spec, hint=TRACEBACK) from error
    if not (isinstance(result, tuple) and len(result) in (2, 3) and isinstance(result[0], nn.Module)):
        raise InputError(
            f"the function returned {type(result).__name__}, not (model, example_inputs) or (model, example_inputs, calibration)",
            where=spec,
            hint="example_inputs is a tuple of positional or a dict of named arguments",
        )
    return Source(spec, result[0].eval(), *result[1:])


def _module(name: str) -> Any:
    sys.path.insert(0, "")  # the user's own folder, as `python -m` does
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise InputError(f"no module {name!r}", where="MODEL", hint=HINT) from error
        raise InputError(f"{name} needs a module that is not installed: {error.name}", where="MODEL", hint=f"pip install {error.name}") from error
    finally:
        sys.path.remove("")


def _file(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"no file {path}", where="MODEL", hint=HINT)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file", where="MODEL", hint=HINT)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.parent))  # as `python file.py` does
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code may raise anything
        if sys.modules.get(path.stem) is module:
            del sys.modules[path.stem]
        raise InputError(f"{path} could not be run: {type(error).__name__}: {error}", where="MODEL", hint=TRACEBACK) from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _hugging_face(folder: Path, batch: int, sequence: int) -> Source:
    """The folder's own class, and sentences through its tokenizer (or its class's dummy inputs where it has none)."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json", where="MODEL", hint="give a folder that save_pretrained() wrote")
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "Hugging Face folders need the package transformers", where="MODEL", hint="pip install 'sparsify_compiler[transformers]'"
        ) from error
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    model = kind.from_pretrained(folder, local_files_only=True).eval()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return Source(folder.name, model, dict(model.dummy_inputs))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = [SENTENCES[i % len(SENTENCES)] for i in range(batch)]
    inputs = dict(tokenizer(texts, padding="max_length", truncation=True, max_length=sequence, return_tensors="pt"))
    return Source(folder.name, model, inputs)
