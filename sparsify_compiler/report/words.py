"""Numbers as a reader wants them. None is a dash everywhere: what was not measured has no number."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from sparsify_compiler.decision import Decision

from .model import Form, Quality, Refusal, Report

DASH = "–"


def ms(value: float | None) -> str:
    """Milliseconds with three significant digits and a unit that suits them."""
    if value is None:
        return DASH
    if value >= 1000:
        return f"{value / 1000:.3g} s"
    return f"{value:.3g} ms" if value >= 0.1 else f"{value * 1000:.3g} µs"


def plain_ms(value: float | None) -> str:
    """Milliseconds without the unit, for a column that names it."""
    if value is None:
        return DASH
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.3f}"


def size(value: int | None) -> str:
    """Bytes in decimal units."""
    if value is None:
        return DASH
    amount = float(value)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}" if unit != "B" else f"{value} B"
        amount /= 1000
    return f"{amount:.3g} GB"


def count(value: int | None) -> str:
    """A number of parameters."""
    if value is None:
        return DASH
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return str(value)


def ratio(before: float | None, after: float | None) -> str:
    """How many times less it became."""
    return DASH if before is None or not after else f"{before / after:.2f}×"


def percent(value: float | None) -> str:
    """A share in percent, one decimal below a tenth."""
    return DASH if value is None else f"{100 * value:.0f} %" if value >= 0.1 or value == 0 else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    """A plain number with five significant digits."""
    return DASH if value is None else f"{value:.5g}"


def brief(value: float | None) -> str:
    """A number of a table, three significant digits."""
    return DASH if value is None else f"{value:.3g}"


def spread(form: Form) -> str:
    """Median and quartiles."""
    quartiles = "" if form.low is None or form.high is None else f" ({plain_ms(form.low)}–{plain_ms(form.high)})"
    return ms(form.median) + quartiles


def quality(row: Quality) -> str:
    """dense → compiled; a distance to dense has one number only."""
    return number(row.compiled) if row.dense is None else f"{number(row.dense)} → {number(row.compiled)}"


def runs(site: Decision) -> str:
    """What runs there: format and kernel."""
    return site.kernel if site.format == "dense" else f"{site.format}, {site.kernel}"


def merged(sites: Sequence[Decision]) -> str:
    """What exact rewrites made of several ops each: "46 ops into 12: FLOPs 1.6 G → 1.3 G, bytes moved 75 MB → 30 MB"; nothing where none did."""
    rows = [site for site in sites if site.merged]
    if not rows:
        return ""
    flops, before = (sum(getattr(row, name) or 0.0 for row in rows) for name in ("flops", "flops_before"))
    moved, moved_before = (sum(getattr(row, name) or 0.0 for row in rows) for name in ("moved", "moved_before"))
    ops = f"{sum(row.merged or 0 for row in rows)} ops into {len(rows)}"
    return f"{ops}: FLOPs {count(round(before))} → {count(round(flops))}, bytes moved {size(round(moved_before))} → {size(round(moved))}"


def pays(site: Decision) -> bool:
    """True where a sparse kernel runs."""
    return site.format != "dense"


def on_the_example(site: Decision) -> bool:
    """Are its times of the example's sizes? Attention is timed with one text, of a length of its own."""
    return site.kind != "attention"


def timed(site: Decision) -> str:
    """What it was timed with; nothing where it was not."""
    if site.rows is None:
        return ""
    return f"{site.rows} row{'' if site.rows == 1 else 's'}" if on_the_example(site) else f"one text of {site.rows} tokens"


def timed_apart(sites: Sequence[Decision]) -> list[str]:
    """Of the sites whose times are not of the example's sizes: what they, and the share that is kept, were measured with."""
    groups: dict[str, list[str]] = {}
    for site in sites:
        if site.rows is not None and not on_the_example(site):
            groups.setdefault(timed(site), []).append(site.site)
    return [f"timed with {what}, not with the example's inputs{some(names)}" for what, names in groups.items()]


def shape(site: Decision) -> str:
    """The shape of a site's weight."""
    return "×".join(map(str, site.shape)) if site.shape else DASH


def split_path(path: str) -> tuple[str, str]:
    """A module path as (block, name in the block): a table needs the block only once. The block ends at the last number in the path."""
    parts = path.split(".")
    last = max((i for i, part in enumerate(parts[:-1]) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1]), ".".join(parts[last + 1 :])


def refusals(misses: Sequence[Refusal]) -> list[str]:
    """Equal refusals together, most frequent first."""
    places: dict[tuple[str, str], list[str]] = {}
    for miss in misses:
        places.setdefault((miss.by, miss.why), []).append(miss.at)
    ordered = sorted(places.items(), key=lambda item: -len(item[1]))
    return [f"{by + ': ' if by else ''}{why}{some(at)}" for (by, why), at in ordered]


def some(places: Sequence[str], shown: int = 3) -> str:
    """(a, b, c and 4 more), or nothing."""
    named = [place for place in places if place]
    more = f" and {len(named) - shown} more" if len(named) > shown else ""
    return f" ({', '.join(named[:shown])}{more})" if named else ""


