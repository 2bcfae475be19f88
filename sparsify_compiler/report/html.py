"""The report as one HTML page that needs nothing else: styles, script and plots are inside."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import formulas, plan_plots, plots, recovery_plot, roofline, words
from .model import Report

MOST_CHOICES = 20  # rows of one site; a page of a thousand sites has to stay readable


@dataclass(frozen=True)
class Card:
    """One of the numbers at the top of the page."""

    what: str
    value: str
    note: str


def render(report: Report) -> str:
    """The whole page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    figures = {
        "Latency of the whole model": plots.latency(report),
        "Where the time went": plots.waterfall(report),
        "What the losses could buy": plan_plots.front(report),
        "How it was recovered": recovery_plot.recovery(report),
        "Roofline": roofline.roofline(report),
        "Time of each site": plots.times(report),
        "Density of each site": plots.densities(report),
        "What each choice costs in quality": plan_plots.sensitivity(report),
    }
    drawn = {title: Markup(svg) for title, svg in figures.items() if svg is not None}
    typeset = [(row.op, row.about, Markup(row.flops), Markup(row.bytes)) for row in formulas.formulas(report)]
    meanings = [(Markup(symbol), meaning) for symbol, meaning in formulas.symbols(report)]
    return environment.get_template("report.html.j2").render(report=report, words=words, dot=Markup(".<wbr>"), cards=cards(report), figures=drawn,
                                                             options=plan_plots.rows_of, most=MOST_CHOICES, formulas=typeset, symbols=meanings)


def cards(report: Report) -> list[Card]:
    """The numbers that people look for first. Only what was measured."""
    found = []
    best, compiled = report.fastest_dense, report.compiled
    if report.speedup is not None and best is not None and compiled is not None:
        found.append(Card("speed-up", f"{report.speedup:.2f}×", f"{words.ms(best.median)} → {words.ms(compiled.median)}, against {best.name}"))
    if report.dense_bytes and report.compiled_bytes:
        found.append(
            Card(
                "memory",
                words.ratio(report.dense_bytes, report.compiled_bytes),
                f"{words.size(report.dense_bytes)} → {words.size(report.compiled_bytes)}",
            )
        )
    found += [
        Card(row.name, words.number(row.compiled), f"dense {words.number(row.dense)}" if row.dense is not None else row.note)
        for row in report.quality
    ]
    if report.sites:
        paid = len(report.paid())
        found.append(Card("sites", f"{paid} of {len(report.sites)}", f"run sparse, {len(report.sites) - paid} dense"))
    return found
