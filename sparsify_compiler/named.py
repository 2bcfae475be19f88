"""A function of the catalogue with options of its own, written as text: "owl", or "owl(outliers=7, spread=0.1)"."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import catalog
from .errors import ParseError, nearest


@dataclass(frozen=True)
class Named:
    """A score or a budget by its name, bound to its options.

    statistics   what it needs of calibration: its module's STATISTICS
    learned      names of the tensors that it is called with behind what it is given: its module's LEARNED
    """

    name: str
    function: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    statistics: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()

    @property
    def module(self) -> Any:
        """The module of its file."""
        return sys.modules[self.function.__module__]

    def __call__(self, *given: Any) -> Any:
        return self.function(*given, **self.options)

    @staticmethod
    def parse(kind: str, text: str) -> Named:
        """The function of a catalogue kind ("score", "budget"). Raises UnknownNameError for the name, ParseError for the options."""
        from .pipeline_text import parse_call

        name, options = parse_call(text)
        function = catalog.get(kind, name)
        known = {p.name: p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
        for option, value in options.items():
            where = f"{kind} {name}"
            if option not in known:
                hint = nearest(option, known) if known else f"write {name!r} alone"
                raise ParseError(f"has no option {option!r}", where=where, hint=hint)
            default = known[option].default
            same = isinstance(value, int | float) if isinstance(default, float) else isinstance(value, type(default))
            if not same or isinstance(value, bool) != isinstance(default, bool):
                raise ParseError(f"{option} must be a {type(default).__name__} such as {default!r}, got {value!r}", where=where)
        module = sys.modules[function.__module__]
        return Named(name, function, options, tuple(getattr(module, "STATISTICS", ())), tuple(getattr(module, "LEARNED", ())))
