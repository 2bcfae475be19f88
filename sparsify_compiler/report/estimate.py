"""An estimate in the terminal: the layers that are alike on one line, the whole below."""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import StringIO
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from sparsify_compiler.cost import quantity
from sparsify_compiler.report import words

if TYPE_CHECKING:
    from sparsify_compiler.estimates import Best, Estimate, SiteEstimate

WIDTH = 150
COLOURS = {"memory": "cyan", "compute": "magenta", "overhead": "yellow"}


def table(found: Estimate) -> Group:
    """What __rich__ gives."""
    densities = [best.density for best in next((site.best for site in found.sites if site.best), ())]
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"predicted on {found.title}", title_justify="left")
    made.add_column("layer", overflow="fold")
    for name in ("weight", "rows", "FLOPs", "bytes", "FLOP/byte", "ms each", "bound by", *(f"{1 - density:.0%} sparse" for density in densities)):
        made.add_column(name, justify="left" if name == "bound by" else "right", no_wrap=True)
    for site, count, names in _alike(found):
        made.add_row(_name(names), "×".join(map(str, site.shape)), str(site.rows), quantity(site.flops * count),
                     words.size(round(site.bytes * count)), f"{site.intensity:.1f}", ("~" if site.rough else "") + words.plain_ms(site.ms),
                     Text(site.bound, COLOURS.get(site.bound, "")),
                     *(_best(site, best) for best in site.best))
    other = found.others
    made.add_row(other.site, "", "", quantity(other.flops), words.size(round(other.bytes)), f"{other.intensity:.1f}", f"~{words.plain_ms(other.ms)}",
                 Text(other.bound, COLOURS.get(other.bound, "")))
    made.add_section()
    everything = (*found.sites, other)
    made.add_row("the model", "", "", quantity(sum(site.flops for site in everything)), words.size(round(sum(site.bytes for site in everything))), "",
                 words.plain_ms(found.ms), "", *(words.ratio(found.ms, found.ms_at(density)) for density in densities), style="bold")
    return Group(made, Text("\n".join(_notes(found)), "dim"))


def text(found: Estimate) -> str:
    """The same without colours, as wide as a page."""
    console = Console(width=WIDTH, no_color=True, highlight=False, emoji=False, file=StringIO())
    console.print(table(found))
    written: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in written.splitlines())


def _alike(found: Estimate) -> Iterator[tuple[SiteEstimate, int, list[str]]]:
    """Layers of the same sizes take the same: one of them, how many there are, their names."""
    groups: dict[tuple[object, ...], list[SiteEstimate]] = {}
    for site in found.sites:
        groups.setdefault((site.kind, site.shape, site.rows, site.dtype, site.flops), []).append(site)
    for sites in groups.values():
        yield sites[0], len(sites), [site.site for site in sites]


def _name(names: list[str]) -> str:
    """encoder.layer.*.output.dense ×6"""
    return names[0] if len(names) == 1 else re.sub(r"(?<=\.)\d+(?=\.)", "*", names[0]) + f" ×{len(names)}"


def _best(site: SiteEstimate, best: Best) -> Text:
    """How many times faster, and by which structure."""
    if best.structure == "dense":
        return Text(words.DASH, "dim")
    return Text(f"{words.ratio(site.ms, best.ms)} {best.structure}")


def _notes(found: Estimate) -> Iterator[str]:
    yield ("Speed-ups are over the fastest dense form, of the fastest structure that has a kernel there, whatever that does to quality: "
           f"what is possible at best. {words.DASH}: dense stays the fastest.")
    if any(best.structure == "ideal" for site in found.sites for best in site.best):
        yield "ideal: there are no sparse kernels of ours for this machine; the dense form without what would be skipped."
    yield "~: by a roofline, for no formula knows the op."
    if found.machine != "native":
        yield "From data sheets; kernels cost what they cost where they were measured (x86), in this machine's own times."
    if found.assumed:
        yield f"Estimated, for no data sheet says it: {', '.join(found.assumed)}."
