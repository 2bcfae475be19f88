"""The report in the terminal: a summary, a table that fits the width, and what did not work with its reasons."""

from __future__ import annotations

import io
import sys
from collections import defaultdict
from typing import TYPE_CHECKING

from . import words
from .model import Report

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

USUAL = 100  # columns where there is no terminal to ask
WIDE, MIDDLE = 124, 72  # columns of the terminal from which the reasons have a column of their own, and from which kernels do
SHOWN = 6  # how many kinds of refusals the terminal shows; HTML and JSON have them all


def to_text(report: Report, width: int | None = None, colour: bool | None = None) -> str:
    """The report as text: coloured and as wide as the terminal where there is one, plain and 100 columns otherwise."""
    from rich.console import Console

    tty = sys.stdout.isatty() if colour is None else colour
    out = io.StringIO()
    console = Console(file=out, force_terminal=tty, no_color=not tty, width=width or (None if tty else USUAL), highlight=False, emoji=False)
    console.print(renderable(report, console.width))
    return out.getvalue().rstrip("\n")


def renderable(report: Report, width: int = USUAL) -> Group:
    """What rich prints."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_summary(report)]
    if len(report.dense) > 1:
        forms = ", ".join(f"{form.name} {words.spread(form)}" for form in report.dense)
        parts.append(Text(f"dense forms measured: {forms}", style="dim"))
    parts += [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]
    if report.sites:
        parts.append(_sites(report, width))
        if width < WIDE:
            parts += _reasons(report)
        parts += [Text(line, style="dim") for line in words.timed_apart(report.sites)]
    if report.passes:
        steps = ", ".join(_step(row.name, row.seconds, row.rewrites) for row in report.passes)
        parts.append(Text(f"steps: {steps}", style="dim"))
    parts += [Text(f"left out {part.path}: {part.reason}", style="yellow") for part in report.left_out]
    parts += _misses(report)
    return Group(*parts)


def _summary(report: Report) -> RenderableType:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for what, value in words.summary(report):
        faster = what == "latency" and report.speedup is not None
        style = ("green" if (report.speedup or 0) >= 1.03 else "yellow" if (report.speedup or 0) < 0.97 else "") if faster else ""
        grid.add_row(what, Text(value, style=style))
    if not grid.row_count:
        grid.add_row("nothing was measured")
    return Panel(grid, title="sparsify report", title_align="left", border_style="cyan", expand=False)


def _sites(report: Report, width: int) -> Table:
    from rich.text import Text

    longest = max(len(words.split_path(site.site)[1]) for site in report.sites) + 2
    planned = report.plan is not None and width >= WIDE
    table = _columns(width, min(longest, width // 4), planned)
    block = None
    for site in report.sites:
        above, name = words.split_path(site.site)
        if above != block and above:
            table.add_row(Text(above, style="bold"))
        block, paid = above, words.pays(site)
        gain = Text(words.ratio(site.dense_ms, site.compiled_ms), style="green" if paid else "dim")
        cells = [
            Text(f"  {name}" if above else name, style="green" if paid else "dim"),
            Text(site.structure),
            Text(words.percent(site.density)),
            gain,
        ]
        if width >= MIDDLE:
            times = Text(words.plain_ms(site.dense_ms)), Text(words.plain_ms(site.compiled_ms))
            cells[3:3] = [Text(site.format), Text(site.kernel), *times]
        if planned:
            cells[-1:-1] = [Text(words.plain_ms(site.predicted_ms)), Text(words.brief(site.loss))]
        if width >= WIDE:
            cells.append(Text("" if paid else site.reason, style="yellow"))
        table.add_row(*cells)
    return table


def _columns(width: int, name: int, planned: bool) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("site", overflow="fold", min_width=name)
    table.add_column("structure", overflow="fold")
    table.add_column("kept", justify="right", no_wrap=True)
    if width >= MIDDLE:
        table.add_column("format", overflow="fold")
        table.add_column("kernel", overflow="fold")
        table.add_column("dense ms", justify="right", no_wrap=True)
        table.add_column("now ms", justify="right", no_wrap=True)
    if planned:
        table.add_column("planned", justify="right", no_wrap=True)
        table.add_column("loss", justify="right", no_wrap=True)
    table.add_column("gain", justify="right", no_wrap=True)
    if width >= WIDE:
        table.add_column("why dense", overflow="fold")
    return table


def _reasons(report: Report) -> list[RenderableType]:
    """Why sites stayed dense, where the table has no room for it: equal reasons together."""
    from rich.text import Text

    groups: dict[str, list[str]] = defaultdict(list)
    for site in report.sites:
        if site.reason and not words.pays(site):
            groups[site.reason].append(site.site)
    return [
        Text(f"{reason if reason.startswith('stay') else f'stays dense: {reason}'}{words.some(sites)}", style="yellow")
        for reason, sites in groups.items()
    ]


def _misses(report: Report) -> list[RenderableType]:
    from rich.text import Text

    lines = words.refusals(report.misses)
    more = [f"… and {len(lines) - SHOWN} more in the HTML and JSON report"] if len(lines) > SHOWN else []
    return [Text(line, style="dim") for line in [*(f"not done: {line}" for line in lines[:SHOWN]), *more]]


def _step(name: str, seconds: float | None, rewrites: int | None) -> str:
    took = words.DASH if seconds is None else f"{seconds:.2f} s"
    return f"{name} {took}" + (f" ({rewrites} rewrites)" if rewrites else "")
