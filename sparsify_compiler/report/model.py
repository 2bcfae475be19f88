"""The report as data. A value that was not measured is None and is shown as a dash: nothing here is ever invented."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import ArtefactError
from sparsify_compiler.planned import Planned
from sparsify_compiler.program import LeftOut
from sparsify_compiler.recovery import Recovery
from sparsify_compiler.storage import write_file

SCHEMA = 1


@dataclass
class Form:
    """A way to run the whole model, and its latency: median and quartiles in milliseconds."""

    name: str
    median: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass
class Quality:
    """One measure of quality on the dense and on the compiled model. `dense` stays None for a distance to dense, such as a cosine."""

    name: str
    dense: float | None = None
    compiled: float | None = None
    note: str = ""


@dataclass
class PassTime:
    """One step of the compilation: a pass as text or another step's name, its seconds, and how often it rewrote."""

    name: str
    seconds: float | None = None
    rewrites: int | None = None


@dataclass
class Refusal:
    """Why a pass did not act somewhere."""

    why: str
    at: str = ""
    by: str = ""


@dataclass
class Report:
    """Everything that compile() found out about one model.

    target and versions as plain data; date as ISO 8601 text, given by whoever measured. `dense` lists every dense form that was measured;
    the fastest one is the yardstick. Bytes in memory and on disk are of the whole model, indices included; on disk they are those of the
    artefact's weights, graph and kernels. In memory a packed weight counts once, as its kernel laid it out: what is stored of it lies in a file.
    """

    model: str = ""
    parameters: int | None = None
    target: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    threads: int | None = None
    date: str = ""
    recipe: str = ""
    budget: str = ""
    elsewhere: str = ""  # of a machine that did not compile the model: where its times come from, and what runs by reference here
    decoding: str = ""  # of a language model: whether its tokens are decoded by one library, and why
    calls: str = ""  # of a model that was captured whole: whether one library takes its calls, and why
    seed: int | None = None
    example: str = ""  # the inputs that latency was measured on, as text
    dense: list[Form] = field(default_factory=list)
    compiled: Form | None = None
    dense_bytes: int | None = None
    compiled_bytes: int | None = None
    dense_disk_bytes: int | None = None
    compiled_disk_bytes: int | None = None
    quality: list[Quality] = field(default_factory=list)
    sites: list[Decision] = field(default_factory=list)
    passes: list[PassTime] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    misses: list[Refusal] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    plan: Planned | None = None  # where the choices were solved for
    machine: dict[str, Any] | None = None  # what the machine reaches, for the roofline
    recovery: Recovery | None = None  # what sc.recover() told of the model before it was compiled: set it yourself

    @property
    def fastest_dense(self) -> Form | None:
        """The yardstick: the dense form with the lowest median."""
        measured = [form for form in self.dense if form.median is not None]
        return min(measured, key=lambda form: form.median or math.inf) if measured else None

    @property
    def speedup(self) -> float | None:
        """Latency of the fastest dense form / latency of the compiled model."""
        best = self.fastest_dense
        if best is None or best.median is None or self.compiled is None or not self.compiled.median:
            return None
        return best.median / self.compiled.median

    def paid(self) -> list[Decision]:
        """The sites that run a sparse kernel."""
        return [site for site in self.sites if site.format != "dense"]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as to_json writes it."""
        data = {each.name: _plain(getattr(self, each.name)) for each in fields(self)}
        return {"schema": SCHEMA, **data}

    def to_json(self, path: str | Path | None = None) -> str:
        """The JSON text; also written to `path`, whole or not at all. Raises StorageError."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        if path is not None:
            write_file(Path(path), text)
        return text

    @staticmethod
    def from_json(text: str) -> Report:
        """The report of to_json's text; fields that a newer version added are ignored. Raises ArtefactError for anything else."""
        try:
            data = json.loads(text)
            if data["schema"] > SCHEMA:
                raise ArtefactError(
                    f"report schema {data['schema']}, this sparsify_compiler reads {SCHEMA}", hint="install the version that wrote it"
                )
            return _report(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtefactError(
                f"not a report: {type(error).__name__} {error}", where="report.json", hint="give the file that to_json() wrote"
            ) from error

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained HTML page; also written to `path`, whole or not at all. Raises StorageError."""
        from .html import render

        text = render(self)
        if path is not None:
            write_file(Path(path), text)
        return text

    def to_csv(self, path: str | Path | None = None) -> str:
        """A row for each site; also written to `path`, whole or not at all. Raises StorageError."""
        from .table import to_csv

        text = to_csv(self)
        if path is not None:
            write_file(Path(path), text)
        return text

    def __str__(self) -> str:
        from .console import to_text

        return to_text(self)

    def __rich__(self) -> Any:
        from .console import renderable

        return renderable(self)

    def _repr_html_(self) -> str:
        from html import escape

        return f'<iframe srcdoc="{escape(self.to_html())}" style="width:100%;height:640px;border:0"></iframe>'


def _report(data: Mapping[str, Any]) -> Report:
    from pydantic import TypeAdapter

    return TypeAdapter(Report).validate_python(data)


def _plain(value: Any) -> Any:
    """JSON data of a field. A number that is not finite was never a measurement: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    return value
