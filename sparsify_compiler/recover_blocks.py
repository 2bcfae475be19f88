"""A recovery that trains one residual block at a time: the memory of gradients, moments and activations is that of one block.

Each block learns to give what the teacher's gives from the beginning of the model, on what the blocks before it, trained already, hand to it: the
order of one-shot pruning (SparseGPT, arXiv:2301.00774, section 4), with gradients in place of a closed form (EBFT, arXiv:2402.12419).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from .errors import InputError
from .named import Named
from .progress import Show
from .recover_loop import Course, Inputs, Loop
from .recover_pair import Student
from .recover_state import RunFile, parameters_of
from .recovery import Recovery
from .training import Hook


@dataclass(frozen=True)
class _Stage:
    """What is trained at a time, and by which losses."""

    parameters: Sequence[nn.Parameter]
    losses: Sequence[Named]
    loss: Callable[[Inputs], Tensor]


def by_blocks(model: nn.Module, hook: Hook, student: Student, losses: Sequence[Named], batches: Iterable[Inputs], course: Course, *,
              metric: Callable[[nn.Module], float] | None, file: Path | None, key: str, show: Show, started: float) -> Recovery:
    """Train a module so; the course is that of each block, but for the minutes, which all share. Raises InputError where it cannot be."""
    if hook.acts:
        raise InputError("the recipe moves masks or adds to the loss, of the whole model", where="blockwise", hint="recover() without blockwise")
    if iter(batches) is batches:
        raise InputError("every block walks over the batches anew, and an iterator can be walked over once", where="batches", hint="give a list")
    stages = _stages(model, hook, student, losses)
    whole, end = Recovery([one.name for one in losses]), started + 60 * course.minutes
    for number, stage in enumerate(stages):
        now = time.monotonic()
        share = replace(course, minutes=max(end - now, 1e-3) / 60 / (len(stages) - number))
        saved = None if file is None else RunFile(file.with_name(f"{file.name}.{number}"), f"{key} {number}")
        with _training(model, stage.parameters):
            loop = Loop(model, hook, stage.loss, share, record=Recovery([one.name for one in stage.losses]), metric=metric, file=saved,
                        show=partial(_shown, show, number, len(stages)), started=now)
            part = loop.run(batches)
        whole.join(part)
        if part.failed:
            break
    show("recover", 1000, 1000)
    return whole


def _stages(model: nn.Module, hook: Hook, student: Student, losses: Sequence[Named]) -> list[_Stage]:
    """The blocks that have something to train, then the rest of the model if it has."""
    parameters_of(model)
    of_states = [loss for loss in losses if set(loss.statistics) == {"states"}]
    of_outputs = [loss for loss in losses if set(loss.statistics) == {"outputs"}]
    if not of_states:
        raise InputError("no loss looks at the states behind the blocks alone", where="losses", hint='losses=("squarehead", "outputs")')
    found = [_Stage(trained, of_states, partial(student.block_loss, losses=of_states, number=number))
             for number, parameters in enumerate(hook.blocks.values()) if (trained := [one for one in parameters if one.requires_grad])]
    taken = {id(parameter) for parameters in hook.blocks.values() for parameter in parameters}
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in taken]
    return [*found, _Stage(rest, of_outputs, partial(student.loss, losses=of_outputs))] if rest and of_outputs else found


@contextmanager
def _training(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Only these parameters are trained meanwhile."""
    before = [parameter for parameter in model.parameters() if parameter.requires_grad]
    chosen = {id(parameter) for parameter in parameters}
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter in before:
            parameter.requires_grad_(True)


def _shown(show: Show, number: int, count: int, what: str, done: int, total: int) -> None:
    """A block's progress as that of the whole, which ends behind the last one."""
    show(what, min((number * total + done) * 1000 // (count * total), 999), 1000)
