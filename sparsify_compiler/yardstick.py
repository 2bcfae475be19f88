"""The dense forms of a whole model: what a compiled model is measured against."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .errors import InputError, UnknownNameError, nearest

FORMS = ("eager", "compile")


def check_forms(names: str | Iterable[str]) -> tuple[str, ...]:
    """Names of dense forms as a tuple; one may be given as text. Raises UnknownNameError, InputError where there is none."""
    given = (names,) if isinstance(names, str) else tuple(names)
    for name in given:
        if name not in FORMS:
            raise UnknownNameError(f"unknown dense form {name!r}", where="against", hint=nearest(str(name), FORMS))
    if not given:
        raise InputError("there is no dense form to measure against", where="against", hint=nearest("", FORMS))
    return given


def dense_forms(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any],
                names: Iterable[str]) -> tuple[dict[str, Callable[[], object]], list[str]]:
    """Calls of the dense model on the example inputs, by the name that the report shows, and a sentence for each form that cannot run here.

    "eager" is the model as it was given; "compile" is torch.compile with frozen weights, which fuses elementwise ops and packs weights for
    oneDNN: the fastest dense form that torch has on a CPU. The user's dtype is kept. Raises UnknownNameError for any other name.
    """
    forms: dict[str, Callable[[], object]] = {}
    warnings: list[str] = []
    for name in check_forms(names):
        if name == "eager":
            forms[f"eager {_dtype(model)}"] = lambda: model(*args, **kwargs)
        elif (reason := _why_no_compiler()) is not None:
            warnings.append(f"torch.compile was not measured: {reason}")
        else:
            try:
                forms[f"torch.compile {_dtype(model)}"] = _compiled(model, args, kwargs)
            except Exception as error:  # noqa: BLE001 — whatever goes wrong inside torch.compile, the model still compiles with us
                warnings.append(f"torch.compile was not measured: it failed with {type(error).__name__}: {str(error).splitlines()[0][:120]}")
    return forms, warnings


def _compiled(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], object]:
    import torch._dynamo
    import torch._inductor.config as inductor

    # The options make a backend of its own, so that what the user has compiled is neither taken for this form nor has to be reset;
    # Dynamo itself looks at the global switch. Without the limits, torch gives up after a few compiles of one function.
    compiled = torch.compile(model, dynamic=False, options={"freezing": True})
    limits = torch._dynamo.config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16)
    with torch.no_grad(), inductor.patch(freezing=True), limits:
        compiled(*args, **kwargs)
    return lambda: compiled(*args, **kwargs)


def _why_no_compiler() -> str | None:
    if any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return None
    return "it needs a C++ compiler and there is none on the PATH"


def _dtype(model: nn.Module) -> str:
    first = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}.get(first, str(first))
