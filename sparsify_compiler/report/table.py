"""The sites of a report as CSV, for a spreadsheet: a row a site, times in milliseconds, nothing where nothing was measured."""

from __future__ import annotations

import csv
import io
from dataclasses import fields

from sparsify_compiler.decision import Decision

from .model import Report

COLUMNS = tuple(each.name for each in fields(Decision) if each.name != "options")


def to_csv(report: Report) -> str:
    """Every field of every site but the choices that it had."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for site in report.sites:
        writer.writerow(_cell(getattr(site, name)) for name in COLUMNS)
    return out.getvalue()


def _cell(value: object) -> object:
    return "x".join(map(str, value)) if isinstance(value, tuple) else value
