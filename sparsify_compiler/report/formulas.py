"""The formulas that a report's costs come from, typeset as MathML: browsers draw it without fonts or scripts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sparsify_compiler import catalog
from sparsify_compiler.decision import Decision

from .model import Report

# format of a site -> op that it runs
SELECTING = {"by input": "select_linear", "by neuron": "select_ffn", "by prediction": "predicted_ffn", "by block": "attend_blocks"}


@dataclass(frozen=True)
class Formula:
    """FLOPS and BYTES of one op, as MathML, with the symbols that they are written in and their meaning."""

    op: str
    about: str
    flops: str
    bytes: str


def formulas(report: Report) -> list[Formula]:
    """Of every op that a site of the report runs or ran."""
    return [_formula(op, module) for op, module in _costs(report)]


def symbols(report: Report) -> list[tuple[str, str]]:
    """(symbol as MathML, what it means) of all that stand in those formulas."""
    table = catalog.get("cost model", "symbols").TABLE
    found = {symbol.name: symbol for _, module in _costs(report) for formula in (module.FLOPS, module.BYTES) for symbol in formula.free_symbols}
    return [(_mathml(found[name]), table[name]) for name in table if name in found]


def _costs(report: Report) -> list[tuple[str, Any]]:
    """The ops that formulas are known of, with the modules that hold them."""
    return [(op, catalog.get("cost", op)) for op in _ops(report.sites) if op in catalog.names("cost")]


def _ops(sites: Iterable[Decision]) -> list[str]:
    found: dict[str, None] = {}
    for site in sites:
        if site.rows is None or not site.shape:
            continue
        kind = "linear" if len(site.shape) == 2 else "conv2d"
        found[kind] = None
        if site.format != "dense":
            found[SELECTING.get(site.format, f"{kind}_{site.format}")] = None
    return list(found)


def _formula(op: str, module: Any) -> Formula:
    about = (module.__doc__ or op).strip().splitlines()[0]
    return Formula(op, about.partition(": ")[2] or about, _mathml(module.FLOPS), _mathml(module.BYTES))


def _mathml(expression: Any) -> str:
    from sympy.printing.mathml import mathml

    return f"<math>{mathml(expression, printer='presentation')}</math>"
