"""Every error a user can meet: what was wrong, where, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparsifyError(Exception):
    """Base of all errors raised on purpose by sparsify_compiler.

    what   what was wrong, one sentence
    where  the pass, node, module path, file or argument, when there is one
    hint   what to do next
    """

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        self.what, self.where, self.hint = what, where, hint
        place = f"{where}: " if where else ""
        advice = f"\n  {hint}" if hint else ""
        super().__init__(f"{place}{what}{advice}")


class InputError(SparsifyError, ValueError):
    """An argument of a public function is wrong: example inputs, dynamic dimensions, a call's shapes."""


class ModelError(SparsifyError, ValueError):
    """The model cannot be compiled as it stands: training mode, NaN weights, mixed devices, unsupported dtype."""


class CaptureError(SparsifyError, RuntimeError):
    """No part of the model could be captured, or the captured Program does not reproduce the model."""


class UnknownNameError(SparsifyError, LookupError):
    """A recipe, pass, target, score, structure or other name that the catalogue does not hold."""


class ParseError(SparsifyError, ValueError):
    """The text, YAML or option of a pipeline, structure or selector cannot be read."""


class SelectorError(SparsifyError, ValueError):
    """A selector matches nothing, or is malformed."""


class StructureError(SparsifyError, ValueError):
    """A structure does not fit a weight: N:M or a block that does not divide, an impossible density."""


class BudgetError(SparsifyError, ValueError):
    """The budget is impossible or ill-formed."""


class CalibrationError(SparsifyError, ValueError):
    """Calibration is missing, empty, or produced no usable statistics."""


class VerifyError(SparsifyError, AssertionError):
    """A pass broke what it promised to preserve, or left a graph that its stage does not allow."""


class TargetError(SparsifyError, ValueError):
    """The target is unknown, or asks for what it cannot do."""


class KernelError(SparsifyError, RuntimeError):
    """A kernel could not be built or loaded."""


class BoardError(SparsifyError, ConnectionError):
    """A remote board cannot be reached, takes too long, or ended in the middle of a measurement."""


class ArtefactError(SparsifyError, RuntimeError):
    """A saved model is missing, truncated, tampered with, or made for another machine or version."""


class StorageError(SparsifyError, OSError):
    """A folder cannot be written: read-only, full, or locked."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that names the closest known names, to end an error's hint with."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {', '.join(close)}?"
    return f"known: {', '.join(names)}" if names else "none are known"


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> UnknownNameError:
    """The one way to refuse a name: what it was, and the nearest ones that exist."""
    return UnknownNameError(f"unknown {kind} {name!r}", where=where, hint=nearest(name, known))
