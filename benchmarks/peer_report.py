"""What benchmarks/peers.py shows: one table a case, and one over all cases."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show(case: str, forms: list[Any], console: Console) -> None:
    """Every form of a case beside torch's float32 and beside ours."""
    ours = {dtype: best(form for form in forms if form.name == f"ours {dtype}") for dtype in ("fp32", "bf16")}
    eager = best(form for form in forms if form.name == "torch fp32 eager")
    table = Table("form", "ms", "quartiles", "error", "torch fp32 / this", "this / ours fp32", "this / ours bf16", title=case)
    for form in sorted(forms, key=lambda form: (form.dtype, statistics.median(form.ms))):
        low, high = quartiles(form.ms)
        table.add_row(form.name, f"{statistics.median(form.ms):.3f}", f"{low:.3f}–{high:.3f}", f"{form.error:.0e}", ratio(eager, form),
                      *(ratio(form, rival) for rival in ours.values()))
    console.print(table)


def summary(results: Mapping[str, list[Any]], title: str, console: Console) -> None:
    """Ours against the fastest peer of each dtype, a row a case."""
    table = Table("case", "best fp32 peer", "ours fp32 is", "best bf16 peer", "ours bf16 is", "best int8 peer", "our best is", title=title)
    for case, forms in results.items():
        cells = []
        mine = {dtype: best(form for form in forms if form.name == f"ours {dtype}") for dtype in ("fp32", "bf16")}
        mine["int8"] = best(form for form in mine.values() if form)
        for dtype, own in mine.items():
            peer = best(form for form in forms if form.dtype == dtype and not form.engine.startswith("ours"))
            cells += [f"{peer.name} {statistics.median(peer.ms):.3f} ms" if peer else "–", f"{ratio(peer, own)} ×" if peer and own else "–"]
        table.add_row(case, *cells)
    console.print(table)


def best(forms: Iterable[Any]) -> Any:
    """The form with the lowest median; None where there is none."""
    return min(forms, key=lambda form: statistics.median(form.ms), default=None)


def ratio(slow: Any, fast: Any) -> str:
    """The median over the rounds of slow / fast, with quartiles."""
    if slow is None or fast is None:
        return "–"
    ratios = [a / b for a, b in zip(slow.ms, fast.ms, strict=True)]
    low, high = quartiles(ratios)
    return f"{statistics.median(ratios):.2f} ({low:.2f}–{high:.2f})"


def quartiles(values: list[float]) -> tuple[float, float]:
    """The lower and the upper quartile."""
    ordered = sorted(values)
    return ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