def target(report: Report) -> str:
    """The machine in one line."""
    facts = report.target
    if not facts:
        return DASH
    cores = facts.get("cores")
    parts = [str(facts.get("name", "")), f"{facts.get('arch', '')} {facts.get('mcpu', '')}".strip(), f"{cores} cores" if cores else ""]
    return ", ".join(part for part in parts if part)


def summary(report: Report) -> list[tuple[str, str]]:
    """The head of the report: (what, value), only what is known."""
    best, compiled = report.fastest_dense, report.compiled
    paid = len(report.paid())
    weights = f"{count(report.parameters)} parameters" if report.parameters is not None else ""
    rows = [
        ("model", ", ".join(part for part in (report.model, weights) if part)),
        ("target", "" if not report.target else target(report) + (f", {report.threads} threads used" if report.threads else "")),
        ("elsewhere", report.elsewhere), ("recipe", report.recipe), ("budget", report.budget), ("inputs", report.example),
        ("latency", "" if best is None and compiled is None else _latency(report)),
        ("decoding", report.decoding), ("calls", report.calls),
        ("memory", _bytes(report.dense_bytes, report.compiled_bytes)), ("on disk", _bytes(report.dense_disk_bytes, report.compiled_disk_bytes)),
        *((row.name, quality(row) + (f" ({row.note})" if row.note else "")) for row in report.quality),
        ("sites", f"{paid} of {len(report.sites)} run sparse, {len(report.sites) - paid} stay dense" if report.sites else ""),
        ("merged", merged(report.sites)), ("recovered", recovered(report)), *plan(report),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items() if version)), ("date", report.date),
    ]  # fmt: skip
    return [(what, value) for what, value in rows if value]


def recovered(report: Report) -> str:
    """What a recovery brought: its length, the loss at its ends, and the user's metric, as it began and of what was handed back."""
    found = report.recovery
    if found is None:
        return ""
    loss = f", loss {number(found.points[0].loss)} to {number(found.points[-1].loss)}" if found.points else ""
    metric = f", quality {number(found.before)} to {number(found.best)}" if found.before is not None and found.best is not None else ""
    short = f"; {found.early} steps of its schedule were still to come" if found.early else ""
    return f"in {found.steps} steps and {ms(1000 * found.seconds)}{loss}{metric}; {found.stopped}{short}"


def plan(report: Report) -> list[tuple[str, str]]:
    """How good the plan is: predicted against measured, the solver's certificate, and the plan itself."""
    found = report.plan
    if found is None:
        return []
    rest = f" with {_in_unit(found.rest, found.unit)} of all else" if found.rest > 0 else ""
    limit = "" if found.limit is None else f", limit {_in_unit(found.limit, found.unit)}{rest}"
    rows = [("planned", f"{_in_unit(found.cost, found.unit)} for all sites, loss {number(found.loss)} {found.loss_unit}".rstrip() + limit)]
    if found.gap is not None:
        took = "" if found.seconds is None else f"; solved in {ms(1000 * found.seconds)}"
        again = "" if not found.rounds or found.rounds == 1 else f", {found.rounds} times, with what was measured in between"
        least = f"no plan of these choices loses less than {number(found.bound)}"
        rows.append(("certificate", f"{least}: {percent(found.gap)} at most are left{took}{again}"))
    if found.lost is not None:
        rows.append(("loses", f"{number(found.lost)} as measured, with what chance may add; asked for was {report.budget}"))
    if found.belief < 1:
        rows.append(("estimates", f"{percent(found.belief)} of the differences between sites count: plans that believed more lost more"))
    off = misjudged(report.sites)
    if off is not None:
        rows.append(("predicted", f"site times within {percent(off)} of the measured ones (median)"))
    return rows


def misjudged(sites: Sequence[Decision]) -> float | None:
    """The median of |predicted - measured| / measured over the sites; None where nothing was predicted."""
    off = [abs(site.predicted_ms - site.compiled_ms) / site.compiled_ms for site in sites if site.predicted_ms is not None and site.compiled_ms
           and not site.source]
    return statistics.median(off) if off else None


def _in_unit(value: float | None, unit: str) -> str:
    if value is None:
        return DASH
    return ms(value) if unit == "ms" else size(round(value)) if unit == "bytes" else f"{number(value)} {unit}"


def _latency(report: Report) -> str:
    best, compiled = report.fastest_dense, report.compiled
    before = f"{ms(best.median)} ({best.name}, the fastest dense form)" if best else DASH
    after = spread(compiled) if compiled else DASH
    gain = "" if report.speedup is None else f", {report.speedup:.2f} times the speed"
    return f"{before} → {after}{gain}"


def _bytes(before: int | None, after: int | None) -> str:
    if before is None and after is None:
        return ""
    return f"{size(before)} → {size(after)}" + ("" if before is None or not after else f", {before / after:.2f}×")
