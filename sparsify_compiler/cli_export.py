"""`sparsify export`: a saved model for everybody else."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .errors import InputError


class Form(StrEnum):
    """What a model can be written as."""

    ONNX = "onnx"
    SAFETENSORS = "safetensors"
    HUGGINGFACE = "huggingface"
    LIBRARY = "library"


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `sparsify compile --out` or save() wrote.", show_default=False)],
    form: Annotated[Form, typer.Option(help="onnx: one file. safetensors: dense weights. huggingface: a folder for from_pretrained. "
                                            "library: a folder that runs without PyTorch.")],
    out: Annotated[Path, typer.Option(help="The file or folder to write.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="The original model, for one captured in parts.", show_default=False)] = None,
    like: Annotated[Path | None, typer.Option(help="huggingface: the folder that the model came from.", show_default=False)] = None,
    target: Annotated[str | None, typer.Option(help="library: a name of `sparsify targets`; the model's own by default.", show_default=False)] = None,
    cache: Annotated[bool, typer.Option("--cache", help="library: a language model with its key-value cache as arguments.")] = False,
    longest: Annotated[int | None, typer.Option(help="library: tokens of a text at most, where attention by blocks must know; 8192 by default.",
                                                show_default=False)] = None,
) -> None:
    """Write a saved model as ONNX, as dense safetensors, in the layout of Hugging Face, or as a library that runs without PyTorch.

    \b
    Examples:
      sparsify export compiled/ --form onnx --out model.onnx
      sparsify export compiled/ --form huggingface --like ./all-MiniLM-L6-v2 --out pruned/
      sparsify export compiled/ --form library --target cortex-a76 --out board/
    """
    from .artefact import export_dense, load
    from .cli_model import load_model

    for name, given, of in (("--like", like, Form.HUGGINGFACE), ("--target", target, Form.LIBRARY),
                            ("--cache", cache or None, Form.LIBRARY), ("--longest", longest, Form.LIBRARY)):
        if given is not None and form is not of:
            raise InputError(f"{name} is of --form {of}", where="export", hint=f"leave it out, or write --form {of}")
    original = None if model is None else load_model(model).model
    compiled = load(folder, original)
    if form is Form.ONNX:
        compiled.export_onnx(out)
    elif form is Form.SAFETENSORS:
        export_dense(compiled, out)
    elif form is Form.HUGGINGFACE:
        compiled.export_huggingface(out, like if like is not None else original)
    else:
        compiled.export(out, target, cache=cache, **({} if longest is None else {"longest": longest}))
    typer.echo(f"{form} written to {out}")
