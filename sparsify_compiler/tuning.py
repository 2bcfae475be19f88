"""Tuning: the kernels of a model's layers raced against each other on the machine that they are for, and what was found kept for every later compile.

    found = sc.tune(model, example_inputs, recipe="wanda", density=0.3)     # minutes; sc.compile() then tries what is worth trying only
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import catalog
from .budget import Budget
from .capture import capture
from .compile import as_pipeline, read_batches
from .compile_job import Inputs, Job
from .errors import StorageError
from .far import ELSEWHERE, require_here
from .pipeline import Pipeline
from .progress import display
from .storage import atomic_path
from .target import Target, resolve

if TYPE_CHECKING:
    from torch import nn

    from .codegen.tuned import Record


def tune(model: nn.Module, example_inputs: Inputs, *, recipe: Any = "wanda", target: str | Target = "cpu", density: float | None = None,
         calibration: Iterable[Inputs] | None = None, dynamic: Any = None, again: bool = False,
         rpc: str | None = None, seconds: int = 600, progress: bool | Callable[[str, int, int], None] = False) -> list[Record]:
    """Find the fastest kernels, and their best cuts, for the layers that a recipe makes of a model; what was found now.

    model, example_inputs, recipe, target, calibration, dynamic, progress   as of compile()
    density   the budget of a recipe that does not say it itself
    again     also layers of which something is known
    rpc       HOST:PORT of TVM's RPC server on a machine of the target's kind, or HOST:PORT/KEY of a server with a key or of a tracker: kernels are
              timed there. Without it on this machine, which must be one
    seconds   that a session there may last

    Nothing else should run meanwhile. Killed at any point, it goes on where it stopped when it is called again. Raises what compile() raises, and
    BoardError where the board cannot be reached, or takes too long.
    """
    from .codegen import tuned

    machine, batches = resolve(target), read_batches(calibration)
    if rpc is None:
        require_here(machine, ELSEWHERE)
    known = {record.key: record for record in tuned.records()}
    budget = None if density is None else Budget(density=density)
    with display(progress) as show, torch.no_grad(), _board(machine, rpc, seconds) as board:
        job = Job(model, example_inputs, as_pipeline(recipe), machine, budget, batches, dynamic, None, ("eager",), 0, show, None)
        passes = catalog.get("pass", "pack")(), catalog.get("pass", "lower")(tune="again" if again else "new")
        ctx = job.context(density)
        ctx.board = board
        (job.rewriting() | Pipeline(passes)).run(capture(model, example_inputs, dynamic), ctx, ())
    return [record for record in tuned.records() if record != known.get(record.key)]


def _board(target: Target, rpc: str | None, seconds: int) -> AbstractContextManager[Any]:
    """A session on a remote board; None where kernels are timed here."""
    if rpc is None:
        return nullcontext()
    from .codegen.board import Board

    return Board.connect(target, rpc, seconds)


def export_tuned(path: str | Path) -> int:
    """Write everything that is known as one JSON file, for other machines of the kind; how many results. Raises StorageError."""
    from .codegen import tuned

    with atomic_path(Path(path)) as file:
        return tuned.export(file)


def import_tuned(path: str | Path) -> int:
    """Take over what such a file holds; how many results. Raises ArtefactError where it is none, StorageError where they cannot be kept."""
    from .codegen import cache, tuned

    found = tuned.read_export(Path(path))
    kept = sum(tuned.store(record) for record in found)
    if kept < len(found):
        raise StorageError(cache.warnings()[-1], where=str(cache.folder()), hint="make room, or set SPARSIFY_CACHE to a folder that can be written")
    return kept
