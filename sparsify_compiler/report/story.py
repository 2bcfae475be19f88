"""The story of one site: what it was, what it could have been, what it became and why."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import UnknownNameError, unknown
from sparsify_compiler.site_cost import intensity

from . import words
from .model import Report
from .plan_plots import rows_of

if TYPE_CHECKING:
    from rich.table import Table


def explain(report: Report, name: str, width: int = 100) -> str:
    """The story of a site as text. `name` is its path, or the end of it where only one site ends so.

    Raises UnknownNameError, with the sites that come near, for a name that fits none or several.
    """
    site = _find(report, name)
    told = [_head(site), _dense(site), *_now(site), *_plan(report, site)]
    return "\n".join([*(line for line in told if line), *([_options(site, width)] if site.options else [])])


def _find(report: Report, name: str) -> Decision:
    exact = [site for site in report.sites if site.site == name]
    ending = [site for site in report.sites if site.site.endswith(f".{name}")]
    found = exact or ending
    if len(found) != 1:
        if ending:
            which = words.some([site.site for site in ending])
            raise UnknownNameError(f"several sites end in {name!r}", where="SITE", hint=f"name one of them{which}")
        raise unknown("site", name, [site.site for site in report.sites])
    return found[0]


def _head(site: Decision) -> str:
    weight = f" with a weight of {words.shape(site)} {site.dtype}, {words.size(site.dense_bytes)}" if site.shape else ""
    timed = words.timed(site)
    return f"{site.site}: {site.kind}{weight}" + (f", {site.source or 'timed'} with {timed}" if timed else "")


def _dense(site: Decision) -> str:
    parts = []
    if site.dense_ms is not None:
        parts.append(f"{words.ms(site.dense_ms)} as {site.dense_form or 'it was'}")
    density = intensity(site.flops_before, site.moved_before)
    if density is not None and site.flops_before is not None and site.moved_before is not None:
        parts.append(f"{words.count(round(site.flops_before))} operations on {words.size(round(site.moved_before))}, {density:.3g} for each byte")
        if site.dense_ms:
            bandwidth = site.moved_before / site.dense_ms / 1e6
            parts.append(f"{words.count(round(1e3 * site.flops_before / site.dense_ms))} a second, {bandwidth:.3g} GB/s")
    return f"  dense   {'; '.join(parts)}" if parts else ""


def _now(site: Decision) -> list[str]:
    kept = "" if site.structure == "dense" else f"{site.structure}, {words.percent(site.density)} kept; "
    time = "" if site.compiled_ms is None else f"; {words.ms(site.compiled_ms)}, {words.ratio(site.dense_ms, site.compiled_ms)} the dense speed"
    held = "" if site.bytes is None else f"; {words.size(site.bytes)}"
    lost = ""
    if site.format == "dense" and site.sparse_ms is not None:
        lost = f"  tried   the best sparse kernel took {words.ms(site.sparse_ms)}"
    return [f"  now     {kept}runs {words.runs(site)}{time}{held}", lost, f"  why     {site.reason}" if site.reason else ""]


def _plan(report: Report, site: Decision) -> list[str]:
    if site.predicted_ms is None:
        return []
    off = "" if not site.compiled_ms or site.source else f", measured {words.ms(site.compiled_ms)}"
    unit = f" {report.plan.loss_unit}" if report.plan is not None and report.plan.loss_unit else ""
    whole = report.plan.loss if report.plan is not None else None
    total = f", {words.percent(site.loss / whole)} of the plan's" if whole and site.loss is not None else ""
    return [f"  planned {words.ms(site.predicted_ms)}{off}; loss {words.brief(site.loss)}{unit}{total}"]


def _options(site: Decision, width: int) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None, highlight=False, emoji=False).print(_table(site))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _table(site: Decision) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0))
    table.add_column("it could have been", overflow="fold")
    for name in ("planned ms", "loss", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why not", overflow="fold")
    for option in rows_of(site):
        held = words.size(None if option.bytes is None else round(option.bytes))
        table.add_row(option.name, words.plain_ms(option.predicted), words.brief(option.loss), held, "taken" if option.taken else option.why_not)
    return table
