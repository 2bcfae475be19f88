"""Values of a graph as JSON: plain ones as they are, all others as {"kind": ...}, so that nothing has to be guessed on the way back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from .errors import ArtefactError

_NAMED: Mapping[type, str] = {torch.dtype: "dtype", torch.memory_format: "memory_format", torch.layout: "layout"}


def encode(value: Any) -> Any:
    """JSON of a value. Raises ArtefactError for what a graph in normal form never holds."""
    if value is None or (isinstance(value, (bool, str, int)) and type(value) in (bool, str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    for kind, name in _NAMED.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    raise ArtefactError(
        f"a value that cannot be saved: {value!r} ({type(value).__name__})", hint="only numbers, text, dtypes, devices, lists and nodes can"
    )


def decode(value: Any, nodes: Mapping[str, fx.Node] | None = None) -> Any:
    """The value. Raises ArtefactError for JSON that `encode` never writes."""
    if isinstance(value, list):
        return [decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    (kind, content), *rest = value.items()
    if rest:
        raise ArtefactError(f"not a value: {value!r}", where="graph.json", hint="the file was not written by sparsify_compiler")
    if kind == "tuple":
        return tuple(decode(item, nodes) for item in content)
    if kind == "dict":
        return {decode(key, nodes): decode(item, nodes) for key, item in content}
    if kind == "slice":
        return slice(*(decode(item, nodes) for item in content))
    if kind == "complex":
        return complex(*(decode(item, nodes) for item in content))
    if kind == "node" and nodes is not None and content in nodes:
        return nodes[content]
    return _decode_name(kind, content)


def _decode_name(kind: str, content: Any) -> Any:
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "device":
        return torch.device(content)
    found = getattr(torch, content, None) if isinstance(content, str) else None
    if found is None or _NAMED.get(type(found)) != kind:
        raise ArtefactError(
            f"not a value: {kind} {content!r}", where="graph.json", hint="the file was not written by sparsify_compiler, or by a newer torch"
        )
    return found
