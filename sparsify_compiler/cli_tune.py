"""`sparsify tune`: kernels raced on a machine, what was found kept, and carried to others."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import InputError

if TYPE_CHECKING:
    from rich.table import Table


def tune(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="As of `sparsify compile`.", show_default=False)] = None,
    recipe: Annotated[str, typer.Option(help="A name of `sparsify recipes`, pipeline text, or a YAML file.")] = "wanda",
    density: Annotated[float | None, typer.Option(help="Budget: kept / total weights.", show_default=False)] = None,
    target: Annotated[str, typer.Option(help="A name of `sparsify targets`.")] = "cpu",
    rpc: Annotated[str | None, typer.Option(help="A board to time kernels on: HOST:PORT of TVM's RPC server, or HOST:PORT/KEY.",
                                            show_default=False)] = None,
    again: Annotated[bool, typer.Option("--again", help="Also layers of which something is known.")] = False,
    export: Annotated[Path | None, typer.Option(help="Write all that is known as JSON.", show_default=False)] = None,
    take: Annotated[Path | None, typer.Option("--import", help="Take over what another machine of the kind exported.", show_default=False)] = None,
    threads: Annotated[int | None, typer.Option(help="torch's intra-op threads.", min=1, show_default=False)] = None,
    batch: Annotated[int, typer.Option(help="Sentences in the example inputs of an hf: model.", min=1)] = 1,
    sequence: Annotated[int, typer.Option("--sequence", help="Tokens in the example inputs of an hf: model.", min=2)] = 128,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress display.")] = False,
) -> None:
    """Race the kernels of a model's layers, and keep what was found, so that compiles are quicker and kernels cut best.

    A killed run goes on where it stopped. Nothing else should run on the machine.

    \b
    Examples:
      sparsify tune my_model.py:make --recipe wanda --density 0.3
      sparsify tune my_model.py:make --target cortex-a76 --rpc 192.168.0.7:9090
      sparsify tune --export tuned.json
      sparsify tune --import tuned.json
    """
    from .cli_options import check_outputs
    from .tuning import export_tuned, import_tuned

    if model is None and export is None and take is None:
        raise InputError("there is nothing to do", where="MODEL", hint="name a model, --export FILE or --import FILE")
    check_outputs(None, (export,))
    if take is not None:
        typer.echo(f"{import_tuned(take)} results taken over")
    if model is not None:
        _race(model, {"recipe": recipe, "density": density, "target": target, "again": again, "rpc": rpc,
                      "progress": not quiet}, threads, batch, sequence)
    if export is not None:
        typer.echo(f"{export_tuned(export)} results written to {export}")


def _race(model: str, options: dict[str, Any], threads: int | None, batch: int, sequence: int) -> None:
    import sys

    from rich.console import Console

    from .cli_model import load_model
    from .cli_options import set_threads
    from .codegen import cache
    from .tuning import tune as run

    set_threads(threads)
    source = load_model(model, batch=batch, sequence=sequence)
    calibration = [source.example_inputs] if source.calibration is None else source.calibration
    begin = time.perf_counter()
    found = run(source.model, source.example_inputs, calibration=calibration, **options)
    if found:
        Console(width=None if sys.stdout.isatty() else 120, highlight=False, emoji=False).print(_table(found))
    typer.echo(f"{len(found)} kinds of layers tuned in {time.perf_counter() - begin:.0f} s, kept in {cache.folder()}")


def _table(records: Any) -> Table:
    """Of each kind of layer its best dense form and its best kernel."""
    from rich import box
    from rich.table import Table

    from .report import words

    table = Table("op", "outputs × inputs", "rows", "then", "dense form", "ms", "kernel", "ms", "gain", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for record in records:
        outputs, inputs, rows = record.key.shown
        best = [min(((time, name) for name, time in record.times.items() if (name in record.dense) == dense), default=(None, "–"))
                for dense in (True, False)]
        (dense_ms, dense), (sparse_ms, sparse) = best
        table.add_row(record.key.op, f"~{outputs} × {inputs}", f"~{rows}", record.key.chain.removeprefix(" + "), dense, words.plain_ms(dense_ms),
                      sparse, words.plain_ms(sparse_ms), words.ratio(dense_ms, sparse_ms))
    return table
