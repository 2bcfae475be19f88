"""Showing how far a compile is: bars on a terminal, one line a finished step elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[str, int, int], None]


@contextmanager
def display(progress: bool | Show) -> Iterator[Show]:
    """A function (what, done, total) to call as steps advance. True shows them on stderr, a function is passed on, False shows nothing."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda what, done, total: None
    elif sys.stderr.isatty():
        with _bars() as show:
            yield show
    else:
        yield _lines()


@contextmanager
def _bars() -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


def _lines() -> Show:
    started: dict[str, float] = {}

    def show(what: str, done: int, total: int) -> None:
        begin = started.setdefault(what, time.perf_counter())
        if done >= total:
            sys.stderr.write(f"{what}: {time.perf_counter() - begin:.1f} s\n")
            sys.stderr.flush()
            del started[what]

    return show
