"""The command line: `sparsify <verb>`. Every command imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from . import cli_export, cli_tune
from .errors import SparsifyError

MODEL_HELP = "package.module:callable or file.py:callable returning (model, example_inputs[, calibration]), or hf:PATH of a Hugging Face folder."
app = typer.Typer(name="sparsify", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich", add_completion=False)

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
MaybeModel = Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `sparsify compile --out` or save() wrote.", show_default=False)]
Batch = Annotated[int, typer.Option(help="Sentences in the example inputs of an hf: model.", min=1)]
Sequence_ = Annotated[int, typer.Option("--sequence", help="Tokens in the example inputs of an hf: model.", min=2)]
Dynamic = Annotated[
    list[str] | None, typer.Option(help="A dimension that may change between calls: input_ids.0=batch. May be repeated.", show_default=False)
]


@app.callback()
def root(traceback: Annotated[bool, typer.Option("--traceback", help="Show the whole traceback of an error.")] = False) -> None:
    """A compiler for sparsity in PyTorch: it makes a trained model faster or smaller, and never slower than it was.

    \b
    Start here:
      sparsify recipes                             what it can do to a model
      sparsify compile my.py:make --density 0.3    do it, and see what it gained
      sparsify show fold_batchnorm                 what a pass does, by example
    """


@app.command("compile")
def compile_(
    model: Model,
    recipe: Annotated[str, typer.Option(help="A name of `sparsify recipes`, pipeline text, or a YAML file.")] = "wanda",
    target: Annotated[str, typer.Option(help="A name of `sparsify targets`.")] = "cpu",
    density: Annotated[float | None, typer.Option(help="Budget: kept / total weights, 0.3 keeps three in ten.", show_default=False)] = None,
    speedup: Annotated[float | None, typer.Option(help="Budget: times the speed of the fastest dense form.", show_default=False)] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Budget: milliseconds on the example inputs.", show_default=False)] = None,
    size: Annotated[int | None, typer.Option("--bytes", help="Budget: bytes of all weights in memory.", show_default=False)] = None,
    flops: Annotated[float | None, typer.Option(help="Budget: operations of a call on the example inputs.", show_default=False)] = None,
    joules: Annotated[float | None, typer.Option(help="Budget: a proxy of the energy of such a call.", show_default=False)] = None,
    quality_drop: Annotated[float | None, typer.Option(help="Budget: largest loss of quality (1 - cosine to dense).", show_default=False)] = None,
    perplexity_rise: Annotated[float | None, typer.Option(help="Budget: rise of the perplexity, 0.01 is 1 %.", show_default=False)] = None,
    dynamic: Dynamic = None,
    against: Annotated[list[str] | None, typer.Option(help="Dense forms to measure against: eager, compile.", show_default="eager")] = None,
    out: Annotated[Path | None, typer.Option(help="Save the compiled model in this folder.", show_default=False)] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML file.", show_default=False)] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.", show_default=False)] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write the sites of the report as CSV.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Fixes whatever is random.")] = 0,
    threads: Annotated[int | None, typer.Option(help="torch's intra-op threads.", min=1, show_default=False)] = None,
    batch: Batch = 1,
    sequence: Sequence_ = 128,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress display.")] = False,
) -> None:
    """Compile a model within a budget, print the report, and save the result.

    \b
    Examples:
      sparsify compile my_model.py:make --recipe wanda --density 0.5 --out compiled/
      sparsify compile hf:./all-MiniLM-L6-v2 --speedup 1.5 --batch 8 --html r.html
      sparsify compile pkg.models:make --recipe "mask_weights(structure='2:4')"
    where my_model.py holds
      def make():
          return model.eval(), {"x": example}, calibration_batches
    """
    from .cli_model import load_model
    from .cli_options import check_outputs, make_budget, parse_dynamic, set_threads
    from .compile import as_pipeline
    from .compile import compile as run

    budget = make_budget(density=density, speedup=speedup, latency_ms=latency_ms, bytes=size, flops=flops, joules=joules,
                         quality_drop=quality_drop, perplexity_rise=perplexity_rise)
    pipeline, dimensions = as_pipeline(recipe), parse_dynamic(dynamic or [])
    check_outputs(out, (html, json, csv))
    set_threads(threads)
    source = load_model(model, batch=batch, sequence=sequence)
    if source.calibration is None and not quiet:
        typer.echo(f"note: {model} gives no calibration batches; the example inputs stand in for them", err=True)
    calibration = [source.example_inputs] if source.calibration is None else source.calibration
    compiled = run(source.model, source.example_inputs, recipe=pipeline, target=target, budget=budget, calibration=calibration,
                   dynamic=dimensions, against=tuple(against or ("eager",)), seed=seed, progress=not quiet)  # fmt: skip
    if out is not None:
        compiled.save(out)
    _write_report(compiled.report(), html, json, csv)


@app.command()
def report(folder: Folder, html: Annotated[Path | None, typer.Option(help="Write it as one HTML file.", show_default=False)] = None,
           json: Annotated[Path | None, typer.Option("--json", help="Write it as JSON.", show_default=False)] = None,
           csv: Annotated[Path | None, typer.Option("--csv", help="Write its sites as CSV.", show_default=False)] = None) -> None:  # fmt: skip
    """Print the report of a saved model: what was chosen for each layer and why, times, bytes and quality.

    \b
    Example:
      sparsify report compiled/ --html report.html
    """
    from .artefact import read_report
    from .cli_options import check_outputs

    check_outputs(None, (html, json, csv))
    _write_report(read_report(folder), html, json, csv)


@app.command()
def explain(site: Annotated[str, typer.Argument(metavar="SITE", help="A module path of the report, or the end of one.", show_default=False)],
            folder: Folder) -> None:  # fmt: skip
    """Tell the story of one layer of a saved model: what it cost, what it could have been, what it became and why.

    \b
    Example:
      sparsify explain layer.0.output.dense compiled/
    """
    from shutil import get_terminal_size

    from .artefact import read_report
    from .report.story import explain as run

    _print(run(read_report(folder), site, get_terminal_size((100, 0)).columns))


@app.command()
def show(what: Annotated[str, typer.Argument(metavar="PASS_OR_PIPELINE", help="A name of `sparsify passes`, or pipeline text.", show_default=False)],
         model: MaybeModel = None, batch: Batch = 1, sequence: Sequence_ = 128) -> None:  # fmt: skip
    """Show what a pass or a pipeline does: its description, and a graph before and after, its own smallest example or your model.

    \b
    Examples:
      sparsify show fold_batchnorm
      sparsify show "fold_batchnorm() | mask_weights(structure='2:4')" my.py:make
    """
    from .cli_show import show as run

    _print(run(what, model, batch, sequence))


@app.command()
def why(what: Annotated[str, typer.Argument(metavar="PASS", help="A name of `sparsify passes`, with options if you like.", show_default=False)],
        model: Model, batch: Batch = 1, sequence: Sequence_ = 128) -> None:  # fmt: skip
    """Say why a pass did not act on a model: the nearest miss at each place.

    \b
    Example:
      sparsify why merge_conv_branches my_model.py:make
    """
    from .cli_show import why as run

    _print(run(what, model, batch, sequence))


@app.command()
def passes() -> None:
    """List the passes: what each one rewrites.

    \b
    Example:
      sparsify passes
      sparsify show fold_batchnorm
    """
    from .cli_show import table

    _print(table("pass"))


@app.command()
def recipes(method: Annotated[list[str] | None, typer.Argument(help="Name, title or number of a paper.", show_default=False)] = None) -> None:
    """List the recipes: published methods, ready to use. With METHOD, whatever is made for it: a recipe, a pass, a function.

    \b
    Example:
      sparsify recipes
      sparsify recipes sparse mezo
    """
    from .cli_show import found, table

    _print(found(" ".join(method)) if method else table("recipe"))


@app.command()
def targets(measure: Annotated[bool, typer.Option("--measure", help="Measure this machine anew, while nothing else runs: 30 s.")] = False,
            fit: Annotated[float | None, typer.Option("--fit", help="Fit kernels' costs to this machine: so many minutes of timing, while nothing "
                                                                    "else runs.", show_default=False)] = None) -> None:  # fmt: skip
    """List the machines to compile for and to estimate for, and say what this one is and does in a second.

    \b
    Examples:
      sparsify targets
      sparsify targets --measure
      sparsify targets --fit 5
      sparsify compile my_model.py:make --target x86-avx2
    """
    from .cli_show import targets as run

    _print(run(measure, fit))


@app.command()
def estimate(model: Model, target: Annotated[str, typer.Option(help="A machine of `sparsify targets`.")] = "cpu",
             json: Annotated[Path | None, typer.Option("--json", help="Also write it as JSON.", show_default=False)] = None,
             threads: Annotated[int | None, typer.Option(help="torch's intra-op threads, for this machine.", min=1, show_default=False)] = None,
             batch: Batch = 1, sequence: Sequence_ = 128) -> None:  # fmt: skip
    """Predict what a model costs on a machine, layer by layer, and what sparsity could give there at best. Nothing is pruned, built or timed.

    \b
    Examples:
      sparsify estimate my_model.py:make --target cortex-a76
      sparsify estimate hf:./all-MiniLM-L6-v2 --batch 8 --json estimate.json
    """
    from .cli_model import load_model
    from .cli_options import check_outputs, set_threads
    from .estimates import estimate as run
    from .machines import machine

    check_outputs(None, (json,))
    set_threads(threads)
    wanted = machine(target)
    source = load_model(model, batch=batch, sequence=sequence)
    found = run(source.model, source.example_inputs, wanted)
    if json is not None:
        found.write(json)
    _print(found if sys.stdout.isatty() else str(found))


@app.command()
def bench(folder: Folder, model: MaybeModel = None,
          size: Annotated[list[str] | None, typer.Option(help="Size of a dynamic dimension: batch=8. May be repeated.", show_default=False)] = None,
          rounds: Annotated[int, typer.Option(help="How often each form is timed.", min=3)] = 30,
          threads: Annotated[int | None, typer.Option(help="torch's intra-op threads.", min=1, show_default=False)] = None) -> None:  # fmt: skip
    """Time a saved model against its dense forms, interleaved. With MODEL also against the original one, on its own inputs.

    \b
    Examples:
      sparsify bench compiled/ --size batch=8 --size seq=128
      sparsify bench compiled/ my_model.py:make --threads 2
    """
    from .cli_bench import bench as run
    from .cli_options import parse_sizes, set_threads
    from .cli_show import timings

    sizes = parse_sizes(size or [])
    set_threads(threads)
    _print(timings(run(folder, model, sizes, rounds)))


app.command("tune")(cli_tune.tune)
app.command("export")(cli_export.export)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status. An error is a short message and status 2; `--traceback` shows where it came from."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = "--traceback" in given
    try:
        app([word for word in given if word != "--traceback"], prog_name="sparsify")
    except SparsifyError as error:
        if show_traceback:
            raise
        typer.secho(f"error: {error}", fg="red", err=True)
        return 2
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


def _write_report(found: Any, html: Path | None, json: Path | None, csv: Path | None) -> None:
    if html is not None:
        found.to_html(html)
    if json is not None:
        found.to_json(json)
    if csv is not None:
        found.to_csv(csv)
    _print(found)


def _print(what: Any) -> None:
    """On a terminal in colour and as wide as that is; into a pipe plain."""
    from rich.console import Console

    if isinstance(what, str):
        typer.echo(what)
    elif not sys.stdout.isatty() and hasattr(what, "to_json"):
        typer.echo(str(what))  # a report, as wide as a page
    else:
        Console(highlight=False, emoji=False).print(what)


if __name__ == "__main__":
    sys.exit(main())
