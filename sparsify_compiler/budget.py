"""Budget: what the user asks for, in one number."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from .errors import BudgetError

COUNTED = ("bytes", "flops", "joules")


@dataclass(frozen=True)
class Budget:
    """Exactly one of these.

    density       kept / total over all weights that the recipe touches, 0 < density <= 1
    speedup       whole-model latency of the fastest dense form / latency of the compiled model, >= 1
    latency_ms    whole-model latency on the example inputs, milliseconds
    bytes         bytes of all weights in memory, indices included
    flops         floating-point operations of a call on the example inputs, by the formulas: what is cut is kept cut even where it gains no time
    joules        of such a call, a proxy: operations and bytes moved, weighted as cost_models/energy.py says
    quality_drop  largest loss of quality: in units of the user's `quality` metric; without one, 1 - cosine of the outputs to dense,
                  on calibration batches that are held out
    perplexity_rise  largest relative rise of exp(loss), likewise: 0.01 for one per cent. The loss is that of calibration

    Raises BudgetError when none or several are given, or one is out of its range.
    """

    density: float | None = None
    speedup: float | None = None
    latency_ms: float | None = None
    bytes: int | None = None
    flops: float | None = None
    joules: float | None = None
    quality_drop: float | None = None
    perplexity_rise: float | None = None

    @property
    def of_quality(self) -> bool:
        """Is it quality that is limited, so that the sparsest model within it is wanted?"""
        return self.quality_drop is not None or self.perplexity_rise is not None

    @property
    def counted(self) -> tuple[str, float] | None:
        """(what, the most of it) of a budget that is counted, not timed: "bytes", "flops" or "joules"."""
        return next(((name, float(value)) for name, value in self.given().items() if name in COUNTED), None)

    def __post_init__(self) -> None:
        given = self.given()
        if len(given) != 1:
            what = "is empty" if not given else f"names {', '.join(given)} at once"
            raise BudgetError(f"the budget {what}", hint=f"give exactly one of {', '.join(f.name for f in fields(self))}")
        (name, value), = given.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise BudgetError(f"{name} must be a finite number, got {value!r}", where="budget")
        low, high, allowed = _RANGES[name]
        if not low <= value <= high or (value == 0 and not self.of_quality):
            raise BudgetError(f"{name} is {value:g}", where="budget", hint=f"it must be {allowed}")

    def given(self) -> dict[str, float]:
        """The one that is set, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.given().items())


_RANGES = {
    "density": (0.0, 1.0, "above 0 and at most 1 (kept / total: 0.3 keeps three weights in ten)"),
    "speedup": (1.0, 1e4, "at least 1 (2.0 means half the latency)"),
    "latency_ms": (0.0, math.inf, "above 0"),
    **dict.fromkeys(COUNTED, (0.0, math.inf, "above 0")),
    "quality_drop": (0.0, math.inf, "at least 0"),
    "perplexity_rise": (0.0, math.inf, "at least 0 (0.01 lets the perplexity rise by one per cent)"),
}
